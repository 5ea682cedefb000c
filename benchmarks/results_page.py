"""The results page: tables, intervals and figures from the CSV files that `reproduce.py` writes."""

import os
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import methods
import numpy as np
import pandas as pd
from methods import ALPHAS1, ALPHAS2, ASKED, HEAT_MAP, ONE, PAIRS, QUESTIONS, TWINS
from scipy.stats import bootstrap, trim_mean

from vla_envs.files import whole
from vla_envs.training import evaluation

matplotlib.use("Agg")
import matplotlib.pyplot as plt

START = "SFT, the start"
SUCCESS = "charts/success_rate"
CURVES = {
    SUCCESS: "success on the recorded init states",
    "group/success_mean": "success of the training episodes, sampled",
    "losses/logprob": "mean log-probability of a token (nats)",
    "losses/entropy": "mean entropy of a token (nats)",
}
WHICH = ["method", "task_id", "seed"]  # names a run
NUMBERS = ["before", "after", "sampled_before", "sampled_after", "trials", "env_steps", "episodes", "wall_s"]
RUN = [*WHICH, *NUMBERS, "commit", "machine"]  # columns of runs.csv
POINT = [*WHICH, "tag", "env_steps", "value"]  # columns of curves.csv
REACHED = (0.8, 0.9)  # deterministic success: how soon it is reached
DRAWS = 5000  # of a bootstrap
FEWEST_PAIRS = 6  # for a verdict: a sign test of five cannot reach 5 %
HEADER = """<!-- Written by `python benchmarks/reproduce.py --no-run`; do not edit. -->

# Results

Every number on this page is worked out from the runs in `benchmarks/results/`. A run is evaluated on the
50 recorded init states of its task, which training never sees, before and after training. *Deterministic*
episodes are played without sampling and are the headline; *sampled* ones are played at the training
temperature.
"""
ABOUT_TABLE = """
Successes with Wilson 95 % intervals over all runs. IQM is the interquartile mean; it and the probability of
being better than the start have bootstrap 95 % intervals, stratified by task, over {}.
"""
ABOUT_SOON = """
Control steps of training before the first evaluation (there is one every five iterations) with that
deterministic success: the median and the range over the seeds; 0 means that the start has it. Minutes are
the same share of the run's wall time, which includes its evaluations; other jobs ran beside it.
"""
ABOUT_MADE = """
Each with `--task-id`, `--seed`, `--suite` and `--total-env-steps`. `runs.csv` has the commit and the machine
of every run. `benchmarks/reproduce.py` makes one again with its method, task and seed in `--methods`,
`--task-ids` and `--seeds`, and a new folder in `--results`.
"""
ABOUT_CLAIMS = f"""
Percentage points of success by which the first method is ahead; ours are means over pairs of runs (same
task, same seed) with bootstrap 95 % intervals. A claim *holds* if its whole interval is above zero, and
*does not hold* if all of it is below; else, and with fewer than {FEWEST_PAIRS} pairs, one *cannot tell*. The
papers had other policies, tasks and amounts of training, so sizes cannot be compared.
"""
ABOUT_PAIRS = """
Percentage points of success after training: means of the paired differences (same task, same seed), with
the number of pairs; over all tasks with a bootstrap 95 % interval over the pairs.
"""


# ---- The CSV files ----------------------------------------------------------------------------------


def read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    """The rows of ``runs.csv`` or ``curves.csv``; none if the file does not exist.

    A number may be missing: that of a run from before the file had the column.
    """
    if not path.is_file():
        return pd.DataFrame(columns=columns)
    text = dict.fromkeys(("method", "tag", "commit", "machine"), str)
    frame = pd.read_csv(path, dtype=dict.fromkeys(NUMBERS, "Int64") | text)
    return frame.reindex(columns=columns or frame.columns)


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write ``runs.csv`` or ``curves.csv``, whole or not at all."""
    with whole(path) as partial:
        frame.sort_values(["task_id", "method", "seed"], kind="stable").to_csv(partial, index=False)


# ---- Tables ------------------------------------------------------------------------------------------


def markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown; cells without a value are empty."""
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.fillna("").itertuples(index=False)]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def rates(runs: pd.DataFrame) -> pd.DataFrame:
    """Success after training by task and seed (rows) and method (columns)."""
    rate = (runs["after"] / runs["trials"]).astype(float)
    return runs.assign(rate=rate).pivot(index=["task_id", "seed"], columns="method", values="rate")


