"""The single environment: Gymnasium's own checks, and what differs from the vector environment's face."""

import copy
import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
from artifacts import some_tasks
from gymnasium.utils.env_checker import check_env

from vla_envs import FactsReward, LiberoEnv, liberoplus, liberopro
from vla_envs.scene import load_scene
from vla_envs.tasks import SUITES, get_task, recorded_init_states

IDS = [f"vla_envs/{suite}-v0" for suite in SUITES]
STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])


def test_the_suites_are_registered():
    ours = [name for name in gym.registry if name.startswith("vla_envs/")]
    others = [f"vla_envs/{suite}-v0" for suite in ("Libero", *liberoplus.SUITES, *liberopro.SUITES)]
    assert sorted(ours) == sorted([*IDS, *others]) and "vla_envs/LiberoObject-v0" in ours


# The state has no bounds; everything else that Gymnasium warns of is a mistake.
UNBOUNDED = r".*A Box observation space (minimum|maximum) value is -?infinity"


@pytest.mark.parametrize(
    "arguments", [{}, {"action_chunk": 2, "wrist_camera": True, "reward": "multi_stage"}]
)
def test_gymnasiums_checker(arguments):
    env = gym.make("vla_envs/LiberoObject-v0", image_size=32, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=UNBOUNDED)
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version.*")
        check_env(env.unwrapped)
        check_env(env, skip_render_check=True)
    env.close()


@pytest.mark.parametrize(
    "env_id",
    [pytest.param(k, marks=[] if k.endswith(("Object-v0", "Goal-v0")) else [pytest.mark.slow]) for k in IDS],
)
def test_gymnasiums_checker_on_every_suite(env_id):
    """With a picture to look at."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=UNBOUNDED)
        env = gym.make(env_id, image_size=32, render_mode="rgb_array")
        check_env(env.unwrapped)
        env.reset(seed=0)
        frame = env.render()
        env.close()
    assert frame.shape == (256, 256, 3) and frame.dtype == np.uint8 and frame.std() > 10


@pytest.mark.parametrize("task_id", some_tasks())
def test_every_task_plays(task_id, make):
    env = make(task_id=task_id)
    obs, info = env.reset(seed=0)
    task = get_task("LiberoObject", task_id)
    assert obs in env.observation_space
    assert info["instruction"] == env.unwrapped.instruction == task.instruction
    assert env.unwrapped.instructions == [task.instruction]
    obs, reward, terminated, truncated, info = env.step(STILL)
    assert obs in env.observation_space and info["instruction"] == task.instruction
    assert (reward, terminated, truncated) == (0, False, False)
    assert env.unwrapped.qpos.shape == (load_scene("LiberoObject", task_id, "builtin").model.nq,)


def test_types(make):
    """Python's own numbers, as Gymnasium's single environments hand them out."""
    env = make()
    _, first = env.reset(seed=0)
    _, reward, terminated, truncated, later = env.step(STILL)
    assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
    for info in (first, later):
        assert {key: type(value) for key, value in info.items()} == {
            "success": bool, "stage": int, "stage_name": str, "init_state_id": int, "facts": dict,
            "instruction": str, "diverged": bool, "reason": str,
        }  # fmt: skip
        assert {type(value) for value in info["facts"].values()} == {float}


def test_spaces(make):
    env = make(image_size=24, action_chunk=4, wrist_camera=True)
    assert env.action_space == gym.spaces.Box(-1, 1, (4, 7), np.float32)
    assert {key: space.shape for key, space in env.observation_space.items()} == {
        "image": (24, 24, 3), "wrist_image": (24, 24, 3), "state": (8,)
    }  # fmt: skip
    assert env.reset(seed=0)[0] in env.observation_space


def test_init_state_id(make):
    env = make(settle_steps=0)
    recorded = recorded_init_states(get_task("LiberoObject", 4))
    nq = len(env.unwrapped.qpos)
    _, info = env.reset(options={"init_state_id": 12})
    assert info["init_state_id"] == 12
    assert np.array_equal(env.unwrapped.qpos, recorded[12, 1 : 1 + nq])
    with pytest.raises(ValueError, match="50 does not exist; expected 0 to 49"):
        env.reset(options={"init_state_id": 50})


def test_success(make, drop):
    env = make()
    env.reset(seed=0)
    drop(env)
    _, reward, terminated, truncated, info = env.step(STILL)
    assert (reward, terminated, truncated, info["success"]) == (1, True, False, True)
    qpos = env.unwrapped.qpos
    _, reward, terminated, truncated, _ = env.step(-np.ones(7))  # frozen
    assert (reward, terminated, truncated) == (0, True, False)
    assert np.array_equal(env.unwrapped.qpos, qpos)
    _, info = env.reset(seed=0)
    assert not info["success"] and env.step(STILL)[2] is False


def test_success_on_the_last_step_is_success_alone(drop):
    env = LiberoEnv(task_id=4, image_size=16, max_episode_steps=1)
    env.reset(seed=0)
    drop(env)
    assert env.step(STILL)[2:4] == (True, False)
    env.close()


def decisions(envs, most=10):
    """How many decisions an episode without motion takes, at most ``most``."""
    envs.reset(seed=0)
    action = np.zeros(envs.action_space.shape)
    return next((n for n in range(1, most + 1) if np.all(envs.step(action)[3])), most)


@pytest.mark.parametrize(("limit", "chunk", "played"), [(None, 40, 5), (3, 1, 3), (20, 8, 3), (280, 40, 7)])
def test_the_step_limit_of_gymnasiums_make(make, make_vec, limit, chunk, played):
    """It counts control steps as ``gym.make_vec``'s does; the spec says the limit, and can be made again."""
    arguments = {"action_chunk": chunk} | ({} if limit is None else {"max_episode_steps": limit})
    env = make(**arguments)
    assert env.spec.max_episode_steps == (limit or 200)
    again = gym.make(env.spec)
    assert decisions(env) == decisions(again) == decisions(make_vec(1, **arguments)) == played
    assert again.spec == env.spec
    again.close()


