"""The nano policy, its tokens, and checkpoints."""

import dataclasses
import json
import math
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

import ppo_vla
from vla_envs.files import write_json
from vla_envs.policies import SHIPPED, adapters, count_parameters, load_policy, new_policy, save_policy
from vla_envs.policies.nano import NanoConfig, NanoPolicy, action_tokens, draw, shift, token_actions, tokenize
from vla_envs.tasks import get_task
from vla_envs.training import checkpoints

SMALL = {"action_chunk": 2, "action_repeat": 1, "image_size": 32, "width": 16, "depth": 2, "heads": 2}
SENTENCES = [get_task("LiberoObject", task_id).instruction for task_id in range(10)]


def observations(batch, size=128, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    state = np.array([-0.05, 0, 0.2, 3.1, 0, 0, 0.03, -0.03]) + 0.05 * rng.standard_normal((batch, 8))
    return {"image": image, "state": state.astype(np.float32)}


@pytest.fixture(scope="module")
def shipped():
    return load_policy("nano").eval()


@pytest.fixture(params=["shipped", "new", "small"])
def policy(request, shipped):
    torch.manual_seed(0)
    return {"shipped": shipped, "new": NanoPolicy(), "small": NanoPolicy(NanoConfig(**SMALL))}[request.param]


def with_logits(logits, **config):
    """A policy that has these logits (7, 256) at every action, whatever it sees."""
    policy = NanoPolicy(NanoConfig(**SMALL | config)).eval()

    def forward(inputs):
        batch, actions = len(inputs["image"]), policy.config.num_actions
        return logits.expand(batch, actions, 7, 256), torch.zeros(batch, actions, policy.config.width)

    policy.forward = forward
    return policy


def with_probabilities(rows, **config):
    """The same by the probabilities of some tokens in each of the 7 dimensions."""
    logits = torch.full((7, 256), -1e4)
    for row, weights in zip(logits, rows, strict=True):
        for token, weight in weights.items():
            row[token] = math.log(weight)
    return with_logits(logits, **config)


# ---- Tokens and words --------------------------------------------------------------------------------


def test_every_token_comes_back():
    tokens = torch.arange(256)
    actions = token_actions(tokens)
    assert torch.equal(action_tokens(actions), tokens)
    assert actions.min().item() == -1 + 1 / 256 and actions.max().item() == 1 - 1 / 256


def test_actions_come_back_within_half_a_bin():
    actions = torch.linspace(-1, 1, 4001).view(-1, 1)
    back = token_actions(action_tokens(actions))
    assert back.shape == actions.shape and (back - actions).abs().max() <= 1 / 256 + 1e-6
    assert action_tokens(torch.tensor([-1.0, 0.0, 1.0, -7.0, 7.0])).tolist() == [0, 128, 255, 0, 255]


def test_words():
    config = NanoConfig(max_words=6)
    numbers = tokenize("Put the ketchup in the basket now please", config)
    assert len(numbers) == 6 and numbers[1] == numbers[4] and 0 not in numbers
    assert all(0 < number < config.vocabulary for number in numbers)
    assert tokenize("put the", config) == [numbers[0], numbers[1], 0, 0, 0, 0]
    assert tokenize("", config) == [0] * 6


def test_the_sentences_of_the_suite_stay_apart():
    assert len({tuple(tokenize(sentence, NanoConfig())) for sentence in SENTENCES}) == 10


# ---- sample and score --------------------------------------------------------------------------------


def test_shapes_and_dtypes(policy):
    chunk, width = policy.config.action_chunk, policy.config.width
    obs, size = observations(3), 7 * policy.config.num_actions
    actions, tokens, logprobs = policy.sample(obs, SENTENCES[:3], 1.0)
    assert (actions.shape, actions.dtype) == ((3, chunk, 7), np.float32) and np.abs(actions).max() < 1
    assert (tokens.shape, tokens.dtype) == (
        (3, size),
        torch.int64,
    ) and 0 <= tokens.min() <= tokens.max() < 256
    assert (logprobs.shape, logprobs.dtype) == ((3, size), torch.float32) and not logprobs.requires_grad
    logprobs, entropy, hidden = policy.score(obs, SENTENCES[:3], tokens)
    assert logprobs.shape == entropy.shape == (3, size) and hidden.shape == (3, width) == (
        3,
        policy.hidden_size,
    )
    assert logprobs.requires_grad and logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs <= 0).all() and (entropy > 0).all() and (entropy <= math.log(256) + 1e-5).all()
    assert policy.action_chunk == chunk


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
def test_evaluation_repeats_the_sampled_logprobs(policy, temperature):
    obs = observations(4)
    _, tokens, sampled = policy.sample(obs, SENTENCES[:4], temperature)
    again = policy.score(obs, SENTENCES[:4], tokens, temperature)[0]
    torch.testing.assert_close(again, sampled, atol=1e-5, rtol=0)


