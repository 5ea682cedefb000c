"""Objects of one's own: their files, every mistake in one line, and playing tasks that have them."""

import re

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from artifacts import ROOT
from PIL import Image
from playing import random_actions, same

from vla_envs import own_objects
from vla_envs.assets.libero import verify_files
from vla_envs.demos.expert import ScriptedExpert
from vla_envs.machine import cache_folder
from vla_envs.scene import load_scene
from vla_envs.tasks import get_task

PAGE = (ROOT / "docs" / "own-scene.md").read_text(encoding="utf-8")
MUG = re.search(r"```xml\n(.*?)```", PAGE, re.DOTALL)[1]
BOX = """\
<mujoco>
  <compiler angle="degree"/>
  <default>
    <geom density="100" friction="0.95 0.3 0.1"/>
    <default class="side"><geom type="box"/></default>
  </default>
  <worldbody>
    <body name="tray" pos="3 4 5" euler="0 0 20">
      <freejoint/>
      <body name="object" pos="0 0 0.004">
        <geom class="side" size="0.08 0.08 0.004"/>
        <frame euler="0 0 90"><geom class="side" size="0.08 0.004 0.03" pos="0 0.076 0.026"/></frame>
        <body pos="0 0.076 0.026"><geom class="side" size="0.08 0.004 0.03"/></body>
        <geom class="side" size="0.08 0.004 0.03" pos="0 -0.076 0.026"/>
        <geom class="side" size="0.004 0.08 0.03" pos="0.076 0 0.026"/>
        <site name="contain_region" type="box" pos="0 0 0.04" size="0.07 0.07 0.04"/>
      </body>
      <site name="top_site" pos="0 0 0.05"/>
    </body>
  </worldbody>
</mujoco>
"""
TASK = """\
(define (problem LIBERO_Floor_Manipulation)
  (:language put the mug on the stand and the butter in the box)
  (:regions
    (left (:target floor) (:ranges ((-0.05 -0.15 0.05 -0.05))))
    (right (:target floor) (:ranges ((0.0 0.18 0.02 0.2))))
    (back (:target floor) (:ranges ((-0.22 0.0 -0.2 0.02))))
    (contain_region (:target box))
  )
  (:fixtures floor - floor)
  (:objects mug - my_mug box - my_box stand - my_mug butter - butter)
  (:init (On mug floor_left) (On box floor_right) (On stand floor_back) (On butter stand))
  (:goal (And (On mug stand) (In butter box_contain_region)))
)
"""
TINY = {"image_size": 16, "num_threads": 1}


def read(tmp_path, text, name="my_mug"):
    (tmp_path / "mug.xml").write_text(text)
    return own_objects.read(name, tmp_path / "mug.xml")


def compiled(own):
    """What LIBERO gets, compiled, and the geoms that touch."""
    model = mujoco.MjModel.from_xml_string(own.xml, dict(own.files))
    return model, np.flatnonzero(model.geom_contype)


def cube(path, half=0.02, scale=1.0):
    """Write a cube as an .obj file."""
    points = [(x, y, z) for x in (-half, half) for y in (-half, half) for z in (0.0, 2 * half)]
    faces = ["1 2 4 3", "5 7 8 6", "1 5 6 2", "3 4 8 7", "1 3 7 5", "2 6 8 4"]
    lines = [f"v {x * scale} {y * scale} {z * scale}" for x, y, z in points] + [f"f {face}" for face in faces]
    path.write_text("\n".join(lines) + "\n")


# ---- Reading a file ----------------------------------------------------------------------------------


