"""The package's two halves: what simulates knows nothing of torch, what trains nothing of the simulator."""

import ast

import pytest
from conftest import ROOT

PACKAGE = ROOT / "vla_envs"
#: Modules and packages of that half, and those of no half.
TRAINING = set("distributed policies report robustness sb3 training".split())
SHARED = set("assets bddl command_line files inputs liberoplus liberopro machine noise own_objects".split())
SHARED |= set("paraphrases perturbations tasks user_code".split())


def half_of(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "training" if name in TRAINING else "shared" if name in SHARED else "simulator"


def imported(path):
    """Names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


#: Not the doctor, which looks at both.
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__main__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_half_imports_the_other(path):
    half, names = half_of(path), set(imported(path))
    parts = {name.split(".")[1] for name in names if name.startswith("vla_envs.") and name.count(".")}
    of_training = parts & TRAINING
    of_simulator = {
        part for part in parts - TRAINING - SHARED
        if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()
    }  # fmt: skip
    if half != "training":
        assert not of_training
    if half == "simulator":
        assert not any(name.partition(".")[0] == "torch" for name in names)
    if half != "simulator":
        assert not of_simulator


def test_there_are_files_of_each_kind():
    assert {half_of(path) for path in FILES} == {"training", "shared", "simulator"}
