"""The configuration tree: every setting of the loop, typed, with its unit and its default.

A configuration file is exactly what ``zenml pipeline run -c`` takes; graincast's own settings stand under
``parameters: config:``. Unknown keys are refused with the nearest valid name.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from graincast.errors import UserError


class Section(BaseModel):
    """Base of every section: unknown keys refused, values frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class VirtualSem(Section):
    """Imaging physics of the virtual SEM; the effects are described in `graincast.microscope.virtual_sem`."""

    groove_depth_um: float = Field(0.19, ge=0, description="mean depth of the thermal grooves at grain boundaries, shoulder to root, um")
    groove_depth_spread: float = Field(
        0.55, ge=0,
        description="spread of that depth from boundary to boundary, standard deviation, fraction of the mean",
    )
    groove_width_um: float = Field(0.75, gt=0, description="width of the grooves, shoulder to shoulder, um")
    facet_tilt_deg: float = Field(4.0, ge=0, lt=45, description="tilt of the grains' surfaces, standard deviation in x and in y, degrees")
    roughness_um: float = Field(0.01, ge=0, description="roughness of the grains' surfaces, root mean square, um")
    roughness_length_um: float = Field(
        0.15, gt=0,
        description="correlation length of the roughness (standard deviation of the smoothing Gaussian), um",
    )
    topography: float = Field(0.5, ge=0, description="share of the 1/cos(tilt) law in the signal; 1 = pure secondary electrons")
    edge_brightening_um: float = Field(0.04, ge=0, description="extra signal per convex curvature of the surface (fraction of the mean per 1/um), um")
    shadowing: float = Field(0.8, ge=0, le=1, description="share of the electrons that are lost where the surface blocks their path")
    detector_azimuth_deg: float = Field(60.0, description="side on which the detector sits, degrees from +x (right) towards the image's top")
    detector_asymmetry: float = Field(0.6, ge=0, le=1, description="preference of the detector for electrons that start towards its side; 0 = none")
    shading: float = Field(0.10, ge=0, description="detector shading, difference between the sides of the field, fraction of the mean signal")
    channelling: float = Field(0.08, ge=0, description="spread (standard deviation) of the grains' channelling contrast, fraction of the mean signal")
    contamination: float = Field(6.0, ge=0, description="contamination spots per 1000 um2")
    contamination_radius_um: float = Field(0.25, gt=0, description="median radius of the contamination spots, um")
    contamination_darkening: float = Field(0.3, ge=0, le=1, description="signal lost in a contamination spot, fraction")
    probe_um: float = Field(0.045, ge=0, description="probe size (standard deviation of the Gaussian blur), um")
    drift_px: float = Field(1.5, ge=0, description="specimen drift over one frame, px; half of it before and half after the middle line")
    line_jitter_px: float = Field(0.3, ge=0, description="random shift of each scan line, standard deviation, px")
    line_gain: float = Field(0.01, ge=0, description="random gain of each scan line, standard deviation, fraction")
    charging: float = Field(
        -0.4,
        description="trails after bright features along the scan, fraction of the feature's excess over the mean; positive: bright, negative: dark",
    )
    charging_length_um: float = Field(1.0, gt=0, description="length over which a charging trail falls to 1/e, um")
    electrons: float = Field(150.0, gt=0, le=1e12, description="mean detected electrons a pixel; shot noise follows from it")
    detector_noise: float = Field(0.015, ge=0, description="electronic noise, standard deviation, fraction of full scale")
    gain: float = Field(0.85, gt=0, description="detector gain; 1 places the mean signal at mid scale")
    offset: float = Field(0.06, description="detector offset (brightness), fraction of full scale")


