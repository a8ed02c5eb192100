"""Micrographs with expert masks as a set of labelled fields, prepared as a segmenter sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from skimage import measure, segmentation, transform

from graincast.errors import UserError
from graincast.evaluate.evaluation import check_masks, match_masks
from graincast.evaluate.metrics import read_mask
from graincast.labels import fill_lines
from graincast.microscope.preparation import Preparation
from graincast.microscope.reader import read_micrograph, reason
from graincast.store.imageset import ImageSet, ImageSetWriter

KIND = "fields"


def labelled_fields(preparation: Preparation, micrographs: Path, masks: Path, out: Path) -> ImageSet:
    """Make a benchmark set of micrographs with masks.

    Parameters
    ----------
    preparation : Preparation
        How the images are prepared: a champion's.
    micrographs, masks : Path
        Folders; masks named like their micrographs, 255 = boundary line (see `match_masks` and `read_mask`).
    out : Path
        Folder of the set.

    Returns
    -------
    ImageSet
        Kind ``fields``; a row an image with its ``scale``. Grains are what the mask's lines separate; their ids are
        resampled by nearest neighbour and lines of one pixel on either side drawn anew, so that resampling opens none.

    Raises
    ------
    UserError
        If a mask cannot be read or does not fit its micrograph, or no micrograph can be prepared.
    """
    pairs = match_masks(micrographs, masks)
    check_masks(pairs)
    with ImageSetWriter(out, KIND, config=preparation.to_dict()) as writer:
        writer.info["preparation"] = preparation.to_dict()
        for path, mask in pairs:
            try:
                micrograph = read_micrograph(path)
                prepared = preparation.prepare(micrograph)
            except (UserError, ValueError) as error:
                why = reason(error, path) if isinstance(error, UserError) else str(error)
                writer.refuse(why, id=path.stem, source=path.name)
                continue
            labels = resample_labels(~read_mask(mask)[: prepared.bar_row], prepared.image.shape)
            own = preparation.pixel_size(micrograph)
            writer.add(prepared.image, labels=labels, id=path.stem, source=path.name, pixel_size_um=own / prepared.scale if own else None,
                       scale=prepared.scale)
    return writer.result


def resample_labels(interior: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Instance ids of another size.

    Parameters
    ----------
    interior : ndarray of bool, shape (H, W)
        False on the boundary lines.
    shape : tuple of int
        The size wanted, px.

    Returns
    -------
    ndarray of int32, of that shape
        Ids 1..N of the 4-connected interiors, 0 on lines of two pixels between them.
    """
    grains = fill_lines(measure.label(interior, connectivity=1))
    resized = transform.resize(grains, shape, order=0, preserve_range=True, anti_aliasing=False).astype(np.int32)
    return np.where(segmentation.find_boundaries(resized, mode="thick"), 0, resized)
