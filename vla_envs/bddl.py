"""BDDL files that anybody may have written: what they ask for, validated, and nothing of them executed.

LIBERO's own parser (``envs/bddl_utils.py``) evaluates parts of a file as Python code, and says little about a
mistake. So a file of one's own is read here first, and LIBERO gets only what ``Problem.text`` writes anew:
names that are known, and numbers.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from vla_envs.inputs import in_short, nearest

MOST_BYTES = 2**18  # LIBERO's own files have up to 6 kB
MOST_DEPTH = 16  # of parentheses; LIBERO's own have 6
MOST_THINGS = 40  # objects and fixtures; LIBERO's own have up to 8
MOST_REGIONS = 200
MOST_PREDICATES = 40  # of the goal; LIBERO's own have up to 3


class Arena(NamedTuple):
    """One of LIBERO's rooms (``envs/problems``)."""

    problem: str  # LIBERO's name of it
    surface: str  # the fixture on which things are placed
    kind: str  # the surface's class
    half: tuple[float, float] | None  # m from the surface's middle to its edges; the floor has none


ARENAS = {
    arena.problem.lower(): arena
    for arena in (
        Arena("LIBERO_Tabletop_Manipulation", "main_table", "table", (0.5, 0.6)),
        Arena("LIBERO_Kitchen_Tabletop_Manipulation", "kitchen_table", "kitchen_table", (0.5, 0.6)),
        Arena(
            "LIBERO_Living_Room_Tabletop_Manipulation", "living_room_table", "living_room_table", (0.35, 0.8)
        ),
        Arena("LIBERO_Study_Tabletop_Manipulation", "study_table", "study_table", (0.5, 0.6)),
        Arena("LIBERO_Floor_Manipulation", "floor", "floor", None),
    )
}


class Kind(NamedTuple):
    """What a class of objects or fixtures has, besides a body (``envs/objects``, and the assets' sites)."""

    regions: tuple[str, ...] | None = ()  # in or on which things can be; None: only LIBERO's assets tell
    opens: tuple[str, ...] = ()  # the regions that Open and Close are about; "" is the thing itself
    turns: bool = False  # whether TurnOn and TurnOff are about it
    built_in: bool = True  # whether the built-in assets have it


_DRAWERS = ("top_region", "middle_region", "bottom_region")
#: LIBERO's 49 classes of objects and fixtures.
KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        "alphabet_soup bbq_sauce butter chocolate_pudding cookies cream_cheese ketchup milk orange_juice"
        " salad_dressing new_salad_dressing tomato_sauce white_bowl akita_black_bowl plate chefmate_8_frypan"
        " glazed_rim_porcelain_ramekin wine_bottle moka_pot black_book yellow_book red_coffee_mug"
        " porcelain_mug white_yellow_mug".split(),
        Kind(),
    ),
    **dict.fromkeys(
        "cherries corn macaroni_and_cheese mayo popcorn rack slide_cabinet window faucet basin_faucet"
        " white_storage_box wooden_shelf dining_set_group bowl_drainer".split(),
        Kind(None, built_in=False),
    ),
    "basket": Kind(("contain_region",)),
    "wooden_tray": Kind(("contain_region",)),
    "desk_caddy": Kind(
        ("left_contain_region", "right_contain_region", "back_contain_region", "front_contain_region")
    ),
    "wine_rack": Kind(("top_region",)),
    "wooden_two_layer_shelf": Kind(("top_side", "top_region", "bottom_region")),
    "microwave": Kind(("top_side", "heating_region"), opens=("",)),
    "wooden_cabinet": Kind(("top_side", *_DRAWERS), opens=_DRAWERS),
    "white_cabinet": Kind(("top_side", *_DRAWERS), opens=_DRAWERS),
    "flat_stove": Kind(("cook_region", "burner"), turns=True),
    "short_cabinet": Kind(None, opens=("", *_DRAWERS), built_in=False),
    "short_fridge": Kind(None, opens=("",), built_in=False),
}

