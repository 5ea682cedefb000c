"""Arguments: those that all scripts share, how they are read, completed and validated, and a run's own."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from vla_envs import distributed
from vla_envs.command_line import check_numbers, one_line_errors, parse_args, read_dataclass
from vla_envs.files import read_json
from vla_envs.inputs import in_short
from vla_envs.policies import (
    SETTINGS,
    SHIPPED,
    adapters,
    check_device,
    evaluated_only,
    is_own,
    is_server,
    load_policy,
)
from vla_envs.tasks import SUITES, get_task, num_init_states, suite_or_file, with_init_states
from vla_envs.training.evaluation import PROTOCOLS

ArgsT = TypeVar("ArgsT")
DEFAULT_ENV_STEPS = 120_000  # control steps of training on one task: about 13 iterations of 64 episodes
ENV_STEPS_PER_TASK = 60_000  # where one policy learns several
#: What may change when a run is resumed: how fast it goes, how long it is, and where the things lie that it
#: began with. Anything else would make it another run.
HOW_FAST = ("device", "num_threads", "micro_batch_size", "cudagraphs", "cache")
HOW_LONG = ("num_iterations", "total_env_steps")
WHERE = ("checkpoint", "demos", "assets", "shared_adapter", "reward", "policy")


@dataclass
class CommonArgs:
    """What every script takes; each adds the arguments of its algorithm."""

    # ---- Experiment ----
    seed: int = 1
    """Seed of everything: the same seed gives the same run"""
    run_dir: Path | None = None
    """Folder of this run [runs/<suite>_<task id>__<script>__<seed>__<time>]"""
    resume: Path | None = None
    """Folder of a run to go on with; only how fast, how long and where things lie may change"""
    evaluate: bool = False
    """Only evaluate --checkpoint, deterministically and sampled"""
    compare: Path | None = None
    """With --evaluate: a second checkpoint, compared with the first state by state"""
    protocol: Literal["tgrpo", "openvla", "simplevla", "rlinf", "lerobot"] | None = None
    """Whose evaluation: settling, step limit, images, sampling, episodes [as in training]"""
    eval_every: int = 5
    """Iterations between evaluations; 0: only at the end and, of RL, before training"""
    eval_episodes: int | None = None
    """Episodes of an evaluation: recorded init states 0, 1, ... [the protocol's, else 50: all]"""
    eval_temperature: float | None = None
    """Temperature of evaluations' sampled episodes; 0: none [the protocol's, else --temperature]"""
    device: str | None = None
    """Where the policy runs: cpu, cuda, cuda:1, ... [nano, flow: cpu; others: cuda where there is one]"""

    # ---- Environment ----
    suite: str = "LiberoObject"
    """LIBERO suite, or a folder of BDDL files: tasks of one's own"""
    task_id: int | None = None
    """Task in the suite, from 0 [4]"""
    task_ids: tuple[int, ...] = ()
    """Several tasks at once, for one policy [--task-id]"""
    bddl_file: Path | None = None
    """A task of one's own, instead of --suite and --task-id"""
    init_state_file: Path | None = None
    """Recorded init states of a task of one's own, for evaluations [50 that training never sees]"""
    perturb: str | None = None
    """Train in perturbed scenes: camera:3,light:2, all:1, or any:3 (one axis per episode); levels 1 to 5"""
    eval_perturb: str | None = None
    """Evaluate in perturbed scenes, the same ones every time"""
    assets: str = "builtin"
    """builtin, libero (LIBERO's own: LIBERO_ASSETS, else wheels, else downloaded) or a folder"""
    quality: str = "exact"
    """Of LIBERO's own assets: exact, its very pixels, or fast, with simpler meshes"""
    cache: bool = True
    """Keep compiled scenes on disk; --no-cache builds them again"""
    max_episode_steps: int | None = None
    """Control steps until an episode ends without success [200; with --evaluate: the protocol's]"""
    action_chunk: int | None = None
    """Control steps per decision (C); has to fit the policy [the policy's; smolvla, pi0: 10 of 50]"""
    num_threads: int | None = None
    """Simulator threads [one per core]"""

    # ---- Policy ----
    policy: str = "nano"
    """nano, flow, openvla, openvla-oft, smolvla, pi0 or path/to/file.py:function; to evaluate: ws://host:port"""
    checkpoint: Path | None = None
    """Starting checkpoint: a folder, or a repository of the hub [the shipped one; sft_vla.py: random]"""
    train: str = "all"
    """What is trained: lora, head, lora+head, lora+last-k, expert (smolvla, pi0) or all"""
    lora_rank: int | None = None
    """LoRA's r [32]"""
    last_k: int | None = None
    """Blocks trained in full with --train lora+last-k [1]"""
    adapter: str | None = None
    """Name of the LoRA adapter, and of its folder in checkpoints/ [adapter]"""
    shared_adapter: tuple[Path, ...] = ()
    """Adapters, one for each of --task-ids: frozen, and one that all tasks share is trained above them"""
    merge: bool = True
    """At the end also write checkpoints/final: a whole policy with the adapter added in"""
    cudagraphs: bool = False
    """Replay openvla's decoding as CUDA graphs, one per token, instead of launching its kernels one by one"""
    temperature: float = 1.0
    """Divides the logits, or scales the noise of what denoises; in rollout and update alike"""
    noise: str | None = None
    """Random denoising steps: smolvla, pi0: sde-one (default), sde, learned; flow: sde (default), fixed"""
    noise_level: float | None = None
    """Standard deviation of noise but the learned one [the checkpoint's; smolvla, pi0: 0.5 of an action's]"""
    denoising_steps: int | None = None
    """Steps from noise to a chunk of actions [the checkpoint's]"""


def parse(
    args_type: type[ArgsT],
    validate: Callable[[ArgsT], ArgsT],
    presets: dict[str, dict[str, Any]] | None = None,
) -> ArgsT:
    """The arguments of the command line, or of the run that ``--resume`` names, completed by ``validate``.

    A mistake ends the program with one line. Where several processes train together, they meet here.

    Args:
        args_type: The script's dataclass.
        validate: Fills in what was left open; raises a ValueError that says which argument does not fit.
        presets: For each value of ``--preset``, the defaults that it stands for.
    """
    args: Any = parse_args(args_type)
    if presets and args.preset:
        args = parse_args(args_type, args_type(**presets[args.preset]))
    with one_line_errors():
        args = validate(load_args(args) if args.resume else args)
        _check_demos(args)  # now rather than after a policy has been loaded
        distributed.start(args.device)
    return args


def _check_demos(args: Any) -> None:
    demos = getattr(args, "demos", None)
    if demos and not args.evaluate and not demos.is_dir():
        raise ValueError(
            f"demos is {str(demos)!r}, where there is no folder; expected one of demonstrations, as python -m"
            " vla_envs.experts --out FOLDER writes it"
        )


def complete_rl(args: ArgsT) -> ArgsT:
    """``complete`` for a script of online RL, whose own arguments are validated too.

    Raises:
        ValueError: Names the first argument that does not fit, and what was expected.
    """
    args = complete(_fill_in_length(args))
    _check_rl(args)
    return args


def _check_rl(args: Any) -> None:
    """Refuse arguments that the scripts of online RL share and that do not fit.

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
    if getattr(args, "kl_coef", 0) and args.train != "lora":
        raise ValueError(
            f"kl_coef compares with the adapter switched off; expected --train lora, got {args.train}"
        )
    of_ratios = [name for name in ("kl_coef", "clip_low", "clip_high") if hasattr(args, name)]
    check_numbers(args, "seed", "eval_every", *of_ratios, above=False)
    if getattr(args, "clip_low", 0) > 1:
        raise ValueError(f"clip_low is {args.clip_low}; expected at most 1, as a ratio is never below 0")
    if args.seed >= 2**63:
        raise ValueError(f"seed is {in_short(args.seed)}; expected a number below 2 to the power of 63")
    names = (
        "num_groups", "num_iterations", "total_env_steps", "update_epochs", "minibatch_size",
        "micro_batch_size", "lora_rank", "last_k", "warmup_iterations", "temperature", "learning_rate",
        "target_kl", "max_grad_norm",
    )  # fmt: skip
    check_numbers(args, *(name for name in names if hasattr(args, name)), above=True)
    if getattr(args, "micro_batch_size", None) and args.micro_batch_size > args.minibatch_size:
        raise ValueError(
            f"micro_batch_size is {args.micro_batch_size}; expected at most {args.minibatch_size}, the"
            " minibatch_size that it is a part of"
        )


def _check_together(args: Any) -> None:
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
    if args.evaluate and args.perturb:
        raise ValueError("perturb is for training; expected --eval-perturb with --evaluate")
    if args.protocol:
        protocol = PROTOCOLS[args.protocol]
        its_own = {"eval_temperature": protocol.temperature}
        if args.evaluate:  # else the limit is that of training's episodes
            its_own["max_episode_steps"] = protocol.limit(args.suite)
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


def _has_one_way(args: Any) -> bool:
    """Whether the policy is one that can only be evaluated, and has one way of playing, its own.

    Raises:
        ValueError: When more is asked of such a policy; says what was expected.
    """
    what = evaluated_only(args.policy, args.checkpoint)
    if not what:
        return False
    if not args.evaluate:
        raise ValueError(
            f"{what}, which can be evaluated and not trained; expected --evaluate, or python -m"
            " vla_envs.robustness"
        )
    if args.eval_temperature:
        raise ValueError(
            f"eval_temperature is {args.eval_temperature}, and {what}, which has one way of playing, its own;"
            " expected none"
        )
    if args.train != "all":
        raise ValueError(f"train is {args.train}, and {what}, of which nothing is trained; expected none")
    return True


def _fill_in_length(args: ArgsT) -> ArgsT:
    """``args`` with groups for every task, and control steps unless the number of iterations is given."""
    given: Any = args
    tasks = len(given.task_ids)
    groups = max(8, 2 * tasks) if given.num_groups is None else given.num_groups
    steps = given.total_env_steps
    if given.num_iterations is None and steps is None:
        steps = max(DEFAULT_ENV_STEPS, ENV_STEPS_PER_TASK * tasks)
    return dataclasses.replace(given, num_groups=groups, total_env_steps=steps)


def complete(args: ArgsT) -> ArgsT:
    """``args`` with the tasks, the device, what is trained, and the episodes of training and evaluations.

    Raises:
        ValueError: When they do not fit.
    """
    given: Any = _own_task(args)
    task_ids = given.task_ids or (4 if given.task_id is None else given.task_id,)
    tasks = {get_task(given.suite, task_id) for task_id in task_ids}
    if len(tasks) < len(task_ids):
        raise ValueError(f"task_ids are {task_ids}; expected each task once")
    if given.init_state_file:
        if len(tasks) > 1:
            raise ValueError(f"init_state_file is of one task; expected one of {task_ids}")
        tasks = {with_init_states(task, given.init_state_file) for task in tasks}
    init_states = min(map(num_init_states, tasks))
    _check_together(given)
    adapters.check_trainable_set(given.train)
    one_way = _has_one_way(given)
    check_numbers(args, "eval_temperature", above=False)
    protocol = PROTOCOLS[given.protocol] if given.protocol else None
    temperature = 0.0 if one_way else protocol.temperature if protocol else None
    defaults: dict[str, Any] = {
        "eval_episodes": min(protocol.episodes, init_states) if protocol else init_states,
        "eval_temperature": given.temperature if temperature is None else temperature,
        "max_episode_steps": protocol.limit(given.suite) if protocol and given.evaluate else 200,
        "lora_rank": 32 if "lora" in given.train else None,
        "last_k": 1 if "last-k" in given.train else None,
        "adapter": "adapter" if "lora" in given.train else None,
    }
    open_ = {name: value for name, value in defaults.items() if getattr(given, name) is None}
    given = dataclasses.replace(given, **open_)
    if not 1 <= given.eval_episodes <= init_states:
        raise ValueError(
            f"eval_episodes is {given.eval_episodes}; expected 1 to {init_states}, the recorded init states"
        )
    if given.compare and not given.evaluate:
        raise ValueError("compare names a second checkpoint; expected it with --evaluate")
    if given.compare:
        # Fails now rather than after the first evaluation.
        load_policy(given.policy, given.compare, "meta", suite=given.suite)
    device = given.device or ("cuda" if given.policy not in SHIPPED and torch.cuda.is_available() else "cpu")
    train = given.train
    if given.evaluate and train == "all" and not (is_own(given.policy) or is_server(given.policy)):
        train = "head"  # what is trained is float32
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
    check_device(device)
    return dataclasses.replace(
        given, task_id=task_ids[0], task_ids=task_ids, train=train, device=distributed.device(device)
    )


def _own_task(args: ArgsT) -> ArgsT:
    """``args`` with ``--bddl-file`` as the suite, which has that one task.

    Raises:
        ValueError: When ``--suite`` or a task is given beside it.
    """
    given: Any = args
    if given.bddl_file is None:
        own = given.suite not in SUITES and given.task_id is None and not given.task_ids
        return dataclasses.replace(given, task_id=0) if own else args
    others = () if given.task_ids == (0,) else given.task_ids  # (0,) is what a resumed run was completed to
    suite = suite_or_file(given.suite, given.bddl_file, task_id=given.task_id, task_ids=others)
    return dataclasses.replace(given, suite=suite, task_id=0, task_ids=(0,))


def fill_in_chunk(args: ArgsT, policy: Any) -> ArgsT:
    """``args`` with the control steps that a decision of ``policy`` covers, and how a flow draws it.

    Raises:
        ValueError: When others are asked for.
    """
    given: Any = args
    if given.action_chunk not in (None, policy.action_chunk):
        raise ValueError(
            f"action_chunk is {given.action_chunk}; expected {policy.action_chunk}, the policy's"
        )
    flow = getattr(policy, "settings", None)
    filled = {name: getattr(flow, name) for name in SETTINGS if hasattr(flow, name)}
    return dataclasses.replace(given, **filled | {"action_chunk": policy.action_chunk})


def load_args(args: ArgsT) -> ArgsT:
    """The arguments that the run ``args.resume`` was started with, and those that the command line changes.

    It may change how fast the run goes, how long it is, and where things lie (``HOW_FAST``, ``HOW_LONG``,
    ``WHERE``). The length stays in the unit that was given, control steps or iterations, and a file keeps its
    name.

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
    values = read_json(run / "args.json")
    made_by = values.pop("script", None)
    for name in ("command", "torch_threads"):  # not arguments
        values.pop(name, None)
    known = [field.name for field in dataclasses.fields(given)]
    if unknown := sorted(values.keys() - set(known)):
        raise ValueError(
            f"{str(run / 'args.json')!r} has {', '.join(unknown)}, which this script does not know; expected"
            f" the script that made the run{f', {made_by}.py' if made_by else ''}"
        )
    if "seed" not in values:
        raise ValueError(f"{str(run / 'args.json')!r} is damaged: it has no seed")
    try:
        own = read_dataclass(type(args), values | {"resume": str(run)})
    except ValueError as error:
        raise ValueError(f"{str(run / 'args.json')!r} is damaged: {error}") from None
    asked = parse_args(type(args), own)
    for name in known:
        its, other = getattr(own, name), getattr(asked, name)
        moved = name in WHERE and (name not in ("reward", "policy") or Path(its).name == Path(other).name)
        places = moved and not {None, (), "builtin"} & {its, other}
        if its != other and not (places or name in HOW_FAST or (name in HOW_LONG and its is not None)):
            may = [each for each in (*HOW_FAST, *HOW_LONG, *WHERE) if each in known]
            raise ValueError(
                f"{name} is {in_short(other)}, the run's own {in_short(its)}; expected its own: how fast a"
                f" run goes, how long, and where things lie may change, {', '.join(may)}"
            )
    return asked
