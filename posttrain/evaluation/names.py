"""Names folders by the ends of their paths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from posttrain.errors import PosttrainError


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that differ from each other, without folders named ``evaluation``.

    Raises PosttrainError where one folder is given twice.
    """
    paths = [[p for p in f.absolute().parts if p != "evaluation"] for f in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = [os.sep.join(p[-length:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    raise PosttrainError("one folder was given twice")
