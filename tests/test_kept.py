"""What a frozen language model has read: kept from the rollout, forgotten, and the same as read again."""

import numpy as np
import pytest
import torch
from tiny_smolvla import SENTENCES, STATE, write_tiny

from vla_envs import machine
from vla_envs.policies.adapters import make_trainable
from vla_envs.policies.lerobot.kept import Kept, together
from vla_envs.policies.lerobot.policy import LeRobotPolicy
from vla_envs.policies.lerobot.smolvla import Seen


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("smolvla") / "tiny")


def trained_expert(folder, monkeypatch):
    """A policy whose expert is trained, and a list of how many observations its language model has read."""
    policy = make_trainable(LeRobotPolicy.load("smolvla", folder), "expert")
    counts, read = [], policy.model.read
    monkeypatch.setattr(policy.model, "read", lambda *inputs: counts.append(len(inputs[0])) or read(*inputs))
    return policy, counts


def observations(batch=4, seed=0):
    rng = np.random.default_rng(seed)
    images = {
        name: rng.integers(0, 256, (batch, 48, 48, 3), dtype=np.uint8) for name in ("image", "wrist_image")
    }
    return images | {"state": (np.array(STATE["mean"]) + 0.05 * rng.standard_normal((batch, 8))).astype("f4")}


def sentences(batch=4):
    return [SENTENCES[i % 2] for i in range(batch)]  # of different lengths


def decided(policy, obs, words):
    """The tokens of a rollout's decisions."""
    return policy.sample(obs, words, 1.0, [torch.Generator().manual_seed(i) for i in range(len(words))])[1]


def scored(policy, obs, tokens):
    """Log-probabilities of tokens, and the gradient of their sum."""
    policy.zero_grad()
    logprobs = policy.score(obs, sentences(len(tokens)), tokens)[0]
    logprobs.sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def test_an_update_reads_nothing_again(tiny, monkeypatch):
    """Equal log-probabilities and gradients, in other batches, also of the state's projection."""
    policy, counts = trained_expert(tiny, monkeypatch)
    obs = observations()
    tokens = decided(policy, obs, sentences())
    assert counts == [4]
    order = torch.tensor([2, 1])
    part = {name: torch.as_tensor(array)[order] for name, array in obs.items()}  # as a batch holds them
    found, gradient = scored(policy, part, tokens[order])
    assert counts == [4]
    policy.kept.clear()
    anew, gradient_anew = scored(policy, part, tokens[order])
    assert counts == [4, 2] and "model.state_proj.weight" in gradient
    torch.testing.assert_close(found, anew, atol=1e-4, rtol=0)
    torch.testing.assert_close(gradient, gradient_anew, atol=1e-4, rtol=1e-4)
    assert not any(".vlm." in name for name in gradient)


def test_members_that_start_alike_are_read_once(tiny, monkeypatch):
    policy, counts = trained_expert(tiny, monkeypatch)
    obs = {name: array[[0, 0, 0, 1]] for name, array in observations().items()}
    obs["state"] = observations()["state"]  # which is not part of what is read
    decided(policy, obs, [SENTENCES[0]] * 4)
    assert counts == [2]
    decided(policy, obs, [SENTENCES[1]] * 4)
    assert counts == [2, 2]  # another sentence is another reading


def test_what_is_not_frozen_is_read_again(tiny, monkeypatch):
    """As imitation reads again, whose demonstrations are more than what is kept."""
    policy, counts = trained_expert(tiny, monkeypatch)
    obs = observations()
    tokens = decided(policy, obs, sentences())
    policy.imitation_loss(obs, sentences(), torch.zeros(4, 6, 7))
    assert counts == [4, 4]
    policy.sample(obs, sentences(), 1.0)  # of an evaluation
    assert counts == [4, 4, 4]
    policy.model.vlm.requires_grad_(True)
    policy.score(obs, sentences(), tokens)
    assert counts == [4] * 4
    policy.model.vlm.requires_grad_(False)  # after it may have been trained
    policy.score(obs, sentences(), tokens)
    assert counts == [4] * 5


def test_other_weights_are_read_anew(tiny, monkeypatch):
    policy, counts = trained_expert(tiny, monkeypatch)
    obs = observations()
    decided(policy, obs, sentences())
    policy.load_state_dict(policy.state_dict())
    decided(policy, obs, sentences())
    assert counts == [4, 4]


def seen(*lengths):
    """Two layers' keys and values of observations with so many tokens."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    keys = [torch.randn(len(lengths), 1, max(lengths), 3) for _ in range(2)]
    return Seen(keys, [-each for each in keys], mask)


def test_the_oldest_go_first_and_an_update_pushes_nothing_out():
    kept = Kept(most=4 * 2 * 2 * 5 * 3 * 4)  # four of five tokens
    names = [bytes([i]) for i in range(6)]
    first = seen(5, 3, 5)
    rows = kept.add(names[:3], first, push=False)
    assert len(kept) == 3 and kept.bytes == sum(row.nbytes for row in rows.values())
    both = together([kept.rows(names)[names[i]] for i in (1, 0)], "cpu")  # padded to the longest
    assert both.mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert torch.equal(both.keys[1][0, :, :3], first.keys[1][1, :, :3]) and not both.keys[1][0, :, 3:].any()
    assert torch.equal(both.values[0][1], first.values[0][0])
    assert list(kept.add(names[3:5], seen(5, 5), push=False)) == names[3:5]
    assert list(kept.rows(names)) == names[:4]
    kept.add(names[5:], seen(5), push=True)
    assert list(kept.rows(names)) == [*names[1:4], names[5]]
    nothing = Kept(most=0)
    assert set(nothing.add(names[:2], seen(2, 2), push=True)) == set(names[:2]) and len(nothing) == 0


def test_a_batch_that_pushes_out_what_it_needs(tiny, monkeypatch):
    """Room for four: three that are known, and two that are not."""
    policy, counts = trained_expert(tiny, monkeypatch)
    obs, words = observations(5), [SENTENCES[0]] * 5
    decided(policy, {name: array[:1] for name, array in obs.items()}, words[:1])
    policy.kept.most = 4 * policy.kept.bytes
    decided(policy, {name: array[:3] for name, array in obs.items()}, words[:3])
    tokens = decided(policy, obs, words)
    assert counts == [1, 2, 2] and len(policy.kept) == 4
    policy.kept.clear()
    torch.testing.assert_close(tokens, decided(policy, obs, words), atol=1e-5, rtol=0)
    assert counts == [1, 2, 2, 5]


def test_processes_share_the_memory(monkeypatch):
    whole = machine.memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.memory() == whole // 4 > 0
