"""What a policy is: the members that every script needs, and one's own policy from a file.

``docs/own-policy.md`` builds one in 40 lines and trains it.
"""

import json
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla_envs.inputs import in_short
from vla_envs.user_code import load_function

CAMERAS = ("image", "wrist_image")  # the images of an observation
MEMBERS = ("action_chunk", "image_size", "hidden_size", "sample", "score", "imitation_loss")


@runtime_checkable
class Policy(Protocol):
    """A torch module with these members; nothing else is asked of it.

    B is the number of observations in a call, C the number of control steps per decision, D the number of
    log-probabilities per decision, H the width of the hidden state. Observations are dictionaries of
    ``image`` (B, H, W, 3) uint8 and ``state`` (B, 8) float32, as arrays or tensors on the CPU; what is
    returned may be on the policy's own device.

    Optional members:
        describe() -> dict: Keyword arguments with which the function in the policy's file makes it again; a
            checkpoint keeps them, beside the weights, as JSON.
        head, norm, blocks: Modules that ``--train head`` and ``--train lora+last-k`` name.
        lora_targets: A regular expression of the names of the Linear layers that ``--train lora`` adapts; all
            of them by default.
        cameras: The images in the observations that it is shown, ``("image",)`` by default; the other one is
            ``wrist_image``.
        imitation_chunk: Control steps of the actions that ``imitation_loss`` takes; by default
            ``action_chunk``.
        expert: A list of modules that ``--train expert`` names.
        centre_states(states): Called once, before imitation from random weights, with all states (S, 8) of
            the demonstrations.
    """

    action_chunk: int  #: C; an environment executes as many control steps per decision.
    image_size: int  #: Height and width of the images that it is shown, in pixels.
    hidden_size: int  #: H.

    def sample(
        self,
        obs: dict[str, Any],
        instructions: list[str],
        temperature: float = 1.0,
        generators: list[torch.Generator] | None = None,
    ) -> tuple[NDArray[np.float32], Tensor, Tensor]:
        """Decide, without gradients.

        Args:
            obs: B observations.
            instructions: One per observation.
            temperature: How much chance there is in the decision; 0 is the deterministic action, by which a
                policy is judged.
            generators: One per observation, from which its random numbers are drawn, so that they do not
                depend on the rest of the batch; None: torch's own.

        Returns:
            Actions (B, C, 7) in [-1, 1]; tokens (B, ...), whatever ``score`` needs to know of the decision,
            for instance bin numbers, a Gaussian's sample or a chain of denoising; their log-probabilities
            (B, D), unsummed.
        """
        ...

    def score(
        self, obs: dict[str, Any], instructions: list[str], tokens: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities (B, D) of the tokens of ``sample``, entropies (B, D) and hidden states (B, H).

        With gradients. At the same weights and temperature the log-probabilities are those of ``sample``.
        Entropies are in nats. The hidden state is what a critic reads; it must not depend on the tokens.
        """
        ...

    def imitation_loss(
        self,
        obs: dict[str, Any],
        instructions: list[str],
        actions: Tensor,
        generators: list[torch.Generator] | None = None,
    ) -> Tensor:
        """What imitation minimises: a scalar, with gradients, of demonstrated actions (B, C, 7)."""
        ...

    # Of torch.nn.Module: parameters, named_parameters, named_buffers, state_dict, load_state_dict, to, train,
    # eval.


def blank_observations(policy: Any, count: int) -> dict[str, NDArray[Any]]:
    """``count`` observations that are zero, with the images that ``policy`` is shown."""
    size = policy.image_size
    images = {name: np.zeros((count, size, size, 3), np.uint8) for name in cameras_of(policy)}
    return {**images, "state": np.zeros((count, 8), np.float32)}


def cameras_of(policy: Any) -> tuple[str, ...]:
    """The images that ``policy`` is shown: ``image``, and ``wrist_image`` where it asks for that.

    Raises:
        ValueError: When it asks for one that the environments do not give.
    """
    cameras = tuple(getattr(policy, "cameras", CAMERAS[:1]))
    if not cameras or not set(cameras) <= set(CAMERAS):
        raise ValueError(f"the policy's cameras are {in_short(cameras)}; expected some of {CAMERAS}")
    return cameras


def is_own(name: str) -> bool:
    """Whether the name of a policy is that of one's own, ``path/to/file.py:function``."""
    return ".py:" in name


def make_own(name: str, config: dict[str, Any] | None = None) -> Any:
    """The policy that the function behind ``path/to/file.py:function`` returns, validated.

    Args:
        name: The file and the function in it. The file is the user's own Python code and is run as such.
        config: Keyword arguments, as the policy's ``describe`` gave them.

    Raises:
        ValueError: When there is no such function, it fails, or what it returns is not a policy; one line
            that names the member.
    """
    function = load_function(name, "policy")
    try:
        policy = function(**(config or {}))
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"policy {name!r} fails: {words}; expected it to return a policy") from error
    validate(policy, name)
    return policy


