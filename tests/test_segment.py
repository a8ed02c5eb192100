"""Targets, augmentation, training, tiled prediction and closed instances."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import save_file
from scipy import ndimage as ndi
from skimage import measure, segmentation
from torch import nn

from graincast.compute import ahead, load_weights, save_weights
from graincast.config import Augment, Segmenter, Simulate
from graincast.errors import UserError
from graincast.evaluate.metrics import score_labels
from graincast.segment.augment import augmented_crop, imitate
from graincast.segment.instances import Cut, instances
from graincast.segment.network import DEPTH_PX, build_network, targets
from graincast.segment.segmenter import HALO, TILE, WEIGHTS, predict_maps
from graincast.segment.segmenter import Segmenter as TrainedSegmenter
from graincast.segment.train import _batches, train_segmenter
from graincast.simulate.structure import simulate_structure
from graincast.surface import texture

QUIET = Augment(warp=0, relief=0, tones=0, mottle=0, veins=0, specks=0, scratches=0, gamma=1, gain=0, offset=0, blur_px=0, noise=0,
                line_noise=0, zoom=1)
"""No effect at all."""
CUT = Cut(30, merge_level=0)
SMALL = Segmenter(epochs=2, crops_per_image=2, batch=2, crop=64, device="cpu")


@pytest.fixture(scope="module")
def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    config = Simulate(size=128, grains=18, steps=300, area_spread=0.2)
    return [simulate_structure(config, index) for index in range(4)]


@pytest.fixture(scope="module")
def trained(pairs) -> TrainedSegmenter:
    return train_segmenter(pairs[:3], pairs[3:], SMALL)


class TestAhead:
    def test_order_is_kept_whatever_finishes_first(self):
        def slow_when_even(number: int) -> int:
            time.sleep(0.02 * (number % 2 == 0))
            return number

        assert list(ahead(slow_when_even, range(9), threads=4)) == list(range(9))

    @pytest.mark.parametrize("threads", [0, 1, 3])
    def test_a_failure_reaches_the_consumer_in_its_turn(self, threads):
        results = ahead(lambda number: 6 // number, [1, 2, 0, 3], threads=threads)
        assert [next(results), next(results)] == [6, 3]
        with pytest.raises(ZeroDivisionError):
            next(results)

    def test_no_more_is_made_than_soon_needed(self):
        made = []
        results = ahead(made.append, range(100), threads=2)
        next(results)
        results.close()
        assert len(made) <= 5


class TestTargets:
    def test_line_and_depth(self, pairs):
        line, depth = targets(pairs[0][1])
        assert set(np.unique(line)) == {0.0, 1.0}
        assert np.array_equal(depth, np.minimum(ndi.distance_transform_edt(line == 0) / DEPTH_PX, 1).astype(np.float32))
        assert measure.label(line == 0, connectivity=1).max() == pairs[0][1].max()

    def test_do_not_depend_on_the_width_of_the_zeros(self, pairs):
        labels = pairs[0][1]
        thick = np.where(ndi.grey_erosion(labels, 3) != ndi.grey_dilation(labels, 3), 0, labels)
        line, thick_line = targets(labels)[0], targets(thick)[0]
        assert (ndi.distance_transform_edt(line == 0)[thick_line > 0] <= 2).mean() > 0.98

    def test_one_grain(self):
        line, depth = targets(np.ones((8, 8), np.int32))
        assert not line.any()
        assert (depth == 1).all()


class TestInstances:
    def test_perfect_maps_give_the_truth(self, pairs):
        for _, labels in pairs:
            found = instances(targets(labels), replace(CUT, merge_level=0.5))
            assert len(np.unique(found)) <= labels.max()
            for grain in (labels == one for one in range(1, labels.max() + 1)):
                if grain.sum() > 40:  # px; slivers that the border cuts off, up to 3 px deep, may go to the grain beside them
                    same = found == np.bincount(found[grain]).argmax()
                    assert (grain & same).sum() / (grain | same).sum() > 0.5
            assert found.min() == 1

    def test_broken_boundary_is_closed(self):
        labels = np.zeros((60, 60), np.int32)
        labels[:, :29], labels[:, 31:] = 1, 2
        line, depth = targets(labels)
        line[25:35] = 0  # a gap of 10 px in the line; the depth still dips there
        assert instances(np.stack([line, depth]), replace(CUT, merge_level=0.5)).max() == 2

    def test_small_grains_go_to_their_neighbours(self):
        labels = np.ones((60, 60), np.int32)
        labels[20:24, 20:24] = 2
        maps = np.stack([segmentation.find_boundaries(labels).astype(np.float32), np.where(labels == 2, 0.9, 0.8).astype(np.float32)])
        maps[1][maps[0] > 0] = 0
        assert instances(maps, replace(CUT, smallest_px=0)).max() == 2
        assert instances(maps, replace(CUT, smallest_px=60)).max() == 1

    def test_smallest_grain_follows_the_scale(self):
        maps = targets(np.kron([[1, 2], [3, 4]], np.ones((20, 20), np.int32)))
        assert instances(maps, replace(CUT, smallest_px=500)).max() == 4, "all too small: none is dissolved"
        maps = targets(np.kron([[1, 1, 1], [1, 2, 1], [1, 1, 1]], np.ones((20, 20), np.int32)))
        assert instances(maps, replace(CUT, smallest_px=250, merge_level=0.4)).max() == 2
        assert instances(maps, replace(CUT, smallest_px=250, merge_level=0.4), scale=0.5).max() == 1, "400 px are 100 at half the scale"

    def test_weak_boundaries_are_merged_weakest_first(self):
        labels = np.repeat(np.arange(1, 5), 20)[None].repeat(60, 0)  # four stripes
        maps = targets(labels)
        for boundary, strength in ((20, 0.9), (40, 0.3), (60, 0.6)):
            maps[0][:, boundary - 3 : boundary + 3] *= strength
        for level, left in ((0.0, 4), (0.45, 3), (0.75, 2), (1.01, 1)):
            assert instances(maps, replace(CUT, merge_level=level)).max() == left

    def test_a_boundary_with_a_gap_holds_and_a_few_dark_spots_do_not_make_one(self):
        labels = np.repeat([1, 2], 30)[None].repeat(60, 0)
        gap, spots = targets(labels), targets(labels)
        gap[0, 20:40] = 0  # a gap of 20 px of 60
        spots[0] *= (np.arange(60) % 10 == 0)[:, None]  # a spot every 10 px
        assert instances(gap, Cut(30)).max() == 2
        assert instances(spots, Cut(30)).max() == 1

    def test_a_flat_noisy_peak_is_one_grain(self):
        labels = np.kron(np.arange(1, 10).reshape(3, 3), np.ones((30, 30), np.int32))
        line, depth = targets(labels)
        noise = np.random.default_rng(0).normal(0, 0.01, depth.shape)
        for uneven in (np.minimum(depth + noise, 1), np.rint(256 * (depth + noise)) / 256):
            assert instances(np.stack([line, uneven.astype(np.float32)]), replace(CUT, smallest_px=0)).max() == 9

    def test_maps_that_are_not_finite_are_refused(self):
        maps = targets(np.kron([[1, 2]], np.ones((20, 20), np.int32)))
        maps[1, 3, 3] = np.nan
        with pytest.raises(UserError, match="not finite"):
            instances(maps, CUT)

    def test_nothing_seeds(self):
        for depth in (0, 0.5, 1):
            assert (instances(np.stack([np.zeros((9, 9)), np.full((9, 9), depth)]).astype(np.float32), CUT) == 1).all()


class TestAugmentation:
    def test_nothing_asked_nothing_done(self, pairs):
        image, labels = pairs[0]
        crop, ids = augmented_crop(image, labels, 128, QUIET, np.random.default_rng(0))
        turned = [(np.rot90(image, k)[:, ::flip], np.rot90(labels, k)[:, ::flip]) for k in range(4) for flip in (1, -1)]
        assert any(np.array_equal(crop, other) and np.array_equal(ids, others) for other, others in turned)

    def test_labels_stay_on_the_image(self, pairs):
        labels = pairs[0][1]
        image = np.where(labels == 0, 0, 200).astype(np.uint8)
        config = QUIET.model_copy(update={"zoom": 1.5})
        for seed in range(20):
            crop, ids = augmented_crop(image, labels, 64, config, np.random.default_rng(seed))
            assert crop.shape == ids.shape == (64, 64)
            assert ((crop < 100) == (ids == 0)).mean() > 0.95

    def test_noise_grows_with_the_signal_and_lines_are_rows(self):
        rng = np.random.default_rng(0)
        flat = np.repeat(np.array([[40.0, 160.0]], np.float32), 256, 0).repeat(128, 1)
        shot = QUIET.model_copy(update={"noise": 0.1})
        stds = np.mean([[imitate(flat, shot, rng)[:, half].std() for half in (slice(0, 128), slice(128, 256))] for _ in range(20)], axis=0)
        assert stds[1] / stds[0] == pytest.approx(2, rel=0.1)
        rows = imitate(flat, QUIET.model_copy(update={"line_noise": 0.1}), rng)
        assert rows.std(axis=0).mean() > 1
        assert rows[:, :128].std(axis=1).max() < 1e-3


    def test_bent_labels_stay_on_the_bent_image(self, pairs):
        labels = pairs[0][1]
        image = np.where(labels == 0, 0, 200).astype(np.uint8)
        config, moved = QUIET.model_copy(update={"warp": 0.3}), 0
        for seed in range(20):
            crop, ids = augmented_crop(image, labels, 128, config, np.random.default_rng(seed))
            straight, _ = augmented_crop(image, labels, 128, QUIET, np.random.default_rng(seed))
            assert ((crop < 100) == (ids == 0)).mean() > 0.95
            assert set(np.unique(ids)) <= set(np.unique(labels))
            moved += not np.array_equal(crop, straight)
        assert 4 <= moved <= 16

    @pytest.mark.parametrize("effect", ["relief", "tones", "mottle", "veins", "specks", "scratches"])
    def test_every_effect_of_texture_is_there_in_half_the_crops_and_as_strong_as_asked(self, pairs, effect):
        labels = pairs[0][1]
        grey = np.full(labels.shape, 128, np.float32)
        changes = []
        for strength in (0.1, 0.2):
            config = QUIET.model_copy(update={effect: strength})
            drawn = [texture(grey, labels, config, np.random.default_rng(seed)) - grey for seed in range(60)]
            assert all(np.isfinite(change).all() for change in drawn)
            changes.append(np.array([change.std() for change in drawn]))
        assert 0.3 < (changes[0] > 0.05).mean() <= (1.0 if effect == "mottle" else 0.75)  # mottle: any of four lengths
        np.testing.assert_allclose(changes[1], 2 * changes[0], rtol=1e-3, atol=1e-3)

    def test_relief_and_tones_follow_the_grains(self, pairs):
        """Between them, the grains explain the tones; within them, relief is a slope that averages to nothing but the dome."""
        labels = pairs[0][1]
        grey = np.full(labels.shape, 128, np.float32)
        explained = []
        for seed in range(20):
            change = texture(grey, labels, QUIET.model_copy(update={"tones": 0.3}), np.random.default_rng(seed))
            if change.std() > 1:
                means = ndi.mean(change, labels, np.arange(labels.max() + 1))
                explained.append(1 - (change - means[labels])[labels > 0].var() / change[labels > 0].var())
        assert np.mean(explained) > 0.85

    def test_one_grain_and_none(self):
        for labels in (np.ones((64, 64), np.int32), np.zeros((64, 64), np.int32)):
            for seed in range(8):
                assert np.isfinite(texture(np.full((64, 64), 99, np.float32), labels, Augment(), np.random.default_rng(seed))).all()


class Local(nn.Module):
    """A network whose pixels see no farther than 3 px, to tell a tiled prediction from a whole one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(2, 1, 7, 7, generator=generator) / 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, self.kernel, padding=3)


