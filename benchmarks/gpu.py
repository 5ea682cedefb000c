"""How fast the large policies are on one GPU, and how fast they could be there.

    python benchmarks/gpu.py                  # openvla needs a GPU of 80 GB; no checkpoint is needed
    python benchmarks/gpu.py --policies pi0   # one of them
    python benchmarks/gpu.py --cpu --policies smolvla --batches 1 --micro-batches 2 --group-size 2 --steps 20
    python benchmarks/gpu.py --tiny           # the same code on the CPU at a toy's size

The weights are random and of the published size (smolvla: HuggingFaceVLA/smolvla_libero's), in bfloat16 but
for what is trained: a LoRA adapter of rank 32 (openvla, openvla-oft) or the action expert (smolvla, pi0, with
the noise sde-one). A decision is one control step (openvla), eight (openvla-oft) or ten (smolvla, pi0) of one
environment, from its rendered images to its actions. Attainable is arithmetic with two speeds measured on the
spot, a large matmul's and a copy's: a pass takes as long as its FLOPs at the first or as the bytes it reads
at the second, whichever is longer. Recomputing activations is no FLOP. openvla's TGRPO iteration decodes with
CUDA graphs.
--cpu measures on the CPU in float32; there the peak of memory is the program's since it began.

Aims for openvla: 32 at once at least 15 times the decisions per second of one; an update at least 35 % of the
matmul's rate; a TGRPO iteration of 8 environments and 200 steps under 3 minutes.
"""

import gc
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vla_envs  # noqa: F401  (registers the environments)
from vla_envs import distributed
from vla_envs.command_line import one_line_errors, parse_args
from vla_envs.policies.adapters import make_trainable
from vla_envs.policies.lerobot.files import ACTION_DIM, STATE_DIM, Normaliser, Published
from vla_envs.policies.lerobot.pi0 import GemmaConfig, Pi0Config, SiglipVisionConfig
from vla_envs.policies.lerobot.policy import FlowSettings, LeRobotPolicy, network_of
from vla_envs.policies.lerobot.smolvla import SmolVLAConfig
from vla_envs.policies.openvla import LlamaConfig, OpenVLAConfig, OpenVLAPolicy, ViTConfig
from vla_envs.policies.protocol import cameras_of
from vla_envs.render import opengl

ROOT = Path(__file__).parent.parent
TASK = "pick up the ketchup and place it in the basket"
Name = Literal["openvla", "openvla-oft", "smolvla", "pi0"]


@dataclass
class Args:
    policies: tuple[Name, ...] = ("openvla", "openvla-oft", "smolvla", "pi0")
    """Which to measure"""
    batches: tuple[int, ...] = (1, 8, 32, 64)
    """Environments that decide at once"""
    micro_batches: tuple[int, ...] = (8, 32)
    """Samples of an update"""
    group_size: int = 8
    """Environments of the TGRPO iteration"""
    steps: int = 200
    """Its control steps"""
    repeats: int = 5
    """Measurements of each figure but the iteration's; the best counts"""
    cpu: bool = False
    """Measure on the CPU, in float32: minutes for smolvla with --batches 1 and few --steps"""
    tiny: bool = False
    """Try the code on the CPU: toys in float32, few steps"""


TINY = Args(batches=(1, 32), micro_batches=(4,), group_size=2, steps=3, repeats=1)


def openvla_config(tiny: bool) -> OpenVLAConfig:
    """The published sizes, or a network of every part that is small enough for a test."""
    if not tiny:
        return OpenVLAConfig()
    sizes = {"vocab_size": 512, "pad_token_id": 448, "hidden_size": 32, "intermediate_size": 48}
    llm = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    dino = ViTConfig(24, 3, 2, 48, 28, registers=2, cls_token=True, layer_scale=True)
    return OpenVLAConfig(dino, ViTConfig(32, 4, 4, 40, 28), llm)