def table(runs: pd.DataFrame, names: list[str]) -> str:
    """Successes by task and method, and aggregates over the runs that all the methods have made."""
    start = runs[runs["method"].isin(names)].dropna(subset="before")
    start = start.assign(method=START, after=start["before"]).drop_duplicates(["task_id", "seed"])
    runs = pd.concat([start, runs[runs["method"].isin(names)]])
    shown = [method for method in (START, *names) if method in set(runs["method"])]
    counts = runs.groupby(["task_id", "method"])[["after", "trials"]].sum()
    cells = pd.Series([percent(*row) for row in counts.itertuples(index=False)], counts.index)
    text = cells.unstack()[shown]
    text.index = [f"task {task_id}" for task_id in text.index]
    common = rates(runs)[shown].dropna().unstack("task_id").dropna()  # rows: seeds that have all these tasks
    of = "no task and seed that all methods have"
    if len(common):
        of = f"tasks {sorted(set(common.columns.get_level_values(1)))}, seeds {list(common.index)}"
        for method in shown:
            scores = common[method].to_numpy().T  # (tasks, seeds)
            text.loc["IQM", method] = estimate(iqm, 100 * scores, "{:.0f} %")
            if method != START and START in shown:  # cloning alone says nothing of its start
                pair = [*scores, *common[START].to_numpy().T]
                text.loc["better than the start", method] = estimate(share_better, pair, "{:.2f}")
    return markdown(text.reset_index(names="")) + ABOUT_TABLE.format(of)


def iqm(*scores: Any, axis: int = -1) -> Any:
    """The interquartile mean of the scores of all tasks, each (..., seeds)."""
    return trim_mean(np.concatenate(scores, axis), 0.25, axis)


def share_better(*scores: Any, axis: int = -1) -> Any:
    """How likely a run of one method is better than one of another, by task; ties count half.

    The first half of ``scores``, each (..., seeds), are the first method's tasks, the others the second's.
    """
    first, second = np.split(np.stack(scores), 2)  # (tasks, ..., seeds) each
    pairs = first[..., :, None], second[..., None, :]
    return (np.greater(*pairs) + 0.5 * np.equal(*pairs)).mean(axis=(0, -2, -1))


def interval(statistic: Any, samples: Any, method: str = "percentile") -> tuple[float, ...]:
    """A statistic, and its bootstrap 95 % interval where there are several values to draw from.

    Each of the samples is drawn from by itself: the bootstrap is stratified by task.
    """
    point = statistic(*samples, axis=-1)
    if len(samples[0]) < 2:
        return (point,)
    rng = np.random.default_rng(0)
    drawn = bootstrap(samples, statistic, method=method, n_resamples=DRAWS, vectorized=True, rng=rng)
    return point, *drawn.confidence_interval


def estimate(statistic: Any, samples: Any, form: str, method: str = "percentile") -> str:
    """What ``interval`` gives, in words."""
    point, *ends = (form.format(x) for x in interval(statistic, samples, method))
    return f"{point} ({' to '.join(ends)})" if ends else point


def percent(successes: int, trials: int) -> str:
    """``246/250 (96 to 99 %)``, with the Wilson interval."""
    its = evaluation.success(np.arange(trials) < successes)
    return f"{successes}/{trials} ({100 * its['low']:.0f} to {100 * its['high']:.0f} %)"


