"""TPO: scores, pairs, windows and the preference loss, by hand and against slow ones; its update."""

import math

import pytest
import torch
from learning import arguments, copy_of, flat, gradient, learn, same_bits, small_batch, small_policy

import tgrpo_vla
import tpo_vla
from tpo_vla import make_pairs, make_windows, preference_loss, samples_of, trajectory_scores, window_sums
from vla_envs.training import credit

# ---- The loss ----------------------------------------------------------------------------------------


def test_equal_policies_have_lost_nothing_and_won_nothing():
    """Every margin is 0: a loss of log 2, and a gradient that pulls the two members apart."""
    chosen, rejected = (torch.full((3, 2), value, requires_grad=True) for value in (-4.0, -9.0))
    loss, measured = preference_loss(chosen, chosen.detach(), rejected, rejected.detach(), 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert measured["accuracy"] == 0 and measured["margin"] == 0 and measured["chosen_logprob"] == -4
    torch.testing.assert_close(chosen.grad, torch.full((3, 2), -0.1 / 2 / 6))
    torch.testing.assert_close(rejected.grad, torch.full((3, 2), 0.1 / 2 / 6))


def test_the_loss_by_hand():
    """One margin of 0.1 (2 + 3), one of 0.1 (-1 - 0)."""
    w, ref_w = torch.tensor([[-3.0], [-6.0]]), torch.tensor([[-5.0], [-5.0]])
    worse, ref_l = torch.tensor([[-10.0], [-2.0]]), torch.tensor([[-7.0], [-2.0]])
    loss, measured = preference_loss(w, ref_w, worse, ref_l, 0.1)
    expected = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(0.1))) / 2
    assert loss.item() == pytest.approx(expected)
    assert measured["accuracy"] == 0.5 and measured["chosen_logprob"] == -4.5
    assert measured["margin"].item() == pytest.approx(0.2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_the_loss_of_the_equation(seed, beta):
    numbers = torch.Generator().manual_seed(seed)
    its = [3 * torch.randn(4, 5, generator=numbers) for _ in range(4)]
    total = 0.0
    for p in range(4):
        for k in range(5):
            w, ref_w, worse, ref_l = (float(values[p, k]) for values in its)
            total -= math.log(1 / (1 + math.exp(-beta * (w - ref_w - worse + ref_l))))
    assert preference_loss(*its, beta)[0].item() == pytest.approx(total / 20, rel=1e-5)


@pytest.mark.parametrize("gap", [1e3, -1e3, 1e30])
def test_huge_margins_stay_finite(gap):
    w = torch.tensor([[gap]], requires_grad=True)
    loss, _ = preference_loss(w, torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), 0.1)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(w.grad).all()


# ---- Scores and pairs --------------------------------------------------------------------------------


def test_best_and_worst_of_a_group():
    scores = torch.tensor([0.0, 2.0, 2.0, 1.0, 3.0, 3.0, 3.0, 3.0])
    assert make_pairs(scores, 4, "best-worst").tolist() == [[1, 0]]


def test_all_pairs_of_a_group():
    scores = torch.tensor([0.0, 2.0, 2.0, 1.0, 5.0, 5.0, 5.0, 4.0])
    expected = [[1, 0], [1, 3], [2, 0], [2, 3], [3, 0], [4, 7], [5, 7], [6, 7]]
    assert make_pairs(scores, 4, "all").tolist() == expected


@pytest.mark.parametrize("pairs", ["best-worst", "all"])
def test_equal_members_are_no_pair(pairs):
    assert make_pairs(torch.ones(6), 3, pairs).shape == (0, 2)
    assert make_pairs(torch.ones(6) + 1e-8 * torch.arange(6), 3, pairs).shape == (0, 2)


def played(lengths=(1, 3, 2, 3), **changes):
    """A batch in which those that end early have succeeded, in a stage of their own."""
    batch = small_batch(lengths)
    stages = torch.tensor([[5, 0, 1, 1], [5, 1, 5, 6], [5, 2, 5, 0]])
    return flat(batch | {"stages": stages} | changes)


def test_success_and_return():
    batch = played(rewards=torch.tensor([[16.0, -2, 2, 2], [0, 2, 16, -4], [0, 4, 0, -2]]))
    assert trajectory_scores(batch, "success").tolist() == [1, 0, 1, 0]
    assert trajectory_scores(batch, "return").tolist() == [48, 4, 34, -4]  # a finished one keeps its last


