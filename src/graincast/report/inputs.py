"""What a report is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from graincast.evaluate.realism import Realism
from graincast.evaluate.result import OURS as OURS
from graincast.store.imageset import ImageSet


@dataclass(frozen=True)
class ReportInputs:
    """Everything that one run has to say.

    Attributes
    ----------
    title : str
        Name of the report.
    run : mapping of str to str
        What identifies the run, shown as it is: name, git commit, MLflow and ZenML run ids, start. Values
        that are http(s) addresses become links.
    config : mapping
        The configuration, as `graincast.config.Config.model_dump` gives it.
    micrographs : ImageSet
        Prepared micrographs, uint8; ``refused`` holds the files that were not read.
    morphologies : ImageSet
        Simulated pictures, uint8, and instance ids that the synthetic set was drawn from.
    synthetic : ImageSet
        Translated morphologies, uint8, with their instance ids. Its rows have ``fidelity``, the label
        fidelity (0 to 1); ``refused`` holds the dropped images.
    translator_history : pandas.DataFrame
        ``step`` (0-based) and the weighted losses ``cycle, identity, polarity, adversarial_f, adversarial_g,
        discriminator_sem, discriminator_sim``; ``seconds``, where it is given, is the time since the start.
        May be empty.
    segmenter_history : pandas.DataFrame
        ``epoch`` (0-based), ``train_loss``, ``val_loss`` and any further ``val_...`` metrics; ``seconds`` as
        above. May be empty.
    scores : pandas.DataFrame
        One row a set, method and image: ``set, method, image`` and the metrics of
        `graincast.evaluate.metrics`. The trained segmenter is called `OURS`. May be empty.
    realism : Realism or None
        What `graincast.evaluate.realism.realism` gives; None where it was not measured.
    grains : pandas.DataFrame
        One row a grain: ``set, image, equivalent_diameter, unit`` (``um`` or ``px``). May be empty.
    overlays : mapping of str to ndarray
        Caption to picture of `graincast.evaluate.overlay.overlay`, uint8 (height, width, 3).
    virtual : bool
        Whether the micrographs come from the virtual SEM; the report then says so wherever it speaks of them.
    doubts : sequence of str
        Why the segmenter is not to be used (`graincast.evaluate.plausibility.doubts`).

    Raises
    ------
    ValueError
        If a table lacks a column named above, or an overlay is no uint8 RGB image.
    """

    title: str
    run: Mapping[str, str]
    config: Mapping[str, Any]
    micrographs: ImageSet
    morphologies: ImageSet
    synthetic: ImageSet
    translator_history: pd.DataFrame
    segmenter_history: pd.DataFrame
    scores: pd.DataFrame
    realism: Realism | None
    grains: pd.DataFrame
    overlays: Mapping[str, np.ndarray]
    virtual: bool
    doubts: Sequence[str] = ()

    def __post_init__(self) -> None:
        _require("the synthetic set", self.synthetic.rows, "fidelity")
        _require("translator_history", self.translator_history, "step")
        _require("segmenter_history", self.segmenter_history, "epoch", "train_loss", "val_loss")
        _require("scores", self.scores, "set", "method", "image")
        _require("grains", self.grains, "set", "image", "equivalent_diameter", "unit")
        for caption, image in self.overlays.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"overlay '{caption}': want uint8 RGB, got {image.dtype} {image.shape}")

    @property
    def micrograph(self) -> str:
        """What kind of micrograph this report is about: ``real`` or ``virtual``."""
        return "virtual" if self.virtual else "real"


def _require(name: str, table: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing and len(table):
        raise ValueError(f"{name} lacks {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
