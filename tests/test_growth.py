"""Grain growth through the microscope: the fit and its intervals, unbiased sizes, a look that holds, a real small run, bad input."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from scipy import ndimage as ndi

from graincast import growth
from graincast.cli import main
from graincast.config import Segmenter as SegmenterConfig
from graincast.config import Simulate
from graincast.errors import UserError
from graincast.kinetics import Kinetics, Sizes, difference, fit_kinetics
from graincast.microscope.preparation import Preparation
from graincast.segment.instances import Cut
from graincast.segment.network import build_network
from graincast.segment.segmenter import Segmenter
from graincast.segment.train import train_segmenter
from graincast.simulate import structure
from graincast.store import registry, tracking, versioning
from graincast.synthesise.cyclegan.model import Generator
from graincast.synthesise.cyclegan.train import CycleGAN
from graincast.synthesise.tones import Tones

GRAIN_PX = 24.0
STEPS = (600, 800, 1000, 1300, 1600)
"""From twice to four times the mean area at the start, of grains that start with 12 px across."""
SIMULATE = Simulate(time_step=0.15, pixel_size_um=0.1)


def make_translator(width: float = 0.0) -> CycleGAN:
    """An untrained one, which hands the picture on with some noise and surface."""
    torch.manual_seed(0)
    nets = [Generator(4, 1, noise=noise) for noise in (True, False)]
    for net in nets:
        net.initialise()
        net.noise_level.fill_(0.08)
    return CycleGAN(nets[0].eval(), nets[1].eval(), Tones(width, 0.5, np.arange(256, dtype=np.uint8)), False,
                    {"filters": 4, "residual_blocks": 1})


@pytest.fixture(scope="module")
def translator() -> CycleGAN:
    return make_translator()


PREPARATION = Preparation(None, 1.0, GRAIN_PX, 0.0, 96.0, False, 32, 0.5, 0.01, None)


@pytest.fixture(scope="module")
def untrained() -> Segmenter:
    """Knows what size its grains have and nothing else."""
    settings = SegmenterConfig(encoder="mobilenet_v2", device="cpu")
    network = build_network(settings.architecture, settings.encoder, None)
    return Segmenter(network, Cut(20), settings.model_dump(), PREPARATION)


@pytest.fixture(scope="module")
def segmenter(translator: CycleGAN) -> Segmenter:
    """Trained for some seconds on what the translator makes of grains of that size."""
    config = Simulate(size=128, grains=45, steps=500)
    pairs = []
    for index in range(18):
        picture, labels = structure.simulate_structure(config, index)
        pairs.append((translator.to_sem(picture, labels, index), labels))
    settings = SegmenterConfig(encoder="resnet18", epochs=4, crops_per_image=2, batch=4, crop=64, learning_rate=1e-3, device="cpu")
    trained = train_segmenter(pairs[:16], pairs[16:], settings)
    trained.preparation = PREPARATION
    return trained


# The fit


def made(exponent: float, rng: np.random.Generator, scatter: float, blocks: int = 25) -> tuple[np.ndarray, Sizes]:
    """Times and sizes of blocks that follow the law from R = 16 to 32, each off by errors that last for several times."""
    times = np.linspace(300, 2400, 14)
    radius = (16**exponent + (32**exponent - 16**exponent) * (times - 300) / 2100) ** (1 / exponent)
    off = np.empty((blocks, len(times)))
    off[:, 0] = rng.standard_normal(blocks)
    for i in range(1, len(times)):
        off[:, i] = 0.9 * off[:, i - 1] + np.sqrt(1 - 0.9**2) * rng.standard_normal(blocks)
    count = np.maximum(rng.poisson(13 * (32 / radius) ** 2, off.shape), 1).astype(float)
    diameter = 2 * radius * (1 + scatter * off)
    return times, Sizes(count, count * diameter, count * diameter**2 * 1.2)


@pytest.mark.parametrize("exponent", [1.5, 2.0, 3.0, 4.0])
def test_the_law_itself_is_found_again(exponent: float) -> None:
    times, sizes = made(exponent, np.random.default_rng(0), 0.0)
    fit = fit_kinetics(times, sizes)
    assert fit.exponent.value == pytest.approx(exponent, abs=1e-3)
    assert fit.exponent.high - fit.exponent.low < 1e-2
    assert fit.initial_radius == pytest.approx(16, rel=1e-3)
    assert fit.rate == pytest.approx((32**exponent - 16**exponent) / 2100, rel=5e-3)
    assert fit.r_squared == pytest.approx(1, abs=1e-6)
    if exponent == 2:
        assert fit.ideal_rate.value == pytest.approx((32**2 - 16**2) / 2100, rel=1e-3)
        assert fit.ideal_initial_radius.value == pytest.approx(16, rel=1e-3)
    else:
        assert fit.ideal_r_squared < fit.r_squared - 1e-5


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of the errors that a mean of the same grains at all times has; least squares' own intervals would be far too narrow."""
    rng = np.random.default_rng(1)
    rate = (32**2 - 16**2) / 2100
    fits = [fit_kinetics(*made(2.0, rng, 0.08)) for _ in range(50)]
    held = {"exponent": np.mean([fit.exponent.low <= 2 <= fit.exponent.high for fit in fits]),
            "rate": np.mean([fit.ideal_rate.low <= rate <= fit.ideal_rate.high for fit in fits])}
    assert all(0.86 <= share <= 1 for share in held.values()), held  # 0.95 within three standard errors of 50 trials
    width = np.mean([fit.exponent.high - fit.exponent.low for fit in fits])
    assert width == pytest.approx(2 * 1.96 * np.std([fit.exponent.value for fit in fits]), rel=0.3), "no wider than need be"
    late = np.log(made(2.0, rng, 0.0)[0][-1] / 300)
    assert np.mean([fit.log_slope.value for fit in fits]) == pytest.approx(np.log(2) / late, rel=0.1)


