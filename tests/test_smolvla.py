"""SmolVLA: against LeRobot's own figures, as a policy with log-probabilities, its files, and the scripts.

The figures were computed once by LeRobot 0.6.1 on tiny, random checkpoints of its own format, in the two
published layouts. They are read from the folder that SMOLVLA_REFERENCE names, where it is there
(``../shared/smolvla_reference``).
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from artifacts import ROOT, write_demos
from tiny_smolvla import MEAN, SENTENCES, STATE, STD, TINY, write, write_tiny

from vla_envs.policies import count_parameters, load_policy, new_policy, save_policy
from vla_envs.policies.adapters import make_trainable, merged
from vla_envs.policies.images import lerobot_pixels
from vla_envs.policies.lerobot.files import Normaliser
from vla_envs.policies.lerobot.policy import NOISES, LeRobotPolicy
from vla_envs.policies.lerobot.smolvla import SmolVLA, SmolVLAConfig
from vla_envs.policies.protocol import blank_observations, validate
from vla_envs.training.evaluation import settings

REFERENCE = Path(os.environ.get("SMOLVLA_REFERENCE", ROOT.parent / "shared" / "smolvla_reference"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("smolvla") / "tiny")


def observations(batch=3, size=48, seed=0):
    rng = np.random.default_rng(seed)
    images = {
        name: rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        for name in ("image", "wrist_image")
    }
    return images | {"state": (np.array(STATE["mean"]) + 0.05 * rng.standard_normal((batch, 8))).astype("f4")}


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---- LeRobot's figures ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["", "libero"], ids=["base", "libero"])
def reference(request):
    """The policy of a reference's checkpoint, its observations and sentences, and LeRobot's figures."""
    folder = REFERENCE / request.param
    if not (folder / "expected.npz").is_file():
        pytest.skip(f"{folder} holds no figures of the original implementation (SMOLVLA_REFERENCE)")
    with np.load(folder / "expected.npz") as file:
        figures = {name: file[name] for name in file}
    turned = {  # robosuite's images are upside down, the environments' turned by 180 degrees
        name: np.ascontiguousarray(figures[stored][:, ::-1, ::-1])
        for name, stored in (("image", "raw.image"), ("wrist_image", "raw.image2"))
    }
    policy = LeRobotPolicy.load("smolvla", folder, action_chunk=50)
    sentences = [str(text) for text in figures["raw.task"]]
    tensors = {name: torch.from_numpy(array) for name, array in figures.items() if array.dtype.kind in "fib"}
    names = [str(name) for name in figures["train.names"]]
    return policy, turned | {"state": figures["state_raw"]}, sentences, tensors | {"names": names}


def close(mine, theirs, atol=2e-5, rtol=1e-5):
    torch.testing.assert_close(mine, theirs, atol=atol, rtol=rtol)


def their_prefix(policy, figures):
    """The prefix of LeRobot's own inputs, among them cameras that are empty."""
    names = ("images", "image_masks", "tokens", "token_mask", "state")
    return policy.model.prefix(*(figures[name] for name in names))


def test_inputs_are_lerobots(reference):
    policy, obs, sentences, figures = reference
    images, masks, words, there, state = policy.prepare(obs, sentences)
    x, w = figures["raw.eef_quat"][:, :3], figures["raw.eef_quat"][:, 3:]  # as the environments turn it
    angle = 2.0 * torch.arccos(w) * x / torch.sqrt(1.0 - w * w)
    own = torch.cat([figures["raw.eef_pos"], angle, figures["raw.gripper_qpos"]], dim=1)
    close(own.float(), figures["state_raw"], atol=1e-6)
    close(images, figures["images"][:, : len(policy.cameras)], atol=1e-6)
    assert masks.all() and not figures["image_masks"][:, len(policy.cameras) :].any()
    length = words.shape[1]
    assert torch.equal(there, figures["token_mask"][:, :length])
    assert not figures["token_mask"][:, length:].any()
    assert torch.equal(words * there, figures["tokens"][:, :length] * there)
    close(state, figures["state"], atol=2e-6)


