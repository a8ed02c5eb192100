"""The network, what it is asked to predict, and its weights on disk."""

from __future__ import annotations

import numpy as np
import segmentation_models_pytorch as smp
import torch
from scipy import ndimage as ndi
from skimage import segmentation

from graincast.errors import UserError
from graincast.labels import fill_lines

CHANNELS = 2
"""Channel 0: boundary line; channel 1: depth inside the grain."""
DEPTH_PX = 6.0
"""Distance from the boundary line at which the depth channel saturates, px (a fifth of the training grains)."""
STRIDE = 32
"""Sides of the network's input must be multiples of this, px."""


def build_network(architecture: str, encoder: str, encoder_weights: str | None) -> torch.nn.Module:
    """A segmentation-models-pytorch network from one grey channel to `CHANNELS` logits.

    Raises
    ------
    UserError
        If segmentation-models-pytorch knows no such architecture or encoder, or the weights cannot be had.
    """
    try:
        return smp.create_model(architecture, encoder, encoder_weights, in_channels=1, classes=CHANNELS)
    except (KeyError, RuntimeError, OSError, ValueError) as error:
        raise UserError(f"segmenter.architecture '{architecture}' with encoder '{encoder}' and encoder_weights "
                        f"'{encoder_weights}' cannot be built ({str(error).splitlines()[0]}); Unet, resnet18 and null "
                        "work without a network connection") from error


def standardise(image: np.ndarray) -> np.ndarray:
    """The network's input of a grey image, (height, width): zero mean, unit variance, float32."""
    grey = image.astype(np.float32)
    return (grey - grey.mean()) / max(float(grey.std()), 1e-3)


def targets(labels: np.ndarray) -> np.ndarray:
    """What the network shall predict for instance ids, int (height, width), 0 = boundary.

    Returns
    -------
    ndarray
        (2, height, width), float32 in [0, 1]: the boundary line, 2 px wide whatever the width of the zeros, and the
        depth min(distance to the line / `DEPTH_PX`, 1), whose peaks seed the watershed.
    """
    dense = fill_lines(labels)
    line = segmentation.find_boundaries(dense, mode="thick")
    distance = ndi.distance_transform_edt(~line) if line.any() else np.full(labels.shape, np.inf)
    return np.stack([line, np.minimum(distance / DEPTH_PX, 1)]).astype(np.float32)
