"""TGRPO: advantages and loss by hand and against the equations, acting by a script, the program."""

import ctypes.util
import json
import math
import os
import runpy
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
import safetensors.torch
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tgrpo_vla
from tgrpo_vla import policy_loss, step_advantages, tgrpo_advantages, trajectory_advantages
from vla_envs.policies import load_policy
from vla_envs.policies.adapters import adapter_off, make_trainable
from vla_envs.policies.nano import NanoConfig, NanoPolicy

ROOT = Path(__file__).parent.parent
SMALL = NanoConfig(action_chunk=2, image_size=32, width=16, depth=1, heads=2, max_words=8, vocabulary=64)


def full(rewards):
    """Rewards (T, N) as a tensor, and everybody alive throughout."""
    rewards = torch.tensor(rewards, dtype=torch.float32)
    return rewards, torch.ones(rewards.shape, dtype=torch.bool)


def random_rollout(seed, steps=6, groups=3, size=4):
    """Rewards and members that finish at different times, the first of them at once."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, steps + 1, groups * size)
    alive = torch.from_numpy(np.arange(steps)[:, None] < lengths)
    rewards = torch.from_numpy(rng.choice([-4.0, -2.0, 2.0, 4.0, 8.0, 16.0], alive.shape)).float()
    return rewards * alive, alive


# ---- Equations 6 to 8 --------------------------------------------------------------------------------


def score(values, i):
    """Member ``i`` among ``values`` as equations 6 and 7 write it; 0 where all are the same."""
    spread = statistics.stdev(values)
    return 0.0 if spread == 0 else (values[i] - statistics.mean(values)) / spread


def slow_trajectory(rewards, alive, size):
    steps, members = rewards.shape
    totals = [sum(float(rewards[t, n]) for t in range(steps) if alive[t, n]) for n in range(members)]
    return torch.tensor([score(totals[n // size * size :][:size], n % size) for n in range(members)])


def slow_step(rewards, alive, size):
    steps, members = rewards.shape
    result = torch.zeros(steps, members)
    for t in range(steps):
        last = [max(s for s in range(t + 1) if alive[s, n]) for n in range(members)]
        held = [float(rewards[last[n], n]) for n in range(members)]
        for n in range(members):
            if alive[t, n]:
                result[t, n] = score(held[n // size * size :][:size], n % size)
    return result


def test_trajectory_advantages_by_hand():
    rewards, alive = full([[1, 1, 0, 5], [0, 1, 2, 5]])  # totals 1, 2 | 2, 10
    half = 1 / math.sqrt(2)
    torch.testing.assert_close(
        trajectory_advantages(rewards, alive, 2), torch.tensor([-half, half, -half, half])
    )
    rewards, alive = full([[1, 2, 3]])  # mean 2, standard deviation 1
    torch.testing.assert_close(trajectory_advantages(rewards, alive, 3), torch.tensor([-1.0, 0.0, 1.0]))


def test_what_a_finished_member_would_get_is_not_in_its_total():
    rewards, alive = full([[1, 2, 3], [0, 0, 100]])
    alive[1, 2] = False
    torch.testing.assert_close(trajectory_advantages(rewards, alive, 3), torch.tensor([-1.0, 0.0, 1.0]))


def test_step_advantages_by_hand():
    rewards, alive = full([[1, 2, 3], [4, 4, 4], [0, 0, 3]])
    third = 1 / math.sqrt(3)
    expected = torch.tensor([[-1, 0, 1], [0, 0, 0], [-third, -third, 2 * third]])
    torch.testing.assert_close(step_advantages(rewards, alive, 3), expected)


def test_a_finished_member_keeps_its_last_reward_in_the_statistics():
    rewards, alive = full([[16, 2, 2], [0, 2, 4], [0, 4, 4]])
    alive[1:, 0] = False  # placed at once: the others are still compared with its 16
    advantages = step_advantages(rewards, alive, 3)
    assert advantages[1:, 0].tolist() == [0, 0]
    mean, std = 22 / 3, statistics.stdev([16, 2, 4])
    torch.testing.assert_close(advantages[1, 1:], torch.tensor([(2 - mean) / std, (4 - mean) / std]))
    torch.testing.assert_close(advantages[2, 1:], torch.tensor([(4 - 8) / statistics.stdev([16, 4, 4])] * 2))


def test_tgrpo_advantages_by_hand():
    rewards, alive = full([[1, 2, 3], [6, 5, 1]])  # totals 7, 7, 4
    third = 1 / math.sqrt(3)
    expected = torch.tensor([[-10.0, 0.0, 10.0], [20 / math.sqrt(7), 10 / math.sqrt(7), -30 / math.sqrt(7)]])
    expected += 0.5 * torch.tensor([third, third, -2 * third])
    torch.testing.assert_close(tgrpo_advantages(rewards, alive, 3, alpha1=10, alpha2=0.5), expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_the_equations(seed, size):
    rewards, alive = random_rollout(seed)
    step, trajectory = slow_step(rewards, alive, size), slow_trajectory(rewards, alive, size)
    torch.testing.assert_close(step_advantages(rewards, alive, size), step, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trajectory_advantages(rewards, alive, size), trajectory, atol=1e-5, rtol=1e-5)
    both = torch.where(alive, 0.3 * step + 0.7 * trajectory, torch.zeros(()))
    torch.testing.assert_close(tgrpo_advantages(rewards, alive, size, 0.3, 0.7), both, atol=1e-5, rtol=1e-5)


def test_advantages_of_a_group_add_up_to_zero():
    rewards, alive = random_rollout(0)
    totals = trajectory_advantages(rewards, alive, 4)
    assert totals.abs().max() > 0.5 and totals.view(3, 4).sum(dim=1).abs().max() < 1e-5
    steps = step_advantages(rewards, torch.ones_like(alive), 4)
    assert steps.abs().max() > 0.5 and steps.view(-1, 3, 4).sum(dim=-1).abs().max() < 1e-5


def test_scale_and_shift_of_rewards_do_not_matter():
    rewards, alive = random_rollout(1)
    everyone = torch.ones_like(alive)
    expected = tgrpo_advantages(rewards, everyone, 4, 0.3, 0.7)
    for scale, shift in ((3.0, 0.0), (0.01, 0.0), (1.0, 5.0), (250.0, -40.0)):
        changed = tgrpo_advantages(rewards * scale + shift, everyone, 4, 0.3, 0.7)
        torch.testing.assert_close(changed, expected, atol=1e-4, rtol=1e-4)
    scaled = tgrpo_advantages(rewards * 7, alive, 4, 0.3, 0.7)  # a shift would pay for time
    torch.testing.assert_close(scaled, tgrpo_advantages(rewards, alive, 4, 0.3, 0.7), atol=1e-4, rtol=1e-4)


def test_groups_do_not_touch_one_another():
    rewards, alive = random_rollout(2)
    before = tgrpo_advantages(rewards, alive, 4, 1, 1)
    rewards = rewards.clone()
    rewards[:, :4] = torch.randn(6, 4) * alive[:, :4]
    after = tgrpo_advantages(rewards, alive, 4, 1, 1)
    assert torch.equal(before[:, 4:], after[:, 4:]) and not torch.equal(before[:, :4], after[:, :4])


def test_advantages_move_with_the_members():
    rewards, alive = random_rollout(3)
    order = torch.tensor([2, 0, 3, 1, 4, 5, 6, 7, 11, 10, 9, 8])
    expected = tgrpo_advantages(rewards, alive, 4, 0.3, 0.7)[:, order]
    torch.testing.assert_close(tgrpo_advantages(rewards[:, order], alive[:, order], 4, 0.3, 0.7), expected)


@pytest.mark.parametrize("value", [0.0, 0.1, -2.3, 123456.789, 1e7 + 1, -1e20, 1e30, 3e38])
@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_equal_rewards_give_exactly_zero(value, size):
    rewards, alive = full([[value] * size] * 3)
    assert step_advantages(rewards, alive, size).eq(0).all()
    assert trajectory_advantages(rewards, alive, size).eq(0).all()
    assert tgrpo_advantages(rewards, alive, size, 10, 5).eq(0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e12, 1e30, 3e38])
def test_finite_rewards_give_finite_advantages(scale):
    rng = torch.Generator().manual_seed(0)
    rewards = (torch.rand(5, 8, generator=rng) * 2 - 1) * scale
    alive = torch.ones(5, 8, dtype=torch.bool)
    for size in (2, 4, 8):
        advantages = tgrpo_advantages(rewards, alive, size, 10, 5)
        assert torch.isfinite(advantages).all()
        assert advantages.abs().max() <= 15 * math.sqrt(size)  # no member is further out than that
    if scale > 1:
        assert trajectory_advantages(rewards, alive, 4).abs().max() > 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_advantages_are_float32(dtype):
    rewards, alive = random_rollout(4)
    for flags in (alive, alive.float()):
        assert step_advantages(rewards.to(dtype), flags, 4).dtype == torch.float32
        assert trajectory_advantages(rewards.to(dtype), flags, 4).dtype == torch.float32
        assert tgrpo_advantages(rewards.to(dtype), flags, 4, 0.3, 0.7).dtype == torch.float32
    assert step_advantages(rewards, alive, 4).shape == (6, 12) and trajectory_advantages(
        rewards, alive, 4
    ).shape == (12,)


def test_arguments_are_left_alone():
    rewards, alive = random_rollout(5)
    copies = rewards.clone(), alive.clone()
    tgrpo_advantages(rewards, alive, 4, 0.3, 0.7)
    assert torch.equal(rewards, copies[0]) and torch.equal(alive, copies[1])


@pytest.mark.parametrize(("members", "size"), [(12, 5), (12, 8), (3, 4), (6, 1), (6, 0), (6, -2)])
def test_groups_that_do_not_divide(members, size):
    rewards, alive = torch.zeros(2, members), torch.ones(2, members, dtype=torch.bool)
    for function, extra in ((trajectory_advantages, ()), (step_advantages, ()), (tgrpo_advantages, (1, 1))):
        with pytest.raises(ValueError, match=rf"{members}\D.*{size}"):
            function(rewards, alive, size, *extra)


# ---- Equation 9 --------------------------------------------------------------------------------------


def loss_of_ratios(ratios, advantages, mask=None, low=0.2, high=0.28):
    """The loss of given ratios (B, D), and its gradient by log-probability."""
    ratios = torch.tensor(ratios, dtype=torch.float32)
    old = torch.linspace(-5, -1, ratios.numel()).view_as(ratios)
    new = (old + ratios.log()).requires_grad_()
    mask = torch.ones(len(ratios)) if mask is None else torch.tensor(mask, dtype=torch.float32)
    loss, measured = policy_loss(new, old, torch.tensor(advantages, dtype=torch.float32), mask, low, high)
    loss.backward()
    return loss.item(), new.grad, {name: float(value) for name, value in measured.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.27, 2.0, -2.54, -2.54),
        (1.5, 2.0, -2.56, 0.0),  # clipped at 1.28
        (0.5, 2.0, -1.0, -1.0),  # a good action that has become rarer: not clipped
        (0.81, -1.0, 0.81, 0.81),
        (0.5, -1.0, 0.8, 0.0),  # clipped at 0.8
        (1.5, -1.0, 1.5, 1.5),  # a bad action that has become likelier: not clipped
        (1.3, 0.0, 0.0, 0.0),
    ],
)
def test_loss_by_hand(ratio, advantage, loss, gradient):
    value, grad, measured = loss_of_ratios([[ratio]], [advantage])
    assert value == pytest.approx(loss, abs=1e-5)
    assert grad.item() == pytest.approx(gradient, abs=1e-5)
    assert measured == {
        "approx_kl": pytest.approx(ratio - 1 - math.log(ratio), abs=1e-5),
        "clipfrac_low": float(ratio < 0.8),
        "clipfrac_high": float(ratio > 1.28),
        "ratio": pytest.approx(ratio, abs=1e-5),
    }


def test_the_first_ratio_is_exactly_one():
    logprobs = -torch.rand(5, 56) * 9
    loss, measured = policy_loss(logprobs, logprobs.clone(), torch.arange(5.0), torch.ones(5), 0.2, 0.28)
    assert loss.item() == pytest.approx(-2.0, abs=1e-5)
    assert measured["approx_kl"] == measured["clipfrac_low"] == measured["clipfrac_high"] == 0
    one, two = torch.full((4, 2), -3.7), torch.ones(4)
    assert policy_loss(one, one.clone(), two, two, 0.2, 0.28)[1]["ratio"].item() == 1.0


def test_tokens_of_a_sample_are_averaged():
    loss, grad, measured = loss_of_ratios([[0.5, 1.0, 1.5, 1.0]], [1.0])
    assert loss == pytest.approx(-(0.5 + 1.0 + 1.28 + 1.0) / 4, abs=1e-5)
    torch.testing.assert_close(grad, torch.tensor([[-0.125, -0.25, 0.0, -0.25]]))
    assert (measured["clipfrac_low"], measured["clipfrac_high"]) == (0.25, 0.25)


def test_every_trajectory_counts_alike():
    """Trajectories of 1 and 3 decisions, weighted by 1/|o_i|: the mean of their own means."""
    loss, _, measured = loss_of_ratios(
        [[1.1], [1.0], [0.9], [1.1]], [4, 1, 1, 1], mask=[1, 1 / 3, 1 / 3, 1 / 3]
    )
    assert loss == pytest.approx(-(4.4 + 1.0) / 2, abs=1e-5)
    assert measured["ratio"] == pytest.approx((1.1 + 1.0) / 2, abs=1e-5)
    doubled = loss_of_ratios([[1.1], [1.0], [0.9], [1.1]], [4, 1, 1, 1], mask=[2, 2 / 3, 2 / 3, 2 / 3])[0]
    assert doubled == pytest.approx(loss, abs=1e-6)


def test_what_is_masked_does_not_count():
    loss, grad, measured = loss_of_ratios([[1.1, 0.9], [1e6, 1e-6]], [2.0, 1e6], mask=[1, 0])
    alone, grad_alone, measured_alone = loss_of_ratios([[1.1, 0.9]], [2.0])
    assert loss == pytest.approx(alone, abs=1e-6) and grad[1].eq(0).all()
    torch.testing.assert_close(grad[:1], grad_alone)
    assert measured == pytest.approx(measured_alone, abs=1e-5)
    loss, grad, _ = loss_of_ratios([[1.1], [0.9]], [2.0, 3.0], mask=[0, 0])
    assert loss == 0 and grad.eq(0).all()


def test_without_clip_the_ratio_is_free():
    inf = float("inf")
    loss, grad, measured = loss_of_ratios([[3.0, 0.1]], [2.0], low=inf, high=inf)
    assert loss == pytest.approx(-3.1, abs=1e-5)
    torch.testing.assert_close(grad, torch.tensor([[-3.0, -0.1]]))
    assert measured["clipfrac_low"] == measured["clipfrac_high"] == 0


def slow_loss(new, old, advantages, mask, low, high):
    total = 0.0
    for b in range(len(new)):
        gains = []
        for d in range(new.shape[1]):
            ratio = math.exp(float(new[b, d]) - float(old[b, d]))
            bounded = min(max(ratio, 1 - low), 1 + high)
            gains.append(min(ratio * float(advantages[b]), bounded * float(advantages[b])))
        total += float(mask[b]) * statistics.mean(gains)
    return -total / float(mask.sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tokens", [1, 7])
def test_the_loss_of_the_equation(seed, tokens):
    rng = torch.Generator().manual_seed(seed)
    new = -torch.rand(9, tokens, generator=rng) * 3
    old = new + 0.4 * torch.randn(9, tokens, generator=rng)
    advantages, mask = torch.randn(9, generator=rng), torch.rand(9, generator=rng)
    loss, _ = policy_loss(new, old, advantages, mask, 0.2, 0.28)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(slow_loss(new, old, advantages, mask, 0.2, 0.28), abs=1e-5)


@pytest.mark.parametrize("clip", [0.2, float("inf")])
@pytest.mark.parametrize("gap", [100.0, 1e4, 1e30, -1e30])
@pytest.mark.parametrize("advantage", [3.0, -3.0, 0.0, 1e12])
def test_huge_ratios_stay_finite(gap, advantage, clip):
    new = torch.full((2, 3), gap, requires_grad=True)
    loss, measured = policy_loss(new, -new.detach(), torch.full((2,), advantage), torch.ones(2), clip, clip)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all()
    assert all(math.isfinite(value) for value in measured.values())


# ---- Acting, on an environment that follows a script ---------------------------------------------------


class ScriptedEnvs:
    """Environment ``i`` succeeds at its decision ``success[i]`` (from 1), or is cut off after ``limit``."""

    def __init__(self, success, limit):
        self.success, self.limit, self.num_envs = np.array(success), limit, len(success)
        self.instructions = [f"task {i}" for i in range(self.num_envs)]
        self.action_space = SimpleNamespace(shape=(self.num_envs, 2, 7))
        self.unwrapped, self.actions = self, []

    def observe(self):
        image = np.full((self.num_envs, 8, 8, 3), self.t, np.uint8)
        return {"image": image, "state": np.arange(self.num_envs * 8, dtype=np.float32).reshape(-1, 8)}

    def reset(self, seed=None, options=None):
        self.t, self.asked = 0, {"seed": seed, "options": options}
        self.steps = np.zeros(self.num_envs, int)
        self.terminated = self.truncated = self.frozen = np.zeros(self.num_envs, bool)
        return self.observe(), {}

    def step(self, actions):
        self.t += 1
        self.actions.append(actions.copy())
        self.steps += 2 * ~self.frozen
        reward = np.where(self.frozen, 0.0, 10.0 * self.t + np.arange(self.num_envs))
        self.terminated = self.terminated | (~self.frozen & (self.success == self.t))
        self.truncated = ~self.terminated & (self.t >= self.limit)
        self.frozen = self.terminated | self.truncated
        return self.observe(), reward, self.terminated.copy(), self.truncated.copy(), {}


class OnesPolicy:
    """Acts 1 in everything; its tokens are the number of its call."""

    action_chunk = 2

    def __init__(self):
        self.asked = []

    def sample(self, obs, instructions, temperature):
        self.asked.append((instructions, obs["state"][:, 0].tolist(), temperature))
        tokens = torch.full((len(instructions), 14), len(self.asked))
        return np.ones((len(instructions), 2, 7), np.float32), tokens, torch.zeros(tokens.shape)


def play(stop, success=(2, 99, 99, 1), limit=3):
    envs, policy = ScriptedEnvs(success, limit), OnesPolicy()
    batch = tgrpo_vla.rollout(
        envs, policy, np.array([5, 5, 6, 6]), 2, tgrpo_vla.Args(stop=stop, temperature=1.5)
    )
    return envs, policy, batch


def test_rollout_masks_those_that_have_finished():
    envs, policy, batch = play("each")
    assert envs.asked["seed"] == [5, 5, 6, 6]
    assert batch["alive"].tolist() == [[True] * 4, [True, True, True, False], [False, True, True, False]]
    assert batch["success"].tolist() == [True, False, False, True]
    assert batch["rewards"].tolist() == [[10, 11, 12, 13], [20, 21, 22, 0], [0, 31, 32, 0]]
    assert batch["rewards"].dtype == torch.float32
    assert batch["tokens"].shape == (3, 4, 14)
    assert batch["tokens"][..., 0].tolist() == [[1, 1, 1, 1], [2, 2, 2, 0], [0, 3, 3, 0]]
    assert batch["image"].shape == (3, 4, 8, 8, 3) and batch["image"][:, 0, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch["state"].shape == (3, 4, 8)
    assert policy.asked[1] == (["task 0", "task 1", "task 2"], [0, 8, 16], 1.5)
    assert [action[:, 0, 0].tolist() for action in envs.actions] == [[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0]]


def test_rollout_stops_a_group_at_its_first_success():
    _, _, batch = play("group")
    assert batch["alive"].tolist() == [[True] * 4, [True, True, False, False]]
    assert batch["success"].tolist() == [True, False, False, True]
    assert batch["rewards"].tolist() == [[10, 11, 12, 13], [20, 21, 0, 0]]


def test_who_is_stopped_with_its_group_has_not_succeeded():
    """Environment 2 would succeed at decision 2, after its group was stopped at decision 1."""
    _, _, batch = play("group", success=(3, 99, 2, 1))
    assert batch["success"].tolist() == [True, False, False, True]


def test_evaluation_counts_successes(tmp_path):
    envs, policy = ScriptedEnvs([1, 2, 3, 9, 9, 9, 1, 1, 2, 2], limit=3), OnesPolicy()
    result = tgrpo_vla.evaluate(envs, policy, 10, 0.0, tmp_path / "film.mp4")
    assert envs.asked["options"] == {"init_state_id": list(range(10))}
    wilson = {"low": pytest.approx(0.3968, abs=1e-4), "high": pytest.approx(0.8922, abs=1e-4)}
    assert result == {"successes": 7, "trials": 10, "rate": 0.7} | wilson
    assert [len(asked[0]) for asked in policy.asked] == [10, 7, 4] and policy.asked[0][2] == 0.0
    assert imageio.mimread(tmp_path / "film.mp4")[0].shape[:2] == (8, 32)  # four side by side


# ---- Learning ----------------------------------------------------------------------------------------


def small_policy(train="all", seed=0):
    torch.manual_seed(seed)
    return make_trainable(NanoPolicy(SMALL), train, rank=2)


def small_batch(lengths=(1, 3, 2, 3), seed=0):
    """Decisions of four members of different lengths, with tokens at random."""
    rng = torch.Generator().manual_seed(seed)
    shape = (max(lengths), len(lengths))
    return {
        "image": torch.randint(0, 256, (*shape, 32, 32, 3), dtype=torch.uint8, generator=rng),
        "state": torch.randn(*shape, 8, generator=rng),
        "tokens": torch.randint(0, 256, (*shape, 14), generator=rng),
        "alive": torch.arange(shape[0])[:, None] < torch.tensor(lengths),
    }


def learn(policy, batch, advantages, optimizer=None, **kwargs):
    """What ``update`` measured, and how many optimiser steps it took."""
    args = tgrpo_vla.Args(
        **{"minibatch_size": 4, "max_grad_norm": 1e9, "target_kl": 1e9, "temperature": 1.0} | kwargs
    )
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(parameters, lr=1e-3)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    return tgrpo_vla.update(policy, optimizer, batch, advantages, "pick up the ketchup", args), len(steps)


def chosen(policy, batch, when, who, temperature=1.0):
    """Log-probabilities of the tokens of the decisions (``when``, ``who``)."""
    obs = {name: batch[name][when, who] for name in ("image", "state")}
    tokens = batch["tokens"][when, who]
    return policy.evaluate(obs, ["pick up the ketchup"] * len(tokens), tokens, temperature)[0]


def test_update_makes_good_actions_likelier():
    policy, batch = small_policy(), small_batch((3, 3))
    advantages = torch.tensor([[1.0, -1.0]] * 3)
    good, bad = (torch.arange(3), torch.zeros(3, dtype=int)), (torch.arange(3), torch.ones(3, dtype=int))
    before = [chosen(policy, batch, *each).mean().item() for each in (good, bad)]
    logs, steps = learn(policy, batch, advantages, update_epochs=3, minibatch_size=6)
    after = [chosen(policy, batch, *each).mean().item() for each in (good, bad)]
    assert steps == 3 and after[0] > before[0] + 1e-4 and after[1] < before[1] - 1e-4
    assert logs["ratio_first_minibatch"] == pytest.approx(1.0, abs=1e-6)
    assert set(logs) >= {
        "policy_loss",
        "entropy",
        "approx_kl",
        "clipfrac_low",
        "clipfrac_high",
        "ratio",
        "grad_norm",
    }


def test_update_takes_the_gradient_of_equation_9():
    """At ratio 1 the gradient is that of -1/M sum_i 1/|o_i| sum_t A_it mean_d log pi, at its temperature."""
    policy, batch, lengths = small_policy(), small_batch(), (1, 3, 2, 3)
    advantages = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    learn(
        policy,
        batch,
        advantages,
        minibatch_size=100,
        temperature=1.7,
        optimizer=torch.optim.SGD(policy.parameters(), lr=0),
    )
    taken = torch.cat([p.grad.flatten() for p in policy.parameters()])
    objective = 0.0
    for i, length in enumerate(lengths):
        times = torch.arange(length)
        logprobs = chosen(policy, batch, times, torch.full((length,), i), 1.7)
        objective += (advantages[:length, i] * logprobs.mean(dim=1)).sum() / length / len(lengths)
    policy.zero_grad()
    (-objective).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert expected.norm() > 1e-3
    torch.testing.assert_close(taken, expected, atol=1e-6, rtol=1e-4)


def test_no_advantage_no_change():
    policy, batch = small_policy(), small_batch()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    _, steps = learn(policy, batch, torch.zeros(3, 4), optimizer)
    assert steps == 3 and all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_updates_by_step_and_by_batch():
    policy, batch = small_policy(), small_batch()  # 9 decisions, 3 times
    advantages = torch.randn(3, 4)
    assert learn(policy, batch, advantages)[1] == 3  # minibatches of 4, 4, 1
    assert learn(policy, batch, advantages, update_epochs=2, minibatch_size=5)[1] == 4
    assert learn(policy, batch, advantages, update_every="step")[1] == 3


def test_one_ratio_for_a_whole_decision():
    """The gradient of a decision's summed log-probability is D times that of the mean over tokens."""
    gradients = {}
    for level in ("token", "action"):
        policy, batch = small_policy(), small_batch()
        learn(policy, batch, torch.ones(3, 4), ratio_level=level, minibatch_size=100)
        gradients[level] = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.testing.assert_close(gradients["action"], 14 * gradients["token"], atol=1e-5, rtol=1e-3)


