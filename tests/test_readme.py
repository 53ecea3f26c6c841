"""What the README shows works as it is written."""

import os
import re
import subprocess
import sys
from pathlib import Path

from runs import DATA, HEAD, TRAIN

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_algorithm_in_the_readme_trains_from_a_package_outside(tmp_path):
    """As a plug-in: a module anywhere on the path and one entry point."""
    (code,) = (block for block in blocks("python") if "(Algorithm)" in block)
    assert len(code.splitlines()) <= 40
    (tmp_path / "mine.py").write_text(code)
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    name = re.search(r'Literal\["(\w+)"\]', code)[1]
    (info / "entry_points.txt").write_text(f"[posttrain.algorithms]\n{name} = mine\n")
    stage = f"  - name: mine\n    algorithm: {{type: {name}}}\n    data: {DATA}\n    train: {TRAIN}\n"
    (tmp_path / "r.yaml").write_text(HEAD + "stages:\n" + stage)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "posttrain", "run", "r.yaml", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "mine" / "final" / "model_index.json").is_file()
    wrong = (tmp_path / "r.yaml").read_text().replace(f"type: {name}", f"type: {name}x")
    (tmp_path / "w.yaml").write_text(wrong)
    command = [sys.executable, "-m", "posttrain", "check", "w.yaml"]
    refused = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert refused.returncode == 1
    assert f"did you mean '{name}'" in refused.stderr


def test_every_file_and_recipe_that_the_docs_name_exists():
    from posttrain.recipe.file import shipped_recipes

    for text in (README, *(p.read_text() for p in (ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / target).exists() or (ROOT / "docs" / target).exists(), target
        for name in re.findall(r"posttrain (?:run|check|recipes copy) ([a-z0-9][a-z0-9-]*)(?=[\s`\n])", text):
            assert name in shipped_recipes(), name
