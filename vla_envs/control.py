"""One LIBERO control step, compiled: 25 physics substeps under robosuite's OSC_POSE controller.

The arithmetic is that of ``robosuite/controllers/osc.py`` 1.4.0 (Khatib 1987), rearranged so that a
substep costs little more than MuJoCo's own ``mj_step``: the Jacobian and the arm's mass matrix are read
from what ``mj_step1`` has just computed, and every inverse is a Cholesky solve of at most 7 x 7.
The compiled code does not hold Python's lock, so that threads step different environments at the same time.

All code that is compiled into ``execute_chunk`` is in this file, the test of the goal and its constants too:
numba compiles a cached function anew only when the file that defines it has changed.
"""

from pathlib import Path
from typing import NamedTuple

import llvmlite.binding
import mujoco
import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

IN_REGION, ON_REGION, ON_OBJECT, JOINT, UP = range(5)  # kinds of predicates
UP_HEIGHT = 1.0  # m above the floor, LIBERO's predicates/base_predicates.py
ARM_DOF = 7
SUBSTEPS = 25  # 20 Hz control over 500 Hz physics
POSITION_SCALE = 0.05  # m for an action of 1, robosuite/controllers/config/osc_pose.json
ROTATION_SCALE = 0.5  # rad for an action of 1, the same file
KP = 150.0  # the same file; damping is critical
KD = 2.0 * np.sqrt(KP)
NULL_KP = 10.0  # robosuite/utils/control_utils.py, nullspace_torques
NULL_KD = 2.0 * np.sqrt(NULL_KP)
GRIPPER_SPEED = 0.01  # per substep, robosuite/models/grippers/panda_gripper.py

# MuJoCo's C functions are found by name, so that the compiled code can be cached on disk.
_library = next(iter(sorted(Path(mujoco.__file__).parent.glob("libmujoco.*"))), None)
if _library is None:  # Windows keeps it elsewhere
    _library = next(iter(sorted(Path(mujoco.__file__).parent.glob("*mujoco*.dll"))))
llvmlite.binding.load_library_permanently(str(_library))
_mj_step1 = types.ExternalFunction("mj_step1", types.void(types.intp, types.intp))
_mj_step2 = types.ExternalFunction("mj_step2", types.void(types.intp, types.intp))


def require_compiled() -> None:
    """Raise a RuntimeError when numba compiles nothing.

    Python would then call none of MuJoCo's C functions, and the robot would stand still.
    """
    if not isinstance(execute_chunk, numba.core.dispatcher.Dispatcher):
        raise RuntimeError("NUMBA_DISABLE_JIT is set; expected it unset: the simulator needs compiled code")


class Views(NamedTuple):
    """Arrays of one ``MjData`` that the controller reads and writes, without copies."""

    qpos: NDArray[np.float64]  # (nq,)
    qvel: NDArray[np.float64]  # (nv,)
    ctrl: NDArray[np.float64]  # (nu,)
    xpos: NDArray[np.float64]  # (nbody, 3)
    site_xpos: NDArray[np.float64]  # (nsite, 3)
    site_xmat: NDArray[np.float64]  # (nsite, 9)
    cdof: NDArray[np.float64]  # (nv, 6)
    subtree_com: NDArray[np.float64]  # (nbody, 3)
    qM: NDArray[np.float64]  # (nM,)
    qfrc_bias: NDArray[np.float64]  # (nv,)

    @classmethod
    def of(cls, data: mujoco.MjData) -> "Views":
        """Views of ``data``, which are valid as long as it lives."""
        return cls(*(getattr(data, name) for name in cls._fields))


