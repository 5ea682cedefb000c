"""Built-in assets: LIBERO's physics to the last bit, and everything that its tasks ask for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import mujoco
import numpy as np
import pytest

from vla_envs.assets.builtin import PHYSICS as PHYSICS_FILE
from vla_envs.assets.builtin import simple_robot, write_builtin
from vla_envs.tasks import SUITES, get_task, num_tasks

ALL = [(suite, task_id) for suite in SUITES for task_id in range(num_tasks(suite))]
# One of each kind of scene; together they hold every object and fixture.
FEW = [
    ("LiberoSpatial", 0),
    ("LiberoObject", 3),
    ("Libero10", 0),
    ("Libero10", 2),
    ("Libero10", 3),
    ("Libero10", 9),
    ("Libero90", 40),
    ("Libero90", 60),
    ("Libero90", 81),
    ("Libero90", 86),
]
# What a collision, a step or LIBERO's predicates depend on; of geoms those that can collide.
PHYSICS = {
    "body": "parentid jntnum dofnum mass subtreemass inertia invweight0 pos quat ipos iquat gravcomp",
    "jnt": "type qposadr dofadr bodyid limited solref solimp pos axis stiffness range margin",
    "dof": "bodyid armature damping frictionloss solref solimp invweight0 M0",
    "site": "type bodyid size pos quat",
    "geom": "type bodyid contype conaffinity condim priority solmix solref solimp size pos quat friction "
    "margin gap rbound aabb",
    "actuator": "gainprm biasprm ctrlrange forcerange gear",
}


def named(suite, task_id):
    """The problem class and the categories that a task's BDDL file names."""
    text = get_task(suite, task_id).bddl_file.read_text()
    sections = " ".join(re.findall(r"\(:(?:fixtures|objects)(.*?)\)", text, re.DOTALL))
    return {*re.findall(r"problem (\w+)", text), *re.findall(r"- (\w+)", sections)}


@pytest.fixture(scope="module")
def scene_xml(libero):
    """A function of a task and a folder of assets (else the built-in ones): the scene that LIBERO builds."""
    from libero.libero.envs.env_wrapper import ControlEnv

    builtin = libero._assets_path_cache

    def scene_xml(suite, task_id, assets=builtin):
        libero._assets_path_cache = assets
        try:
            bddl_file = str(get_task(suite, task_id).bddl_file)
            env = ControlEnv(bddl_file, use_camera_obs=False, has_offscreen_renderer=False)
            xml = env.env.model.get_xml()
            env.close()
        finally:
            libero._assets_path_cache = builtin
        return xml

    return scene_xml


def names(model, kind, chosen):
    address = getattr(model, "name_" + {"dof": "jnt"}.get(kind, kind) + "adr")
    if kind == "dof":
        address = address[model.dof_jntid]
    return [model.names[start : model.names.index(b"\0", start)] for start in address[chosen]]


def assert_same_physics(ours, theirs):
    for kind, fields in PHYSICS.items():
        mine, liberos = (
            model.geom_contype | model.geom_conaffinity != 0 if kind == "geom" else slice(None)
            for model in (ours, theirs)
        )
        assert names(ours, kind, mine) == names(theirs, kind, liberos)
        for field in fields.split():
            name = f"{kind}_{field}"
            assert np.array_equal(getattr(ours, name)[mine], getattr(theirs, name)[liberos]), name
    assert np.array_equal(ours.qpos0, theirs.qpos0)


def test_the_few_hold_everything():
    assert set.union(*(named(*task) for task in FEW)) == set.union(*(named(*task) for task in ALL))


@pytest.mark.parametrize(("suite", "task_id"), FEW)
def test_physics_is_liberos(real_assets, scene_xml, suite, task_id):
    ours = mujoco.MjModel.from_xml_string(simple_robot(scene_xml(suite, task_id)))
    theirs = mujoco.MjModel.from_xml_string(scene_xml(suite, task_id, real_assets))
    assert_same_physics(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "task_id"), ALL)
def test_physics_of_every_task_is_liberos(real_assets, scene_xml, suite, task_id):
    test_physics_is_liberos(real_assets, scene_xml, suite, task_id)


@pytest.mark.parametrize(("suite", "task_id"), FEW)
def test_everything_moving_is_drawn_and_cheap(scene_xml, suite, task_id):
    """Each object, drawer, door and knob has something of its own to see; nothing needs many triangles."""
    model = mujoco.MjModel.from_xml_string(simple_robot(scene_xml(suite, task_id)))
    drawn = set(model.geom_bodyid[(model.geom_group == 1) & (model.geom_rgba[:, 3] > 0)])
    for joint in range(model.njnt):
        body = model.jnt_bodyid[joint]
        inside = {b for b in range(model.nbody) if body in (b, model.body_parentid[b])}
        assert drawn & inside, model.joint(joint).name
    meshes = model.geom_dataid[(model.geom_group == 1) & (model.geom_dataid >= 0)]
    assert model.mesh_facenum[meshes].max() <= 1000
    assert model.ntexdata < 12 * 2**20


def test_the_stove_keeps_the_light_that_libero_switches(scene_xml):
    model = mujoco.MjModel.from_xml_string(scene_xml("LiberoGoal", 0))
    assert np.allclose(model.site("flat_stove_1_burner").rgba, [0.9, 0.05, 0.05, 1])


def test_every_file_that_a_scene_names_is_written(tmp_path):
    write_builtin(tmp_path)
    for path in tmp_path.rglob("*.xml"):
        for name in re.findall(r'file="([^"]*)"', path.read_text()):
            assert (path.parent / name).is_file(), name


def test_the_assets_are_small():
    assert sum(path.stat().st_size for path in PHYSICS_FILE.parent.iterdir() if path.is_file()) < 500_000


@pytest.mark.parametrize("changed", [False, True])
def test_check_compares_with_liberos_files(real_assets, tmp_path, changed):
    if changed:
        folder = tmp_path / "assets"
        folder.mkdir()
        for path in Path(real_assets).iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "articulated_objects").unlink()
        (folder / "articulated_objects").mkdir()
        for path in (Path(real_assets) / "articulated_objects").glob("*.xml"):
            text = path.read_text().replace('range="-2.094 0"', 'range="-2 0"')
            (folder / "articulated_objects" / path.name).write_text(text)
        real_assets = folder
    command = [sys.executable, "-m", "vla_envs.assets", "--check", str(real_assets)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=PHYSICS_FILE.parents[2], env=dict(os.environ)
    )
    assert result.returncode == changed
    assert re.findall("DIFFER +(.*)", result.stdout) == ["articulated_objects/microwave"] * changed
