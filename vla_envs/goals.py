"""LIBERO's goal predicates, and the facts that rewards read."""

from typing import NamedTuple

import mujoco
import numba
import numpy as np
from numpy.typing import NDArray


class Goal(NamedTuple):
    """LIBERO's ``In object region``: the object's origin lies in a box-shaped region."""

    object_body: int
    region_site: int
    region_size: NDArray[np.float64]  # (3,) half sizes (m) in the site's frame


@numba.njit(cache=True, nogil=True)
def goal_met(goal, xpos, site_xpos, site_xmat):  # type: ignore[no-untyped-def]
    """LIBERO's ``In`` (``SiteObject.in_box``): the region's box, turned and taken axis-aligned, 1 cm deeper.

    Compiled into ``control.run_chunk``, whose cache sees no edit here: delete ``__pycache__`` after one.
    """
    for i in range(3):
        half = 0.0
        for j in range(3):
            half += site_xmat[goal.region_site, 3 * i + j] * goal.region_size[j]
        half = abs(half)
        centre = site_xpos[goal.region_site, i]
        below = 0.01 if i == 2 else 0.0
        position = xpos[goal.object_body, i]
        if not (centre - half - below < position < centre + half):
            return False
    return True


#: Every fact with its unit; each is a float, and an array over the environments in a vector environment.
FACTS = {
    "gripper_to_object": "m, from the point between the fingertips to the object's centre of mass",
    "gripper_to_object_xy": "m, the same in the horizontal plane",
    "object_height": "m, the object's rise above where it lay after the reset",
    "object_peak_height": "m, the greatest rise in this episode",
    "object_to_goal_xy": "m, horizontal distance from the object to the centre of the goal region",
    "object_above_goal": "m, height of the object above the centre of the goal region",
    "gripper_opening": "m, distance between the fingertips (0 closed, 0.08 open)",
    "touching": "0 or 1, one of the fingertips touches the object",
    "grasped": "0 or 1, both fingertips touch the object",
    "success": "0 or 1, LIBERO's goal predicate",
}


class FactReader:
    """Reads the facts of one environment from its ``MjData``."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, goal: Goal) -> None:
        self.data, self.goal = data, goal
        self.site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, "gripper0_grip_site")
        self.is_object = model.geom_bodyid == goal.object_body  # (ngeom,)
        self.pads = [
            mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, f"gripper0_finger{i}_pad_collision")
            for i in (1, 2)
        ]

    def read(self, rest_height: float, peak_height: float, success: bool) -> dict[str, float]:
        """The facts now.

        Args:
            rest_height: The object's height after the reset (m).
            peak_height: The object's greatest height since the reset (m).
            success: Whether the goal is met.
        """
        data, goal = self.data, self.goal
        position = data.xpos[goal.object_body]
        to_object = data.xipos[goal.object_body] - data.site_xpos[self.site]
        to_goal = data.site_xpos[goal.region_site] - position
        pairs = data.contact.geom  # (ncon, 2)
        touched = [
            bool(np.any((pairs == pad).any(1) & self.is_object[pairs].any(1))) if len(pairs) else False
            for pad in self.pads
        ]
        return {
            "gripper_to_object": float(np.linalg.norm(to_object)),
            "gripper_to_object_xy": float(np.linalg.norm(to_object[:2])),
            "object_height": float(position[2] - rest_height),
            "object_peak_height": float(max(peak_height, position[2]) - rest_height),
            "object_to_goal_xy": float(np.linalg.norm(to_goal[:2])),
            "object_above_goal": float(-to_goal[2]),
            "gripper_opening": float(data.qpos[7] - data.qpos[8]),
            "touching": float(any(touched)),
            "grasped": float(all(touched)),
            "success": float(success),
        }
