"""ConRFT: its losses by hand, transitions, the replay, the expert's takeover, and a run that is resumed."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from artifacts import write_demos
from learning import flat, small_batch

import conrft_vla
from conrft_vla import Critics, conservative_loss, head_loss, td_target
from vla_envs.policies.flow import FlowConfig, FlowPolicy
from vla_envs.training import replays

SMALL = FlowConfig(
    action_chunk=2, action_repeat=1, image_size=32, width=16, depth=1, heads=2, max_words=8, vocabulary=64,
    head_width=24, denoising_steps=1, noise="fixed", noise_level=0.05,
)  # fmt: skip
SIZES = (32, 14)  # F, n


def small_flow(seed=0):
    """Whose head, which begins with velocity 0, has random weights; the backbone is frozen."""
    torch.manual_seed(seed)
    policy = FlowPolicy(SMALL)
    torch.nn.init.normal_(policy.head.out.weight, std=0.3)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    return policy


def transitions(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = {"features": SIZES[:1], "next_features": SIZES[:1], "actions": SIZES[1:]}
    parts = {name: torch.rand(count, *shapes.get(name, ()), generator=rng) for name in replays.PARTS}
    return parts | {"imitated": torch.ones(count)}


def test_targets_by_hand():
    next_values = torch.tensor([[0.5, 0.9, 0.2], [0.4, 1.0, 0.3]])
    target = td_target(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 1.0]), next_values, 0.9)
    torch.testing.assert_close(target, torch.tensor([0.36, 0.81, 1.0]))


def test_the_conservative_term_by_hand():
    """An action whose value is below the return counts as much as the return."""
    values, others = torch.tensor([[0.7], [0.1]]), torch.tensor([[[0.2, 0.9]], [[0.4, 0.3]]])
    loss = conservative_loss(values, others, torch.tensor([0.5]))
    first = math.log(math.exp(0.5) + math.exp(0.9)) - 0.7
    second = math.log(2 * math.exp(0.5)) - 0.1
    assert loss.item() == pytest.approx((first + second) / 2)


def test_the_heads_loss_by_hand():
    guess, actions = torch.tensor([[1.0, 0.0], [5.0, 5.0]]), torch.zeros(2, 2)
    values = torch.tensor([[0.2, 0.6], [0.4, 0.8]])
    loss = head_loss(guess, actions, torch.tensor([1.0, 0.0]), values, 0.1)  # the second is not imitated
    assert loss.item() == pytest.approx(0.5 - 0.1 * 0.5)
    none = head_loss(guess, actions, torch.zeros(2), values, 0.1)
    assert none.item() == pytest.approx(-0.05)


def test_the_head_is_a_consistency_function():
    """At time 0 an action is itself; at time 1 it is what the flow draws in one step from the same noise."""
    policy = small_flow()
    obs = {"image": np.zeros((3, 32, 32, 3), np.uint8), "state": np.zeros((3, 8), np.float32)}
    words = ["pick up the milk"] * 3
    h = policy.hidden(policy.prepare(obs, words)).flatten(1)
    x = torch.randn(3, 14)
    assert torch.equal(conrft_vla.consistency(policy.head, x, torch.zeros(3, 1), h), x)
    actions = conrft_vla.act(policy.head, h, torch.zeros(3, 1, 14))[:, 0]
    _, chain, _ = policy.sample(obs, words, 0.0)  # from noise 0
    torch.testing.assert_close(actions, chain[:, -1].clamp(-1.0, 1.0))
    assert actions.abs().max() > 0.01


def test_critics_value_every_action():
    """Actions of a state at once are what they are one by one; the two critics differ."""
    torch.manual_seed(0)
    critics = Critics(*SIZES)
    h, actions = torch.randn(4, 32), torch.randn(4, 3, 14)
    values = critics(h, actions)
    assert values.shape == (2, 4, 3) and not torch.allclose(values[0], values[1])
    one_by_one = torch.cat([critics(h, actions[:, k : k + 1]) for k in range(3)], dim=2)
    torch.testing.assert_close(values, one_by_one)


def test_a_frozen_copy_has_no_parameters():
    critics = Critics(*SIZES)
    target = replays.frozen_copy(critics)
    assert not list(target.parameters())
    names = [name for name, _ in critics.named_parameters()]
    assert [name for name, _ in target.named_buffers()] == names
    h, actions = torch.randn(4, 32), torch.randn(4, 1, 14)
    assert torch.equal(target(h, actions), critics(h, actions))


def test_returns_are_of_each_episode():
    rewards, last = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 0, 1]).bool()
    returns = replays.discounted(rewards, last, 0.5)
    assert returns.tolist() == [0.25, 0.5, 1.0, 0.0, 0.0]


def test_the_oldest_transitions_make_way():
    replay = replays.Replay(5, *SIZES)
    for first, count in ((0, 3), (3, 4)):
        part = transitions(count) | {"rewards": torch.arange(first, first + count).float()}
        replay.add(part)
    assert len(replay) == 5 and sorted(replay.get_buffer("rewards").tolist()) == [2, 3, 4, 5, 6]
    replay.add(transitions(12) | {"rewards": torch.arange(7.0, 19.0)})  # more than it holds
    assert sorted(replay.get_buffer("rewards").tolist()) == [14, 15, 16, 17, 18]
    drawn = dict(zip(replays.PARTS, replay.draw(7)))
    assert drawn["features"].shape == (7, 32) and set(drawn["rewards"].tolist()) <= {14, 15, 16, 17, 18}


@pytest.mark.parametrize("after", [None, 3])
def test_transitions_of_a_rollout(after):
    """Members take 1, 3, 2 and 3 decisions of two control steps; the first and the third succeed."""
    policy, batch = small_flow(), small_batch()
    batch["tokens"] = torch.randn(3, 4, 2, 14)
    batch["rewards"] = torch.zeros(3, 4)
    batch["rewards"][0, 0] = batch["rewards"][1, 2] = 1.0
    args = conrft_vla.Args(gamma=0.5, takeover_after=after)
    found = conrft_vla.transitions_of(policy, flat(batch), args)
    who = [0, 1, 1, 1, 2, 2, 3, 3, 3]
    when = [0, 0, 1, 2, 0, 1, 0, 1, 2]
    assert found["rewards"].tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0]
    assert found["ended"].tolist() == [1, 0, 0, 1, 0, 1, 0, 0, 1]
    assert found["returns"].tolist() == [1, 0, 0, 0, 0.5, 1, 0, 0, 0]
    assert found["imitated"].tolist() == [1, 0, 0, 0, 1, 1, 0, 0, 0]
    assert found["taken_over"].tolist() == [after is not None and t == 2 for t in when]
    torch.testing.assert_close(found["actions"], batch["tokens"][when, who, -1].clamp(-1, 1))
    obs = {name: batch[name][when, who] for name in ("image", "state")}
    words = [batch["instructions"][i] for i in who]
    h = conrft_vla.features_of(policy, obs, words)
    torch.testing.assert_close(found["features"], h)
    torch.testing.assert_close(found["next_features"][1], h[2])
    last = conrft_vla.features_of(policy, batch["last"], batch["instructions"])
    torch.testing.assert_close(found["next_features"][[0, 3, 5, 8]], last)


def test_what_the_expert_rescues_is_imitated_from_there():
    policy, batch = small_flow(), small_batch()
    batch |= {"tokens": torch.randn(3, 4, 2, 14), "success": torch.tensor([True, True, True, False])}
    found = conrft_vla.transitions_of(policy, flat(batch), conrft_vla.Args(takeover_after=4))
    assert found["imitated"].tolist() == [1, 0, 0, 1, 1, 1, 0, 0, 0]


def learn(offline, **changes):
    policy = small_flow()
    critics = Critics(*SIZES)
    target = replays.frozen_copy(critics)
    args = conrft_vla.Args(minibatch_size=8, device="cpu", num_actions=2, **changes)
    memory = [replays.Replay(20, *SIZES) for _ in range(1 if offline else 2)]
    for seed, part in enumerate(memory):
        part.add(transitions(12, seed))
    optimizer = torch.optim.AdamW(policy.head.parameters(), lr=1e-3)
    optimizer.add_param_group({"params": critics.parameters()})
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    before_critics = [p.detach().clone() for p in critics.parameters()]
    figures = conrft_vla.update(policy, critics, target, optimizer, memory, 0.1, args)
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    return figures, moved, before_critics, list(critics.parameters()), list(target.buffers())


@pytest.mark.parametrize("offline", [True, False])
def test_an_update(offline):
    figures, moved, *_ = learn(offline, offline_steps=4, online_steps=4)
    assert moved and all(name.startswith("head.") for name in moved)
    assert ("conservative" in figures) == offline
    assert all(math.isfinite(value) for value in figures.values())


def test_the_heads_steps_leave_the_critics():
    """Online every second step is the head's too: after one step alone it has not moved."""
    _, moved, before, critics, target = learn(False, online_steps=1)
    assert not moved
    for old, new, slow in zip(before, critics, target):
        torch.testing.assert_close(slow, old.lerp(new, 0.02))
    _, _, _, once, _ = learn(True, offline_steps=1, conservative=0.0)
    assert any(not torch.equal(a, b) for a, b in zip(once, before))


