"""TGRPO: advantages by hand and against the equations, groups that stop together, the paper's letter."""

import json
import math
import statistics

import numpy as np
import pytest
import torch
from doubles import OnesPolicy, ScriptedEnvs
from learning import arguments, copy_of, gradient, same_bits, samples, small_batch, small_policy

import tgrpo_vla
from tgrpo_vla import held_rewards, step_advantages, stop_groups, tgrpo_advantages, trajectory_advantages
from vla_envs.training import batches, tgrpo_extras


def stage_advantages(rewards, alive, group_size):
    return tgrpo_extras.by_stage(step_advantages, rewards, alive, group_size)


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


def slow_trajectory(rewards, alive, size, mode="held"):
    steps, members = rewards.shape
    own = [[float(rewards[t, n]) for t in range(steps) if alive[t, n]] for n in range(members)]
    if mode == "held":
        ends = [max(map(len, own[n // size * size :][:size])) for n in range(members)]
        totals = [sum(its) + its[-1] * (end - len(its)) for its, end in zip(own, ends)]
    else:
        totals = [(sum if mode == "sum" else statistics.mean)(its) for its in own]
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
    """The last is done with 3; by 'held' the totals are 1, 2 and 6, else 1, 2 and 3 or their means."""
    rewards, alive = full([[1, 2, 3], [0, 0, 100]])
    alive[1, 2] = False
    for mode, totals in (("held", [1, 2, 6]), ("sum", [1, 2, 3]), ("mean", [0.5, 1, 3])):
        expected = torch.tensor([score(totals, n) for n in range(3)])
        torch.testing.assert_close(trajectory_advantages(rewards, alive, 3, mode), expected)


def test_who_finishes_beats_who_hovers():
    """One places the object (16) at decision 2, the other holds it over the basket (10) to the end.

    Held: 26 + 3 * 16 against 10 + 4 * 10; by their own steps 26 against 50.
    """
    rewards, alive = full([[10, 10], [16, 10], [0, 10], [0, 10], [0, 10]])
    alive[2:, 0] = False
    half = math.sqrt(0.5)
    held, by_sum = (trajectory_advantages(rewards, alive, 2, mode) for mode in ("held", "sum"))
    torch.testing.assert_close(held, torch.tensor([half, -half]))
    torch.testing.assert_close(by_sum, torch.tensor([-half, half]))
    torch.testing.assert_close(trajectory_advantages(rewards, alive, 2), held)  # the default
    earlier = rewards.clone()
    earlier[2:, 1] = torch.tensor([16.0, 0.0, 0.0])  # now the other one finishes as well, a decision later
    ended = alive.clone()
    ended[3:, 1] = False
    torch.testing.assert_close(trajectory_advantages(earlier, ended, 2), torch.tensor([half, -half]))


def test_rewards_are_held_until_the_own_group_ends():
    """The second group plays on for two decisions, which changes nothing in the first."""
    rewards, alive = full([[2, 4, 2, 2], [8, 2, 2, 4], [7, 7, 2, 2], [7, 7, 4, 2]])
    alive[1:, 0] = alive[2:, 1] = False
    assert held_rewards(rewards, alive).tolist() == [[2, 4, 2, 2], [2, 2, 2, 4], [2, 2, 2, 2], [2, 2, 4, 2]]
    half = math.sqrt(0.5)  # totals 2 + 2 and 4 + 2; 10 and 10
    torch.testing.assert_close(trajectory_advantages(rewards, alive, 2), torch.tensor([-half, half, 0, 0]))


@pytest.mark.parametrize("seed", range(3))
def test_held_is_the_sum_where_all_members_stop_together(seed):
    rewards, alive = random_rollout(seed)
    ends = alive.unflatten(1, (3, 4)).any(dim=2).repeat_interleave(4, dim=1)  # of the groups, at own times
    rewards = torch.where(ends & ~alive, torch.full_like(rewards, -2.0), rewards)
    held, by_sum = (trajectory_advantages(rewards, ends, 4, mode) for mode in ("held", "sum"))
    torch.testing.assert_close(held, by_sum)
    assert not torch.allclose(*(trajectory_advantages(rewards, alive, 4, mode) for mode in ("held", "sum")))


def test_the_mean_reward_of_a_trajectory():
    rewards, alive = full([[1, 2, 5], [1, 2, 0], [1, 5, 0]])
    alive[1:, 2] = False  # means 1, 3, 5; totals 3, 9, 5
    expected = torch.tensor([-1.0, 0.0, 1.0])
    torch.testing.assert_close(trajectory_advantages(rewards, alive, 3, "mean"), expected)
    assert not torch.allclose(trajectory_advantages(rewards, alive, 3, "sum"), expected, atol=0.1)


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
    for mode in ("held", "sum", "mean"):
        torch.testing.assert_close(
            trajectory_advantages(rewards, alive, size, mode), slow_trajectory(rewards, alive, size, mode),
            atol=1e-5, rtol=1e-5,
        )  # fmt: skip
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
    scaled = tgrpo_advantages(rewards * 7 - 3, alive, 4, 0.3, 0.7)  # nor where members end at their own times
    torch.testing.assert_close(scaled, tgrpo_advantages(rewards, alive, 4, 0.3, 0.7), atol=1e-4, rtol=1e-4)
    own = trajectory_advantages(rewards * 7, alive, 4, "sum")  # of which a shift would pay for time
    torch.testing.assert_close(own, trajectory_advantages(rewards, alive, 4, "sum"), atol=1e-4, rtol=1e-4)


def test_small_differences_count_in_full():
    """The equations add nothing to the standard deviation."""
    rewards, alive = full([[0.0, 1e-5, 2e-5]])
    expected = torch.tensor([-1.0, 0.0, 1.0])
    torch.testing.assert_close(trajectory_advantages(rewards, alive, 3), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step_advantages(rewards, alive, 3)[0], expected, atol=1e-5, rtol=1e-5)


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
    stage_advantages(rewards, alive, 4)
    assert torch.equal(rewards, copies[0]) and torch.equal(alive, copies[1])


@pytest.mark.parametrize(("members", "size"), [(12, 5), (12, 8), (3, 4), (6, 1), (6, 0), (6, -2)])
def test_groups_that_do_not_divide(members, size):
    rewards, alive = torch.zeros(2, members), torch.ones(2, members, dtype=torch.bool)
    modes = [(trajectory_advantages, (mode,)) for mode in ("held", "sum", "mean")]
    for function, extra in (
        *modes,
        (step_advantages, ()),
        (stage_advantages, ()),
        (tgrpo_advantages, (1, 1)),
    ):
        with pytest.raises(ValueError, match=rf"{members}\D.*{size}"):
            function(rewards, alive, size, *extra)


# ---- Members in the same stage -----------------------------------------------------------------------


def slow_stage(rewards, alive, size):
    """For every member its rewards by stage in order; the k-th is compared with the others' k-th, or last."""
    steps, members = rewards.shape
    visits = [{} for _ in range(members)]  # by stage: the decisions taken in it
    for n in range(members):
        for t in range(steps):
            if alive[t, n]:
                visits[n].setdefault(float(rewards[t - 1, n]) if t else None, []).append(t)
    result = torch.zeros(steps, members)
    for n in range(members):
        for stage, times in visits[n].items():
            others = [m for m in range(n // size * size, n // size * size + size) if stage in visits[m]]
            for k, t in enumerate(times):
                values = [
                    float(rewards[visits[m][stage][min(k, len(visits[m][stage]) - 1)], m]) for m in others
                ]
                result[t, n] = score(values, others.index(n)) if len(others) > 1 else 0.0
    return result


def test_stage_advantages_by_hand():
    """One grasps (4) a step later than the other; from there on both do the same."""
    rewards, alive = full([[4, 2], [4, 4], [8, 4], [8, 8]])
    half = math.sqrt(0.5)
    assert step_advantages(rewards, alive, 2)[:, 1].tolist() == pytest.approx([-half, 0, -half, 0])
    expected = torch.tensor([[half, -half], [0, 0], [0, 0], [0, 0]])
    torch.testing.assert_close(stage_advantages(rewards, alive, 2), expected)


def test_who_left_a_stage_keeps_what_it_left_with():
    """In stage 2 the first member goes to 8 at once; the second stays for one more decision, then drops."""
    rewards, alive = full([[2, 2], [8, 2], [8, -4]])
    half = math.sqrt(0.5)
    expected = torch.tensor([[0, 0], [half, -half], [0, -half]])  # the last: -4 against the 8 of the other
    torch.testing.assert_close(stage_advantages(rewards, alive, 2), expected)


def test_who_never_was_in_a_stage_is_not_compared():
    rewards, alive = full([[2, 2, -2], [4, 2, -2]])
    scores = stage_advantages(rewards, alive, 3)
    assert scores[1].tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5), 0.0])


@pytest.mark.parametrize("size", [2, 3, 4, 12])
@pytest.mark.parametrize("seed", range(4))
def test_the_stages_of_random_rollouts(seed, size):
    rewards, alive = random_rollout(seed, steps=9)
    scores = stage_advantages(rewards, alive, size)
    torch.testing.assert_close(scores, slow_stage(rewards, alive, size), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores[0], step_advantages(rewards, alive, size)[0])  # all begin together
    scaled = stage_advantages(3 * rewards - 5, alive, size)
    torch.testing.assert_close(scaled, scores, atol=1e-5, rtol=1e-5)
    order = torch.arange(12).view(-1, size).flip(1).flatten()
    torch.testing.assert_close(stage_advantages(rewards[:, order], alive[:, order], size), scores[:, order])


# ---- Alphas from what predicts success ---------------------------------------------------------------


def fit(state, rewards, alive, success, size):
    """The fit of plain TGRPO's terms, as the script calls it."""
    return tgrpo_extras.fit_alphas(
        state, step_advantages(rewards, alive, size), trajectory_advantages(rewards, alive, size),
        tgrpo_vla.group_advantages(torch.tensor(success).float(), size), alive,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["held", "sum", "mean"])
@pytest.mark.parametrize("group_by", ["time", "stage"])
def test_alphas_are_the_least_squares_fit(mode, group_by):
    """NumPy's least squares, of the decisions of groups with both outcomes and the start's two samples."""
    rewards, alive = random_rollout(3, groups=4)
    success = [letter == "1" for letter in "1011000011110100"]  # of four groups
    step = (slow_stage if group_by == "stage" else slow_step)(rewards, alive, 4)
    trajectory = slow_trajectory(rewards, alive, 4, mode)
    outcomes = [score([float(x) for x in success[n // 4 * 4 :][:4]], n % 4) for n in range(16)]
    alphas = tgrpo_extras.fit_alphas({}, step, trajectory, torch.tensor(outcomes), alive)
    root = math.sqrt(tgrpo_extras.MEMORY)
    rows = [[root, 0.0, 0.3 * root], [0.0, root, 0.7 * root]]
    for n in (*range(4), *range(12, 16)):
        root = math.sqrt(1.0 / int(alive[:, n].sum()))
        rows += [[root * float(step[t, n]), root * float(trajectory[n]), root * outcomes[n]]
                 for t in range(len(alive)) if alive[t, n]]  # fmt: skip
    rows = np.array(rows)
    expected = np.linalg.lstsq(rows[:, :2], rows[:, 2], rcond=None)[0]
    assert alphas == pytest.approx(np.maximum(expected, 0.0).tolist(), abs=1e-5)


def test_groups_of_one_outcome_leave_the_alphas():
    rewards, alive = random_rollout(1)
    state = {}
    assert fit(state, rewards, alive, [True] * 4 + [False] * 8, 4) == pytest.approx([0.3, 0.7])
    assert np.array(state["fit"]) == pytest.approx(tgrpo_extras.MEMORY * np.array(tgrpo_extras.START))
    assert json.loads(json.dumps(state)) == state  # as counters are saved


def test_what_tells_success_gets_the_weight():
    """Who succeeds has the larger total; the steps are the same for all but once, the wrong way round."""
    rewards, alive = full([[0, 1, 0, 1], [9, 0, 9, 0]])
    state = {}
    for _ in range(30):
        alpha1, alpha2 = fit(state, rewards, alive, [True, False] * 2, 2)
    assert alpha1 == pytest.approx(0.0, abs=0.01) and alpha2 == pytest.approx(1.0, abs=0.02)


def test_what_tells_the_contrary_gets_none():
    rewards, alive = full([[1, 0, 1, 0]])
    state = {}
    for _ in range(30):
        alphas = fit(state, rewards, alive, [False, True] * 2, 2)
    assert alphas == [0.0, 0.0]


# ---- Groups that stop together -----------------------------------------------------------------------


def play(success, limit=3):
    """A rollout of two groups of two."""
    return tgrpo_vla.rollout(ScriptedEnvs(success, limit), OnesPolicy(), np.array([5, 5, 6, 6]), 1.5)


def times_alive(batch):
    return batch["alive"].sum(dim=0).tolist()


def test_a_group_stops_at_its_first_success():
    batch = stop_groups(play((2, 99, 99, 1)), 2)
    assert batch["alive"][:2].tolist() == [[True] * 4, [True, True, False, False]]
    assert not batch["alive"][2:].any()
    assert batch["success"].tolist() == [True, False, False, True]


def test_who_is_stopped_with_its_group_has_not_succeeded():
    """Environment 2 would succeed at decision 2, after its group was stopped at decision 1."""
    batch = stop_groups(play((3, 99, 2, 1)), 2)
    assert batch["success"].tolist() == [True, False, False, True] and times_alive(batch) == [3, 3, 1, 1]


def test_two_can_be_first():
    batch = stop_groups(play((2, 2, 3, 3)), 2)
    assert batch["success"].all() and times_alive(batch) == [2, 2, 3, 3]


def test_a_group_without_success_runs_to_its_end():
    before = play((99, 99, 1, 99))
    kept = {name: before[name].clone() for name in ("alive", "success", "rewards")}
    batch = stop_groups(before, 2)
    assert times_alive(batch) == [3, 3, 1, 1] and batch["success"].tolist() == [False, False, True, False]
    assert all(torch.equal(before[name], value) for name, value in kept.items())
    assert batch["instructions"] == before["instructions"]


def test_who_was_cut_off_before_the_stop_stays_out():
    alive = torch.tensor([[True, True], [False, True], [False, True]])
    batch = stop_groups({"alive": alive, "success": torch.tensor([False, True])}, 2)
    assert torch.equal(batch["alive"], alive) and batch["success"].tolist() == [False, True]


def test_nothing_after_the_stop_counts():
    batch = stop_groups(play((2, 99, 99, 1)), 2)
    totals = batches.totals([batch])
    assert (totals["episodes"], totals["successes"], totals["control_steps"]) == (4, 2, 2 * (2 + 2 + 1 + 1))
    assert totals["return"] == 10 + 11 + 12 + 13 + 20 + 21
    rewards, alive = full([[10, 11, 12, 13], [20, 21, 0, 0]])
    alive[1, 2:] = False
    expected = tgrpo_advantages(rewards, alive, 2, 0.3, 0.7)
    taken = tgrpo_advantages(batch["rewards"], batch["alive"], 2, 0.3, 0.7)
    torch.testing.assert_close(taken[:2], expected)
    assert taken[2:].eq(0).all()


# ---- The paper's letter ------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [True, False])
def test_the_clip_can_be_switched_off(clip):
    policy, args = small_policy(), arguments(tgrpo_vla, clip=clip)
    b = samples(tgrpo_vla, policy, small_batch(), torch.ones(3, 4), args)
    b["old_logprobs"] = b["old_logprobs"] - math.log(1.5)  # as if they had become likelier
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    logs = tgrpo_vla.update(policy, optimizer, b, [torch.arange(9)], args)
    assert logs["policy_loss"] == pytest.approx(-1.28 if clip else -1.5, abs=1e-4)
    assert logs["clipfrac_high"] == pytest.approx(float(clip)) and logs["ratio"] == pytest.approx(
        1.5, abs=1e-4
    )
    assert gradient(policy).norm() == 0 if clip else gradient(policy).norm() > 1e-3


def test_one_update_per_decision_step():
    """What is learnt from one step is the weighted mean over those alive at it."""
    policy, args, advantages = small_policy(), arguments(tgrpo_vla), torch.zeros(3, 4)
    advantages[1] = torch.tensor([0.0, 3.0, 2.0, 3.0])  # member 0 has finished; lengths 3, 2, 3
    b = samples(tgrpo_vla, policy, small_batch(), advantages, args)
    optimizer, before = torch.optim.SGD(policy.parameters(), lr=0.1), copy_of(policy)
    first = tgrpo_vla.update(policy, optimizer, b, [torch.nonzero(b["when"] == 0).flatten()], args)
    assert first["policy_loss"] == 0 and same_bits(policy, before)
    second = tgrpo_vla.update(policy, optimizer, b, [torch.nonzero(b["when"] == 1).flatten()], args)
    assert second["policy_loss"] == pytest.approx(-(1.0 + 1.0 + 1.0) / (1 / 3 + 1 / 2 + 1 / 3), abs=1e-4)
    assert not same_bits(policy, before)


# ---- Arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ["LiberoObject", "LiberoGoal"])
@pytest.mark.parametrize("task_id", [0, 4, 7])
def test_default_alphas(suite, task_id):
    args = tgrpo_vla.validate(tgrpo_vla.Args(suite=suite, task_id=task_id))
    assert (args.alpha1, args.alpha2, args.return_mode) == (0.3, 0.7, "held")
    args = tgrpo_vla.validate(tgrpo_vla.Args(suite=suite, task_id=task_id, alpha1=0.0))
    assert (args.alpha1, args.alpha2) == (0.0, 0.7)


def of_paper(**given):
    return tgrpo_vla.Args(**tgrpo_vla.PRESETS["paper"], preset="paper", **given)


@pytest.mark.parametrize("task_id", range(10))
def test_the_papers_alphas(task_id):
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
    args = tgrpo_vla.validate(of_paper(task_id=task_id))
    assert (args.alpha1, args.alpha2) == paper[task_id]
    args = tgrpo_vla.validate(of_paper(task_id=task_id, alpha1=0.0))
    assert (args.alpha1, args.alpha2) == (0.0, paper[task_id][1])
    for elsewhere in (
        of_paper(task_id=task_id, suite="LiberoGoal"),
        of_paper(task_ids=(task_id, (task_id + 1) % 10)),
    ):
        args = tgrpo_vla.validate(elsewhere)
        assert (args.alpha1, args.alpha2) == (0.3, 0.7)


def test_the_papers_letter():
    """All members of a group stop together, so that the return is the paper's sum."""
    args, plain = tgrpo_vla.validate(of_paper()), tgrpo_vla.validate(tgrpo_vla.Args())
    assert (args.stop, args.clip, args.update_every, args.update_epochs) == ("group", False, "step", 1)
    assert args.target_kl == 1e9 > 1 > plain.target_kl
    batch = stop_groups(play((2, 99, 99, 1)), 2)
    held, by_sum = (
        trajectory_advantages(batch["rewards"], batch["alive"], 2, mode) for mode in ("held", "sum")
    )
    torch.testing.assert_close(held, by_sum)


def test_alphas_are_found_or_given():
    args = tgrpo_vla.validate(tgrpo_vla.Args(alphas="auto"))
    assert (args.alpha1, args.alpha2) == (None, None)
    assert tgrpo_vla.validate(args) == args  # as when it is resumed


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"group_size": 1}, "group_size is 1"),
        ({"group_size": 0}, "group_size is 0"),
        ({"alpha1": float("nan")}, "alpha1.*nan"),
        ({"alpha2": float("inf")}, "alpha2.*inf"),
        ({"alphas": "auto", "alpha1": 0.3}, "alphas auto finds alpha1"),
        ({"alphas": "auto", "alpha2": 0.0}, "expected neither"),
        ({"clip_low": float("nan")}, "clip_low"),
        ({"clip_low": 1.5}, r"clip_low is 1\.5; expected at most 1"),
        ({"clip": False, "clip_high": 0.3}, "--no-clip clips nothing"),
        ({"preset": "paper"}, "command line"),
        ({"micro_batch_size": 257}, "micro_batch_size is 257; expected at most 256"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"kl_coef": 0.1}, "lora"),
        ({"num_groups": 0}, "num_groups"),
        ({"temperature": 0.0}, "temperature"),
        ({"suite": "LiberoObjekt"}, "LiberoObject"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        tgrpo_vla.validate(tgrpo_vla.Args(**wrong))
    assert len(str(error.value).splitlines()) == 1
