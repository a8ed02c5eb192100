"""A champion learns a new look from its own weights: what is taken over, what is kept, what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import recalibration as benchmark
from graincast import stages
from graincast.checkpoint import Checkpoint
from graincast.config import Config, Recalibration, Segmenter, Synthesise, Translator
from graincast.errors import UserError
from graincast.microscope.preparation import Preparation
from graincast.segment import segmenter as segmenter_module
from graincast.segment.train import train_segmenter
from graincast.store.imageset import ImageSet, ImageSetWriter, folder_digest
from graincast.synthesise.cyclegan.train import CycleGAN, train_cyclegan
from tests.interrupted import train_until_killed

Pair = tuple[np.ndarray, np.ndarray]
TRANSLATOR = Translator(steps=3, batch=2, crop=32, filters=4, residual_blocks=1, pool=3, device="cpu")
SEGMENTER = Segmenter(encoder="mobilenet_v2", epochs=3, crops_per_image=2, batch=2, crop=64, device="cpu")
GONE = 1e-12
"""A learning rate that moves nothing."""


def grains(seed: int, line: int = 20, noise: int = 60) -> Pair:
    """A picture, uint8 (96, 96), of grains cut by lines of grey level `line`, and their ids."""
    rng = np.random.default_rng(seed)
    cuts = [np.sort(rng.choice(np.arange(8, 88, 10), 5, replace=False) + rng.integers(-2, 3, 5)) for _ in range(2)]
    rows, columns = (np.searchsorted(cut, np.arange(96)) for cut in cuts)
    labels = (1 + 6 * rows[:, None] + columns[None, :]).astype(np.int32)
    labels[cuts[0]] = labels[:, cuts[1]] = 0
    picture = np.where(labels == 0, line, 120) + rng.integers(0, noise, labels.shape)
    return picture.astype(np.uint8), labels


PAIRS = [grains(seed) for seed in range(4)]
MICROGRAPHS = [grains(seed, line=70, noise=120)[0] for seed in range(10, 13)]


def state(network: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy().copy() for name, value in network.state_dict().items()}


def same(a: torch.nn.Module, b: torch.nn.Module, tolerance: float = 0.0) -> bool:
    states = state(a), state(b)
    return all(np.allclose(states[0][name], states[1][name], rtol=0, atol=tolerance) for name in states[0])


def saved(model: Any) -> bytes:
    with TemporaryDirectory() as folder:
        model.save(Path(folder))
        (file,) = Path(folder).iterdir()
        return file.read_bytes()


@pytest.fixture(scope="module")
def old_translator() -> CycleGAN:
    return train_cyclegan(PAIRS, [picture[::-1] for picture, _ in PAIRS], TRANSLATOR)


@pytest.fixture(scope="module")
def old_segmenter() -> segmenter_module.Segmenter:
    return train_segmenter(PAIRS[:2], PAIRS[2:], SEGMENTER)


def test_a_translator_takes_over_the_generators_and_looks_at_the_new_micrographs_anew(old_translator: CycleGAN):
    still = TRANSLATOR.model_copy(update={"learning_rate": GONE, "seed": 5})
    warm = train_cyclegan(PAIRS, MICROGRAPHS, still, start=old_translator)
    cold = train_cyclegan(PAIRS, MICROGRAPHS, still)
    for name, parameter in old_translator.forward.named_parameters():
        assert torch.allclose(dict(warm.forward.named_parameters())[name], parameter, atol=1e-6), name
    assert same(warm.backward, old_translator.backward, 1e-6)
    assert not same(cold.backward, old_translator.backward, 1e-3)
    # noise and tones are those of the new micrographs, as for a translator trained from drawn weights
    assert float(warm.forward.noise_level) == float(cold.forward.noise_level) != float(old_translator.forward.noise_level)
    assert (warm.tones.curve == cold.tones.curve).all()
    assert not (warm.tones.curve == old_translator.tones.curve).all()


def test_new_discriminators_do_not_get_at_the_generators_at_once(old_translator: CycleGAN):
    """Adam's first steps are as long as the learning rate: half of it in the first of two steps of warm-up, then all."""
    config = TRANSLATOR.model_copy(update={"steps": 20, "decay_from": 1.0})
    seen = [[value.detach().clone() for value in old_translator.forward.parameters()]]

    class Watched(Checkpoint):
        def record(self, step: int, figures: Any) -> None:
            seen.append([value.detach().clone() for value in self._parts["f"].parameters()])  # type: ignore[attr-defined]

    train_cyclegan(PAIRS, MICROGRAPHS, config, start=old_translator, checkpoint=Watched())
    moved = [max(float((a - b).abs().max()) for a, b in zip(*steps, strict=True)) for steps in itertools.pairwise(seen)]
    assert moved[0] == pytest.approx(config.learning_rate / 2, rel=0.02)
    assert max(moved[1:]) > 0.9 * config.learning_rate


