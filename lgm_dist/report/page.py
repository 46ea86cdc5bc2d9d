"""HTML of the report: one self-contained file without JavaScript, for light and dark, wide and narrow screens."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from lgm_dist.report.tables import Table


class Html(str):
    """Markup. Any other str is text, and is escaped when it enters the page."""


def text(value: str) -> Html:
    """Escape text, and keep its line breaks."""
    return value if isinstance(value, Html) else Html(html.escape(value).replace("\n", "<br>"))


def tag(name: str, *parts: str, **attributes: str) -> Html:
    """An element: <name attribute="value">parts</name>. `cls` is the attribute class, `data_x` is data-x."""
    names = {key: key.replace("cls", "class").replace("_", "-") for key in attributes}
    given = "".join(f' {names[key]}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{''.join(text(part) for part in parts)}</{name}>")


def table(content: Table, chips: Sequence[str] = ()) -> Html:
    """A table that scrolls sideways if it is too wide. `chips` are colours of dots before the first cell of each row."""
    right = [name.startswith(">") for name in content.header]
    head = [_cell("th", name.removeprefix(">"), r, scope="col") for name, r in zip(content.header, right, strict=True)]
    rows = [
        tag("tr", *(_cell("td", cell, r) for cell, r in zip(row, right, strict=True)))
        for row in _chipped(content, chips)
    ]
    body = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows))
    scroll = tag("div", body, cls="scroll", tabindex="0", role="region", title=content.title)
    note = [tag("p", content.note, cls="note")] if content.note else []
    return Html("".join([tag("h3", content.title), scroll, *note]))


def _chipped(content: Table, chips: Sequence[str]) -> list[tuple[str, ...]]:
    if not chips:
        return content.rows
    return [(Html(chip(colour) + text(row[0])), *row[1:]) for colour, row in zip(chips, content.rows, strict=True)]


def _cell(name: str, value: str, right: bool, **attributes: str) -> Html:
    return tag(name, value, **(attributes | ({"cls": "n"} if right else {})))


def chip(colour: str) -> Html:
    """A dot with the colour of a line in a chart."""
    return Html(f'<span class="chip" style="background:{html.escape(colour)}"></span>')


def figure(svg: Html, title: str, caption: str, legend: Sequence[tuple[str, str]] = ()) -> Html:
    """A chart with its caption. The legend, pairs of colour and name, is text, so that it wraps on narrow screens."""
    names = [tag("li", chip(colour), name) for colour, name in legend]
    below = [tag("ul", *names, cls="legend")] if names else []
    return tag("figure", tag("h3", title), svg, tag("figcaption", *below, tag("span", caption)))


def picture(path: Path, alt: str) -> Html:
    """A PNG inside the page. Raises ValueError for a file that is not a whole PNG."""
    data = path.read_bytes()
    if not (data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")):
        raise ValueError(f"{path.name} is damaged and left out")
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    return tag("figure", Html(f'<img alt="{html.escape(alt)}" src="{source}">'), tag("figcaption", alt), cls="picture")


def charts(*figures: Html) -> Html:
    """Charts, side by side if there is room."""
    return tag("div", *figures, cls="charts") if figures else Html("")


def figures(pairs: Sequence[tuple[str, str]]) -> Html:
    """The most important figures, pairs of name and value, in large type."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), cls="key")


def section(title: str, *parts: str) -> Html:
    """A part of the page with a heading; empty if it has no content."""
    return tag("section", tag("h2", title), *parts) if any(parts) else Html("")


def page(title: str, lead: str, *sections: str) -> str:
    """The whole document."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
    body = tag("main", tag("header", tag("h1", title), tag("p", lead, cls="lead")), *sections)
    return f'<!doctype html>\n<html lang="en"><head>{head}{tag("title", title)}</head>\n<body>{body}</body></html>\n'


STYLE = Path(__file__).with_name("style.css").read_text()
