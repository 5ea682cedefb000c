"""Images of environments, drawn with OpenGL without a screen, from any thread.

Other code, such as LIBERO's own environment, draws in the same process and relies on its OpenGL context to
stay current. So the context that was current in a thread is current again after each image, and displays are
left open at the end of the process.
"""

import contextlib
import gc
import importlib
import importlib.util
import os
import platform
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import mujoco
import numpy as np
from numpy.typing import NDArray

from vla_envs.culling import Culling, can_cull
from vla_envs.inputs import nearest
from vla_envs.looks import Change, Look

EGL_PLATFORM_SURFACELESS_MESA = 0x31DD
EMPTY = '<mujoco><visual><global offwidth="1" offheight="1"/><quality shadowsize="0"/></visual></mujoco>'
#: How to get what each backend needs.
NEEDS = {
    "egl": "on Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri",
    "osmesa": "on Debian or Ubuntu: apt-get install libosmesa6",
    "glfw": "glfw needs a screen; MUJOCO_GL=egl draws without one",
    "cgl": "cgl exists only on macOS",
}
#: Other values that MuJoCo accepts in ``MUJOCO_GL``; the backend is then the first that works.
NO_BACKEND = "glx wgl enable enabled on true 1 disable disabled off false 0".split()


class OpenGL:
    """The process's OpenGL contexts, each used by one thread at a time.

    Mesa's software OpenGL has two contexts, so that two threads draw side by side; a GPU has one, and so has
    any backend other than EGL. Each of Mesa's contexts has a display of its own, and there are two displays.
    Contexts on one display partly take turns, and read each other's lists without a lock (in 22.3, in its
    lp_setup_is_resource_referenced), which crashes the process about once in 75,000 images.

    Args:
        backend: ``"egl"``, ``"osmesa"``, ``"glfw"`` or ``"cgl"``.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._lock = threading.Lock()
        self._contexts = [_Context(backend)]
        self.device = self._contexts[0].device
        #: Whether the processor draws, with Mesa's llvmpipe or softpipe, instead of a GPU.
        self.software = "pipe" in self.device
        self._may_have_another = self.software and backend == "egl"

    @contextlib.contextmanager
    def current(self) -> Iterator["_Context"]:
        """A context that is current in this thread, and only here, until the end of the block."""
        context = self._take()
        try:
            with context.current():
                context.free_dropped()
                yield context
                context.free_dropped()
        finally:
            context.lock.release()

    def _take(self) -> "_Context":
        for context in self._contexts:
            if context.lock.acquire(blocking=False):
                return context
        with self._lock:
            if self._may_have_another:
                self._may_have_another = False
                with contextlib.suppress(Exception):  # if it cannot be made, all threads share the first
                    another = _Context("egl", surfaceless=True)
                    if another.device == self.device:  # on a machine with a GPU it could be the GPU
                        another.lock.acquire()
                        self._contexts.append(another)
                        return another
        context = self._contexts[threading.get_ident() % len(self._contexts)]
        context.lock.acquire()
        return context


def _private_copy(name: str) -> Any:
    """A second copy of a module, for us only: MuJoCo's modules keep a display, and we change what they do."""
    spec: Any = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Context:
    """One OpenGL context, and the buffers that wait to be freed in it."""

    def __init__(self, backend: str, surfaceless: bool = False) -> None:
        self._backend, self._module = backend, _private_copy(f"mujoco.{backend}")
        self._module.GLContext.free = lambda self: None  # it lives as long as the process
        self.lock = threading.Lock()
        self._dropped: list[mujoco.MjrContext] = []
        if backend == "glfw":
            self._module.glfw.init()  # without it GLFW does not know what is current
        api = self._module.EGL.eglQueryAPI() if backend == "egl" else None
        held = self.held()  # after a context is made, none is current
        try:
            with _environment(LP_NUM_THREADS="0"):  # Mesa draws on the calling thread
                if backend == "egl":
                    self._module.EGL_DISPLAY = self._display(surfaceless)
                self.gl = self._module.GLContext(256, 256)
        finally:
            if api is not None:
                self._module.EGL.eglBindAPI(api)
            self.hold(held)
        with self.current():
            from OpenGL import GL

            self.device = GL.glGetString(GL.GL_RENDERER).decode()  # type: ignore[attr-defined]
            # This fails where OpenGL can draw but MuJoCo cannot.
            model = mujoco.MjModel.from_xml_string(EMPTY)
            mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50).free()

    def _display(self, surfaceless: bool) -> Any:
        """EGL's display of a device, or Mesa's surfaceless one; others may use it, so it is never closed."""
        egl = self._module.EGL
        if surfaceless:
            display = egl.eglGetPlatformDisplayEXT(EGL_PLATFORM_SURFACELESS_MESA, None, None)
            egl.eglInitialize(display, None, None)
            return display
        with _environment(MUJOCO_EGL_DEVICE_ID=_gpu()):
            display = self._module.create_initialized_egl_device_display()
        if display == egl.EGL_NO_DISPLAY:
            raise RuntimeError(f"none of EGL's {len(_egl_devices())} devices can be used")
        return display

    def held(self) -> Any:
        """What is current in this thread, in this backend's words; None for none."""
        module = self._module
        if self._backend == "glfw":
            return module.glfw.get_current_context()
        if self._backend == "osmesa":
            osmesa = module.osmesa
            context = osmesa.OSMesaGetCurrentContext()
            if not context:
                return None
            width, height, _, pixels = osmesa.OSMesaGetColorBuffer(context)
            return context, pixels, osmesa.OSMesaGetIntegerv(osmesa.OSMESA_TYPE), width, height
        if self._backend == "cgl":
            return None
        egl = module.EGL
        context = egl.eglGetCurrentContext()
        if not context:
            return None
        surfaces = egl.eglGetCurrentSurface(egl.EGL_DRAW), egl.eglGetCurrentSurface(egl.EGL_READ)
        return egl.eglGetCurrentDisplay(), *surfaces, context

    def hold(self, held: Any) -> None:
        """Make what was ``held`` current in this thread; none, if its owner has destroyed it meanwhile."""
        module = self._module
        if self._backend == "glfw":
            module.glfw.make_context_current(held)
        elif self._backend == "osmesa":
            module.osmesa.OSMesaMakeCurrent(*(held or (None, None, module.GL.GL_FLOAT, 0, 0)))
        elif self._backend == "egl":
            egl = module.EGL
            with contextlib.suppress(module.error.GLError):
                if held and egl.eglMakeCurrent(*held):
                    return
            if egl.eglGetCurrentContext():
                none = egl.EGL_NO_SURFACE, egl.EGL_NO_SURFACE, egl.EGL_NO_CONTEXT
                egl.eglMakeCurrent(module.EGL_DISPLAY, *none)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make this context current in this thread until the end of the block, then the previous one."""
        held, outer = self.held(), _here.context
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, _here, "context", outer)
            _here.context = self
            try:
                self.gl.make_current()
            except Exception:
                # The context of a window, which EGL does not see, may be in the way.
                glfw: Any = sys.modules.get("glfw")
                window = glfw.get_current_context() if glfw else None
                if not window:
                    raise
                glfw.make_context_current(None)
                stack.callback(glfw.make_context_current, window)
                self.gl.make_current()
            stack.callback(self.hold, held)
            yield

    def drop(self, buffers: mujoco.MjrContext) -> None:
        """Free ``buffers``, which live in this context: now, or after the image that a thread is drawing."""
        self._dropped.append(buffers)
        if self.lock.acquire(blocking=False):
            try:
                with self.current():
                    self.free_dropped()
            finally:
                self.lock.release()

    def free_dropped(self) -> None:
        """Free the dropped buffers; this context has to be current."""
        while self._dropped:
            self._dropped.pop().free()


class _Here(threading.local):
    """The context of ours that a thread uses, and what was current when it began to collect garbage."""

    context: _Context | None = None
    held: Any = None


_here = _Here()


def _step_aside(phase: str, _: dict[str, int]) -> None:
    """Make no context current while Python collects garbage in a thread that uses one of ours.

    robosuite and others free buffers when their objects are collected, in whichever context is current. In
    ours, the same numbers are our buffers, and no later image would be right. The contexts of MuJoCo and
    robosuite leave none current when they are collected, and this image would not be drawn.
    """
    if _here.context is not None:
        if phase == "start":
            _here.held = _here.context.held()
        _here.context.hold(None if phase == "start" else _here.held)


gc.callbacks.append(_step_aside)

Burners: TypeAlias = Sequence[tuple[int, int, float]]
_model_lock = threading.Lock()  # threads share models; held while drawing changes one
_opengl: OpenGL | None = None
_opengl_lock = threading.Lock()


def opengl() -> OpenGL:
    """The process's OpenGL, with the backend in ``MUJOCO_GL`` or else the first one that works.

    Raises:
        ValueError: When an environment variable that chooses a backend or a device is wrong.
        RuntimeError: When no backend can draw without a screen; says why for each.
    """
    global _opengl
    with _opengl_lock:
        if _opengl is not None:
            return _opengl
        # Mesa's software OpenGL brings LLVM, and so does triton, which PyTorch's CUDA builds load late. If
        # triton is loaded after OpenGL, the process crashes.
        if importlib.util.find_spec("triton"):
            importlib.import_module("triton")
        pyopengl = os.environ.get("PYOPENGL_PLATFORM", "")
        tried, failures = [], []
        for backend in _backends():
            if pyopengl and backend in ("egl", "osmesa") and pyopengl.lower() != backend:
                failures.append(f"{backend}: PYOPENGL_PLATFORM is {pyopengl!r}; expected {backend!r} or none")
                continue
            tried.append(backend)
            loaded = set(sys.modules)
            with warnings.catch_warnings(record=True) as said:  # GLFW warns where others raise
                warnings.simplefilter("always")
                try:
                    _opengl = OpenGL(backend)
                    return _opengl
                except ValueError:  # a wrong setting
                    raise
                except Exception as error:  # each backend raises different ones
                    words = [str(w.message) for w in said if w.category.__name__ == "GLFWError"]
                    if isinstance(error, AttributeError):  # PyOpenGL has None in place of a library
                        words.append("its library cannot be loaded")
                    words.append(str(error) or type(error).__name__)
                    failures.append(f"{backend}: {' '.join(words[0].split())}")
            # PyOpenGL is loaded for one backend only, and would keep the next one from loading.
            for name in set(sys.modules) - loaded:
                if name.startswith(("OpenGL", f"mujoco.{backend}")):
                    del sys.modules[name]
            if not pyopengl:
                os.environ.pop("PYOPENGL_PLATFORM", None)
    raise RuntimeError(
        "; ".join(["there is no OpenGL to draw with", *failures, *(NEEDS[name] for name in tried[:1])])
    )


def _backends() -> list[str]:
    """The backends to try; only the one in ``MUJOCO_GL`` if it names one."""
    wanted = os.environ.get("MUJOCO_GL", "").lower().strip()
    if wanted in NEEDS:
        return [wanted]
    if wanted and wanted not in NO_BACKEND:
        names = list(NEEDS)
        raise ValueError(f"MUJOCO_GL is {wanted!r}; expected one of {names}{nearest(wanted, names)}")
    return ["cgl"] if platform.system() == "Darwin" else ["egl", "osmesa", "glfw"]


@contextlib.contextmanager
def _environment(**variables: str | None) -> Iterator[None]:
    """Set environment variables that are not set yet, until the end of the block; None sets nothing."""
    missing = {name: value for name, value in variables.items() if value and name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _number(name: str) -> int | None:
    """The number in an environment variable, or None if it is not set."""
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.strip().isdecimal():
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least 0")
    return int(value)


def _gpu() -> str | None:
    """What ``MUJOCO_EGL_DEVICE_ID`` is or should be: the GPU that PyTorch computes on.

    MuJoCo uses the device in ``MUJOCO_EGL_DEVICE_ID``, or else the first one that works. EGL counts all of
    the machine's GPUs, and PyTorch those in ``CUDA_VISIBLE_DEVICES``. Each process that ``torchrun`` starts
    uses the one with the number ``LOCAL_RANK``.
    """
    wanted, devices = _number("MUJOCO_EGL_DEVICE_ID"), len(_egl_devices())
    if wanted is not None:
        if 0 < devices <= wanted:
            raise ValueError(
                f"MUJOCO_EGL_DEVICE_ID is {wanted}; expected a number below {devices}, EGL's devices"
            )
        return str(wanted)
    torch: Any = sys.modules.get("torch")
    started = torch is not None and torch.cuda.is_initialized()
    index = torch.cuda.current_device() if started else _number("LOCAL_RANK") or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", str(index) if index else "").split(",")
    gpu = visible[min(index, len(visible) - 1)].strip()
    return gpu if gpu.isdigit() and int(gpu) < devices else None


def _egl_devices() -> list[Any]:
    """EGL's devices: the GPUs, and last Mesa's software."""
    return list(importlib.import_module("mujoco.egl").EGL.eglQueryDevicesEXT())


def _sample_positions() -> NDArray[np.float32]:
    """Where the current buffer's multisampling samples a pixel ``(n, 2)``, from its lower left corner."""
    from OpenGL import GL

    count = GL.glGetIntegerv(GL.GL_SAMPLES)
    positions = [GL.glGetMultisamplefv(GL.GL_SAMPLE_POSITION, k) for k in range(count)] or [(0.5, 0.5)]
    return np.array(positions, np.float32).reshape(-1, 2)


