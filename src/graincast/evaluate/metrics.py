"""How well a predicted grain or particle map agrees with the truth.

How thick a boundary is drawn is a habit of the hand, not a property of the material. So boundaries are
reduced to one-pixel lines on both sides before they are compared, and grains are compared after both maps
have been grown until the lines are filled.

=================== ========================================================================================
``bf1_2px``         boundary F1 [1]_, tolerance 2 px
``bf1_4px``         the same, 4 px
``bf1_075``         the same, 0.75 % of the image diagonal
``iou_grain``       intersection over union of the grain interiors, both lines redrawn with the median
                    width of the truth's
``iou_boundary``    the same of the boundary class
``miou``            mean of the two
``ap50``            TP / (TP + FP + FN) of instances matched at IoU > 0.5
``pq``              panoptic quality [2]_: sum of the matched IoU / (TP + FP/2 + FN/2)
``vi_split``        variation of information [3]_, bits: H(prediction | truth), over-segmentation
``vi_merge``        H(truth | prediction), under-segmentation
``count_ratio``     predicted / true number of instances
``d_astm_g``        error of the ASTM E112 grain size number from the counts, log2(count_ratio); -inf
                    without any predicted instance
``iou_fg``          particles only, in place of the boundary figures: IoU of the foreground
=================== ========================================================================================

References
----------
.. [1] G. Csurka, D. Larlus, F. Perronnin, "What is a good evaluation measure for semantic segmentation?",
   BMVC 2013. https://doi.org/10.5244/C.27.32
.. [2] A. Kirillov et al., "Panoptic Segmentation", CVPR 2019. https://doi.org/10.1109/CVPR.2019.00963
.. [3] M. Meila, "Comparing clusterings: an information based distance", J. Multivariate Anal. 98
   (2007) 873-895. https://doi.org/10.1016/j.jmva.2006.11.013
"""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import tifffile
from scipy import ndimage as ndi
from scipy import sparse
from skimage import measure, segmentation
from skimage.morphology import skeletonize

from graincast.errors import UserError
from graincast.labels import fill_lines

MIN_AREA_PX = 30  # smaller specks count neither as truth nor as prediction
TOLERANCES_PX = {"bf1_2px": 2.0, "bf1_4px": 4.0}
TOLERANCE_OF_DIAGONAL = 0.0075


def score_grains(pred_labels: np.ndarray, true_boundary: np.ndarray) -> dict[str, float]:
    """Score a predicted grain map against a drawn boundary mask.

    Parameters
    ----------
    pred_labels : (H, W) integer ndarray
        0 = boundary line, 1..N = grains.
    true_boundary : (H, W) bool ndarray
        True on the boundary lines. The true grains are what the lines separate (4-connected).

    Returns
    -------
    dict of str to float
        Every figure of the module's table but ``iou_fg``.

    Raises
    ------
    ValueError
        If shapes or dtypes are not these.

    Examples
    --------
    >>> labels = np.kron([[1, 2], [3, 4]], np.ones((20, 20), int))
    >>> labels[19:21] = labels[:, 19:21] = 0
    >>> scores = score_grains(labels, labels == 0)
    >>> scores["ap50"], scores["bf1_2px"], scores["count_ratio"]
    (1.0, 1.0, 1.0)
    """
    _check(pred_labels, true_boundary, bool)
    return _score_grains(pred_labels, ~true_boundary)


def score_labels(pred_labels: np.ndarray, true_labels: np.ndarray) -> dict[str, float]:
    """Score a predicted grain map against true instance labels, such as a simulation's.

    Parameters
    ----------
    pred_labels, true_labels : (H, W) integer ndarray
        0 = boundary line, 1..N = grains. A true label in several pieces counts as so many grains: the halves
        of a grain that runs through a periodic border lie apart in the image.

    Returns
    -------
    dict of str to float
        As `score_grains`, to which it is equal where the true lines are closed.

    Raises
    ------
    ValueError
        If shapes or dtypes are not these, or the true grains touch without a line anywhere.
    """
    _check(pred_labels, true_labels, np.integer)
    if true_labels.all() and true_labels.min() != true_labels.max():
        raise ValueError("true_labels holds several grains but no boundary pixel (0) between them")
    return _score_grains(pred_labels, true_labels)