#: Predicates by LIBERO's (lower-case) names, with how many things they are about.
PREDICATES = {"on": 2, "in": 2, "open": 1, "close": 1, "turnon": 1, "turnoff": 1, "up": 1}
SECTIONS = (
    "problem", ":domain", ":requirements", ":language", ":regions", ":fixtures", ":objects",
    ":obj_of_interest", ":init", ":goal",
)  # fmt: skip

Predicate = tuple[str, ...]  # its name, then what it is about


@dataclass(frozen=True)
class Region:
    """A part of the arena's surface, or of a thing."""

    name: str  # as predicates call it: the target's name, then the region's
    target: str
    ranges: tuple[tuple[float, float, float, float], ...]  # m: least x and y, greatest x and y
    yaw: tuple[float, float]  # rad
    line: int


@dataclass(frozen=True)
class Problem:
    """What a BDDL file asks for. Names are lower-case, as LIBERO reads them."""

    arena: Arena
    language: str
    fixtures: tuple[tuple[str, str], ...]  # name and class of each
    objects: tuple[tuple[str, str], ...]
    regions: tuple[Region, ...]
    of_interest: tuple[str, ...]
    init: tuple[Predicate, ...]
    goal: tuple[Predicate, ...]

    def places(self) -> dict[str, Region]:
        """The region of the surface that each thing is placed on, of those that stand there."""
        surface = {region.name: region for region in self.regions if region.target == self.arena.surface}
        return {words[1]: surface[words[-1]] for words in self.init if words[-1] in surface}

    def text(self) -> str:
        """The file anew, for LIBERO's parser: validated names, and numbers written out."""

        def things(pairs: tuple[tuple[str, str], ...]) -> str:
            """A line for each class, since LIBERO forgets all but the last of a class's lines."""
            names: dict[str, list[str]] = {}
            for name, kind in pairs:
                names.setdefault(kind, []).append(name)
            return "".join(f"    {' '.join(its)} - {kind}\n" for kind, its in names.items())

        def predicates(given: tuple[Predicate, ...]) -> str:
            return " ".join(f"({' '.join(words)})" for words in given)

        regions = ""
        for region in self.regions:
            name = region.name.removeprefix(f"{region.target}_")
            regions += f"    ({name} (:target {region.target})"
            if region.ranges:
                boxes = " ".join(f"({' '.join(map(repr, box))})" for box in region.ranges)
                regions += f" (:ranges ({boxes})) (:yaw_rotation (({' '.join(map(repr, region.yaw))})))"
            regions += ")\n"
        return (
            f"(define (problem {self.arena.problem})\n  (:domain robosuite)\n"
            f"  (:language {self.language})\n  (:regions\n{regions}  )\n"
            f"  (:fixtures\n{things(self.fixtures)}  )\n  (:objects\n{things(self.objects)}  )\n"
            f"  (:obj_of_interest {' '.join(self.of_interest)})\n"
            f"  (:init {predicates(self.init)})\n  (:goal (and {predicates(self.goal)}))\n)\n"
        )


def differ_in_places(one: Problem, other: Problem) -> bool:
    """Whether two problems differ, if at all, in their sentence and in where on the surface things stand."""

    def rest(problem: Problem) -> tuple[object, ...]:
        """All that shapes the compiled scene and the goal."""
        places, goal = problem.places(), {word for words in problem.goal for word in words}
        regions = {
            (region.name, region.ranges, region.yaw)
            for region in problem.regions
            if region.target != problem.arena.surface or region.name in goal
        }
        init = [
            (*words[:-1], places[words[1]].yaw) if len(words) == 3 and words[1] in places else words
            for words in problem.init
        ]
        return problem.arena, problem.fixtures, problem.objects, regions, init, problem.goal

    return rest(one) == rest(other)


# ---- From text to lists --------------------------------------------------------------------------------


class _Word(str):
    """A word of a file, and the line that it stands on."""

    line: int

    def __new__(cls, text: str, line: int) -> "_Word":
        word = super().__new__(cls, text)
        word.line = line
        return word


