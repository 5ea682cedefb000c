"""SFT: behaviour cloning of demonstrations, which makes the starting checkpoints of online RL.

The loss is the cross-entropy of the demonstrated tokens, -1/B sum_b 1/D sum_d log pi(token_bd | obs_b).
A sample is one control step of a demonstration with the C actions that follow it (the last one repeated
past the end). Demonstrations are read in the layout of LIBERO's HDF5 data sets, as ``vla_envs.experts``
writes them; where ``expert_actions`` is there (the expert's actions without its noise), it is imitated.

    python -m vla_envs.experts --out demos
    python sft_vla.py --demos demos
    python sft_vla.py --demos demos --task-ids 4 --episodes 24
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import vla_envs  # noqa: F401  (registers the environments)
from vla_envs.policies import count_parameters, load_policy, new_policy, save_policy
from vla_envs.runs import check_numbers, make_run_folder, one_line_errors, parse_args, success, write_json


@dataclass
class Args:
    # ---- Experiment ----
    seed: int = 1
    """Seed of the initial weights and the minibatches"""
    run_dir: Path | None = None
    """Folder of this run [runs/<suite>_<first task id>__sft_vla__<seed>__<time>]"""
    eval_episodes: int = 50
    """Episodes a task of the evaluation after training: recorded init states 0, 1, ...; 0 leaves it out"""
    eval_temperature: float = 1.2
    """Sampling temperature of the evaluation; 0 is greedy"""
    num_threads: int | None = None
    """Simulator threads [one per core]"""

    # ---- Environment ----
    suite: str = "LiberoObject"
    """LIBERO suite"""
    task_ids: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    """Tasks to learn, from 0, by one policy"""
    max_episode_steps: int = 200
    """Control steps until an evaluation episode ends without success"""

    # ---- Policy ----
    policy: str = "nano"
    """Kind of policy"""
    checkpoint: Path | None = None
    """Folder of a checkpoint to start from [random weights]"""

    # ---- Algorithm ----
    demos: Path = Path("demos")
    """Folder with <suite>_<task id>_demo.hdf5"""
    episodes: tuple[int, ...] = (8,)
    """Demonstrations a task: one number for all, or one for each of --task-ids"""
    num_steps: int = 3000
    """Optimiser steps"""
    batch_size: int = 64
    """Samples a step"""
    learning_rate: float = 1e-3
    """AdamW's greatest learning rate, of a one-cycle schedule"""
    weight_decay: float = 0.01
    """AdamW's weight decay"""
    max_grad_norm: float = 1.0
    """The gradient is clipped at this norm"""


def load_demonstrations(path: Path, episodes: int, chunk: int) -> dict[str, Any]:
    """All samples of a file: image (S, H, W, 3), state (S, 8), actions (S, C, 7), and the instruction.

    Raises:
        ValueError: When the file is missing, is not in LIBERO's layout, or has fewer demonstrations.
    """
    if not path.is_file():
        raise ValueError(
            f"no demonstrations at {str(path)!r}; make them: python -m vla_envs.experts --out {path.parent}"
        )
    parts: dict[str, list[np.ndarray]] = {"image": [], "state": [], "actions": []}
    if not h5py.is_hdf5(path):
        raise ValueError(f"{str(path)!r} is no HDF5 file")
    with h5py.File(path) as file:
        if "data" not in file or "problem_info" not in file["data"].attrs:
            raise ValueError(
                f"{str(path)!r} is not in the layout of LIBERO's data sets: it has no data/problem_info"
            )
        data = file["data"]
        instruction = json.loads(data.attrs["problem_info"])["language_instruction"]
        if len(data) < episodes:
            raise ValueError(f"{str(path)!r} holds {len(data)} demonstrations; expected at least {episodes}")
        for k in range(episodes):
            demo = data[f"demo_{k}"]
            needed = ("actions", "obs/agentview_rgb", "obs/ee_states", "obs/gripper_states")
            missing = [name for name in needed if name not in demo]
            if missing:
                raise ValueError(f"{str(path)!r} is not in LIBERO's layout: demo_{k} has no {missing[0]}")
            actions = demo["expert_actions" if "expert_actions" in demo else "actions"][:]  # (T, 7)
            following = np.minimum(
                np.arange(len(actions))[:, None] + np.arange(chunk), len(actions) - 1
            )  # (T, C)
            parts["actions"].append(actions[following])
            parts["image"].append(demo["obs/agentview_rgb"][:][:, ::-1, ::-1])  # stored turned by 180 degrees
            parts["state"].append(np.hstack([demo["obs/ee_states"][:], demo["obs/gripper_states"][:]]))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()} | {"instruction": instruction}


