"""Objects of one's own: MJCF files that anybody may have written, validated, and written anew for LIBERO.

robosuite's reader of such files (``MujocoXMLObject``) wants one layout, ignores ``<compiler>``, and opens
whatever a file names. So MuJoCo reads a file here first, and LIBERO gets what came out: one rigid body in
robosuite's layout, its numbers written out, and copies of its meshes and textures.
"""

import hashlib
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from vla_envs.bddl import KINDS, new_classes
from vla_envs.inputs import in_short, nearest

MOST_BYTES = 2**20  # of a file; LIBERO's own have up to 40 kB
MOST_FILE_BYTES = 2**26  # of its meshes and textures together
MOST_GEOMS = 1000  # LIBERO's own have up to 78
MOST_REACH = 1.0  # m from an object's origin
MOST_PIXELS = 4096  # height and width of a texture
ELEMENTS = (
    "mujoco", "compiler", "default", "asset", "mesh", "texture", "material", "worldbody", "body", "frame",
    "inertial", "joint", "freejoint", "geom", "site",
)  # fmt: skip
FILES = {"mesh": (".obj", ".stl", ".msh"), "texture": (".png",)}
#: Sites that LIBERO's samplers read (robosuite's ``MujocoXMLObject``).
SITES = ("bottom_site", "top_site", "horizontal_radius_site")
NAME = r"(?!default_site$)[a-z][a-z0-9_]{0,60}"  # of a class, or of a region; robosuite adds default_site
_MESH = ("name", "file", "scale", "refpos", "refquat", "inertia", "smoothnormal", "maxhullvert", "uservert",
         "userface", "usernormal", "usertexcoord", "userfacetexcoord")  # fmt: skip
_TEXTURE = ("name", "file", "type", "builtin", "cubefiles", "gridlayout", "gridsize", "height", "width",
            "hflip", "vflip", "mark", "markrgb", "nchannel", "random", "rgb1", "rgb2")  # fmt: skip
_MATERIAL = ("name", "textures", "rgba", "emission", "metallic", "reflectance", "roughness", "shininess",
             "specular", "texrepeat", "texuniform")  # fmt: skip
_CONTACT = ("condim", "friction", "gap", "margin", "priority", "solimp", "solmix", "solref")


@dataclass(frozen=True)
class OwnObject:
    """A class of objects, as LIBERO gets it."""

    name: str
    regions: tuple[str, ...]  # in or on which things can be
    xml: str  # in robosuite's layout
    files: tuple[tuple[str, bytes], ...] = field(repr=False)  # meshes and textures by the names in ``xml``

    @property
    def digest(self) -> str:
        """A digest of everything that LIBERO gets."""
        digest = hashlib.sha256(f"{self.name};{self.xml}".encode())
        for name, content in self.files:
            digest.update(f"{name};{hashlib.sha256(content).hexdigest()};".encode())
        return digest.hexdigest()


def read_objects(objects: Any) -> dict[str, OwnObject]:
    """Objects of one's own by class, from the argument ``objects`` of the environments.

    Raises:
        ValueError: When it is no dict of classes and files, a class is LIBERO's, or as ``read``.
    """
    if not isinstance(objects, Mapping):
        raise ValueError(f"objects is {in_short(objects)}; expected a dict, as {{'my_mug': 'mug.xml'}}")
    for name, file in objects.items():
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            raise ValueError(f"objects has {in_short(name)}; expected a class: letters a to z, digits and _")
        if name in KINDS:
            raise ValueError(f"objects has {name!r}, a class of LIBERO's; expected another name")
        if not isinstance(file, str | os.PathLike):
            raise ValueError(f"objects has {in_short(file)} for {name!r}; expected the path of an MJCF file")
    return {name: read(name, Path(file)) for name, file in objects.items()}


