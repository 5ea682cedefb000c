"""``LiberoVectorEnv``: many LIBERO environments in one process."""

import os
import threading
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from vla_envs.control import check_compiled
from vla_envs.goals import FACTS, JOINT
from vla_envs.inputs import as_array, as_numbers, in_short
from vla_envs.machine import available_cores
from vla_envs.render import Renderer, opengl
from vla_envs.rewards import (
    Reward,
    all_stage_names,
    binary,
    evaluate_reward,
    resolve_reward,
    stage_names,
    warn_of_recorded_states,
)
from vla_envs.scene import load_scene
from vla_envs.simulation import Settled, Simulation
from vla_envs.tasks import get_task
from vla_envs.threads import Crew, alone

CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}
FRAME_SIZE = 256  # pixels, of the frames that ``render`` returns
LARGEST_IMAGE = 4096  # pixels, of the pictures that are observed


class FromArguments:
    """A copy of an environment, and one read from a pickle, is made from the arguments, and not yet reset.

    MuJoCo's memory, threads and OpenGL cannot be copied; Gymnasium's own MuJoCo environments do the same.
    """

    spec: Any
    _arguments: dict[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._arguments), (), {"spec": self.spec}


def check_int(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise a ValueError unless ``value`` is an int from ``least`` to ``most``."""
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_int or value < least or (most is not None and value > most):
        expected = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {in_short(value)}; expected an int {expected}")


def check_tasks(suite: str, task_id: Any, num_envs: int) -> list[Any]:
    """The task of every environment, of ``task_id`` as ``LiberoVectorEnv`` takes it.

    Raises:
        ValueError: When there is no such task, or not one for each of ``num_envs``.
    """
    several = isinstance(task_id, Sequence) or (isinstance(task_id, np.ndarray) and task_id.ndim > 0)
    task_ids = list(task_id) if several else [task_id] * num_envs
    for each in task_ids:
        get_task(suite, each)
    if len(task_ids) != num_envs:
        raise ValueError(f"task_id has {len(task_ids)} entries; expected one per environment, {num_envs}")
    return task_ids


def check_open(envs: VectorEnv) -> None:
    """Raise a RuntimeError when ``envs`` has been closed."""
    if envs.closed:
        raise RuntimeError("the environment is closed; expected a new one")


def check_reset(
    seed: Any, options: Any, recorded: Sequence[int], learning: bool
) -> tuple[NDArray[np.bool_], list[int | None], list[int | None]]:
    """What ``reset`` is to do: the mask ``(N,)``, and an init state or None and a seed or None for each.

    Args:
        seed, options: As ``LiberoVectorEnv.reset`` takes them.
        recorded: How many recorded init states each of the N environments has.
        learning: Whether the reward is one to learn from; recorded states then give a warning.

    Raises:
        ValueError: When they do not fit.
    """
    num_envs = len(recorded)
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise ValueError(
            f"reset options are {in_short(options)}; expected a dict of init_state_id or reset_mask"
        )
    unknown = [key for key in options if key not in ("init_state_id", "reset_mask")]
    if unknown:
        raise ValueError(
            f"reset options {in_short(unknown)} are unknown; expected init_state_id or reset_mask"
        )
    everybody = np.ones(num_envs, bool)
    mask = as_array(
        options.get("reset_mask", everybody), "reset_mask is", f"shape ({num_envs},) and dtype bool"
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
    return mask, ids, [None if s is None else int(s) for s in seeds]


def check_actions(
    actions: ArrayLike, shape: tuple[int, ...], ready: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """``actions`` as numbers in [-1, 1].

    Raises:
        ValueError: When they are not of ``shape``, or NaN.
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
            " are new, or were left in the middle of a call by an interrupt or an error"
        )
    return np.clip(array, -1.0, 1.0)


def check_generators(value: Any, num_envs: int) -> list[np.random.Generator | None]:
    """``value`` as one random generator per environment.

    Raises:
        ValueError: When it is anything else.
    """
    several = list(value) if isinstance(value, Sequence) else [value]
    if len(several) != num_envs or not all(isinstance(rng, np.random.Generator) for rng in several):
        raise ValueError(f"np_random is {in_short(value)}; expected {num_envs} np.random.Generator in a list")
    return several


