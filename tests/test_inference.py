"""Segmenting files: what is written, what is refused, and that results never become micrographs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from scipy import ndimage as ndi

from graincast.config import Gates
from graincast.errors import UserError
from graincast.inference import segment_files
from graincast.microscope.preparation import Preparation
from graincast.segment.instances import Cut
from graincast.segment.segmenter import Segmenter
from graincast.stages import _suggested_diameters, run_ingest_session, run_segment_session
from graincast.store.gates import read_grains

PREPARATION = Preparation(target_pixel_size_um=0.05, scale=1.0, grain_diameter_px=24.0, clahe_clip=0.01, clahe_tile_px=96.0,
                          cut_info_bar=False, min_size=64, max_saturated=0.5, min_contrast=0.01, default_pixel_size_um=None)


class DarkLines(torch.nn.Module):
    """The simplest segmenter there is: what is darker than the mean is a boundary; noise is averaged out, as any trained network does."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(4.0))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        smooth = torch.nn.functional.avg_pool2d(image, 5, stride=1, padding=2)
        return self.gain * torch.cat([-smooth - 0.5, smooth], dim=1)


@pytest.fixture
def segmenter() -> Segmenter:
    return Segmenter(DarkLines().eval(), Cut(30), {"precision": "float32"}, PREPARATION)


def micrograph() -> np.ndarray:
    """Sixteen square grains with dark lines between them, [0, 1]."""
    image = np.full((160, 160), 0.7)
    image[39::40] = image[:, 39::40] = 0.2
    noise = np.random.default_rng(0).normal(0, 0.01, image.shape)
    return (ndi.gaussian_filter(image, 1) + noise).clip(0, 1)


def write(path: Path, image: np.ndarray, full_scale: int = 255, dtype: type = np.uint8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, np.rint(full_scale * image).astype(dtype))
    return path


def test_results_of_a_file(segmenter: Segmenter, tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "a.tif", micrograph())
    outcome, = segment_files(segmenter, [source], tmp_path / "out", pixel_size_um=0.05)
    assert outcome.summary is not None
    labels = tifffile.imread(tmp_path / "out" / "a_labels.tif")
    assert labels.shape == (160, 160)
    assert labels.max() == outcome.summary["grains"] == len(pd.read_csv(tmp_path / "out" / "a_grains.csv")) >= 16
    assert iio.imread(tmp_path / "out" / "a_overlay.png").shape == (160, 160, 3)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["images"][0]["pixel_size_um"] == 0.05