def test_target_kl_ends_the_update():
    """The step that has gone too far is the last one."""
    policy, batch = small_policy(), small_batch()
    advantages = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    kwargs = {"update_epochs": 5, "minibatch_size": 100}
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    assert learn(policy, batch, advantages, optimizer, target_kl=1e-6, **kwargs)[1] == 1
    free = small_policy()
    optimizer = torch.optim.SGD(free.parameters(), lr=1e-3)
    assert learn(free, batch, advantages, optimizer, target_kl=1e9, **kwargs)[1] == 5


def moved_lora():
    """A policy whose adapter has moved it away from its reference."""
    policy = small_policy("lora")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return policy


def k3(policy, batch, i, length):
    """The k3 KL divergence of every token of member ``i``."""
    times, who = torch.arange(length), torch.full((length,), i)
    with torch.no_grad(), adapter_off(policy):
        reference = chosen(policy, batch, times, who)
    gap = reference - chosen(policy, batch, times, who)
    return gap.exp() - 1 - gap


def test_the_kl_term_of_equation_9():
    """Its gradient too is averaged within each trajectory, then over trajectories."""
    policy, batch, lengths = moved_lora(), small_batch(), (1, 3, 2, 3)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    kwargs = {"kl_coef": 0.5, "train": "lora", "minibatch_size": 100}
    learn(policy, batch, torch.zeros(3, 4), torch.optim.SGD(parameters, lr=0), **kwargs)
    taken = torch.cat([p.grad.flatten() for p in parameters])
    policy.zero_grad()
    divergence = sum(k3(policy, batch, i, length).mean() for i, length in enumerate(lengths)) / len(lengths)
    assert divergence > 1e-3
    (0.5 * divergence).backward()
    torch.testing.assert_close(taken, torch.cat([p.grad.flatten() for p in parameters]), atol=1e-6, rtol=1e-4)


