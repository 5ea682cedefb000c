"""LIBERO's goal predicates, and the facts that rewards read."""

import mujoco
import numpy as np
from numpy.typing import NDArray

from vla_envs.control import (
    IN_REGION,
    JOINT,
    ON_OBJECT,
    ON_REGION,
    UP,
    UP_HEIGHT,
    Goal,
    in_place,
    predicate_in_place,
)

__all__ = [
    "FACTS", "IN_REGION", "JOINT", "ON_OBJECT", "ON_REGION", "UP", "UP_HEIGHT", "FactReader", "Goal",
    "in_place", "order", "predicates_met", "touch",
]  # fmt: skip


def order(predicate: str) -> int:
    """When a predicate is met: a drawer is opened first and closed last. LIBERO's files give no order."""
    return {"open": 0, "close": 2}.get(predicate.lower(), 1)


def predicates_met(goal: Goal, data: mujoco.MjData) -> NDArray[np.bool_]:
    """Which of the goal's predicates hold ``(n,)``, including their contacts."""
    met = np.zeros(len(goal.kind), bool)
    pairs = data.contact.geom  # (ncon, 2)
    for k in range(len(met)):
        met[k] = predicate_in_place(goal, k, data.qpos, data.xpos, data.site_xpos, data.site_xmat)
        if met[k] and goal.contact[k].any():
            met[k] = touch(goal.contact[k, 0], goal.contact[k, 1], pairs)
    return met


def touch(ones: NDArray[np.bool_], others: NDArray[np.bool_], pairs: NDArray[np.int32]) -> bool:
    """Whether one of the contacts ``pairs`` (ncon, 2) joins two sets of geoms, each (ngeom,) bool."""
    a, b = pairs.T
    return bool(np.any((ones[a] & others[b]) | (ones[b] & others[a])))


#: Every fact with its unit. Each is a float, and in a vector environment an array over the environments.
#: "The object" belongs to the goal's first predicate that does not hold yet, or to the last when all hold: it
#: is what has to be placed, or the drawer, door or knob that has to be moved.
FACTS = {
    "gripper_to_object": "m, from the point between the fingertips to the object's centre of mass, or to the "
    "nearest part of a drawer, door or knob",
    "gripper_to_object_xy": "m, the same in the horizontal plane",
    "object_height": "m, the object's rise above where it lay after the reset",
    "object_peak_height": "m, the greatest rise in this episode",
    "object_to_goal_xy": "m, horizontal distance from the object to the centre of its goal (0 for a joint), "
    "or what is missing of a height",
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
    """Reads the facts of one environment from its ``MjData``.

    Attributes:
        met: Which of the goal's predicates held (n,) at the last ``read``.
    """

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, goal: Goal) -> None:
        self.data, self.goal = data, goal
        self.met = np.zeros(len(goal.kind), bool)
        self.site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, "gripper0_grip_site")
        self.body_geoms = model.geom_bodyid[None] == goal.subject[:, None]  # (n, ngeom)
        self.solid = self.body_geoms & (model.geom_contype | model.geom_conaffinity).astype(bool)
        self.pads = [
            np.arange(model.ngeom)
            == mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, f"gripper0_finger{i}_pad_collision")
            for i in (1, 2)
        ]

    def origin(self) -> NDArray[np.float64]:
        """Where progress is measured from ``(n,)``: the objects' heights (m) and the joints' positions."""
        goal, joint = self.goal, self.goal.kind == JOINT
        return np.where(
            joint, self.data.qpos[np.where(joint, goal.target, 0)], self.data.xpos[goal.subject, 2]
        )

    def goal_position(self, k: int) -> NDArray[np.float64]:
        """The centre (3, m) of where predicate ``k``, which moves no joint, wants its object."""
        kind, target, data = self.goal.kind[k], self.goal.target[k], self.data
        if kind == UP:
            return np.append(data.xpos[target, :2], self.goal.parameters[k, 0])
        return (data.xpos if kind == ON_OBJECT else data.site_xpos)[target]

    def read(self, origin: NDArray[np.float64], peak: NDArray[np.float64], success: bool) -> dict[str, float]:
        """Read the facts of this moment, and note in ``met`` which predicates hold.

        Args:
            origin: What ``origin()`` returned after the reset (n,).
            peak: The subjects' greatest heights since the reset (n,), in m.
            success: Whether the goal is met.
        """
        data, goal = self.data, self.goal
        met = self.met = predicates_met(goal, data)
        unmet = np.flatnonzero(~met)
        k = int(unmet[0]) if len(unmet) else len(met) - 1
        joint, up, target = goal.kind[k] == JOINT, goal.kind[k] == UP, goal.target[k]
        hand, position = data.site_xpos[self.site], data.xpos[goal.subject[k]]
        if joint:
            parts = data.geom_xpos[self.solid[k]] - hand
            to_object = parts[np.argmin(np.linalg.norm(parts, axis=1))]
            to_goal, rise, peak_rise = np.zeros(3), 0.0, 0.0
            progress = (data.qpos[target] - origin[k]) / ((goal.parameters[k, 0] - origin[k]) or 1.0)
        else:
            to_object = data.xipos[goal.subject[k]] - hand
            to_goal = self.goal_position(k) - position
            rise, peak_rise = position[2] - origin[k], max(peak[k], position[2]) - origin[k]
            progress = 0.0
        touched = [touch(pad, self.body_geoms[k], data.contact.geom) for pad in self.pads]
        return {
            "gripper_to_object": float(np.linalg.norm(to_object)),
            "gripper_to_object_xy": float(np.linalg.norm(to_object[:2])),
            "object_height": float(rise),
            "object_peak_height": float(peak_rise),
            "object_to_goal_xy": float(max(to_goal[2], 0.0) if up else np.linalg.norm(to_goal[:2])),
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
