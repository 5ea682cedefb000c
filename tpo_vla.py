"""TPO: fine-tune a vision-language-action policy by preferences among trajectories (arXiv 2411.19309, GRAPE).

A group is K environments that start from the same scene. Its members are ranked by a score, and pairs of a
better and a worse one are learnt from as in DPO (arXiv 2305.18290): what the better one decided becomes
likelier than under a reference policy, and what the worse one decided less likely.

Symbols: G groups, K members per group, N = G*K environments (environment i is in group i // K), T decision
steps (one executes C control steps), D action tokens per decision, S decisions taken (samples), M windows.
Arrays are time-major, (T, N). alive[t, i]: member i had not finished before decision t. A window is
--window decisions of a pair, the same ones of both members; 0: all that each of them took, which is DPO.

    score        success | return | GRAPE's 0.01 log prod_t p_t + prod_s exp(-0.01 cost_s) + 5 success
                                                                                   trajectory_scores
    pairs        the best and the worst of a group, or every two of unlike score   make_pairs
    margin       log pi/pi_ref (better) - log pi/pi_ref (worse), each summed over a window     make_windows
    objective    mean over windows of log sigmoid(beta * margin)                   preference_loss, update

Where we depart from GRAPE, or it is silent:
 1. Its stage costs come from key points that a vision-language model proposes. Here they come from the
    simulator's facts: cost_s is how many decisions a member takes until it reaches stage s of multi_stage.
 2. p_t is the geometric mean of the probabilities of a decision's tokens, at least 0.05 as in its code.
 3. The reference is the policy that acted in this iteration (--reference start: that of the beginning).
 4. The policy decides a chunk of C control steps at once, so a window is C times as long.
 5. Dynamic sampling, as in grpo_vla.py: groups of which --keep-low to --keep-high succeed are learnt from.
 6. Every group has a placement of its own, drawn from LIBERO's regions; evaluation is on the 50 recorded init
    states, which training never sees.
 7. An update stops early when it has moved the policy by --target-kl; the learning rate is warmed up, then
    falls linearly to 0.

    python tpo_vla.py --task-id 4
    python tpo_vla.py --task-id 4 --score success --pairs all --window 0 --minibatch-size 32
    python tpo_vla.py --task-id 4 --evaluate --checkpoint runs/.../checkpoints/final
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

import vla_envs  # noqa: F401  # isort: skip  (registers the environments; first, for torch's threads)
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vla_envs import distributed
from vla_envs.command_line import check_numbers
from vla_envs.training import arguments, batches, checkpoints, runs
from vla_envs.training.credit import held_rewards, in_order


@dataclass
class Args(arguments.CommonArgs):  # --task-id, --policy, --checkpoint, --train, --seed, --resume, ...
    # ---- Algorithm ----
    reward: str = "multi_stage"
    """multi_stage, binary, or path/to/file.py:function; what --score return adds up"""
    score: Literal["success", "return", "grape"] = "grape"
    """What ranks a group's members: success, the rewards until the last one ends, or GRAPE's score"""
    pairs: Literal["best-worst", "all"] = "best-worst"
    """Pairs of a group: its best and its worst member, or every two of unlike score"""
    window: int = 8
    """Decisions per window; 0: the whole trajectories of a pair are compared"""
    beta: float = 0.1
    """How fast a preference counts as learnt"""
    reference: Literal["iteration", "start"] = "iteration"
    """The policy that the learnt one is compared with: the one that acted, or the starting checkpoint"""
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
    learning_rate: float = 2e-5
    """AdamW's peak learning rate; it falls linearly to 0"""
    warmup_iterations: int = 3
    """Iterations over which the learning rate grows to its peak"""
    update_epochs: int = 3
    """Passes over a batch"""
    minibatch_size: int = 8
    """Windows per optimiser step"""
    micro_batch_size: int | None = None
    """Windows per forward pass; gradients add up over a minibatch [all at once]"""
    target_kl: float = 0.04
    """An update stops when its approximate KL per token exceeds this"""
    max_grad_norm: float = 1.0
    """The gradient is clipped at this norm"""


# ---- Scores, pairs and loss: pure functions of tensors -----------------------------------------------


