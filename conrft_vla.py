"""ConRFT: fine-tune a flow policy's head by Q-learning beside imitation (Chen et al. 2025, arXiv 2502.05450).

The head is a consistency policy: of a noisy action x_t = (1-t) a + t z, at any time t, it says at once which
action a is behind it, f(x_t, t | h) = x_t - t v(x_t, t | h), with the flow's velocity v and features h of the
frozen backbone. It acts in one step, from the noise z alone. Twin critics say which actions lead to success.
Both learn offline from demonstrations first; then the policy plays, and half of a batch are demonstrations.
Features are kept instead of images, so that an update needs no backbone.

Symbols: N environments, T decision steps (one executes C control steps), S transitions (a decision and what
came of it: features h, action a, reward r, next features h', whether the episode ended there, discounted
return R), B of them in a minibatch, A actions that are compared, n numbers per action.

    target    y = r + gamma (1 - end) min_j Q'_j(h', f(z', 1 | h'))                               td_target
    critics   mean_j (Q_j(h, a) - y)^2                                                                 update
              offline also + alpha (log sum_A exp max(Q_j(h, a_A), R) - Q_j(h, a)) (Cal-QL) conservative_loss
    head      |f((1-t) a + t z, t | h) - a|^2 - eta mean_j Q_j(h, f(z, 1 | h))                    head_loss

Where we depart from ConRFT, or it is silent:
 1. The head is that of --policy flow, not a new one: sigma = t / (1 - t) makes its times noise levels. Half
    of them are 1, as in acting, the others even in t; ConRFT's lie on a Karras grid from 0.002 to 80.
 2. A decision is a chunk of C control steps, its reward 1 for success; gamma is that of a decision. The
    step limit ends an episode for the critics too: else nothing says that hovering is worth 0.
 3. Only demonstrations and decisions of successful episodes are imitated. eta is a tenth of ConRFT's, and
    0 for --critic-warmup iterations, in which critics that know demonstrations alone see what fails.
 4. In place of a person, and off by default, the scripted expert takes over (--takeover-after); what it does
    counts as demonstrations. An action of theirs is what was intended, and noise may have been executed.
 5. The policy plays an episode in every environment, then learns; ConRFT does both at the same time. Playing
    adds noise of --noise-level to an action; the critics have layer norms.

    python -m vla_envs.experts --out demos --task-ids 4 --episodes 25
    python conrft_vla.py --demos demos --task-id 4
    python conrft_vla.py --task-id 4 --evaluate --checkpoint runs/.../checkpoints/final
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vla_envs  # noqa: F401  # isort: skip  (registers the environments; first, for torch's threads)
import numpy as np
import torch
from torch import Tensor, nn

from vla_envs import distributed
from vla_envs.command_line import check_numbers
from vla_envs.demos import demonstrations
from vla_envs.demos.expert import ScriptedExpert
from vla_envs.tasks import get_task
from vla_envs.training import arguments, batches, checkpoints, replays, runs


@dataclass
class Args(arguments.CommonArgs):  # --task-id, --policy, --checkpoint, --train, --seed, --resume, ...
    # ---- Algorithm ----
    policy: str = "flow"
    """flow, whose head is trained"""
    train: str = "head"
    """head: the backbone is frozen"""
    denoising_steps: int | None = 1
    """1: the head acts in one step"""
    noise: str | None = "fixed"
    """fixed: sampled actions have Gaussian noise"""
    noise_level: float | None = 0.05
    """Standard deviation of that noise, in units of the actions' full speed"""
    demos: Path = Path("demos")
    """Folder of demonstrations: LIBERO's HDF5 files or a LeRobot data set"""
    takeover_after: int | None = None
    """Control steps after which the scripted expert takes over an episode [never]"""
    total_env_steps: int | None = None
    """Control steps of training [120000; of several tasks 60000 each; or --num-iterations]"""
    num_iterations: int | None = None
    """Iterations; with --total-env-steps too, the one reached first ends the run [as many as that takes]"""
    num_groups: int | None = None
    """Groups per iteration (G), each on a placement of its own [32]"""
    group_size: int = 1
    """Members per group (K); nothing compares them"""
    offline_steps: int = 1000
    """Steps of the critics and of the head on demonstrations alone, before the first rollout"""
    online_steps: int = 1000
    """Steps of the critics per iteration"""
    critic_steps: int = 2
    """Online, steps of the critics per step of the head"""
    critic_warmup: int = 1
    """Iterations in which the head only imitates, since the critics have seen few failures"""
    minibatch_size: int = 256
    """Transitions per optimiser step (B), online half of them demonstrations"""
    replay_size: int = 20_000
    """Transitions that are kept in memory; the oldest make way"""
    learning_rate: float = 3e-4
    """AdamW's learning rate"""
    offline_learning_rate: float = 1e-3
    """That of the head offline; it falls linearly to 0"""
    gamma: float = 0.95
    """Discount per decision"""
    target_rate: float = 0.02
    """Share of the way that the target critics move to the critics in a step"""
    conservative: float = 0.1
    """Weight of Cal-QL's term, offline (alpha)"""
    num_actions: int = 4
    """Actions of each kind in that term: uniform, the policy's, and those for the next decision"""
    q_weight: float = 0.1
    """Weight of the critics' values beside imitation (eta); offline a tenth of it"""
    max_grad_norm: float = 1.0
    """The gradient is clipped at this norm"""


