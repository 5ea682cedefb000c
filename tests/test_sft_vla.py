"""Behaviour cloning: how demonstrations are read, the loss, and the script."""

import json
import math
import runpy
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sft_vla
from vla_envs.policies import load_policy
from vla_envs.policies.nano import NanoConfig, NanoPolicy

ROOT = Path(__file__).parent.parent
SMALL = NanoConfig(action_chunk=2, image_size=32, width=16, depth=1, heads=2)
SENTENCE = "pick up the ketchup and place it in the basket"


def write_demos(path, lengths=(5, 3), size=32, labels=True, seed=0):
    """A file as LIBERO's data sets have it; what is in each demonstration."""
    rng, demos = np.random.default_rng(seed), []
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": SENTENCE})
        for k, length in enumerate(lengths):
            demo = {
                "actions": rng.uniform(-1, 1, (length, 7)),
                "obs/agentview_rgb": rng.integers(0, 256, (length, size, size, 3), dtype=np.uint8),
                "obs/ee_states": rng.standard_normal((length, 6)),
                "obs/gripper_states": rng.standard_normal((length, 2)),
            }
            if labels:
                demo["expert_actions"] = rng.uniform(-1, 1, (length, 7))
            for name, array in demo.items():
                data[f"demo_{k}/{name}"] = array
            demos.append(demo)
    return demos


# ---- Reading demonstrations --------------------------------------------------------------------------


def test_samples_by_hand(tmp_path):
    first, second = write_demos(tmp_path / "x.hdf5", lengths=(5, 3))
    samples = sft_vla.load_demonstrations(tmp_path / "x.hdf5", 2, chunk=4)
    assert samples["instruction"] == SENTENCE
    assert samples["image"].shape == (8, 32, 32, 3) and samples["image"].dtype == np.uint8
    assert samples["state"].shape == (8, 8) and samples["actions"].shape == (8, 4, 7)
    expected = first["expert_actions"]
    np.testing.assert_array_equal(samples["actions"][0], expected[0:4])
    np.testing.assert_array_equal(samples["actions"][3], expected[[3, 4, 4, 4]])  # the last one is repeated
    np.testing.assert_array_equal(samples["actions"][5], second["expert_actions"][[0, 1, 2, 2]])
    np.testing.assert_array_equal(samples["state"][6, :6], second["obs/ee_states"][1])
    np.testing.assert_array_equal(samples["state"][6, 6:], second["obs/gripper_states"][1])
    stored = first["obs/agentview_rgb"][2]
    np.testing.assert_array_equal(samples["image"][2], np.rot90(stored, 2))  # turned by 180 degrees


def test_demonstrations_without_labels(tmp_path):
    """LIBERO's own data sets hold only the executed actions."""
    demo = write_demos(tmp_path / "x.hdf5", lengths=(3,), labels=False)[0]
    samples = sft_vla.load_demonstrations(tmp_path / "x.hdf5", 1, chunk=1)
    np.testing.assert_array_equal(samples["actions"][:, 0], demo["actions"])


def test_only_as_many_as_asked_for(tmp_path):
    write_demos(tmp_path / "x.hdf5", lengths=(5, 3, 4))
    assert len(sft_vla.load_demonstrations(tmp_path / "x.hdf5", 2, chunk=2)["actions"]) == 8


def test_files_that_will_not_do(tmp_path):
    write_demos(tmp_path / "few.hdf5", lengths=(2,))
    h5py.File(tmp_path / "empty.hdf5", "w").close()
    (tmp_path / "text.hdf5").write_text("no HDF5")
    with h5py.File(tmp_path / "gap.hdf5", "w") as file:
        file.create_group("data/demo_0")
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": SENTENCE})
    for name, episodes, words in (
        ("absent.hdf5", 1, "vla_envs.experts"),
        ("few.hdf5", 2, "1 demonstrations"),
        ("empty.hdf5", 1, "layout"),
        ("text.hdf5", 1, "text"),
        ("gap.hdf5", 1, "demo_0"),
    ):
        with pytest.raises((ValueError, OSError), match=words) as error:
            sft_vla.load_demonstrations(tmp_path / name, episodes, 2)
        assert str(tmp_path / name) in str(error.value) and len(str(error.value).splitlines()) == 1, name


# ---- The loss ----------------------------------------------------------------------------------------


