"""Segmenting files: what is written, what is refused, and that results never become micrographs."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from scipy import ndimage as ndi
from typer.testing import CliRunner

from graincast import inference
from graincast.cli import app
from graincast.config import Gates
from graincast.errors import UserError
from graincast.export.kinds import KINDS, USUAL, Segmented
from graincast.inference import segment_files
from graincast.microscope.preparation import Preparation
from graincast.microscope.reader import Micrograph, read_micrograph
from graincast.segment import tiled
from graincast.segment.confidence import FEATURES, Calibration
from graincast.segment.instances import Cut
from graincast.segment.segmenter import Segmenter, eager
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


def test_results_of_another_run_within_the_source_are_no_micrographs(segmenter: Segmenter, tmp_path: Path) -> None:
    write(tmp_path / "a.tif", micrograph())
    segment_files(segmenter, [tmp_path], tmp_path / "monday")
    write(tmp_path / "monday" / "late.tif", micrograph())
    assert [o.source.name for o in segment_files(segmenter, [tmp_path], tmp_path / "tuesday")] == ["a.tif", "late.tif"]
    with pytest.raises(UserError, match="tuesday holds nothing but results"):
        segment_files(segmenter, [tmp_path / "tuesday"], tmp_path / "wednesday")


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


# ------------------------------------------------------------------------------------------- folders, again and again


class Counted(DarkLines):
    """Counts its predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.times += 1
        return super().forward(image)


@pytest.fixture
def counted(segmenter: Segmenter) -> Segmenter:
    segmenter.network = Counted().eval()
    return segmenter


def predictions(segmenter: Segmenter) -> int:
    """How many since the last question."""
    times, segmenter.network.times = segmenter.network.times, 0
    return int(times)


def folder_of(count: int, folder: Path) -> Path:
    rng = np.random.default_rng(5)
    for number in range(count):
        write(folder / f"{number}.tif", (micrograph() + rng.normal(0, 0.01, (160, 160))).clip(0, 1))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_what_is_done_and_stands_is_not_done_again(counted: Segmenter, tmp_path: Path) -> None:
    source, out = folder_of(3, tmp_path / "in"), tmp_path / "out"
    first = segment_files(counted, [source], out, 0.05)
    assert predictions(counted) == 3
    before = contents(out)
    second = segment_files(counted, [source], out, 0.05)
    assert predictions(counted) == 0
    assert [outcome.before for outcome in first] == [False] * 3
    assert [outcome.before for outcome in second] == [True] * 3
    assert [outcome.summary for outcome in first] == [outcome.summary for outcome in second]
    after = contents(out)
    assert {name for name in before if before[name] != after[name]} == {"summary.json"}
    assert told(out)["done_before"] == 3
    assert told(out)["session"] == json.loads(before["summary.json"])["session"]


