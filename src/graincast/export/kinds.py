"""Exports: what was found in a micrograph, in the files that other programs read. `KINDS` is the table of them.

Coordinates of polygons are in px of the micrograph in every kind, x to the right and y downwards from its upper left corner, pixel
edges being whole numbers, as ImageJ and QuPath have them. Lengths and areas in tables are in um where the pixel size is known and in
px otherwise; the unit stands in every name.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import imagecodecs
import imageio.v3 as iio
import numpy as np
import pandas as pd
import roifile
import tifffile

from graincast.errors import UserError
from graincast.evaluate.overlay import DOUBTFUL, LEAST_CONFIDENCE, PREDICTED, overlay, with_scale_bar
from graincast.export.outlines import Polygon, outlines
from graincast.microscope.preparation import to_grey8

if TYPE_CHECKING:
    from graincast.found import Found

LARGEST_PICTURE_PX = 30_000_000
"""Overlays of larger micrographs are reduced, by a whole number, to at most this many px."""
ROWS_PER_STRIP = 64
REPORT = "report"


class Piece(NamedTuple):
    """A window of a label map, where its first pixel lies in it, and the grains that it stands for, which lie in it whole."""

    labels: np.ndarray
    row: int
    column: int
    grains: np.ndarray


@dataclass(frozen=True)
class Segmented:
    """What was found in a micrograph.

    Attributes
    ----------
    source : str
        The micrograph's file name.
    image : (h, w) float32 ndarray
        Every `every`-th pixel of its grey values in both directions, info bar included.
    labels : (H, W) integer ndarray
        1..N = grains, 0 = no specimen. May be memory-mapped.
    grains : pandas.DataFrame
        Rows of `graincast.measure.grains.measure_grains`, with ``confidence`` where the segmenter gives one.
    pixel_size_um : float or None
        None: unknown.
    every : int
        See `image`; `reduction` of the labels' shape.
    line_confidence : (h, w) float32 ndarray, optional
        Boundary probability along lines (`graincast.segment.confidence.line_confidence`) at the pixels of `image`.
    windows : callable, optional
        Yields `Piece` after `Piece`, each grain in one of them; the map as a whole unless given.
    """

    source: str
    image: np.ndarray
    labels: np.ndarray
    grains: pd.DataFrame
    pixel_size_um: float | None
    every: int = 1
    line_confidence: np.ndarray | None = None
    windows: Callable[[], Iterable[Piece]] | None = None

    @classmethod
    def of(cls, source: str, image: np.ndarray, found: Found) -> Segmented:
        """Of a whole micrograph, `image` being all of it; reduced as its picture needs."""
        every, sure = reduction(image.shape), found.line_confidence
        part = (slice(None, None, every),) * 2
        return cls(source, image[part], found.labels, found.grains, found.pixel_size_um, every, sure if sure is None else sure[part])

    def pieces(self) -> Iterable[Piece]:
        """Windows that between them hold every grain whole."""
        return self.windows() if self.windows else [Piece(self.labels, 0, 0, self.grains["label"].to_numpy())]

    def polygons(self) -> Iterator[tuple[int, list[Polygon]]]:
        """Every grain's label and exact outline, px."""
        for labels, row, column, grains in self.pieces():
            wanted = set(grains.tolist())
            for label, polygons in outlines(labels):
                if label in wanted:
                    yield label, [[ring + np.array([column, row], np.int32) for ring in polygon] for polygon in polygons]


def reduction(shape: tuple[int, ...]) -> int:
    """By how much a micrograph of this shape is reduced for its overlay."""
    return max(math.ceil(math.sqrt(math.prod(shape) / LARGEST_PICTURE_PX)), 1)


class Kind(NamedTuple):
    """A kind of export: how its file's name ends, what writes it, what it holds, and which programs it is for."""

    suffix: str
    write: Callable[[Segmented, Path], None]
    holds: str
    programs: str


def write_labels(found: Segmented, path: Path) -> None:
    """Instance ids with ImageJ's calibration: uint16, or uint32 from 65536 grains on; 0 = no specimen."""
    labels, size = found.labels, found.pixel_size_um
    largest = int(labels.max(initial=0))
    dtype = np.uint16 if largest < 65536 else np.uint32
    # ImageJ takes its unit from this description and px a unit from the tags, whose own unit must be none then. Written by hand, as
    # tifffile's ImageJ mode has no uint32, which ImageJ reads.
    description = f"ImageJ=1.54f\nunit={'um' if size else 'pixel'}\nmin=0\nmax={largest}\n"
    resolution: dict[str, Any] = {"resolution": (1 / size, 1 / size), "resolutionunit": "NONE"} if size else {}
    strips = (imagecodecs.zlib_encode(labels[top : top + ROWS_PER_STRIP].astype(dtype).tobytes(), level=6)
              for top in range(0, labels.shape[0], ROWS_PER_STRIP))
    tifffile.imwrite(path, strips, shape=labels.shape, dtype=dtype, rowsperstrip=ROWS_PER_STRIP, compression="zlib",
                     photometric="minisblack", description=description, metadata=None, **resolution)


