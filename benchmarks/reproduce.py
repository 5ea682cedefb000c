"""The TGRPO paper's Table 1 and its curves at laptop scale: every method on the same tasks, seeds and steps.

What is in --results is not run again, and an interrupted run goes on, so the whole can be done in pieces:

    python benchmarks/reproduce.py --task-ids 4                      # one task: two hours on two cores
    python benchmarks/reproduce.py                                   # everything: nearly a day
    python benchmarks/reproduce.py --heat-map 4 --seeds 1            # alpha1 against alpha2 on task 4
    python benchmarks/reproduce.py --questions --task-ids 0 2 4 7    # what the paper leaves open, in pairs
    python benchmarks/reproduce.py --no-run                          # tables and pictures of what there is
"""

import csv
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rliable import library, metrics
from scipy.stats import bootstrap
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from vla_envs import evaluation
from vla_envs.command_line import one_line_errors, parse_args
from vla_envs.files import whole
from vla_envs.inputs import nearest
from vla_envs.machine import available_cores

matplotlib.use("Agg")
import matplotlib.pyplot as plt

warnings.filterwarnings("ignore", "random_state is deprecated", FutureWarning)  # rliable's way of seeding

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))
from tgrpo_vla import PAPER_ALPHAS  # noqa: E402

METHODS = {
    "PPO": ["ppo_vla.py"],
    "GRPO": ["grpo_vla.py"],
    "TGRPO": ["tgrpo_vla.py"],
    "TGRPO without the step term": ["tgrpo_vla.py", "--alpha1", "0"],
    "TGRPO without the trajectory term": ["tgrpo_vla.py", "--alpha2", "0"],
}
PAPERS = "TGRPO with the paper's alphas"  # which differ from task to task
QUESTIONS = {  # a picture each
    "alphas": {PAPERS: ["tgrpo_vla.py"], "TGRPO --alphas auto": ["tgrpo_vla.py", "--alphas", "auto"]},
    "return": {
        f"TGRPO --return-mode {mode}": ["tgrpo_vla.py", "--return-mode", mode] for mode in ("sum", "mean")
    },
    "grouping": {"TGRPO --group-by stage": ["tgrpo_vla.py", "--group-by", "stage"]},
    "credit": {"GRPO": METHODS["GRPO"], "GRPO --credit stage": ["grpo_vla.py", "--credit", "stage"]},
    "letter": {  # the paper's choices all at once, also with smaller steps, and one by one
        f"TGRPO {flags}": ["tgrpo_vla.py", *flags.split()]
        for flags in (
            "--preset paper --learning-rate 1e-4",
            "--learning-rate 1e-4",
            "--preset paper",
            "--stop group",
            "--no-clip",
            "--update-every step",
        )
    },
}
ASKED = {method: words for question in QUESTIONS.values() for method, words in question.items()}
PAIRS = (  # of methods, on the same tasks and seeds
    *((method, "TGRPO") for method in ASKED),
    ("GRPO --credit stage", "GRPO"),
    ("TGRPO --preset paper --learning-rate 1e-4", "TGRPO --learning-rate 1e-4"),
)
TWINS = {  # the same runs under two names
    "TGRPO 0.3/0.7": "TGRPO",
    "TGRPO 0/0.7": "TGRPO without the step term",
    "TGRPO 0.3/0": "TGRPO without the trajectory term",
}
ALPHAS1, ALPHAS2 = (0.0, 0.3, 3.0), (0.0, 0.7, 7.0)  # their ratio, and ten times both
HEAT_MAP = {
    f"TGRPO {alpha1:g}/{alpha2:g}": ["tgrpo_vla.py", "--alpha1", f"{alpha1:g}", "--alpha2", f"{alpha2:g}"]
    for alpha1, alpha2 in itertools.product(ALPHAS1, ALPHAS2)
    if alpha1 or alpha2
}
START = "SFT, the start"
CURVES = {
    "charts/success_rate": "success on the recorded init states",
    "group/success_mean": "success of the training episodes, sampled",
    "losses/logprob": "mean log-probability of a token",
    "losses/entropy": "mean entropy of a token (nats)",
}
RUN = ["method", "task_id", "seed", "before", "after", "sampled_before", "sampled_after", "trials",
       "env_steps", "episodes", "wall_s", "commit"]  # fmt: skip
