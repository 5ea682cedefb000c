"""The vector environment's contract (design.md), on the real simulator."""

import os
import re
import signal
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics
from playing import member, random_actions, same

from vla_envs import LiberoVectorEnv, vector
from vla_envs.rewards import STAGES
from vla_envs.scene import load_scene
from vla_envs.tasks import recorded_init_states

STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])


# ---- Spaces ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("image_size", [8, 40])
@pytest.mark.parametrize("action_chunk", [1, 3])
@pytest.mark.parametrize("wrist_camera", [False, True])
def test_spaces(make_vec, num_envs, image_size, action_chunk, wrist_camera):
    envs = make_vec(num_envs, image_size=image_size, action_chunk=action_chunk, wrist_camera=wrist_camera)
    picture = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
    expected = {"image": picture, "state": gym.spaces.Box(-np.inf, np.inf, (8,), np.float32)}
    if wrist_camera:
        expected["wrist_image"] = picture
    shape = (7,) if action_chunk == 1 else (action_chunk, 7)
    assert envs.single_observation_space == gym.spaces.Dict(expected)
    assert envs.single_action_space == gym.spaces.Box(-1, 1, shape, np.float32)
    assert envs.action_space.shape == (num_envs, *shape)
    obs, _ = envs.reset(seed=0)
    assert obs in envs.observation_space
    obs, reward, terminated, truncated, _ = envs.step(envs.action_space.sample())
    assert obs in envs.observation_space
    assert reward.shape == terminated.shape == truncated.shape == (num_envs,)
    assert reward.dtype == np.float64 and terminated.dtype == truncated.dtype == bool


def test_defaults():
    envs = gym.make_vec("vla_envs/LiberoObject-v0", num_envs=2)
    assert isinstance(envs.unwrapped, LiberoVectorEnv)
    assert envs.single_observation_space["image"].shape == (128, 128, 3)
    assert "wrist_image" not in envs.single_observation_space.spaces
    assert envs.unwrapped.max_episode_steps == 200
    assert envs.metadata["autoreset_mode"] == AutoresetMode.DISABLED
    envs.close()


def test_info(make_vec):
    envs = make_vec(3)
    _, first = envs.reset(seed=0)
    _, _, _, _, later = envs.step(random_actions(3))
    for info in (first, later):
        assert set(info) == {
            "success", "stage", "stage_name", "init_state_id", "facts", "instruction", "diverged", "reason"
        }  # fmt: skip
        assert info["diverged"].dtype == bool and info["diverged"].tolist() == [False] * 3
        assert info["reason"].tolist() == [""] * 3
        assert info["instruction"].tolist() == ["pick up the ketchup and place it in the basket"] * 3
        assert info["success"].dtype == bool and info["success"].shape == (3,)
        assert info["stage"].dtype.kind == "i" and info["stage"].shape == (3,)
        assert all(fact.shape == (3,) and fact.dtype == np.float64 for fact in info["facts"].values())
    assert list(envs.unwrapped.instructions) == ["pick up the ketchup and place it in the basket"] * 3


def test_stages_are_counted(make_vec):
    """One for every environment that a call of step moved, by the name that the info has."""
    envs = make_vec(2, max_episode_steps=2, reward="multi_stage")
    assert set(envs.unwrapped.stages) == set(STAGES) and not envs.unwrapped.stages.total()
    envs.reset(seed=0)
    seen = [name for _ in range(2) for name in envs.step(random_actions(2))[4]["stage_name"].tolist()]
    envs.step(random_actions(2))  # all have finished
    assert envs.unwrapped.stages == Counter(seen) and envs.unwrapped.stages.total() == 4


def test_training_on_the_evaluation_states_gives_a_warning(make_vec, recwarn):
    make_vec(1, reward="binary").reset(options={"init_state_id": 0})
    envs = make_vec(1, reward="multi_stage")
    envs.reset(seed=0)
    assert not recwarn.list
    single = gym.make("vla_envs/LiberoObject-v0", task_id=4, image_size=32, reward="multi_stage")
    for each in (envs, single):
        words = "init_state_id names the states that every published evaluation"
        with pytest.warns(UserWarning, match=words) as warned:
            each.reset(options={"init_state_id": 0})
        assert len(warned) == 1
    single.close()


def test_a_reset_asks_the_reward_of_what_is_reset_alone(make_vec):
    asked = []

    def reward(facts):
        asked.append(facts["gripper_to_object"])
        return np.zeros_like(asked[-1])

    envs = make_vec(3, reward=reward)
    for mask in ([False, True, False], [False] * 3, [True, False, True]):
        envs.reset(seed=0, options={"reset_mask": np.array(mask)})
    assert [len(each) for each in asked] == [1, 2] and (np.concatenate(asked) > 0).all()


