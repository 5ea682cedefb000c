"""Find out what works on this machine, and what to do about the rest.

The commands:

    python -m vla_envs doctor        # one line per check; the exit status is 1 if something must be mended
    python -m vla_envs cache show    # show the compiled scenes on disk
    python -m vla_envs cache clear   # remove them; they are built again when they are needed
"""

import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vla_envs.command_line import one_line_errors, parse_args
from vla_envs.machine import available_cores, torchvision_misfit

CHECKSUM = "d40038936ef9"  # of the image of the ketchup task's init state 0, drawn by Mesa's llvmpipe
#: GiB to act in 8 environments, and GiB to train with LoRA, in bfloat16 on a GPU and in float32 on the
#: processor. They are estimated from the sizes of weights, adapters and caches.
NEEDS = {
    "nano": (0.5, 1.0), "flow": (0.5, 1.0), "smolvla": (3.0, 8.0), "pi0": (8.0, 14.0),
    "openvla": (16.0, 24.0), "openvla-oft": (16.0, 24.0),
}  # fmt: skip
NEEDS_ON_CPU = {
    "nano": (1.0, 2.0), "flow": (1.0, 2.0), "smolvla": (5.0, 10.0), "pi0": (15.0, 22.0),
    "openvla": (32.0, 48.0), "openvla-oft": (32.0, 48.0),
}  # fmt: skip
INSTALL = "pip install -e . in the repository"

OK, NOTE, MEND = "ok", "note", "mend"


def versions() -> tuple[str, str]:
    """Compare Python and every package with the versions that are known to work (``pyproject.toml``)."""
    try:
        known = importlib.metadata.metadata("vla_envs")
    except importlib.metadata.PackageNotFoundError:
        return MEND, f"vla_envs is not installed, so the versions that it needs are unknown: {INSTALL}"
    python, wrong, found = platform.python_version(), [], {}
    if not SpecifierSet(known["Requires-Python"] or "").contains(python, prereleases=True):
        wrong.append(f"Python {python} instead of {known['Requires-Python']}")
    for requirement in map(Requirement, known.get_all("Requires-Dist") or []):
        if requirement.marker is not None:
            continue  # it belongs to an extra
        try:
            version = found[requirement.name] = importlib.metadata.version(requirement.name)
            if not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{requirement.name} {version} instead of {requirement.specifier}")
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
    if wrong:
        return MEND, f"{'; '.join(wrong)}: {INSTALL}"
    shown = ("mujoco", "robosuite", "hf-libero", "torch", "gymnasium", "numpy", "numba")
    words = ", ".join([f"Python {python}"] + [f"{name} {found[name]}" for name in shown if name in found])
    if misfit := torchvision_misfit():
        why = "transformers and peft fail to load in a program that has not imported vla_envs.policies first"
        return NOTE, f"{words}; {misfit}: {why}; install both from one index, as docs/quickstart.md says"
    return OK, words


def opengl() -> tuple[str, str]:
    """Find out what draws."""
    from vla_envs.render import opengl

    found = opengl()
    device = f"{found.backend}, {found.device}"
    if found.software and Path("/dev/nvidiactl").exists():
        return NOTE, f"{device}, although there is a GPU: its driver's EGL (libnvidia-gl) would draw faster"
    return OK, device


def image(cache: bool = True) -> tuple[str, str]:
    """Compare the checksum of an image with the known one."""
    import gymnasium as gym

    from vla_envs.render import NEEDS, opengl

    env = gym.make("vla_envs/LiberoObject-v0", task_id=4, cache=cache)
    obs, _ = env.reset(options={"init_state_id": 0})
    env.close()
    if obs["image"].std() < 10:
        other = "egl" if opengl().backend == "osmesa" else "osmesa"
        return MEND, f"OpenGL draws nothing: try another driver, or MUJOCO_GL={other}; {NEEDS[other]}"
    checksum = hashlib.sha256(obs["image"].tobytes()).hexdigest()[:12]
    if checksum == CHECKSUM:
        return OK, f"{checksum}, as expected"
    return NOTE, f"{checksum} instead of llvmpipe's {CHECKSUM}: other renderers differ, which is harmless"


def speed(cache: bool = True) -> tuple[str, str]:
    """Measure environment steps per second, for two seconds."""
    import gymnasium as gym

    envs: Any = gym.make_vec(
        "vla_envs/LiberoObject-v0", num_envs=8, task_id=4, max_episode_steps=10**6, cache=cache
    )
    envs.reset(seed=0)
    actions, steps = np.zeros((8, 7)), 0
    envs.step(actions)
    start = time.perf_counter()
    while time.perf_counter() - start < 2.0:
        envs.step(actions)
        steps += 8
    rate = steps / (time.perf_counter() - start)
    envs.close()
    return OK, f"{rate:.0f} env-steps/s with 8 environments and an image per step"


def threads() -> tuple[str, str]:
    """Count the cores, and show what limits their use."""
    cores = available_cores()
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    limits = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    words = f"{cores} of {os.cpu_count()} cores: {cores} simulator threads"
    if hasattr(os, "getloadavg"):
        words += f"; load {os.getloadavg()[0]:.1f}"
    if limits:
        words += f"; PyTorch has {', '.join(limits)}"
    if "OMP_NUM_THREADS" not in os.environ:
        words += "; OMP_NUM_THREADS=1 is faster beside other programs that compute"
    return OK, words


