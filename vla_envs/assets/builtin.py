"""Built-in assets: LIBERO's asset folder with LIBERO's physics and our own appearance, written on the spot.

LIBERO builds a scene from a folder of meshes, textures and MJCF files that its PyPI package leaves out.
`write_builtin` writes a folder with the same layout and with everything that the 130 tasks name. What a
policy can feel is LIBERO's: `physics.json`, which was read from LIBERO's own files, holds bodies, joints,
masses, collision shapes, frictions and sites. What a policy sees is ours: each object is a handful of MuJoCo
primitives (`APPEARANCES`), which software renders quickly.
"""

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vla_envs.assets.appearance import APPEARANCES, PANDA, WEAVE, Geom

PHYSICS = Path(__file__).with_name("physics.json")

# ---------------------------------------------------------------------------------------------------------
# The physics: what LIBERO's files say about everything in APPEARANCES, apart from how it looks.

CONTACT = ("solimp", "solref", "density", "friction")


def _file(name: str) -> str:
    """The file of a name in `APPEARANCES`; most names have a folder of their own."""
    folder, short = name.split("/")
    return f"{name}.xml" if folder in ("articulated_objects", "scenes") else f"{name}/{short}.xml"


def read_physics(folder: Path) -> dict[str, Any]:
    """Read the physics of everything in `APPEARANCES` from a folder of LIBERO's assets.

    Returns:
        A dict of "contact", the contact parameters that collision boxes share (density in kg/m^3), and
        "elements", which has each file's tree as [tag, attributes, child, ...]. A child can also be a string,
        which is a collision box ("x y z qw qx qy qz" and half sizes), or null, which is a visual geom of
        LIBERO's. Lengths are in m. Numbers and order are the file's, so that the compiled physics is the same
        to the last bit.
    """
    roots = {name: ET.parse(folder / _file(name)).getroot() for name in sorted(APPEARANCES)}
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
    """The sky, and the textures and materials of walls, floors and tables; others belong to meshes."""
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

# The textures that LIBERO's scenes name or swap in for their style: each is the nearest of robosuite's, mixed
# half and half with a colour. The gray floor and the gray plaster are LIBERO's own.
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
TEXTURE_SIZE = 256  # pixels; images of 128 x 128 show no more, and textures make up most of a model


def _weave_texture(cells: int = 8, size: int = 64) -> Image.Image:
    """A basket weave: strips over and under each other, dark where a strip dives under the next."""
    y, x = np.mgrid[:size, :size] * cells / size
    over = (x.astype(int) + y.astype(int)) % 2 == 0
    shade = 0.55 + 0.45 * np.sin(np.pi * np.where(over, x, y) % np.pi) ** 0.5
    return Image.fromarray((shade[..., None] * [186, 130, 72]).astype(np.uint8))


def _xml(name: str, contact: dict[str, str], physics: Any) -> str:
    """One file of the folder: LIBERO's physics and our appearance."""
    given = APPEARANCES[name]
    appearance = given if isinstance(given, dict) else {_first_visual_body(physics): given}
    # robosuite names an object's geoms by number. Collision shapes keep the names that they have in LIBERO;
    # our visual geoms take the numbers of LIBERO's meshes, and further ones come after all of them.
    numbers, further = count(), count(_count_geoms(physics))

    def build(node: list[Any]) -> ET.Element:
        tag, attributes, *children = node
        element = ET.Element(tag, attributes)

        def add(number: int, shape: Geom) -> None:
            numbered = {} if name.startswith("scenes/") else {"name": f"g{number}"}
            ET.SubElement(element, "geom", numbered | shape)

        ours = appearance.get(attributes.get("name", tag), []) if tag.endswith("body") else []
        visual = _visual_geoms(ours, [child for child in children if isinstance(child, str)])
        for child in children:
            if isinstance(child, list) and child[0] != "geom":
                element.append(build(child))
                continue
            number = next(numbers)
            if isinstance(child, str):
                add(number, {**_box(child), "group": "0", "rgba": "0.8 0.8 0.8 0.3", **contact})
            elif child is not None:
                add(number, child[1])
            elif (shape := next(visual, None)) is not None:
                add(number, shape)
        for shape in visual:
            add(next(further), shape)
        return element

    root = build(physics)
    asset = root.find("asset")
    assert asset is not None
    for i, geom in enumerate(root.iter("geom")):
        if "vertex" in geom.attrib:
            shape = {key: geom.attrib.pop(key) for key in ("vertex", "face")}
            ET.SubElement(asset, "mesh", shape, name=f"mesh{i}", inertia="shell")
            geom.set("mesh", f"mesh{i}")
    if any(geom.get("material") == WEAVE for geom in root.iter("geom")):
        ET.SubElement(asset, "texture", name=WEAVE, type="cube", file=f"../../textures/{WEAVE}.png")
        ET.SubElement(asset, "material", name=WEAVE, texture=WEAVE)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode")


def _box(text: str) -> Geom:
    numbers = text.split()
    pos, quat, size = " ".join(numbers[:3]), " ".join(numbers[3:7]), " ".join(numbers[7:])
    return {"type": "box", "pos": pos, "quat": quat, "size": size}


def _visual_geoms(appearance: list[Geom], boxes: list[str]) -> Iterator[Geom]:
    """The geoms of an appearance, with `painted` boxes written out."""
    for geom in appearance:
        if "boxes" in geom:
            paint = {key: value for key, value in geom.items() if key != "boxes"}
            first, end = geom["boxes"].split(":")
            shapes = [_box(box) | paint for box in boxes[int(first) : int(end) if end else None]]
        else:
            shapes = [geom]
        for shape in shapes:
            yield {**shape, "group": "1", "contype": "0", "conaffinity": "0"}


def _first_visual_body(node: list[Any]) -> str:
    """The name of the first body that has a visual geom in LIBERO, or ""."""
    _, attributes, *children = node
    if None in children:
        return str(attributes["name"])
    return next(
        (name for child in children if isinstance(child, list) if (name := _first_visual_body(child))), ""
    )


def _count_geoms(node: Any) -> int:
    """How many geoms LIBERO has in a tree of `read_physics`."""
    if not isinstance(node, list) or node[0] == "geom":
        return 1
    return sum(_count_geoms(child) for child in node[2:])


def _package(name: str) -> Path:
    """The folder of an installed package, found without importing it, since robosuite's import is slow."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed")
    return Path(spec.origin).parent


def write_builtin(folder: Path) -> None:
    """Write the built-in assets into `folder`, in the layout of LIBERO's asset folder."""
    physics = json.loads(PHYSICS.read_text())
    for name in APPEARANCES:
        path = folder / _file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_xml(name, physics["contact"], physics["elements"][name]))
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
    """The scene ``xml`` with light visual geoms in place of the Panda's and its mount's 100,000 triangles.

    Only visual geoms change; bodies, joints, masses, sites and collision geoms keep their values and their
    order. Meshes, materials and textures that nothing uses any more are dropped.

    Args:
        xml: A LIBERO scene with a Panda (`env.model.get_xml()` of a robosuite environment).
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
    """Remove the assets that no element refers to; materials go before textures, which they keep in use."""
    asset = root.find("asset")
    assert asset is not None
    for kind in ("mesh", "material", "texture"):
        used = {element.get(kind) for element in root.iter() if element.tag != kind}
        for element in asset.findall(kind):
            if element.get("type") != "skybox" and element.get("name") not in used:
                asset.remove(element)
