"""SFT: behaviour cloning of demonstrations, which makes the starting checkpoints of online RL.

Symbols: S samples (control steps of demonstrations), B of them in a minibatch, C control steps a decision, D
action tokens a decision.

    loss         -1/B sum_b 1/D sum_d log pi(token_bd | obs_b) of the demonstrated tokens     loss_of
                 (--policy flow: flow matching; a policy has its own, imitation_loss)

A sample is one control step with the C actions that follow it. Demonstrations are the scripted expert's,
LIBERO's HDF5 data sets or a LeRobot data set (``vla_envs/demos/demonstrations.py``). Of every task --held-out
further ones are never learnt from; their loss is logged and, with --early-stop, decides when training ends.
An iteration is --iteration-steps optimiser steps; after each the run can be resumed. Under torchrun every
process has its share of each minibatch.

    python -m vla_envs.experts --out demos --task-ids 4 --episodes 25
    python sft_vla.py --demos demos --task-id 4
    python sft_vla.py --demos demos --task-ids 0 1 2 3 4 5 6 7 8 9
    python sft_vla.py --task-id 4 --evaluate --checkpoint runs/.../checkpoints/final
"""

import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import vla_envs  # noqa: F401  # isort: skip  (registers the environments; first, for torch's threads)
import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vla_envs import distributed, evaluation, runs
from vla_envs.demos import demonstrations
from vla_envs.policies import adapters, new_policy, to_device
from vla_envs.tasks import get_task


@dataclass
class Args:
    # ---- Experiment ----
    seed: int = 1
    """Seed of everything: the same seed gives the same run"""
    run_dir: Path | None = None
    """Folder of this run [runs/<suite>_<task id>__<script>__<seed>__<time>]"""
    resume: Path | None = None
    """Folder of a run to go on with; how fast, how long and where things lie may be given anew, no more"""
    evaluate: bool = False
    """Only evaluate --checkpoint, deterministically and sampled"""
    compare: Path | None = None
    """With --evaluate: a second checkpoint, compared with the first state by state"""
    protocol: Literal["tgrpo", "openvla", "simplevla", "rlinf", "lerobot"] | None = None
    """Whose evaluation: settling, step limit, pictures, sampling, episodes [as in training]"""
    eval_every: int = 5
    """Iterations between evaluations; 0: only the last and, of RL, the first, before training"""
    eval_episodes: int | None = None
    """Episodes of an evaluation: recorded init states 0, 1, ... [the protocol's, else 50: all]"""
    eval_temperature: float | None = None
    """Temperature of evaluations' sampled episodes; 0: none [the protocol's, else --temperature]"""
    device: str | None = None
    """Where the policy runs: cpu, cuda, cuda:1, ... [nano, flow: cpu; openvla: cuda where there is one]"""

    # ---- Environment ----
    suite: str = "LiberoObject"
    """LIBERO suite"""
    task_id: int | None = None
    """Task in the suite, from 0 [4]"""
    task_ids: tuple[int, ...] = ()
    """Several tasks at once, for one policy [--task-id]"""
    assets: str = "builtin"
    """builtin, libero (LIBERO's own: the folder in LIBERO_ASSETS, else downloaded) or a folder"""
    quality: str = "exact"
    """Of LIBERO's own assets: exact, its very pixels, or fast, with simpler meshes"""
    cache: bool = True
    """Keep compiled scenes on disk; without, they are built anew"""
    max_episode_steps: int | None = None
    """Control steps until an episode ends without success [200; of evaluations the protocol's]"""
    action_chunk: int | None = None
    """Control steps a decision (C); has to fit the policy [the policy's]"""
    num_threads: int | None = None
    """Simulator threads [one per core]"""

    # ---- Policy ----
    policy: str = "nano"
    """Kind of policy: nano, flow, openvla or openvla-oft"""
    checkpoint: Path | None = None
    """Starting checkpoint: a folder, openvla: or a hub's repository [the shipped one; sft_vla.py: random]"""
    train: str = "all"
    """What is trained: lora, head, lora+head, lora+last-k or all"""
    lora_rank: int | None = None
    """LoRA's r [32]"""
    last_k: int | None = None
    """Blocks trained in full with --train lora+last-k [1]"""
    adapter: str | None = None
    """Name of the LoRA adapter: its folder in checkpoints/ [adapter]"""
    shared_adapter: tuple[Path, ...] = ()
    """Adapters, one for each of --task-ids: frozen, and one that all tasks share is trained above them"""
    merge: bool = True
    """At the end also write checkpoints/final: a whole policy with the adapter added in"""
    cudagraphs: bool = False
    """Replay openvla's decoding as CUDA graphs, one a token, instead of launching its kernels one by one"""
    temperature: float = 1.0
    """Divides the logits, scales a flow's noise; in rollout and update alike"""

    # ---- Algorithm ----
    demos: Path = Path("demos")
    """Folder of demonstrations: LIBERO's HDF5 files or a LeRobot data set"""
    episodes: tuple[int, ...] = ()
    """Demonstrations a task: one number for all, or one for each of --task-ids [all that are not held out]"""
    held_out: int = 1
    """Further demonstrations a task that are not learnt from, whose loss is logged"""
    early_stop: int = 0
    """Ends training after so many iterations without a lower held-out loss, and keeps the best [0: never]"""
    num_iterations: int = 10
    """Iterations of learning"""
    iteration_steps: int = 100
    """Optimiser steps an iteration"""
    minibatch_size: int = 64
    """Samples an optimiser step (B)"""
    learning_rate: float = 1e-3
    """AdamW's greatest learning rate; it falls to 0 along a cosine"""
    warmup_frac: float = 0.05
    """Share of the steps over which the learning rate grows to its value"""
    weight_decay: float = 0.01
    """AdamW's weight decay"""
    max_grad_norm: float = 1.0
    """The gradient is clipped at this norm"""


