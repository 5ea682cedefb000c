"""SFT: behaviour cloning of demonstrations, which makes the starting checkpoints of online RL.

Symbols: S samples (control steps of demonstrations), B of them in a minibatch, C control steps per decision,
D action tokens per decision.

    loss         -1/B sum_b 1/D sum_d log pi(token_bd | obs_b) of the demonstrated tokens     loss_of
                 (--policy flow: flow matching; a policy has its own, imitation_loss)

A sample is one control step with the C actions that follow it. Demonstrations are the scripted expert's,
LIBERO's HDF5 data sets or a LeRobot data set (``vla_envs/demos``). For each task, --held-out demonstrations
are set aside: their loss is logged and, with --early-stop, decides when training ends. An iteration is
--iteration-steps optimiser steps; after each the run can be resumed. Under torchrun every process has its
share of each minibatch.

    python -m vla_envs.experts --out demos --task-ids 4 --episodes 25
    python sft_vla.py --demos demos --task-id 4
    python sft_vla.py --demos demos --task-ids 0 1 2 3 4 5 6 7 8 9
    python sft_vla.py --task-id 4 --evaluate --checkpoint runs/.../checkpoints/final
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vla_envs  # noqa: F401  # isort: skip  (registers the environments; first, for torch's threads)
import numpy as np
import torch
from torch import Tensor

from vla_envs import distributed
from vla_envs.command_line import check_numbers
from vla_envs.demos import demonstrations
from vla_envs.policies import is_own
from vla_envs.policies.protocol import cameras_of
from vla_envs.tasks import get_task
from vla_envs.training import arguments, batches, checkpoints, runs


@dataclass
class Args(arguments.CommonArgs):  # --task-id, --policy, --checkpoint, --train, --seed, --resume, ...
    # ---- Algorithm ----
    demos: Path = Path("demos")
    """Folder of demonstrations: LIBERO's HDF5 files or a LeRobot data set"""
    episodes: tuple[int, ...] = ()
    """Demonstrations per task: one number, or one for each of --task-ids [all that are not held out]"""
    held_out: int = 1
    """Further demonstrations per task that are not learnt from; their loss is logged"""
    early_stop: int = 0
    """End after this many iterations without a lower held-out loss, and keep the best [0: never]"""
    num_iterations: int = 10
    """Iterations of learning"""
    iteration_steps: int = 100
    """Optimiser steps per iteration"""
    minibatch_size: int = 64
    """Samples per optimiser step (B)"""
    learning_rate: float = 1e-3
    """AdamW's peak learning rate; it falls to 0 along a cosine"""
    warmup_frac: float = 0.05
    """Share of the steps over which the learning rate grows to its peak"""
    weight_decay: float = 0.01
    """AdamW's weight decay"""
    max_grad_norm: float = 1.0
    """The gradient is clipped at this norm"""


# ---- Learning ----------------------------------------------------------------------------------------


def loss_of(policy: Any, samples: dict[str, Any], inds: np.ndarray, seeds: Any = ()) -> Tensor:
    """The policy's own loss of imitating the actions (B, C, 7) of samples ``inds`` (B,).

    A policy that draws noise for it draws each sample's by one of the ``seeds`` (B,), or from torch's.
    """
    obs = {name: samples[name][inds] for name in batches.OBSERVED if name in samples}
    instructions = [samples["instructions"][i] for i in inds]
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds] or None
    return policy.imitation_loss(obs, instructions, torch.as_tensor(samples["actions"][inds]), generators)


