"""OpenVLA-OFT's checkpoints with an action head: what they decide, what is read, what is refused.

Checkpoints are tiny, random, and in the published format.
"""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_openvla import Q01, Q99, SENTENCES, write_tiny

import grpo_vla
import ppo_vla
import sft_vla
import tgrpo_vla
from vla_envs import robustness
from vla_envs.files import read_json
from vla_envs.policies import load_policy
from vla_envs.policies.images import openvla_pixels
from vla_envs.policies.openvla import RegressionPolicy
from vla_envs.policies.openvla.regression import action_head, proprio_projector
from vla_envs.policies.protocol import cameras_of

SCRIPTS = {"tgrpo": tgrpo_vla, "grpo": grpo_vla, "ppo": ppo_vla, "sft": sft_vla}
LOW = np.array([-0.4, -0.3, 0.8, 2.7, -1.2, -0.6, 0.0, -0.04])
HIGH = np.array([0.2, 0.3, 1.4, 3.7, 1.2, 0.6, 0.04, 0.0])


def write_parts(folder, width=32, prefix="module."):
    """A random action head and projector of the state, as a distributed training saves them."""
    torch.manual_seed(3)
    for name, part in {
        "action_head": action_head(width),
        "proprio_projector": proprio_projector(width),
    }.items():
        tensors = {prefix + key: torch.randn_like(value) * 0.3 for key, value in part.state_dict().items()}
        torch.save(tensors, folder / f"{name}--150000_checkpoint.pt")


def write_oft(folder):
    write_tiny(folder)
    write_parts(folder)
    file = folder / "dataset_statistics.json"
    stored = json.loads(file.read_text())["libero_object"]
    stored["proprio"] = {"q01": LOW.tolist(), "q99": HIGH.tolist()}
    file.write_text(json.dumps({"libero_object_no_noops": stored}))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_oft(tmp_path_factory.mktemp("oft") / "tiny")


@pytest.fixture
def broken(tmp_path):
    return write_oft(tmp_path / "tiny")


@pytest.fixture
def policy(tiny):
    return load_policy("openvla-oft", tiny, suite="LiberoObject")


def observations(count, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (2, count, 8, 8, 3), dtype=np.uint8)
    image, wrist_image = coarse.repeat(8, axis=2).repeat(8, axis=3)
    state = rng.uniform(LOW - 0.2, HIGH + 0.2, (count, 8)).astype(np.float32)  # some beyond the quantiles
    return {"image": image, "wrist_image": wrist_image, "state": state}


# ---- What it decides -----------------------------------------------------------------------------------


@torch.no_grad()
def test_actions_written_out(policy):
    """The sequence piece by piece, and the head one control step and one layer at a time, in float64."""
    policy.double()
    policy.dtype = torch.float64
    obs = observations(2)
    mine, tokens, logprobs = policy.sample(obs, SENTENCES[:1] * 2)
    assert mine.shape == (2, 8, 7) and mine.dtype == np.float32 and tokens.numel() == logprobs.numel() == 0
    words = policy.language_model.model.embed_tokens
    head = policy.action_head.state_dict()

    def norm(x, name):
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5) ** 0.5
        return x * head[f"model.{name}.weight"] + head[f"model.{name}.bias"]

    def linear(x, name):
        return head[f"model.{name}.weight"] @ x + head[f"model.{name}.bias"]

    for i in range(2):
        ids = torch.tensor([policy.prompt(SENTENCES[0])])
        seen = []
        for name in ("image", "wrist_image"):
            pixels = openvla_pixels(obs[name][i : i + 1], 28).double()
            seen.append(policy.project(policy.features(pixels)))
        state = np.clip(2 * (obs["state"][i].astype(float) - LOW) / (HIGH - LOW) - 1, -1, 1)
        projector = policy.proprio_projector.state_dict()
        state = projector["fc1.weight"] @ torch.from_numpy(state) + projector["fc1.bias"]
        state = state * 0.5 * (1 + torch.erf(state / 2**0.5))
        state = projector["fc2.weight"] @ state + projector["fc2.bias"]
        pieces = [words(ids[:, :1]), *seen, state.view(1, 1, 32), words(ids[:, 1:])]
        pieces += [torch.zeros(1, 56, 32), words(torch.tensor([[2]]))]
        whole = policy.language_model.model(inputs_embeds=torch.cat(pieces, dim=1), is_causal=False)
        start = 4 + 4 + 1 + ids.shape[1] - 1  # the last word; two images of four patches, and the state
        hidden = whole.last_hidden_state[0, start : start + 56]
        for step in range(8):
            x = linear(norm(hidden[7 * step : 7 * step + 7].flatten(), "layer_norm1"), "fc1").clamp(min=0)
            for block in ("mlp_resnet_blocks.0.ffn", "mlp_resnet_blocks.1.ffn"):
                x = x + linear(norm(x, f"{block}.0"), f"{block}.1").clamp(min=0)
            x = linear(norm(x, "layer_norm2"), "fc2").numpy()
            expected = np.append((x[:6] + 1) / 2 * (np.array(Q99) - Q01)[:6] + Q01[:6], 1 - 2 * (x[6] > 0.5))
            np.testing.assert_allclose(mine[i, step], expected, atol=1e-5)