def test_a_plain_file(tmp_path):
    model, solid = compiled(read(tmp_path, MUG))
    assert len(solid) == 3 and model.ngeom == 6  # each geom touches, and is drawn
    assert model.geom_group.tolist() == [0, 1] * 3 and np.array_equal(
        model.geom_pos[::2], model.geom_pos[1::2]
    )
    assert [model.site(name).pos.round(5).tolist() for name in own_objects.SITES] == [
        [0, 0, 0], [0, 0, 0.08], [0.055, 0, 0],
    ]  # fmt: skip
    assert np.allclose(model.geom_friction[solid], [0.95, 0.3, 0.1])
    volume = np.pi * 0.03**2 * 0.08 + 2 * (
        np.pi * 0.005**2 * np.hypot(0.02, 0.025) + 4 / 3 * np.pi * 0.005**3
    )
    assert model.body_mass.sum() == pytest.approx(100 * volume, rel=1e-5)


def test_robosuites_layout_classes_frames_and_bodies_within(tmp_path):
    """All become one body with the same shape; MuJoCo's own reading of the file is the oracle."""
    own = read(tmp_path, BOX, "my_box")
    model, solid = compiled(own)
    theirs = mujoco.MjModel.from_xml_string(BOX)
    data = mujoco.MjData(theirs)
    mujoco.mj_forward(theirs, data)
    root, turn = data.xpos[1], data.xmat[1].reshape(3, 3)
    assert np.allclose(
        np.sort(model.geom_pos[solid], axis=0), np.sort((data.geom_xpos - root) @ turn, axis=0), atol=1e-6
    )
    assert own.regions == ("contain_region",) and model.site("contain_region").pos[2] == pytest.approx(0.044)
    assert model.site("top_site").pos[2] == 0.05  # the file's own
    assert model.site("bottom_site").pos[2] == 0 and model.site("horizontal_radius_site").pos[0] > 0.11
    assert model.body_mass[2] == pytest.approx(theirs.body_subtreemass[1], rel=1e-5)


def test_meshes_and_textures(tmp_path):
    """A mesh keeps its place, although MuJoCo moves it to its centre of mass."""
    (tmp_path / "parts").mkdir()
    cube(tmp_path / "parts" / "cube.obj", scale=1000)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    text = """<mujoco><compiler meshdir="parts"/><default><mesh scale="0.001 0.001 0.001"/></default>
      <asset>
        <mesh file="cube.obj"/>
        <texture name="t" type="2d" file="red.png"/>
        <material name="m" texture="t"/>
      </asset>
      <worldbody><body>
        <geom type="mesh" mesh="cube" material="m" contype="0" conaffinity="0" pos="0 0 0.01" mass="0"/>
        <geom type="mesh" mesh="cube" pos="0 0 0.01" group="3"/>
      </body></worldbody></mujoco>"""
    own = read(tmp_path, text)
    model, solid = compiled(own)
    assert model.geom_group.tolist() == [1, 0] and model.ntex == 1 and model.geom_matid[0] == 0
    bottom, top, radius = (model.site(name).pos for name in own_objects.SITES)
    assert bottom[2] == pytest.approx(0.01) and top[2] == pytest.approx(0.05)
    assert radius[0] == pytest.approx(np.hypot(0.02, 0.02), rel=1e-3)
    assert np.allclose(own_objects._extent(model, solid), [0.01, 0.05, radius[0]], atol=1e-6)
    digest = own.digest
    cube(tmp_path / "parts" / "cube.obj", half=0.01, scale=1000)
    assert read(tmp_path, text).digest != digest


@pytest.mark.parametrize(
    ("shape", "extent"),
    [
        ('type="sphere" size="0.03" euler="10 20 30" pos="0.01 0 0"', (-0.03, 0.03, 0.04)),
        ('type="ellipsoid" size="0.01 0.02 0.03"', (-0.03, 0.03, 0.02)),
        ('type="capsule" size="0.01 0.03" euler="90 0 0"', (-0.01, 0.01, 0.04)),
        ('type="cylinder" size="0.01 0.03" euler="90 0 0"', (-0.01, 0.01, np.hypot(0.01, 0.03))),
        ('type="box" size="0.02 0.01 0.01" euler="45 0 0"', (-2e-2 / 2**0.5, 2e-2 / 2**0.5, 6e-2**0.5 / 10)),
    ],
)  # fmt: skip
def test_how_far_a_shape_reaches(tmp_path, shape, extent):
    model, _ = compiled(
        read(tmp_path, f"<mujoco><worldbody><body><geom {shape}/></body></worldbody></mujoco>")
    )
    bottom, top, radius = (model.site(name).pos for name in own_objects.SITES)
    assert [bottom[2], top[2], radius[0]] == pytest.approx(extent, rel=1e-3)


