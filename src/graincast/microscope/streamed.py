"""Micrographs read window by window, so that their size in memory is that of the window and not that of the file.

TIFFs only, in strips or tiles, compressed or not; other formats are read whole and offer the same windows.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import tifffile

from graincast.errors import UserError
from graincast.microscope.reader import (
    LARGEST_SAMPLES,
    _black_is_zero,
    _check_content,
    _check_length,
    _check_page,
    _found,
    _grey,
    _sentence,
    read_micrograph,
)

LARGEST_STREAMED = 10_000_000_000
"""Samples that a streamed file may declare: 100 000 x 100 000 px in grey."""
CACHE_BYTES = 256 * 2**20
"""Decoded strips and tiles that are kept: a band of strips is asked for once by every window of a row."""
BAND_ROWS = 512  # rows read at a time where the whole file is looked through


class StreamedMicrograph:
    """A micrograph file that is open for reading windows; a context manager.

    Parameters
    ----------
    path : Path
        Any file that `read_micrograph` reads; a TIFF may be larger than it would take.

    Attributes
    ----------
    shape : tuple of int
        Rows and columns, info bar included.
    bit_depth, pixel_size_um, scan_rows
        As for `graincast.microscope.reader.Micrograph`.

    Raises
    ------
    UserError
        As `read_micrograph`, and if a single strip or tile holds more than its limit of samples, or colours lie in separate planes.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._tif: tifffile.TiffFile | None = None
        self._lock = threading.Lock()
        self._decoded: OrderedDict[int, np.ndarray] = OrderedDict()
        if self.path.is_file() and self.path.suffix.lower() in (".tif", ".tiff") and self.path.stat().st_size:
            self._open()
        else:
            self._whole = read_micrograph(self.path)
            self.shape: tuple[int, int] = self._whole.image.shape
            self.bit_depth, self.pixel_size_um, self.scan_rows = self._whole.bit_depth, self._whole.pixel_size_um, self._whole.scan_rows
        self._before = self._stamp()

    def _open(self) -> None:
        _check_content(self.path)
        try:
            self._tif = tifffile.TiffFile(self.path)
            self._page = page = self._tif.pages[0]
            _check_length(self._tif, page, self.path)
            _check_page(self._tif, page, self.path, LARGEST_STREAMED)
            self.pixel_size_um, _, self.scan_rows = _found(self._tif, self.path)
            self._mapped = page.is_memmappable
            if not self._mapped and int(np.prod(page.chunks)) > LARGEST_SAMPLES:
                raise UserError(f"{self.path} is compressed in pieces of {' x '.join(map(str, page.chunks))} samples; one in tiles would be right")
            if page.axes not in ("YX", "YXS"):
                raise UserError(f"{self.path} has the axes {page.axes}, which are not streamed; a plain grey TIFF (axes YX) would be right")
            self.shape = page.shape[:2]
            self.bit_depth = int(np.ravel(page.bitspersample)[0])
            self._range = self._value_range()
        except UserError:
            self.close()
            raise
        except Exception as error:  # decoders raise all sorts on damaged bytes
            self.close()
            raise UserError(f"{self.path} cannot be read as a TIFF image: {_sentence(error)}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._tif is not None:
            self._tif.close()

    def window(self, rows: slice, columns: slice) -> np.ndarray:
        """Grey values of a window, float32 in [0, 1], on the scale that `read_micrograph` gives them; any thread may ask.

        Raises
        ------
        UserError
            If the window's part of the file is damaged or holds NaN or infinite values.
        """
        if self._tif is None:
            return self._whole.image[rows, columns]
        try:
            pixels, full_scale = _black_is_zero(self._page, self._pixels(rows, columns))
            if self._range is not None:
                low, high = self._range
                pixels = (pixels.astype(np.float64) - low) / ((high - low) or 1)
            return _grey(pixels, full_scale, self.path)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.path} cannot be read as a TIFF image: {_sentence(error)}") from error

    def check_unchanged(self) -> None:
        """Refuse a file that was written to since it was opened: its windows need not belong together; UserError."""
        if self._stamp() != self._before:
            raise UserError(f"{self.path} changed while it was read; segmenting it again once it is written would be right")

    def _stamp(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns

    def _value_range(self) -> tuple[float, float] | None:
        """Smallest and largest value of a type without full scale, where not all lie in [0, 1]; else None."""
        dtype = self._page.dtype
        if dtype is None or dtype.kind == "b" or (dtype.kind == "u" and dtype.itemsize <= 2) or dtype.kind == "c":
            return None
        bands = (self._pixels(slice(top, top + BAND_ROWS), slice(None)) for top in range(0, self.shape[0], BAND_ROWS))
        low, high = np.array([[band.min(), band.max()] for band in bands], float).T
        return (float(low.min()), float(high.max())) if low.min() < 0 or high.max() > 1 else None

    def _pixels(self, rows: slice, columns: slice) -> np.ndarray:
        """Samples as they are stored, (H, W) or (H, W, channels)."""
        (top, bottom, _), (left, right, _) = rows.indices(self.shape[0]), columns.indices(self.shape[1])
        page, tif = self._page, self._tif
        assert tif is not None
        assert page.dtype is not None
        if self._mapped:  # mapped anew each time, or what was read would stay in memory
            mapped = np.memmap(self.path, page.dtype.newbyteorder(tif.byteorder), "r", page.dataoffsets[0], page.shape)
            return np.array(mapped[top:bottom, left:right], page.dtype)
        found = np.zeros((bottom - top, right - left, *page.shape[2:]), page.dtype)
        height, width = page.chunks[:2]
        across = -(-self.shape[1] // width)
        for down, along in itertools.product(range(top // height, -(-bottom // height)), range(left // width, -(-right // width))):
            y, x = down * height, along * width
            piece = self._piece(down * across + along)
            inside = (slice(max(top, y), min(bottom, y + height)), slice(max(left, x), min(right, x + width)))
            here = tuple(slice(part.start - first, part.stop - first) for part, first in zip(inside, (top, left), strict=True))
            there = tuple(slice(part.start - first, part.stop - first) for part, first in zip(inside, (y, x), strict=True))
            found[here] = piece[there]
        return found

    def _piece(self, index: int) -> np.ndarray:
        """A strip or tile, decoded."""
        with self._lock:
            if index in self._decoded:
                self._decoded.move_to_end(index)
                return self._decoded[index]
            page, tif = self._page, self._tif
            assert tif is not None
            tif.filehandle.seek(page.dataoffsets[index])
            encoded = tif.filehandle.read(page.databytecounts[index])
            tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.jpegtables or page.jpegheader else {}
            decoded = page.decode(encoded, index, **tables)[0]
            if decoded is None:  # a sparse file's piece
                decoded = np.zeros((1, *page.chunks[:2], *(page.chunks[2:] or (1,))), page.dtype)
            piece = decoded[0].reshape(*decoded.shape[1:3], *page.shape[2:])
            self._decoded[index] = piece
            while len(self._decoded) > 1 and sum(kept.nbytes for kept in self._decoded.values()) > CACHE_BYTES:
                self._decoded.popitem(last=False)
            return piece
