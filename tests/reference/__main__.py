"""Writes the pages of docs/ that are made from the code, or with --check says which are not current.

    python tests/reference                writes docs/reference-*.md
    python tests/reference --check        compares, and writes nothing
    python tests/reference --recipes      writes docs/recipe-list.md, for which it plans every recipe

The script is no page and lies outside docs/, because the site's generator publishes every file there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # posttrain need not be installed

import api
import commands
import fields
import recipe_list

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = {
    "reference-recipe.md": fields.page,
    "reference-commands.md": commands.page,
    "reference-python.md": api.page,
}
"""What is a function of the code alone. The plans in docs/recipe-list.md take a minute, and change with measured
rates and counts; of that page only what the recipes say is checked."""


def main() -> int:
    """Write or check the pages; the number of pages that are not current."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name the pages that differ")
    parser.add_argument("--recipes", action="store_true", help="write docs/recipe-list.md instead")
    options = parser.parse_args()
    if options.recipes:
        (DOCS / "recipe-list.md").write_text(recipe_list.page(), encoding="utf-8")
        return 0
    stale = [name for name, page in PAGES.items() if _text(DOCS / name) != page()]
    for name in stale:
        if options.check:
            print(f"docs/{name} is not current: python tests/reference")
        else:
            (DOCS / name).write_text(PAGES[name](), encoding="utf-8")
            print(f"wrote docs/{name}")
    if not options.check:
        return 0
    others = recipe_list.stale(_text(DOCS / "recipe-list.md") or "")
    if others:
        print(
            f"docs/recipe-list.md, {', '.join(others)}: not as the recipe is: python tests/reference --recipes"
        )
    return len(stale) + len(others)


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
