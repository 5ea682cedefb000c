"""Rewards on hand-written facts, and the ways to hand one to an environment."""

import sys
from functools import partial

import gymnasium as gym
import numpy as np
import pytest

from vla_envs import FactsReward
from vla_envs.goals import FACTS
from vla_envs.rewards import (
    JOINT_STAGES,
    STAGE_REWARDS,
    STAGES,
    all_stage_names,
    compute_reward,
    multi_stage,
    resolve_reward,
    stage_names,
)

STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])

FAR = {name: 0.0 for name in FACTS} | {
    "gripper_to_object": 0.4, "gripper_to_object_xy": 0.3, "object_to_goal_xy": 0.5, "gripper_opening": 0.08,
    "goals": 1.0,
}  # fmt: skip
HELD = FAR | {"gripper_to_object": 0.01, "touching": 1.0, "grasped": 1.0}
LIFTED = HELD | {"object_height": 0.1, "object_peak_height": 0.1}
OVER = LIFTED | {"object_to_goal_xy": 0.02}

#: Situation, stage, reward of TGRPO's Algorithm 2.
SITUATIONS = [
    (FAR, "far", -2),
    (FAR | {"gripper_to_object": 0.151}, "far", -2),
    (FAR | {"gripper_to_object": 0.149}, "approaching", 2),
    (FAR | {"gripper_to_object": 0.041}, "approaching", 2),
    (FAR | {"gripper_to_object": 0.039}, "ready to grasp", 4),
    (FAR | {"gripper_to_object": 0.1, "touching": 1.0}, "ready to grasp", 4),
    (HELD, "ready to grasp", 4),
    (HELD | {"object_to_goal_xy": 0.02}, "ready to grasp", 4),
    (HELD | {"object_height": 0.029, "object_peak_height": 0.029}, "ready to grasp", 4),
    (HELD | {"object_height": 0.031, "object_peak_height": 0.031}, "lifted", 8),
    (LIFTED, "lifted", 8),
    (LIFTED | {"object_to_goal_xy": 0.081}, "lifted", 8),
    (LIFTED | {"object_to_goal_xy": 0.079}, "over the goal", 10),
    (OVER, "over the goal", 10),
    (FAR | {"object_peak_height": 0.1}, "dropped", -4),
    (HELD | {"object_peak_height": 0.1}, "dropped", -4),
    (OVER | {"touching": 0.0, "grasped": 0.0}, "dropped", -4),
    (OVER | {"success": 1.0}, "placed", 16),
    (FAR | {"success": 1.0, "object_peak_height": 0.2}, "placed", 16),
]


def batch(*facts):
    return {name: np.array([each[name] for each in facts]) for name in FACTS}


@pytest.mark.parametrize(("facts", "stage", "reward"), SITUATIONS)
def test_multi_stage(facts, stage, reward):
    values, stages = multi_stage(batch(facts))
    assert (values.tolist(), [STAGES[k] for k in stages]) == ([reward], [stage])


CLOSED = FAR | {"is_joint": 1.0, "object_to_goal_xy": 0.0}
HOLDING = CLOSED | {"gripper_to_object": 0.03}

#: Situation, name of the stage, reward.
JOINT_SITUATIONS = [
    (CLOSED, "far", -2),
    (CLOSED | {"gripper_to_object": 0.149}, "approaching", 2),
    (HOLDING, "holding", 4),
    (CLOSED | {"touching": 1.0}, "holding", 4),
    (HOLDING | {"joint_progress": 0.09}, "holding", 4),
    (HOLDING | {"joint_progress": 0.11}, "turning", 8),
    (HOLDING | {"joint_progress": 0.51}, "half way", 10),
    (CLOSED | {"joint_progress": 0.51}, "let go", -4),
    (CLOSED | {"success": 1.0, "goals_met": 1.0, "joint_progress": 1.2}, "done", 16),
]
TWO = {"goals": 2.0}

