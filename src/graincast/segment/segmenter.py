"""The trained segmenter: prediction in tiles, closed instances, weights with their configuration inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image

from graincast.compute import autocast, load_weights, pick_device, save_weights
from graincast.errors import UserError
from graincast.segment.confidence import Calibration
from graincast.segment.instances import Cut, instances
from graincast.segment.network import STRIDE, build_network, standardise

if TYPE_CHECKING:
    from graincast.microscope.preparation import Preparation
    from graincast.microscope.reader import Micrograph

WEIGHTS = "segmenter.safetensors"
TILE, HALO = 1024, 64
"""Side of a tile and of the margin that is predicted but not kept, px."""
Run = Callable[[np.ndarray], np.ndarray]
"""A network as a function: standardised images, float32 (height, width), whose sides are multiples of `STRIDE`, to maps, (2, height, width)."""


class Segmenter:
    """A trained network with what turns its maps into grains.

    Parameters
    ----------
    network : torch.nn.Module
        One grey channel in, two logits out.
    cut : Cut
        How its maps are cut into grains.
    config : dict
        The configuration it was trained with.
    preparation : Preparation, optional
        How micrographs were prepared in training; needed by `segment_micrograph`.

    Attributes
    ----------
    parents : dict
        Names and digests of the sets it was trained on.
    run : callable or None
        The compiled network (`compile`); None: the network itself predicts.
    calibration : Calibration or None
        From its maps to the confidence in each grain (`graincast.segment.confidence`); None where none was fitted.
    """

    def __init__(self, network: torch.nn.Module, cut: Cut, config: dict[str, Any], preparation: Preparation | None = None) -> None:
        self.network, self.cut, self.config, self.preparation = network, cut, config, preparation
        self.parents: dict[str, str] = {}
        self.run: Run | None = None
        self.calibration: Calibration | None = None

    def segment(self, image: np.ndarray) -> np.ndarray:
        """Instance ids 1..N, int32 (height, width), of a prepared image, uint8 (height, width); they tile the image."""
        return instances(self._predict(image), self.cut)

    def compile(self, threads: int | None = None) -> Self:
        """Predict through OpenVINO from now on, where the network is on the processor: see `graincast.segment.compiled`.

        It takes some seconds, which pay from a few million pixels on. The weights of the moment count; training on is not seen.
        """
        if next(self.network.parameters()).device.type == "cpu":
            from graincast.segment.compiled import compiled

            self.run = compiled(self.network, self.config["precision"], threads)
        return self

    def _predict(self, image: np.ndarray) -> np.ndarray:
        """The maps of a prepared image."""
        return tiled_maps(self.run or eager(self.network, self.config["precision"]), standardise(image))

    def segment_micrograph(self, micrograph: Micrograph, pixel_size_um: float | None = None) -> np.ndarray:
        """Segment a micrograph as the instrument wrote it.

        Parameters
        ----------
        micrograph : Micrograph
            From `graincast.microscope.reader.read_micrograph`.
        pixel_size_um : float, optional
            Pixel size for a file whose metadata has none, um.

        Returns
        -------
        ndarray
            Instance ids, int32, at the micrograph's own size; 1..N tile the field, 0 on the info bar.

        Raises
        ------
        UserError
            If the segmenter carries no preparation, or that refuses the micrograph: too small, flat, saturated,
            structureless, or of no suitable magnification.
        """
        maps, scale = self.micrograph_maps(micrograph, pixel_size_um)
        labels = np.zeros(micrograph.image.shape, np.int32)
        labels[: maps.shape[1]] = instances(maps, self.cut, scale)
        return labels

    def micrograph_maps(self, micrograph: Micrograph, pixel_size_um: float | None = None) -> tuple[np.ndarray, float]:
        """The network's maps of a micrograph, before they are cut into grains.

        Parameters
        ----------
        micrograph, pixel_size_um
            As for `segment_micrograph`, which also says what is raised.

        Returns
        -------
        maps : ndarray
            (2, rows above the info bar, width), float32 in [0, 1]: boundary probability and depth, at the micrograph's own size.
        scale : float
            Pixels of the network's scale per pixel of the micrograph.
        """
        if self.preparation is None:
            raise UserError("this segmenter was trained without micrographs and cannot prepare one; segment prepared images instead")
        try:
            image, scale, bar_row = self.preparation.prepare(micrograph, pixel_size_um)
        except ValueError as error:
            raise UserError(str(error)) from error
        return brought_back(self._predict(image), (bar_row, micrograph.image.shape[1])), scale

    def save(self, folder: Path) -> None:
        """Write weights, configuration, cut, preparation and calibration as ``segmenter.safetensors`` into an existing folder."""
        header = {"config": self.config, "cut": asdict(self.cut), "parents": self.parents,
                  "preparation": self.preparation.to_dict() if self.preparation else None,
                  "calibration": self.calibration.to_dict() if self.calibration else None}
        save_weights(folder / WEIGHTS, self.network.state_dict(), header)

    @classmethod
    def load(cls, folder: Path, device: str = "auto") -> Self:
        """Read a folder that `save` wrote.

        Raises
        ------
        UserError
            If there is no segmenter in it, or one of an earlier version.
        """
        weights, header = load_weights(Path(folder) / WEIGHTS, "segmenter")
        if set(header["cut"]) != {field.name for field in fields(Cut)}:
            raise UserError(f"{folder} holds a segmenter of an earlier graincast, which cut its maps into grains in another way; train it anew")
        config = header["config"]
        network = build_network(config["architecture"], config["encoder"], None)
        network.load_state_dict(weights)
        network = network.to(pick_device(device)).to(memory_format=torch.channels_last).eval()
        segmenter = cls(network, Cut(**header["cut"]), config, _preparation(header["preparation"]))
        segmenter.parents = header["parents"]
        calibration = header.get("calibration")  # those of earlier graincasts have none
        segmenter.calibration = Calibration.from_dict(calibration) if calibration else None
        return segmenter


def _preparation(values: dict[str, Any] | None) -> Preparation | None:
    if values is None:
        return None
    from graincast.microscope.preparation import Preparation

    return Preparation.from_dict(values)


def predict_maps(network: torch.nn.Module, image: np.ndarray, precision: str) -> np.ndarray:
    """The network's maps of an image of any size.

    Parameters
    ----------
    network : torch.nn.Module
        In evaluation mode.
    image : ndarray
        Prepared image, uint8 (height, width).
    precision : str
        See `graincast.compute.autocast`.

    Returns
    -------
    ndarray
        (2, height, width), float32 in [0, 1]: boundary probability and depth.
    """
    return tiled_maps(eager(network, precision), standardise(image))


def eager(network: torch.nn.Module, precision: str) -> Run:
    """A network as torch runs it: the reference that others are compared with."""
    device = next(network.parameters()).device

    @torch.no_grad()
    def run(image: np.ndarray) -> np.ndarray:
        tile = torch.from_numpy(np.ascontiguousarray(image))[None, None]
        with autocast(device, precision):
            # faster on CPUs, too, where the translator's instance norm would not have it (compute.memory_format)
            logits = network(tile.to(device, memory_format=torch.channels_last))
        return torch.sigmoid(logits.float())[0].cpu().numpy()

    return run


def tiled_maps(run: Run, standard: np.ndarray) -> np.ndarray:
    """Maps, (2, height, width), of a standardised image, float32 (height, width), of any size.

    Tiles overlap by `HALO`, so that each pixel is predicted with its surroundings in sight; only then are grains sought, so no
    tile cuts one.
    """
    height, width = standard.shape
    if max(height, width) <= TILE:
        core_y, core_x, halo = height, width, HALO // 4
    else:
        core_y = core_x = TILE - 2 * HALO
        halo = HALO
    rows, columns = -(-height // core_y), -(-width // core_x)
    # one tile's sides, rounded up to what the network takes
    side_y, side_x = (-(-(core + 2 * halo) // STRIDE) * STRIDE for core in (core_y, core_x))
    below, right = (n * core - extent + side - core - halo
                    for n, core, extent, side in ((rows, core_y, height, side_y), (columns, core_x, width, side_x)))
    padded = np.pad(standard, ((halo, below), (halo, right)), mode="symmetric")
    maps = np.empty((2, rows * core_y, columns * core_x), np.float32)
    kept = (slice(halo, halo + core_y), slice(halo, halo + core_x))
    for y in range(0, rows * core_y, core_y):
        for x in range(0, columns * core_x, core_x):
            maps[:, y : y + core_y, x : x + core_x] = run(padded[y : y + side_y, x : x + side_x])[:, *kept]
    return maps[:, :height, :width]


def brought_back(maps: np.ndarray, shape: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """Maps, or a `box` in them (left, top, right and bottom edge, px), at the micrograph's own sampling: float32 (2, *shape).

    Linear interpolation; where pixels become fewer its support widens, so nothing aliases.
    """
    if shape == maps.shape[1:] and box is None:
        return maps
    return np.stack([np.asarray(Image.fromarray(m).resize(shape[::-1], Image.Resampling.BILINEAR, box)) for m in maps])
