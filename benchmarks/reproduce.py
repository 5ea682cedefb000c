"""The TGRPO paper's Table 1 and its curves at laptop scale: every method on the same tasks, seeds and steps.

Runs that are in --results are not made again, and an interrupted run goes on, so it can be done in pieces:

    python benchmarks/reproduce.py --task-ids 4                      # one task: two hours on two cores
    python benchmarks/reproduce.py                                   # everything: nearly a day
    python benchmarks/reproduce.py --one-policy --methods GRPO TGRPO # one policy for the ten tasks
    python benchmarks/reproduce.py --heat-map 4 --seeds 1            # alpha1 against alpha2 on task 4
    python benchmarks/reproduce.py --questions --task-ids 0 2 4 7    # what the paper leaves open, in pairs
    python benchmarks/reproduce.py --no-run                          # docs/results.md from the runs so far
"""

import dataclasses
import functools
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import methods
import pandas as pd
import results_page
import torch
from methods import ASKED, HEAT_MAP, ONE, PAPERS, TWINS
from results_page import CURVES, NUMBERS, POINT, RUN, SUCCESS, WHICH, read_csv, with_twins, write_csv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from vla_envs.command_line import one_line_errors, parse_args
from vla_envs.inputs import nearest
from vla_envs.machine import available_cores
from vla_envs.policies import SHIPPED
from vla_envs.tasks import SUITES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))
from tgrpo_vla import PAPER_ALPHAS  # noqa: E402

MINUTES = 12.0  # per run, as long as nothing was measured
ALL = "all"  # in place of a task: the run is of all tasks that are asked for
POLL_S = 10.0  # how often the bar looks how far the runs are
DEMOS, DEMONSTRATIONS = "{demos}", 25  # what stands for their folder, and how many there are
RECORDING = threading.Lock()  # of one task's at a time


@dataclass
class Args:
    """Run every method on every task and seed, from the same checkpoint, and compare them."""

    suite: str = "LiberoObject"
    """LIBERO suite"""
    checkpoint: Path | None = None
    """Starting checkpoint [the shipped one, which plays LIBERO-Object]"""
    max_episode_steps: int | None = None
    """Control steps until an episode ends without success [the scripts']"""
    total_env_steps: int = 120_000
    """Control steps of training, the same for all; with --one-policy half as many for each task"""
    results: Path | None = None
    """Folder of runs.csv and curves.csv; a new one makes every run again, and has results.md and its figures
    [benchmarks/results/<suite>; the page of all suites is docs/results.md]"""
    out: Path | None = None
    """Folder of the runs themselves [runs/reproduce/<suite>; with --results: runs there]"""
    methods: tuple[str, ...] = ()
    """Which of the methods [all of Table 1; with --questions those that the pairs need]"""
    task_ids: tuple[int, ...] = tuple(range(10))
    """Tasks of the suite"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds"""
    one_policy: bool = False
    """One policy for all of --task-ids together, instead of one for each"""
    questions: bool = False
    """Instead of Table 1: what the paper leaves open, each answer beside what it is compared with"""
    heat_map: int | None = None
    """Instead of all that: pairs of alphas on this task"""
    jobs: int = available_cores()
    """Runs side by side; each gets its share of the cores"""
    run: bool = True
    """Make the runs that are missing; --no-run only shows what there is"""


# ---- Runs --------------------------------------------------------------------------------------------


def fill_in_folders(args: Args) -> Args:
    """``args`` with the folders of the results and of the runs."""
    out = args.results / "runs" if args.results else Path("runs/reproduce") / args.suite
    return dataclasses.replace(args, results=args.results or RESULTS / args.suite, out=args.out or out)


def folder_of(method: str, task_id: int | str, seed: int, args: Args) -> Path:
    """Where a run is, of a task or of ``ALL``."""
    name = "".join(letter if letter.isalnum() else "_" for letter in method.lower())
    return args.out / f"{name}__{'-'.join(map(str, tasks_of(task_id, args)))}__{seed}"


def tasks_of(task_id: int | str, args: Args) -> tuple[int | str, ...]:
    """A run's task, or with ``ALL`` its tasks."""
    return args.task_ids if task_id == ALL else (task_id,)


