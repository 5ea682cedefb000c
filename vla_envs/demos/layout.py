"""What a demonstration is, and which arrays are refused as one."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Episode = dict[str, NDArray[Any]]

MOST_BYTES = 2**31  # per part of a demonstration; at 256 pixels LIBERO's longest has 1e8 bytes of images


def validate_layout(where: str, parts: dict[str, Any], widths: dict[str, int | None]) -> None:
    """Refuse parts of a demonstration that differ in length T, or are not numbers of the expected kind.

    Args:
        where: Names the demonstration.
        parts: Arrays or HDF5 data sets, by name.
        widths: How many numbers each part has per control step; 0 allows any number, None is for images
            ``(T, H, H, 3)``.

    Raises:
        ValueError: Names the demonstration and the part.
    """
    lengths = {name: part.shape[0] for name, part in parts.items() if part.shape}
    length = lengths.get(next(iter(parts)))
    for name, part in parts.items():
        shape, width = part.shape, widths[name]
        if width is None:
            fits = part.dtype == np.uint8 and shape and shape[1:] == (*shape[1:2] * 2, 3) and shape[1]
            expected = "uint8 (T, H, H, 3)"
        else:
            fits = part.dtype.kind == "f" and shape and len(shape) == 2 and shape[1] == (width or shape[1])
            expected = f"floats (T, {width or 'any'})"
        if not fits:
            raise ValueError(f"{where}: {name} is {part.dtype} {shape}; expected {expected}")
        if part.dtype.itemsize * np.prod(shape, dtype=float) > MOST_BYTES:
            raise ValueError(f"{where}: {name} is {part.dtype} {shape}; expected at most {MOST_BYTES} bytes")
    if not length or set(lengths.values()) != {length}:
        raise ValueError(f"{where} has lengths {lengths}; expected the same length for all, at least 1")


def validate_values(where: str, parts: Episode) -> None:
    """Refuse numbers that are not finite in float32, and actions outside [-1, 1].

    Raises:
        ValueError: Names the demonstration and the number.
    """
    for name, part in parts.items():
        if part.dtype.kind == "f":
            action = "action" in name
            wrong = np.argwhere(~(np.abs(part) <= (1 + 1e-6 if action else np.finfo(np.float32).max)))
            if len(wrong):
                step, column = wrong[0]
                expected = "numbers from -1 to 1" if action else "finite numbers"
                raise ValueError(
                    f"{where}: {name}[{step}, {column}] is {part[step, column]:g}; expected {expected}"
                )