@dataclass
class _List:
    """What stands between two parentheses, and the line of the first."""

    line: int
    items: list["_Word | _List"] = field(default_factory=list)


class BDDLError(ValueError):
    """What is wrong, and in which line of the file."""

    def __init__(self, line: int, words: str) -> None:
        super().__init__(f"line {line}: {words}")


def _lists(text: str) -> _List:
    """The one list that a file consists of."""
    whole = _List(1)
    open_lists = [whole]
    for number, line in enumerate(text.lower().splitlines(), 1):
        for token in re.findall(r"[()]|[^\s()]+", line.partition(";")[0]):
            if token == "(":
                if len(open_lists) > MOST_DEPTH:
                    raise BDDLError(number, f"parentheses are {len(open_lists)} deep; expected {MOST_DEPTH}")
                open_lists.append(_List(number))
                open_lists[-2].items.append(open_lists[-1])
            elif token == ")":
                if len(open_lists) == 1:
                    raise BDDLError(number, "a parenthesis is closed that was never opened")
                open_lists.pop()
            else:
                open_lists[-1].items.append(_Word(token, number))
    if len(open_lists) > 1:
        raise BDDLError(open_lists[-1].line, "the parenthesis that opens here is never closed")
    if len(whole.items) != 1 or not isinstance(whole.items[0], _List):
        raise BDDLError(1, f"the file has {len(whole.items)} parts; expected one, (define ...)")
    return whole.items[0]


def _words(items: "list[_Word | _List]", line: int, expected: str) -> list[_Word]:
    """``items``, which have to be words."""
    for item in items:
        if isinstance(item, _List):
            raise BDDLError(item.line, f"a parenthesis opens; expected {expected}")
    if not items:
        raise BDDLError(line, f"nothing is given; expected {expected}")
    return [item for item in items if isinstance(item, _Word)]


def _sub_lists(items: "list[_Word | _List]", expected: str) -> list[_List]:
    """``items``, which have to be lists."""
    for item in items:
        if isinstance(item, _Word):
            raise BDDLError(item.line, f"{in_short(str(item))} is given; expected {expected}")
    return [item for item in items if isinstance(item, _List)]


_FACTOR = r"(?:\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?|pi)"


def _number(word: _Word) -> float:
    """A number, or a product or quotient of two numbers one of which may be pi, as ``-pi/2``."""
    match = re.fullmatch(rf"([+-]?)({_FACTOR})(?:([*/])({_FACTOR}))?", word)
    if match and len(word) <= 40:
        sign, first, operation, second = match.groups()
        a, b = (math.pi if each == "pi" else float(each or 1) for each in (first, second))
        value = a * b if operation == "*" else a / b if operation and b else a if not operation else math.nan
        if math.isfinite(value) and abs(value) <= 1e6:
            return -value if sign == "-" else value
    raise BDDLError(word.line, f"{in_short(str(word))} is given; expected a number, or pi with one, as pi/2")


# ---- From lists to a problem ---------------------------------------------------------------------------


def _sections(whole: _List) -> dict[str, tuple[int, "list[_Word | _List]"]]:
    """The file's sections: line and contents by name."""
    if not whole.items or whole.items[0] != "define":
        raise BDDLError(whole.line, "the file does not begin with (define")
    found: dict[str, tuple[int, list[_Word | _List]]] = {}
    for part in _sub_lists(whole.items[1:], "a section, as (:goal ...)"):
        name = part.items[0] if part.items else ""
        if not isinstance(name, str) or name not in SECTIONS:
            hint = nearest(str(name), list(SECTIONS)) if isinstance(name, str) else ""
            raise BDDLError(
                part.line, f"section {in_short(str(name))} is unknown; expected some of {SECTIONS}{hint}"
            )
        if name in found:
            raise BDDLError(part.line, f"section {name} is there twice")
        found[str(name)] = part.line, part.items[1:]
    for name in ("problem", ":language", ":fixtures", ":objects", ":regions", ":init", ":goal"):
        if name not in found:
            raise BDDLError(whole.line, f"section {name} is missing")
    return found


