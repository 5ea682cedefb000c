"""Evaluation: protocols, their pictures, intervals, paired comparisons, reports and videos."""

import json
import signal
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from vla_envs.policies import save_policy
from vla_envs.policies.images import _lanczos3
from vla_envs.policies.nano import NanoConfig, NanoPolicy
from vla_envs.training import evaluation, runs
from vla_envs.training.evaluation import (
    PROTOCOLS,
    are_results,
    film,
    openvla_images,
    paired,
    percent,
    report,
    seen,
    settings,
    success,
    write_video,
)

SUITES = ("LiberoSpatial", "LiberoObject", "LiberoGoal", "Libero10", "Libero90")


def outcomes_of(successes, trials):
    return np.arange(trials) < successes


# ---- Success rates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 50, 0.0, 0.07135),  # z^2 / (n + z^2), where z is 1.95996
        (50, 50, 0.92865, 1.0),
        (5, 10, 0.23659, 0.76341),  # 1/2 -+ z / (2 sqrt(n + z^2))
        (4, 5, 0.37553, 0.96378),
        (21, 50, 0.29375, 0.55767),
        (1, 1, 0.20655, 1.0),
    ],
)
def test_success_by_hand(successes, trials, low, high):
    result = success(outcomes_of(successes, trials))
    assert list(result) == ["successes", "trials", "rate", "low", "high"]
    assert (result["successes"], result["trials"]) == (successes, trials)
    assert result["rate"] == pytest.approx(successes / trials)
    assert (result["low"], result["high"]) == pytest.approx((low, high), abs=1e-5)


def test_the_order_of_outcomes_does_not_matter():
    assert success([True, False, True, False]) == success([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("successes", "words"),
    [(0, "0/50 (95 %: 0 to 7 %)"), (21, "21/50 (95 %: 29 to 56 %)"), (50, "50/50 (95 %: 93 to 100 %)")],
)
def test_a_rate_in_words(successes, words):
    assert percent(success(outcomes_of(successes, 50))) == words


# ---- Paired comparisons ------------------------------------------------------------------------------


def pair(only_first, only_second, both=0, neither=0):
    """Outcomes of two policies on the same states, by how many each solves."""
    first = [1] * only_first + [0] * only_second + [1] * both + [0] * neither
    second = [0] * only_first + [1] * only_second + [1] * both + [0] * neither
    return np.array(first, bool), np.array(second, bool)


def test_a_paired_comparison_by_hand():
    """Rates of 7 and 4 in 10, Wilson's 0.39678 to 0.89221 and 0.16818 to 0.68733, uncorrelated.

    The correlation's numerator is 3 * 2 - 4 * 1 = 2, not beyond the continuity correction of 5.
    """
    result = paired(*pair(4, 1, both=3, neither=2))
    assert (result["only_first"], result["only_second"]) == (4, 1)
    assert result["difference"] == pytest.approx(0.3)
    assert result["low"] == pytest.approx(0.3 - np.hypot(0.7 - 0.39678, 0.68733 - 0.4), abs=2e-5)
    assert result["high"] == pytest.approx(0.3 + np.hypot(0.89221 - 0.7, 0.4 - 0.16818), abs=2e-5)
    assert result["p_value"] == pytest.approx(2 * (5 + 1) / 2**5)


def test_correlated_outcomes_have_a_narrower_interval():
    """30 and 15 states alike: (450 - 25) / 900 of correlation, and 5 against 0 beside them."""
    alike, unlike = paired(*pair(5, 0, both=30, neither=15)), paired(*pair(20, 15, both=15, neither=0))
    assert alike["difference"] == unlike["difference"] == pytest.approx(0.1)
    assert unlike["low"] < -0.1 < 0 < alike["low"] < 0.1 < alike["high"] < 0.2 < unlike["high"]


@pytest.mark.parametrize("shares", [(0.04, 0.0, 0.4), (0.1, 0.02, 0.5), (0.3, 0.1, 0.3), (0.1, 0.1, 0.7)])
def test_the_interval_covers_the_true_difference(shares):
    """Where one policy alone, the other alone or both solve a state with these probabilities."""
    draws = np.random.default_rng(0).multinomial(50, [*shares, 1 - sum(shares)], 400)
    counts, times = np.unique(draws, axis=0, return_counts=True)
    results = [paired(*pair(*each)) for each in counts.tolist()]
    covered = [its["low"] <= shares[0] - shares[1] <= its["high"] for its in results]
    assert np.average(covered, weights=times) >= 0.93


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [
        (1, 0, 1.0),
        (5, 0, 2 * 1 / 2**5),
        (0, 6, 2 * 1 / 2**6),
        (3, 3, 1.0),
        (10, 1, 2 * (11 + 1) / 2**11),
        (2, 6, 2 * (28 + 8 + 1) / 2**8),
    ],
)
def test_the_p_value_is_the_binomials(only_first, only_second, p_value):
    """Both tails of fair coin throws, one a differing state; states where they agree do not count."""
    for both, neither in ((0, 0), (7, 20)):
        result = paired(*pair(only_first, only_second, both, neither))
        assert result["p_value"] == pytest.approx(p_value)


