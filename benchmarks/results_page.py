"""The results page: tables, intervals and figures from the CSV files that `reproduce.py` writes."""

import os
import textwrap
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import methods
import numpy as np
import pandas as pd
from methods import ALPHAS1, ALPHAS2, ASKED, HEAT_MAP, PAIRS, QUESTIONS, TWINS
from rliable import library, metrics
from scipy.stats import bootstrap

from vla_envs import evaluation
from vla_envs.files import whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt

warnings.filterwarnings("ignore", "random_state is deprecated", FutureWarning)  # rliable's way of seeding

START = "SFT, the start"
CURVES = {
    "charts/success_rate": "success on the recorded init states",
    "group/success_mean": "success of the training episodes, sampled",
    "losses/logprob": "mean log-probability of a token (nats)",
    "losses/entropy": "mean entropy of a token (nats)",
}
WHICH = ["method", "task_id", "seed"]  # names a run
NUMBERS = ["before", "after", "sampled_before", "sampled_after", "trials", "env_steps", "episodes", "wall_s"]
RUN = [*WHICH, *NUMBERS, "commit"]  # columns of runs.csv
POINT = [*WHICH, "tag", "env_steps", "value"]  # columns of curves.csv
REACHED = (0.8, 0.9)  # deterministic success: how soon it is reached
DRAWS = 5000  # of a bootstrap
HEADER = """<!-- Written by `python benchmarks/reproduce.py --no-run`; do not edit. -->

# Results

Every number on this page is worked out from the runs in `benchmarks/results/`. A run is evaluated on the
50 recorded init states of its task, which training never sees, before and after training. *Deterministic*
episodes are played without sampling and are the headline; *sampled* ones are played at the training
temperature.
"""
ABOUT_TABLE = """
Successes with Wilson 95 % intervals over all runs. IQM is the interquartile mean; it and the probability of
being better than the start have stratified bootstrap 95 % intervals (rliable), over {}.
"""
ABOUT_SOON = """
Control steps of training before the first evaluation (there is one every five iterations) with that
deterministic success: the median and the range over the seeds; 0 means that the start has it. Minutes are
the same share of the run's wall time, which includes its evaluations; other jobs ran beside it.
"""
ABOUT_PAIRS = """
Percentage points of success after training: means of the paired differences (same task, same seed), with
the number of pairs; over all tasks with a bootstrap 95 % interval over the pairs.
"""


# ---- The CSV files ----------------------------------------------------------------------------------


def read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    """The rows of ``runs.csv`` or ``curves.csv``; none where there is no such file.

    A number may be missing: that of a run from before the file had the column.
    """
    if not path.is_file():
        return pd.DataFrame(columns=columns)
    text = dict.fromkeys(("method", "tag", "commit"), str)
    return pd.read_csv(path, dtype=dict.fromkeys(NUMBERS, "Int64") | text)


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
    """Successes by task and method, and rliable's aggregates over the runs that all the methods have made."""
    start = runs.assign(method=START, after=runs["before"]).drop_duplicates(["task_id", "seed"])
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
        draws = np.random.RandomState(0)
        for method in shown:
            scores = common[method].to_numpy()  # (seeds, tasks)
            mean = library.get_interval_estimates(
                {method: scores}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=DRAWS,
                random_state=draws,
            )  # fmt: skip
            point, low, high = (float(np.ravel(x)[0]) for x in (mean[0][method], *mean[1][method]))
            text.loc["IQM", method] = f"{100 * point:.0f} % ({100 * low:.0f} to {100 * high:.0f} %)"
            if method != START:
                better = library.get_interval_estimates(
                    {method: (scores, common[START].to_numpy())}, metrics.probability_of_improvement,
                    reps=DRAWS, random_state=draws,
                )  # fmt: skip
                point, low, high = (float(np.ravel(x)[0]) for x in (better[0][method], *better[1][method]))
                text.loc["better than the start", method] = f"{point:.2f} ({low:.2f} to {high:.2f})"
    return markdown(text.reset_index(names="")) + ABOUT_TABLE.format(of)


def percent(successes: int, trials: int) -> str:
    """``246/250 (96 to 99 %)``, with the Wilson interval."""
    its = evaluation.success(np.arange(trials) < successes)
    return f"{successes}/{trials} ({100 * its['low']:.0f} to {100 * its['high']:.0f} %)"