def test_state_is_the_hands_pose(make_vec):
    envs = make_vec(1)
    obs, _ = envs.reset(seed=0)
    data = envs.unwrapped.simulations[0].data
    np.testing.assert_allclose(obs["state"][0, :3], data.site("gripper0_grip_site").xpos, rtol=1e-6)
    np.testing.assert_allclose(obs["state"][0, 6:], envs.unwrapped.qpos[0, 7:9], rtol=1e-6)
    turn = obs["state"][0, 3:6].astype(float)
    angle = np.linalg.norm(turn)
    half = np.append(np.cos(angle / 2), np.sin(angle / 2) * turn / angle)
    assert abs(half @ data.body("robot0_right_hand").xquat) == pytest.approx(1, abs=1e-6)


def test_several_tasks_at_once(make_vec):
    """Each environment plays as it would alone."""
    envs = make_vec(3, task_id=[4, 0, 4])
    obs, info = envs.reset(seed=[5, 5, 5])
    assert [" ".join(text.split()[3:5]) for text in info["instruction"]] == [
        "ketchup and", "alphabet soup", "ketchup and"
    ]  # fmt: skip
    actions = np.repeat(random_actions(4, 1), 3, axis=1)
    steps = [envs.step(action) for action in actions]
    alone = make_vec(1, task_id=0)
    first, _ = alone.reset(seed=5)
    assert same(member(first, 0), member(obs, 1))
    for action, together in zip(actions, steps, strict=True):
        step = alone.step(action[1:2])
        assert all(same(member(step[k], 0), member(together[k], 1)) for k in (0, 1, 2, 3, 4))
    assert same(member(obs, 0), member(obs, 2))
    assert np.any(obs["image"][0] != obs["image"][1])


# ---- Seeds -------------------------------------------------------------------------------------------


def test_a_group_is_a_repeated_seed(make_vec):
    envs = make_vec(4, image_size=64, wrist_camera=True)
    obs, info = envs.reset(seed=[7, 7, 7, 8])
    for array in (*obs.values(), envs.unwrapped.qpos, *info["facts"].values()):
        assert np.array_equal(array[0], array[1]) and np.array_equal(array[0], array[2])
    assert np.any(obs["image"][0] != obs["image"][3])
    assert np.any(envs.unwrapped.qpos[0] != envs.unwrapped.qpos[3])


def test_an_int_seeds_one_after_the_other(make_vec):
    envs = make_vec(3)
    first, _ = envs.reset(seed=11)
    second, _ = envs.reset(seed=[11, 12, 13])
    assert same(first, second)
    assert len(np.unique(envs.unwrapped.qpos, axis=0)) == 3


def test_a_seed_decides_all_that_follows(make_vec):
    """Whatever was played before, and through resets without a seed."""
    envs, twins = make_vec(2), make_vec(2)
    for k in range(5):
        envs.reset(seed=k)
        envs.step(random_actions(2, seed=k))
    assert same(envs.reset(seed=[3, 4])[0], twins.reset(seed=[3, 4])[0])
    again, _ = envs.reset()
    assert same(again, twins.reset()[0])
    assert np.any(again["image"] != envs.reset(seed=[3, 4])[0]["image"])


def test_without_a_seed_the_scenes_differ(make_vec):
    envs = make_vec(4)
    envs.reset()
    assert len(np.unique(envs.unwrapped.qpos, axis=0)) == 4


def play(envs, seeds, actions):
    """Everything that an episode shows, per environment."""
    obs, info = envs.reset(seed=seeds)
    seen = [(obs, info, envs.unwrapped.qpos)]
    for action in actions:
        obs, reward, terminated, truncated, info = envs.step(action)
        seen.append(({**obs, "reward": reward, "done": terminated | truncated}, info, envs.unwrapped.qpos))
    return [[tuple(member(part, i) for part in moment) for moment in seen] for i in range(len(seeds))]


def equal(episode, other):
    """Whether two of ``play``'s episodes are the same to the bit."""
    pairs = [pair for moments in zip(episode, other, strict=True) for pair in zip(*moments, strict=True)]
    return all(same(*pair) for pair in pairs)


