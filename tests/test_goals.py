"""The goal beside LIBERO's own predicate, and the facts beside hand-made situations."""

import mujoco
import numpy as np
import pytest

from vla_envs.goals import FACTS, IN_REGION, Goal, in_place
from vla_envs.scene import load_scene
from vla_envs.simulation import Simulation


@pytest.fixture
def in_box(libero):
    """LIBERO's predicate as a function of half sizes, centre and rotation of the box, and a position."""
    from libero.libero.envs.objects.site_object import SiteObject

    def in_box(size, centre, rotation, position):
        return bool(SiteObject("region", size=size).in_box(centre, rotation, position))

    return in_box


def met(size, centre, rotation, position):
    goal = Goal(*(np.array([x]) for x in (IN_REGION, 1, 2, size)), contact=np.zeros((1, 2, 1), bool))
    xpos, site_xpos, site_xmat = np.full((2, 3), 9.0), np.full((3, 3), 9.0), np.full((3, 9), 9.0)
    xpos[1], site_xpos[2], site_xmat[2] = position, centre, np.ravel(rotation)
    return in_place(goal, np.zeros(1), xpos, site_xpos, site_xmat)


def test_goal_is_liberos_on_random_boxes(in_box):
    rng = np.random.default_rng(0)
    results = []
    for _ in range(3000):
        rotation, size = np.linalg.qr(rng.normal(size=(3, 3)))[0], rng.uniform(0.02, 0.1, 3)
        centre, position = rng.normal(size=3), rng.normal(size=3)
        position = centre + rng.uniform(-1.5, 1.5, 3) * np.abs(rotation @ size)
        results.append(met(size, centre, rotation, position))
        assert results[-1] == in_box(size, centre, rotation, position)
    assert 0.1 < np.mean(results) < 0.9


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("side", [-1, 1])
def test_goal_on_the_boundary(in_box, axis, side):
    """A point on the boundary is out, one just inside is in; the floor of the box lies 1 cm deeper."""
    size, centre = np.array([0.125, 0.25, 0.0625]), np.array([0.5, -1.0, 0.25])
    boundary = centre.copy()
    boundary[axis] = centre[axis] + side * size[axis] - (0.01 if (axis, side) == (2, -1) else 0)
    inside, outside = boundary.copy(), boundary.copy()
    inside[axis] = np.nextafter(boundary[axis], centre[axis])
    outside[axis] = np.nextafter(boundary[axis], centre[axis] + side * np.inf)
    for position, expected in ((inside, True), (boundary, False), (outside, False)):
        assert met(size, centre, np.eye(3), position) is expected
        assert in_box(size, centre, np.eye(3), position) is expected


@pytest.mark.parametrize("task_id", [0, 4, 9])
def test_success_is_liberos_in_the_scene(libero_env, task_id):
    """The same joint positions around the basket, given to LIBERO's ``check_success`` and to us."""
    scene, env = load_scene("LiberoObject", task_id), libero_env(task_id)
    rng, data, results = np.random.default_rng(task_id), mujoco.MjData(scene.model), []
    start = scene.model.jnt_qposadr[scene.model.body_jntadr[scene.goal.subject[0]]]
    for _ in range(200):
        data.qpos[:] = scene.sample_init_state(rng)
        mujoco.mj_kinematics(scene.model, data)
        around = rng.uniform(-1.5, 1.5, 3) * scene.goal.parameters[0]
        data.qpos[start : start + 3] = data.site_xpos[scene.goal.target[0]] + around
        mujoco.mj_kinematics(scene.model, data)
        env.sim.data.qpos[:] = data.qpos
        env.sim.forward()
        results.append(in_place(scene.goal, data.qpos, data.xpos, data.site_xpos, data.site_xmat))
        assert results[-1] == env.check_success()
    assert 0.1 < np.mean(results) < 0.9


