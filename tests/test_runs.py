"""Arguments, a run's folder, and saving and resuming."""

import dataclasses
import json
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from vla_envs import command_line
from vla_envs.files import write_json
from vla_envs.policies.adapters import make_trainable
from vla_envs.policies.nano import NanoConfig, NanoPolicy
from vla_envs.training import arguments, checkpoints, runs
from vla_envs.training.evaluation import success

SMALL = NanoConfig(action_chunk=2, action_repeat=1, image_size=32, width=16, depth=2, heads=2)


@dataclasses.dataclass
class Args:
    seed: int = 1
    """A number"""
    rate: float = 0.5
    run_dir: Path | None = None
    resume: Path | None = None
    evaluate: bool = False
    train: bool = True
    task_ids: tuple[int, ...] = (0, 1)


@dataclasses.dataclass
class Moved(Args):
    device: str | None = "cuda:3"
    num_threads: int | None = None
    micro_batch_size: int | None = None
    cache: bool = True
    num_iterations: int | None = 10
    total_env_steps: int | None = None
    checkpoint: Path | None = None
    demos: Path = Path("demos")
    assets: str = "builtin"
    shared_adapter: tuple[Path, ...] = ()
    reward: str = "a/r.py:f"


@dataclasses.dataclass
class Started(Args):
    suite: str = "LiberoObject"
    task_ids: tuple[int, ...] = (3,)


# ---- Numbers that are not finite ---------------------------------------------------------------------


def test_numbers_that_are_not_finite_are_another_status(capfd):
    with pytest.raises(SystemExit) as exit_, command_line.one_line_errors("iteration 3: "):
        runs.check_finite("gradient", torch.tensor(float("inf")))
    assert exit_.value.code == 1
    assert capfd.readouterr().err == "error: iteration 3: the gradient is inf; expected a finite number\n"


def test_a_number_that_is_not_finite_is_named():
    runs.check_finite("loss", torch.tensor(-1e38, requires_grad=True))
    with pytest.raises(FloatingPointError, match="loss is nan"):
        runs.check_finite("loss", torch.tensor(float("nan")))


# ---- Ctrl-C ------------------------------------------------------------------------------------------


def test_a_second_ctrl_c_ends_the_run_at_once(capfd):
    """As a program, and resumed, in test_scripts.py."""
    run = object.__new__(runs.Run)
    run._leaving = False
    run._leave_on_interrupt()
    signal.raise_signal(signal.SIGINT)
    assert run._leaving and "again: now" in capfd.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        signal.raise_signal(signal.SIGINT)
    assert exit_.value.code == command_line.INTERRUPTED


# ---- An evaluation that fails ------------------------------------------------------------------------


def test_an_evaluation_that_fails_is_one_line(tmp_path, capfd):
    """It says where the last state is."""
    run = object.__new__(runs.Run)
    run.folder, run.state = tmp_path, {"evaluated": 0, "iteration": 2}

    def evaluate():
        raise OSError("the video does not fit")

    run.evaluate = evaluate
    with pytest.raises(SystemExit) as exit_:
        run.finish()
    error = capfd.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    assert f"iteration 2, last good state in {tmp_path}" in error and "does not fit" in error


# ---- Arguments that do not fit -----------------------------------------------------------------------

GOOD = {
    "suite": "LiberoObject", "train": "all", "seed": 0, "kl_coef": 0.0, "eval_every": 0, "num_groups": 1,
    "num_iterations": 1, "total_env_steps": None, "update_epochs": 1, "minibatch_size": 1, "lora_rank": 1,
    "last_k": 1, "warmup_iterations": 1, "temperature": 0.1, "learning_rate": 1e-9, "target_kl": 0.1,
    "max_grad_norm": 0.1, "task_ids": (), "micro_batch_size": 1, "clip_low": 0.0, "clip_high": 0.0,
}  # fmt: skip
AT_LEAST_0 = {"seed", "kl_coef", "eval_every", "clip_low", "clip_high"}


def test_training_with_the_least_of_everything():
    arguments._check_rl(SimpleNamespace(**GOOD))
    arguments._check_rl(SimpleNamespace(**GOOD | {"kl_coef": 0.5, "train": "lora"}))


