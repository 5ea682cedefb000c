"""GRPO: fine-tune a vision-language-action policy without a critic, from outcomes alone (arXiv 2402.03300).

A group is K environments that start from the same scene. Its members are compared with one another by the
reward of the whole trajectory, by default 1 for success and 0 else. The recipe is SimpleVLA-RL's (Li et al.
2025, arXiv 2509.09674): dynamic sampling, a higher clip above than below, sampling at a raised temperature,
no KL term.

Symbols: G groups, K members per group, N = G*K environments (environment i is in group i // K), T decision
steps (one executes C control steps), D action tokens per decision, S decisions taken (samples), B of them in
a minibatch. Arrays are time-major, (T, N). alive[t, i]: member i had not finished before decision t; |o_i|:
how many it took.

    advantage    A_i = (R_i - mean R) / std R of the total rewards in a group          group_advantages
                 or, with --credit stage, one for each stage that a member enters      stage_credit
    objective    mean_i 1/|o_i| sum_t mean_d min(ratio A_i, clip(ratio) A_i)           samples_of, policy_loss
    penalty      beta (p_ref / p - 1 - log(p_ref / p)), the k3 estimate of the KL      update

Where we depart from the recipe, or it is silent:
 1. Dynamic sampling trains on every group whose success rate is within --keep-low and --keep-high, and plays
    further groups until there are --num-groups of them, for at most --max-rounds rounds.
 2. The loss is averaged over tokens and decisions within a trajectory, then over trajectories; one ratio per
    token (--ratio-level action: one per decision).
 3. The policy decides a chunk of C control steps at once.
 4. Every group has a placement of its own, drawn from LIBERO's regions; evaluation is on the 50 recorded init
    states, which training never sees.
 5. An update stops early when it has moved the policy by --target-kl; the learning rate is warmed up, then
    falls linearly to 0.

    python grpo_vla.py --task-id 4
    python grpo_vla.py --task-id 4 --evaluate --checkpoint runs/.../checkpoints/final
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

import vla_envs  # noqa: F401  # isort: skip  (registers the environments; first, for torch's threads)
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vla_envs import distributed
from vla_envs.command_line import check_numbers
from vla_envs.policies import adapters
from vla_envs.training import arguments, batches, checkpoints, runs
from vla_envs.training.credit import in_order, stage_credit


@dataclass
class Args(arguments.CommonArgs):  # --task-id, --policy, --checkpoint, --train, --seed, --resume, ...
    # ---- Algorithm ----
    reward: str = "binary"
    """binary, multi_stage, or path/to/file.py:function"""
    credit: Literal["trajectory", "stage"] = "trajectory"
    """A decision is credited with its trajectory's reward, or with whether its stage led to a later one"""
    keep_low: float = 0.1
    """Least success rate of a group that dynamic sampling keeps"""
    keep_high: float = 0.9
    """Greatest success rate of a group that dynamic sampling keeps"""
    max_rounds: int = 4
    """Rollouts per iteration, at most, until --num-groups groups are kept"""
    total_env_steps: int | None = None
    """Control steps of training [120000; of several tasks 60000 each; or --num-iterations]"""
    num_iterations: int | None = None
    """Iterations; with --total-env-steps too, the one reached first ends the run [as many as that takes]"""
    num_groups: int | None = None
    """Groups per batch (G), each on a placement of its own [8, or 2 for each of --task-ids]"""
    group_size: int = 8
    """Members per group (K)"""
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
    clip_low: float = 0.2
    """The ratio is clipped at 1 - this"""
    clip_high: float = 0.28
    """The ratio is clipped at 1 + this"""
    ratio_level: Literal["token", "action"] = "token"
    """One ratio per token, or one for the whole decision"""
    kl_coef: float = 0.0
    """Weight of the k3 KL divergence from the policy with its adapter off (beta); needs --train lora"""
    target_kl: float = 0.04
    """An update stops when its approximate KL per ratio exceeds this"""
    max_grad_norm: float = 1.0
    """The gradient is clipped at this norm"""


# ---- Advantages and loss: pure functions of tensors --------------------------------------------------