def _things(line: int, items: "list[_Word | _List]") -> list[tuple[_Word, _Word]]:
    """Pairs of name and class from ``a b - class``."""
    pairs: list[tuple[_Word, _Word]] = []
    names: list[_Word] = []
    words = iter(_words(items, line, "names and classes, as bowl_1 - akita_black_bowl") if items else [])
    for word in words:
        if word != "-":
            names.append(word)
            continue
        kind = next(words, None)
        if kind is None or not names:
            raise BDDLError(word.line, "'-' does not stand between names and a class")
        pairs += [(name, kind) for name in names]
        names = []
    if names:
        raise BDDLError(names[0].line, f"{names[0]} has no class; expected '{names[0]} - CLASS'")
    return pairs


def _regions(
    items: "list[_Word | _List]", things: dict[str, str], arena: Arena, kinds: Mapping[str, Kind]
) -> list[Region]:
    regions: dict[str, Region] = {}
    for part in _sub_lists(items, "a region, as (name (:target ...))"):
        label = _words(part.items[:1], part.line, "the region's name")[0]
        given: dict[str, _List] = {}
        for attribute in _sub_lists(part.items[1:], "an attribute, as (:target table)"):
            name = _words(attribute.items[:1], attribute.line, "an attribute's name")[0]
            known = (":target", ":ranges", ":yaw_rotation", ":rgba")
            if name not in known:
                raise BDDLError(
                    name.line,
                    f"attribute {in_short(str(name))} is unknown; expected some of {known}"
                    + nearest(str(name), list(known)),
                )
            if len(attribute.items) != 2:
                raise BDDLError(
                    attribute.line,
                    f"{name} has {len(attribute.items) - 1} parts; expected one, as ({name} ...)",
                )
            given[str(name)] = attribute
        if ":target" not in given:
            raise BDDLError(part.line, f"region {label} has no :target")
        target = _words(given[":target"].items[1:2], part.line, "what the region is of")[0]
        if target not in things:
            regions[f"{target}_{label}"] = Region(f"{target}_{label}", str(target), (), (0.0, 0.0), part.line)
            continue  # as in LIBERO-Goal's own files; a predicate about it is refused
        full_name = f"{target}_{label}"
        on_surface = target == arena.surface
        inner = kinds[things[target]].regions if not on_surface else None
        if inner is not None and label not in inner:
            has = f"one of {inner}" if inner else "none"
            raise BDDLError(
                label.line,
                f"{things[target]} has no region {label}; expected {has}{nearest(str(label), list(inner))}",
            )
        ranges = [
            _box(box, label, arena if on_surface else None)
            for box in _sub_lists(given[":ranges"].items[1:2], "(:ranges ((x y x y)))")[0].items
        ] if ":ranges" in given and given[":ranges"].items[1:] else []  # fmt: skip
        if on_surface and not ranges:
            raise BDDLError(
                part.line, f"region {label} of {target} has no :ranges; expected (:ranges ((x y x y)))"
            )
        yaw = (0.0, 0.0)
        if ":yaw_rotation" in given:
            turns = given[":yaw_rotation"]
            pair = [item for outer in _sub_lists(turns.items[1:], "((low high))") for item in outer.items]
            numbers = _words(
                [x for each in _sub_lists(pair, "(low high)") for x in each.items], turns.line, "low high"
            )
            if len(numbers) != 2:
                raise BDDLError(turns.line, f":yaw_rotation has {len(numbers)} numbers; expected 2, in rad")
            yaw = (_number(numbers[0]), _number(numbers[1]))
        if full_name in regions:
            raise BDDLError(part.line, f"region {label} of {target} is there twice")
        regions[full_name] = Region(full_name, str(target), tuple(ranges), yaw, part.line)
    return list(regions.values())


