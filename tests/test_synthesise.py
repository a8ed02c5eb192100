"""The translator, label fidelity and the synthetic set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage as ndi
from torch import nn

from graincast.compute import load_weights, save_weights
from graincast.config import Simulate, Synthesise, Translator
from graincast.errors import UserError
from graincast.labels import fill_lines
from graincast.microscope.gaps import WIDE, gap_width
from graincast.simulate.structure import simulate_structure
from graincast.store.imageset import ImageSet, ImageSetWriter
from graincast.synthesise.cyclegan.model import Generator
from graincast.synthesise.cyclegan.train import CycleGAN, _inversion, _Pool, _smooth_l1, train_cyclegan
from graincast.synthesise.fidelity import TOLERANCE_PX, label_fidelity
from graincast.synthesise.generate import synthesise
from graincast.synthesise.polarity import boundaries_are_bright
from graincast.synthesise.tones import SPREADS, match_tones, narrow, spread_tones, tone_share, widen

SMALL = Translator(steps=3, batch=2, crop=32, filters=4, residual_blocks=1, device="cpu")


@pytest.fixture(scope="module")
def structure() -> tuple[np.ndarray, np.ndarray]:
    return simulate_structure(Simulate(size=192, grains=40, steps=400), 0)


@pytest.fixture(scope="module")
def translator(structure: tuple[np.ndarray, np.ndarray]) -> CycleGAN:
    return train_cyclegan([structure], [structure[0][::-1]], SMALL)


class TestFidelity:
    def test_own_picture_is_faithful(self, structure):
        assert label_fidelity(*structure) > 0.85

    def test_contrast_does_not_matter(self, structure):
        picture, labels = structure
        assert label_fidelity(255 - picture, labels) == pytest.approx(label_fidelity(picture, labels), abs=0.02)

    def test_falls_as_boundaries_move(self, structure):
        picture, labels = structure
        moved = [label_fidelity(np.roll(picture, (s, s), (0, 1)), labels) for s in (0, 1, TOLERANCE_PX, 4, 6)]
        assert moved == sorted(moved, reverse=True)
        assert moved[-1] < 0.1

    def test_noise_is_chance(self, structure):
        rng = np.random.default_rng(0)
        drawn = [label_fidelity(rng.integers(0, 255, structure[0].shape).astype(np.uint8), structure[1]) for _ in range(12)]
        assert abs(np.mean(drawn)) < 0.06

    def test_one_grain_has_none(self):
        assert np.isnan(label_fidelity(np.zeros((40, 40), np.uint8), np.ones((40, 40), np.int32)))


def test_polarity_is_told_from_the_images(structure):
    picture = structure[0]
    assert not boundaries_are_bright([picture])
    assert boundaries_are_bright([255 - picture])


class TestTones:
    @pytest.fixture(scope="class")
    def toned(self) -> dict[float, tuple[np.ndarray, np.ndarray]]:
        """One structure, simulated with several spreads of tones."""
        return {spread: simulate_structure(Simulate(size=256, grains=40, steps=300, grey_spread=spread), 0) for spread in (0.0, 0.02, 0.08, 0.16)}

    def test_share_grows_with_the_spread_and_not_with_brightness_contrast_or_size(self, toned):
        shares = [tone_share(picture, 40) for picture, _ in toned.values()]
        assert shares == sorted(shares)
        assert shares[0] < 0.35 < 0.65 < shares[-1]
        picture = toned[0.08][0]
        assert tone_share(60 + picture * 0.3, 40) == pytest.approx(shares[2], abs=0.01)
        assert tone_share(255 - picture.astype(float), 40) == pytest.approx(shares[2], abs=0.03)
        assert tone_share(ndi.zoom(picture, 2, order=1), 80) == pytest.approx(shares[2], abs=0.04)

    def test_without_spread_a_picture_is_as_simulated_without_tones(self, toned):
        flat = spread_tones(*toned[0.08], 0).astype(float)
        alike, _ = toned[0.0]
        assert np.abs((flat - np.median(flat)) - (alike - np.median(alike))).mean() < 3
        assert np.corrcoef(flat.ravel(), alike.ravel())[0, 1] > 0.9

    def test_as_they_are(self, toned):
        picture, labels = toned[0.08]
        assert np.array_equal(spread_tones(picture, labels, 1), picture)
        assert spread_tones(picture, np.zeros_like(labels), 0) is picture

    @pytest.mark.parametrize("spread", [0.0, 0.02, 0.08, 0.16])
    def test_the_spread_of_another_structure_is_found(self, toned, spread):
        other = simulate_structure(Simulate(size=256, grains=40, steps=300, grey_spread=spread, seed=7), 0)[0]
        found = match_tones([toned[0.08]], [other], bright_boundaries=False).spread
        assert found == pytest.approx(spread / 0.08, rel=0.4, abs=0.25)  # few grains, whose own spread scatters
        assert SPREADS[0] <= found <= SPREADS[-1]

    def test_curve_takes_the_micrographs_histogram(self, structure):
        target = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 255, (24, 24)), 8, 0), 8, 1).astype(np.uint8)
        for bright in (False, True):
            tones = match_tones([structure], [target], bright)
            picture = spread_tones(*structure, tones.spread)
            steps = np.diff(tones.curve.astype(int))[picture.min() : picture.max()]
            assert (steps <= 0).all() if bright else (steps >= 0).all()
            assert np.array_equal(tones.apply(*structure), tones.curve[picture])
            smooth = ndi.gaussian_filter(target.astype(float), 1.5)
            for grey in np.quantile(picture, [0.1, 0.5, 0.9], method="nearest"):
                # A grey level stands for a range of ranks, the tone for that of the target's greys of the same ranks.
                ranks = np.sort(abs(bright - np.array([(picture < grey).mean(), (picture <= grey).mean()])))
                low, high = np.quantile(smooth, ranks)
                assert low - 4 <= tones.curve[grey] <= high + 4


class TestWidth:
    """Boundaries as wide as the micrographs'."""

    @pytest.fixture(scope="class")
    def etched(self) -> tuple[np.ndarray, np.ndarray]:
        return simulate_structure(Simulate(size=256, grains=40, steps=300, grey_spread=0), 0)

    def test_wider_boundaries_are_measured_as_wider(self, etched):
        diameter = np.sqrt(4 / np.pi * 256**2 / 40)
        widths = [gap_width([widen(*etched, width)], diameter) for width in (0, 8, 12, 18)]
        assert 0 < widths[0] < WIDE < widths[1]
        assert widths == sorted(widths)
        assert widths[-1] > 1.3 * widths[1]

    @pytest.mark.parametrize("width", [0, 8, 12])
    @pytest.mark.parametrize("bright", [False, True])
    def test_the_width_of_another_structure_is_found(self, etched, width, bright):
        other = widen(*simulate_structure(Simulate(size=256, grains=40, steps=300, grey_spread=0, seed=7), 0), width)
        found = match_tones([etched], [255 - other if bright else other], bright).width
        assert found == pytest.approx(width, rel=0.35)

    def test_the_line_lies_in_the_middle_of_a_gap_of_varying_width(self, etched):
        picture, labels = etched
        gap = widen(picture, labels, 12) < np.median(picture) - 20
        assert gap.mean() > 2 * (picture < np.median(picture) - 20).mean()
        dense = fill_lines(labels)
        shares = [(gap & (dense == grain)).sum() / (dense == grain).sum() for grain in range(1, labels.max() + 1)]
        assert np.std(shares) > 0.05
        # over all boundaries a shift to any side takes as much from the gap as one to the opposite side
        edges = ndi.gaussian_filter(gap.astype(float), 1)
        for axis in (0, 1):
            ahead, behind = (edges[np.roll(labels == 0, shift, axis)].mean() for shift in (4, -4))
            assert ahead == pytest.approx(behind, abs=0.05)

    def test_as_it_is(self, etched):
        picture, labels = etched
        assert widen(picture, labels, 0) is picture
        assert np.array_equal(widen(picture, labels, 9), widen(picture, labels, 9))
        assert widen(picture, np.ones_like(labels), 9) is picture

    def test_a_faded_boundary_stays_faded(self, etched):
        faded = np.full_like(etched[0], 120)
        assert np.array_equal(widen(faded, etched[1], 9), faded)

    def test_fidelity_sees_gaps_where_they_are(self, etched):
        picture, labels = widen(*etched, 9), etched[1]
        kept = [label_fidelity(np.roll(picture, (s, s), (0, 1)), labels, lambda values, ids: narrow(values, ids, 9)) for s in (0, 2, 4)]
        assert kept[0] > 0.7
        assert max(kept[1:]) < 0.1
        noise = np.random.default_rng(0).integers(0, 255, picture.shape).astype(np.uint8)
        assert label_fidelity(noise, labels, lambda values, ids: narrow(values, ids, 9)) < 0.2


