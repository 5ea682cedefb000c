"""Perturbed scenes: what is drawn, what is seen of it, and that nothing else changes."""

import itertools
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from doubles import OnesPolicy
from playing import random_actions, same
from scipy.spatial.transform import Rotation

import grpo_vla
from vla_envs import noise, perturbations
from vla_envs.files import read_json
from vla_envs.tasks import SUITES, num_tasks
from vla_envs.training import evaluation

AXES = list(perturbations.DRAWS)
SENTENCE = "pick up the ketchup and place it in the basket"
ALL = "all:3"  # of distractors too, so that one more scene does for this file
REGIONS = {"milk": (-0.3, -0.2, 0.1, 0.2), "cookies": (-0.3, -0.2, 0.1, 0.2)}
LOOKS = ("camera", "light", "background", "noise")  # leave the physics alone


def subject(*movable):
    return perturbations.Subject(movable, SENTENCE, REGIONS)


def image(**kwargs):
    """A small image of noise and edges."""
    rng = np.random.default_rng(0)
    return np.repeat(np.repeat(rng.integers(0, 256, (16, 16, 3), np.uint8), 4, axis=0), 4, axis=1)


def size_of(axis, drawn):
    """How far what is drawn of an axis is from nothing."""
    if axis == "camera":
        off = [drawn["azimuth"] / 75, (drawn["scale"] - 1), drawn["pan"] / 10, drawn["tilt"] / 10]
        return np.abs(off).max()
    if axis == "robot":
        return np.linalg.norm(drawn["joints"])
    if axis == "light":
        return np.linalg.norm(drawn["tilt"])
    if axis == "background":
        return 1 - np.min(list(drawn.values()))
    if axis == "noise":
        return drawn["severity"]
    return np.max([np.hypot(*move) for move in drawn.values()])


# ---- What is drawn -----------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis not in ("instruction", "distractors")])
def test_levels_are_ordered(axis):
    """The higher a level, the farther from LIBERO's scene: in every quarter of what is drawn.

    Of those that have a size: a sentence has none, and of distractors there are more.
    """
    quarters = []
    for level in perturbations.LEVELS:
        drawn = [perturbations.draw({axis: level}, [k], subject("a", "b", "c"))[axis] for k in range(400)]
        quarters.append(np.quantile([size_of(axis, each) for each in drawn], [0.25, 0.5, 0.75]))
    assert (np.diff(quarters, axis=0) > 0).all() and quarters[0][0] > 0


def test_liberopluss_numbers():
    """Extremes of its task names: azimuths to 75, elevation 15, scales to 2, turns to 10 degrees."""
    drawn = [perturbations.draw({axis: level for axis in AXES}, [k, level], subject("a"))
             for level in perturbations.LEVELS for k in range(300)]  # fmt: skip
    camera = {name: np.array([each["camera"][name] for each in drawn]) for name in drawn[0]["camera"]}
    assert 74 < np.abs(camera["azimuth"]).max() <= 75 and set(camera["elevation"]) == {0.0, 15.0}
    scales = camera["scale"][camera["scale"] != 1]
    assert 1.15 <= scales.min() < 1.2 and 1.95 < scales.max() <= 2.0
    assert 9 < np.abs(camera["pan"]).max() <= 10 and 9 < np.abs(camera["tilt"]).max() <= 10
    joints = {round(float(np.linalg.norm(each["robot"]["joints"])), 6) for each in drawn}
    assert joints == {0.1, 0.2, 0.3, 0.4, 0.5}
    assert {each["noise"]["severity"] for each in drawn} == set(range(1, 11))
    assert {each["noise"]["kind"] for each in drawn} == set(noise.KINDS)
    assert 0.14 < max(size_of("layout", each["layout"]) for each in drawn) <= 0.15


def test_an_axis_does_not_depend_on_the_others():
    """Nor on how many there are: what a seed gives stays the same when there are new ones."""
    whole = perturbations.draw(perturbations.parse("all:3"), [7], subject("a", "b"))
    for axis in AXES:
        assert perturbations.draw({axis: 3}, [7], subject("a", "b")) == {axis: whole[axis]}
    assert perturbations.validate(whole, ("a", "b"), REGIONS) == whole
    assert AXES == ["camera", "robot", "light", "background", "noise", "layout", "instruction", "distractors"]
    assert (round(whole["light"]["specular"], 6), whole["noise"]["seed"]) == (1.045321, 477838241)


