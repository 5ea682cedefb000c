"""GRPO: fine-tune a vision-language-action policy without a critic, from outcomes alone (arXiv 2402.03300).

A group is K environments that start from the same scene. Its members are compared with one another by the
reward of the whole trajectory: 1 for success, 0 else. The recipe is SimpleVLA-RL's (Li et al. 2025, arXiv
2509.09674): dynamic sampling, a higher clip above than below, sampling at a raised temperature, no KL term.

Symbols: G groups, K members a group, N = G*K environments (environment i is in group i // K), T decision
steps (one executes C control steps), D action tokens a decision, S samples (decisions of those alive), B of
them in a minibatch. Arrays are time-major, (T, N). alive[t, i]: i had not finished before decision t.

    advantage    A_i = (R_i - mean_i R_i) / std_i R_i of the total rewards R_i      group_advantages
                 or, with --credit stage, one for each stage that a member enters   stage_credit
    objective    1/M sum_i 1/|o_i| sum_t 1/D sum_d min(ratio A_i, clip(ratio) A_i)  policy_loss
    penalty      beta (p_ref / p - 1 - log p_ref / p), the k3 estimate of the KL    update

Where we depart from the recipe, or it is silent:
 1. Dynamic sampling trains on every group whose success rate is within --keep-low and --keep-high; those
    missing to --num-groups are played anew, for at most --max-rounds rounds.
 2. The loss is averaged over tokens and decisions within a trajectory, then over trajectories; one ratio a
    token (--ratio-level action: one a decision).
 3. The policy decides a chunk of C control steps at once.
 4. Every group has a scene of its own, drawn from LIBERO's regions; evaluation is on the 50 recorded init
    states, which training never sees.
 5. An update stops early when it has moved the policy by --target-kl; the learning rate is warmed up, then
    falls linearly to 0.

    python grpo_vla.py --task-id 4
    python grpo_vla.py --task-id 4 --evaluate --checkpoint runs/.../checkpoints/final
"""

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
from vla_envs.policies import adapters
from vla_envs.training.credit import in_order, stage_credit


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
    reward: str = "binary"
    """binary, multi_stage, or path/to/file.py:function"""
    credit: Literal["trajectory", "stage"] = "trajectory"
    """A decision is credited with its trajectory's reward, or with whether its stage led to a later one"""
    keep_low: float = 0.1
    """Least success rate of a group that dynamic sampling keeps"""
    keep_high: float = 0.9
    """Greatest success rate of a group that dynamic sampling keeps"""
    max_rounds: int = 4
    """Rollouts of all groups an iteration, at most, until --num-groups groups are kept"""
    total_env_steps: int | None = None
    """Control steps, to an iteration's end [120000, of several tasks 60000 each, or --num-iterations]"""
    num_iterations: int | None = None
    """Iterations; with --total-env-steps too, what is reached first ends the run [as many as that takes]"""
    num_groups: int | None = None
    """Groups a batch (G), each on a scene of its own [8, or 2 for each of --task-ids]"""
    group_size: int = 8
    """Members a group (K)"""
    learning_rate: float = 1.5e-4
    """AdamW's greatest learning rate; it falls linearly to 0"""
    warmup_iterations: int = 3
    """Iterations over which the learning rate grows to its value"""
    update_epochs: int = 3
    """Passes over a batch"""
    minibatch_size: int = 256
    """Decisions an optimiser step (B)"""
    micro_batch_size: int | None = None
    """Decisions that go through the policy at once; gradients of a minibatch's add up [all of them]"""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - this"""
    clip_high: float = 0.28
    """The ratio is clipped at 1 + this"""
    ratio_level: Literal["token", "action"] = "token"
    """One ratio a token, or one for the whole decision"""
    kl_coef: float = 0.0
    """Weight of the k3 KL divergence from the policy with its adapter off (beta); needs --train lora"""
    target_kl: float = 0.04
    """An update stops when its approximate KL a ratio exceeds this"""
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


def rollout(envs: Any, policy: Any, seeds: Any, temperature: float, draws: Any = None) -> dict[str, Any]:
    """Play an episode from each scene of ``seeds`` (N,) in so many environments, each with its generator.

    Returns:
        (T, N, ...) tensors image, state, tokens, logprobs, rewards, alive, stages, steps (control steps);
        (N,) success, diverged; last, the observation after the end; instructions; policy_s, seconds deciding.
    """
    alive = np.arange(envs.num_envs) < len(seeds)  # one for every environment; what is returned has N
    padded = [int(s) for s in seeds] + [None] * (envs.num_envs - len(seeds))
    obs, _ = envs.reset(seed=padded, options={"reset_mask": alive})
    decisions: list[dict[str, Any]] = []
    policy_s = 0.0
    while alive.any():
        start = time.perf_counter()
        actions, tokens, logprobs = act(envs, policy, obs, np.flatnonzero(alive), temperature, draws)
        policy_s += time.perf_counter() - start
        steps = envs.steps  # (N,)
        next_obs, reward, terminated, truncated, info = envs.step(actions)
        decisions.append({
            "image": obs["image"], "state": obs["state"], "tokens": tokens, "logprobs": logprobs,
            "rewards": np.where(alive, reward, 0.0).astype(np.float32), "alive": alive,
            "stages": info["stage"], "steps": np.where(alive, envs.steps - steps, 0),
        })  # fmt: skip
        alive = alive & ~terminated & ~truncated  # finished environments leave the batch
        obs = next_obs
    batch: dict[str, Any] = {
        name: torch.stack([torch.as_tensor(decision[name]) for decision in decisions])[:, : len(seeds)]
        for name in decisions[0]
    }  # (T, N, ...)
    batch["success"] = torch.from_numpy(terminated[: len(seeds)].copy())  # (N,)
    batch["last"] = {name: torch.as_tensor(array[: len(seeds)]) for name, array in obs.items()}  # (N, ...)
    batch["instructions"] = envs.instructions[: len(seeds)]
    batch["policy_s"] = policy_s
    return runs.leave_out_diverged(batch, seeds, info["diverged"][: len(seeds)])


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


def collect(envs: Any, policy: Any, iteration: int, args: Args) -> dict[str, Any]:
    """Dynamic sampling: play groups until ``num_groups`` teach something; every one that does is kept.

    A group whose members all succeed, or all fail, has advantage 0: another is played instead, in the next of
    at most ``max_rounds`` rounds. The batch of the kept groups; its ``totals``, and the flags ``kept`` and
    ``zero_std``, are of all that were played.
    """
    batches: list[dict[str, Any]] = []
    equal: list[Tensor] = []  # groups whose members all got the same
    useful: list[Tensor] = []  # groups that are kept
    missing, rounds = args.num_groups, 0  # of all processes, which join every round
    while missing and rounds < args.max_rounds:
        rounds += 1
        scenes, generators = runs.deal(args, iteration, rounds, missing)  # (N,), (N,)
        if len(scenes):  # else the other processes play all that is missing, from now on
            batches.append(rollout(envs, policy, scenes, args.temperature, generators))
            rate = batches[-1]["success"].float().view(-1, args.group_size).mean(dim=1)  # (G,)
            returns = batches[-1]["rewards"].sum(dim=0).view(-1, args.group_size)  # (G, K)
            equal.append(returns.std(dim=1) <= 1e-6)  # (G,)
            useful.append(~equal[-1] & (rate >= args.keep_low) & (rate <= args.keep_high))  # (G,)
        missing = args.num_groups - distributed.total(int(torch.cat(useful).sum()))
    batch = runs.join_batches(batches, [each.repeat_interleave(args.group_size) for each in useful])
    batch["totals"] = runs.totals(batches)
    kept, zero_std = (distributed.gather(torch.cat(flags)) for flags in (useful, equal))  # (rounds * G,)
    return batch | {"kept": kept, "zero_std": zero_std}


# ---- Learning ----------------------------------------------------------------------------------------


def logprobs_of(policy: Any, b: dict[str, Any], inds: Tensor, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (B, D) and entropies (B, D) of samples ``inds`` (B,), and hidden states (B, H)."""
    obs = {name: b[name][inds] for name in ("image", "state")}
    tokens = b["tokens"][inds].to(args.device)  # (B, D)
    instructions = [b["instructions"][i] for i in b["who"][inds].tolist()]
    logprobs, entropy, hidden = policy.evaluate(obs, instructions, tokens, args.temperature)
    return (logprobs if args.ratio_level == "token" else logprobs.sum(dim=1, keepdim=True)), entropy, hidden


