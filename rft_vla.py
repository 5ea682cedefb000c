"""RFT: fine-tune a vision-language-action policy by imitation of its own successes, and iRe-VLA (--stages).

Rejection-sampling fine-tuning, or filtered cloning: play, keep the episodes that succeed, imitate what was
decided in them, play again. With --stages each of these imitations comes after RL of the action head alone,
while the rest is frozen, as in iRe-VLA (Guo et al. 2025, arXiv 2501.16664).

Symbols: G groups of the same placement, K members per group, N = G*K environments (environment i is in group
i // K), T decision steps (one executes C control steps), D action tokens per decision, S decisions taken
(samples), B of them in a minibatch. Arrays are time-major, (T, N). alive[t, i]: member i had not finished
before decision t; |o_i|: how many it took.

    imitation    mean over successful i of 1/|o_i| sum_t mean_d log pi(token_itd)   imitation_loss, update
                 and, with --demos, the policy's own loss of demonstrated actions   demos_loss
    --stages     before that, of the head: A_i = (R_i - mean R) / std R,            group_advantages
                 mean_i 1/|o_i| sum_t mean_d min(ratio A_i, clip(ratio) A_i)        policy_loss, update

What filtered cloning leaves open, and what is not known of iRe-VLA, whose code is not public:
 1. Filtered cloning imitates the successes of its own rollout. iRe-VLA keeps all that there have been; with
    --stages as many as the rollout has are drawn from them.
 2. A token is imitated by its own log-probability, whatever the policy's loss of demonstrations is; of flow
    that is the log-density of the chain of denoising steps. Successes count alike, whatever their length.
 3. iRe-VLA's RL is PPO with a critic; here members of a group are compared, as in grpo_vla.py. How many
    iterations of it come before an imitation is not known; here it is one, on the iteration's episodes.
 4. Every group has a placement of its own, drawn from LIBERO's regions; evaluation is on the 50 recorded init
    states, which training never sees.
 5. An update stops early when it has moved the policy by --target-kl, except for an imitation of --stages,
    whose episodes earlier policies have played; the learning rate is warmed up, then falls linearly to 0.

    python rft_vla.py --task-id 4
    python rft_vla.py --task-id 4 --stages --demos demos
    python rft_vla.py --task-id 4 --evaluate --checkpoint runs/.../checkpoints/final
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import vla_envs  # noqa: F401  # isort: skip  (registers the environments; first, for torch's threads)
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vla_envs import distributed
from vla_envs.demos import demonstrations
from vla_envs.policies.protocol import cameras_of
from vla_envs.tasks import get_task
from vla_envs.training import arguments, batches, checkpoints, replays, runs


@dataclass
class Args(arguments.CommonArgs):  # --task-id, --policy, --checkpoint, --train, --seed, --resume, ...
    # ---- Algorithm ----
    stages: bool = False
    """iRe-VLA: RL of the action head alone, then imitation by all that is trained, in every iteration"""
    demos: Path | None = None
    """Folder of demonstrations, as sft_vla.py takes it: imitated too, as much as the successes"""
    total_env_steps: int | None = None
    """Control steps of training [120000; of several tasks 60000 each; or --num-iterations]"""
    num_iterations: int | None = None
    """Iterations; with --total-env-steps too, the one reached first ends the run [as many as that takes]"""
    num_groups: int | None = None
    """Groups per batch (G), each on a placement of its own [64; with --stages 8]"""
    group_size: int | None = None
    """Members per group (K) [1; with --stages 8]"""
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
    """With --stages: the ratio is clipped at 1 - this"""
    clip_high: float = 0.28
    """With --stages: the ratio is clipped at 1 + this"""
    ratio_level: Literal["token", "action"] = "token"
    """With --stages: one ratio per token, or one for the whole decision"""
    target_kl: float = 0.04
    """An update stops when its approximate KL per ratio exceeds this"""
    max_grad_norm: float = 1.0
    """The gradient is clipped at this norm"""


# ---- Advantages and losses: pure functions of tensors --------------------------------------------------


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


def load_demos(policy: Any, args: Args) -> dict[str, Any] | None:
    """The samples of --demos, of all its demonstrations of each task."""
    tasks = [get_task(args.suite, task_id) for task_id in args.task_ids]
    chunk = getattr(policy, "imitation_chunk", policy.action_chunk)  # it may predict more than it executes
    load = demonstrations.load_demonstrations
    demos = [load(args.demos, task, None, chunk, 1, cameras_of(policy)) for task in tasks if args.demos]
    return demonstrations.samples(tasks, demos, policy.image_size) if demos else None


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


def demos_loss(policy: Any, demos: dict[str, Any], args: Args) -> Tensor:
    """The policy's own loss of demonstrated actions, of as many samples as a minibatch has."""
    drawn = torch.randint(len(demos["actions"]), (args.minibatch_size,))  # the same in all processes
    inds = drawn[distributed.block(args.minibatch_size)].numpy()  # this process's share
    obs = {name: demos[name][inds] for name in batches.OBSERVED if name in demos}
    instructions = [demos["instructions"][i] for i in inds]
    loss = policy.imitation_loss(obs, instructions, torch.as_tensor(demos["actions"][inds]))
    return loss * len(inds) / args.minibatch_size