def samples_of(count=6, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        "state": rng.standard_normal((count, 8)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (count, 2, 7)),
        "instruction": ["pick up the milk", SENTENCE] * (count // 2),
    }


def test_the_loss_of_a_policy_that_knows_nothing():
    policy = NanoPolicy(SMALL)
    torch.nn.init.zeros_(policy.head.weight)
    loss = sft_vla.loss_of(policy, samples_of(), np.array([0, 3, 3]))
    assert loss.item() == pytest.approx(math.log(256), abs=1e-5)


def test_the_loss_is_the_cross_entropy_of_the_demonstrated_tokens():
    torch.manual_seed(0)
    policy, samples, inds = NanoPolicy(SMALL), samples_of(), [1, 4]
    with torch.no_grad():
        obs = {name: samples[name][inds] for name in ("image", "state")}
        logits = policy(policy.prepare(obs, [samples["instruction"][i] for i in inds]))[0]  # (2, 2, 7, 256)
    total = 0.0
    for b, i in enumerate(inds):
        for c in range(2):
            for d in range(7):
                token = int((samples["actions"][i, c, d] + 1) * 128)  # 256 bins over [-1, 1]
                total += float(logits[b, c, d].logsumexp(0) - logits[b, c, d, token])
    assert sft_vla.loss_of(policy, samples, np.array(inds)).item() == pytest.approx(total / 28, abs=1e-4)


def test_the_loss_can_be_brought_down():
    torch.manual_seed(0)
    policy, samples = NanoPolicy(SMALL), samples_of()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = sft_vla.loss_of(policy, samples, np.arange(6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5 and losses[-1] < 1


# ---- The script --------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Run the script in this process on two tiny files of demonstrations, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demos").mkdir()
    write_demos(tmp_path / "demos" / "LiberoObject_4_demo.hdf5", lengths=(9, 6), size=128)
    write_demos(tmp_path / "demos" / "LiberoObject_7_demo.hdf5", lengths=(7,), size=128, seed=1)

    def start(name, **flags):
        words = {"task_ids": (4, 7), "episodes": (2, 1), "num_steps": 4, "batch_size": 4, "eval_episodes": 0}
        words |= {"num_threads": 1, "max_episode_steps": 16, "run_dir": tmp_path / name}
        argv = ["sft_vla.py"]
        for flag, value in (words | flags).items():
            values = value if isinstance(value, tuple) else (value,)
            argv += [f"--{flag.replace('_', '-')}", *map(str, values)]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(ROOT / "sft_vla.py"), run_name="__main__")
        return tmp_path / name

    return start


def weights(run):
    return safetensors.torch.load_file(run / "checkpoints" / "final" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_import_runs_nothing(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["pytest", "--no-such-flag"])
    module = runpy.run_path(str(ROOT / "sft_vla.py"), run_name="imported")
    assert callable(module["loss_of"]) and capfd.readouterr() == ("", "")


def test_what_a_run_leaves(start):
    run = start("run", eval_episodes=2)
    result = json.loads((run / "result.json").read_text())
    assert (result["suite"], result["seed"]) == ("LiberoObject", 1) and result["wall_s"] > 0
    assert set(result["success"]) == {"4", "7"}
    for success in result["success"].values():
        assert set(success) == {"successes", "trials", "rate", "low", "high"} and success["trials"] == 2
    args = json.loads((run / "args.json").read_text())
    assert (args["task_ids"], args["episodes"], args["num_steps"]) == ([4, 7], [2, 1], 4)
    events = EventAccumulator(str(run))
    events.Reload()
    assert events.Scalars("losses/nll")[0].value == pytest.approx(math.log(256), rel=0.05)
    policy = load_policy("nano", run / "checkpoints" / "final")
    assert same(policy.state_dict(), weights(run)) and policy.config == NanoConfig()


def test_the_seed_decides(start):
    first, second, third = start("first"), start("second"), start("third", seed=2)
    assert same(weights(first), weights(second)) and not same(weights(first), weights(third))


def test_a_run_can_start_from_a_checkpoint(start):
    first = start("first")
    second = start("second", checkpoint=first / "checkpoints" / "final", learning_rate=1e-12)
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(second)[name], value, atol=1e-6, rtol=0)
    assert not same(weights(first), load_policy("nano").state_dict())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"policy": "nanoo"}, "nano"),
        ({"checkpoint": "/no/such/folder"}, "/no/such/folder"),
        ({"demos": "/no/such/folder"}, "vla_envs.experts"),
        ({"suite": "LiberoObjekt"}, "LiberoObjekt"),
        ({"task_ids": (4, 11)}, "11"),
        ({"task_ids": ()}, "task"),
        ({"episodes": (2, 1, 1)}, "3"),
        ({"episodes": (2, 2)}, "1 demonstrations"),
        ({"episodes": (0,)}, "episodes"),
        ({"num_steps": 0}, "num_steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"eval_episodes": 51}, "51"),
        ({"seed": -1}, "seed"),
        ({"learning_rate": "fast"}, "learning-rate"),
        ({"learning_rate": "nan"}, "learning_rate"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(start, capfd, flags, words):
    with pytest.raises(SystemExit) as exit_:
        start("run", **flags)
    error = capfd.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error:") and len(error.splitlines()) == 1, error
    assert words in error and not Path("run").exists()
