"""What the README and the pages say is so: commands, flags, arguments, facts, functions, tasks, links."""

import argparse
import ast
import dataclasses
import importlib.util
import inspect
import re
import runpy
import shlex
import sys

import pytest
import tyro
from artifacts import ROOT

import conrft_vla
import grpo_vla
import ppo_vla
import rft_vla
import sft_vla
import tgrpo_vla
import tpo_vla
from vla_envs import LiberoVectorEnv, experts
from vla_envs.rewards import STAGE_REWARDS, STAGES
from vla_envs.tasks import SUITES, get_task, num_tasks

PAGES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {
    "tgrpo": tgrpo_vla, "grpo": grpo_vla, "ppo": ppo_vla, "tpo": tpo_vla, "rft": rft_vla,
    "conrft": conrft_vla, "sft": sft_vla,
}  # fmt: skip
# Flags of other programs: torchrun's, pip's, and those of our programs that are no script.
OTHER_FLAGS = set(
    "standalone nproc-per-node nnodes rdzv-backend rdzv-endpoint help no-cache check plot demonstrations"
    " image-size videos noise out tiny workers methods seeds cycles logdir axes levels benchmark"
    " lerobot-python policies cpu questions".split()
)


def text_of(path):
    return path.read_text(encoding="utf-8")


def commands():
    """Every command of the pages, in a block or within a sentence, as words."""
    found = {}
    for text in map(text_of, PAGES):
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        for line in lines + re.findall(r"`((?:python|torchrun) [^`]+)`", prose):
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words[:1] in (["python"], ["torchrun"]):
                found[" ".join(words)] = words
    return list(found.values())


def program_of(words):
    """The Python program among the words of a command, and its own words."""
    for i, word in enumerate(words[1:], 1):
        if word.endswith(".py"):
            return word, words[i + 1 :]
        if word == "-m":
            return words[i + 1], words[i + 2 :]
    raise AssertionError(f"{words} names no program")


class Understood(BaseException):
    """The command line has been read."""


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_programs_understand_the_commands(words, monkeypatch):
    def understand(read):
        def then_stop(*args, **kwargs):
            read(*args, **kwargs)
            raise Understood

        return then_stop

    monkeypatch.setattr(tyro, "cli", understand(tyro.cli))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", understand(argparse.ArgumentParser.parse_args))
    program, its_words = program_of(words)
    file = str(ROOT / program)
    if program.endswith(".py"):
        monkeypatch.syspath_prepend(file.rpartition("/")[0])  # as Python does for a script
    else:
        file = importlib.util.find_spec(program).origin.replace("__init__", "__main__")
    monkeypatch.setattr(sys, "argv", [file, *its_words])
    with pytest.raises(Understood):
        runpy.run_path(file, run_name="__main__")


def test_there_are_commands_of_every_program():
    programs = {program_of(words)[0] for words in commands()}
    assert {f"{name}_vla.py" for name in SCRIPTS} < programs and len(programs) > 9


@pytest.mark.parametrize(
    "path",
    [path for path in PAGES if path.name not in ("results.md", "robust-training.md")],
    ids=lambda path: path.name,
)
def test_flags_exist(path):
    """Flags within sentences; pages on results have those of the runs, by the programs that made them."""
    fields = {field.name for script in SCRIPTS.values() for field in dataclasses.fields(script.Args)}
    known = {f"{no}{name.replace('_', '-')}" for name in fields for no in ("", "no-")} | OTHER_FLAGS
    code = " ".join(re.findall(r"`([^`]+)`", re.sub(r"```", "", text_of(path))))
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", code)) <= known


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    """As one reads the pages without a site, whose build checks anchors too."""
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if not re.match(r"\w+:", link) and not link.startswith("#"):
            assert (path.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_of_the_equations_exist(name):
    """Each equation of an algorithm's page ends with the function that computes it."""
    (block,) = re.findall(
        r"^```text\n(.*?)^```", text_of(ROOT / "docs" / f"{name}.md"), re.DOTALL | re.MULTILINE
    )
    named = set(re.findall(r"\s{2}([a-z]+_[a-z_]+|gae)$", block, re.MULTILINE))
    defined = {
        node.name for node in ast.walk(ast.parse(inspect.getsource(SCRIPTS[name]))) if hasattr(node, "name")
    }
    assert named <= defined and (named or name == "sft")


def rows_of(page, header):
    """The cells of the table of a page whose first column has this header."""
    lines = text_of(ROOT / "docs" / page).partition(f"\n| {header} |")[2].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]


def test_the_arguments_are_those_of_the_environments():
    named = [
        name
        for cell, *_ in rows_of("environments.md", "name | default")
        for name in re.findall(r"`(\w+)`", cell)
    ]
    parameters = inspect.signature(LiberoVectorEnv).parameters
    assert set(named) == {*parameters, "workers"} - {"num_envs"}
    for cell, default, _ in rows_of("environments.md", "name | default"):
        name = cell.strip("`")
        if name in ("suite", "autoreset_mode"):
            continue
        if name in parameters and parameters[name].default is not None:
            assert default.strip("`").strip('"') == str(parameters[name].default)


def test_the_stages_pay_what_the_page_says():
    rows = rows_of("rewards.md", "stage of an object to place")
    assert [row[0].split(":")[0].removesuffix(" after a lift") for row in rows] == list(STAGES)
    assert [float(row[2]) for row in rows] == STAGE_REWARDS.tolist()


def test_the_facts_are_those_of_the_environments(make):
    env = make()
    _, info = env.reset(seed=0)
    named = [name for cell, *_ in rows_of("rewards.md", "fact") for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(info["facts"])


def test_the_tasks_are_liberos():
    text = text_of(ROOT / "docs" / "tasks.md")
    for suite in SUITES:
        rows = re.findall(
            r"^\| (\d+) \| (.*) \|$", text.partition(f"\n## {suite}\n")[2].partition("\n## ")[0], re.M
        )
        assert [int(k) for k, _ in rows] == list(range(num_tasks(suite)))
        for k, cells in rows:
            instruction, *_, played = (cell.strip() for cell in cells.split("|"))
            assert instruction == get_task(suite, int(k)).instruction
            assert (played == "yes") == (int(k) in experts.COVERED.get(suite, ()))
