"""The benchmarks that run everywhere."""

import dataclasses
import os
import re
import runpy
import signal
import subprocess
import sys

import gymnasium as gym
import pytest
import torch
from artifacts import ROOT
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from vla_envs.command_line import parse_args
from vla_envs.policies import SHIPPED, count_parameters
from vla_envs.policies.lerobot.policy import network_of
from vla_envs.policies.openvla.model import OpenVLAModel


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"), run_name="__main__")


def test_gpu_on_the_cpu(monkeypatch, capsys):
    """Every policy has its rows, and none is as fast as attainable."""
    run(monkeypatch, "--tiny")
    machine, _, *table = capsys.readouterr().out.splitlines()
    assert torch.__version__ in machine and "commit" in machine
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len(rows) == 22 and {len(row) for row in rows} == {5}
    for name, decisions in {"openvla": 6, "openvla-oft": 2, "smolvla": 2, "pi0": 2}.items():
        assert [row[0].split(": ")[1] for row in rows if row[0].startswith(f"{name}: ")] == [
            "1 decide at once", "32 decide at once", "an update on 4",
            f"TGRPO, 2 x 3 control steps, {decisions} decisions",
        ]  # fmt: skip
    shares = [float(row[3].strip(" %")) for row in rows[4:]]
    assert all(0.0 < share < 100.0 for share in shares)


@pytest.fixture
def gpu():
    """The program's names, and a bench of its toys on the CPU."""
    module = runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))
    args = dataclasses.replace(module["TINY"], tiny=True)
    return module, module["Bench"](torch.device("cpu"), torch.float32, args), args


def test_gpu_attainable_is_arithmetic(gpu):
    """Bytes by hand: of the toys, what each pass of a decision reads."""
    module, bench, args = gpu
    # Two cameras of 4 tokens, 10 words and a state; keys and values of 3 layers with one head of 8 numbers.
    samples = module["Samples"]("smolvla", bench, args)
    first, step = samples.passes
    trained, _ = count_parameters(samples.policy)
    assert (first.times, step.times, step.weights) == (1, 10, 4 * trained)
    assert step.cache == 2 * 3 * 8 * (2 * 4 + 10 + 1) * 4
    assert step.flops == pytest.approx(2 * 50 * trained, rel=0.1)  # a multiplication and an addition each
    bench.rate, bench.bandwidth = 1e30, 1e6
    its = first.weights + 10 * (4 * trained + 32 * step.cache)
    assert samples.least(32) == pytest.approx(its / 1e6)
    bench.rate, bench.bandwidth = 1e6, 1e30
    assert samples.least(32) == pytest.approx(32 * (first.flops + 10 * step.flops) / 1e6)
    # Four patches and the prompt; keys and values of 2 layers of 32 numbers.
    samples = module["Samples"]("openvla", bench, args)
    positions = 4 + len(samples.policy.prompt(module["TASK"]))
    assert [each.times for each in samples.passes] == [1, 6]
    assert samples.passes[1].cache == 2 * 2 * 32 * positions * 4
    samples = module["Samples"]("openvla-oft", bench, args)
    assert [each.times for each in samples.passes] == [1]


def test_gpu_sizes_are_the_published_ones(gpu):
    """In millions of parameters."""
    module, _, _ = gpu
    with torch.device("meta"):
        networks = [network_of(name)(module[f"{name}_config"](False)) for name in ("smolvla", "pi0")]
        networks.append(OpenVLAModel(module["openvla_config"](False)))
    millions = [sum(p.numel() for p in network.parameters()) / 1e6 for network in networks]
    assert millions == pytest.approx([604.9, 3238, 7500], rel=1e-2)


def test_gpu_adds_up_gradients(gpu, monkeypatch, capsys):
    """By gloo, where the GPU has NCCL."""
    module, bench, _ = gpu
    start = torch.distributed.init_process_group
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _, **how: start("gloo", **how))
    module["exchange"]({"pi0": [torch.Size([1000, 250]), torch.Size([7])]}, bench)
    *_, row = capsys.readouterr().out.splitlines()
    assert row.startswith("| pi0: 1 MB of gradients through NCCL, one process | ") and " ms | " in row
    assert not torch.distributed.is_initialized()


def test_gpu_measures_on_the_cpu(gpu, capsys):
    """At the published sizes, in whose place a toy stands here: the rows, with the memory that was taken."""
    module, _, args = gpu
    asked = []
    toy = module["smolvla_config"](True)
    module["main"].__globals__["smolvla_config"] = lambda tiny: asked.append(tiny) or toy
    on_cpu = {"tiny": False, "cpu": True, "policies": ("smolvla",), "batches": (1,), "micro_batches": (2,)}
    module["main"](dataclasses.replace(args, **on_cpu))
    _, _, *table = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert asked == [False] and len(rows) == 7
    assert rows[3][0] == "a matmul in float32" and rows[6][0].startswith("smolvla: TGRPO, 2 x 3 control")
    assert all(re.fullmatch(r"\d+\.\d GiB", row[4]) for row in rows[4:])


