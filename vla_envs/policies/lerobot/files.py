"""Checkpoints as LeRobot publishes them: read, checked, and written again in the same format.

A folder holds ``config.json``, ``model.safetensors`` and two lists of processors, of what goes into the
network and of what comes out, whose states are further safetensors files. Processors are found by their
registered names, since their numbers differ between checkpoints (LeRobot v0.6.1, ``lerobot/processor``).
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import tokenizers
import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from vla_envs.files import read_json
from vla_envs.inputs import in_short
from vla_envs.policies.published import SINGLE, fetch, from_hub
from vla_envs.policies.tensors import check_claim

STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
STATE_DIM, ACTION_DIM = 8, 7  # of LIBERO, as the environments have them
#: The environments' images by what LeRobot's data sets and checkpoints call LIBERO's two cameras.
CAMERAS = {
    "image": "image", "camera1": "image",
    "image2": "wrist_image", "wrist_image": "wrist_image", "camera2": "wrist_image",
}  # fmt: skip
EMPTY = "empty_camera_"  # a camera of no robot, which stands for those that a robot lacks
#: What normalises: the two statistics that it takes.
MODES = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "IDENTITY": ()}
#: Processors that do what is done here whether they are there or not, and those that are looked up.
PROCESSORS = frozenset(
    "rename_observations_processor to_batch_processor smolvla_new_line_processor pi0_new_line_processor"
    " tokenizer_processor device_processor normalizer_processor unnormalizer_processor".split()
)
SMALL = 64 * 2**20  # bytes of a file that is kept beside the weights, most of all a tokenizer's


class Normaliser(nn.Module):
    """LeRobot's normalisation of numbers (..., n), and its inverse; both are linear."""

    offset: Tensor
    divisor: Tensor
    factor: Tensor

    def __init__(self, offset: Tensor, divisor: Tensor, factor: Tensor) -> None:
        super().__init__()
        for name, value in (("offset", offset), ("divisor", divisor), ("factor", factor)):
            self.register_buffer(name, value.float(), persistent=False)

    @classmethod
    def of(cls, step: dict[str, Any], statistics: dict[str, Tensor], key: str, size: int) -> "Normaliser":
        """That of ``key`` by a processor; nothing is changed where it has no statistics of it.

        Args:
            step: The processor's entry in its list.
            statistics: The tensors of its state file.
            key: ``"observation.state"`` or ``"action"``.
            size: How many numbers that has.

        Raises:
            ValueError: When the kind of normalisation is unknown, or the statistics are of another size.
        """
        config = step.get("config", {})
        kind = "ACTION" if key == ACTION else "STATE"
        mode = config.get("norm_map", {}).get(kind, "IDENTITY")
        if mode not in MODES:
            raise ValueError(f"its {kind} is normalised by {in_short(mode)}; expected one of {list(MODES)}")
        names = [f"{key}.{name}" for name in MODES[mode]]
        if not names or not all(name in statistics for name in names):
            return cls(torch.zeros(size), torch.ones(size), torch.ones(size))
        first, second = (statistics[name] for name in names)
        for name, value in zip(names, (first, second)):
            if tuple(value.shape) != (size,) or not torch.isfinite(value).all():
                raise ValueError(
                    f"its statistics {name} are {in_short(value.tolist())}; expected {size} finite numbers,"
                    " as LIBERO's robot has them"
                )
        first, second, eps = first.float(), second.float(), float(config.get("eps", 1e-8))
        if mode == "MEAN_STD":
            return cls(first, second + eps, second)
        width = torch.where(second == first, torch.full_like(first, eps), second - first)
        return cls(first + width / 2, width / 2, width / 2)  # to [-1, 1]

    def forward(self, x: Tensor) -> Tensor:
        """What the network sees of numbers ``x``."""
        return (x - self.offset) / self.divisor

    def inverse(self, y: Tensor) -> Tensor:
        """The numbers that the network's ``y`` stand for."""
        return y * self.factor + self.offset


@dataclass(frozen=True)
class Published:
    """A checkpoint of LeRobot's, without its weights.

    Attributes:
        config: What its ``config.json`` says.
        cameras: The environments' images that it is shown, in its order.
        state, action: How they are normalised.
        tokenizer: Makes words of instructions, at most ``max_words`` of them.
        ending: What an instruction ends with.
        shapes, formats: Of the tensors in ``model.safetensors``, by name.
        files: All other files, by their paths in the folder.
    """

    folder: Path
    config: dict[str, Any]
    cameras: tuple[str, ...]
    state: Normaliser
    action: Normaliser
    tokenizer: tokenizers.Tokenizer
    max_words: int
    ending: str
    shapes: dict[str, tuple[int, ...]]
    formats: dict[str, str]
    files: dict[str, bytes]

    def its_json(self, name: str) -> dict[str, Any]:
        """The object in a further JSON file of the checkpoint; nothing where there is no such file."""
        path = _inside(self.folder, name)
        return read_json(path) if path is not None and path.is_file() else {}

    def words(self, instruction: str) -> list[int]:
        """The numbers of an instruction's words."""
        text = instruction if instruction.endswith(self.ending) else instruction + self.ending
        return self.tokenizer.encode(text).ids[: self.max_words]

    def write(self, weights: dict[str, Tensor], folder: Path, **changes: Any) -> None:
        """Write ``weights`` as a checkpoint that LeRobot reads.

        A weight has the number format in which it came, unless that would change it.

        Args:
            weights: By the names that the published file has.
            folder: Where to; it exists.
            changes: Of ``config.json``.
        """
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps(self.config | changes, indent=4) + "\n")
        tensors = {}
        for name, weight in weights.items():
            came = weight.to(DTYPES.get(self.formats.get(name, ""), weight.dtype))
            tensors[name] = came if torch.equal(came.to(weight.dtype), weight) else weight
        safetensors.torch.save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # by safetensors' names


