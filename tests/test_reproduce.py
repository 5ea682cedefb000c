"""benchmarks/reproduce.py: what it makes, keeps, and works out."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
pytestmark = pytest.mark.filterwarnings("ignore:random_state is deprecated")  # rliable's way of seeding
reproduce = pytest.importorskip("reproduce", reason="needs the dev extra's rliable", exc_type=ImportError)


def line(method, task_id, seed, after, before=10):
    return {"method": method, "task_id": task_id, "seed": seed, "before": before, "after": after,
            "sampled_before": before - 2, "sampled_after": after - 3,
            "trials": 50, "env_steps": 100, "episodes": 8, "wall_s": 60, "commit": "abc"}  # fmt: skip


def cells(text, method):
    (row,) = [row for row in text.splitlines() if row.startswith(f"| {method} |")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Intervals of few bootstrap draws, which is enough where all runs are equal."""
    monkeypatch.setattr(reproduce, "DRAWS", 100)


def test_the_table():
    lines = [line("GRPO", task_id, seed, after) for task_id, seed, after in
             ((0, 1, 20), (0, 2, 30), (4, 1, 40), (4, 2, 50))]  # fmt: skip
    lines += [line("PPO", 0, seed, 10) for seed in (1, 2)]
    text = reproduce.table(lines, ["GRPO", "PPO"])
    assert "| method | task 0 | task 4 | IQM |" in text and "over tasks [0], seeds [1, 2]" in text
    start, grpo, ppo = (cells(text, name) for name in (reproduce.START, "GRPO", "PPO"))
    assert [cell.partition(" ")[0] for cell in start[:2]] == ["20/100", "20/100"]
    assert [cell.partition(" ")[0] for cell in grpo[:2]] == ["50/100", "90/100"]
    assert ppo[1] == "" and grpo[2].startswith("50 %") and ppo[2] == "20 % (20 to 20 %)"
    assert grpo[3] == "1.00 (1.00 to 1.00)" and ppo[3] == "0.50 (0.50 to 0.50)"  # ties count half


def test_a_table_of_runs_that_do_not_overlap():
    text = reproduce.table([line("GRPO", 0, 1, 20), line("PPO", 4, 1, 30)], ["GRPO", "PPO"])
    assert cells(text, "GRPO")[2:] == ["", ""] and "no task and seed" in text


def test_how_soon():
    """The first evaluation that was high enough; minutes in proportion."""

    def curve(seed, *values):
        which = {"method": "GRPO", "task_id": 4, "seed": seed, "tag": "charts/success_rate"}
        return [which | {"env_steps": 25 * k, "value": value} for k, value in enumerate(values)]

    points = curve(1, 0.2, 0.85, 0.7, 0.95, 1.0) + curve(2, 0.2, 0.5, 0.8, 0.8, 0.8)
    text = reproduce.reached([line("GRPO", 4, seed, 50) for seed in (1, 2)], points, ["PPO", "GRPO"])
    expected = ["4", "38 (25 to 50)", "0.4 (0.2 to 0.5)", "75, 1 of 2 runs", "0.8, 1 of 2 runs"]
    assert cells(text, "GRPO") == expected and "PPO" not in text
    low = reproduce.reached([line("GRPO", 4, 1, 10)], curve(1, 0.2, 0.2), ["GRPO"])
    assert cells(low, "GRPO") == ["4"] + ["not reached"] * 4


def test_the_pairs():
    """On the same task and seed; the seed that only one of them has does not count."""
    auto, papers = "TGRPO --alphas auto", reproduce.PAPERS
    lines = [line(auto, 0, 1, 30), line(auto, 0, 2, 40), line(auto, 7, 1, 20), line(auto, 7, 2, 5)]
    lines += [
        line("TGRPO", 0, 1, 25),
        line("TGRPO", 0, 2, 45),
        line("TGRPO", 7, 1, 10),
        line(papers, 7, 1, 15),
    ]
    text = reproduce.pairs_table(lines)
    assert "| pair | task 0 | task 7 | all |" in text
    row = cells(text, f"{auto} against TGRPO")
    assert row[:2] == ["+0 (2)", "+20 (1)"] and row[2].startswith("+6.7 (") and row[2].endswith("; 3)")
    assert cells(text, f"{papers} against TGRPO") == ["", "+10 (1)", "+10.0 (1)"]
    assert "--preset paper" not in text  # no pair has been run


def test_ablations_are_cells_of_the_heat_map():
    ablations = ["TGRPO without the step term", "TGRPO without the trajectory term"]
    made = [line(method, 4, 1, 30) for method in ("TGRPO", *ablations, "GRPO")]
    twins = reproduce.with_twins(made)[len(made) :]
    assert [x["method"] for x in twins] == ["TGRPO 0.3/0.7", "TGRPO 0/0.7", "TGRPO 0.3/0"]
    assert all(
        reproduce.HEAT_MAP[x["method"]] == ["tgrpo_vla.py", "--alpha1", alpha1, "--alpha2", alpha2]
        for x, (alpha1, alpha2) in zip(twins, [("0.3", "0.7"), ("0", "0.7"), ("0.3", "0")])
    )


