"""What is trained of a policy: a LoRA adapter (by peft), the head, the last blocks, or everything."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from vla_envs import distributed
from vla_envs.files import read_json, replace_folder
from vla_envs.inputs import in_short, nearest
from vla_envs.policies.tensors import read_tensors

TRAINABLE_SETS = ("lora", "head", "lora+head", "lora+last-k", "expert", "all")
MOST_RANK = 4096  # that an adapter on disk may claim
#: Settings that an adapter on disk may have; every other setting of peft's must have its default.
KNOWN_SETTINGS = frozenset(
    "peft_type task_type auto_mapping base_model_name_or_path revision inference_mode peft_version r"
    " lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern rank_pattern"
    " alpha_pattern use_rslora init_lora_weights modules_to_save".split()
)


def check_trainable_set(train: str) -> None:
    """Refuse a name that is none of ``TRAINABLE_SETS``.

    Raises:
        ValueError: Names those that there are.
    """
    if train not in TRAINABLE_SETS:
        hint = nearest(train, list(TRAINABLE_SETS))
        raise ValueError(f"train {train!r} is unknown; expected one of {', '.join(TRAINABLE_SETS)}{hint}")


def make_trainable(
    policy: Any, train: str, rank: int = 32, last_k: int = 1, task_adapters: dict[str, Path] | None = None
) -> Any:
    """Freeze all of ``policy`` but what ``train`` names, and add a LoRA adapter where it asks for one.

    What is trained is float32, whatever the rest is, because bfloat16 would round small steps away. With
    ``all``, a ``large`` policy is spread over all processes.

    Args:
        policy: A policy, whose ``head``, ``norm``, ``blocks``, ``expert``, ``noise_head`` and
            ``lora_targets`` are used if it has them.
        train: One of ``TRAINABLE_SETS``.
        rank: LoRA's r; alpha is ``min(rank, 16)`` and dropout 0, as OpenVLA has them.
        last_k: Blocks trained in full by ``lora+last-k``.
        task_adapters: For each instruction, the folder of its task's adapter. They stay frozen below the new
            one, which all tasks share (``SharedAdapterPolicy``).

    Raises:
        ValueError: When there is no such set, the policy has fewer blocks, or an adapter does not fit.
    """
    task_adapters = task_adapters or {}
    check_trainable_set(train)
    parts = {"head": ("head",), "last-k": ("blocks", "head"), "expert": ("expert",)}
    needed = parts.get(train.rpartition("+")[2], ())
    for name in needed:
        if not hasattr(policy, name):
            raise ValueError(f"train is {train}: the policy has no {name}; expected --train all or lora")
    if train.endswith("last-k") and last_k > len(policy.blocks):
        raise ValueError(f"last_k is {last_k}; expected 1 to {len(policy.blocks)}, the policy's blocks")
    if train.endswith("last-k") and task_adapters:
        raise ValueError(
            "the blocks that lora+last-k trains are in the tasks' adapters too, and no adapter holds both;"
            " expected --train lora or lora+head above adapters of tasks"
        )
    for parameter in policy.parameters():
        parameter.requires_grad = train == "all"
    names = {folder: f"task_{i}" for i, folder in enumerate(dict.fromkeys(task_adapters.values()))}
    in_full = {name: _load_adapter(policy, folder, name) for folder, name in names.items()}
    for folder, name in names.items():
        if in_full[name] and train != "lora":
            raise ValueError(
                f"{str(folder)!r} has its own {next(iter(in_full[name]))}; expected --train lora above it,"
                f" got {train}"
            )
    if train.startswith("lora"):
        import peft  # takes seconds, so only where it is used

        config = peft.LoraConfig(
            r=rank,
            lora_alpha=min(rank, 16),
            lora_dropout=0.0,
            target_modules=_lora_targets(policy),
            init_lora_weights="gaussian",
        )
        _inject(config, policy, "default")
    extra: list[nn.Module] = []
    if train.endswith("head"):
        extra += [policy.head]
    if train.endswith("last-k"):
        extra += [*policy.blocks[-last_k:], policy.head]
    if extra and hasattr(policy, "norm"):
        extra.append(policy.norm)
    if train == "expert":
        extra += policy.expert
    if getattr(policy, "noise_head", None) is not None:  # which is new, and of no use untrained
        extra.append(policy.noise_head)
    for module in extra:
        for parameter in module.parameters():
            parameter.requires_grad = True
    if train.startswith("lora") and extra:  # for ``save_adapter``; peft, told before, would copy the modules
        policy.peft_config["default"].modules_to_save = [
            name for name, module in policy.named_modules() if any(module is one for one in extra)
        ]
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if train == "all" and getattr(policy, "large", False):
        distributed.shard(policy)
    if task_adapters:
        by_text = {text: names[folder] for text, folder in task_adapters.items()}
        return SharedAdapterPolicy(policy, by_text, in_full)
    return policy


def _lora_targets(policy: Any) -> str | list[str]:
    """The Linear layers that LoRA adapts: those that the policy names, else all."""
    if hasattr(policy, "lora_targets"):
        return policy.lora_targets
    names = [name for name, module in policy.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ValueError("the policy has no Linear layers for a LoRA adapter; expected --train all")
    return names


def _inject(config: Any, policy: Any, name: str) -> None:
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
        peft.inject_adapter_in_model(config, policy, name)


def _plain(name: str) -> str:
    """The name that a parameter or module has without LoRA."""
    return name.replace(".base_layer", "")


def _read_settings(folder: Path) -> Any:
    """The settings of a saved LoRA adapter.

    Raises:
        ValueError: When there are none, or when they ask for more than plain LoRA, which is all that this
            package computes and merges.
    """
    import peft

    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"it has no {file.name}; expected the folder of one{_adapter_in(folder)}")
    kind = read_json(file).get("peft_type")  # peft would read a file of any size, or ask the hub for one
    if kind != "LORA":
        raise ValueError(f"its peft_type is {in_short(kind)}; expected 'LORA'")
    config, usual = peft.LoraConfig.from_pretrained(str(folder)), peft.LoraConfig()
    for name in sorted(usual.to_dict().keys() - KNOWN_SETTINGS):
        value, plain = getattr(config, name), getattr(usual, name)
        if value != plain:
            raise ValueError(f"its {name} is {in_short(value)}; expected {plain!r}, as plain LoRA has it")
    if config.init_lora_weights not in (True, False, "gaussian"):  # others change the policy's own weights
        raise ValueError(
            f"its init_lora_weights is {in_short(config.init_lora_weights)}; expected true, false or gaussian"
        )
    for rank in (config.r, *config.rank_pattern.values()):
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MOST_RANK:
            raise ValueError(f"its rank is {in_short(rank)}; expected an int from 1 to {MOST_RANK}")
    for alpha in (config.lora_alpha, *config.alpha_pattern.values()):
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
            raise ValueError(f"its lora_alpha is {in_short(alpha)}; expected a finite number above 0")
    return config


def _adapter_in(folder: Path) -> str:
    """``"; did you mean 'x'?"`` for an adapter in a run's folder or its checkpoints, or nothing."""
    found = sorted(folder.glob("*/adapter_config.json")) or sorted(
        folder.glob("checkpoints/*/adapter_config.json")
    )
    return f"; did you mean {str(found[0].parent)!r}?" if found else ""


