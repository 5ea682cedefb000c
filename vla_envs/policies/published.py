"""Where a published checkpoint comes from, a folder or the Hugging Face hub, and the memory it takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE as INDEX
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as SINGLE
from huggingface_hub.utils import logging

from vla_envs.inputs import nearest
from vla_envs.policies import instead


def fetch(checkpoint: str | Path, *patterns: str) -> Path:
    """The folder of a checkpoint; of a repository on the hub, the files that fit ``patterns`` are downloaded.

    Raises:
        ValueError: When it is neither a folder nor a repository, or the download fails.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        files = ("config.json",), (SINGLE, INDEX)
        missing = [" or ".join(names) for names in files if not any((folder / n).is_file() for n in names)]
        if missing:
            raise ValueError(f"it has no {' and no '.join(missing)}{instead(folder)}")
        return folder
    if str(checkpoint).count("/") != 1 or folder.parent.is_dir():
        there = [path.name for path in folder.parent.glob("*/")]
        raise ValueError(f"there is no such folder{nearest(folder.name, there)}")
    try:
        return Path(from_hub(snapshot_download, str(checkpoint), allow_patterns=list(patterns)))
    except ValueError as error:
        raise ValueError(f"it is not a folder, and cannot be downloaded: {error}") from None


def from_hub(download: Callable[..., str], *args: Any, **kwargs: Any) -> str:
    """Where ``download``, one of ``huggingface_hub``'s functions, has put what it was asked for.

    Raises:
        ValueError: When that fails, in one line: the hub's errors are of many kinds, and long.
    """
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # or each of its tries prints a line
    try:
        return download(*args, **kwargs)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{type(error).__name__}: {reason}") from None
    finally:
        logging.set_verbosity(shown)


def parts_of(checkpoint: str | Path) -> dict[str, list[Path]]:
    """The files ``name--*_checkpoint.pt`` that OpenVLA-OFT keeps beside a network, by name; often none.

    Raises:
        ValueError: See ``fetch``.
    """
    parts: dict[str, list[Path]] = {}
    for file in sorted(fetch(checkpoint, "*.json", "*--*_checkpoint.pt").glob("*--*_checkpoint.pt")):
        parts.setdefault(file.name.partition("--")[0], []).append(file)
    return parts


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
