"""Distractors: further objects that stand in a task's scene and have no part in the task.

LIBERO-Plus's layouts with added objects ("add_*"; Fei et al. 2025, arXiv 2510.13626) are the kind. Which
objects there are and where they stand is ours.

Which ones depends on the task and the level alone, because they are part of the compiled model: a task has
one scene per level. Where they stand is drawn for every episode (``vla_envs.perturbations``), and a place
that is taken gives way to a free one (``place``).
"""

import hashlib
import math
from dataclasses import replace
from functools import lru_cache

import mujoco
import numpy as np
from numpy.typing import NDArray

from vla_envs import bddl
from vla_envs.goals import IN_REGION, ON_REGION
from vla_envs.scene import Scene, boxes_around
from vla_envs.tasks import Task

#: LIBERO's movable objects that are small, stand by themselves and are among the built-in assets. A task has
#: the same distractors on all assets.
CLASSES = (
    "alphabet_soup bbq_sauce butter chocolate_pudding cookies cream_cheese ketchup milk orange_juice"
    " salad_dressing new_salad_dressing tomato_sauce white_bowl akita_black_bowl glazed_rim_porcelain_ramekin"
    " moka_pot red_coffee_mug porcelain_mug white_yellow_mug"
).split()
#: Where they stand, by surface: least x and y, greatest x and y (m) from its middle. The camera sees all of
#: it, and the arm reaches it.
REGIONS = {
    "main_table": (-0.3, -0.28, 0.15, 0.28),
    "kitchen_table": (-0.3, -0.28, 0.15, 0.28),
    "living_room_table": (-0.3, -0.25, 0.05, 0.25),
    "study_table": (-0.3, -0.28, 0.15, 0.28),
    "floor": (-0.3, -0.28, 0.25, 0.28),
}
REGION_NAME = "vla_envs_distractors"
GAP = 0.03  # m from a distractor to anything else; an open finger needs as much
NARROW_GAP = 0.01  # m, where there is no place with more
TRIES = 500
#: From one place to try to the next, in widths and depths of the region: the sequence R2 of M. Roberts, which
#: fills a rectangle evenly from wherever it starts.
STEP = np.array([0.7548776662466927, 0.5698402909980532])
ABSENT = (20.0, 0.5)  # m; x of those that are not in the scene, behind the wall, and how far apart they are


# ---- Which ones there are ------------------------------------------------------------------------------


def thing_of(kind: str) -> str:
    """What the distractor of a class is called in the model."""
    return f"distractor_{kind}"


def _kinds(problem: bddl.Problem) -> list[str]:
    """The classes a task's distractors can be of, in the order in which levels take them.

    None is in the task, or is called what a thing of the task is called: with a white bowl beside it, "the
    bowl" would not be one thing.
    """
    nouns = {kind.split("_")[-1] for _, kind in problem.fixtures + problem.objects}
    kinds = [kind for kind in CLASSES if kind.split("_")[-1] not in nouns]
    seed = hashlib.sha256(problem.text().encode()).digest()
    order = np.random.default_rng(np.frombuffer(seed, np.uint32)).permutation(len(kinds))
    chosen: list[str] = []
    for kind in (kinds[k] for k in order):  # nor two that are called alike
        if kind.split("_")[-1] not in {other.split("_")[-1] for other in chosen}:
            chosen.append(kind)
    return chosen


@lru_cache(maxsize=256)
def with_distractors(task: Task, level: int) -> Task:
    """The task whose scene has ``level`` distractors; those of a lower level are among them.

    Only a scene is made of it: everything that is said about a task is said about the one without.

    Raises:
        ValueError: When the task has so many kinds of objects that too few are left.
    """
    problem = task.problem or bddl.read(task.bddl_file)
    kinds = _kinds(problem)[:level]
    if len(kinds) < level:
        raise ValueError(
            f"{task.name} leaves {len(kinds)} of the {len(CLASSES)} classes for distractors;"
            f" expected a level of at most {len(kinds)}, or other axes"
        )
    surface = problem.arena.surface
    region = bddl.Region(f"{surface}_{REGION_NAME}", surface, (REGIONS[surface],), (0.0, 0.0), 0)
    further = replace(
        problem,
        objects=problem.objects + tuple((thing_of(kind), kind) for kind in kinds),
        regions=(*problem.regions, region),
        init=problem.init + tuple(("on", thing_of(kind), region.name) for kind in kinds),
    )
    states = task.init_states_file.read_bytes() if task.init_states_file else b""
    digest = hashlib.sha256(task.digest.encode() + further.text().encode() + states).hexdigest()
    return replace(task, problem=further, digest=digest, distractors=tuple(kinds), base=None)


def regions_of(scene: Scene) -> dict[str, tuple[float, float, float, float]]:
    """Of each of a scene's distractors: least x and y, greatest x and y (m) of where it can stand."""
    return {
        item.name: (item.x_ranges[0][0], item.y_ranges[0][0], item.x_ranges[0][1], item.y_ranges[0][1])
        for item in scene.distractors
    }


# ---- Where they stand ----------------------------------------------------------------------------------


