"""Building a scene with LIBERO's own code, in a process of its own: ``python -m vla_envs.build_scene``.

In that process LIBERO may import what it likes and finds a configuration of its own, so that it never asks
the user a question and never touches an existing configuration.
"""

import contextlib
import copy
import json
import logging
import os
import pickle
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import mujoco
import numpy as np
from numpy.typing import NDArray

from vla_envs.assets.builtin import simple_robot, write_builtin
from vla_envs.assets.simplify import simplify
from vla_envs.distractors import thing_of
from vla_envs.goals import IN_REGION, JOINT, ON_OBJECT, ON_REGION, UP, UP_HEIGHT, order
from vla_envs.scene import Placement, assemble, digest, validate_init_states
from vla_envs.tasks import Task, libero_folder

ARENA_BYTES = (
    16 * 2**20
)  # contact memory per environment; it is virtual, and only what is used becomes resident
#: Init states for the evaluation of a task without recorded ones, as many as LIBERO has, and the branch of
#: random numbers that they are drawn from: a placement's seed never leads there.
FROZEN_STATES, EVALUATION = 50, 1
#: How all of LIBERO-Plus's new objects are turned when they are placed (``envs/objects/custom_objects.py``).
PLUS_ROTATION = {"x": (-np.pi / 2, -np.pi / 2), "y": (-np.pi, -np.pi), "z": (np.pi, np.pi)}


def _build(
    task: Task, states: NDArray[np.float64] | None, assets: str, quality: str, base: Path, scratch: Path
) -> None:
    """Build the scene with LIBERO's code and compile it; write ``base``.mjb and ``base``.json.

    Args:
        task: The task.
        states: Its ``recorded_init_states``, if any.
        assets: The folder of LIBERO's assets, or ``"builtin"``.
        quality: How they are rendered.
        base: The path of the two files, without their endings.
        scratch: A folder for temporary files.
    """
    write_libero_config(scratch)
    import_robosuite()
    import libero.libero

    folder = scratch / "assets" if assets == "builtin" else Path(assets)
    if assets == "builtin":
        write_builtin(folder)
    libero.libero._assets_path_cache = str(folder)
    for own in task.objects:
        place = scratch / "objects" / own.name
        place.mkdir(parents=True)
        for name, content in (("object.xml", own.xml.encode()), *own.files):
            (place / name).write_bytes(content)
        _register(own.name, place / "object.xml", (np.pi, np.pi), "x")  # none, in LIBERO's order
    for name, file in task.variant.objects if task.variant else ():
        _register(name, folder / file, PLUS_ROTATION, None)
    env = _liberos_env(task.bddl_file, _room(task))
    xml = env.model.get_xml()
    spec = mujoco.MjSpec.from_string(simple_robot(xml) if assets == "builtin" else xml)
    # Sparse algebra and no sensors give the same motion in less time. robosuite solves a substep's contacts
    # three times (it calls mj_forward twice before mj_step), each time from the last solution; we solve them
    # once, to the tolerance that robosuite reaches.
    spec.memory, spec.njmax, spec.nconmax = ARENA_BYTES, -1, -1
    spec.option.jacobian = mujoco.mjtJacobian.mjJAC_SPARSE
    spec.option.tolerance = 1e-12
    spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_SENSOR
    for fixture in env.fixtures:
        spec.body(fixture.root_body).mocap = True
    if assets == "builtin" or quality == "fast":
        rendering = spec.visual.quality
        rendering.offsamples = rendering.shadowsize = (
            0  # no shadow is rendered; a map of them takes 64 MB per renderer
        )
        rendering.numslices, rendering.numstacks, rendering.numquads = 12, 6, 1
    if assets == "builtin":
        spec.geom("floor").size[2] = 0.5  # m; spacing of the grid that renders the plane
    elif quality == "fast":
        simplify(spec, env.sim.model._model, env.sim.data.qpos, scratch)
    model = spec.compile()
    env.visualize({name: False for name in env._visualizations})  # hides sites, like LIBERO's reset
    model.site_rgba[:] = env.sim.model.site_rgba

    blob = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, blob)
    description = {
        "arm_qpos": [float(q) for q in env.robots[0].init_qpos],
        "goal": [
            _predicate(env, model, *words)
            for words in sorted(env.parsed_problem["goal_state"], key=lambda words: order(words[0]))
        ],
        **_placements(env, model, task.distractors),
        "joint_ranges": _joint_ranges(env, model),
        "burners": [
            (model.site(site).id, _address(model, env.get_object(name).joints), _turned_on(env, name)[0])
            for name in getattr(env, "visualization_sites_list", [])
            for site, _ in env.get_object(name).object_properties["vis_site_names"].values()
        ],
    }
    description["recorded"] = _recorded(task, states, model, description)
    description["sha256"] = digest(blob.tobytes(), description)
    # Files are written beside their place and then renamed, so that they are whole; the digest joins the two.
    for suffix, content in ((".mjb", blob.tobytes()), (".json", json.dumps(description).encode())):
        partial = Path(f"{base}{suffix}.partial")
        partial.write_bytes(content)
        os.replace(partial, f"{base}{suffix}")