#: Of two predicates.
CONJUNCTIONS = [
    (FAR | TWO, "0 of 2 met, far", -1),
    (LIFTED | TWO, "0 of 2 met, lifted", 4),
    (CLOSED | TWO | {"goals_met": 1.0}, "1 of 2 met, far", 7),
    (OVER | TWO | {"goals_met": 1.0}, "1 of 2 met, over the goal", 13),
    (FAR | TWO | {"goals_met": 2.0, "success": 1.0}, "1 of 2 met, placed", 16),
]


@pytest.mark.parametrize(("facts", "name", "reward"), JOINT_SITUATIONS + CONJUNCTIONS)
def test_joints_and_conjunctions(facts, name, reward):
    values, stages = multi_stage(batch(facts))
    assert (values.tolist(), stage_names(batch(facts), stages).tolist()) == ([reward], [name])
    assert stages[0] // len(STAGES) == min(facts["goals_met"], facts["goals"] - 1)


def test_all_stage_names():
    assert all_stage_names([False]) == list(STAGES) and all_stage_names([True]) == list(JOINT_STAGES)
    both = all_stage_names([True, False])
    assert both[1:3] == ["0 of 2 met, approaching", "0 of 2 met, ready to grasp"] and len(both) == 24
    assert both[-4:-2] == ["1 of 2 met, placed", "1 of 2 met, done"]


def test_every_stage_is_put_to_the_test():
    assert {name for _, name, _ in JOINT_SITUATIONS} == set(JOINT_STAGES)
    assert {stage for _, stage, _ in SITUATIONS} == set(STAGES)
    assert len(STAGES) == len(STAGE_REWARDS)


def test_rewards_of_many_environments_at_once():
    facts = batch(*(facts for facts, _, _ in SITUATIONS))
    rewards, stages = multi_stage(facts)
    assert rewards.tolist() == [reward for _, _, reward in SITUATIONS]
    paid, same_stages = resolve_reward("binary")(facts)
    assert paid.tolist() == [each["success"] for each, _, _ in SITUATIONS]
    assert np.array_equal(stages, same_stages)


def test_multi_stage_is_constant_within_a_stage():
    """The reward says which stage it is, and nothing more."""
    rng, seen = np.random.default_rng(0), {}
    units = {"touching", "grasped", "is_joint", "success"}
    facts = {
        name: rng.integers(0, 2, 20_000).astype(float) if name in units else rng.uniform(0, 0.3, 20_000)
        for name in FACTS
    } | {"goals": np.ones(20_000), "goals_met": np.zeros(20_000)}
    for reward, stage in zip(*multi_stage(facts), strict=True):
        seen.setdefault(stage, set()).add(reward)
    assert all(len(rewards) == 1 for rewards in seen.values())
    assert len(seen) == len(STAGES)


# ---- Handing a reward to an environment --------------------------------------------------------------


def distance(facts):
    return -facts["gripper_to_object"]


def vectorised(facts):
    """Takes the facts for arrays with one entry per environment, as the documentation promises."""
    reward = np.zeros_like(facts["success"])
    reward[facts["gripper_opening"] > 0.05] = 0.5
    return reward + facts["object_height"].clip(0, 1)


def with_stages(facts):
    return -facts["gripper_to_object"], (facts["gripper_opening"] > 0.05) + 1


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "my.reward.py"
    path.write_text("def nearer(facts):\n    return -facts['gripper_to_object']\n\n\nthreshold = 3\n")
    return path


REWARDS = ["binary", "multi_stage", distance, vectorised, with_stages]


def trajectory(envs, drop, single=False):
    """Rewards and stages of an episode with a success in it; every member of a vector does the same."""
    envs.reset(seed=[0, 0] if not single else 0)
    seen, action = [], STILL if single else np.tile(STILL, (2, 1))
    for k in range(6):
        if k == 2:
            drop(envs, 0, height=0.1)
        _, reward, _, _, info = envs.step(action)
        seen.append((np.copy(reward).tolist(), np.copy(info["stage"]).tolist()))
    return seen


