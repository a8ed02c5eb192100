"""The segmenter for those who have an image and want grains; MLflow loads it by this module's name (``loader_module``)."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from graincast.errors import UserError
from graincast.found import Found, find_grains
from graincast.microscope.reader import LARGEST_SAMPLES, Micrograph, from_array, read_bytes
from graincast.segment.segmenter import Segmenter

IMAGE, PIXEL_SIZE, LABELS, GRAINS = "image", "pixel_size_um", "labels", "grains"
"""Columns of what goes in (the first two) and comes out (the last three)."""

SMALLEST_UM, LARGEST_UM = 1e-6, 1e6
"""Pixel sizes that are believed, um: a picometre, a metre."""


class ServedSegmenter:
    """MLflow's view of a segmenter: a table of images in, one of grains out."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter

    def predict(self, model_input: pd.DataFrame | np.ndarray | bytes, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Segment and measure images.

        Parameters
        ----------
        model_input : pandas.DataFrame, ndarray or bytes
            One row an image: ``image`` as `as_micrograph` takes it and, optionally, ``pixel_size_um``, None or NaN where it is
            unknown. Where MLflow does not stand between, a single image will do.
        params : dict, optional
            There are none.

        Returns
        -------
        pandas.DataFrame
            A row an image: ``labels``, int32 (H, W); ``grains``, a list of dicts, the rows of `Found.grains`; ``pixel_size_um``.

        Raises
        ------
        UserError
            As `segment`; it says which image.
        """
        table = model_input if isinstance(model_input, pd.DataFrame) else pd.DataFrame([{IMAGE: model_input}])
        sizes = table[PIXEL_SIZE] if PIXEL_SIZE in table else [None] * len(table)
        rows = []
        for number, (image, size) in enumerate(zip(table[IMAGE], sizes, strict=True), 1):
            try:
                found = self.segment(as_micrograph(image), None if pd.isna(size) else size)
            except UserError as error:
                raise UserError(f"image {number}: {error}") from error
            rows.append({LABELS: found.labels, GRAINS: records(found.grains), PIXEL_SIZE: found.pixel_size_um})
        return pd.DataFrame(rows, columns=[LABELS, GRAINS, PIXEL_SIZE])

    def segment(self, micrograph: Micrograph, pixel_size_um: float | None = None) -> Found:
        """Segment and measure a micrograph.

        Parameters
        ----------
        micrograph : Micrograph
            From `as_micrograph`.
        pixel_size_um : float, optional
            Pixel size where the image itself has none, um.

        Raises
        ------
        UserError
            If the pixel size is no number, or out of `SMALLEST_UM` to `LARGEST_UM`, and as `Segmenter.segment_micrograph`.
        """
        if pixel_size_um is not None and not _is_pixel_size(pixel_size_um):
            shown = str(pixel_size_um)[:40]
            raise UserError(f"pixel_size_um {shown} is no pixel size; micrometres, {SMALLEST_UM:g} to {LARGEST_UM:g}, would be right")
        return find_grains(self.segmenter, micrograph, pixel_size_um)


def _is_pixel_size(value: Any) -> bool:
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return is_number and bool(SMALLEST_UM <= value <= LARGEST_UM)


def as_micrograph(image: np.ndarray | bytes | str | Sequence[Any], largest_samples: int = LARGEST_SAMPLES) -> Micrograph:
    """An image in any of the forms that people have one in.

    Parameters
    ----------
    image : ndarray, bytes, str or list
        Grey values, (H, W), or RGB; the bytes of a TIFF, PNG, JPEG or BMP; these in base64, for JSON; or rows of numbers, which
        have no full scale: outside of [0, 1] they are stretched from their smallest to their largest value.
    largest_samples : int
        Samples that a file may declare, see `read_micrograph`.

    Raises
    ------
    UserError
        If it is none of these, or cannot be read (`read_bytes`, `from_array`).
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return read_bytes(bytes(image), largest_samples)
    if isinstance(image, str):
        try:
            content = base64.b64decode(image, validate=True)
        except ValueError as error:
            raise UserError("the image is a text that is no base64; the base64 of a TIFF, PNG, JPEG or BMP would be right") from error
        return read_bytes(content, largest_samples)
    if not isinstance(image, list | tuple | np.ndarray):
        raise UserError(f"an image cannot be of type {type(image).__name__}; an array, or a file's bytes, in JSON as base64, would be right")
    try:
        pixels = np.asarray(image)
    except ValueError as error:
        raise UserError("the array's rows are not of one length; as many numbers in each would be right") from error
    return from_array(pixels)


def records(grains: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table for JSON: what is not a number is None."""
    rows: list[Any] = grains.astype(object).where(grains.notna(), None).to_dict("records")
    return rows


def _load_pyfunc(data_path: str) -> ServedSegmenter:
    return ServedSegmenter(Segmenter.load(Path(data_path)))
