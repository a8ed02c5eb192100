"""What an evaluation found, in memory and on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import imageio.v3 as iio
import numpy as np
import pandas as pd

OURS, BASELINE = "graincast", "local threshold"
"""Names of the methods in the scores."""
SYNTHETIC = "synthetic, held out"
"""Name of the set of synthetic images that no training saw."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes
    ----------
    scores : pandas.DataFrame
        One row a set, method and image: ``set, method, image`` and the metrics of `graincast.evaluate.metrics`.
    grains : pandas.DataFrame
        One row a grain: ``set, image, equivalent_diameter, unit`` (``um`` or ``px``).
    overlays : dict of str to ndarray
        Caption to RGB picture, uint8 (height, width, 3).
    skipped : dict of str to str
        Micrographs with masks that could not be read or prepared, and the reason.
    doubts : list of str
        Why the segmenter is not to be used (`graincast.evaluate.plausibility.doubts`).
    """

    scores: pd.DataFrame
    grains: pd.DataFrame
    overlays: dict[str, np.ndarray]
    skipped: dict[str, str] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write ``scores.csv``, ``grains.parquet``, ``skipped.json``, ``doubts.json`` and ``overlays/*.png`` into an existing folder."""
        self.scores.to_csv(folder / "scores.csv", index=False, float_format="%.6g")
        self.grains.to_parquet(folder / "grains.parquet", index=False)
        (folder / "skipped.json").write_text(json.dumps(self.skipped, indent=1))
        (folder / "doubts.json").write_text(json.dumps(self.doubts, indent=1))
        (folder / "overlays").mkdir()
        captions = {f"{number:02d}.png": caption for number, caption in enumerate(self.overlays)}
        for file, caption in captions.items():
            iio.imwrite(folder / "overlays" / file, self.overlays[caption])
        (folder / "overlays.json").write_text(json.dumps(captions, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        text = {"set": str, "method": str, "image": str}  # an image may be called 001, or NA
        scores = pd.read_csv(folder / "scores.csv", dtype=text, keep_default_na=False, na_values=["", "nan"])
        captions = json.loads((folder / "overlays.json").read_text())
        overlays = {caption: iio.imread(folder / "overlays" / file) for file, caption in captions.items()}
        skipped, doubts = (json.loads((folder / name).read_text()) for name in ("skipped.json", "doubts.json"))
        return cls(scores, pd.read_parquet(folder / "grains.parquet"), overlays, skipped, doubts)