def test_same_bits_whatever_the_number_of_environments_and_threads(make_vec, make):
    """Four environments on two threads, two on one, one alone, and the single environment."""
    seeds, actions = [3, 5, 3, 9], random_actions(6, 4, 2)
    actions[:, 2] = actions[:, 0]
    options = {"action_chunk": 2, "reward": "multi_stage", "wrist_camera": True}
    four = play(make_vec(4, num_threads=2, **options), seeds, actions)
    two = play(make_vec(2, num_threads=1, **options), seeds[:2], actions[:, :2])
    one = play(make_vec(1, num_threads=1, **options), seeds[1:2], actions[:, 1:2])

    assert equal(four[0], two[0]) and equal(four[1], two[1]) and equal(four[1], one[0])
    assert equal(four[0], four[2]) and not equal(four[0], four[1])

    env = make(**options)
    obs, info = env.reset(seed=5)
    for moment, action in zip(four[1], [None, *actions[:, 1]], strict=True):
        if action is not None:
            obs, reward, terminated, truncated, info = env.step(action)
            assert reward == moment[0]["reward"] and (terminated or truncated) == moment[0]["done"]
        assert all(np.array_equal(obs[key], moment[0][key]) for key in obs)
        assert same(info, moment[1]) and np.array_equal(env.unwrapped.qpos, moment[2])


def test_same_bits_on_more_threads_than_environments(make_vec):
    actions = random_actions(5, 3)
    a, b = (play(make_vec(3, num_threads=n), [0, 1, 2], actions) for n in (1, 5))
    assert all(equal(a[i], b[i]) for i in range(3))


# ---- Recorded init states ----------------------------------------------------------------------------


def test_init_state_ids(make_vec):
    """An int for all or one per environment; unsettled, the joints are the recorded ones exactly."""
    envs = make_vec(3, settle_steps=0)
    nq = envs.unwrapped.qpos.shape[1]
    recorded = recorded_init_states(envs.unwrapped.tasks[0])[:, 1 : 1 + nq]
    for given, ids in ((7, [7, 7, 7]), ([0, 49, 3], [0, 49, 3]), (np.array([2, 1, 0]), [2, 1, 0])):
        _, info = envs.reset(options={"init_state_id": given})
        assert info["init_state_id"].tolist() == ids
        assert np.array_equal(envs.unwrapped.qpos, recorded[ids])
    _, info = envs.reset(seed=0)
    assert info["init_state_id"].tolist() == [-1, -1, -1]


def test_recorded_states_do_not_depend_on_seeds(make_vec):
    envs = make_vec(2)
    first, _ = envs.reset(seed=1, options={"init_state_id": 5})
    second, _ = envs.reset(seed=2, options={"init_state_id": 5})
    assert same(first, second) and np.array_equal(first["image"][0], first["image"][1])


def test_settling_holds_still_with_an_open_gripper(make_vec):
    """Ten control steps, OpenVLA's protocol: the same as ten such actions by hand, up to the step count."""
    settled, by_hand = make_vec(1), make_vec(1, settle_steps=0)
    settled.reset(options={"init_state_id": 3})
    by_hand.reset(options={"init_state_id": 3})
    for _ in range(10):
        by_hand.step(STILL[None])
    np.testing.assert_array_equal(settled.unwrapped.qpos, by_hand.unwrapped.qpos)


def test_training_uses_no_recorded_state(make_vec):
    envs = make_vec(30, settle_steps=0)
    envs.reset(seed=0)
    nq = envs.unwrapped.qpos.shape[1]
    recorded = recorded_init_states(envs.unwrapped.tasks[0])[:, 1 : 1 + nq]
    assert np.abs(envs.unwrapped.qpos[:, None] - recorded).max(2).min() > 1e-3


# ---- Episodes ----------------------------------------------------------------------------------------


def test_success_terminates(make_vec, drop):
    envs = make_vec(2, max_episode_steps=3)
    envs.reset(seed=0)
    drop(envs, 1)
    _, reward, terminated, truncated, info = envs.step(np.tile(STILL, (2, 1)))
    assert terminated.tolist() == info["success"].tolist() == [False, True]
    assert info["facts"]["success"].tolist() == [0, 1]
    assert reward.tolist() == [0, 1] and not truncated.any()


def test_the_step_limit_truncates(make_vec):
    envs = make_vec(2, max_episode_steps=3)
    envs.reset(seed=0)
    flags = [envs.step(random_actions(2))[2:4] for _ in range(3)]
    assert [truncated.tolist() for _, truncated in flags] == [[False] * 2, [False] * 2, [True] * 2]
    assert not any(terminated.any() for terminated, _ in flags)


