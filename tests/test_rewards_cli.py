"""``python -m vla_envs.rewards``: the prompt, and the check of a reward function."""

import subprocess
import sys

import h5py
import numpy as np
import pytest

from vla_envs import experts
from vla_envs.goals import FACTS
from vla_envs.rewards import __main__, binary, multi_stage
from vla_envs.rewards.__main__ import Args, main
from vla_envs.rewards.check import check, validate_plot
from vla_envs.rewards.episodes import collect
from vla_envs.rewards.prompt import goal_in_words, prompt
from vla_envs.tasks import SUITES, get_task, num_tasks, recorded_init_states

KETCHUP = get_task("LiberoObject", 4)


# ---- The prompt --------------------------------------------------------------------------------------


def test_the_prompt_names_the_task_and_every_fact():
    command = [sys.executable, "-m", "vla_envs.rewards", "--task-id", "4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""  # no warning that the module runs twice
    assert "pick up the ketchup and place it in the basket" in done.stdout
    assert "1. ketchup 1 is in basket 1 contain region" in done.stdout
    assert all(name in done.stdout and meaning in done.stdout for name, meaning in FACTS.items())
    assert all(
        words in done.stdout for words in ("def reward(facts)", "--reward my_reward.py:reward", "metres")
    )


def test_goals_in_words():
    assert goal_in_words(get_task("LiberoGoal", 0)) == ["wooden cabinet 1 middle region is open"]
    both = get_task("Libero10", 3)
    assert goal_in_words(both) == [
        "akita black bowl 1 is in white cabinet 1 bottom region", "white cabinet 1 bottom region is closed"
    ]  # fmt: skip
    assert "goals_met" in prompt(both).partition("Rules")[2] not in prompt(KETCHUP)
    tasks = [get_task(suite, k) for suite in SUITES for k in range(num_tasks(suite))]
    predicates = [task.bddl_file.read_text().partition("(:goal")[2].count("(") - 1 for task in tasks]
    assert [len(goal_in_words(task)) for task in tasks] == predicates


# ---- The rules ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def episodes():
    return collect(KETCHUP, episodes=2)


def broken(reward, episodes):
    return {rule.name for rule in check(reward, episodes)[0] if rule.kept is False}


def own_stages(facts, pay=(-5.0, -1.0, 1.0, 4.0, 20.0)):
    """Thresholds and stages of its own, -1 to 3."""
    up = (facts["object_height"] > 0.05) & (facts["touching"] > 0)
    conditions = [
        facts["success"] > 0,
        up,
        facts["object_peak_height"] > 0.05,
        facts["gripper_to_object"] < 0.1,
    ]
    stage = np.select(conditions, [3, 2, -1, 1], 0)
    return np.array(pay)[stage + 1], stage


def test_the_episodes(episodes):
    """Two of each kind; a drop follows its demonstration until the hand opens."""
    assert {kind: len(those) for kind, those in episodes.items()} == {
        "demonstrations": 2, "drops": 2, "random episodes": 2
    }  # fmt: skip
    for demo, drop in zip(episodes["demonstrations"], episodes["drops"], strict=True):
        assert demo["success"].tolist() == [0] * (len(demo["success"]) - 1) + [1]
        assert drop["object_peak_height"][-1] > 0.1 and drop["object_height"][-1] < 0.05
        assert not drop["success"].any()
        t = int(np.argmax(drop["object_peak_height"] > 0.1))
        assert all(np.array_equal(demo[name][: t + 1], drop[name][: t + 1]) for name in FACTS)


@pytest.mark.parametrize("reward", [multi_stage, own_stages, lambda facts: 3 * multi_stage(facts)[0] + 1])
def test_good_rewards_keep_every_rule(reward, episodes):
    rules, seen = check(reward, episodes)
    assert all(rule.kept for rule in rules) and len(rules) == 9
    assert seen.own == (reward is own_stages)


def test_binary_is_sparse(episodes):
    assert broken(binary, episodes) == {"rises with the stages", "a drop below far"}
    (rising,) = [rule for rule in check(binary, episodes)[0] if rule.name == "rises with the stages"]
    assert "sparse" in rising.evidence and "far -> approaching pays 0 -> 0" in rising.evidence


def changing(facts):
    facts["object_height"] += 1.0
    return own_stages(facts | {"object_height": facts["object_height"] - 1.0})


class Remembering:
    calls = 0

    def __call__(self, facts):
        self.calls += 1
        return multi_stage(facts)[0] * self.calls


FINITE = "finite numbers, one per environment"
BAD = {
    "constant within a stage": lambda facts: multi_stage(facts)[0] - facts["gripper_to_object"] / 10,
    "rises with the stages": lambda facts: own_stages(facts, pay=(-5.0, -1.0, 4.0, 1.0, 20.0)),
    "success far above": lambda facts: own_stages(facts, pay=(-5.0, -1.0, 1.0, 4.0, 5.0)),
    "finishing pays more than dawdling": lambda facts: own_stages(facts, pay=(-5.0, -1.0, 1.0, 4.0, 4.0)),
    "a drop below far": lambda facts: own_stages(facts, pay=(0.0, -1.0, 1.0, 4.0, 20.0)),
    "demonstrations above random": lambda facts: tuple(-x for x in own_stages(facts)),
    "leaves the facts alone": changing,
    "same facts, same reward": Remembering(),
}


@pytest.mark.parametrize("rule", BAD)
def test_bad_rewards_break_the_rule(rule, episodes):
    assert rule in broken(BAD[rule], episodes)


def test_the_evidence_is_a_step(episodes):
    """The first at which the stage rises and the reward falls."""
    (rule,) = [
        r for r in check(BAD["rises with the stages"], episodes)[0] if r.name == "rises with the stages"
    ]
    demo = episodes["demonstrations"][0]
    t = int(np.argmax(own_stages(demo)[1] == 2))
    assert rule.evidence == f"stage 1 -> stage 2 pays 4 -> 1 at demonstrations 0, step {t}"


def test_dawdling_that_pays_more(episodes):
    """Success pays 2, being up 4: who stays up from its first step on earns most in the 200 of an episode."""
    pay = (-5.0, -1.0, 1.0, 4.0, 2.0)
    rules = {rule.name: rule for rule in check(lambda facts: own_stages(facts, pay), episodes)[0]}
    rule = rules["finishing pays more than dawdling"]
    worst = None
    for k, demo in enumerate(episodes["demonstrations"]):
        paid, stage = (values[1:] for values in own_stages(demo, pay))  # not of the reset
        totals = [sum(paid[: t + 1]) + paid[t] * (199 - t) for t in range(len(paid))]
        best = max(range(len(paid) - 1), key=totals.__getitem__)
        assert stage[best] == 2 and totals[-1] < totals[best]
        if worst is None or totals[-1] - totals[best] < worst[0]:
            where = f"'stage 2' at demonstrations {k}, step {best + 1}"
            words = f"{totals[-1]:.4g} in 200 steps, staying {where} {totals[best]:.4g}"
            worst = totals[-1] - totals[best], words
    assert (rule.kept, rule.evidence) == (False, worst[1])
    swapped = episodes | {"demonstrations": episodes["drops"], "drops": episodes["demonstrations"]}
    for those, verdict in ((episodes, True), (swapped, None)):  # of those that never succeed nothing is known
        assert {r.name: r.kept for r in check(multi_stage, those)[0]}[rule.name] is verdict


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda facts: np.where(facts["success"] > 0, np.nan, 1.0), "nan at demonstrations 0, step"),
        (lambda facts: 1.0, "expected finite numbers of shape"),
        (lambda facts: facts["nothing"], "KeyError: 'nothing'"),
        (lambda facts: [1.0] * 3, "expected finite numbers of shape"),
    ],
)
def test_no_numbers(reward, words, episodes):
    rules, seen = check(reward, episodes)
    assert [(rule.kept, rule.name) for rule in rules] == [(False, FINITE)] and seen is None
    assert words in rules[0].evidence and len(rules[0].evidence) < 220


