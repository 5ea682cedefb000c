"""One HTML page about runs, finished or still going: a table, figures and videos, in one file.

For instance:

    python -m vla_envs.report runs/* --out report.html
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

from vla_envs.command_line import check_numbers, one_line_errors, parse_args
from vla_envs.files import read_json, whole
from vla_envs.training import evaluation


@dataclass
class Args:
    """Write one HTML page about runs, finished or still going; folders without one are named and skipped."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the runs"""
    out: Path = Path("report.html")
    """Page to write"""
    embed_mb: float = 2.0
    """Videos up to this size (MB) are embedded in the page; larger ones are linked"""


OUTCOMES = ("success_before", "success_after", "sampled_before", "sampled_after")
EVALUATED = ("charts/success_rate", "charts/sampled_success_rate")  # drawn with their intervals
#: Figures with a line per run: the title, the y axis, and what each of TensorBoard's tags shows. The first
#: tag is drawn solid, the second dashed.
FIGURES = {
    "Success, deterministic": ("success (%)", {EVALUATED[0]: ""}),
    "Success, sampled": ("success (%)", {EVALUATED[1]: ""}),
    "Success of the training episodes": ("success (%)", {"group/success_mean": ""}),
    "Groups": ("groups (%)", {"group/kept_frac": "kept", "group/zero_std_frac": "all members alike"}),
    "Size of the advantage": (
        "mean of |advantage|",
        {"advantage/step_abs": "step term", "advantage/trajectory_abs": "trajectory term"},
    ),
    "KL divergence": ("KL (nats)", {"losses/approx_kl": "of an update", "losses/kl": "from the start"}),
    "Entropy": ("entropy (nats per token)", {"losses/entropy": ""}),
    "Clipped ratios": (
        "share of ratios",
        {"losses/clipfrac_low": "clipped from below", "losses/clipfrac_high": "clipped from above"},
    ),
    "PPO's critic": ("explained variance", {"losses/explained_variance": ""}),
    "Imitation": ("loss", {"losses/nll": "training", "losses/held_out_nll": "held out"}),
}
STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --grey: #666; --line: #ddd; --code: #f6f6f6; }
* { box-sizing: border-box; }
body { font: 15px/1.4 system-ui, sans-serif; color: var(--text); background: var(--page); }
body { max-width: 1200px; margin: 1.5rem auto; padding: 0 1rem; }
h1 { margin: 0; } h2 { margin: 2.5rem 0 .6rem; font-size: 1.15rem; overflow-wrap: anywhere; }
a { color: inherit; }
small { display: block; color: var(--grey); font-size: .8rem; font-weight: normal; white-space: nowrap; }
table { border-collapse: collapse; width: 100%; margin-bottom: 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; text-align: left; vertical-align: top; white-space: nowrap; }
th { font-size: .8rem; color: var(--grey); } tr { border-bottom: 1px solid var(--line); }
[data-name=deterministic] { font-weight: 600; }
.run, .run small { max-width: 20rem; overflow: hidden; text-overflow: ellipsis; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
.one { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
figure { margin: 0; } svg, video { width: 100%; height: auto; }
figcaption { color: var(--grey); font-size: .8rem; }
i { display: inline-block; width: .75em; height: .75em; border-radius: 50%; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--code); }
pre { padding: .6rem; font-size: .8rem; }
details pre { columns: 20rem; } summary { cursor: pointer; }
@media (max-width: 900px) {
  th { display: none; } tr { display: flex; flex-wrap: wrap; padding: .4rem 0; } td { padding: .1rem .5rem; }
  .run { flex-basis: 100%; max-width: 100%; }
  td:empty { display: none; } td[data-name]::before { content: attr(data-name) " "; color: var(--grey); }
}
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --page: #1a1a1a; --grey: #999; --line: #444; --code: #262626; }
  svg { filter: invert(.9) hue-rotate(180deg); }
}
"""


@dataclass
class Run:
    """What a run has left so far.

    Attributes:
        folder: The run's folder.
        args: The contents of ``args.json``.
        state: ``result.json`` of a finished run, else the last saved counters.
        finished: Whether there is a ``result.json``.
        scalars: By TensorBoard's tag, steps and values, (2, n).
        colour: The colour of its lines and its mark.
        number: Its number on the page, from 1.
    """

    folder: Path
    args: dict[str, Any]
    state: dict[str, Any]
    finished: bool
    scalars: dict[str, NDArray[np.float64]]
    colour: str = "black"
    number: int = 1

    @property
    def name(self) -> str:
        """The last part of the folder's path."""
        return self.folder.resolve().name

    @property
    def script(self) -> str:
        """The script that made it, without ``.py``."""
        return str(self.args.get("script", "?"))

    @property
    def label(self) -> str:
        """What legends call it."""
        return f"{self.number} {self.script}, seed {self.args['seed']}"

    @property
    def task_ids(self) -> list[int]:
        """The tasks that it trains on."""
        return self.args.get("task_ids") or [self.args["task_id"]]

    def evaluations(self, tag: str = EVALUATED[0]) -> list[dict[str, Any]]:
        """The ``evaluation.success`` of every evaluation logged as ``tag``, each with its ``step``."""
        trials = self.args["eval_episodes"] * len(self.task_ids)
        found = []
        for step, rate in self.scalars.get(tag, np.zeros((2, 0))).T:
            outcomes = np.arange(trials) < round(rate * trials)
            found.append({"step": step, **evaluation.success(outcomes)})
        return found

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """Of a run on several tasks, by task what ``state`` has of all: the results named in ``OUTCOMES``."""
        found: dict[str, dict[str, Any]] = {}
        for name in OUTCOMES:
            for task_id, result in self.state.get(name, {}).get("tasks", {}).items():
                found.setdefault(task_id, {})[name] = result
        return found

    @property
    def videos(self) -> list[Path]:
        """The first and the last deterministic video of a training run; all videos of an evaluation."""
        names = "*.mp4" if self.args.get("evaluate") else "iteration_*_success.mp4"
        found = [path for path in sorted((self.folder / "videos").glob(names)) if path.stat().st_size]
        return found if self.args.get("evaluate") else list(dict.fromkeys(found[:1] + found[-1:]))


