"""Command lines, their mistakes in one line, and dataclasses that come back from JSON."""

import dataclasses
import importlib
import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tyro

from vla_envs.command_line import one_line_errors, parse_args, read_dataclass


@dataclasses.dataclass
class Args:
    seed: int = 1
    """A number"""
    rate: float | None = None
    run_dir: Path | None = None
    train: bool = True
    task_ids: tuple[int, ...] = (0, 1)
    size: tuple[int, int] = (2, 3)
    adapters: tuple[Path, ...] = ()
    quality: Literal["exact", "fast"] = "exact"


@dataclasses.dataclass
class Show:
    what: Annotated[Literal["tasks", "runs"], tyro.conf.Positional]
    limit: int


@dataclasses.dataclass
class Clear:
    everything: bool = False


# ---- The command line --------------------------------------------------------------------------------


@pytest.fixture
def parse(monkeypatch):
    def parse(*words: str, args_type: Any = Args, **kwargs: Any) -> Any:
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        return parse_args(args_type, **kwargs)

    return parse


@pytest.fixture
def mistake(parse, capfd):
    """The one line that a command line ends with, without its ``error:``."""

    def mistake(*words: str, **kwargs: Any) -> str:
        with pytest.raises(SystemExit) as exit_:
            parse(*words, **kwargs)
        out, error = capfd.readouterr()
        assert exit_.value.code == 2 and out == ""
        assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1
        return error.removeprefix("error: ").removesuffix("\n")

    return mistake


def test_arguments(parse):
    assert parse() == Args()
    args = parse("--seed", "7", "--run_dir", "a/b", "--no-train", "--task-ids", "3", "4", "5")
    assert args == Args(seed=7, run_dir=Path("a/b"), train=False, task_ids=(3, 4, 5))


def test_defaults_from_elsewhere(parse):
    assert parse("--seed", "7", default=Args(5, 0.5)) == Args(7, 0.5)


def test_home_is_found_where_the_shell_leaves_it(parse):
    args = parse("--run-dir=~/a", "--adapters", "~/b", "c")
    assert args.run_dir == Path.home() / "a" and args.adapters == (Path.home() / "b", Path("c"))


def test_help_is_no_mistake(parse, capfd):
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    out, error = capfd.readouterr()
    assert not exit_.value.code and "--run-dir" in out and "A number" in out and error == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--sead", "3"), "there is no option --sead; did you mean --seed?"),
        (("--seed", "3", "--sead=3"), "there is no option --sead; did you mean --seed?"),
        (("--task-ids", "1", "--task-idd", "2"), "there is no option --task-idd; did you mean --task-ids?"),
        (("--no-trainn",), "there is no option --no-trainn; did you mean --no-train?"),
        (("--zzz",), "there is no option --zzz; --help lists what there is"),
        (("stray",), "'stray' is not expected; --help lists what is"),
        (("--train", "yes"), "'yes' is not expected; --help lists what is"),
        (("--quality", "fats"), "--quality is 'fats'; expected one of exact, fast; did you mean 'fast'?"),
        (("--seed",), "--seed has too few values; expected INT"),
        (("--size", "1"), "--size has too few values; expected INT INT"),
        (("--seed", "x"), "--seed: invalid literal for int() with base 10: 'x'; expected INT"),
        (("--seed", "é\nü"), r"--seed: invalid literal for int() with base 10: 'é\nü'; expected INT"),
    ],
)
def test_a_mistake_is_one_line(mistake, words, expected):
    assert mistake(*words) == expected