def test_critics_learn_what_leads_to_success():
    """Two states, of which one ends in success whatever is done."""
    torch.manual_seed(0)
    critics, good = Critics(*SIZES), torch.arange(64) % 2
    memory = replays.Replay(64, *SIZES)
    h = torch.where(good.bool()[:, None], torch.ones(64, 32), -torch.ones(64, 32))
    part = transitions(64) | {"features": h, "rewards": good.float(), "ended": torch.ones(64)}
    memory.add(part)
    policy = small_flow()
    optimizer = torch.optim.AdamW(policy.head.parameters(), lr=1e-3)
    optimizer.add_param_group({"params": critics.parameters()})
    args = conrft_vla.Args(minibatch_size=32, device="cpu", online_steps=200)
    conrft_vla.update(policy, critics, replays.frozen_copy(critics), optimizer, [memory] * 2, 0.0, args)
    values = critics(h[:2], part["actions"][:2, None]).mean(dim=0).flatten()
    assert values[0] < 0.2 and values[1] > 0.8


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"policy": "nano"}, "expected --policy flow"),
        ({"train": "all"}, "expected --policy flow --train head"),
        ({"denoising_steps": 4}, "--denoising-steps 1"),
        ({"gamma": 1.5}, "gamma, target_rate are 1.5"),
        ({"minibatch_size": 7}, "minibatch_size is 7; expected an even number"),
        ({"replay_size": 0}, "replay_size is 0"),
        ({"takeover_after": -1}, "takeover_after is -1"),
    ],
)
def test_what_does_not_fit(change, line):
    with pytest.raises(ValueError, match=line):
        conrft_vla.validate(conrft_vla.Args(**change))


