"""The command line, a run's folder, and saving and resuming."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from vla_envs import runs
from vla_envs.policies.adapters import make_trainable
from vla_envs.policies.nano import NanoConfig, NanoPolicy

SMALL = NanoConfig(action_chunk=2, image_size=32, width=16, depth=2, heads=2)


@dataclasses.dataclass
class Args:
    seed: int = 1
    """A number"""
    rate: float = 0.5
    run_dir: Path | None = None
    train: bool = True
    task_ids: tuple[int, ...] = (0, 1)


# ---- The command line --------------------------------------------------------------------------------


def parse(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    return runs.parse_args(Args)


def test_arguments(monkeypatch):
    assert parse(monkeypatch) == Args()
    args = parse(monkeypatch, "--seed", "7", "--run-dir", "a/b", "--no-train", "--task-ids", "3", "4", "5")
    assert args == Args(7, 0.5, Path("a/b"), False, (3, 4, 5))


@pytest.mark.parametrize(
    "words",
    [
        ("--seed", "x"),
        ("--sead", "3"),
        ("--seed",),
        ("--rate", "fast", "--seed", "y"),
        ("stray",),
        ("--seed", "é\nü"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(monkeypatch, capfd, words):
    with pytest.raises(SystemExit) as exit_:
        parse(monkeypatch, *words)
    out, error = capfd.readouterr()
    assert exit_.value.code == 2 and out == ""
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
    assert max(error.find(word) for word in ("seed", "sead", "stray")) > 0


def test_help_is_no_mistake(monkeypatch, capfd):
    with pytest.raises(SystemExit) as exit_:
        parse(monkeypatch, "--help")
    out, error = capfd.readouterr()
    assert not exit_.value.code and "--run-dir" in out and "A number" in out and error == ""


@pytest.mark.parametrize(
    "mistake",
    [
        ValueError("first\nsecond  line"),
        OSError("no disk"),
        ImportError("no part"),
        RuntimeError("no OpenGL\n"),
    ],
)
def test_errors_of_the_set_up_are_one_line(capfd, mistake):
    with pytest.raises(SystemExit) as exit_, runs.one_line_errors():
        raise mistake
    out, error = capfd.readouterr()
    assert exit_.value.code == 2 and out == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in str(mistake).split())


def test_other_errors_keep_their_traceback():
    for error in (KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(error), runs.one_line_errors():
            raise error
    with runs.one_line_errors():
        pass


# ---- The folder --------------------------------------------------------------------------------------


def test_the_name_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = runs.make_run_folder(None, "LiberoObject", 4, "tgrpo_vla", 7)
    suite_task, script, seed, time = folder.name.split("__")
    assert (suite_task, script, seed) == ("LiberoObject_4", "tgrpo_vla", "7") and time
    assert folder.parent.resolve() == tmp_path / "runs"
    assert {path.name for path in folder.iterdir()} == {"checkpoints", "videos"}


def test_a_named_folder(tmp_path):
    assert runs.make_run_folder(tmp_path / "a" / "b", "S", 0, "x", 1) == tmp_path / "a" / "b"
    assert runs.make_run_folder(tmp_path / "a" / "b", "S", 0, "x", 1) == tmp_path / "a" / "b"
    runs.write_json(tmp_path / "a" / "b" / "args.json", {})
    with pytest.raises(ValueError, match="holds a run already") as error:
        runs.make_run_folder(tmp_path / "a" / "b", "S", 0, "x", 1)
    assert str(tmp_path / "a" / "b") in str(error.value)


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_a_file_in_the_way(tmp_path, below):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="cannot be written") as error:
        runs.make_run_folder(tmp_path / "file" / below, "S", 0, "x", 1)
    assert str(tmp_path / "file") in str(error.value) and len(str(error.value).splitlines()) == 1
    assert (tmp_path / "file").read_text() == "precious"


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x.json"
    runs.write_json(file, {"a": 1, "path": Path("b/c")})
    assert json.loads(file.read_text()) == {"a": 1, "path": "b/c"}
    circle = []
    circle.append(circle)
    with pytest.raises(ValueError):
        runs.write_json(file, {"a": circle})
    assert json.loads(file.read_text())["a"] == 1 and list(tmp_path.iterdir()) == [file]


# ---- Arguments of a stopped run ----------------------------------------------------------------------


def test_arguments_come_back(tmp_path):
    args = Args(3, 0.25, tmp_path / "run", False, (4, 5))
    runs.write_json(tmp_path / "args.json", dataclasses.asdict(args) | {"gone": 3})
    loaded = runs.load_args(tmp_path, Args)
    assert (loaded.seed, loaded.rate, loaded.run_dir, loaded.train) == (3, 0.25, tmp_path / "run", False)
    assert list(loaded.task_ids) == [4, 5]
    runs.write_json(tmp_path / "args.json", dataclasses.asdict(Args()))
    assert runs.load_args(tmp_path, Args).run_dir is None


def test_not_the_folder_of_a_run(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="not the folder of a run") as error:
            runs.load_args(folder, Args)
        assert str(folder) in str(error.value)


def test_damaged_arguments(tmp_path):
    for text in ("{", "[]", "3"):
        (tmp_path / "args.json").write_text(text)
        with pytest.raises(ValueError, match=r"args\.json"):
            runs.load_args(tmp_path, Args)


# ---- Training state ----------------------------------------------------------------------------------


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
    (-policy.evaluate(obs, ["pick", "place"], tokens)[0].mean()).backward()
    optimizer.step()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("train", ["all", "lora", "lora+head"])
def test_training_goes_on_bit_for_bit(tmp_path, train):
    policy, optimizer = training(train)
    counters = {"iteration": 2, "env_steps": 123, "wall_s": 0.1 + 0.2, "before": {"rate": 1 / 3}}
    runs.save_training_state(tmp_path / "checkpoints" / "latest", policy, optimizer, counters)
    other, other_optimizer = training(train, steps=0)
    assert not same(policy, other)
    assert runs.load_training_state(tmp_path / "checkpoints" / "latest", other, other_optimizer) == counters
    assert same(policy, other)
    for _ in range(2):
        step(policy, optimizer)
        step(other, other_optimizer)
    assert same(policy, other)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["latest"]


def test_only_what_is_trained_is_saved(tmp_path):
    policy, optimizer = training("lora")
    runs.save_training_state(tmp_path / "latest", policy, optimizer, {})
    saved = safetensors.torch.load_file(tmp_path / "latest" / "trained.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert {file.suffix for file in (tmp_path / "latest").iterdir()} == {".safetensors", ".json"}


def test_the_newest_state_counts(tmp_path):
    for iteration in (1, 2, 3):
        policy, optimizer = training(steps=iteration)
        runs.save_training_state(tmp_path / "latest", policy, optimizer, {"iteration": iteration})
    other, other_optimizer = training(steps=0)
    assert runs.load_training_state(tmp_path / "latest", other, other_optimizer) == {"iteration": 3}
    assert same(policy, other)


@pytest.mark.parametrize("broken", ["save_file", "write_json", "rename", "second rename"])
def test_a_state_survives_a_save_that_breaks_off(tmp_path, monkeypatch, broken):
    first, optimizer = training(steps=1)
    runs.save_training_state(tmp_path / "latest", first, optimizer, {"iteration": 1})
    renames = []

    def rename(path, target):
        if broken == "rename" or (renames and broken == "second rename"):
            raise KeyboardInterrupt
        renames.append(target)
        return original(path, target)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    original = Path.rename
    second, other_optimizer = training(steps=2)
    with monkeypatch.context() as patch:
        if "rename" in broken:
            patch.setattr(Path, "rename", rename)
        else:
            patch.setattr(runs.safetensors.torch if broken == "save_file" else runs, broken, die)
        with pytest.raises(KeyboardInterrupt):
            runs.save_training_state(tmp_path / "latest", second, other_optimizer, {"iteration": 2})
    loaded, loaded_optimizer = training(steps=0)
    assert runs.load_training_state(tmp_path / "latest", loaded, loaded_optimizer) == {"iteration": 1}
    assert same(loaded, first)
    runs.save_training_state(tmp_path / "latest", second, other_optimizer, {"iteration": 2})
    assert runs.load_training_state(tmp_path / "latest", loaded, loaded_optimizer) == {"iteration": 2}
    assert same(loaded, second)


def test_no_state(tmp_path):
    with pytest.raises(ValueError, match="no training state") as error:
        runs.load_training_state(tmp_path / "checkpoints" / "latest", *training(steps=0))
    assert str(tmp_path / "checkpoints") in str(error.value)


def test_state_of_another_trainable_set(tmp_path):
    runs.save_training_state(tmp_path / "latest", *training("lora"), {"iteration": 1})
    with pytest.raises(ValueError, match="another"):
        runs.load_training_state(tmp_path / "latest", *training("all", steps=0))


def test_state_of_another_size(tmp_path):
    runs.save_training_state(tmp_path / "latest", *training("lora"), {"iteration": 1})
    policy = make_trainable(NanoPolicy(SMALL), "lora", rank=3)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    with pytest.raises(ValueError, match="latest"):
        runs.load_training_state(tmp_path / "latest", policy, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.safetensors", "counters.json"])
def test_damaged_state(tmp_path, file):
    policy, optimizer = training()
    runs.save_training_state(tmp_path / "latest", policy, optimizer, {"iteration": 1})
    (tmp_path / "latest" / file).write_bytes(b"{")
    with pytest.raises(ValueError, match="latest") as error:
        runs.load_training_state(tmp_path / "latest", policy, optimizer)
    assert len(str(error.value).splitlines()) == 1
