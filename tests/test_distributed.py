"""Several processes: who plays what, what they exchange, and that two learn what one would."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from artifacts import ROOT, words_of, write_demos
from doubles import NO
from tiny_openvla import write_tiny
from together import learn

import grpo_vla
from vla_envs import distributed
from vla_envs.files import read_json
from vla_envs.policies import new_policy
from vla_envs.policies.openvla.policy import choose
from vla_envs.training import batches, checkpoints

TINY = {
    "num_iterations": 2, "num_groups": 2, "group_size": 2, "max_episode_steps": 24, "eval_episodes": 1,
    "eval_every": 0, "minibatch_size": 4, "num_threads": 1, "learning_rate": 1e-6,
}  # fmt: skip
OWN = {
    "grpo_vla": {"keep_low": 0, "keep_high": 1},
    "tpo_vla": {"keep_low": 0, "keep_high": 1, "score": "return"},
    "ppo_vla": {"critic_warmup": 1, "value_learning_rate": 1e-6},
}


@pytest.fixture
def process(monkeypatch):
    """A function that makes this process number ``rank`` of ``world``, as torchrun does."""

    def process(rank, world, local_world=None):
        numbers = {"RANK": rank, "LOCAL_RANK": rank % 8, "WORLD_SIZE": world}
        numbers["LOCAL_WORLD_SIZE"] = local_world or world
        for name, number in numbers.items():
            monkeypatch.setenv(name, str(number))
        monkeypatch.setenv("MASTER_ADDR", "localhost")

    return process


# ---- Who plays what ----------------------------------------------------------------------------------


def test_alone_nothing_changes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # of something else than torchrun
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.block(5) == slice(0, 5) and distributed.device("cuda:1") == "cuda:1"
    assert distributed.num_threads(None) is None and distributed.num_threads(3) == 3


def test_norms_are_where_the_parameters_are():
    """Also that of a group without gradients, as the policy's while the critic learns alone."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(2, device="meta"))]} for _ in range(2)]
    groups[1]["params"][0].grad = torch.ones(2, device="meta")
    norms = distributed.clip_gradients(torch.optim.SGD(groups), 1.0)
    assert [norm.device.type for norm in norms] == ["meta"] * 2
    assert torch.stack(norms).max().is_meta


@pytest.mark.parametrize("count", [0, 1, 3, 8, 9])
def test_blocks_are_even_and_follow_one_another(count, process):
    taken = []
    for rank in range(4):
        process(rank, 4)
        taken.append(list(range(count))[distributed.block(count)])
    assert [thing for each in taken for thing in each] == list(range(count))
    assert max(map(len, taken)) - min(map(len, taken)) <= 1


def test_cores_and_gpus_of_a_machine_are_shared_out(process):
    process(11, 16, local_world=8)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert distributed.num_threads(None) == max(1, cores // 8) and distributed.num_threads(3) == 3
    assert distributed.device("cuda") == distributed.device("cuda:0") == "cuda:3"
    assert distributed.device("cpu") == "cpu"


@pytest.mark.parametrize("task_ids", [(4,), (0, 4, 7)])
@pytest.mark.parametrize("groups", [4, 3, 1])
def test_scenes_and_draws_do_not_depend_on_the_processes(groups, task_ids, process):
    args = SimpleNamespace(seed=1, num_groups=4, group_size=2, task_ids=task_ids)

    def dealt():
        seeds, generators = batches.draw_placements(args, 3, groups, 2)
        tasks = batches.tasks_of_environments(args)[: len(seeds)]
        return [(s, torch.rand((), generator=g).item(), t) for s, g, t in zip(seeds, generators, tasks)]

    alone, together = dealt(), []
    for rank in range(2):
        process(rank, 2)
        together += dealt()
    assert together == alone and len(alone) == 2 * groups == len({draw for _, draw, _ in alone})
    assert len({scene for scene, _, _ in alone}) == groups


def test_groups_that_do_not_divide(process):
    process(0, 3)
    with pytest.raises(ValueError, match=r"num_groups is 8; .* multiple of the 3 processes") as error:
        grpo_vla.validate(grpo_vla.Args())
    assert len(str(error.value).splitlines()) == 1
    assert grpo_vla.validate(grpo_vla.Args(num_groups=6)).num_groups == 6


def test_samples_have_the_numbers_that_one_process_gives_them(monkeypatch, process):
    """Of five environments in two rollouts; time comes first, then the rollout."""
    when = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    who = torch.tensor([0, 1, 2, 3, 4, 1, 4, 4])
    rollout = torch.tensor([0, 0, 0, 1, 1])  # environments 0, 1 | 2 and 3 | 4
    assert distributed.positions(when, who, rollout[who]).tolist() == list(range(8))
    owner, local = torch.tensor([0, 0, 1, 0, 1]), torch.tensor([0, 1, 0, 2, 1])
    parts = [
        [when[owner[who] == r], local[who[owner[who] == r]], rollout[who[owner[who] == r]]] for r in (0, 1)
    ]
    rows = torch.cat([torch.stack([t, n, torch.full_like(t, r), w], 1) for r, (t, w, n) in enumerate(parts)])
    monkeypatch.setattr(distributed, "gather", lambda own: rows)
    found = []
    for rank in range(2):
        process(rank, 2)
        found.append(distributed.positions(*parts[rank]).tolist())
    assert found == [[0, 1, -1, 2, -1, 3, -1, -1], [-1, -1, 0, -1, 1, -1, 2, 3]]


# ---- Draws -------------------------------------------------------------------------------------------


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("name", ["nano", "flow"])
def test_what_a_row_draws_does_not_depend_on_the_others(name):
    torch.manual_seed(0)
    policy = new_policy(name)
    rng = np.random.default_rng(0)
    obs = {"image": rng.integers(0, 256, (4, 64, 64, 3), np.uint8), "state": rng.normal(size=(4, 8))}
    texts = ["pick up the ketchup"] * 4
    actions, tokens, logprobs = policy.sample(obs, texts, 1.3, generators(3, 1, 4, 1))
    for rows in ([2], [3, 0]):
        some = {key: array[rows] for key, array in obs.items()}
        alone = policy.sample(some, texts[: len(rows)], 1.3, generators(*[(3, 1, 4, 1)[i] for i in rows]))
        for part, whole in zip(
            map(torch.as_tensor, alone), map(torch.as_tensor, (actions, tokens, logprobs))
        ):
            torch.testing.assert_close(part, whole[rows], atol=1e-4, rtol=1e-4)
    assert not torch.equal(tokens[0], tokens[1])


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0]).expand(4000, 4)
    tokens, logprobs = choose(logits, 0.7, generators(*range(4000)))
    shares = torch.bincount(tokens, minlength=4) / 4000
    torch.testing.assert_close(shares, (logits[0] / 0.7).softmax(0), atol=0.03, rtol=0)
    torch.testing.assert_close(logprobs, (logits / 0.7).log_softmax(1).gather(1, tokens[:, None])[:, 0])


