"""Checking a reward function against the rules of a multi-stage reward, and plotting what it pays."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vla_envs.files import whole
from vla_envs.rewards import STAGES, Facts, Reward, compute_reward, multi_stage, stage_names

EPS = 1e-9  # rewards that differ by less are the same
RATE = 20  # control steps per second
HORIZON = 200  # control steps per episode, over which finishing and dawdling are compared


class Rule(NamedTuple):
    """One rule: whether it is kept (None if no episode tells), its name, and the evidence."""

    kept: bool | None
    name: str
    evidence: str


@dataclass
class Payments:
    """What a function paid at the M control steps of all episodes, and right after their resets."""

    facts: Facts  # (M,) each
    kind: NDArray[np.str_]  # (M,) "demonstrations", "drops" or "random episodes"
    episode: NDArray[np.int64]  # (M,) number of the episode within its kind, from 0
    step: NDArray[np.int64]  # (M,) control steps since the reset
    where: list[str]  # (M,) these three in words
    reward: NDArray[np.float64]  # (M,)
    stage: NDArray[np.int64]  # (M,) numbered by progress
    stage_name: NDArray[np.str_]  # (M,)
    own: bool  # whether the stages are the function's own

    def paid(self) -> dict[str, NDArray[np.float64]]:
        """The rewards in every stage that occurred, in the order of progress."""
        return {
            str(self.stage_name[self.stage == k][0]): self.reward[self.stage == k]
            for k in np.unique(self.stage)
        }


def check(reward: Reward, episodes: dict[str, list[Facts]]) -> tuple[list[Rule], Payments | None]:
    """Check a reward function against the rules; what it paid is None when the function fails.

    Stages are those that the function returns with its rewards, numbered by progress and -1 for a drop. A
    function that returns only rewards has ``multi_stage``'s stages, with "dropped" below "far".

    Args:
        reward: The function.
        episodes: Facts (T + 1,) of episodes by kind, from ``vla_envs.rewards.episodes.collect``.
    """
    flat = [(kind, k, facts) for kind, those in episodes.items() for k, facts in enumerate(those)]
    lengths = [len(facts["success"]) for _, _, facts in flat]
    facts = {name: np.concatenate([facts[name] for _, _, facts in flat]) for name in flat[0][2]}
    where = [f"{kind} {k}, step {t}" for kind, k, facts in flat for t in range(len(facts["success"]))]
    changed: list[str] = []

    def watched(given: Facts) -> object:
        before = {name: values.copy() for name, values in given.items()}
        result = reward(given)
        changed.extend(name for name in before if not np.array_equal(given[name], before[name]))
        paid = np.asarray(result[0] if isinstance(result, tuple) else result, dtype=np.float64)
        if paid.shape == (len(where),) and not np.isfinite(paid).all():
            i = int(np.argmin(np.isfinite(paid)))
            raise ValueError(f"{paid[i]} at {where[i]}")
        return result

    name = "finite numbers, one per environment"
    try:
        values, stages, *_ = compute_reward(watched, facts)
        again = compute_reward(watched, facts)
        backwards = compute_reward(watched, {name: fact[::-1] for name, fact in facts.items()})
        alone = compute_reward(watched, {name: fact[:1] for name, fact in facts.items()})
    except Exception as error:  # the user's function may raise anything
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return [Rule(False, name, words if len(words) < 200 else f"{words[:95]} ... {words[-95:]}")], None
    same = all(
        np.allclose(one, other, rtol=0.0, atol=EPS)
        for k, one in enumerate((values, stages))
        for other in (again[k], backwards[k][::-1], np.append(alone[k], one[1:]))
    )
    rules = [
        Rule(True, name, f"shape {values.shape}"),
        Rule(not changed, "leaves the facts alone", ", ".join(dict.fromkeys(changed)) or "none changed"),
        Rule(same, "same facts, same reward", "again, in another order, and alone"),
    ]
    theirs = multi_stage(facts)[1]
    own = not np.array_equal(stages, theirs)
    n = len(STAGES)
    seen = Payments(
        facts=facts,
        kind=np.repeat([kind for kind, _, _ in flat], lengths),
        episode=np.repeat([k for _, k, _ in flat], lengths),
        step=np.concatenate([np.arange(length) for length in lengths]),
        where=where,
        reward=values,
        stage=stages if own else theirs // n * n + (theirs + 1) % n,  # "dropped", the last, comes first
        stage_name=np.array([f"stage {k}" for k in stages]) if own else stage_names(facts, theirs),
        own=own,
    )
    return rules + [rule(seen) for rule in (_constant, _rising, _success, _finishing, _drop, _better)], seen


def _constant(seen: Payments) -> Rule:
    name = "constant within a stage"
    distinct = len(np.unique(seen.reward.round(9)))
    for stage, paid in seen.paid().items():
        if np.ptp(paid) > EPS:
            evidence = (
                f"{stage} pays {len(np.unique(paid.round(9)))} values, {paid.min():.4g} to {paid.max():.4g}"
            )
            hint = "" if seen.own else "; return (rewards, stages) if the stages are your own"
            return Rule(False, name, evidence + hint)
    return Rule(True, name, f"{distinct} values in {len(seen.paid())} stages")


def _rising(seen: Payments) -> Rule:
    name = "rises with the stages"
    means = {stage: paid.mean() for stage, paid in seen.paid().items()}
    sparse = np.ptp(seen.reward[seen.facts["success"] == 0]) <= EPS
    up = (seen.step[1:] > 0) & (np.diff(seen.stage) > 0)
    wrong = np.flatnonzero(up & (np.diff(seen.reward) <= EPS))
    if len(wrong):
        i, j = wrong[0], wrong[0] + 1
        evidence = (
            f"{seen.stage_name[i]} -> {seen.stage_name[j]} pays {seen.reward[i]:.4g} -> {seen.reward[j]:.4g}"
            f" at {seen.where[j]}"
        )
        return Rule(False, name, evidence + ("; sparse: all pay the same before success" if sparse else ""))
    names, paid = list(means), np.array(list(means.values()))
    for k in np.flatnonzero(np.diff(paid) <= EPS):
        return Rule(False, name, f"{names[k + 1]} pays {paid[k + 1]:.4g}, {names[k]} before it {paid[k]:.4g}")
    return Rule(True, name, " < ".join(f"{value:.4g}" for value in paid))


def _success(seen: Payments) -> Rule:
    success = seen.facts["success"] > 0
    least, best = seen.reward[success].min(), seen.reward[~success].max()
    far = seen.reward[seen.step == 0].min()
    levels = [seen.reward[(seen.stage == k) & ~success] for k in np.unique(seen.stage[~success])]
    steps = np.diff(np.unique([level.mean() for level in levels if level.mean() >= far]))
    greatest = max([0.0, *steps])
    return Rule(
        bool(least - best > greatest + EPS),
        "success far above",
        f"{least:.4g}, else at most {best:.4g}; a step of {least - best:.4g}, the others {greatest:.4g}",
    )


def _finishing(seen: Payments) -> Rule:
    """Whether a demonstration that succeeds pays more than the same one that stops on its way.

    Both last ``HORIZON`` control steps, and keep their last reward once they have finished or stand still.
    TGRPO compares the members of a group by this total reward.
    """
    name, least = "finishing pays more than dawdling", (np.inf, "no demonstration succeeds")
    for episode in np.unique(seen.episode[seen.kind == "demonstrations"]):
        its = (seen.kind == "demonstrations") & (seen.episode == episode) & (seen.step > 0)
        if not (seen.facts["success"][its] > 0).any():
            continue
        end = int(np.argmax(seen.facts["success"][its] > 0))
        paid = seen.reward[its][: end + 1]
        totals = np.cumsum(paid) + paid * np.maximum(HORIZON - 1 - np.arange(end + 1), 0)
        best = int(np.argmax(totals[:-1])) if end else 0
        if end and totals[-1] - totals[best] < least[0]:
            where = f"{str(seen.stage_name[its][best])!r} at {np.array(seen.where)[its][best]}"
            least = (
                totals[-1] - totals[best],
                f"{totals[-1]:.4g} in {HORIZON} steps, staying {where} {totals[best]:.4g}",
            )
    return Rule(None if least[0] == np.inf else bool(least[0] > EPS), name, least[1])


def _drop(seen: Payments) -> Rule:
    """Whether a drop pays less than "far", at the end of episodes that leave the object low and free."""
    name, facts = "a drop below far", seen.facts
    peak = facts["object_peak_height"]
    last = np.append(seen.step[1:] == 0, True)
    down = (peak > 0.05) & (facts["object_height"] < peak / 2) & (facts["touching"] == 0)
    first = np.arange(len(last)) - seen.step
    down &= last & (facts["success"] == 0) & (facts["goals_met"] == facts["goals_met"][first])
    if not down.any():
        return Rule(None, name, "no episode has a drop")
    i = np.flatnonzero(down)[np.argmax((seen.reward - seen.reward[first])[down])]
    evidence = f"{seen.reward[i]:.4g} dropped, {seen.reward[first[i]]:.4g} far, at {seen.where[i]}"
    return Rule(bool(seen.reward[i] < seen.reward[first[i]] - EPS), name, evidence)


def _better(seen: Payments) -> Rule:
    demos, others = (seen.reward[seen.kind == kind].mean() for kind in ("demonstrations", "random episodes"))
    return Rule(
        bool(demos > others + EPS),
        "demonstrations above random",
        f"on average {demos:.4g} per step, random {others:.4g}",
    )


def as_text(rules: list[Rule], seen: Payments | None) -> str:
    """A summary to read: what each stage paid, then the verdict on each rule."""
    lines = []
    if seen:
        kinds = [
            f"{len(np.unique(seen.episode[seen.kind == k]))} {k}" for k in dict.fromkeys(seen.kind.tolist())
        ]
        lines += [f"{', '.join(kinds)}: {len(seen.reward)} control steps"]
        for stage, paid in seen.paid().items():
            to = f" to {paid.max():.4g}" if np.ptp(paid) > EPS else ""
            lines += [f"      {stage:24} {len(paid):6} steps  {paid.min():5.4g}{to}"]
    verdicts = {True: "ok", False: "FAIL", None: "--"}
    return "\n".join(lines + [f"{verdicts[rule.kept]:4}  {rule.name}: {rule.evidence}" for rule in rules])


# ---- The plot ----------------------------------------------------------------------------------------


def validate_plot(path: Path) -> None:
    """Refuse a figure that cannot be written, before anything is played.

    Raises:
        ValueError: When matplotlib, the format or the folder does not exist.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure

    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:] not in known:
        raise ValueError(f"--plot is {str(path)!r}; expected a file name that ends in one of {known}")
    if not path.parent.is_dir():
        raise ValueError(f"--plot is {str(path)!r}; expected a file in a folder that exists")


def plot(seen: Payments, path: Path, title: str) -> None:
    """Write a figure of reward against time (s), with a panel per kind, and dashed lines for stages."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(seen.kind.tolist()))
    figure = Figure(figsize=(4.0 * len(kinds), 3.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds):
        for level in seen.paid().values():
            panel.axhline(level.mean(), color="0.8", linestyle="--", linewidth=0.8, zorder=0)
        for episode in np.unique(seen.episode[seen.kind == kind]):
            its = (seen.kind == kind) & (seen.episode == episode)
            panel.step(seen.step[its] / RATE, seen.reward[its], where="post", linewidth=1.0, alpha=0.7)
        panel.set(title=kind, xlabel="time (s)")
    panels[0].set_ylabel("reward")
    for stage, level in seen.paid().items():
        panels[-1].annotate(
            stage, (1.02, level.mean()), xycoords=("axes fraction", "data"), va="center", fontsize=7
        )
    figure.suptitle(title, fontsize=10)
    with whole(path) as partial:
        figure.savefig(partial, dpi=150)
