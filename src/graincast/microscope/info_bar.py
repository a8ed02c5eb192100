"""Finding the strip with scale bar and settings that instruments print below a micrograph."""

from __future__ import annotations

import numpy as np
from scipy import ndimage as ndi

TOLERANCE = 0.04  # of full scale: JPEG ringing around the text stays within it
LARGEST_BAR = 0.3  # of the image height
SMALLEST_BAR = 0.02  # of the image height
ROWS_BELOW = 0.01  # of the image height: instruments that paint the bar over the image leave a few rows under it
GAP = 0.01  # of the image height: frames and separators inside the bar
FLAT = 0.5  # of a row at the bar's background level: the least in a row of text
EMPTY = 0.9  # of a row at the background level: the bar's first rows, above the text
IMAGE_FLAT = 0.6  # of a row at that level: the most in the image just above the bar


def find_info_bar(image: np.ndarray, scan_rows: int | None = None) -> int:
    """Find the first row of the info bar at the bottom of a micrograph.

    A bar is a strip of rows most of whose pixels have one and the same grey (black or white behind the text),
    which begins from one row to the next, at a row where the image was not of that grey.

    Parameters
    ----------
    image : ndarray of float, shape (H, W)
        Grey values in [0, 1].
    scan_rows : int, optional
        Rows that the beam scanned, as the metadata have it. It decides when the file has more rows than that by no
        more than a bar's height; else the file was cropped or padded and the pixels decide.

    Returns
    -------
    int
        First row of the bar; the image height if there is none.

    Examples
    --------
    >>> image = np.random.default_rng(0).random((200, 100))
    >>> find_info_bar(image)
    200
    >>> image[180:] = 0
    >>> find_info_bar(image)
    180
    """
    height = image.shape[0]
    if scan_rows is not None and (1 - LARGEST_BAR) * height <= scan_rows < height:
        return scan_rows
    top = int((1 - LARGEST_BAR) * height)
    smallest = max(round(SMALLEST_BAR * height), 4)
    if height - top < 2 * smallest:
        return height
    flat = _share_at_level(image, _bar_level(image[-2 * smallest:]))
    start = _last_run(flat[top:] >= FLAT, height) + top
    if height - start < smallest:
        return height
    above = flat[max(start - smallest, 0):start]
    begins_empty = np.median(flat[start:start + 3]) >= EMPTY
    return start if begins_empty and above.size and np.median(above) < IMAGE_FLAT else height


def _bar_level(strip: np.ndarray) -> float:
    """The strip's most frequent grey."""
    counts, edges = np.histogram(strip, bins=64, range=(0, 1))
    fullest = int(counts.argmax())
    inside = strip[(strip >= edges[fullest]) & (strip <= edges[fullest + 1])]
    return float(np.median(inside)) if inside.size else float(np.median(strip))


def _share_at_level(image: np.ndarray, level: float) -> np.ndarray:
    """Share of each row's pixels that lie at the grey `level`."""
    return (np.abs(image - level) <= TOLERANCE).mean(axis=1)


def _last_run(bar: np.ndarray, height: int) -> int:
    """Where the run of bar rows that reaches the bottom begins; the array's length if none does."""
    gap = max(round(GAP * height), 2)
    rows_below = max(round(ROWS_BELOW * height), 2)
    closed = ndi.binary_closing(np.pad(bar, gap), np.ones(gap + 1, bool))[gap:-gap]
    labels, count = ndi.label(closed)
    if not count:
        return bar.size
    rows = np.flatnonzero(labels == count)
    return int(rows[0]) if rows[-1] >= bar.size - 1 - rows_below else bar.size
