"""RFT: fine-tune a vision-language-action policy by imitation of its own successes (filtered cloning).

Rejection-sampling fine-tuning: play, keep the episodes that succeed, imitate what was decided in them, play
again. There is no comparison, no critic and no negative example: it is the cheapest baseline of online RL.

Symbols: N environments, T decision steps (one executes C control steps), D action tokens per decision, S
decisions taken (samples), B of them in a minibatch. Arrays are time-major, (T, N). alive[t, i]: member i had
not finished before decision t; |o_i|: how many it took.

    objective    mean over successful i of 1/|o_i| sum_t mean_d log pi(token_itd)
                                                                   samples_of, imitation_loss, update

What the method leaves open, and what is done here:
 1. Each iteration imitates the successes of its own rollout alone, so a run is resumed from its weights.
 2. A token is imitated by its own log-probability, whatever the policy's loss of demonstrations is; of flow
    that is the log-density of the chain of denoising steps.
 3. Successes count alike, whatever their length.
 4. Every environment has a placement of its own, drawn from LIBERO's regions; evaluation is on the 50
    recorded init states, which training never sees.
 5. An update stops early when it has moved the policy by --target-kl; the learning rate is warmed up, then
    falls linearly to 0.

    python rft_vla.py --task-id 4
    python rft_vla.py --task-id 4 --evaluate --checkpoint runs/.../checkpoints/final
"""

import time
from dataclasses import dataclass
from typing import Any

import vla_envs  # noqa: F401  # isort: skip  (registers the environments; first, for torch's threads)
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vla_envs import distributed
from vla_envs.training import arguments, batches, checkpoints, runs


@dataclass
class Args(arguments.CommonArgs):  # --task-id, --policy, --checkpoint, --train, --seed, --resume, ...
    # ---- Algorithm ----
    total_env_steps: int | None = None
    """Control steps of training [120000; of several tasks 60000 each; or --num-iterations]"""
    num_iterations: int | None = None
    """Iterations; with --total-env-steps too, the one reached first ends the run [as many as that takes]"""
    num_groups: int = 64
    """Placements per batch (G)"""
    group_size: int = 1
    """Environments of the same placement (K)"""
    learning_rate: float = 1.5e-4
    """AdamW's peak learning rate; it falls linearly to 0"""
    warmup_iterations: int = 3
    """Iterations over which the learning rate grows to its peak"""
    update_epochs: int = 3
    """Passes over a batch"""
    minibatch_size: int = 256
    """Decisions per optimiser step (B)"""
    micro_batch_size: int | None = None
    """Decisions per forward pass; gradients add up over a minibatch [all at once]"""
    target_kl: float = 0.04
    """An update stops when its approximate KL per token exceeds this"""
    max_grad_norm: float = 1.0
    """The gradient is clipped at this norm"""


# ---- Loss: a pure function of tensors ----------------------------------------------------------------


