"""Policies behind one interface, ``Policy``; made, saved and loaded here.

A checkpoint is a folder with ``config.json`` and ``model.safetensors`` (``openvla``: shards of it, as the hub
has them): numbers and JSON. OpenVLA-OFT's ``.pt`` files are read as tensors alone; no pickle is executed.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from vla_envs.files import read_json, replace_folder
from vla_envs.machine import torchvision_misfit
from vla_envs.policies.tensors import read_tensors

if "torchvision" not in sys.modules and torchvision_misfit():
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # hidden: nothing here uses it

from vla_envs.inputs import in_short, nearest
from vla_envs.policies.adapters import make_trainable, merged, trainable_state
from vla_envs.policies.flow import FlowConfig, FlowPolicy
from vla_envs.policies.nano import NanoConfig, NanoPolicy
from vla_envs.policies.protocol import Policy as Policy
from vla_envs.policies.protocol import is_own as is_own
from vla_envs.policies.protocol import make_own
from vla_envs.policies.server import ServerPolicy
from vla_envs.policies.server import is_server as is_server

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


#: Policies that start from a published checkpoint, each with one on the Hugging Face hub.
PUBLISHED = {
    "openvla": "openvla/openvla-7b-finetuned-libero-object",
    "openvla-oft": "openvla/openvla-7b-finetuned-libero-object",
    "smolvla": "HuggingFaceVLA/smolvla_libero",
    "pi0": "lerobot/pi0_libero_finetuned_v044",
}


def _published(name: str) -> Callable[[dict[str, Any]], nn.Module]:
    def refuse(config: dict[str, Any]) -> nn.Module:
        raise ValueError(
            f"policy {name!r} starts from a checkpoint; expected --checkpoint with a folder or a repository"
            f" of the Hugging Face hub, for instance {PUBLISHED[name]}"
        )

    return refuse


#: The policies, each with the function that builds it from a checkpoint's configuration.
POLICIES: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "nano": lambda config: NanoPolicy(NanoConfig(**config)),
    "flow": lambda config: FlowPolicy(FlowConfig(**config)),
    **{name: _published(name) for name in PUBLISHED},
}
#: Those whose checkpoints are in LeRobot's format.
LEROBOT = ("smolvla", "pi0")
#: What changes how a flow-matching policy draws and executes its actions.
SETTINGS = ("action_chunk", "denoising_steps", "noise", "noise_level")
#: The checkpoint that is shipped for each policy.
SHIPPED = {"nano": CHECKPOINTS / "nano_libero_object", "flow": CHECKPOINTS / "flow_libero_object"}


def _validate_name(name: str) -> None:
    if name not in POLICIES and not is_own(name):
        raise ValueError(
            f"policy {name!r} is unknown; expected one of {list(POLICIES)}, 'path/to/file.py:function' or, to"
            f" evaluate, 'ws://host:port'{nearest(name, list(POLICIES))}"
        )


def new_policy(name: str, config: dict[str, Any] | None = None) -> Any:
    """A policy as it is made: with random weights, or those that one's own function gives it.

    Args:
        name: One of ``POLICIES``, or ``path/to/file.py:function``.
        config: What its ``describe`` gave.

    Raises:
        ValueError: When there is no such policy, or one's own is not a ``Policy``.
    """
    _validate_name(name)
    policy: Any = make_own(name, config) if is_own(name) else POLICIES[name](config or {})
    policy.made_for = {}
    return policy


def _written_name(name: str) -> str:
    """The name of a policy in a checkpoint, which may lie elsewhere: a file without its folder."""
    return os.path.basename(name) if is_own(name) else name


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's arguments that change how a policy's actions are drawn, where they are given."""
    return {name: values[name] for name in SETTINGS if values.get(name) is not None}


