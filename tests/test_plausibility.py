"""The gate before the registry: good grain maps pass, and each way to be wrong is told."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage as ndi
from scipy.spatial import cKDTree
from skimage.segmentation import find_boundaries

from graincast.evaluate.plausibility import Result, doubts, has_gaps

SIZE, GRAINS = 256, 60
DIAMETER = math.sqrt(4 * SIZE**2 / (math.pi * GRAINS))


def voronoi(seed: int, count: int = GRAINS) -> np.ndarray:
    """Instance ids 1..count that tile a square."""
    seeds = np.random.default_rng(seed).uniform(0, SIZE, (count, 2))
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return cKDTree(seeds).query(np.stack([rows, columns], -1).reshape(-1, 2))[1].reshape(SIZE, SIZE).astype(np.int32) + 1


def micrograph(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Dark grooves on grey grains, with noise."""
    line = ndi.gaussian_filter(find_boundaries(labels, mode="thick").astype(float), 1.2)
    return np.clip(160 - 110 * line + 6 * np.random.default_rng(seed).standard_normal(labels.shape), 0, 255).astype(np.uint8)


def judge(found: list[np.ndarray], *, inverted: bool = False) -> list[str]:
    """Doubts about grain maps `found` in the micrographs of seeds 0, 1, ..."""
    images = [micrograph(voronoi(seed), seed) for seed in range(len(found))]
    return doubts([Result.of(255 - image if inverted else image, labels, DIAMETER) for image, labels in zip(images, found, strict=True)])


def test_the_true_grains_are_plausible_in_either_contrast():
    truth = [voronoi(seed) for seed in range(3)]
    assert judge(truth) == []
    assert judge(truth, inverted=True) == []


def test_one_poor_micrograph_among_many_is_no_reason():
    assert judge([voronoi(0), voronoi(1), np.ones((SIZE, SIZE), np.int32)]) == []


def test_no_boundaries_are_told():
    assert judge([np.ones((SIZE, SIZE), np.int32)] * 2) == ["it finds no boundary in 2 of 2 micrographs"]


def test_boundaries_beside_those_of_the_image_are_told():
    found = judge([voronoi(seed + 100) for seed in range(3)])
    assert any("do not lie where the images change" in sentence for sentence in found)


def test_lines_of_the_wrong_polarity_are_told():
    """Maps whose lines run beside the bright boundaries of the image, along the rims of the dark grains."""
    rims = []
    for seed in range(2):
        grains = voronoi(seed)
        inside = ndi.distance_transform_edt(~find_boundaries(grains, mode="thick")) > 4
        rims.append(np.where(inside, grains, GRAINS + 1))
    assert any("dark where the boundaries are bright" in sentence for sentence in judge(rims, inverted=True))
    assert any("dark where the boundaries are bright" in sentence for sentence in judge(rims))


@pytest.mark.parametrize(("count", "word"), [(8, "larger"), (600, "smaller")])
def test_grains_of_the_wrong_size_are_told(count, word):
    assert any(f"times {word} than the images themselves suggest" in sentence for sentence in judge([voronoi(seed, count) for seed in range(2)]))


def test_micrographs_that_could_not_be_sized_do_not_count_against_it():
    image = micrograph(voronoi(0))
    assert doubts([Result.of(image, voronoi(0), math.nan)]) == []


def etched(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Dark gaps, a quarter of a grain wide, between bright grains, with noise."""
    gap = ndi.distance_transform_edt(~find_boundaries(labels, mode="thick")) < DIAMETER / 8
    grey = ndi.gaussian_filter(np.where(gap, 50.0, 190.0), 1.0)
    return np.clip(grey + 8 * np.random.default_rng(seed).standard_normal(labels.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("bright", [False, True])
def test_boundaries_that_are_gaps_are_asked_of_the_gaps(bright):
    truth = [voronoi(seed) for seed in range(3)]
    dark = [etched(labels, seed) for seed, labels in enumerate(truth)]
    images = [255 - image for image in dark] if bright else dark
    assert has_gaps(dark, [DIAMETER] * 3)
    assert doubts([Result.of(image, labels, DIAMETER, gaps=True, bright=bright) for image, labels in zip(images, truth, strict=True)]) == []
    others = [Result.of(image, voronoi(seed + 7), DIAMETER, gaps=True, bright=bright) for seed, image in enumerate(images)]
    assert any("do not lie where the images change" in sentence for sentence in doubts(others))


def test_grooves_are_no_gaps():
    images = [micrograph(voronoi(seed), seed) for seed in range(3)]
    assert not has_gaps(images, [DIAMETER] * 3)
    assert not has_gaps([255 - image for image in images], [DIAMETER] * 3)
    assert not has_gaps([etched(voronoi(0))], [math.nan])