POINT = ["method", "task_id", "seed", "tag", "env_steps", "value"]
TOTAL_ENV_STEPS = 120_000  # control steps of training, the same for all
REACHED = (0.8, 0.9)  # success, deterministic: how soon
DRAWS = 5000  # of a bootstrap
MINUTES = 12.0  # of a run, as long as nothing was measured


@dataclass
class Args:
    """Run every method on every task and seed, from the shipped checkpoint, and compare them."""

    suite: str = "LiberoObject"
    """LIBERO suite"""
    checkpoint: Path | None = None
    """Starting checkpoint [the shipped one, which plays LIBERO-Object]"""
    max_episode_steps: int | None = None
    """Control steps until an episode ends without success [the scripts']"""
    results: Path | None = None
    """Folder of runs.csv, curves.csv, table.md and the pictures; a new one makes every run anew
    [benchmarks/results/<suite>]"""
    out: Path | None = None
    """Folder of the runs themselves [runs/reproduce/<suite>; with --results: runs there]"""
    methods: tuple[str, ...] = ()
    """Which of the methods [all of Table 1; with --questions those that the pairs need]"""
    task_ids: tuple[int, ...] = tuple(range(10))
    """Tasks of the suite"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds"""
    questions: bool = False
    """Instead of Table 1: what the paper leaves open, each answer beside what it is compared with"""
    heat_map: int | None = None
    """Instead of all that: pairs of alphas on this task"""
    jobs: int = available_cores()
    """Runs side by side; each gets its share of the cores"""
    run: bool = True
    """Make the runs that are missing; --no-run only shows what there is"""


# ---- Runs --------------------------------------------------------------------------------------------


def folder_of(method: str, task_id: int, seed: int, args: Args) -> Path:
    """Where a run is."""
    name = "".join(letter if letter.isalnum() else "_" for letter in method.lower())
    out = args.out or (args.results / "runs" if args.results else Path("runs/reproduce") / args.suite)
    return out / f"{name}__{task_id}__{seed}"


def commit() -> str:
    """The checkout's commit, with a ``+`` where files have been changed since."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "HEAD", "--quiet", "--", "*.py"], capture_output=True)
    return head.stdout.strip() + "+" * (changed.returncode == 1)


def play(method: str, task_id: int, seed: int, args: Args) -> None:
    """Make a run, or go on with one that was interrupted."""
    folder = folder_of(method, task_id, seed, args)
    if (folder / "result.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    cores = max(1, available_cores() // args.jobs)
    script, *flags = (METHODS | ASKED | HEAT_MAP)[method]
    if method == PAPERS:
        alpha1, alpha2 = PAPER_ALPHAS[task_id]
        flags = ["--alpha1", alpha1, "--alpha2", alpha2]
    start = ["--checkpoint", args.checkpoint] if args.checkpoint else []
    if args.max_episode_steps is not None:
        start += ["--max-episode-steps", args.max_episode_steps]
    begun = (folder / "args.json").is_file()
    words = ["--resume", folder, "--num-threads", cores] if begun else [
        "--run-dir", folder, "--task-id", task_id, "--seed", seed, "--num-threads", cores,
        "--total-env-steps", TOTAL_ENV_STEPS, "--suite", args.suite, *start, *flags,
    ]  # fmt: skip
    if not begun:
        folder.with_suffix(".commit").write_text(commit())
    log = folder.with_suffix(".log")
    with open(log, "a") as file:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, words)], stdout=file, stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": str(cores)},
        )  # fmt: skip
    if done.returncode:
        last = log.read_text().replace("\r", "\n").strip().splitlines()[-1:]
        raise RuntimeError(f"{method}, task {task_id}, seed {seed}: {' '.join(last)} (all of it in {log})")


def read_run(method: str, task_id: int, seed: int, args: Args) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A finished run's line of ``runs.csv`` and its lines of ``curves.csv``."""
    folder = folder_of(method, task_id, seed, args)
    result = json.loads((folder / "result.json").read_text())
    which = {"method": method, "task_id": task_id, "seed": seed}
    line = which | {
        "before": result["success_before"]["successes"], "after": result["success_after"]["successes"],
        "sampled_before": result["sampled_before"]["successes"],
        "sampled_after": result["sampled_after"]["successes"],
        "trials": result["success_after"]["trials"], "env_steps": result["env_steps"],
        "episodes": result["episodes"], "wall_s": round(result["wall_s"]),
        "commit": folder.with_suffix(".commit").read_text(),
    }  # fmt: skip
    events = EventAccumulator(str(folder)).Reload()
    points = [
        which | {"tag": tag, "env_steps": event.step, "value": round(event.value, 4)}
        for tag in CURVES
        for event in (events.Scalars(tag) if tag in events.Tags()["scalars"] else [])
    ]
    return line, points