@torch.no_grad()
def test_the_prefix_is_lerobots(reference):
    policy, _, _, figures = reference
    names = ("images", "image_masks", "tokens", "token_mask", "state")
    inputs = [figures[name] for name in names]
    close(policy.model.see(inputs[0]), figures["image_embeds"])
    embedded, mask = policy.model.embed(*inputs[:4])
    state = policy.model.state_proj(figures["state"]).unsqueeze(1)
    theirs = figures["prefix_pad_mask"]
    assert torch.equal(mask, theirs[:, :-1]) and theirs[:, -1].all()
    close(torch.cat([embedded, state], dim=1)[theirs], figures["prefix_embeds"][theirs])
    seen = policy.model.read(*inputs[:4])
    prefix = policy.model.with_state(seen, figures["state"])
    own = slice(None, None, policy.model.config.self_attention_every)  # the expert projects the others

    def compare(mine, theirs, mask):
        where = mask[:, None].expand(-1, theirs.shape[1], -1)
        close(torch.stack(mine, dim=1).transpose(2, 3)[where], theirs.transpose(2, 3)[where])

    for name in ("keys", "values"):
        compare(getattr(seen, name), figures[f"prefix_{name}"][..., :-1, :], mask)
        compare(getattr(prefix, name)[own], figures[f"prefix_{name}"][:, own], theirs)
    close(prefix.hidden, figures["prefix_hidden"][:, -1])


@torch.no_grad()
def test_velocities_are_lerobots(reference):
    policy, obs, sentences, figures = reference
    prefixes = {"theirs": their_prefix(policy, figures), "ours": policy.prefix(obs, sentences)}
    for i, time in enumerate(figures["times"]):
        t = time.expand(len(sentences))
        close(policy.model.embed_actions(figures["x_t"], t), figures["suffix_embeds"][i])
        for prefix in prefixes.values():  # an empty camera changes nothing
            close(policy.model.velocity(figures["x_t"], t, prefix), figures["velocity"][i])


@torch.no_grad()
def test_the_odes_chain_and_actions_are_lerobots(reference):
    policy, obs, sentences, figures = reference
    nothing = torch.zeros(len(sentences), 10, dtype=torch.bool)
    chain, _ = policy.chain(policy.prefix(obs, sentences), figures["noise"], None, nothing, 0.0)
    close(chain, figures["chain"])
    close(policy.action.inverse(chain[:, -1, :, :7]), figures["actions"])
    for i in range(len(sentences)):  # without the batch's padding
        alone = policy.prefix({name: array[[i]] for name, array in obs.items()}, sentences[i : i + 1])
        its, _ = policy.chain(alone, figures["noise"][[i]], None, nothing[[i]], 0.0)
        close(its[:, -1, :, :7], figures["actions_normalised_alone"][[i]])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sde", "sde1"])
def test_random_steps_and_their_densities_are_as_derived(reference, kind):
    policy, obs, sentences, figures = reference
    steps = torch.arange(10).expand(len(sentences), -1)
    random = steps == figures["sde1.step"].unsqueeze(1) if kind == "sde1" else steps >= 0
    prefix, z = policy.prefix(obs, sentences), figures["sde.z"]
    chain, logprobs = policy.chain(prefix, figures["noise"], lambda k: z[:, k], random, 1.0)
    close(chain, figures[f"{kind}.chain"], atol=5e-5)
    rows = torch.arange(len(sentences))
    expected = figures[f"{kind}.logprob"]  # of these numbers
    close(logprobs[rows, figures["sde1.step"]] if kind == "sde1" else logprobs, expected, atol=1e-3)
    other = LeRobotPolicy(policy.model, policy.published, replace(
        policy.settings, noise="sde-one" if kind == "sde1" else "sde"
    ))  # fmt: skip
    tokens = figures[f"{kind}.chain"]
    if kind == "sde1":
        k = figures["sde1.step"]
        pair = torch.stack([tokens[rows, k], tokens[rows, k + 1]], dim=1).flatten(1)
        tokens = torch.cat([k.float().unsqueeze(1), pair], dim=1)
    close(other.score(obs, sentences, tokens)[0], expected.flatten(1), atol=1e-3)


def test_training_is_lerobots(reference):
    policy, obs, sentences, figures = reference
    policy = make_trainable(policy, "expert")
    losses = policy.flow_loss(
        policy.prefix(obs, sentences), figures["train.action_normalised"], figures["noise"],
        figures["train.time"],
    )  # fmt: skip
    close(losses.mean(), figures["train.loss"])
    there = ~figures["train.action_is_pad"]
    close(losses[there].mean(), figures["train.loss_with_padding"])
    policy.zero_grad()
    losses.mean().backward()
    norms = {name: p.grad.norm() for name, p in policy.named_parameters() if p.requires_grad}
    assert {name.removeprefix("model.") for name in norms} == {
        name.removeprefix("model.") for name in figures["names"]
    }
    own = {name.removeprefix("model."): norm for name, norm in norms.items()}
    for name, theirs in zip(figures["names"], figures["train.grad_norm"]):
        close(own[name.removeprefix("model.")], theirs)
    for parameter in policy.parameters():
        parameter.requires_grad = False


