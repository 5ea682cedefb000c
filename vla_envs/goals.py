"""LIBERO's goal predicates, and the facts that rewards read."""

from typing import NamedTuple

import mujoco
import numba
import numpy as np
from numpy.typing import NDArray

IN_REGION, ON_REGION, ON_OBJECT, JOINT = range(4)


def turn(predicate: str) -> int:
    """When a predicate is best met: a drawer is opened first and closed last. LIBERO's files say no order."""
    return {"open": 0, "close": 2}.get(predicate.lower(), 1)


class Goal(NamedTuple):
    """LIBERO's goal of a task: n predicates that must all hold, in the order in which to meet them (`turn`).

    Sources: LIBERO's ``envs/object_states/base_object_states.py``, ``envs/objects/site_object.py`` and
    ``envs/objects/articulated_objects.py``.
    """

    kind: NDArray[np.int64]  # (n,) IN_REGION, ON_REGION, ON_OBJECT or JOINT (Open, Close, TurnOn, TurnOff)
    subject: NDArray[np.int64]  # (n,) body of the object to place, or of the part to open or turn
    target: NDArray[np.int64]  # (n,) site of the region, body of the object below, or address in qpos
    # (n, 3) half sizes of the region in its own frame (m), or for JOINT: threshold (m or rad), and +1 where
    # the joint must be above it, -1 below
    figures: NDArray[np.float64]
    # (n, 2, ngeom) the geoms that must touch the others; none where the predicate asks for no contact
    contact: NDArray[np.bool_]


@numba.njit(cache=True, nogil=True)
def in_place(goal, qpos, xpos, site_xpos, site_xmat):  # type: ignore[no-untyped-def]
    """Whether every predicate holds as far as positions tell, contacts aside.

    Compiled into ``control.run_chunk``, whose cache sees no edit here: delete ``__pycache__`` after one.
    """
    for k in range(len(goal.kind)):
        if not predicate_in_place(goal, k, qpos, xpos, site_xpos, site_xmat):
            return False
    return True


@numba.njit(cache=True, nogil=True)
def predicate_in_place(goal, k, qpos, xpos, site_xpos, site_xmat):  # type: ignore[no-untyped-def]
    """Whether predicate ``k`` holds as far as positions tell."""
    kind, target, figures = goal.kind[k], goal.target[k], goal.figures[k]
    if kind == JOINT:
        return figures[1] * (qpos[target] - figures[0]) > 0.0
    position = xpos[goal.subject[k]]
    if kind == IN_REGION:  # SiteObject.in_box: the region's box, turned, taken axis-aligned, 1 cm deeper
        for i in range(3):
            half = 0.0
            for j in range(3):
                half += site_xmat[target, 3 * i + j] * figures[j]
            half = abs(half)
            centre = site_xpos[target, i]
            below = 0.01 if i == 2 else 0.0
            if not (centre - half - below < position[i] < centre + half):
                return False
        return True
    if kind == ON_REGION:  # SiteObject.under: over the region, at most 10 cm
        for i in range(3):
            away = 0.0
            for j in range(3):
                away += site_xmat[target, 3 * i + j] * (position[j] - site_xpos[target, j])
            if i < 2 and not abs(away) < figures[i]:
                return False
            if i == 2 and not figures[2] - 0.005 < away < figures[2] + 0.1:
                return False
        return True
    below_it = xpos[target]  # ON_OBJECT, ObjectState.check_ontop
    away = np.sqrt((position[0] - below_it[0]) ** 2 + (position[1] - below_it[1]) ** 2)
    return below_it[2] <= position[2] and away < 0.03


def predicates_met(goal: Goal, data: mujoco.MjData) -> NDArray[np.bool_]:
    """Which of the goal's predicates hold ``(n,)``, contacts included."""
    met = np.zeros(len(goal.kind), bool)
    pairs = data.contact.geom  # (ncon, 2)
    for k in range(len(met)):
        met[k] = predicate_in_place(goal, k, data.qpos, data.xpos, data.site_xpos, data.site_xmat)
        if met[k] and goal.contact[k].any():
            met[k] = touch(goal.contact[k, 0], goal.contact[k, 1], pairs)
    return met


def touch(ones: NDArray[np.bool_], others: NDArray[np.bool_], pairs: NDArray[np.int32]) -> bool:
    """Whether one of the contacts ``pairs`` (ncon, 2) is between geoms of two sets, each (ngeom,) bool."""
    a, b = pairs.T
    return bool(np.any((ones[a] & others[b]) | (ones[b] & others[a])))


