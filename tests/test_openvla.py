"""OpenVLA and OpenVLA-OFT: parity with the original, pictures, tokens, batches, training, scripts.

Checkpoints are tiny, random, and in the published format. The original implementation's own figures are
read from the folder that OPENVLA_REFERENCE names (``../shared/openvla_reference``), where it is there.
"""

import gc
import io
import json
import os
import runpy
import sys
import weakref
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from artifacts import ROOT, write_demos
from PIL import Image
from tiny_openvla import Q01, Q99, SENTENCES, TEXT, TINY, tiny_config, write_tiny
from torch import nn

from vla_envs.policies import count_parameters, load_policy, new_policy, published, save_policy
from vla_envs.policies.adapters import TRAINABLE_SETS, adapter_off, make_trainable, merged, save_adapter
from vla_envs.policies.images import openvla_images, openvla_pixels
from vla_envs.policies.openvla import LlamaConfig, OpenVLAConfig, OpenVLAModel, OpenVLAPolicy, ViTConfig
from vla_envs.policies.openvla.actions import bin_values, value_bins
from vla_envs.policies.openvla.decoder import Decoder
from vla_envs.policies.openvla.policy import choose
from vla_envs.policies.published import INDEX, SINGLE
from vla_envs.training.checkpoints import save_training_state
from vla_envs.training.evaluation import PROTOCOLS, seen, settings

REFERENCE = Path(os.environ.get("OPENVLA_REFERENCE", ROOT.parent / "shared" / "openvla_reference"))
KINDS = ("openvla", "openvla-oft")
CHUNK = {"openvla": 1, "openvla-oft": 8}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("openvla") / "tiny")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def policy(tiny, kind):
    return load_policy(kind, tiny)


