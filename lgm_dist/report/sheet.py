"""A contact sheet of predictions: one self-contained HTML file to look through, sortable by confidence, class and name."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from lgm_dist.adapt.files import FileAnswer
from lgm_dist.data.photo import decoded, open_image
from lgm_dist.report.page import Html, page, tag

SIDE = 160
"""Longest side of a thumbnail."""
_ORDERS = (("least", "Least certain first"), ("most", "Most certain first"), ("label", "By class"), ("name", "By name"))
_STYLE = """
.orders { display: flex; flex-wrap: wrap; gap: 8px; margin: 1.2rem 0; }
.orders button { font: inherit; font-size: .9rem; padding: 8px 14px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); color: var(--ink); cursor: pointer; }
.orders button[aria-pressed=true] { border-color: var(--s0); color: var(--s0); font-weight: 600; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px; padding: 0; list-style: none; }
.sheet li { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px; min-width: 0; }
.sheet img { display: block; width: 100%; height: 130px; object-fit: contain; }
.sheet p { margin: 6px 0 0; overflow-wrap: anywhere; } .sheet .file { color: var(--pale); font-size: .78rem; }
"""
_SCRIPT = """
const list = document.querySelector(".sheet"), buttons = [...document.querySelectorAll(".orders button")];
const number = (item) => Number(item.dataset.p), text = (key) => (a, b) => a.dataset[key].localeCompare(b.dataset[key]);
const orders = { least: (a, b) => number(a) - number(b), most: (a, b) => number(b) - number(a),
  label: (a, b) => text("label")(a, b) || number(b) - number(a), name: text("name") };
for (const button of buttons) button.addEventListener("click", () => {
  buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
  list.append(...[...list.children].sort(orders[button.dataset.order]));
});
"""


def sheet(answers: Sequence[FileAnswer], title: str) -> str:
    """The page with a thumbnail, the class and its probability for each photo, the least certain first.

    Files that could not be read come last, with the reason.
    """
    known = sorted(answers, key=lambda a: a.prediction.probability if a.prediction else 2.0)
    bad = sum(answer.prediction is None for answer in answers)
    unknown = sum(bool(answer.prediction and answer.prediction.unknown) for answer in answers)
    counts = [f"{len(answers):,} photos", f"{unknown:,} of them none of these" if unknown else ""]
    counts.append(f"{bad:,} could not be read" if bad else "")
    buttons = [
        tag("button", label, type="button", data_order=order, aria_pressed=str(order == "least").lower())
        for order, label in _ORDERS
    ]
    cards = tag("ul", *(_card(answer) for answer in known), cls="sheet")
    controls = tag("div", *buttons, cls="orders", role="group", aria_label="Order")
    style, script = Html(f"<style>{_STYLE}</style>"), Html(f"<script>{_SCRIPT}</script>")
    return page(title, ", ".join(filter(None, counts)), style, controls, cards, script)


def _card(answer: FileAnswer) -> Html:
    path, p = str(answer.path), answer.prediction
    file = tag("p", path, cls="file")
    if p is None:
        failed = tag("p", "could not be read", cls="warn")
        return tag("li", failed, tag("p", answer.problem), file, data_p="2", data_label="~", data_name=path)
    told = tag("p", tag("strong", p.label), f" {100 * p.probability:.0f} %")
    note = [tag("p", "none of these", cls="warn")] if p.unknown else []
    parts = (_thumbnail(answer), told, *note, file)
    return tag("li", *parts, data_p=f"{p.probability:.6f}", data_label=p.label, data_name=path)


def _thumbnail(answer: FileAnswer) -> Html:
    """The photo, upright and small, inside the page."""
    with open_image(answer.path) as image:
        small = decoded(image, "RGB", str(answer.path))
    small.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    small.save(content, "JPEG", quality=80)
    source = "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
    return Html(str(tag("img", alt=answer.path.name, src=source, loading="lazy")).removesuffix("</img>"))
