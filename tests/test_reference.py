"""The pages of docs/ that are made from the code are current."""

import re
import subprocess
import sys
from pathlib import Path

from posttrain.recipe.file import shipped_recipes

ROOT = Path(__file__).parent.parent


def test_the_reference_pages_are_what_the_code_says():
    made = [sys.executable, str(ROOT / "tests" / "reference"), "--check"]
    result = subprocess.run(made, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, (
        f"write them again by: python tests/reference\n{result.stdout}{result.stderr}"
    )


def test_every_shipped_recipe_has_a_row_in_the_list():
    text = (ROOT / "docs" / "recipe-list.md").read_text(encoding="utf-8")
    rows = re.findall(r"^### (\S+)$", text, re.M)
    assert sorted(rows) == sorted(shipped_recipes()), (
        "write the list again by: python tests/reference --recipes"
    )
