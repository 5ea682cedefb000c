"""Other people's code on our environments; a library that is not installed is skipped."""

import itertools
import multiprocessing
import re
import warnings
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from vla_envs import LiberoEnv

ENV_ID = "vla_envs/LiberoObject-v0"


def test_gymnasium_alone():
    """The README's lines that need no other library: resetting those that have finished, a reward."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    first, *blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names: dict = {}
    exec(
        "".join([first, "truncated[2] = True\n", *(block for block in blocks if "import" not in block)]),
        names,
    )
    envs, after = names["envs"], names["info"]
    assert names["done"].tolist() == [False, False, True] + [False] * 5 and after["init_state_id"].shape == (
        8,
    )
    assert envs.unwrapped.steps.tolist() == [1, 1, 0] + [1] * 5
    _, reward, *_ = envs.step(envs.action_space.sample())
    assert ((reward < 0) & (reward > -2)).all()
    envs.close()


# ---- Stable-Baselines3 -------------------------------------------------------------------------------


@pytest.fixture
def sb3():
    """``stable_baselines3``, on one thread of PyTorch: more wait for each other where cores are shared."""
    library = pytest.importorskip("stable_baselines3")
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield library
    torch.set_num_threads(threads)


@pytest.mark.parametrize("arguments", [{}, {"action_chunk": 2, "wrist_camera": True}])
def test_stable_baselines3s_checker(sb3, make, arguments):
    from stable_baselines3.common.env_checker import check_env

    env = make(image_size=64, render_mode="rgb_array", **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
        check_env(env.unwrapped)


def test_stable_baselines3s_ppo(sb3, make):
    """It learns from pictures and state, sees the episodes as they were, and plays."""
    env = make(image_size=64, max_episode_steps=20, reward="multi_stage")
    ppo = sb3.PPO("MultiInputPolicy", env, n_steps=64, batch_size=32, n_epochs=1, seed=0, device="cpu")
    before = {name: weight.clone() for name, weight in ppo.policy.state_dict().items()}
    ppo.learn(256)
    after = ppo.policy.state_dict()
    assert all(weight.isfinite().all() for weight in after.values())
    learnt = [name for name in before if not after[name].equal(before[name])]
    assert any("extractors.image" in name for name in learnt) and any("action_net" in name for name in learnt)
    assert [episode["l"] for episode in ppo.ep_info_buffer] == [20] * 12
    action, _ = ppo.predict(env.reset(seed=0)[0])
    assert action in env.action_space


def test_stable_baselines3_in_processes(sb3):
    """The module before the id, so that every process registers it."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import SubprocVecEnv

    arguments = {"task_id": 4, "image_size": 16, "max_episode_steps": 2}
    envs = make_vec_env(f"vla_envs:{ENV_ID}", 2, seed=3, vec_env_cls=SubprocVecEnv, env_kwargs=arguments)
    obs = envs.reset()
    for i in range(2):
        single = LiberoEnv(**arguments)
        expected = single.reset(seed=3 + i)[0]
        single.close()
        assert all(np.array_equal(obs[name][i], expected[name]) for name in expected)
    assert [envs.step(np.zeros((2, 7)))[2].tolist() for _ in range(2)] == [[False] * 2, [True] * 2]
    envs.close()


@pytest.mark.parametrize("reset", [False, True])
def test_stable_baselines3_takes_an_environment_to_a_process(sb3, make, reset):
    """The environment itself goes through a pickle, which makes it anew where it arrives."""
    from stable_baselines3.common.vec_env import SubprocVecEnv

    env = make(max_episode_steps=2)
    expected = env.reset(seed=3)[0] if reset else None
    envs = SubprocVecEnv([lambda: env])
    envs.seed(3)
    obs = envs.reset()
    if expected is None:
        expected = env.reset(seed=3)[0]
    assert all(np.array_equal(obs[name][0], expected[name]) for name in expected)
    later = env.step(np.ones(7))[0]
    obs = envs.step(np.ones((1, 7)))[0]
    assert all(np.array_equal(obs[name][0], later[name]) for name in later)
    envs.close()


# ---- TorchRL -----------------------------------------------------------------------------------------


@pytest.fixture
def torchrl():
    """``torchrl.envs``; its import changes how processes start, which is undone."""
    method = multiprocessing.get_start_method(allow_none=True)
    pytest.importorskip("torchrl")
    import torchrl.envs

    yield torchrl.envs
    multiprocessing.set_start_method(method, force=True)


def test_torchrls_gym_env(torchrl):
    env = torchrl.GymEnv(ENV_ID, task_id=4, image_size=64, max_episode_steps=5)
    torchrl.check_env_specs(env)
    steps = env.rollout(10)
    assert steps["next", "truncated"].flatten().tolist() == [False] * 4 + [True]
    assert steps["image"].shape == (5, 64, 64, 3) and steps["observation"].shape == (5, 8)
    env.close()


def same_observation(theirs, obs):
    np.testing.assert_array_equal(theirs["image"], obs["image"])
    np.testing.assert_array_equal(theirs["observation"], obs["state"])