class VirtualSession(Section):
    """A session of the virtual SEM: micrographs with exact truth, written as a folder of TIFFs with an info bar."""

    micrographs: int = Field(8, ge=1, description="micrographs that the loop may see")
    held_out: int = Field(4, ge=0, description="further micrographs with masks that no stage sees before the evaluation")
    size: int = Field(512, ge=64, description="width and height of the imaged field, px (the info bar is added below)")
    pixel_size_um: float = Field(0.05, gt=0, description="pixel size, um")
    grain_diameter_um: float = Field(1.9, gt=0, description="mean equivalent grain diameter, um")
    area_spread: float = Field(
        0.5, ge=0, le=1,
        description="coefficient of variation of the grain areas before they relax",
    )
    sem: VirtualSem = VirtualSem()
    seed: int = Field(101, ge=0, lt=2**63, description="seed of grains and imaging")


class Session(Section):
    """Where the micrographs come from."""

    folder: str | None = Field(None, description="folder of micrographs (searched recursively) or one file; null takes the virtual SEM")
    masks: str | None = Field(
        None,
        description="folder of expert masks named like the micrographs (255 = boundary line), for the evaluation only; null: none",
    )
    virtual: VirtualSession = VirtualSession()


class Pores(Section):
    """Round holes that no grain can enter and that pin boundaries."""

    fraction: float = Field(0.0, ge=0, lt=1, description="share of the area that pores take; 0 = none")
    diameter: float = Field(0.15, gt=0, lt=1, description="mean diameter of the pores, fraction of that of the initial grains")


class Particles(Section):
    """Round particles of a second phase that no grain can enter and that pin boundaries."""

    fraction: float = Field(0.0, ge=0, lt=1, description="share of the area that particles of a second phase take; 0 = none")
    diameter: float = Field(0.15, gt=0, lt=1, description="mean diameter of the particles, fraction of that of the initial grains")
    grey: float = Field(0.95, ge=0, le=1, description="grey level of the particles, fraction of full scale")


class Simulate(Section):
    """The phase-field grain simulator."""

    translator_structures: int = Field(16, ge=1, description="morphologies the translator learns from")
    synthetic_structures: int = Field(96, ge=1, description="unseen morphologies for the synthetic training set")
    validation_structures: int = Field(
        8, ge=2, description="unseen morphologies for the held-out synthetic set: every other one chooses the weights, the rest are only scored"
    )
    size: int = Field(320, ge=32, description="width and height of a morphology, px")
    depth: int | None = Field(
        None, ge=32,
        description="depth of a periodic volume, px, in which grains grow in three dimensions; morphologies are then slices through it, "
                    "about a grain apart (needs area_spread: null); null: growth in the plane",
    )
    pixel_size_um: float | None = Field(None, gt=0, description="pixel size, um, kept with the morphologies; null: none")
    grains: int = Field(64, ge=2, description="grains a morphology (or a volume) starts with")
    grain_diameter_um: float | None = Field(
        None, gt=0,
        description="mean grain diameter at the end, um, instead of `grains`; needs pixel_size_um; null: `grains` decides",
    )
    regularity: float = Field(
        0.5, ge=0, le=0.9,
        description="least distance of the grains' seeds, fraction of that in the densest lattice; 0 = random, 0.9 = nearly hexagons",
    )
    area_spread: float | None = Field(
        0.9, ge=0, le=1,
        description="coefficient of variation of the initial grain areas (lognormal); null: as the seeds give, 0.53 at regularity 0, "
                    "0.31 at 0.5, 0.1 at 0.9",
    )
    coarse_share: float = Field(0.0, ge=0, lt=1, description="share of the area that coarse grains take, for bimodal sizes; 0 = none")
    coarse_ratio: float = Field(10.0, gt=1, description="mean area of the coarse grains by that of the others")
    elongation: float = Field(1.0, ge=1, le=5, description="length of the initial grains by their width; 1 = equiaxed")
    elongation_deg: float = Field(0.0, description="direction in which they are long, degrees from +x (right) towards the image's top")
    boundary_anisotropy: float = Field(
        1.0, ge=1, le=2,
        description="largest by smallest energy of a boundary, which depends on its direction; 1 = isotropic",
    )
    boundary_anisotropy_deg: float = Field(
        0.0, description="direction of the boundaries of smallest energy, degrees from +x (right) towards the image's top"
    )
    pores: Pores = Pores()
    particles: Particles = Particles()
    steps: int = Field(600, ge=0, description="time steps of the Allen-Cahn evolution")
    time_step: float = Field(0.1, gt=0, description="time step, in units of 1/L (grid spacing 1 px, kappa 1)")
    grey_spread: float = Field(0.08, ge=0, le=0.5, description="spread (standard deviation) of the grains' grey levels, fraction of full scale")
    boundary_fading: float = Field(0.8, ge=0, le=1, description="largest share of its darkness that a boundary loses; drawn for each anew")
    boundary_level: float = Field(0.75, gt=0, lt=1, description="pixels where phi = sum eta^2 lies below this are boundary")
    device: str = Field("cpu", description="cpu, or where structures grow in batches: auto (CUDA when it is there), cuda or cuda:N")
    seed: int = Field(0, ge=0, lt=2**63, description="seed; structure k of the library depends on (seed, k) alone")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.grain_diameter_um and not self.pixel_size_um:
            raise ValueError("simulate.grain_diameter_um is set without simulate.pixel_size_um, which it is measured with")
        if self.depth and self.grain_diameter_um:
            raise ValueError("simulate.grain_diameter_um is set for a volume (simulate.depth), where simulate.grains would be right")
        return self


