"""Perturbations: how an episode's scene differs from LIBERO's, drawn from its seed at levels from 1 to 5.

The axes, and the numbers where they are formulas, are LIBERO-Plus's (Fei et al. 2025, arXiv 2510.13626;
package ``liberoplus``): the camera's orbits, distances and turns, the size of the arm's offset, the kinds of
image noise, how far objects are moved. In the place of its lights, backgrounds and sentences, which are in
files, there are ranges and rules of our own, and how an axis is shared out over the levels is ours too. So
these are its kinds of perturbations, and not its 10,030 tasks.

What is drawn is a dict of plain values, axis by axis, as ``info["perturbation"]`` has it.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from vla_envs.inputs import in_short, nearest
from vla_envs.noise import KINDS as NOISES
from vla_envs.paraphrases import paraphrase

LEVELS = range(1, 6)
#: Degrees that the camera orbits the vertical, either way, per level: LIBERO-Plus's orbits reach 75. Its own
#: levels come from measured success, and each has orbits of all sizes, so these are shared out by us.
AZIMUTH = 15.0
ELEVATIONS = (0.0, 15.0)  # degrees, one of them
SCALE = 0.17  # of the distance, per level: from 1.15 to 2.0
TURN = 2.0  # degrees that the camera turns in place, per level: up to 10
JOINTS = 0.1  # rad; length of the arm's offset (7,), per level
MOVE = 0.03  # m that an object is moved at most, per level
DIM = 0.14  # share of a light's brightness that is lost or gained, per level; ours
TILT = 0.12  # that is added to a light's direction, a unit vector, per level; ours
TINT = 0.17  # share of a colour that is taken away at most, per level; ours
PARTS = ("floor", "walls", "table")
LONGEST = 1000  # characters of a sentence that is asked for
#: Whether the arm starts in the other pose, as a reset of LIBERO-Plus's environments gives it, or whether its
#: recorded joints are written back, as its evaluators do, and the controller alone keeps the other pose.
READINGS = ("kept", "written back")

Perturbation = dict[str, Any]


Regions = Mapping[str, tuple[float, float, float, float]]
NO_REGIONS: Regions = MappingProxyType({})


class Subject(NamedTuple):
    """What of a task and its scene its perturbations depend on."""

    movable: tuple[str, ...]  # names of the objects that a layout moves
    sentence: str
    regions: Regions = NO_REGIONS  # least x and y, greatest x and y (m) of where each distractor can stand


def _sign(rng: np.random.Generator) -> float:
    return float(rng.choice([-1.0, 1.0]))


def _camera(level: int, rng: np.random.Generator, subject: Subject) -> dict[str, Any]:
    """An orbit, another distance, or a turn in place; the one camera that is not on the arm."""
    drawn = {"azimuth": 0.0, "elevation": 0.0, "scale": 1.0, "pan": 0.0, "tilt": 0.0}
    kind = rng.integers(3)
    if kind == 0:
        drawn["azimuth"] = _sign(rng) * AZIMUTH * (level - 1 + rng.random())
        drawn["elevation"] = float(rng.choice(ELEVATIONS))
    elif kind == 1:
        drawn["scale"] = 1.15 + SCALE * (level - 1 + rng.random())
    else:
        drawn["pan"], drawn["tilt"] = (_sign(rng) * TURN * (level - 1 + rng.random()) for _ in range(2))
    return drawn


def _robot(level: int, rng: np.random.Generator, subject: Subject) -> dict[str, Any]:
    """Another pose of the arm, in which the controller takes it to rest."""
    direction = rng.standard_normal(7)
    return {
        "joints": (JOINTS * level * direction / np.linalg.norm(direction)).tolist(),
        "reading": READINGS[0],
    }


def _light(level: int, rng: np.random.Generator, subject: Subject) -> dict[str, Any]:
    """Brighter or darker, of another colour, from elsewhere, with weaker or stronger reflections."""
    brightness = 1.0 + _sign(rng) * DIM * (level - 1 + rng.random())
    colour = 1.0 - 0.05 * level * rng.random(3)
    direction = rng.standard_normal(3)
    tilt = TILT * level * direction / np.linalg.norm(direction)
    return {
        "diffuse": (brightness * colour).tolist(),
        "specular": float(rng.uniform(1.0 - 0.2 * level, 1.0 + 0.2 * level)),
        "tilt": tilt.tolist(),
    }


def _background(level: int, rng: np.random.Generator, subject: Subject) -> dict[str, Any]:
    """Colours that the floor's, the walls' and the table's are multiplied by."""
    taken = rng.random((len(PARTS), 3))
    taken *= TINT * (level - 1 + rng.random((len(PARTS), 1))) / taken.max(axis=1, keepdims=True)
    return dict(zip(PARTS, (1.0 - taken).tolist()))


