"""Scoring a segmenter beside the classical baseline, on held-out synthetic images and on micrographs with masks."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
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
from graincast.evaluate.plausibility import Result, doubts, has_gaps
from graincast.evaluate.result import BASELINE, OURS, SYNTHETIC, Evaluation
from graincast.measure.grains import measure_grains
from graincast.microscope.preparation import to_grey8
from graincast.microscope.reader import Micrograph, find_micrographs, read_micrograph, reason
from graincast.store.imageset import ImageSet

if TYPE_CHECKING:
    from graincast.config import Evaluate
    from graincast.segment.segmenter import Segmenter

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".jpg")


@dataclass(frozen=True)
class _Field:
    """One image with its truth, if there is one, and the grains that each method found in it."""

    name: str
    image: np.ndarray
    truth: np.ndarray | None
    found: dict[str, np.ndarray]


def evaluate(segmenter: Segmenter, synthetic: ImageSet, scored: Sequence[int], micrographs: ImageSet, config: Evaluate, *,
             bright_boundaries: bool = False, masked: Sequence[tuple[Path, Path]] = (), masked_set: str = "real micrographs") -> Evaluation:
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
        If a mask cannot be read or does not have its micrograph's size, or no micrograph with a mask can be prepared.
    """
    skipped: dict[str, str] = {}
    score_rows, grain_tables, overlays = [], [], {}
    fields = {SYNTHETIC: _synthetic_fields(segmenter, synthetic, scored, config, bright_boundaries)}
    if masked:
        fields[masked_set] = _masked_fields(segmenter, masked, config, bright_boundaries, skipped)
    for name, images in fields.items():
        for number, scene in enumerate(tqdm(images, desc=f"evaluate: {name}", unit="image", disable=None)):
            assert scene.truth is not None
            for method, labels in scene.found.items():
                score_rows.append({"set": name, "method": method, "image": scene.name, **score_grains(labels, scene.truth)})
            if number < config.overlays:
                overlays[f"{name}: {scene.name}"] = overlay(scene.image, scene.found[OURS], scene.truth)
    grain_tables.append(_sizes("simulated truth", [(str(id_), synthetic.labels(i), None) for i, id_ in enumerate(synthetic.rows["id"])]))
    found, results = [], []
    rows = micrographs.rows.to_dict("records")
    diameters = [row.get("grain_diameter_px", np.nan) * row.get("scale", np.nan) for row in rows]
    dark = (255 - micrographs.image(i) if bright_boundaries else micrographs.image(i) for i in range(len(rows)))
    gaps = has_gaps(dark, diameters)
    for i, (row, diameter) in enumerate(zip(tqdm(rows, desc="measure micrographs", unit="image", disable=None), diameters, strict=True)):
        image = micrographs.image(i)
        labels = segmenter.segment(image)
        found.append((str(row["id"]), labels, None if pd.isna(row["pixel_size_um"]) else float(row["pixel_size_um"])))
        results.append(Result.of(image, labels, diameter, gaps=gaps, bright=bright_boundaries))
        if len(found) <= config.overlays:
            overlays[f"micrograph without truth: {row['id']}"] = overlay(image, labels)
    grain_tables.append(_sizes("micrographs", found))
    return Evaluation(pd.DataFrame(score_rows), pd.concat(grain_tables, ignore_index=True), overlays, skipped, doubts(results))


def match_masks(micrographs: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Pair the micrographs of a folder (or one file) with their masks.

    A mask belongs to the micrograph of the same path within its folder, extension aside, else to the one of the same
    name. One folder may lie within the other.

    Raises
    ------
    UserError
        If the folder of masks is missing, no mask belongs to a micrograph, or one could belong to several.
    """
    if not masks.is_dir():
        raise UserError(f"session.masks '{masks}' is no folder; a folder with one mask a micrograph, named like it, would be right")
    root = micrographs.parent if micrographs.is_file() else micrographs
    images = find_micrographs(micrographs, exclude=masks)
    drawn = [path for path in find_micrographs(masks, exclude=micrographs) if path.suffix.lower() in MASK_SUFFIXES]
    pairs: dict[Path, Path] = {}
    for image_key, mask_key in ((lambda path: path.relative_to(root).with_suffix(""), lambda path: path.relative_to(masks).with_suffix("")),
                                (lambda path: path.stem, lambda path: path.stem)):
        found, wanted = _index(images, image_key), _index(drawn, mask_key)
        for key in sorted(found.keys() & wanted.keys()):
            if len(found[key]) > 1 or len(wanted[key]) > 1:
                raise UserError(f"{len(found[key])} micrographs in '{micrographs}' and {len(wanted[key])} masks in '{masks}' are called '{key}'; "
                                "one mask a micrograph, in the same sub-folders, would be right")
            pairs[found[key][0]] = wanted[key][0]
        images = [path for path in images if path not in pairs]
        drawn = [path for path in drawn if path not in pairs.values()]
    if not pairs:
        raise UserError(f"no mask in '{masks}' is named like a micrograph in '{micrographs}'; NAME.png for NAME.tif would be right")
    return sorted(pairs.items())


def check_masks(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Check before long work that masks can be read and fit their micrographs.

    Raises
    ------
    UserError
        Naming the first mask that is none or has another size than its micrograph. A micrograph that cannot be read
        is passed over: `evaluate` skips it.
    """
    for path, mask_path in pairs:
        truth = read_mask(mask_path)
        try:
            micrograph = read_micrograph(path)
        except UserError:
            continue
        _check_size(truth, mask_path, micrograph, path)


def _check_size(truth: np.ndarray, mask_path: Path, micrograph: Micrograph, path: Path) -> None:
    height, width = micrograph.image.shape
    if truth.shape != (height, width):
        raise UserError(f"{mask_path} has {truth.shape[1]} x {truth.shape[0]} px, but {path.name} has {width} x {height}; they must be equal")


def _index(paths: Sequence[Path], key: Callable[[Path], object]) -> dict[str, list[Path]]:
    index = defaultdict(list)
    for path in paths:
        index[str(key(path))].append(path)
    return dict(index)


def _synthetic_fields(segmenter: Segmenter, synthetic: ImageSet, scored: Sequence[int], config: Evaluate, bright: bool) -> Iterator[_Field]:
    for i in scored:
        image, labels = synthetic.image(i), synthetic.labels(i)
        yield _Field(str(synthetic.rows["id"][i]), image, labels == 0, {OURS: segmenter.segment(image), BASELINE: _baseline(image, config, bright)})


def _masked_fields(segmenter: Segmenter, masked: Sequence[tuple[Path, Path]], config: Evaluate, bright: bool,
                   skipped: dict[str, str]) -> Iterator[_Field]:
    root = Path(os.path.commonpath([path.parent for path, _ in masked]))
    for path, mask_path in masked:
        name, truth = path.relative_to(root).with_suffix("").as_posix(), read_mask(mask_path)
        try:
            micrograph = read_micrograph(path)
            labels = segmenter.segment_micrograph(micrograph)
        except UserError as error:
            skipped[name] = reason(error, path)
            continue
        _check_size(truth, mask_path, micrograph, path)
        image = to_grey8(micrograph.image, labels > 0)
        yield _Field(name, image, truth, {OURS: labels, BASELINE: _baseline(image, config, bright)})
    if len(skipped) == len(masked):
        name, why = next(iter(skipped.items()))
        raise UserError(f"none of the {len(masked)} micrographs with masks can be segmented; {name}: {why}")


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
