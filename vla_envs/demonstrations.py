"""Demonstrations to imitate: LIBERO's HDF5 data sets, as the scripted expert writes them, and LeRobot's.

What is read is checked: lengths, shapes, kinds of numbers, that they are finite, and that actions lie in
[-1, 1], of which the last opens the hand with -1 and closes it with 1.
"""

import contextlib
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import h5py
import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vla_envs.inputs import in_short, nearest
from vla_envs.tasks import Task

Episode = dict[str, NDArray[Any]]

MOST_BYTES = 2**31  # of one part of a demonstration; at 256 pixels LIBERO's longest has 1e8 of pictures
MOST_ROWS = 2**23  # of a file of LeRobot's; all of LIBERO's demonstrations have under 2**21 control steps
#: HDF5: attribute of ``data``, whether observation t is what action t was chosen from.
OBS_BEFORE_ACTION = "obs_before_action"


def load_demonstrations(
    folder: Path, task: Task, episodes: int | None, chunk: int, least: int = 1
) -> list[Episode]:
    """The first demonstrations of a task, as samples to imitate.

    Args:
        folder: With ``<suite>_<task id>_demo.hdf5`` or, as LIBERO names them, ``<task name>_demo.hdf5``; or a
            data set in LeRobot's format (a folder with ``meta/info.json``).
        task: What is to be demonstrated.
        episodes: How many demonstrations; None: all.
        chunk: Control steps that a decision covers (C).
        least: Without ``episodes``, how many there must be.

    Returns:
        For each demonstration of T control steps: ``image (T, H, H, 3)`` uint8, upright as the environments
        give it; ``state (T, 8)`` float32; ``actions (T, C, 7)`` float32, those of each step and the following
        ones, the last repeated past the end.

    Raises:
        ValueError: When files are missing or in another layout, hold fewer demonstrations, or one that cannot
            be learnt from; names the file and the demonstration.
    """
    least = episodes or least
    if (folder / "meta" / "info.json").is_file():
        demos = _read_lerobot(folder, task, episodes, least)
    else:
        paths = [folder / f"{task.suite}_{task.task_id}_demo.hdf5", folder / f"{task.name}_demo.hdf5"]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ValueError(
                f"no demonstrations at {str(paths[0])!r}, nor {paths[1].name!r}, nor a LeRobot data set;"
                " expected a folder that python -m vla_envs.experts --out FOLDER has made"
            )
        demos = _read_hdf5(path, task, episodes, least)
    hand = np.concatenate([demo["actions"][:, 6] for demo in demos])
    if hand.min() == 0:
        raise ValueError(
            f"the hand's actions of {task.instruction!r} in {str(folder)!r} are from 0 to {hand.max():g};"
            " expected -1 to open it and 1 to close it"
        )
    for demo in demos:
        last = len(demo["actions"]) - 1
        following = np.minimum(np.arange(last + 1)[:, None] + np.arange(chunk), last)  # (T, C)
        demo["actions"] = demo["actions"].astype(np.float32)[following]  # (T, C, 7)
        demo["state"] = demo["state"].astype(np.float32)
    return demos


# ---- Checks ------------------------------------------------------------------------------------------


def _check_layout(where: str, parts: dict[str, Any], widths: dict[str, int | None]) -> None:
    """Refuse parts of a demonstration, arrays or HDF5's, that differ in length T or hold other numbers.

    Args:
        where: Names the demonstration.
        parts: By name.
        widths: Of each part, the numbers per control step, 0 for any; None for pictures ``(T, H, H, 3)``.
    """
    lengths = {name: part.shape[0] for name, part in parts.items() if part.shape}
    length = lengths.get(next(iter(parts)))
    for name, part in parts.items():
        shape, width = part.shape, widths[name]
        if width is None:
            fits = part.dtype == np.uint8 and shape and shape[1:] == (*shape[1:2] * 2, 3) and shape[1]
            expected = "uint8 (T, H, H, 3)"
        else:
            fits = part.dtype.kind == "f" and shape and len(shape) == 2 and shape[1] == (width or shape[1])
            expected = f"floats (T, {width or 'any'})"
        if not fits:
            raise ValueError(f"{where}: {name} is {part.dtype} {shape}; expected {expected}")
        if part.dtype.itemsize * np.prod(shape, dtype=float) > MOST_BYTES:
            raise ValueError(f"{where}: {name} is {part.dtype} {shape}; expected at most {MOST_BYTES} bytes")
    if not length or set(lengths.values()) != {length}:
        raise ValueError(f"{where} has lengths {lengths}; expected one for all, and at least 1")


