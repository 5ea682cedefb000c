"""What TGRPO's paper leaves open: how to weigh the two terms, and comparing members by stage, not by time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vla_envs import distributed

START = [[1.0, 0.0, 0.3], [0.0, 1.0, 0.7]]  # of --alphas auto: 0.3, 0.7 with the weight of a trajectory
MEMORY = 0.9  # of what earlier batches have shown, in every iteration


def by_stage(
    step_advantages: Callable[[Tensor, Tensor, int], Tensor], rewards: Tensor, alive: Tensor, group_size: int
) -> Tensor:
    """Equation 6 by stage, (T, N): the k-th decisions that members take in a stage are compared, for every k.

    The stage in which a decision is taken is the reward of the decision before. A member that has left the
    stage keeps the reward with which it left in the statistics; one that never was there is not in them.
    """
    stages = torch.cat([torch.full_like(rewards[:1], -torch.inf), rewards[:-1]])  # (T, N)
    advantages = step_advantages(torch.zeros_like(rewards), alive, group_size)  # (T, N), 0
    for stage in stages[alive.bool()].unique():
        inside = alive.bool() & (stages == stage)  # (T, N)
        order = (~inside).byte().argsort(dim=0, stable=True)  # (T, N) decisions in the stage come first
        for group in torch.arange(rewards.shape[1]).split(group_size):
            members = group[inside[:, group].any(dim=0)]  # (K,) or fewer
            if len(members) > 1:
                when = order[:, members]  # (T, K)
                its, taken = rewards[:, members].gather(0, when), inside[:, members].gather(0, when)  # (T, K)
                scores = step_advantages(its, taken, len(members))  # (T, K)
                advantages[:, members] += torch.zeros_like(scores).scatter(0, when, scores)
    return advantages


def fit_alphas(
    state: dict[str, Any], step: Tensor, trajectory: Tensor, outcome: Tensor, alive: Tensor
) -> list[float]:
    """alpha1, alpha2 with which the two terms predict success best, by least squares; a negative one is 0.

    Where all members of a group succeed or all fail, success says nothing, and what other groups have shown
    is used. Trajectories count alike, those of older batches less.

    Args:
        state: The run's counters; under ``"fit"`` it keeps sums of products (2, 3), of the step and the
            trajectory term with both and success, to which this batch is added.
        step: (T, N), equation 6.
        trajectory: (N,), equation 7.
        outcome: (N,), success standardised within groups, as the terms are.
        alive: (T, N).
    """
    told = alive & (outcome != 0)  # (T, N)
    terms = [step, trajectory.expand(alive.shape), outcome.expand(alive.shape)]
    samples = torch.stack(terms)[:, told].double()  # (3, S)
    weights = (1.0 / alive.sum(dim=0)).expand(alive.shape)[told]  # (S,)
    products = (samples[:2] * weights) @ samples.T  # (2, 3)
    sums = MEMORY * torch.tensor(state.get("fit", START), dtype=torch.float64)
    sums = sums + distributed.gather(products[None]).sum(dim=0)  # of all processes
    state["fit"] = sums.tolist()
    return torch.linalg.solve(sums[:, :2], sums[:, 2]).clamp(min=0.0).tolist()