def reached(runs: pd.DataFrame, points: pd.DataFrame, names: list[str]) -> str:
    """Per method and task its seeds, and steps and minutes until ``REACHED``."""

    def spread(values: pd.Series, form: str) -> str:
        there = values.dropna()
        if there.empty:
            return "not reached"
        middle, low, high = (form.format(x) for x in there.quantile([0.5, 0, 1]))
        few = "" if len(there) == len(values) else f", {len(there)} of {len(values)} runs"
        return (middle if low == high else f"{middle} ({low} to {high})") + few

    curves = points[points["tag"] == SUCCESS]
    rows = []
    for share in REACHED:
        first = curves[curves["value"] >= share].groupby(WHICH)["env_steps"].min().rename(f"steps {share}")
        runs = runs.join(first, on=WHICH)
        runs[f"minutes {share}"] = runs[f"steps {share}"] / runs["env_steps"] * runs["wall_s"] / 60
    runs = runs[runs["env_steps"] > 0]  # cloning alone takes none, and has no curve
    runs["method"] = pd.Categorical(runs["method"], names)  # sorts by method as ``names``, leaves others out
    for (method, task_id), its in runs.groupby(["method", "task_id"], observed=True):
        row = {"method": method, "task": task_id, "seeds": " ".join(map(str, its["seed"]))}
        for share in REACHED:
            row[f"steps to {100 * share:.0f} %"] = spread(its[f"steps {share}"], "{:,.0f}")
            row[f"minutes to {100 * share:.0f} %"] = spread(its[f"minutes {share}"], "{:.1f}")
        rows.append(row)
    return markdown(pd.DataFrame(rows)) + ABOUT_SOON


def made(runs: pd.DataFrame, names: list[str]) -> str:
    """Per method its command, and the commits and machines of its runs."""
    commands = {**methods.HEAT_MAP, **ASKED, **methods.METHODS}
    rows = []
    for method in names:
        its = runs[runs["method"] == method]
        if its.empty:
            continue
        script, *flags = commands[method.removesuffix(ONE)]
        words = " ".join(["python", script, *flags]).replace("{demos}", "demos")
        beside = {
            " from the shipped `nano`, without `--total-env-steps`": script == "sft_vla.py",
            " with `--task-ids`": method.endswith(ONE),
            " with its line": method in methods.VARIANTS,
            " with the task's alphas": method == methods.PAPERS,
        }
        machines = its["machine"].fillna("not recorded").unique()
        command = f"`{words}`" + "".join(text for text, where in beside.items() if where)
        cells = {"method": method, "command": command, "runs": len(its)}
        rows.append(
            cells | {"commits": " ".join(its["commit"].unique()), "machines": "; ".join(sorted(machines))}
        )
    return markdown(pd.DataFrame(rows)) + ABOUT_MADE


