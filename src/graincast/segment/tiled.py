"""Micrographs far larger than memory comfort: read, predicted, cut into grains and written block by block.

No array of the whole field is ever held. What a block cannot know is agreed upon beforehand or afterwards:

*Beforehand*, info bar, quality, scale, grey range and the network's mean and variance come from a mosaic of windows spread over
the field (`SPREAD` by `SPREAD`, `SPREAD_PX` px wide; the whole field where that is smaller). The blocks are then resampled on the
grid of the whole image.

*Afterwards*, grains that a seam runs through are put together. Both blocks have seen a strip on either side of the seam; two
grains that meet on it are one if they cover most of the smaller one's pixels in that strip together. Where one block parts what
the other does not, the pieces become one grain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import imagecodecs
import numpy as np
import tifffile
import torch
from scipy import ndimage as ndi
from scipy import sparse

from graincast.compute import ahead
from graincast.errors import UserError
from graincast.microscope.info_bar import find_info_bar
from graincast.microscope.preparation import Preparation, evened_out, resampled, resampled_shape, stretch_range
from graincast.microscope.reader import Micrograph
from graincast.microscope.streamed import BAND_ROWS, StreamedMicrograph
from graincast.segment.instances import instances
from graincast.segment.network import STRIDE
from graincast.segment.segmenter import HALO, Run, Segmenter, brought_back, eager
from graincast.store.imageset import whole_file

if TYPE_CHECKING:
    import pandas as pd

LARGE_PX = 40_000_000
"""Pixels from which a file is better segmented here: at once it would take some 150 bytes a pixel, 6 GB."""
SPREAD, SPREAD_PX = 4, 512
"""Windows of the mosaic in each direction, and their side, px."""
BAR_COLUMNS = 1024  # of the file, evenly spread, that the info bar is sought in
BLOCK_PX = 1536
"""Side of a block with its halo, px of the network's scale, and of the micrograph's if these are fewer ..."""
LARGEST_BLOCK_PX = 3072
"""... up to this many of the micrograph's."""
HALO_GRAINS = 1.5
"""Width of the halo in grain diameters: most grains on a seam are seen whole by both blocks."""
LARGEST_HALO_PX = 1024  # of the micrograph
WORKERS = 2
"""Blocks in the making at the same time, at most: each takes some 0.5 GB."""
MEASURED_PX = 2048
"""Side of the windows that grains are measured in, px."""
ROWS_PER_STRIP = 32
Progress = Callable[[int, int], None]
"""Receives (blocks done, blocks in all)."""


class Block(NamedTuple):
    """A window of a label map with grains that lie in it whole, and by two pixels inside it but for the field's edge.

    Attributes
    ----------
    labels : ndarray
        int32 (height, width), no zeros.
    row, column : int
        Where its first pixel lies in the map.
    grains : ndarray
        int64, the ids of those grains that this block stands for, ascending; every grain is in one block's.
    """

    labels: np.ndarray
    row: int
    column: int
    grains: np.ndarray