def test_the_temperature_divides_the_logits(shipped):
    obs = observations(2)
    size = 7 * shipped.config.num_actions
    tokens = torch.arange(2 * size).view(2, size)
    with torch.no_grad():
        logits = shipped(shipped.prepare(obs, SENTENCES[:2]))[0].reshape(2, size, 256)
        cool, cool_entropy, _ = shipped.score(obs, SENTENCES[:2], tokens, 0.7)
        hot_entropy = shipped.score(obs, SENTENCES[:2], tokens, 2.0)[1]
    scaled = logits.double() / 0.7
    expected = torch.gather(scaled, 2, tokens[..., None])[..., 0] - scaled.logsumexp(dim=2)
    torch.testing.assert_close(cool, expected.float(), atol=1e-4, rtol=1e-5)
    probabilities = scaled.softmax(dim=2)
    entropy = -(probabilities * probabilities.log()).nan_to_num().sum(dim=2)
    torch.testing.assert_close(cool_entropy, entropy.float(), atol=1e-4, rtol=1e-4)
    assert (hot_entropy > cool_entropy).all()


@pytest.mark.longer
def test_samples_follow_the_probabilities():
    """A policy of known probabilities: frequencies of 4000 draws, within five standard errors."""
    policy = with_probabilities([{3: 0.5, 200: 0.3, 255: 0.2}] * 7)
    torch.manual_seed(0)
    obs = {name: np.repeat(array, 4000, axis=0) for name, array in observations(1, size=32).items()}
    for temperature in (1.0, 0.5):
        _, tokens, logprobs = policy.sample(obs, SENTENCES[:1] * 4000, temperature)
        weights = np.array([0.5, 0.3, 0.2]) ** (1 / temperature)
        for token, p in zip((3, 200, 255), weights / weights.sum()):
            hits = tokens[:, 0] == token
            assert abs(hits.float().mean() - p) < 5 * math.sqrt(p * (1 - p) / 4000)
            assert logprobs[:, 0][hits][0].item() == pytest.approx(math.log(p), abs=1e-4)


def test_actions_are_those_of_the_tokens(policy):
    """Each held for action_repeat control steps."""
    actions, tokens, _ = policy.sample(observations(2), SENTENCES[:2], 1.0)
    bins = tokens.view(2, -1, 7).numpy().repeat(policy.config.action_repeat, axis=1)
    np.testing.assert_allclose(actions, -1 + (bins + 0.5) / 128, atol=1e-6)
    assert torch.equal(policy.encode(torch.from_numpy(actions)), tokens)


def test_a_batch_equals_its_members_alone(policy):
    obs = observations(4)
    tokens = torch.randint(
        0, 256, (4, 7 * policy.config.num_actions), generator=torch.Generator().manual_seed(0)
    )
    together = policy.score(obs, SENTENCES[:4], tokens)
    for i in range(4):
        alone = policy.score(
            {n: a[i : i + 1] for n, a in obs.items()}, SENTENCES[i : i + 1], tokens[i : i + 1]
        )
        for mine, theirs in zip(alone, together):
            torch.testing.assert_close(mine[0], theirs[i], atol=1e-5, rtol=1e-5)


def test_temperature_0_takes_the_median(policy):
    """Half of the probability lies at or below the token, less than half below it; it draws nothing."""
    obs = observations(2)
    torch.manual_seed(1)
    actions, tokens, logprobs = policy.sample(obs, SENTENCES[:2], 0.0)
    torch.manual_seed(2)
    assert np.array_equal(policy.sample(obs, SENTENCES[:2], 0.0)[0], actions)
    with torch.no_grad():
        logits = policy(policy.prepare(obs, SENTENCES[:2]))[0].flatten(1, 2)  # (2, D, 256)
    up_to = logits.double().softmax(dim=-1).cumsum(dim=-1)
    here = up_to.gather(-1, tokens[..., None])[..., 0]
    below = torch.where(tokens > 0, up_to.gather(-1, (tokens - 1).clamp(min=0)[..., None])[..., 0], 0.0)
    assert (here >= 0.5 - 1e-5).all() and (below < 0.5 + 1e-5).all()
    expected = policy.score(obs, SENTENCES[:2], tokens, 1.0)[0]  # of the distribution itself
    torch.testing.assert_close(logprobs, expected.detach(), atol=1e-5, rtol=0)


