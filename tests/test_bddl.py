"""Reading BDDL files: LIBERO's own, one's own, and every mistake in one line."""

import dataclasses
import random
import re

import pytest
from own_scenes import FLOOR, KITCHEN

from vla_envs import bddl
from vla_envs.tasks import SUITES, get_task, num_tasks


def test_all_of_liberos_files_are_read_and_written_anew():
    """What is written anew says the same; to LIBERO's parser too (test_own_tasks.py)."""
    for suite in SUITES:
        for k in range(num_tasks(suite)):
            problem = bddl.read(get_task(suite, k).bddl_file)
            again = bddl.parse(problem.text())
            regions = [dataclasses.replace(region, line=0) for region in problem.regions]
            assert [dataclasses.replace(region, line=0) for region in again.regions] == regions
            assert dataclasses.replace(again, regions=()) == dataclasses.replace(problem, regions=())


def test_what_a_file_asks_for():
    problem = bddl.parse(KITCHEN)
    assert problem.language == "put the butter on the plate"  # in lower case, as LIBERO reads it
    assert problem.objects[-2:] == (("mug", "white_yellow_mug"), ("bowl", "white_yellow_mug"))
    assert problem.goal == (("on", "butter", "dish"),) and ("open", "cabinet_bottom_region") in problem.init
    middle = problem.regions[1]
    assert middle.name == "kitchen_table_middle" and middle.ranges == ((0.0, 0.0, 0.06, 0.05),)
    assert middle.yaw == (0.0, pytest.approx(0.78539816339))


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("Put the butter on", "Bring the butter to", True), ("-0.1 -0.2", "-0.2 -0.3", True),
        ("On butter kitchen_table_left", "On butter kitchen_table_back", True), ("pi/4", "pi/2", False),
        ("On butter kitchen_table_left", "On butter kitchen_table_middle", False),  # which is turned
        ("On mug cabinet_top_side", "On mug dish", False), ("(Open cabinet_bottom_region)", "", False),
        ("(And (On butter dish))", "(And (On mug dish))", False), ("- plate", "- basket", False),
    ],
)  # fmt: skip
def test_problems_that_differ_in_places(old, new, same):
    assert old in KITCHEN
    assert bddl.differ_in_places(bddl.parse(KITCHEN), bddl.parse(KITCHEN.replace(old, new))) == same


def test_a_region_of_the_goal_is_no_mere_place():
    texts = [
        KITCHEN.replace("(And (On butter dish))", f"(And (On butter kitchen_table_{region}))")
        .replace("-0.26 0.24 -0.24 0.26", box)
        for region in ("back", "left") for box in ("-0.26 0.24 -0.24 0.26", "-0.25 0.25 -0.24 0.26")
    ]  # fmt: skip
    back, back_moved, left, left_moved = map(bddl.parse, texts)
    assert bddl.differ_in_places(left, left_moved) and not bddl.differ_in_places(back, back_moved)


def test_regions_beyond_the_edge_are_taken_where_that_is_asked_for():
    text = KITCHEN.replace("-0.1 -0.2 -0.05 -0.15", "-0.6 -0.2 -0.55 -0.15")
    with pytest.raises(ValueError, match="reaches beyond kitchen_table"):
        bddl.parse(text)
    assert bddl.parse(text, beyond=True).places()["butter"].ranges == ((-0.6, -0.2, -0.55, -0.15),)


def test_classes_are_read_out_of_files_with_other_mistakes():
    text = KITCHEN.replace("- plate", "- Gold_plate ; (of - gold)\n").replace("(:goal (And", "(:goal (Nor")
    assert bddl.classes(text) == [
        "kitchen_table", "white_cabinet", "butter", "gold_plate", "white_yellow_mug",
    ]  # fmt: skip
    assert bddl.new_classes(text) == ["gold_plate"]


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1), ("-2.5", -2.5), (".5", 0.5), ("1e-2", 0.01), ("pi", 3.14159265), ("-pi/2", -1.57079633),
     ("2*pi", 6.28318531), ("+pi*0.5", 1.57079633)],
)  # fmt: skip
def test_numbers(text, number):
    assert bddl.parse(FLOOR.replace("-0.01 0.25", f"{text} -9e5").replace("0.01 0.27", "7 0.27")).regions[
        1
    ].ranges[0][0] == pytest.approx(number)


