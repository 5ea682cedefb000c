"""How fast: this package against LIBERO's own vector environment, measured in one run.

    python benchmarks/throughput.py                                   # built-in assets on both sides
    python benchmarks/throughput.py --perturb noise:3                 # perturbed scenes beside plain ones
    LIBERO_ASSETS=/path/to/libero_assets python benchmarks/throughput.py   # and both on LIBERO's own assets

LIBERO's side is its ``SubprocVectorEnv`` of ``OffScreenRenderEnv``, at the best of several worker counts.
TorchRL's (``pip install torchrl``) is its ``ParallelEnv`` of ``LiberoEnv``, likewise.
Machines are noisy: every figure is the best of ``--repeats`` measurements, both sides in the same run.
"""

import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

import vla_envs  # noqa: F401
from vla_envs.assets.builtin import write_builtin
from vla_envs.build_scene import write_libero_config
from vla_envs.command_line import one_line_errors, parse_args
from vla_envs.tasks import get_task

PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION


@dataclass
class Args:
    task_id: int = 4
    """LIBERO-Object task"""
    repeats: int = 3
    """Measurements of each figure; the best counts"""
    steps: int = 60
    """Control steps of each of LIBERO's measurements"""
    workers: tuple[int, ...] = (2, 3, 4)
    """Worker counts tried for LIBERO; the best counts"""
    perturb: str | None = None
    """Measure perturbed scenes beside plain ones instead, as camera:3,light:3"""


# ---- LIBERO's side -----------------------------------------------------------------------------------


def _make_libero(bddl_file: str, assets: str, cameras: tuple[str, ...]) -> Any:
    import libero.libero
    from libero.libero.envs import OffScreenRenderEnv

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is this program's, which ends its workers

    libero.libero._assets_path_cache = assets
    env = OffScreenRenderEnv(
        bddl_file_name=bddl_file, camera_heights=128, camera_widths=128, camera_names=list(cameras)
    )
    env.reset = env.env.reset  # its own reset swallows every exception
    return env