def test_the_papers_alphas_are_the_tasks(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        reproduce.subprocess, "run", lambda words, **_: started.append(words) or SimpleNamespace(returncode=0)
    )
    monkeypatch.setattr(reproduce, "commit", lambda: "abc")
    for task_id in (0, 3):
        reproduce.play(reproduce.PAPERS, task_id, 1, reproduce.Args(out=tmp_path))
    alphas = ["--alpha1", "10.0", "--alpha2", "1.0"], ["--alpha1", "0.35", "--alpha2", "0.65"]
    assert [words[-4:] for words in started] == list(alphas)


def test_questions_are_the_pairs_runs(tmp_path, monkeypatch, capsys):
    letter = [
        "TGRPO --preset paper --learning-rate 1e-4", "TGRPO --learning-rate 1e-4", "TGRPO --preset paper",
        "TGRPO --stop group", "TGRPO --no-clip", "TGRPO --update-every step",
    ]  # fmt: skip
    known = [line(method, 4, 1, 30) for method in ("TGRPO", "TGRPO --alphas auto", "TGRPO --group-by stage")]
    reproduce.write_csv(tmp_path / "runs.csv", reproduce.RUN, known)
    played = []
    monkeypatch.setattr(reproduce, "play", lambda *each: played.append(each[:3]))
    monkeypatch.setattr(reproduce, "read_run", lambda *each: (line(*each[:3], 20), []))
    reproduce.main(reproduce.Args(results=tmp_path, out=tmp_path, questions=True, task_ids=(4,), seeds=(1,)))
    returns = ["TGRPO --return-mode sum", "TGRPO --return-mode mean"]
    credit = ["GRPO", "GRPO --credit stage"]
    assert [each[0] for each in played] == [reproduce.PAPERS, *returns, *credit, *letter]
    assert "| TGRPO --preset paper against TGRPO | -20 (1) | -20.0 (1) |" in capsys.readouterr().out
    assert "paper against TGRPO" in (tmp_path / "questions.md").read_text()


def test_curves_are_of_the_runs_that_all_methods_have(tmp_path, monkeypatch):
    def curve(method, task_id, seed, value):
        which = {"method": method, "task_id": task_id, "seed": seed}
        return [which | {"tag": tag, "env_steps": step, "value": value}
                for tag in reproduce.CURVES for step in (0, 100)]  # fmt: skip

    monkeypatch.setattr(reproduce.plt, "close", lambda figure: figures.append(figure))
    figures: list = []
    points = curve("GRPO", 0, 1, 0.9) + curve("GRPO", 4, 1, 0.5) + curve("PPO", 4, 1, 0.4)
    reproduce.draw_curves(points, ["PPO", "GRPO", "TGRPO"], tmp_path / "curves.png")
    (figure,) = figures
    assert all(axis.get_title().endswith("task/seed 4/1") for axis in figure.axes)
    assert [(line.get_label(), *line.get_ydata()[:1]) for line in figure.axes[0].lines] == [
        ("PPO", 0.4), ("GRPO", 0.5)]  # fmt: skip
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_heat_map_is_of_one_task(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce.plt, "close", lambda figure: figures.append(figure))
    figures: list = []
    lines = [line("TGRPO 3/7", 4, 1, 30), line("TGRPO 3/7", 4, 2, 40), line("TGRPO 3/7", 7, 1, 5)]
    lines += [
        line("TGRPO", 4, 1, 25),
        line("TGRPO", 4, 2, 20),
        line("TGRPO", 4, 3, 50),
        line("TGRPO", 0, 1, 9),
    ]
    reproduce.show(lines, [], tmp_path)
    assert {path.name for path in tmp_path.glob("heat*")} == {"heat_map_4.png", "heat_map_7.png"}
    cells = [[text.get_text() for text in figure.axes[0].texts] for figure in figures]
    assert cells == [["45 %", "70 %"], ["10 %"]]  # 0.3/0.7 is TGRPO's, of the seeds that both have
    assert [figure.axes[0].get_title() for figure in figures] == ["task 4, seed 1, 2", "task 7, seed 1"]