def test_the_kl_term_pulls_back_to_the_reference():
    policy, batch = moved_lora(), small_batch((3, 3, 3, 3))
    parameters = [p for p in policy.parameters() if p.requires_grad]
    before = sum(k3(policy, batch, i, 3).mean().item() for i in range(4))
    optimizer = torch.optim.SGD(parameters, lr=2.0)
    learn(policy, batch, torch.zeros(3, 4), optimizer, kl_coef=1.0, train="lora", update_epochs=5)
    assert sum(k3(policy, batch, i, 3).mean().item() for i in range(4)) < 0.9 * before


@pytest.mark.parametrize("task_id", range(10))
def test_default_alphas_are_the_papers(task_id):
    paper = [
        (10, 1),
        (1, 0.1),
        (10, 5),
        (0.35, 0.65),
        (0.3, 0.7),
        (0.3, 0.7),
        (10, 1),
        (10, 1),
        (0.3, 0.7),
        (0.3, 0.7),
    ]
    args = tgrpo_vla.check(tgrpo_vla.Args(task_id=task_id))
    assert (args.alpha1, args.alpha2) == paper[task_id]
    args = tgrpo_vla.check(tgrpo_vla.Args(task_id=task_id, alpha1=0.0))
    assert (args.alpha1, args.alpha2) == (0.0, paper[task_id][1])


