"""One's own policy, ``path/to/file.py:function``: the page that builds one, and mistakes."""

import json
import re

import numpy as np
import pytest
import torch
from artifacts import ROOT, write_demos

from vla_envs.policies import Policy, load_policy, new_policy, save_policy
from vla_envs.policies.adapters import make_trainable
from vla_envs.training.checkpoints import load_training_state, save_training_state
from vla_envs.training.runs import Meter

PAGE = (ROOT / "docs" / "own-policy.md").read_text(encoding="utf-8")
CODE = re.search(r"```python\n(.*?)```", PAGE, re.S).group(1)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write the page's file with changes, and work beside it."""
    monkeypatch.chdir(tmp_path)

    def write(*changes):
        code = CODE
        for old, new in changes:
            assert old in code
            code = code.replace(old, new)
        (tmp_path / "cnn.py").write_text(code, encoding="utf-8")
        return "cnn.py:make"

    return write


def observations(count, size=64):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    return {"image": image, "state": rng.normal(size=(count, 8)).astype(np.float32)}


def test_the_built_in_policies_have_the_protocols_members():
    for name in ("nano", "flow"):
        assert isinstance(new_policy(name), Policy)


def test_it_is_saved_and_loaded(write, tmp_path):
    name = write()
    policy = new_policy(name)
    policy.made_for = {"LiberoObject": [4]}
    save_policy(policy, name, tmp_path / "final")
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config == {"policy": "cnn.py:make", "made_for": {"LiberoObject": [4]}}
    loaded = load_policy(name, tmp_path / "final")
    assert loaded.made_for == {"LiberoObject": [4]}
    torch.testing.assert_close(loaded.state_dict(), policy.state_dict(), rtol=0, atol=0)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cnn.py").rename(tmp_path / "elsewhere" / "cnn.py")
    load_policy("elsewhere/cnn.py:make", tmp_path / "final")
    with pytest.raises(ValueError, match=r"its config\.json is of policy 'cnn\.py:make'"):
        load_policy("nano", tmp_path / "final")


def test_what_it_describes_makes_it_again(write, tmp_path):
    name = write(
        ("def __init__(self):\n", "def __init__(self, width=9):\n"),
        ("def make():\n    return GaussianCNN()", "def make(width=9):\n    return GaussianCNN(width)"),
        ("super().__init__()\n", "super().__init__()\n        self.extra = nn.Linear(width, 2)\n"),
        (
            "    def score(",
            '    def describe(self):\n        return {"width": self.extra.in_features}\n\n    def score(',
        ),
    )
    save_policy(new_policy(name, {"width": 5}), name, tmp_path / "final")
    assert load_policy(name, tmp_path / "final").extra.in_features == 5


def test_tied_weights_are_saved(write, tmp_path):
    """safetensors refuses tensors of one storage."""
    tied = "self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)\n        self.b.weight = self.a.weight\n"
    name = write(("super().__init__()\n", f"super().__init__()\n        {tied}"))
    policy = new_policy(name)
    save_policy(policy, name, tmp_path / "final")
    loaded = load_policy(name, tmp_path / "final")
    assert loaded.b.weight is loaded.a.weight
    torch.testing.assert_close(loaded.state_dict(), policy.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("train", ["lora", "all"])
def test_what_is_trained_of_it(write, train):
    policy = make_trainable(new_policy(write()), train, rank=2)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in policy.named_parameters() if train == "all" or "lora_" in name}
    layers = {name.split(".lora_")[0] for name in trained}
    assert train == "all" or layers == {"body.0", "mean"}
    logprobs, _, _ = policy.score(observations(2), ["pick"] * 2, torch.zeros(2, 56))
    logprobs.sum().backward()


def test_what_it_has_not(write):
    policy = new_policy(write())
    with pytest.raises(ValueError, match="has no head; expected --train all or lora"):
        make_trainable(policy, "head")
    with pytest.raises(ValueError, match="has no blocks; expected --train all or lora"):
        make_trainable(policy, "lora+last-k")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("    def score(", "    def scores(")], "has no score; expected action_chunk, image_size,"),
        ([("action_chunk, image_size, hidden_size = 8, 64, 128", "action_chunk, hidden_size = 8, 128")],
         "has no image_size"),
        ([("(self.action_chunk, 7)", "(7, self.action_chunk)")],
         r"sample returns actions of \(2, 7, 8\); expected \(2, 8, 7\)"),
        ([("return normal.log_prob(tokens), normal.entropy(), hidden",
           "return normal.log_prob(tokens).sum(1, keepdim=True), normal.entropy(), hidden")],
         r"score returns log-probabilities of \(2, 1\); expected \(2, 56\)"),
        ([("return normal.log_prob(tokens), normal.entropy(), hidden",
           "return normal.log_prob(tokens + 1), normal.entropy(), hidden")],
         "score gives the tokens of sample other log-probabilities"),
        ([(".astype(np.float32), tokens, normal.log_prob(tokens)", ".astype(np.float32), tokens")],
         "sample returns .*; expected actions, tokens and log-probabilities"),
        ([("normal.entropy(), hidden", "normal.entropy(), hidden[:, :5]")],
         r"score returns hidden states of \(2, 5\); expected \(2, 128\)"),
        ([(".to(normal.mean)).mean()", ".to(normal.mean))")], r"imitation_loss returns a loss of \(2, 56\)"),
        ([("nn.Linear(32 * 16 + 8", "nn.Linear(32 * 16 + 9")], "sample fails: RuntimeError"),
        ([("def make():\n    return GaussianCNN()", "def make():\n    return 3")], "is a int; expected"),
        ([("def make():\n    return GaussianCNN()", "def make():\n    return 1 / 0")], "ZeroDivisionError"),
        ([("    @torch.no_grad()\n", ""), ("actions.cpu()", "actions.detach().cpu()")],
         "sample returns gradients; expected it under torch.no_grad"),
        ([("    def score(", "    def describe(self):\n        return {'a': np.int64(1)}\n\n    def score(")],
         "describe returns what JSON cannot hold"),
        ([("    def score(", "    def describe(self):\n        return {'policy': 'x'}\n\n    def score(")],
         "expected a dictionary without 'policy'"),
        ([("def make():", "def maker():")], "has no function 'make'.*did you mean 'maker'"),
        ([("import numpy as np", "import numpie as np")], "does not run: ModuleNotFoundError"),
        ([("-1.0))\n", "-1.0))\n        self.action_chunk = 8.0\n")],
         "action_chunk is 8.0; expected a whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_mistake_is_one_line(write, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        new_policy(write(*changes))
    assert len(str(error.value).splitlines()) == 1 and "cnn.py" in str(error.value)


def test_no_such_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"policy file 'cnn\.py' does not exist"):
        new_policy("cnn.py:make")


