"""What the README and the pages show runs as typed, in order; the README's numbers are those of the runs."""

import csv
import json
import re
import runpy
import shlex
import sys

import pytest
import tiny_openvla
import tiny_smolvla
import torch
from artifacts import ROOT, words_of, write_demos
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vla_envs.policies import adapters, load_policy, save_policy

SCRIPTS = ("tgrpo_vla.py", "grpo_vla.py", "ppo_vla.py", "sft_vla.py")
# Pages whose blocks are typed one after another; the others need several GPUs, or have a test of their own.
PAGES = (
    "quickstart", "environments", "rewards", "tgrpo", "grpo", "ppo", "sft", "runs", "evaluation", "adapters",
    "policies", "smolvla",
)  # fmt: skip
TINY = {
    "num_groups": 2, "group_size": 2, "num_iterations": 1, "eval_episodes": 1, "eval_every": 0,
    "max_episode_steps": 16, "num_threads": 1, "minibatch_size": 4,
}  # fmt: skip
# What the machine has, or a test of its own runs.
ELSEWHERE = ("apt-get", "pip", "export", "tensorboard", "python benchmarks/")


def blocks(path):
    """Language and text of the fenced blocks of a page, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def lines_of(text):
    """The commands of a block, as words, without what they set in the environment."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words and not " ".join(words).startswith(ELSEWHERE):
            yield words


def small(script, words):
    """Flags that make a command of a script short."""
    if "--resume" in words:
        return {}
    if "--evaluate" in words:
        protocol = {} if "--protocol" in words else {"max_episode_steps": 16}
        flags = {"eval_episodes": 1, "num_threads": 1} | protocol
    elif script == "sft_vla.py":
        several = "--episodes" in words and "--task-ids" in words  # a number for each
        flags = {
            name: TINY[name] for name in ("eval_episodes", "eval_every", "max_episode_steps", "num_threads")
        }
        flags |= {"num_iterations": 1, "iteration_steps": 1, "episodes": (2,) * 10 if several else 2}
    else:
        flags = TINY | ({"num_groups": 10} if "9" in words else {})
    large = {"device": "cpu"} | ({"lora_rank": 2} if "lora" in words else {})
    large |= {"micro_batch_size": 2} if "--micro-batch-size" in words else {}
    return flags | (large if {"openvla", "smolvla"} & set(words) else {})


def execute(words, monkeypatch, instead=()):
    """Run a command in this process; words of it that stand in ``instead`` are replaced."""
    torch.manual_seed(0)
    program, *rest = words[1:]
    if program == "-m":
        program, *rest = rest
    if program in SCRIPTS:
        rest = [*rest, *words_of(small(program, rest))]
    if program == "vla_envs.experts":
        rest += (
            ["--episodes", "2", "--task-ids", "0", "4"]
            if "LiberoObject" in str(rest)
            else ["--episodes", "2"]
        )
    rest = [dict(instead).get(word, word) for word in rest]
    monkeypatch.setattr(sys, "argv", [program, *rest])
    try:
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as exit_:
        return exit_.code or 0
    return 0


def tags_of(run):
    events = EventAccumulator(str(run))
    events.Reload()
    return set(events.Tags()["scalars"])


def undocumented(tags, *pages):
    text = "".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in pages)
    return {
        tag
        for tag in tags
        if f"`{tag}`" not in text and not tag.startswith("stages/") and "_task_" not in tag
    }