def test_the_median_by_hand():
    """Of symmetric distributions it is the middle, whichever bin is likeliest; of skewed ones it is not.

    The likeliest bins would be 10, 100, 9, 0, 255, 3 and 20.
    """
    rows = [
        {10: 0.4, 100: 0.2, 190: 0.4},
        {98: 0.1, 99: 0.2, 100: 0.4, 101: 0.2, 102: 0.1},
        {9: 0.4, 60: 0.25, 61: 0.2, 62: 0.15},
        {0: 1.0},
        {255: 1.0},
        {3: 0.45, 200: 0.3, 255: 0.25},
        {20: 0.6, 240: 0.4},
    ]
    policy = with_probabilities(rows, action_chunk=4, action_repeat=2)
    actions, tokens, logprobs = policy.sample(observations(1, size=32), SENTENCES[:1], 0.0)
    medians = [100, 100, 60, 0, 255, 200, 20]
    assert tokens.tolist() == [medians * 2]
    np.testing.assert_allclose(actions, np.tile((np.array(medians) + 0.5) / 128 - 1, (1, 4, 1)), atol=1e-6)
    weights = [row[median] for row, median in zip(rows, medians)]
    assert logprobs.exp()[0].tolist() == pytest.approx(weights * 2, abs=1e-4)


def test_sampling_follows_torchs_seed(policy):
    obs, draws = observations(2), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(policy.sample(obs, SENTENCES[:2], 1.0)[1])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_instructions_pictures_and_states_matter(shipped):
    obs = observations(1)
    with torch.no_grad():
        logits = shipped(shipped.prepare(obs, SENTENCES[4:5]))[0]
        for sentence in SENTENCES[:4]:
            assert (shipped(shipped.prepare(obs, [sentence]))[0] - logits).abs().max() > 0.1
        for name, array in obs.items():
            changed = obs | {name: array[:, ::-1] if name == "image" else array + np.float32(0.05)}
            assert (shipped(shipped.prepare(changed, SENTENCES[4:5]))[0] - logits).abs().max() > 0.1


def test_states_of_another_table_are_not_cut_off():
    """LIBERO-Object's arm works just above the floor, LIBERO-Spatial's 90 cm higher."""
    policy = new_policy("nano")
    before = policy.state_centre.clone()
    states = before + policy.state_scale * torch.randn(101, 8, generator=torch.Generator().manual_seed(0))
    policy.centre_states(states.numpy())
    assert torch.equal(policy.state_centre, before)
    states[:, 2] += 0.9
    policy.centre_states(states.numpy())
    assert policy.state_centre[2] == states[:, 2].median() != before[2]
    assert torch.equal(policy.state_centre[[0, 1, 3, 4, 5, 6, 7]], before[[0, 1, 3, 4, 5, 6, 7]])


def test_tensors_and_arrays_are_the_same_to_it(policy):
    obs = observations(2)
    tensors = {name: torch.from_numpy(array) for name, array in obs.items()}
    tokens = torch.zeros(2, 7 * policy.config.num_actions, dtype=torch.int64)
    mine, theirs = (policy.score(obs, SENTENCES[:2], tokens), policy.score(tensors, SENTENCES[:2], tokens))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


def test_gradients_reach_every_parameter():
    """From the second step on: the film layer starts at zero, which holds the words' gradient back."""
    torch.manual_seed(0)
    policy = NanoPolicy(NanoConfig(**SMALL))
    torch.nn.init.normal_(policy.film.weight)
    tokens = torch.randint(0, 256, (3, 14))
    policy.score(observations(3, size=32), SENTENCES[:3], tokens)[0].sum().backward()
    assert [name for name, p in policy.named_parameters() if not p.grad.abs().max() > 0] == []


# ---- Held actions ------------------------------------------------------------------------------------


