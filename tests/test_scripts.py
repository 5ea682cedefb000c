"""The scripts as programs: what they leave and log, seeds, resuming, evaluation, mistakes."""

import ast
import ctypes.util
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import safetensors.torch
import torch
from artifacts import ROOT, words_of, write_demos
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sft_vla
from vla_envs.demos import demonstrations
from vla_envs.policies import SHIPPED, load_policy, new_policy
from vla_envs.policies.adapters import make_trainable, save_adapter
from vla_envs.tasks import get_task
from vla_envs.training import arguments, checkpoints, evaluation, runs
from vla_envs.vector import LiberoVectorEnv
from vla_envs.workers import LiberoWorkersEnv

ONLINE = ("tgrpo_vla", "grpo_vla", "ppo_vla", "tpo_vla")
SCRIPTS = (*ONLINE, "sft_vla")
every_script = pytest.mark.parametrize("script", SCRIPTS)
every_online_script = pytest.mark.parametrize("script", ONLINE)
#: For what the scripts share line by line, or have from ``vla_envs.training``: the others with ``-m slow``.
one_script, one_online_script = (
    pytest.mark.parametrize(
        "script", [first, *(pytest.param(script, marks=pytest.mark.slow) for script in others)]
    )
    for first, *others in (SCRIPTS, ONLINE)
)

TINY = {
    "num_iterations": 2, "eval_episodes": 2, "eval_every": 0, "max_episode_steps": 24, "num_threads": 1,
    "learning_rate": 0.01, "minibatch_size": 4,
}  # fmt: skip
FULL = {"num_iterations": 4, "eval_every": 2}  # of the run that others are compared with
STEPS = 2 * 24  # control steps of an iteration: two environments, none succeeds so soon
LENGTHS = {4: (9, 6, 5), 7: (7, 4)}  # of demonstrations, by task
SUCCESS = {"successes", "trials", "rate", "low", "high"}
WAYS = ("success", "sampled")  # of playing: deterministic and sampled
RESULT = {
    "suite", "task_id", "seed", "success_before", "success_after", "sampled_before", "sampled_after",
    "env_steps", "episodes", "wall_s", "protocol", "max_episode_steps",
}  # fmt: skip
ONLINE_TAGS = {
    "charts/success_rate", "charts/sampled_success_rate", "charts/episodic_return",
    "charts/episodic_length", "charts/SPS", "charts/learning_rate", "losses/policy_loss",
    "losses/entropy", "losses/approx_kl",
    "losses/clipfrac_low", "losses/clipfrac_high", "losses/ratio_first_minibatch", "losses/logprob_gap",
    "losses/optimizer_steps",
    "group/success_mean", "time/rollout_s", "time/update_s", "time/render_s", "time/physics_s",
    "stages/far",
}  # fmt: skip
TAGS = {
    "tgrpo_vla": ONLINE_TAGS
    | {"group/zero_std_frac", "group/kept_frac"}
    | {f"advantage/{name}" for name in ("step_abs", "trajectory_abs", "alpha1", "alpha2")},
    "grpo_vla": ONLINE_TAGS | {"group/zero_std_frac", "group/kept_frac"},
    "ppo_vla": ONLINE_TAGS | {"losses/value_loss", "losses/explained_variance"},
    "tpo_vla": {tag for tag in ONLINE_TAGS if "clipfrac" not in tag}
    | {f"losses/{name}" for name in ("accuracy", "margin", "chosen_logprob")}
    | {"group/kept_frac", "group/zero_std_frac"},
    "sft_vla": {
        "charts/success_rate",
        "charts/sampled_success_rate",
        "charts/learning_rate",
        "losses/nll",
        "losses/held_out_nll",
    },
}
FINAL = "checkpoints/final/model.safetensors"
TRAINED, OPTIMIZER = (f"checkpoints/latest/{name}.safetensors" for name in ("trained", "optimizer"))
LORA = {f"blocks.{i}.{layer}.weight" for i in range(3) for layer in ("qkv", "proj", "fc1", "fc2")}


# ---- Running a script --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Flags of each script: a reward that differs at every step, so that even two decisions teach something;
    demonstrations of random motion."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "nearer.py").write_text("def nearer(facts):\n    return -facts['gripper_to_object']\n")
    (folder / "demos").mkdir()
    for task_id, lengths in LENGTHS.items():
        write_demos(folder / "demos" / f"LiberoObject_{task_id}_demo.hdf5", lengths, size=128, seed=task_id)
    online = {"num_groups": 1, "group_size": 2, "reward": f"{folder / 'nearer.py'}:nearer"}
    return {
        "tgrpo_vla": online | {"alphas": "auto"},
        "grpo_vla": online | {"keep_low": 0, "keep_high": 1},
        "ppo_vla": online | {"critic_warmup": 1},
        "tpo_vla": online | {"score": "return", "keep_low": 0, "keep_high": 1},
        "sft_vla": {
            "demos": folder / "demos", "task_ids": (4, 7), "episodes": (2, 1), "iteration_steps": 3,
        },
    }  # fmt: skip


@pytest.fixture
def start(execute, own, tmp_path):
    """Run a script in this process with the flags of a tiny run; its folder."""

    def start(script, name="run", **flags):
        execute(script, **(TINY | own[script] | {"run_dir": tmp_path / name} | flags))
        return tmp_path / name

    return start


