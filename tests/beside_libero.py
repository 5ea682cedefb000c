"""LIBERO's own environment and ours, in the same states and under the same actions."""

import mujoco
import numpy as np

from vla_envs.goals import JOINT, ON_OBJECT, UP, predicates_met
from vla_envs.simulation import Simulation

STILL = [0, 0, 0, 0, 0, 0, -1.0]


def put_fixtures(env, model, data):
    """Stand the fixtures of LIBERO's environment where ours stand."""
    for body in np.flatnonzero(model.body_mocapid >= 0):
        theirs = env.sim.model.body_name2id(model.body(body).name)
        env.sim.model.body_pos[theirs] = data.mocap_pos[model.body_mocapid[body]]
        env.sim.model.body_quat[theirs] = data.mocap_quat[model.body_mocapid[body]]


def predicates(env):
    """LIBERO's answers, in our order: what is to be opened first, what is to be closed last."""
    words = env.env.parsed_problem["goal_state"]
    order = [w for w in words if w[0] == "open"] + [w for w in words if w[0] not in ("open", "close")]
    return [bool(env.env._eval_predicate(w)) for w in order + [w for w in words if w[0] == "close"]]


def shuffle(scene, data, rng):
    """Move what the goal is about to somewhere around its goal; each predicate comes out both ways."""
    model, goal = scene.model, scene.goal
    mujoco.mj_kinematics(model, data)
    for k in rng.permutation(len(goal.kind)):
        if goal.kind[k] == JOINT:
            data.qpos[goal.target[k]] = goal.parameters[k, 0] + rng.uniform(-0.05, 0.05)
        elif goal.kind[k] == UP:
            start = model.jnt_qposadr[model.body_jntadr[goal.subject[k]]]
            data.qpos[start + 2] = goal.parameters[k, 0] + rng.uniform(-0.05, 0.05)
        else:
            on_object = goal.kind[k] == ON_OBJECT
            centre = (data.xpos if on_object else data.site_xpos)[goal.target[k]]
            size = [0.02, 0.02, 0.05] if on_object else np.minimum(goal.parameters[k], 0.08)
            start = model.jnt_qposadr[model.body_jntadr[goal.subject[k]]]
            data.qpos[start : start + 3] = centre + rng.uniform(-1.3, 1.3, 3) * size
            if goal.contact[k].any():
                data.qpos[start + 2] = centre[2] + rng.uniform(-0.02, 0.12)
        mujoco.mj_kinematics(model, data)
    mujoco.mj_forward(model, data)


def assert_motion_is_liberos(env, envs, state, seed):
    """Settling, then free motion: the arm to 1e-9 after one control step and to 1e-6 after twenty.

    What lies on something else is held looser: robosuite solves a landing's contacts thrice, we once.

    Args:
        env: LIBERO's environment.
        envs: Ours, one, reset to the same state.
        state: Time, joint positions and velocities.
        seed: Of the actions.
    """
    put_fixtures(env, envs.simulations[0].scene.model, envs.simulations[0].data)
    env.set_init_state(state)
    for _ in range(10):
        env.step(STILL)
    actions = np.random.default_rng(seed).uniform(-1, 1, (20, 7))
    actions[:, 2], actions[:, 3:6] = 0.3 * np.abs(actions[:, 2]), 0.3 * actions[:, 3:6]
    gaps = []
    for action in actions:
        env.step(action)
        terminated = envs.step(action[None])[2]
        gap = np.abs(env.sim.data.qpos - envs.qpos[0])
        gaps.append([gap[:9].max(), gap.max()])
        assert terminated[0] == env.check_success()
        if terminated[0]:
            break
    assert gaps[0][0] < 1e-9 and gaps[0][1] < 1e-5
    assert np.max(gaps, axis=0)[0] < 1e-6 and np.max(gaps, axis=0)[1] < 1e-2


def assert_predicates_are_liberos(env, scene):
    """The same states, given to LIBERO's predicates and to ours; each predicate is both true and false."""
    rng, simulation, results = np.random.default_rng(scene.task.task_id), Simulation(scene), []
    data = simulation.data
    for trial in range(150):
        if trial % 30 == 0:
            state = scene.sample_init_state(rng)
        simulation.restore(state)
        shuffle(scene, data, rng)
        put_fixtures(env, scene.model, data)
        env.sim.data.qpos[:] = data.qpos
        env.sim.forward()
        mine = predicates_met(scene.goal, data)
        assert mine.tolist() == predicates(env)
        assert bool(mine.all()) == bool(env.check_success())
        results.append(mine)
    results = np.array(results)
    assert results.any(0).all() and not results.all(0).any()