def test_default_alphas_elsewhere():
    args = tgrpo_vla.check(tgrpo_vla.Args(suite="LiberoGoal", task_id=0))
    assert (args.alpha1, args.alpha2) == (0.3, 0.7)


# ---- The script --------------------------------------------------------------------------------------

TINY = {
    "--num-groups": 1, "--group-size": 2, "--num-iterations": 2, "--eval-episodes": 2, "--eval-every": 0,
    "--max-episode-steps": 24, "--num-threads": 1, "--learning-rate": 0.01, "--minibatch-size": 4,
}  # fmt: skip
RESULT = {"suite", "task_id", "seed", "success_before", "success_after", "env_steps", "episodes", "wall_s"}
TAGS = {
    "charts": {"success_rate", "episodic_return", "episodic_length", "SPS", "learning_rate"},
    "losses": {
        "policy_loss",
        "entropy",
        "approx_kl",
        "clipfrac_low",
        "clipfrac_high",
        "ratio_first_minibatch",
    },
    "group": {"zero_std_frac", "kept_frac", "success_mean"},
    "time": {"rollout_s", "update_s", "render_s", "physics_s"},
}


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A reward of the user's own that differs at every step, so that even two decisions teach something."""
    file = tmp_path_factory.mktemp("reward") / "nearer.py"
    file.write_text("def nearer(facts):\n    return -facts['gripper_to_object']\n")
    return f"{file}:nearer"


