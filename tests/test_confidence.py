"""Confidence in grains: what is measured of the maps, the fit, its reliability, and its way into the segmenter."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage as ndi

from graincast import stages
from graincast.compute import load_weights, save_weights
from graincast.config import Segmenter, Simulate
from graincast.evaluate.metrics import right_grains, score_grains
from graincast.labels import fill_lines
from graincast.microscope.preparation import Preparation
from graincast.segment.confidence import FEATURES, FEWEST, Calibration, fit, grain_confidence, grain_features, line_confidence, reliability
from graincast.segment.instances import Cut, instances
from graincast.segment.network import build_network, targets
from graincast.segment.segmenter import WEIGHTS, predict_maps
from graincast.segment.segmenter import Segmenter as TrainedSegmenter
from graincast.segment.train import calibrated
from graincast.simulate.structure import simulate_structure
from graincast.store.imageset import ImageSet, ImageSetWriter

SIDE = 30
SMALL = Segmenter(epochs=10, crops_per_image=8, batch=4, crop=64, device="cpu")
EVEN = Calibration({name: float(sign) for name, sign in FEATURES.items()}, -2.0, {})
"""Any weights with the right signs."""


def squares() -> tuple[np.ndarray, np.ndarray]:
    """A 3 x 3 chessboard of grains 1..9 with its perfect maps."""
    labels = np.kron(np.arange(1, 10, dtype=np.int32).reshape(3, 3), np.ones((SIDE, SIDE), np.int32))
    return labels, targets(labels)


def drawn_grains(grains: int, rng: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Features of grains of which the ones with a weak outline tend to be wrong, and the specimens they are in."""
    features = pd.DataFrame({name: rng.uniform(0, 1, grains) for name in FEATURES})
    right = rng.random(grains) < 1 / (1 + np.exp(-(8 * features["outline"] - 2 * features["ridge"] - 1)))
    return features, right.to_numpy(), rng.integers(0, 6, grains)


