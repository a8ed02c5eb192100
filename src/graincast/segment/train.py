"""Training the segmenter on a labelled synthetic set."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from graincast.checkpoint import Checkpoint, RandomState, Stateful
from graincast.compute import Log, ahead, autocast, background_threads, pick_device, seeded, state_arrays
from graincast.config import Augment
from graincast.errors import UserError
from graincast.evaluate.metrics import right_grains
from graincast.segment.augment import augmented_crop
from graincast.segment.confidence import Calibration, fit, grain_features
from graincast.segment.instances import SMALLEST_SHARE, Cut, instances
from graincast.segment.network import build_network, standardise, targets
from graincast.segment.segmenter import Segmenter, predict_maps

if TYPE_CHECKING:
    from graincast.config import Segmenter as SegmenterConfig

Pair = tuple[np.ndarray, np.ndarray]
IMAGED_ANEW = 4
"""How often `calibrated` images each labelled image anew, beside once as it is: a good segmenter errs too seldom to learn from as it is."""


def train_segmenter(training: Sequence[Pair], validation: Sequence[Pair], config: SegmenterConfig, *,
                    log: Log | None = None, checkpoint: Checkpoint | None = None, start: Segmenter | None = None) -> Segmenter:
    """Train a segmenter on (image, instance ids) pairs.

    Parameters
    ----------
    training, validation : sequence of (ndarray, ndarray)
        uint8 images and int32 instance ids (0 = boundary), (height, width); the two share no morphology.
    config : graincast.config.Segmenter
        Network, schedule, augmentation and seed.
    log : callable, optional
        Called with (epoch, figures) after every epoch.
    checkpoint : graincast.checkpoint.Checkpoint, optional
        Where the training goes on from, and leaves its state, in case it is interrupted.
    start : Segmenter, optional
        Whose weights are the first; None: the configuration's, or drawn. They are kept where no epoch betters them.

    Returns
    -------
    Segmenter
        The weights of the epoch with the smallest validation loss.

    Raises
    ------
    UserError
        If a set is empty, an image is smaller than a crop, the loss stops being finite, or `start` is another network
        than the configuration's.
    """
    _check(training, validation, config.crop)
    _check_start(start, config)
    device = pick_device(config.device)
    with seeded(config.seed):
        network = build_network(config.architecture, config.encoder, None if start else config.encoder_weights)
        if start:
            network.load_state_dict(start.network.state_dict())
        # faster on CPUs, too, where the translator's instance norm would not have it (compute.memory_format)
        network = network.to(device).to(memory_format=torch.channels_last)
        optimiser = torch.optim.Adam(network.parameters(), config.learning_rate, fused=True)
        steps = max(1, math.ceil(len(training) * config.crops_per_image / config.batch))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=config.epochs * steps, pct_start=0.15)
        rng = np.random.default_rng(config.seed)
        best = _Best(copy.deepcopy(network.state_dict()))
        if start:
            best.loss = _validation_loss(network, validation, device, config.precision)
        checkpoint = checkpoint or Checkpoint()
        parts: dict[str, Stateful] = {"network": network, "optimiser": optimiser, "schedule": schedule, "best": best, "crops": RandomState(rng)}
        made_of = [config.model_dump(), *itertools.chain(*training), "validation", *itertools.chain(*validation),
                   *(state_arrays(start.network) if start else [])]
        done = checkpoint.resume(parts, device, made_of, log)
        progress = tqdm(range(done, config.epochs), desc="segmenter", unit="epoch", initial=done, total=config.epochs, disable=None)
        for epoch in progress:
            if best.stale >= config.patience:
                break
            network.train()
            losses = []
            for images, truth in _batches(training, config, rng, background_threads(device)):
                losses.append(training_step(network, optimiser, images, truth, device, config.precision))
                schedule.step()
            val_loss = _validation_loss(network, validation, device, config.precision)
            if not math.isfinite(val_loss):
                raise UserError(f"the segmenter's loss is no longer finite in epoch {epoch}; a smaller segmenter.learning_rate would be right")
            progress.set_postfix(train=f"{np.mean(losses):.3f}", validation=f"{val_loss:.3f}")
            best.see(network, val_loss)
            figures = {"train_loss": float(np.mean(losses)), "val_loss": val_loss, "learning_rate": float(schedule.get_last_lr()[0])}
            checkpoint.record(epoch, figures)
        network.load_state_dict(best.weights)
        network.eval()
    cut = Cut(SMALLEST_SHARE * _mean_area(training))
    return Segmenter(network, cut, config.model_dump())


def calibrated(segmenter: Segmenter, held_out: Sequence[Pair], seed: int) -> Calibration | None:
    """The confidence that a segmenter's grains deserve, learned from labelled images that neither trained it nor chose its epoch.

    Parameters
    ----------
    segmenter : Segmenter
        As trained.
    held_out : sequence of (ndarray, ndarray)
        uint8 images and int32 instance ids (0 = boundary), (height, width). Each is segmented as it is and `IMAGED_ANEW` times more as the
        training's augmentation shows it: nearer to what a micrograph may look like, and harder.
    seed : int
        Of the augmentation.

    Returns
    -------
    Calibration or None
        None, with a sentence in the log, where there is too little to learn from (`graincast.segment.confidence.fit`).
    """
    import pandas as pd  # here, as training itself runs without it

    augment, rng = Augment.model_validate(segmenter.config["augment"]), np.random.default_rng(seed)
    features, right, specimen = [], [], []
    structures = [labels.tobytes() for _, labels in held_out]  # the same one may be there in several looks
    for pair, structure in zip(held_out, structures, strict=True):
        anew = (augmented_crop(*pair, min(pair[0].shape), augment, rng) for _ in range(IMAGED_ANEW))
        for image, labels in itertools.chain([pair], anew):
            maps = predict_maps(segmenter.network, image, segmenter.config["precision"])
            found = instances(maps, segmenter.cut)
            features.append(grain_features(found, maps))
            right.append(right_grains(found, labels > 0))
            specimen.append(np.full(len(right[-1]), structures.index(structure)))
    return fit(pd.concat(features, ignore_index=True), np.concatenate(right), np.concatenate(specimen))


@dataclass
class _Best:
    """The weights with the smallest validation loss so far, and the epochs since."""

    weights: dict[str, torch.Tensor]
    loss: float = math.inf
    stale: int = 0

    def see(self, network: torch.nn.Module, loss: float) -> None:
        self.stale += 1
        if loss < self.loss:
            self.weights, self.loss, self.stale = copy.deepcopy(network.state_dict()), loss, 0

    def state_dict(self) -> dict[str, Any]:
        return vars(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


def training_step(network: torch.nn.Module, optimiser: torch.optim.Optimizer, images: torch.Tensor, truth: torch.Tensor,
                  device: torch.device, precision: str) -> float:
    """One step on a batch as `_batches` makes it; returns its loss."""
    with autocast(device, precision):
        logits = network(images.to(device, memory_format=torch.channels_last))
    loss = segmentation_loss(logits.float(), truth.to(device))
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return float(loss.detach())


def segmentation_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy on both channels plus the Dice loss (Milletari et al. 2016) of the thin boundary line.

    Parameters
    ----------
    logits, truth : Tensor
        (batch, 2, height, width); `truth` in [0, 1] as `graincast.segment.network.targets` makes it.
    """
    line, true_line = torch.sigmoid(logits[:, 0]), truth[:, 0]
    dice = 1 - (2 * (line * true_line).sum() + 1) / (line.sum() + true_line.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, truth) + 0.5 * dice


