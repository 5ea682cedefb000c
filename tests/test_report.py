"""``python -m vla_envs.report``: what the page holds of runs finished and stopped, and what is left out."""

import re
import runpy
import shutil
import signal
import sys
from html.parser import HTMLParser

import pytest
from artifacts import ROOT, words_of
from torch.utils.tensorboard import SummaryWriter

from vla_envs import report, rewards
from vla_envs.training import evaluation, runs

TINY = {
    "num_iterations": 2, "eval_every": 1, "eval_episodes": 2, "max_episode_steps": 24, "num_threads": 1,
    "num_groups": 1, "group_size": 2, "minibatch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``finished``, a TGRPO run, and ``stopped``, a PPO run that has not come to its end."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "nearer.py").write_text("def nearer(facts):\n    return -facts['gripper_to_object']\n")

    def run(script, name, **flags):
        flags = TINY | {"run_dir": folder / name, "reward": f"{folder / 'nearer.py'}:nearer"} | flags
        patch.setattr(sys, "argv", [script, *words_of(flags)])
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")

    interrupts = signal.getsignal(signal.SIGINT)  # which the scripts take over
    with pytest.MonkeyPatch.context() as patch:
        run("tgrpo_vla", "finished", alpha1=0.2, alpha2=0.6)
        patch.setattr(runs.Run, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("ppo_vla", "stopped", task_id=7, seed=3)
    signal.signal(signal.SIGINT, interrupts)
    return folder


class Checked(HTMLParser):
    """Elements close in the order in which they were opened; ids and links are collected."""

    def __init__(self, text):
        super().__init__()
        self.opened, self.ids, self.links, self.count, self.text = [], [], [], {}, ""
        self.feed(text)
        self.close()
        assert not self.opened

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "br"):
            self.opened.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag

    def handle_data(self, data):
        self.text += data if self.opened[-1:] != ["style"] else ""


def write(monkeypatch, capsys, *words):
    """Run the program; what it prints and complains of."""
    monkeypatch.setattr(sys, "argv", ["report", *map(str, words)])
    report.run()
    return capsys.readouterr()


def test_the_page(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder / "finished", folder / '_a <b> & "c" $x$')
    named = [folder / "finished", folder / "stopped", folder / '_a <b> & "c" $x$']
    out = tmp_path / "page.html"
    printed = write(monkeypatch, capsys, *named, folder / "nearer.py", folder, "--out", out)
    assert "3 runs" in printed.out
    assert printed.err.count("\n") == printed.err.count("it has no args.json") == 2
    text = out.read_text()
    page = Checked(text)
    assert len(page.ids) == len(set(page.ids)) > 0
    assert {link[1:] for link in page.links if link[0] == "#"} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    videos = [link for link in page.links if link[0] != "#"]
    assert len(videos) == 6 and all(link.startswith("data:video/mp4;base64,") for link in videos)
    assert set(re.findall(r"https?://[^\"' ]*", text)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",
    }  # fmt: skip
    assert "<b>" not in text and '_a <b> & "c" $x$' in page.text
    assert page.count["tr"] == 4 and page.count["video"] == 6 and page.count["svg"] == 9 + 3 * 2
    for words in (
        "tgrpo_vla", "ppo_vla", "LiberoObject", "0/2", "0 to 66 %", "deterministic", "sampled",
        "finished", "iteration 2", "kl_coef", "1 tgrpo_vla, seed 1", "2 ppo_vla, seed 3",
        "Success, deterministic", "Success, sampled", "success (%)", "environment steps",
        "Success of the training episodes", "Groups", "all members alike", "entropy (nats per token)",
        "KL (nats)", "clipped from above", "step term", "explained variance", "Stages", "approaching",
        "seconds per iteration", "physics", "update",
    ):  # fmt: skip
        assert words in page.text, words
    rows = re.findall(r"<tr>.*?</tr>", text)
    assert all(row.count("<small") == row.count("</small>") >= 4 and "<br" not in row for row in rows[1:])
    assert "gamma" not in "".join(rows) and "task_id" not in "".join(rows)  # not shared, or in its own column
    assert "value_clip" in text and "num_iterations 2" not in "".join(rows)


def test_the_command_is_shown_and_the_other_arguments_are_folded_away(folder, tmp_path):
    run = report.read_run(folder / "finished")
    run.args["command"] = "python tgrpo_vla.py --alpha1 0.2 --reward 'a & b'"
    text = report.page([run], tmp_path / "page.html")
    command, folded = text.index("<pre>python tgrpo_vla.py --alpha1 0.2"), text.index("<details>")
    assert command < folded < text.index("update_epochs: ") < text.index("</details>")
    assert "a &amp; b" in text and text.count("python tgrpo_vla.py") == 1


def test_several_tasks_have_their_own_table(folder, tmp_path):
    run = report.read_run(folder / "finished")
    each = {str(k): evaluation.success([k > 4, True]) for k in (4, 7)}
    run.args["task_ids"], run.state["success_after"] = [4, 7], evaluation.success([0, 1, 1, 1], (4, 7))
    assert run.tasks == {k: {"success_after": its} for k, its in each.items()}
    page = Checked(report.page([run], tmp_path / "page.html"))
    assert "tasks 4 7" in page.text and page.count["table"] == 2