def read_run(folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
        ValueError, OSError: When it holds no run, or a damaged one.
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
            raise ValueError(f"{str(folder)!r} is damaged: its {name} is not the result of an evaluation")
    events = EventAccumulator(str(folder)).Reload()  # of damaged ones what stands before the damage
    scalars = {
        tag: np.array([(event.step, event.value) for event in found]).T
        for tag in events.Tags()["scalars"]
        if (found := events.Scalars(tag))  # none where a resumed run has not logged it again
    }
    return Run(folder, args, state, files[0].is_file(), scalars)


# ---- Figures -----------------------------------------------------------------------------------------


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, fontsize=10, parse_math=False)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if y.endswith("(%)"):
        axis.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
        axis.set_ylim(-0.02, 1.02)
    return figure, axis


def _svg(figure: Any, handles: list[Any], name: str) -> str:
    """The figure with its legend as SVG, to stand in a page: ids are unique, and only those that are used."""
    import matplotlib

    rows = -(-len(handles) // 3)
    figure.set_figheight(figure.get_figheight() + 0.17 * rows)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda its: its[0] if its[1] in used else "", svg)
    return f"<figure>{svg}</figure>"


def line_figure(title: str, runs: list[Run]) -> str:
    """One of ``FIGURES``, with a line per run and tag, as HTML; empty where no run has logged it."""
    from matplotlib.lines import Line2D

    y, tags = FIGURES[title]
    tags = {tag: what for tag, what in tags.items() if any(tag in run.scalars for run in runs)}
    shown = [run for run in runs if tags.keys() & run.scalars.keys()]
    if not shown:
        return ""
    figure, axis = _figure(title, steps_of(shown), y)
    for run in shown:
        for tag, style in zip(tags, ("-", "--")):
            if tag in run.scalars:
                axis.plot(*run.scalars[tag], style, color=run.colour, marker=".", markersize=4, linewidth=1.3)
            if tag in EVALUATED and (found := run.evaluations(tag)):
                steps, low, high = ([its[name] for its in found] for name in ("step", "low", "high"))
                axis.fill_between(steps, low, high, color=run.colour, alpha=0.12, linewidth=0)
    keys = [Line2D([], [], color=run.colour, label=run.label) for run in shown]
    styles: Any = ("-", "--")
    keys += [Line2D([], [], color="grey", linestyle=style, label=what)
             for what, style in zip(tags.values(), styles) if len(tags) > 1]  # fmt: skip
    return _svg(figure, keys, title)