class TestPrediction:
    @pytest.mark.parametrize("shape", [(33, 47), (TILE, TILE), (TILE + 1, 300), (900, 1150)])
    def test_tiles_leave_no_trace(self, shape):
        image = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
        network = Local().eval()
        maps = predict_maps(network, image, "float32")
        grey = image.astype(np.float32)
        padded = np.pad((grey - grey.mean()) / grey.std(), HALO, mode="symmetric")
        with torch.no_grad():
            whole = torch.sigmoid(network(torch.from_numpy(padded)[None, None]))[0, :, HALO:-HALO, HALO:-HALO].numpy()
        assert maps.shape == (2, *shape)
        np.testing.assert_allclose(maps, whole, atol=1e-5)

    def test_gain_and_offset_do_not_matter(self, trained, pairs):
        image = pairs[3][0] // 2
        brighter = predict_maps(trained.network, image * 2 + 3, "float32")
        np.testing.assert_allclose(predict_maps(trained.network, image, "float32"), brighter, atol=1e-3)


class TestTraining:
    def test_learns_to_segment(self, pairs):
        figures = []
        segmenter = train_segmenter(pairs[:3], pairs[3:], Segmenter(epochs=12, crops_per_image=8, batch=4, crop=64, device="cpu", augment=QUIET),
                                    log=lambda epoch, row: figures.append(row))
        assert figures[-1]["train_loss"] < 0.5 * figures[0]["train_loss"]
        assert score_labels(segmenter.segment(pairs[3][0]), pairs[3][1])["ap50"] > 0.8

    def test_same_seed_same_bytes_and_round_trip(self, pairs, trained, tmp_path):
        again = train_segmenter(pairs[:3], pairs[3:], SMALL)
        for name, segmenter in (("a", trained), ("b", again)):
            (tmp_path / name).mkdir()
            segmenter.save(tmp_path / name)
        assert (tmp_path / "a" / "segmenter.safetensors").read_bytes() == (tmp_path / "b" / "segmenter.safetensors").read_bytes()
        loaded = TrainedSegmenter.load(tmp_path / "a", device="cpu")
        assert loaded.config == SMALL.model_dump()
        assert np.array_equal(loaded.segment(pairs[0][0]), trained.segment(pairs[0][0]))

    def test_a_segmenter_of_an_earlier_version_is_named(self, trained, tmp_path):
        trained.save(tmp_path)
        weights, header = load_weights(tmp_path / WEIGHTS, "segmenter")
        save_weights(tmp_path / WEIGHTS, weights, header | {"cut": {"smallest_px": 30, "seed_level": 0.5, "merge_level": 0.5}})
        with pytest.raises(UserError, match=r"earlier graincast.*train it anew"):
            TrainedSegmenter.load(tmp_path)

    def test_background_threads_do_not_show(self, pairs):
        config = SMALL.model_copy(update={"crops_per_image": 5})
        made = [list(_batches(pairs, config, np.random.default_rng(0), threads)) for threads in (0, 1, 3)]
        assert len(made[0]) == 10
        for other in made[1:]:
            assert all(torch.equal(a, b) for one, same in zip(made[0], other, strict=True) for a, b in zip(one, same, strict=True))

    def test_batches_differ_within_an_epoch_and_between_epochs(self, pairs):
        rng = np.random.default_rng(0)
        images = torch.cat([images for _ in range(2) for images, _ in _batches(pairs[:1], SMALL, rng, 1)]).flatten(1)
        assert len(images.unique(dim=0)) == len(images) == 4

    def test_stops_early(self, pairs):
        epochs = []
        config = SMALL.model_copy(update={"epochs": 40, "patience": 1, "learning_rate": 0.5})
        train_segmenter(pairs[:3], pairs[3:], config, log=lambda epoch, row: epochs.append(epoch))
        assert len(epochs) < 40

    @pytest.mark.parametrize(("training", "validation", "crop", "message"), [
        (0, 1, 64, "training set is empty"), (1, 0, 64, "validation set is empty"), (1, 1, 160, "smaller than segmenter.crop of 160 px")])
    def test_unusable_sets_are_named(self, pairs, training, validation, crop, message):
        with pytest.raises(UserError, match=message):
            train_segmenter(pairs[:training], pairs[:validation], SMALL.model_copy(update={"crop": crop}))

    def test_unknown_network_is_named(self):
        with pytest.raises(UserError, match=r"segmenter\.architecture 'Unet' with encoder 'resnet19'"):
            build_network("Unet", "resnet19", None)

    def test_missing_model_is_named(self, tmp_path):
        with pytest.raises(UserError, match="holds no segmenter"):
            TrainedSegmenter.load(tmp_path)