class Arm(NamedTuple):
    """What the controller needs to know about a model, and about the pose in which it was initialised.

    LIBERO restores a recorded state behind its controller's back: during the first substep after a reset,
    the controller works with the Jacobian, mass matrix and end-effector pose that the reset left the arm in.
    These are in ``reset_*``.
    """

    site: int  # gripper0_grip_site
    root: int  # root body of the robot
    dof_madr: NDArray[np.int64]  # (7,) addresses in qM
    ctrl_low: NDArray[np.float64]  # (nu,)
    ctrl_high: NDArray[np.float64]  # (nu,)
    reset_qpos: NDArray[np.float64]  # (7,)
    reset_position: NDArray[np.float64]  # (3,)
    reset_rotation: NDArray[np.float64]  # (3, 3)
    reset_jacobian: NDArray[np.float64]  # (6, 7)
    reset_mass: NDArray[np.float64]  # (7, 7)

    @classmethod
    def of(cls, model: mujoco.MjModel, reset_qpos: NDArray[np.float64]) -> "Arm":
        """Read ``model`` with the arm at ``reset_qpos`` (7,) (rad) and everything else at its default."""
        data = mujoco.MjData(model)
        data.qpos[:ARM_DOF] = reset_qpos
        for stage in (
            mujoco.mj_kinematics,
            mujoco.mj_comPos,
            mujoco.mj_crb,
        ):  # all that is read of mj_forward
            stage(model, data)
        site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, "gripper0_grip_site")
        root = int(model.body_rootid[model.site_bodyid[site]])
        madr = np.asarray(model.dof_Madr[:ARM_DOF], dtype=np.int64)
        views = Views.of(data)
        jacobian, mass = np.empty((6, ARM_DOF)), np.empty((ARM_DOF, ARM_DOF))
        _jacobian(views, site, root, jacobian)
        _mass_matrix(views, madr, mass)
        return cls(
            site=site,
            root=root,
            dof_madr=madr,
            ctrl_low=model.actuator_ctrlrange[:, 0].copy(),
            ctrl_high=model.actuator_ctrlrange[:, 1].copy(),
            reset_qpos=np.array(reset_qpos, dtype=np.float64),
            reset_position=data.site_xpos[site].copy(),
            reset_rotation=data.site_xmat[site].reshape(3, 3).copy(),
            reset_jacobian=jacobian,
            reset_mass=mass,
        )


class ControllerMemory(NamedTuple):
    """What the controller remembers about one environment, changed in place."""

    goal_rotation: NDArray[np.float64]  # (3, 3), kept while the rotation command is zero
    gripper: NDArray[np.float64]  # (2,) in [-1, 1], one per finger
    peak: NDArray[np.float64]  # (n,) m; greatest heights of the goal's n subjects since the reset

    @classmethod
    def new(cls, subjects: int = 1) -> "ControllerMemory":
        return cls(np.empty((3, 3)), np.zeros(2), np.zeros(subjects))

    def assign(self, other: "ControllerMemory") -> None:
        for mine, theirs in zip(self, other, strict=True):
            mine[...] = theirs

    def copy(self) -> "ControllerMemory":
        return ControllerMemory(*(array.copy() for array in self))


class Goal(NamedTuple):
    """LIBERO's goal of a task: n predicates that must all hold, in the order in which to meet them.

    Sources: LIBERO's ``envs/object_states/base_object_states.py``, ``envs/objects/site_object.py`` and
    ``envs/objects/articulated_objects.py``.
    """

    kind: NDArray[
        np.int64
    ]  # (n,) IN_REGION, ON_REGION, ON_OBJECT, UP or JOINT (Open, Close, TurnOn, TurnOff)
    subject: NDArray[np.int64]  # (n,) body of the object to place, or of the part to open or turn
    target: NDArray[
        np.int64
    ]  # (n,) site of the region, body of the object below or (UP) to lift, or address in qpos
    # (n, 3) half sizes of the region in its own frame (m); for JOINT: threshold (m or rad), and +1 where the
    # joint must be above it, -1 below; for UP: height (m)
    parameters: NDArray[np.float64]
    # (n, 2, ngeom) the two sets of geoms that must touch; empty where the predicate asks for no contact
    contact: NDArray[np.bool_]