def test_success_on_the_last_step_is_success_alone(make_vec, drop):
    envs = make_vec(2, max_episode_steps=1)
    envs.reset(seed=0)
    drop(envs, 0)
    _, _, terminated, truncated, _ = envs.step(np.tile(STILL, (2, 1)))
    assert terminated.tolist() == [True, False] and truncated.tolist() == [False, True]


def seconds(envs):
    return np.array([simulation.data.time for simulation in envs.unwrapped.simulations])


def test_a_chunk_stops_at_success(make_vec, drop):
    """The ketchup falls from 20 cm for a few of the chunk's eight control steps of 0.05 s."""
    envs, single = make_vec(2, action_chunk=8), make_vec(2)
    for each in (envs, single):
        each.reset(seed=0)
        drop(each, 0, height=0.2)
    start = seconds(envs)
    steps = 1
    while not single.step(np.tile(STILL, (2, 1)))[2][0]:
        steps += 1
    assert 1 < steps < 8
    _, _, terminated, _, _ = envs.step(np.tile(STILL, (2, 8, 1)))
    assert terminated.tolist() == [True, False]
    np.testing.assert_allclose(seconds(envs) - start, [0.05 * steps, 0.4])
    assert np.array_equal(envs.unwrapped.qpos[0], single.unwrapped.qpos[0])


def test_a_chunk_stops_at_the_limit(make_vec):
    envs, single = make_vec(1, action_chunk=4, max_episode_steps=6), make_vec(1)
    envs.reset(seed=0)
    single.reset(seed=0)
    start, actions = seconds(envs), random_actions(8, 1)
    truncated = [envs.step(actions[k : k + 4].transpose(1, 0, 2))[3].tolist() for k in (0, 4)]
    for action in actions[:6]:
        single.step(action)
    assert truncated == [[False], [True]]
    np.testing.assert_allclose(seconds(envs) - start, 0.3)
    assert np.array_equal(envs.unwrapped.qpos, single.unwrapped.qpos)


def test_a_finished_environment_is_frozen(make_vec, drop):
    """It neither moves nor pays, its picture stays; the others go on."""
    envs, twins = make_vec(3, reward="multi_stage"), make_vec(3, reward="multi_stage")
    for each in (envs, twins):
        each.reset(seed=0)
        drop(each, 1)
        each.step(np.tile(STILL, (3, 1)))
    assert envs.unwrapped.frozen.tolist() == [False, True, False]
    frozen = None
    for k in range(4):
        actions = random_actions(3, seed=k)
        obs, reward, terminated, truncated, info = envs.step(actions)
        actions[1] = 0
        others = twins.step(actions)
        now = {"obs": member(obs, 1), "info": member(info, 1), "qpos": envs.unwrapped.qpos[1]}
        frozen = frozen or now
        assert same(now, frozen)
        assert reward[1] == 0 and reward[0] != 0
        assert terminated.tolist() == [False, True, False] and not truncated.any()
        assert same(obs, others[0])
    assert envs.unwrapped.simulations[0].data.time > envs.unwrapped.simulations[1].data.time


def test_a_finished_environment_is_reset_alone(make_vec, drop):
    envs, twins = make_vec(3), make_vec(3)
    for each in (envs, twins):
        each.reset(seed=[1, 2, 3])
        drop(each, 1)
        each.step(np.tile(STILL, (3, 1)))
    before = envs.unwrapped.qpos
    obs, info = envs.reset(seed=[8, 9, 10], options={"reset_mask": np.array([False, True, False])})
    assert not envs.unwrapped.frozen.any() and not info["success"].any()
    assert np.array_equal(envs.unwrapped.qpos[[0, 2]], before[[0, 2]])
    fresh, _ = make_vec(1).reset(seed=[9])
    assert same(member(obs, 1), member(fresh, 0))
    # The others go on as if nothing had happened, and their own seeds were not touched.
    actions = random_actions(3)
    mine, theirs = envs.step(actions), twins.step(actions)
    for i in (0, 2):
        assert same(member(mine[0], i), member(theirs[0], i))
    assert mine[1].shape == (3,)
    resets = envs.reset()[0], twins.reset()[0]
    assert all(same(member(resets[0], i), member(resets[1], i)) for i in (0, 2))


def test_the_step_limit_counts_from_the_reset(make_vec):
    envs = make_vec(2, max_episode_steps=3)
    envs.reset(seed=0)
    for _ in range(2):
        envs.step(random_actions(2))
    envs.reset(options={"reset_mask": np.array([True, False])})
    assert envs.step(random_actions(2))[3].tolist() == [False, True]
    assert envs.step(random_actions(2))[3].tolist() == [False, True]
    assert envs.step(random_actions(2))[3].tolist() == [True, True]