def test_no_differing_states():
    """Of few states that says little."""
    few, many = (paired(outcomes, outcomes) for outcomes in ([True, False, True], [True, False, True] * 30))
    for result in (few, many):
        assert (result["only_first"], result["only_second"], result["difference"]) == (0, 0, 0.0)
        assert result["p_value"] == 1.0 and result["low"] == pytest.approx(-result["high"])
    assert few["high"] > 0.3 and 0 < many["high"] < 0.05


@pytest.mark.parametrize("both", [0, 5])
def test_paired_comparisons_of_every_kind(both):
    """Swapping the policies mirrors everything, and intervals hold the difference within -1 to 1."""
    for only_first in range(8):
        for only_second in range(8):
            first, second = pair(only_first, only_second, both, neither=1)
            result, swapped = paired(first, second), paired(second, first)
            assert result["difference"] == pytest.approx(first.mean() - second.mean())
            assert -1 <= result["low"] <= result["difference"] <= result["high"] <= 1
            assert (swapped["only_first"], swapped["only_second"]) == (only_second, only_first)
            assert swapped["difference"] == pytest.approx(-result["difference"])
            assert (swapped["low"], swapped["high"]) == pytest.approx((-result["high"], -result["low"]))
            assert swapped["p_value"] == pytest.approx(result["p_value"])


# ---- Protocols ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "max_steps", "settling"),
    [
        ("tgrpo", (200, 200, 200, 200, 200), (10, -1)),
        ("openvla", (220, 280, 300, 520, 400), (10, -1)),
        ("simplevla", (512, 512, 512, 512, 512), (10, -1)),
        ("rlinf", (512, 512, 512, 512, 512), (15, 0)),
        ("lerobot", (280, 280, 300, 520, 400), (10, -1)),
    ],
)
def test_settings_of_the_protocols(protocol, max_steps, settling):
    for suite, steps in zip(SUITES, max_steps, strict=True):
        chosen = settings(protocol, suite)
        assert chosen["max_episode_steps"] == steps
        assert (chosen["settle_steps"], chosen["settle_gripper"]) == settling


@pytest.mark.parametrize(
    ("protocol", "temperature", "episodes", "pictures"),
    [
        ("tgrpo", None, 50, False),
        ("openvla", 0.0, 50, True),
        ("simplevla", 0.0, 50, True),
        ("rlinf", 1.6, 50, False),
        ("lerobot", None, 10, False),
    ],
)
def test_sampling_episodes_and_pictures_of_the_protocols(protocol, temperature, episodes, pictures):
    chosen = PROTOCOLS[protocol]
    assert (chosen.temperature, chosen.episodes) == (temperature, episodes)
    assert chosen.openvla_images is pictures
    assert not pictures or settings(protocol, "LiberoGoal")["image_size"] == 256