def trajectory_scores(batch: dict[str, Any], score: str) -> Tensor:
    """The ``score`` of every member, (N,) float64; in a group that was left out all are equal."""
    alive, success = batch["alive"], batch["success"].double()  # (T, N), (N,)
    if score == "success":
        return success
    if score == "return":  # a finished member keeps its last reward, or hovering would beat finishing
        return held_rewards(batch["rewards"], alive).sum(dim=0)  # (N,)
    probability = batch["logprobs"].double().mean(dim=1).exp().clamp(0.05, 1.0)  # (S,)
    confidence = torch.zeros(alive.shape, dtype=torch.float64)  # (T, N)
    confidence[batch["when"], batch["who"]] = probability.log()
    reached = in_order(batch["stages"]).clamp(min=0).cummax(dim=0).values  # (T, N)
    furthest = distributed.greatest(float(reached.max()) if reached.numel() else 0.0)  # of all processes
    cost = (furthest - reached).sum(dim=0)  # (N,) over all stages
    return (0.01 * (confidence * alive).sum(dim=0) + (-0.01 * cost).exp() + 5.0 * success) * alive.any(dim=0)


def make_pairs(scores: Tensor, group_size: int, pairs: str) -> Tensor:
    """Environments of a better and a worse member of the same group, (P, 2).

    Args:
        scores: (N,).
        group_size: K, which has to divide N.
        pairs: ``"best-worst"``: the first best and the first worst of each group; ``"all"``: every two. Those
            of equal score, within 1e-6, are no pair.
    """
    groups = scores.view(len(scores) // group_size, group_size)  # (G, K)
    better = groups.unsqueeze(2) > groups.unsqueeze(1) + 1e-6  # (G, K, K) of the first against the second
    if pairs == "best-worst":
        best, worst = (F.one_hot(its, group_size) for its in (groups.argmax(dim=1), groups.argmin(dim=1)))
        better &= (best.unsqueeze(2) * worst.unsqueeze(1)).bool()
    group, first, second = torch.nonzero(better, as_tuple=True)  # (P,) each
    return torch.stack([first, second], dim=1) + group_size * group.unsqueeze(1)  # (P, 2)


def window_sums(values: Tensor, windows: Tensor) -> Tensor:
    """Sums (M, 2) of values (B,), one for each sample that ``windows`` (M, 2, L) names, in that order."""
    there = (windows >= 0).to(values.device)  # (M, 2, L)
    return torch.zeros(there.shape, device=values.device).masked_scatter(there, values).sum(dim=2)


def preference_loss(
    logprobs_w: Tensor, ref_logprobs_w: Tensor, logprobs_l: Tensor, ref_logprobs_l: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO's loss, -log sigmoid(beta * margin), a mean over P pairs and W windows.

    Args:
        logprobs_w, logprobs_l: (P, W), log-probabilities summed over a window of the better and of the worse
            member, with gradient.
        ref_logprobs_w, ref_logprobs_l: (P, W), the same of the reference policy.
        beta: Scales the margin.

    Returns:
        The loss; accuracy (the share of windows with a positive margin), margin (beta times it) and
        chosen_logprob (of the better member; its fall while the margin grows is DPO's known failure).
    """
    margin = beta * ((logprobs_w - ref_logprobs_w) - (logprobs_l - ref_logprobs_l))  # (P, W)
    statistics = {
        "accuracy": (margin > 0).float().mean(),
        "margin": margin.detach().mean(),
        "chosen_logprob": logprobs_w.detach().mean(),
    }
    return -F.logsigmoid(margin).mean(), statistics


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
    """Log-probabilities (B, D), entropies (B, D) and hidden states (B, H) of the samples ``inds`` (B,)."""
    obs = {name: b[name][inds] for name in batches.OBSERVED if name in b}
    tokens = b["tokens"][inds].to(args.device)  # (B, D)
    instructions = [b["instructions"][i] for i in b["who"][inds].tolist()]
    return policy.score(obs, instructions, tokens, args.temperature)


def make_windows(batch: dict[str, Any], pairs: Tensor, size: int) -> Tensor:
    """Sample numbers (M, 2, L) of the windows of pairs (P, 2), better member first; -1 where there is none.

    ``size`` is that of ``--window``: of the decisions that both took, L at once; or 0: all of each, L is T.
    """
    length = size or len(batch["alive"])  # L
    numbers = torch.full((-(-len(batch["alive"]) // length) * length, batch["alive"].shape[1]), -1)  # (T', N)
    numbers[batch["when"], batch["who"]] = torch.arange(len(batch["who"]))
    windows = numbers[:, pairs].permute(1, 2, 0)  # (P, 2, T')
    if size:
        windows = torch.where((windows >= 0).all(dim=1, keepdim=True), windows, -1)  # (P, 2, T')
    windows = windows.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)  # (all, 2, L)
    return windows[windows[:, 0, 0] >= 0]


def samples_of(
    policy: Any, reference: Any, batch: dict[str, Any], windows: Tensor, args: Args
) -> dict[str, Any]:
    """The batch with what an update needs: the windows, old log-probs and those of the reference policy.

    Old log-probs come from the forward pass that trains, so the first ratio is 1 whatever rounding the
    rollout had; ``logprob_gap`` is that rounding.
    """
    b = batch | {"windows": windows}  # (M, 2, L)
    b["weights"] = torch.ones(len(windows), device=args.device)  # (M,) windows count alike
    sampled = b["logprobs"]  # (S, D)
    b["old_logprobs"] = sampled.to(args.device, copy=True)  # (S, D)
    b["ref_logprobs"] = torch.zeros(len(sampled), device=args.device)  # (S,)
    inds = windows[windows >= 0].unique()  # (up to S,) those that count
    size = (args.micro_batch_size or args.minibatch_size) * 2 * windows.shape[2]
    with torch.no_grad():
        for part in (inds[i : i + size] for i in range(0, len(inds), size)):
            b["old_logprobs"][part] = logprobs_of(policy, b, part, args)[0].float()  # (B, D)
            b["ref_logprobs"][part] = b["old_logprobs"][part].sum(dim=1)  # (B,)
            if args.reference == "start":
                b["ref_logprobs"][part] = logprobs_of(reference, b, part, args)[0].float().sum(dim=1)  # (B,)
    gaps = (b["old_logprobs"][inds].cpu() - sampled[inds]).abs()  # (up to S, D)
    b["measured"] = {"logprob_gap": float(gaps.max()) if len(inds) else 0.0}
    return b


def update(policy: Any, optimizer: Any, b: dict[str, Any], minibatches: Any, args: Args) -> dict[str, float]:
    """One optimiser step per minibatch of window numbers; the means of what was measured."""
    meter, optimizer_steps = runs.Meter(), 0
    for mb_inds in minibatches:
        optimizer.zero_grad()
        for inds, share in distributed.micro_batches(policy, b, mb_inds, args.micro_batch_size):
            windows = b["windows"][inds]  # (M, 2, L)
            which = windows[windows >= 0]  # (B,) sample numbers
            newlogprob, entropy, _ = logprobs_of(policy, b, which, args)  # (B, D), (B, D)
            new_w, new_l = window_sums(newlogprob.float().sum(dim=1), windows).split(1, dim=1)  # (M, 1) each
            ref_w, ref_l = window_sums(b["ref_logprobs"][which], windows).split(1, dim=1)  # (M, 1) each
            loss, measured = preference_loss(new_w, ref_w, new_l, ref_l, args.beta)
            (loss * share).backward()
            logratio = (newlogprob.detach() - b["old_logprobs"][which]).clamp(-20.0, 20.0)  # (B, D)
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
    if args.group_size < 2:
        raise ValueError(f"group_size is {args.group_size}; expected at least 2, to compare members")
    if not 0 <= args.keep_low <= args.keep_high <= 1:
        raise ValueError(
            f"keep_low, keep_high are {args.keep_low}, {args.keep_high}; expected 0 <= low <= high <= 1"
        )
    if args.score == "grape" and args.reward not in ("binary", "multi_stage"):
        raise ValueError(f"--score grape is for the reward binary or multi_stage, not {args.reward}")
    check_numbers(args, "max_rounds", "beta", above=True)
    check_numbers(args, "window", above=False)
    return arguments.complete_rl(args)


if __name__ == "__main__":
    args = arguments.parse(Args, validate)
    with runs.one_line_errors():
        policy = checkpoints.starting_policy(args)
        args = arguments.fill_in_chunk(args, policy)
        policy = checkpoints.prepare(policy, args)  # --train says what is trained
        reference = checkpoints.starting_policy(args).eval() if args.reference == "start" else policy
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

        scores = trajectory_scores(batch, args.score)  # (N,)
        pairs = make_pairs(scores, args.group_size, args.pairs)  # (P, 2)
        windows = make_windows(batch, pairs, args.window)  # (M, 2, L)
        if not distributed.total(len(windows)):  # with --keep-low 0 or --keep-high 1
            tqdm.write(f"iteration {iteration}: the members of each group score alike; nothing to learn from")
            continue

        policy.train()
        warm = iteration / args.warmup_iterations
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(run.left, warm)
        b = samples_of(policy, reference, batch, windows, args)
        first = windows[:, 0, 0]  # (M,) samples that tell windows apart
        minibatches = batches.minibatches({**b, "when": b["when"][first], "who": b["who"][first]}, args)
        with run.iteration_errors():
            losses = update(policy, optimizer, b, minibatches, args)

        run.log(losses, {"group/kept_frac": batch["kept"], "group/zero_std_frac": batch["zero_std"]})
        del batch, b  # so that images of two rollouts are never held at once
    run.finish()  # the trained policy, result.json, how it went