def _check_values(where: str, parts: Episode) -> None:
    """Refuse numbers that are not finite, as float32 too, and actions outside [-1, 1]."""
    for name, part in parts.items():
        if part.dtype.kind == "f":
            action = "action" in name
            wrong = np.argwhere(~(np.abs(part) <= (1 + 1e-6 if action else np.finfo(np.float32).max)))
            if len(wrong):
                step, column = wrong[0]
                expected = "numbers from -1 to 1" if action else "finite numbers"
                raise ValueError(
                    f"{where}: {name}[{step}, {column}] is {part[step, column]:g}; expected {expected}"
                )


# ---- HDF5 --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_hdf5(path: Path, task: Task, needed: tuple[str, ...]) -> Iterator[list[h5py.Group]]:
    """The demonstrations in a file in the layout of LIBERO's data sets (``libero/lifelong/datasets.py``).

    Raises:
        ValueError: When it is not such a file, is of another task, or lacks one of the ``needed`` parts.
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
                raise ValueError(
                    f"{str(path)!r} is not in the layout of LIBERO's data sets: it has no {lacks}"
                )
            shown = data.attrs.get("bddl_file_name", task.bddl_file.name)
            shown = shown.decode(errors="replace") if isinstance(shown, bytes) else str(shown)
            shown = PureWindowsPath(shown).name  # of either kind of path
            if shown != task.bddl_file.name:
                raise ValueError(f"{str(path)!r} shows {shown}; expected {task.bddl_file.name}")
            yield [data[name] for name in names]
    except Exception as error:  # h5py's, of damaged files, are of many kinds
        line = " ".join(str(error).split())
        if isinstance(error, ValueError) and repr(str(path)) in line:  # one of ours
            raise
        raise ValueError(f"{str(path)!r} is no whole HDF5 file: {line}") from None


def read_parts(demo: h5py.Group, widths: dict[str, int | None]) -> Episode:
    """Parts of a demonstration in an HDF5 file.

    Args:
        demo: As ``open_hdf5`` gives it, which has these parts.
        widths: Of each part, the numbers per control step, 0 for any; None for pictures ``(T, H, H, 3)``.

    Raises:
        ValueError: When they differ in length or shape, are no such numbers, or not finite, or actions are
            outside [-1, 1].
    """
    where = f"{demo.name.removeprefix('/data/')} in {demo.file.filename!r}"
    _check_layout(where, {name: demo[name] for name in widths}, widths)  # before anything is read
    parts = {name: demo[name][:] for name in widths}
    _check_values(where, parts)
    return parts


def _read_hdf5(path: Path, task: Task, episodes: int | None, least: int) -> list[Episode]:
    """Demonstrations with pictures.

    Where ``expert_actions`` is there (the scripted expert's actions without its noise) it is imitated.
    """
    needed = ("actions", "obs/agentview_rgb", "obs/ee_states", "obs/gripper_states")
    with open_hdf5(path, task, needed) as demos:
        if len(demos) < least:
            raise ValueError(f"{str(path)!r} holds {len(demos)} demonstrations; expected at least {least}")
        chosen = demos[:episodes]
        before = _obs_before_action(path, chosen)
        # Stored turned by 180 degrees; where robosuite's macros say so, as a mirror image.
        convention = demos[0].parent.attrs.get("macros_image_convention")
        rows = 1 if convention in ("opencv", b"opencv") else -1
        read = []
        for demo in chosen:
            labels = "expert_actions" if "expert_actions" in demo else "actions"
            parts = read_parts(demo, dict(zip(needed, (7, None, 6, 2))) | {labels: 7})
            length = len(parts[labels])
            if not before and length < 2:
                raise ValueError(
                    f"{demo.name.removeprefix('/data/')} in {str(path)!r} has 1 control step, and the"
                    " observation after it; expected at least 2"
                )
            observed = slice(None) if before else slice(length - 1)
            acted = slice(None) if before else slice(1, None)
            read.append({
                "image": parts["obs/agentview_rgb"][observed, ::rows, ::-1],
                "state": np.hstack([parts["obs/ee_states"], parts["obs/gripper_states"]])[observed],
                "actions": parts[labels][acted],
            })  # fmt: skip
        return read


def _obs_before_action(path: Path, demos: list[h5py.Group]) -> bool:
    """Whether observation t is what action t was chosen from, or, as in LIBERO's own files, what it led to.

    The attribute ``obs_before_action`` of ``data`` says so, which ``vla_envs.experts`` writes. Files without
    it that have ``expert_actions`` are its earlier ones: before. In all others ``states``, recorded before
    each action, tell: the joints observed are those of the same state (OpenVLA's files, regenerated without
    idle steps) or of the next one (LIBERO's own).
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
            joints, recorded = parts["obs/joint_states"], parts["states"][:, 1:8]  # after the time, the arm's
            if recorded.shape == joints.shape:
                same += float(np.abs(joints[1:] - recorded[1:]).sum())
                following += float(np.abs(joints[:-1] - recorded[1:]).sum())
    if not min(same, following) < 0.5 * max(same, following):
        raise ValueError(
            f"{str(path)!r} does not show whether observations come before or after their actions; expected"
            " states and obs/joint_states as in LIBERO's files, or True or False as the attribute"
            f" {OBS_BEFORE_ACTION!r} of data"
        )
    return same < following


# ---- LeRobot -----------------------------------------------------------------------------------------


def _read_lerobot(folder: Path, task: Task, episodes: int | None, least: int) -> list[Episode]:
    """Demonstrations of LIBERO in LeRobot's format, versions 2.0, 2.1 and 3.0.

    Expects ``observation.state`` and ``action``, or openpi's ``state`` and ``actions``, and takes the first
    camera. Assumed is what LeRobot's LIBERO sets have: upright pictures, observations from before the action,
    and a hand that -1 opens.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"{str(folder)!r} is a LeRobot data set; expected what reads it: pip install pyarrow"
        )
    with _named(f"LeRobot data set {str(folder)!r} cannot be read"):
        info = json.loads((folder / "meta" / "info.json").read_text())
        rows = _lerobot_episodes(folder, info)
        of_task = [row for row in rows if list(row["tasks"]) == [task.instruction]]
        shown = sorted({str(name) for row in rows for name in row["tasks"]})
    if len(of_task) < least:
        near = "" if of_task else nearest(task.instruction, shown)
        raise ValueError(
            f"{str(folder)!r} holds {len(of_task)} demonstrations of {task.instruction!r};"
            f" expected at least {least}{near}"
        )
    demos = []
    for row in of_task[:episodes]:
        where = f"episode {row['episode_index']} of {str(folder)!r}"
        with _named(f"{where} cannot be read"):
            demo = _read_lerobot_episode(folder, info, row)
        parts = dict(zip(("picture", "state", "action"), demo.values()))
        _check_layout(where, parts, {"picture": None, "state": 8, "action": 7})
        _check_values(where, parts)
        demos.append(demo)
    return demos


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Whatever goes wrong in reading files that others have made, as a ValueError that begins ``what``."""
    try:
        yield
    except Exception as error:  # those of JSON, of Parquet, of pictures, and of what is missing in them
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__} "
        raise ValueError(f"{what}: {kind}{in_short(str(error))[1:-1]}") from None


def _parquet(path: Path, columns: list[str] | None = None, filters: Any = None) -> Any:
    """Columns of a Parquet file as a table; by default all but LeRobot's statistics."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        stored, names = file.metadata, file.schema_arrow.names
        size = sum(stored.row_group(i).total_byte_size for i in range(stored.num_row_groups))  # unpacked
    if columns is None:
        columns = [name for name in names if not name.startswith("stats/")]
    if missing := sorted(set(columns) - set(names)):
        raise ValueError(f"{str(path)!r} has no {missing[0]}")
    if not (0 <= stored.num_rows <= MOST_ROWS and 0 <= size <= MOST_BYTES):
        raise ValueError(
            f"{str(path)!r} claims {stored.num_rows} rows of {size} bytes; expected at most {MOST_ROWS} and"
            f" {MOST_BYTES}"
        )
    return pq.read_table(path, columns=columns, filters=filters, partitioning=None)


def _lerobot_episodes(folder: Path, info: dict[str, Any]) -> list[dict[str, Any]]:
    """What the data set says of each episode, in their order."""
    version = str(info["codebase_version"])
    if re.match(r"v2\.[01]\b", version):
        lines = (folder / "meta" / "episodes.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    elif re.match(r"v3\.0\b", version):
        rows = []
        for path in sorted((folder / "meta" / "episodes").glob("*/*.parquet")):
            rows += _parquet(path).to_pylist()
    else:
        raise ValueError(f"codebase_version is {version!r}; expected 'v2.0', 'v2.1' or 'v3.0'")
    if len(rows) != info["total_episodes"]:
        raise ValueError(
            f"meta lists {len(rows)} episodes; expected {info['total_episodes']} as info.json says"
        )
    return sorted(rows, key=lambda row: int(row["episode_index"]))


def _read_lerobot_episode(folder: Path, info: dict[str, Any], row: dict[str, Any]) -> Episode:
    """One episode: its pictures, states and actions, as they are stored."""
    features = info["features"]
    camera = next((name for name, each in features.items() if each["dtype"] in ("image", "video")), None)
    state = next((name for name in ("observation.state", "state") if name in features), None)
    action = next((name for name in ("action", "actions") if name in features), None)
    if camera is None or state is None or action is None:
        raise ValueError(f"it has {list(features)}; expected pictures, observation.state and action")

    def place(template: str, of: str) -> Path:
        """A file: in version 2 one for each episode, in version 3 one that ``row`` names."""
        number = int(row["episode_index"])
        names = {"episode_index": number, "episode_chunk": number // info.get("chunks_size", 1000)}
        names |= {name: row.get(f"{of}/{name}") for name in ("chunk_index", "file_index")}
        return folder / template.format(video_key=camera, **names)

    in_video = features[camera]["dtype"] == "video"
    columns = [state, action, "timestamp", "frame_index", *([] if in_video else [camera])]
    path = place(info["data_path"], "data")
    table = _parquet(path, columns, [("episode_index", "=", row["episode_index"])]).sort_by("frame_index")
    if table["frame_index"].to_pylist() != list(range(row["length"])):
        raise ValueError(f"{str(path)!r} has {len(table)} frames of it; expected 0 to {row['length'] - 1}")
    if in_video:
        times, fps = table["timestamp"].to_numpy(), info["fps"]
        if not np.allclose(np.diff(times) * fps, 1.0, atol=0.25):
            raise ValueError(f"its timestamps are not 1/{fps} s apart")
        video = f"videos/{camera}"
        start = row.get(f"{video}/from_timestamp", 0.0) + times[0]
        image = _video_frames(place(info["video_path"], video), start, len(table), fps)
    else:
        image = _pictures([each["bytes"] for each in table[camera].to_pylist()])
    return {
        "image": image,
        "state": np.array(table[state].to_pylist()),
        "actions": np.array(table[action].to_pylist()),
    }


def _pictures(encoded: list[bytes]) -> NDArray[np.uint8]:
    """Pictures (T, H, W, 3) from files such as PNG."""
    pictures = [Image.open(io.BytesIO(each)) for each in encoded]
    sizes = {picture.size for picture in pictures}
    if len(sizes) != 1 or len(pictures) * np.prod([3, *pictures[0].size], dtype=float) > MOST_BYTES:
        raise ValueError(f"its {len(pictures)} pictures have sizes {in_short(sizes)}; expected one for all")
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])


def _video_frames(path: Path, start: float, count: int, fps: float) -> NDArray[np.uint8]:
    """``count`` frames (T, H, W, 3) of an MP4 file, the first at ``start`` (s)."""
    if not path.is_file():
        raise ValueError(f"there is no video {str(path)!r}")
    seek = max(0.0, start - 0.5 / fps)  # between two frames: the first that is not before it is meant
    reader = imageio_ffmpeg.read_frames(
        path,
        input_params=["-f", "mp4", "-ss", f"{seek:.6f}"],
        # Each frame once, whatever its time.
        output_params=["-vf", f"setpts=N/({fps}*TB)", "-r", str(fps), "-frames:v", str(count)],
    )
    with contextlib.closing(reader):
        try:
            about: Any = next(reader)
            width, height = about["size"]
            if abs(about["fps"] - fps) > 0.01 * fps:
                raise ValueError(f"{str(path)!r} has {about['fps']} frames per second; expected {fps}")
            if count * width * height * 3.0 > MOST_BYTES:
                raise ValueError(f"{str(path)!r} has pictures of {width} x {height} pixels")
            frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{str(path)!r} cannot be decoded: {str(error).splitlines()[-1]}") from None
    if len(frames) != count:
        raise ValueError(f"{str(path)!r} has {len(frames)} frames from {start:g} s on; expected {count}")
    return np.stack(frames)


def samples(tasks: list[Task], demonstrations: list[list[Episode]]) -> dict[str, Any]:
    """All S control steps of several tasks: image, state and actions (S, ...), and instructions."""
    flat = [(task, demo) for task, demos in zip(tasks, demonstrations) for demo in demos]
    size = flat[0][1]["image"].shape[1]
    for task, demo in flat:
        if demo["image"].shape[1] != size:
            raise ValueError(
                f"pictures of {task.suite} {task.task_id} have {demo['image'].shape[1]} pixels;"
                f" expected {size}, as those of {flat[0][0].suite} {flat[0][0].task_id} have"
            )
    result: dict[str, Any] = {
        name: np.concatenate([demo[name] for _, demo in flat]) for name in ("image", "state", "actions")
    }
    return result | {"instructions": [task.instruction for task, demo in flat for _ in demo["actions"]]}
