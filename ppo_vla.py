"""PPO: fine-tune a vision-language-action policy with a critic (Schulman et al. 2017, arXiv 1707.06347).

The critic is a small network on the policy's own last hidden state at the first action token, as in RL4VLA
(Liu et al. 2025, arXiv 2505.19789). Every environment has a scene of its own; there are no groups.

Symbols: N environments (--num-groups times --group-size), T decision steps (one executes C control steps),
D action tokens a decision, S samples (decisions of those alive), B of them in a minibatch, H the width of the
hidden state. Arrays are time-major, (T, N). alive[t, i]: i had not finished before decision t.

    advantage    A_t = sum_l (gamma lambda)^l (r_t+l + gamma V_t+l+1 - V_t+l)        gae
    objective    mean of min(ratio A, clip(ratio) A)                                 policy_loss
    critic       mean of max((V - R)^2, (clip(V) - R)^2) / 2, with R_t = A_t + V_t   value_loss

Details that decide:
 1. A time-out is no end: its value is bootstrapped from the observation after it; only success ends.
 2. Old log-probs and values come from the forward pass that trains, so the first ratio is 1.
 3. The critic learns alone for --critic-warmup iterations, at a learning rate of its own; only then does the
    policy's grow. Its gradient stops at the hidden state, so that it cannot spoil the policy.
 4. Advantages are standardised over the batch.
 5. One ratio a token (--ratio-level action: one a decision), clipped further above than below.
 6. The policy decides a chunk of C control steps at once.
 7. Scenes are drawn from LIBERO's regions; evaluation is on the 50 recorded init states, which training
    never sees.
 8. An update stops early when it has moved the policy by --target-kl; the learning rate is warmed up, then
    falls linearly to 0.

    python ppo_vla.py --task-id 4
    python ppo_vla.py --task-id 4 --evaluate --checkpoint runs/.../checkpoints/final
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
from torch import Tensor, nn

from vla_envs import distributed, evaluation, runs
from vla_envs.policies import adapters


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
    gamma: float = 0.99
    """Discount a decision"""
    gae_lambda: float = 0.95
    """GAE's lambda"""
    value_learning_rate: float = 3e-3
    """The critic's learning rate"""
    value_clip: float = 0.2
    """A value moves by at most this from the old one before its loss stops falling"""
    critic_warmup: int = 2
    """Iterations in which only the critic learns, at most all but the run's last"""
    total_env_steps: int | None = None
    """Control steps, to an iteration's end [120000, of several tasks 60000 each, or --num-iterations]"""
    num_iterations: int | None = None
    """Iterations; with --total-env-steps too, what is reached first ends the run [as many as that takes]"""
    num_groups: int = 64
    """Scenes a batch (G)"""
    group_size: int = 1
    """Environments of the same scene (K)"""
    learning_rate: float = 1e-4
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


def make_critic(policy: Any) -> nn.Module:
    """Hidden states (B, H) to values (B, 1); 0 at first."""
    critic = nn.Sequential(nn.Linear(policy.hidden_size, 256), nn.GELU(), nn.Linear(256, 1))
    nn.init.zeros_(critic[-1].weight)
    nn.init.zeros_(critic[-1].bias)
    return critic


# ---- Learning ----------------------------------------------------------------------------------------