def test_the_difference_of_two_fits_leaves_out_what_both_have_in_common() -> None:
    times, sizes = made(2.0, np.random.default_rng(2), 0.08)
    bigger = Sizes(sizes.count, 1.02 * sizes.total, 1.02**2 * sizes.squares)
    one, other = fit_kinetics(times, sizes), fit_kinetics(times, bigger)
    found = difference(other, one, "ideal_rate")
    assert found.value == pytest.approx((1.02**2 - 1) * one.ideal_rate.value, rel=1e-6)
    assert found.high - found.low < 0.1 * (one.ideal_rate.high - one.ideal_rate.low)
    assert difference(other, one, "exponent").value == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda times: times[:3], r"3 times; at least 4 would be right"),
    (lambda times: times[::-1], "have to rise"),
    (lambda times: times - times[0], "after 0"),
])
def test_times_that_tell_no_kinetics_are_refused(change: Callable[[np.ndarray], np.ndarray], sentence: str) -> None:
    times, sizes = made(2.0, np.random.default_rng(0), 0.0)
    times = change(times)
    with pytest.raises(UserError, match=sentence):
        fit_kinetics(times, sizes.at(np.arange(len(times))))


# Sizes


def test_grains_that_the_border_of_the_periodic_field_cuts_count_once_and_whole() -> None:
    dense = structure.draw_start(Simulate(size=160, grains=40), 0).labels
    for shift in (0, 53):
        count, total, squares = growth.periodic_sizes(np.roll(dense, shift, (0, 1))).sum(axis=1)
        areas = np.bincount(dense.ravel())[1:]
        assert count == 40
        assert total == pytest.approx((2 * np.sqrt(areas / np.pi)).sum())
        assert squares == pytest.approx(4 / np.pi * 160**2)


def test_what_the_border_cuts_does_not_bias_the_mean() -> None:
    """Windows five grains wide: uncut grains alone are 5 % too small on average, weighted ones are not."""
    dense = structure.draw_start(Simulate(size=800, grains=2560), 0).labels
    true = growth.periodic_sizes(dense).sum(axis=1)
    weighted, plain = np.zeros(3), []
    for row in range(0, 800, 80):
        for column in range(0, 800, 80):
            _, window = np.unique(dense[row : row + 80, column : column + 80], return_inverse=True)
            window = window.reshape(80, 80).astype(np.int32) + 1
            weighted += growth.visible_sizes(window).sum(axis=1)
            uncut = np.setdiff1d(window, np.concatenate([window[0], window[-1], window[:, 0], window[:, -1]]))
            plain.append(2 * np.sqrt(np.bincount(window.ravel())[uncut] / np.pi))
    wanted = true[1] / true[0]
    assert weighted[1] / weighted[0] == pytest.approx(wanted, rel=0.01)
    assert np.concatenate(plain).mean() < 0.97 * wanted
    assert weighted[0] == pytest.approx(true[0], rel=0.02), "the weights add up to the number of grains"
    assert growth.visible_sizes(np.ones((20, 20), np.int32)).sum() == 0


# The look


@pytest.fixture(scope="module")
def frames(translator: CycleGAN, untrained: Segmenter) -> list[structure.Frame]:
    config, steps = growth.plan(SIMULATE, translator, untrained, STEPS, 256)
    return growth.simulate_series(config, steps)


