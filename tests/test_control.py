"""The compiled control step beside a slow one, written from OSC_POSE's equations with MuJoCo's Python API."""

import ast
import importlib.util
import pkgutil
from pathlib import Path

import mujoco
import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher
from scipy.spatial.transform import Rotation

import vla_envs
from vla_envs import LiberoVectorEnv
from vla_envs.control import ControllerMemory, Views, execute_chunk, require_compiled
from vla_envs.scene import load_scene


def slow_control_step(model, data, action, goal_rotation, home, gripper):
    """One control step of 25 substeps; returns the unclipped arm torques of each, and the goal rotation.

    force = Lambda (kp error - kd velocity), for position and orientation apart, with
    Lambda = (J M^-1 J^T)^+; torque = J^T force + bias + N^T M (kp (home - q) - kd qd), with
    N = I - M^-1 J^T (J M^-1 J^T)^+ J. The gains are those of robosuite's osc_pose.json.
    """
    site, torques = model.site("gripper0_grip_site").id, []
    kp, null_kp = 150.0, 10.0
    kd, null_kd = 2 * np.sqrt(kp), 2 * np.sqrt(null_kp)
    for substep in range(25):
        mujoco.mj_step1(model, data)
        position, rotation = data.site_xpos[site].copy(), data.site_xmat[site].reshape(3, 3).copy()
        if substep == 0:
            goal_position = position + 0.05 * action[:3]
            if action[3:6].any():
                goal_rotation = Rotation.from_rotvec(0.5 * action[3:6]).as_matrix() @ rotation
        jacobian, mass = np.zeros((6, model.nv)), np.zeros((model.nv, model.nv))
        mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], site)
        mujoco.mj_fullM(model, mass, data.qM)
        jacobian, mass = jacobian[:, :7], mass[:7, :7]
        q, qd = data.qpos[:7], data.qvel[:7]
        turn = sum(np.cross(rotation[:, k], goal_rotation[:, k]) for k in range(3)) / 2
        velocity, inverse = jacobian @ qd, np.linalg.inv(mass)
        force = np.concatenate([
            np.linalg.pinv(jacobian[rows] @ inverse @ jacobian[rows].T) @ (kp * error - kd * velocity[rows])
            for rows, error in ((slice(0, 3), goal_position - position), (slice(3, 6), turn))
        ])  # fmt: skip
        inertia = np.linalg.pinv(jacobian @ inverse @ jacobian.T)
        null = np.eye(7) - inverse @ jacobian.T @ inertia @ jacobian
        torque = jacobian.T @ force + data.qfrc_bias[:7]
        torque += null.T @ mass @ (null_kp * (home - q) - null_kd * qd)
        torques.append(torque)
        low, high = model.actuator_ctrlrange.T
        gripper = np.clip(gripper + 0.01 * np.sign(action[6]) * np.array([-1, 1]), -1, 1)
        data.ctrl[:7] = np.clip(torque, low[:7], high[:7])
        data.ctrl[7:] = (low + high)[7:] / 2 + (high - low)[7:] / 2 * gripper
        mujoco.mj_step2(model, data)
    return np.array(torques), goal_rotation


@pytest.fixture(scope="module")
def scene():
    return load_scene("LiberoObject", 4)


def random_state(scene, rng):
    """Two equal ``MjData`` with the arm somewhere above the floor and in motion, and a memory."""
    data = mujoco.MjData(scene.model)
    data.qpos[:] = scene.sample_init_state(rng)
    data.qpos[:7] += rng.uniform(-0.3, 0.3, 7)
    data.qvel[:7] = rng.uniform(-1.0, 1.0, 7)
    twin = mujoco.MjData(scene.model)
    twin.qpos[:], twin.qvel[:] = data.qpos, data.qvel
    control = ControllerMemory.new()
    control.goal_rotation[...] = Rotation.random(random_state=int(rng.integers(1000))).as_matrix()
    control.gripper[:] = rng.uniform(-0.9, 0.9, 2)
    return data, twin, control


def compiled(scene, data, control, actions):
    """``execute_chunk``, somewhere in the middle of an episode."""
    return execute_chunk(
        scene.model._address, data._address, Views.of(data), scene.arm, control, scene.goal, actions, False
    )


@pytest.mark.parametrize(("turning", "tolerance"), [(False, 1e-10), (True, 1e-6)])
def test_control_step_is_that_of_the_equations(scene, turning, tolerance):
    """With a rotation command robosuite, and so we, work in single precision."""
    rng, saturated = np.random.default_rng(0), 0
    for _ in range(12):
        data, twin, control = random_state(scene, rng)
        action = rng.uniform(-1, 1, 7)
        if not turning:
            action[3:6] = 0
        memory = control.copy()
        torques, goal_rotation = slow_control_step(
            scene.model, twin, action, memory.goal_rotation, scene.arm.reset_qpos, memory.gripper
        )
        compiled(scene, data, control, action[None])
        np.testing.assert_allclose(control.goal_rotation, goal_rotation, rtol=0, atol=tolerance)
        np.testing.assert_allclose(data.ctrl, twin.ctrl, rtol=0, atol=1e3 * tolerance)
        np.testing.assert_allclose(data.qpos, twin.qpos, rtol=0, atol=tolerance)
        np.testing.assert_allclose(data.qvel, twin.qvel, rtol=0, atol=1e2 * tolerance)
        limits = scene.model.actuator_ctrlrange[:7]
        saturated += np.any((torques < limits[:, 0]) | (torques > limits[:, 1]))
        assert np.any((torques[-1] > limits[:, 0]) & (torques[-1] < limits[:, 1]))  # not all clipped
    assert saturated  # the clipping was put to the test


