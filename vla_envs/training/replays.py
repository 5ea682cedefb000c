"""What is kept from one iteration to the next: transitions, a target network, successful episodes.

And an expert who takes over.
"""

import copy
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_envs import distributed
from vla_envs.command_line import one_line_errors
from vla_envs.files import whole
from vla_envs.training import batches

#: Of a transition: (F,), (n,), (F,), and numbers; ``imitated`` is 1 for what is imitated, else 0.
PARTS = ("features", "actions", "next_features", "rewards", "ended", "returns", "imitated")


class Replay(nn.Module):
    """The last ``size`` transitions, in buffers, so that a run is resumed with them."""

    def __init__(self, size: int, features: int, actions: int) -> None:
        super().__init__()
        shapes = {"features": (features,), "next_features": (features,), "actions": (actions,)}
        for name in PARTS:
            self.register_buffer(name, torch.zeros(size, *shapes.get(name, ())))
        self.added: Tensor
        self.register_buffer("added", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return min(int(self.added), len(self.get_buffer("rewards")))

    def add(self, transitions: dict[str, Tensor]) -> None:
        """Add S transitions."""
        size = len(self.get_buffer("rewards"))
        last = torch.arange(len(transitions["rewards"]))[-size:]
        for name in PARTS:
            buffer = self.get_buffer(name)
            buffer[(int(self.added) + last) % size] = transitions[name][last].to(buffer)
        self.added += len(transitions["rewards"])

    def draw(self, count: int) -> list[Tensor]:
        """``PARTS`` of ``count`` transitions."""
        inds = torch.randint(len(self), (count,))
        return [self.get_buffer(name)[inds] for name in PARTS]


def discounted(rewards: Tensor, last: Tensor, gamma: float) -> Tensor:
    """Returns (S,) of the rewards (S,) of episodes one after the other; ``last`` (S,) is where each ends."""
    returns = rewards.clone()
    for i in reversed(range(len(rewards) - 1)):
        returns[i] += gamma * returns[i + 1] * ~last[i]
    return returns


def frozen_copy(module: nn.Module) -> Any:
    """A copy with buffers in place of parameters: saved with a run, and never trained."""
    module = copy.deepcopy(module)
    for part in list(module.modules()):
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return module


class Successes:
    """All episodes of a run that succeeded, of this process: in memory, and in files for a resumed run.

    Args:
        folder: Of the files, one for each iteration and process.
        iterations: How many the run has done; files of later ones are void.

    Raises:
        ValueError: When the files are gone, or one is damaged.
    """

    def __init__(self, folder: Path, iterations: int) -> None:
        self.folder, self.batches = folder, list[dict[str, Any]]()
        if iterations and not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is gone; expected the run's successful episodes there")
        folder.mkdir(exist_ok=True)
        files = list(folder.glob("*.pt"))
        whole_ones = {  # not those whose writing was cut off
            (int(its[1]), int(its[2])): file
            for file in files
            if (its := re.fullmatch(r"(\d+)-(\d+)", file.stem))
        }
        done = [file for (iteration, _), file in sorted(whole_ones.items()) if iteration <= iterations]
        for file in done[distributed.rank() :: distributed.world_size()]:
            try:
                self.batches.append(torch.load(file, weights_only=True))
            except (RuntimeError, UnpicklingError, EOFError) as error:
                raise ValueError(f"{str(file)!r} is damaged: {' '.join(str(error).split())}") from None
        if not distributed.rank():
            for file in set(files) - set(done):
                file.unlink()

    def exchange(self, batch: dict[str, Any], iteration: int) -> dict[str, Any]:
        """Add the successes of a rollout, and draw as many, without replacement, from all that there are."""
        won = batches.join([dict(batch)], [batch["success"]])
        file = self.folder / f"{iteration}-{distributed.rank()}.pt"
        with one_line_errors("the successful episodes cannot be written: "), whole(file) as partial:
            torch.save(won, partial)
        self.batches.append(won)
        sizes = [len(each["success"]) for each in self.batches]
        draw = torch.Generator().manual_seed(torch.initial_seed() + distributed.rank())  # own of each process
        order = torch.randperm(sum(sizes), generator=draw)  # (all of them,)
        drawn = (order < sizes[-1]).split(sizes)  # bools, batch by batch
        return batches.join([dict(each) for each in self.batches], list(drawn))


class Takeover:
    """The policy; ``after`` so many control steps of an episode an expert decides in its place.

    Args:
        policy: Of continuous actions, whose tokens (B, K + 1, n) end with the action.
        envs: The environments that it plays in.
        expert: A ``ScriptedExpert`` of them.
        after: Control steps.
    """

    def __init__(self, policy: Any, envs: Any, expert: Any, after: int) -> None:
        self.policy, self.envs, self.expert, self.after = policy, envs, expert, after

    def sample(self, obs: Any, instructions: Any, temperature: float, generators: Any) -> Any:
        """As the policy's."""
        actions, tokens, logprobs = self.policy.sample(obs, instructions, temperature, generators)
        if not self.envs.steps.any():
            self.expert.reset()
        who = np.flatnonzero(~self.envs.frozen)  # (A,) those that act
        for k in np.flatnonzero(self.envs.steps[who] >= self.after):
            actions[k] = self.expert([who[k]])[0][0]
            tokens[k, -1] = self.policy.held(torch.as_tensor(actions[k : k + 1])).flatten()
        return actions, tokens, logprobs