@pytest.mark.parametrize("vector", [False, True])
def test_torchrls_gym_wrapper(torchrl, make, make_vec, drop, vector):
    """Its rollout is a loop's, to the bit, resets of the finished environments included."""
    make = make_vec if vector else make
    mine, twin = (make(max_episode_steps=4, reward="multi_stage") for _ in range(2))
    env = torchrl.GymWrapper(mine)
    torchrl.check_env_specs(env)
    assert env.batch_size == ((2,) if vector else ())
    calls = itertools.count()

    def policy(tensordict):
        if next(calls) == 1:
            drop(mine, int(vector))  # success on the second step
        return env.rand_action(tensordict)

    env.set_seed(3)
    steps = env.rollout(10, policy, break_when_any_done=False)
    twin.reset(seed=3)
    obs, _ = twin.reset()
    finished = 0
    for k, step in enumerate(steps.unbind(-1)):
        same_observation(step, obs)
        if k == 1:
            drop(twin, int(vector))
        obs, *rest, _ = twin.step(step["action"].numpy())
        same_observation(step["next"], obs)
        for name, expected in zip(("reward", "terminated", "truncated"), rest):
            np.testing.assert_array_equal(step["next", name].squeeze(-1), expected)
        done = np.logical_or(*rest[1:])
        finished += done.sum()
        if done.any():
            obs, _ = twin.reset(options={"reset_mask": done} if vector else None)
    assert finished == (5 if vector else 3)


def test_the_readmes_lines_one_after_another(sb3, torchrl):
    """As somebody types them who reads from top to bottom."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(block, names)
    assert names["model"].num_timesteps == 256
    steps = names["steps"]
    assert steps.shape == (8, 16) and steps["image"].shape == (8, 16, 128, 128, 3)
    assert (steps["next", "reward"] == -steps["next", "gripper_to_object"].float().unsqueeze(-1)).all()
    for name in ("env", "envs"):
        names[name].close()


# ---- Gymnasium's vector wrappers ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_episode_statistics(make_vec, drop, mode):
    """Returns and lengths are those counted by hand; episodes end by success and by the limit."""
    envs = make_vec(2, max_episode_steps=4, reward="multi_stage", autoreset_mode=mode)
    envs = RecordEpisodeStatistics(envs)
    envs.reset(seed=0)
    returns, lengths, restarts = np.zeros(2), np.zeros(2, int), np.zeros(2, bool)
    episodes = []
    for k in range(12):
        if k in (1, 8):
            drop(envs, 1)
        actions = np.random.default_rng(k).uniform(-1, 1, (2, 7))
        _, reward, terminated, truncated, info = envs.step(actions)
        assert not reward[restarts].any()
        returns, lengths = returns + reward, lengths + ~restarts
        done = terminated | truncated
        restarts = done & (mode == AutoresetMode.NEXT_STEP)
        if not done.any():
            assert "episode" not in info
            continue
        assert info["_episode"].tolist() == done.tolist()
        np.testing.assert_allclose(info["episode"]["r"], np.where(done, returns, 0), rtol=1e-6)
        assert info["episode"]["l"].tolist() == np.where(done, lengths, 0).tolist()
        episodes += zip(returns[done], lengths[done])
        returns[done], lengths[done] = 0, 0
        if mode == AutoresetMode.DISABLED:
            envs.reset(options={"reset_mask": done})
    assert {length for _, length in episodes} >= {2, 4} and len(episodes) >= 5
    np.testing.assert_allclose(envs.return_queue, [total for total, _ in episodes], rtol=1e-6)
    assert list(envs.length_queue) == [length for _, length in episodes]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_episode_statistics_of_those_that_wait(make_vec, drop, mode):
    """As the README says: one that waits for its reset counts at every step, and none does in other modes."""
    envs = RecordEpisodeStatistics(make_vec(2, max_episode_steps=3, autoreset_mode=mode))
    envs.reset(seed=0)
    drop(envs, 1)
    for _ in range(3):
        envs.step(np.zeros((2, 7)))
    waits = mode == AutoresetMode.DISABLED
    assert list(envs.length_queue) == ([1, 0, 3, 0] if waits else [1, 3])


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.filterwarnings("ignore:.*autoreset mode is same-step")
def test_video(make_vec, mode, tmp_path):
    """Two episodes of three steps, both environments side by side at the environment's speed."""
    pytest.importorskip("moviepy")  # not in the extra `dev`: it wants an old pillow
    from gymnasium.wrappers.vector import RecordVideo

    envs = make_vec(2, max_episode_steps=3, render_mode="rgb_array", autoreset_mode=mode)
    envs = RecordVideo(envs, str(tmp_path / "videos"), episode_trigger=lambda episode: episode < 2)
    envs.reset(seed=0)
    first = np.concatenate(envs.render(), axis=1)
    for _ in range(2):
        for _ in range(3):
            _, _, _, truncated, _ = envs.step(np.ones((2, 7)))
        assert truncated.all()
        if mode == AutoresetMode.DISABLED:
            envs.reset(options={"reset_mask": truncated})
        elif mode == AutoresetMode.NEXT_STEP:
            envs.step(np.ones((2, 7)))
    envs.close()
    paths = sorted((tmp_path / "videos").iterdir())
    assert [path.name for path in paths] == ["rl-video-episode-0.mp4", "rl-video-episode-1.mp4"]
    # In the mode SAME_STEP Gymnasium leaves an episode's last picture out.
    frames = 3 if mode == AutoresetMode.SAME_STEP else 4
    for path in paths:
        assert iio.imread(path).shape == (frames, 256, 512, 3)
        assert iio.immeta(path)["fps"] == 20
    assert np.abs(iio.imread(paths[0])[0].astype(int) - first).mean() < 5
