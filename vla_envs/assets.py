"""Built-in assets: LIBERO's asset folder with LIBERO's physics and our own look, made on the spot.

LIBERO builds a scene from a folder of meshes, textures and MJCF files that its PyPI package leaves out.
`write_builtin` writes a folder with the same layout, with everything that the 130 tasks name. What a policy
can feel is LIBERO's: bodies, joints, masses, collision shapes, frictions and sites come from `figures.json`
(read from LIBERO's own files by `--write`). What a policy sees is ours: each object is a handful of MuJoCo
primitives (`LOOKS`), quick to draw in software.

    python -m vla_envs.assets --check path/to/libero_assets   # is figures.json still LIBERO's?
    python -m vla_envs.assets --write path/to/libero_assets   # read it anew, after adding to LOOKS
"""

import argparse
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vla_envs.looks import LOOKS, PANDA, WEAVE, Geom

FIGURES = Path(__file__).with_name("figures.json")

# ---------------------------------------------------------------------------------------------------------
# The figures: what LIBERO's files say of everything in LOOKS, apart from its look.

CONTACT = ("solimp", "solref", "density", "friction")


def _file(name: str) -> str:
    """The file of a name in `LOOKS`; most have a folder of their own."""
    folder, short = name.split("/")
    return f"{name}.xml" if folder in ("articulated_objects", "scenes") else f"{name}/{short}.xml"


def read_figures(folder: Path) -> dict[str, Any]:
    """Reads the figures of everything in `LOOKS` from a folder of LIBERO's assets.

    Returns:
        "contact": the contact parameters that collision boxes share (density in kg/m^3), and "elements": for
        each name the file's tree as [tag, attributes, child, ...]. A child may also be a string, a collision
        box ("x y z qw qx qy qz" and half sizes), or null, a geom that LIBERO draws. Lengths in m; numbers and
        order are the file's, so that the compiled physics is the same to the last bit.
    """
    roots = {name: ET.parse(folder / _file(name)).getroot() for name in sorted(LOOKS)}
    geoms = [geom for root in roots.values() for geom in root.iter("geom") if geom.get("group") == "0"]
    contacts = {
        tuple((key, geom.attrib[key]) for key in CONTACT) for geom in geoms if "density" in geom.attrib
    }
    (contact,) = contacts
    plain = {"type": "box", "group": "0", **dict(contact)}
    place = ("pos", "quat", "size")

    def read(element: ET.Element, materials: set[str | None]) -> Any:
        attributes = dict(element.attrib)
        if element.tag == "geom" and attributes.get("material") not in materials:
            if attributes.get("contype") == attributes.get("conaffinity") == "0":
                return None
            if {**attributes, **plain} == attributes and attributes.keys() == {*plain, *place, "rgba"}:
                return " ".join(attributes[key] for key in place)
            attributes.pop("material", None)
        return [element.tag, attributes, *(read(child, materials) for child in element)]

    elements = {}
    for name, root in roots.items():
        classes = {item.get("class"): item.find("geom") for item in root.iterfind("default/default")}
        for geom in root.iterfind("worldbody//geom"):
            default = classes.get(geom.attrib.pop("class", None))
            geom.attrib.update({**default.attrib, **geom.attrib} if default is not None else {})
        assets = _surfaces(root)
        materials = {item.get("name") for item in assets if item.tag == "material"}
        world = root.find("worldbody")
        assert world is not None
        elements[name] = [
            "mujoco",
            {"model": Path(name).name},
            ["asset", {}, *([item.tag, dict(item.attrib)] for item in assets)],
            read(world, materials),
        ]
    return {"contact": dict(contact), "elements": elements}


def _surfaces(root: ET.Element) -> list[ET.Element]:
    """The sky, and the textures and materials of walls, floors and tables: the rest goes with its meshes."""
    used = {geom.get("material") for geom in root.iterfind("worldbody//geom")}
    shared = {
        item.get("name")
        for item in root.iterfind("asset/texture")
        if item.get("file", "").startswith("../textures/")
    }
    materials = [
        item
        for item in root.iterfind("asset/material")
        if item.get("name") in used and item.get("texture") in shared
    ]
    needed = {item.get("texture") for item in materials}
    textures = [
        item
        for item in root.iterfind("asset/texture")
        if item.get("type") == "skybox" or item.get("name") in needed
    ]
    return textures + materials


# ---------------------------------------------------------------------------------------------------------
# The folder.

# The textures that LIBERO's scenes name or swap in for their style: the nearest of robosuite's, and a colour
# to mix them with, half and half. The gray floor and the gray plaster are LIBERO's own.
TEXTURES: dict[str, tuple[str, str | None]] = {
    "light-gray-floor-tile.png": ("light-gray-floor-tile.png", None),
    "tile_grigia_caldera_porcelain_floor.png": ("light-gray-floor-tile.png", None),
    "light-gray-plaster.png": ("light-gray-plaster.png", None),
    "smooth_light_gray_plaster.png": ("light-gray-plaster.png", None),
    "yellow_linen_wall_texture.png": ("yellow-plaster.png", "#f4f4d8"),
    "gray_ceramic_tile.png": ("ceramic.png", "#9c948c"),
    "seamless_wood_planks_floor.png": ("light-wood.png", "#f6d890"),
    "martin_novak_wood_table.png": ("light-wood.png", "#c4b6aa"),
}
TEXTURE_SIZE = 256  # pixels: at 128 x 128 images no one sees more, and textures are most of a compiled model