@pytest.mark.parametrize("name", sorted(GOOD.keys() - {"suite", "train", "task_ids"}))
def test_numbers_that_do_not_fit(name):
    for value in (-1, float("nan"), float("inf"), *([] if name in AT_LEAST_0 else [0])):
        with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
            arguments._check_rl(SimpleNamespace(**GOOD | {"train": "lora", name: value}))


def test_a_ratio_is_not_clipped_below_0():
    arguments._check_rl(SimpleNamespace(**GOOD | {"clip_low": 1.0, "clip_high": 9.0}))
    with pytest.raises(ValueError, match=r"clip_low is 1\.5; expected at most 1"):
        arguments._check_rl(SimpleNamespace(**GOOD | {"clip_low": 1.5}))


def test_a_part_is_not_larger_than_the_whole():
    with pytest.raises(ValueError, match="micro_batch_size is 9; expected at most 8, the minibatch_size"):
        arguments._check_rl(SimpleNamespace(**GOOD | {"minibatch_size": 8, "micro_batch_size": 9}))


def test_a_kl_term_needs_an_adapter():
    for train in ("all", "head", "lora+head"):
        with pytest.raises(ValueError, match="--train lora"):
            arguments._check_rl(SimpleNamespace(**GOOD | {"kl_coef": 0.5, "train": train}))


@pytest.mark.parametrize("suite", ["LiberoObjekt", "libero_object", ""])
def test_no_such_suite(suite):
    with pytest.raises(ValueError, match="LiberoObject"):
        arguments.complete(Evaluation(suite=suite))


def test_no_such_task():
    with pytest.raises(ValueError, match="task_id"):
        arguments.complete(Evaluation(task_ids=(4, 10)))


GRAPHS = {"cudagraphs": True, "policy": "openvla", "device": "cuda", "train": "lora"}


@dataclasses.dataclass
class Evaluation(arguments.CommonArgs):
    temperature: float = 0.7


@pytest.mark.parametrize(
    ("given", "episodes", "temperature"),
    [
        ({}, 50, 0.7),
        ({"eval_episodes": 1, "eval_temperature": 0.0}, 1, 0.0),
        ({"protocol": "tgrpo"}, 50, 0.7),
        ({"protocol": "openvla"}, 50, 0.0),
        ({"protocol": "rlinf"}, 50, 1.6),
        ({"protocol": "lerobot"}, 10, 0.7),
        ({"protocol": "lerobot", "eval_episodes": 50}, 50, 0.7),
        ({"protocol": "rlinf", "eval_temperature": 1.6}, 50, 1.6),
        ({"protocol": "tgrpo", "eval_temperature": 0.3}, 50, 0.3),
    ],
    ids=str,
)
def test_what_evaluations_are_like(given, episodes, temperature):
    args = Evaluation(**given)
    filled = arguments.complete(args)
    assert filled == dataclasses.replace(
        args, task_id=4, task_ids=(4,), eval_episodes=episodes, eval_temperature=temperature,
        max_episode_steps=200, device="cpu",
    )  # fmt: skip
    assert args == Evaluation(**given) and arguments.complete(filled) == filled


@pytest.mark.parametrize(
    ("given", "train"), [("all", "head"), ("lora", "lora"), ("lora+last-k", "lora+last-k")]
)
def test_an_evaluation_does_not_make_all_weights_float32(given, train):
    assert arguments.complete(Evaluation(train=given, evaluate=True)).train == train
    assert arguments.complete(Evaluation(train=given)).train == given


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        ({}, 200),
        ({"max_episode_steps": 90}, 90),
        ({"evaluate": True, "protocol": "openvla"}, 280),
        ({"evaluate": True, "protocol": "openvla", "suite": "LiberoGoal"}, 300),
        ({"evaluate": True, "protocol": "openvla", "max_episode_steps": 280}, 280),
        ({"protocol": "openvla"}, 200),  # training's own
        ({"protocol": "openvla", "max_episode_steps": 90}, 90),
    ],
    ids=str,
)
def test_how_long_an_episode_is(given, limit):
    assert arguments.complete(Evaluation(**given)).max_episode_steps == limit