@torch.no_grad()
def held_out_loss(policy: Any, samples: dict[str, Any]) -> float:
    """Mean of ``loss_of`` over all samples, shared among the processes; the noise is always the same."""
    count = len(samples["actions"])
    own = np.arange(count)[distributed.block(count)]
    parts = [inds for inds in np.array_split(own, 1 + len(own) // 256) if len(inds)]
    loss = sum(float(loss_of(policy, samples, inds, inds)) * len(inds) for inds in parts)
    loss = distributed.total(loss) / count
    runs.check_finite("held-out loss", loss)
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
        if not share:  # of a sharded policy (FSDP) all processes have to make as many passes
            inds, seeds = [0], [0]
        loss = loss_of(policy, samples, inds, seeds) * share
        loss.backward()
        loss = distributed.total(loss)
        (grad_norm,) = distributed.clip_gradients(optimizer, args.max_grad_norm)
        runs.check_finite("loss", loss)
        runs.check_finite("gradient", grad_norm)
        optimizer.step()
        losses.append(loss.item())
        norms.append(float(grad_norm))
    distributed.gather_parameters(policy)
    return {"nll": float(np.mean(losses)), "grad_norm": float(np.mean(norms))}


def load_samples(policy: Any, args: Args) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Samples of the demonstrations that are learnt from, and of those held out, if any."""
    tasks = [get_task(args.suite, task_id) for task_id in args.task_ids]
    counts = [count + args.held_out for count in args.episodes] or [None] * len(tasks)  # None: all
    least = 1 + args.held_out
    chunk = getattr(policy, "imitation_chunk", policy.action_chunk)  # it may predict more than it executes
    demos = [
        demonstrations.load_demonstrations(args.demos, task, count, chunk, least, cameras_of(policy))
        for task, count in zip(tasks, counts)
    ]
    learnt = [its[: len(its) - args.held_out] for its in demos]
    samples = demonstrations.samples(tasks, learnt, policy.image_size)
    if not args.held_out:
        return samples, None
    return samples, demonstrations.samples(tasks, [its[-args.held_out :] for its in demos])


def validate(args: Args) -> Args:
    """Fill in what was left open; a ValueError says which argument does not fit, and what was expected."""
    args = arguments.complete(args)
    if args.perturb:
        raise ValueError("perturb is for training in the simulator; expected --eval-perturb in sft_vla.py")
    episodes = args.episodes * len(args.task_ids) if len(args.episodes) == 1 else args.episodes
    if episodes and (len(episodes) != len(args.task_ids) or min(episodes) < 1):
        raise ValueError(
            f"episodes are {args.episodes}; expected one number above 0, or one for each of {args.task_ids}"
        )
    new = args.checkpoint is None and not args.evaluate and not is_own(args.policy)
    if new and args.train.startswith(("lora", "head")):
        raise ValueError(f"train is {args.train}: the rest would stay random; expected all, or --checkpoint")
    if args.early_stop and not args.held_out:
        raise ValueError("early_stop watches the held-out loss; expected --held-out of at least 1")
    check_numbers(args, "seed", "held_out", "early_stop", "eval_every", "weight_decay", above=False)
    check_numbers(
        args, "num_iterations", "iteration_steps", "minibatch_size", "learning_rate", "warmup_frac",
        "max_grad_norm", "lora_rank", "last_k", "temperature", above=True,
    )  # fmt: skip
    return dataclasses.replace(args, episodes=episodes)


if __name__ == "__main__":
    args = arguments.parse(Args, validate)
    with runs.one_line_errors():
        new = args.checkpoint is None and not args.evaluate  # with random weights
        policy = checkpoints.new_policy(args) if new else checkpoints.starting_policy(args)
        args = arguments.fill_in_chunk(args, policy)
        policy = checkpoints.prepare(policy, args)  # --train says what is trained
        if not args.evaluate:
            samples, held_out = load_samples(policy, args)
            if new and hasattr(policy, "centre_states"):
                policy.centre_states(samples["state"])
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
        run = runs.Run(args, __file__, policy, optimizer, None, runs.make_eval_envs(args, policy))
    if args.evaluate:
        raise SystemExit(run.evaluate_only())

    print(f"{len(samples['actions']):,} samples")
    best = run.state.setdefault("best", {"iteration": 0, "nll": None})
    for iteration in run.iterations():  # evaluates on the recorded init states, saves, resumes
        policy.train()
        with run.iteration_errors():
            losses = update(policy, optimizer, samples, iteration, args)
            policy.eval()
            losses |= {"held_out_nll": held_out_loss(policy, held_out)} if held_out else {}
        if held_out and (best["nll"] is None or losses["held_out_nll"] < best["nll"]):
            best |= {"iteration": iteration, "nll": losses["held_out_nll"]}
            run.save("best")
        # Early stopping: that many iterations have not lowered the held-out loss.
        run.state["ended"] = bool(args.early_stop) and iteration - best["iteration"] >= args.early_stop
        run.log(losses, {})
    if args.early_stop:
        print(f"held-out loss was lowest at {best['iteration']} of {run.state['iteration']} iterations")
        run.load("best")
    run.finish()  # the trained policy, result.json, how it went