def beside(bddl_file: Path, others: Collection[str] = ()) -> dict[str, OwnObject]:
    """The objects whose files lie beside a BDDL file that uses them, each named as its class; not ``others``.

    Raises:
        ValueError: As ``read``.
    """
    try:
        with bddl_file.open(encoding="utf-8") as stream:
            text = stream.read(MOST_BYTES)
    except (OSError, ValueError):
        return {}  # ``bddl.read`` says what is wrong
    names = sorted({name for name in new_classes(text) if re.fullmatch(NAME, name)} - {*others})
    files = {name: bddl_file.parent / f"{name}.xml" for name in names}
    return {name: read(name, file) for name, file in files.items() if file.is_file()}


def read(name: str, path: Path) -> OwnObject:
    """The class ``name`` from the MJCF file ``path``.

    Raises:
        ValueError: When it cannot be read, is too large, has what an object does not need, refers to files
            outside its folder, or is not one rigid body with collision geoms; one line.
    """
    try:
        xml, regions, files = _written_anew(*_gathered(path))
        return OwnObject(name, regions, xml, files)
    except RecursionError:
        reason = "it is nested too deeply"
    except OSError as error:
        others = [each.name for each in path.parent.glob("*.xml")] if path.parent.is_dir() else []
        hint = nearest(path.name, others) if isinstance(error, FileNotFoundError) else ""
        reason = f"it cannot be read: {error.strerror or error}{hint}"
    except (ValueError, mujoco.FatalError) as error:
        words = re.sub(r", (id \d+, )?line \d+$", "", str(error).strip())  # MuJoCo's, of the text that it got
        reason = " ".join(words.split())
    raise ValueError(f"object {name}, file {str(path)!r}: {reason}")


