"""The README's commands: programs understand all of them, and those of the scripts run on something small."""

import argparse
import importlib
import re
import runpy
import shlex
import sys

import pytest
import torch
import tyro
from conftest import ROOT, words_of, write_demos
from test_openvla import write_tiny

from vla_envs.policies import adapters, load_policy, save_policy

PROGRAMS = ("python", "torchrun", "pip", "pytest", "tensorboard", "pdoc")
TINY = {
    "num_groups": 2, "group_size": 2, "num_iterations": 1, "eval_episodes": 1, "eval_every": 0,
    "max_episode_steps": 16, "num_threads": 1, "minibatch_size": 4,
}  # fmt: skip
# Who runs what is not one of the four scripts: the check before every change, or a test.
ELSEWHERE = {
    "pip": ".ci/run",
    "pytest": ".ci/run",
    "pdoc": "tests/test_documentation.py",
    "torchrun": "tests/test_distributed.py",
    "tensorboard": "tests/test_scripts.py",  # reads the events with its reader
    "vla_envs doctor": "tests/test_main.py",
    "vla_envs cache": "tests/test_main.py",
    "vla_envs.assets": "tests/test_assets.py",
    "vla_envs.experts": "tests/test_experts.py",
    "vla_envs.report": "tests/test_report.py",
    "vla_envs.rewards": "tests/test_rewards_cli.py",
    "benchmarks/alphas.py": "tests/test_benchmarks.py",
    "benchmarks/gpu.py": "tests/test_benchmarks.py",
    "benchmarks/pictures.py": "tests/test_benchmarks.py",
    "benchmarks/reproduce.py": "tests/test_reproduce.py",
    "benchmarks/soak.py": "tests/test_soak.py",
    "benchmarks/throughput.py": "tests/test_benchmarks.py",
}


def commands():
    """Every command of the README, whether on lines of its own or within a sentence, as words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)  # Python: tests/test_libraries.py
    text = re.sub(r"\\\n +", "", text)  # lines that go on
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE) + re.findall(
        r"`([^`]+)`", text.replace("\n", " ")
    )
    found = {}
    for part in (part for line in lines for part in line.split("&&")):
        words = shlex.split(part) if part.count('"') % 2 == part.count("'") % 2 == 0 else []
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if (words[1:] and words[0] in PROGRAMS) or words == ["pytest"]:
            found[" ".join(words)] = words
    return list(found.values())


def program_of(words):
    """The Python program among the words of a command, and its own words; None where there is none."""
    for i, word in enumerate(words[1:], 1):
        if word.endswith(".py") and not word.startswith("tests/"):
            return word, words[i + 1 :]
        if word == "-m" and words[0] == "python":
            return words[i + 1], words[i + 2 :]
    return None


PYTHON = [words for words in commands() if words[0] in ("python", "torchrun")]


def test_the_readme_has_commands():
    programs = {program_of(words)[0] for words in PYTHON}
    assert {"tgrpo_vla.py", "grpo_vla.py", "ppo_vla.py", "sft_vla.py", "vla_envs"} < programs
    assert len(PYTHON) > 20


class Understood(BaseException):
    """The command line has been read."""


@pytest.mark.parametrize("words", PYTHON, ids=" ".join)
def test_programs_understand_the_readme(words, monkeypatch):
    def understand(read):
        def then_stop(*args, **kwargs):
            read(*args, **kwargs)
            raise Understood

        return then_stop

    monkeypatch.setattr(tyro, "cli", understand(tyro.cli))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", understand(argparse.ArgumentParser.parse_args))
    program, its_words = program_of(words)
    file = ROOT / program
    if not program.endswith(".py"):
        module = importlib.util.find_spec(program)
        file = module.origin.replace("__init__", "__main__")
    monkeypatch.setattr(sys, "argv", [str(file), *its_words])
    with pytest.raises(Understood):
        runpy.run_path(str(file), run_name="__main__")


def test_somebody_runs_every_command():
    for words in commands():
        name = " ".join(words)
        if not re.match(r"python (tgrpo|grpo|ppo|sft)_vla\.py", name):
            found = [key for key in ELSEWHERE if words[0] == key or f" {key}" in name]
            assert len(found) == 1, name
            text = (ROOT / ELSEWHERE[found[0]]).read_text(encoding="utf-8")
            assert re.split(r"[ ./]", found[0].removesuffix(".py"))[-1] in text, name


@pytest.fixture
def material(tmp_path, monkeypatch):
    """What the README's commands take for granted, small, in the folder in which they run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text("def reward(facts):\n    return -facts['gripper_to_object']\n")
    policy = adapters.make_trainable(load_policy("nano"), "lora", rank=2)
    for name in "ab":
        adapters.save_adapter(policy, tmp_path / "runs" / name / "checkpoints" / "adapter")
    save_policy(load_policy("nano"), "nano", tmp_path / "RUN" / "checkpoints" / "final")
    (tmp_path / "demos").mkdir()
    for task_id in range(10):
        write_demos(tmp_path / "demos" / f"LiberoObject_{task_id}_demo.hdf5", (5, 5, 5), size=128)
    return {"openvla/openvla-7b-finetuned-libero-object": str(write_tiny(tmp_path / "tiny"))}


@pytest.mark.slow
def test_the_scripts_commands_run(material, tmp_path, monkeypatch, capfd):
    """In the README's order, so that what one leaves is there for the next."""
    ran = 0
    for words in PYTHON:
        program, its_words = program_of(words)
        if words[0] != "python" or not program.endswith("_vla.py"):
            continue
        flags = dict(TINY)
        if program == "sft_vla.py":
            flags = {k: flags[k] for k in ("eval_episodes", "eval_every", "max_episode_steps", "num_threads")}
            several = "--episodes" in its_words  # tasks, each with its own number
            flags |= {"num_iterations": 1, "iteration_steps": 1, "episodes": (2,) * 10 if several else 2}
        if "--evaluate" in its_words:
            flags = {"eval_episodes": 1, "num_threads": 1}
            flags |= {} if "--protocol" in its_words else {"max_episode_steps": 16}
        if "openvla" in its_words:
            flags |= {"lora_rank": 2, "device": "cpu"} if "lora" in its_words else {"device": "cpu"}
        torch.manual_seed(0)
        line = [material.get(word, word) for word in its_words]
        monkeypatch.setattr(sys, "argv", [program, *line, *words_of(flags)])
        try:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as exit_:
            assert not exit_.code, (words, capfd.readouterr().err)
        ran += 1
    assert ran > 10
