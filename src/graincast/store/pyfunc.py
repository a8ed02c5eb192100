"""How MLflow loads and serves a logged segmenter; named as the model's ``loader_module``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from graincast.segment.segmenter import Segmenter


class ServedSegmenter:
    """MLflow's view of a segmenter: a batch in, a batch out."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter

    def predict(self, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """Instance ids, int32 (n, height, width), of prepared images, uint8 (n, height, width)."""
        return np.stack([self.segmenter.segment(image) for image in np.asarray(model_input, np.uint8)])


def _load_pyfunc(data_path: str) -> ServedSegmenter:
    return ServedSegmenter(Segmenter.load(Path(data_path)))