def smolvla_config(tiny: bool) -> SmolVLAConfig:
    """As ``openvla_config``."""
    true = SmolVLAConfig(
        vision_width=768, vision_layers=12, vision_heads=12, vision_mlp=3072, patch=16, image_size=512,
        shuffle=4, vocabulary=49280, width=960, layers=32, head=64, heads=15, key_heads=5, mlp=2560,
        expert_width=480, expert_mlp=1280, self_attention_every=2, state_dim=32, action_dim=32,
        action_chunk=50,
    )  # fmt: skip
    toy = replace(
        true, vision_width=16, vision_layers=2, vision_heads=2, vision_mlp=24, patch=8, image_size=32,
        shuffle=2, width=24, layers=3, head=8, heads=3, key_heads=1, mlp=40, expert_width=20, expert_mlp=28,
    )  # fmt: skip
    return toy if tiny else true


def pi0_config(tiny: bool) -> Pi0Config:
    """As ``openvla_config``."""
    sizes = [(1152, 4304, 27, 16, 224), (2048, 16384, 257152), (1024, 4096, 1), (18, 8, 256)]
    if tiny:
        sizes = [(24, 32, 2, 2, 28), (24, 40, 64), (16, 28, 1), (2, 2, 8)]
    (width, mlp, layers, heads, pixels), *gemmas, shared = sizes
    vision = SiglipVisionConfig(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=pixels, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    layers, heads, size = shared
    text, expert = (
        GemmaConfig(
            vocab_size=words, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=1, head_dim=size, bos_token_id=None,
            eos_token_id=None,
        )
        for width, mlp, words in gemmas
    )  # fmt: skip
    return Pi0Config(vision, text, expert, pixels, text.vocab_size, 32, 32, 50)


@torch.no_grad()
def fill(network: nn.Module, dtype: torch.dtype, is_float32: Callable[[str, Any], bool]) -> Any:
    """The network with random weights of ``dtype``, but for those that are float32 in any case."""
    for name, weight in network.named_parameters():
        weight.data = weight.data.to(torch.float32 if is_float32(name, weight) else dtype)
        if weight.ndim > 1:
            weight.normal_(std=0.02)
        else:
            weight.fill_(not name.endswith("bias"))
    return network.eval()


def openvla(name: str, tiny: bool, dtype: torch.dtype, device: torch.device) -> OpenVLAPolicy:
    """An OpenVLA with actions from -1 to 1."""
    with device:
        network = OpenVLAPolicy(openvla_config(tiny), parallel=name == "openvla-oft")
    policy = fill(network, dtype, lambda *_: False)
    policy.q01, policy.q99, policy.normalised = -np.ones(7), np.ones(7), np.arange(7) < 6
    policy.tokenizer, policy.dtype, policy.files = no_words(), dtype, {}
    return make_trainable(policy, "lora")


def flow(name: str, tiny: bool, dtype: torch.dtype, device: torch.device) -> LeRobotPolicy:
    """A SmolVLA or pi0 of two cameras that normalises nothing."""
    config = smolvla_config(tiny) if name == "smolvla" else pi0_config(tiny)
    with device:
        network = network_of(name)(config)
    fill(network, dtype, lambda its, weight: weight.ndim < 2 or network.is_float32(its))
    plain = (Normaliser(torch.zeros(n), torch.ones(n), torch.ones(n)) for n in (STATE_DIM, ACTION_DIM))
    cameras = ("image", "wrist_image")
    published = Published(Path(), {}, cameras, *plain, no_words(), 48, "\n", {}, {}, {})
    policy = LeRobotPolicy(network, published, FlowSettings())
    return make_trainable(policy.to(device).eval(), "expert")


def no_words() -> tokenizers.Tokenizer:
    """A tokenizer that knows no word."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return words


class Bench:
    """A device, its two speeds, and the table."""

    def __init__(self, device: torch.device, dtype: torch.dtype, args: Args) -> None:
        self.device, self.dtype, self.repeats, tiny = device, dtype, args.repeats, args.tiny
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        print("| | achieved | attainable | share | peak memory |\n| --- | --- | --- | --- | --- |")
        on_cpu = device.type == "cpu"
        count = 2**22 if tiny else 2**28 if on_cpu else 2**31
        source, target = (torch.ones(count, dtype=torch.uint8, device=device) for _ in range(2))
        seconds = self.seconds(lambda: [target.copy_(source) for _ in range(10)])
        self.bandwidth = 10 * 2 * count / seconds  # bytes/s, read and written
        side = 256 if tiny else 2048 if on_cpu else 8192
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        seconds = self.seconds(lambda: [a @ b for _ in range(10)])
        self.rate = 10 * 2 * side**3 / seconds  # FLOP/s
        self.row("a copy", f"{self.bandwidth / 1e12:.3g} TB/s")
        self.row(f"a matmul in {str(dtype)[6:]}", f"{self.rate / 1e12:.3g} TFLOP/s")

    def seconds(self, work: Callable[[], Any], runs: int | None = None) -> float:
        """Of the fastest of ``runs`` [one that warms up, and the repeats]; infinite where memory runs out."""
        times = []
        for _ in range(runs or 1 + self.repeats):
            self.wait()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            start = time.perf_counter()
            try:
                work()
                self.wait()
            except torch.OutOfMemoryError:
                times = [math.inf]
                break
            times.append(time.perf_counter() - start)
        if times[-1] == math.inf and self.device.type == "cuda":
            torch.cuda.empty_cache()  # only now has the exception let go of its tensors
        return min(times[1:] or times)

    def row(self, name: str, achieved: str, attainable: str = "", share: float | None = None) -> None:
        """Print a line of the table; with a share it has a peak of memory; at 0 that ran out."""
        cells = [name, achieved, attainable, "", ""]
        if share == 0:
            cells[1] = "out of memory"
        elif share is not None:
            cells[3] = f"{100 * share:.3g} %"
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device)
            else:
                unit = 1 if sys.platform == "darwin" else 1024  # bytes
                peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            cells[4] = f"{peak / 2**30:.1f} GiB"
        print("|", " | ".join(cells), "|", flush=True)


def flops(work: Callable[[], Any]) -> float:
    """Floating-point operations of ``work``."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def bytes_of(*modules: nn.Module) -> int:
    """Bytes of weights that a pass reads; of the tables of words it needs only rows."""
    tables = ("embed_tokens.weight", "lm_head.weight")
    return sum(p.nbytes for m in modules for name, p in m.named_parameters() if not name.endswith(tables))


@dataclass
class Pass:
    """A pass through a network, or through a part of it, of which a decision takes ``times`` alike."""

    times: int
    flops: float  # of each decision
    weights: int  # bytes that are read, however many decide at once
    cache: int  # bytes that are read for each decision: keys and values of what came before


class Samples:
    """A policy, and decisions of it to measure: made-up images, one instruction."""

    def __init__(self, name: Name, bench: Bench, args: Args) -> None:
        self.bench = bench
        make = openvla if name.startswith("openvla") else flow
        self.policy: Any = make(name, args.tiny, bench.dtype, bench.device)
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        self.tokens = self.policy.sample(*self.inputs(1))[1]  # (1, D)
        self.score(1)  # what a frozen language model reads is kept from here on, as in an update
        self.flops_forward = flops(lambda: self.score(1))  # in evaluation mode: nothing is recomputed
        self.flops_update = flops(lambda: self.update(1))
        self.optimizer.zero_grad()
        self.passes = self.of_openvla() if make is openvla else self.of_flow()

    def inputs(self, batch: int) -> tuple[dict[str, Any], list[str]]:
        """Observations and instructions."""
        size, random = self.policy.image_size, np.random.default_rng(0)
        obs: dict[str, Any] = {"state": np.zeros((batch, STATE_DIM), np.float32)}
        for name in cameras_of(self.policy):
            obs[name] = random.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        return obs, [TASK] * batch

    def score(self, batch: int) -> torch.Tensor:
        """Log-probabilities of one decision, repeated."""
        return self.policy.score(*self.inputs(batch), self.tokens.repeat(batch, 1))[0]

    def update(self, batch: int) -> None:
        """One optimiser step."""
        self.optimizer.zero_grad()
        (-self.score(batch).mean()).backward()
        self.optimizer.step()

    def of_openvla(self) -> list[Pass]:
        """One over images, prompt and tokens; token by token, Llama's weights are read six times more."""
        c, dino = self.policy.config.llm, self.policy.config.dino
        positions = (dino.image_size // dino.patch_size) ** 2 + len(self.policy.prompt(TASK))
        cache = 2 * positions * c.num_hidden_layers * c.hidden_size * self.policy.dtype.itemsize
        whole = Pass(1, self.flops_forward, bytes_of(self.policy), 0)
        following = Pass(6, 0.0, bytes_of(self.policy.blocks), cache)  # their FLOPs are in the first
        return [whole] if self.policy.parallel else [whole, following]

    @torch.no_grad()
    def of_flow(self) -> list[Pass]:
        """One over the prefix; each denoising step is one through the expert, which reads what that kept."""
        steps, inputs = self.policy.settings.denoising_steps, self.inputs(1)
        prefix = self.policy.prefix(*inputs)
        first = flops(lambda: self.policy.prefix(*inputs))
        again = (flops(lambda: self.policy.sample(*inputs)) - first) / steps
        cache = sum(kept.nbytes for kept in [*prefix.keys, *prefix.values])
        return [
            Pass(1, first, bytes_of(self.policy.model.vlm), 0),
            Pass(steps, again, bytes_of(*self.policy.expert), cache),
        ]

    def least(self, batch: int) -> float:
        """Seconds that ``batch`` decisions take at the device's two speeds."""
        seconds = 0.0
        for each in self.passes:
            reading = (each.weights + batch * each.cache) / self.bench.bandwidth
            seconds += each.times * max(batch * each.flops / self.bench.rate, reading)
        return seconds


def rollouts(name: str, samples: Samples, bench: Bench, args: Args) -> None:
    """Decisions per second at every batch size, and how many times those at the first."""
    first: tuple[float, ...] = ()  # seconds of a decision there, as measured and at least
    for batch in args.batches:
        inputs = samples.inputs(batch)
        seconds = bench.seconds(lambda: samples.policy.sample(*inputs))  # noqa: B023
        each = seconds / batch, samples.least(batch) / batch
        first = first or each
        speeds = [f"{1 / own:.3g} decisions/s = {one / own:.3g} x" for own, one in zip(each, first)]
        bench.row(f"{name}: {batch} decide at once", *speeds, each[1] / each[0])


def updates(name: str, samples: Samples, bench: Bench, args: Args) -> None:
    """Time and memory of an optimiser step on every number of samples."""
    samples.policy.train()
    for batch in args.micro_batches:
        seconds = bench.seconds(lambda: samples.update(batch))  # noqa: B023
        rate = batch * samples.flops_update / seconds
        achieved = f"{seconds:.3g} s, {rate / 1e12:.3g} TFLOP/s"
        bench.row(f"{name}: an update on {batch}", achieved, f"{bench.rate / 1e12:.3g}", rate / bench.rate)
    samples.policy.eval()
    samples.optimizer.zero_grad()


def tgrpo(name: Name, samples: Samples, bench: Bench, args: Args) -> None:
    """A whole TGRPO iteration by the script's own functions."""
    sys.path.append(str(ROOT))
    import tgrpo_vla as script

    members, policy = args.group_size, samples.policy
    envs = gym.make_vec(
        "vla_envs/LiberoObject-v0", num_envs=members, task_id=4, image_size=policy.image_size,
        wrist_camera="wrist_image" in cameras_of(policy), action_chunk=policy.action_chunk,
        reward="multi_stage", max_episode_steps=args.steps,
    )  # fmt: skip
    envs.reset(seed=[0] * members)
    settings = script.Args(
        policy=name, device=str(bench.device), target_kl=math.inf, num_groups=1, group_size=members,
        minibatch_size=32 * members, micro_batch_size=32,
    )  # fmt: skip
    took: dict[str, float] = {}
    decisions = 0

    def iteration() -> None:
        nonlocal decisions
        start, before = time.perf_counter(), dict(envs.unwrapped.seconds)
        generators = [torch.Generator().manual_seed(i) for i in range(members)]
        batch = script.rollout(envs, policy, np.zeros(members, np.uint32), settings.temperature, generators)
        took["rollout"], took["of it policy"] = time.perf_counter() - start, batch["policy_s"]
        took["drawing"] = envs.unwrapped.seconds["render"] - before["render"]
        advantages = script.tgrpo_advantages(batch["rewards"], batch["alive"], members, 0.3, 0.7)
        policy.train()
        b = script.samples_of(policy, batch, advantages, settings)
        decisions = len(b["who"])
        minibatches = torch.randperm(decisions).split(settings.minibatch_size)
        script.update(policy, samples.optimizer, b, minibatches, settings)
        policy.eval()

    seconds = bench.seconds(iteration, runs=1)
    per_sample = (samples.flops_forward + samples.flops_update) / bench.rate
    rounds = math.ceil(args.steps / policy.action_chunk)
    least = rounds * samples.least(members) + decisions * per_sample
    achieved = ", ".join([f"{seconds:.3g} s", *(f"{what} {part:.3g}" for what, part in took.items())])
    row = f"{name}: TGRPO, {members} x {args.steps} control steps, {decisions} decisions"
    bench.row(row, achieved, f"{least:.3g} s", least / seconds)
    envs.close()


def measure(name: Name, bench: Bench, args: Args) -> list[torch.Size]:
    """Print a policy's rows; the shapes of what is trained of it, none where memory ran out."""
    gc.collect()  # the policy before this one gives its memory back
    torch.cuda.empty_cache()
    try:
        samples = Samples(name, bench, args)
    except torch.OutOfMemoryError:
        bench.row(name, "", share=0)
        return []
    rollouts(name, samples, bench, args)
    updates(name, samples, bench, args)
    if name == "openvla":
        samples.policy.cudagraphs = True
        rollouts(f"{name} --cudagraphs", samples, bench, args)
    tgrpo(name, samples, bench, args)
    return [p.shape for p in samples.trained]


def exchange(trained: dict[Name, list[torch.Size]], bench: Bench) -> None:
    """Adding up gradients by NCCL as several processes do; with one, only copying takes time."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    for name, shapes in trained.items():
        parameters = [nn.Parameter(torch.zeros(shape, device=bench.device)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.SGD(parameters)
        seconds = bench.seconds(lambda: distributed.sum_gradients(optimizer))  # noqa: B023
        size = sum(p.nbytes for p in parameters)
        least = 4 * size / bench.bandwidth  # into one piece and back, each read and written
        row = f"{name}: {size / 1e6:.3g} MB of gradients through NCCL, one process"
        bench.row(row, f"{1e3 * seconds:.3g} ms", f"{1e3 * least:.3g} ms", least / seconds)
    distributed.stop()


def main(args: Args) -> None:
    """Measure, and print the table."""
    on_cpu = args.cpu or args.tiny
    if not on_cpu and not torch.cuda.is_available():
        words = "--cpu --policies smolvla measures on the CPU, --tiny tries the code there"
        print(f"there is no GPU that PyTorch can use; {words}", file=sys.stderr)
        raise SystemExit(2)
    torch.manual_seed(0)
    device = torch.device("cpu" if on_cpu else "cuda")
    dtype = torch.float32 if on_cpu else torch.bfloat16
    machine = platform.machine() if on_cpu else torch.cuda.get_device_name()
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"
    drawn = f"drawing by {opengl().device}"
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}, {drawn}, commit {commit}\n")
    bench = Bench(device, dtype, args)
    trained = {name: shapes for name in args.policies if (shapes := measure(name, bench, args))}
    if device.type == "cuda":
        exchange(trained, bench)


if __name__ == "__main__":
    arguments = parse_args(Args)
    if arguments.tiny:  # its sizes are defaults
        arguments = parse_args(Args, TINY)
    with one_line_errors():
        main(arguments)