@numba.njit(cache=True, nogil=True)
def _jacobian(views, site, root, out):  # type: ignore[no-untyped-def]
    """``out`` (6, 7) = the site's position and rotation Jacobian, as ``mj_jacSite`` computes it."""
    px = views.site_xpos[site, 0] - views.subtree_com[root, 0]
    py = views.site_xpos[site, 1] - views.subtree_com[root, 1]
    pz = views.site_xpos[site, 2] - views.subtree_com[root, 2]
    for i in range(ARM_DOF):
        rx, ry, rz = views.cdof[i, 0], views.cdof[i, 1], views.cdof[i, 2]
        out[0, i] = views.cdof[i, 3] + ry * pz - rz * py
        out[1, i] = views.cdof[i, 4] + rz * px - rx * pz
        out[2, i] = views.cdof[i, 5] + rx * py - ry * px
        out[3, i] = rx
        out[4, i] = ry
        out[5, i] = rz


@numba.njit(cache=True, nogil=True)
def _mass_matrix(views, dof_madr, out):  # type: ignore[no-untyped-def]
    """``out`` (7, 7) = the arm's block of the mass matrix; qM holds row i from the diagonal to its root."""
    for i in range(ARM_DOF):
        for k in range(i + 1):
            out[i, i - k] = out[i - k, i] = views.qM[dof_madr[i] + k]


# Dividing by zero gives inf here, not Python's exception: a simulation that diverges may pass through a pose
# whose matrices are singular, and ``Simulation.divergence`` reports it afterwards.
@numba.njit(cache=True, nogil=True, error_model="numpy")
def _cholesky(a, n):  # type: ignore[no-untyped-def]
    """Replace the first ``n`` rows and columns of ``a`` by their lower Cholesky factor."""
    for i in range(n):
        for j in range(i + 1):
            s = a[i, j]
            for k in range(j):
                s -= a[i, k] * a[j, k]
            if i == j:
                a[i, i] = np.sqrt(s)
            else:
                a[i, j] = s / a[j, j]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _solve(factor, b, n):  # type: ignore[no-untyped-def]
    """Solve ``factor factor^T x = b`` in place."""
    for i in range(n):
        for k in range(i):
            b[i] -= factor[i, k] * b[k]
        b[i] /= factor[i, i]
    for i in range(n - 1, -1, -1):
        for k in range(i + 1, n):
            b[i] -= factor[k, i] * b[k]
        b[i] /= factor[i, i]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _torques(position, rotation, jac, mass, q, qd, home, goal_position, goal_rotation, bias, work, out):  # type: ignore[no-untyped-def]
    """``out`` (7,) = OSC_POSE torques (N m), before clipping to the actuators' limits.

    With a = NULL_KP (home - q) - NULL_KD qd, robosuite's null-space term N^T M a is
    M a - J^T (J M^-1 J^T)^-1 J a, so that the null-space matrix itself is never built.
    """
    force, null, y, inertia, block = work
    for i in range(3):
        linear = angular = 0.0
        for j in range(ARM_DOF):
            linear += jac[i, j] * qd[j]
            angular += jac[i + 3, j] * qd[j]
        a, b = (i + 1) % 3, (i + 2) % 3
        error = 0.0
        for k in range(3):  # this is half the sum of the axes' cross products
            error += rotation[a, k] * goal_rotation[b, k] - rotation[b, k] * goal_rotation[a, k]
        force[i] = KP * (goal_position[i] - position[i]) - KD * linear
        force[i + 3] = KP * 0.5 * error - KD * angular

    # y = L^-1 J^T with M = L L^T, so that J M^-1 J^T = y^T y.
    factor = block
    for i in range(ARM_DOF):
        for j in range(i + 1):
            factor[i, j] = mass[i, j]
    _cholesky(factor, ARM_DOF)
    for c in range(6):
        for i in range(ARM_DOF):
            s = jac[c, i]
            for k in range(i):
                s -= factor[i, k] * y[k, c]
            y[i, c] = s / factor[i, i]
    for i in range(6):
        for j in range(i + 1):
            s = 0.0
            for k in range(ARM_DOF):
                s += y[k, i] * y[k, j]
            inertia[i, j] = s

    # Position and orientation are decoupled: each is scaled by its own operational-space inertia.
    for part in range(2):
        for i in range(3):
            for j in range(i + 1):
                block[i, j] = inertia[3 * part + i, 3 * part + j]
        _cholesky(block, 3)
        _solve(block, force[3 * part : 3 * part + 3], 3)

    for c in range(6):
        s = 0.0
        for j in range(ARM_DOF):
            s += jac[c, j] * (NULL_KP * (home[j] - q[j]) - NULL_KD * qd[j])
        null[c] = s
    _cholesky(inertia, 6)
    _solve(inertia, null, 6)
    for i in range(ARM_DOF):
        s = bias[i]
        for c in range(6):
            s += jac[c, i] * (force[c] - null[c])
        for j in range(ARM_DOF):
            s += mass[i, j] * (NULL_KP * (home[j] - q[j]) - NULL_KD * qd[j])
        out[i] = s


