"""Pictures of environments: OpenGL without a screen, from any thread.

Others draw in the same process, LIBERO's own environment for one, and count on their OpenGL context to stay
current. So what was current in a thread is so again after each picture, and displays are left as they are at
the process's end.
"""

import contextlib
import importlib
import importlib.util
import os
import platform
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import mujoco
import numpy as np
from numpy.typing import NDArray

from vla_envs.culling import Culling, possible
from vla_envs.inputs import nearest

EGL_PLATFORM_SURFACELESS_MESA = 0x31DD
EMPTY = '<mujoco><visual><global offwidth="1" offheight="1"/><quality shadowsize="0"/></visual></mujoco>'
#: What each backend needs.
NEEDS = {
    "egl": "on Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri",
    "osmesa": "on Debian or Ubuntu: apt-get install libosmesa6",
    "glfw": "glfw needs a screen; MUJOCO_GL=egl draws without one",
    "cgl": "cgl is macOS's",
}
#: What MuJoCo takes in ``MUJOCO_GL`` beside these names; the backend is then the first that works.
NO_BACKEND = "glx wgl enable enabled on true 1 disable disabled off false 0".split()


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
        self.backend = backend
        self._lock = threading.Lock()
        self._contexts = [_Context(backend)]
        self.device = self._contexts[0].device
        #: Whether the processor draws (Mesa's llvmpipe or softpipe), not a GPU.
        self.software = "pipe" in self.device
        self._may_have_another = self.software and backend == "egl"

    @contextlib.contextmanager
    def current(self) -> Iterator["_Context"]:
        """A context that is current in this thread, and in no other, until the end of the block."""
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
                with contextlib.suppress(Exception):  # where it cannot be made, all threads share the first
                    another = _Context("egl", surfaceless=True)
                    if another.device == self.device:  # on a machine with a GPU it would be that
                        another.lock.acquire()
                        self._contexts.append(another)
                        return another
        context = self._contexts[threading.get_ident() % len(self._contexts)]
        context.lock.acquire()
        return context