def score_instances(pred_labels: np.ndarray, true_labels: np.ndarray) -> dict[str, float]:
    """Compare two grain maps grain by grain, boundaries apart; both may tile the image.

    Parameters
    ----------
    pred_labels, true_labels : (H, W) integer ndarray
        0 = no grain, 1..N = grains; an id is one grain, however many pieces it has.

    Returns
    -------
    dict of str to float
        The instance figures of the module's table.

    Raises
    ------
    ValueError
        If shapes or dtypes are not these.
    """
    _check(pred_labels, true_labels, np.integer)
    return _instance_scores(_drop_specks(pred_labels), _drop_specks(true_labels))


def score_particles(pred_labels: np.ndarray, true_interior: np.ndarray) -> dict[str, float]:
    """Score a predicted particle map against a mask of the particles' interiors.

    Parameters
    ----------
    pred_labels : (H, W) integer ndarray
        0 = background, 1..N = particles.
    true_interior : (H, W) bool ndarray
        True inside the particles; touching ones are split by lines of False.

    Returns
    -------
    dict of str to float
        ``iou_fg`` and the instance figures of the module's table.

    Raises
    ------
    ValueError
        If shapes or dtypes are not these.
    """
    _check(pred_labels, true_interior, bool)
    true = _drop_specks(measure.label(true_interior, connectivity=1))
    pred = _drop_specks(pred_labels)
    return {"iou_fg": _iou(pred_labels > 0, true_interior), **_instance_scores(pred, true)}


def right_grains(pred_labels: np.ndarray, true_regions: np.ndarray) -> np.ndarray:
    """Which predicted grains match a true one at an intersection over union above 0.5, as ``ap50`` counts them.

    Parameters
    ----------
    pred_labels : (H, W) integer ndarray
        1..N = grains; they tile the field, where 0 is no specimen.
    true_regions : (H, W) bool ndarray
        False on the boundary lines. The true grains are what the lines separate (4-connected).

    Returns
    -------
    (N,) bool ndarray
        In the order of the ids.
    """
    _check(pred_labels, true_regions, bool)
    true = fill_lines(_drop_specks(measure.label(true_regions, connectivity=1)))
    _, iou, row, column = _overlaps(pred_labels, true)[:4]
    right = np.zeros(int(pred_labels.max()) + 1, bool)
    right[column[(row > 0) & (column > 0) & (iou > 0.5)]] = True
    return right[1:]


def read_mask(path: Path) -> np.ndarray:
    """Read an expert's mask.

    Parameters
    ----------
    path : Path
        8-bit PNG, TIFF or JPEG, 255 = boundary line (or particle interior), 0 = the rest; grey, or colour of
        which the first channel counts.

    Returns
    -------
    (H, W) bool ndarray
        True above 127.

    Raises
    ------
    UserError
        If the file cannot be read or is no such mask.
    """
    path = Path(path)
    try:
        image = tifffile.imread(path) if path.suffix.lower() in {".tif", ".tiff"} else iio.imread(path)
    except Exception as error:  # decoders raise all sorts on damaged bytes: the file is at fault, not graincast
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{path} cannot be read as a mask image: {cause}") from error
    mask = image[..., 0] if image.ndim == 3 else image
    if mask.ndim != 2 or mask.size == 0 or mask.dtype not in (np.uint8, bool):
        raise UserError(f"{path} is no mask: want one 8-bit image with 255 on the lines, "
                        f"got {image.dtype} {image.shape}")
    if mask.dtype == bool:
        return mask
    if 0 < mask.max() <= 127:
        raise UserError(f"{path} is no mask: its highest value is {mask.max()}, "
                        "want 255 on the lines and 0 elsewhere")
    return mask > 127


def _check(pred: np.ndarray, true: np.ndarray, kind: type) -> None:
    if pred.ndim != 2 or pred.size == 0 or not np.issubdtype(pred.dtype, np.integer):
        raise ValueError(f"prediction: want a 2-D integer label map, got {pred.dtype} {pred.shape}")
    if pred.min() < 0:
        raise ValueError(f"prediction: labels start at 0, got {pred.min()}")
    if true.shape != pred.shape or not np.issubdtype(true.dtype, kind):
        raise ValueError(f"truth: want {kind.__name__} {pred.shape} like the prediction, "
                         f"got {true.dtype} {true.shape}")