@torch.no_grad()
def test_bfloat16_is_as_near_as_lerobots_own(reference):
    """LeRobot's bfloat16 is off by up to 0.2 from its float32; ours rounds elsewhere, and no more."""
    _, _, sentences, figures = reference
    if "mixed.velocity" not in figures:
        pytest.skip("these figures are in float32 alone")
    half = LeRobotPolicy.load("smolvla", REFERENCE / "libero", dtype=torch.bfloat16)
    prefix = their_prefix(half, figures)
    mine = torch.stack([
        half.model.velocity(figures["x_t"], time.expand(len(sentences)), prefix) for time in figures["times"]
    ])  # fmt: skip
    exact, theirs = figures["velocity"], figures["mixed.velocity"]
    assert (mine - exact).abs().max() < 0.25 and (mine - theirs).abs().max() < 0.35
    assert (mine - exact).std() < 1.2 * (theirs - exact).std()


# ---- A policy ------------------------------------------------------------------------------------------


every_noise = pytest.mark.parametrize("noise", NOISES)
COUNTS = {"sde-one": 1, "sde": 4, "learned": 4}  # random steps of a chain of four


@every_noise
def test_it_is_a_policy(tiny, noise):
    policy = load_policy("smolvla", tiny, settings={"action_chunk": 3, "noise": noise})
    validate(policy, "smolvla")
    assert (
        policy.cameras == ("image", "wrist_image") and blank_observations(policy, 1)["wrist_image"].any() == 0
    )
    assert policy.action_chunk == 3 and policy.imitation_chunk == 6 and policy.hidden_size == TINY.width
    assert settings(None, "LiberoObject", policy) == {"image_size": 256, "wrist_camera": True}
    actions, tokens, logprobs = policy.sample(observations(), SENTENCES)
    assert actions.shape == (3, 3, 7) and logprobs.shape == (3, COUNTS[noise] * 3 * 7)
    assert tokens.shape == ((3, 1 + 2 * 6 * 10) if noise == "sde-one" else (3, 5, 6, 10))
    assert tokens.dtype == torch.float32


@every_noise
@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_scores_are_those_of_the_sample(tiny, noise, temperature):
    policy, obs = load_policy("smolvla", tiny, settings={"action_chunk": 3, "noise": noise}), observations()
    _, tokens, sampled = policy.sample(obs, SENTENCES, temperature, generators(1, 2, 3))
    logprobs, entropies, hidden = policy.score(obs, SENTENCES, tokens, temperature)
    close(logprobs, sampled, atol=1e-3)
    assert entropies.shape == logprobs.shape and hidden.shape == (3, TINY.width)
    # On average a draw's log-density is minus the entropy.
    assert float((logprobs + entropies).mean().detach()) == pytest.approx(0.0, abs=0.35)
    _, others, _ = policy.sample(obs, SENTENCES, temperature, generators(4, 5, 6))
    assert torch.equal(policy.score(obs, SENTENCES, others, temperature)[2], hidden)  # no noise in it


@every_noise
def test_a_draw_depends_on_its_own_generator_alone(tiny, noise, monkeypatch):
    policy, obs = load_policy("smolvla", tiny, settings={"action_chunk": 3, "noise": noise}), observations()
    actions, tokens, _ = policy.sample(obs, SENTENCES, 1.0, generators(1, 2, 3))
    last = {name: array[2:] for name, array in obs.items()}
    alone, its, _ = policy.sample(last, SENTENCES[2:], 1.0, generators(3))
    np.testing.assert_allclose(alone, actions[2:], atol=1e-5)
    close(its, tokens[2:])
    monkeypatch.setattr("vla_envs.policies.lerobot.smolvla.IMAGES_AT_ONCE", 4)
    again, parts, _ = policy.sample(obs, SENTENCES, 1.0, generators(1, 2, 3))
    np.testing.assert_allclose(again, actions, atol=1e-5)
    close(parts, tokens)


