"""How a perturbed scene is drawn: what of an environment's data and of the shared model is another."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import mujoco
import numpy as np
from numpy.typing import NDArray

from vla_envs.perturbations import PARTS, Perturbation

PIVOT = np.array([0.0, 0.0, 0.8])  # m; what the camera orbits, and what distances are measured from

Change: TypeAlias = tuple[NDArray[Any], Any, Any]  # an array, where in it, and what is there instead


class Look(NamedTuple):
    """How a perturbed scene is drawn, worked out for one model."""

    camera: int  # the camera that is moved; -1 for none
    position: NDArray[np.float64]  # (3,) of it, m
    rotation: NDArray[np.float64]  # (9,) of it, row by row
    lit: bool  # whether the lights are changed
    diffuse: NDArray[np.float64]  # (3,) what all lights' colours are multiplied by
    specular: float
    tilt: NDArray[np.float64]  # (3,) what is added to the direction of each light
    # Geoms, their materials, and what their colours are multiplied by.
    tints: tuple[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]], ...]

    def of_data(self, data: mujoco.MjData) -> Iterator[Change]:
        """What is drawn differently of an environment's state: the camera, and where light comes from."""
        if self.camera >= 0:
            yield data.cam_xpos, self.camera, self.position
            yield data.cam_xmat, self.camera, self.rotation
        if self.lit:
            directions = data.light_xdir + self.tilt
            lengths = np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-9)
            yield data.light_xdir, slice(None), directions / lengths

    def of_model(self, model: mujoco.MjModel) -> Iterator[Change]:
        """What is drawn differently of the model: the colours of lights and of the background."""
        if self.lit:
            every, headlight = slice(None), model.vis.headlight
            for array in (model.light_diffuse, model.light_ambient, headlight.diffuse, headlight.ambient):
                yield array, every, array * self.diffuse
            yield model.light_specular, every, model.light_specular * self.specular
        for geoms, materials, factor in self.tints:
            yield model.geom_rgba, (geoms, slice(3)), model.geom_rgba[geoms, :3] * factor
            yield model.mat_rgba, (materials, slice(3)), model.mat_rgba[materials, :3] * factor


Parts = dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]


def parts_of(model: mujoco.MjModel) -> Parts:
    """The background's geoms and their materials by part, found by the names in LIBERO's scenes."""
    geoms: dict[str, list[int]] = {part: [] for part in PARTS}
    for geom in np.flatnonzero(model.geom_group).tolist():
        name, body = model.geom(geom).name, model.body(model.geom_bodyid[geom]).name
        if name == "floor":
            geoms["floor"].append(geom)
        elif name.startswith("wall_"):
            geoms["walls"].append(geom)
        elif name.startswith("table_") or "table" in body:
            geoms["table"].append(geom)
    parts = {}
    for part, its in geoms.items():
        # MuJoCo draws a geom in its material's colour unless it has one of its own, another than this gray.
        own = [
            g for g in its if model.geom_matid[g] < 0 or (model.geom_rgba[g] != [0.5, 0.5, 0.5, 1.0]).any()
        ]
        materials = {int(model.geom_matid[g]) for g in its} - {-1}
        parts[part] = np.array(own, np.int64), np.array(sorted(materials), np.int64)
    return parts


def look_of(model: mujoco.MjModel, parts: Parts, perturbation: Perturbation, camera: str) -> Look | None:
    """How ``perturbation`` looks, or None if it does not show in a drawn scene.

    Args:
        model: The scene's.
        parts: ``parts_of`` it.
        perturbation: What is drawn or asked for.
        camera: The name of the camera that is moved.
    """
    if not {"camera", "light", "background"} & set(perturbation):
        return None
    number, position, rotation = -1, np.zeros(3), np.eye(3)
    if "camera" in perturbation:
        number = model.camera(camera).id
        position, rotation = _moved_camera(model, number, perturbation["camera"])
    light = perturbation.get("light", {"diffuse": [1.0] * 3, "specular": 1.0, "tilt": [0.0] * 3})
    background = perturbation.get("background", {})
    tints = [(*parts[part], np.array(factor)) for part, factor in background.items()]
    return Look(
        number, position, rotation.flatten(), "light" in perturbation, np.array(light["diffuse"]),
        float(light["specular"]), np.array(light["tilt"]), tuple(tints),
    )  # fmt: skip


def _moved_camera(
    model: mujoco.MjModel, number: int, moved: dict[str, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Position (3, m) and rotation (3, 3) of a fixed camera, as LIBERO-Plus's ``_setup_camera`` moves it."""
    position, rotation = model.cam_pos[number].copy(), np.empty(9)
    mujoco.mju_quat2Mat(rotation, model.cam_quat[number])
    up, around = _turn("y", -moved["elevation"]), _turn("z", moved["azimuth"])
    position = around @ (PIVOT + up @ (position - PIVOT))
    position = PIVOT + moved["scale"] * (position - PIVOT)
    turned = _turn("y", -moved["tilt"]) @ _turn("z", moved["pan"]) @ around @ up
    return position, turned @ rotation.reshape(3, 3)


def _turn(axis: str, degrees: float) -> NDArray[np.float64]:
    """The rotation (3, 3) by an angle about an axis of the world."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    if axis == "z":
        return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])
    return np.array([[cosine, 0.0, sine], [0.0, 1.0, 0.0], [-sine, 0.0, cosine]])