def _score_grains(pred_labels: np.ndarray, true_regions: np.ndarray) -> dict[str, float]:
    """Scores against regions of any numbering, bool included, that zeros separate."""
    pred = fill_lines(_drop_specks(pred_labels))
    true = fill_lines(_drop_specks(measure.label(true_regions, connectivity=1)))
    pred_line = skeletonize(segmentation.find_boundaries(pred, mode="thick"))
    return {**_boundary_scores(pred_line, true_regions == 0), **_instance_scores(pred, true)}


def _drop_specks(labels: np.ndarray) -> np.ndarray:
    """Set regions below `MIN_AREA_PX` to 0 and number the others 1..N, int64."""
    keep = np.bincount(labels.ravel()) >= MIN_AREA_PX
    keep[0] = False
    return (np.cumsum(keep) * keep)[labels]


def _boundary_scores(pred_line: np.ndarray, true_boundary: np.ndarray) -> dict[str, float]:
    true_line = skeletonize(true_boundary)
    width = 2 * np.median(ndi.distance_transform_edt(true_boundary)[true_line]) if true_line.any() else 1.0
    # Without any line SciPy measures from a point just outside the first corner. Only the redrawn lines of
    # such an empty map see it, in a few corner pixels; the reference implementation has them too.
    to_pred, to_true = ndi.distance_transform_edt(~pred_line), ndi.distance_transform_edt(~true_line)
    off_truth, off_pred = to_true[pred_line], to_pred[true_line]
    tolerances = {**TOLERANCES_PX, "bf1_075": TOLERANCE_OF_DIAGONAL * float(np.hypot(*pred_line.shape))}
    thick_pred, thick_true = to_pred <= width / 2, to_true <= width / 2
    grain, boundary = _iou(~thick_pred, ~thick_true), _iou(thick_pred, thick_true)
    return {
        **{name: _boundary_f1(off_truth, off_pred, tolerance) for name, tolerance in tolerances.items()},
        "iou_grain": grain, "iou_boundary": boundary, "miou": (grain + boundary) / 2,
    }


def _boundary_f1(off_truth: np.ndarray, off_pred: np.ndarray, tolerance: float) -> float:
    """F1 from the distances of the predicted pixels to the true line and of the true to the predicted."""
    if not off_truth.size or not off_pred.size:
        return float(off_truth.size == off_pred.size)
    precision, recall = (off_truth <= tolerance).mean(), (off_pred <= tolerance).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.count_nonzero(a | b)
    return float(np.count_nonzero(a & b) / union) if union else 1.0


def _instance_scores(pred: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Scores of consecutive labels, 0 = none."""
    n_pred, n_true = int(pred.max()), int(true.max())
    overlap, iou, row, column, area_true, area_pred = _overlaps(pred, true)
    matched = iou[(row > 0) & (column > 0) & (iou > 0.5)]  # above 0.5 a match is unique
    hits, either = matched.size, n_pred + n_true - matched.size
    share = overlap / pred.size
    ratio = n_pred / max(n_true, 1)
    return {
        "ap50": hits / either if either else 1.0,
        "pq": float(matched.sum() / ((n_pred + n_true) / 2)) if either else 1.0,
        "vi_split": float(share @ np.log2(area_true / overlap)),
        "vi_merge": float(share @ np.log2(area_pred / overlap)),
        "count_ratio": ratio,
        "d_astm_g": float(np.log2(ratio)) if ratio else float("-inf"),
    }


def _overlaps(pred: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, ...]:
    """Every pair of labels that share pixels: overlap, IoU, true and predicted label, and the areas of both."""
    ones = np.ones(pred.size, np.int64)
    pairs = sparse.coo_array((ones, (true.ravel(), pred.ravel())), shape=(int(true.max()) + 1, int(pred.max()) + 1))
    pairs.sum_duplicates()
    overlap, (row, column) = pairs.data, pairs.coords
    area_true, area_pred = np.bincount(row, overlap)[row], np.bincount(column, overlap)[column]
    return overlap, overlap / (area_true + area_pred - overlap), row, column, area_true, area_pred