def commit() -> str:
    """The checkout's commit, with a ``+`` where Python files have been changed since."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "HEAD", "--quiet", "--", "*.py"], capture_output=True)
    return head.stdout.strip() + "+" * (changed.returncode == 1)


def cores_of_a_run(jobs: int) -> int:
    """Cores that each of ``jobs`` runs side by side has."""
    return max(1, available_cores() // jobs)


@functools.cache  # asked for each of the runs that are missing
def machine(jobs: int) -> str:
    """The processor, torch's vector units, which decide the last bits, and the cores that a run has."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    units, cores = torch.backends.cpu.get_cpu_capability(), cores_of_a_run(jobs)
    return f"{(models or [platform.machine()])[0]}, {units}, {cores} core{'s' * (cores > 1)}"


def steps_of(task_id: int | str, args: Args) -> int:
    """Control steps of a run's training."""
    return args.total_env_steps // 2 * len(args.task_ids) if task_id == ALL else args.total_env_steps


def play(method: str, task_id: int | str, seed: int, args: Args) -> None:
    """Make a run, or go on with one that was interrupted.

    Raises:
        RuntimeError: When it fails, with the last line of its log.
    """
    script, *flags = (methods.METHODS | ASKED | HEAT_MAP)[method.removesuffix(ONE)]
    if method == PAPERS and not isinstance(task_id, str):
        alpha1, alpha2 = PAPER_ALPHAS[task_id]
        flags = ["--alpha1", alpha1, "--alpha2", alpha2]
    start = ["--checkpoint", args.checkpoint] if args.checkpoint else []
    if args.max_episode_steps is not None:
        start += ["--max-episode-steps", args.max_episode_steps]
    if script == "sft_vla.py":  # plays nothing, and without a checkpoint begins with random weights
        start = start if args.checkpoint else ["--checkpoint", SHIPPED["nano"]]
    else:
        start += ["--total-env-steps", steps_of(task_id, args)]
    if DEMOS in flags:
        flags[flags.index(DEMOS)] = demonstrations(task_id, args)
    tasks = ["--task-ids", *args.task_ids] if task_id == ALL else ["--task-id", task_id]
    words = [*tasks, "--seed", seed, "--suite", args.suite, *start, *flags]
    name, folder = f"{method}, task {task_id}, seed {seed}", folder_of(method, task_id, seed, args)
    script = variant(method, folder) if method in methods.VARIANTS else script
    run_script(name, folder, script, words, args.jobs)


def demonstrations(task_id: int | str, args: Args) -> Path:
    """The folder of the demonstrations of a task, or of ``ALL``, recorded where there are none.

    Raises:
        RuntimeError: When they cannot be recorded, with the expert's last line.
    """
    tasks = tasks_of(task_id, args)
    folder = args.out / f"demonstrations_{'-'.join(map(str, tasks))}"
    with RECORDING:
        if not any(folder.glob("*.hdf5")):  # an interrupted recording leaves none
            recorder = [sys.executable, "-m", "vla_envs.experts", "--out", folder, "--suite", args.suite]
            recorder += ["--task-ids", *tasks, "--episodes", DEMONSTRATIONS]
            done = subprocess.run(list(map(str, recorder)), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-1:]))
    return folder


def variant(method: str, folder: Path) -> Path:
    """A copy of grpo_vla.py beside the run in ``folder``, with the method's lines.

    Raises:
        ValueError: When the script does not have the line in whose place they are.
    """
    old, new = methods.VARIANTS[method]
    text = (ROOT / "grpo_vla.py").read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise ValueError(
            f"grpo_vla.py has {text.count(old)} times the line {old.strip()!r}; expected it once"
        )
    copy = folder.with_name(folder.name + "_script").resolve() / "grpo_vla.py"  # a run knows it by its name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(text.replace(old, new), encoding="utf-8")
    return copy


def run_script(name: str, folder: Path, script: str | Path, words: list[Any], jobs: int) -> None:
    """Make the run of ``folder``, or go on with it, unless it is finished; one of ``jobs`` side by side.

    Raises:
        RuntimeError: When it fails, with ``name`` and the last line of its log.
    """
    if (folder / "result.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    cores = cores_of_a_run(jobs)
    begun = (folder / "args.json").is_file()
    words = ["--resume", folder] if begun else ["--run-dir", folder, *words]
    if not begun:
        folder.with_suffix(".commit").write_text(commit())
    log = folder.with_suffix(".log")
    with open(log, "a") as file:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), "--num-threads", str(cores), *map(str, words)],
            stdout=file, stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": str(cores)},
        )  # fmt: skip
    if done.returncode:
        last = log.read_text().replace("\r", "\n").strip().splitlines()[-1:]
        raise RuntimeError(f"{name}: {' '.join(last)} (all of it in {log})")


