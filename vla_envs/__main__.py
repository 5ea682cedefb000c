"""What works here, and what to do where something does not.

python -m vla_envs doctor        # one line a check; exit status 1 when something is to be done
python -m vla_envs cache show    # compiled scenes on disk
python -m vla_envs cache clear   # remove them: they are built anew when they are needed
"""

import hashlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from packaging.requirements import Requirement

from vla_envs.runs import one_line_errors, parse_args

PICTURE = "d40038936ef9"  # of the ketchup task's init state 0, drawn by Mesa's llvmpipe
#: GiB on a GPU, from the sizes of weights, adapters and caches: to act in 8 environments, to train with LoRA.
NEEDS = {"nano": (0.5, 1.0), "openvla": (16.0, 24.0), "openvla-oft": (16.0, 24.0)}

OK, NOTE, TODO = "ok", "note", "TO DO"


def versions() -> tuple[str, str]:
    """Python and every package against the versions that are known to work (``pyproject.toml``)."""
    wrong = []
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        wrong.append(f"Python {platform.python_version()} instead of 3.10 to 3.12")
    for line in importlib.metadata.requires("vla_envs") or []:
        requirement = Requirement(line)
        if requirement.marker is not None:
            continue  # of an extra
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = "nothing"
        if found == "nothing" or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} instead of {requirement.specifier or 'any'}")
    if wrong:
        return TODO, "; ".join(wrong) + ": pip install the versions named"
    names = ("mujoco", "robosuite", "hf-libero", "torch", "transformers", "peft", "gymnasium", "numpy")
    known = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return OK, f"Python {platform.python_version()}, {known}"


def opengl() -> tuple[str, str]:
    """What draws."""
    from vla_envs.render import _opengl_context

    kind = type(_opengl_context()).__module__.split(".")[1]
    from OpenGL import GL

    return OK, f"{kind}, {GL.glGetString(GL.GL_RENDERER).decode()}"


def picture() -> tuple[str, str]:
    """A picture's checksum."""
    import gymnasium as gym

    env = gym.make("vla_envs/LiberoObject-v0", task_id=4)
    obs, _ = env.reset(options={"init_state_id": 0})
    env.close()
    checksum = hashlib.sha256(obs["image"].tobytes()).hexdigest()[:12]
    if checksum == PICTURE:
        return OK, f"{checksum}, as known"
    return NOTE, f"{checksum}; Mesa's software OpenGL gives {PICTURE}: another device rounds in its own way"


def speed() -> tuple[str, str]:
    """Environment steps a second, for two seconds."""
    import gymnasium as gym

    envs: Any = gym.make_vec("vla_envs/LiberoObject-v0", num_envs=8, task_id=4, max_episode_steps=10**6)
    envs.reset(seed=0)
    actions, steps = np.zeros((8, 7)), 0
    envs.step(actions)
    start = time.perf_counter()
    while time.perf_counter() - start < 2.0:
        envs.step(actions)
        steps += 8
    rate = steps / (time.perf_counter() - start)
    envs.close()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return OK, f"{rate:.0f} env-steps/s, 8 environments, an image every step, {cores} threads"


def gpu() -> tuple[str, str]:
    """The GPU's memory against what the policies need."""
    import torch

    if not torch.cuda.is_available():
        return NOTE, "none that PyTorch can use: nano runs on the CPU, OpenVLA-7B wants a GPU"
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    fits = [
        f"{policy} {'trains' if free >= train else 'acts' if free >= act else 'does not fit'}"
        for policy, (act, train) in NEEDS.items()
    ]
    return OK, f"{torch.cuda.get_device_name()}, {free:.0f} of {total:.0f} GiB free: {', '.join(fits)}"


def assets() -> tuple[str, str]:
    """Where LIBERO's own meshes and textures would come from."""
    folder = os.environ.get("LIBERO_ASSETS")
    if folder:
        from vla_envs.real_assets import resolve_assets

        return OK, f"LIBERO's own in {resolve_assets(folder)} ({_size(Path(folder))})"
    return NOTE, "built-in; LIBERO's own, where asked for, are downloaded (LIBERO_ASSETS names no folder)"


def cache() -> tuple[str, str]:
    """The compiled scenes on disk."""
    from vla_envs.scene import cache_folder

    folder = cache_folder()
    return OK, f"{len(list(folder.glob('*.mjb')))} compiled scenes in {folder} ({_size(folder)})"


def _size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.0f} MB"


@dataclass
class Doctor:
    """Check what a newcomer needs: versions, OpenGL, a picture, speed, GPU, assets, cache."""


@dataclass
class Cache:
    """Show or clear the compiled scenes that are kept on disk."""

    action: Annotated[Literal["show", "clear"], tyro.conf.Positional]
    """What to do"""


def doctor() -> int:
    """Print one line a check; 1 when something is to be done, else 0."""
    checks: tuple[Callable[[], tuple[str, str]], ...] = (
        versions, opengl, picture, speed, gpu, assets, cache
    )  # fmt: skip
    worst = 0
    for check in checks:
        try:
            state, words = check()
        except Exception as error:  # whatever it is, the other checks still run
            state, words = TODO, " ".join(str(error).split()) or type(error).__name__
        worst = max(worst, int(state == TODO))
        print(f"{state:5}  {check.__name__:8}  {words}", flush=True)
    return worst


def clear_cache() -> None:
    """Remove the compiled scenes."""
    from vla_envs.scene import cache_folder

    print(f"removing {cache()[1]}")
    for path in cache_folder().iterdir():
        if path.suffix in (".mjb", ".json", ".lock", ".partial"):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    command = parse_args(Doctor | Cache)  # type: ignore[arg-type, var-annotated]
    with one_line_errors():
        if isinstance(command, Doctor):
            raise SystemExit(doctor())
        clear_cache() if command.action == "clear" else print(cache()[1])
