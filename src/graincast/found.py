"""What a micrograph shows: its grains found and measured, and what to know of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from graincast.measure.field import FieldSizes, measure_field
from graincast.measure.grains import measure_grains
from graincast.microscope.reader import Micrograph
from graincast.segment.confidence import grain_confidence, line_confidence
from graincast.segment.instances import instances
from graincast.segment.segmenter import Segmenter

FEW_COLOURED = 0.2
"""Share of coloured pixels up to which they are taken for something drawn into the image."""


class Found(NamedTuple):
    """What a micrograph shows.

    Attributes
    ----------
    labels : ndarray
        Instance ids, int32, at the image's own size; 1..N tile the field, 0 on the info bar.
    grains : pandas.DataFrame
        `graincast.measure.grains.measure_grains` of them: one row a grain, um or px in the columns' names; and ``confidence``
        where the segmenter gives one.
    pixel_size_um : float or None
        Pixel size that was measured with, um; None: nobody knew it, and the table is in px.
    sizes : FieldSizes
        Figures of the field (`graincast.measure.field.measure_field`).
    line_confidence : ndarray or None
        `graincast.segment.confidence.line_confidence`, (H, W); None where the segmenter gives no confidence.
    warnings : list of str
        What is odd about the file, and about the figures.
    """

    labels: np.ndarray
    grains: pd.DataFrame
    pixel_size_um: float | None
    sizes: FieldSizes
    line_confidence: np.ndarray | None
    warnings: list[str]


def find_grains(segmenter: Segmenter, micrograph: Micrograph, pixel_size_um: float | None = None) -> Found:
    """Segment and measure a micrograph; `pixel_size_um` is for one that does not know its own. Raises as `Segmenter.segment_micrograph`."""
    maps, scale = segmenter.micrograph_maps(micrograph, pixel_size_um)
    labels, sure = np.zeros(micrograph.image.shape, np.int32), None
    labels[: maps.shape[1]] = instances(maps, segmenter.cut, scale)
    assert segmenter.preparation is not None  # or there were no maps
    size, field = segmenter.preparation.pixel_size(micrograph, pixel_size_um), labels > 0
    grains = measure_grains(labels, size, field=field)
    sizes = measure_field(labels, size, grains, field)
    if segmenter.calibration is not None:
        grains["confidence"] = grain_confidence(labels, maps, segmenter.calibration)[grains["label"] - 1]
        sure = np.full(labels.shape, np.nan, np.float32)
        sure[: maps.shape[1]] = line_confidence(labels[: maps.shape[1]], maps)
    odd = doubts(micrograph.image.size, int(micrograph.instrument.get("pages", 1)), micrograph.coloured_px)
    return Found(labels, grains, size, sizes, sure, [*odd, *sizes.warnings])


def doubts(image_px: int, pages: int, coloured_px: int = 0) -> list[str]:
    """What is odd about a file with an image of that many px, so many of them coloured, and so many pages."""
    found, share = [], coloured_px / image_px
    if pages > 1:
        found.append(f"the file has {pages} pages, of which the first was segmented")
    if 0 < share <= FEW_COLOURED:
        found.append(f"{coloured_px} px are coloured, as of a scale bar or annotation drawn into the image; lines of it may be taken for boundaries")
    elif share > FEW_COLOURED:
        found.append(f"{share:.0%} of the pixels are coloured and their luminance was segmented; the grey image of the microscope would be right")
    return found
