"""Every way of installing posttrain gives every file, and an install that lacks some says so."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BESIDE = ("algorithms", "rewards", "recipes")
BUILT_FROM = ("posttrain", *BESIDE, "pyproject.toml", "setup.py", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
LIBRARIES = sysconfig.get_paths()["purelib"]


def called(*command, cwd=None):
    """What a command printed; its own words where it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def in_tree(root=ROOT):
    """Every file of the source tree that belongs to the package -> its name in an install."""
    files = {}
    for top in ("posttrain", *BESIDE):
        for folder, inner, names in os.walk(root / top):  # which does not follow links
            inner[:] = [name for name in inner if name != "__pycache__"]
            for name in names:
                file = (Path(folder) / name).relative_to(root).as_posix()
                if file not in {f"posttrain/{link}" for link in BESIDE}:
                    files[file] = file if top == "posttrain" else f"posttrain/{file}"
    assert len(files) > 150
    return files


def installed_in(site):
    """Every file of the package in a folder of installed packages."""
    files = (file for file in (site / "posttrain").rglob("*") if file.is_file())
    return {file.relative_to(site).as_posix() for file in files if "__pycache__" not in file.parts}


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A copy of what the package is built from: a build leaves files beside its source."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    copy.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="session")
def linkless(tree, tmp_path_factory):
    """The copy as git writes it with ``core.symlinks=false``: each link is a text file that holds its target."""
    copy = tmp_path_factory.mktemp("linkless") / "tree"
    shutil.copytree(tree, copy, symlinks=True)
    for link in (copy / "posttrain" / name for name in BESIDE):
        if link.is_symlink():
            target = os.readlink(link)
            link.unlink()
            link.write_text(target)
        assert link.is_file()
    return copy