def read(checkpoint: str | Path, kind: str) -> Published:
    """What is in a checkpoint, a folder or a repository of the hub, but for the weights.

    Args:
        checkpoint: The folder, or the repository's name.
        kind: LeRobot's name for the policy, ``"smolvla"`` or ``"pi0"``.

    Raises:
        ValueError: When a file is missing or damaged, or asks for what is not done here.
    """
    folder = fetch(checkpoint, "*.json", "*.safetensors", "*.model")
    if not (folder / SINGLE).is_file():
        raise ValueError(f"it has no {SINGLE}, which LeRobot's checkpoints have")
    config = read_json(folder / "config.json")
    if config.get("type") != kind:
        raise ValueError(f"its config.json is of type {in_short(config.get('type'))}; expected {kind!r}")
    chunk = config.get("chunk_size")
    if type(chunk) is not int or not 1 <= chunk <= 1024:
        raise ValueError(f"its chunk_size is {in_short(chunk)}; expected an int from 1 to 1024")
    for name, wanted in (("use_peft", False), ("adapt_to_pi_aloha", False), ("use_relative_actions", False)):
        if config.get(name, wanted) != wanted:
            raise ValueError(f"its {name} is {in_short(config[name])}; expected {wanted}")
    before, after = (_steps(folder, f"policy_{side}processor.json") for side in ("pre", "post"))
    renamed = before.get("rename_observations_processor", {}).get("config", {}).get("rename_map", {})
    words = before.get("tokenizer_processor", {}).get("config", {})
    most = words.get("max_length", config.get("tokenizer_max_length"))
    if type(most) is not int or not 1 <= most <= 4096:
        raise ValueError(f"its tokenizer's max_length is {in_short(most)}; expected an int from 1 to 4096")
    tokenizer, its_file = _tokenizer(folder, words.get("tokenizer_name") or config.get("vlm_model_name"))
    shapes, formats = _claims(folder / SINGLE)
    return Published(
        folder, config, cameras_of(config, renamed),
        _normaliser(folder, before.get("normalizer_processor"), STATE, STATE_DIM),
        _normaliser(folder, after.get("unnormalizer_processor"), ACTION, ACTION_DIM),
        tokenizer, most,
        "\n" if any(name.endswith("new_line_processor") for name in before) else "",
        shapes, formats,
        _small_files(folder, ".", "tokenizer", config.get("vlm_model_name")) | its_file,
    )  # fmt: skip


def cameras_of(config: dict[str, Any], renamed: dict[str, str]) -> tuple[str, ...]:
    """The environments' images that a checkpoint is shown, in its order.

    A camera that no robot has, or that is declared beside both of LIBERO's, is left out: LeRobot shows an
    image of it that is masked, or none.

    Raises:
        ValueError: When it declares an observation or an action that LIBERO does not have.
    """
    features, result = config.get("input_features"), config.get("output_features")
    if not isinstance(features, dict) or not isinstance(result, dict):
        raise ValueError("its config.json has no input_features and output_features")
    for name, size, found in ((STATE, STATE_DIM, features), (ACTION, ACTION_DIM, result)):
        shape = found.get(name, {}).get("shape")
        if shape != [size]:
            raise ValueError(
                f"its {name} has shape {in_short(shape)}; expected [{size}], as LIBERO has it: a policy for"
                " another robot has to be fine-tuned on LIBERO first"
            )
    back = {new: old for old, new in renamed.items()}
    shown, others = [], []
    for name, feature in features.items():
        if name == STATE:
            continue
        camera = str(back.get(name, name)).removeprefix(IMAGES)
        if feature.get("type") != "VISUAL":
            raise ValueError(f"it takes {name!r}, which the environments do not give")
        if camera in CAMERAS:
            shown.append(CAMERAS[camera])
        elif not camera.startswith(EMPTY):
            others.append(name)
    if len(set(shown)) < len(shown) or not shown or (others and len(shown) < 2):
        raise ValueError(
            f"it takes the images {in_short([name for name in features if name != STATE])}; expected"
            f" {IMAGES}image, and {IMAGES}image2 for the wrist's camera, by name or by the rename_map of its"
            " rename_observations_processor"
        )
    if others:
        print(f"left out: {', '.join(others)}, which LIBERO does not have")
    return tuple(shown)