def read_csv(path: Path, like: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a table, its columns of the types of ``like``; none where there is no table.

    An empty cell is left out: a run of before there was such a column.
    """
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [{k: type(like.get(k, ""))(v) for k, v in line.items() if v} for line in csv.DictReader(file)]


def write_csv(path: Path, columns: list[str], lines: list[dict[str, Any]]) -> None:
    """A table, whole or not at all."""
    with whole(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(lines, key=lambda line: [line[c] for c in ("task_id", "method", "seed")]))


# ---- Table -------------------------------------------------------------------------------------------


def table(lines: list[dict[str, Any]], methods: list[str]) -> str:
    """Successes by method and task, and rliable's aggregates over the runs that all the methods have made."""
    task_ids = sorted({line["task_id"] for line in lines})
    rates: dict[str, dict[tuple[int, int], float]] = {}  # by method: by task and seed
    cells: dict[tuple[str, int], list[tuple[int, int]]] = {}  # by method and task: successes, trials
    for line in lines:
        which = line["task_id"], line["seed"]
        for name, won in ((line["method"], line["after"]), (START, line["before"])):
            if which not in rates.setdefault(name, {}):  # every method's runs start alike
                rates[name][which] = won / line["trials"]
                cells.setdefault((name, line["task_id"]), []).append((won, line["trials"]))
    shown = [method for method in (START, *methods) if method in rates]
    common = set.intersection(*(set(rates[method]) for method in shown))
    seeds = [seed for seed in sorted({s for _, s in common})
             if all((t, seed) in common for t in {t for t, _ in common})]  # fmt: skip
    tasks = sorted({t for t, _ in common})
    scores = {m: np.array([[rates[m][t, s] for t in tasks] for s in seeds]) for m in shown} if seeds else {}

    text = [
        f"| method | {' | '.join(f'task {t}' for t in task_ids)} | IQM | better than the start |",
        "| --- |" + " --- |" * (len(task_ids) + 2),
    ]
    for method in shown:
        row = []
        for task_id in task_ids:
            won, trials = np.sum(cells.get((method, task_id), [(0, 0)]), axis=0)
            row.append(evaluation.percent(evaluation.success(np.arange(trials) < won)) if trials else "")
        row += ["", ""]
        if seeds:
            draws = np.random.RandomState(0)
            point, interval = library.get_interval_estimates(
                {method: scores[method]}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=DRAWS,
                random_state=draws,
            )  # fmt: skip
            low, high = interval[method][:, 0]
            row[-2] = f"{100 * point[method][0]:.0f} % ({100 * low:.0f} to {100 * high:.0f} %)"
            if method != START:
                pair = {method: (scores[method], scores[START])}
                point, interval = library.get_interval_estimates(
                    pair, metrics.probability_of_improvement, reps=DRAWS, random_state=draws
                )
                low, high = np.ravel(interval[method])
                row[-1] = f"{np.ravel(point[method])[0]:.2f} ({low:.2f} to {high:.2f})"
        text.append(f"| {method} | {' | '.join(row)} |")
    tasks_seeds = f"tasks {tasks}, seeds {seeds}" if seeds else "no task and seed that all methods have"
    text += [
        "",
        f"Successes with Wilson 95 % intervals over all runs. IQM (interquartile mean) and the probability of"
        f" improvement with stratified bootstrap 95 % intervals, by rliable, over {tasks_seeds}.",
    ]
    return "\n".join(text) + "\n"


def reached(lines: list[dict[str, Any]], points: list[dict[str, Any]], methods: list[str]) -> str:
    """Steps and minutes until an evaluation showed ``REACHED``: the median and the range over the seeds."""
    curves: dict[tuple[str, int, int], list[tuple[int, float]]] = {}
    for p in (p for p in points if p["tag"] == "charts/success_rate"):
        curves.setdefault((p["method"], p["task_id"], p["seed"]), []).append((p["env_steps"], p["value"]))
    shares = [f"{share:.0%}".replace("%", " %") for share in REACHED]
    text = [
        f"| method | task | {' | '.join(f'steps to {s} | minutes to {s}' for s in shares)} |",
        "| --- | --- |" + " --- | --- |" * len(REACHED),
    ]
    for method, task_id in dict.fromkeys((m, x["task_id"]) for m in methods for x in lines):
        its = [x for x in lines if x["method"] == method and x["task_id"] == task_id]
        if not its:
            continue
        cells = []
        for share in REACHED:
            steps, minutes = [], []
            for x in its:
                curve = sorted(curves.get((method, task_id, x["seed"]), []))
                if first := [step for step, value in curve if value >= share]:
                    steps.append(first[0])
                    minutes.append(first[0] / x["env_steps"] * x["wall_s"] / 60)
            for values, form in ((steps, "{:,.0f}"), (minutes, "{:.1f}")):
                middle, low, high = (form.format(x) for x in np.quantile(values or [np.nan], [0.5, 0, 1]))
                words = middle if low == high else f"{middle} ({low} to {high})"
                few = "" if len(values) == len(its) else f", {len(values)} of {len(its)} runs"
                cells.append(words + few if values else "not reached")
        text.append(f"| {method} | {task_id} | {' | '.join(cells)} |")
    text += [
        "",
        "Control steps of training before the first evaluation, one in five iterations, whose deterministic"
        " success was that high (0: the start's): median and range over the seeds. Minutes are that share of"
        " the run's wall time, its evaluations among them, with the other jobs beside it.",
    ]
    return "\n".join(text) + "\n"


def with_twins(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of a table, and those of equal runs once more under their other name."""
    return lines + [
        line | {"method": method}
        for line in lines
        for method, other in TWINS.items()
        if other == line["method"]
    ]


def pairs_table(lines: list[dict[str, Any]]) -> str:
    """How much more often one method of each of ``PAIRS`` succeeds than the other, by task and altogether."""
    task_ids = sorted({line["task_id"] for line in lines})
    points = {(x["method"], x["task_id"], x["seed"]): 100 * x["after"] / x["trials"] for x in lines}
    text = [
        f"| pair | {' | '.join(f'task {t}' for t in task_ids)} | all |",
        "| --- |" + " --- |" * (len(task_ids) + 1),
    ]
    for method, other in PAIRS:
        gains: dict[int, list[float]] = {t: [] for t in task_ids}
        for (name, task_id, seed), value in points.items():
            if name == method and (other, task_id, seed) in points:
                gains[task_id].append(value - points[other, task_id, seed])
        cells = [f"{np.mean(g):+.0f} ({len(g)})" if g else "" for g in gains.values()]
        every = np.concatenate([*gains.values(), []])
        if not len(every):
            continue
        whole = f"{every.mean():+.1f} ({len(every)})"
        if len(every) > 1 and np.ptp(every):
            test = bootstrap(
                (every,), np.mean, method="basic", n_resamples=DRAWS, rng=np.random.default_rng(0)
            )
            low, high = test.confidence_interval
            whole = f"{every.mean():+.1f} ({low:+.1f} to {high:+.1f}; {len(every)})"
        text.append(f"| {method} against {other} | {' | '.join([*cells, whole])} |")
    text += [
        "",
        "Points of success after training: means of the paired differences (same task, same seed), with the"
        " number of pairs; of all tasks with bootstrap 95 % intervals over the pairs.",
    ]
    return "\n".join(text) + "\n"


# ---- Pictures ----------------------------------------------------------------------------------------


def draw_curves(points: list[dict[str, Any]], methods: list[str], path: Path) -> None:
    """Mean and range over the runs that all methods with curves have, against environment steps."""
    figure, axes = plt.subplots(1, len(CURVES), figsize=(5 * len(CURVES), 4.2), layout="constrained")
    for axis, (tag, name) in zip(axes, CURVES.items()):
        made: dict[str, dict[tuple[int, int], list[tuple[int, float]]]] = {}
        for p in (p for p in points if p["tag"] == tag and p["method"] in methods):
            runs = made.setdefault(p["method"], {})
            runs.setdefault((p["task_id"], p["seed"]), []).append((p["env_steps"], p["value"]))
        common = sorted(set.intersection(*map(set, made.values()))) if made else []
        for method in (method for method in methods if method in made and common):
            curves = [np.array(made[method][run]) for run in common]
            grid = np.linspace(0, min(curve[-1, 0] for curve in curves), 50)
            values = [np.interp(grid, *curve.T) for curve in curves]
            (line,) = axis.plot(grid / 1000, np.mean(values, axis=0), linewidth=2, label=method)
            low, high = np.min(values, axis=0), np.max(values, axis=0)
            axis.fill_between(grid / 1000, low, high, alpha=0.12, color=line.get_color())
        of = ", ".join(f"{task_id}/{seed}" for task_id, seed in common)
        axis.set_title(f"{name}\n{textwrap.fill(f'task/seed {of}', 50)}", fontsize="medium")
        axis.set_xlabel("thousand environment steps")
        axis.grid(alpha=0.3)
    for axis in axes[:2]:
        axis.set_ylim(0, 1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    with whole(path) as partial:
        figure.savefig(partial, dpi=100)
    plt.close(figure)


def draw_heat_map(lines: list[dict[str, Any]], path: Path) -> None:
    """One task's success after training by alpha1 and alpha2, the mean over seeds that all pairs have."""
    seeds = [{line["seed"] for line in lines if line["method"] == method} for method in HEAT_MAP]
    common = set.intersection(*filter(None, seeds))
    grid = np.full((len(ALPHAS1), len(ALPHAS2)), np.nan)
    for (row, alpha1), (column, alpha2) in itertools.product(enumerate(ALPHAS1), enumerate(ALPHAS2)):
        name = f"TGRPO {alpha1:g}/{alpha2:g}"
        rates = [x["after"] / x["trials"] for x in lines if x["method"] == name and x["seed"] in common]
        grid[row, column] = np.mean(rates) if rates else np.nan
    figure, axis = plt.subplots(figsize=(4.6, 4), layout="constrained")
    image = axis.imshow(grid, vmin=0, vmax=1, origin="lower", cmap="viridis")
    for row, column in np.argwhere(np.isfinite(grid)):
        axis.text(column, row, f"{100 * grid[row, column]:.0f} %", ha="center", va="center", color="white")
    axis.set(
        xticks=range(len(ALPHAS2)), xticklabels=ALPHAS2, xlabel="alpha2 (trajectory)",
        yticks=range(len(ALPHAS1)), yticklabels=ALPHAS1, ylabel="alpha1 (step)",
        title=f"task {lines[0]['task_id']}, seed {', '.join(map(str, sorted(common)))}",
    )  # fmt: skip
    figure.colorbar(image, label="success after training")
    with whole(path) as partial:
        figure.savefig(partial, dpi=100)
    plt.close(figure)


def page(of: Callable[[list[dict[str, Any]]], str], lines: list[dict[str, Any]], soon: str) -> str:
    """A table of deterministic episodes, the same of sampled ones, and how soon success was reached."""
    sampled = [x | {"before": x["sampled_before"], "after": x["sampled_after"]} for x in lines]
    return (
        f"# Deterministic\n\n{of(lines)}\n# Sampled at the training temperature\n\n{of(sampled)}\n"
        f"# How soon\n\n{soon}"
    )


def show(lines: list[dict[str, Any]], points: list[dict[str, Any]], results: Path) -> None:
    """Table and pictures of the runs so far."""
    methods = [method for method in METHODS if any(line["method"] == method for line in lines)]
    named, named_points = with_twins(lines), with_twins(points)
    if methods:
        shown = [x for x in lines if x["method"] in methods]
        with whole(results / "table.md") as partial:
            partial.write_text(page(lambda x: table(x, methods), shown, reached(shown, points, methods)))
    if any(line["method"] in ASKED for line in lines):
        with whole(results / "questions.md") as partial:
            partial.write_text(page(pairs_table, named, reached(named, points, ["TGRPO", *ASKED])))
    if any(point["method"] in METHODS for point in points):
        draw_curves(points, list(METHODS), results / "curves.png")
    for question, asked in QUESTIONS.items():
        if any(point["method"] in asked for point in points):
            draw_curves(named_points, ["TGRPO", *asked], results / f"{question}.png")
    only_mapped = HEAT_MAP.keys() - ASKED.keys()
    for task_id in sorted({line["task_id"] for line in lines if line["method"] in only_mapped}):
        its_lines = [x for x in named if x["task_id"] == task_id and x["method"] in HEAT_MAP]
        draw_heat_map(its_lines, results / f"heat_map_{task_id}.png")


def main(args: Args) -> None:
    """Make what is missing, ``jobs`` at a time; results are written as they come."""
    names = list(METHODS | ASKED)
    if unknown := sorted(set(args.methods) - set(names)):
        raise ValueError(
            f"methods {unknown} are unknown; expected some of {names}{nearest(unknown[0], names)}"
        )
    if args.jobs < 1:
        raise ValueError(f"jobs is {args.jobs}; expected at least 1")
    task_ids = args.task_ids if args.heat_map is None else (args.heat_map,)
    if unknown_tasks := set(task_ids) - set(range(10)):
        raise ValueError(f"task_ids {sorted(unknown_tasks)} are unknown; expected some of 0 to 9")
    if args.heat_map is not None and (args.methods or args.questions or args.task_ids != Args.task_ids):
        raise ValueError(
            "heat_map is of all alphas on its task; expected neither --methods nor --questions nor --task-ids"
        )
    if args.results is None:
        args = dataclasses.replace(args, out=folder_of("", 0, 0, args).parent, results=RESULTS / args.suite)
    results = args.results
    results.mkdir(parents=True, exist_ok=True)
    lines = read_csv(results / "runs.csv", dict.fromkeys(RUN, 0) | {"method": "", "commit": ""})
    points = read_csv(results / "curves.csv", {"task_id": 0, "seed": 0, "env_steps": 0, "value": 0.0})
    chosen = HEAT_MAP if args.heat_map is not None else ("TGRPO", *ASKED) if args.questions else METHODS
    methods = args.methods or tuple(chosen)
    known = {(line["method"], line["task_id"], line["seed"]) for line in with_twins(lines)}
    wanted = [each for seed in args.seeds for task_id in task_ids for method in methods
              if (each := (method, task_id, seed)) not in known
              and TWINS.get(method) not in methods]  # fmt: skip
    if args.run and not wanted:
        print(f"nothing to run: all of it is in {results}; a new --results makes it anew")
    if args.run and wanted:
        minutes = np.median([line["wall_s"] for line in lines]) / 60 if lines else MINUTES
        hours = len(wanted) * minutes / args.jobs / 60
        print(f"{len(wanted)} runs, {args.jobs} side by side: about {hours:.1f} h at {minutes:.0f} min each")
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = {pool.submit(play, *each, args): each for each in wanted}
            try:
                for future in tqdm(as_completed(futures), total=len(futures), desc="runs", unit="run"):
                    future.result()
                    line, its_points = read_run(*futures[future], args)
                    lines, points = lines + [line], points + its_points
                    write_csv(results / "runs.csv", RUN, lines)
                    write_csv(results / "curves.csv", POINT, points)
                    show(lines, points, results)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    show(lines, points, results)
    for name in ("table.md", "questions.md"):
        if (results / name).is_file():
            print((results / name).read_text())


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args(Args))
