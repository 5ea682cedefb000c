"""A run: its folder, counters, evaluations, TensorBoard, saving and resuming. The algorithm calls it."""

import contextlib
import dataclasses
import json
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vla_envs import distributed
from vla_envs.command_line import INTERRUPTED
from vla_envs.command_line import one_line_errors as one_line_errors
from vla_envs.files import read_json, write_json
from vla_envs.inputs import in_short
from vla_envs.policies import SHIPPED, count_parameters
from vla_envs.policies.protocol import blank_observations
from vla_envs.training import batches, checkpoints, evaluation
from vla_envs.training.arguments import HOW_FAST, HOW_LONG, WHERE

COUNTERS = ("iteration", "env_steps", "episodes", "wall_s", "evaluated")


# ---- Environments --------------------------------------------------------------------------------------


def make_envs(args: Any, policy: Any) -> Any:
    """The environments that this process trains in; of a run that only evaluates one, to try the reward."""
    tasks = [args.task_id] if args.evaluate else batches.tasks_of_environments(args)
    settings = evaluation.settings(None, args.suite, policy) | {"perturb": args.perturb}
    return _make_envs(args, tasks, getattr(args, "reward", "binary"), **settings)


@distributed.first_only
def make_eval_envs(args: Any, policy: Any) -> Any:
    """The environments of evaluations, one per recorded init state of each task; in the first process."""
    tasks = np.repeat(args.task_ids, args.eval_episodes).tolist()
    settings = evaluation.settings(args.protocol, args.suite, policy) | {"perturb": args.eval_perturb}
    return _make_envs(args, tasks, "binary", num_threads=args.num_threads, **settings)  # the others wait


def _make_envs(args: Any, tasks: list[int], reward: str, **settings: Any) -> Any:
    threads = distributed.num_threads(args.num_threads)  # this process's share
    settings = {"max_episode_steps": args.max_episode_steps, "num_threads": threads} | settings
    envs: Any = gym.make_vec(
        "vla_envs/Libero-v0", num_envs=len(tasks), suite=args.suite, task_id=tasks, reward=reward,
        assets=args.assets, quality=args.quality, cache=args.cache, action_chunk=args.action_chunk,
        init_state_file=args.init_state_file, **settings,
    )  # fmt: skip
    envs.reset(seed=[0] * len(tasks))  # a scene or a reward that fails does so now
    return envs


# ---- An update's figures -------------------------------------------------------------------------------


class Meter:
    """Means of what an update measures, over its minibatches and over all processes.

    What is not finite is refused before the optimiser takes the step.
    """

    def __init__(self) -> None:
        self._minibatch: dict[str, Any] = {}
        self._all: dict[str, list[float]] = {}

    def add(self, share: Tensor | float, **values: Tensor) -> None:
        """Add what a part of a minibatch measured, weighted by the ``share`` that it has of it."""
        for name, value in values.items():
            self._minibatch[name] = self._minibatch.get(name, 0.0) + share * value.detach()

    def end_minibatch(self, grad_norm: Tensor, *others: Tensor) -> dict[str, float]:
        """The minibatch's figures, over all processes.

        Args:
            grad_norm: The norm of its gradient.
            others: Norms of other gradients, which only have to be finite.

        Raises:
            FloatingPointError: When the loss or a gradient is not finite.
        """
        measured = distributed.sums(self._minibatch)
        self._minibatch = {}
        check_finite("loss", measured.pop("loss"))
        check_finite("gradient", torch.stack([grad_norm, *others]).max())
        figures = {name: float(value) for name, value in (measured | {"grad_norm": grad_norm}).items()}
        for name, value in figures.items():
            self._all.setdefault(name, []).append(value)
        return figures

    def end_update(self, policy: Any, instructions: list[str]) -> None:
        """Make a sharded policy whole again in all processes, and refuse one that can no longer decide.

        Args:
            policy: What has been updated.
            instructions: Of the batch; the policy decides for the first, about a blank observation.

        Raises:
            FloatingPointError: When the last step has gone too far for the next rollout.
        """
        distributed.gather_parameters(policy)
        training = policy.training
        policy.eval()  # as it plays, so that no statistics of a layer change
        for instruction in instructions[:1]:  # none where this process has no samples
            _, _, logprobs = policy.sample(blank_observations(policy, 1), [instruction], 0.0)
            check_finite("log-probability of a decision after the update", logprobs.sum())
        policy.train(training)

    def means(self) -> dict[str, float]:
        """The mean of every figure over the minibatches, and the first minibatch's ratio if there is one."""
        means = {name: float(np.mean(values)) for name, values in self._all.items()}
        if "ratio" in means:
            means["ratio_first_minibatch"] = self._all["ratio"][0]
        return means


