"""TGRPO: fine-tune a vision-language-action policy without a critic (Chen et al. 2025, arXiv 2506.08440).

A group is K environments that start from the same scene. Its members are compared with one another twice:
by the reward of the moment (step term) and by the reward of the whole trajectory (trajectory term).

Symbols: G groups, K members a group, N = G*K environments (environment i is in group i // K), T decision
steps (one executes C control steps), D action tokens a decision, B samples of a minibatch. Arrays are
time-major, (T, N). alive[t, i]: environment i had not finished before decision t.

    equation 6   S_it = (R_it - mean_i R_it) / std_i R_it     step_advantages
    equation 7   T_i  = the same of the total rewards R_i      trajectory_advantages
    equation 8   Adv_it = alpha1 * S_it + alpha2 * T_i         tgrpo_advantages
    equation 9   J = 1/M sum_i 1/|o_i| sum_t (...)             policy_loss

Where we depart from the paper, or it is silent (a flag restores the paper's letter):
 1. Every environment runs to its own end and is masked afterwards (--stop group: all stop at a success).
 2. The ratio is clipped as in PPO, the paper's version 3 (--no-clip: version 1), one ratio a token
    (--ratio-level action: one a decision).
 3. One epoch of minibatches over the whole batch (--update-every step: Algorithm 1's update a decision step).
 4. A step at which all members get the same reward has advantage 0; the share of such steps is logged.
 5. A trajectory's total reward is the sum over its steps (--return-mode mean: their mean).
 6. The policy decides a chunk of C control steps at once; the step reward is that of the chunk's last one.
 7. Several groups a batch, each on its own scene, drawn from LIBERO's regions; evaluation is on the 50
    recorded init states, which training never sees.
 8. An update stops early when it has moved the policy by --target-kl; the learning rate is warmed up.

    python tgrpo_vla.py --task-id 4 --alpha1 0.3 --alpha2 0.7
    python tgrpo_vla.py --task-id 4 --evaluate --checkpoint runs/.../checkpoints/final
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import vla_envs  # noqa: F401  (registers the environments)
from vla_envs import runs
from vla_envs.policies import adapters, count_parameters, load_policy, save_policy

# The paper's pairs for LIBERO-Object's tasks, by --task-id (its tasks 1 to 10); 0.3, 0.7 elsewhere.
PAPER_ALPHA1 = (10.0, 1.0, 10.0, 0.35, 0.3, 0.3, 10.0, 10.0, 0.3, 0.3)
PAPER_ALPHA2 = (1.0, 0.1, 5.0, 0.65, 0.7, 0.7, 1.0, 1.0, 0.7, 0.7)


@dataclass
class Args:
    # ---- Experiment ----
    seed: int = 1
    """Seed of everything: the same seed gives the same run"""
    run_dir: Path | None = None
    """Folder of this run [runs/<suite>_<task id>__tgrpo_vla__<seed>__<time>]"""
    resume: Path | None = None
    """Folder of a stopped run to go on with, with its own arguments"""
    evaluate: bool = False
    """Only evaluate --checkpoint"""
    eval_every: int = 7
    """Iterations between evaluations; the first comes before training, 0 leaves only first and last"""
    eval_episodes: int = 50
    """Episodes of an evaluation: recorded init states 0, 1, ... (50 are recorded)"""
    eval_temperature: float | None = None
    """Sampling temperature of evaluations; 0 is greedy [--temperature]"""
    device: str = "cpu"
    """Where the policy runs: cpu, cuda, cuda:1, ..."""

    # ---- Environment ----
    suite: str = "LiberoObject"
    """LIBERO suite"""
    task_id: int = 4
    """Task in the suite, from 0"""
    reward: str = "multi_stage"
    """multi_stage, binary, or path/to/file.py:function"""
    assets: str = "builtin"
    """builtin, libero (the folder in LIBERO_ASSETS) or a folder"""
    max_episode_steps: int = 200
    """Control steps until an episode ends without success"""
    action_chunk: int = 8
    """Control steps a decision (C); has to fit the policy"""
    num_threads: int | None = None
    """Simulator threads [one per core]"""

    # ---- Policy ----
    policy: str = "nano"
    """Kind of policy"""
    checkpoint: Path | None = None
    """Folder of the starting checkpoint [the shipped one]"""
    train: str = "all"
    """What is trained: lora, head, lora+head, lora+last-k or all"""
    lora_rank: int = 32
    """LoRA's r"""
    last_k: int = 1
    """Blocks trained in full with --train lora+last-k"""
    temperature: float = 1.2
    """Divides the logits, in rollout and update alike"""

    # ---- Algorithm ----
    alpha1: float | None = None
    """Weight of the step term [the paper's for this task; 0.3 elsewhere]"""
    alpha2: float | None = None
    """Weight of the trajectory term [the paper's for this task; 0.7 elsewhere]"""
    num_iterations: int = 28
    """Iterations of collecting and updating"""
    num_groups: int = 8
    """Groups a batch (G), each on a scene of its own"""
    group_size: int = 8
    """Members a group (K)"""
    learning_rate: float = 7e-4
    """AdamW's learning rate"""
    warmup_iterations: int = 3
    """Iterations over which the learning rate grows to its value"""
    update_epochs: int = 1
    """Passes over a batch"""
    minibatch_size: int = 256
    """Decisions an optimiser step"""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - this"""
    clip_high: float = 0.28
    """The ratio is clipped at 1 + this"""
    clip: bool = True
    """Clip the ratio; --no-clip is the paper's version 1"""
    kl_coef: float = 0.0
    """Weight of the k3 KL divergence from the starting policy (beta)"""
    target_kl: float = 0.05
    """An update stops when its approximate KL a ratio exceeds this"""
    max_grad_norm: float = 1.0
    """The gradient is clipped at this norm"""
    stop: Literal["each", "group"] = "each"
    """each: every environment runs to its own end; group: all stop at a member's success"""
    update_every: Literal["batch", "step"] = "batch"
    """batch: minibatches of the whole batch; step: one update a decision step"""
    return_mode: Literal["sum", "mean"] = "sum"
    """A trajectory's reward: the sum over its steps, or their mean"""
    ratio_level: Literal["token", "action"] = "token"
    """One ratio a token, or one for the whole decision"""


