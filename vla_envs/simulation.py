"""One environment: it is restored, settled, executes actions, and is watched for divergence."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from vla_envs.control import Arm, ControllerMemory, Views, execute_chunk
from vla_envs.goals import FactReader, predicates_met
from vla_envs.scene import Scene

#: Joint velocities (m/s, rad/s) above this mean that a simulation has diverged: 20 m or 20 rad per substep of
#: 2 ms. Objects that fall or are hit in LIBERO's scenes stay below 100; MuJoCo itself gives up at 1e10.
MAX_VELOCITY = 1e4

_PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION

# Where MuJoCo notes that it met unusable numbers, and silently went back to the model's own pose.
_RESTARTED = {
    mujoco.mjtWarning.mjWARN_BADQPOS: "position",
    mujoco.mjtWarning.mjWARN_BADQVEL: "velocity",
    mujoco.mjtWarning.mjWARN_BADQACC: "acceleration",
}


@dataclass
class Settled:
    """An init state after the settling steps: everything that a reset copies."""

    physics: NDArray[np.float64]
    memory: ControllerMemory
    images: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    reason: str = ""  # why it could not be settled; it is then the init state itself
    arm: Arm | None = None  # of the controller, where it is not the scene's


class Simulation:
    """One environment: a scene's shared model, and data of its own."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.data = mujoco.MjData(scene.model)
        self.views = Views.of(self.data)
        self.memory = ControllerMemory.new(len(scene.goal.kind))
        self.arm = scene.arm  # what the controller knows; another where the arm starts in another pose
        self.just_restored = False
        self.facts = FactReader(scene.model, self.data, scene.goal)
        self.hand = mujoco.mj_name2id(scene.model, mujoco.mjtObj.mjOBJ_BODY, "robot0_right_hand")
        self.origin = np.zeros(len(scene.goal.kind))
        self.last_good = np.empty(mujoco.mj_stateSize(scene.model, _PHYSICS))
        self._addresses = (scene.model._address, self.data._address)

    def __reduce__(self) -> Any:
        raise TypeError("a Simulation cannot be copied, because it holds addresses; copy its environment")

    def restore(self, init_state: NDArray[np.float64]) -> None:
        """Put joints and fixtures as in an init state (``Scene``), at rest, like ``set_init_state``."""
        mujoco.mj_resetData(self.scene.model, self.data)
        self.scene.pose(self.data, init_state)
        self.memory.goal_rotation[...] = self.arm.reset_rotation
        self.memory.gripper[:] = 0.0
        self.just_restored = True

    def execute(self, actions: NDArray[np.float64]) -> tuple[int, bool]:
        """Execute ``actions`` (C, 7); return how many were done, and whether the goal is met."""
        done, met = 0, False
        while done < len(actions) and not met:
            steps, met = execute_chunk(
                *self._addresses,
                self.views,
                self.arm,
                self.memory,
                self.scene.goal,
                actions[done:],
                self.just_restored,
            )
            done += steps
            self.just_restored = False
            met = met and bool(predicates_met(self.scene.goal, self.data).all())  # with contacts
        return done, met

    def divergence(self) -> str:
        """``"diverged: ..."`` when the simulation has diverged since it was last restored, else ``""``."""
        model, data = self.scene.model, self.data
        warned = data.warning.number
        for kind, name in _RESTARTED.items():
            if warned[kind]:  # the number that MuJoCo found is gone
                index = int(data.warning[kind].lastinfo)
                if name == "position":
                    joint = int(np.searchsorted(model.jnt_qposadr, index, side="right")) - 1
                else:
                    joint = int(model.dof_jntid[index])
                return f"diverged: {name} of joint {model.joint(joint).name} is not finite, or above 1e10"
        speed = np.abs(data.qvel)
        if speed.max() <= MAX_VELOCITY and np.isfinite(data.qpos).all():  # comparing NaN gives False
            return ""
        if not speed.max() <= MAX_VELOCITY:
            dof = int(np.argmax(np.where(np.isnan(speed), np.inf, speed)))
            joint = int(model.dof_jntid[dof])
            kind = int(model.jnt_type[joint])
            straight = kind == mujoco.mjtJoint.mjJNT_SLIDE or (
                kind == mujoco.mjtJoint.mjJNT_FREE and dof < model.jnt_dofadr[joint] + 3
            )
            unit = "m/s" if straight else "rad/s"
            return f"diverged: velocity of joint {model.joint(joint).name} is {data.qvel[dof]:.2g} {unit}"
        index = int(np.argmin(np.isfinite(data.qpos)))
        joint = int(np.searchsorted(model.jnt_qposadr, index, side="right")) - 1
        return f"diverged: position of joint {model.joint(joint).name} is {data.qpos[index]:.2g}"

    def keep(self) -> None:
        """Remember this moment as the last one that can be trusted."""
        mujoco.mj_getState(self.scene.model, self.data, self.last_good, _PHYSICS)

    def go_back(self) -> None:
        """Return to the moment of the last ``keep``, and forget everything that came after it."""
        self._return_to(self.last_good)

    def _return_to(self, physics: NDArray[np.float64]) -> None:
        mujoco.mj_resetData(self.scene.model, self.data)  # clears warnings as well
        mujoco.mj_setState(self.scene.model, self.data, physics, _PHYSICS)
        mujoco.mj_step1(self.scene.model, self.data)  # computes poses and contacts, and moves nothing

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """What is executed inside is undone at the end."""
        physics, memory, just_restored = np.empty_like(self.last_good), self.memory.copy(), self.just_restored
        mujoco.mj_getState(self.scene.model, self.data, physics, _PHYSICS)
        yield
        self._return_to(physics)
        self.memory.assign(memory)
        self.just_restored = just_restored

    def settle(
        self, init_state: NDArray[np.float64], steps: int, gripper: float, arm: Arm | None = None
    ) -> Settled:
        """Restore an init state, then hold still for ``steps`` control steps and command ``gripper``.

        Args:
            init_state: As ``Scene`` has them.
            steps: Control steps.
            gripper: From -1 to 1.
            arm: What the controller knows [the scene's].
        """
        self.arm = arm or self.scene.arm
        self.restore(init_state)
        while steps:  # executing actions stops when the goal is met
            steps -= self.execute(np.tile([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, gripper], (steps, 1)))[0]
        reason = self.divergence()
        if reason:
            self.restore(init_state)
        self.keep()
        return Settled(self.last_good.copy(), self.memory.copy(), reason=reason, arm=arm)

    def copy_from(self, settled: Settled, just_restored: bool) -> None:
        """Start from a settled init state."""
        mujoco.mj_setState(self.scene.model, self.data, settled.physics, _PHYSICS)
        mujoco.mj_step1(self.scene.model, self.data)  # computes poses and contacts, and moves nothing
        self.last_good[:] = settled.physics
        self.memory.assign(settled.memory)
        self.arm = settled.arm or self.scene.arm
        self.just_restored = just_restored
        self.origin = self.facts.origin()
        self.memory.peak[:] = self.data.xpos[self.scene.goal.subject, 2]

    def robot_state(self) -> NDArray[np.float32]:
        """End-effector position (3, m), axis-angle (3, rad), gripper joints (2, m), as OpenVLA reads them."""
        w, *xyz = self.data.xquat[self.hand]
        w = min(1.0, max(-1.0, w))
        sine = np.sqrt(1.0 - w * w)
        axis_angle = np.zeros(3) if np.isclose(sine, 0.0) else np.array(xyz) * 2.0 * np.arccos(w) / sine
        parts = (self.data.site_xpos[self.scene.arm.site], axis_angle, self.data.qpos[7:9])
        return np.concatenate(parts).astype(np.float32)
