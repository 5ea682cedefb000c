"""The threads that do an environment's work; they finish what they begin, even if the call is interrupted."""

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

    Ctrl-C and other signals raise exceptions only in the main thread, at any instruction. These threads are
    never interrupted, so they do the work that must not stop halfway.

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
        """Do ``work`` for each of ``indices``, and return the results.

        When one raises an exception, or the calling thread is interrupted, no further work begins, and this
        method waits for the work that has begun.
        """
        given, results = list(indices), {}
        todo = self._todo = given.copy()
        rest = iter(todo)  # the threads share it; it ends when the list is cleared

        def work_on(working: threading.Lock) -> None:
            try:
                with working:
                    for i in rest:
                        results[i] = work(i)
            except BaseException:
                todo.clear()
                raise

        try:
            futures = [self._pool.submit(work_on, working) for working in self._working[: len(given)]]
            for future in futures:
                future.result()
        finally:
            self.stop()
        return [results[i] for i in given]

    def stop(self) -> None:
        """Begin no further work, and wait for the work that has begun."""
        self._todo.clear()
        for working in self._working:
            with working:
                pass

    def is_ours(self) -> bool:
        """Whether this process made the threads; a process forked from it has none of them."""
        return os.getpid() == self._process

    def outlived_its_call(self) -> bool:
        """Whether a thread still works for a call that has ended, because it was interrupted twice."""
        return not self.in_use.locked() and any(working.locked() for working in self._working)

    def require_idle(self) -> None:
        """Raise a RuntimeError when no call may begin now."""
        if not self.is_ours():
            raise RuntimeError(
                f"the environment belongs to process {self._process}, and this process, {os.getpid()}, is a"
                " fork of it; make an environment in this process"
            )
        if self.in_use.locked():
            raise RuntimeError(
                "the environment is busy with a call that has not ended, in this thread or another one;"
                " make one call at a time"
            )

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def exclusive(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Decorate a method of an environment with a ``_crew``, so that only one such method works at a time.

    Raises:
        RuntimeError: The method raises it when another call has not ended, and in a forked process.
    """

    @functools.wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        crew: Crew = self._crew
        crew.require_idle()
        with crew.in_use:
            crew.stop()
            return method(self, *args, **kwargs)

    return call