def test_actions_are_held():
    """A chunk of 6 control steps in which each of 2 predicted actions is held for 3."""
    torch.manual_seed(0)
    policy = NanoPolicy(NanoConfig(**SMALL | {"action_chunk": 6, "action_repeat": 3}))
    assert policy.config.num_actions == 2 and policy.action_chunk == 6
    actions, tokens, _ = policy.sample(observations(2, size=32), SENTENCES[:2], 1.0)
    assert actions.shape == (2, 6, 7) and tokens.shape == (2, 14)
    for first in (0, 3):
        np.testing.assert_array_equal(actions[:, first : first + 3], actions[:, [first] * 3])
    assert (actions[:, 0] != actions[:, 3]).any()
    assert torch.equal(policy.encode(torch.from_numpy(actions)), tokens)


def test_demonstrated_actions_are_predicted_as_means():
    policy = NanoPolicy(NanoConfig(**SMALL | {"action_chunk": 4, "action_repeat": 2}))
    actions = torch.zeros(1, 4, 7)
    actions[0, :, 0] = torch.tensor([-0.5, 0.25, 1.0, 0.5])
    held = policy.held(actions)
    assert held.shape == (1, 2, 7) and held[0, :, 0].tolist() == [-0.125, 0.75] and not held[..., 1:].any()
    tokens = policy.encode(actions)
    assert tokens.shape == (1, 14) and tokens[0, [0, 7]].tolist() == [int(0.875 * 128), int(1.75 * 128)]
    executed = policy.executed(held.flatten(1))
    assert executed.shape == (1, 4, 7) and executed.dtype == np.float32
    assert executed[0, :, 0].tolist() == [-0.125, -0.125, 0.75, 0.75]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"action_chunk": 8, "action_repeat": 3}, "action_chunk 8 must divide by action_repeat 3"),
        ({"action_chunk": 2, "action_repeat": 4}, "action_chunk 2 must divide by action_repeat 4"),
        ({"action_repeat": 0}, "action_repeat is 0; expected an int from 1"),
        ({"action_repeat": 2.0}, r"action_repeat is 2\.0; expected an int"),
        ({"action_repeat": True}, "action_repeat is True; expected an int"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["nano", "flow"])
def test_holds_that_do_not_fit(name, config, words):
    with pytest.raises(ValueError, match=words) as error:
        new_policy(name, SMALL | config)
    assert len(str(error.value).splitlines()) == 1


# ---- Imitation ---------------------------------------------------------------------------------------


def losses_of(tokens, action):
    """Imitation losses of policies that prefer a token each, of the same action in all dimensions."""
    actions = torch.full((1, 2, 7), action)
    logits = 10.0 * torch.nn.functional.one_hot(torch.tensor(tokens), 256)
    return [
        with_logits(row).imitation_loss(observations(1, size=32), SENTENCES[:1], actions).item()
        for row in logits
    ]


def test_neighbouring_bins_cost_less_than_far_ones():
    action = token_actions(torch.tensor(100)).item()
    losses = losses_of([100, 104, 110, 124], action)
    assert min(np.diff(losses)) > 1e-4
    assert losses_of([96], action)[0] == pytest.approx(losses[1], rel=1e-4)  # either way
    assert losses_of([252], action)[0] == pytest.approx(losses_of([200], action)[0], rel=1e-4)  # far is far


def test_imitation_leads_to_the_demonstrated_distribution():
    """A bell around the action, which is its mode and its median; every other distribution costs more."""
    torch.manual_seed(0)
    free = torch.nn.Parameter(0.01 * torch.randn(7, 256))
    policy, obs = with_logits(free), observations(1, size=32)
    action = torch.tensor([-0.8, -0.3, 0.0, 0.1, 0.45, 0.7, 0.9]).expand(1, 2, 7)
    optimizer = torch.optim.Adam([free], lr=0.5)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.5 * 0.99**step
        loss = policy.imitation_loss(obs, SENTENCES[:1], action)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert free.grad.abs().max() < 1e-4  # nothing is cheaper
    with torch.no_grad():
        best, wanted = policy.imitation_loss(obs, SENTENCES[:1], action), policy.encode(action)[0, :7]
        assert (free.argmax(dim=-1) - wanted).abs().max() <= 1
        tokens = policy.sample(obs, SENTENCES[:1], 0.0)[1][0, :7]
        assert (tokens - wanted)[1:6].abs().max() <= 1  # at the ends the bell is cut off
        for row, token in zip(free, wanted):
            assert row[token - 6 : token].diff().min() > 0 > row[token + 1 : token + 7].diff().max()
        for _ in range(5):
            free.add_(torch.randn_like(free))
            assert policy.imitation_loss(obs, SENTENCES[:1], action) > best + 1e-3


