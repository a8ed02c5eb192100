"""Training the CycleGAN (Zhu et al. 2017, doi:10.1109/ICCV.2017.244) and using it as a `Synthesiser`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from graincast.checkpoint import Checkpoint, Stateful
from graincast.compute import (
    Log,
    ahead,
    autocast,
    background_threads,
    dihedral,
    load_weights,
    memory_format,
    pick_device,
    random_crop,
    save_weights,
    seeded,
    state_arrays,
)
from graincast.config import Augment
from graincast.errors import UserError
from graincast.microscope.quality import noise_level
from graincast.surface import texture
from graincast.synthesise.cyclegan.model import Discriminator, Generator
from graincast.synthesise.tones import Morphology, Tones, match_tones, narrow

if TYPE_CHECKING:
    from graincast.config import Translator as TranslatorConfig

WEIGHTS = "translator.safetensors"
SURFACE = Augment(tones=0, veins=0, scratches=0)
"""What F is shown on the grains, at random, so that it has something to make the micrographs' specks and mottle of; without,
it draws the same rings and smudges in every grain. Lines are left out: F might take them for boundaries."""
AVERAGING = 0.98
"""Decay a step of the running average of the generators' weights, which is what is kept (Yazici et al. 2019)."""
TEXTURE_PX = 3
"""Side of the window below which a micrograph's detail counts as texture, which the cycle need not bring back, px."""
WARM_UP = 0.1
"""Share of the steps over which the learning rate of generators that were taken over rises: what new discriminators say at
first is noise, which would undo what the generators know."""
POLARITY_MARGIN = 0.3
"""Correlation of input and output detail below which the guard against contrast inversion pushes back."""


