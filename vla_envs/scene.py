"""A task and its assets, compiled to one MuJoCo model and cached on disk.

LIBERO's own code builds the scene and parses the goal. It runs once a scene, in a process of its own:
there it may import what it likes and find its own configuration, so that the user's process is never
prompted and an existing LIBERO configuration is never touched.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import WeakValueDictionary

import filelock
import mujoco
import numpy as np
from numpy.typing import NDArray

from vla_envs.control import Arm
from vla_envs.goals import IN_REGION, JOINT, ON_OBJECT, ON_REGION, Goal, turn
from vla_envs.machine import cache_folder
from vla_envs.real_assets import QUALITIES, check_files, resolve_assets, simplify
from vla_envs.tasks import Task, get_task, libero_folder, nearest, recorded_init_states

MUJOCO_VERSION = "3.3.2"  # later versions draw LIBERO's floors darker and break a LIBERO-Spatial task
BUILD_TIMEOUT_S = 300
ARM_NOISE = 0.02  # rad, standard deviation of the arm's joints in LIBERO's recorded init states
GRIPPER_QPOS = (0.020833, -0.020833)  # m, robosuite/models/grippers/panda_gripper.py
BUILD_FILES = ("scene.py", "goals.py", "assets.py", "real_assets.py", "looks.py", "figures.json")
ARENA_BYTES = 16 * 2**20  # contact memory of one environment (virtual: only what is used is resident)


@dataclass(frozen=True)
class Placement:
    """Where LIBERO may place one object or fixture: figures of its samplers (``envs/regions``)."""

    name: str
    body: int  # body in the model
    reference: int  # the placement that it is put on or in; -1 for none
    site: int  # the region of the reference that it is put on or in; -1 for none
    x_ranges: list[list[float]]  # m
    y_ranges: list[list[float]]  # m
    margin: float  # m, taken off both ends of a range
    rotation: list[tuple[str, float, float]]  # axis, low and high (rad), applied in this order
    z: float  # m, height of the reference plane, LIBERO's z offset included
    apart: bool  # whether it must keep clear of what was placed before
    radius: float  # m
    bottom: float  # m, from the object's origin
    top: float  # m


@dataclass(frozen=True)
class Scene:
    """One compiled task; shared by all environments that play it.

    A state of a scene is an array ``(nq + 7 * nmocap,)``: LIBERO's joint positions, then the pose of each
    fixture (position, m; unit quaternion, w first). Fixtures are MuJoCo's mocap bodies, so that
    environments with fixtures in different places share one model.
    """

    task: Task
    model: mujoco.MjModel
    arm: Arm
    goal: Goal
    placements: tuple[Placement, ...]
    joint_ranges: tuple[tuple[int, float, float], ...]  # address in qpos, low, high: drawers, doors, knobs
    burners: tuple[tuple[int, int, float], ...]  # site, address in qpos of the knob, and where it turns on
    recorded: NDArray[np.float64]  # (50, nq), joint positions of LIBERO's recorded init states

    def sample_init_state(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """A state drawn as LIBERO draws them: everything in its BDDL regions, a noisy arm; not yet settled.

        The distribution is that of the recorded init states (LIBERO's ``_reset_internal`` and robosuite's
        gaussian ``initialization_noise``).
        """
        qpos = self.model.qpos0.copy()
        qpos[:7] = self.arm.reset_qpos + ARM_NOISE * rng.standard_normal(7)
        qpos[7:9] = GRIPPER_QPOS
        for address, low, high in self.joint_ranges:
            qpos[address] = low + (high - low) * rng.random()
        return self._place(qpos, rng)

    def recorded_init_state(self, state_id: int) -> NDArray[np.float64]:
        """LIBERO's recorded state ``state_id``, with the fixtures in the middle of their regions.

        LIBERO's files hold joint positions alone: where the fixtures stood is not recorded.
        """
        return np.append(self.recorded[state_id], self._place(self.model.qpos0.copy(), None)[self.model.nq :])

    def _place(self, qpos: NDArray[np.float64], rng: np.random.Generator | None) -> NDArray[np.float64]:
        """The state with everything placed at random, or without ``rng`` in the middle of its region."""
        model = self.model
        sites = self._region_positions(qpos)
        fixtures = np.concatenate([model.body_pos, model.body_quat], axis=1)[model.body_mocapid >= 0]
        placed: list[tuple[NDArray[np.float64], NDArray[np.float64], Placement]] = []
        for item in self.placements:
            base = np.array([0.0, 0.0, item.z])
            if item.reference >= 0:
                position, quat, below = placed[item.reference]
                base = base + position + [0.0, 0.0, below.top]
                if item.site >= 0:
                    offset = np.empty(3)
                    mujoco.mju_rotVecQuat(offset, sites[item.site], quat / np.linalg.norm(quat))
                    base = base + offset
            base[2] -= item.bottom
            for _ in range(5000):
                k = rng.integers(len(item.x_ranges)) if rng else 0
                # LIBERO keeps the object's radius inside the region, also where that turns the range round.
                low = np.array([item.x_ranges[k][0], item.y_ranges[k][0]]) + item.margin
                high = np.array([item.x_ranges[k][1], item.y_ranges[k][1]]) - item.margin
                position = base.copy()
                position[:2] += low + (high - low) * (rng.random(2) if rng else 0.5)
                if (
                    not rng
                    or not item.apart
                    or not any(
                        np.hypot(*(position - other)[:2]) <= item.radius + figures.radius
                        and position[2] - other[2] <= figures.top - item.bottom
                        for other, _, figures in placed
                    )
                ):
                    break
            else:
                raise RuntimeError(f"no free place for {item.name} of {self.task.name} after 5000 tries")
            quat = _sample_quat(item.rotation, rng)
            if model.body_mocapid[item.body] >= 0:
                quat = np.roll(quat, 1)  # LIBERO's samplers turn fixtures rightly, wxyz
                fixtures[model.body_mocapid[item.body]] = np.append(position, quat)
            else:
                start = model.jnt_qposadr[model.body_jntadr[item.body]]
                qpos[start : start + 7] = np.append(position, quat)
            placed.append((position, quat, item))
        return np.append(qpos, fixtures)

    def _region_positions(self, qpos: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where the sites are ``(nsite, 3)``, fixtures at the origin and drawers as in ``qpos``."""
        if all(item.site < 0 for item in self.placements):
            return np.empty((0, 3))
        data = mujoco.MjData(self.model)
        data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, data)
        return data.site_xpos


