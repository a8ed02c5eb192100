"""Metrics against an independent scorer and by hand; baseline, realism and overlays on images."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage as ndi
from skimage.metrics import structural_similarity

from graincast.config import Evaluate
from graincast.errors import UserError
from graincast.evaluate.baseline import local_threshold_segment
from graincast.evaluate.evaluation import BASELINE, check_masks, evaluate, match_masks
from graincast.evaluate.metrics import read_mask, score_grains, score_labels, score_particles
from graincast.evaluate.overlay import BOTH, PREDICTED, TRUE, overlay
from graincast.evaluate.realism import (
    EMBEDDED,
    HALVES,
    INTERVAL,
    REAL,
    SYNTHETIC,
    UNTEXTURED,
    Realism,
    distances,
    halvings,
    kernel_distances,
    kernel_figures,
    realism,
    set_realism,
    tsne,
)
from graincast.evaluate.realism_features import cut_patches, describe, encoder_features, nearest_ssim, vgg16_features, vgg16_file
from graincast.microscope.preparation import Preparation
from graincast.segment.instances import Cut
from graincast.segment.network import build_network, standardise
from graincast.segment.segmenter import Segmenter
from graincast.store.imageset import ImageSet, ImageSetWriter, folder_digest

SHARED = Path(__file__).parents[2] / "shared"
FIELDS = SHARED / "data" / "single-fields"
GRAIN_FIGURES = ["bf1_2px", "bf1_4px", "bf1_075", "iou_grain", "iou_boundary", "miou", "ap50", "pq",
                 "vi_split", "vi_merge", "count_ratio", "d_astm_g"]

needs_fields = pytest.mark.skipif(not FIELDS.is_dir(), reason="real micrographs not found at ../shared/data")


@pytest.fixture(scope="module")
def yardstick() -> ModuleType:
    path = SHARED / "score.py"
    if not path.exists():
        pytest.skip("independent scorer not found at ../shared/score.py")
    spec = importlib.util.spec_from_file_location("score", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def voronoi(shape: tuple[int, int], grains: int, seed: int, line: float = 1.0) -> np.ndarray:
    """Random Voronoi grains with lines of about `line` px."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (grains, 2)) * shape
    distances = np.linalg.norm(np.indices(shape)[..., None] - points.T[:, None, None, :], axis=0)
    first, second = np.sort(distances, axis=2)[..., :2].transpose(2, 0, 1)
    return np.where(second - first > line, distances.argmin(axis=2) + 1, 0).astype(np.int32)


