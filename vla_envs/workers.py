"""``LiberoVectorEnv`` split over processes, for more cores than one Python process can use."""

import contextlib
import ctypes
import inspect
import multiprocessing
import os
import pickle
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from vla_envs.inputs import nearest
from vla_envs.machine import available_cores
from vla_envs.rewards import Reward
from vla_envs.threads import Crew, exclusive
from vla_envs.validation import (
    require_open,
    spaces,
    validate_actions,
    validate_generators,
    validate_int,
    validate_reset,
    validate_tasks,
    warn_when_all_are_frozen,
)
from vla_envs.vector import FromArguments, LiberoVectorEnv


def make(num_envs: int = 1, workers: int = 1, **arguments: Any) -> "LiberoVectorEnv | LiberoWorkersEnv":
    """Make a ``LiberoVectorEnv``, split over ``workers`` processes; the results are the same.

    ``gym.make_vec("vla_envs/LiberoObject-v0", num_envs=64, workers=4)``

    Args:
        num_envs: Number of environments.
        workers: Number of processes. Threads of one process share Python's interpreter, and only two of them
            draw at a time.
        arguments: Those of ``LiberoVectorEnv``. ``num_threads`` is per process, by default its share of the
            cores.

    Raises:
        TypeError: When an argument does not exist.
        ValueError: When an argument does not fit; says what was expected.
    """
    known = [*inspect.signature(LiberoVectorEnv).parameters, "workers"]
    for name in arguments:
        if name not in known:
            raise TypeError(f"argument {name!r} is unknown; expected some of {known}{nearest(name, known)}")
    validate_int("workers", workers, 1)
    if workers == 1:
        return LiberoVectorEnv(num_envs, **arguments)
    return LiberoWorkersEnv(num_envs, int(workers), **arguments)


