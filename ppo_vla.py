"""PPO: fine-tune a vision-language-action policy with a critic (Schulman et al. 2017, arXiv 1707.06347).

The critic is a small network on the policy's own last hidden state at the first action token, as in RL4VLA
(Liu et al. 2025, arXiv 2505.19789). By default every environment has a placement of its own.

Symbols: N environments (--num-groups times --group-size), T decision steps (one executes C control steps),
D action tokens per decision, S decisions taken (samples), B of them in a minibatch, H the
width of the hidden state. Arrays are time-major, (T, N). alive[t, i]: i had not finished before decision t.

    advantage    A_t = sum_l (gamma lambda)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l})  gae
    objective    mean of min(ratio A, clip(ratio) A)                                 policy_loss
    critic       mean of max((V - R)^2, (clip(V) - R)^2) / 2, with R_t = A_t + V_t   value_loss

Details that matter:
 1. A time-out is not an end: its value is bootstrapped from the observation after it; only success ends.
 2. Old log-probs and values come from the forward pass that trains, so the first ratio is 1.
 3. The critic learns alone for --critic-warmup iterations, at a learning rate of its own; only then does the
    policy's grow. Its gradient stops at the hidden state, so that it cannot spoil the policy.
 4. Advantages are standardised over the batch.
 5. One ratio per token (--ratio-level action: one per decision), clipped further above than below.
 6. The policy decides a chunk of C control steps at once.
 7. Placements are drawn from LIBERO's regions; evaluation is on the 50 recorded init states, which training
    never sees.
 8. An update stops early when it has moved the policy by --target-kl; the learning rate is warmed up, then
    falls linearly to 0.

    python ppo_vla.py --task-id 4
    python ppo_vla.py --task-id 4 --evaluate --checkpoint runs/.../checkpoints/final
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

import vla_envs  # noqa: F401  # isort: skip  (registers the environments; first, for torch's threads)
import numpy as np
import torch
from torch import Tensor

from vla_envs import distributed
from vla_envs.command_line import check_numbers
from vla_envs.policies import adapters
from vla_envs.training import arguments, batches, checkpoints, runs


@dataclass
class Args(arguments.CommonArgs):  # --task-id, --policy, --checkpoint, --train, --seed, --resume, ...
    # ---- Algorithm ----
    reward: str = "binary"
    """binary, multi_stage, or path/to/file.py:function"""
    gamma: float = 0.99
    """Discount per decision"""
    gae_lambda: float = 0.95
    """GAE's lambda"""
    value_learning_rate: float = 3e-3
    """The critic's learning rate"""
    value_clip: float = 0.2
    """A value moves by at most this from the old one before its loss stops falling"""
    critic_warmup: int = 2
    """Iterations in which only the critic learns; in the run's last one the policy always does"""
    total_env_steps: int | None = None
    """Control steps of training [120000; of several tasks 60000 each; or --num-iterations]"""
    num_iterations: int | None = None
    """Iterations; with --total-env-steps too, the one reached first ends the run [as many as that takes]"""
    num_groups: int = 64
    """Placements per batch (G)"""
    group_size: int = 1
    """Environments of the same placement (K)"""
    learning_rate: float = 1e-4
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


