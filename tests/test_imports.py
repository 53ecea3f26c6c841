"""What may be imported: under which name, on which system, and by whom."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from posttrain.support.device import peak_memory

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("algorithms", "rewards", "recipes")
POSIX_ONLY = ("fcntl", "grp", "pwd", "resource", "termios")


@pytest.mark.parametrize("options", [(), ("-O",)])
@pytest.mark.parametrize("name", BESIDE)
def test_importing_a_folder_under_its_bare_name_is_refused(name, options):
    command = [sys.executable, *options, "-c", f"import {name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"ImportError: import posttrain.{name}, not {name}" in done.stderr


def test_no_module_needs_a_posix_module_to_be_imported():
    # blocked for posttrain's own modules alone: on Linux psutil and others import them with good reason
    code = (
        "import builtins, importlib, pkgutil, posttrain\n"
        "imported = builtins.__import__\n"
        "def windows(name, globals=None, *rest, **named):\n"
        f"    if name in {POSIX_ONLY} and (globals or {{}}).get('__name__', '').startswith('posttrain.'):\n"
        "        raise ModuleNotFoundError(f'{globals[\"__name__\"]} imports {name}')\n"
        "    return imported(name, globals, *rest, **named)\n"
        "builtins.__import__ = windows\n"
        "for module in pkgutil.walk_packages(posttrain.__path__, 'posttrain.'):\n"
        "    if module.name != 'posttrain.__main__':\n"
        "        try: importlib.import_module(module.name); print(module.name)\n"
        "        except ImportError as error: print(module.name, error, sep=': ')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if ":" in line] == []
    folders = [ROOT / folder for folder in ("posttrain", *BESIDE)]
    files = {file.resolve() for folder in folders for file in folder.rglob("*.py")}
    assert len(lines) == len(files - {ROOT / "posttrain/__init__.py", ROOT / "posttrain/__main__.py"})


def test_on_windows_the_peak_of_memory_is_the_peak_of_the_working_set(monkeypatch):
    asked = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=7 * 2**30, rss=2**30))
    monkeypatch.setattr("posttrain.support.device.sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr("psutil.Process", lambda: asked)
    assert peak_memory(torch.device("cpu")) == 7 * 2**30


def test_the_engine_imports_no_algorithm_reward_or_model():
    engine = "engine.trainer, posttrain.policy.policy, posttrain.algorithm, posttrain.reward, posttrain.flow.rectified, posttrain.engine.checkpoint"
    probe = f"import sys, posttrain.{engine}\nprint([m for m in sys.modules if m.startswith(('posttrain.algorithms.', 'posttrain.rewards.', 'posttrain.models.'))])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