def test_gymnasiums_make_without_a_step_limit(make):
    env = make(max_episode_steps=-1, action_chunk=50)
    assert decisions(env, most=6) == 6 and env.spec.max_episode_steps is None


def test_the_step_limit_of_environments_side_by_side():
    envs = gym.make_vec(
        "vla_envs/LiberoObject-v0", 2, "sync", task_id=4, image_size=16, action_chunk=4, max_episode_steps=6
    )
    assert decisions(envs) == 2
    envs.close()


@pytest.mark.parametrize(("chunk", "fps"), [(1, 20), (8, 2.5), (40, 0.5)])
def test_videos_play_at_the_speed_of_the_robot(make, make_vec, chunk, fps):
    for env in (make(action_chunk=chunk), make_vec(1, action_chunk=chunk)):
        assert env.metadata["render_fps"] == fps


# ---- Copies ------------------------------------------------------------------------------------------


def played(env):
    """What an environment shows of a reset and a step."""
    obs, _ = env.reset(seed=3)
    later, reward, *_ = env.step(np.ones(env.action_space.shape))
    assert not np.array_equal(later["state"], obs["state"])
    return [obs["state"], later["state"], later["image"], reward]


@pytest.mark.parametrize("kind", ["single", "vector", "wrapped", "wrapped vector"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_is_made_from_the_arguments(make, make_vec, kind, copied):
    """Before and after a reset; it wants a reset of its own, then plays as the original."""
    env = {
        "single": lambda: make(action_chunk=2, reward="multi_stage"),
        "vector": lambda: make_vec(2, action_chunk=2, reward="multi_stage"),
        "wrapped": lambda: FactsReward(make(action_chunk=2), "multi_stage"),
        "wrapped vector": lambda: FactsReward(make_vec(2, action_chunk=2), "multi_stage"),
    }[kind]()
    early = copied(env)
    expected = played(env)
    for other in (early, copied(env)):
        assert repr(other) == repr(env) and other.spec == env.spec
        with pytest.raises(gym.error.ResetNeeded):
            other.step(np.ones(env.action_space.shape))
        assert all(map(np.array_equal, played(other), expected))
        other.close()
    assert all(map(np.array_equal, played(env), expected))  # none the worse for it


def test_a_copy_pays_the_reward_that_was_set(make, make_vec):
    for env in (make(), make_vec(1)):
        env.unwrapped.set_reward("multi_stage")
        other = copy.deepcopy(env)
        assert np.all(played(other)[-1] == -2)
        other.close()


def test_a_simulation_is_not_copied(make_vec):
    with pytest.raises(TypeError, match="a Simulation cannot be copied"):
        copy.deepcopy(make_vec(1).unwrapped.simulations)


# ---- Random numbers ----------------------------------------------------------------------------------


def test_np_random_draws_the_placements(make):
    env = make()
    env.reset(seed=5)
    assert env.unwrapped.np_random_seed == env.np_random_seed == 5
    before = env.unwrapped.np_random.bit_generator.state
    env.reset()
    qpos = env.unwrapped.qpos
    assert env.unwrapped.np_random.bit_generator.state != before
    env.reset()
    assert not np.array_equal(env.unwrapped.qpos, qpos)
    env.unwrapped.np_random.bit_generator.state = before
    env.reset()
    assert np.array_equal(env.unwrapped.qpos, qpos) and env.np_random_seed == 5


def test_np_random_can_be_set(make):
    env, twin = make(), make()
    env.unwrapped.np_random = np.random.Generator(np.random.PCG64(7))
    assert env.np_random_seed == -1  # Gymnasium's number for a seed that is not known
    env.reset(), twin.reset(seed=7)
    assert np.array_equal(env.unwrapped.qpos, twin.unwrapped.qpos)
    with pytest.raises(ValueError, match=r"np_random is .*; expected 1 np.random.Generator"):
        env.unwrapped.np_random = 7


def test_np_random_before_the_first_reset(make):
    env, twin = make(), make()
    twin.reset(seed=env.unwrapped.np_random_seed), env.reset()
    assert np.array_equal(env.unwrapped.qpos, twin.unwrapped.qpos)


def test_np_random_of_a_vector_environment(make_vec):
    """One generator for each environment, as in Gymnasium's own."""
    envs = make_vec(2)
    envs.reset(seed=[5, 3])
    assert envs.np_random_seed == (5, 3)
    before = copy.deepcopy(envs.np_random)
    envs.reset()
    qpos = envs.unwrapped.qpos
    envs.np_random = before
    assert envs.np_random_seed == (-1, -1)
    envs.reset()
    assert np.array_equal(envs.unwrapped.qpos, qpos)
    for bad in (before[:1], [5, 3], None):
        with pytest.raises(ValueError, match=r"np_random is .*; expected 2 np.random.Generator"):
            envs.np_random = bad
    envs.reset(seed=[8, 9])
    assert envs.np_random_seed == (8, 9)


def test_the_step_limit_counts_control_steps():
    env = LiberoEnv(task_id=4, image_size=16, max_episode_steps=5, action_chunk=2)
    for _ in range(2):
        env.reset(seed=0)
        flags = [env.step(np.tile(STILL, (2, 1)))[2:4] for _ in range(3)]
        assert flags == [(False, False), (False, False), (False, True)]
    env.close()


@pytest.mark.parametrize(
    "action", [np.full(7, np.nan), np.zeros(6), np.zeros((1, 7)), np.zeros((2, 7)), 0.0, np.array([])]
)
def test_a_bad_action_is_refused_and_changes_nothing(make, action):
    env = make()
    env.reset(seed=0)
    before = env.unwrapped.qpos
    with pytest.raises(ValueError, match=r"NaN|\(7,\)"):
        env.unwrapped.step(action)
    assert np.array_equal(env.unwrapped.qpos, before)


def test_an_action_out_of_range_is_clipped(make):
    results = []
    for action in (np.array([2, -3, 0.5, 0, 9, 0, -4.0]), np.array([1, -1, 0.5, 0, 1, 0, -1.0])):
        env = make()
        env.reset(seed=0)
        env.unwrapped.step(action)
        results.append(env.unwrapped.qpos)
    assert np.array_equal(*results)


def test_a_misspelt_id_names_the_right_one():
    with pytest.raises(gym.error.NameNotFound, match="LiberoObject"):
        gym.make("vla_envs/LiberoObjects-v0")


@pytest.mark.parametrize(
    "arguments", [{"task_id": 10}, {"task_id": -1}, {"image_size": 0}, {"reward": "binery"}]
)
def test_a_bad_argument_is_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        gym.make("vla_envs/LiberoObject-v0", **arguments)


def test_pictures_of_two_environments_do_not_mix(make):
    """Each has a picture size of its own, and one OpenGL context serves both."""
    small, large = make(image_size=16), make(image_size=96)
    first, big = small.reset(seed=0)[0], large.reset(seed=0)[0]
    for _ in range(2):
        after_small, after_large = small.step(STILL)[0], large.step(STILL)[0]
    alone = make(image_size=16)
    assert np.array_equal(alone.reset(seed=0)[0]["image"], first["image"])
    for _ in range(2):
        expected = alone.step(STILL)[0]
    assert np.array_equal(expected["image"], after_small["image"])
    assert np.abs(after_large["image"].astype(int) - big["image"]).mean() < 5  # hardly anything moved


def test_gymnasiums_wrappers(make, drop):
    env = gym.wrappers.RecordEpisodeStatistics(make(reward="multi_stage", max_episode_steps=3))
    env.reset(seed=0)
    rewards = [env.step(STILL)[1] for _ in range(2)]
    drop(env)
    _, reward, _, _, info = env.step(STILL)
    assert info["episode"]["r"] == pytest.approx(sum(rewards) + reward) and info["episode"]["l"] == 3
