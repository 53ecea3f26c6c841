"""Shows a plug-in's warning as one line, without the place in posttrain's code that found the fault."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from posttrain.support.plugins import PluginWarning


def show_in_one_line() -> None:
    """Let warnings of plug-ins be one line of standard error. Others are shown as before."""
    warnings.showwarning = functools.partial(_show, warnings.showwarning)


def _show(before: Any, message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
    if not issubclass(category, PluginWarning):
        before(message, category, *place, **options)
        return
    from rich.text import Text

    from posttrain.support.display import shown
    from posttrain.support.terminal import Terminal

    line = Text.assemble(("warning: ", "bold yellow"), shown(str(message)))
    Terminal(stderr=True).print(line, soft_wrap=True)
