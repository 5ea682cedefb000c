"""GRPO: advantages by hand and against the formula, dynamic sampling, batches joined, arguments."""

import math
import random
import statistics

import numpy as np
import pytest
import torch
from doubles import NO, OnesPolicy, RoundEnvs
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from learning import arguments, flat, gather, small_policy

import grpo_vla
from grpo_vla import group_advantages, in_order, stage_credit
from vla_envs import rewards
from vla_envs.training import batches, credit

# ---- Advantages --------------------------------------------------------------------------------------


def slow_advantages(returns, size, eps=1e-6):
    """The formula for one row of returns, group by group."""
    result = []
    for start in range(0, len(returns), size):
        group = [float(value) for value in returns[start : start + size]]
        mean, spread = statistics.mean(group), statistics.stdev(group)
        result += [0.0 if spread < 1e-6 else (value - mean) / (spread + eps) for value in group]
    return torch.tensor(result)


@st.composite
def groups(draw):
    """Returns of one to four groups, of any size and scale; in some groups all are equal."""
    size = draw(st.integers(2, 12))
    value = st.floats(-1, 1, width=32)
    group = st.lists(value, min_size=size, max_size=size) | value.map(lambda number: [number] * size)
    rows = draw(st.lists(group, min_size=1, max_size=4))
    scale = draw(st.sampled_from([1e-30, 1e-3, 1.0, 250.0, 123456.789, 1e12, 1e20, 3e38]))
    shift = draw(st.sampled_from([0.0, 0.0, -40.0]))
    return (torch.tensor(rows) * scale + shift).flatten(), size


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(groups(), st.randoms(use_true_random=False))
@example((torch.tensor([3e38, -3e38, 1e38, 0.0]), 4), random.Random(0))
def test_group_advantages(returns_and_size, rng):
    """The formula, group by group; exactly 0 among equals; finite; moved with the members; for every row."""
    returns, size = returns_and_size
    spreads = returns.double().unflatten(0, (-1, size)).std(dim=1)
    assume(((spreads < 0.99e-6) | (spreads > 1.01e-6)).all())
    copy = returns.clone()
    advantages = group_advantages(returns, size)
    assert advantages.dtype == torch.float32 and torch.equal(returns, copy)
    torch.testing.assert_close(advantages, slow_advantages(returns, size), atol=1e-5, rtol=1e-5)
    assert advantages.abs().max() <= math.sqrt(size)
    for group, its in zip(returns.split(size), advantages.split(size)):
        assert its.eq(0).all() if group.eq(group[0]).all() else its.sum().abs() < 1e-4
    order = torch.tensor(rng.sample(range(size), size))
    both = torch.stack([-returns, returns.view(-1, size)[:, order].flatten()]).unsqueeze(1)  # (2, 1, N)
    expected = torch.stack([-advantages, advantages.view(-1, size)[:, order].flatten()]).unsqueeze(1)
    torch.testing.assert_close(group_advantages(both, size), expected, atol=1e-5, rtol=1e-5)


def test_advantages_by_hand():
    half = 1 / math.sqrt(2)
    expected = torch.tensor([half, -half, 0.0, 0.0, -half, half])
    advantages = group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0, -5.0, 9.0]), 2)
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=0)
    advantages = group_advantages(torch.tensor([1.0, 0, 0, 0]), 4)  # mean 1/4, standard deviation 1/2
    torch.testing.assert_close(advantages, torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-5, rtol=0)


def test_equal_returns_whose_mean_rounds_give_exactly_zero():
    for size in (3, 6, 7, 49):
        values = 1e20 / torch.arange(1.0, 101, dtype=torch.float64)
        means = values.unsqueeze(1).expand(-1, size).mean(dim=1)
        assert (means - values).abs().max() > 1  # so the mean does round
        assert group_advantages(values.repeat_interleave(size), size).eq(0).all()


def test_differences_below_a_millionth_give_exactly_zero():
    for spread in (1e-9, 3e-7):
        returns = torch.tensor([0.0, spread, 0.0, spread], dtype=torch.float64)
        assert group_advantages(returns, 4).eq(0).all()
        assert group_advantages(returns * 1e5, 4).abs().min() > 0.5


def test_eps_is_added_to_the_standard_deviation():
    returns = torch.tensor([0.0, 1.0, 2.0])  # standard deviation 1
    torch.testing.assert_close(group_advantages(returns, 3, eps=1.0), torch.tensor([-0.5, 0.0, 0.5]))
    torch.testing.assert_close(group_advantages(returns, 3, eps=0.0), torch.tensor([-1.0, 0.0, 1.0]))
    small = returns * 1e-5
    torch.testing.assert_close(group_advantages(small, 3, eps=0.0), torch.tensor([-1.0, 0.0, 1.0]))
    assert group_advantages(small, 3)[2].item() == pytest.approx(1 / 1.1, abs=1e-4)