# ---- Acting ------------------------------------------------------------------------------------------


def make_envs(num_envs: int, task_id: Any, reward: str, args: Any, **settings: Any) -> Any:
    """Environments of a task, or of one task each, as in training unless ``settings`` say otherwise."""
    envs = gym.make_vec(
        f"vla_envs/{args.suite}-v0", num_envs=num_envs, task_id=task_id, reward=reward, assets=args.assets,
        quality=args.quality, cache=args.cache, action_chunk=args.action_chunk,
        **{"max_episode_steps": args.max_episode_steps,
           "num_threads": distributed.num_threads(args.num_threads), **settings},
    )  # fmt: skip
    envs.reset(seed=[0] * num_envs)  # a scene or a reward that fails does so now
    return envs


def act(
    envs: Any, policy: Any, obs: dict[str, Any], acting: np.ndarray, temperature: float, draws: Any = None
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Decide for environments ``acting`` (A,): actions (N, C, 7), tokens and log-probs (N, D), else 0."""
    seen = {name: array[acting] for name, array in obs.items()}
    chunk, some_tokens, some_logprobs = policy.sample(
        seen, [envs.instructions[i] for i in acting], temperature, draws and [draws[i] for i in acting]
    )  # (A, C, 7), (A, D), (A, D)
    actions = np.zeros(envs.action_space.shape, np.float32)  # (N, C, 7)
    actions[acting] = chunk.reshape(len(acting), *actions.shape[1:])
    tokens = torch.zeros((envs.num_envs, *some_tokens.shape[1:]), dtype=some_tokens.dtype)  # (N, D)
    tokens[torch.from_numpy(acting)] = some_tokens.cpu()
    logprobs = torch.zeros((envs.num_envs, some_logprobs.shape[1]))  # (N, D)
    logprobs[torch.from_numpy(acting)] = some_logprobs.float().cpu()
    return actions, tokens, logprobs


def evaluate(envs: Any, policy: Any, temperature: float, args: Any, video: Path) -> np.ndarray:
    """Play every task's recorded init states 0, 1, ...; which of them succeeded, (N,) bool, task by task."""
    torch.manual_seed(args.seed)
    policy.eval()
    obs, _ = envs.reset(options={"init_state_id": np.arange(envs.num_envs) % args.eval_episodes})
    frames = [evaluation.film(obs["image"])]
    while not (frozen := envs.unwrapped.frozen).all():
        seen = evaluation.seen(obs, args.protocol, policy)
        actions, _, _ = act(envs, policy, seen, np.flatnonzero(~frozen), temperature)
        obs, _, success, _, _ = envs.step(actions)
        frames.append(evaluation.film(obs["image"]))
    evaluation.write_video(video, frames, success)
    return success


# ---- Learning ----------------------------------------------------------------------------------------


def loss_of(policy: Any, samples: dict[str, Any], inds: np.ndarray, seeds: Any = ()) -> Tensor:
    """The policy's own loss of imitating the actions (B, C, 7) of samples ``inds`` (B,).

    A policy that draws noise for it draws each sample's by one of the ``seeds`` (B,), or from torch's.
    """
    obs = {name: samples[name][inds] for name in ("image", "state")}
    instructions = [samples["instructions"][i] for i in inds]
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds] or None
    return policy.imitation_loss(obs, instructions, torch.as_tensor(samples["actions"][inds]), generators)


