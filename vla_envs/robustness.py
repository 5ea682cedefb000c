"""Measure how much of a policy's success is left in perturbed scenes, axis by axis and level by level.

Every episode starts from a recorded init state and plays deterministically:

    python -m vla_envs.robustness --task-ids 4
    python -m vla_envs.robustness --axes camera light --checkpoints A/checkpoints/final B/checkpoints/final
    python -m vla_envs.robustness --benchmark plus --suite LiberoObject

The axes are those of perturb=, drawn anew for every init state; with --benchmark they are the categories of
LIBERO-Plus, each of whose tasks is played once, or of LIBERO-PRO.

The folder --out gets scenes.png, an image of each axis and level, and results.json; at the end robustness.md,
a table with Wilson intervals (95 %), and robustness.png. The same command goes on where it was interrupted.
Further checkpoints are compared with the first one, episode by episode.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, TypeAlias

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import vla_envs  # noqa: F401  (registers the ids)
from vla_envs import liberoplus, liberopro, perturbations
from vla_envs.command_line import check_numbers, one_line_errors, parse_args
from vla_envs.files import read_json, whole, write_json
from vla_envs.inputs import nearest
from vla_envs.policies import SHIPPED, load_policy
from vla_envs.tasks import get_task, num_init_states, num_tasks, suite_or_file
from vla_envs.training import evaluation

PLAIN = "plain"
SIDE_BY_SIDE = 100  # environments
Outcomes: TypeAlias = dict[str, dict[str, list[bool]]]  # by checkpoint and cell
#: What results of one folder have in common.
SAME = "suite benchmark task_ids policy episodes protocol max_episode_steps seed assets quality".split()


@dataclass
class Args:
    """Evaluate checkpoints on every axis and level of perturbed scenes."""

    policy: str = "nano"
    """nano, flow, openvla, openvla-oft, smolvla, pi0 or path/to/file.py:function; evaluated: ws://host:port"""
    checkpoints: tuple[Path, ...] = ()
    """Checkpoints, side by side [the shipped one]"""
    suite: str = "LiberoObject"
    """LIBERO suite, or a folder of BDDL files"""
    task_ids: tuple[int, ...] = ()
    """Tasks of the suite, from 0 [all]"""
    benchmark: Literal["plus", "pro"] | None = None
    """Play the tasks of LIBERO-Plus or LIBERO-PRO, from their packages, instead of drawing perturbations"""
    bddl_file: Path | None = None
    """A task of one's own, instead of --suite and --task-ids"""
    axes: tuple[str, ...] = ()
    """Axes of perturbations, or categories of --benchmark [all]"""
    levels: tuple[int, ...] = tuple(perturbations.LEVELS)
    """Levels, from 1 to 5"""
    episodes: int = 10
    """Recorded init states per task, axis and level; of LIBERO-Plus's tasks always one, as published"""
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


class Cell(NamedTuple):
    """What is played at one level of one axis; level 0 where there are none."""

    axis: str
    level: int
    suite: str
    task_ids: tuple[int, ...]
    episodes: int  # recorded init states per task, the first ones
    perturb: str | None = None

    @property
    def name(self) -> str:
        """As ``--eval-perturb`` has it: ``camera:3``."""
        return f"{self.axis}:{self.level}" if self.level else self.axis


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
    bases = [base for base, _ in liberoplus.SUITES.values()]
    if args.benchmark and suite not in bases:
        raise ValueError(f"suite is {suite!r} with benchmark {args.benchmark}; expected one of {bases}")
    known = axes_of(args.benchmark)
    axes = args.axes or tuple(known)
    for axis in axes:
        if axis not in known:
            raise ValueError(f"axes has {axis!r}; expected some of {known}{nearest(axis, known)}")
    if unknown := set(args.levels) - set(perturbations.LEVELS):
        raise ValueError(f"levels has {min(unknown)}; expected some of 1 to 5")
    if len(set(axes)) < len(axes) or len(set(args.levels)) < len(args.levels):
        raise ValueError(f"axes are {axes} at levels {args.levels}; expected each once")
    if len(set(args.checkpoints)) < len(args.checkpoints):
        raise ValueError(f"checkpoints are {list(map(str, args.checkpoints))}; expected each once")
    if args.protocol and args.max_episode_steps:
        raise ValueError(f"protocol {args.protocol} sets max_episode_steps; expected one of the two")
    settings = evaluation.settings(args.protocol, suite)
    limit = args.max_episode_steps or settings.get("max_episode_steps", 200)
    return dataclasses.replace(args, suite=suite, task_ids=task_ids, axes=axes, max_episode_steps=limit)