def test_advantages_are_float32_of_every_type():
    for dtype in (torch.float64, torch.float32, torch.int64, torch.bool):
        advantages = group_advantages(torch.tensor([0, 1, 1, 1]).to(dtype), 4)
        assert advantages.dtype == torch.float32
        torch.testing.assert_close(advantages, torch.tensor([-1.5, 0.5, 0.5, 0.5]), atol=1e-5, rtol=0)


def test_groups_that_do_not_divide():
    for members, size in ((12, 5), (12, 8), (3, 4), (6, 1), (6, 0), (6, -2)):
        with pytest.raises(ValueError, match=rf"{members}\D.*{size}") as error:
            group_advantages(torch.zeros(members), size)
        assert len(str(error.value).splitlines()) == 1


# ---- Credit by stage ---------------------------------------------------------------------------------


def slow_credit(stages, alive, size):
    """Stage by stage, group by group, member by member."""
    steps, members = len(stages), len(stages[0])
    result = [[0.0] * members for _ in range(steps)]
    for start in range(0, members, size):
        for stage in {0, *(number for row in stages for number in row)}:
            entries, outcomes = {}, {}
            for i in range(start, start + size):
                its = [t for t in range(steps) if alive[t][i] and (stages[t - 1][i] if t else 0) == stage]
                if its:
                    later = [stages[t][i] for t in range(its[0], steps) if alive[t][i]]
                    entries[i], outcomes[i] = its, float(max(later) > stage)
            if len(set(outcomes.values())) < 2:
                continue
            mean, spread = statistics.mean(outcomes.values()), statistics.stdev(outcomes.values())
            for i, its in entries.items():
                for t in its:
                    result[t][i] = (outcomes[i] - mean) / (spread + 1e-6)
    return torch.tensor(result)


def test_credit_by_hand():
    """Two members: one drops the object and fails in what it did while it held it, one succeeds."""
    stages = torch.tensor([[1, 0], [3, 1], [-1, 3], [-1, 3], [-1, 9]])
    its = stage_credit(stages, torch.ones(5, 2), 2)
    half = 1 / math.sqrt(2)  # both left stages 0 and 1, one left stage 3
    expected = [[0.0, 0.0], [0.0, 0.0], [-half, 0.0], [0.0, half], [0.0, half]]
    torch.testing.assert_close(its, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [2, 3, 6])
def test_credit_against_the_slow_one(seed, size):
    numbers = torch.Generator().manual_seed(seed)
    stages = torch.randint(-1, 5, (9, 24), generator=numbers)
    lengths = torch.randint(0, 10, (24,), generator=numbers)  # 0: left out
    alive = torch.arange(9).unsqueeze(1) < lengths
    its = stage_credit(stages, alive, size)
    assert its.dtype == torch.float32 and its.abs().max() > 0.5
    torch.testing.assert_close(its, slow_credit(stages.tolist(), alive.tolist(), size), atol=1e-5, rtol=1e-5)
    assert its[~alive].eq(0).all()
    junk = torch.where(alive, stages, torch.randint(-1, 5, (9, 24), generator=numbers))
    assert torch.equal(stage_credit(junk, alive, size), its)  # what follows an end is not looked at


def test_stages_in_order():
    """What was dropped is before what is far; the second of two goals comes after the first."""
    for names, last in ((rewards.STAGES, "dropped"), (rewards.JOINT_STAGES, "let go")):
        assert len(names) == credit.STAGES and names[credit.DROPPED] == last
    assert in_order(torch.tensor([[6, 0, 5], [13, 7, 12]])).tolist() == [[-1, 0, 5], [6, 7, 12]]


def test_where_members_agree_there_is_no_credit():
    assert stage_credit(torch.arange(5).unsqueeze(1).expand(5, 4), torch.ones(5, 4), 4).eq(0).all()
    assert stage_credit(torch.zeros(5, 4, dtype=torch.int64), torch.ones(5, 4), 2).eq(0).all()
    with pytest.raises(ValueError, match="4 environments do not divide into groups of 3"):
        stage_credit(torch.zeros(5, 4, dtype=torch.int64), torch.ones(5, 4), 3)


# ---- Dynamic sampling --------------------------------------------------------------------------------


