"""The look of a plan's tables and of the settings that it proposes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from posttrain.support.wording import short

if TYPE_CHECKING:
    from rich.console import RenderableType

NONE = "–"


def table(title: str, columns: Sequence[str]) -> Table:
    """An empty table with a column of names and one for each stage."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    made.add_column(title, no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right", overflow="fold")
    return made


def amount(value: float) -> str:
    """Bytes in words; a dash for none."""
    return short(value, "B") if value else NONE


def offer(words: str, settings: Iterable[str]) -> Iterator[RenderableType]:
    """What settings would do, and the settings as arguments of ``--set``, one a line."""
    yield Padding(Text(words), (0, 0, 0, 2), expand=False)
    for setting in settings:
        field, _, value = setting.partition("=")
        quoted = f"{field}='{value}'" if " " in value else setting
        yield Text(f"    --set {quoted}", style="cyan", no_wrap=True)