def _register(name: str, file: Path, rotation: Any, rotation_axis: str | None) -> None:
    """Make the class of objects in an MJCF file one of LIBERO's (``envs/objects``).

    Args:
        name: The class's name.
        file: In robosuite's layout.
        rotation: How its objects are turned when they are placed (rad), as LIBERO's samplers take it.
        rotation_axis: About which axis; None where ``rotation`` says so.
    """
    from libero.libero.envs.base_object import OBJECTS_DICT
    from robosuite.models.objects import MujocoXMLObject

    class New(MujocoXMLObject):
        def __init__(self, name: str) -> None:
            joint = {"type": "free", "damping": "0.0005"}  # as all of LIBERO's
            super().__init__(str(file), name, joints=[joint], duplicate_collision_geoms=False)
            self.category_name = kind
            self.object_properties: dict[str, Any] = {"vis_site_names": {}}
            self.rotation, self.rotation_axis = rotation, rotation_axis

        def _get_object_subtree(self) -> Any:
            outer = self.worldbody.find("./body")
            if outer.get("name") == "object":  # LIBERO-Plus takes such files, too; robosuite looks inside
                outer.append(copy.deepcopy(outer))
            return super()._get_object_subtree()

    kind = name
    OBJECTS_DICT[name] = New


def _room(task: Task) -> dict[str, Any]:
    """What LIBERO's environment is told about a room that LIBERO-Plus draws differently."""
    if task.variant is None or task.variant.room is None:
        return {}
    from libero.libero.envs.arenas.style import STYLE_MAPPING

    scene, floor, wall = task.variant.room
    STYLE_MAPPING["floor"][floor], STYLE_MAPPING["wall"][wall] = floor, wall  # styles named as their files
    properties = {"scene_properties": {"floor_style": floor, "wall_style": wall}}
    return properties | ({"scene_xml": scene} if scene else {})


def _liberos_env(bddl_file: Path, room: dict[str, Any]) -> Any:
    """LIBERO's own environment, reset; always to the same placements, in which meshes are simplified.

    Args:
        bddl_file: The task's.
        room: What LIBERO's problem classes take besides.

    Raises:
        ValueError: When things find no free place.
    """
    from libero.libero.envs.env_wrapper import ControlEnv
    from robosuite.utils.errors import RandomizationError

    for seed in range(10):
        np.random.seed(seed)  # noqa: NPY002  (what LIBERO places things with)
        with contextlib.suppress(RandomizationError):
            return ControlEnv(str(bddl_file), use_camera_obs=False, has_offscreen_renderer=False, **room).env
    raise ValueError("its things found no free place in their regions; expected larger ones")