class PaidEnvs(RoundEnvs):
    """A reward of the user's own: more for members with a higher number."""

    def pay(self):
        return 0.1 * np.arange(self.num_envs)


def who(batch):
    """Which environments of which rounds are in a batch, as ``100 r + i``."""
    return batch["state"][batch["when"] == 0, 0].int().tolist()  # of their first decisions


def test_groups_that_teach_something_are_kept():
    envs = RoundEnvs([1, NO, NO, NO, 1, 2], [1, 1, NO, 2], [3, NO])
    batch = gather(envs, 3, 2)
    assert envs.counts == [6, 4, 2]  # only what is missing is played anew
    assert batch["kept"].tolist() == [True, False, False, False, True, True]
    assert batch["zero_std"].tolist() == [False, True, True, True, False, False]
    assert who(batch) == [100, 101, 202, 203, 300, 301]
    assert batch["instructions"] == [f"task {i}" for i in (0, 1, 2, 3, 0, 1)]
    assert batch["rewards"].sum(dim=0).tolist() == [1, 0, 0, 1, 1, 0]
    assert batch["alive"].sum(dim=0).tolist() == [1, 3, 3, 2, 3, 3]
    assert batch["tokens"].shape == batch["logprobs"].shape == (15, 14)
    assert batch["image"].shape == (15, 8, 8, 3) and batch["alive"].shape == (3, 6)
    assert torch.bincount(batch["who"]).tolist() == [1, 3, 3, 2, 3, 3]


def test_a_full_batch_needs_one_round():
    envs = RoundEnvs([1, NO, NO, 2], [1, NO, NO, 2])
    batch = gather(envs, 2, 2)
    assert envs.round == 1 and batch["kept"].tolist() == [True, True] and who(batch) == [100, 101, 102, 103]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_rounds_are_limited(most):
    envs = RoundEnvs([1, NO, NO, NO], [NO, NO], [NO, 1])
    batch = gather(envs, 2, 2, max_rounds=most)
    assert envs.round == most and len(batch["kept"]) == [2, 3, 4][most - 1]
    assert who(batch) == [100, 101] + [300, 301] * (most == 3)


def test_members_share_a_scene_and_no_scene_comes_twice():
    rounds = [NO] * 8, [NO] * 8, [NO] * 8
    envs = RoundEnvs(*rounds)
    gather(envs, 4, 2, max_rounds=3)
    scenes = [seed for seeds in envs.seeds for seed in seeds]
    assert scenes[::2] == scenes[1::2] and len(set(scenes)) == 12
    seeds = {}
    for name, iteration, seed in (("same", 1, 1), ("next", 2, 1), ("other", 1, 2)):
        again = RoundEnvs(*rounds)
        gather(again, 4, 2, iteration, max_rounds=3, seed=seed)
        seeds[name] = again.seeds
    assert seeds["same"] == envs.seeds
    for name in ("next", "other"):
        assert not set(scenes) & {seed for seeds in seeds[name] for seed in seeds}


def winners(count, size):
    return [1] * count + [NO] * (size - count)


@pytest.mark.parametrize("size", [8, 10])
def test_the_limits_of_the_success_rate_are_kept_too(size):
    """0.1 and 0.9 of ten members; one and seven of eight lie within."""
    most = size - 1
    envs = RoundEnvs(winners(0, size) + winners(1, size) + winners(most, size) + winners(size, size))
    assert gather(envs, 4, size, max_rounds=1)["kept"].tolist() == [False, True, True, False]
    envs = RoundEnvs(winners(1, size) + winners(2, size) + winners(most, size))
    kept = gather(envs, 3, size, max_rounds=1, keep_low=2 / size, keep_high=0.85)["kept"]
    assert kept.tolist() == [False, True, False]


def test_totals_are_of_all_that_was_played():
    envs = RoundEnvs([1, 1, NO, NO], [2, NO, 1, 3])
    batch = gather(envs, 2, 2, max_rounds=2)
    totals = batch["totals"]
    assert (totals["episodes"], totals["successes"], totals["return"]) == (8, 5, 5.0)
    assert totals["control_steps"] == 2 * (1 + 1 + 3 + 3 + 2 + 3 + 1 + 3)
    assert totals["policy_s"] > 0


def test_no_group_teaches_anything():
    envs = RoundEnvs(*[[1, 1, NO, NO]] * 4)
    batch = gather(envs, 2, 2)
    assert envs.round == 4 and len(batch["kept"]) == 8 and not batch["kept"].any()
    assert (
        batch["zero_std"].all()
        and batch["alive"].shape == (3, 0)
        and len(batch["who"]) == 0
        and batch["instructions"] == []
    )
    assert batch["totals"]["episodes"] == 16 and batch["totals"]["successes"] == 8


