"""Patches of images and what describes them: statistics of texture, features of networks, likeness to other patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torchvision
from scipy import ndimage as ndi
from skimage.feature import local_binary_pattern

from graincast.segment.network import STRIDE, standardise

MAX_PATCHES = 600  # of a set, in equal numbers from each image; more are thinned out at random
MIN_PATCH = 8  # px; the widest local binary pattern and the window of the SSIM span seven
GRADIENT_STEP = 0.5  # bin width of the gradient histogram, grey levels per px
GRADIENT_BINS = 512  # the steepest edge of a uint8 image, 127.5 sqrt(2) grey levels per px, lies in bin 360
TEXTURE_GRADIENTS = (0, 1, 2, 4, 6, 9, 13, 18, 25, 35, 50, 256)  # bin edges in the texture descriptor
LBP_POINTS, LBP_RADII = 8, (1, 2, 3)  # local binary patterns: points on a ring, its radii in px
SSIM_WINDOW, SSIM_STRIDE = 7, 4  # px; every fourth window in each direction stands for all of them
SSIM_CONSTANTS = ((0.01 * 255) ** 2, (0.03 * 255) ** 2)  # K1, K2 and the range of Wang et al. 2004
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation that VGG16 expects of its channels
BATCH = 64  # patches through a network at a time

Features = dict[str, np.ndarray]  # name to one row a patch


@dataclass(frozen=True)
class Patches:
    """Square patches of a set of images.

    Attributes
    ----------
    grey : ndarray
        (n, side, side), uint8, image by image.
    standard : ndarray
        The same as the segmenter sees them, float32: zero mean and unit variance over the whole image they come from.
    image : ndarray
        (n,), int: number of the image each patch comes from.
    """

    grey: np.ndarray
    standard: np.ndarray
    image: np.ndarray

    def __len__(self) -> int:
        return len(self.grey)

    def take(self, indices: np.ndarray) -> Self:
        """The patches of these indices."""
        return type(self)(self.grey[indices], self.standard[indices], self.image[indices])


def cut_patches(sets: Mapping[str, Sequence[np.ndarray]], patch: int = 64, seed: int = 0) -> dict[str, Patches]:
    """Cut sets of images into patches of one size.

    Parameters
    ----------
    sets : mapping of str to sequence of (H, W) uint8 ndarray
        Images of any sizes, by the name of their set.
    patch : int
        Side of the patches, px; lowered to half the shorter side of the smallest image.
    seed : int
        Seed of the choice where a set holds more than `MAX_PATCHES`. It is the same for every set: sets of the same
        numbers and shapes of images are cut at the same places.

    Returns
    -------
    dict of str to Patches

    Raises
    ------
    ValueError
        If a set is empty, holds something else than 2-D uint8 images of 16 x 16 px and more, or `patch` is below 8.
    """
    side = min(_patch_side(images, patch) for images in sets.values())
    return {name: _draw_patches(images, side, np.random.default_rng([seed, 0])) for name, images in sets.items()}


def _patch_side(images: Sequence[np.ndarray], patch: int) -> int:
    """The largest side up to `patch` of which every image holds four patches."""
    if patch < MIN_PATCH:
        raise ValueError(f"patch must be {MIN_PATCH} px at least, got {patch}")
    if len(images) == 0:
        raise ValueError("want one image at least, got none")
    for image in images:
        if image.ndim != 2 or image.dtype != np.uint8 or min(image.shape) < 2 * MIN_PATCH:
            raise ValueError(f"want 2-D uint8 images of {2 * MIN_PATCH} x {2 * MIN_PATCH} px and more, got {image.dtype} {image.shape}")
    return min(patch, *(min(image.shape) // 2 for image in images))


def _draw_patches(images: Sequence[np.ndarray], side: int, rng: np.random.Generator) -> Patches:
    limit = max(4, MAX_PATCHES // len(images))
    grey, standard, origin = [], [], []
    for number, image in enumerate(images):
        whole = _cut(image, side)
        drawn = np.sort(rng.permutation(len(whole))[:limit])
        grey.append(whole[drawn])
        standard.append(_cut(standardise(image), side)[drawn])
        origin.append(np.full(len(drawn), number))
    return Patches(np.concatenate(grey), np.concatenate(standard), np.concatenate(origin))


def _cut(image: np.ndarray, side: int) -> np.ndarray:
    """Patches side by side, (n, side, side); what is left at the bottom and right edges is dropped."""
    rows, columns = image.shape[0] // side, image.shape[1] // side
    grid = image[: rows * side, : columns * side].reshape(rows, side, columns, side)
    return grid.swapaxes(1, 2).reshape(-1, side, side)


# Statistics of texture


def describe(grey: np.ndarray) -> Features:
    """Statistics of patches, uint8 (n, side, side), a row a patch.

    Returns
    -------
    dict of str to ndarray
        ``intensity`` : (n, 256), shares of the grey levels.
        ``entropy`` : (n,), their Shannon entropy, bits, in [0, 8]; smaller patches hold fewer grey levels, so sets
        compare at one side only.
        ``gradient`` : (n, 512), shares of the gradient magnitudes (Sobel) in bins of `GRADIENT_STEP`.
        ``spectrum`` : (n, side // 2), radially averaged power in rings of 1 / side cycles per px, dB.
        ``slope`` : (n,), d log(power) / d log(frequency).
        ``texture`` : (n, 41), square roots of histograms of local binary patterns (Ojala et al. 2002,
        doi:10.1109/TPAMI.2002.1017623) and gradient magnitudes; unit vectors.
    """
    intensities = _histograms(grey, 256)
    gradient = _gradients(grey)
    spectrum, slope = _spectra(grey)
    return {
        "intensity": intensities,
        "entropy": _entropies(intensities),
        "gradient": _histograms((gradient / GRADIENT_STEP).astype(np.int64), GRADIENT_BINS),
        "spectrum": spectrum,
        "slope": slope,
        "texture": _textures(grey, gradient),
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


def _gradients(grey: np.ndarray) -> np.ndarray:
    """Gradient magnitude, grey levels per px, one pixel in from each patch's edges."""
    grey = grey.astype(np.float32)
    smooth, difference = np.array([1, 2, 1]) / 4, np.array([-1, 0, 1]) / 2
    # SciPy's own Sobel filter smooths along every other axis, which here would be across patches too.
    down = ndi.correlate1d(ndi.correlate1d(grey, smooth, axis=2), difference, axis=1)
    right = ndi.correlate1d(ndi.correlate1d(grey, smooth, axis=1), difference, axis=2)
    return np.hypot(down, right)[:, 1:-1, 1:-1]


def _spectra(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log power, dB, in rings of frequency 1 / side cycles per px wide, (n, rings), and its slopes, (n,)."""
    side = grey.shape[1]
    window = np.hanning(side + 2)[1:-1]
    centred = grey - grey.mean(axis=(1, 2), keepdims=True)
    power = np.abs(np.fft.rfft2(centred * np.outer(window, window))) ** 2 / (window @ window) ** 2
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)).ravel()
    ring_of = np.rint(frequency * side).astype(np.int64)
    rings = np.arange(1, side // 2 + 1)  # the mean is taken off, the corners beyond Nyquist are left out
    rows = power.reshape(len(grey), -1)
    mean = np.stack([rows[:, ring_of == ring].mean(axis=1) for ring in rings], axis=1)
    quantisation = 1 / 12  # noise power of rounding to whole grey levels; bounds the log of flat patches too
    decibels = 10 * np.log10(mean + quantisation)
    return decibels, np.polyfit(10 * np.log10(rings), decibels.T, 1)[0]


def _textures(grey: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    parts = [_histograms(np.digitize(gradient, TEXTURE_GRADIENTS[1:]), len(TEXTURE_GRADIENTS) - 1)]
    for radius in LBP_RADII:
        codes = np.stack([local_binary_pattern(image, LBP_POINTS, radius, "uniform") for image in grey])
        parts.append(_histograms(codes[:, radius:-radius, radius:-radius], LBP_POINTS + 2))
    return np.sqrt(np.concatenate(parts, axis=1) / len(parts))


# Likeness to other patches


def nearest_ssim(grey: np.ndarray, candidates: np.ndarray, allowed: np.ndarray | None = None, stride: int = SSIM_STRIDE) -> np.ndarray:
    """Structural similarity of each patch to the candidate that is most similar to it.

    Parameters
    ----------
    grey, candidates : ndarray
        (n, side, side) and (m, side, side), uint8.
    allowed : ndarray, optional
        (n, m), bool: which candidates count for which patch; default: all. One at least must count for each.
    stride : int
        Distance between the windows, px. 1 is the plain SSIM of uniform windows of `SSIM_WINDOW` px, as
        `skimage.metrics.structural_similarity` gives it a pair at a time; larger ones take a part of the windows.

    Returns
    -------
    ndarray
        (n,), float32, in [-1, 1]; 1 = the same patch.

    Notes
    -----
    Z. Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli, "Image quality assessment: from error visibility to
    structural similarity", IEEE TIP 13 (2004) 600-612, doi:10.1109/TIP.2003.819861. It was made for two pictures of
    the same scene. Of unpaired textures it is low even between real ones, and it prefers smooth pictures to noisy
    ones, as two noises never agree: compare with real against real, and expect no more than that.
    """
    (mean_a, variance_a, a), (mean_b, variance_b, b) = _windows(grey, stride), _windows(candidates, stride)
    c1, c2 = SSIM_CONSTANTS
    total = np.zeros((len(grey), len(candidates)), np.float32)
    for k in range(len(a)):
        covariance = a[k] @ b[k].T / (SSIM_WINDOW**2 - 1)
        brightness = (2 * np.outer(mean_a[k], mean_b[k]) + c1) / (np.add.outer(mean_a[k] ** 2, mean_b[k] ** 2) + c1)
        total += brightness * (2 * covariance + c2) / (np.add.outer(variance_a[k], variance_b[k]) + c2)
    mean = total / len(a)
    return (mean if allowed is None else np.where(allowed, mean, -np.inf)).max(axis=1)


def _windows(grey: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and sample variance of every window, (windows, n), and its pixels less the mean, (windows, n, pixels)."""
    views = np.lib.stride_tricks.sliding_window_view(grey, (SSIM_WINDOW, SSIM_WINDOW), axis=(1, 2))[:, ::stride, ::stride]
    pixels = views.reshape(len(grey), -1, SSIM_WINDOW**2).swapaxes(0, 1).astype(np.float32)
    mean = pixels.mean(axis=2)
    centred = np.ascontiguousarray(pixels - mean[..., None])
    return mean, (centred**2).sum(axis=2) / (SSIM_WINDOW**2 - 1), centred


# Features of networks


def encoder_features(network: torch.nn.Module, patches: Patches) -> np.ndarray:
    """Features of the segmenter's own encoder: its deepest stage, averaged over the patch.

    Parameters
    ----------
    network : torch.nn.Module
        Of segmentation-models-pytorch, in evaluation mode, one grey channel in (`graincast.segment.network`).
    patches : Patches

    Returns
    -------
    ndarray
        (n, channels), float32.
    """
    encoder = network.get_submodule("encoder")
    return _averaged(lambda batch: encoder(batch)[-1], patches.standard[:, None], next(network.parameters()).device)


def vgg16_file() -> Path:
    """Where torch keeps the ImageNet weights of VGG16 (``hub/checkpoints`` in TORCH_HOME) once they have been fetched."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(torchvision.models.VGG16_Weights.IMAGENET1K_V1.url).name


def vgg16_features(patches: Patches) -> np.ndarray:
    """Features of VGG16 (Simonyan & Zisserman 2015, https://arxiv.org/abs/1409.1556): its last convolution, averaged.

    Parameters
    ----------
    patches : Patches

    Returns
    -------
    ndarray
        (n, 512), float32.

    Raises
    ------
    OSError
        If `vgg16_file` is absent; nothing is downloaded.
    """
    weights = torch.load(vgg16_file(), weights_only=True)
    with torch.device("meta"):  # its own random weights, half a gigabyte, are not wanted
        network = torchvision.models.vgg16()
    network.load_state_dict(weights, assign=True)
    mean, deviation = (np.array(values, np.float32)[:, None, None] for values in IMAGENET)
    grey = patches.grey[:, None].astype(np.float32) / 255
    return _averaged(network.features[:-1], (grey - mean) / deviation, torch.device("cpu"))


@torch.no_grad()
def _averaged(stage: Callable[[torch.Tensor], torch.Tensor], inputs: np.ndarray, device: torch.device) -> np.ndarray:
    """Spatial means, (n, channels), of the maps that `stage` makes of (n, channels, side, side)."""
    short = -inputs.shape[-1] % STRIDE
    padded = np.pad(inputs, ((0, 0), (0, 0), (0, short), (0, short)), mode="symmetric")
    batches = torch.from_numpy(padded).to(device).split(BATCH)
    return np.concatenate([stage(batch).float().mean(dim=(2, 3)).cpu().numpy() for batch in batches])