@pytest.mark.parametrize(
    ("train", "expected"),
    [("all", (None, None, None)), ("lora", (32, None, "adapter")), ("lora+last-k", (32, 1, "adapter"))],
)
def test_what_an_adapter_is_like(train, expected):
    args = arguments.complete(Evaluation(train=train))
    assert (args.lora_rank, args.last_k, args.adapter) == expected


def test_a_runs_own_arguments_stay_however_old_it_is(tmp_path):
    """Written when one argument silently won over another."""
    old = Evaluation(resume=tmp_path, lora_rank=32, last_k=1, adapter="adapter", max_episode_steps=90)
    args = arguments.complete(dataclasses.replace(old, protocol="openvla", eval_temperature=0.3))
    assert (args.lora_rank, args.adapter, args.eval_temperature) == (32, "adapter", 0.3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"evaluate": True, "protocol": "openvla", "max_episode_steps": 200},
            "expected 280, that of protocol",
        ),
        ({"protocol": "openvla", "eval_temperature": 0.3}, "eval_temperature is 0.3; expected 0.0, that of"),
        ({"protocol": "rlinf", "eval_temperature": 0.0}, "eval_temperature is 0.0; expected 1.6"),
        ({"task_id": 7, "task_ids": (4, 7)}, "task_id is 7 beside task_ids"),
        ({"quality": "fast"}, "expected --assets libero"),
        ({"lora_rank": 32}, "lora_rank is 32; expected it with --train lora, got all"),
        ({"last_k": 1, "train": "lora"}, r"last_k is 1; expected it with --train lora\+last-k, got lora"),
        ({"adapter": "mine", "train": "head"}, "adapter is 'mine'; expected it with --train lora, got head"),
        ({"eval_episodes": 0}, "eval_episodes is 0"),
        ({"eval_episodes": 51}, "eval_episodes is 51"),
        ({"eval_temperature": -0.1}, "eval_temperature is -0.1"),
        ({"eval_temperature": float("nan")}, "eval_temperature is nan"),
        ({"compare": Path("x")}, "--evaluate"),
        ({"task_ids": (4, 7, 4)}, "each task once"),
        ({"merge": False}, "expected --train lora, got all"),
        ({"merge": False, "train": "lora+head"}, "expected --train lora, got"),
        ({"adapter": "final"}, "adapter is 'final'"),
        ({"adapter": "latest.previous"}, "adapter is 'latest.previous'"),
        ({"adapter": "a/b"}, "adapter is 'a/b'"),
        ({"adapter": ".."}, "adapter is '..'"),
        ({"adapter": ""}, "adapter is ''"),
        (GRAPHS | {"policy": "openvla-oft"}, "got openvla-oft on cuda"),
        (GRAPHS | {"device": "cpu"}, "got openvla on cpu"),
        (GRAPHS | {"train": "all"}, "expected --train lora"),
        (GRAPHS | {"shared_adapter": (Path("a"),)}, "expected --train lora"),
    ],
    ids=str,
)
def test_evaluations_that_cannot_be(given, words):
    with pytest.raises(ValueError, match=words):
        arguments.complete(Evaluation(**given))


# ---- The folder --------------------------------------------------------------------------------------


def test_the_name_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = runs._make_folder(Started(task_ids=(4, 5), seed=7), "tgrpo_vla")
    suite_task, script, seed, time = folder.name.split("__")
    assert (suite_task, script, seed) == ("LiberoObject_4-5", "tgrpo_vla", "7") and time
    assert folder.parent.resolve() == tmp_path / "runs"
    assert {path.name for path in folder.iterdir()} == {"videos"}


