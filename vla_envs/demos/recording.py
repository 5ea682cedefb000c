"""Recording demonstrations of the scripted expert: what ``python -m vla_envs.experts`` does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vla_envs.command_line import check_numbers
from vla_envs.demos.expert import ScriptedExpert, limit, plays, require_covered
from vla_envs.demos.hdf5 import write_hdf5
from vla_envs.files import whole
from vla_envs.tasks import get_task, num_tasks, suite_or_file
from vla_envs.vector import LiberoVectorEnv


def record(envs: LiberoVectorEnv, seeds: list[int], noise: float) -> list[dict[str, NDArray[Any]]]:
    """Play one episode per environment, with the training placements of ``seeds``; return those that succeed.

    Each is a dict of arrays over the T control steps: images ``(T, H, W, 3)``, ``state (T, 8)``,
    ``actions (T, 7)`` as executed and ``expert_actions (T, 7)`` as intended; and the placement's ``seed ()``.
    """
    obs, _ = envs.reset(seed=seeds)
    expert = ScriptedExpert(envs, noise, seed=seeds[0])
    steps: list[tuple[NDArray[Any], ...]] = []
    while not envs.frozen.all():
        alive = ~envs.frozen
        actions, intended = expert()
        steps.append((alive, *obs.values(), actions, intended))
        obs, _, terminated, _, _ = envs.step(actions)
    episodes = []
    for i in np.flatnonzero(terminated):
        rows = [step for step in steps if step[0][i]]
        names = (*obs, "actions", "expert_actions")
        episodes.append({name: np.stack([row[k + 1][i] for row in rows]) for k, name in enumerate(names)})
        episodes[-1]["seed"] = np.asarray(seeds[i])
    return episodes


@dataclass
class Args:
    """Record demonstrations of the scripted expert in the layout of LIBERO's HDF5 data sets."""

    out: Path = Path("demos")
    """Folder for <suite>_<task id>_demo.hdf5"""
    suite: str = "LiberoObject"
    """LIBERO suite, or a folder of BDDL files"""
    task_ids: tuple[int, ...] = ()
    """Tasks of the suite, from 0; by default all that the expert plays"""
    bddl_file: Path | None = None
    """A task of one's own, instead of --suite and --task-ids"""
    assets: str = "builtin"
    """builtin, libero (LIBERO's own: LIBERO_ASSETS, else wheels, else downloaded) or a folder"""
    episodes: int = 8
    """Successful demonstrations per task"""
    noise: float = 0.3
    """Standard deviation of the noise on executed motions (full speed is 1); labels have no noise"""
    seed: int = 0
    """Seed of the first placement; the next ones count up from it"""
    image_size: int = 128
    """Height and width of the images, in pixels"""
    wrist_camera: bool = False
    """Also record the images of the camera at the wrist, which smolvla and pi0 are shown"""
    videos: bool = False
    """Also write <suite>_<task id>.mp4, a video of the first demonstrations"""


def main(args: Args) -> None:
    """Record the demonstrations that ``args`` asks for, task by task."""
    check_numbers(args, "episodes", "image_size", above=True)
    check_numbers(args, "noise", "seed", above=False)
    suite = suite_or_file(args.suite, args.bddl_file, task_ids=args.task_ids)
    tasks = [get_task(suite, k) for k in args.task_ids or range(num_tasks(suite))]
    tasks = tasks if args.task_ids or args.bddl_file else [task for task in tasks if plays(task)] or tasks[:1]
    for task in tasks:
        require_covered(task.suite, task.task_id)
    for task in tqdm(tasks, desc="demonstrations", unit="task"):
        envs = LiberoVectorEnv(
            min(args.episodes, 16), suite, task.task_id, image_size=args.image_size, assets=args.assets,
            max_episode_steps=limit(task), wrist_camera=args.wrist_camera,
        )  # fmt: skip
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"folder {str(args.out)!r} cannot be created: {error.strerror}") from None
        episodes: list[dict[str, NDArray[Any]]] = []
        seed = args.seed
        while len(episodes) < args.episodes:
            if seed > args.seed + 20 * args.episodes + 100:
                raise RuntimeError(f"the expert succeeds too rarely at {task.label} with noise {args.noise}")
            episodes += record(envs, list(range(seed, seed + envs.num_envs)), args.noise)
            seed += envs.num_envs
        episodes = episodes[: args.episodes]
        write_hdf5(args.out / f"{task.label}_demo.hdf5", task, episodes)
        if args.videos:
            frames = np.concatenate([episode["image"] for episode in episodes[:4]])
            with whole(args.out / f"{task.label}.mp4") as partial:
                imageio.mimwrite(partial, list(frames), fps=20, macro_block_size=8)
        envs.close()
