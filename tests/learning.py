"""Small policies and batches, and the scripts' functions called on them."""

import torch
from doubles import OnesPolicy

import grpo_vla
import ppo_vla
from vla_envs.policies.adapters import make_trainable
from vla_envs.policies.nano import NanoConfig, NanoPolicy
from vla_envs.training import batches

SMALL = NanoConfig(
    action_chunk=2, action_repeat=1, image_size=32, width=16, depth=1, heads=2, max_words=8, vocabulary=64
)


def small_policy(train="all", seed=0):
    torch.manual_seed(seed)
    return make_trainable(NanoPolicy(SMALL), train, rank=2)


def small_batch(lengths=(1, 3, 2, 3), seed=0):
    """Members of different lengths, tokens at random; those that end early have succeeded. See ``flat``."""
    rng = torch.Generator().manual_seed(seed)
    shape = (max(lengths), len(lengths))
    alive = torch.arange(shape[0])[:, None] < torch.tensor(lengths)
    return {
        "image": torch.randint(0, 256, (*shape, 32, 32, 3), dtype=torch.uint8, generator=rng),
        "state": torch.randn(*shape, 8, generator=rng),
        "tokens": torch.randint(0, 256, (*shape, 14), generator=rng),
        "logprobs": torch.full((*shape, 14), -5.5),
        "rewards": torch.randn(shape, generator=rng) * alive,
        "alive": alive,
        "steps": 2 * alive,
        "success": torch.tensor([length < shape[0] for length in lengths]),
        "last": {
            "image": torch.randint(0, 256, (shape[1], 32, 32, 3), dtype=torch.uint8, generator=rng),
            "state": torch.randn(shape[1], 8, generator=rng),
        },
        "instructions": [f"pick up thing {i}" for i in range(shape[1])],
        "policy_s": 0.5,
    }


def flat(batch):
    """A batch of arrays (T, N, ...) as ``rollout`` has it: decisions of those alive, one after the other."""
    when, who = torch.nonzero(batch["alive"], as_tuple=True)
    of_samples = {name: batch[name][when, who] for name in ("image", "state", "tokens", "logprobs")}
    return batch | of_samples | {"when": when, "who": who}


def arguments(script, **kwargs):
    """Arguments under which nothing holds an update back."""
    free = {"minibatch_size": 100, "max_grad_norm": 1e9, "target_kl": 1e9, "temperature": 1.0}
    return script.Args(**free | kwargs)


def samples(script, policy, batch, advantages, args):
    """The samples of ``batch`` with these advantages (T, N)."""
    if script is not ppo_vla:
        return script.samples_of(policy, flat(batch), advantages, args)
    b = ppo_vla.samples_of(policy, ppo_vla.make_critic(policy), flat(batch), args)
    return b | {"advantages": advantages[b["when"], b["who"]]}


def learn(script, policy, b, args, optimizer=None, minibatches=None):
    """What ``update`` measured, and how many optimiser steps it took; one minibatch unless given."""
    optimizer = optimizer or torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.0)
    minibatches = [torch.arange(len(b["who"]))] if minibatches is None else minibatches
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    if script is ppo_vla:
        critic = ppo_vla.make_critic(policy)
        return script.update(policy, critic, optimizer, b, minibatches, False, args), len(steps)
    return script.update(policy, optimizer, b, minibatches, args), len(steps)


def chosen(policy, batch, when, who, temperature=1.0):
    """Log-probabilities of the tokens of the decisions (``when``, ``who``)."""
    obs = {name: batch[name][when, who] for name in ("image", "state")}
    instructions = [batch["instructions"][i] for i in who.tolist()]
    return policy.score(obs, instructions, batch["tokens"][when, who], temperature)[0]


def weight_of(script, lengths):
    """Weights (T, N) of the decisions: trajectories count alike, in PPO decisions do."""
    alive = (torch.arange(max(lengths))[:, None] < torch.tensor(lengths)).float()
    return alive / alive.sum() if script is ppo_vla else alive / alive.sum(dim=0) / len(lengths)


def gradient(policy):
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])


def copy_of(policy):
    return {name: value.clone() for name, value in policy.state_dict().items()}


def same_bits(policy, weights):
    return all(
        torch.equal(value.view(torch.int32), weights[name].view(torch.int32))
        for name, value in policy.state_dict().items()
    )


def gather(envs, num_groups, group_size, iteration=1, **kwargs):
    args = arguments(grpo_vla, num_groups=num_groups, group_size=group_size, **kwargs)
    batch, rollouts = grpo_vla.collect(envs, OnesPolicy(), iteration, args)
    return batch | {"totals": batches.totals(rollouts)}
