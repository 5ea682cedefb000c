"""Environments split over processes: the same results, and what happens when one of the processes dies."""

import copy
import multiprocessing
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pytest

import vla_envs
from vla_envs.vector import LiberoVectorEnv
from vla_envs.workers import LiberoWorkersEnv, _join, _sendable

SETTINGS = {"image_size": 32, "settle_steps": 2, "num_threads": 1}


def make(workers, num_envs=3, **settings):
    return gym.make_vec(
        "vla_envs/LiberoObject-v0", num_envs=num_envs, workers=workers, **{**SETTINGS, **settings}
    )


@pytest.fixture(scope="module")
def shared():
    """Three environments in two processes, which take seconds to start."""
    envs = make(2)
    yield envs
    envs.close()


def same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            same(one[name], other[name])
    elif isinstance(one, tuple) or (isinstance(one, np.ndarray) and one.dtype == object):
        for pair in zip(one, other, strict=True):
            same(*pair)
    elif one is None or other is None:
        assert one is other
    else:
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "mode", ["Disabled", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("NextStep", "SameStep"))]
)
def test_the_same_as_one_process(mode):
    """Of different tasks, with both cameras, chunks, resets of some, and episodes that end."""
    settings = {
        "task_id": [4, 0, 4], "action_chunk": 2, "wrist_camera": True, "max_episode_steps": 6,
        "reward": "multi_stage", "autoreset_mode": mode, "render_mode": "rgb_array",
    }  # fmt: skip
    one, split = make(1, **settings), make(2, **settings)
    try:
        assert isinstance(one, LiberoVectorEnv) and isinstance(split, LiberoWorkersEnv)
        for name in (
            "single_observation_space", "observation_space", "single_action_space", "action_space",
            "num_envs", "metadata", "autoreset_mode", "instructions", "tasks", "max_episode_steps",
            "render_mode",
        ):  # fmt: skip
            assert getattr(one, name) == getattr(split, name), name
        same(one.reset(seed=5), split.reset(seed=5))
        actions = np.random.default_rng(0).uniform(-1, 1, (5, *one.action_space.shape))
        with warnings.catch_warnings(record=True) as given:  # one each, of a step when all have finished
            warnings.simplefilter("always")
            for action in actions:
                same(one.step(action), split.step(action))
                same(one.qpos, split.qpos)
                assert np.array_equal(one.steps, split.steps) and np.array_equal(one.frozen, split.frozen)
        assert [each.filename for each in given] == ([__file__] * 2 if mode == "Disabled" else [])
        mask = np.array([False, False, True])
        for options in ({"reset_mask": mask}, {"init_state_id": [3, 4, 5], "reset_mask": ~mask}):
            one.set_reward("binary"), split.set_reward("binary")
            same(one.reset(seed=[7, 7, 7], options=options), split.reset(seed=[7, 7, 7], options=options))
        same(one.step(actions[0]), split.step(actions[0]))
        same(one.render(), split.render())
        assert one.stages == split.stages and all(split.seconds[kind] > 0 for kind in one.seconds)
        assert [process.is_alive() for process in split._processes] == [True] * 2
    finally:
        one.close()
        split.close()
    assert not any(process.is_alive() for process in split._processes)


def test_observations_are_arrays_of_their_own(shared):
    first, _ = shared.reset(seed=0)
    before = {name: array.copy() for name, array in first.items()}
    shared.step(np.ones(shared.action_space.shape))
    same(first, before)