# ---- Advantages and loss: pure functions of tensors --------------------------------------------------


def _grouped(x: Tensor, group_size: int) -> Tensor:
    """(..., N) as (..., G, K)."""
    if group_size < 2 or x.shape[-1] % group_size:
        raise ValueError(f"{x.shape[-1]} environments do not divide into groups of {group_size} (at least 2)")
    return x.unflatten(-1, (-1, group_size))


def _standardize(x: Tensor, group_size: int) -> Tensor:
    """(x - mean) / std over the members of each group (std with n - 1); 0 where the std is below 1e-6."""
    groups = _grouped(x.double(), group_size)  # (..., G, K)
    groups = groups - groups[..., :1]  # (..., G, K): equal members are exactly 0, however a mean rounds
    std = groups.std(dim=-1, keepdim=True)  # (..., G, 1)
    scores = (groups - groups.mean(dim=-1, keepdim=True)) / std.clamp(min=1e-6)  # (..., G, K)
    return torch.where(std < 1e-6, torch.zeros_like(scores), scores).flatten(-2).float()  # (..., N)


def _held(rewards: Tensor, alive: Tensor) -> Tensor:
    """(T, N) rewards of which a finished member keeps its last."""
    held = rewards.double().clone()  # (T, N)
    for t in range(1, len(held)):
        held[t] = torch.where(alive[t].bool(), held[t], held[t - 1])  # (N,)
    return held


def trajectory_advantages(rewards: Tensor, alive: Tensor, group_size: int) -> Tensor:
    """Equation 7, (N,): total rewards of (T, N), standardised within groups."""
    return _standardize((rewards.double() * alive).sum(dim=0), group_size)  # (N,)


def step_advantages(rewards: Tensor, alive: Tensor, group_size: int) -> Tensor:
    """Equation 6, (T, N): rewards of the moment, standardised within groups.

    A finished member keeps its last reward in the statistics; its own advantage is then 0.
    """
    return _standardize(_held(rewards, alive), group_size) * alive  # (T, N)