@pytest.fixture(scope="session")
def built(tree, tmp_path_factory):
    """The sdist and the wheel, built through the sdist, as a release is."""
    out = tmp_path_factory.mktemp("dist")
    copy = out / "tree"
    shutil.copytree(tree, copy, symlinks=True)
    called(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def editable(linkless, tmp_path_factory):
    """A folder of installed packages that holds an editable install of the tree without links."""
    site = tmp_path_factory.mktemp("editable")
    called(*PIP, "--target", site, "--editable", linkless)
    return site


def probe(site, source, code, cwd):
    """Run code where ``site`` is the only folder of packages that has posttrain; returns what it printed.

    Asserts that posttrain was imported from ``source``.
    """
    # -S, as the environment of the tests has an editable install of its own
    start = (
        f"import site, sys\nsite.addsitedir({str(site)!r})\nsys.path.append({LIBRARIES!r})\n"
        f"import posttrain\nassert posttrain.__path__ == [{str(source / 'posttrain')!r}], posttrain.__path__\n"
    )
    return called(sys.executable, "-I", "-S", "-c", start + code, cwd=cwd)


def test_the_sdist_holds_every_file_where_the_tree_has_it(built):
    with tarfile.open(built[0]) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert set(in_tree()) <= names
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= names
    assert not any(name.startswith(tuple(f"posttrain/{link}" for link in BESIDE)) for name in names)


def test_the_wheel_holds_every_file_and_no_other(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    assert {name for name in names if ".dist-info/" not in name} == set(in_tree().values())


def test_a_zip_without_links_installs_every_file(linkless, tmp_path):
    archive = Path(shutil.make_archive(str(tmp_path / "posttrain-main"), "zip", linkless.parent, "tree"))
    called(*PIP, "--target", tmp_path / "site", archive)
    assert installed_in(tmp_path / "site") == set(in_tree().values())


def test_an_editable_install_without_links_finds_every_file(editable, linkless, tmp_path):
    code = (
        "import importlib, json\n"
        f"print(json.dumps({{name: list(importlib.import_module('posttrain.' + name).__path__) for name in {BESIDE}}}))"
    )
    folders = json.loads(probe(editable, linkless, code, tmp_path))
    assert folders == {name: [str(linkless / name)] for name in BESIDE}
    assert in_tree(linkless) == in_tree()


def test_an_editable_install_without_links_reads_a_recipe(editable, linkless, tmp_path):
    code = (
        "from posttrain.recipe.file import load_recipe, shipped_recipes\n"
        "print(*shipped_recipes())\nprint(load_recipe('quickstart').stages[0].algorithm.type)"
    )
    recipes, algorithm = probe(editable, linkless, code, tmp_path).splitlines()
    assert set(recipes.split()) == {file.stem for file in (ROOT / "recipes").glob("*.yaml")}
    assert algorithm in {file.stem for file in (ROOT / "algorithms").glob("*.py")}


def test_the_installed_wheel_runs_outside_the_checkout(built, tmp_path):
    site = tmp_path / "site"
    called(*PIP, "--target", site, built[1])
    code = (
        "from posttrain.recipe.file import load_recipe, shipped_recipes\n"
        "print(sorted(shipped_recipes())); load_recipe('quickstart')\n"
        "import torch; from posttrain.models.sd3 import SD3\n"
        "SD3(path='posttrain/tiny-sd3', max_sequence_length=16).load(torch.device('cpu'), 'fp32')\n"
    )
    assert "'quickstart'" in probe(site, site, code, tmp_path)


@pytest.fixture
def bare(tmp_path):
    """``posttrain/`` alone in a folder, without the links: what the old build installed from a ZIP."""
    ignored = shutil.ignore_patterns("__pycache__", *BESIDE)
    shutil.copytree(ROOT / "posttrain", tmp_path / "posttrain", ignore=ignored)
    return tmp_path


def last_line(folder, code):
    """Run code with the ``posttrain/`` in ``folder``, without an install; the last line of its error."""
    start = f"import sys\nsys.path[:0] = [{str(folder)!r}, {LIBRARIES!r}]\n"
    command = [sys.executable, "-I", "-S", "-c", start + code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr.splitlines()[-1]


def importing(package):
    return f"from posttrain.support.shipped import shipped\nshipped({package!r})"


def commanding(*arguments):
    return f"sys.argv[1:] = {list(arguments)}\nfrom posttrain.cli.app import main\nmain()"


@pytest.mark.parametrize("package", [f"posttrain.{name}" for name in BESIDE])
def test_an_install_that_lacks_a_package_says_so(bare, package):
    line = last_line(bare, importing(package))
    assert line.startswith(f"posttrain.errors.InstallError: this install of posttrain has no {package}: ")
    assert "pip install --force-reinstall" in line
    assert str(bare / package.replace(".", "/")) in line


def test_the_command_line_says_so_in_one_line(bare):
    line = last_line(bare, commanding("check", "quickstart"))
    assert line.startswith("error: this install of posttrain has no posttrain.algorithms: ")


def test_only_the_recipes_are_missing(bare):
    for name in ("algorithms", "rewards"):
        shutil.copytree(ROOT / name, bare / "posttrain" / name)
    line = last_line(bare, commanding("recipes"))
    assert line.startswith("error: this install of posttrain has no posttrain.recipes: ")


def test_a_folder_without_modules_is_a_package_that_is_missing(bare):
    (bare / "posttrain" / "algorithms" / "__pycache__").mkdir(parents=True)
    assert " has no posttrain.algorithms: " in last_line(bare, importing("posttrain.algorithms"))


def test_a_checkout_whose_links_are_text_files_says_how_to_install_it(linkless):
    line = last_line(linkless, commanding("check", "quickstart"))
    assert f"posttrain cannot find posttrain.algorithms: it lies in {str(linkless / 'algorithms')!r}" in line
    assert "is a text file, not a link" in line
    assert "core.symlinks=false" in line
    assert line.endswith(f"pip install -e {str(linkless)!r}")


def test_a_checkout_that_lacks_a_folder_says_which(bare):
    (bare / "pyproject.toml").touch()
    line = last_line(bare, importing("posttrain.algorithms"))
    assert f"{str(bare)!r} is not complete: its folder algorithms/ is missing or empty" in line


def test_an_error_inside_an_algorithm_is_not_called_a_missing_package(bare):
    (bare / "posttrain" / "algorithms").mkdir()
    (bare / "posttrain" / "algorithms" / "__init__.py").write_text("import no_such_library")
    line = last_line(bare, importing("posttrain.algorithms"))
    assert line == "ModuleNotFoundError: No module named 'no_such_library'"
