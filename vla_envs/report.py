"""One HTML page about runs, finished or going on: tables, figures and videos, nothing outside the file.

For instance:

    python -m vla_envs.report runs/a runs/b --out report.html
"""

import base64
import html
import importlib.util
import io
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import tyro
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vla_envs import evaluation
from vla_envs.command_line import check_numbers, one_line_errors, parse_args
from vla_envs.files import read_json, whole


@dataclass
class Args:
    """Write one HTML page about runs, finished or going on; a folder without one is named and left out."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs"""
    out: Path = Path("report.html")
    """Page to write"""
    embed_mb: float = 2.0
    """Videos of at most this size (MB) are put into the page; larger ones are linked"""


#: Figures with a line for every run: title, and the tags drawn solid, dashed and dotted.
OUTCOMES = ("success_before", "success_after", "sampled_before", "sampled_after")  # columns of the table
LINES = {
    "Success of the training episodes": ("group/success_mean",),
    "Groups: share kept, share in which all got the same": ("group/kept_frac", "group/zero_std_frac"),
    "Mean size of the advantage: step part, trajectory part": (
        "advantage/step_abs", "advantage/trajectory_abs",
    ),
    "KL of an update, KL from the start": ("losses/approx_kl", "losses/kl"),
    "Entropy": ("losses/entropy",),
    "Share of ratios clipped: below, above": ("losses/clipfrac_low", "losses/clipfrac_high"),
    "PPO's critic: explained variance": ("losses/explained_variance",),
    "SFT: loss, held-out loss": ("losses/nll", "losses/held_out_nll"),
}  # fmt: skip
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
body { color: #222; background: #fff; }
table { border-collapse: collapse; } th, td { padding: .25rem .7rem; text-align: left; vertical-align: top; }
tr { border-bottom: 1px solid #ddd; } .table { overflow-x: auto; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; }
svg { max-width: 100%; height: auto; }
i { display: inline-block; width: .8em; height: .8em; border-radius: 50%; } pre { white-space: pre-wrap; }
"""


@dataclass
class Run:
    """What a run has left so far.

    Attributes:
        folder: Where.
        args: ``args.json``.
        state: ``result.json`` of a finished run, else the last saved counters.
        finished: Whether there is a ``result.json``.
        scalars: Steps and values, (2, n), by TensorBoard's tag.
        colour: Of its lines and its mark.
    """

    folder: Path
    args: dict[str, Any]
    state: dict[str, Any]
    finished: bool
    scalars: dict[str, NDArray[np.float64]]
    colour: str = "black"

    @property
    def name(self) -> str:
        """The last part of the folder's path."""
        return self.folder.resolve().name

    @property
    def task_ids(self) -> list[int]:
        """The tasks that it trains."""
        return self.args.get("task_ids") or [self.args["task_id"]]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """``evaluation.success`` of every evaluation in training, each with its ``step``."""
        trials = self.args["eval_episodes"] * len(self.task_ids)
        found = []
        for step, rate in self.scalars.get("charts/success_rate", np.zeros((2, 0))).T:
            outcomes = np.arange(trials) < round(rate * trials)
            found.append({"step": step, **evaluation.success(outcomes)})
        return found

    @property
    def videos(self) -> list[Path]:
        """The first and the last of training, played deterministically; of an evaluation all."""
        names = "*.mp4" if self.args.get("evaluate") else "iteration_*_success.mp4"
        found = [path for path in sorted((self.folder / "videos").glob(names)) if path.stat().st_size]
        return found if self.args.get("evaluate") else list(dict.fromkeys(found[:1] + found[-1:]))


def read_run(folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
        ValueError, OSError: When it is none, or damaged.
    """
    if not (folder / "args.json").is_file():
        raise ValueError(f"{str(folder)!r} is not the folder of a run: it has no args.json")
    args = read_json(folder / "args.json")
    missing = {"suite", "task_id", "seed", "eval_episodes"} - set(args)
    if missing:
        raise ValueError(f"{str(folder / 'args.json')!r} is not a run's: it has no {sorted(missing)[0]}")
    if not isinstance(args["eval_episodes"], int):
        raise ValueError(f"{str(folder / 'args.json')!r} is damaged: eval_episodes {args['eval_episodes']}")
    files = [folder / "result.json"]
    files += [folder / "checkpoints" / name / "counters.json" for name in ("latest", "latest.previous")]
    state: dict[str, Any] = next((read_json(file) for file in files if file.is_file()), {})
    for when in ("before", "after"):
        its = state.get(when) or {}  # of a run that has not ended
        its = its if isinstance(its, dict) else {"success": its}
        state |= {f"{name}_{when}": outcome for name, outcome in its.items()}
    for name in ("success", "sampled"):  # of one that only evaluates or imitates
        state |= {f"{name}_after": state[name]} if name in state else {}
    for name in OUTCOMES:
        if name in state and not evaluation.are_results({name: state[name]}):
            raise ValueError(f"{str(folder)!r} is damaged: its {name} is no result of an evaluation")
    events = EventAccumulator(str(folder)).Reload()  # of damaged ones what stands before the damage
    scalars = {
        tag: np.array([(event.step, event.value) for event in found]).T
        for tag in events.Tags()["scalars"]
        if (found := events.Scalars(tag))  # none where a resumed run has not logged it again
    }
    return Run(folder, args, state, files[0].is_file(), scalars)


# ---- Figures -----------------------------------------------------------------------------------------


def _svg(figure: Any, name: str) -> str:
    """A matplotlib figure as SVG to stand within a page: ids are unique, and only those that are used."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r"#([\w-]+)", svg))
    return re.sub(r' id="([^"]*)"', lambda its: its[0] if its[1] in used else "", svg)


def _figure(title: str, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(5.6 if columns == 1 else 3.7 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.suptitle(title, fontsize=11)
    return figure, panels


def success_figure(runs: list[Run]) -> str:
    """Success on the recorded init states against steps, with Wilson 95 % intervals, as SVG."""
    title = "Success on the recorded init states (%)"
    figure, (panel,) = _figure(title)
    for run in runs:
        steps, rates, low, high = (
            np.array([its[name] for its in run.evaluations]) for name in ("step", "rate", "low", "high")
        )
        panel.plot(steps, 100 * rates, color=run.colour, marker=".")
        panel.fill_between(steps, 100 * low, 100 * high, color=run.colour, alpha=0.12, linewidth=0)
    panel.set(ylim=(0, 100))
    return _svg(figure, title)


def line_figure(title: str, tags: tuple[str, ...], runs: list[Run]) -> str:
    """A line for every run and tag against steps, as SVG."""
    figure, (panel,) = _figure(title)
    for run in runs:
        for tag, style in zip(tags, ("-", "--", ":")):
            if tag in run.scalars:
                panel.plot(*run.scalars[tag], linestyle=style, color=run.colour, marker=".", markersize=3)
    return _svg(figure, title)


def stack_figure(title: str, parts: list[dict[str, NDArray[np.float64]]], runs: list[Run]) -> str:
    """A panel for every run with ``parts`` (2, n) stacked, each a series of steps and values, as SVG."""
    import matplotlib
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(name for its in parts for name in its))
    colours = dict(zip(names, matplotlib.colormaps["viridis"](np.linspace(0, 1, len(names)))))
    shown = [(its, run) for its, run in zip(parts, runs) if its]
    columns = min(3, len(shown))
    figure, panels = _figure(title, -(-len(shown) // columns), columns)
    for panel, (its, run) in zip(panels, shown):
        steps = np.unique(np.concatenate([series[0] for series in its.values()]))
        heights = np.zeros((len(its), len(steps)))  # 0 where a part was not logged
        for height, series in zip(heights, its.values()):
            height[np.searchsorted(steps, series[0])] = series[1]
        panel.stackplot(steps, heights, colors=[colours[name] for name in its])
        panel.set_title(run.name, fontsize=8, color=run.colour, parse_math=False)
    for panel in panels[len(shown) :]:
        panel.remove()
    keys = [Patch(color=colours[name], label=name.replace("_", " ")) for name in names]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return _svg(figure, title)


def stages_of(run: Run) -> dict[str, NDArray[np.float64]]:
    """The shares of the stages that occur, in their order."""
    found = {tag.partition("/")[2]: its for tag, its in run.scalars.items() if tag.startswith("stages/")}
    return {name: its for name, its in found.items() if its[1].any()}


def times_of(run: Run) -> dict[str, NDArray[np.float64]]:
    """The seconds of an iteration by what they went into; ``other`` is the rest of the rollout."""
    names = ("physics", "render", "policy", "update")
    found = {name: run.scalars[f"time/{name}_s"] for name in names if f"time/{name}_s" in run.scalars}
    if "time/rollout_s" in run.scalars and len(found) == len(names):
        steps, other = run.scalars["time/rollout_s"].copy()
        for name in names[:3]:
            other = other - np.interp(steps, *found[name])
        found["other"] = np.stack([steps, other.clip(min=0)])
    return found


def figures(runs: list[Run]) -> list[str]:
    """All figures that the runs have numbers for, as SVG."""
    found = [success_figure(runs)] if any(run.evaluations for run in runs) else []
    for title, tags in LINES.items():
        if any(tag in run.scalars for tag in tags for run in runs):
            found.append(line_figure(title, tags, runs))
    for title, parts in {
        "Stages: share of the decisions": [stages_of(run) for run in runs],
        "Seconds of an iteration": [times_of(run) for run in runs],
    }.items():
        if any(parts):
            found.append(stack_figure(title, parts, runs))
    return found


# ---- The page ----------------------------------------------------------------------------------------


def differing(runs: list[Run]) -> list[str]:
    """The arguments in which those runs differ that have them, but for names, tasks and seeds."""
    names = dict.fromkeys(name for run in runs for name in run.args)
    own = {"script", "run_dir", "resume", "seed", "suite", "task_id", "task_ids"}
    values = {name: {json.dumps(run.args[name]) for run in runs if name in run.args} for name in names}
    return [name for name in names if name not in own and len(values[name]) > 1]


def _success(result: dict[str, Any] | None) -> str:
    if not result:
        return ""
    lines = [f"{result['successes']}/{result['trials']} "
             f"({100 * result['low']:.0f} to {100 * result['high']:.0f} %)"]  # fmt: skip
    lines += [f"task {k}: {its['successes']}/{its['trials']}" for k, its in result.get("tasks", {}).items()]
    return "<br>".join(map(html.escape, lines))


def row(run: Run, names: list[str]) -> str:
    """The run's row of the table; ``names``: the arguments that tell it from the others."""
    state, text = run.state, lambda value: html.escape(str(value))
    outcomes = [_success(state.get(name)) for name in OUTCOMES]
    own = [f"{name} {run.args[name]}" for name in names if name in run.args]
    steps, seconds = state.get("env_steps"), state.get("wall_s")
    cells = [
        f'<i style="background: {run.colour}"></i> {text(run.name)}', text(run.args.get("script", "?")),
        text(run.args["suite"]),
        text(", ".join(map(str, run.task_ids))), text(run.args["seed"]), *outcomes,
        "" if steps is None else f"{steps:,}", "" if seconds is None else f"{seconds / 60:.1f} min",
        "finished" if run.finished else f"iteration {state.get('iteration', 0)}",
        "<br>".join(map(text, own)),
    ]  # fmt: skip
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def video(path: Path, out: Path, embed_mb: float) -> str:
    """The video within the page, or a link to it from the page ``out``."""
    if path.stat().st_size > embed_mb * 1e6:
        link = quote(os.path.relpath(path, out.parent))
        return f'<p><a href="{link}">{html.escape(path.name)}</a></p>'
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><video controls loop muted playsinline src="data:video/mp4;base64,{data}"></video>'
        f"<figcaption>{html.escape(path.stem.replace('_', ' '))}</figcaption></figure>"
    )


def page(runs: list[Run], out: Path, embed_mb: float = 2.0) -> str:
    """The page about ``runs``, to be written to ``out``."""
    import matplotlib

    colours = matplotlib.colormaps["tab10" if len(runs) <= 10 else "turbo"]
    for k, run in enumerate(runs):
        where = k if len(runs) <= 10 else k / (len(runs) - 1)
        run.colour = matplotlib.colors.to_hex(colours(where))
    heads = ("run", "script", "suite", "tasks", "seed", "before", "after",
             "sampled before", "sampled after", "environment steps", "wall time",
             "state", "arguments that differ")  # fmt: skip
    names = differing(runs)
    sections = []
    for run in runs:
        films = "".join(video(path, out, embed_mb) for path in run.videos)
        listed = html.escape(json.dumps(run.args, indent=1))
        sections.append(
            f'<h2><i style="background: {run.colour}"></i> {html.escape(run.name)}</h2>\n'
            f'<div class="figures">{films}</div>\n'
            f"<details><summary>arguments</summary><pre>{listed}</pre></details>"
        )
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>Runs</title><style>{STYLE}</style></head>
<body>
<h1>Runs</h1>
<div class="table"><table>
<tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>
{chr(10).join(row(run, names) for run in runs)}
</table></div>
<p>Successes on the recorded init states, with Wilson 95 % intervals. The figures are against environment
steps (SFT: optimiser steps); of several lines a run the first named is solid, the second dashed.
In the videos successes are above, failures below.</p>
<div class="figures">
{chr(10).join(f"<figure>{figure}</figure>" for figure in figures(runs))}
</div>
{chr(10).join(sections)}
</body>
</html>
"""


def main(args: Args) -> None:
    """Write the page; folders that hold no run are named on stderr."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("figures need matplotlib; expected: pip install matplotlib")
    check_numbers(args, "embed_mb", above=False)
    if not args.out.parent.is_dir() or args.out.is_dir():
        raise ValueError(f"--out is {str(args.out)!r}; expected a file in a folder that exists")
    found = []
    for folder in args.runs:
        try:
            found.append(read_run(folder))
        except (ValueError, OSError) as error:
            print(f"left out: {' '.join(str(error).split())}", file=sys.stderr)
    if not found:
        raise ValueError("there is no run; expected folders of runs, runs/*")
    with whole(args.out) as partial:
        partial.write_text(page(found, args.out, args.embed_mb), encoding="utf-8")
    print(f"{args.out}: {len(found)} run{'s' * (len(found) > 1)}")


def run() -> None:
    """The program: exit status 0, or 2 for a mistake in the command."""
    arguments = parse_args(Args)
    with one_line_errors():
        main(arguments)


if __name__ == "__main__":
    run()