@pytest.mark.parametrize("reward", REWARDS)
def test_the_wrapper_pays_what_the_argument_pays(make_vec, drop, reward):
    own = trajectory(make_vec(2, reward=reward), drop)
    other = "binary" if reward == "multi_stage" else "multi_stage"
    assert trajectory(FactsReward(make_vec(2, reward=other), reward), drop) == own
    assert len({tuple(rewards) for rewards, _ in own}) > 1


@pytest.mark.parametrize("reward", REWARDS)
def test_the_wrapper_pays_the_same_on_a_single_environment(make, make_vec, drop, reward):
    """Also after the end, when a frozen environment pays nothing."""
    own = trajectory(make_vec(2, reward=reward), drop)
    first = [(rewards[0], stages[0]) for rewards, stages in own]
    assert trajectory(make(reward=reward), drop, single=True) == first
    assert trajectory(FactsReward(make(), reward), drop, single=True) == first


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_the_wrapper_and_autoreset(make_vec, drop, mode):
    """In SAME_STEP the facts in ``info`` are already the new episode's; the reward is the old one's."""
    own = trajectory(make_vec(2, reward="binary", autoreset_mode=mode), drop)
    wrapped = trajectory(FactsReward(make_vec(2, reward="multi_stage", autoreset_mode=mode), "binary"), drop)
    assert wrapped == own
    assert sum(rewards[0] for rewards, _ in own) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_the_wrapper_and_the_last_info_of_an_episode(make_vec, workers):
    """One environment's episode ends in the step; its last stage is the reward's, and was paid."""
    arguments = {"autoreset_mode": "SameStep", "max_episode_steps": 1}
    own = make_vec(2, reward=with_stages, **arguments)
    envs = FactsReward(make_vec(2, workers=workers, **arguments), with_stages)
    for _ in range(2):
        expected, got = (each.reset(seed=0) and each.step(np.tile(STILL, (2, 1))) for each in (own, envs))
        assert got[1].tolist() == expected[1].tolist() and (got[1] < 0).all()
        for name in ("stage", "stage_name"):
            assert got[4][name].tolist() == expected[4][name].tolist()
            assert got[4]["final_info"][name].tolist() == expected[4]["final_info"][name].tolist()


def test_the_wrapper_reports_its_stages_from_the_reset_on(make_vec, make):
    own, wrapped = make_vec(2, reward=with_stages), FactsReward(make_vec(2), with_stages)
    assert own.reset(seed=0)[1]["stage"].tolist() == wrapped.reset(seed=0)[1]["stage"].tolist() == [2, 2]
    assert FactsReward(make(), with_stages).reset(seed=0)[1]["stage"] == 2


@pytest.mark.parametrize("vector", [False, True])
def test_stages_of_ones_own_have_names_of_their_own(make, make_vec, drop, vector):
    """``multi_stage``'s names are for its stages, whoever returns rewards alone has them too."""
    for reward, names in ((with_stages, {"stage 2", "stage 1"}), (distance, {"far", "lifted"})):
        own = make_vec(1, reward=reward) if vector else make(reward=reward)
        wrapped = FactsReward(make_vec(1) if vector else make(), reward)
        for env in (own, wrapped):
            _, info = env.reset(seed=0)
            seen = [(np.ravel(info["stage"])[0], np.ravel(info["stage_name"])[0])]
            for gripper in [1.0] * 12:
                info = env.step(np.tile([0, 0, 0, 0, 0, 0, gripper], (1, 1) if vector else 1))[4]
                seen.append((np.ravel(info["stage"])[0], np.ravel(info["stage_name"])[0]))
            if reward is with_stages:
                assert {name for _, name in seen} == names
                assert all(name == f"stage {stage}" for stage, name in seen)
            else:
                assert {name for _, name in seen} <= set(STAGES)
                assert all(name == STAGES[stage] for stage, name in seen)


def test_the_stages_counted_are_multi_stages_whatever_the_reward(make_vec):
    envs = make_vec(2, reward=with_stages)
    envs.reset(seed=0)
    envs.step(np.tile(STILL, (2, 1)))
    assert set(envs.unwrapped.stages) == set(STAGES) and envs.unwrapped.stages.total() == 2


