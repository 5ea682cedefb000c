"""Demonstrations in LeRobot's format."""

import contextlib
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vla_envs.demos.layout import MOST_BYTES, Episode, validate_layout, validate_values
from vla_envs.inputs import in_short, nearest
from vla_envs.tasks import Task

CAMERAS = ("image", "wrist_image")  # the environments' images, in the order of a data set's cameras
MOST_ROWS = 2**23  # per file; all of LIBERO's demonstrations have fewer than 2**21 control steps


def read_lerobot(
    folder: Path, task: Task, episodes: int | None, least: int, cameras: tuple[str, ...] = ("image",)
) -> list[Episode]:
    """Read demonstrations of LIBERO in LeRobot's format, versions 2.0, 2.1 and 3.0.

    The data set has ``observation.state`` and ``action``, or openpi's ``state`` and ``actions``; ``image`` is
    the first camera's, ``wrist_image`` the second's. As in LeRobot's LIBERO sets, images are assumed to be
    upright, observations to come before their actions, and an action of -1 to open the hand.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"{str(folder)!r} is a LeRobot data set, which pyarrow reads; expected: pip install pyarrow"
        )
    with _named(f"LeRobot data set {str(folder)!r} cannot be read"):
        info = json.loads((folder / "meta" / "info.json").read_text())
        rows = _lerobot_episodes(folder, info)
        of_task = [row for row in rows if list(row["tasks"]) == [task.instruction]]
        shown = sorted({str(name) for row in rows for name in row["tasks"]})
    if len(of_task) < least:
        near = "" if of_task else nearest(task.instruction, shown)
        raise ValueError(
            f"{str(folder)!r} has {len(of_task)} demonstrations of {task.instruction!r};"
            f" expected at least {least}{near}"
        )
    demos = []
    for row in of_task[:episodes]:
        where = f"episode {row['episode_index']} of {str(folder)!r}"
        with _named(f"{where} cannot be read"):
            demo = _read_lerobot_episode(folder, info, row, cameras)
        parts = {name.removesuffix("s"): part for name, part in demo.items()}
        validate_layout(where, parts, dict.fromkeys(cameras) | {"state": 8, "action": 7})
        validate_values(where, parts)
        demos.append(demo)
    return demos


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn whatever goes wrong in reading others' files into a ValueError that begins with ``what``."""
    try:
        yield
    except Exception as error:  # JSON, Parquet, images and missing names raise different ones
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__} "
        raise ValueError(f"{what}: {kind}{in_short(str(error))[1:-1]}") from None