def test_init_state_id_and_mask_together(make_vec):
    envs = make_vec(2)
    envs.reset(seed=0)
    mask = np.array([False, True])
    _, info = envs.reset(options={"init_state_id": [99, 12], "reset_mask": mask})  # no one asks for 99
    assert info["init_state_id"].tolist() == [-1, 12]


def test_what_is_handed_out_is_the_callers(make_vec):
    """Nothing that a caller does to observations, infos or actions comes back into the simulation."""
    envs, twins = make_vec(2), make_vec(2)
    outs = envs.reset(seed=0)
    twins.reset(seed=0)
    for _ in range(2):
        for part in (outs[0], outs[-1], outs[-1]["facts"]):
            for array in part.values():
                if isinstance(array, np.ndarray) and array.dtype.kind in "fiub":
                    array[...] = 0
        envs.unwrapped.qpos[...] = 0
        actions = random_actions(2) * 2
        copy = actions.copy()
        outs, expected = envs.step(actions), twins.step(actions)
        assert np.array_equal(actions, copy)
        assert all(same(a, b) for a, b in zip(outs, expected, strict=True))


def test_render_shows_the_scene_and_changes_nothing(make_vec):
    envs, twins = make_vec(2, render_mode="rgb_array"), make_vec(2)
    assert twins.render() is None
    for each in (envs, twins):
        each.reset(seed=0)
    for action in random_actions(3, 2):
        frames = envs.render()
        assert len(frames) == 2 and all(f.shape == (256, 256, 3) and f.dtype == np.uint8 for f in frames)
        assert same(envs.step(action)[0], twins.step(action)[0])
    assert np.any(envs.render()[0] != frames[0])


# ---- Autoreset, beside Gymnasium's own vector environment --------------------------------------------


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_autoreset_is_gymnasiums(make_vec, drop, mode):
    """The same seeds and actions as a ``SyncVectorEnv`` of single environments: the same everything."""
    mine = make_vec(2, max_episode_steps=3, reward="multi_stage", autoreset_mode=mode)
    theirs = gym.make_vec(
        "vla_envs/LiberoObject-v0", num_envs=2, vectorization_mode="sync", task_id=4, image_size=16,
        max_episode_steps=3, reward="multi_stage", vector_kwargs={"autoreset_mode": mode},
    )  # fmt: skip
    assert mine.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"] == mode
    assert mine.autoreset_mode == theirs.autoreset_mode == mode
    listed = [DictInfoToList(RecordEpisodeStatistics(envs)) for envs in (mine, theirs)]
    (obs, infos), (other_obs, other_infos) = (envs.reset(seed=[3, 4]) for envs in listed)
    assert same(obs, other_obs)
    finished = 0
    for k, action in enumerate(random_actions(9, 2)):
        if k in (1, 3):
            drop(mine, 1)
            drop(theirs.envs[1])
        (obs, *rest, infos), (other_obs, *other_rest, other_infos) = (envs.step(action) for envs in listed)
        assert same(obs, other_obs)
        assert all(np.array_equal(a, b) for a, b in zip(rest, other_rest, strict=True))
        for info, other in zip(infos, other_infos, strict=True):
            if "episode" in info:
                finished += 1
                del info["episode"]["t"], other["episode"]["t"]
            assert same(info, other)
    assert finished >= 4
    theirs.close()


def test_autoreset_same_step_keeps_the_last_observation(make_vec, drop):
    envs = make_vec(2, autoreset_mode="SameStep")
    twins = make_vec(2)
    for each in (envs, twins):
        each.reset(seed=0)
        drop(each, 0)
    obs, reward, terminated, _, info = envs.step(np.tile(STILL, (2, 1)))
    last, _, _, _, last_info = twins.step(np.tile(STILL, (2, 1)))
    assert terminated.tolist() == [True, False] and reward.tolist() == [1, 0]
    assert same(info["final_obs"][0], member(last, 0)) and info["final_obs"][1] is None
    assert info["_final_obs"].tolist() == info["_final_info"].tolist() == [True, False]
    assert same(member(info["final_info"]["facts"], 0), member(last_info["facts"], 0))
    assert not info["success"].any() and np.any(obs["image"][0] != last["image"][0])