class LiberoWorkersEnv(FromArguments, VectorEnv):
    """The interface of ``LiberoVectorEnv``, with consecutive environments in one process.

    Observations come through shared memory, actions and infos through pipes. Processes start with ``spawn``,
    so a script needs its ``if __name__ == "__main__":``.

    Raises:
        ValueError: As ``LiberoVectorEnv``, and when a reward cannot be sent to another process.
        RuntimeError: From any method, when a worker has died; says which one, and how it ended.
    """

    def __init__(
        self,
        num_envs: int,
        workers: int,
        *,
        suite: str | os.PathLike[str] = "LiberoObject",
        task_id: int | Sequence[int] = 0,
        image_size: int = 128,
        action_chunk: int = 1,
        wrist_camera: bool = False,
        num_threads: int | None = None,
        reward: str | Reward = "binary",
        bddl_file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        init_state_file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        objects: Mapping[str, str | os.PathLike[str]] | None = None,
        **arguments: Any,
    ) -> None:
        self._arguments = {k: v for k, v in locals().items() if k not in ("self", "arguments")} | arguments
        validate_int("num_envs", num_envs, 1)
        if num_envs < workers:
            raise ValueError(
                f"num_envs is {num_envs}; expected at least one environment per worker, {workers}"
            )
        self.tasks = validate_tasks(suite, task_id, bddl_file, init_state_file, objects, num_envs)
        ids = [task.task_id for task in self.tasks]
        files = None if bddl_file is None else [task.bddl_file for task in self.tasks]
        states = None if init_state_file is None else [task.init_states_file for task in self.tasks]
        _require_picklable(reward)
        if num_threads is None:
            num_threads = max(1, available_cores() // workers)
        self.num_envs = num_envs
        self.image_size, self.action_chunk = image_size, action_chunk
        self.single_observation_space, self.single_action_space = spaces(
            image_size, wrist_camera, action_chunk
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self._slices = [slice(part[0], part[-1] + 1) for part in np.array_split(np.arange(num_envs), workers)]
        context = multiprocessing.get_context("spawn")
        memory = {
            name: context.RawArray(ctypes.c_byte, int(np.prod(space.shape)) * space.dtype.itemsize)  # type: ignore[union-attr, arg-type]
            for name, space in self.observation_space.items()  # type: ignore[attr-defined]
        }
        self._obs = _arrays(memory, self.observation_space)
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._crew = Crew(workers)  # one thread per pipe, so that no pipe keeps an answer, or half of one

        def start(_: int) -> None:
            if hasattr(signal, "pthread_sigmask"):  # workers inherit it, so that Ctrl-C reaches none
                resource_tracker.ensure_running()  # it lets the signal through again
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            for part in self._slices:
                ours, theirs = context.Pipe()
                used = {each.name for task in self.tasks[part] for each in task.objects}
                process = context.Process(
                    target=_work,
                    args=(theirs, memory, self.observation_space, part),
                    kwargs=arguments
                    | {"num_envs": part.stop - part.start, "suite": suite}
                    | {"task_id": ids[part] if files is None else 0, "bddl_file": files and files[part]}
                    | {"init_state_file": states and states[part]}
                    | {"objects": {name: file for name, file in (objects or {}).items() if name in used}}
                    | {"image_size": image_size, "action_chunk": action_chunk}
                    | {"wrist_camera": wrist_camera, "num_threads": num_threads, "reward": reward},
                    daemon=True,
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)

        try:
            self._crew.do(start, [0])
            facts = [self._receive(k) for k in range(workers)]
        except BaseException:
            self._kill()  # otherwise we would wait for those that still start
            self.close()
            raise
        self.metadata = facts[0]["metadata"]
        self.autoreset_mode, self.render_mode = facts[0]["autoreset_mode"], facts[0]["render_mode"]
        self.max_episode_steps = facts[0]["max_episode_steps"]
        #: The sentence of each environment's episode; see ``LiberoVectorEnv``.
        self.instructions = [task.instruction for task in self.tasks]
        self._recorded = [count for each in facts for count in each["recorded"]]
        self._movable = [names for each in facts for names in each["movable"]]
        self._regions = [regions for each in facts for regions in each["regions"]]
        self._learning = reward != "binary"
        #: Seconds spent so far by kind of work, averaged over the workers.
        self.seconds = {"physics": 0.0, "render": 0.0}
        #: How often ``step`` left an environment in each of ``multi_stage``'s stages so far.
        self.stages: Counter[str] = Counter()
        for each in facts:
            self.stages.update(each["stages"])
        self._steps = np.zeros(num_envs, np.int64)
        self._frozen, self._ready = np.zeros(num_envs, bool), np.zeros(num_envs, bool)
        self.warned = False  # about a step that does nothing

    # ---- Talking to the workers ------------------------------------------------------------------

    def _receive(self, k: int) -> Any:
        """What worker ``k`` says about itself when it has started; its exceptions are raised here."""
        try:
            answer = self._pipes[k].recv()
        except (EOFError, ConnectionResetError):
            answer = _GONE
        return self._checked([None] * k + [answer])[k]

    @staticmethod
    def _ask(pipe: Connection, method: str, values: Sequence[Any]) -> Any:
        """A worker's answer, an exception, or ``_GONE``; runs on one of our threads."""
        try:
            pipe.send((method, values))
            return pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return _GONE
        except Exception as error:  # from pickling what we send or unpickling the answer
            return error

    def _checked(self, answers: list[Any]) -> list[Any]:
        """``answers``, one per worker; if one is an exception or is missing, that is raised here."""
        for k, answer in enumerate(answers):
            if answer is _GONE:
                process, part = self._processes[k], self._slices[k]
                process.join(5)
                code = process.exitcode
                how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else None
                words = how or f"ended with status {code}"
                self._end()
                self.closed = True
                whose = f"environments {part.start} to {part.stop - 1}, process {process.pid}"
                raise RuntimeError(f"worker {k} ({whose}) {words}")
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def _call(self, method: str, *parts: Sequence[Any]) -> list[Any]:
        """Call a method of every worker with its share of each argument, and return the answers."""
        require_open(self)

        def ask(k: int) -> Any:
            return self._ask(self._pipes[k], method, [part[k] for part in parts])

        return self._checked(self._crew.do(ask, range(len(self._pipes))))

    def _split(self, values: Any) -> list[Any]:
        return [values[part] for part in self._slices]

    def _observe(self, answers: list[dict[str, Any]]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        self._steps = np.concatenate([answer["steps"] for answer in answers])
        self._frozen = np.concatenate([answer["frozen"] for answer in answers])
        for kind in self.seconds:
            self.seconds[kind] += float(np.mean([answer["seconds"][kind] for answer in answers]))
        for answer in answers:
            self.stages.update(answer["stages"])
        sizes = [part.stop - part.start for part in self._slices]
        observation = {name: array.copy() for name, array in self._obs.items()}
        info = _join([answer["info"] for answer in answers], sizes)
        self.instructions = info["instruction"].tolist()
        return observation, info

    # ---- The interface of LiberoVectorEnv --------------------------------------------------------

    @property
    def frozen(self) -> NDArray[np.bool_]:
        """Environments ``(N,)`` that have finished and wait for a reset."""
        return self._frozen.copy()

    @property
    def steps(self) -> NDArray[np.int64]:
        """Control steps ``(N,)`` of each episode so far."""
        return self._steps.copy()

    @property
    @exclusive
    def qpos(self) -> NDArray[np.float64]:
        """Joint positions ``(N, nq)``; see ``LiberoVectorEnv.qpos``."""
        parts = self._call("qpos")
        width = max(part.shape[1] for part in parts)
        pads = [((0, 0), (0, width - part.shape[1])) for part in parts]
        return np.concatenate([np.pad(*each, constant_values=np.nan) for each in zip(parts, pads)])

    @exclusive
    def set_reward(self, reward: str | Reward) -> None:
        """Pay another ``reward`` from the next step on; it is what the constructor takes."""
        require_open(self)
        _require_picklable(reward)

        def change(_: int) -> list[Any]:  # one piece of work, so that an interrupt never leaves two rewards
            return [self._ask(pipe, "set_reward", [reward]) for pipe in self._pipes]

        self._checked(self._crew.do(change, [0])[0])
        self._learning = reward != "binary"
        self._arguments["reward"] = reward

    @property  # type: ignore[override]
    def np_random(self) -> tuple[np.random.Generator, ...]:
        """Copies of the workers' random generators ``(N,)``; generators that are set go to the workers."""
        return tuple(rng for part in self._call("np_random") for rng in part)

    @np_random.setter
    def np_random(self, value: Any) -> None:
        self._call("set_np_random", self._split(validate_generators(value, self.num_envs)))

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seeds ``(N,)`` of ``np_random``; -1 stands for a generator that was set."""
        return tuple(seed for part in self._call("np_random_seed") for seed in part)

    @exclusive
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Reset all environments, or those of ``options["reset_mask"]``; see ``LiberoVectorEnv.reset``."""
        mask, *what = validate_reset(
            seed, options, self._recorded, self._movable, self._regions, self._learning
        )
        self._ready &= ~mask  # until everything is done
        answers = self._call("reset", self._split(mask), *map(self._split, what))
        observation, info = self._observe(answers)
        self._ready |= mask
        return observation, info

    @exclusive
    def step(
        self, actions: ArrayLike
    ) -> tuple[
        dict[str, NDArray[Any]], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]
    ]:
        """Execute ``actions``, ``(N, 7)`` or ``(N, C, 7)``; see ``LiberoVectorEnv.step``."""
        checked = validate_actions(actions, self.action_space.shape, self._ready)  # type: ignore[arg-type]
        warn_when_all_are_frozen(self)
        self._ready[:] = False  # until everything is done
        answers = self._call("step", self._split(checked))
        results = [np.concatenate(parts) for parts in zip(*(answer["results"] for answer in answers))]
        observation, info = self._observe(answers)
        self._ready[:] = True
        return observation, results[0], results[1], results[2], info

    @exclusive
    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """A ``(256, 256, 3)`` image per environment, or None without ``render_mode="rgb_array"``."""
        if self.render_mode is None:
            return None
        return tuple(image for images in self._call("render") for image in images)

    def close_extras(self, **kwargs: Any) -> None:
        """End the workers, unless this is a forked process, which does not own them."""
        if not self._crew.is_ours():
            return
        if self._crew.outlived_its_call():  # nobody waits for the answer any more
            self._kill()
        self._close()

    @exclusive
    def _close(self) -> None:
        self._end()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def _end(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # a worker ends when its pipe closes
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._crew.close()


_GONE = object()  # in place of the answer of a worker that has ended


def _arrays(memory: dict[str, Any], space: Any) -> dict[str, NDArray[Any]]:
    """The observations in shared memory."""
    return {
        name: np.frombuffer(buffer, space[name].dtype).reshape(space[name].shape)
        for name, buffer in memory.items()
    }


def _join(infos: list[dict[str, Any]], sizes: list[int]) -> dict[str, Any]:
    """Join the infos of several environments; what one of them lacks is zero, None or {} there."""
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for info in infos for name in info):
        values = [info.get(name) for info in infos]
        model = next(value for value in values if value is not None)
        if isinstance(model, dict):
            joined[name] = _join([value or {} for value in values], sizes)
        else:
            nothing: Any = {} if name == "perturbation" else None
            empty = nothing if model.dtype == object else model.dtype.type()
            joined[name] = np.concatenate(
                [
                    np.full((size, *model.shape[1:]), empty, model.dtype) if value is None else value
                    for value, size in zip(values, sizes)
                ]
            )
    return joined


def _require_picklable(reward: str | Reward) -> None:
    """Raise a ValueError unless ``reward`` can be sent to another process."""
    try:
        pickle.dumps(reward)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"reward {reward!r} cannot be sent to a worker ({error}); expected a module's function or"
            " 'path/to/file.py:function'"
        ) from None


def _sendable(error: Exception) -> Exception:
    """``error``, or one that can be sent to another process in its place (OpenGL's have pointers)."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _work(pipe: Connection, memory: dict[str, Any], space: Any, part: slice, **arguments: Any) -> None:
    """Be a worker: make environments, then answer until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    shared = {name: array[part] for name, array in _arrays(memory, space).items()}
    try:
        envs = LiberoVectorEnv(**arguments)
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):  # another worker's error came first
            pipe.send(_sendable(error))
        return
    facts = {
        "metadata": envs.metadata, "autoreset_mode": envs.autoreset_mode, "render_mode": envs.render_mode,
        "max_episode_steps": envs.max_episode_steps, "stages": dict(envs.stages),
        "recorded": [len(simulation.scene.recorded) for simulation in envs.simulations],
        "movable": [simulation.scene.movable for simulation in envs.simulations],
        "regions": envs._regions,
    }  # fmt: skip

    def answer(obs: dict[str, NDArray[Any]], info: dict[str, Any], *results: NDArray[Any]) -> dict[str, Any]:
        for name, array in obs.items():
            shared[name][:] = array
        stages, seconds = dict(envs.stages), dict(envs.seconds)
        envs.stages.clear()
        envs.seconds.update(dict.fromkeys(envs.seconds, 0.0))
        return {
            "info": info, "results": results, "steps": envs.steps, "frozen": envs.frozen,
            "stages": stages, "seconds": seconds,
        }  # fmt: skip

    def reset(mask: NDArray[np.bool_], *what: list[Any]) -> dict[str, Any]:
        envs._reset(np.flatnonzero(mask), *what)
        return answer(envs._observation(), envs._info())

    def step(actions: NDArray[np.float64]) -> dict[str, Any]:
        obs, reward, terminated, truncated, info = envs._step(actions)
        return answer(obs, info, reward, terminated, truncated)

    methods = {
        "reset": reset, "step": step, "render": envs.render, "set_reward": envs.set_reward,
        "qpos": lambda: envs.qpos, "np_random": lambda: envs.np_random,
        "np_random_seed": lambda: envs.np_random_seed,
        "set_np_random": lambda rngs: setattr(envs, "np_random", rngs),
    }  # fmt: skip
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send(facts)
        while True:
            method, values = pipe.recv()
            try:
                result = methods[method](*values)  # type: ignore[operator]
            except Exception as error:
                result = _sendable(error)
            pipe.send(result)
    envs.close()