class Ingest(Section):
    """Reading and preparing real micrographs."""

    pixel_size_um: float | None = Field(None, gt=0, description="pixel size in um of files whose metadata has none; null: unknown")
    require_pixel_size: bool = Field(False, description="refuse files without a known pixel size")
    cut_info_bar: bool = Field(True, description="find and cut the instrument's info bar")
    scale: float | None = Field(None, gt=0, description="resampling factor (output px per input px) of every file; null: chosen from the images")
    clahe_clip: float = Field(0.0, ge=0, le=1, description="clip limit of the contrast-limited histogram equalisation; 0 switches it off")
    clahe_tile_grains: float = Field(4.0, gt=0, description="tile of the histogram equalisation, in grain diameters")
    min_size: int = Field(64, ge=16, description="smallest width and height after cutting and resampling, px")
    max_saturated: float = Field(0.5, ge=0, le=1, description="largest fraction of pixels at either end of the grey scale")
    min_contrast: float = Field(0.01, ge=0, le=1, description="smallest 1 to 99 % grey-level range, fraction of full scale")


class Translator(Section):
    """The CycleGAN between simulation and SEM (Zhu et al. 2017)."""

    steps: int = Field(300, ge=1, description="optimiser steps of generators and discriminators")
    batch: int = Field(4, ge=1, description="crops a step")
    crop: int = Field(128, ge=32, multiple_of=8, description="crop side, px")
    filters: int = Field(16, ge=4, description="filters of the generators' first layer")
    residual_blocks: int = Field(3, ge=0, description="residual blocks of each generator")
    learning_rate: float = Field(4e-4, gt=0, description="Adam learning rate of generators and discriminators")
    decay_from: float = Field(0.5, ge=0, le=1, description="fraction of the steps after which the learning rate falls linearly to 0")
    cycle_weight: float = Field(10.0, ge=0, description="weight of the cycle-consistency losses")
    identity_weight: float = Field(2.0, ge=0, description="weight of the identity losses")
    polarity_weight: float = Field(1.0, ge=0, description="weight of the guard against contrast inversion")
    pool: int = Field(50, ge=0, description="images in the history pool that feeds the discriminators; 0: none")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of initial weights, crops and noise")
    device: str = Field("auto", description="auto (CUDA when it is there), cpu, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 autocast where the processor has it in hardware")


class Synthesise(Section):
    """Drawing the labelled synthetic set."""

    copies: int = Field(1, ge=1, description="translations drawn from each morphology, with different noise")
    min_fidelity: float = Field(0.5, ge=-1, le=1, description="label fidelity below which a translated image is dropped")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the noise that the translator adds")