MISTAKES = [
    # (what is replaced, by what, words)
    ("<worldbody>", "<worldbody", "it is not XML: not well-formed.*: line 6, column"),
    ("<mujoco>", "<!DOCTYPE mujoco><mujoco>", "it is not XML: .*no DOCTYPE"),
    ('type="cylinder"', 'type="cylindre"', "invalid keyword: 'cylindre' Element 'geom'$"),
    ("0.95 0.3 0.1", "NaN 0.3 0.1", "a geom has nan; expected a number"),
    ("<body>", "<body><body>", "it is not XML: mismatched tag"),
    ("<worldbody>", "<worldbody><body/>", "worldbody has 2 bodies; expected one"),
    ("<worldbody>", '<worldbody><geom size="1"/>', "worldbody has geoms or sites"),
    ("<geom density", '<geom contype="0" conaffinity="0" density', "no collision geoms; expected at"),
    ("<body>", '<body><joint type="hinge"/>', "it has joints; expected one rigid body"),
    ("0.03 0.04", "30 40", "it reaches 40.04 m from its origin; expected at most 1 m"),
    ("<worldbody>", "<actuator/><worldbody>", "it has <actuator>, which an object does not need"),
    ("<worldbody>", '<include file="x.xml"/><worldbody>', "it has <include>"),
    ("<worldbody>", "<extension/><worldbody>", "it has <extension>"),
    ("<body>", "<body><plugin/>", "it has <plugin>"),
    ("<body>", "<body><camera/>", "it has <camera>"),
    ("<body>", "<body>" + '<geom size="0.01"/>' * 1000, "it has 1003 geoms; expected at most 1000"),
    ("<body>", "<body>" * 3000 + "</body>" * 2999, "nested too deeply|DEPTH"),
]  # fmt: skip

OF_ASSETS = [
    ('mesh file="../x.obj"', "'../x.obj' lies outside of its folder; expected a path to a file inside of it"),
    ('mesh file="/x.obj"', "'/x.obj' lies outside of its folder"),
    ('mesh file="link.obj"', "'link.obj' lies outside of its folder"),
    ('mesh file="cubs.obj"', "'cubs.obj' is no file; did you mean 'cube.obj'"),
    ('mesh file="mug.xml"', "'mug.xml' is of another kind; expected a file that ends in one of .*.obj"),
    ('mesh file="bad.stl"', "STL"),
    ('texture name="t" file="bad.png"', "'bad.png' has .* pixels; expected at most 4096"),
    ('texture name="t" builtin="flat" width="9999" height="9"', "texture 't' is large"),
    ('texture name="t" type="skybox" builtin="flat" width="9" height="9"', "texture 't' is a skybox"),
]
MISTAKES += [("<worldbody>", f"<asset><{new}/></asset><worldbody>", words) for new, words in OF_ASSETS]


