"""Pictures: LIBERO's, turned by 180 degrees, and the same for the same state."""

import ctypes.util
import gc
import importlib
import os
import subprocess
import sys
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import mujoco
import numpy as np
import pytest

import vla_envs.render
from vla_envs.render import Renderer, opengl
from vla_envs.scene import load_scene
from vla_envs.simulation import Simulation

SIZE = 64
CAMERAS = ("agentview", "robot0_eye_in_hand")


def settled(task_id=4, seed=0):
    scene = load_scene("LiberoObject", task_id)
    simulation = Simulation(scene)
    qpos = scene.sample_init_state(np.random.default_rng(seed))
    simulation.copy_from(simulation.settle(qpos, 3, -1.0), False)
    return simulation


@pytest.fixture(scope="module")
def simulation():
    return settled()


@pytest.fixture(scope="module")
def renderer(simulation):
    renderer = Renderer(simulation.scene.model, SIZE)
    yield renderer
    renderer.close()


@pytest.mark.parametrize("camera", CAMERAS)
def test_same_state_same_pixels(simulation, renderer, camera):
    """Whatever was drawn in between, by this renderer or by another."""
    first = renderer.draw(simulation.data, camera)
    renderer.draw(settled(seed=1).data, camera)
    other = Renderer(simulation.scene.model, 32)
    assert other.draw(simulation.data, camera).shape == (32, 32, 3)
    assert np.array_equal(renderer.draw(simulation.data, camera), first)
    other.close()
    assert np.array_equal(renderer.draw(simulation.data, camera), first)
    assert np.array_equal(renderer.draw(settled().data, camera), first)
    assert first.shape == (SIZE, SIZE, 3) and first.dtype == np.uint8 and first.std() > 10


def test_another_state_and_another_camera_look_different(simulation, renderer):
    agentview, hand = (renderer.draw(simulation.data, camera) for camera in CAMERAS)
    assert np.abs(agentview.astype(int) - hand).mean() > 5
    assert np.any(agentview != renderer.draw(settled(seed=1).data, "agentview"))


def test_no_memory_for_shadows_that_are_not_drawn(simulation):
    """A map of them would take 64 MB a renderer."""
    assert simulation.scene.model.vis.quality.shadowsize == 0


def test_pictures_are_arrays_of_their_own(simulation, renderer):
    first = renderer.draw(simulation.data, "agentview")
    copy = first.copy()
    renderer.draw(simulation.data, "robot0_eye_in_hand")
    assert np.array_equal(first, copy)


@pytest.mark.parametrize("camera", CAMERAS)
def test_pictures_are_mujocos_mirrored(simulation, renderer, camera):
    """MuJoCo's renderer hands out upright pictures; LIBERO's, turned by 180 degrees, are mirrored."""
    option = mujoco.MjvOption()
    option.geomgroup[0] = 0
    option.sitegroup[:] = 0
    model = simulation.scene.model
    with vla_envs.render.opengl().current(), mujoco.Renderer(model, SIZE, SIZE) as theirs:
        theirs.update_scene(simulation.data, camera, option)
        theirs.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        theirs.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        reference = theirs.render()[:, ::-1]
    mine = renderer.draw(simulation.data, camera)
    assert np.abs(mine.astype(int) - reference).mean() < 0.5
    assert np.abs(mine.astype(int) - reference[:, ::-1]).mean() > 5  # a mirror image matters


@pytest.fixture
def robosuites(libero, simulation):
    """robosuite's simulation of the same model, and its renderer."""
    from robosuite.utils.binding_utils import MjRenderContextOffscreen, MjSim

    sim = MjSim(simulation.scene.model)
    option = MjRenderContextOffscreen(sim, device_id=-1, max_width=SIZE, max_height=SIZE).vopt
    option.geomgroup[0] = 0
    option.sitegroup[:] = 0  # LIBERO takes the colour from its sites instead
    yield sim
    # They hold each other, and left to the garbage collection it frees its buffers in another's context.
    sim._render_context_offscreen = None


