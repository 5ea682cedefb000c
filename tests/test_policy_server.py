"""``--policy ws://host:port``: what a policy server is sent and believed, and that episodes go as it decides.

The servers here are real ones, of ``websockets``, that follow openpi's protocol as it is published; those of
openpi's own package skip where it is missing, as it asks for an older NumPy.
"""

import contextlib
import importlib.util
import json
import socket
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import grpo_vla
import ppo_vla
import sft_vla
import tgrpo_vla
from vla_envs import robustness
from vla_envs.files import read_json
from vla_envs.policies import load_policy, new_policy, server
from vla_envs.training import evaluation

msgpack = pytest.importorskip("msgpack")
ServerProtocol = pytest.importorskip("websockets.server").ServerProtocol
serve = pytest.importorskip("websockets.sync.server").serve

ZEROS = np.zeros((8, 7), np.float32)
SCRIPTS = {"tgrpo": tgrpo_vla, "grpo": grpo_vla, "ppo": ppo_vla, "sft": sft_vla}


def pack(value):
    def array(value):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }

    return msgpack.packb(value, default=array)


def unpack(message):
    def array(value):
        if b"__ndarray__" not in value:
            return value
        return np.frombuffer(value[b"data"], value[b"dtype"]).reshape(value[b"shape"])

    return msgpack.unpackb(message, object_hook=array)


