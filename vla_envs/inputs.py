"""What callers pass, as arrays; what does not fit raises one line that has the nearest valid name."""

import difflib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def in_short(value: Any) -> str:
    """The ``repr`` of a value on one line of at most 200 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # integers with thousands of digits, or classes with mistakes
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:95]} ... {text[-95:]}"


def as_array(value: Any, name: str, expected: str) -> NDArray[Any]:
    """``value`` as an array of any kind.

    Raises:
        ValueError: When it cannot be one, for instance because its lists differ in length.
    """
    try:
        return np.asarray(value)
    except Exception as error:  # NumPy, or a library whose arrays are on a GPU
        words = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} {in_short(value)}; expected {expected} ({words})") from None


def as_numbers(value: Any, name: str, expected: str) -> NDArray[np.float64]:
    """``value`` as an array of real numbers.

    Raises:
        ValueError: When it has anything else: text, None, complex numbers, lists of different lengths.
    """
    array = as_array(value, name, expected)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} {in_short(value)}; expected {expected}")
    return array.astype(np.float64)


def nearest(name: str, valid: list[str]) -> str:
    """``"; did you mean 'x'?"`` with the valid name nearest to ``name``, or ``""``; ignores case."""
    lower = {each.lower(): each for each in valid}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.4)
    return f"; did you mean {lower[close[0]]!r}?" if close else ""