# ---- Head, critics and losses ------------------------------------------------------------------------


def consistency(head: Any, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
    """Actions (..., n) behind noisy ones x (..., n) at times t (..., 1): f(x, t | h) = x - t v(x, t | h)."""
    return x - t * head(x, t, head.condition(features))


def act(head: Any, features: Tensor, z: Tensor) -> Tensor:
    """Actions (B, A, n) in [-1, 1] for features (B, F), in one step from noise z (B, A, n)."""
    return consistency(head, z, torch.ones_like(z[..., :1]), features.unsqueeze(1)).clamp(-1.0, 1.0)


class Critics(nn.Module):
    """Twin networks of features (B, F) and actions (B, A, n) to values (2, B, A)."""

    def __init__(self, features: int, size: int, width: int = 256) -> None:
        super().__init__()
        self.features_in = nn.ModuleList(nn.Linear(features, width) for _ in range(2))
        self.actions_in = nn.ModuleList(nn.Linear(size, width, bias=False) for _ in range(2))
        self.rest = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(),
                nn.Linear(width, 1),
            )
            for _ in range(2)
        )  # fmt: skip

    def forward(self, features: Tensor, actions: Tensor) -> Tensor:
        parts = zip(self.features_in, self.actions_in, self.rest)
        return torch.stack([rest(h(features).unsqueeze(1) + a(actions)).squeeze(2) for h, a, rest in parts])


