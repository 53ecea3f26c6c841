"""Does the wheel, installed by itself outside the checkout, hold all that it needs?"""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built through the sdist, as a release is."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", out, ROOT], check=True, capture_output=True, timeout=300
    )
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_recipe_and_weight(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("posttrain", "algorithms", "rewards", "recipes"):
        for file in (ROOT / folder).rglob("*"):
            inside = file.relative_to(ROOT).as_posix()
            if (
                file.suffix not in (".py", ".yaml", ".j2", ".safetensors", ".json", ".txt")
                or "__pycache__" in inside
            ):
                continue
            assert "posttrain/" + inside.removeprefix("posttrain/") in names, inside
    assert not any(name.startswith(("algorithms/", "rewards/", "recipes/", "tests/")) for name in names)


def test_the_installed_wheel_runs_outside_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    probe = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import posttrain; assert posttrain.__file__.startswith(sys.path[0]), posttrain.__file__\n"
        "from posttrain.recipe_file import load_recipe, shipped_recipes\n"
        "print(sorted(shipped_recipes())); load_recipe('quickstart')\n"
        "import torch; from posttrain.models.sd3 import SD3\n"
        "SD3(path='posttrain/tiny-sd3', max_sequence_length=16).load(torch.device('cpu'), 'fp32')\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", probe], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "'quickstart'" in done.stdout


def test_importing_a_folder_under_its_bare_name_is_refused():
    for name in ("algorithms", "rewards", "recipes"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True
        )
        assert f"import posttrain.{name}, not {name}" in done.stderr


def test_the_engine_imports_no_algorithm_reward_or_model():
    engine = "trainer, posttrain.policy, posttrain.algorithm, posttrain.reward, posttrain.flow, posttrain.checkpoint"
    probe = f"import sys, posttrain.{engine}\nprint([m for m in sys.modules if m.startswith(('posttrain.algorithms.', 'posttrain.rewards.', 'posttrain.models.'))])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