# ---- Two processes -----------------------------------------------------------------------------------


def torchrun(folder, *words):
    """Two processes, started by torchrun."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def reward(tmp_path):
    """A reward that differs at every step, so that even two decisions teach something."""
    text = "def nearer(facts):\n    return -facts['gripper_to_object']\n"
    (tmp_path / "nearer.py").write_text(text, encoding="utf-8")
    return f"{tmp_path / 'nearer.py'}:nearer"


def test_exchanges_and_processes_without_samples(tmp_path):
    done = torchrun(tmp_path, ROOT / "tests" / "together.py", tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("printed") == 1
    two = torch.load(tmp_path / "two.pt")
    one = {
        "alone": learn([1, 1, 1, NO], [NO, NO]),
        "uneven": learn([1, NO, 2, NO], minibatch_size=3, micro_batch_size=2),
        "early": learn([1, NO, 2, NO], target_kl=1e-12, update_epochs=3),
    }
    for name, (facts, parameters) in one.items():
        found, learnt = two[name]
        for same in ("kept", "zero_std", "totals"):
            assert sorted(found[same]) == sorted(facts[same])
        assert found["totals"] == facts["totals"]
        rounding = {"logprob_gap": 0.0, "entropy": pytest.approx(facts["logs"]["entropy"], abs=1e-3)}
        assert found["logs"] | rounding == pytest.approx(facts["logs"] | {"logprob_gap": 0.0}, abs=1e-5)
        torch.testing.assert_close(learnt, parameters, atol=1e-6, rtol=0)


def tensors(run, file):
    return safetensors.torch.load_file(run / "checkpoints" / file)


def assert_same_learning(run, other):
    final = [f"final/{path.name}" for path in (run / "checkpoints" / "final").glob("*.safetensors")]
    assert final
    for file in (*final, "latest/trained.safetensors", "latest/optimizer.safetensors"):
        a, b = tensors(run, file), tensors(other, file)
        assert a.keys() == b.keys()
        differences = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
        assert differences.max() < 1e-6 and (differences < 3e-8).float().mean() > 0.99


def assert_it_learnt(run):
    moments = tensors(run, "latest/optimizer.safetensors")
    assert max(value.abs().max() for name, value in moments.items() if name.endswith("exp_avg")) > 1e-3


def results_of_the_same_files(*folders):
    """``result.json`` of runs that have left files of the same names, one of TensorBoard's each too."""
    names = [sorted(path.name.split(".")[0] for path in folder.iterdir()) for folder in folders]
    assert names == [names[0]] * len(names)
    return [read_json(folder / "result.json") for folder in folders]


