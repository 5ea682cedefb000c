"""TGRPO: fine-tune a vision-language-action policy without a critic (Chen et al. 2025, arXiv 2506.08440).

A group is K environments that start from the same scene. Its members are compared with one another twice:
by the reward of the moment (step term) and by the reward of the whole trajectory (trajectory term).

Symbols: G groups, K members per group, N = G*K environments (environment i is in group i // K), T decision
steps (one executes C control steps), D action tokens per decision, S decisions taken (samples), B of them in
a minibatch. Arrays are time-major, (T, N). R_it is what member i is paid for decision t, R_i its total;
alive[t, i]: it had not finished before decision t; |o_i|: how many it took. Means and deviations (std) are
over the members of a group.

    equation 6   step_it = (R_it - mean R_t) / std R_t             step_advantages
    equation 7   trajectory_i = (R_i - mean R) / std R             trajectory_advantages
    equation 8   A_it = alpha1 * step_it + alpha2 * trajectory_i   the loop; tgrpo_advantages, in one call
    equation 9   J = mean_i 1/|o_i| sum_t mean_d min(ratio A_it, clip(ratio) A_it) - beta KL
                                                                   samples_of, policy_loss, update

Where we depart from the paper, or it is silent (--preset paper restores items 1, 2, 3 and 8):
 1. Every environment runs to its own end (--stop group: what follows a member's success does not count).
 2. The ratio is clipped as in PPO, the paper's version 3 (--no-clip: version 1), one ratio per token
    (--ratio-level action: one per decision).
 3. Epochs of minibatches over the whole batch (--update-every step: Algorithm 1's update per decision step).
 4. A step at which all members get the same reward has advantage 0; the share of such steps is logged.
    --group-by stage compares the k-th decisions that members take in a stage, --alphas auto finds alpha1 and
    alpha2 (vla_envs/training/tgrpo_extras.py).
 5. A finished member keeps its last reward until its group's last member ends, or one that hovers over the
    goal would earn more than one that finishes (--return-mode sum: over its own steps; mean: their mean).
 6. The policy decides a chunk of C control steps at once; the step reward is that of the chunk's last one.
 7. Several groups per batch (--num-groups), each on its own placement, drawn from LIBERO's regions;
    evaluation is on the 50 recorded init states, which training never sees.
 8. An update stops early when it has moved the policy by --target-kl; the learning rate is warmed up, then
    falls linearly to 0 (--target-kl 1e9: it never stops).

    python tgrpo_vla.py --task-id 4 --alpha1 0.3 --alpha2 0.7
    python tgrpo_vla.py --task-id 4 --evaluate --checkpoint runs/.../checkpoints/final
"""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, Literal

import vla_envs  # noqa: F401  # isort: skip  (registers the environments; first, for torch's threads)
import numpy as np
import torch
from torch import Tensor

from vla_envs import distributed
from vla_envs.policies import adapters
from vla_envs.training import arguments, batches, checkpoints, runs, tgrpo_extras

# For --preset paper: its defaults, and the paper's alpha1, alpha2 for LIBERO-Object's tasks 0 to 9.
PAPER_ALPHAS = ((10.0, 1.0), (1.0, 0.1), (10.0, 5.0), (0.35, 0.65), (0.3, 0.7),
                (0.3, 0.7), (10.0, 1.0), (10.0, 1.0), (0.3, 0.7), (0.3, 0.7))  # fmt: skip
PRESETS = {"paper": dict(stop="group", clip=False, update_every="step", update_epochs=1, target_kl=1e9)}