def _box(item: "_Word | _List", label: str, arena: Arena | None) -> tuple[float, float, float, float]:
    """One rectangle of a region, which lies on the arena's surface."""
    if isinstance(item, _Word):
        raise BDDLError(item.line, f"{in_short(str(item))} is given; expected (x y x y)")
    numbers = [_number(word) for word in _words(item.items, item.line, "four numbers, in m")]
    if len(numbers) != 4:
        raise BDDLError(item.line, f"region {label} has {len(numbers)} numbers; expected 4: x y x y, in m")
    x, y, x_end, y_end = numbers
    if x > x_end or y > y_end:
        raise BDDLError(item.line, f"region {label} ends before it begins; expected least x and y first")
    half = arena and arena.half
    if half and (max(-x, x_end) > half[0] or max(-y, y_end) > half[1]):
        raise BDDLError(
            item.line,
            f"region {label} reaches beyond {arena.surface if arena else ''}; expected x from {-half[0]} to"
            f" {half[0]} and y from {-half[1]} to {half[1]}",
        )
    return x, y, x_end, y_end


def _predicates(
    items: "list[_Word | _List]", things: dict[str, str], regions: dict[str, Region], where: str
) -> list[tuple[Predicate, int]]:
    """Predicates whose names and things exist and go together, and their lines."""
    found: list[tuple[Predicate, int]] = []
    for part in _sub_lists(items, "a predicate, as (On bowl_1 plate_1)"):
        words = _words(part.items, part.line, "a predicate, as (On bowl_1 plate_1)")
        name, about = words[0], words[1:]
        if name not in PREDICATES:
            hint = nearest(str(name), list(PREDICATES))
            raise BDDLError(
                name.line,
                f"predicate {in_short(str(name))} is unknown; expected some of {[*PREDICATES]}{hint}",
            )
        if len(about) != PREDICATES[name]:
            raise BDDLError(name.line, f"{name} is about {len(about)} things; expected {PREDICATES[name]}")
        for word in about:
            if word not in things and word not in regions:
                raise BDDLError(
                    word.line,
                    f"{word} is neither an object, a fixture nor a region"
                    + nearest(str(word), [*things, *regions]),
                )
        for word in about:
            if word in regions and regions[word].target not in things:
                raise BDDLError(
                    regions[word].line,
                    f"region {word} is of {regions[word].target}, which is neither a fixture nor an object"
                    + nearest(regions[word].target, list(things)),
                )
        _validate_predicate(name, about, things, regions, where)
        found.append((tuple(map(str, words)), name.line))
    return found


def _validate_predicate(
    name: _Word, about: list[_Word], things: dict[str, str], regions: dict[str, Region], where: str
) -> None:
    """Refuse what LIBERO would not understand, or would fail on."""
    first, line = about[0], name.line
    if name in ("on", "in", "up") and first in regions:
        raise BDDLError(line, f"{name} is about the region {first}; expected an object first")
    if name == "up" and where == ":init":
        raise BDDLError(line, "up is no init state; expected on or in")
    if name == "in" and about[1] not in regions:
        raise BDDLError(
            line, f"{about[1]} is no region, which In is about; expected one, or On for on top of a thing"
        )
    if name in ("open", "close", "turnon", "turnoff"):
        target = regions[first].target if first in regions else str(first)
        part = str(first).removeprefix(target).removeprefix("_")
        kind = KINDS.get(things[target], Kind())
        if name in ("open", "close") and part not in kind.opens:
            able = [f"{target}_{each}".rstrip("_") for each in kind.opens]
            raise BDDLError(line, f"{first} does not open; expected {able or 'a drawer or a door'}")
        if name in ("turnon", "turnoff") and not (kind.turns and first == target):
            raise BDDLError(line, f"{first} does not turn on; expected a flat_stove")


