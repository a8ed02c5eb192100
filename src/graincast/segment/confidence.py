"""How far each found grain can be trusted, from the maps that it was cut from, in a single pass of the network.

A grain is right when it matches a true one at an intersection over union above 0.5, as in ``ap50`` (`graincast.evaluate.metrics`). Its
maps tell how likely that is: a boundary that the network is unsure of, a weak side, a ridge inside that nearly was a boundary. `fit` makes
a probability of them by logistic regression with signs that are known beforehand, on images whose truth is known;
`graincast.segment.train.calibrated` images them. What the figures are worth on micrographs: ``docs/confidence.md``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from scipy import ndimage as ndi
from scipy.optimize import minimize
from scipy.special import expit

from graincast.segment.instances import BESIDE_PX

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

FEATURES: dict[str, int] = {"outline": 1, "weakest_side": 1, "ridge": -1, "roundness": 1, "oddness": -1}
"""What `grain_features` measures, and whether more of it can only raise the confidence (1) or only lower it (-1)."""
SIDE_SHARE = 0.08
"""Shorter sides, as a share of the outline, are corners and no sides."""
INSIDE_SHARE = 0.06
"""A grain's inside begins this far from lines, as a share of the field's median grain diameter: about 2 px of the training images."""
FEWEST = 10
"""Wrong grains, and right ones, that a calibration needs at least: two a weight, where Peduzzi et al. (1996) ask for ten without a penalty."""
PENALTY = 1.0
"""Ridge penalty on the weights of the standardised features (scikit-learn's C = 1)."""
FOLDS, BINS = 5, 10
"""Of the reliability: parts that the images fall into, each judged by the others; and bins of equal count of the calibration error."""
DIGITS = 9
"""Decimals of what is kept, so that the last bits of a sum do not change a file."""


@dataclass(frozen=True)
class Calibration:
    """From the features of a grain to the probability that it is right.

    Attributes
    ----------
    weights : dict of str to float
        Log-odds per unit of each of `FEATURES`.
    bias : float
        Log-odds where all are 0.
    figures : dict of str to float
        `reliability` on images that the weights were not fitted to (cross-fitted by image), and ``errors``, the share of wrong grains.
    """

    weights: dict[str, float]
    bias: float
    figures: dict[str, float]

    def __call__(self, features: pd.DataFrame) -> np.ndarray:
        """Probability, float64 (N,), for rows of `grain_features`."""
        return expit(self.bias + features[list(self.weights)].to_numpy() @ np.array(list(self.weights.values())))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` gave; KeyError or TypeError if it is something else."""
        return cls(dict(values["weights"]), float(values["bias"]), dict(values["figures"]))


def grain_confidence(labels: np.ndarray, maps: np.ndarray, calibration: Calibration) -> np.ndarray:
    """The probability that each found grain is right.

    Parameters
    ----------
    labels, maps
        As for `grain_features`.
    calibration : Calibration
        The segmenter's.

    Returns
    -------
    ndarray
        float32 (N,) in [0, 1], in the order of the ids 1..N; NaN for an id that no pixel has.
    """
    features = grain_features(labels, maps)
    return np.where(features["roundness"].notna(), calibration(features), np.nan).astype(np.float32)


def line_confidence(labels: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """How sure the network is of each side between two found grains.

    Parameters
    ----------
    labels, maps
        As for `grain_features`.

    Returns
    -------
    ndarray
        float32 (H, W): on the two pixels beside a line the mean boundary probability of the whole side between its two grains, [0, 1]
        (of several at a corner the lowest); NaN elsewhere.
    """
    sides = _sides(labels, maps)
    lines = np.full(labels.size, np.inf, np.float32)
    strength = sides.strength[sides.of].astype(np.float32)
    for pixel in (sides.first, sides.second):
        np.minimum.at(lines, pixel, strength)
    return np.where(np.isinf(lines), np.nan, lines).reshape(labels.shape)


def grain_features(labels: np.ndarray, maps: np.ndarray) -> pd.DataFrame:
    """What the maps say about each found grain; no figure depends on the size of a pixel.

    Parameters
    ----------
    labels : ndarray
        int (H, W): 1..N = grains, 0 = no specimen.
    maps : ndarray
        (2, h, W), float in [0, 1]: boundary probability and depth, as `graincast.segment.segmenter.Segmenter.micrograph_maps` gives them.
        Rows from h on are the info bar, without grains.

    Returns
    -------
    DataFrame
        N rows, in the order of the ids; NaN for an id that no pixel has. Mean boundary probability ``outline``: along the lines to other
        grains, ``weakest_side``: along the weakest side (both 0 where there is no other grain), and ``ridge``: inside the grain;
        ``roundness``: 4 pi area / outline^2, the outline in edges of pixels; ``oddness``: |log(area / the field's median area)|.

    Raises
    ------
    ValueError
        If labels and maps do not fit.
    """
    sides = _sides(labels, maps)
    labels = labels[: maps.shape[1]]
    boundary = maps[0]
    count = sides.count
    area = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    known = area > 0
    median = float(np.median(area[known])) if known.any() else 1.0
    grain = sides.ids.ravel()
    probability = np.tile(sides.probability, 2)
    length = np.bincount(grain, minlength=count + 1)[1:]
    edge = sides.edge[1:]
    weakest = np.ones(count + 1)
    for one in sides.pairs:
        proper = sides.length >= SIDE_SHARE * (length + edge)[one - 1]
        np.minimum.at(weakest, one[proper], sides.strength[proper])
    reach = 1 + 2 * max(1, round(INSIDE_SHARE * float(np.sqrt(4 * median / np.pi))))
    beside = np.zeros(labels.shape, np.uint8)
    beside.flat[sides.first] = beside.flat[sides.second] = 1
    inside = ndi.maximum_filter(beside, reach) == 0
    import pandas as pd  # here, as training runs without it

    features = pd.DataFrame({
        "outline": _mean(grain, probability, count),
        "weakest_side": np.where(length > 0, weakest[1:], 0),
        "ridge": _mean(labels[inside], boundary[inside], count),
        "roundness": 4 * np.pi * area / np.maximum(length + edge, 1) ** 2,
        "oddness": np.abs(np.log(np.maximum(area, 1) / median)),
    })
    features[~known] = np.nan
    return features


def fit(features: pd.DataFrame, right: np.ndarray, image: np.ndarray) -> Calibration | None:
    """Fit a calibration to grains whose truth is known.

    Parameters
    ----------
    features : DataFrame
        N rows as `grain_features` gives them, of any number of images.
    right : ndarray
        bool (N,): whether a grain matches a true one (`graincast.evaluate.metrics.right_grains`).
    image : ndarray
        int (N,): which specimen a grain was seen in. The figures of reliability are of specimens that the weights were not fitted to.

    Returns
    -------
    Calibration or None
        None, and a sentence in the log, where there are fewer than `FEWEST` wrong or right grains or fewer than two images: then no
        confidence is better than one made of nothing.
    """
    wrong, images = int((~right).sum()), np.unique(image)
    if min(wrong, len(right) - wrong) < FEWEST or len(images) < 2:
        logger.warning("the segmenter gives no confidence in its grains: %d of them are wrong and %d right in %d validation images; %d of each, "
                       "and two images, would be right", wrong, len(right) - wrong, len(images), FEWEST)
        return None
    fold = np.searchsorted(images, image) % FOLDS
    judged = np.empty(len(right))
    for part in np.unique(fold):
        judged[fold == part] = _logistic(features[fold != part], right[fold != part])(features[fold == part])
    fitted = _logistic(features, right)
    figures = {name: round(value, DIGITS) for name, value in reliability(judged, right).items()}
    return Calibration(fitted.weights, fitted.bias, figures)


def reliability(confidence: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """How well confidence foretells what is right.

    Parameters
    ----------
    confidence : ndarray
        float (N,) in [0, 1].
    right : ndarray
        bool (N,), with both values among them.

    Returns
    -------
    dict of str to float
        ``ece``: expected calibration error, the mean over `BINS` bins of equal count of \\|mean confidence - share of right ones\\|
        (Nguyen & O'Connor 2015); ``brier``: mean squared error (Brier 1950), at best 0, for a constant at best errors (1 - errors);
        ``auc``: how often a right grain has more confidence than a wrong one; ``errors``: share of wrong ones; ``n``: N.
    """
    from sklearn.metrics import brier_score_loss, roc_auc_score  # not at the top: only those who calibrate need it, and it takes a second

    return {"ece": float(sum(share * abs(told - was) for share, told, was in reliability_bins(confidence, right))),
            "brier": float(brier_score_loss(right, confidence)), "auc": float(roc_auc_score(right, confidence)),
            "errors": float((~right).mean()), "n": float(len(right))}


def reliability_bins(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The points of a reliability diagram: a row a bin of equal count, (share of the grains, mean confidence, share of right ones)."""
    parts = [part for part in np.array_split(np.argsort(confidence, kind="stable"), BINS) if part.size]
    return np.array([(part.size / confidence.size, confidence[part].mean(), right[part].mean()) for part in parts])


def _logistic(features: pd.DataFrame, right: np.ndarray) -> Calibration:
    """Logistic regression with the signs of `FEATURES` as bounds, which scikit-learn's does not have; no figures yet."""
    names = list(FEATURES)
    values = features[names].to_numpy(np.float64)
    mean, spread = values.mean(axis=0), values.std(axis=0)
    spread[spread == 0] = 1
    standard = np.column_stack([(values - mean) / spread, np.ones(len(values))])
    sign = np.where(right, 1.0, -1.0)
    penalty = np.append(np.full(len(names), PENALTY), 0)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (standard @ weights)
        slope = -sign * expit(-margin)
        return float(np.logaddexp(0, -margin).sum() + 0.5 * penalty @ weights**2), standard.T @ slope + penalty * weights

    bounds = [{1: (0, None), -1: (None, 0)}[FEATURES[name]] for name in names] + [(None, None)]
    found = minimize(loss, np.zeros(len(bounds)), jac=True, method="L-BFGS-B", bounds=bounds).x
    weights = found[:-1] / spread
    return Calibration({name: round(float(weight), DIGITS) for name, weight in zip(names, weights, strict=True)},
                       round(float(found[-1] - weights @ mean), DIGITS), {})


@dataclass(frozen=True)
class _Sides:
    """The lines between grains as edges of pixels, and the sides that they make up.

    ``first`` and ``second`` are flat indices of the pixels of an edge, ``ids`` their grains, (2, edges), ``probability`` the mean of both of
    the highest boundary probability within `BESIDE_PX`, ``of`` the edge's side. ``pairs``, (2, sides), are the grains of a side, ``length``
    its edges and ``strength`` their mean probability. ``edge`` counts, by id, edges against the field's edge or no specimen.
    """

    count: int
    first: np.ndarray
    second: np.ndarray
    ids: np.ndarray
    probability: np.ndarray
    of: np.ndarray
    pairs: np.ndarray
    length: np.ndarray
    strength: np.ndarray
    edge: np.ndarray


def _sides(labels: np.ndarray, maps: np.ndarray) -> _Sides:
    height, width = maps.shape[1:]
    if maps.ndim != 3 or len(maps) != 2 or labels.shape[0] < height or labels.shape[1:] != (width,):
        raise ValueError(f"labels {labels.shape} and maps {maps.shape} do not fit; (H, W) and (2, h, W) with h up to H would be right")
    field = labels[:height]
    count = int(field.max(initial=0))
    wide = ndi.maximum_filter(maps[0], BESIDE_PX).ravel()
    outer = np.concatenate([field[0], field[-1], field[:, 0], field[:, -1]])
    first, second = [], []
    for step, unlike in ((1, field[:, 1:] != field[:, :-1]), (width, field[1:] != field[:-1])):
        row, column = np.nonzero(unlike)
        first.append(row * width + column)
        second.append(first[-1] + step)
    at = np.stack([np.concatenate(first), np.concatenate(second)])
    ids = field.ravel()[at].astype(np.int64)
    between = (ids > 0).all(axis=0)
    edge = np.bincount(np.concatenate([outer, ids[:, ~between].ravel()]), minlength=count + 1)
    at, ids = at[:, between], ids[:, between]
    probability = wide[at].mean(axis=0, dtype=np.float64)
    keys, of, length = np.unique(ids.min(axis=0) * (count + 1) + ids.max(axis=0), return_inverse=True, return_counts=True)
    strength = np.bincount(of, probability, len(keys)) / length
    return _Sides(count, at[0], at[1], ids, probability, of, np.stack(np.divmod(keys, count + 1)), length, strength, edge)


def _mean(grain: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Mean of the values of each grain 1..count; 0 for a grain without any."""
    return np.bincount(grain, values, count + 1)[1:] / np.maximum(np.bincount(grain, minlength=count + 1)[1:], 1)