@pytest.mark.parametrize("suite", SUITES)
def test_no_protocol_asks_for_nothing(suite):
    assert settings(None, suite) == {}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_environments_of_a_protocol(make_vec, protocol):
    asked = settings(protocol, "LiberoObject") | {"image_size": 16}
    envs = make_vec(num_envs=1, **asked)
    obs, info = envs.reset(options={"init_state_id": 3})
    assert envs.observation_space.contains(obs) and info["init_state_id"] == [3]
    assert {name: getattr(envs.unwrapped, name) for name in asked} == asked


def test_pictures_of_openvlas_environments(make_vec):
    envs = make_vec(num_envs=1, **settings("openvla", "LiberoObject"))
    obs, _ = envs.reset(options={"init_state_id": 0})
    assert obs["image"].shape == (1, 256, 256, 3)
    assert seen(obs, "openvla")["image"].shape == (1, 224, 224, 3)


def test_settling_opens_holds_or_closes_the_gripper(make_vec):
    fingers = {}
    for command in (-1.0, 0.0, 1.0):
        envs = make_vec(num_envs=1, settle_gripper=command)
        envs.reset(options={"init_state_id": 0})
        left, right = envs.unwrapped.qpos[0, 7:9]
        fingers[command] = left - right  # m between them
    assert fingers[-1.0] > 0.07 and fingers[1.0] < 0.01
    assert fingers[0.0] == pytest.approx(2 * 0.020833, abs=0.001)  # as LIBERO's init states have them


@pytest.mark.parametrize("command", [-1.01, 2.0, float("nan")])
def test_a_settling_command_out_of_range_is_refused(make_vec, command):
    with pytest.raises(ValueError, match="settle_gripper"):
        make_vec(settle_gripper=command)


# ---- Pictures ----------------------------------------------------------------------------------------


def noise(count=3, size=64):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [128, 224, 256])
def test_shape_and_type_of_openvlas_pictures(size):
    pictures = openvla_images(noise(2, size))
    assert pictures.shape == (2, 224, 224, 3) and pictures.dtype == np.uint8


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("grey", [0, 1, 100, 254, 255])
def test_a_grey_picture_stays_grey(size, grey):
    pictures = openvla_images(np.full((1, size, size, 3), grey, np.uint8))
    assert np.abs(pictures.astype(int) - grey).max() <= 1


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 30, 90)])
def test_a_colour_stays_that_colour(colour):
    pictures = openvla_images(np.full((1, 128, 128, 3), colour, np.uint8))
    assert np.abs(pictures.astype(int) - colour).max() <= 2  # JPEG rounds colours


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("size", [128, 256])
def test_the_crop_keeps_the_middle_and_cuts_the_edges(size, axis):
    """Grey levels from 0 to 255 across: 90 % of the area is 94.87 % of a side; each edge loses 2.6 %."""
    across = np.rint(255 * (np.arange(size) + 0.5) / size).astype(np.uint8)[:, None, None]
    image = np.moveaxis(np.broadcast_to(across, (size, size, 3)), 0, axis)
    profile = np.moveaxis(openvla_images(image[None])[0].astype(float), axis, 0).reshape(224, -1)
    assert np.ptp(profile, axis=1).max() <= 2  # nothing changes along the other axis
    first = 255 * (0.5 / 224 + 0.0256)  # 7.1: half a pixel, and what is lost
    assert profile.mean(axis=1)[[0, 223]] == pytest.approx([first, 255 - first], abs=1.5)
    assert profile[[111, 112]].mean() == pytest.approx(127.5, abs=1.0)
    assert np.abs(profile - np.linspace(first, 255 - first, 224)[:, None]).max() <= 2.5


def test_the_crop_moves_things_away_from_the_middle():
    """A spot at row 20 and column 150 of 224: the distances from the middle, 111.5, grow by 1 / 0.9487."""
    y, x = np.mgrid[:224, :224]
    spot = np.rint(200 * np.exp(-((y - 20) ** 2 + (x - 150) ** 2) / (2 * 5**2))).astype(np.uint8)
    seen_spot = openvla_images(np.stack([spot] * 3, axis=-1)[None])[0].sum(axis=-1, dtype=float)
    seen_spot[seen_spot < 30] = 0  # what JPEG leaves around it
    centre = [(seen_spot * place).sum() / seen_spot.sum() for place in (y, x)]
    assert centre == pytest.approx([111.5 - 91.5 / 0.9487, 111.5 + 38.5 / 0.9487], abs=0.15)


