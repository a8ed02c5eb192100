"""How much synthetic micrographs look like real ones, beside the untextured simulated pictures they were drawn from.

Every image is cut into square patches, every patch described (`graincast.evaluate.realism_features`), and the
collections of patches compared. A distance means little alone, so each comes with its *floor*: the distance between
two halves of the real images. No label and no network trained elsewhere is needed; VGG16 is asked where its weights
are on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import imageio.v3 as iio
import numpy as np
import pandas as pd
import torch
from scipy.stats import wasserstein_distance
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from graincast.evaluate.realism_features import (
    GRADIENT_STEP,
    Features,
    Patches,
    cut_patches,
    describe,
    encoder_features,
    nearest_ssim,
    vgg16_features,
    vgg16_file,
)
from graincast.store.imageset import ImageSet
from graincast.synthesise.fidelity import label_fidelity
from graincast.synthesise.generate import TRANSLATED

REAL, SYNTHETIC, UNTEXTURED = "real", "synthetic", "untextured"
HALVES = ("real, one half", "real, other half")
"""What is shown of the floor: the real images, parted in two once."""
SHOWN = (*HALVES, SYNTHETIC, UNTEXTURED)
"""What stands side by side in the pictures."""
SPLITS = 100
"""Random halvings behind each floor and each interval."""
INTERVAL = (2.5, 97.5)
"""Percentiles of the halvings that bound an interval."""
EMBEDDED = 240
"""Patches of a set, spread evenly, that go through the networks and into the maps."""
PERPLEXITY = 30
"""Neighbours that t-SNE keeps near each point."""

Images = Sequence[np.ndarray]


@dataclass(frozen=True)
class Realism:
    """What `realism` found: everything that is drawn of it.

    Attributes
    ----------
    figures : pandas.DataFrame
        ``figure, set, value, low, high``: a row a figure and a set. The rows of `REAL` hold the floors. ``low`` and
        ``high`` bound the 95 % interval where there is one, else NaN.
    patches : pandas.DataFrame
        A row a patch: ``set, image, half`` (of the real images, one of `HALVES`), ``entropy`` (bits), ``ssim`` (to the
        nearest real patch) and, for the patches that went through them, the places ``encoder_x, encoder_y`` and
        ``vgg16_x, vgg16_y`` in the networks' maps (no unit; NaN elsewhere).
    curves : pandas.DataFrame
        ``curve, set, x, value``; ``intensity``: share of the pixels at each grey level; ``spectrum``: mean power, dB,
        over cycles per px. The sets are those of the figures and both `HALVES`.
    fidelity : pandas.DataFrame
        ``set, fidelity``: the label fidelity of each synthetic image and of the untextured one with the same labels.
    surfaces : dict of str to ndarray
        A typical patch, uint8 (side, side), of each half of the real images, of the synthetic ones, and the
        untextured patch that belongs to the latter.
    notes : list of str
        What could not be measured, and why.
    """

    figures: pd.DataFrame
    patches: pd.DataFrame
    curves: pd.DataFrame
    fidelity: pd.DataFrame
    surfaces: dict[str, np.ndarray]
    notes: list[str]

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """The figures as figure to set to value, JSON-able; bounds are called ``SET_low`` and ``SET_high``."""
        summary: dict[str, dict[str, float]] = {}
        for figure, name, value, low, high in self.figures.itertuples(index=False, name=None):
            entries = {name: value, f"{name}_low": low, f"{name}_high": high}
            summary.setdefault(figure, {}).update({key: number for key, number in entries.items() if np.isfinite(number)})
        return summary

    def save(self, folder: Path) -> None:
        """Write ``{figures,fidelity}.csv``, ``{patches,curves}.parquet``, ``surfaces.png`` and ``notes.json`` into an existing folder."""
        self.figures.to_csv(folder / "figures.csv", index=False, float_format="%.6g")
        self.patches.to_parquet(folder / "patches.parquet", index=False)
        self.curves.to_parquet(folder / "curves.parquet", index=False)
        self.fidelity.to_csv(folder / "fidelity.csv", index=False, float_format="%.6g")
        iio.imwrite(folder / "surfaces.png", np.hstack([self.surfaces[name] for name in SHOWN]))
        (folder / "notes.json").write_text(json.dumps(self.notes, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        surfaces = np.hsplit(iio.imread(folder / "surfaces.png"), len(SHOWN))
        return cls(pd.read_csv(folder / "figures.csv"), pd.read_parquet(folder / "patches.parquet"), pd.read_parquet(folder / "curves.parquet"),
                   pd.read_csv(folder / "fidelity.csv"), dict(zip(SHOWN, surfaces, strict=True)), json.loads((folder / "notes.json").read_text()))


def set_realism(micrographs: ImageSet, synthetic: ImageSet, morphologies: ImageSet, network: torch.nn.Module) -> Realism:
    """`realism` of whole sets.

    Parameters
    ----------
    micrographs : ImageSet
        Prepared micrographs.
    synthetic : ImageSet
        Translated morphologies; its rows name the ``morphology`` and the ``look`` of each. Of several translated copies the
        first counts, untranslated ones do not.
    morphologies : ImageSet
        Simulated pictures and instance ids that `synthetic` was drawn from.
    network : torch.nn.Module
        The trained segmenter's.

    Raises
    ------
    ValueError
        If a morphology that `synthetic` names is not there.
    """
    first = synthetic.rows[synthetic.rows["look"] == TRANSLATED].drop_duplicates("morphology")
    place = {name: index for index, name in enumerate(morphologies.rows["id"])}
    if missing := set(first["morphology"]) - set(place):
        raise ValueError(f"{morphologies.path} lacks the morphology {min(missing)} of {synthetic.path}")
    drawn_from = [place[name] for name in first["morphology"]]
    return realism(list(micrographs), [synthetic.image(int(i)) for i in first.index], [morphologies.image(i) for i in drawn_from],
                   [morphologies.labels(i) for i in drawn_from], first["fidelity"].tolist(), network)


def realism(real: Images, synthetic: Images, untextured: Images, labels: Images, fidelity: Sequence[float], network: torch.nn.Module,
            patch: int = 64, seed: int = 0) -> Realism:
    """Compare synthetic micrographs, and the simulated pictures they were drawn from, with real ones.

    Parameters
    ----------
    real : sequence of (H, W) uint8 ndarray
        Micrographs of any sizes, prepared as the synthetic ones are meant to look (same pixel size, same histogram
        equalisation).
    synthetic, untextured, labels : sequence of (H, W) ndarray
        Translated pictures, uint8, the pictures they were translated from, uint8, and their instance ids, int; image
        by image of one shape.
    fidelity : sequence of float
        `graincast.synthesise.fidelity.label_fidelity` of each synthetic image, measured when it was drawn: only then is it
        known whether its boundaries were drawn as wide gaps.
    network : torch.nn.Module
        The trained segmenter's, whose encoder is asked.
    patch : int
        Side of the patches, px; lowered to half the shorter side of the smallest image.
    seed : int
        Seed of the patches drawn, of the halvings and of the maps.

    Returns
    -------
    Realism
        With the figures of `distances`, and

        ``encoder_kid``, ``vgg16_kid``
            The kernel distance as for ``texture_kid``, on the features of the segmenter's own encoder and of VGG16,
            each patch's features divided by their root mean square.
        ``ssim_nearest``
            Mean structural similarity of a set's patches to the real patch nearest to each (`nearest_ssim`); of real
            ones, to the nearest in another image (another patch, where there is one image only). Good is what the
            real patches have among themselves, no more.
        ``label_fidelity``
            Mean of `fidelity`, and of the untextured pictures' own; 1 = every boundary where the labels have it.

    Raises
    ------
    ValueError
        As `cut_patches`, or if the synthetic images, pictures and labels do not belong together.
    """
    if [(*image.shape,) for image in synthetic] != [picture.shape for picture in untextured] or {len(labels), len(fidelity)} != {len(synthetic)}:
        raise ValueError("want a picture, labels of the same shape and a label fidelity for each synthetic image")
    rng = np.random.default_rng([seed, 1])
    sets = cut_patches({REAL: real, SYNTHETIC: synthetic, UNTEXTURED: untextured}, patch, seed)
    described = {name: describe(patches.grey) for name, patches in sets.items()}
    halves = halvings(sets[REAL].image, rng)
    table = pd.concat([_patch_table(name, patches, sets[REAL], halves[0], described[name]) for name, patches in sets.items()], ignore_index=True)

    embedded = {name: _spread(len(patches)) for name, patches in sets.items()}
    chosen = {name: patches.take(embedded[name]) for name, patches in sets.items()}
    rows = np.concatenate([np.flatnonzero(table["set"] == name)[embedded[name]] for name in sets])
    features, notes = _network_features(network, chosen)
    figures = distances(described, sets, halves, rng)
    for source, of_set in features.items():
        figures += kernel_figures(f"{source}_kid", of_set, chosen, rng)
        table.loc[rows, [f"{source}_x", f"{source}_y"]] = tsne(np.concatenate(list(of_set.values())), seed)

    plain = [label_fidelity(picture, ids) for picture, ids in zip(untextured, labels, strict=True)]
    kept = pd.DataFrame({"set": np.repeat([SYNTHETIC, UNTEXTURED], len(labels)), "fidelity": [*fidelity, *plain]})
    figures += _means("ssim_nearest", table, "ssim") + _means("label_fidelity", kept, "fidelity")
    surfaces = _surfaces(chosen, features["encoder"], halves[0][embedded[REAL]])
    return Realism(pd.DataFrame(figures), table, _curves(described, halves[0], sets[REAL].grey.shape[1]), kept, surfaces, notes)


# Figures


def distances(described: Mapping[str, Features], sets: Mapping[str, Patches], halves: np.ndarray, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Distances of the statistics of texture between the real patches and every other set.

    Parameters
    ----------
    described : mapping of str to dict
        `graincast.evaluate.realism_features.describe` of each set; one is called `REAL`.
    sets : mapping of str to Patches
        The same sets' patches.
    halves : ndarray
        (`SPLITS`, n), bool, from `halvings` of the real patches.
    rng : numpy.random.Generator
        Draws the halvings behind the intervals.

    Returns
    -------
    list of dict
        ``figure, set, value, low, high``; 0 = alike. The figures of `REAL` are the floors: means over the halvings.

        ``intensity_distance``
            Wasserstein-1 distance of the grey-level histograms, grey levels.
        ``entropy_distance``
            The same of the patches' Shannon entropies, bits.
        ``sharpness_distance``
            The same of the gradient magnitudes (Sobel), grey levels per px.
        ``spectrum_distance``
            Root mean square difference, over spatial frequency, of the mean log power spectra, dB.
        ``spectral_slope_distance``
            Wasserstein-1 distance of the patches' spectral slopes, d log(power) / d log(frequency).
        ``texture_kid``
            Kernel distance: `kernel_figures` on the square roots of histograms of local binary patterns at three radii
            and of gradient magnitudes in place of Inception features.
    """
    figures = []
    for figure, (statistic, distance) in DISTANCES.items():
        real = described[REAL][statistic]
        figures += [_figure(figure, name, distance(real, values[statistic])) for name, values in described.items() if name != REAL]
        figures.append(_figure(figure, REAL, float(np.mean([distance(real[half], real[~half]) for half in halves]))))
    return figures + kernel_figures("texture_kid", {name: values["texture"] for name, values in described.items()}, sets, rng)