class Renderer:
    """Draws what a model's cameras see as ``(size, size, 3)`` uint8 images, for several threads at once.

    Images are LIBERO's turned by 180 degrees, as OpenVLA and every policy after it sees them. LIBERO returns
    OpenGL's rows from the lowest up, so a turned image is upright but mirrors the scene.

    Args:
        model: The model.
        size: Height and width of the images in pixels.
        burners: Sites that are visible only while they glow: ``(site, address in qpos, threshold)``.
    """

    def __init__(self, model: mujoco.MjModel, size: int, burners: Burners = ()) -> None:
        self.model, self.size, self.burners = model, size, burners
        self._canvases: dict[_Context, _Canvas] = {}
        self._opengl = opengl()
        with self._opengl.current() as context:  # it fails here if it cannot be made
            self._canvases[context] = _Canvas(model, size, burners, self._opengl.software)

    def draw(self, data: mujoco.MjData, camera: str, look: Look | None = None) -> NDArray[np.uint8]:
        """Draw what ``camera`` sees of ``data``, perturbed by ``look``; the image is a new array."""
        with self._opengl.current() as context:
            if context not in self._canvases:
                self._canvases[context] = _Canvas(self.model, self.size, self.burners, self._opengl.software)
            number = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
            return self._canvases[context].draw(data, number, look)

    def close(self) -> None:
        """Free what the graphics driver holds for this model."""
        while self._canvases:
            context, canvas = self._canvases.popitem()
            context.drop(canvas.buffers)

    def __del__(self) -> None:
        if not sys.is_finalizing() and hasattr(self, "_canvases"):
            self.close()


