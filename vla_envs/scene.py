"""A task and its assets, compiled to one MuJoCo model and cached on disk.

LIBERO's own code builds the scene and parses the goal once (``vla_envs.build_scene``).
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import filelock
import mujoco
import numpy as np
from numpy.typing import NDArray

from vla_envs import bddl
from vla_envs.assets.libero import QUALITIES, resolve_assets, verify_files
from vla_envs.bddl import KINDS
from vla_envs.control import Arm
from vla_envs.goals import Goal
from vla_envs.inputs import nearest
from vla_envs.looks import Parts, parts_of
from vla_envs.machine import cache_folder
from vla_envs.tasks import SUITES, Task, get_task, recorded_init_states

Moves: TypeAlias = Mapping[str, Sequence[float]]
MUJOCO_VERSION = "3.3.2"  # later versions draw LIBERO's floors darker and break a LIBERO-Spatial task
BUILD_TIMEOUT_S = 300
PLACEMENT_TRIES = 5000  # LIBERO's
SHORTENINGS = 15  # of moves that leave no free place, until nothing is moved
ARM_NOISE = 0.02  # rad; standard deviation of the arm's joints in LIBERO's recorded init states
GRIPPER_QPOS = (0.020833, -0.020833)  # m, robosuite/models/grippers/panda_gripper.py
BUILD_FILES = (
    "build_scene.py", "control.py", "goals.py", "assets/appearance.py", "assets/builtin.py",
    "assets/physics.json", "assets/simplify.py",
)  # fmt: skip


class NoFreePlaceError(RuntimeError):
    """The thing ``name`` cannot be placed without touching another."""

    def __init__(self, name: str, words: str) -> None:
        super().__init__(f"{name} {words}")
        self.name = name


@dataclass(frozen=True)
class Placement:
    """Where LIBERO may place one object or fixture, as its samplers say (``envs/regions``)."""

    name: str
    body: int  # body in the model
    reference: int  # the placement that it goes on or in; -1 for none
    site: int  # the region of the reference that it goes on or in; -1 for none
    x_ranges: list[list[float]]  # m
    y_ranges: list[list[float]]  # m
    margin: float  # m that are taken off both ends of a range
    rotation: list[tuple[str, float, float]]  # axis, low and high (rad), applied in this order
    z: float  # m; height of the reference plane, including LIBERO's z offset
    apart: bool  # whether it must not touch what was placed before
    radius: float  # m
    bottom: float  # m from the object's origin
    top: float  # m from the object's origin

    def upright(self) -> NDArray[np.float64]:
        """The unit quaternion (4,) in the middle of its rotations, as MuJoCo and LIBERO place things."""
        return _sample_quat(self.rotation, None)


@dataclass(frozen=True)
class Scene:
    """One compiled task, which all environments that play it share.

    An init state is an array ``(nq + 7 * nmocap,)``: LIBERO's joint positions, then the pose of each fixture
    (position in m, then unit quaternion with w first). Fixtures are MuJoCo's mocap bodies, so that
    environments with fixtures in different places share one model.
    """

    task: Task
    model: mujoco.MjModel
    arm: Arm
    goal: Goal
    placements: tuple[Placement, ...]
    joint_ranges: tuple[
        tuple[int, float, float], ...
    ]  # address in qpos, low, high of drawers, doors and knobs
    burners: tuple[tuple[int, int, float], ...]  # site, address in qpos of its knob, where it turns on
    recorded: NDArray[np.float64]  # (S, nq) recorded joint positions, LIBERO has S = 50; or whole init states
    distractors: tuple[Placement, ...] = ()  # of further objects, named by their class (vla_envs.distractors)

    @cached_property
    def movable(self) -> tuple[str, ...]:
        """The objects that stand on the room's surface, and not on one another."""
        mocap = self.model.body_mocapid
        return tuple(item.name for item in self.placements if item.reference < 0 and mocap[item.body] < 0)

    def clip_arm(self, qpos: NDArray[np.float64]) -> NDArray[np.float64]:
        """The arm's joints (7,), within their ranges (rad)."""
        low, high = self.model.jnt_range[:7].T
        return np.clip(qpos, low, high)

    @cached_property
    def parts(self) -> Parts:
        """The parts of the background."""
        return parts_of(self.model)

    def sample_init_state(
        self, rng: np.random.Generator, moves: dict[str, list[float]] | None = None
    ) -> NDArray[np.float64]:
        """Sample an init state as LIBERO does, unsettled: everything in its BDDL region, and a noisy arm.

        The distribution is that of the recorded init states (LIBERO's ``_reset_internal`` and robosuite's
        Gaussian ``initialization_noise``).

        Args:
            rng: What decides.
            moves: How far the regions of ``movable`` objects are moved, x and y (m), by name. If that leaves
                no free place, they are halved in this dict until it does.
        """
        qpos = self.model.qpos0.copy()
        qpos[:7] = self.arm.reset_qpos + ARM_NOISE * rng.standard_normal(7)
        qpos[7:9] = GRIPPER_QPOS
        for address, low, high in self.joint_ranges:
            qpos[address] = low + (high - low) * rng.random()
        if not moves:
            return self._place(qpos, rng)
        start = rng.bit_generator.state

        def place(tries: int) -> NDArray[np.float64]:
            rng.bit_generator.state = start
            return self._place(qpos.copy(), rng, moves, tries)

        return self._with_room(place, moves)

    def moved(self, state: NDArray[np.float64], moves: dict[str, list[float]]) -> NDArray[np.float64]:
        """The init state with ``movable`` objects, and what stands on them, moved; ``moves`` as above."""
        if not moves:
            return state

        def place(tries: int) -> NDArray[np.float64]:
            other, shifts = state.copy(), list[NDArray[np.float64]]()
            for item in self.placements:
                own = np.array(moves.get(item.name, (0.0, 0.0)))
                shifts.append(own if item.reference < 0 else shifts[item.reference])
                if self.model.body_mocapid[item.body] < 0:
                    start = self.model.jnt_qposadr[self.model.body_jntadr[item.body]]
                    other[start : start + 2] += shifts[-1]
            return other

        return self._with_room(place, moves)

    def _with_room(
        self, place: Callable[[int], NDArray[np.float64]], moves: dict[str, list[float]]
    ) -> NDArray[np.float64]:
        """The first state of ``place``, called with how often to try, whose moves leave everything room."""
        for _ in range(SHORTENINGS):
            try:
                state = place(100)
                stuck = self._overlapping(state)
            except NoFreePlaceError as error:
                stuck = {error.name}
            if not stuck:
                return state
            _shorten(moves, stuck)
        moves.update({name: [0.0, 0.0] for name in moves})
        return place(PLACEMENT_TRIES)

    def pose(self, data: mujoco.MjData, state: NDArray[np.float64]) -> None:
        """Write an init state's joint positions, and where its fixtures stand, into ``data``."""
        data.qpos[:], fixtures = np.split(state, [self.model.nq])
        data.mocap_pos[:], data.mocap_quat[:] = np.split(fixtures.reshape(-1, 7), [3], axis=1)

    def _overlapping(self, state: NDArray[np.float64]) -> set[str]:
        """The things on the room's surface that are inside one another, and would be flung apart."""
        data = mujoco.MjData(self.model)
        self.pose(data, state)
        mujoco.mj_forward(self.model, data)
        names: dict[int, str] = {}  # of what each body stands on, by the body
        for item in self.placements:
            below = self.placements[item.reference].body if item.reference >= 0 else -1
            names[item.body] = names[below] if below in names else item.name
        deep = data.contact.geom[data.contact.dist < -5e-4]  # (n, 2)
        roots = self.model.body_rootid[self.model.geom_bodyid[deep]]
        pairs = [(names.get(one, ""), names.get(other, "")) for one, other in roots.tolist()]
        return {name for pair in pairs if all(pair) and pair[0] != pair[1] for name in pair}

    def recorded_init_state(self, state_id: int) -> NDArray[np.float64]:
        """The recorded init state ``state_id``, with the fixtures in the middle of their regions.

        LIBERO's files have only joint positions: they do not record where the fixtures stood.
        """
        if self.recorded.shape[1] > self.model.nq:  # drawn when the scene was built, so whole
            return self.recorded[state_id].copy()
        return np.append(self.recorded[state_id], self._place(self.model.qpos0.copy(), None)[self.model.nq :])

    def _place(
        self,
        qpos: NDArray[np.float64],
        rng: np.random.Generator | None,
        moves: Moves = MappingProxyType({}),
        tries: int = PLACEMENT_TRIES,
    ) -> NDArray[np.float64]:
        """The init state with everything at random or, without ``rng``, in the middle of its region."""
        model = self.model
        sites = self._region_positions(qpos)
        fixtures = np.concatenate([model.body_pos, model.body_quat], axis=1)[model.body_mocapid >= 0]
        placed: list[tuple[NDArray[np.float64], NDArray[np.float64], Placement]] = []
        for item in self.placements:
            base = np.array([0.0, 0.0, item.z])
            if item.reference >= 0:
                position, quat, support = placed[item.reference]
                base = base + position + [0.0, 0.0, support.top]
                if item.site >= 0:
                    offset = np.empty(3)
                    mujoco.mju_rotVecQuat(offset, sites[item.site], quat / np.linalg.norm(quat))
                    base = base + offset
            base[2] -= item.bottom
            base[:2] += moves.get(item.name, (0.0, 0.0))
            for _ in range(tries):
                k = rng.integers(len(item.x_ranges)) if rng else 0
                # LIBERO keeps the object's radius inside the region, even where that reverses the range.
                low = np.array([item.x_ranges[k][0], item.y_ranges[k][0]]) + item.margin
                high = np.array([item.x_ranges[k][1], item.y_ranges[k][1]]) - item.margin
                position = base.copy()
                position[:2] += low + (high - low) * (rng.random(2) if rng else 0.5)
                if (
                    not rng
                    or not item.apart
                    or not any(
                        np.hypot(*(position - place)[:2]) <= item.radius + other.radius
                        and position[2] - place[2] <= other.top - item.bottom
                        for place, _, other in placed
                    )
                ):
                    break
            else:
                words = f"of {self.task.name} found no free place in its region in {tries} tries"
                raise NoFreePlaceError(item.name, words)
            quat = _sample_quat(item.rotation, rng)
            if model.body_mocapid[item.body] >= 0:
                quat = np.roll(quat, 1)  # LIBERO's samplers give fixtures wxyz
                fixtures[model.body_mocapid[item.body]] = np.append(position, quat)
            else:
                start = model.jnt_qposadr[model.body_jntadr[item.body]]
                qpos[start : start + 7] = np.append(position, quat)
            placed.append((position, quat, item))
        return np.append(qpos, fixtures)

    def _region_positions(self, qpos: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where the sites are ``(nsite, 3)``, with fixtures at the origin and drawers as in ``qpos``."""
        if all(item.site < 0 for item in self.placements):
            return np.empty((0, 3))
        data = mujoco.MjData(self.model)
        data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, data)
        return data.site_xpos


def _shorten(moves: dict[str, list[float]], stuck: set[str]) -> None:
    """Halve the moves of things that are ``stuck``, or all moves if theirs are short already."""
    long = {name for name in stuck if np.hypot(*moves.get(name, (0.0, 0.0))) > 5e-3}
    for name in long or moves:
        moves[name] = [x / 2 for x in moves[name]]


def _sample_quat(
    rotation: list[tuple[str, float, float]], rng: np.random.Generator | None
) -> NDArray[np.float64]:
    """LIBERO's ``TableRegionSampler._sample_quat``: a product of xyzw quaternions, stored as they are."""
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


def boxes_around(
    model: mujoco.MjModel, data: mujoco.MjData, geoms: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and greatest corners (n, 3) of boxes around ``geoms``, upright in the world (m)."""
    turns, bounds = data.geom_xmat[geoms].reshape(-1, 3, 3), model.geom_aabb[geoms]  # in the geom's own frame
    extent = np.einsum("gij,gj->gi", np.abs(turns), bounds[:, 3:])
    middle = data.geom_xpos[geoms] + np.einsum("gij,gj->gi", turns, bounds[:, :3])
    return middle - extent, middle + extent


def require_mujoco() -> None:
    """Refuse a version of MuJoCo that changes what a policy sees.

    Raises:
        ImportError: When the installed version is not the pinned one.
    """
    if mujoco.__version__ != MUJOCO_VERSION:
        raise ImportError(
            f"mujoco {mujoco.__version__} is installed; expected {MUJOCO_VERSION}, because other versions "
            f"change LIBERO's images and physics: pip install mujoco=={MUJOCO_VERSION}"
        )


def _key(task: Task, assets: str, quality: str) -> str:
    """A digest of everything that shapes the compiled scene."""
    digest = hashlib.sha256()
    for package in ("mujoco", "robosuite", "hf-libero"):
        digest.update(f"{package}={importlib.metadata.version(package)};".encode())
    here = Path(__file__).parent
    for path in (here / name for name in BUILD_FILES):
        digest.update(path.read_bytes())
    if task.problem is None and task.init_states_file:
        for path in (task.bddl_file, task.init_states_file):
            digest.update(path.read_bytes())
    digest.update(task.digest.encode())
    digest.update(f"{assets};{quality}".encode())
    if assets != "builtin":
        for path in sorted(Path(assets).rglob("*")):
            status = path.stat()
            digest.update(f"{path}:{status.st_size}:{status.st_mtime_ns};".encode())
    return digest.hexdigest()[:32]


def load_scene(
    suite: str, task_id: int, assets: str = "builtin", quality: str = "exact", cache: bool = True
) -> Scene:
    """``scene_of`` the task ``task_id`` (from 0) of ``suite``.

    Raises:
        ValueError, RuntimeError: As ``scene_of``; also when the task does not exist.
    """
    return scene_of(get_task(suite, task_id), assets, quality, cache)


def scene_of(task: Task, assets: str = "builtin", quality: str = "exact", cache: bool = True) -> Scene:
    """The compiled scene of a task, which is in use already, read from the cache on disk, or built now.

    One that differs from LIBERO's task in where things stand alone is played in that task's compiled model.

    Args:
        task: The task.
        assets: ``"builtin"``, ``"libero"`` or a folder of LIBERO's assets.
        quality: How LIBERO's assets are rendered: ``"exact"`` (its own pixels) or ``"fast"`` (simplified
            meshes, no multisampling). The built-in assets have only one quality.
        cache: Whether to read and write the cache on disk; without it, a scene that is not in use is built.

    Raises:
        ValueError: When the assets or the quality do not exist, files of the assets are missing or damaged,
            the assets lack a thing of the task, or its init states are of another one.
        RuntimeError: When LIBERO's code cannot build the scene; the message ends with its last words.
    """
    require_mujoco()
    if not isinstance(quality, str) or quality not in QUALITIES:
        expected = " or ".join(map(repr, QUALITIES))
        raise ValueError(
            f"quality is {quality!r}; expected {expected}{nearest(str(quality), list(QUALITIES))}"
        )
    assets = resolve_assets(assets)
    if task.variant and (file := task.variant.missing(assets)):
        whose = "the built-in assets lack" if assets == "builtin" else f"{assets} lacks"
        raise ValueError(
            f"task_id {task.task_id} of {task.suite} needs {file} of LIBERO-Plus's assets, which {whose};"
            " expected assets='libero' or a folder that has it, or a task that"
            " vla_envs.liberoplus.list_tasks says is playable"
        )
    if assets == "builtin" and task.problem:
        _require_built_in(task)
    scene = _load(task.base or task, assets, "exact" if assets == "builtin" else quality, cache)
    return _in_other_places(scene, task) if task.base and task.problem else scene


def _in_other_places(scene: Scene, task: Task) -> Scene:
    """The scene of a task that differs from ``scene``'s in where things stand: in the same model.

    Raises:
        ValueError: When its recorded init states are of another scene.
    """
    assert task.problem
    before, now = bddl.read(scene.task.bddl_file).places(), task.problem.places()
    placements = []
    for item in scene.placements:
        if item.name in now:
            x, y, *_ = before[item.name].ranges[0]
            x, y = item.x_ranges[0][0] - x, item.y_ranges[0][0] - y  # of the surface's middle
            boxes = now[item.name].ranges
            item = replace(
                item,
                x_ranges=[[x + low, x + high] for low, _, high, _ in boxes],
                y_ranges=[[y + low, y + high] for _, low, _, high in boxes],
            )
        placements.append(item)
    states, model = recorded_init_states(task), scene.model
    validate_init_states(task, states, 1 + model.nq + model.nv)
    return replace(scene, task=task, placements=tuple(placements), recorded=states[:, 1 : 1 + model.nq])


def validate_init_states(task: Task, states: NDArray[np.float64], width: int) -> None:
    """Refuse recorded init states that do not have ``width`` numbers each.

    Raises:
        ValueError: When they have more or fewer.
    """
    if states.shape[1] != width:
        raise ValueError(
            f"init states in {task.init_states_file} have {states.shape[1]} numbers each; expected {width}:"
            " time, joint positions and velocities of this task"
        )


def _require_built_in(task: Task) -> None:
    """Refuse a task with things that the built-in assets lack."""
    for name, kind in (task.problem.fixtures + task.problem.objects) if task.problem else ():
        if kind in KINDS and not KINDS[kind].built_in:
            raise ValueError(
                f"{task.name} has {name}, and the built-in assets have no {kind}; expected assets='libero' or"
                " a folder that has it"
            )


#: Every scene in use: two environments of a task share one, however many scenes are open.
_in_use: WeakValueDictionary[tuple[Any, ...], Scene] = WeakValueDictionary()


@lru_cache(maxsize=8)  # the last ones open at no cost; LIBERO's own assets take 20 to 230 MB each
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
        base = folder / f"{task.label[:60]}_{_key(task, assets, quality)}"
        stack.enter_context(filelock.FileLock(f"{base}.lock"))
        cached = _read(base)
        if cached is None:
            _build_in_child(task, assets, quality, base)
            cached = _read(base)
    if cached is None:
        raise RuntimeError(f"the compiled scene at {base}.mjb cannot be read back")
    return assemble(task, *cached)


def assemble(task: Task, model: mujoco.MjModel, description: dict[str, Any]) -> Scene:
    """The scene of a compiled model and of the description stored with it."""
    return Scene(
        task=task,
        model=model,
        arm=Arm.of(model, np.array(description["arm_qpos"])),
        goal=_goal(model, description["goal"]),
        placements=tuple(Placement(**item) for item in description["placements"]),
        joint_ranges=tuple(tuple(item) for item in description["joint_ranges"]),
        burners=tuple(tuple(item) for item in description["burners"]),
        recorded=np.array(description["recorded"]),
        distractors=tuple(Placement(**item) for item in description["distractors"]),
    )


def _goal(model: mujoco.MjModel, predicates: list[dict[str, Any]]) -> Goal:
    """The goal from its cached predicates."""
    contact = np.zeros((len(predicates), 2, model.ngeom), bool)
    for k, predicate in enumerate(predicates):
        for side, geoms in enumerate(predicate["contact"]):
            contact[k, side, geoms] = True
    kind, subject, target, parameters = (
        np.array([predicate[name] for predicate in predicates]) for name in Goal._fields[:4]
    )
    return Goal(kind, subject, target, parameters, contact)


def _read(base: Path) -> tuple[mujoco.MjModel, dict[str, Any]] | None:
    """Model and description from the cache, or None when they are missing, incomplete or damaged."""
    try:
        description = json.loads(Path(f"{base}.json").read_text())
        blob = Path(f"{base}.mjb").read_bytes()
        if description.pop("sha256") != digest(blob, description):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return mujoco.MjModel.from_binary_path("scene.mjb", {"scene.mjb": blob}), description


def digest(blob: bytes, description: dict[str, Any]) -> str:
    """The digest of a compiled model and of the description stored with it."""
    return hashlib.sha256(blob + json.dumps(description).encode()).hexdigest()


def _build_in_child(task: Task, assets: str, quality: str, base: Path) -> None:
    shown = f"{task.suite} task {task.task_id}" if task.suite in SUITES else task.name
    if task.distractors:
        shown += f" with {len(task.distractors)} more objects"
    print(
        f"Building the scene of {shown}; this happens once and takes about 10 s.", file=sys.stderr, flush=True
    )
    # PyTorch, which reads them, takes a second to import, and may be loaded in this process.
    states = recorded_init_states(task) if task.init_states_file else None
    with tempfile.TemporaryDirectory(prefix="vla_envs-") as scratch:
        if task.problem:  # LIBERO's parser gets what ours has understood
            text = task.problem.text()
            task = replace(task, bddl_file=Path(scratch) / "task.bddl")
            task.bddl_file.write_text(text, encoding="utf-8")
        if assets != "builtin":
            own = [each.name for each in task.objects]
            verify_files(Path(assets), task.bddl_file, own, task.variant)
        (Path(scratch) / "task.pickle").write_bytes(pickle.dumps((task, states)))
        command = [sys.executable, "-m", "vla_envs.build_scene", assets, quality, str(base), scratch]
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
        words = result.stderr.strip().splitlines() or ["it said nothing"]
        reason = words[-1].removeprefix("ValueError: ")
        raise RuntimeError(f"LIBERO could not build {task.name}: {reason}")