def stack_figure(title: str, y: str, parts: dict[str, NDArray[np.float64]], run: Run) -> str:
    """A run's ``parts`` by name, each steps and values (2, n), stacked; empty with fewer than two steps."""
    import matplotlib
    from matplotlib.patches import Patch

    steps = np.unique(np.concatenate([np.empty(0), *(series[0] for series in parts.values())]))
    if len(steps) < 2:  # an area needs two
        return ""
    figure, axis = _figure(title, steps_of([run]), y)
    heights = np.zeros((len(parts), len(steps)))  # 0 where a part was not logged
    for height, series in zip(heights, parts.values()):
        height[np.searchsorted(steps, series[0])] = series[1]
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 1, len(parts)))
    axis.stackplot(steps, heights, colors=colours)
    keys = [Patch(color=colour, label=name.replace("_", " ")) for name, colour in zip(parts, colours)]
    return _svg(figure, keys, f"{title} {run.label}")


def steps_of(runs: list[Run]) -> str:
    """What the x axis of figures about ``runs`` counts."""
    imitates = {run.script == "sft_vla" for run in runs}
    both = "environment steps (sft_vla: optimiser steps)"
    return both if len(imitates) == 2 else "optimiser steps" if True in imitates else "environment steps"


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


# ---- The page ----------------------------------------------------------------------------------------


def differing(runs: list[Run]) -> list[str]:
    """The arguments in which the runs differ that have them, other than names, tasks and seeds."""
    names = dict.fromkeys(name for run in runs for name in run.args)
    own = {"script", "command", "torch_threads", "run_dir", "resume", "seed", "suite", "task_id",
           "task_ids"}  # fmt: skip
    values = {name: {json.dumps(run.args[name]) for run in runs if name in run.args} for name in names}
    return [name for name in names if name not in own and len(values[name]) > 1]


def _success(state: dict[str, Any], way: str) -> str:
    """Successes before and after training, in ``way``, and below them their Wilson intervals."""
    results = [state[name] for when in ("before", "after") if (name := f"{way}_{when}") in state]
    counts = " &rarr; ".join(f"{its['successes']}/{its['trials']}" for its in results)
    intervals = " &rarr; ".join(f"{100 * its['low']:.0f} to {100 * its['high']:.0f} %" for its in results)
    return f"{counts}<small>{intervals}</small>" if results else ""


def mark(run: Run) -> str:
    """The run's dot in the colour of its lines, and its number."""
    return f'<i style="background: {run.colour}"></i> {run.number}'


