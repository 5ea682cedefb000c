"""What environments are given: their arguments, seeds, reset options and actions, validated."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import ArrayLike, NDArray

from vla_envs.inputs import as_array, as_numbers, in_short, nearest
from vla_envs.own_objects import OwnObject, read_objects
from vla_envs.perturbations import READINGS, Perturbation, Regions
from vla_envs.perturbations import validate as validate_perturbation
from vla_envs.rewards import warn_of_recorded_states
from vla_envs.tasks import Task, get_task, with_init_states

RESET_OPTIONS = ("init_state_id", "reset_mask", "perturbation")
LARGEST_IMAGE = 4096  # pixels, of observed images


def validate_int(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise a ValueError unless ``value`` is an int from ``least`` to ``most``."""
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_int or value < least or (most is not None and value > most):
        expected = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {in_short(value)}; expected an int {expected}")


def validate_tasks(
    suite: str | os.PathLike[str],
    task_id: Any,
    bddl_file: Any,
    init_state_file: Any,
    objects: Any,
    num_envs: int,
) -> list[Task]:
    """One task per environment, from the arguments that ``LiberoVectorEnv`` takes.

    Raises:
        ValueError: When a task or a file does not exist, there are not ``num_envs`` of them, or arguments
            leave one another without effect.
    """
    own = read_objects({} if objects is None else objects)
    if bddl_file is None:
        ids = _one_per_environment("task_id", task_id, num_envs)
        tasks = _each_once(lambda each: get_task(suite, each, own), ids)
    else:
        if suite != "LiberoObject" or not (np.ndim(task_id) == 0 and task_id == 0):
            raise ValueError(
                f"bddl_file is given beside suite {os.fspath(suite)!r} and task_id {in_short(task_id)};"
                " expected it alone, with the id vla_envs/Libero-v0"
            )
        files = _one_per_environment("bddl_file", bddl_file, num_envs)
        for file in files:
            if not isinstance(file, str | os.PathLike) or not os.fspath(file).endswith(".bddl"):
                raise ValueError(f"bddl_file is {in_short(file)}; expected the path of a *.bddl file")
        tasks = _each_once(lambda file: get_task(file, 0, own), files)
    _require_used(own, tasks)
    if init_state_file is None:
        return tasks
    files = _one_per_environment("init_state_file", init_state_file, num_envs)
    return _each_once(lambda pair: with_init_states(*pair), list(zip(tasks, files)))


def validate_variants(tasks: list[Task], perturbed: bool, robot_reading: Any) -> str:
    """How robot tasks of LIBERO-Plus among ``tasks`` are read: one of ``READINGS``.

    Raises:
        ValueError: When the reading does not exist, or is for none of the tasks, or when ``perturb`` is given
            for tasks of LIBERO-Plus.
    """
    variants = [task.variant for task in tasks if task.variant]
    if perturbed and variants:
        raise ValueError(
            f"perturb is given beside {tasks[0].suite}, whose tasks are perturbed already; expected one of"
            f" the two, as suite {tasks[0].suite.replace('Plus', '')} with perturb"
        )
    if robot_reading is None:
        return READINGS[1]
    if robot_reading not in READINGS:
        raise ValueError(
            f"robot_reading is {in_short(robot_reading)}; expected one of {list(READINGS)}"
            + nearest(str(robot_reading), list(READINGS))
        )
    if not variants:
        raise ValueError("robot_reading is for the suites of LIBERO-Plus, and none is given")
    return str(robot_reading)


def _require_used(own: Mapping[str, OwnObject], tasks: list[Task]) -> None:
    """Raise a ValueError when no BDDL file uses one of the objects ``own``."""
    if own and not any(task.problem for task in tasks):
        raise ValueError(f"objects {[*own]} are for a bddl_file of one's own, which is not given")
    kinds = {kind for task in tasks if task.problem for _, kind in task.problem.objects}
    for name in own:
        if name not in kinds:
            raise ValueError(
                f"objects has {name!r}, which no object of the BDDL file is; expected some of {sorted(kinds)}"
                + nearest(name, sorted(kinds))
            )


