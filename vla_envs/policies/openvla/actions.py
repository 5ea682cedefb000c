"""Action tokens and the actions that they stand for, with the statistics of a suite's demonstrations."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla_envs.files import read_json
from vla_envs.inputs import as_numbers, in_short
from vla_envs.tasks import SUITES, base_suite

BINS = 256
ACTION_DIM, STATE_DIM = 7, 8
EDGES = np.linspace(-1.0, 1.0, BINS)  # of the bins: 255 lie between them, and one beyond each end
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2


def bin_values(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """The normalised values of action tokens 0 to 255, of any shape; lower tokens stand for higher values."""
    return CENTRES[np.clip(BINS - 1 - tokens, 0, BINS - 2)]


def value_bins(values: Tensor) -> Tensor:
    """The action tokens 0 to 255 of normalised values, of any shape."""
    edges = torch.from_numpy(EDGES).to(values.device)
    return BINS - torch.bucketize(values.double().clamp(-1.0, 1.0), edges, right=True)


Statistics = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]  # q01, q99, which are scaled


def action_statistics(folder: Path, suite: str | None = None) -> Statistics:
    """q01, q99 and mask (7,) of a suite's actions, or of the one suite that a checkpoint was trained on.

    Where a checkpoint has only those of another suite, they are used and a line is printed.

    Raises:
        ValueError: When there are no statistics, several to choose from, or not seven numbers each.
    """
    return _statistics(folder, suite, "action", [True] * (ACTION_DIM - 1) + [False])


def state_statistics(folder: Path, suite: str | None = None) -> Statistics:
    """The same (8,) of the robot's state, without a line.

    Raises:
        ValueError: See ``action_statistics``; eight numbers are expected.
    """
    return _statistics(folder, suite, "proprio", [True] * STATE_DIM)


def _statistics(folder: Path, suite: str | None, kind: str, usual: list[bool]) -> Statistics:
    """Those of ``kind``, with the mask ``usual`` unless they have one."""
    file = folder / "dataset_statistics.json"
    stored = read_json(file) if file.is_file() else {}
    if not stored:
        file = folder / "config.json"
        stored = read_json(file).get("norm_stats", {})
    if not isinstance(stored, dict):
        raise ValueError(f"the norm_stats in its {file.name} are {in_short(stored)}; expected an object")
    keys = [key for key in stored if key.startswith("libero")] if len(stored) > 1 else list(stored)
    liberos = SUITES.get(base_suite(suite or ""))  # its name there; none of a suite of one's own
    wanted = liberos or "one LIBERO suite"
    its = [key for key in keys if liberos and (key == liberos or key.startswith(f"{liberos}_"))]
    chosen = min(its, key=len) if its else keys[0] if len(keys) == 1 else None
    if chosen is None:
        raise ValueError(f"it has action statistics of {sorted(stored)}; expected {wanted}")
    if suite and not its and kind == "action":
        print(f"{folder}: {suite} is played with action statistics of {chosen}, the only ones that it has")
    dim, where = len(usual), f"{chosen} in its {file.name}"
    expected = f"{dim} finite numbers"
    found = stored[chosen].get(kind) if isinstance(stored[chosen], dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"the {kind} of {where} is {in_short(found)}; expected q01 and q99")
    bounds = []
    for name in ("q01", "q99"):
        numbers = as_numbers(found.get(name), f"{name} of {where} is", expected)
        if numbers.shape != (dim,) or not np.isfinite(numbers).all():
            raise ValueError(f"{name} of {where} is {in_short(found[name])}; expected {expected}")
        bounds.append(numbers)
    mask = found.get("mask", usual)
    if not (isinstance(mask, list) and len(mask) == dim and all(isinstance(on, bool) for on in mask)):
        raise ValueError(f"mask of {where} is {in_short(mask)}; expected {dim} truth values")
    if (bounds[0] > bounds[1])[mask].any():
        raise ValueError(
            f"q01 of {where} is {bounds[0].tolist()}; expected at most q99, {bounds[1].tolist()}"
        )
    return bounds[0], bounds[1], np.array(mask)