@dataclass(frozen=True)
class LargeResult:
    """What became of a large micrograph.

    Attributes
    ----------
    labels : Path
        TIFF of instance ids, uint32, at the micrograph's size: 1..N tile the field, 0 on the info bar.
    shape : tuple of int
        Its rows and columns.
    bar_row : int
        First row of the info bar; the number of rows if there is none.
    pixel_size_um : float or None
        The file's own pixel size, else the caller's, else the preparation's default, um; None if nobody knows.
    scale : float
        Pixels of the network's scale per pixel of the micrograph.
    boxes : ndarray
        int64 (N, 4): first row, row after the last, first column, column after the last, px, of grain 1..N.
    """

    labels: Path
    shape: tuple[int, int]
    bar_row: int
    pixel_size_um: float | None
    scale: float
    boxes: np.ndarray

    def blocks(self) -> Iterator[Block]:
        """Windows of the label map that between them hold every grain whole, each one as its own in one of them.

        A window is as large as its grains ask for, `MEASURED_PX` px and about a grain in each direction.
        """
        cells = self.boxes[:, [0, 2]] // MEASURED_PX
        with StreamedLabels(self.labels) as file:
            for cell in np.unique(cells, axis=0):
                grains = np.flatnonzero((cells == cell).all(axis=1))
                boxes = self.boxes[grains]
                top, left = np.maximum(boxes[:, [0, 2]].min(axis=0) - 2, 0).tolist()
                bottom, right = np.minimum(boxes[:, [1, 3]].max(axis=0) + 2, (self.bar_row, self.shape[1])).tolist()
                yield Block(file.labels(slice(top, bottom), slice(left, right)), top, left, grains + 1)

    def grains(self, image_id: str | None = None) -> pd.DataFrame:
        """The table of all grains, as `graincast.measure.grains.measure_grains` gives it of a map that fits into memory."""
        import pandas as pd

        from graincast.measure.grains import measure_grains

        tables = []
        for block in self.blocks():
            table = measure_grains(block.labels, self.pixel_size_um, image_id)
            table = table[table["label"].isin(block.grains)]
            tables.append(table.assign(centroid_x_px=table["centroid_x_px"] + block.column, centroid_y_px=table["centroid_y_px"] + block.row))
        return pd.concat(tables).sort_values("label", ignore_index=True)


class StreamedLabels(StreamedMicrograph):
    """A label TIFF that is open for reading windows."""

    def labels(self, rows: slice, columns: slice) -> np.ndarray:
        """Ids of a window, int32."""
        return self._pixels(rows, columns).astype(np.int32)

    def _value_range(self) -> None:
        return None


def segment_large(segmenter: Segmenter, file: Path, out_labels: Path, pixel_size_um: float | None = None,
                  progress: Progress | None = None) -> LargeResult:
    """Segment a micrograph of any size and write its label map.

    Parameters
    ----------
    segmenter : Segmenter
        With its preparation inside. On a processor it is compiled (`Segmenter.compile`) if it is not yet.
    file : Path
        A TIFF, read window by window; other formats are read whole.
    out_labels : Path
        TIFF to write: uint32 in zlib-compressed strips, with the pixel size in its resolution tags where known. Beside it, an
        unnamed scratch file takes 4 bytes a pixel meanwhile.
    pixel_size_um : float, optional
        Pixel size for a file whose metadata has none, um.
    progress : callable, optional
        Called with (blocks done, blocks in all) after every block.

    Returns
    -------
    LargeResult

    Raises
    ------
    UserError
        As `graincast.microscope.reader.read_micrograph` and `Segmenter.segment_micrograph`, but for the limits of size; and if
        the file changes meanwhile.
    """
    if segmenter.preparation is None:
        raise UserError("this segmenter was trained without micrographs and cannot prepare one; segment prepared images instead")
    if segmenter.run is None:
        segmenter.compile(workers())
    with StreamedMicrograph(file) as micrograph, TemporaryFile(dir=out_labels.parent) as scratch:
        pixel_size = micrograph.pixel_size_um or pixel_size_um or segmenter.preparation.default_pixel_size_um
        try:
            field = _Field(micrograph, segmenter.preparation, pixel_size)
        except ValueError as error:
            raise UserError(str(error)) from error
        grid = _Grid(field)
        seams = _Seams(grid)
        run = segmenter.run or eager(segmenter.network, segmenter.config["precision"])
        made = ahead(lambda place: _block(place, grid, field, run, segmenter), grid.places(), threads=workers())
        band = np.zeros((0, 0), np.uint32)
        for done, (place, labels) in enumerate(zip(grid.places(), made, strict=True), 1):
            rows, columns = grid.core(place)
            if place[1] == 0:
                band = np.empty((rows.stop - rows.start, field.shape[1]), np.uint32)
            band[:, columns] = seams.add(place, labels)
            if place[1] == len(grid.columns) - 2:
                scratch.write(band.data)
            if progress:
                progress(done, (len(grid.rows) - 1) * (len(grid.columns) - 1))
        micrograph.check_unchanged()
        ids, boxes = seams.joined()
        with whole_file(out_labels) as path:
            _write(path, scratch, ids, field.shape, micrograph.shape, pixel_size)
    return LargeResult(out_labels, micrograph.shape, field.shape[0], pixel_size, field.scale, boxes)


