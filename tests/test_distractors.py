"""Further objects in a scene: which ones, where they stand, and that the task stays what it is.

Three scenes are built for these tests and test_perturbations.py together, one of them with LIBERO's assets.
"""

import itertools
import re

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from own_scenes import KITCHEN
from playing import random_actions, same

from vla_envs import bddl, distractors
from vla_envs.distractors import CLASSES, GAP, REGIONS, with_distractors
from vla_envs.tasks import SUITES, get_task, num_tasks

AXIS = "distractors:3"
REGION = REGIONS["floor"]


def joints_of(simulation):
    """Positions of a simulation's joints, by name."""
    model, data = simulation.scene.model, simulation.data
    ends = [*model.jnt_qposadr[1:], model.nq]
    return {
        model.joint(k).name: data.qpos[start:end].tolist()
        for k, (start, end) in enumerate(zip(model.jnt_qposadr, ends))
    }


def own_joints_of(envs):
    return [
        {name: its for name, its in joints_of(each).items() if not name.startswith("distractor_")}
        for each in envs.unwrapped.simulations
    ]


def boxes_of(scene, data, items):
    """Boxes around the geoms of each of some things: least and greatest corners (n, 3)."""
    return [distractors._bounds(scene.model, data, [item.body]) for item in items]


def between(one, other):
    """The horizontal distance (m) of two things, from their boxes."""
    apart = np.maximum(one[0][:, None] - other[1], other[0] - one[1][:, None])  # (n, m, 3)
    return np.hypot(*np.moveaxis(np.maximum(apart, 0)[..., :2], -1, 0)).min()


# ---- Which ones there are ------------------------------------------------------------------------------


def test_every_task_of_libero_has_its_own():
    sets = set()
    for suite in SUITES:
        for k in range(num_tasks(suite)):
            task = get_task(suite, k)
            problem = bddl.read(task.bddl_file)
            nouns = {kind.split("_")[-1] for _, kind in problem.fixtures + problem.objects}
            further = [with_distractors(task, level) for level in (2, 5)]
            kinds = further[-1].distractors
            assert further[0].distractors == kinds[:2]
            own = {kind.split("_")[-1] for kind in kinds}
            assert len(own) == 5 and set(kinds) <= set(CLASSES) and not own & nouns
            assert further[0].digest != further[1].digest
            last = further[-1].problem
            assert last.goal == problem.goal and last.objects[:-5] == problem.objects
            assert (further[-1].suite, further[-1].instruction) == (suite, task.instruction)
            sets.add(kinds)
    assert (
        len(sets) > 100
        and [*REGIONS] == [each.surface for each in bddl.ARENAS.values()]
        and all(bddl.KINDS[kind].built_in for kind in CLASSES)
    )


def test_they_stand_in_a_region_of_their_own():
    """In the text that LIBERO reads, and after everything else, so that its own things are placed alike."""
    task = with_distractors(get_task("LiberoObject", 4), 2)
    problem = bddl.parse(task.problem.text())
    names = [f"distractor_{kind}" for kind in task.distractors]
    assert [name for name, _ in problem.objects[-2:]] == names
    assert problem.init[-2:] == tuple(("on", name, "floor_vla_envs_distractors") for name in names)
    assert problem.regions[-1].ranges == (REGION,)


def test_a_task_that_leaves_too_few(tmp_path):
    objects = " ".join(f"{kind}_{k} - {kind}" for k, kind in enumerate(CLASSES[4:]))
    text = KITCHEN.replace("butter - butter dish", f"{objects} butter - butter dish")
    places = " ".join(f"(On {kind}_{k} kitchen_table_left)" for k, kind in enumerate(CLASSES[4:]))
    (tmp_path / "full.bddl").write_text(text.replace("(:init", f"(:init {places}"))
    task = get_task(tmp_path / "full.bddl", 0)
    with pytest.raises(ValueError, match=r"full leaves [0-3] of the 19 classes.*; expected a level") as error:
        with_distractors(task, 5)
    assert "\n" not in str(error.value)


# ---- Where they stand ----------------------------------------------------------------------------------


def test_a_place_that_is_taken_gives_way():
    region, gaps = (0.0, 0.0, 1.0, 2.0), (0.03, 0.01)
    low, high = np.array([[0.4, 0.4]]), np.array([[0.6, 0.6]])

    def free(*wanted, end=high, within=region):
        return distractors._free(list(wanted), within, low, end, gaps)

    assert free(0.2, 0.2) == [0.2, 0.2] and free(0.5, 0.63001) == [0.5, 0.63001]
    expected = (0.5 + 0.7548776662) % 1, (0.62 + 2 * 0.5698402910) % 2
    assert free(0.5, 0.62) == pytest.approx(expected)
    narrow = (0.41, 0.0, 0.59, 0.62)  # nowhere 3 cm away, but above it there is room for 1 cm
    low[0, 1] = -1
    assert 0.61 < free(0.5, 0.615, within=narrow)[1] <= 0.62
    assert free(0.5, 0.5, within=(0.4, 0.4, 0.6, 0.6)) is None