def test_a_named_folder(tmp_path):
    assert runs._make_folder(Started(run_dir=tmp_path / "a" / "b"), "x") == tmp_path / "a" / "b"
    assert runs._make_folder(Started(run_dir=tmp_path / "a" / "b"), "x") == tmp_path / "a" / "b"
    write_json(tmp_path / "a" / "b" / "args.json", {})
    with pytest.raises(ValueError, match="holds a run already") as error:
        runs._make_folder(Started(run_dir=tmp_path / "a" / "b"), "x")
    assert str(tmp_path / "a" / "b") in str(error.value)


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_a_file_in_the_way(tmp_path, below):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="cannot be written") as error:
        runs._make_folder(Started(run_dir=tmp_path / "file" / below), "x")
    assert str(tmp_path / "file") in str(error.value) and len(str(error.value).splitlines()) == 1
    assert (tmp_path / "file").read_text() == "precious"


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1, "path": Path("b/c")})
    assert json.loads(file.read_text()) == {"a": 1, "path": "b/c"}
    circle = []
    circle.append(circle)
    with pytest.raises(ValueError):
        write_json(file, {"a": circle})
    assert json.loads(file.read_text())["a"] == 1 and list(tmp_path.iterdir()) == [file]


# ---- Arguments of a stopped run ----------------------------------------------------------------------


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Go on with the run in ``tmp_path``, of these arguments, by a command line."""

    def load(args, *words):
        if args is not None:
            write_json(tmp_path / "args.json", dataclasses.asdict(args))
        monkeypatch.setattr(sys, "argv", ["script.py", "--resume", str(tmp_path), *words])
        return arguments.load_args(command_line.parse_args(type(args or Args())))

    return load


def test_arguments_come_back(load, tmp_path):
    args = Args(3, 0.25, tmp_path / "run", train=False, task_ids=(4, 5))
    for words in ((), ("--rate", "0.25", "--no-train")):
        assert load(args, *words) == dataclasses.replace(args, resume=tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seed", "8"), "seed is 8, the run's own 3; expected its own: how fast a run goes, how long, and"),
        (("--seed", "1"), "seed is 1, the run's own 3"),  # the default, and given all the same
        (("--train",), "train is True, the run's own False"),
        (("--run-dir", "x"), "run_dir is PosixPath"),
        (("--reward", "multi_stage"), "reward is 'multi_stage', the run's own 'a/r.py:f'"),
        (("--reward", "b/r.py:g"), "reward is 'b/r.py:g'"),
        (("--assets", "b"), "assets is 'b', the run's own 'builtin'"),
        (("--checkpoint", "b"), r"checkpoint is PosixPath\('b'\), the run's own None"),
        (("--total-env-steps", "900"), "total_env_steps is 900, the run's own None"),
    ],
    ids=str,
)
def test_another_argument_is_another_run(load, words, message):
    with pytest.raises(ValueError, match=message) as error:
        load(Moved(seed=3, train=False), *words)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (("--device", "cpu"), {"device": "cpu"}),
        (("--num-threads", "2", "--micro-batch-size", "8"), {"num_threads": 2, "micro_batch_size": 8}),
        (("--no-cache",), {"cache": False}),
        (("--num-iterations", "30"), {"num_iterations": 30}),
        (("--demos", "b/demos"), {"demos": Path("b/demos")}),
        (("--demos", "demos"), {"demos": Path("demos")}),  # the default, and given all the same
        (("--shared-adapter", "b", "c"), {"shared_adapter": (Path("b"), Path("c"))}),
        (("--reward", "b/r.py:f"), {"reward": "b/r.py:f"}),
    ],
    ids=str,
)
def test_how_fast_how_long_and_where_may_change(load, tmp_path, words, changed):
    args = Moved(seed=3, demos=Path("a/demos"), shared_adapter=(Path("b"), Path("a")))
    assert load(args, *words) == dataclasses.replace(args, resume=tmp_path, **changed)


def test_what_lies_elsewhere(load, tmp_path):
    args = Moved(assets="a", checkpoint=Path("a/final"))
    moved = load(args, "--assets=~/b", "--checkpoint=~/b/final")
    assert moved == dataclasses.replace(
        args, resume=tmp_path, assets=str(Path("~/b").expanduser()), checkpoint=Path("~/b/final").expanduser()
    )


def test_arguments_that_the_script_does_not_know(load, tmp_path):
    """A changed copy's: what they did would be dropped."""
    write_json(tmp_path / "args.json", dataclasses.asdict(Args()) | {"beta": 3, "script": "loo_vla"})
    with pytest.raises(ValueError, match=r"args\.json' has beta, which this .* made the run, loo_vla\.py"):
        load(None)