def test_jpeg_halves_the_resolution_of_colours():
    """Red and blue columns in turn: next to each other they get the same mixed colour, lighter and darker."""
    stripes = np.zeros((1, 224, 224, 3), np.uint8)
    stripes[:, :, ::2, 0] = stripes[:, :, 1::2, 2] = 255
    middle = openvla_images(stripes)[0, 112, 111:113].astype(int)  # where the crop moves nothing
    red_over_blue = middle[:, 0] - middle[:, 2]
    assert np.abs(red_over_blue).max() < 30  # 255 and -255 before
    assert abs(middle[0].sum() - middle[1].sum()) > 60


def test_a_batch_is_its_pictures_one_by_one():
    images = np.concatenate([noise(2), np.full((1, 64, 64, 3), 90, np.uint8)])
    together = openvla_images(images)
    for image, picture in zip(images, together, strict=True):
        np.testing.assert_array_equal(openvla_images(image[None])[0], picture)
    assert not np.array_equal(together[0], together[1])
    np.testing.assert_array_equal(openvla_images(images[::-1]), together[::-1])


@pytest.mark.parametrize("size", [1, 100, 128, 224, 256, 500])
def test_resizing_preserves_constants(size):
    torch.testing.assert_close(_lanczos3(size, 224).sum(dim=1), torch.ones(224))


@pytest.mark.parametrize("size", [2, 128, 224])
def test_resizing_to_the_same_size_changes_nothing(size):
    torch.testing.assert_close(_lanczos3(size, size), torch.eye(size))


@pytest.mark.parametrize("size", [100, 128, 256, 500])
def test_resizing_is_pillows(size):
    """Pillow's Lanczos filter has the same kernel; it rounds between the two axes."""
    y, x = np.mgrid[:size, :size] / size
    levels = 127 + 40 * np.sin(5 * x + 3 * y) + np.random.default_rng(0).uniform(-30, 30, (size, size))
    image = np.rint(levels).astype(np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.LANCZOS)).astype(int)
    matrix = _lanczos3(size, 224).numpy()
    assert np.abs(np.rint(matrix @ image @ matrix.T) - expected).max() <= 2


@pytest.mark.parametrize("protocol", [None, "tgrpo", "rlinf", "lerobot"])
def test_most_see_what_the_environment_shows(protocol):
    obs = {"image": noise(), "state": np.ones((3, 8), np.float32)}
    shown = seen(obs, protocol)
    assert shown.keys() == obs.keys() and all(shown[name] is obs[name] for name in obs)


@pytest.mark.parametrize("protocol", ["openvla", "simplevla"])
def test_openvlas_protocol_changes_only_the_image(protocol):
    images = noise()
    obs = {"image": images, "wrist_image": noise(), "state": np.ones((3, 8), np.float32)}
    shown = seen(obs, protocol)
    np.testing.assert_array_equal(shown["image"], openvla_images(images))
    assert shown.keys() == obs.keys()
    assert shown["state"] is obs["state"] and shown["wrist_image"] is obs["wrist_image"]
    assert obs["image"] is images  # the environment's own stay


# ---- Reports -----------------------------------------------------------------------------------------


def test_a_report(capsys):
    outcomes = outcomes_of(21, 50)
    contents = report("success", outcomes)
    assert capsys.readouterr().out == "deterministic: success 21/50 (95 %: 29 to 56 %)\n"
    assert contents == {"success": success(outcomes), "success_outcomes": outcomes.tolist()}
    assert json.loads(json.dumps(contents)) == contents