MISTAKES = [
    # (what is replaced, by what, line, words)
    ("LIBERO_Floor", "LIBERO_Flour", 1, "'libero_flour_manipulation' is unknown.*mean 'libero_floor_manip"),
    ("robosuite", "roboschool", 2, "domain 'roboschool' is unknown; expected robosuite"),
    (":language", ":langage", 3, "section ':langage' is unknown.*mean ':language'"),
    (" pick up the milk and put it in the basket", "", 3, "nothing is given; expected the instruction"),
    (":ranges ((-0.15", ":range ((-0.15", 5, "attribute ':range' is unknown.*mean ':ranges'"),
    ("(:target floor) (:ranges ((-0.15", "(:target flor) (:ranges ((-0.15", 11, "floor_here is neither"),
    ("-0.15 -0.12", "-0.15", 5, "has 3 numbers; expected 4"),
    ("-0.15 -0.12", "0.15 -0.12", 5, "region here ends before it begins"),
    ("-0.15 -0.12", "__import__ -0.12", 5, "'__import__' is given; expected a number, or pi"),
    ("-0.15 -0.12", "1/0 -0.12", 5, "'1/0' is given; expected a number"),
    ("(:ranges ((-0.15", "(:ranges (0 1) ((-0.15", 5, ":ranges has 2 parts; expected one"),
    ("-0.15 -0.12", "1e9 -0.12", 5, "'1e9' is given; expected a number"),
    ("-0.15 -0.12", "nan -0.12", 5, "'nan' is given; expected a number"),
    ("contain_region (:target", "contain_regions (:target", 7, "basket has no region contain_regions.*mean"),
    ("floor - floor", "flor - floor", 9, "class floor is not one of LIBERO's 49"),
    ("milk - milk", "milk - milch", 10, "class milch is not one of LIBERO's 49; did you mean 'milk'"),
    ("milk - milk basket - basket", "milk - milk basket", 10, "basket has no class; expected 'basket -"),
    ("milk - milk basket - basket", "- milk", 10, "'-' does not stand between names and a class"),
    ("milk - milk basket", "basket - milk basket", 10, "basket is there twice"),
    ("milk - milk", "milk - milk mi.lk - milk", 10, "'mi.lk' is no name"),
    ("milk - milk", "milk floor_lamp - milk", 10, "floor_lamp contains floor, which LIBERO takes"),
    ("(On milk floor_here) (", "(", 11, "milk is placed nowhere"),
    ("(On milk floor_here)", "(On milk floor_here) (On milk floor_there)", 11, "milk is placed twice"),
    ("(On milk floor_here)", "(On milk floor)", 11, "floor is the whole surface"),
    ("(On milk floor_here)", "(On milk floor_hear)", 11, "floor_hear is neither.*mean 'floor_here'"),
    ("(On milk floor_here)", "(In milk floor_here)", 11, r"expected \(On milk floor_here\)"),
    ("(On milk floor_here)", "(On milk milk)", 11, "milk is placed on itself"),
    ("(On milk floor_here)", "(On milk floor_here) (Open basket)", 11, "basket does not open"),
    ("(On milk floor_here)", "(On milk floor_here) (TurnOn basket)", 11, "basket does not turn on"),
    ("And", "Or", 12, r"the goal begins with 'or'; expected \(And ...\)"),
    ("(In milk basket_contain_region)", "", 12, "the goal has 0 predicates"),
    ("(In milk basket_contain_region)", "(In milk basket)", 12, "basket is no region, which In is about"),
    ("(In milk basket_contain_region)", "(Inn milk basket)", 12, "predicate 'inn' is unknown.*mean 'in'"),
    ("(In milk basket_contain_region)", "(In milk)", 12, "in is about 1 things; expected 2"),
    ("(In milk basket_contain_region)", "(On milk floor)", 12, "floor is the whole surface"),
    ("(And (In milk basket_contain_region))", "(And (In milk basket_contain_region)", 1, "is never closed"),
    ("(And (In milk basket_contain_region))", "(And (In milk basket_contain_region)))", 13,
     "closed that was never"),
    ("(:fixtures floor - floor)", "(:scene_properties (:floor x))", 9, "':scene_properties' is unknown"),
    ("(:fixtures floor - floor)", "(:fixtures floor - floor) (:fixtures floor - floor)", 9, "there twice"),
    ("(:domain robosuite)", "((((((((((((((((((x))))))))))))))))))", 2, "parentheses are .* deep"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line", "words"), MISTAKES)
def test_a_mistake_is_one_line_with_its_number(old, new, line, words, tmp_path):
    assert old in FLOOR
    file = tmp_path / "mine.bddl"
    file.write_text(FLOOR.replace(old, new, 1))
    with pytest.raises(ValueError, match=words) as error:
        bddl.read(file)
    message = str(error.value)
    assert message.startswith(f"BDDL file {str(file)!r}, line {line}: ") and "\n" not in message
    assert len(message) < 600


def test_a_region_outside_its_table():
    with pytest.raises(ValueError, match="line 6: region left reaches beyond kitchen_table"):
        bddl.parse(KITCHEN.replace("-0.1 -0.2 -0.05", "-0.7 -0.2 -0.05"))


def test_a_fixture_is_not_moved():
    with pytest.raises(ValueError, match="cabinet is a fixture, which nothing moves"):
        bddl.parse(KITCHEN.replace("(And (On butter dish))", "(And (On cabinet dish))"))


def test_files_that_are_not_texts(tmp_path):
    file = tmp_path / "mine.bddl"
    with pytest.raises(ValueError, match="cannot be read"):
        bddl.read(file)
    file.write_bytes(b"(define \xff)")
    with pytest.raises(ValueError, match="is not UTF-8: byte 8"):
        bddl.read(file)
    file.write_text("(" * (bddl.MOST_BYTES + 1))
    with pytest.raises(ValueError, match=f"has {bddl.MOST_BYTES + 1} bytes; expected at most"):
        bddl.read(file)


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path):
    """Editors on Windows put U+FEFF there."""
    (tmp_path / "mine.bddl").write_text(KITCHEN, encoding="utf-8-sig")
    assert bddl.read(tmp_path / "mine.bddl") == bddl.parse(KITCHEN)


def test_damaged_files_never_raise_anything_else():
    """Words removed, doubled and swapped at random."""
    rng = random.Random(0)
    for text in (KITCHEN, FLOOR):
        tokens = re.findall(r"[()]|[^\s()]+", text.partition("\n")[2])
        for _ in range(1500):
            words = list(tokens)
            for _ in range(rng.randint(1, 3)):
                i, j = rng.randrange(len(words)), rng.randrange(len(words))
                words[i : i + 1] = rng.choice(
                    [[], [words[i]] * 2, [words[j]], ["("], [")"], ["-"], ["1e400"]]
                )
            try:
                bddl.parse(bddl.parse(" ".join(words)).text())
            except bddl.BDDLError as error:
                assert "\n" not in str(error)
