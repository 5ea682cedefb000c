"""What the machine and the installation offer: writable folders, cores, libraries that fit each other."""

import getpass
import importlib.metadata
import os
import tempfile
from pathlib import Path

import numba
import platformdirs
from packaging.requirements import Requirement

SPINS = "2000"  # some microseconds, longer than most waits; with none, training is a quarter slower


def writable(folder: Path) -> bool:
    """Whether files can be written to ``folder``, which need not exist yet."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return folder.is_absolute() and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def session_folder() -> Path:
    """This user's folder in the temporary folder, for caches whose usual place cannot be written.

    That happens when the home folder is read-only or missing (``docker run --user``).

    Raises:
        PermissionError: When the folder belongs to another user.
    """
    user = os.getuid() if hasattr(os, "getuid") else None
    folder = Path(tempfile.gettempdir()) / f"vla_envs-{user}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if user is not None and folder.lstat().st_uid != user:  # everybody may write to the temporary folder
        raise PermissionError(f"{folder} belongs to another user; set XDG_CACHE_HOME to a folder of yours")
    return folder


def user_folder(name: str) -> Path:
    """The user's cache of the program ``name``; it is a relative path for a user without a home."""
    try:
        return Path(platformdirs.user_cache_dir(name))
    except RuntimeError:  # newer versions raise it; older ones leave the "~" in
        return Path("~", ".cache", name)


def cache_folder() -> Path:
    """Where compiled scenes are kept.

    Raises:
        PermissionError: As `session_folder`.
    """
    folder = user_folder("vla_envs")
    if not writable(folder):
        return session_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def prepare_libraries() -> None:
    """Set environment variables that libraries read, for this process and its children.

    numba fails when it finds no place for compiled code; robosuite uses it too, in the child process that
    builds a scene. PyTorch before 2.13 fails when the user has no name. PyTorch's threads wait for each other
    at full speed, even for one whose core another program uses: they sleep sooner if this is set before
    PyTorch is imported.
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
        numba.config.CACHE_DIR = folder  # type: ignore[attr-defined]  # numba may have read the variable already


def torchvision_misfit() -> str | None:
    """Why torchvision cannot be loaded beside the installed PyTorch, or None; imports neither.

    LIBERO's dependencies bring PyPI's torchvision. It fails beside PyTorch's CPU build, and beside a version
    that it was not built for; transformers and peft then fail to load anything at all.
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
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """This process's share of the memory, in bytes: of the machine's, or of a container's or a job's."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    root, own = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
    lines = own.read_text().splitlines() if own.is_file() else []
    for _, kinds, group in (line.split(":", 2) for line in lines):  # of version 2, or of memory's version 1
        name, top = ("memory.limit_in_bytes", root / "memory") if kinds else ("memory.max", root)
        if kinds in ("", "memory"):
            folder = top / group.strip("/")
            for limit in (each / name for each in (folder, *folder.parents) if each.is_relative_to(top)):
                if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                    most = min(most, int(text))
    return most // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
