"""The facts of demonstrations, drops and random episodes, on which a reward function is checked."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from vla_envs.demos.expert import ScriptedExpert, plays
from vla_envs.demos.expert import limit as limit_of
from vla_envs.demos.hdf5 import open_hdf5, read_parts
from vla_envs.goals import FACTS
from vla_envs.rewards import Facts
from vla_envs.simulation import Simulation
from vla_envs.tasks import Task
from vla_envs.vector import LiberoVectorEnv

Act = Callable[[int, Facts], NDArray[np.float64]]  # control step, facts (N,) each -> actions (N, 7)

DROP_HEIGHT = 0.1  # m; rise of the object at which the hand opens to drop it
OPEN = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]


def collect(task: Task, episodes: int, seed: int = 0, file: Path | None = None) -> dict[str, list[Facts]]:
    """Collect demonstrations, drops and random episodes of a task: dicts of facts (T + 1,) from the reset on.

    A drop is a demonstration whose hand opens once the object has risen by 10 cm. Random episodes are as long
    as the longest demonstration. Recorded states, as in LIBERO's files, give no drops.

    Args:
        task: The task to play.
        episodes: Episodes per kind, N; fewer when ``file`` has fewer.
        seed: Seed of the placements (``seed``, ``seed + 1``, ...) and of the random actions.
        file: HDF5 file of demonstrations; without it the scripted expert plays them.

    Raises:
        ValueError: When there is no expert, the file does not fit, or no demonstration reaches the goal.
    """
    if file is None and not plays(task):
        raise ValueError(
            f"the scripted expert does not play {task.label}; expected --demonstrations FILE.hdf5"
        )
    demos = _read(file, task, episodes) if file else []
    count = len(demos) or episodes
    placements = list(range(seed, seed + count))
    limit = max([len(demo["actions"]) for demo in demos], default=limit_of(task))
    envs = LiberoVectorEnv(count, task.suite, task.task_id, image_size=8, max_episode_steps=limit)
    with contextlib.closing(envs):
        if demos and "states" in demos[0]:
            shown = [_facts_of(envs.simulations[0], demo["states"]) for demo in demos]
        else:
            starts = [demo["seed"] for demo in demos] or placements
            act = (lambda: _replay(demos)) if demos else (lambda: _expert(envs))
            shown = _play(envs, starts, act, limit)
        longest = max(len(facts["success"]) for facts in shown) - 1
        played = {"demonstrations": shown}
        if not (demos and "states" in demos[0]):
            played["drops"] = _play(envs, starts, lambda: _clumsy(act()), longest)
        played["random episodes"] = _play(envs, placements, lambda: _random(count, seed), longest)
    if not any(facts["success"][-1] for facts in shown):
        where = f" of {str(file)!r}" if file else ""
        raise ValueError(f"no demonstration{where} reaches the goal here; expected at least one that does")
    return played


def _play(envs: LiberoVectorEnv, seeds: list[int], start: Callable[[], Act], steps: int) -> list[Facts]:
    """The facts of one episode per environment; ``start`` is called after the reset."""
    rows, alive = [envs.reset(seed=seeds)[1]["facts"]], [np.ones(envs.num_envs, bool)]
    act = start()
    while len(rows) <= steps and not envs.frozen.all():
        alive.append(~envs.frozen)
        rows.append(envs.step(act(len(rows) - 1, rows[-1]))[4]["facts"])
    lengths = np.sum(alive, axis=0)
    return [
        {name: np.array([row[name][i] for row in rows[: lengths[i]]]) for name in FACTS}
        for i in range(envs.num_envs)
    ]


def _expert(envs: LiberoVectorEnv) -> Act:
    expert = ScriptedExpert(envs)
    return lambda t, facts: expert()[0]


def _replay(demos: list[dict[str, Any]]) -> Act:
    """Recorded actions; the last one is repeated past the end."""
    return lambda t, facts: np.stack([demo["actions"][min(t, len(demo["actions"]) - 1)] for demo in demos])


def _clumsy(act: Act) -> Act:
    """``act`` until the object is up; then the hand opens and stays where it is."""
    return lambda t, facts: np.where(
        (facts["object_peak_height"] > DROP_HEIGHT)[:, None], OPEN, act(t, facts)
    )


def _random(count: int, seed: int) -> Act:
    rng = np.random.default_rng(seed)
    return lambda t, facts: rng.uniform(-1.0, 1.0, (count, 7))


def _read(path: Path, task: Task, episodes: int) -> list[dict[str, Any]]:
    """Read the first demonstrations of a file.

    They have ``actions (T, 7)``, and ``states (T, 1 + nq + nv)`` as LIBERO records them or the ``seed`` that
    ``vla_envs.experts`` records.
    """
    if not path.is_file():
        raise ValueError(f"demonstration file {str(path)!r} does not exist")
    with open_hdf5(path, task, ("actions",)) as demos:
        chosen = demos[:episodes]
        actions = [read_parts(demo, {"actions": 7}) for demo in chosen]
        if all("states" in demo for demo in chosen):
            return [a | read_parts(demo, {"states": 0}) for a, demo in zip(actions, chosen)]
        if all("seed" in demo.attrs for demo in chosen):
            return [a | {"seed": int(demo.attrs["seed"])} for a, demo in zip(actions, chosen)]
    raise ValueError(
        f"{str(path)!r} has neither states nor seeds to replay; record it again: python -m vla_envs.experts"
    )


def _facts_of(simulation: Simulation, states: NDArray[np.float64]) -> Facts:
    """The facts (T,) in recorded states, up to success, with fixtures in the middle of their regions.

    Args:
        simulation: A simulation of the task.
        states: Time (s), joint positions and velocities, (T, 1 + nq + nv).

    Raises:
        ValueError: When the states have the wrong shape.
    """
    scene, data = simulation.scene, simulation.data
    nq = scene.model.nq
    if states.ndim != 2 or states.shape[1] != 1 + nq + scene.model.nv:
        raise ValueError(
            f"states have shape {states.shape}; expected (T, {1 + nq + scene.model.nv}) for this task"
        )
    fixtures = scene.recorded_init_state(0)[nq:]
    simulation.restore(np.append(states[0, 1 : 1 + nq], fixtures))
    mujoco.mj_forward(scene.model, data)
    origin, peak = simulation.facts.origin(), np.full(len(scene.goal.kind), -np.inf)
    rows: list[dict[str, float]] = []
    for state in states:
        data.qpos[:], data.qvel[:] = np.split(state[1:], [nq])
        mujoco.mj_forward(scene.model, data)
        peak = np.maximum(peak, data.xpos[scene.goal.subject, 2])
        facts = simulation.facts.read(origin, peak, success=False)
        success = simulation.facts.met.all()
        rows.append(facts | {"success": float(success)})
        if success:
            break
    return {name: np.array([row[name] for row in rows]) for name in FACTS}
