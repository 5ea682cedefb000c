"""How to weigh TGRPO's two terms: how far each agrees with success, in its advantages and its gradients.

    python benchmarks/alphas.py --task-ids 0 4

The starting policy is rolled out and does not learn. Printed are, for step term S and trajectory term T:

- their correlation with success (standardised within groups, as they are), over decisions;
- alpha1 and alpha2 of the least-squares fit of success, from which ``--alphas auto`` starts;
- the inner product of two groups' gradients, averaged over all pairs, relative to a group's squared gradient:
  of a term with itself (how much of its gradient every group shares, and is not noise), and with success.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vla_envs.command_line import check_numbers, one_line_errors, parse_args
from vla_envs.policies import load_policy
from vla_envs.training import arguments, batches, runs
from vla_envs.training.tgrpo_extras import fit_alphas

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tgrpo_vla as tgrpo


@dataclass
class Args:
    task_ids: tuple[int, ...] = (0, 4)
    """LIBERO-Object tasks"""
    batches: int = 4
    """Batches per task, each of 8 groups with 8 members"""
    checkpoint: Path | None = None
    """Policy to roll out [the shipped one]"""
    seed: int = 77
    """Seed of the placements and the sampling"""


def gradients(policy: Any, batch: dict[str, Any], signals: list[Tensor], args: Any) -> list[list[Tensor]]:
    """The policy gradient (P,) of every group, for each of the signals (T, N)."""
    found: list[list[Tensor]] = [[] for _ in signals]
    parameters = [p for p in policy.parameters() if p.requires_grad]
    when, who = batch["when"], batch["who"]  # (S,), (S,)
    weights = (1.0 / batch["alive"].sum(dim=0))[who]  # (S,)
    for inds in (torch.nonzero(who // args.group_size == g).flatten() for g in range(args.num_groups)):
        parts = [tgrpo.logprobs_of(policy, batch, part, args)[0].mean(dim=1) for part in inds.split(128)]
        logprobs = torch.cat(parts) * weights[inds]  # (B,)
        for of_signal, signal in zip(found, signals):
            gain = (logprobs * signal[when, who][inds]).sum()
            grads = torch.autograd.grad(gain, parameters, retain_graph=True, allow_unused=True)
            of_signal.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))
    return found


def measure(task_id: int, args: Args) -> list[str]:
    """A row of the table."""
    settings = tgrpo.validate(tgrpo.Args(task_id=task_id, seed=args.seed, alphas="auto", num_threads=1))
    policy = load_policy("nano", args.checkpoint, "cpu").eval()
    settings = arguments.fill_in_chunk(settings, policy)
    envs = runs.make_envs(settings, policy)
    state: dict[str, Any] = {}  # of the fit
    told: list[Tensor] = []
    of: list[list[Tensor]] = [[], [], []]
    for number in tqdm(range(1, args.batches + 1), desc=f"task {task_id}", unit="batch"):
        seeds, generators = batches.draw_placements(settings, number)
        batch = tgrpo.rollout(envs, policy, seeds, settings.temperature, generators)
        rewards, alive = batch["rewards"], batch["alive"]
        step = tgrpo.step_advantages(rewards, alive, settings.group_size)  # (T, N)
        trajectory = tgrpo.trajectory_advantages(rewards, alive, settings.group_size)  # (N,)
        outcome = tgrpo.group_advantages(batch["success"].float(), settings.group_size)  # (N,)
        alphas = fit_alphas(state, step, trajectory, outcome, alive)
        signals = [step, trajectory * alive, outcome * alive]  # (T, N) each
        told.append(torch.stack(signals)[:, alive & (signals[2] != 0)])  # (3, S)
        for all_groups, groups in zip(of, gradients(policy, batch, signals, settings)):
            all_groups += groups
    envs.close()
    correlation = np.corrcoef(torch.cat(told, dim=1).numpy())  # (3, 3)
    g = torch.stack([torch.stack(groups) for groups in of]).double()  # (3, groups, P)
    size = (g**2).sum(dim=2).mean(dim=1).sqrt()  # (3,) of one group's gradient
    total = g.sum(dim=1)  # (3, P)
    pairs = g.shape[1] * (g.shape[1] - 1)
    agreement = (total @ total.T - torch.einsum("inp,jnp->ij", g, g)) / pairs / torch.outer(size, size)
    shares = [agreement[0, 0], agreement[1, 1], agreement[0, 2], agreement[1, 2]]
    pairs_of_two = (correlation[0, 2], correlation[1, 2]), alphas
    return [str(task_id), *(f"{s:.2f}, {t:.2f}" for s, t in pairs_of_two), *(f"{x:+.2%}" for x in shares)]


if __name__ == "__main__":
    args = parse_args(Args)
    with one_line_errors():
        check_numbers(args, "batches", above=True)
        check_numbers(args, "seed", above=False)
        rows = [measure(task_id, args) for task_id in args.task_ids]
    print(
        "| task | correlation of S, T with success | alpha1, alpha2 | S, S | T, T | S, success | T, success |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |")