def tgrpo_advantages(rewards: Tensor, alive: Tensor, group_size: int, alpha1: float, alpha2: float) -> Tensor:
    """Equation 8, (T, N); 0 where not alive."""
    step = step_advantages(rewards, alive, group_size)  # (T, N)
    trajectory = trajectory_advantages(rewards, alive, group_size)  # (N,)
    return (alpha1 * step + alpha2 * trajectory) * alive  # (T, N)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation 9 with PPO's clip, negated: a mean over D tokens, then over B samples weighted by ``mask``.

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


def rollout(envs: Any, policy: Any, seeds: np.ndarray, group_size: int, args: Args) -> dict[str, Any]:
    """Play one episode in every environment, from the scenes of ``seeds`` (N,); arrays are (T, N, ...)."""
    obs, _ = envs.reset(seed=[int(s) for s in seeds])
    alive = np.ones(envs.num_envs, bool)  # (N,)
    success = np.zeros(envs.num_envs, bool)  # (N,)
    steps: dict[str, list[Any]] = {name: [] for name in ("image", "state", "tokens", "rewards", "alive")}
    policy_s, control_steps = 0.0, 0
    while alive.any():
        start = time.perf_counter()
        acting = np.flatnonzero(alive)  # finished environments leave the batch
        seen = {name: array[acting] for name, array in obs.items()}
        chunk, tokens, _ = policy.sample(seen, [envs.instructions[i] for i in acting], args.temperature)
        actions = np.zeros(envs.action_space.shape, np.float32)  # (N, C, 7)
        actions[acting] = chunk.reshape(len(acting), *actions.shape[1:])
        all_tokens = torch.zeros((envs.num_envs, tokens.shape[1]), dtype=tokens.dtype)  # (N, D)
        all_tokens[torch.from_numpy(acting)] = tokens.cpu()
        policy_s += time.perf_counter() - start
        steps["image"].append(obs["image"])
        steps["state"].append(obs["state"])
        steps["tokens"].append(all_tokens)
        steps["alive"].append(alive.copy())
        before = envs.steps  # (N,)
        obs, reward, terminated, truncated, _ = envs.step(actions)
        control_steps += int((envs.steps - before)[acting].sum())
        steps["rewards"].append(np.where(alive, reward, 0.0))
        success |= terminated & alive
        alive = alive & ~terminated & ~truncated
        if args.stop == "group":  # the paper's Algorithm 1
            alive &= ~np.repeat(success.reshape(-1, group_size).any(axis=1), group_size)
    batch = {name: torch.as_tensor(np.stack(steps[name])) for name in ("image", "state", "rewards", "alive")}
    batch["rewards"] = batch["rewards"].float()  # (T, N)
    batch["tokens"] = torch.stack(steps["tokens"])  # (T, N, D)
    batch["success"] = torch.from_numpy(success)  # (N,)
    batch["policy_s"], batch["control_steps"] = policy_s, control_steps
    return batch


def evaluate(envs: Any, policy: Any, episodes: int, temperature: float, video: Path) -> dict[str, Any]:
    """Success on recorded init states 0 to ``episodes`` - 1, with its Wilson interval (95 %)."""
    obs, _ = envs.reset(options={"init_state_id": list(range(episodes))})
    frames = [obs["image"][:4]]
    while not envs.unwrapped.frozen.all():
        acting = np.flatnonzero(~envs.unwrapped.frozen)
        seen = {name: array[acting] for name, array in obs.items()}
        chunk, _, _ = policy.sample(seen, [envs.instructions[i] for i in acting], temperature)
        actions = np.zeros(envs.action_space.shape, np.float32)  # (N, C, 7)
        actions[acting] = chunk.reshape(len(acting), *actions.shape[1:])
        obs, _, terminated, _, _ = envs.step(actions)
        frames.append(obs["image"][:4])
    strips = [np.concatenate(list(frame), axis=1) for frame in frames]  # four episodes side by side
    imageio.mimwrite(video, strips, fps=5, macro_block_size=8)
    return runs.success(int(terminated.sum()), episodes)