def test_each_input_matters_and_chance_does_not(policy):
    obs = observations(1)
    base = policy.sample(obs, SENTENCES[:1], 0.0)[0]
    assert np.array_equal(policy.sample(obs, SENTENCES[:1], 1.6)[0], base)
    for name, other in observations(1, seed=1).items():
        assert np.abs(policy.sample(obs | {name: other}, SENTENCES[:1])[0] - base).max() > 1e-3, name
    assert np.abs(policy.sample(obs, SENTENCES[1:2])[0] - base).max() > 1e-3
    swapped = obs | {"image": obs["wrist_image"], "wrist_image": obs["image"]}
    assert np.abs(policy.sample(swapped, SENTENCES[:1])[0] - base).max() > 1e-3


def test_a_batch_of_mixed_prompts_equals_each_alone(policy):
    obs = observations(3)
    together = policy.sample(obs, SENTENCES)[0]
    policy.rollout_batch = 2
    np.testing.assert_allclose(policy.sample(obs, SENTENCES)[0], together, atol=1e-5)
    for i in range(3):
        mine = {name: torch.from_numpy(array[i : i + 1]) for name, array in obs.items()}
        np.testing.assert_allclose(policy.sample(mine, SENTENCES[i : i + 1])[0][0], together[i], atol=1e-5)


def test_half_precision(tiny):
    """What a GPU does."""
    policy = RegressionPolicy.load(tiny, dtype=torch.bfloat16)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    actions = policy.sample(observations(3), SENTENCES)[0]
    exact = RegressionPolicy.load(tiny).sample(observations(3), SENTENCES)[0]
    assert np.abs(actions - exact)[..., :6].max() < 0.1


# ---- Scripts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["grpo_vla", "sft_vla"])
def test_a_script_evaluates_it(script, tiny, execute, tmp_path):
    with pytest.raises(SystemExit) as ended:
        execute(
            script, policy="openvla-oft", checkpoint=tiny, evaluate=None, eval_episodes=2,
            max_episode_steps=8, num_threads=1, device="cpu", run_dir=tmp_path / "run",
        )  # fmt: skip
    assert not ended.value.code
    result = read_json(tmp_path / "run" / "result.json")
    assert result["success"]["trials"] == 2 and "sampled" not in result
    assert read_json(tmp_path / "run" / "args.json")["action_chunk"] == 8


def test_robustness_plays_it(tiny, tmp_path):
    page = robustness.main(
        robustness.Args(
            policy="openvla-oft", checkpoints=(tiny,), task_ids=(4,), axes=("light",), levels=(2,),
            episodes=1, max_episode_steps=8, num_threads=1, out=tmp_path / "out",
        )
    )  # fmt: skip
    assert "light" in page


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_it_is_not_trained(script, tiny):
    def refused(**given):
        with pytest.raises(ValueError, match="regression without log-probabilities") as error:
            script.validate(script.Args(policy="openvla-oft", checkpoint=tiny, **given))
        assert str(tiny) in str(error.value)
        return str(error.value)

    said = refused()
    assert said.endswith("expected --evaluate, or python -m vla_envs.robustness")
    assert "one way of playing" in refused(evaluate=True, eval_temperature=1.0)
    assert "train is lora" in refused(evaluate=True, train="lora")
    args = script.validate(script.Args(policy="openvla-oft", checkpoint=tiny, evaluate=True))
    assert args.eval_temperature == 0.0


def test_there_is_nothing_to_learn_from(policy):
    assert cameras_of(policy) == ("image", "wrist_image") and policy.action_chunk == 8
    for ask in (
        lambda: policy.score(observations(1), SENTENCES[:1], torch.zeros(1, 0)),
        lambda: policy.imitation_loss(observations(1), SENTENCES[:1], torch.zeros(1, 8, 7)),
    ):
        with pytest.raises(ValueError, match="no log-probabilities: it is evaluated, not trained"):
            ask()


# ---- Files ---------------------------------------------------------------------------------------------