def test_the_expert_takes_over():
    """In the environment that has played long enough, and only there."""
    policy = small_flow()
    envs = SimpleNamespace(steps=np.array([0, 0, 0]), frozen=np.array([False, True, False]))
    started = []

    class Expert:
        def reset(self):
            started.append(1)

        def __call__(self, which):
            assert which == [2]
            return np.full((1, 2, 7), 0.5), np.full((1, 2, 7), 0.5)

    player = replays.Takeover(policy, envs, Expert(), 4)
    obs = {"image": np.zeros((2, 32, 32, 3), np.uint8), "state": np.zeros((2, 8), np.float32)}
    words = ["pick up the milk"] * 2
    own, *_ = policy.sample(obs, words, 0.0)
    first, *_ = player.sample(obs, words, 0.0, None)
    assert np.array_equal(first, own) and started == [1]
    envs.steps = np.array([2, 9, 4])
    actions, tokens, _ = player.sample(obs, words, 0.0, None)
    assert np.array_equal(actions[0], own[0]) and (actions[1] == 0.5).all()
    assert (tokens[1, -1] == 0.5).all() and started == [1]


TINY = {
    "task_id": 4, "num_groups": 2, "offline_steps": 2, "online_steps": 2, "minibatch_size": 8,
    "num_iterations": 2, "eval_every": 0, "eval_episodes": 2, "max_episode_steps": 24, "num_threads": 1,
}  # fmt: skip


def test_a_run_goes_on_with_its_replay(execute, tmp_path, capfd):
    (tmp_path / "demos").mkdir()
    write_demos(tmp_path / "demos" / "LiberoObject_4_demo.hdf5", (30, 20), size=128)
    flags = TINY | {"demos": tmp_path / "demos", "takeover_after": 8}
    execute("conrft_vla", **flags, run_dir=tmp_path / "whole")
    assert "50 demonstrated transitions; 20,000 played ones take 40 MiB" in capfd.readouterr().out
    execute("conrft_vla", **flags | {"num_iterations": 1}, run_dir=tmp_path / "parts")
    execute("conrft_vla", resume=tmp_path / "parts", num_iterations=2)
    for name in ("trained", "buffers", "optimizer"):
        whole, parts = (
            safetensors.torch.load_file(tmp_path / run / "checkpoints" / "latest" / f"{name}.safetensors")
            for run in ("whole", "parts")
        )
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
        if name == "buffers":
            assert whole["replay.added"] == 12  # two environments, three decisions each, twice
    config = json.loads((tmp_path / "whole" / "checkpoints" / "final" / "config.json").read_text())
    assert config["policy"] == "flow" and config["denoising_steps"] == 1
    checkpoint = tmp_path / "whole" / "checkpoints" / "final"
    shutil.rmtree(tmp_path / "demos")  # are not needed to evaluate
    with pytest.raises(SystemExit):
        execute("conrft_vla", evaluate=None, task_id=4, checkpoint=checkpoint, eval_episodes=2,
                max_episode_steps=24, run_dir=tmp_path / "evaluation")  # fmt: skip
    result = json.loads((tmp_path / "evaluation" / "result.json").read_text())
    assert result["success"]["trials"] == 2
