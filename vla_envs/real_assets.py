"""LIBERO's own meshes and textures: where they lie, whether they are whole, and how to draw them fast."""

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import filelock
import mujoco
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vla_envs.inputs import in_short, nearest
from vla_envs.machine import session_folder, writable

QUALITIES = ("exact", "fast")
REPOSITORY = "lerobot/libero-assets"  # on the Hugging Face hub; the one that hf-libero downloads
OBJECT_FOLDERS = (
    "stable_hope_objects",
    "stable_scanned_objects",
    "turbosquid_objects",
    "articulated_objects",
)
ARENAS = ("floor", "table", "kitchen_table", "study_table")  # fixtures without a file of their own
FAULTS_SHOWN = 20

# Quality "fast": chosen as the fewest triangles that leave the structural similarity above 0.97 at 224 px.
TRIANGLES_PER_PIXEL = 1.5  # that a mesh shows on average, at PICTURE_SIZE, in both cameras together
LEAST_TRIANGLES, MOST_TRIANGLES = 16, 800  # of a mesh
PICTURE_SIZE = 224
POSES, REACH = 16, 0.5  # arm poses in which the cameras look around; rad, that each joint moves at most
TEXTURE_SIZE = 512  # pixels
SEAM = 0.05  # texture coordinates of a triangle's corners further apart than this come from different patches


# ---- Where ---------------------------------------------------------------------------------------------


def resolve_assets(assets: str | os.PathLike[str]) -> str:
    """``"builtin"``, or the absolute path of a folder that holds LIBERO's meshes and textures.

    Args:
        assets: ``"builtin"``; ``"libero"`` for the folder in ``LIBERO_ASSETS``, else LIBERO's own download,
            made once; or a folder.

    Raises:
        ValueError: When the folder is none.
        ConnectionError: When they have to be downloaded and cannot be.
    """
    if assets == "builtin":
        return "builtin"
    if assets == "libero":
        assets = os.environ.get("LIBERO_ASSETS") or download()
    try:
        folder = Path(assets).expanduser().resolve()
        held = [name for name in ("scenes", *OBJECT_FOLDERS) if (folder / name).is_dir()]
    except (OSError, ValueError, RuntimeError):  # names that cannot be, homes of nobody
        held = []
    if "scenes" not in held or len(held) < 2:
        hint = nearest(str(assets), ["builtin", "libero"])
        raise ValueError(
            f"assets {in_short(str(assets))} is no folder of LIBERO's assets (scenes/, stable_hope_objects/,"
            f" ...); expected 'builtin', 'libero' or such a folder{hint}"
        )
    return str(folder)


def download_folder() -> Path:
    """Where ``hf-libero`` keeps what it downloads, or what takes its place."""
    folder = Path(os.path.expanduser("~"), ".cache", "libero", "assets")
    if writable(folder) or os.path.exists(folder / ".complete"):
        return folder
    return session_folder() / "libero" / "assets"


def download() -> Path:
    """LIBERO's assets from the Hugging Face hub, where ``hf-libero`` keeps them; fetched once, with a bar.

    Raises:
        ConnectionError: When the hub cannot be reached.
    """
    import huggingface_hub

    folder = download_folder()
    complete = folder / ".complete"  # a download that was interrupted goes on where it was
    if complete.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not complete.exists():
            try:
                huggingface_hub.snapshot_download(REPOSITORY, repo_type="dataset", local_dir=folder)
            except Exception as error:  # of the hub, of its HTTP library, or of the network itself
                raise ConnectionError(
                    f"LIBERO's assets could not be downloaded from {REPOSITORY} ({type(error).__name__}); "
                    "set LIBERO_ASSETS to a folder that holds them, or use assets='builtin'"
                ) from error
            complete.touch()
    return folder


# ---- Whether whole -------------------------------------------------------------------------------------


def check_files(folder: Path, bddl_file: Path) -> None:
    """Look at every file that the scene of ``bddl_file`` needs from ``folder``.

    Raises:
        ValueError: When any is missing or damaged; one line for each.
    """
    faults = dict.fromkeys(
        f"{os.path.relpath(path, folder)}: {fault}" for path, fault in _faults(folder, bddl_file)
    )
    if faults:
        lines = list(faults)[:FAULTS_SHOWN]
        if len(faults) > FAULTS_SHOWN:
            lines.append(f"and {len(faults) - FAULTS_SHOWN} more")
        raise ValueError(f"files of LIBERO's assets in {folder} are missing or damaged:\n" + "\n".join(lines))