def test_wrappers_record_episodes(make_vec, drop):
    envs = DictInfoToList(RecordEpisodeStatistics(make_vec(2, max_episode_steps=2, reward="multi_stage")))
    _, infos = envs.reset(seed=0)
    assert [info["init_state_id"] for info in infos] == [-1, -1]
    assert isinstance(infos[0]["facts"]["grasped"], float)
    _, first, _, _, infos = envs.step(np.tile(STILL, (2, 1)))
    assert "episode" not in infos[0]
    drop(envs, 0)
    _, second, terminated, truncated, infos = envs.step(np.tile(STILL, (2, 1)))
    assert (terminated.tolist(), truncated.tolist()) == ([True, False], [False, True])
    assert [info["episode"]["l"] for info in infos] == [2, 2]
    np.testing.assert_allclose([info["episode"]["r"] for info in infos], first + second)


# ---- Refusals ----------------------------------------------------------------------------------------


def with_nan(actions):
    actions[1, 3] = np.nan
    return actions


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (with_nan(random_actions(2)), ["[1]", "NaN"]),
        (random_actions(3), ["(3, 7)", "(2, 7)"]),
        (random_actions(2)[:, :6], ["(2, 6)", "(2, 7)"]),
        (random_actions(2, 1), ["(2, 1, 7)", "(2, 7)"]),
        (random_actions(), ["(7,)", "(2, 7)"]),
    ],
)
def test_a_bad_action_is_refused_and_changes_nothing(make_vec, actions, words):
    envs, twins = make_vec(2), make_vec(2)
    for each in (envs, twins):
        each.reset(seed=0)
        each.step(random_actions(2))
    before, start = envs.unwrapped.qpos, seconds(envs)
    with pytest.raises(ValueError) as error:
        envs.step(actions)
    assert all(word in str(error.value) for word in words)
    assert np.array_equal(envs.unwrapped.qpos, before) and np.array_equal(seconds(envs), start)
    assert all(map(same, envs.step(random_actions(2)), twins.step(random_actions(2))))


def test_an_action_out_of_range_is_clipped(make_vec):
    envs, twins = make_vec(2), make_vec(2)
    for each in (envs, twins):
        each.reset(seed=0)
    actions = 3 * random_actions(2)
    actions[0, 1] = np.inf
    assert np.any(np.abs(actions) > 1)
    assert same(envs.step(actions)[0], twins.step(np.clip(actions, -1, 1))[0])


def test_step_before_reset(make_vec):
    envs = make_vec(2)
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(random_actions(2))
    envs.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(random_actions(2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"suite": "LiberoObjekt"}, ["'LiberoObjekt'", "did you mean 'LiberoObject'"]),
        ({"task_id": 10}, ["10", "0 to 9", "nearest 9"]),
        ({"task_id": -1}, ["-1", "0 to 9", "nearest 0"]),
        ({"task_id": [0, 1, 2]}, ["3 entries", "2"]),
        ({"task_id": [0, 10]}, ["10", "0 to 9"]),
        ({"task_id": 1.0}, ["1.0", "int"]),
        ({"task_id": None}, ["None", "int"]),
        ({"num_envs": 0}, ["num_envs", "0", "at least 1"]),
        ({"num_envs": 2.0}, ["num_envs", "2.0"]),
        ({"image_size": 0}, ["image_size", "0", "8 to 4096"]),
        ({"image_size": 100_000}, ["image_size", "100000", "8 to 4096"]),
        ({"image_size": (64, 64)}, ["image_size", "(64, 64)"]),
        ({"action_chunk": 0}, ["action_chunk", "0", "at least 1"]),
        ({"action_chunk": True}, ["action_chunk", "True"]),
        ({"max_episode_steps": 0}, ["max_episode_steps", "0"]),
        ({"num_threads": 0}, ["num_threads", "0"]),
        ({"settle_steps": -1}, ["settle_steps", "-1"]),
        ({"reward": "multistage"}, ["'multistage'", "did you mean 'multi_stage'"]),
        ({"reward": "nowhere.py:reward"}, ["'nowhere.py'", "does not exist"]),
        ({"reward": ["binary"]}, ["['binary']", "'binary'"]),
        ({"reward": None}, ["None", "'binary'"]),
        ({"assets": "/nowhere"}, ["'/nowhere'", "'builtin'"]),
        ({"assets": "buildin"}, ["did you mean 'builtin'"]),
        ({"render_mode": "human"}, ["'human'", "'rgb_array'"]),
        ({"autoreset_mode": "Sometimes"}, ["'Sometimes'", "NextStep"]),
    ],
)
def test_a_bad_argument_is_refused(arguments, words):
    with pytest.raises(ValueError) as error:
        LiberoVectorEnv(**{"num_envs": 2, "image_size": 16} | arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seed": [1]}, ["1 entries", "2"]),
        ({"seed": [1, 2, 3]}, ["3 entries", "2"]),
        ({"seed": [1, -2]}, ["-2", "at least 0"]),
        ({"seed": -1}, ["-1", "at least 0"]),
        ({"seed": [1, 2.5]}, ["2.5"]),
        ({"seed": 1.0}, ["1.0"]),
        ({"seed": "7"}, ["'7'"]),
        ({"options": {"init_state_id": 50}}, ["50", "0 to 49"]),
        ({"options": {"init_state_id": -1}}, ["-1", "0 to 49"]),
        ({"options": {"init_state_id": [0, 50]}}, ["50", "0 to 49"]),
        ({"options": {"init_state_id": [0, 1, 2]}}, ["[0, 1, 2]", "2 ints"]),
        ({"options": {"init_state_id": 1.5}}, ["1.5", "int"]),
        ({"options": {"init_state_id": "3"}}, ["'3'", "int"]),
        ({"options": {"reset_mask": np.array([True])}}, ["(1,)", "(2,)"]),
        ({"options": {"reset_mask": np.array([1, 0])}}, ["int", "bool"]),
        ({"options": {"init_state": 3}}, ["'init_state'", "init_state_id"]),
    ],
)
def test_a_bad_reset_is_refused_and_changes_nothing(make_vec, arguments, words):
    envs, twins = make_vec(2), make_vec(2)
    for each in (envs, twins):
        each.reset(seed=0)
    before = envs.unwrapped.qpos
    with pytest.raises(ValueError) as error:
        envs.reset(**arguments)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert np.array_equal(envs.unwrapped.qpos, before)
    assert all(map(same, envs.step(random_actions(2)), twins.step(random_actions(2))))
    assert same(envs.reset()[0], twins.reset()[0])


