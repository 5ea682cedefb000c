"""The flow policy: its chain of denoising steps, their densities, and the scripts on it."""

import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from artifacts import write_demos
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vla_envs.policies import SHIPPED, load_policy, new_policy, save_policy
from vla_envs.policies.adapters import TRAINABLE_SETS, make_trainable, trainable_state
from vla_envs.policies.flow import FlowConfig, FlowPolicy

SMALL = {
    "action_chunk": 2,
    "action_repeat": 1,
    "image_size": 32,
    "width": 16,
    "depth": 3,
    "heads": 2,
    "head_width": 24,
}
SENTENCES = ["pick up the milk", "pick up the ketchup", "pick up the butter", "pick up the tomato sauce"]
NOISES = ("sde", "fixed")
every_noise = pytest.mark.parametrize("noise", NOISES)


def observations(batch=4, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8),
        "state": rng.standard_normal((batch, 8)).astype(np.float32),
    }


def small(seed=0, **config):
    """A small policy whose every layer matters: those that start at zero are drawn too."""
    torch.manual_seed(seed)
    policy = FlowPolicy(FlowConfig(**SMALL | config))
    for weight in (policy.film.weight, policy.head.out.weight):
        torch.nn.init.normal_(weight, std=0.2)
    return policy.eval()


# ---- The chain ---------------------------------------------------------------------------------------


@every_noise
@pytest.mark.parametrize("temperature", [0.5, 1.2])
def test_shapes_and_the_densities_of_the_stored_chain(noise, temperature):
    """Each number's density is a normal distribution's around the mean of its step, written out anew."""
    policy, obs, steps = small(noise=noise, noise_level=0.3, denoising_steps=5), observations(), 5
    torch.manual_seed(1)
    actions, chain, sampled = policy.sample(obs, SENTENCES, temperature)
    assert actions.shape == (4, 2, 7) and actions.dtype == np.float32 and np.abs(actions).max() <= 1
    assert chain.shape == (4, 6, 14) and sampled.shape == (4, 70) and chain.dtype == torch.float32
    np.testing.assert_array_equal(actions.reshape(4, 14), chain[:, -1].clamp(-1, 1))
    logprobs, entropy, hidden = policy.score(obs, SENTENCES, chain, temperature)
    assert torch.equal(logprobs, sampled) and logprobs.requires_grad  # so the first ratio is exactly 1
    assert entropy.shape == (4, 70) and hidden.shape == (4, policy.hidden_size)
    condition = policy(policy.prepare(obs, SENTENCES))[0]
    for k in range(steps):
        t, x = 1 - k / steps, chain[:, k]
        v = policy.head(x, torch.full((4, 1), t), condition)
        mean, std = x - v / steps, 0.3 * temperature
        if noise == "sde":
            s = std * math.sqrt(t / max(1 - t, 1 / steps))
            mean, std = mean - s**2 / (2 * t * steps) * (x + (1 - t) * v), s / math.sqrt(steps)
        normal = torch.distributions.Normal(mean, std)
        columns = slice(14 * k, 14 * (k + 1))
        torch.testing.assert_close(
            logprobs[:, columns], normal.log_prob(chain[:, k + 1]), atol=1e-4, rtol=1e-5
        )
        torch.testing.assert_close(entropy[:, columns], normal.entropy().expand(4, 14), atol=1e-5, rtol=1e-5)


@every_noise
@pytest.mark.longer
def test_the_draws_follow_the_densities(noise):
    """Standardised by the step's mean and deviation, 4000 chains' numbers are standard normal."""
    policy = small(noise=noise)
    obs = {name: array.repeat(4000, axis=0) for name, array in observations(1).items()}
    torch.manual_seed(0)
    _, chain, _ = policy.sample(obs, SENTENCES[:1] * 4000, 0.8)
    condition = policy(policy.prepare(observations(1), SENTENCES[:1]))[0]
    for k in range(4):
        with torch.no_grad():
            mean, std = policy.step(chain[:, k], torch.tensor([[k]]), condition, 0.8)
        z = (chain[:, k + 1] - mean) / std
        assert z.mean(dim=0).abs().max() < 5 / math.sqrt(4000)
        assert (z.var(dim=0) - 1).abs().max() < 5 * math.sqrt(2 / 4000)
    assert chain[:, 0].mean().abs() < 0.03 and (chain[:, 0].var() - 1).abs() < 0.03


