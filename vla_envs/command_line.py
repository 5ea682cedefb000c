"""How every program reads its command line and reports a mistake; quick to import."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import TypeVar

import tyro
from tqdm import tqdm

ArgsT = TypeVar("ArgsT")


def parse_args(args_type: type[ArgsT]) -> ArgsT:
    """Read the command line into a dataclass; a mistake is one line on stderr and exit status 2."""
    errors, module = io.StringIO(), sys.modules["__main__"].__spec__
    prog = f"python -m {module.name.removesuffix('.__main__')}" if module else None
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(args_type, prog=prog)
    except SystemExit as exit_:
        if exit_.code:
            words = re.sub(r"[^\x20-\x7e]+", " ", errors.getvalue())  # without the frame that tyro draws
            words = re.sub(r"-{4,}.*|For full helptext.*", "", words)
            print(f"error: {' '.join(words.split())}", file=sys.stderr)
        raise


@contextlib.contextmanager
def one_line_errors(where: str = "") -> Iterator[None]:
    """A user's mistake, or numbers that are not finite, end the program with one line that begins ``where``.

    The exit status is 2; for numbers that are not finite 1.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        process = os.environ.get("RANK", "0")
        where = where if process == "0" else f"process {process}: {where}"
        tqdm.write(f"error: {where}{' '.join(str(error).split())}", file=sys.stderr)  # above a progress bar
        raise SystemExit(1 if isinstance(error, FloatingPointError) else 2) from None
