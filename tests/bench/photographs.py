"""Pictures like photographs, drawn: what a decoder and an encoder have to do for one of them is what a photograph asks.

"Dead leaves" (shapes of all sizes that cover each other) have the edges, the flat regions and the 1/f spectrum of
natural pictures; texture and grain fill the high frequencies. Deterministic: the same number is the same picture.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

SIZES = ((640, 480), (480, 640), (800, 600), (1024, 768), (768, 1024), (1024, 683), (1280, 960), (1600, 1200))
"""(width, height) in pixels."""


def draw_photograph(number: int, width: int, height: int) -> np.ndarray:
    """[height, width, 3] uint8 RGB."""
    import cv2

    rng = np.random.default_rng(number)
    scene = np.full((height, width, 3), rng.integers(40, 216, 3), np.float32)
    largest = min(width, height) / 2
    for radius in np.sort(largest / rng.uniform(1, 60, 400))[::-1]:  # 1/r: of half the size there are twice as many
        centre = int(rng.integers(0, width)), int(rng.integers(0, height))
        axes = max(2, int(radius)), max(2, int(radius * rng.uniform(0.3, 1)))
        colour = rng.integers(10, 246, 3).tolist()
        cv2.ellipse(scene, centre, axes, float(rng.uniform(0, 180)), 0, 360, colour, -1, cv2.LINE_AA)
    scene = cv2.GaussianBlur(scene, (0, 0), 0.8)
    for octave in range(1, 7):  # texture, stronger where a coarse mask says so
        coarse = rng.normal(0, 3.0, (-(-height >> octave) + 1, -(-width >> octave) + 1)).astype(np.float32)
        mask = cv2.resize(rng.random((4, 5), dtype=np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        scene += (cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * 2 * mask)[:, :, None]
    scene += rng.normal(0, 1.5, (height, width, 1)).astype(np.float32)
    return scene.clip(0, 255).astype(np.uint8)


def write_photographs(folder: Path, count: int) -> list[Path]:
    """`count` JPEGs (quality 90, 4:2:0) of the sizes of `SIZES` in turn."""
    import simplejpeg

    paths = []
    for number in range(count):
        path = folder / f"{number:04d}.jpg"
        pixels = draw_photograph(number, *SIZES[number % len(SIZES)])
        path.write_bytes(simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420"))
        paths.append(path)
    return paths
