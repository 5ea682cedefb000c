"""Quality "fast": LIBERO's scenes with fewer triangles and smaller textures, and with the same physics."""

from pathlib import Path

import mujoco
import numpy as np
from numpy.typing import NDArray
from PIL import Image

# The fewest triangles that leave the structural similarity above 0.97 at IMAGE_SIZE.
TRIANGLES_PER_PIXEL = 1.5  # per pixel that a mesh shows on average, in both cameras together
LEAST_TRIANGLES, MOST_TRIANGLES = 16, 800  # of a mesh
IMAGE_SIZE = 224
POSES, REACH = 16, 0.5  # arm poses from which the cameras look around; rad that each joint moves at most
TEXTURE_SIZE = 512  # pixels
SEAM = 0.05  # texture coordinates of one triangle that are further apart come from different patches


def simplify(spec: mujoco.MjSpec, exact: mujoco.MjModel, qpos: NDArray[np.float64], scratch: Path) -> None:
    """Make a scene quick to render, with fewer triangles and smaller textures.

    Args:
        spec: The scene, which is changed in place. Meshes that collide stay.
        exact: The scene before, compiled.
        qpos: Joint positions after a reset (m, rad).
        scratch: A folder for the smaller textures; it is needed until ``spec`` is compiled.
    """
    meshes = exact.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    colliding = exact.geom_dataid[meshes & (exact.geom_group == 0)]
    pixels = _pixels_shown(exact, qpos)
    for k in np.setdiff1d(exact.geom_dataid[meshes], colliding):
        shown = pixels[meshes & (exact.geom_dataid == k)].max()
        most = int(np.clip(TRIANGLES_PER_PIXEL * shown, LEAST_TRIANGLES, MOST_TRIANGLES))
        if most < exact.mesh_facenum[k]:
            _simplify_mesh(spec.mesh(exact.mesh(k).name), exact, k, most)
    for texture in spec.textures:
        if texture.file:
            with Image.open(texture.file) as image:
                if max(image.size) > TEXTURE_SIZE:
                    size = [max(1, side * TEXTURE_SIZE // max(image.size)) for side in image.size]
                    texture.file = str(scratch / f"{texture.name}.png")
                    image.convert("RGB").resize(size, Image.Resampling.BOX).save(texture.file)


def _pixels_shown(model: mujoco.MjModel, qpos: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pixels that each geom shows ``(ngeom,)`` in both cameras, averaged over arm poses around ``qpos``."""
    data, rng, side = mujoco.MjData(model), np.random.default_rng(0), 64  # rays per side of an image
    across = (2 * np.arange(side) + 1) / side - 1
    counts = np.zeros(model.ngeom)
    hits, distances = np.empty(side * side, np.int32), np.empty(side * side)
    visible = np.array([0, 1, 1, 1, 1, 1], np.uint8)  # groups of geoms; group 0 has the collision shapes
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
            mujoco.mj_multiRay(
                model, data, eye, rays.ravel(), visible, 1, -1, hits, distances, len(hits), 1e10
            )
            counts += np.bincount(hits[hits >= 0], minlength=model.ngeom)
    return counts / POSES * (IMAGE_SIZE / side) ** 2


def _simplify_mesh(mesh: mujoco.MjsMesh, model: mujoco.MjModel, k: int, most: int) -> None:
    """Replace ``mesh``, number ``k`` of ``model``, by about ``most`` triangles that look like it.

    Only the shape is simplified. Each new corner takes its normal and texture coordinates from the nearest
    old triangle that faces the same way.
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
    # The kind of inertia has no effect here, but the others refuse thin shells.
    mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL
    if model.mesh_texcoordnum[k] == 0:  # MuJoCo computes normals of its own
        mesh.uservert, mesh.userface = points.reshape(-1).tolist(), faces.reshape(-1).tolist()
        return
    reach = 0.1 * np.ptp(points, axis=0).max()  # m that count as much as a turn of 60 degrees
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
