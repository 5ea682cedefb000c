"""What scripts share, line by line: the clipped loss, acting by a script, log-probabilities, the update."""

import ast
import difflib
import math
import statistics
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from artifacts import ROOT
from doubles import OnesPolicy, ScriptedEnvs
from learning import (
    arguments,
    chosen,
    copy_of,
    gradient,
    learn,
    same_bits,
    samples,
    small_batch,
    small_policy,
    weight_of,
)

import grpo_vla
import ppo_vla
import tgrpo_vla
from grpo_vla import policy_loss
from vla_envs.policies.adapters import adapter_off
from vla_envs.training import evaluation, runs

RL = ("grpo_vla", "tgrpo_vla", "ppo_vla")
RIVALS = ("tpo_vla", "rft_vla")
SCRIPTS = (*RL, *RIVALS, "conrft_vla", "sft_vla")


@pytest.fixture(params=[grpo_vla, tgrpo_vla, ppo_vla], ids=RL)
def script(request):
    """Each of the RL scripts."""
    return request.param


# ---- The same lines ----------------------------------------------------------------------------------


def text_of(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def functions_of(name):
    """The source of every function at module level."""
    text = text_of(name)
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {function.name: ast.get_source_segment(text, function) for function in functions}


def statements_of(name):
    """The code of a script, one statement a line, without comments, docstrings and help texts."""
    tree = ast.parse(text_of(name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            texts = [n for n in node.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
            node.body = [n for n in node.body if n not in texts]
    return [line for line in ast.unparse(tree).splitlines() if line]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        ("rollout", (*RL, *RIVALS, "conrft_vla")),
        ("collect", ("grpo_vla", "tpo_vla")),
        *((function, (*RL, "rft_vla")) for function in ("policy_loss", "logprobs_of")),
        *((function, (*RL[:2], "rft_vla")) for function in ("group_advantages", "samples_of")),
    ],
)
def test_shared_functions_are_the_same_lines(function, names):
    first, *others = [functions_of(name)[function] for name in names]
    assert first.startswith(f"def {function}(") and others == [first] * len(others)


@pytest.mark.parametrize("name", (*RL[1:], *RIVALS))
def test_scripts_differ_from_grpo_in_few_lines(name):
    """Statements, each on a line, without comments and docstrings."""
    matcher = difflib.SequenceMatcher(None, statements_of("grpo_vla"), statements_of(name), autojunk=False)
    changes = [max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal"]
    assert 0 < sum(changes) <= 100


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_iteration_calls_few_of_the_packages_functions(name):
    """Those that the loop calls, or functions of the script that it calls; not the methods of the run."""
    tree = ast.parse(text_of(name))
    package = {"adapters", "arguments", "batches", "checkpoints", "demonstrations", "distributed", "runs"}
    package |= {"evaluation", "replays", "tgrpo_extras"}
    direct = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vla_envs.")
        for alias in node.names
    } - package
    bodies = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    main = next(node for node in tree.body if isinstance(node, ast.If))
    todo, seen, called = [next(node for node in main.body if isinstance(node, ast.For))], set(), set()
    while todo:
        for node in ast.walk(todo.pop()):
            if isinstance(node, ast.Name) and node.id in bodies.keys() - seen:
                seen.add(node.id)
                todo.append(bodies[node.id])
            called |= {node.id} & direct if isinstance(node, ast.Name) else set()
            its = getattr(node, "value", None)
            if isinstance(node, ast.Attribute) and isinstance(its, ast.Name) and its.id in package:
                called.add(f"{its.id}.{node.attr}")
    called = {each for each in called if not each.rpartition(".")[2].isupper()}  # constants
    assert 0 < len(called) <= 12, sorted(called)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_and_their_functions_are_short(name):
    assert len(text_of(name).splitlines()) <= 400
    functions = [node for node in ast.walk(ast.parse(text_of(name))) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > 60} == {} and lengths


# ---- The clipped loss --------------------------------------------------------------------------------


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


def test_equal_log_probabilities_have_ratio_one():
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


# ---- Acting, on environments that follow a script ------------------------------------------------------


def test_policies_of_one_action_per_decision():
    envs = ScriptedEnvs([1, 2], 9)
    envs.action_space = SimpleNamespace(shape=(2, 7))

    def sample(obs, instructions, *_):
        count = len(instructions)
        return np.full((count, 1, 7), 0.5), torch.ones(count, 7, dtype=int), torch.zeros(count, 7).double()

    batch = grpo_vla.rollout(envs, SimpleNamespace(sample=sample), np.array([5, 5]), 1.0)
    assert [action[:, 6].tolist() for action in envs.actions] == [[0.5, 0.5], [0.0, 0.5]]
    assert envs.actions[0].dtype == np.float32 and envs.actions[0].shape == (2, 7)
    assert batch["tokens"].dtype == torch.int64 and batch["logprobs"].dtype == torch.float32


def test_rollout_masks_those_that_have_finished():
    envs, policy = ScriptedEnvs((2, 99, 99, 1), limit=3), OnesPolicy()
    batch = grpo_vla.rollout(envs, policy, np.array([5, 5, 6, 6]), 1.5)
    assert envs.asked["seed"] == [5, 5, 6, 6] and "init_state_id" not in envs.asked
    assert batch["alive"].tolist() == [[True] * 4, [True, True, True, False], [False, True, True, False]]
    assert batch["success"].tolist() == [True, False, False, True]
    assert batch["rewards"].tolist() == [[10, 11, 12, 13], [20, 21, 22, 0], [0, 31, 32, 0]]
    assert batch["rewards"].dtype == torch.float32
    assert batch["steps"].tolist() == [[2, 2, 2, 2], [2, 2, 2, 0], [0, 2, 2, 0]]
    assert batch["stages"].tolist() == [[4] * 4, [5] * 4, [6] * 4]
    assert batch["when"].tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert batch["who"].tolist() == [0, 1, 2, 3, 0, 1, 2, 1, 2]
    assert batch["tokens"].shape == batch["logprobs"].shape == (9, 14)
    assert batch["tokens"][:, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 3, 3]
    assert torch.equal(batch["logprobs"], -batch["tokens"].float())
    assert batch["image"].shape == (9, 8, 8, 3) and torch.equal(
        batch["image"][:, 0, 0, 0], batch["when"].byte()
    )
    assert batch["state"].shape == (9, 8) and batch["state"][:, 0].tolist() == [0, 8, 16, 24, 0, 8, 16, 8, 16]
    assert batch["last"]["image"][:, 0, 0, 0].tolist() == [3] * 4 and batch["last"]["state"].shape == (4, 8)
    assert batch["instructions"] == envs.instructions and batch["policy_s"] >= 0
    assert policy.asked[1] == (["task 0", "task 1", "task 2"], [0, 8, 16], 1.5)
    assert [action[:, 0, 0].tolist() for action in envs.actions] == [[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0]]


def test_a_rollout_ends_with_its_last_member():
    batch = grpo_vla.rollout(ScriptedEnvs((2, 1), limit=9), OnesPolicy(), np.array([3, 4]), 1.0)
    assert batch["alive"].tolist() == [[True, True], [True, False]] and batch["success"].all()


def test_a_rollout_in_the_first_environments_only():
    envs, policy = ScriptedEnvs((2, 99, 1, 1), limit=3), OnesPolicy()
    full = grpo_vla.rollout(envs, policy, np.array([5, 5, 6, 6]), 1.5)
    envs.actions.clear()
    batch = grpo_vla.rollout(envs, policy, np.array([8, 8]), 1.5)
    assert envs.asked["seed"][:2] == [8, 8]
    assert envs.asked["reset_mask"].tolist() == [True] * 2 + [False] * 2
    for name in ("alive", "rewards", "steps"):
        assert torch.equal(batch[name], full[name][:, :2])
    for name in ("when", "who", "image", "state"):
        assert torch.equal(batch[name], full[name][full["who"] < 2])
    assert batch["tokens"].shape == batch["logprobs"].shape == (5, 14)
    assert batch["success"].tolist() == [True, False] and batch["instructions"] == ["task 0", "task 1"]
    assert batch["last"]["image"].shape == (2, 8, 8, 3) and batch["last"]["state"].shape == (2, 8)
    assert [action[:, 0, 0].tolist() for action in envs.actions] == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]]