@dataclass
class Args(arguments.CommonArgs):  # --task-id, --policy, --checkpoint, --train, --seed, --resume, ...
    # ---- Algorithm ----
    reward: str = "multi_stage"
    """multi_stage, binary, or path/to/file.py:function"""
    alphas: Literal["given", "auto"] = "given"
    """auto: weigh the two terms in every iteration by how well they predict success"""
    alpha1: float | None = None
    """Weight of the step term [0.3; --preset paper: the paper's for this task]"""
    alpha2: float | None = None
    """Weight of the trajectory term [0.7; --preset paper: the paper's for this task]"""
    group_by: Literal["time", "stage"] = "time"
    """The step term compares members at the same decision, or at their k-th decisions in the same stage"""
    preset: Literal["paper"] | None = None
    """paper: --stop group --no-clip --update-every step --update-epochs 1 --target-kl 1e9, its alphas"""
    return_mode: Literal["held", "sum", "mean"] = "held"
    """A trajectory's reward: the sum until its group ends, over its own steps alone, or their mean"""
    stop: Literal["each", "group"] = "each"
    """each: every environment runs to its own end; group: all stop at a member's success"""
    update_every: Literal["batch", "step"] = "batch"
    """batch: minibatches of the whole batch; step: one update per decision step"""
    clip: bool = True
    """Clip the ratio; --no-clip is the paper's version 1"""
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
    """Decisions per optimiser step (B), unless --update-every step"""
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


def held_rewards(rewards: Tensor, alive: Tensor) -> Tensor:
    """Rewards (T, N), float64; a finished member keeps its last one."""
    held = rewards.double().clone()  # (T, N)
    for t in range(1, len(held)):
        held[t] = torch.where(alive[t].bool(), held[t], held[t - 1])  # (N,)
    return held


def step_advantages(rewards: Tensor, alive: Tensor, group_size: int) -> Tensor:
    """Equation 6, (T, N): rewards of the moment, standardised within groups.

    A finished member keeps its last reward in the statistics; its own advantage is then 0.
    """
    return group_advantages(held_rewards(rewards, alive), group_size, eps=0.0) * alive  # (T, N)


def trajectory_advantages(
    rewards: Tensor, alive: Tensor, group_size: int, return_mode: str = "held"
) -> Tensor:
    """Equation 7, (N,): total rewards of (T, N), standardised within groups. The paper adds no eps to std.

    ``"held"``: a finished member keeps its last reward until its group's last member ends. Summed over its
    own steps (``"sum"``), or as their mean, a member that hovers over the goal would beat one that finishes.
    """
    returns = (rewards.double() * alive).sum(dim=0)  # (N,)
    if return_mode == "held":
        groups = alive.bool().split(max(group_size, 1), dim=1)  # (T, K) each
        playing = torch.cat([its.any(dim=1, keepdim=True).expand_as(its) for its in groups], dim=1)  # (T, N)
        returns = (held_rewards(rewards, alive) * playing).sum(dim=0)  # (N,)
    elif return_mode == "mean":
        returns = returns / alive.sum(dim=0).clamp(min=1)  # (N,), of a group left out 0
    elif return_mode != "sum":
        raise ValueError(f"return_mode is {return_mode!r}; expected held, sum or mean")
    return group_advantages(returns, group_size, eps=0.0)  # (N,)


def tgrpo_advantages(rewards: Tensor, alive: Tensor, group_size: int, alpha1: float, alpha2: float) -> Tensor:
    """Equation 8 in one call, (T, N); 0 where not alive. The loop writes it out, as it logs both terms."""
    step = step_advantages(rewards, alive, group_size)  # (T, N)
    trajectory = trajectory_advantages(rewards, alive, group_size)  # (N,)
    return (alpha1 * step + alpha2 * trajectory) * alive  # (T, N)


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


