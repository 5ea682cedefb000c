"""What is trained, and LoRA adapters in peft's format."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from vla_envs.policies import count_parameters, load_policy, save_policy
from vla_envs.policies.adapters import (
    TRAINABLE_SETS,
    adapter_off,
    load_optimizer_state,
    make_trainable,
    merged,
    optimizer_state,
    save_adapter,
    trainable_state,
)
from vla_envs.policies.nano import NanoConfig, NanoPolicy

SMALL = NanoConfig(action_chunk=2, action_repeat=1, image_size=32, width=16, depth=3, heads=2)
SENTENCES = ["pick up the milk", "pick up the ketchup"]
LINEAR = ("qkv", "proj", "fc1", "fc2")
HEAD = {"head.weight", "head.bias", "norm.weight", "norm.bias"}
LORA = {f"blocks.{i}.{layer}.lora_{ab}.default.weight" for i in range(3) for layer in LINEAR for ab in "AB"}


def plain(seed=0):
    torch.manual_seed(seed)
    policy = NanoPolicy(SMALL)
    torch.nn.init.normal_(policy.film.weight, std=0.1)  # else the words get no gradient
    return policy


def logprobs(policy):
    """Log-probabilities of fixed tokens on fixed observations."""
    rng = np.random.default_rng(0)
    obs = {
        "image": rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8),
        "state": rng.standard_normal((2, 8)).astype(np.float32),
    }
    return policy.score(obs, SENTENCES, torch.from_numpy(rng.integers(0, 256, (2, 14))))[0]


def optimise(policy, steps=2, lr=0.05):
    """Two steps: after the first one LoRA's A has a gradient too."""
    optimizer = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad], lr=lr, weight_decay=0.0
    )
    for _ in range(steps):
        optimizer.zero_grad()
        (-logprobs(policy).mean()).backward()
        optimizer.step()
    return optimizer


def expected_changes(policy, train, last_k):
    """Names of the parameters that ``train`` stands for, written out anew."""
    names = {name for name, _ in policy.named_parameters()}
    if train == "all":
        return names
    chosen = set(LORA) if train.startswith("lora") else set()
    if train != "lora":
        chosen |= HEAD
    if train == "lora+last-k":
        chosen |= {
            name for name in names if any(name.startswith(f"blocks.{i}.") for i in range(3 - last_k, 3))
        }
    return chosen


def test_more_blocks_than_there_are():
    with pytest.raises(ValueError, match="last_k is 4; expected 1 to 3"):
        make_trainable(plain(), "lora+last-k", last_k=4)


@pytest.mark.parametrize("train", [each for each in TRAINABLE_SETS if each != "expert"])
@pytest.mark.parametrize("last_k", [1, 2])
def test_exactly_what_is_named_changes(train, last_k):
    policy = make_trainable(plain(), train, rank=2, last_k=last_k)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    optimise(policy)
    changed = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == expected_changes(policy, train, last_k)
    assert set(trainable_state(policy)) == changed


def test_all_trains_everything():
    policy = make_trainable(plain(), "all")
    assert (
        count_parameters(policy)[0]
        == count_parameters(policy)[1]
        == sum(p.numel() for p in plain().parameters())
    )


def test_the_number_of_lora_parameters():
    """r (in + out) for each of the four layers of a block: 16 to 48, 16 to 16, 16 to 64, 64 to 16."""
    policy = make_trainable(plain(), "lora", rank=2)
    assert count_parameters(policy)[0] == 3 * 2 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))


@pytest.mark.parametrize("train", ["lorra", "", "last-k", "lora+head+last-k"])
def test_unknown_sets(train):
    with pytest.raises(ValueError, match=r"lora, head, lora\+head, lora\+last-k, expert, all"):
        make_trainable(plain(), train)


@pytest.mark.parametrize("train", ["lora", "lora+head", "lora+last-k"])
def test_a_fresh_adapter_changes_nothing(train):
    assert torch.equal(logprobs(make_trainable(plain(), train, rank=4)), logprobs(plain()))


def test_adapter_off_is_the_policy_without_it():
    policy = make_trainable(plain(), "lora", rank=4)
    optimise(policy)
    adapted = logprobs(policy)
    with torch.no_grad(), adapter_off(policy):
        assert torch.equal(logprobs(policy), logprobs(plain()))
    assert torch.equal(logprobs(policy), adapted) and (adapted - logprobs(plain())).abs().max() > 1e-2


