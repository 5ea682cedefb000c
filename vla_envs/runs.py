"""What every script does around its algorithm: its arguments, a run's folder, saving and resuming."""

import dataclasses
import json
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vla_envs import distributed, evaluation
from vla_envs.command_line import INTERRUPTED
from vla_envs.command_line import check_numbers as check_numbers
from vla_envs.command_line import one_line_errors as one_line_errors
from vla_envs.command_line import parse_args as parse_args
from vla_envs.evaluation import PROTOCOLS
from vla_envs.files import read_json, replace_folder, write_json
from vla_envs.inputs import in_short
from vla_envs.policies import (
    SHIPPED,
    adapters,
    count_parameters,
    is_training_state,
    load_policy,
    note_tasks,
    save_policy,
)
from vla_envs.policies.tensors import read_tensors
from vla_envs.tasks import get_task

ArgsT = TypeVar("ArgsT")
_leaving = False  # Ctrl-C has been pressed
DEFAULT_ENV_STEPS = 120_000  # control steps of training on one task: about 13 iterations of 64 episodes
ENV_STEPS_PER_TASK = 60_000  # where one policy learns several
#: What a run may go on with anew: how fast it goes; how long, and where things lie that it began with. All
#: else makes it another run.
HOW_FAST = ("device", "num_threads", "micro_batch_size", "cudagraphs", "cache")
HOW_LONG = ("num_iterations", "total_env_steps")
WHERE = ("checkpoint", "demos", "assets", "shared_adapter", "reward")


def check_finite(**values: Tensor | float) -> None:
    """Refuse values that are not finite.

    Raises:
        FloatingPointError: Names the first.
    """
    for name, value in values.items():
        value = float(value.detach() if isinstance(value, Tensor) else value)
        if not np.isfinite(value):
            raise FloatingPointError(f"the {name} is {value}; expected a finite number")


def check_training(args: Any) -> None:
    """Refuse common arguments of an online RL script that do not fit.

    Raises:
        ValueError: Names the first, and what was expected.
    """
    if args.num_groups < len(args.task_ids):
        raise ValueError(
            f"num_groups is {args.num_groups}; expected at least one for each of {args.task_ids}"
        )
    if args.num_groups % distributed.world_size():
        raise ValueError(
            f"num_groups is {args.num_groups}; expected a multiple of the {distributed.world_size()}"
            " processes, each of which plays whole groups"
        )
    if args.kl_coef and args.train != "lora":
        raise ValueError(
            f"kl_coef compares with the adapter switched off; expected --train lora, got {args.train}"
        )
    check_numbers(args, "seed kl_coef eval_every clip_low clip_high", above=False)
    if args.clip_low > 1:
        raise ValueError(f"clip_low is {args.clip_low}; expected at most 1, as a ratio is never below 0")
    if args.seed >= 2**63:
        raise ValueError(f"seed is {in_short(args.seed)}; expected a number below 2 to the power of 63")
    check_numbers(
        args, "num_groups num_iterations total_env_steps update_epochs minibatch_size micro_batch_size"
        " lora_rank last_k warmup_iterations temperature learning_rate target_kl max_grad_norm", above=True
    )  # fmt: skip
    if args.micro_batch_size and args.micro_batch_size > args.minibatch_size:
        raise ValueError(
            f"micro_batch_size is {args.micro_batch_size}; expected at most {args.minibatch_size}, the"
            " minibatch_size that it is a part of"
        )


def check_together(args: Any) -> None:
    """Refuse arguments that leave one another without effect, rather than let one of them win.

    Raises:
        ValueError: Names one, and what it expects of the others.
    """
    if args.task_ids and args.task_id not in (None, args.task_ids[0]):
        raise ValueError(
            f"task_id is {args.task_id} beside task_ids {args.task_ids}; expected one of the two"
        )
    if args.resume:  # its own arguments stay as they are, also those of an older run
        return
    if args.protocol:
        protocol = PROTOCOLS[args.protocol]
        its_own = {"eval_temperature": protocol.temperature}
        if args.evaluate:  # else the limit is that of training's episodes
            its_own["max_episode_steps"] = protocol.max_episode_steps[args.suite]
        for name, value in its_own.items():
            if value is not None and getattr(args, name) not in (None, value):
                raise ValueError(
                    f"{name} is {getattr(args, name)}; expected {value}, that of protocol {args.protocol}"
                )
    if args.quality == "fast" and args.assets == "builtin":
        raise ValueError("quality is of LIBERO's own assets; expected --assets libero or a folder")
    needs = {"lora_rank": "lora", "adapter": "lora", "last_k": "last-k"}
    for name, part in {} if args.evaluate else needs.items():
        if getattr(args, name) is not None and part not in args.train:
            expected = "lora+last-k" if part == "last-k" else "lora"
            raise ValueError(
                f"{name} is {getattr(args, name)!r}; expected it with --train {expected}, got {args.train}"
            )