def test_the_deterministic_action_is_the_odes_from_noise(tiny):
    policy, obs = load_policy("smolvla", tiny), observations()
    first, tokens, logprobs = policy.sample(obs, SENTENCES, 0.0, generators(1, 2, 3))
    again, _, _ = policy.sample(obs, SENTENCES, 0.0, generators(1, 2, 3))
    other, _, _ = policy.sample(obs, SENTENCES, 0.0, generators(4, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other) and torch.isfinite(logprobs).all()
    close(policy.score(obs, SENTENCES, tokens, 0.0)[0], logprobs, atol=1e-3)  # at temperature 1
    with torch.no_grad():
        x = torch.stack([torch.randn(6, 10, generator=g) for g in generators(1, 2, 3)])
        prefix = policy.prefix(obs, SENTENCES)
        for k in range(4):
            x = x - policy.model.velocity(x, torch.full((3,), 1 - k / 4), prefix) / 4
    expected = (x[..., :7] * torch.tensor(STD) + torch.tensor(MEAN)).clamp(-1, 1)
    np.testing.assert_allclose(first, expected.numpy(), atol=1e-5)


def test_only_what_is_executed_counts(tiny):
    policy, obs = load_policy("smolvla", tiny, settings={"action_chunk": 2}), observations()
    _, tokens, logprobs = policy.sample(obs, SENTENCES)
    after = tokens[:, 61:].view(3, 6, 10)  # a view
    after[:, 2:] += 1.0
    after[..., 7:] -= 1.0
    close(policy.score(obs, SENTENCES, tokens)[0], logprobs, atol=1e-3)
    after[:, 1, 6] += 1.0
    changed = (policy.score(obs, SENTENCES, tokens)[0] - logprobs).abs() > 1e-2
    assert changed.nonzero()[:, 1].tolist() == [13] * 3


def test_the_random_step_is_any_of_them(tiny):
    policy, obs = load_policy("smolvla", tiny), observations(1)
    twenty = {name: array.repeat(20, axis=0) for name, array in obs.items()}
    assert set(policy.sample(twenty, SENTENCES[:1] * 20)[1][:, 0].tolist()) == {0, 1, 2, 3}


def test_imitation_draws_lerobots_times(tiny):
    policy, obs, drawn = load_policy("smolvla", tiny), observations(), []
    actions = torch.rand(3, 6, 7) - 0.5
    losses = [
        policy.imitation_loss(obs, SENTENCES, actions, generators(*seeds)) for seeds in ((1, 2, 3),) * 2
    ]
    assert torch.equal(*losses) and losses[0].requires_grad and losses[0].shape == ()
    prefix = policy.prefix(obs, SENTENCES)
    policy.prefix = lambda obs, instructions: prefix
    policy.flow_loss = lambda prefix, target, noise, t: drawn.append(t) or noise
    for _ in range(200):
        policy.imitation_loss(obs, SENTENCES, actions)
    t = torch.cat(drawn)  # 0.001 + 0.999 Beta(1.5, 1), whose mean is 0.6
    assert 0.001 <= t.min() and t.max() <= 1 and float(t.mean()) == pytest.approx(0.6, abs=0.04)


def test_adapters_leave_the_prefix_without_gradients(tiny):
    obs = observations()
    for train, whole in (("lora", False), ("expert", True)):
        policy = make_trainable(load_policy("smolvla", tiny), train, rank=2)
        hidden = policy.prefix(obs, SENTENCES).hidden
        assert hidden.requires_grad == whole  # by state_proj
        names = [name for name, p in policy.named_parameters() if p.requires_grad]
        assert not any("vision_model" in name or "text_model" in name for name in names)
    policy = make_trainable(load_policy("smolvla", tiny, settings={"noise": "learned"}), "lora", rank=2)
    loss = policy.score(obs, SENTENCES, policy.sample(obs, SENTENCES)[1])[0].sum()
    loss.backward()
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert any("noise_head" in name for name in trained) and any("lora_B" in name for name in trained)
    assert all(p.grad is not None for p in trained.values())


def test_all_and_the_last_blocks_are_trained(tiny):
    counts = {}
    for train in ("head", "expert", "lora+last-k", "all"):
        policy = make_trainable(load_policy("smolvla", tiny), train, rank=2, last_k=1)
        counts[train], total = count_parameters(policy)
    assert 0 < counts["head"] < counts["lora+last-k"] < counts["expert"] < counts["all"] == total


def test_an_expert_is_only_trained_where_there_is_one():
    with pytest.raises(ValueError, match="the policy has no expert; expected --train all or lora"):
        make_trainable(load_policy("nano"), "expert")


@pytest.mark.parametrize(
    "layers, width, mlp, tensors, parameters", [(16, 720, 2048, 500, 450.0), (32, 480, 1280, 788, 604.9)]
)
def test_true_sizes_are_the_published_ones(layers, width, mlp, tensors, parameters):
    """As many tensors as in the published files, and as many million parameters."""
    config = SmolVLAConfig(
        vision_width=768, vision_layers=12, vision_heads=12, vision_mlp=3072, patch=16, image_size=512,
        shuffle=4, vocabulary=49280, width=960, layers=layers, head=64, heads=15, key_heads=5, mlp=2560,
        expert_width=width, expert_mlp=mlp, self_attention_every=2, state_dim=32, action_dim=32,
        action_chunk=50,
    )  # fmt: skip
    with torch.device("meta"):
        model = SmolVLA(config)
    counts = [parameter.numel() for parameter in model.parameters()]
    assert len(counts) == tensors and round(sum(counts) / 1e6, 1) == parameters
    # What sizes a file with such tensors has; those of heads are the published model's.
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    said = {"chunk_size": 50, "resize_imgs_with_padding": [512, 512]}
    assert SmolVLAConfig.of(shapes, said, {}) == config


# ---- Images and statistics -----------------------------------------------------------------------------


def test_images_are_padded_on_the_left_and_above():
    image = torch.full((1, 10, 20, 3), 255, dtype=torch.uint8)
    for centred, rows in ((False, slice(10, 20)), (True, slice(5, 15))):
        pixels = lerobot_pixels(image, 20, centred)
        assert (pixels[..., rows, :] == 1).all() and (pixels == -1).sum() == 3 * 10 * 20
    upright = lerobot_pixels(image.transpose(1, 2), 40)
    assert (upright[..., :20] == -1).all() and (upright[..., 20:] == 1).all()
    same = torch.arange(48, dtype=torch.uint8).view(1, 4, 4, 3)
    close(lerobot_pixels(same, 4), same.permute(0, 3, 1, 2) / 127.5 - 1.0)


@pytest.mark.parametrize(
    "mode, names, normalised, back",
    [
        ("MEAN_STD", ("mean", "std"), (3.0 - 1.0) / (4.0 + 1e-2), 0.5 * 4.0 + 1.0),
        ("MIN_MAX", ("min", "max"), 2 * (3.0 - 1.0) / 3.0 - 1.0, 1.0 + 0.75 * 3.0),
        ("QUANTILES", ("q01", "q99"), 2 * (3.0 - 1.0) / 3.0 - 1.0, 1.0 + 0.75 * 3.0),
        ("IDENTITY", ("mean", "std"), 3.0, 0.5),
        ("MEAN_STD", ("min", "max"), 3.0, 0.5),  # without its statistics
    ],
)
def test_normalisation_by_hand(mode, names, normalised, back):
    step = {"config": {"eps": 1e-2, "norm_map": {"STATE": mode}}}
    numbers = {f"observation.state.{name}": torch.tensor([value]) for name, value in zip(names, (1.0, 4.0))}
    normaliser = Normaliser.of(step, numbers, "observation.state", 1)
    assert normaliser(torch.tensor([3.0])).item() == pytest.approx(normalised)
    assert normaliser.inverse(torch.tensor([0.5])).item() == pytest.approx(back)


# ---- Files ---------------------------------------------------------------------------------------------


def test_a_saved_checkpoint_is_in_the_published_format(tiny, tmp_path):
    """The same files and tensors, in the same number formats, with what only this package knows beside."""
    policy = load_policy("smolvla", tiny, settings={"action_chunk": 3, "noise": "sde", "noise_level": 0.3})
    policy.made_for = {"LiberoObject": [4]}
    save_policy(policy, "smolvla", tmp_path / "saved")
    files = {path.relative_to(tiny) for path in tiny.rglob("*")}
    assert {path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved").rglob("*")} == files | {
        Path("vla_envs.json")
    }
    before, after = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (tiny, tmp_path / "saved")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name])
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tiny, tmp_path / "saved")]
    assert configs[1] == configs[0] | {"n_action_steps": 3}
    again = load_policy("smolvla", tmp_path / "saved")
    assert again.settings == policy.settings and again.made_for == policy.made_for
    assert load_policy("smolvla", tmp_path / "saved", settings={"action_chunk": 2}).action_chunk == 2