def _each_once(read: Callable[[Any], Task], values: list[Any]) -> list[Task]:
    """``read`` of every value; a file that many environments play is read once."""
    found: dict[str, Task] = {}  # by their words, for a value that makes no sense may not be hashable
    for value in values:
        if repr(value) not in found:
            found[repr(value)] = read(value)
    return [found[repr(value)] for value in values]


def _one_per_environment(name: str, value: Any, num_envs: int) -> list[Any]:
    """``value`` for each of ``num_envs`` environments, or its entries if it is a sequence of them."""
    several = (isinstance(value, Sequence) and not isinstance(value, str)) or np.ndim(value) > 0
    values = list(value) if several else [value] * num_envs
    if len(values) != num_envs:
        raise ValueError(f"{name} has {len(values)} entries; expected one per environment, {num_envs}")
    return values


def require_open(envs: VectorEnv) -> None:
    """Raise a RuntimeError when ``envs`` has been closed."""
    if envs.closed:
        raise RuntimeError("the environment is closed; make a new one")


def validate_reset(
    seed: Any,
    options: Any,
    recorded: Sequence[int],
    movable: Sequence[tuple[str, ...]],
    regions: Sequence[Regions],
    learning: bool,
) -> tuple[NDArray[np.bool_], list[int | None], list[int | None], list[Perturbation | None]]:
    """What ``reset`` has to do: the mask ``(N,)``, and per environment an init state, a seed, a perturbation.

    Each of these three can be None.

    Args:
        seed: As in ``LiberoVectorEnv.reset``.
        options: As in ``LiberoVectorEnv.reset``.
        recorded: How many recorded init states each of the N environments has.
        movable: The objects of each that a perturbed layout can move.
        regions: Where distractors of each can stand, as in ``perturbations.Subject``.
        learning: Whether the reward is for learning; recorded init states then give a warning.

    Raises:
        ValueError: When the seeds or the options do not fit.
    """
    num_envs = len(recorded)
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise ValueError(
            f"reset options are {in_short(options)}; expected a dict with {', '.join(RESET_OPTIONS)}"
        )
    unknown = [key for key in options if key not in RESET_OPTIONS]
    if unknown:
        raise ValueError(
            f"reset options {in_short(unknown)} are unknown; expected some of {list(RESET_OPTIONS)}"
            + nearest(str(unknown[0]), list(RESET_OPTIONS))
        )
    all_envs = np.ones(num_envs, bool)
    mask = as_array(
        options.get("reset_mask", all_envs), "reset_mask is", f"shape ({num_envs},) and dtype bool"
    )
    if mask.shape != (num_envs,) or mask.dtype != bool:
        raise ValueError(
            f"reset_mask has shape {mask.shape} and dtype {mask.dtype}; expected ({num_envs},) bool"
        )
    ids: list[int | None] = [None] * num_envs
    if options.get("init_state_id") is not None:
        name, expected = "init_state_id is", f"an int or {num_envs} ints"
        given = as_array(options["init_state_id"], name, expected)
        if given.dtype.kind not in "iu" or given.shape not in ((), (num_envs,)):
            raise ValueError(f"{name} {in_short(options['init_state_id'])}; expected {expected}")
        ids = [int(k) for k in np.broadcast_to(given, num_envs)]
        for i in np.flatnonzero(mask).tolist():
            if not 0 <= int(ids[i] or 0) < recorded[i]:
                raise ValueError(f"init_state_id {ids[i]} does not exist; expected 0 to {recorded[i] - 1}")
    several = isinstance(seed, Sequence) and not isinstance(seed, str | bytes)
    if several or (isinstance(seed, np.ndarray) and seed.ndim > 0):
        seeds = list(seed)
    elif isinstance(seed, int | np.integer) and not isinstance(seed, bool):
        seeds = [int(seed) + i for i in range(num_envs)] if seed >= 0 else [seed] * num_envs
    else:
        seeds = [seed] * num_envs
    if len(seeds) != num_envs:
        raise ValueError(f"seed has {len(seeds)} entries; expected one per environment, {num_envs}")
    for s in seeds:
        if s is not None and (isinstance(s, bool) or not isinstance(s, int | np.integer) or s < 0):
            raise ValueError(f"seed is {in_short(s)}; expected an int of at least 0")
    if learning and any(ids[i] is not None for i in np.flatnonzero(mask)):
        warn_of_recorded_states(stacklevel=5)
    asked: list[Perturbation | None] = [None] * num_envs
    if (wanted := options.get("perturbation")) is not None:
        several = isinstance(wanted, Sequence | np.ndarray) and len(wanted) == num_envs
        if not (several or isinstance(wanted, Mapping)):
            raise ValueError(f"perturbation is {in_short(wanted)}; expected a dict, or a list of {num_envs}")
        each = wanted if several else [wanted] * num_envs
        asked = [validate_perturbation(*one) for one in zip(each, movable, regions)]
    return mask, ids, [None if s is None else int(s) for s in seeds], asked