def test_what_perturb_takes():
    assert perturbations.parse("camera:3, light:2") == {"camera": 3, "light": 2}
    assert perturbations.parse({"noise": 5}) == {"noise": 5} and perturbations.parse(None) == {}
    assert perturbations.parse("all:1") == dict.fromkeys(AXES, 1)
    assert perturbations.parse("any:3") == {"any": 3}


def test_any_is_one_axis_at_a_level_up_to_its_own():
    """Each of them about as often as any other, and as that axis and level draw it."""
    counts, sizes = dict.fromkeys(AXES, 0), dict.fromkeys((0.1, 0.2, 0.3), 0)
    for seed in range(800):
        ((axis, its),) = perturbations.draw({"any": 3}, [seed], subject("a", "b")).items()
        assert its in [perturbations.draw({axis: k}, [seed], subject("a", "b"))[axis] for k in (1, 2, 3)]
        counts[axis] += 1
        if axis == "robot":
            sizes[round(float(np.linalg.norm(its["joints"])), 6)] += 1
    assert min(counts.values()) > 70 and min(sizes.values()) > 15


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("camra:3", "axis 'camra'.*did you mean 'camera'"),
        ("camera:0", "camera at level '0'; expected an int"),
        ("camera:6", "level '6'"),
        ("camera", "level ''"),
        ("camera:1,camera:2", "camera twice"),
        ("all:1,noise:2", "noise twice"),
        ({"light": True}, "level True"),
        ({"light": 1.5}, "level 1.5"),
        ({"light": 3.0}, "level 3.0"),
        ({"light": np.array([1, 2])}, "level array"),
        ("distractor:1", "axis 'distractor'.*did you mean 'distractors'"),
        ("all:1,distractors:2", "distractors twice"),
        ("any:2,camera:1", "expected 'any' alone"),
        ("any:6", "any at level '6'"),
        (3, "perturb is 3"),
        ("", "is ''"),
    ],
)
def test_what_perturb_does_not_take(value, words):
    with pytest.raises(ValueError, match=words) as error:
        perturbations.parse(value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("camera", "perturbation is 'camera'; expected a dict"),
        ({"lights": {}}, "axis 'lights'.*mean 'light'"),
        ({"robot": {}}, "robot has no joints"),
        ({"robot": {"joints": [0.1] * 6}}, "joints .*; expected 7 numbers from -1 to 1"),
        ({"robot": {"joints": [np.nan] * 7}}, "expected 7 numbers"),
        ({"robot": {"joints": [0.1, [0.2, 0.3]]}}, "expected 7 numbers"),
        ({"robot": {"joints": [0.1] * 7, "reading": "write back"}}, "'write back'.*mean 'written back'"),
        ({"robot": {"joint": [0] * 7}}, "has 'joint'; .*mean 'joints'"),
        ({"camera": 3}, "has camera 3; expected a dict"),
        ({"noise": {"kind": "snow", "severity": 1, "seed": 0}}, "kind 'snow'"),
        ({"noise": {"kind": "fog", "severity": 11, "seed": 0}}, "severity 11; expected an int from 1"),
        ({"noise": {"kind": "fog", "severity": 1.7, "seed": 0}}, "severity 1.7; expected an int"),
        ({"background": {"floor": "red", "walls": [1, 1, 1], "table": [1, 1, 1]}}, "floor 'red'"),
        ({"layout": {"ketchup_2": [0, 0]}}, "layout has 'ketchup_2'; .*mean 'ketchup_1'"),
        ({"instruction": "grab it"}, "has instruction 'grab it'; expected a dict of \\['sentence'\\]"),
        ({"instruction": {}}, "instruction has no sentence"),
        ({"instruction": {"sentense": "grab it"}}, "has 'sentense'; .*mean 'sentence'"),
        *(
            ({"instruction": {"sentence": its}}, "the instruction's sentence .*; expected text of 1 to 1000")
            for its in ("", " \n", 3, "a" * 1001)
        ),
        ({"distractors": {"mikl": [0, 0]}}, "distractors has 'mikl'; .*mean 'milk'"),
        ({"distractors": ["milk"]}, "has distractors .*; expected a dict of \\['milk', 'cookies'\\]"),
        ({"distractors": {"milk": [0, 0, 0]}}, "distractors' milk .*; expected 2 numbers"),
        ({"distractors": {"milk": [0.0, 0.3]}}, "expected x from -0.3 to 0.1 and y from -0.2 to 0.2"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for(value, words):
    with pytest.raises(ValueError, match=words) as error:
        perturbations.validate(value, ("ketchup_1",), REGIONS)
    assert "\n" not in str(error.value)


# ---- Image noise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", noise.KINDS)
def test_noise(kind):
    """Deterministic, anew at every step where it is random, stronger with its severity, of any size."""
    picture = image()
    distances = [
        np.abs(noise.apply(picture, kind, severity, 1, 1).astype(float) - picture).mean()
        for severity in range(1, 11)
    ]
    assert distances[0] > 0.5 and distances[-1] > 1.2 * distances[0]
    again = [noise.apply(picture, kind, 6, 1, step) for step in (3, 3, 4)]
    assert again[0].dtype == np.uint8 and np.array_equal(again[0], again[1])
    random = kind in ("motion blur", "fog", "glass blur")
    assert np.array_equal(again[0], again[2]) != random
    assert noise.apply(picture[:30, :30], kind, 10, 1, 1).shape == (30, 30, 3)


def test_the_blurs_are_near_exact_ones():
    """A Gaussian by its definition, where Pillow has three boxes: within 3 of 255 on average."""
    from scipy.ndimage import gaussian_filter

    picture = np.repeat(np.repeat(image(), 4, axis=0), 4, axis=1)  # 256 pixels
    for severity in (2, 5, 10):
        exact = gaussian_filter(picture.astype(float), (severity, severity, 0), mode="nearest")
        assert np.abs(noise.apply(picture, "gaussian blur", severity, 0, 0) - exact).mean() < 3


# ---- In environments ---------------------------------------------------------------------------------


@pytest.fixture
def seen(make_vec):
    """Of a perturbation, seeds or init states: observations and infos after the reset and after a step."""

    def seen(perturb, seeds=(3, 3, 4), options=None, **kwargs):
        envs = make_vec(len(seeds), perturb=perturb, image_size=64, **kwargs)
        first = envs.reset(seed=list(seeds), options=options)
        second = envs.step(random_actions(len(seeds), seed=1))
        return first[0], first[1], second[0], second[4], envs

    return seen


@pytest.mark.longer
def test_members_of_a_group_see_the_same(seen):
    first, info, *_ = seen(ALL)
    assert info["perturbation"][0] == info["perturbation"][1] != info["perturbation"][2]
    assert set(info["perturbation"][0]) == set(AXES)
    for name in first:
        assert np.array_equal(first[name][0], first[name][1])
        assert not np.array_equal(first[name][0], first[name][2])
    again = seen(ALL, (3, 9), num_threads=2)
    assert np.array_equal(again[0]["image"][0], first["image"][0])
    assert again[1]["perturbation"][0] == info["perturbation"][0]


@pytest.mark.longer
@pytest.mark.parametrize("axis", [axis for axis in AXES if axis not in ("instruction", "distractors")])
def test_an_axis_changes_what_it_is_about_alone(axis, seen):
    plain, info, _, _, envs = seen(None, wrist_camera=True)
    assert "perturbation" not in info
    first, info, _, _, other = seen(f"{axis}:3", wrist_camera=True)
    assert not np.array_equal(first["image"], plain["image"])
    before, after = envs.unwrapped.qpos, other.unwrapped.qpos
    assert np.array_equal(before, after) == (axis in LOOKS)
    assert np.array_equal(first["state"], plain["state"]) == (axis in (*LOOKS, "layout"))
    assert np.array_equal(first["wrist_image"], plain["wrist_image"]) == (axis in ("camera", "noise"))


@pytest.mark.longer
def test_what_was_drawn_can_be_asked_for(seen):
    """Of environments with the same distractors, on the same seeds: the same scene, now and after a step."""
    first, info, later, _, _ = seen(ALL)
    asked = seen("distractors:3", options={"perturbation": list(info["perturbation"])})
    assert same(asked[0], first) and same(asked[2], later)
    assert asked[1]["perturbation"].tolist() == info["perturbation"].tolist()
    for_all = seen("distractors:3", options={"perturbation": info["perturbation"][2]})
    assert np.array_equal(for_all[0]["image"][2], first["image"][2])


@pytest.mark.longer
def test_recorded_states_are_perturbed_the_same_every_time(seen):
    options = {"init_state_id": [0, 1, 1]}
    first, info, _, _, envs = seen(ALL, options=options)
    assert info["perturbation"][1] == info["perturbation"][2] != info["perturbation"][0]
    envs.reset(seed=[8, 9, 10])
    assert same(envs.reset(options=options)[0], first)
    joints = info["perturbation"][0]["robot"]["joints"]
    plain = seen(None, options=options, settle_steps=0)[-1].unwrapped
    moved = seen("robot:3", options=options, settle_steps=0)[-1].unwrapped
    for each in (plain, moved):
        each.reset(options=options)
    assert np.allclose(moved.qpos[0, :7] - plain.qpos[0, :7], joints, atol=1e-9)


@pytest.mark.longer
def test_the_arm_rests_where_it_starts(seen):
    """The controller takes the new pose for its own, so that it does not drift back."""
    options = {"init_state_id": [0, 1, 2]}
    envs = seen("robot:5", options=options)[-1].unwrapped
    envs.reset(options=options)
    before = envs.qpos[:, :7]
    for _ in range(20):
        envs.step(np.zeros((3, 7)))
    assert np.abs(envs.qpos[:, :7] - before).max() < 0.05


@pytest.mark.longer
def test_the_recorded_joints_can_be_written_back(make_vec):
    """The arm starts where it was recorded; the controller alone holds and rests in the other pose."""
    envs = make_vec(3, settle_steps=0).unwrapped
    joints = [0.1, -0.1, 0.1, -0.1, 0.1, -0.1, 0.1]
    asked = [{}, *({"robot": {"joints": joints, "reading": reading}} for reading in ("written back", "kept"))]
    envs.reset(options={"init_state_id": 0, "perturbation": asked})
    plain, written, kept = envs.qpos[:, :7]
    assert np.array_equal(plain, written) and np.allclose(kept - plain, joints, atol=1e-9)
    rest = [simulation.arm.reset_qpos for simulation in envs.simulations]
    assert np.allclose(rest[1] - rest[0], joints) and np.array_equal(rest[1], rest[2])
    goals = [simulation.memory.goal_rotation for simulation in envs.simulations]
    assert np.array_equal(goals[1], goals[2]) and not np.allclose(goals[0], goals[1], atol=1e-2)
    for _ in range(10):
        envs.step(np.zeros((3, 7)))
    assert np.abs(envs.qpos[1, :7] - written).max() > 0.02 > np.abs(envs.qpos[0, :7] - plain).max()


@pytest.mark.slow
def test_workers_of_which_one_is_perturbed(make_vec):
    """Their infos are those of one process."""
    for workers in (0, 2):
        envs = make_vec(2, image_size=32, **({"workers": workers} if workers else {}))
        envs.reset(seed=[1, 2])
        asked = {
            "robot": {"joints": [0.1] * 7, "reading": "kept"},
            "instruction": {"sentence": f"please {SENTENCE}"},
        }
        options = {"reset_mask": np.array([True, False]), "perturbation": asked}
        for info in (envs.reset(options=options)[1], envs.step(np.zeros((2, 7)))[4]):
            assert info["perturbation"].tolist() == [asked, {}]
            assert info["instruction"].tolist() == envs.instructions == [f"please {SENTENCE}", SENTENCE]
        envs.reset(options=options | {"perturbation": {}})
        assert envs.instructions == [SENTENCE] * 2


@pytest.mark.longer
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_autoresets_draw_anew(mode, make_vec):
    envs = make_vec(2, perturb="camera:4", autoreset_mode=mode, max_episode_steps=2)
    _, info = envs.reset(seed=[1, 1])
    drawn = [str(info["perturbation"][0])]
    for _ in range(9):
        info = envs.step(np.zeros((2, 7)))[4]
        assert info["perturbation"][0] == info["perturbation"][1]
        drawn.append(str(info["perturbation"][0]))
    assert len(set(drawn)) >= 4


@pytest.mark.longer
def test_workers_and_single_environments(seen, make, make_vec):
    first, info, later, _, _ = seen(ALL)
    split = seen(ALL, workers=2)
    assert same(split[0], first) and same(split[2], later)
    assert split[1]["perturbation"].tolist() == info["perturbation"].tolist()
    env = make(perturb=ALL, image_size=64)
    obs, alone = env.reset(seed=4)
    assert alone["perturbation"] == info["perturbation"][2]
    assert np.array_equal(obs["image"], first["image"][2])
    asked = {"perturbation": {"robot": {"joints": [0.05] * 7, "reading": "kept"}}}
    assert env.reset(seed=4, options=asked)[1]["perturbation"] == asked["perturbation"]
    with pytest.raises(ValueError, match="perturbation is 3; expected a dict, or a list of 1"):
        env.reset(options={"perturbation": 3})


@pytest.mark.longer
def test_frames_show_what_the_policy_sees(make_vec):
    frames = []
    for perturb in (None, "camera:5", "noise:5"):
        envs = make_vec(1, perturb=perturb, render_mode="rgb_array")
        envs.reset(seed=[0])
        frames.append(envs.render()[0])
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(frames, 2))


@pytest.mark.longer
@pytest.mark.parametrize("moved", [
    {"azimuth": 30.0, "elevation": 15.0, "scale": 1.0, "pan": 0.0, "tilt": 0.0},
    {"azimuth": 0.0, "elevation": 0.0, "scale": 1.5, "pan": 0.0, "tilt": 0.0},
    {"azimuth": 0.0, "elevation": 0.0, "scale": 1.0, "pan": -10.0, "tilt": 6.0},
])  # fmt: skip
def test_the_camera_is_where_liberoplus_puts_it(moved, make_vec):
    """Its steps one after the other, with SciPy's rotations."""
    envs = make_vec(1).unwrapped
    envs.reset(seed=[0], options={"perturbation": {"camera": moved}})
    model, look = envs.simulations[0].scene.model, envs._looks[0]
    camera = model.camera("agentview").id
    position = model.cam_pos[camera]
    rotation = Rotation.from_quat(np.roll(model.cam_quat[camera], -1))  # x y z w
    pivot = np.array([0, 0, 0.8])
    up = Rotation.from_rotvec(np.radians(-moved["elevation"]) * np.array([0, 1, 0]))
    around = Rotation.from_euler("z", moved["azimuth"], degrees=True)
    position, rotation = pivot + up.apply(position - pivot), up * rotation
    position, rotation = around.apply(position), around * rotation
    position = pivot + moved["scale"] * (position - pivot)
    rotation = Rotation.from_euler("z", moved["pan"], degrees=True) * rotation
    rotation = Rotation.from_rotvec(np.radians(-moved["tilt"]) * np.array([0, 1, 0])) * rotation
    assert look.camera == camera and np.allclose(look.position, position)
    assert np.allclose(look.rotation.reshape(3, 3), rotation.as_matrix())


@pytest.mark.longer
def test_what_is_said_follows_the_instruction(seen):
    """Alone it changes nothing else, and nothing is settled or drawn anew for it."""
    first, info, later, after, envs = seen("instruction:5")
    plain, its_info, its_later, _, _ = seen(None)
    assert same(first, plain) and same(later, its_later)
    sentences = [drawn["instruction"]["sentence"] for drawn in info["perturbation"]]
    assert info["instruction"].tolist() == after["instruction"].tolist() == envs.instructions == sentences
    assert its_info["instruction"].tolist() == [SENTENCE] * 3
    assert sentences[0] == sentences[1] != sentences[2] and all("the ketchup" in each for each in sentences)
    assert len(envs.unwrapped._settled) == 2
    before = envs.instructions
    envs.reset(seed=[3, 3, 4], options={"perturbation": {"instruction": {"sentence": "go on"}}})
    assert envs.instructions == ["go on"] * 3 and before == sentences and len(envs.unwrapped._settled) == 2
    envs.reset(options={"perturbation": [{}] * 3, "reset_mask": np.array([True, False, False])})
    assert envs.instructions == [SENTENCE, "go on", "go on"]


@pytest.mark.longer
def test_single_environments_and_autoresets_say_it(make, make_vec):
    env = make(perturb="instruction:4")
    said = [env.reset(options={"init_state_id": k})[1]["instruction"] for k in (0, 1)]
    assert said[0] != said[1] == env.unwrapped.instruction and env.unwrapped.instructions == [said[1]]
    envs = make_vec(2, perturb="instruction:4", max_episode_steps=1, autoreset_mode="SameStep")
    assert envs.reset(options={"init_state_id": [0, 1]})[1]["instruction"].tolist() == said
    info = envs.step(np.zeros((2, 7)))[4]
    assert info["final_info"]["instruction"].tolist() == said
    assert envs.instructions == info["instruction"].tolist() != said


@pytest.mark.longer
def test_each_task_has_the_look_of_its_own_scene(make_vec):
    """Tasks of two arenas side by side, from the same init state, draw the same perturbation."""

    def second(*task_ids):
        envs = make_vec(
            len(task_ids), suite="Libero10", task_id=list(task_ids), perturb="camera:3,background:4"
        )
        obs, info = envs.reset(options={"init_state_id": 0})
        return obs["image"][-1], info["perturbation"][-1]

    (beside, drawn), (alone, its) = second(0, 2), second(2)  # a living room, a kitchen
    assert drawn == its and np.array_equal(beside, alone)


@pytest.mark.longer
def test_nothing_of_the_model_stays_changed(make_vec):
    """Environments without perturbations share it."""
    shared = {axis: 5 for axis in AXES if axis != "distractors"}  # these have a scene of their own
    plain, perturbed = make_vec(1, image_size=64), make_vec(1, image_size=64, perturb=shared)
    expected = plain.reset(seed=[0])[0]
    perturbed.reset(seed=[0])
    perturbed.step(np.zeros((1, 7)))
    assert same(plain.reset(seed=[0])[0], expected)


@pytest.mark.longer
def test_layouts_keep_things_apart(make_vec):
    """What overlapped would be flung away while it settles."""
    envs = make_vec(16, perturb="layout:5").unwrapped
    _, info = envs.reset(seed=list(range(16)))
    speeds = [np.abs(simulation.data.qvel).max() for simulation in envs.simulations]
    assert np.median(speeds) < 0.1 and sum(speed > 0.5 for speed in speeds) <= 2
    moves = [np.hypot(*move) for drawn in info["perturbation"] for move in drawn["layout"].values()]
    assert np.median(moves) > 0.04 and max(moves) <= 0.15


@pytest.mark.longer
@pytest.mark.slow
def test_real_assets(real_assets, make_vec):
    """Whose triangles are culled by where the camera is."""
    envs = make_vec(1, assets=real_assets, image_size=64)
    model = envs.unwrapped.simulations[0].scene.model
    before = model.mat_rgba.copy()
    images = []
    for levels in ({}, {"camera": 2}, {"light": 5}, {"background": 5}):
        drawn = perturbations.draw(levels, [0], subject())
        images.append(envs.reset(seed=[0], options={"perturbation": drawn})[0]["image"][0])
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(images, 2))
    assert np.array_equal(model.mat_rgba, before)


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_every_task(suite):
    for task_id in range(num_tasks(suite)):
        envs = gym.make_vec(
            f"vla_envs/{suite}-v0", num_envs=2, task_id=task_id, image_size=32, perturb="all:5"
        )
        _, info = envs.reset(seed=[0, 1])
        assert not info["diverged"].any() and set(info["perturbation"][0]) == set(AXES)
        envs.close()


