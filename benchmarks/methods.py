"""What `reproduce.py` compares: each method's script and flags, the pairs, and what papers claim of them.

``{demos}`` stands for 25 demonstrations of the task, which `reproduce.py` has the scripted expert record.
"""

import itertools
from dataclasses import dataclass

RIVALS = {
    "Filtered cloning": ["rft_vla.py"],
    "iRe-VLA": ["rft_vla.py", "--stages", "--demos", "{demos}"],
    "DPO": "tpo_vla.py --score success --pairs all --window 0 --minibatch-size 32".split(),
    "GRAPE": "tpo_vla.py --score grape --pairs best-worst --window 8".split(),
}
METHODS = {
    "SFT": ["sft_vla.py", "--demos", "{demos}"],
    **RIVALS,
    "PPO": ["ppo_vla.py"],
    "GRPO": ["grpo_vla.py"],
    "TGRPO": ["tgrpo_vla.py"],
    "TGRPO without the step term": ["tgrpo_vla.py", "--alpha1", "0"],
    "TGRPO without the trajectory term": ["tgrpo_vla.py", "--alpha2", "0"],
}
FIRST = ("SFT", "PPO", "GRPO", "TGRPO")  # whole, on all tasks and seeds, before anything else is run
ONE = ", one policy"  # ends the name of a method whose run trains one policy for all tasks
#: Lines of grpo_vla.py, and what stands there in a copy of the script that is run in its place.
VARIANTS = {
    "GRPO without the std": (
        "    scores = (groups - groups.mean(dim=-1, keepdim=True)) / (std + eps).clamp(min=1e-6)",
        "    scores = groups - groups.mean(dim=-1, keepdim=True)",
    ),
    "GRPO with GSPO's ratio": (
        "    logratio = (logprobs - old_logprobs).clamp(-20.0, 20.0)",
        "    logratio = (logprobs - old_logprobs).mean(dim=1, keepdim=True).expand_as(logprobs)",
    ),
    "GRPO with CISPO's weights": (
        "    loss = -(weight * torch.min(gain, clipped_gain)).sum()",
        "    loss = -(weight * clipped_gain.detach() * logprobs).sum()",
    ),
}
PAPERS = "TGRPO with the paper's alphas"  # a pair for each of LIBERO-Object's tasks
QUESTIONS = {  # a figure each
    "alphas": {PAPERS: ["tgrpo_vla.py"], "TGRPO --alphas auto": ["tgrpo_vla.py", "--alphas", "auto"]},
    "return": {
        f"TGRPO --return-mode {mode}": ["tgrpo_vla.py", "--return-mode", mode] for mode in ("sum", "mean")
    },
    "grouping": {"TGRPO --group-by stage": ["tgrpo_vla.py", "--group-by", "stage"]},
    "credit": {"GRPO": METHODS["GRPO"], "GRPO --credit stage": ["grpo_vla.py", "--credit", "stage"]},
    "loss": {"GRPO": METHODS["GRPO"], **dict.fromkeys(VARIANTS, METHODS["GRPO"])},
    "flow": {  # from another start: the shipped flow, which ConRFT plays in one step
        "ConRFT": ["conrft_vla.py", "--demos", "{demos}"],
        "TGRPO --policy flow": ["tgrpo_vla.py", "--policy", "flow"],
    },
    "letter": {  # the paper's choices all at once, also with smaller steps, and one by one
        f"TGRPO {flags}": ["tgrpo_vla.py", *flags.split()]
        for flags in (
            "--preset paper --learning-rate 1e-4",
            "--learning-rate 1e-4",
            "--preset paper",
            "--stop group",
            "--no-clip",
            "--update-every step",
        )
    },
}
ASKED = {method: words for question in QUESTIONS.values() for method, words in question.items()}
PAIRS = (  # of methods, on the same tasks and seeds
    *((method, "TGRPO") for method in ("SFT", *RIVALS, "PPO")),
    *((method, "TGRPO") for method in ASKED if method not in {*VARIANTS, *QUESTIONS["flow"]}),
    *((method, "GRPO") for method in ("GRPO --credit stage", *VARIANTS)),
    ("ConRFT", "TGRPO --policy flow"),
    *((method + ONE, method) for method in METHODS),
    *((method + ONE, "TGRPO" + ONE) for method in METHODS if method != "TGRPO"),
    ("TGRPO --preset paper --learning-rate 1e-4", "TGRPO --learning-rate 1e-4"),
)
TWINS = {  # the same runs under two names
    "TGRPO 0.3/0.7": "TGRPO",
    "TGRPO 0/0.7": "TGRPO without the step term",
    "TGRPO 0.3/0": "TGRPO without the trajectory term",
}
ALPHAS1, ALPHAS2 = (0.0, 0.3, 3.0), (0.0, 0.7, 7.0)  # their ratio, and ten times both
HEAT_MAP = {
    f"TGRPO {alpha1:g}/{alpha2:g}": ["tgrpo_vla.py", "--alpha1", f"{alpha1:g}", "--alpha2", f"{alpha2:g}"]
    for alpha1, alpha2 in itertools.product(ALPHAS1, ALPHAS2)
    if alpha1 or alpha2
}


@dataclass(frozen=True)
class Claim:
    """That one method succeeds more often than another."""

    method: str
    other: str
    points: float | None
    """By how many percentage points, where the source says so"""
    source: str


CLAIMS = (
    Claim("TGRPO", "SFT", 91.0 - 86.4, "TGRPO's paper, LIBERO-Object"),
    Claim("TGRPO", "PPO", 91.0 - 86.6, "TGRPO's paper, LIBERO-Object"),
    Claim("TGRPO", "TGRPO without the step term", 91.0 - 86.8, "TGRPO's paper, LIBERO-Object"),
    Claim("TGRPO", "TGRPO without the trajectory term", 91.0 - 73.6, "TGRPO's paper, LIBERO-Object"),
    Claim("TGRPO", "GRAPE", 80.7 - 80.2, "TGRPO's paper, four suites"),
    Claim(PAPERS, "TGRPO", None, "TGRPO's paper, which has alphas of its own for each task"),
    Claim("iRe-VLA", "PPO", None, "iRe-VLA's paper, two other benchmarks"),
    Claim("GRPO", "TGRPO", 68.8 - 52.1, "Temporal GRPO's paper, RoboTwin, SimpleVLA-RL's GRPO"),
    Claim("GRPO --credit stage", "GRPO", 99.1 - 88.4, "Temporal GRPO's paper, LIBERO-Long"),
    Claim("PPO", "GRPO", None, "RL4VLA's paper, ManiSkill"),
    Claim("GRPO", "DPO", None, "RL4VLA's paper, ManiSkill"),
)