@numba.njit(cache=True, nogil=True)
def _rotate(command, rotation, out):  # type: ignore[no-untyped-def]
    """``out`` = ``rotation`` followed by the axis-angle ``command`` (3,) (rad).

    It goes through a quaternion in single precision, as robosuite does (``transform_utils.quat2mat``).
    """
    angle = np.sqrt(command[0] ** 2 + command[1] ** 2 + command[2] ** 2)
    if angle == 0.0:  # the squares of the tiniest commands are zero
        out[:, :] = rotation
        return
    quat = np.empty(4, np.float32)  # w, x, y, z
    quat[0] = np.cos(angle / 2.0)
    for i in range(3):
        quat[i + 1] = command[i] / angle * np.sin(angle / 2.0)
    norm = 0.0  # OpenBLAS's sdot adds single-precision products in double precision
    for i in range(4):
        norm += np.float64(quat[i] * quat[i])
    scale = np.sqrt(2.0 / np.float64(np.float32(norm)))
    for i in range(4):
        quat[i] = np.float64(quat[i]) * scale
    w, x, y, z = quat
    turn = np.array(
        [
            [1.0 - np.float64(y * y) - np.float64(z * z), x * y - z * w, x * z + y * w],
            [x * y + z * w, 1.0 - np.float64(x * x) - np.float64(z * z), y * z - x * w],
            [x * z - y * w, y * z + x * w, 1.0 - np.float64(x * x) - np.float64(y * y)],
        ]
    )
    for i in range(3):
        for j in range(3):
            out[i, j] = (
                turn[i, 0] * rotation[0, j] + turn[i, 1] * rotation[1, j] + turn[i, 2] * rotation[2, j]
            )


@numba.njit(cache=True, nogil=True)
def in_place(goal, qpos, xpos, site_xpos, site_xmat):  # type: ignore[no-untyped-def]
    """Whether every predicate holds as far as positions tell, leaving contacts aside."""
    for k in range(len(goal.kind)):
        if not predicate_in_place(goal, k, qpos, xpos, site_xpos, site_xmat):
            return False
    return True


@numba.njit(cache=True, nogil=True)
def predicate_in_place(goal, k, qpos, xpos, site_xpos, site_xmat):  # type: ignore[no-untyped-def]
    """Whether predicate ``k`` holds as far as positions tell, leaving contacts aside."""
    kind, target, parameters = goal.kind[k], goal.target[k], goal.parameters[k]
    if kind == JOINT:
        return parameters[1] * (qpos[target] - parameters[0]) > 0.0
    position = xpos[goal.subject[k]]
    if kind == UP:
        return position[2] >= parameters[0]
    if kind == IN_REGION:  # SiteObject.in_box: the region's turned box, made axis-aligned, and 1 cm deeper
        for i in range(3):
            half = 0.0
            for j in range(3):
                half += site_xmat[target, 3 * i + j] * parameters[j]
            half = abs(half)
            centre = site_xpos[target, i]
            deeper = 0.01 if i == 2 else 0.0
            if not (centre - half - deeper < position[i] < centre + half):
                return False
        return True
    if kind == ON_REGION:  # SiteObject.under: at most 10 cm above the region
        for i in range(3):
            away = 0.0
            for j in range(3):
                away += site_xmat[target, 3 * i + j] * (position[j] - site_xpos[target, j])
            if i < 2 and not abs(away) < parameters[i]:
                return False
            if i == 2 and not parameters[2] - 0.005 < away < parameters[2] + 0.1:
                return False
        return True
    support = xpos[target]  # ON_OBJECT, ObjectState.check_ontop
    away = np.sqrt((position[0] - support[0]) ** 2 + (position[1] - support[1]) ** 2)
    return support[2] <= position[2] and away < 0.03


