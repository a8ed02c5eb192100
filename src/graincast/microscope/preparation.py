"""The one way from a micrograph to the uint8 image that every network here sees, in training and ever after."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from skimage.exposure import equalize_adapthist

from graincast.microscope.info_bar import find_info_bar
from graincast.microscope.mixture import has_bright_boundaries
from graincast.microscope.quality import describe, noise_level, without_shading
from graincast.microscope.scale import estimate_grain_diameter

if TYPE_CHECKING:
    from graincast.microscope.reader import Micrograph

STRETCH_PERCENTILES = (0.1, 99.9)
LEAST_SIGNAL_TO_NOISE = 2.0  # of an image, shading apart, whose grains cannot be sized; pure noise has 1
MIDDLE_PX = 512  # side of the part of a field that is sought for grains first
QUANTISATION = 1 / 255 / 12**0.5  # noise of rounding to 8 bits, standard deviation, fraction of full scale
LARGEST_SCALE = 6.0
"""Largest resampling factor: of grains smaller than that, hardly anything but interpolation would be seen."""
LARGEST_AREA_PX = 64_000_000  # of a prepared image; equalisation takes some 50 bytes a pixel


def prepare(image: np.ndarray, scale: float, clahe_clip: float, clahe_tile_px: float) -> np.ndarray:
    """Resample a micrograph and even out its grey values.

    Parameters
    ----------
    image : ndarray of float32, shape (H, W)
        Grey values in [0, 1], without the info bar.
    scale : float
        Output pixels per input pixel. Lanczos resampling; its support widens with the reduction, so nothing aliases.
    clahe_clip : float
        Clip limit of the contrast-limited adaptive histogram equalisation [1]_, fraction of a tile's pixels in one
        of 256 bins; 0 leaves the histogram alone but for the stretch from the 0.1 to the 99.9 percentile.
    clahe_tile_px : float
        Side of the equalisation's tiles, px of the output.

    Returns
    -------
    ndarray of uint8, shape (round(H * scale), round(W * scale))
        Bright stays bright: the grey values' local order is kept.

    References
    ----------
    .. [1] K. Zuiderveld, "Contrast limited adaptive histogram equalization", Graphics Gems IV (1994), 474-485,
           doi:10.1016/B978-0-12-336156-1.50061-6.
    """
    image = resampled(image, resampled_shape(image.shape, scale))
    return evened_out(image, stretch_range(image), clahe_clip, clahe_tile_px)


def resampled_shape(shape: tuple[int, ...], scale: float) -> tuple[int, int]:
    """Height and width once resampled."""
    height, width = (max(round(side * scale), 1) for side in shape)
    return height, width


def resampled(image: np.ndarray, shape: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """Lanczos resampling, float32, of an image or of a `box` in it: left, top, right and bottom edge, px."""
    if shape == image.shape and box in (None, (0, 0, *shape[::-1])):
        return image
    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.float32))
    return np.asarray(picture.resize(shape[::-1], Image.Resampling.LANCZOS, box))


def evened_out(image: np.ndarray, grey_range: tuple[float, float], clahe_clip: float, clahe_tile_px: float) -> np.ndarray:
    """A resampled image, or a part of one, stretched from `grey_range` and equalised (see `prepare`); uint8."""
    grey = _stretch(image, grey_range)
    if clahe_clip > 0:
        tile = [max(min(round(clahe_tile_px), side), 1) for side in grey.shape]
        grey = equalize_adapthist(grey, kernel_size=tile, clip_limit=clahe_clip)
    return np.rint(255 * grey).astype(np.uint8)


def to_grey8(image: np.ndarray, field: np.ndarray | None = None) -> np.ndarray:
    """A micrograph as 8-bit picture for people and for the classical baseline, whatever part of its range it uses.

    Parameters
    ----------
    image : ndarray of float, shape (H, W)
        Grey values on any scale.
    field : ndarray of bool, shape (H, W), optional
        True where the specimen is seen; the info bar then has no say in the range.

    Returns
    -------
    ndarray of uint8, shape (H, W)
        Stretched from the field's 0.1 to its 99.9 percentile.
    """
    return np.rint(255 * _stretch(image, stretch_range(image if field is None or not field.any() else image[field]))).astype(np.uint8)


def stretch_range(sample: np.ndarray) -> tuple[float, float]:
    """The grey values that become black and white: the sample's 0.1 and 99.9 percentile."""
    low, high = np.percentile(sample, STRETCH_PERCENTILES)
    return low, high