# ---- The wrapper as a wrapper ------------------------------------------------------------------------


def test_the_wrapper_leaves_the_environment_below_alone(make, make_vec):
    """Its reward is its own; of two wrappers each pays what it was given."""
    for env, still in ((make(), STILL), (make_vec(2), np.tile(STILL, (2, 1)))):
        stages, lower = FactsReward(env, "multi_stage"), FactsReward(env, distance)
        upper = FactsReward(lower, "multi_stage")
        for wrapped in (stages, upper):
            assert isinstance(wrapped, gym.Wrapper | gym.vector.VectorWrapper)
            wrapped.reset(seed=0)
            assert np.all(wrapped.step(still)[1] == -2)
        _, reward, *_ = lower.step(still)
        assert np.all((-1 < reward) & (reward < 0))
        assert np.all(env.step(still)[1] == 0)


def test_the_wrappers_spec_can_be_made_again(make):
    env = FactsReward(make(max_episode_steps=3), "multi_stage")
    for spec in (env.spec, gym.envs.registration.EnvSpec.from_json(env.spec.to_json())):
        again = gym.make(spec)
        assert repr(again) == repr(env) and again.spec == env.spec
        again.reset(seed=0)
        assert [again.step(STILL)[1::2] for _ in range(3)] == [(-2, False), (-2, False), (-2, True)]
        again.close()
    again = gym.make(FactsReward(make(), distance).spec)
    again.reset(seed=0)
    assert -1 < again.step(STILL)[1] < 0
    again.close()


@pytest.mark.parametrize("mode", ["sync", pytest.param("async", marks=pytest.mark.slow)])
def test_the_wrapper_in_gymnasiums_list(mode):
    envs = gym.make_vec(
        "vla_envs/LiberoObject-v0", 2, mode, task_id=4, image_size=16,
        wrappers=[partial(FactsReward, reward="multi_stage")],
    )  # fmt: skip
    envs.reset(seed=0)
    assert envs.step(np.tile(STILL, (2, 1)))[1].tolist() == [-2, -2]
    envs.close()


def test_the_wrapper_resets_some_before_the_others(make_vec):
    """A reward function sees no environment that has never been reset."""

    def careful(facts):
        assert (facts["gripper_to_object"] > 0).all()
        return facts["success"]

    envs = FactsReward(make_vec(3), careful)
    mask = np.array([False, True, False])
    assert envs.reset(seed=0, options={"reset_mask": mask})[1]["stage_name"].tolist() == ["", "far", ""]
    envs.reset(seed=0, options={"reset_mask": ~mask})
    envs.step(np.tile(STILL, (3, 1)))


def test_the_wrapper_warns_of_recorded_states(make, make_vec):
    for env in (make(), make_vec(2)):
        with pytest.warns(UserWarning, match="train on seeds"):
            FactsReward(env, "multi_stage").reset(options={"init_state_id": 0})


def test_a_file_of_the_users(make_vec, drop, reward_file):
    own = trajectory(make_vec(2, reward=distance), drop)
    assert trajectory(make_vec(2, reward=f"{reward_file}:nearer"), drop) == own
    assert trajectory(FactsReward(make_vec(2), f"{reward_file}:nearer"), drop) == own


def test_a_file_with_a_dataclass_in_it(tmp_path):
    """Files are modules like any other: dataclasses with postponed annotations look their module up."""
    path = tmp_path / "scaled.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
        "@dataclass\nclass Scale:\n    factor: float = 2.0\n\n\n"
        "def scaled(facts):\n    return Scale().factor * facts['success']\n"
    )
    assert resolve_reward(f"{path}:scaled")({"success": np.ones(2)}).tolist() == [2, 2]