class TestFeatures:
    def test_of_perfect_squares(self):
        features = grain_features(*squares())
        assert list(features) == list(FEATURES)
        assert features["outline"].to_numpy() == pytest.approx(1)
        assert features["weakest_side"].to_numpy() == pytest.approx(1)
        assert features["ridge"].to_numpy() == pytest.approx(0)
        assert features["roundness"].to_numpy() == pytest.approx(np.pi / 4)
        assert features["oddness"].to_numpy() == pytest.approx(0)

    def test_size_is_odd_either_way(self):
        labels = np.repeat(np.arange(1, 6), [5, 20, 20, 20, 80])[None].repeat(40, 0).astype(np.int32)
        assert grain_features(labels, targets(labels))["oddness"].to_numpy() == pytest.approx(np.log([4, 1, 1, 1, 4]))

    def test_a_weak_side_shows_in_both_its_grains_alone(self):
        labels, maps = squares()
        maps[0, 2 : SIDE - 2, SIDE - 3 : SIDE + 3] = 0.3  # between grains 1 and 2
        features = grain_features(labels, maps)
        weakest = features["weakest_side"].to_numpy()
        assert list(np.flatnonzero(weakest < 0.6) + 1) == [1, 2]
        assert list(np.flatnonzero(features["outline"].to_numpy() < 0.99) + 1) == [1, 2]
        # 26 of the side's 30 edges lie within a pixel of nothing but 0.3; 2 more at either end see the crossing lines
        assert weakest[0] == pytest.approx((24 * 0.3 + 6) / 30, abs=0.05)

    def test_outline_and_ridge_against_a_loop(self):
        rng = np.random.default_rng(0)
        labels = ndi.zoom(rng.integers(1, 8, (6, 7)), 11, order=0).astype(np.int32)
        maps = ndi.gaussian_filter(rng.random((2, *labels.shape)), (0, 2, 2)).astype(np.float32)
        features, wide = grain_features(labels, maps), ndi.maximum_filter(maps[0], 3)
        beside = np.zeros(labels.shape, bool)
        for grain in range(1, 8):
            values = []
            for y, x in np.argwhere(labels == grain):
                for other in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    inside = 0 <= other[0] < labels.shape[0] and 0 <= other[1] < labels.shape[1]
                    if inside and labels[other] != grain:
                        values.append((wide[y, x] + wide[other]) / 2)
                        beside[y, x] = True
            assert features["outline"].to_numpy()[grain - 1] == pytest.approx(np.mean(values))
        inside = ~ndi.binary_dilation(beside, np.ones((5, 5)))  # 6 % of the median diameter of 32 px
        expected = [maps[0][inside & (labels == grain)].mean() for grain in range(1, 8)]
        assert features["ridge"].to_numpy() == pytest.approx(expected, rel=1e-5)

    def test_a_ridge_inside_shows_and_none_beside_the_outline_does(self):
        labels, maps = squares()
        maps[0, SIDE + 5 : 2 * SIDE - 5, SIDE + 14 : SIDE + 16] = 0.6  # across grain 5
        features = grain_features(labels, maps)
        assert list(np.flatnonzero(features["ridge"].to_numpy() > 0.01) + 1) == [5]

    def test_do_not_depend_on_the_size_of_a_pixel(self):
        found = fill_lines(simulate_structure(Simulate(size=128, grains=18, steps=300), 0)[1])
        maps = ndi.gaussian_filter(targets(found), (0, 1, 1))
        coarse, fine = grain_features(found, maps), grain_features(np.kron(found, np.ones((3, 3), np.int32)), np.repeat(np.repeat(maps, 3, 1), 3, 2))
        for name in ("oddness", "roundness"):
            assert fine[name].to_numpy() == pytest.approx(coarse[name].to_numpy())
        # the window of the highest probability is three times narrower
        assert np.abs(fine["outline"].to_numpy() - coarse["outline"].to_numpy()).max() < 0.15

    def test_one_grain_has_no_outline_to_go_by(self):
        features = grain_features(np.ones((20, 30), np.int32), np.zeros((2, 20, 30), np.float32))
        assert len(features) == 1
        assert features["outline"].to_numpy() == pytest.approx(0)
        assert features["weakest_side"].to_numpy() == pytest.approx(0)

    def test_the_info_bar_and_no_specimen_are_the_fields_edge(self):
        labels, maps = squares()
        whole = np.vstack([labels, np.zeros((12, labels.shape[1]), np.int32)])
        pd.testing.assert_frame_equal(grain_features(whole, maps), grain_features(labels, maps))
        taller = np.pad(maps, ((0, 0), (0, 12), (0, 0)))
        pd.testing.assert_frame_equal(grain_features(whole, taller)[["roundness", "oddness"]], grain_features(labels, maps)[["roundness", "oddness"]])

    def test_an_id_without_pixels_gets_nothing(self):
        labels, maps = squares()
        labels[labels == 9] = 12
        found = grain_confidence(labels, maps, EVEN)
        assert list(np.flatnonzero(np.isnan(found)) + 1) == [9, 10, 11]

    def test_what_does_not_fit_is_refused(self):
        labels, maps = squares()
        for wrong in ((labels[:-1], maps), (labels[:, :-1], maps), (labels, maps[0][None])):
            with pytest.raises(ValueError, match="do not fit"):
                grain_features(*wrong)


class TestConfidence:
    def test_is_a_probability_a_grain_in_float32(self):
        found = grain_confidence(*squares(), EVEN)
        assert found.dtype == np.float32
        assert found.shape == (9,)
        assert ((found > 0) & (found < 1)).all()

    def test_falls_with_its_grains_boundaries_and_nowhere_else(self):
        labels, maps = squares()
        before = grain_confidence(labels, maps, EVEN)
        for strength in (0.8, 0.5, 0.2):
            maps[0, :, SIDE - 3 : SIDE + 3] = strength * targets(labels)[0][:, SIDE - 3 : SIDE + 3]
            now = grain_confidence(labels, maps, EVEN)
            assert (now[[0, 1, 3, 4, 6, 7]] < before[[0, 1, 3, 4, 6, 7]]).all()
            assert (now[[2, 5, 8]] == before[[2, 5, 8]]).all()
            before = now

    def test_lines_tell_the_mean_of_their_side(self):
        labels, maps = squares()
        maps[0, 2 * SIDE + 4 :, 2 * SIDE - 3 : 2 * SIDE + 3] = 0.5  # between grains 8 and 9
        lines = line_confidence(labels, maps)
        assert lines.dtype == np.float32
        beside = (ndi.grey_erosion(labels, footprint=ndi.generate_binary_structure(2, 1)) !=
                  ndi.grey_dilation(labels, footprint=ndi.generate_binary_structure(2, 1)))
        assert np.array_equal(np.isfinite(lines), beside)
        assert lines[:, SIDE] == pytest.approx(1)
        weak = lines[-SIDE + 2 :, 2 * SIDE - 1 : 2 * SIDE + 1]
        assert np.unique(weak).size == 1
        assert 0.5 < weak[0, 0] < 0.7
        assert np.isnan(line_confidence(np.vstack([labels, 0 * labels[:9]]), maps)[-9:]).all()
        assert np.isnan(line_confidence(np.ones_like(labels), maps)).all()