@pytest.mark.parametrize(("old", "new", "words"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_line(old, new, words, tmp_path):
    (tmp_path / "inside").mkdir()
    cube(tmp_path / "outside.obj")
    cube(tmp_path / "inside" / "cube.obj")
    (tmp_path / "inside" / "link.obj").symlink_to(tmp_path / "outside.obj")
    (tmp_path / "inside" / "bad.stl").write_bytes(b"solid" * 3)
    (tmp_path / "inside" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\xff" * 30)
    assert old in MUG
    with pytest.raises(ValueError, match=words) as error:
        read(tmp_path / "inside", MUG.replace(old, new, 1))
    message = str(error.value)
    assert message.startswith("object my_mug, file '") and "\n" not in message and len(message) < 600


def test_files_that_are_none(tmp_path):
    (tmp_path / "mug.xml").write_text(MUG)
    for name, words in (
        ("mugg.xml", "cannot be read: No such file or directory; did you mean 'mug.xml'"),
        ("folder.xml", "'folder.xml' is no plain file"),
        ("large.xml", f"has {2**20 + 1} bytes; expected at most {2**20}"),
        ("latin.xml", "it is not UTF-8: byte 4"),
    ):
        if name == "folder.xml":
            (tmp_path / name).mkdir()
        elif name != "mugg.xml":
            (tmp_path / name).write_bytes(b" " * (2**20 + 1) if name == "large.xml" else b"<!--\xff-->")
        with pytest.raises(ValueError, match=words) as error:
            own_objects.read("my_mug", tmp_path / name)
        assert "\n" not in str(error.value)


# ---- Playing -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """``task.bddl`` with ``my_mug.xml`` beside it; ``my_box`` is in a file of another name."""
    folder = tmp_path_factory.mktemp("mine")
    for name, text in (("task.bddl", TASK), ("my_mug.xml", MUG), ("box.xml", BOX)):
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def make(files):
    """``gym.make_vec`` of the task; closes what it made."""
    made = []

    def make(num_envs=2, **kwargs):
        own = {"bddl_file": files / "task.bddl", "objects": {"my_box": files / "box.xml"}}
        made.append(gym.make_vec("vla_envs/Libero-v0", num_envs=num_envs, **TINY | own | kwargs))
        return made[-1]

    yield make
    for envs in made:
        envs.close()


def put(envs, name, position):
    """Put a thing of the first environment at ``position`` (3, m), upright and at rest."""
    simulation = envs.unwrapped.simulations[0]
    model, data = simulation.scene.model, simulation.data
    joint = model.body(f"{name}_main").jntadr[0]
    start, dof = model.jnt_qposadr[joint], model.jnt_dofadr[joint]
    data.qpos[start : start + 7] = [*position, 1, 0, 0, 0]
    data.qvel[dof : dof + 6] = 0


def test_a_task_with_them_is_like_any_other(files, make):
    envs = make(3)
    obs, info = envs.reset(seed=[7, 7, 8])
    assert (
        info["facts"]["goals"].tolist() == [2] * 3 and info["stage_name"].tolist() == ["0 of 2 met, far"] * 3
    )
    assert np.array_equal(obs["image"][0], obs["image"][1]) and obs["image"][0].std() > 10
    assert not np.array_equal(obs["state"][0], obs["state"][2])
    simulation = envs.unwrapped.simulations[0]
    data, model = simulation.data, simulation.scene.model
    places = {name: data.xpos[model.body(f"{name}_main").id].copy() for name in ("mug", "box", "stand")}
    for name, place in places.items():  # they stand on the floor as in their files, upright
        assert np.allclose(data.xmat[model.body(f"{name}_main").id], np.eye(3).ravel(), atol=0.01)
        assert abs(place[2]) < 0.002
    start = obs["image"][0]
    obs, *_ = envs.reset(options={"init_state_id": [0, 1, 0]})
    assert np.array_equal(obs["image"][0], obs["image"][2]) and len(simulation.scene.recorded) == 50

    envs.reset(seed=[7, 7, 8])
    put(envs, "mug", places["stand"] + [0, 0, 0.081])  # a mug on another one
    put(envs, "butter", places["box"] + [0, 0, 0.03])
    for _ in range(4):
        obs, _, terminated, _, info = envs.step(np.zeros((3, 7)))
    assert terminated.tolist() == [True, False, False] and info["facts"]["goals_met"].tolist() == [2, 0, 0]
    assert not np.array_equal(obs["image"][0], start)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_in_workers_too(make):
    one, split = make(3), make(3, workers=2)
    assert same(one.reset(seed=[5, 6, 5])[0], split.reset(seed=[5, 6, 5])[0])
    actions = random_actions(3)
    assert same(one.step(actions)[0], split.step(actions)[0])
    assert ScriptedExpert(one.unwrapped)()[0].shape == (3, 7)  # it plays tasks, which know their objects


def test_another_file_is_another_scene(files, make, tmp_path):
    """And the scene that is built again is the same to the bit."""
    scene = make(1).unwrapped.simulations[0].scene
    (tmp_path / "box.xml").write_text(BOX.replace("0.95 0.3 0.1", "0.5 0.3 0.1"))
    other = get_task(files / "task.bddl", 0, own_objects.read_objects({"my_box": tmp_path / "box.xml"}))
    assert other.digest != scene.task.digest and other.problem == scene.task.problem
    changed = make(1, objects={"my_box": tmp_path / "box.xml"}, cache=False).unwrapped.simulations[0].scene
    assert set(changed.model.geom_friction[:, 0]) - set(scene.model.geom_friction[:, 0]) == {0.5}
    assert np.array_equal(changed.recorded, scene.recorded)


def test_liberos_assets_beside_them(files, real_assets):
    """What the folder lacks is not missed; the scene itself is built in the same way."""
    task = get_task(files / "task.bddl", 0, own_objects.read_objects({"my_box": files / "box.xml"}))
    (files / "anew").write_text(task.problem.text())
    verify_files(ROOT / real_assets, files / "anew", ["my_box", "my_mug"])
    with pytest.raises(ValueError, match=r"my_box.xml: missing from every folder"):
        verify_files(ROOT / real_assets, files / "anew")


def test_what_does_not_fit_is_one_line_and_leaves_nothing(files, make, tmp_path):
    before = set(cache_folder().glob("task_*"))
    box = files / "box.xml"
    both = {"my_box": box, "my_mug": files / "my_mug.xml"}
    (tmp_path / "task.bddl").write_text(TASK.replace("butter - butter", "butter - buter"))
    (tmp_path / "fixed.bddl").write_text(TASK.replace("floor - floor", "floor - floor it - my_box"))
    (tmp_path / "region.bddl").write_text(TASK.replace("contain_region", "contain_regio"))
    (tmp_path / "my_mug.xml").write_text("<mujoco/>")
    for arguments, words in (
        ({"objects": {"my_box": files / "bux.xml"}}, r"object my_box, .*cannot be read.*mean 'box.xml'"),
        ({"objects": {"my_boxx": box}}, r"line 10: class my_box is not one of LIBERO's 49, nor of.*_boxx'"),
        ({"objects": {"my_box": box, "my_jug": box}}, "objects has 'my_jug', which no object.*mean 'my_mug'"),
        ({"objects": {"milk": box}}, "objects has 'milk', a class of LIBERO's"),
        ({"objects": {"My Box": box}}, "objects has 'My Box'; expected a class"),
        ({"objects": {"my_box": 3}}, "objects has 3 for 'my_box'; expected the path of an MJCF file"),
        ({"objects": "box.xml"}, "objects is 'box.xml'; expected a dict"),
        ({"bddl_file": None}, r"objects \['my_box'\] are for a bddl_file"),
        ({"bddl_file": tmp_path / "task.bddl", "objects": both},
         r"class buter is not one of LIBERO's 49, nor of objects \['my_box', 'my_mug'\]; .*mean 'butter'"),
        ({"bddl_file": tmp_path / "task.bddl"}, r"object my_mug, file '.*my_mug.xml': .* has 0 bodies"),
        ({"bddl_file": tmp_path / "fixed.bddl", "objects": both},
         "line 9: it is a my_box, which can be moved; expected it in :objects"),
        ({"bddl_file": tmp_path / "region.bddl", "objects": both},
         "line 7: my_box has no region contain_regio; expected one of .*did you mean 'contain_region'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words) as error:
            make(2, **arguments)
        assert "\n" not in str(error.value)
    assert set(cache_folder().glob("task_*")) == before
    with pytest.raises(ValueError, match="class my_box is not one of LIBERO's 49, nor of objects"):
        load_scene(str(files / "task.bddl"), 0)  # whose object lies beside it under another name