def fill_in_length(args: ArgsT) -> ArgsT:
    """``args`` with groups for every task, and control steps unless the number of iterations is given."""
    given: Any = args
    tasks = len(given.task_ids)
    groups = max(8, 2 * tasks) if given.num_groups is None else given.num_groups
    steps = given.total_env_steps
    if given.num_iterations is None and steps is None:
        steps = max(DEFAULT_ENV_STEPS, ENV_STEPS_PER_TASK * tasks)
    return dataclasses.replace(given, num_groups=groups, total_env_steps=steps)


def fill_in_evaluation(args: ArgsT) -> ArgsT:
    """``args`` with the device, what is trained, the tasks, and the episodes of training and evaluations.

    Raises:
        ValueError: When they do not fit.
    """
    given: Any = args
    task_ids = given.task_ids or (4 if given.task_id is None else given.task_id,)
    if len({get_task(given.suite, task_id) for task_id in task_ids}) < len(task_ids):
        raise ValueError(f"task_ids are {task_ids}; expected each task once")
    check_together(given)
    check_numbers(args, "eval_temperature", above=False)
    protocol = PROTOCOLS[given.protocol] if given.protocol else None
    temperature = protocol.temperature if protocol else None
    defaults: dict[str, Any] = {
        "eval_episodes": protocol.episodes if protocol else 50,
        "eval_temperature": given.temperature if temperature is None else temperature,
        "max_episode_steps": protocol.max_episode_steps[given.suite] if protocol and given.evaluate else 200,
        "lora_rank": 32 if "lora" in given.train else None,
        "last_k": 1 if "last-k" in given.train else None,
        "adapter": "adapter" if "lora" in given.train else None,
    }
    open_ = {name: value for name, value in defaults.items() if getattr(given, name) is None}
    given = dataclasses.replace(given, **open_)
    if not 1 <= given.eval_episodes <= 50:
        raise ValueError(
            f"eval_episodes is {given.eval_episodes}; expected 1 to 50, the recorded init states"
        )
    if given.compare and not given.evaluate:
        raise ValueError("compare names a second checkpoint; expected it with --evaluate")
    if given.compare:
        # Fails now rather than after the first evaluation.
        load_policy(given.policy, given.compare, "meta", suite=given.suite)
    device = given.device or ("cuda" if given.policy not in SHIPPED and torch.cuda.is_available() else "cpu")
    train = "head" if given.evaluate and given.train == "all" else given.train  # what is trained is float32
    if not (given.evaluate or given.merge or train == "lora"):
        raise ValueError(f"--no-merge saves nothing but the adapter; expected --train lora, got {train}")
    adapter = "adapter" if given.adapter is None else given.adapter
    taken = adapter.startswith(("final", "latest", "best", "."))
    if taken or not adapter or Path(adapter).name != adapter:
        raise ValueError(
            f"adapter is {adapter!r}; expected the name of a folder, other than final, latest and best"
        )
    if given.cudagraphs and (given.policy != "openvla" or not device.startswith("cuda")):
        raise ValueError(f"cudagraphs is for --policy openvla on a GPU; got {given.policy} on {device}")
    if given.cudagraphs and (train == "all" or given.shared_adapter):
        raise ValueError("cudagraphs does not go with --train all or --shared-adapter; expected --train lora")
    return dataclasses.replace(
        given, task_id=task_ids[0], task_ids=task_ids, train=train, device=distributed.device(device)
    )