@pytest.mark.parametrize("train", ["lora", "expert", "all"])
def test_what_is_trained_is_saved_as_it_plays(tiny, tmp_path, train):
    policy = make_trainable(load_policy("smolvla", tiny, settings={"noise": "learned"}), train, rank=2)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad and "norm" not in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    save_policy(policy, "smolvla", tmp_path / "saved")
    again, obs = load_policy("smolvla", tmp_path / "saved"), observations()
    for mine, theirs in zip(
        *(each.sample(obs, SENTENCES, 1.0, generators(1, 2, 3)) for each in (policy, again))
    ):
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), atol=1e-4, rtol=1e-4)
    changed = merged(policy)
    before = load_policy("smolvla", tiny).state_dict()
    assert any(not torch.equal(before[name], changed[name]) for name in before)
    tensors = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    assert not any("noise_head" in name for name in tensors)  # LeRobot would not know them


def test_saving_copies_no_weights(tiny, tmp_path, monkeypatch):
    """But for those that are rounded to the file's format: true sizes are gigabytes."""
    policy, written = make_trainable(load_policy("smolvla", tiny), "expert"), {}
    monkeypatch.setattr(LeRobotPolicy, "save", lambda self, weights, folder: written.update(weights))
    save_policy(policy, "smolvla", tmp_path / "saved")
    own = policy.state_dict()
    assert written.keys() == own.keys()
    assert all(weight.data_ptr() == own[name].data_ptr() for name, weight in written.items())