def test_what_was_logged(folder):
    """Two members whose rewards always differ have scores of plus and minus 0.707; they end together."""
    run = report.read_run(folder / "finished")
    for name, alpha in {"step": 0.2, "trajectory": 0.6}.items():
        steps, values = run.scalars[f"advantage/{name}_abs"]
        assert steps.tolist() == [48, 96] and values == pytest.approx(alpha * 0.5**0.5, abs=1e-5)
    for each in (run, report.read_run(folder / "stopped")):
        shares = [series[1] for tag, series in each.scalars.items() if tag.startswith("stages/")]
        assert sum(shares) == pytest.approx(1.0, abs=1e-6) and shares[0].any()


def test_evaluations_have_their_intervals(folder):
    run = report.read_run(folder / "finished")
    for tag, way in zip(report.EVALUATED, ("success", "sampled")):
        found = run.evaluations(tag)
        assert [its["step"] for its in found] == [0, 48, 96]
        assert found[0] == {"step": 0, **run.state[f"{way}_before"]}
        assert found[-1] == {"step": 96, **run.state[f"{way}_after"]}


def test_times_add_up(folder):
    run = report.read_run(folder / "finished")
    times = report.times_of(run)
    assert list(times) == ["physics", "render", "policy", "update", "other"]
    total = sum(series[1] for series in times.values())
    whole = run.scalars["time/rollout_s"][1] + run.scalars["time/update_s"][1]
    assert total == pytest.approx(whole, rel=1e-4)


def test_stages_are_in_order(folder):
    run = report.read_run(folder / "finished")
    names = [tag[7:].replace("_", " ") for tag in run.scalars if tag.startswith("stages/")]
    assert names == list(rewards.STAGES)
    assert set(report.stages_of(run)) < set(run.scalars) | {"far", "approaching", "ready_to_grasp"}
    run.scalars["stages/far"][1] = 0
    assert "far" not in report.stages_of(run)


def test_a_resumed_run_that_has_logged_nothing_again(folder, tmp_path):
    """TensorBoard then has the names of what is void, and nothing else of it."""
    shutil.copytree(folder / "finished", tmp_path / "run")
    SummaryWriter(str(tmp_path / "run"), purge_step=1).close()
    run = report.read_run(tmp_path / "run")
    assert set(run.scalars) == {"charts/success_rate", "charts/sampled_success_rate"}
    Checked(report.page([run], tmp_path / "page.html"))


def test_large_videos_are_linked(folder, tmp_path, monkeypatch, capsys):
    write(monkeypatch, capsys, folder / "stopped", "--out", tmp_path / "a.html", "--embed-mb", 0)
    links = [link for link in Checked((tmp_path / "a.html").read_text()).links if link[0] != "#"]
    videos = {(tmp_path / link).resolve() for link in links}
    names = {f"iteration_000{k}_success.mp4" for k in (0, 2)}
    assert videos == {folder / "stopped" / "videos" / name for name in names}


def test_a_run_that_has_only_begun(folder, tmp_path):
    (tmp_path / "new").mkdir()
    shutil.copy(folder / "finished" / "args.json", tmp_path / "new")
    page = Checked(report.page([report.read_run(tmp_path / "new")], tmp_path / "page.html"))
    assert "iteration 0" in page.text and "svg" not in page.count


@pytest.mark.parametrize(
    ("file", "contents", "words"),
    [
        ("args.json", "{", "args.json' is damaged"),
        ("args.json", "[1]", "args.json' is damaged"),
        ("args.json", '{"seed": 1}', "has no eval_episodes"),
        ("args.json", '{"seed": 1, "suite": "x", "task_id": 4, "eval_episodes": null}', "eval_episodes None"),
        ("result.json", "", "result.json' is damaged"),
        ("result.json", '{"success_after": 3}', "success_after is not the result"),
        ("result.json", '{"success_before": {"rate": 0.5}}', "success_before is not the result"),
        ("result.json", '{"sampled_after": null}', "sampled_after is not the result"),
        ("result.json", '{"before": 3}', "success_before is not the result"),
        ("result.json", '{"after": {"sampled": 3}}', "sampled_after is not the result"),
        ("result.json", '{"sampled": "0/2"}', "sampled_after is not the result"),
    ],
)
def test_damaged_runs(folder, tmp_path, monkeypatch, capsys, file, contents, words):
    shutil.copytree(folder / "finished", tmp_path / "run")
    (tmp_path / "run" / file).write_text(contents)
    with pytest.raises(SystemExit) as exit_:
        write(monkeypatch, capsys, tmp_path / "run", "--out", tmp_path / "page.html")
    error = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and len(error) == 2 and not (tmp_path / "page.html").exists()
    assert error[0].startswith("left out: ") and words in error[0]
    assert error[1] == "error: no run was given; expected folders of runs, runs/*"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"out": "/no/such/folder/page.html"}, "a folder that exists"),
        ({"out": "/"}, "a file in a folder that exists"),
        ({"embed_mb": "nan"}, "embed_mb is nan"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, flags, words):
    with pytest.raises(SystemExit) as exit_:
        write(monkeypatch, capsys, folder / "finished", *words_of(flags))
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error:") and error.count("\n") == 1 and words in error


def test_arguments_that_differ(folder):
    both = [report.read_run(folder / name) for name in ("finished", "stopped")]
    assert report.differing(both) == ["learning_rate"]