# ---- Learning ----------------------------------------------------------------------------------------


def update(
    policy: Any, optimizer: Any, batch: dict[str, Any], advantages: Tensor, instruction: str, args: Args
) -> dict[str, float]:
    """Maximise equation 9 on one batch; the means of what was measured on the way."""
    alive = batch["alive"].bool()  # (T, N)
    when, who = torch.nonzero(alive, as_tuple=True)  # (S,) each: S samples
    b_obs = {name: batch[name][when, who] for name in ("image", "state")}  # (S, ...)
    b_tokens = batch["tokens"][when, who].to(args.device)  # (S, D)
    b_advantages = advantages[when, who].to(args.device)  # (S,)
    b_weights = (1.0 / alive.sum(dim=0))[who].to(args.device)  # (S,) 1 / |o_i|: trajectories count alike

    def logprobs_of(inds: Tensor) -> tuple[Tensor, Tensor]:
        obs = {name: array[inds] for name, array in b_obs.items()}
        logprobs, entropy, _ = policy.evaluate(
            obs, [instruction] * len(inds), b_tokens[inds], args.temperature
        )
        if args.ratio_level == "action":
            logprobs = logprobs.sum(dim=1, keepdim=True)  # (B, 1)
        return logprobs, entropy

    # From the forward pass that trains, so that the first ratio is 1 whatever rounding the rollout had.
    with torch.no_grad():
        b_old = torch.cat(
            [logprobs_of(inds)[0] for inds in torch.arange(len(when)).split(args.minibatch_size)]
        )
    clip_low, clip_high = (args.clip_low, args.clip_high) if args.clip else (float("inf"), float("inf"))
    logs: dict[str, list[float]] = {}
    minibatches: list[Tensor] = []
    for _ in range(args.update_epochs):
        if args.update_every == "step":
            minibatches += [torch.nonzero(when == t).flatten() for t in range(len(alive))]
        else:
            minibatches += torch.randperm(len(when)).split(args.minibatch_size)
    for mb_inds in minibatches:
        newlogprob, entropy = logprobs_of(mb_inds)  # (B, D)
        pg_loss, measured = policy_loss(
            newlogprob, b_old[mb_inds], b_advantages[mb_inds], b_weights[mb_inds], clip_low, clip_high
        )
        loss = pg_loss
        if args.kl_coef:
            with torch.no_grad(), adapters.adapter_off(policy):
                reference = logprobs_of(mb_inds)[0]  # (B, D)
            log_ref = (reference - newlogprob).clamp(-20.0, 20.0)  # (B, D)
            k3 = (log_ref.exp() - 1.0 - log_ref).mean(dim=1)  # (B,)
            weight = b_weights[mb_inds] / b_weights[mb_inds].sum()  # (B,)
            loss = loss + args.kl_coef * (weight * k3).sum()
        optimizer.zero_grad()
        loss.backward()
        trained = optimizer.param_groups[0]["params"]
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm, error_if_nonfinite=True)
        measured |= {
            "policy_loss": pg_loss.detach(),
            "entropy": entropy.mean().detach(),
            "grad_norm": grad_norm,
        }
        for name, value in measured.items():
            logs.setdefault(name, []).append(float(value))
        if measured["approx_kl"] > args.target_kl:
            break  # before the step that would go further
        optimizer.step()
    return {"ratio_first_minibatch": logs["ratio"][0]} | {
        name: float(np.mean(values)) for name, values in logs.items()
    }


