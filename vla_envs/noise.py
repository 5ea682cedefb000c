"""Image noise: filters of a finished image, with the strengths of LIBERO-Plus's (its ``env_wrapper.step``).

LIBERO-Plus filters images of 256 pixels; lengths are scaled to others. Its motion blur is ImageMagick's and
its Gaussian one scikit-image's; ours are a weighted sum of shifted images and Pillow's, and its zoom
blur's up to 41 sizes are 8 here. What is random is drawn anew for every image.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Pixels = NDArray[np.uint8]  # (H, W, 3)

#: By severity, 1 to 10: radius and standard deviation (pixels of 256) of the motion,
MOTION = ((5, 2), (8, 3), (10, 4), (12, 5), (15, 6), (18, 8), (20, 10), (25, 12), (30, 15), (35, 20))
#: greatest zoom,
ZOOM = (1.10, 1.15, 1.20, 1.24, 1.30, 1.35, 1.40, 1.45, 1.50, 1.54)
#: thickness of the fog and how fast its structure fades with size,
FOG = ((0.5, 3.0), (1.0, 2.8), (1.5, 2.5), (2.0, 2.2), (2.5, 2.0), (3.0, 1.8), (3.5, 1.6), (4.0, 1.5),
       (4.5, 1.4), (5.0, 1.3))  # fmt: skip
#: standard deviation of the glass's blur (pixels of 256), how far it moves a pixel, and how often.
GLASS = ((0.5, 1, 3), (0.7, 1, 3), (0.9, 2, 3), (1.0, 2, 2), (1.1, 3, 2), (1.3, 3, 2), (1.5, 4, 2),
         (1.8, 4, 2), (2.2, 5, 1), (2.5, 5, 1))  # fmt: skip


def _blurred(image: Pixels, sigma: float) -> Pixels:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def _gaussian_blur(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """A Gaussian of as many pixels as the severity."""
    return _blurred(image, severity * len(image) / 256)


def _motion_blur(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """A move to one side, within 45 degrees of the horizontal."""
    radius, sigma = (x * len(image) / 256 for x in MOTION[severity - 1])
    angle, height = rng.uniform(-np.pi / 4, np.pi / 4), len(image)
    steps = np.arange(int(np.ceil(radius)) + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    reach = int(steps[-1])
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    total = np.zeros(image.shape, np.float32)
    for step, weight in zip(steps, weights / weights.sum()):
        down, right = reach + round(step * np.sin(angle)), reach + round(step * np.cos(angle))
        total += np.float32(weight) * padded[down : down + height, right : right + height]
    return np.rint(total).astype(np.uint8)


def _zoom_blur(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """The mean of the image and of enlargements of its middle."""
    size, whole = len(image), Image.fromarray(image)
    total = image.astype(np.uint16)
    factors = np.linspace(1.0, ZOOM[severity - 1], 8)
    total += image  # the first, which is as large as it was
    for factor in factors[1:]:
        margin = (size - size / factor) / 2
        box = (margin, margin, size - margin, size - margin)
        total += np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return np.rint(total / np.float32(1 + len(factors))).astype(np.uint8)


def _fog(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """A bright fractal over the image: random values on ever finer grids, each weaker than the one before."""
    thickness, decay = FOG[severity - 1]
    size, cells, weight = len(image), 2, 1.0
    fractal = np.zeros((size, size), np.float32)
    while cells <= size:
        grid = Image.fromarray(rng.uniform(-1.0, 1.0, (cells, cells)).astype(np.float32))
        fractal += np.float32(weight) * np.asarray(grid.resize((size, size), Image.Resampling.BILINEAR))
        cells, weight = 2 * cells, weight / decay
    fractal = (fractal - fractal.min()) / np.ptp(fractal)
    light = image.astype(np.float32) / 255
    brightest = max(float(light.max()), 1e-6)
    light = (light + np.float32(thickness) * fractal[..., None]) * np.float32(
        brightest / (brightest + thickness)
    )
    return np.rint(np.clip(light, 0, 1) * 255).astype(np.uint8)


def _glass_blur(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """A blur, pixels taken from near by at random, and the blur again."""
    size = len(image)
    sigma, reach, times = GLASS[severity - 1]
    sigma, far = sigma * size / 256, reach * size / 256 + 0.5
    seen = np.dstack([_blurred(image, sigma), image[..., 0]]).view(np.uint32).ravel()  # a number per pixel
    along = np.arange(size, dtype=np.int32)
    for _ in range(times):
        down, right = np.rint(rng.uniform(-far, far, (2, size, size))).astype(np.int32)
        rows, columns = np.clip(along[:, None] + down, 0, size - 1), np.clip(along + right, 0, size - 1)
        seen = seen.take(rows * size + columns)
    moved = seen.view(np.uint8).reshape(size, size, 4)[..., :3]
    return _blurred(np.ascontiguousarray(moved), sigma)


KINDS: dict[str, Callable[[Pixels, int, np.random.Generator], Pixels]] = {
    "motion blur": _motion_blur, "gaussian blur": _gaussian_blur, "zoom blur": _zoom_blur, "fog": _fog,
    "glass blur": _glass_blur,
}  # fmt: skip


def apply(image: Pixels, kind: str, severity: int, seed: int, step: int) -> Pixels:
    """``image`` (H, H, 3) with noise; what is random of it depends on the seed and the control step alone.

    Args:
        image: The finished image.
        kind: One of ``KINDS``.
        severity: From 1 to 10.
        seed: Of the episode.
        step: The control step within the episode.
    """
    return KINDS[kind](image, severity, np.random.default_rng((seed, step)))
