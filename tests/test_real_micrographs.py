"""The study on real micrographs, run on a tiny field of the virtual SEM: every method, every ablation, every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest

from benchmarks import cut
from benchmarks import real_micrographs as study_module
from benchmarks.real_micrographs import ABLATIONS, METHODS, METRICS, Done, Material, Study, find, summary, table
from graincast.config import Config, Segmenter, Simulate, Synthesise, Translator, VirtualSession
from graincast.microscope.virtual_sem import write_session
from graincast.segment.instances import Cut

TINY = Config(
    simulate=Simulate(size=128, grains=12, steps=100, translator_structures=2, synthetic_structures=2, validation_structures=2),
    translator=Translator(steps=2, batch=1, crop=64, filters=4, residual_blocks=0, device="cpu"),
    synthesise=Synthesise(min_fidelity=-1),
    segmenter=Segmenter(epochs=1, batch=2, crop=64, device="cpu"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with one labelled field, as ``single-fields`` is laid out."""
    folder = tmp_path_factory.mktemp("data")
    held_out = write_session(VirtualSession(micrographs=1, held_out=1, size=320), folder / "session") / "held_out"
    for kind in ("images", "masks"):
        (folder / "field" / kind).mkdir(parents=True)
        image = iio.imread(next((held_out / kind).iterdir()))[:320]
        iio.imwrite(folder / "field" / kind / "one.png", image if kind == "masks" else np.uint8(image / image.max() * 255))
    return folder


@pytest.fixture(scope="module")
def study(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study("field", Material("field/images/one.png", "field/images/one.png"), data, tmp_path_factory.mktemp("work"), TINY, seed=3)


@pytest.mark.parametrize("method", [*METHODS, *ABLATIONS])
def test_every_method_is_scored_and_drawn(study: Study, method: str, tmp_path: Path) -> None:
    done = Done()
    done.run(study, method, tmp_path)
    (scores,) = done.figures["field"][method]
    assert tuple(scores) == METRICS
    assert iio.imread(tmp_path / f"field-{method}-3.png").shape == (320, 320, 3)
    assert json.loads(json.dumps(summary(done.figures)))["fields"]["field"][method]["ap50"] == {"mean": round(scores["ap50"], 4), "std": 0.0}
    assert method in table(done.figures).to_string()


def test_the_ceiling_of_exact_masks_is_nearly_a_full_score(study: Study, tmp_path: Path) -> None:
    done = Done()
    done.run(study, "ceiling", tmp_path)
    (scores,) = done.figures["field"]["ceiling"]
    assert scores["ap50"] == 1  # specks of the mask, which the scores drop, become no grains either
    assert scores["bf1_4px"] > 0.99


def test_trainings_are_made_once(study: Study) -> None:
    METHODS["ours"](study)
    made = {path: path.stat().st_mtime_ns for path in study.work.rglob("*.safetensors")}
    again = Study(study.name, study.material, study.data, study.work, TINY, study.seed)
    METHODS["ours"](again)
    assert {path: path.stat().st_mtime_ns for path in study.work.rglob("*.safetensors")} == made
    assert again.seconds == {stage: seconds for stage, seconds in study.seconds.items() if stage in again.seconds}


def test_ours_never_reads_a_mask(study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} read")

    monkeypatch.setattr(study_module, "read_mask", refuse)
    fresh = Study(study.name, study.material, study.data, tmp_path, TINY, seed=4)
    for method in ("ours", "untextured", "virtual_sem", *ABLATIONS):
        {**METHODS, **ABLATIONS}[method](fresh)
    with pytest.raises(AssertionError, match=r"one\.png read"):
        METHODS["scarce"](fresh)


def test_scarce_patches_and_scores_share_no_pixel(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    original = study_module._from_patches
    monkeypatch.setattr(study_module, "_from_patches", lambda study, labelled: seen.append(labelled[0][0]) or original(study, labelled))
    METHODS["scarce"](study)
    prepared = study.prepared(study.data / "field" / "images" / "one.png")
    first, second = (study_module._half(prepared.shape, which) for which in (0, 1))
    assert np.array_equal(seen[0], prepared[second]), "the first network, which serves the first half, learns from the second"
    assert np.array_equal(seen[1], prepared[first])
    served = np.zeros(prepared.shape, int)
    for half in (first, second):
        served[half] += 1
    assert (served == 1).all()


def test_a_refusal_is_kept_with_its_reason(study: Study, data: Path, tmp_path: Path) -> None:
    (data / "noise" / "images").mkdir(parents=True, exist_ok=True)
    iio.imwrite(data / "noise" / "images" / "n.png", np.random.default_rng(0).integers(0, 255, (256, 256), np.uint8))
    done = Done()
    done.run(Study("noise", Material("noise/images/n.png", "noise/images/n.png"), data, tmp_path / "work", TINY, 0), "ours", tmp_path)
    assert "no grains to be seen" in done.refused["noise"]["ours"]
    assert not done.figures["noise"]["ours"]


def test_patterns_name_ranges_and_leave_specimens_out(tmp_path: Path) -> None:
    for name in ("field01_1.jpg", "field02_1.jpg", "field03_1.jpg", "1_001.tif", "2_001.tif"):
        (tmp_path / name).touch()
    assert [path.name for path in find(tmp_path, "field{02..03}_*.jpg")] == ["field02_1.jpg", "field03_1.jpg"]
    everything = Study("nbt", Material("*.tif", "", leave_one_out=True), tmp_path, tmp_path, TINY, 0)
    assert [path.name for path in find(tmp_path, everything.without("1").material.train)] == ["2_001.tif"]


def test_cuts_are_chosen_without_a_micrograph_s_mask(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "read_mask", lambda path: pytest.fail(f"{path} was read"))
    rows = pd.DataFrame(cut.scores(study, [Cut(0), Cut(0, merge_level=0.0)]))
    assert len(rows) == 2 * cut.CROPS, "one image chooses, and every crop of it is cut both ways"
    assert rows["ap50"].between(0, 1).all()
    assert set(rows["merge_level"]) == {Cut(0).merge_level, 0.0}