def test_refused_calls_change_nothing(shared):
    envs = shared
    envs.reset(seed=0)
    envs.step(np.ones((3, 7)))
    qpos, steps = envs.qpos, envs.steps
    for call, words in (
        (lambda: envs.step(np.zeros((2, 7))), r"actions have shape \(2, 7\); expected \(3, 7\)"),
        (lambda: envs.step(np.full((3, 7), np.nan)), r"actions of environments \[0, 1, 2\] are NaN"),
        (lambda: envs.reset(seed=[0, 1]), "seed has 2 entries; expected one per environment, 3"),
        (lambda: envs.reset(options={"init_state_id": [0, 1, 50]}), "init_state_id 50 does not exist"),
        (lambda: envs.reset(options={"mask": 1}), "reset options"),
        (lambda: envs.set_reward("sparse"), "sparse"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
        assert np.array_equal(envs.qpos, qpos) and np.array_equal(envs.steps, steps)
    envs.step(np.zeros((3, 7)))


class Proxy:
    """A worker's pipe, with something that happens before an answer is read, or in its place."""

    def __init__(self, pipe, before=lambda: None, instead=lambda answer: answer):
        self.send, self.close, self._pipe, self._before, self._instead = (
            pipe.send, pipe.close, pipe, before, instead,
        )  # fmt: skip

    def recv(self):
        self._before()
        return self._instead(self._pipe.recv())


WANTED = r"step was called before reset of environments \[0, 1, 2\], .* which an interrupt or an error left"


def test_an_interrupted_call_leaves_no_answer_behind(shared, interrupt, monkeypatch):
    """Neither of a step, nor of a reset, nor of what only looks."""
    envs = shared
    for call, left in (
        (lambda: envs.step(np.ones((3, 7))), True),
        (lambda: envs.reset(options={"reset_mask": np.ones(3, bool)}), True),
        (lambda: envs.qpos, False),
    ):
        envs.reset(seed=0)
        with monkeypatch.context() as patch:
            patch.setattr(envs, "_pipes", [Proxy(envs._pipes[0], interrupt), envs._pipes[1]])
            with pytest.raises(KeyboardInterrupt):
                call()
        assert envs.qpos.shape[0] == 3
        if left:
            with pytest.raises(gym.error.ResetNeeded, match=WANTED):
                envs.step(np.zeros((3, 7)))
        else:
            envs.step(np.zeros((3, 7)))
        _, info = envs.reset(options={"init_state_id": [5, 6, 7]})
        assert info["init_state_id"].tolist() == [5, 6, 7] and envs.steps.tolist() == [0] * 3
        info = envs.step(np.zeros((3, 7)))[4]
        assert info["init_state_id"].tolist() == [5, 6, 7] and envs.steps.tolist() == [1] * 3


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_ctrl_c_does_not_reach_a_worker(shared):
    """From its start on: it holds back what its parent's thread held back, before a line of Python runs."""
    for process in shared._processes:
        with open(f"/proc/{process.pid}/status") as file:
            status = dict(line.split(":", 1) for line in file)
        assert int(status["SigBlk"], 16) & 1 << signal.SIGINT - 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # here it does


def test_an_exception_of_one_worker_leaves_no_answer_behind(shared, monkeypatch):
    envs = shared
    envs.reset(seed=0)
    with monkeypatch.context() as patch:
        broken = Proxy(envs._pipes[0], instead=lambda answer: RuntimeError("no OpenGL"))
        patch.setattr(envs, "_pipes", [broken, envs._pipes[1]])
        with pytest.raises(RuntimeError, match="no OpenGL"):
            envs.step(np.zeros((3, 7)))
    with pytest.raises(gym.error.ResetNeeded, match=WANTED):
        envs.step(np.zeros((3, 7)))
    assert envs.reset(options={"init_state_id": 4})[1]["init_state_id"].tolist() == [4] * 3
    assert envs.steps.tolist() == [0] * 3


def test_an_interrupt_leaves_no_two_rewards(shared, interrupt, monkeypatch):
    envs = shared
    envs.reset(seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(envs, "_pipes", [Proxy(envs._pipes[0], interrupt), envs._pipes[1]])
        with pytest.raises(KeyboardInterrupt):
            envs.set_reward("multi_stage")
    assert envs.step(np.zeros((3, 7)))[1].tolist() == [-2.0] * 3
    envs.set_reward("binary")


def test_a_worker_that_hangs_can_be_left(interrupt):
    """By a second Ctrl-C; what it would have answered is nobody's, and closing ends it."""
    envs = make(2)
    envs.reset(seed=0)

    def twice():
        interrupt()
        interrupt()

    envs._pipes[1] = Proxy(envs._pipes[1], twice)
    os.kill(envs._processes[1].pid, signal.SIGSTOP)
    with pytest.raises(KeyboardInterrupt):
        envs.step(np.zeros((3, 7)))
    envs.close()
    assert envs._processes[1].exitcode == -signal.SIGKILL
    assert not any(process.is_alive() for process in envs._processes)


def test_two_threads_at_once_are_refused(shared, monkeypatch):
    envs = shared
    envs.reset(seed=0)
    begun, refused = threading.Event(), threading.Event()

    def wait():
        begun.set()
        assert refused.wait(30)

    monkeypatch.setattr(envs, "_pipes", [Proxy(envs._pipes[0], wait), envs._pipes[1]])
    with ThreadPoolExecutor(1) as other:
        step = other.submit(envs.step, np.zeros((3, 7)))
        assert begun.wait(30)
        for call in (
            lambda: envs.step(np.zeros((3, 7))),
            lambda: envs.reset(seed=0),
            lambda: envs.render(),
            lambda: envs.qpos,
            lambda: envs.set_reward("multi_stage"),
            lambda: envs.close(),
        ):
            with pytest.raises(RuntimeError, match="the environment is busy with a call that has not ended"):
                call()
        refused.set()
        assert step.result()[1].tolist() == [0.0] * 3
    assert envs.steps.tolist() == [1] * 3 and not envs.closed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_refused(shared):
    """Closing there leaves the parent's as it is."""
    shared.reset(seed=0)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest's may run here
        signal.alarm(30)
        try:
            shared.step(np.zeros((3, 7)))
        except RuntimeError as error:
            shared.close()
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert f"this process, {child}, is a fork" in pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    shared.step(np.zeros((3, 7)))
    assert shared.steps.tolist() == [1] * 3


def test_an_exception_that_cannot_be_sent():
    class UnknownError(OSError):
        """Of no module that another process finds."""

    assert isinstance(_sendable(ValueError("x")), ValueError)
    assert repr(_sendable(UnknownError("no display"))) == "RuntimeError('UnknownError: no display')"


def test_recorded_states_with_a_reward_to_learn_from_give_a_warning(shared):
    shared.set_reward("multi_stage")
    with pytest.warns(UserWarning, match="train on seeds"):
        shared.reset(options={"init_state_id": 0})
    shared.set_reward("binary")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workers": 0}, "workers is 0; expected an int of at least 1"),
        ({"workers": 4}, "num_envs is 3; expected at least one environment per worker, 4"),
        ({"workers": 2, "task_id": [4, 4]}, "task_id has 2 entries; expected one per environment, 3"),
        ({"workers": 2, "task_id": 10}, "task_id"),
        ({"workers": 2, "num_envs": "3"}, "num_envs is '3'; expected an int"),
        ({"workers": 2, "image_size": 0}, "image_size is 0"),
        ({"workers": 2, "reward": "binery"}, "did you mean 'binary'"),
        ({"workers": 2, "reward": lambda facts: facts["success"]}, "cannot be sent to a worker"),
        ({"workers": 2, "max_episode_steps": -1}, "max_episode_steps is -1"),
    ],
)
def test_bad_arguments(settings, words):
    before = multiprocessing.active_children()
    with pytest.raises(ValueError, match=words):
        make(**settings)
    assert set(multiprocessing.active_children()) <= set(before)


def test_an_interrupt_while_workers_start_ends_them(monkeypatch):
    """At once, though they are still busy with starting."""
    started = []

    def receive(self, k):
        started.extend(self._processes)
        raise KeyboardInterrupt

    monkeypatch.setattr(LiberoWorkersEnv, "_receive", receive)
    with pytest.raises(KeyboardInterrupt):
        make(2)
    assert [process.exitcode for process in started] == [-signal.SIGKILL] * 2


def test_an_argument_that_does_not_exist():
    for workers in (1, 2):
        with pytest.raises(TypeError, match=r"argument 'taskid' is unknown; .*did you mean 'task_id'"):
            make(workers, taskid=4)


def test_a_reward_that_cannot_be_sent_later():
    envs = make(2)
    with pytest.raises(ValueError, match="cannot be sent to a worker"):
        envs.unwrapped.set_reward(lambda facts: facts["success"])
    envs.close()


def test_a_copy_has_workers_of_its_own(shared):
    expected = shared.reset(seed=5)
    copied = copy.deepcopy(shared)
    same(copied.reset(seed=5), expected)
    copied.close()
    shared.step(np.zeros((3, 7)))


def test_a_wrappers_reward_is_not_sent(shared):
    envs = vla_envs.FactsReward(shared, lambda facts: -facts["gripper_to_object"])
    envs.reset(seed=0)
    assert (envs.step(np.zeros((3, 7)))[1] < 0).all()


def test_the_workers_random_generators(shared):
    shared.reset(seed=[5, 3, 8])
    assert shared.np_random_seed == (5, 3, 8)
    before = shared.np_random
    shared.reset()
    qpos = shared.qpos
    shared.np_random = before
    shared.reset()
    assert np.array_equal(shared.qpos, qpos) and shared.np_random_seed == (-1, -1, -1)
    with pytest.raises(ValueError, match=r"np_random is .*; expected 3 np.random.Generator"):
        shared.np_random = before[:2]


def test_a_worker_that_dies_is_named():
    envs = make(2)
    with pytest.raises(gym.error.ResetNeeded, match="step was called before reset"):
        envs.step(np.zeros((3, 7)))
    envs.reset(seed=0)
    os.kill(envs._processes[1].pid, signal.SIGKILL)
    start = time.perf_counter()
    with pytest.raises(
        RuntimeError, match=r"worker 1 \(environments 2 to 2, process \d+\) was killed by SIGKILL"
    ):
        envs.step(np.zeros((3, 7)))
    assert time.perf_counter() - start < 20
    assert not any(process.is_alive() for process in envs._processes)
    with pytest.raises(RuntimeError, match="the environment is closed"):
        envs.reset(seed=0)
    envs.close()


def test_what_one_worker_has_not_is_zero_or_none():
    infos = [{"stage": np.array([1, 2])}, {"stage": np.array([3]), "final": {"x": np.array([1.0])}}]
    infos[1]["final_obs"] = np.array([{"a": 1}], dtype=object)
    joined = _join(infos, [2, 1])
    assert joined["stage"].tolist() == [1, 2, 3] and joined["final"]["x"].tolist() == [0.0, 0.0, 1.0]
    assert joined["final_obs"].tolist() == [None, None, {"a": 1}]