def with_twins(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows, and those of equal runs once more under their other name."""
    twins = [frame[frame["method"] == other].assign(method=method) for method, other in TWINS.items()]
    return pd.concat([frame, *twins])


def gains_of(runs: pd.DataFrame, method: str, other: str) -> pd.Series:
    """By how many points of success ``method`` is ahead of ``other``, by task and seed that both have."""
    rate = 100 * rates(runs[runs["method"].isin([method, other])])
    return (rate[method] - rate[other]).dropna() if {method, other} <= set(rate) else pd.Series(dtype=float)


def verdict(gains: pd.Series) -> str:
    """Whether the first method is ahead, as the pairs have it."""
    if len(gains) < FEWEST_PAIRS:
        return "cannot tell"
    _, low, high = interval(np.mean, [gains.to_numpy()], "basic")
    return "holds" if low > 0 else "does not hold" if high < 0 else "cannot tell"


def claims_of(ways: dict[str, pd.DataFrame]) -> list[tuple[methods.Claim, dict[str, pd.Series]]]:
    """The claims that there are pairs for, and those, ``ways`` by how the runs were evaluated."""
    pairs = [
        (claim, {way: gains_of(its, claim.method, claim.other) for way, its in ways.items()})
        for claim in methods.CLAIMS
    ]
    return [(claim, its) for claim, its in pairs if any(map(len, its.values()))]


def claims_table(ways: dict[str, pd.DataFrame]) -> str:
    """What papers say of two methods, and what the runs say."""
    rows = []
    for claim, pairs in claims_of(ways):
        row = {"ahead": claim.method, "of": claim.other, "says": claim.source}
        row["theirs"] = "" if claim.points is None else f"{claim.points:+.1f}"
        for way, gains in pairs.items():
            if len(gains):
                ours = estimate(np.mean, [gains.to_numpy()], "{:+.1f}", "basic")
                row[f"ours, {way}"] = f"{ours}, {len(gains)} pairs: {verdict(gains)}"
        rows.append(row)
    return markdown(pd.DataFrame(rows)) + ABOUT_CLAIMS if rows else ""


def pairs_table(runs: pd.DataFrame) -> str:
    """How much more often one method of each of ``PAIRS`` succeeds than the other, by task and altogether."""
    rows = {}
    for method, other in PAIRS:
        gains = gains_of(runs, method, other)
        if gains.empty:
            continue
        by_task = gains.groupby("task_id").agg(["mean", "count"])
        row = {f"task {t}": f"{mean:+.0f} ({count})" for t, mean, count in by_task.itertuples()}
        row["all"] = estimate(np.mean, [gains.to_numpy()], "{:+.1f}", "basic")
        row["pairs"] = len(gains)
        rows[f"{method} against {other}"] = row
    columns = [*(f"task {task_id}" for task_id in sorted(set(runs["task_id"]))), "all", "pairs"]
    text = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns).dropna(axis=1, how="all")
    return markdown(text.reset_index(names="pair")) + ABOUT_PAIRS


# ---- Figures -----------------------------------------------------------------------------------------


def draw_curves(points: pd.DataFrame, names: list[str], path: Path) -> None:
    """Mean and range over the runs that all methods with curves have, against environment steps."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    for axis, (tag, name) in zip(axes.flat, CURVES.items()):
        its = points[(points["tag"] == tag) & points["method"].isin(names)]
        made = {method: set(zip(x["task_id"], x["seed"])) for method, x in its.groupby("method")}
        common = sorted(set.intersection(*made.values())) if made else []
        for method in (method for method in names if method in made and common):
            curves = [its[(its[WHICH] == (method, *run)).all(axis=1)] for run in common]
            grid = np.linspace(0, min(curve["env_steps"].iloc[-1] for curve in curves), 50)
            values = [np.interp(grid, x["env_steps"].astype(float), x["value"]) for x in curves]
            (line,) = axis.plot(grid / 1000, np.mean(values, axis=0), linewidth=2, label=method)
            low, high = np.min(values, axis=0), np.max(values, axis=0)
            axis.fill_between(grid / 1000, low, high, alpha=0.12, color=line.get_color())
        of = ", ".join(f"{task_id}/{seed}" for task_id, seed in common)
        axis.set_title(textwrap.fill(f"task/seed {of}", 60), fontsize="medium")
        axis.set(xlabel="thousand environment steps", ylabel=name)
        if "success" in name:
            axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, path)


def draw_heat_map(runs: pd.DataFrame, path: Path) -> None:
    """One task's success after training by alpha1 and alpha2, the mean over seeds that all pairs have."""
    common = rates(runs).dropna()
    names = [[f"TGRPO {alpha1:g}/{alpha2:g}" for alpha2 in ALPHAS2] for alpha1 in ALPHAS1]
    grid = common.mean().reindex(np.ravel(names)).to_numpy().reshape(len(ALPHAS1), len(ALPHAS2))
    figure, axis = plt.subplots(figsize=(4.6, 4), layout="constrained")
    image = axis.imshow(grid, vmin=0, vmax=1, origin="lower", cmap="viridis")
    for row, column in np.argwhere(np.isfinite(grid)):
        axis.text(column, row, f"{100 * grid[row, column]:.0f} %", ha="center", va="center", color="white")
    seeds = ", ".join(map(str, common.index.get_level_values("seed")))
    axis.set(
        xticks=range(len(ALPHAS2)), xticklabels=ALPHAS2, xlabel="alpha2 (trajectory)",
        yticks=range(len(ALPHAS1)), yticklabels=ALPHAS1, ylabel="alpha1 (step)",
        title=f"task {runs['task_id'].iloc[0]}, seed {seeds}",
    )  # fmt: skip
    figure.colorbar(image, label="success after training")
    save(figure, path)