def write_rois(found: Segmented, path: Path) -> None:
    """One ROI a grain, named by its label; grains in parts or with holes are composite ROIs."""
    digits = len(str(found.grains["label"].max())) if len(found.grains) else 1
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for label, polygons in found.polygons():
            name = f"{label:0{digits}d}"
            # an entry of its own, with a fixed date, so that the same grains give the same bytes
            file.writestr(zipfile.ZipInfo(f"{name}.roi"), _roi(polygons, name).tobytes(), zipfile.ZIP_DEFLATED)


def _roi(polygons: Sequence[Polygon], name: str) -> roifile.ImagejRoi:
    rings = [ring for polygon in polygons for ring in polygon]
    roi = roifile.ImagejRoi.frompoints(np.concatenate(rings), name=name)
    roi.right, roi.bottom = roi.right - 1, roi.bottom - 1  # frompoints takes corners for pixels
    if len(rings) == 1:
        roi.roitype = roifile.ROI_TYPE.TRACED
        return roi
    # a path of MOVETO (0), LINETO (1) and CLOSE (4); what lies within an even number of rings is outside
    path = np.concatenate([np.append(np.insert(ring.astype(np.float32), 0, np.arange(len(ring)) > 0, axis=1), np.float32(4)) for ring in rings])
    roi.roitype, roi.multi_coordinates, roi.shape_roi_size = roifile.ROI_TYPE.RECT, path, path.size
    roi.integer_coordinates, roi.n_coordinates = None, 0
    return roi


def write_geojson(found: Segmented, path: Path) -> None:
    """A FeatureCollection (RFC 7946, in px of the image in place of degrees), one grain a feature, as QuPath reads it."""
    told = {"source": found.source, "coordinates": "px, x right, y down, (0, 0) = upper left corner of the image",
            "pixel_size_um": found.pixel_size_um, "width_px": found.labels.shape[1], "height_px": found.labels.shape[0]}
    measured = _measurements(found.grains)
    features = ({"type": "Feature", "id": label, "geometry": _geometry(polygons), "properties": {
        "objectType": "detection", "name": str(label), "label": label, "measurements": measured(label)}} for label, polygons in found.polygons())
    _write_document(path, {"type": "FeatureCollection", "graincast": told}, "features", features)