def place(
    scene: Scene, state: NDArray[np.float64], places: dict[str, list[float]], asked: bool = False
) -> NDArray[np.float64]:
    """The init state with distractors at ``places``; everything else stands as it did.

    They are turned as LIBERO places their class. A place is free when it is ``GAP`` away from everything
    else, from the regions of the goal and from where drawers and doors move. From one that is taken the
    search goes on over the whole region.

    Args:
        scene: The scene, with distractors.
        state: An init state of it, wherever its distractors are.
        places: x and y (m) by class. Those that have none, and those that find no free place, are not in the
            scene: they are behind its walls. This dict then has the places where they really are.
        asked: Whether somebody asks for these places, so that ``NARROW_GAP`` is enough.
    """
    gaps = (NARROW_GAP,) if asked else (GAP, NARROW_GAP)
    state = state.copy()
    data = mujoco.MjData(scene.model)
    _pose(scene, data, state)
    low, high = _taken(scene, data, state)  # (n, 3) each
    regions = regions_of(scene)
    for number, item in enumerate(scene.distractors):
        address = scene.model.jnt_qposadr[scene.model.body_jntadr[item.body]]
        quat = item.upright()
        data.qpos[address : address + 7] = [0.0, 0.0, 0.0, *quat]
        mujoco.mj_kinematics(scene.model, data)
        least, most = _bounds(scene.model, data, [item.body])
        depth, height = -least[:, 2].min(), most[:, 2].max()
        near = (low[:, 2] < item.z + depth + height + GAP) & (high[:, 2] > item.z - GAP)
        found = None
        if item.name in places:
            begin = low[near, :2] - most[:, :2].max(axis=0)  # of where its origin would touch something
            end = high[near, :2] - least[:, :2].min(axis=0)
            found = _free(places[item.name], regions[item.name], begin, end, gaps)
        if found is None:
            places.pop(item.name, None)
            position = np.array([ABSENT[0], ABSENT[1] * number, depth])
        else:
            places[item.name] = found
            position = np.array([*found, item.z + depth])
            low, high = np.vstack([low, least + position]), np.vstack([high, most + position])
        state[address : address + 7] = [*position, *quat]
    return state


def _free(
    wanted: list[float],
    region: tuple[float, float, float, float],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    gaps: tuple[float, ...],
) -> list[float] | None:
    """The first place to try, of ``wanted`` and others, that is far enough from all rectangles (n, 2).

    Far enough is the first of ``gaps`` (m) that any of them is away.
    """
    corner, size = np.array(region[:2]), np.subtract(region[2:], region[:2])
    start = (np.array(wanted) - corner) / size
    for gap in gaps:
        for k in range(TRIES):
            at = corner + size * ((start + k * STEP) % 1.0) if k else np.array(wanted)
            outside = np.maximum(np.maximum(low - at, at - high), 0.0)  # (n, 2)
            if (np.hypot(*outside.T) > gap).all():
                return [float(x) for x in at]
    return None


def _pose(scene: Scene, data: mujoco.MjData, state: NDArray[np.float64]) -> None:
    """Put ``data`` into an init state."""
    scene.pose(data, state)
    mujoco.mj_kinematics(scene.model, data)


def _taken(
    scene: Scene, data: mujoco.MjData, state: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Boxes, as least and greatest corners (n, 3), in which no distractor may stand.

    All but the arm's reach from below the surface to above everything: LIBERO drops its objects from up to
    6 cm, and what is put into a region comes from above.
    """
    model, goal = scene.model, scene.goal
    roots = [item.body for item in scene.placements]
    robot = model.body_rootid[model.site_bodyid[scene.arm.site]]
    jointed = np.flatnonzero(
        np.isin(model.body_rootid[model.jnt_bodyid], roots) & (model.jnt_type != mujoco.mjtJoint.mjJNT_FREE)
    )
    arm, boxes = _bounds(model, data, [robot]), [_bounds(model, data, roots)]
    for end in (0, 1) if len(jointed) else ():  # drawers and doors that are closed, and wide open
        data.qpos[model.jnt_qposadr[jointed]] = model.jnt_range[jointed, end]
        mujoco.mj_kinematics(model, data)
        boxes.append(_bounds(model, data, roots))
    _pose(scene, data, state)
    for site in goal.target[np.isin(goal.kind, (IN_REGION, ON_REGION))]:
        reach = np.abs(data.site_xmat[site].reshape(3, 3)) @ model.site_size[site]
        boxes.append(((data.site_xpos[site] - reach)[None], (data.site_xpos[site] + reach)[None]))
    low, high = (np.concatenate(ends) for ends in zip(*boxes))
    low[:, 2], high[:, 2] = -math.inf, math.inf
    return np.concatenate([low, arm[0]]), np.concatenate([high, arm[1]])


def _bounds(
    model: mujoco.MjModel, data: mujoco.MjData, roots: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Boxes (n, 3) around the things ``roots``: one for each geom that touches others."""
    touches = (model.geom_contype | model.geom_conaffinity) != 0
    return boxes_around(
        model, data, np.flatnonzero(touches & np.isin(model.body_rootid[model.geom_bodyid], roots))
    )