def _sample_quat(
    rotation: list[tuple[str, float, float]], rng: np.random.Generator | None
) -> NDArray[np.float64]:
    """LIBERO's ``TableRegionSampler._sample_quat``: products of xyzw quaternions, stored as they are."""
    x0, y0, z0, w0 = 0.0, 0.0, 0.0, 1.0
    for axis, low, high in rotation:
        angle = low + (high - low) * (rng.random() if rng else 0.5)
        s, w1 = np.sin(angle / 2), np.cos(angle / 2)
        x1, y1, z1 = (s if axis == name else 0.0 for name in "xyz")
        x0, y0, z0, w0 = (
            x1 * w0 + y1 * z0 - z1 * y0 + w1 * x0,
            -x1 * z0 + y1 * w0 + z1 * x0 + w1 * y0,
            x1 * y0 - y1 * x0 + z1 * w0 + w1 * z0,
            -x1 * x0 - y1 * y0 - z1 * z0 + w1 * w0,
        )
    return np.array([x0, y0, z0, w0])


def check_versions() -> None:
    """Refuse a MuJoCo that changes what a policy sees.

    Raises:
        ImportError: When the installed version is not the pinned one.
    """
    if mujoco.__version__ != MUJOCO_VERSION:
        raise ImportError(
            f"mujoco {mujoco.__version__} is installed; expected {MUJOCO_VERSION}, because others change "
            f"pictures and physics of LIBERO: pip install mujoco=={MUJOCO_VERSION}"
        )


def _key(task: Task, assets: str, quality: str) -> str:
    """A digest of everything that shapes the compiled scene."""
    digest = hashlib.sha256()
    for package in ("mujoco", "robosuite", "hf-libero"):
        digest.update(f"{package}={importlib.metadata.version(package)};".encode())
    here = Path(__file__).parent
    for path in (*(here / name for name in BUILD_FILES), task.bddl_file, task.init_states_file):
        digest.update(path.read_bytes())
    digest.update(f"{assets};{quality}".encode())
    if assets != "builtin":
        for path in sorted(Path(assets).rglob("*")):
            status = path.stat()
            digest.update(f"{path}:{status.st_size}:{status.st_mtime_ns};".encode())
    return digest.hexdigest()[:32]


