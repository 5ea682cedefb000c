"""What the built-in assets look like: every object, fixture and scene of LIBERO in MuJoCo primitives.

Lengths are in metres, in the frame of the object's body; colours are written "#rrggbb". Many shapes go
*through* an object and are a little longer than it is thick, so that one disc or bar shows on two opposite
sides.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

Geom = dict[str, str]  # the attributes of one MJCF <geom>
Vector = Sequence[float]

WEAVE = "weave"  # stands for a colour: the basket weave that `builtin.py` makes


def _text(values: Vector) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def _paint(color: str) -> Geom:
    if color == WEAVE:
        return {"material": WEAVE}
    return {"rgba": _text([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] + [1])}


def box(pos: Vector, half: Vector, color: str, turn: tuple[str, float] = ("z", 0)) -> Geom:
    """A box with half sizes `half`, turned by `turn[1]` degrees about its own axis `turn[0]`."""
    angle = np.radians(turn[1]) / 2
    quat = [np.cos(angle)] + [np.sin(angle) * (turn[0] == axis) for axis in "xyz"]
    return {"type": "box", "pos": _text(pos), "quat": _text(quat), "size": _text(half), **_paint(color)}


def cylinder(start: Vector, end: Vector, radius: float, color: str) -> Geom:
    """A cylinder around the line from `start` to `end`."""
    return {"type": "cylinder", "fromto": _text([*start, *end]), "size": _text([radius]), **_paint(color)}


def ellipsoid(pos: Vector, radii: Vector, color: str) -> Geom:
    """An ellipsoid with half axes `radii`."""
    return {"type": "ellipsoid", "pos": _text(pos), "size": _text(radii), **_paint(color)}


def tube(points: Sequence[Vector], radius: float, color: str) -> list[Geom]:
    """A round bar, bent at each of `points`."""
    shape = {"type": "capsule", "size": _text([radius]), **_paint(color)}
    return [{**shape, "fromto": _text([*start, *end])} for start, end in pairwise(points)]


def lathe(radii: Vector, heights: Vector, color: str, axis: Vector = (0, 0), sides: int = 24) -> Geom:
    """A body of revolution: an outline turned about the upright line through `axis`.

    The outline runs up the outside and down the inside, so that faces look outwards, and closes itself.
    """
    angles = 2 * np.pi * np.arange(sides) / sides
    vertices = [
        (axis[0] + radius * np.cos(angle), axis[1] + radius * np.sin(angle), z)
        for radius, z in zip(radii, heights)
        for angle in angles
    ]
    faces = []
    for i in range(len(radii)):
        j = (i + 1) % len(radii)
        for k in range(sides):
            a, b, c, d = (row * sides + (k + step) % sides for row, step in ((i, 0), (i, 1), (j, 1), (j, 0)))
            faces += [(a, b, c)] if radii[i] else []
            faces += [(a, c, d)] if radii[j] else []
    vertex = _text([round(float(x), 5) for point in vertices for x in point])
    return {
        "type": "mesh",
        "vertex": vertex,
        "face": _text([index for face in faces for index in face]),
        **_paint(color),
    }


def painted(color: str, first: int = 0, end: int | None = None) -> Geom:
    """LIBERO's own collision boxes of a body, from number `first` up to `end`, in `color`."""
    return {"boxes": f"{first}:{'' if end is None else end}", **_paint(color)}


RED, GREEN, WHITE, SILVER = "#d3260f", "#0f8a3c", "#f4f4f0", "#a9adb5"
YELLOW, ORANGE, BLUE, NAVY, BLACK = "#f6d32a", "#f28a14", "#2f63d0", "#2c3f9e", "#181818"
BROWN, SAUCE, KETCHUP, RIM = "#4a2313", "#642610", "#e0400f", "#7a4a1e"
STEEL, IRON, CERAMIC, PAPER = "#63676c", "#2a2c2f", "#dadad6", "#efe9d6"
OAK, PINE, TEAK, WALNUT, MAHOGANY = "#9a6b3c", "#bd9862", "#b98450", "#4f3626", "#5e2318"

