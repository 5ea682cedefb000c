"""A scripted expert for LIBERO-Object: reach, grasp, lift, carry, release.

It reads poses from the simulator, which no policy may, and serves to make demonstrations:

    python -m vla_envs.experts --task-ids 4 --episodes 8 --out demos --videos

writes ``demos/LiberoObject_4_demo.hdf5`` and a film of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import imageio.v2 as imageio
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vla_envs.runs import one_line_errors, parse_args
from vla_envs.tasks import num_tasks
from vla_envs.vector import LiberoVectorEnv

REACH = 0.035  # m, how far below an object's top the fingertips get before the palm touches it
SHIFTS = {
    "cream": -0.02,
    "tomato": -0.012,
    "bbq": -0.008,
}  # m along x: clear of a neighbour that the hand would hit
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
            raise ValueError(
                f"the expert acts every control step; expected action_chunk=1, got {envs.action_chunk}"
            )
        self.envs, self.noise = envs, noise
        self.rng = np.random.default_rng(seed)
        self.reset()

    def reset(self) -> None:
        """Forget the phases; call it with the environments' reset."""
        self.phase = np.zeros(self.envs.num_envs, np.int64)
        self.waited = np.zeros(self.envs.num_envs, np.int64)
        self.offsets = np.stack([self._grasp_offset(i) for i in range(self.envs.num_envs)])

    def _grasp_offset(self, i: int) -> NDArray[np.float64]:
        """From the object's origin to where the fingers close (3, m): its middle, or as low as they reach."""
        simulation = self.envs.simulations[i]
        model, data = simulation.scene.model, simulation.data
        boxes = simulation.facts.solid[0]
        reach = np.einsum(
            "gij,gj->gi", np.abs(data.geom_xmat[boxes].reshape(-1, 3, 3)), model.geom_size[boxes]
        )
        low, high = (data.geom_xpos[boxes] - reach).min(axis=0), (data.geom_xpos[boxes] + reach).max(axis=0)
        point = (low + high) / 2
        point[0] += SHIFTS.get(self.envs.tasks[i].name.split("_")[3], 0.0)
        point[2] = max(point[2], high[2] - REACH, FLOOR)
        return point - data.xpos[simulation.scene.goal.subject[0]]

    def _intended(self, i: int) -> NDArray[np.float64]:
        simulation = self.envs.simulations[i]
        data, goal = simulation.data, simulation.scene.goal
        hand = data.site_xpos[simulation.scene.arm.site]
        grasp = data.xpos[goal.subject[0]] + self.offsets[i]
        basket = data.site_xpos[goal.target[0]]
        near = np.linalg.norm(grasp - hand) < 0.05

        if self.phase[i] in (3, 4) and not near:
            self.phase[i] = 0  # lost it
        targets = [
            grasp + np.array([0.0, 0.0, HOVER]),
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
        action[3:6] = np.clip(
            np.cross(rotation, simulation.scene.arm.reset_rotation, axis=0).sum(axis=1), -1.0, 1.0
        )
        action[6] = 1.0 if self.phase[i] in (2, 3, 4) else -1.0
        if self.phase[i] == 5 and error[2] < -0.03:
            action[6] = 1.0
        self.waited[i] = self.waited[i] + 1 if self.phase[i] == 2 else 0
        if arrived:
            self.phase[i] += 1
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
    which with ``actions`` replays the episode.
    """
    partial = path.with_suffix(".partial")
    with h5py.File(partial, "w") as file:
        data = file.create_group("data")
        task = envs.tasks[0]
        data.attrs["problem_info"] = json.dumps({"language_instruction": task.instruction})
        data.attrs["bddl_file_name"] = task.bddl_file.name
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
    partial.replace(path)


@dataclass
class Args:
    """Record demonstrations of the scripted expert in the layout of LIBERO's HDF5 data sets."""

    out: Path = Path("demos")
    """Folder for <suite>_<task id>_demo.hdf5"""
    suite: str = "LiberoObject"
    """LIBERO suite"""
    task_ids: tuple[int, ...] = ()
    """Tasks of the suite, from 0; none means all"""
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
    task_ids = args.task_ids or tuple(range(num_tasks(args.suite)))
    args.out.mkdir(parents=True, exist_ok=True)
    for task_id in tqdm(task_ids, desc="demonstrations", unit="task"):
        envs = LiberoVectorEnv(min(args.episodes, 16), args.suite, task_id, image_size=args.image_size)
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
            imageio.mimwrite(
                args.out / f"{args.suite}_{task_id}.mp4", list(frames), fps=20, macro_block_size=8
            )
        envs.close()


if __name__ == "__main__":
    arguments = parse_args(Args)
    with one_line_errors():
        main(arguments)