def _recorded(
    task: Task, states: NDArray[np.float64] | None, model: mujoco.MjModel, description: dict[str, Any]
) -> list[list[float]]:
    """The task's recorded init states (S, nq), or ones drawn now that training never sees."""
    if states is None:
        scene = assemble(task, model, description | {"recorded": []})
        streams = np.random.SeedSequence(0, spawn_key=(EVALUATION,)).spawn(FROZEN_STATES)
        return [scene.sample_init_state(np.random.default_rng(stream)).tolist() for stream in streams]
    further = len(task.distractors)  # they are in no recorded state; each has 7 positions and 6 velocities
    validate_init_states(task, states, 1 + model.nq + model.nv - 13 * further)
    own = np.ones(model.nq, bool)
    for item in description["distractors"]:
        start = model.jnt_qposadr[model.body_jntadr[item["body"]]]
        own[start : start + 7] = False
    recorded = np.tile(model.qpos0, (len(states), 1))
    recorded[:, own] = states[:, 1 : 1 + own.sum()]
    return recorded.tolist()


def _address(model: mujoco.MjModel, joints: list[str]) -> int:
    """Address in qpos of the one joint of a drawer, door or knob."""
    (joint,) = joints
    return int(model.joint(joint).qposadr[0])


def _turned_on(env: Any, name: str) -> list[float]:
    """Threshold and direction of a stove's ``turn_on``, which also holds at the threshold itself."""
    ranges = env.get_object(name).object_properties["articulation"]["default_turnon_ranges"]
    return [float(np.nextafter(min(ranges), -np.inf)), 1.0, 0.0]


def _predicate(
    env: Any, model: mujoco.MjModel, predicate: str, subject: str, target: str = ""
) -> dict[str, Any]:
    """One predicate of LIBERO's goal in the terms of `Goal`."""
    thing = env.get_object(subject)
    contact: list[list[int]] = [[], []]

    def geoms(item: Any) -> list[int]:
        return [model.geom(name).id for name in item.contact_geoms]

    if predicate in ("open", "close", "turnon", "turnoff"):
        region = subject in env.object_sites_dict
        part = env.get_object(thing.parent_name) if region else thing
        ranges = part.object_properties["articulation"].get(f"default_{predicate}_ranges")
        if predicate == "turnon":
            parameters = _turned_on(env, subject)
        elif predicate == "turnoff":
            parameters = [float(max(ranges)), -1.0, 0.0]
        else:  # some joints open upwards and others downwards, so ask LIBERO
            holds = getattr(part, f"is_{predicate}")
            parameters = [float(min(ranges)), 1.0, 0.0] if holds(10.0) else [float(max(ranges)), -1.0, 0.0]
        body = int(model.jnt_bodyid[model.joint(thing.joints[0]).id])
        return {
            "kind": JOINT, "subject": body, "target": _address(model, thing.joints), "parameters": parameters,
            "contact": contact,
        }  # fmt: skip
    body = model.body(thing.root_body).id
    if predicate == "up":
        return {"kind": UP, "subject": body, "target": body, "parameters": [UP_HEIGHT, 0.0, 0.0],
                "contact": contact}  # fmt: skip
    if target in env.object_sites_dict:
        region = env.object_sites_dict[target]
        kind = {"in": IN_REGION, "on": ON_REGION}[predicate]
        if kind == ON_REGION and region.parent_name is not None:
            contact = [geoms(env.get_object(region.parent_name)), geoms(thing)]
        parameters, target_id = [float(x) for x in region.size], model.site(target).id
    elif predicate == "on":
        kind, parameters, target_id = (
            ON_OBJECT,
            [0.0, 0.0, 0.0],
            model.body(env.get_object(target).root_body).id,
        )
        contact = [geoms(env.get_object(target)), geoms(thing)]
    else:
        raise ValueError(f"the goal predicate {predicate} {subject} {target} is unknown")
    return {"kind": kind, "subject": body, "target": target_id, "parameters": parameters, "contact": contact}


