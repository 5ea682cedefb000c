"""The threads that do an environment's work: what they begin they end, whatever ends the call that asked."""

import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Crew:
    """An environment's threads, which do the work of one call at a time.

    Ctrl-C is raised in the main thread alone, at any instruction, and so is what other signals raise. These
    threads are never interrupted: what must not be torn is done by them.

    Args:
        size: Number of threads.
    """

    def __init__(self, size: int) -> None:
        self.in_use = threading.Lock()  # held during a call
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(size)
        self._working = [threading.Lock() for _ in range(size)]  # each held while a thread works
        self._todo: list[int] = []

    def do(self, work: Callable[[int], T], indices: Iterable[int]) -> list[T]:
        """What ``work`` returns for each of ``indices``.

        When one of them raises an exception, or the calling thread is interrupted, what has not begun is
        not begun, and what has begun is waited for.
        """
        given, results = list(indices), {}
        todo = self._todo = given.copy()
        rest = iter(todo)  # shared by the threads; over when the list is cleared

        def share(working: threading.Lock) -> None:
            try:
                with working:
                    for i in rest:
                        results[i] = work(i)
            except BaseException:
                todo.clear()
                raise

        try:
            futures = [self._pool.submit(share, working) for working in self._working[: len(given)]]
            for future in futures:
                future.result()
        finally:
            self.stop()
        return [results[i] for i in given]

    def stop(self) -> None:
        """Begin nothing more, and wait for what has begun."""
        self._todo.clear()
        for working in self._working:
            with working:
                pass

    def is_ours(self) -> bool:
        """Whether this process made the threads; one that is forked from it has none of them."""
        return os.getpid() == self._process

    def is_left_working(self) -> bool:
        """Whether a thread still does what a call began that has ended: it was interrupted twice."""
        return not self.in_use.locked() and any(working.locked() for working in self._working)

    def check(self) -> None:
        """Raise a RuntimeError when a call must not begin now."""
        if not self.is_ours():
            raise RuntimeError(
                f"the environment was made by process {self._process}, of which this one, {os.getpid()}, is a"
                " fork; expected one that this process has made"
            )
        if self.in_use.locked():
            raise RuntimeError(
                "the environment is in use by a call that has not ended, in another thread or in this one;"
                " expected one call at a time"
            )

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def alone(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Let a method of an environment with a ``_crew`` run when no other does, nor what one has left behind.

    Raises:
        RuntimeError: From the method, when another call has not ended, or in a forked process.
    """

    @functools.wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        crew: Crew = self._crew
        crew.check()
        with crew.in_use:
            crew.stop()
            return method(self, *args, **kwargs)

    return call