def test_the_loss_is_of_what_is_predicted():
    """Actions with equal means over a hold are the same to it."""
    torch.manual_seed(0)
    policy = NanoPolicy(NanoConfig(**SMALL | {"action_repeat": 2})).eval()
    obs, half = observations(2, size=32), torch.rand(2, 1, 7) - 0.5
    losses = [
        policy.imitation_loss(obs, SENTENCES[:2], torch.cat([half - d, half + d], dim=1)).item()
        for d in (0.0, 0.4)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_shifted_images():
    images = torch.arange(2 * 3 * 5 * 5.0).view(2, 3, 5, 5)
    assert torch.equal(shift(images, 0, None), images)
    torch.manual_seed(0)
    seen = set()
    for shifted in (shift(images, 2, None) for _ in range(60)):
        assert shifted.shape == images.shape
        for image, original in zip(shifted, images):
            moves = [
                (down, right)
                for down in range(-2, 3)
                for right in range(-2, 3)
                if torch.equal(image, moved(original, down, right))
            ]
            assert len(moves) == 1
            seen.update(moves)
    assert len(seen) > 20  # of 25


def moved(image, down, right):
    """An image (3, H, W) of which the pixel at each place is the one so much further on, or the edge's."""
    size = image.shape[-1]
    rows, columns = ([min(max(k + by, 0), size - 1) for k in range(size)] for by in (down, right))
    return image[:, rows][:, :, columns]


def of_rows(rows):
    return [torch.Generator().manual_seed(row) for row in rows]


def test_a_row_draws_the_same_in_any_batch():
    images = torch.rand(6, 3, 8, 8)
    together = shift(images, 2, of_rows(range(6)))
    for some in ([0], [4, 1], [5, 3, 0, 2]):
        assert torch.equal(shift(images[some], 2, of_rows(some)), together[some])
        for kind in ("uniform_", "normal_", "exponential_"):
            whole = draw(kind, images, of_rows(range(6)))
            assert torch.equal(draw(kind, images[some], of_rows(some)), whole[some])
    assert not torch.equal(shift(images, 2, of_rows(range(6, 12))), together)


@pytest.mark.parametrize("name", ["nano", "flow"])
def test_only_what_learns_sees_shifted_images(name):
    """In training mode a sample's draws are its own, so that it costs the same in any batch."""
    torch.manual_seed(0)
    policy = new_policy(name, SMALL)
    if name == "flow":
        torch.nn.init.normal_(policy.head.out.weight, std=0.2)
    obs, actions = observations(4, size=32), torch.rand(4, 2, 7) * 2 - 1

    def loss(rows, seeds, training):
        some = {key: array[rows] for key, array in obs.items()}
        with torch.no_grad():
            return policy.train(training).imitation_loss(
                some, [SENTENCES[i] for i in rows], actions[rows], of_rows(seeds)
            )

    rows = [0, 1, 2, 3]
    alone = torch.stack([loss([i], [i], training=True) for i in rows])
    torch.testing.assert_close(loss(rows, rows, training=True), alone.mean(), atol=1e-5, rtol=1e-5)
    assert (loss(rows, rows, training=True) - loss(rows, rows, training=False)).abs() > 1e-6
    if name == "nano":  # a flow draws its noise either way
        assert torch.equal(loss(rows, rows, training=False), loss(rows, [7, 8, 9, 10], training=False))


# ---- Checkpoints -------------------------------------------------------------------------------------


def test_saved_and_loaded_again(tmp_path, policy):
    save_policy(policy, "nano", tmp_path / "a" / "checkpoint")
    loaded = load_policy("nano", tmp_path / "a" / "checkpoint")
    assert loaded.config == policy.config and loaded.state_dict().keys() == policy.state_dict().keys()
    assert all(torch.equal(value, policy.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["checkpoint"]


def test_saving_over_a_checkpoint(tmp_path):
    first, second = (NanoPolicy(NanoConfig(**SMALL)) for _ in range(2))
    assert not torch.equal(first.head.weight, second.head.weight)
    for each in (first, second):
        save_policy(each, "nano", tmp_path / "checkpoint")
    assert torch.equal(load_policy("nano", str(tmp_path / "checkpoint")).head.weight, second.head.weight)


def test_the_shipped_checkpoint(shipped):
    assert count_parameters(shipped)[0] == count_parameters(shipped)[1] > 1_000_000
    assert all(torch.isfinite(p).all() for p in shipped.parameters())
    assert shipped.config == NanoConfig()
    assert sum(file.stat().st_size for file in SHIPPED["nano"].iterdir()) < 20e6
    torch.manual_seed(0)
    obs, tokens = observations(1), torch.zeros(1, 7 * shipped.config.num_actions, dtype=torch.int64)
    trained, untrained = (p.score(obs, SENTENCES[:1], tokens)[1].mean() for p in (shipped, NanoPolicy()))
    assert trained < untrained - 1  # nats: it has learnt something


def test_new_policies_are_new():
    torch.manual_seed(0)
    first, second = new_policy("nano"), new_policy("nano", SMALL)
    assert first.config == NanoConfig() and second.config == NanoConfig(**SMALL)
    for name in ("nanoo", "openpi"):
        with pytest.raises(ValueError, match="expected one of"):
            new_policy(name)


@pytest.fixture
def checkpoint(tmp_path):
    """A sound checkpoint to damage."""
    save_policy(NanoPolicy(NanoConfig(**SMALL)), "nano", tmp_path / "checkpoint")
    load_policy("nano", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refusal(name, folder):
    with pytest.raises(ValueError) as error:
        load_policy(name, folder)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


def test_unknown_policy(checkpoint):
    message = refusal("nanno", checkpoint)
    assert "'nanno'" in message and "did you mean 'nano'" in message


def test_missing_files(checkpoint, tmp_path):
    assert str(tmp_path / "absent") in refusal("nano", tmp_path / "absent")
    misspelt = checkpoint.with_name(checkpoint.name[:-1])
    message = refusal("nano", misspelt)
    assert f"{str(misspelt)!r} does not exist; did you mean {checkpoint.name!r}?" in message
    assert "model.safetensors" in refusal("nano", checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    message = refusal("nano", checkpoint)
    assert str(checkpoint) in message and "model.safetensors" in message and "no config.json" not in message


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text("[1, 2]"),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
        lambda folder: set_config(folder, policy="openvla"),
        lambda folder: set_config(folder, colour="red"),
        lambda folder: set_config(folder, width="wide"),
        lambda folder: set_config(folder, width=16.0),
        lambda folder: set_config(folder, depth=True),
        lambda folder: set_config(folder, depth=0),
        lambda folder: set_config(folder, depth=10**9),
        lambda folder: set_config(folder, width=4096, vocabulary=4096),  # 1.6 GB, if it were believed
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        lambda folder: set_config(folder, heads=3),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "model.safetensors").write_bytes(b"no tensors at all"),
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-100]
        ),
    ],
)
def test_damaged_files(checkpoint, damage):
    damage(checkpoint)
    assert str(checkpoint) in refusal("nano", checkpoint)