@pytest.mark.slow
@pytest.mark.parametrize("script", OWN)
def test_two_processes_learn_what_one_does(script, tmp_path, execute, reward):
    flags = TINY | OWN[script] | {"reward": reward}
    execute(script, **flags, run_dir=tmp_path / "one")
    done = torchrun(tmp_path, ROOT / f"{script}.py", *words_of(flags | {"run_dir": tmp_path / "two"}))
    assert done.returncode == 0, done.stderr
    assert_same_learning(tmp_path / "one", tmp_path / "two")
    assert_it_learnt(tmp_path / "two")
    assert done.stdout.count("parameters") == 1 and done.stdout.count("iteration 2") == 1
    one, two = results_of_the_same_files(tmp_path / "one", tmp_path / "two")
    assert one | {"wall_s": 0} == two | {"wall_s": 0}


LARGE = {"policy": "openvla-oft", "train": "all", "max_episode_steps": 16, "device": "cpu"}


@pytest.fixture
def demos(tmp_path):
    """Three demonstrations of random motion."""
    (tmp_path / "demos").mkdir()
    write_demos(tmp_path / "demos" / "LiberoObject_4_demo.hdf5", (9, 6, 5))
    return tmp_path / "demos"


IMITATION = {
    "num_iterations": 3, "iteration_steps": 2, "episodes": 2, "early_stop": 1, "eval_episodes": 1,
    "eval_every": 2, "max_episode_steps": 16, "num_threads": 1, "learning_rate": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "minibatch_size"),
    [pytest.param(*some, marks=pytest.mark.slow) for some in (("nano", 5), ("nano", 1), ("flow", 5))],
)
def test_two_processes_imitate_what_one_does(policy, minibatch_size, tmp_path, execute, demos):
    """Of a minibatch of 5 one has 2 samples; of one of 1 it has none."""
    flags = IMITATION | {"policy": policy, "minibatch_size": minibatch_size, "demos": demos}
    execute("sft_vla", **flags, run_dir=tmp_path / "one")
    done = torchrun(tmp_path, ROOT / "sft_vla.py", *words_of(flags | {"run_dir": tmp_path / "two"}))
    assert done.returncode == 0, done.stderr
    assert_same_learning(tmp_path / "one", tmp_path / "two")
    assert_it_learnt(tmp_path / "two")
    assert done.stdout.count("parameters") == 1 and done.stdout.count("held-out loss was lowest") == 1
    one, two = results_of_the_same_files(tmp_path / "one", tmp_path / "two")
    assert two["best"]["nll"] == pytest.approx(one["best"].pop("nll"), abs=1e-5) and two["best"].pop("nll")
    assert one | {"wall_s": 0} == two | {"wall_s": 0}


@pytest.mark.slow
@pytest.mark.parametrize("script", ["grpo_vla", "tgrpo_vla", "ppo_vla", "tpo_vla", "sft_vla"])
def test_two_processes_that_share_a_policy_learn_what_one_does(script, tmp_path, execute, reward, demos):
    """With numbers of micro-batches that differ; of behaviour cloning's minibatches one has no sample."""
    online = TINY | OWN.get(script, {}) | {"reward": reward, "micro_batch_size": 1}
    flags = IMITATION | {"demos": demos, "minibatch_size": 1} if script == "sft_vla" else online
    flags |= LARGE | {"checkpoint": write_tiny(tmp_path / "tiny")}
    execute(script, **flags, run_dir=tmp_path / "one")
    done = torchrun(tmp_path, ROOT / f"{script}.py", *words_of(flags | {"run_dir": tmp_path / "two"}))
    assert done.returncode == 0, done.stderr
    assert_same_learning(tmp_path / "one", tmp_path / "two")
    assert_it_learnt(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("spread", [False, True])
def test_two_processes_go_on_where_one_stopped(spread, tmp_path, execute, reward, monkeypatch):
    """TGRPO, as good as from the start."""
    flags = TINY | {"reward": reward}
    flags |= LARGE | {"checkpoint": write_tiny(tmp_path / "tiny")} if spread else {}
    execute("tgrpo_vla", **flags, run_dir=tmp_path / "one")
    save = checkpoints.save_training_state

    def save_and_stop(*given):
        save(*given)
        if given[-1]["iteration"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "save_training_state", save_and_stop)
        execute("tgrpo_vla", **flags, run_dir=tmp_path / "two")
    done = torchrun(tmp_path, ROOT / "tgrpo_vla.py", "--resume", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert_same_learning(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_process_that_dies_ends_all(tmp_path):
    text = "import os\n\ndef fragile(facts):\n    if os.environ['RANK'] == '1':\n"
    text += "        raise KeyError('last words')\n    return 0.0\n"
    (tmp_path / "fragile.py").write_text(text, encoding="utf-8")
    flags = TINY | {"reward": f"{tmp_path / 'fragile.py'}:fragile", "run_dir": tmp_path / "run"}
    start = time.perf_counter()
    done = torchrun(tmp_path, ROOT / "tgrpo_vla.py", *words_of(flags))
    assert time.perf_counter() - start < 60
    assert done.returncode != 0 and "last words" in done.stderr
    assert not (tmp_path / "run" / "result.json").exists()