def test_arguments_that_are_newer_than_the_run_have_their_defaults(load, tmp_path):
    write_json(tmp_path / "args.json", {"seed": 3})
    assert load(None) == Args(seed=3, resume=tmp_path)
    write_json(tmp_path / "args.json", {})
    with pytest.raises(ValueError, match=r"args\.json' is damaged: it has no seed"):
        arguments.load_args(Args(resume=tmp_path))


def test_a_run_that_is_resumed_is_not_evaluated(tmp_path):
    write_json(tmp_path / "args.json", dataclasses.asdict(Args()))
    with pytest.raises(ValueError, match="--checkpoint"):
        arguments.load_args(Args(resume=tmp_path, evaluate=True))


def test_a_folder_within_a_run(tmp_path):
    write_json(tmp_path / "args.json", dataclasses.asdict(Args()))
    with pytest.raises(ValueError, match=rf"no args\.json; did you mean '{tmp_path}'"):
        arguments.load_args(Args(resume=tmp_path / "checkpoints" / "latest"))


def test_not_the_folder_of_a_run(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="not the folder of a run") as error:
            arguments.load_args(Args(resume=folder))
        assert str(folder) in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b"null", b"\xff\xfe"])
def test_damaged_arguments(tmp_path, content):
    (tmp_path / "args.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"args\.json"):
        arguments.load_args(Args(resume=tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", "one"), ("seed", 1.5), ("seed", True), ("seed", None), ("rate", "fast"), ("rate", [1]),
     ("run_dir", 3), ("train", 1), ("task_ids", 4), ("task_ids", ["a"]), ("task_ids", None)],
)  # fmt: skip
def test_arguments_of_another_type(tmp_path, name, value):
    write_json(tmp_path / "args.json", dataclasses.asdict(Args()) | {name: value})
    with pytest.raises(ValueError, match=rf"args\.json' is damaged: {name} is"):
        arguments.load_args(Args(resume=tmp_path))


# ---- How far a run is --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iteration", "env_steps", "num_iterations", "limit", "expected"),
    [
        (0, 0, 10, None, 0), (3, 900, 10, None, 0.3), (10, 900, 10, None, 1), (0, 0, None, 1800, 0),
        (3, 900, None, 1800, 0.5), (3, 1801, None, 1800, 1), (3, 900, 10, 1800, 0.5), (6, 900, 10, 1800, 0.6),
    ],
)  # fmt: skip
def test_how_much_is_done(iteration, env_steps, num_iterations, limit, expected):
    args = SimpleNamespace(num_iterations=num_iterations, total_env_steps=limit)
    run = SimpleNamespace(args=args, state={"iteration": iteration, "env_steps": env_steps})
    assert runs.Run.done(run) == pytest.approx(expected)


@dataclasses.dataclass
class Length:
    num_iterations: int | None = None
    total_env_steps: int | None = None
    num_groups: int | None = 8
    task_ids: tuple[int, ...] = ()


def test_a_run_has_an_end():
    for given in (Length(num_iterations=3), Length(total_env_steps=7), Length(3, 7)):
        assert arguments._fill_in_length(given) == given
    assert arguments._fill_in_length(Length()) == Length(total_env_steps=arguments.DEFAULT_ENV_STEPS)


@pytest.mark.parametrize(("tasks", "steps", "groups"), [(1, 120_000, 8), (3, 180_000, 8), (10, 600_000, 20)])
def test_several_tasks_take_longer(tasks, steps, groups):
    filled = arguments._fill_in_length(Length(num_groups=None, task_ids=tuple(range(tasks))))
    assert (filled.total_env_steps, filled.num_groups) == (steps, groups)
    assert arguments._fill_in_length(dataclasses.replace(filled, num_groups=12)).num_groups == 12


def test_every_iteration_of_every_seed_draws_other_numbers():
    draws = []
    for numbers in ((1, 1), (1, 2), (2, 1), (11,), (1, 1)):
        runs._seed_all(*numbers)
        draws.append(tuple(torch.rand(3).tolist()))
    assert draws[0] == draws[4] and len(set(draws)) == 4


