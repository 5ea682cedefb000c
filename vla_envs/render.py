"""One OpenGL context that draws every environment."""

import importlib
import importlib.util
import os
import platform
import sys
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from vla_envs.culling import Culling, possible

_context: Any = None  # the process's one OpenGL context


def _opengl_context() -> Any:
    """The process's OpenGL context: ``MUJOCO_GL`` where it is set, else the first backend that works.

    Raises:
        RuntimeError: When no backend can draw without a screen; names what was tried.
    """
    global _context
    if _context is not None:
        return _context
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    # Mesa's software OpenGL brings LLVM, and so does triton, which PyTorch's CUDA builds load late: loaded
    # after OpenGL it ends the process.
    if importlib.util.find_spec("triton"):
        importlib.import_module("triton")
    known = ("egl", "osmesa", "glfw", "cgl")
    default = ("cgl",) if platform.system() == "Darwin" else ("egl", "osmesa", "glfw")
    failures = []
    for backend in (wanted,) if wanted in known else default:
        try:
            if backend == "egl":
                _choose_gpu()
            context_type = importlib.import_module(f"mujoco.{backend}").GLContext
            context_type._context = None  # else one that fails complains again when it is collected
            _context = context_type(256, 256)
            _context.make_current()
            return _context
        except (
            Exception
        ) as error:  # each backend fails in its own way: ImportError, EGLError, AttributeError ...
            _context = None
            failures.append(f"{backend} ({type(error).__name__})")
    raise RuntimeError(
        f"no OpenGL to draw with; tried {', '.join(failures)}; on Debian or Ubuntu: "
        "apt-get install libegl1 libgl1-mesa-dri"
    )


def _choose_gpu() -> None:
    """Let EGL draw on the GPU that PyTorch computes on, where there are several.

    MuJoCo takes the number in ``MUJOCO_EGL_DEVICE_ID``, else the first device that works. EGL counts all
    GPUs of the machine, PyTorch those in ``CUDA_VISIBLE_DEVICES``, of which each process that ``torchrun``
    starts uses the one of its ``LOCAL_RANK``.
    """
    torch: Any = sys.modules.get("torch")
    started = torch is not None and torch.cuda.is_initialized()
    index = torch.cuda.current_device() if started else int(os.environ.get("LOCAL_RANK", 0))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", str(index) if index else "").split(",")
    gpu = visible[min(index, len(visible) - 1)].strip()
    if gpu.isdigit() and int(gpu) < len(_egl_devices()):
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", gpu)


def _egl_devices() -> list[Any]:
    """EGL's devices: GPUs and, last, Mesa's software."""
    return list(importlib.import_module("mujoco.egl").EGL.eglQueryDevicesEXT())


def _software() -> bool:
    """Whether the processor draws (Mesa's llvmpipe or softpipe), not a GPU."""
    from OpenGL import GL

    return b"pipe" in GL.glGetString(GL.GL_RENDERER)


def _sample_positions() -> NDArray[np.float32]:
    """Where multisampling samples a pixel of the current buffer ``(n, 2)``, from its lower left corner."""
    from OpenGL import GL

    count = GL.glGetIntegerv(GL.GL_SAMPLES)
    positions = [GL.glGetMultisamplefv(GL.GL_SAMPLE_POSITION, k) for k in range(count)] or [(0.5, 0.5)]
    return np.array(positions, np.float32).reshape(-1, 2)


class Renderer:
    """Draws the cameras of one model into ``(size, size, 3)`` uint8 images.

    Images are LIBERO's, turned by 180 degrees, as OpenVLA and every policy after it sees them. LIBERO hands
    out OpenGL's rows from the lowest up, so a turned image is upright but a mirror image of the scene.
    """

    def __init__(self, model: mujoco.MjModel, size: int) -> None:
        self.model, self.size = model, size
        self._gl = _opengl_context()
        self._gl.make_current()
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        exact = model.vis.quality.offsamples > 0  # else one of the scenes that we have made quick to draw
        if not exact:
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._option = mujoco.MjvOption()
        self._option.geomgroup[0] = 0  # collision shapes
        self._perturb = mujoco.MjvPerturb()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_resizeOffscreen(size, size, self._context)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        self._pixels = np.empty((size, size, 3), np.uint8)
        self._culling: Culling | None = None
        if exact and _software() and possible(model):
            self._culling = Culling(model, size, _sample_positions())

    def draw(self, data: mujoco.MjData, camera: str) -> NDArray[np.uint8]:
        """The picture that ``camera`` takes of ``data``, a new array."""
        self._gl.make_current()
        self._camera.fixedcamid = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        mujoco.mjv_updateScene(
            self.model,
            data,
            self._option,
            self._perturb,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL,
            self._scene,
        )
        if self._culling is not None:
            self._culling.upload(data, self._camera.fixedcamid, self._context)
        # Models share one OpenGL context: whichever drew last has left its own buffer bound.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._viewport, self._context)
        return self._pixels[::-1, ::-1].copy()

    def close(self) -> None:
        """Free what the graphics driver holds for this model."""
        self._gl.make_current()
        self._context.free()