@pytest.mark.parametrize("camera", CAMERAS)
def test_pictures_are_liberos_turned_by_180_degrees(robosuites, simulation, renderer, camera):
    """robosuite draws the same model with the settings of its environments: the same pixels."""
    robosuites.data.qpos[:] = simulation.data.qpos
    robosuites.forward()
    raw = robosuites.render(camera_name=camera, width=SIZE, height=SIZE)
    assert np.array_equal(renderer.draw(simulation.data, camera), raw[::-1, ::-1])
    again = robosuites.render(camera_name=camera, width=SIZE, height=SIZE)  # the context is theirs again
    assert np.array_equal(again, raw)


def test_upright(simulation, renderer):
    """Which way the ketchup moves in the picture when it moves in the scene."""
    scene, data = simulation.scene, mujoco.MjData(simulation.scene.model)
    start = scene.model.jnt_qposadr[scene.model.joint("ketchup_1_joint0").id]

    def where(position):
        """Row and column of the ketchup, seen as what changes when it is taken away."""
        pictures = []
        for height in (0, -5):
            data.qpos[:] = simulation.data.qpos
            data.qpos[start : start + 3] = position[0], position[1], position[2] + height
            mujoco.mj_forward(scene.model, data)
            pictures.append(renderer.draw(data, "agentview").astype(int))
        changed = np.abs(pictures[0] - pictures[1]).sum(2) > 30
        assert changed.any()
        return np.argwhere(changed).mean(0)

    centre = where((0.0, 0.0, 0.2))
    assert where((0.0, 0.0, 0.4))[0] < centre[0] - 3  # higher up in the scene is higher in the picture
    assert where((0.15, 0.0, 0.2))[0] > centre[0] + 3  # nearer to the camera is lower
    # The camera looks back at the robot, so that +y is on its right and in the mirror image on the left.
    assert where((0.0, 0.15, 0.2))[1] < centre[1] - 3


def test_renderers_of_two_models_side_by_side(simulation, renderer):
    before = renderer.draw(simulation.data, "agentview")
    other = settled(task_id=0)
    second = Renderer(other.scene.model, SIZE)
    alone = second.draw(other.data, "agentview")
    assert np.array_equal(renderer.draw(simulation.data, "agentview"), before)
    assert np.array_equal(second.draw(other.data, "agentview"), alone)
    second.close()


def test_threads_draw_at_once(simulation, renderer):
    """Two at a time in contexts of their own, and the same pixels; closed, nothing is left of them."""
    expected = {camera: renderer.draw(simulation.data, camera) for camera in CAMERAS}
    shared, start = Renderer(simulation.scene.model, SIZE), threading.Barrier(4)

    def draw(k):
        start.wait()
        camera = CAMERAS[k % 2]
        return all(np.array_equal(shared.draw(simulation.data, camera), expected[camera]) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(draw, range(4)))
    contexts = list(shared._canvases)
    assert 1 <= len(contexts) <= 2
    shared.close()
    assert not shared._canvases and not any(context._dropped for context in contexts)


def test_contexts_of_software_are_on_displays_of_their_own():
    """On one display Mesa 22.3 looks into the lists of the other context, without a lock."""
    found = opengl()
    if not found.software or found.backend != "egl":
        pytest.skip(f"{found.backend} on {found.device} has one context")
    with found.current() as one, ThreadPoolExecutor(1) as pool:

        def another():
            with found.current() as context:
                return context

        two = pool.submit(another).result()
    assert one is not two and one.device == two.device
    assert one._module.EGL_DISPLAY.address != two._module.EGL_DISPLAY.address
    assert len(found._contexts) == 2  # and never a third


def test_what_is_closed_while_its_context_draws_is_freed_afterwards(simulation):
    doomed = Renderer(simulation.scene.model, 32)
    with doomed._opengl.current() as context:
        doomed._canvases = {context: vla_envs.render._Canvas(doomed.model, 32, (), doomed._opengl.software)}
        doomed.close()
        assert len(context._dropped) == 1
    assert not context._dropped