def command(folder, reward, flags):
    """Arguments of a tiny run; a flag that is None takes no value."""
    named = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
    words = TINY | {"--reward": reward, "--run-dir": folder} | named
    return [str(word) for pair in words.items() for word in pair if word is not None]


@pytest.fixture
def start(tmp_path, reward, monkeypatch):
    """Run the script in this process, as ``__main__``, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def start(name, **flags):
        monkeypatch.setattr(sys, "argv", ["tgrpo_vla.py", *command(tmp_path / name, reward, flags)])
        runpy.run_path(str(ROOT / "tgrpo_vla.py"), run_name="__main__")
        return tmp_path / name

    return start


@pytest.fixture(scope="module")
def finished(tmp_path_factory, reward):
    """The folder of a run of three iterations, by a process of its own."""
    folder = tmp_path_factory.mktemp("finished")
    words = [
        sys.executable,
        str(ROOT / "tgrpo_vla.py"),
        *command(folder / "run", reward, {"num_iterations": 3}),
    ]
    result = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def environment(**changes):
    """This process's environment variables, with the project on the path."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **changes}


def weights(run):
    return safetensors.torch.load_file(run / "checkpoints" / "final" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def scalars(run):
    events = EventAccumulator(str(run))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_import_runs_nothing(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["pytest", "--no-such-flag"])
    module = runpy.run_path(str(ROOT / "tgrpo_vla.py"), run_name="imported")
    assert callable(module["policy_loss"]) and capfd.readouterr() == ("", "")


def test_what_a_run_leaves(finished):
    result = json.loads((finished / "result.json").read_text())
    assert set(result) == RESULT
    assert (result["suite"], result["task_id"], result["seed"]) == ("LiberoObject", 4, 1)
    assert (result["env_steps"], result["episodes"]) == (3 * 2 * 24, 3 * 2) and result["wall_s"] > 0
    for when in ("success_before", "success_after"):
        assert set(result[when]) == {"successes", "trials", "rate", "low", "high"}
        assert (
            result[when]["trials"] == 2
            and result[when]["low"] <= result[when]["rate"] <= result[when]["high"]
        )
    args = json.loads((finished / "args.json").read_text())
    assert (args["num_iterations"], args["group_size"], args["alpha1"], args["alpha2"]) == (3, 2, 0.3, 0.7)
    film = imageio.mimread(finished / "videos" / "iteration_0003.mp4")
    assert len(film) == 4 and film[0].shape == (128, 256, 3) and film[-1].std() > 10
    assert (finished / "videos" / "iteration_0000.mp4").stat().st_size > 0
    assert not list(finished.rglob("*.partial"))


def test_what_a_run_logs(finished):
    logged = scalars(finished)
    assert set(logged) >= {f"{group}/{name}" for group, names in TAGS.items() for name in names}
    assert [step for step, _ in logged["losses/policy_loss"]] == [48, 96, 144]
    assert [step for step, _ in logged["charts/success_rate"]] == [0, 144]
    assert all(value == pytest.approx(1, abs=1e-4) for _, value in logged["losses/ratio_first_minibatch"])
    assert [value for _, value in logged["charts/learning_rate"]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert all(math.isfinite(value) for values in logged.values() for _, value in values)


def test_the_final_checkpoint_is_a_policy_that_has_learnt(finished):
    policy, start = load_policy("nano", finished / "checkpoints" / "final"), load_policy("nano")
    assert same(policy.state_dict(), weights(finished)) and not same(policy.state_dict(), start.state_dict())


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(finished, start, monkeypatch):
    """Also: the same seed gives the same bits in another process."""
    from vla_envs import runs

    save = runs.save_training_state

    def save_and_die(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "save_training_state", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        start("run", num_iterations=3)
    monkeypatch.setattr(runs, "save_training_state", save)
    run = start("run", resume="run")
    assert same(weights(run), weights(finished))
    mine, theirs = (json.loads((each / "result.json").read_text()) for each in (run, finished))
    assert {**mine, "wall_s": 0} == {**theirs, "wall_s": 0}
    steps = {tag: [step for step, _ in values] for tag, values in scalars(run).items()}
    assert steps == {tag: [step for step, _ in values] for tag, values in scalars(finished).items()}


def test_another_seed_is_another_run(finished, start):
    assert not same(weights(start("other", num_iterations=3, seed=2)), weights(finished))


@pytest.mark.parametrize(
    "flags",
    [
        {"no_clip": None, "update_every": "step", "return_mode": "mean"},
        {"ratio_level": "action", "stop": "group", "alpha1": 0.0, "alpha2": 1.5},
    ],
    ids=lambda flags: "-".join(flags),
)
def test_the_papers_letter(start, flags):
    run = start("run", num_iterations=1, **flags)
    assert not same(weights(run), load_policy("nano").state_dict())
    args = json.loads((run / "args.json").read_text())
    assert {name: args[name] for name in flags if name != "no_clip"} == {
        k: v for k, v in flags.items() if v is not None
    }
    assert args["clip"] == ("no_clip" not in flags)


def test_lora_with_a_kl_term(start):
    run = start("run", num_iterations=1, train="lora", kl_coef=0.1, lora_rank=4)
    after, before = weights(run), load_policy("nano").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"blocks.{i}.{layer}.weight" for i in range(3) for layer in ("qkv", "proj", "fc1", "fc2")
    }
    assert (run / "checkpoints" / "adapter" / "adapter_model.safetensors").is_file()
    torch.manual_seed(123)
    other = start("other", num_iterations=1, train="lora", kl_coef=0.1, lora_rank=4)
    assert same(after, weights(other))
    torch.manual_seed(123)
    third = start("third", num_iterations=1, train="lora", kl_coef=0.1, lora_rank=4, seed=2)
    adapters = [
        safetensors.torch.load_file(r / "checkpoints/adapter/adapter_model.safetensors")
        for r in (other, third)
    ]
    name = next(name for name in adapters[0] if "lora_A" in name)
    assert (adapters[0][name] - adapters[1][name]).abs().mean() > 0.01  # drawn anew, not the same draw moved


def test_evaluate_only(start, finished):
    with pytest.raises(SystemExit) as exit_:
        start("evaluation", evaluate=None, checkpoint=finished / "checkpoints" / "final")
    assert not exit_.value.code
    result = json.loads(Path("evaluation/result.json").read_text())
    after = json.loads((finished / "result.json").read_text())["success_after"]
    assert result == {"suite": "LiberoObject", "task_id": 4, "seed": 1, "success": after}
    assert Path("evaluation/videos/iteration_0000.mp4").stat().st_size > 0


def test_a_run_needs_a_folder_of_its_own(start, finished, capfd):
    expect_error(start, capfd, "holds a run already", run_dir=finished)


def expect_error(start, capfd, words, **flags):
    """The script ends with status 2 and one line, which holds ``words``; no run is left behind."""
    with pytest.raises(SystemExit) as exit_:
        start("run", **flags)
    error = capfd.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error:") and len(error.splitlines()) == 1, error
    assert words in error
    assert "Traceback" not in error and not Path("run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"task_id": 10}, "10"),
        ({"task_id": -1}, "-1"),
        ({"suite": "LiberoObjekt"}, "LiberoObject"),
        ({"suite": "LiberoGoal"}, "LiberoGoal"),
        ({"policy": "nanoo"}, "nano"),
        ({"checkpoint": "/no/such/folder"}, "/no/such/folder"),
        ({"reward": "multistage"}, "multi_stage"),
        ({"reward": "/no/such/file.py:f"}, "/no/such/file.py"),
        ({"assets": "/no/such/folder"}, "/no/such/folder"),
        ({"alpha1": "abc"}, "alpha1"),
        ({"alpha1": "nan"}, "nan"),
        ({"alpha2": "inf"}, "inf"),
        ({"group_size": 1}, "1"),
        ({"num_groups": 0}, "num_groups"),
        ({"seed": -1}, "seed"),
        ({"warmup_iterations": 0}, "warmup_iterations"),
        ({"temperature": 0}, "temperature"),
        ({"eval_temperature": -1}, "eval_temperature"),
        ({"learning_rate": "nan"}, "learning_rate"),
        ({"clip_low": "nan"}, "clip_low"),
        ({"kl_coef": "nan", "train": "lora"}, "kl_coef"),
        ({"kl_coef": 0.1}, "lora"),
        ({"train": "lorra"}, "lora"),
        ({"action_chunk": 4}, "4"),
        ({"max_episode_steps": 0}, "max_episode_steps"),
        ({"num_threads": 0}, "num_threads"),
        ({"eval_episodes": 51}, "51"),
        ({"device": "nonsense"}, "nonsense"),
        ({"stop": "never"}, "never"),
        ({"resume": "/no/such/folder"}, "/no/such/folder"),
        ({"grup_size": 2}, "grup-size"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(start, capfd, flags, words):
    expect_error(start, capfd, words, **flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(start, capfd):
    expect_error(start, capfd, "cuda", device="cuda")


def test_a_damaged_checkpoint(start, capfd, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text(
        (ROOT / "vla_envs/checkpoints/nano_libero_object/config.json").read_text()
    )
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"not a tensor")
    expect_error(start, capfd, "damaged", checkpoint=tmp_path / "damaged")


def test_a_folder_that_cannot_be_written(start, capfd, tmp_path):
    (tmp_path / "file").write_text("in the way")
    expect_error(start, capfd, "file", run_dir=tmp_path / "file")
    expect_error(start, capfd, "file", run_dir=tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(sys.platform != "linux", reason="EGL and OSMesa are Linux's")
@pytest.mark.parametrize("backend", ["egl", "osmesa"])
def test_without_opengl(tmp_path, reward, backend):
    """EGL that finds no driver, and OSMesa that is not installed."""
    if backend == "osmesa" and ctypes.util.find_library("OSMesa"):
        pytest.skip("OSMesa is installed")
    words = [sys.executable, str(ROOT / "tgrpo_vla.py"), *command(tmp_path / "run", reward, {})]
    changes = {"MUJOCO_GL": backend, "__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"}
    result = subprocess.run(words, env=environment(**changes), capture_output=True, text=True, timeout=300)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 2 and len(lines) == 1 and lines[0].startswith("error:"), result.stderr
    assert "OpenGL" in lines[0] and not (tmp_path / "run").exists()