def _content(path: Path, most: int) -> bytes:
    """A plain file's bytes, of which there are at most ``most``."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name!r} is no plain file")
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path.name!r} has {size} bytes; expected at most {most}")
    return path.read_bytes()


def _gathered(path: Path) -> tuple[str, tuple[tuple[str, bytes], ...]]:
    """The text of an MJCF file with its meshes and textures under names of ours, and these."""
    try:
        text = _content(path, MOST_BYTES).decode("utf-8")
        root = ET.fromstring("" if "<!DOCTYPE" in text else text)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: byte {error.start}") from None
    except ET.ParseError as error:
        raise ValueError(f"it is not XML: {error}; expected MJCF, and no DOCTYPE") from None
    if (count := len(root.findall("worldbody//geom"))) > MOST_GEOMS:
        raise ValueError(f"it has {count} geoms; expected at most {MOST_GEOMS}")
    folders = {"mesh": "", "texture": ""}
    for compiler in root.iter("compiler"):
        both = compiler.attrib.pop("assetdir", None)
        for kind in folders:
            folders[kind] = compiler.attrib.pop(f"{kind}dir", both or folders[kind])
    files: dict[str, bytes] = {}
    for element in root.iter():
        if element.tag not in ELEMENTS:
            raise ValueError(
                f"it has <{in_short(element.tag)[1:-1]}>, which an object does not need; expected some of"
                f" {', '.join(ELEMENTS)}"
            )
        if any(re.search(r"\bnan\b", value.lower()) for value in element.attrib.values()):
            raise ValueError(f"a {element.tag} has nan; expected a number")
        for key in [key for key in element.attrib if key.startswith("file")]:
            if element.tag not in FILES:
                raise ValueError(f"<{element.tag}> has {key}; expected it of a mesh or a texture")
            given = element.attrib[key]
            source = _inside(path.resolve().parent, folders[element.tag], given, FILES[element.tag])
            element.attrib.setdefault("name", PurePosixPath(given).stem)  # MuJoCo's, which materials use
            element.attrib[key] = f"{len(files)}{source.suffix.lower()}"
            files[element.attrib[key]] = _content(source, MOST_FILE_BYTES)
            if sum(map(len, files.values())) > MOST_FILE_BYTES:
                raise ValueError(f"its meshes and textures have more than {MOST_FILE_BYTES} bytes in all")
    return ET.tostring(root, encoding="unicode"), tuple(files.items())


def _inside(folder: Path, directory: str, given: str, suffixes: tuple[str, ...]) -> Path:
    """The mesh or texture ``given``, which has to be inside of ``folder``."""
    path = (folder / directory / given).resolve()
    if os.path.isabs(directory) or os.path.isabs(given) or not path.is_relative_to(folder):
        raise ValueError(f"{given!r} lies outside of its folder; expected a path to a file inside of it")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{given!r} is of another kind; expected a file that ends in one of {suffixes}")
    if not path.is_file():
        others = [each.name for each in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ValueError(f"{given!r} is no file{nearest(path.name, others)}")
    if path.suffix.lower() == ".png":
        with path.open("rb") as stream:
            size = np.frombuffer(stream.read(24).ljust(24, b"\0")[16:], ">u4")
        if size.max() > MOST_PIXELS:
            raise ValueError(f"{given!r} has {size[0]} x {size[1]} pixels; expected at most {MOST_PIXELS}")
    return path


def _require_one_body(given: mujoco.MjSpec) -> None:
    """Refuse what is not one rigid body with collision geoms, or would take much memory."""
    bodies = given.worldbody.bodies
    if len(bodies) != 1:
        raise ValueError(f"its worldbody has {len(bodies)} bodies; expected one, with everything in it")
    if given.worldbody.geoms or given.worldbody.sites:
        raise ValueError("its worldbody has geoms or sites; expected all of them inside of its one body")
    if not any(geom.contype or geom.conaffinity for geom in given.geoms):
        raise ValueError("it has no collision geoms; expected at least one with contype or conaffinity")
    if any(joint.type != mujoco.mjtJoint.mjJNT_FREE for joint in given.joints):
        raise ValueError("it has joints; expected one rigid body, which gets its free joint from LIBERO")
    for texture in given.textures:
        if max(texture.width, texture.height) > MOST_PIXELS:
            raise ValueError(f"texture {texture.name!r} is large; expected at most {MOST_PIXELS} pixels")
        if texture.type == mujoco.mjtTexture.mjTEXTURE_SKYBOX:
            raise ValueError(f"texture {texture.name!r} is a skybox, which an object does not need")


@lru_cache(maxsize=32)  # every environment's arguments are read, and meshes take a while to compile
def _written_anew(
    text: str, files: tuple[tuple[str, bytes], ...]
) -> tuple[str, tuple[str, ...], tuple[tuple[str, bytes], ...]]:
    """A gathered file in robosuite's layout, its regions, and its meshes and textures."""
    given = mujoco.MjSpec.from_string(text, assets=dict(files))
    _require_one_body(given)
    if not given.joints:
        given.worldbody.bodies[0].add_freejoint()
    given.compiler.fusestatic = True  # so that bodies inside of it become one with it
    model = given.compile()
    solid = (model.geom_contype | model.geom_conaffinity).astype(bool)
    bottom, top, radius = _extent(model, np.flatnonzero(solid))
    if not max(-bottom, top, radius) <= MOST_REACH:
        raise ValueError(
            f"it reaches {max(-bottom, top, radius):g} m from its origin; expected at most {MOST_REACH:g} m"
            " (of a mesh in mm the scale is 0.001)"
        )

    made = mujoco.MjSpec()
    made.assets = dict(files)
    for parts, add, names in (
        (given.meshes, made.add_mesh, _MESH),
        (given.textures, made.add_texture, _TEXTURE),
        (given.materials, made.add_material, _MATERIAL),
    ):
        for part in parts:
            add(**{key: getattr(part, key) for key in names})
    outer = made.worldbody.add_body()
    inner = outer.add_body(
        name="object", explicitinertial=True, mass=model.body_mass[1], inertia=model.body_inertia[1],
        ipos=model.body_ipos[1], iquat=model.body_iquat[1],
    )  # fmt: skip
    for g in range(model.ngeom):
        shape = _shape(model, g)
        if solid[g]:  # groups 0 and 1 are robosuite's for what touches and what is drawn
            contact = {key: getattr(model, f"geom_{key}")[g] for key in _CONTACT}
            inner.add_geom(**shape, **contact, group=0)
        if not solid[g] or solid.all():
            inner.add_geom(**shape, group=1, contype=0, conaffinity=0)
    regions = []
    for s in np.flatnonzero(model.site_type == mujoco.mjtGeom.mjGEOM_BOX):
        place = {key: getattr(model, f"site_{key}")[s] for key in ("pos", "quat", "size")}
        if re.fullmatch(NAME, name := model.site(s).name) and name not in SITES:
            inner.add_site(name=name, type=mujoco.mjtGeom.mjGEOM_BOX, rgba=[0, 0, 0, 0], **place)
            regions.append(name)
    for name, derived in zip(SITES, ([0, 0, bottom], [0, 0, top], [radius, 0, 0])):
        own = given.site(name)
        outer.add_site(name=name, pos=derived if own is None else model.site(name).pos, rgba=[0, 0, 0, 0])
    root = ET.fromstring(made.to_xml())  # MuJoCo leaves out defaults, which LIBERO's readers do not know
    for element, defaults in (("geom", {"group": "0"}), ("site", {"pos": "0 0 0", "quat": "1 0 0 0"})):
        for each in root.iter(element):
            each.attrib.update(defaults | each.attrib)
    return ET.tostring(root, encoding="unicode"), tuple(regions), files


