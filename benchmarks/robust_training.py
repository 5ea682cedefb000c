"""Does RL in perturbed scenes make a policy robust, and at what price?

GRPO from the shipped checkpoint, in LIBERO's scenes and in perturbed ones, for equally many control steps;
then every policy plays every axis and level of perturb=, and LIBERO's scenes, from recorded init states:

    python benchmarks/robust_training.py            # some hours; goes on where it was interrupted
    python benchmarks/robust_training.py --no-run   # the page and its figure from the results so far
"""

from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import reproduce
from results_page import START, estimate, markdown, save
from tqdm import tqdm

from vla_envs import perturbations, robustness
from vla_envs.command_line import check_numbers, one_line_errors, parse_args
from vla_envs.files import read_json, whole
from vla_envs.machine import available_cores

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = reproduce.RESULTS / "robustness.csv"
PAGE, FIGURE = reproduce.DOCS / "robust-training.md", reproduce.DOCS / "results" / "robust_training.png"
PLAIN, PERTURBED = "GRPO", "GRPO --perturb any:3"
POLICIES = (START, PLAIN, PERTURBED)
FLAGS = {PLAIN: [], PERTURBED: ["--perturb", "any:3"]}
CELL = ["policy", "task_id", "seed", "axis", "level"]  # names a row
ROWS = [*CELL, "successes", "trials", "commit"]


@dataclass
class Args:
    """Train with and without perturbations, evaluate on all of them, and write the page."""

    task_ids: tuple[int, ...] = (4, 0)
    """Tasks of LIBERO-Object, one policy each"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the training"""
    total_env_steps: int = 120_000
    """Control steps of training, the same for all"""
    episodes: int = 5
    """Recorded init states per axis and level, the same for all; LIBERO's scenes are played from all 50"""
    out: Path = Path("runs/robust_training")
    """Folder of the runs"""
    jobs: int = available_cores()
    """Runs side by side; each gets its share of the cores"""
    run: bool = True
    """Make what is missing; --no-run only writes the page"""


# ---- Runs --------------------------------------------------------------------------------------------


def train(policy: str, task_id: int, seed: int, args: Args) -> Path:
    """Make a run, or go on with one that was interrupted; its folder.

    Raises:
        RuntimeError: When it fails; see ``reproduce.run_script``.
    """
    folder = args.out / f"{'perturbed' if policy == PERTURBED else 'plain'}__{task_id}__{seed}"
    words = [
        "--task-id", task_id, "--seed", seed, "--eval-every", 1000, "--total-env-steps", args.total_env_steps,
        *FLAGS[policy],
    ]  # fmt: skip
    name = f"{policy}, task {task_id}, seed {seed}"
    reproduce.run_script(name, folder, "grpo_vla.py", words, args.jobs)
    return folder