def samples_of(policy: Any, batch: dict[str, Any], advantages: Tensor, args: Args) -> dict[str, Any]:
    """The S decisions of those alive, with log-probs from the forward pass that trains.

    So the first ratio is 1 whatever rounding the rollout had; ``logprob_gap`` is that rounding.
    """
    when, who = torch.nonzero(batch["alive"], as_tuple=True)  # (S,), (S,)
    b = {name: batch[name][when, who] for name in ("image", "state", "tokens", "logprobs")}  # (S, ...)
    b |= {"when": when, "who": who, "instructions": batch["instructions"]}
    b["advantages"] = advantages[when, who].to(args.device)  # (S,)
    lengths = batch["alive"].sum(dim=0)  # (N,)
    b["weights"] = (1.0 / lengths)[who].to(args.device)  # (S,) 1 / |o_i|: trajectories count alike
    with torch.no_grad():
        parts = [
            logprobs_of(policy, b, inds, args)[0]
            for inds in distributed.cut(torch.arange(len(who)), args.micro_batch_size or args.minibatch_size)
        ]
    rolled_out = b["logprobs"] if args.ratio_level == "token" else b["logprobs"].sum(dim=1, keepdim=True)
    b["old_logprobs"] = torch.cat(parts) if parts else rolled_out.to(args.device)  # (S, D); none: S is 0
    b["logprob_gap"] = float(distributed.gather((b["old_logprobs"].cpu() - rolled_out).abs()).max())
    return b