def _load_adapter(policy: Any, folder: Path, name: str) -> dict[str, Tensor]:
    """Put a saved LoRA adapter into ``policy`` under ``name``, frozen and therefore without dropout.

    Returns:
        The weights of modules that were trained in full beside it, by their names in the plain policy. They
        are not in the policy yet, because the adapters of other tasks may have their own.

    Raises:
        ValueError: When the folder holds no adapter, or that of another policy.
    """
    import peft

    try:
        config = _read_settings(folder)
        in_full, config.modules_to_save = config.modules_to_save or [], None
        config.lora_dropout = 0.0
        config.init_lora_weights = (
            config.init_lora_weights or True
        )  # an adapter that does nothing, where the file has none
        weights = {_plain(key): p for key, p in policy.named_parameters() if ".lora_" not in key}
        modules = {_plain(key) for key, _ in policy.named_modules()}
        inside = tuple(f"{key}." for key in modules if key.endswith(tuple(in_full)))  # as peft finds them
        _inject(config, policy, name)
        fresh = peft.get_peft_model_state_dict(policy, adapter_name=name, save_embedding_layers=False)
        expected = {key: value for key, value in fresh.items() if not key.startswith(inside)}
        expected |= {key: p for key, p in weights.items() if key.startswith(inside)}
        prefix, file = "base_model.model.", folder / "adapter_model.safetensors"
        found = read_tensors(file, {prefix + key: value for key, value in expected.items()})
        broken = [key for key, value in found.items() if not torch.isfinite(value).all()]
        if broken:
            raise ValueError(f"it has numbers that are not finite in {broken[0]}")
        tensors = {key.removeprefix(prefix): value for key, value in found.items()}
        peft.set_peft_model_state_dict(policy, fresh | {k: v for k, v in tensors.items() if k in fresh}, name)
        return {key: value.to(weights[key]) for key, value in tensors.items() if key not in fresh}
    except Exception as error:  # peft, JSON, safetensors and shapes each fail in their own way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{str(folder)!r} is not an adapter of this policy: {reason}") from error


