"""benchmarks/reproduce.py: what it makes, keeps, and works out."""

import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from artifacts import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
pd = pytest.importorskip("pandas", reason="needs the dev extra's pandas")
import methods  # noqa: E402
import reproduce  # noqa: E402
import results_page  # noqa: E402
import robust_training  # noqa: E402

from vla_envs import perturbations  # noqa: E402


def line(method, task_id, seed, after, before=10):
    return {"method": method, "task_id": task_id, "seed": seed, "before": before, "after": after,
            "sampled_before": before - 2, "sampled_after": after - 3,
            "trials": 50, "env_steps": 100, "episodes": 8, "wall_s": 60, "commit": "abc",
            "machine": "a laptop"}  # fmt: skip


def table_of(text):
    """The cells of a Markdown table by row and column."""
    head, _, *rows = [
        [cell.strip() for cell in row[1:-1].split("|")] for row in text.splitlines() if row[:1] == "|"
    ]
    return {first: dict(zip(head[1:], rest)) for first, *rest in rows}


def test_the_table():
    lines = [line("GRPO", task_id, seed, after) for task_id, seed, after in
             ((0, 1, 20), (0, 2, 30), (4, 1, 40), (4, 2, 50))]  # fmt: skip
    lines += [line("PPO", 0, seed, 10) for seed in (1, 2)]
    text = results_page.table(pd.DataFrame(lines), ["GRPO", "PPO"])
    assert "over tasks [0], seeds [1, 2]" in text
    rows = table_of(text)
    assert list(rows) == ["task 0", "task 4", "IQM", "better than the start"]
    assert list(rows["IQM"]) == [results_page.START, "GRPO", "PPO"]
    successes = [[cell.partition(" ")[0] for cell in rows[f"task {k}"].values()] for k in (0, 4)]
    assert successes == [["20/100", "50/100", "20/100"], ["20/100", "90/100", ""]]
    assert rows["IQM"]["GRPO"].startswith("50 % (") and rows["IQM"]["PPO"] == "20 % (20 % to 20 %)"
    better = {results_page.START: "", "GRPO": "1.00 (1.00 to 1.00)", "PPO": "0.50 (0.50 to 0.50)"}
    assert rows["better than the start"] == better  # ties count half


def test_a_table_of_runs_that_do_not_overlap():
    lines = pd.DataFrame([line("GRPO", 0, 1, 20), line("PPO", 4, 1, 30)])
    text = results_page.table(lines, ["GRPO", "PPO"])
    assert list(table_of(text)) == ["task 0", "task 4"] and "no task and seed" in text


def test_how_soon():
    """The first evaluation that was high enough; minutes in proportion."""

    def curve(seed, *values):
        which = {"method": "GRPO", "task_id": 4, "seed": seed, "tag": "charts/success_rate"}
        return [which | {"env_steps": 25 * k, "value": value} for k, value in enumerate(values)]

    def row(lines, points):
        text = results_page.reached(pd.DataFrame(lines), pd.DataFrame(points), ["PPO", "GRPO"])
        assert "PPO" not in text
        return list(table_of(text)["GRPO"].values())

    points = curve(1, 0.2, 0.85, 0.7, 0.95, 1.0) + curve(2, 0.2, 0.5, 0.8, 0.8, 0.8)
    steps = ["38 (25 to 50)", "0.4 (0.2 to 0.5)", "75, 1 of 2 runs", "0.8, 1 of 2 runs"]
    assert row([line("GRPO", 4, seed, 50) for seed in (1, 2)], points) == ["4", "1 2", *steps]
    low = row([line("GRPO", 4, 1, 10)], curve(1, 0.2, 0.2))
    assert low == ["4", "1", *["not reached"] * 4]
    cloned = [line("PPO", 4, 1, 50) | {"env_steps": 0}]  # cloning takes no control steps
    assert row([*cloned, line("GRPO", 4, 1, 10)], curve(1, 0.2, 0.2)) == low