def test_groups_with_equal_returns_are_never_kept():
    batch = gather(RoundEnvs([1, 1, NO, NO, 1, NO]), 3, 2, max_rounds=1, keep_low=0.0, keep_high=1.0)
    assert batch["kept"].tolist() == [False, False, True]


def test_returns_may_differ_where_nobody_succeeds():
    """With a reward of the user's own."""
    batch = gather(PaidEnvs([NO] * 4), 2, 2, keep_low=0.0)
    assert batch["kept"].all() and not batch["zero_std"].any()
    torch.testing.assert_close(batch["rewards"].sum(dim=0), torch.tensor([0.0, 0.3, 0.6, 0.9]))
    assert group_advantages(batch["rewards"].sum(dim=0), 2).abs().min() > 0.5
    batch = gather(PaidEnvs([NO] * 4), 2, 2, max_rounds=1)
    assert not batch["kept"].any() and not batch["zero_std"].any()


def test_shorter_rounds_end_with_nobody_alive():
    batch = gather(PaidEnvs([1, NO, NO, NO], [1, 2]), 2, 2, keep_low=0.5, keep_high=1.0)
    assert batch["kept"].tolist() == [True, False, True] and who(batch) == [100, 101, 200, 201]
    assert batch["alive"].sum(dim=0).tolist() == [1, 3, 1, 2]
    assert batch["rewards"][2].tolist() == [0, pytest.approx(0.1), 0, 0]


def test_kept_members_have_the_advantages_of_the_whole_rollout():
    success = [1, NO, 2, 2, 1, 1, 3, NO, NO, NO, NO, NO, NO, NO, NO, 2]
    whole = grpo_vla.rollout(RoundEnvs(success), OnesPolicy(), np.repeat([3, 4, 5, 6], 4), 1.0)
    expected = group_advantages(whole["rewards"].sum(dim=0), 4)
    batch = gather(RoundEnvs(success), 4, 4, max_rounds=1)
    assert batch["kept"].tolist() == [True, True, False, True]
    kept = batch["kept"].repeat_interleave(4)
    assert torch.equal(group_advantages(batch["rewards"].sum(dim=0), 4), expected[kept])
    assert expected[~kept].eq(0).all() and expected[kept].ne(0).all()
    for name in ("rewards", "alive"):
        assert torch.equal(batch[name], whole[name][:, kept])
    for name in ("image", "tokens", "logprobs"):
        assert torch.equal(batch[name], whole[name][kept[whole["who"]]])


def test_an_update_on_what_was_kept():
    """Two rounds of different lengths: only the decisions of those alive are learnt from."""
    envs = PaidEnvs([1, 2, 1, 1, NO, NO], [NO, 1], limit=4)
    batch = gather(envs, 3, 2, keep_low=0.1, keep_high=1.0)
    assert batch["kept"].tolist() == [True, True, False, True] and batch["alive"].shape == (4, 6)
    advantages = group_advantages(batch["rewards"].sum(dim=0), 2)
    policy, args = small_policy(), arguments(grpo_vla)
    b = grpo_vla.samples_of(policy, batch, advantages.expand_as(batch["rewards"]), args)
    assert len(b["who"]) == 1 + 2 + 1 + 1 + 4 + 1 and b["weights"].sum().item() == pytest.approx(6)
    before = grpo_vla.logprobs_of(policy, b, torch.arange(10), args)[0].mean(dim=1)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    logs = grpo_vla.update(policy, optimizer, b, [torch.arange(10)], args)
    change = grpo_vla.logprobs_of(policy, b, torch.arange(10), args)[0].mean(dim=1) - before
    assert logs["policy_loss"] == pytest.approx(0.0, abs=1e-5) and logs["grad_norm"] > 0
    assert (change * b["advantages"] * b["weights"]).sum() > 0


# ---- Batches -----------------------------------------------------------------------------------------


def numbered(steps, members, first):
    """A batch with members ``first``, ``first`` + 1, ... whose numbers are in everything."""
    numbers = first + torch.arange(members) + torch.zeros(steps, 1)
    return {
        "image": numbers.byte().view(steps, members, 1, 1, 1).expand(-1, -1, 2, 2, 3),
        "state": numbers.unsqueeze(2).expand(-1, -1, 8),
        "tokens": numbers.long().unsqueeze(2).expand(-1, -1, 14),
        "logprobs": -numbers.unsqueeze(2).expand(-1, -1, 14),
        "rewards": numbers * 10,
        "stages": numbers.long(),
        "steps": numbers.long(),
        "alive": torch.ones(steps, members, dtype=torch.bool),
        "success": torch.arange(first, first + members) % 4 == 1,
        "instructions": [f"task {first + i}" for i in range(members)],
    }