def test_a_closed_environment():
    envs = LiberoVectorEnv(1, image_size=16)
    envs.reset(seed=0)
    envs.close()
    for call in (lambda: envs.step(random_actions(1)), lambda: envs.reset(seed=0)):
        with pytest.raises(RuntimeError, match="the environment is closed; make a new one"):
            call()


# ---- Interrupts, exceptions, threads and forks -------------------------------------------------------

LEFT = (
    "step was called before reset of environments {}, which are new, or which an interrupt or an error left"
)


def plays_on(envs, num_envs=4):
    """Whether ``envs``, once reset, plays as a new one does."""
    twins = LiberoVectorEnv(num_envs, task_id=4, image_size=16, num_threads=1)
    alike = [same(envs.reset(seed=9)[0], twins.reset(seed=9)[0])]
    for k in range(3):
        actions = random_actions(num_envs, seed=k)
        alike += map(same, envs.step(actions), twins.step(actions))
    twins.close()
    return all(alike) and same(envs.unwrapped.qpos, twins.qpos)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_interrupted_step_wants_a_reset(make_vec, interrupt, monkeypatch, num_threads):
    envs = make_vec(4, num_threads=num_threads)
    inner, drawn, ended = envs.unwrapped, envs.unwrapped._images, []

    def draw(i):
        if i == 0:
            interrupt()
        picture = drawn(i)
        ended.append(i)
        return picture

    envs.reset(seed=0)
    monkeypatch.setattr(inner, "_images", draw)
    with pytest.raises(KeyboardInterrupt):
        envs.step(random_actions(4))
    before = inner.qpos
    assert 0 in ended  # what had begun was waited for
    so_far = len(ended)
    with pytest.raises(gym.error.ResetNeeded, match=re.escape(LEFT.format([0, 1, 2, 3]))):
        envs.step(random_actions(4))
    assert np.array_equal(inner.qpos, before) and len(ended) == so_far
    monkeypatch.undo()
    assert plays_on(envs)