def draw_claims(ways: dict[str, pd.DataFrame], path: Path) -> None:
    """By how much the first method of every claim is ahead, with the intervals, and what its paper says."""
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    names: list[str] = []
    for claim, pairs in claims_of(ways):
        for k, gains in enumerate(gains for gains in pairs.values() if len(gains)):
            mean, *ends = interval(np.mean, [gains.to_numpy()], "basic")
            low, high = ends or (mean, mean)
            error = [[mean - low], [high - mean]]
            axis.errorbar(mean, len(names) + 0.2 * k - 0.1, xerr=error, fmt="o", color=f"C{k}", capsize=3)
        if claim.points is not None:
            axis.plot(claim.points, len(names), "kx")
        names.append(f"{claim.method}\nahead of {claim.other}")
    for k, way in enumerate(ways):
        axis.plot([], [], "o", color=f"C{k}", label=f"ours, {way}")
    axis.plot([], [], "kx", label="the paper's")
    axis.axvline(0, color="grey", linewidth=1)
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="percentage points of success")
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure without matplotlib's version: equal figures are equal files."""
    with whole(path) as partial:
        figure.savefig(partial, dpi=80, metadata={"Software": None})
    plt.close(figure)


def evaluated(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The runs by how they were evaluated, each with its successes as ``before`` and ``after``."""
    sampled = runs.assign(before=runs["sampled_before"], after=runs["sampled_after"])
    return {"deterministic": runs, "sampled": sampled.dropna(subset="after")}


def draw(runs: pd.DataFrame, points: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the figures that there are runs for; their files."""
    folder.mkdir(parents=True, exist_ok=True)
    made, drawn = set(points["method"]), []
    for name, asked in {"curves": methods.METHODS, **QUESTIONS}.items():
        if made & (asked.keys() - methods.METHODS.keys() or asked.keys()):  # any that is only asked here
            drawn.append(folder / f"{name}.png")
            draw_curves(points, [*({"TGRPO"} - asked.keys()), *asked], drawn[-1])
    only_mapped = runs["method"].isin(HEAT_MAP.keys() - ASKED.keys())
    for task_id in sorted(set(runs.loc[only_mapped, "task_id"])):
        named = with_twins(runs[runs["task_id"] == task_id])
        drawn.append(folder / f"heat_map_{task_id}.png")
        draw_heat_map(named[named["method"].isin(HEAT_MAP)], drawn[-1])
    if claims_of(evaluated(runs)):
        drawn.append(folder / "claims.png")
        draw_claims(evaluated(runs), drawn[-1])
    return drawn


# ---- The page ----------------------------------------------------------------------------------------


def section(runs: pd.DataFrame, points: pd.DataFrame) -> list[str]:
    """What the page says about a suite: its tables, each below its title."""
    ways = evaluated(runs)
    one = [method + ONE for method in methods.METHODS]
    names = [method for method in [*methods.METHODS, *one] if method in set(runs["method"])]
    every = list(dict.fromkeys([*methods.METHODS, *one, *ASKED, *HEAT_MAP]))
    parts = []
    for way, its in ways.items():
        if its["method"].isin(names).any():
            parts += [f"### Success, {way}", table(its, names)]
    parts += ["### How soon", reached(runs, points, every)]
    for way, its in ways.items():
        if its["method"].isin([pair[0] for pair in PAIRS]).any():
            parts += [f"### In pairs, {way}", pairs_table(with_twins(its))]
    if claims := claims_table(ways):
        parts += ["### What papers claim", claims]
    return [*parts, "### How they were made", made(runs, every)]


def write_page(suites: dict[str, Path], figures: dict[str, Path], page: Path) -> str:
    """Write ``page`` about the results in the folders ``suites``, and its figures to the folders ``figures``.

    Returns:
        The page. Of each suite it has the text of ``about.md``, where its folder holds one.
    """
    parts = [HEADER]
    for suite, folder in suites.items():
        runs, points = read_csv(folder / "runs.csv", RUN), read_csv(folder / "curves.csv", POINT)
        about = folder / "about.md"
        parts += [f"## {suite}", about.read_text() if about.is_file() else "", *section(runs, points)]
        parts.append("### Figures")
        for file in draw(runs, points, figures[suite]):
            link = Path(os.path.relpath(file, page.parent)).as_posix()
            parts.append(f"![{suite}: {file.stem.replace('_', ' ')}]({link})")
    text = "\n\n".join(part.strip() for part in parts if part) + "\n"
    with whole(page) as partial:
        partial.write_text(text)
    return text
