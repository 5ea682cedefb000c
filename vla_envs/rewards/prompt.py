"""The prompt that asks a language model for a task's reward function."""

import re

from vla_envs.goals import FACTS, order
from vla_envs.tasks import Task

#: LIBERO's goal predicates in words.
WORDS = {
    "in": "{} is in {}",
    "on": "{} is on {}",
    "open": "{} is open",
    "close": "{} is closed",
    "turnon": "{} is turned on",
    "turnoff": "{} is turned off",
    "up": "{} is lifted, at least 1 m above the floor",
}

PROMPT = """\
Write a reward function for a robot arm with a two-finger gripper, which learns a task by reinforcement
learning in simulation.

Task: {instruction}
It is done when all of this holds:
{goal}

After every control step (20 per second) the function is called with `facts`: a dict of NumPy float arrays of
shape (N,), one entry for each of N environments that run side by side. "The object" is what the first
condition above that does not hold yet is about.

{facts}

Write it with this signature:

    def reward(facts):
        \"\"\"facts: dict of (N,) arrays -> rewards (N,), stages (N,)\"\"\"

Rules:
1. Divide the task into stages, by thresholds on the facts that you choose: distances in metres, and the
   share of the way for a joint. Make them constants at the top of the file, each with a comment.
2. Number the stages by progress: 0 far from the object, then 1, 2, ..., success last; and -1 for an object
   that was lifted and dropped.{several}
3. The reward is constant within a stage: it depends on the number of the stage and on nothing else.
4. It rises with every stage.
5. Success (`facts["success"]`) pays far more than any other stage: the step up to it is the greatest of all.
6. A drop pays less than being far from the object. Letting go above the goal is not a drop.
7. Every reward is a finite number. Each entry depends only on the same entry of the facts: do not loop over
   steps, keep a memory, use random numbers or change `facts`.

Answer with one Python file in one code block, and nothing else. It imports NumPy and nothing else. It will be
saved as my_reward.py and used as `--reward my_reward.py:reward`.
"""

SEVERAL = """ The conditions are met one by one: go on counting where `facts["goals_met"]`
   rises, so that no number but -1 stands for two different counts."""


def goal_in_words(task: Task) -> list[str]:
    """The predicates of LIBERO's goal, in our order: ``["ketchup 1 is in basket 1 contain region"]``."""
    text = task.bddl_file.read_text() if task.problem is None else task.problem.text()
    goal = text.partition("(:goal")[2]
    predicates = re.findall(rf"\(\s*({'|'.join(WORDS)})((?:\s+\w+)+)\s*\)", goal, re.IGNORECASE)
    return [
        WORDS[name.lower()].format(*(thing.replace("_", " ") for thing in things.split()))
        for name, things in sorted(predicates, key=lambda predicate: order(predicate[0]))
    ]


def prompt(task: Task) -> str:
    """Everything that a language model needs to write the reward function of a task."""
    goal = goal_in_words(task)
    width = max(map(len, FACTS))
    return PROMPT.format(
        instruction=task.instruction,
        goal="\n".join(f"{k}. {words}" for k, words in enumerate(goal, 1)),
        facts="\n".join(f"    {name:{width}}  {meaning}" for name, meaning in FACTS.items()),
        several=SEVERAL if len(goal) > 1 else "",
    )