def test_batches_are_joined_by_hand():
    keep = [torch.tensor([True, False, True]), torch.tensor([False, True])]
    joined = batches.join([flat(numbered(2, 3, 1)), flat(numbered(3, 2, 4))], keep)
    assert joined["rewards"].tolist() == [[10, 30, 50], [10, 30, 50], [0, 0, 50]]
    assert joined["success"].tolist() == [True, False, True]
    assert joined["alive"].tolist() == [[True] * 3, [True] * 3, [False, False, True]]
    assert joined["instructions"] == ["task 1", "task 3", "task 5"] and joined["round"].tolist() == [0, 0, 1]
    assert joined["who"].tolist() == [0, 1, 2, 0, 1, 2, 2]
    assert joined["when"].tolist() == [0, 0, 0, 1, 1, 1, 2]  # in order of time
    assert joined["image"].shape == (7, 2, 2, 3) and joined["image"].dtype == torch.uint8
    assert joined["image"][:, 1, 1, 2].tolist() == [1, 3, 5, 1, 3, 5, 5]
    assert joined["tokens"].dtype == torch.int64 and joined["tokens"][:, 13].tolist() == [1, 3, 5, 1, 3, 5, 5]
    assert joined["state"][3, 7] == 1 and joined["logprobs"][6, 0] == -5


def test_one_batch_of_all_members_stays_as_it_is():
    batch = flat(numbered(2, 3, 1))
    joined = batches.join([dict(batch)], [torch.ones(3, dtype=torch.bool)])
    assert joined["instructions"] == batch["instructions"]
    for name in (*batches.OF_SAMPLES, *batches.OF_STEPS):
        assert torch.equal(joined[name], batch[name])


def test_nobody_is_kept():
    nobody = torch.zeros(3, dtype=torch.bool)
    joined = batches.join([flat(numbered(2, 3, 1)), flat(numbered(4, 3, 4))], [nobody, nobody])
    assert joined["alive"].shape == (4, 0) and joined["image"].shape == (0, 2, 2, 3)
    assert joined["instructions"] == [] and len(joined["who"]) == 0


def test_totals_by_hand():
    batch = {
        "alive": torch.tensor([[True, True, True], [True, False, False]]),
        "success": torch.tensor([False, True, False]),
        "steps": torch.tensor([[8, 5, 8], [3, 8, 0]]),
        "rewards": torch.tensor([[1.0, 2.0, -1.5], [0.5, 100.0, 0.0]]),
        "diverged": torch.tensor([False, False, True]),
        "policy_s": 0.25,
    }
    expected = {"episodes": 3, "successes": 1, "control_steps": 24, "return": 2.0, "policy_s": 0.25}
    expected["diverged"] = 1
    assert batches.totals([batch]) == expected
    assert batches.totals([batch, batch]) == {name: 2 * value for name, value in expected.items()}


# ---- Arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"keep_low": 0.6, "keep_high": 0.4}, r"keep_low.*0\.6.*0\.4"),
        ({"keep_low": -0.1}, r"-0\.1"),
        ({"keep_high": 1.1}, r"1\.1"),
        ({"keep_low": float("nan")}, "nan"),
        ({"group_size": 1}, "group_size is 1"),
        ({"group_size": -4}, "group_size is -4"),
        ({"max_rounds": 0}, "max_rounds is 0"),
        ({"max_rounds": -1}, "max_rounds is -1"),
        ({"clip_high": float("inf")}, "clip_high"),
        ({"kl_coef": 0.1}, "lora"),
        ({"num_groups": 0}, "num_groups"),
        ({"minibatch_size": 0}, "minibatch_size"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        grpo_vla.validate(grpo_vla.Args(**wrong))
    assert len(str(error.value).splitlines()) == 1


def test_arguments_that_fit():
    args = grpo_vla.validate(grpo_vla.Args(keep_low=0.5, keep_high=0.5, temperature=1.3, clip_low=0.0))
    assert (args.keep_low, args.keep_high, args.clip_low, args.eval_temperature) == (0.5, 0.5, 0.0, 1.3)
    assert args.eval_episodes == 50
    args = grpo_vla.validate(grpo_vla.Args(keep_low=0.0, keep_high=1.0, kl_coef=0.1, train="lora"))
    assert (args.keep_low, args.keep_high) == (0.0, 1.0)
