"""All of LIBERO's suites held to LIBERO: the same state and actions give the same joints and predicates.

The default run takes a few tasks a suite, ``pytest -m slow tests/test_suites.py`` all 130.
"""

import numpy as np
import pytest
from beside_libero import assert_motion_is_liberos, assert_predicates_are_liberos, predicates
from scipy.stats import ks_2samp

from vla_envs.goals import predicates_met
from vla_envs.scene import load_scene
from vla_envs.tasks import SUITES, get_task, num_tasks, recorded_init_states
from vla_envs.vector import LiberoVectorEnv

FEW = {
    "LiberoSpatial": (4,),  # a bowl in a drawer
    "LiberoGoal": (0, 7),  # Open, TurnOn
    "Libero10": (3,),  # a drawer to close
    "Libero90": (40,),
}
ONE = {suite: ids[:1] for suite, ids in FEW.items()}
ALL = [(suite, k) for suite in SUITES for k in range(num_tasks(suite))]


def tasks(default):
    """All 130, of which those in ``default`` are not slow."""
    return [
        pytest.param(task, marks=[] if task[1] in default.get(task[0], ()) else [pytest.mark.slow])
        for task in ALL
    ]


@pytest.fixture(scope="module")
def twins(request, libero):
    """Of a suite and task id: LIBERO's own environment and the scene of ours.

    It takes seconds to build, so the tests of a task, which pytest runs one after the other, share it.
    """
    from libero.libero.envs.env_wrapper import ControlEnv

    bddl_file = str(get_task(*request.param).bddl_file)
    env = ControlEnv(bddl_file_name=bddl_file, use_camera_obs=False, has_offscreen_renderer=False)
    env.env.reset()
    yield env, load_scene(*request.param)
    env.close()


@pytest.mark.parametrize("twins", tasks(FEW), ids=str, indirect=True)
def test_parity(twins):
    """Settling, then free motion."""
    env, scene = twins
    suite, task_id = scene.task.suite, scene.task.task_id
    state_id = 7 * task_id % 50
    envs = LiberoVectorEnv(1, suite, task_id, image_size=16, num_threads=1)
    envs.reset(options={"init_state_id": state_id})
    assert_motion_is_liberos(env, envs, recorded_init_states(scene.task)[state_id], task_id)
    assert predicates(env) == predicates_met(scene.goal, envs.simulations[0].data).tolist()
    envs.close()


@pytest.mark.parametrize("twins", tasks(FEW), ids=str, indirect=True)
def test_predicates(twins):
    """The same states, given to LIBERO's predicates and to ours; each predicate is both true and false."""
    assert_predicates_are_liberos(*twins)


def placed_by_libero(env, scene):
    """What LIBERO's samplers draw at a reset: pose by body, position by joint's address."""
    inner, model = env.env, scene.model
    for body in np.flatnonzero(model.body_mocapid >= 0):  # a reset builds the model anew
        theirs = env.sim.model.body_name2id(model.body(body).name)
        env.sim.model.body_pos[theirs], env.sim.model.body_quat[theirs] = (
            model.body_pos[body],
            model.body_quat[body],
        )
    joints = {}
    for sampler in inner.object_property_initializers:
        value = sampler.sample()
        inner.object_states_dict[sampler.name].set_joint(value)
        (name,) = inner.get_object(sampler.name).joints
        joints[int(model.joint(name).qposadr[0])] = value
    env.sim.forward()
    placements = inner.placement_initializer.sample()
    placements = inner.conditional_placement_initializer.sample(env.sim, placements)
    placements = inner.conditional_placement_on_objects_initializer.sample(placements)
    poses = {thing.root_body: np.concatenate(pose) for *pose, thing in placements.values()}
    return {model.body(name).id: pose for name, pose in poses.items()}, joints


@pytest.mark.parametrize("twins", tasks(ONE), ids=str, indirect=True)
def test_placements(twins):
    """Poses of objects and fixtures and positions of drawers, beside LIBERO's own: the same distributions."""
    env, scene = twins
    env.env.reset()
    model, rng, count = scene.model, np.random.default_rng(1), 150
    np.random.seed(1)  # noqa: NPY002  (what LIBERO places objects with)
    ours = np.array([scene.sample_init_state(rng) for _ in range(count)])
    poses, joints = zip(*[placed_by_libero(env, scene) for _ in range(count)])
    assert set(poses[0]) == {item.body for item in scene.placements}
    starts = {
        body: model.nq + 7 * model.body_mocapid[body]
        if model.body_mocapid[body] >= 0
        else model.jnt_qposadr[model.body_jntadr[body]]
        for body in poses[0]
    }
    columns = [
        (start + k, [pose[body][k] for pose in poses]) for body, start in starts.items() for k in range(7)
    ]
    columns += [(address, [drawn[address] for drawn in joints]) for address in joints[0]]
    for column, theirs in columns:
        pvalue = ks_2samp(np.round(ours[:, column], 9), np.round(theirs, 9)).pvalue
        assert pvalue > 1e-5, (column, ours[:3, column], theirs[:3])


@pytest.mark.parametrize("task", tasks(ONE), ids=str)
def test_resets(task):
    """A group shares the whole scene, fixtures included, to the pixel; each recorded state comes to rest."""
    envs = LiberoVectorEnv(4, *task, image_size=64, wrist_camera=True)
    obs, _ = envs.reset(seed=[5, 5, 6, 5])
    for array in obs.values():
        assert np.array_equal(array[0], array[1]) and np.array_equal(array[0], array[3])
        assert not np.array_equal(array[0], array[2])
    fixtures = [simulation.data.mocap_pos.copy() for simulation in envs.simulations]
    assert np.array_equal(fixtures[0], fixtures[3])
    assert len(fixtures[0]) == 0 or not np.array_equal(fixtures[0], fixtures[2])
    goal = envs.simulations[0].scene.goal
    for first in range(0, 50, 4):
        obs, info = envs.reset(options={"init_state_id": [min(first + k, 49) for k in range(4)]})
        assert not info["success"].any() and (info["facts"]["goals"] == len(goal.kind)).all()
        assert obs["image"].std(axis=(1, 2, 3)).min() > 10
        speed = max(np.abs(simulation.data.qvel).max() for simulation in envs.simulations)
        assert speed < 5, first
    _, _, terminated, _, _ = envs.step(np.zeros((4, 7)))
    assert not terminated.any()
    envs.close()
