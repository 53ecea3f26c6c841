"""Renders a page as HTML that needs no network, and that runs no script but its own."""

from __future__ import annotations

import base64
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from posttrain.evaluation.report.curves import line_style
from posttrain.evaluation.report.view import Page


def html(page: Page) -> str:
    """The text of the HTML file. All names are escaped, and the page's policy refuses any other script."""
    loader = PackageLoader("posttrain.evaluation.report", "")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    environment.globals["line_style"] = lambda number: Markup(line_style(number))
    galleries = [*([page.images] if page.images else []), *page.grids]
    views = max((len(gallery.names) for gallery in galleries), default=0)
    style = environment.get_template("style.css.j2").render(views=views)
    script = environment.get_template("script.js.j2").render()
    text = environment.get_template("page.html.j2").render(
        page=page,
        sections=_sections(page),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    # the name of an image that was left out may have bytes that are no UTF-8, which a page cannot hold
    return text.encode(errors="backslashreplace").decode()


def _hash(text: str) -> str:
    """The hash by which a page's content security policy allows an element with this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _sections(page: Page) -> list[tuple[str, str, bool]]:
    """The id and the heading of each section, and whether it is there."""
    return [
        ("alarms", "Alarms", bool(page.alarms)),
        ("results", "Results", bool(page.scores or page.details)),
        ("images", "Images", bool(page.images or page.grids)),
        ("curves", "Curves", bool(page.curves or page.more_curves)),
        ("cost", "Cost", bool(page.cost)),
        ("settings", "Settings", bool(page.settings or page.skipped)),
    ]
