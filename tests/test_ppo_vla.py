"""PPO: generalised advantages by hand and by the textbook, the critic, and what reaches the policy."""

import math

import numpy as np
import pytest
import torch
from learning import arguments, copy_of, flat, gradient, same_bits, small_batch, small_policy

import ppo_vla
from ppo_vla import gae, make_critic, value_loss

# ---- Generalised advantage estimation ----------------------------------------------------------------


def slow_gae(rewards, values, success, last_value, gamma, gae_lambda):
    """One trajectory, as the textbook has it: a sum of TD errors for every decision."""
    following = [*values[1:], 0.0 if success else last_value]
    errors = [reward + gamma * after - value for reward, value, after in zip(rewards, values, following)]
    return [
        sum((gamma * gae_lambda) ** later * errors[t + later] for later in range(len(errors) - t))
        for t in range(len(errors))
    ]


def random_rollout(seed, steps=7, members=6):
    """Members 0 to 3 succeed at some decision, 4 and 5 are cut off; numbers of no meaning follow an end."""
    rng = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, steps, members, generator=rng)
    lengths = [1, *torch.randint(1, steps, (2,), generator=rng).tolist(), steps, steps, steps]
    terminated = torch.zeros(steps, members, dtype=torch.bool)
    for i in range(4):
        terminated[lengths[i] - 1, i] = True
    return rewards, values, terminated, torch.randn(members, generator=rng), lengths


def one(rewards, values, success, last_value, gamma, gae_lambda):
    """``gae`` of a single trajectory, as lists."""
    terminated = torch.zeros(len(rewards), 1, dtype=torch.bool)
    terminated[-1] = success
    columns = [torch.tensor(numbers, dtype=torch.float32).unsqueeze(1) for numbers in (rewards, values)]
    last = torch.tensor([float(last_value)])
    return [result[:, 0].tolist() for result in gae(*columns, terminated, last, gamma, gae_lambda)]


def test_gae_by_hand():
    """TD errors: 1 + 0.5 * 4 - 2 = 1, 0 + 0.5 * 6 - 4 = -1, 2 + 0.5 * 8 - 6 = 0 (success: -4)."""
    advantages, returns = one([1, 0, 2], [2, 4, 6], False, 8, 0.5, 0.5)
    assert advantages == [0.75, -1.0, 0.0] and returns == [2.75, 3.0, 6.0]
    advantages, returns = one([1, 0, 2], [2, 4, 6], True, 8, 0.5, 0.5)
    assert advantages == [0.5, -2.0, -4.0] and returns == [2.5, 2.0, 2.0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("gamma", "gae_lambda"), [(0.99, 0.95), (0.5, 0.5), (1.0, 1.0), (0.9, 0.0), (0.0, 1.0)]
)
def test_the_textbook(seed, gamma, gae_lambda):
    rewards, values, terminated, last_values, lengths = random_rollout(seed)
    advantages, returns = gae(rewards, values, terminated, last_values, gamma, gae_lambda)
    for i, length in enumerate(lengths):
        numbers = rewards[:length, i].tolist(), values[:length, i].tolist()
        expected = torch.tensor(slow_gae(*numbers, i < 4, last_values[i].item(), gamma, gae_lambda))
        torch.testing.assert_close(advantages[:length, i], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(returns[:length, i], expected + values[:length, i], atol=1e-5, rtol=1e-5)


def test_lambda_0_is_the_error_of_one_step():
    advantages, _ = one([1, 0, 2], [3, 5, 7], False, 9, 0.9, 0.0)
    assert advantages == pytest.approx([1 + 0.9 * 5 - 3, 0.9 * 7 - 5, 2 + 0.9 * 9 - 7])


@pytest.mark.parametrize("success", [True, False])
def test_lambda_1_is_the_discounted_return(success):
    """Returns do not depend on the values in between then."""
    end = 0.0 if success else 0.9**3 * 4
    total = 1 + 0.9 * 3 + 0.81 * 2 + end
    advantages, returns = one([1, 3, 2], [5, -6, 7], success, 4, 0.9, 1.0)
    assert returns[0] == pytest.approx(total) and advantages[0] == pytest.approx(total - 5)
    assert one([1, 3, 2], [5, 100, -100], success, 4, 0.9, 1.0)[1][0] == pytest.approx(total, abs=1e-4)


def test_gamma_0_looks_no_further():
    advantages, returns = one([1, 0, 2], [3, 5, 7], False, 9, 0.0, 0.95)
    assert advantages == [-2, -5, -5] and returns == [1, 0, 2]


def test_a_time_out_bootstraps_and_an_end_does_not():
    rewards, values, terminated, last_values, lengths = random_rollout(0)
    before = gae(rewards, values, terminated, last_values, 0.9, 0.8)
    after = gae(rewards, values, terminated, last_values + 10.0, 0.9, 0.8)
    for i, length in enumerate(lengths):
        for one_before, one_after in zip(before, after):
            change = one_after[:length, i] - one_before[:length, i]
            if i < 4:
                assert change.eq(0).all()
            else:
                expected = 10 * 0.9 * 0.72 ** torch.arange(length - 1.0, -1, -1)
                torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-5)