def test_the_readmes_blocks_one_after_another(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")  # which one of them installs
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, text in blocks(ROOT / "README.md"):
        if language == "bash":
            for words in lines_of(text):
                assert execute(words, monkeypatch) == 0, words
        elif language == "python":
            exec(text, names)
    assert names["obs"]["image"].shape == (8, 128, 128, 3) and not names["done"].any()
    names["envs"].close()
    assert json.loads((tmp_path / "runs/first/result.json").read_text())["env_steps"] > 0
    assert "runs/first" in (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = tags_of(tmp_path / "runs/first")
    assert len(tags) > 20 and not undocumented(tags, "runs", "tgrpo")


@pytest.fixture
def material(tmp_path, monkeypatch):
    """What the pages take for granted, small, in the folder in which their blocks run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text("def reward(facts):\n    return -facts['gripper_to_object']\n")
    policy = adapters.make_trainable(load_policy("nano"), "lora", rank=2)
    for name in "ab":
        adapters.save_adapter(policy, tmp_path / "runs" / name / "checkpoints" / "adapter")
    save_policy(load_policy("nano"), "nano", tmp_path / "runs/second/checkpoints/final")
    return {
        "openvla/openvla-7b-finetuned-libero-object": str(tiny_openvla.write_tiny(tmp_path / "openvla")),
        "HuggingFaceVLA/smolvla_libero": str(tiny_smolvla.write_tiny(tmp_path / "smolvla")),
        "libero": "builtin",  # the assets, which are not everywhere
    }


@pytest.mark.slow
def test_the_pages_blocks_one_after_another(material, tmp_path, monkeypatch):
    ran, names = 0, {}
    for page in PAGES:
        for language, text in blocks(ROOT / "docs" / f"{page}.md"):
            if language == "python":
                exec(text, names)
            for words in lines_of(text) if language == "bash" else ():
                if words[:3] == ["python", "-m", "vla_envs.experts"]:  # has a test of its own
                    suite = "LiberoSpatial" if "LiberoSpatial" in words else "LiberoObject"
                    (tmp_path / "demos").mkdir(exist_ok=True)
                    for k in range(10):
                        write_demos(tmp_path / "demos" / f"{suite}_{k}_demo.hdf5", (5, 5, 5), size=128)
                    continue
                status = execute(words, monkeypatch, material)
                assert status == ("--check" in words), words  # the reward's check finds what is wrong with it
                ran += 1
    assert ran > 25
    for script in SCRIPTS:
        name = script.removesuffix(".py")
        runs = list((tmp_path / "runs").glob(f"*__{name}__*"))
        assert runs
        page = name.removesuffix("_vla")
        assert not set().union(*(undocumented(tags_of(run), "runs", page) for run in runs))


# ---- Numbers -----------------------------------------------------------------------------------------

RESULTS = ROOT / "benchmarks" / "results" / "LiberoObject"


def read(name):
    with open(RESULTS / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def values(runs, name):
    return [int(run[name]) for run in runs]


def told(text):
    """README with every run of blanks as one."""
    assert text in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split()), text


def of_task_4():
    """The runs of the three methods on task 4, five seeds each."""
    runs = [
        run for run in read("runs.csv") if run["method"] in ("PPO", "GRPO", "TGRPO") and run["task_id"] == "4"
    ]
    assert sorted((run["method"], run["seed"]) for run in runs) == [
        (method, str(seed)) for method in ("GRPO", "PPO", "TGRPO") for seed in range(1, 6)
    ]
    return runs


def test_the_readmes_successes_are_those_of_the_runs():
    runs = of_task_4()
    (before,) = set(values(runs, "before"))
    after, low, high = values(runs, "after"), values(runs, "sampled_before"), values(runs, "sampled_after")
    told(f"from {before} to between {min(after)} and {max(after)} of the 50 recorded init states")
    told(f"from between {min(low)} and {max(low)} to between {min(high)} and {max(high)}.")


def test_the_readmes_steps_are_those_of_the_runs():
    """Control steps at the first evaluation with a success of 90 % or more."""
    runs = {(run["method"], run["task_id"], run["seed"]) for run in of_task_4()}
    first: dict = {}
    for point in read("curves.csv"):
        key = (point["method"], point["task_id"], point["seed"])
        if key in runs and point["tag"] == "charts/success_rate" and float(point["value"]) >= 0.9:
            first[key] = min(first.get(key, float("inf")), int(point["env_steps"]))
    assert first.keys() == runs
    told(f"All fifteen runs are at 90 % or more by {-(-max(first.values()) // 1000):,},000 control steps")


def test_the_readmes_rivals_are_those_of_the_runs():
    runs = [run for run in read("runs.csv") if run["task_id"] == "4"]
    said = []
    for names in (("Filtered cloning", "iRe-VLA"), ("GRAPE", "DPO")):
        ends = values([run for run in runs if run["method"] in names], "after")
        assert len(ends) == 6
        said.append(f"between {min(ends)} and {max(ends)}")
    told(f"filtered cloning and iRe-VLA end {said[0]}, GRAPE and DPO {said[1]}.")


def test_the_readmes_ten_tasks_are_those_of_the_runs():
    runs = [run for run in read("runs.csv") if run["method"] == "TGRPO" and run["seed"] == "1"]
    assert sorted(values(runs, "task_id")) == list(range(10))
    told(f"from {sum(values(runs, 'before'))} to {sum(values(runs, 'after'))} of 500.")


def test_the_readmes_task_7_is_that_of_the_runs():
    runs = {run["method"]: run for run in read("runs.csv") if run["task_id"] == "7"}
    ours, papers = runs["TGRPO"], runs["TGRPO with the paper's alphas"]
    assert ours["before"] == papers["before"]
    told(
        f"falls from {ours['before']} to {papers['after']} where our defaults end at {ours['after']}"
        " (one seed each)."
    )
