"""Whether anything leaks: thousands of episodes, and environments opened and closed a thousand times.

    python benchmarks/soak.py                              # an hour or so
    python benchmarks/soak.py --episodes 300 --cycles 60   # minutes

After the first hundred, in which caches fill, and every tenth of the way a line says what the process
holds: memory, open files, threads, and OpenGL buffers (one for each scene and picture size), and how fast it
has been since the last line. The verdict compares the end with the first hundred: ``flat``, or what has
grown, and then the exit status is 1.
"""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
from tqdm import tqdm

import vla_envs  # noqa: F401
from vla_envs.command_line import check_numbers, one_line_errors, parse_args
from vla_envs.render import Renderer

FIRST = 100  # episodes or cycles in which caches fill
FLAT_MB = 20  # of growth, on which the allocator and the graphics driver have opinions of their own


@dataclass
class Args:
    episodes: int = 10_000
    """Episodes of random actions in environments that stay open"""
    cycles: int = 1_000
    """Times that environments are made, reset, stepped, rendered and closed"""
    num_envs: int = 8
    """Environments at a time"""
    max_episode_steps: int = 24
    """Control steps of an episode"""
    task_ids: tuple[int, ...] = (4, 0)
    """LIBERO-Object tasks, of the cycles in turn; episodes are of the first"""


class Held(NamedTuple):
    """What the process holds."""

    memory: float  # MB, resident
    files: int
    threads: int
    buffers: int  # of OpenGL

    def __str__(self) -> str:
        return f"{self.memory:7.1f} MB, {self.files} files, {self.threads} threads, {self.buffers} buffers"


def held() -> Held:
    """What the process holds now, garbage aside (Linux)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(
        pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        sum(issubclass(type(thing), Renderer) for thing in gc.get_objects()),
    )


def verdict(first: Held, last: Held) -> str:
    """``flat``, or what has grown."""
    grown = [f"memory by {last.memory - first.memory:.1f} MB"] if last.memory - first.memory > FLAT_MB else []
    for name in ("files", "threads", "buffers"):
        more = getattr(last, name) - getattr(first, name)
        if more > 0:
            grown.append(f"{name} by {more}")
    return f"grown: {', '.join(grown)}" if grown else "flat"


def soak(name: str, count: int, work: Iterator[int]) -> bool:
    """Draw ``count`` units from ``work``, saying what is held on the way; whether it stayed flat."""
    seen: list[Held] = []
    first = min(FIRST, count // 5)
    marks = [first, *(mark for tenth in range(1, 11) if (mark := count * tenth / 10) > first)]
    done, last, start = 0, 0, time.perf_counter()
    with tqdm(total=count, desc=name, unit=name[:-1]) as bar:
        for units in work:
            done += units
            bar.update(units)
            if done >= marks[0]:
                marks = [mark for mark in marks if mark > done]
                seen.append(held())
                rate = (done - last) / (time.perf_counter() - start)
                bar.write(f"{name} {done:6}: {seen[-1]}, {rate:.2f}/s")
                last, start = done, time.perf_counter()
            if done >= count:
                break
    words = verdict(seen[0], seen[-1])
    print(f"{name}: {words}", flush=True)
    return words == "flat"


def play(args: Args) -> Iterator[int]:
    """Episodes of random actions, on new scenes each; their number every time that all have ended."""
    envs = gym.make_vec(
        "vla_envs/LiberoObject-v0", num_envs=args.num_envs, task_id=args.task_ids[0],
        max_episode_steps=args.max_episode_steps,
    )  # fmt: skip
    envs.action_space.seed(0)
    seed = 0
    try:
        while True:
            envs.reset(seed=seed)
            while not envs.unwrapped.frozen.all():
                envs.step(envs.action_space.sample())
            seed += args.num_envs
            yield args.num_envs
    finally:
        envs.close()


def open_and_close(args: Args) -> Iterator[int]:
    """One of each kind of environment made, used and closed."""
    for cycle in range(args.cycles):
        task_id = args.task_ids[cycle % len(args.task_ids)]
        options = {"task_id": task_id, "render_mode": "rgb_array"}
        makers: tuple[Callable[..., gym.Env | gym.vector.VectorEnv], ...] = (
            lambda **kwargs: gym.make("vla_envs/LiberoObject-v0", **kwargs),
            lambda **kwargs: gym.make_vec("vla_envs/LiberoObject-v0", num_envs=args.num_envs, **kwargs),
        )
        for make in makers:
            env = make(**options)
            env.reset(seed=cycle)
            env.step(env.action_space.sample())
            env.render()
            env.close()
        yield 1


if __name__ == "__main__":
    arguments = parse_args(Args)
    with one_line_errors():
        check_numbers(arguments, "num_envs", "max_episode_steps", above=True)
        flat = soak("episodes", arguments.episodes, play(arguments))
        flat &= soak("cycles", arguments.cycles, open_and_close(arguments))
    raise SystemExit(0 if flat else 1)