def header(tensors, file, size):
    """A safetensors file of ``size`` bytes, nearly all of them a hole, that claims to hold ``tensors``."""
    words = json.dumps(tensors).encode()
    with file.open("wb") as stream:
        stream.write(len(words).to_bytes(8, "little") + words)
        stream.truncate(size)


HUGE = 10 * 2**30  # bytes


@pytest.mark.parametrize("claim", [None, "head.bias", "other"])
def test_files_too_large_are_refused_before_they_are_read(checkpoint, claim):
    file = checkpoint / "model.safetensors"
    if claim is None:
        with file.open("wb") as stream:
            stream.truncate(HUGE)
    else:
        words = {claim: {"dtype": "F32", "shape": [HUGE // 4], "data_offsets": [0, HUGE]}}
        header(words, file, 8 + len(json.dumps(words)) + HUGE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert str(file) in refusal("nano", checkpoint)
    with (checkpoint / "config.json").open("r+b") as stream:
        stream.truncate(HUGE)
    message = refusal("nano", checkpoint)
    assert str(checkpoint / "config.json") in message and str(HUGE) in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02]q\x00.", b"\xff" * 100])
def test_what_is_no_safetensors_file_is_named(checkpoint, content):
    """Also a zip and a pickle under that name, which nothing unpacks."""
    file = checkpoint / "model.safetensors"
    file.write_bytes(content)
    assert f"{str(file)!r} is damaged" in refusal("nano", checkpoint)


def test_the_configuration_of_another_policy(checkpoint):
    set_config(checkpoint, policy="flow")
    assert "config.json is of policy 'flow'; expected --policy flow" in refusal("nano", checkpoint)
    assert "config.json is of policy 'flow'; expected --policy flow" in refusal("openvla", checkpoint)
    (checkpoint / "config.json").write_text("[1, 2]")
    message = refusal("nano", checkpoint)
    assert str(checkpoint / "config.json") in message and "a list; expected an object" in message


@pytest.mark.parametrize("name", ["openvla", "smolvla"])
def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(name, tmp_path):
    (tmp_path / "finetuned").mkdir()
    assert "there is no such folder; did you mean 'finetuned'?" in refusal(name, tmp_path / "finetune")
    assert "there is no such folder" in refusal(name, "finetuned")


def test_weights_that_do_not_fit(checkpoint):
    """The line says which tensor does not fit, and how."""
    set_config(checkpoint, vocabulary=100)
    message = refusal("nano", checkpoint)
    assert str(checkpoint) in message and "words.weight" in message and "512" in message and "100" in message


def test_weights_that_are_missing(checkpoint):
    tensors = safetensors.torch.load_file(checkpoint / "model.safetensors")
    del tensors["head.bias"]
    safetensors.torch.save_file(tensors, checkpoint / "model.safetensors")
    assert "head.bias" in refusal("nano", checkpoint)


def test_weights_that_are_not_finite(checkpoint):
    tensors = safetensors.torch.load_file(checkpoint / "model.safetensors")
    tensors["head.bias"][5] = float("nan")
    safetensors.torch.save_file(tensors, checkpoint / "model.safetensors")
    assert "head.bias" in refusal("nano", checkpoint)


def test_whole_numbers_are_no_weights(checkpoint):
    file = checkpoint / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    kinds = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    safetensors.torch.save_file(kinds, file)
    assert {p.dtype for p in load_policy("nano", checkpoint).parameters()} == {torch.float32}
    safetensors.torch.save_file(tensors | {"head.bias": tensors["head.bias"].to(torch.int8)}, file)
    assert "head.bias is of I8; expected one of F64, F32" in refusal("nano", checkpoint)


@pytest.mark.parametrize("made_for", [[4], {"LiberoObject": 4}, {"LiberoObject": ["4"]}, "LiberoObject"])
def test_tasks_that_are_none(checkpoint, made_for):
    set_config(checkpoint, made_for=made_for)
    assert "its made_for is" in refusal("nano", checkpoint)


# ---- Folders that are something else -----------------------------------------------------------------


def test_the_folder_of_a_run_names_its_policy(tmp_path):
    policy = adapters.make_trainable(NanoPolicy(NanoConfig(**SMALL)), "lora", rank=2)
    places = tmp_path / "run" / "checkpoints"
    adapters.save_adapter(policy, places / "adapter")
    message = refusal("nano", places / "adapter")
    assert "it is an adapter: --evaluate --train lora --task-ids K --shared-adapter" in message
    assert "did you mean" not in message and "did you mean" not in refusal("nano", tmp_path / "run")
    (places / "latest").mkdir()
    assert f"did you mean {str(places / 'latest')!r}?" in refusal("nano", tmp_path / "run")
    assert "did you mean 'latest'?" in refusal("nano", places / "last")
    assert f"did you mean {str(places / 'latest')!r}?" in refusal("nano", places / "final")
    save_policy(policy, "nano", places / "final")
    for folder in (tmp_path / "run", places, places / "adapter"):
        for name in ("nano", "openvla"):
            assert f"did you mean {str(places / 'final')!r}?" in refusal(name, folder)


@dataclasses.dataclass
class Run:
    """The arguments of a run that its policy depends on."""

    policy: str = "nano"
    checkpoint: str | None = None
    suite: str = "LiberoObject"
    task_ids: tuple[int, ...] = (4,)
    train: str = "all"
    lora_rank: int = 4
    last_k: int = 1
    shared_adapter: tuple[str, ...] = ()


def save_state(run, args, learner):
    """Write a run's folder as it is while the run goes on; where its state is."""
    run.mkdir()
    write_json(run / "args.json", dataclasses.asdict(args))
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad])
    checkpoints.save_training_state(run / "checkpoints" / "latest", learner, optimizer, {})
    return run / "checkpoints" / "latest"


@pytest.mark.parametrize("train", [each for each in adapters.TRAINABLE_SETS if each != "expert"])
@pytest.mark.parametrize("critic", [False, True])
def test_the_state_of_a_run_is_a_policy(checkpoint, train, critic):
    args = Run(checkpoint=str(checkpoint), train=train)
    policy = adapters.make_trainable(load_policy("nano", checkpoint), train, 4, 1)
    learner = torch.nn.ModuleDict({"policy": policy, "critic": ppo_vla.make_critic(policy)})
    for parameter in policy.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    policy.state_centre += 1
    latest = save_state(checkpoint.parent / "run", args, learner if critic else policy)
    loaded, expected = load_policy("nano", latest).state_dict(), adapters.merged(policy)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())
    assert load_policy("nano", latest, "meta").head.weight.is_meta