class TestNetworks:
    def test_upsampling_is_not_transposed_convolution(self):
        kinds = {type(module) for module in Generator(4, 1, noise=True).modules()}
        assert nn.ConvTranspose2d not in kinds
        assert nn.Upsample in kinds

    def test_inversion_guard_pushes_on_inverted_contrast_only(self, structure):
        x = torch.from_numpy(structure[0][None, None].astype(np.float32) / 127.5 - 1)
        assert _inversion(x, x) == 0
        assert _inversion(x, -x) == pytest.approx(1.3, abs=1e-3)
        flipped = (torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) - x).requires_grad_()
        _inversion(x, flipped).backward()
        assert torch.sum(flipped.grad * x) < 0  # a step against the gradient turns the contrast back

    def test_cycle_on_micrographs_forgives_fresh_noise(self):
        generator = torch.Generator().manual_seed(0)
        noise, other = (torch.randn(2, 1, 64, 64, generator=generator) for _ in range(2))
        assert _smooth_l1(noise, other) < 0.4 * (noise - other).abs().mean()
        assert _smooth_l1(noise + 1, noise) == pytest.approx(1, abs=1e-5)

    def test_pool_gives_half_new_half_old(self):
        pool = _Pool(10, seed=0)
        given = torch.cat([pool.exchange(torch.full((1, 1, 1, 1), float(i))) for i in range(400)]).flatten()
        fresh = given[50:] == torch.arange(50, 400)
        assert 0.4 < fresh.float().mean() < 0.6
        assert len(pool.images) == 10


