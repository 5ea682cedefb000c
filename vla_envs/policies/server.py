"""A policy that runs in an environment of its own, behind a websocket; it is evaluated and never trained.

The protocol is that of openpi's servers (Physical-Intelligence/openpi, ``src/openpi/serving`` and
``packages/openpi-client``): the server speaks first and sends its metadata; each observation that it is sent
is answered by one chunk of actions. Messages are MessagePack, with arrays as maps of bytes, dtype and shape.
What is sent are the observations of openpi's LIBERO example (``examples/libero/main.py``).

``docs/policy-servers.md`` starts one.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from vla_envs.inputs import in_short, nearest

SENT_SIZE = 224  # pixels of the images that are sent
CONNECT_S = 10.0  # seconds for a server to take the connection and to send its metadata
AHEAD = 2  # observations on their way, so that the next one lies there when a server has decided
LARGEST = 2**20  # bytes of a message from a server
#: What an address may set after ``?``, with the default and the most: control steps that are executed of a
#: chunk (openpi's example: 5 too), and seconds for an answer, the first of which servers compile for.
SETTINGS = {"replan": (5, 1000), "timeout": (120, 3600)}


def is_server(name: str) -> bool:
    """Whether the name of a policy is the address of a server, ``ws://host:port``."""
    return name.startswith(("ws://", "wss://"))


def settings_of(name: str) -> dict[str, int]:
    """What an address sets, ``ws://host:port?replan=10&timeout=120``, and the defaults of the rest.

    Raises:
        ValueError: When there is no such setting, or its value does not fit.
    """
    values = {key: default for key, (default, _) in SETTINGS.items()}
    for key, value in parse_qsl(urlsplit(name).query, keep_blank_values=True):
        if key not in SETTINGS:
            raise ValueError(
                f"policy {name!r} sets {key!r}; expected some of {list(SETTINGS)}"
                f"{nearest(key, list(SETTINGS))}"
            )
        most = SETTINGS[key][1]
        if not (value.isascii() and value.isdigit() and len(value) < 9 and 1 <= int(value) <= most):
            raise ValueError(
                f"policy {name!r}: {key} is {in_short(value)}; expected a number from 1 to {most}"
            )
        values[key] = int(value)
    return values