def test_a_burner_glows_while_it_is_on():
    scene = load_scene("LiberoGoal", 7)
    _, address, threshold = scene.burners[0]
    simulation, pictures = Simulation(scene), []
    renderer = Renderer(scene.model, SIZE, scene.burners)
    for angle in (threshold - 0.1, threshold + 0.1, threshold - 0.1):
        simulation.restore(scene.recorded_init_state(0))
        simulation.data.qpos[address] = angle
        mujoco.mj_forward(scene.model, simulation.data)
        pictures.append(renderer.draw(simulation.data, "agentview").astype(int))
    assert np.array_equal(pictures[0], pictures[2])
    assert (np.abs(pictures[1] - pictures[0]).sum(2) > 30).sum() > 5
    renderer.close()


# ---- Others who draw in the same process -----------------------------------------------------------------


def egl_of(found):
    """MuJoCo's module for EGL, or a skip."""
    if found.backend != "egl":
        pytest.skip(f"{found.backend} is not EGL")
    return importlib.import_module("mujoco.egl")


def address(context):
    """Of an EGL context; None for none."""
    return context.address if context else None


def test_others_draw_on(make_vec, monkeypatch):
    """Gymnasium's environments make their OpenGL context current once and never again."""
    monkeypatch.setenv("MUJOCO_GL", opengl().backend)
    other = gym.make("HalfCheetah-v5", render_mode="rgb_array", width=SIZE, height=SIZE)
    other.reset(seed=0)
    before = other.render()
    assert before.std() > 10
    for num_threads in (1, 2):
        envs = make_vec(render_mode="rgb_array", num_threads=num_threads)
        for draw in (
            lambda envs=envs: envs.reset(seed=0),
            lambda envs=envs: envs.step(np.zeros((2, 7))),
            envs.render,
            envs.close,
        ):
            draw()
            assert np.array_equal(other.render(), before)
    other.close()


def test_others_are_collected_while_we_draw(robosuites, simulation):
    """robosuite frees its buffers by their numbers, which are ours too, and leaves no context current."""
    fresh = vla_envs.render._Context(opengl().backend)  # its numbers begin at the same one
    cameras = [simulation.scene.model.camera(name).id for name in CAMERAS]
    fresh.hold(None)  # theirs is current, and would be again after the block
    with fresh.current():
        canvas = vla_envs.render._Canvas(simulation.scene.model, SIZE, (), opengl().software)
        before = [canvas.draw(simulation.data, camera, None) for camera in cameras]
        cycle = [vars(robosuites).pop("_render_context_offscreen")]
        cycle.append(cycle)
        theirs = weakref.ref(cycle[0])
        del cycle
        gc.collect()
        assert theirs() is None
        after = [canvas.draw(simulation.data, camera, None) for camera in cameras]
        canvas.buffers.free()
    assert np.array_equal(after, before)


@pytest.mark.parametrize("backend", ["osmesa", "glfw"])
def test_others_draw_on_with_another_backend(backend):
    there = ctypes.util.find_library("OSMesa") if backend == "osmesa" else os.environ.get("DISPLAY")
    if not there:
        pytest.skip(f"no {backend} here")
    code = (
        "import gymnasium as gym, numpy as np, vla_envs\n"
        "other = gym.make('HalfCheetah-v5', render_mode='rgb_array'); other.reset(seed=0)\n"
        "envs = gym.make_vec('vla_envs/LiberoObject-v0', num_envs=1, task_id=4, image_size=16)\n"
        "before = other.render(); envs.reset(seed=0); after = other.render(); envs.close()\n"
        "print(before.std() > 10 and np.array_equal([after, other.render()], [before, before]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYOPENGL_PLATFORM"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment | {"MUJOCO_GL": backend}
    )
    assert done.stdout.strip() == "True", done.stderr


