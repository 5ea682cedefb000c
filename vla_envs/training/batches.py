"""Batches of decisions: which placements are played, what is kept, in which order it is learnt from."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla_envs import distributed

#: What a policy saw; a wrist's image only where it asks for one.
OBSERVED = ("image", "wrist_image", "state")
#: What a batch holds of each of its S decisions, in order of time: what the policy saw and decided, the
#: decision step and the environment.
OF_SAMPLES = ("image", "state", "tokens", "logprobs", "when", "who")
#: What it holds of each decision step and environment, (T, N).
OF_STEPS = ("rewards", "stages", "steps", "alive")


class Samples:
    """Decisions one after the other, each kind of array in one piece that grows, so images exist once."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}

    def append(self, **arrays: Any) -> None:
        """Add A decisions: arrays or tensors of (A, ...)."""
        for name, array in arrays.items():
            new = np.asarray(array)
            kept = self._arrays.setdefault(name, np.empty((0, *new.shape[1:]), new.dtype))
            before = len(kept)
            kept.resize((before + len(new), *new.shape[1:]), refcheck=False)  # in place
            kept[before:] = new

    def tensors(self) -> dict[str, Tensor]:
        """All of them, (S, ...), without a copy; nothing may be added any more."""
        return {name: torch.from_numpy(array) for name, array in self._arrays.items()}


# ---- Which placements are played -----------------------------------------------------------------------


def tasks_of_environments(args: Any) -> list[int]:
    """The task of every environment of this process: groups are given to the tasks in turn."""
    tasks = np.resize(args.task_ids, args.num_groups)[distributed.block(args.num_groups)]
    return tasks.repeat(args.group_size).tolist()


def draw_placements(
    args: Any, iteration: int, groups: int | None = None, rounds: int = 1
) -> tuple[np.ndarray, list[torch.Generator]]:
    """The seed of every environment (N,), one per group, and what each environment draws its actions from.

    Both depend on the run's seed, the iteration, the round and on which environment of all processes it is,
    so not on how many processes there are. Of several tasks every environment has its own, and groups that
    are missing are those of the first environments; else all processes share them.

    Args:
        args: The run's arguments.
        iteration: From 1.
        groups: How many groups all processes play together [``num_groups``].
        rounds: The number of the rollout within the iteration, from 1.
    """
    groups = args.num_groups if groups is None else groups
    numbers = [args.seed, iteration, rounds]
    several = len(args.task_ids) > 1
    own = distributed.block(groups, args.num_groups if several else groups)
    seeds = np.random.SeedSequence(numbers).generate_state(groups)[own].repeat(args.group_size)  # (N,)
    generators = []
    for environment in range(own.start * args.group_size, own.stop * args.group_size):
        seed = np.random.SeedSequence(numbers, spawn_key=(environment,)).generate_state(1)[0]
        generators.append(torch.Generator().manual_seed(int(seed)))
    return seeds, generators


# ---- What is kept --------------------------------------------------------------------------------------


def leave_out_diverged(
    batch: dict[str, Any], seeds: np.ndarray, diverged: NDArray[np.bool_]
) -> dict[str, Any]:
    """The batch without those groups, members of one seed (N,), in which the simulation of a member diverged.

    Compared with fewer members the others would have another mean and deviation, so a group goes as a whole:
    none of its members is ever alive, with rewards 0 and no success, and nothing is learnt from them.
    """
    kept = torch.from_numpy(~np.isin(seeds, seeds[diverged]))  # (N,)
    return batch | {
        "alive": batch["alive"] & kept,
        "rewards": batch["rewards"] * kept,
        "success": batch["success"] & kept,
        "diverged": torch.from_numpy(diverged.copy()),
    }