def test_nothing_after_an_end_counts():
    rewards, values, terminated, last_values, lengths = random_rollout(1)
    before = gae(rewards, values, terminated, last_values, 0.99, 0.95)
    after_end = torch.arange(7)[:, None] >= torch.tensor(lengths)
    changed = [torch.where(after_end, torch.full_like(x, 1e6), x) for x in (rewards, values)]
    after = gae(*changed, terminated, last_values, 0.99, 0.95)
    for i, length in enumerate(lengths):
        assert all(torch.equal(a[:length, i], b[:length, i]) for a, b in zip(before, after))


def test_gae_is_float32_and_leaves_its_arguments_alone():
    arrays = random_rollout(2)[:4]
    copies = [array.clone() for array in arrays]
    for kind in (torch.float32, torch.float64):
        advantages, returns = gae(arrays[0].to(kind), arrays[1].to(kind), *arrays[2:], 0.99, 0.95)
        assert advantages.dtype == returns.dtype == torch.float32 and advantages.shape == returns.shape == (
            7,
            6,
        )
        torch.testing.assert_close(returns, advantages + arrays[1])
    assert all(torch.equal(array, copy) for array, copy in zip(arrays, copies))


@pytest.mark.parametrize("scale", [1e-30, 1e12, 1e30])
def test_finite_rewards_give_finite_advantages(scale):
    rewards, values, terminated, last_values, _ = random_rollout(3)
    for result in gae(rewards * scale, values * scale, terminated, last_values * scale, 0.99, 0.95):
        assert torch.isfinite(result).all() and result.abs().max() > 0.1 * scale


@pytest.mark.parametrize("wrong", ["values", "terminated", "last_values", "last_values a step"])
def test_shapes_that_do_not_fit(wrong):
    shapes = {"rewards": (5, 3), "values": (5, 3), "terminated": (5, 3), "last_values": (3,)}
    shapes[wrong.split()[0]] = {"values": (4, 3), "terminated": (5, 2), "last_values": (5,)}.get(
        wrong, (5, 3)
    )
    with pytest.raises(ValueError, match=r"expected .*\(T, N\)") as error:
        gae(*(torch.zeros(shape) for shape in shapes.values()), 0.99, 0.95)
    assert len(str(error.value).splitlines()) == 1 and str(shapes[wrong.split()[0]]) in str(error.value)


# ---- The critic --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [
        (0.0, 0.5, -1.0),
        (0.1, 0.405, -0.9),
        (0.5, 0.32, 0.0),  # nearer, but further than 0.2 from the old one: (0.2 - 1)^2 / 2 remains
        (1.0, 0.32, 0.0),
        (1.5, 0.32, 0.0),
        (2.5, 1.125, 1.5),  # too far: worse than the clipped one
        (-0.5, 1.125, -1.5),  # the wrong way is never clipped
    ],
)
def test_value_loss_by_hand(value, loss, slope):
    """The old value is 0, the return 1, the clip 0.2."""
    values = torch.tensor([value], requires_grad=True)
    result = value_loss(values, torch.zeros(1), torch.ones(1), 0.2)
    result.backward()
    assert result.item() == pytest.approx(loss, abs=1e-6)
    assert values.grad.item() == pytest.approx(slope, abs=1e-6)


def test_value_loss_is_a_mean():
    old, returns = torch.tensor([0.0, 3.0]), torch.tensor([1.0, 3.0])
    assert value_loss(torch.tensor([0.5, 3.1]), old, returns, 0.2).item() == pytest.approx((0.32 + 0.005) / 2)
    assert value_loss(torch.tensor([0.5, 3.1]), old, returns, 1e9).item() == pytest.approx(
        (0.125 + 0.005) / 2
    )