EVALUATION = SimpleNamespace(seed=1, eval_episodes=50, protocol=None)


@pytest.mark.longer
def test_evaluation_counts_successes(tmp_path):
    envs, policy = ScriptedEnvs([1, 2, 3, 9, 9, 9, 1, 1, 2, 2], limit=3), OnesPolicy()
    outcomes = evaluation.play(envs, policy, 0.0, EVALUATION, tmp_path / "film.mp4")
    assert envs.asked["seed"] is None and envs.asked["init_state_id"].tolist() == list(range(10))
    assert outcomes.tolist() == [True, True, True, False, False, False, True, True, True, True]
    assert [len(asked[0]) for asked in policy.asked] == [10, 7, 4] and policy.asked[0][2] == 0.0
    assert not policy.training
    film = imageio.mimread(tmp_path / "film.mp4")
    assert len(film) == 4 and film[0].shape[:2] == (32, 32)  # two rows of four


@pytest.mark.longer
def test_evaluations_draw_the_same_numbers(tmp_path):
    draws = {}
    for name, seed, disturbance in (("first", 1, 0), ("again", 1, 5), ("other", 2, 0)):
        policy, args = OnesPolicy(), SimpleNamespace(seed=seed, eval_episodes=50, protocol=None)
        torch.rand(disturbance)
        evaluation.play(ScriptedEnvs([9, 9], 3), policy, 1.2, args, tmp_path / "film.mp4")
        draws[name] = policy.draws
    assert draws["first"] == draws["again"] != draws["other"] and len(set(draws["first"])) == 3


