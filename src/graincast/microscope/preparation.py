"""The one way from a micrograph to the uint8 image that every network here sees, in training and ever after."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from skimage.exposure import equalize_adapthist

from graincast.microscope.info_bar import find_info_bar
from graincast.microscope.scale import estimate_grain_diameter

if TYPE_CHECKING:
    from graincast.microscope.reader import Micrograph

STRETCH_PERCENTILES = (0.1, 99.9)


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
    height, width = (max(round(side * scale), 1) for side in image.shape)
    if (height, width) != image.shape:
        picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.float32))
        image = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
    low, high = np.percentile(image, STRETCH_PERCENTILES)
    grey = np.clip((image - low) / ((high - low) or 1), 0, 1)
    if clahe_clip > 0:
        tile = [max(min(round(clahe_tile_px), side), 1) for side in grey.shape]
        grey = equalize_adapthist(grey, kernel_size=tile, clip_limit=clahe_clip)
    return np.rint(255 * grey).astype(np.uint8)


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
    """

    target_pixel_size_um: float | None
    scale: float | None
    grain_diameter_px: float
    clahe_clip: float
    clahe_tile_px: float
    cut_info_bar: bool

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Preparation:
        """The inverse of `to_dict`."""
        return cls(**fields)

    def bar_row(self, micrograph: Micrograph) -> int:
        """First row that is not micrograph any more; the image height if there is no info bar (or it stays)."""
        return find_info_bar(micrograph.image, micrograph.scan_rows) if self.cut_info_bar else micrograph.image.shape[0]

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
            If it comes to `field` and that shows no grains.
        """
        if pixel_size_um is not None and self.target_pixel_size_um is not None:
            return pixel_size_um / self.target_pixel_size_um
        if self.scale is not None:
            return self.scale
        return self.grain_diameter_px / estimate_grain_diameter(field)

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
            If neither its pixel size nor a recorded scale says how large its grains are and the image does not either.
        """
        bar_row = self.bar_row(micrograph)
        field = micrograph.image[:bar_row]
        scale = self.scale_for(micrograph.pixel_size_um or pixel_size_um, field)
        return Prepared(prepare(field, scale, self.clahe_clip, self.clahe_tile_px), scale, bar_row)