def starting_policy(args: Any) -> Any:
    """The policy that ``args`` start from, or evaluate.

    Raises:
        ValueError: When there is none, or it cannot be trained.
    """
    if not args.evaluate and is_training_state(args.checkpoint):
        raise ValueError(
            f"checkpoint {str(args.checkpoint)!r} is the state of a run, which changes while that goes on;"
            f" expected it with --evaluate, or --resume {args.checkpoint.parent.parent}"
        )
    return load_policy(args.policy, args.checkpoint, args.device, args.cudagraphs, args.suite)


def remark(args: Any, policy: Any) -> str:
    """A line that says when ``policy`` plays other tasks than its checkpoint was made for, else ``""``."""
    known = getattr(policy, "made_for", None) or {}
    others = [task_id for task_id in args.task_ids if task_id not in known.get(args.suite, [])]
    if not known or not others:
        return ""
    made_for = ", ".join(f"{suite} {' '.join(map(str, task_ids))}" for suite, task_ids in known.items())
    return (
        f"policy {args.policy!r}: its checkpoint was made for the tasks {made_for}, and not for"
        f" {args.suite} {' '.join(map(str, others))}"
    )


def fill_in_chunk(args: ArgsT, policy: Any) -> ArgsT:
    """``args`` with the control steps that a decision of ``policy`` covers.

    Raises:
        ValueError: When others are asked for.
    """
    given: Any = args
    if given.action_chunk not in (None, policy.action_chunk):
        raise ValueError(
            f"action_chunk is {given.action_chunk}; expected {policy.action_chunk}, the policy's"
        )
    return dataclasses.replace(given, action_chunk=policy.action_chunk)


def adapters_below(args: Any) -> dict[str, Path]:
    """The folder of the adapter of each task's instruction, where ``--shared-adapter`` names them.

    Raises:
        ValueError: When they do not fit.
    """
    if not args.shared_adapter:
        return {}
    if len(args.shared_adapter) != len(args.task_ids) or not args.train.startswith("lora"):
        raise ValueError(
            f"shared_adapter names {len(args.shared_adapter)} adapters; expected one for each of the tasks"
            f" {args.task_ids}, and --train lora"
        )
    texts = [get_task(args.suite, task_id).instruction for task_id in args.task_ids]
    if len(set(texts)) < len(texts):
        raise ValueError(f"two of the tasks {args.task_ids} have the same instruction: adapters go by it")
    return dict(zip(texts, args.shared_adapter))


def shared_out(args: Any) -> list[int]:
    """The task of every environment of this process: groups are dealt to the tasks in turn."""
    tasks = np.resize(args.task_ids, args.num_groups)[distributed.block(args.num_groups)]
    return tasks.repeat(args.group_size).tolist()


def deal(args: Any, iteration: int, number: int, groups: int) -> tuple[np.ndarray, list[torch.Generator]]:
    """The scenes (N,) of this process's share of ``groups`` groups, and what each environment draws from.

    Both depend on the seed, the iteration, the ``number`` of its rollout (from 1) and on which environment of
    all processes it is, so not on how many processes there are. Of several tasks every environment has its
    own, and groups that are missing are those of the first environments; else all processes share them.
    """
    seeds = [args.seed, iteration, number]
    several = len(args.task_ids) > 1
    own = distributed.block(groups, args.num_groups if several else groups)
    scenes = np.random.SeedSequence(seeds).generate_state(groups)[own].repeat(args.group_size)  # (N,)
    generators = []
    for environment in range(own.start * args.group_size, own.stop * args.group_size):
        seed = np.random.SeedSequence(seeds, spawn_key=(environment,)).generate_state(1)[0]
        generators.append(torch.Generator().manual_seed(int(seed)))
    return scenes, generators


def minibatches(batch: dict[str, Any], args: Any) -> list[Tensor]:
    """The samples of all processes in random order, ``minibatch_size`` at once, in every epoch anew.

    Every process has the same minibatches; it gets the numbers of those of its own samples that are in each.
    """
    when, who = torch.nonzero(batch["alive"], as_tuple=True)  # (S,), (S,)
    rounds = batch.get("round", torch.zeros(batch["alive"].shape[1], dtype=torch.int64))  # (N,)
    positions = distributed.positions(when, who, rounds[who])  # (samples of all,)
    orders = [positions[torch.randperm(len(positions))] for _ in range(args.update_epochs)]
    return [part[part >= 0] for order in orders for part in order.split(args.minibatch_size)]


