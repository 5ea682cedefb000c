"""Demonstrations in the layout of LIBERO's HDF5 data sets: LIBERO's own, OpenVLA's, and the expert's."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from vla_envs.demos.layout import Episode, validate_layout, validate_values
from vla_envs.files import whole
from vla_envs.tasks import Task

#: The environments' images by their names there.
IMAGES = {"image": "obs/agentview_rgb", "wrist_image": "obs/eye_in_hand_rgb"}
#: Attribute of ``data``: whether observation t is what action t was chosen from.
OBS_BEFORE_ACTION = "obs_before_action"


@contextlib.contextmanager
def open_hdf5(path: Path, task: Task, needed: tuple[str, ...]) -> Iterator[list[h5py.Group]]:
    """The demonstrations in a file in the layout of LIBERO's data sets (``libero/lifelong/datasets.py``).

    Raises:
        ValueError: When the file is damaged or has another layout, shows another task, or lacks one of the
            ``needed`` parts.
    """
    try:
        with h5py.File(path) as file:
            data: Any = file.get("data")
            found = data if isinstance(data, h5py.Group) else {}
            numbered = sorted((int(x[5:]), x) for x in found if re.fullmatch(r"demo_[0-9]{1,9}", x))
            names = [name for _, name in numbered]
            missing = [
                f"data/{name}/{part}"
                for name in names
                for part in needed
                if not isinstance(data.get(f"{name}/{part}"), h5py.Dataset)
            ]
            if not names or missing:
                lacks = [*missing, "data/demo_0"][0]
                wrist = "; the policy is shown the wrist's image, which experts --wrist-camera records"
                raise ValueError(
                    f"{str(path)!r} is not in the layout of LIBERO's data sets: it has no {lacks}"
                    + wrist * lacks.endswith(IMAGES["wrist_image"])
                )
            shown = data.attrs.get("bddl_file_name", task.bddl_file.name)
            shown = shown.decode(errors="replace") if isinstance(shown, bytes) else str(shown)
            shown = PureWindowsPath(shown).name  # the file may come from any system
            if shown != task.bddl_file.name:
                raise ValueError(f"{str(path)!r} shows {shown}; expected {task.bddl_file.name}")
            yield [data[name] for name in names]
    except Exception as error:  # h5py raises many kinds for damaged files
        line = " ".join(str(error).split())
        if isinstance(error, ValueError) and repr(str(path)) in line:  # one of the above
            raise
        raise ValueError(f"{str(path)!r} is not a whole HDF5 file: {line}") from None


def read_parts(demo: h5py.Group, widths: dict[str, int | None]) -> Episode:
    """Read parts of a demonstration in an HDF5 file.

    Args:
        demo: A demonstration that ``open_hdf5`` gives, with these parts.
        widths: As in ``validate_layout``.

    Raises:
        ValueError: As ``validate_layout`` and ``validate_values``.
    """
    where = f"{demo.name.removeprefix('/data/')} in {demo.file.filename!r}"
    validate_layout(where, {name: demo[name] for name in widths}, widths)  # before anything is read
    parts = {name: demo[name][:] for name in widths}
    validate_values(where, parts)
    return parts


def read_hdf5(
    path: Path, task: Task, episodes: int | None, least: int, cameras: tuple[str, ...] = ("image",)
) -> list[Episode]:
    """Read demonstrations with the images of ``cameras``.

    Where a demonstration has ``expert_actions``, which are the scripted expert's actions without its noise,
    those are the actions to imitate.
    """
    images = {name: IMAGES[name] for name in cameras}
    widths: dict[str, int | None] = {"actions": 7, "obs/ee_states": 6, "obs/gripper_states": 2}
    widths |= dict.fromkeys(images.values())
    with open_hdf5(path, task, tuple(widths)) as demos:
        if len(demos) < least:
            raise ValueError(f"{str(path)!r} has {len(demos)} demonstrations; expected at least {least}")
        chosen = demos[:episodes]
        before = _obs_before_action(path, chosen)
        # Images are stored turned by 180 degrees; where robosuite's macros say so, they are also mirrored.
        convention = demos[0].parent.attrs.get("macros_image_convention")
        rows = 1 if convention in ("opencv", b"opencv") else -1
        read = []
        for demo in chosen:
            labels = "expert_actions" if "expert_actions" in demo else "actions"
            parts = read_parts(demo, widths | {labels: 7})
            length = len(parts[labels])
            if not before and length < 2:
                raise ValueError(
                    f"{demo.name.removeprefix('/data/')} in {str(path)!r} has 1 control step, and the"
                    " observation after it; expected at least 2 control steps"
                )
            observed = slice(None) if before else slice(length - 1)
            acted = slice(None) if before else slice(1, None)
            read.append({
                **{name: parts[stored][observed, ::rows, ::-1] for name, stored in images.items()},
                "state": np.hstack([parts["obs/ee_states"], parts["obs/gripper_states"]])[observed],
                "actions": parts[labels][acted],
            })  # fmt: skip
        return read


def _obs_before_action(path: Path, demos: list[h5py.Group]) -> bool:
    """Whether observation t is what action t was chosen from; in LIBERO's own files it is what t led to.

    The attribute ``obs_before_action`` of ``data``, which ``vla_envs.experts`` writes, says so. Files that
    lack it and have ``expert_actions`` were written by earlier versions, also with observations before
    actions. In all other files ``states``, which are recorded before each action, tell: the joints observed
    are those of the same state (OpenVLA's files, regenerated without idle steps) or of the next state
    (LIBERO's own files).
    """
    attrs = demos[0].parent.attrs
    if OBS_BEFORE_ACTION in attrs:
        return bool(attrs[OBS_BEFORE_ACTION])
    if any("expert_actions" in demo for demo in demos):
        return True
    same = following = 0.0
    for demo in demos:
        if "states" in demo and "obs/joint_states" in demo:
            parts = read_parts(demo, {"states": 0, "obs/joint_states": 7})
            joints, recorded = parts["obs/joint_states"], parts["states"][:, 1:8]  # the time comes first
            if recorded.shape == joints.shape:
                same += float(np.abs(joints[1:] - recorded[1:]).sum())
                following += float(np.abs(joints[:-1] - recorded[1:]).sum())
    if not min(same, following) < 0.5 * max(same, following):
        raise ValueError(
            f"{str(path)!r} does not show whether observations come before or after their actions; expected"
            " states and obs/joint_states as in LIBERO's files, or an attribute"
            f" {OBS_BEFORE_ACTION!r} of data that is True or False"
        )
    return same < following


def write_hdf5(path: Path, task: Task, episodes: list[dict[str, NDArray[Any]]]) -> None:
    """Write demonstrations in the layout of LIBERO's data sets (``libero/lifelong/datasets.py`` reads it).

    Images are stored as LIBERO stores them, turned by 180 degrees from what the environments return. We add
    ``expert_actions``, the actions without noise, which are what to imitate, and ``seed``, with which
    ``actions`` replay the episode. Observations come before their actions, and an attribute of ``data`` says
    so, because in LIBERO's own files they come after.
    """
    with whole(path) as partial, h5py.File(partial, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": task.instruction})
        data.attrs["bddl_file_name"] = task.bddl_file.name
        data.attrs[OBS_BEFORE_ACTION] = True
        data.attrs["num_demos"] = len(episodes)
        data.attrs["total"] = sum(len(episode["actions"]) for episode in episodes)
        for k, episode in enumerate(episodes):
            demo = data.create_group(f"demo_{k}")
            demo.attrs["num_samples"] = length = len(episode["actions"])
            demo.attrs["seed"] = int(episode["seed"])
            demo["actions"], demo["expert_actions"] = episode["actions"], episode["expert_actions"]
            demo["dones"] = demo["rewards"] = (np.arange(length) == length - 1).astype(np.uint8)
            for name in (name for name in IMAGES if name in episode):
                images = episode[name][:, ::-1, ::-1]
                demo.create_dataset(
                    IMAGES[name], data=images, chunks=(1, *images.shape[1:]), compression="lzf"
                )
            state = episode["state"]
            demo["obs/ee_states"] = state[:, :6]
            demo["obs/ee_pos"], demo["obs/ee_ori"], demo["obs/gripper_states"] = np.split(
                state, [3, 6], axis=1
            )