class TestTraining:
    def test_same_seed_same_weights(self, structure, translator, tmp_path):
        again = train_cyclegan([structure], [structure[0][::-1]], SMALL)
        for name, net in (("a", translator), ("b", again)):
            (tmp_path / name).mkdir()
            net.save(tmp_path / name)
        assert (tmp_path / "a" / "translator.safetensors").read_bytes() == (tmp_path / "b" / "translator.safetensors").read_bytes()

    def test_other_seed_other_weights(self, structure, translator):
        other = train_cyclegan([structure], [structure[0][::-1]], SMALL.model_copy(update={"seed": 1}))
        assert any(not torch.equal(a, b) for a, b in zip(translator.forward.parameters(), other.forward.parameters(), strict=True))

    def test_losses_are_reported_every_step(self, structure):
        seen = {}
        train_cyclegan([structure], [structure[0]], SMALL, log=lambda step, losses: seen.update({step: dict(losses)}))
        assert list(seen) == [0, 1, 2]
        assert set(seen[0]) == {"adversarial_f", "adversarial_g", "cycle", "identity", "polarity", "discriminator_sem", "discriminator_sim"}
        assert all(np.isfinite(list(losses.values())).all() for losses in seen.values())

    def test_keeps_shape_of_any_size_and_round_trips(self, translator, tmp_path):
        picture = np.random.default_rng(0).integers(0, 255, (61, 83)).astype(np.uint8)
        translator.save(tmp_path)
        loaded = CycleGAN.load(tmp_path)
        labels = np.ones(picture.shape, np.int32)
        image = translator.to_sem(picture, labels, seed=5)
        assert image.shape == picture.shape
        assert image.dtype == np.uint8
        assert np.array_equal(loaded.to_sem(picture, labels, seed=5), image)
        assert not np.array_equal(loaded.to_sem(picture, labels, seed=6), image)

    def test_every_copy_has_a_surface_of_its_own_and_boundaries_in_their_place(self, structure):
        """Right after initialisation F is nearly the identity; without noise, copies differ by what it is shown."""
        translator = train_cyclegan([structure], [structure[0]], SMALL.model_copy(update={"steps": 1, "learning_rate": 1e-9}))
        translator.forward.noise_level.zero_()
        copies = [translator.to_sem(*structure, seed=seed) for seed in range(4)]
        assert all(np.abs(copies[0].astype(float) - copy).std() > 2 for copy in copies[1:])
        assert all(label_fidelity(copy, structure[1]) > 0.6 for copy in copies)

    def test_images_smaller_than_a_crop_are_named(self, structure):
        with pytest.raises(UserError, match=r"micrographs \(20 x 30 px\).*crop of 32 px"):
            train_cyclegan([structure], [np.zeros((30, 20), np.uint8)], SMALL)

    def test_a_training_that_diverges_is_named(self, structure):
        with pytest.raises(UserError, match=r"no longer finite at step \d+; a smaller translator.learning_rate"):
            train_cyclegan([structure], [structure[0]], SMALL.model_copy(update={"learning_rate": 1e25, "steps": 20}))

    def test_a_translator_of_an_earlier_version_is_named(self, translator, tmp_path):
        translator.save(tmp_path)
        weights, header = load_weights(tmp_path / "translator.safetensors", "translator")
        del header["boundary_width"]
        save_weights(tmp_path / "translator.safetensors", weights, header)
        with pytest.raises(UserError, match=r"earlier graincast.*train it anew"):
            CycleGAN.load(tmp_path)

    def test_missing_translator_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"holds no translator"):
            CycleGAN.load(tmp_path)


