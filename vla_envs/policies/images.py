"""Images as OpenVLA's LIBERO evaluation shows them to a network, without TensorFlow, and as LeRobot does."""

import io
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

# Means and standard deviations of DINOv2's three channels (ImageNet's, rounded to bfloat16 as in the
# published preprocessor_config.json), then of SigLIP's.
MEAN = (0.484375, 0.455078125, 0.40625, 0.5, 0.5, 0.5)
STD = (0.228515625, 0.2236328125, 0.224609375, 0.5, 0.5, 0.5)


@lru_cache
def _lanczos3(size: int, new_size: int) -> Tensor:
    """The (new_size, size) matrix that resizes a row of pixels with the antialiased Lanczos-3 kernel."""
    scale = max(size / new_size, 1.0)
    centres = (torch.arange(new_size, dtype=torch.float64) + 0.5) * size / new_size  # (new_size,)
    distance = (torch.arange(size) + 0.5 - centres[:, None]) / scale  # (new_size, size)
    weights = torch.where(distance.abs() < 3, torch.sinc(distance) * torch.sinc(distance / 3), 0.0)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def _jpeg(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image (H, W, 3) after it was written as JPEG (quality 95, 4:2:0) and read back."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=2)
    return np.asarray(Image.open(buffer))


def _process(images: ArrayLike, size: int, device: Any) -> Tensor:
    """Whole grey levels 0 to 255, (B, 3, size, size) float32, of images (B, H, W, 3) uint8."""
    with ThreadPoolExecutor() as pool:  # Pillow's codecs release the interpreter's lock
        decoded = np.stack(list(pool.map(_jpeg, np.ascontiguousarray(images, np.uint8))))
    pixels = torch.from_numpy(decoded).to(device).permute(0, 3, 1, 2).float()  # (B, 3, H, W)
    rows, columns = (_lanczos3(length, size).to(device) for length in pixels.shape[2:])
    resized = torch.einsum("oh,bchw,pw->bcop", rows, pixels, columns).round().clamp(0, 255)
    side = 0.9**0.5
    box = torch.tensor([[side, 0.0, 0.0], [0.0, side, 0.0]], device=device).expand(len(pixels), 2, 3)
    grid = F.affine_grid(box, [len(pixels), 3, size, size], align_corners=True)
    cropped = F.grid_sample(resized / 255, grid, align_corners=True)  # (B, 3, size, size)
    return (cropped * 255.5).floor().clamp(0, 255)


def openvla_images(images: ArrayLike) -> NDArray[np.uint8]:
    """Images (B, H, W, 3) uint8 as OpenVLA's LIBERO evaluation shows them to a policy: (B, 224, 224, 3).

    They are written as JPEG (quality 95, 4:2:0) and read back, resized to 224 pixels with a Lanczos-3 kernel,
    and cropped to the central 90 % of the area, which is enlarged to 224 pixels bilinearly
    (openvla/experiments/robot). TensorFlow's own differ by about one grey level of 255.
    """
    return _process(images, 224, "cpu").byte().permute(0, 2, 3, 1).numpy()


def openvla_pixels(images: ArrayLike, size: int = 224, device: Any = "cpu") -> Tensor:
    """The network's input (B, 6, size, size) float32, made from rendered images (B, H, W, 3) uint8.

    These are ``openvla_images``, normalised once for DINOv2 and once for SigLIP.
    """
    grey = _process(images, size, device).repeat(1, 2, 1, 1) / 255  # (B, 6, size, size)
    mean, std = (torch.tensor(values, device=device).view(6, 1, 1) for values in (MEAN, STD))
    return (grey - mean) / std


def lerobot_pixels(images: Tensor, size: int, centred: bool = False) -> Tensor:
    """Images (B, H, W, 3) uint8 as LeRobot shows them to SmolVLA and pi0: (B, 3, size, size) in [-1, 1].

    They are enlarged or reduced bilinearly until the longer side fits, and the rest is black: on the left and
    above or, ``centred``, on both sides (``resize_with_pad`` of lerobot/policies/smolvla and pi0).
    """
    pixels = images.permute(0, 3, 1, 2).float() / 255.0
    height, width = pixels.shape[2:]
    if (height, width) != (size, size):
        ratio = max(width, height) / size
        rows, columns = int(height / ratio), int(width / ratio)
        pixels = F.interpolate(pixels, size=(rows, columns), mode="bilinear", align_corners=False)
        pixels = pixels.clamp(0.0, 1.0)
        above, left = size - rows, size - columns
        if centred:
            above, left = above // 2, left // 2
        pixels = F.pad(pixels, (left, size - columns - left, above, size - rows - above))
    return 2.0 * pixels - 1.0
