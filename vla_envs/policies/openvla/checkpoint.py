"""How the weights of a checkpoint are read, shard by shard."""

import contextlib
from itertools import filterfalse
from pathlib import Path
from typing import Any

import safetensors
import torch

from vla_envs.files import read_json
from vla_envs.inputs import in_short
from vla_envs.policies.published import INDEX, SINGLE
from vla_envs.policies.tensors import check_claim


def _open_shard(file: Path) -> Any:
    try:
        return safetensors.safe_open(str(file), "pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} is damaged or missing: {' '.join(str(error).split())}") from None


def _files(folder: Path) -> list[str]:
    if (folder / SINGLE).is_file():
        return [SINGLE]
    index = read_json(folder / INDEX).get("weight_map")
    files = sorted(map(str, index.values())) if isinstance(index, dict) else []
    if not files or any(Path(file).name != file for file in files):
        raise ValueError(f"the weight_map in its {INDEX} is {in_short(index)}; expected each tensor's file")
    return files


@torch.no_grad()
def read_weights(model: Any, folder: Path) -> None:
    """Copy the tensors of ``folder`` into ``model``, an ``OpenVLAModel``, shard by shard.

    Raises:
        ValueError: When a tensor is missing, has another shape, or is not part of the network.
    """
    targets = dict(model.named_parameters())
    files = _files(folder)
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(_open_shard(folder / file)) for file in dict.fromkeys(files)]
        holders = {name: shard for shard in shards for name in shard.keys()}
        missing = sorted(targets.keys() - holders.keys())
        unknown = sorted(filterfalse(model.is_unused, holders.keys() - targets.keys()))
        if missing or unknown:
            raise ValueError(
                f"tensors that are missing: {missing[:3]}; that belong to nothing: {unknown[:3]}"
            )
        for name, target in targets.items():
            check_claim(name, holders[name].get_slice(name), target)
            target.copy_(holders[name].get_tensor(name))