def load_scene(
    suite: str, task_id: int, assets: str = "builtin", quality: str = "exact", cache: bool = True
) -> Scene:
    """The compiled scene of a task: the one in use, from the cache on disk, or built now.

    Args:
        suite: Suite of the task.
        task_id: Task in the suite, from 0.
        assets: ``"builtin"``, ``"libero"`` or a folder of LIBERO's assets.
        quality: Of LIBERO's assets, ``"exact"`` (its own pixels) or ``"fast"`` (simplified meshes, no
            multisampling). The built-in assets have one quality; there it changes nothing.
        cache: Whether to read and write the cache on disk; if not, a scene that is not in use is built now.

    Raises:
        ValueError: When the task, the assets or the quality do not exist, or files of the assets are
            missing or damaged.
        RuntimeError: When LIBERO's code cannot build the scene; the message ends with its last words.
    """
    check_versions()
    if not isinstance(quality, str) or quality not in QUALITIES:
        expected = " or ".join(map(repr, QUALITIES))
        raise ValueError(
            f"quality is {quality!r}; expected {expected}{nearest(str(quality), list(QUALITIES))}"
        )
    task, assets = get_task(suite, task_id), resolve_assets(assets)
    return _load(task, assets, "exact" if assets == "builtin" else quality, cache)


#: Every scene that somebody holds: two environments of a task share one, however many scenes are open.
_in_use: WeakValueDictionary[tuple[Any, ...], Scene] = WeakValueDictionary()


@lru_cache(maxsize=8)  # to open the last ones again costs nothing; LIBERO's own assets take 20 to 230 MB each
def _load(task: Task, assets: str, quality: str, cache: bool) -> Scene:
    key = (task, assets, quality, cache)
    scene = _in_use.get(key)
    if scene is None:
        scene = _in_use[key] = _read_or_build(task, assets, quality, cache)
    return scene


def _read_or_build(task: Task, assets: str, quality: str, cache: bool) -> Scene:
    with contextlib.ExitStack() as stack:
        if cache:
            folder = cache_folder()
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vla_envs-")))
        base = folder / f"{task.suite}_{task.task_id}_{_key(task, assets, quality)}"
        stack.enter_context(filelock.FileLock(f"{base}.lock"))
        cached = _read(base)
        if cached is None:
            _build_in_child(task, assets, quality, base)
            cached = _read(base)
    if cached is None:
        raise RuntimeError(f"the compiled scene at {base}.mjb cannot be read back")
    model, facts = cached
    return Scene(
        task=task,
        model=model,
        arm=Arm.of(model, np.array(facts["arm_qpos"])),
        goal=_goal(model, facts["goal"]),
        placements=tuple(Placement(**item) for item in facts["placements"]),
        joint_ranges=tuple(tuple(item) for item in facts["joint_ranges"]),
        burners=tuple(tuple(item) for item in facts["burners"]),
        recorded=np.array(facts["recorded"]),
    )


def _goal(model: mujoco.MjModel, predicates: list[dict[str, Any]]) -> Goal:
    """The goal behind the cached figures of its predicates."""
    contact = np.zeros((len(predicates), 2, model.ngeom), bool)
    for k, predicate in enumerate(predicates):
        for side, geoms in enumerate(predicate["contact"]):
            contact[k, side, geoms] = True
    kind, subject, target, figures = (
        np.array([predicate[name] for predicate in predicates]) for name in Goal._fields[:4]
    )
    return Goal(kind, subject, target, figures, contact)


def _read(base: Path) -> tuple[mujoco.MjModel, dict[str, Any]] | None:
    """Model and facts from the cache, or nothing when they are absent, incomplete or damaged."""
    try:
        facts = json.loads(Path(f"{base}.json").read_text())
        blob = Path(f"{base}.mjb").read_bytes()
        if facts.pop("sha256") != _digest(blob, facts):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return mujoco.MjModel.from_binary_path("scene.mjb", {"scene.mjb": blob}), facts