def test_a_new_critic_says_0():
    critic = make_critic(small_policy())
    values = critic(torch.randn(5, 16))
    assert values.shape == (5, 1) and values.eq(0).all()
    values.sum().backward()
    assert critic[-1].weight.grad.ne(0).any()  # but it can learn


# ---- Samples -----------------------------------------------------------------------------------------


class Seer(torch.nn.Module):
    """Its hidden state is the first number of the state, so that ``Identity`` is a critic."""

    hidden_size = 1

    def score(self, obs, instructions, tokens, temperature=1.0):
        assert len(obs["image"]) == len(instructions) == len(tokens)
        return torch.full(tokens.shape, -5.5), torch.ones(tokens.shape), obs["state"][:, :1]


def foreseen(lengths=(1, 3, 2, 3), values=None, last=None, seed=0):
    """A batch whose states begin with ``values`` (T, N), at the end with ``last`` (N,)."""
    batch = small_batch(lengths, seed)
    rng = torch.Generator().manual_seed(seed)
    shape = batch["rewards"].shape
    batch["state"][..., 0] = torch.randn(shape, generator=rng) if values is None else values
    batch["last"]["state"][:, 0] = torch.randn(shape[1], generator=rng) if last is None else last
    return batch


def look(batch, critic=None, policy=None, **kwargs):
    args = arguments(ppo_vla, **kwargs)
    return ppo_vla.samples_of(policy or Seer(), critic or torch.nn.Identity(), flat(batch), args)


def test_no_more_decisions_at_once_than_a_micro_batch(monkeypatch):
    sizes, policy = [], small_policy()
    score = policy.score

    def counted(obs, instructions, *rest):
        sizes.append(len(instructions))
        return score(obs, instructions, *rest)

    monkeypatch.setattr(policy, "score", counted)
    critic = make_critic(policy)
    torch.nn.init.normal_(critic[-1].weight)
    parts, whole = (look(small_batch(), critic, policy, micro_batch_size=most) for most in (2, None))
    assert sizes == [2, 2, 2, 2, 1, 2, 2, 9, 4]  # nine decisions, then the last observations of four members
    torch.testing.assert_close(parts["returns"], whole["returns"], atol=1e-5, rtol=1e-5)


def by_decision(b, name):
    """A dictionary of ``b[name]`` by (t, i)."""
    return dict(zip(zip(b["when"].tolist(), b["who"].tolist()), b[name].tolist()))


@pytest.mark.parametrize("seed", range(3))
def test_samples_have_generalised_advantages(seed):
    """Standardised over those alive; members 0 and 2 succeed, 1 and 3 are cut off."""
    lengths, batch = (1, 3, 2, 3), foreseen(seed=seed)
    b = look(batch, gamma=0.9, gae_lambda=0.8, minibatch_size=4)
    expected, values, last = {}, batch["state"][..., 0], batch["last"]["state"][:, 0].tolist()
    for i, length in enumerate(lengths):
        numbers = batch["rewards"][:length, i].tolist(), values[:length, i].tolist()
        for t, advantage in enumerate(slow_gae(*numbers, length < 3, last[i], 0.9, 0.8)):
            expected[t, i] = advantage
    keys = sorted(expected)
    raw = np.array([expected[key] for key in keys])
    advantages, returns = by_decision(b, "advantages"), by_decision(b, "returns")
    assert sorted(advantages) == keys
    scores = (raw - raw.mean()) / raw.std()
    np.testing.assert_allclose([advantages[key] for key in keys], scores, atol=1e-4)
    np.testing.assert_allclose(
        [returns[key] for key in keys], raw + [values[key].item() for key in keys], atol=1e-5
    )
    assert by_decision(b, "old_values") == {key: values[key].item() for key in keys}
    assert b["advantages"].mean().abs() < 1e-6 and b["advantages"].std(correction=0).item() == pytest.approx(
        1, abs=1e-4
    )


def test_a_success_at_the_step_limit_is_an_end():
    batch = foreseen((2, 2), values=torch.zeros(2, 2), last=torch.tensor([5.0, 5.0]))
    batch["success"] = torch.tensor([True, False])
    batch["rewards"] = torch.zeros(2, 2)
    returns = by_decision(look(batch, gamma=0.9, gae_lambda=1.0), "returns")
    assert returns == pytest.approx({(0, 0): 0, (1, 0): 0, (0, 1): 0.81 * 5, (1, 1): 0.9 * 5})


