"""Several processes that train one policy, started by ``torchrun``: who plays what, what they exchange.

Every process ("rank") holds the whole policy and plays whole groups of its own. What is decided, an early
stop for instance, is decided on numbers that all have added up, so that none goes on alone. Gradients are
added up by hand: unlike with torch's DDP wrapper, processes may then have different numbers of samples, or
none. A large policy of which everything is trained is spread over the processes (``shard``). For one process
everything here does nothing.
"""

import atexit
import datetime
import functools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vla_envs.machine import available_cores

NumberT = TypeVar("NumberT", float, Tensor)
BUCKET = 2**24  # numbers of a gradient that are exchanged at once (64 MiB)


# ---- Who is who --------------------------------------------------------------------------------------


def _variable(name: str, default: int) -> int:
    started = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()  # what torchrun sets
    return int(os.environ.get(name, default)) if started else default


def rank() -> int:
    """The number of this process among all, from 0."""
    return _variable("RANK", 0)


def world_size() -> int:
    """How many processes train together."""
    return _variable("WORLD_SIZE", 1)


def block(count: int, of: int | None = None) -> slice:
    """Which of ``count`` things this process has: contiguous blocks, one per process, as even as can be.

    Args:
        count: Of all processes together.
        of: Deal this many; only the first ``count`` of them are there.
    """
    of = count if of is None else of
    start, stop = (min(count, -(-of * r // world_size())) for r in (rank(), rank() + 1))
    return slice(start, stop)


def device(name: str) -> str:
    """Where the policy of this process runs, for a user's ``name``: each has a GPU of its own."""
    several = world_size() > 1 and name.startswith("cuda")
    return f"cuda:{_variable('LOCAL_RANK', 0)}" if several else name


def num_threads(given: int | None) -> int | None:
    """Simulator threads: those ``given``, else this process's share of the machine's cores; alone None."""
    if given is not None:
        return given
    processes = _variable("LOCAL_WORLD_SIZE", 1)
    return max(1, available_cores() // processes) if processes > 1 else None


def start(device: str) -> None:
    """Join the other processes; only the first one goes on printing."""
    if world_size() == 1 or dist.is_initialized():
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    # CPU tensors and objects go through gloo everywhere, so nobody keeps a GPU busy by waiting. The others
    # wait for as long as the first evaluates; where a process dies, torchrun ends them at once.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def stop() -> None:
    """Wait for the others and part with them."""
    if dist.is_initialized():
        _gather_objects(None)
        dist.destroy_process_group()
        # gloo's threads drop what they exchanged with Python's lock held; coming for it as Python ends, one
        # would end the process by SIGABRT. Until then they can have it.
        atexit.register(time.sleep, 0.5)


# ---- What the first process does alone ---------------------------------------------------------------


def first_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` in the first process; the others do not call it and get None."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return None if rank() else function(*args, **kwargs)

    return call


def from_first(function: Callable[..., Any], *args: Any) -> Any:
    """What ``function`` gives in the first process, for all; the others wait for it."""
    if not dist.is_initialized():
        return function(*args)
    result = [None if rank() else function(*args)]
    dist.broadcast_object_list(result)
    return result[0]


# ---- What is exchanged -------------------------------------------------------------------------------


def _gather_objects(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather(tensor: Tensor) -> Tensor:
    """The tensors (n, ...) of all processes, one after the other; each may have a length of its own."""
    if not dist.is_initialized():
        return tensor
    return torch.cat(_gather_objects(tensor.detach().cpu())).to(tensor.device)


def mean(tensor: Tensor) -> float:
    """The mean of all elements of all processes."""
    return float(gather(tensor.flatten().float()).mean())


def greatest(value: float) -> float:
    """The greatest of the numbers of all processes."""
    return max(_gather_objects(value))


def total(value: NumberT) -> NumberT:
    """The sum of the numbers of all processes."""
    if not dist.is_initialized():
        return value
    return sum(_gather_objects(value.detach().cpu() if isinstance(value, Tensor) else value))


def sums(values: dict[str, Any]) -> dict[str, Any]:
    """Sums by name over all processes; some may lack a name."""
    if not dist.is_initialized():
        return values
    plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
    added: dict[str, Any] = {}
    for each in _gather_objects(plain):
        for name, value in each.items():
            added[name] = added.get(name, 0) + value
    return added


def sum_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Give every process the sum of all gradients, in float32; where nobody has one there is none."""
    if not dist.is_initialized():
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if not _is_shared(p)]
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce(has, dist.ReduceOp.MAX)
    buckets: list[list[Tensor]] = [[]]
    for parameter in (p for p, some in zip(parameters, has.tolist()) if some):
        if parameter.grad is None:  # no sample of this process's
            parameter.grad = torch.zeros_like(parameter)
        if buckets[-1] and sum(p.numel() for p in buckets[-1]) + parameter.numel() > BUCKET:
            buckets.append([])
        buckets[-1].append(parameter.grad)
    for bucket in filter(None, buckets):
        flat = torch.cat([gradient.flatten().float() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
            gradient.copy_(part.view_as(gradient))


def same_parameters(module: torch.nn.Module) -> None:
    """Give every process the trainable parameters of the first."""
    if dist.is_initialized():
        for parameter in (p for p in module.parameters() if p.requires_grad and not _is_shared(p)):
            dist.broadcast(parameter.data, 0)


def clip_gradients(optimizer: torch.optim.Optimizer, most: float) -> list[Tensor]:
    """Sum the gradients of all processes and scale each group's to a norm of at most ``most``.

    Returns:
        The norm of each of the optimiser's groups before that, where its parameters are: without any gradient
        torch's 0 is on the CPU.
    """
    sum_gradients(optimizer)
    groups = [group["params"] for group in optimizer.param_groups]
    return [_whole(torch.nn.utils.clip_grad_norm_(group, most)).to(group[0].device) for group in groups]


def micro_batches(
    policy: Any, b: dict[str, Any], inds: Tensor, size: int | None, backward: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """A minibatch in pieces whose gradients add up, each with its share of the minibatch's weight.

    Args:
        policy: Of one that is spread over the processes, passes of no weight are made where others have more
            pieces than this process.
        b: Samples with ``weights`` (S,), image, state and tokens.
        inds: (B,), this process's samples of the minibatch.
        size: Samples per piece, at most [all at once].
        backward: Whether gradients go back into the policy.
    """
    weight = total(b["weights"][inds].sum())  # of all processes
    parts = inds.split(size or len(inds)) if len(inds) else ()
    if backward:
        _keep_up(policy, b, len(parts))
    for part in parts:
        yield part, b["weights"][part].sum() / weight  # 1 where the minibatch is not split


def positions(when: Tensor, who: Tensor, rounds: Tensor) -> Tensor:
    """Where in this process the samples of all are, in the order that one process would have them; else -1.

    Args:
        when: (S,), the decision step of each sample of this process.
        who: (S,), its environment, counted in this process.
        rounds: (S,), the rollout that it is from; in each, this process's environments follow one another.
    """
    own = torch.stack([when, rounds, torch.full_like(who, rank()), who], dim=1)  # (S, 4)
    everyone = gather(own)  # (all, 4), this process's after those of the processes before it
    before = int((everyone[:, 2] < rank()).sum())
    order = torch.arange(len(everyone))
    for column in reversed(everyone.unbind(dim=1)):  # by time, round, process, environment
        order = order[column[order].argsort(stable=True)]
    order = order - before
    return torch.where((order >= 0) & (order < len(own)), order, -1)


# ---- A policy that is spread over the processes --------------------------------------------------------


def shard(policy: Any) -> None:
    """Spread parameters, and so their gradients and AdamW's state, over all processes by torch's FSDP2.

    A pass that trains gathers the parameters, layer by layer; going backward it gives them back and adds up
    their gradients. So all processes have to make as many of these: see ``micro_batches``. From one update to
    the next the parameters are whole, by ``gather_parameters``, and no pass exchanges anything.

    Args:
        policy: With ``blocks``; ``sample`` and ``score`` are the passes that there are.
    """
    if not dist.is_initialized():
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # takes long, so only here

    # Its warning is of what nobody does here, changing a pass's results in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = dist.device_mesh.init_device_mesh(next(policy.parameters()).device.type, (world_size(),))
    for module in [*policy.blocks, policy]:
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        module.set_gradient_divide_factor(1.0)  # gradients are added up, not averaged
        module.set_force_sum_reduction_for_comms(True)
    for name in ("sample", "score"):
        register_fsdp_forward_method(policy, name)


def _is_shared(tensor: Any) -> bool:
    """Whether this process has only its share of a tensor."""
    return hasattr(tensor, "full_tensor")


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if _is_shared(tensor) else tensor


def to_first(tensor: Tensor) -> Tensor:
    """A copy of the whole tensor on the CPU, in the first process; empty in the others."""
    tensor = _whole(tensor).detach()
    return torch.empty(0) if rank() else tensor.to("cpu", copy=True)


def share_of(tensor: Tensor, like: Any) -> Tensor:
    """This process's share of a whole ``tensor``, where it has only one of ``like``."""
    if not _is_shared(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.dtype), like.device_mesh, like.placements, src_data_rank=None)


def gather_parameters(policy: torch.nn.Module) -> None:
    """Make the parameters of a policy that is spread whole in all processes, until the next backward pass."""
    for module in policy.modules() if dist.is_initialized() else ():
        if is_spread(module):
            module.unshard()  # type: ignore[operator]


def is_spread(policy: Any) -> bool:
    """Whether the parameters of a policy are spread over the processes."""
    return hasattr(policy, "unshard")


def _keep_up(policy: Any, b: dict[str, Tensor], count: int) -> None:
    """Make the passes, of no weight, that others make through a spread policy beyond this process's count."""
    if not is_spread(policy):
        return
    names = [name for name in ("image", "wrist_image", "state", "tokens") if name in b]
    obs = {name: b[name].new_zeros(1, *b[name].shape[1:]) for name in names}
    tokens = obs.pop("tokens").to(b["weights"].device)
    for _ in range(max(_gather_objects(count)) - count):
        logprobs, _, _ = policy.score(obs, [""], tokens)
        (0.0 * logprobs.sum()).backward()
