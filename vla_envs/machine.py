"""What the machine and the installation offer: places that can be written, libraries that fit each other."""

import getpass
import importlib.metadata
import os
import tempfile
from pathlib import Path

import numba
import platformdirs
from packaging.requirements import Requirement

SPINS = "2000"  # some microseconds, longer than most waits; none at all makes training a quarter slower


def writable(folder: Path) -> bool:
    """Whether something can be put into ``folder``, which need not exist yet."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return folder.is_absolute() and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def session_folder() -> Path:
    """A folder of this user's in the temporary one: for caches whose own place cannot be written.

    That is so where the home folder is read-only, or nobody's (``docker run --user``).

    Raises:
        PermissionError: When somebody else has made that folder.
    """
    user = os.getuid() if hasattr(os, "getuid") else None
    folder = Path(tempfile.gettempdir()) / f"vla_envs-{user}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if user is not None and folder.lstat().st_uid != user:  # anybody may write there
        raise PermissionError(f"{folder} is another user's; expected XDG_CACHE_HOME with a folder of yours")
    return folder


def user_folder(name: str) -> Path:
    """The user's own cache of a program ``name``; a relative path where the user has no home."""
    try:
        return Path(platformdirs.user_cache_dir(name))
    except RuntimeError:  # of newer versions; older ones leave the "~" in
        return Path("~", ".cache", name)


def cache_folder() -> Path:
    """Where compiled scenes are kept; raises as `session_folder`."""
    folder = user_folder("vla_envs")
    if not writable(folder):
        return session_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def prepare_libraries() -> None:
    """Tell libraries what they take from the environment, in this process and its children.

    numba takes it for an error to find no place for compiled code (robosuite, in the child that builds a
    scene, has some too); PyTorch before 2.13, that the user has no name. PyTorch's threads would wait for
    each other at full speed, also for one whose core another program has: they sleep sooner if this is set
    when PyTorch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())
    named = os.environ.get("NUMBA_CACHE_DIR")
    if not writable(Path(named).absolute() if named else user_folder("numba")):
        folder = os.environ["NUMBA_CACHE_DIR"] = str(session_folder() / "numba")
        numba.config.CACHE_DIR = folder  # type: ignore[attr-defined]  # it may have been imported before


def torchvision_misfit() -> str | None:
    """What is wrong where torchvision cannot be loaded beside the installed PyTorch; imports neither.

    LIBERO's dependencies bring PyPI's torchvision. Beside PyTorch's CPU build, or a version that it was not
    made for, it fails, and transformers, and peft with it, fail to load anything at all.
    """
    try:
        torch, torchvision = (importlib.metadata.version(name) for name in ("torch", "torchvision"))
    except importlib.metadata.PackageNotFoundError:
        return None
    needs = map(Requirement, importlib.metadata.requires("torchvision") or [])
    made_for = all(need.specifier.contains(torch, prereleases=True) for need in needs if need.name == "torch")
    if made_for and (torchvision.endswith("+cpu") or not torch.endswith("+cpu")):
        return None
    return f"torchvision {torchvision} does not fit torch {torch}"


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
