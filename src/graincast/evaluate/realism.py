"""How much synthetic micrographs look like real ones, without a label and without a pretrained network.

Every image is cut into square patches, every patch described by a few statistics of texture, and the two
collections of patches compared statistic by statistic. A distance means little alone, so each comes with its
*floor*: the distance between two halves of the real images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage as ndi
from scipy.stats import wasserstein_distance
from skimage.feature import local_binary_pattern

MAX_PATCHES = 600  # of a set, in equal numbers from each image; more are thinned out at random
MIN_PATCH = 8  # px; the widest local binary pattern spans seven
SPLITS = 10  # random halvings of the real images behind each floor
GRADIENT_STEP = 0.5  # bin width of the gradient histogram, grey levels per px
GRADIENT_BINS = 512  # the steepest edge of a uint8 image, 127.5 sqrt(2) grey levels per px, lies in bin 360
TEXTURE_GRADIENTS = (0, 1, 2, 4, 6, 9, 13, 18, 25, 35, 50, 256)  # bin edges in the texture descriptor
LBP_POINTS, LBP_RADII = 8, (1, 2, 3)  # local binary patterns: points on a ring, its radii in px

Features = dict[str, np.ndarray]  # name to one row a patch


def realism(real: Sequence[np.ndarray], synthetic: Sequence[np.ndarray], patch: int = 64,
            seed: int = 0) -> dict[str, float]:
    """Compare synthetic micrographs with real ones.

    Parameters
    ----------
    real, synthetic : sequence of (H, W) uint8 ndarray
        Images of any sizes, prepared alike (same pixel size, same histogram equalisation).
    patch : int
        Side of the patches, px; lowered to half the shorter side of the smallest image.
    seed : int
        Seed of the patches drawn and of the halvings behind the floors.

    Returns
    -------
    dict of str to float
        0 = alike. Each figure ``X`` is followed by ``X_floor``, its mean over `SPLITS` random halvings of the
        real images (of the patches, where there is one image only, which is a lenient floor).

        ``intensity_distance``
            Wasserstein-1 distance of the grey-level histograms, grey levels.
        ``entropy_distance``
            The same of the patches' Shannon entropies (`patch_entropies`), bits.
        ``sharpness_distance``
            The same of the gradient magnitudes (Sobel), grey levels per px.
        ``spectrum_distance``
            Root mean square difference, over spatial frequency, of the mean log power spectra, dB.
        ``spectral_slope_distance``
            Wasserstein-1 distance of the patches' spectral slopes, d log(power) / d log(frequency).
        ``texture_kid``
            Kernel distance: the unbiased estimate of MMD^2 with the cubic polynomial kernel of the Kernel
            Inception Distance [1]_, times 1000, on the square roots of histograms of local binary patterns
            [2]_ at three radii and of gradient magnitudes in place of Inception features: figures compare
            with one another, not with published KIDs. Being unbiased, it may come out just below 0.

    Raises
    ------
    ValueError
        If a set is empty, holds something else than 2-D uint8 images of 16 x 16 px and more, or `patch` is
        below 8.

    References
    ----------
    .. [1] M. Binkowski, D. J. Sutherland, M. Arbel, A. Gretton, "Demystifying MMD GANs", ICLR 2018.
       https://arxiv.org/abs/1801.01401
    .. [2] T. Ojala, M. Pietikainen, T. Maenpaa, "Multiresolution gray-scale and rotation invariant texture
       classification with local binary patterns", IEEE TPAMI 24 (2002) 971-987.
       https://doi.org/10.1109/TPAMI.2002.1017623
    """
    rng = np.random.default_rng([seed, 0])
    side = min(_patch_side(real, patch), _patch_side(synthetic, patch))
    real_patches, origin = _draw_patches(real, side, rng)
    synthetic_patches, _ = _draw_patches(synthetic, side, rng)
    truth, drawn = _describe(real_patches), _describe(synthetic_patches)
    halves = [_halve(origin, rng) for _ in range(SPLITS)]
    figures: dict[str, float] = {}
    for name, (statistic, distance) in DISTANCES.items():
        values = truth[statistic]
        figures[name] = distance(values, drawn[statistic])
        figures[f"{name}_floor"] = float(np.mean([distance(values[half], values[~half]) for half in halves]))
    return figures


def patch_entropies(images: Sequence[np.ndarray], patch: int = 64) -> np.ndarray:
    """Shannon entropy of the grey levels of every patch.

    Parameters
    ----------
    images : sequence of (H, W) uint8 ndarray
    patch : int
        Side of the patches, px; lowered to half the shorter side of the smallest image.

    Returns
    -------
    (n,) float64 ndarray
        Bits, in [0, 8], image by image; the patches lie side by side from each image's first corner. Smaller
        patches hold fewer grey levels: compare sets at the same side only.

    Raises
    ------
    ValueError
        If there is no image, or something else than 2-D uint8 images of 16 x 16 px and more, or `patch` is
        below 8.

    Examples
    --------
    >>> patch_entropies([np.arange(256, dtype=np.uint8).reshape(16, 16)])
    array([6., 6., 6., 6.])
    """
    side = _patch_side(images, patch)
    return np.concatenate([_entropies(_histograms(_cut(image, side), 256)) for image in images])


def _patch_side(images: Sequence[np.ndarray], patch: int) -> int:
    """The largest side up to `patch` of which every image holds four patches."""
    if patch < MIN_PATCH:
        raise ValueError(f"patch must be {MIN_PATCH} px at least, got {patch}")
    if len(images) == 0:
        raise ValueError("want one image at least, got none")
    for image in images:
        if image.ndim != 2 or image.dtype != np.uint8 or min(image.shape) < 2 * MIN_PATCH:
            raise ValueError(f"want 2-D uint8 images of {2 * MIN_PATCH} x {2 * MIN_PATCH} px and more, "
                             f"got {image.dtype} {image.shape}")
    return min(patch, *(min(image.shape) // 2 for image in images))


def _cut(image: np.ndarray, side: int) -> np.ndarray:
    """Patches side by side, (n, side, side); what is left at the bottom and right edges is dropped."""
    rows, columns = image.shape[0] // side, image.shape[1] // side
    grid = image[: rows * side, : columns * side].reshape(rows, side, columns, side)
    return grid.swapaxes(1, 2).reshape(-1, side, side)


def _draw_patches(images: Sequence[np.ndarray], side: int,
                  rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Patches of a set, (n, side, side) uint8, and the number of the image that each comes from, (n,)."""
    limit = max(4, MAX_PATCHES // len(images))
    drawn = [rng.permutation(_cut(image, side))[:limit] for image in images]
    return np.concatenate(drawn), np.repeat(np.arange(len(drawn)), [len(group) for group in drawn])


def _halve(origin: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random half of the patches, (n,) bool: whole images where there are two or more."""
    units = origin if origin[-1] > 0 else np.arange(origin.size)
    shuffled = rng.permutation(np.unique(units))
    return np.isin(units, shuffled[: shuffled.size // 2])


def _describe(patches: np.ndarray) -> Features:
    intensities = _histograms(patches, 256)
    gradient = _gradients(patches)
    spectrum, slope = _spectra(patches)
    return {
        "intensity": intensities,
        "entropy": _entropies(intensities),
        "gradient": _histograms((gradient / GRADIENT_STEP).astype(np.int64), GRADIENT_BINS),
        "spectrum": spectrum,
        "slope": slope,
        "texture": _textures(patches, gradient),
    }


def _histograms(values: np.ndarray, bins: int) -> np.ndarray:
    """Histogram of each patch of integers in [0, bins), (n, bins), as fractions."""
    flat = values.reshape(len(values), -1).astype(np.int64)
    offset = bins * np.arange(len(flat))[:, None]
    counts = np.bincount((flat + offset).ravel(), minlength=bins * len(flat))
    return counts.reshape(len(flat), bins) / flat.shape[1]


def _entropies(histograms: np.ndarray) -> np.ndarray:
    logs = np.log2(histograms, out=np.zeros_like(histograms), where=histograms > 0)
    return -(histograms * logs).sum(axis=1) + 0.0  # + 0.0 makes the entropy of a flat patch 0 and not -0


def _gradients(patches: np.ndarray) -> np.ndarray:
    """Gradient magnitude, grey levels per px, one pixel in from each patch's edges."""
    grey = patches.astype(np.float32)
    smooth, difference = np.array([1, 2, 1]) / 4, np.array([-1, 0, 1]) / 2
    # SciPy's own Sobel filter smooths along every other axis, which here would be across patches too.
    down = ndi.correlate1d(ndi.correlate1d(grey, smooth, axis=2), difference, axis=1)
    right = ndi.correlate1d(ndi.correlate1d(grey, smooth, axis=1), difference, axis=2)
    return np.hypot(down, right)[:, 1:-1, 1:-1]


def _spectra(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log power, dB, in rings of frequency 1 / side cycles per px wide, (n, rings), and its slopes, (n,)."""
    side = patches.shape[1]
    window = np.hanning(side + 2)[1:-1]
    grey = patches - patches.mean(axis=(1, 2), keepdims=True)
    power = np.abs(np.fft.rfft2(grey * np.outer(window, window))) ** 2 / (window @ window) ** 2
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)).ravel()
    ring_of = np.rint(frequency * side).astype(np.int64)
    rings = np.arange(1, side // 2 + 1)  # the mean is taken off, the corners beyond Nyquist are left out
    rows = power.reshape(len(patches), -1)
    mean = np.stack([rows[:, ring_of == ring].mean(axis=1) for ring in rings], axis=1)
    quantisation = 1 / 12  # noise power of rounding to whole grey levels; bounds the log of flat patches too
    decibels = 10 * np.log10(mean + quantisation)
    return decibels, np.polyfit(10 * np.log10(rings), decibels.T, 1)[0]


def _textures(patches: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    parts = [_histograms(np.digitize(gradient, TEXTURE_GRADIENTS[1:]), len(TEXTURE_GRADIENTS) - 1)]
    for radius in LBP_RADII:
        codes = np.stack([local_binary_pattern(image, LBP_POINTS, radius, "uniform") for image in patches])
        parts.append(_histograms(codes[:, radius:-radius, radius:-radius], LBP_POINTS + 2))
    return np.sqrt(np.concatenate(parts, axis=1) / len(parts))


def _histogram_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Wasserstein-1 distance of the pooled histograms, in bins."""
    return float(np.abs(np.cumsum(a.mean(axis=0) - b.mean(axis=0))).sum())


def _spectrum_distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a.mean(axis=0) - b.mean(axis=0)) ** 2)))


def _kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """1000 times the unbiased MMD^2 with the kernel (x . y + 1)^3.

    Rows are square roots of histograms, unit vectors: their product is the Bhattacharyya coefficient, in [0,
    1].
    """
    kernel = lambda x, y: (x @ y.T + 1) ** 3

    def within(x: np.ndarray) -> float:
        gram = kernel(x, x)
        return float((gram.sum() - np.trace(gram)) / (len(x) * (len(x) - 1)))

    return 1000 * (within(a) + within(b) - 2 * float(kernel(a, b).mean()))


Distance = Callable[[np.ndarray, np.ndarray], float]
DISTANCES: dict[str, tuple[str, Distance]] = {
    "intensity_distance": ("intensity", _histogram_distance),
    "entropy_distance": ("entropy", lambda a, b: float(wasserstein_distance(a, b))),
    "sharpness_distance": ("gradient", lambda a, b: GRADIENT_STEP * _histogram_distance(a, b)),
    "spectrum_distance": ("spectrum", _spectrum_distance),
    "spectral_slope_distance": ("slope", lambda a, b: float(wasserstein_distance(a, b))),
    "texture_kid": ("texture", _kernel_distance),
}
