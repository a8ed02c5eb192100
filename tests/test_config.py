"""The configuration: its files agree with the code, and its errors say what would be right."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic.fields import FieldInfo

from graincast.cli import main
from graincast.config import Config, Section, load_config, parse_config
from graincast.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
LAB = CONFIGS / "lab.yaml"
MARK = ">>> SET THIS"
"""Stands in the comment of a key of lab.yaml whose value is not its default."""


def fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a section and the sections in it, with dots, and its field."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def comments(path: Path) -> dict[str, str]:
    """The comment directly above every key under ``parameters: config:``, as one line, by key with dots."""
    found: dict[str, str] = {}
    place: list[str] = []
    above: list[str] = []
    for line in path.read_text().splitlines():
        if line.lstrip().startswith("#"):
            above.append(line.strip(" #"))
            continue
        if key := re.match(r"((?:  )*)(\w+):", line):
            place = [*place[: len(key[1]) // 2], key[2]]
            found[".".join(place[2:])] = " ".join(above)
        above = []
    return found


FIELDS = dict(fields())


# lab.yaml, the template


def test_template_has_every_key_and_no_other() -> None:
    tree = yaml.safe_load(LAB.read_text())["parameters"]["config"]
    assert [key for key, _ in flat(tree)] == list(FIELDS)  # in the order of the code, too


@pytest.mark.parametrize("key", FIELDS)
def test_template_explains_key(key: str) -> None:
    comment, default = comments(LAB)[key], yaml.safe_dump(FIELDS[key].default).splitlines()[0]
    assert f"{FIELDS[key].description} (default: {default})" in comment


def test_template_values_are_the_defaults_but_for_those_marked() -> None:
    values, explained = dict(flat(load_config(LAB).model_dump())), comments(LAB)
    differing = {key for key, field in FIELDS.items() if values[key] != field.default}
    assert differing == {key for key, comment in explained.items() if MARK in comment} == {"session.folder"}


@pytest.mark.parametrize(("key", "field"), FIELDS.items(), ids=list(FIELDS))
def test_key_is_described_with_its_unit(key: str, field: FieldInfo) -> None:
    assert field.description
    for unit, words in {"_um": r"\bum\b", "_px": r"\bpx\b", "_deg": r"\bdegrees\b"}.items():
        if key.endswith(unit):
            assert re.search(words, field.description)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_configuration_files_load(path: Path) -> None:
    assert isinstance(load_config(path), Config)
    assert set(yaml.safe_load(path.read_text())) == {"parameters"}  # nothing that ties it to a stack


def test_paper_size() -> None:
    simulate = load_config(CONFIGS / "paper.yaml").simulate
    assert (simulate.size, simulate.grains, simulate.steps, simulate.synthetic_structures) == (512, 112, 1000, 180)
    assert simulate.translator_structures + simulate.synthetic_structures + simulate.validation_structures == 300


# reading configurations


def test_missing_keys_and_sections_take_defaults(tmp_path: Path) -> None:
    assert parse_config(None) == parse_config({}) == Config()
    path = tmp_path / "few.yaml"
    path.write_text("parameters:\n  config:\n    segmenter: {epochs: 3}\n")
    assert load_config(path).segmenter.epochs == 3
    path.write_text("parameters:\n  config:\n")
    assert load_config(path) == Config()


def test_configuration_survives_its_own_dump() -> None:
    config = load_config(LAB)
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump()))) == config


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().simulate.size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"segmenter": {"learning_rat": 1e-3}}, "unknown key 'segmenter.learning_rat', did you mean 'learning_rate'?"),
        ({"session": {"virtual": {"sem": {"prob_um": 1}}}}, "unknown key 'session.virtual.sem.prob_um', did you mean 'probe_um'?"),
        ({"segmentor": {}}, "unknown key 'segmentor', did you mean 'segmenter'?"),
        ({"ingest": {"xyzzy": 1}}, "unknown key 'ingest.xyzzy', valid keys are pixel_size_um, require_pixel_size, "),
        ({"simulate": {"size": "large"}}, "simulate.size: input should be a valid integer.*, got 'large'"),
        ({"simulate": {"size": 256.5}}, "simulate.size: input should be a valid integer.*, got 256.5"),
        ({"simulate": {"size": 3}}, "simulate.size: input should be greater than or equal to 32, got 3"),
        ({"synthesise": {"min_fidelity": 2}}, "synthesise.min_fidelity: input should be less than or equal to 1, got 2"),
        ({"translator": {"crop": 100}}, "translator.crop: input should be a multiple of 8, got 100"),
        ({"translator": {"precision": "half"}}, "translator.precision: input should be 'auto', 'float32' or 'bfloat16', got 'half'"),
        ({"simulate": None}, "simulate: input should be a valid dictionary.*, got None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parse_says_what_is_wrong(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="^mine: " + message.replace("?", r"\?")):
        parse_config(tree, "mine")


def test_parse_names_every_mistake_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse_config({"simulate": {"size": 3, "grain": 5}, "evaluate": {"overlays": -1}})
    assert all(part in str(caught.value) for part in ("simulate.size", "did you mean 'grains'?", "evaluate.overlays"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameters: {config: [1", "cannot be read as a YAML configuration"),
        ("", "has no 'parameters: config:' section"),
        ("simulate: {}\n", "has no 'parameters: config:' section"),
        ("parameters: {}\n", "has no 'parameters: config:' section"),
        ("parameters:\n", "has no 'parameters: config:' section"),
        ("just words\n", "has no 'parameters: config:' section"),
        ("parameters: {config: {simulate: {sizes: 64}}}", "unknown key 'simulate.sizes', did you mean 'size'"),
        ("parameters: {config: [1, 2]}", ": config: input should be a valid dictionary"),
    ],
)
def test_load_says_which_file_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}.*{message}"):
        load_config(path)


def test_load_refuses_what_is_no_text_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "image.yaml"
    path.write_bytes(b"\x89PNG\xff\xfe")
    for wrong in (path, tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(UserError, match=f"^{re.escape(str(wrong))} cannot be read as a YAML configuration"):
            load_config(wrong)


# graincast configure


def configure(monkeypatch: pytest.MonkeyPatch, base: Path, out: Path, *assignments: str) -> None:
    """Run the command line as the console script does."""
    options = [word for assignment in assignments for word in ("--set", assignment)]
    monkeypatch.setattr(sys, "argv", ["graincast", "configure", str(base), *options, "-o", str(out)])
    with pytest.raises(SystemExit) as end:
        main()
    if end.value.code:
        raise UserError(f"exit status {end.value.code}")


def test_configure_changes_the_named_keys_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "mine.yaml"
    changes = ["segmenter.epochs=50", "translator.learning_rate=2e-4", "session.virtual.sem.probe_um=0.1", "ingest.require_pixel_size=true",
               "ingest.scale=0.5"]
    configure(monkeypatch, CONFIGS / "demo.yaml", out, *changes)
    before, after = (dict(flat(load_config(path).model_dump())) for path in (CONFIGS / "demo.yaml", out))
    assert {key: value for key, value in after.items() if value != before[key]} == {
        "segmenter.epochs": 50, "translator.learning_rate": 2e-4, "session.virtual.sem.probe_um": 0.1, "ingest.require_pixel_size": True,
        "ingest.scale": 0.5}
    configure(monkeypatch, out, out, "ingest.scale=null")
    assert load_config(out).ingest.scale is None


@pytest.mark.parametrize("folder", ["micrographs", "2026-11-20", "0042", "no", "a: b", "with space/and=sign", "[1]", "#7"])
def test_configure_takes_any_folder_name(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, CONFIGS / "demo.yaml", tmp_path / "mine.yaml", f"session.folder={folder}")
    assert load_config(tmp_path / "mine.yaml").session.folder == folder


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("segmenter.epoch=5", "unknown key 'segmenter.epoch', did you mean 'epochs'?"),
        ("segmentor.epochs=5", "unknown key 'segmentor', did you mean 'segmenter'?"),
        ("epochs=5", "unknown key 'epochs'"),
        ("segmenter.epochs.more=5", "segmenter.epochs: input should be a valid integer"),
        ("segmenter.epochs=many", "segmenter.epochs: input should be a valid integer"),
        ("segmenter.epochs=0", "segmenter.epochs: input should be greater than or equal to 1"),
        ("segmenter.epochs", "KEY=VALUE would be right"),
        ("segmenter=5", "segmenter: input should be a valid dictionary"),
    ],
)
def test_configure_refuses(
    assignment: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="exit status 2"):
        configure(monkeypatch, LAB, tmp_path / "mine.yaml", assignment)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("graincast: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "mine.yaml").exists()


def test_configure_names_a_missing_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="exit status 2"):
        configure(monkeypatch, tmp_path / "absent.yaml", tmp_path / "mine.yaml", "segmenter.epochs=5")
    assert "absent.yaml cannot be read" in capsys.readouterr().err
