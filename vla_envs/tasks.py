"""Suites and tasks, LIBERO's, -Plus's, -PRO's and one's own: names, instructions, BDDL files, init states.

LIBERO's are read from the installed ``hf-libero`` package without importing it, because its import asks a
question on the terminal when no configuration file exists. A folder of BDDL files is a suite of one's own,
and so is a single file.
"""

import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_envs import bddl, liberoplus, liberopro, own_objects
from vla_envs.files import package_folder
from vla_envs.inputs import in_short, nearest
from vla_envs.own_objects import OwnObject

SUITES = {
    "LiberoSpatial": "libero_spatial",
    "LiberoObject": "libero_object",
    "LiberoGoal": "libero_goal",
    "Libero10": "libero_10",
    "Libero90": "libero_90",
}
MOST_BYTES = 2**20  # per file of init states; LIBERO's have up to 59 kB
INIT_STATE_FILES = (".npy", ".npz", ".pruned_init", ".init")


@dataclass(frozen=True)
class Task:
    """One task, LIBERO's or one's own.

    Attributes:
        suite: The suite's name as in the Gymnasium id, for instance ``"LiberoObject"``, or the path of a
            folder of BDDL files or of one such file.
        task_id: Position in the suite, from 0: in LIBERO's order (``libero_suite_task_map.py``), or in the
            order of a folder's file names.
        name: LIBERO's name of the task, or the file's without its ending.
        instruction: The sentence that a policy is given: as in LIBERO made from its file's name, or the
            ``:language`` of one's own file.
        bddl_file: The description of the scene and the goal.
        init_states_file: Its recorded init states (LIBERO's ``*.pruned_init``); None where none are recorded.
        problem: What one's own file, or LIBERO-PRO's, asks for; None for LIBERO's tasks, which its own
            parser reads.
        digest: Of the contents of one's own files.
        objects: Its objects of one's own, by class.
        category: What a benchmark of varied tasks varies in it, as LIBERO-PRO's ``"swap"``; "" elsewhere.
        variant: How a task of LIBERO-Plus differs from LIBERO's; None for all others.
        base: LIBERO's task in whose compiled scene a varied one is played; None for a scene of its own.
        distractors: Classes of further objects in its scene (``vla_envs.distractors``).
    """

    suite: str
    task_id: int
    name: str
    instruction: str
    bddl_file: Path
    init_states_file: Path | None
    problem: bddl.Problem | None = None
    digest: str = ""
    objects: tuple[OwnObject, ...] = ()
    category: str = ""
    variant: liberoplus.Variant | None = None
    base: "Task | None" = None
    distractors: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What files about the task are named after: ``"LiberoObject_4"``, or the name of one's own file."""
        return self.name if self.problem and not self.category else f"{self.suite}_{self.task_id}"


def base_suite(suite: str) -> str:
    """LIBERO's suite that a suite of LIBERO-Plus or LIBERO-PRO is made of; any other itself."""
    if suite in liberoplus.SUITES:
        return liberoplus.SUITES[suite][0]
    return liberopro.SUITES[suite].base if suite in liberopro.SUITES else suite


def libero_folder() -> Path:
    """The folder of the installed ``libero.libero`` package."""
    installed = package_folder("libero")
    if installed is None:
        raise ModuleNotFoundError("LIBERO is not installed: pip install hf-libero==0.1.4")
    return installed / "libero"


