"""How every program reads its command line and reports a mistake; quick to import."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import tyro
from tqdm import tqdm

ArgsT = TypeVar("ArgsT")
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


def parse_args(args_type: type[ArgsT], default: ArgsT | None = None) -> ArgsT:
    """Read the command line into a dataclass; a mistake is one line on stderr and exit status 2.

    ``--help`` begins with what the program's file says of itself. ``~`` at the beginning of a path or a text
    is the user's home: after ``=`` many shells leave it.

    Args:
        args_type: The dataclass.
        default: Has the values of what the command line does not give, instead of the dataclass's own.
    """
    errors, main = io.StringIO(), sys.modules["__main__"]
    prog = f"python -m {main.__spec__.name.removesuffix('.__main__')}" if main.__spec__ else None
    try:
        with contextlib.redirect_stderr(errors):
            defaults: dict[str, Any] = {} if default is None else {"default": default}
            args: Any = tyro.cli(args_type, prog=prog, description=main.__doc__, **defaults)
            texts = {name: _at_home(value) for name, value in vars(args).items()}
            return dataclasses.replace(args, **texts)
    except SystemExit as exit_:
        if exit_.code:
            print(f"error: {_in_one_line(errors.getvalue())}", file=sys.stderr)
        raise


def _at_home(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    return type(value)(os.path.expanduser(value)) if isinstance(value, str | Path) else value


def _in_one_line(text: str) -> str:
    """What tyro says in a frame: its first part, and the names of arguments that it suggests after that."""
    lines = [re.sub(r"[^\x20-\x7e]+", "", line).strip("| ") for line in text.splitlines()[1:]]
    parts = [
        list(part)
        for filled, part in itertools.groupby(lines, lambda line: bool(line.strip("+- ")))
        if filled
    ]
    words = " ".join(parts[0])
    for title, *rest in parts[1:]:
        names = [line for line in rest if line.startswith("--")]
        if title.startswith("Perhaps"):
            typed = re.findall("--[^ ,]+", words)[0]
            near = [
                difflib.get_close_matches(typed, re.findall("--[^ ,]+", name), 1, 0.0)[0] for name in names
            ]
            return f"{words}; did you mean {', '.join(near)}?"
        if title.startswith("Argument"):
            return f"{words}; expected {names[0]}"
    return f"{words}; --help lists what there is" if words.startswith("Unrecognized") else words


def check_numbers(args: Any, names: str, above: bool) -> None:
    """Refuse arguments that are not finite numbers above 0, or of at least 0.

    Raises:
        ValueError: Names the first that does not fit. None passes: it stands for a default.
    """
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not (0 < value < float("inf") or (value == 0 and not above)):
            raise ValueError(f"{name} is {value}; expected a number {'above' if above else 'of at least'} 0")


@contextlib.contextmanager
def one_line_errors(where: str = "") -> Iterator[None]:
    """A user's mistake, or numbers that are not finite, end the program with one line that begins ``where``.

    The exit status is 2; for numbers that are not finite 1. Ctrl-C ends it with one line and 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            tqdm.write("Ctrl-C: stopped", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        process = os.environ.get("RANK", "0")
        where = where if process == "0" else f"process {process}: {where}"
        tqdm.write(f"error: {where}{' '.join(str(error).split())}", file=sys.stderr)  # above a progress bar
        raise SystemExit(1 if isinstance(error, FloatingPointError) else 2) from None
