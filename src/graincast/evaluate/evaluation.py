"""Scoring a segmenter beside the classical baseline, on held-out synthetic images and on micrographs with masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from graincast.errors import UserError
from graincast.evaluate.baseline import local_threshold_segment
from graincast.evaluate.metrics import read_mask, score_grains
from graincast.evaluate.overlay import overlay
from graincast.measure.grains import measure_grains
from graincast.microscope.reader import find_micrographs, read_micrograph
from graincast.store.imageset import ImageSet

if TYPE_CHECKING:
    from graincast.config import Evaluate
    from graincast.segment.segmenter import Segmenter

OURS, BASELINE = "graincast", "local threshold"
SYNTHETIC = "synthetic, held out"
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".jpg")


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
    """

    scores: pd.DataFrame
    grains: pd.DataFrame
    overlays: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Field:
    """One image with its truth, if there is one, and the grains that each method found in it."""

    name: str
    image: np.ndarray
    truth: np.ndarray | None
    found: dict[str, np.ndarray]


def evaluate(segmenter: Segmenter, synthetic: ImageSet, scored: Sequence[int], micrographs: ImageSet, config: Evaluate, *, bright_boundaries: bool = False,
             masked: Sequence[tuple[Path, Path]] = (), masked_set: str = "real micrographs") -> Evaluation:
    """Score a segmenter and measure the grains it finds.

    Parameters
    ----------
    segmenter : Segmenter
        With its preparation, where `masked` is given.
    synthetic : ImageSet
        Synthetic images with labels that no training saw.
    scored : sequence of int
        Those of them to score: the ones that did not choose anything in training either.
    micrographs : ImageSet
        Prepared micrographs without labels; their grains are measured.
    config : graincast.config.Evaluate
        Baseline and number of overlays.
    bright_boundaries : bool
        Whether boundaries are bright; the baseline, which looks for dark ones, then gets the inverted image.
    masked : sequence of (Path, Path)
        Micrograph files and their masks (255 = boundary line); scored at the file's own size, info bar included.
    masked_set : str
        Name of that set in the tables.

    Returns
    -------
    Evaluation

    Raises
    ------
    UserError
        If a mask does not have its micrograph's size, or a file cannot be read.
    """
    score_rows, grain_tables, overlays = [], [], {}
    fields = {SYNTHETIC: _synthetic_fields(segmenter, synthetic, scored, config, bright_boundaries)}
    if masked:
        fields[masked_set] = _masked_fields(segmenter, masked, config, bright_boundaries)
    for name, images in fields.items():
        for number, field in enumerate(tqdm(images, desc=f"evaluate: {name}", unit="image", disable=None)):
            assert field.truth is not None
            for method, labels in field.found.items():
                score_rows.append({"set": name, "method": method, "image": field.name, **score_grains(labels, field.truth)})
            if number < config.overlays:
                overlays[f"{name}: {field.name}"] = overlay(field.image, field.found[OURS], field.truth)
    grain_tables.append(_sizes("simulated truth", [(str(id_), synthetic.labels(i), None) for i, id_ in enumerate(synthetic.rows["id"])]))
    found = []
    for i, row in enumerate(tqdm(micrographs.rows.to_dict("records"), desc="measure micrographs", unit="image", disable=None)):
        image = micrographs.image(i)
        labels = segmenter.segment(image)
        found.append((str(row["id"]), labels, None if pd.isna(row["pixel_size_um"]) else float(row["pixel_size_um"])))
        if len(found) <= config.overlays:
            overlays[f"micrograph without truth: {row['id']}"] = overlay(image, labels)
    grain_tables.append(_sizes("micrographs", found))
    return Evaluation(pd.DataFrame(score_rows), pd.concat(grain_tables, ignore_index=True), overlays)


def match_masks(micrographs: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Pair the micrographs of a folder (or one file) with the masks of the same stem.

    Raises
    ------
    UserError
        If the folder of masks is missing or no mask belongs to a micrograph.
    """
    if not masks.is_dir():
        raise UserError(f"session.masks '{masks}' is no folder; a folder with one mask a micrograph, named like it, would be right")
    by_stem = {path.stem: path for path in sorted(masks.iterdir()) if path.suffix.lower() in MASK_SUFFIXES}
    pairs = [(path, by_stem[path.stem]) for path in find_micrographs(micrographs) if path.stem in by_stem]
    if not pairs:
        raise UserError(f"no mask in '{masks}' is named like a micrograph in '{micrographs}'; NAME.png for NAME.tif would be right")
    return pairs


def _synthetic_fields(segmenter: Segmenter, synthetic: ImageSet, scored: Sequence[int], config: Evaluate, bright: bool) -> Iterator[_Field]:
    for i in scored:
        image, labels = synthetic.image(i), synthetic.labels(i)
        yield _Field(str(synthetic.rows["id"][i]), image, labels == 0, {OURS: segmenter.segment(image), BASELINE: _baseline(image, config, bright)})


def _masked_fields(segmenter: Segmenter, masked: Sequence[tuple[Path, Path]], config: Evaluate, bright: bool) -> Iterator[_Field]:
    for path, mask_path in masked:
        micrograph, truth = read_micrograph(path), read_mask(mask_path)
        image = np.rint(micrograph.image * 255).astype(np.uint8)
        if truth.shape != image.shape:
            raise UserError(f"{mask_path} has {truth.shape[1]} x {truth.shape[0]} px, but {path.name} has "
                            f"{image.shape[1]} x {image.shape[0]}; they must be equal")
        found = {OURS: segmenter.segment_micrograph(micrograph), BASELINE: _baseline(image, config, bright)}
        yield _Field(path.stem, image, truth, found)


def _baseline(image: np.ndarray, config: Evaluate, bright: bool) -> np.ndarray:
    return local_threshold_segment(255 - image if bright else image, config.baseline_window, config.baseline_sigma)


def _sizes(name: str, maps: Sequence[tuple[str, np.ndarray, float | None]]) -> pd.DataFrame:
    tables = []
    for image_id, labels, pixel_size in maps:
        unit = "um" if pixel_size else "px"
        grains = measure_grains(labels, pixel_size)
        inner = grains[~grains["touches_border"]]
        tables.append(pd.DataFrame({"set": name, "image": image_id, "equivalent_diameter": inner[f"equivalent_diameter_{unit}"], "unit": unit}))
    return pd.concat(tables, ignore_index=True)