def update(
    policy: Any, optimizer: Any, b: dict[str, Any], minibatches: Any, args: Args, imitate: bool = True,
    demos: dict[str, Any] | None = None,
) -> dict[str, float]:  # fmt: skip
    """One optimiser step per minibatch of sample numbers; the means of what was measured.

    ``imitate``: what was decided becomes likelier; else by its advantage, and only the head is trained.
    """
    clip_low, clip_high = args.clip_low, args.clip_high
    own = not (imitate and args.stages)  # played by the policy that is updated; else by earlier ones too
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(imitate or parameter in set(policy.head.parameters()))
    meter, optimizer_steps = runs.Meter(), 0
    for mb_inds in minibatches:
        optimizer.zero_grad()
        for inds, share in distributed.micro_batches(policy, b, mb_inds, args.micro_batch_size):
            newlogprob, entropy, _ = logprobs_of(policy, b, inds, args)  # (B, D), (B, D)
            weights = b["weights"][inds]  # (B,)
            pg_loss, measured = policy_loss(
                newlogprob, b["old_logprobs"][inds], b["advantages"][inds], weights, clip_low, clip_high
            )
            loss = imitation_loss(newlogprob, weights) if imitate else pg_loss
            (loss * share).backward()
            measured["logprob"] = (weights / weights.sum() * newlogprob.mean(dim=1)).sum()
            told = {name: value for name, value in measured.items() if own or name == "logprob"}
            meter.add(share, loss=loss, policy_loss=loss, entropy=entropy.mean(), **told)
        if demos:
            loss = demos_loss(policy, demos, args)
            loss.backward()
            meter.add(1.0, demos_loss=loss)
        norms = distributed.clip_gradients(optimizer, args.max_grad_norm)
        figures = meter.end_minibatch(*norms)  # of all processes; refuses what is not finite
        if own and figures["approx_kl"] > args.target_kl:
            break  # before the step that would go further
        optimizer.step()
        optimizer_steps += 1
    for parameter in trained:
        parameter.requires_grad_(True)
    meter.end_update(policy, b["instructions"])
    return meter.means() | b["measured"] | {"optimizer_steps": optimizer_steps}


def validate(args: Args) -> Args:
    """Fill in what was left open; a ValueError says which argument does not fit, and what was expected."""
    groups, members = (8, 8) if args.stages else (64, 1)
    groups = groups if args.num_groups is None else args.num_groups
    members = members if args.group_size is None else args.group_size
    args = arguments.complete_rl(dataclasses.replace(args, num_groups=groups, group_size=members))
    if members < 1 + args.stages:
        raise ValueError(f"group_size is {members}; expected at least {1 + args.stages}")
    of_rl = ("clip_low", "clip_high", "ratio_level")
    if not args.stages and any(getattr(args, name) != getattr(Args, name) for name in of_rl):
        raise ValueError(
            "clip_low, clip_high and ratio_level are of RL; expected none of them without --stages"
        )
    if args.stages and (args.shared_adapter or not args.train.endswith(("all", "head"))):
        raise ValueError(
            "--stages trains the head first; expected --train all, head or lora+head, got"
            f" {args.train}{' and --shared-adapter' * bool(args.shared_adapter)}"
        )
    return args


if __name__ == "__main__":
    args = arguments.parse(Args, validate)
    with runs.one_line_errors():
        policy = checkpoints.starting_policy(args)
        args = arguments.fill_in_chunk(args, policy)
        policy = checkpoints.prepare(policy, args)  # --train says what is trained
        if args.stages and not hasattr(policy, "head"):
            raise ValueError(
                f"--stages trains the head first; policy {args.policy!r} has no module of that name"
            )
        demos = load_demos(policy, args)
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
        eval_envs = runs.make_eval_envs(args, policy)
        envs = runs.make_envs(args, policy)
        run = runs.Run(args, __file__, policy, optimizer, envs, eval_envs)  # new, or resumed
        if args.stages and not args.evaluate:
            successes = replays.Successes(run.folder / "successes", run.state["iteration"])
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
        of_head: dict[str, Any] = {}
        if args.stages:
            advantages = group_advantages(batch["rewards"].sum(dim=0), args.group_size)  # (N,)
            b = samples_of(policy, batch, advantages.expand_as(batch["rewards"]), args)
            with run.iteration_errors():
                of_head = update(policy, optimizer, b, batches.minibatches(b, args), args, imitate=False)
        won = batch | {"alive": batch["alive"] & batch["success"]}  # only what led to a success
        won = successes.exchange(batch, iteration) if args.stages else won  # as many of all so far
        b = samples_of(policy, won, torch.zeros_like(won["rewards"]), args)
        minibatches = batches.minibatches(b, args)
        with run.iteration_errors():
            losses = update(policy, optimizer, b, minibatches, args, demos=demos)

        run.log(losses, {"group/kept_frac": batch["success"], **{f"head/{k}": of_head[k] for k in of_head}})
        del batch, won, b  # of a rollout's images, only those that are kept are held beside the next one's
    run.finish()  # the trained policy, result.json, how it went