@lru_cache
def _task_map() -> dict[str, list[str]]:
    path = libero_folder() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("libero_suite_task_map", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.libero_task_map


def _own_files(suite: str | os.PathLike[str]) -> list[Path]:
    """The BDDL files of a suite of one's own, in order of their names; none if it is not a path.

    Raises:
        ValueError: When the path does not exist, or the folder has no BDDL files.
    """
    text = os.fspath(suite)
    path = Path(text)
    if path.suffix == ".bddl":
        if not path.is_file():
            beside = [each.name for each in path.parent.glob("*.bddl")] if path.parent.is_dir() else []
            raise ValueError(f"BDDL file {text!r} does not exist{nearest(path.name, beside)}")
        return [path]
    if not text or not (path.is_dir() or os.sep in text or "/" in text):
        return []
    if not path.is_dir():
        raise ValueError(f"suite {text!r} is not a folder; expected one of BDDL files, or {list(SUITES)}")
    files = sorted(path.glob("*.bddl"), key=lambda file: file.name)
    if not files:
        raise ValueError(f"folder {text!r} has no BDDL files; expected at least one *.bddl")
    return files


def num_tasks(suite: str | os.PathLike[str]) -> int:
    """The number of tasks in a suite.

    Raises:
        ValueError: When the suite does not exist.
        ModuleNotFoundError: When it is LIBERO-Plus's, which is not installed.
    """
    if isinstance(suite, str) and suite in liberoplus.SUITES:
        return len(liberoplus.task_names(suite))
    if isinstance(suite, str):
        suite = base_suite(suite)
    if isinstance(suite, str | os.PathLike) and suite not in SUITES and (files := _own_files(suite)):
        return len(files)
    if not isinstance(suite, str) or suite not in SUITES:
        papers_name = re.sub("(?i)long$", "10", str(suite))  # LIBERO-10 is LIBERO-Long in papers
        hint = nearest(papers_name, [*SUITES, *liberoplus.SUITES, *liberopro.SUITES])
        raise ValueError(
            f"suite {suite!r} is unknown; expected one of {list(SUITES)}, or a folder of BDDL files{hint}"
        )
    return len(_task_map()[SUITES[suite]])


def get_task(
    suite: str | os.PathLike[str], task_id: int, objects: Mapping[str, OwnObject] = MappingProxyType({})
) -> Task:
    """The task ``task_id`` (from 0) of a suite, LIBERO's, -Plus's or -PRO's, or of a folder or a BDDL file.

    Args:
        suite: The suite.
        task_id: Which of its tasks.
        objects: Objects that one's own BDDL file may use, by class, besides those whose files lie beside it.

    Raises:
        ValueError: When the suite or the task id does not exist, one's own file has a mistake, or the task of
            LIBERO-PRO needs files or assets that its package lacks.
        ModuleNotFoundError: When the suite is of LIBERO-Plus or LIBERO-PRO, which is not installed.
    """
    count = num_tasks(suite)
    if isinstance(task_id, bool) or not isinstance(task_id, int | np.integer):
        raise ValueError(f"task_id is {in_short(task_id)}; expected an int from 0 to {count - 1}")
    if not 0 <= task_id < count:
        closest = min(max(int(task_id), 0), count - 1)
        raise ValueError(
            f"task_id {task_id} does not exist in {suite}; expected 0 to {count - 1}, nearest {closest}"
        )
    if isinstance(suite, str) and suite in liberoplus.SUITES:
        return _plus_task(suite, int(task_id))
    if isinstance(suite, str) and suite in liberopro.SUITES:
        return _pro_task(suite, int(task_id))
    if suite not in SUITES:
        file = _own_files(suite)[task_id]
        own = own_objects.beside(file, objects) | dict(objects)
        problem = bddl.read(file, {name: bddl.Kind(each.regions) for name, each in own.items()})
        used = tuple(own[name] for name in sorted(own.keys() & {kind for _, kind in problem.objects}))
        digest = hashlib.sha256("".join([problem.text(), *(each.digest for each in used)]).encode())
        return Task(
            os.fspath(suite), int(task_id), file.stem, problem.language, file, None, problem,
            digest.hexdigest(), used,
        )  # fmt: skip
    suite = str(suite)
    folder = SUITES[suite]
    name = _task_map()[folder][task_id]
    # LIBERO-90 and LIBERO-10 names begin with the scene: KITCHEN_SCENE3_turn_on_the_stove.
    words = name.split("_")
    prefix = next((i for i, word in enumerate(words) if word.startswith("SCENE")), -1)
    return Task(
        suite=suite,
        task_id=int(task_id),
        name=name,
        instruction=" ".join(words[prefix + 1 :]),
        bddl_file=libero_folder() / "bddl_files" / folder / f"{name}.bddl",
        init_states_file=libero_folder() / "init_files" / folder / f"{name}.pruned_init",
    )


def _plus_task(suite: str, task_id: int) -> Task:
    """A task of LIBERO-Plus: in the scene of LIBERO's task, whose files it has unchanged, or in its own.

    Whether the assets have what it needs shows when its scene is built (``Variant.missing``).

    Its init states are those that ``Benchmark.get_task_init_states`` gives (``benchmark/__init__.py``): the
    50 of LIBERO's task, of which its evaluators play the first, or the one of the moved layout.
    """
    name = liberoplus.task_names(suite)[task_id]
    variant = liberoplus.variant(suite, name)
    liberos = base_suite(suite)
    base = get_task(liberos, _task_map()[SUITES[liberos]].index(variant.base))
    asked = variant.perturbation.get("instruction", {"sentence": base.instruction})
    task = replace(
        base, suite=suite, task_id=task_id, name=name, instruction=asked["sentence"], variant=variant,
        category=variant.category,
    )  # fmt: skip
    if variant.room:  # its BDDL file is LIBERO's, except for the problem's name
        return replace(task, digest=hashlib.sha256(repr(variant.room).encode()).hexdigest())
    if variant.category != "layout":
        return replace(task, base=base)
    states = Path("init_files", "libero_newobj", SUITES[liberos], f"{name}.pruned_init")
    file, own = liberoplus.bddl_file(suite, variant.file), {kind: bddl.Kind() for kind, _ in variant.objects}
    problem = bddl.read(file, own, beyond=bool(own))  # some new objects stand beside the table
    return _varied(task, base, problem, file, liberoplus.folder() / states)


def _pro_task(suite: str, task_id: int) -> Task:
    """The task of LIBERO-PRO that is made of LIBERO's.

    Its sentence is the ``:language`` of its file where LIBERO-PRO has rewritten that, in the suites of other
    sentences and other tasks. Elsewhere it is LIBERO's, which comes from the file's name.
    """
    its, base = liberopro.SUITES[suite], get_task(base_suite(suite), task_id)
    file, states = liberopro.files(suite, base.name)
    if lacking := bddl.new_classes(bddl.text_of(file)):
        raise ValueError(
            f"{suite} task {task_id} needs LIBERO-PRO's own {', '.join(sorted(lacking))}; expected a task of"
            f" LIBERO's {len(bddl.KINDS)} classes, as all of LiberoPro{its.base.removeprefix('Libero')}Swap"
        )
    problem = bddl.read(file)
    sentence = problem.language if its.category in ("language", "task") else base.instruction
    task = replace(base, suite=suite, instruction=sentence, category=its.category)
    return _varied(task, base, problem, file, states)


def _varied(task: Task, base: Task, problem: bddl.Problem, file: Path, states: Path) -> Task:
    """The varied ``task`` with files of its own; in the scene of LIBERO's ``base`` if that has all of it."""
    same = bddl.differ_in_places(problem, bddl.read(base.bddl_file))
    digest = hashlib.sha256(problem.text().encode()).hexdigest()
    own = replace(task, bddl_file=file, problem=problem, digest=digest, base=base if same else None)
    return with_init_states(own, states)


def suite_or_file(suite: str, bddl_file: Path | None, **tasks: Any) -> str:
    """The suite that a program was asked for: ``suite``, or the one task of ``bddl_file``.

    Args:
        suite: A suite.
        bddl_file: A file, if any.
        tasks: Arguments that choose tasks of a suite, by name; empty ones choose none.

    Raises:
        ValueError: When another suite or a task is given beside the file, or it is no BDDL file.
    """
    if bddl_file is None:
        return suite
    for name, value in tasks.items():
        if value:
            raise ValueError(f"{name} is {value} beside bddl_file; expected one of the two")
    if suite not in ("LiberoObject", str(bddl_file)):
        raise ValueError(f"suite is {suite!r} beside bddl_file; expected one of the two")
    if bddl_file.suffix != ".bddl":
        raise ValueError(f"bddl_file is {str(bddl_file)!r}; expected the path of a *.bddl file")
    return str(bddl_file)


def with_init_states(task: Task, file: str | os.PathLike[str]) -> Task:
    """One's own ``task`` with the recorded init states in ``file``.

    Raises:
        ValueError: When the task is LIBERO's, or the file does not exist or has another ending.
    """
    if task.problem is None:
        raise ValueError("init_state_file is for a bddl_file of one's own; LIBERO's tasks have theirs")
    path = Path(file)
    if not path.is_file() or path.suffix not in INIT_STATE_FILES:
        raise ValueError(
            f"init_state_file is {os.fspath(file)!r}; expected a file that ends in one of {INIT_STATE_FILES}"
        )
    digest = hashlib.sha256(task.digest.encode() + path.read_bytes()).hexdigest()
    return replace(task, init_states_file=path, digest=digest)


def num_init_states(task: Task) -> int:
    """How many init states evaluations of a task can start from: LIBERO records 50, and so many are drawn.

    Raises:
        ValueError: When its file of init states cannot be read.
    """
    return 50 if task.problem is None or task.init_states_file is None else len(recorded_init_states(task))


def recorded_init_states(task: Task) -> NDArray[np.float64]:
    """The recorded init states, ``(S, 1 + nq + nv)``: time (s), joint positions, velocities.

    Every published evaluation uses LIBERO's; training samples placements of its own. Its files are pickles,
    so a restricted reader reads them, which builds arrays and nothing else. It reads them once, when a scene
    is built, and the scene keeps them (``Scene.recorded``). One's own can be a ``.npy``, or a ``.npz`` with
    one array, as well.

    Raises:
        ValueError: When the file is missing or damaged, or has anything else.
    """
    file = task.init_states_file
    if file is None:
        raise ValueError(f"{task.name} has no recorded init states")
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes; expected at most {MOST_BYTES}")
        states = np.asarray(_array(file), dtype=np.float64)
        states = states[None] if task.variant and states.ndim == 1 else states  # as LIBERO-Plus reshapes them
        if states.ndim != 2 or not len(states) or not np.isfinite(states).all():
            raise ValueError(f"it has shape {states.shape}; expected rows of finite numbers")
    except Exception as error:  # torch, pickle, NumPy and zip files raise different ones
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the recorded init states {str(file)!r} cannot be read: {reason}") from error
    return states


def _array(file: Path) -> Any:
    """The one array in a file of init states."""
    if file.suffix in (".npy", ".npz"):
        try:
            loaded = np.load(file, allow_pickle=False)
        except ValueError:  # NumPy's words advise to run what the file says
            raise ValueError(f"it is no {file.suffix} file of numbers alone") from None
        if file.suffix == ".npy":
            return loaded
        if len(loaded.files) != 1:
            raise ValueError(f"it has {len(loaded.files)} arrays; expected one")
        return loaded[loaded.files[0]]
    if (array := liberopro.array_of_protocol_4(file)) is not None:
        return array
    import torch
    from numpy._core.multiarray import _reconstruct

    allowed: list[Any] = [
        (_reconstruct, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.float64)),
    ]
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, weights_only=True)
