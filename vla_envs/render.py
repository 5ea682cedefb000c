"""Pictures of environments: OpenGL without a screen, from any thread."""

import atexit
import contextlib
import importlib
import importlib.util
import os
import platform
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import mujoco
import numpy as np
from numpy.typing import NDArray

from vla_envs.culling import Culling, possible

EGL_PLATFORM_SURFACELESS_MESA = 0x31DD


class OpenGL:
    """The process's OpenGL contexts, each used by one thread at a time.

    Mesa's software OpenGL has two contexts, so that two threads draw side by side; a GPU, and what is no EGL,
    has one. Mesa's are on displays of their own, of which there are two: contexts on one display draw in turn
    for part of the way, and look into each other's lists without a lock (in 22.3, its
    lp_setup_is_resource_referenced), which ends the process once in some 75,000 pictures.

    Args:
        backend: ``"egl"``, ``"osmesa"``, ``"glfw"`` or ``"cgl"``.
    """

    def __init__(self, backend: str) -> None:
        if backend == "egl":
            _choose_gpu()
        os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa draws on the thread that asks
        self.backend = backend
        self._lock = threading.Lock()
        self._contexts = [_Context(backend, importlib.import_module(f"mujoco.{backend}"))]
        self.device = self._contexts[0].device
        #: Whether the processor draws (Mesa's llvmpipe or softpipe), not a GPU.
        self.software = "pipe" in self.device
        self._may_have_another = self.software and backend == "egl"

    @contextlib.contextmanager
    def current(self) -> Iterator["_Context"]:
        """A context that is current in this thread, and in no other, until the end of the block."""
        context = self._take()
        try:
            context.gl.make_current()
            context.free_dropped()
            yield context
            context.free_dropped()
        finally:
            context.release()
            context.lock.release()

    def _take(self) -> "_Context":
        for context in self._contexts:
            if context.lock.acquire(blocking=False):
                return context
        with self._lock:
            if self._may_have_another:
                self._may_have_another = False
                with contextlib.suppress(Exception):  # where it cannot be made, all threads share the first
                    another = _Context("egl", _surfaceless_egl())
                    if another.device == self.device:  # on a machine with a GPU it would be that
                        another.lock.acquire()
                        self._contexts.append(another)
                        return another
        context = self._contexts[threading.get_ident() % len(self._contexts)]
        context.lock.acquire()
        return context


def _surfaceless_egl() -> Any:
    """MuJoCo's module for EGL once more, with Mesa's surfaceless display in place of a device's."""
    spec: Any = importlib.util.find_spec("mujoco.egl")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    display = module.EGL.eglGetPlatformDisplayEXT(EGL_PLATFORM_SURFACELESS_MESA, None, None)
    module.EGL.eglInitialize(display, None, None)
    atexit.register(module.EGL.eglTerminate, display)
    module.EGL_DISPLAY = display
    return module


class _Context:
    """One OpenGL context, and what waits to be freed in it."""

    def __init__(self, backend: str, module: Any) -> None:
        module.GLContext._context = None  # else one that fails complains when it is collected
        self._backend, self._module = backend, module
        self.gl = module.GLContext(256, 256)
        self.lock = threading.Lock()
        self._dropped: list[mujoco.MjrContext] = []
        self.gl.make_current()
        try:
            from OpenGL import GL

            self.device = GL.glGetString(GL.GL_RENDERER).decode()  # type: ignore[attr-defined]
        finally:
            self.release()

    def release(self) -> None:
        """Let no context be current in this thread."""
        module = self._module
        if self._backend == "egl":
            none = module.EGL.EGL_NO_SURFACE, module.EGL.EGL_NO_SURFACE, module.EGL.EGL_NO_CONTEXT
            module.EGL.eglMakeCurrent(module.EGL_DISPLAY, *none)
        elif self._backend == "osmesa":
            module.osmesa.OSMesaMakeCurrent(None, None, module.GL.GL_FLOAT, 0, 0)
        elif self._backend == "glfw":
            module.glfw.make_context_current(None)

    def drop(self, buffers: mujoco.MjrContext) -> None:
        """Free ``buffers``, which live in this context, now or, while a thread draws, after its picture."""
        self._dropped.append(buffers)
        if self.lock.acquire(blocking=False):
            try:
                self.gl.make_current()
                self.free_dropped()
                self.release()
            finally:
                self.lock.release()

    def free_dropped(self) -> None:
        """Free what has been dropped; this context is current."""
        while self._dropped:
            self._dropped.pop().free()


Burners: TypeAlias = Sequence[tuple[int, int, float]]
_model_lock = threading.Lock()  # threads share models: held while a picture needs one to be changed
_opengl: OpenGL | None = None
_opengl_lock = threading.Lock()


