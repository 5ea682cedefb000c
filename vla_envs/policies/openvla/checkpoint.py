"""Where a checkpoint comes from, a folder or the Hugging Face hub, and how its weights are read."""

import contextlib
from itertools import filterfalse
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE as INDEX
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as SINGLE

from vla_envs.files import read_json
from vla_envs.inputs import in_short
from vla_envs.policies import instead
from vla_envs.policies.tensors import check_claim


def fetch(checkpoint: str | Path, *patterns: str) -> Path:
    """The folder of a checkpoint; of a repository on the hub, the files that fit ``patterns`` are downloaded.

    Raises:
        ValueError: When it is neither a folder nor a repository, or the download fails.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        weights = SINGLE if (folder / SINGLE).is_file() else INDEX
        missing = [name for name in ("config.json", weights) if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"it has no {' and no '.join(missing)}{instead(folder)}")
        return folder
    try:
        return Path(snapshot_download(str(checkpoint), allow_patterns=list(patterns)))
    except Exception as error:  # the hub's errors are of many kinds, and long
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"it is not a folder, and cannot be downloaded: {type(error).__name__}: {reason}"
        ) from None


def make_room(name: str, parameters: int, dtype: torch.dtype, device: torch.device) -> None:
    """Say how much memory the weights take.

    Raises:
        ValueError: When a GPU has less than that free.
    """
    gib = parameters * dtype.itemsize / 2**30
    needed = f"{name}: {parameters / 1e9:.2f} G parameters in {str(dtype)[6:]} take {gib:.1f} GiB"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] / 2**30
        if free < gib:
            raise ValueError(f"{needed}; {device} has {free:.1f} GiB free")
        needed += f" of {free:.1f} GiB free"
    print(f"{needed} on {device}")


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