def _weave_texture(cells: int = 8, size: int = 64) -> Image.Image:
    """A basket weave: strips over and under each other, dark where a strip dives under the next."""
    y, x = np.mgrid[:size, :size] * cells / size
    over = (x.astype(int) + y.astype(int)) % 2 == 0
    shade = 0.55 + 0.45 * np.sin(np.pi * np.where(over, x, y) % np.pi) ** 0.5
    return Image.fromarray((shade[..., None] * [186, 130, 72]).astype(np.uint8))


def _xml(name: str, contact: dict[str, str], figures: Any) -> str:
    """One file of the folder: LIBERO's figures and our look."""
    look = LOOKS[name]
    looks = look if isinstance(look, dict) else {_drawn_body(figures): look}
    # robosuite numbers the geoms of an object to name them. Collision shapes get the names that they have in
    # LIBERO, among its meshes; what we draw beyond those is numbered after them.
    numbers, beyond = count(), count(_geoms(figures))

    def build(node: list[Any]) -> ET.Element:
        tag, attributes, *children = node
        element = ET.Element(tag, attributes)

        def add(number: int, shape: Geom) -> None:
            numbered = {} if name.startswith("scenes/") else {"name": f"g{number}"}
            ET.SubElement(element, "geom", numbered | shape)

        look = looks.get(attributes.get("name", tag), []) if tag.endswith("body") else []
        drawn = _drawn(look, [child for child in children if isinstance(child, str)])
        for child in children:
            if isinstance(child, list) and child[0] != "geom":
                element.append(build(child))
                continue
            number = next(numbers)
            if isinstance(child, str):
                add(number, {**_box(child), "group": "0", "rgba": "0.8 0.8 0.8 0.3", **contact})
            elif child is not None:
                add(number, child[1])
            elif (shape := next(drawn, None)) is not None:
                add(number, shape)
        for shape in drawn:
            add(next(beyond), shape)
        return element

    root = build(figures)
    asset = root.find("asset")
    assert asset is not None
    for i, geom in enumerate(root.iter("geom")):
        if "vertex" in geom.attrib:
            shape = {key: geom.attrib.pop(key) for key in ("vertex", "face")}
            ET.SubElement(asset, "mesh", shape, name=f"look{i}", inertia="shell")
            geom.set("mesh", f"look{i}")
    if any(geom.get("material") == WEAVE for geom in root.iter("geom")):
        ET.SubElement(asset, "texture", name=WEAVE, type="cube", file=f"../../textures/{WEAVE}.png")
        ET.SubElement(asset, "material", name=WEAVE, texture=WEAVE)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode")


def _box(figures: str) -> Geom:
    numbers = figures.split()
    pos, quat, size = " ".join(numbers[:3]), " ".join(numbers[3:7]), " ".join(numbers[7:])
    return {"type": "box", "pos": pos, "quat": quat, "size": size}


def _drawn(look: list[Geom], boxes: list[str]) -> Iterator[Geom]:
    """The geoms of a look, `painted` boxes written out."""
    for geom in look:
        if "boxes" in geom:
            paint = {key: value for key, value in geom.items() if key != "boxes"}
            first, end = geom["boxes"].split(":")
            shapes = [_box(box) | paint for box in boxes[int(first) : int(end) if end else None]]
        else:
            shapes = [geom]
        for shape in shapes:
            yield {**shape, "group": "1", "contype": "0", "conaffinity": "0"}


def _drawn_body(node: list[Any]) -> str:
    """The name of the first body in which LIBERO draws something, or ""."""
    _, attributes, *children = node
    if None in children:
        return str(attributes["name"])
    return next((name for child in children if isinstance(child, list) if (name := _drawn_body(child))), "")


def _geoms(node: Any) -> int:
    """How many geoms LIBERO has in a tree of figures."""
    if not isinstance(node, list) or node[0] == "geom":
        return 1
    return sum(_geoms(child) for child in node[2:])


def _package(name: str) -> Path:
    """The folder of an installed package, found without importing it (robosuite's import is slow)."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed")
    return Path(spec.origin).parent


def write_builtin(folder: Path) -> None:
    """Writes the built-in assets into `folder`, in the layout of LIBERO's asset folder."""
    table = json.loads(FIGURES.read_text())
    for name in LOOKS:
        path = folder / _file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_xml(name, table["contact"], table["elements"][name]))
    textures = folder / "textures"
    textures.mkdir(parents=True, exist_ok=True)
    for texture, (nearest, tint) in TEXTURES.items():
        image = Image.open(_package("robosuite") / "models/assets/textures" / nearest).convert("RGB")
        image = image.resize((TEXTURE_SIZE, TEXTURE_SIZE), Image.Resampling.LANCZOS)
        if tint:
            image = Image.blend(image, Image.new("RGB", image.size, tint), 0.5)
        image.save(textures / texture)
    _weave_texture().save(textures / f"{WEAVE}.png")


# ---------------------------------------------------------------------------------------------------------
# The robot.


def simple_robot(xml: str) -> str:
    """Swaps the visual meshes of the Panda and its mount, over 100,000 triangles, for light ones.

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
    parser = argparse.ArgumentParser(description="Compare figures.json with LIBERO's own asset folder.")
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
    same |= {name: ours["elements"].get(name) == figures for name, figures in theirs["elements"].items()}
    for name, equal in same.items():
        print(f"{'same  ' if equal else 'DIFFER'}  {name}")
    raise SystemExit(not all(same.values()))


if __name__ == "__main__":
    main()