@pytest.fixture
def start():
    """Start a server whose connections are handled by a function; its address."""
    with contextlib.ExitStack() as stack:

        def start(handler, port=0):
            served = stack.enter_context(serve(handler, "127.0.0.1", port, compression=None, max_size=None))
            thread = threading.Thread(target=served.serve_forever, daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(served.shutdown)
            return f"ws://127.0.0.1:{served.socket.getsockname()[1]}"

        yield start


def answering(infer):
    """openpi's protocol: metadata, then an answer to each observation."""

    def handler(connection):
        connection.send(pack({"model": "a test's"}))
        for message in connection:
            answer = infer(unpack(message))
            connection.send(answer if isinstance(answer, str | bytes) else pack(answer))

    return handler


@pytest.fixture
def openpis_own():
    """Serve a function by openpi's own package; its address."""
    if importlib.util.find_spec("openpi_server") is None:
        pytest.skip("openpi_server is missing: pip install --no-deps openpi-server openpi-client msgpack")
    from openpi_server import WebsocketPolicyServer

    def start(infer):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        policy = SimpleNamespace(infer=infer)
        its = WebsocketPolicyServer(policy, "127.0.0.1", port, {"model": "a test's"})
        threading.Thread(target=its.serve_forever, daemon=True).start()
        for _ in range(200):  # until it listens
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
                break
        return f"ws://127.0.0.1:{port}"

    return start


def observations(count, size=256):
    rng = np.random.default_rng(0)
    image, wrist_image = rng.integers(0, 256, (2, count, size, size, 3), np.uint8)
    state = np.arange(8 * count, dtype=np.float32).reshape(count, 8) / 100
    return {"image": image, "wrist_image": wrist_image, "state": state}


# ---- What is sent and what is done with the answer -----------------------------------------------------


def test_an_observation_is_that_of_openpis_example():
    obs = {name: array[0] for name, array in observations(1).items()}
    sent = unpack(server.request(obs, "pick up the milk"))
    assert sent.pop("prompt") == "pick up the milk"
    shapes = {name: (array.shape, array.dtype) for name, array in sent.items()}
    assert shapes == {
        "observation/image": ((224, 224, 3), np.uint8),
        "observation/wrist_image": ((224, 224, 3), np.uint8),
        "observation/state": ((8,), np.float32),
    }
    np.testing.assert_array_equal(sent["observation/state"], obs["state"])


def test_images_are_resized_as_by_openpis_client():
    tools = pytest.importorskip("openpi_client.image_tools")
    codec = pytest.importorskip("openpi_client.msgpack_numpy")
    obs = {name: array[0] for name, array in observations(1).items()}
    sent = codec.unpackb(server.request(obs, "pick up the milk"))
    for name in ("image", "wrist_image"):
        expected = tools.convert_to_uint8(tools.resize_with_pad(obs[name], 224, 224))
        np.testing.assert_array_equal(sent[f"observation/{name}"], expected)


@pytest.mark.parametrize("query, length", [("", 5), ("?replan=3", 3), ("?timeout=9&replan=1", 1)])
def test_every_observation_has_its_own_answer(start, query, length):
    """The state comes back as actions: first it is within [-1, 1], then it is not."""

    def infer(obs):
        return {"actions": np.tile(obs["observation/state"][:7].astype(np.float64), (6, 1)), "more": [1, "a"]}

    policy = load_policy(start(answering(infer)) + query)
    assert policy.action_chunk == length
    for count in (1, 2, 7):
        obs = observations(count)
        obs["state"] *= 3
        actions, tokens, logprobs = policy.sample(obs, ["pick up the milk"] * count)
        expected = np.repeat(obs["state"][:, None, :7], length, axis=1).clip(-1, 1)
        np.testing.assert_allclose(actions, expected, rtol=1e-6)
        assert actions.dtype == np.float32 and tokens.shape == logprobs.shape == (count, 0)


def test_lists_of_numbers_are_actions_too(start):
    policy = load_policy(start(answering(lambda obs: {"actions": [[0, 0.5, 1, 0, 0, 0, -1]] * 5})))
    assert policy.sample(observations(1), ["pick"])[0][0, 4].tolist() == [0, 0.5, 1, 0, 0, 0, -1]


# ---- Mistakes, of a user or of a server ----------------------------------------------------------------


def array_of(dtype, shape, data=bytes(140)):
    return {"actions": {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"actions": ZEROS[:, :6]}, r"of shape \(8, 6\); expected 'actions' of shape \(at least 5, 7\)$"),
        ({"actions": ZEROS[:4]}, r"of shape \(4, 7\); .*; \?replan=N executes fewer than 5"),
        ({"actions": ZEROS[0]}, r"of shape \(7,\)"),
        ({"actions": np.float32("nan") + ZEROS}, "actions that are not finite"),
        ({"actions": 1e300 + np.zeros((5, 7))}, "actions that are not finite"),
        ({"actions": None}, "no array: it is None"),
        ({"actions": [["a"] * 7] * 5}, "no array: it is"),
        ({"actions": [[0.0] * 7, [0.0]] * 3}, "no array"),
        ({"action": ZEROS}, r"answers with \['action'\]; expected 'actions'"),
        (array_of("|O", [5, 7]), "its dtype is object"),
        (array_of("<f4", [500, 7]), "no array: cannot reshape"),
        (array_of("<f4", [-1, 7, 3]), "no array: cannot reshape"),
        (array_of("(9,9,9)f8", [5, 7]), "no array"),
        (array_of("f8,f8", [5, 7]), "no array: its dtype is"),
        (array_of({"names": []}, [5, 7]), "no array"),
        ({"actions": {b"dtype": "<f4"}}, "no array"),
        (b"\xc1 is no MessagePack", "is not MessagePack: .*invalid"),
        (b"\xdd\xff\xff\xff\xff", "is not MessagePack: .*truncated"),
        (b"\x91" * 100_000, "is not MessagePack: .*recursion"),
        ([1, 2], r"sends \[1, 2\]; expected a map"),
        ("Traceback:\n  File ...\nKeyError: 'image'\n", "has failed: \"KeyError: 'image'\""),
        (bytes(2**20 + 1), "has closed the connection: .*too big"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_nonsense_is_one_line(start, answer, words):
    policy = load_policy(start(answering(lambda obs: answer)))
    with pytest.raises((ValueError, RuntimeError, OSError), match=words) as error:
        policy.sample(observations(3), ["pick"] * 3)
    assert len(str(error.value).splitlines()) == 1 and policy.address in str(error.value)
    # What was on its way is not taken for the answer to what comes after.
    with pytest.raises(ConnectionError, match="has closed the connection"):
        policy.sample(observations(1), ["pick"])


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (lambda connection: None, "has closed the connection"),
        (lambda connection: connection.send("no model"), "has failed: 'no model'"),
        (lambda connection: connection.send(b"{}"), "is not MessagePack|expected a map"),
        (lambda connection: connection.recv(), "sends no metadata, as openpi's servers do, within 1 s"),
    ],
    ids=["closes", "fails", "no map", "waits for a greeting"],
)
def test_a_server_that_is_no_policy_server(start, monkeypatch, handler, words):
    monkeypatch.setattr(server, "CONNECT_S", 1.0)
    with pytest.raises((ValueError, RuntimeError, OSError), match=words):
        load_policy(start(handler))