def _shape(model: mujoco.MjModel, g: int) -> dict[str, Any]:
    """A compiled geom's place, shape and looks, as arguments of ``add_geom``."""
    pos, quat = model.geom_pos[g].copy(), model.geom_quat[g].copy()
    shape: dict[str, Any] = {"type": mujoco.mjtGeom(model.geom_type[g]), "rgba": model.geom_rgba[g]}
    if model.geom_type[g] == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[g]
        shape["meshname"] = model.mesh(mesh).name
        back, turn = np.empty(3), np.empty(4)  # compiling moved the mesh to its centre of mass
        mujoco.mju_negPose(back, turn, model.mesh_pos[mesh], model.mesh_quat[mesh])
        mujoco.mju_mulPose(pos, quat, model.geom_pos[g], model.geom_quat[g], back, turn)
    else:
        shape["size"] = model.geom_size[g]
    if model.geom_matid[g] >= 0:
        shape["material"] = model.mat(model.geom_matid[g]).name
    return shape | {"pos": pos, "quat": quat}


def _extent(model: mujoco.MjModel, geoms: NDArray[np.int64]) -> tuple[float, float, float]:
    """How far ``geoms`` reach down and up from their body's origin, and in the horizontal plane (m)."""
    angles = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    flat = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    directions = np.concatenate([[[0, 0, -1], [0, 0, 1]], flat])
    reach = np.max([_support(model, g, directions) for g in geoms], axis=0)
    return float(-reach[0]), float(reach[1]), float(reach[2:].max())


def _support(model: mujoco.MjModel, g: int, directions: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far geom ``g`` reaches from its body's origin in each of ``directions`` (n, 3), in m (n,)."""
    kinds, kind, size = mujoco.mjtGeom, model.geom_type[g], model.geom_size[g]
    rotation = np.empty(9)
    mujoco.mju_quat2Mat(rotation, model.geom_quat[g])
    own = directions @ rotation.reshape(3, 3)
    if kind == kinds.mjGEOM_MESH:
        mesh = model.mesh(model.geom_dataid[g])
        points = model.mesh_vert[mesh.vertadr[0] : mesh.vertadr[0] + mesh.vertnum[0]]
        reach = (own @ points.T).max(axis=1)
    elif kind == kinds.mjGEOM_BOX:
        reach = np.abs(own) @ size
    elif kind == kinds.mjGEOM_CYLINDER:
        reach = np.hypot(own[:, 0], own[:, 1]) * size[0] + np.abs(own[:, 2]) * size[1]
    elif kind == kinds.mjGEOM_CAPSULE:
        reach = size[0] + np.abs(own[:, 2]) * size[1]
    else:  # spheres and ellipsoids; MuJoCo refuses others on what moves
        radii = size if kind == kinds.mjGEOM_ELLIPSOID else size[[0, 0, 0]]
        reach = np.linalg.norm(own * radii, axis=1)
    return reach + directions @ model.geom_pos[g]