@pytest.mark.longer
def test_evaluation_shows_the_pictures_of_its_protocol(tmp_path):
    policy, args = OnesPolicy(), SimpleNamespace(seed=1, eval_episodes=50, protocol="openvla")
    evaluation.play(ScriptedEnvs([1, 9], 2), policy, 0.0, args, tmp_path / "film.mp4")
    assert policy.shapes == [(2, 224, 224, 3), (1, 224, 224, 3)]
    assert imageio.mimread(tmp_path / "film.mp4")[0].shape[:2] == (32, 8)  # its own pictures


@pytest.mark.longer
def test_acting_in_the_simulator(tmp_path):
    """Two members of a group: the same start, then what each of them samples."""
    args = grpo_vla.Args(
        action_chunk=2, max_episode_steps=99, num_threads=1, temperature=1.7, eval_episodes=2
    )  # fmt: skip
    envs = runs._make_envs(args, [4, 4], "binary", image_size=32, max_episode_steps=5)
    policy = small_policy()
    batch = grpo_vla.rollout(envs, policy, np.array([7, 7]), 1.7)
    assert batch["image"].shape == (6, 32, 32, 3) and batch["image"].dtype == torch.uint8
    assert batch["alive"].all() and not batch["success"].any()
    assert batch["steps"].tolist() == [[2, 2], [2, 2], [1, 1]]
    assert torch.equal(batch["image"][0], batch["image"][1])
    assert torch.equal(batch["state"][0], batch["state"][1])
    assert not torch.equal(batch["tokens"][::2], batch["tokens"][1::2])
    assert not torch.equal(batch["state"][4], batch["state"][5])
    assert not torch.equal(batch["last"]["state"], batch["state"][4:])
    b = grpo_vla.samples_of(policy, batch, torch.zeros(3, 2), args)
    assert b["measured"]["logprob_gap"] < 1e-5
    other = grpo_vla.rollout(envs, policy, np.array([9]), 1.7)
    assert other["steps"].tolist() == [[2], [2], [1]] and envs.steps.tolist() == [5, 5]
    assert not torch.equal(other["image"][0], batch["image"][0])
    outcomes = evaluation.play(envs, policy, 0.0, args, tmp_path / "film.mp4")
    assert outcomes.tolist() == [False, False]
    envs.close()