def imitation_loss(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Minus the mean of log-probabilities (B, D), over D and then over B by ``weights`` (B,)."""
    return -(weights / weights.sum().clamp(min=1e-12) * logprobs.mean(dim=1)).sum()


# ---- Collecting --------------------------------------------------------------------------------------


def rollout(envs: Any, policy: Any, seeds: Any, temperature: float, generators: Any = None) -> dict[str, Any]:
    """Play an episode from the placement of each seed (N,), in the first N environments, side by side.

    Returns:
        Of the S decisions, in order of time: image, state, tokens, logprobs, when (decision step), who
        (environment). (T, N) tensors: rewards, stages, steps (control steps), alive. (N,): success, diverged;
        last, the observation after the end (for a critic); instructions. policy_s, the seconds of deciding.
    """
    policy_s, count = 0.0, len(seeds)
    alive = np.arange(envs.num_envs) < count  # (E,)
    padded = [int(seed) for seed in seeds] + [None] * (envs.num_envs - count)  # a group is a repeated seed
    obs, _ = envs.reset(seed=padded, options={"reset_mask": alive})
    samples, steps = batches.Samples(), []
    while alive.any():
        who = np.flatnonzero(alive)  # (A,) those that act
        seen = {name: array[who] for name, array in obs.items()}  # (A, ...)
        instructions = [envs.instructions[i] for i in who]
        draws = generators and [generators[i] for i in who]
        asked = time.perf_counter()
        chunk, tokens, logprobs = policy.sample(seen, instructions, temperature, draws)
        policy_s += time.perf_counter() - asked
        when = np.full(len(who), len(steps))  # (A,)
        samples.append(**seen, tokens=tokens.cpu(), logprobs=logprobs.float().cpu(), when=when, who=who)
        actions = np.zeros(envs.action_space.shape, np.float32)  # (E, C, 7), or (E, 7) where C is 1
        actions[who] = chunk.reshape(len(who), *actions.shape[1:])  # of (A, C, 7)
        before = envs.steps  # (E,)
        obs, reward, terminated, truncated, info = envs.step(actions)  # a finished one is frozen, reward 0
        taken = envs.steps - before  # (E,)
        steps.append({"rewards": np.float32(reward), "stages": info["stage"], "steps": taken, "alive": alive})
        alive = alive & ~terminated & ~truncated
    batch: dict[str, Any] = samples.tensors()
    for name in batches.OF_STEPS:
        batch[name] = torch.from_numpy(np.stack([step[name][:count] for step in steps]))  # (T, N)
    batch["success"] = torch.from_numpy(terminated[:count].copy())  # (N,)
    batch["last"] = {name: torch.as_tensor(array[:count]) for name, array in obs.items()}  # (N, ...)
    batch["instructions"] = envs.instructions[:count]
    batch["policy_s"] = policy_s
    return batches.leave_out_diverged(batch, seeds, info["diverged"][:count])


# ---- Learning ----------------------------------------------------------------------------------------


def logprobs_of(policy: Any, b: dict[str, Any], inds: Tensor, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (B, D), entropies (B, D) and hidden states (B, H) of the samples ``inds`` (B,)."""
    obs = {name: b[name][inds] for name in batches.OBSERVED if name in b}
    tokens = b["tokens"][inds].to(args.device)  # (B, D)
    instructions = [b["instructions"][i] for i in b["who"][inds].tolist()]
    return policy.score(obs, instructions, tokens, args.temperature)


def samples_of(policy: Any, batch: dict[str, Any], args: Args) -> dict[str, Any]:
    """The batch with what an update needs of each sample: its weight, 0 where nothing was won, old log-probs.

    Old log-probs come from the forward pass that trains, so the first ratio is 1 whatever rounding the
    rollout had; ``logprob_gap`` is that rounding.
    """
    when, who, alive = batch["when"], batch["who"], batch["alive"] & batch["success"]  # (S,), (S,), (T, N)
    b = batch | {"alive": alive}
    lengths = alive.sum(dim=0).clamp(min=1)  # (N,)
    b["weights"] = (1.0 / lengths)[who].to(args.device)  # (S,) 1 / |o_i|: trajectories count alike
    sampled = b["logprobs"]  # (S, D)
    b["old_logprobs"] = sampled.to(args.device, copy=True)  # (S, D)
    inds = torch.nonzero(alive[when, who]).flatten()  # (up to S,) those that count
    size = args.micro_batch_size or args.minibatch_size
    with torch.no_grad():
        for part in (inds[i : i + size] for i in range(0, len(inds), size)):
            b["old_logprobs"][part] = logprobs_of(policy, b, part, args)[0].float()  # (B, D)
    gaps = (b["old_logprobs"][inds].cpu() - sampled[inds]).abs()  # (up to S, D)
    b["measured"] = {"logprob_gap": float(gaps.max()) if len(inds) else 0.0}
    return b


def update(policy: Any, optimizer: Any, b: dict[str, Any], minibatches: Any, args: Args) -> dict[str, float]:
    """One optimiser step per minibatch of sample numbers; the means of what was measured."""
    meter, optimizer_steps = runs.Meter(), 0
    for mb_inds in minibatches:
        optimizer.zero_grad()
        for inds, share in distributed.micro_batches(policy, b, mb_inds, args.micro_batch_size):
            newlogprob, entropy, _ = logprobs_of(policy, b, inds, args)  # (B, D), (B, D)
            loss, measured = imitation_loss(newlogprob, b["weights"][inds]), {}
            (loss * share).backward()
            logratio = (newlogprob.detach() - b["old_logprobs"][inds]).clamp(-20.0, 20.0)  # (B, D)
            measured["approx_kl"] = (logratio.exp() - 1.0 - logratio).mean()
            measured["ratio"] = logratio.exp().mean()
            meter.add(share, loss=loss, policy_loss=loss, entropy=entropy.mean(), **measured)
        norms = distributed.clip_gradients(optimizer, args.max_grad_norm)
        figures = meter.end_minibatch(*norms)  # of all processes; refuses what is not finite
        if figures["approx_kl"] > args.target_kl:
            break  # before the step that would go further
        optimizer.step()
        optimizer_steps += 1
    meter.end_update(policy, b["instructions"])
    return meter.means() | b["measured"] | {"optimizer_steps": optimizer_steps}


def validate(args: Args) -> Args:
    """Fill in what was left open; a ValueError says which argument does not fit, and what was expected."""
    return arguments.complete_rl(args)


if __name__ == "__main__":
    args = arguments.parse(Args, validate)
    with runs.one_line_errors():
        policy = checkpoints.starting_policy(args)
        args = arguments.fill_in_chunk(args, policy)
        policy = checkpoints.prepare(policy, args)  # --train says what is trained
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
        eval_envs = runs.make_eval_envs(args, policy)
        envs = runs.make_envs(args, policy)
        run = runs.Run(args, __file__, policy, optimizer, envs, eval_envs)  # new, or resumed
    if args.evaluate:
        raise SystemExit(run.evaluate_only())

    for iteration in run.iterations():  # from 1; evaluates on the recorded init states, saves, resumes
        policy.eval()
        seeds, generators = batches.draw_placements(args, iteration)  # (N,), (N,)
        batch = rollout(envs, policy, seeds, args.temperature, generators)
        run.count(batch)
        if not run.totals["successes"]:
            tqdm.write(f"iteration {iteration}: no episode succeeds; nothing to imitate")
            continue

        policy.train()
        warm = iteration / args.warmup_iterations
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(run.left, warm)
        b = samples_of(policy, batch, args)
        minibatches = batches.minibatches(b, args)
        with run.iteration_errors():
            losses = update(policy, optimizer, b, minibatches, args)

        run.log(losses, {"group/kept_frac": batch["success"]})
        del batch, b  # so that images of two rollouts are never held at once
    run.finish()  # the trained policy, result.json, how it went
