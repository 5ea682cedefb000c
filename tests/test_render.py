"""Pictures: LIBERO's, turned by 180 degrees, and the same for the same state."""

import threading
from concurrent.futures import ThreadPoolExecutor

import mujoco
import numpy as np
import pytest

import vla_envs.render
from vla_envs.render import Renderer, opengl
from vla_envs.scene import load_scene
from vla_envs.vector import Simulation

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


@pytest.mark.parametrize("camera", CAMERAS)
def test_pictures_are_liberos_turned_by_180_degrees(libero, simulation, renderer, camera):
    """robosuite draws the same model with the settings of its environments: the same pixels."""
    from robosuite.utils.binding_utils import MjRenderContextOffscreen, MjSim

    sim = MjSim(simulation.scene.model)
    context = MjRenderContextOffscreen(sim, device_id=-1, max_width=SIZE, max_height=SIZE)
    context.vopt.geomgroup[0] = 0
    context.vopt.sitegroup[:] = 0  # LIBERO takes the colour from its sites instead
    sim.data.qpos[:] = simulation.data.qpos
    sim.forward()
    raw = sim.render(camera_name=camera, width=SIZE, height=SIZE)
    assert np.array_equal(renderer.draw(simulation.data, camera), raw[::-1, ::-1])


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


def test_no_opengl_is_reported(monkeypatch):
    monkeypatch.setattr(vla_envs.render, "_opengl", None)
    monkeypatch.setenv("MUJOCO_GL", "cgl")  # macOS only
    with pytest.raises(RuntimeError, match=r"no OpenGL to draw with; tried cgl \("):
        Renderer(load_scene("LiberoObject", 4).model, SIZE)


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