def _stretch(image: np.ndarray, grey_range: tuple[float, float]) -> np.ndarray:
    low, high = grey_range
    return np.clip((image - low) / ((high - low) or 1), 0, 1)


class TooLarge(ValueError):
    """The prepared image would have more than `LARGEST_AREA_PX`; block by block it can be had (`graincast.segment.tiled`)."""


class Inspection(NamedTuple):
    """What `Preparation.inspect` found.

    Attributes
    ----------
    bar_row : int
        First row that is not micrograph any more; the image height if there is no info bar (or it stays).
    quality : dict of str to float
        Descriptors of the field above (see `graincast.microscope.quality.describe`); empty if it is too small.
    refused : str or None
        Why the micrograph must not be used; None: it may.
    """

    bar_row: int
    quality: dict[str, float]
    refused: str | None


class Prepared(NamedTuple):
    """A micrograph as the networks see it, and the way back: the original's rows ``[:bar_row]`` times `scale`."""

    image: np.ndarray
    scale: float
    bar_row: int


@dataclass(frozen=True)
class Preparation:
    """How micrographs of a set were prepared, and how further ones are.

    Attributes
    ----------
    target_pixel_size_um : float or None
        Pixel size after resampling, um, of every file whose own pixel size is known; None: none was.
    scale : float or None
        Resampling factor of files without a pixel size (of every file, where the configuration fixed it);
        None: there were no such files.
    grain_diameter_px : float
        Equivalent circular grain diameter that the images are brought to, px.
    clahe_clip, clahe_tile_px : float
        See `prepare`.
    cut_info_bar : bool
        Whether the info bar is looked for and cut.
    min_size : int
        Smallest width and height before and after resampling, px.
    max_saturated : float
        Largest fraction of black and white pixels.
    min_contrast : float
        Smallest range of grey from the 1st to the 99th percentile, fraction of full scale (see `used_range`).
    default_pixel_size_um : float or None
        Pixel size of files when neither they nor the caller tell, um.
    bright_boundaries : bool or None
        Whether boundaries are brighter than grains in the set; None: unclear, or bright in some files and dark in others.
    usual_scale : float or None
        Median resampling factor of the set. A later session's files without a pixel size are taken at it, so that a changed
        magnification shows.
    """

    target_pixel_size_um: float | None
    scale: float | None
    grain_diameter_px: float
    clahe_clip: float
    clahe_tile_px: float
    cut_info_bar: bool
    min_size: int
    max_saturated: float
    min_contrast: float
    default_pixel_size_um: float | None
    bright_boundaries: bool | None = None
    usual_scale: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Preparation:
        """The inverse of `to_dict`."""
        return cls(**fields)

    def pixel_size(self, micrograph: Micrograph, pixel_size_um: float | None = None) -> float | None:
        """Pixel size, um: the file's own, else the caller's, else the default; None if nobody knows."""
        return micrograph.pixel_size_um or pixel_size_um or self.default_pixel_size_um

    def inspect(self, micrograph: Micrograph) -> Inspection:
        """Find the info bar and judge what lies above it: the one gate of training and of all that comes after."""
        height, width = micrograph.image.shape
        bar_row = find_info_bar(micrograph.image, micrograph.scan_rows) if self.cut_info_bar else height
        if min(bar_row, width) < self.min_size:
            return Inspection(bar_row, {}, f"too small: {width} x {bar_row} px, at least {self.min_size} px are needed")
        field = micrograph.image[:bar_row]
        quality = describe(field, micrograph.bit_depth)
        return Inspection(bar_row, quality, self._flaw(field, quality))

    def _flaw(self, field: np.ndarray, quality: dict[str, float]) -> str | None:
        if quality["contrast"] < self.min_contrast:
            return f"no contrast: grey values span {quality['contrast']:.4f} of full scale, at least {self.min_contrast} is needed"
        if quality["saturated_fraction"] > self.max_saturated:
            return (f"saturated: {quality['saturated_fraction']:.0%} of the pixels are black or white, "
                    f"at most {self.max_saturated:.0%} may be")
        return _structureless(field) if _signal_to_noise(field) < LEAST_SIGNAL_TO_NOISE else None

    def scale_for(self, pixel_size_um: float | None, field: np.ndarray) -> float:
        """Resampling factor of a micrograph.

        Parameters
        ----------
        pixel_size_um : float or None
            Its pixel size, um.
        field : ndarray of float32, shape (H, W)
            Its grey values without the info bar, asked only when neither pixel sizes nor the recorded `scale` tell.

        Raises
        ------
        ValueError
            If it comes to `field` and that shows no grains, or if the factor or the image that it makes is too large
            (`TooLarge`) or too small.
        """
        if pixel_size_um is not None and self.target_pixel_size_um is not None:
            scale = pixel_size_um / self.target_pixel_size_um
        elif self.scale is not None:
            scale = self.scale
        else:
            try:
                scale = self.grain_diameter_px / estimate_grain_diameter(field)
            except ValueError as error:
                raise ValueError(f"scale unknown: {error}; a pixel size, or in training the key ingest.scale, can tell it") from error
        if scale > LARGEST_SCALE:
            raise ValueError(f"magnification too low: grains would be only {self.grain_diameter_px / scale:.1f} px across in the original, "
                             f"at least {self.grain_diameter_px / LARGEST_SCALE:.1f} px are needed")
        height, width = (side * scale for side in field.shape)
        resampled = f"{width:.0f} x {height:.0f} px once its grains are {self.grain_diameter_px:.0f} px wide"
        if min(height, width) < self.min_size:
            raise ValueError(f"too small: {resampled}, at least {self.min_size} px are needed")
        if height * width > LARGEST_AREA_PX:
            raise TooLarge(f"too large: {resampled}, at most {LARGEST_AREA_PX / 1e6:.0f} million px may be; cut it into parts")
        return scale

    def resample(self, field: np.ndarray, pixel_size_um: float | None) -> tuple[np.ndarray, float]:
        """Resample and equalise a field (see `prepare`); returns it with its scale. Raises as `scale_for`."""
        scale = self.scale_for(pixel_size_um, field)
        return prepare(field, scale, self.clahe_clip, self.clahe_tile_px), scale

    def prepare(self, micrograph: Micrograph, pixel_size_um: float | None = None) -> Prepared:
        """Cut, resample and equalise a micrograph.

        Parameters
        ----------
        micrograph : Micrograph
            As `read_micrograph` gives it.
        pixel_size_um : float, optional
            Pixel size for a file that has none itself, um.

        Raises
        ------
        ValueError
            With the reason, if the micrograph does not pass `inspect` or `scale_for`, or its boundaries are bright where
            those of the set are dark, or the other way round.
        """
        inspection = self.inspect(micrograph)
        if inspection.refused is not None:
            raise ValueError(inspection.refused)
        image, scale = self.resample(micrograph.image[:inspection.bar_row], self.pixel_size(micrograph, pixel_size_um))
        self.check_polarity(image)
        return Prepared(image, scale, inspection.bar_row)

    def check_polarity(self, image: np.ndarray) -> None:
        """Refuse a prepared image whose boundaries are bright where those of the set are dark, or the other way round; ValueError."""
        bright = has_bright_boundaries(image)
        if None not in (bright, self.bright_boundaries) and bright != self.bright_boundaries:
            here, there = ("bright", "dark") if bright else ("dark", "bright")
            raise ValueError(f"inverted contrast: boundaries are {here} here and {there} in the micrographs of the training; "
                             "the inverted image would be right, or a model trained on such micrographs")


def _structureless(field: np.ndarray) -> str | None:
    """Why no grains can be made out; None: they can, in the middle, which tells of most fields sooner, or in the whole."""
    reason = ""
    middle = tuple(slice(max(side - MIDDLE_PX, 0) // 2, (side + MIDDLE_PX) // 2) for side in field.shape)
    for part in (field[middle], field):
        try:
            estimate_grain_diameter(part)
            return None
        except ValueError as error:
            reason = f"structureless: {error}"
    return reason


def _signal_to_noise(field: np.ndarray) -> float:
    """Standard deviation of grey over that of the noise, shading apart: a bare gradient is no structure either."""
    detail = without_shading(field)
    return float(detail.std() / max(noise_level(detail), QUANTISATION))