def test_each_thread_has_its_context_again(simulation, renderer):
    """Also two threads, which draw by turns in the contexts that there are."""
    egl, start = egl_of(opengl()), threading.Barrier(3)

    def draw(k):
        theirs = egl.GLContext(1, 1) if k else None  # one thread has none
        if theirs:
            theirs.make_current()
        start.wait()
        for _ in range(10):
            renderer.draw(simulation.data, CAMERAS[0])
            now = address(egl.EGL.eglGetCurrentContext())
            assert now == (address(theirs._context) if theirs else None)
        if theirs:
            theirs.free()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(draw, range(3)))


def test_a_context_that_is_gone_meanwhile_stays_gone():
    egl = egl_of(opengl())
    theirs = egl.GLContext(1, 1)
    theirs.make_current()
    with opengl().current():
        egl.EGL.eglDestroyContext(egl.EGL_DISPLAY, theirs._context)
        theirs._context = None
    assert not egl.EGL.eglGetCurrentContext()


def test_buffers_are_freed_while_the_other_context_draws(simulation):
    """A renderer may be collected at any time, for instance while this thread draws in the other context."""
    found = opengl()
    egl = egl_of(found).EGL
    with found.current() as one, ThreadPoolExecutor(1) as pool:
        doomed = pool.submit(Renderer, simulation.scene.model, 32).result()
        if one in doomed._canvases:
            pytest.skip(f"{found.device} has one context")
        two = next(iter(doomed._canvases))
        doomed.close()
        assert not two._dropped and address(egl.eglGetCurrentContext()) == address(one.gl._context)
    assert not egl.eglGetCurrentContext()


def test_a_windows_context_steps_aside(monkeypatch):
    """That of GLX keeps EGL's from being current in the same thread."""
    window, current = object(), []
    glfw = types.SimpleNamespace(
        get_current_context=lambda: current[-1] if current else None, make_context_current=current.append
    )
    with opengl().current() as context:
        make_current = context.gl.make_current

    def make_current_unless_there_is_a_window():
        if glfw.get_current_context():
            raise RuntimeError("EGL_BAD_ACCESS")
        make_current()

    monkeypatch.setitem(sys.modules, "glfw", glfw)
    monkeypatch.setattr(context.gl, "make_current", make_current_unless_there_is_a_window)
    glfw.make_context_current(window)
    with context.current():
        assert glfw.get_current_context() is None
    assert current == [window, None, window]


def test_the_environment_is_left_alone(monkeypatch):
    """Children and other libraries read it."""
    backend = opengl().backend
    for name in ("LP_NUM_THREADS", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    before = dict(os.environ)
    vla_envs.render.OpenGL(backend)
    assert dict(os.environ) == before


def test_others_draw_until_the_end():
    """Displays belong to the process: at exit ours is not ended. And ``mujoco.Renderer`` has its backend."""
    egl_of(opengl())
    code = (
        "import atexit, vla_envs.render, mujoco; print(mujoco.GLContext.__module__)\n"
        "from mujoco import egl; display = egl.create_initialized_egl_device_display()\n"
        "show = lambda: print(egl.EGL.eglQueryString(display, egl.EGL.EGL_VERSION).decode())\n"
        "atexit.register(show)\n"
        "vla_envs.render.opengl()"
    )
    environment = os.environ | {"MUJOCO_GL": "egl"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("mujoco.egl\n1.") and not done.stderr, done.stdout + done.stderr


# ---- No OpenGL -------------------------------------------------------------------------------------------


@pytest.fixture
def first_time(monkeypatch):
    """As if nothing had been drawn yet; sets environment variables, the others that choose are not set."""

    def first_time(**variables):
        monkeypatch.setattr(vla_envs.render, "_opengl", None)
        for name in ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return first_time


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MUJOCO_GL": "elg"}, r"^MUJOCO_GL is 'elg'; expected one of \[.*\]; did you mean 'egl'\?$"),
        (
            {"MUJOCO_EGL_DEVICE_ID": "99"},
            r"^MUJOCO_EGL_DEVICE_ID is 99; expected a number below \d+, EGL's devices$",
        ),
        (
            {"MUJOCO_EGL_DEVICE_ID": "x"},
            r"^MUJOCO_EGL_DEVICE_ID is 'x'; expected a whole number of at least 0$",
        ),
        ({"LOCAL_RANK": "-1"}, r"^LOCAL_RANK is '-1'; expected a whole number of at least 0$"),
    ],
)
def test_a_wrong_setting_is_named(first_time, variables, words):
    egl_of(opengl())
    first_time(**variables)
    with pytest.raises(ValueError, match=words):
        opengl()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MUJOCO_GL": "cgl"}, r"^there is no OpenGL to draw with; cgl: .+; cgl exists only on macOS$"),
        (
            {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "osmesa"},
            r"^there is no OpenGL to draw with; egl: PYOPENGL_PLATFORM is 'osmesa'; expected 'egl' or none$",
        ),
    ],
)
def test_a_backend_that_does_not_work_says_why(first_time, variables, words):
    first_time(**variables)
    with pytest.raises(RuntimeError, match=words):
        opengl()