# ---- Recorded demonstrations -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demos")
    experts.main(experts.Args(out=folder, task_ids=(4,), episodes=2, image_size=16, noise=0.0))
    return folder / "LiberoObject_4_demo.hdf5"


def same(one, other):
    return all(np.array_equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in FACTS)


def test_recorded_seeds_replay(recorded, episodes):
    """The expert's own episodes, without noise, are those that the check plays by default."""
    again = collect(KETCHUP, 8, file=recorded)
    assert all(same(again[kind], episodes[kind]) for kind in episodes)


def test_recorded_states(recorded, episodes, make_vec, tmp_path):
    """LIBERO's files: time, joint positions and velocities before each action."""
    path, envs = tmp_path / "libero.hdf5", make_vec(1).unwrapped
    data = envs.simulations[0].data
    with h5py.File(path, "w") as file, h5py.File(recorded) as source:
        actions = source["data/demo_0/actions"][:]
        envs.reset(seed=[int(source["data/demo_0"].attrs["seed"])])
        states = []
        for action in [*actions, None]:
            states.append(np.concatenate([[data.time], data.qpos, data.qvel]))
            if action is not None:
                envs.step(action[None])
        file["data/demo_0/actions"], file["data/demo_0/states"] = actions, np.array(states)
    played = collect(KETCHUP, 8, file=path)
    assert set(played) == {"demonstrations", "random episodes"}
    for name in FACTS:  # environments read distances as they were one substep earlier, 2 ms
        one, other = played["demonstrations"][0][name], episodes["demonstrations"][0][name]
        np.testing.assert_allclose(one, other, atol=5e-3, err_msg=name)
    rules = {rule.name: rule.kept for rule in check(multi_stage, played)[0]}
    assert rules.pop("a drop below far") is None and all(rules.values())