def test_the_pairs():
    """On the same task and seed; the seed that only one of them has does not count."""
    auto, papers = "TGRPO --alphas auto", methods.PAPERS
    lines = [line(auto, 0, 1, 30), line(auto, 0, 2, 40), line(auto, 7, 1, 20), line(auto, 7, 2, 5)]
    lines += [
        line("TGRPO", 0, 1, 25),
        line("TGRPO", 0, 2, 45),
        line("TGRPO", 7, 1, 10),
        line(papers, 7, 1, 15),
    ]
    rows = table_of(results_page.pairs_table(pd.DataFrame(lines)))
    assert set(rows) == {f"{auto} against TGRPO", f"{papers} against TGRPO"}  # no other pair has been run
    row = rows[f"{auto} against TGRPO"]
    assert list(row) == ["task 0", "task 7", "all", "pairs"]
    assert (row["task 0"], row["task 7"]) == ("+0 (2)", "+20 (1)")
    assert row["all"].startswith("+6.7 (") and row["pairs"] == "3"
    assert list(rows[f"{papers} against TGRPO"].values()) == ["", "+10 (1)", "+10.0", "1"]


def test_claims():
    """Of pairs that win by 2 to 7 points; of pairs that lose; of few pairs; of one that is not run."""
    lines = [line("TGRPO", 0, seed, 40) for seed in range(1, 7)]
    lines += [line("SFT", 0, seed, 40 - (seed + 1) // 2) for seed in range(1, 7)]
    lines += [line("PPO", 0, seed, 41 + seed % 2) for seed in range(1, 7)]
    lines += [line("GRAPE", 0, seed, 30) for seed in range(1, 6)]
    runs = pd.DataFrame(lines)
    head, _, *rows = (
        results_page.claims_table(results_page.evaluated(runs)).strip().split("\n\n")[0].split("\n")
    )
    assert "theirs | ours, deterministic | ours, sampled" in head
    cells = {row.split(" | ")[1]: row.split(" | ")[3:] for row in rows}
    assert list(cells) == ["SFT", "PPO", "GRAPE", "GRPO"][: len(cells)] and len(cells) == 3
    assert cells["SFT"][0] == "+4.6" and cells["SFT"][1].startswith("+4.0 (+2.7 to +5.3), 6 pairs: holds")
    assert "-3.0 (" in cells["PPO"][1] and cells["PPO"][2].endswith("6 pairs: does not hold |")
    assert cells["GRAPE"][1] == "+20.0 (+20.0 to +20.0), 5 pairs: cannot tell"
    tied = runs.assign(after=[*range(6), *range(5, -1, -1), *runs["after"][12:]])
    assert results_page.verdict(results_page.gains_of(tied, "TGRPO", "SFT")) == "cannot tell"
    assert results_page.claims_table(results_page.evaluated(runs[:6])) == ""


def test_every_number_has_its_command_commit_and_machine():
    lines = [line("SFT", 4, 1, 30), line("SFT", 4, 2, 30) | {"commit": "def", "machine": None}]
    rows = table_of(results_page.made(pd.DataFrame(lines), ["GRPO", "SFT"]))
    command = "`python sft_vla.py --demos demos` from the shipped `nano`, without `--total-env-steps`"
    assert rows == {"SFT": {"command": command, "runs": "2", "commits": "abc def",
                            "machines": "a laptop; not recorded"}}  # fmt: skip
    its = methods.METHODS | methods.ASKED | methods.HEAT_MAP
    assert {claim.method for claim in methods.CLAIMS} | {claim.other for claim in methods.CLAIMS} <= set(its)


def test_how_much_of_a_run_is_done(tmp_path, monkeypatch):
    """By its control steps; weighed by what the method's runs, or else all, took before."""
    folder = tmp_path / "grpo__4__1"
    assert reproduce.share_done(folder, 200) == 0
    (folder / "checkpoints" / "latest").mkdir(parents=True)
    (folder / "checkpoints" / "latest" / "counters.json").write_text('{"env_steps": 50}')
    assert reproduce.share_done(folder, 200) == 0.25
    (folder / "result.json").touch()
    assert reproduce.share_done(folder, 200) == 1
    runs = pd.DataFrame([line("GRPO", 4, seed, 9) | {"wall_s": 60 * seed} for seed in (1, 3, 5)])
    runs = pd.concat([runs, pd.DataFrame([line("SFT", 4, 1, 9) | {"wall_s": 30}])])
    args = reproduce.Args(task_ids=(0, 1, 2))
    names = ("GRPO", "SFT", "PPO", "GRPO, one policy")
    minutes = [reproduce.minutes_of(method, runs, args) for method in names]
    assert minutes == [3, 0.5, 2, 4.5] and reproduce.minutes_of("PPO", runs[:0], args) == reproduce.MINUTES
    here = line("SFT", 4, 2, 9) | {"wall_s": 90, "machine": reproduce.machine(args.jobs)}
    minutes = [
        reproduce.minutes_of(name, pd.concat([runs, pd.DataFrame([here])]), args) for name in ("SFT", "GRPO")
    ]
    assert minutes == [1.5, 1.5]  # only this machine's runs count, where it has any


def test_the_main_methods_are_whole_before_the_others():
    wanted = reproduce.missing(
        reproduce.Args(task_ids=(0, 4), seeds=(1, 2)), pd.DataFrame(columns=results_page.RUN)
    )
    first = [each for each in wanted if each[0] in methods.FIRST]
    assert wanted[:16] == first and wanted[0] == ("SFT", 0, 1) and wanted[15] == ("TGRPO", 4, 2)


def test_ablations_are_cells_of_the_heat_map():
    ablations = ["TGRPO without the step term", "TGRPO without the trajectory term"]
    made = pd.DataFrame([line(method, 4, 1, 30) for method in ("TGRPO", *ablations, "GRPO")])
    twins = list(results_page.with_twins(made)["method"])[len(made) :]
    assert twins == ["TGRPO 0.3/0.7", "TGRPO 0/0.7", "TGRPO 0.3/0"]
    for twin, (alpha1, alpha2) in zip(twins, [("0.3", "0.7"), ("0", "0.7"), ("0.3", "0")]):
        assert methods.HEAT_MAP[twin] == ["tgrpo_vla.py", "--alpha1", alpha1, "--alpha2", alpha2]


def test_the_papers_alphas_are_the_tasks(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        reproduce.subprocess, "run", lambda words, **_: started.append(words) or SimpleNamespace(returncode=0)
    )
    monkeypatch.setattr(reproduce, "commit", lambda: "abc")
    for task_id in (0, 3):
        reproduce.play(methods.PAPERS, task_id, 1, reproduce.Args(out=tmp_path))
    alphas = ["--alpha1", "10.0", "--alpha2", "1.0"], ["--alpha1", "0.35", "--alpha2", "0.65"]
    assert [words[-4:] for words in started] == list(alphas)


def test_demonstrations_are_recorded_once(tmp_path, monkeypatch):
    """SFT plays nothing, so it has no control steps, no curves and nothing before training."""
    started = []

    def run(words, **_):
        started.append(words)
        if "vla_envs.experts" in words:
            folder = Path(words[words.index("--out") + 1])
            folder.mkdir(parents=True)
            (folder / "LiberoObject_4_demo.hdf5").touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    monkeypatch.setattr(reproduce, "commit", lambda: "abc")
    args = reproduce.Args(out=tmp_path)
    reproduce.play("SFT", 4, 1, args)
    reproduce.play("ConRFT", 4, 1, args)
    recording, sft, conrft = started
    assert recording[-4:] == ["--task-ids", "4", "--episodes", "25"]
    folder = str(tmp_path / "demonstrations_4")
    assert all(words[words.index("--demos") + 1] == folder for words in (sft, conrft))
    assert "--checkpoint" in sft and "--total-env-steps" not in sft
    assert "--checkpoint" not in conrft and "--total-env-steps" in conrft
    run_folder = reproduce.folder_of("SFT", 4, 1, args)
    run_folder.mkdir()
    ways = {way: {"successes": after, "trials": 50} for way, after in (("success", 49), ("sampled", 30))}
    (run_folder / "result.json").write_text(json.dumps(ways | {"wall_s": 60.2}))
    row, points = reproduce.read_run("SFT", 4, 1, args)
    found = row[["after", "sampled_after", "env_steps", "wall_s"]].iloc[0].tolist()
    assert found == [49, 30, 0, 60] and row[["before", "sampled_before"]].isna().all(axis=None)
    assert points.empty
    lines = pd.concat([row, pd.DataFrame([line("GRPO", 4, 1, 50)])]).astype({"before": "Int64"})
    cells = table_of(results_page.table(lines, ["SFT", "GRPO"]))["task 4"].values()
    assert [cell.partition(" ")[0] for cell in cells] == ["10/50", "49/50", "50/50"]  # the start is GRPO's


def test_variants_of_the_loss(tmp_path, monkeypatch):
    """Each is a copy of grpo_vla.py with a line of its own, and its loss has the gradient it should have."""
    scripts = {}
    monkeypatch.setattr(
        reproduce.subprocess,
        "run",
        lambda words, **_: scripts.update({words[1]: 1}) or SimpleNamespace(returncode=0),
    )
    monkeypatch.setattr(reproduce, "commit", lambda: "abc")
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    old, advantages = torch.tensor([[-1.3, -1.9], [-0.4, -2.9]]), torch.tensor([1.0, -2.0])
    ratio = (logprobs - old).exp().detach()
    both = (logprobs - old).mean(dim=1, keepdim=True).exp().detach().expand_as(ratio)
    clipped = ratio.clamp(0.8, 1.28)
    passes = {  # what multiplies the advantage in the gradient of a token's log-probability
        "GRPO without the std": torch.where(ratio == clipped, ratio, 0.0),
        "GRPO with GSPO's ratio": both,  # within the clip
        "GRPO with CISPO's weights": clipped,
    }
    for method in methods.VARIANTS:
        reproduce.play(method, 4, 1, reproduce.Args(out=tmp_path))
        module = runpy.run_path(list(scripts)[-1], run_name="variant")
        loss, _ = module["policy_loss"](logprobs, old, advantages, torch.ones(2), 0.2, 0.28)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        expected = -passes[method] * advantages[:, None] / 4
        if method == "GRPO with GSPO's ratio":
            expected = expected.mean(dim=1, keepdim=True).expand_as(expected)
        torch.testing.assert_close(gradient, expected, msg=method)
        by_std = module["group_advantages"](torch.tensor([0.0, 0.0, 1.0, 1.0]), 4).abs()
        assert bool((by_std == 0.5).all()) == (method == "GRPO without the std")
    assert len(scripts) == 3
    page = (ROOT / "docs" / "grpo.md").read_text(encoding="utf-8")
    assert all(f"`{new.strip()}`" in page for _, new in methods.VARIANTS.values())


def test_the_papers_alphas_are_of_one_suite(tmp_path):
    with pytest.raises(ValueError, match=r"suite is LiberoGoal; expected LiberoObject"):
        reproduce.main(reproduce.Args(suite="LiberoGoal", methods=(methods.PAPERS,), results=tmp_path / "a"))
    none = pd.DataFrame(columns=reproduce.RUN)
    for suite in ("LiberoGoal", "LiberoObject"):
        wanted = reproduce.missing(reproduce.Args(suite=suite, questions=True), none)
        assert (methods.PAPERS in {method for method, *_ in wanted}) == (suite == "LiberoObject")


def no_curves(method, task_id, seed, after):
    return pd.DataFrame([line(method, task_id, seed, after)]), pd.DataFrame(columns=reproduce.POINT)


def test_questions_are_the_pairs_runs(tmp_path, monkeypatch, capsys):
    letter = [
        "TGRPO --preset paper --learning-rate 1e-4", "TGRPO --learning-rate 1e-4", "TGRPO --preset paper",
        "TGRPO --stop group", "TGRPO --no-clip", "TGRPO --update-every step",
    ]  # fmt: skip
    known = [line(method, 4, 1, 30) for method in ("TGRPO", "TGRPO --alphas auto", "TGRPO --group-by stage")]
    reproduce.write_csv(tmp_path / "runs.csv", pd.DataFrame(known))
    played = []
    monkeypatch.setattr(reproduce, "play", lambda *each: played.append(each[:3]))
    monkeypatch.setattr(reproduce, "read_run", lambda *each: no_curves(*each[:3], 20))
    reproduce.main(reproduce.Args(results=tmp_path, out=tmp_path, questions=True, task_ids=(4,), seeds=(1,)))
    returns = ["TGRPO --return-mode sum", "TGRPO --return-mode mean"]
    flow = ["ConRFT", "TGRPO --policy flow"]
    methods_played = [each[0] for each in played]  # the paper's alphas are the default
    assert methods_played == ["GRPO", *returns, "GRPO --credit stage", *methods.VARIANTS, *flow, *letter]
    row = "| TGRPO --preset paper against TGRPO | -20 (1) | -20.0 | 1 |"
    assert row in capsys.readouterr().out and row in (tmp_path / "results.md").read_text()


def test_curves_are_of_the_runs_that_all_methods_have(tmp_path, monkeypatch):
    def curve(method, task_id, seed, value):
        which = {"method": method, "task_id": task_id, "seed": seed}
        return [which | {"tag": tag, "env_steps": step, "value": value}
                for tag in results_page.CURVES for step in (0, 100)]  # fmt: skip

    monkeypatch.setattr(results_page.plt, "close", lambda figure: figures.append(figure))
    figures: list = []
    points = curve("GRPO", 0, 1, 0.9) + curve("GRPO", 4, 1, 0.5) + curve("PPO", 4, 1, 0.4)
    results_page.draw_curves(pd.DataFrame(points), ["PPO", "GRPO", "TGRPO"], tmp_path / "curves.png")
    (figure,) = figures
    assert all(axis.get_title().endswith("task/seed 4/1") for axis in figure.axes)
    assert [(line.get_label(), *line.get_ydata()[:1]) for line in figure.axes[0].lines] == [
        ("PPO", 0.4), ("GRPO", 0.5)]  # fmt: skip
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_heat_map_is_of_one_task(tmp_path, monkeypatch):
    monkeypatch.setattr(results_page.plt, "close", lambda figure: figures.append(figure))
    figures: list = []
    lines = [line("TGRPO 3/7", 4, 1, 30), line("TGRPO 3/7", 4, 2, 40), line("TGRPO 3/7", 7, 1, 5)]
    lines += [
        line("TGRPO", 4, 1, 25),
        line("TGRPO", 4, 2, 20),
        line("TGRPO", 4, 3, 50),
        line("TGRPO", 0, 1, 9),
    ]
    results_page.draw(pd.DataFrame(lines), pd.DataFrame(columns=reproduce.POINT), tmp_path)
    assert {path.name for path in tmp_path.glob("heat*")} == {"heat_map_4.png", "heat_map_7.png"}
    cells = [[text.get_text() for text in figure.axes[0].texts] for figure in figures]
    assert cells == [["45 %", "70 %"], ["10 %"]]  # 0.3/0.7 is TGRPO's, of the seeds that both have
    assert [figure.axes[0].get_title() for figure in figures] == ["task 4, seed 1, 2", "task 7, seed 1"]


def test_a_heat_map_runs_what_it_lacks(tmp_path, monkeypatch):
    known = [line(method, 4, 1, 30) for method in ("TGRPO", "TGRPO without the step term", "TGRPO 3/7")]
    reproduce.write_csv(tmp_path / "runs.csv", pd.DataFrame(known))
    played = []
    monkeypatch.setattr(reproduce, "play", lambda *each: played.append(each[:3]))
    monkeypatch.setattr(reproduce, "read_run", lambda *each: no_curves(*each[:3], 20))
    reproduce.main(reproduce.Args(results=tmp_path, out=tmp_path, heat_map=4, seeds=(1,), jobs=1))
    assert played == [(f"TGRPO {alphas}", 4, 1) for alphas in ("0/7", "0.3/0", "0.3/7", "3/0", "3/0.7")]


def test_csv(tmp_path):
    """Files that an older program has written stay readable, and what is read is written the same."""
    lines = [line("GRPO", 4, 1, 8), line("PPO", 4, 2, 7) | {"sampled_before": "", "commit": "0012345"}]
    head, *rows = reproduce.RUN, *(map(str, each.values()) for each in lines)
    text = "".join(",".join(row) + "\n" for row in (head, *rows))
    (tmp_path / "runs.csv").write_text(text)
    runs = reproduce.read_csv(tmp_path / "runs.csv", reproduce.RUN)
    assert list(runs["commit"]) == ["abc", "0012345"] and runs["sampled_before"].isna().tolist() == [0, 1]
    reproduce.write_csv(tmp_path / "runs.csv", runs.iloc[::-1])
    assert (tmp_path / "runs.csv").read_text() == text
    assert list(reproduce.read_csv(tmp_path / "nothing.csv", reproduce.RUN)) == reproduce.RUN


@pytest.mark.parametrize("name", ["runs", "curves"])
def test_published_csv_files_are_written_as_they_are_read(name, tmp_path):
    (file,) = (ROOT / "benchmarks" / "results" / "LiberoObject").glob(f"{name}.csv")
    reproduce.write_csv(tmp_path / "again.csv", reproduce.read_csv(file, []))
    assert (tmp_path / "again.csv").read_bytes() == file.read_bytes()


def test_the_page_is_that_of_the_published_runs(tmp_path, monkeypatch):
    """``python benchmarks/reproduce.py --no-run`` writes the committed page and its figures."""
    monkeypatch.setattr(reproduce, "DOCS", tmp_path)
    reproduce.main(reproduce.Args(run=False))
    text = (tmp_path / "results.md").read_text()
    assert text == (ROOT / "docs" / "results.md").read_text()
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert links and all((ROOT / "docs" / link).is_file() for link in links)


def test_the_page_on_robust_training(tmp_path, monkeypatch):
    """Pooled successes, and differences over pairs; the committed page is that of the committed rows."""
    won = {robust_training.START: 1, robust_training.PLAIN: 2, robust_training.PERTURBED: 4}
    rows = [
        (policy, 4, seed, axis, level, won[policy] + (seed == 2), 5, "abc")
        for policy in won for seed in (1, 2)
        for axis, level in (("plain", 0), *((axis, k) for axis in perturbations.DRAWS for k in range(1, 6)))
    ]  # fmt: skip
    results = pd.DataFrame(rows, columns=robust_training.ROWS)
    (line,) = (line for line in robust_training.summary(results).splitlines() if "| camera |" in line)
    cells = [cell.strip() for cell in line[1:-1].split("|")]
    assert cells[1].startswith("30 (") and cells[3].startswith("90 (") and cells[4] == "+40"
    for name in ("PAGE", "FIGURE"):
        monkeypatch.setattr(robust_training, name, tmp_path / getattr(robust_training, name).name)
    robust_training.main(robust_training.Args(run=False))
    text = (tmp_path / "robust-training.md").read_text()
    assert text == (ROOT / "docs" / "robust-training.md").read_text()
    assert (ROOT / "docs" / "results" / "robust_training.png").is_file()


def test_it_runs_what_is_missing_and_nothing_twice(tmp_path, monkeypatch, capsys):
    tiny = ("--num-groups 1 --group-size 2 --eval-episodes 2 --max-episode-steps 8 --num-iterations 1"
            " --minibatch-size 2 --eval-every 0").split()  # fmt: skip
    monkeypatch.setattr(methods, "METHODS", {"TGRPO": ["tgrpo_vla.py", *tiny]})
    args = reproduce.Args(
        results=tmp_path / "results", out=tmp_path / "runs", methods=("TGRPO",), task_ids=(4,), seeds=(3,),
        jobs=1, total_env_steps=1,
    )  # fmt: skip
    reproduce.main(args)
    assert "1 runs, 1 side by side" in capsys.readouterr().out
    assert {path.name for path in args.results.iterdir()} == {
        "runs.csv", "curves.csv", "results.md", "curves.png"}  # fmt: skip
    tags = list(reproduce.read_csv(args.results / "curves.csv", [])["tag"])
    assert set(tags) == set(reproduce.CURVES) and tags.count("charts/success_rate") == 2
    (made,) = reproduce.read_csv(args.results / "runs.csv", []).to_dict("records")
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


def test_one_policy_for_several_tasks(tmp_path, monkeypatch, capsys):
    """One run, with a row and a curve for each of its tasks; not made again, but for another task."""
    tiny = ("--num-groups 2 --group-size 2 --eval-episodes 2 --max-episode-steps 8 --num-iterations 1"
            " --minibatch-size 2 --eval-every 0").split()  # fmt: skip
    monkeypatch.setattr(methods, "METHODS", {"TGRPO": ["tgrpo_vla.py", *tiny]})
    args = reproduce.Args(
        results=tmp_path / "results", methods=("TGRPO",), task_ids=(4, 7), seeds=(3,), jobs=1,
        total_env_steps=2, one_policy=True,
    )  # fmt: skip
    reproduce.main(args)
    assert "1 runs, 1 side by side" in capsys.readouterr().out
    rows = reproduce.read_csv(args.results / "runs.csv", []).to_dict("records")
    assert [(row["method"], row["task_id"], row["trials"]) for row in rows] == [
        ("TGRPO, one policy", task_id, 2) for task_id in (4, 7)]  # fmt: skip
    curves = reproduce.read_csv(args.results / "curves.csv", [])
    assert list(zip(curves["task_id"], curves["tag"])) == [(k, results_page.SUCCESS) for k in (4, 4, 7, 7)]
    assert "`python tgrpo_vla.py --num-groups 2" in (args.results / "results.md").read_text()
    known = reproduce.read_csv(args.results / "runs.csv", [])
    assert reproduce.missing(args, known) == []
    args = reproduce.dataclasses.replace(args, task_ids=(4, 7, 9))
    assert reproduce.missing(args, known) == [("TGRPO, one policy", "all", 3)]
    assert reproduce.steps_of("all", reproduce.Args(task_ids=(4, 7, 9))) == 180_000
    folder = reproduce.folder_of("GRPO, one policy", "all", 3, reproduce.fill_in_folders(args))
    assert folder.name == "grpo__one_policy__4-7-9__3"
    again = reproduce.added(known, known.assign(after=1))
    assert list(again["after"]) == [1, 1] and len(reproduce.added(known[:1], known[1:])) == 2
    with pytest.raises(ValueError, match=r"task_ids are \(4,\); with --one-policy expected at least two"):
        reproduce.main(reproduce.dataclasses.replace(args, task_ids=(4,)))
    with pytest.raises(ValueError, match="one_policy is of all tasks with the same flags"):
        reproduce.main(reproduce.dataclasses.replace(args, heat_map=4, methods=()))


def test_other_results_have_runs_of_their_own(tmp_path):
    own, other = map(reproduce.fill_in_folders, (reproduce.Args(), reproduce.Args(results=tmp_path)))
    assert reproduce.folder_of("GRPO", 4, 1, own) == Path("runs/reproduce/LiberoObject/grpo__4__1")
    assert reproduce.folder_of("GRPO", 4, 1, other) == tmp_path / "runs" / "grpo__4__1"


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "METHODS", {"TGRPO": ["tgrpo_vla.py", "--group-size", "1"]})
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
        ({"suite": "LiberoObjects"}, "did you mean 'LiberoObject'"),
    ],
)
def test_a_heat_map_of_nothing(given, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        reproduce.main(reproduce.Args(results=tmp_path / "results", **given))
    assert not (tmp_path / "results").exists()


def test_the_interquartile_mean_and_who_is_better():
    """By hand: of eight sorted values the middle four; of four pairs two are won, and one is a tie."""
    assert results_page.iqm(np.array([0.0, 1, 2, 3]), np.array([4.0, 5, 6, 100])) == 3.5
    one, other = np.array([1.0, 3.0]), np.array([1.0, 2.0])
    assert results_page.share_better(one, other) == 0.625
    many = results_page.share_better(np.stack([one, other]), np.stack([other, one]))
    assert many.tolist() == [0.625, 0.375]
    words = results_page.estimate(results_page.share_better, [one, one, other - 9, other + 9], "{:.2f}")
    assert words == "0.50 (0.50 to 0.50)"  # always better on one task, never on the other


def test_cloning_alone_has_a_table():
    """Its rows do not say what the start was."""
    alone = pd.DataFrame([line("SFT", 4, 1, 40) | {"before": None}])
    assert list(table_of(results_page.table(alone, ["SFT"]))) == ["task 4", "IQM"]