def test_the_adapter_comes_back_after_an_error_and_goes_on_learning():
    policy = make_trainable(plain(), "lora", rank=4)
    optimise(policy)
    adapted = logprobs(policy)
    with pytest.raises(KeyError), adapter_off(policy):
        raise KeyError
    assert torch.equal(logprobs(policy), adapted)
    assert set(trainable_state(policy)) == LORA
    optimise(policy)
    assert not torch.equal(logprobs(policy), adapted)


def test_k3_is_zero_at_the_start_and_positive_after():
    """The KL term of the scripts, on a policy that has not moved yet, and on one that has."""
    policy = make_trainable(plain(), "lora", rank=4)

    def k3():
        with torch.no_grad(), adapter_off(policy):
            reference = logprobs(policy)
        gap = reference - logprobs(policy)
        return gap.exp() - 1 - gap

    assert k3().eq(0).all()
    optimise(policy)
    assert (k3() >= -1e-7).all() and k3().mean() > 1e-4


@pytest.mark.parametrize("train", [each for each in TRAINABLE_SETS if each != "expert"])
@pytest.mark.parametrize("rank", [4, 32])
def test_merged_weights_are_the_adapted_policy(train, rank):
    policy = make_trainable(plain(), train, rank=rank)
    optimise(policy, lr=0.01)
    other = NanoPolicy(SMALL)
    other.load_state_dict(merged(policy))
    torch.testing.assert_close(logprobs(other), logprobs(policy), atol=1e-5, rtol=1e-6)
    assert (logprobs(other) - logprobs(plain())).abs().max() > 1e-3


def test_merging_leaves_the_policy_alone():
    policy = make_trainable(plain(), "lora", rank=4)
    optimise(policy)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    for value in merged(policy).values():
        value.fill_(7)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_a_merged_checkpoint_is_a_plain_one(tmp_path):
    policy = make_trainable(plain(), "lora", rank=4)
    optimise(policy)
    other = NanoPolicy(SMALL)
    other.load_state_dict(merged(policy))
    save_policy(other, "nano", tmp_path / "final")
    loaded = load_policy("nano", tmp_path / "final")
    torch.testing.assert_close(logprobs(loaded), logprobs(policy), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("rank", [4, 32])
def test_peft_reads_the_adapter(tmp_path, rank):
    import peft

    policy = make_trainable(plain(), "lora", rank=rank)
    optimise(policy)
    save_adapter(policy, tmp_path / "adapter")
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (rank, min(rank, 16), 0.0)
    theirs = peft.PeftModel.from_pretrained(plain(), str(tmp_path / "adapter"))
    assert torch.equal(logprobs(theirs.base_model.model), logprobs(policy))
    assert not torch.equal(logprobs(plain()), logprobs(policy))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}  # no pickles


