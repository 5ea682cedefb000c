"""Mistakes in a script's arguments: each is one line, found while the command line is read.

No script is started: what is called is what a script calls first. ``test_scripts.py`` starts the scripts with
a mistake of each kind.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from artifacts import words_of

import grpo_vla
import ppo_vla
import sft_vla
import tgrpo_vla
from vla_envs.policies import load_policy, new_policy
from vla_envs.training import arguments, checkpoints


@pytest.fixture
def refused(monkeypatch, capfd):
    """A function of a script and flags: the line with which the script's command line is refused."""

    def refused(script, **flags):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words_of(flags)])
        presets = getattr(script, "PRESETS", None)
        with pytest.raises(SystemExit) as exit_:
            arguments.parse(script.Args, script.validate, presets)
        out, error = capfd.readouterr()
        assert exit_.value.code == 2 and error.startswith("error:") and error.count("\n") == 1, error
        assert out == ""
        return error

    return refused


@pytest.mark.parametrize("script", [grpo_vla, sft_vla], ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"suite": "LiberoObjekt"}, "LiberoObject"),
        ({"suite": "LiberoLong"}, "did you mean 'Libero10'"),
        ({"task_id": -1}, "-1"),
        ({"task_id": 10}, "10"),
        ({"task_id": 9, "task_ids": 4}, "task_id is 9 beside task_ids (4,)"),
        ({"task_ids": (7, 7), "num_groups": 2}, "each task once"),
        ({"perturb": "light:1", "evaluate": None}, "expected --eval-perturb"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"train": "experts"}, "did you mean 'expert'"),
        ({"device": "cpux"}, "device 'cpux' is unknown"),
        ({"lora_rank": 32}, "expected it with --train lora"),
        ({"seed": -1}, "seed"),
        ({"num_iterations": 0}, "num_iterations"),
        ({"num_iteration": 2}, "num-iteration"),
        ({"minibatch_size": 0}, "minibatch_size"),
        ({"learning_rate": "fast"}, "learning-rate"),
        ({"learning_rate": "nan"}, "learning_rate"),
        ({"max_grad_norm": "inf"}, "max_grad_norm"),
        ({"temperature": 0}, "temperature"),
        ({"eval_temperature": -1}, "eval_temperature"),
        ({"eval_episodes": 0}, "eval_episodes"),
        ({"eval_episodes": 51}, "51"),
        ({"eval_every": -1}, "eval_every"),
        ({"adapter": "final"}, "adapter"),
        ({"no_merge": None}, "--train lora"),
        ({"protocol": "openvlaa"}, "openvla"),
        ({"resume": "/no/such/folder"}, "/no/such/folder"),
        ({"resume": "/no/such/folder", "evaluate": None}, "--checkpoint"),
        ({"compare": "/no/such/folder"}, "--evaluate"),
        ({"compare": "/no/such/folder", "evaluate": None}, "/no/such/folder"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(script, flags, words, refused):
    if script is sft_vla:
        flags = {"demos": "demos"} | {name: value for name, value in flags.items() if name != "num_groups"}
    assert words in refused(script, **flags)


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        (tgrpo_vla, {"alpha1": "abc"}, "alpha1"),
        (tgrpo_vla, {"alphas": "given", "alpha1": "nan"}, "nan"),
        (tgrpo_vla, {"alphas": "given", "alpha2": "inf"}, "inf"),
        (tgrpo_vla, {"alphas": "given", "alpha1": 0, "alpha2": 0}, "not both 0"),
        (tgrpo_vla, {"alphas": "auto", "alpha2": 0.7}, "alphas auto finds"),
        (tgrpo_vla, {"stop": "never"}, "never"),
        (tgrpo_vla, {"total_env_steps": 0}, "total_env_steps"),
        (tgrpo_vla, {"warmup_iterations": 0}, "warmup_iterations"),
        (tgrpo_vla, {"update_epochs": 0}, "update_epochs"),
        (tgrpo_vla, {"target_kl": "nan"}, "target_kl"),
        (tgrpo_vla, {"kl_coef": "nan", "train": "lora"}, "kl_coef"),
        (tgrpo_vla, {"task_ids": (7, 4), "num_groups": 1}, "num_groups is 1"),
        (ppo_vla, {"task_ids": (7, 4), "num_groups": 1}, "num_groups is 1"),
        (grpo_vla, {"task_ids": (7, 4), "num_groups": 1}, "num_groups is 1"),
        (sft_vla, {"task_ids": (4, 11)}, "11"),
        (sft_vla, {"task_ids": (4, 7), "episodes": (2, 1, 1)}, "(2, 1, 1)"),
        (sft_vla, {"episodes": 0}, "episodes"),
        (sft_vla, {}, "demos is 'demos', where there is no folder"),
        (sft_vla, {"train": "lora", "lora_rank": 2}, "stay random"),
        (sft_vla, {"held_out": -1}, "held_out"),
        (sft_vla, {"held_out": 0, "early_stop": 1}, "held-out"),
        (sft_vla, {"perturb": "light:1"}, "expected --eval-perturb"),
        (sft_vla, {"iteration_steps": 0}, "iteration_steps"),
        (sft_vla, {"warmup_frac": 0}, "warmup_frac"),
        (sft_vla, {"weight_decay": "nan"}, "weight_decay"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_scripts_own_mistakes(script, flags, words, refused):
    flags |= {"demos": "demos"} if script is sft_vla else {}
    assert words in refused(script, **flags)


def test_the_chunk_is_the_policys():
    policy, args = SimpleNamespace(action_chunk=8), grpo_vla.Args()
    assert arguments.fill_in_chunk(args, policy).action_chunk == 8
    with pytest.raises(ValueError, match="action_chunk is 4; expected 8, the policy's"):
        arguments.fill_in_chunk(grpo_vla.Args(action_chunk=4), policy)


def test_devices_that_do_not_exist():
    with pytest.raises(ValueError, match="device 'nonsense' is unknown; expected cpu, cuda"):
        load_policy("nano", None, "nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda") as error:
            load_policy("nano", None, "cuda")
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"shared_adapter": (Path("a"),), "train": "lora"}, "names 1 adapters"),
        ({"shared_adapter": (Path("a"),) * 2, "train": "all"}, "--train lora"),
        *(
            ({"shared_adapter": (Path("a"),) * 2, "train": "lora", **perturb}, "without the axis instruction")
            for perturb in ({"perturb": "light:1, instruction:2"}, {"eval_perturb": "all:1"})
        ),
    ],
    ids=str,
)
def test_adapters_that_do_not_fit(flags, words):
    args = arguments.complete(grpo_vla.Args(task_ids=(7, 4), **flags))
    with pytest.raises(ValueError, match=words):
        checkpoints.prepare(new_policy("nano"), args)