def make_run_folder(run_dir: Path | None, suite: str, task_id: Any, script: str, seed: int) -> Path:
    """The folder of a new run, ``runs/<suite>_<task id>__<script>__<seed>__<time>`` unless ``run_dir`` says.

    ``task_id`` is an int, or several joined, "0-4-9".

    Raises:
        ValueError: When it holds a run already.
        OSError: When nothing can be written there.
    """
    name = f"{suite}_{task_id}__{script}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path("runs") / name if run_dir is None else run_dir
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


def start(
    args: Any, script: str, learner: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Path, dict[str, Any]]:
    """The folder and the counters of a new run, or those of ``args.resume``, whose state is restored.

    Says where the run is, how many parameters are trained, unless it only evaluates, and with which other
    arguments it goes on. ``script`` is the file of the script, or its name.

    Raises:
        ValueError, OSError: When the folder will not do.
    """
    script = Path(script).stem
    state = {"iteration": 0, "env_steps": 0, "episodes": 0, "wall_s": 0.0, "before": None, "evaluated": 0}
    if not args.evaluate:
        leave_on_interrupt()
    trainable, total = count_parameters(learner)
    training = f"training {trainable:,} of {total:,} parameters"
    # Sums are rounded by how many threads share them: other numbers of threads give other runs.
    made_by = {"script": script, "torch_threads": torch.get_num_threads()}
    contents = made_by | dataclasses.asdict(args) | {"resume": None}
    contents = json.loads(json.dumps(contents, default=str))
    if args.resume:
        before = read_json(args.resume / "args.json")
        its_script = before.get("script", script)
        if its_script != script:
            raise ValueError(f"{str(args.resume)!r} is a run of {its_script}.py; expected one of {script}.py")
        latest = args.resume / "checkpoints" / "latest"
        loaded = load_training_state(latest, learner, optimizer)
        for name in ("iteration", "env_steps", "episodes", "wall_s", "evaluated"):
            value: Any = loaded.get(name)
            if not _fits(value, float) or not 0 <= value < float("inf"):
                raise ValueError(f"{str(latest / 'counters.json')!r} is damaged: {name} is {value!r}")
        for name in ("before", "after"):
            outcome = loaded.get(name)
            if outcome is not None and not evaluation.are_results(outcome):
                raise ValueError(
                    f"{str(latest / 'counters.json')!r} is damaged: {name} is {in_short(outcome)}"
                )
        loaded = state | loaded
        distributed.same_parameters(learner)
        distributed.gather_parameters(learner)
        distributed.only_first(write_json)(args.resume / "args.json", contents)
        print(f"{args.resume}: {training}")
        for name in (*HOW_FAST, *HOW_LONG, *WHERE):
            if name in before and before[name] != contents[name]:
                course = "; the learning rate goes on as in a run of that length" * (name in HOW_LONG)
                print(f"{name} {contents[name]} instead of {before[name]}{course}")
        return args.resume, loaded
    task_ids = "-".join(map(str, args.task_ids))
    run = distributed.by_first(make_run_folder, args.run_dir, args.suite, task_ids, script, args.seed)
    distributed.same_parameters(learner)
    distributed.gather_parameters(learner)
    distributed.only_first(write_json)(run / "args.json", contents)
    if words := remark(args, getattr(learner, "policy", learner)):  # PPO's is beside a critic
        distributed.only_first(print)(words)
    if not args.evaluate:
        save_training_state(run / "checkpoints" / "latest", learner, optimizer, state)
        print(f"{run}: {training}")
    return run, state


def leave_on_interrupt() -> None:
    """Let Ctrl-C end the run at the next saved state, and a second one now."""
    global _leaving
    _leaving = False

    def interrupt(*_: Any) -> None:
        global _leaving
        if _leaving:
            raise SystemExit(INTERRUPTED)
        _leaving = True
        tqdm.write("Ctrl-C: the run ends when this iteration is saved; again: now", file=sys.stderr)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupt)


