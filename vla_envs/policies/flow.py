"""``flow``: continuous actions by flow matching on nano's backbone, as pi0 and TinyVLA have them.

A chunk of actions is drawn by denoising: x_0 is noise at time t = 1, and K steps of length d = 1/K along a
learned velocity v = noise - action lead to the actions x_K at t = 0. Deterministic steps (an ODE) have no
log-probability, so RL samples a chain of Gaussian steps x_{k+1} ~ N(mean_k, std_k^2), of two kinds:

    noise    mean_k                                     std_k        source
    fixed    x - d v                                    s            ReinFlow (arXiv 2505.22094)
    sde      x - d v - d s_t^2 / (2 t) (x + (1-t) v)    s_t sqrt(d)  Flow-SDE of pi_RL (arXiv 2510.25889)

with s = ``noise_level`` times the temperature and s_t = s sqrt(t / (1 - t)), at t = 1 that of 1 - t = d. The
second one's drift towards x + (1-t) v, the noise that x is made of, keeps the distribution that the ODE has.
The draw of x_0 does not depend on the policy, so it is in no log-probability. Actions are x_K; the gripper's
is continuous, and the environments look at its sign.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vla_envs.policies.nano import ACTION_DIM, SHIFT, Backbone, NanoConfig, draw, shift

FREQUENCIES = 8  # of the time's cosine and sine features


@dataclass(frozen=True)
class FlowConfig(NanoConfig):
    """Sizes of a flow policy; its defaults are the shipped checkpoint's."""

    head_width: int = 192
    denoising_steps: int = 4  # K
    noise: Literal["sde", "fixed"] = "sde"
    noise_level: float = 0.25  # at temperature 1, in units of the actions' full speed

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise not in ("sde", "fixed"):
            raise ValueError(f"noise {self.noise!r} is unknown; expected 'sde' or 'fixed'")
        level: Any = self.noise_level
        if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < float("inf"):
            raise ValueError(f"noise_level is {level!r}; expected a number above 0")


class FlowHead(nn.Module):
    """The velocity of a whole chunk from its noisy actions, the time and the backbone's hidden states."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        size, width = config.num_actions * ACTION_DIM, config.head_width
        self.condition = nn.Linear(config.num_actions * config.width, width)
        self.actions_in, self.time_in = nn.Linear(size, width), nn.Linear(2 * FREQUENCIES, width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, size)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocities ``(..., Q * 7)``, of the same leading dimensions as x and condition.

        Args:
            x: (..., Q * 7), noisy actions.
            t: (..., 1), their times, 1 noise and 0 action.
            condition: (..., head_width), what ``condition`` makes of the hidden states.
        """
        angles = t * (0.5 * math.pi * torch.arange(1, FREQUENCIES + 1, device=t.device))
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        y = F.gelu(self.actions_in(x) + self.time_in(features) + condition)
        y = y + self.fc2(F.gelu(self.fc1(y)))
        return self.out(F.gelu(y))


def sde_step(x: Tensor, velocity: Tensor, t: Tensor, d: float, scale: float) -> tuple[Tensor, Tensor]:
    """Mean (..., n) and standard deviation (..., 1) of Flow-SDE's step from x (..., n).

    Args:
        x: (..., n), x_k.
        velocity: (..., n), v.
        t: (..., 1), the time.
        d: Length of the step.
        scale: s; 0 makes the step the ODE's.
    """
    variance = scale**2 * t / (1.0 - t).clamp(min=d)  # s_t^2
    pull = d * variance / (2.0 * t)
    return x - d * velocity - pull * (x + (1.0 - t) * velocity), (d * variance).sqrt()