# ---- Training state ----------------------------------------------------------------------------------


class Killed(BaseException):
    """What ends a process in the middle."""


def training(train="all", seed=0, steps=2):
    """A policy and its optimiser after some steps."""
    torch.manual_seed(seed)
    policy = make_trainable(NanoPolicy(SMALL), train, rank=2)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    for _ in range(steps):
        step(policy, optimizer)
    return policy, optimizer


def step(policy, optimizer):
    rng = torch.Generator().manual_seed(5)
    obs = {
        "image": torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=rng),
        "state": torch.randn(2, 8, generator=rng),
    }
    tokens = torch.randint(0, 256, (2, 14), generator=rng)
    optimizer.zero_grad()
    (-policy.score(obs, ["pick", "place"], tokens)[0].mean()).backward()
    optimizer.step()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("train", ["all", "lora", "lora+head"])
def test_training_goes_on_bit_for_bit(tmp_path, train):
    policy, optimizer = training(train)
    counters = {"iteration": 2, "env_steps": 123, "wall_s": 0.1 + 0.2, "before": {"rate": 1 / 3}}
    checkpoints.save_training_state(tmp_path / "checkpoints" / "latest", policy, optimizer, counters)
    other, other_optimizer = training(train, steps=0)
    assert not same(policy, other)
    assert (
        checkpoints.load_training_state(tmp_path / "checkpoints" / "latest", other, other_optimizer)
        == counters
    )
    assert same(policy, other)
    for _ in range(2):
        step(policy, optimizer)
        step(other, other_optimizer)
    assert same(policy, other)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["latest"]