def test_a_heat_map_runs_what_it_lacks(tmp_path, monkeypatch):
    known = [line(method, 4, 1, 30) for method in ("TGRPO", "TGRPO without the step term", "TGRPO 3/7")]
    reproduce.write_csv(tmp_path / "runs.csv", reproduce.RUN, known)
    played = []
    monkeypatch.setattr(reproduce, "play", lambda *each: played.append(each[:3]))
    monkeypatch.setattr(reproduce, "read_run", lambda *each: (line(*each[:3], 20), []))
    reproduce.main(reproduce.Args(results=tmp_path, out=tmp_path, heat_map=4, seeds=(1,), jobs=1))
    assert played == [(f"TGRPO {alphas}", 4, 1) for alphas in ("0/7", "0.3/0", "0.3/7", "3/0", "3/0.7")]


def test_csv(tmp_path):
    lines = [line("PPO", 4, 2, 7), line("GRPO", 4, 1, 8)]
    reproduce.write_csv(tmp_path / "runs.csv", reproduce.RUN, lines)
    kinds = dict.fromkeys(reproduce.RUN, 0) | {"method": "", "commit": ""}
    assert reproduce.read_csv(tmp_path / "runs.csv", kinds) == lines[::-1]
    assert reproduce.read_csv(tmp_path / "nothing.csv", kinds) == []


def test_it_runs_what_is_missing_and_nothing_twice(tmp_path, monkeypatch, capsys):
    tiny = ("--num-groups 1 --group-size 2 --eval-episodes 2 --max-episode-steps 8 --num-iterations 1"
            " --minibatch-size 2 --eval-every 0").split()  # fmt: skip
    monkeypatch.setattr(reproduce, "METHODS", {"TGRPO": ["tgrpo_vla.py", *tiny]})
    monkeypatch.setattr(reproduce, "TOTAL_ENV_STEPS", 1)
    args = reproduce.Args(
        results=tmp_path / "results", out=tmp_path / "runs", methods=("TGRPO",), task_ids=(4,), seeds=(3,),
        jobs=1,
    )  # fmt: skip
    reproduce.main(args)
    assert "1 runs, 1 side by side" in capsys.readouterr().out
    assert {path.name for path in args.results.iterdir()} == {
        "runs.csv", "curves.csv", "table.md", "curves.png"}  # fmt: skip
    tags = [point["tag"] for point in reproduce.read_csv(args.results / "curves.csv", {})]
    assert set(tags) == set(reproduce.CURVES) and tags.count("charts/success_rate") == 2
    (made,) = reproduce.read_csv(args.results / "runs.csv", {})
    result = json.loads((args.out / "tgrpo__4__3" / "result.json").read_text())
    for column, name in {"before": "success_before", "after": "success_after"}.items():
        assert int(made[column]) == result[name]["successes"]
        assert int(made[f"sampled_{column}"]) == result[f"sampled_{column}"]["successes"]
    assert made["commit"] == reproduce.commit() == (args.out / "tgrpo__4__3.commit").read_text()
    before = (args.results / "runs.csv").read_bytes()
    monkeypatch.setattr(reproduce, "play", lambda *_: pytest.fail("a run was made twice"))
    reproduce.main(args)
    assert (args.results / "runs.csv").read_bytes() == before
    assert "nothing to run" in capsys.readouterr().out


def test_other_results_have_runs_of_their_own(tmp_path):
    own, other = reproduce.Args(), reproduce.Args(results=tmp_path)
    assert reproduce.folder_of("GRPO", 4, 1, own) == Path("runs/reproduce/LiberoObject/grpo__4__1")
    assert reproduce.folder_of("GRPO", 4, 1, other) == tmp_path / "runs" / "grpo__4__1"


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "METHODS", {"TGRPO": ["tgrpo_vla.py", "--group-size", "1"]})
    args = reproduce.Args(
        results=tmp_path / "results", out=tmp_path / "runs", methods=("TGRPO",), task_ids=(4,), seeds=(3,)
    )
    with pytest.raises(RuntimeError, match=r"TGRPO, task 4, seed 3: error: group_size is 1; .* \(all of it"):
        reproduce.main(args)
    assert not (args.results / "runs.csv").exists()


@pytest.mark.parametrize(("name", "value"), [("methods", ("REINFORCE",)), ("task_ids", (4, 10))])
def test_what_does_not_exist(name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"{name} \['?{value[-1]}'?\] are unknown; expected some of"):
        reproduce.main(reproduce.Args(results=tmp_path / "results", **{name: value}))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"heat_map": 12}, r"task_ids \[12\] are unknown; expected some of 0 to 9"),
        ({"heat_map": 4, "methods": ("GRPO",)}, "expected neither --methods nor --questions"),
        ({"heat_map": 4, "questions": True}, "expected neither --methods nor --questions"),
        ({"heat_map": 4, "task_ids": (0,)}, "nor --task-ids"),
    ],
)
def test_a_heat_map_of_nothing(given, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        reproduce.main(reproduce.Args(results=tmp_path / "results", **given))
    assert not (tmp_path / "results").exists()