# ---- The command line --------------------------------------------------------------------------------


def test_the_report_and_the_plot(tmp_path, capsys):
    file, plot = tmp_path / "my_reward.py", tmp_path / "reward.png"
    file.write_text("from vla_envs.rewards import multi_stage as reward\n")
    assert main(Args(check=f"{file}:reward", episodes=1, plot=plot))
    report = capsys.readouterr().out
    assert report.count("\nok ") == 9 and len(report.splitlines()) < 24
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 5000


def test_the_exit_status(monkeypatch, episodes, capsys):
    monkeypatch.setattr(__main__, "collect", lambda *given: episodes)
    for reward, status in (("multi_stage", 0), ("binary", 1)):
        monkeypatch.setattr(sys, "argv", ["rewards", "--check", reward])
        with pytest.raises(SystemExit) as exit_:
            __main__.program()
        assert exit_.value.code == status
        assert ("FAIL" in capsys.readouterr().out) == bool(status)


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        validate_plot(tmp_path / "reward.png")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"check": "nowhere.py:reward"}, "does not exist"),
        ({"check": "{bad}:reward"}, "does not run: SyntaxError"),
        ({"check": "multistage"}, "did you mean 'multi_stage'"),
        ({"check": "multi_stage", "plot": "reward.txt"}, "ends in one of"),
        ({"check": "multi_stage", "plot": "nowhere/reward.png"}, "a file in a folder that exists"),
        ({"check": "multi_stage", "episodes": 0}, "episodes is 0"),
        ({"check": "multi_stage", "demonstrations": "nowhere.hdf5"}, "nowhere.hdf5' does not exist"),
        ({"check": "multi_stage", "demonstrations": "{bad}"}, "is not a whole HDF5 file"),
        ({"check": "multi_stage", "demonstrations": "{recorded}", "task_id": 3}, "expected pick_up_the_bbq"),
        (
            {"check": "multi_stage", "suite": "LiberoGoal", "task_id": 0},
            "expected --demonstrations FILE.hdf5",
        ),
        ({"plot": "reward.png"}, "--plot needs --check"),
        ({"episodes": 3}, "--episodes needs --check"),
        ({"suite": "Libero"}, "suite 'Libero' is unknown"),
        ({"task_id": 10}, "task_id 10 does not exist"),
    ],
)
def test_bad_input(args, words, recorded, tmp_path, monkeypatch, capsys):
    """One line and exit status 2, before anything is played."""
    bad = tmp_path / "bad.py"
    bad.write_text("def reward(facts:\n")
    flags = [
        str(part).format(bad=bad, recorded=recorded)
        for name, value in args.items()
        for part in (f"--{name.replace('_', '-')}", value)
    ]
    monkeypatch.setattr(sys, "argv", ["rewards", *flags])
    with pytest.raises(SystemExit) as exit_:
        __main__.program()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_files_with_nothing_to_replay(tmp_path):
    path = tmp_path / "demos.hdf5"
    with h5py.File(path, "w") as file:
        file["data/demo_0/actions"] = np.zeros((5, 7))
    with pytest.raises(ValueError, match="neither states nor seeds"):
        collect(KETCHUP, 1, file=path)
    width = recorded_init_states(KETCHUP).shape[1]
    with h5py.File(path, "a") as file:
        file["data/demo_0/states"] = np.zeros((5, width - 1))
    with pytest.raises(ValueError, match=rf"expected \(T, {width}\)"):
        collect(KETCHUP, 1, file=path)
    with h5py.File(path, "a") as file:
        del file["data/demo_0/states"]
        file["data/demo_0"].attrs["seed"] = 0
    with pytest.raises(ValueError, match=r"no demonstration of .* reaches the goal"):
        collect(KETCHUP, 1, file=path)


@pytest.mark.parametrize(
    ("part", "array", "words"),
    [
        ("actions", np.full((5, 7), np.nan), r"actions\[0, 0\] is nan; expected numbers from -1 to 1"),
        ("actions", np.zeros((0, 7)), "at least 1"),
        ("states", np.full((5, 40), np.inf), r"states\[0, 0\] is inf; expected finite numbers"),
        ("states", np.zeros((5, 40), int), "states is int64"),
    ],
)
def test_recorded_numbers_that_will_not_do(tmp_path, part, array, words):
    path = tmp_path / "demos.hdf5"
    with h5py.File(path, "w") as file:
        for name, whole in {"actions": np.zeros((5, 7)), "states": np.zeros((5, 40))}.items():
            file[f"data/demo_0/{name}"] = array if name == part else whole
    with pytest.raises(ValueError, match=words) as error:
        collect(KETCHUP, 1, file=path)
    assert f"demo_0 in {str(path)!r}" in str(error.value)