def refusal(checkpoint, name="openvla-oft", device="meta"):
    with pytest.raises(ValueError) as error:
        load_policy(name, checkpoint, device, suite="LiberoObject")
    message = str(error.value)
    assert len(message.splitlines()) == 1 and str(checkpoint) in message
    return message


def test_it_is_recognised_by_its_files(broken):
    assert load_policy("openvla-oft", broken, "meta").action_head["model"].fc1.weight.is_meta
    assert "expected --policy openvla-oft" in refusal(broken, "openvla")
    write_parts(broken, prefix="")  # of one process
    assert isinstance(load_policy("openvla-oft", broken), RegressionPolicy)
    for file in broken.glob("*.pt"):
        file.unlink()
    assert not isinstance(load_policy("openvla-oft", broken), RegressionPolicy)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "noisy_action_projector",
            "denoises its actions (a diffusion head), as its noisy_action_projector--1",
        ),
        (
            "vision_backbone",
            "shows the instruction to its vision transformers (FiLM), as its vision_backbone",
        ),
        ("proprio_projector", "['proprio_projector--150000_checkpoint.pt', 'proprio_projector--1_checkpoint"),
    ],
)
def test_files_that_are_too_many(broken, name, words):
    torch.save({}, broken / f"{name}--1_checkpoint.pt")
    assert words in refusal(broken)


@pytest.mark.parametrize("name", ["action_head", "proprio_projector"])
def test_a_part_that_is_missing_or_does_not_fit(broken, name):
    file = broken / f"{name}--150000_checkpoint.pt"
    tensors = torch.load(file, weights_only=True)
    key = next(key for key in tensors if key.endswith("fc1.weight"))
    short = key.removeprefix("module.")
    for changed, words in (
        (tensors | {key: torch.zeros(5, 4)}, f"{short} in its {file.name} has shape (5, 4); expected (32, "),
        ({k: v for k, v in tensors.items() if k != key}, f"{short} in its {file.name} has shape None"),
        (tensors | {"module.extra": torch.zeros(2)}, "has shape (2,); expected None"),
        (tensors | {key: 5}, "has shape None; expected"),
        ([], f"{file.name} is damaged, or holds more than tensors: AttributeError"),
    ):
        torch.save(changed, file)
        assert words in refusal(broken)
    file.write_bytes(b"nonsense")
    assert f"{file.name} is damaged, or holds more than tensors" in refusal(broken)
    torch.save(tensors | {key: tensors[key] * float("nan")}, file)
    assert f"not finite in {name}.{short}" in refusal(broken, device="cpu")
    file.unlink()
    words = f"of {name}--*_checkpoint.pt it has []; expected one file"
    assert words in refusal(broken)


class Opens:
    def __reduce__(self):
        return open, ("executed", "w")


def test_no_pickle_is_executed(broken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = broken / "action_head--150000_checkpoint.pt"
    for write in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2))):
        write({"module.model.fc1.weight": Opens()}, file)
        assert "holds more than tensors: UnpicklingError" in refusal(broken)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("proprio", "words"),
    [
        (None, "the proprio of libero_object_no_noops in its dataset_statistics.json is None"),
        ({"q01": [0.0] * 7, "q99": [1.0] * 7}, "expected 8 finite numbers"),
        ({"q01": [1.0] * 8, "q99": [0.0] * 8}, "expected at most q99"),
    ],
    ids=str,
)
def test_statistics_of_the_state(broken, proprio, words):
    file = broken / "dataset_statistics.json"
    stored = json.loads(file.read_text())
    stored["libero_object_no_noops"]["proprio"] = proprio
    file.write_text(json.dumps(stored))
    assert words in refusal(broken)


def test_the_suite_decides_between_statistics(broken, capsys):
    file = broken / "dataset_statistics.json"
    its = json.loads(file.read_text())["libero_object_no_noops"]
    other = its | {"proprio": {"q01": (LOW - 1).tolist(), "q99": HIGH.tolist()}}
    file.write_text(json.dumps({"libero_goal_no_noops": other, "libero_object_no_noops": its}))
    for suite, expected in (("LiberoGoal", LOW - 1), ("LiberoObject", LOW)):
        assert load_policy("openvla-oft", broken, "meta", suite=suite).q01_state.tolist() == expected.tolist()
    file.write_text(json.dumps({"libero_goal_no_noops": other}))
    load_policy("openvla-oft", broken, "meta", suite="LiberoObject")
    assert capsys.readouterr().out.count("is played with action statistics of libero_goal_no_noops") == 1


def test_the_wrists_image_is_asked_for(policy):
    obs = observations(1)
    del obs["wrist_image"]
    with pytest.raises(ValueError, match="no wrist_image; expected environments with wrist_camera=True"):
        policy.sample(obs, SENTENCES[:1])