def stop_groups(batch: dict[str, Any], group_size: int) -> dict[str, Any]:
    """The batch as if every group had stopped at its first success, as in the paper's Algorithm 1."""
    ends = batch["alive"].sum(dim=0)  # (N,) decisions until each member's own end
    first = torch.where(batch["success"], ends, len(batch["alive"])).view(-1, group_size).amin(dim=1)  # (G,)
    first = first.repeat_interleave(group_size)  # (N,)
    before = torch.arange(len(batch["alive"])).unsqueeze(1) < first  # (T, N)
    return batch | {"alive": batch["alive"] & before, "success": batch["success"] & (ends <= first)}


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
    """Equation 9: one optimiser step per minibatch of sample numbers; the means of what was measured."""
    clip_low, clip_high = (args.clip_low, args.clip_high) if args.clip else (float("inf"), float("inf"))
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
    args = arguments.complete_rl(args)
    if args.group_size < 2:
        raise ValueError(f"group_size is {args.group_size}; expected at least 2, to compare members")
    if args.preset and all(getattr(args, name) == getattr(Args, name) for name in PRESETS[args.preset]):
        raise ValueError("preset is for the command line; expected Args(**PRESETS[preset])")
    if not args.clip and (args.clip_low, args.clip_high) != (Args.clip_low, Args.clip_high):
        raise ValueError("--no-clip clips nothing; expected neither --clip-low nor --clip-high with it")
    if args.alphas == "auto" and (args.alpha1 is not None or args.alpha2 is not None):
        raise ValueError("--alphas auto finds alpha1 and alpha2; expected neither of them to be given")
    of_paper = args.preset == "paper" and args.suite == "LiberoObject" and len(args.task_ids) == 1
    default1, default2 = PAPER_ALPHAS[args.task_id] if of_paper else (0.3, 0.7)
    alpha1 = default1 if args.alpha1 is None else args.alpha1
    alpha2 = default2 if args.alpha2 is None else args.alpha2
    if not np.isfinite([alpha1, alpha2]).all() or alpha1 == alpha2 == 0:
        raise ValueError(f"alpha1, alpha2 are {alpha1}, {alpha2}; expected finite numbers, not both 0")
    return dataclasses.replace(args, alpha1=alpha1, alpha2=alpha2) if args.alphas == "given" else args


if __name__ == "__main__":
    args = arguments.parse(Args, validate, PRESETS)
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
        if args.stop == "group":
            batch = stop_groups(batch, args.group_size)
        rewards, alive = batch["rewards"], batch["alive"]  # (T, N), (T, N)
        run.count(batch)

        step = step_advantages(rewards, alive, args.group_size)  # (T, N), equation 6
        if args.group_by == "stage":
            step = tgrpo_extras.by_stage(step_advantages, rewards, alive, args.group_size)  # (T, N)
        trajectory = trajectory_advantages(rewards, alive, args.group_size, args.return_mode)  # (N,), 7
        alpha1, alpha2 = args.alpha1, args.alpha2
        if args.alphas == "auto":
            outcome = group_advantages(batch["success"].float(), args.group_size)  # (N,)
            alpha1, alpha2 = tgrpo_extras.fit_alphas(run.state, step, trajectory, outcome, alive)
        advantages = (alpha1 * step + alpha2 * trajectory) * alive  # (T, N), equation 8

        policy.train()
        warm = iteration / args.warmup_iterations
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(run.left, warm)
        b = samples_of(policy, batch, advantages, args)
        minibatches = batches.minibatches(b, args, by_step=args.update_every == "step")
        with run.iteration_errors():
            losses = update(policy, optimizer, b, minibatches, args)  # equation 9

        groups = (-1, args.group_size)
        still = (step == 0).unflatten(1, groups).all(dim=2)  # (T, G) a step that prefers nobody
        running = alive.unflatten(1, groups).any(dim=2)  # (T, G)
        run.log(losses, {
            "group/kept_frac": batch["success"].float().view(groups).std(dim=1) > 0,
            "group/zero_std_frac": still[running],
            "advantage/step_abs": (alpha1 * step)[alive].abs(),
            "advantage/trajectory_abs": (alpha2 * trajectory).expand(alive.shape)[alive].abs(),
            "advantage/alpha1": alpha1,
            "advantage/alpha2": alpha2,
        })  # fmt: skip
        del batch, b  # so that images of two rollouts are never held at once
    run.finish()  # the trained policy, result.json, how it went