# ---- Learning ----------------------------------------------------------------------------------------


def test_micro_batches_add_up_to_the_minibatch(script):
    """The same gradient and the same figures, from nine decisions at once and from four, four and one."""
    results = []
    for micro in (None, 4):
        policy = small_policy("lora")
        args = arguments(script, micro_batch_size=micro, kl_coef=0.1, train="lora")
        b = samples(script, policy, small_batch(), torch.linspace(-1, 1, 12).view(3, 4), args)
        b["old_logprobs"] = b["old_logprobs"] - 0.1
        logs, steps = learn(script, policy, b, args)
        assert steps == 1
        results.append((gradient(policy), {**logs, "entropy": 0.0, "logprob_gap": 0.0}))
    (whole, expected), (added, measured) = results
    torch.testing.assert_close(added, whole, atol=1e-6, rtol=1e-5)
    assert whole.abs().max() > 1e-4 and measured == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_samples_are_the_decisions_of_those_alive(script):
    policy, batch = small_policy(), small_batch()
    numbers = torch.arange(12.0).view(3, 4)
    b = samples(script, policy, batch, numbers, arguments(script, minibatch_size=4))
    pairs = set(zip(b["when"].tolist(), b["who"].tolist()))
    assert len(b["who"]) == 9 and pairs == {
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 1),
        (1, 2),
        (1, 3),
        (2, 1),
        (2, 3),
    }
    for name in ("image", "state", "tokens"):
        assert torch.equal(b[name], batch[name][b["when"], b["who"]])
    assert b["advantages"].tolist() == [numbers[pair].item() for pair in zip(b["when"], b["who"])]
    weights = weight_of(script, (1, 3, 2, 3))[b["when"], b["who"]]
    torch.testing.assert_close(b["weights"] / b["weights"].sum(), weights)
    expected = chosen(policy, batch, b["when"], b["who"])
    torch.testing.assert_close(b["old_logprobs"], expected, atol=1e-5, rtol=1e-5)
    assert not b["old_logprobs"].requires_grad


def test_log_probabilities_of_the_samples_asked_for(script):
    policy, batch = small_policy(), small_batch()
    args = arguments(script, temperature=1.7)
    b = samples(script, policy, batch, torch.zeros(3, 4), args)
    inds = torch.tensor([7, 0, 4])
    logprobs, entropy, hidden = script.logprobs_of(policy, b, inds, args)
    assert logprobs.shape == entropy.shape == (3, 14) and hidden.shape == (3, 16)
    expected = chosen(policy, batch, b["when"][inds], b["who"][inds], 1.7)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(
        expected, chosen(policy, batch, b["when"][inds], b["who"][inds], 1.0), atol=1e-3
    )
    together, _, _ = script.logprobs_of(
        policy, b, inds, arguments(script, temperature=1.7, ratio_level="action")
    )
    torch.testing.assert_close(together, expected.sum(dim=1, keepdim=True), atol=1e-4, rtol=1e-5)


def acted(policy, batch, temperature):
    """The batch with tokens that the policy has sampled, and the log-probabilities that it gave them."""
    steps, members = batch["alive"].shape
    obs = {name: batch[name].flatten(0, 1) for name in ("image", "state")}
    _, tokens, logprobs = policy.sample(obs, batch["instructions"] * steps, temperature)
    return batch | {"tokens": tokens.view(steps, members, -1), "logprobs": logprobs.view(steps, members, -1)}