def test_dropout_and_statistics_are_left_alone(write):
    """It is tried out as it plays, not as it trains."""
    name = write(("nn.Tanh())", "nn.Tanh(), nn.BatchNorm1d(128), nn.Dropout(0.5))"))
    policy = new_policy(name)
    assert policy.training and policy.body[2].num_batches_tracked == 0
    Meter().end_update(policy, ["pick"])
    assert policy.training and policy.body[2].num_batches_tracked == 0


def test_what_lies_beside_it_may_be_imported_late(write, tmp_path):
    (tmp_path / "beside_it.py").write_text("WIDTH = 5\n", encoding="utf-8")
    name = write(("def make():\n", "def make():\n    import beside_it\n\n    assert beside_it.WIDTH == 5\n"))
    assert new_policy(name).hidden_size == 128


def test_statistics_come_back_with_the_weights(write, tmp_path):
    policies = [new_policy(write(("nn.Tanh())", "nn.Tanh(), nn.BatchNorm1d(128))"))) for _ in range(2)]
    optimizers = [torch.optim.AdamW(policy.parameters()) for policy in policies]
    policies[0].train().score(observations(4), ["pick"] * 4, torch.zeros(4, 56))
    assert policies[0].body[2].num_batches_tracked == 1
    save_training_state(tmp_path / "latest", policies[0], optimizers[0], {})
    load_training_state(tmp_path / "latest", policies[1], optimizers[1])
    torch.testing.assert_close(policies[1].state_dict(), policies[0].state_dict(), rtol=0, atol=0)


TINY = {
    "num_iterations": 2, "eval_episodes": 2, "eval_every": 0, "max_episode_steps": 24, "num_threads": 1,
    "task_id": 4,
}  # fmt: skip


def test_the_page_trains_it(write, execute, tmp_path):
    """Imitation, RL from its checkpoint, a run that is resumed, and an evaluation; a critic reads it too."""
    name = write()
    nearer = "def nearer(facts):\n    return -facts['gripper_to_object']\n"  # differs at every step
    (tmp_path / "nearer.py").write_text(nearer, encoding="utf-8")
    (tmp_path / "demos").mkdir()
    write_demos(tmp_path / "demos" / "LiberoObject_4_demo.hdf5", (9, 6, 5))
    imitation = TINY | {
        "policy": name,
        "demos": tmp_path / "demos",
        "iteration_steps": 2,
        "minibatch_size": 4,
    }
    execute("sft_vla", **imitation, run_dir=tmp_path / "sft")
    start = tmp_path / "sft" / "checkpoints" / "final"
    for script, extra in (
        ("tgrpo_vla", {}),
        ("ppo_vla", {"critic_warmup": 1}),
        ("grpo_vla", {"train": "lora"}),
    ):
        own = {"policy": name, "checkpoint": start, "num_groups": 1, "group_size": 2, "minibatch_size": 4}
        own["reward"] = "nearer.py:nearer"
        if script == "grpo_vla":
            own |= {"keep_low": 0.0, "keep_high": 1.0, "max_rounds": 1}
        execute(script, **TINY, **own, **extra, run_dir=tmp_path / script)
        assert (tmp_path / script / "checkpoints" / "final" / "model.safetensors").is_file()
    trained, before = (
        load_policy(name, run / "checkpoints" / "final") for run in (tmp_path / "tgrpo_vla", tmp_path / "sft")
    )
    assert not torch.equal(trained.mean.weight, before.mean.weight)
    evaluation = {"evaluate": None, "checkpoint": tmp_path / "tgrpo_vla" / "checkpoints" / "final"}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cnn.py").rename(tmp_path / "elsewhere" / "cnn.py")
    evaluation |= {
        "policy": "elsewhere/cnn.py:make",
        "compare": tmp_path / "ppo_vla" / "checkpoints" / "final",
    }
    with pytest.raises(SystemExit) as exit_:
        execute("tgrpo_vla", **TINY | evaluation, run_dir=tmp_path / "evaluation")
    assert not exit_.value.code
    resumed = {"resume": tmp_path / "tgrpo_vla", "policy": "elsewhere/cnn.py:make", "num_iterations": 3}
    execute("tgrpo_vla", **resumed)
    assert (
        json.loads((tmp_path / "tgrpo_vla" / "checkpoints/latest/counters.json").read_text())["iteration"]
        == 3
    )
    assert json.loads((tmp_path / "evaluation" / "result.json").read_text())["success"]["trials"] == 2