def gae(
    rewards: Tensor, values: Tensor, terminated: Tensor, last_values: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16).

    Args:
        rewards, values: (T, N).
        terminated: (T, N), whether the decision ended the episode by success. What is not terminated at its
            last decision is cut off by the step limit, and bootstrapped.
        last_values: (N,), of the observations after the last decision.
        gamma, gae_lambda: Discounts.

    Returns:
        Advantages (T, N) and returns (T, N), float32.
    """
    if not rewards.shape == values.shape == terminated.shape or last_values.shape != rewards.shape[1:]:
        shapes = [tuple(x.shape) for x in (rewards, values, terminated, last_values)]
        raise ValueError(
            f"rewards, values, terminated, last_values are {shapes}; expected thrice (T, N), and (N,)"
        )
    advantages = torch.zeros_like(values, dtype=torch.float64)  # (T, N)
    following, next_values = torch.zeros_like(last_values, dtype=torch.float64), last_values.double()  # (N,)
    for t in reversed(range(len(rewards))):
        going_on = 1.0 - terminated[t].double()  # (N,)
        delta = rewards[t] + gamma * next_values * going_on - values[t]  # (N,)
        following = advantages[t] = delta + gamma * gae_lambda * going_on * following  # (N,)
        next_values = values[t].double()  # (N,)
    return advantages.float(), (advantages + values).float()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float) -> Tensor:
    """Half the mean squared error of values (B,), the worse of as they are and clipped near the old ones."""
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)  # (B,)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).mean()


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


def make_critic(policy: Any) -> torch.nn.Module:
    """Hidden states (B, H) to values (B, 1); 0 at first."""
    critic = torch.nn.Sequential(
        torch.nn.Linear(policy.hidden_size, 256), torch.nn.GELU(), torch.nn.Linear(256, 1)
    )
    torch.nn.init.zeros_(critic[-1].weight)
    torch.nn.init.zeros_(critic[-1].bias)
    return critic


# ---- Learning ----------------------------------------------------------------------------------------


def logprobs_of(policy: Any, b: dict[str, Any], inds: Tensor, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (B, D), of --ratio-level action (B, 1), entropies (B, D) and hidden states (B, H)."""
    obs = {name: b[name][inds] for name in batches.OBSERVED if name in b}
    tokens = b["tokens"][inds].to(args.device)  # (B, D)
    instructions = [b["instructions"][i] for i in b["who"][inds].tolist()]
    logprobs, entropy, hidden = policy.score(obs, instructions, tokens, args.temperature)
    return (logprobs if args.ratio_level == "token" else logprobs.sum(dim=1, keepdim=True)), entropy, hidden


def samples_of(policy: Any, critic: torch.nn.Module, batch: dict[str, Any], args: Args) -> dict[str, Any]:
    """The batch with what an update needs of each sample: advantage, return, old log-probs and value.

    Old log-probs come from the forward pass that trains, so the first ratio is 1 whatever rounding the
    rollout had; ``logprob_gap`` is that rounding.
    """
    when, who, alive = batch["when"], batch["who"], batch["alive"]  # (S,), (S,), (T, N)
    b = batch | {"weights": torch.ones(len(who), device=args.device)}  # (S,) decisions count alike
    sampled = b["logprobs"] if args.ratio_level == "token" else b["logprobs"].sum(dim=1, keepdim=True)
    b["old_logprobs"] = sampled.to(args.device, copy=True)  # (S, D)
    b["old_values"] = torch.zeros(len(who), device=args.device)  # (S,)
    # The hidden state comes before the first token is known, so any tokens do for the last observation.
    last = batch["last"] | {"tokens": batch["tokens"][:1].expand(alive.shape[1], *batch["tokens"].shape[1:])}
    last |= {"who": torch.arange(alive.shape[1]), "instructions": batch["instructions"]}
    last_values = torch.zeros(alive.shape[1])  # (N,)
    inds = torch.nonzero(alive[when, who]).flatten()  # (up to S,) those that count
    size = args.micro_batch_size or args.minibatch_size
    with torch.no_grad():
        for part in (inds[i : i + size] for i in range(0, len(inds), size)):
            logprobs, _, hidden = logprobs_of(policy, b, part, args)  # (B, D), (B, H)
            b["old_logprobs"][part] = logprobs.float()
            b["old_values"][part] = critic(hidden.float()).squeeze(1)  # (B,)
        for part in last["who"].split(size):
            _, _, hidden = logprobs_of(policy, last, part, args)  # (B, H)
            last_values[part] = critic(hidden.float()).squeeze(1).cpu()  # (B,)
    gaps = (b["old_logprobs"][inds].cpu() - sampled[inds]).abs()  # (up to S, D)
    b["measured"] = {"logprob_gap": float(gaps.max()) if len(inds) else 0.0}

    ends = alive & ~torch.cat([alive[1:], torch.zeros_like(alive[:1])])  # (T, N) each member's last decision
    values = torch.zeros_like(batch["rewards"]).index_put((when, who), b["old_values"].cpu())  # (T, N)
    advantages, returns = gae(
        batch["rewards"], values, ends & batch["success"], last_values, args.gamma, args.gae_lambda
    )  # (T, N), (T, N)
    everyones = distributed.gather(advantages[when, who][inds])  # of all processes
    advantages = (advantages - everyones.mean()) / (everyones.std(correction=0) + 1e-6)  # (T, N)
    b["advantages"] = advantages[when, who].to(args.device)  # (S,)
    b["returns"] = returns[when, who].to(args.device)  # (S,)
    both = torch.stack([b["returns"] - b["old_values"], b["returns"]], dim=1)[inds]  # (up to S, 2)
    unexplained, variance = distributed.gather(both).var(dim=0, correction=0)
    b["measured"]["explained_variance"] = float(1.0 - unexplained / variance) if variance > 1e-6 else 0.0
    return b