def test_only_what_is_trained_is_saved(tmp_path):
    policy, optimizer = training("lora")
    checkpoints.save_training_state(tmp_path / "latest", policy, optimizer, {})
    saved = safetensors.torch.load_file(tmp_path / "latest" / "trained.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert {file.suffix for file in (tmp_path / "latest").iterdir()} == {".safetensors", ".json"}


def test_the_newest_state_counts(tmp_path):
    for iteration in (1, 2, 3):
        policy, optimizer = training(steps=iteration)
        checkpoints.save_training_state(tmp_path / "latest", policy, optimizer, {"iteration": iteration})
    other, other_optimizer = training(steps=0)
    assert checkpoints.load_training_state(tmp_path / "latest", other, other_optimizer) == {"iteration": 3}
    assert same(policy, other)


@pytest.mark.parametrize("broken", ["save_file", "write_json", "rename", "second rename"])
def test_a_state_survives_a_save_that_breaks_off(tmp_path, monkeypatch, broken):
    first, optimizer = training(steps=1)
    checkpoints.save_training_state(tmp_path / "latest", first, optimizer, {"iteration": 1})
    renames = []

    def rename(path, target):
        if broken == "rename" or (renames and broken == "second rename"):
            raise Killed
        renames.append(target)
        return original(path, target)

    def die(*args, **kwargs):
        raise Killed

    original = Path.rename
    second, other_optimizer = training(steps=2)
    with monkeypatch.context() as patch:
        if "rename" in broken:
            patch.setattr(Path, "rename", rename)
        else:
            patch.setattr(
                checkpoints.safetensors.torch if broken == "save_file" else checkpoints, broken, die
            )
        with pytest.raises(Killed):
            checkpoints.save_training_state(tmp_path / "latest", second, other_optimizer, {"iteration": 2})
    loaded, loaded_optimizer = training(steps=0)
    assert checkpoints.load_training_state(tmp_path / "latest", loaded, loaded_optimizer) == {"iteration": 1}
    assert same(loaded, first)
    checkpoints.save_training_state(tmp_path / "latest", second, other_optimizer, {"iteration": 2})
    assert checkpoints.load_training_state(tmp_path / "latest", loaded, loaded_optimizer) == {"iteration": 2}
    assert same(loaded, second)


def test_a_state_survives_two_saves_that_break_off(tmp_path, monkeypatch):
    """Killed between the renames, resumed, and killed in the next save: still one of the states is there."""

    def rename(path, target):
        if path.name == "latest.partial":
            raise Killed
        return original(path, target)

    original = Path.rename
    policy, optimizer = training(steps=1)
    checkpoints.save_training_state(tmp_path / "latest", policy, optimizer, {"iteration": 1})
    monkeypatch.setattr(Path, "rename", rename)
    for iteration in (2, 2):
        with pytest.raises(Killed):
            checkpoints.save_training_state(tmp_path / "latest", policy, optimizer, {"iteration": iteration})
        loaded, loaded_optimizer = training(steps=0)
        counters = checkpoints.load_training_state(tmp_path / "latest", loaded, loaded_optimizer)
        assert counters == {"iteration": 1} and same(loaded, policy)


def test_no_state(tmp_path):
    with pytest.raises(ValueError, match="no training state") as error:
        checkpoints.load_training_state(tmp_path / "checkpoints" / "latest", *training(steps=0))
    assert str(tmp_path / "checkpoints") in str(error.value)


def test_state_of_another_trainable_set(tmp_path):
    checkpoints.save_training_state(tmp_path / "latest", *training("lora"), {"iteration": 1})
    with pytest.raises(ValueError, match=r"trained\.safetensors.*missing"):
        checkpoints.load_training_state(tmp_path / "latest", *training("all", steps=0))


def test_state_of_another_size(tmp_path):
    checkpoints.save_training_state(tmp_path / "latest", *training("lora"), {"iteration": 1})
    policy = make_trainable(NanoPolicy(SMALL), "lora", rank=3)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    with pytest.raises(ValueError, match="latest"):
        checkpoints.load_training_state(tmp_path / "latest", policy, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.safetensors", "counters.json"])
def test_damaged_state(tmp_path, file):
    policy, optimizer = training()
    checkpoints.save_training_state(tmp_path / "latest", policy, optimizer, {"iteration": 1})
    path = tmp_path / "latest" / file
    sound = path.read_bytes()
    for content in (b"", b"{", b"[]", sound[:-9], b"PK\x03\x04" + sound):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            checkpoints.load_training_state(tmp_path / "latest", policy, optimizer)
        assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1
    path.unlink()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        checkpoints.load_training_state(tmp_path / "latest", policy, optimizer)


@pytest.mark.parametrize("name", ["99.exp_avg", "0.exp_avg", "0.colour", "x"])
def test_moments_that_do_not_fit(tmp_path, name):
    policy, optimizer = training()
    checkpoints.save_training_state(tmp_path / "latest", policy, optimizer, {"iteration": 1})
    file = tmp_path / "latest" / "optimizer.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file) | {name: torch.zeros(3)}, file)
    other, other_optimizer = training(steps=0)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=rf"optimizer\.safetensors.*{name}"):
        checkpoints.load_training_state(tmp_path / "latest", other, other_optimizer)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


# ---- Starting ----------------------------------------------------------------------------------------


def start(args, script, policy, optimizer):
    """A run of a script that plays only to evaluate."""
    return runs.Run(args, script, policy, optimizer, None, None)


def test_a_new_run_can_be_resumed_at_once(load, tmp_path):
    policy, optimizer = training(steps=0)
    args = Started(run_dir=tmp_path)
    run = start(args, "x_vla", policy, optimizer)
    assert run.folder == tmp_path
    counts = {"iteration": 0, "env_steps": 0, "episodes": 0, "evaluated": 0, "wall_s": 0.0, "before": None}
    assert run.state == counts
    assert load(args) == dataclasses.replace(args, resume=tmp_path)
    other, other_optimizer = training(seed=1, steps=0)
    again = start(dataclasses.replace(args, resume=tmp_path), "x_vla", other, other_optimizer)
    assert (again.folder, again.state) == (tmp_path, counts) and same(policy, other)


def test_a_run_goes_on_where_it_was_saved(tmp_path):
    run = start(Started(run_dir=tmp_path / "run"), "x_vla", *training(steps=0))
    policy, optimizer = training(steps=2)
    state = run.state | {
        "iteration": 2,
        "env_steps": 48,
        "before": {"success": success([True])},
        "best": {"nll": 0.5},
    }
    checkpoints.save_training_state(run.folder / "checkpoints" / "latest", policy, optimizer, state)
    other, other_optimizer = training(steps=0)
    assert start(Started(resume=run.folder), "x_vla", other, other_optimizer).state == state
    assert same(policy, other)


@pytest.mark.parametrize(
    ("name", "value"),
    [("iteration", None), ("env_steps", -1), ("wall_s", "long"), ("evaluated", True), ("before", 3),
     ("after", {"successes": 1}), ("after", {"success": {"successes": 1}}), ("before", success([True]))],
)  # fmt: skip
def test_damaged_counters(tmp_path, name, value):
    args = Started(run_dir=tmp_path)
    start(args, "grpo_vla", *training())
    file = tmp_path / "checkpoints" / "latest" / "counters.json"
    write_json(file, json.loads(file.read_text()) | {name: value})
    with pytest.raises(ValueError, match=rf"counters\.json' is damaged: {name} is"):
        start(dataclasses.replace(args, resume=tmp_path), "grpo_vla", *training(steps=0))


def test_a_changed_copy_of_a_script_is_another(tmp_path):
    run = start(Started(run_dir=tmp_path), "elsewhere/loo_vla.py", *training(steps=0))
    assert json.loads((run.folder / "args.json").read_text())["script"] == "loo_vla"
    with pytest.raises(ValueError, match=r"is a run of loo_vla\.py; expected one of tgrpo_vla\.py"):
        start(Started(resume=run.folder), "tgrpo_vla.py", *training(steps=0))


@dataclasses.dataclass
class Longer(Started):
    num_iterations: int = 4
    num_threads: int | None = None


def test_a_run_says_with_what_it_goes_on(tmp_path, capsys):
    """And keeps it; that the learning rate's course depends on the length is said too."""
    run = start(Longer(run_dir=tmp_path), "x_vla", *training(steps=0))
    args = Longer(run_dir=tmp_path, resume=run.folder, num_iterations=8, num_threads=2)
    capsys.readouterr()
    start(args, "x_vla", *training(steps=0))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "num_threads 2 instead of None",
        "num_iterations 8 instead of 4; the learning rate goes on as in a run of that length",
    ]
    written = json.loads((run.folder / "args.json").read_text())
    assert (written["num_iterations"], written["num_threads"], written["resume"]) == (8, 2, None)