@pytest.mark.parametrize("level", ["token", "action"])
def test_the_gap_between_acting_and_learning(script, level):
    policy, zeros = small_policy(), torch.zeros(3, 4)
    batch = acted(policy, small_batch(), 1.7)
    args = arguments(script, temperature=1.7, ratio_level=level, minibatch_size=4)
    assert samples(script, policy, batch, zeros, args)["measured"]["logprob_gap"] < 1e-5 * (
        1 if level == "token" else 14
    )
    shift = torch.zeros_like(batch["logprobs"])
    shift[2, 3, 6] = -0.25
    shifted = batch | {"logprobs": batch["logprobs"] + shift}
    assert samples(script, policy, shifted, zeros, args)["measured"]["logprob_gap"] == pytest.approx(
        0.25, abs=2e-4
    )
    colder = arguments(script, temperature=1.0, ratio_level=level)
    assert samples(script, policy, batch, zeros, colder)["measured"]["logprob_gap"] > 0.01


@pytest.mark.parametrize("level", ["token", "action"])
def test_the_first_ratio_is_one(script, level):
    """Whatever log-probabilities the rollout had."""
    policy, batch = small_policy(), small_batch()
    args = arguments(script, ratio_level=level, minibatch_size=4)
    b = samples(script, policy, batch, torch.ones(3, 4), args)
    logs, _ = learn(script, policy, b, args, minibatches=torch.randperm(9).split(4))
    assert b["measured"]["logprob_gap"] > 0.01 and logs["logprob_gap"] == b["measured"]["logprob_gap"]
    assert logs["ratio_first_minibatch"] == pytest.approx(1.0, abs=1e-4)
    assert logs["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert logs["policy_loss"] == pytest.approx(-1.0, abs=1e-4)


def test_update_makes_good_actions_likelier(script):
    policy, batch, args = small_policy(), small_batch((3, 3)), arguments(script)
    good, bad = (torch.arange(3), torch.zeros(3, dtype=int)), (torch.arange(3), torch.ones(3, dtype=int))
    before = [chosen(policy, batch, *each).mean().item() for each in (good, bad)]
    b = samples(script, policy, batch, torch.tensor([[1.0, -1.0]] * 3), args)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
    logs, steps = learn(script, policy, b, args, optimizer, [torch.arange(6)] * 3)
    after = [chosen(policy, batch, *each).mean().item() for each in (good, bad)]
    assert steps == 3 and after[0] > before[0] + 1e-4 and after[1] < before[1] - 1e-4
    names = {"policy_loss", "entropy", "approx_kl", "clipfrac_low", "clipfrac_high", "ratio", "grad_norm"}
    assert set(logs) >= names | {"ratio_first_minibatch", "logprob_gap"}
    assert 0 < logs["entropy"] <= math.log(256) and logs["approx_kl"] > 0 and logs["grad_norm"] > 0


def test_update_takes_the_gradient_of_the_objective(script):
    """At ratio 1: that of the weighted sum of A mean_d log pi over decisions, at the policy's temperature."""
    policy, batch, lengths = small_policy(), small_batch(), (1, 3, 2, 3)
    advantages = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    args, weight = arguments(script, temperature=1.7), weight_of(script, lengths)
    learn(script, policy, samples(script, policy, batch, advantages, args), args)
    taken = gradient(policy)
    objective = 0.0
    for i, length in enumerate(lengths):
        logprobs = chosen(policy, batch, torch.arange(length), torch.full((length,), i), 1.7)
        objective += (weight[:length, i] * advantages[:length, i] * logprobs.mean(dim=1)).sum()
    policy.zero_grad()
    (-objective).backward()
    assert gradient(policy).norm() > 1e-3
    torch.testing.assert_close(taken, gradient(policy), atol=1e-6, rtol=1e-4)


def test_no_advantage_no_change(script):
    policy, args = small_policy(), arguments(script)
    before = copy_of(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    b = samples(script, policy, small_batch(), torch.zeros(3, 4), args)
    _, steps = learn(script, policy, b, args, optimizer, torch.arange(9).split(4))
    assert steps == 3 and same_bits(policy, before)


def test_every_minibatch_has_its_own_gradient(script):
    gradients, advantages = [], torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    for minibatches in ([torch.arange(4), torch.arange(4, 9)], [torch.arange(4, 9)]):
        policy, args = small_policy(), arguments(script)
        b = samples(script, policy, small_batch(), advantages, args)
        assert learn(script, policy, b, args, minibatches=minibatches)[1] == len(minibatches)
        gradients.append(gradient(policy))
    assert gradients[1].norm() > 1e-3
    torch.testing.assert_close(*gradients)


def test_the_gradient_is_clipped(script):
    policy, args = small_policy(), arguments(script, max_grad_norm=1e-3)
    b = samples(script, policy, small_batch(), torch.full((3, 4), 100.0), args)
    logs, _ = learn(script, policy, b, args)
    assert logs["grad_norm"] > 0.1 and gradient(policy).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_one_ratio_for_a_whole_decision(script):
    """The gradient of a decision's summed log-probability is D times that of the mean over tokens."""
    gradients = {}
    for level in ("token", "action"):
        policy, args = small_policy(), arguments(script, ratio_level=level)
        learn(script, policy, samples(script, policy, small_batch(), torch.ones(3, 4), args), args)
        gradients[level] = gradient(policy)
    assert gradients["token"].norm() > 1e-3
    torch.testing.assert_close(gradients["action"], 14 * gradients["token"], atol=1e-5, rtol=1e-3)


def test_target_kl_ends_the_update(script):
    """Before the step that would go further; the first step is always taken."""
    advantages = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    for target_kl, expected in ((1e-6, 1), (1e9, 5)):
        policy, args = small_policy(), arguments(script, target_kl=target_kl)
        b = samples(script, policy, small_batch(), advantages, args)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0 if expected == 1 else 1e-3)
        logs, steps = learn(script, policy, b, args, optimizer, [torch.arange(9)] * 5)
        assert steps == logs["optimizer_steps"] == expected
        assert logs["approx_kl"] > target_kl / 2 if expected == 1 else logs["approx_kl"] < 1


# ---- Numbers that are not finite -----------------------------------------------------------------------


def poisoned(script, poison):
    """A policy, its samples and its optimiser; sample 8 is poisoned, or the policy is."""
    policy, args = small_policy(), arguments(script)
    b = samples(script, policy, small_batch(), torch.randn(3, 4), args)
    if poison == "weight":
        with torch.no_grad():
            policy.head.bias[3] = float("nan")
    elif poison == "gradient":
        policy.head.bias.register_hook(lambda grad: grad * float("nan"))
    elif poison is not None:
        b["advantages"][8] = float(poison)
    return policy, b, args, torch.optim.AdamW(policy.parameters(), lr=1e-2)


@pytest.mark.parametrize(
    ("poison", "named"), [("weight", "loss"), ("inf", "loss"), ("nan", "loss"), ("gradient", "gradient")]
)
def test_an_update_that_is_not_finite_changes_nothing(script, poison, named):
    policy, b, args, optimizer = poisoned(script, poison)
    before = copy_of(policy)
    with pytest.raises(FloatingPointError, match=f"the {named} is .*finite") as error:
        learn(script, policy, b, args, optimizer)
    assert same_bits(policy, before) and not optimizer.state
    assert len(str(error.value).splitlines()) == 1


def test_the_steps_before_a_bad_one_stay(script):
    minibatches = torch.arange(9).split(4)  # the last one is sample 8 alone
    weights = []
    for poison, number in (("inf", 3), (None, 2)):
        torch.manual_seed(0)
        policy, b, args, optimizer = poisoned(script, poison)
        before = copy_of(policy)
        if poison:
            with pytest.raises(FloatingPointError):
                learn(script, policy, b, args, optimizer, minibatches[:number])
        else:
            learn(script, policy, b, args, optimizer, minibatches[:number])
        weights.append(copy_of(policy))
    assert same_bits(policy, weights[0]) and not same_bits(policy, before)


# ---- The KL term -------------------------------------------------------------------------------------


class TwoFaces(torch.nn.Module):
    """Every token of member ``i`` has probability ``p[i]``; with the adapter off, ``reference[i]``."""

    image_size, hidden_size = 8, 1
    lora_A = None  # makes it a layer with an adapter

    def __init__(self, p, reference):
        super().__init__()
        self.logprobs = torch.nn.Parameter(torch.tensor(p).log())
        self.reference, self.on = torch.tensor(reference).log(), True

    def enable_adapters(self, on):
        self.on = on

    def sample(self, obs, instructions, temperature=1.0, generators=None):
        tokens = torch.zeros(len(instructions), 14, dtype=int)
        return np.zeros((len(instructions), 2, 7)), tokens, self.score(obs, instructions, tokens)[0].detach()

    def score(self, obs, instructions, tokens, temperature=1.0):
        who = [int(words.split()[-1]) for words in instructions]
        logprobs = (self.logprobs if self.on else self.reference)[who].unsqueeze(1).expand(tokens.shape)
        return logprobs, torch.zeros(tokens.shape), torch.zeros(len(who), 1)


def test_the_kl_term_by_hand(script):
    """p_ref / p - 1 - log(p_ref / p), whose gradient by log p is 1 - p_ref / p."""
    policy, args = TwoFaces([0.5, 0.5, 0.2, 0.3], [0.25, 0.5, 0.8, 0.3]), arguments(script, kl_coef=0.5)
    b = samples(script, policy, small_batch(), torch.zeros(3, 4), args)
    logs, _ = learn(script, policy, b, args)
    share = [1 / 9, 3 / 9, 2 / 9, 3 / 9] if script is ppo_vla else [0.25] * 4
    divergence = share[0] * (0.5 - 1 + math.log(2)) + share[2] * (4 - 1 - math.log(4))
    assert logs["kl"] == pytest.approx(divergence, abs=1e-5)
    assert logs["policy_loss"] == pytest.approx(0.0, abs=1e-6)
    expected = torch.tensor([share[0] * 0.5 * 0.5, 0.0, share[2] * 0.5 * (1 - 4), 0.0])
    torch.testing.assert_close(policy.logprobs.grad, expected, atol=1e-6, rtol=1e-5)
    assert policy.on


def test_without_kl_coef_there_is_no_reference(script):
    policy, args = TwoFaces([0.5] * 4, [0.25] * 4), arguments(script)
    b = samples(script, policy, small_batch(), torch.zeros(3, 4), args)
    logs, _ = learn(script, policy, b, args)
    assert "kl" not in logs and policy.logprobs.grad.eq(0).all()


def moved_lora():
    """A policy whose adapter has moved it away from its reference."""
    policy = small_policy("lora")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return policy


def divergence_of(policy, batch, weight):
    """The k3 KL divergence from the policy without its adapter, weighted by decision (T, N)."""
    when, who = torch.nonzero(weight, as_tuple=True)
    with torch.no_grad(), adapter_off(policy):
        reference = chosen(policy, batch, when, who)
    gap = reference - chosen(policy, batch, when, who)
    return (weight[when, who] * (gap.exp() - 1 - gap).mean(dim=1)).sum()


def test_the_gradient_of_the_kl_term(script):
    policy, batch = moved_lora(), small_batch()
    args = arguments(script, kl_coef=0.5, train="lora")
    logs, _ = learn(script, policy, samples(script, policy, batch, torch.zeros(3, 4), args), args)
    taken = gradient(policy)
    policy.zero_grad()
    divergence = divergence_of(policy, batch, weight_of(script, (1, 3, 2, 3)))
    assert divergence > 1e-3 and logs["kl"] == pytest.approx(divergence.item(), rel=1e-3)
    (0.5 * divergence).backward()
    torch.testing.assert_close(taken, gradient(policy), atol=1e-6, rtol=1e-4)


def test_the_kl_term_pulls_back_to_the_reference(script):
    policy, batch = moved_lora(), small_batch((3, 3, 3, 3))
    weight, args = weight_of(script, (3, 3, 3, 3)), arguments(script, kl_coef=1.0, train="lora")
    before = divergence_of(policy, batch, weight).item()
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=2.0)
    b = samples(script, policy, batch, torch.zeros(3, 4), args)
    learn(script, policy, b, args, optimizer, [torch.arange(12)] * 5)
    assert divergence_of(policy, batch, weight).item() < 0.9 * before
