"""Filtered cloning: the loss by hand, who is imitated, its update, and a run with successes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from artifacts import write_demos
from learning import arguments, chosen, copy_of, flat, gradient, learn, same_bits, small_batch, small_policy

import rft_vla
from rft_vla import imitation_loss, samples_of
from vla_envs.training import batches, replays


def test_the_loss_by_hand():
    logprobs = torch.tensor([[-1.0, -3.0], [-4.0, -8.0]], requires_grad=True)
    loss = imitation_loss(logprobs, torch.tensor([1.0, 3.0]))
    loss.backward()
    assert loss.item() == pytest.approx((2 * 1 + 6 * 3) / 4)
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.0, -1.0], [-3.0, -3.0]]) / 8)


def won(policy, batch, args):
    """The samples of its successes, as the script's loop takes them."""
    batch = flat(batch) | {"alive": batch["alive"] & batch["success"]}
    return samples_of(policy, batch, torch.zeros_like(batch["rewards"]), args)


def test_successes_alone_are_imitated():
    """Of members that take 1, 3, 2 and 3 decisions the first and the third succeed."""
    policy, args = small_policy(), arguments(rft_vla, update_epochs=1)
    b = won(policy, small_batch(), args)
    (drawn,) = batches.minibatches(b, args)
    assert sorted(zip(b["who"][drawn].tolist(), b["when"][drawn].tolist())) == [(0, 0), (2, 0), (2, 1)]
    weights = {int(who): w for who, w in zip(b["who"][drawn], b["weights"][drawn].tolist())}
    assert weights == {0: 1.0, 2: 0.5}


def test_the_gradient_is_the_likelihoods():
    policy, args = small_policy(), arguments(rft_vla)
    batch = small_batch()
    b = won(policy, batch, args)
    logs, steps = learn(rft_vla, policy, b, args, minibatches=batches.minibatches(b, args)[:1])
    found = gradient(policy)
    policy.zero_grad()
    logprobs = chosen(policy, batch, torch.tensor([0, 0, 1]), torch.tensor([0, 2, 2])).mean(dim=1)
    loss = -(logprobs * torch.tensor([1.0, 0.5, 0.5])).sum() / 2
    loss.backward()
    assert logs["policy_loss"] == pytest.approx(loss.item(), rel=1e-5) and steps == 1
    assert logs["logprob"] == pytest.approx(-loss.item(), rel=1e-5)
    torch.testing.assert_close(found, gradient(policy), rtol=1e-3, atol=1e-6)


def test_micro_batches_add_up():
    gradients = []
    for micro in (None, 1):
        policy, args = small_policy(), arguments(rft_vla, micro_batch_size=micro)
        b = won(policy, small_batch(), args)
        learn(rft_vla, policy, b, args, minibatches=[torch.tensor([0, 1, 3])])
        gradients.append(gradient(policy))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_target_kl_ends_the_update():
    policy, args = small_policy(), arguments(rft_vla, target_kl=1e-6, update_epochs=4)
    b = won(policy, small_batch(), args)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    logs, steps = learn(rft_vla, policy, b, args, optimizer, batches.minibatches(b, args))
    assert steps == 1 == logs["optimizer_steps"]


def test_an_update_that_is_not_finite_changes_nothing():
    policy, args = small_policy(), arguments(rft_vla)
    b = won(policy, small_batch(), args)
    b["weights"] = b["weights"] * math.nan
    before = copy_of(policy)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        learn(rft_vla, policy, b, args, torch.optim.SGD(policy.parameters(), lr=0.1))
    assert same_bits(policy, before)


def test_the_heads_own_stage():
    """RL moves the head by its advantages, and nothing else moves."""
    policy, args = small_policy(), arguments(rft_vla, stages=True)
    batch, before = small_batch(), copy_of(policy)
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0]).expand(3, 4)
    b = samples_of(policy, flat(batch), advantages, args)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    logs = rft_vla.update(policy, optimizer, b, [torch.arange(len(b["who"]))], args, imitate=False)
    moved = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"head.weight", "head.bias"} and logs["ratio_first_minibatch"] == pytest.approx(1)
    after = rft_vla.logprobs_of(policy, b, torch.arange(len(b["who"])), args)[0].mean(dim=1)
    gain = (after - b["old_logprobs"].mean(dim=1)) * b["advantages"] * b["weights"]
    assert gain.sum() > 1e-4


def test_all_successes_are_kept_and_as_many_drawn(tmp_path):
    """Of each rollout two of four members succeed, with 1 and 2 decisions; a resumed run has the same."""
    rollouts = [flat(small_batch(seed=seed)) for seed in range(3)]
    for rollout in rollouts:
        rollout["stages"] = torch.zeros(rollout["alive"].shape, dtype=torch.int64)
    folder = tmp_path / "successes"
    kept = replays.Successes(folder, 0)
    first = kept.exchange(rollouts[0], 1)
    assert first["success"].tolist() == [True, True] and len(first["when"]) == 3
    assert first["instructions"] == ["pick up thing 0", "pick up thing 2"]
    kept.exchange(rollouts[1], 2)
    torch.manual_seed(7)
    drawn = kept.exchange(rollouts[2], 4)
    (folder / "4-1.partial.pt").touch()  # writing it was cut off
    resumed = replays.Successes(folder, 3)  # iteration 4 was not saved, and is made again
    assert sorted(file.name for file in folder.iterdir()) == ["1-0.pt", "2-0.pt"]
    torch.manual_seed(7)
    again = resumed.exchange(rollouts[2], 4)
    for name in ("image", "tokens", "logprobs", "when", "who", "alive", "round"):
        assert torch.equal(drawn[name], again[name])
    everyone = torch.cat([rollout["tokens"] for rollout in rollouts])
    seen = set()
    for seed in range(40):  # of six episodes
        torch.manual_seed(seed)
        drawn = resumed.exchange(rollouts[2] | {"success": torch.tensor([True, False, False, False])}, 5)
        assert len(drawn["success"]) == 1 and len(drawn["when"]) == drawn["alive"].sum()
        seen |= {int((everyone == tokens).all(dim=1).nonzero()[0]) for tokens in drawn["tokens"]}
        resumed.batches.pop()
    succeeded = torch.cat([rollout["success"][rollout["who"]] for rollout in rollouts])
    assert sorted(seen) == succeeded.nonzero().flatten().tolist()


