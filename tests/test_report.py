"""The report: self-contained, complete, honest, safe with hostile names, the same bytes twice."""

from __future__ import annotations

import base64
import dataclasses
import json
from html.parser import HTMLParser
from io import BytesIO, StringIO
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import ndimage as ndi
from skimage.segmentation import find_boundaries

from graincast.config import Config
from graincast.evaluate.metrics import score_grains, score_particles
from graincast.evaluate.realism import HALVES, REAL, SYNTHETIC, UNTEXTURED, Realism, set_realism
from graincast.report.drawing import to_png
from graincast.report.figures import figures, side_by_side
from graincast.report.findings import (
    METRICS,
    REALISM,
    best_methods,
    grain_sizes,
    headline,
    mean_scores,
    summarise,
)
from graincast.report.html import build_report
from graincast.report.inputs import OURS, ReportInputs
from graincast.report.terminal import summary_table
from graincast.segment.network import build_network
from graincast.store.imageset import ImageSet, ImageSetWriter

SECTIONS = ["images", "realism", "segmentation", "grains", "training", "read", "labels", "provenance",
            "config"]
LOSSES = ["cycle", "identity", "polarity", "adversarial_f", "adversarial_g",
          "discriminator_sem", "discriminator_sim"]
HOSTILE = "<script>alert('x')</script>&.tif"


