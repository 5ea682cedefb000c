"""Suites, tasks and recorded init states, beside LIBERO's own benchmark classes."""

import dataclasses

import numpy as np
import pytest
import torch
from artifacts import some_tasks

from vla_envs.scene import load_scene
from vla_envs.tasks import SUITES, get_task, num_tasks, recorded_init_states


@pytest.mark.parametrize("suite", SUITES)
def test_tasks_are_liberos(libero, suite):
    from libero.libero.benchmark import get_benchmark

    benchmark = get_benchmark(SUITES[suite])()
    assert num_tasks(suite) == benchmark.n_tasks == (90 if suite == "Libero90" else 10)
    for task_id in range(num_tasks(suite)):
        mine, theirs = get_task(suite, task_id), benchmark.get_task(task_id)
        assert (mine.name, mine.instruction) == (theirs.name, theirs.language)
        assert mine.init_states_file.name == theirs.init_states_file
        assert str(mine.bddl_file) == benchmark.get_task_bddl_file_path(task_id)
        assert mine.bddl_file.is_file() and mine.init_states_file.is_file()


@pytest.mark.parametrize("name", ["LiberoLong", "libero_long", "LIBERO-Long", "LIBERO-10"])
def test_libero_long_is_libero_10(name):
    with pytest.raises(ValueError, match="did you mean 'Libero10'"):
        num_tasks(name)


def test_ketchup_is_task_4():
    """Task 5 of the TGRPO paper, which counts from 1."""
    assert get_task("LiberoObject", 4).instruction == "pick up the ketchup and place it in the basket"


def test_the_scene_is_no_part_of_the_instruction():
    assert get_task("Libero10", 2).instruction.startswith("turn on the stove")
    assert not any("SCENE" in get_task("Libero90", k).instruction for k in range(90))


@pytest.mark.longer
@pytest.mark.parametrize("task_id", some_tasks())
def test_recorded_init_states(task_id):
    task = get_task("LiberoObject", task_id)
    states, model = recorded_init_states(task), load_scene("LiberoObject", task_id).model
    assert np.array_equal(states[:, 1 : 1 + model.nq], load_scene("LiberoObject", task_id).recorded)
    assert states.shape == (50, 1 + model.nq + model.nv) and states.dtype == np.float64
    assert np.array_equal(states, torch.load(task.init_states_file, weights_only=False))
    assert not states[:, 1 + model.nq :].any()  # at rest, as Simulation.restore takes them to be
    assert len(np.unique(states[:, 1:], axis=0)) == 50


def test_reading_init_states_runs_no_code(tmp_path):
    """A pickle with anything but arrays in it is refused."""
    import os

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save(Attack(), tmp_path / "evil.pruned_init")
    task = dataclasses.replace(get_task("LiberoObject", 0), init_states_file=tmp_path / "evil.pruned_init")
    with pytest.raises(ValueError, match=r"evil\.pruned_init"):
        recorded_init_states(task)
    assert not (tmp_path / "attacked").exists()


def save(content):
    return lambda file: torch.save(content, file)


def sparse(file):
    with file.open("wb") as stream:
        stream.truncate(10 * 2**30)


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    "mislabelled": lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000)),
    "oversized": sparse,
    "not a number": save(np.full((50, 111), np.nan)),
    "one row": save(np.zeros(111)),
    "words": save(["a", "b"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_init_states_are_refused_by_name(tmp_path, damage):
    task = get_task("LiberoObject", 0)
    file = tmp_path / "mine.pruned_init"
    file.write_bytes(task.init_states_file.read_bytes())
    DAMAGES[damage](file)
    with pytest.raises(ValueError, match=r"mine\.pruned_init") as error:
        recorded_init_states(dataclasses.replace(task, init_states_file=file))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("suite", "task_id", "words"),
    [
        ("LiberoObjects", 0, ["'LiberoObjects'", "did you mean 'LiberoObject'"]),
        ("libero_goal", 0, ["'libero_goal'", "LiberoGoal"]),
        ("LiberoObject", 10, ["10", "0 to 9", "nearest 9"]),
        ("Libero90", 90, ["90", "0 to 89", "nearest 89"]),
        ("LiberoObject", -1, ["-1", "0 to 9", "nearest 0"]),
        ("LiberoObject", True, ["True", "int"]),
        ("LiberoObject", "4", ["'4'", "int"]),
        ("LiberoObject", 1.0, ["1.0", "int"]),
    ],
)
def test_unknown_task(suite, task_id, words):
    with pytest.raises(ValueError) as error:
        get_task(suite, task_id)
    assert all(word in str(error.value) for word in words)