def check_finite(name: str, value: Tensor | float) -> None:
    """Refuse a value that is not finite.

    Raises:
        FloatingPointError: Names it.
    """
    value = float(value.detach() if isinstance(value, Tensor) else value)
    if not np.isfinite(value):
        raise FloatingPointError(f"the {name} is {value}; expected a finite number")


# ---- The run -------------------------------------------------------------------------------------------


class Run:
    """What a script needs around its algorithm. The algorithm calls it, and it never calls the algorithm.

    A new run makes its folder, ``runs/<suite>_<task id>__<script>__<seed>__<time>``; ``--resume`` restores
    the state of an earlier one.

    Args:
        args: The script's arguments, completed.
        script: Its file.
        policy: What plays.
        optimizer: Of all that is trained.
        envs: The environments of training; None in a script that plays only to evaluate.
        eval_envs: Those of evaluations.
        learner: The module that holds all that is trained [``policy``].

    Attributes:
        folder: The run's folder.
        state: Its counters, which are saved with it: ``iteration``, ``env_steps`` (control steps of
            training), ``episodes``, ``wall_s``; results of evaluations, ``before`` and ``after``.
        left: The share of the run that was still ahead when the iteration began, from 1 down to 0.
        totals: What the iteration's episodes add up to; see ``batches.totals``.

    Raises:
        ValueError, OSError: When the folder will not do.
    """

    def __init__(
        self, args: Any, script: str, policy: Any, optimizer: torch.optim.Optimizer, envs: Any,
        eval_envs: Any, learner: torch.nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.args, self.policy, self.optimizer, self.envs, self.eval_envs = (
            args, policy, optimizer, envs, eval_envs
        )  # fmt: skip
        self.learner: torch.nn.Module = policy if learner is None else learner
        self.script = Path(script).stem
        self.state: dict[str, Any] = dict.fromkeys(COUNTERS, 0) | {"wall_s": 0.0, "before": None}
        self.left, self.totals, self._leaving = 1.0, dict[str, Any](), False
        if not args.evaluate:
            self._leave_on_interrupt()
        # Sums are rounded by how many threads share them: other numbers of threads give other runs.
        command = shlex.join(["python", *sys.argv])
        made_by = {"script": self.script, "command": command, "torch_threads": torch.get_num_threads()}
        contents = json.loads(json.dumps(made_by | dataclasses.asdict(args) | {"resume": None}, default=str))
        trained, parameters = count_parameters(self.learner)
        self.folder: Path = args.resume or distributed.from_first(_make_folder, args, self.script)
        before = self._restore() if args.resume else None
        if before:
            contents["command"] = before.get("command")
        distributed.same_parameters(self.learner)
        distributed.gather_parameters(self.learner)
        distributed.first_only(write_json)(self.folder / "args.json", contents)
        if not args.evaluate:
            if before is None:
                self.save()
            gib = 3 * 4 * trained / 2**30  # a gradient and two averages in float32
            memory = f"; their gradients and AdamW's averages take {gib:.1f} GiB" if gib > 0.1 else ""
            print(f"{self.folder}: training {trained:,} of {parameters:,} parameters{memory}")
        for name in (*HOW_FAST, *HOW_LONG, *WHERE):
            if before and name in before and before[name] != contents[name]:
                course = "; the learning rate goes on as in a run of that length" * (name in HOW_LONG)
                print(f"{name} {contents[name]} instead of {before[name]}{course}")
        if before is None and (words := checkpoints.remark(args, policy)):
            print(words)
        self._writer: SummaryWriter | None = None
        if not (args.evaluate or distributed.rank()):
            # What was logged after the state that a run goes on from is void.
            self._writer = SummaryWriter(
                str(self.folder), purge_step=self.global_step + 1 if args.resume else None
            )
            if not args.resume:
                self._writer.add_text("arguments", _table(contents))
        self._started = time.perf_counter() - self.state["wall_s"]

    # ---- Iterations ----

    @property
    def global_step(self) -> int:
        """What TensorBoard's horizontal axis counts: control steps of training, or optimiser steps of SFT."""
        steps = getattr(self.args, "iteration_steps", None)
        return self.state["env_steps"] if steps is None else self.state["iteration"] * steps

    def done(self) -> float:
        """How much of the run is done, 1 at its end: of iterations or control steps, whichever is more."""
        args, state = self.args, self.state
        if state.get("ended"):
            return 1.0
        iterations = state["iteration"] / args.num_iterations if args.num_iterations else 0.0
        most = getattr(args, "total_env_steps", None)
        return min(1.0, max(iterations, state["env_steps"] / most if most else 0.0))

    def iterations(self) -> Iterator[int]:
        """The numbers of the iterations that are still to do, from 1.

        Online RL evaluates before the first. After each the run evaluates if ``--eval-every`` says so, and
        saves its state, so that it can be resumed bit for bit.
        """
        state = self.state
        if self.envs is not None:
            if state["before"] is None:
                with self.iteration_errors():
                    state["before"] = self.evaluate()
                    self.save()
            self._environments_figures()  # making them was no iteration's
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        with tqdm(
            total=100.0, initial=100.0 * self.done(), desc=self.script.partition("_")[0].upper(),
            bar_format=form, disable=distributed.rank() > 0,
        ) as self._progress:  # fmt: skip
            while (done := self.done()) < 1.0:
                self.left = 1.0 - done
                state["iteration"] += 1
                _seed_all(self.args.seed, state["iteration"])  # so that a resumed run draws the same numbers
                self._iteration_started = time.perf_counter()
                yield state["iteration"]
                with self.iteration_errors():
                    if self.args.eval_every and state["iteration"] % self.args.eval_every == 0:
                        self.evaluate()
                    state["wall_s"] = time.perf_counter() - self._started
                    self.save()
                self._progress.update(100.0 * self.done() - self._progress.n)

    def count(self, *rollouts: dict[str, Any]) -> None:
        """Count the episodes and control steps of the iteration's rollouts, over all processes."""
        with self.iteration_errors():
            self.totals = batches.totals(rollouts)
        self._rollout_s = time.perf_counter() - self._iteration_started
        self.state["env_steps"] += self.totals["control_steps"]
        self.state["episodes"] += self.totals["episodes"]

    @contextlib.contextmanager
    def iteration_errors(self) -> Iterator[None]:
        """What goes wrong ends the program with one line that says where the last state is."""
        latest = self.folder / "checkpoints" / "latest"
        with one_line_errors(f"iteration {self.state['iteration']}, last good state in {latest}: "):
            yield

    def log(self, losses: dict[str, float], scalars: dict[str, Tensor | float]) -> None:
        """Write an iteration to TensorBoard, and the most telling figures beside the progress bar.

        Args:
            losses: Under ``losses/``.
            scalars: By their tags; the mean of a tensor's elements, over all processes, is written.
        """
        figures = {f"losses/{name}": value for name, value in losses.items()}
        if "logprob_gap" in losses:
            figures["losses/logprob_gap"] = distributed.greatest(losses["logprob_gap"])
        figures |= {
            tag: distributed.mean(value) if isinstance(value, Tensor) else value
            for tag, value in scalars.items()
        }
        figures["charts/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        busy = time.perf_counter() - self._iteration_started
        if self.envs is None:
            figures["time/update_s"] = busy
            told = {name: f"{value:.3f}" for name, value in losses.items() if "nll" in name}
        else:
            figures |= self._episodes_figures(busy) | self._environments_figures()
            told = {"success": f"{figures['group/success_mean']:.2f}"}
            told |= {"kl": f"{losses['approx_kl']:.4f}"} if "approx_kl" in losses else {}
        if self._writer:
            for tag, value in figures.items():
                self._writer.add_scalar(tag, float(value), self.global_step)
        self._progress.set_postfix({"iteration": self.state["iteration"], **told}, refresh=False)

    def _episodes_figures(self, busy: float) -> dict[str, float]:
        totals, episodes = self.totals, self.totals["episodes"]
        return {
            "charts/episodic_return": totals["return"] / episodes,
            "charts/episodic_length": totals["control_steps"] / episodes,
            "charts/SPS": self.state["env_steps"] / (time.perf_counter() - self._started),
            "group/success_mean": totals["successes"] / episodes,
            "group/diverged": totals["diverged"],
            "time/policy_s": totals["policy_s"],
            "time/rollout_s": self._rollout_s,
            "time/update_s": busy - self._rollout_s,
        }

    def _environments_figures(self) -> dict[str, float]:
        """The share of decisions that ended in each stage, and the seconds of physics and of rendering.

        Since the last call, which set the environments' counters back to 0.
        """
        stages, seconds = self.envs.unwrapped.stages, self.envs.unwrapped.seconds
        counts = distributed.sums(dict(stages))
        total = max(1, sum(counts.values()))
        figures = {f"stages/{re.sub(r'[^a-z0-9]+', '_', name)}": n / total for name, n in counts.items()}
        figures |= {f"time/{kind}_s": value for kind, value in seconds.items()}
        stages.subtract(dict(stages))
        seconds.update(dict.fromkeys(seconds, 0.0))
        return figures

    # ---- Evaluating ----

    def evaluate(self) -> dict[str, Any]:
        """Evaluate on the recorded init states, deterministically and sampled, and log it.

        Returns:
            ``"success"``: of the policy's deterministic actions; ``"sampled"``: at ``args.eval_temperature``,
            unless that is 0. Each as ``evaluation.success`` gives it.
        """
        iteration = self.state["evaluated"] = self.state["iteration"]
        results = self.state["after"] = {}
        for name, temperature in evaluation.ways(self.args).items():
            video = self.folder / "videos" / f"iteration_{iteration:04d}_{name}.mp4"
            outcomes = distributed.from_first(
                evaluation.play, self.eval_envs, self.policy, temperature, self.args, video
            )
            result = results[name] = evaluation.success(outcomes, self.args.task_ids)
            if self._writer:
                _, tag = evaluation.WAYS[name]
                self._writer.add_scalar(tag, result["rate"], self.global_step)
                for task_id, its in result.get("tasks", {}).items():
                    self._writer.add_scalar(f"{tag}_task_{task_id}", its["rate"], self.global_step)
        words = "; ".join(
            f"{evaluation.WAYS[name][0]} {evaluation.percent(result)}" for name, result in results.items()
        )
        tqdm.write(f"iteration {iteration}: success {words}")
        return results

    @distributed.first_only
    def evaluate_only(self) -> None:
        """What ``--evaluate`` asks for: evaluate, ``--compare`` on the same init states too, and write
        ``result.json``. What goes wrong, and Ctrl-C, end the program with one line."""
        args = self.args
        with one_line_errors():
            shipped = f"the shipped {args.policy}" if args.policy in SHIPPED else args.policy
            print(f"{self.folder}: evaluating {args.checkpoint or shipped}")
            other = None
            if args.compare:
                other = checkpoints.load(args, args.compare)
            result = evaluation.about(args)
            for name, temperature in evaluation.ways(args).items():
                videos = [self.folder / "videos" / f"{name}{end}.mp4" for end in ("", "_compared")]
                outcomes = evaluation.play(self.eval_envs, self.policy, temperature, args, videos[0])  # (E,)
                others = other and evaluation.play(self.eval_envs, other, temperature, args, videos[1])
                result |= evaluation.report(name, outcomes, others, args.compare, args.task_ids)
            write_json(self.folder / "result.json", result)

    # ---- Saving ----

    def save(self, name: str = "latest") -> None:
        """Write all that a resumed run needs as ``checkpoints/<name>``; Ctrl-C ends the program here."""
        checkpoints.save_training_state(
            self.folder / "checkpoints" / name, self.learner, self.optimizer, self.state
        )
        if self._leaving and name == "latest":
            words = f"stopped and saved; go on with --resume {self.folder}"
            distributed.first_only(tqdm.write)(words, file=sys.stderr)
            raise SystemExit(INTERRUPTED)

    def _restore(self) -> dict[str, Any]:
        """Restore the saved state; the arguments with which the run was started."""
        before = read_json(self.folder / "args.json")
        its_script = before.get("script", self.script)
        if its_script != self.script:
            raise ValueError(
                f"{str(self.folder)!r} is a run of {its_script}.py; expected one of {self.script}.py"
            )
        latest = self.folder / "checkpoints" / "latest"
        loaded = checkpoints.load_training_state(latest, self.learner, self.optimizer)
        for name in COUNTERS:
            value: Any = loaded.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < np.inf:
                raise ValueError(f"{str(latest / 'counters.json')!r} is damaged: {name} is {value!r}")
        for name in ("before", "after"):
            outcome = loaded.get(name)
            if outcome is not None and not evaluation.are_results(outcome):
                raise ValueError(
                    f"{str(latest / 'counters.json')!r} is damaged: {name} is {in_short(outcome)}"
                )
        self.state |= loaded
        return before

    def load(self, name: str) -> None:
        """Go back to what ``save(name)`` wrote of the weights; the counters stay, the evaluation is void."""
        folder = self.folder / "checkpoints" / name
        checkpoints.load_training_state(folder, self.learner, self.optimizer)
        self.state["evaluated"] = -1

    def finish(self) -> None:
        """Evaluate, unless that has just been done; write the trained policy and ``result.json``."""
        state = self.state
        with self.iteration_errors():
            if state["evaluated"] != state["iteration"]:
                self.evaluate()
                state["wall_s"] = time.perf_counter() - self._started
                self.save()
            self._write_result()
        distributed.stop()
        for each in (self.envs, self.eval_envs, self._writer):
            if each is not None:
                each.close()

    @distributed.first_only
    def _write_result(self) -> None:
        checkpoints.save_policies(self.folder, self.policy, self.args)
        state, before, after = self.state, self.state["before"], self.state["after"]
        result = evaluation.about(self.args)
        if before is None:
            result |= after | {"best": state["best"]}
            words = [f"{name} {evaluation.percent(its)}" for name, its in after.items()]
        else:
            for name in after:
                result |= {f"{name}_before": before[name], f"{name}_after": after[name]}
            result |= {name: state[name] for name in ("env_steps", "episodes")}
            words = [
                f"{name} {before[name]['successes']} -> {evaluation.percent(its)}"
                for name, its in after.items()
            ]
        write_json(self.folder / "result.json", result | {"wall_s": state["wall_s"]})
        print(f"{'; '.join(words)}, in {state['wall_s'] / 60:.1f} min; {self.folder}")

    def _leave_on_interrupt(self) -> None:
        """Let Ctrl-C end the run at the next saved state, and a second one now."""

        def interrupt(*_: Any) -> None:
            if self._leaving:
                raise SystemExit(INTERRUPTED)
            self._leaving = True
            words = "Ctrl-C: the run ends when this iteration is saved; again: now"
            distributed.first_only(tqdm.write)(words, file=sys.stderr)

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)


def _table(contents: dict[str, Any]) -> str:
    """Arguments as a table in Markdown."""
    return "\n".join(
        ["| argument | value |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in contents.items())]
    )


def _seed_all(*numbers: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def _make_folder(args: Any, script: str) -> Path:
    """The folder of a new run, ``runs/<suite>_<task id>__<script>__<seed>__<time>`` unless the user says.

    Raises:
        ValueError: When it holds a run already.
        OSError: When nothing can be written there.
    """
    tasks = "-".join(map(str, args.task_ids))
    name = f"{Path(args.suite).stem}_{tasks}__{script}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path("runs") / name if args.run_dir is None else args.run_dir
    if (folder / "args.json").exists():
        raise ValueError(
            f"run folder {str(folder)!r} holds a run already; expected a new folder, or --resume {folder}"
        )
    try:
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"run folder {str(folder)!r} cannot be written: {error.strerror}; expected --run-dir elsewhere"
        ) from None
    return folder