def check(args: Args) -> Args:
    """Fill in the alphas; a ValueError says which argument does not fit, and what was expected."""
    paper = args.suite == "LiberoObject" and 0 <= args.task_id < len(PAPER_ALPHA1)
    defaults = (PAPER_ALPHA1[args.task_id], PAPER_ALPHA2[args.task_id]) if paper else (0.3, 0.7)
    alpha1 = defaults[0] if args.alpha1 is None else args.alpha1
    alpha2 = defaults[1] if args.alpha2 is None else args.alpha2
    if not np.isfinite([alpha1, alpha2]).all():
        raise ValueError(f"alpha1, alpha2 are {alpha1}, {alpha2}; expected finite numbers")
    if args.group_size < 2:
        raise ValueError(f"group_size is {args.group_size}; expected at least 2, to compare members")
    if not 1 <= args.eval_episodes <= 50:
        raise ValueError(f"eval_episodes is {args.eval_episodes}; expected 1 to 50, the recorded init states")
    if args.kl_coef and args.train != "lora":
        raise ValueError(
            f"kl_coef compares with the adapter switched off; expected --train lora, got {args.train}"
        )
    runs.check_numbers(args, "seed kl_coef clip_low clip_high eval_every eval_temperature", above=False)
    runs.check_numbers(
        args, "num_groups num_iterations update_epochs minibatch_size lora_rank last_k", above=True
    )
    runs.check_numbers(
        args, "warmup_iterations temperature learning_rate target_kl max_grad_norm", above=True
    )
    eval_temperature = args.temperature if args.eval_temperature is None else args.eval_temperature
    return dataclasses.replace(args, alpha1=alpha1, alpha2=alpha2, eval_temperature=eval_temperature)


