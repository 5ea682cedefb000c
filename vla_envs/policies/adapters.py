"""What is trained of a policy: a LoRA adapter (by peft), the head, the last blocks, or everything."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from vla_envs.tasks import nearest

TRAINABLE_SETS = ("lora", "head", "lora+head", "lora+last-k", "all")


def make_trainable(policy: Any, train: str, rank: int = 32, last_k: int = 1) -> Any:
    """Freeze all of ``policy`` but what ``train`` names; adds a LoRA adapter where it is asked for.

    What is trained is float32, whatever the rest is: bfloat16 would round small steps away.

    Args:
        policy: A policy with ``blocks``, ``norm``, ``head`` and ``lora_targets``.
        train: One of ``TRAINABLE_SETS``.
        rank: LoRA's r; alpha is ``min(rank, 16)`` and dropout 0, as OpenVLA has them.
        last_k: Blocks trained in full by ``lora+last-k``.

    Raises:
        ValueError: When there is no such set.
    """
    if train not in TRAINABLE_SETS:
        hint = nearest(train, list(TRAINABLE_SETS))
        raise ValueError(f"train {train!r} is unknown; expected one of {', '.join(TRAINABLE_SETS)}{hint}")
    for parameter in policy.parameters():
        parameter.requires_grad = train == "all"
    if train.startswith("lora"):
        import peft  # takes seconds, so only where it is used

        config = peft.LoraConfig(
            r=rank,
            lora_alpha=min(rank, 16),
            lora_dropout=0.0,
            target_modules=policy.lora_targets,
            init_lora_weights="gaussian",
        )
        peft.inject_adapter_in_model(config, policy)
    extra: list[nn.Module] = []
    if train.endswith("head"):
        extra += [policy.head, policy.norm]
    if train.endswith("last-k"):
        extra += [*policy.blocks[-last_k:], policy.head, policy.norm]
    for module in extra:
        for parameter in module.parameters():
            parameter.requires_grad = True
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return policy


def _lora_layers(policy: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in policy.named_modules() if hasattr(module, "lora_A")]


@contextlib.contextmanager
def adapter_off(policy: nn.Module) -> Iterator[None]:
    """The policy without its LoRA adapter: the reference of a KL term."""
    layers: list[Any] = [module for _, module in _lora_layers(policy)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(policy: Any) -> dict[str, Tensor]:
    """The policy's weights (on the CPU) with its LoRA adapter added in, named as in the plain policy."""
    layers: dict[str, Any] = dict(_lora_layers(policy))
    weights: dict[str, Tensor] = {}
    for name, value in policy.state_dict().items():
        if "lora_" in name:
            continue
        plain = name.replace(".base_layer", "")
        layer = layers.get(plain.rpartition(".")[0])
        if layer is not None and plain.endswith("weight"):
            value = value + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        weights[plain] = value.detach().to("cpu", copy=True)
    return weights


def save_adapter(policy: Any, folder: Path) -> None:
    """Write the LoRA adapter in peft's own format, readable by ``PeftModel.from_pretrained``."""
    import peft

    config = policy.peft_config["default"]
    tensors = peft.get_peft_model_state_dict(policy)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    named = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(named, folder / "adapter_model.safetensors")


def trainable_state(policy: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name."""
    return {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An Adam optimiser's state as named tensors: number of the parameter, name of the moment."""
    return {
        f"{i}.{key}": value
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The reverse of ``optimizer_state``."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
