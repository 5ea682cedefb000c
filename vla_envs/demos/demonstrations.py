"""Demonstrations to imitate: LIBERO's HDF5 data sets, those of the scripted expert, and LeRobot's.

Everything read is validated: lengths, shapes, kinds of numbers, that they are finite, and that actions lie in
[-1, 1]. The last action opens the hand with -1 and closes it with 1.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vla_envs.demos.hdf5 import read_hdf5
from vla_envs.demos.layout import Episode
from vla_envs.demos.lerobot import read_lerobot
from vla_envs.tasks import Task


def load_demonstrations(
    folder: Path, task: Task, episodes: int | None, chunk: int, least: int = 1,
    cameras: tuple[str, ...] = ("image",),
) -> list[Episode]:  # fmt: skip
    """Load the first demonstrations of a task, as samples to imitate.

    Args:
        folder: Has ``<suite>_<task id>_demo.hdf5`` or, under LIBERO's name, ``<task name>_demo.hdf5``; or is
            a data set in LeRobot's format, with ``meta/info.json``.
        task: The task to demonstrate.
        episodes: How many demonstrations to load; None loads all.
        chunk: Control steps per decision (C).
        least: How many demonstrations there must be when ``episodes`` is None.
        cameras: The images to load, ``image`` and ``wrist_image`` or one of them.

    Returns:
        For each demonstration of T control steps: images ``(T, H, H, 3)`` uint8, upright as the environments
        return them; ``state (T, 8)`` float32; and ``actions (T, C, 7)`` float32, the actions of each step and
        of the next ones. The last action is repeated past the end.

    Raises:
        ValueError: When files are missing, have another layout or too few demonstrations, or when one cannot
            be learnt from; names the file and the demonstration.
    """
    least = episodes or least
    if (folder / "meta" / "info.json").is_file():
        demos = read_lerobot(folder, task, episodes, least, cameras)
    else:
        paths = [folder / f"{task.label}_demo.hdf5", folder / f"{task.name}_demo.hdf5"]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ValueError(
                f"no demonstrations at {str(paths[0])!r}, nor {paths[1].name!r}, nor a LeRobot data set;"
                " expected a folder that python -m vla_envs.experts --out FOLDER has written"
            )
        demos = read_hdf5(path, task, episodes, least, cameras)
    hand = np.concatenate([demo["actions"][:, 6] for demo in demos])
    if hand.min() == 0:
        raise ValueError(
            f"the hand's actions of {task.instruction!r} in {str(folder)!r} range from 0 to {hand.max():g};"
            " expected -1 to open the hand and 1 to close it"
        )
    for demo in demos:
        last = len(demo["actions"]) - 1
        following = np.minimum(np.arange(last + 1)[:, None] + np.arange(chunk), last)  # (T, C)
        demo["actions"] = demo["actions"].astype(np.float32)[following]  # (T, C, 7)
        demo["state"] = demo["state"].astype(np.float32)
    return demos


def samples(
    tasks: list[Task], demonstrations: list[list[Episode]], shown: int | None = None
) -> dict[str, Any]:
    """Join all S control steps of several tasks: images, state and actions (S, ...), and instructions.

    Args:
        tasks: The tasks.
        demonstrations: Those of each, as loaded.
        shown: Pixels of the images that the policy is shown when it acts; of smaller ones a line warns.
    """
    flat = [(task, demo) for task, demos in zip(tasks, demonstrations) for demo in demos]
    first = flat[0][1]
    for task, demo in flat:
        for name in (name for name in first if "image" in name):
            if demo[name].shape[1] != first[name].shape[1]:
                raise ValueError(
                    f"images of {task.label} have {demo[name].shape[1]} pixels;"
                    f" expected {first[name].shape[1]}, like those of {flat[0][0].label}"
                )
    result: dict[str, Any] = {name: np.concatenate([demo[name] for _, demo in flat]) for name in first}
    if shown and (pixels := min(its.shape[1] for name, its in result.items() if "image" in name)) < shown:
        print(
            f"the demonstrations' images have {pixels} pixels, and the policy is shown {shown} when it acts,"
            f" so it learns from blurred ones; the scripted expert records with --image-size {shown}"
        )
    return result | {"instructions": [task.instruction for task, demo in flat for _ in demo["actions"]]}