@every_noise
def test_without_noise_the_chain_is_the_ode(noise):
    policy, obs = small(noise=noise), observations()
    condition = policy(policy.prepare(obs, SENTENCES))[0]
    x = torch.zeros(4, 14)
    for k in range(4):
        one_step, std = policy.step(x, torch.tensor([[k]]), condition, 0.0)
        x = x - 0.25 * policy.head(x, torch.tensor([[1 - k / 4]]), condition)
        assert torch.equal(one_step, x) and (std == 0).all()
    actions, chain, logprobs = policy.sample(obs, SENTENCES, 0.0)
    torch.testing.assert_close(chain[:, -1], x)
    torch.manual_seed(7)
    assert np.array_equal(policy.sample(obs, SENTENCES, 0.0)[0], actions)  # it draws nothing
    assert torch.isfinite(logprobs).all()


def test_the_sde_keeps_the_distribution_of_the_ode():
    """A flow whose velocity is known: actions are normal around 0.3 with deviation 0.2, in many steps."""
    steps, mean, deviation = 100, 0.3, 0.2

    def velocity(x, t, condition):
        """E[noise - action | x] where x = t noise + (1 - t) action, both normal."""
        variance = t**2 + ((1 - t) * deviation) ** 2
        off = (x - (1 - t) * mean) / variance
        return t * off - (mean + (1 - t) * deviation**2 * off)

    found = {}
    for kind, level in (("ode", 0.0), ("sde", 0.5), ("fixed", 0.1)):
        noise = "fixed" if kind == "fixed" else "sde"
        policy = FlowPolicy(FlowConfig(**SMALL, denoising_steps=steps, noise=noise, noise_level=1.0))
        policy.head.forward = velocity
        torch.manual_seed(0)
        x = torch.randn(5000, 14)
        for k in range(steps):
            step_mean, std = policy.step(x, torch.tensor([[k]]), torch.zeros(1), level)
            x = step_mean + std * torch.randn_like(x)
        found[kind] = (x.mean().item(), x.std().item())
    for kind in ("ode", "sde"):
        assert found[kind] == pytest.approx((mean, deviation), abs=0.015), found
    assert found["fixed"][1] > 1.3 * deviation  # the noise alone widens it


