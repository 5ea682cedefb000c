"""Other people's code on our environments; a library that is not installed is skipped."""

import functools
import importlib
import itertools
import multiprocessing
import re
import sys
import warnings

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest
from artifacts import ROOT
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from vla_envs import FactsReward, LiberoEnv

ENV_ID = "vla_envs/LiberoObject-v0"


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


@pytest.mark.parametrize("arguments", [{}, {"action_chunk": 2, "wrist_camera": True}])
def test_sb3_vec_env(sb3, make_vec, drop, arguments):
    """It equals Stable-Baselines3's own of single environments, and its ends are those of the bare one."""
    from stable_baselines3.common.vec_env import DummyVecEnv

    from vla_envs.sb3 import SB3VecEnv

    arguments = {"max_episode_steps": 4, "reward": "multi_stage"} | arguments
    bare, mine = make_vec(2, **arguments), SB3VecEnv(make_vec(2, **arguments))
    theirs = DummyVecEnv([lambda: LiberoEnv(task_id=4, image_size=16, **arguments)] * 2)
    bare.reset(seed=5)
    assert mine.seed(5) == theirs.seed(5) == [5, 6]
    np.testing.assert_equal(mine.reset(), theirs.reset())
    rng, ends = np.random.default_rng(0), []
    for k in range(6):
        if k == 1:
            for envs, index in ((bare, 1), (mine.envs, 1), (theirs.envs[1], 0)):
                drop(envs, index)  # success
        actions = rng.uniform(-1, 1, (2, *mine.action_space.shape)).astype(np.float32)
        step = mine.step(actions)
        np.testing.assert_equal(step, theirs.step(actions))
        assert [array.dtype for array in step[1:3]] == [np.float32, bool]
        np.testing.assert_equal(mine.reset_infos, theirs.reset_infos)
        obs, _, terminated, truncated, _ = bare.step(actions)
        assert step[2].tolist() == (terminated | truncated).tolist()
        for i in np.flatnonzero(step[2]):
            last = {name: array[i] for name, array in obs.items()}
            np.testing.assert_equal(step[3][i]["terminal_observation"], last)
            assert step[3][i]["TimeLimit.truncated"] == truncated[i]
            ends.append((i, terminated[i]))
        bare.reset(options={"reset_mask": step[2]})
    assert (1, True) in ends and (0, False) in ends and len(ends) > 2
    theirs.close()
    mine.close()
    assert mine.envs.closed


@pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped")
def test_sb3_vec_env_trains(sb3, make_vec):
    """PPO learns from images, state and chunks, sees the episodes as they were, and is evaluated."""
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecCheckNan, VecMonitor

    from vla_envs.sb3 import SB3VecEnv

    bare = SB3VecEnv(make_vec(2, image_size=64, max_episode_steps=20, reward="multi_stage", action_chunk=4))
    envs = VecCheckNan(VecMonitor(bare), raise_exception=True)
    ppo = sb3.PPO("MultiInputPolicy", envs, n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu")
    before = {name: weight.clone() for name, weight in ppo.policy.state_dict().items()}
    ppo.learn(64)
    after = ppo.policy.state_dict()
    assert all(weight.isfinite().all() for weight in after.values())
    learnt = [name for name in before if not after[name].equal(before[name])]
    assert any("extractors.image" in name for name in learnt) and any("action_net" in name for name in learnt)
    assert [episode["l"] for episode in ppo.ep_info_buffer] == [5] * 12  # of 4 control steps each
    assert evaluate_policy(ppo, bare, n_eval_episodes=2, return_episode_rewards=True)[1] == [5, 5]


def test_sb3_vec_envs_attributes(sb3, make_vec):
    from stable_baselines3.common.monitor import Monitor

    from vla_envs.sb3 import SB3VecEnv

    envs = SB3VecEnv(make_vec(2, render_mode="rgb_array", reward="multi_stage"))
    assert envs.render_mode == "rgb_array" and envs.render().shape == (512, 256, 3)
    assert envs.get_attr("instructions", 1) == [envs.envs.instructions]
    assert envs.has_attr("frozen") and not envs.has_attr("no_such_thing")
    assert envs.env_is_wrapped(Monitor) == [False, False]
    assert envs.env_method("set_reward", "binary") == [None, None]
    envs.set_options([{"init_state_id": 3}, {"init_state_id": 4}])
    obs = envs.reset()
    np.testing.assert_equal(obs, envs.envs.reset(options={"init_state_id": [3, 4]})[0])
    assert [info["init_state_id"] for info in envs.reset_infos] == [3, 4]
    assert envs.step(np.zeros((2, 7)))[1].tolist() == [0, 0]  # the other reward is negative before success
    envs.reset()  # options are for one reset
    assert [info["init_state_id"] for info in envs.reset_infos] == [-1, -1]
    envs.set_attr("max_episode_steps", 1)
    assert envs.get_attr("max_episode_steps") == [1, 1] and envs.step(np.zeros((2, 7)))[2].all()
    with pytest.raises(ValueError, match=r"indices are \[0\]; expected None"):
        envs.env_method("set_reward", "binary", indices=[0])
    with pytest.raises(ValueError, match="indices are 1; expected None"):
        envs.set_attr("max_episode_steps", 2, 1)
    envs.set_options([{"init_state_id": 3}, {}])
    with pytest.raises(ValueError, match="expected the same keys for every environment"):
        envs.reset()


def test_sb3_vec_env_around_a_wrapper(sb3, make_vec, drop):
    """What a wrapper says of some environments reaches those alone."""
    from vla_envs.sb3 import SB3VecEnv

    envs = SB3VecEnv(RecordEpisodeStatistics(make_vec(2)))
    envs.reset()
    drop(envs.envs, 1)
    infos = envs.step(np.zeros((2, 7)))[3]
    assert "episode" not in infos[0] and infos[1]["episode"]["l"] == 1


def test_sb3_vec_envs_mistakes(sb3, make, make_vec, monkeypatch):
    from vla_envs.sb3 import SB3VecEnv

    with pytest.raises(ValueError, match=r"expected a vector environment, from gymnasium.make_vec"):
        SB3VecEnv(make())
    with pytest.raises(ValueError, match="SAME_STEP; expected 'Disabled', because"):
        SB3VecEnv(make_vec(autoreset_mode="SameStep"))
    monkeypatch.delitem(sys.modules, "vla_envs.sb3")
    monkeypatch.setitem(sys.modules, "stable_baselines3.common.vec_env.base_vec_env", None)
    with pytest.raises(ModuleNotFoundError, match="install it with: pip install stable-baselines3"):
        importlib.import_module("vla_envs.sb3")


@pytest.mark.slow
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


def test_torchrl_reads_facts(torchrl, make_vec):
    """The line of docs/learners.md; a reward on facts shows that they are those of the same step."""
    envs = FactsReward(make_vec(2), lambda facts: -facts["gripper_to_object"])
    env = torchrl.GymWrapper(envs)
    page = (ROOT / "docs" / "learners.md").read_text()
    (line,) = re.findall(r"`(env\.set_info_dict_reader\(.*?)`", page)
    exec(line, {"env": env})
    steps = env.rollout(4, break_when_any_done=False)["next"]
    assert (steps["reward"] == -steps["gripper_to_object"].float().unsqueeze(-1)).all()


# ---- docs/learners.md --------------------------------------------------------------------------------

LEARNERS = {
    "A PPO in one file": "torch",
    "Stable-Baselines3": "stable_baselines3",
    "TorchRL": "torchrl",
    "skrl": "skrl",
    "Tianshou": "tianshou",
}


def blocks():
    """The page's Python, by section."""
    page = (ROOT / "docs" / "learners.md").read_text()
    found = {}
    for section in page.split("\n## ")[1:]:
        code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        assert len(code) == 1, section.splitlines()[0]
        found[section.splitlines()[0]] = code[0]
    return found


def test_every_learner_is_run():
    assert [*blocks()] == ["The network", *LEARNERS]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of libraries' own calls
@pytest.mark.parametrize("section", LEARNERS)
def test_learner(section, monkeypatch, tmp_path):
    """A block of the page trains, and no step went to an environment that waits for its reset."""
    pytest.importorskip(LEARNERS[section])
    import torch

    monkeypatch.chdir(tmp_path)  # where skrl writes its logs
    method, threads = multiprocessing.get_start_method(allow_none=True), torch.get_num_threads()
    validates = torch.distributions.Distribution._validate_args
    torch.set_num_threads(1)
    small = {"max_episode_steps": 5, "num_threads": 1}
    monkeypatch.setattr(gym, "make_vec", functools.partial(gym.make_vec, **small))
    code = blocks()
    assert code[section].count("8, 16, 256\n") == 1
    names: dict = {}
    try:
        exec(code["The network"], names)
        exec(code[section].replace("8, 16, 256\n", "2, 8, 32\n"), names)
        envs, agent = names["envs"], names["agent"]
        assert (
            sum(envs.get_attr("stages")[0].values() if "SB3" in code[section] else envs.stages.values()) == 32
        )
        assert envs.num_envs == 2
        modules = [agent] if isinstance(agent, torch.nn.Module) else [agent.policy]
        gradients = [weight.grad for module in modules for weight in module.parameters()]
        convolutions = [gradient for gradient in gradients if gradient is not None and gradient.ndim == 4]
        assert convolutions and all(g.isfinite().all() and g.any() for g in convolutions)
        envs.close()
    finally:  # TorchRL changes how processes start, skrl what distributions validate
        multiprocessing.set_start_method(method, force=True)
        torch.distributions.Distribution.set_default_validate_args(validates)
        torch.set_num_threads(threads)


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