def observations(batch, size=64, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (batch, size // 8, size // 8, 3), dtype=np.uint8)
    return {"image": coarse.repeat(8, axis=1).repeat(8, axis=2), "state": np.zeros((batch, 8), np.float32)}


# ---- The original implementation's figures -------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    if not (REFERENCE / "expected.npz").is_file():
        pytest.skip(f"{REFERENCE} holds no figures of the original implementation (OPENVLA_REFERENCE)")
    dino = ViTConfig(48, 4, 3, 192, 56, 14, registers=4, cls_token=True, layer_scale=True)
    siglip = ViTConfig(64, 5, 4, int(64 * 3.7362), 56, 14)
    text = json.loads((REFERENCE / "config.json").read_text())["text_config"]
    model = OpenVLAModel.from_pretrained(REFERENCE, OpenVLAConfig(dino, siglip, LlamaConfig(**text)))
    with np.load(REFERENCE / "expected.npz") as file:
        return model, {name: torch.from_numpy(file[name]) for name in file}


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_features_projector_and_logits_are_the_originals(reference):
    model, expected = reference
    features = model.features(expected["pixel_values"])
    close(features, expected["features"])
    close(model.project(features), expected["projected"])
    logits = model(expected["pixel_values"], expected["input_ids"])
    assert logits.shape == (3, 16 + 12, 32064)
    close(logits[:, :4], expected["logits_first"])
    close(logits[:, -8:], expected["logits_last"])


@torch.no_grad()
def test_greedy_tokens_and_actions_are_the_originals(reference):
    model, expected = reference
    ids = expected["input_ids"]
    for _ in range(7):
        ids = torch.cat([ids, model(expected["pixel_values"], ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids[:, -7:], expected["tokens"])
    policy = OpenVLAPolicy.__new__(OpenVLAPolicy)
    action = json.loads((REFERENCE / "config.json").read_text())["norm_stats"]["libero_object"]["action"]
    values = {"q01": action["q01"], "q99": action["q99"], "normalised": action["mask"]}
    policy.__dict__ |= {name: np.array(value) for name, value in values.items()}
    actions = policy.unnormalise(bin_values(ids[:, -7:].numpy() - 31744))
    np.testing.assert_allclose(actions, expected["actions"].reshape(3, 7), atol=1e-12)


# ---- The network -------------------------------------------------------------------------------------


def plain_vit(vit, c, pictures):
    """A tower written out: one patch, one head at a time."""
    side = c.image_size // c.patch_size
    weight, bias = vit.patch_embed["proj"].weight.flatten(1), vit.patch_embed["proj"].bias
    s = c.patch_size
    x = [
        pictures[:, :, s * i : s * i + s, s * j : s * j + s].flatten(1) @ weight.T + bias
        for i in range(side) for j in range(side)
    ]  # fmt: skip
    x = torch.stack(x, dim=1) + vit.pos_embed
    if c.cls_token:
        prefix = torch.cat([vit.cls_token, vit.reg_token], dim=1)
        x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)

    def norm(x, layer):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x * layer.weight + layer.bias

    for block in list(vit.blocks)[: c.depth - 1]:
        q, k, v = block.attn["qkv"](norm(x, block.norm1)).chunk(3, dim=-1)
        heads = []
        for part in torch.arange(c.dim).chunk(c.heads):
            scores = (q[..., part] @ k[..., part].mT / len(part) ** 0.5).softmax(-1)
            heads.append(scores @ v[..., part])
        y = block.attn["proj"](torch.cat(heads, dim=-1))
        x = x + (y * block.ls1["scale_factor"] if c.layer_scale else y)
        y = block.mlp["fc1"](norm(x, block.norm2))
        y = block.mlp["fc2"](y * 0.5 * (1 + torch.erf(y / 2**0.5)))
        x = x + (y * block.ls2["scale_factor"] if c.layer_scale else y)
    return x[:, c.cls_token + c.registers :]


@torch.no_grad()
def test_the_towers_written_out(tiny):
    model = OpenVLAModel.from_pretrained(tiny).double()
    pixels = torch.randn(2, 6, 28, 28, dtype=torch.float64)
    towers = model.vision_backbone
    dino = plain_vit(towers["featurizer"], TINY["dino"], pixels[:, :3])
    siglip = plain_vit(towers["fused_featurizer"], TINY["siglip"], pixels[:, 3:])
    features = model.features(pixels)
    assert features.shape == (2, 4, 56)
    torch.testing.assert_close(features, torch.cat([dino, siglip], dim=2))


def test_the_published_size():
    """982 tensors are published, of which 43 are never used; LoRA of rank 32 as OpenVLA's own fine-tuning."""
    with torch.device("meta"):
        policy = OpenVLAPolicy(OpenVLAConfig())
        assert len(policy.state_dict()) == 982 - 43
        assert count_parameters(policy)[1] == pytest.approx(7.498e9, rel=1e-4)
        assert policy.first == 31744
        trained = count_parameters(make_trainable(policy, "lora"))[0]
    assert trained == pytest.approx(107.9e6, rel=1e-3)
    adapted = [name for name, module in policy.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 4 * (23 + 26) + 3 + 7 * 32
    assert not any("lm_head" in name or "patch_embed" in name for name in adapted)


@torch.no_grad()
def test_padding_after_the_first_word_changes_nothing(tiny):
    model = OpenVLAModel.from_pretrained(tiny)
    pixels, ids = torch.randn(1, 6, 28, 28), torch.tensor([[1, 5, 6, 7]])
    padded = torch.tensor([[1, 0, 0, 0, 5, 6, 7]])
    mask = torch.tensor([[1, 0, 0, 0, 1, 1, 1]])
    close(model(pixels, padded, mask)[:, -3:], model(pixels, ids)[:, -3:])


# ---- Pictures ----------------------------------------------------------------------------------------


def slow_picture(image, size):
    """JPEG, then TensorFlow's lanczos3 and crop_and_resize as their documentation has them, in float64."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=2)
    x = np.asarray(Image.open(buffer)).astype(float)

    def resize(x):  # along the first axis
        scale = len(x) / size
        rows = []
        for o in range(size):
            at = (np.arange(len(x)) + 0.5 - (o + 0.5) * scale) / max(scale, 1.0)
            kernel = np.where(np.abs(at) < 3, np.sinc(at) * np.sinc(at / 3), 0.0)
            rows.append(np.tensordot(kernel / kernel.sum(), x, 1))
        return np.stack(rows)

    x = np.clip(np.rint(resize(resize(x).swapaxes(0, 1)).swapaxes(0, 1)), 0, 255) / 255

    def crop(x):
        low, high = (1 - 0.9**0.5) / 2 * (size - 1), (1 + 0.9**0.5) / 2 * (size - 1)
        at = low + np.arange(size) * (high - low) / (size - 1)
        i = np.floor(at).astype(int)
        weight = (at - i)[:, None, None]
        return (1 - weight) * x[i] + weight * x[np.minimum(i + 1, size - 1)]

    x = crop(crop(x).swapaxes(0, 1)).swapaxes(0, 1)
    return np.clip(np.floor(x * 255.5), 0, 255)


def scene(size=256):
    """Edges, gradients and fine stripes."""
    y, x = np.mgrid[:size, :size]
    red = 255 * ((x // 32 + y // 32) % 2)
    green = 255 * x / size
    blue = 127.5 + 127.5 * np.sin(x * y / 300)
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def test_pictures_are_those_of_the_slow_reference():
    mine, theirs = openvla_images(scene()[None])[0].astype(float), slow_picture(scene(), 224)
    assert np.abs(mine - theirs).max() <= 1 and np.abs(mine - theirs).mean() < 1e-3
    stored = {
        (3, 5): [0, 11, 177],
        (60, 100): [255, 115, 209],
        (112, 112): [68, 103, 4],
        (200, 37): [132, 45, 108],
    }
    for (row, column), grey in stored.items():
        assert np.abs(mine[row, column] - grey).max() <= 2  # another libjpeg rounds otherwise


def test_two_normalisations():
    grey = openvla_images(scene()[None])[0] / 255.0
    pixels = openvla_pixels(scene()[None])
    assert pixels.shape == (1, 6, 224, 224) and pixels.dtype == torch.float32
    means, stds = [0.484375, 0.455078125, 0.40625], [0.228515625, 0.2236328125, 0.224609375]
    np.testing.assert_allclose(pixels[0, :3].permute(1, 2, 0), (grey - means) / stds, atol=1e-5)
    np.testing.assert_allclose(pixels[0, 3:].permute(1, 2, 0), grey * 2 - 1, atol=1e-5)


def test_a_batch_of_pictures_equals_each_alone():
    images = observations(3)["image"]
    together = openvla_pixels(images, 28)
    assert torch.equal(together, torch.cat([openvla_pixels(image[None], 28) for image in images]))


def test_pictures_are_processed_once(tiny):
    """By the policy; ``nano`` sees what the protocol makes of them. Rendering follows the policy's size."""
    obs, nano = {"image": scene()[None]}, new_policy("nano")
    policy = load_policy("openvla", tiny)
    assert seen(obs, "openvla", policy)["image"] is obs["image"]
    assert seen(obs, "openvla", nano)["image"].shape == (1, 224, 224, 3)
    for protocol in PROTOCOLS:
        assert settings(protocol, "LiberoObject", policy)["image_size"] == 256
        assert settings(protocol, "LiberoObject", nano) == settings(protocol, "LiberoObject")
    assert settings(None, "LiberoObject", nano) == {"image_size": 128}
    assert settings(None, "LiberoObject", policy) == {"image_size": 256}


# ---- Tokens ------------------------------------------------------------------------------------------


def test_tokens_by_hand():
    """Token 255 is the lowest bin, tokens 0 and 1 the highest; 255 centres lie 2/255 apart."""
    values = bin_values(np.arange(256))
    assert values[[0, 1, 255]] == pytest.approx([1 - 1 / 255, 1 - 1 / 255, -1 + 1 / 255])
    assert np.diff(values[1:]) == pytest.approx(np.full(254, -2 / 255))
    assert value_bins(torch.tensor([-1.0, -0.999, 0.999, 1.0, 7.0, -7.0])).tolist() == [
        255,
        255,
        1,
        0,
        0,
        255,
    ]
    assert torch.equal(value_bins(torch.from_numpy(values[1:])), torch.arange(1, 256))


def test_actions_of_tokens_by_hand(policy, kind):
    chunk = CHUNK[kind]
    tokens = torch.full((2, 7 * chunk), 255)
    tokens[1, -7:] = 1
    actions = policy.decode(tokens)
    assert actions.shape == (2, chunk, 7) and actions.dtype == np.float32
    span = np.array(Q99[:6]) - Q01[:6]
    np.testing.assert_allclose(actions[0, 0, :6], np.array(Q01[:6]) + span / 510, atol=1e-6)
    np.testing.assert_allclose(actions[1, -1, :6], np.array(Q99[:6]) - span / 510, atol=1e-6)
    assert actions[0, 0, 6] == 1 and actions[1, -1, 6] == -1  # closed; open


def test_demonstrated_actions_come_back(policy, kind):
    rng = np.random.default_rng(0)
    actions = rng.uniform(Q01, Q99, (5, CHUNK[kind], 7))
    actions[..., 6] = rng.choice([-1.0, 1.0], (5, CHUNK[kind]))
    given = torch.from_numpy(actions)
    tokens = policy.encode(given)
    assert tokens.shape == (5, 7 * CHUNK[kind]) and np.array_equal(given.numpy(), actions)
    error = np.abs(policy.decode(tokens) - actions)
    assert (error[..., :6] <= (np.array(Q99[:6]) - Q01[:6]) / 510 + 1e-6).all() and (error[..., 6] == 0).all()


def test_prompts(policy):
    words = "<s> In : What action should the robot take to push the plate ? Out : ▁".split()
    assert [policy.tokenizer.id_to_token(i) for i in policy.prompt("Push the plate")] == words
    _, ids, mask = policy.prepare(observations(2), SENTENCES[1:])
    pads = len(policy.prompt(SENTENCES[1])) - len(policy.prompt(SENTENCES[2]))
    assert pads == 1 and mask.tolist() == [[True] * 18, [True, False] + [True] * 16]
    assert ids[1].tolist() == [1, 0, *policy.prompt(SENTENCES[2])[1:]]
    assert policy.prepare(observations(2), SENTENCES[:1] * 2)[2] is None


# ---- sample and score --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.6])
def test_evaluation_repeats_the_sampled_logprobs(policy, kind, temperature):
    torch.manual_seed(0)
    obs, size = observations(3), 7 * CHUNK[kind]
    actions, tokens, sampled = policy.sample(obs, SENTENCES, temperature)
    assert actions.shape == (3, CHUNK[kind], 7) and tokens.shape == sampled.shape == (3, size)
    assert np.array_equal(actions, policy.decode(tokens)) and policy.action_chunk == CHUNK[kind]
    logprobs, entropy, hidden = policy.score(obs, SENTENCES, tokens, temperature)
    close(logprobs.detach(), sampled)
    assert entropy.shape == (3, size) and (entropy > 0).all() and (entropy < np.log(256) + 1e-5).all()
    assert hidden.shape == (3, policy.hidden_size) and hidden.dtype == torch.float32


def test_a_batch_of_mixed_prompts_equals_each_alone(policy):
    obs = observations(3)
    _, tokens, together = policy.sample(obs, SENTENCES, 0.0)
    for i in range(3):
        mine = {name: array[i : i + 1] for name, array in obs.items()}
        _, alone, logprobs = policy.sample(mine, SENTENCES[i : i + 1], 0.0)
        assert torch.equal(alone[0], tokens[i])
        close(logprobs[0], together[i])
    policy.rollout_batch = 2
    assert torch.equal(policy.sample(obs, SENTENCES, 0.0)[1], tokens)


def test_what_a_row_draws_does_not_depend_on_the_others(policy):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    obs = observations(3)
    _, tokens, _ = policy.sample(obs, SENTENCES, 1.3, generators(5, 6, 7))
    mine = {name: array[2:] for name, array in obs.items()}
    assert torch.equal(policy.sample(mine, SENTENCES[2:], 1.3, generators(7))[1], tokens[2:])
    policy.rollout_batch = 1
    assert torch.equal(policy.sample(obs, SENTENCES, 1.3, generators(5, 6, 7))[1], tokens)
    assert not torch.equal(policy.sample(obs, SENTENCES, 1.3, generators(6, 6, 7))[1][0], tokens[0])


@torch.no_grad()
def test_greedy_tokens_are_the_likeliest_of_the_whole_forward_pass(tiny):
    policy, obs = load_policy("openvla", tiny), observations(2)
    _, tokens, _ = policy.sample(obs, SENTENCES[:1] * 2, 0.0)
    pixels, ids, _ = policy.prepare(obs, SENTENCES[:1] * 2)
    for d in range(7):
        logits = policy(pixels, ids)[:, -1, 192 : 192 + 256]
        assert torch.equal(logits.argmax(-1), tokens[:, d])
        ids = torch.cat([ids, tokens[:, d : d + 1] + 192], dim=1)


@torch.no_grad()
def test_all_steps_at_once_by_hand(tiny):
    """56 zeros and </s> after the prompt, Llama not causal; the last word predicts the first token."""
    policy, obs = load_policy("openvla-oft", tiny), observations(2)
    tokens = torch.randint(0, 256, (2, 56))
    mine = policy.score(obs, SENTENCES[:1] * 2, tokens)[0]
    pixels, ids, _ = policy.prepare(obs, SENTENCES[:1] * 2)
    words = policy.language_model.model.embed_tokens
    patches = policy.project(policy.features(pixels))
    stop = words(torch.full((2, 1), 2))
    sequence = [words(ids[:, :1]), patches, words(ids[:, 1:]), torch.zeros(2, 56, 32), stop]
    whole = policy.language_model.model(inputs_embeds=torch.cat(sequence, dim=1), is_causal=False)
    start = 4 + ids.shape[1] - 1
    logits = policy.head(whole.last_hidden_state)[:, start : start + 56, 192:448]
    theirs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    close(mine, theirs)
    causal = load_policy("openvla", tiny).score(obs, SENTENCES[:1] * 2, tokens[:, :7])[0]
    assert (causal[:, 0] - mine[:, 0]).abs().max() > 1e-3


def test_nothing_waits_for_the_device_while_tokens_are_drawn(tiny, monkeypatch):
    policy = load_policy("openvla", tiny)
    x, mask = policy.embed(*policy.prepare(observations(3), SENTENCES))

    def wait(*_):
        raise AssertionError("the host waits for the device")

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    with torch.no_grad():
        tokens, _ = policy._decode(x, mask, 1.0)
    assert tokens.shape == (3, 7)


def test_samples_follow_the_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20000, 3)
    for temperature in (1.0, 0.5):
        tokens, logprobs = choose(logits, temperature)
        weights = np.array([0.5, 0.3, 0.2]) ** (1 / temperature)
        expected = weights / weights.sum()
        assert np.bincount(tokens, minlength=3) / 20000 == pytest.approx(expected, abs=0.02)
        np.testing.assert_allclose(logprobs.exp(), expected[tokens], atol=1e-6)


def test_pictures_and_instructions_matter(policy):
    tokens = torch.zeros(1, 7 * policy.action_chunk, dtype=torch.int64)
    base = policy.score(observations(1), SENTENCES[:1], tokens)[0]
    for obs, sentence in ((observations(1, seed=1), SENTENCES[0]), (observations(1), SENTENCES[1])):
        assert (policy.score(obs, [sentence], tokens)[0] - base).abs().max() > 1e-3


# ---- Training ----------------------------------------------------------------------------------------


def loss_of(policy, seed=0):
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (3, 7 * policy.action_chunk), generator=rng)
    return -policy.score(observations(3), SENTENCES, tokens)[0].mean()


def optimise(policy, steps=2):
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(policy).backward()
        optimizer.step()


@pytest.mark.parametrize("train", [each for each in TRAINABLE_SETS if each != "expert"])
def test_what_is_trained(tiny, kind, train):
    policy = make_trainable(load_policy(kind, tiny), train, rank=2, last_k=1).train()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    optimise(policy)
    changed = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    head = {"language_model.lm_head.weight", "language_model.model.norm.weight"}
    last = {name for name in before if "layers.1." in name}
    lora = {name for name in before if "lora_" in name}
    parts = {"lora": lora, "head": head, "lora+head": lora | head, "lora+last-k": lora | head | last}
    assert changed == parts.get(train, set(before))
    other = OpenVLAPolicy(policy.config)
    other.load_state_dict(merged(policy))
    other.__dict__ |= {name: policy.__dict__[name] for name in ("dtype", "tokenizer", "parallel")}
    close(loss_of(other).detach(), loss_of(policy).detach())


def test_gradients_are_the_same_with_and_without_recomputation(policy):
    gradients = []
    for training in (False, True):
        policy.train(training)
        policy.zero_grad()
        loss_of(policy).backward()
        gradients.append(
            {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == dict(policy.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5)


def test_sampling_in_training_mode_is_the_same(policy):
    obs = observations(3)
    _, tokens, logprobs = policy.sample(obs, SENTENCES, 0.0)
    policy.train()
    again = policy.sample(obs, SENTENCES, 0.0)
    assert policy.training and torch.equal(again[1], tokens) and torch.equal(again[2], logprobs)


def test_adapter_off_is_the_policy_without_it(tiny, kind):
    policy = make_trainable(load_policy(kind, tiny), "lora", rank=4)
    plain = loss_of(load_policy(kind, tiny))
    assert torch.equal(loss_of(policy), plain)
    optimise(policy)
    assert (loss_of(policy) - plain).abs() > 1e-3
    with adapter_off(policy):
        assert torch.equal(loss_of(policy), plain)


@pytest.mark.parametrize("reference", [False, True])
def test_activations_are_computed_again_with_the_adapters_of_their_task(tiny, kind, tmp_path, reference):
    """Also where a pass without the trained adapter, for a KL term, came between forward and backward.

    And with the layers and heads that tasks have of their own.
    """
    folders = {}
    for i, (sentence, train) in enumerate(zip(SENTENCES, ("lora", "lora+last-k", "lora+head"))):
        policy = make_trainable(load_policy(kind, tiny), train, rank=2).train()
        torch.manual_seed(i)
        optimise(policy, steps=3)
        save_adapter(policy, tmp_path / str(i))
        folders[sentence] = tmp_path / str(i)
    gradients = []
    for again in (True, False):
        torch.manual_seed(0)
        policy = make_trainable(load_policy(kind, tiny), "lora", rank=4, task_adapters=folders).train(again)
        trained = [p for p in policy.parameters() if p.requires_grad]
        for parameter in trained:
            nn.init.normal_(parameter, std=0.1)
        loss = loss_of(policy)
        if reference:
            with torch.no_grad(), adapter_off(policy):
                loss_of(policy)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert gradients[0].abs().max() > 1e-3


def test_a_policy_that_is_dropped_gives_its_memory_back_at_once(tiny, kind):
    policy = make_trainable(load_policy(kind, tiny), "lora", rank=2).train()
    optimise(policy)
    held = weakref.ref(policy.head.weight)
    gc.disable()
    try:
        del policy
        assert held() is None
    finally:
        gc.enable()


def test_what_a_rollout_holds_stays_in_place(tiny):
    """As CUDA graphs need it, on any device: rooms of a power of two, kept while they are large enough."""
    policy, plain = load_policy("openvla", tiny), load_policy("openvla", tiny)
    policy.cudagraphs = True
    places = []
    for sentences in (SENTENCES, SENTENCES[:1] * 2, SENTENCES, SENTENCES * 2, SENTENCES[1:2]):
        obs = observations(len(sentences))
        _, tokens, logprobs = policy.sample(obs, sentences, 0.0)
        _, expected, of_them = plain.sample(obs, sentences, 0.0)
        assert torch.equal(tokens, expected)
        close(logprobs, of_them)
        decoder = policy._decoder
        held = (*decoder.rooms, decoder.present, decoder.tokens, decoder.where, decoder.logits)
        places.append([len(decoder.present), *(x.data_ptr() for x in held)])
    assert places[0] == places[1] == places[2] and places[3] == places[4]
    assert [place[0] for place in places] == [4, 4, 4, 8, 8]
    policy.train()
    assert policy._decoder is None and plain._decoder is None


@torch.no_grad()
def test_keys_and_values_are_transformers_own(tiny):
    from transformers import DynamicCache  # once vla_envs has hidden a torchvision that does not load

    policy = load_policy("openvla", tiny)
    x, mask = policy.embed(*policy.prepare(observations(2), SENTENCES[:1] * 2))
    decoder, theirs = Decoder(policy, 2, x.shape[1] + 1), DynamicCache()
    policy.attend(x, mask, cache=theirs)
    first = decoder.prompt(x, mask).argmax(-1)
    policy.attend(policy.language_model.model.embed_tokens(first + policy.first)[:, None], None, cache=theirs)
    decoder.following(first)
    for room, layer in zip(decoder.rooms, theirs.layers):
        close(room[0], layer.keys)
        close(room[1], layer.values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_replay_what_python_launches(tiny):
    """Padded rows, shorter and longer prompts, and weights that change in place between two rollouts."""
    plain, replayed = (
        make_trainable(load_policy("openvla", tiny, "cuda", cudagraphs), "lora", rank=4)
        for cudagraphs in (False, True)
    )
    for sentences in (SENTENCES[1:], SENTENCES, SENTENCES * 2, SENTENCES[1:2], SENTENCES[1:]):
        with torch.no_grad():
            for mine, its in zip(plain.parameters(), replayed.parameters()):
                if mine.requires_grad:
                    its.copy_(mine.normal_(std=0.1))
        obs = observations(len(sentences))
        torch.manual_seed(0)
        _, tokens, logprobs = replayed.sample(obs, sentences, 1.0)
        expected = plain.score(obs, sentences, tokens, 1.0)[0]
        torch.testing.assert_close(logprobs, expected, atol=0.1, rtol=0)  # bfloat16
    assert sorted(replayed._decoder.graphs) == [1, 2, 8]


@pytest.mark.parametrize("train", [each for each in TRAINABLE_SETS if each != "expert"])
def test_half_precision_of_all_that_can_be_trained(tiny, kind, train):
    policy = OpenVLAPolicy.load(tiny, kind == "openvla-oft", dtype=torch.bfloat16)
    policy = make_trainable(policy, train, rank=4).train()
    _, tokens, logprobs = policy.sample(observations(3), SENTENCES, 1.0)
    again = policy.score(observations(3), SENTENCES, tokens)[0]
    assert logprobs.dtype == again.dtype == torch.float32 and (logprobs - again).abs().max() < 0.3
    optimise(policy)
    gradients = [p.grad for p in policy.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


def test_half_precision(tiny, kind):
    """What a GPU does: bfloat16 weights, a float32 adapter, and steps that are not rounded away."""
    policy = OpenVLAPolicy.load(tiny, kind == "openvla-oft", dtype=torch.bfloat16)
    policy = make_trainable(policy, "lora", rank=4).train()
    kinds = {p.dtype for p in policy.parameters() if p.requires_grad}
    frozen = {p.dtype for p in policy.parameters() if not p.requires_grad}
    assert (kinds, frozen) == ({torch.float32}, {torch.bfloat16})
    _, tokens, logprobs = policy.sample(observations(3), SENTENCES, 1.0)
    again = policy.score(observations(3), SENTENCES, tokens)[0]
    assert logprobs.dtype == again.dtype == torch.float32 and (logprobs - again).abs().max() < 0.3
    before = loss_of(policy)
    optimise(policy, steps=5)
    assert loss_of(policy) < before
    assert merged(policy).keys() == OpenVLAModel(tiny_config()).state_dict().keys()


@pytest.mark.parametrize("train", ["lora", "lora+head", "lora+last-k"])
def test_peft_reads_the_adapter(tiny, tmp_path, train):
    import peft

    policy = make_trainable(load_policy("openvla", tiny), train)
    optimise(policy)
    save_adapter(policy, tmp_path / "adapter")
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (32, 16, 0.0)
    theirs = peft.PeftModel.from_pretrained(load_policy("openvla", tiny), str(tmp_path / "adapter"))
    close(loss_of(theirs.base_model.model), loss_of(policy))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "proj"])
def test_adapters_of_other_layers_than_ours(tiny, kind, tmp_path, name):
    """Of the head, the words and, by the same name as in the towers, the patches."""
    import peft

    theirs = peft.get_peft_model(load_policy(kind, tiny), peft.LoraConfig(r=2, target_modules=[name]))
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    policy = make_trainable(
        load_policy(kind, tiny), "lora", task_adapters=dict.fromkeys(SENTENCES, tmp_path / "adapter")
    )
    other = load_policy(kind, tiny)
    plain = loss_of(other)
    other.load_state_dict(merged(policy))
    torch.testing.assert_close(loss_of(policy), loss_of(other), atol=1e-4, rtol=1e-5)
    assert (loss_of(other) - plain).abs() > 1e-3


# ---- Checkpoints -------------------------------------------------------------------------------------


def test_saved_and_loaded_again(tiny, kind, tmp_path):
    policy = make_trainable(load_policy(kind, tiny), "lora+head", rank=4)
    optimise(policy)
    save_policy(policy, kind, tmp_path / "a" / "final")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["final"]
    loaded = load_policy(kind, tmp_path / "a" / "final")
    assert all(torch.equal(value, merged(policy)[name]) for name, value in loaded.state_dict().items())
    close(loss_of(loaded).detach(), loss_of(policy).detach())
    for name in ("config.json", "dataset_statistics.json", "tokenizer.json"):
        assert (tmp_path / "a" / "final" / name).read_bytes() == (tiny / name).read_bytes()


@pytest.mark.parametrize("train", ["lora+head", "all"])
def test_the_state_of_a_run_is_a_policy(tiny, kind, tmp_path, train):
    policy = make_trainable(load_policy(kind, tiny), train, rank=4)
    optimise(policy)
    args = {"policy": kind, "checkpoint": str(tiny), "train": train, "lora_rank": 4, "last_k": 1}
    args |= {"suite": "LiberoObject", "task_ids": [4]}
    (tmp_path / "args.json").write_text(json.dumps(args))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])
    latest = tmp_path / "checkpoints" / "latest"
    save_training_state(latest, policy, optimizer, {})
    loaded = load_policy(kind, latest, suite="LiberoObject")
    assert all(torch.equal(value, merged(policy)[name]) for name, value in loaded.state_dict().items())
    assert load_policy(kind, latest, "meta").head.weight.is_meta


def test_shards_and_their_index(tiny):
    index = json.loads((tiny / INDEX).read_text())
    files = sorted(tiny.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    held = {path.name: safetensors.torch.load_file(path) for path in files}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    total = sum(tensor.nbytes for tensors in held.values() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total


def test_one_file_needs_no_index(tiny, kind, tmp_path):
    """As Hugging Face writes a checkpoint that fits in one shard."""
    policy = load_policy(kind, tiny)
    save_policy(policy, kind, tmp_path / "final")
    assert [path.name for path in (tmp_path / "final").glob("*.safetensors*")] == [SINGLE]
    stored = safetensors.torch.load_file(tmp_path / "final" / SINGLE)
    assert stored.keys() == policy.state_dict().keys()


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tiny, kind, tmp_path, monkeypatch):
    policy = load_policy(kind, tiny)
    save_policy(policy, kind, tmp_path / "final")
    before = {path.name: path.read_bytes() for path in (tmp_path / "final").iterdir()}

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_policy(policy, kind, tmp_path / "final")
    assert {path.name: path.read_bytes() for path in (tmp_path / "final").iterdir()} == before


def refusal(checkpoint, device="cpu", name="openvla"):
    with pytest.raises(ValueError) as error:
        load_policy(name, checkpoint, device)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and str(checkpoint) in message
    return message


@pytest.fixture
def damaged(tmp_path):
    return write_tiny(tmp_path / "tiny")


def test_damaged_checkpoints(damaged):
    assert load_policy("openvla", damaged, "meta").head.weight.is_meta
    file = damaged / "model-00001-of-00004.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(tensors | {"no_such.weight": torch.ones(1)}, file)
    assert "no_such.weight" in refusal(damaged)
    name, _ = tensors.popitem()
    safetensors.torch.save_file(tensors, file)
    assert name in refusal(damaged) and name in refusal(damaged, "meta")
    (damaged / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(damaged)
    (damaged / INDEX).unlink()
    assert INDEX in refusal(damaged)


@pytest.mark.parametrize("name", ["config.json", INDEX, "dataset_statistics.json"])
def test_damaged_json_is_named(name, damaged, monkeypatch):
    file = damaged / name
    whole = file.read_text()
    monkeypatch.setattr("vla_envs.files.MOST_JSON", 10**5)
    for text in (whole[: len(whole) // 2], "", "[]", whole + " " * 10**5):
        file.write_text(text)
        assert f"{str(file)!r} is damaged" in refusal(damaged)
    assert "expected at most 100000" in refusal(damaged)


def test_weights_that_do_not_fit_or_are_not_finite(damaged):
    file = damaged / json.loads((damaged / INDEX).read_text())["weight_map"]["projector.fc1.bias"]
    tensors = safetensors.torch.load_file(file)
    tensors["projector.fc1.bias"][3] = float("nan")
    safetensors.torch.save_file(tensors, file)
    assert "projector.fc1.bias" in refusal(damaged)
    tensors["projector.fc1.bias"] = torch.zeros(5)
    safetensors.torch.save_file(tensors, file)
    assert "(5,)" in refusal(damaged) and "(224,)" in refusal(damaged)


def test_statistics_of_one_suite(damaged):
    file = damaged / "dataset_statistics.json"
    stored = json.loads(file.read_text())["libero_object"]
    file.write_text(json.dumps({"bridge_orig": {}, "libero_10_no_noops": stored}))
    assert load_policy("openvla", damaged, "meta").q99.tolist() == Q99
    file.write_text(json.dumps({"libero_10": stored, "libero_goal": stored}))
    assert "libero_10" in refusal(damaged) and "libero_goal" in refusal(damaged)
    file.unlink()
    assert load_policy("openvla", damaged, "meta").q01.tolist() == Q01


def write_statistics(folder, **suites):
    (folder / "dataset_statistics.json").write_text(json.dumps(suites))


def test_the_suite_decides_between_statistics(damaged, capsys):
    file = damaged / "dataset_statistics.json"
    stored = json.loads(file.read_text())["libero_object"]
    shifted = {"action": stored["action"] | {"q01": [q - 1 for q in Q01]}}
    write_statistics(damaged, libero_10=stored, libero_object_no_noops=shifted, libero_goal=stored, bridge={})
    assert load_policy("openvla", damaged, "meta", suite="LiberoObject").q01.tolist() == [q - 1 for q in Q01]
    assert load_policy("openvla", damaged, "meta", suite="LiberoGoal").q01.tolist() == Q01
    with pytest.raises(ValueError, match=r"'libero_goal'.*; expected libero_spatial"):
        load_policy("openvla", damaged, "meta", suite="LiberoSpatial")
    assert "statistics" not in capsys.readouterr().out
    write_statistics(damaged, libero_goal=stored)
    assert load_policy("openvla", damaged, "meta", suite="LiberoObject").q01.tolist() == Q01
    out = capsys.readouterr().out
    assert "LiberoObject is played with action statistics of libero_goal, the only ones" in out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q01": Q01[:6]}, "q01 of libero_object in its dataset_statistics.json is [-0.54"),
        ({"q99": [*Q99[:6], float("nan")]}, "nan]; expected 7 finite numbers"),
        ({"q99": [*Q99[:6], "1"]}, "'1']; expected 7 finite numbers"),
        ({"q01": None}, "q01 of libero_object in its dataset_statistics.json is None; expected 7"),
        ({"q01": [[0.0] * 7]}, "q01 of"),
        ({"q01": Q99, "q99": Q01}, "expected at most q99"),
        ({"mask": [True] * 6}, "mask of libero_object"),
        ({"mask": ["no"] * 7}, "mask of libero_object"),
    ],
    ids=str,
)
def test_statistics_that_do_not_fit(damaged, changes, words):
    write_statistics(damaged, libero_object={"action": {"q01": Q01, "q99": Q99} | changes})
    assert words in refusal(damaged, "meta")


@pytest.mark.parametrize("content", [{}, {"libero_object": []}, {"libero_object": {"action": [1]}}], ids=str)
def test_statistics_that_are_none(damaged, content):
    write_statistics(damaged, **content)
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"norm_stats": [content]}))
    assert "norm_stats" in refusal(damaged, "meta") or "expected q01 and q99" in refusal(damaged, "meta")


def test_a_direction_that_is_never_moved_in(damaged):
    still = {"q01": [0.0] * 7, "q99": [0.0] * 6 + [1.0]}
    write_statistics(damaged, libero_object={"action": still})
    policy = load_policy("openvla", damaged)
    tokens = policy.encode(torch.zeros(1, 1, 7))
    assert np.array_equal(policy.decode(tokens)[0, 0, :6], np.zeros(6))


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


DINO = asdict(TINY["dino"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": None}, "text_config is None; expected an object of sizes"),
        ({"text_config": {**TEXT, "num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000"),
        ({"text_config": {**TEXT, "hidden_size": -32}}, "hidden_size is -32"),
        ({"text_config": {**TEXT, "hidden_size": "32"}}, "hidden_size"),
        ({"text_config": {**TEXT, "vocab_size": 128}}, "vocab_size is 128; expected an int from 320"),
        ({"text_config": {**TEXT, "vocab_size": "512"}}, "vocab_size"),
        ({"text_config": {**TEXT, "num_attention_heads": 5}}, "heads"),
        ({"text_config": {**TEXT, "hidden_act": "gelou"}}, "gelou"),
        ({"dino": [1]}, "dino is [1]; expected an object of sizes"),
        ({"dino": DINO | {"depth": 2.5}}, "depth is 2.5; expected an int from 1"),
        ({"dino": DINO | {"dim": 10**12}}, "dim is 1000000000000"),
        ({"dino": DINO | {"heads": 7}}, "must divide by heads 7"),
        ({"dino": DINO | {"colour": 7}}, "colour"),
        ({"dino": DINO | {"patch_size": 28}}, "[(28, 28), (28, 14)]; expected the same"),
        ({"text_config": {**TEXT, "num_key_value_heads": 3}}, "must divide by num_key_value_heads 3"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(damaged, changes, words):
    set_config(damaged, **changes)
    assert words in refusal(damaged, "meta")


def test_dropout_of_a_configuration_is_none_of_ours(damaged, kind):
    """The policy of the update would be another one than the rollout's."""
    expected = loss_of(load_policy(kind, damaged).train())
    set_config(damaged, text_config={**TEXT, "attention_dropout": 0.5})
    assert torch.equal(loss_of(load_policy(kind, damaged).train()), expected)


@pytest.mark.parametrize("content", [[], {}, {"a": 3}, {"a": "../x.safetensors"}], ids=str)
def test_an_index_that_names_no_files(damaged, content):
    (damaged / INDEX).write_text(json.dumps({"weight_map": content}))
    assert INDEX in refusal(damaged) or "3' is damaged or missing" in refusal(damaged)


def test_words_of_another_model(damaged):
    file = damaged / "tokenizer.json"
    stored = json.loads(file.read_text())
    words = stored["model"]["vocab"]
    for vocabulary, said in (
        ({("_" if word == "▁" else word): i for word, i in words.items()}, "is without ['▁']"),
        (words | {f"word{i}": i for i in range(len(words), 600)}, "has 600 words, of 512 that it embeds"),
    ):
        stored["model"]["vocab"] = vocabulary
        file.write_text(json.dumps(stored))
        assert said in refusal(damaged, "meta")
    file.write_text("{")
    assert "cannot be loaded" in refusal(damaged, "meta")


def test_shards_that_do_not_fit(damaged):
    file = damaged / "model-00001-of-00004.safetensors"
    sound = file.read_bytes()
    tensors = safetensors.torch.load(sound)
    name = next(iter(tensors))
    safetensors.torch.save_file(tensors | {name: tensors[name].to(torch.int8)}, file)
    assert f"{name} is of I8; expected one of F64, F32, F16, BF16" in refusal(damaged)
    file.write_bytes(sound[:-9])
    assert f"{str(file)!r} is damaged or missing" in refusal(damaged)
    file.unlink()
    assert f"{str(file)!r} is damaged or missing" in refusal(damaged)


def test_memory_is_named_and_missing_memory_refused(tiny, monkeypatch, capsys):
    load_policy("openvla", tiny)
    assert "G parameters in float32 take" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10**10))
    message = refusal(tiny, "cuda")
    assert "bfloat16" in message and "0.0 GiB free" in message


def test_a_failed_download_is_one_line(monkeypatch):
    def fail(name, **_):
        raise OSError("no route\nto host")

    monkeypatch.setattr(published, "snapshot_download", fail)
    assert "no route to host" in refusal("openvla/no-such-checkpoint")


def test_weights_are_not_downloaded_where_they_do_not_fit(tiny, monkeypatch):
    """The small files come first, and with them the size."""
    asked = []

    def download(name, allow_patterns):
        asked.extend(allow_patterns)
        return str(tiny)

    monkeypatch.setattr(published, "snapshot_download", download)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10**10))
    refusal("openvla/a-checkpoint", "cuda")
    assert "*.json" in asked and "*.safetensors" not in asked
    assert load_policy("openvla", "openvla/a-checkpoint").q99.tolist() == Q99 and "*.safetensors" in asked


def test_there_is_no_openvla_without_a_checkpoint(kind):
    for make in (new_policy, load_policy):
        with pytest.raises(ValueError, match="openvla/openvla-7b-finetuned-libero-object"):
            make(kind)


# ---- Scripts -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Flags of each script; a reward that differs at every step; a demonstration of random motion."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "nearer.py").write_text("def nearer(facts):\n    return -facts['gripper_to_object']\n")
    (folder / "demos").mkdir()
    write_demos(folder / "demos" / "LiberoObject_4_demo.hdf5", (5, 5), size=64)
    online = ["--num-groups", "1", "--group-size", "2", "--reward", f"{folder / 'nearer.py'}:nearer"]
    return {
        "grpo_vla": [*online, "--keep-low", "0", "--keep-high", "1"],
        "tgrpo_vla": online,
        "tpo_vla": [*online, "--keep-low", "0", "--keep-high", "1", "--score", "return"],
        "ppo_vla": [*online, "--critic-warmup", "1"],
        "sft_vla": ["--demos", str(folder / "demos"), "--episodes", "1", "--iteration-steps", "2"],
    }


@pytest.mark.parametrize("script", ["grpo_vla", "tgrpo_vla", "ppo_vla", "tpo_vla", "sft_vla"])
def test_scripts(script, kind, tiny, own, tmp_path, monkeypatch):
    flags = (
        f"--policy {kind} --checkpoint {tiny} --run-dir {tmp_path / 'run'} --train lora --lora-rank 4"
        f" --num-iterations 1 --eval-episodes 1 --eval-every 0 --max-episode-steps {2 * CHUNK[kind]}"
        " --num-threads 1 --minibatch-size 4 --device cpu"
    )
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split(), *own[script]])
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    run = tmp_path / "run"
    assert json.loads((run / "args.json").read_text())["action_chunk"] == CHUNK[kind]
    assert (run / "checkpoints" / "adapter" / "adapter_model.safetensors").is_file()
    before, after = (load_policy(kind, path).state_dict() for path in (tiny, run / "checkpoints" / "final"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