def _noise(level: int, rng: np.random.Generator, subject: Subject) -> dict[str, Any]:
    """One of five filters of the finished image; LIBERO-Plus's ten severities, two per level."""
    return {
        "kind": str(rng.choice(list(NOISES))),
        "severity": int(2 * level - rng.integers(2)),
        "seed": int(rng.integers(2**31)),
    }


def _layout(level: int, rng: np.random.Generator, subject: Subject) -> dict[str, Any]:
    """How far each object's region is moved (m); what stands on something else goes with it."""
    moves = {}
    for name in subject.movable:
        angle, size = rng.uniform(0.0, 2.0 * math.pi), MOVE * level * rng.random()
        moves[name] = [size * math.cos(angle), size * math.sin(angle)]
    return moves


def _instruction(level: int, rng: np.random.Generator, subject: Subject) -> dict[str, Any]:
    """The task's sentence in other words."""
    return {"sentence": paraphrase(subject.sentence, level, rng)}


def _distractors(level: int, rng: np.random.Generator, subject: Subject) -> dict[str, Any]:
    """Where each further object stands, x and y (m); see ``vla_envs.distractors`` for taken places."""
    return {
        kind: [float(rng.uniform(low, high)) for low, high in ((x, x_end), (y, y_end))]
        for kind, (x, y, x_end, y_end) in list(subject.regions.items())[:level]
    }


#: By axis; a new one goes to the end, because an axis's number decides what it draws.
DRAWS: dict[str, Callable[[int, np.random.Generator, Subject], dict[str, Any]]] = {
    "camera": _camera, "robot": _robot, "light": _light, "background": _background, "noise": _noise,
    "layout": _layout, "instruction": _instruction, "distractors": _distractors,
}  # fmt: skip


#: In the place of an axis: one of them for each episode, at a level from 1 to the one that is given.
ANY = "any"


def parse(value: Any) -> dict[str, int]:
    """The level of each axis, from what ``perturb`` takes: ``"camera:3,light:2"``, ``"all:1"`` or a dict.

    ``"any:3"`` stands alone and stays as it is: ``draw`` takes one axis for each episode.

    Raises:
        ValueError: When an axis or a level does not exist, or when ``any`` has others beside it.
    """
    if value is None:
        return {}
    form = "expected 'camera:3,light:2', 'all:1', 'any:3' or a dict of levels"
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, str) and value:
        pairs = [
            (axis, level) for axis, _, level in (part.strip().partition(":") for part in value.split(","))
        ]
    else:
        raise ValueError(f"perturb is {in_short(value)}; {form}")
    levels: dict[str, int] = {}
    for axis, level in pairs:
        if axis not in ("all", ANY, *DRAWS):
            names = ["all", ANY, *DRAWS]
            raise ValueError(
                f"perturb has the axis {in_short(axis)}; expected some of {names}{nearest(str(axis), names)}"
            )
        number = int(level) if isinstance(level, str) and level.isdecimal() else level
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number not in LEVELS:
            raise ValueError(f"perturb has {axis} at level {in_short(level)}; expected an int from 1 to 5")
        for each in DRAWS if axis == "all" else (axis,):
            if each in levels:
                raise ValueError(f"perturb has {each} twice; expected each axis once")
            levels[each] = int(number)
    if ANY in levels and len(levels) > 1:
        raise ValueError(f"perturb has {list(levels)}; expected 'any' alone, which is one of all axes")
    return levels


def draw(levels: dict[str, int], entropy: list[int], subject: Subject) -> Perturbation:
    """What an episode's scene is perturbed by; each axis depends on its own level and on ``entropy`` alone.

    Args:
        levels: Of ``parse``.
        entropy: What decides; see ``entropy_of``.
        subject: What is perturbed.
    """
    if most := levels.get(ANY):
        rng = np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(3,)))
        levels = {str(rng.choice(list(DRAWS))): int(rng.integers(1, most + 1))}
    drawn = {}
    for axis, make in DRAWS.items():
        if axis in levels:
            drawn[axis] = make(levels[axis], _stream(axis, entropy), subject)
    return drawn


def _stream(axis: str, entropy: list[int]) -> np.random.Generator:
    """The random numbers of an axis."""
    spawn_key = (2, list(DRAWS).index(axis))
    return np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=spawn_key))


def complete(asked: Perturbation, entropy: list[int], reading: str) -> Perturbation:
    """A perturbation without its random parts, with them: the noise's seed, from ``entropy``, and a reading.

    Args:
        asked: Of ``vla_envs.liberoplus.Variant``.
        entropy: As in ``draw``.
        reading: One of ``READINGS``.
    """
    chosen = {axis: dict(its) for axis, its in asked.items()}
    if "robot" in chosen:
        chosen["robot"]["reading"] = reading
    if "noise" in chosen:
        chosen["noise"]["seed"] = int(_stream("noise", entropy).integers(2**31))
    return chosen


