"""Tensors from safetensors files, whose claims are checked before anything is read."""

from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names


def check_claim(name: str, claim: Any, like: Tensor) -> None:
    """Compare what a safetensors file says of a tensor with what is expected.

    Raises:
        ValueError: When it has another shape, or no numbers of floating point, whatever their precision.
    """
    shape, wanted = tuple(claim.get_shape()), tuple(like.shape)
    if shape != wanted:
        raise ValueError(f"{name} has shape {shape}; expected {wanted}")
    if like.is_floating_point() and claim.get_dtype() not in FLOATS:
        raise ValueError(f"{name} is of {claim.get_dtype()}; expected one of {', '.join(FLOATS)}")


def read_tensors(
    path: Path, expected: dict[str, Tensor], partial: bool = False, prefix: str = ""
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, read once its header has the names and shapes of ``expected``.

    Args:
        path: The file.
        expected: Tensors like those to read; on ``"meta"`` they take no memory.
        partial: Whether some may be missing.
        prefix: With which the file has their names; those without it are others', and left alone.

    Raises:
        ValueError: When the file is damaged or holds others; names it.
    """
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            names = {key.removeprefix(prefix) for key in file.keys() if key.startswith(prefix)}
            missing, unknown = sorted(expected.keys() - names), sorted(names - expected.keys())
            if unknown or (missing and not partial):
                raise ValueError(
                    f"tensors that are missing: {missing[:3]}; that belong to nothing: {unknown[:3]}"
                )
            for name in sorted(names):
                check_claim(name, file.get_slice(prefix + name), expected[name])
            return {name: file.get_tensor(prefix + name) for name in sorted(names)}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged or does not fit: {' '.join(str(error).split())}"
        ) from None