def test_sampling_follows_torchs_seed():
    policy, draws = small(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(policy.sample(observations(), SENTENCES)[1])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_batch_equals_its_members_alone():
    policy, obs = small(), observations()
    chain = torch.randn(4, 5, 14)
    together = policy.score(obs, SENTENCES, chain)
    for i in range(4):
        mine = {name: array[i : i + 1] for name, array in obs.items()}
        for alone, each in zip(policy.score(mine, SENTENCES[i : i + 1], chain[i : i + 1]), together):
            torch.testing.assert_close(alone[0], each[i], atol=1e-4, rtol=1e-5)


# ---- Learning ----------------------------------------------------------------------------------------


@pytest.mark.longer
def test_flow_matching_learns_two_distinct_actions():
    """From one observation two demonstrations: samples are near one or the other, half and half."""
    policy = small(denoising_steps=10).train()
    obs = {name: array.repeat(32, axis=0) for name, array in observations(1).items()}
    which = torch.arange(32) % 2
    actions = torch.where(which[:, None, None] == 0, -0.8, 0.8).expand(32, 2, 7)
    optimizer = torch.optim.AdamW(policy.head.parameters(), lr=5e-3)
    torch.manual_seed(0)
    for _ in range(250):
        loss = policy.imitation_loss(obs, SENTENCES[:1] * 32, actions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = torch.cat([torch.as_tensor(policy.sample(obs, SENTENCES[:1] * 32, 0.2)[0]) for _ in range(16)])
    assert 0.35 < (drawn.mean(dim=(1, 2)) > 0).float().mean() < 0.65
    assert (drawn.abs() - 0.8).abs().median() < 0.2


def test_gradients_reach_every_parameter():
    for loss in (
        lambda p: p.score(observations(), SENTENCES, torch.randn(4, 5, 14))[0].sum(),
        lambda p: p.imitation_loss(observations(), SENTENCES, torch.rand(4, 2, 7)),
    ):
        policy = small()
        loss(policy).backward()
        assert [name for name, p in policy.named_parameters() if not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("train", [each for each in TRAINABLE_SETS if each != "expert"])
def test_exactly_what_is_named_changes(train):
    policy = make_trainable(small(), train, rank=2)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    chain = torch.randn(4, 5, 14)
    for _ in range(2):  # after the first step LoRA's A has a gradient too
        optimizer.zero_grad()
        policy.score(observations(), SENTENCES, chain)[0].mean().backward()
        optimizer.step()
    changed = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    parts = {"lora": "lora_", "head": ("head.", "norm."), "last-k": ("head.", "norm.", "blocks.2.")}
    expected = {
        name
        for name, p in policy.named_parameters()
        if train == "all" or any(
            "lora_" in name if part == "lora" else name.startswith(parts[part]) for part in train.split("+")
        )
    }  # fmt: skip
    assert changed == expected == set(trainable_state(policy))


# ---- Checkpoints -------------------------------------------------------------------------------------


@every_noise
def test_saved_and_loaded_again(tmp_path, noise):
    policy = small(noise=noise, noise_level=0.3, denoising_steps=3)
    save_policy(policy, "flow", tmp_path / "checkpoint")
    loaded = load_policy("flow", tmp_path / "checkpoint")
    assert loaded.config == policy.config and loaded.config.noise == noise
    assert all(torch.equal(value, policy.state_dict()[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(ValueError, match="is of policy 'flow'"):
        load_policy("nano", tmp_path / "checkpoint")


@pytest.mark.parametrize(
    "config", [{"noise": "ode"}, {"denoising_steps": 0}, {"noise_level": 0.0}, {"noise_level": "1"}], ids=str
)
def test_configurations_that_do_not_fit(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        new_policy("flow", SMALL | config)


def test_the_shipped_checkpoint():
    policy = load_policy("flow")
    assert policy.config == FlowConfig()
    assert sum(file.stat().st_size for file in SHIPPED["flow"].iterdir()) < 5e6


# ---- The scripts -------------------------------------------------------------------------------------


@pytest.fixture
def start(execute, tmp_path):
    """Run a script in this process on a small flow policy; its folder and what it logged."""
    save_policy(small(action_chunk=8), "flow", tmp_path / "checkpoint")
    (tmp_path / "nearer.py").write_text("def nearer(facts):\n    return -facts['gripper_to_object']\n")
    common = {
        "policy": "flow", "checkpoint": "checkpoint", "num_iterations": 1, "eval_episodes": 1,
        "eval_every": 0, "max_episode_steps": 24, "num_threads": 1, "run_dir": "run",
    }  # fmt: skip

    def start(script, **flags):
        execute(script, **common | flags)
        events = EventAccumulator("run")
        events.Reload()
        logged = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
        return tmp_path / "run", logged

    return start


def assert_learnt(run):
    """The final checkpoint is a whole policy with other weights than the first."""
    before = load_policy("flow", run.parent / "checkpoint").state_dict()
    after = load_policy("flow", run / "checkpoints" / "final").state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not torch.equal(after["head.out.weight"], before["head.out.weight"])


@pytest.mark.parametrize("script", ["grpo_vla", "tgrpo_vla", "ppo_vla", "tpo_vla"])
def test_online_rl(script, start):
    """PPO needs an iteration more: its critic learns alone at first."""
    own = {
        "grpo_vla": {"keep_low": 0, "keep_high": 1}, "ppo_vla": {"critic_warmup": 1, "num_iterations": 2},
        "tpo_vla": {"keep_low": 0, "keep_high": 1, "score": "return"},
    }  # fmt: skip
    flags = {"num_groups": 1, "group_size": 2, "reward": "nearer.py:nearer", "temperature": 1.2}
    run, logged = start(script, **flags | own.get(script, {}))
    assert_learnt(run)
    assert abs(logged["losses/ratio_first_minibatch"] - 1) < 1e-6 and logged["losses/logprob_gap"] < 1e-3
    expected = (
        0.5 * math.log(2 * math.pi * math.e) + np.log([0.3, 0.3 * 0.75**0.5, 0.15, 0.15 / 3**0.5]).mean()
    )
    assert logged["losses/entropy"] == pytest.approx(expected, abs=1e-4)  # of the steps at temperature 1.2


def test_imitation(start, tmp_path):
    (tmp_path / "demos").mkdir()
    write_demos(tmp_path / "demos" / "LiberoObject_4_demo.hdf5", (6, 6))
    run, logged = start("sft_vla", demos="demos", episodes=1, iteration_steps=3, minibatch_size=4)
    assert_learnt(run)
    assert 0 < logged["losses/held_out_nll"] < 10
    config = json.loads((run / "checkpoints" / "final" / "config.json").read_text())
    assert config["policy"] == "flow" and config["noise"] == "sde"
    assert safetensors.torch.load_file(run / "checkpoints" / "final" / "model.safetensors")