def adjusted(policy: Any, name: str, settings: dict[str, Any]) -> Any:
    """``policy`` with the ``settings`` of its denoising.

    Raises:
        ValueError: When it has none of them, or one does not fit.
    """
    changes = {key: value for key, value in settings.items() if key != "action_chunk"}
    if changes and not isinstance(policy, FlowPolicy):
        raise ValueError(
            f"policy {name!r} has no {' and no '.join(changes)}; expected one that denoises:"
            f" {', '.join(['flow', *LEROBOT])}"
        )
    if changes:
        policy.config = dataclasses.replace(policy.config, **changes)
    return policy


def load_policy(
    name: str,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    cudagraphs: bool = False,
    suite: str | None = None,
    settings: dict[str, Any] | None = None,
) -> Any:
    """A policy with the weights of ``checkpoint``, or those shipped.

    Args:
        name: One of ``POLICIES``, ``path/to/file.py:function``, or ``ws://host:port``: a policy server.
        checkpoint: Folder with ``config.json`` and ``model.safetensors``; ``openvla``: a folder in the
            published format, or a repository of the Hugging Face hub; or the state of a run that goes on,
            ``RUN/checkpoints/latest``.
        device: Where its parameters go; on ``"meta"`` the checkpoint is checked and nothing kept.
        cudagraphs: Whether rollouts of ``openvla`` on a GPU replay CUDA graphs, one per token.
        suite: LIBERO suite that it is going to play; of an ``openvla`` with action statistics of several it
            decides.
        settings: Of flow matching, those of ``SETTINGS`` that differ from the checkpoint's.

    Raises:
        ValueError: When the policy or the checkpoint does not exist, or the checkpoint does not fit.
        OSError: When a policy server does not answer.
    """
    if is_server(name):
        return _connect(name, checkpoint, device)
    _validate_name(name)
    if is_training_state(checkpoint):
        return _load_state(name, Path(str(checkpoint)), device, suite)
    if checkpoint is not None:
        _check_kind(name, Path(checkpoint))
    if name in LEROBOT:
        return _load_lerobot(name, checkpoint, device, settings or {})
    if name in ("openvla", "openvla-oft"):
        policy = _load_openvla(name, checkpoint, device, suite)
        policy.cudagraphs = cudagraphs
        return adjusted(policy, name, settings or {})
    if checkpoint is None and name not in SHIPPED:
        return to_device(adjusted(new_policy(name), name, settings or {}), device)
    folder = SHIPPED[name] if checkpoint is None else Path(checkpoint)
    if not folder.exists():
        there = [path.name for path in folder.parent.glob("*/")] if folder.parent.is_dir() else []
        hint = nearest(folder.name, there) or instead(folder.parent)
        raise ValueError(f"checkpoint {str(folder)!r} does not exist{hint}")
    missing = [file for file in ("config.json", "model.safetensors") if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"checkpoint {str(folder)!r} has no {' and no '.join(missing)}; expected a folder with both"
            f"{instead(folder)}"
        )
    with _one_reason(f"checkpoint {str(folder)!r} is not a checkpoint of {name!r}"):
        config = read_json(folder / "config.json")
        config.pop("policy")  # which has been checked
        made_for = _check_made_for(config.pop("made_for", None))
        # On "meta" nothing is made or read of a size that only one of the files claims.
        with torch.device("cpu" if is_own(name) else "meta"):
            policy = new_policy(name, config)
        tensors = read_tensors(folder / "model.safetensors", policy.state_dict())
        if not is_own(name):
            policy = new_policy(name, config)
        policy.load_state_dict(tensors)
        policy.made_for = made_for
    _check_finite(policy, folder)
    return to_device(adjusted(policy, name, settings or {}), device)


def _check_kind(name: str, checkpoint: Path) -> None:
    """Refuse a folder whose ``config.json`` is of another policy."""
    try:
        config = read_json(checkpoint / "config.json")
    except (OSError, ValueError):  # missing or damaged: its loader says so
        return
    kind = config.get("policy") or config.get("type") or config.get("model_type")
    same = kind == ("openvla" if name == "openvla-oft" else _written_name(name))
    if not same and (kind in POLICIES or name not in PUBLISHED):
        meant = f"; expected --policy {kind}" if kind in POLICIES else ""
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} is not a checkpoint of {name!r}: its config.json is of policy"
            f" {in_short(kind)}{meant}"
        )


