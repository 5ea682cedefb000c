"""A scripted expert for LIBERO-Object: reach, grasp, lift, carry, release.

It reads poses from the simulator, which no policy may, and serves to make demonstrations:

    python -m vla_envs.experts --task-ids 4 --episodes 8 --out demos

writes ``demos/LiberoObject_4.npz`` and, with ``--videos``, a film of each task.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import imageio.v2 as imageio
import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from vla_envs.tasks import num_tasks
from vla_envs.vector import LiberoVectorEnv

REACH = 0.035  # m, how far below an object's top the fingertips get before the palm touches it
SHIFTS = {"cream": -0.02, "tomato": -0.012, "bbq": -0.008}  # m along x: clear of a neighbour that the hand would hit
FLOOR = 0.012  # m, lowest that the fingertips go
HOVER = 0.12  # m above the object before the descent
CARRY = 0.27  # m, height of the fingertips on the way to the basket
RELEASE = 0.22  # m, height of the fingertips over the basket when they open
GAIN = 1.0 / 0.05  # action per metre of error: full speed beyond 5 cm
CLOSE_STEPS = 6  # control steps that the fingers take to hold


class ScriptedExpert:
    """Actions for every environment of a ``LiberoVectorEnv`` with ``action_chunk=1``.

    The phases are approach, descend, close, lift, carry and release; each ends when the fingertips have
    arrived. A grasp that has slipped starts over.

    Args:
        envs: The environments.
        noise: Standard deviation of the gaussian noise on the six motion actions; demonstrations with
            noise show how to come back.
        seed: Of the noise.
    """

    def __init__(self, envs: LiberoVectorEnv, noise: float = 0.0, seed: int = 0) -> None:
        if envs.action_chunk != 1:
            raise ValueError(f"the expert acts every control step; expected action_chunk=1, got {envs.action_chunk}")
        self.envs, self.noise = envs, noise
        self.rng = np.random.default_rng(seed)
        self.reset()

    def reset(self) -> None:
        """Forget the phases; call it with the environments' reset."""
        self.phase = np.zeros(self.envs.num_envs, np.int64)
        self.waited = np.zeros(self.envs.num_envs, np.int64)
        self.offsets = np.stack([self._grasp_offset(i) for i in range(self.envs.num_envs)])

    def _grasp_offset(self, i: int) -> NDArray[np.float64]:
        """From the object's origin to where the fingertips close (3, m): its middle, or as low as they reach."""
        simulation = self.envs.simulations[i]
        model, data = simulation.scene.model, simulation.data
        boxes = simulation.facts.is_object & (model.geom_group == 0)
        reach = np.einsum("gij,gj->gi", np.abs(data.geom_xmat[boxes].reshape(-1, 3, 3)), model.geom_size[boxes])
        low, high = (data.geom_xpos[boxes] - reach).min(axis=0), (data.geom_xpos[boxes] + reach).max(axis=0)
        point = (low + high) / 2
        point[0] += SHIFTS.get(self.envs.tasks[i].name.split("_")[3], 0.0)
        point[2] = max(point[2], high[2] - REACH, FLOOR)
        return point - data.xpos[simulation.scene.goal.object_body]

    def _intended(self, i: int) -> NDArray[np.float64]:
        simulation = self.envs.simulations[i]
        data, goal = simulation.data, simulation.scene.goal
        hand = data.site_xpos[simulation.scene.arm.site]
        grasp = data.xpos[goal.object_body] + self.offsets[i]
        basket = data.site_xpos[goal.region_site]
        near = np.linalg.norm(grasp - hand) < 0.05

        if self.phase[i] in (3, 4) and not near:
            self.phase[i] = 0  # lost it
        targets = [
            grasp + [0.0, 0.0, HOVER],
            grasp,
            grasp,
            np.array([hand[0], hand[1], CARRY]),
            np.array([basket[0], basket[1], CARRY]),
            np.array([basket[0], basket[1], RELEASE]),
        ]
        error = targets[self.phase[i]] - hand
        arrived = [
            np.linalg.norm(error[:2]) < 0.015,
            np.linalg.norm(error) < 0.012,
            self.waited[i] >= CLOSE_STEPS,
            error[2] < 0.03,
            np.linalg.norm(error[:2]) < 0.03,
            False,
        ][self.phase[i]]
        action = np.zeros(7)
        action[:3] = np.clip(error * GAIN, -1.0, 1.0)
        # Keep the fingers pointing down and square to the world, as they were when the arm was reset.
        rotation = data.site_xmat[simulation.scene.arm.site].reshape(3, 3)
        action[3:6] = np.clip(np.cross(rotation, simulation.scene.arm.reset_rotation, axis=0).sum(axis=1), -1.0, 1.0)
        action[6] = 1.0 if self.phase[i] in (2, 3, 4) else -1.0
        if self.phase[i] == 5 and error[2] < -0.03:
            action[6] = 1.0
        self.waited[i] = self.waited[i] + 1 if self.phase[i] == 2 else 0
        if arrived:
            self.phase[i] += 1
        return action

    def __call__(self) -> NDArray[np.float64]:
        """The next actions ``(N, 7)``."""
        actions = np.stack([self._intended(i) for i in range(self.envs.num_envs)])
        actions[:, :6] += self.noise * self.rng.standard_normal((self.envs.num_envs, 6))
        return np.clip(actions, -1.0, 1.0)