def _write_document(path: Path, head: Mapping[str, Any], name: str, items: Iterable[Mapping[str, Any]]) -> None:
    """A JSON object whose last member is a list, an item a line; not all are held at once."""
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{_json(head)[:-1]},{_json(name)}:[")
        for number, item in enumerate(items):
            file.write(f"{',' if number else ''}\n{_json(item)}")
        file.write("\n]}\n")


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _geometry(polygons: Sequence[Polygon]) -> dict[str, Any]:
    closed = [[[*ring.tolist(), ring[0].tolist()] for ring in polygon] for polygon in polygons]
    return {"type": "Polygon", "coordinates": closed[0]} if len(closed) == 1 else {"type": "MultiPolygon", "coordinates": closed}


def _measurements(grains: pd.DataFrame) -> Callable[[int], dict[str, float]]:
    """The table's numbers of a grain, those that exist."""
    numbers = grains.set_index("label").select_dtypes(include=["number", "bool"]).astype(float)
    values, place = numbers.to_numpy(), {label: row for row, label in enumerate(numbers.index)}

    def of(label: int) -> dict[str, float]:
        return {name: float(f"{value:.6g}") for name, value in zip(numbers.columns, values[place[label]], strict=True) if np.isfinite(value)}

    return of


def write_coco(found: Segmented, path: Path) -> None:
    """COCO instances: one category, run lengths down the columns (uncompressed RLE), which are exact and know holes."""
    height, width = found.labels.shape
    head = {
        "info": {"description": f"grains in {found.source}, found by graincast", "pixel_size_um": found.pixel_size_um},
        "images": [{"id": 1, "file_name": found.source, "width": width, "height": height}],
        "categories": [{"id": 1, "name": "grain", "supercategory": "microstructure"}]}
    _write_document(path, head, "annotations", _annotations(found))


def _annotations(found: Segmented) -> Iterator[dict[str, Any]]:
    height, width = found.labels.shape
    for labels, row, column, grains in found.pieces():
        wanted = set(grains.tolist())
        for label, x, y, lengths in _column_runs(labels):
            if label not in wanted:
                continue
            x, y = x + column, y + row
            counts = _counts(x * height + y, lengths)
            rest = height * width - sum(counts)
            left, top = int(x[0]), int(y.min())
            yield {"id": label, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": int(lengths.sum()),
                   "bbox": [left, top, int(x[-1]) - left + 1, int((y + lengths).max()) - top],
                   "segmentation": {"size": [height, width], "counts": [*counts, rest] if rest else counts}}


def _column_runs(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Every label with the columns and the first rows of its runs down the columns, in column order, and their lengths, px."""
    height = labels.shape[0]
    down = np.ascontiguousarray(labels.T).ravel()
    first = np.ones(down.size, bool)
    first[1:] = down[1:] != down[:-1]
    first[::height] = True  # runs end with their column
    starts = np.flatnonzero(first)
    lengths, ids = np.diff(starts, append=down.size), down[starts]
    order = np.argsort(ids, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(ids[order])) + 1):
        if ids[part[0]]:
            yield int(ids[part[0]]), *np.divmod(starts[part], height), lengths[part]


def _counts(starts: np.ndarray, lengths: np.ndarray) -> list[int]:
    """Pixels outside and inside by turns, down the columns; a run that goes on in the next column is one."""
    gaps = np.diff(starts, prepend=0)
    gaps[1:] -= lengths[:-1]
    new = np.flatnonzero(np.concatenate([[True], gaps[1:] > 0]))
    return np.stack([gaps[new], np.add.reduceat(lengths, new)], axis=1).ravel().tolist()


def write_csv(found: Segmented, path: Path) -> None:
    """The table of grains, six digits."""
    found.grains.to_csv(path, index=False, float_format="%.6g")


def write_parquet(found: Segmented, path: Path) -> None:
    """The table of grains, all digits."""
    found.grains.to_parquet(path, index=False)


def write_overlay(found: Segmented, path: Path) -> None:
    """The micrograph with the lines found, a scale bar and, where lines have a confidence, a legend."""
    iio.imwrite(path, draw_overlay(found), extension=".png")


def draw_overlay(found: Segmented) -> np.ndarray:
    """The overlay, (h, w, 3) uint8; of a large micrograph every n-th pixel (`reduction`), with lines between these."""
    every, sure = found.every, found.line_confidence
    labels = np.array(found.labels[::every, ::every])
    field = labels > 0
    picture = overlay(to_grey8(found.image, field), labels, field=field, confidence=sure)
    legend = {"boundary": PREDICTED, f"doubtful (p < {LEAST_CONFIDENCE})": DOUBTFUL} if sure is not None else None
    rows = int(np.flatnonzero(field.any(axis=1))[-1]) + 1 if field.any() else None
    return with_scale_bar(picture, found.pixel_size_um and found.pixel_size_um * every, rows, legend)


KINDS = {
    "labels": Kind("_labels.tif", write_labels, "map of instance ids with its pixel size", "Fiji, napari, scikit-image"),
    "overlay": Kind("_overlay.png", write_overlay, "micrograph with boundaries and scale bar", "anything that shows pictures"),
    "csv": Kind("_grains.csv", write_csv, "one row a grain, units in the names", "spreadsheets, pandas, R, Origin"),
    "parquet": Kind("_grains.parquet", write_parquet, "the same table, all digits", "pandas, polars, DuckDB, Arrow"),
    "roi": Kind("_rois.zip", write_rois, "outline of each grain as a region of interest", "ImageJ and Fiji (ROI Manager)"),
    "geojson": Kind("_grains.geojson", write_geojson, "polygons with holes and measurements, in px", "QuPath, GIS, shapely"),
    "coco": Kind("_coco.json", write_coco, "instance masks as run lengths", "pycocotools, CVAT, FiftyOne, Detectron2"),
}
"""Kinds of export, one file a micrograph each; the folder's `REPORT` is one more."""

USUAL = ("labels", "overlay", "csv")
"""What is written unless somebody asks for something else."""


def chosen(text: str) -> tuple[str, ...]:
    """Kinds named with commas between them, or ``all``; a UserError names the one that does not exist.

    Examples
    --------
    >>> chosen("csv, roi")
    ('csv', 'roi')
    """
    known = (*KINDS, REPORT)
    names = known if text.strip() == "all" else tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise UserError(f"there is no export '{name}'; {', '.join(known)} or all would be right")
    return names
