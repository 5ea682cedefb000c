"""What every script does around its algorithm: the command line, a run's folder, saving and resuming."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import tyro
from scipy.stats import binomtest
from torch import Tensor

from vla_envs.policies import replace_folder
from vla_envs.policies.adapters import load_optimizer_state, optimizer_state, trainable_state
from vla_envs.tasks import BUILTIN_SUITES, nearest

ArgsT = TypeVar("ArgsT")


def parse_args(args_type: type[ArgsT]) -> ArgsT:
    """Read the command line into a dataclass; a mistake is one line on stderr and exit status 2."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(args_type)
    except SystemExit as exit_:
        if exit_.code:
            words = re.sub(r"[^\x20-\x7e]+", " ", errors.getvalue())  # without the frame that tyro draws
            words = re.sub(r"-{4,}.*|For full helptext.*", "", words)
            print(f"error: {' '.join(words.split())}", file=sys.stderr)
        raise


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a script's set-up: a user's mistake ends the program with one line and exit status 2."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def check_numbers(args: Any, names: str, above: bool) -> None:
    """Refuse arguments that are not finite numbers above 0, or of at least 0.

    Raises:
        ValueError: Names the first that does not fit. None passes: it stands for a default.
    """
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not (0 < value < float("inf") or (value == 0 and not above)):
            raise ValueError(f"{name} is {value}; expected a number {'above' if above else 'of at least'} 0")


def check_suite(suite: str) -> None:
    """Refuse a suite that has no environment.

    Raises:
        ValueError: Names those that have one.
    """
    if suite not in BUILTIN_SUITES:
        known = list(BUILTIN_SUITES)
        raise ValueError(
            f"suite {suite!r} has no environment; expected one of {known}{nearest(suite, known)}"
        )


def success(successes: int, trials: int) -> dict[str, Any]:
    """A success rate with its Wilson interval (95 %), as ``result.json`` has it."""
    low, high = binomtest(successes, trials).proportion_ci(method="wilson")
    return {"successes": successes, "trials": trials, "rate": successes / trials, "low": low, "high": high}


def make_run_folder(run_dir: Path | None, suite: str, task_id: int, script: str, seed: int) -> Path:
    """The folder of a new run, ``runs/<suite>_<task id>__<script>__<seed>__<time>`` unless ``run_dir`` says.

    Raises:
        ValueError: When it holds a run already.
        OSError: When nothing can be written there.
    """
    name = f"{suite}_{task_id}__{script}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path("runs") / name if run_dir is None else run_dir
    if (folder / "args.json").exists():
        raise ValueError(
            f"run folder {str(folder)!r} holds a run already; expected a new folder, or --resume {folder}"
        )
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "videos").mkdir(exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"run folder {str(folder)!r} cannot be written: {error.strerror}; expected --run-dir elsewhere"
        ) from None
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n")
    os.replace(partial, path)


def save_training_state(
    folder: Path, policy: Any, optimizer: torch.optim.Optimizer, counters: dict[str, Any]
) -> None:
    """Write all that a resumed run needs, whole or not at all; the old one stays until the new one stands."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: value.cpu().contiguous() for name, value in trainable_state(policy).items()}
    safetensors.torch.save_file(tensors, partial / "trained.safetensors")
    moments = {name: value.detach().cpu().clone() for name, value in optimizer_state(optimizer).items()}
    safetensors.torch.save_file(moments, partial / "optimizer.safetensors")
    write_json(partial / "counters.json", counters)
    replace_folder(partial, folder)


def load_training_state(folder: Path, policy: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore what ``save_training_state`` wrote, from ``folder`` or its predecessor; the counters.

    Raises:
        ValueError: When there is no such state.
    """
    if not folder.exists():
        folder = folder.with_name(folder.name + ".previous")
    if not (folder / "counters.json").is_file():
        raise ValueError(
            f"{str(folder.parent)!r} holds no training state; expected the folder of a run to resume"
        )
    try:
        trained: dict[str, Tensor] = safetensors.torch.load_file(folder / "trained.safetensors")
        moments = safetensors.torch.load_file(folder / "optimizer.safetensors")
        counters = json.loads((folder / "counters.json").read_text())
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"the training state {str(folder)!r} is damaged: {error}") from None
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    if {name: p.shape for name, p in trained.items()} != {name: p.shape for name, p in parameters.items()}:
        raise ValueError(f"{str(folder)!r} is of another policy or another trainable set")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])
    load_optimizer_state(optimizer, moments)
    return counters


def load_args(run: Path, args_type: type[ArgsT]) -> ArgsT:
    """The arguments that a run was started with.

    Raises:
        ValueError: When ``run`` is not the folder of a run.
    """
    if not (run / "args.json").is_file():
        raise ValueError(f"{str(run)!r} is not the folder of a run: it has no args.json")
    try:
        stored = json.loads((run / "args.json").read_text())
        stored.items()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{str(run / 'args.json')!r} is damaged: {error}") from None
    known = {field.name: field for field in dataclasses.fields(args_type)}  # type: ignore[arg-type]
    paths = {name for name, field in known.items() if "Path" in str(field.type)}
    values = {
        name: Path(value) if name in paths and value is not None else value
        for name, value in stored.items()
        if name in known
    }
    return args_type(**values)
