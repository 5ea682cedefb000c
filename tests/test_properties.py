"""Whatever a caller passes: a result that fits its description, or one line that says what was expected.

Inputs are drawn at random (hypothesis): good ones, bad ones and odd ones. A refused call changes nothing.
"""

import contextlib
import dataclasses
import math
import warnings
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import grpo_vla
from vla_envs import LiberoEnv, LiberoVectorEnv
from vla_envs.training.arguments import fill_in_chunk

SMALL = {"task_id": 4, "image_size": 16, "settle_steps": 0, "num_threads": 1}
few = settings(
    max_examples=50, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(scope="module", params=["vector", "single"])
def env(request):
    """A vector environment of two, or a single one; every test begins with a reset."""
    made = LiberoVectorEnv(2, **SMALL) if request.param == "vector" else LiberoEnv(**SMALL)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No file is near that a name drawn at random may run as a reward."""
    monkeypatch.chdir(tmp_path)


def is_vector(env):
    return isinstance(env, LiberoVectorEnv)


def inside(env):
    """The vector environment that does the work."""
    return env if is_vector(env) else env._envs


def snapshot(env):
    """All that a refused call must leave alone."""
    vector = inside(env)
    states = [simulation.data.qvel.copy() for simulation in vector.simulations]
    random = [None if rng is None else rng.bit_generator.state["state"] for rng in vector._rngs]
    return (
        vector.qpos, np.concatenate(states), vector.steps, vector.frozen, vector._obs["image"].copy(),
        vector._obs["state"].copy(), vector._stage.copy(), repr(random),
        repr(env._np_random and env._np_random.bit_generator.state),
    )  # fmt: skip


@contextlib.contextmanager
def refusal():
    """A documented error, of one line."""
    try:
        yield
    except (ValueError, TypeError, gym.error.ResetNeeded, OSError) as error:
        text = str(error)
        assert text and "\n" not in text.strip() and len(text) < 600
        assert "expected" in text or "before reset" in text, repr(error)


def check_step(env, result):
    """Whether what ``step`` returned is what it promises."""
    obs, reward, terminated, truncated, info = result
    assert obs in env.observation_space
    if is_vector(env):
        assert reward.shape == (2,) and np.isfinite(reward).all()
        assert all(flags.shape == (2,) and flags.dtype == bool for flags in (terminated, truncated))
    else:
        assert isinstance(reward, float) and math.isfinite(reward)
        assert isinstance(terminated, bool) and isinstance(truncated, bool)
    assert np.isfinite(obs["state"]).all() and "diverged" in info


def attempt(env, call, check):
    """Call; if it is refused nothing has changed."""
    before, result = snapshot(env), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the recorded init states
        with refusal():
            result = call()
    if result is None:
        assert all(np.array_equal(a, b) for a, b in zip(before, snapshot(env), strict=True))
        return False
    check(env, result)
    return True


# ---- What may come ------------------------------------------------------------------------------------

odd_numbers = st.one_of(
    st.integers(), st.floats(), st.complex_numbers(), st.booleans(), st.none(),
    st.sampled_from([np.float32(0.5), np.int8(3), np.uint64(2**64 - 1), np.bool_(True), 10**400, -(10**400)]),
)  # fmt: skip
odd_things = st.one_of(
    odd_numbers, st.text(max_size=5), st.binary(max_size=3),
    st.sampled_from([object(), len, int, b"", {}, set()]),
    st.lists(odd_numbers, max_size=3), st.dictionaries(st.text(max_size=2), odd_numbers, max_size=2),
    st.tuples(odd_numbers, odd_numbers),
)  # fmt: skip
dtypes = st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.int64, bool, object, "U3", complex])
shapes = st.one_of(st.sampled_from([(2, 7), (7,)]), st.lists(st.integers(0, 8), max_size=3).map(tuple))


@st.composite
def arrays(draw):
    """Arrays of any shape and kind, most of them of numbers that may be NaN, infinite or huge."""
    shape, dtype = draw(shapes), draw(dtypes)
    few_values = st.one_of(st.floats(-2, 2), st.sampled_from([math.nan, math.inf, -math.inf, 1e300, -0.0]))
    flat = [draw(few_values) for _ in range(min(3, math.prod(shape)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a NaN made an int
        return np.resize(np.array(flat or [0.0]), shape).astype(dtype)


actions = st.one_of(
    arrays(),
    odd_things,
    arrays().map(lambda a: a.tolist()),
    st.lists(st.lists(odd_numbers, min_size=7, max_size=7), min_size=1, max_size=2),
    st.lists(st.text(max_size=3), min_size=7, max_size=7),
)


# ---- Steps and resets --------------------------------------------------------------------------------


@few
@given(action=actions)
@example([["a"] * 7] * 2)
@example(["0.5"] * 7)
@example([[0.0] * 7, [0.0] * 6])
@example(np.full((2, 7), 1j))
@example(np.array([[None] * 7] * 2))
@example({"action": 1})
def test_actions(env, action):
    if inside(env).frozen.any() or not inside(env)._ready.all():
        env.reset(seed=0)
    attempt(env, lambda: env.step(action), check_step)
    env.reset(seed=0)
    check_step(env, env.step(env.action_space.sample()))  # it plays on


seeds = st.one_of(
    odd_things, st.integers(0, 9), st.lists(st.one_of(st.integers(-1, 5), st.none()), min_size=2, max_size=2),
    st.lists(odd_things, min_size=2, max_size=2), arrays(), arrays().map(lambda a: a.tolist()),
)  # fmt: skip
options = st.one_of(
    st.none(),
    odd_things,
    st.fixed_dictionaries({"init_state_id": st.one_of(st.integers(-2, 51), odd_things, arrays())}),
    st.fixed_dictionaries({"init_state_id": st.lists(st.integers(-1, 50), max_size=3)}),
    st.fixed_dictionaries(
        {"reset_mask": st.one_of(st.lists(st.booleans(), max_size=3), odd_things, arrays())}
    ),
    st.fixed_dictionaries({"reset_mask": st.lists(st.booleans(), min_size=2, max_size=2).map(np.array)}),
)


def check_reset(env, result):
    obs, info = result
    assert obs in env.observation_space and np.isfinite(obs["state"]).all()
    assert np.shape(info["success"]) == ((2,) if is_vector(env) else ())


@few
@given(seed=seeds, option=options)
@example([True, False], None)
@example(10**400, None)
@example("ab", None)
@example(b"ab", None)
@example(None, {"init_state_id": 2**70})
@example(None, {"init_state_id": [1, [2, 3]]})
@example(None, {"reset_mask": [[True], True]})
@example(None, [1])
@example(None, "ab")
@example(None, {1: 2, "b": 3})
@example(np.array(3), None)
@example(-1, None)
def test_resets(env, seed, option):
    attempt(env, lambda: env.reset(seed=seed, options=option), check_reset)
    env.reset(seed=0)
    check_step(env, env.step(env.action_space.sample()))


def test_steps_before_a_reset():
    for fresh in (LiberoVectorEnv(2, **SMALL), LiberoEnv(**SMALL)):
        with pytest.raises(gym.error.ResetNeeded):
            fresh.step(fresh.action_space.sample())
        fresh.close()


# ---- Rewards -----------------------------------------------------------------------------------------


def raises(facts):
    raise KeyError("no such\nfact")


def stops(facts):
    raise AssertionError


rewards = st.one_of(
    odd_things.map(lambda value: lambda facts: value),
    arrays().map(lambda value: lambda facts: value),
    arrays().map(lambda value: lambda facts: (facts["success"], value)),
    odd_things.map(lambda value: lambda facts: (facts["success"], value)),
    st.sampled_from([raises, stops, lambda: 1, lambda a, b: a, lambda facts: facts["nothing"], float, list]),
    st.sampled_from([lambda facts: facts.clear(), lambda facts: -facts["gripper_to_object"], "binary"]),
)


@few
@given(reward=rewards)
@example(lambda facts: ["a"] * len(facts["success"]))
@example(lambda facts: [[1], [1, 2]])
@example(lambda facts: (facts["success"], ["a"] * len(facts["success"])))
@example(lambda facts: (facts["success"], [[1], [1, 2]]))
@example(lambda facts: (facts["success"], np.nan * facts["success"]))
@example(lambda facts: facts["success"] + 1j)
def test_reward_functions(env, reward):
    """They are called when the actions have been executed; after a failure the environment plays on."""
    env.set_reward("binary")
    env.reset(seed=0)
    env.set_reward(reward)
    before = inside(env).steps
    with refusal():
        check_step(env, env.step(env.action_space.sample()))
    assert (inside(env).steps == before + 1).all() and np.isfinite(inside(env).qpos).all()
    with refusal():
        check_reset(env, env.reset(seed=1))
    env.set_reward("binary")
    env.reset(seed=0)
    check_step(env, env.step(env.action_space.sample()))


@few
@given(reward=st.one_of(st.text(max_size=12), odd_things, st.text(max_size=4).map(lambda s: f"{s}.py:{s}")))
@example("\0.py:f")
@example("x" * 5000 + ".py:f")
def test_names_of_rewards(env, reward):
    before = inside(env)._reward
    with refusal():
        env.set_reward(reward)
        assert callable(reward) or reward in ("binary", "multi_stage")
    if not callable(reward):
        assert inside(env)._reward is before
    env.set_reward("binary")


@pytest.mark.parametrize("text", ["def g(facts): pass", "raise KeyError('a' + chr(10) + 'b')", "def ("])
def test_files_of_rewards(env, tmp_path, text):
    (tmp_path / "file.py").write_text(text, encoding="utf-8")
    before = inside(env)._reward
    with refusal():
        env.set_reward(f"{tmp_path}/file.py:f")
    assert inside(env)._reward is before


# ---- The constructor ---------------------------------------------------------------------------------

NUMBERS = (
    "num_envs", "task_id", "image_size", "action_chunk", "max_episode_steps", "num_threads", "settle_steps",
    "settle_gripper",
)  # fmt: skip
NAMES = ("suite", "assets", "quality", "autoreset_mode", "render_mode", "reward", "wrist_camera", "cache")
small_numbers = st.one_of(odd_things, st.integers(-2, 3), arrays(), st.lists(st.integers(-1, 11), max_size=3))
# Huge numbers of environments, pixels or threads are no mistake of kind: they are not tried.
tried_numbers = small_numbers.filter(
    lambda value: not isinstance(value, int | np.integer) or isinstance(value, bool) or abs(int(value)) <= 20
)
words = st.one_of(
    odd_things, st.text(max_size=8), st.sampled_from(["LiberoObject", "NextStep", "binary", "fast"])
)


@few
@given(name=st.sampled_from(NUMBERS), value=tried_numbers, single=st.booleans())
@example("task_id", "ab", False)
@example("task_id", [[1], [2]], False)
@example("task_id", np.zeros((2, 2)), False)
@example("settle_gripper", math.nan, True)
@example("settle_gripper", True, True)
@example("settle_gripper", np.float32(1.0), False)
def test_numbers_of_the_constructor(name, value, single):
    construct(name, value, single)


@few
@given(name=st.sampled_from(NAMES), value=words, single=st.booleans())
@example("autoreset_mode", np.zeros(3), False)
@example("autoreset_mode", ["NextStep"], False)
@example("render_mode", np.zeros(3), False)
@example("suite", [], False)
@example("quality", [], False)
@example("assets", "\0", False)
@example("assets", "x" * 5000, False)
@example("wrist_camera", "no", False)
@example("cache", "no", False)
def test_names_of_the_constructor(name, value, single):
    construct(name, value, single)


def construct(name, value, single):
    if single and name in ("num_envs", "autoreset_mode"):
        single = False
    kind = LiberoEnv if single else LiberoVectorEnv
    number = {} if single else {"num_envs": 2}
    with refusal():
        made = kind(**number | SMALL | {name: value})
        obs, _ = made.reset(seed=0) if name != "reward" else (made.observation_space.sample(), {})
        assert obs in made.observation_space
        made.close()


# ---- The command line --------------------------------------------------------------------------------

FIELDS = {field.name: field for field in dataclasses.fields(grpo_vla.Args)}
WHOLE = sorted(name for name, field in FIELDS.items() if field.type in (int, int | None))
REAL = sorted(name for name, field in FIELDS.items() if field.type in (float, float | None))
extreme = st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0.0, -0.0, 1.0, 0.5, -1.0])


def check_line(**values):
    """Arguments as they come from the command line: refused, or numbers that a run can be made of."""
    with refusal():
        args = grpo_vla.validate(grpo_vla.Args(**values))
        for name in (*WHOLE, *REAL):
            value = getattr(args, name)
            assert value is None or isinstance(value, int) or math.isfinite(value), name
        assert args.num_groups >= 1 and args.group_size >= 2 and 1 <= args.eval_episodes <= 50
        assert args.minibatch_size > 0 and args.temperature > 0 and args.learning_rate > 0
        assert 0 <= args.keep_low <= args.keep_high <= 1 and args.clip_low >= 0 and args.seed >= 0
        assert args.lora_rank in (None, 32) or args.lora_rank >= 1
        assert args.eval_every >= 0 and args.kl_coef >= 0
        fill_in_chunk(args, SimpleNamespace(action_chunk=8))


@few
@given(
    st.dictionaries(st.sampled_from(WHOLE), st.one_of(st.integers(-3, 300), st.integers()), max_size=3),
    st.dictionaries(st.sampled_from(REAL), st.one_of(extreme, st.floats(-1, 2)), max_size=3),
)
@example({"max_episode_steps": 0}, {})
@example({"num_threads": -1}, {})
@example({"task_id": -1}, {})
@example({"task_id": 99}, {})
@example({"seed": 2**200}, {})
@example({"num_groups": 10**400}, {})
def test_numbers_of_the_command_line(whole, real):
    check_line(**whole, **real)


@few
@given(
    st.sampled_from(["suite", "policy", "train", "assets", "quality", "adapter", "reward", "device"]),
    st.one_of(st.text(max_size=8), st.sampled_from(["lora", "nano", "Libero10", "../x", "cuda:99", "fast"])),
)
def test_names_of_the_command_line(name, value):
    check_line(**{name: value})


@few
@given(st.lists(st.integers(-2, 100), max_size=3).map(tuple), st.integers(-2, 100))
def test_tasks_of_the_command_line(task_ids, task_id):
    check_line(task_ids=task_ids, task_id=task_id)