def _placements(
    env: Any, model: mujoco.MjModel, distractors: tuple[str, ...]
) -> dict[str, list[dict[str, Any]]]:
    """What LIBERO's placement samplers are told, in the order in which they place.

    Those of the classes ``distractors`` are apart, so that the task's own are the same as without them.
    """
    from libero.libero.envs.regions.base_region_sampler import InSiteRegionRandomSampler

    placements: list[Placement] = []
    kinds = {thing_of(kind): kind for kind in distractors}
    further: list[Placement] = []
    for initializer in (
        env.placement_initializer,
        env.conditional_placement_initializer,
        env.conditional_placement_on_objects_initializer,
    ):
        for key, sampler in initializer.samplers.items():
            (item,) = sampler.mujoco_objects
            arguments = initializer.sample_args[key] or {}
            rotation = sampler.rotation
            if not isinstance(rotation, dict):
                rotation = {sampler.rotation_axis: rotation}
            limits = {
                axis: (0.0, 2 * np.pi) if angle is None else (np.min(angle), np.max(angle))
                for axis, angle in rotation.items()
            }
            names = [placement.name for placement in placements]
            reference, inside = arguments.get("reference"), sampler.ensure_object_boundary_in_range
            origin = np.zeros(3) if reference else np.asarray(sampler.reference_pos, float)
            if isinstance(
                sampler, InSiteRegionRandomSampler
            ):  # in a drawer: there is no margin, and objects lie below its top
                inside, origin[2] = False, -placements[names.index(str(reference))].top
            (further if item.name in kinds else placements).append(
                Placement(
                    name=kinds.get(item.name, item.name),
                    body=model.body(item.root_body).id,
                    reference=-1 if reference is None else names.index(reference),
                    site=model.site(arguments["site_name"]).id if "site_name" in arguments else -1,
                    x_ranges=(
                        np.array(sampler.x_ranges) + (reference is None) * sampler.reference_pos[0]
                    ).tolist(),
                    y_ranges=(
                        np.array(sampler.y_ranges) + (reference is None) * sampler.reference_pos[1]
                    ).tolist(),
                    margin=float(item.horizontal_radius) if inside else 0.0,
                    rotation=[(axis, float(low), float(high)) for axis, (low, high) in limits.items()],
                    z=float(sampler.z_offset + origin[2]),
                    apart=bool(sampler.ensure_valid_placement),
                    radius=float(item.horizontal_radius),
                    bottom=float(item.bottom_offset[2]),
                    top=float(item.top_offset[2]),
                )
            )
    return {
        "placements": [vars(placement) for placement in placements],
        "distractors": [vars(placement) for placement in further],
    }


def _joint_ranges(env: Any, model: mujoco.MjModel) -> list[tuple[int, float, float]]:
    """How far LIBERO opens each drawer, door and knob at a reset, as (address in qpos, low, high)."""
    return [
        (_address(model, env.get_object(sampler.name).joints), float(low), float(high))
        for sampler in env.object_property_initializers
        for low, high in [sampler.joint_ranges]
    ]


def write_libero_config(folder: Path) -> None:
    """Write LIBERO's ``config.yaml`` into ``folder``, so that its import finds one and asks no question."""
    root = libero_folder()
    entries = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": root.parent / "datasets",
        "assets": root / "assets",
    }
    (folder / "config.yaml").write_text(
        "".join(f"{key}: {json.dumps(str(value))}\n" for key, value in entries.items())
    )


def import_robosuite() -> None:
    """Import robosuite without its log file, which may belong to another user."""
    with mock.patch("logging.FileHandler", lambda path: logging.NullHandler()):
        import robosuite  # noqa: F401


if __name__ == "__main__":
    assets_argument, quality_argument, *paths = sys.argv[1:]
    base_path, scratch_path = map(Path, paths)
    to_build, its_states = pickle.loads((scratch_path / "task.pickle").read_bytes())  # from vla_envs.scene
    _build(to_build, its_states, assets_argument, quality_argument, base_path, scratch_path)