def warn_when_all_wait(envs: Any) -> None:
    """Warn, once, that a step of ``envs`` does nothing: all have finished, and none is reset."""
    if envs.autoreset_mode == AutoresetMode.DISABLED and not envs.warned and envs.frozen.all():
        envs.warned = True
        warnings.warn(
            "every environment has finished: with autoreset_mode 'Disabled' a step does nothing, with reward"
            " 0, until they are reset; gym.make_vec also takes 'NextStep' and 'SameStep'",
            stacklevel=4,
        )


def spaces(image_size: int, wrist_camera: bool, action_chunk: int) -> tuple[gym.spaces.Dict, gym.spaces.Box]:
    """Observation and action space of one environment.

    Raises:
        ValueError: When a size, as ``LiberoVectorEnv`` takes it, does not fit.
    """
    check_int("image_size", image_size, 8, LARGEST_IMAGE)
    check_int("action_chunk", action_chunk, 1)
    picture = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
    names = ["image", "wrist_image"] if wrist_camera else ["image"]
    observation = gym.spaces.Dict(
        {name: picture for name in names} | {"state": gym.spaces.Box(-np.inf, np.inf, (8,), np.float32)}
    )
    shape = (7,) if action_chunk == 1 else (action_chunk, 7)
    return observation, gym.spaces.Box(-1.0, 1.0, shape, np.float32)