def test_an_interrupted_reset_wants_a_reset(make_vec, interrupt, monkeypatch):
    """In the midst of settling, of copying, and of asking the reward; those not reset are as they were."""
    envs = make_vec(4, num_threads=2)
    inner = envs.unwrapped
    envs.reset(seed=0)
    mask = np.array([True, True, True, False])

    def stop(*_):
        raise KeyboardInterrupt

    copy, copied = vector.Simulation.copy_from, []

    def copy_one(self, *settled):
        if copied:
            stop()
        copied.append(copy(self, *settled))

    for place, name, replacement, seed in (
        (inner, "_images", lambda i: {} if i else interrupt(), 50),  # while they settle
        (vector.Simulation, "copy_from", copy_one, 0),
        (vector, "compute_reward", stop, 0),
    ):
        before = member(inner.qpos, 3)
        with monkeypatch.context() as patch:
            patch.setattr(place, name, replacement)
            with pytest.raises(KeyboardInterrupt):
                envs.reset(seed=seed, options={"reset_mask": mask})
        with pytest.raises(gym.error.ResetNeeded, match=re.escape(LEFT.format([0, 1, 2]))):
            envs.step(random_actions(4))
        assert np.array_equal(inner.qpos[3], before)
        envs.reset(seed=0, options={"reset_mask": mask})
        envs.step(random_actions(4))
    assert plays_on(envs)


def test_a_step_that_fails_wants_a_reset(make_vec, monkeypatch):
    """Where one environment cannot be drawn, and where the reward fails."""
    envs = make_vec(4, num_threads=2, max_episode_steps=1, autoreset_mode="SameStep")
    inner = envs.unwrapped
    envs.reset(seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(inner, "_images", {}.__getitem__)
        with pytest.raises(KeyError):
            envs.step(random_actions(4))
    with pytest.raises(gym.error.ResetNeeded, match="an interrupt or an error left in the middle of a call"):
        envs.step(random_actions(4))
    envs.reset(seed=0)
    inner.set_reward(lambda facts: 1 / 0)
    with pytest.raises(ValueError, match="the reward function raised ZeroDivisionError"):
        envs.step(random_actions(4))
    inner.set_reward("binary")
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(random_actions(4))
    assert plays_on(make_vec(4, num_threads=2))
    envs.reset(seed=0)
    assert envs.step(random_actions(4))[3].all()


def test_two_threads_at_once_are_refused(make_vec, monkeypatch):
    envs, twins = make_vec(2, num_threads=2, render_mode="rgb_array"), make_vec(2)
    inner, drawn = envs.unwrapped, envs.unwrapped._images
    begun, refused = threading.Event(), threading.Event()

    def draw(i):
        begun.set()
        assert refused.wait(30)
        return drawn(i)

    for each in (envs, twins):
        each.reset(seed=0)
    monkeypatch.setattr(inner, "_images", draw)
    with ThreadPoolExecutor(1) as other:
        step = other.submit(envs.step, random_actions(2))
        assert begun.wait(30)
        for call in (
            lambda: envs.step(random_actions(2)),
            lambda: envs.reset(seed=0),
            lambda: envs.render(),
            lambda: inner.qpos,
            lambda: inner.set_reward("binary"),
            lambda: envs.close(),
        ):
            with pytest.raises(RuntimeError, match="the environment is busy with a call that has not ended"):
                call()
        refused.set()
        assert all(map(same, step.result(), twins.step(random_actions(2))))
    assert not inner.closed and all(map(same, envs.step(random_actions(2)), twins.step(random_actions(2))))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_refused(make_vec):
    """Closing there leaves the parent's as it is."""
    envs = make_vec(2, num_threads=2)
    envs.reset(seed=0)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest's may run here
        signal.alarm(30)
        try:
            envs.step(random_actions(2))
        except RuntimeError as error:
            envs.close()
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        words = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    assert words == (
        f"the environment belongs to process {os.getpid()}, and this process, {child}, is a fork of it;"
        " make an environment in this process"
    )
    assert plays_on(envs, 2)


def test_a_step_of_finished_environments_gives_one_warning(make_vec):
    envs = make_vec(2, max_episode_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs.reset(seed=0)
        envs.step(random_actions(2))
    with pytest.warns(UserWarning, match="'Disabled' a step does nothing.* also takes 'NextStep'") as given:
        envs.step(random_actions(2))
    assert [each.filename for each in given] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs.step(random_actions(2))
        for mode in ("NextStep", "SameStep"):
            other = make_vec(2, max_episode_steps=1, autoreset_mode=mode)
            other.reset(seed=0)
            for _ in range(3):
                other.step(random_actions(2))


def test_environments_share_one_model(make_vec):
    envs = make_vec(3, task_id=[4, 4, 0]).unwrapped
    models = [simulation.scene.model for simulation in envs.simulations]
    assert models[0] is models[1] is load_scene("LiberoObject", 4, "builtin").model
    assert models[2] is not models[0]


def test_close_twice(make_vec):
    envs = make_vec(2, num_threads=2)
    envs.reset(seed=0)
    envs.close()
    envs.close()