def _digest(blob: bytes, facts: dict[str, Any]) -> str:
    """Of a compiled model and of all that is stored beside it."""
    return hashlib.sha256(blob + json.dumps(facts).encode()).hexdigest()


def _build_in_child(task: Task, assets: str, quality: str, base: Path) -> None:
    if assets != "builtin":
        check_files(Path(assets), task.bddl_file)
    print(
        f"Building the scene of {task.suite} task {task.task_id}; once, about 10 s.",
        file=sys.stderr,
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="vla_envs-") as scratch:
        command = [
            sys.executable,
            "-m",
            "vla_envs.scene",
            task.suite,
            str(task.task_id),
            assets,
            quality,
            str(base),
            scratch,
        ]
        environment = {**os.environ, "LIBERO_CONFIG_PATH": scratch}
        path = [str(Path(__file__).parent.parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        try:
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=BUILD_TIMEOUT_S,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"LIBERO did not build {task.name} within {BUILD_TIMEOUT_S} s") from None
    if result.returncode:
        words = result.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"LIBERO could not build {task.name}: {words[-1]}")


def _build(task: Task, assets: str, quality: str, base: Path, scratch: Path) -> None:
    """Build and compile the scene with LIBERO's code (in the child process); write ``base``.mjb and .json."""
    write_libero_config(scratch)
    import_robosuite()
    import libero.libero
    from libero.libero.envs.env_wrapper import ControlEnv

    from vla_envs.assets import simple_robot, write_builtin

    folder = scratch / "assets" if assets == "builtin" else Path(assets)
    if assets == "builtin":
        write_builtin(folder)
    libero.libero._assets_path_cache = str(folder)
    env = ControlEnv(str(task.bddl_file), use_camera_obs=False, has_offscreen_renderer=False).env
    xml = env.model.get_xml()
    spec = mujoco.MjSpec.from_string(simple_robot(xml) if assets == "builtin" else xml)
    # The same motion in less time: sparse algebra and no sensors. robosuite solves every substep's contacts
    # three times (two calls of mj_forward before mj_step), each from the last solution; we solve them once,
    # to the tolerance that it ends at.
    spec.memory, spec.njmax, spec.nconmax = ARENA_BYTES, -1, -1
    spec.option.jacobian = mujoco.mjtJacobian.mjJAC_SPARSE
    spec.option.tolerance = 1e-12
    spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_SENSOR
    for fixture in env.fixtures:
        spec.body(fixture.root_body).mocap = True
    if assets == "builtin" or quality == "fast":
        look = spec.visual.quality
        look.offsamples = look.shadowsize = 0  # no shadow is drawn; a map of them takes 64 MB a renderer
        look.numslices, look.numstacks, look.numquads = 12, 6, 1
    if assets == "builtin":
        spec.geom("floor").size[2] = 0.5  # m, spacing of the grid that the plane is drawn with
    elif quality == "fast":
        simplify(spec, env.sim.model._model, env.sim.data.qpos, scratch)
    model = spec.compile()
    env.visualize({name: False for name in env._visualizations})  # hides sites, as LIBERO's reset does
    model.site_rgba[:] = env.sim.model.site_rgba

    blob = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, blob)
    facts = {
        "arm_qpos": [float(q) for q in env.robots[0].init_qpos],
        "goal": [
            _predicate(env, model, *words)
            for words in sorted(env.parsed_problem["goal_state"], key=lambda words: turn(words[0]))
        ],
        "placements": _placements(env, model),
        "joint_ranges": _joint_ranges(env, model),
        "burners": [
            (model.site(site).id, _address(model, env.get_object(name).joints), _turned_on(env, name)[0])
            for name in getattr(env, "visualization_sites_list", [])
            for site, _ in env.get_object(name).object_properties["vis_site_names"].values()
        ],
        "recorded": recorded_init_states(task)[:, 1 : 1 + model.nq].tolist(),
    }
    facts["sha256"] = _digest(blob.tobytes(), facts)
    # Whole files only: written beside their place, then renamed; the digest ties the two together.
    for suffix, content in ((".mjb", blob.tobytes()), (".json", json.dumps(facts).encode())):
        partial = Path(f"{base}{suffix}.partial")
        partial.write_bytes(content)
        os.replace(partial, f"{base}{suffix}")


