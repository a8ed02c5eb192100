"""Drift: in-control sessions stay quiet, what changes is seen and named, and the arithmetic behind it is right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage as ndi
from scipy import stats

from graincast import config as settings
from graincast import stages
from graincast.errors import UserError
from graincast.microscope.preparation import Preparation
from graincast.microscope.quality import describe
from graincast.monitor import drift
from graincast.monitor.descriptors import MANIFOLD, TABLE, describe_set
from graincast.monitor.drift import Drift, Reference
from graincast.segment.instances import Cut
from graincast.segment.network import build_network
from graincast.segment.segmenter import Segmenter
from graincast.store.imageset import ImageSet, ImageSetWriter, whole_folder

CONFIG = settings.Drift(patch=32, resamples=100)
GRAIN_PX, SIDE = 20.0, 96
PREPARATION = Preparation(1.0, None, GRAIN_PX, 0.0, 80.0, False, 64, 0.5, 0.01, None)


def picture(rng: np.random.Generator, *, zoom: float = 1.0, blur: float = 0.8, noise: float = 6.0, gain: float = 1.0,
            tones: float = 12.0) -> np.ndarray:
    """Grains of a Voronoi diagram with dark lines and tones of their own; no code of the virtual SEM or the simulator."""
    count = max(round((SIDE / (GRAIN_PX * zoom)) ** 2 * 1.27), 4)
    seeds = rng.uniform(0, SIDE, (count, 2))
    points = np.stack(np.indices((SIDE, SIDE)), -1).reshape(-1, 2)
    distance = np.sort(np.linalg.norm(points[:, None] - seeds, axis=2), axis=1)
    grain = np.linalg.norm(points[:, None] - seeds, axis=2).argmin(axis=1)
    line = np.exp(-(((distance[:, 1] - distance[:, 0]) / 3) ** 2))
    grey = (130 + tones * rng.standard_normal(count)[grain] - 50 * line).reshape(SIDE, SIDE)
    return np.clip(gain * ndi.gaussian_filter(grey, blur) + noise * rng.standard_normal((SIDE, SIDE)), 0, 255).astype(np.uint8)


def micrographs(path: Path, seed: int, sessions: int, images: int, **change: float) -> ImageSet:
    rng = np.random.default_rng(seed)
    with ImageSetWriter(path, "micrographs") as writer:
        for session in range(sessions):
            jitter = {"blur": 0.8 * (1 + 0.05 * rng.standard_normal()), "noise": 6 * (1 + 0.05 * rng.standard_normal()),
                      "gain": 1 + 0.02 * rng.standard_normal()}
            for k in range(images):
                image = picture(rng, **(jitter | change))
                low, high = np.percentile(image, (0.1, 99.9))
                prepared = np.clip((image - low) / (high - low) * 255, 0, 255).astype(np.uint8)
                writer.add(prepared, id=f"{session}_{k}", session=f"s{session}", scale=1.0, grain_diameter_px=GRAIN_PX * change.get("zoom", 1.0),
                           **describe(image / np.float32(255)))
    return writer.result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drift")


@pytest.fixture(scope="module")
def segmenter(folder: Path) -> Path:
    """A network of random weights: its features are no better than chance, but they are features."""
    torch.manual_seed(0)
    network = build_network("Unet", "resnet18", None).eval()
    config = {"architecture": "Unet", "encoder": "resnet18", "precision": "float32"}
    with whole_folder(folder / "segmenter") as out:
        Segmenter(network, Cut(smallest_px=20), config, PREPARATION).save(out)
    return folder / "segmenter"


@pytest.fixture(scope="module")
def reference(folder: Path, segmenter: Path) -> Path:
    real, synthetic = micrographs(folder / "real", 1, 5, 5), micrographs(folder / "synthetic", 2, 1, 12, noise=3.0)
    return stages.run_reference(CONFIG, segmenter, real, synthetic, folder / "reference")


def judged(folder: Path, reference: Path, segmenter: Path, session: ImageSet) -> Drift:
    known = Reference.load(reference)
    return drift.judge(known, CONFIG, drift.describe_session(known, Segmenter.load(segmenter), session))


def test_in_control_sessions_stay_quiet(folder: Path, reference: Path, segmenter: Path) -> None:
    verdicts = [judged(folder, reference, segmenter, micrographs(folder / "quiet", 100 + k, 1, 1 + 3 * (k % 3))) for k in range(9)]
    assert sum(verdict.drifted for verdict in verdicts) <= 1  # of nine at 2 % each: two or more by chance once in seventy times
    assert all(verdict.cause == "none" and not verdict.mendable and not verdict.moved for verdict in verdicts if not verdict.drifted)


@pytest.mark.parametrize(("change", "cause", "descriptor"), [
    ({"noise": 14.0}, "look", "noise"), ({"gain": 0.6}, "look", "contrast"), ({"blur": 2.5}, "focus", "sharpness"),
    ({"zoom": 1.6}, "size", "grain_size"), ({"zoom": 0.6}, "size", "grain_size"), ({"tones": 40.0}, "look", "tones"),
])
def test_a_change_is_seen_and_named(folder: Path, reference: Path, segmenter: Path, change: dict[str, float], cause: str, descriptor: str) -> None:
    verdict = judged(folder, reference, segmenter, micrographs(folder / "changed", 200, 1, 6, **change))
    assert verdict.drifted
    assert verdict.cause == cause
    assert verdict.mendable == (cause == "look")
    assert descriptor in {entry["descriptor"] for entry in verdict.moved}


def test_images_of_no_common_look_are_not_learned_from(folder: Path, reference: Path, segmenter: Path) -> None:
    """Each alone would be a change of the look; together they are several."""
    rng = np.random.default_rng(9)
    looks = ({"noise": 20.0}, {"gain": 0.5}, {"tones": 45.0}, {"noise": 1.0, "gain": 1.4}, {"blur": 0.5}, {"tones": 0.0, "noise": 25.0})
    with ImageSetWriter(folder / "mixed", "micrographs") as writer:
        for k, change in enumerate(looks):
            image = picture(rng, **change)
            writer.add(image, id=str(k), session="mixed", scale=1.0, grain_diameter_px=GRAIN_PX, **describe(image / np.float32(255)))
    verdict = judged(folder, reference, segmenter, writer.result)
    assert (verdict.drifted, verdict.cause, verdict.mendable) == (True, "mixed", False)
    assert "no look in common" in verdict.sentence


@pytest.mark.parametrize(("images", "mendable"), [(1, False), (2, False), (3, True)])
def test_few_images_do_not_show_a_look(folder: Path, reference: Path, segmenter: Path, images: int, mendable: bool) -> None:
    verdict = judged(folder, reference, segmenter, micrographs(folder / "few", 202, 1, images, noise=14.0))
    assert (verdict.drifted, verdict.cause, verdict.mendable) == (True, "look", mendable)
    assert ("too few images" in verdict.sentence) is not mendable


def test_words_follow_the_direction(folder: Path, reference: Path, segmenter: Path) -> None:
    finer = judged(folder, reference, segmenter, micrographs(folder / "finer", 201, 1, 6, zoom=0.6))
    (entry,) = [entry for entry in finer.moved if entry["descriptor"] == "grain_size"]
    assert entry["direction"] == "down"
    assert entry["words"] == "finer grains than trained"
    assert entry["sigmas"] < 0
    assert finer.scores["size_ratio"] == pytest.approx(0.6, abs=0.02)


def test_stage_writes_what_it_says_and_the_same_bytes_twice(folder: Path, reference: Path, segmenter: Path) -> None:
    session = micrographs(folder / "session", 202, 1, 5, noise=14.0)
    first, second = (stages.run_drift(CONFIG, reference, segmenter, session, folder / name) for name in ("one", "two"))
    assert {file.name for file in first.iterdir()} == {"drift.json", "descriptors.parquet", "patches.parquet", "drift.png", "evidently.html"}
    for name in ("drift.json", "descriptors.parquet", "patches.parquet", "drift.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    verdict = Drift.load(first)
    assert verdict.drifted
    page = (first / "evidently.html").read_text()
    assert verdict.sentence.split(";")[0].split("(")[0] in page
    assert "src=\"http" not in page
    assert len(pd.read_parquet(first / "descriptors.parquet")) == len(session)
    assert verdict.scores["evidently_noise"] > verdict.scores["evidently_grain_size"]
    assert 0 < verdict.scores["evidently_share"] < 1


def test_reference_made_twice_is_the_same(folder: Path, reference: Path, segmenter: Path) -> None:
    again = stages.run_reference(CONFIG, segmenter, ImageSet(folder / "real"), ImageSet(folder / "synthetic"), folder / "again")
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {file.name: file.read_bytes() for file in reference.iterdir()}


def test_another_champions_reference_is_refused(folder: Path, reference: Path, segmenter: Path) -> None:
    other = Segmenter.load(segmenter)
    with torch.no_grad():
        next(other.network.parameters()).add_(0.1)
    with whole_folder(folder / "other") as out:
        other.save(out)
    with pytest.raises(UserError, match="another segmenter"):
        stages.run_drift(CONFIG, reference, folder / "other", ImageSet(folder / "real"), folder / "never")
    assert not (folder / "never").exists()


def test_too_few_micrographs_are_no_reference_and_the_verdict_says_so(folder: Path, segmenter: Path) -> None:
    few = micrographs(folder / "few", 3, 1, 3)
    reference = stages.run_reference(CONFIG, segmenter, few, few, folder / "untested")
    verdict = Drift.load(stages.run_drift(CONFIG, reference, segmenter, few, folder / "untested verdict"))
    assert not verdict.drifted
    assert "learned from 3 micrographs" in verdict.sentence
    assert verdict.scores == {}
    with pytest.raises(UserError, match="3 micrographs cannot tell"):
        drift.make_reference(CONFIG, Segmenter.load(segmenter), few, few)


@pytest.mark.parametrize("content", ["{", json.dumps({"format": 99}), None])
def test_a_broken_reference_is_refused(folder: Path, reference: Path, tmp_path: Path, content: str | None) -> None:
    for file in reference.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if content is None:
        (tmp_path / "embedding.npz").unlink()
    else:
        (tmp_path / "reference.json").write_text(content)
    with pytest.raises(UserError, match="make it again"):
        Reference.load(tmp_path)


def test_a_session_far_from_the_synthetic_images_leaves_the_manifold(folder: Path, reference: Path, segmenter: Path) -> None:
    rng = np.random.default_rng(5)
    with ImageSetWriter(folder / "foreign", "micrographs") as writer:
        for k in range(4):  # stripes
            stripes = 127 + 120 * np.sign(np.sin(np.arange(SIDE)[:, None] / 3 + rng.uniform(0, 6))) * np.ones((1, SIDE))
            writer.add(stripes.astype(np.uint8), id=str(k), session="s", scale=1.0, grain_diameter_px=np.nan, **describe(stripes / 255))
    verdict = judged(folder, reference, segmenter, writer.result)
    assert verdict.drifted
    assert verdict.cause == "foreign"
    assert not verdict.mendable
    assert verdict.scores["manifold_score"] > 1


def test_small_images_and_a_missing_manifest_column(folder: Path, reference: Path, segmenter: Path, tmp_path: Path) -> None:
    """A field smaller than two patches, without any raw descriptor, is still judged."""
    with ImageSetWriter(tmp_path / "small", "micrographs") as writer:
        for k in range(3):
            writer.add(picture(np.random.default_rng(k))[:40, :50], id=str(k))
    verdict = judged(folder, reference, segmenter, writer.result)
    assert "t_noise" not in verdict.scores
    assert "t_slope" in verdict.scores


# The arithmetic


def test_components_find_the_variances_that_made_the_data() -> None:
    rng = np.random.default_rng(0)
    sessions = np.repeat(np.arange(400), 5)
    values = (0.7 * rng.standard_normal((400, 1)))[sessions] + 0.3 * rng.standard_normal((2000, 1)) + 4
    found = drift._components(values, sessions, np.array([1e-6]), 0.5)
    assert found.mean == pytest.approx(4, abs=0.1)
    assert np.sqrt(found.within) == pytest.approx(0.3, rel=0.05)
    assert np.sqrt(found.between) == pytest.approx(0.7, rel=0.1)
    assert found.of_mean == pytest.approx((0.7**2 + 0.3**2 / 5) / 400, rel=0.15)


def test_one_session_tells_nothing_of_others() -> None:
    values = np.random.default_rng(0).standard_normal((50, 1))
    found = drift._components(values, np.zeros(50, int), np.array([1e-6]), 0.5)
    assert found.between == pytest.approx(0.25 * found.within)


@pytest.mark.parametrize(("sessions", "images"), [(1, 8), (6, 8), (5, 2)])
def test_threshold_keeps_the_false_alarm_rate_for_normal_data(sessions: int, images: int) -> None:
    """The largest t of fresh normal sessions, judged against fresh normal references, exceeds the threshold as often as asked."""
    rng, columns = np.random.default_rng(1), ["noise", "entropy", "sharpness", "tones"]
    number = np.repeat(np.arange(sessions), images)
    typical = _normal(rng, number)
    threshold = drift._normal_threshold(typical, columns, number, 5, CONFIG, 0.05, np.random.default_rng(2))
    alarms = []
    for _ in range(600):
        known, new = _normal(rng, number), 0.5 * rng.standard_normal(4) + rng.standard_normal((5, 4)).mean(axis=0)
        t = drift._components(known, number, np.full(4, 1e-6), CONFIG.session_spread).t(new, 5)
        alarms.append(np.abs(t).max() > threshold)
    assert np.mean(alarms) == pytest.approx(0.05, abs=0.035)


def _normal(rng: np.random.Generator, number: np.ndarray) -> np.ndarray:
    return 0.5 * rng.standard_normal((number.max() + 1, 4))[number] + rng.standard_normal((len(number), 4))


def test_discrepancy_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((12, 2)), rng.standard_normal((8, 2)) + 1
    image_a, image_b = np.repeat(np.arange(3), 4), np.repeat(np.arange(2), 4)
    both, image = np.vstack([a, b]), np.concatenate([image_a, image_b + 3])
    kernel = drift._kernel(both, image, both, image, 1.5)

    def mean(of: np.ndarray, to: np.ndarray) -> float:
        return float(np.mean([np.exp(-((p - q) ** 2).sum() / (2 * 1.5**2)) for p in of for q in to]))

    assert drift._mmd2(kernel, np.arange(3), np.arange(3, 5)) == pytest.approx(mean(a, a) + mean(b, b) - 2 * mean(a, b))


def test_manifold_distance_is_one_sided() -> None:
    t = np.array([[-9.0, 2.0]])
    assert drift._one_sided(t, [MANIFOLD, "noise"]).tolist() == [[0.0, 2.0]]
    assert drift._one_sided(-t, [MANIFOLD, "noise"]).tolist() == [[9.0, 2.0]]


def test_embedding_is_white() -> None:
    rng = np.random.default_rng(4)
    frame = pd.DataFrame({"image": np.zeros(500, int)})
    mixed = rng.standard_normal((500, 20)) @ rng.standard_normal((20, 20)) + 3
    described = drift.Described(pd.DataFrame(), frame, mixed.astype(np.float32), mixed[:, :8].astype(np.float32))
    places = drift.Embedding.fit([described])(described)
    encoder = places[:, :drift.ENCODER_AXES]
    assert np.allclose(np.cov(encoder.T, ddof=0), np.eye(drift.ENCODER_AXES), atol=1e-3)
    assert np.allclose(places.mean(axis=0), 0, atol=1e-3)


def test_streaks_trails_and_tones_see_what_they_are_for() -> None:
    """Each answers to its own injected change, and far more than to another."""
    from graincast.monitor.descriptors import _streaks, _tones, _trails

    rng = np.random.default_rng(6)
    grey = np.block([[picture(rng) for _ in range(3)] for _ in range(3)]).astype(np.float32)
    side = len(grey)
    streaked = grey + 12 * rng.standard_normal((side, 1)).astype(np.float32)
    assert _streaks(streaked, GRAIN_PX) > 5 * _streaks(grey, GRAIN_PX)
    turned = streaked.T
    assert _streaks(turned, GRAIN_PX) < _streaks(grey, GRAIN_PX)
    bright = ndi.gaussian_filter((rng.random((side, side)) > 0.995) * 2000.0, 1.5).astype(np.float32)
    charge = sum(np.roll(bright, k, axis=1) * 0.8**k for k in range(1, 10))
    left, right = _trails(grey + bright + charge, GRAIN_PX), _trails((grey + bright + charge)[:, ::-1], GRAIN_PX)
    assert left > 0.01
    assert right == pytest.approx(-left, rel=0.2)
    assert abs(_trails(grey + bright, GRAIN_PX)) < 0.5 * left
    tones = [_tones(picture(np.random.default_rng(7), tones=level).astype(np.float32), GRAIN_PX) for level in (0.0, 12.0, 40.0)]
    assert tones[0] < tones[1] < tones[2]


def test_descriptors_are_those_of_the_table(folder: Path, segmenter: Path) -> None:
    described = describe_set(ImageSet(folder / "real"), Segmenter.load(segmenter), 32, GRAIN_PX)
    assert set(described.images) - {"id", "session"} == set(TABLE) - {MANIFOLD}
    assert np.isfinite(described.images.drop(columns=["id", "session"]).to_numpy(float)).all()
    assert len(described.patches) == len(described.encoder) == len(described.texture)


def test_verdict_survives_saving(tmp_path: Path) -> None:
    verdict = Drift(True, "slight", "look", True, [{"descriptor": "noise", "sigmas": 5.0, "direction": "up", "words": "noisier"}], "Drift.",
                    {"columns_score": 1.5, "size_ratio": float("nan")})
    verdict.save(tmp_path)
    read = Drift.load(tmp_path)
    assert replace(read, scores={}) == replace(verdict, scores={})
    assert np.isnan(read.scores["size_ratio"])
    with pytest.raises(UserError, match="no verdict"):
        Drift.load(tmp_path / "nowhere")


def test_predictive_quantile_is_students() -> None:
    """What `_calibrate` relies on: the next normal value lies within mean + t s sqrt(1 + 1 / m) as often as asked."""
    rng = np.random.default_rng(8)
    values = rng.standard_normal((20000, 6))
    bound = values[:, :5].mean(axis=1) + stats.t.ppf(0.95, 4) * values[:, :5].std(axis=1, ddof=1) * np.sqrt(1 + 1 / 5)
    assert np.mean(values[:, 5] > bound) == pytest.approx(0.05, abs=0.006)