@pytest.fixture
def edited(tiny, tmp_path):
    """A function: a copy of the checkpoint of which one JSON file is edited."""

    def edit(file, change):
        folder = write_tiny(tmp_path / "edited")
        content = json.loads((folder / file).read_text())
        change(content)
        write(folder / file, content)
        return folder

    return edit


def refusal(folder, **settings):
    with pytest.raises(ValueError) as error:
        load_policy("smolvla", folder, settings=settings)
    message = str(error.value)
    begins = (f"checkpoint {str(folder)!r} {words} 'smolvla'" for words in ("of", "is not a checkpoint of"))
    assert "\n" not in message and message.startswith(tuple(begins))
    return message


def features(**others):
    """Sets the inputs to the state and these images."""
    images = {
        f"observation.images.{name}": {"type": kind, "shape": [3, 8, 8]} for name, kind in others.items()
    }
    state = {"observation.state": {"type": "STATE", "shape": [8]}}
    return lambda config: config.update(input_features=state | images)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.update(type="pi0"), "its config.json is of policy 'pi0'; expected --policy pi0"),
        (lambda c: c.update(type="act"), "type 'act'; expected 'smolvla'"),
        (lambda c: c.update(chunk_size=0), "chunk_size is 0"),
        (lambda c: c.update(use_peft=True), "use_peft is True; expected False"),
        (lambda c: c.update(attention_mode="self_attn"), "attention_mode is 'self_attn'"),
        (lambda c: c.update(num_vlm_layers=2), "num_vlm_layers is 2; expected 3"),
        (lambda c: c.update(num_expert_layers=1), "num_expert_layers is 1; expected 3"),
        (lambda c: c.update(resize_imgs_with_padding=None), "expected [32, 32]"),
        (lambda c: c.update(self_attn_every_n_layers=0), "self_attn_every_n_layers is 0"),
        (lambda c: c.update(self_attn_every_n_layers=3), "shape"),
        (lambda c: c.update(output_features={"action": {"shape": [6]}}), "[6]; expected [7]"),
        (lambda c: c["input_features"]["observation.state"].update(shape=[6]), "another robot"),
        (lambda c: c.pop("input_features"), "no input_features"),
        (features(front="VISUAL"), "observation.images.image2 for the wrist's camera"),
        (features(image="VISUAL", side="VISUAL"), "['observation.images.image', 'observation.images.side']"),
        (features(), "it takes the images []"),
        (features(image="VISUAL", force="ENV"), "'observation.images.force', which the environments do not"),
    ],
)
def test_a_configuration_that_does_not_fit(edited, change, words):
    assert words in refusal(edited("config.json", change))


def test_processors_that_do_not_fit(tiny, edited, tmp_path):
    def unknown(content):
        content["steps"].append({"registry_name": "delta_actions_processor", "config": {}})

    def relative(content):
        content["steps"].append({"registry_name": "relative_actions_processor", "config": {"enabled": True}})

    def ten(content):
        content["steps"][-1]["config"]["norm_map"] |= {"STATE": "QUANTILE10"}

    def none(content):
        content["steps"][-1]["state_file"] = "missing.safetensors"

    for change, words in (
        (unknown, "'delta_actions_processor', which is not done here"),
        (relative, "actions relative to the state; expected LIBERO's own"),
        (ten, "normalised by 'QUANTILE10'; expected one of"),
        (none, "it has no missing.safetensors"),
    ):  # fmt: skip
        folder = edited("policy_preprocessor.json", change)
        assert words in refusal(folder)
        folder.rename(tmp_path / change.__name__)
    folder = write_tiny(tmp_path / "old")
    (folder / "policy_preprocessor.json").unlink()
    assert "LeRobot's checkpoints have since version 0.4" in refusal(folder)