def test_a_report_of_two_checkpoints(capsys, tmp_path):
    first, second = pair(4, 1, both=3, neither=2)
    contents = report("sampled", first, second, tmp_path)
    above, below = capsys.readouterr().out.splitlines()
    assert above == "sampled: success 7/10 (95 %: 40 to 89 %)"
    assert below.strip() == (
        f"--compare {tmp_path}: 4/10 (95 %: 17 to 69 %);"
        " --checkpoint minus --compare: +30 points (95 %: -12 to +60), p = 0.38"
    )
    assert set(contents) == {"sampled", "sampled_outcomes", "sampled_compared"}
    compared = contents["sampled_compared"]
    assert compared["checkpoint"] == str(tmp_path) and compared["outcomes"] == second.tolist()
    assert compared["paired"] == paired(first, second)
    assert {name: compared[name] for name in success(second)} == success(second)
    assert json.loads(json.dumps(contents)) == contents


DETERMINISTIC, SAMPLED = [True, True, False, False], [True, False, False, False]


@pytest.fixture
def evaluate_once(tmp_path, monkeypatch):
    """Call ``evaluate_only`` with episodes whose outcomes are known: ``result.json`` and the calls."""
    policy, envs, run = object(), object(), tmp_path / "run"
    run.mkdir()
    chosen = {"policy": "nano", "compare": None, "device": "cpu", "suite": "LiberoObject", "task_id": 4}
    chosen |= {"task_ids": (4,), "cudagraphs": False, "checkpoint": None, "max_episode_steps": 200}
    chosen |= {"seed": 7, "protocol": None, "eval_temperature": 0.5, "eval_perturb": None}

    def evaluate_once(**changes):
        calls, args = [], SimpleNamespace(**chosen | changes)

        def play(envs_, policy_, temperature, args_, video):
            assert envs_ is envs and args_ is args
            calls.append((policy_, temperature, video))
            outcomes = np.array(SAMPLED if temperature else DETERMINISTIC)
            return outcomes if policy_ is policy else ~outcomes

        monkeypatch.setattr(evaluation, "play", play)
        runs.Run.evaluate_only(SimpleNamespace(folder=run, args=args, policy=policy, eval_envs=envs))
        return json.loads((run / "result.json").read_text()), calls, policy

    return evaluate_once


def test_evaluating_both_ways(evaluate_once, tmp_path, capsys):
    result, calls, policy = evaluate_once(protocol="rlinf")
    videos = tmp_path / "run" / "videos"
    assert calls == [(policy, 0.0, videos / "success.mp4"), (policy, 0.5, videos / "sampled.mp4")]
    names = ("suite", "task_id", "seed", "protocol", "max_episode_steps")
    assert [result[name] for name in names] == ["LiberoObject", 4, 7, "rlinf", 512]
    assert "task_ids" not in result
    assert result["success"] == success(DETERMINISTIC) and result["success_outcomes"] == DETERMINISTIC
    assert result["sampled"] == success(SAMPLED) and result["sampled_outcomes"] == SAMPLED
    assert not any("compared" in name for name in result)
    where, *lines = capsys.readouterr().out.splitlines()
    assert where == f"{tmp_path / 'run'}: evaluating the shipped nano"
    assert [line.split(":")[0] for line in lines] == ["deterministic", "sampled"]


def test_evaluating_only_deterministically(evaluate_once, capsys):
    result, calls, _ = evaluate_once(eval_temperature=0.0, checkpoint="a/final")
    assert "run: evaluating a/final\n" in capsys.readouterr().out
    assert [temperature for _, temperature, _ in calls] == [0.0]
    assert result["success"] == success(DETERMINISTIC)
    assert not any("sampled" in name for name in result) and result["protocol"] is None