def vary(labels: np.ndarray, seed: int) -> np.ndarray:
    """A flawed prediction: shifted, with merged grains, missing grains and specks."""
    rng = np.random.default_rng(seed)
    names = np.arange(labels.max() + 1)
    names[rng.integers(1, names.size, names.size // 5)] = rng.integers(0, names.size, names.size // 5)
    flawed = np.roll(names[labels], rng.integers(-4, 5, 2), axis=(0, 1)) * (labels > 0)
    for row, column in rng.integers(0, labels.shape, (8, 2)):
        flawed[row : row + rng.integers(1, 9), column : column + rng.integers(1, 9)] = flawed.max() + 1
    return flawed.astype(np.int32)


def drawn_micrograph(seed: int, noise: float = 6.0) -> tuple[np.ndarray, np.ndarray]:
    """A grey picture with dark lines, and its labels."""
    labels = voronoi((160, 200), 24, seed, line=3)
    rng = np.random.default_rng(seed)
    grey = ndi.gaussian_filter(np.where(labels > 0, 150.0, 70.0), 1) + rng.normal(0, noise, labels.shape)
    return grey.clip(0, 255).astype(np.uint8), labels


def assert_same(ours: dict[str, float], theirs: dict[str, float]) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name
        assert type(ours[name]) is float, name


# --- metrics against the yardstick ---


@pytest.mark.parametrize("seed", range(6))
def test_grain_scores_agree_with_the_yardstick(yardstick: ModuleType, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(60, 160)), int(rng.integers(60, 160)))
    truth = voronoi(shape, int(rng.integers(2, 40)), seed, line=rng.uniform(1, 6))
    pred = vary(truth, seed)
    assert_same(score_grains(pred, truth == 0), yardstick.score_grains(pred.astype(np.int64), truth == 0))
    assert_same(score_particles(pred, truth > 0), yardstick.score_particles(pred.astype(np.int64), truth > 0))


SPECK = np.pad(np.ones((5, 5), np.int32), (0, 5))
DEGENERATE = {
    "nothing": np.zeros((50, 60), np.int32),
    "one grain": np.ones((50, 60), np.int32),
    "specks alone": np.kron(np.arange(1, 31, dtype=np.int32).reshape(5, 6), SPECK),
    "two grains without a line": np.repeat([[1, 2]], 50, axis=0).repeat(30, axis=1).astype(np.int32),
    "many grains": voronoi((50, 60), 12, 0),
    "gaps in the numbering": voronoi((50, 60), 12, 0) * 100,
}


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:Mean of empty slice")
@pytest.mark.parametrize("pred", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("truth", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_maps_agree_with_the_yardstick(yardstick: ModuleType, pred: np.ndarray,
                                                  truth: np.ndarray) -> None:
    assert_same(score_grains(pred, truth == 0), yardstick.score_grains(pred.astype(np.int64), truth == 0))
    assert_same(score_particles(pred, truth > 0), yardstick.score_particles(pred.astype(np.int64), truth > 0))


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:Mean of empty slice")
@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=st.tuples(st.integers(3, 30), st.integers(3, 30)), zoom=st.integers(1, 6))
def test_arbitrary_maps_agree_with_the_yardstick(yardstick: ModuleType, data: st.DataObject,
                                                 shape: tuple[int, int], zoom: int) -> None:
    block = np.ones((zoom, zoom), np.int32)
    pred = np.kron(data.draw(hnp.arrays(np.int32, shape, elements=st.integers(0, 5))), block).astype(np.int32)
    truth = np.kron(data.draw(hnp.arrays(np.int32, shape, elements=st.integers(0, 1))), block) > 0
    assert_same(score_grains(pred, truth), yardstick.score_grains(pred.astype(np.int64), truth))
    assert_same(score_particles(pred, truth), yardstick.score_particles(pred.astype(np.int64), truth))


@needs_fields
@pytest.mark.parametrize(("stem", "published"), [
    ("perovskite_sem",
     {"bf1_2px": 0.640, "bf1_4px": 0.900, "miou": 0.716, "ap50": 0.869, "pq": 0.785, "d_astm_g": -0.12}),
    ("pure_iron_optical",
     {"bf1_2px": 0.861, "bf1_4px": 0.879, "miou": 0.784, "ap50": 0.536, "pq": 0.619, "d_astm_g": -0.66}),
])
def test_baseline_on_real_fields(yardstick: ModuleType, stem: str, published: dict[str, float]) -> None:
    """The figures that come with the micrographs, and the yardstick's of the same prediction."""
    mask = read_mask(FIELDS / "masks" / f"{stem}.png")
    assert (mask == yardstick.read_mask(FIELDS / "masks" / f"{stem}.png")).all()
    labels = local_threshold_segment(iio.imread(FIELDS / "images" / f"{stem}.png"))
    scores = score_grains(labels, mask)
    assert_same(scores, yardstick.score_grains(labels.astype(np.int64), mask))
    for name, value in published.items():
        assert scores[name] == pytest.approx(value, abs=0.006), name


# --- metrics by hand ---


def test_perfect_prediction_is_perfect() -> None:
    truth = voronoi((200, 240), 30, 1, line=2)
    scores = score_grains(truth, truth == 0)
    assert list(scores) == GRAIN_FIGURES
    assert scores["ap50"] == scores["count_ratio"] == 1
    assert scores["pq"] == pytest.approx(1, abs=1e-3)
    assert scores["bf1_2px"] == pytest.approx(1, abs=1e-2)  # skeletons of unlike masks end apart
    assert abs(scores["d_astm_g"]) + scores["vi_split"] + scores["vi_merge"] == pytest.approx(0, abs=1e-2)
    assert scores["iou_grain"] > 0.97
    particles = score_particles(truth, truth > 0)
    assert particles["iou_fg"] == particles["ap50"] == particles["pq"] == 1


def test_instance_scores_by_hand() -> None:
    # Truth: two particles of 40 and 60 px in 200. Prediction: the first whole, the second as 36 + 24 px, of
    # which the 24 px are a speck that does not count: 36 of 60 px in one piece, 24 px lost in the background.
    truth = np.zeros((10, 20), bool)
    truth[:, 0:4] = truth[:, 5:11] = True
    pred = np.zeros((10, 20), np.int32)
    pred[:, 0:4] = 1
    pred[0:6, 5:11] = 2
    pred[6:10, 5:11] = 3
    scores = score_particles(pred, truth)
    assert scores["iou_fg"] == 1
    assert scores["ap50"] == 1
    assert scores["pq"] == pytest.approx((1 + 36 / 60) / 2)
    entropy = lambda p: -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert scores["vi_split"] == pytest.approx(60 / 200 * entropy(0.6))
    assert scores["vi_merge"] == pytest.approx(124 / 200 * entropy(24 / 124))
    assert (scores["count_ratio"], scores["d_astm_g"]) == (1, 0)


def test_over_and_under_segmentation_tell_apart() -> None:
    truth = np.ones((40, 80), np.int32)
    truth[:, 40] = 0
    truth[:, 41:] = 2
    quarters = np.kron([[1, 2, 3, 4]], np.ones((40, 20), np.int32)).astype(np.int32)
    halves = np.kron([[1, 2]], np.ones((40, 40), np.int32)).astype(np.int32)
    split, merged = score_grains(quarters, truth == 0), score_grains(np.ones_like(truth), truth == 0)
    assert split["vi_split"] == pytest.approx(1, abs=0.15)
    assert split["vi_merge"] == pytest.approx(0, abs=0.15)
    assert (split["count_ratio"], split["d_astm_g"]) == (2, 1)
    assert (merged["vi_split"], merged["vi_merge"]) == (pytest.approx(0), pytest.approx(1, abs=0.01))
    assert (merged["count_ratio"], merged["d_astm_g"], merged["bf1_2px"]) == (0.5, -1, 0)
    assert score_grains(halves, truth == 0)["ap50"] == 1


@pytest.mark.parametrize(("shift", "within_2px", "within_4px"), [(1, 1, 1), (4, 0, 1), (8, 0, 0)])
def test_boundary_tolerances(shift: int, within_2px: float, within_4px: float) -> None:
    truth = np.zeros((60, 90), bool)
    truth[:, 40] = True
    pred = np.ones((60, 90), np.int32)
    pred[:, 40 + shift :] = 2
    scores = score_grains(pred, truth)
    assert scores["bf1_2px"] == within_2px
    assert scores["bf1_4px"] == within_4px


def test_line_thickness_does_not_count() -> None:
    truth = voronoi((150, 150), 15, 3, line=3)
    thin, thick = voronoi((150, 150), 15, 3, line=1), voronoi((150, 150), 15, 3, line=5)
    for pred in (thin, thick):
        scores = score_grains(pred, truth == 0)
        assert scores["bf1_2px"] > 0.95
        assert scores["ap50"] == 1
        assert scores["pq"] > 0.95


def test_no_prediction_scores_nothing() -> None:
    truth = voronoi((100, 100), 10, 0)
    scores = score_grains(np.zeros_like(truth), truth == 0)
    assert scores["ap50"] == scores["pq"] == scores["bf1_4px"] == scores["count_ratio"] == 0
    assert scores["d_astm_g"] == -math.inf


def test_instance_truth_equals_its_boundary_mask_where_lines_are_closed() -> None:
    truth = voronoi((120, 120), 16, 2, line=3)
    assert score_labels(vary(truth, 2), truth) == score_grains(vary(truth, 2), truth == 0)


def test_instance_truth_keeps_grains_apart_where_a_line_has_a_gap() -> None:
    truth = np.repeat([[1] * 30 + [0] * 2 + [2] * 30], 60, axis=0).astype(np.int32)
    gapped = truth.copy()
    gapped[25:28, 30:32] = 1
    assert score_labels(truth, gapped)["ap50"] == 1
    assert score_grains(truth, gapped == 0)["count_ratio"] == 2


def test_a_grain_through_a_periodic_border_counts_as_its_pieces() -> None:
    truth = np.repeat(np.repeat([[1, 2, 1]], 30, axis=1), 60, axis=0).astype(np.int32)
    truth[:, [29, 60]] = 0
    pred = np.where(np.arange(90) > 60, 3, truth).astype(np.int32)
    assert score_labels(pred, truth)["count_ratio"] == 1
    assert score_labels(pred, truth)["ap50"] == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_numbering_does_not_matter_and_scores_stay_in_range(seed: int) -> None:
    truth = voronoi((60, 70), 9, seed, line=2)
    pred = vary(truth, seed)
    before = pred.copy()
    scores = score_grains(pred, truth == 0)
    assert (pred == before).all()
    names = np.concatenate([[0], np.random.default_rng(seed).permutation(int(pred.max())) + 1])
    renumbered = score_grains(names[pred].astype(np.uint16), truth == 0)
    assert renumbered == pytest.approx(scores)
    assert all(0 <= scores[name] <= 1 for name in GRAIN_FIGURES[:8])
    assert scores["vi_split"] > -1e-9
    assert scores["vi_merge"] > -1e-9


def test_wrong_arrays_are_refused() -> None:
    labels = voronoi((40, 40), 4, 0)
    refused: list[tuple[Callable[..., dict[str, float]], np.ndarray, np.ndarray, str]] = [
        (score_grains, labels.astype(float), labels == 0, "2-D integer"),
        (score_grains, labels[:0], labels[:0] == 0, "2-D integer"),
        (score_grains, -labels, labels == 0, "start at 0"),
        (score_grains, labels, labels, "truth: want bool"),
        (score_grains, labels, (labels == 0)[1:], "truth: want bool"),
        (score_labels, labels, labels == 0, "truth: want integer"),
        (score_labels, labels, np.maximum(labels, 1), "no boundary pixel"),
        (score_particles, labels, labels, "truth: want bool"),
    ]
    for score, pred, truth, message in refused:
        with pytest.raises(ValueError, match=message):
            score(pred, truth)


# --- masks ---


@pytest.mark.parametrize("name", ["mask.png", "mask.tif", "colour.png", "bilevel.png"])
def test_masks_are_read(tmp_path: Path, name: str) -> None:
    mask = voronoi((40, 50), 5, 0) == 0
    image = mask.astype(np.uint8) * 255
    if name == "bilevel.png":
        Image.fromarray(mask).save(tmp_path / name)
    elif name.endswith("tif"):
        tifffile.imwrite(tmp_path / name, image)
    else:
        iio.imwrite(tmp_path / name, np.stack([image] * 3, axis=2) if name == "colour.png" else image)
    assert (read_mask(tmp_path / name) == mask).all()


def test_bad_masks_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.tif").write_text("no image")
    whole = iio.imwrite("<bytes>", np.eye(64, dtype=np.uint8) * 255, extension=".png")
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    tifffile.imwrite(tmp_path / "packed.tif", np.random.default_rng(0).integers(0, 2, (64, 64), np.uint8) * 255, compression="zlib")
    packed = (tmp_path / "packed.tif").read_bytes()
    (tmp_path / "packed.tif").write_bytes(packed[:-200])
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((9, 9), np.uint16))
    iio.imwrite(tmp_path / "ones.png", np.eye(9, dtype=np.uint8))
    for name in ("text.png", "text.tif", "cut.png", "packed.tif", "deep.tif", "ones.png", "absent.png"):
        with pytest.raises(UserError, match=name) as caught:
            read_mask(tmp_path / name)
        assert "\n" not in str(caught.value)


def lay_out(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(folder / name, np.zeros((8, 9), np.uint8))


def matched(micrographs: Path, masks: Path) -> list[tuple[str, str]]:
    return [(image.relative_to(micrographs).as_posix(), mask.relative_to(masks).as_posix()) for image, mask in match_masks(micrographs, masks)]


def test_masks_within_the_micrographs_folder_and_round_about(tmp_path: Path) -> None:
    lay_out(tmp_path, "a.tif", "b.tif", "c.tif", "masks/a.png", "masks/b.png", "masks/d.png")
    assert matched(tmp_path, tmp_path / "masks") == [("a.tif", "a.png"), ("b.tif", "b.png")]
    lay_out(tmp_path / "other", "a.png", "images/a.png")
    assert matched(tmp_path / "other" / "images", tmp_path / "other") == [("a.png", "a.png")]
    assert match_masks(tmp_path / "a.tif", tmp_path / "masks") == [(tmp_path / "a.tif", tmp_path / "masks" / "a.png")]
    with pytest.raises(UserError):
        match_masks(tmp_path, tmp_path)


def test_masks_of_equal_names_go_by_sub_folder(tmp_path: Path) -> None:
    lay_out(tmp_path / "in", "1/a.tif", "2/a.tif", "2/b.tif")
    lay_out(tmp_path / "masks", "1/a.png", "2/a.png", "b.png")
    assert matched(tmp_path / "in", tmp_path / "masks") == [("1/a.tif", "1/a.png"), ("2/a.tif", "2/a.png"), ("2/b.tif", "b.png")]
    lay_out(tmp_path / "flat", "a.png")
    with pytest.raises(UserError, match=r"2 micrographs.*called 'a'"):
        match_masks(tmp_path / "in", tmp_path / "flat")
    lay_out(tmp_path / "twice", "b.png", "x/b.png")
    with pytest.raises(UserError, match=r"2 masks.*called 'b'"):
        match_masks(tmp_path / "in", tmp_path / "twice")


def test_sizes_of_masks_are_checked_beforehand(tmp_path: Path) -> None:
    lay_out(tmp_path, "a.tif", "a.png", "b.png")
    (tmp_path / "broken.tif").write_text("no image")
    check_masks([(tmp_path / "a.tif", tmp_path / "a.png"), (tmp_path / "broken.tif", tmp_path / "b.png")])
    iio.imwrite(tmp_path / "b.png", np.zeros((9, 9), np.uint8))
    with pytest.raises(UserError, match=r"b\.png has 9 x 9 px, but a\.tif has 9 x 8"):
        check_masks([(tmp_path / "a.tif", tmp_path / "b.png")])


# --- evaluation of files ---


class DarkLines(torch.nn.Module):
    """The simplest segmenter there is: what is darker than the mean is a boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(4.0))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.gain * torch.cat([-image - 0.5, image], dim=1)


def test_masked_files_that_are_refused_are_skipped_and_told(tmp_path: Path) -> None:
    preparation = Preparation(None, 1.0, 24.0, 0.01, 96.0, True, 64, 0.5, 0.01, None)
    segmenter = Segmenter(DarkLines().eval(), Cut(30), {"precision": "float32"}, preparation)
    image, labels = drawn_micrograph(0)
    with ImageSetWriter(tmp_path / "set", "synthetic") as writer:
        writer.add(image, id="0", labels=labels)
    for name, pixels in (("good", image), ("dim", image.astype(np.uint16) * 16), ("flat", np.full_like(image, 90))):
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels)
    (tmp_path / "text.tif").write_text("no image")
    iio.imwrite(tmp_path / "mask.png", (labels == 0).astype(np.uint8) * 255)
    pairs = [(tmp_path / f"{name}.tif", tmp_path / "mask.png") for name in ("good", "dim", "flat", "text")]
    result = evaluate(segmenter, writer.result, [0], writer.result, Evaluate(overlays=1), masked=pairs, masked_set="files")
    scores = result.scores[result.scores.set == "files"].set_index(["method", "image"])
    assert set(scores.index.get_level_values("image")) == {"good", "dim"}
    baseline = scores.loc[BASELINE]
    assert baseline.pq["dim"] == pytest.approx(baseline.pq["good"], abs=0.02)  # twelve bits in sixteen are no handicap
    assert baseline.pq["good"] > 0.5
    assert "no contrast" in result.skipped["flat"]
    assert "cannot be read" in result.skipped["text"]
    assert str(tmp_path) not in str(result.skipped)
    with pytest.raises(UserError, match=r"none of the 2 micrographs.*flat: no contrast"):
        evaluate(segmenter, writer.result, [0], writer.result, Evaluate(), masked=pairs[2:])
    iio.imwrite(tmp_path / "mask.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(UserError, match=r"mask\.png has 8 x 8 px, but good\.tif"):
        evaluate(segmenter, writer.result, [0], writer.result, Evaluate(), masked=pairs)


# --- baseline ---


def test_baseline_finds_drawn_grains() -> None:
    image, labels = drawn_micrograph(4)
    before = image.copy()
    found = local_threshold_segment(image)
    assert (image == before).all()
    assert (found.dtype, found.shape) == (np.int32, image.shape)
    assert set(np.unique(found)) == set(range(found.max() + 1))
    scores = score_grains(found, labels == 0)
    assert scores["ap50"] > 0.9
    assert (local_threshold_segment(image, window=50) == found).all()


def test_baseline_on_flat_and_wrong_images() -> None:
    assert local_threshold_segment(np.full((50, 50), 90, np.uint8)).max() == 1
    with pytest.raises(ValueError, match="uint8"):
        local_threshold_segment(np.zeros((50, 50)))


# --- realism ---


@pytest.fixture(scope="module")
def real() -> list[np.ndarray]:
    return [drawn_micrograph(seed)[0] for seed in range(6)]


@pytest.fixture(scope="module")
def alike() -> list[np.ndarray]:
    return [drawn_micrograph(seed)[0] for seed in range(10, 16)]


def compared(real: list[np.ndarray], synthetic: list[np.ndarray], patch: int = 64, seed: int = 0) -> dict[str, float]:
    """Figures of texture by name, the floors as ``X_floor``."""
    rng = np.random.default_rng(seed)
    sets = cut_patches({REAL: real, SYNTHETIC: synthetic}, patch, seed)
    rows = distances({name: describe(patches.grey) for name, patches in sets.items()}, sets, halvings(sets[REAL].image, rng), rng)
    return {f"{row['figure']}_floor" if row["set"] == REAL else row["figure"]: row["value"] for row in rows}


def test_images_alike_lie_near_the_floor(real: list[np.ndarray], alike: list[np.ndarray]) -> None:
    figures = compared(real, alike)
    names = [name for name in figures if not name.endswith("_floor")]
    assert sorted(figures) == sorted(names + [f"{name}_floor" for name in names])
    for name in names:
        assert math.isfinite(figures[name])
        assert figures[name] < 3 * abs(figures[f"{name}_floor"]) + 0.2, name


FLAWS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], list[str]]] = {
    "brightness": (lambda image: image + np.uint8(20), ["intensity_distance"]),
    "blur": (lambda image: ndi.gaussian_filter(image, 2),
             ["sharpness_distance", "spectrum_distance", "spectral_slope_distance", "entropy_distance",
              "texture_kid"]),
    "inversion": (lambda image: 255 - image, ["intensity_distance"]),
    "flatness": (lambda image: np.full_like(image, 128),
                 ["entropy_distance", "sharpness_distance", "texture_kid"]),
    "striping": (lambda image: (image // 2 + 20 * (np.arange(image.shape[0])[:, None] % 4)).astype(np.uint8),
                 ["spectrum_distance", "texture_kid"]),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_each_flaw_is_seen_by_its_figures(real: list[np.ndarray], alike: list[np.ndarray], flaw: str) -> None:
    spoil, names = FLAWS[flaw]
    figures = compared(real, [spoil(image) for image in alike])
    for name in names:
        assert figures[name] > 3 * figures[f"{name}_floor"], name


def test_intensity_and_entropy_distances_by_hand() -> None:
    half = np.zeros((64, 64), np.uint8)
    half[:, ::2] = 100  # entropy 1 bit
    figures = compared([half] * 2, [np.full((64, 64), 90, np.uint8)] * 2)
    assert figures["intensity_distance"] == pytest.approx((90 + 10) / 2)
    assert figures["entropy_distance"] == pytest.approx(1)
    assert figures["intensity_distance_floor"] == figures["entropy_distance_floor"] == 0


def test_sharpness_of_a_ramp_is_its_slope() -> None:
    ramp = np.tile(np.arange(0, 192, 3, dtype=np.uint8), (64, 1))
    figures = compared([ramp] * 2, [np.zeros_like(ramp)] * 2)
    assert figures["sharpness_distance"] == pytest.approx(3)


def test_spectrum_of_known_noise() -> None:
    rng = np.random.default_rng(0)
    weak, strong = (rng.normal(128, spread, (6, 256, 256)).round().astype(np.uint8) for spread in (8, 16))
    figures = compared(weak, strong)
    assert figures["spectrum_distance"] == pytest.approx(20 * math.log10(2), abs=0.2)  # twice the amplitude
    assert figures["spectral_slope_distance"] < 0.05  # both white
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256))
    frequency[0, 0] = np.inf
    pink = [np.fft.irfft2(np.fft.rfft2(image - 128.0) / frequency) for image in strong]
    scaled = [(128 + 25 * image / image.std()).clip(0, 255).astype(np.uint8) for image in pink]
    falling_as_f2 = compared(strong, scaled)
    assert falling_as_f2["spectral_slope_distance"] == pytest.approx(2, abs=0.4)


def test_unbiased_kernel_distance_averages_to_zero() -> None:
    rng = np.random.default_rng(0)
    values = []
    for k in range(20):
        pair = rng.normal(128, 12, (2, 128, 128)).clip(0, 255).astype(np.uint8)
        values.append(compared(pair[:1], pair[1:], patch=32, seed=k)["texture_kid"])
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))


def test_texture_figures_are_reproducible_and_takes_one_small_image_a_set(real: list[np.ndarray]) -> None:
    one, other = real[0][:40, :16], real[1][:21, :50]
    first = compared([one], [other])
    assert first == compared([one], [other])
    assert all(math.isfinite(value) for value in first.values())


def test_entropies_by_hand() -> None:
    image = np.zeros((64, 128), np.uint8)
    image[:, 64:] = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    patches = cut_patches({"a": [image, image[:, :64]]}, patch=32)["a"]
    assert describe(patches.grey)["entropy"] == pytest.approx([0, 0, 5, 5, 0, 0, 5, 5, 0, 0, 0, 0])
    assert patches.image.tolist() == [0] * 8 + [1] * 4


def test_patches_of_sets_of_one_shape_lie_at_the_same_places() -> None:
    place = np.arange(400 * 400).reshape(400, 400)
    sets = cut_patches({"low": [(place % 256).astype(np.uint8)] * 40, "high": [(place // 256 % 256).astype(np.uint8)] * 40}, patch=16)
    assert len(sets["low"]) == len(sets["high"]) == 600
    low, high = (sets[name].grey.astype(int) for name in ("low", "high"))
    assert (np.diff(high[:, 0] * 256 + low[:, 0], axis=1) % 2**16 == 1).all()


def test_realism_refuses_what_it_cannot_compare(real: list[np.ndarray]) -> None:
    for one, other in ((real, []), ([], real)):
        with pytest.raises(ValueError, match="got none"):
            compared(one, other)
    with pytest.raises(ValueError, match="patch must be"):
        compared(real, real, patch=4)
    for wrong in (real[0].astype(float), real[0][..., None], real[0][:9]):
        with pytest.raises(ValueError, match="2-D uint8"):
            compared(real, [wrong])


def mmd(a: np.ndarray, b: np.ndarray) -> float:
    """1000 times the unbiased MMD^2 with the kernel (x . y + 1)^3, a pair at a time."""
    def mean(one: np.ndarray, other: np.ndarray, skip: bool) -> float:
        return float(np.mean([(float(np.dot(x, y)) + 1) ** 3 for i, x in enumerate(one) for j, y in enumerate(other) if not (skip and i == j)]))

    return 1000 * (mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False))


def test_kernel_distances_against_the_definition() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random((9, 5)), rng.random((7, 5)) + 0.2
    of_a, of_b = np.ones((3, 9), bool), np.ones((3, 7), bool)
    of_a[1, :4], of_b[2, ::2] = False, False
    expected = [mmd(a[rows], b[others]) for rows, others in zip(of_a, of_b, strict=True)]
    np.testing.assert_allclose(kernel_distances(a, b, of_a, of_b), expected, rtol=1e-9)


def test_intervals_cover_the_truth_and_the_floor_of_one_distribution_is_zero() -> None:
    """Of many draws from two distributions of known distance, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(0)
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)
    draw = lambda count, shift: unit(rng.normal(shift, 1, (count, 6)))
    everything = lambda rows: np.ones((1, len(rows)), bool)
    many, shifted = draw(4000, 1.0), draw(4000, 1.3)
    truth = kernel_distances(many, shifted, everything(many), everything(shifted))[0]
    image = cut_patches({"a": [np.zeros((80, 80), np.uint8)]}, patch=8)["a"]  # a hundred patches of one image
    held, floors = [], []
    for _ in range(60):
        floor, other = kernel_figures("kid", {REAL: draw(100, 1.0), SYNTHETIC: draw(100, 1.3)}, {REAL: image, SYNTHETIC: image}, rng)
        held.append(other["low"] <= truth <= other["high"])
        floors.append(floor["value"])
        assert floor["low"] < 0 < floor["high"]
    assert np.mean(held) >= 0.85
    assert abs(np.mean(floors)) < 0.1 * truth
    assert INTERVAL == (2.5, 97.5)


def test_halves_part_whole_images_where_there_are_several() -> None:
    rng = np.random.default_rng(0)
    origin = np.repeat(np.arange(5), 7)
    for half in halvings(origin, rng):
        shares = [half[origin == image].mean() for image in range(5)]
        assert sorted(shares) == [0, 0, 0, 1, 1]
    assert (halvings(np.zeros(10, int), rng).sum(axis=1) == 5).all()


def test_nearest_ssim_against_scikit_image(real: list[np.ndarray]) -> None:
    patches = cut_patches({"a": real[:1], "b": real[1:2]}, patch=48)
    a, b = patches["a"].grey[:4], patches["b"].grey[:5]
    pairs = np.array([[structural_similarity(x, y, data_range=255) for y in b] for x in a])
    np.testing.assert_allclose(nearest_ssim(a, b, stride=1), pairs.max(axis=1), atol=1e-4)
    allowed = np.arange(5) != np.arange(4)[:, None]
    np.testing.assert_allclose(nearest_ssim(a, b, allowed, stride=1), np.where(allowed, pairs, -1).max(axis=1), atol=1e-4)
    np.testing.assert_allclose(nearest_ssim(a, b), pairs.max(axis=1), atol=0.05)  # every fourth window


def test_ssim_of_the_same_patches_is_one(real: list[np.ndarray]) -> None:
    grey = cut_patches({"a": real})["a"].grey
    np.testing.assert_allclose(nearest_ssim(grey, grey), 1, atol=1e-4)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """Random weights, with the statistics of its normalisations taken from micrographs as training does."""
    torch.manual_seed(0)
    network = build_network("Unet", "resnet18", None)
    images = np.stack([standardise(drawn_micrograph(seed)[0])[:160, :192] for seed in range(40, 44)])
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        network(torch.from_numpy(images)[:, None])
    return network.eval()


def test_encoder_features_see_neither_brightness_nor_contrast(real: list[np.ndarray], network: torch.nn.Module) -> None:
    sets = cut_patches({"a": real[:1], "b": [(60 + real[0] // 2).astype(np.uint8)]}, patch=40)
    features = {name: encoder_features(network, patches) for name, patches in sets.items()}
    assert features["a"].shape == (len(sets["a"]), 512)
    difference = np.abs(features["a"] - features["b"]).mean()
    assert difference < 0.1 * features["a"].std()
    assert features["a"].std(axis=0).mean() > 0


@pytest.mark.parametrize("patch", [64, 9])
def test_vgg16_is_read_from_torch_home_and_never_fetched(real: list[np.ndarray], patch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    patches = cut_patches({"a": real[:1]}, patch)["a"].take(np.arange(3))
    with pytest.raises(FileNotFoundError, match="vgg16-397923af"):
        vgg16_features(patches)
    vgg16_file().parent.mkdir(parents=True)
    torch.manual_seed(0)
    model = torchvision.models.vgg16()
    torch.save(model.state_dict(), vgg16_file())
    features = vgg16_features(patches)
    assert features.shape == (3, 512)
    if patch == 64:
        prepare = torchvision.models.VGG16_Weights.IMAGENET1K_V1.transforms(resize_size=64, crop_size=64)
        inputs = torch.stack([prepare(Image.fromarray(grey).convert("RGB")) for grey in patches.grey])
        with torch.no_grad():
            np.testing.assert_allclose(features, model.eval().features[:-1](inputs).mean(dim=(2, 3)), rtol=1e-3, atol=1e-5)


def test_maps_keep_groups_together_and_are_reproducible() -> None:
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(centre, 1, (60, 8)) for centre in (0, 12)]).astype(np.float32)
    places = tsne(features, 0)
    assert places.shape == (120, 2)
    assert (places == tsne(features, 0)).all()
    nearest = np.linalg.norm(places[:, None] - places, axis=2)
    np.fill_diagonal(nearest, np.inf)
    assert ((nearest.argmin(axis=1) < 60) == (np.arange(120) < 60)).all()


@pytest.fixture(scope="module")
def run_sets(real: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageSet]:
    """Micrographs; morphologies; and those with the micrographs' grain and noise, two copies of each, one dropped."""
    folder = tmp_path_factory.mktemp("run")
    writers = {name: ImageSetWriter(folder / name, name) for name in ("micrographs", "morphologies", "synthetic")}
    with writers["micrographs"] as micrographs, writers["morphologies"] as morphologies, writers["synthetic"] as synthetic:
        for k, image in enumerate(real):
            micrographs.add(image, id=f"m{k}")
        for k in range(20, 26):
            image, labels = drawn_micrograph(k)
            morphologies.add(np.where(labels, 200, 60).astype(np.uint8), id=f"s{k}", labels=labels)
            if k != 23:
                synthetic.add(image, id=f"s{k}-0", labels=labels, morphology=f"s{k}", look="translated", fidelity=0.9)
                synthetic.add(255 - image, id=f"s{k}-1", labels=labels, morphology=f"s{k}", look="translated", fidelity=0.9)
    return {name: writer.result for name, writer in writers.items()}


@pytest.fixture(scope="module")
def found(run_sets: dict[str, ImageSet], network: torch.nn.Module) -> Realism:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", "/nowhere")
        return set_realism(run_sets["micrographs"], run_sets["synthetic"], run_sets["morphologies"], network)


def test_untextured_pictures_are_further_away_than_translated_ones(found: Realism) -> None:
    figures = found.summary
    for name in ("intensity_distance", "entropy_distance", "sharpness_distance", "spectrum_distance", "texture_kid", "encoder_kid"):
        assert figures[name][UNTEXTURED] > 3 * figures[name][SYNTHETIC], name
        assert figures[name][UNTEXTURED] > 3 * figures[name][REAL], name
    for name in ("texture_kid", "encoder_kid"):
        assert figures[name]["synthetic_low"] < figures[name][SYNTHETIC] < figures[name]["synthetic_high"] < figures[name]["untextured_low"]
    assert abs(figures["ssim_nearest"][SYNTHETIC] - figures["ssim_nearest"][REAL]) < 0.05
    assert figures["label_fidelity"][UNTEXTURED] > 0.8
    assert figures["label_fidelity"][SYNTHETIC] == pytest.approx(0.9), "as measured when the images were drawn"


def test_realism_holds_all_that_is_drawn(found: Realism, run_sets: dict[str, ImageSet]) -> None:
    (note,) = found.notes
    assert note.startswith("Features of VGG16 were not compared: its weights, vgg16-397923af.pth, are not on this machine")
    patches = found.patches
    assert len(found.fidelity) == 2 * 5  # of each morphology the first copy; the dropped one is left out
    assert patches.groupby("set")["image"].nunique().to_dict() == {REAL: 6, SYNTHETIC: 5, UNTEXTURED: 5}
    embedded = patches["encoder_x"].notna()
    assert (embedded.groupby(patches["set"]).sum() == patches.groupby("set").size().clip(upper=EMBEDDED)).all()
    assert set(patches.loc[patches["set"] == REAL, "half"]) == set(HALVES)
    assert patches.loc[patches["set"] != REAL, "half"].isna().all()
    shares = found.curves[found.curves["curve"] == "intensity"].groupby("set")["value"].sum()
    assert shares.to_dict() == pytest.approx(dict.fromkeys((REAL, SYNTHETIC, UNTEXTURED, *HALVES), 1))
    (k, y, x), side = _place(run_sets["synthetic"], found.surfaces[SYNTHETIC]), len(found.surfaces[SYNTHETIC])
    morphology = list(run_sets["morphologies"].rows["id"]).index(run_sets["synthetic"].rows["morphology"][k])
    np.testing.assert_array_equal(run_sets["morphologies"].image(morphology)[y : y + side, x : x + side], found.surfaces[UNTEXTURED])


def _place(images: ImageSet, patch: np.ndarray) -> tuple[int, int, int]:
    """Number of the image that holds a patch, and where in it."""
    side = len(patch)
    return next((k, y, x) for k, image in enumerate(images) for y in range(0, image.shape[0] - side + 1, side)
                for x in range(0, image.shape[1] - side + 1, side) if (image[y : y + side, x : x + side] == patch).all())


def test_realism_comes_back_from_disk_and_out_the_same_twice(found: Realism, run_sets: dict[str, ImageSet], network: torch.nn.Module, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    again = set_realism(run_sets["micrographs"], run_sets["synthetic"], run_sets["morphologies"], network)
    for name, result in (("first", found), ("second", again)):
        (tmp_path / name).mkdir()
        result.save(tmp_path / name)
    assert folder_digest(tmp_path / "first") == folder_digest(tmp_path / "second")
    loaded = Realism.load(tmp_path / "first")
    for name in ("figures", "patches", "curves", "fidelity"):
        pd.testing.assert_frame_equal(getattr(loaded, name), getattr(found, name), rtol=1e-4)
    assert loaded.notes == found.notes
    assert all((loaded.surfaces[name] == patch).all() for name, patch in found.surfaces.items())


def test_realism_of_one_image_a_set(real: list[np.ndarray], network: torch.nn.Module) -> None:
    image, labels = drawn_micrograph(30)
    few = realism(real[:1], [image], [np.where(labels, 200, 60).astype(np.uint8)], [labels], [1.0], network)
    assert all(math.isfinite(value) for values in few.summary.values() for value in values.values())
    assert few.patches["ssim"].max() < 1  # a real patch is not its own neighbour


def test_realism_refuses_sets_that_do_not_belong_together(real: list[np.ndarray], run_sets: dict[str, ImageSet], network: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="a picture, labels of the same shape and a label fidelity for each synthetic image"):
        realism(real, real[:2], real[:1], real[:1], [1.0], network)
    with pytest.raises(ValueError, match="lacks the morphology s2"):
        set_realism(run_sets["micrographs"], run_sets["synthetic"], run_sets["micrographs"], network)


# --- overlays ---


def coloured(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == colour).all(axis=2)


def test_overlay_draws_thin_lines_where_they_belong() -> None:
    image = np.full((60, 80), 100, np.uint8)
    labels = np.ones((60, 80), np.int32)
    labels[:, 36:44] = 0
    labels[:, 44:] = 2
    truth = np.zeros((60, 80), bool)
    truth[18:25] = True
    plain, both = overlay(image, labels), overlay(image, labels, truth)
    assert (plain.dtype, plain.shape) == (np.uint8, (60, 80, 3))
    assert set(np.flatnonzero(coloured(plain, PREDICTED).any(axis=0))) == {39, 40}
    assert (plain[~coloured(plain, PREDICTED)] == 100).all()
    assert np.median(coloured(both, TRUE).sum(axis=0)) == 2
    assert coloured(both, BOTH).any()
    assert coloured(both, PREDICTED)[:15, 39:41].all()


def test_overlay_leaves_the_info_bar_alone() -> None:
    image = np.full((60, 80), 100, np.uint8)
    labels = np.kron([[1, 2], [3, 4]], np.ones((25, 40), np.int32)).astype(np.int32)
    labels = np.pad(labels, ((0, 10), (0, 0)))
    field = np.zeros((60, 80), bool)
    field[:50] = True
    picture = overlay(image, labels, field=field)
    assert (picture[50:] == 100).all()
    assert (picture[48:50, :30] == 100).all()
    assert coloured(picture, PREDICTED)[:50, 39:41].all()


def test_overlay_of_nothing_and_of_wrong_shapes() -> None:
    image = np.full((30, 30), 7, np.uint8)
    assert (overlay(image, np.zeros((30, 30), np.int32)) == 7).all()
    with pytest.raises(ValueError, match="shape"):
        overlay(image, np.zeros((30, 31), np.int32))
    with pytest.raises(ValueError, match="uint8"):
        overlay(image.astype(float), np.zeros((30, 30), np.int32))
