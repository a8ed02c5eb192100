"""The table that ends a run in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from graincast.evaluate.realism import REAL, SYNTHETIC, UNTEXTURED
from graincast.report.findings import METRICS, REALISM, plural, summarise
from graincast.report.inputs import ReportInputs

SHOWN = ("ap50", "pq", "bf1_4px", "miou", "d_astm_g")
"""Metrics that fit into 80 columns; the report has all."""
REFUSED_SHOWN = 5
COMMAND_WIDTH = 74
"""Characters of a command on a line; a longer one is continued with a backslash, so that it can be copied."""


def summary_table(run: ReportInputs | Mapping[str, Any], places: Mapping[str, str],
                  commands: Mapping[str, str]) -> Group:
    """What a run did and found, for a terminal of 80 columns or more, with or without colour.

    Parameters
    ----------
    run : ReportInputs or mapping
        The run, or what `graincast.report.findings.summarise` made of it.
    places : mapping of str to str
        Where things are: name (``report``, ``MLflow run``, ``model``) to path, id or address.
    commands : mapping of str to str
        What to do next: purpose (``MLflow dashboard``) to shell command.

    Returns
    -------
    rich.console.Group
        For `rich.console.Console.print`.
    """
    facts = summarise(run) if isinstance(run, ReportInputs) else run
    parts: list[RenderableType] = [_text(facts["title"], "bold")]
    if facts["virtual"]:
        parts.append(Text("VIRTUAL micrographs: from the virtual SEM, no real microscope involved", "yellow"))
    parts += [Text(), _text(facts["headline"]), _stages(facts)]
    if facts["scores"]:
        parts.append(_scores(facts["scores"]))
    if facts["realism"]:
        parts.append(_realism(facts["realism"], _kind(facts)))
    return Group(*parts, _places(places), *_commands(commands))


def _stages(facts: Mapping[str, Any]) -> Table:
    table = Table("stage", "result", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[1].overflow = "fold"
    for stage, result in (("simulate", f"{facts['morphologies']} morphologies"),
                          ("ingest", _ingested(facts)), ("translator", _translator(facts["translator"])),
                          ("synthesise", _synthesised(facts)), ("segmenter", _segmenter(facts["segmenter"]))):
        table.add_row(stage, _text(result))
    return table


def _ingested(facts: Mapping[str, Any]) -> str:
    refused = facts["refused"]
    lines = [f"{plural(facts['micrographs'], f'{_kind(facts)} micrograph')} read, {len(refused)} refused",
             *(f"{source}: {reason}" for source, reason in refused[:REFUSED_SHOWN])]
    if len(refused) > REFUSED_SHOWN:
        lines.append(f"and {len(refused) - REFUSED_SHOWN} more, see the report")
    return "\n".join(lines)


def _translator(training: Mapping[str, float]) -> str:
    return plural(int(training["steps"]), "step") + _duration(training)


def _synthesised(facts: Mapping[str, Any]) -> str:
    mean, lowest = (_number(facts["fidelity"][name]) for name in ("mean", "min"))
    return (f"{plural(facts['synthetic'], 'labelled image')}, {facts['dropped']} dropped\n"
            f"label fidelity {mean} on average, {lowest} at least")


def _segmenter(training: Mapping[str, float]) -> str:
    text = plural(int(training["epochs"]), "epoch") + _duration(training)
    if "best_epoch" in training:
        loss = _number(training["val_loss"])
        text += f"\nepoch {training['best_epoch']} has the lowest validation loss, {loss}"
    return text


def _scores(scores: Iterable[Mapping[str, Any]]) -> Table:
    rows = list(scores)
    metrics = [name for name in SHOWN if any(name in row for row in rows)]
    table = Table("segmentation", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].overflow = "fold"
    for label in ("images", *(METRICS[name].label for name in metrics)):
        table.add_column(label, justify="right", no_wrap=True)
    sets = dict.fromkeys(row["set"] for row in rows)
    for name in sets:
        table.add_row(_text(name))
        for row in (row for row in rows if row["set"] == name):
            values = (_number(row[metric]) for metric in metrics)
            table.add_row(_text(f"  {row['method']}"), str(row["images"]), *values)
    return table


def _realism(realism: Mapping[str, Mapping[str, float]], kind: str) -> Table:
    table = Table("realism (0 = alike)", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("synthetic", "untextured", f"{kind} against {kind}"):
        table.add_column(heading, justify="right")
    for name in (name for name in REALISM if name in realism):
        values = (_number(realism[name].get(group)) for group in (SYNTHETIC, UNTEXTURED, REAL))
        table.add_row(_text(REALISM[name].label), *values)
    return table


def _places(places: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, place in places.items():
        table.add_row(_text(name, "bold"), _text(place))
    return table


def _commands(commands: Mapping[str, str]) -> Iterable[RenderableType]:
    for purpose, command in commands.items():
        yield Padding(_text(purpose, "bold"), (1, 0, 0, 0))
        lines = textwrap.wrap(command, COMMAND_WIDTH, break_long_words=False, break_on_hyphens=False)
        yield Text(_printable("  " + " \\\n    ".join(lines)), "cyan", overflow="fold")


def _kind(facts: Mapping[str, Any]) -> str:
    return "virtual" if facts["virtual"] else "real"


def _duration(training: Mapping[str, float]) -> str:
    if "seconds" not in training:
        return ""
    minutes, seconds = divmod(round(training["seconds"]), 60)
    return f" in {minutes} min {seconds:02d} s" if minutes else f" in {seconds} s"


def _number(value: float | None) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _text(text: str, style: str = "") -> Text:
    """Text without markup: the names of files and sets are data."""
    return Text(_printable(text), style)


def _printable(text: str) -> str:
    """Escape codes and other control characters, which a file name may hold, must not reach the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
