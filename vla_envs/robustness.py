"""Measure how much of a policy's success is left in perturbed scenes, axis by axis and level by level.

Every episode starts from a recorded init state and plays deterministically:

    python -m vla_envs.robustness --task-ids 4
    python -m vla_envs.robustness --axes camera light --checkpoints A/checkpoints/final B/checkpoints/final

The folder --out gets scenes.png, an image of each axis and level, and results.json; at the end robustness.md,
a table with Wilson intervals (95 %), and robustness.png. The same command goes on where it was interrupted.
Further checkpoints are compared with the first one, episode by episode.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import vla_envs  # noqa: F401  (registers the ids)
from vla_envs import perturbations
from vla_envs.command_line import check_numbers, one_line_errors, parse_args
from vla_envs.files import read_json, whole, write_json
from vla_envs.policies import SHIPPED, load_policy
from vla_envs.tasks import get_task, num_init_states, num_tasks, suite_or_file
from vla_envs.training import evaluation

PLAIN = "plain"
Cell = tuple[str, int]  # an axis and a level; (PLAIN, 0) is the scene as it is
#: What results of one folder have in common.
SAME = "suite task_ids policy episodes protocol max_episode_steps seed assets quality".split()


@dataclass
class Args:
    """Evaluate checkpoints on every axis and level of perturbed scenes."""

    policy: str = "nano"
    """nano, flow, openvla, openvla-oft or path/to/file.py:function"""
    checkpoints: tuple[Path, ...] = ()
    """Checkpoints, side by side [the shipped one]"""
    suite: str = "LiberoObject"
    """LIBERO suite, or a folder of BDDL files"""
    task_ids: tuple[int, ...] = ()
    """Tasks of the suite, from 0 [all]"""
    bddl_file: Path | None = None
    """A task of one's own, instead of --suite and --task-ids"""
    axes: tuple[str, ...] = ()
    """Axes of perturbations [all]"""
    levels: tuple[int, ...] = tuple(perturbations.LEVELS)
    """Levels, from 1 to 5"""
    episodes: int = 10
    """Recorded init states per task, axis and level; the first ones"""
    protocol: Literal["tgrpo", "openvla", "simplevla", "rlinf", "lerobot"] | None = None
    """Evaluate as a published system does [actions as in training, 200 control steps]"""
    max_episode_steps: int | None = None
    """Control steps until an episode ends without success [200, or the protocol's]"""
    seed: int = 1
    """Seed of what policies draw at random"""
    assets: str = "builtin"
    """builtin, libero (LIBERO's own: LIBERO_ASSETS, else wheels, else downloaded) or a folder"""
    quality: str = "exact"
    """Of LIBERO's own assets: exact, its very pixels, or fast, with simpler meshes"""
    num_threads: int | None = None
    """Simulator threads [one per core]"""
    device: str = "cpu"
    """Where policies compute: cpu or cuda"""
    out: Path = Path("robustness")
    """Folder of the results"""

    @property
    def eval_episodes(self) -> int:
        """What ``evaluation.play`` calls ``episodes``."""
        return self.episodes


def validate(args: Args) -> Args:
    """Fill in what was left open; a ValueError says which argument does not fit, and what was expected."""
    check_numbers(args, "episodes", "max_episode_steps", "num_threads", above=True)
    suite = suite_or_file(args.suite, args.bddl_file, task_ids=args.task_ids)
    task_ids = args.task_ids or tuple(range(num_tasks(suite)))
    tasks = [get_task(suite, task_id) for task_id in task_ids]
    if len(set(task_ids)) < len(task_ids):
        raise ValueError(f"task_ids are {task_ids}; expected each task once")
    most = min(map(num_init_states, tasks))
    if args.episodes > most:
        raise ValueError(f"episodes is {args.episodes}; expected 1 to {most}, the recorded init states")
    axes = args.axes or tuple(perturbations.DRAWS)
    for axis, level in itertools.product(axes, args.levels):
        perturbations.parse({axis: level})
    if "all" in axes or len(set(axes)) < len(axes) or len(set(args.levels)) < len(args.levels):
        raise ValueError(f"axes are {axes} at levels {args.levels}; expected each once, by its own name")
    if len(set(args.checkpoints)) < len(args.checkpoints):
        raise ValueError(f"checkpoints are {list(map(str, args.checkpoints))}; expected each once")
    if args.protocol and args.max_episode_steps:
        raise ValueError(f"protocol {args.protocol} sets max_episode_steps; expected one of the two")
    settings = evaluation.settings(args.protocol, suite)
    limit = args.max_episode_steps or settings.get("max_episode_steps", 200)
    return dataclasses.replace(args, suite=suite, task_ids=task_ids, axes=axes, max_episode_steps=limit)