if __name__ == "__main__":
    args = runs.parse_args(Args)
    with runs.one_line_errors():
        resume = args.resume
        if resume and args.evaluate:
            raise ValueError("--resume trains on; to evaluate, give --checkpoint RUN/checkpoints/final")
        args = check(runs.load_args(resume, Args) if resume else args)
        runs.check_suite(args.suite)
        policy = load_policy(args.policy, args.checkpoint, args.device)
        if policy.action_chunk != args.action_chunk:
            raise ValueError(f"action_chunk is {args.action_chunk}; the policy's is {policy.action_chunk}")
        torch.manual_seed(args.seed)  # of a LoRA adapter's first weights
        policy = adapters.make_trainable(policy, args.train, args.lora_rank, args.last_k)

        def make_envs(num_envs: int) -> Any:
            return gym.make_vec(
                f"vla_envs/{args.suite}-v0", num_envs=num_envs, task_id=args.task_id, reward=args.reward,
                assets=args.assets, max_episode_steps=args.max_episode_steps, action_chunk=args.action_chunk,
                num_threads=args.num_threads,
            )  # fmt: skip

        eval_envs = make_envs(args.eval_episodes)
        eval_envs.reset(seed=0)
        envs = None if args.evaluate else make_envs(args.num_groups * args.group_size)
        run = resume or runs.make_run_folder(args.run_dir, args.suite, args.task_id, "tgrpo_vla", args.seed)

        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
        state: dict[str, Any] = {"iteration": 0, "env_steps": 0, "episodes": 0, "wall_s": 0.0, "before": None}
        if resume:
            state = runs.load_training_state(run / "checkpoints" / "latest", policy, optimizer)
        else:
            runs.write_json(run / "args.json", dataclasses.asdict(args))
            if not args.evaluate:
                runs.save_training_state(run / "checkpoints" / "latest", policy, optimizer, state)
    trainable, total = count_parameters(policy)
    print(f"{run}: training {trainable:,} of {total:,} parameters; alphas {args.alpha1:g}/{args.alpha2:g}")
    writer = SummaryWriter(str(run), purge_step=state["env_steps"] + 1 if resume else None)
    started = time.perf_counter() - state["wall_s"]
    common = {"suite": args.suite, "task_id": args.task_id, "seed": args.seed}

    def seed_all(*numbers: int) -> None:
        torch.manual_seed(int(np.random.SeedSequence([args.seed, *numbers]).generate_state(1)[0]))

    def assess(iteration: int) -> dict[str, Any]:
        seed_all(0)  # the same draws at every evaluation
        video = run / "videos" / f"iteration_{iteration:04d}.mp4"
        policy.eval()
        result = evaluate(eval_envs, policy, args.eval_episodes, args.eval_temperature, video)
        writer.add_scalar("charts/success_rate", result["rate"], state["env_steps"])
        tqdm.write(
            f"iteration {iteration}: success {result['successes']}/{result['trials']}"
            f" (95 %: {100 * result['low']:.0f} to {100 * result['high']:.0f} %)"
        )
        return result

    if args.evaluate:
        runs.write_json(run / "result.json", {**common, "success": assess(0)})
        writer.close()
        raise SystemExit

    if state["before"] is None:
        state["before"] = state["after"] = assess(0)
    progress = tqdm(total=args.num_iterations, initial=state["iteration"], desc="TGRPO", unit="it")
    while state["iteration"] < args.num_iterations:
        iteration = state["iteration"] = state["iteration"] + 1
        seed_all(iteration)  # every iteration seeds itself, so that a resumed run draws the same numbers
        scenes = np.random.SeedSequence([args.seed, iteration, 1]).generate_state(args.num_groups)  # (G,)
        seconds, start = dict(envs.seconds), time.perf_counter()
        policy.eval()
        batch = rollout(envs, policy, np.repeat(scenes, args.group_size), args.group_size, args)
        rollout_s = time.perf_counter() - start

        start = time.perf_counter()
        rewards, alive = batch["rewards"], batch["alive"]  # (T, N)
        if args.return_mode == "sum":
            advantages = tgrpo_advantages(rewards, alive, args.group_size, args.alpha1, args.alpha2)  # (T, N)
        else:
            means = rewards / alive.sum(dim=0)  # (T, N): their sum is the mean reward
            advantages = tgrpo_advantages(rewards, alive, args.group_size, args.alpha1, 0.0)  # (T, N)
            advantages += tgrpo_advantages(means, alive, args.group_size, 0.0, args.alpha2)  # (T, N)
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1.0, iteration / args.warmup_iterations)
        policy.train()
        losses = update(policy, optimizer, batch, advantages, envs.instructions[0], args)
        update_s = time.perf_counter() - start

        state["env_steps"] += batch["control_steps"]
        state["episodes"] += envs.num_envs
        if (args.eval_every and iteration % args.eval_every == 0) or iteration == args.num_iterations:
            state["after"] = assess(iteration)
        state["wall_s"] = time.perf_counter() - started
        success_rate = float(batch["success"].float().mean())
        step_spread = _grouped(_held(rewards, alive), args.group_size).std(dim=-1)  # (T, G)
        running = _grouped(alive, args.group_size).any(dim=-1)  # (T, G)
        scalars = {
            "charts/rollout_success": success_rate,
            "charts/episodic_return": (rewards * alive).sum(dim=0).mean(),
            "charts/episodic_length": batch["control_steps"] / envs.num_envs,
            "charts/SPS": state["env_steps"] / state["wall_s"],
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "group/zero_std_frac": float((step_spread < 1e-6)[running].float().mean()),
            "group/kept_frac": (_grouped(batch["success"].float(), args.group_size).std(dim=-1) > 0)
            .float()
            .mean(),
            "group/success_mean": success_rate,
            "time/rollout_s": rollout_s,
            "time/policy_s": batch["policy_s"],
            "time/render_s": envs.seconds["render"] - seconds["render"],
            "time/physics_s": envs.seconds["physics"] - seconds["physics"],
            "time/update_s": update_s,
        } | {f"losses/{name}": value for name, value in losses.items()}
        for tag, value in scalars.items():
            writer.add_scalar(tag, float(value), state["env_steps"])
        runs.save_training_state(run / "checkpoints" / "latest", policy, optimizer, state)
        progress.update()
        progress.set_postfix(rollout=f"{success_rate:.2f}", kl=f"{losses['approx_kl']:.4f}")
    progress.close()

    plain = load_policy(args.policy, args.checkpoint)
    plain.load_state_dict(adapters.merged(policy))
    save_policy(plain, args.policy, run / "checkpoints" / "final")
    if args.train.startswith("lora"):
        adapters.save_adapter(policy, run / "checkpoints" / "adapter")
    before, after = state["before"], state["after"]
    totals = {name: state[name] for name in ("env_steps", "episodes", "wall_s")}
    runs.write_json(
        run / "result.json", {**common, "success_before": before, "success_after": after, **totals}
    )
    print(f"success {before['successes']}/{before['trials']} -> {after['successes']}/{after['trials']}"
          f" in {state['wall_s'] / 60:.1f} min; {run}")  # fmt: skip
    writer.close()