class SharedAdapterPolicy(nn.Module):
    """A policy with a frozen adapter for each task and, above these, one that is trained on all of them.

    A batch of several tasks is computed task by task. Layers that recompute their activations going backward
    do so with the adapters of the forward pass (``contexts``, as torch's ``checkpoint`` asks for).

    Args:
        policy: With the tasks' adapters and the trained one, "default".
        names: The name of each instruction's adapter.
        in_full: For each adapter, the weights that it has in place of the policy's, by their plain names.
    """

    def __init__(self, policy: Any, names: dict[str, str], in_full: dict[str, dict[str, Tensor]]) -> None:
        super().__init__()
        self.policy, self.names, self.above = policy, names, ["default"]
        self.own = {
            name: {key: nn.Parameter(value, requires_grad=False) for key, value in weights.items()}
            for name, weights in in_full.items()
        }
        differing = set().union(*self.own.values())
        places = {key: p for key, p in policy.named_parameters() if _plain(key) in differing}
        self.places = {_plain(key): key.rpartition(".") for key in places}
        self.common = {_plain(key): p for key, p in places.items()}
        self.working: list[str] = []
        self.activate(next(iter(names.values())))
        for module in policy.modules():
            if hasattr(module, "contexts"):
                module.contexts = self._contexts

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("policy"), name)

    def activate(self, name: str) -> None:
        """Switch to the task adapter ``name`` and, unless it is switched off, the trained one above it."""
        self._let_work([name, *self.above])

    def _let_work(self, adapters: list[str]) -> None:
        if adapters == self.working:
            return
        self.working = adapters
        for key, parameter in (self.common | self.own[adapters[0]]).items():
            module, _, leaf = self.places[key]
            # Replaced, not overwritten: what autograd has saved must stay as it was.
            setattr(self.policy.get_submodule(module), leaf, parameter)
        for _, layer in _lora_layers(self.policy):
            layer.set_adapter(adapters)  # type: ignore[operator]
        for key, parameter in self.policy.named_parameters():
            if ".lora_" in key:
                parameter.requires_grad = key.rsplit(".", 2)[1] == "default"

    def _contexts(self) -> tuple[Any, Any]:
        @contextlib.contextmanager
        def again(adapters: list[str]) -> Iterator[None]:
            self._let_work(adapters)
            yield

        return contextlib.nullcontext(), again(self.working)

    def _by_task(self, instructions: list[str], ask: Any) -> tuple[Any, ...]:
        order: list[int] = []
        parts = []
        for name in dict.fromkeys(self.names[text] for text in instructions):
            inds = [i for i, text in enumerate(instructions) if self.names[text] == name]
            self.activate(name)
            parts.append(ask(inds, [instructions[i] for i in inds]))
            order += inds
        back = np.argsort(order)
        return tuple(
            (torch.cat(column) if isinstance(column[0], Tensor) else np.concatenate(column))[back]
            for column in zip(*parts)
        )

    def sample(
        self,
        obs: dict[str, Any],
        instructions: list[str],
        temperature: float = 1.0,
        generators: list[torch.Generator] | None = None,
    ) -> Any:
        """As the policy's."""
        return self._by_task(
            instructions,
            lambda inds, texts: self.policy.sample(
                {name: array[inds] for name, array in obs.items()},
                texts,
                temperature,
                generators and [generators[i] for i in inds],
            ),
        )

    def score(
        self, obs: dict[str, Any], instructions: list[str], tokens: Tensor, temperature: float = 1.0
    ) -> Any:
        """As the policy's."""
        return self._by_task(
            instructions,
            lambda inds, texts: self.policy.score(
                {name: array[inds] for name, array in obs.items()}, texts, tokens[inds], temperature
            ),
        )

    def imitation_loss(
        self, obs: dict[str, Any], instructions: list[str], actions: Tensor, generators: Any = None
    ) -> Tensor:
        """As the policy's."""

        def ask(inds: list[int], texts: list[str]) -> tuple[Tensor]:
            loss = self.policy.imitation_loss(
                {name: array[inds] for name, array in obs.items()},
                texts,
                actions[inds],
                generators and [generators[i] for i in inds],
            )
            return (loss.expand(len(inds)),)

        (losses,) = self._by_task(instructions, ask)  # (B,)
        return losses.mean()