def test_evaluating_two_checkpoints(evaluate_once, tmp_path):
    torch.manual_seed(0)
    other = NanoPolicy(NanoConfig(action_chunk=2, action_repeat=1, image_size=32, width=16, depth=1, heads=2))
    save_policy(other, "nano", tmp_path / "other")
    result, calls, policy = evaluate_once(compare=tmp_path / "other")
    assert [temperature for _, temperature, _ in calls] == [0.0, 0.0, 0.5, 0.5]
    assert len({video for _, _, video in calls}) == 4  # no video overwrites another
    assert calls[0][0] is calls[2][0] is policy
    for call in (calls[1], calls[3]):
        torch.testing.assert_close(call[0].state_dict(), other.state_dict())
    for name, outcomes in (("success", DETERMINISTIC), ("sampled", SAMPLED)):
        others = [not outcome for outcome in outcomes]
        assert result[f"{name}_outcomes"] == outcomes
        assert result[f"{name}_compared"]["outcomes"] == others
        assert result[f"{name}_compared"]["checkpoint"] == str(tmp_path / "other")
        assert result[f"{name}_compared"]["paired"] == paired(outcomes, others)
        assert result[name] == success(outcomes)


def test_an_evaluation_of_several_tasks_names_them(evaluate_once):
    result, _, _ = evaluate_once(task_ids=(4, 0), max_episode_steps=90)
    assert (result["task_id"], result["task_ids"], result["max_episode_steps"]) == (4, [4, 0], 90)


