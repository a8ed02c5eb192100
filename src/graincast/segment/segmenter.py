"""The trained segmenter: prediction in tiles, closed instances, weights with their configuration inside."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from skimage import transform

from graincast.compute import autocast, load_weights, memory_format, pick_device, save_weights
from graincast.errors import UserError
from graincast.segment.instances import Cut, instances
from graincast.segment.network import STRIDE, build_network, standardise

if TYPE_CHECKING:
    from graincast.microscope.preparation import Preparation
    from graincast.microscope.reader import Micrograph

WEIGHTS = "segmenter.safetensors"
TILE, HALO = 512, 64
"""Side of a tile and of the margin that is predicted but not kept, px."""


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
    """

    def __init__(self, network: torch.nn.Module, cut: Cut, config: dict[str, Any], preparation: Preparation | None = None) -> None:
        self.network, self.cut, self.config, self.preparation = network, cut, config, preparation
        self.parents: dict[str, str] = {}

    def segment(self, image: np.ndarray) -> np.ndarray:
        """Instance ids 1..N, int32 (height, width), of a prepared image, uint8 (height, width); they tile the image."""
        return instances(predict_maps(self.network, image, self.config["precision"]), self.cut)

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
        maps = predict_maps(self.network, image, self.config["precision"])
        field = (bar_row, micrograph.image.shape[1])
        return np.stack([transform.resize(m, field, order=1, anti_aliasing=scale > 1) for m in maps]), scale

    def save(self, folder: Path) -> None:
        """Write weights, configuration, cut and preparation as ``segmenter.safetensors`` into an existing folder."""
        header = {"config": self.config, "cut": asdict(self.cut), "parents": self.parents,
                  "preparation": self.preparation.to_dict() if self.preparation else None}
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
        segmenter = cls(network.to(pick_device(device)).eval(), Cut(**header["cut"]), config, _preparation(header["preparation"]))
        segmenter.parents = header["parents"]
        return segmenter


def _preparation(values: dict[str, Any] | None) -> Preparation | None:
    if values is None:
        return None
    from graincast.microscope.preparation import Preparation

    return Preparation.from_dict(values)


@torch.no_grad()
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
        (2, height, width), float32 in [0, 1]: boundary probability and depth. Tiles overlap by `HALO`, so that each
        pixel is predicted with its surroundings in sight; only then are grains sought, so no tile cuts one.
    """
    device = next(network.parameters()).device
    height, width = image.shape
    standard = standardise(image)
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
            tile = torch.from_numpy(padded[y : y + side_y, x : x + side_x])[None, None]
            with autocast(device, precision):
                logits = network(tile.to(device, memory_format=memory_format(device)))
            maps[:, y : y + core_y, x : x + core_x] = torch.sigmoid(logits.float())[0, :, *kept].cpu().numpy()
    return maps[:, :height, :width]
