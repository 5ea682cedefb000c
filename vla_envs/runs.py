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
from torch import Tensor

from vla_envs.policies.adapters import load_optimizer_state, optimizer_state, trainable_state

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
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


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
    previous = folder.with_name(folder.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


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
    trained: dict[str, Tensor] = safetensors.torch.load_file(folder / "trained.safetensors")
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    if trained.keys() != parameters.keys():
        raise ValueError(f"{str(folder)!r} is of another policy or another trainable set")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])
    load_optimizer_state(optimizer, safetensors.torch.load_file(folder / "optimizer.safetensors"))
    return json.loads((folder / "counters.json").read_text())


def load_args(run: Path, args_type: type[ArgsT]) -> ArgsT:
    """The arguments that a run was started with.

    Raises:
        ValueError: When ``run`` is not the folder of a run.
    """
    if not (run / "args.json").is_file():
        raise ValueError(f"{str(run)!r} is not the folder of a run: it has no args.json")
    stored = json.loads((run / "args.json").read_text())
    known = {field.name: field for field in dataclasses.fields(args_type)}  # type: ignore[arg-type]
    paths = {name for name, field in known.items() if "Path" in str(field.type)}
    values = {
        name: Path(value) if name in paths and value is not None else value
        for name, value in stored.items()
        if name in known
    }
    return args_type(**values)