# What each of LIBERO's files looks like: the geoms of its one body, or of each of its bodies by name.
#
# Cans, cartons and two of the bottles stand along +y with their front towards +z; the rest stands along +z.
# Sizes are those of LIBERO's collision boxes, and of its meshes' outlines to about a millimetre.
APPEARANCES: dict[str, list[Geom] | dict[str, list[Geom]]] = {
    # Blue can, a band of orange soup, and a yellow letter on each side (T, H, T, H).
    "stable_hope_objects/alphabet_soup": [
        cylinder((0, -0.0416, -0.0025), (0, 0.0416, -0.0025), 0.0318, SILVER),
        cylinder((0, -0.0385, -0.0025), (0, 0.0385, -0.0025), 0.0326, BLUE),
        cylinder((0, -0.0385, -0.0025), (0, -0.0160, -0.0025), 0.0329, ORANGE),
        box((0, 0.0270, -0.0025), (0.0150, 0.0040, 0.0334), YELLOW),
        box((0, 0.0090, -0.0025), (0.0040, 0.0190, 0.0334), YELLOW),
        box((0, 0.0100, 0.0085), (0.0334, 0.0190, 0.0035), YELLOW),
        box((0, 0.0100, -0.0135), (0.0334, 0.0190, 0.0035), YELLOW),
        box((0, 0.0100, -0.0025), (0.0334, 0.0035, 0.0110), YELLOW),
    ],
    # Dark brown bottle with a red cap; red label with yellow flames and a white star badge.
    "stable_hope_objects/bbq_sauce": [
        box((0, 0, -0.0345), (0.0245, 0.0162, 0.0226), SAUCE),
        box((0.0105, 0, 0.0069), (0.0090, 0.0160, 0.0216), SAUCE, turn=("y", -14.1)),
        box((-0.0105, 0, 0.0069), (0.0090, 0.0160, 0.0216), SAUCE, turn=("y", 14.1)),
        cylinder((0, 0, -0.0150), (0, 0, 0.0300), 0.0130, SAUCE),
        cylinder((0, 0, 0.0300), (0, 0, 0.0571), 0.0142, RED),
        box((0, 0, -0.0310), (0.0200, 0.0168, 0.0190), RED),
        box((-0.0110, 0, -0.0060), (0.0026, 0.0166, 0.0100), YELLOW),
        box((0, 0, -0.0030), (0.0026, 0.0166, 0.0130), YELLOW),
        box((0.0110, 0, -0.0060), (0.0026, 0.0166, 0.0100), YELLOW),
        box((0, 0, -0.0230), (0.0160, 0.0171, 0.0036), YELLOW),
        cylinder((0, -0.0172, -0.0385), (0, 0.0172, -0.0385), 0.0085, WHITE),
        box((0, 0, -0.0385), (0.0032, 0.0175, 0.0032), BLACK, turn=("y", 45)),
    ],
    # Flat cream box, red on top, with a stick of butter being sliced.
    "stable_hope_objects/butter": [
        box((0, 0, -0.0005), (0.0384, 0.0196, 0.0085), "#f3e3a2"),
        box((0, 0, 0.0082), (0.0384, 0.0196, 0.0009), RED),
        box((-0.0060, 0, 0.0086), (0.0220, 0.0110, 0.0009), YELLOW),
        box((0.0210, 0, 0.0086), (0.0022, 0.0110, 0.0009), YELLOW),
        box((0.0285, 0, 0.0086), (0.0022, 0.0110, 0.0009), YELLOW),
        box((-0.0060, -0.0045, 0.0088), (0.0220, 0.0012, 0.0009), "#fdf0a8"),
    ],
    # Brown box, light blue below; on top a pudding with cream on a plate, and two lines of lettering.
    "stable_hope_objects/chocolate_pudding": [
        box((0, 0, 0), (0.0412, 0.0244, 0.0146), BROWN),
        box((0, 0, -0.0050), (0.0416, 0.0248, 0.0090), "#9fd0ee"),
        box((0.0140, 0, -0.0040), (0.0180, 0.0251, 0.0035), "#e8762c"),
        ellipsoid((-0.0180, 0, 0.0140), (0.0185, 0.0185, 0.0014), WHITE),
        ellipsoid((-0.0180, 0, 0.0140), (0.0130, 0.0130, 0.0036), "#7a3a1a"),
        ellipsoid((-0.0180, 0, 0.0160), (0.0055, 0.0055, 0.0036), WHITE),
        box((0.0200, 0.0090, 0.0142), (0.0170, 0.0045, 0.0009), "#f0b070"),
        box((0.0200, -0.0070, 0.0142), (0.0170, 0.0060, 0.0009), "#e8762c"),
    ],
    # Silver foil box with a blue oval and a white name in it, above and below.
    "stable_hope_objects/cream_cheese": [
        box((0, 0, 0), (0.0410, 0.0211, 0.0092), "#b0b9cc"),
        ellipsoid((0, 0, 0.0092), (0.0270, 0.0160, 0.0010), NAVY),
        ellipsoid((0, 0, -0.0092), (0.0270, 0.0160, 0.0010), NAVY),
        box((0, 0, 0), (0.0200, 0.0036, 0.0104), WHITE),
        box((0.0370, 0, 0), (0.0020, 0.0213, 0.0094), NAVY),
        box((-0.0370, 0, 0), (0.0020, 0.0213, 0.0094), NAVY),
    ],
    # Red squeeze bottle with a white cap; arched white label with a name and two tomatoes.
    "stable_hope_objects/ketchup": [
        box((0, -0.0496, 0), (0.0318, 0.0247, 0.0205), KETCHUP),
        box((0.0132, 0.0034, 0), (0.0120, 0.0317, 0.0202), KETCHUP, turn=("z", 12.6)),
        box((-0.0132, 0.0034, 0), (0.0120, 0.0317, 0.0202), KETCHUP, turn=("z", -12.6)),
        cylinder((0, 0.0360, 0), (0, 0.0743, 0), 0.0186, WHITE),
        box((0, -0.0330, 0), (0.0210, 0.0270, 0.0210), WHITE),
        cylinder((0, -0.0060, -0.0210), (0, -0.0060, 0.0210), 0.0180, WHITE),
        box((0, 0.0000, 0), (0.0110, 0.0028, 0.0213), "#b8860b"),
        box((0, -0.0150, 0), (0.0160, 0.0036, 0.0213), BLACK),
        cylinder((-0.0095, -0.0430, -0.0214), (-0.0095, -0.0430, 0.0214), 0.0090, RED),
        cylinder((0.0095, -0.0430, -0.0214), (0.0095, -0.0430, 0.0214), 0.0090, RED),
        box((0, -0.0340, 0), (0.0110, 0.0022, 0.0216), GREEN),
    ],
    # Gable-top carton: red over sky over grass, a white M on front and back, a black cow with a white patch.
    "stable_hope_objects/milk": [
        box((0, 0.0080, 0), (0.0264, 0.0318, 0.0268), RED),
        box((0, -0.0414, 0), (0.0264, 0.0180, 0.0268), "#a8d4f4"),
        box((0, -0.0650, 0), (0.0264, 0.0064, 0.0268), GREEN),
        box((0, 0.0398, 0), (0.0264, 0.0190, 0.0190), RED, turn=("x", 45)),
        box((0, 0.0620, 0), (0.0264, 0.0094, 0.0022), WHITE),
        box((-0.0170, 0.0080, 0), (0.0036, 0.0220, 0.0272), WHITE),
        box((0.0170, 0.0080, 0), (0.0036, 0.0220, 0.0272), WHITE),
        box((-0.0080, 0.0150, 0), (0.0034, 0.0160, 0.0272), WHITE, turn=("z", 32)),
        box((0.0080, 0.0150, 0), (0.0034, 0.0160, 0.0272), WHITE, turn=("z", -32)),
        box((0.0020, -0.0420, 0), (0.0130, 0.0070, 0.0272), BLACK),
        box((-0.0140, -0.0350, 0), (0.0050, 0.0055, 0.0272), BLACK),
        box((-0.0070, -0.0530, 0), (0.0032, 0.0056, 0.0272), BLACK),
        box((0.0115, -0.0530, 0), (0.0032, 0.0056, 0.0272), BLACK),
        box((0.0040, -0.0400, 0), (0.0050, 0.0035, 0.0275), WHITE),
    ],
    # Gable-top carton: yellow over white, half an orange on every side.
    "stable_hope_objects/orange_juice": [
        box((0, -0.0157, 0), (0.0264, 0.0558, 0.0268), WHITE),
        box((0, 0.0220, 0), (0.0267, 0.0178, 0.0271), YELLOW),
        box((0, 0.0398, 0), (0.0266, 0.0191, 0.0191), YELLOW, turn=("x", 45)),
        box((0, 0.0620, 0), (0.0264, 0.0100, 0.0022), WHITE),
        cylinder((0, -0.0400, -0.0272), (0, -0.0400, 0.0272), 0.0220, ORANGE),
        cylinder((0, -0.0400, -0.0276), (0, -0.0400, 0.0276), 0.0180, "#fbd9a0"),
        cylinder((0, -0.0400, -0.0280), (0, -0.0400, 0.0280), 0.0155, ORANGE),
        cylinder((-0.0268, -0.0400, 0), (0.0268, -0.0400, 0), 0.0220, ORANGE),
        cylinder((-0.0272, -0.0400, 0), (0.0272, -0.0400, 0), 0.0180, "#fbd9a0"),
        cylinder((-0.0276, -0.0400, 0), (0.0276, -0.0400, 0), 0.0155, ORANGE),
        box((0, -0.0080, 0), (0.0269, 0.0050, 0.0273), GREEN),
        cylinder((0, 0.0220, -0.0274), (0, 0.0220, 0.0274), 0.0150, ORANGE),
    ],
    # White pear-shaped bottle with a green cap; green-rimmed oval label with a name and a carrot.
    "stable_hope_objects/salad_dressing": [
        ellipsoid((0, -0.0340, 0), (0.0325, 0.0397, 0.0218), "#e4e6e2"),
        ellipsoid((0, -0.0100, 0), (0.0235, 0.0600, 0.0195), "#e4e6e2"),
        cylinder((0, 0.0330, 0), (0, 0.0737, 0), 0.0184, "#0a6b33"),
        ellipsoid((0, -0.0360, 0), (0.0270, 0.0330, 0.0246), GREEN),
        ellipsoid((0, -0.0360, 0), (0.0235, 0.0285, 0.0254), WHITE),
        box((0, -0.0320, 0), (0.0090, 0.0030, 0.0256), BLACK),
        box((0.0020, -0.0440, 0), (0.0075, 0.0030, 0.0254), ORANGE, turn=("z", 20)),
    ],
    # Red can with a green band, and a big tomato on white on each side.
    "stable_hope_objects/tomato_sauce": [
        cylinder((0, -0.0414, -0.0025), (0, 0.0414, -0.0025), 0.0318, SILVER),
        cylinder((0, -0.0385, -0.0025), (0, 0.0385, -0.0025), 0.0325, RED),
        cylinder((0, 0.0080, -0.0025), (0, 0.0240, -0.0025), 0.0328, GREEN),
        cylinder((0, -0.0360, -0.0025), (0, 0.0080, -0.0025), 0.0328, WHITE),
        cylinder((0, -0.0150, -0.0359), (0, -0.0150, 0.0309), 0.0165, RED),
        cylinder((-0.0334, -0.0150, -0.0025), (0.0334, -0.0150, -0.0025), 0.0165, RED),
        box((0, -0.0010, -0.0025), (0.0080, 0.0028, 0.0338), GREEN),
        box((0, -0.0010, -0.0025), (0.0338, 0.0028, 0.0080), GREEN),
    ],
    # Flat white box, checked red at the sides; on top and below a heap of cookies and a red band with a name.
    "stable_hope_objects/cookies": [
        box((0, 0, 0), (0.0307, 0.0416, 0.0094), CERAMIC),
        *[box((0, 0.0075 * i, 0), (0.0309, 0.0037, 0.0047), RED) for i in (-5, -3, -1, 1, 3, 5)],
        box((0, 0.0350, 0), (0.0300, 0.0045, 0.0097), RED),
        box((0, 0.0220, 0), (0.0270, 0.0045, 0.0097), RED),
        cylinder((-0.0120, -0.0190, -0.0099), (-0.0120, -0.0190, 0.0099), 0.0150, "#cf9440"),
        cylinder((0.0130, -0.0140, -0.0100), (0.0130, -0.0140, 0.0100), 0.0150, "#dfae5c"),
        cylinder((0.0080, -0.0270, -0.0101), (0.0080, -0.0270, 0.0101), 0.0120, "#c58a38"),
        *[
            cylinder((x, y, -0.0104), (x, y, 0.0104), 0.0022, BROWN)
            for x, y in (
                (-0.017, -0.014),
                (-0.008, -0.022),
                (0.010, -0.008),
                (0.018, -0.016),
                (0.007, -0.029),
            )
        ],
    ],
    # Black bowl with a gray rim.
    "stable_scanned_objects/akita_black_bowl": [
        lathe(
            (0, 0.03, 0.044, 0.053, 0.0505, 0.042, 0.028, 0),
            (0.002, 0.002, 0.02, 0.0495, 0.0495, 0.024, 0.007, 0.007),
            "#1e1e23",
        ),
        lathe((0.053, 0.0538, 0.0508, 0.0505), (0.0485, 0.0521, 0.0521, 0.0485), "#55555c"),
        lathe((0, 0.022, 0.022, 0), (0.0071, 0.0071, 0.0075, 0.0075), "#34343a"),
    ],
    # White bowl.
    "stable_scanned_objects/white_bowl": [
        lathe(
            (0, 0.022, 0.0355, 0.041, 0.0422, 0.039, 0.0375, 0.031, 0.018, 0),
            (0, 0, 0.0106, 0.02, 0.0353, 0.0353, 0.022, 0.012, 0.005, 0.004),
            CERAMIC,
        ),
        lathe((0.0185, 0.02, 0.0195, 0.018), (0.0056, 0.0062, 0.0064, 0.0058), "#c9cbc9"),
    ],
    # White plate with a red line along its rim.
    "stable_scanned_objects/plate": [
        lathe(
            (0, 0.0458, 0.0575, 0.0686, 0.0686, 0.056, 0.044, 0),
            (0, 0, 0.006, 0.014, 0.0166, 0.0095, 0.0055, 0.004),
            CERAMIC,
        ),
        lathe((0.069, 0.069, 0.065, 0.064), (0.014, 0.017, 0.0152, 0.013), "#b3322a"),
        lathe((0.044, 0.045, 0.0435, 0.043), (0.0052, 0.0064, 0.006, 0.005), "#c9cbc9"),
    ],
    # Small white dish with straight, fluted sides and a thick rim.
    "stable_scanned_objects/glazed_rim_porcelain_ramekin": [
        lathe(
            (0, 0.039, 0.0412, 0.04, 0.0352, 0.0345, 0), (0, 0, 0.03, 0.0345, 0.03, 0.0087, 0.0065), "#d9dde0"
        ),
        lathe((0.0412, 0.0444, 0.0444, 0.04, 0.0365), (0.033, 0.036, 0.0433, 0.0433, 0.033), WHITE),
        *[
            box(
                (0.0394 * np.cos(a), 0.0394 * np.sin(a), 0.016),
                (0.0014, 0.0032, 0.015),
                WHITE,
                ("z", np.degrees(a)),
            )
            for a in np.arange(16) * np.pi / 8
        ],
    ],
    # Black frying pan, dark gray inside, with a long black handle.
    "stable_scanned_objects/chefmate_8_frypan": [
        lathe(
            (0, 0.077, 0.0925, 0.1026, 0.1026, 0.0985, 0.0891, 0.074, 0),
            (0, 0, 0.0219, 0.04, 0.0439, 0.0439, 0.0274, 0.007, 0.005),
            IRON,
            axis=(0.008, 0),
        ),
        lathe((0, 0.07, 0.07, 0), (0.0052, 0.0052, 0.0062, 0.0062), "#4b5053", axis=(0.008, 0)),
        lathe((0.103, 0.103, 0.098, 0.098), (0.04, 0.0445, 0.0445, 0.04), "#6b7074", axis=(0.008, 0)),
        box((0.1160, 0, 0.0330), (0.0150, 0.0080, 0.0060), STEEL, turn=("y", -12)),
        box((0.1900, 0, 0.0425), (0.0700, 0.0120, 0.0075), "#17181a", turn=("y", -7)),
        cylinder((0.2440, 0, 0.0400), (0.2440, 0, 0.0580), 0.0060, STEEL),
    ],
    # Two books, standing, a spine at the back and pages on the other sides.
    "turbosquid_objects/black_book": [
        box((-0.0140, -0.0120, 0.0691), (0.0014, 0.0566, 0.0691), "#131316"),
        box((0.0131, -0.0120, 0.0691), (0.0014, 0.0566, 0.0691), "#131316"),
        box((-0.0004, 0.0430, 0.0691), (0.0150, 0.0016, 0.0691), "#131316"),
        box((-0.0004, -0.0140, 0.0685), (0.0122, 0.0530, 0.0665), PAPER),
        box((-0.0004, 0.0435, 0.0950), (0.0080, 0.0014, 0.0200), "#c8ccd2"),
        box((-0.0004, -0.0120, 0.0950), (0.0151, 0.0300, 0.0060), "#c8ccd2"),
    ],
    "turbosquid_objects/yellow_book": [
        box((-0.0093, -0.0008, 0.0618), (0.0014, 0.0506, 0.0618), YELLOW),
        box((0.0148, -0.0008, 0.0618), (0.0014, 0.0506, 0.0618), YELLOW),
        box((0.0027, 0.0482, 0.0618), (0.0134, 0.0016, 0.0618), YELLOW),
        box((0.0027, -0.0026, 0.0612), (0.0107, 0.0480, 0.0592), PAPER),
        box((0.0027, 0.0487, 0.0850), (0.0070, 0.0014, 0.0180), NAVY),
        box((0.0027, -0.0008, 0.0850), (0.0136, 0.0270, 0.0060), NAVY),
    ],
    # Wooden box for a desk: a tall compartment, two small ones and a low one.
    "turbosquid_objects/desk_caddy": [
        painted("#b98450", end=1),
        painted("#d4a76e", 1, 4),
        painted(TEAK, 4, 7),
        painted("#d4a76e", 7, 9),
        painted(TEAK, 9),
    ],
    # Octagonal silver pot with a waist, a spout, a black knob and a black handle.
    "turbosquid_objects/moka_pot": [
        lathe((0, 0.0396, 0.0345, 0), (-0.0671, -0.0671, -0.024, -0.024), "#c9ccd1", sides=8),
        lathe((0, 0.0405, 0.0405, 0), (-0.025, -0.025, -0.013, -0.013), "#9da1a8"),
        lathe((0, 0.03, 0.04, 0), (-0.013, -0.013, 0.052, 0.052), "#c9ccd1", sides=8),
        lathe((0, 0.041, 0.012, 0), (0.052, 0.052, 0.07, 0.07), "#b4b8be", sides=8),
        cylinder((0, 0, 0.0690), (0, 0, 0.0871), 0.0078, BLACK),
        box((0, -0.0440, 0.0430), (0.0080, 0.0160, 0.0090), "#b4b8be", turn=("x", -35)),
        *tube(
            [(0, 0.0340, 0.0450), (0, 0.0760, 0.0490), (0, 0.0700, 0.0150), (0, 0.0570, -0.0060)],
            0.0075,
            BLACK,
        ),
    ],
    # Three mugs: white, tall and red, white with yellow.
    "turbosquid_objects/porcelain_mug": [
        lathe(
            (0, 0.03, 0.0403, 0.0463, 0.0487, 0.0481, 0.044, 0.0435, 0.041, 0.03, 0),
            (0, 0, 0.02, 0.045, 0.08, 0.1146, 0.1146, 0.08, 0.05, 0.014, 0.01),
            CERAMIC,
            axis=(0.0165, -0.002),
        ),
        *tube(
            [
                (-0.033, 0, 0.092),
                (-0.052, 0, 0.088),
                (-0.060, 0, 0.066),
                (-0.050, 0, 0.043),
                (-0.027, 0, 0.031),
            ],
            0.0056,
            CERAMIC,
        ),
    ],
    "turbosquid_objects/red_coffee_mug": [
        lathe(
            (0, 0.0375, 0.0388, 0.0415, 0.0456, 0.04, 0.036, 0.031, 0.029, 0),
            (0, 0, 0.03, 0.09, 0.1349, 0.1349, 0.09, 0.03, 0.012, 0.01),
            "#c4231a",
            axis=(-0.018, -0.001),
        ),
        *tube(
            [
                (0.0255, 0, 0.108),
                (0.046, 0, 0.112),
                (0.0575, 0, 0.090),
                (0.050, 0, 0.058),
                (0.0215, 0, 0.034),
            ],
            0.0056,
            "#c4231a",
        ),
    ],
    "turbosquid_objects/white_yellow_mug": [
        lathe(
            (0, 0.034, 0.0403, 0.043, 0.0476, 0.0515, 0.0462, 0.04, 0.034, 0),
            (0, 0, 0.015, 0.04, 0.07, 0.1048, 0.1048, 0.06, 0.018, 0.012),
            CERAMIC,
            axis=(-0.018, -0.001),
        ),
        lathe(
            (0.033, 0.037, 0.0412, 0.044, 0.0462, 0.043, 0.04, 0.036),
            (0.001, 0.003, 0.015, 0.04, 0.054, 0.054, 0.03, 0.014),
            "#efb71d",
            axis=(-0.018, -0.001),
        ),
        *tube(
            [(0.031, 0, 0.083), (0.060, 0, 0.080), (0.062, 0, 0.040), (0.0235, 0, 0.028)], 0.0062, "#efb71d"
        ),
    ],
    # Green bottle with a cork and a cream label.
    "turbosquid_objects/wine_bottle": [
        lathe(
            (0, 0.021, 0.0216, 0.0216, 0.0182, 0.011, 0.008, 0.007, 0.008, 0.0078, 0),
            (0, 0, 0.003, 0.062, 0.08, 0.094, 0.106, 0.138, 0.14, 0.1499, 0.1499),
            "#173d22",
        ),
        lathe((0, 0.0219, 0.0219, 0), (0.016, 0.016, 0.056, 0.056), PAPER),
        lathe((0, 0.0221, 0.0221, 0), (0.026, 0.026, 0.032, 0.032), "#8c1f2a"),
        cylinder((0, 0, 0.1490), (0, 0, 0.1588), 0.0074, "#c9964f"),
    ],
    # Two slanting boards with ridges, on a dark red stand.
    "turbosquid_objects/wine_rack": [painted(PINE, end=2), painted(OAK, 2, 4), painted(MAHOGANY, 4)],
    # Wooden crate: slats, corner posts and a rail at both ends.
    "turbosquid_objects/wooden_tray": [
        painted(OAK, end=4),
        painted("#b07c48", 4, 7),
        painted(OAK, 7, 9),
        painted("#7d5229", 9),
    ],
    # Dark wooden shelf, open in front.
    "turbosquid_objects/wooden_two_layer_shelf": [
        painted("#3f2b1e", end=2),
        painted("#33221a", 2, 4),
        painted("#5a3f2c", 4, 5),
        painted("#4a3323", 5),
    ],
    # Three rings, between which LIBERO's red site `burner` shows, and a black knob with a white mark: its bar
    # turns. The box below it is in physics.json: LIBERO's both collides and is visible.
    "articulated_objects/flat_stove": {
        "burner": [cylinder((0, 0, 0), (0, 0, 0.0205), 0.0680, "#3c3f43")],
        "burner_plate": [
            lathe((r, r, r - 0.009, r - 0.009), (0.02, 0.025, 0.025, 0.02), "#191a1c")
            for r in (0.0660, 0.0470, 0.0280)
        ],
        "button": [
            cylinder((0, 0.0045, 0), (0, 0.0045, 0.0125), 0.0460, "#202124"),
            box((0.0010, 0.0045, 0.0300), (0.0121, 0.0440, 0.0200), "#101012"),
            box((0.0010, 0.0400, 0.0490), (0.0030, 0.0080, 0.0020), WHITE),
        ],
    },
    # Black microwave oven, a gray inside, a window in the door, a silver handle and buttons.
    "articulated_objects/microwave": {
        "object": [
            box((-0.1580, 0.0115, 0.0935), (0.0145, 0.0995, 0.0935), "#2b2d31"),
            box((0.1180, 0.0115, 0.0935), (0.0545, 0.0995, 0.0935), "#2b2d31"),
            box((0.1300, -0.0985, 0.0935), (0.0425, 0.0120, 0.0935), "#1d1f22"),
            box((-0.0405, 0.0955, 0.0935), (0.1035, 0.0150, 0.0930), "#2b2d31"),
            box((-0.0405, 0.0800, 0.0935), (0.1035, 0.0010, 0.0800), "#8a9096"),
            box((-0.0400, 0.0040, 0.1775), (0.1035, 0.0920, 0.0095), "#2b2d31"),
            box((-0.0400, 0.0035, 0.0120), (0.1035, 0.0915, 0.0120), "#8a9096"),
            *[
                box((x, -0.1105, z), (0.0080, 0.0012, 0.0050), "#b9bdc4")
                for x in (0.1080, 0.1300, 0.1520)
                for z in (0.0500, 0.0700, 0.0900)
            ],
            box((0.1300, -0.1105, 0.1400), (0.0300, 0.0012, 0.0130), "#3fae6a"),
            cylinder((0.1300, -0.1090, 0.0220), (0.1300, -0.1130, 0.0220), 0.0120, SILVER),
        ],
        "microdoorroot": [
            box((0.1295, -0.0130, 0), (0.1295, 0.0110, 0.0915), "#1d1f22"),
            box((0.1295, -0.0130, 0), (0.0870, 0.0118, 0.0615), "#7d868e"),
            box((0.1295, -0.0130, 0), (0.0800, 0.0122, 0.0545), "#4d5660"),
            *tube(
                [
                    (0.2375, -0.0240, 0.0650),
                    (0.2375, -0.0540, 0.0650),
                    (0.2375, -0.0540, -0.0650),
                    (0.2375, -0.0240, -0.0650),
                ],
                0.0100,
                "#c2c6cc",
            ),
        ],
    },
    # Two cabinets with three drawers each, one white and one of dark wood, with silver handles.
    **{
        f"articulated_objects/{kind}": {
            "base": [painted(side, end=8), painted(top, 8)],
            **{
                f"cabinet_{level}": [painted(front, end=2), painted(inside, 2, 6), painted(handle, 6)]
                for level in ("top", "middle", "bottom")
            },
        }
        for kind, side, top, front, inside, handle in (
            ("white_cabinet", "#b6b6b0", "#c9c9c3", "#c2c2bc", "#92928c", "#6d7278"),
            ("wooden_cabinet", WALNUT, "#5c4130", "#6a4a34", "#3b271b", "#c2c6cc"),
        )
    },
    # The scenes. What stands behind the robot is left out where the cameras do not see it.
    "scenes/libero_floor_base_style": {},
    "scenes/libero_tabletop_base_style": {},
    "scenes/libero_kitchen_tabletop_base_style": {},
    "scenes/libero_living_room_tabletop_base_style": {"living_room_table_col": [painted("#4a2e22")]},
    # A desk, a shelf, a painting and a plant in its pot.
    "scenes/libero_study_base_style": {
        "study_table": [painted("#94683c")],
        "worldbody": [
            *[box((-1.85, y, 0.9), (0.15, 0.02, 0.9), IRON) for y in (-1.45, -0.55)],
            *[box((-1.85, -1.0, z), (0.15, 0.44, 0.015), "#b9bbbd") for z in (0.05, 0.5, 0.95, 1.4, 1.8)],
            box((-1.97, -1.0, 0.9), (0.01, 0.44, 0.9), "#d6d7d8"),
            box((-1.75, -0.62, 1.07), (0.06, 0.045, 0.10), BLACK),
            box((-1.97, 0.6, 1.6), (0.01, 0.60, 0.40), "#4f6a80"),
            box((-1.96, 0.75, 1.65), (0.01, 0.35, 0.25), "#d9a520"),
            box((-1.95, 0.15, 1.65), (0.01, 0.15, 0.25), "#6b1f2a"),
            lathe((0, 0.16, 0.22, 0), (0, 0, 0.4, 0.4), "#d0d2d4", axis=(-1.6, 0.6), sides=12),
            cylinder((-1.6, 0.6, 0.40), (-1.6, 0.6, 1.10), 0.035, "#6b5636"),
            *[
                leaf
                for z in (0.95, 1.15, 1.30)
                for a in np.arange(6) * np.pi / 3 + z
                for leaf in tube(
                    [
                        (-1.6, 0.6, z - 0.2),
                        (-1.6 + 0.17 * np.cos(a), 0.6 + 0.17 * np.sin(a), z),
                        (-1.6 + 0.34 * np.cos(a), 0.6 + 0.34 * np.sin(a), z - 0.08),
                    ],
                    0.02,
                    "#4f8a35",
                )
            ],
        ],
    },
    # Open basket in brown weave with a darker rim.
    "stable_scanned_objects/basket": [
        box((0, 0, 0.0131), (0.0724, 0.0700, 0.0085), WEAVE),
        box((-0.0735, 0, 0.0766), (0.0067, 0.0700, 0.0700), WEAVE, turn=("y", -3)),
        box((0.0745, 0, 0.0766), (0.0067, 0.0700, 0.0700), WEAVE, turn=("y", 3)),
        box((0, -0.0690, 0.0766), (0.0735, 0.0067, 0.0700), WEAVE, turn=("x", 3)),
        box((0, 0.0690, 0.0766), (0.0735, 0.0067, 0.0700), WEAVE, turn=("x", -3)),
        box((-0.0770, 0, 0.1430), (0.0085, 0.0800, 0.0060), RIM),
        box((0.0780, 0, 0.1430), (0.0085, 0.0800, 0.0060), RIM),
        box((0, -0.0720, 0.1430), (0.0770, 0.0085, 0.0060), RIM),
        box((0, 0.0720, 0.1430), (0.0770, 0.0085, 0.0060), RIM),
    ],
}
APPEARANCES["stable_hope_objects/new_salad_dressing"] = APPEARANCES["stable_hope_objects/salad_dressing"]