class TestRight:
    def test_agrees_with_ap50(self):
        truth = simulate_structure(Simulate(size=128, grains=18, steps=300), 0)[1]
        shifted = np.roll(fill_lines(truth), 6, axis=1)
        right, scores = right_grains(shifted, truth > 0), score_grains(shifted, truth == 0)
        true = round(len(right) / scores["count_ratio"])
        assert 0 < right.sum() < len(right)
        assert right.sum() / (len(right) + true - right.sum()) == pytest.approx(scores["ap50"])

    def test_a_merged_grain_is_wrong_and_its_neighbours_right(self):
        labels, _ = squares()
        lines = ndi.grey_erosion(labels, 3) != ndi.grey_dilation(labels, 3)
        merged = np.where(labels == 9, 8, labels)
        assert list(np.flatnonzero(~right_grains(merged, ~lines)) + 1) == [8]


class TestFit:
    def test_beats_a_constant_and_is_calibrated_on_grains_it_has_not_seen(self):
        rng = np.random.default_rng(0)
        calibration = fit(*drawn_grains(4000, rng))
        features, right, _ = drawn_grains(20000, rng)
        fresh = reliability(calibration(features), right)
        assert fresh["brier"] < 0.8 * fresh["errors"] * (1 - fresh["errors"])
        assert fresh["ece"] < 0.02
        assert calibration.figures["brier"] == pytest.approx(fresh["brier"], abs=0.02)
        assert calibration.figures["auc"] == pytest.approx(fresh["auc"], abs=0.04)
        assert calibration.weights["outline"] == pytest.approx(8, rel=0.15)
        assert calibration.weights["ridge"] == pytest.approx(-2, rel=0.3)

    def test_signs_hold_whatever_the_images_say(self):
        features, right, image = drawn_grains(2000, np.random.default_rng(1))
        calibration = fit(features, ~right, image)  # weak outlines are the right ones now
        assert calibration.weights["outline"] == calibration.weights["ridge"] == 0

    def test_the_same_grains_give_the_same_bytes(self):
        first, second = (json.dumps(fit(*drawn_grains(500, np.random.default_rng(2))).to_dict()) for _ in range(2))
        assert first == second

    @pytest.mark.parametrize("spoil", [lambda right, image: (right | True, image), lambda right, image: (right & False, image),
                                       lambda right, image: (np.arange(len(right)) >= FEWEST - 1, image), lambda right, image: (right, 0 * image)])
    def test_too_little_to_learn_from_gives_none_and_says_so(self, spoil, caplog):
        features, right, image = drawn_grains(300, np.random.default_rng(3))
        with caplog.at_level(logging.WARNING):
            assert fit(features, *spoil(right, image)) is None
        assert "gives no confidence" in caplog.text

    def test_reliability_against_counts_by_hand(self):
        confidence, right = np.repeat([0.2, 0.9], 50), np.r_[np.arange(50) < 15, np.arange(50) < 40]
        figures = reliability(confidence, right)
        bins = [(0.2, right[k : k + 10]) for k in range(0, 50, 10)] + [(0.9, right[k : k + 10]) for k in range(50, 100, 10)]
        assert figures["ece"] == pytest.approx(np.mean([abs(told - was.mean()) for told, was in bins]))
        assert figures["brier"] == pytest.approx(np.mean((confidence - right) ** 2))
        pairs = [(a > b) + (a == b) / 2 for a in confidence[right] for b in confidence[~right]]
        assert figures["auc"] == pytest.approx(np.mean(pairs))
        assert (figures["errors"], figures["n"]) == (0.45, 100)