def test_a_segmenter_takes_over_the_weights(old_segmenter: segmenter_module.Segmenter):
    new = [grains(seed, line=70, noise=120) for seed in range(20, 24)]
    still = SEGMENTER.model_copy(update={"learning_rate": GONE, "epochs": 1, "seed": 5})
    warm = train_segmenter(new[:2], new[2:], still, start=old_segmenter)
    for (name, parameter), value in zip(old_segmenter.network.named_parameters(), warm.network.parameters(), strict=True):
        assert torch.allclose(value, parameter, atol=1e-6), name


def test_a_segmenter_that_fine_tuning_worsens_stays_as_it_was(old_segmenter: segmenter_module.Segmenter):
    before = state(old_segmenter.network)
    wild = SEGMENTER.model_copy(update={"learning_rate": 0.5, "epochs": 2})
    # what is seen in training has no boundary where validation has one
    wrong = [(255 - picture, np.ones_like(labels)) for picture, labels in PAIRS[:2]]
    losses: list[float] = []
    warm = train_segmenter(wrong, PAIRS[2:], wild, start=old_segmenter, log=lambda _, figures: losses.append(figures["val_loss"]))
    assert len(losses) == 2
    assert same(warm.network, old_segmenter.network)
    assert all((value == before[name]).all() for name, value in state(old_segmenter.network).items())  # the start itself is left alone


def test_a_warm_start_is_ahead_of_a_cold_one():
    """After as many epochs on a new look the champion's weights are nearer the truth than drawn ones."""
    many = [grains(seed) for seed in range(30, 42)]
    champion = train_segmenter(many[:10], many[10:], SEGMENTER.model_copy(update={"epochs": 6}))
    new = [grains(seed, line=80, noise=90) for seed in range(50, 60)]
    short = SEGMENTER.model_copy(update={"epochs": 1, "learning_rate": 3e-4})
    losses: dict[str, list[float]] = {"warm": [], "cold": []}
    for name, start in (("warm", champion), ("cold", None)):
        train_segmenter(new[:8], new[8:], short, start=start, log=lambda _, figures, name=name: losses[name].append(figures["val_loss"]))
    assert losses["warm"][-1] < losses["cold"][-1]


@pytest.fixture(scope="module", params=["translator", "segmenter"])
def warm(request: pytest.FixtureRequest, old_translator: CycleGAN, old_segmenter: segmenter_module.Segmenter) -> tuple[Any, ...]:
    """A training that starts from weights, the same one from others, and what the first gives when nothing interrupts it."""
    if request.param == "translator":
        arguments: tuple[Any, ...] = (PAIRS, MICROGRAPHS, TRANSLATOR)
        train: Callable[..., Any] = partial(train_cyclegan, start=old_translator)
        again = partial(train_cyclegan, start=train_cyclegan(PAIRS, MICROGRAPHS, TRANSLATOR.model_copy(update={"seed": 9, "steps": 1})))
    else:
        arguments = (PAIRS[:2], PAIRS[2:], SEGMENTER)
        train = partial(train_segmenter, start=old_segmenter)
        again = partial(train_segmenter, start=train_segmenter(PAIRS[:2], PAIRS[2:], SEGMENTER.model_copy(update={"seed": 9, "epochs": 1})))
    return train, again, arguments, saved(train(*arguments))


@pytest.mark.parametrize("step", [0, 1])
def test_a_killed_recalibration_ends_as_the_uninterrupted_one(warm: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture, step: int):
    train, again, arguments, result = warm
    train_until_killed(train, *arguments, checkpoints=tmp_path, step=step)
    if step:
        (checkpoint,) = tmp_path.iterdir()
        rows: list[int] = []
        other = again(*arguments, checkpoint=Checkpoint(tmp_path, "training"), log=lambda step, _: rows.append(step))
        assert "goes on" not in capsys.readouterr().err
        assert rows[0] == 0
        assert saved(other) != result
        assert checkpoint.exists()
    with Checkpoint(tmp_path, "training") as kept:
        assert saved(train(*arguments, checkpoint=kept)) == result
    assert ("goes on from the checkpoint after step" in capsys.readouterr().err) == bool(step)