def _faults(folder: Path, bddl_file: Path) -> Iterator[tuple[Path, str]]:
    task = bddl_file.read_text()
    problem = re.findall(r"\(problem LIBERO_(\w+)_Manipulation\)", task)[0].lower()
    scene = problem.replace("study_tabletop", "study")
    descriptions = [folder / "scenes" / f"libero_{scene}_base_style.xml"]
    for block in re.findall(r"\(:(?:objects|fixtures)([^)]*)\)", task):
        for name in sorted(set(re.findall(r"-\s+(\w+)", block)) - set(ARENAS)):
            places = [
                place for root in (*OBJECT_FOLDERS, "scenes") for place in folder.glob(f"{root}/{name}.xml")
            ]
            places += [place for place in folder.glob(f"*/{name}/{name}.xml")]
            if not places:
                yield folder / f"{name}.xml", "missing, under any folder of objects"
            descriptions += places
    for path in sorted((folder / "textures").glob("*")):  # a floor or wall may be painted with any
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
            yield path, f"no XML: {error}"
            continue
        for element in root.iter():
            if name := element.get("file"):
                if element.tag == "include":
                    descriptions.append(path.parent / name)
                elif fault := _fault(path.parent / name):
                    yield path.parent / name, fault


def _fault(path: Path) -> str:
    """What is wrong with a mesh or a texture, or nothing."""
    try:
        size = path.stat().st_size
        if size == 0:
            return "empty"
        if path.suffix in (".png", ".jpg", ".jpeg"):
            with Image.open(path) as picture:
                picture.verify()
        elif path.suffix == ".msh":  # MuJoCo's: four counts, then as many floats and ints
            points, normals, texcoords, faces = np.fromfile(path, np.int32, 4).tolist()
            expected = 16 + 12 * points + 12 * normals + 8 * texcoords + 12 * faces
            if size != expected:
                return f"{size} bytes; expected {expected}"
        elif path.suffix.lower() == ".stl":
            with path.open("rb") as stream:
                head = stream.read(84)
            expected = 84 + 50 * int.from_bytes(head[80:], "little")
            if size != expected and not head.startswith(b"solid"):
                return f"{size} bytes; expected {expected}"
        elif path.suffix == ".obj" and b"\nf " not in path.read_bytes():
            return "no faces"
    except (OSError, ValueError, SyntaxError) as error:
        return getattr(error, "strerror", None) or "cannot be read: it is cut off or of another kind"
    return ""


# ---- Quality "fast" ------------------------------------------------------------------------------------