@pytest.mark.longer
def test_scripts_policies_are_told_it(make_vec, tmp_path):
    """Of training's episodes and of evaluations'."""
    envs, policy = make_vec(2, action_chunk=2, max_episode_steps=2, perturb="instruction:5"), OnesPolicy()
    batch = grpo_vla.rollout(envs, policy, np.array([5, 5]), 1.0)
    assert batch["instructions"] == policy.asked[-1][0] == envs.instructions != [SENTENCE] * 2
    args = SimpleNamespace(seed=1, eval_episodes=2, protocol=None)
    evaluation.play(envs, policy, 0.0, args, tmp_path / "film.mp4")
    assert policy.asked[-1][0] == envs.instructions and len({*envs.instructions, *batch["instructions"]}) == 3


@pytest.mark.longer
def test_a_script_trains_and_evaluates_in_perturbed_scenes(execute, tmp_path):
    flags = {
        "num_groups": 1, "group_size": 2, "num_iterations": 1, "max_episode_steps": 16, "eval_episodes": 2,
        "eval_every": 0, "num_threads": 1, "keep_low": 0, "keep_high": 1,
    }  # fmt: skip
    execute("grpo_vla", **flags, perturb="camera:1", eval_perturb=ALL, run_dir=tmp_path / "run")
    assert read_json(tmp_path / "run" / "result.json")["eval_perturb"] == ALL
    arguments = read_json(tmp_path / "run" / "args.json")
    assert (arguments["perturb"], arguments["eval_perturb"]) == ("camera:1", ALL)
    with pytest.raises(SystemExit) as exit_:
        execute("grpo_vla", **flags, perturb="camera:9", run_dir=tmp_path / "other")
    assert exit_.value.code == 2 and not (tmp_path / "other").exists()