@contextlib.contextmanager
def _one_reason(what: str) -> Iterator[None]:
    """Whatever goes wrong with a file becomes a ValueError of one line that begins with ``what``."""
    try:
        yield
    except Exception as error:  # JSON, safetensors, configuration and shapes each fail in their own way
        raise ValueError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _check_made_for(tasks: Any) -> dict[str, list[int]] | None:
    fits = tasks is None or (
        isinstance(tasks, dict)
        and all(isinstance(ids, list) and all(type(i) is int for i in ids) for ids in tasks.values())
    )
    if not fits:
        raise ValueError(f"its made_for is {in_short(tasks)}; expected the numbers of tasks by suite")
    return tasks


def is_training_state(checkpoint: Any) -> bool:
    """Whether a checkpoint is the state of a run, as ``RUN/checkpoints/latest`` is."""
    return checkpoint is not None and (Path(checkpoint) / "trained.safetensors").is_file()


def evaluated_only(name: str, checkpoint: str | Path | None) -> str:
    """What a policy is, in words, that can be evaluated and not trained; of any other ``""``.

    Raises:
        ValueError: When its checkpoint cannot be had.
    """
    if is_server(name):
        return f"policy {name!r} is a server"
    if name != "openvla-oft" or checkpoint is None or is_training_state(checkpoint):
        return ""
    from vla_envs.policies.published import parts_of

    with _one_reason(f"checkpoint {str(checkpoint)!r} of {name!r} cannot be loaded"):
        has_head = "action_head" in parts_of(checkpoint)
    return f"checkpoint {str(checkpoint)!r} is a regression without log-probabilities" if has_head else ""


def instead(folder: Path) -> str:
    """What may have been meant by ``folder``, which is not a whole policy: the end of a line, or nothing."""
    if (folder / "adapter_config.json").is_file():
        return (
            "; it is an adapter: --evaluate --train lora --task-ids K --shared-adapter"
            f" {folder} evaluates it, and takes one per task{instead(folder.parent)}"
        )
    for where in (folder, folder / "checkpoints"):
        found = [*where.glob("final"), *sorted(where.glob("final_task_*")), *where.glob("latest")]
        if found:
            return f"; did you mean {str(found[0])!r}?"
    return ""


def _load_state(name: str, folder: Path, device: str, suite: str | None) -> Any:
    """The policy of a training state: what its run started from, with what it has trained since."""
    with _one_reason(f"the state of a run in {str(folder)!r} cannot be loaded"):
        args = read_json(folder.parent.parent / "args.json")
        if _written_name(str(args.get("policy"))) != _written_name(name):
            raise ValueError(f"its run is of policy {in_short(args.get('policy'))}")
        if args.get("shared_adapter"):
            raise ValueError("its run trains above the adapters of tasks; expected final_task_K, of its end")
        train, settings = args["train"], settings_of(args)
        torch.manual_seed(args.get("seed", 1))  # of what a policy of one's own draws
        policy = load_policy(name, args.get("checkpoint"), device, suite=suite, settings=settings)
        trained = (
            policy if train == "all" else make_trainable(policy, train, args["lora_rank"], args["last_k"])
        )
        file = folder / "trained.safetensors"
        with safetensors.safe_open(str(file), "pt") as tensors:  # PPO's hold the critic too
            of_ppo = all(key.startswith(("policy.", "critic.")) for key in tensors.keys())
            prefix = "policy." if of_ppo else ""
        weights = read_tensors(file, trainable_state(trained), prefix=prefix)
        file = folder / "buffers.safetensors"  # runs of earlier versions have none
        if file.is_file():
            weights |= read_tensors(file, dict(trained.named_buffers()), prefix=prefix)
        if device != "meta":
            trained.load_state_dict(weights, strict=False)
            if train.startswith("lora"):
                weights = merged(trained)
                torch.manual_seed(args.get("seed", 1))
                policy = load_policy(name, args.get("checkpoint"), device, suite=suite, settings=settings)
                policy.load_state_dict(weights)
        note_tasks(policy, args["suite"], args["task_ids"])
    if device != "meta":
        _check_finite(policy, folder)
    return policy