@pytest.fixture
def pair(make_vec):
    """Of seeds, environments without and with distractors, not settled."""

    def pair(num_envs=3, **kwargs):
        return [make_vec(num_envs, settle_steps=0, perturb=its, **kwargs) for its in (None, AXIS)]

    return pair


@pytest.mark.longer
def test_the_tasks_own_things_stand_as_without(pair):
    """By seed and from recorded init states; and everything that is said about the task is the same."""
    plain, envs = pair()
    infos = {}
    for how in ({"seed": [3, 3, 4]}, {"options": {"init_state_id": [0, 1, 1]}}):
        for each in (plain, envs):
            _, infos[each] = each.reset(**how)
        assert own_joints_of(plain) == own_joints_of(envs)
        facts, expected = infos[envs]["facts"], infos[plain]["facts"]
        assert all(np.allclose(facts[name], expected[name]) for name in expected)
        drawn = infos[envs]["perturbation"].tolist()
        same_pair = (0, 1) if "seed" in how else (1, 2)
        assert drawn[same_pair[0]] == drawn[same_pair[1]] and drawn[0] != drawn[2]
    assert envs.unwrapped.tasks == plain.unwrapped.tasks
    assert envs.unwrapped.tasks[0].label == "LiberoObject_4"
    assert envs.unwrapped.instructions == plain.unwrapped.instructions
    assert infos[envs]["stage_name"].tolist() == infos[plain]["stage_name"].tolist()
    scenes = [each.unwrapped.simulations[0].scene for each in (plain, envs)]
    assert len(scenes[1].recorded) == 50 and scenes[0].movable == scenes[1].movable
    assert scenes[0].distractors == () and len({id(each.scene) for each in envs.unwrapped.simulations}) == 1


@pytest.mark.longer
def test_they_stand_free_and_in_view(make_vec):
    """And the task's own things come to rest as they do without: none is dropped onto a distractor."""
    plain, envs = (make_vec(16, perturb=its).unwrapped for its in (None, AXIS))
    plain.reset(seed=list(range(16)))
    _, info = envs.reset(seed=list(range(16)))
    for mine, expected in zip(own_joints_of(envs), own_joints_of(plain)):
        assert all(np.allclose(mine[name], expected[name], atol=1e-3) for name in expected)
    for simulation, drawn in zip(envs.simulations, info["perturbation"]):
        scene, data, places = simulation.scene, simulation.data, drawn["distractors"]
        model = scene.model
        assert [*places] == [item.name for item in scene.distractors]
        boxes = boxes_of(scene, data, scene.placements + scene.distractors)
        camera = model.camera("agentview").id
        turned = data.cam_xmat[camera].reshape(3, 3)
        for number, item in enumerate(scene.distractors, len(scene.placements)):
            assert np.hypot(*(data.xpos[item.body, :2] - places[item.name])) < 0.02  # it did not fall or roll
            others = [between(boxes[number], box) for k, box in enumerate(boxes) if k != number]
            assert min(others) > GAP / 2
            for corner in np.concatenate(boxes[number]):
                x, y, z = turned.T @ (corner - data.cam_xpos[camera])
                most = -z * np.tan(np.radians(model.cam_fovy[camera] / 2))
                assert abs(x) < most and abs(y) < most
        assert np.abs(data.qvel).max() < 0.5


@pytest.mark.longer
def test_the_task_can_be_solved(make_vec, drop):
    """With the object in the basket, in both kinds of scenes."""
    envs = make_vec(2, perturb=AXIS)
    envs.reset(seed=[0, 1])
    for _ in range(3):
        envs.step(np.zeros((2, 7)))
    drop(envs, 0)
    terminated = False
    for _ in range(20):
        terminated = terminated or bool(envs.step(np.zeros((2, 7)))[2][0])
    assert terminated and not envs.unwrapped.frozen[1]


@pytest.mark.longer
def test_the_same_seed_gives_the_same_bits(make_vec):
    """In one process and in two, now and after steps."""
    kwargs = {"perturb": AXIS, "image_size": 32}
    played = []
    for more in ({}, {}, {"workers": 2}):
        envs = make_vec(2, **kwargs, **more)
        first, info = envs.reset(seed=[5, 6])
        later = envs.step(random_actions(2, seed=1))[0]
        played.append((first, later, info["perturbation"].tolist()))
    asked = {"perturbation": played[0][2]}
    assert same(envs.reset(seed=[5, 6], options=asked)[0], played[0][0])
    for first, later, drawn in played[1:]:
        assert same(first, played[0][0]) and same(later, played[0][1]) and drawn == played[0][2]