def validate_actions(
    actions: ArrayLike, shape: tuple[int, ...], ready: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """``actions`` as numbers, clipped to [-1, 1].

    Raises:
        ValueError: When they do not have ``shape``, or some are NaN.
        gymnasium.error.ResetNeeded: When some environments are not ``ready`` (N,).
    """
    array = as_numbers(actions, "actions are", f"numbers of shape {shape}")
    if array.shape != shape:
        raise ValueError(f"actions have shape {array.shape}; expected {shape}")
    if np.isnan(array).any():
        where = np.unique(np.argwhere(np.isnan(array))[:, 0]).tolist()
        raise ValueError(f"actions of environments {where} are NaN; expected numbers in [-1, 1]")
    if not ready.all():
        raise gym.error.ResetNeeded(
            f"step was called before reset of environments {in_short(np.flatnonzero(~ready).tolist())}, which"
            " are new, or which an interrupt or an error left in the middle of a call"
        )
    return np.clip(array, -1.0, 1.0)


def validate_generators(value: Any, num_envs: int) -> list[np.random.Generator | None]:
    """``value`` as a list of one random generator per environment.

    Raises:
        ValueError: When it is anything else.
    """
    several = list(value) if isinstance(value, Sequence) else [value]
    if len(several) != num_envs or not all(isinstance(rng, np.random.Generator) for rng in several):
        raise ValueError(f"np_random is {in_short(value)}; expected {num_envs} np.random.Generator in a list")
    return several


def warn_when_all_are_frozen(envs: Any) -> None:
    """Warn, once, that a step of ``envs`` does nothing, because all have finished and wait for a reset."""
    if envs.autoreset_mode == AutoresetMode.DISABLED and not envs.warned and envs.frozen.all():
        envs.warned = True
        warnings.warn(
            "every environment has finished: with autoreset_mode 'Disabled' a step does nothing and pays 0"
            " until they are reset; gym.make_vec also takes 'NextStep' and 'SameStep'",
            stacklevel=4,
        )


def spaces(image_size: int, wrist_camera: bool, action_chunk: int) -> tuple[gym.spaces.Dict, gym.spaces.Box]:
    """The observation space and the action space of one environment.

    Raises:
        ValueError: When a size does not fit.
    """
    validate_int("image_size", image_size, 8, LARGEST_IMAGE)
    validate_int("action_chunk", action_chunk, 1)
    image = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
    names = ["image", "wrist_image"] if wrist_camera else ["image"]
    observation = gym.spaces.Dict(
        {name: image for name in names} | {"state": gym.spaces.Box(-np.inf, np.inf, (8,), np.float32)}
    )
    shape = (7,) if action_chunk == 1 else (action_chunk, 7)
    return observation, gym.spaces.Box(-1.0, 1.0, shape, np.float32)