def join(batches: list[dict[str, Any]], keep: list[Tensor]) -> dict[str, Any]:
    """One batch of the members ``keep`` (N,) bool of several; the shorter ones end with nobody alive.

    The batches give up their samples on the way, so that images exist twice at most.
    """
    most = max(len(batch["alive"]) for batch in batches)
    joined: dict[str, Any] = {"instructions": []}
    joined["round"] = torch.cat([torch.full((int(kept.sum()),), i) for i, kept in enumerate(keep)])  # (N,)
    joined["success"] = torch.cat([batch["success"][kept] for batch, kept in zip(batches, keep)])  # (N,)
    before, taken = 0, []
    for batch, kept in zip(batches, keep):
        joined["instructions"] += [batch["instructions"][i] for i in torch.nonzero(kept).flatten().tolist()]
        taken.append(kept[batch["who"]])  # (S,)
        batch["who"] = before + kept.cumsum(0)[batch["who"]] - 1  # (S,) numbers among those kept
        before += int(kept.sum())
    when, who = (torch.cat([b[name][its] for b, its in zip(batches, taken)]) for name in ("when", "who"))
    places = (when * max(before, 1) + who).argsort().argsort().split([int(its.sum()) for its in taken])
    for name in [name for name in dict.fromkeys((*OBSERVED, *OF_SAMPLES)) if name in batches[0]]:
        whole = batches[0][name].new_empty((len(when), *batches[0][name].shape[1:]))
        for batch, its, place in zip(batches, taken, places):
            samples, chosen = batch.pop(name), torch.nonzero(its).flatten()
            for to, of in zip(place.split(256), chosen.split(256)):  # little by little
                whole[to] = samples[of]
        joined[name] = whole
    for name in OF_STEPS:
        parts = [batch[name][:, kept] for batch, kept in zip(batches, keep)]  # (T, members that are kept)
        pads = [part.new_zeros((most - len(part), *part.shape[1:])) for part in parts]
        joined[name] = torch.cat([torch.cat(pair) for pair in zip(parts, pads)], dim=1)
    return joined


def totals(batches: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Sums over the episodes of rollouts of all processes, without the groups that were left out.

    ``diverged`` counts the members whose simulation diverged.

    Raises:
        FloatingPointError: When that leaves no group.
    """
    sums: dict[str, Any] = {}
    for batch in batches:
        alive = batch["alive"]
        numbers = {
            "episodes": int(alive[0].sum()),
            "diverged": int(batch["diverged"].sum()),
            "successes": int(batch["success"].sum()),
            "control_steps": int((batch["steps"] * alive).sum()),
            "return": float((batch["rewards"] * alive).sum()),
            "policy_s": batch["policy_s"] / distributed.world_size(),  # their sum is then the mean
        }
        sums = {name: sums.get(name, 0) + value for name, value in numbers.items()}
    sums = distributed.sums(sums)
    if not sums["episodes"]:
        played = distributed.total(sum(batch["alive"].shape[1] for batch in batches))
        raise FloatingPointError(
            f"the simulations of {sums['diverged']} of {played} episodes diverged, at least one of each"
            " group; expected a group whose positions and velocities stay finite"
        )
    return sums


# ---- In which order it is learnt from ------------------------------------------------------------------


def minibatches(batch: dict[str, Any], args: Any, by_step: bool = False) -> list[Tensor]:
    """The numbers of the samples that count, minibatch by minibatch, ``update_epochs`` times.

    The samples of all processes are drawn in random order, another one in every epoch, ``minibatch_size`` at
    once. Every process has the same minibatches; it gets the numbers of its own samples that are in each.

    Args:
        batch: With ``when`` and ``who`` (S,), ``alive`` (T, N); of joined ones ``round`` (N,).
        args: The run's arguments.
        by_step: Instead, a minibatch is all samples of one decision step, in order of time.
    """
    counts = batch["alive"][batch["when"], batch["who"]]  # (S,) not of members that are never alive
    inds = torch.nonzero(counts).flatten()
    when, who = batch["when"][inds], batch["who"][inds]
    if by_step:
        return args.update_epochs * [inds[when == t] for t in distributed.gather(when).unique()]
    rounds = batch.get("round", torch.zeros(batch["alive"].shape[1], dtype=torch.int64))  # (N,)
    positions = distributed.positions(when, who, rounds[who])  # (samples of all,)
    draw = torch.Generator().manual_seed(torch.initial_seed())  # the same in all processes
    orders = [positions[torch.randperm(len(positions), generator=draw)] for _ in range(args.update_epochs)]
    return [inds[part[part >= 0]] for order in orders for part in order.split(args.minibatch_size)]
