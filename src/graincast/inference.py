"""From micrograph files to grain maps, overlays and tables of grains."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import tifffile
from tqdm.auto import tqdm

from graincast.compute import ahead
from graincast.errors import UserError
from graincast.evaluate.overlay import overlay
from graincast.measure.grains import measure_grains, summarise
from graincast.microscope.preparation import to_grey8
from graincast.microscope.reader import find_micrographs, read_micrograph, reason
from graincast.segment.segmenter import Segmenter
from graincast.store.imageset import whole_file

AT_ONCE = 4
"""Files that are segmented side by side, at most: each takes some hundred bytes a pixel."""


@dataclass(frozen=True)
class Outcome:
    """What became of one file: its summary, or the reason why there is none."""

    source: Path
    summary: dict[str, Any] | None = None
    refused: str | None = None


def segment_files(segmenter: Segmenter, sources: Sequence[Path], out: Path, pixel_size_um: float | None = None,
                  names: Sequence[str] | None = None) -> list[Outcome]:
    """Segment micrographs and write what was found.

    For each file: ``NAME_labels.tif`` (instance ids at the original size, uint16 or uint32; 0 = info bar),
    ``NAME_overlay.png``, ``NAME_grains.csv`` (one row a grain, units in the column names). ``summary.json`` lists
    every file, the refused ones with their reason.

    Parameters
    ----------
    segmenter : Segmenter
        With its preparation inside.
    sources : sequence of Path
        Files, and folders that are searched recursively, all but `out` where that lies within.
    out : Path
        Folder for the results, other than the micrographs' own; made if absent. Files of the same name are replaced.
    pixel_size_um : float, optional
        Pixel size of files whose metadata has none, um.
    names : sequence of str, optional
        What the results are called, one a file; `sources` are files then. Their stems unless given.

    Returns
    -------
    list of Outcome
        One a file, in the order of `sources`.

    Raises
    ------
    UserError
        If nothing is found, `out` is a source or a source file's folder (so that results never become micrographs), two
        files would write the same results, or `out` cannot be written.
    """
    for source in sources:
        if out.resolve() in (source.resolve(), source.resolve().parent if source.is_file() else None):
            raise UserError(f"results cannot go where the micrographs are, {out}; another folder would be right")
    files = [file for source in sources for file in find_micrographs(source, exclude=out)]
    names = [file.stem for file in files] if names is None else names
    if len(names) != len(files):
        raise ValueError(f"{len(names)} names for {len(files)} files")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"several micrographs are called '{twice[0]}'; their results in {out} would overwrite each other, "
                        "so segment their folders one by one")
    def outcome(file: Path, name: str) -> Outcome:
        try:
            return Outcome(file, summary=_segment_file(segmenter, file, out / name, pixel_size_um))
        except UserError as error:
            return Outcome(file, refused=reason(error, file))

    try:
        out.mkdir(parents=True, exist_ok=True)
        several = ahead(outcome, files, names, threads=min(AT_ONCE, os.cpu_count() or 1))  # most of the work holds no interpreter lock
        outcomes = list(tqdm(several, desc="segment", unit="image", total=len(files), disable=None))
        _write_summary(out, outcomes)
    except OSError as error:
        raise UserError(f"results cannot be written to {out}: {error}") from error
    return outcomes


def _segment_file(segmenter: Segmenter, file: Path, result: Path, pixel_size_um: float | None) -> dict[str, Any]:
    """The results' names begin with `result`."""
    micrograph = read_micrograph(file)
    labels = segmenter.segment_micrograph(micrograph, pixel_size_um)
    assert segmenter.preparation is not None  # or it had not segmented
    pixel_size = segmenter.preparation.pixel_size(micrograph, pixel_size_um)
    field = labels > 0
    grains = measure_grains(labels, pixel_size, field=field)
    stored = labels.astype(np.uint16 if labels.max() < 65536 else np.uint32)
    resolution: dict[str, Any] = {"resolution": (1e4 / pixel_size,) * 2, "resolutionunit": "CENTIMETER"} if pixel_size else {}
    with whole_file(result.with_name(f"{result.name}_labels.tif")) as path:
        tifffile.imwrite(path, stored, compression="zlib", **resolution)
    with whole_file(result.with_name(f"{result.name}_overlay.png")) as path:
        iio.imwrite(path, overlay(to_grey8(micrograph.image, field), labels, field=field), extension=".png")
    with whole_file(result.with_name(f"{result.name}_grains.csv")) as path:
        grains.to_csv(path, index=False, float_format="%.6g")
    return {"pixel_size_um": pixel_size, **summarise(grains)}


def _write_summary(out: Path, outcomes: Iterable[Outcome]) -> None:
    images = [{"file": outcome.source.name, **(outcome.summary or {"refused": outcome.refused})} for outcome in outcomes]
    with whole_file(out / "summary.json") as path:
        path.write_text(json.dumps({"images": [_finite(image) for image in images]}, indent=1, allow_nan=False))


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """NaN has no place in JSON; a figure that does not exist is null."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