def test_a_file_may_import_its_neighbour(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "its_neighbour.py").write_text("FACTOR = 3.0\n")
    (tmp_path / "scaled.py").write_text(
        "from its_neighbour import FACTOR\n\n\ndef scaled(facts):\n    return FACTOR * facts['success']\n"
    )
    before = list(sys.path)
    assert resolve_reward(f"{tmp_path / 'scaled.py'}:scaled")({"success": np.ones(2)}).tolist() == [3, 3]
    assert sys.path == [*before, str(tmp_path)]  # last, for what the function itself imports


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("multistage", ["'multistage'", "'multi_stage'", "did you mean 'multi_stage'"]),
        ("my_reward.py", ["'my_reward.py'", "file.py:function"]),
        ("nowhere.py:reward", ["'nowhere.py'", "does not exist"]),
        ("{file}:nearest", ["'nearest'", "['nearer']", "did you mean 'nearer'"]),
        ("{file}:threshold", ["'threshold'", "['nearer']"]),
        ("{file}:", ["''", "['nearer']"]),
        (3, ["3", "'binary'"]),
        (None, ["None", "'binary'"]),
    ],
)
def test_an_unknown_reward(reward_file, reward, words):
    with pytest.raises(ValueError) as error:
        resolve_reward(reward.format(file=reward_file) if isinstance(reward, str) else reward)
    assert all(word in str(error.value) for word in words), str(error.value)


BAD = {
    "NaN": lambda facts: np.where(facts["object_height"] == 0, 0, np.nan),
    "infinite": lambda facts: np.where(facts["object_height"] == 0, 0, np.inf),
    "too many": lambda facts: np.zeros(len(facts["success"]) + 1),
    "one for all": lambda facts: 1.0,
    "two columns": lambda facts: np.zeros((len(facts["success"]), 2)),
    "nothing": lambda facts: None,
    "stages of the wrong shape": lambda facts: (facts["success"], 3),
    "three things": lambda facts: (facts["success"], facts["success"], facts["success"]),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_reward_that_is_no_number_per_environment(bad):
    facts = batch(FAR | {"object_height": 0.1}, FAR)
    with pytest.raises(ValueError, match=r"(?s)reward function returned .* expected"):
        compute_reward(BAD[bad], facts)


def test_a_fact_that_there_is_not():
    with pytest.raises(ValueError, match=r"KeyError: 'object_hight'; .*did you mean 'object_height'"):
        compute_reward(lambda facts: facts["object_hight"], batch(FAR))


@pytest.mark.parametrize("env", [gym.make("CartPole-v1"), gym.make_vec("CartPole-v1", 2), 3, None])
def test_another_librarys_environment(env):
    with pytest.raises(ValueError, match=r"env is .*expected an environment of vla_envs"):
        FactsReward(env, "binary")


def test_a_reward_that_is_nan_stops_the_environment(make_vec, make):
    """It is found when the object rises, in the middle of an episode."""
    envs = make_vec(2, reward=BAD["NaN"])
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="nan"):
        envs.step(np.tile(STILL, (2, 1)))
    wrapped = FactsReward(make(), BAD["NaN"])
    wrapped.reset(seed=0)
    with pytest.raises(ValueError, match="nan"):
        wrapped.step(STILL)


def test_a_reward_may_change_the_facts_it_is_given(make_vec):
    """``facts["success"] += ...`` in a user's function is not seen by anybody else."""

    def greedy(facts):
        facts["success"] += 5
        return facts["success"]

    envs, twins = make_vec(2, reward=greedy), make_vec(2)
    for each in (envs, twins):
        each.reset(seed=0)
    for _ in range(2):
        _, reward, terminated, _, info = envs.step(np.tile(STILL, (2, 1)))
        expected = twins.step(np.tile(STILL, (2, 1)))[4]
        assert reward.tolist() == [5, 5] and not terminated.any()
        assert all(np.array_equal(info["facts"][name], expected["facts"][name]) for name in FACTS)


def test_the_reward_sees_only_the_last_step_of_a_chunk(make_vec):
    calls = []

    def counting(facts):
        calls.append(facts["object_height"].shape)
        return facts["success"]

    envs = make_vec(3, reward=counting, action_chunk=4)
    envs.reset(seed=0)
    calls.clear()
    envs.step(np.tile(STILL, (3, 4, 1)))
    assert calls == [(3,)]