def read_run(method: str, task_id: int | str, seed: int, args: Args) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A finished run's rows of ``runs.csv``, one for each of its tasks, and its rows of ``curves.csv``."""
    folder = folder_of(method, task_id, seed, args)
    result = json.loads((folder / "result.json").read_text())
    if "success_after" not in result:  # SFT's, which are only of its end
        result |= {f"{way}_after": result[way] for way in ("success", "sampled")}
    names = {"before": "success_before", "after": "success_after"}
    names |= {name: name for name in ("sampled_before", "sampled_after")}
    events = EventAccumulator(str(folder)).Reload()
    rows, points = [], []
    for task in tasks_of(task_id, args):
        its = {name: value for name, value in result.items() if name in names.values()}
        tags = {tag: tag for tag in CURVES}
        if task_id == ALL:
            its = {name: value["tasks"][str(task)] for name, value in its.items()}
            tags = {SUCCESS: f"{SUCCESS}_task_{task}"}  # the others are not of a task
        rows.append(dict(zip(WHICH, (method, task, seed))) | {
            **{column: its.get(name, {}).get("successes") for column, name in names.items()},
            "trials": its["success_after"]["trials"], "env_steps": result.get("env_steps", 0),
            "episodes": result.get("episodes", 0), "wall_s": round(result["wall_s"]),
            "commit": folder.with_suffix(".commit").read_text(), "machine": machine(args.jobs),
        })  # fmt: skip
        points += [
            (method, task, seed, tag, event.step, round(event.value, 4))
            for tag, name in tags.items()
            if result.get("env_steps") and name in events.Tags()["scalars"]  # SFT's are by optimiser steps
            for event in events.Scalars(name)
        ]
    runs = pd.DataFrame(rows, columns=RUN).astype(dict.fromkeys(NUMBERS, "Int64"))
    return runs, pd.DataFrame(points, columns=POINT)


# ---- All of them -------------------------------------------------------------------------------------


def show(args: Args) -> str:
    """Write the page about the results, and their figures; the page's text."""
    if args.results.parent != RESULTS:
        return results_page.write_page(
            {args.suite: args.results}, {args.suite: args.results}, args.results / "results.md"
        )
    suites = {file.parent.name: file.parent for file in sorted(RESULTS.glob("*/runs.csv"))}
    figures = {suite: DOCS / "results" / suite for suite in suites}
    return results_page.write_page(suites, figures, DOCS / "results.md")


def validate(args: Args) -> None:
    """Refuse arguments that do not fit.

    Raises:
        ValueError: Says which, and what was expected.
    """
    if args.suite not in SUITES:
        raise ValueError(
            f"suite is {args.suite!r}; expected one of {list(SUITES)}{nearest(args.suite, list(SUITES))}"
        )
    names = list(methods.METHODS | ASKED)
    if unknown := sorted(set(args.methods) - set(names)):
        raise ValueError(
            f"methods {unknown} are unknown; expected some of {names}{nearest(unknown[0], names)}"
        )
    if PAPERS in args.methods and args.suite != "LiberoObject":
        raise ValueError(
            f"suite is {args.suite}; expected LiberoObject, whose tasks the paper's alphas are for"
        )
    for name in ("jobs", "total_env_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}; expected at least 1")
    task_ids = args.task_ids if args.heat_map is None else (args.heat_map,)
    if unknown_tasks := set(task_ids) - set(range(10)):
        raise ValueError(f"task_ids {sorted(unknown_tasks)} are unknown; expected some of 0 to 9")
    if args.one_policy and (args.questions or args.heat_map is not None or PAPERS in args.methods):
        raise ValueError(
            "one_policy is of all tasks with the same flags; expected neither --questions nor --heat-map nor"
            f" the method {PAPERS!r}"
        )
    if args.one_policy and len(args.task_ids) < 2:
        raise ValueError(f"task_ids are {args.task_ids}; with --one-policy expected at least two")
    if args.heat_map is not None and (args.methods or args.questions or args.task_ids != Args.task_ids):
        raise ValueError(
            "heat_map is of all alphas on its task; expected neither --methods nor --questions nor --task-ids"
        )


