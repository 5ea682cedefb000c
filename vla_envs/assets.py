"""Built-in assets: LIBERO's asset folder with LIBERO's physics and our own look, made on the spot.

LIBERO builds a scene from a folder of meshes, textures and MJCF files that its PyPI package leaves out.
`write_builtin` writes a folder with the same layout. What a policy can feel is LIBERO's: collision boxes,
densities, frictions and sites come from `collision.json` (read from LIBERO's own files by `--write`). What a
policy sees is ours: each object is a handful of MuJoCo primitives (`LOOKS`), quick to draw in software.

    python -m vla_envs.assets --check path/to/libero_assets   # is collision.json still LIBERO's?
    python -m vla_envs.assets --write path/to/libero_assets   # read it anew, after adding to LOOKS
"""

import argparse
import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FIGURES = Path(__file__).with_name("collision.json")

Geom = dict[str, str]  # the attributes of one MJCF <geom>
Vector = Sequence[float]


# ---------------------------------------------------------------------------------------------------------
# A small vocabulary to draw with. Lengths in metres, in the object's own frame; colours as "#rrggbb".
# Much of what follows is drawn *through* an object, a little longer than it is thick: one disc or bar then
# shows on two opposite sides.

WEAVE = "weave"  # a colour of sorts: basket weave, see `_weave_texture`


def _text(values: Vector) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def _paint(color: str) -> Geom:
    if color == WEAVE:
        return {"material": WEAVE}
    return {"rgba": _text([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] + [1])}


def box(pos: Vector, half: Vector, color: str, turn: tuple[str, float] = ("z", 0)) -> Geom:
    """A box with half sizes `half`, turned about its own axis `turn[0]` by `turn[1]` degrees."""
    angle = np.radians(turn[1]) / 2
    quat = [np.cos(angle)] + [np.sin(angle) * (turn[0] == axis) for axis in "xyz"]
    return {"type": "box", "pos": _text(pos), "quat": _text(quat), "size": _text(half), **_paint(color)}


def cylinder(start: Vector, end: Vector, radius: float, color: str) -> Geom:
    """A cylinder around the line from `start` to `end`."""
    return {"type": "cylinder", "fromto": _text([*start, *end]), "size": _text([radius]), **_paint(color)}


def ellipsoid(pos: Vector, radii: Vector, color: str) -> Geom:
    """An ellipsoid with half axes `radii`."""
    return {"type": "ellipsoid", "pos": _text(pos), "size": _text(radii), **_paint(color)}


RED, GREEN, WHITE, SILVER = "#d3260f", "#0f8a3c", "#f4f4f0", "#a9adb5"
YELLOW, ORANGE, BLUE, NAVY, BLACK = "#f6d32a", "#f28a14", "#2f63d0", "#2c3f9e", "#181818"
BROWN, SAUCE, KETCHUP, RIM = "#4a2313", "#642610", "#e0400f", "#7a4a1e"