def test_what_each_backend_says_and_the_package_of_the_first(first_time, monkeypatch):
    def fail(backend):
        raise {"egl": AttributeError("None"), "osmesa": ImportError("no\nlibOSMesa"), "glfw": KeyError()}[
            backend
        ]

    first_time()
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    monkeypatch.setattr(vla_envs.render, "OpenGL", fail)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    with pytest.raises(RuntimeError) as caught:
        opengl()
    assert str(caught.value) == (
        "there is no OpenGL to draw with; egl: its library cannot be loaded; osmesa: no libOSMesa; "
        "glfw: KeyError; "
        "on Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri"
    )


def test_a_backend_that_fails_leaves_nothing_in_the_way_of_the_next(first_time, monkeypatch):
    """PyOpenGL is loaded for one kind of OpenGL, and says so in the environment."""

    def of_osmesa(backend):
        if backend == "egl":
            monkeypatch.setitem(sys.modules, "OpenGL.of_egl", types.ModuleType("OpenGL.of_egl"))
            os.environ["PYOPENGL_PLATFORM"] = "egl"
            raise ImportError("no device")
        assert "OpenGL.of_egl" not in sys.modules and "PYOPENGL_PLATFORM" not in os.environ
        return backend

    first_time()
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    monkeypatch.setattr(vla_envs.render, "OpenGL", of_osmesa)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert opengl() == "osmesa"


MIRROR = """
<mujoco>
  <visual><quality offsamples="{samples}" shadowsize="0"/></visual>
  <asset>
    <material name="lamp" rgba="1 1 1 1" emission="1"/>
    <material name="steel" rgba="0.2 0.2 0.2 1" reflectance="{reflectance}"/>
  </asset>
  <worldbody>
    <light pos="0 0 2"/>
    <geom type="box" size="0.5 0.5 0.1" material="steel" group="1"/>
    <geom type="sphere" pos="0 1 1.1" size="0.4" material="lamp" group="1"/>
    <camera name="above" pos="0 -1 1" xyaxes="1 0 0 0 1 1"/>
  </worldbody>
</mujoco>
"""


@pytest.mark.parametrize("samples", [0, 4])  # the scenes that we have made quick to draw, and LIBERO's
def test_mirrors_show_what_the_camera_does_not(samples):
    """The steel of LIBERO's stove is white by what it reflects."""
    brightness = []
    for reflectance in (0.0, 0.5):
        model = mujoco.MjModel.from_xml_string(MIRROR.format(samples=samples, reflectance=reflectance))
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        renderer = Renderer(model, SIZE)
        brightness.append(renderer.draw(data, "above")[SIZE // 2, SIZE // 2].mean())
        renderer.close()
    assert brightness[0] < 80 and brightness[1] > brightness[0] + 80
