"""Boundary lines drawn over the micrograph, with a scale bar."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage import segmentation
from skimage.morphology import dilation, skeletonize

from graincast.labels import fill_lines

# Okabe and Ito's palette, told apart by colour-blind eyes and from every grey
# (https://jfly.uni-koeln.de/color/).
PREDICTED = (230, 159, 0)  # orange
TRUE = (86, 180, 233)  # sky blue
BOTH = (0, 158, 115)  # bluish green
DOUBTFUL = (204, 121, 167)  # reddish purple

LEAST_CONFIDENCE = 0.6
"""Lines of less mean boundary probability are drawn as doubtful. `graincast.segment.instances` takes lines out below 0.4."""
BAR_SHARE = 0.2
"""Longest scale bar, as a share of the picture's width."""
TEXT_SHARE, SMALLEST_TEXT_PX = 0.022, 11
"""Height of the text, as a share of the picture's shorter side, and at least."""


def overlay(image: np.ndarray, labels: np.ndarray, truth: np.ndarray | None = None, *,
            field: np.ndarray | None = None, confidence: np.ndarray | None = None) -> np.ndarray:
    """Draw predicted grain boundaries, and the true ones, over a micrograph.

    Parameters
    ----------
    image : (H, W) uint8 ndarray
    labels : (H, W) integer ndarray
        Predicted grains; 0 = boundary line, 1..N = grains.
    truth : (H, W) bool ndarray, optional
        True on the true boundary lines.
    field : (H, W) bool ndarray, optional
        False where no specimen is seen, e.g. the info bar; no predicted line is drawn there.
    confidence : (H, W) float ndarray, optional
        Boundary probability along the lines, NaN elsewhere (`graincast.segment.confidence.line_confidence`).

    Returns
    -------
    (H, W, 3) uint8 ndarray
        RGB: the image in grey, predicted lines orange, those with less confidence than `LEAST_CONFIDENCE` purple, true lines
        sky blue, pixels on both green. Lines are two pixels wide, however thick the masks are, and purple ones four, so that
        they are not missed.

    Raises
    ------
    ValueError
        If the image is not 2-D uint8 or the shapes differ.
    """
    if image.ndim != 2 or image.dtype != np.uint8:
        raise ValueError(f"want a 2-D uint8 image, got {image.dtype} {image.shape}")
    if any(mask is not None and mask.shape != image.shape for mask in (labels, truth, field, confidence)):
        raise ValueError(f"labels, truth, field and confidence must have the image's shape {image.shape}")
    inside = np.ones(image.shape, bool) if field is None else field
    # Grown beyond the field as well, so that the field's edge does not count as a boundary.
    predicted = segmentation.find_boundaries(fill_lines(labels * inside), mode="inner") & inside
    true = np.zeros_like(predicted) if truth is None else _thin(truth)
    picture = np.repeat(image[..., None], 3, axis=2)
    picture[predicted] = PREDICTED
    if confidence is not None:
        doubtful = predicted & (confidence < LEAST_CONFIDENCE)
        picture[dilation(doubtful, np.ones((3, 3), bool)) & inside & (doubtful | ~predicted)] = DOUBTFUL
    picture[true] = TRUE
    picture[predicted & true] = BOTH
    return picture


def _thin(boundary: np.ndarray) -> np.ndarray:
    return dilation(skeletonize(boundary), np.ones((2, 2), bool))


def with_scale_bar(picture: np.ndarray, pixel_size_um: float | None, rows: int | None = None,
                   legend: Mapping[str, tuple[int, int, int]] | None = None) -> np.ndarray:
    """Draw a scale bar, and a legend of colours, in the lower left corner of a picture.

    Parameters
    ----------
    picture : (H, W, 3) uint8 ndarray
    pixel_size_um : float or None
        Width of a pixel of the picture, um; None: unknown, and the bar is in px.
    rows : int, optional
        The picture's rows that show the specimen, from the top; the bar stands above the info bar.
    legend : mapping of str to (int, int, int), optional
        Words and the RGB colour that they explain.

    Returns
    -------
    (H, W, 3) uint8 ndarray
        A copy, with the bar white on a dark plate; as it was where that has no room. The bar's length is `bar_length`.
    """
    height, width = rows or picture.shape[0], picture.shape[1]
    side = max(round(TEXT_SHARE * min(height, width)), SMALLEST_TEXT_PX)
    length, words = bar_length(width, pixel_size_um)
    bar = max(round(length / (pixel_size_um or 1)), 1)
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), side)  # Pillow's own lacks the letter µ
    lines = [(words, (255, 255, 255)), *(legend or {}).items()]
    line, margin = round(1.4 * side), round(0.6 * side)
    wide = max(bar, *(math.ceil(font.getlength(text)) for text, _ in lines))
    plate = (wide + 2 * margin, line * len(lines) + side // 2 + 2 * margin)
    if plate[0] + 2 * margin > width or plate[1] + 2 * margin > height:
        return picture.copy()
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    left, top = margin, height - margin - plate[1]
    draw.rectangle((left, top, left + plate[0] - 1, top + plate[1] - 1), fill=(20, 20, 20))
    top += margin
    for text, colour in lines[1:]:
        draw.text((left + margin, top), text, fill=colour, font=font)
        top += line
    draw.text((left + margin, top), words, fill=(255, 255, 255), font=font)
    top += line
    draw.rectangle((left + margin, top, left + margin + bar - 1, top + max(side // 3, 2)), fill=(255, 255, 255))
    return np.asarray(image)


def bar_length(width: int, pixel_size_um: float | None) -> tuple[float, str]:
    """The longest scale bar of 1, 2 or 5 times a power of ten within `BAR_SHARE` of a picture's `width` in px, um (px without a
    pixel size), and what is written beside it.

    Examples
    --------
    >>> bar_length(1024, 0.02914)
    (5.0, '5 µm')
    >>> bar_length(1024, None)
    (200.0, '200 px')
    """
    longest = BAR_SHARE * width * (pixel_size_um or 1)
    power = 10.0 ** math.floor(math.log10(longest) + 1e-9)
    length = max(digit * power for digit in (1, 2, 5) if digit * power <= longest * (1 + 1e-9))
    length = length if pixel_size_um else max(length, 1.0)
    return length, f"{length:.12g} {'µm' if pixel_size_um else 'px'}"
