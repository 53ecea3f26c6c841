"""Shows any text on any terminal, in any locale."""

from __future__ import annotations

import os
import sys
import unicodedata

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters, of marks that reorder or hide text, of halves of characters,
and of line and paragraph separators."""
PLAIN = ("\n", "\t", "\u200d")
"""Characters of these categories that are shown unchanged. The last one joins the parts of an emoji."""


def shown(text: str) -> str:
    r"""``text`` with each character that a terminal would obey or hide written out, such as ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in HIDDEN and c not in PLAIN else c
        for c in text
    )


def print_any_text() -> None:
    """Let stdout and stderr write out the characters that their encoding lacks, such as ``\\u2013``."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


def restart_in_utf8() -> None:
    """Run this process's command anew in Python's UTF-8 mode, if the locale knows ASCII alone.

    Without it Python can neither open a file such as ``café.png`` nor read a prompt with an é from the
    command line.
    """
    if sys.getfilesystemencoding() == "ascii":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