def test_states_of_runs_that_are_no_policy(checkpoint):
    policy = load_policy("nano", checkpoint)
    latest = save_state(checkpoint.parent / "run", Run(checkpoint=str(checkpoint)), policy)
    file = latest.parent.parent / "args.json"
    sound = json.loads(file.read_text())
    for changes, words in (
        ({"policy": "flow"}, "its run is of policy 'flow'"),
        ({"checkpoint": "gone"}, "'gone' does not exist"),
        ({"shared_adapter": ["a"]}, "its run trains above the adapters of tasks"),
        ({"train": "lora", "lora_rank": "4"}, "cannot be loaded"),
        ({"train": ["all"]}, "cannot be loaded"),
        ({"checkpoint": None}, "tensors that are missing"),
    ):
        file.write_text(json.dumps(sound | changes))
        assert words in refusal("nano", latest)
    file.unlink()
    assert "args.json" in refusal("nano", latest)


def test_a_run_says_what_it_starts_from(checkpoint):
    """Where it plays other tasks than it was made for, or would start from a passing state."""
    common = {"evaluate": False, "device": "cpu", "cudagraphs": False, "seed": 1}

    def said(policy="nano", checkpoint=None, suite="LiberoObject", task_ids=(4,), **given):
        names = {"policy": policy, "checkpoint": checkpoint, "suite": suite, "task_ids": task_ids}
        args = SimpleNamespace(**common | names | given)
        policy = checkpoints.starting_policy(args)
        return checkpoints.remark(args, torch.nn.ModuleDict({"policy": policy}).policy)

    assert said() == said(policy="flow") == said(evaluate=True) == ""
    words = "its checkpoint was made for the tasks LiberoObject 4, and not for LiberoObject 7"
    assert said(policy="flow", task_ids=(4, 7)) == f"policy 'flow': {words}"
    goal = {"suite": "LiberoGoal", "task_ids": (0,)}
    assert "LiberoObject 0 1 2 3 4 5 6 7 8 9, and not for LiberoGoal 0" in said(**goal)
    assert said(checkpoint=checkpoint, **goal) == ""  # nobody knows
    policy = load_policy("nano", checkpoint)
    latest = save_state(checkpoint.parent / "run", Run(checkpoint=str(checkpoint)), policy)
    assert said(checkpoint=latest, evaluate=True) == ""
    with pytest.raises(ValueError, match=r"is the state of a run, .*; expected it with --evaluate, or"):
        said(checkpoint=latest)


def test_a_checkpoint_says_what_it_was_made_for(checkpoint, tmp_path):
    args = SimpleNamespace(
        train="all", merge=True, shared_adapter=(), policy="nano", suite="LiberoGoal", task_ids=(3, 1)
    )
    goal = {"LiberoGoal": [1, 3]}
    for name, policy, made_for in (
        ("new", new_policy("nano", SMALL), goal),
        ("shipped", load_policy("nano"), {"LiberoObject": list(range(10))} | goal),
        ("old", load_policy("nano", checkpoint), None),
    ):
        checkpoints.save_policies(tmp_path / name, policy, args)
        assert load_policy("nano", tmp_path / name / "checkpoints" / "final").made_for == made_for
