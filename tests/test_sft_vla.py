"""Behaviour cloning: the loss of demonstrated tokens, and the update that brings it down."""

import math

import numpy as np
import pytest
import torch

import sft_vla
from vla_envs.policies.nano import NanoConfig, NanoPolicy

SMALL = NanoConfig(action_chunk=2, action_repeat=1, image_size=32, width=16, depth=1, heads=2)
SENTENCES = ["pick up the milk", "pick up the ketchup and place it in the basket"]


def samples_of(count=6, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        "state": rng.standard_normal((count, 8)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (count, 2, 7)).astype(np.float32),
        "instructions": [SENTENCES[i % 2] for i in range(count)],
    }


def new_policy(seed=0):
    torch.manual_seed(seed)
    policy = NanoPolicy(SMALL)
    torch.nn.init.normal_(policy.film.weight, std=0.1)  # else the words make no difference yet
    torch.nn.init.normal_(policy.head.weight, std=0.3)  # else nothing makes much of one
    return policy


# ---- The loss ----------------------------------------------------------------------------------------


def test_the_loss_of_a_policy_that_knows_nothing():
    policy = NanoPolicy(SMALL)
    torch.nn.init.zeros_(policy.head.weight)
    loss = sft_vla.loss_of(policy, samples_of(), np.array([0, 3, 3]))
    assert loss.item() == pytest.approx(math.log(256), abs=1e-5)


def test_the_loss_is_the_policys_own_of_the_chosen_samples():
    policy, samples, inds = new_policy().eval(), samples_of(), [1, 4]
    obs = {name: samples[name][inds] for name in ("image", "state")}
    actions = torch.from_numpy(samples["actions"][inds])
    expected = policy.imitation_loss(obs, [samples["instructions"][i] for i in inds], actions)
    assert torch.equal(sft_vla.loss_of(policy, samples, np.array(inds)), expected)
    others = sft_vla.loss_of(policy, samples, np.array([1, 3]))
    assert abs(float(others) - float(expected)) > 1e-5


def test_every_sample_has_its_own_instruction():
    policy, samples = new_policy().eval(), samples_of()
    turned = samples | {"instructions": samples["instructions"][::-1]}
    loss, other = (sft_vla.loss_of(policy, each, np.arange(6)).item() for each in (samples, turned))
    assert loss != pytest.approx(other, abs=1e-4)
    one_by_one = [sft_vla.loss_of(policy, samples, np.array([i])).item() for i in range(6)]
    assert loss == pytest.approx(np.mean(one_by_one), abs=1e-5)


@pytest.mark.parametrize("count", [1, 300])
def test_the_held_out_loss_is_the_mean_over_all_samples(count):
    policy, samples = new_policy().eval(), samples_of(count)
    losses = [sft_vla.loss_of(policy, samples, np.array([i])).item() for i in range(count)]
    loss = sft_vla.held_out_loss(policy, samples)
    assert loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert isinstance(loss, float) and all(p.grad is None for p in policy.parameters())


# ---- The update --------------------------------------------------------------------------------------


class Recorder(torch.optim.AdamW):
    """An optimiser that remembers its learning rates."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rates = []

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


def learn(policy, iterations=(1,), samples=None, **flags):
    """What each iteration measured, and the optimiser."""
    args = sft_vla.Args(**{"num_iterations": 4, "iteration_steps": 5, "minibatch_size": 4} | flags)
    optimizer = Recorder([p for p in policy.parameters() if p.requires_grad], lr=args.learning_rate)
    samples = samples_of() if samples is None else samples
    return [sft_vla.update(policy, optimizer, samples, i, args) for i in iterations], optimizer


def test_an_update_brings_the_loss_down():
    policy, samples = new_policy(), samples_of()
    before = sft_vla.held_out_loss(policy, samples)
    (first, second), _ = learn(
        policy, (1, 2), num_iterations=2, iteration_steps=30, minibatch_size=6, learning_rate=0.01
    )
    after = sft_vla.held_out_loss(policy, samples)
    assert before - 0.5 > first["nll"] > second["nll"] > after
    assert first["grad_norm"] > 0


def test_the_learning_rate_grows_then_falls_along_a_cosine():
    _, optimizer = learn(new_policy(), (1, 2, 3, 4), learning_rate=0.1, warmup_frac=0.2)
    assert optimizer.rates[:3] == pytest.approx([0.025, 0.05, 0.075])  # 20 steps, 4 of them to grow
    assert optimizer.rates[10] == pytest.approx(0.05)  # half-way
    assert optimizer.rates[3:] == sorted(optimizer.rates[3:], reverse=True)
    assert optimizer.rates[19] == pytest.approx(0.1 * math.sin(math.pi / 40) ** 2)


def test_an_iteration_draws_the_same_samples_whenever_it_comes():
    """So that a resumed run goes on with the same ones."""
    torch.manual_seed(5)
    alone = learn(new_policy(), (2,), learning_rate=1e-12)[0][0]
    torch.manual_seed(6)
    one, two, three = learn(new_policy(), (1, 2, 3), learning_rate=1e-12)[0]
    other_seed = learn(new_policy(), (2,), learning_rate=1e-12, seed=2)[0][0]
    assert alone["nll"] == pytest.approx(two["nll"], abs=1e-6)
    for other in (one, three, other_seed):
        assert alone["nll"] != pytest.approx(other["nll"], abs=1e-6)


def test_only_what_is_trained_moves():
    policy = new_policy()
    for parameter in policy.blocks.parameters():
        parameter.requires_grad = False
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    learn(policy)
    for name, value in policy.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith("blocks."), name


def test_the_gradient_is_clipped():
    """AdamW's first moment after one step is a tenth of the gradient."""
    policy = new_policy()
    (measured,), optimizer = learn(policy, iteration_steps=1, max_grad_norm=1e-3)
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert measured["grad_norm"] > 0.1
    assert torch.stack([moment.norm() for moment in moments]).norm() == pytest.approx(1e-4, rel=1e-3)


def test_a_loss_that_is_not_finite_changes_nothing():
    policy, samples = new_policy(), samples_of()
    samples["state"][:] = np.nan
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    with pytest.raises(FloatingPointError, match="loss is nan"):
        learn(policy, samples=samples)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


# ---- Arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "task_id", "task_ids", "episodes"),
    [
        ({}, 4, (4,), ()),
        ({"task_id": 7, "episodes": (3,)}, 7, (7,), (3,)),
        ({"task_ids": (2, 0)}, 2, (2, 0), ()),
        ({"task_ids": (2, 0), "episodes": (3, 5)}, 2, (2, 0), (3, 5)),
    ],
    ids=str,
)
def test_tasks_and_demonstrations(flags, task_id, task_ids, episodes):
    args = sft_vla.validate(sft_vla.Args(**flags))
    assert (args.task_id, args.task_ids, args.episodes) == (task_id, task_ids, episodes)
    assert (args.eval_episodes, args.eval_temperature) == (50, args.temperature)
    assert sft_vla.validate(args) == args  # as it is for a resumed run