def _parquet(path: Path, columns: list[str] | None = None, filters: Any = None) -> Any:
    """Read columns of a Parquet file as a table; by default all but LeRobot's statistics."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        stored, names = file.metadata, file.schema_arrow.names
        size = sum(
            stored.row_group(i).total_byte_size for i in range(stored.num_row_groups)
        )  # bytes once unpacked
    if columns is None:
        columns = [name for name in names if not name.startswith("stats/")]
    if missing := sorted(set(columns) - set(names)):
        raise ValueError(f"{str(path)!r} has no {missing[0]}")
    if not (0 <= stored.num_rows <= MOST_ROWS and 0 <= size <= MOST_BYTES):
        raise ValueError(
            f"{str(path)!r} claims {stored.num_rows} rows and {size} bytes; expected at most {MOST_ROWS} rows"
            f" and {MOST_BYTES} bytes"
        )
    return pq.read_table(path, columns=columns, filters=filters, partitioning=None)


def _lerobot_episodes(folder: Path, info: dict[str, Any]) -> list[dict[str, Any]]:
    """What the data set says about each episode, in their order."""
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


def _read_lerobot_episode(
    folder: Path, info: dict[str, Any], row: dict[str, Any], cameras: tuple[str, ...]
) -> Episode:
    """Read one episode: its images, states and actions as they are stored."""
    features = info["features"]
    its = [name for name, each in features.items() if each["dtype"] in ("image", "video")]
    named = {name: camera for name, camera in zip(CAMERAS, its) if name in cameras}
    state = next((name for name in ("observation.state", "state") if name in features), None)
    action = next((name for name in ("action", "actions") if name in features), None)
    if len(named) < len(cameras) or state is None or action is None:
        raise ValueError(
            f"it has {list(features)}; expected images{' of two cameras' * (cameras != CAMERAS[:1])},"
            " observation.state and action"
        )

    def place(template: str, of: str, camera: str = "") -> Path:
        """The file of this episode: version 2 has one per episode, in version 3 ``row`` names it."""
        number = int(row["episode_index"])
        names = {"episode_index": number, "episode_chunk": number // info.get("chunks_size", 1000)}
        names |= {name: row.get(f"{of}/{name}") for name in ("chunk_index", "file_index")}
        return folder / template.format(video_key=camera, **names)

    stored = [camera for camera in named.values() if features[camera]["dtype"] == "image"]
    columns = [state, action, "timestamp", "frame_index", *stored]
    path = place(info["data_path"], "data")
    table = _parquet(path, columns, [("episode_index", "=", row["episode_index"])]).sort_by("frame_index")
    if table["frame_index"].to_pylist() != list(range(row["length"])):
        raise ValueError(
            f"{str(path)!r} has {len(table)} of its frames; expected frames 0 to {row['length'] - 1}"
        )

    def images_of(camera: str) -> NDArray[np.uint8]:
        if camera in stored:
            return _images([each["bytes"] for each in table[camera].to_pylist()])
        times, fps = table["timestamp"].to_numpy(), info["fps"]
        if not np.allclose(np.diff(times) * fps, 1.0, atol=0.25):
            raise ValueError(f"its timestamps are not 1/{fps} s apart")
        video = f"videos/{camera}"
        start = row.get(f"{video}/from_timestamp", 0.0) + times[0]
        return _video_frames(place(info["video_path"], video, camera), start, len(table), fps)

    return {
        **{name: images_of(camera) for name, camera in named.items()},
        "state": np.array(table[state].to_pylist()),
        "actions": np.array(table[action].to_pylist()),
    }


def _images(encoded: list[bytes]) -> NDArray[np.uint8]:
    """Decode images (T, H, W, 3) from files such as PNG."""
    images = [Image.open(io.BytesIO(each)) for each in encoded]
    sizes = {image.size for image in images}
    if len(sizes) != 1 or len(images) * np.prod([3, *images[0].size], dtype=float) > MOST_BYTES:
        raise ValueError(f"its {len(images)} images have sizes {in_short(sizes)}; expected one size for all")
    return np.stack([np.asarray(image.convert("RGB")) for image in images])


def _video_frames(path: Path, start: float, count: int, fps: float) -> NDArray[np.uint8]:
    """Decode ``count`` frames (T, H, W, 3) of an MP4 file, the first of them at ``start`` (s)."""
    if not path.is_file():
        raise ValueError(f"there is no video {str(path)!r}")
    seek = max(0.0, start - 0.5 / fps)  # between two frames, so that the later one is the first
    reader = imageio_ffmpeg.read_frames(
        path,
        input_params=["-f", "mp4", "-ss", f"{seek:.6f}"],
        # Decode each frame once, whatever its time.
        output_params=["-vf", f"setpts=N/({fps}*TB)", "-r", str(fps), "-frames:v", str(count)],
    )
    with contextlib.closing(reader):
        try:
            about: Any = next(reader)
            width, height = about["size"]
            if abs(about["fps"] - fps) > 0.01 * fps:
                raise ValueError(f"{str(path)!r} has {about['fps']} frames per second; expected {fps}")
            if count * width * height * 3.0 > MOST_BYTES:
                size = f"{count} frames of {width} x {height} pixels"
                raise ValueError(f"{str(path)!r} has {size}; expected at most {MOST_BYTES} bytes")
            frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{str(path)!r} cannot be decoded: {str(error).splitlines()[-1]}") from None
    if len(frames) != count:
        raise ValueError(f"{str(path)!r} has {len(frames)} frames from {start:g} s on; expected {count}")
    return np.stack(frames)