def _lora_layers(policy: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in policy.named_modules() if hasattr(module, "lora_A")]


@contextlib.contextmanager
def adapter_off(policy: nn.Module) -> Iterator[None]:
    """Switch the trained LoRA adapter off, which leaves the reference policy of a KL term."""
    if isinstance(policy, SharedAdapterPolicy):
        policy.above = []
        try:
            yield
        finally:
            policy.above = ["default"]
        return
    layers: list[Any] = [module for _, module in _lora_layers(policy)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(policy: Any, inside: tuple[str, ...] = ("",), copy: bool = True) -> dict[str, Tensor]:
    """The policy's weights, on the CPU, with its LoRA adapter added in and named as in the plain policy.

    Only weights whose names begin with one of ``inside`` are returned. Without ``copy`` they are the policy's
    own where it is on the CPU and nothing is added, which saves memory.
    """
    policy = policy.policy if isinstance(policy, SharedAdapterPolicy) else policy
    layers: dict[str, Any] = dict(_lora_layers(policy))
    weights: dict[str, Tensor] = {}
    spread = distributed.is_spread(policy)  # state_dict would return only this process's shares
    for name, value in (dict(policy.named_parameters()) if spread else policy.state_dict()).items():
        if "lora_" in name:
            continue
        plain = _plain(name)
        if not plain.startswith(inside):
            continue
        layer = layers.get(plain.rpartition(".")[0])
        if layer is not None and plain.endswith("weight"):  # not every adapter has every layer
            active = [adapter for adapter in layer.active_adapters if adapter in layer.scaling]
            value = value + sum(layer.get_delta_weight(adapter) for adapter in active)
        weights[plain] = value.detach().to("cpu", copy=copy)
    return weights


def save_adapter(policy: Any, folder: Path) -> None:
    """Write the LoRA adapter in peft's own format, readable by ``PeftModel.from_pretrained``.

    Modules that were trained in full are in the file too, as peft's ``modules_to_save``. They have no LoRA
    there, so the LoRA of trained blocks is added into their weights. It is written whole or not at all.
    """
    import peft
    from peft.utils.constants import DUMMY_TARGET_MODULES

    policy = policy.policy if isinstance(policy, SharedAdapterPolicy) else policy
    config = copy.copy(policy.peft_config["default"])
    tensors = peft.get_peft_model_state_dict(policy)
    if config.modules_to_save:
        inside = tuple(f"{name}." for name in config.modules_to_save)
        tensors = {name: value for name, value in tensors.items() if not name.startswith(inside)}
        if not tensors:  # every block was trained in full
            config.target_modules = DUMMY_TARGET_MODULES
        tensors |= merged(policy, inside)
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(partial))
    named = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(named, partial / "adapter_model.safetensors")
    replace_folder(partial, folder)


def trainable_state(policy: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name."""
    return {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An Adam optimiser's state as tensors named by a parameter's number and a moment: ``3.exp_avg``."""
    return {
        f"{i}.{key}": value
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def possible_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors, without values, like those of ``optimizer_state`` once every parameter has been trained."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{i}.{key}": torch.empty(() if key == "step" else p.shape, device="meta")
        for i, p in enumerate(parameters)
        for key in ("step", "exp_avg", "exp_avg_sq")
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give ``optimizer`` the state that ``optimizer_state`` returned."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        like = None if key == "step" else parameters[int(number)]
        state.setdefault(int(number), {})[key] = distributed.share_of(value, like)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