@contextlib.contextmanager
def _changed(changes: Iterable[Change]) -> Iterator[None]:
    """Write values into arrays, one after another, until the end of the block."""
    before: list[Change] = []
    try:
        for array, where, values in changes:
            before.append((array, where, array[where].copy()))
            array[where] = values
        yield
    finally:
        for array, where, values in reversed(before):
            array[where] = values


class _Canvas:
    """What drawing a model in one OpenGL context needs; it is made and used while that is current."""

    def __init__(self, model: mujoco.MjModel, size: int, burners: Burners, software: bool) -> None:
        self.model, self.burners = model, burners
        self.geoms = mujoco.MjvScene(model, maxgeom=1000)
        exact = model.vis.quality.offsamples > 0  # otherwise the scene was made quick to draw
        if not exact:
            self.geoms.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self.geoms.flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = 0
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.option = mujoco.MjvOption()
        self.option.geomgroup[0] = 0  # hides collision shapes
        self.perturb = mujoco.MjvPerturb()
        self.buffers = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_resizeOffscreen(size, size, self.buffers)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.buffers)
        self.viewport = mujoco.MjrRect(0, 0, size, size)
        self.pixels = np.empty((size, size, 3), np.uint8)
        self.culling: Culling | None = None
        if exact and software and can_cull(model):
            self.culling = Culling(model, size, _sample_positions())

    def draw(self, data: mujoco.MjData, camera: int, look: Look | None) -> NDArray[np.uint8]:
        self.camera.fixedcamid = camera
        with _changed(look.of_data(data) if look else ()):  # an environment's own, unlike its model
            self._draw(data, camera, look)
        return self.pixels[::-1, ::-1].copy()

    def _draw(self, data: mujoco.MjData, camera: int, look: Look | None) -> None:
        with _model_lock, _changed(look.of_model(self.model) if look else ()):
            for site, address, threshold in self.burners:
                self.model.site_rgba[site, 3] = float(data.qpos[address] > threshold)
            mujoco.mjv_updateScene(
                self.model,
                data,
                self.option,
                self.perturb,
                self.camera,
                mujoco.mjtCatBit.mjCAT_ALL,
                self.geoms,
            )
        if self.culling is not None:
            self.culling.mark(data, camera)
            with _model_lock:
                self.culling.upload(self.buffers)
        # Models share an OpenGL context, and the last one drawn has left its own buffer bound.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.buffers)
        mujoco.mjr_render(self.viewport, self.geoms, self.buffers)
        mujoco.mjr_readPixels(self.pixels, None, self.viewport, self.buffers)
