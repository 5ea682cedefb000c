"""An environment's threads: what ends a call leaves none at work, and the next call is as any other."""

import os
import threading

import pytest

from vla_envs.threads import Crew, exclusive


@pytest.fixture
def crew():
    crew = Crew(2)
    yield crew
    crew.close()


def test_results_are_in_order(crew):
    """Also where there are more threads than work, and none."""
    assert crew.do(lambda i: 10 * i, range(7, 0, -1)) == [70, 60, 50, 40, 30, 20, 10]
    assert crew.do(lambda i: 10 * i, [3]) == [30] and crew.do(lambda i: 10 * i, []) == []


def test_two_are_at_work_at_a_time(crew):
    meeting, most = threading.Barrier(2, timeout=30), []
    assert crew.do(lambda i: meeting.wait() >= 0 and most.append(i), range(8)) == [None] * 8
    assert sorted(most) == list(range(8))


def test_an_interrupt_waits_for_what_has_begun_and_begins_nothing_more(crew, interrupt):
    both, begun, ended = threading.Barrier(2, timeout=30), [], []

    def work(i):
        begun.append(i)
        if both.wait() == 0:
            interrupt()
        both.wait()
        ended.append(i)

    with pytest.raises(KeyboardInterrupt):
        crew.do(work, range(8))
    assert sorted(begun) == sorted(ended) == [0, 1]
    assert crew.do(lambda i: i, range(8)) == list(range(8))
    assert sorted(begun) == [0, 1]


def test_the_next_call_waits_for_what_two_interrupts_have_left(crew, interrupt):
    left, order = threading.Event(), []

    def work(i):
        interrupt()
        interrupt()
        assert left.wait(30)
        order.append("left")

    class Environment:
        _crew = crew

        @exclusive
        def look(self):
            order.append("look")

    with pytest.raises(KeyboardInterrupt):
        crew.do(work, [0])
    assert crew.outlived_its_call() and not order
    threading.Timer(0.1, left.set).start()
    Environment().look()
    assert order == ["left", "look"] and not crew.outlived_its_call()


def test_an_interrupt_while_work_is_handed_out(crew, monkeypatch):
    """What has been handed out, though nobody knows it, is waited for."""
    submit, begun, goes_on, ended = crew._pool.submit, threading.Event(), threading.Event(), []

    def interrupted(*arguments):
        submit(*arguments)
        assert begun.wait(30)
        threading.Timer(0.1, goes_on.set).start()
        raise KeyboardInterrupt

    def work(i):
        begun.set()
        assert goes_on.wait(30)
        ended.append(i)

    monkeypatch.setattr(crew._pool, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        crew.do(work, range(8))
    assert ended == [0]
    monkeypatch.undo()
    assert crew.do(lambda i: i, range(8)) == list(range(8)) and ended == [0]


def test_an_exception_waits_for_what_has_begun_and_begins_nothing_more(crew):
    both, failed, ended = threading.Barrier(2, timeout=30), threading.Event(), []

    def work(i):
        both.wait()
        if i == 0:
            failed.set()
            raise OSError("out of order")
        assert failed.wait(30)
        ended.append(i)

    with pytest.raises(OSError, match="out of order"):
        crew.do(work, [0, 1])
    assert ended == [1]

    def one_by_one(i):
        ended.append(i)
        raise OSError("out of order")

    with pytest.raises(OSError, match="out of order"):
        Crew(1).do(one_by_one, [2, 3])
    assert ended == [1, 2]


def test_one_call_at_a_time(crew):
    """From another thread, and from within."""

    class Environment:
        _crew = crew

        @exclusive
        def outer(self, call):
            return call()

    environment, words = Environment(), r"busy with a call that has not ended.*; make one call at a time"
    with pytest.raises(RuntimeError, match=words):
        environment.outer(lambda: environment.outer(int))
    assert environment.outer(lambda: 1) == 1  # an exception ends a call too

    def elsewhere():
        with pytest.raises(RuntimeError, match=words):
            environment.outer(int)
        return threading.current_thread()

    assert environment.outer(lambda: Crew(1).do(lambda i: elsewhere(), [0])) != [threading.current_thread()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_no_threads(crew, monkeypatch):
    assert crew.is_ours()
    monkeypatch.setattr(os, "getpid", lambda: 7)
    assert not crew.is_ours()
    with pytest.raises(RuntimeError, match=r"belongs to process \d+, and this process, 7, is a fork of it"):
        crew.require_idle()
