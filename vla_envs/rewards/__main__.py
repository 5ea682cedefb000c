"""Rewards written by a language model: print the prompt that asks for one, and check the answer.

The prompt for a task, and the check of an answer:

    python -m vla_envs.rewards --task-id 4
    python -m vla_envs.rewards --task-id 4 --check my_reward.py:reward --plot reward.png
"""

from dataclasses import dataclass
from pathlib import Path

from vla_envs.command_line import check_numbers, one_line_errors, parse_args
from vla_envs.rewards import resolve_reward
from vla_envs.rewards.check import as_text, check, plot, validate_plot
from vla_envs.rewards.episodes import collect
from vla_envs.rewards.prompt import prompt
from vla_envs.tasks import SUITES, get_task, suite_or_file


@dataclass
class Args:
    """Print the prompt that asks a language model for a task's reward function, or check such a function.

    The check plays demonstrations, drops and random episodes, and says for each rule whether the function
    keeps it. The exit status is 0 if it keeps all of them, else 1.
    """

    suite: str = "LiberoObject"
    """LIBERO suite, or a folder of BDDL files"""
    task_id: int | None = None
    """Task in the suite, from 0 [4; of a suite of one's own 0]"""
    bddl_file: Path | None = None
    """A task of one's own, instead of --suite and --task-id"""
    check: str | None = None
    """Reward to check instead of printing the prompt: FILE.py:FUNCTION, binary or multi_stage"""
    demonstrations: Path | None = None
    """HDF5 file of demonstrations from LIBERO or vla_envs.experts; by default the expert plays some"""
    episodes: int = 8
    """Episodes per kind"""
    seed: int = 0
    """Seed of the first placement; the next ones count up from it"""
    plot: Path | None = None
    """File for a figure of reward against time, for instance reward.png"""


def main(args: Args) -> bool:
    """Do what ``args`` says, and return whether all rules are kept."""
    suite = suite_or_file(args.suite, args.bddl_file, task_id=args.task_id)
    task = get_task(suite, (4 if suite in SUITES else 0) if args.task_id is None else args.task_id)
    if args.check is None:
        for name in ("plot", "demonstrations", "episodes", "seed"):
            if getattr(args, name) != getattr(Args, name):
                raise ValueError(f"--{name} needs --check FILE.py:FUNCTION")
        print(prompt(task), end="")
        return True
    check_numbers(args, "episodes", above=True)
    check_numbers(args, "seed", above=False)
    reward = resolve_reward(args.check)
    if args.plot:
        validate_plot(args.plot)
    rules, seen = check(reward, collect(task, args.episodes, args.seed, args.demonstrations))
    print(f"{args.check} on {task.label}: {task.instruction}\n{as_text(rules, seen)}")
    if args.plot and seen:
        plot(seen, args.plot, f"{args.check}: {task.instruction}")
    return all(rule.kept is not False for rule in rules)


def program() -> None:
    """Exit with status 0 if all rules are kept, 1 if not, and 2 after a mistake in the command."""
    arguments = parse_args(Args)
    with one_line_errors():
        kept = main(arguments)
    raise SystemExit(0 if kept else 1)


if __name__ == "__main__":
    program()
