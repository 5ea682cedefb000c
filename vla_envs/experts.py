"""A scripted expert for pick-and-place: reach, grasp, lift, carry, release, and then the next object.

It plays all of LIBERO-Object and LIBERO-Spatial; of LIBERO-Goal the tasks that put one thing somewhere: the
bowl on the stove (1), on the cabinet (4) and on the plate (8), the wine bottle on the cabinet (2) and on the
rack (9), the cream cheese in the bowl (6); and of LIBERO-10 those that put two things in the basket (0, 7).
It reads poses from the simulator, which no policy may, and serves to make demonstrations:

    python -m vla_envs.experts --task-ids 4 --episodes 8 --out demos --videos
    python -m vla_envs.experts --suite LiberoSpatial --task-ids 3 --episodes 8 --out demos

The first writes ``demos/LiberoObject_4_demo.hdf5`` and a film of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import imageio.v2 as imageio
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vla_envs.command_line import check_numbers, one_line_errors, parse_args
from vla_envs.demonstrations import OBS_BEFORE_ACTION
from vla_envs.files import whole
from vla_envs.goals import IN_REGION, ON_OBJECT, predicates_met
from vla_envs.tasks import get_task
from vla_envs.vector import LiberoVectorEnv

#: Ids of the tasks that the expert plays.
COVERED = {
    "LiberoObject": range(10),
    "LiberoSpatial": range(10),
    "LiberoGoal": (1, 2, 4, 6, 8, 9),
    "Libero10": (0, 7),
}
LIMITS = {"Libero10": 400}  # control steps after which an attempt has failed; of other suites 200
REACH = 0.035  # m, how far below an object's top the fingertips get before the palm touches it
SHIFTS = {
    "cream": -0.02,
    "tomato": -0.012,
    "bbq": -0.008,
}  # m along x, in LIBERO-Object: clear of a neighbour that the hand would hit
WIDE = 0.09  # m; what is wider, a bowl, is grasped at its rim
RIM = 0.015  # m, how far inside the rim the hand comes down, which keeps it off what stands beside the bowl
RIM_REACH = 0.012  # m, how far below the rim the fingertips get: the palm stays above a drawer's sides
TURNS = {"wooden_cabinet": 1.12}  # rad about the vertical: fingers along the drawer, on the robot's side
TABLES = ("table_top", "living_room_table")  # how the sites on a table's surface are named
FLOOR = 0.012  # m above the table or floor, lowest that the fingertips go
CARRY = 0.27  # m above the table or floor, on the way to the goal
RELEASE = 0.22  # m, height of the fingertips over the basket when they open
GAIN = 1.0 / 0.05  # action per metre of error: full speed beyond 5 cm


class Manner(NamedTuple):
    """How to bring an object to its goal."""

    hover: float  # m above the object before the descent
    close_steps: int  # control steps that the fingers take to hold
    over: float  # m, horizontally, from above the goal when the descent begins
    open: float  # m above the release height, where the fingers open
    held: tuple[int, ...]  # phases in which a grasp that has slipped starts over


DROP = Manner(0.12, 6, 0.03, 0.03, (3, 4))  # into a basket, which is wide: the hand goes over its middle
PLACE = Manner(0.06, 13, 0.01, 0.0, (3, 4, 5))  # the object goes on its place; thin rims take longest


def check_covered(suite: str, task_id: int) -> None:
    """Refuse a task that the expert does not play.

    Raises:
        ValueError: When the task does not exist or is not covered; names those that are.
    """
    name = get_task(suite, task_id).name
    if task_id not in COVERED.get(suite, ()):
        known = "; ".join(f"{suite} {', '.join(map(str, ids))}" for suite, ids in COVERED.items())
        raise ValueError(f"{suite} {task_id} ({name}) has no scripted expert; expected one of {known}")


class ScriptedExpert:
    """Actions for every environment of a ``LiberoVectorEnv`` with ``action_chunk=1``.

    The phases are approach, descend, close, lift, carry, release and withdraw; each ends when the fingertips,
    or the object they hold, have arrived. A grasp that has slipped starts over. When an object is in its
    place, the next one that is not follows.

    Args:
        envs: The environments.
        noise: Standard deviation of the gaussian noise on the six motion actions; demonstrations with
            noise show how to come back.
        seed: Of the noise.
    """

    def __init__(self, envs: LiberoVectorEnv, noise: float = 0.0, seed: int = 0) -> None:
        if envs.action_chunk != 1:
            raise ValueError(
                f"the expert acts every control step; expected action_chunk=1, got {envs.action_chunk}"
            )
        for task in envs.tasks:
            check_covered(task.suite, task.task_id)
        self.envs, self.noise = envs, noise
        self.rng = np.random.default_rng(seed)
        self.reset()

    def reset(self) -> None:
        """Forget the phases; call it with the environments' reset."""
        self.phase = np.zeros(self.envs.num_envs, np.int64)
        self.waited = np.zeros(self.envs.num_envs, np.int64)
        self.predicate = np.zeros(self.envs.num_envs, np.int64)  # of the goal, which is being met
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
        """The hand's rotation about the vertical (3, 3), from square to the world with fingers along y."""
        angle = sum(angle for words, angle in TURNS.items() if words in self.envs.tasks[i].name)
        sin, cos = np.sin(angle), np.cos(angle)
        return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])

    def _grasp_offset(self, i: int, k: int) -> NDArray[np.float64]:
        """From the origin of predicate k's object to where the fingers close (3, m): its middle or its rim,
        or as low as they reach."""
        simulation = self.envs.simulations[i]
        model, data, goal = simulation.scene.model, simulation.data, simulation.scene.goal
        boxes = simulation.facts.solid[k]
        extent = np.einsum(
            "gij,gj->gi", np.abs(data.geom_xmat[boxes].reshape(-1, 3, 3)), model.geom_size[boxes]
        )
        low, high = (data.geom_xpos[boxes] - extent).min(axis=0), (data.geom_xpos[boxes] + extent).max(axis=0)
        point, width = (low + high) / 2, high[1] - low[1]
        if self.envs.tasks[i].suite == "LiberoObject":
            point[0] += SHIFTS.get(model.body(goal.subject[k]).name.split("_")[0], 0.0)
        if width > WIDE:
            point += self.turns[i] @ [0.0, width / 2 - RIM, 0.0]
        reach = RIM_REACH if width > WIDE else REACH
        point[2] = max(point[2], high[2] - reach, self.grounds[i] + FLOOR)
        return point - data.xpos[goal.subject[k]]

    def _intended(self, i: int) -> NDArray[np.float64]:
        simulation = self.envs.simulations[i]
        data, goal, arm = simulation.data, simulation.scene.goal, simulation.scene.arm
        met = predicates_met(goal, data)
        if self.phase[i] == 0 and not met.all():
            self.predicate[i] = np.flatnonzero(~met)[0]
        k = self.predicate[i]
        hand, subject = data.site_xpos[arm.site], data.xpos[goal.subject[k]]
        grasp = subject + self.offsets[i][k]
        x, y, z = (data.xpos if goal.kind[k] == ON_OBJECT else data.site_xpos)[goal.target[k]]
        carry = self.grounds[i] + CARRY
        # What is steered to the goal, and the height at which that ends.
        if goal.kind[k] == IN_REGION:
            manner, steered, release = DROP, hand, RELEASE
        else:
            manner, steered, release = PLACE, subject, z

        if met[k] and self.phase[i] in (1, 2, 5):
            self.phase[i] = 6
        if self.phase[i] in manner.held and np.linalg.norm(grasp - hand) >= 0.05:
            self.phase[i] = 0  # lost it
        above = grasp + np.array([0.0, 0.0, manner.hover])
        if met.any() and np.linalg.norm((above - hand)[:2]) > 0.1:
            above[2] = carry  # clear of where the last object lies
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
            self.waited[i] >= manner.close_steps,
            error[2] < 0.03,
            np.linalg.norm(error[:2]) < manner.over,
            False,
            error[2] < 0.03,
        ][self.phase[i]]
        action = np.zeros(7)
        action[:3] = np.clip(error * GAIN, -1.0, 1.0)
        # Keep the fingers pointing down, as they were when the arm was reset.
        rotation, upright = data.site_xmat[arm.site].reshape(3, 3), self.turns[i] @ arm.reset_rotation
        action[3:6] = np.clip(np.cross(rotation, upright, axis=0).sum(axis=1), -1.0, 1.0)
        action[6] = 1.0 if self.phase[i] in (2, 3, 4) else -1.0
        if self.phase[i] == 5 and error[2] < -manner.open:
            action[6] = 1.0
        self.waited[i] = self.waited[i] + 1 if self.phase[i] == 2 else 0
        if arrived:
            self.phase[i] = (self.phase[i] + 1) % 7
        return action

    def __call__(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The actions to execute ``(N, 7)``, and those intended, without the noise."""
        intended = np.stack([self._intended(i) for i in range(self.envs.num_envs)])
        actions = intended.copy()
        actions[:, :6] += self.noise * self.rng.standard_normal((self.envs.num_envs, 6))
        return np.clip(actions, -1.0, 1.0), intended


def record(envs: LiberoVectorEnv, seeds: list[int], noise: float) -> list[dict[str, NDArray[Any]]]:
    """One episode an environment, from the training placements of ``seeds``; the successful ones.

    Each is a dict of arrays over the T control steps: ``image (T, H, W, 3)``, ``state (T, 8)``,
    ``actions (T, 7)`` as executed, ``expert_actions (T, 7)`` as intended; and the placement's ``seed ()``.
    """
    obs, _ = envs.reset(seed=seeds)
    expert = ScriptedExpert(envs, noise, seed=seeds[0])
    steps: list[tuple[NDArray[Any], ...]] = []
    while not envs.frozen.all():
        alive = ~envs.frozen
        actions, intended = expert()
        steps.append((alive, obs["image"], obs["state"], actions, intended))
        obs, _, terminated, _, _ = envs.step(actions)
    episodes = []
    for i in np.flatnonzero(terminated):
        rows = [step for step in steps if step[0][i]]
        names = ("image", "state", "actions", "expert_actions")
        episodes.append({name: np.stack([row[k + 1][i] for row in rows]) for k, name in enumerate(names)})
        episodes[-1]["seed"] = np.asarray(seeds[i])
    return episodes


def write_hdf5(path: Path, envs: LiberoVectorEnv, episodes: list[dict[str, NDArray[Any]]]) -> None:
    """Write demonstrations in the layout of LIBERO's data sets (``libero/lifelong/datasets.py`` reads it).

    Pictures are stored as LIBERO stores them: turned by 180 degrees from what the environments return.
    ``expert_actions`` is our addition: the actions without noise, which are what to imitate; and ``seed``,
    which with ``actions`` replays the episode. Observations come before their actions, which an attribute of
    ``data`` says: in LIBERO's own files they come after.
    """
    with whole(path) as partial, h5py.File(partial, "w") as file:
        data = file.create_group("data")
        task = envs.tasks[0]
        data.attrs["problem_info"] = json.dumps({"language_instruction": task.instruction})
        data.attrs["bddl_file_name"] = task.bddl_file.name
        data.attrs[OBS_BEFORE_ACTION] = True
        data.attrs["num_demos"] = len(episodes)
        data.attrs["total"] = sum(len(episode["actions"]) for episode in episodes)
        for k, episode in enumerate(episodes):
            demo = data.create_group(f"demo_{k}")
            demo.attrs["num_samples"] = length = len(episode["actions"])
            demo.attrs["seed"] = int(episode["seed"])
            demo["actions"], demo["expert_actions"] = episode["actions"], episode["expert_actions"]
            demo["dones"] = demo["rewards"] = (np.arange(length) == length - 1).astype(np.uint8)
            pictures = episode["image"][:, ::-1, ::-1]
            demo.create_dataset(
                "obs/agentview_rgb", data=pictures, chunks=(1, *pictures.shape[1:]), compression="lzf"
            )
            state = episode["state"]
            demo["obs/ee_states"] = state[:, :6]
            demo["obs/ee_pos"], demo["obs/ee_ori"], demo["obs/gripper_states"] = np.split(
                state, [3, 6], axis=1
            )


@dataclass
class Args:
    """Record demonstrations of the scripted expert in the layout of LIBERO's HDF5 data sets."""

    out: Path = Path("demos")
    """Folder for <suite>_<task id>_demo.hdf5"""
    suite: str = "LiberoObject"
    """LIBERO suite"""
    task_ids: tuple[int, ...] = ()
    """Tasks of the suite, from 0; none means all that the expert plays"""
    assets: str = "builtin"
    """builtin, libero (LIBERO's own: the folder in LIBERO_ASSETS, else downloaded) or a folder"""
    episodes: int = 8
    """Successful demonstrations a task"""
    noise: float = 0.3
    """Standard deviation of the noise on executed motions (full speed is 1); labels stay without it"""
    seed: int = 0
    """Seed of the first placement; the others follow it"""
    image_size: int = 128
    """Height and width of the pictures, pixels"""
    videos: bool = False
    """Also write <suite>_<task id>.mp4 of the first demonstrations"""


def main(args: Args) -> None:
    """Record what ``args`` says, task by task."""
    check_numbers(args, "episodes image_size", above=True)
    check_numbers(args, "noise seed", above=False)
    task_ids = args.task_ids or COVERED.get(args.suite, (0,))
    for task_id in task_ids:
        check_covered(args.suite, task_id)
    for task_id in tqdm(task_ids, desc="demonstrations", unit="task"):
        envs = LiberoVectorEnv(
            min(args.episodes, 16), args.suite, task_id, image_size=args.image_size, assets=args.assets,
            max_episode_steps=LIMITS.get(args.suite, 200),
        )  # fmt: skip
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"folder {str(args.out)!r} cannot be made: {error.strerror}") from None
        episodes: list[dict[str, NDArray[Any]]] = []
        seed = args.seed
        while len(episodes) < args.episodes:
            if seed > args.seed + 20 * args.episodes + 100:
                raise RuntimeError(
                    f"the expert succeeds too seldom at task {task_id} with noise {args.noise}"
                )
            episodes += record(envs, list(range(seed, seed + envs.num_envs)), args.noise)
            seed += envs.num_envs
        episodes = episodes[: args.episodes]
        write_hdf5(args.out / f"{args.suite}_{task_id}_demo.hdf5", envs, episodes)
        if args.videos:
            frames = np.concatenate([episode["image"] for episode in episodes[:4]])
            with whole(args.out / f"{args.suite}_{task_id}.mp4") as partial:
                imageio.mimwrite(partial, list(frames), fps=20, macro_block_size=8)
        envs.close()


if __name__ == "__main__":
    arguments = parse_args(Args)
    with one_line_errors():
        main(arguments)
