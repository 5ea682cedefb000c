"""Simulations that diverge: real ones, given velocities or positions of no use between two steps."""

import math
from functools import partial

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from doubles import OnesPolicy
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics
from learning import arguments, small_policy
from playing import member, random_actions, same

import grpo_vla
import ppo_vla
import tgrpo_vla
from vla_envs.simulation import MAX_VELOCITY, Simulation
from vla_envs.training import batches, tgrpo_extras


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """MuJoCo writes its warnings to a file where it runs."""
    monkeypatch.chdir(tmp_path)


def ruin(envs, index, velocity=1e12):
    """Give every joint of an environment a velocity of no use."""
    vector = envs.unwrapped
    getattr(vector, "_envs", vector).simulations[index].data.qvel[:] = velocity


BAD_NUMBERS = [math.nan, math.inf, -math.inf, 1e12, -1e12, 1e9, 2e4]


CHUNKS = {"action_chunk": 4, "num_threads": 2}


@pytest.mark.parametrize(
    ("velocity", "settings"), [*((number, {}) for number in BAD_NUMBERS), (math.nan, CHUNKS), (2e4, CHUNKS)]
)
def test_it_ends_its_episode_and_no_other(make_vec, velocity, settings):
    envs, twins = (make_vec(3, reward="multi_stage", wrist_camera=True, **settings) for _ in range(2))
    shape = envs.action_space.shape
    actions = np.random.default_rng(0).uniform(-1, 1, (4, *shape))
    for each in (envs, twins):
        each.reset(seed=0)
        before, _, _, _, facts_before = each.step(actions[0])
    ruin(envs, 1, velocity)
    last = None
    for action in actions[1:]:
        obs, reward, terminated, truncated, info = envs.step(action)
        expected = twins.step(action)
        assert obs in envs.observation_space and same(member(obs, 1), member(before, 1))
        assert same(member(info["facts"], 1), member(facts_before["facts"], 1))
        assert reward[1] == 0 and not terminated.any() and truncated.tolist() == [False, True, False]
        assert info["diverged"].tolist() == [False, True, False] and info["diverged"].dtype == bool
        assert info["reason"][1].startswith("diverged: ") and "joint" in info["reason"][1]
        assert info["reason"][[0, 2]].tolist() == ["", ""]
        for i in (0, 2):  # play on as if nothing had happened
            assert same(member(obs, i), member(expected[0], i)) and reward[i] == expected[1][i]
        qpos = envs.unwrapped.qpos
        assert np.isfinite(qpos).all() and envs.unwrapped.frozen.tolist() == [False, True, False]
        assert last is None or np.array_equal(qpos[1], last)
        last = qpos[1]
    envs.unwrapped.render_mode = "rgb_array"
    assert envs.render()[1].std() > 10


@pytest.mark.parametrize("position", [math.nan, math.inf, 1e12])
def test_positions(make_vec, position):
    envs = make_vec(2)
    envs.reset(seed=0)
    simulation = envs.unwrapped.simulations[0]
    joint = simulation.scene.model.joint("ketchup_1_joint0")
    simulation.data.qpos[joint.qposadr[0] + 1] = position
    _, _, _, truncated, info = envs.step(random_actions(2))
    assert truncated.tolist() == [True, False]
    assert info["reason"][0] == "diverged: position of joint ketchup_1_joint0 is not finite, or above 1e10"


@pytest.mark.parametrize(
    ("joint", "offset", "unit"),
    [
        ("ketchup_1_joint0", 1, "m/s"),
        ("ketchup_1_joint0", 4, "rad/s"),
        ("robot0_joint3", 0, "rad/s"),
        ("gripper0_finger_joint1", 0, "m/s"),
    ],
)
def test_the_reason_names_the_joint_and_its_velocity(make_vec, joint, offset, unit):
    envs = make_vec(1)
    envs.reset(seed=0)
    simulation = envs.unwrapped.simulations[0]
    dof = simulation.scene.model.joint(joint).dofadr[0] + offset
    simulation.data.qvel[dof] = -1.2e9
    assert simulation.divergence() == f"diverged: velocity of joint {joint} is -1.2e+09 {unit}"
    simulation.data.qvel[dof] = MAX_VELOCITY
    assert simulation.divergence() == ""
    simulation.data.qvel[dof] = math.nan
    assert simulation.divergence() == f"diverged: velocity of joint {joint} is nan {unit}"
    simulation.data.qvel[dof] = 0.0
    simulation.data.qpos[0] = math.nan
    assert simulation.divergence() == "diverged: position of joint robot0_joint1 is nan"