def group_advantages(returns: Tensor, group_size: int, eps: float = 1e-6) -> Tensor:
    """(R - mean) / (std + eps) over the members of each group (std with n - 1), float32.

    Args:
        returns: (..., N).
        group_size: K, which has to divide N.
        eps: Added to the standard deviation; a group whose own is below 1e-6 gives exactly 0.
    """
    if group_size < 2 or returns.shape[-1] % group_size:
        raise ValueError(
            f"{returns.shape[-1]} environments do not divide into groups of {group_size} (at least 2)"
        )
    groups = returns.double().unflatten(-1, (returns.shape[-1] // group_size, group_size))  # (..., G, K)
    groups = groups - groups[..., :1]  # (..., G, K): equal members are exactly 0, however a mean rounds
    std = groups.std(dim=-1, keepdim=True)  # (..., G, 1)
    scores = (groups - groups.mean(dim=-1, keepdim=True)) / (std + eps).clamp(min=1e-6)  # (..., G, K)
    return torch.where(std < 1e-6, torch.zeros_like(scores), scores).flatten(-2).float()  # (..., N)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """PPO's clipped objective, negated: a mean over D tokens, then over B samples weighted by ``mask``.

    Args:
        logprobs: (B, D), with gradient.
        old_logprobs: (B, D), of the policy that acted.
        advantages: (B,).
        mask: (B,), any weight >= 0.
        clip_low, clip_high: The ratio is clipped to [1 - clip_low, 1 + clip_high].
    """
    # Beyond e^20 the ratio is far outside any clip; the bound keeps it finite.
    logratio = (logprobs - old_logprobs).clamp(-20.0, 20.0)  # (B, D)
    ratio = logratio.exp()  # (B, D)
    weight = (mask / mask.sum().clamp(min=1e-12)).unsqueeze(1) / ratio.shape[1]  # (B, 1)
    gain = ratio * advantages.unsqueeze(1)  # (B, D)
    clipped_gain = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages.unsqueeze(1)  # (B, D)
    loss = -(weight * torch.min(gain, clipped_gain)).sum()
    with torch.no_grad():
        statistics = {
            "approx_kl": (weight * ((ratio - 1.0) - logratio)).sum(),
            "clipfrac_low": (weight * (ratio < 1.0 - clip_low)).sum(),
            "clipfrac_high": (weight * (ratio > 1.0 + clip_high)).sum(),
            "ratio": (weight * ratio).sum(),
        }
    return loss, statistics


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


def collect(envs: Any, policy: Any, iteration: int, args: Args) -> tuple[dict[str, Any], list[Any]]:
    """Dynamic sampling: play groups until ``num_groups`` teach something; every one that does is kept.

    A group whose members all succeed, or all fail, has advantage 0: another is played instead, in the next of
    at most ``max_rounds`` rounds.

    Returns:
        The batch of the groups that are kept, with ``kept`` and ``zero_std``, flags of all groups that were
        played (G,); and every rollout.
    """
    rollouts: list[dict[str, Any]] = []
    equal: list[Tensor] = []  # groups whose members all have the same return
    useful: list[Tensor] = []  # groups that are kept
    missing, rounds = args.num_groups, 0  # counted over all processes: each of them plays every round
    while missing and rounds < args.max_rounds:
        rounds += 1
        seeds, generators = batches.draw_placements(args, iteration, missing, rounds)  # (N,), (N,)
        if len(seeds):  # a process may have no more groups to play, while others have
            rollouts.append(rollout(envs, policy, seeds, args.temperature, generators))
            rate = rollouts[-1]["success"].float().view(-1, args.group_size).mean(dim=1)  # (G,)
            returns = rollouts[-1]["rewards"].sum(dim=0).view(-1, args.group_size)  # (G, K)
            equal.append(returns.std(dim=1) <= 1e-6)  # (G,)
            useful.append(~equal[-1] & (rate >= args.keep_low) & (rate <= args.keep_high))  # (G,)
        missing = args.num_groups - distributed.total(int(torch.cat(useful).sum()))
    batch = batches.join(rollouts, [each.repeat_interleave(args.group_size) for each in useful])
    return batch | {"kept": torch.cat(useful), "zero_std": torch.cat(equal)}, rollouts


# ---- Learning ----------------------------------------------------------------------------------------


def logprobs_of(policy: Any, b: dict[str, Any], inds: Tensor, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (B, D), of --ratio-level action (B, 1), entropies (B, D) and hidden states (B, H)."""
    obs = {name: b[name][inds] for name in batches.OBSERVED if name in b}
    tokens = b["tokens"][inds].to(args.device)  # (B, D)
    instructions = [b["instructions"][i] for i in b["who"][inds].tolist()]
    logprobs, entropy, hidden = policy.score(obs, instructions, tokens, args.temperature)
    return (logprobs if args.ratio_level == "token" else logprobs.sum(dim=1, keepdim=True)), entropy, hidden


def samples_of(policy: Any, batch: dict[str, Any], advantages: Tensor, args: Args) -> dict[str, Any]:
    """The batch with what an update needs of each sample: its advantage, weight and old log-probs.

    Old log-probs come from the forward pass that trains, so the first ratio is 1 whatever rounding the
    rollout had; ``logprob_gap`` is that rounding.
    """
    when, who, alive = batch["when"], batch["who"], batch["alive"]  # (S,), (S,), (T, N)
    b = batch | {"advantages": advantages[when, who].to(args.device)}  # (S,)
    lengths = alive.sum(dim=0).clamp(min=1)  # (N,), 0 only of groups left out, which are not learnt from
    b["weights"] = (1.0 / lengths)[who].to(args.device)  # (S,) 1 / |o_i|: trajectories count alike
    sampled = b["logprobs"] if args.ratio_level == "token" else b["logprobs"].sum(dim=1, keepdim=True)
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
    clip_low, clip_high = args.clip_low, args.clip_high
    meter, optimizer_steps = runs.Meter(), 0
    for mb_inds in minibatches:
        optimizer.zero_grad()
        for inds, share in distributed.micro_batches(policy, b, mb_inds, args.micro_batch_size):
            newlogprob, entropy, _ = logprobs_of(policy, b, inds, args)  # (B, D), (B, D)
            weights = b["weights"][inds]  # (B,)
            pg_loss, measured = policy_loss(
                newlogprob, b["old_logprobs"][inds], b["advantages"][inds], weights, clip_low, clip_high
            )
            loss = pg_loss
            if args.kl_coef:
                with torch.no_grad(), adapters.adapter_off(policy):
                    reference, _, _ = logprobs_of(policy, b, inds, args)  # (B, D)
                log_ref = (reference - newlogprob).clamp(-20.0, 20.0)  # (B, D)
                k3 = (log_ref.exp() - 1.0 - log_ref).mean(dim=1)  # (B,)
                measured["kl"] = (weights / weights.sum() * k3).sum()
                loss = loss + args.kl_coef * measured["kl"]
            (loss * share).backward()
            measured["logprob"] = (weights / weights.sum() * newlogprob.mean(dim=1)).sum()
            meter.add(share, loss=loss, policy_loss=pg_loss, entropy=entropy.mean(), **measured)
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
    if args.group_size < 2:
        raise ValueError(f"group_size is {args.group_size}; expected at least 2, to compare members")
    if not 0 <= args.keep_low <= args.keep_high <= 1:
        raise ValueError(
            f"keep_low, keep_high are {args.keep_low}, {args.keep_high}; expected 0 <= low <= high <= 1"
        )
    if args.credit == "stage" and args.reward not in ("binary", "multi_stage"):
        raise ValueError(f"--credit stage is for the reward binary or multi_stage, not {args.reward}")
    check_numbers(args, "max_rounds", above=True)
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
        batch, rollouts = collect(envs, policy, iteration, args)
        run.count(*rollouts)
        if not distributed.total(int(batch["kept"].sum())):
            tqdm.write(
                f"iteration {iteration}: {run.totals['successes']} of {run.totals['episodes']} episodes"
                f" succeed, and in no group between {args.keep_low:g} and {args.keep_high:g} of its members;"
                " nothing to learn from, so training ends (where all fail, start from a better --checkpoint)"
            )
            break

        if args.credit == "stage":
            advantages = stage_credit(in_order(batch["stages"]), batch["alive"], args.group_size)  # (T, N)
        else:
            advantages = group_advantages(batch["rewards"].sum(dim=0), args.group_size)  # (N,)
            advantages = advantages.expand_as(batch["rewards"])  # (T, N)

        policy.train()
        warm = iteration / args.warmup_iterations
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(run.left, warm)
        b = samples_of(policy, batch, advantages, args)
        minibatches = batches.minibatches(b, args)
        with run.iteration_errors():
            losses = update(policy, optimizer, b, minibatches, args)

        run.log(losses, {"group/kept_frac": batch["kept"], "group/zero_std_frac": batch["zero_std"]})
        del batch, b  # so that images of two rollouts are never held at once
    run.finish()  # the trained policy, result.json, how it went