def test_weights_that_do_not_fit_are_named(old_translator: CycleGAN, old_segmenter: segmenter_module.Segmenter):
    with pytest.raises(UserError, match=r"translator\.filters is 8, that of the translator to start from 4; the same would be right"):
        train_cyclegan(PAIRS, MICROGRAPHS, TRANSLATOR.model_copy(update={"filters": 8}), start=old_translator)
    with pytest.raises(UserError, match=r"boundaries are bright in the micrographs and dark in those of the translator to start from"):
        train_cyclegan(PAIRS, MICROGRAPHS, TRANSLATOR, bright_boundaries=True, start=old_translator)
    with pytest.raises(UserError, match=r"segmenter\.encoder is resnet18, that of the segmenter to start from mobilenet_v2"):
        train_segmenter(PAIRS[:2], PAIRS[2:], SEGMENTER.model_copy(update={"encoder": "resnet18"}), start=old_segmenter)


# ------------------------------------------------------------------------------------------------------- the stages


PREPARATION = Preparation(0.05, None, 16.0, 0.0, 64.0, True, 32, 0.5, 0.01, None, False)


def image_set(folder: Path, kind: str, images: list[Pair], labelled: bool = True, preparation: Preparation = PREPARATION) -> ImageSet:
    with ImageSetWriter(folder, kind) as writer:
        for number, (image, labels) in enumerate(images):
            writer.add(image, id=f"{kind}_{number}", labels=labels if labelled else None)
        if kind == "micrographs":
            writer.info["preparation"] = preparation.to_dict()
    return writer.result


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All that a champion leaves, and micrographs of a new look."""
    root = tmp_path_factory.mktemp("champion")
    splits = {name: image_set(root / name, "morphologies", [grains(seed) for seed in seeds])
              for name, seeds in {"translator": range(4), "synthetic": range(4, 10), "validation": range(10, 14)}.items()}
    micrographs = image_set(root / "micrographs", "micrographs", [grains(seed, line=50) for seed in range(20, 23)], labelled=False)
    new = image_set(root / "session", "micrographs", [grains(seed, line=70, noise=120) for seed in range(30, 33)], labelled=False)
    translator = stages.run_train_translator(TRANSLATOR, splits["translator"], micrographs, root / "translator_model")
    synthetic = stages.run_synthesise(Synthesise(min_fidelity=-1), splits, translator, root / "drawn")
    segmenter = stages.run_train_segmenter(SEGMENTER, synthetic["training"], synthetic["validation"], micrographs, root / "segmenter")
    return {"splits": splits, "translator": translator, "synthetic": synthetic, "segmenter": segmenter, "new": new}


def recalibrate(champion: dict[str, Any], config: Recalibration, root: Path) -> tuple[Path, dict[str, ImageSet], Path]:
    translator = stages.run_recalibrate_translator(config, TRANSLATOR.model_copy(update={"filters": 16}), champion["translator"],
                                                   champion["splits"]["translator"], champion["new"], root / "translator")
    drawn = stages.run_synthesise(Synthesise(min_fidelity=-1), champion["splits"], translator, root / "drawn")
    old = champion["synthetic"]
    segmenter = stages.run_recalibrate_segmenter(config, champion["segmenter"], drawn["training"], old["training"], drawn["validation"],
                                                 old["validation"], champion["new"], root / "segmenter")
    return translator, drawn, segmenter


def test_the_stages_leave_a_model_that_says_where_it_comes_from(champion: dict[str, Any], tmp_path: Path):
    config = Recalibration(translator_steps=2, segmenter_epochs=1, seed=3)
    translator, drawn, segmenter = recalibrate(champion, config, tmp_path / "one")
    made = CycleGAN.load(translator)
    assert made.config["filters"] == TRANSLATOR.filters  # the champion's networks, whatever the configuration says by now
    assert made.config["steps"] == len(pd.read_csv(translator / "history.csv")) == 2
    assert made.parents == {"morphologies": champion["splits"]["translator"].digest, "micrographs": champion["new"].digest,
                            "champion": folder_digest(champion["translator"])}
    result = segmenter_module.Segmenter.load(segmenter)
    assert result.preparation == PREPARATION
    assert result.config["epochs"] == len(pd.read_csv(segmenter / "history.csv")) == 1
    assert result.config["augment"] == SEGMENTER.augment.model_dump()
    assert result.parents == {"training": drawn["training"].digest, "validation": drawn["validation"].digest, "micrographs": champion["new"].digest,
                              "training_old": champion["synthetic"]["training"].digest,
                              "validation_old": champion["synthetic"]["validation"].digest, "champion": folder_digest(champion["segmenter"])}
    again = recalibrate(champion, config, tmp_path / "two")
    assert [folder_digest(folder) for folder in (translator, segmenter)] == [folder_digest(folder) for folder in (again[0], again[2])]


def test_the_old_look_is_seen_again_and_chooses_too(champion: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, list[Pair]] = {}

    def spy(training: list[Pair], validation: list[Pair], config: Any, **more: Any) -> segmenter_module.Segmenter:
        seen.update(training=training, validation=validation)
        return train_segmenter(training, validation, config, **more)

    monkeypatch.setattr(stages, "train_segmenter", spy)
    old, new = champion["synthetic"], {name: image_set(tmp_path / name, "synthetic", [grains(seed, line=80) for seed in seeds])
                                       for name, seeds in {"training": range(40, 46), "validation": range(50, 54)}.items()}
    config = Recalibration(segmenter_epochs=1, replay=0.5)
    stages.run_recalibrate_segmenter(config, champion["segmenter"], new["training"], old["training"], new["validation"], old["validation"],
                                     champion["new"], tmp_path / "segmenter")
    of_old = {image.tobytes() for image in old["training"]}
    assert [image.tobytes() in of_old for image, _ in seen["training"]] == 6 * [False] + 3 * [True]
    assert [image.tobytes() for image, _ in seen["validation"]] == [images["validation"].image(i).tobytes() for images in (new, old) for i in (0, 2)]


@pytest.mark.parametrize(("replay", "new", "old", "count"), [(0.0, 10, 4, 0), (0.5, 10, 8, 5), (1.0, 10, 4, 10), (2.0, 3, 5, 6)])
def test_old_images_are_drawn_evenly(replay: float, new: int, old: int, count: int):
    drawn = stages._replayed(Recalibration(replay=replay), new, old)
    times = np.bincount(np.array(drawn, int), minlength=old)
    assert len(drawn) == count
    assert len(times) == old
    assert np.ptp(times) <= 1
    assert drawn == stages._replayed(Recalibration(replay=replay), new, old)


def test_another_seed_draws_other_old_images():
    assert len({tuple(stages._replayed(Recalibration(replay=0.5, seed=seed), 20, 40)) for seed in range(5)}) == 5


def test_a_session_prepared_otherwise_is_refused(champion: dict[str, Any], tmp_path: Path):
    other = image_set(tmp_path / "session", "micrographs", [grains(seed) for seed in range(3)], labelled=False,
                      preparation=Preparation(0.02, None, 40.0, 0.0, 64.0, True, 32, 0.5, 0.01, None, False))
    old = champion["synthetic"]
    with pytest.raises(UserError, match=r"session was not prepared as the champion prepares .* \(grain_diameter_px 40\.0, the champion's 16\.0\)"):
        stages.run_recalibrate_segmenter(Recalibration(), champion["segmenter"], old["training"], old["training"], old["validation"],
                                         old["validation"], other, tmp_path / "segmenter")
    assert not (tmp_path / "segmenter").exists()


# ----------------------------------------------------------------------------------------------------- the benchmark


def test_the_benchmark_scores_the_same_grains_in_both_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "HELD_OUT", 1)
    study = benchmark.Study(tmp_path, Config(), 3)
    files = {look: study.session(look, held_out=True) / "held_out" for look in ("old", "new")}
    masks, images = ([iio.imread(next((files[look] / part).iterdir())) for look in files] for part in ("masks", "images"))
    assert (masks[0] == masks[1]).all()
    assert not (images[0] == images[1]).all()
    assert (study.config.translator.seed, study.config.recalibration.seed) == (3, 3)


def test_the_benchmark_keeps_what_it_made(tmp_path: Path):
    study, made = benchmark.Study(tmp_path, Config(), 3), []

    def make(out: Path) -> None:
        made.append(out)
        out.mkdir(parents=True)

    first = study.kept("thing", "run_simulate", make, "settings")
    assert study.kept("thing", "run_simulate", make, "settings") == first
    assert study.kept("thing", "run_simulate", make, "other settings") != first
    assert len(made) == 2
    assert set(study.seconds(first)) == {"processor_s", "wall_s", "load"}