def _connect(name: str, checkpoint: str | Path | None, device: str) -> ServerPolicy:
    if checkpoint is not None:
        raise ValueError(
            f"checkpoint is {str(checkpoint)!r} with policy {name!r}; expected none: a server plays what it"
            " was started with"
        )
    policy = ServerPolicy(name)
    if device == "meta":
        policy.close()
    return policy


def _load_openvla(name: str, checkpoint: str | Path | None, device: str, suite: str | None) -> Any:
    if checkpoint is None:
        return new_policy(name)
    from vla_envs.policies.openvla import policy_class  # takes seconds, so only where it is used

    with _one_reason(f"checkpoint {str(checkpoint)!r} of {name!r} cannot be loaded"):
        kind = policy_class(checkpoint)
        policy = kind.load(checkpoint, name == "openvla-oft", device=device, suite=suite)
    if device != "meta":
        _check_finite(policy, checkpoint)
    return policy


def _load_lerobot(name: str, checkpoint: str | Path | None, device: str, settings: dict[str, Any]) -> Any:
    if checkpoint is None:
        return new_policy(name)
    from vla_envs.policies.lerobot.policy import FlowSettings, LeRobotPolicy

    FlowSettings(**settings)  # a mistake in a flag is not one of the checkpoint
    with _one_reason(f"checkpoint {str(checkpoint)!r} of {name!r} cannot be loaded"):
        policy = LeRobotPolicy.load(name, checkpoint, device, **settings)
        _check_made_for(policy.made_for)
    if device != "meta":
        _check_finite(policy, checkpoint)
    return policy


def _check_finite(policy: nn.Module, checkpoint: str | Path) -> None:
    broken = [name for name, p in policy.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        raise ValueError(f"checkpoint {str(checkpoint)!r} has numbers that are not finite in {broken[0]}")


def to_device(policy: Any, device: str) -> Any:
    """``policy`` with its parameters on ``device``.

    Raises:
        ValueError: When there is no such device.
    """
    check_device(device)
    return policy.to(device)


def check_device(device: str) -> None:
    """Refuse a device that torch does not know, or cannot use here.

    Raises:
        ValueError: Says which, and why.
    """
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; expected cpu, cuda, cuda:0, ...") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} cannot be used; expected another, such as cpu: {' '.join(str(error).split())}"
        ) from None


def save_policy(policy: Any, name: str, folder: Path) -> None:
    """Write ``policy``, its adapter added in, as a checkpoint, whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    plain = is_own(name) or not hasattr(policy, "save")  # and copied: safetensors refuses tied weights
    tensors = {key: value.contiguous() for key, value in merged(policy, copy=plain).items()}
    if plain:
        made_for = {"made_for": policy.made_for} if policy.made_for else {}
        described = policy.describe() if hasattr(policy, "describe") else {}
        config = json.dumps({"policy": _written_name(name), **made_for, **described}, indent=2)
        (partial / "config.json").write_text(config + "\n")
        safetensors.torch.save_file(tensors, partial / "model.safetensors")
    else:
        policy.save(tensors, partial)
    replace_folder(partial, folder)


def note_tasks(policy: Any, suite: str, task_ids: Iterable[int]) -> None:
    """Add tasks to those that ``policy`` was made for, where these are known: its checkpoint names them."""
    known = getattr(policy, "made_for", None)
    if known is not None:
        policy.made_for = known | {suite: sorted({*known.get(suite, []), *task_ids})}


def count_parameters(policy: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters."""
    counts = [(p.numel() if p.requires_grad else 0, p.numel()) for p in policy.parameters()]
    return sum(c[0] for c in counts), sum(c[1] for c in counts)