def kernel_figures(figure: str, features: Mapping[str, np.ndarray], sets: Mapping[str, Patches], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Kernel distance between the real patches and every other set, with its interval.

    The unbiased estimate of MMD^2 with the cubic polynomial kernel of the Kernel Inception Distance [1]_, times 1000.
    Figures compare with one another, not with published KIDs: the features are others. Being unbiased, it may come out
    just below 0.

    Parameters
    ----------
    figure : str
        Name of the figure.
    features : mapping of str to ndarray
        (n, d) of each set, one of them `REAL`; rows of unit length, which bounds the figure by 7000.
    sets : mapping of str to Patches
        The same patches' origin.
    rng : numpy.random.Generator
        Draws the halvings.

    Returns
    -------
    list of dict
        ``figure, set, value, low, high``. The interval holds the middle 95 % of the distances between random halves of
        both sets, of whole images where a set has several: leaving out half gives an estimate the spread of the whole
        (delete-d jackknife [2]_). The floor is the mean distance between two halves of the real patches, its interval
        their middle 95 %; of a single image it is lenient, as both halves share everything but the place.

    References
    ----------
    .. [1] M. Binkowski, D. J. Sutherland, M. Arbel, A. Gretton, "Demystifying MMD GANs", ICLR 2018.
       https://arxiv.org/abs/1801.01401
    .. [2] J. Shao, C. F. J. Wu, "A general theory for jackknife variance estimation", Ann. Statist. 17 (1989)
       1176-1197. https://doi.org/10.1214/aos/1176347263
    """
    real, halves = features[REAL], halvings(sets[REAL].image, rng)
    figures = []
    for name, other in features.items():
        if name == REAL:
            between = kernel_distances(real, real, halves, ~halves)
            figures.append(_figure(figure, REAL, between.mean(), between))
        else:
            value = kernel_distances(real, other, np.ones((1, len(real)), bool), np.ones((1, len(other)), bool))[0]
            figures.append(_figure(figure, name, value, kernel_distances(real, other, halves, halvings(sets[name].image, rng))))
    return figures


def kernel_distances(a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> np.ndarray:
    """1000 times the unbiased MMD^2, with the kernel (x . y + 1)^3, between subsets of rows.

    Parameters
    ----------
    a, b : ndarray
        (n, d) and (m, d).
    of_a, of_b : ndarray
        (k, n) and (k, m), bool: the rows of each subset, two or more.

    Returns
    -------
    ndarray
        (k,), float64.
    """
    kernel = lambda x, y: (x.astype(float) @ y.astype(float).T + 1) ** 3

    def within(rows: np.ndarray, subsets: np.ndarray) -> np.ndarray:
        gram, member, count = kernel(rows, rows), subsets.astype(float), subsets.sum(axis=1)
        np.fill_diagonal(gram, 0)
        return ((member @ gram) * member).sum(axis=1) / (count * (count - 1))

    across = ((of_a.astype(float) @ kernel(a, b)) * of_b).sum(axis=1) / (of_a.sum(axis=1) * of_b.sum(axis=1))
    return 1000 * (within(a, of_a) + within(b, of_b) - 2 * across)


def halvings(origin: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`SPLITS` random halves of patches, (SPLITS, n) bool: whole images where there are two or more.

    `origin`, (n,), is the number of the image each patch comes from.
    """
    units = origin if origin[-1] > 0 else np.arange(origin.size)
    numbers = np.unique(units)
    return np.stack([np.isin(units, rng.permutation(numbers)[: numbers.size // 2]) for _ in range(SPLITS)])


def _figure(figure: str, name: str, value: float, spread: np.ndarray | None = None) -> dict[str, Any]:
    low, high = (np.nan, np.nan) if spread is None else np.percentile(spread, INTERVAL)
    return {"figure": figure, "set": name, "value": float(value), "low": float(low), "high": float(high)}


def _histogram_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Wasserstein-1 distance of the pooled histograms, in bins."""
    return float(np.abs(np.cumsum(a.mean(axis=0) - b.mean(axis=0))).sum())


def _spectrum_distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a.mean(axis=0) - b.mean(axis=0)) ** 2)))


Distance = Callable[[np.ndarray, np.ndarray], float]
DISTANCES: dict[str, tuple[str, Distance]] = {
    "intensity_distance": ("intensity", _histogram_distance),
    "entropy_distance": ("entropy", lambda a, b: float(wasserstein_distance(a, b))),
    "sharpness_distance": ("gradient", lambda a, b: GRADIENT_STEP * _histogram_distance(a, b)),
    "spectrum_distance": ("spectrum", _spectrum_distance),
    "spectral_slope_distance": ("slope", lambda a, b: float(wasserstein_distance(a, b))),
}
"""Figure to the statistic it compares and the distance it takes."""


# What is drawn


def tsne(features: np.ndarray, seed: int) -> np.ndarray:
    """Places, (n, 2), of features, (n, d), in a map that keeps neighbours together.

    L. van der Maaten, G. Hinton, "Visualizing data using t-SNE", JMLR 9 (2008) 2579-2605; started from the first two
    principal components, which keeps the large-scale layout.
    """
    mapping = TSNE(perplexity=min(PERPLEXITY, (len(features) - 1) / 3), init="pca", learning_rate="auto", random_state=seed)
    with threadpool_limits(1):  # sums over several threads come out in any order, and the map follows the last bit
        return mapping.fit_transform(features)


def _patch_table(name: str, patches: Patches, real: Patches, half: np.ndarray, described: Features) -> pd.DataFrame:
    if name == REAL:
        units = real.image if real.image[-1] > 0 else np.arange(len(real))
        halves, ssim = np.where(half, *HALVES), nearest_ssim(real.grey, real.grey, units[:, None] != units)
    else:
        halves, ssim = None, nearest_ssim(patches.grey, real.grey)
    return pd.DataFrame({"set": name, "image": patches.image, "half": halves, "entropy": described["entropy"], "ssim": ssim})


def _network_features(network: torch.nn.Module, sets: Mapping[str, Patches]) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Features of unit length by network and set, and why there are none of a network."""
    features, notes = {"encoder": {name: _unit(encoder_features(network, patches)) for name, patches in sets.items()}}, []
    if vgg16_file().exists():
        features["vgg16"] = {name: _unit(vgg16_features(patches)) for name, patches in sets.items()}
    else:
        notes.append(f"Features of VGG16 were not compared: its weights, {vgg16_file().name}, are not on this machine "
                     "(hub/checkpoints in TORCH_HOME).")
    return features, notes


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of unit length: the kernel of Binkowski et al. on features divided by their root mean square."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _spread(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, EMBEDDED)).round().astype(int))


def _means(figure: str, table: pd.DataFrame, column: str) -> list[dict[str, Any]]:
    return [_figure(figure, str(name), values.mean()) for name, values in table.groupby("set", sort=False)[column]]


def _curves(described: Mapping[str, Features], half: np.ndarray, side: int) -> pd.DataFrame:
    real = described[REAL]
    halves = {name: {key: values[rows] for key, values in real.items()} for name, rows in zip(HALVES, (half, ~half), strict=True)}
    axes = {"intensity": np.arange(256.0), "spectrum": np.arange(1, side // 2 + 1) / side}
    return pd.concat([pd.DataFrame({"curve": curve, "set": name, "x": x, "value": features[curve].mean(axis=0)})
                      for curve, x in axes.items() for name, features in {**described, **halves}.items()], ignore_index=True)


def _surfaces(sets: Mapping[str, Patches], features: Mapping[str, np.ndarray], half: np.ndarray) -> dict[str, np.ndarray]:
    """The patches nearest to the mean features of their group; untextured: what became the synthetic one."""
    typical = lambda rows, values: rows[np.square(values[rows] - values[rows].mean(axis=0)).sum(axis=1).argmin()]
    chosen = {name: sets[REAL].grey[typical(np.flatnonzero(rows), features[REAL])] for name, rows in zip(HALVES, (half, ~half), strict=True)}
    place = typical(np.arange(len(sets[SYNTHETIC])), features[SYNTHETIC])
    return {**chosen, SYNTHETIC: sets[SYNTHETIC].grey[place], UNTEXTURED: sets[UNTEXTURED].grey[place]}
