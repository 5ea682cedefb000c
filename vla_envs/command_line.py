"""How every program reads its command line and reports a mistake; quick to import."""

import contextlib
import dataclasses
import difflib
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import msgspec
import tyro
from tqdm import tqdm
from tyro import _errors as mistakes  # private: pyproject.toml names the one version that it is written for

from vla_envs.inputs import in_short, nearest

ArgsT = TypeVar("ArgsT")
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


def parse_args(args_type: type[ArgsT], default: ArgsT | None = None) -> ArgsT:
    """Read the command line into a dataclass; a mistake is one line on stderr and exit status 2.

    ``--help`` begins with the docstring of the program's file. A leading ``~`` is replaced by the user's
    home, because many shells leave it alone after ``=``.

    Args:
        args_type: The dataclass, or a union of dataclasses, each of which is a command.
        default: Holds the values of what the command line does not give, in place of the dataclass's own.
    """

    def refuse(mistake: mistakes.ParseErrorEvent) -> NoReturn:
        print(f"error: {_in_one_line(mistake, args_type)}", file=sys.stderr)
        raise SystemExit(2)

    main = sys.modules["__main__"]
    prog = f"python -m {main.__spec__.name.removesuffix('.__main__')}" if main.__spec__ else None
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    with mistakes.on_parse_error(refuse):
        args: Any = tyro.cli(args_type, prog=prog, description=main.__doc__, **defaults)
    return dataclasses.replace(args, **{name: _at_home(value) for name, value in vars(args).items()})


def _at_home(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    return type(value)(os.path.expanduser(value)) if isinstance(value, str | Path) else value


def _in_one_line(mistake: mistakes.ParseErrorEvent, args_type: Any) -> str:
    match mistake:
        case (
            mistakes.UnrecognizedArgs(tokens=words)
            | mistakes.MissingArgs(unrecognized_tokens=[_, *_] as words)
        ):
            return _unknown(words, args_type)
        case mistakes.MissingArgs(missing_arguments=missing):
            return f"{' and '.join(each.arg.display_name() for each in missing)} must be given"
        case mistakes.MissingSubcommand(subcommand_spec=commands):
            return f"a command must be given; expected one of {', '.join(commands.parser_from_name)}"
        case mistakes.InvalidChoice(argument=argument, value=value, choices=choices):
            hint = nearest(value, list(choices))
            return f"{argument.display_name()} is {value!r}; expected one of {', '.join(choices)}{hint}"
        case mistakes.BadValue(argument=argument):
            return f"{argument.display_name()} has too few values; expected {argument.lowered.metavar}"
        case mistakes.InstantiationFailure(argument=argument, message=message):
            first = " ".join(message.partition("\n")[0].rstrip(".").split())
            return (
                f"{argument.display_name()}: {first}; expected {argument.lowered.metavar}"
                if argument
                else first
            )
        case _:  # arguments that exclude one another, which no program here has
            return str(mistake)


def _unknown(words: list[str], args_type: Any) -> str:
    """What is said of the words that are left over, each of which may be the value of the one before."""
    commands = {command.__name__.lower(): command for command in get_args(args_type)}
    if commands and sys.argv[1] not in commands:
        hint = nearest(words[0], list(commands))
        return f"{words[0]!r} is not a command; expected one of {', '.join(commands)}{hint}"
    options = [word for word in words if word.startswith("--")]
    if not options:
        return f"{words[0]!r} is not expected; --help lists what is"
    option = options[0].partition("=")[0]
    names = []
    for field in dataclasses.fields(commands[sys.argv[1]] if commands else args_type):
        name = field.name.replace("_", "-")
        names += [f"--{name}", f"--no-{name}"] if field.type is bool else [f"--{name}"]
    close = difflib.get_close_matches(option, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "--help lists what there is"
    return f"there is no option {option}; {hint}"


def read_dataclass(args_type: type[ArgsT], values: dict[str, Any]) -> ArgsT:
    """The dataclass that was written to JSON as ``values``; what is missing keeps its default.

    Types are strict: no text becomes a number, and no number a truth value. JSON's lists become tuples again,
    and its texts paths.

    Args:
        args_type: The dataclass.
        values: Its fields by name, as JSON has them.

    Raises:
        ValueError: When there is no such argument or its value has another type; names the first.
    """
    kinds = get_type_hints(args_type)
    read = {}
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"there is no argument {in_short(name)}{nearest(name, list(kinds))}")
        try:
            read[name] = msgspec.convert(value, kinds[name], dec_hook=lambda kind, text: kind(text))
        except msgspec.ValidationError:
            expected = inspect.formatannotation(kinds[name])
            raise ValueError(f"{name} is {in_short(value)}; expected {expected}") from None
    return args_type(**read)


def check_numbers(args: Any, *names: str, above: bool) -> None:
    """Refuse arguments that are not finite numbers above 0, or of at least 0.

    Args:
        args: The dataclass.
        names: The arguments. None is accepted as a value, because it stands for a default.
        above: Whether 0 itself is refused.

    Raises:
        ValueError: Names the first argument that does not fit.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and not (0 < value < float("inf") or (value == 0 and not above)):
            raise ValueError(f"{name} is {value}; expected a number {'above' if above else 'of at least'} 0")


@contextlib.contextmanager
def one_line_errors(where: str = "") -> Iterator[None]:
    """Let a user's mistake end the program with one line instead of a traceback.

    The exit status is 2 for a mistake, 1 for numbers that are not finite (a ``FloatingPointError``), and 130
    after Ctrl-C.

    Args:
        where: What the line begins with.
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
