"""LeRobot's flow-matching policies as a ``Policy``: a chunk of actions, denoised, with log-probabilities.

As in ``vla_envs/policies/flow.py``, a chunk is drawn by K steps of length d = 1/K from x_0, noise at time 1,
to the actions x_K. Steps of the ODE, x - d v, have no log-probability, so RL makes some of them random:

    noise     steps that are random           mean                   std
    sde-one   one, drawn for each decision    Flow-SDE's, flow.py    s_t sqrt(d)
    sde       all                             Flow-SDE's, flow.py    s_t sqrt(d)
    learned   all                             x - d v                of a small network, trained with the rest

(pi_RL, arXiv 2510.25889, whose Flow-Noise is ``learned``). Of the C actions in a chunk, of D = 32 numbers
each, LIBERO executes the first H, of 7 numbers; only these count in a log-probability. All of the draw is
kept, since the velocity reads all of it. For the executed numbers the density is exact at the last step; in
earlier ones the rest of the draw reaches the actions too, which is left out for less variance, as in RLinf.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vla_envs.files import write_json
from vla_envs.inputs import in_short, nearest
from vla_envs.machine import memory
from vla_envs.policies.flow import densities, sde_step
from vla_envs.policies.images import lerobot_pixels
from vla_envs.policies.lerobot.files import ACTION_DIM, STATE_DIM, Published, read, weights_of
from vla_envs.policies.lerobot.kept import Kept, together
from vla_envs.policies.lerobot.smolvla import SmolVLA
from vla_envs.policies.nano import draw
from vla_envs.policies.published import make_room
from vla_envs.policies.tensors import read_tensors

NOISES = ("sde-one", "sde", "learned")
EXECUTED = 10  # control steps per decision: of 50, as published, a policy is blind for too long
LEARNED_STD = (0.08, 0.16)  # between which the learned standard deviation lies
OWN, OWN_NOISE = "vla_envs.json", "noise.safetensors"  # what LeRobot's files have no place for
KEPT = 4  # the part of the machine's memory that what was read may take: a fourth
IMAGE_SIZE = 256  # pixels, of LIBERO's data sets in LeRobot's format


def network_of(kind: str) -> Any:
    """The class of the network that LeRobot calls ``kind``, smolvla or pi0."""
    if kind == "smolvla":
        return SmolVLA
    from vla_envs.policies.lerobot.pi0 import Pi0  # transformers takes seconds

    return Pi0


@dataclasses.dataclass(frozen=True)
class FlowSettings:
    """How a policy's chunks are denoised and executed, in RL and when it plays.

    Attributes:
        action_chunk: H, control steps per decision.
        denoising_steps: K.
        noise: Which steps are random.
        noise_level: s, at temperature 1, in units of normalised actions.
    """

    action_chunk: int = EXECUTED
    denoising_steps: int = 10
    noise: str = "sde-one"
    noise_level: float = 0.5

    def __post_init__(self) -> None:
        for name in ("action_chunk", "denoising_steps"):
            value: Any = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 1000:
                raise ValueError(f"{name} is {in_short(value)}; expected an int from 1 to 1000")
        if self.noise not in NOISES:
            raise ValueError(
                f"noise {in_short(self.noise)} is unknown; expected one of {', '.join(NOISES)}"
                f"{nearest(str(self.noise), list(NOISES))}"
            )
        level: Any = self.noise_level
        if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < float("inf"):
            raise ValueError(f"noise_level is {in_short(level)}; expected a number above 0")


class LearnedNoise(nn.Module):
    """Flow-Noise's standard deviations (B, C, D) of the expert's hidden states (B, C, width)."""

    def __init__(self, width: int, action_dim: int) -> None:
        super().__init__()
        sizes = (width, 128, 64, action_dim)
        layers = [(nn.Linear(*size), nn.Tanh()) for size in itertools.pairwise(sizes)]
        self.layers = nn.Sequential(*(part for layer in layers for part in layer))

    def forward(self, hidden: Tensor) -> Tensor:
        least, most = np.log(LEARNED_STD)
        return (least + (most - least) * (self.layers(hidden) + 1.0) / 2.0).exp()


class LeRobotPolicy(nn.Module):
    """A network of ``network_of`` with the interface of every policy.

    Its tokens are, with the noise ``sde-one``, k, x_k and x_{k+1} in one row ``(B, 1 + 2 C D)``, else the
    whole chain ``(B, K + 1, C, D)``, float32. Its log-probabilities ``(B, J H 7)`` are the log-densities of
    the executed numbers in the J steps that are random.
    """

    image_size = IMAGE_SIZE
    own_images = True  # it processes the images itself
    made_for: dict[str, list[int]] | None = None

    def __init__(self, model: Any, published: Published, settings: FlowSettings) -> None:
        super().__init__()
        self.model, self.published = model, published
        self.state, self.action = published.state, published.action  # how they are normalised
        self.settings = settings
        if settings.action_chunk > self.imitation_chunk:
            raise ValueError(
                f"action_chunk is {settings.action_chunk}; expected at most {self.imitation_chunk}, the"
                " actions that it predicts"
            )
        self.noise_head = None
        if settings.noise == "learned":
            self.noise_head = LearnedNoise(model.expert_width, model.config.action_dim)
        self._names = model.names()  # before LoRA gives it others
        self._words: dict[str, list[int]] = {}
        self.kept = Kept(memory() // KEPT)
        self.register_load_state_dict_post_hook(lambda module, _: module.kept.clear())

    @classmethod
    def load(
        cls, kind: str, checkpoint: str | Path, device: Any = None, dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> "LeRobotPolicy":  # fmt: skip
        """The policy of a checkpoint, a folder in LeRobot's format or a repository of the hub.

        Args:
            kind: LeRobot's name of the network, see ``network_of``.
            checkpoint: The folder or repository.
            device: Where its weights go [cpu]; on ``"meta"`` the checkpoint is checked and nothing kept.
            dtype: Of the weights, but for the small ones that are always float32 [bfloat16 on a GPU, else
                float32].
            settings: Of ``FlowSettings`` [those in a checkpoint that was saved here, else its defaults with
                the checkpoint's own number of denoising steps].

        Raises:
            ValueError: When the checkpoint or a setting does not fit.
        """
        device = torch.device(device or "cpu")
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        published = read(checkpoint, kind)
        network = network_of(kind)
        kept = published.its_json(OWN)
        with torch.device("meta"):
            model = network.of(published)
        usual = {
            "action_chunk": min(EXECUTED, model.config.action_chunk),
            "denoising_steps": published.config.get(network.steps_key, 10),
        }
        expected, names = model.state_dict(), model.names()
        tensors = weights_of(published, expected, names, model.unused)
        saved = FlowSettings(**usual | kept.get("settings", {}))
        chosen = dataclasses.replace(saved, **settings)
        if chosen.noise == "learned" and chosen.noise_level != saved.noise_level:
            raise ValueError(f"noise_level is {chosen.noise_level}; expected none with learned noise")
        policy = cls(model, published, chosen)
        if device.type == "meta":
            return policy
        make_room(str(checkpoint), sum(p.numel() for p in model.parameters()), dtype, device)
        own = {
            name: tensor.to(device, torch.float32 if tensor.ndim < 2 or model.is_float32(name) else dtype)
            for name, tensor in tensors
        }
        model.load_state_dict(own, assign=True)
        if policy.noise_head is not None and (published.folder / OWN_NOISE).is_file():
            its = policy.noise_head.state_dict()
            policy.noise_head.load_state_dict(read_tensors(published.folder / OWN_NOISE, its))
        policy.made_for = kept.get("made_for")
        return policy.to(device).eval()

    def save(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write ``weights`` as a checkpoint that LeRobot reads, with what only this package knows beside."""
        steps = {"n_action_steps": self.action_chunk, self.model.steps_key: self.settings.denoising_steps}
        its = {file_name: weights[f"model.{name}"] for name, file_name in self._names.items()}
        for name, same in self.model.unused.items():
            its[name] = its[same].clone() if same else torch.zeros(self.published.shapes[name])
        self.published.write(its, folder, **steps)
        (folder / OWN_NOISE).unlink(missing_ok=True)  # of the checkpoint that this one was trained from
        if self.noise_head is not None:
            its = {name: weights[f"noise_head.{name}"] for name in self.noise_head.state_dict()}
            safetensors.torch.save_file(its, folder / OWN_NOISE)
        made_for = {"made_for": self.made_for} if self.made_for else {}
        write_json(folder / OWN, {"settings": dataclasses.asdict(self.settings)} | made_for)

    # ---- What scripts ask a policy ----

    @property
    def cameras(self) -> tuple[str, ...]:
        """The images that it is shown."""
        return self.published.cameras

    @property
    def action_chunk(self) -> int:
        """Control steps that one decision covers."""
        return self.settings.action_chunk

    @property
    def imitation_chunk(self) -> int:
        """Control steps that it predicts, and is trained to imitate."""
        return self.model.config.action_chunk

    @property
    def hidden_size(self) -> int:
        """Width of the ``hidden`` that a critic reads."""
        return self.model.hidden_size

    @property
    def head(self) -> nn.Module:
        """The expert's hidden states to velocities."""
        return self.model.action_out_proj

    @property
    def norm(self) -> nn.Module:
        """What comes before the head."""
        return self.model.norm

    @property
    def blocks(self) -> nn.ModuleList:
        """The expert's layers."""
        return self.model.blocks

    @property
    def expert(self) -> list[nn.Module]:
        """What LeRobot trains by default."""
        return self.model.trained

    @property
    def lora_targets(self) -> str:
        """Linear layers that LoRA adapts."""
        return rf"model\.({self.model.lora_targets})"

    # ---- Observations ----

    def prepare(self, obs: dict[str, Any], instructions: list[str]) -> tuple[Tensor, ...]:
        """The network's inputs, see its ``prefix``: images, their masks, words, their mask, and states.

        Raises:
            ValueError: When an image is missing, or an instruction has a word that the network does not know.
        """
        device, c = self.state.offset.device, self.model.config
        pixels = []
        for name in self.cameras:
            images = torch.as_tensor(self._image(obs, name)).to(device)  # (B, H, W, 3)
            pixels.append(lerobot_pixels(images, c.image_size, self.model.centred))
        for text in set(instructions) - self._words.keys():
            self._words[text] = self.published.words(text)
            if max(self._words[text], default=0) >= c.vocabulary:
                raise ValueError(f"its tokenizer has words for {text!r} that the network does not know")
        words = [torch.tensor(self._words[text]) for text in instructions]
        tokens = nn.utils.rnn.pad_sequence(words, batch_first=True).to(device)  # (B, L)
        lengths = torch.tensor([len(row) for row in words], device=device)  # (B,)
        there = torch.arange(tokens.shape[1], device=device) < lengths.unsqueeze(1)  # (B, L)
        masks = torch.ones(len(words), len(pixels), dtype=torch.bool, device=device)  # (B, V)
        return torch.stack(pixels, 1), masks, tokens, there, self.states(obs)

    def _image(self, obs: dict[str, Any], name: str) -> NDArray[np.uint8]:
        """A camera's images (B, H, W, 3)."""
        if name not in obs:
            raise ValueError(
                f"the policy takes {', '.join(self.cameras)}, and the observations have no {name};"
                " expected environments with wrist_camera=True"
            )
        return np.ascontiguousarray(obs[name])

    def states(self, obs: dict[str, Any]) -> Tensor:
        """States (B, state_dim), normalised and padded with 0."""
        given = torch.as_tensor(obs["state"], dtype=torch.float32)  # (B, 8)
        state = self.state(given.to(self.state.offset.device))
        return F.pad(state, (0, self.model.config.state_dim - STATE_DIM))

    def prefix(self, obs: dict[str, Any], instructions: list[str], playing: bool | None = None) -> Any:
        """The network's prefix of observations.

        Where the language model is frozen, what it reads while ``playing`` is kept, so that an update does
        not read it again; ``None`` keeps and looks up nothing.
        """
        if trained := any(parameter.requires_grad for parameter in self.model.vlm.parameters()):
            self.kept.clear()
        if trained or playing is None:
            return self.model.prefix(*self.prepare(obs, instructions))
        names = self.kept.names([self._image(obs, name) for name in self.cameras], instructions)
        rows = self.kept.rows(names)
        unknown = {name: i for i, name in enumerate(names) if name not in rows}  # each once
        if unknown:
            inds = list(unknown.values())
            some = {name: torch.as_tensor(array)[inds] for name, array in obs.items()}
            *inputs, _ = self.prepare(some, [instructions[i] for i in inds])
            rows |= self.kept.add(list(unknown), self.model.read(*inputs), push=playing)
        state = self.states(obs)
        return self.model.with_state(together([rows[name] for name in names], state.device), state)

    # ---- The chain ----

    def step(self, x: Tensor, k: Tensor, prefix: Any, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """The ODE's next actions (B, C, D); mean (B, C, D) and std (B, 1 or C, 1 or D) of a random step.

        Args:
            x: (B, C, D), x_k.
            k: (B,) int64, which step, from 0.
            prefix: Of the observations.
            temperature: Scales the noise; above 0.
        """
        d = 1.0 / self.settings.denoising_steps
        t = (1.0 - k.double() * d).float()  # (B,), rounded once: the fastest of its features turns by 1571 t
        hidden = self.model.denoise(x, t, prefix)  # (B, C, width)
        velocity = self.model.action_out_proj(hidden)  # (B, C, D)
        ahead = x - d * velocity
        if self.noise_head is not None:
            return ahead, ahead, temperature * self.noise_head(hidden)
        scale = self.settings.noise_level * temperature
        return ahead, *sde_step(x, velocity, t.view(-1, 1, 1), d, scale)

    def chain(
        self, prefix: Any, x: Tensor, noise: Any, random: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """The chain x_0 ... x_K (B, K + 1, C, D), and the log-densities (B, K, H, 7) of its steps.

        Args:
            prefix: Of the observations.
            x: (B, C, D), x_0.
            noise: For each step what is drawn for it, (B, C, D); not asked for at temperature 0.
            random: (B, K) bool, the steps that are random; the others are the ODE's.
            temperature: Scales the noise; 0: no step is random, and densities are those at temperature 1.
        """
        chain, logprobs = [x], []
        for k in range(self.settings.denoising_steps):
            steps = torch.full((len(x),), k, device=x.device)  # (B,)
            ahead, mean, std = self.step(chain[-1], steps, prefix, temperature or 1.0)
            if temperature > 0:
                ahead = torch.where(random[:, k, None, None], mean + std * noise(k), ahead)
            logprobs.append(self._executed(ahead, mean, std)[0])
            chain.append(ahead)
        return torch.stack(chain, dim=1), torch.stack(logprobs, dim=1)

    def _executed(self, x: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities and entropies (B, H, 7) of the numbers in x (B, C, D) that are executed."""
        x, mean, std = (each[:, : self.action_chunk, :ACTION_DIM] for each in (x, mean, std))
        return densities(x, mean, std)

    @torch.no_grad()
    def sample(
        self,
        obs: dict[str, Any],
        instructions: list[str],
        temperature: float = 1.0,
        generators: list[torch.Generator] | None = None,
    ) -> tuple[NDArray[np.float32], Tensor, Tensor]:
        """Actions (B, H, 7) in [-1, 1], tokens, and their log-densities (B, J H 7).

        Args:
            obs: ``state`` and the images of ``cameras``, as the environments give them.
            instructions: One sentence each.
            temperature: Scales the noise of random steps; 0 follows the ODE from an x_0 that is drawn, as
                published evaluations do, and gives the log-densities at temperature 1.
            generators: One for each instruction, from which it draws; by default torch's own for all. They
                are a rollout's: without them nothing is kept for an update.
        """
        c, steps = self.model.config, self.settings.denoising_steps
        prefix = self.prefix(obs, instructions, playing=None if generators is None else True)
        like = prefix.hidden.new_zeros(len(instructions), c.action_chunk, c.action_dim)  # (B, C, D)
        x = draw("normal_", like, generators)
        if self.settings.noise == "sde-one":
            k = (steps * draw("uniform_", like[:, 0, :1], generators)).long().clamp(max=steps - 1)  # (B, 1)
            random, noise = k == torch.arange(steps, device=k.device), draw("normal_", like, generators)
            chain, logprobs = self.chain(prefix, x, lambda _: noise, random, temperature)
            rows = torch.arange(len(k), device=k.device)
            pair = chain[rows.unsqueeze(1), torch.cat([k, k + 1], dim=1)]  # (B, 2, C, D)
            tokens = torch.cat([k.float(), pair.flatten(1)], dim=1)  # (B, 1 + 2 C D)
            logprobs = logprobs[rows, k[:, 0]]  # (B, H, 7)
        else:
            random = torch.ones(len(x), steps, dtype=torch.bool, device=x.device)
            chain, logprobs = self.chain(
                prefix, x, lambda _: draw("normal_", like, generators), random, temperature
            )
            tokens = chain
        actions = self.action.inverse(chain[:, -1, : self.action_chunk, :ACTION_DIM]).clamp(-1.0, 1.0)
        return actions.cpu().numpy(), tokens, logprobs.flatten(1)

    def score(
        self, obs: dict[str, Any], instructions: list[str], tokens: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-densities and entropies (B, J H 7) of the random steps in tokens, and hidden states (B, H).

        With one random step this takes one pass through the expert, else K.
        """
        prefix, c = self.prefix(obs, instructions, playing=False), self.model.config
        if self.settings.noise == "sde-one":
            k, pair = tokens[:, :1].long(), tokens[:, 1:].unflatten(1, (2, c.action_chunk, c.action_dim))
            before, after = pair[:, :1], pair[:, 1:]  # (B, 1, C, D)
        else:
            before, after = tokens[:, :-1], tokens[:, 1:]  # (B, K, C, D)
            k = torch.arange(before.shape[1], device=tokens.device).expand(len(tokens), -1)  # (B, K)
        parts = []
        for j in range(k.shape[1]):
            _, mean, std = self.step(before[:, j], k[:, j], prefix, temperature or 1.0)
            parts.append(self._executed(after[:, j], mean, std))
        logprobs, entropies = (torch.stack(part, dim=1).flatten(1) for part in zip(*parts))
        return logprobs, entropies, prefix.hidden

    # ---- Imitation ----

    def imitation_loss(
        self,
        obs: dict[str, Any],
        instructions: list[str],
        actions: Tensor,
        generators: list[torch.Generator] | None = None,
    ) -> Tensor:
        """Flow matching (arXiv 2210.02747) to demonstrated actions (B, C, 7), as LeRobot trains.

        Each sample has one time, 0.001 + 0.999 Beta(1.5, 1), which with the noise comes from the sample's own
        of the ``generators``, or from torch's.
        """
        prefix, c = self.prefix(obs, instructions), self.model.config
        target = self.action(actions.to(prefix.hidden))  # (B, C, 7)
        noise = draw("normal_", target.new_zeros(*target.shape[:2], c.action_dim), generators)  # (B, C, D)
        u = draw("uniform_", target[:, 0, 0], generators)  # (B,)
        t = 0.001 + 0.999 * u ** (1.0 / 1.5)
        return self.flow_loss(prefix, target, noise, t).mean()

    def flow_loss(self, prefix: Any, target: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Squared errors (B, C, 7) of velocities at the times t (B,) between noise (B, C, D) and a target.

        Args:
            prefix: Of the observations.
            target: (B, C, 7), normalised actions.
            noise: (B, C, D).
            t: (B,), 1 is noise and 0 the target.
        """
        padded = F.pad(target, (0, noise.shape[2] - ACTION_DIM))
        x = torch.lerp(padded, noise, t.view(-1, 1, 1))
        velocity = self.model.velocity(x, t, prefix)
        return (velocity - (noise - padded))[..., :ACTION_DIM].square()