@pytest.mark.parametrize(("train", "last_k"), [("lora+head", 1), ("lora+last-k", 1), ("lora+last-k", 3)])
def test_modules_trained_in_full_are_in_the_adapter(tmp_path, train, last_k):
    """The saved adapter on the plain policy is the trained one: through peft, and through ours."""
    import peft

    policy = make_trainable(plain(), train, rank=4, last_k=last_k)
    optimise(policy)
    save_adapter(policy, tmp_path / "adapter")
    expected = logprobs(policy)
    assert (expected - logprobs(plain())).abs().max() > 1
    theirs = peft.PeftModel.from_pretrained(plain(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logprobs(theirs.base_model.model), expected, atol=1e-4, rtol=1e-5)
    mine = make_trainable(
        plain(), "lora", rank=2, task_adapters=dict.fromkeys(SENTENCES, tmp_path / "adapter")
    )
    torch.testing.assert_close(logprobs(mine), expected, atol=1e-4, rtol=1e-5)
    other = NanoPolicy(SMALL)
    other.load_state_dict(merged(mine))
    torch.testing.assert_close(logprobs(other), expected, atol=1e-4, rtol=1e-5)
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# ---- One adapter above those of the tasks ------------------------------------------------------------


@pytest.fixture
def below(tmp_path):
    """The saved adapter of each sentence's task, and log-probs of the policy with each."""
    folders, expected = {}, []
    for i, sentence in enumerate(SENTENCES):
        policy = make_trainable(plain(), "lora", rank=2 + i)
        torch.manual_seed(i)
        optimise(policy, steps=2 + i)
        save_adapter(policy, tmp_path / f"task_{i}")
        folders[sentence] = tmp_path / f"task_{i}"
        expected.append(logprobs(policy)[i])
    assert not torch.equal(*expected)
    return folders, torch.stack(expected)


def test_a_fresh_shared_adapter_answers_as_the_tasks_adapters_do(below):
    folders, expected = below
    policy = make_trainable(plain(), "lora", rank=4, task_adapters=folders)
    torch.testing.assert_close(logprobs(policy), expected, atol=1e-6, rtol=1e-6)
    assert {name.removeprefix("policy.") for name in trainable_state(policy)} == LORA


def test_only_the_shared_adapter_learns(below):
    folders, expected = below
    policy = make_trainable(plain(), "lora", rank=4, task_adapters=folders)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    optimise(policy)
    changed = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.removeprefix("policy.") for name in changed} == LORA
    adapted = logprobs(policy)
    assert (adapted - expected).abs().amax(dim=1).min() > 1e-3  # of both tasks
    with torch.no_grad(), adapter_off(policy):
        torch.testing.assert_close(logprobs(policy), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(logprobs(policy), adapted)


def test_each_task_merges_into_a_policy_of_its_own(below, tmp_path):
    folders, _ = below
    policy = make_trainable(plain(), "lora", rank=4, task_adapters=folders)
    optimise(policy)
    for i, sentence in enumerate(SENTENCES):
        policy.activate(policy.names[sentence])
        save_policy(policy, "nano", tmp_path / sentence)
        loaded = load_policy("nano", tmp_path / sentence)
        torch.testing.assert_close(logprobs(loaded)[i], logprobs(policy)[i], atol=1e-5, rtol=1e-5)


def test_samples_of_two_tasks_are_those_of_each_alone(below):
    policy = make_trainable(plain(), "lora", rank=4, task_adapters=below[0])
    optimise(policy)
    rng = np.random.default_rng(0)
    obs = {"image": rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), "state": np.zeros((4, 8), "f4")}
    texts = [SENTENCES[k] for k in (1, 0, 0, 1)]
    actions, tokens, scores = policy.sample(obs, texts, 0.0)
    for i, text in enumerate(texts):
        alone = policy.sample({name: array[i : i + 1] for name, array in obs.items()}, [text], 0.0)
        assert np.array_equal(actions[i], alone[0][0]) and torch.equal(tokens[i], alone[1][0])
        torch.testing.assert_close(scores[i], alone[2][0], atol=1e-5, rtol=1e-5)

    def draw(*rows):
        some = {name: array[list(rows)] for name, array in obs.items()}
        generators = [torch.Generator().manual_seed(i) for i in rows]
        return policy.sample(some, [texts[i] for i in rows], 1.3, generators)[1]

    assert torch.equal(draw(2, 3), draw(0, 1, 2, 3)[2:])


def test_imitating_two_tasks_goes_by_each_ones_adapter(below):
    policy = make_trainable(plain(), "lora", rank=4, task_adapters=below[0])
    rng = np.random.default_rng(0)
    obs = {"image": rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8), "state": np.zeros((3, 8), "f4")}
    actions = torch.from_numpy(rng.uniform(-1, 1, (3, 2, 7)).astype(np.float32))
    texts, alone = [SENTENCES[k] for k in (1, 0, 1)], []
    for i, text in enumerate(texts):
        policy.activate(policy.names[text])
        mine = {name: array[i : i + 1] for name, array in obs.items()}
        alone.append(policy.policy.imitation_loss(mine, [text], actions[i : i + 1]))
    expected = torch.stack(alone).mean()
    for sentence in SENTENCES:  # whichever was at work before
        policy.activate(policy.names[sentence])
        torch.testing.assert_close(policy.imitation_loss(obs, texts, actions), expected)


def test_peft_stacks_the_saved_adapters(below, tmp_path):
    import peft

    folders, _ = below
    policy = make_trainable(plain(), "lora", rank=4, task_adapters=folders)
    optimise(policy)
    save_adapter(policy, tmp_path / "shared")
    theirs = peft.PeftModel.from_pretrained(plain(), str(folders[SENTENCES[1]]), adapter_name="task")
    theirs.load_adapter(str(tmp_path / "shared"), "shared")
    theirs.base_model.set_adapter(["task", "shared"])
    torch.testing.assert_close(
        logprobs(theirs.base_model.model)[1], logprobs(policy)[1], atol=1e-6, rtol=1e-6
    )


def test_peft_stacks_a_head_that_all_tasks_share(below, tmp_path):
    import peft

    folders, expected = below
    policy = make_trainable(plain(), "lora+head", rank=4, task_adapters=folders)
    torch.testing.assert_close(logprobs(policy), expected, atol=1e-6, rtol=1e-6)
    optimise(policy)
    save_adapter(policy, tmp_path / "shared")
    theirs = peft.PeftModel.from_pretrained(plain(), str(folders[SENTENCES[1]]), adapter_name="task")
    theirs.load_adapter(str(tmp_path / "shared"), "shared")
    theirs.base_model.set_adapter(["task", "shared"])
    torch.testing.assert_close(
        logprobs(theirs.base_model.model)[1], logprobs(policy)[1], atol=1e-5, rtol=1e-6
    )