@dataclass
class CycleGAN:
    """A trained pair of generators.

    Attributes
    ----------
    forward : Generator
        F, simulation -> SEM, with noise.
    backward : Generator
        G, SEM -> simulation.
    tones : Tones
        In which F is shown a picture.
    bright_boundaries : bool
        Whether boundaries are brighter than grains in the micrographs.
    config : dict
        The configuration it was trained with.
    parents : dict
        Names and digests of the sets it was trained on.
    """

    forward: Generator
    backward: Generator
    tones: Tones
    bright_boundaries: bool
    config: dict[str, Any]
    parents: dict[str, str] = field(default_factory=dict)

    @torch.no_grad()
    def to_sem(self, picture: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
        """See `graincast.synthesise.base.Synthesiser.to_sem`."""
        rng = np.random.default_rng(seed)
        noise = torch.from_numpy(rng.standard_normal(picture.shape, np.float32))
        shown = _with_surface(self.in_tones(picture, labels), labels, rng)
        padded, crop = _pad(torch.cat([_to_tensor([shown]), noise[None, None]], dim=1))
        padded = padded.to(next(self.forward.parameters()).device)
        return _to_uint8(self.forward.eval()(padded[:, :1], padded[:, 1:])[0, 0][crop])

    def in_tones(self, picture: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """See `graincast.synthesise.base.Synthesiser.in_tones`."""
        return self.tones.apply(picture, labels)

    def as_lines(self, values: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """See `graincast.synthesise.base.Synthesiser.as_lines`."""
        return narrow(values, labels, self.tones.width, self.tones.place)

    def save(self, folder: Path) -> None:
        """Write weights and configuration as ``translator.safetensors`` into an existing folder."""
        weights = {f"{part}.{name}": value for part, net in (("forward", self.forward), ("backward", self.backward))
                   for name, value in net.state_dict().items()}
        header = {"config": self.config, "boundary_width": self.tones.width, "tone_spread": self.tones.spread,
                  "tone_curve": self.tones.curve.tolist(), "bright_boundaries": self.bright_boundaries, "parents": self.parents}
        save_weights(folder / WEIGHTS, weights, header)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a folder that `save` wrote; a UserError names what is missing."""
        weights, header = load_weights(folder / WEIGHTS, "translator")
        config = header["config"]
        nets = {part: Generator(config["filters"], config["residual_blocks"], noise=part == "forward") for part in ("forward", "backward")}
        for part, net in nets.items():
            net.load_state_dict({name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")})
            net.eval()
        if "boundary_width" not in header:
            raise UserError(f"{folder} holds a translator of an earlier graincast, which drew grains without a surface; train it anew")
        tones = Tones(header["boundary_width"], header["tone_spread"], np.array(header["tone_curve"], np.uint8))
        return cls(nets["forward"], nets["backward"], tones, header["bright_boundaries"], config, header["parents"])


def train_cyclegan(morphologies: Sequence[Morphology], micrographs: Sequence[np.ndarray], config: TranslatorConfig, *,
                   bright_boundaries: bool = False, log: Log | None = None, checkpoint: Checkpoint | None = None,
                   start: CycleGAN | None = None) -> CycleGAN:
    """Learn how a microscope makes grains look, from unpaired images.

    Parameters
    ----------
    morphologies : sequence of (ndarray, ndarray)
        Simulated pictures, uint8 (height, width), boundaries dark, and their instance ids, int32.
    micrographs : sequence of ndarray
        Prepared micrographs, uint8 (height, width), with grains of about the simulation's size in px.
    config : graincast.config.Translator
        Sizes, losses and seed.
    bright_boundaries : bool
        Whether the micrographs' boundaries are brighter than their grains.
    log : callable, optional
        Called with (step, losses) at every step.
    checkpoint : graincast.checkpoint.Checkpoint, optional
        Where the training goes on from, and leaves its state, in case it is interrupted.
    start : CycleGAN, optional
        Whose generators are taken as the first weights; None: they are drawn. Tones, noise and discriminators, which tell
        one look from another, are new in any case, and the generators' learning rate rises over the first `WARM_UP` of the
        steps, until the discriminators can tell.

    Returns
    -------
    CycleGAN
        With running averages of the generators' weights.

    Raises
    ------
    UserError
        If no picture, or no micrograph, is as large as a crop, or `start` has networks of other sizes or was trained on
        boundaries of the other polarity.
    """
    _check_start(start, config, bright_boundaries)
    micrographs = _large_enough(micrographs, config.crop, "micrographs", "translator.crop")
    _large_enough([picture for picture, _ in morphologies], config.crop, "simulated pictures", "simulate.size")
    tones = match_tones(morphologies, micrographs, bright_boundaries)
    shown = [(tones.apply(picture, labels), labels) for picture, labels in morphologies if min(picture.shape) >= config.crop]
    device = pick_device(config.device)
    with seeded(config.seed):
        training = _Training(config, device, start)
        training.set_noise(float(np.median([noise_level(image / np.float32(255)) for image in micrographs])))
        checkpoint = checkpoint or Checkpoint()
        made_of = [config.model_dump(), *itertools.chain(*shown), *micrographs, *(state_arrays(start.forward, start.backward) if start else [])]
        done = checkpoint.resume(training.parts(), device, made_of, log)
        batches = ahead(partial(_batch, shown, micrographs, config), range(done, config.steps), threads=background_threads(device))
        progress = tqdm(batches, desc="translator", unit="step", initial=done, total=config.steps, disable=None)
        for step, batch in enumerate(progress, done):
            sim, sem = (crops.to(device, memory_format=memory_format(device)) for crops in batch)
            losses = training.step(sim, sem)
            if not np.isfinite(list(losses.values())).all():
                raise UserError(f"the translator's losses are no longer finite at step {step}; a smaller translator.learning_rate would be right")
            checkpoint.record(step, losses)
    return CycleGAN(training.mean_f.eval(), training.mean_g.eval(), tones, bright_boundaries, config.model_dump())


def _check_start(start: CycleGAN | None, config: TranslatorConfig, bright_boundaries: bool) -> None:
    if start is None:
        return
    for key in ("filters", "residual_blocks"):
        if start.config[key] != getattr(config, key):
            raise UserError(f"translator.{key} is {getattr(config, key)}, that of the translator to start from {start.config[key]}; "
                            "the same would be right")
    if start.bright_boundaries != bright_boundaries:
        here, there = ("bright", "dark") if bright_boundaries else ("dark", "bright")
        raise UserError(f"boundaries are {here} in the micrographs and {there} in those of the translator to start from; "
                        "a training from the start (graincast train) would be right")


Net = TypeVar("Net", Generator, Discriminator)


class _Training:
    """Networks, optimisers and history pools of one training."""

    def __init__(self, config: TranslatorConfig, device: torch.device, start: CycleGAN | None = None) -> None:
        self.config, self.device = config, device
        self.f = self._place(Generator(config.filters, config.residual_blocks, noise=True))
        self.g = self._place(Generator(config.filters, config.residual_blocks, noise=False))
        self.d_sem, self.d_sim = (self._place(Discriminator(config.filters)) for _ in range(2))
        if start:
            self.f.load_state_dict(start.forward.state_dict())
            self.g.load_state_dict(start.backward.state_dict())
        self.mean_f, self.mean_g = copy.deepcopy(self.f), copy.deepcopy(self.g)
        self.pool_sem, self.pool_sim = _Pool(config.pool, config.seed), _Pool(config.pool, config.seed + 1)
        generators = itertools.chain(self.f.parameters(), self.g.parameters())
        discriminators = itertools.chain(self.d_sem.parameters(), self.d_sim.parameters())
        self.optimisers = [torch.optim.Adam(p, config.learning_rate, betas=(0.5, 0.999)) for p in (generators, discriminators)]
        factors = (self._warm_up if start else self._decay, self._decay)
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o, factor in zip(self.optimisers, factors, strict=True)]

    def set_noise(self, level: float) -> None:
        """Give F the micrographs' own noise, as a fraction of full scale."""
        for net in (self.f, self.mean_f):
            net.noise_level.fill_(2 * level)

    def parts(self) -> dict[str, Stateful]:
        """All that changes from step to step, by name."""
        parts: dict[str, Stateful] = {"f": self.f, "g": self.g, "d_sem": self.d_sem, "d_sim": self.d_sim, "mean_f": self.mean_f,
                                      "mean_g": self.mean_g, "pool_sem": self.pool_sem, "pool_sim": self.pool_sim}
        parts |= {f"optimiser_{i}": optimiser for i, optimiser in enumerate(self.optimisers)}
        parts |= {f"schedule_{i}": schedule for i, schedule in enumerate(self.schedules)}
        return parts

    def _place(self, net: Net) -> Net:
        net.initialise()
        return net.to(self.device).to(memory_format=memory_format(self.device))

    def _decay(self, step: int) -> float:
        start = self.config.decay_from * self.config.steps
        return 1.0 if step < start else max(0.0, (self.config.steps - step) / max(self.config.steps - start, 1.0))

    def _warm_up(self, step: int) -> float:
        return self._decay(step) * min(1.0, (step + 1) / max(WARM_UP * self.config.steps, 1.0))

    def step(self, sim: torch.Tensor, sem: torch.Tensor) -> dict[str, float]:
        """One step of the generators, then one of the discriminators; returns the losses."""
        generator_optimiser, discriminator_optimiser = self.optimisers
        with autocast(self.device, self.config.precision):
            losses, fake_sem, fake_sim = self._generator_losses(sim, sem)
        total = torch.stack(list(losses.values())).sum()
        generator_optimiser.zero_grad(set_to_none=True)
        total.backward()
        generator_optimiser.step()
        with autocast(self.device, self.config.precision):
            d_sem = _least_squares(self.d_sem, sem, self.pool_sem.exchange(fake_sem.detach()))
            d_sim = _least_squares(self.d_sim, sim, self.pool_sim.exchange(fake_sim.detach()))
        discriminator_optimiser.zero_grad(set_to_none=True)
        (d_sem + d_sim).backward()
        discriminator_optimiser.step()
        for schedule in self.schedules:
            schedule.step()
        self._average()
        losses = {**losses, "discriminator_sem": d_sem, "discriminator_sim": d_sim}
        return dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))  # CUDA is waited for once

    def _generator_losses(self, sim: torch.Tensor, sem: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        config = self.config
        content, noise = self.f.parts(sim)
        fake_sem, fake_sim = torch.tanh(content + noise), self.g(sem)
        returned = self.g(torch.tanh(content + noise.detach()))  # how strong the noise is, the discriminator alone decides
        silent = torch.zeros_like(sem)  # no noise where a micrograph's own pixels are asked for: its noise cannot be guessed
        for net in (self.d_sem, self.d_sim):
            net.requires_grad_(False)
        losses = {
            "adversarial_f": (self.d_sem(fake_sem).float() - 1).square().mean(),
            "adversarial_g": (self.d_sim(fake_sim).float() - 1).square().mean(),
            "cycle": config.cycle_weight * (F.l1_loss(returned.float(), sim) + _smooth_l1(self.f(fake_sim, silent), sem)),
            "identity": config.identity_weight * (_smooth_l1(self.f(sem, silent), sem) + F.l1_loss(self.g(sim).float(), sim)),
            "polarity": config.polarity_weight * (_inversion(sim, fake_sem) + _inversion(sem, fake_sim)),
        }
        for net in (self.d_sem, self.d_sim):
            net.requires_grad_(True)
        return losses, fake_sem.float(), fake_sim.float()

    @torch.no_grad()
    def _average(self) -> None:
        for mean, net in ((self.mean_f, self.f), (self.mean_g, self.g)):
            for average, value in zip(mean.parameters(), net.parameters(), strict=True):
                average.lerp_(value, 1 - AVERAGING)


class _Pool:
    """History of generated images that steadies the discriminators (Shrivastava et al. 2017)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.rng = size, np.random.default_rng(seed)
        self.images: list[torch.Tensor] = []

    def exchange(self, batch: torch.Tensor) -> torch.Tensor:
        """Half the time the new image, half the time an old one that makes place for it."""
        given = []
        for image in batch:
            if len(self.images) < self.size:
                self.images.append(image)
            elif self.size and self.rng.random() < 0.5:
                place = int(self.rng.integers(self.size))
                image, self.images[place] = self.images[place].to(image.device), image  # those of a checkpoint come on the CPU
            given.append(image)
        return torch.stack(given).contiguous(memory_format=memory_format(batch.device))

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.images, self.rng.bit_generator.state = state_dict["images"], state_dict["rng"]


def _smooth_l1(result: torch.Tensor, sem: torch.Tensor) -> torch.Tensor:
    """L1 distance of micrographs, finest texture apart."""
    return F.l1_loss(F.avg_pool2d(result.float(), TEXTURE_PX, 1), F.avg_pool2d(sem, TEXTURE_PX, 1))


def _inversion(source: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Hinge on the correlation between the boundary-scale detail of input and output: positive once contrast turns round."""
    a, b = (_detail(x.float()).flatten(1) for x in (source, result))
    correlation = F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)
    return F.relu(POLARITY_MARGIN - correlation).mean()


def _detail(x: torch.Tensor) -> torch.Tensor:
    coarse = F.avg_pool2d(x, 4)
    return coarse - F.avg_pool2d(coarse, 5, 1, 2, count_include_pad=False)


def _least_squares(net: nn.Module, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    return 0.5 * ((net(real).float() - 1).square().mean() + net(fake).float().square().mean())


def _batch(morphologies: Sequence[Morphology], micrographs: Sequence[np.ndarray], config: TranslatorConfig,
           step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops of simulated pictures, with a surface, and of micrographs; the seed and the step alone decide which."""
    rng = np.random.default_rng([config.seed, step])
    pictures = []
    for i, window in _places([picture for picture, _ in morphologies], config, rng):
        turn = int(rng.integers(8))
        picture, labels = (dihedral(part[window], turn) for part in morphologies[i])
        pictures.append(_with_surface(picture, labels, rng))
    # micrographs are not turned: shading, shadows and scan-line noise have a direction
    return _to_tensor(pictures), _to_tensor([micrographs[i][window] for i, window in _places(micrographs, config, rng)])


def _places(images: Sequence[np.ndarray], config: TranslatorConfig, rng: np.random.Generator) -> list[tuple[int, tuple[slice, slice]]]:
    """Which image and which window of it, for every crop of a batch; every pixel is as likely as any other."""
    areas = np.array([image.size for image in images], float)
    chosen = rng.choice(len(images), config.batch, p=areas / areas.sum())
    return [(int(i), random_crop(images[i], config.crop, rng)) for i in chosen]


def _with_surface(picture: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture with a random surface on its grains, float32 in [0, 255]."""
    return np.clip(texture(picture.astype(np.float32), labels, SURFACE, rng), 0, 255)


def _large_enough(images: Sequence[np.ndarray], crop: int, what: str, key: str) -> list[np.ndarray]:
    kept = [image for image in images if min(image.shape) >= crop]
    if not kept:
        sizes = ", ".join(sorted({f"{w} x {h}" for h, w in (image.shape for image in images)})) or "none given"
        raise UserError(f"none of the {what} ({sizes} px) is as large as a crop of {crop} px; a smaller translator.crop"
                        + (f" or a larger {key}" if key != "translator.crop" else "") + " would be right")
    return kept


def _to_tensor(images: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)[:, None].astype(np.float32) / 127.5 - 1)


def _to_uint8(image: torch.Tensor) -> np.ndarray:
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def _pad(batch: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, slice]]:
    """Mirror the edges, so that the networks' zero padding stays out of sight, up to a multiple of 4."""
    height, width = batch.shape[-2:]
    margin = min(32, height - 1, width - 1)
    padded = F.pad(batch, (margin, margin + -(width + 2 * margin) % 4, margin, margin + -(height + 2 * margin) % 4), mode="reflect")
    return padded, (slice(margin, margin + height), slice(margin, margin + width))