def update(policy: Any, optimizer: Any, b: dict[str, Any], minibatches: Any, args: Args) -> dict[str, float]:
    """One optimiser step a minibatch of sample numbers; the means of what was measured on the way."""
    logs: dict[str, list[float]] = {}
    for mb_inds in minibatches:
        optimizer.zero_grad()
        measured: dict[str, Any] = {}
        mb_weight = distributed.total(b["weights"][mb_inds].sum())  # of all processes
        distributed.keep_up(policy, b, pieces := distributed.cut(mb_inds, args.micro_batch_size))
        for inds in pieces:  # their gradients add up
            newlogprob, entropy, _ = logprobs_of(policy, b, inds, args)  # (B, D), (B, D)
            old_logprob, weights = b["old_logprobs"][inds], b["weights"][inds]  # (B, D), (B,)
            pg_loss, parts = policy_loss(
                newlogprob, old_logprob, b["advantages"][inds], weights, args.clip_low, args.clip_high
            )
            loss = pg_loss
            if args.kl_coef:
                with torch.no_grad(), adapters.adapter_off(policy):
                    reference, _, _ = logprobs_of(policy, b, inds, args)  # (B, D)
                log_ref = (reference - newlogprob).clamp(-20.0, 20.0)  # (B, D)
                k3 = (log_ref.exp() - 1.0 - log_ref).mean(dim=1)  # (B,)
                kl = (weights / weights.sum() * k3).sum()
                loss = loss + args.kl_coef * kl
                parts["kl"] = kl
            share = weights.sum() / mb_weight  # of the minibatch; 1 where it is not split
            (loss * share).backward()
            parts |= {"loss": loss, "policy_loss": pg_loss, "entropy": entropy.mean()}
            parts["logprob"] = (weights / weights.sum() * newlogprob.mean(dim=1)).sum()
            measured = {k: measured.get(k, 0.0) + share * value.detach() for k, value in parts.items()}
        measured = distributed.add_up(measured)
        runs.check_finite(loss=measured.pop("loss"))
        distributed.add_up_gradients(optimizer)
        norms = distributed.clip_gradients(optimizer, args.max_grad_norm)
        runs.check_finite(gradient=torch.stack(norms).max())
        measured["grad_norm"] = norms[0]
        for name, value in measured.items():
            logs.setdefault(name, []).append(float(value))
        if measured["approx_kl"] > args.target_kl:
            break  # before the step that would go further
        optimizer.step()
    distributed.gather_parameters(policy)
    with torch.no_grad():
        after = [logprobs_of(policy, b, inds, args)[0].mean().item() for inds in pieces[-1:]]
    runs.check_finite(**{"log-prob after the update": distributed.total(sum(after))})
    means = {name: float(np.mean(values)) for name, values in logs.items()}
    means["optimizer_steps"] = sum(kl <= args.target_kl for kl in logs["approx_kl"])
    return means | {"logprob_gap": b["logprob_gap"], "ratio_first_minibatch": logs["ratio"][0]}


def check(args: Args) -> Args:
    """Fill in what was left open; a ValueError says which argument does not fit, and what was expected."""
    if args.group_size < 2:
        raise ValueError(f"group_size is {args.group_size}; expected at least 2, to compare members")
    if not 0 <= args.keep_low <= args.keep_high <= 1:
        raise ValueError(
            f"keep_low, keep_high are {args.keep_low}, {args.keep_high}; expected 0 <= low <= high <= 1"
        )
    if args.credit == "stage" and args.reward not in ("binary", "multi_stage"):
        raise ValueError(f"--credit stage is for the reward binary or multi_stage, not {args.reward}")
    runs.check_numbers(args, "max_rounds", above=True)
    args = runs.fill_in_evaluation(runs.fill_in_length(args))
    runs.check_training(args)
    return args


