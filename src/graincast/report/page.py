"""What all pages of graincast are made of: tables, embedded pictures, and templates that need no network."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import imageio.v3 as iio
import jinja2
import numpy as np
import pandas as pd

MANY = 12
"""Rows above which a table is folded away."""
UNKNOWN, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Table:
    """A table of text cells; the first cell of a row is its header.

    Attributes
    ----------
    caption : str
        What the table holds.
    head : sequence of str
        Column headers.
    rows : sequence of sequence of str
        Cells.
    numeric : frozenset of int
        Columns set flush right.
    best : frozenset of (int, int)
        Cells (row, column) set bold.
    folded : bool
        Whether it is closed until a reader opens it.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    best: frozenset[tuple[int, int]] = frozenset()
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """An embedded image: data address, size in CSS px, alternative text, caption; charts follow dark mode."""

    source: str
    width: int
    height: int
    alt: str
    caption: str
    chart: bool = False


def render(template: str, **facts: Any) -> str:
    """A page from one of this package's templates; text is escaped, and a fact that the template lacks is an error."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("graincast", "report"), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**facts)


def embedded(image: np.ndarray, alt: str, caption: str, *, chart: bool = False) -> Picture:
    """A picture, uint8 (height, width) or (height, width, 3), at its own size."""
    source = data_address(iio.imwrite("<bytes>", image, extension=".png"))
    return Picture(source, image.shape[1], image.shape[0], alt, caption, chart)


def data_address(png: bytes) -> str:
    """A PNG file as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def number(value: Any, form: str | None = None) -> str:
    """Three decimals below 10 and four digits above, or `form`; an en dash for what is unknown."""
    if pd.isna(value):
        return UNKNOWN
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    return format(value, form or (".3f" if abs(value) < 10 else ".4g")).replace("-", MINUS)


def text(value: Any) -> str:
    return UNKNOWN if pd.isna(value) else str(value)