def test_tensors_that_do_not_fit(tmp_path):
    folder = write_tiny(tmp_path / "broken")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for change, words in (
        ({"model.stray": torch.zeros(1)}, "belong to nothing: ['model.stray']"),
        ({"model.state_proj.bias": torch.zeros(5)}, "model.state_proj.bias has shape (5,); expected (24,)"),
        ({"model.state_proj.bias": torch.full((24,), torch.nan)}, "not finite in model.state_proj.bias"),
    ):
        safetensors.torch.save_file(tensors | change, folder / "model.safetensors")
        with pytest.raises(ValueError) as error:
            load_policy("smolvla", folder)
        assert words in str(error.value)
    del tensors["model.vlm_with_expert.lm_expert.norm.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    assert "it has no vlm_with_expert.lm_expert.norm.weight" in refusal(folder)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    assert "is damaged" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "it has no model.safetensors or model.safetensors.index.json" in refusal(folder)


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"noise": "sde-on"},
            "noise 'sde-on' is unknown; expected one of sde-one, sde, learned; did you mean",
        ),
        ({"noise_level": 0.0}, "noise_level is 0.0; expected a number above 0"),
        ({"denoising_steps": 0}, "denoising_steps is 0; expected an int from 1 to 1000"),
    ],
)
def test_settings_that_do_not_fit(tiny, settings, words):
    """What no checkpoint would have is no mistake of this one."""
    with pytest.raises(ValueError) as error:
        load_policy("smolvla", tiny, settings=settings)
    assert str(error.value).startswith(words)


def test_settings_that_do_not_fit_the_checkpoint(tiny):
    assert "action_chunk is 7; expected at most 6, the actions" in refusal(tiny, action_chunk=7)
    words = "noise_level is 0.3; expected none with learned noise"
    assert words in refusal(tiny, noise="learned", noise_level=0.3)
    load_policy("smolvla", tiny, settings={"noise": "learned", "noise_level": 0.5})  # as a run's own has it


def test_settings_of_other_policies():
    with pytest.raises(ValueError, match="policy 'nano' has no noise; expected one that denoises: flow, sm"):
        load_policy("nano", settings={"noise": "sde"})
    assert load_policy("flow", settings={"noise": "fixed"}).settings.noise == "fixed"
    with pytest.raises(ValueError, match=r"starts from a checkpoint.*HuggingFaceVLA/smolvla_libero"):
        new_policy("smolvla")


def test_cameras_by_a_rename_map_and_in_another_order(tiny, edited, tmp_path, capsys):
    folder = edited("config.json", features(right="VISUAL", left="VISUAL", empty_camera_0="VISUAL"))
    names = {
        "observation.images.image": "observation.images.left",
        "observation.images.image2": "observation.images.right",
    }
    steps = json.loads((folder / "policy_preprocessor.json").read_text())
    steps["steps"][0]["config"]["rename_map"] = names
    write(folder / "policy_preprocessor.json", steps)
    policy = load_policy("smolvla", folder)
    assert policy.cameras == ("wrist_image", "image") and "left out" not in capsys.readouterr().out
    obs = observations()
    turned = {"image": obs["wrist_image"], "wrist_image": obs["image"], "state": obs["state"]}
    plain = load_policy("smolvla", tiny)
    actions = [
        each.sample(its, SENTENCES, 0.0, generators(1, 2, 3))[0]
        for each, its in ((policy, obs), (plain, turned))
    ]
    np.testing.assert_array_equal(*actions)
    folder.rename(tmp_path / "other")
    third = edited("config.json", features(camera1="VISUAL", camera2="VISUAL", camera3="VISUAL"))
    assert load_policy("smolvla", third).cameras == ("image", "wrist_image")
    assert "left out: observation.images.camera3" in capsys.readouterr().out


def test_an_observation_without_the_wrists_image(tiny):
    policy, obs = load_policy("smolvla", tiny), observations()
    del obs["wrist_image"]
    with pytest.raises(ValueError, match="no wrist_image; expected environments with wrist_camera=True"):
        policy.sample(obs, SENTENCES)


