"""How fast OpenVLA-7B is on one GPU, and how fast it could be there.

    python benchmarks/gpu.py          # on a GPU of 80 GB or more; no checkpoint is needed
    python benchmarks/gpu.py --tiny   # the same code on the CPU at a toy's size

The weights are random and of the true size, in bfloat16, with a LoRA adapter of rank 32 as in training. A
decision is one control step (openvla) or eight (openvla-oft) of one environment, from its rendered picture to
its action. Attainable is arithmetic with two speeds measured on the spot, a copy's and a large matmul's: the
bytes of decoding at the first, the FLOPs of all else at the second. Recomputing activations is no FLOP. The
TGRPO iteration decodes with CUDA graphs.

Aims: 32 at once at least 15 times the decisions per second of one; an update at least 35 % of the matmul's
rate; a TGRPO iteration of 8 environments and 200 steps under 3 minutes.
"""

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tokenizers
import torch
from torch.utils.flop_counter import FlopCounterMode

import vla_envs  # noqa: F401  (registers the environments)
from vla_envs.command_line import one_line_errors, parse_args
from vla_envs.policies.adapters import make_trainable
from vla_envs.policies.openvla import LlamaConfig, OpenVLAConfig, OpenVLAPolicy, ViTConfig
from vla_envs.render import opengl

ROOT = Path(__file__).parent.parent
TASK = "pick up the ketchup and place it in the basket"


@dataclass
class Args:
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
    tiny: bool = False
    """Try the code on the CPU: a toy in float32, few steps"""


TINY = Args(batches=(1, 32), micro_batches=(4,), group_size=2, steps=3, repeats=1)


def toy() -> OpenVLAConfig:
    """A network of every part, small enough for a test."""
    sizes = {"vocab_size": 512, "pad_token_id": 448, "hidden_size": 32, "intermediate_size": 48}
    llm = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    dino = ViTConfig(24, 3, 2, 48, 28, registers=2, cls_token=True, layer_scale=True)
    return OpenVLAConfig(dino, ViTConfig(32, 4, 4, 40, 28), llm)


@torch.no_grad()
def random_policy(config: OpenVLAConfig, dtype: torch.dtype, device: torch.device) -> OpenVLAPolicy:
    """An OpenVLA with random weights, actions from -1 to 1 and a tokenizer that knows no word."""
    policy = OpenVLAPolicy.allocate("random weights", config, dtype, device)
    for name, weight in policy.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=0.02)
        else:
            weight.fill_(not name.endswith("bias"))
    policy.q01, policy.q99, policy.normalised = -np.ones(7), np.ones(7), np.arange(7) < 6
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3}
    policy.tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    policy.tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    policy.dtype, policy.files = dtype, {}
    return make_trainable(policy.eval(), "lora")


class Bench:
    """A device, its two speeds, and the table."""

    def __init__(self, device: torch.device, dtype: torch.dtype, args: Args) -> None:
        self.device, self.repeats, tiny = device, args.repeats, args.tiny
        print("| | achieved | attainable | share | peak memory |\n| --- | --- | --- | --- | --- |")
        count = 2**22 if tiny else 2**31
        source, target = (torch.ones(count, dtype=torch.uint8, device=device) for _ in range(2))
        seconds = self.seconds(lambda: [target.copy_(source) for _ in range(10)])
        self.bandwidth = 10 * 2 * count / seconds  # bytes/s, read and written
        side = 256 if tiny else 8192
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

    def wait(self) -> None:
        """For all that the device has been given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def row(self, name: str, achieved: str, attainable: str = "", share: float | None = None) -> None:
        """Print a line of the table; with a share it has a peak of memory; at 0 that ran out."""
        cells = [name, achieved, attainable, "", ""]
        if share == 0:
            cells[1] = "out of memory"
        elif share is not None:
            cells[3] = f"{100 * share:.3g} %"
            if self.device.type == "cuda":
                cells[4] = f"{torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB"
        print("|", " | ".join(cells), "|", flush=True)


def flops(work: Callable[[], Any]) -> float:
    """Floating-point operations of ``work``."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


