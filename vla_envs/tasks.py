"""LIBERO's suites and tasks: names, instructions, BDDL files and recorded init states.

They are read from the installed ``hf-libero`` package without importing it, because its import asks a
question on the terminal when no configuration file exists.
"""

import importlib.util
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_envs.inputs import in_short, nearest

SUITES = {
    "LiberoSpatial": "libero_spatial",
    "LiberoObject": "libero_object",
    "LiberoGoal": "libero_goal",
    "Libero10": "libero_10",
    "Libero90": "libero_90",
}
MOST_BYTES = 2**20  # per file of init states; LIBERO's have up to 59 kB


@dataclass(frozen=True)
class Task:
    """One LIBERO task.

    Attributes:
        suite: The suite's name as in the Gymnasium id, for instance ``"LiberoObject"``.
        task_id: Position in the suite, from 0, in LIBERO's order (``libero_suite_task_map.py``).
        name: LIBERO's name of the task.
        instruction: The sentence that a policy is given; as in LIBERO, it is made from the file name.
        bddl_file: LIBERO's description of the scene and the goal.
        init_states_file: The recorded init states, LIBERO's ``*.pruned_init``.
    """

    suite: str
    task_id: int
    name: str
    instruction: str
    bddl_file: Path
    init_states_file: Path


def libero_folder() -> Path:
    """The folder of the installed ``libero.libero`` package."""
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("LIBERO is not installed: pip install hf-libero==0.1.4")
    return Path(next(iter(spec.submodule_search_locations))) / "libero"


@lru_cache
def _task_map() -> dict[str, list[str]]:
    path = libero_folder() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("libero_suite_task_map", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.libero_task_map


def num_tasks(suite: str) -> int:
    """The number of tasks in a suite.

    Raises:
        ValueError: When the suite does not exist.
    """
    if not isinstance(suite, str) or suite not in SUITES:
        papers_name = re.sub("(?i)long$", "10", str(suite))  # LIBERO-10 is LIBERO-Long in papers
        hint = nearest(papers_name, list(SUITES))
        raise ValueError(f"suite {suite!r} is unknown; expected one of {list(SUITES)}{hint}")
    return len(_task_map()[SUITES[suite]])


def get_task(suite: str, task_id: int) -> Task:
    """The task ``task_id`` (from 0) of a suite.

    Raises:
        ValueError: When the suite or the task id does not exist.
    """
    count = num_tasks(suite)
    if isinstance(task_id, bool) or not isinstance(task_id, int | np.integer):
        raise ValueError(f"task_id is {in_short(task_id)}; expected an int from 0 to {count - 1}")
    if not 0 <= task_id < count:
        closest = min(max(int(task_id), 0), count - 1)
        raise ValueError(
            f"task_id {task_id} does not exist in {suite}; expected 0 to {count - 1}, nearest {closest}"
        )
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


def recorded_init_states(task: Task) -> NDArray[np.float64]:
    """LIBERO's recorded init states, ``(50, 1 + nq + nv)``: time (s), joint positions, velocities.

    Every published evaluation uses these; training samples placements of its own. The files are pickles, so
    a restricted reader reads them, which builds arrays and nothing else. It reads them once, when a scene is
    built, and the scene keeps them (``Scene.recorded``).

    Raises:
        ValueError: When the file is missing or damaged, or has anything else.
    """
    import torch
    from numpy._core.multiarray import _reconstruct

    allowed: list[Any] = [
        (_reconstruct, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.float64)),
    ]
    file = task.init_states_file
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes; expected at most {MOST_BYTES}")
        with torch.serialization.safe_globals(allowed):
            states = np.asarray(torch.load(file, weights_only=True), dtype=np.float64)
        if states.ndim != 2 or not np.isfinite(states).all():
            raise ValueError(f"it has shape {states.shape}; expected rows of finite numbers")
    except Exception as error:  # torch, pickle and zip files raise different ones
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the recorded init states {str(file)!r} cannot be read: {reason}") from error
    return states