def test_a_run_says_what_memory_training_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "count_parameters", lambda policy: (100_000_000, 450_000_000))
    start(Started(run_dir=tmp_path / "run"), "x_vla", *training(steps=0))
    line = "training 100,000,000 of 450,000,000 parameters; their gradients and AdamW's averages take 1.1 GiB"
    assert line in capsys.readouterr().out


def test_a_run_of_another_script(tmp_path):
    run = start(Started(run_dir=tmp_path / "run"), "x_vla", *training(steps=0))
    with pytest.raises(ValueError, match=r"run' is a run of x_vla\.py; expected one of y_vla\.py"):
        start(Started(resume=run.folder), "y_vla", *training(steps=0))
    older = json.loads((run.folder / "args.json").read_text())
    assert older.pop("torch_threads") == torch.get_num_threads()
    del older["script"]
    write_json(run.folder / "args.json", older)
    assert start(Started(resume=run.folder), "y_vla", *training(steps=0)).state == run.state


def test_an_evaluation_leaves_nothing_to_resume(tmp_path):
    args = Started(run_dir=tmp_path / "run", evaluate=True)
    run = start(args, "x_vla", *training(steps=0))
    assert {path.name for path in run.folder.iterdir()} == {"args.json", "videos"}
    with pytest.raises(ValueError, match="no training state"):
        start(dataclasses.replace(args, resume=run.folder), "x_vla", *training(steps=0))


def test_a_run_is_not_started_where_one_is(tmp_path):
    args = Started(run_dir=tmp_path / "run")
    run = start(args, "x_vla", *training(steps=0))
    run._writer.close()
    before = {file: file.read_bytes() for file in run.folder.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="--resume"):
        start(args, "x_vla", *training(steps=1))
    assert before == {file: file.read_bytes() for file in run.folder.rglob("*") if file.is_file()}