def update(
    policy: Any, critic: Any, optimizer: Any, b: dict[str, Any], minibatches: Any, alone: bool, args: Args
) -> dict[str, float]:
    """One optimiser step per minibatch of sample numbers; the means of what was measured.

    ``alone``: only the critic learns.
    """
    clip_low, clip_high = args.clip_low, args.clip_high
    meter, optimizer_steps = runs.Meter(), 0
    for mb_inds in minibatches:
        optimizer.zero_grad()
        for inds, share in distributed.micro_batches(policy, b, mb_inds, args.micro_batch_size, not alone):
            newlogprob, entropy, hidden = logprobs_of(policy, b, inds, args)  # (B, D), (B, D), (B, H)
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
            newvalue = critic(hidden.detach().float()).squeeze(1)  # (B,)
            v_loss = value_loss(newvalue, b["old_values"][inds], b["returns"][inds], args.value_clip)
            measured["value_loss"] = v_loss
            loss = v_loss if alone else loss + v_loss
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
    if not (0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1):
        raise ValueError(f"gamma, gae_lambda are {args.gamma}, {args.gae_lambda}; expected 0 to 1")
    check_numbers(args, "critic_warmup", above=False)
    check_numbers(args, "group_size", "value_learning_rate", "value_clip", above=True)
    return arguments.complete_rl(args)


if __name__ == "__main__":
    args = arguments.parse(Args, validate)
    with runs.one_line_errors():
        policy = checkpoints.starting_policy(args)
        args = arguments.fill_in_chunk(args, policy)
        policy = checkpoints.prepare(policy, args)  # --train says what is trained
        critic = make_critic(policy).to(args.device)
        learner = torch.nn.ModuleDict({"policy": policy, "critic": critic})
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
        optimizer.add_param_group({"params": critic.parameters(), "lr": args.value_learning_rate})
        eval_envs = runs.make_eval_envs(args, policy)
        envs = runs.make_envs(args, policy)
        run = runs.Run(args, __file__, policy, optimizer, envs, eval_envs, learner)  # new, or resumed
    if args.evaluate:
        raise SystemExit(run.evaluate_only())

    for iteration in run.iterations():  # from 1; evaluates on the recorded init states, saves, resumes
        policy.eval()
        seeds, generators = batches.draw_placements(args, iteration)  # (N,), (N,)
        batch = rollout(envs, policy, seeds, args.temperature, generators)
        run.count(batch)

        policy.train()
        alone = iteration <= args.critic_warmup and run.done() < 1.0  # the critic first learns alone
        warm = max(iteration - args.critic_warmup, 1) / args.warmup_iterations
        optimizer.param_groups[0]["lr"] = 0.0 if alone else args.learning_rate * min(run.left, warm)
        b = samples_of(policy, critic, batch, args)
        minibatches = batches.minibatches(b, args)
        with run.iteration_errors():
            losses = update(policy, critic, optimizer, b, minibatches, alone, args)

        run.log(losses, {})
        del batch, b  # so that images of two rollouts are never held at once
    run.finish()  # the trained policy, result.json, how it went