@torch.no_grad()
def held_out_loss(policy: Any, samples: dict[str, Any]) -> float:
    """Mean of ``loss_of`` over all samples, of which each process has a share; always of the same noise."""
    count = len(samples["actions"])
    own = np.arange(count)[distributed.block(count)]
    parts = [inds for inds in np.array_split(own, 1 + len(own) // 256) if len(inds)]
    loss = sum(float(loss_of(policy, samples, inds, inds)) * len(inds) for inds in parts)
    loss = distributed.total(loss) / count
    runs.check_finite(**{"held-out loss": loss})
    return loss


def update(
    policy: Any, optimizer: Any, samples: dict[str, Any], iteration: int, args: Args
) -> dict[str, float]:
    """The optimiser steps of one iteration; the means of what was measured on the way."""
    rng = np.random.default_rng([args.seed, iteration])
    noise = np.random.default_rng([args.seed, iteration, 1])  # where the policy's loss draws some
    own = distributed.block(args.minibatch_size)  # of this process; none where there are more of them
    steps = args.num_iterations * args.iteration_steps
    losses, norms = [], []
    for step in range((iteration - 1) * args.iteration_steps, iteration * args.iteration_steps):
        warm, left = (step + 1) / (args.warmup_frac * steps), 0.5 * (1.0 + np.cos(np.pi * step / steps))
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(warm, left)
        inds = rng.integers(len(samples["actions"]), size=args.minibatch_size)[own]
        seeds = noise.integers(2**63, size=args.minibatch_size)[own]
        optimizer.zero_grad()
        share = len(inds) / args.minibatch_size
        if not share:  # of a policy that is spread all processes have to make as many passes
            inds, seeds = [0], [0]
        loss = loss_of(policy, samples, inds, seeds) * share
        loss.backward()
        loss = distributed.total(loss)
        distributed.add_up_gradients(optimizer)
        (grad_norm,) = distributed.clip_gradients(optimizer, args.max_grad_norm)
        runs.check_finite(loss=loss, gradient=grad_norm)
        optimizer.step()
        losses.append(loss.item())
        norms.append(float(grad_norm))
    distributed.gather_parameters(policy)
    return {"nll": float(np.mean(losses)), "grad_norm": float(np.mean(norms))}


def ended(state: dict[str, Any], args: Args) -> bool:
    """Whether all iterations are done, or --early-stop of them have not lowered the held-out loss."""
    since_best = state["iteration"] - state["best"]["iteration"]
    return state["iteration"] >= args.num_iterations or bool(
        args.early_stop and since_best >= args.early_stop
    )


def check(args: Args) -> Args:
    """Fill in what was left open; a ValueError says which argument does not fit, and what was expected."""
    args = runs.fill_in_evaluation(args)
    episodes = args.episodes * len(args.task_ids) if len(args.episodes) == 1 else args.episodes
    if episodes and (len(episodes) != len(args.task_ids) or min(episodes) < 1):
        raise ValueError(
            f"episodes are {args.episodes}; expected one number above 0, or one for each of {args.task_ids}"
        )
    if args.train.startswith(("lora", "head")) and args.checkpoint is None and not args.evaluate:
        raise ValueError(f"train is {args.train}: the rest would stay random; expected all, or --checkpoint")
    if args.early_stop and not args.held_out:
        raise ValueError("early_stop watches the held-out loss; expected --held-out of at least 1")
    runs.check_numbers(args, "seed held_out early_stop eval_every weight_decay", above=False)
    runs.check_numbers(
        args, "num_iterations iteration_steps minibatch_size learning_rate warmup_frac max_grad_norm"
        " lora_rank last_k temperature", above=True
    )  # fmt: skip
    return dataclasses.replace(args, episodes=episodes)


if __name__ == "__main__":
    args = runs.parse_args(Args)
    with runs.one_line_errors():
        args = check(runs.load_args(args) if args.resume else args)
        distributed.start(args.device)
        torch.manual_seed(args.seed)  # of the first weights
        new = args.checkpoint is None and not args.evaluate
        if new:
            policy = to_device(new_policy(args.policy), args.device)
        else:
            policy = runs.starting_policy(args)
        args = runs.fill_in_chunk(args, policy)
        below = runs.adapters_below(args)  # adapters of single tasks, where one is trained above them
        policy = learner = adapters.make_trainable(policy, args.train, args.lora_rank, args.last_k, below)
        protocol = evaluation.settings(args.protocol, args.suite, policy) | {"num_threads": args.num_threads}
        tasks = [get_task(args.suite, task_id) for task_id in args.task_ids]
        if not args.evaluate:
            counts = [count + args.held_out for count in args.episodes] or [None] * len(tasks)  # None: all
            demos = [
                demonstrations.load_demonstrations(
                    args.demos, task, count, policy.action_chunk, least=1 + args.held_out
                )
                for task, count in zip(tasks, counts)
            ]
            samples = demonstrations.samples(tasks, [d[: len(d) - args.held_out] for d in demos])
            held_out = (
                demonstrations.samples(tasks, [d[-args.held_out :] for d in demos]) if args.held_out else None
            )
            if new:
                policy.centre_states(samples["state"])
        optimizer = torch.optim.AdamW(
            [p for p in policy.parameters() if p.requires_grad], lr=args.learning_rate,
            weight_decay=args.weight_decay,
        )  # fmt: skip
        states = np.repeat(args.task_ids, args.eval_episodes).tolist()  # the task of each
        eval_envs = distributed.only_first(make_envs)(len(states), states, "binary", args, **protocol)
        run, state = runs.start(args, __file__, learner, optimizer)
    if args.evaluate:
        evaluation.evaluate_only(evaluate, eval_envs, policy, run, args)
        raise SystemExit

    writer = runs.make_writer(run, state["iteration"] * args.iteration_steps + 1 if args.resume else None)
    assess = partial(evaluation.assess, evaluate, eval_envs, policy, run, writer, args)
    print(f"{len(samples['actions']):,} samples")
    started = time.perf_counter() - state["wall_s"]
    best = state.setdefault("best", {"iteration": 0, "nll": None})
    progress = tqdm(
        total=args.num_iterations, initial=state["iteration"], desc="SFT", unit="it",
        disable=distributed.rank() > 0,
    )  # fmt: skip
    while not ended(state, args):
        iteration = state["iteration"] = state["iteration"] + 1
        start = time.perf_counter()
        policy.train()
        with runs.one_line_errors(f"iteration {iteration}, last good state in {run}/checkpoints/latest: "):
            losses = update(policy, optimizer, samples, iteration, args)
            policy.eval()
            losses |= {"held_out_nll": held_out_loss(policy, held_out)} if held_out else {}
        if held_out and (best["nll"] is None or losses["held_out_nll"] < best["nll"]):
            best |= {"iteration": iteration, "nll": losses["held_out_nll"]}
            runs.save_training_state(run / "checkpoints" / "best", learner, optimizer, state)
        update_s = time.perf_counter() - start

        if args.eval_every and iteration % args.eval_every == 0:
            state["after"] = assess(state, state["iteration"] * args.iteration_steps)
        state["wall_s"] = time.perf_counter() - started
        scalars = {"charts/learning_rate": optimizer.param_groups[0]["lr"], "time/update_s": update_s} | {
            f"losses/{name}": value for name, value in losses.items()
        }
        for tag, value in scalars.items():
            writer.add_scalar(tag, float(value), iteration * args.iteration_steps)
        runs.save_training_state(run / "checkpoints" / "latest", learner, optimizer, state)
        progress.update()
        progress.set_postfix({name: f"{value:.3f}" for name, value in losses.items() if "nll" in name})
    progress.close()

    if args.early_stop:
        print(f"held-out loss was lowest at {best['iteration']} of {state['iteration']} iterations")
        runs.load_training_state(run / "checkpoints" / "best", learner, optimizer)
    if args.early_stop or state["evaluated"] != state["iteration"]:
        state["after"] = assess(state, state["iteration"] * args.iteration_steps)
        state["wall_s"] = time.perf_counter() - started
        runs.save_training_state(run / "checkpoints" / "latest", learner, optimizer, state)
    runs.save_policies(run, policy, args)
    result = evaluation.about(args) | state["after"] | {"best": best, "wall_s": state["wall_s"]}
    distributed.only_first(runs.write_json)(run / "result.json", result)
    print(f"{state['wall_s'] / 60:.1f} min; {run}")
    writer.close()
    distributed.stop()