def logprobs_of(policy: Any, b: dict[str, Any], inds: Tensor, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (B, D) and entropies (B, D) of samples ``inds`` (B,), and hidden states (B, H)."""
    obs = {name: b[name][inds] for name in ("image", "state")}
    tokens = b["tokens"][inds].to(args.device)  # (B, D)
    instructions = [b["instructions"][i] for i in b["who"][inds].tolist()]
    logprobs, entropy, hidden = policy.evaluate(obs, instructions, tokens, args.temperature)
    return (logprobs if args.ratio_level == "token" else logprobs.sum(dim=1, keepdim=True)), entropy, hidden


def samples_of(policy: Any, critic: nn.Module, batch: dict[str, Any], args: Args) -> dict[str, Any]:
    """The S decisions of those alive, with log-probs and values from the forward pass that trains.

    So the first ratio is 1 whatever rounding the rollout had; ``logprob_gap`` is that rounding.
    """
    when, who = torch.nonzero(batch["alive"], as_tuple=True)  # (S,), (S,)
    b = {name: batch[name][when, who] for name in ("image", "state", "tokens", "logprobs")}  # (S, ...)
    b |= {"when": when, "who": who, "instructions": batch["instructions"]}
    b["weights"] = torch.ones(len(who), device=args.device)  # (S,) decisions count alike
    most = args.micro_batch_size or args.minibatch_size
    last = {"tokens": batch["tokens"][0], "instructions": batch["instructions"]}  # any: the first sees none
    last |= batch["last"] | {"who": torch.arange(len(last["tokens"]))}  # (N, ...)
    with torch.no_grad():
        parts, last_parts = (
            [logprobs_of(policy, x, inds, args) for inds in distributed.cut(torch.arange(count), most)]
            for x, count in ((b, len(who)), (last, len(last["who"])))
        )
        values_of, last_values_of = (
            [critic(hidden.float()).squeeze(1) for _, _, hidden in some] for some in (parts, last_parts)
        )
    b["old_values"] = torch.cat(values_of) if parts else b["weights"]  # (S,); none: S is 0
    last_values = torch.cat(last_values_of).cpu()  # (N,)
    rolled_out = b["logprobs"] if args.ratio_level == "token" else b["logprobs"].sum(dim=1, keepdim=True)
    b["old_logprobs"] = torch.cat([x for x, _, _ in parts]) if parts else rolled_out.to(args.device)  # (S, D)
    b["logprob_gap"] = float(distributed.gather((b["old_logprobs"].cpu() - rolled_out).abs()).max())
    ends = batch["alive"] & ~torch.cat([batch["alive"][1:], torch.zeros_like(batch["alive"][:1])])  # (T, N)
    values = torch.zeros_like(batch["rewards"]).index_put((when, who), b["old_values"].cpu())  # (T, N)
    advantages, returns = gae(
        batch["rewards"], values, ends & batch["success"], last_values, args.gamma, args.gae_lambda
    )  # (T, N), (T, N)
    alive = advantages[when, who]  # (S,)
    all_alive = distributed.gather(alive)  # of all processes
    alive = (alive - all_alive.mean()) / (all_alive.std(correction=0) + 1e-6)  # (S,)
    b["advantages"] = alive.to(args.device)  # (S,)
    b["returns"] = returns[when, who].to(args.device)  # (S,)
    unexplained, variance = (
        distributed.gather(x).var(correction=0) for x in (b["returns"] - b["old_values"], b["returns"])
    )
    b["explained_variance"] = float(1.0 - unexplained / variance) if variance > 1e-6 else 0.0
    return b


def update(
    policy: Any, critic: Any, optimizer: Any, b: dict[str, Any], minibatches: Any, alone: bool, args: Args
) -> dict[str, float]:
    """One optimiser step a minibatch of sample numbers; the means of what was measured on the way.

    ``alone``: only the critic learns.
    """
    logs: dict[str, list[float]] = {}
    for mb_inds in minibatches:
        optimizer.zero_grad()
        measured: dict[str, Any] = {}
        mb_weight = distributed.total(b["weights"][mb_inds].sum())  # of all processes
        pieces = distributed.cut(mb_inds, args.micro_batch_size)
        distributed.keep_up(policy, b, [] if alone else pieces)
        for inds in pieces:  # their gradients add up
            newlogprob, entropy, hidden = logprobs_of(policy, b, inds, args)  # (B, D), (B, D), (B, H)
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
            newvalue = critic(hidden.detach().float()).squeeze(1)  # (B,)
            v_loss = value_loss(newvalue, b["old_values"][inds], b["returns"][inds], args.value_clip)
            loss = v_loss if alone else loss + v_loss
            share = weights.sum() / mb_weight  # of the minibatch; 1 where it is not split
            (loss * share).backward()
            parts |= {"loss": loss, "policy_loss": pg_loss, "entropy": entropy.mean(), "value_loss": v_loss}
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
    means |= {name: b[name] for name in ("logprob_gap", "explained_variance")}
    means["optimizer_steps"] = sum(kl <= args.target_kl for kl in logs["approx_kl"])
    return means | {"ratio_first_minibatch": logs["ratio"][0]}


def check(args: Args) -> Args:
    """Fill in what was left open; a ValueError says which argument does not fit, and what was expected."""
    if not (0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1):
        raise ValueError(f"gamma, gae_lambda are {args.gamma}, {args.gae_lambda}; expected 0 to 1")
    runs.check_numbers(args, "critic_warmup", above=False)
    runs.check_numbers(args, "group_size value_learning_rate value_clip", above=True)
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
        policy = adapters.make_trainable(policy, args.train, args.lora_rank, args.last_k, below)
        critic = make_critic(policy).to(args.device)
        learner = nn.ModuleDict({"policy": policy, "critic": critic})
        optimizer = torch.optim.AdamW(
            [p for p in policy.parameters() if p.requires_grad], lr=args.learning_rate, weight_decay=0.0
        )
        optimizer.add_param_group({"params": critic.parameters(), "lr": args.value_learning_rate})
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
    progress = runs.progress_bar("PPO", state, args)
    runs.since_last(envs)  # making them was no iteration's
    while (done := runs.done(state, args)) < 1.0:
        iteration = state["iteration"] = state["iteration"] + 1
        runs.seed_all(args.seed, iteration)  # so that a resumed run draws the same numbers
        start = time.perf_counter()
        policy.eval()
        scenes, generators = runs.deal(args, iteration, 1, args.num_groups)  # (N,), (N,)
        batch = rollout(envs, policy, scenes, args.temperature, generators)
        totals = runs.totals([batch])
        state["env_steps"] += totals["control_steps"]
        state["episodes"] += totals["episodes"]
        rollout_s = time.perf_counter() - start

        start = time.perf_counter()
        policy.train()
        alone = iteration <= args.critic_warmup and runs.done(state, args) < 1.0
        fraction = min(1.0 - done, max(iteration - args.critic_warmup, 1) / args.warmup_iterations)
        optimizer.param_groups[0]["lr"] = 0.0 if alone else args.learning_rate * fraction
        b = samples_of(policy, critic, batch, args)
        minibatches = runs.minibatches(batch, args)
        with runs.one_line_errors(f"iteration {iteration}, last good state in {run}/checkpoints/latest: "):
            losses = update(policy, critic, optimizer, b, minibatches, alone, args)
        update_s = time.perf_counter() - start

        if args.eval_every and iteration % args.eval_every == 0:
            state["after"] = assess(state, state["env_steps"])
        state["wall_s"] = time.perf_counter() - started
        scalars = {
            **runs.charts(totals, state),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
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