def test_only_those_cut_off_are_bootstrapped():
    batch = foreseen()
    before = by_decision(look(batch, gamma=0.9, gae_lambda=0.8), "returns")
    batch["last"]["state"][:, 0] += 10.0
    after = by_decision(look(batch, gamma=0.9, gae_lambda=0.8), "returns")
    change = {key: after[key] - before[key] for key in before}
    expected = {(t, i): 10 * 0.9 * 0.72 ** (2 - t) for i in (1, 3) for t in range(3)}
    expected |= {(0, 0): 0.0, (0, 2): 0.0, (1, 2): 0.0}
    assert change == pytest.approx(expected, abs=1e-4)


def test_what_is_seen_after_an_end_changes_nothing():
    policy = small_policy()
    torch.manual_seed(3)
    critic = make_critic(policy)
    torch.nn.init.normal_(critic[-1].weight)
    batch = small_batch()
    before = look(batch, critic, policy)
    for name in ("image", "state"):
        batch["last"][name][batch["success"]] = 7
    after = look(batch, critic, policy)
    for name in ("old_values", "old_logprobs", "advantages", "returns"):
        assert torch.equal(before[name], after[name]) and before[name].std() > 0
    assert before["measured"]["explained_variance"] == after["measured"]["explained_variance"]
    assert before["measured"]["logprob_gap"] == after["measured"]["logprob_gap"]


def test_a_perfect_critic_explains_everything():
    """The discounted reward to come: 1 at a success, worth 2 after the last decision of the others."""
    gamma, lengths = 0.9, (1, 3, 2, 3)
    ends = torch.tensor([0, 3, 1, 3]) - torch.arange(3)[:, None]
    values = gamma**ends * torch.tensor([1.0, 2.0, 1.0, 2.0])
    batch = foreseen(lengths, values, last=torch.full((4,), 2.0))
    batch["rewards"] = torch.zeros(3, 4)
    batch["rewards"][0, 0] = batch["rewards"][1, 2] = 1.0
    b = look(batch, gamma=gamma)
    torch.testing.assert_close(b["returns"], b["old_values"])
    assert b["measured"]["explained_variance"] == pytest.approx(1.0, abs=1e-5)
    wrong = foreseen(lengths, values * torch.tensor([1.0, -1.0, 1.0, -1.0]), last=torch.full((4,), 2.0))
    wrong["rewards"] = batch["rewards"]
    assert look(wrong, gamma=gamma)["measured"]["explained_variance"] < 0.5


def test_a_new_critic_explains_nothing():
    policy = small_policy()
    b = look(small_batch(), make_critic(policy), policy)
    assert b["old_values"].eq(0).all() and b["returns"].std() > 0.1
    assert b["measured"]["explained_variance"] == pytest.approx(0.0, abs=1e-6)


def test_where_nothing_happens_nothing_is_learnt():
    batch = foreseen(values=torch.zeros(3, 4), last=torch.zeros(4))
    batch["rewards"] = torch.zeros(3, 4)
    b = look(batch)
    assert (
        b["advantages"].eq(0).all()
        and b["returns"].eq(0).all()
        and math.isfinite(b["measured"]["explained_variance"])
    )


def test_a_single_decision_has_finite_advantages():
    b = look(foreseen((1,)))
    assert torch.isfinite(b["advantages"]).all() and math.isfinite(b["measured"]["explained_variance"])


# ---- The update --------------------------------------------------------------------------------------


def learner(batch=None, seed=0, value_lr=3e-3, **kwargs):
    """A policy, a new critic, their optimiser, and samples."""
    policy = small_policy(seed=seed)
    critic, args = make_critic(policy), arguments(ppo_vla, **{"value_clip": 1e9} | kwargs)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    optimizer.add_param_group({"params": critic.parameters(), "lr": value_lr})
    b = ppo_vla.samples_of(policy, critic, flat(small_batch() if batch is None else batch), args)
    return policy, critic, optimizer, b, args


def learn(policy, critic, optimizer, b, args, alone=False, passes=1):
    minibatches = [torch.arange(len(b["who"]))] * passes
    return ppo_vla.update(policy, critic, optimizer, b, minibatches, alone, args)


def test_the_policy_and_its_critic_learn():
    parts = learner()
    before = [copy_of(module) for module in parts[:2]]
    logs = learn(*parts)
    assert not same_bits(parts[0], before[0]) and not same_bits(parts[1], before[1])
    assert set(logs) >= {
        "policy_loss",
        "value_loss",
        "explained_variance",
        "entropy",
        "approx_kl",
        "logprob_gap",
        "optimizer_steps",
    }
    returns = parts[3]["returns"]
    assert logs["value_loss"] == pytest.approx(0.5 * (returns**2).mean().item(), rel=1e-5)
    assert logs["explained_variance"] == parts[3]["measured"]["explained_variance"]