@pytest.mark.parametrize(
    ("words", "value", "expected"),
    [
        (("--rate", "much"), "much", "FLOAT"),
        (("--task-ids", "1", "two"), "two", "INT"),
        (("--size", "1", "two"), "two", "INT INT"),
    ],
)
def test_a_value_of_another_type_names_the_option_and_the_type(mistake, words, value, expected):
    line = mistake(*words)
    assert line.startswith(f"{words[0]}: ") and repr(value) in line and expected in line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "a command must be given; expected one of show, clear"),
        (("shwo",), "'shwo' is not a command; expected one of show, clear; did you mean 'show'?"),
        (("--limit", "3"), "'--limit' is not a command; expected one of show, clear"),
        (("show",), "what and --limit must be given"),
        (("show", "tasks", "--limt", "3"), "there is no option --limt; did you mean --limit?"),
        (
            ("show", "task", "--limit", "3"),
            "what is 'task'; expected one of tasks, runs; did you mean 'tasks'?",
        ),
        (("clear", "--limit", "3"), "there is no option --limit; --help lists what there is"),
        (("clear", "--everythin"), "there is no option --everythin; did you mean --everything?"),
    ],
)
def test_mistakes_of_commands(mistake, words, expected):
    assert mistake(*words, args_type=Show | Clear) == expected


# ---- Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ValueError("first\nsecond  line"),
        OSError("no disk"),
        ImportError("no part"),
        RuntimeError("no OpenGL\n"),
    ],
)
def test_errors_of_the_set_up_are_one_line(capfd, error):
    with pytest.raises(SystemExit) as exit_, one_line_errors():
        raise error
    out, line = capfd.readouterr()
    assert exit_.value.code == 2 and out == ""
    assert line.startswith("error: ") and line.count("\n") == 1
    assert all(word in line for word in str(error).split())


def test_where_it_went_wrong(capfd):
    with pytest.raises(SystemExit) as exit_, one_line_errors("iteration 3: "):
        raise ValueError("no good")
    assert exit_.value.code == 2 and capfd.readouterr().err == "error: iteration 3: no good\n"


def test_ctrl_c_is_one_line(capfd):
    with pytest.raises(SystemExit) as exit_, one_line_errors():
        signal.raise_signal(signal.SIGINT)
    assert exit_.value.code == 130 and capfd.readouterr() == ("", "Ctrl-C: stopped\n")


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors():
        raise ZeroDivisionError
    with one_line_errors():
        pass


# ---- Dataclasses from JSON ---------------------------------------------------------------------------


def through_json(args: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(args), default=str))


def test_a_dataclass_comes_back():
    args = Args(7, 0.5, Path("a/b"), False, (3,), (4, 5), (Path("c"), Path("d")), "fast")
    assert read_dataclass(Args, through_json(args)) == args
    assert read_dataclass(Args, {"seed": 3}) == Args(seed=3)


@pytest.mark.parametrize(
    "script", ["grpo_vla", "tgrpo_vla", "ppo_vla", "tpo_vla", "rft_vla", "conrft_vla", "sft_vla"]
)
def test_the_arguments_of_a_script_come_back(script, parse):
    args_type = importlib.import_module(script).Args
    args = parse("--seed", "3", "--run-dir", "a/b", "--task-ids", "1", "2", args_type=args_type)
    assert read_dataclass(args_type, through_json(args)) == args


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"seed": "3"}, "seed is '3'; expected int"),
        ({"seed": True}, "seed is True; expected int"),
        ({"seed": 1.5}, "seed is 1.5; expected int"),
        ({"seed": None}, "seed is None; expected int"),
        ({"rate": "much"}, "rate is 'much'; expected float | None"),
        ({"rate": False}, "rate is False; expected float | None"),
        ({"train": 1}, "train is 1; expected bool"),
        ({"run_dir": 3}, "run_dir is 3; expected pathlib.Path | None"),
        ({"task_ids": 3}, "task_ids is 3; expected tuple[int, ...]"),
        ({"task_ids": [3, "4"]}, "task_ids is [3, '4']; expected tuple[int, ...]"),
        ({"size": [3]}, "size is [3]; expected tuple[int, int]"),
        ({"quality": "good"}, "quality is 'good'; expected Literal['exact', 'fast']"),
        ({"seed": 3, "sead": 4}, "there is no argument 'sead'; did you mean 'seed'?"),
    ],
    ids=str,
)
def test_values_that_do_not_fit(values, expected):
    with pytest.raises(ValueError) as error:
        read_dataclass(Args, values)
    assert str(error.value) == expected


def test_whole_numbers_are_numbers():
    assert read_dataclass(Args, {"rate": 3}).rate == 3.0