@pytest.mark.longer
def test_places_that_are_asked_for(make_vec):
    envs = make_vec(2, perturb=AXIS, settle_steps=0).unwrapped
    scene = envs.simulations[0].scene
    _, info = envs.reset(seed=[5, 6])
    drawn = info["perturbation"].tolist()
    before = envs.qpos
    kind, other, _ = drawn[0]["distractors"]
    _, info = envs.reset(seed=[5, 6], options={"perturbation": drawn})
    assert np.array_equal(envs.qpos, before) and info["perturbation"].tolist() == drawn
    # One of them alone; where the goal's object is, it stands elsewhere; the others are not in the scene.
    at = envs.simulations[1].data.xpos[scene.goal.subject[0], :2]
    taken = np.clip(at, REGION[:2], REGION[2:]).tolist()
    asked = [{"distractors": {kind: drawn[0]["distractors"][kind]}}, {"distractors": {other: taken}}]
    _, info = envs.reset(seed=[5, 6], options={"perturbation": asked})
    assert info["perturbation"][0] == asked[0]
    got = info["perturbation"][1]["distractors"][other]
    assert got != taken and REGION[0] <= got[0] <= REGION[2] and REGION[1] <= got[1] <= REGION[3]
    here = [[data.xpos[item.body, 0] < 1 for item in scene.distractors]
            for data in (each.data for each in envs.simulations)]  # fmt: skip
    assert np.sum(here, axis=1).tolist() == [1, 1]
    _, info = envs.reset(options={"perturbation": {}})
    assert info["perturbation"].tolist() == [{}, {}]


@pytest.mark.longer
def test_none_is_under_what_will_fall(make):
    """LIBERO's init states have things above the surface, onto which they drop."""
    scene = make(perturb=AXIS).unwrapped._envs.simulations[0].scene
    state = scene.sample_init_state(np.random.default_rng(0))
    start = scene.model.jnt_qposadr[scene.model.body_jntadr[scene.goal.subject[0]]]
    for kind in scene.task.distractors:
        places = {kind: [0.1, 0.0]}
        distractors.place(scene, state, places)  # where it can stand
        above = state.copy()
        above[start : start + 3] = [*places[kind], 0.3]
        others = {kind: places[kind]}
        distractors.place(scene, above, others)
        assert np.hypot(*np.subtract(places[kind], others[kind])) > GAP


@pytest.mark.longer
def test_mistakes_are_one_line(make):
    with pytest.raises(ValueError, match="the environment was made without; expected it") as error:
        make().reset(options={"perturbation": {"distractors": {"milk": [0, 0]}}})
    assert "\n" not in str(error.value)
    env = make(perturb=AXIS)
    known = env.unwrapped._envs.simulations[0].scene.task.distractors
    for wrong, words in (
        ({"ketchup": [0, 0]}, f"has 'ketchup'; expected some of {list(known)}"),
        ({known[0]: [0.5, 0.0]}, "[0.5, 0.0]; expected x from -0.3 to 0.25 and y from -0.28 to 0.28, in m"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            env.reset(options={"perturbation": {"distractors": wrong}})


@pytest.mark.slow
def test_a_scene_of_ones_own_with_a_drawer(tmp_path):
    """None stands where the drawers open; layouts move what they move without."""
    (tmp_path / "kitchen.bddl").write_text(KITCHEN)
    for perturb in ("distractors:3,layout:3", {"layout": 3}):
        envs = gym.make_vec(
            "vla_envs/Libero-v0", num_envs=4, bddl_file=tmp_path / "kitchen.bddl", image_size=16,
            num_threads=1, perturb=perturb, settle_steps=0,
        )  # fmt: skip
        _, info = envs.reset(seed=[0, 1, 2, 3])
        simulations = envs.unwrapped.simulations
        if "distractors" in info["perturbation"][0]:
            own, layouts = own_joints_of(envs), [its["layout"] for its in info["perturbation"]]
            scene = simulations[0].scene
            drawers = [k for k in range(scene.model.njnt) if "cabinet" in scene.model.joint(k).name]
            assert len(drawers) == 3 and len(scene.recorded) == 50
            (cabinet,) = (item for item in scene.placements if item.name == "cabinet")
            for simulation, end in itertools.product(simulations, (0, 1)):
                data = simulation.data
                data.qpos[scene.model.jnt_qposadr[drawers]] = scene.model.jnt_range[drawers, end]
                mujoco.mj_kinematics(scene.model, data)
                moved, *further = boxes_of(scene, data, [cabinet, *scene.distractors])
                assert all(between(moved, boxes) > 0 for boxes in further)
        else:
            assert own == own_joints_of(envs)
            assert layouts == [its["layout"] for its in info["perturbation"]]
        envs.close()


@pytest.mark.slow
@pytest.mark.longer
def test_real_assets(real_assets, make_vec):
    """The same objects, as LIBERO draws them."""
    kwargs = {"perturb": AXIS, "image_size": 64, "quality": "fast"}
    envs = make_vec(1, assets=real_assets, **kwargs)
    obs, info = envs.reset(seed=[5])
    assert list(info["perturbation"][0]["distractors"]) == list(
        with_distractors(get_task("LiberoObject", 4), 3).distractors
    )
    without = envs.reset(seed=[5], options={"perturbation": {}})[0]
    assert (np.abs(obs["image"].astype(int) - without["image"]).sum(axis=-1) > 30).mean() > 0.005