def simplify(spec: mujoco.MjSpec, exact: mujoco.MjModel, qpos: NDArray[np.float64], scratch: Path) -> None:
    """Make the scene quick to draw: fewer triangles, smaller textures; the same physics.

    Args:
        spec: The scene; changed in place. Meshes that anything collides with stay.
        exact: The scene as it is, compiled.
        qpos: Joint positions after a reset (m, rad).
        scratch: A folder for the smaller textures, needed until ``spec`` is compiled.
    """
    meshes = exact.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    touched = exact.geom_dataid[meshes & (exact.geom_group == 0)]
    pixels = _pixels_shown(exact, qpos)
    for k in np.setdiff1d(exact.geom_dataid[meshes], touched):
        shown = pixels[meshes & (exact.geom_dataid == k)].max()
        most = int(np.clip(TRIANGLES_PER_PIXEL * shown, LEAST_TRIANGLES, MOST_TRIANGLES))
        if most < exact.mesh_facenum[k]:
            _simplify_mesh(spec.mesh(exact.mesh(k).name), exact, k, most)
    for texture in spec.textures:
        if texture.file:
            with Image.open(texture.file) as picture:
                if max(picture.size) > TEXTURE_SIZE:
                    size = [max(1, side * TEXTURE_SIZE // max(picture.size)) for side in picture.size]
                    texture.file = str(scratch / f"{texture.name}.png")
                    picture.convert("RGB").resize(size, Image.Resampling.BOX).save(texture.file)


def _pixels_shown(model: mujoco.MjModel, qpos: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pixels that each geom shows ``(ngeom,)``, in the mean of arm poses about ``qpos``, in both cameras."""
    data, rng, side = mujoco.MjData(model), np.random.default_rng(0), 64  # rays, for a PICTURE_SIZE
    across = (2 * np.arange(side) + 1) / side - 1
    counts = np.zeros(model.ngeom)
    hits, distances = np.empty(side * side, np.int32), np.empty(side * side)
    drawn = np.array([0, 1, 1, 1, 1, 1], np.uint8)  # groups of geoms: no collision shapes
    for _ in range(POSES):
        data.qpos[:] = qpos
        data.qpos[:7] += rng.uniform(-REACH, REACH, 7)
        mujoco.mj_forward(model, data)
        for name in ("agentview", "robot0_eye_in_hand"):
            camera = model.camera(name).id
            half = np.tan(np.radians(model.cam_fovy[camera]) / 2)
            rays = np.stack(np.broadcast_arrays(half * across, half * across[:, None], -1.0), -1)
            rays = rays.reshape(-1, 3) @ data.cam_xmat[camera].reshape(3, 3).T
            rays /= np.linalg.norm(rays, axis=1, keepdims=True)
            eye = data.cam_xpos[camera]
            mujoco.mj_multiRay(model, data, eye, rays.ravel(), drawn, 1, -1, hits, distances, len(hits), 1e10)
            counts += np.bincount(hits[hits >= 0], minlength=model.ngeom)
    return counts / POSES * (PICTURE_SIZE / side) ** 2


def _simplify_mesh(mesh: mujoco.MjsMesh, model: mujoco.MjModel, k: int, most: int) -> None:
    """Replace ``mesh``, number ``k`` of ``model``, by at most about ``most`` triangles that look like it.

    Only shapes are simplified; each new corner takes normal and texture coordinates from the old triangle
    nearest to it, among those that face the same way.
    """
    import fast_simplification
    from scipy.spatial import cKDTree

    start, count = model.mesh_faceadr[k], model.mesh_facenum[k]
    matrix = np.empty(9)
    mujoco.mju_quat2Mat(matrix, model.mesh_quat[k])  # the compiler has moved the mesh into its own frame
    turn = matrix.reshape(3, 3).T
    vertices = model.mesh_vert[model.mesh_vertadr[k] :][: model.mesh_vertnum[k]] @ turn + model.mesh_pos[k]
    old = vertices[model.mesh_face[start : start + count]]  # (faces, corners, xyz)
    points, merged = np.unique(np.round(vertices, 6), axis=0, return_inverse=True)
    faces = merged.reshape(-1)[model.mesh_face[start : start + count]]
    faces = faces[(faces != np.roll(faces, 1, axis=1)).all(1)]
    points, faces = fast_simplification.simplify(
        points.astype(np.float32), faces.astype(np.int32), target_count=most, agg=4
    )
    new = points[faces].astype(float)
    facing, area = _facing(new)
    new, facing = new[area > 0], facing[area > 0]

    mesh.file, mesh.scale, mesh.refpos, mesh.refquat = "", [1, 1, 1], [0, 0, 0], [1, 0, 0, 0]
    mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL  # no matter; others refuse thin shells
    if model.mesh_texcoordnum[k] == 0:  # MuJoCo draws it with normals of its own
        mesh.uservert, mesh.userface = points.reshape(-1).tolist(), faces.reshape(-1).tolist()
        return
    reach = 0.1 * np.ptp(points, axis=0).max()  # m; how much a turn of 60 degrees counts
    tree = cKDTree(np.hstack([old.mean(1), reach * _facing(old)[0]]))

    def nearest_face(place: NDArray[np.float64]) -> NDArray[np.int64]:
        return tree.query(np.hstack([place, reach * facing]))[1]

    middle = new.mean(1)
    own = np.stack([nearest_face(0.8 * new[:, j] + 0.2 * middle) for j in range(3)], axis=1)
    normals = model.mesh_normal[model.mesh_normaladr[k] + model.mesh_facenormal[start : start + count]] @ turn
    normal = normals[own].mean(2)
    against = (normal * facing[:, None]).sum(2) < 0.3
    normal[against] = np.broadcast_to(facing[:, None], normal.shape)[against]
    normal /= np.linalg.norm(normal, axis=2, keepdims=True)
    texture = model.mesh_texcoord[
        model.mesh_texcoordadr[k] + model.mesh_facetexcoord[start : start + count]
    ].astype(float)
    by_corner = _interpolate(old[own], texture[own], new)
    one = np.repeat(nearest_face(middle)[:, None], 3, axis=1)
    by_middle = _interpolate(old[one], texture[one], new)
    torn = np.linalg.norm(by_corner - by_middle, axis=2).max(1) > SEAM
    by_corner[torn] = by_middle[torn]
    mesh.uservert, mesh.userface = new.reshape(-1).tolist(), list(range(new.size // 3))
    mesh.usernormal, mesh.usertexcoord = normal.reshape(-1).tolist(), by_corner.reshape(-1).tolist()


def _facing(triangles: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit normals ``(n, 3)`` and doubled areas ``(n,)`` of ``(n, corners, xyz)``."""
    normal = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    area = np.linalg.norm(normal, axis=1)
    return normal / np.maximum(area, 1e-30)[:, None], area


def _interpolate(
    corners: NDArray[np.float64], values: NDArray[np.float64], places: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Values at ``places`` (..., 3) of the linear function with ``values`` (..., 3, k) at ``corners``."""
    edge, other = corners[..., 1, :] - corners[..., 0, :], corners[..., 2, :] - corners[..., 0, :]
    place = places - corners[..., 0, :]
    a, b, c = (edge * edge).sum(-1), (edge * other).sum(-1), (other * other).sum(-1)
    p, q = (place * edge).sum(-1), (place * other).sum(-1)
    determinant = np.maximum(a * c - b * b, 1e-20)
    u, v = np.clip([(c * p - b * q) / determinant, (a * q - b * p) / determinant], -3, 4)[..., None]
    return (
        values[..., 0, :]
        + u * (values[..., 1, :] - values[..., 0, :])
        + v * (values[..., 2, :] - values[..., 0, :])
    )
