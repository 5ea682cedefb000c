"""Fewer triangles for software OpenGL, with an image that is the same pixel for pixel.

LIBERO's meshes have a hundred triangles per pixel, and a software renderer pays for each. A triangle changes
nothing if it faces away, lies outside the image or covers none of the points at which pixels are sampled:
only about one in twenty matters. `Culling` finds those before each image and gives only them to OpenGL.
Mirrors and shadows show triangles that the camera does not see: `can_cull` tells where there are none.
"""

from typing import Any

import mujoco
import numpy as np
from numba import njit
from numpy.typing import NDArray

MARGIN = 1 / 128  # pixels; OpenGL rounds corners to 1/256 of a pixel


def can_cull(model: mujoco.MjModel) -> bool:
    """Whether only the camera decides which triangles matter, as there are no shadows and no mirrors."""
    shadows = (model.light_castshadow != 0) & (model.light_active != 0)
    flat = np.isin(model.geom_type, (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX))
    materials = model.geom_matid[flat & (model.geom_group > 0) & (model.geom_matid >= 0)]
    return not shadows.any() and not model.mat_reflectance[materials].any()


class Culling:
    """The triangles of one model's visual meshes that an image of ``size`` pixels needs.

    Args:
        model: The model; its arrays of faces change only during `upload`.
        size: Height and width of the image in pixels.
        samples: Where each pixel is sampled ``(n, 2)`` float32, in pixels from its lower left corner.
    """

    def __init__(self, model: mujoco.MjModel, size: int, samples: NDArray[np.float32]) -> None:
        self.model, self.size, self.samples = model, size, samples
        visible = (model.geom_type == mujoco.mjtGeom.mjGEOM_MESH) & (model.geom_group > 0)
        self.geoms = np.flatnonzero(visible)
        self.meshes = np.unique(model.geom_dataid[visible])
        self.faces = (model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord)
        self.whole = tuple(array.copy() for array in self.faces)
        self.facenum = model.mesh_facenum.copy()
        self.keep = np.zeros(len(model.mesh_face), bool)
        mesh = np.repeat(np.arange(model.nmesh), self.facenum)
        a, b, c = (model.mesh_vert[self.whole[0][:, k] + model.mesh_vertadr[mesh]] for k in range(3))
        normal = np.cross(b - a, c - a)
        longest = np.sqrt(np.max([((p - q) ** 2).sum(1) for p, q in ((a, b), (b, c), (c, a))], axis=0))
        normal /= np.maximum(longest, 1e-12)[:, None]  # its length is the triangle's least height
        self.planes = np.c_[normal, -(normal * a).sum(1)].astype(np.float32)

    def mark(self, data: mujoco.MjData, camera: int) -> None:
        """Find the triangles that ``camera``'s image of ``data`` needs."""
        model = self.model
        self.keep[:] = False
        for geom in self.geoms:
            mesh = model.geom_dataid[geom]
            start, end = model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + self.facenum[mesh]
            turn = data.cam_xmat[camera].reshape(3, 3).T
            _mark(
                self.keep[start:end],
                self.planes[start:end],
                self.whole[0][start:end],
                model.mesh_vert[model.mesh_vertadr[mesh] :],
                turn @ data.geom_xmat[geom].reshape(3, 3),
                turn @ (data.geom_xpos[geom] - data.cam_xpos[camera]),
                float(model.geom_rbound[geom]),
                model.vis.map.znear * model.stat.extent,
                1 / np.tan(np.radians(model.cam_fovy[camera]) / 2),
                self.size,
                self.samples,
            )

    def upload(self, context: mujoco.MjrContext) -> None:
        """Give OpenGL the triangles that `mark` found; the model's arrays of faces change meanwhile."""
        model = self.model
        _compact(
            self.keep,
            self.meshes,
            model.mesh_faceadr,
            self.facenum,
            self.faces,
            self.whole,
            model.mesh_facenum,
        )
        for mesh in self.meshes:
            mujoco.mjr_uploadMesh(model, context, mesh)
        _restore(self.meshes, model.mesh_faceadr, self.facenum, self.faces, self.whole, model.mesh_facenum)


@njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")
def _mark(
    keep: Any,
    planes: Any,
    faces: Any,
    vertices: Any,
    turn: Any,
    shift: Any,
    radius: float,
    near: float,
    focal: float,
    size: int,
    samples: Any,
) -> None:
    """Set ``keep`` (n,) where a triangle may cover a sample; ``turn``, ``shift`` go from mesh to camera."""
    depth = -shift[2]
    bound = radius * np.sqrt(1 + 1 / focal**2)
    if depth + radius < near or max(abs(shift[0]), abs(shift[1])) - depth / focal > bound:
        return
    scale = 0.5 * size * focal  # pixels per metre at a distance of 1 m
    eye = -(turn.T @ shift)
    ex, ey, ez = np.float32(eye[0]), np.float32(eye[1]), np.float32(eye[2])
    facing = np.float32(
        -2 * MARGIN * (depth + radius) ** 2 / scale / max(depth - radius, near) * (depth + radius)
    )
    corner = np.empty((3, 3))
    for f in range(len(faces)):
        if planes[f, 0] * ex + planes[f, 1] * ey + planes[f, 2] * ez + planes[f, 3] < facing or keep[f]:
            continue
        behind = 0
        for k in range(3):
            x, y, z = vertices[faces[f, k], 0], vertices[faces[f, k], 1], vertices[faces[f, k], 2]
            d = -(turn[2, 0] * x + turn[2, 1] * y + turn[2, 2] * z + shift[2])
            if d < near:
                behind += 1
                continue
            corner[k, 0] = (
                0.5 * size + scale * (turn[0, 0] * x + turn[0, 1] * y + turn[0, 2] * z + shift[0]) / d
            )
            corner[k, 1] = (
                0.5 * size + scale * (turn[1, 0] * x + turn[1, 1] * y + turn[1, 2] * z + shift[1]) / d
            )
        if behind:
            keep[f] = behind < 3
            continue
        keep[f] = _covers(
            corner[0, 0], corner[0, 1], corner[1, 0], corner[1, 1], corner[2, 0], corner[2, 1], size, samples
        )


@njit(cache=True, nogil=True, boundscheck=False, error_model="numpy", inline="always")
def _covers(
    ax: float, ay: float, bx: float, by: float, cx: float, cy: float, size: int, samples: Any
) -> bool:
    """Whether a triangle in pixels, widened by MARGIN, contains a sample of the image."""
    x0, x1 = max(min(ax, bx, cx) - MARGIN, 0.0), min(max(ax, bx, cx) + MARGIN, float(size))
    y0, y1 = max(min(ay, by, cy) - MARGIN, 0.0), min(max(ay, by, cy) + MARGIN, float(size))
    if x0 > x1 or y0 > y1:
        return False
    if max(x1 - x0, y1 - y0) > 3:
        return True
    ab = MARGIN * (abs(bx - ax) + abs(by - ay))
    bc = MARGIN * (abs(cx - bx) + abs(cy - by))
    ca = MARGIN * (abs(ax - cx) + abs(ay - cy))
    for px in range(int(x0), int(x1) + 1):
        for py in range(int(y0), int(y1) + 1):
            for k in range(len(samples)):
                x, y = px + samples[k, 0], py + samples[k, 1]
                if x0 <= x <= x1 and y0 <= y <= y1:
                    if (
                        (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= -ab
                        and (cx - bx) * (y - by) - (cy - by) * (x - bx) >= -bc
                        and (ax - cx) * (y - cy) - (ay - cy) * (x - cx) >= -ca
                    ):
                        return True
    return False


@njit(cache=True, nogil=True)
def _compact(keep: Any, meshes: Any, start: Any, count: Any, faces: Any, whole: Any, facenum: Any) -> None:
    """Move the kept faces of each mesh to its front and count them."""
    for mesh in meshes:
        n = 0
        for f in range(start[mesh], start[mesh] + count[mesh]):
            if keep[f]:
                for k in range(3):
                    for j in range(3):
                        faces[k][start[mesh] + n, j] = whole[k][f, j]
                n += 1
        facenum[mesh] = n


@njit(cache=True, nogil=True)
def _restore(meshes: Any, start: Any, count: Any, faces: Any, whole: Any, facenum: Any) -> None:
    """Undo `_compact`."""
    for mesh in meshes:
        for f in range(start[mesh], start[mesh] + facenum[mesh]):
            for k in range(3):
                for j in range(3):
                    faces[k][f, j] = whole[k][f, j]
        facenum[mesh] = count[mesh]