def test_an_older_success_may_be_longer_than_the_rollout(tmp_path):
    policy, args, kept = small_policy(), arguments(rft_vla, stages=True), replays.Successes(tmp_path, 0)
    longer, short = flat(small_batch((3, 5, 4, 5))), flat(small_batch((1, 1, 2, 2)))
    for batch in (longer, short):
        batch["stages"] = torch.zeros(batch["alive"].shape, dtype=torch.int64)
    kept.exchange(longer, 1)
    for seed in range(20):
        torch.manual_seed(seed)
        drawn = kept.exchange(short, 2)
        b = samples_of(policy, drawn, torch.zeros_like(drawn["rewards"]), args)
        assert b["advantages"].shape == (len(drawn["when"]),)
        if int(drawn["when"].max()) > 1:
            return
    pytest.fail("no longer one was drawn")


def test_successes_that_are_gone_or_damaged(tmp_path):
    with pytest.raises(ValueError, match="gone' is gone; expected the run's successful episodes there"):
        replays.Successes(tmp_path / "gone", 2)
    (tmp_path / "1-0.pt").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"1-0\.pt' is damaged"):
        replays.Successes(tmp_path, 2)


def test_demonstrations_add_their_loss():
    policy, args = small_policy(), arguments(rft_vla, minibatch_size=4)
    batch = small_batch()
    demos = {
        "image": batch["last"]["image"].numpy(), "state": batch["last"]["state"].numpy(),
        "actions": np.tile(np.linspace(-0.9, 0.9, 7, dtype=np.float32), (4, 2, 1)),
        "instructions": batch["instructions"],
    }  # fmt: skip
    b = won(policy, batch, args)
    torch.manual_seed(5)
    logs = rft_vla.update(
        policy, torch.optim.SGD(policy.parameters(), lr=0.0), b, [torch.tensor([0])], args, demos=demos
    )
    found = gradient(policy)
    policy.zero_grad()
    torch.manual_seed(5)
    inds = torch.randint(4, (4,)).numpy()
    obs = {name: demos[name][inds] for name in ("image", "state")}
    words = [demos["instructions"][i] for i in inds]
    loss = policy.imitation_loss(obs, words, torch.as_tensor(demos["actions"][inds]))
    own = imitation_loss(rft_vla.logprobs_of(policy, b, torch.tensor([0]), args)[0], torch.ones(1))
    (loss + own).backward()
    assert logs["demos_loss"] == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(found, gradient(policy), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"clip_low": 0.1}, "ratio_level are of RL"),
        ({"stages": True, "group_size": 1}, "group_size is 1; expected at least 2"),
        ({"stages": True, "train": "lora"}, "expected --train all, head or lora"),
        (
            {"stages": True, "train": "lora+head", "shared_adapter": (Path("a"),), "task_ids": (4,)},
            r"got lora\+head and --shared-adapter",
        ),
    ],
)
def test_what_does_not_fit(change, line):
    with pytest.raises(ValueError, match=line):
        rft_vla.validate(rft_vla.Args(**change))


def test_groups():
    sizes = [
        (args.num_groups, args.group_size)
        for args in map(rft_vla.validate, (rft_vla.Args(), rft_vla.Args(stages=True)))
    ]
    assert sizes == [(64, 1), (8, 8)]


@pytest.mark.longer
def test_a_run_with_and_without_successes(execute, tmp_path, capfd):
    """The policy that is shipped needs about 90 control steps; with 24 nothing is imitated."""
    flags = {
        "num_groups": 6, "num_iterations": 2, "eval_every": 0, "eval_episodes": 1, "num_threads": 1,
        "max_episode_steps": 160, "temperature": 0.5,
    }  # fmt: skip
    execute("rft_vla", **flags, run_dir=tmp_path / "one")
    out, error = capfd.readouterr()
    assert "nothing to imitate" not in out + error
    write_demos(tmp_path / "LiberoObject_4_demo.hdf5", (9,), size=128)
    stages = {"stages": None, "demos": tmp_path, "num_groups": 2, "group_size": 3, "num_iterations": 1}
    execute("rft_vla", **flags | stages, run_dir=tmp_path / "stages")
    execute("rft_vla", **flags | {"num_iterations": 1, "max_episode_steps": 24}, run_dir=tmp_path / "none")
    out, error = capfd.readouterr()
    assert "iteration 1: no episode succeeds; nothing to imitate" in out + error
    assert json.loads((tmp_path / "none" / "result.json").read_text())["episodes"] == 6