def weights_of(
    published: Published, expected: dict[str, Tensor], names: dict[str, str], unused: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint one after the other, as pairs of the network's name and the tensor.

    Args:
        published: The checkpoint.
        expected: Tensors like the network's, by its names; on ``"meta"`` they take no memory.
        names: The file's name of each.
        unused: Names in the file that the network has no use for.

    Raises:
        ValueError: When a tensor is missing, has another shape, or belongs to nothing.
    """
    missing = sorted(names[own] for own in expected if names[own] not in published.shapes)
    unknown = sorted(published.shapes.keys() - set(names.values()) - set(unused))
    if missing or unknown:
        raise ValueError(f"tensors that are missing: {missing[:3]}; that belong to nothing: {unknown[:3]}")
    file = safetensors.safe_open(str(published.folder / SINGLE), "pt")
    for own, like in expected.items():
        check_claim(names[own], file.get_slice(names[own]), like)
    return ((own, file.get_tensor(names[own])) for own in expected)


# ---- Files ---------------------------------------------------------------------------------------------


def _inside(folder: Path, name: Any) -> Path | None:
    """The path of ``name`` in ``folder``; None where it would lead out of it."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    return folder / name


def _steps(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """The processors in a list, by their registered names."""
    if not (folder / name).is_file():
        raise ValueError(
            f"it has no {name}, which LeRobot's checkpoints have since version 0.4; expected one that"
            " lerobot/processor/migrate_policy_normalization.py has brought up to date"
        )
    steps = read_json(folder / name).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"its {name} has steps {in_short(steps)}; expected a list of processors")
    found = {str(step.get("registry_name")): step for step in steps}
    for registered, step in found.items():
        if registered in ("relative_actions_processor", "absolute_actions_processor"):
            if step.get("config", {}).get("enabled", False):
                raise ValueError(f"its {name} has actions relative to the state; expected LIBERO's own")
        elif registered not in PROCESSORS:
            raise ValueError(
                f"its {name} has {registered!r}, which is not done here; expected some of"
                f" {', '.join(sorted(PROCESSORS))}"
            )
    return found


def _normaliser(folder: Path, step: dict[str, Any] | None, key: str, size: int) -> Normaliser:
    step = step or {}
    path = _inside(folder, step.get("state_file"))
    statistics: dict[str, Tensor] = {}
    if path is not None:
        if not path.is_file():
            raise ValueError(f"it has no {path.name}, which holds the statistics of its {key}")
        try:
            statistics = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{str(path)!r} is damaged: {' '.join(str(error).split())}") from None
    seen = [name for name in statistics if name.startswith(IMAGES)]
    visual = step.get("config", {}).get("norm_map", {}).get("VISUAL", "IDENTITY")
    if key == STATE and seen and visual != "IDENTITY":
        raise ValueError(f"its images are normalised by {in_short(visual)}; expected IDENTITY")
    return Normaliser.of(step, statistics, key, size)


def _tokenizer(folder: Path, name: Any) -> tuple[tokenizers.Tokenizer, dict[str, bytes]]:
    """A checkpoint's tokenizer, in its folder or in the hub's repository ``name``; what the folder lacks."""
    places = (".", "tokenizer", name)
    found = [path / "tokenizer.json" for path in (_inside(folder, place) for place in places) if path]
    path = next((path for path in found if path.is_file()), None)
    inside = path is not None
    try:
        path = path or Path(from_hub(hf_hub_download, str(name), "tokenizer.json"))
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain ones
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"its tokenizer {in_short(name)} cannot be read: {reason}; expected it in"
            f" {str(folder / 'tokenizer' / 'tokenizer.json')!r}, or to be downloaded"
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, {} if inside else {"tokenizer/tokenizer.json": path.read_bytes()}


def _claims(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and number formats of the tensors in a safetensors file, from its header."""
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            claims = {name: file.get_slice(name) for name in file.keys()}
            return (
                {name: tuple(claim.get_shape()) for name, claim in claims.items()},
                {name: claim.get_dtype() for name, claim in claims.items()},
            )
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {' '.join(str(error).split())}") from None


def _small_files(folder: Path, *places: Any) -> dict[str, bytes]:
    """The configurations, statistics and words of a checkpoint, by their paths in it.

    Args:
        folder: The checkpoint's.
        places: Names of folders in it, where there are any.
    """
    files = {}
    for place in (where for where in (_inside(folder, name) for name in places) if where):
        for path in sorted(place.glob("*")) if place.is_dir() else ():
            name = path.relative_to(folder).as_posix()
            kept = path.suffix in (".json", ".safetensors", ".model") and name not in (SINGLE, "config.json")
            if kept and path.is_file() and path.stat().st_size <= SMALL:
                files[name] = path.read_bytes()
    return files