if __name__ == "__main__":
    args = runs.parse_args(Args)
    with runs.one_line_errors():
        args = check(runs.load_args(args) if args.resume else args)
        distributed.start(args.device)
        policy = runs.starting_policy(args)
        args = runs.fill_in_chunk(args, policy)
        torch.manual_seed(args.seed)  # of a LoRA adapter's first weights
        below = runs.adapters_below(args)  # adapters of single tasks, where one is trained above them
        policy = learner = adapters.make_trainable(policy, args.train, args.lora_rank, args.last_k, below)
        optimizer = torch.optim.AdamW(
            [p for p in policy.parameters() if p.requires_grad], lr=args.learning_rate, weight_decay=0.0
        )
        protocol = evaluation.settings(args.protocol, args.suite, policy) | {"num_threads": args.num_threads}
        states = np.repeat(args.task_ids, args.eval_episodes).tolist()  # the task of each
        eval_envs = distributed.only_first(make_envs)(len(states), states, "binary", args, **protocol)
        played = [args.task_id] if args.evaluate else runs.shared_out(args)  # the task of each environment
        envs = make_envs(len(played), played, args.reward, args, image_size=policy.image_size)
        run, state = runs.start(args, __file__, learner, optimizer)
    if args.evaluate:
        evaluation.evaluate_only(evaluate, eval_envs, policy, run, args)
        raise SystemExit

    writer = runs.make_writer(run, state["env_steps"] + 1 if args.resume else None)
    assess = partial(evaluation.assess, evaluate, eval_envs, policy, run, writer, args)
    started = time.perf_counter() - state["wall_s"]
    if state["before"] is None:
        state["before"] = state["after"] = assess(state, state["env_steps"])
        runs.save_training_state(run / "checkpoints" / "latest", learner, optimizer, state)
    progress = runs.progress_bar("GRPO", state, args)
    runs.since_last(envs)  # making them was no iteration's
    while (done := runs.done(state, args)) < 1.0:
        iteration = state["iteration"] = state["iteration"] + 1
        runs.seed_all(args.seed, iteration)  # so that a resumed run draws the same numbers
        start = time.perf_counter()
        policy.eval()
        batch = collect(envs, policy, iteration, args)
        totals = batch["totals"]
        state["env_steps"] += totals["control_steps"]
        state["episodes"] += totals["episodes"]
        if not batch["kept"].any():
            won = f"{totals['successes']} of {totals['episodes']} episodes succeed"
            tqdm.write(
                f"iteration {iteration}: {won}, and in no group between {args.keep_low:g} and"
                f" {args.keep_high:g} of its members; nothing to learn from, so training ends (where all"
                " fail, start from a better --checkpoint)"
            )
            break
        if args.credit == "stage":
            advantages = stage_credit(in_order(batch["stages"]), batch["alive"], args.group_size)  # (T, N)
        else:
            advantages = group_advantages(batch["rewards"].sum(dim=0), args.group_size)  # (N,)
            advantages = advantages.expand_as(batch["rewards"])  # (T, N)
        rollout_s = time.perf_counter() - start

        start = time.perf_counter()
        policy.train()
        fraction = min(1.0 - done, iteration / args.warmup_iterations)
        optimizer.param_groups[0]["lr"] = args.learning_rate * fraction
        b = samples_of(policy, batch, advantages, args)
        minibatches = runs.minibatches(batch, args)
        with runs.one_line_errors(f"iteration {iteration}, last good state in {run}/checkpoints/latest: "):
            losses = update(policy, optimizer, b, minibatches, args)
        update_s = time.perf_counter() - start

        if args.eval_every and iteration % args.eval_every == 0:
            state["after"] = assess(state, state["env_steps"])
        state["wall_s"] = time.perf_counter() - started
        scalars = {
            **runs.charts(totals, state),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "group/kept_frac": float(batch["kept"].float().mean()),
            "group/zero_std_frac": float(batch["zero_std"].float().mean()),
            **runs.since_last(envs),
            "time/rollout_s": rollout_s,
            "time/update_s": update_s,
        } | {f"losses/{name}": value for name, value in losses.items()}
        runs.log(writer, progress, scalars, state, args)
        runs.save_training_state(run / "checkpoints" / "latest", learner, optimizer, state)
    progress.close()

    if state["evaluated"] != state["iteration"]:
        state["after"] = assess(state, state["env_steps"])
        state["wall_s"] = time.perf_counter() - started
        runs.save_training_state(run / "checkpoints" / "latest", learner, optimizer, state)
    runs.finish(run, policy, state, args)
    for each in (envs, eval_envs, writer):
        each.close()