def validate(policy: Any, name: str) -> None:
    """Refuse what is not a ``Policy``, by two observations that are zero.

    Raises:
        ValueError: Names the member, what it gave and what was expected.
    """
    if not isinstance(policy, torch.nn.Module):
        raise ValueError(f"policy {name!r} is a {type(policy).__name__}; expected a torch.nn.Module")
    missing = [member for member in MEMBERS if not hasattr(policy, member)]
    if missing:
        raise ValueError(
            f"policy {name!r} has no {' and no '.join(missing)}; expected {', '.join(MEMBERS)}, which"
            " vla_envs.policies.Policy has"
        )
    sizes: list[int] = []
    for member in MEMBERS[:3]:
        value: Any = getattr(policy, member)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"policy {name!r}: {member} is {value!r}; expected a whole number above 0")
        sizes.append(value)
    chunk, _, width = sizes
    obs = blank_observations(policy, 2)
    words = ["pick up the milk and place it in the basket"] * 2

    def call(member: str, *arguments: Any) -> Any:
        try:
            return getattr(policy, member)(*arguments)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"policy {name!r}: {member} fails: {reason}") from error

    def expect(member: str, what: str, value: Any, shape: tuple[int, ...]) -> None:
        found = tuple(value.shape) if hasattr(value, "shape") else type(value).__name__
        if found != shape:
            raise ValueError(f"policy {name!r}: {member} returns {what} of {found}; expected {shape}")
        if not np.isfinite(torch.as_tensor(value).detach().float().cpu().numpy()).all():
            raise ValueError(f"policy {name!r}: {member} returns {what} that are not finite")

    if hasattr(policy, "describe"):
        described = call("describe")
        try:
            json.dumps(described)
        except (TypeError, ValueError) as error:
            raise ValueError(f"policy {name!r}: describe returns what JSON cannot hold: {error}") from None
        if not isinstance(described, dict) or described.keys() & {"policy", "made_for"}:
            raise ValueError(
                f"policy {name!r}: describe returns {in_short(described)}; expected a dictionary without"
                " 'policy' and 'made_for'"
            )
    training = policy.training
    policy.eval()
    with torch.random.fork_rng(devices=[]):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        sampled = call("sample", obs, words, 1.0, generators)
        if not isinstance(sampled, tuple) or len(sampled) != 3:
            raise ValueError(
                f"policy {name!r}: sample returns {in_short(sampled)}; expected actions, tokens and"
                " log-probabilities"
            )
        actions, tokens, logprobs = sampled
        expect("sample", "actions", actions, (2, chunk, 7))
        if getattr(logprobs, "ndim", 0) != 2:
            raise ValueError(f"policy {name!r}: sample returns log-probabilities without a shape of (2, D)")
        expect("sample", "log-probabilities", logprobs, (2, logprobs.shape[1]))
        if not isinstance(tokens, Tensor) or len(tokens) != 2 or tokens.dtype == torch.bfloat16:
            raise ValueError(
                f"policy {name!r}: sample returns tokens that are not a tensor of two rows, of one of NumPy's"
                " types"
            )
        if tokens.requires_grad or logprobs.requires_grad:
            raise ValueError(f"policy {name!r}: sample returns gradients; expected it under torch.no_grad()")
        scored = call("score", obs, words, tokens, 1.0)
        if not isinstance(scored, tuple) or len(scored) != 3:
            raise ValueError(
                f"policy {name!r}: score returns {in_short(scored)}; expected log-probabilities, entropies"
                " and hidden states"
            )
        expect("score", "log-probabilities", scored[0], tuple(logprobs.shape))
        expect("score", "entropies", scored[1], tuple(logprobs.shape))
        expect("score", "hidden states", scored[2], (2, width))
        gap = (scored[0].detach().cpu() - logprobs.cpu()).abs().max().item()
        if gap > 0.01:
            raise ValueError(
                f"policy {name!r}: score gives the tokens of sample other log-probabilities, by up to"
                f" {gap:.2g}; expected the same"
            )
        expect("imitation_loss", "a loss", call("imitation_loss", obs, words, torch.zeros(2, chunk, 7)), ())
    policy.train(training)
