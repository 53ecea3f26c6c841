"""The console on which commands print. Names, captions and paths are shown as they are, never obeyed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from posttrain.support.display import shown


class Terminal(Console):
    """A console that obeys no markup, emoji names or terminal codes in what it prints."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **options)  # before the text is laid out

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(shown(segment.text), segment.style)


def note(console: Console, line: str, style: str = "dim") -> None:
    """Print a line beside results: what happens, as it is expected, or in another ``style`` what is not."""
    console.print(line, style=style, soft_wrap=True, highlight=False, markup=False, emoji=False)