def test_comparing_with_nothing_evaluates_nothing(evaluate_once, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        evaluate_once(compare=tmp_path / "absent")
    assert exit_.value.code == 2 and "absent" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists()


class Board:
    """What TensorBoard is given."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag] = (value, step)


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_a_runs_evaluation_is_played_both_ways(temperature, tmp_path, monkeypatch, capsys):
    """Of two tasks; where sampling has no temperature either, deterministic alone."""
    board, calls = Board(), []
    args = SimpleNamespace(eval_temperature=temperature, task_ids=(4, 0))

    def play(envs, policy, temperature, args_, video):
        assert (envs, policy, args_) == ("envs", "policy", args)
        calls.append((temperature, video))
        return np.array(SAMPLED if temperature else DETERMINISTIC)

    state = {"iteration": 12, "evaluated": 3}
    monkeypatch.setattr(evaluation, "play", play)
    run = SimpleNamespace(args=args, state=state, folder=tmp_path, global_step=480, _writer=board)
    run.eval_envs, run.policy = "envs", "policy"
    results = runs.Run.evaluate(run)
    names = ["success", "sampled"] if temperature else ["success"]
    videos = tmp_path / "videos"
    assert calls == [
        (0.0, videos / "iteration_0012_success.mp4"), (0.7, videos / "iteration_0012_sampled.mp4"),
    ][: len(names)]  # fmt: skip
    expected = {"success": success(DETERMINISTIC, (4, 0)), "sampled": success(SAMPLED, (4, 0))}
    assert results == state["after"] == {name: expected[name] for name in names} and state["evaluated"] == 12
    rates = {"charts/success_rate": 0.5, "charts/success_rate_task_4": 1.0, "charts/success_rate_task_0": 0.0}
    rates |= {
        "charts/sampled_success_rate": 0.25, "charts/sampled_success_rate_task_4": 0.5,
        "charts/sampled_success_rate_task_0": 0.0,
    } if temperature else {}  # fmt: skip
    assert board.scalars == {tag: (rate, 480) for tag, rate in rates.items()}
    said = capsys.readouterr().out
    assert said.startswith("iteration 12: success deterministic 2/4 ") and said.count("\n") == 1
    assert ("; sampled 1/4 " in said) is bool(temperature)
    assert are_results(json.loads(json.dumps(results)))


@pytest.mark.parametrize(
    "value",
    [None, 3, [], {"success": None}, {"success": 0.5}, success([True]), {"success": {"rate": 0.5}},
     {"success": success([True]), "sampled": success([True]) | {"low": "0"}}],
    ids=str,
)  # fmt: skip
def test_what_is_no_evaluation(value):
    assert not are_results(value)


# ---- Videos ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "kept"), [(16, 16), (128, 128), (200, 200), (256, 128), (512, 128)])
def test_what_is_filmed(size, kept):
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    frame = film(images)
    assert frame.shape == (2, kept, kept, 3) and frame.dtype == np.uint8
    every = size // kept
    np.testing.assert_array_equal(frame, images[:, ::every, ::every])


def test_a_film_is_of_the_first_16_and_stays():
    images = noise(20, 16)
    frame, before = film(images), images[:16].copy()
    images[:] = 0
    np.testing.assert_array_equal(frame, before)


def read_video(tmp_path, outcomes, decisions=3, size=64):
    """Write a video whose episode i has grey level 40 + 10 i, one more at each decision; read it back.

    Returns frames (T, H, W, 3); the rows of successes and failures begin with bars 8 pixels high.
    """
    filmed = min(len(outcomes), 16)
    greys = 40 + 10 * np.arange(filmed, dtype=np.uint8)[:, None, None, None]
    frames = [np.tile(greys + t, (1, size, size, 3)) for t in range(decisions)]
    write_video(tmp_path / "video.mp4", frames, outcomes)
    return np.stack(imageio.mimread(tmp_path / "video.mp4")).astype(int)


GREEN, RED, BLACK = (40, 160, 70), (200, 50, 50), (0, 0, 0)


def check(video, top, column, bar, episode, size=64):
    """The cell of a video that begins ``top`` pixels down; an episode of -1 is none."""
    cell = video[:, top : top + 8 + size, column * size : (column + 1) * size]
    assert np.abs(cell[:, 2:6, 4:-4].mean(axis=(0, 1, 2)) - bar).max() < 25, "bar"
    for t, picture in enumerate(cell[:, 8 + 4 : -4, 4:-4]):
        expected = 0 if episode < 0 else 40 + 10 * episode + t
        assert picture.mean() == pytest.approx(expected, abs=4) and picture.std() < 4, "picture"


@pytest.mark.longer
def test_successes_are_above_failures(tmp_path):
    video = read_video(tmp_path, [False, True, False, False, True])
    assert video.shape == (3, 2 * (64 + 8), 3 * 64, 3)
    for column, (bar, episode) in enumerate([(GREEN, 1), (GREEN, 4), (BLACK, -1)]):
        check(video, 0, column, bar, episode)
    for column, episode in enumerate([0, 2, 3]):
        check(video, 64 + 8, column, RED, episode)


@pytest.mark.parametrize("won", [True, False], ids=["successes", "failures"])
@pytest.mark.longer
def test_all_ended_alike(tmp_path, won):
    video = read_video(tmp_path, [won] * 3)
    assert video.shape == (3, 2 * (64 + 8), 3 * 64, 3)
    for column in range(3):
        check(video, 0, column, GREEN if won else BLACK, column if won else -1)
        check(video, 64 + 8, column, BLACK if won else RED, -1 if won else column)


@pytest.mark.longer
def test_the_first_four_of_each(tmp_path):
    video = read_video(tmp_path, [False, True] * 6)
    assert video.shape == (3, 2 * (64 + 8), 4 * 64, 3)
    for column in range(4):
        check(video, 0, column, GREEN, 2 * column + 1)
        check(video, 64 + 8, column, RED, 2 * column)


@pytest.mark.longer
def test_only_what_was_filmed(tmp_path):
    video = read_video(tmp_path, [False] * 2 + [True] * 13 + [False] * 35)  # 50, of which 16 were filmed
    assert video.shape == (3, 2 * (64 + 8), 4 * 64, 3)
    for column, (bar, episode) in enumerate([(RED, 0), (RED, 1), (RED, 15), (BLACK, -1)]):
        check(video, 0, column, GREEN, column + 2)
        check(video, 64 + 8, column, bar, episode)


@pytest.mark.longer
def test_a_video_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    read_video(tmp_path, [False])
    whole, write = (tmp_path / "video.mp4").read_bytes(), imageio.mimwrite

    def write_and_stop(*args, **kwargs):
        write(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(imageio, "mimwrite", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        read_video(tmp_path, [True])
    assert (tmp_path / "video.mp4").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize("decisions", [1, 7])
@pytest.mark.longer
def test_a_video_has_a_frame_for_every_decision(tmp_path, decisions):
    assert len(read_video(tmp_path, [True, False], decisions)) == decisions