def reached(runs: pd.DataFrame, points: pd.DataFrame, names: list[str]) -> str:
    """Per method and task its seeds, steps and minutes until ``REACHED``, and the commits of its runs."""

    def spread(values: pd.Series, form: str) -> str:
        there = values.dropna()
        if there.empty:
            return "not reached"
        middle, low, high = (form.format(x) for x in there.quantile([0.5, 0, 1]))
        few = "" if len(there) == len(values) else f", {len(there)} of {len(values)} runs"
        return (middle if low == high else f"{middle} ({low} to {high})") + few

    curves = points[points["tag"] == "charts/success_rate"]
    rows = []
    for share in REACHED:
        first = curves[curves["value"] >= share].groupby(WHICH)["env_steps"].min().rename(f"steps {share}")
        runs = runs.join(first, on=WHICH)
        runs[f"minutes {share}"] = runs[f"steps {share}"] / runs["env_steps"] * runs["wall_s"] / 60
    order = {method: k for k, method in enumerate(names)}
    runs = runs[runs["method"].isin(names)].sort_values(WHICH, key=lambda x: x.replace(order))
    for (method, task_id), its in runs.groupby(["method", "task_id"], sort=False):
        row = {"method": method, "task": task_id, "seeds": " ".join(map(str, its["seed"]))}
        for share in REACHED:
            row[f"steps to {100 * share:.0f} %"] = spread(its[f"steps {share}"], "{:,.0f}")
            row[f"minutes to {100 * share:.0f} %"] = spread(its[f"minutes {share}"], "{:.1f}")
        rows.append(row | {"commits": " ".join(its["commit"].unique())})
    return markdown(pd.DataFrame(rows)) + ABOUT_SOON


def with_twins(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows, and those of equal runs once more under their other name."""
    twins = [frame[frame["method"] == other].assign(method=method) for method, other in TWINS.items()]
    return pd.concat([frame, *twins])


def pairs_table(runs: pd.DataFrame) -> str:
    """How much more often one method of each of ``PAIRS`` succeeds than the other, by task and altogether."""
    rate, rows = 100 * rates(runs), {}
    for method, other in (pair for pair in PAIRS if set(pair) <= set(rate)):
        gains = (rate[method] - rate[other]).dropna()
        if gains.empty:
            continue
        by_task = gains.groupby("task_id").agg(["mean", "count"])
        row = {f"task {t}": f"{mean:+.0f} ({count})" for t, mean, count in by_task.itertuples()}
        row["all"] = f"{gains.mean():+.1f} ({len(gains)})"
        if gains.nunique() > 1:
            draws = np.random.default_rng(0)
            test = bootstrap((gains,), np.mean, method="basic", n_resamples=DRAWS, rng=draws)
            low, high = test.confidence_interval
            row["all"] = f"{gains.mean():+.1f} ({low:+.1f} to {high:+.1f}; {len(gains)})"
        rows[f"{method} against {other}"] = row
    tasks = [
        name for t in range(90) if (name := f"task {t}") in {key for row in rows.values() for key in row}
    ]
    text = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=[*tasks, "all"])
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


def save(figure: Any, path: Path) -> None:
    """Write a figure without matplotlib's version: equal figures are equal files."""
    with whole(path) as partial:
        figure.savefig(partial, dpi=80, metadata={"Software": None})
    plt.close(figure)


def draw(runs: pd.DataFrame, points: pd.DataFrame, folder: Path) -> None:
    """Write the figures that there are runs for."""
    folder.mkdir(parents=True, exist_ok=True)
    made, named_runs, named_points = set(points["method"]), with_twins(runs), with_twins(points)
    if made & methods.METHODS.keys():
        draw_curves(points, list(methods.METHODS), folder / "curves.png")
    for question, asked in QUESTIONS.items():
        if made & asked.keys():
            draw_curves(named_points, ["TGRPO", *asked], folder / f"{question}.png")
    only_mapped = HEAT_MAP.keys() - ASKED.keys()
    for task_id in runs.loc[runs["method"].isin(only_mapped), "task_id"].unique():
        its = named_runs[(named_runs["task_id"] == task_id) & named_runs["method"].isin(HEAT_MAP)]
        draw_heat_map(its, folder / f"heat_map_{task_id}.png")


# ---- The page ----------------------------------------------------------------------------------------


def section(suite: str, runs: pd.DataFrame, points: pd.DataFrame, figures: dict[str, str], about: str) -> str:
    """What the page says about a suite; ``figures`` has the link to each figure by its name."""
    sampled = runs.assign(before=runs["sampled_before"], after=runs["sampled_after"]).dropna(subset="after")
    names = [method for method in methods.METHODS if method in set(runs["method"])]
    every = list(dict.fromkeys([*methods.METHODS, *ASKED, *HEAT_MAP]))
    parts = [f"## {suite}", about]
    for title, its in {"Deterministic": runs, "Sampled": sampled}.items():
        if names and len(its):
            parts += [f"### {title}", table(its[its["method"].isin(names)], names)]
    parts += ["### How soon", reached(runs, points, every)]
    for title, its in {"deterministic": runs, "sampled": sampled}.items():
        if runs["method"].isin(ASKED).any():
            parts += [f"### What the paper leaves open, {title}", pairs_table(with_twins(its))]
    parts += ["### Figures"] + [f"![{suite}, {name}]({link})" for name, link in figures.items()]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def page(suites: dict[str, Path], figures: dict[str, Path], at: Path) -> str:
    """The page ``at`` about the results in ``suites``, whose figures lie in the folders ``figures``."""
    text = HEADER
    for suite, folder in suites.items():
        runs, points = read_csv(folder / "runs.csv", RUN), read_csv(folder / "curves.csv", POINT)
        links = {file.stem.replace("_", " "): os.path.relpath(file, at.parent)
                 for file in sorted(figures[suite].glob("*.png"))}  # fmt: skip
        about = folder / "about.md"
        text += "\n" + section(suite, runs, points, links, about.read_text() if about.is_file() else "")
    return text