def _address(model: mujoco.MjModel, joints: list[str]) -> int:
    """Address in qpos of the one joint of a drawer, door or knob."""
    (joint,) = joints
    return int(model.joint(joint).qposadr[0])


def _turned_on(env: Any, name: str) -> list[float]:
    """Threshold and direction of a stove's ``turn_on``, which holds at the threshold itself too."""
    ranges = env.get_object(name).object_properties["articulation"]["default_turnon_ranges"]
    return [float(np.nextafter(min(ranges), -np.inf)), 1.0, 0.0]


def _predicate(
    env: Any, model: mujoco.MjModel, predicate: str, subject: str, target: str = ""
) -> dict[str, Any]:
    """One predicate of LIBERO's goal as the figures of `Goal`."""
    thing = env.get_object(subject)
    contact: list[list[int]] = [[], []]

    def geoms(item: Any) -> list[int]:
        return [model.geom(name).id for name in item.contact_geoms]

    if predicate in ("open", "close", "turnon", "turnoff"):
        region = subject in env.object_sites_dict
        part = env.get_object(thing.parent_name) if region else thing
        ranges = part.object_properties["articulation"].get(f"default_{predicate}_ranges")
        if predicate == "turnon":
            figures = _turned_on(env, subject)
        elif predicate == "turnoff":
            figures = [float(max(ranges)), -1.0, 0.0]
        else:  # some joints open upwards, others downwards: ask
            holds = getattr(part, f"is_{predicate}")
            figures = [float(min(ranges)), 1.0, 0.0] if holds(10.0) else [float(max(ranges)), -1.0, 0.0]
        body = int(model.jnt_bodyid[model.joint(thing.joints[0]).id])
        return {
            "kind": JOINT, "subject": body, "target": _address(model, thing.joints), "figures": figures,
            "contact": contact,
        }  # fmt: skip
    body = model.body(thing.root_body).id
    if target in env.object_sites_dict:
        region = env.object_sites_dict[target]
        kind = {"in": IN_REGION, "on": ON_REGION}[predicate]
        if kind == ON_REGION and region.parent_name is not None:
            contact = [geoms(env.get_object(region.parent_name)), geoms(thing)]
        figures, target_id = [float(x) for x in region.size], model.site(target).id
    elif predicate == "on":
        kind, figures, target_id = ON_OBJECT, [0.0, 0.0, 0.0], model.body(env.get_object(target).root_body).id
        contact = [geoms(env.get_object(target)), geoms(thing)]
    else:
        raise ValueError(f"the goal predicate {predicate} {subject} {target} is unknown")
    return {"kind": kind, "subject": body, "target": target_id, "figures": figures, "contact": contact}


def _placements(env: Any, model: mujoco.MjModel) -> list[dict[str, Any]]:
    """The figures of LIBERO's placement samplers, in the order in which they place."""
    from libero.libero.envs.regions.base_region_sampler import InSiteRegionRandomSampler

    placements: list[Placement] = []
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
            if isinstance(sampler, InSiteRegionRandomSampler):  # in a drawer: neither a margin nor on its top
                inside, origin[2] = False, -placements[names.index(str(reference))].top
            placements.append(
                Placement(
                    name=item.name,
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
    return [vars(placement) for placement in placements]


def _joint_ranges(env: Any, model: mujoco.MjModel) -> list[tuple[int, float, float]]:
    """How far LIBERO opens each drawer, door and knob at a reset: address in qpos, low, high."""
    return [
        (_address(model, env.get_object(sampler.name).joints), float(low), float(high))
        for sampler in env.object_property_initializers
        for low, high in [sampler.joint_ranges]
    ]


def write_libero_config(folder: Path) -> None:
    """Write LIBERO's ``config.yaml`` into ``folder``, so that its import finds one and asks nothing."""
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
    """Import robosuite without its log: /tmp/robosuite.log may be another user's."""
    with mock.patch("logging.FileHandler", lambda path: logging.NullHandler()):
        import robosuite  # noqa: F401


if __name__ == "__main__":
    suite_name, number, assets_argument, quality_argument, *paths = sys.argv[1:]
    base_path, scratch_path = map(Path, paths)
    _build(get_task(suite_name, int(number)), assets_argument, quality_argument, base_path, scratch_path)