def structure(seed: int, side: int = 96, grains: int = 12) -> np.ndarray:
    """A Voronoi grain map, int32, 0 on boundaries."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, side, (grains, 2))
    pixels = np.stack(np.mgrid[:side, :side], -1)[:, :, None]
    labels = np.linalg.norm(pixels - points, axis=-1).argmin(-1).astype(np.int32) + 1
    labels[find_boundaries(labels, mode="thick")] = 0
    return labels


def picture(labels: np.ndarray, seed: int, noise: float) -> np.ndarray:
    rng = np.random.default_rng([seed, 1])
    grey = rng.normal(0.6, 0.1, labels.max() + 1)[labels] * np.where(labels, 1, 0.4)
    grey = ndi.gaussian_filter(grey, 1) + noise * rng.standard_normal(labels.shape)
    return (255 * grey.clip(0, 1)).astype(np.uint8)


def image_sets(folder: Path, pixel_size_um: float | None = 0.05, source: str = "field.tif",
               refusals: bool = True) -> dict[str, ImageSet]:
    sets: dict[str, ImageSet] = {}
    with ImageSetWriter(folder / "micrographs", "micrographs") as micrographs:
        for k in range(2):
            image = picture(structure(100 + k, 120), k, 0.05)[:, : 120 - 10 * k]
            micrographs.add(image, id=f"m{k}", session="monday", source=f"{k}-{source}",
                            pixel_size_um=pixel_size_um, sharpness=0.1 + k)
        if refusals:
            micrographs.refuse("the file is text, no image", id="bad", source=source)
    with ImageSetWriter(folder / "morphologies", "morphologies") as morphologies, \
            ImageSetWriter(folder / "synthetic", "synthetic") as synthetic:
        for k in range(4):
            labels = structure(k)
            morphologies.add(picture(labels, k, 0.0), id=f"s{k}", labels=labels, seed=k)
            if k == 1 and refusals:
                synthetic.refuse("label fidelity 0.31 is below 0.5", id=f"s{k}", fidelity=0.31)
            else:
                synthetic.add(picture(labels, k, 0.06), id=f"s{k}", labels=labels, look="translated", fidelity=0.8 + 0.03 * k)
    for writer in (micrographs, morphologies, synthetic):
        sets[writer.kind] = writer.result
    return sets


def score_table(ours: float = 0.9, baseline: float = 0.7, name: str = "real masks") -> pd.DataFrame:
    methods = {"local threshold": baseline, OURS: ours}
    rows = [{"set": s, "method": method, "image": f"i{k}", "ap50": value + 0.02 * k, "miou": value,
             "vi_split": 1 - value, "count_ratio": 1.1, "d_astm_g": float(np.log2(1.1))}
            for s in ("held-out synthetic", name) for method, value in methods.items() for k in range(2)]
    return pd.DataFrame(rows)


def likeness(name: str = "intensity_distance") -> Realism:
    """Made-up findings of two patches a set."""
    sets, rng = (REAL, SYNTHETIC, UNTEXTURED), np.random.default_rng(5)
    figures = [{"figure": name, "set": s, "value": v, "low": np.nan, "high": np.nan} for s, v in zip(sets, (1.5, 4.25, 60.0), strict=True)]
    figures += [{"figure": "encoder_kid", "set": s, "value": v, "low": v - 2, "high": v + 3} for s, v in zip(sets, (0.1, 20.5, 999.0), strict=True)]
    patches = pd.DataFrame([{"set": s, "image": k, "half": HALVES[k] if s == REAL else None, "entropy": 5 + rng.random(), "ssim": rng.random(),
                             "encoder_x": rng.random(), "encoder_y": rng.random()} for s in sets for k in range(2)])
    grey = np.arange(256.0)
    curves = [pd.DataFrame({"curve": curve, "set": s, "x": x, "value": rng.dirichlet(np.ones(len(x)))})
              for curve, x in (("intensity", grey), ("spectrum", grey[1:33] / 64)) for s in (*sets, *HALVES)]
    surfaces = {s: rng.integers(0, 256, (16, 16), np.uint8) for s in (*HALVES, SYNTHETIC, UNTEXTURED)}
    fidelity = pd.DataFrame({"set": [SYNTHETIC, UNTEXTURED], "fidelity": [0.8, 0.97]})
    return Realism(pd.DataFrame(figures), patches, pd.concat(curves, ignore_index=True), fidelity, surfaces, ["VGG16 was not asked: <no weights>"])


def make_inputs(sets: dict[str, ImageSet], **changes: object) -> ReportInputs:
    rng = np.random.default_rng(0)
    steps, epochs = np.arange(40), np.arange(6)
    defaults: dict[str, object] = {
        "title": "a run",
        "run": {"name": "a run", "MLflow run": "0f1e", "MLflow": "http://127.0.0.1:5000/#/runs/0f1e"},
        "config": Config().model_dump(),
        **sets,
        "translator_history": pd.DataFrame({"step": steps, "seconds": steps}
                                           | {name: np.exp(-steps / 9) for name in LOSSES}),
        "segmenter_history": pd.DataFrame({"epoch": epochs, "train_loss": 1 / (1 + epochs),
                                           "val_ap50": epochs / 6,
                                           "val_loss": [0.9, 0.5, 0.4, 0.35, 0.36, 0.37]}),
        "scores": score_table(),
        "realism": likeness(),
        "grains": pd.DataFrame({"set": ["simulated truth"] * 60 + ["predicted on micrographs"] * 40,
                                "image": "a", "unit": ["px"] * 60 + ["um"] * 40,
                                "equivalent_diameter": np.r_[rng.gamma(9, 3, 60), np.full(40, 1.25)]}),
        "overlays": {"field 0": np.zeros((20, 30, 3), np.uint8)},
        "virtual": False,
    }
    return ReportInputs(**(defaults | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageSet]:
    return image_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def inputs(sets: dict[str, ImageSet]) -> ReportInputs:
    return make_inputs(sets)


@pytest.fixture(scope="module")
def document(inputs: ReportInputs) -> str:
    return build_report(inputs)


class Page(HTMLParser):
    """Tags with their attributes, visible text by section, and whether every tag is closed in its order."""

    VOID = frozenset({"meta", "img", "input", "br", "link"})

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.section = "top"
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = str(dict(attrs)["id"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text[self.section] = " ".join([*self.text.get(self.section, "").split(), *data.split()])

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def printed(group: object, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width, no_color=True)
    console.print(group)
    return console.file.getvalue()  # type: ignore[attr-defined]


# the document


def test_report_fetches_nothing_and_runs_nothing(document: str) -> None:
    page = Page(document)
    used = {name for name, _ in page.tags}
    assert not used & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.all("img"))
    attributes = {key for _, attributes in page.tags for key in attributes}
    assert not any(key.startswith("on") or key == "srcset" for key in attributes)
    style = document[document.index("<style>") : document.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style


def test_report_is_well_formed_and_accessible(document: str) -> None:
    page = Page(document)
    assert page.open == []
    assert document.startswith("<!doctype html>")
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in page.all("img"))
    assert all(cell["scope"] in {"row", "col"} for cell in page.all("th"))
    assert len(page.all("table")) == document.count("<caption")
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    anchors = [str(link["href"])[1:] for link in page.all("a") if str(link["href"]).startswith("#")]
    assert anchors == identifiers == SECTIONS


def test_report_shows_every_section(document: str, inputs: ReportInputs) -> None:
    text = Page(document).text
    assert inputs.title in text["top"]
    for section, words in {
        "top": ["91 of 100 grains, true or found, match", "better than the local", "1.25 µm", "1 refused", "1 dropped"],
        "realism": ["grey levels", "4.250", "60", "1.500", "20.5 (18.5 to 23.5)", "near the floor", "VGG16 was not asked: <no weights>", "Good:"],
        "segmentation": ["held-out synthetic", "real masks", "0.910", "local threshold", "field 0"],
        "grains": ["simulated truth", "predicted on micrographs", "1.250"],
        "read": ["0-field.tif", "120 \N{MULTIPLICATION SIGN} 120", "0.05", "sharpness",
                 "the file is text, no image"],
        "labels": ["label fidelity 0.31 is below 0.5", "0.850"],
        "provenance": ["0f1e", inputs.synthetic.digest, inputs.micrographs.digest, inputs.morphologies.digest,
                       "numpy", np.__version__],
        "config": ["learning_rate: 0.001", "min_fidelity: 0.5"],
    }.items():
        for word in words:
            assert word in text[section], (section, word)
    assert len(Page(document).all("img")) == len(figures(inputs)) + len(inputs.overlays) == 14


def test_embedded_overlay_is_lossless(sets: dict[str, ImageSet]) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (24, 18, 3), np.uint8)
    page = Page(build_report(make_inputs(sets, overlays={"noise": rgb})))
    image = next(i for i in page.all("img") if "noise" in str(i["alt"]))
    np.testing.assert_array_equal(iio.imread(base64.b64decode(str(image["src"]).partition(",")[2])), rgb)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    sets = image_sets(tmp_path, source=HOSTILE)
    document = build_report(make_inputs(sets, title=HOSTILE, scores=score_table(name=HOSTILE),
                                        overlays={HOSTILE: np.zeros((4, 4, 3), np.uint8)},
                                        realism=likeness(HOSTILE), config={HOSTILE: HOSTILE},
                                        run={HOSTILE: "javascript:alert(1)"}))
    page = Page(document)
    assert page.all("script") == []
    assert not any(str(link["href"]).startswith("javascript") for link in page.all("a"))
    for section in ("top", "segmentation", "read", "config", "provenance"):
        assert HOSTILE in page.text[section].replace("_", " ") or HOSTILE in page.text[section]


def test_only_web_addresses_become_links(document: str) -> None:
    links = [link["href"] for link in Page(document).all("a")]
    assert "http://127.0.0.1:5000/#/runs/0f1e" in links
    assert "0f1e" not in links


def test_virtual_is_said_plainly(sets: dict[str, ImageSet], document: str) -> None:
    virtual = make_inputs(sets, virtual=True)
    text = Page(build_report(virtual)).text
    assert text["top"].index("VIRTUAL MICROGRAPHS") < text["top"].index("graincast report")
    assert "Virtual, simulated and synthetic" in text["images"]
    assert "VIRTUAL" not in document
    assert "VIRTUAL" in printed(summary_table(virtual, {}, {}))


def test_report_without_masks_refusals_pixel_size_or_histories(tmp_path: Path) -> None:
    empty = pd.DataFrame()
    sets = image_sets(tmp_path, pixel_size_um=None, refusals=False)
    bare = make_inputs(sets, scores=empty, grains=empty, overlays={}, realism=None, translator_history=empty,
                       segmenter_history=empty, run={})
    page = Page(build_report(bare))
    assert [s["id"] for s in page.all("section")] == SECTIONS
    assert "how well the grains are found is not known" in page.text["top"]
    assert "session.masks" in page.text["segmentation"]
    assert "Nothing was refused" in page.text["read"]
    assert "No synthetic image was dropped" in page.text["labels"]
    assert "µm" not in page.text["images"] + page.text["grains"]
    assert "No grain was measured" in page.text["grains"]
    assert "not measured" in page.text["realism"]
    assert set(figures(bare)) == {"images", "fidelity"}
    assert "translator" in printed(summary_table(bare, {}, {}))


def test_same_inputs_give_the_same_bytes(document: str, tmp_path: Path) -> None:
    assert build_report(make_inputs(image_sets(tmp_path))) == document


def test_png_carries_no_software_or_date(inputs: ReportInputs) -> None:
    png = to_png(figures(inputs)["intensity"])
    assert b"tEXt" not in png
    assert b"tIME" not in png


def test_broken_tables_are_refused(sets: dict[str, ImageSet]) -> None:
    with pytest.raises(ValueError, match=r"grains lacks unit; it has"):
        make_inputs(sets, grains=pd.DataFrame({"set": ["a"], "image": ["b"], "equivalent_diameter": [1.0]}))
    with pytest.raises(ValueError, match=r"overlay 'x': want uint8 RGB, got float64"):
        make_inputs(sets, overlays={"x": np.zeros((3, 3, 3))})


# figures


def test_images_are_shown_pixel_by_pixel_with_their_own_grey_levels(inputs: ReportInputs) -> None:
    figure = side_by_side(inputs, rows=2)
    canvas = iio.imread(BytesIO(to_png(figure)))[..., :3]
    crops = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(crops) == 8
    assert {crop.shape[:2] for crop in crops} == {(96, 96)}
    for axes, crop in zip((a for a in figure.axes if a.images), crops, strict=True):
        box = axes.get_position().transformed(figure.transFigure)
        x, y = round(box.x0), round(canvas.shape[0] - box.y1)
        zoom = round(box.width) // 96
        shown = canvas[y : y + 96 * zoom, x : x + 96 * zoom]
        expected = crop if crop.ndim == 3 else np.repeat(crop[..., None], 3, 2)
        np.testing.assert_allclose(shown, expected.repeat(zoom, 0).repeat(zoom, 1), atol=1)


def test_synthetic_image_stands_beside_its_own_morphology(inputs: ReportInputs) -> None:
    axes = side_by_side(inputs, rows=3).axes[8:12]  # the third synthetic image, of the fourth morphology
    _, simulated, synthetic, _ = (np.asarray(panel.images[0].get_array()) for panel in axes)
    dark = simulated < np.percentile(simulated, 20)
    assert synthetic[dark].mean() < 0.8 * synthetic[~dark].mean()


def test_strange_labels_are_a_defect(inputs: ReportInputs, tmp_path: Path) -> None:
    with ImageSetWriter(tmp_path / "other", "synthetic") as other:
        other.add(np.zeros((96, 96), np.uint8), id="x", labels=structure(99), look="translated", fidelity=1.0)
    with pytest.raises(ValueError, match="synthetic image x has the labels of no morphology"):
        side_by_side(dataclasses.replace(inputs, synthetic=other.result))


@pytest.mark.parametrize(("pixel_size", "words"), [(0.05, "1 µm"), (None, "20 px")])
def test_scale_bar(tmp_path: Path, pixel_size: float | None, words: str) -> None:
    figure = side_by_side(make_inputs(image_sets(tmp_path, pixel_size_um=pixel_size)))
    (page,) = (axes for axes in figure.axes if not axes.images)
    assert any(text.get_text().startswith(words) for text in page.texts)
    (bar,) = page.collections
    assert np.ptp(bar.get_paths()[0].vertices[:, 0]) == pytest.approx(20 * 3)  # 96 px are drawn threefold


def test_intensity_histogram_draws_what_was_found(inputs: ReportInputs) -> None:
    assert inputs.realism is not None
    (axes,) = figures(inputs)["intensity"].axes
    outlines = {str(patch.get_label()): patch for patch in axes.patches}
    curves = inputs.realism.curves[inputs.realism.curves["curve"] == "intensity"]
    for name in (REAL, SYNTHETIC, UNTEXTURED, *HALVES):
        expected = 100 * curves.loc[curves["set"] == name, "value"].to_numpy().reshape(128, 2).sum(1)
        np.testing.assert_allclose(outlines[name].get_data().values, expected, err_msg=name)


def test_kernel_distances_are_drawn_with_their_intervals(inputs: ReportInputs) -> None:
    (axes,) = figures(inputs)["kid"].axes
    drawn = {str(bars.get_label()): bars for bars in axes.containers}
    for name, value in ((REAL, 0.1), (SYNTHETIC, 20.5), (UNTEXTURED, 999.0)):
        point, _, (line,) = drawn[name]
        assert point.get_xdata() == [value]
        np.testing.assert_allclose(line.get_segments()[0][:, 0], [value - 2, value + 3])


def test_every_realism_figure_stands_beside_its_floor(inputs: ReportInputs) -> None:
    drawn = figures(dataclasses.replace(inputs, virtual=True))
    for name in ("intensity", "spectrum", "entropy", "ssim", "embedding"):
        labels = {text.partition(" (")[0] for text in drawn[name].axes[0].get_legend_handles_labels()[1]}
        assert {"virtual, one half", "virtual, other half", "synthetic", "untextured"} <= labels, name
    assert [axes.get_title() for axes in drawn["surfaces"].axes] == ["virtual, one half", "virtual, other half", "synthetic", "untextured"]


# what the numbers say


def test_means_and_the_best_methods() -> None:
    means = mean_scores(score_table(ours=0.9, baseline=0.7))
    assert list(means["set"]) == ["held-out synthetic"] * 2 + ["real masks"] * 2
    assert list(means["method"]) == [OURS, "local threshold"] * 2
    assert list(means["images"]) == [2, 2, 2, 2]
    assert means["ap50"].tolist() == pytest.approx([0.91, 0.71, 0.91, 0.71])
    best = best_methods(means)
    assert {(0, "ap50"), (0, "vi_split"), (2, "miou")} <= best
    assert (1, "ap50") not in best
    assert {(0, "count_ratio"), (1, "count_ratio")} <= best  # level
    assert best_methods(means[means["method"] == OURS]) == set()


@pytest.mark.parametrize(("ours", "words"), [(0.9, "better than"), (0.5, "worse than"), (0.7, "level with")])
def test_headline_admits_failure(sets: dict[str, ImageSet], ours: float, words: str) -> None:
    text = headline(make_inputs(sets, scores=score_table(ours, baseline=0.7)))
    assert f"{words} the local threshold (0.71)" in text
    assert "“real masks”" in text
    assert "10 % too many" in text


def test_headline_says_when_only_synthetic_images_were_scored(sets: dict[str, ImageSet]) -> None:
    scores = score_table()
    text = headline(make_inputs(sets, scores=scores[scores["set"] == "held-out synthetic"]))
    assert "no micrograph with a mask" in text


def test_grain_sizes_against_numpy(inputs: ReportInputs) -> None:
    table = grain_sizes(inputs.grains)
    diameters = inputs.grains["equivalent_diameter"][:60].to_numpy()
    row = table.iloc[0]
    assert (row["set"], row["unit"], row["grains"]) == ("simulated truth", "px", 60)
    assert [row["mean"], row["std"]] == pytest.approx([diameters.mean(), diameters.std()])
    assert [row["p10"], row["median"], row["p90"]] == pytest.approx(np.percentile(diameters, [10, 50, 90]))


def test_metrics_cover_the_projects_own_scores() -> None:
    labels = structure(0)
    assert set(score_grains(labels, labels == 0)) <= set(METRICS)
    assert set(score_particles(labels, labels > 0)) <= set(METRICS)


def test_every_realism_figure_is_explained(inputs: ReportInputs, tmp_path: Path) -> None:
    with ImageSetWriter(tmp_path / "synthetic", "synthetic") as writer:
        for k in (0, 2):
            writer.add(inputs.synthetic.image(k), id=f"{k}", labels=inputs.synthetic.labels(k), look="translated", fidelity=0.9,
                       morphology=f"s{2 * k - k // 2}")
    found = set_realism(inputs.micrographs, writer.result, inputs.morphologies, build_network("Unet", "resnet18", None).eval())
    assert set(found.summary) | {"vgg16_kid"} == set(REALISM)


# the terminal


def test_summary_fits_eighty_columns_and_says_everything(inputs: ReportInputs) -> None:
    command = "mlflow ui --backend-store-uri sqlite:////home/someone/work/graincast/mlflow.db --port 5000"
    places = {"report": "/runs/a/report.html", "model": "graincast-segmenter 3"}
    output = printed(summary_table(inputs, places, {"MLflow dashboard": command}))
    assert max(map(len, output.splitlines())) <= 80
    assert "\x1b" not in output
    for words in ("2 real micrographs read, 1 refused", "the file is text", "4 morphologies",
                  "40 steps in 39 s", "3 labelled images, 1 dropped", "epoch 4 has the lowest", "0.910",
                  "0.710", "/runs/a/report.html", "graincast-segmenter 3", "4.250"):
        assert words in output, words
    assert "".join(command.split()) in "".join(output.replace("\\\n", "").split())


def test_summary_survives_json(inputs: ReportInputs) -> None:
    facts = json.loads(json.dumps(summarise(inputs), allow_nan=False))
    assert printed(summary_table(facts, {}, {})) == printed(summary_table(inputs, {}, {}))


def test_summary_prints_names_literally(tmp_path: Path) -> None:
    run = make_inputs(image_sets(tmp_path, source="[red]x[/red]\x1b[31m.tif"))
    output = printed(summary_table(run, {}, {}))
    assert "[red]x[/red]" in output
    assert "\x1b" not in output
