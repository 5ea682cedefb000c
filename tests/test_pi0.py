"""pi0: parity with transformers' and LeRobot's figures, its files, bfloat16, the scripts.

The checkpoint is tiny, random and in LeRobot's format. It and the figures of the original implementations are
read from the folder that PI0_REFERENCE names (``../shared/pi0_reference``), where it is there.
"""

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from artifacts import ROOT, write_demos
from packaging.version import Version

from vla_envs.policies import count_parameters, load_policy, new_policy
from vla_envs.policies.adapters import make_trainable
from vla_envs.policies.lerobot import pi0, smolvla
from vla_envs.policies.lerobot.policy import NOISES, FlowSettings, LeRobotPolicy
from vla_envs.policies.protocol import validate

REFERENCE = Path(os.environ.get("PI0_REFERENCE", ROOT.parent / "shared" / "pi0_reference"))
START = "model.paligemma_with_expert"
WORDS = f"{START}.paligemma.model.language_model.embed_tokens.weight"
WORDS_OUT, EXPERT_OUT = f"{START}.paligemma.lm_head.weight", f"{START}.gemma_expert.lm_head.weight"


@pytest.fixture(scope="module")
def folder():
    if not (REFERENCE / "expected.npz").is_file():
        pytest.skip(f"{REFERENCE} holds no figures of the original implementations (PI0_REFERENCE)")
    return REFERENCE


@pytest.fixture(scope="module")
def expected(folder):
    with np.load(folder / "expected.npz") as file:
        return {
            key: file[key] if file[key].dtype.kind == "U" else torch.from_numpy(file[key]) for key in file
        }


def load(folder, **settings):
    return LeRobotPolicy.load("pi0", folder, **{"action_chunk": 50, "noise": "sde"} | settings)


@pytest.fixture(scope="module")
def policy(folder):
    return load(folder)


