"""Sentences in other words, of all of LIBERO's tasks, at every level."""

import re

import numpy as np
import pytest

from vla_envs.paraphrases import ASIDES, CALLS, FRAMES, VERBS, paraphrase
from vla_envs.perturbations import LEVELS, LONGEST
from vla_envs.tasks import SUITES, get_task, num_tasks

SENTENCES = sorted({get_task(suite, k).instruction for suite in SUITES for k in range(num_tasks(suite))})
VERB = re.compile(rf"(?:^| and )({'|'.join(VERBS)})(?: it| them)?\b ?")


def several(sentence, level, count=40):
    rng = np.random.default_rng(0)
    return [paraphrase(sentence, level, rng) for _ in range(count)]


def things_of(sentence):
    """The words for objects and places: what is between the verbs, in two parts where something is put."""
    between = [part for part in VERB.sub("|", sentence).split("|") if part]
    return [thing for part in between for thing in re.split(r" (?=(?:in|inside|on|under|to)\b)", part)]


def verbs_of(sentence):
    return [found.group(1) for found in VERB.finditer(sentence)]


def test_the_tests_see_things_and_verbs():
    sentence = "put the black bowl in the bottom drawer of the cabinet and close it"
    assert things_of(sentence) == ["the black bowl", "in the bottom drawer of the cabinet"]
    assert verbs_of(sentence) == ["put", "close"] and len(SENTENCES) == 112
    both = "put both the alphabet soup and the tomato sauce in the basket"
    assert things_of(both) == ["both the alphabet soup and the tomato sauce", "in the basket"]


@pytest.mark.parametrize("level", LEVELS)
def test_every_sentence_of_libero(level):
    """Words for objects and places are kept, untouched by punctuation; there are several sentences."""
    for sentence in SENTENCES:
        said = several(sentence, level)
        assert said == several(sentence, level) and len(set(said)) >= 5, sentence
        for words in said:
            assert words != sentence and len(words) <= LONGEST
            assert re.fullmatch(r"[a-z]+(?:,? [a-z]+)*", words), words
            for thing in things_of(sentence):
                assert re.search(rf"(?<!\S){thing}(?!\S)", words), (sentence, words)


def test_levels_differ():
    """No sentence of a level is one of another level, nor of another task at the same level."""
    for sentence in SENTENCES:
        said = [set(several(sentence, level)) for level in LEVELS]
        assert len(set().union(*said)) == sum(map(len, said)), sentence
    said = [set(several(sentence, 3)) for sentence in SENTENCES]
    assert len(set().union(*said)) == sum(map(len, said))


def test_levels_are_what_they_say():
    for sentence in SENTENCES:
        for words in several(sentence, 1):
            assert words in [frame.format(sentence) for frame in FRAMES]
        for words in several(sentence, 2):
            assert not words.startswith(verbs_of(sentence)[0] + " ")
        for words in several(sentence, 5):
            assert words.startswith(tuple(call[:-2] for call in CALLS))
            assert any(aside in words for aside in ASIDES)


def test_sentences_read_well():
    """Examples of each kind, as a reader would have them."""
    ketchup = "pick up the ketchup and place it in the basket"
    expected = {
        (ketchup, 1): "could you pick up the ketchup and place it in the basket",
        (ketchup, 2): "grab the ketchup and put it in the basket",
        (ketchup, 3): "place it in the basket once you have picked up the ketchup",
        (ketchup, 4): "the ketchup should be taken and put in the basket",
        ("turn on the stove and put the moka pot on it", 2): "switch the stove on and set the moka pot on it",
        ("turn on the stove and put the moka pot on it", 3):
            "put the moka pot on it after you have turned on the stove",
        ("put both moka pots on the stove", 3): "on the stove is where both moka pots should be put",
        ("open the top drawer and put the bowl inside", 4):
            "first pull the top drawer open and then place the bowl inside",
        ("close the microwave", 4): "i want the microwave pushed shut",
        ("turn off the stove", 5):
            "robot, i want the stove switched off even though it is raining outside",
        ("stack the middle black bowl on the back black bowl", 5):
            "okay, my phone keeps ringing, but get the middle black bowl piled on the back black bowl",
    }  # fmt: skip
    for (sentence, level), words in expected.items():
        assert words in several(sentence, level, 3000), words


@pytest.mark.parametrize(
    "sentence",
    [
        "pour the milk.",
        "put the bowl away",
        "open the lid, then look",
        "PICK UP the milk",
        "{0} and {x}",
        "pick up",
    ],
)
def test_sentences_that_match_no_rule(sentence):
    """Frames and asides alone: the sentence stands in them as it is."""
    for level in LEVELS:
        said = several(sentence, level)
        assert all(sentence in words and words != sentence for words in said) and len(set(said)) >= 5
        assert any(aside in said[0] for aside in ASIDES) == (level == 5)
    assert all(words in [frame.format(sentence) for frame in FRAMES] for words in several(sentence, 3))


def test_sentences_of_ones_own():
    """That the rules know: other places, and more actions."""
    said = several("pick up the can and put it into the bin and close it", 3, 200)
    assert "first pick up the can and then put it into the bin and close it" in said
    assert all("the can" in words and "the bin" in words for words in said)
    assert "get the can set next to the bin" in several("put the can next to the bin", 4, 500)
    assert "i want the lid opened and closed" in several("open the lid and close it", 3, 200)