class Augment(Section):
    """Augmentation that imitates other specimens and other microscopes; every effect is drawn anew for every crop."""

    warp: float = Field(
        0.2, ge=0, le=0.3, description="largest displacement that bends boundaries (standard deviation), fraction of the length over which it changes"
    )
    relief: float = Field(0.12, ge=0, le=1, description="largest tilt and doming of the grains, fraction of full scale from middle to edge")
    tones: float = Field(0.3, ge=0, le=1, description="largest darkening of grains that lie deep, fraction of full scale")
    mottle: float = Field(0.05, ge=0, le=1, description="largest texture at each of four lengths (standard deviation), fraction of full scale")
    veins: float = Field(0.08, ge=0, le=1, description="largest contrast of curved lines that are no boundaries, fraction of full scale")
    specks: float = Field(0.5, ge=0, le=1, description="largest contrast of specks, bright or dark, fraction of full scale")
    scratches: float = Field(0.2, ge=0, le=1, description="largest contrast of straight scratches, bright or dark, fraction of full scale")
    gamma: float = Field(1.5, ge=1, description="largest change of the grey scale's exponent, either way")
    gain: float = Field(0.25, ge=0, le=1, description="largest relative change of contrast")
    offset: float = Field(0.10, ge=0, le=1, description="largest change of brightness, fraction of full scale")
    blur_px: float = Field(1.2, ge=0, description="largest Gaussian blur (standard deviation), px")
    noise: float = Field(0.06, ge=0, description="largest shot noise at mid grey (standard deviation), fraction of full scale")
    line_noise: float = Field(0.02, ge=0, description="largest scan-line noise (standard deviation), fraction of full scale")
    zoom: float = Field(1.35, ge=1, description="largest change of scale, either way")


class Segmenter(Section):
    """The U-Net and its training."""

    architecture: str = Field("Unet", description="decoder, a segmentation-models-pytorch architecture")
    encoder: str = Field("resnet18", description="encoder, a segmentation-models-pytorch encoder")
    encoder_weights: str | None = Field(None, description="pretrained encoder weights, e.g. imagenet (needs a network); null: from scratch")
    epochs: int = Field(20, ge=1, description="epochs at most; an epoch sees every synthetic image once")
    crops_per_image: int = Field(1, ge=1, description="random crops drawn from each image an epoch")
    batch: int = Field(8, ge=1, description="crops a step")
    crop: int = Field(128, ge=64, multiple_of=32, description="crop side, px")
    learning_rate: float = Field(1e-3, gt=0, description="Adam learning rate at its highest")
    patience: int = Field(8, ge=1, description="epochs without a better validation loss before training stops")
    augment: Augment = Augment()
    seed: int = Field(0, ge=0, lt=2**63, description="seed of initial weights, crops and augmentation")
    device: str = Field("auto", description="auto (CUDA when it is there), cpu, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 autocast where the processor has it in hardware")


class Evaluate(Section):
    """Measuring the segmenter."""

    overlays: int = Field(4, ge=0, description="overlay figures a set")
    baseline_window: int = Field(51, ge=3, description="window of the classical baseline's local threshold, px of the original image")
    baseline_sigma: float = Field(1.5, ge=0, description="Gaussian smoothing before the classical baseline's threshold, px")
    require_plausible: bool = Field(True, description="register only a segmenter whose result on the unlabelled micrographs makes sense")