def _module_of_our_own(name: str) -> Any:
    """A module once more, for us alone: MuJoCo's keep a display, and we change what they do."""
    spec: Any = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Context:
    """One OpenGL context, and what waits to be freed in it."""

    def __init__(self, backend: str, surfaceless: bool = False) -> None:
        self._backend, self._module = backend, _module_of_our_own(f"mujoco.{backend}")
        self._module.GLContext.free = lambda self: None  # lives as long as the process
        self.lock = threading.Lock()
        self._dropped: list[mujoco.MjrContext] = []
        if backend == "glfw":
            self._module.glfw.init()  # else it does not know what is current
        api = self._module.EGL.eglQueryAPI() if backend == "egl" else None
        again = self._remember()  # making a context lets none be current
        try:
            with _environment(LP_NUM_THREADS="0"):  # Mesa draws on the thread that asks
                if backend == "egl":
                    self._module.EGL_DISPLAY = self._display(surfaceless)
                self.gl = self._module.GLContext(256, 256)
        finally:
            if api is not None:
                self._module.EGL.eglBindAPI(api)
            again()
        with self.current():
            from OpenGL import GL

            self.device = GL.glGetString(GL.GL_RENDERER).decode()  # type: ignore[attr-defined]
            # Fails where MuJoCo cannot draw though OpenGL can.
            model = mujoco.MjModel.from_xml_string(EMPTY)
            mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50).free()

    def _display(self, surfaceless: bool) -> Any:
        """EGL's display, of a device or Mesa's surfaceless one. It may be others' too, so nobody ends it."""
        egl = self._module.EGL
        if surfaceless:
            display = egl.eglGetPlatformDisplayEXT(EGL_PLATFORM_SURFACELESS_MESA, None, None)
            egl.eglInitialize(display, None, None)
            return display
        with _environment(MUJOCO_EGL_DEVICE_ID=_gpu()):
            display = self._module.create_initialized_egl_device_display()
        if display == egl.EGL_NO_DISPLAY:
            raise RuntimeError(f"none of {len(_egl_devices())} devices can be used")
        return display

    def _remember(self) -> Callable[[], object]:
        """What makes current in this thread again what is now; none where its owner has destroyed it."""
        module = self._module
        if self._backend == "glfw":
            return partial(module.glfw.make_context_current, module.glfw.get_current_context())
        if self._backend == "osmesa":
            osmesa = module.osmesa
            context = osmesa.OSMesaGetCurrentContext()
            if not context:
                return partial(osmesa.OSMesaMakeCurrent, None, None, module.GL.GL_FLOAT, 0, 0)
            width, height, _, pixels = osmesa.OSMesaGetColorBuffer(context)
            kind = osmesa.OSMesaGetIntegerv(osmesa.OSMESA_TYPE)
            return partial(osmesa.OSMesaMakeCurrent, context, pixels, kind, width, height)
        if self._backend == "cgl":
            return lambda: None
        egl = module.EGL
        context = egl.eglGetCurrentContext()
        held = context and (
            egl.eglGetCurrentDisplay(),
            egl.eglGetCurrentSurface(egl.EGL_DRAW),
            egl.eglGetCurrentSurface(egl.EGL_READ),
            context,
        )

        def again() -> None:
            with contextlib.suppress(module.error.GLError):
                if held and egl.eglMakeCurrent(*held):
                    return
            if egl.eglGetCurrentContext():
                none = egl.EGL_NO_SURFACE, egl.EGL_NO_SURFACE, egl.EGL_NO_CONTEXT
                egl.eglMakeCurrent(module.EGL_DISPLAY, *none)

        return again

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """This context is current in this thread until the end of the block, then what was before."""
        back = self._remember()
        with contextlib.ExitStack() as stack:
            try:
                self.gl.make_current()
            except Exception:
                # A window's context, which EGL does not see, is in the way.
                glfw: Any = sys.modules.get("glfw")
                window = glfw.get_current_context() if glfw else None
                if not window:
                    raise
                glfw.make_context_current(None)
                stack.callback(glfw.make_context_current, window)
                self.gl.make_current()
            stack.callback(back)
            yield

    def drop(self, buffers: mujoco.MjrContext) -> None:
        """Free ``buffers``, which live in this context, now or, while a thread draws, after its picture."""
        self._dropped.append(buffers)
        if self.lock.acquire(blocking=False):
            try:
                with self.current():
                    self.free_dropped()
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
        ValueError: When an environment variable that chooses is wrong.
        RuntimeError: When no backend can draw without a screen; says what each said.
    """
    global _opengl
    with _opengl_lock:
        if _opengl is not None:
            return _opengl
        # Mesa's software OpenGL brings LLVM, and so does triton, which PyTorch's CUDA builds load late:
        # loaded after OpenGL it ends the process.
        if importlib.util.find_spec("triton"):
            importlib.import_module("triton")
        pyopengl = os.environ.get("PYOPENGL_PLATFORM", "")
        tried, failures = [], []
        for backend in _backends():
            if pyopengl and backend in ("egl", "osmesa") and pyopengl.lower() != backend:
                failures.append(f"{backend}: PYOPENGL_PLATFORM is {pyopengl!r}, expected {backend!r} or none")
                continue
            tried.append(backend)
            loaded = set(sys.modules)
            with warnings.catch_warnings(record=True) as said:  # by GLFW, which raises nothing
                warnings.simplefilter("always")
                try:
                    _opengl = OpenGL(backend)
                    return _opengl
                except ValueError:  # a setting that is wrong
                    raise
                except Exception as error:  # each backend fails in its own way
                    words = [str(w.message) for w in said if w.category.__name__ == "GLFWError"]
                    if isinstance(error, AttributeError):  # of PyOpenGL's None in place of a library
                        words.append("its library cannot be loaded")
                    words.append(str(error) or type(error).__name__)
                    failures.append(f"{backend}: {' '.join(words[0].split())}")
            # PyOpenGL is loaded for one backend, and would keep the next from being loaded.
            for name in set(sys.modules) - loaded:
                if name.startswith(("OpenGL", f"mujoco.{backend}")):
                    del sys.modules[name]
            if not pyopengl:
                os.environ.pop("PYOPENGL_PLATFORM", None)
    raise RuntimeError("; ".join(["no OpenGL to draw with", *failures, *(NEEDS[name] for name in tried[:1])]))


def _backends() -> list[str]:
    """The backends to try: ``MUJOCO_GL`` where it names one."""
    wanted = os.environ.get("MUJOCO_GL", "").lower().strip()
    if wanted in NEEDS:
        return [wanted]
    if wanted and wanted not in NO_BACKEND:
        names = list(NEEDS)
        raise ValueError(f"MUJOCO_GL is {wanted!r}; expected one of {names}{nearest(wanted, names)}")
    return ["cgl"] if platform.system() == "Darwin" else ["egl", "osmesa", "glfw"]


@contextlib.contextmanager
def _environment(**variables: str | None) -> Iterator[None]:
    """Set environment variables that are not set, until the end of the block; None leaves one alone."""
    missing = {name: value for name, value in variables.items() if value and name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _number(name: str) -> int | None:
    """What an environment variable says, where it is set."""
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.strip().isdecimal():
        raise ValueError(f"{name} is {value!r}; expected a number from 0 up")
    return int(value)


def _gpu() -> str | None:
    """What ``MUJOCO_EGL_DEVICE_ID`` is or should be: the GPU that PyTorch computes on, of several.

    MuJoCo takes the number in ``MUJOCO_EGL_DEVICE_ID``, else the first device that works. EGL counts all
    GPUs of the machine, PyTorch those in ``CUDA_VISIBLE_DEVICES``, of which each process that ``torchrun``
    starts uses the one of its ``LOCAL_RANK``.
    """
    wanted, devices = _number("MUJOCO_EGL_DEVICE_ID"), len(_egl_devices())
    if wanted is not None:
        if 0 < devices <= wanted:
            raise ValueError(
                f"MUJOCO_EGL_DEVICE_ID is {wanted}; expected a number below {devices}: EGL's devices"
            )
        return str(wanted)
    torch: Any = sys.modules.get("torch")
    started = torch is not None and torch.cuda.is_initialized()
    index = torch.cuda.current_device() if started else _number("LOCAL_RANK") or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", str(index) if index else "").split(",")
    gpu = visible[min(index, len(visible) - 1)].strip()
    return gpu if gpu.isdigit() and int(gpu) < devices else None


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