def opengl() -> OpenGL:
    """The process's OpenGL: ``MUJOCO_GL`` where it is set, else the first backend that works.

    Raises:
        RuntimeError: When no backend can draw without a screen; names what was tried.
    """
    global _opengl
    with _opengl_lock:
        if _opengl is not None:
            return _opengl
        wanted = os.environ.get("MUJOCO_GL", "").lower()
        # Mesa's software OpenGL brings LLVM, and so does triton, which PyTorch's CUDA builds load late:
        # loaded after OpenGL it ends the process.
        if importlib.util.find_spec("triton"):
            importlib.import_module("triton")
        known = ("egl", "osmesa", "glfw", "cgl")
        default = ("cgl",) if platform.system() == "Darwin" else ("egl", "osmesa", "glfw")
        failures = []
        for backend in (wanted,) if wanted in known else default:
            try:
                _opengl = OpenGL(backend)
                return _opengl
            except (
                Exception
            ) as error:  # each backend fails in its own way: ImportError, EGLError, AttributeError ...
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


def _sample_positions() -> NDArray[np.float32]:
    """Where multisampling samples a pixel of the current buffer ``(n, 2)``, from its lower left corner."""
    from OpenGL import GL

    count = GL.glGetIntegerv(GL.GL_SAMPLES)
    positions = [GL.glGetMultisamplefv(GL.GL_SAMPLE_POSITION, k) for k in range(count)] or [(0.5, 0.5)]
    return np.array(positions, np.float32).reshape(-1, 2)


class Renderer:
    """Draws the cameras of one model into ``(size, size, 3)`` uint8 images, for several threads at once.

    Images are LIBERO's, turned by 180 degrees, as OpenVLA and every policy after it sees them. LIBERO hands
    out OpenGL's rows from the lowest up, so a turned image is upright but a mirror image of the scene.

    Args:
        model: The model.
        size: Height and width of the pictures in pixels.
        burners: Sites that glow, and are unseen else: ``(site, address in qpos, threshold)``.
    """

    def __init__(self, model: mujoco.MjModel, size: int, burners: Burners = ()) -> None:
        self.model, self.size, self.burners = model, size, burners
        self._canvases: dict[_Context, _Canvas] = {}
        self._opengl = opengl()
        with self._opengl.current() as context:  # what cannot be made fails here
            self._canvases[context] = _Canvas(model, size, burners, self._opengl.software)

    def draw(self, data: mujoco.MjData, camera: str) -> NDArray[np.uint8]:
        """The picture that ``camera`` takes of ``data``, a new array."""
        with self._opengl.current() as context:
            if context not in self._canvases:
                self._canvases[context] = _Canvas(self.model, self.size, self.burners, self._opengl.software)
            number = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
            return self._canvases[context].draw(data, number)

    def close(self) -> None:
        """Free what the graphics driver holds for this model."""
        while self._canvases:
            context, canvas = self._canvases.popitem()
            context.drop(canvas.buffers)

    def __del__(self) -> None:
        if not sys.is_finalizing() and hasattr(self, "_canvases"):
            self.close()


class _Canvas:
    """What a model needs to be drawn in one OpenGL context; made and used while that is current."""

    def __init__(self, model: mujoco.MjModel, size: int, burners: Burners, software: bool) -> None:
        self.model, self.burners = model, burners
        self.scene = mujoco.MjvScene(model, maxgeom=1000)
        exact = model.vis.quality.offsamples > 0  # else one of the scenes that we have made quick to draw
        if not exact:
            self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self.scene.flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = 0
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.option = mujoco.MjvOption()
        self.option.geomgroup[0] = 0  # collision shapes
        self.perturb = mujoco.MjvPerturb()
        self.buffers = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_resizeOffscreen(size, size, self.buffers)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.buffers)
        self.viewport = mujoco.MjrRect(0, 0, size, size)
        self.pixels = np.empty((size, size, 3), np.uint8)
        self.culling: Culling | None = None
        if exact and software and possible(model):
            self.culling = Culling(model, size, _sample_positions())

    def draw(self, data: mujoco.MjData, camera: int) -> NDArray[np.uint8]:
        self.camera.fixedcamid = camera
        with _model_lock:
            for site, address, threshold in self.burners:
                self.model.site_rgba[site, 3] = float(data.qpos[address] > threshold)
            mujoco.mjv_updateScene(
                self.model,
                data,
                self.option,
                self.perturb,
                self.camera,
                mujoco.mjtCatBit.mjCAT_ALL,
                self.scene,
            )
        if self.culling is not None:
            self.culling.mark(data, camera)
            with _model_lock:
                self.culling.upload(self.buffers)
        # Models share an OpenGL context: whichever drew last has left its own buffer bound.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.buffers)
        mujoco.mjr_render(self.viewport, self.scene, self.buffers)
        mujoco.mjr_readPixels(self.pixels, None, self.viewport, self.buffers)
        return self.pixels[::-1, ::-1].copy()