def test_ids_to_draw_by_stay_and_the_parts_of_a_grain_have_their_own(frames: list[structure.Frame]) -> None:
    ids = growth.drawn_ids([frame.labels for frame in frames])
    assert len({int(drawn.max()) for drawn in ids}) == 1, "the highest one lives throughout"
    for frame, drawn in zip(frames, ids, strict=True):
        assert ((drawn == 0) == (frame.labels == 0)).all()
        boxes = [box for box in ndi.find_objects(drawn) if box]
        assert max(side.stop - side.start for box in boxes for side in box) < 128, "none reaches from border to border"
        pairs = np.unique(np.stack([drawn, frame.labels])[:, drawn > 0], axis=1)
        assert len(np.unique(pairs[0])) == pairs.shape[1], "no id is of two grains"
        assert len(pairs[0]) > len(np.unique(pairs[1])), "the border cuts some"
    for early, late, drawn, then in zip(frames, frames[1:], ids, ids[1:], strict=False):
        same = (early.labels == late.labels) & (early.labels > 0)
        assert (drawn[same] == then[same]).mean() > 0.99  # all but a grain that leaves the side where it was seen first


def test_the_border_looks_like_the_middle(frames: list[structure.Frame]) -> None:
    """A grain tilted about a centre on the other side of the field would be white or black."""
    for seed in range(3):
        image = next(growth.translate_series(frames, make_translator(), seed)).astype(float)
        edge = np.ones(image.shape, bool)
        edge[12:-12, 12:-12] = False
        assert image[edge].std() < 1.2 * image[~edge].std()


@pytest.mark.parametrize("width", [0.0, 3.0])
def test_what_does_not_change_looks_the_same_in_all_frames(frames: list[structure.Frame], width: float) -> None:
    held = make_translator(width)
    for seed in range(3):  # each draws other kinds of surface
        series = [image.astype(float) for image in itertools.islice(growth.translate_series(frames, held, seed), 2)]
        settled = ndi.binary_erosion((frames[0].labels == frames[1].labels) & (frames[0].labels > 0), iterations=5)
        assert settled.sum() > 500
        moved = (series[1] - series[0])[settled]
        assert abs(moved.mean()) < 0.5
        assert moved.std() < 0.15 * series[0][settled].std()
        assert np.corrcoef(series[0][settled], series[1][settled])[0, 1] > 0.98
    other = next(growth.translate_series(frames[1:], held, 99)).astype(float)
    assert np.corrcoef(series[0][settled], other[settled])[0, 1] < 0.97, "another seed is another surface"


def test_wide_boundaries_vary_by_place_and_not_by_frame(frames: list[structure.Frame]) -> None:
    tones = Tones(3.0, 1.0, np.arange(256, dtype=np.uint8))

    def change(tones: Tones) -> float:
        early, late = (tones.apply(frame.picture, frame.labels).astype(float) for frame in frames[:2])
        same = (frames[0].labels > 0) & ndi.binary_erosion(frames[0].labels == frames[1].labels, iterations=4)
        return float(np.abs(late - early)[same].mean())

    assert change(replace(tones, place=0)) < 0.5 * change(tones)


# A real small run


def lay_out(run: Path, translator: CycleGAN, segmenter: Segmenter) -> Path:
    """The models in a folder as a training run leaves them."""
    for name, model in (("translator", translator), ("segmenter", segmenter)):
        (run / f"train_{name}" / name).mkdir(parents=True)
        model.save(run / f"train_{name}" / name)
    return run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, translator: CycleGAN, untrained: Segmenter) -> Path:
    return lay_out(tmp_path_factory.mktemp("run"), translator, untrained)


def command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["graincast", "growth", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_a_series_from_the_command_line(translator: CycleGAN, segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    run = lay_out(tmp_path / "run", translator, segmenter)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"parameters": {"config": {"simulate": {"time_step": 0.15, "pixel_size_um": 0.1}}}}))
    out = tmp_path / "growth"
    assert command(monkeypatch, "--out", out, "--run", run, "-c", tmp_path / "c.yaml", "--frames", ",".join(map(str, STEPS)), "--size", "256") == 0
    assert "ideal rate" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["growth.csv", "growth.gif", "growth.json", "growth.png"]
    table = pd.read_csv(out / "growth.csv")
    assert list(table["step"]) == list(STEPS)
    assert table["time_per_mobility"].tolist() == pytest.approx([0.15 * step for step in STEPS])
    assert table["true_grains"].is_monotonic_decreasing
    assert table["true_mean_diameter_um"].is_monotonic_increasing
    assert table["fitted"].sum() >= 4
    # a network of some seconds' training finds most grains
    assert table["ap50"].mean() > 0.4
    assert (table["segmented_mean_diameter_um"] / table["true_mean_diameter_um"]).to_numpy() == pytest.approx(1, abs=0.25)
    seen = 100 * (table["segmented_grains"] / table["true_grains_in_view"] - 1)
    assert np.abs(seen - table["count_error_percent"]).max() < 12  # specks apart
    told = json.loads((out / "growth.json").read_text())
    assert (told["length_unit"], told["fitted_steps"], told["doubt"]) == ("um", table["step"][table["fitted"]].tolist(), None)
    slope, high = (np.polyfit(table["time_per_mobility"], (table["true_mean_diameter_um"] / 2) ** 2, 1)[0], told["true"]["ideal_rate"]["high"])
    assert told["true"]["ideal_rate"]["value"] == pytest.approx(slope, rel=0.2)
    assert told["true"]["ideal_rate"]["low"] < slope < high
    assert {"exponent", "ideal_rate", "log_slope"} == set(told["segmented_less_true"])
    with Image.open(out / "growth.gif") as animation:
        assert animation.n_frames == len(STEPS)
    with Image.open(out / "growth.png") as figure:
        assert min(figure.size) > 800


