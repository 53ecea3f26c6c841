"""Reads a bearer token from an environment variable. No message shows it."""

from __future__ import annotations

import os


def token_in(variable: str) -> str:
    """The token, without the line end with which files of secrets end; empty if there is none."""
    return os.environ.get(variable, "").strip()


def token_problem(variable: str) -> str | None:
    """Why the environment variable holds no token that can be sent; None if it holds one."""
    if not (token := token_in(variable)):
        return f"there is no environment variable {variable!r}, or it is empty"
    if not (token.isascii() and token.isprintable()):  # libraries quote it in their errors
        return f"the environment variable {variable!r} must hold one line of ASCII characters"
    return None