# Cans, cartons and two of the bottles stand along +y with their front to +z; the rest stands along +z.
# Sizes: LIBERO's collision boxes, and the outlines of its meshes to a millimetre or so.
LOOKS: dict[str, list[Geom]] = {
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


# ---------------------------------------------------------------------------------------------------------
# The figures: what LIBERO's files say of each object in LOOKS, apart from its look.

CONTACT = ("solimp", "solref", "density", "friction")


def read_figures(folder: Path) -> dict[str, Any]:
    """Reads the figures of every object in `LOOKS` from a folder of LIBERO's assets.

    Returns:
        "contact": the contact parameters that all geoms share (density in kg/m^3), and "objects": for each
        object its "points" (sites without a shape: "x y z"), its "regions" (box sites) and its collision
        "boxes" ("x y z qw qx qy qz" and half sizes). Lengths in m; all numbers exactly as in the file, all
        boxes in its order, so that the compiled physics is the same to the last bit.
    """

    def place(element: ET.Element) -> str:
        return " ".join(element.attrib[key] for key in ("pos", "quat", "size"))

    contacts, objects = set(), {}
    for name in sorted(LOOKS):
        root = ET.parse(folder / name / f"{Path(name).name}.xml").getroot()
        sites = list(root.iter("site"))
        contacts |= {tuple((key, geom.attrib[key]) for key in CONTACT) for geom in root.iter("geom")}
        objects[name] = {
            "points": {
                site.attrib["name"]: site.attrib["pos"] for site in sites if "type" not in site.attrib
            },
            "regions": {site.attrib["name"]: place(site) for site in sites if "type" in site.attrib},
            "boxes": [place(geom) for geom in root.iter("geom") if geom.get("group") == "0"],
        }
    (contact,) = contacts
    return {"contact": dict(contact), "objects": objects}


# ---------------------------------------------------------------------------------------------------------
# The folder.

# Source: LIBERO scenes/libero_floor_base_style.xml (floor, walls, lights, cameras; LIBERO's problem classes
# move the cameras afterwards). LIBERO swaps in the texture files of the style it wants, by name.
FLOOR_ARENA = """\
<mujoco model="floor_arena">
  <asset>
    <texture type="skybox" builtin="gradient" rgb1=".9 .9 1." rgb2=".2 .3 .4" width="256" height="256"/>
    <texture name="texplane" type="2d" file="../textures/light-gray-floor-tile.png"/>
    <texture name="tex-wall" type="2d" file="../textures/light-gray-plaster.png"/>
    <material name="floorplane" texture="texplane" texrepeat="3 3" texuniform="true"
              reflectance="0" shininess="0" specular="0"/>
    <material name="walls_mat" texture="tex-wall" texrepeat="3 3" texuniform="true"
              reflectance="0" shininess="0.1" specular="0.8"/>
  </asset>
  <worldbody>
    <body name="floor" pos="0 0 0">
      <geom name="floor" type="plane" size="3 3 .125" condim="3" group="1" material="floorplane"/>
    </body>
    <geom name="wall_leftcorner_visual" pos="-1.25 2.25 1.5" size="1.06 1.5 0.01"
          quat="0.6532815 0.6532815 0.2705981 0.2705981" {wall}/>
    <geom name="wall_rightcorner_visual" pos="-1.25 -2.25 1.5" size="1.06 1.5 0.01"
          quat="0.6532815 0.6532815 -0.2705981 -0.2705981" {wall}/>
    <geom name="wall_left_visual" pos="1.25 3 1.5" quat="0.7071 0.7071 0 0" size="1.75 1.5 0.01" {wall}/>
    <geom name="wall_right_visual" pos="1.25 -3 1.5" quat="0.7071 -0.7071 0 0" size="1.75 1.5 0.01" {wall}/>
    <geom name="wall_rear_visual" pos="-2 0 1.5" quat="0.5 0.5 0.5 0.5" size="1.5 1.5 0.01" {wall}/>
    <geom name="wall_front_visual" pos="3 0 1.5" quat="0.5 0.5 -0.5 -0.5" size="3 1.5 0.01" {wall}/>
    <light name="light1" pos="1 1 4" dir="0 -.15 -1" {light}/>
    <light name="light2" pos="-3 -3 4" dir="0 -.15 -1" {light}/>
    <camera name="frontview" mode="fixed" pos="1 0 1.45" quat="0.56 0.43 0.43 0.56"/>
    <camera name="birdview" mode="fixed" pos="-0.2 0 3" quat="0.7071 0 0 0.7071"/>
    <camera name="agentview" mode="fixed" pos="0.5 0 1.35" quat="0.653 0.271 0.271 0.653"/>
    <camera name="sideview" mode="fixed" pos="-0.05651774593317116 1.2761224129427358 1.4879572214102434"
            quat="0.009905065491771751 0.006877963156909582 0.5912228352893879 0.806418094001364"/>
  </worldbody>
</mujoco>
""".format(
    wall='type="box" contype="0" conaffinity="0" group="1" material="walls_mat"',
    light='directional="false" castshadow="false" diffuse=".8 .8 .8" specular="0.3 0.3 0.3"',
)

ARENAS = {"scenes/libero_floor_base_style.xml": FLOOR_ARENA}
TEXTURES = ("light-gray-floor-tile.png", "light-gray-plaster.png")  # robosuite has LIBERO's under these names
TEXTURE_SIZE = 256  # pixels: at 128 x 128 images no one sees more, and textures are most of a compiled model


def _weave_texture(cells: int = 8, size: int = 64) -> Image.Image:
    """A basket weave: strips over and under each other, dark where a strip dives under the next."""
    y, x = np.mgrid[:size, :size] * cells / size
    over = (x.astype(int) + y.astype(int)) % 2 == 0
    shade = 0.55 + 0.45 * np.sin(np.pi * np.where(over, x, y) % np.pi) ** 0.5
    return Image.fromarray((shade[..., None] * [186, 130, 72]).astype(np.uint8))


def _object_xml(name: str, contact: dict[str, str], figures: dict[str, Any]) -> str:
    """One object file: LIBERO's structure, its collision boxes and sites, and our look."""
    root = ET.Element("mujoco", model=Path(name).name)
    asset = ET.SubElement(root, "asset")
    if any(geom.get("material") == WEAVE for geom in LOOKS[name]):
        ET.SubElement(asset, "texture", name=WEAVE, type="cube", file=f"../../textures/{WEAVE}.png")
        ET.SubElement(asset, "material", name=WEAVE, texture=WEAVE)
    outer = ET.SubElement(ET.SubElement(root, "worldbody"), "body")
    body = ET.SubElement(outer, "body", name="object")

    def add(parent: ET.Element, tag: str, place: str, **attributes: str) -> None:
        numbers = place.split()
        pos, quat, size = " ".join(numbers[:3]), " ".join(numbers[3:7]), " ".join(numbers[7:])
        box = {"type": "box", "pos": pos, "quat": quat, "size": size, "group": "0"}
        ET.SubElement(parent, tag, box | attributes)

    for site, place in figures["regions"].items():
        add(body, "site", place, name=site, rgba="0 0 0 0")
    # One visual geom, the collision boxes, then the rest: robosuite numbers the geoms, and so the boxes get
    # the names they have in LIBERO, where a single mesh comes first.
    drawn = [{**geom, "group": "1", "contype": "0", "conaffinity": "0"} for geom in LOOKS[name]]
    ET.SubElement(body, "geom", drawn[0])
    for place in figures["boxes"]:
        add(body, "geom", place, rgba="0.8 0.8 0.8 0.3", **contact)
    for geom in drawn[1:]:
        ET.SubElement(body, "geom", geom)
    for site, pos in figures["points"].items():
        ET.SubElement(outer, "site", name=site, pos=pos, size="0.005", rgba="0 0 0 0")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode")


def _package(name: str) -> Path:
    """The folder of an installed package, found without importing it (robosuite's import is slow)."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed")
    return Path(spec.origin).parent


def write_builtin(folder: Path) -> None:
    """Writes the built-in assets into `folder`, in the layout of LIBERO's asset folder."""
    table = json.loads(FIGURES.read_text())
    files = dict(ARENAS)
    for name in LOOKS:
        files[f"{name}/{Path(name).name}.xml"] = _object_xml(name, table["contact"], table["objects"][name])
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    textures = folder / "textures"
    textures.mkdir(parents=True, exist_ok=True)
    for texture in TEXTURES:
        image = Image.open(_package("robosuite") / "models/assets/textures" / texture).convert("RGB")
        image.resize((TEXTURE_SIZE, TEXTURE_SIZE), Image.Resampling.LANCZOS).save(textures / texture)
    _weave_texture().save(textures / f"{WEAVE}.png")


# ---------------------------------------------------------------------------------------------------------
# The robot.

# Source: robosuite models/assets/robots/panda/robot.xml and grippers/panda_gripper.xml. The arm's collision
# meshes have 200 or 300 triangles each and the outline of the real links, so we draw those, all but link1's
# with its 12,500: link2 is the same part, turned by a quarter. Dark caps mark the joints. The hand's and
# fingers' collision meshes are convex and hide what they are, so those are drawn from primitives.
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
    "gripper0_leftfinger": _finger(1),
    "gripper0_rightfinger": _finger(-1),
}