@pytest.fixture
def whole_below(tmp_path):
    """As ``below``, of tasks that have a head, and one of them a block, of their own."""
    folders, expected = {}, []
    for i, (sentence, train) in enumerate(zip(SENTENCES, ("lora+last-k", "lora+head"))):
        policy = make_trainable(plain(), train, rank=2 + i)
        torch.manual_seed(i)
        optimise(policy, steps=2 + i)
        save_adapter(policy, tmp_path / f"task_{i}")
        folders[sentence] = tmp_path / f"task_{i}"
        expected.append(logprobs(policy)[i].detach())
    return folders, torch.stack(expected)


def test_tasks_keep_the_modules_that_they_have_in_full(whole_below, tmp_path):
    folders, expected = whole_below
    policy = make_trainable(plain(), "lora", rank=4, task_adapters=folders)
    torch.testing.assert_close(logprobs(policy), expected, atol=1e-4, rtol=1e-5)
    assert {name.removeprefix("policy.") for name in trainable_state(policy)} == LORA
    optimise(policy)
    assert (logprobs(policy) - expected).abs().amax(dim=1).min() > 1e-3
    for i, sentence in enumerate(SENTENCES):
        policy.activate(policy.names[sentence])
        save_policy(policy, "nano", tmp_path / sentence)
        loaded = load_policy("nano", tmp_path / sentence)
        torch.testing.assert_close(logprobs(loaded)[i], logprobs(policy)[i], atol=1e-4, rtol=1e-5)
    with torch.no_grad(), adapter_off(policy):
        torch.testing.assert_close(logprobs(policy), expected, atol=1e-4, rtol=1e-5)


def test_gradients_of_two_tasks_are_those_of_each_alone(whole_below):
    """Also where another task's modules have taken the place of those that the gradient goes through."""
    policy = make_trainable(plain(), "lora", rank=4, task_adapters=whole_below[0])
    optimise(policy, steps=1)
    trained = [p for p in policy.parameters() if p.requires_grad]
    together = torch.autograd.grad(logprobs(policy).sum(), trained)
    alone = [torch.autograd.grad(logprobs(policy)[i].sum(), trained) for i in range(2)]
    for gradient, *parts in zip(together, *alone):
        torch.testing.assert_close(gradient, sum(parts), atol=1e-4, rtol=1e-4)


def test_what_cannot_lie_above_the_tasks_adapters(below, whole_below):
    with pytest.raises(ValueError, match=r"has its own blocks.*; expected --train lora above it"):
        make_trainable(plain(), "lora+head", task_adapters=whole_below[0])
    with pytest.raises(ValueError, match=r"expected --train lora or lora\+head above adapters"):
        make_trainable(plain(), "lora+last-k", task_adapters=below[0])


def test_a_frozen_adapter_drops_nothing(below):
    """Made by peft with dropout it is the same in the update as in the rollout."""
    folders, expected = below
    for folder in folders.values():
        rewrite(folder / "adapter_config.json", lora_dropout=0.1)
    policy = make_trainable(plain(), "lora", rank=4, task_adapters=folders).train()
    torch.testing.assert_close(logprobs(policy), expected, atol=1e-6, rtol=1e-6)


def test_adapters_of_tasks_need_not_have_the_same_layers(below, tmp_path):
    import peft

    folders, expected = below
    theirs = peft.get_peft_model(plain(), peft.LoraConfig(r=2, target_modules=["fc1", "stem.0"]))
    theirs.save_pretrained(tmp_path / "theirs")
    policy = make_trainable(plain(), "lora", task_adapters=folders | {SENTENCES[1]: tmp_path / "theirs"})
    torch.testing.assert_close(logprobs(policy)[0], expected[0], atol=1e-6, rtol=1e-6)
    other = NanoPolicy(SMALL)
    for i, sentence in enumerate(SENTENCES):
        policy.activate(policy.names[sentence])
        other.load_state_dict(merged(policy))
        torch.testing.assert_close(logprobs(other)[i], logprobs(policy)[i], atol=1e-5, rtol=1e-5)