def test_grapes_score_by_hand():
    """Stages reached, of 5: 5 5 5; 0 1 2; 1 5 5; 1 1 1, as what is dropped is no progress and no loss."""
    batch = played()
    batch["logprobs"] = torch.full_like(batch["logprobs"], -1.0)
    batch["logprobs"][batch["who"] == 3] = -100.0  # floored
    costs, lengths, success = (0, 12, 4, 12), (1, 3, 2, 3), (1, 0, 1, 0)
    sure = (-1.0, -1.0, -1.0, math.log(0.05))
    expected = [
        0.01 * n * p + math.exp(-0.01 * c) + 5 * s for c, n, s, p in zip(costs, lengths, success, sure)
    ]
    assert trajectory_scores(batch, "grape").tolist() == pytest.approx(expected)
    dense = trajectory_scores(batch | {"logprobs": batch["logprobs"] + 1e3}, "grape")  # densities above 1
    assert dense[0].item() == pytest.approx(6.0)


def test_rewards_are_held_as_in_tgrpo():
    batch = small_batch()
    both = (module.held_rewards(batch["rewards"], batch["alive"]) for module in (credit, tgrpo_vla))
    assert torch.equal(*both)


@pytest.mark.parametrize("score", ["success", "return", "grape"])
def test_a_group_that_is_left_out_has_no_pair(score):
    batch = played()
    left = batch | {name: batch[name] * 0 for name in ("rewards", "alive", "success")}
    left["alive"] = left["alive"].bool()
    assert make_pairs(trajectory_scores(left, score), 4, "all").shape == (0, 2)


@pytest.mark.parametrize("pairs", ["best-worst", "all"])
@pytest.mark.parametrize("score", ["success", "return", "grape"])
def test_a_process_without_a_group(score, pairs):
    batch = played()
    none = {name: batch[name][..., :0] for name in ("rewards", "alive", "success", "stages")}
    none |= {name: batch[name][:0] for name in ("when", "who", "logprobs")}
    windows = make_windows(none, make_pairs(trajectory_scores(none, score), 4, pairs), 2)
    assert windows.shape == (0, 2, 2)


# ---- Windows -----------------------------------------------------------------------------------------


def numbers_of(batch, rows):
    """(decision step, environment) of the samples in each row."""
    both = torch.stack([batch["when"], batch["who"]], dim=1).tolist()
    return [[tuple(both[i]) for i in row if i >= 0] for row in rows.tolist()]


def test_windows_are_of_the_same_decisions():
    batch = flat(small_batch((5, 3, 4)))
    windows = make_windows(batch, torch.tensor([[0, 1], [2, 0]]), 2)
    assert windows.shape == (4, 2, 2)
    assert numbers_of(batch, windows[:, 0]) == [
        [(0, 0), (1, 0)], [(2, 0)], [(0, 2), (1, 2)], [(2, 2), (3, 2)],
    ]  # fmt: skip
    assert numbers_of(batch, windows[:, 1]) == [
        [(0, 1), (1, 1)], [(2, 1)], [(0, 0), (1, 0)], [(2, 0), (3, 0)],
    ]  # fmt: skip


def test_whole_trajectories():
    batch = flat(small_batch((5, 3, 4)))
    windows = make_windows(batch, torch.tensor([[1, 0]]), 0)
    assert numbers_of(batch, windows[:, 0]) == [[(t, 1) for t in range(3)]]
    assert numbers_of(batch, windows[:, 1]) == [[(t, 0) for t in range(5)]]
    assert make_windows(batch, torch.zeros(0, 2, dtype=torch.int64), 0).shape == (0, 2, 5)


def test_sums_over_windows():
    values = torch.tensor([1.0, 2, 4, 8, 16], requires_grad=True)
    windows = torch.tensor([[[7, 3, -1], [5, -1, -1]], [[2, -1, -1], [9, -1, -1]]])
    sums = window_sums(values, windows)
    assert sums.tolist() == [[3, 4], [8, 16]]
    (sums * torch.tensor([[1.0, 10], [100, 1000]])).sum().backward()
    assert values.grad.tolist() == [1, 1, 10, 100, 1000]


# ---- The update --------------------------------------------------------------------------------------


def ready(policy, args, reference=None, lengths=(5, 3, 4, 5), pairs=((0, 1), (2, 3))):
    batch = flat(small_batch(lengths))
    windows = make_windows(batch, torch.tensor(pairs), args.window)
    return samples_of(policy, reference or policy, batch, windows, args), windows