# ---- Playing -----------------------------------------------------------------------------------------


def cells_of(args: Args) -> list[Cell]:
    """What is played: the scenes as they are, then each axis at each level."""
    return [(PLAIN, 0), *itertools.product(args.axes, args.levels)]


def name_of(cell: Cell) -> str:
    """A cell in words, as ``--eval-perturb`` takes it: ``camera:3``."""
    axis, level = cell
    return f"{axis}:{level}" if level else PLAIN


def play(args: Args, policy: Any, cell: Cell) -> NDArray[np.bool_]:
    """Which episodes of a cell succeed, (E,), task by task; every checkpoint plays the same ones."""
    tasks = np.repeat(args.task_ids, args.episodes).tolist()
    settings = {"max_episode_steps": args.max_episode_steps} | evaluation.settings(
        args.protocol, args.suite, policy
    )
    envs: Any = gym.make_vec(
        "vla_envs/Libero-v0", num_envs=len(tasks), suite=args.suite, task_id=tasks, assets=args.assets,
        quality=args.quality, action_chunk=policy.action_chunk, num_threads=args.num_threads,
        perturb=name_of(cell) if cell[1] else None, **settings,
    )  # fmt: skip
    try:
        return evaluation.play(envs, policy, 0.0, args)
    finally:
        envs.close()


def read_results(args: Args) -> dict[str, Any]:
    """What the folder holds: checkpoints by name, with the outcomes of the cells that are played.

    Raises:
        ValueError: When it is damaged, or was played otherwise.
    """
    about = {name: getattr(args, name) for name in SAME} | {"task_ids": list(args.task_ids)}
    file = args.out / "results.json"
    if not file.is_file():
        return about | {"outcomes": {}}
    results = read_json(file)
    for name, value in about.items():
        if results.get(name) != value:
            raise ValueError(
                f"{str(args.out)!r} has results whose {name} is {results.get(name)}; expected {value}, or"
                " another --out"
            )
    trials = len(args.task_ids) * args.episodes
    outcomes: Any = results.get("outcomes")
    try:
        cells = [cell for its in outcomes.values() for cell in its.values()]
        damaged = any(len(cell) != trials or set(cell) - {True, False} for cell in cells)
    except (AttributeError, TypeError):
        damaged = True
    if damaged:
        raise ValueError(f"{str(file)!r} is damaged: expected outcomes of {trials} episodes per cell")
    return results


# ---- What is shown -----------------------------------------------------------------------------------


def table(args: Args, outcomes: dict[str, dict[str, list[bool]]]) -> str:
    """``outcomes`` by checkpoint and cell as a Markdown page."""
    lines = [
        "# Robustness",
        "",
        f"{args.suite}, tasks {', '.join(map(str, args.task_ids))}: success (%) from {args.episodes} recorded"
        " init states per task, with 95 % Wilson intervals. `plain` is the scene as it is.",
    ]
    for checkpoint, its in outcomes.items():
        levels = [f"level {level}" for level in args.levels]
        heads = ["axis", *levels, "all levels"]
        lines += ["", f"## {checkpoint}", "", *_row(heads), *_row(["---"] * len(heads))]
        lines += _row([PLAIN, *[""] * len(levels), _percent(its.get(PLAIN, []))])
        for axis in args.axes:
            cells = [its.get(name_of((axis, level)), []) for level in args.levels]
            lines += _row([axis, *map(_percent, cells), _percent(list(itertools.chain(*cells)))])
    first, *others = outcomes
    for other in others:
        lines += [
            "",
            f"## {other} minus {first}",
            "",
            "On the same episodes; the interval is Newcombe's for pairs.",
        ]
        lines += ["", *_row(["axis", "points", "95 %", "p"]), *_row(["---"] * 4)]
        for axis in (PLAIN, *args.axes):
            names = [name for name in outcomes[other] if name.partition(":")[0] == axis]
            mine, theirs = (
                list(itertools.chain(*(outcomes[which][name] for name in names))) for which in (other, first)
            )
            if mine:
                pairs = evaluation.paired(mine, theirs)
                low, high = (f"{100 * pairs[end]:+.0f}" for end in ("low", "high"))
                lines += _row(
                    [axis, f"{100 * pairs['difference']:+.0f}", f"{low} to {high}", f"{pairs['p_value']:.2g}"]
                )
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def _percent(outcomes: list[bool]) -> str:
    if not outcomes:
        return ""
    its = evaluation.success(outcomes)
    return f"{100 * its['rate']:.0f} ({100 * its['low']:.0f} to {100 * its['high']:.0f})"