# ---- Playing -----------------------------------------------------------------------------------------


def axes_of(benchmark: str | None) -> list[str]:
    """The axes of ``perturb=``, or the categories of a benchmark."""
    if benchmark == "plus":
        return [*liberoplus.CATEGORIES]
    if benchmark == "pro":
        return ["swap", "object", "language", "task"]
    return list(perturbations.DRAWS)


def cells_of(args: Args) -> list[Cell]:
    """What is played: the tasks as they are, then each axis at each level.

    Level 0 has LIBERO-Plus's tasks of which nothing tells the level.

    Raises:
        ValueError: When the benchmark has nothing that can be played, or LIBERO_PRO names another folder.
        ModuleNotFoundError: When the package of a benchmark is not installed.
    """
    cells = [Cell(PLAIN, 0, args.suite, args.task_ids, args.episodes)]
    if args.benchmark == "plus":
        suite = args.suite.replace("Libero", "LiberoPlus")
        names = {get_task(args.suite, task_id).name for task_id in args.task_ids}
        listed = [
            each for each in liberoplus.list_tasks(suite, args.assets) if each.playable and each.base in names
        ]
        for cell in itertools.product(args.axes, (0, *args.levels)):
            chosen = tuple(each.task_id for each in listed if (each.category, each.level) == cell)
            cells += [Cell(*cell, suite, chosen, 1)] if chosen else []
    elif args.benchmark == "pro":
        liberopro.folder()  # a mistake in it is none of the tasks'
        for axis in args.axes:
            suite = f"{args.suite.replace('Libero', 'LiberoPro')}{axis.capitalize()}"
            chosen = tuple(k for k in args.task_ids if _can_be_played(suite, k))
            cells += [Cell(axis, 0, suite, chosen, args.episodes)] if chosen else []
    else:
        for axis, level in itertools.product(args.axes, args.levels):
            perturb = f"{axis}:{level}"
            cells.append(Cell(axis, level, args.suite, args.task_ids, args.episodes, perturb))
    if len(cells) == 1:
        raise ValueError(f"axes are {args.axes}, of which nothing can be played with assets {args.assets!r}")
    return cells


def _can_be_played(suite: str, task_id: int) -> bool:
    """Whether the package of LIBERO-PRO has all that a task needs."""
    try:
        get_task(suite, task_id)
    except ValueError:
        return False
    return True