def test_a_tokenizer_from_elsewhere(tiny, tmp_path, monkeypatch):
    """The hub's is kept in what is saved, and a checkpoint's own comes first."""
    folder = write_tiny(tmp_path / "moved")
    (folder / "vlm" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    asked = []

    def download(name, file):
        asked.append((name, file))
        return str(tmp_path / file)

    monkeypatch.setattr("vla_envs.policies.lerobot.files.hf_hub_download", download)
    policy = load_policy("smolvla", folder)
    assert asked == [("vlm", "tokenizer.json")]
    save_policy(policy, "smolvla", tmp_path / "saved")
    again = load_policy("smolvla", tmp_path / "saved")
    assert len(asked) == 1
    assert again.published.words(SENTENCES[0]) == load_policy("smolvla", tiny).published.words(SENTENCES[0])

    def fail(name, file):
        raise OSError("no route\nto host")

    monkeypatch.setattr("vla_envs.policies.lerobot.files.hf_hub_download", fail)
    assert "no route to host; expected it in" in refusal(folder)


def test_a_prompt_ends_with_one_new_line(tiny):
    words = load_policy("smolvla", tiny).published.words
    assert words("pick up") == words("pick up\n") and words("pick up")[-1] == 2
    assert len(words(" ".join(SENTENCES * 3))) == 16


def test_a_checkpoint_on_the_hub(tiny, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        return str(tiny)

    monkeypatch.setattr("vla_envs.policies.published.snapshot_download", download)
    assert load_policy("smolvla", "HuggingFaceVLA/smolvla_libero").imitation_chunk == 6
    assert load_policy("smolvla", "HuggingFaceVLA/smolvla_libero", "meta") is not None
    assert asked == ["HuggingFaceVLA/smolvla_libero"] * 2


# ---- Scripts -------------------------------------------------------------------------------------------


@pytest.fixture
def start(execute, tiny, tmp_path, monkeypatch):
    """A function that runs a script for an iteration on images of 32 pixels; the folder of the run."""
    monkeypatch.setattr(LeRobotPolicy, "image_size", 32)
    (tmp_path / "nearer.py").write_text("def nearer(facts):\n    return -facts['gripper_to_object']\n")

    def start(script, **flags):
        common = {
            "policy": "smolvla", "checkpoint": tiny, "train": "expert", "num_iterations": 1,
            "eval_episodes": 1, "eval_every": 0, "max_episode_steps": 6, "action_chunk": 3, "num_threads": 1,
            "minibatch_size": 4, "run_dir": "run", "device": "cpu",
        }  # fmt: skip
        execute(script, **common | flags)
        return tmp_path / "run"

    return start


def assert_learnt(run, tiny):
    before, after = (
        load_policy("smolvla", path).state_dict() for path in (tiny, run / "checkpoints" / "final")
    )
    assert not torch.equal(*(each["model.action_out_proj.weight"] for each in (before, after)))
    assert torch.equal(*(each["model.vlm_with_expert.vlm.lm_head.weight"] for each in (before, after)))
    args = json.loads((run / "args.json").read_text())
    assert (args["action_chunk"], args["denoising_steps"], args["noise_level"]) == (3, 4, 0.5)
    return args


def test_online_rl(start, tiny):
    run = start("grpo_vla", num_groups=1, group_size=2, reward="nearer.py:nearer", keep_low=0, keep_high=1)
    assert assert_learnt(run, tiny)["noise"] == "sde-one"


@pytest.mark.slow
@every_noise
@pytest.mark.parametrize("script", ["tgrpo_vla", "ppo_vla", "grpo_vla", "tpo_vla"])
def test_every_script_of_online_rl(start, tiny, script, noise):
    """PPO needs an iteration more: its critic learns alone at first."""
    own = {
        "grpo_vla": {"keep_low": 0, "keep_high": 1}, "ppo_vla": {"critic_warmup": 1, "num_iterations": 2},
        "tpo_vla": {"keep_low": 0, "keep_high": 1, "score": "return"},
    }  # fmt: skip
    flags = {"num_groups": 1, "group_size": 2, "reward": "nearer.py:nearer", "noise": noise}
    run = start(script, **flags | own.get(script, {}))
    assert assert_learnt(run, tiny)["noise"] == noise
    start(script, resume=run, num_iterations=3)
    execute_again = load_policy("smolvla", run / "checkpoints" / "latest")
    final = load_policy("smolvla", run / "checkpoints" / "final")
    close(execute_again.head.weight, final.head.weight)


@pytest.mark.slow
def test_imitation(start, tiny, tmp_path):
    (tmp_path / "demos").mkdir()
    write_demos(tmp_path / "demos" / "LiberoObject_4_demo.hdf5", (6, 6))
    assert_learnt(start("sft_vla", demos="demos", episodes=1, iteration_steps=2), tiny)