def _batches(training: Sequence[Pair], config: SegmenterConfig, rng: np.random.Generator,
             threads: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An epoch's images and targets. Every batch has a generator of its own, so they do not depend on the number of `threads`."""
    order = rng.permutation(np.repeat(np.arange(len(training)), config.crops_per_image))
    starts = range(0, len(order), config.batch)

    def batch(start: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = np.random.default_rng(seed)
        crops = [augmented_crop(*training[int(i)], config.crop, config.augment, own) for i in order[start : start + config.batch]]
        return (torch.from_numpy(np.stack([standardise(image) for image, _ in crops])[:, None]),
                torch.from_numpy(np.stack([targets(labels) for _, labels in crops])))

    return ahead(batch, starts, rng.integers(2**63, size=len(starts)), threads=threads)


@torch.no_grad()
def _validation_loss(network: torch.nn.Module, validation: Sequence[Pair], device: torch.device, precision: str) -> float:
    network.eval()
    losses = []
    for image, labels in validation:
        maps = torch.from_numpy(predict_maps(network, image, precision))[None].clamp(1e-4, 1 - 1e-4)
        losses.append(float(segmentation_loss(torch.logit(maps), torch.from_numpy(targets(labels))[None])))
    return float(np.mean(losses))


def _mean_area(pairs: Sequence[Pair]) -> float:
    """Mean area of the grains, px."""
    return sum(labels.size for _, labels in pairs) / max(sum(len(np.unique(labels[labels > 0])) for _, labels in pairs), 1)


def _check_start(start: Segmenter | None, config: SegmenterConfig) -> None:
    for key in ("architecture", "encoder"):
        if start and start.config[key] != getattr(config, key):
            raise UserError(f"segmenter.{key} is {getattr(config, key)}, that of the segmenter to start from {start.config[key]}; "
                            "the same would be right")


def _check(training: Sequence[Pair], validation: Sequence[Pair], crop: int) -> None:
    for name, pairs in (("training", training), ("validation", validation)):
        if not pairs:
            raise UserError(f"the segmenter's {name} set is empty; at least one labelled image is needed")
    smallest = min(min(image.shape) for image, _ in training)
    if smallest < crop:
        raise UserError(f"a synthetic image of {smallest} px is smaller than segmenter.crop of {crop} px; "
                        "a smaller crop or a larger simulate.size would be right")