def test_a_host_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(server, "CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes the connection and says nothing
        port = silent.getsockname()[1]
        with pytest.raises(OSError, match=rf"ws://127\.0\.0\.1:{port} cannot be reached: timed out"):
            load_policy(f"ws://127.0.0.1:{port}")
    with pytest.raises(OSError, match=r"cannot be reached: .*refused"):
        load_policy(f"ws://127.0.0.1:{port}")


def dies(connection):
    connection.send(pack({}))
    connection.recv()
    connection.socket.shutdown(socket.SHUT_RDWR)


def stalls(connection):
    connection.send(pack({}))
    for _ in connection:
        pass


@pytest.mark.parametrize(
    ("handler", "words"),
    [(dies, "has closed the connection"), (stalls, r"does not answer within 1 s; \?timeout=N sets other")],
)
def test_a_server_that_dies_or_stalls(start, handler, words):
    policy = load_policy(start(handler) + "?timeout=1")
    with pytest.raises(OSError, match=words):
        policy.sample(observations(3), ["pick"] * 3)


def test_a_server_that_reads_nothing():
    """Its side of the socket fills up, so that sending blocks."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

        def greet():
            connected, _ = listening.accept()
            protocol = ServerProtocol()
            protocol.receive_data(connected.recv(4096))
            (asked,) = protocol.events_received()
            protocol.send_response(protocol.accept(asked))
            protocol.send_binary(pack({}))
            connected.sendall(b"".join(protocol.data_to_send()))
            done.wait()
            connected.close()

        done, thread = threading.Event(), threading.Thread(target=greet)
        thread.start()
        try:
            policy = load_policy(f"ws://127.0.0.1:{listening.getsockname()[1]}?timeout=1")
            policy._connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            with pytest.raises(TimeoutError, match="does not answer within 1 s"):
                policy.sample(observations(3), ["pick"] * 3)
        finally:
            done.set()
            thread.join()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ws://localhost:1?replay=3", "sets 'replay'.*did you mean 'replan'"),
        ("ws://localhost:1?replan=0", "replan is '0'; expected a number from 1 to 1000"),
        ("ws://localhost:1?replan=" + "9" * 99, "replan is"),
        ("ws://localhost:1?timeout=", "timeout is ''"),
        ("ws://localhost:port", "cannot be reached: .*port"),
        ("ws://", "cannot be reached"),
        ("wss:///x", "cannot be reached"),
    ],
)
def test_an_address_that_does_not_fit(name, words):
    with pytest.raises((ValueError, OSError), match=words) as error:
        load_policy(name)
    assert len(str(error.value).splitlines()) == 1


def test_the_package_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "websockets.sync.client", None)
    with pytest.raises(ImportError, match=r"expected: pip install 'websockets>=15'"):
        load_policy("ws://localhost:1")


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "is a server, which can be evaluated and not trained; expected --evaluate"),
        ({"evaluate": True, "eval_temperature": 1.0}, "eval_temperature is 1.0, and policy 'ws://"),
        ({"evaluate": True, "train": "lora"}, "train is lora, and policy 'ws://"),
        ({"evaluate": True, "compare": "runs/x"}, "expected none: a server plays what it was started with"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value) or "train",
)
def test_what_is_asked_of_it_in_vain(script, given, words):
    with pytest.raises(ValueError, match=words):
        script.validate(script.Args(policy="ws://localhost:1", **given))


def test_it_has_neither_checkpoint_nor_weights():
    with pytest.raises(ValueError, match=r"checkpoint is 'runs/x' with policy 'ws://localhost:1'"):
        load_policy("ws://localhost:1", "runs/x")
    with pytest.raises(ValueError, match="or, to evaluate, 'ws://host:port'"):
        new_policy("ws://localhost:1")


# ---- Playing -------------------------------------------------------------------------------------------


class Seeing:
    """nano, shown the images that a server is sent, one observation at a time."""

    action_chunk, image_size, own_images = 8, 256, True

    def __init__(self):
        self.nano = load_policy("nano").eval()
        self.eval = self.nano.eval

    def infer(self, obs):
        seen = {name: np.array(obs[f"observation/{name}"])[None] for name in ("image", "state")}
        with torch.no_grad():
            return {"actions": self.nano.sample(seen, [obs["prompt"]], 0.0)[0][0]}

    def sample(self, obs, instructions, temperature, generators):
        chunks = []
        for image, state, words in zip(obs["image"], obs["state"], instructions):
            image = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BILINEAR))
            seen = {"observation/image": image, "observation/state": state, "prompt": words}
            chunks.append(self.infer(seen)["actions"])
        return np.stack(chunks), None, None


@pytest.mark.parametrize("whose", ["the protocol as published", "openpi's own"])
def test_a_served_policy_solves_what_it_solves_itself(request, make_vec, start, whose):
    """nano, served, and nano that is shown the same images: every state of the simulation is the same."""
    nano = Seeing()
    if whose == "openpi's own":
        address = request.getfixturevalue("openpis_own")(nano.infer)
    else:
        address = start(answering(nano.infer))
    policy, ends = load_policy(f"{address}?replan=8"), []
    args = SimpleNamespace(seed=1, protocol=None, eval_episodes=2)
    for plays in (nano, policy):
        settings = evaluation.settings(None, "LiberoObject", plays)
        envs = make_vec(2, task_id=7, action_chunk=plays.action_chunk, **settings)
        outcomes = evaluation.play(envs, plays, 0.0, args)
        ends.append((outcomes.tolist(), envs.unwrapped.steps.tolist(), envs.unwrapped.qpos.tolist()))
    assert ends[0] == ends[1] and any(ends[0][0])


TINY = {"evaluate": None, "eval_episodes": 1, "max_episode_steps": 12, "num_threads": 1, "run_dir": "run"}


@pytest.mark.parametrize(
    "script", ["tgrpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("grpo", "ppo", "sft"))]
)
def test_a_script_evaluates_it(script, execute, start, tmp_path):
    prompts = set()

    def infer(obs):
        prompts.add(obs["prompt"])
        return {"actions": ZEROS}

    with pytest.raises(SystemExit) as exit_:
        execute(f"{script}_vla", **TINY, policy=start(answering(infer)), task_ids=(4, 7))
    assert not exit_.value.code and len(prompts) == 2
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["success_outcomes"] == [False] * 2 and "sampled" not in result
    assert (tmp_path / "run" / "videos" / "success.mp4").stat().st_size > 1000


def test_a_script_says_in_one_line_that_it_has_died(execute, start, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        execute("tgrpo_vla", **TINY, policy=start(dies))
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the policy server at ws://127.0.0.1:") and "closed the connection" in line
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
def test_robustness_plays_it_and_goes_on_after_its_death(start, tmp_path):
    args = robustness.Args(
        task_ids=(4,), axes=("camera",), levels=(1,), episodes=1, max_episode_steps=12, num_threads=1,
        out=tmp_path / "out",
    )  # fmt: skip
    decisions = []

    def until(most):
        def infer(obs):
            decisions.append(obs["observation/wrist_image"])
            return {"actions": ZEROS} if len(decisions) <= most else "ValueError: out of memory"

        return infer

    args.policy = start(answering(until(4)))  # an episode of 12 control steps has 3 decisions
    with pytest.raises(RuntimeError, match="has failed: 'ValueError: out of memory'"):
        robustness.main(args)
    assert list(read_json(args.out / "results.json")["outcomes"][args.policy]) == ["plain"]
    assert not (args.out / "robustness.md").exists()
    decisions.clear()
    again = start(answering(until(99)))
    results = read_json(args.out / "results.json")
    results["outcomes"] = {again: results["outcomes"][args.policy]}
    (args.out / "results.json").write_text(json.dumps(results | {"policy": again}))
    args.policy = again
    assert f"## {again}" in robustness.main(args)
    assert len(decisions) == 3 and decisions[0].std() > 1


@pytest.mark.longer
def test_robustness_writes_nothing_where_no_server_is(tmp_path):
    args = robustness.Args(policy="ws://127.0.0.1:1", task_ids=(4,), out=tmp_path / "out")
    with pytest.raises(OSError, match="cannot be reached"):
        robustness.main(args)
    assert not args.out.exists()