class LiberoVectorEnv(FromArguments, VectorEnv):
    """LIBERO tasks as a Gymnasium vector environment, simulated by threads in one process.

    Environments of a task share one compiled model. An environment that has finished is neither stepped
    nor drawn until it is reset (autoreset mode ``DISABLED``, the default).

    Args:
        num_envs: Number of environments.
        suite: ``"LiberoSpatial"``, ``"LiberoObject"``, ``"LiberoGoal"``, ``"Libero10"`` or ``"Libero90"``.
        task_id: Task in the suite, from 0, or a list with one entry per environment.
        image_size: Height and width of the pictures in pixels.
        action_chunk: Control steps per ``step`` call (C); a chunk stops early at success.
        max_episode_steps: Control steps until an episode is truncated.
        reward: ``"binary"``, ``"multi_stage"``, a callable on facts, or ``"path/to/file.py:function"``.
            It is evaluated after the last control step of a chunk.
        assets: ``"builtin"``, ``"libero"`` (the folder in ``LIBERO_ASSETS``, else LIBERO's download) or a
            folder.
        quality: How LIBERO's assets are drawn: ``"exact"``, its own pixels, or ``"fast"``, with simplified
            meshes and no multisampling. The built-in assets have one quality.
        wrist_camera: Whether observations hold ``wrist_image``.
        num_threads: Simulator threads; by default one per available core.
        settle_steps: Control steps without motion after a reset (OpenVLA's protocol: 10).
        settle_gripper: Gripper command of those, from -1 (open, OpenVLA's protocol) to 1 (close).
        autoreset_mode: A ``gymnasium.vector.AutoresetMode``.
        render_mode: ``"rgb_array"`` or None.
        cache: Whether compiled scenes are read from and kept in the cache on disk.

    Observation: ``Dict(image=(N, H, W, 3) uint8, state=(N, 8) float32)``; images are LIBERO's turned by 180
    degrees, as published policies see them (upright, mirrored: see ``vla_envs/render.py``); the state is
    end-effector position (3, m), axis-angle (3, rad), gripper joints (2, m). Action: ``(N, 7)``, or
    ``(N, C, 7)`` when ``action_chunk`` C is over 1, in [-1, 1].

    Raises:
        ValueError: For an argument that does not exist or does not fit; says what was expected.
        RuntimeError: Where ``NUMBA_DISABLE_JIT`` is set.

    Examples:
        >>> import gymnasium as gym, vla_envs
        >>> envs = gym.make_vec("vla_envs/LiberoObject-v0", num_envs=8, task_id=4, reward="multi_stage")
        >>> obs, info = envs.reset(seed=[7] * 8)  # a group: the same whole scene eight times
    """

    def __init__(
        self,
        num_envs: int = 1,
        suite: str = "LiberoObject",
        task_id: int | Sequence[int] = 0,
        image_size: int = 128,
        action_chunk: int = 1,
        max_episode_steps: int = 200,
        reward: str | Reward = "binary",
        assets: str | os.PathLike[str] = "builtin",
        quality: str = "exact",
        wrist_camera: bool = False,
        num_threads: int | None = None,
        settle_steps: int = 10,
        settle_gripper: float = -1.0,
        autoreset_mode: AutoresetMode | str = AutoresetMode.DISABLED,
        render_mode: str | None = None,
        cache: bool = True,
    ) -> None:
        self._arguments = {name: value for name, value in locals().items() if name != "self"}
        check_compiled()
        if num_threads is None:
            num_threads = available_cores()
        for name, value, least in (
            ("num_envs", num_envs, 1),
            ("max_episode_steps", max_episode_steps, 1),
            ("num_threads", num_threads, 1),
            ("settle_steps", settle_steps, 0),
        ):
            check_int(name, value, least)
        real = isinstance(settle_gripper, int | float | np.number) and not isinstance(settle_gripper, bool)
        if not real or not -1.0 <= settle_gripper <= 1.0:
            raise ValueError(f"settle_gripper is {in_short(settle_gripper)}; expected a number from -1 to 1")
        for name, flag in (("wrist_camera", wrist_camera), ("cache", cache)):
            if not isinstance(flag, bool | np.bool_):
                raise ValueError(f"{name} is {in_short(flag)}; expected True or False")
        if render_mode is not None and (not isinstance(render_mode, str) or render_mode != "rgb_array"):
            raise ValueError(f"render_mode is {in_short(render_mode)}; expected 'rgb_array' or None")
        if not isinstance(assets, str | os.PathLike):
            raise ValueError(f"assets is {in_short(assets)}; expected 'builtin', 'libero' or a folder")
        task_ids = check_tasks(suite, task_id, num_envs)
        modes = [mode.value for mode in AutoresetMode]
        if not isinstance(autoreset_mode, AutoresetMode) and not (
            isinstance(autoreset_mode, str) and autoreset_mode in modes
        ):
            raise ValueError(f"autoreset_mode is {in_short(autoreset_mode)}; expected one of {modes}")

        self.single_observation_space, self.single_action_space = spaces(
            image_size, wrist_camera, action_chunk
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)  # where TorchRL looks for it
        self.image_size, self.action_chunk, self.max_episode_steps = (
            image_size,
            action_chunk,
            max_episode_steps,
        )
        self.settle_steps, self.settle_gripper, self.render_mode = settle_steps, settle_gripper, render_mode
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": 20 / action_chunk,
            "autoreset_mode": self.autoreset_mode,
        }
        self._crew = Crew(num_threads)
        self.set_reward(reward)
        scenes = {
            task: load_scene(suite, task, str(assets), quality, cache) for task in dict.fromkeys(task_ids)
        }
        self.simulations = [Simulation(scenes[task]) for task in task_ids]
        self.tasks = [simulation.scene.task for simulation in self.simulations]
        self.instructions = [task.instruction for task in self.tasks]
        self._cameras = {
            name: CAMERAS[name] for name in (["image", "wrist_image"] if wrist_camera else ["image"])
        }
        self._renderers: dict[tuple[int, int], Renderer] = {}
        self._settled: OrderedDict[tuple[int, bytes], Settled] = OrderedDict()
        self._renderers_lock = threading.Lock()
        #: Seconds spent so far, by kind of work, in the proportion of the threads' time.
        self.seconds = {"physics": 0.0, "render": 0.0}
        #: Calls of ``step`` so far, one for each environment that was stepped, by the stage it then was in:
        #: one of ``multi_stage``'s, whatever the reward.
        self.stages: Counter[str] = Counter()
        for scene in scenes.values():
            self.stages.update(dict.fromkeys(all_stage_names((scene.goal.kind == JOINT).tolist()), 0))

        self._rngs: list[np.random.Generator | None] = [None] * num_envs
        self._seeds = [-1] * num_envs  # Gymnasium's number for a seed that is not known
        self._obs = {
            name: np.zeros((num_envs, *space.shape), space.dtype)  # type: ignore[arg-type, misc]
            for name, space in self.single_observation_space.items()
        }
        self._facts = {name: np.zeros(num_envs) for name in FACTS}
        self._facts["goals"] += [len(simulation.scene.goal.kind) for simulation in self.simulations]
        self._stage = np.zeros(num_envs, np.int64)
        self._stage_name = np.full(num_envs, "", object)
        self._init_state_id = np.full(num_envs, -1)
        self._steps = np.zeros(num_envs, np.int64)
        self._terminated = np.zeros(num_envs, bool)
        self._truncated = np.zeros(num_envs, bool)
        self._ready = np.zeros(num_envs, bool)  # has been reset, and no call has ended in its midst since
        self._reason = [""] * num_envs  # why an episode ended early
        self.warned = False  # of a step that does nothing

    # ---- Reading the simulation ------------------------------------------------------------------

    @property
    def frozen(self) -> NDArray[np.bool_]:
        """Environments ``(N,)`` that have finished and wait for a reset."""
        return self._terminated | self._truncated

    @property
    def steps(self) -> NDArray[np.int64]:
        """Control steps ``(N,)`` of the episodes so far."""
        return self._steps.copy()

    @property
    @alone
    def qpos(self) -> NDArray[np.float64]:
        """Joint positions ``(N, nq)`` in LIBERO's order (m, rad, unit quaternions).

        Of different tasks ``nq`` is the greatest; shorter rows end in NaN.
        """
        rows = [simulation.data.qpos for simulation in self.simulations]
        qpos = np.full((self.num_envs, max(map(len, rows))), np.nan)
        for i, row in enumerate(rows):
            qpos[i, : len(row)] = row
        return qpos

    @property  # type: ignore[override]
    def np_random(self) -> tuple[np.random.Generator, ...]:
        """The random generators ``(N,)`` that draw placements, one per environment as in ``SyncVectorEnv``.

        They can be set, to N generators.
        """
        for i in range(self.num_envs):
            if self._rngs[i] is None:
                self._rngs[i], self._seeds[i] = seeding.np_random()
        return tuple(rng for rng in self._rngs if rng is not None)

    @np_random.setter
    def np_random(self, value: Any) -> None:
        self._rngs = check_generators(value, self.num_envs)
        self._seeds = [-1] * self.num_envs

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seeds ``(N,)`` of ``np_random``; -1 for a generator that was set."""
        _ = self.np_random  # makes those that there are not yet
        return tuple(self._seeds)

    def _parallel(self, work: Callable[[int], tuple[float, float]], indices: Iterable[int]) -> None:
        """Call ``work``, which returns its seconds of physics and of drawing, on each index, on threads."""
        start = time.perf_counter()
        spent = self._crew.do(work, indices)
        physics, render = np.sum(spent, axis=0) if spent else (0.0, 0.0)
        took = time.perf_counter() - start
        self.seconds["physics"] += took * physics / max(physics + render, 1e-12)
        self.seconds["render"] += took * render / max(physics + render, 1e-12)

    def _renderer(self, i: int, size: int) -> Renderer:
        scene = self.simulations[i].scene
        key = (id(scene), size)
        with self._renderers_lock:
            if key not in self._renderers:
                self._renderers[key] = Renderer(scene.model, size, scene.burners)
            return self._renderers[key]

    def _draw(self, i: int) -> dict[str, NDArray[np.uint8]]:
        """Environment ``i``, as each camera sees it."""
        renderer, data = self._renderer(i, self.image_size), self.simulations[i].data
        return {name: renderer.draw(data, camera) for name, camera in self._cameras.items()}

    def _observe(self, i: int) -> None:
        simulation = self.simulations[i]
        self._obs["state"][i] = simulation.state()
        facts = simulation.facts.read(simulation.origin, simulation.control.peak, bool(self._terminated[i]))
        for name, value in facts.items():
            self._facts[name][i] = value

    def _observation(self) -> dict[str, NDArray[Any]]:
        return {name: array.copy() for name, array in self._obs.items()}

    def _info(self) -> dict[str, Any]:
        return {
            "success": self._terminated.copy(),
            "stage": self._stage.copy(),
            "stage_name": self._stage_name.astype(str),
            "init_state_id": self._init_state_id.copy(),
            "facts": {name: values.copy() for name, values in self._facts.items()},
            "instruction": np.array(self.instructions),
            "diverged": np.array([bool(reason) for reason in self._reason]),
            "reason": np.array(self._reason),
        }

    @alone
    def set_reward(self, reward: str | Reward) -> None:
        """Pay ``reward``, as the constructor takes it, from the next step on."""
        self._reward = resolve_reward(reward)
        self._arguments["reward"] = reward

    # ---- Gymnasium -------------------------------------------------------------------------------

    @alone
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Reset all environments, or those of ``options["reset_mask"]``.

        Args:
            seed: One seed per environment, or an int ``s`` for ``s, s + 1, ...``. A seed alone decides
                the init state, a fresh placement from LIBERO's regions, so a repeated seed is a group.
            options: ``init_state_id``: recorded init states (0 to 49) instead, one per environment or one
                for all; they are for evaluation, and a reward to learn from gives a warning.
                ``reset_mask``: ``(N,)`` bool, the environments to reset.

        Raises:
            ValueError: When seeds, ids or the mask do not fit; nothing is changed then.
            RuntimeError: As every method, when another call has not ended, or in a forked process.
        """
        check_open(self)
        recorded = [len(simulation.scene.recorded) for simulation in self.simulations]
        mask, ids, seeds = check_reset(seed, options, recorded, self._reward is not binary)
        self._reset(np.flatnonzero(mask), seeds, ids)
        return self._observation(), self._info()

    def _reset(self, indices: Iterable[int], seeds: Sequence[int | None], ids: Sequence[int | None]) -> None:
        """Reset ``indices``: settle the init states not seen lately, then copy, draw each once, and read."""
        indices = list(indices)
        self._ready[indices] = False  # until all is done
        keys: dict[int, tuple[int, bytes]] = {}
        to_settle: dict[tuple[int, bytes], tuple[int, NDArray[np.float64]]] = {}
        for i in indices:
            scene, state_id = self.simulations[i].scene, ids[i]
            rng = self._rngs[i]
            if rng is None or seeds[i] is not None:
                rng, self._seeds[i] = seeding.np_random(seeds[i])
                self._rngs[i] = rng
            if state_id is None:
                state = scene.sample_init_state(rng)
            else:
                state = scene.recorded_init_state(state_id)
            self._init_state_id[i] = -1 if state_id is None else state_id
            keys[i] = (id(scene), state.tobytes())
            if keys[i] not in self._settled:
                to_settle.setdefault(keys[i], (i, state))

        work = {i: (key, state) for key, (i, state) in to_settle.items()}
        opengl()  # made by the calling thread

        def settle(i: int) -> tuple[float, float]:
            (key, state), simulation = work[i], self.simulations[i]
            start = time.perf_counter()
            settled = simulation.settle(state, self.settle_steps, self.settle_gripper)
            simulation.copy_from(settled, self.settle_steps == 0)
            settled_at = time.perf_counter()
            settled.images = self._draw(i)
            self._settled[key] = settled
            return settled_at - start, time.perf_counter() - settled_at

        self._parallel(settle, work)
        for i in indices:
            settled = self._settled[keys[i]]
            self._settled.move_to_end(keys[i])
            self.simulations[i].copy_from(settled, self.settle_steps == 0)
            for name, picture in settled.images.items():
                self._obs[name][i] = picture
            self._steps[i] = 0
            self._reason[i] = settled.reason  # in a scene that cannot settle there is nothing to play
            self._terminated[i], self._truncated[i] = False, bool(settled.reason)
            self._observe(i)
        while len(self._settled) > max(64, self.num_envs):
            self._settled.popitem(last=False)
        if indices:  # the others may never have been reset
            facts = {name: values[indices] for name, values in self._facts.items()}
            _, self._stage[indices], self._stage_name[indices] = evaluate_reward(self._reward, facts)
        self._ready[indices] = True

    @alone
    def step(
        self, actions: ArrayLike
    ) -> tuple[
        dict[str, NDArray[Any]], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]
    ]:
        """Execute ``actions``, ``(N, 7)`` or ``(N, C, 7)``, in the environments that have not finished.

        Returns:
            Observations, rewards ``(N,)``, terminated ``(N,)`` (success), truncated ``(N,)`` (the step
            limit), and infos. A frozen environment keeps its observation and flags, with reward 0; when all
            are frozen in mode ``DISABLED``, the first step gives a warning.
            An environment whose simulation diverges is truncated, with reward 0 and the last observation
            before; ``info["diverged"]`` (N,) bool and ``info["reason"]`` (N,) say so until it is reset.

        Raises:
            ValueError: When an action is NaN, no number or of the wrong shape; nothing is changed then.
                Values outside [-1, 1] are clipped, as LIBERO does. Also when a reward function fails; it is
                called when the actions have been executed.
            gymnasium.error.ResetNeeded: Before the first reset, and after a step that an interrupt or an
                error, of a reward function too, has ended in its midst.
        """
        check_open(self)
        checked = check_actions(actions, self.action_space.shape, self._ready)  # type: ignore[arg-type]
        warn_when_all_wait(self)
        return self._step(checked)

    def _step(
        self, actions: NDArray[np.float64]
    ) -> tuple[
        dict[str, NDArray[Any]], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]
    ]:
        chunks = actions.reshape(self.num_envs, self.action_chunk, 7)
        self._ready[:] = False  # until all is done
        frozen = self.frozen
        restarted = frozen & (self.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP)
        if restarted.any():
            self._reset(np.flatnonzero(restarted), [None] * self.num_envs, [None] * self.num_envs)
        alive = np.flatnonzero(~frozen).tolist()

        def advance(i: int) -> tuple[float, float]:
            start = time.perf_counter()
            left = self.max_episode_steps - self._steps[i]
            simulation = self.simulations[i]
            steps, success = simulation.run(chunks[i, :left])
            self._steps[i] += steps
            self._reason[i] = simulation.divergence()
            if self._reason[i]:  # nothing of it is seen, measured or drawn
                simulation.go_back()
                self._truncated[i] = True
                return time.perf_counter() - start, 0.0
            simulation.keep()
            self._terminated[i] = success
            self._truncated[i] = not success and self._steps[i] >= self.max_episode_steps
            stepped_at = time.perf_counter()
            for name, picture in self._draw(i).items():
                self._obs[name][i] = picture
            self._observe(i)
            return stepped_at - start, time.perf_counter() - stepped_at

        self._parallel(advance, alive)
        reward, stage, stage_name = evaluate_reward(self._reward, self._facts)
        diverged = np.array([bool(reason) for reason in self._reason])
        moved = np.flatnonzero(~(frozen | diverged))
        self._stage[moved], self._stage_name[moved] = stage[moved], stage_name[moved]
        self.stages.update(stage_names(self._facts)[moved].tolist())
        reward = np.where(frozen | diverged, 0.0, reward)
        terminated, truncated = self._terminated.copy(), self._truncated.copy()
        extra: dict[str, Any] = {}
        if self.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP and self.frozen.any():
            extra = self._final()
            self._reset(np.flatnonzero(self.frozen), [None] * self.num_envs, [None] * self.num_envs)
        self._ready[:] = True
        return self._observation(), reward, terminated, truncated, self._info() | extra

    def _final(self) -> dict[str, Any]:
        """Last observations and infos of the environments about to be reset, in Gymnasium's form."""
        done, info = self.frozen, self._info()
        final_obs = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(done):
            final_obs[i] = {name: array[i].copy() for name, array in self._obs.items()}
        return {
            "final_obs": final_obs,
            "_final_obs": done.copy(),
            "final_info": info,
            "_final_info": done.copy(),
        }

    @alone
    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """A ``(256, 256, 3)`` picture of every environment, or None without ``render_mode="rgb_array"``."""
        if self.render_mode is None:
            return None
        opengl()  # made by the calling thread

        def draw(i: int) -> NDArray[np.uint8]:
            return self._renderer(i, FRAME_SIZE).draw(self.simulations[i].data, CAMERAS["image"])

        return tuple(self._crew.do(draw, range(self.num_envs)))

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the threads and free the pictures' memory; both are another process's in a forked one."""
        if self._crew.is_ours():
            self._close()

    @alone
    def _close(self) -> None:
        self._crew.close()
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