def picture(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A simulated structure as a noisy picture, 128 px."""
    _, labels = simulate_structure(Simulate(size=128, grains=18, steps=200), seed)
    grey = np.where(labels == 0, 110, 150) + np.random.default_rng(seed).normal(0, 25, labels.shape)
    return np.clip(ndi.gaussian_filter(grey, 0.7), 0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, ImageSet]:
    """What `graincast.stages.run_train_segmenter` takes."""
    root, made = tmp_path_factory.mktemp("sets"), {}
    preparation = Preparation(target_pixel_size_um=None, scale=1.0, grain_diameter_px=27.0, clahe_clip=0.0, clahe_tile_px=100.0, cut_info_bar=False,
                              min_size=64, max_saturated=0.5, min_contrast=0.01, default_pixel_size_um=None)
    for name, seeds in {"training": range(4), "validation": range(4, 10), "micrographs": range(10, 11)}.items():
        with ImageSetWriter(root / name, name) as writer:
            for seed in seeds:
                image, labels = picture(seed)
                writer.add(image, id=str(seed), labels=None if name == "micrographs" else labels)
            writer.info["preparation"] = preparation.to_dict()
        made[name] = writer.result
    return made


@pytest.fixture(scope="module")
def trained(sets, tmp_path_factory) -> tuple[Path, list[dict[str, float]]]:
    """A segmenter that has learned a little, with what the stage told on the way."""
    told: list[dict[str, float]] = []
    folder = tmp_path_factory.mktemp("trained") / "segmenter"
    return stages.run_train_segmenter(SMALL, *sets.values(), folder, lambda _, figures: told.append(figures)), told


class TestStage:
    def test_training_leaves_a_calibration_that_orders_grains_it_has_not_seen(self, trained):
        model = TrainedSegmenter.load(trained[0], "cpu")
        assert set(model.calibration.weights) == set(FEATURES)
        confidence, right = [], []
        for seed in range(20, 32):
            image, labels = picture(seed)
            maps = predict_maps(model.network, image, "auto")
            found = instances(maps, model.cut)
            confidence.append(grain_confidence(found, maps, model.calibration))
            right.append(right_grains(found, labels > 0))
        assert reliability(np.concatenate(confidence), np.concatenate(right))["auc"] > 0.7

    def test_its_figures_go_where_the_trainings_go(self, trained):
        folder, told = trained
        assert told[-1] == {f"confidence_{name}": value for name, value in TrainedSegmenter.load(folder, "cpu").calibration.figures.items()}
        assert not any("confidence" in name for name in pd.read_csv(folder / "history.csv"))

    def test_images_that_chose_the_epoch_are_not_among_those_it_learns_from(self, sets, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(stages, "calibrated", lambda segmenter, held_out, seed: seen.extend(held_out))
        stages.run_train_segmenter(SMALL.model_copy(update={"epochs": 1, "crops_per_image": 1}), *sets.values(), tmp_path / "segmenter")
        assert [image.tobytes() for image, _ in seen] == [sets["validation"].image(i).tobytes() for i in (1, 3, 5)]

    def test_the_same_segmenter_is_calibrated_to_the_same_bytes(self, trained, sets, tmp_path):
        model = TrainedSegmenter.load(trained[0], "cpu")
        held_out = [(sets["validation"].image(i), sets["validation"].labels(i)) for i in (1, 3, 5)]
        model.calibration = calibrated(model, held_out, SMALL.seed)
        model.save(tmp_path)
        assert (tmp_path / WEIGHTS).read_bytes() == (trained[0] / WEIGHTS).read_bytes()

    def test_one_specimen_in_two_looks_is_one(self, trained, sets, caplog):
        image, labels = sets["validation"].image(1), sets["validation"].labels(1)
        assert calibrated(TrainedSegmenter.load(trained[0], "cpu"), [(image, labels), (255 - image, labels)], 0) is None
        assert "1 validation images" in caplog.text


class TestSegmenter:
    def test_calibration_is_saved_and_loaded(self, tmp_path):
        model = TrainedSegmenter(build_network("Unet", "resnet18", None), Cut(30), Segmenter().model_dump())
        for calibration in (None, EVEN):
            model.calibration = calibration
            model.save(tmp_path)
            assert TrainedSegmenter.load(tmp_path, "cpu").calibration == calibration

    def test_an_earlier_segmenter_is_without(self, trained, tmp_path):
        weights, header = load_weights(trained[0] / WEIGHTS, "segmenter")
        del header["calibration"]
        save_weights(tmp_path / WEIGHTS, weights, header)
        assert TrainedSegmenter.load(tmp_path, "cpu").calibration is None