def entropy_of(rng: np.random.Generator | None, state_id: int | None) -> list[int]:
    """What decides an episode's perturbation: its init state's number, or where its generator stands.

    The generator is not advanced, so that the placement of a seed is the same with and without perturbations.
    """
    if state_id is not None:
        return [0, state_id]
    assert rng is not None
    state = repr(rng.bit_generator.state).encode()
    return [1, *np.frombuffer(hashlib.sha256(state).digest(), np.uint32).tolist()]


# ---- One that is asked for ---------------------------------------------------------------------------

#: What each axis holds: numbers by their count, least and greatest.
_FIELDS: dict[str, dict[str, tuple[int, float, float]]] = {
    "camera": {
        "azimuth": (0, -360, 360), "elevation": (0, -89, 89), "scale": (0, 0.2, 5), "pan": (0, -90, 90),
        "tilt": (0, -90, 90),
    },
    "robot": {"joints": (7, -1, 1)},
    "light": {"diffuse": (3, 0, 5), "specular": (0, 0, 5), "tilt": (3, -2, 2)},
    "background": dict.fromkeys(PARTS, (3, 0, 1)),
    "noise": {"severity": (0, 1, 10), "seed": (0, 0, 2**31)},
}  # fmt: skip
_WHOLE = ("severity", "seed")
#: What else they hold: one of some words.
_WORDS: dict[str, dict[str, list[str]]] = {
    "robot": {"reading": list(READINGS)},
    "noise": {"kind": list(NOISES)},
}


def validate(value: Any, movable: tuple[str, ...], regions: Regions = NO_REGIONS) -> Perturbation:
    """``value`` as a perturbation that ``reset`` is asked for, in the form of ``info["perturbation"]``.

    Args:
        value: What ``reset`` is given.
        movable: As in ``Subject``.
        regions: As in ``Subject``.

    Raises:
        ValueError: When a name does not exist, or a number does not fit; names the first.
    """
    if not isinstance(value, Mapping):
        raise ValueError(
            f"perturbation is {in_short(value)}; expected a dict, as info['perturbation'] has it"
        )
    chosen: Perturbation = {}
    for axis, given in value.items():
        _require_known(axis, list(DRAWS), "perturbation has the axis")
        if axis == "distractors" and not regions:
            raise ValueError(
                "perturbation has distractors, and the environment was made without; expected it to be made"
                " with perturb='distractors:1', or 2 to 5"
            )
        movables = {"layout": movable, "distractors": tuple(regions)}
        fields = dict.fromkeys(movables[axis], (2, -1.0, 1.0)) if axis in movables else _FIELDS.get(axis, {})
        words = _WORDS.get(axis, {})
        known = [*fields, *words, *(["sentence"] if axis == "instruction" else [])]
        if not isinstance(given, Mapping):
            raise ValueError(f"perturbation has {axis} {in_short(given)}; expected a dict of {known}")
        for name in given:
            _require_known(name, known, f"perturbation's {axis} has")
        given = {"reading": READINGS[0], **given} if axis == "robot" else given
        missing = [name for name in known if name not in given and axis not in movables]
        if missing:
            raise ValueError(f"perturbation's {axis} has no {missing[0]}; expected all of {known}")
        chosen[axis], whose = {}, axis + ("'" if axis.endswith("s") else "'s")
        for name, x in given.items():
            if name in words:
                _require_known(x, words[name], f"perturbation's {axis} has the {name}")
                chosen[axis][name] = str(x)
            elif axis == "instruction":
                chosen[axis][name] = _sentence(x)
            else:
                chosen[axis][name] = _numbers(f"{whose} {name}", x, *fields[name], whole=name in _WHOLE)
            if axis == "distractors":
                _require_inside(name, chosen[axis][name], regions[name])
    return chosen


def _require_known(name: Any, known: list[str], what: str) -> None:
    if name not in known:
        raise ValueError(f"{what} {in_short(name)}; expected some of {known}{nearest(str(name), known)}")


def _require_inside(name: str, place: list[float], region: tuple[float, float, float, float]) -> None:
    x, y, x_end, y_end = region
    if not (x <= place[0] <= x_end and y <= place[1] <= y_end):
        raise ValueError(
            f"perturbation has distractors' {name} {place}; expected x from {x:g} to {x_end:g} and y from"
            f" {y:g} to {y_end:g}, in m"
        )


def _sentence(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > LONGEST:
        what = f"perturbation has the instruction's sentence {in_short(value)}"
        raise ValueError(f"{what}; expected text of 1 to {LONGEST} characters")
    return str(value)


def _numbers(what: str, value: Any, count: int, least: float, most: float, whole: bool) -> Any:
    """``value`` as a number, or a list of ``count`` of them."""
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.empty(0)
    fits = array.dtype.kind in ("iu" if whole else "iuf") and array.shape == ((count,) if count else ())
    if not fits or not np.isfinite(array).all() or array.min() < least or array.max() > most:
        numbers = f"{count} numbers" if count else "an int" if whole else "a number"
        raise ValueError(
            f"perturbation has {what} {in_short(value)}; expected {numbers} from {least:g} to {most:g}"
        )
    return array.tolist()
