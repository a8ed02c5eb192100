"""Image quality descriptors: numbers that say how a micrograph was taken, whatever it shows."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from scipy import ndimage as ndi
from skimage.measure import shannon_entropy

LAPLACIAN_DIFFERENCE = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)
COARSE_PX = 256  # of the smaller side: so far is an image reduced before a quarter of it is smoothed over, which else takes its area times its side
FINEST_SIGMA_PX = 0.7  # of the two Gaussians of `sharpness`; the other is twice as wide


def describe(image: np.ndarray, bit_depth: int = 8) -> dict[str, float]:
    """Describe the quality of a micrograph.

    Parameters
    ----------
    image : ndarray of float, shape (H, W), at least 3 x 3
        Grey values in [0, 1], without the info bar.
    bit_depth : int
        Bits a sample in the file. Full scale, below, is what `used_range` makes of it.

    Returns
    -------
    dict of str to float
        - ``mean``: mean grey value, fraction of full scale.
        - ``contrast``: distance from the 1st to the 99th percentile of grey, fraction of full scale.
        - ``saturated_fraction``: fraction of pixels at either end of the grey scale (within half a step of 8 bit).
        - ``noise``: standard deviation of additive noise, fraction of full scale [1]_.
        - ``signal_to_noise``: (standard deviation of grey / noise), 1; structure over noise.
        - ``sharpness``: fraction, 0 to 1, of gradient energy that survives doubling the smoothing from 0.7 to
          1.4 px, subtracted from 1, noise removed: near 0 for a blurred image, near 1 for detail at pixel size.
        - ``entropy``: Shannon entropy of the 256-level histogram, bit.
        - ``shading``: range of the image smoothed over a quarter of its size, fraction of full scale.

    References
    ----------
    .. [1] J. Immerkaer, "Fast noise variance estimation", Comput. Vis. Image Underst. 64, 300 (1996),
           doi:10.1006/cviu.1996.0060.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> round(describe(0.5 + 0.05 * rng.standard_normal((200, 200)))["noise"], 3)
    0.05
    """
    image = np.minimum(np.asarray(image, dtype=np.float32) / used_range(image, bit_depth), 1)
    low, high = np.percentile(image, [1, 99])
    half_step = 0.5 / 255
    noise = noise_level(image)
    coarse = np.asarray(Image.fromarray(image).reduce(max(min(image.shape) // COARSE_PX, 1)))
    smooth = ndi.gaussian_filter(coarse, [side / 4 for side in coarse.shape], truncate=2)
    return {
        "mean": float(image.mean()),
        "contrast": float(high - low),
        "saturated_fraction": float(((image <= half_step) | (image >= 1 - half_step)).mean()),
        "noise": noise,
        "signal_to_noise": float(image.std() / noise) if noise > 0 else 0.0,
        "sharpness": sharpness(image, noise),
        "entropy": float(shannon_entropy(np.rint(255 * image).astype(np.uint8), base=2)),
        "shading": float(np.ptp(smooth)),
    }


def used_range(image: np.ndarray, bit_depth: int) -> float:
    """Full scale of the detector within that of the file: 10 or 12 bit data often come in 16 bit files.

    Parameters
    ----------
    image : ndarray of float
        Grey values, fractions of the file's full scale.
    bit_depth : int
        Bits a sample in the file; float counts as 16.

    Returns
    -------
    float
        The full scale of the fewest whole bits, 8 at least, that hold the 99.9 percentile; fraction of the file's.

    Examples
    --------
    >>> round(used_range(np.linspace(0, 4095, 5000) / 65535, 16) * 65535)
    4095
    """
    full_scale = 2 ** min(bit_depth, 16) - 1
    brightest = round(float(np.percentile(image, 99.9)) * full_scale)
    return float(min((2 ** max(brightest.bit_length(), 8) - 1) / full_scale, 1))


def noise_level(image: np.ndarray) -> float:
    """Standard deviation of additive white noise, in the image's own units (Immerkaer 1996, eq. 6).

    Parameters
    ----------
    image : ndarray of float, shape (H, W), at least 3 x 3

    Returns
    -------
    float
        The mean absolute response to the difference of two Laplacians, which cancels constant, linear and
        quadratic structure; edges and fine texture raise it somewhat.
    """
    response = ndi.convolve(np.asarray(image, dtype=np.float32), LAPLACIAN_DIFFERENCE)[1:-1, 1:-1]
    return float(math.sqrt(math.pi / 2) * np.abs(response).mean() / 6)


def sharpness(image: np.ndarray, noise: float) -> float:
    """Fraction of the gradient energy that lies at the finest scale, without the noise's part.

    Parameters
    ----------
    image : ndarray of float, shape (H, W)
    noise : float
        Standard deviation of the image's white noise, same units (`noise_level`).

    Returns
    -------
    float
        0 (blurred, or nothing but noise) to 1.
    """
    return _lost_by_doubling(image, noise, FINEST_SIGMA_PX)


def _lost_by_doubling(image: np.ndarray, noise: float, sigma: float) -> float:
    """Fraction of gradient energy behind a Gaussian of `sigma` that one of twice that takes away, white noise subtracted from both."""
    energies = []
    for width in (sigma, 2 * sigma):
        energy = float(np.square(ndi.gaussian_gradient_magnitude(image, width)).mean())
        # white noise of variance n^2 leaves gradient energy n^2 / (4 pi sigma^4) behind a Gaussian of sigma
        energies.append(max(energy - noise**2 / (4 * math.pi * width**4), 0.0))
    fine, coarse = energies
    return min(max(1 - coarse / fine, 0.0), 1.0) if fine > 0 else 0.0


def focus(image: np.ndarray, grain_diameter_px: float) -> float:
    """How sharp a micrograph is at the scale of its grains, so that magnification and noise at pixel size hardly count.

    Parameters
    ----------
    image : ndarray, shape (H, W)
        Grey values on any scale, without the info bar.
    grain_diameter_px : float
        Mean grain diameter, px.

    Returns
    -------
    float
        Fraction, 0 to 1, of the gradient energy behind a Gaussian of 1/15 of a grain's diameter that doubling the smoothing takes
        away, the noise's part subtracted from both.

    Notes
    -----
    Measured on prepared images: 0.62 to 0.89 for the NBT ceramic at two magnifications, etched iron and steel, a perovskite film,
    a two-phase alloy, a superalloy and the virtual SEM; the same images blurred (noise added anew) by 0.1, 0.2 and 0.3 of
    the grains' diameter (standard deviation) come to 0.44-0.66, 0.19-0.43 and 0.13-0.49.
    """
    image = np.asarray(image, dtype=np.float32)
    return _lost_by_doubling(image, noise_level(image), grain_diameter_px / 15)


def without_shading(image: np.ndarray) -> np.ndarray:
    """Take the quadratic surface of least squares, such as shading and vignetting make, out of an image.

    Parameters
    ----------
    image : ndarray of float, shape (H, W)

    Returns
    -------
    ndarray of float32, shape (H, W)
        What is left; its mean is 0.
    """
    y, x = (np.linspace(-1, 1, side, dtype=np.float32) for side in image.shape)
    left = np.asarray(image, dtype=np.float32)
    across, down = x[None, :], y[:, None]
    # these are orthogonal on the grid, so each can be taken out by itself
    for term in (np.ones((1, 1)), down, across, down**2 - (y**2).mean(), across**2 - (x**2).mean(), down * across):
        surface = np.broadcast_to(term, left.shape).astype(np.float32)
        left = left - surface * float((left * surface).mean() / max(float(np.square(surface).mean()), 1e-12))
    return left