class ServerPolicy(nn.Module):
    """What an evaluation asks of a policy, answered by the server at an address.

    It has no parameters, ``score`` or ``imitation_loss``.

    Args:
        name: The address, with settings: ``ws://host:port?replan=10&timeout=120``.

    Raises:
        ValueError: When the address or its settings do not fit, or what answers is no policy server.
        OSError: When nothing answers within 10 seconds.
        ImportError: When the package ``websockets`` is missing.
    """

    image_size = 256  # pixels, as openpi's LIBERO example renders; ``SENT_SIZE`` are sent
    own_images = True  # a protocol's processing is not applied
    cameras = ("image", "wrist_image")
    hidden_size = 1  # of a critic, which PPO makes before it evaluates

    def __init__(self, name: str) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0))  # scripts make an optimiser before they evaluate
        settings = settings_of(name)
        self.action_chunk, self.timeout = settings["replan"], settings["timeout"]
        self.address = name.partition("?")[0]
        self._stack = contextlib.ExitStack()  # closes the connection
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        try:
            from websockets.exceptions import WebSocketException
            from websockets.sync.client import connect
        except ImportError:
            raise ImportError(
                "policy servers are asked with the package websockets; expected: pip install 'websockets>=15'"
            ) from None
        self._failures = (WebSocketException, OSError)
        began = time.monotonic()
        try:
            # Servers neither read nor answer pings while they decide, so none are sent.
            self._connection = self._stack.enter_context(
                connect(
                    self.address, open_timeout=CONNECT_S, close_timeout=1, ping_interval=None,
                    compression=None, proxy=None, max_size=LARGEST,
                )
            )  # fmt: skip
        except (*self._failures, ValueError) as error:
            raise ConnectionError(f"{self._it()} cannot be reached: {_words(error)}") from None
        left = max(0.0, CONNECT_S - (time.monotonic() - began))
        with self._one_line(left, f"sends no metadata, as openpi's servers do, within {CONNECT_S:.0f} s"):
            metadata = self._connection.recv()
        self._unpacked(metadata)

    def close(self) -> None:
        """End the connection."""
        self._stack.close()

    @torch.no_grad()
    def sample(
        self,
        obs: dict[str, Any],
        instructions: list[str],
        temperature: float = 1.0,
        generators: list[torch.Generator] | None = None,
    ) -> tuple[NDArray[np.float32], Tensor, Tensor]:
        """Actions (B, C, 7) in [-1, 1], C of each chunk that the server answers; no tokens, (B, 0) each.

        Args:
            obs: ``image`` and ``wrist_image`` (B, H, W, 3) uint8, ``state`` (B, 8) float32.
            instructions: One per observation.
            temperature, generators: Not used: what chance there is in a decision is the server's.

        Raises:
            OSError: When the server closes the connection or does not answer in time.
            RuntimeError: When it says that it has failed.
            ValueError: When its answer is no chunk of finite actions.
        """
        actions, sent = np.empty((len(instructions), self.action_chunk, 7), np.float32), 0
        stalls = f"does not answer within {self.timeout} s; ?timeout=N sets other seconds"
        try:
            for row in range(len(actions)):
                with self._one_line(self.timeout, stalls):
                    while sent < min(row + AHEAD, len(actions)):
                        shown = {name: array[sent] for name, array in obs.items()}
                        self._connection.send(request(shown, instructions[sent]))
                        sent += 1
                    answer = self._connection.recv()
                actions[row] = self._chunk(self._unpacked(answer))
        except BaseException:
            self.close()  # else a later call would read the answers to this one
            raise
        nothing = torch.zeros(len(actions), 0)
        return actions, nothing, nothing

    def _chunk(self, answer: dict[Any, Any]) -> NDArray[np.float32]:
        """The actions (C, 7) of an answer that are executed, in [-1, 1]."""
        expected = f"expected 'actions' of shape (at least {self.action_chunk}, 7)"
        if "actions" not in answer:
            raise ValueError(f"{self._it()} answers with {in_short(list(answer))}; {expected}")
        try:
            actions = _array(answer["actions"])
        except Exception as error:  # NumPy's, about dtype, shape and size
            words = _words(error)
            raise ValueError(f"{self._it()} answers with actions that are no array: {words}") from None
        if actions.ndim != 2 or actions.shape[1] != 7 or len(actions) < self.action_chunk:
            fewer = f"; ?replan=N executes fewer than {self.action_chunk}" * (actions.shape[1:] == (7,))
            raise ValueError(f"{self._it()} answers with actions of shape {actions.shape}; {expected}{fewer}")
        if not np.isfinite(actions).all():
            raise ValueError(f"{self._it()} answers with actions that are not finite; expected numbers")
        return actions[: self.action_chunk].clip(-1.0, 1.0)

    def _unpacked(self, message: str | bytes) -> dict[Any, Any]:
        """The map in a message; a text is how servers say what went wrong, with a traceback."""
        if isinstance(message, str):
            raise RuntimeError(f"{self._it()} has failed: {in_short(message.strip().split(chr(10))[-1])}")
        try:
            answer = msgspec.msgpack.decode(message)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ValueError(f"{self._it()} sends what is not MessagePack: {_words(error)}") from None
        if not isinstance(answer, dict):
            raise ValueError(f"{self._it()} sends {in_short(answer)}; expected a map")
        return answer

    def _it(self) -> str:
        return f"the policy server at {self.address}"

    @contextlib.contextmanager
    def _one_line(self, seconds: float, stalls: str) -> Iterator[None]:
        """Cut the connection after ``seconds``, and say in one line that the server ``stalls`` or has gone.

        A timer does it, because a full socket blocks ``send``, which has no limit of its own.
        """
        began = time.monotonic()
        timer = threading.Timer(seconds, _shut, [self._connection.socket])
        timer.daemon = True
        timer.start()
        try:
            yield
        except self._failures as error:
            if time.monotonic() - began >= seconds:
                raise TimeoutError(f"{self._it()} {stalls}") from None
            raise ConnectionError(f"{self._it()} has closed the connection: {_words(error)}") from None
        finally:
            timer.cancel()


def request(obs: dict[str, NDArray[Any]], instruction: str) -> bytes:
    """What a server is sent of one environment.

    Args:
        obs: ``image`` and ``wrist_image`` (H, W, 3) uint8, which are resized to 224 pixels as openpi's client
            does it (Pillow, bilinear; they are square, so nothing is padded), and ``state`` (8,) float32.
        instruction: The sentence.
    """
    message: dict[str, Any] = {"observation/state": _packed(obs["state"]), "prompt": instruction}
    for name in ("image", "wrist_image"):
        image = Image.fromarray(obs[name]).resize((SENT_SIZE, SENT_SIZE), Image.Resampling.BILINEAR)
        message[f"observation/{name}"] = _packed(np.asarray(image))
    return msgspec.msgpack.encode(message)


def _packed(array: NDArray[Any]) -> dict[bytes, Any]:
    """An array as openpi's messages have it."""
    return {
        b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape,
    }  # fmt: skip


def _array(value: Any) -> NDArray[np.float32]:
    """An array of a message, or the same as lists of numbers, as float32; nothing but real numbers."""
    if isinstance(value, dict):
        kind = np.dtype(str(value[b"dtype"]))
        if kind.kind not in "fiu":
            raise ValueError(f"its dtype is {kind}; expected real numbers")
        array = np.frombuffer(value[b"data"], kind).reshape(value[b"shape"])
    else:
        array = np.asarray(value)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"it is {in_short(value)}; expected numbers")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused
        return array.astype(np.float32)


def _shut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        connected.shutdown(socket.SHUT_RDWR)


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