class Samples:
    """Decisions of a policy to measure: made-up images, one instruction."""

    def __init__(self, policy: OpenVLAPolicy, bench: Bench) -> None:
        self.policy, self.bench = policy, bench
        self.optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-5)
        self.flops_forward = flops(lambda: self.evaluate(1))  # in evaluation mode: nothing is recomputed
        self.flops_update = flops(lambda: self.update(1))

    def inputs(self, batch: int) -> tuple[dict[str, Any], list[str]]:
        """Observations and instructions."""
        image = np.random.default_rng(0).integers(0, 256, (batch, 256, 256, 3), dtype=np.uint8)
        return {"image": image}, [TASK] * batch

    @torch.no_grad()
    def evaluate(self, batch: int) -> None:
        """One pass over the images, the prompt and the action's tokens."""
        self.policy.score(*self.inputs(batch), self.tokens(batch))

    def update(self, batch: int) -> None:
        """One optimiser step."""
        self.optimizer.zero_grad()
        logprobs, _, _ = self.policy.score(*self.inputs(batch), self.tokens(batch))
        (-logprobs.mean()).backward()
        self.optimizer.step()

    def tokens(self, batch: int) -> torch.Tensor:
        """Action tokens (B, D)."""
        return torch.zeros(batch, 7 * self.policy.action_chunk, dtype=torch.int64, device=self.bench.device)

    def least(self, batch: int) -> float:
        """Seconds that ``batch`` decisions take at the device's two speeds."""
        weights = sum(p.nbytes for p in self.policy.parameters())
        once = max(batch * self.flops_forward / self.bench.rate, weights / self.bench.bandwidth)
        if self.policy.parallel:
            return once
        c, dino = self.policy.config.llm, self.policy.config.dino
        tokens = (dino.image_size // dino.patch_size) ** 2 + len(self.policy.prompt(TASK))
        cache = 2 * batch * tokens * c.num_hidden_layers * c.hidden_size * self.policy.dtype.itemsize
        llama = sum(p.nbytes for p in self.policy.blocks.parameters())
        return once + 6 * (llama + cache) / self.bench.bandwidth  # the first token comes with the prompt


def rollouts(name: str, samples: Samples, bench: Bench, args: Args) -> None:
    """Decisions per second at every batch size."""
    speeds = []
    for batch in args.batches:
        inputs, least = samples.inputs(batch), samples.least(batch)
        seconds = bench.seconds(lambda: samples.policy.sample(*inputs))  # noqa: B023
        speeds.append(batch / seconds)
        best = f"{batch / least:.3g}"
        bench.row(f"{name}: {batch} decide at once", f"{speeds[-1]:.3g} decisions/s", best, least / seconds)
    if 32 in args.batches and args.batches[0] == 1:
        attainable = 32 * samples.least(1) / samples.least(32)
        ratio = speeds[args.batches.index(32)] / speeds[0]
        bench.row(f"{name}: 32 at once over 1", f"{ratio:.3g} x", f"{attainable:.3g} x")


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


def tgrpo(samples: Samples, bench: Bench, args: Args) -> None:
    """Pictures per second, and a whole TGRPO iteration by the script's own functions."""
    sys.path.append(str(ROOT))
    import tgrpo_vla as script

    members, policy = args.group_size, samples.policy
    envs = gym.make_vec(
        "vla_envs/LiberoObject-v0", num_envs=members, task_id=4, image_size=policy.image_size,
        reward="multi_stage", max_episode_steps=args.steps,
    )  # fmt: skip
    envs.reset(seed=[0] * members)
    drawn = envs.unwrapped.seconds["render"]
    shown = min(args.steps - 1, 50)
    for _ in range(shown):
        envs.step(np.zeros(envs.action_space.shape))
    speed = shown * members / (envs.unwrapped.seconds["render"] - drawn)
    bench.row(f"rendering 256 px by {opengl().device}", f"{speed:.3g} images/s")

    settings = script.Args(
        policy="openvla", device=str(bench.device), train="lora", temperature=1.6, target_kl=math.inf,
        num_groups=1, group_size=members, minibatch_size=32 * members, micro_batch_size=32,
    )  # fmt: skip
    took: dict[str, float] = {}
    decisions = 0

    def iteration() -> None:
        nonlocal decisions
        start = time.perf_counter()
        batch = script.rollout(envs, policy, np.zeros(members, np.uint32), settings.temperature)
        took["rollout"] = time.perf_counter() - start
        advantages = script.tgrpo_advantages(batch["rewards"], batch["alive"], members, 0.3, 0.7)
        policy.train()
        b = script.samples_of(policy, batch, advantages, settings)
        decisions = len(b["who"])
        minibatches = torch.randperm(decisions).split(settings.minibatch_size)
        script.update(policy, samples.optimizer, b, minibatches, settings)
        policy.eval()

    seconds = bench.seconds(iteration, runs=1)
    per_sample = (samples.flops_forward + samples.flops_update) / bench.rate
    least = args.steps * samples.least(members) + decisions * per_sample
    achieved = f"{seconds:.3g} s, of it rollout {took.get('rollout', math.nan):.3g}"
    name = f"TGRPO, {members} x {args.steps} control steps, {decisions} decisions"
    bench.row(name, achieved, f"{least:.3g} s", least / seconds)
    envs.close()


def main(args: Args) -> None:
    """Measure, and print the table."""
    if not args.tiny and not torch.cuda.is_available():
        print("there is no GPU that PyTorch can use; --tiny tries the code on the CPU", file=sys.stderr)
        raise SystemExit(2)
    torch.manual_seed(0)
    device = torch.device("cpu" if args.tiny else "cuda")
    dtype = torch.float32 if args.tiny else torch.bfloat16
    machine = platform.machine() if args.tiny else torch.cuda.get_device_name()
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}, commit {commit}")
    policy = random_policy(toy() if args.tiny else OpenVLAConfig(), dtype, device)
    print()
    bench = Bench(device, dtype, args)
    for name in ("openvla-oft", "openvla", "openvla --cudagraphs"):
        policy.parallel, policy.cudagraphs = name == "openvla-oft", "--" in name
        samples = Samples(policy, bench)
        rollouts(name, samples, bench, args)
        if not policy.cudagraphs:
            updates(name, samples, bench, args)
    tgrpo(samples, bench, args)


if __name__ == "__main__":
    arguments = parse_args(Args)
    if arguments.tiny:  # its sizes are defaults
        arguments = parse_args(Args, TINY)
    with one_line_errors():
        main(arguments)