def test_a_name_that_cannot_be_printed_is_refused_and_shown(segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an old microscope's computer may write it, in Latin-1."""
    monkeypatch.setattr("graincast.store.registry.load_segmenter", lambda _: segmenter)
    source, out = folder_of(1, tmp_path / "in"), tmp_path / "out"
    write(source / "b.tif", micrograph()).rename(source / os.fsdecode("K\xf6rner.tif".encode("latin-1")))
    done = CliRunner().invoke(app, ["segment", str(source), "--out", str(out), "--export", "all"])
    assert done.exit_code == 1, done.output
    assert {image["file"]: image.get("refused") for image in told(out)["images"]} \
        == {"0.tif": None, "K\\udcf6rner.tif": "K\\udcf6rner.tif has a name that cannot be printed; another name would be right"}
    assert "K\\udcf6rner.tif" in Page((out / "report.html").read_text()).text


def test_a_page_shows_only_pictures_that_were_asked_for(counted: Segmenter, tmp_path: Path) -> None:
    source, out = folder_of(2, tmp_path / "in"), tmp_path / "out"
    segment_files(counted, [source], out, exports=[*USUAL, "report"])
    (out / "1_overlay.png").unlink()
    predictions(counted)
    assert [outcome.before for outcome in segment_files(counted, [source], out, exports=["csv", "report"])] == [True, True]
    assert predictions(counted) == 0
    assert "data:image/jpeg" not in (out / "report.html").read_text()


def spoil_file(source: Path, out: Path) -> None:
    write(source / "1.tif", np.roll(micrograph(), 7, axis=0))


def spoil_result(source: Path, out: Path) -> None:
    (out / "1_labels.tif").write_bytes((out / "1_labels.tif").read_bytes()[:-100])


def remove_result(source: Path, out: Path) -> None:
    (out / "1_overlay.png").unlink()


def spoil_record(source: Path, out: Path) -> None:
    (out / "1_field.json").write_text('{"of": ')


@pytest.mark.parametrize("spoil", [spoil_file, spoil_result, remove_result, spoil_record])
def test_what_has_changed_is_done_again_and_nothing_else(counted: Segmenter, tmp_path: Path, spoil: Callable[[Path, Path], None]) -> None:
    source, out = folder_of(3, tmp_path / "in"), tmp_path / "out"
    segment_files(counted, [source], out)
    predictions(counted)
    spoil(source, out)
    outcomes = segment_files(counted, [source], out)
    assert [outcome.before for outcome in outcomes] == [True, False, True]
    assert predictions(counted) == 1
    fresh = tmp_path / "fresh"
    segment_files(counted, [source], fresh)
    assert {name: content for name, content in contents(out).items() if name != "summary.json"} \
        == {name: content for name, content in contents(fresh).items() if name != "summary.json"}


def test_another_model_or_pixel_size_or_a_further_export_does_everything_again(counted: Segmenter, tmp_path: Path) -> None:
    source, out = folder_of(2, tmp_path / "in"), tmp_path / "out"
    segment_files(counted, [source], out, exports=["labels", "csv", "roi"])
    runs: list[tuple[float | None, list[str], int]] = [(None, ["csv"], 0), (0.05, ["csv"], 2), (0.05, ["csv", "coco"], 2), (0.05, ["coco"], 0)]
    predictions(counted)
    for pixel_size, exports, expected in runs:
        segment_files(counted, [source], out, pixel_size, exports=exports)
        assert predictions(counted) == expected, (pixel_size, exports)
    assert not list(out.glob("*_rois.zip")), "results of another setting are gone"
    with torch.no_grad():
        counted.network.gain += 0.5
    segment_files(counted, [source], out, 0.05, exports=["csv"])
    assert predictions(counted) == 2
    assert not list(out.glob("*_coco.json"))


def test_a_file_that_is_refused_now_leaves_no_results_of_what_it_was(segmenter: Segmenter, tmp_path: Path) -> None:
    source, out = folder_of(2, tmp_path / "in"), tmp_path / "out"
    segment_files(segmenter, [source], out)
    write(source / "0.tif", np.full((160, 160), 0.5))
    (source / "1.tif").write_bytes((source / "1.tif").read_bytes()[:2000])
    outcomes = segment_files(segmenter, [source], out)
    assert "no contrast" in str(outcomes[0].refused)
    assert "truncated" in str(outcomes[1].refused)
    assert [file.name for file in out.iterdir()] == ["summary.json"]
    assert told(out)["refused"] == 2
    assert told(out)["session"] is None
    assert "no field was measured" in told(out)["warnings"][0]


def test_a_run_that_was_killed_is_taken_up_where_it_was(counted: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = folder_of(3, tmp_path / "in"), tmp_path / "out"
    segment_files(counted, [source / "0.tif"], out)
    predictions(counted)

    def full(found: Segmented, path: Path) -> None:
        path.write_text("label,area")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(KINDS, "csv", KINDS["csv"]._replace(write=full))
    with pytest.raises(UserError, match="No space left"):
        segment_files(counted, [source], out)
    monkeypatch.undo()
    assert not (out / "summary.json").exists()
    assert [file.name for file in sorted(out.glob("*_grains.csv"))] == ["0_grains.csv"]
    assert [file.name for file in sorted(out.glob("*_field.json"))] == ["0_field.json"]
    predictions(counted)
    assert [outcome.before for outcome in segment_files(counted, [source], out)] == [True, False, False]
    assert predictions(counted) == 2
    assert not list(out.glob(".*"))


def test_a_file_that_changes_while_it_is_read_is_refused(segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of(2, tmp_path / "in")

    def slow(path: Path) -> Micrograph:
        found = read_micrograph(path)
        if path.name == "0.tif":
            write(path, np.roll(micrograph(), 3, axis=1))
        return found

    monkeypatch.setattr(inference, "read_micrograph", slow)
    outcomes = segment_files(segmenter, [source], tmp_path / "out")
    assert str(outcomes[0].refused).startswith("0.tif changed while it was read")
    assert outcomes[1].summary is not None
    monkeypatch.undo()
    assert segment_files(segmenter, [source], tmp_path / "out")[0].summary is not None


@pytest.mark.parametrize(("good", "bad", "status"), [(2, 0, 0), (1, 1, 1), (0, 2, 2)])
def test_command_line_says_what_happened(segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int, bad: int,
                                         status: int) -> None:
    monkeypatch.setattr("graincast.store.registry.load_segmenter", lambda _: segmenter)
    source, out = folder_of(good, tmp_path / "in"), tmp_path / "out"
    for number in range(bad):
        write(source / f"bad{number}.tif", np.zeros((160, 160)))
    for state in ("now", "before"):
        done = CliRunner().invoke(app, ["segment", str(source), "--out", str(out), "--export", "all"])
        assert done.exit_code == status, done.output
        assert f"{good} done {state}" in done.output
        assert f"{bad} refused" in done.output
    assert len(list(out.glob("*_rois.zip"))) == len(list(out.glob("*_grains.geojson"))) == good
    assert (out / "report.html").exists()
    with pytest.raises(UserError, match="there is no export 'pdf'"):
        CliRunner().invoke(app, ["segment", str(source), "--out", str(out), "--export", "pdf"], catch_exceptions=False)


class Page(HTMLParser):
    """Text of a page, and what it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.fetched = "", []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value and not value.startswith(("data:", "#"))]


def test_report_shows_sizes_fields_pictures_and_what_was_refused(segmenter: Segmenter, tmp_path: Path) -> None:
    source, out = folder_of(3, tmp_path / "Al<2>O3"), tmp_path / "out"
    write(source / "bad.tif", np.zeros((160, 160)))
    outcomes = segment_files(segmenter, [source], out, 0.05, exports=[*USUAL, "report"])
    page = Page((out / "report.html").read_text())
    assert not page.fetched
    assert "Al<2>O3" in page.text
    session = told(out)["session"]
    for expected in ("0.tif", "bad.tif", "no contrast", "3 fields; ASTM E112 asks for 5", "ASTM E112, planimetric (Jeffries)",
                     f"{session['astm_e112_g_planimetric']:.2f}", f"{session['mean_equivalent_diameter_um']:.4g}", "µm"):
        assert expected in page.text, expected
    assert (out / "report.html").read_text().count("data:image/jpeg") == sum(outcome.refused is None for outcome in outcomes)


# ------------------------------------------------------------------------------------------------------ odd input


def strict(text: str) -> Any:
    """JSON without NaN and Infinity."""
    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


class Flat(torch.nn.Module):
    """Sees no boundary at all."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.gain * torch.cat([torch.full_like(image, -9), torch.zeros_like(image)], dim=1)


def test_without_pixel_size_nothing_is_in_um_and_it_is_said(segmenter: Segmenter, tmp_path: Path) -> None:
    segment_files(segmenter, [folder_of(1, tmp_path / "in")], tmp_path / "out", exports=[*USUAL, "report", "parquet"])
    image, = told(tmp_path / "out")["images"]
    assert image["pixel_size_um"] is None
    assert any("no pixel size: lengths are in px" in warning for warning in image["warnings"])
    assert not [name for name in {**image, **told(tmp_path / "out")["session"]} if "_um" in name and name != "pixel_size_um"]
    assert not [name for name in pd.read_parquet(tmp_path / "out" / "0_grains.parquet") if "_um" in name]
    page = Page((tmp_path / "out" / "report.html").read_text()).text
    assert "no pixel size: lengths are in px" in page
    assert "µm" not in page


def test_an_image_without_a_boundary_is_one_grain_of_no_known_size(segmenter: Segmenter, tmp_path: Path) -> None:
    segmenter.network = Flat().eval()
    outcome, = segment_files(segmenter, [folder_of(1, tmp_path / "in")], tmp_path / "out", 0.05, exports=[*KINDS, "report"])
    assert outcome.summary is not None
    assert outcome.summary["grains"] == 1
    assert outcome.summary["mean_equivalent_diameter_um"] is outcome.summary["astm_e112_g_planimetric"] is None
    assert any("one grain fills the field" in warning for warning in outcome.warnings)
    for document in (tmp_path / "out").glob("*json"):
        strict(document.read_text())
    assert "no whole grain" in Page((tmp_path / "out" / "report.html").read_text()).text.lower()


def test_grains_that_all_touch_the_border_have_no_mean_size(segmenter: Segmenter, tmp_path: Path) -> None:
    image = np.full((160, 160), 0.7)
    image[79:81] = image[:, 79:81] = 0.2
    source = write(tmp_path / "in" / "a.tif", (ndi.gaussian_filter(image, 1) + np.random.default_rng(0).normal(0, 0.01, image.shape)).clip(0, 1))
    outcome, = segment_files(segmenter, [source], tmp_path / "out", 0.05, exports=[*KINDS, "report"])
    assert outcome.summary is not None
    assert outcome.summary["grains"] == outcome.summary["grains_at_border"] == 4
    assert outcome.summary["mean_equivalent_diameter_um"] is None
    assert any("every grain touches the border" in warning for warning in outcome.warnings)
    for document in (tmp_path / "out").glob("*json"):
        strict(document.read_text())


def test_files_in_um_and_px_are_not_summed_up(segmenter: Segmenter, tmp_path: Path) -> None:
    source = folder_of(1, tmp_path / "in")
    tifffile.imwrite(source / "known.tif", np.rint(255 * micrograph()).astype(np.uint8), resolution=(2e5, 2e5), resolutionunit="CENTIMETER")
    segment_files(segmenter, [source], tmp_path / "out", exports=[*USUAL, "report"])
    assert told(tmp_path / "out")["session"] is None
    assert "measured in um and" in told(tmp_path / "out")["warnings"][0]
    assert "measured in um and" in Page((tmp_path / "out" / "report.html").read_text()).text


STRETCHED: dict[str, dict[str, Any]] = {
    "imagej": {"imagej": True, "resolution": (20, 10), "metadata": {"unit": "um"}},
    "ome": {"ome": True, "metadata": {"PhysicalSizeX": 0.05, "PhysicalSizeY": 0.1}},
    "tags": {"resolution": (2e5, 1e5), "resolutionunit": "CENTIMETER"},
}


@pytest.mark.parametrize("kind", STRETCHED)
def test_pixels_that_are_not_square_are_refused(segmenter: Segmenter, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"{kind}{'.ome' if kind == 'ome' else ''}.tif"
    tifffile.imwrite(path, np.rint(255 * micrograph()).astype(np.uint8), **STRETCHED[kind])
    outcome, = segment_files(segmenter, [path], tmp_path / "out")
    assert "not square, 0.05 um wide and 0.1 um high; the image resampled to 0.05 um both ways would be right" in str(outcome.refused)


@pytest.mark.parametrize("suffix", [".tif", ".png", ".jpg"])
def test_what_was_drawn_into_the_image_in_colour_is_told(segmenter: Segmenter, tmp_path: Path, suffix: str) -> None:
    rgb = np.repeat(np.rint(255 * micrograph()).astype(np.uint8)[..., None], 3, axis=2)
    plain, drawn, false = rgb.copy(), rgb.copy(), rgb.copy()
    drawn[140:146, 10:50] = (255, 0, 0)
    false[..., 2] //= 3
    for name, image in (("plain", plain), ("drawn", drawn), ("false", false)):
        (tmp_path / "in").mkdir(exist_ok=True)
        iio.imwrite(tmp_path / "in" / f"{name}{suffix}", image)
    warnings = {o.source.stem: " ".join(o.warnings) for o in segment_files(segmenter, [tmp_path / "in"], tmp_path / "out")}
    assert "colour" not in warnings["plain"]
    assert "px are coloured, as of a scale bar or annotation drawn into the image" in warnings["drawn"]
    if suffix != ".jpg":
        assert "240 px are coloured" in warnings["drawn"]
    assert "% of the pixels are coloured" in warnings["false"]


def test_a_narrow_window_of_sixteen_bits_is_used_whole_or_refused(segmenter: Segmenter, tmp_path: Path) -> None:
    for name, offset, levels in (("wide", 20_000, 6_000), ("narrow", 30_000, 100)):
        path = tmp_path / "in" / f"{name}.tif"
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(path, np.rint(offset + levels * micrograph()).astype(np.uint16))
    narrow, wide = segment_files(segmenter, [tmp_path / "in"], tmp_path / "out")
    assert wide.summary is not None
    assert wide.summary["grains"] == 16
    assert np.ptp(iio.imread(tmp_path / "out" / "wide_overlay.png")[..., 2]) > 200
    assert "no contrast" in str(narrow.refused)


def test_confidence_is_given_where_the_segmenter_has_a_calibration(segmenter: Segmenter, tmp_path: Path) -> None:
    segmenter.calibration = Calibration(dict.fromkeys(FEATURES, 0.1), 0.0, {})
    segment_files(segmenter, [folder_of(1, tmp_path / "in")], tmp_path / "out", 0.05)
    table = pd.read_csv(tmp_path / "out" / "0_grains.csv")
    assert table["confidence"].between(0, 1).all()


def test_large_micrographs_go_block_by_block(segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "LARGE_PX", 25_000)
    monkeypatch.setattr(Segmenter, "compile", lambda self, threads=None: self)  # seconds, and tested elsewhere
    exports = [*KINDS, "report"]
    source = folder_of(1, tmp_path / "in")
    large, = segment_files(segmenter, [source], tmp_path / "large", 0.05, exports=exports)
    monkeypatch.undo()
    small, = segment_files(segmenter, [source], tmp_path / "small", 0.05, exports=exports)
    assert large.summary is not None
    assert small.summary is not None
    assert large.summary["grains"] == small.summary["grains"] == 16
    assert large.summary["mean_equivalent_diameter_um"] == pytest.approx(small.summary["mean_equivalent_diameter_um"], rel=0.05)
    assert set(contents(tmp_path / "large")) == set(contents(tmp_path / "small"))
    labels = tifffile.imread(tmp_path / "large" / "0_labels.tif")
    assert labels.min() == 1
    areas = pd.read_csv(tmp_path / "large" / "0_grains.csv").set_index("label")["area_um2"] / 0.05**2
    assert areas.round().astype(int).to_dict() == dict(enumerate(np.bincount(labels.ravel())[1:].tolist(), 1))
    outlines = json.loads((tmp_path / "large" / "0_grains.geojson").read_text())["features"]
    assert {feature["id"] for feature in outlines} == set(range(1, 17))


def large_png(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(tiled, "LARGE_PX", 25_000)
    iio.imwrite(folder / "0.png", np.rint(255 * micrograph()).astype(np.uint8))
    return []


def large_once_resampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("graincast.microscope.preparation.LARGEST_AREA_PX", 20_000)
    monkeypatch.setattr(tiled, "SPREAD_PX", 32)  # or what stands for the whole would be too large itself
    tifffile.imwrite(folder / "0.tif", np.rint(255 * np.stack([micrograph()] * 2)).astype(np.uint8), photometric="minisblack")
    return ["the file has 2 pages, of which the first was segmented"]


@pytest.mark.parametrize("case", [large_png, large_once_resampled])
def test_whatever_is_too_large_at_once_goes_block_by_block(segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           case: Callable[[Path, pytest.MonkeyPatch], list[str]]) -> None:
    monkeypatch.setattr(Segmenter, "compile", lambda self, threads=None: setattr(self, "run", compiled) or self)
    compiled = eager(segmenter.network, "float32")
    segmenter.calibration = Calibration(dict.fromkeys(FEATURES, 0.1), 0.0, {})
    (tmp_path / "in").mkdir()
    told_of_file = case(tmp_path / "in", monkeypatch)
    outcome, = segment_files(segmenter, [tmp_path / "in"], tmp_path / "out", 0.05)
    assert outcome.summary is not None, outcome.refused
    assert 16 <= outcome.summary["grains"] <= 20  # the grey range is that of the windows spread over it
    assert list(outcome.warnings)[: len(told_of_file) + 1] == [*told_of_file, "segmented block by block, without a confidence in each grain"]
    assert segmenter.run is None, "other files are predicted as if this one had not been there"
