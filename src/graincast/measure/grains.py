"""Grains in physical units: one row a grain, and what a field of them says about the material.

Every quantity comes from one pass over the map (`graincast.measure.scan`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from graincast.measure.distribution import plain
from graincast.measure.scan import SPACINGS, Scan, ferets, filled, scan
from graincast.measure.standards import astm_e112_planimetric

_PIXEL_MOMENT = 1 / 12  # second moment of a unit square about its centre, px^2


def measure_grains(labels: np.ndarray, pixel_size_um: float | None, image_id: str | None = None,
                   field: np.ndarray | None = None) -> pd.DataFrame:
    """Measure every grain of a map.

    Parameters
    ----------
    labels : (H, W) integer ndarray
        0 = boundary line, 1..N = grains; gaps in the numbering are allowed. One label is one grain, in one
        piece or not.
    pixel_size_um : float or None
        Pixel size in um; None or NaN: unknown, and lengths stay in px.
    image_id : str, optional
        Written to a first column ``image_id``, for tables of several images.
    field : (H, W) bool ndarray, optional
        False where no specimen is seen, e.g. the info bar; such pixels belong to no grain.

    Returns
    -------
    pandas.DataFrame
        One row a grain, in the order of the labels. ``*`` stands for um where the pixel size is known, else
        px.

        ``label``
            The grain's number in `labels`.
        ``centroid_x_px``, ``centroid_y_px``
            Centre of mass in the image, column and row, 0 = centre of the first pixel.
        ``area_*2``
            Area once the boundary lines are shared out to the nearest grains (`graincast.labels.fill_lines`). The areas of a
            field add up to the field.
        ``equivalent_diameter_*``
            Diameter of the circle of that area, 2 sqrt(A / pi).
        ``perimeter_*``
            Crofton's estimate from four scan directions [1]_, the cut along the border included. Over all
            orientations of an edge it is right on average; a straight edge along the rows, columns or
            diagonals comes out 5 % short, one midway between two of these 3 % long.
        ``aspect_ratio``
            Length over width, >= 1, of the ellipse with the grain's second moments.
        ``circularity``
            4 pi A / P^2, in (0, 1]; 1 = circle. Clipped at 1, which the estimate of P would let the smallest
            round grains exceed.
        ``orientation_deg``
            Direction of the ellipse's long axis, degrees in [0, 180), counter-clockwise as the image is seen,
            0 = along the rows. Means nothing where the aspect ratio is close to 1.
        ``touches_border``
            Whether the grain reaches the edge of the field and so may be cut.
        ``feret_max_*``, ``feret_min_*``
            Largest and smallest Feret (caliper) diameter: diameter and width of the convex hull of the pixels'
            corners.
        ``feret_max_deg``
            Direction of the largest, as ``orientation_deg``. Of several equally large ones, one.
        ``neighbours``
            Number of grains that share a boundary with it, of one side of a pixel at least. A grain at the border
            may have more, unseen.

    Raises
    ------
    ValueError
        If the labels are no two-dimensional integers from 0 up, `field` has another shape or the pixel size
        is not positive and finite.

    References
    ----------
    .. [1] D. Legland, K. Kieu, M.-F. Devaux, "Computation of Minkowski measures on 2D and 3D binary images",
       Image Anal. Stereol. 26 (2007) 83-92. https://doi.org/10.5566/ias.v26.p83-92

    Examples
    --------
    >>> table = measure_grains(np.repeat([[1, 2]], 2, axis=0), pixel_size_um=0.5)
    >>> table[["label", "area_um2", "aspect_ratio", "orientation_deg"]]
       label  area_um2  aspect_ratio  orientation_deg
    0      1       0.5           2.0             90.0
    1      2       0.5           2.0             90.0
    """
    check_map(labels, pixel_size_um, field)
    unit, size = unit_and_size(pixel_size_um)
    scanned = scan(filled(labels, field))
    area = scanned.area_px2
    x, y, length, width, angle = _ellipses(scanned, area)
    perimeter = np.pi / 2 * (scanned.crossings * SPACINGS).mean(axis=1)  # Crofton: pi times the mean width
    feret_max, feret_min, feret_angle = ferets(scanned)
    table = pd.DataFrame({
        "label": scanned.ids,
        "centroid_x_px": x,
        "centroid_y_px": y,
        f"area_{unit}2": area * size**2,
        f"equivalent_diameter_{unit}": 2 * np.sqrt(area / np.pi) * size,
        f"perimeter_{unit}": perimeter * size,
        "aspect_ratio": length / width,
        "circularity": np.minimum(4 * np.pi * area / perimeter**2, 1.0),
        "orientation_deg": angle,
        "touches_border": scanned.at_border,
        f"feret_max_{unit}": feret_max * size,
        f"feret_min_{unit}": feret_min * size,
        "feret_max_deg": feret_angle,
        "neighbours": np.bincount(scanned.neighbours.ravel(), minlength=len(area) + 1)[1:],
    })
    if image_id is not None:
        table.insert(0, "image_id", image_id)
    return table


def summarise(table: pd.DataFrame) -> dict[str, Any]:
    """Sum up a table of grains, of one field or of several.

    Parameters
    ----------
    table : pandas.DataFrame
        Rows of `measure_grains`; tables of several fields may be concatenated where their units agree.

    Returns
    -------
    dict
        JSON-able; ``*`` stands for um or px as in the table, and None for what too few grains leave
        undefined.

        ``grains``, ``grains_at_border``
            Number of grains, and of those among them that the edge of the field may cut.
        ``field_area_*2``
            Area measured: the sum of the grains, which tile the field.
        ``mean_``, ``median_``, ``std_equivalent_diameter_*``
            Over the grains not at the border; the sample standard deviation.
        ``area_weighted_mean_equivalent_diameter_*``
            The same mean with each grain weighted by its area.
        ``mean_area_*2``
            Field area over the planimetric count: the grains inside plus half of those at the border
            (Jeffries' procedure [1]_). In a rectangular field the four corner grains count half as well, a
            quarter too much each, so the count lies about one grain high.
        ``grains_per_mm2``, ``astm_grain_size_number``
            Planimetric N_A and G = 3.321928 log10(N_A) - 2.954 [1]_; None in px.

    Raises
    ------
    ValueError
        If the table mixes um and px.

    References
    ----------
    .. [1] ASTM E112-13, "Standard Test Methods for Determining Average Grain Size", planimetric procedure.
    """
    unit = _unit(table)
    area, diameter = table[f"area_{unit}2"], table[f"equivalent_diameter_{unit}"]
    at_border = table["touches_border"].astype(bool)
    whole, weight = diameter[~at_border], area[~at_border]
    count = len(whole) + at_border.sum() / 2
    density = count / area.sum() * 1e6 if unit == "um" and count else None
    weighted_mean = np.average(whole, weights=weight) if len(whole) else None
    summary = {
        "grains": len(table),
        "grains_at_border": at_border.sum(),
        f"field_area_{unit}2": area.sum(),
        f"mean_equivalent_diameter_{unit}": whole.mean(),
        f"median_equivalent_diameter_{unit}": whole.median(),
        f"std_equivalent_diameter_{unit}": whole.std(),
        f"area_weighted_mean_equivalent_diameter_{unit}": weighted_mean,
        f"mean_area_{unit}2": area.sum() / count if count else None,
        "grains_per_mm2": density,
        "astm_grain_size_number": astm_e112_planimetric(density) if density else None,
    }
    return {name: plain(value) for name, value in summary.items()}


def unit_and_size(pixel_size_um: float | None) -> tuple[str, float]:
    """``um`` and the pixel size, or ``px`` and 1 where that is None or NaN."""
    return ("px", 1.0) if pixel_size_um is None or math.isnan(pixel_size_um) else ("um", pixel_size_um)


def check_map(labels: np.ndarray, pixel_size_um: float | None, field: np.ndarray | None) -> None:
    """ValueError unless these are a map of grains, a pixel size or none, and a field or none."""
    if labels.ndim != 2 or labels.size == 0 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"want a 2-D integer label map, got {labels.dtype} {labels.shape}")
    if labels.min() < 0:
        raise ValueError(f"labels start at 0, got {labels.min()}")
    if field is not None and field.shape != labels.shape:
        raise ValueError(f"field {field.shape} does not fit the labels {labels.shape}")
    if pixel_size_um is not None and (pixel_size_um <= 0 or math.isinf(pixel_size_um)):
        raise ValueError(f"pixel_size_um must be positive and finite, got {pixel_size_um}")


def _ellipses(scanned: Scan, area: np.ndarray) -> tuple[np.ndarray, ...]:
    """Centroid x and y, principal standard deviations and angle (degrees) of the grains."""
    grain, row, start, stop = scanned.runs.T.astype(np.int64)
    pixels, middle = stop - start, (start + stop - 1) / 2

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(grain, pixels * values, area.size + 1)[1:] / area

    x, y = mean(middle), mean(row)
    dx, dy = middle - x[grain - 1], y[grain - 1] - row  # upwards, as the image is seen
    # the pixels of a run lie about its middle with (n^2 - 1) / 12
    xx, yy, xy = mean(dx * dx + (pixels**2 - 1) / 12) + _PIXEL_MOMENT, mean(dy * dy) + _PIXEL_MOMENT, mean(dx * dy)
    centre, spread = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    angle = np.rad2deg(np.arctan2(2 * xy, xx - yy) / 2) % 180 % 180  # the first leaves 180 of a tiny negative
    return x, y, np.sqrt(centre + spread), np.sqrt(centre - spread), angle


def _unit(table: pd.DataFrame) -> str:
    units = [unit for unit in ("um", "px") if f"area_{unit}2" in table]
    if len(units) != 1:
        raise ValueError("want a table of measure_grains with areas in um or in px, not both")
    return units[0]