# ---------------------------------------------------------------------------------------------------------
# The robot.

# Source: robosuite models/assets/robots/panda/robot.xml and grippers/panda_gripper.xml. The arm's collision
# meshes have 200 or 300 triangles each and the outline of the real links, so they serve as visual meshes too,
# except link1's with its 12,500: link2 is the same part after a quarter turn. Dark caps mark the joints. The
# collision meshes of the hand and fingers are convex and hide what they are, so primitives stand for them.
ARM, HAND, FINGER, DARK = "#f4f5f6", "#ffffff", "#8a8c90", "#3a3a3c"


def _link(number: int, quat: str = "1 0 0 0") -> Geom:
    return {"type": "mesh", "mesh": f"robot0_link{number}", "quat": quat, **_paint(ARM)}


def _finger(side: int) -> list[Geom]:
    """A finger: its foot on the hand, the slanting middle and the tip; `side` 1 opens to +y, -1 to -y."""
    return [
        box((0, side * 0.0160, 0.0070), (0.0105, 0.0098, 0.0070), FINGER),
        box((0, side * 0.0160, 0.0260), (0.0085, 0.0042, 0.0170), FINGER, turn=("x", side * 22)),
        box((0, side * 0.0072, 0.0450), (0.0089, 0.0072, 0.0089), FINGER),
    ]


