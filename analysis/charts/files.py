"""Charts as files, for papers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import vl_convert

from analysis.charts.theme import theme
from store.files import whole_file

WIDTH = 420  # pixels of a chart outside a page (arbitrary)
FORMS: Mapping[str, Callable[..., str | bytes]] = {
    "svg": vl_convert.vegalite_to_svg,
    "pdf": vl_convert.vegalite_to_pdf,
    "png": partial(vl_convert.vegalite_to_png, scale=3),
}


def write_chart(spec: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Write a chart as SVG, PDF and PNG; existing files are replaced.

    Parameters
    ----------
    spec
        Vega-Lite, without a theme.
    folder
        Created if it does not exist.
    name
        The base of the file names; characters other than letters, digits, '.', '_' and '-' become '-'.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    paper = theme() | {"background": "white"}  # on a transparent background vl-convert changes the hue of pale colours
    written = []
    for form, convert in FORMS.items():
        drawn = convert({**spec, "width": WIDTH}, config=paper, allowed_base_urls=[])
        with whole_file(folder / f"{name}.{form}") as unfinished:
            unfinished.write_bytes(drawn.encode() if isinstance(drawn, str) else drawn)
        written.append(folder / f"{name}.{form}")
    return written