def row(run: Run, names: list[str]) -> str:
    """The run's row of the table; ``names`` are the arguments that tell it from the others."""
    state, args, text = run.state, run.args, lambda value: html.escape(str(value))
    own = text(", ".join(f"{name} {args[name]}" for name in names if name in args))
    tasks = f"task{'s' * (len(run.task_ids) > 1)} {' '.join(map(str, run.task_ids))}"
    cells = {
        "script": text(run.script),
        "suite": f"{text(args['suite'])}<small>{text(tasks)}</small>",
        "seed": text(args["seed"]),
        "deterministic": _success(state, "success"),
        "sampled": _success(state, "sampled"),
        "steps": f"{state['env_steps']:,}" if "env_steps" in state else "",
        "minutes": f"{state['wall_s'] / 60:.1f}" if "wall_s" in state else "",
        "state": "finished" if run.finished else f"iteration {state.get('iteration', 0)}",
    }
    return (
        f'<tr><td class="run">{mark(run)} <a href="#run-{run.number}">{text(run.name)}</a>'
        f'<small title="{own}">{own}</small></td>'
        + "".join(f'<td data-name="{name}">{cell}</td>' for name, cell in cells.items())
        + "</tr>"
    )


def video(path: Path, out: Path, embed_mb: float) -> str:
    """The video within the page, or a link to it from the page ``out``."""
    name = html.escape(path.stem.replace("_success", "_deterministic").replace("_", " "))
    if path.stat().st_size > embed_mb * 1e6:
        return f'<p><a href="{quote(os.path.relpath(path, out.parent))}">{name}</a></p>'
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><video controls loop muted playsinline src="data:video/mp4;base64,{data}"></video>'
        f"<figcaption>{name}: successes above, failures below</figcaption></figure>"
    )


def section(run: Run, out: Path, embed_mb: float) -> str:
    """What the page says of one run alone: its command, each task's success, videos, figures, arguments."""
    rows = [
        f"<tr><td>task {html.escape(task_id)}</td>"
        + "".join(f"<td>{_success(tasks, way)}</td>" for way in ("success", "sampled"))
        + "</tr>"
        for task_id, tasks in run.tasks.items()
    ]
    head = "<tr><th></th><th>deterministic</th><th>sampled</th></tr>"
    shown = [video(path, out, embed_mb) for path in run.videos]
    shown.append(stack_figure("Stages", "decisions (%)", stages_of(run), run))
    shown.append(stack_figure("Time", "seconds per iteration", times_of(run), run))
    command = run.args.get("command")
    arguments = "\n".join(f"{name}: {value}" for name, value in run.args.items() if name != "command")
    return f"""<h2 id="run-{run.number}">{mark(run)} {html.escape(run.name)}</h2>
{f"<pre>{html.escape(str(command))}</pre>" if command else ""}
{f"<table>{head}{''.join(rows)}</table>" if rows else ""}
<div class="grid one">{"".join(shown)}</div>
<details><summary>All arguments</summary><pre>{html.escape(arguments)}</pre></details>"""


def page(runs: list[Run], out: Path, embed_mb: float = 2.0) -> str:
    """The page about ``runs``, to be written to ``out``."""
    import matplotlib

    colours = matplotlib.colormaps["tab10" if len(runs) <= 10 else "turbo"]
    for k, run in enumerate(runs):
        run.number = k + 1
        run.colour = matplotlib.colors.to_hex(colours(k if len(runs) <= 10 else k / (len(runs) - 1)))
    heads = ("run", "script", "suite", "seed", "deterministic", "sampled", "steps", "minutes", "state")
    names = differing(runs)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Runs</title><style>{STYLE}</style></head>
<body>
<h1>Runs</h1>
<p>Successes on the recorded init states before &rarr; after training (of a run that is still going: its
latest evaluation), with Wilson 95 % intervals. The deterministic action is the headline; sampled episodes are
played at the training temperature.</p>
<table>
<tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>
{chr(10).join(row(run, names) for run in runs)}
</table>
<div class="grid">
{chr(10).join(filter(None, (line_figure(title, runs) for title in FIGURES)))}
</div>
{chr(10).join(section(run, out, embed_mb) for run in runs)}
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
        raise ValueError("no run was given; expected folders of runs, runs/*")
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