def test_trains_where_only_the_numerical_libraries_are():
    """No orchestration, tracking, versioning, table or instrument library is imported by either training."""
    program = """
        import sys
        blocked = "zenml mlflow dvc great_expectations evidently pandas pyarrow rsciio numba typer matplotlib jinja2"
        sys.modules.update(dict.fromkeys(blocked.split()))
        import numpy as np
        from graincast.config import Segmenter, Translator
        from graincast.segment.train import train_segmenter
        from graincast.synthesise.cyclegan.train import train_cyclegan
        labels = np.kron(np.arange(1, 17).reshape(4, 4), np.ones((16, 16), int)).astype(np.int32)
        labels[15::16] = labels[:, 15::16] = 0
        image = (labels * 15).astype(np.uint8)
        translator = train_cyclegan([(image, labels)], [image], Translator(steps=1, crop=32, filters=4, residual_blocks=0))
        translated = translator.to_sem(image, labels, 0)
        segmenter = train_segmenter([(translated, labels)], [(translated, labels)], Segmenter(epochs=1, crop=64))
        print(segmenter.segment(image).shape)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(64, 64)"


class TestPretrainedWeights:
    """Weights come from the hub's cache, or a clear sentence says that they cannot; a subprocess, as the hub reads its settings once."""

    PROGRAM = """
        from graincast.errors import UserError
        from graincast.segment.network import build_network
        try:
            print(float(build_network("Unet", "resnet18", "imagenet").encoder.conv1.weight.mean()))
        except UserError as error:
            print("refused:", error)
    """

    def run(self, home: Path) -> str:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(self.PROGRAM)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def test_without_a_network_the_sentence_says_what_works(self, tmp_path):
        assert "encoder_weights 'imagenet' cannot be built" in self.run(tmp_path)

    def test_cached_weights_are_loaded(self, tmp_path):
        source = smp.encoders.encoders["resnet18"]["pretrained_settings"]["imagenet"]
        folder = tmp_path / "hub" / f"models--{source['repo_id'].replace('/', '--')}" / "snapshots" / source["revision"]
        folder.mkdir(parents=True)
        weights = smp.encoders.get_encoder("resnet18", weights=None).state_dict()
        weights["conv1.weight"] = torch.full_like(weights["conv1.weight"], 0.25)
        save_file(weights, folder / "model.safetensors")
        settings = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "input_space": "RGB", "input_range": [0, 1], "num_classes": 1000}
        (folder / "config.json").write_text(json.dumps(settings))
        # three colour channels become one by summing, as segmentation-models-pytorch does
        assert float(self.run(tmp_path)) == pytest.approx(0.75)