@numba.njit(cache=True, nogil=True)
def execute_chunk(model, data, views, arm, memory, goal, actions, just_restored):  # type: ignore[no-untyped-def]
    """Execute ``actions`` (C, 7), one control step (25 substeps, 0.05 s) each, until the goal is in place.

    Args:
        model: Address of the ``MjModel``.
        data: Address of the ``MjData``.
        views: ``Views`` of the data.
        arm: ``Arm`` of the model.
        memory: ``ControllerMemory``, changed in place.
        goal: ``Goal`` of the task.
        actions: Delta position, delta axis-angle and gripper in [-1, 1]; values outside are clipped.
        just_restored: Whether this is the first control step after LIBERO's ``set_init_state``.

    Returns:
        The number of control steps executed, and whether the goal's predicates hold after the last one as
        far as positions tell (``in_place``).
    """
    jac, mass = np.empty((6, ARM_DOF)), np.empty((ARM_DOF, ARM_DOF))
    rotation, goal_position, command, torque = np.empty((3, 3)), np.empty(3), np.empty(3), np.empty(ARM_DOF)
    work = (np.empty(6), np.empty(6), np.empty((ARM_DOF, 6)), np.empty((6, 6)), np.empty((ARM_DOF, ARM_DOF)))
    still = np.zeros(ARM_DOF)
    for step in range(actions.shape[0]):
        for substep in range(SUBSTEPS):
            _mj_step1(model, data)
            stale = just_restored and step == 0 and substep == 0
            if stale:
                position = arm.reset_position
                rotation[:, :] = arm.reset_rotation
            else:
                position = views.site_xpos[arm.site]
                for i in range(3):
                    for j in range(3):
                        rotation[i, j] = views.site_xmat[arm.site, 3 * i + j]
            if substep == 0:
                turning = False
                for i in range(3):
                    goal_position[i] = position[i] + POSITION_SCALE * min(1.0, max(-1.0, actions[step, i]))
                    command[i] = ROTATION_SCALE * min(1.0, max(-1.0, actions[step, i + 3]))
                    turning = turning or command[i] != 0.0
                if turning:
                    _rotate(command, rotation, memory.goal_rotation)
            if stale:
                _torques(
                    position, rotation, arm.reset_jacobian, arm.reset_mass, arm.reset_qpos, still,
                    arm.reset_qpos, goal_position, memory.goal_rotation, views.qfrc_bias, work, torque,
                )  # fmt: skip
            else:
                _jacobian(views, arm.site, arm.root, jac)
                _mass_matrix(views, arm.dof_madr, mass)
                _torques(
                    position, rotation, jac, mass, views.qpos, views.qvel,
                    arm.reset_qpos, goal_position, memory.goal_rotation, views.qfrc_bias, work, torque,
                )  # fmt: skip
            for i in range(ARM_DOF):
                views.ctrl[i] = min(arm.ctrl_high[i], max(arm.ctrl_low[i], torque[i]))
            for finger in range(2):
                direction = np.sign(actions[step, 6]) * (2 * finger - 1)
                memory.gripper[finger] = min(
                    1.0, max(-1.0, memory.gripper[finger] + GRIPPER_SPEED * direction)
                )
                low, high = arm.ctrl_low[ARM_DOF + finger], arm.ctrl_high[ARM_DOF + finger]
                views.ctrl[ARM_DOF + finger] = (
                    0.5 * (high + low) + 0.5 * (high - low) * memory.gripper[finger]
                )
            _mj_step2(model, data)
        for k in range(len(goal.subject)):
            memory.peak[k] = max(memory.peak[k], views.xpos[goal.subject[k], 2])
        if in_place(goal, views.qpos, views.xpos, views.site_xpos, views.site_xmat):
            return step + 1, True
    return actions.shape[0], False