def test_gpu_that_is_too_small(gpu, monkeypatch, capsys):
    def fail(*_, **__):
        raise torch.OutOfMemoryError

    module, bench, args = gpu
    monkeypatch.setattr(torch.optim, "AdamW", fail)
    assert module["measure"]("smolvla", bench, args) == []
    assert capsys.readouterr().out.splitlines()[-1] == "| smolvla | out of memory |  |  |  |"


@pytest.mark.parametrize(
    ("script", "words", "error"),
    [
        ("alphas", ["--batches", "0"], "batches is 0; expected a number above 0"),
        (
            "gpu",
            ["--policies", "pi"],
            "--policies is 'pi'; expected one of openvla, openvla-oft, smolvla, pi0",
        ),
        ("soak", ["--num-envs", "0"], "num_envs is 0; expected a number above 0"),
        ("throughput", ["--task-idd", "4"], "there is no option --task-idd; did you mean --task-id?"),
        ("figures", ["curves", "--runs", "none", "--out", "x.png"], "'none' is not the folder of a run"),
        ("lerobot_roundtrip", [], "--lerobot-python must be given"),
        ("lerobot_roundtrip", ["--lerobot-python", "none"], "lerobot_python is 'none', which is not there"),
    ],
)
def test_mistakes_are_one_line(script, words, error, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    monkeypatch.setattr("multiprocessing.set_start_method", lambda *_, **__: None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"), run_name="__main__")
    err = capfd.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and err.startswith(f"error: {error}")


@pytest.mark.parametrize("script", ["alphas", "soak", "throughput"])
def test_ctrl_c_is_one_line(script, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    monkeypatch.setattr("multiprocessing.set_start_method", lambda *_, **__: None)
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "")  # which throughput sets
    monkeypatch.setattr(gym, "make_vec", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"), run_name="__main__")
    lines = [line for line in re.split(r"[\r\n]", capfd.readouterr().err) if line and "?" not in line]
    assert end.value.code == 130 and lines == ["Ctrl-C: stopped"]


def test_what_is_given_beside_tiny_counts(monkeypatch):
    module = runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--steps", "7"])
    args = parse_args(module["Args"], module["TINY"])
    assert args.tiny and (args.steps, args.group_size, args.repeats) == (7, 2, 1)


def test_gpu_without_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and err.count("\n") == 1 and "--tiny" in err


@pytest.mark.slow
def test_what_could_weigh_the_terms(monkeypatch, capsys):
    """The trajectory term tells success better than the step term, and gets the larger weight."""
    monkeypatch.setattr(sys, "argv", ["alphas.py", "--task-ids", "4", "--batches", "1"])
    runpy.run_path(str(ROOT / "benchmarks" / "alphas.py"), run_name="__main__")
    *_, row = capsys.readouterr().out.splitlines()
    _, task, correlations, alphas, *shares, _ = [cell.strip() for cell in row.split("|")]
    for pair in (correlations, alphas):
        step, trajectory = map(float, pair.split(", "))
        assert 0.0 <= step < trajectory <= 1.0
    assert task == "4" and len(shares) == 4 and all(abs(float(x.rstrip("%"))) < 100.0 for x in shares)


@pytest.mark.slow
def test_throughput():
    """Its table, from few steps: LIBERO and TorchRL are there, and slower."""
    words = ["--repeats", "1", "--steps", "4", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "throughput.py", *words], capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name != "LIBERO_ASSETS"}, check=True,
    )  # fmt: skip
    ratios = re.findall(r"^\| (.*) \| .* / .* = (.*) x \|$", done.stdout, re.MULTILINE)
    assert len(ratios) == 6 and all(float(ratio) > 1 for _, ratio in ratios), done.stdout
    assert "LIBERO_ASSETS is not set" in done.stdout and "TorchRL" in done.stdout


@pytest.mark.slow
def test_figures(tmp_path, monkeypatch):
    def draw(*words):
        monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, words)])
        runpy.run_path(str(ROOT / "benchmarks" / "figures.py"), run_name="__main__")
        return Image.open(tmp_path / words[-1])

    monkeypatch.chdir(tmp_path)
    assert draw("gallery", "--out", "gallery.jpg").width == 1200
    clip = draw("clip", "--after", SHIPPED["nano"], "--episodes", 1, "--out", "clip.webp")
    assert clip.n_frames > 10
    events = SummaryWriter(str(tmp_path / "run"))
    for step, value in ((0, 0.2), (100, 0.6)):
        events.add_scalar("charts/success_rate", value, step)
    events.close()
    (tmp_path / "run" / "args.json").write_text('{"seed": 1}')
    assert draw("curves", "--runs", tmp_path / "run", "--out", "curves.png").width > 400