def libero_speed(assets: str, cameras: tuple[str, ...], args: Args) -> tuple[float, float, int]:
    """LIBERO's env-steps/s and seconds a reset, at the best worker count, and that count."""
    from libero.libero.envs import SubprocVectorEnv

    bddl_file = str(get_task("LiberoObject", args.task_id).bddl_file)
    best = (0.0, 0.0, 0)
    for workers in args.workers:
        envs = SubprocVectorEnv([partial(_make_libero, bddl_file, assets, cameras) for _ in range(workers)])
        envs.reset()
        start = time.perf_counter()
        envs.reset()
        reset_s = (time.perf_counter() - start) / workers
        rng = np.random.default_rng(0)
        speed = 0.0
        for _ in range(args.repeats):
            start = time.perf_counter()
            for _ in range(args.steps // workers):
                envs.step(rng.uniform(-0.5, 0.5, (workers, 7)))
            speed = max(speed, args.steps // workers * workers / (time.perf_counter() - start))
        envs.close()
        best = max(best, (speed, reset_s, workers))
    return best


# ---- TorchRL's side ----------------------------------------------------------------------------------


def _make_torchrl(task_id: int, assets: str) -> Any:
    import libero.libero
    from torchrl.envs import LiberoEnv

    signal.signal(signal.SIGINT, signal.SIG_IGN)

    libero.libero._assets_path_cache = assets
    cameras = {"camera_names": ["agentview"]}
    return LiberoEnv("libero_object", task_id, camera_height=128, camera_width=128, env_kwargs=cameras)


def torchrl_speed(assets: str, args: Args) -> float:
    """Env-steps/s of TorchRL's ``ParallelEnv`` of ``LiberoEnv``, one camera, at the best worker count."""
    import torch
    from torchrl.envs import ParallelEnv

    speed = 0.0
    for workers in args.workers:
        makers = [partial(_make_torchrl, args.task_id, assets)] * workers
        envs = ParallelEnv(workers, makers, daemon=True)
        state = envs.reset()
        for _ in range(args.repeats):
            start = time.perf_counter()
            for _ in range(args.steps // workers):
                state["action"] = torch.rand(workers, 7) - 0.5
                state = envs.step_and_maybe_reset(state)[1]
            speed = max(speed, args.steps // workers * workers / (time.perf_counter() - start))
        envs.close()
    return speed


# ---- Our side ----------------------------------------------------------------------------------------


def our_speed(args: Args, chunk: int, **settings: Any) -> float:
    """Env-steps/s of 8 environments with one 128 px camera, an image every ``chunk`` control steps."""
    envs = gym.make_vec(
        "vla_envs/LiberoObject-v0",
        num_envs=8,
        task_id=args.task_id,
        action_chunk=chunk,
        max_episode_steps=100_000,
        **settings,
    )
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (20, *envs.action_space.shape))
    speed = 0.0
    for _ in range(args.repeats + 1):  # the first warms up
        envs.reset(seed=[7] * 8)
        start = time.perf_counter()
        for action in actions:
            envs.step(action)
        speed = max(speed, 20 * 8 * chunk / (time.perf_counter() - start))
    envs.close()
    return speed


def thread_scaling(args: Args) -> float:
    """Physics of 8 environments on two threads over one, measured in turns; the best time of each."""
    seconds = {1: float("inf"), 2: float("inf")}
    envs = gym.make_vec(
        "vla_envs/LiberoObject-v0", num_envs=8, task_id=args.task_id, max_episode_steps=100_000
    )
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (8, 160, 7))
    for _ in range(2 * args.repeats):
        for threads in seconds:
            envs.reset(seed=[7] * 8)
            with ThreadPoolExecutor(threads) as pool:
                start = time.perf_counter()
                list(pool.map(lambda i: envs.simulations[i].execute(actions[i]), range(8)))
                seconds[threads] = min(seconds[threads], time.perf_counter() - start)
    envs.close()
    return seconds[1] / seconds[2]


def control_step_ratio(args: Args) -> float:
    """Time of one control step over that of 25 bare ``mj_step`` calls from the same states, one thread."""
    envs = gym.make_vec("vla_envs/LiberoObject-v0", num_envs=1, task_id=args.task_id, num_threads=1)
    simulation = envs.simulations[0]
    model, data = simulation.scene.model, simulation.data
    state = np.empty(mujoco.mj_stateSize(model, PHYSICS))
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (60, 1, 7))
    ratios = []
    for _ in range(args.repeats):
        envs.reset(seed=[0])
        bare = control = 0.0
        for action in actions:
            mujoco.mj_getState(model, data, state, PHYSICS)
            start = time.perf_counter()
            for _ in range(25):
                mujoco.mj_step(model, data)
            bare += time.perf_counter() - start
            mujoco.mj_setState(model, data, state, PHYSICS)
            start = time.perf_counter()
            simulation.execute(action)
            control += time.perf_counter() - start
        ratios.append(control / bare)
    envs.close()
    return min(ratios)


def reset_seconds(args: Args) -> tuple[float, float]:
    """Seconds to reset a group of 8: to its scene again, and to a scene never seen."""
    envs = gym.make_vec("vla_envs/LiberoObject-v0", num_envs=8, task_id=args.task_id, action_chunk=8)
    envs.reset(seed=[0] * 8)
    again, fresh = [], []
    for seed in range(1, 1 + 5 * args.repeats):
        for times in (fresh, again):
            start = time.perf_counter()
            envs.reset(seed=[seed] * 8)
            times.append(time.perf_counter() - start)
    envs.close()
    return min(again), min(fresh)


def memory_per_environment(args: Args) -> float:
    """Resident MB that each environment beyond the eighth adds, in use."""

    def resident(num_envs: int) -> float:
        code = (
            "import gymnasium as gym, numpy as np, psutil, vla_envs\n"
            f"envs = gym.make_vec('vla_envs/LiberoObject-v0', num_envs={num_envs}, task_id={args.task_id})\n"
            "envs.reset(seed=0)\n"
            "for _ in range(5): envs.step(np.zeros(envs.action_space.shape))\n"
            "print(psutil.Process().memory_info().rss / 2**20)\n"
        )
        return float(
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        )

    return (resident(72) - resident(8)) / 64


def perturbed(args: Args) -> None:
    """Print the speed of perturbed scenes over that of plain ones, measured in turns: medians and ranges."""
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (20, 8, 8, 7))
    for chunk in (1, 8):
        pair = [
            gym.make_vec(
                "vla_envs/LiberoObject-v0", num_envs=8, task_id=args.task_id, action_chunk=chunk,
                max_episode_steps=100_000, perturb=perturb,
            )
            for perturb in (args.perturb, None)
        ]  # fmt: skip
        seconds: dict[str, list[list[float]]] = {"steps": [], "resets": []}  # perturbed, plain
        for repeat in range(4 * args.repeats + 1):
            reset_s, step_s = [], []
            for envs in pair:
                start = time.perf_counter()
                envs.reset(seed=[8 * repeat + i for i in range(8)])
                reset_s.append(time.perf_counter() - start)
                start = time.perf_counter()
                for action in actions:
                    envs.step(action[:, 0] if chunk == 1 else action)
                step_s.append(time.perf_counter() - start)
            if repeat:  # the first warms up
                seconds["steps"].append(step_s)
                seconds["resets"].append(reset_s)
        for what, its in seconds.items():
            ratios = [plain / slow for slow, plain in its]
            print(
                f"{args.perturb}, an image every {chunk} control steps: {what} at {np.median(ratios):.2f} of"
                f" the plain speed ({min(ratios):.2f} to {max(ratios):.2f})"
            )
        ms = 1e3 * np.median(seconds["resets"], axis=0)
        print(f"a reset of the 8 to new placements: {ms[0]:.0f} ms, plain {ms[1]:.0f} ms")
        for envs in pair:
            envs.close()