def test_actions_out_of_range_are_clipped(scene):
    rng = np.random.default_rng(1)
    data, twin, control = random_state(scene, rng)
    other = control.copy()
    action = np.array([3.0, -np.inf, 0.5, 1.5, -0.2, -7.0, 4.0])
    compiled(scene, data, control, action[None])
    compiled(scene, twin, other, np.clip(action, -1, 1)[None])
    assert np.array_equal(data.qpos, twin.qpos)


def test_a_chunk_is_its_steps_one_by_one(scene):
    rng = np.random.default_rng(2)
    data, twin, control = random_state(scene, rng)
    other, actions = control.copy(), rng.uniform(-1, 1, (6, 7))
    assert compiled(scene, data, control, actions) == (6, False)
    for action in actions:
        assert compiled(scene, twin, other, action[None]) == (1, False)
    assert np.array_equal(data.qpos, twin.qpos) and np.array_equal(data.qvel, twin.qvel)
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(control, other, strict=True))


def test_the_orientation_goal_stays_without_a_rotation_command(scene):
    """A turn commanded once is completed while the commands after it are zero."""
    data, _, control = random_state(scene, np.random.default_rng(3))
    data.qpos[:7], data.qvel[:] = scene.arm.reset_qpos, 0
    mujoco.mj_forward(scene.model, data)
    site = data.site("gripper0_grip_site")
    start = Rotation.from_matrix(site.xmat.reshape(3, 3))
    control.goal_rotation[...] = start.as_matrix()
    wanted = Rotation.from_rotvec([0, 0, 0.5]) * start
    compiled(scene, data, control, np.array([[0, 0, 0, 0, 0, 1.0, 0]]))
    after_one = (Rotation.from_matrix(site.xmat.reshape(3, 3)) * wanted.inv()).magnitude()
    compiled(scene, data, control, np.zeros((20, 7)))
    after_all = (Rotation.from_matrix(site.xmat.reshape(3, 3)) * wanted.inv()).magnitude()
    assert after_one > 0.2 and after_all < 0.05


@pytest.mark.parametrize("size", [1e-40, 1e-170, 1e-300])
def test_a_tiny_rotation_command_is_no_rotation(scene, size):
    data, twin, control = random_state(scene, np.random.default_rng(4))
    mujoco.mj_forward(scene.model, data)
    control.goal_rotation[...] = data.site("gripper0_grip_site").xmat.reshape(3, 3)
    other = control.copy()
    compiled(scene, data, control, np.array([[0.3, 0, 0, size, 0, 0, 0]]))
    compiled(scene, twin, other, np.array([[0.3, 0, 0, 0, 0, 0, 0]]))
    np.testing.assert_allclose(data.qpos, twin.qpos, rtol=0, atol=1e-7)


def test_the_gripper_moves_by_its_speed_and_stops_at_its_limits(scene):
    """0.01 a substep, 25 substeps: 0.25 a control step, within [-1, 1], the fingers apart."""
    data, _, control = random_state(scene, np.random.default_rng(5))
    control.gripper[:] = 0
    closing, opening, holding = (np.array([[0, 0, 0, 0, 0, 0, command]]) for command in (0.3, -1.0, 0.0))
    for action, expected in ((closing, 0.25), (closing, 0.5), (holding, 0.5), (opening, 0.25)):
        compiled(scene, data, control, action)
        np.testing.assert_allclose(control.gripper, [-expected, expected])
    compiled(scene, data, control, np.repeat(closing, 6, axis=0))
    assert control.gripper.tolist() == [-1, 1]
    limits = scene.model.actuator_ctrlrange
    np.testing.assert_allclose(data.ctrl[7:], [limits[7, 0], limits[8, 1]])


def test_peak_is_the_greatest_height_of_the_object(scene, drop):
    data, _, control = random_state(scene, np.random.default_rng(6))
    heights = []
    for _ in range(5):
        compiled(scene, data, control, np.zeros((1, 7)))
        heights.append(data.xpos[scene.goal.subject[0], 2])
        assert control.peak[0] == max(heights)


def test_uncompiled_it_refuses(monkeypatch):
    """As ``NUMBA_DISABLE_JIT=1`` leaves it: MuJoCo's functions would not be called."""
    require_compiled()
    monkeypatch.setattr("vla_envs.control.execute_chunk", execute_chunk.py_func)
    with pytest.raises(RuntimeError, match="NUMBA_DISABLE_JIT is set; expected it unset"):
        LiberoVectorEnv()


def test_compiled_code_calls_none_of_another_file():
    """An edit there would have no effect: numba recompiles a function when its own file has changed."""
    for info in pkgutil.walk_packages(vla_envs.__path__, "vla_envs."):
        text = Path(importlib.util.find_spec(info.name).origin).read_text()
        if "njit" not in text:
            continue
        tree = ast.parse(text)
        imports = [
            node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "vla_envs" in node.module
        ]
        ours = {alias.asname or alias.name for node in imports for alias in node.names}
        module = importlib.import_module(info.name)
        compiled = [each for each in vars(module).values() if isinstance(each, Dispatcher)]
        own = [each.py_func for each in compiled if each.py_func.__module__ == info.name]
        assert own and not ours & {name for function in own for name in function.__code__.co_names}, info.name