def play(args: Args, policy: Any, cell: Cell, progress: Any) -> list[bool]:
    """Which episodes of a cell succeed, task by task; every checkpoint plays the same ones."""
    settings = {"max_episode_steps": args.max_episode_steps} | evaluation.settings(
        args.protocol, cell.suite, policy
    )
    playing = SimpleNamespace(seed=args.seed, protocol=args.protocol, eval_episodes=cell.episodes)
    outcomes: list[bool] = []
    at_once = max(1, SIDE_BY_SIDE // cell.episodes)
    for start in range(0, len(cell.task_ids), at_once):
        tasks = np.repeat(cell.task_ids[start : start + at_once], cell.episodes).tolist()
        envs: Any = gym.make_vec(
            "vla_envs/Libero-v0", num_envs=len(tasks), suite=cell.suite, task_id=tasks, assets=args.assets,
            quality=args.quality, action_chunk=policy.action_chunk, num_threads=args.num_threads,
            perturb=cell.perturb, **settings,
        )  # fmt: skip
        outcomes += evaluation.play(envs, policy, 0.0, playing).tolist()
        envs.close()
        progress.update(len(tasks))
    return outcomes


def read_results(args: Args, cells: list[Cell]) -> dict[str, Any]:
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
    trials = {cell.name: len(cell.task_ids) * cell.episodes for cell in cells}
    outcomes: Any = results.get("outcomes")
    try:
        for name, won in ((name, won) for its in outcomes.values() for name, won in its.items()):
            if len(won) != trials.get(name, len(won)) or set(won) - {True, False}:
                raise TypeError
    except (AttributeError, TypeError):
        raise ValueError(
            f"{str(file)!r} is damaged; expected the outcome of every episode of a cell"
        ) from None
    return results


# ---- What is shown -----------------------------------------------------------------------------------


def table(args: Args, cells: list[Cell], outcomes: Outcomes) -> str:
    """``outcomes`` as a Markdown page."""
    rest = cells[1:]
    levels = sorted({cell.level for cell in rest} - {0})
    heads = [*(f"level {level}" for level in levels), "all levels"] if levels else ["success"]
    what = {None: "", "plus": ", in LIBERO-Plus's tasks", "pro": ", in LIBERO-PRO's tasks"}[args.benchmark]
    lines = [
        "# Robustness",
        "",
        f"{args.suite}, tasks {', '.join(map(str, args.task_ids))}{what}: success (%) with 95 % Wilson"
        " intervals, deterministic, from recorded init states. `plain` is the tasks as they are. Tasks that"
        " cannot be played are left out.",
    ]
    for checkpoint, its in outcomes.items():
        lines += ["", f"## {checkpoint}", "", _row(["axis", *heads]), _row(["---"] * (1 + len(heads)))]
        lines.append(_row([PLAIN, *[""] * (len(heads) - 1), percent(its[PLAIN])]))
        for axis in args.axes:
            won = {cell.level: its[cell.name] for cell in rest if cell.axis == axis}
            shown = [percent(won.get(level, [])) for level in levels]
            lines.append(_row([axis, *shown, percent(list(itertools.chain(*won.values())))]))
    first, *others = outcomes
    for other in others:
        lines += ["", f"## {other} minus {first}", "", "On the same episodes; Newcombe's interval for pairs."]
        lines += ["", _row(["axis", "points", "95 %", "p"]), _row(["---"] * 4)]
        for axis in (PLAIN, *args.axes):
            mine, theirs = (
                [won for cell in cells if cell.axis == axis for won in outcomes[which][cell.name]]
                for which in (other, first)
            )
            if mine:
                pairs = evaluation.paired(mine, theirs)
                points, low, high = (f"{100 * pairs[name]:+.0f}" for name in ("difference", "low", "high"))
                lines.append(_row([axis, points, f"{low} to {high}", f"{pairs['p_value']:.2g}"]))
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def percent(outcomes: list[bool]) -> str:
    """``43 (38 to 48)``, in per cent, with the Wilson interval; nothing of no episodes."""
    if not outcomes:
        return ""
    its = evaluation.success(outcomes)
    return f"{100 * its['rate']:.0f} ({100 * its['low']:.0f} to {100 * its['high']:.0f})"


def draw_figure(args: Args, cells: list[Cell], outcomes: Outcomes, path: Path) -> None:
    """A panel per axis: success over the level, with intervals, a line per checkpoint."""
    from matplotlib.figure import Figure

    columns = min(4, len(args.axes))
    rows = -(-len(args.axes) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.2 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel in panels[len(args.axes) :]:
        panel.set_visible(False)
    for axis, panel in zip(args.axes, panels):
        shown = [cell for cell in cells if cell.axis in (PLAIN, axis)]
        places = [cell.level or int(cell.axis != PLAIN) for cell in shown]
        panel.set_title(axis, fontsize=9)
        panel.grid(alpha=0.3)
        panel.set_ylim(-2, 102)
        panel.set_xticks(places, [str(cell.level or cell.axis) for cell in shown])
        for number, (checkpoint, its) in enumerate(outcomes.items()):
            found = [evaluation.success(its[cell.name]) for cell in shown]
            rate, low, high = ([100 * each[key] for each in found] for key in ("rate", "low", "high"))
            panel.plot(places, rate, ".-", color=f"C{number}", label=checkpoint)
            panel.fill_between(places, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        if any(cell.level for cell in shown):
            panel.set_xlabel("level", fontsize=9)
    figure.supylabel("success (%)", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, frameon=False)
    with whole(path) as partial:
        figure.savefig(partial, dpi=120)


def draw_scenes(args: Args, cells: list[Cell], path: Path) -> None:
    """What the camera sees of the first task of each cell: a row per axis, a column per level."""
    from matplotlib.figure import Figure

    levels = sorted({cell.level for cell in cells if cell.axis != PLAIN})
    figure = Figure(figsize=(1.6 * len(levels) + 0.4, 1.6 * len(args.axes) + 0.3), layout="constrained")
    panels = figure.subplots(len(args.axes), len(levels), squeeze=False)
    for axis, row in zip(args.axes, panels):
        row[0].set_ylabel(axis, fontsize=9)
        for level, panel in zip(levels, row):
            panel.set_xticks([])
            panel.set_yticks([])
            chosen = [cell for cell in cells if (cell.axis, cell.level) == (axis, level)]
            panel.spines[:].set_visible(bool(chosen))
            for cell in chosen:
                panel.imshow(_scene(args, cell))
    for level, panel in zip(levels, panels[0]):
        panel.set_title(f"level {level}" if level else "", fontsize=9)
    with whole(path) as partial:
        figure.savefig(partial, dpi=120)


def _scene(args: Args, cell: Cell) -> NDArray[np.uint8]:
    """The image of the cell's first task's init state 0."""
    env = gym.make(
        "vla_envs/Libero-v0", suite=cell.suite, task_id=cell.task_ids[0], assets=args.assets,
        quality=args.quality, perturb=cell.perturb, image_size=192,
    )  # fmt: skip
    obs, _ = env.reset(options={"init_state_id": 0})
    env.close()
    return obs["image"]


# ---- All of it ---------------------------------------------------------------------------------------


def main(args: Args) -> str:
    """Play what is missing, cell by cell, and write what ``args.out`` holds; the page's text."""
    args = validate(args)
    shipped = f"the shipped {args.policy}" if args.policy in SHIPPED else args.policy
    names = list(map(str, args.checkpoints)) or [shipped]
    cells = cells_of(args)
    args = dataclasses.replace(args, axes=tuple(dict.fromkeys(cell.axis for cell in cells[1:])))
    results = read_results(args, cells)
    for each in args.checkpoints or (None,):  # a mistake shows now, and not when its turn comes
        load_policy(args.policy, each, "meta", suite=args.suite)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "scenes.png").is_file():
        draw_scenes(args, cells, args.out / "scenes.png")
    outcomes: Outcomes = {name: results["outcomes"].setdefault(name, {}) for name in names}
    missing = [(name, cell) for name in names for cell in cells if cell.name not in outcomes[name]]
    policies: dict[str, Any] = {}  # the one that plays
    total = sum(len(cell.task_ids) * cell.episodes for _, cell in missing)
    with tqdm(total=total, desc="robustness", unit="episode") as progress:
        for name, cell in missing:
            if name not in policies:
                checkpoint = dict(zip(names, args.checkpoints)).get(name)
                policies = {name: load_policy(args.policy, checkpoint, args.device, suite=args.suite)}
            outcomes[name][cell.name] = play(args, policies[name], cell, progress)
            write_json(args.out / "results.json", results)
    page = table(args, cells, outcomes)
    (args.out / "robustness.md").write_text(page)
    draw_figure(args, cells, outcomes, args.out / "robustness.png")
    return page


if __name__ == "__main__":
    arguments = parse_args(Args)
    with one_line_errors():
        print(main(arguments))