def densities(x: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Log-densities and entropies (nats) of normal draws x, of its shape; mean and std broadcast to it."""
    log_std = std.log() + 0.5 * math.log(2.0 * math.pi)
    logprobs = -0.5 * ((x - mean) / std) ** 2 - log_std
    return logprobs, (0.5 + log_std).expand_as(logprobs)


class FlowPolicy(Backbone):
    """Picture ``(B, H, W, 3)`` uint8, state ``(B, 8)`` and instructions to chunks of continuous actions.

    Its tokens are denoising chains x_0 ... x_K ``(B, K + 1, Q * 7)``, float32; its log-probabilities
    ``(B, K * Q * 7)`` are the log-densities of every number drawn for x_1 ... x_K, in the order of the chain.
    So one ratio per token is one per draw: a sum would leave any clip at once, a mean would hide the draws.
    """

    config: FlowConfig

    def __init__(self, config: FlowConfig = FlowConfig()) -> None:
        super().__init__(config)
        self.head = FlowHead(config)
        self._initialise()
        for layer in self.head.children():
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(self.head.out.weight)

    @property
    def settings(self) -> FlowConfig:
        """How actions are drawn."""
        return self.config

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Conditions ``(B, head_width)`` and hidden states ``(B, C, width)`` of prepared inputs."""
        hidden = self.hidden(inputs)
        return self.head.condition(hidden.flatten(1)), hidden

    def step(self, x: Tensor, k: Tensor, condition: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Mean ``(..., Q * 7)`` and standard deviation ``(..., 1)`` of the chain's step from x.

        Args:
            x: (..., Q * 7), x_k.
            k: (..., 1), which step, from 0.
            condition: (..., head_width).
            temperature: Scales the noise; 0 makes the step the ODE's.
        """
        d = 1.0 / self.config.denoising_steps
        t = 1.0 - k * d
        velocity, scale = self.head(x, t, condition), self.config.noise_level * temperature
        if self.config.noise == "fixed":
            return x - d * velocity, torch.full_like(t, scale)
        return sde_step(x, velocity, t, d, scale)

    def _densities(self, chain: Tensor, condition: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-densities and entropies ``(B, K * Q * 7)`` of the draws of a chain ``(B, K + 1, Q * 7)``."""
        k = torch.arange(self.config.denoising_steps, device=chain.device).view(1, -1, 1)
        mean, std = self.step(chain[:, :-1], k, condition.unsqueeze(1), temperature or 1.0)
        logprobs, entropies = densities(chain[:, 1:], mean, std)
        return logprobs.flatten(1), entropies.flatten(1)

    @torch.no_grad()
    def sample(
        self,
        obs: dict[str, Any],
        instructions: list[str],
        temperature: float = 1.0,
        generators: list[torch.Generator] | None = None,
    ) -> tuple[NDArray[np.float32], Tensor, Tensor]:
        """Actions ``(B, C, 7)`` in [-1, 1], chains ``(B, K + 1, Q * 7)``, log-densities ``(B, K * Q * 7)``.

        Args:
            obs: ``image`` and ``state`` as the environments give them.
            instructions: One sentence each.
            temperature: Scales the noise of every step; 0 follows the ODE from x_0 = 0, the middle of the
                noise, and gives the chain's log-densities at temperature 1.
            generators: One for each instruction, from which it draws; by default torch's own for all.
        """
        condition, _ = self(self.prepare(obs, instructions))
        x = condition.new_zeros(len(condition), self.config.num_actions * ACTION_DIM)
        if temperature > 0:
            x = draw("normal_", x, generators)
        chain = [x]
        for k in range(self.config.denoising_steps):
            mean, std = self.step(chain[-1], x.new_full((1, 1), k), condition, temperature)
            chain.append(mean + std * draw("normal_", x, generators) if temperature > 0 else mean)
        tokens = torch.stack(chain, dim=1)
        return (
            self.executed(tokens[:, -1].clamp(-1.0, 1.0)),
            tokens,
            self._densities(tokens, condition, temperature)[0],
        )

    def score(
        self, obs: dict[str, Any], instructions: list[str], tokens: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-densities and entropies (nats) ``(B, K * Q * 7)`` of chains, hidden ``(B, width)``."""
        condition, hidden = self(self.prepare(obs, instructions))
        return *self._densities(tokens, condition, temperature), hidden[:, 0]

    def imitation_loss(
        self,
        obs: dict[str, Any],
        instructions: list[str],
        actions: Tensor,
        generators: list[torch.Generator] | None = None,
    ) -> Tensor:
        """Flow matching (arXiv 2210.02747): mean squared error of velocities to actions ``(B, C, 7)``.

        Each sample has one time t, uniform in [0, 1], at which x = t noise + (1 - t) actions;
        it and the noise come from the sample's own of the ``generators``, or from torch's.
        """
        inputs = self.prepare(obs, instructions)
        if self.training:
            inputs["image"] = shift(inputs["image"], SHIFT, generators)
        condition, _ = self(inputs)
        target = self.held(actions.to(condition)).flatten(1)
        noise, t = draw("normal_", target, generators), draw("uniform_", target[:, :1], generators)
        velocity = self.head(t * noise + (1.0 - t) * target, t, condition)
        return F.mse_loss(velocity, noise - target)
