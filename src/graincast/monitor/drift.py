"""Whether a session still looks like what the champion learned from, how far it has moved, and what would mend it.

Definitions
-----------
*Unit.* Patches of an image are correlated, and so are images of a session. An image counts once, by the mean over its
patches; sessions of the reference tell how much in-control sessions differ.

*Columns.* Of every descriptor x the reference gives the variance w between images of a session and the variance b between
sessions. A session of n images whose mean is m lies t = (m - M) / sqrt(w / n + b + var M) from the reference's mean M, where
var M = (b + mean w / n_i) / S for S sessions of n_i images. As b of few sessions is uncertain it is drawn towards
``session_spread``^2 w, or the square of the descriptor's own tolerance where that is more, with the weight of `PRIOR_SESSIONS`
sessions, after the moderated t of Smyth 2004 (doi:10.2202/1544-6115.1027). The score is the largest abs(t).

*The synthetic manifold* is the set of the synthetic patches in the champion's whitened bottleneck features and texture
statistics. An image's distance to it is the mean over its patches of the binary logarithm of the distance to the
`NEIGHBOURS`-th nearest synthetic patch. It is one of the columns, one-sided: **a session leaves the synthetic manifold when
the t of its distance exceeds the columns' threshold**, that is, when it is farther from the synthetic images than in-control
real sessions are.

*Embedding.* The squared maximum mean discrepancy (Gretton et al. 2012, JMLR 13, 723) between the session's and the
reference's patches in the whitened bottleneck features, kernels averaged within images first.

*Thresholds.* Both scores have null distributions from real against real: parts of the reference (whole sessions, where it
has three or more) are judged against the rest. As a small reference holds few such parts, the columns' threshold is also
computed for normal data of the reference's own size, sessions and correlations, and the larger of the two counts; the
embedding's is the predictive t quantile of the logarithms. Each gets half of ``false_alarm_rate``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn.covariance import ledoit_wolf
from threadpoolctl import threadpool_limits

from graincast import config as settings
from graincast.errors import UserError
from graincast.monitor.descriptors import GRAIN_SIZE, MANIFOLD, TABLE, Described, describe_patches, describe_set
from graincast.segment.segmenter import Segmenter
from graincast.store.imageset import ImageSet

FORMAT = 1
NEIGHBOURS = 5  # of the synthetic patches: one alone may be an odd one
ENCODER_AXES, TEXTURE_AXES = 12, 6  # principal axes kept
PRIOR_SESSIONS = 4.0  # weight of the prior of the variance between sessions
FEWEST_SESSIONS = 3  # from which on whole sessions are resampled
FEWEST_IMAGES = 4  # of a reference
SYNTHETIC_IMAGES = 48  # that the manifold is made of, at most
SIZES = (1, 2, 3, 5, 8, 12, 20, 40)  # session sizes that thresholds are computed for
MOST_UNSIZED = 0.5  # share of a reference's images without an estimate of their grains, above which the column is left out
IN_CONTROL_PATCHES = 99.0  # percentile of the reference patches' distances that bounds the manifold patch by patch
SIMULATIONS = 3000
UNSIZED_OUTSIDE = 0.5  # share of patches outside the manifold from which on images whose grains cannot be sized show none
SHARPNESS_BY_SIZE = 3.0
"""Grains r times as large lose 1 - r^-3 of their sharpness at most: 30 to 37 % at a magnification 1.35 times higher on virtual sessions
of other seeds than the benchmark's, where 1.5 times the probe size lost 44 % and twice that 78 %, the grains' estimate all but unmoved."""
LINES_BY_SIZE = 4.0
"""How many times more than the estimated size (logarithms) the champion's boundary may change for a change of size: up to 3 at a
magnification 1.35 times different on those sessions, 8 where a strong change of the look hid boundaries."""
LARGEST_PART = 4  # a part that plays a session is a fourth of a single session at most, or too little is left to judge it against


@dataclass(frozen=True)
class Drift:
    """The verdict on a session.

    Attributes
    ----------
    drifted : bool
    severity : str
        ``none``, ``slight`` or ``strong``.
    cause : str
        ``none``; ``look`` (the microscope's settings or the specimen's surface); ``size`` (grains, or the magnification);
        ``focus``; ``foreign`` (not what the champion was made for); ``mixed`` (images that have no look in common).
    mendable : bool
        Whether re-learning the look can mend it, and the images are enough to show one.
    moved : list of dict
        ``descriptor, sigmas, direction`` (``up`` or ``down``), ``words``, the largest first.
    sentence : str
        All this for a microscopist.
    scores : dict of str to float
        Every figure behind it; scores called ``*_score`` are in units of their threshold.
    """

    drifted: bool
    severity: str
    cause: str
    mendable: bool
    moved: list[dict[str, Any]]
    sentence: str
    scores: dict[str, float]

    def save(self, folder: Path) -> None:
        """Write ``drift.json`` into an existing folder."""
        values = asdict(self) | {"scores": {name: value if math.isfinite(value) else None for name, value in self.scores.items()}}
        (folder / "drift.json").write_text(json.dumps(values, indent=1, allow_nan=False))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        UserError
            If there is no verdict in the folder.
        """
        try:
            values = json.loads((Path(folder) / "drift.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} holds no verdict on drift (drift.json expected): {error}") from error
        values["scores"] = {name: math.nan if value is None else value for name, value in values["scores"].items()}
        return cls(**values)


@dataclass(frozen=True)
class Embedding:
    """From a patch's features to whitened principal axes: encoder first, texture after.

    Attributes
    ----------
    encoder_mean, encoder_axes, texture_mean, texture_axes : ndarray
        (channels,) and (channels, axes); axes divided by the standard deviation along them.
    """

    encoder_mean: np.ndarray
    encoder_axes: np.ndarray
    texture_mean: np.ndarray
    texture_axes: np.ndarray

    @classmethod
    def fit(cls, sets: Sequence[Described]) -> Self:
        """Axes of several sets together, each of the same weight."""
        encoder = _axes([one.encoder for one in sets], ENCODER_AXES)
        texture = _axes([one.texture for one in sets], TEXTURE_AXES)
        return cls(*encoder, *texture)

    def __call__(self, described: Described) -> np.ndarray:
        """(patches, axes), float64."""
        return np.hstack([(described.encoder - self.encoder_mean) @ self.encoder_axes, (described.texture - self.texture_mean) @ self.texture_axes])

    @property
    def encoder_count(self) -> int:
        """Number of axes that come from the encoder."""
        return self.encoder_axes.shape[1]


def _axes(sets: Sequence[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    mean = np.mean([one.mean(axis=0) for one in sets], axis=0, dtype=float)
    covariance = np.mean([(one - mean).T @ (one - mean) / len(one) for one in sets], axis=0, dtype=float)
    values, vectors = np.linalg.eigh(covariance)
    largest = np.argsort(values)[::-1][:count]
    largest = largest[values[largest] > 1e-9 * values.max()]
    axes = vectors[:, largest] * np.sign(vectors[np.abs(vectors[:, largest]).argmax(axis=0), largest])  # the sign of an eigenvector is arbitrary
    return mean, axes / np.sqrt(values[largest])


@dataclass(frozen=True)
class Reference:
    """What in-control sessions look like to a champion.

    Attributes
    ----------
    images : pandas.DataFrame
        A row a real image: ``id, session`` and every descriptor.
    patches : pandas.DataFrame
        A row a patch of theirs, and of the synthetic images: ``set`` (``real`` or ``synthetic``), ``image``, descriptors of patches.
    embedding : Embedding
    real, synthetic : ndarray
        (patches, axes): the patches' places.
    facts : dict
        ``config, segmenter`` (digest), ``parents``, ``patch`` (px), ``grain_px``, ``columns``, ``thresholds``, ``bandwidth``, ``outside``.
    """

    images: pd.DataFrame
    patches: pd.DataFrame
    embedding: Embedding
    real: np.ndarray
    synthetic: np.ndarray
    facts: dict[str, Any]

    @property
    def columns(self) -> list[str]:
        """Descriptors that are compared."""
        return list(self.facts["columns"])

    @property
    def real_patches(self) -> pd.DataFrame:
        """The rows of `patches` that are real, in the order of `real`."""
        return self.patches[self.patches["set"] == "real"]

    def save(self, folder: Path) -> None:
        """Write ``reference.json``, ``images.parquet``, ``patches.parquet`` and ``embedding.npz`` into an existing folder."""
        self.images.to_parquet(folder / "images.parquet", index=False)
        self.patches.to_parquet(folder / "patches.parquet", index=False)
        np.savez(folder / "embedding.npz", real=self.real, synthetic=self.synthetic, **asdict(self.embedding))
        (folder / "reference.json").write_text(json.dumps({"format": FORMAT, **self.facts}, indent=1, sort_keys=True, allow_nan=False))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        UserError
            If the folder is no reference, or one of another format.
        """
        folder = Path(folder)
        try:
            facts = json.loads((folder / "reference.json").read_text())
            if facts.pop("format") != FORMAT:
                raise UserError(f"{folder} holds a drift reference of another graincast; make it again")
            with np.load(folder / "embedding.npz", allow_pickle=False) as arrays:
                values = {name: arrays[name] for name in arrays.files}
            real, synthetic = values.pop("real"), values.pop("synthetic")
            return cls(pd.read_parquet(folder / "images.parquet"), pd.read_parquet(folder / "patches.parquet"), Embedding(**values),
                       real, synthetic, facts)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} is no whole drift reference; make it again from the champion's run: {error}") from error


def make_reference(config: settings.Drift, segmenter: Segmenter, micrographs: ImageSet, synthetic: ImageSet) -> Reference:
    """Describe what the champion learned from and calibrate the thresholds.

    Parameters
    ----------
    config : Drift
    segmenter : Segmenter
        The champion.
    micrographs : ImageSet
        The real images it was made for; ``rows["session"]`` parts them into sessions.
    synthetic : ImageSet
        The synthetic images that it was trained on.

    Raises
    ------
    UserError
        If there are fewer than `FEWEST_IMAGES` micrographs.
    """
    if len(micrographs) < FEWEST_IMAGES:
        raise UserError(f"{micrographs.path}: {len(micrographs)} micrographs cannot tell how much sessions differ, "
                        f"{FEWEST_IMAGES} at least are needed for a drift reference")
    grain_px = segmenter.preparation.grain_diameter_px if segmenter.preparation else 32.0
    with threadpool_limits(1):  # sums in one order, whatever the number of processors
        real = describe_set(micrographs, segmenter, config.patch, grain_px)
        few = np.linspace(0, len(synthetic) - 1, min(SYNTHETIC_IMAGES, len(synthetic))).round().astype(int)
        drawn = describe_patches([synthetic.image(int(number)) for number in few], segmenter, config.patch)
    return calibrate(config, real, drawn, grain_px)


def calibrate(config: settings.Drift, real: Described, drawn: Described, grain_px: float) -> Reference:
    """The reference of real and synthetic images that are described already; as `make_reference`."""
    with threadpool_limits(1):
        embedding = Embedding.fit([real, drawn])
        places, manifold = embedding(real), embedding(drawn)
        distances = _distances(places, manifold)
        images = real.images.assign(**{MANIFOLD: _image_means(distances, real.patches["image"])})
        facts: dict[str, Any] = {
            "config": config.model_dump(), "patch": config.patch, "grain_px": grain_px, "columns": _usable(images),
            "outside": float(np.percentile(distances, IN_CONTROL_PATCHES)),
            "bandwidth": _bandwidth(places[:, :embedding.encoder_count]), "thresholds": {}}
        patches = pd.concat([real.patches.assign(set="real"), drawn.patches.assign(set="synthetic")], ignore_index=True)
        reference = Reference(images, patches, embedding, places, manifold, facts)
        facts["thresholds"] = _calibrate(reference, config)
    return reference


def judge(reference: Reference, config: settings.Drift, session: Described) -> Drift:
    """Judge a session, described as the reference was (`describe_session`)."""
    with threadpool_limits(1):
        placed = place(reference, session)
        moves = _moves(reference, config, placed.images)
        scores = _scores(reference, session, moves, placed)
    return _verdict(config, moves, scores)


@dataclass(frozen=True)
class Placed:
    """A session among what the champion knows.

    Attributes
    ----------
    places : ndarray
        (patches, axes) of the reference's embedding.
    distances : ndarray
        (patches,): binary logarithm of the distance to the synthetic manifold.
    images : pandas.DataFrame
        A row an image: every descriptor, `MANIFOLD` included.
    """

    places: np.ndarray
    distances: np.ndarray
    images: pd.DataFrame


def place(reference: Reference, session: Described) -> Placed:
    """Place a session's patches in the reference's embedding."""
    places = reference.embedding(session)
    distances = _distances(places, reference.synthetic)
    return Placed(places, distances, session.images.assign(**{MANIFOLD: _image_means(distances, session.patches["image"])}))


def describe_session(reference: Reference, segmenter: Segmenter, session: ImageSet) -> Described:
    """Describe a session for `judge`."""
    with threadpool_limits(1):
        return describe_set(session, segmenter, reference.facts["patch"], reference.facts["grain_px"])


# Descriptors and places


def _usable(images: pd.DataFrame) -> list[str]:
    return [name for name in TABLE if name in images and images[name].isna().mean() <= MOST_UNSIZED]


def _distances(places: np.ndarray, manifold: np.ndarray) -> np.ndarray:
    """Binary logarithm of each patch's distance to its `NEIGHBOURS`-th nearest synthetic patch."""
    k = min(NEIGHBOURS, len(manifold)) - 1
    nearest = np.concatenate([np.partition(cdist(part, manifold), k, axis=1)[:, k] for part in np.array_split(places, -(-len(places) // 512))])
    return np.log2(nearest + 1e-6)


def _image_means(values: np.ndarray, image: pd.Series) -> np.ndarray:
    number = image.to_numpy(int)
    return np.bincount(number, values) / np.bincount(number)


# Columns: variance components and moderated t


def _numbers(images: pd.DataFrame) -> np.ndarray:
    """Sessions as 0, 1, ..."""
    return np.unique(images["session"].to_numpy(str), return_inverse=True)[1]


def _filled(images: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """(images, columns); what is missing takes the reference's median, which moves nothing."""
    values = images[list(columns)].astype(float)
    return values.fillna(values.median()).to_numpy()


@dataclass(frozen=True)
class _Components:
    """Mean, variance between images of a session, between sessions, and of the mean; (..., columns) each."""

    mean: np.ndarray
    within: np.ndarray
    between: np.ndarray
    of_mean: np.ndarray

    def error(self, n: np.ndarray | int) -> np.ndarray:
        """Standard error of the difference between the mean and that of a session of `n` images."""
        return np.sqrt(self.within / n + self.between + self.of_mean)

    def t(self, session_mean: np.ndarray, n: np.ndarray | int) -> np.ndarray:
        return (session_mean - self.mean) / self.error(n)


def _components(values: np.ndarray, sessions: np.ndarray, tolerances: np.ndarray, spread: float) -> _Components:
    """Variance components of (..., images, columns) by the sessions' numbers."""
    member = (sessions[:, None] == np.unique(sessions)).astype(float)  # (images, sessions)
    sizes = member.sum(axis=0)
    count = len(sizes)
    means = np.einsum("is,...ic->...sc", member / sizes, values)
    residual = values - np.einsum("is,...sc->...ic", member, means)
    freedom = max(len(sessions) - count, 0)
    grand = means.mean(axis=-2)
    of_sessions = means.var(axis=-2, ddof=1) if count > 1 else np.zeros_like(grand)
    # where every session is one image, what they differ by is all that is known
    within = np.maximum(np.square(residual).sum(axis=-2) / freedom if freedom > 0 else of_sessions, (tolerances / 2) ** 2)
    own = np.maximum(of_sessions - within * (1 / sizes).mean(), 0)
    between = (PRIOR_SESSIONS * np.maximum(spread**2 * within, tolerances**2) + (count - 1) * own) / (PRIOR_SESSIONS + count - 1)
    return _Components(grand, within, between, (between + within * (1 / sizes).mean()) / count)


def _one_sided(t: np.ndarray, columns: Sequence[str]) -> np.ndarray:
    """Only too far from the synthetic images is too far; of other columns both directions count."""
    sided = np.abs(t)
    if MANIFOLD in columns:
        place = list(columns).index(MANIFOLD)
        sided[..., place] = np.maximum(t[..., place], 0)
    return sided


def _tolerances(columns: Sequence[str]) -> np.ndarray:
    return np.array([TABLE[name].tolerance for name in columns])


def _moves(reference: Reference, config: settings.Drift, images: pd.DataFrame) -> pd.DataFrame:
    """A row a descriptor: ``t, shift`` (of the mean), ``error`` (of that), ``reference`` (its mean), ``missing`` (share of images),
    ``spread`` (standard deviation between the images, in those of the reference's sessions; NaN of one image)."""
    columns = [name for name in reference.columns if name in images]
    own = _components(_filled(reference.images, columns), _numbers(reference.images), _tolerances(columns), config.session_spread)
    values = images[columns].to_numpy(float)
    n = np.isfinite(values).sum(axis=0)
    mean = np.where(n > 0, np.nansum(values, axis=0) / np.maximum(n, 1), own.mean)
    error = own.error(np.maximum(n, 1))
    spread = images[columns].astype(float).std().to_numpy() / np.sqrt(own.within)
    return pd.DataFrame({"t": (mean - own.mean) / error, "shift": mean - own.mean, "error": error, "reference": own.mean,
                         "missing": 1 - n / len(images), "spread": spread}, index=pd.Index(columns, name="descriptor"))


def column_bounds(reference: Reference, config: settings.Drift, images: pd.DataFrame) -> dict[str, float]:
    """By how many standard deviations of the reference's images each column of a session may move: the threshold of `judge`."""
    moves = _moves(reference, config, images)
    deviation = reference.images[list(moves.index)].astype(float).std().clip(lower=1e-9)
    bounds = _threshold(reference, "columns", len(images)) * moves["error"] / deviation
    return {str(name): float(bound) for name, bound in bounds.items()}


# Embedding: maximum mean discrepancy


def _bandwidth(places: np.ndarray) -> float:
    """Median distance between patches, the usual choice for the Gaussian kernel."""
    few = places[np.linspace(0, len(places) - 1, min(len(places), 600)).round().astype(int)]
    distances = cdist(few, few)
    return float(np.median(distances[np.triu_indices(len(few), 1)]))


def _kernel(a: np.ndarray, image_a: np.ndarray, b: np.ndarray, image_b: np.ndarray, bandwidth: float) -> np.ndarray:
    """Mean Gaussian kernel between the patches of each image of `a` and each of `b`, (images of a, images of b)."""
    kernel = np.exp(-cdist(a, b, "sqeuclidean") / (2 * bandwidth**2))
    rows, columns = _averaging(image_a), _averaging(image_b)
    return rows @ kernel @ columns.T


def _averaging(image: np.ndarray) -> np.ndarray:
    member = (np.arange(image.max() + 1)[:, None] == image).astype(float)
    return member / member.sum(axis=1, keepdims=True)


def _mmd2(kernel: np.ndarray, part: np.ndarray, rest: np.ndarray) -> float:
    return float(kernel[np.ix_(part, part)].mean() - 2 * kernel[np.ix_(part, rest)].mean() + kernel[np.ix_(rest, rest)].mean())


# Thresholds


def _calibrate(reference: Reference, config: settings.Drift) -> dict[str, list[float]]:
    """Thresholds of both scores for the session sizes of `SIZES`."""
    columns, sessions = reference.columns, _numbers(reference.images)
    values = _filled(reference.images, columns)
    encoder, image = reference.real[:, :reference.embedding.encoder_count], reference.real_patches["image"].to_numpy(int)
    kernel = _kernel(encoder, image, encoder, image, reference.facts["bandwidth"])
    thresholds: dict[str, list[float]] = {"size": list(SIZES), "columns": [], "columns_resampled": [], "columns_normal": [], "embedding": []}
    share = config.false_alarm_rate / 2
    for n in SIZES:
        rng = np.random.default_rng([config.seed, n])
        parts = [_part(sessions, n, rng) for _ in range(config.resamples)]
        largest, logs = [], []
        for part in parts:
            rest = np.setdiff1d(np.arange(len(sessions)), part)
            own = _components(values[rest], sessions[rest], _tolerances(columns), config.session_spread)
            largest.append(_one_sided(own.t(values[part].mean(axis=0), len(part)), columns).max())
            widening = _widening(len(part), len(rest), n, len(sessions), config.session_spread) if _one_session(sessions) else 1.0
            logs.append(math.log(max(_mmd2(kernel, part, rest), 1e-12) * widening))
        units = len(np.unique(sessions)) if not _one_session(sessions) else max(len(sessions) // 2, 3)
        resampled = float(np.quantile(largest, 1 - share))
        normal = _normal_threshold(values, columns, sessions, n, config, share, rng)
        predictive = float(np.mean(logs) + stats.t.ppf(1 - share, units - 1) * np.std(logs) * math.sqrt(1 + 1 / units))
        thresholds["columns_resampled"].append(resampled)
        thresholds["columns_normal"].append(normal)
        thresholds["columns"].append(max(resampled, normal))
        thresholds["embedding"].append(math.exp(predictive))
    return thresholds


def _one_session(sessions: np.ndarray) -> bool:
    return len(np.unique(sessions)) < FEWEST_SESSIONS


def _part(sessions: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Images that play a session of `n`: of one session where there are enough sessions, else any of them."""
    if _one_session(sessions):
        return rng.permutation(len(sessions))[:min(n, max(len(sessions) // LARGEST_PART, 1))]
    own = np.flatnonzero(sessions == rng.choice(np.unique(sessions)))
    return rng.permutation(own)[:n]


def _widening(part: int, rest: int, n: int, whole: int, spread: float) -> float:
    """How much larger the discrepancy of a new session of `n` against the `whole` is than that of a `part` of the same session
    against the `rest`: its expectation goes with 1 / n + 1 / N, and with the variance between sessions, of which one session
    tells nothing."""
    return (1 / n + 1 / whole + 2 * spread**2) / (1 / part + 1 / rest)


def _normal_threshold(values: np.ndarray, columns: Sequence[str], sessions: np.ndarray, n: int, config: settings.Drift, share: float,
                      rng: np.random.Generator) -> float:
    """Quantile of the largest t for normal data of the reference's sessions, variances and correlations."""
    tolerances = _tolerances(columns)
    own = _components(values, sessions, tolerances, config.session_spread)
    member = sessions[:, None] == np.unique(sessions)
    residual = values - (member / member.sum(axis=0)).T.astype(float).T @ np.stack([values[m].mean(axis=0) for m in member.T])
    correlation = ledoit_wolf((residual if len(residual) > member.shape[1] else values - values.mean(axis=0)) / np.sqrt(own.within))[0]
    deviation = np.sqrt(np.maximum(np.diag(correlation), 1e-12))
    root = np.linalg.cholesky(correlation / np.outer(deviation, deviation) + 1e-9 * np.eye(len(columns)))
    ratio = np.sqrt(own.between / own.within)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal((*shape, len(columns))) @ root.T

    largest = []
    for _ in range(0, SIMULATIONS, 100):
        effects = draw(100, member.shape[1]) * ratio
        simulated = draw(100, len(sessions)) + effects[:, member.argmax(axis=1)]
        new = draw(100) * np.sqrt(ratio**2 + 1 / n)
        again = _components(simulated, sessions, tolerances / np.sqrt(own.within), config.session_spread)
        largest.append(_one_sided(again.t(new, n), columns).max(axis=-1))
    return float(np.quantile(np.concatenate(largest), 1 - share))


def _threshold(reference: Reference, kind: str, n: int) -> float:
    table = reference.facts["thresholds"]
    return float(np.exp(np.interp(math.log(n), np.log(table["size"]), np.log(table[kind]))))


# The verdict


def _scores(reference: Reference, session: Described, moves: pd.DataFrame, placed: Placed) -> dict[str, float]:
    count, n = reference.embedding.encoder_count, len(placed.images)
    image, own = session.patches["image"].to_numpy(int), reference.real_patches["image"].to_numpy(int)
    a, b, width = placed.places[:, :count], reference.real[:, :count], reference.facts["bandwidth"]
    mmd2 = float(_kernel(a, image, a, image, width).mean() - 2 * _kernel(a, image, b, own, width).mean() + _kernel(b, own, b, own, width).mean())
    sided = pd.Series(_one_sided(moves["t"].to_numpy(), list(moves.index)), moves.index)
    columns = _threshold(reference, "columns", n)
    unsized = _value(moves, GRAIN_SIZE, "missing", 0.0)
    scores = {
        "columns_score": float(sided.max() / columns), "embedding_score": mmd2 / _threshold(reference, "embedding", n),
        "manifold_score": float(sided.get(MANIFOLD, 0.0) / columns), "outside_share": float((placed.distances > reference.facts["outside"]).mean()),
        "mmd2": mmd2, "columns_threshold": columns, "images": float(n),
        "size_ratio": 2 ** _value(moves, GRAIN_SIZE, "shift", math.nan) if unsized < 1 else math.nan, "unsized_share": unsized,
        "spread": float(moves["spread"].median()) if n > 1 else math.nan,
    }
    return scores | {f"t_{name}": float(t) for name, t in moves["t"].items()}


def _value(moves: pd.DataFrame, descriptor: str, column: str, absent: float) -> float:
    return float(moves[column].to_numpy()[moves.index.get_loc(descriptor)]) if descriptor in moves.index else absent


def _verdict(config: settings.Drift, moves: pd.DataFrame, scores: dict[str, float]) -> Drift:
    score = max(scores["columns_score"], scores["embedding_score"])
    drifted = score > 1
    moved = _moved(moves, scores["columns_threshold"])
    if not drifted:
        return Drift(False, "none", "none", False, [], "In control: nothing about the session differs from what the champion learned from "
                                                       "by more than sessions do.", scores)
    cause = _cause(config, moves, scores)
    severity = "strong" if score >= config.strong else "slight"
    enough = scores["images"] >= config.fewest_images
    sentence = _sentence(cause if enough or cause != "look" else "few", severity, moved, scores)
    return Drift(True, severity, cause, cause == "look" and enough, moved, sentence, scores)


def _moved(moves: pd.DataFrame, threshold: float) -> list[dict[str, Any]]:
    sided = pd.Series(_one_sided(moves["t"].to_numpy(), list(moves.index)), moves.index)
    order = sided[sided > threshold].sort_values(ascending=False).index
    return [{"descriptor": name, "sigmas": round(float(moves.loc[name, "t"]), 2), "direction": "up" if moves.loc[name, "t"] > 0 else "down",
             "words": TABLE[name].up if moves.loc[name, "t"] > 0 else TABLE[name].down} for name in order]


def _cause(config: settings.Drift, moves: pd.DataFrame, scores: dict[str, float]) -> str:
    """What a drift speaks of: see the table of causes in docs/drift.md."""
    outside = scores["outside_share"]
    if outside > config.foreign_share or (scores["unsized_share"] > MOST_UNSIZED and outside > UNSIZED_OUTSIDE):
        return "foreign"
    if _out_of_focus(moves, scores):
        return "focus"
    if _other_size(config, moves, scores):
        return "size"
    return "mixed" if scores["spread"] > config.mixed_spread else "look"


def _out_of_focus(moves: pd.DataFrame, scores: dict[str, float]) -> bool:
    """Less sharp, though not for noise, and by more than larger grains explain."""
    if "sharpness" not in moves.index:
        return False
    t, threshold = moves["t"], scores["columns_threshold"]
    if t["sharpness"] > -threshold or t.get("noise", 0.0) > threshold / 2:
        return False
    ratio = scores["size_ratio"] if math.isfinite(scores["size_ratio"]) else 1.0
    lost = -_value(moves, "sharpness", "shift", 0.0) / max(_value(moves, "sharpness", "reference", 0.0), 1e-6)
    return lost > 1 - max(ratio, 1.0) ** -SHARPNESS_BY_SIZE


def _other_size(config: settings.Drift, moves: pd.DataFrame, scores: dict[str, float]) -> bool:
    """Whether the grains are of another size, by the estimate that needs no champion, or by that and the boundary that the champion finds.

    The champion alone does not count: it loses boundaries when the look changes.
    """
    threshold, least = scores["columns_threshold"], math.log2(config.size_ratio)
    lines, t_lines = -_value(moves, "champion_lines", "shift", 0.0), -_value(moves, "champion_lines", "t", 0.0)  # line per area: one over the size
    if scores["unsized_share"] == 1:  # too few grains in the field to be sized, if it shows any
        return t_lines > threshold and lines > 1
    size, t_size = _value(moves, GRAIN_SIZE, "shift", 0.0), _value(moves, GRAIN_SIZE, "t", 0.0)
    if abs(t_size) > threshold:
        return abs(size) > least and (t_lines * t_size > 0 or abs(t_lines) <= threshold)
    return abs(t_lines) > threshold and t_lines * t_size > 0 and abs(lines) <= LINES_BY_SIZE * abs(size) and abs(size + lines) / 2 > least


WORDS = {"look": "the look has changed, which re-learning it can mend", "size": "grains are {factor} those that it was trained on",
         "focus": "the images are out of focus; take them again", "foreign": "these are not the kind of images that it was made for",
         "mixed": "the images differ from each other more than those of one session do, and have no look in common that could be learned",
         "few": "the look has changed, but too few images show it to re-learn it from them"}


def _sentence(cause: str, severity: str, moved: list[dict[str, Any]], scores: dict[str, float]) -> str:
    ratio = scores["size_ratio"]
    factor = f"{ratio:.2g} times as large as" if math.isfinite(ratio) else "of another size than"
    seen = "; ".join(f"{entry['words']} ({entry['sigmas']:+.1f} sigma)" for entry in moved[:3])
    return (f"{severity.capitalize()} drift: {WORDS[cause].format(factor=factor)}. "
            + (f"Seen: {seen}." if seen else "Seen in the champion's own features together, in no single figure."))