def rewrite(file, **changes):
    """Other entries in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "its peft_type is 'IA3'; expected 'LORA'"),
        ({"use_dora": True}, "its use_dora is True; expected False"),
        ({"bias": "all"}, "its bias is 'all'; expected 'none'"),
        ({"init_lora_weights": "pissa"}, "its init_lora_weights is 'pissa'"),
        ({"r": 0}, "its rank is 0; expected an int from 1 to 4096"),
        ({"r": 2.5}, "its rank is 2.5"),
        ({"rank_pattern": {"qkv": 10**9}}, "its rank is 1000000000"),
        ({"lora_alpha": float("nan")}, "its lora_alpha is nan; expected a finite number above 0"),
        ({"lora_alpha": "16"}, "its lora_alpha is '16'"),
        ({"target_modules": ["no_such"]}, "no_such"),
        ({"target_modules": ["qkv"]}, "that belong to nothing"),
    ],
    ids=str,
)
def test_settings_of_adapters_that_do_not_fit(below, changes, words):
    folder = below[0][SENTENCES[0]]
    rewrite(folder / "adapter_config.json", **changes)
    with pytest.raises(ValueError) as error:
        make_trainable(plain(), "lora", task_adapters={SENTENCES[0]: folder})
    message = str(error.value)
    assert f"{str(folder)!r} is not an adapter of this policy" in message and words in message
    assert len(message.splitlines()) == 1


def test_numbers_of_adapters_that_do_not_fit(below):
    folder = below[0][SENTENCES[0]]
    file = folder / "adapter_model.safetensors"
    sound = safetensors.torch.load_file(file)
    name = "base_model.model.blocks.0.qkv.lora_A.weight"
    for tensor, words in (
        (
            torch.full_like(sound[name], float("nan")),
            "not finite in base_model.model.blocks.0.qkv.lora_A.weight",
        ),
        (sound[name].to(torch.int8), "blocks.0.qkv.lora_A.weight is of I8; expected one of"),
    ):
        safetensors.torch.save_file(sound | {name: tensor}, file)
        with pytest.raises(ValueError, match=words):
            make_trainable(plain(), "lora", task_adapters={SENTENCES[0]: folder})
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        safetensors.torch.save_file({key: value.to(kind) for key, value in sound.items()}, file)
        policy = make_trainable(plain(), "lora", task_adapters=dict.fromkeys(SENTENCES, folder))
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        torch.testing.assert_close(logprobs(policy)[0], below[1][0], atol=0.1, rtol=0)


def test_the_folder_of_a_run_is_no_adapter(below, monkeypatch):
    """The line names the adapter in it; nobody asks the hub for a folder that is not there."""
    import peft.config

    monkeypatch.setattr(peft.config, "hf_hub_download", None)
    folder = below[0][SENTENCES[0]]
    run = folder.parent / "run"
    (run / "checkpoints").mkdir(parents=True)
    folder.rename(run / "checkpoints" / "task_0")
    for given, words in (
        (run, "did you mean"),
        (run / "checkpoints", "did you mean"),
        (folder, "expected the folder of one"),
    ):
        with pytest.raises(ValueError, match=r"it has no adapter_config\.json") as error:
            make_trainable(plain(), "lora", task_adapters={SENTENCES[0]: given})
        assert words in str(error.value)


def test_folders_that_hold_no_fitting_adapter(below, tmp_path):
    folders, _ = below
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match="is not an adapter of this policy"):
            make_trainable(plain(), "lora", task_adapters={SENTENCES[0]: folder})
    first = folders[SENTENCES[0]]
    config, tensors = first / "adapter_config.json", first / "adapter_model.safetensors"
    sound = tensors.read_bytes()
    for content in (sound[:-9], b"PK\x03\x04" + sound, bytes(1000)):
        tensors.write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors' is damaged"):
            make_trainable(plain(), "lora", task_adapters={SENTENCES[0]: first})
    tensors.write_bytes(sound)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 10**9}))
    with pytest.raises(ValueError, match="its rank is 1000000000"):
        make_trainable(plain(), "lora", task_adapters={SENTENCES[0]: first})
    wide = NanoPolicy(NanoConfig(action_chunk=2, action_repeat=1, image_size=32, width=32, depth=3, heads=2))
    with pytest.raises(ValueError, match="is not an adapter of this policy"):
        make_trainable(wide, "lora", task_adapters=folders)


@pytest.mark.parametrize("train", ["lora", "all"])
def test_an_optimiser_goes_on_from_its_state(train):
    first, second = (make_trainable(plain(), train, rank=2) for _ in range(2))
    optimizer = optimise(first, steps=3)
    second.load_state_dict(first.state_dict())
    other = torch.optim.AdamW([p for p in second.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    load_optimizer_state(other, {name: value.clone() for name, value in optimizer_state(optimizer).items()})
    for policy, opt in ((first, optimizer), (second, other)):
        opt.zero_grad()
        (-logprobs(policy).mean()).backward()
        opt.step()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
