"""A scripted expert for pick-and-place, which reads poses from the simulator, as no policy may.

It reaches for an object, grasps, lifts, carries and releases it, and then takes the next one.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vla_envs.goals import IN_REGION
from vla_envs.scene import boxes_around
from vla_envs.tasks import SUITES, Task, get_task
from vla_envs.vector import LiberoVectorEnv

#: Ids of the tasks that the expert plays.
COVERED = {
    "LiberoObject": range(10),
    "LiberoSpatial": range(10),
    "LiberoGoal": (1, 2, 4, 6, 8, 9),
    "Libero10": (0, 7),
}
#: Control steps after which an attempt has failed; see ``limit``.
LIMITS = dict.fromkeys(SUITES, 200) | {"Libero10": 400}
REACH = 0.035  # m; how far below an object's top the fingertips get before the palm touches it
#: m along x, in LIBERO-Object: keeps the hand off a neighbour that it would hit.
SHIFTS = {"cream": -0.02, "tomato": -0.012, "bbq": -0.008}
WIDE = 0.09  # m; wider objects are bowls, which are grasped at the rim
RIM = 0.015  # m; how far inside the rim the hand comes down, so that it hits nothing beside the bowl
RIM_REACH = 0.012  # m; how far below the rim the fingertips get, to keep the palm above a drawer's sides
TURNS = {"wooden_cabinet": 1.12}  # rad about the vertical; puts the fingers along the drawer
TABLES = ("table_top", "living_room_table")  # how the sites on a table's surface are named
FLOOR = 0.012  # m above the table or floor; the fingertips stay above it
CARRY = 0.27  # m above the table or floor; height on the way to the goal
RELEASE = 0.22  # m; height of the fingertips over the basket when they open
GAIN = 1.0 / 0.05  # action per metre of error; full speed beyond 5 cm


class Delivery(NamedTuple):
    """How to bring an object to its goal."""

    hover: float  # m above the object before the descent
    close_steps: int  # control steps that the fingers take to hold
    over: float  # m from the goal, horizontally, where the descent begins
    open: float  # m above the release height where the fingers open
    held: tuple[int, ...]  # phases in which the object is held, so that a slipped grasp starts over


DROP = Delivery(0.12, 6, 0.03, 0.03, (3, 4))  # into a wide basket; the hand goes over its middle
PLACE = Delivery(0.06, 13, 0.01, 0.0, (3, 4, 5))  # onto its place; thin rims take longest to grip


def plays(task: Task) -> bool:
    """Whether the expert plays ``task``: of LIBERO's those tried, of one's own those that place things."""
    if task.problem is None:
        return task.task_id in COVERED.get(task.suite, ())
    return all(predicate in ("on", "in") for predicate, *_ in task.problem.goal)


def limit(task: Task) -> int:
    """Control steps after which an attempt at ``task`` has failed."""
    return LIMITS[task.suite] if task.problem is None else 200 * len(task.problem.goal)


def require_covered(suite: str, task_id: int) -> None:
    """Refuse a task that the expert does not play.

    Raises:
        ValueError: When the task does not exist or is not covered; names the tasks that are.
    """
    _require_played(get_task(suite, task_id))


def _require_played(task: Task) -> None:
    """Refuse a task that the expert does not play."""
    if plays(task):
        return
    if task.problem:
        raise ValueError(
            f"{task.name} is not pick-and-place; expected a goal of On and In, which the expert plays"
        )
    known = "; ".join(f"{suite} {', '.join(map(str, ids))}" for suite, ids in COVERED.items())
    raise ValueError(
        f"{task.suite} {task.task_id} ({task.name}) has no scripted expert; expected one of {known}"
    )


class ScriptedExpert:
    """Actions for the environments of a ``LiberoVectorEnv``.

    The phases are approach, descend, close, lift, carry, release and withdraw; each ends when the fingertips,
    or the object that they hold, have arrived. A grasp that has slipped starts over. When an object is in its
    place, the expert takes the next one that is not. With ``action_chunk`` C it tries the actions of C
    control steps one by one and undoes them, so that the same ones can be executed in a chunk.

    Args:
        envs: The environments.
        noise: Standard deviation of the Gaussian noise on the six motion actions. Demonstrations with noise
            show how to recover.
        seed: Seed of the noise.

    Raises:
        ValueError: When the expert does not play a task.
    """

    def __init__(self, envs: LiberoVectorEnv, noise: float = 0.0, seed: int = 0) -> None:
        for task in envs.tasks:
            _require_played(task)
        self.envs, self.noise = envs, noise
        self.rng = np.random.default_rng(seed)
        self.reset()

    def reset(self) -> None:
        """Start from the first phase; call it whenever the environments are reset."""
        self.phase = np.zeros(self.envs.num_envs, np.int64)
        self.waited = np.zeros(self.envs.num_envs, np.int64)
        self.predicate = np.zeros(self.envs.num_envs, np.int64)  # the predicate of the goal that is being met
        self.grounds = [self._ground(i) for i in range(self.envs.num_envs)]
        self.turns = [self._turn(i) for i in range(self.envs.num_envs)]
        self.offsets = [
            [self._grasp_offset(i, k) for k in range(len(simulation.scene.goal.kind))]
            for i, simulation in enumerate(self.envs.simulations)
        ]

    def _ground(self, i: int) -> float:
        """Height of the table, or of the floor where there is none (m)."""
        model, data = self.envs.simulations[i].scene.model, self.envs.simulations[i].data
        names = [model.site(k).name for k in range(model.nsite)]
        table = [k for k, name in enumerate(names) if name.startswith(TABLES)]
        return float(data.site_xpos[table[0], 2]) if table else 0.0

    def _turn(self, i: int) -> NDArray[np.float64]:
        """The hand's rotation about the vertical (3, 3), from a pose with fingers along y."""
        angle = sum(angle for words, angle in TURNS.items() if words in self.envs.tasks[i].name)
        sin, cos = np.sin(angle), np.cos(angle)
        return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])

    def _grasp_offset(self, i: int, k: int) -> NDArray[np.float64]:
        """From the origin of predicate k's object to where the fingers close (3, m).

        That is its middle or its rim, or as low as the fingers reach.
        """
        simulation = self.envs.simulations[i]
        model, data, goal = simulation.scene.model, simulation.data, simulation.scene.goal
        lows, highs = boxes_around(model, data, simulation.facts.solid[k])
        low, high = lows.min(axis=0), highs.max(axis=0)
        point, width = (low + high) / 2, high[1] - low[1]
        if self.envs.tasks[i].suite == "LiberoObject":
            point[0] += SHIFTS.get(model.body(goal.subject[k]).name.split("_")[0], 0.0)
        if width > WIDE:
            point += self.turns[i] @ [0.0, width / 2 - RIM, 0.0]
        reach = RIM_REACH if width > WIDE else REACH
        point[2] = max(point[2], high[2] - reach, self.grounds[i] + FLOOR)
        return point - data.xpos[goal.subject[k]]

    def _intended(self, i: int) -> NDArray[np.float64]:
        """The action (7,) of environment i, without noise."""
        simulation = self.envs.simulations[i]
        data, goal, arm = simulation.data, simulation.scene.goal, simulation.scene.arm
        met = simulation.facts.met
        if self.phase[i] == 0 and not met.all():
            self.predicate[i] = np.flatnonzero(~met)[0]
        k = self.predicate[i]
        hand, subject = data.site_xpos[arm.site], data.xpos[goal.subject[k]]
        grasp = subject + self.offsets[i][k]
        x, y, z = simulation.facts.goal_position(k)
        carry = self.grounds[i] + CARRY
        # What is steered to the goal, and the height at which that ends.
        if goal.kind[k] == IN_REGION:
            delivery, steered, release = DROP, hand, RELEASE
        else:
            delivery, steered, release = PLACE, subject, z

        if met[k] and self.phase[i] in (1, 2, 5):
            self.phase[i] = 6
        if self.phase[i] in delivery.held and np.linalg.norm(grasp - hand) >= 0.05:
            self.phase[i] = 0  # the object has slipped
        above = grasp + np.array([0.0, 0.0, delivery.hover])
        if met.any() and np.linalg.norm((above - hand)[:2]) > 0.1:
            above[2] = carry  # above the object that was placed last
        error = [
            above - hand,
            grasp - hand,
            grasp - hand,
            np.array([0.0, 0.0, carry - steered[2]]),
            np.array([x, y, carry]) - steered,
            np.array([x, y, release]) - steered,
            np.array([0.0, 0.0, carry - hand[2]]),
        ][self.phase[i]]
        arrived = [
            np.linalg.norm(error[:2]) < 0.015,
            np.linalg.norm(error) < 0.012,
            self.waited[i] >= delivery.close_steps,
            error[2] < 0.03,
            np.linalg.norm(error[:2]) < delivery.over,
            False,
            error[2] < 0.03,
        ][self.phase[i]]
        action = np.zeros(7)
        action[:3] = np.clip(error * GAIN, -1.0, 1.0)
        # Keep the fingers pointing down, as after the arm's reset.
        rotation, upright = data.site_xmat[arm.site].reshape(3, 3), self.turns[i] @ arm.reset_rotation
        action[3:6] = np.clip(np.cross(rotation, upright, axis=0).sum(axis=1), -1.0, 1.0)
        action[6] = 1.0 if self.phase[i] in (2, 3, 4) else -1.0
        if self.phase[i] == 5 and error[2] < -delivery.open:
            action[6] = 1.0
        self.waited[i] = self.waited[i] + 1 if self.phase[i] == 2 else 0
        if arrived:
            self.phase[i] = (self.phase[i] + 1) % 7
        return action

    def _chunk(self, i: int, noise: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Actions (C, 7) of environment i with noise (C, 6), and the intended ones, for C control steps."""
        simulation = self.envs.simulations[i]
        actions, intended = np.zeros((len(noise), 7)), np.zeros((len(noise), 7))
        with simulation.trial() if len(noise) > 1 else contextlib.nullcontext():
            for step in range(len(noise)):
                intended[step] = actions[step] = self._intended(i)
                actions[step, :6] += noise[step]
                actions[step] = np.clip(actions[step], -1.0, 1.0)
                if len(noise) > 1:
                    simulation.execute(actions[step : step + 1])
        return actions, intended

    def __call__(self, which: Sequence[int] | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The actions to execute ``(N, 7)``, and the intended ones, which lack the noise.

        Of environments with ``action_chunk`` C they are ``(N, C, 7)``.

        Args:
            which: The environments to act in, N of them [all].
        """
        which = range(self.envs.num_envs) if which is None else which
        noise = self.noise * self.rng.standard_normal((len(which), self.envs.action_chunk, 6))
        actions, intended = map(np.stack, zip(*(self._chunk(i, its) for i, its in zip(which, noise))))
        return (actions[:, 0], intended[:, 0]) if self.envs.action_chunk == 1 else (actions, intended)