def process(script, folder, own, **flags):
    """A script started in a process of its own: copied alone into ``folder``, as people copy them."""
    shutil.copy(ROOT / f"{script}.py", folder)
    changes = flags.pop("environment", {})
    words = words_of(TINY | own[script] | {"run_dir": folder / "run"} | flags)
    return subprocess.Popen(
        [sys.executable, f"{script}.py", *words], cwd=folder, text=True,
        env={**os.environ, **changes}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def resume(execute):
    """Go on with the run in a folder; not in the second in which it stopped.

    TensorBoard orders event files by the second in their names.
    """

    def resume(script, run, **flags):
        stopped = max(int(file.name.split(".")[3]) for file in run.glob("events.*"))
        while int(time.time()) <= stopped:
            time.sleep(0.02)
        execute(script, resume=run, **flags)

    return resume


@pytest.fixture(scope="module")
def finished(tmp_path_factory, own):
    """A function of the script: the folder of a whole run; all by one process, as its start takes seconds."""
    folder = tmp_path_factory.mktemp("finished")
    lines = [
        [str(ROOT / f"{script}.py"), *words_of(TINY | FULL | own[script] | {"run_dir": folder / script})]
        for script in SCRIPTS
    ]
    program = f"import runpy, sys\nfor sys.argv in {lines}: runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return lambda script: folder / script


# ---- Reading what it left ----------------------------------------------------------------------------


def tensors(run, file):
    return safetensors.torch.load_file(run / file)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_json(file):
    """JSON as every language reads it, without Python's NaN and Infinity."""

    def refuse(word):
        raise AssertionError(f"{file} holds {word}, which is no JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


def scalars(run):
    events = EventAccumulator(str(run))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def steps(logged, tag):
    return [step for step, _ in logged[tag]]


def values(logged, tag):
    return [value for _, value in logged[tag]]


def film(video):
    return np.stack(imageio.mimread(video))


def assert_same_run(run, other):
    """Two runs agree bit for bit in all but how long they took."""
    for file in (FINAL, TRAINED, OPTIMIZER):
        assert same(tensors(run, file), tensors(other, file)), file
    for file in ("result.json", "checkpoints/latest/counters.json"):
        assert {**read_json(run / file), "wall_s": 0} == {**read_json(other / file), "wall_s": 0}, file
    mine, theirs = scalars(run), scalars(other)
    assert mine.keys() == theirs.keys()
    for tag in mine:
        assert steps(mine, tag) == steps(theirs, tag), tag
        if not tag.startswith("time/") and tag != "charts/SPS":
            assert mine[tag] == theirs[tag], tag
    assert not list(run.rglob("*.partial")) and not list(run.rglob("*.previous"))


# ---- The program -------------------------------------------------------------------------------------


@every_script
def test_import_runs_nothing(script, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["pytest", "--no-such-flag"])
    module = runpy.run_path(str(ROOT / f"{script}.py"), run_name="imported")
    assert callable(module["validate"]) and capfd.readouterr() == ("", "")
    text = (ROOT / f"{script}.py").read_text()
    assert not re.search(rf"^ *(import|from) ({'|'.join(SCRIPTS)})\b", text, re.MULTILINE)  # copied alone


@every_script
def test_help_explains_every_argument(script, execute, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as exit_:
        execute(script, help=None)
    out, error = capfd.readouterr()
    assert not exit_.value.code and error == ""
    flags, helps = [], []
    for file, name in ((ROOT / f"{script}.py", "Args"), (arguments.__file__, "CommonArgs")):
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name).body
        named = [node.target.id for node in body if isinstance(node, ast.AnnAssign)]
        texts = [ast.literal_eval(node.value) for node in body if isinstance(node, ast.Expr)]
        flags += named
        helps += texts[-len(named) :]  # after the docstring, if there is one
    assert len(flags) == len(helps) > 25
    shown = " ".join(re.sub(r"[^\x20-\x7e]", " ", out).split())
    for flag, text in zip(flags, helps):
        assert len(text) > 5 and re.search(f"--{flag.replace('_', '-')}[ ,].*{re.escape(text)}", shown), flag


@every_script
def test_what_a_run_leaves(script, finished):
    run = finished(script)
    result = read_json(run / "result.json")
    assert (result["suite"], result["task_id"], result["seed"]) == ("LiberoObject", 4, 1)
    assert result["wall_s"] > 0 and (result["protocol"], result["max_episode_steps"]) == (None, 24)
    if script == "sft_vla":
        assert set(result) == {
            "suite", "task_id", "task_ids", "seed", "success", "sampled", "best", "wall_s", "protocol",
            "max_episode_steps",
        }  # fmt: skip
        assert result["task_ids"] == [4, 7]
        successes = []
        for way in ("success", "sampled"):
            evaluated = result[way].pop("tasks")
            assert set(evaluated) == {"4", "7"} and set(result[way]) == SUCCESS
            assert result[way]["trials"] == 4
            successes += evaluated.values()
    else:
        assert set(result) == RESULT and (result["env_steps"], result["episodes"]) == (4 * STEPS, 4 * 2)
        successes = [result[f"{way}_{when}"] for way in WAYS for when in ("before", "after")]
    for success in successes:
        assert set(success) == SUCCESS and success["trials"] == 2
        assert success["low"] <= success["rate"] <= success["high"]
    args = read_json(run / "args.json")
    assert (args["num_iterations"], args["resume"]) == (4, None)
    assert args["eval_temperature"] == args["temperature"] > 0
    assert (args["script"], args["max_episode_steps"]) == (script, 24)
    first = 2 if script == "sft_vla" else 0  # random weights need no evaluation
    names = {f"iteration_{iteration:04d}_{way}.mp4" for iteration in range(first, 5, 2) for way in WAYS}
    assert {file.name for file in (run / "videos").iterdir()} == names
    for name in names:
        frames = film(run / "videos" / name)
        assert frames.shape[:2] == (4, 2 * 136) and frames.shape[2] in (256, 512) and frames[-1].std() > 10
    assert not list(run.rglob("*.partial")) and not list(run.rglob("*.previous"))


@every_script
def test_the_final_checkpoint_is_a_policy_that_has_learnt(script, finished):
    run = finished(script)
    policy = load_policy("nano", run / "checkpoints" / "final")
    assert same(policy.state_dict(), tensors(run, FINAL))
    torch.manual_seed(1)
    before = (new_policy("nano") if script == "sft_vla" else load_policy("nano")).state_dict()
    assert all(not torch.equal(before[name], p) for name, p in policy.named_parameters() if p.ndim > 1)
    assert not (run / "checkpoints" / "adapter").exists()


@every_online_script
def test_what_a_run_logs(script, finished):
    logged = scalars(finished(script))
    assert set(logged) >= TAGS[script]
    for tag in logged:
        assert all(math.isfinite(value) for value in values(logged, tag)), tag
        evaluated = [0, 2 * STEPS, 4 * STEPS]
        expected = evaluated if tag.endswith("success_rate") else [k * STEPS for k in range(1, 5)]
        assert steps(logged, tag) == expected, tag
    assert all(abs(value - 1) < 1e-5 for value in values(logged, "losses/ratio_first_minibatch"))
    assert all(0 <= value < 1e-4 for value in values(logged, "losses/logprob_gap"))
    assert values(logged, "charts/episodic_length") == [24] * 4
    assert all(value < 0 for value in values(logged, "charts/episodic_return"))
    warm_then_down = [0, 1 / 3, 2 / 4, 1 / 4] if script == "ppo_vla" else [1 / 3, 2 / 3, 2 / 4, 1 / 4]
    assert values(logged, "charts/learning_rate") == pytest.approx([0.01 * f for f in warm_then_down])
    moved = [value > 1e-5 for value in values(logged, "losses/approx_kl")[:2]]
    assert moved == [script != "ppo_vla", True]  # PPO's critic learns alone at first


def test_what_sft_logs(finished):
    logged = scalars(finished("sft_vla"))
    assert set(logged) >= TAGS["sft_vla"]
    for tag in logged:
        assert all(math.isfinite(value) for value in values(logged, tag)), tag
        every = 6 if "success_rate" in tag else 3
        assert steps(logged, tag) == list(range(every, 13, every)), tag
    assert values(logged, "losses/nll")[0] == pytest.approx(math.log(256), rel=0.1)
    assert values(logged, "losses/nll")[-1] < values(logged, "losses/nll")[0]
    rates = values(logged, "charts/learning_rate")  # of each iteration's last step, along a cosine
    assert rates == pytest.approx([0.005 * (1 + math.cos(math.pi * s / 12)) for s in range(2, 12, 3)])
    best = read_json(finished("sft_vla") / "result.json")["best"]
    held_out = values(logged, "losses/held_out_nll")
    assert best["nll"] == pytest.approx(min(held_out)) == pytest.approx(held_out[best["iteration"] - 1])


@one_script
def test_the_seed_decides(script, start, finished):
    """The same seed gives the same bits in another process, on more threads; another seed is another run."""
    assert_same_run(start(script, **FULL, num_threads=2), finished(script))
    other = start(script, "other", seed=2, **FULL)
    assert not same(tensors(other, FINAL), tensors(finished(script), FINAL))


@pytest.mark.slow
def test_workers_change_nothing(start, finished, monkeypatch):
    """Environments in two processes give the same bits as in one."""
    made, make_vec = [], gym.make_vec

    def make_with_workers(*args, reward, **settings):
        made.append(make_vec(*args, reward=reward, workers=1 if reward == "binary" else 2, **settings))
        return made[-1]  # those of the evaluation are not split: starting a process takes seconds

    monkeypatch.setattr(gym, "make_vec", make_with_workers)
    run = start("tgrpo_vla", **FULL)
    assert [type(envs.unwrapped) for envs in made] == [LiberoVectorEnv, LiberoWorkersEnv]
    assert_same_run(run, finished("tgrpo_vla"))


# ---- Stopped and resumed -----------------------------------------------------------------------------


class Stop(BaseException):
    """What ends a run in the middle."""


def stop_after_saving(patch, iteration, folder="latest"):
    save = checkpoints.save_training_state

    def save_and_stop(path, policy, optimizer, counters):
        save(path, policy, optimizer, counters)
        if (path.name, counters["iteration"]) == (folder, iteration):
            raise Stop

    patch.setattr(checkpoints, "save_training_state", save_and_stop)


def stop_between_renames(patch, iteration):
    """The old state has been moved away, the new one is not in its place."""
    rename = Path.rename

    def rename_or_stop(path, target):
        if path.name == "latest.partial" and read_json(path / "counters.json")["iteration"] == iteration:
            raise Stop
        return rename(path, target)

    patch.setattr(Path, "rename", rename_or_stop)


def stop_at(patch, module, function):
    def stop(*args, **kwargs):
        raise Stop

    patch.setattr(module, function, stop)


def stop(start, monkeypatch, script, moment, *details, **flags):
    """The folder of a run stopped at a moment."""
    with monkeypatch.context() as patch:
        moment(patch, *details)
        with pytest.raises(Stop):
            start(script, **flags)
    return Path("run").absolute()


@pytest.mark.parametrize(
    "script",
    ["tgrpo_vla", "ppo_vla", *(pytest.param(k, marks=pytest.mark.slow) for k in ("grpo_vla", "sft_vla"))],
)
@pytest.mark.parametrize("iteration", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    script, iteration, start, resume, finished, monkeypatch
):
    run = stop(start, monkeypatch, script, stop_after_saving, iteration, **FULL)
    assert read_json(run / "checkpoints/latest/counters.json")["iteration"] == iteration
    assert not (run / "result.json").exists()
    resume(script, run)
    assert_same_run(run, finished(script))


@one_script
def test_stopped_while_saving(script, start, resume, finished, monkeypatch):
    run = stop(start, monkeypatch, script, stop_between_renames, 3, **FULL)
    left = {path.name for path in (run / "checkpoints").iterdir()} - {"best"}
    assert left == {"latest.previous", "latest.partial"}
    (run / "checkpoints" / "latest.partial" / "optimizer.safetensors").write_bytes(b"half writ")
    resume(script, run)
    assert_same_run(run, finished(script))


@pytest.mark.slow
@every_script
def test_killed_at_any_moment(script, tmp_path, own, resume, finished):
    running = process(script, tmp_path, own, **FULL)
    counters = tmp_path / "run" / "checkpoints" / "latest" / "counters.json"
    iteration = 0
    while iteration < 1:
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.002)
        try:
            iteration = json.loads(counters.read_text())["iteration"]
        except OSError:  # not there yet, or just being replaced
            continue
    delay = random.uniform(0.0, 0.1)
    time.sleep(delay)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert running.returncode == -signal.SIGKILL and not (tmp_path / "run" / "result.json").exists()
    print(f"killed {delay:.3f} s after iteration {iteration}: {sorted(tmp_path.glob('run/checkpoints/*'))}")
    resume(script, tmp_path / "run")
    assert_same_run(tmp_path / "run", finished(script))


def test_interrupted(start, resume, finished, monkeypatch, capsys):
    """Ctrl-C once: the run ends when its state has been saved."""
    make_writer = runs.SummaryWriter

    def interrupt(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return make_writer(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "SummaryWriter", interrupt)
        with pytest.raises(SystemExit) as exit_:
            start("sft_vla", **FULL)
    run, error = Path("run").absolute(), capsys.readouterr().err
    assert exit_.value.code == 130 and f"go on with --resume {run}" in error
    assert not (run / "result.json").exists()
    resume("sft_vla", run)
    assert_same_run(run, finished("sft_vla"))


@pytest.mark.slow
def test_interrupted_twice(tmp_path, own, resume, finished):
    """The run ends at once."""
    running = process("grpo_vla", tmp_path, own, **FULL)
    while not list(tmp_path.glob("run/events.*")):  # the run's folder is complete
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.002)
    error = ""
    for _ in range(2):
        running.send_signal(signal.SIGINT)
        while "Ctrl-C: the run ends" not in error:
            error += running.stderr.readline()
    error += running.communicate(timeout=60)[1]
    assert running.returncode == 130 and "Traceback" not in error and "go on with" not in error, error
    assert not (tmp_path / "run" / "result.json").exists()
    resume("grpo_vla", tmp_path / "run")
    assert_same_run(tmp_path / "run", finished("grpo_vla"))


@pytest.mark.parametrize("script", ["grpo_vla"])
def test_a_full_disk(script, start, resume, finished, monkeypatch, capsys):
    """The state of iteration 3 does not fit: one line, and the run goes on from the one before."""
    resource = pytest.importorskip("resource", reason="limits of file sizes are Unix's")
    limits, save = resource.getrlimit(resource.RLIMIT_FSIZE), checkpoints.save_training_state

    def save_on_a_full_disk(path, policy, optimizer, counters):
        if (path.name, counters["iteration"]) == ("latest", 3):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            save(path, policy, optimizer, counters)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_training_state", save_on_a_full_disk)
        with pytest.raises(SystemExit):
            start(script, **FULL)
    run = Path("run").absolute()
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and "the training state cannot be written" in lines[0] and "large" in lines[0]
    assert read_json(run / "checkpoints/latest/counters.json")["iteration"] == 2
    assert not (run / "checkpoints" / "latest.partial").exists()
    resume(script, run)
    assert_same_run(run, finished(script))


def test_stopped_before_the_first_iteration(start, resume, finished, monkeypatch):
    """The first evaluation has been logged, but no state saved since."""
    run = stop(start, monkeypatch, "tgrpo_vla", stop_at, runs, "_seed_all", **FULL)
    resume("tgrpo_vla", run)
    assert_same_run(run, finished("tgrpo_vla"))


@pytest.mark.parametrize("script", [pytest.param("tgrpo_vla", marks=pytest.mark.slow), "sft_vla"])
def test_stopped_after_the_last_evaluation(script, start, resume, monkeypatch):
    run = stop(start, monkeypatch, script, stop_at, checkpoints, "save_policies")
    resume(script, run)
    assert_same_run(run, start(script, "uninterrupted"))


def test_sft_stopped_between_its_two_states(start, resume, finished, monkeypatch):
    """Iteration 1 has been saved as the best, and not yet as the latest."""
    run = stop(start, monkeypatch, "sft_vla", stop_after_saving, 1, "best", **FULL)
    assert read_json(run / "checkpoints/latest/counters.json")["iteration"] == 0
    resume("sft_vla", run)
    assert_same_run(run, finished("sft_vla"))


@pytest.mark.slow
def test_an_adapter_and_a_critic_go_on_as_well(start, resume, monkeypatch):
    flags = {"train": "lora", "lora_rank": 4}
    run = stop(start, monkeypatch, "ppo_vla", stop_after_saving, 1, **flags)
    torch.manual_seed(123)  # what was drawn before must not matter
    resume("ppo_vla", run)
    other = start("ppo_vla", "uninterrupted", **flags)
    assert_same_run(run, other)
    adapter = "checkpoints/adapter/adapter_model.safetensors"
    assert same(tensors(run, adapter), tensors(other, adapter))


def test_a_finished_run_goes_on_longer_elsewhere(tmp_path, resume, finished, own, capsys):
    """Of demonstrations that have moved, on two threads; the learning rate is that of the new length."""
    run = tmp_path / "copy"
    shutil.copytree(finished("sft_vla"), run)
    shutil.copytree(own["sft_vla"]["demos"], tmp_path / "moved")
    resume("sft_vla", run, num_iterations=6, demos=tmp_path / "moved", num_threads=2)
    out, args = capsys.readouterr().out, read_json(run / "args.json")
    assert "num_iterations 6 instead of 4; the learning rate goes on as in a run of that length" in out
    assert [args[name] for name in ("num_iterations", "demos", "num_threads")] == [
        6,
        str(tmp_path / "moved"),
        2,
    ]
    rates = values(scalars(run), "charts/learning_rate")
    assert rates[:4] == values(scalars(finished("sft_vla")), "charts/learning_rate")
    assert rates[4:] == pytest.approx([0.005 * (1 + math.cos(math.pi * s / 18)) for s in (14, 17)])
    assert read_json(run / "checkpoints/latest/counters.json")["iteration"] == 6


def test_a_changed_copy_is_another_script(tmp_path, finished, monkeypatch, capsys):
    """Its runs bear its name, and neither goes on with the other's."""
    changed = (
        (ROOT / "sft_vla.py").read_text().replace("seed: int = 1", "beta: float = 0.5\n    seed: int = 1")
    )
    (tmp_path / "loo_vla.py").write_text(changed)

    def refused(script, run):
        monkeypatch.setattr(sys, "argv", [script, "--resume", str(run)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(script, run_name="__main__")
        assert exit_.value.code == 2
        return capsys.readouterr().err

    shutil.copytree(finished("sft_vla"), tmp_path / "run")
    assert "is a run of sft_vla.py; expected one of loo_vla.py" in refused(
        str(tmp_path / "loo_vla.py"), tmp_path / "run"
    )
    args = read_json(tmp_path / "run" / "args.json") | {"script": "loo_vla", "beta": 0.5}
    (tmp_path / "run" / "args.json").write_text(json.dumps(args))
    error = refused(str(ROOT / "sft_vla.py"), tmp_path / "run")
    assert "has beta, which this script does not know" in error and "loo_vla.py" in error


def test_an_evaluation_is_interrupted(start, monkeypatch, capsys):
    """One line, and no video that is cut off."""
    write = evaluation.imageio.mimwrite

    def write_and_interrupt(*args, **kwargs):
        write(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(evaluation.imageio, "mimwrite", write_and_interrupt)
    with pytest.raises(SystemExit) as exit_:
        start("grpo_vla", evaluate=None)
    assert exit_.value.code == 130 and capsys.readouterr().err == "Ctrl-C: stopped\n"
    assert [str(path) for path in Path("run").rglob("*") if path.is_file()] == ["run/args.json"]


@pytest.mark.parametrize("script", ["tgrpo_vla", "sft_vla"])
def test_resuming_a_finished_run_changes_nothing(script, tmp_path, resume, finished):
    shutil.copytree(finished(script), tmp_path / "copy")
    resume(script, tmp_path / "copy")
    assert_same_run(tmp_path / "copy", finished(script))


# ---- Numbers that are not finite ---------------------------------------------------------------------


@every_script
def test_a_loss_that_is_not_finite(script, start, resume, capfd):
    failing = 2 if script == "ppo_vla" else 1  # PPO's policy stays as it is in the first iteration
    flags = {"learning_rate": 1e30, "num_iterations": 3}
    with pytest.raises(SystemExit) as exit_:
        start(script, **flags)
    expected = (
        f"error: iteration {failing}, last good state in {Path('run').absolute()}/checkpoints/latest:"
        " the loss is nan; expected a finite number"
    )
    error = capfd.readouterr().err
    lines = [line for line in re.split(r"[\r\n]|\x1b\[A", error) if line.strip()]
    others = [line for line in lines if not re.fullmatch(r"\w+: .*\| .*00:\d\d<.*", line) or "error" in line]
    assert exit_.value.code == 1 and others == [expected], error  # beside the progress bar
    assert read_json(Path("run/checkpoints/latest/counters.json"))["iteration"] == failing - 1
    assert not Path("run/result.json").exists()
    with pytest.raises(SystemExit) as exit_:
        resume(script, Path("run").absolute())
    assert exit_.value.code == 1 and expected in capfd.readouterr().err  # it loads, and goes the same way


def test_weights_that_have_run_away(start, capfd):
    """One huge step leaves finite weights, with which the next rollout's probabilities are not finite."""
    with pytest.raises(SystemExit) as exit_:
        start("tgrpo_vla", learning_rate=1e30, minibatch_size=256, num_iterations=3)
    error = capfd.readouterr().err
    assert exit_.value.code == 1 and "error: iteration" in error and "expected a finite number" in error


# ---- Only evaluating ---------------------------------------------------------------------------------


@one_script
def test_evaluate_only(script, start, finished, capfd):
    """The same episodes as in the last evaluation of the run; compared with itself a policy is no better."""
    run = finished(script)
    checkpoint = run / "checkpoints" / "final"
    with pytest.raises(SystemExit) as exit_:
        start(script, evaluate=None, checkpoint=checkpoint, compare=checkpoint)
    assert not exit_.value.code
    where, _, below, *_ = capfd.readouterr().out.splitlines()
    assert where == f"{Path('run').absolute()}: evaluating {checkpoint}"
    assert f"--compare {checkpoint}: " in below and "; --checkpoint minus --compare: +0 points" in below
    result, trained = read_json(Path("run/result.json")), read_json(run / "result.json")
    assert (result["suite"], result["task_id"], result["seed"]) == ("LiberoObject", 4, 1)
    assert result["protocol"] is None
    for name in WAYS:
        after = trained[name if script == "sft_vla" else f"{name}_after"]
        assert result[name] == after and len(result[f"{name}_outcomes"]) == after["trials"]
        assert sum(result[f"{name}_outcomes"]) == result[name]["successes"]
        compared = result[f"{name}_compared"]
        assert compared["checkpoint"] == str(checkpoint)
        assert compared["outcomes"] == result[f"{name}_outcomes"]
        assert (compared["paired"]["difference"], compared["paired"]["p_value"]) == (0, 1)
        np.testing.assert_array_equal(
            film(f"run/videos/{name}_compared.mp4"), film(f"run/videos/{name}.mp4"), strict=True
        )
        last = film(run / "videos" / f"iteration_0004_{name}.mp4")
        np.testing.assert_array_equal(film(f"run/videos/{name}.mp4"), last, strict=True)
    assert not np.array_equal(film("run/videos/success.mp4"), last)
    assert {path.name for path in Path("run").iterdir()} == {"args.json", "result.json", "videos"}


def test_a_good_policy_against_a_spoilt_one(start, finished):
    spoilt = finished("tgrpo_vla") / "checkpoints" / "final"
    long = {"max_episode_steps": 200, "num_threads": 2}
    with pytest.raises(SystemExit):
        start("tgrpo_vla", evaluate=None, compare=spoilt, eval_temperature=0, eval_episodes=4, **long)
    result = read_json(Path("run/result.json"))
    won, compared = sum(result["success_outcomes"]), result["success_compared"]
    assert won > 0 and compared["successes"] == 0 and compared["outcomes"] == [False] * 4
    assert compared["paired"]["only_first"] == won and compared["paired"]["difference"] == won / 4


@pytest.mark.parametrize(
    ("script", "protocol", "episodes", "temperature", "limit", "size"),
    [
        ("tgrpo_vla", "lerobot", 10, 1.1, 280, 128),
        ("sft_vla", "lerobot", 10, 1.1, 280, 128),
        ("tgrpo_vla", "openvla", 50, 0.0, 280, 256),
    ],
)
def test_a_protocol_sets_the_evaluation(
    script, protocol, episodes, temperature, limit, size, execute, own, monkeypatch
):
    envs = []
    monkeypatch.setattr(runs.Run, "evaluate_only", lambda run: envs.append(run.eval_envs))
    with pytest.raises(SystemExit) as exit_:
        execute(script, evaluate=None, protocol=protocol, num_threads=1, run_dir="run", temperature=1.1)
    args, made = read_json(Path("run/args.json")), envs[0].unwrapped
    assert not exit_.value.code
    assert (args["eval_episodes"], args["eval_temperature"]) == (episodes, temperature)
    assert args["max_episode_steps"] == limit
    assert (made.num_envs, made.max_episode_steps, made.image_size) == (episodes, limit, size)


@pytest.mark.slow
def test_openvlas_protocol_is_deterministic_only(start):
    with pytest.raises(SystemExit) as exit_:
        start("tgrpo_vla", evaluate=None, protocol="openvla", num_threads=2, max_episode_steps=280)
    result = read_json(Path("run/result.json"))
    assert result["max_episode_steps"] == read_json(Path("run/args.json"))["max_episode_steps"] == 280
    assert not exit_.value.code and result["protocol"] == "openvla"
    assert result["success"]["trials"] == 2 and not any("sampled" in name for name in result)
    assert [file.name for file in Path("run/videos").iterdir()] == ["success.mp4"]


# ---- How long a run is -------------------------------------------------------------------------------


@one_online_script
def test_control_steps_end_a_run(script, start):
    run = start(script, num_iterations=20, total_env_steps=100)
    result, logged = read_json(run / "result.json"), scalars(run)
    assert (result["env_steps"], result["episodes"]) == (3 * STEPS, 3 * 2)
    assert steps(logged, "losses/policy_loss") == [STEPS, 2 * STEPS, 3 * STEPS]
    left = [1 / 3, 1 - STEPS / 100, 1 - 2 * STEPS / 100]  # warming up, then what is left of the steps
    left = [0, 1 / 3, left[2]] if script == "ppo_vla" else left  # after its critic's own warm-up
    assert values(logged, "charts/learning_rate") == pytest.approx([0.01 * f for f in left])


@one_online_script
@pytest.mark.filterwarnings("error:clamping frac")
def test_the_progress_bar_ends_at_100_percent(script, start):
    """Of 49 control steps four iterations are, summed up, 100 and a rounding error: beyond the bar's end."""
    run = start(script, max_episode_steps=8, num_iterations=20, total_env_steps=49)
    assert read_json(run / "result.json")["env_steps"] == 4 * 16


def test_grpo_with_nothing_to_learn_from(start, capfd):
    run = start("grpo_vla", reward="binary", keep_low=0.1, keep_high=0.9, num_iterations=5, max_rounds=3)
    out, error = capfd.readouterr()
    assert "iteration 1: 0 of 6 episodes succeed, and in no group between 0.1 and 0.9" in out
    assert "nothing to learn from" in out
    assert "Traceback" not in error and "error" not in error
    result = read_json(run / "result.json")
    assert set(result) == RESULT
    assert all(result[f"{way}_after"] == result[f"{way}_before"] for way in WAYS)
    assert (result["env_steps"], result["episodes"]) == (3 * STEPS, 3 * 2)  # what was played all the same
    assert same(tensors(run, FINAL), load_policy("nano").state_dict())


def test_ppos_critic_learns_alone_at_first(start, monkeypatch):
    run = stop(start, monkeypatch, "ppo_vla", stop_after_saving, 1, critic_warmup=1)
    learnt, before = tensors(run, TRAINED), load_policy("nano").named_parameters()
    assert all(torch.equal(learnt[f"policy.{name}"], parameter) for name, parameter in before)
    critic = {name: value for name, value in learnt.items() if name.startswith("critic.")}
    assert len(critic) == 4 and critic["critic.2.weight"].abs().max() > 0  # it started at 0


@pytest.mark.parametrize(
    ("length", "rates"),
    [
        ({"num_iterations": 2}, [0, 1 / 3]),
        ({"num_iterations": 1}, [1 / 3]),
        ({"num_iterations": 20, "total_env_steps": 2 * STEPS}, [0, 1 / 3]),
    ],
    ids=str,
)
def test_a_short_run_of_ppo_learns(length, rates, start):
    """The critic's warm-up leaves the policy the last iteration."""
    run = start("ppo_vla", critic_warmup=2, **length)
    assert values(scalars(run), "charts/learning_rate") == pytest.approx([0.01 * rate for rate in rates])
    assert not same(tensors(run, FINAL), load_policy("nano").state_dict())


# ---- What is trained, and how ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("tgrpo_vla", {"no_clip": None, "update_every": "step", "return_mode": "mean"}),
        (
            "tgrpo_vla",
            {"ratio_level": "action", "stop": "group", "group_by": "stage", "alphas": "given", "alpha1": 1.5},
        ),
        ("grpo_vla", {"ratio_level": "action", "update_epochs": 2}),
        ("ppo_vla", {"ratio_level": "action", "critic_warmup": 0, "gamma": 1.0, "gae_lambda": 1.0}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_flags_of_the_algorithm(script, flags, start):
    run = start(script, num_iterations=1, **flags)
    assert not same(tensors(run, FINAL), load_policy("nano").state_dict())
    args = read_json(run / "args.json")
    for name, value in flags.items():
        assert (args["clip"] is False) if name == "no_clip" else args[name] == value


def test_what_is_given_beside_a_preset_counts(start):
    run = start("tgrpo_vla", num_iterations=1, preset="paper", stop="each", clip=None)
    args = read_json(run / "args.json")
    assert [args[name] for name in ("preset", "stop", "clip", "update_every", "target_kl")] == [
        "paper", "each", True, "step", 1e9,
    ]  # fmt: skip


def test_the_papers_weights_of_the_task(start):
    """The paper's alphas differ by task; another task is another run."""
    run = start("tgrpo_vla", num_iterations=1, task_id=0, alphas="given", preset="paper")
    args = read_json(run / "args.json")
    assert (args["alpha1"], args["alpha2"]) == (10.0, 1.0) and read_json(run / "result.json")["task_id"] == 0


def test_groups_whose_members_score_alike(start, capfd):
    """Nobody succeeds in 24 control steps, and the groups are kept by their rewards."""
    run = start("tpo_vla", score="success")
    out, error = capfd.readouterr()
    assert (out + error).count("score alike; nothing to learn from") == 2
    assert same(tensors(run, FINAL), load_policy("nano").state_dict())


@every_script
def test_training_an_adapter(script, start):
    flags = {"train": "lora", "lora_rank": 4, "num_iterations": 1}
    others = {"sft_vla": {"checkpoint": SHIPPED["nano"]}, "tpo_vla": {"reference": "start"}}
    flags |= others.get(script, {"kl_coef": 0.1})
    flags |= {"critic_warmup": 0} if script == "ppo_vla" else {}
    run = start(script, **flags)
    after, before = tensors(run, FINAL), load_policy("nano").state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == LORA
    adapter = tensors(run, "checkpoints/adapter/adapter_model.safetensors")
    assert len(adapter) == 2 * len(LORA) and all(4 in value.shape for value in adapter.values())
    if script not in others:
        assert values(scalars(run), "losses/kl")[0] >= 0


def test_the_seed_draws_the_adapter(start):
    adapters = []
    for name, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(123)
        run = start("tgrpo_vla", name, num_iterations=1, train="lora", lora_rank=4, seed=seed)
        adapters.append(tensors(run, "checkpoints/adapter/adapter_model.safetensors"))
    drawn = next(name for name in adapters[0] if "lora_A" in name)
    assert (adapters[0][drawn] - adapters[1][drawn]).abs().mean() > 0.01  # anew, not the same draw moved


# ---- Behaviour cloning -------------------------------------------------------------------------------


def held_out_samples(own, episodes):
    """The demonstration of each task that follows those learnt from."""
    tasks = [get_task("LiberoObject", task_id) for task_id in episodes]
    demos = [
        demonstrations.load_demonstrations(own["sft_vla"]["demos"], task, count + 1, 8)[count:]
        for task, count in zip(tasks, episodes.values())
    ]
    return demonstrations.samples(tasks, demos)


EARLY = {"early_stop": 2, "num_iterations": 30, "weight_decay": 0.0, "eval_every": 0}


def test_early_stop_keeps_the_best(start, own, capfd):
    run = start("sft_vla", **EARLY)
    best, logged = read_json(run / "result.json")["best"], scalars(run)
    held_out = values(logged, "losses/held_out_nll")
    assert len(held_out) == best["iteration"] + 2 < 30
    assert best["nll"] == pytest.approx(min(held_out)) == pytest.approx(held_out[best["iteration"] - 1])
    final, stored = tensors(run, FINAL), tensors(run, "checkpoints/best/trained.safetensors")
    assert all(torch.equal(final[name], value) for name, value in stored.items())
    assert same(stored, tensors(run, TRAINED))  # evaluated last, so saved last
    policy = load_policy("nano", run / "checkpoints" / "final").eval()  # images as they are
    loss = sft_vla.held_out_loss(policy, held_out_samples(own, {4: 2, 7: 1}))
    assert loss == pytest.approx(best["nll"], abs=1e-4)
    assert f"lowest at {best['iteration']}" in capfd.readouterr().out


@pytest.mark.slow
def test_early_stop_in_a_stopped_run(start, resume, monkeypatch):
    """Stopped when training had ended, in the last evaluation: it trains no further."""
    run = stop(start, monkeypatch, "sft_vla", stop_at, evaluation, "write_video", **EARLY)
    resume("sft_vla", run)
    assert_same_run(run, start("sft_vla", "uninterrupted", **EARLY))


def test_demonstrations_a_task(start, capfd):
    run = start("sft_vla")
    args = read_json(run / "args.json")
    assert (args["task_id"], args["task_ids"], args["episodes"]) == (4, [4, 7], [2, 1])
    assert f"{9 + 6 + 7} samples" in capfd.readouterr().out
    result = read_json(run / "result.json")
    assert set(result["success"]["tasks"]) == set(result["sampled"]["tasks"]) == {"4", "7"}
    run = start("sft_vla", "one", task_ids=(), task_id=7, episodes=1)
    assert "\n7 samples" in capfd.readouterr().out and read_json(run / "args.json")["task_ids"] == [7]
    assert "tasks" not in read_json(run / "result.json")["success"]


@one_online_script
def test_several_tasks(script, start, capfd):
    """Groups are dealt to the tasks; each task is reported on the terminal, in TensorBoard, at the end."""
    run = start(script, task_ids=(7, 4), num_groups=2, num_iterations=1)
    result, args = read_json(run / "result.json"), read_json(run / "args.json")
    assert (args["task_id"], args["task_ids"]) == (7, [7, 4])
    for success in (result[f"{way}_{when}"] for way in WAYS for when in ("before", "after")):
        assert success["trials"] == 4 and list(success["tasks"]) == ["7", "4"]
        assert sum(its["successes"] for its in success["tasks"].values()) == success["successes"]
    tags = {f"charts/{way}{of}" for way in ("success_rate", "sampled_success_rate")
            for of in ("", "_task_4", "_task_7")}  # fmt: skip
    assert tags <= set(scalars(run))
    out = capfd.readouterr().out
    assert "; task 7: 0; task 4: 0" in out and "\nsuccess 0 -> 0/4 " in out and "; sampled 0 -> 0/4 " in out


@pytest.mark.slow
@one_online_script
def test_one_adapter_above_those_of_the_tasks(script, start, execute, tmp_path, capfd):
    """The tasks' adapters are left alone; what is trained lies above both, and merges with each."""
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        policy = make_trainable(load_policy("nano"), "lora", rank=2)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        save_adapter(policy, tmp_path / f"task_{seed}")
        folders.append(tmp_path / f"task_{seed}")
    flags = {"task_ids": (7, 4), "num_groups": 2, "num_iterations": 1, "train": "lora", "lora_rank": 2}
    run = start(script, **flags, shared_adapter=tuple(folders), adapter="above")
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"latest", "above", "final_task_7", "final_task_4"}
    one, other = (load_policy("nano", run / "checkpoints" / f"final_task_{k}").state_dict() for k in (7, 4))
    assert not torch.equal(one["blocks.0.qkv.weight"], other["blocks.0.qkv.weight"])
    assert torch.equal(one["head.weight"], other["head.weight"])
    execute(script, resume=run)
    assert "0/4" in capfd.readouterr().out
    run = start(script, "plain", **flags, no_merge=None)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", "adapter"}


def test_a_folder_that_is_not_an_adapter(start, tmp_path, capfd):
    flags = {"task_ids": (7, 4), "num_groups": 2, "train": "lora", "shared_adapter": (tmp_path, tmp_path)}
    expect_error(start, capfd, "tgrpo_vla", "is not an adapter", **flags)


def test_nothing_held_out(start):
    run = start("sft_vla", held_out=0, episodes=(3, 2))
    assert "losses/held_out_nll" not in scalars(run) and "losses/nll" in scalars(run)
    result = read_json(run / "result.json")
    assert set(result["success"]["tasks"]) == set(result["sampled"]["tasks"]) == {"4", "7"}
    assert not (run / "checkpoints" / "best").exists()


def test_sft_can_start_from_a_checkpoint(start, finished):
    checkpoint = finished("sft_vla") / "checkpoints" / "final"
    run = start("sft_vla", checkpoint=checkpoint, learning_rate=1e-12)
    for name, value in tensors(finished("sft_vla"), FINAL).items():
        torch.testing.assert_close(tensors(run, FINAL)[name], value, atol=1e-6, rtol=0)


# ---- Mistakes ----------------------------------------------------------------------------------------


def expect_error(start, capfd, script, words, **flags):
    """The script ends with status 2 and one line, which holds ``words``; no run is left behind."""
    with pytest.raises(SystemExit) as exit_:
        start(script, **flags)
    out, error = capfd.readouterr()
    assert exit_.value.code == 2 and error.startswith("error:") and error.count("\n") == 1, error
    assert words in error and not Path("run").exists()
    assert out == "" or script == "sft_vla"  # which says first how many samples it has loaded


@every_script
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_iterations": 0}, "num_iterations"),
        ({"assets": "~/no/such/folder"}, str(Path("~/no/such/folder").expanduser())),
    ],
    ids=str,
)
def test_mistakes_are_one_line(script, flags, words, start, capfd):
    """One that the command line finds, and one that the environments find; ``test_arguments.py`` has more."""
    expect_error(start, capfd, script, words, **flags)


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("tgrpo_vla", {"train": "lorra"}, "lora"),
        ("tgrpo_vla", {"reward": "raises.py:reward"}, "did you mean 'object_height'"),
        ("grpo_vla", {"action_chunk": 4}, "4"),
        ("ppo_vla", {"evaluate": None, "num_threads": 0}, "num_threads"),
        ("sft_vla", {"demos": "/no/such/folder"}, "vla_envs.experts"),
        ("sft_vla", {"policy": "nanoo"}, "nano"),
    ],
    ids=str,
)
def test_mistakes_that_each_step_finds(script, flags, words, start, capfd):
    Path("raises.py").write_text("def reward(facts):\n    return facts['object_hight']\n")
    expect_error(start, capfd, script, words, **flags)