def workers() -> int:
    """Blocks in the making at the same time; what a segmenter is compiled for (`Segmenter.compile`) that is used here."""
    return min(WORKERS, torch.get_num_threads())


class _Field:
    """A streamed micrograph above its info bar, with what the preparation of each part of it must know of the whole."""

    def __init__(self, file: StreamedMicrograph, preparation: Preparation, pixel_size_um: float | None) -> None:
        self.file, self.preparation = file, preparation
        self.shape = self._bar_row(), file.shape[1]
        mosaic = np.block([[file.window(rows, columns) for columns in _spread(self.shape[1])] for rows in _spread(self.shape[0])])
        refused = replace(preparation, cut_info_bar=False).inspect(Micrograph(mosaic, file.bit_depth)).refused
        if refused is not None:
            raise ValueError(refused)
        self.scale = preparation.scale_for(pixel_size_um, mosaic)
        self.resampled_shape = resampled_shape(self.shape, self.scale)
        mosaic = resampled(mosaic, resampled_shape(mosaic.shape, self.scale))
        self.grey_range = stretch_range(mosaic)
        prepared = evened_out(mosaic, self.grey_range, preparation.clahe_clip, preparation.clahe_tile_px)
        preparation.check_polarity(prepared)
        self.mean, self.deviation = float(prepared.mean()), max(float(prepared.std()), 1e-3)

    def _bar_row(self) -> int:
        height, width = self.file.shape
        if not self.preparation.cut_info_bar:
            return height
        step = -(-width // BAR_COLUMNS)
        bands = [self.file.window(slice(top, top + BAND_ROWS), slice(None))[:, ::step] for top in range(0, height, BAND_ROWS)]
        return find_info_bar(np.concatenate(bands), self.file.scan_rows)

    def standard(self, rows: slice, columns: slice) -> np.ndarray:
        """The network's input, float32, of a window of the resampled grid."""
        tile = round(self.preparation.clahe_tile_px)
        wide: tuple[slice, ...] = rows, columns
        if self.preparation.clahe_clip > 0:  # from a boundary of the equalisation's tiles to another, so that they are those of the whole
            wide = tuple(slice(max((part.start // tile - 1) * tile, 0), min((-(-part.stop // tile) + 1) * tile, extent))
                         for part, extent in zip(wide, self.resampled_shape, strict=True))
        grey = evened_out(self._resampled(*wide), self.grey_range, self.preparation.clahe_clip, tile)
        grey = grey[tuple(slice(part.start - w.start, part.stop - w.start) for part, w in zip((rows, columns), wide, strict=True))]
        return (grey.astype(np.float32) - self.mean) / self.deviation

    def _resampled(self, rows: slice, columns: slice) -> np.ndarray:
        """A window of the resampled grid, as it comes out of resampling the whole."""
        edges, parts = [], []
        for part, extent, count in zip((rows, columns), self.shape, self.resampled_shape, strict=True):
            step = extent / count
            support = math.ceil(3 * max(step, 1)) + 1  # Lanczos'
            first = max(math.floor(part.start * step) - support, 0)
            parts.append(slice(first, min(math.ceil(part.stop * step) + support, extent)))
            edges.append((part.start * step - first, part.stop * step - first))
        source = self.file.window(*parts)
        if self.shape == self.resampled_shape:
            return source[tuple(slice(round(low), round(high)) for low, high in edges)]
        (top, bottom), (left, right) = edges
        return resampled(source, (rows.stop - rows.start, columns.stop - columns.start), (left, top, right, bottom))


def _spread(extent: int) -> list[slice]:
    """`SPREAD` windows of `SPREAD_PX` over an extent, or all of it where it is no longer than these."""
    if extent <= SPREAD * SPREAD_PX:
        return [slice(0, extent)]
    return [slice(start, start + SPREAD_PX) for start in np.linspace(0, extent - SPREAD_PX, SPREAD).astype(int).tolist()]


class _Grid:
    """Where the seams lie and how far the blocks see beyond them; everything in px of the micrograph."""

    def __init__(self, field: _Field) -> None:
        scale = field.scale
        self.halo = min(math.ceil(HALO_GRAINS * field.preparation.grain_diameter_px / scale), LARGEST_HALO_PX)
        side = min((BLOCK_PX - 2 * HALO) / scale, LARGEST_BLOCK_PX)
        core = max(int(side) - 2 * self.halo, self.halo)
        self.shape = field.shape
        self.rows, self.columns = (np.linspace(0, extent, -(-extent // core) + 1).round().astype(int).tolist() for extent in field.shape)

    def places(self) -> Iterator[tuple[int, int]]:
        """Row and column of each block, row by row."""
        return itertools.product(range(len(self.rows) - 1), range(len(self.columns) - 1))

    def core(self, place: tuple[int, int]) -> tuple[slice, slice]:
        """The part of the field that a block stands for."""
        row, column = place
        return slice(self.rows[row], self.rows[row + 1]), slice(self.columns[column], self.columns[column + 1])

    def seen(self, place: tuple[int, int]) -> tuple[slice, slice]:
        """The same with the halo."""
        rows, columns = (slice(max(part.start - self.halo, 0), min(part.stop + self.halo, extent))
                         for part, extent in zip(self.core(place), self.shape, strict=True))
        return rows, columns


def _block(place: tuple[int, int], grid: _Grid, field: _Field, run: Run, segmenter: Segmenter) -> np.ndarray:
    """Instance ids, int32, of what a block sees."""
    seen = grid.seen(place)
    window, inner, pad = [], [], []
    for part, extent, count in zip(seen, field.shape, field.resampled_shape, strict=True):
        low, high = part.start * count / extent, part.stop * count / extent
        start, stop = math.floor(low) - HALO, math.ceil(high) + HALO
        start -= start % STRIDE  # the network pools from line to line of this grid, as in the whole; off it, one grain in a hundred differs
        stop += -stop % STRIDE
        window.append(slice(max(start, 0), min(stop, count)))
        pad.append((max(-start, 0), max(stop - count, 0)))
        inner.append((low - start, high - start))
    maps = run(np.pad(field.standard(*window), pad, mode="symmetric"))
    (top, bottom), (left, right) = inner
    shape = tuple(part.stop - part.start for part in seen)
    maps = brought_back(maps, shape, (left, top, right, bottom))
    return instances(maps, segmenter.cut, field.scale)


class _Seams:
    """Numbers the blocks' grains through, and notes which are one."""

    def __init__(self, grid: _Grid) -> None:
        self.grid, self.reach = grid, grid.halo // 2
        self.used = 1  # ids given so far, 0 among them
        self.same: list[np.ndarray] = []
        self.ids: list[np.ndarray] = []
        self.boxes: list[np.ndarray] = []
        self.above: dict[int, np.ndarray] = {}
        """Of each column of blocks, the last one's strip along its lower seam."""
        self.left = np.zeros((0, 0), np.uint32)

    def add(self, place: tuple[int, int], labels: np.ndarray) -> np.ndarray:
        """Take a block's instance ids; returns those of its core, uint32, numbered through."""
        rows, columns = self.grid.core(place)
        seen_rows, seen_columns = self.grid.seen(place)
        core = (slice(rows.start - seen_rows.start, rows.stop - seen_rows.start),
                slice(columns.start - seen_columns.start, columns.stop - seen_columns.start))
        self._note_boxes(labels[core], rows.start, columns.start)
        numbered = labels.astype(np.uint32)
        numbered += np.uint32(self.used - 1)
        self.used += int(labels.max())
        lower, upper, after, before = ((slice(max(edge - self.reach, 0), edge + self.reach))
                                       for edge in (core[0].stop, core[0].start, core[1].stop, core[1].start))
        if place[0]:
            self.same.append(_one_grain(self.above[place[1]], numbered[upper, core[1]]))
        if place[1]:
            self.same.append(_one_grain(self.left.T, numbered[core[0], before].T))
        self.above[place[1]], self.left = numbered[lower, core[1]].copy(), numbered[core[0], after].copy()
        return numbered[core]

    def _note_boxes(self, core: np.ndarray, row: int, column: int) -> None:
        found = [(label, box) for label, box in enumerate(ndi.find_objects(core), 1) if box is not None]
        self.ids.append(np.array([label for label, _ in found]) + self.used - 1)
        self.boxes.append(np.array([(row + y.start, row + y.stop, column + x.start, column + x.stop) for _, (y, x) in found]))

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """Final ids, uint32, by the ids given so far, and the grains' boxes (see `LargeResult`)."""
        first, second = np.concatenate([np.zeros((2, 0), int), *self.same], axis=1)
        bonds = sparse.coo_array((np.ones(first.size, bool), (first, second)), shape=(self.used, self.used))
        component = sparse.csgraph.connected_components(bonds, directed=False)[1]
        ids, parts = np.concatenate(self.ids), np.concatenate(self.boxes)
        _, start, grain = np.unique(component[ids], return_index=True, return_inverse=True)
        grain = np.argsort(np.argsort(start))[grain]  # in the order in which they were met
        boxes = np.empty((start.size, 4), int)
        boxes[:, ::2], boxes[:, 1::2] = np.iinfo(int).max, 0
        for edge, extreme in enumerate((np.minimum, np.maximum, np.minimum, np.maximum)):
            extreme.at(boxes[:, edge], grain, parts[:, edge])
        final = np.zeros(self.used, np.uint32)
        final[ids] = grain + 1
        return final, boxes


def _one_grain(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pairs of ids that are one grain, int (2, pairs), of two blocks' ids in the strip along their seam, its middle row.

    Those that meet across the seam and have more than half of the smaller one's pixels in the strip in common.
    """
    middle = first.shape[0] // 2
    (ids, one), (others, other) = (np.unique(strip, return_inverse=True) for strip in (first, second))
    shape = ids.size, others.size
    together = np.bincount((one * shape[1] + other).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    sizes = np.minimum(together.sum(axis=1)[:, None], together.sum(axis=0)[None])
    meet = np.zeros(shape, bool)
    meet[one[middle - 1], other[middle]] = True
    here, there = np.nonzero(meet & (together > sizes / 2))
    return np.stack([ids[here], others[there]]).astype(int)


def _write(path: Path, scratch: IO[bytes], ids: np.ndarray, field: tuple[int, int], shape: tuple[int, int], pixel_size_um: float | None) -> None:
    """The label map in strips, its ids looked up in `ids`; zeros below the field."""
    scratch.seek(0)

    def strip(top: int, stored: bytes) -> bytes:
        found = np.zeros((min(ROWS_PER_STRIP, shape[0] - top), shape[1]), np.uint32)
        given = np.frombuffer(stored, np.uint32).reshape(-1, shape[1])
        found[: len(given)] = ids[given]
        return bytes(imagecodecs.zlib_encode(found.tobytes(), level=1))

    tops = range(0, shape[0], ROWS_PER_STRIP)
    stored = (scratch.read(4 * shape[1] * max(min(ROWS_PER_STRIP, field[0] - top), 0)) for top in tops)
    resolution: dict[str, Any] = {"resolution": (1e4 / pixel_size_um,) * 2, "resolutionunit": "CENTIMETER"} if pixel_size_um else {}
    tifffile.imwrite(path, ahead(strip, tops, stored, threads=workers()), shape=shape, dtype=np.uint32, photometric="minisblack",
                     rowsperstrip=ROWS_PER_STRIP, compression="zlib", metadata=None, **resolution)
