"""What is trained of a policy: a LoRA adapter (by peft), the head, the last blocks, or everything."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from vla_envs import distributed
from vla_envs.tasks import nearest

TRAINABLE_SETS = ("lora", "head", "lora+head", "lora+last-k", "all")
MOST_RANK = 4096  # of an adapter that is read


def make_trainable(
    policy: Any, train: str, rank: int = 32, last_k: int = 1, below: dict[str, Path] | None = None
) -> Any:
    """Freeze all of ``policy`` but what ``train`` names; adds a LoRA adapter where it is asked for.

    What is trained is float32, whatever the rest is: bfloat16 would round small steps away. With ``all`` a
    ``large`` policy is spread over the processes that there are.

    Args:
        policy: A policy with ``blocks``, ``norm``, ``head`` and ``lora_targets``.
        train: One of ``TRAINABLE_SETS``.
        rank: LoRA's r; alpha is ``min(rank, 16)`` and dropout 0, as OpenVLA has them.
        last_k: Blocks trained in full by ``lora+last-k``.
        below: For each instruction the folder of its task's adapter: they stay as they are, below the new one
            that all tasks share (``Stacked``).

    Raises:
        ValueError: When there is no such set, there are fewer blocks, or an adapter does not fit.
    """
    if train not in TRAINABLE_SETS:
        hint = nearest(train, list(TRAINABLE_SETS))
        raise ValueError(f"train {train!r} is unknown; expected one of {', '.join(TRAINABLE_SETS)}{hint}")
    if train.endswith("last-k") and last_k > len(policy.blocks):
        raise ValueError(f"last_k is {last_k}; expected 1 to {len(policy.blocks)}, the policy's blocks")
    for parameter in policy.parameters():
        parameter.requires_grad = train == "all"
    names = {folder: f"task_{i}" for i, folder in enumerate(dict.fromkeys((below or {}).values()))}
    for folder, name in names.items():
        _load_adapter(policy, folder, name)
    if train.startswith("lora"):
        import peft  # takes seconds, so only where it is used

        config = peft.LoraConfig(
            r=rank,
            lora_alpha=min(rank, 16),
            lora_dropout=0.0,
            target_modules=policy.lora_targets,
            init_lora_weights="gaussian",
        )
        _inject(config, policy, "default")
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
    if train == "all" and getattr(policy, "large", False):
        distributed.shard(policy)
    return Stacked(policy, {text: names[folder] for text, folder in below.items()}) if below else policy


def _inject(config: Any, policy: Any, name: str) -> None:
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
        peft.inject_adapter_in_model(config, policy, name)


def _load_adapter(policy: Any, folder: Path, name: str) -> None:
    """Put a saved LoRA adapter into ``policy`` under ``name``.

    Raises:
        ValueError: When the folder holds none, or one of another policy.
    """
    import peft

    from vla_envs.policies import read_tensors

    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        if not isinstance(config.r, int) or not 1 <= config.r <= MOST_RANK:
            raise ValueError(f"its rank is {config.r!r}; expected an int from 1 to {MOST_RANK}")
        _inject(config, policy, name)
        prefix, fresh = "base_model.model.", peft.get_peft_model_state_dict(policy, adapter_name=name)
        tensors = read_tensors(
            folder / "adapter_model.safetensors", {prefix + key: value for key, value in fresh.items()}
        )
        peft.set_peft_model_state_dict(
            policy, {key.removeprefix(prefix): value for key, value in tensors.items()}, name
        )
    except Exception as error:  # peft, JSON, safetensors and shapes each fail in their own way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{str(folder)!r} is no adapter of this policy: {reason}") from error


class Stacked(nn.Module):
    """A policy with a frozen adapter for each task, and above these one that is trained on all of them.

    What it is asked of several tasks at once is answered task by task. Layers that compute their activations
    again going backward do so with the adapters of then (``contexts``, as torch's ``checkpoint`` asks for).

    Args:
        policy: With the tasks' adapters and the trained one, "default".
        names: The adapter of each instruction.
    """

    def __init__(self, policy: Any, names: dict[str, str]) -> None:
        super().__init__()
        self.policy, self.names, self.above = policy, names, ["default"]
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
        """Let the task adapter ``name`` and, unless it is switched off, the trained one work."""
        self._let_work([name, *self.above])

    def _let_work(self, adapters: list[str]) -> None:
        if adapters == self.working:
            return
        self.working = adapters
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

    def evaluate(
        self, obs: dict[str, Any], instructions: list[str], tokens: Tensor, temperature: float = 1.0
    ) -> Any:
        """As the policy's."""
        return self._by_task(
            instructions,
            lambda inds, texts: self.policy.evaluate(
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
    """The policy without the LoRA adapter that is trained: the reference of a KL term."""
    if isinstance(policy, Stacked):
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


def merged(policy: Any) -> dict[str, Tensor]:
    """The policy's weights (on the CPU) with its LoRA adapter added in, named as in the plain policy."""
    policy = policy.policy if isinstance(policy, Stacked) else policy
    layers: dict[str, Any] = dict(_lora_layers(policy))
    weights: dict[str, Tensor] = {}
    spread = distributed.is_spread(policy)  # state_dict would give its parameters back, and then only shares
    for name, value in (dict(policy.named_parameters()) if spread else policy.state_dict()).items():
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

    policy = policy.policy if isinstance(policy, Stacked) else policy
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


def possible_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors like those of ``optimizer_state`` when every parameter has been trained."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{i}.{key}": torch.empty(() if key == "step" else p.shape, device="meta")
        for i, p in enumerate(parameters)
        for key in ("step", "exp_avg", "exp_avg_sq")
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The reverse of ``optimizer_state``."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        like = None if key == "step" else parameters[int(number)]
        state.setdefault(int(number), {})[key] = distributed.share_of(value, like)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