PANDA: dict[str, list[Geom]] = {
    "robot0_link0": [_link(0)],
    "robot0_link1": [_link(2, quat="0.707107 0.707107 0 0")],
    "robot0_link2": [_link(2)],
    "robot0_link3": [_link(3), cylinder((0.0825, 0.06, 0), (0.0825, 0.113, 0), 0.053, DARK)],
    "robot0_link4": [_link(4), cylinder((0, 0, 0.06), (0, 0, 0.113), 0.053, DARK)],
    "robot0_link5": [_link(5), ellipsoid((0, 0.088, -0.07), (0.050, 0.050, 0.125), DARK)],
    "robot0_link6": [
        _link(6),
        cylinder((0, 0, 0.03), (0, 0, 0.058), 0.045, DARK),
        box((0.089, 0.079, 0), (0.031, 0.004, 0.031), DARK),
    ],
    "robot0_link7": [
        cylinder((0, 0, 0.052), (0, 0, 0.107), 0.044, ARM),
        box((0.042, 0.042, 0.0785), (0.0220, 0.0340, 0.0180), ARM, turn=("z", 45)),
        box((0.046, 0.046, 0.0800), (0.0110, 0.0350, 0.0110), DARK, turn=("z", 45)),
    ],
    "gripper0_right_gripper": [
        box((0, 0, 0.0345), (0.1005, 0.0180, 0.0300), HAND),
        box((0, 0, 0.0200), (0.0980, 0.0230, 0.0140), HAND),
        cylinder((0, 0, -0.0080), (0, 0, 0.0100), 0.0315, HAND),
        box((0.0720, 0, -0.0050), (0.0250, 0.0100, 0.0100), HAND),
    ],
    "mount0_torso": [cylinder((0, 0, -0.037), (0, 0, -0.002), 0.165, "#26272a")],
    "mount0_pedestal": [
        cylinder((-0.02, 0, -0.85), (-0.02, 0, -0.03), 0.110, DARK),
        box((-0.325, 0, -0.38), (0.105, 0.175, 0.250), DARK),
        box((-0.1225, 0, -0.880), (0.370, 0.330, 0.040), DARK),
    ],
    "gripper0_leftfinger": _finger(1),
    "gripper0_rightfinger": _finger(-1),
}