def learn_windows(policy, b, args, minibatches=None, **kwargs):
    minibatches = [torch.arange(len(b["windows"]))] if minibatches is None else minibatches
    return learn(tpo_vla, policy, b, args, minibatches=minibatches, **kwargs)


@pytest.mark.parametrize("window", [0, 2])
def test_the_gradient_is_the_losss(window):
    """Against sums over decisions, one pair and window at a time."""
    policy, args = small_policy(), arguments(tpo_vla, window=window)
    start = small_policy(seed=1)
    args.reference = "start"
    b, _ = ready(policy, args, start)
    logs, steps = learn_windows(policy, b, args)
    found = gradient(policy)
    policy.zero_grad()

    def total(which, samples):
        rows = [int(i) for i in samples if i >= 0]
        obs = {name: b[name][rows] for name in ("image", "state")}
        words = [b["instructions"][int(i)] for i in b["who"][rows]]
        return which.score(obs, words, b["tokens"][rows], 1.0)[0].sum()

    losses = []
    for better, worse in b["windows"]:
        with torch.no_grad():
            reference = total(start, better) - total(start, worse)
        margin = 0.1 * (total(policy, better) - total(policy, worse) - reference)
        losses.append(-torch.nn.functional.logsigmoid(margin))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert logs["policy_loss"] == pytest.approx(loss.item(), rel=1e-4) and steps == 1
    torch.testing.assert_close(found, gradient(policy), rtol=1e-3, atol=1e-5)


def test_the_first_margin_is_zero():
    policy, args = small_policy(), arguments(tpo_vla)
    logs, _ = learn_windows(policy, ready(policy, args)[0], args)
    assert logs["margin"] == pytest.approx(0, abs=1e-5) and logs["approx_kl"] == pytest.approx(0, abs=1e-9)
    assert logs["policy_loss"] == pytest.approx(math.log(2)) and logs[
        "ratio_first_minibatch"
    ] == pytest.approx(1)


def test_an_update_prefers_the_better():
    policy, args = small_policy(), arguments(tpo_vla)
    b, _ = ready(policy, args)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    learn_windows(policy, b, args, optimizer=optimizer)
    after, _ = learn_windows(policy, b, args)
    assert after["margin"] > 1e-4 and after["accuracy"] == 1


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_add_up(size):
    gradients = []
    for micro in (None, size):
        policy, args = small_policy(), arguments(tpo_vla, window=2, micro_batch_size=micro)
        learn_windows(policy, ready(policy, args)[0], args)
        gradients.append(gradient(policy))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_target_kl_ends_the_update():
    policy, args = small_policy(), arguments(tpo_vla, target_kl=1e-6)
    b, _ = ready(policy, args)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    logs, steps = learn_windows(policy, b, args, optimizer=optimizer, minibatches=[torch.arange(2)] * 4)
    assert steps == 1 == logs["optimizer_steps"]


def test_an_update_that_is_not_finite_changes_nothing():
    policy, args = small_policy(), arguments(tpo_vla)
    b, _ = ready(policy, args)
    b["ref_logprobs"] = b["ref_logprobs"] * math.nan
    before = copy_of(policy)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        learn_windows(policy, b, args, optimizer=torch.optim.SGD(policy.parameters(), lr=0.1))
    assert same_bits(policy, before)


def test_minibatches_are_of_windows():
    policy, args = small_policy(), arguments(tpo_vla, window=2, minibatch_size=2, update_epochs=3)
    b, windows = ready(policy, args)
    assert len(windows) == 4
    first = windows[:, 0, 0]
    drawn = tpo_vla.batches.minibatches(b | {"when": b["when"][first], "who": b["who"][first]}, args)
    assert [len(part) for part in drawn] == [2] * 6
    for epoch in range(3):
        assert sorted(torch.cat(drawn[2 * epoch : 2 * epoch + 2]).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"group_size": 1}, "group_size is 1; expected at least 2"),
        ({"keep_low": 0.9, "keep_high": 0.1}, "keep_low, keep_high are 0.9, 0.1"),
        ({"beta": 0}, "beta is 0; expected a number above 0"),
        ({"window": -1}, "window is -1; expected a number of at least 0"),
        ({"reward": "mine.py:f"}, "--score grape is for the reward binary or multi_stage, not mine.py:f"),
    ],
)
def test_what_does_not_fit(change, line):
    with pytest.raises(ValueError, match=line):
        tpo_vla.validate(tpo_vla.Args(**change))