@distributed.only_first
def make_writer(run: Path, purge_step: int | None) -> SummaryWriter:
    """TensorBoard's writer in the folder of a run, where what was logged from ``purge_step`` on is void."""
    return SummaryWriter(str(run), purge_step=purge_step)


def seed_all(*numbers: int) -> None:
    """Seed torch's random numbers from several."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def done(state: dict[str, Any], args: Any) -> float:
    """How much of a run is done, 1 at its end: of its iterations or its control steps, whichever is more."""
    iterations = state["iteration"] / args.num_iterations if args.num_iterations else 0.0
    return min(
        1.0, max(iterations, state["env_steps"] / args.total_env_steps if args.total_env_steps else 0.0)
    )


def progress_bar(name: str, state: dict[str, Any], args: Any) -> tqdm:
    """A progress bar in percent of the run."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    return tqdm(
        total=100.0, initial=100.0 * done(state, args), desc=name, bar_format=form,
        disable=distributed.rank() > 0,
    )  # fmt: skip


def leave_out_diverged(
    batch: dict[str, Any], seeds: np.ndarray, diverged: NDArray[np.bool_]
) -> dict[str, Any]:
    """The batch (T, N, ...) without the groups, members of one seed (N,), that have a member ``diverged``.

    Compared with fewer members the others would have another mean and deviation, so a group goes as a whole:
    all its members are never alive, with rewards 0 and no success, and what they did is learnt from nowhere.
    """
    kept = torch.from_numpy(~np.isin(seeds, seeds[diverged]))  # (N,)
    return batch | {
        "alive": batch["alive"] & kept,
        "rewards": batch["rewards"] * kept,
        "success": batch["success"] & kept,
        "diverged": torch.from_numpy(diverged.copy()),
    }


