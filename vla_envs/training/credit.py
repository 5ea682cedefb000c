"""What a decision or a trajectory is credited with: how its stage ended, its rewards held to the end."""

import torch
from torch import Tensor

STAGES = 7  # of ``multi_stage``, for each predicate of the goal
DROPPED = 6  # the one that is numbered last, and comes before the first


def in_order(stages: Tensor) -> Tensor:
    """Numbers of ``multi_stage``'s stages in the order of progress: "dropped" comes before "far"."""
    return torch.where(stages % STAGES == DROPPED, stages - STAGES, stages)


def stage_credit(stages: Tensor, alive: Tensor, group_size: int) -> Tensor:
    """Advantages (T, N) by stage, float32, as in Temporal GRPO (arXiv 2608.13026); 0 where not alive.

    A member that enters a stage has the outcome 1 if it ever goes on to a later one, else 0. Outcomes are
    standardised (std with n - 1) among the members of the group that entered the stage, and written to what
    they decided in it. A stage in which they agree, or that only one entered, gives exactly 0.

    Args:
        stages: (T, N) integers, the stage in which each decision ended; later ones are greater, success is
            the last. A decision is taken in the stage in which the one before it ended, the first in stage 0.
        alive: (T, N).
        group_size: K, which has to divide N.

    Raises:
        ValueError: When the environments do not divide into such groups, or a group has one member.
    """
    if group_size < 2 or stages.shape[1] % group_size:
        raise ValueError(
            f"{stages.shape[1]} environments do not divide into groups of {group_size} (at least 2)"
        )
    groups = (stages.shape[1] // group_size, group_size)  # G, K
    alive = alive.bool()
    taken = torch.cat([torch.zeros_like(stages[:1]), stages[:-1]])  # (T, N)
    ahead = torch.where(alive, stages, torch.iinfo(stages.dtype).min)  # (T, N)
    ahead = ahead.flip(0).cummax(dim=0).values.flip(0)  # (T, N), the last stage reached from t on
    advantages = torch.zeros(stages.shape)  # (T, N)
    for stage in taken[alive].unique():
        inside = alive & (taken == stage)  # (T, N)
        entered = inside.any(dim=0).view(groups).double()  # (G, K)
        outcome = (inside & (ahead > stage)).any(dim=0).view(groups).double()  # (G, K)
        count = entered.sum(dim=1, keepdim=True)  # (G, 1)
        centred = (outcome - outcome.sum(dim=1, keepdim=True) / count.clamp(min=1)) * entered  # (G, K)
        std = (centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()  # (G, 1)
        advantages += (centred / (std + 1e-6) * (std > 1e-6)).flatten().float() * inside
    return advantages


def held_rewards(rewards: Tensor, alive: Tensor) -> Tensor:
    """Rewards (T, N), float64; a finished member, no longer ``alive`` (T, N), keeps its last one."""
    held = rewards.double().clone()
    for t in range(1, len(held)):
        held[t] = torch.where(alive[t].bool(), held[t], held[t - 1])
    return held