class Gates(Section):
    """What data must fulfil before anything is made of them; checked by `graincast.store.gates`."""

    least_good_images: int = Field(1, ge=1, description="images of a session that must pass, or the session fails")
    least_good_share: float = Field(0.5, ge=0, le=1, description="share of a session's files that must pass, or the session fails")
    most_images: int = Field(1000, ge=1, description="files that a session may hold, or it is refused as a whole")
    require_pixel_size: bool = Field(False, description="quarantine images without a known pixel size; else they are told and lengths stay in pixels")
    min_pixel_size_um: float = Field(0.0005, gt=0, description="smallest believable pixel size, um")
    max_pixel_size_um: float = Field(10.0, gt=0, description="largest believable pixel size, um")
    min_side_px: int = Field(64, ge=16, description="smallest width and height of what was imaged, px, before resampling")
    min_bit_depth: int = Field(8, ge=1, le=16, description="fewest bits a sample in the file")
    max_saturated: float = Field(0.4, ge=0, le=1, description="largest fraction of pixels at either end of the grey scale")
    min_contrast: float = Field(0.05, ge=0, le=1, description="smallest 1 to 99 % grey-level range, fraction of full scale")
    max_noise: float = Field(0.2, ge=0, le=1, description="largest standard deviation of noise, fraction of full scale")
    min_signal_to_noise: float = Field(1.2, ge=0, description="smallest standard deviation of grey over that of noise")
    min_focus: float = Field(
        0.35, ge=0, le=1,
        description="smallest sharpness of the prepared image at its grains' scale, 0 blurred to 1 (graincast.microscope.quality.focus)",
    )
    few_grains: int = Field(10, ge=0, description="grains in a field below which its grain size is told to be uncertain; it is not quarantined")
    min_grains: int = Field(3, ge=1, description="fewest grains in a simulated or synthetic field")
    min_boundary_share: float = Field(0.01, ge=0, le=1, description="smallest share of boundary pixels in a label map")
    max_boundary_share: float = Field(0.4, ge=0, le=1, description="largest share of boundary pixels in a label map")
    max_size_ratio: float = Field(
        1.5, ge=1,
        description="largest ratio, either way, of a set's mean grain diameter to what the micrographs themselves suggest",
    )
    max_dropped_share: float = Field(0.5, ge=0, le=1, description="largest share of translated images dropped for their label fidelity")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("pixel_size_um", "boundary_share"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low >= high:
                raise ValueError(f"gates.min_{name} {low:g} is not below gates.max_{name} {high:g}; a smaller one would be right")
        return self


class Promotion(Section):
    """When a challenger becomes the champion; decided by `graincast.evaluate.promotion`."""

    min_ap50: float = Field(0.5, ge=0, le=1, description="least AP50 on every labelled set of the benchmark, for the first model too")
    min_stability: float = Field(
        0.5, ge=0, le=1,
        description="least AP50 of the grains found in slightly changed micrographs against those found before, for the first model too",
    )
    margin: float = Field(0.01, ge=0, le=1, description="least gain of AP50, or of the label-free score where that decides, over the champion")
    old_look_loss: float = Field(0.02, ge=0, le=1, description="largest loss of AP50 on a labelled set of the champion's own look")
    label_free_loss: float = Field(0.05, ge=0, le=1, description="largest loss of the label-free score on a set of unlabelled micrographs")
    fields: str | None = Field(
        None, description="folder of labelled fields of your own, images/ and masks/ with the same names, that promotions are measured on; null: none"
    )
    images: int = Field(8, ge=1, description="images of each set that are scored, at most")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the noise by which micrographs are slightly changed")


class Drift(Section):
    """When a session has left what the champion learned from; decided by `graincast.monitor.drift`."""

    false_alarm_rate: float = Field(0.02, gt=0, lt=0.5, description="share of in-control sessions that may be called drift")
    patch: int = Field(64, ge=16, description="side of the patches that images are described by, px of the prepared image")
    session_spread: float = Field(
        0.5, ge=0,
        description="how much in-control sessions differ, in standard deviations between the images of one, expected until the reference's "
                    "own sessions tell",
    )
    strong: float = Field(2.0, ge=1, description="score, in units of its threshold, from which on drift is strong")
    size_ratio: float = Field(1.2, ge=1, description="ratio of grain sizes, either way, from which on size is the cause")
    foreign_share: float = Field(0.9, gt=0, le=1, description="share of patches outside the synthetic manifold from which on images are foreign")
    mixed_spread: float = Field(
        2.0, ge=1,
        description="spread between a session's images, in units of that of the reference's sessions (the descriptors' median), from which on "
                    "they have no look in common: up to 1.7 on virtual sessions of one changed look",
    )
    fewest_images: int = Field(
        3, ge=1, description="images that a session needs for its look to be learned anew: what one alone shows may be its own"
    )
    resamples: int = Field(300, ge=50, description="parts of the reference judged against its rest, for each size of session, to calibrate")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the resampling")


class Monitoring(Section):
    """The loop over sessions that arrive in an inbox."""

    inbox: str | None = Field(None, description="folder in which every sub-folder is a session of micrographs; null: none")
    settle_seconds: float = Field(
        60.0, ge=0, description="a session is whole when nothing in its folder has changed for so long, s; longer where copies stall"
    )
    attempts: int = Field(3, ge=1, description="failures after which a session is set aside, with its reason")
    crashes: int = Field(10, ge=1, description="processes that may die over a session (killed, out of memory) before it is set aside")
    every_seconds: float = Field(300.0, ge=1, description="time from the start of one run of `graincast watch` to the next, s, where cron is null")
    cron: str | None = Field(None, description="when to run, as five fields of cron in local time, e.g. 0 6 * * 1-5; null: every_seconds decides")
    grace_seconds: float = Field(60.0, ge=0, description="time a running pipeline gets to end when `graincast watch` is told to stop, s")
    recalibrate: bool = Field(True, description="re-learn the look of a session that has drifted in a way that re-learning can mend")


class Recalibration(Section):
    """Re-learning a look that changed, from the champion on."""

    translator_steps: int = Field(100, ge=1, description="optimiser steps of the translator, which starts from the champion's")
    translator_learning_rate: float = Field(4e-4, gt=0, description="Adam learning rate of its generators and discriminators")
    segmenter_epochs: int = Field(
        4, ge=1,
        description="epochs at most of the segmenter, which starts from the champion's; an epoch sees every image of the new look once",
    )
    segmenter_learning_rate: float = Field(1e-3, gt=0, description="Adam learning rate at its highest, in these epochs")
    replay: float = Field(
        1.0, ge=0,
        description="images of the old looks for each of the new that the segmenter sees, lest it forget the old; 0: none",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of crops, noise, augmentation and of which old images are seen again")


class Config(Section):
    """The whole tree."""

    session: Session = Session()
    simulate: Simulate = Simulate()
    ingest: Ingest = Ingest()
    translator: Translator = Translator()
    synthesise: Synthesise = Synthesise()
    segmenter: Segmenter = Segmenter()
    evaluate: Evaluate = Evaluate()
    gates: Gates = Gates()
    promotion: Promotion = Promotion()
    drift: Drift = Drift()
    monitoring: Monitoring = Monitoring()
    recalibration: Recalibration = Recalibration()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        for name, crop in (("translator", self.translator.crop), ("segmenter", self.segmenter.crop)):
            if crop > self.simulate.size:
                raise ValueError(f"{name}.crop {crop} is larger than simulate.size {self.simulate.size}; a smaller crop would be right")
        if self.session.masks and self.session.folder is None:
            raise ValueError("session.masks is set without session.folder; the folder of the micrographs would be right beside it")
        return self


def parse_config(values: dict[str, Any] | None, source: str = "config") -> Config:
    """Check a configuration mapping.

    Parameters
    ----------
    values : dict or None
        The tree under ``parameters: config:``; missing keys take their defaults.
    source : str
        Name of the file, for messages.

    Returns
    -------
    Config

    Raises
    ------
    UserError
        For an unknown key (naming the nearest valid one) or a value of the wrong type or range.
    """
    try:
        return Config.model_validate(values or {})
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_explain(e) for e in error.errors())) from None


def load_config(path: Path | str) -> Config:
    """Read the configuration of a ``zenml pipeline run -c`` file.

    Raises
    ------
    UserError
        If the file is missing, no YAML, has no ``parameters: config:`` tree, or `parse_config` refuses it.
    """
    try:
        document = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a YAML configuration: {error}") from error
    try:
        tree = document["parameters"]["config"]
    except (KeyError, TypeError):
        raise UserError(f"{path} has no 'parameters: config:' section; configs/demo.yaml shows one") from None
    return parse_config(tree, str(path))


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location) or "config"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] != "extra_forbidden":
        return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
    section: Any = Config
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    valid = list(section.model_fields)
    nearest = difflib.get_close_matches(location[-1], valid, 1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"valid keys are {', '.join(valid)}"
    return f"unknown key '{key}', {hint}"