def evaluate(envs: Any, policy: Any, episodes: int, temperature: float) -> dict[str, Any]:
    """Success on recorded init states 0 to ``episodes`` - 1, with its Wilson interval (95 %)."""
    obs, _ = envs.reset(options={"init_state_id": list(range(episodes))})
    while not envs.unwrapped.frozen.all():
        acting = np.flatnonzero(~envs.unwrapped.frozen)
        seen = {name: array[acting] for name, array in obs.items()}
        chunk, _, _ = policy.sample(seen, [envs.instructions[i] for i in acting], temperature)
        actions = np.zeros(envs.action_space.shape, np.float32)  # (N, C, 7)
        actions[acting] = chunk.reshape(len(acting), *actions.shape[1:])
        obs, _, terminated, _, _ = envs.step(actions)
    return success(int(terminated.sum()), episodes)


def loss_of(policy: Any, samples: dict[str, Any], inds: np.ndarray) -> Tensor:
    """Mean negative log-probability of the demonstrated tokens of samples ``inds``."""
    obs = {name: samples[name][inds] for name in ("image", "state")}
    tokens = policy.encode(torch.as_tensor(samples["actions"][inds], dtype=torch.float32))  # (B, D)
    logprobs, _, _ = policy.evaluate(obs, [samples["instruction"][i] for i in inds], tokens)  # (B, D)
    return -logprobs.mean()


if __name__ == "__main__":
    args = parse_args(Args)
    with one_line_errors():
        check_numbers(args, "num_steps batch_size learning_rate max_grad_norm", above=True)
        if not args.task_ids or min(args.episodes, default=0) < 1 or args.seed < 0:
            raise ValueError("task_ids is empty, episodes below 1 or seed negative")
        if not 0 <= args.eval_episodes <= 50:
            raise ValueError(
                f"eval_episodes is {args.eval_episodes}; expected 0 to 50, the recorded init states"
            )
        torch.manual_seed(args.seed)
        policy = load_policy(args.policy, args.checkpoint) if args.checkpoint else new_policy(args.policy)
        chunk = policy.action_chunk
        files = [args.demos / f"{args.suite}_{task_id}_demo.hdf5" for task_id in args.task_ids]
        episodes = args.episodes * len(files) if len(args.episodes) == 1 else args.episodes
        if len(episodes) != len(files):
            raise ValueError(
                f"episodes has {len(episodes)} numbers; expected one, or one for each of {len(files)} tasks"
            )
        tasks = [load_demonstrations(file, count, chunk) for file, count in zip(files, episodes)]
        run = make_run_folder(args.run_dir, args.suite, args.task_ids[0], "sft_vla", args.seed)
    samples: dict[str, Any] = {
        name: np.concatenate([task[name] for task in tasks]) for name in ("image", "state", "actions")
    }
    samples["instruction"] = [task["instruction"] for task in tasks for _ in task["actions"]]
    write_json(run / "args.json", dataclasses.asdict(args))
    writer = SummaryWriter(str(run))
    print(f"{run}: {len(samples['actions']):,} samples, {count_parameters(policy)[1]:,} parameters")

    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, args.num_steps, pct_start=0.05
    )
    rng = np.random.default_rng(args.seed)
    started = time.perf_counter()
    progress = tqdm(range(args.num_steps), desc="SFT", unit="step")
    for step in progress:
        loss = loss_of(policy, samples, rng.integers(len(samples["actions"]), size=args.batch_size))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            writer.add_scalar("losses/nll", loss.item(), step)
            progress.set_postfix(nll=f"{loss.item():.3f}")
    save_policy(policy, args.policy, run / "checkpoints" / "final")

    policy.eval()
    results = {}
    for task_id in args.task_ids if args.eval_episodes else ():
        envs = gym.make_vec(
            f"vla_envs/{args.suite}-v0", num_envs=args.eval_episodes, task_id=task_id, action_chunk=chunk,
            max_episode_steps=args.max_episode_steps, num_threads=args.num_threads,
        )  # fmt: skip
        torch.manual_seed(args.seed)
        results[task_id] = evaluate(envs, policy, args.eval_episodes, args.eval_temperature)
        successes = results[task_id]["successes"]
        print(f"task {task_id}: {successes}/{args.eval_episodes} succeed, {envs.instructions[0]}")
        envs.close()
    write_json(
        run / "result.json",
        {"suite": args.suite, "seed": args.seed, "success": results, "wall_s": time.perf_counter() - started},
    )
    writer.close()
