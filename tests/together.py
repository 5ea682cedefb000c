"""What two processes do in test_distributed.py, started by torchrun; the first writes what came of it."""

import sys
from pathlib import Path

import numpy as np
import torch
from doubles import NO, RoundEnvs
from learning import arguments, gather, small_policy
from tiny_openvla import SENTENCES, write_tiny

import grpo_vla
from vla_envs import distributed
from vla_envs.policies import load_policy
from vla_envs.policies.adapters import make_trainable
from vla_envs.training import batches


class Envs(RoundEnvs):
    """The second process has the environments from 2 on."""

    def __init__(self, *rounds):
        super().__init__(*rounds)
        self.first = 2 * distributed.rank()
        self.instructions = [f"task {self.first + i}" for i in range(self.num_envs)]

    def observe(self):
        obs = super().observe()
        obs["state"][:, 0] += self.first
        obs["state"][:, 1:] += 8 * self.first
        return obs


def learn(*rounds, max_rounds=2, minibatch_size=2, **kwargs):
    """Collect from environments that follow a script, then update: what was collected, logged and learnt."""
    torch.manual_seed(0)
    envs = Envs(*rounds)
    batch = gather(envs, 2, 2, max_rounds=max_rounds)
    args = arguments(grpo_vla, minibatch_size=minibatch_size, **kwargs)
    policy = small_policy()
    advantages = grpo_vla.group_advantages(batch["rewards"].sum(dim=0), 2).expand_as(batch["rewards"])
    b = grpo_vla.samples_of(policy, batch, advantages, args)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    logs = grpo_vla.update(policy, optimizer, b, batches.minibatches(batch, args), args)
    parameters = torch.cat([p.detach().flatten() for p in policy.parameters()])
    flags = {name: distributed.gather(batch[name]).tolist() for name in ("kept", "zero_std")}
    totals = {name: value for name, value in batch["totals"].items() if name != "policy_s"}
    return {
        "rounds": envs.round,
        "samples": len(b["who"]),
        "logs": logs,
        "totals": totals,
    } | flags, parameters


def exchange():
    """Every exchange on its own."""
    rank = distributed.rank()
    assert distributed.world_size() == 2
    assert distributed.gather(torch.arange(1 + 2 * rank)).tolist() == [0, 0, 1, 2]
    assert distributed.gather(torch.zeros(rank, 3)).shape == (1, 3)
    assert distributed.mean(torch.full((1 + rank, 2), float(rank))) == np.float32(2 / 3)
    assert distributed.total(1 + rank) == 3 and distributed.total(torch.tensor(0.5)).item() == 1.0
    added = distributed.sums({"both": 2} | ({"one": torch.tensor(0.5)} if rank else {}))
    assert added == {"both": 4, "one": 0.5} and isinstance(added["both"], int)
    assert distributed.from_first(lambda number: 7 * number, 6) == 42
    calls = []
    result = distributed.first_only(calls.append)(1)
    assert calls == ([] if rank else [1])
    assert result is None
    module = torch.nn.Linear(2, 1)
    distributed.same_parameters(module)
    assert distributed.gather(module.weight).diff(dim=0).eq(0).all()
    # One parameter with a gradient in both, one in the second process alone, one in none; in small pieces.
    both, second, none, huge = (torch.nn.Parameter(torch.zeros(n)) for n in (3, 2, 1, 9))
    both.grad, huge.grad = torch.full((3,), 1.0 + rank), torch.arange(9.0)
    second.grad = torch.ones(2) if rank else None
    distributed.BUCKET = 4
    distributed.sum_gradients(torch.optim.SGD([both, second, none, huge]))
    assert both.grad.tolist() == [3] * 3 and second.grad.tolist() == [1, 1] and none.grad is None
    assert huge.grad.tolist() == (2 * torch.arange(9)).tolist()


def spread(folder):
    """A policy that is spread, of which the first process alone has samples, two: what each has of it."""
    whole, policy = (load_policy("openvla", write_tiny(folder / part)) for part in ("whole", "spread"))
    make_trainable(policy.train(), "all")
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    rng = np.random.default_rng(0)
    b = {"image": torch.from_numpy(rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8))}
    b |= {"state": torch.zeros(2, 8), "tokens": torch.arange(14).view(2, 7)}

    def learn(policy, inds):
        obs = {name: b[name][inds] for name in ("image", "state")}
        policy.score(obs, SENTENCES[:1], b["tokens"][inds])[0].sum().backward()

    for inds in torch.arange(2).split(1):
        learn(whole.train(), inds)
    distributed.gather_parameters(policy)
    for _ in range(distributed.rank()):  # which no other process has to know of
        policy.sample({name: array.numpy() for name, array in b.items()}, SENTENCES[:1] * 2)
    b["weights"] = torch.ones(2)
    own = torch.arange(0 if distributed.rank() else 2)
    none = {name: array[:0] for name, array in b.items()}
    for inds, share in distributed.micro_batches(policy, none if distributed.rank() else b, own, 1):
        assert share == 0.5
        learn(policy, inds)
    for parameter, other in zip(parameters, whole.parameters()):
        torch.testing.assert_close(parameter.grad.full_tensor(), other.grad, rtol=1e-4, atol=1e-4)
    (norm,) = distributed.clip_gradients(optimizer, 1.0)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0))
    optimizer.step()
    total = sum(parameter.numel() for parameter in parameters)
    moments = [optimizer.state[parameter]["exp_avg"] for parameter in parameters]
    for tensors in (parameters, [parameter.grad for parameter in parameters], moments):
        assert 0.49 < sum(tensor.to_local().numel() for tensor in tensors) / total < 0.51
    distributed.gather_parameters(policy)
    step = [p.detach() - w.detach() for p, w in zip(policy.parameters(), whole.parameters())]
    assert 0.9e-6 < max(difference.abs().max() for difference in step) < 2e-6  # AdamW's first step


if __name__ == "__main__":
    distributed.start("cpu")
    exchange()
    spread(Path(sys.argv[1]).parent / str(distributed.rank()))
    rank = distributed.rank()
    # The first process keeps nothing, and plays alone what is missing; so the second has all samples.
    alone = learn(*([[1, NO]] if rank else [[1, 1], [NO, NO]]))
    assert alone[0]["samples"] == (4 if rank else 0) and alone[0]["rounds"] == (1 if rank else 2)
    # Both have samples, of trajectories of different lengths.
    uneven = learn([2, NO] if rank else [1, NO], minibatch_size=3, micro_batch_size=2)
    early = learn([2, NO] if rank else [1, NO], target_kl=1e-12, update_epochs=3)
    parameters = distributed.gather(uneven[1].unsqueeze(0))
    assert torch.equal(parameters[0], parameters[1])
    distributed.first_only(torch.save)({"alone": alone, "uneven": uneven, "early": early}, Path(sys.argv[1]))
    print("printed")
    distributed.stop()