def totals(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the episodes of rollouts of all processes, of those alive (T, N); not of groups left out.

    ``diverged`` counts the members whose simulation diverged. Where that leaves no group, the program ends
    with one line and exit status 1.
    """
    sums: dict[str, Any] = {}
    for batch in batches:
        alive = batch["alive"]
        figures = {
            "episodes": int(alive[0].sum()),
            "diverged": int(batch["diverged"].sum()),
            "successes": int(batch["success"].sum()),
            "control_steps": int((batch["steps"] * alive).sum()),
            "return": float((batch["rewards"] * alive).sum()),
            "policy_s": batch["policy_s"] / distributed.world_size(),  # their sum is then the mean
        }
        sums = {name: sums.get(name, 0) + value for name, value in figures.items()}
    sums = distributed.add_up(sums)
    with one_line_errors():
        if not sums["episodes"]:
            played = distributed.total(sum(batch["alive"].shape[1] for batch in batches))
            raise FloatingPointError(
                f"the simulations of {sums['diverged']} of {played} episodes diverged, at least one of each"
                " group; expected a group whose positions and velocities stay finite"
            )
    return sums


def charts(totals: dict[str, Any], state: dict[str, Any]) -> dict[str, float]:
    """What is logged of the training episodes by whatever algorithm."""
    episodes = totals["episodes"]
    return {
        "charts/episodic_return": totals["return"] / episodes,
        "charts/episodic_length": totals["control_steps"] / episodes,
        "charts/SPS": state["env_steps"] / state["wall_s"],
        "group/success_mean": totals["successes"] / episodes,
        "group/diverged": totals["diverged"],
        "time/policy_s": totals["policy_s"],
    }


def since_last(envs: Any) -> dict[str, float]:
    """What is logged of the environments since the last call, whose counters start anew.

    Which share of the decisions ended in which stage, ``stages/<name>``, and the seconds of physics and of
    rendering.
    """
    stages, seconds = envs.unwrapped.stages, envs.unwrapped.seconds
    counts = distributed.add_up(dict(stages))
    total = max(1, sum(counts.values()))
    scalars = {f"stages/{re.sub(r'[^a-z0-9]+', '_', name)}": n / total for name, n in counts.items()}
    scalars |= {f"time/{kind}_s": value for kind, value in seconds.items()}
    stages.subtract(dict(stages))
    seconds.update(dict.fromkeys(seconds, 0.0))
    return scalars


def log(writer: Any, progress: tqdm, scalars: dict[str, Any], state: dict[str, Any], args: Any) -> None:
    """Write an iteration's ``scalars`` to TensorBoard, and the most telling ones beside the progress bar."""
    for tag, value in scalars.items():
        writer.add_scalar(tag, float(value), state["env_steps"])
    success, kl = scalars["group/success_mean"], scalars["losses/approx_kl"]
    progress.set_postfix(
        iteration=state["iteration"], success=f"{success:.2f}", kl=f"{kl:.4f}", refresh=False
    )
    progress.update(100.0 * done(state, args) - progress.n)


def join_batches(batches: list[dict[str, Any]], keep: list[Tensor]) -> dict[str, Any]:
    """One batch of the members ``keep`` (N,) bool of several; the shorter ones end with nobody alive."""
    steps = max(len(batch["alive"]) for batch in batches)
    joined: dict[str, Any] = {"instructions": []}
    joined["round"] = torch.cat([torch.full((int(kept.sum()),), i) for i, kept in enumerate(keep)])  # (N,)
    for batch, kept in zip(batches, keep):
        joined["instructions"] += [batch["instructions"][i] for i in torch.nonzero(kept).flatten().tolist()]
    for name in ("image", "state", "tokens", "logprobs", "rewards", "stages", "alive"):
        parts = [batch[name][:, kept] for batch, kept in zip(batches, keep)]  # (T, kept members, ...)
        pads = [part.new_zeros((steps - len(part), *part.shape[1:])) for part in parts]
        joined[name] = torch.cat([torch.cat(pair) for pair in zip(parts, pads)], dim=1)
    return joined


@distributed.only_first
def save_policies(run: Path, policy: Any, args: Any) -> None:
    """Write ``checkpoints/final``, a whole policy, and ``checkpoints/adapter`` where there is an adapter.

    Adapters of several tasks below a shared one make a whole policy for each: ``final_task_4`` and so on.
    """
    note_tasks(policy, args.suite, args.task_ids)
    if args.train.startswith("lora"):
        adapters.save_adapter(policy, run / "checkpoints" / args.adapter)
    if not args.merge:
        return
    if not args.shared_adapter:
        return save_policy(policy, args.policy, run / "checkpoints" / "final")
    for task_id in args.task_ids:
        policy.activate(policy.names[get_task(args.suite, task_id).instruction])
        save_policy(policy, args.policy, run / "checkpoints" / f"final_task_{task_id}")


def finish(run: Path, policy: Any, state: dict[str, Any], args: Any) -> None:
    """Write the trained policy and ``result.json``, and say how it went."""
    _write_result(run, policy, state, args)
    distributed.stop()


@distributed.only_first
def _write_result(run: Path, policy: Any, state: dict[str, Any], args: Any) -> None:
    save_policies(run, policy, args)
    before, after = state["before"], state["after"]
    result = evaluation.about(args)
    for name in after:
        result |= {f"{name}_before": before[name], f"{name}_after": after[name]}
    write_json(
        run / "result.json", result | {name: state[name] for name in ("env_steps", "episodes", "wall_s")}
    )
    words = [
        f"{name} {before[name]['successes']} -> {evaluation.percent(its)}" for name, its in after.items()
    ]
    print(f"{'; '.join(words)}, in {state['wall_s'] / 60:.1f} min; {run}")


def save_training_state(
    folder: Path, policy: Any, optimizer: torch.optim.Optimizer, counters: dict[str, Any]
) -> None:
    """Write all that a resumed run needs, whole or not at all; the old one stays until the new one stands.

    All processes take part, the first writes. A state that cannot be written, and Ctrl-C since the last one,
    end the program here.
    """
    state = sorted(adapters.optimizer_state(optimizer).items())  # in one order in all processes
    moments = {name: distributed.to_first(value) for name, value in state}
    distributed.by_first(_write_training_state, folder, policy, moments, counters)


def _write_training_state(
    folder: Path, policy: Any, moments: dict[str, Tensor], counters: dict[str, Any]
) -> None:
    partial = folder.with_name(folder.name + ".partial")
    with one_line_errors(f"the training state cannot be written, the last one in {folder} stays: "):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            tensors = {name: p.cpu().contiguous() for name, p in adapters.trainable_state(policy).items()}
            safetensors.torch.save_file(tensors, partial / "trained.safetensors")
            fixed = {name: b.to("cpu", copy=True) for name, b in policy.named_buffers()}
            safetensors.torch.save_file(fixed, partial / "buffers.safetensors")
            safetensors.torch.save_file(moments, partial / "optimizer.safetensors")
            write_json(partial / "counters.json", counters)
            replace_folder(partial, folder)
        except (OSError, safetensors.SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(str(error)) from None
    if _leaving:
        tqdm.write(f"stopped and saved; go on with --resume {folder.parent.parent}", file=sys.stderr)
        raise SystemExit(INTERRUPTED)


def load_training_state(folder: Path, policy: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore what ``save_training_state`` wrote, from ``folder`` or its predecessor; the counters.

    Raises:
        ValueError: When there is no such state, or a file of it is damaged or of another policy; nothing is
            changed then.
    """
    if not folder.exists():
        folder = folder.with_name(folder.name + ".previous")
    if not (folder / "counters.json").is_file():
        raise ValueError(
            f"{str(folder.parent)!r} holds no training state; expected the folder of a run to resume"
        )
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    trained = read_tensors(folder / "trained.safetensors", parameters)
    moments = read_tensors(
        folder / "optimizer.safetensors", adapters.possible_optimizer_state(optimizer), partial=True
    )
    counters = read_json(folder / "counters.json")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(distributed.share_of(trained[name], parameter))
    adapters.load_optimizer_state(optimizer, moments)
    return counters


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON can be one of the type ``kind`` of an argument."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, option) for option in inner)
    if get_origin(kind) is Literal:
        return value in inner
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else str if kind is Path else kind)


def load_args(args: ArgsT) -> ArgsT:
    """The arguments that the run ``args.resume`` was started with, and those that the command line changes.

    It may say anew how fast the run goes, how long, and where things lie (``HOW_FAST``, ``HOW_LONG``,
    ``WHERE``). The length is that which was given, control steps or iterations, and a file has its name.

    Raises:
        ValueError: When that is not the folder of a run, or other arguments are asked for.
    """
    given: Any = args
    run: Path = given.resume
    if given.evaluate:
        raise ValueError("--resume trains on; to evaluate, give --checkpoint RUN/checkpoints/final")
    if not (run / "args.json").is_file():
        parents = [str(parent) for parent in run.resolve().parents[:2] if (parent / "args.json").is_file()]
        hint = f"; did you mean {parents[0]!r}?" if parents else ""
        raise ValueError(f"{str(run)!r} is not the folder of a run: it has no args.json{hint}")
    known = get_type_hints(type(args))
    values = read_json(run / "args.json")
    made_by, _ = values.pop("script", None), values.pop("torch_threads", None)
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(
            f"{str(run / 'args.json')!r} has {', '.join(unknown)}, which this script does not know; expected"
            f" the script that made the run{f', {made_by}.py' if made_by else ''}"
        )
    if "seed" not in values:
        raise ValueError(f"{str(run / 'args.json')!r} is damaged: it has no seed")
    for name, value in values.items():
        if not _fits(value, known[name]):
            raise ValueError(f"{str(run / 'args.json')!r} is damaged: {name} is {value!r}")
        kind = Path if "Path" in str(known[name]) else lambda item: item
        if isinstance(value, list):
            values[name] = tuple(map(kind, value))
        elif value is not None:
            values[name] = kind(value)
    own = type(args)(**values | {"resume": run})
    asked = parse_args(type(args), own)
    for name in known:
        its, other = getattr(own, name), getattr(asked, name)
        moved = name in WHERE and (name != "reward" or Path(its).name == Path(other).name)
        places = moved and not {None, (), "builtin"} & {its, other}
        if its != other and not (places or name in HOW_FAST or (name in HOW_LONG and its is not None)):
            may = [each for each in (*HOW_FAST, *HOW_LONG, *WHERE) if each in known]
            raise ValueError(
                f"{name} is {in_short(other)}, the run's own {in_short(its)}; expected its own: how fast a"
                f" run goes, how long, and where things lie may change, {', '.join(may)}"
            )
    return asked
