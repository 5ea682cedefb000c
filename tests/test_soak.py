"""Environments that are opened and closed, or just dropped, leave nothing behind."""

import os
import subprocess
import sys

import pytest
from artifacts import ROOT

from benchmarks.soak import Args, Held, held, play, soak, verdict

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
SMALL = Args(num_envs=2, cycles=24, max_episode_steps=3, task_ids=(4,))


@pytest.fixture
def count():
    """How much one environment that is never closed would hold."""
    import gymnasium as gym

    before, envs = held(), []
    for _ in range(4):
        envs.append(gym.make_vec("vla_envs/LiberoObject-v0", num_envs=2, task_id=4, num_threads=2))
        envs[-1].reset(seed=0)
    yield before, held()
    for env in envs:
        env.close()


TWENTY_CYCLES = f"""
from benchmarks.soak import Args, held, open_and_close

cycles = open_and_close({SMALL!r})
for _ in range(4):
    next(cycles)
print(*held())
print(sum(cycles))
print(*held())
"""


@pytest.mark.slow
def test_twenty_cycles_hold_nothing():
    """In a process of their own: the memory of this one is other tests' too."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.strip(os.pathsep)}
    done = subprocess.run(
        [sys.executable, "-c", TWENTY_CYCLES], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    before, count, after = (list(map(float, line.split())) for line in done.stdout.splitlines())
    assert count == [20.0]
    assert after[0] - before[0] < 50  # MB; 20 simulations would be 100
    assert after[1:] == before[1:]  # files, threads, buffers


def test_environments_left_open_are_noticed(count):
    before, after = count
    words = verdict(before, after)
    assert "buffers by 4" in words and "threads by" in words and words.startswith("grown: ")


def test_environments_that_are_dropped_are_freed():
    """Without ``close``."""
    import gymnasium as gym

    before = held()
    for _ in range(3):
        gym.make_vec("vla_envs/LiberoObject-v0", num_envs=2, task_id=4, num_threads=2).reset(seed=0)
    after = held()
    assert (after.buffers, after.files) == (before.buffers, before.files)


def test_verdicts():
    first = Held(100, 6, 2, 1)
    assert verdict(first, Held(119, 6, 2, 1)) == verdict(first, Held(80, 5, 1, 0)) == "flat"
    words = verdict(first, Held(121.5, 7, 2, 3))
    assert words == "grown: memory by 21.5 MB, files by 1, buffers by 2"


@pytest.mark.slow
def test_a_short_soak(capsys):
    assert soak("episodes", 10, play(SMALL))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "episodes: flat" and sum("MB" in line and "/s" in line for line in lines) == 5