@pytest.mark.parametrize("velocity", [math.nan, 1e12, 2e4])
def test_a_reset_makes_it_well(make_vec, velocity):
    envs, twins = make_vec(2), make_vec(2)
    for each in (envs, twins):
        each.reset(seed=[3, 4])
    for _ in range(2):
        ruin(envs, 0, velocity)
        assert envs.step(random_actions(2))[4]["diverged"].tolist() == [True, False]
        twins.step(random_actions(2))
        results = [
            each.reset(seed=[5, None], options={"reset_mask": np.array([True, False])})
            for each in (envs, twins)
        ]
        assert same(*(obs for obs, _ in results)) and same(*(info for _, info in results))
        assert not results[0][1]["diverged"].any() and not envs.unwrapped.frozen.any()
        for action in random_actions(3, 2):
            assert all(map(same, envs.step(action), twins.step(action)))
    assert np.array_equal(envs.unwrapped.qpos, twins.unwrapped.qpos)


def test_a_wandering_success_is_none(make_vec, drop, monkeypatch):
    """MuJoCo goes back to a pose of its own, in which the goal may be met."""
    envs = make_vec(1)
    envs.reset(seed=0)
    monkeypatch.setattr(Simulation, "execute", lambda self, actions: (1, True))
    ruin(envs, 0)
    _, reward, terminated, truncated, info = envs.step(random_actions(1))
    assert (reward[0], terminated[0], truncated[0], info["success"][0]) == (0, False, True, False)


def test_the_single_environment(make):
    env = gym.wrappers.RecordEpisodeStatistics(make(reward="multi_stage"))
    env.reset(seed=0)
    before, first, _, _, info = env.step(random_actions())
    assert info["diverged"] is False and info["reason"] == ""
    ruin(env, 0, math.nan)
    obs, reward, terminated, truncated, info = env.step(random_actions())
    assert same(obs, before) and (reward, terminated, truncated) == (0.0, False, True)
    assert info["diverged"] is True and info["reason"].startswith("diverged: velocity of joint robot0_joint1")
    assert info["episode"]["r"] == pytest.approx(first) and info["episode"]["l"] == 2
    _, info = env.reset(seed=0)
    assert info["diverged"] is False and env.step(random_actions())[3] is False


def test_the_autoreset_mode_next_step(make_vec):
    envs = make_vec(2, autoreset_mode=AutoresetMode.NEXT_STEP)
    envs.reset(seed=0)
    ruin(envs, 0)
    _, _, _, truncated, info = envs.step(random_actions(2))
    assert truncated.tolist() == info["diverged"].tolist() == [True, False]
    obs, reward, _, truncated, info = envs.step(random_actions(2))
    assert not truncated.any() and not info["diverged"].any() and reward[0] == 0
    assert envs.unwrapped.steps.tolist() == [0, 2] and obs in envs.observation_space


def test_the_autoreset_mode_same_step(make_vec):
    envs = make_vec(2, autoreset_mode=AutoresetMode.SAME_STEP)
    before, _ = envs.reset(seed=0)
    ruin(envs, 0)
    obs, _, _, truncated, info = envs.step(random_actions(2))
    assert truncated.tolist() == [True, False] and not info["diverged"].any()
    assert info["final_info"]["diverged"].tolist() == [True, False]
    assert info["final_info"]["reason"][0].startswith("diverged: ")
    assert same(info["final_obs"][0], member(before, 0)) and info["final_obs"][1] is None
    assert np.any(obs["image"][0] != before["image"][0]) and envs.unwrapped.steps.tolist() == [0, 1]


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_gymnasiums_own_vector_environment(make_vec, mode):
    """Of single environments: the same flags and reasons, and Gymnasium's wrappers take them."""
    theirs = gym.make_vec(
        "vla_envs/LiberoObject-v0", num_envs=2, vectorization_mode="sync", task_id=4, image_size=16,
        vector_kwargs={"autoreset_mode": mode},
    )  # fmt: skip
    both = make_vec(2, autoreset_mode=mode), theirs
    wrapped = [DictInfoToList(RecordEpisodeStatistics(envs)) for envs in both]
    for envs in wrapped:
        envs.reset(seed=[3, 4])
    ruin(both[0], 1)
    ruin(theirs.envs[1], 0)
    for action in random_actions(3, 2):
        (*mine, infos), (*others, other_infos) = (envs.step(action) for envs in wrapped)
        assert all(map(same, mine, others))
        for info, other in zip(infos, other_infos, strict=True):
            for each in (info, other):
                each.get("episode", {}).pop("t", None)
            assert same(info, other)
    theirs.close()


