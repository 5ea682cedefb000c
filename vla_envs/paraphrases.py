"""A task's sentence in other words: what the axis ``instruction`` of perturbed scenes draws, by rules.

The words for objects and places stay as they are, and no punctuation touches them, so that policies which
split sentences at spaces still find them. The rules are made for LIBERO's 130 sentences, and they and their
levels are ours: LIBERO-Plus's sentences were written by a language model.
"""

import re
from typing import NamedTuple

import numpy as np

#: Around a sentence that says what to do.
FRAMES = (
    "please {}", "could you {}", "can you {}", "would you please {}", "i want you to {}", "go ahead and {}",
    "your task is to {}", "you should {}",
)  # fmt: skip
#: Around a sentence of any kind.
CALLS = ("robot, {}", "hey robot, {}", "okay, {}", "listen, {}", "please listen, {}")
ASIDES = (
    "the light is a bit dim today", "it is raining outside", "it has been a long day",
    "my phone keeps ringing", "there is music playing next door", "the weekend is almost here",
)  # fmt: skip
#: How a sentence of any kind is said with an aside.
WITH_ASIDES = ("{aside}, but {}", "{} even though {aside}")

_PUT = ("set {}", "set {} down", "position {}", "deposit {}")
#: The verbs of LIBERO's sentences and others in their place; {} is what they are about.
VERBS = {
    "pick up": ("grab {}", "take {}", "lift {}", "collect {}", "fetch {}"),
    "place": ("put {}", *_PUT),
    "put": ("place {}", *_PUT),
    "stack": ("put {}", "place {}", "pile {}", *_PUT[:3]),
    "push": ("slide {}", "move {}", "shove {}", "nudge {}", "shift {}"),
    "open": ("pull open {}", "pull {} open", "tug {} open", "ease open {}", "ease {} open"),
    "close": ("shut {}", "push {} shut", "push {} closed", "press {} shut", "ease {} shut"),
    "turn on": ("switch on {}", "switch {} on", "power on {}", "power {} up", "start up {}"),
    "turn off": ("switch off {}", "switch {} off", "power off {}", "power {} down", "shut {} off"),
}
_PLACING = ("place", "put", "stack", "push")  # somewhere, which the sentence names
_PARTICIPLES = {"put": "put", "set": "set", "shut": "shut", "take": "taken", "slide": "slid"}
_PARTICIPLES |= {"grab": "grabbed", "tug": "tugged"}
#: Other orders of what is done to one thing, or to several; the last where it is put somewhere.
ORDERS = (
    "{thing} should be {done}", "{thing} must be {done}", "i want {thing} {done}", "get {thing} {done}",
    "have {thing} {done}", "i would like {thing} to be {done}", "{place} is where {thing} should be {put}",
)  # fmt: skip
#: Other orders of an action and what comes after it.
ORDERS_OF_TWO = (
    "first {first} and then {then}", "{first} before you {then}", "{then} once you have {first_done}",
    "{then} after you have {first_done}", "make sure to {first} and only then {then}",
)  # fmt: skip
_ANY = "|".join(VERBS)
_WHERE = "in|into|inside|on|onto|under|next to|to the (?:left|right|front|back)"


class Action(NamedTuple):
    """One of a sentence's actions."""

    verb: str  # as "pick up {}" or "switch {} on"
    thing: str
    place: str  # as " in the basket", or ""

    def say(self, done: bool = False) -> str:
        """As an order, or as what comes after "you have"."""
        return self._verb(done).format(self.thing) + self.place

    def passive(self) -> str:
        """What comes after "the thing should be"."""
        return self._verb(True).replace(" {}", "") + self.place

    def _verb(self, done: bool) -> str:
        verb, *rest = self.verb.split()
        if done:
            verb = _PARTICIPLES.get(verb, verb + ("d" if verb.endswith("e") else "ed"))
        return " ".join([verb, *rest])


def paraphrase(sentence: str, level: int, rng: np.random.Generator) -> str:
    """``sentence`` in other words.

    Args:
        sentence: Of a task, in lower case, as "open the top drawer and put the bowl inside".
        level: 1 puts a frame around it ("could you ..."), 2 has other verbs, 3 another order, 4 both; 5 both,
            with a call ("robot, ...") and an aside that has nothing to do with the task. A sentence that the
            rules do not know has a frame at levels 1 to 4, and an aside and a call at 5.
        rng: Draws among what there is; nothing else decides.

    Returns:
        Another sentence than ``sentence``, always.
    """
    actions = _actions(sentence)
    if level == 1 or (level < 5 and not actions):
        return _one_of(FRAMES, rng).format(sentence)
    if level in (2, 4, 5):
        actions = [action._replace(verb=_one_of(VERBS[action.verb[:-3]], rng)) for action in actions]
    if level == 2:
        return " and ".join(action.say() for action in actions)
    said = _one_of(_orders(actions), rng) if actions else sentence
    if level < 5:
        return said
    aside = _one_of(WITH_ASIDES[: 1 + bool(actions)], rng)  # a sentence not known may end in a full stop
    return _one_of(CALLS, rng).format(aside.format(said, aside=_one_of(ASIDES, rng)))


def _one_of(choices: "tuple[str, ...] | list[str]", rng: np.random.Generator) -> str:
    return choices[rng.integers(len(choices))]


def _actions(sentence: str) -> list[Action]:
    """The actions of a sentence, or none where the rules do not know one of them."""
    actions = []
    for part in re.split(f" and (?=(?:{_ANY}) )", sentence):
        known = re.fullmatch(rf"({_ANY}) ([\w ]+)", part)
        if not known:
            return []
        verb, thing = known.groups()
        place = ""
        if verb in _PLACING:
            placed = re.fullmatch(rf"(.+?)( (?:{_WHERE})\b.*)", thing)
            if not placed:
                return []
            thing, place = placed.groups()
        actions.append(Action(verb + " {}", thing, place))
    return actions


def _orders(actions: list[Action]) -> list[str]:
    """The same actions in other orders."""
    first, *others = actions
    orders = []
    if others:
        then = " and ".join(action.say() for action in others)
        parts = {"first": first.say(), "first_done": first.say(done=True), "then": then}
        orders += [order.format(**parts) for order in ORDERS_OF_TWO]
    if not others or (not first.place and all(other.thing in ("it", "them") for other in others)):
        last, done = actions[-1], " and ".join(action.passive() for action in actions)
        parts = {"thing": first.thing, "done": done, "place": last.place.strip()}
        parts["put"] = last._replace(place="").passive()
        orders += [order.format(**parts) for order in (ORDERS if last.place else ORDERS[:-1])]
    return orders