def memory() -> tuple[str, str]:
    """Compare the machine's memory with what the policies need on the processor."""
    free, total = _memory()
    words = f"{free:.0f} of {total:.0f} GiB free; without a GPU: {_fits(free, NEEDS_ON_CPU)}"
    if free < NEEDS_ON_CPU["nano"][0]:
        return MEND, f"{words}: close other programs"
    return OK, words


def _memory() -> tuple[float, float]:
    """GiB that are free and GiB in total, in the machine or the container."""
    total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    table = Path("/proc/meminfo")
    if table.exists():
        free = 1024 * int(table.read_text().split("MemAvailable:")[1].split()[0])
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.exists() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
        free = min(free, total - int((group / "memory.current").read_text()))
    return free / 2**30, total / 2**30


def gpu() -> tuple[str, str]:
    """Compare the GPU's memory with what the policies need."""
    import torch

    if not torch.cuda.is_available():
        if Path("/dev/nvidiactl").exists():
            return (
                NOTE,
                f"PyTorch {torch.__version__} cannot use the GPU of this machine: install its CUDA build",
            )
        return NOTE, "there is none that PyTorch can use: nano runs on the CPU, OpenVLA-7B needs a GPU"
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    return OK, f"{torch.cuda.get_device_name()}, {free:.0f} of {total:.0f} GiB free: {_fits(free, NEEDS)}"


def _fits(free: float, needs: dict[str, tuple[float, float]]) -> str:
    words = []
    for policy, (act, train) in needs.items():
        fits = "trains" if free >= train else "acts" if free >= act else f"needs {act:.0f} GiB"
        words.append(f"{policy} {fits}")
    return ", ".join(words)


def assets() -> tuple[str, str]:
    """Find out where LIBERO's own meshes and textures would come from."""
    from vla_envs.assets.libero import download_folder, find, resolve_assets

    if found := find():
        folder = Path(resolve_assets(found[0]))
        return OK, f"built-in; LIBERO's own in {folder} ({found[1]}, {_size(folder)})"
    return (
        NOTE,
        f"built-in; LIBERO's own would be downloaded to {download_folder()}; or pip install -e '.[assets]',"
        " or name a folder in LIBERO_ASSETS",
    )


def cache() -> tuple[str, str]:
    """Show the compiled scenes on disk, and the downloaded checkpoints."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from vla_envs.machine import cache_folder, user_folder

    folder, usual, hub = cache_folder(), user_folder("vla_envs"), Path(HF_HUB_CACHE)
    words = f"{len(list(folder.glob('*.mjb')))} compiled scenes in {folder} ({_size(folder)})"
    if named := os.environ.get("NUMBA_CACHE_DIR"):
        words += f"; numba's code in {named}"
    checkpoints = [path for path in hub.glob("models--*") if "vla" in path.name or "pi0" in path.name]
    if checkpoints:
        words += f"; {len(checkpoints)} checkpoints in {hub} ({_size(*checkpoints)})"
    if folder != usual:
        return NOTE, f"{words}; {usual} cannot be written: name a folder in XDG_CACHE_HOME to keep them"
    return OK, words


def _size(*folders: Path) -> str:
    paths = (path for folder in folders for path in folder.rglob("*") if not path.is_symlink())
    size = sum(path.stat().st_size for path in paths if path.is_file()) / 1e6
    return f"{size:.0f} MB" if size < 1000 else f"{size / 1000:.1f} GB"


@dataclass
class Doctor:
    """Check what a newcomer needs: versions, OpenGL, an image, speed, memory, GPU, assets, cache."""

    cache: bool = True
    """Take the scene from the cache; --no-cache builds it again and leaves the cache alone"""


@dataclass
class Cache:
    """Show or clear the compiled scenes that are kept on disk."""

    action: Annotated[Literal["show", "clear"], tyro.conf.Positional]
    """What to do"""


def doctor(use_cache: bool = True) -> int:
    """Print one line per check; return 1 if something must be mended, else 0."""
    checks: dict[str, Callable[[], tuple[str, str]]] = {
        "versions": versions, "opengl": opengl, "image": lambda: image(use_cache),
        "speed": lambda: speed(use_cache), "threads": threads, "memory": memory, "gpu": gpu,
        "assets": assets, "cache": cache,
    }  # fmt: skip
    worst = 0
    for name, check in checks.items():
        try:
            verdict, words = check()
        except Exception as error:  # whatever it is, the other checks run
            verdict, words = MEND, " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, ModuleNotFoundError):
                words += f": {INSTALL}"
        worst = max(worst, int(verdict == MEND))
        print(f"{verdict:4}  {name:8}  {words}", flush=True)
    return worst


def clear_cache() -> None:
    """Remove the compiled scenes."""
    from vla_envs.machine import cache_folder

    print(f"removing {cache()[1]}")
    for path in cache_folder().iterdir():
        if path.suffix in (".mjb", ".json", ".lock", ".partial"):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    command = parse_args(Doctor | Cache)  # type: ignore[arg-type, var-annotated]
    with one_line_errors():
        if isinstance(command, Doctor):
            raise SystemExit(doctor(command.cache))
        clear_cache() if command.action == "clear" else print(cache()[1])