def parse(text: str, own: Mapping[str, Kind] = MappingProxyType({}), beyond: bool = False) -> Problem:
    """What the BDDL file ``text`` asks for.

    Args:
        text: The file's.
        own: Classes that its objects can have besides LIBERO's.
        beyond: Whether regions may reach beyond the surface's edge.

    Raises:
        BDDLError: A ValueError; names the line, what is wrong there, and what was expected.
    """
    sections = _sections(_lists(text))
    line, items = sections["problem"]
    name = _words(items[:1], line, "the problem's class")[0]
    if name not in ARENAS:
        names = [arena.problem for arena in ARENAS.values()]
        hint = nearest(str(name), list(ARENAS))
        raise BDDLError(name.line, f"problem {in_short(str(name))} is unknown; expected one of {names}{hint}")
    arena = ARENAS[name]
    if ":domain" in sections:
        line, items = sections[":domain"]
        domain = _words(items, line, "robosuite")[0]
        if domain != "robosuite":
            raise BDDLError(domain.line, f"domain {in_short(str(domain))} is unknown; expected robosuite")
    language = " ".join(_words(sections[":language"][1], sections[":language"][0], "the instruction"))

    fixtures, objects = (_things(*sections[section]) for section in (":fixtures", ":objects"))
    things: dict[str, str] = {}
    kinds = KINDS | dict(own)
    for name, kind in fixtures:
        if kind in own:
            raise BDDLError(kind.line, f"{name} is a {kind}, which can be moved; expected it in :objects")
    for name, kind in fixtures + objects:
        surface = name == arena.surface
        if surface and kind != arena.kind:
            raise BDDLError(kind.line, f"{name} is a {kind}; expected a {arena.kind}, the arena's surface")
        if not surface and kind not in kinds:
            others = f", nor of objects {sorted(own)}" if own else ""
            hint = nearest(str(kind), list(kinds))
            raise BDDLError(kind.line, f"class {kind} is not one of LIBERO's {len(KINDS)}{others}{hint}")
        if name in things:
            raise BDDLError(name.line, f"{name} is there twice")
        if not surface and arena.surface in name:
            raise BDDLError(name.line, f"{name} contains {arena.surface}, which LIBERO takes for the surface")
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,60}", name):
            raise BDDLError(name.line, f"{in_short(str(name))} is no name; expected letters, digits and _")
        things[str(name)] = str(kind)
    if len(things) > MOST_THINGS:
        raise BDDLError(
            sections[":objects"][0], f"there are {len(things)} things; expected {MOST_THINGS} at most"
        )
    if arena.surface not in {str(name) for name, _ in fixtures}:
        raise BDDLError(
            sections[":fixtures"][0], f"{arena.surface} is missing; expected '{arena.surface} - {arena.kind}'"
        )
    if not objects:
        raise BDDLError(sections[":objects"][0], "there are no objects; expected at least one")

    within = arena._replace(half=None) if beyond else arena
    regions = _regions(sections[":regions"][1], things, within, kinds)
    if len(regions) > MOST_REGIONS:
        raise BDDLError(
            sections[":regions"][0], f"there are {len(regions)} regions; expected {MOST_REGIONS} at most"
        )
    by_name = {region.name: region for region in regions}
    init = _predicates(sections[":init"][1], things, by_name, ":init")
    _validate_placements(init, things, by_name, arena, sections[":init"][0])

    line, items = sections[":goal"]
    outer, *more = _sub_lists(items, "(:goal (And ...))") or [_List(line)]
    if more:
        raise BDDLError(more[0].line, "the goal has several parts; expected one, (And ...)")
    if not outer.items or outer.items[0] != "and":
        word = str(outer.items[0]) if outer.items else ""
        raise BDDLError(outer.line, f"the goal begins with {in_short(word)}; expected (And ...)")
    goal = _predicates(outer.items[1:], things, by_name, ":goal")
    if not 1 <= len(goal) <= MOST_PREDICATES:
        raise BDDLError(line, f"the goal has {len(goal)} predicates; expected 1 to {MOST_PREDICATES}")
    of_interest = []
    line, items = sections.get(":obj_of_interest", (1, []))
    for word in _words(items, line, "objects") if items else []:
        if word not in things and word not in by_name:
            raise BDDLError(
                word.line, f"{word} is neither an object nor a fixture{nearest(str(word), list(things))}"
            )
        of_interest.append(str(word))
    movable = {str(name) for name, _ in objects}
    for words, at in goal:
        if words[0] in ("on", "in", "up") and words[1] not in movable:
            raise BDDLError(at, f"{words[1]} is a fixture, which nothing moves; expected an object")
        if words[0] == "on" and words[2] == arena.surface:
            raise BDDLError(at, f"{words[2]} is the whole surface; expected a region of it, or a thing")

    def pairs(given: list[tuple[_Word, _Word]]) -> tuple[tuple[str, str], ...]:
        return tuple((str(name), str(kind)) for name, kind in given)

    return Problem(
        arena=arena, language=language, fixtures=pairs(fixtures), objects=pairs(objects),
        regions=tuple(region for region in regions if region.target in things),
        of_interest=tuple(of_interest), init=tuple(words for words, _ in init),
        goal=tuple(words for words, _ in goal),
    )  # fmt: skip