class Shifting:
    """A synthesiser that leaves even morphologies alone and moves odd ones by 6 px: half of its images are wrong."""

    def __init__(self) -> None:
        self.calls = 0

    def to_sem(self, picture: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
        self.calls += 1
        return picture if self.calls % 2 else np.roll(picture, (6, 6), (0, 1))

    def in_tones(self, picture: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return 255 - picture

    def as_lines(self, values: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return values

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, folder: Path) -> Shifting:
        return cls()


@pytest.fixture
def morphologies(structure, tmp_path) -> ImageSet:
    with ImageSetWriter(tmp_path / "morphologies", "morphologies") as writer:
        for k in range(4):
            writer.add(structure[0], id=f"m{k}", labels=structure[1])
    return writer.result


class TestSyntheticSet:
    def test_unfaithful_images_are_dropped_and_counted(self, morphologies, tmp_path):
        made = synthesise(morphologies, Shifting(), Synthesise(), tmp_path / "set", synthesiser_digest="abc.dir")
        assert list(made.rows["morphology"]) == ["m0", "m2"]
        assert len(made.refused) == 2
        assert made.refused["refused"].str.contains("below synthesise.min_fidelity").all()
        assert (made.rows["fidelity"] > 0.85).all()
        assert (made.refused["fidelity"] < 0.5).all()
        assert made.info["parents"] == {"morphologies": morphologies.digest, "translator": "abc.dir"}

    def test_labels_are_the_morphologys_own(self, morphologies, translator, tmp_path):
        made = synthesise(morphologies, translator, Synthesise(min_fidelity=-1, copies=2), tmp_path / "set", synthesiser_digest="abc.dir")
        assert len(made) == 8
        assert np.array_equal(made.labels(3), morphologies.labels(1))
        assert not np.array_equal(made.image(0), made.image(1))

    def test_untranslated_pictures_stand_beside_the_translated(self, morphologies, tmp_path):
        made = synthesise(morphologies, Shifting(), Synthesise(), tmp_path / "set", synthesiser_digest="abc.dir", untranslated=True)
        plain = np.flatnonzero(made.rows["look"] == "untranslated")
        assert list(made.rows["morphology"].iloc[plain]) == ["m0", "m1", "m2", "m3"]
        assert set(made.rows["look"]) == {"translated", "untranslated"}
        assert list(made.rows["fidelity"].isna()) == list(made.rows["look"] == "untranslated")
        for index in map(int, plain):
            assert np.array_equal(made.image(index), 255 - morphologies.image(0))
            assert np.array_equal(made.labels(index), morphologies.labels(0))

    def test_a_translator_that_moves_everything_is_refused(self, morphologies, tmp_path):
        always = Shifting()
        always.to_sem = lambda picture, labels, seed: np.roll(picture, (6, 6), (0, 1))
        with pytest.raises(UserError, match=r"not one image was accepted.*fidelity"):
            synthesise(morphologies, always, Synthesise(), tmp_path / "set", synthesiser_digest="abc.dir")
        assert not (tmp_path / "set").exists()
