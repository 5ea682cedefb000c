"""Demonstrations to imitate: LIBERO's HDF5 data sets, as the scripted expert writes them, and LeRobot's."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from vla_envs.tasks import Task

Episode = dict[str, NDArray[Any]]


def load_demonstrations(folder: Path, task: Task, episodes: int, chunk: int) -> list[Episode]:
    """The first demonstrations of a task, as samples to imitate.

    Args:
        folder: With ``<suite>_<task id>_demo.hdf5`` or, as LIBERO names them, ``<task name>_demo.hdf5``; or a
            data set in LeRobot's format (a folder with ``meta/info.json``).
        task: What is to be demonstrated.
        episodes: How many demonstrations.
        chunk: Control steps that a decision covers (C).

    Returns:
        For each demonstration of T control steps: ``image (T, H, W, 3)`` uint8, upright as the environments
        give it; ``state (T, 8)`` float32; ``actions (T, C, 7)`` float32, those of each step and the following
        ones, the last repeated past the end.

    Raises:
        ValueError: When files are missing or in another layout, or hold fewer demonstrations.
    """
    if (folder / "meta" / "info.json").is_file():
        demos = _read_lerobot(folder, task, episodes)
    else:
        paths = [folder / f"{task.suite}_{task.task_id}_demo.hdf5", folder / f"{task.name}_demo.hdf5"]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ValueError(
                f"no demonstrations at {str(paths[0])!r}, nor {paths[1].name!r}, nor a LeRobot data set;"
                " expected a folder that python -m vla_envs.experts --out FOLDER has made"
            )
        demos = _read_hdf5(path, task, episodes)
    for demo in demos:
        shapes = demo["state"].shape[1:], demo["actions"].shape[1:]
        if shapes != ((8,), (7,)):
            raise ValueError(
                f"demonstrations in {str(folder)!r} have states and actions of {shapes}; expected 8 and 7"
            )
        last = len(demo["actions"]) - 1
        following = np.minimum(np.arange(last + 1)[:, None] + np.arange(chunk), last)  # (T, C)
        demo["actions"] = demo["actions"].astype(np.float32)[following]  # (T, C, 7)
        demo["state"] = demo["state"].astype(np.float32)
    return demos


@contextlib.contextmanager
def open_hdf5(path: Path, task: Task, needed: tuple[str, ...]) -> Iterator[list[h5py.Group]]:
    """The demonstrations in a file in the layout of LIBERO's data sets (``libero/lifelong/datasets.py``).

    Raises:
        ValueError: When it is not such a file, is of another task, or lacks one of the ``needed`` parts.
    """
    try:
        with h5py.File(path) as file:
            data: Any = file["data"] if "data" in file else {}
            names = [name for _, name in sorted((int(x[5:]), x) for x in data if x[5:].isdigit())]
            missing = [f"data/{name}/{part}" for name in names for part in needed if part not in data[name]]
            if not names or missing:
                lacks = [*missing, "data/demo_0"][0]
                raise ValueError(
                    f"{str(path)!r} is not in the layout of LIBERO's data sets: it has no {lacks}"
                )
            shown = Path(str(data.attrs.get("bddl_file_name", task.bddl_file.name))).name
            if shown != task.bddl_file.name:
                raise ValueError(f"{str(path)!r} shows {shown}; expected {task.bddl_file.name}")
            yield [data[name] for name in names]
    except OSError as error:
        raise ValueError(f"{str(path)!r} is no whole HDF5 file: {' '.join(str(error).split())}") from None


def _read_hdf5(path: Path, task: Task, episodes: int) -> list[Episode]:
    """Demonstrations with pictures.

    Where ``expert_actions`` is there (the scripted expert's actions without its noise) it is imitated.
    """
    needed = ("actions", "obs/agentview_rgb", "obs/ee_states", "obs/gripper_states")
    with open_hdf5(path, task, needed) as demos:
        if len(demos) < episodes:
            raise ValueError(f"{str(path)!r} holds {len(demos)} demonstrations; expected at least {episodes}")
        return [
            {
                "image": demo["obs/agentview_rgb"][:][:, ::-1, ::-1],  # stored turned by 180 degrees
                "state": np.hstack([demo["obs/ee_states"][:], demo["obs/gripper_states"][:]]),
                "actions": demo["expert_actions" if "expert_actions" in demo else "actions"][:],
            }
            for demo in demos[:episodes]
        ]


def _read_lerobot(folder: Path, task: Task, episodes: int) -> list[Episode]:
    """Demonstrations of LIBERO in LeRobot's format, by its own library: ``pip install lerobot``.

    Expects ``observation.state`` and ``action``, and takes the first camera, whose pictures LeRobot's LIBERO
    sets hold upright.
    """
    if importlib.util.find_spec("lerobot") is None:
        raise ValueError(f"{str(folder)!r} is a LeRobot data set; expected its library: pip install lerobot")
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

        meta = LeRobotDatasetMetadata("local", root=folder)
        of_task = [i for i, names in enumerate(meta.episodes["tasks"]) if task.instruction in list(names)]
        chosen = of_task[:episodes]
        frames: dict[int, list[Any]] = {}
        for frame in LeRobotDataset("local", root=folder, episodes=chosen) if len(chosen) == episodes else ():
            frames.setdefault(int(frame["episode_index"]), []).append(frame)
        demos = []
        for episode in frames.values():
            image = np.stack(
                [frame[meta.camera_keys[0]].numpy() for frame in episode]
            )  # (T, 3, H, W) in [0, 1]
            demos.append({
                "image": np.rint(image.transpose(0, 2, 3, 1) * 255).astype(np.uint8),
                "state": np.stack([frame["observation.state"].numpy() for frame in episode]),
                "actions": np.stack([frame["action"].numpy() for frame in episode]),
            })  # fmt: skip
    except Exception as error:  # the library's own errors are of many kinds
        reason = " ".join(str(error).split())
        raise ValueError(
            f"LeRobot data set {str(folder)!r} cannot be read: {type(error).__name__}: {reason}"
        ) from None
    if len(of_task) < episodes:
        raise ValueError(
            f"{str(folder)!r} holds {len(of_task)} demonstrations of {task.instruction!r};"
            f" expected at least {episodes}"
        )
    return demos


def samples(tasks: list[Task], demonstrations: list[list[Episode]]) -> dict[str, Any]:
    """All S control steps of several tasks: image, state and actions (S, ...), and instructions."""
    flat = [(task, demo) for task, demos in zip(tasks, demonstrations) for demo in demos]
    result: dict[str, Any] = {
        name: np.concatenate([demo[name] for _, demo in flat]) for name in ("image", "state", "actions")
    }
    return result | {"instructions": [task.instruction for task, demo in flat for _ in demo["actions"]]}