def test_files_of_one_stem_in_a_session_are_told_apart(segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions have sub-folders and files that differ in the extension only; `graincast segment` keeps refusing them."""
    session, rng = tmp_path / "session", np.random.default_rng(2)
    for name in ("a/001.tif", "b/001.tif", "x.tif"):
        write(session / name, (micrograph() + rng.normal(0, 0.01, (160, 160))).clip(0, 1))
    iio.imwrite(session / "x.png", np.rint(255 * micrograph()).astype(np.uint8))
    preparation = replace(PREPARATION, usual_scale=1.0)
    segmenter.preparation = preparation
    images = run_ingest_session(preparation, session, tmp_path / "images", Gates())
    assert len(images) == 4

    monkeypatch.setattr(Segmenter, "load", lambda *_: segmenter)
    out = run_segment_session(Gates(), tmp_path, images, session, tmp_path / "out")
    ids = {"a_001", "b_001", "x_tif", "x_png"}
    assert {file.name.removesuffix("_grains.csv") for file in out.glob("*_grains.csv")} == ids
    assert {file.name.removesuffix("_labels.tif") for file in out.glob("*_labels.tif")} == ids
    found = json.loads((out / "summary.json").read_text())["images"]
    assert [image["file"] for image in found] == ["001.tif", "001.tif", "x.png", "x.tif"]
    assert all(image["grains"] == 16 for image in found)
    assert set(_suggested_diameters(images)) == ids == set(read_grains(out)["image_id"])

    with pytest.raises(UserError, match="several micrographs are called '001'"):
        segment_files(segmenter, [session], tmp_path / "all")
    with pytest.raises(UserError, match="several micrographs are called 'same'"):
        segment_files(segmenter, [session / "x.tif", session / "x.png"], tmp_path / "all", names=["same", "same"])
    with pytest.raises(ValueError, match="1 names for 2 files"):
        segment_files(segmenter, [session / "x.tif", session / "x.png"], tmp_path / "all", names=["one"])
    assert not (tmp_path / "all").exists()


def test_pixel_size_of_the_training_is_the_default(segmenter: Segmenter, tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "a.tif", micrograph())
    segmenter.preparation = replace(PREPARATION, default_pixel_size_um=0.04)
    for given, expected in ((None, 0.04), (0.06, 0.06)):
        outcome, = segment_files(segmenter, [source], tmp_path / "out", given)
        assert outcome.summary is not None
        assert outcome.summary["pixel_size_um"] == expected


def test_results_within_the_source_are_not_segmented_again(segmenter: Segmenter, tmp_path: Path) -> None:
    write(tmp_path / "a.tif", micrograph())
    for _ in range(2):
        assert [o.source.name for o in segment_files(segmenter, [tmp_path], tmp_path / "results")] == ["a.tif"]
    for source in (tmp_path, tmp_path / "a.tif"):
        with pytest.raises(UserError, match="another folder"):
            segment_files(segmenter, [source], tmp_path)
    assert not list(tmp_path.glob("*_labels.tif"))


def test_a_parent_of_the_source_may_take_the_results(segmenter: Segmenter, tmp_path: Path) -> None:
    write(tmp_path / "images" / "a.tif", micrograph())
    assert len(segment_files(segmenter, [tmp_path / "images"], tmp_path)) == 1


RNG = np.random.default_rng(1)
UNFIT = {
    "black": (np.zeros((160, 160)), "no contrast"),
    "constant": (np.full((160, 160), 0.5), "no contrast"),
    "saturated": (np.where(micrograph() > 0.5, 1, 0), "saturated"),
    "dot": (np.full((1, 1), 0.5), "too small"),
    "noise": (RNG.normal(0.5, 0.1, (200, 200)).clip(0, 1), "structureless"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_unfit_images_are_refused_without_folders_in_the_reason(segmenter: Segmenter, tmp_path: Path, kind: str) -> None:
    image, word = UNFIT[kind]
    write(tmp_path / "in" / f"{kind}.tif", image)
    (tmp_path / "in" / "text.png").write_text("no image")
    outcomes = {o.source.stem: o.refused for o in segment_files(segmenter, [tmp_path / "in"], tmp_path / "out")}
    assert word in str(outcomes[kind])
    assert "text.png cannot be read" in str(outcomes["text"])
    assert str(tmp_path) not in (tmp_path / "out" / "summary.json").read_text()
    assert not list((tmp_path / "out").glob("*.tif"))


@pytest.mark.parametrize(("pixel_size", "word"), [(0.31, "magnification too low"), (0.01, "too small")])
def test_unsuitable_magnifications_are_refused(segmenter: Segmenter, tmp_path: Path, pixel_size: float, word: str) -> None:
    outcome, = segment_files(segmenter, [write(tmp_path / "in" / "a.tif", micrograph())], tmp_path / "out", pixel_size)
    assert word in str(outcome.refused)


def test_twelve_bits_in_sixteen_are_segmented_and_shown_like_eight(segmenter: Segmenter, tmp_path: Path) -> None:
    write(tmp_path / "in" / "eight.tif", micrograph())
    write(tmp_path / "in" / "twelve.tif", micrograph(), 4095, np.uint16)
    eight, twelve = segment_files(segmenter, [tmp_path / "in"], tmp_path / "out")
    assert eight.summary is not None
    assert twelve.summary is not None
    assert twelve.summary["grains"] == eight.summary["grains"] == 16
    pictures = [iio.imread(tmp_path / "out" / f"{name}_overlay.png").astype(int) for name in ("eight", "twelve")]
    assert np.abs(pictures[0] - pictures[1]).mean() < 2
    assert pictures[1].max() > 200