def draw_figure(args: Args, outcomes: dict[str, dict[str, list[bool]]], path: Path) -> None:
    """A panel per axis: success over the level, with intervals, a line per checkpoint."""
    from matplotlib.figure import Figure

    columns = min(4, len(args.axes))
    rows = -(-len(args.axes) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.2 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel in panels[len(args.axes) :]:
        panel.set_visible(False)
    for axis, panel in zip(args.axes, panels):
        panel.set_title(axis, fontsize=9)
        panel.grid(alpha=0.3)
        panel.set_ylim(-2, 102)
        panel.set_xticks([0, *args.levels], [PLAIN, *map(str, args.levels)])
        for number, (checkpoint, its) in enumerate(outcomes.items()):
            cells = [(PLAIN, 0), *((axis, level) for level in args.levels)]
            shown = [(level, its[name_of((on, level))]) for on, level in cells if name_of((on, level)) in its]
            found = [evaluation.success(played) for _, played in shown]
            rate, low, high = ([100 * each[key] for each in found] for key in ("rate", "low", "high"))
            levels = [level for level, _ in shown]
            panel.plot(levels, rate, ".-", color=f"C{number}", label=checkpoint)
            panel.fill_between(levels, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        panel.set_xlabel("level", fontsize=9)
    figure.supylabel("success (%)", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, frameon=False)
    with whole(path) as partial:
        figure.savefig(partial, dpi=120)


def draw_scenes(args: Args, path: Path) -> None:
    """What the camera sees of the first task's init state 0: a row per axis, a column per level."""
    from matplotlib.figure import Figure

    shape = len(args.axes), len(args.levels)
    figure = Figure(figsize=(1.6 * shape[1] + 0.4, 1.6 * shape[0] + 0.3), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False)
    for row, axis in zip(panels, args.axes):
        row[0].set_ylabel(axis, fontsize=9)
        for panel, level in zip(row, args.levels):
            env = gym.make(
                "vla_envs/Libero-v0", suite=args.suite, task_id=args.task_ids[0], assets=args.assets,
                quality=args.quality, perturb={axis: level}, image_size=192,
            )  # fmt: skip
            obs, _ = env.reset(options={"init_state_id": 0})
            env.close()
            panel.imshow(obs["image"])
            panel.set_xticks([])
            panel.set_yticks([])
    for panel, level in zip(panels[0], args.levels):
        panel.set_title(f"level {level}", fontsize=9)
    with whole(path) as partial:
        figure.savefig(partial, dpi=120)


# ---- All of it ---------------------------------------------------------------------------------------


def main(args: Args) -> str:
    """Play what is missing, cell by cell, and write what ``args.out`` holds; the page's text."""
    args = validate(args)
    shipped = f"the shipped {args.policy}" if args.policy in SHIPPED else args.policy
    names = list(map(str, args.checkpoints)) or [shipped]
    results = read_results(args)
    for each in args.checkpoints:  # a mistake shows now, and not when its turn comes
        load_policy(args.policy, each, "meta", suite=args.suite)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "scenes.png").is_file():
        draw_scenes(args, args.out / "scenes.png")
    outcomes = {name: results["outcomes"].setdefault(name, {}) for name in names}
    missing = [
        (name, cell) for name in names for cell in cells_of(args) if name_of(cell) not in outcomes[name]
    ]
    trials = len(args.task_ids) * args.episodes
    policies: dict[str, Any] = {}  # the one that plays
    with tqdm(total=len(missing) * trials, desc="robustness", unit="episode") as progress:
        for name, cell in missing:
            if name not in policies:
                checkpoint = dict(zip(names, args.checkpoints)).get(name)
                policies = {name: load_policy(args.policy, checkpoint, args.device, suite=args.suite)}
            outcomes[name][name_of(cell)] = play(args, policies[name], cell).tolist()
            write_json(args.out / "results.json", results)
            progress.update(trials)
    page = table(args, outcomes)
    (args.out / "robustness.md").write_text(page)
    draw_figure(args, outcomes, args.out / "robustness.png")
    return page


if __name__ == "__main__":
    arguments = parse_args(Args)
    with one_line_errors():
        print(main(arguments))