def test_only_those_that_moved_are_counted(make_vec):
    envs = make_vec(2)
    envs.reset(seed=0)
    ruin(envs, 0)
    envs.step(random_actions(2))
    assert envs.unwrapped.stages.total() == 1


def test_a_scene_that_cannot_settle(make_vec, monkeypatch):
    """Its episode is over before it has begun; what is seen is the init state itself."""
    envs = make_vec(2)
    execute = Simulation.execute

    def bad_once(self, actions):
        if self is envs.unwrapped.simulations[0]:
            self.data.qvel[:] = math.nan
        return execute(self, actions)

    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "execute", bad_once)
        obs, info = envs.reset(seed=[0, 1])
    assert info["diverged"].tolist() == [True, False] and obs in envs.observation_space
    assert np.isfinite(envs.unwrapped.qpos).all() and obs["image"][0].std() > 10
    assert np.isfinite(obs["state"]).all() and all(np.isfinite(f).all() for f in info["facts"].values())
    _, reward, _, truncated, info = envs.step(random_actions(2))
    assert truncated.tolist() == info["diverged"].tolist() == [True, False] and reward[0] == 0
    assert envs.unwrapped.steps.tolist() == [0, 1]


def test_other_warnings_of_mujoco_are_no_divergence(make_vec):
    envs = make_vec(1)
    envs.reset(seed=0)
    data = envs.unwrapped.simulations[0].data
    data.warning[mujoco.mjtWarning.mjWARN_CONTACTFULL].number = 5
    assert not envs.step(random_actions(1))[4]["diverged"].any()


# ---- In the scripts ----------------------------------------------------------------------------------


class RuinedEnvs:
    """Environments of which some diverge in their step number ``at``."""

    def __init__(self, envs, members, at):
        self.envs, self.members, self.at, self.t, self.seen = envs, members, at, 0, []

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def step(self, actions):
        self.t += 1
        if self.t == self.at:
            for i in self.members:
                ruin(self.envs, i, math.nan)
        result = self.envs.step(actions)
        self.seen.append(result[0])
        return result


def some_envs(make_vec, num_envs, members, at=2):
    return RuinedEnvs(
        make_vec(num_envs, image_size=32, action_chunk=2, max_episode_steps=6, reward="multi_stage"),
        members,
        at,
    )


def test_a_rollout_leaves_the_groups_of_the_diverged_out(make_vec):
    seeds, policy = np.array([7, 7, 8, 8, 9, 9]), small_policy()
    torch.manual_seed(0)
    envs = some_envs(make_vec, 6, [3])
    batch = grpo_vla.rollout(envs, policy, seeds, 1.0)
    assert batch["diverged"].tolist() == [False, False, False, True, False, False]
    assert not batch["alive"][:, 2:4].any() and batch["alive"][:, [0, 1, 4, 5]].all()
    assert batch["rewards"][:, 2:4].eq(0).all() and batch["rewards"][:, [0, 1, 4, 5]].ne(0).all()
    assert len(batch["alive"]) == 3 and torch.isfinite(batch["state"]).all()
    totals = batches.totals([batch])
    assert (totals["episodes"], totals["diverged"], totals["control_steps"]) == (4, 1, 24)
    assert all(obs in envs.observation_space for obs in envs.seen)