def test_a_damaged_checkpoint(start, capfd, tmp_path):
    (tmp_path / "damaged").mkdir()
    shutil.copy(SHIPPED["nano"] / "config.json", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"not a tensor")
    expect_error(start, capfd, "grpo_vla", "damaged", checkpoint=tmp_path / "damaged")


def test_a_folder_that_cannot_be_written(start, capfd, tmp_path):
    (tmp_path / "file").write_text("in the way")
    expect_error(start, capfd, "ppo_vla", "file", run_dir=tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_run_needs_a_folder_of_its_own(start, finished, capfd):
    expect_error(start, capfd, "sft_vla", "holds a run already", run_dir=finished("sft_vla"))


@pytest.mark.parametrize("script", ["tgrpo_vla", "sft_vla"])
def test_a_damaged_state(script, execute, finished, tmp_path, capfd):
    """Refused as it is: nothing is written to the run."""
    shutil.copytree(finished(script), tmp_path / "copy")
    (tmp_path / "copy" / TRAINED).write_bytes(b"not a tensor")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "copy").rglob("*")}
    with pytest.raises(SystemExit) as exit_:
        execute(script, resume=tmp_path / "copy")
    error = capfd.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error:") and error.count("\n") == 1, error
    assert "damaged" in error
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "copy").rglob("*")}


@pytest.mark.skipif(sys.platform != "linux", reason="EGL and OSMesa are Linux's")
@pytest.mark.parametrize("backend", ["egl", pytest.param("osmesa", marks=pytest.mark.slow)])
def test_without_opengl(tmp_path, own, backend):
    """EGL that finds no driver, and OSMesa that is not installed."""
    if backend == "osmesa" and ctypes.util.find_library("OSMesa"):
        pytest.skip("OSMesa is installed")
    changes = {"MUJOCO_GL": backend, "__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"}
    running = process("tgrpo_vla", tmp_path, own, environment=changes)
    _, error = running.communicate(timeout=300)
    lines = [line for line in error.splitlines() if line.strip()]
    assert running.returncode == 2 and len(lines) == 1 and lines[0].startswith("error:"), error
    assert "OpenGL" in lines[0] and not (tmp_path / "run").exists()
