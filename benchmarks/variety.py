"""What the simulator can draw, in one picture: ``python -m benchmarks.variety PATH``."""

from __future__ import annotations

import sys
from typing import Any

import imageio.v3 as iio
import numpy as np
from skimage.color import label2rgb

from graincast.config import Simulate
from graincast.simulate.structure import simulate_structure

VARIETY: list[dict[str, Any]] = [
    {},
    {"area_spread": None, "regularity": 0.0},
    {"area_spread": None, "regularity": 0.85},
    {"area_spread": 0.3, "coarse_share": 0.4, "coarse_ratio": 12.0, "grains": 60},
    {"elongation": 2.5, "elongation_deg": 30.0},
    {"boundary_anisotropy": 2.0, "boundary_anisotropy_deg": 30.0, "steps": 3000},
    {"pores": {"fraction": 0.04, "diameter": 0.2}},
    {"pores": {"fraction": 0.03, "diameter": 0.15}, "particles": {"fraction": 0.04, "diameter": 0.25}},
]
GAP = 6  # px, white


def main(path: str) -> None:
    """Write a row of pictures, with their labels below."""
    columns = []
    for options in VARIETY:
        picture, labels = simulate_structure(Simulate(**{"size": 192, "grains": 45, **options}), 0)
        coloured = np.rint(255 * label2rgb(labels, bg_label=0)).astype(np.uint8)
        columns.append(np.concatenate([_framed(np.stack([picture] * 3, axis=-1)), _framed(coloured)]))
    iio.imwrite(path, np.concatenate(columns, axis=1))


def _framed(picture: np.ndarray) -> np.ndarray:
    return np.pad(picture, ((0, GAP), (0, GAP), (0, 0)), constant_values=255)


if __name__ == "__main__":
    main(*sys.argv[1:])