def test_others_learn_as_if_the_group_had_not_been_there(make_vec):
    """Advantages and samples of the remaining groups, to the bit."""
    seeds, policy = np.array([7, 7, 8, 8, 9, 9]), OnesPolicy()
    ruined = tgrpo_vla.rollout(some_envs(make_vec, 6, [3]), policy, seeds, 1.0)
    whole = tgrpo_vla.rollout(some_envs(make_vec, 6, []), policy, seeds, 1.0)
    kept = torch.tensor([True, True, False, False, True, True])
    assert not whole["diverged"].any() and whole["alive"].all()
    rewards = (whole["rewards"] + torch.rand(whole["rewards"].shape)) * whole["alive"]

    def by_stage(*given):
        return tgrpo_extras.by_stage(tgrpo_vla.step_advantages, *given)

    modes = ("held", "sum", "mean")
    trajectory = [partial(tgrpo_vla.trajectory_advantages, return_mode=mode) for mode in modes]
    for function in (partial(tgrpo_vla.tgrpo_advantages, alpha1=0.3, alpha2=0.7), by_stage, *trajectory):
        expected, given = (
            function(its, of["alive"], 2) for its, of in ((rewards, whole), (rewards * kept, ruined))
        )
        assert torch.equal(given[..., kept], expected[..., kept]) and given[..., ~kept].eq(0).all()
        assert expected[..., ~kept].ne(0).any()
    assert grpo_vla.group_advantages(ruined["rewards"].sum(dim=0), 2)[~kept].eq(0).all()


@pytest.mark.parametrize("script", [grpo_vla, tgrpo_vla, ppo_vla])
def test_an_update_after_a_divergence(make_vec, script):
    policy = small_policy()
    args = arguments(script, group_size=2)
    batch = script.rollout(some_envs(make_vec, 4, [0]), policy, np.array([7, 7, 8, 8]), 1.0)
    if script is ppo_vla:
        b = script.samples_of(policy, script.make_critic(policy), batch, args)
    else:
        b = script.samples_of(policy, batch, torch.ones(batch["alive"].shape), args)
    counted = batches.minibatches(b, arguments(script, update_epochs=1))[0]
    assert set(b["who"][counted].tolist()) == {2, 3} and len(counted) == 6
    for name in ("advantages", "weights", "old_logprobs"):
        assert torch.isfinite(b[name][counted]).all()


def test_dynamic_sampling_plays_another_group(make_vec):
    """A group left out has equal returns, so it is not kept."""
    args = grpo_vla.Args(num_groups=2, group_size=2, max_rounds=1, keep_low=0.0, keep_high=1.0)
    envs = some_envs(make_vec, 4, [2])
    batch, rollouts = grpo_vla.collect(envs, small_policy(), 1, args)
    totals = batches.totals(rollouts)
    assert batch["kept"].shape == (2,) and not batch["kept"][1] and batch["zero_std"][1]
    assert totals["diverged"] == 1 and totals["episodes"] == 2


def test_nothing_left_is_an_error(make_vec):
    policy = small_policy()
    batch = ppo_vla.rollout(some_envs(make_vec, 2, [0, 1], at=1), policy, np.array([7, 8]), 1.0)
    other = ppo_vla.rollout(some_envs(make_vec, 2, [1], at=1), policy, np.array([7, 8]), 1.0)
    assert not batch["alive"].any() and batches.totals([batch, other])["diverged"] == 3
    with pytest.raises(FloatingPointError, match="2 of 2 episodes diverged"):
        batches.totals([batch])


@pytest.mark.parametrize("script", [grpo_vla, tgrpo_vla, ppo_vla])
def test_a_process_without_samples(make_vec, script, monkeypatch):
    """All groups of one of several processes have diverged; the others go on, and so it has to."""
    other = lambda tensor: torch.cat([tensor, tensor.new_ones(1, *tensor.shape[1:])])  # noqa: E731
    monkeypatch.setattr(script.distributed, "gather", other)  # of a process with one sample
    policy = small_policy()
    args = arguments(script, group_size=2)
    batch = script.rollout(some_envs(make_vec, 2, [0, 1]), policy, np.array([7, 7]), 1.0)
    if script is ppo_vla:
        b = script.samples_of(policy, script.make_critic(policy), batch, args)
    else:
        b = script.samples_of(policy, batch, torch.ones(batch["alive"].shape), args)
    assert not b["alive"].any() and b["measured"]["logprob_gap"] == 0