#: Every fact with its unit; each is a float, and an array over the environments in a vector environment.
#: "The object" is that of the first predicate of the goal that does not hold yet (of the last when all do):
#: what is to be placed, or the drawer, door or knob that is to be moved.
FACTS = {
    "gripper_to_object": "m, from the point between the fingertips to the object's centre of mass, or to the "
    "nearest part of a drawer, door or knob",
    "gripper_to_object_xy": "m, the same in the horizontal plane",
    "object_height": "m, the object's rise above where it lay after the reset",
    "object_peak_height": "m, the greatest rise in this episode",
    "object_to_goal_xy": "m, horizontal distance from the object to the centre of its goal (0 for a joint)",
    "object_above_goal": "m, height of the object above the centre of its goal (0 for a joint)",
    "gripper_opening": "m, distance between the fingertips (0 closed, 0.08 open)",
    "touching": "0 or 1, one of the fingertips touches the object",
    "grasped": "0 or 1, both fingertips touch the object",
    "is_joint": "0 or 1, the goal is to open, close or turn the object, not to place it",
    "joint_progress": "1, the joint's way from where it was after the reset (0) to its goal (1)",
    "goals_met": "count, predicates of the goal that hold",
    "goals": "count, predicates of the goal",
    "success": "0 or 1, LIBERO's goal: all predicates held at the last control step",
}


class FactReader:
    """Reads the facts of one environment from its ``MjData``."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, goal: Goal) -> None:
        self.data, self.goal = data, goal
        self.site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, "gripper0_grip_site")
        self.body_geoms = model.geom_bodyid[None] == goal.subject[:, None]  # (n, ngeom)
        self.solid = self.body_geoms & (model.geom_contype | model.geom_conaffinity).astype(bool)
        self.pads = [
            np.arange(model.ngeom)
            == mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, f"gripper0_finger{i}_pad_collision")
            for i in (1, 2)
        ]

    def origin(self) -> NDArray[np.float64]:
        """What progress is measured from ``(n,)``: heights of the objects (m), positions of the joints."""
        goal, joint = self.goal, self.goal.kind == JOINT
        return np.where(
            joint, self.data.qpos[np.where(joint, goal.target, 0)], self.data.xpos[goal.subject, 2]
        )

    def read(self, origin: NDArray[np.float64], peak: NDArray[np.float64], success: bool) -> dict[str, float]:
        """The facts now.

        Args:
            origin: ``origin()`` after the reset (n,).
            peak: The subjects' greatest heights since the reset (n,), m.
            success: Whether the goal is met.
        """
        data, goal = self.data, self.goal
        met = predicates_met(goal, data)
        unmet = np.flatnonzero(~met)
        k = int(unmet[0]) if len(unmet) else len(met) - 1
        joint, target = goal.kind[k] == JOINT, goal.target[k]
        hand, position = data.site_xpos[self.site], data.xpos[goal.subject[k]]
        if joint:
            parts = data.geom_xpos[self.solid[k]] - hand
            to_object = parts[np.argmin(np.linalg.norm(parts, axis=1))]
            to_goal, rise, peak_rise = np.zeros(3), 0.0, 0.0
            progress = (data.qpos[target] - origin[k]) / ((goal.figures[k, 0] - origin[k]) or 1.0)
        else:
            to_object = data.xipos[goal.subject[k]] - hand
            to_goal = (data.xpos if goal.kind[k] == ON_OBJECT else data.site_xpos)[target] - position
            rise, peak_rise = position[2] - origin[k], max(peak[k], position[2]) - origin[k]
            progress = 0.0
        touched = [touch(pad, self.body_geoms[k], data.contact.geom) for pad in self.pads]
        return {
            "gripper_to_object": float(np.linalg.norm(to_object)),
            "gripper_to_object_xy": float(np.linalg.norm(to_object[:2])),
            "object_height": float(rise),
            "object_peak_height": float(peak_rise),
            "object_to_goal_xy": float(np.linalg.norm(to_goal[:2])),
            "object_above_goal": float(-to_goal[2]),
            "gripper_opening": float(data.qpos[7] - data.qpos[8]),
            "touching": float(any(touched)),
            "grasped": float(all(touched)),
            "is_joint": float(joint),
            "joint_progress": float(progress),
            "goals_met": float(met.sum()),
            "goals": float(len(met)),
            "success": float(success),
        }