def test_a_series_without_a_scaling_regime_says_so_and_is_kept(translator: CycleGAN, untrained: Segmenter, tmp_path: Path) -> None:
    found = growth.growth_of(translator, untrained, SIMULATE, tmp_path / "out", frames=[50, 60, 70, 80], size=96)
    assert not found.fits
    assert "0 frames lie in the scaling regime" in str(found.doubt)
    assert json.loads((tmp_path / "out" / "growth.json").read_text())["doubt"] == found.doubt
    assert len(pd.read_csv(tmp_path / "out" / "growth.csv")) == 4


@pytest.mark.slow
def test_the_champion_comes_with_the_translator_that_it_was_made_with(models: Path, translator: CycleGAN, untrained: Segmenter, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    before = mlflow.get_tracking_uri()
    versioning.initialise(tmp_path)
    monkeypatch.setenv("GRAINCAST_ROOT", str(tmp_path))
    made = tmp_path / "made"
    made.mkdir()
    translator.save(made)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        with pytest.raises(UserError, match="none yet, train one"):
            growth.load_models()
        mlflow.set_experiment(experiment_id=tracking.ensure_experiment())
        folder, example = models / "train_segmenter" / "segmenter", np.zeros((96, 96), np.uint8)
        with mlflow.start_run():
            registry.ensure_registered(folder, example, {"dvc.translator": versioning.add(made).md5})
        made_with, found = growth.load_models()
        assert torch.equal(made_with.forward.stem[0].weight, translator.forward.stem[0].weight)
        assert all(torch.equal(one, other) for one, other in zip(found.network.state_dict().values(), untrained.network.state_dict().values(),
                                                                 strict=True))
        registry.promote_by_hand(1, "test", by="test")
        assert growth.load_models("champion")[1].cut == growth.load_models("1")[1].cut == untrained.cut
        with pytest.raises(UserError, match="no version or alias '7'; registered: 1;"):
            growth.load_models("7")
        mlflow.MlflowClient().delete_model_version_tag(registry.MODEL, "1", "dvc.translator")
        with pytest.raises(UserError, match="carries no hash of its translator"):
            growth.load_models()
        assert not list((tmp_path / ".graincast").iterdir()), "nothing is left behind"
    finally:
        mlflow.set_tracking_uri(before)


# Bad input


@pytest.mark.parametrize(("words", "sentence"), [
    (("--frames", "1"), "1 frames tell no kinetics; at least 4"),
    (("--frames", "500,400,300,200"), "--frames 500,400,300,200: time steps that rise"),
    (("--frames", "0,400,500,600"), "time steps that rise, from 1 on"),
    (("--frames", "many"), "--frames many"),
    (("--model", "3"), "exclude each other"),
    (("--translator", "there"), "belong together"),
])
def test_bad_options_get_a_sentence(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                    words: tuple[str, ...], sentence: str) -> None:
    assert command(monkeypatch, "--out", tmp_path / "out", "--run", models, *words) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_translator_gets_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--out", tmp_path / "out", "--run", tmp_path) == 2
    assert "no trained translator lies in it" in capsys.readouterr().err


def test_a_segmenter_that_does_not_know_its_grain_size_gets_a_sentence(translator: CycleGAN, untrained: Segmenter) -> None:
    bare = Segmenter(untrained.network, untrained.cut, untrained.config)
    with pytest.raises(UserError, match="does not know its grain size"):
        growth.plan(SIMULATE, translator, bare)


def test_kinetics_are_json_able() -> None:
    fit: Kinetics = fit_kinetics(*made(2.0, np.random.default_rng(0), 0.05))
    assert json.loads(json.dumps(fit.to_dict()))["exponent"].keys() == {"value", "low", "high"}
