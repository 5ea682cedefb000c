"""What a run starts from and what it writes: the starting policy, the trained one, its state."""

import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vla_envs import distributed, policies
from vla_envs.command_line import one_line_errors
from vla_envs.files import read_json, replace_folder, write_json
from vla_envs.policies import adapters, is_training_state, load_policy, note_tasks, save_policy, to_device
from vla_envs.policies.tensors import read_tensors
from vla_envs.tasks import get_task


def new_policy(args: Any) -> Any:
    """A policy with random weights.

    Raises:
        ValueError: When there is no such policy, or none that starts so.
    """
    torch.manual_seed(args.seed)
    policy = policies.new_policy(args.policy)
    return to_device(policies.adjusted(policy, args.policy, policies.settings_of(vars(args))), args.device)


def starting_policy(args: Any) -> Any:
    """The policy that ``args`` start from, or evaluate.

    Raises:
        ValueError: When there is none, or it cannot be trained.
    """
    if not args.evaluate and is_training_state(args.checkpoint):
        raise ValueError(
            f"checkpoint {str(args.checkpoint)!r} is the state of a run, which changes while that goes on;"
            f" expected it with --evaluate, or --resume {args.checkpoint.parent.parent}"
        )
    torch.manual_seed(args.seed)  # of what a policy of one's own draws
    return load(args, args.checkpoint)


def load(args: Any, checkpoint: Path | None) -> Any:
    """The policy of a checkpoint, or the shipped one, as ``args`` run it.

    Raises:
        ValueError: See ``policies.load_policy``.
    """
    settings = policies.settings_of(vars(args))
    return load_policy(args.policy, checkpoint, args.device, args.cudagraphs, args.suite, settings)


def remark(args: Any, policy: Any) -> str:
    """A line that says when ``policy`` plays other tasks than its checkpoint was made for, else ``""``."""
    known = getattr(policy, "made_for", None) or {}
    others = [task_id for task_id in args.task_ids if task_id not in known.get(args.suite, [])]
    if not known or not others:
        return ""
    made_for = ", ".join(f"{suite} {' '.join(map(str, task_ids))}" for suite, task_ids in known.items())
    return (
        f"policy {args.policy!r}: its checkpoint was made for the tasks {made_for}, and not for"
        f" {args.suite} {' '.join(map(str, others))}"
    )


def prepare(policy: Any, args: Any) -> Any:
    """``policy`` with what ``--train`` says trainable: itself, or itself with a LoRA adapter.

    Raises:
        ValueError: When that does not fit the policy.
    """
    torch.manual_seed(args.seed)  # of a LoRA adapter's first weights
    return adapters.make_trainable(policy, args.train, args.lora_rank, args.last_k, _task_adapters(args))


def _task_adapters(args: Any) -> dict[str, Path]:
    """The folder of the adapter of each task's instruction, where ``--shared-adapter`` names them.

    Raises:
        ValueError: When they do not fit.
    """
    if not args.shared_adapter:
        return {}
    if len(args.shared_adapter) != len(args.task_ids) or not args.train.startswith("lora"):
        raise ValueError(
            f"shared_adapter names {len(args.shared_adapter)} adapters; expected one for each of the tasks"
            f" {args.task_ids}, and --train lora"
        )
    texts = [get_task(args.suite, task_id).instruction for task_id in args.task_ids]
    if len(set(texts)) < len(texts):
        raise ValueError(f"two of the tasks {args.task_ids} have the same instruction: adapters go by it")
    axes = {part.partition(":")[0].strip() for part in f"{args.perturb},{args.eval_perturb}".split(",")}
    if axes & {"all", "any", "instruction"}:
        raise ValueError(
            "shared_adapter goes by the tasks' own sentences; expected --perturb and --eval-perturb without"
            " the axis instruction"
        )
    return dict(zip(texts, args.shared_adapter))


@distributed.first_only
def save_policies(run: Path, policy: Any, args: Any) -> None:
    """Write ``checkpoints/final``, a whole policy, and ``checkpoints/adapter`` where there is an adapter.

    Several tasks with adapters below a shared one make a whole policy for each: ``final_task_4`` and so on.
    """
    note_tasks(policy, args.suite, args.task_ids)
    if args.train.startswith("lora"):
        adapters.save_adapter(policy, run / "checkpoints" / args.adapter)
    if not args.merge:
        return
    if not args.shared_adapter:
        return save_policy(policy, args.policy, run / "checkpoints" / "final")
    for task_id in args.task_ids:
        policy.activate(policy.names[get_task(args.suite, task_id).instruction])
        save_policy(policy, args.policy, run / "checkpoints" / f"final_task_{task_id}")


def save_training_state(
    folder: Path, policy: Any, optimizer: torch.optim.Optimizer, counters: dict[str, Any]
) -> None:
    """Write all that a resumed run needs, whole or not at all; the old one stays until the new one stands.

    All processes take part, the first writes. A state that cannot be written ends the program here.
    """
    state = sorted(adapters.optimizer_state(optimizer).items())  # in one order in all processes
    moments = {name: distributed.to_first(value) for name, value in state}
    distributed.from_first(_write_training_state, folder, policy, moments, counters)


def _write_training_state(
    folder: Path, policy: Any, moments: dict[str, Tensor], counters: dict[str, Any]
) -> None:
    partial = folder.with_name(folder.name + ".partial")
    with one_line_errors(f"the training state cannot be written, the last one in {folder} stays: "):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            tensors = {name: p.cpu().contiguous() for name, p in adapters.trainable_state(policy).items()}
            safetensors.torch.save_file(tensors, partial / "trained.safetensors")
            fixed = {name: b.to("cpu", copy=True) for name, b in policy.named_buffers()}
            safetensors.torch.save_file(fixed, partial / "buffers.safetensors")
            safetensors.torch.save_file(moments, partial / "optimizer.safetensors")
            write_json(partial / "counters.json", counters)
            replace_folder(partial, folder)
        except (OSError, safetensors.SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(str(error)) from None


def load_training_state(folder: Path, policy: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore what ``save_training_state`` wrote, from ``folder`` or its predecessor; the counters.

    Raises:
        ValueError: When there is no such state, or a file of it is damaged or of another policy; nothing is
            changed then.
    """
    if not folder.exists():
        folder = folder.with_name(folder.name + ".previous")
    if not (folder / "counters.json").is_file():
        raise ValueError(
            f"{str(folder.parent)!r} holds no training state; expected the folder of a run to resume"
        )
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    trained = read_tensors(folder / "trained.safetensors", parameters)
    moments = read_tensors(
        folder / "optimizer.safetensors", adapters.possible_optimizer_state(optimizer), partial=True
    )
    counters = read_json(folder / "counters.json")
    buffers = dict(policy.named_buffers())
    file = folder / "buffers.safetensors"  # runs of earlier versions have none
    fixed = read_tensors(file, buffers) if file.is_file() else {}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(distributed.share_of(trained[name], parameter))
        for name, buffer in fixed.items():
            buffers[name].copy_(buffer)
    adapters.load_optimizer_state(optimizer, moments)
    return counters