@pytest.fixture(scope="module")
def obs(expected):
    """What the environments would give where robosuite gives the reference's raw images, upside down."""
    return {
        "image": expected["raw.image"].flip(1, 2), "wrist_image": expected["raw.image2"].flip(1, 2),
        "state": expected["state_raw"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def prefix(policy, obs, expected):
    with torch.no_grad():
        return policy.prefix(obs, list(expected["raw.task"]))


@pytest.fixture
def float32_angles(monkeypatch):
    """The time's angles as transformers forms them; LeRobot and openpi form them in float64, as here."""

    def features(t, width):
        periods = 0.004 * 1000.0 ** torch.linspace(0.0, 1.0, width // 2)
        angles = t[:, None] * (1.0 / periods * 2 * math.pi)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    monkeypatch.setattr(smolvla, "time_features", features)


def close(mine, theirs, within=2e-5):
    torch.testing.assert_close(mine, theirs, atol=within, rtol=0)


# ---- The original implementations' figures -------------------------------------------------------------


@torch.no_grad()
def test_inputs_are_theirs_but_for_the_empty_camera(policy, obs, expected):
    images, masks, tokens, there, state = policy.prepare(obs, list(expected["raw.task"]))
    assert policy.cameras == ("image", "wrist_image") and masks.all()
    close(images, expected["images"][:, :2], 1e-6)
    assert torch.equal(state, expected["state"])
    length = tokens.shape[1]  # LeRobot pads to 48, which changes nothing
    assert torch.equal(there, expected["token_mask"][:, :length])
    assert not expected["token_mask"][:, length:].any()
    assert torch.equal(tokens * there, expected["tokens"][:, :length] * there)


@torch.no_grad()
def test_keys_and_values_of_the_prefix_are_theirs(policy, expected):
    images, masks = expected["images"][:, :2], expected["image_masks"][:, :2]
    tokens, there = expected["tokens"], expected["token_mask"]
    close(policy.model.see(images), expected["image_embeds"])
    close(policy.model.embed(images, masks, tokens, there)[0], expected["prefix_embeds"])
    read = policy.model.read(images, masks, tokens, there)
    assert torch.equal(read.mask, expected["attention_mask"].bool())
    seen = read.mask[:, None, None, :, None]  # (B, 1, 1, P, 1)
    close(torch.stack(read.keys, dim=1) * seen, expected["prefix_keys"] * seen)
    close(torch.stack(read.values, dim=1) * seen, expected["prefix_values"] * seen)


@torch.no_grad()
def test_velocities_and_actions_are_lerobots(policy, prefix, expected):
    for t, velocity in zip(expected["times"], expected["lerobot.velocity"]):
        close(policy.model.velocity(expected["x_t"], t.expand(3), prefix), velocity)
    chain, _ = policy.chain(prefix, expected["noise"], None, None, 0.0)
    close(chain[:, -1, :, :7], expected["lerobot.actions_normalised"])
    close(policy.action.inverse(chain[:, -1, :, :7]), expected["lerobot.actions"])


@torch.no_grad()
def test_velocities_and_chains_are_those_of_transformers(policy, prefix, expected, float32_angles):
    model, state = policy.model, policy.model.state_proj(expected["state"]).unsqueeze(1)
    for t, velocity, embedded in zip(expected["times"], expected["velocity"], expected["suffix_embeds"]):
        close(model.velocity(expected["x_t"], t.expand(3), prefix), velocity)
        close(torch.cat([state, model.embed_actions(expected["x_t"], t.expand(3))], dim=1), embedded)
    chain, _ = policy.chain(prefix, expected["noise"], None, None, 0.0)
    close(chain, expected["chain"])
    close(chain[:, -1, :, :7], expected["actions_normalised"])
    close(policy.action.inverse(chain[:, -1, :, :7]), expected["actions"])


@torch.no_grad()
def test_random_chains_and_their_log_probabilities(policy, prefix, expected, float32_angles):
    z, rows = expected["sde.z"], torch.arange(3)
    everywhere = torch.ones(3, 10, dtype=torch.bool)
    chain, logprobs = policy.chain(prefix, expected["noise"], lambda k: z[:, k], everywhere, 1.0)
    close(chain, expected["sde.chain"])
    close(logprobs, expected["sde.logprob"], 1e-3)
    step = expected["sde1.step"]
    once = step.unsqueeze(1) == torch.arange(10)
    chain, logprobs = policy.chain(prefix, expected["noise"], lambda k: z[:, k], once, 1.0)
    close(chain, expected["sde1.chain"])
    close(logprobs[rows, step], expected["sde1.logprob"], 1e-3)


def test_the_loss_and_its_gradients(folder, obs, expected, float32_angles):
    policy = load(folder)
    for parameter in policy.parameters():
        parameter.requires_grad = False
    for module in policy.expert:
        module.requires_grad_()
    target = expected["train.action_normalised"]
    prefix = policy.prefix(obs, list(expected["raw.task"]))
    errors = policy.flow_loss(prefix, target, expected["noise"], expected["train.time"])
    close(errors.mean(), expected["train.loss"])
    close(errors.mean(), expected["lerobot.loss"], 1e-3)
    errors.mean().backward()
    parameters = dict(policy.model.named_parameters())
    names = [
        name.replace("model.dit.", f"{pi0.EXPERT}.").removeprefix("embed_action_time.")
        for name in expected["train.names"].tolist()
    ]
    norms = [parameters[name].grad.norm() for name in names]
    assert sum(p.grad is not None for p in parameters.values()) == len(norms) == 38
    torch.testing.assert_close(torch.stack(norms), expected["train.grad_norm"], atol=2e-5, rtol=1e-4)


# ---- The network ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_empty_camera_and_padding_change_nothing(policy, expected):
    model, x, t = policy.model, expected["x_t"], expected["times"]
    tokens, there, state = (expected[name] for name in ("tokens", "token_mask", "state"))
    whole = model.velocity(
        x, t, model.prefix(expected["images"], expected["image_masks"], tokens, there, state)
    )
    for i in range(3):
        one, length = slice(i, i + 1), int(there[i].sum())
        alone = model.prefix(
            expected["images"][one, :2], expected["image_masks"][one, :2], tokens[one, :length],
            there[one, :length], state[one],
        )  # fmt: skip
        assert alone.mask.all()
        close(model.velocity(x[one], t[one], alone), whole[one], 1e-5)


@torch.no_grad()
def test_all_actions_see_one_another_and_the_state_sees_none(policy, obs, prefix, expected):
    model, x, t = policy.model, expected["x_t"], expected["times"]
    velocity, other = model.velocity(x, t, prefix), x.clone()
    other[:, -1] += 1.0
    assert (model.velocity(other, t, prefix)[:, 0] - velocity[:, 0]).abs().min() > 0
    changed = policy.prefix(obs | {"state": obs["state"] + 0.1}, list(expected["raw.task"]))
    for mine, theirs in zip(changed.keys, prefix.keys):
        assert torch.equal(mine[:, :, :-1], theirs[:, :, :-1])  # nothing but the state's own
        assert not torch.equal(mine[:, :, -1], theirs[:, :, -1])


def test_steps_leave_the_prefix_as_it_is(policy, obs, expected):
    prefix = policy.prefix(obs, list(expected["raw.task"]))
    before = [key.detach().clone() for key in prefix.keys]
    first, second = (policy.model.velocity(expected["x_t"], expected["times"], prefix) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(key, old) for key, old in zip(prefix.keys, before))
    (first.square().mean() + second.square().mean()).backward()
    policy.zero_grad()


def published_config():
    """The sizes of PaliGemma 3B and its expert."""
    gemma = {"num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256}
    vision = pi0.SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14,
        image_size=224, vision_use_head=False,
    )  # fmt: skip
    text = pi0.GemmaConfig(vocab_size=257152, hidden_size=2048, intermediate_size=16384, **gemma)
    nothing = {"vocab_size": 1, "bos_token_id": None, "eos_token_id": None}
    expert = pi0.GemmaConfig(hidden_size=1024, intermediate_size=4096, **nothing, **gemma)
    return pi0.Pi0Config(vision, text, expert, 224, 257152, 32, 32, 50)


def test_the_published_size():
    """What a checkpoint's tensors show is enough; LeRobot's ``train_expert_only`` trains 314.7 M."""
    with torch.device("meta"):
        model = pi0.Pi0(published_config())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = pi0.Pi0Config.of(shapes, {"chunk_size": 50, "image_resolution": [224, 224]}, {})
    with torch.device("meta"):
        again = pi0.Pi0(found)
    assert {name: tuple(value.shape) for name, value in again.state_dict().items()} == shapes
    assert found.vision.num_attention_heads == 16 and found.expert.num_attention_heads == 8
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(3.238e9, rel=1e-3)
    trained = sum(p.numel() for part in model.trained for p in part.parameters())
    assert trained == pytest.approx(314.7e6, rel=1e-3)


@torch.no_grad()
def test_bfloat16_leaves_what_is_no_weight_as_it_is(folder, policy, obs, prefix, expected):
    half = load(folder, dtype=torch.bfloat16)
    for (name, buffer), (_, whole) in zip(half.named_buffers(), policy.named_buffers()):
        assert torch.equal(buffer, whole), name
    matrices = {name: p for name, p in half.model.named_parameters() if p.ndim > 1}
    kept = {name.split(".")[0] for name, p in matrices.items() if p.dtype == torch.float32}
    assert kept == set(smolvla.PROJECTIONS)
    its = half.prefix(obs, list(expected["raw.task"]))
    assert {each.dtype for each in [*its.keys, *its.values]} == {torch.bfloat16}
    for t, velocity in zip(expected["times"], expected["lerobot.velocity"]):
        error = half.model.velocity(expected["x_t"], t.expand(3), its) - velocity
        assert 0 < error.abs().max() < 0.2 and error.std() < 0.03 * velocity.std()


# ---- Files ---------------------------------------------------------------------------------------------


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the checkpoint, and a function that changes its tensors."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("expected.npz"))
    copy.chmod(0o755)
    for path in copy.rglob("*"):
        path.chmod(0o755)

    def change(**changes):
        tensors = safetensors.torch.load_file(copy / "model.safetensors")
        tensors = {name: value for name, value in tensors.items() if name not in changes}
        tensors |= {name: value for name, value in changes.items() if value is not None}
        safetensors.torch.save_file(tensors, copy / "model.safetensors")
        return copy

    return change


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_an_output_that_is_not_the_embedding_is_stale(copied, policy):
    tensors = safetensors.torch.load_file(copied() / "model.safetensors")
    embedding = tensors[WORDS_OUT].clone()
    folder = copied(**{WORDS: embedding, WORDS_OUT: embedding + 1})
    assert same_weights(load(folder), policy)
    alone = copied(**{WORDS_OUT: None})
    assert same_weights(load(alone), policy)


def test_names_without_their_first_part(copied, policy):
    folder = copied()
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    assert same_weights(load(folder), policy)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (f"{START}.paligemma.model.language_model.norm.weight", None, "language_model.norm.weight"),
        ("model.action_out_proj.bias", None, "missing: ['model.action_out_proj.bias']"),
        (
            WORDS_OUT,
            None,
            "it has no paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight",
        ),
        ("model.action_out.bias", torch.zeros(3), "belong to nothing: ['model.action_out.bias']"),
        ("model.action_out_proj.bias", torch.zeros(3), "action_out_proj.bias has shape (3,); expected (32,)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(copied, name, value, words):
    with pytest.raises(ValueError) as error:
        load(copied(**{name: value}))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "entry", "value", "words"),
    [
        ("config", "type", "pi05", "expected 'pi0'"),
        ("config", "min_period", 0.01, "min_period and max_period are (0.01, 4.0)"),
        ("config", "image_resolution", [224, 224], "expected [56, 56]"),
        ("config", "chunk_size", 0, "chunk_size is 0"),
        (
            "transformers_config", "vlm_config", {"vision_config": {"num_attention_heads": 17}},
            "vision 17 heads of 48 numbers",
        ),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit(copied, file, entry, value, words):
    path = copied() / f"{file}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    with pytest.raises(ValueError) as error:
        load(path.parent)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_it_is_saved_as_lerobot_publishes_it(copied, tmp_path, obs, expected):
    tensors = safetensors.torch.load_file(copied() / "model.safetensors")
    bias = tensors["model.state_proj.bias"].half()
    before = copied(**{WORDS: tensors[WORDS_OUT].clone(), "model.state_proj.bias": bias})
    policy = load(before)
    with torch.no_grad():
        policy.model.vlm["language_model"].embed_tokens.weight += 0.5
    after = tmp_path / "after"
    after.mkdir()
    policy.save(policy.state_dict(), after)
    written = safetensors.torch.load_file(after / "model.safetensors")
    assert written.keys() == tensors.keys() | {WORDS}
    assert torch.equal(written[WORDS], written[WORDS_OUT])
    assert torch.equal(written[WORDS], tensors[WORDS_OUT] + 0.5)
    assert not written[EXPERT_OUT].any() and written[EXPERT_OUT].shape == tensors[EXPERT_OUT].shape
    assert written["model.state_proj.bias"].dtype == torch.float16
    for name in ("policy_preprocessor.json", "tokenizer/tokenizer.json", "transformers_config.json"):
        assert (after / name).read_bytes() == (before / name).read_bytes()
    again = LeRobotPolicy.load("pi0", after)
    assert same_weights(again, policy) and again.settings == policy.settings == FlowSettings(50, 10, "sde")


def test_transformers_reads_what_is_saved(folder, expected, tmp_path, float32_angles):
    """Its class is another reader of LeRobot's names; before 5.24 it loads nothing of them."""
    import transformers  # after vla_envs.policies, which hides a torchvision that does not fit

    if Version(transformers.__version__) < Version("5.24"):
        pytest.skip("transformers reads LeRobot's names since 5.24")
    policy = load(folder)
    with torch.no_grad():
        policy.head.weight += 0.01
    policy.save(policy.state_dict(), tmp_path)
    sizes = transformers.PI0Config(**json.loads((tmp_path / "transformers_config.json").read_text()))
    theirs, loaded = transformers.PI0ForConditionalGeneration.from_pretrained(
        tmp_path, config=sizes, output_loading_info=True
    )
    assert not any(loaded.values())
    images, masks = expected["images"][:, :2], expected["image_masks"][:, :2]
    x, t, state = (expected[name] for name in ("x_t", "times", "state"))
    with torch.no_grad():
        prefix = policy.model.prefix(images, masks, expected["tokens"], expected["token_mask"], state)
        velocity = theirs.eval()(
            state=state, noise=x, timestep=t, input_ids=expected["input_ids"], pixel_values=images,
            pixel_attention_mask=masks, attention_mask=expected["attention_mask"],
            position_ids=expected["position_ids"],
        ).logits  # fmt: skip
        close(policy.model.velocity(x, t, prefix), velocity)


def test_another_tokenizer(copied):
    path = copied() / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    with pytest.raises(ValueError, match="does not begin a sentence with <bos>"):
        load(path.parent.parent)


def test_loading_on_meta_keeps_nothing(folder):
    policy = load_policy("pi0", folder, "meta")
    assert {p.device.type for p in policy.parameters()} == {"meta"}


def test_it_starts_from_a_checkpoint():
    with pytest.raises(ValueError, match="for instance lerobot/pi0_libero_finetuned_v044"):
        new_policy("pi0")


# ---- A policy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "noise", [pytest.param(noise, marks=[pytest.mark.slow] * (noise != "sde-one")) for noise in NOISES]
)
def test_it_is_a_policy(folder, obs, expected, noise):
    policy, sentences = load_policy("pi0", folder, settings={"noise": noise}), list(expected["raw.task"])
    validate(policy, "pi0")
    assert (policy.action_chunk, policy.imitation_chunk, policy.hidden_size) == (10, 50, 32)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    _, tokens, sampled = policy.sample(obs, sentences, 1.3, generators)
    logprobs, _, hidden = policy.score(obs, sentences, tokens, 1.3)
    close(logprobs, sampled, 1e-3)
    assert torch.equal(policy.score(obs, sentences, tokens + 0.1 * (tokens.ndim > 2), 1.3)[2], hidden)
    logprobs.mean().backward()
    trained = [name for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("gemma_expert" in name for name in trained) and any("vision_tower" in name for name in trained)


def test_what_is_trained_of_it(folder, obs, expected):
    sentences = list(expected["raw.task"])
    counts = {}
    for train in ("lora", "expert", "all"):
        policy = make_trainable(load_policy("pi0", folder), train, rank=2)
        counts[train], total = count_parameters(policy)
        loss = policy.imitation_loss(obs, sentences, torch.zeros(3, 50, 7))
        loss.backward()
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        assert train == "all" or not any("paligemma.model" in name for name in trained)
        without = {name for name, p in trained.items() if p.grad is None}
        # Of PaliGemma's last layer nothing but keys and values is looked at.
        last = "paligemma.model.language_model.layers.2."
        assert all(last in name or "language_model.norm" in name for name in without), without
    assert counts["lora"] < counts["expert"] < counts["all"] == total


def test_lora_adapts_what_lerobots_adapts(policy):
    layers = [name for name, module in policy.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sum(bool(re.fullmatch(policy.lora_targets, name)) for name in layers) == 2 * 3 + 5


# ---- Scripts -------------------------------------------------------------------------------------------


@pytest.fixture
def start(execute, folder, tmp_path, monkeypatch):
    """A function that runs a script for an iteration on images of 32 pixels; the folder of the run."""
    monkeypatch.setattr(LeRobotPolicy, "image_size", 32)
    (tmp_path / "nearer.py").write_text("def nearer(facts):\n    return -facts['gripper_to_object']\n")

    def start(script, **flags):
        common = {
            "policy": "pi0", "checkpoint": folder, "train": "expert", "num_iterations": 1,
            "eval_episodes": 1, "eval_every": 0, "max_episode_steps": 6, "action_chunk": 3, "num_threads": 1,
            "minibatch_size": 4, "run_dir": "run", "device": "cpu",
        }  # fmt: skip
        execute(script, **common | flags)
        return tmp_path / "run"

    return start


ONLINE = {"num_groups": 1, "group_size": 2, "reward": "nearer.py:nearer"}
OWN = {"grpo_vla": {"keep_low": 0, "keep_high": 1}, "ppo_vla": {"critic_warmup": 1, "num_iterations": 2}}


def assert_learnt(run, folder):
    """The expert is another one, and PaliGemma the same."""
    before, after = (
        load_policy("pi0", path).state_dict() for path in (folder, run / "checkpoints" / "final")
    )
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert "model.action_out_proj.weight" in changed and not any(pi0.VLM in name for name in changed)


def test_online_rl(start, folder):
    assert_learnt(start("grpo_vla", **ONLINE | OWN["grpo_vla"]), folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "train"),
    [("tgrpo_vla", "expert"), ("ppo_vla", "expert"), ("grpo_vla", "expert"), ("grpo_vla", "lora")],
)
def test_every_script_of_online_rl(start, folder, script, train):
    """PPO needs an iteration more: its critic learns alone at first."""
    run = start(script, **ONLINE | OWN.get(script, {}) | {"train": train})
    assert_learnt(run, folder)
    start(script, resume=run, num_iterations=3, train=train)
    latest, final = (load_policy("pi0", run / "checkpoints" / name) for name in ("latest", "final"))
    close(latest.head.weight, final.head.weight)


@pytest.mark.slow
def test_imitation(start, folder, tmp_path):
    (tmp_path / "demos").mkdir()
    write_demos(tmp_path / "demos" / "LiberoObject_4_demo.hdf5", (6, 6))
    assert_learnt(start("sft_vla", demos="demos", episodes=1, iteration_steps=2), folder)