def test_the_critic_learns_alone():
    parts = learner()
    learn(*parts)  # the optimiser has moments of the policy now, which must not move it
    before = [copy_of(module) for module in parts[:2]]
    learn(*parts, alone=True, passes=3)
    assert same_bits(parts[0], before[0]) and not same_bits(parts[1], before[1])


def test_the_critics_gradient_does_not_reach_the_policy():
    parts = learner()
    parts[3]["advantages"].zero_()
    parts[3]["returns"] += 100.0
    before = [copy_of(module) for module in parts[:2]]
    learn(*parts, passes=3)
    assert gradient(parts[0]).eq(0).all()
    assert same_bits(parts[0], before[0]) and not same_bits(parts[1], before[1])


def test_the_critics_error_does_not_change_the_policys_step():
    """Also where the gradient is clipped."""
    weights = []
    for size in (0.0, 1e4):
        policy, critic, _, b, args = learner(max_grad_norm=1e-2)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        optimizer.add_param_group({"params": critic.parameters(), "lr": 1e-9})
        b["returns"] = torch.full_like(b["returns"], size)
        logs = learn(policy, critic, optimizer, b, args)
        assert logs["grad_norm"] > 1e-2 and gradient(policy).norm().item() == pytest.approx(1e-2, rel=1e-3)
        weights.append(copy_of(policy))
    assert same_bits(policy, weights[0])


@pytest.mark.longer
def test_the_critics_loss_falls():
    parts = learner()
    policy, critic, _, b, args = parts
    first = learn(*parts, alone=True)["value_loss"]
    learn(*parts, alone=True, passes=200)
    assert learn(*parts, alone=True)["value_loss"] < 0.1 * first
    values = critic(ppo_vla.logprobs_of(policy, b, torch.arange(9), args)[2]).squeeze(1)
    assert (values - b["returns"]).abs().mean() < 0.5 * b["returns"].abs().mean()


def test_values_that_have_moved_by_the_clip_stop():
    """Every return is 5; small steps, so that none leads far beyond the clip."""
    for clip, least, most in ((0.2, 0.18, 0.25), (1e9, 2.0, 5.0)):
        policy, critic, _, b, args = learner(value_clip=clip)
        b["returns"].fill_(5.0)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        optimizer.add_param_group({"params": critic.parameters(), "lr": 3e-4})
        learn(policy, critic, optimizer, b, args, alone=True, passes=100)
        values = critic(ppo_vla.logprobs_of(policy, b, torch.arange(9), args)[2])
        assert least <= values.mean().item() <= most


@pytest.mark.parametrize("alone", [True, False])
def test_returns_that_are_not_finite_change_nothing(alone):
    parts = learner()
    parts[3]["returns"][2] = float("nan")
    before = [copy_of(module) for module in parts[:2]]
    with pytest.raises(FloatingPointError, match="loss"):
        learn(*parts, alone=alone)
    assert same_bits(parts[0], before[0]) and same_bits(parts[1], before[1])


# ---- Arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"gamma": 2.0}, r"gamma.*2\.0"),
        ({"gamma": -0.1}, r"gamma.*-0\.1"),
        ({"gae_lambda": 1.01}, r"gae_lambda.*1\.01"),
        ({"gae_lambda": float("nan")}, "gae_lambda.*nan"),
        ({"value_learning_rate": 0.0}, "value_learning_rate"),
        ({"value_clip": 0.0}, "value_clip"),
        ({"critic_warmup": -1}, "critic_warmup"),
        ({"group_size": 0}, "group_size"),
        ({"clip_low": float("nan")}, "clip_low"),
        ({"kl_coef": 0.1}, "lora"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        ppo_vla.validate(ppo_vla.Args(**wrong))
    assert len(str(error.value).splitlines()) == 1


def test_arguments_that_fit():
    args = ppo_vla.validate(ppo_vla.Args(gamma=1.0, gae_lambda=0.0, critic_warmup=0, group_size=1))
    assert (args.gamma, args.gae_lambda, args.critic_warmup) == (1.0, 0.0, 0)
    assert (args.eval_episodes, args.eval_temperature) == (50, args.temperature)