def missing(args: Args, known: pd.DataFrame) -> list[tuple[str, int | str, int]]:
    """Method, task (with --one-policy ``ALL``) and seed of the runs that are asked for and not ``known``."""
    task_ids = args.task_ids if args.heat_map is None else (args.heat_map,)
    names = args.methods or tuple(methods.METHODS)
    if args.heat_map is not None:
        names = tuple(HEAT_MAP)
    elif args.questions and not args.methods:
        names = ("TGRPO", *(x for x in ASKED if x != PAPERS or args.suite == "LiberoObject"))
    made = set(with_twins(known)[WHICH].itertuples(index=False, name=None))
    if args.one_policy:
        return [(name + ONE, ALL, seed) for seed in args.seeds for name in names
                if not {(name + ONE, task_id, seed) for task_id in task_ids} <= made]  # fmt: skip
    # On some tasks the paper's alphas are the default.
    defaults = [k for k, its in enumerate(PAPER_ALPHAS) if its == (0.3, 0.7)]
    made |= {(PAPERS, k, seed) for k in defaults for seed in args.seeds}
    asked = [each for seed in args.seeds for task_id in task_ids for method in names
             if (each := (method, task_id, seed)) not in made and TWINS.get(method) not in names]  # fmt: skip
    return sorted(asked, key=lambda each: each[0] not in methods.FIRST)


def added(frame: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with ``rows`` below, in place of what it has of the same runs and tasks.

    One that is empty, whose columns have no types, is left out.
    """
    which = set(rows[WHICH].itertuples(index=False, name=None))
    frame = frame[[each not in which for each in frame[WHICH].itertuples(index=False, name=None)]]
    return pd.concat([part for part in (frame, rows) if len(part)] or [rows])


def minutes_of(method: str, runs: pd.DataFrame, args: Args) -> float:
    """How long a run of ``method`` takes: the median of its ``runs`` on this machine.

    Where it has none, it is that of every method's; and of all machines', where this one has none at all.
    """
    if method.endswith(ONE) and method not in set(runs["method"]):
        return minutes_of(method.removesuffix(ONE), runs, args) * len(args.task_ids) / 2
    here = runs[runs["machine"] == machine(args.jobs)]
    runs = here if len(here) else runs
    its = runs[runs["method"] == method] if method in set(runs["method"]) else runs
    return float(its["wall_s"].median()) / 60 if len(its) else MINUTES


def share_done(folder: Path, steps: int) -> float:
    """How much of a run of ``steps`` control steps is done; SFT's, which counts none, is all or nothing."""
    if (folder / "result.json").is_file():
        return 1.0
    try:
        counters = json.loads((folder / "checkpoints" / "latest" / "counters.json").read_text())
    except FileNotFoundError:  # not begun, or just being replaced
        return 0.0
    return min(1.0, counters["env_steps"] / steps)


def finished_runs(
    wanted: list[tuple[str, int | str, int]], args: Args, runs: pd.DataFrame
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Make the runs ``wanted``; what ``read_run`` says of each, as they are finished.

    A bar says how long the rest takes: from how far all runs are, weighed by what such ``runs`` took before.
    """
    minutes = {each: minutes_of(each[0], runs, args) for each in wanted}
    hours = sum(minutes.values()) / args.jobs / 60
    print(f"{len(wanted)} runs, {args.jobs} side by side: about {hours:.1f} h if they take what others took")

    def done() -> float:
        shares = {each: share_done(folder_of(*each, args), steps_of(each[1], args)) for each in wanted}
        return sum(shares[each] * minutes[each] for each in wanted)

    form = "runs: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with (
        ThreadPoolExecutor(args.jobs) as pool,
        tqdm(total=sum(minutes.values()), initial=done(), smoothing=0, bar_format=form) as bar,
    ):
        pending = {pool.submit(play, *each, args): each for each in wanted}
        try:
            while pending:
                finished, _ = wait(pending, POLL_S, FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    yield read_run(*pending.pop(future), args)
                bar.set_postfix_str(f"{len(wanted) - len(pending)} of {len(wanted)}", refresh=False)
                bar.update(done() - bar.n)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(args: Args) -> None:
    """Make what is missing, ``jobs`` at a time; results are written as they come."""
    validate(args)
    args = fill_in_folders(args)
    results = args.results
    results.mkdir(parents=True, exist_ok=True)
    runs, points = read_csv(results / "runs.csv", RUN), read_csv(results / "curves.csv", POINT)
    wanted = missing(args, runs) if args.run else []
    if args.run and not wanted:
        print(f"nothing to run: all of it is in {results}; a new --results makes it again")
    if wanted:
        for run, its_points in finished_runs(wanted, args, runs):
            runs, points = added(runs, run), added(points, its_points)
            write_csv(results / "runs.csv", runs)
            write_csv(results / "curves.csv", points)
            show(args)
    print(show(args))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args(Args))