def make_rows(policy: str, task_id: int, seed: int, args: Args) -> pd.DataFrame:
    """Train, and play every axis and level; a row for each. LIBERO's scenes are those of the run itself."""
    folder = train(PLAIN if policy == START else policy, task_id, seed, args)
    result = read_json(folder / "result.json")
    plain = result["success_before" if policy == START else "success_after"]
    name = f"start__{task_id}" if policy == START else folder.name
    out = args.out / f"{name}__evaluated"
    robustness.main(
        robustness.Args(
            checkpoints=() if policy == START else (folder / "checkpoints" / "final",), task_ids=(task_id,),
            episodes=args.episodes, out=out, num_threads=max(1, available_cores() // args.jobs),
        )
    )  # fmt: skip
    (outcomes,) = read_json(out / "results.json")["outcomes"].values()
    cells = {cell: (sum(won), len(won)) for cell, won in outcomes.items()}
    cells[robustness.PLAIN] = plain["successes"], plain["trials"]
    commit = folder.with_suffix(".commit").read_text()
    rows = [
        (policy, task_id, seed, axis, int(level or 0), *counts, commit)
        for (axis, _, level), counts in ((cell.partition(":"), counts) for cell, counts in cells.items())
    ]
    return pd.DataFrame(rows, columns=ROWS)


# ---- The page ----------------------------------------------------------------------------------------

ABOUT = """<!-- Written by `python benchmarks/robust_training.py --no-run`; do not edit. -->

# Training in perturbed scenes

Does RL on LIBERO's own scenes make a policy robust, and what does it change to train in
[perturbed](perturbations.md) ones? One `nano` for each of LIBERO-Object's tasks {tasks} is trained from the
shipped checkpoint with `grpo_vla.py`, once as it is and once with `--perturb any:3` (each group of members
shares one axis, at a level from 1 to 3), for {steps:,} control steps, with {seeds}. All play
deterministically, from recorded init states: LIBERO's scenes from all 50, each axis at each level from
{episodes} of them. Training sees neither these placements nor these perturbations.

The command is `python benchmarks/robust_training.py`; rows are in `benchmarks/results/robustness.csv`, from
runs of commit {commits}.
"""
ABOUT_TABLE = """
Success (%) over levels, tasks and seeds, with Wilson 95 % intervals. *Difference*: {perturbed} less {plain},
in points: the mean over pairs of the same task and seed, of which there are {pairs}; from three on with a
bootstrap 95 % interval over them.
"""
ABOUT_LEVELS = """
Success (%) by level, over tasks and seeds. Level 0 is LIBERO's scenes.
"""


def rate(rows: pd.DataFrame) -> str:
    """``43 (38 to 48)``, in per cent, with the Wilson interval."""
    successes, trials = int(rows["successes"].sum()), int(rows["trials"].sum())
    return robustness.percent([k < successes for k in range(trials)])


def summary(results: pd.DataFrame) -> str:
    """A row for each axis, and one for all of them."""
    axes = [robustness.PLAIN, *perturbations.DRAWS]
    groups = {axis: results[results["axis"] == axis] for axis in axes}
    groups["all axes"] = results[results["axis"] != robustness.PLAIN]
    lines = []
    for axis, rows in groups.items():
        line = {"axis": axis} | {policy: rate(rows[rows["policy"] == policy]) for policy in POLICIES}
        counts = rows.groupby(["task_id", "seed", "policy"])[["successes", "trials"]].sum()
        rates = (100 * counts["successes"] / counts["trials"]).unstack("policy")
        gains = (rates[PERTURBED] - rates[PLAIN]).dropna()
        shown = gains.to_numpy() if len(gains) > 2 else gains.to_numpy().mean(keepdims=True)  # too few
        lines.append(line | {"difference": estimate(np.mean, [shown], "{:+.0f}", "basic")})
    return markdown(pd.DataFrame(lines)) + ABOUT_TABLE.format(
        perturbed=f"`{PERTURBED}`", plain=f"`{PLAIN}`", pairs=len(gains)
    )


def by_level(results: pd.DataFrame) -> str:
    """A row for each axis and policy, a column for each level."""
    counts = results.groupby(["axis", "policy", "level"])[["successes", "trials"]].sum()
    rates = (100 * counts["successes"] / counts["trials"]).map("{:.0f}".format).unstack("level")
    order = [(axis, policy) for axis in (robustness.PLAIN, *perturbations.DRAWS) for policy in POLICIES]
    return markdown(rates.loc[order].reset_index()) + ABOUT_LEVELS


def draw(results: pd.DataFrame, path: Path) -> None:
    """A panel for each axis: success over the level, a line for each policy."""
    figure, panels = plt.subplots(2, 4, figsize=(10, 5), sharex=True, sharey=True, layout="constrained")
    for axis, panel in zip(perturbations.DRAWS, panels.flat):
        rows = results[results["axis"].isin([axis, robustness.PLAIN])]
        for policy in POLICIES:
            counts = rows[rows["policy"] == policy].groupby("level")[["successes", "trials"]].sum()
            panel.plot(counts.index, 100 * counts["successes"] / counts["trials"], ".-", label=policy)
        panel.set_title(axis, fontsize="medium")
        panel.set_ylim(-2, 102)
        panel.set_xticks(range(6), ["plain", *range(1, 6)])
        panel.grid(alpha=0.3)
    figure.supylabel("success (%)")
    for panel in panels[-1]:
        panel.set_xlabel("level")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


def write_page(results: pd.DataFrame, args: Args) -> str:
    """Write the page and its figure; the page's text."""
    perturbed, seeds = results[results["axis"] != robustness.PLAIN], sorted(results["seed"].unique())
    about = ABOUT.format(
        tasks=" and ".join(map(str, results["task_id"].unique())), steps=args.total_env_steps,
        seeds=f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
        episodes=perturbed["trials"].max(),
        commits=" ".join(results["commit"].unique()),
    )  # fmt: skip
    draw(results, FIGURE)
    image = f"![success by axis and level](results/{FIGURE.name})"
    text = f"{about}\n{summary(results)}\n{image}\n\n{by_level(results)}"
    with whole(PAGE) as partial:
        partial.write_text(text)
    return text


def main(args: Args) -> None:
    """Make what is missing, ``jobs`` at a time; results are written as they come."""
    check_numbers(args, "total_env_steps", "episodes", "jobs", above=True)
    results = pd.read_csv(RESULTS) if RESULTS.is_file() else pd.DataFrame(columns=ROWS)
    made = set(results[CELL[:3]].itertuples(index=False, name=None))
    wanted = [
        (policy, task_id, seed)
        for seed in args.seeds for task_id in args.task_ids for policy in POLICIES
        if (policy, task_id, seed) not in made and (policy != START or seed == args.seeds[0])
    ]  # fmt: skip
    if args.run and wanted:
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = [pool.submit(make_rows, *each, args) for each in wanted]
            for future in tqdm(as_completed(futures), total=len(futures), desc="policies", unit="policy"):
                results = reproduce.added(results, future.result()).sort_values(CELL, kind="stable")
                with whole(RESULTS) as partial:
                    results.to_csv(partial, index=False)
    print(write_page(results, args))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args(Args))