@pytest.fixture
def simulation():
    """Task 4 (ketchup), settled."""
    scene = load_scene("LiberoObject", 4)
    simulation = Simulation(scene)
    simulation.copy_from(
        simulation.settle(scene.sample_init_state(np.random.default_rng(0)), 10, -1.0), False
    )
    return simulation


def read(simulation, success=False):
    return simulation.facts.read(simulation.origin, simulation.memory.peak, success)


def place(simulation, position):
    """Put the ketchup at ``position`` (3,) (m), its axes along the world's."""
    model, data = simulation.scene.model, simulation.data
    start = model.jnt_qposadr[model.joint("ketchup_1_joint0").id]
    data.qpos[start : start + 7] = [*position, 1, 0, 0, 0]
    mujoco.mj_forward(model, data)


def test_facts_are_floats_and_all_documented(simulation):
    facts = read(simulation)
    assert list(facts) == list(FACTS)
    assert all(type(value) is float for value in facts.values())


def test_facts_of_a_settled_scene(simulation):
    facts = read(simulation)
    assert facts["object_height"] == facts["object_peak_height"] == 0
    assert facts["touching"] == facts["grasped"] == facts["success"] == 0
    assert 0.04 < facts["gripper_opening"] <= 0.081
    assert facts["gripper_to_object"] > facts["gripper_to_object_xy"] > 0
    assert abs(facts["object_above_goal"]) < 0.05  # it stands on the floor, as the basket does
    assert facts["object_to_goal_xy"] > 0.1


def test_facts_follow_the_object(simulation):
    """The ketchup, 12 cm above and 3 and 4 cm beside the region's centre."""
    basket = simulation.data.site("basket_1_contain_region").xpos.copy()
    place(simulation, basket + np.array([0.03, 0.04, 0.12]))
    facts, data = read(simulation, success=True), simulation.data
    centre_of_mass, fingertips = data.body("ketchup_1_main").xipos, data.site("gripper0_grip_site").xpos
    assert facts["object_to_goal_xy"] == pytest.approx(0.05)
    assert facts["object_above_goal"] == pytest.approx(0.12)
    assert facts["object_height"] == pytest.approx(basket[2] + 0.12 - simulation.origin[0])
    assert facts["gripper_to_object"] == pytest.approx(np.linalg.norm(centre_of_mass - fingertips))
    assert facts["gripper_to_object_xy"] == pytest.approx(np.hypot(*(centre_of_mass - fingertips)[:2]))
    assert facts["success"] == 1


def test_peak_height_stays_when_the_object_comes_down(simulation):
    basket = simulation.data.site("basket_1_contain_region").xpos.copy()
    place(simulation, basket + np.array([0.3, 0, 0.3]))
    highest = read(simulation)["object_height"]
    simulation.execute(np.tile([0, 0, 0, 0, 0, 0, -1.0], (20, 1)))
    facts = read(simulation)
    assert facts["object_height"] < 0.1 < facts["object_peak_height"] <= highest


def test_touching_and_grasped(simulation):
    """The ketchup lies across the fingers: in the middle both touch it, to either side one, far away none."""
    data = simulation.data
    tips = data.site("gripper0_grip_site").xpos.copy()
    left, right = (data.geom(f"gripper0_finger{i}_pad_collision").xpos.copy() for i in (1, 2))
    across = (left - right) / np.linalg.norm(left - right)
    situations = []
    for offset in (0.0, 0.05, -0.05, 0.4):
        place(simulation, tips + offset * across)
        facts = read(simulation)
        situations.append((facts["touching"], facts["grasped"]))
    assert situations == [(1, 1), (1, 0), (1, 0), (0, 0)]


def test_the_gripper_opens_and_closes(simulation):
    simulation.execute(np.tile([0, 0, 0, 0, 0, 0, 1.0], (30, 1)))
    assert read(simulation)["gripper_opening"] < 0.005
    simulation.execute(np.tile([0, 0, 0, 0, 0, 0, -1.0], (30, 1)))
    assert read(simulation)["gripper_opening"] > 0.075