def simple_robot(xml: str) -> str:
    """Swaps the Panda's visual meshes (over 100,000 triangles) for light ones, in a full scene.

    Only the geoms that are drawn change; bodies, joints, masses, sites and collision geoms stay as they are
    and in their order. Meshes, materials and textures that nothing uses any more are dropped.

    Args:
        xml: a LIBERO scene with a Panda (`env.model.get_xml()` of a robosuite environment).

    Returns:
        The lighter scene.
    """
    root = ET.fromstring(xml)
    for body in root.iter("body"):
        if body.get("name") not in PANDA:
            continue
        old = [geom for geom in body.findall("geom") if geom.get("group") == "1"]
        place, name = list(body).index(old[0]), old[0].attrib["name"]
        for geom in old:
            body.remove(geom)
        for i, attributes in enumerate(PANDA[body.attrib["name"]]):
            geom = ET.Element("geom", attributes, group="1", contype="0", conaffinity="0")
            geom.set("name", name if i == 0 else f"{name}_{i}")
            body.insert(place + i, geom)
    _drop_unused(root)
    return ET.tostring(root, encoding="unicode")


def _drop_unused(root: ET.Element) -> None:
    """Removes the assets that no element refers to; materials go first, as they keep textures in use."""
    asset = root.find("asset")
    assert asset is not None
    for kind in ("mesh", "material", "texture"):
        used = {element.get(kind) for element in root.iter() if element.tag != kind}
        for element in asset.findall(kind):
            if element.get("type") != "skybox" and element.get("name") not in used:
                asset.remove(element)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare collision.json with LIBERO's own asset folder.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--check", type=Path, metavar="FOLDER", help="compare, and exit with 1 on a difference"
    )
    action.add_argument("--write", type=Path, metavar="FOLDER", help="read the figures anew")
    args = parser.parse_args()
    if args.write:
        FIGURES.write_text(json.dumps(read_figures(args.write), indent=1) + "\n")
        return
    ours, theirs = json.loads(FIGURES.read_text()), read_figures(args.check)
    same = {"contact": ours["contact"] == theirs["contact"]}
    same |= {name: ours["objects"].get(name) == figures for name, figures in theirs["objects"].items()}
    for name, equal in same.items():
        print(f"{'same  ' if equal else 'DIFFER'}  {name}")
    raise SystemExit(not all(same.values()))


if __name__ == "__main__":
    main()