def main(args: Args) -> None:
    """Measure both sides and print the table."""
    if args.perturb:
        return perturbed(args)
    # LIBERO's import asks a question unless it finds a configuration: give it one of its own.
    temporary = tempfile.TemporaryDirectory(prefix="vla_envs-")
    scratch = Path(temporary.name)
    write_libero_config(scratch)
    os.environ["LIBERO_CONFIG_PATH"] = str(scratch)
    os.environ.setdefault("MUJOCO_GL", "egl")
    write_builtin(scratch / "assets")
    columns = {"built-in": str(scratch / "assets")}
    if os.environ.get("LIBERO_ASSETS"):
        columns = {"real": os.environ["LIBERO_ASSETS"], **columns}
    else:
        print("LIBERO_ASSETS is not set: LIBERO is measured on the built-in assets alone.")

    every, chunked = our_speed(args, 1), our_speed(args, 8)
    rows = [
        ("env-steps/s, one camera, an image every control step", every, 0),
        ("the same, ours in chunks of 8", chunked, 0),
        ("as the scripts run / LIBERO as it comes, two cameras", chunked, 1),
    ]
    if "real" in columns:
        for quality in ("fast", "exact"):
            for workers in (1, 2):
                speed = our_speed(args, 1, assets=columns["real"], quality=quality, workers=workers)
                label = (
                    f'ours on real assets, `quality="{quality}"`, `workers={workers}`, an image every step'
                )
                rows.append((label, speed, 0))
    again, fresh = reset_seconds(args)
    measured = {}
    for name, assets in columns.items():
        one = libero_speed(assets, ("agentview",), args)
        two = libero_speed(assets, ("agentview", "robot0_eye_in_hand"), args)
        measured[name] = [one, two]
        if find_spec("torchrl"):
            measured[name].append((torchrl_speed(assets, args), 0.0, 0))
        print(f"LIBERO on {name} assets: {one[0]:.0f} env-steps/s with one camera ({one[2]} workers), "
              f"{two[0]:.0f} with two ({two[2]} workers)")  # fmt: skip
    if find_spec("torchrl"):
        rows.append(("an image every control step / TorchRL's `LiberoEnv` instead", every, 2))
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, MuJoCo {mujoco.__version__}\n")
    print("| ours / theirs | " + " | ".join(f"LIBERO on {name} assets" for name in columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for label, ours, cameras in rows:
        speeds = [measured[name][cameras][0] for name in columns]
        print(f"| {label} | " + " | ".join(f"{ours:.0f} / {x:.0f} = {ours / x:.1f} x" for x in speeds) + " |")
    for label, ours in (("again", again), ("to a new scene", fresh)):
        seconds = [8 * measured[name][0][1] for name in columns]
        cells = [f"{ours * 1e3:.1f} / {x * 1e3:.0f} ms = {x / ours:.0f} x" for x in seconds]
        print(f"| resetting a group of 8 {label} | " + " | ".join(cells) + " |")
    print("\n| ours alone | |\n| --- | --- |")
    print(f"| one control step / 25 bare mj_step, one thread | {control_step_ratio(args):.2f} x |")
    print(f"| physics on two threads / one | {thread_scaling(args):.2f} x |")
    print(f"| memory per further environment | {memory_per_environment(args):.1f} MB |")


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn", force=True)
    arguments = parse_args(Args)
    with one_line_errors():
        main(arguments)