def td_target(rewards: Tensor, ended: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """Targets (B,): rewards (B,) and, unless ``ended`` (B,), gamma times the lesser next value (2, B)."""
    return rewards + gamma * (1.0 - ended.float()) * next_values.min(dim=0).values


def conservative_loss(values: Tensor, others: Tensor, returns: Tensor) -> Tensor:
    """Cal-QL's: how much greater values of other actions are than those of the data, above their returns.

    Args:
        values: (2, B), of the actions in the data.
        others: (2, B, A), of other actions; those below the return do not count as too high.
        returns: (B,), Monte-Carlo returns.
    """
    return (torch.maximum(others, returns.unsqueeze(1)).logsumexp(dim=2) - values).mean()


def head_loss(guess: Tensor, actions: Tensor, imitated: Tensor, values: Tensor, eta: float) -> Tensor:
    """Squared error of guesses to actions (B, n) where ``imitated`` (B,), less eta times values (2, B)."""
    error = (guess - actions).square().mean(dim=1)  # (B,)
    return (error * imitated).sum() / imitated.sum().clamp(min=1.0) - eta * values.mean()


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


@torch.no_grad()
def features_of(policy: Any, obs: dict[str, Any], instructions: list[str]) -> Tensor:
    """Features (S, F) of S observations, on the CPU."""
    parts = []
    for first in range(0, len(instructions), 256):
        its = slice(first, first + 256)
        inputs = policy.prepare({name: obs[name][its] for name in ("image", "state")}, instructions[its])
        parts.append(policy.hidden(inputs).flatten(1).cpu())
    return torch.cat(parts)


def transitions_of(policy: Any, batch: dict[str, Any], args: Args) -> dict[str, Tensor]:
    """The transitions (S, ...) of the rollouts of all processes, environment by environment.

    ``taken_over`` (S,) says which of them the expert decided.
    """
    alive, size = batch["alive"], len(batch["alive"])  # (T, N)
    order = (batch["who"] * size + batch["when"]).argsort()
    order = order[alive[batch["when"], batch["who"]][order]]  # without groups that were left out
    when, who = batch["when"][order], batch["who"][order]  # (S,), (S,)
    seen = {name: batch[name][order] for name in ("image", "state")}
    features = features_of(policy, seen, [batch["instructions"][i] for i in who.tolist()])  # (S, F)
    last_features = features_of(policy, batch["last"], batch["instructions"])  # (N, F)
    last = torch.cat([who[1:] != who[:-1], torch.ones(1, dtype=torch.bool)])  # (S,) of an episode
    after = size if args.takeover_after is None else -(-args.takeover_after // policy.action_chunk)
    taken_over, rescued = when >= after, alive.sum(dim=0) > after  # (S,), (N,)
    rewards = batch["rewards"][when, who]  # (S,)
    transitions = {
        "features": features,
        "actions": batch["tokens"][order, -1].clamp(-1.0, 1.0),
        "next_features": torch.where(last.unsqueeze(1), last_features[who], features.roll(-1, 0)),
        "rewards": rewards,
        "ended": last.float(),
        "returns": replays.discounted(rewards, last, args.gamma),
        "imitated": (batch["success"][who] & (taken_over | ~rescued[who])).float(),
        "taken_over": taken_over,
    }
    return {name: distributed.gather(its) for name, its in transitions.items()}


def load_demos(policy: Any, sizes: tuple[int, int], args: Args) -> replays.Replay:
    """Transitions of the demonstrations, from every control step to the one C steps later."""
    chunk, parts = policy.action_chunk, []
    for task in (get_task(args.suite, task_id) for task_id in args.task_ids):
        for demo in demonstrations.load_demonstrations(args.demos, task, None, chunk):
            steps = torch.arange(len(demo["actions"]))  # (S,)
            left = (len(steps) - 1 - steps) // chunk  # (S,) further decisions until success
            features = features_of(policy, demo, [task.instruction] * len(steps))  # (S, F)
            actions = policy.held(torch.as_tensor(demo["actions"])).flatten(1)  # (S, n)
            after = features[(steps + chunk).clamp(max=len(steps) - 1)]  # (S, F)
            end = (left == 0).float()
            parts.append((features, actions, after, end, end, args.gamma**left, torch.ones(len(steps))))
    transitions = {name: torch.cat(its) for name, its in zip(replays.PARTS, zip(*parts))}
    demos = replays.Replay(max(args.replay_size, len(transitions["rewards"])), *sizes)
    demos.add(transitions)
    return demos


# ---- Learning ----------------------------------------------------------------------------------------


def update(
    policy: Any, critics: Any, target: Any, optimizer: Any, memory: list[Any], eta: float, args: Args
) -> dict[str, float]:
    """Steps of the critics and of the head; the means of what was measured.

    ``memory``: demonstrations; and, online, what was played, of which the other half of a minibatch is.
    """
    head, meter, offline = policy.head, runs.Meter(), len(memory) == 1
    size = args.minibatch_size
    own = distributed.block(size)  # this process's share; all draw the same numbers
    share = (own.stop - own.start) / size

    def noise(count: int = 1, draw: Any = torch.randn) -> Tensor:  # (B, count, n)
        return draw(size, count, head.out.out_features)[own].to(args.device)

    for step in range(args.offline_steps if offline else args.online_steps):
        its = (torch.cat(both)[own] for both in zip(*(part.draw(size // len(memory)) for part in memory)))
        h, actions, next_h, rewards, ended, returns, imitated = its  # (B, F), (B, n), (B, F), 4 of (B,)

        with torch.no_grad():
            next_values = target(next_h, act(head, next_h, noise())).squeeze(2)  # (2, B)
            y = td_target(rewards, ended, next_values, args.gamma)  # (B,)
        values = critics(h, actions.unsqueeze(1)).squeeze(2)  # (2, B)
        loss = (values - y).square().mean()
        measured = {"td_loss": loss, "q_data": values.mean()}
        if offline:
            with torch.no_grad():
                drawn_actions = [act(head, at, noise(args.num_actions)) for at in (h, next_h)]
                drawn_actions.append(2.0 * noise(args.num_actions, torch.rand) - 1.0)
                others = torch.cat(drawn_actions, dim=1)  # (B, A, n)
            measured["conservative"] = conservative_loss(values, critics(h, others), returns)
            loss = loss + args.conservative * measured["conservative"]
        optimizer.zero_grad()
        (loss * share).backward()
        meter.add(share, loss=loss, **measured)
        meter.end_minibatch(*distributed.clip_gradients(optimizer, args.max_grad_norm)[::-1])
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(target.buffers(), critics.parameters()):
                old.lerp_(new, args.target_rate)
        if not offline and (step + 1) % args.critic_steps:
            continue

        if offline:
            optimizer.param_groups[0]["lr"] = args.offline_learning_rate * (1.0 - step / args.offline_steps)
        t = torch.rand(size, 2)[own].to(h)  # (B, 2)
        t = torch.where(t[:, :1] < 0.5, 1.0, t[:, 1:])  # (B, 1)
        guess = consistency(head, (1.0 - t) * actions + t * noise()[:, 0], t, h)  # (B, n)
        values = critics(h, act(head, h, noise())).squeeze(2)  # (2, B)
        loss = head_loss(guess, actions, imitated, values, eta)
        optimizer.zero_grad()
        (loss * share).backward()
        for parameter in critics.parameters():
            parameter.grad = None
        meter.add(share, loss=loss, policy_loss=loss, q_policy=values.mean())
        meter.end_minibatch(*distributed.clip_gradients(optimizer, args.max_grad_norm))
        optimizer.step()
    meter.end_update(policy, ["pick up the object"])
    return meter.means()


def validate(args: Args) -> Args:
    """Fill in what was left open; a ValueError says which argument does not fit, and what was expected."""
    if args.policy != "flow" or args.train != "head" or args.denoising_steps != 1:
        raise ValueError(
            "ConRFT trains the head of a flow that acts in one step; expected --policy flow --train head"
            f" --denoising-steps 1, got {args.policy}, {args.train} and {args.denoising_steps}"
        )
    if not (0 < args.gamma <= 1 and 0 < args.target_rate <= 1):
        raise ValueError(f"gamma, target_rate are {args.gamma}, {args.target_rate}; expected above 0 to 1")
    if args.minibatch_size % 2:
        raise ValueError(f"minibatch_size is {args.minibatch_size}; expected an even number, of two halves")
    check_numbers(args, "critic_warmup", "conservative", "q_weight", "takeover_after", above=False)
    positive = ("group_size", "offline_steps", "online_steps", "critic_steps", "replay_size", "num_actions")
    check_numbers(args, *positive, "offline_learning_rate", above=True)
    groups = max(32, len(args.task_ids)) if args.num_groups is None else args.num_groups
    return arguments.complete_rl(dataclasses.replace(args, num_groups=groups))


if __name__ == "__main__":
    args = arguments.parse(Args, validate)
    with runs.one_line_errors():
        policy = checkpoints.starting_policy(args)
        args = arguments.fill_in_chunk(args, policy)
        policy = checkpoints.prepare(policy, args)  # only the head is trained
        sizes = (policy.config.num_actions * policy.config.width, policy.head.out.out_features)  # F, n
        replay = replays.Replay(args.replay_size, *sizes)
        demos = replay if args.evaluate else load_demos(policy, sizes, args)
        critics = Critics(*sizes)
        target = replays.frozen_copy(critics)
        learner = nn.ModuleDict({"policy": policy, "critic": critics, "target": target})
        learner.update({"replay": replay, "demos": demos})
        learner.to(args.device)
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
        optimizer.add_param_group({"params": critics.parameters()})
        eval_envs = runs.make_eval_envs(args, policy)
        envs = runs.make_envs(args, policy)
        player = policy
        if args.takeover_after is not None:
            player = replays.Takeover(policy, envs, ScriptedExpert(envs.unwrapped), args.takeover_after)
        run = runs.Run(args, __file__, policy, optimizer, envs, eval_envs, learner)  # new, or resumed
    if args.evaluate:
        raise SystemExit(run.evaluate_only())

    size = sum(buffer.nbytes for buffer in replay.buffers()) / 2**20
    print(f"{len(demos):,} demonstrated transitions; {args.replay_size:,} played ones take {size:.0f} MiB")
    for iteration in run.iterations():  # from 1; evaluates on the recorded init states, saves, resumes
        offline: dict[str, float] = {}
        if iteration == 1:
            with run.iteration_errors():
                offline = update(policy, critics, target, optimizer, [demos], args.q_weight / 10, args)
        seeds, generators = batches.draw_placements(args, iteration)  # (N,), (N,)
        batch = rollout(envs, player, seeds, args.temperature, generators)
        run.count(batch)

        transitions = transitions_of(policy, batch, args)
        replay.add(transitions)
        taken_over = transitions["taken_over"]  # (S,)
        shown = taken_over & (transitions["imitated"] > 0)  # (S,)
        demos.add({name: its[shown] for name, its in transitions.items()})
        optimizer.param_groups[0]["lr"] = args.learning_rate
        eta = 0.0 if iteration <= args.critic_warmup else args.q_weight
        with run.iteration_errors():
            losses = update(policy, critics, target, optimizer, [demos, replay], eta, args)

        scalars = {f"offline/{name}": value for name, value in offline.items()}
        run.log(losses, {"group/taken_over": taken_over.float()} | scalars)
        del batch, transitions  # so that images of two rollouts are never held at once
    run.finish()  # the trained policy, result.json, how it went