def _validate_placements(
    init: list[tuple[Predicate, int]],
    things: dict[str, str],
    regions: dict[str, Region],
    arena: Arena,
    line: int,
) -> None:
    """Every thing but the surface has to be placed once, and on or in something that is itself placed."""
    places: dict[str, str] = {}
    for words, at in init:
        if words[0] not in ("on", "in"):
            continue
        thing, place = words[1:]
        if thing in places:
            raise BDDLError(at, f"{thing} is placed twice")
        if place == arena.surface:
            raise BDDLError(at, f"{place} is the whole surface; expected a region of it")
        if words[0] == "in" and place in regions and regions[place].target == arena.surface:
            raise BDDLError(at, f"{thing} is in a region of {arena.surface}; expected (On {thing} {place})")
        places[thing] = regions[place].target if place in regions else place
    missing = [name for name in things if name not in places and name != arena.surface]
    if missing:
        raise BDDLError(line, f"{missing[0]} is placed nowhere; expected (On {missing[0]} ...) in :init")
    for thing in places:
        seen = [thing]
        while (below := places.get(seen[-1], arena.surface)) != arena.surface:
            if below in seen:
                raise BDDLError(line, f"{thing} is placed on itself, by way of {below}")
            seen.append(below)


def classes(text: str) -> list[str]:
    """The classes of the things in a BDDL file's ``text``, each once, whatever else is in it."""
    blocks = re.findall(r"\(:(?:objects|fixtures)([^()]*)\)", re.sub(";.*", "", text.lower()))
    return list(dict.fromkeys(kind for block in blocks for kind in re.findall(r"\s-\s+(\w+)", block)))


def new_classes(text: str) -> list[str]:
    """Those of ``classes`` that LIBERO does not have."""
    surfaces = {arena.kind for arena in ARENAS.values()}
    return [kind for kind in classes(text) if kind not in KINDS and kind not in surfaces]


def text_of(path: Path) -> str:
    """The text of the BDDL file ``path``, with or without the mark that some editors put before it.

    Raises:
        ValueError: When it cannot be read, is too large or not UTF-8; one line that names the file.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"BDDL file {str(path)!r} has {size} bytes; expected at most {MOST_BYTES}")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"BDDL file {str(path)!r} is not UTF-8: byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"BDDL file {str(path)!r} cannot be read: {error.strerror}") from None


def read(path: Path, own: Mapping[str, Kind] = MappingProxyType({}), beyond: bool = False) -> Problem:
    """What the BDDL file ``path`` asks for; ``own`` and ``beyond`` as in ``parse``.

    Raises:
        ValueError: As ``text_of``, or when it has a mistake; one line, with the line number.
    """
    text = text_of(path)
    try:
        return parse(text, own, beyond)
    except ValueError as error:
        raise ValueError(f"BDDL file {str(path)!r}, {error}") from None
