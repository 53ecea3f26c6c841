"""Runs the blocks of a page in order, in a copy of this process and a folder of the page's own."""

import functools
import importlib
import linecache
import os
import re
import runpy
import subprocess
import sys
import traceback
import types
from pathlib import Path

import forked
from page_files import GIVEN
from page_scripts import RUN, commands
from pages import ROOT

SHOWN = 30
"""Lines of what a command printed that a message shows."""


_WARM = {
    "diffusers": "AutoencoderKL SD3Transformer2DModel StableDiffusion3Pipeline",
    "transformers": "CLIPTextModelWithProjection CLIPTokenizer T5EncoderModel T5TokenizerFast",
    "posttrain.planning.tables": "resources",
    "posttrain.planning.overview": "overview",
    "posttrain.recipe.catalogue": "",
    "posttrain.scoring.catalogue": "listing",
    "posttrain.stages.chain": "run",
    "posttrain.stages.export": "export",
}
"""Module -> what is imported from it."""


def is_run(block):
    """Whether a block is run, by the matrix at least."""
    return block.language in ("bash", "python") and not block.needs and "copy of" not in block.marks


def failure(blocks, folder, made):
    """What the first block that fails said, or nothing. ``made`` is a folder for what pages are given."""
    _warm()
    for name in sorted({name for block in blocks if is_run(block) for name in block.given}):
        GIVEN[name](folder, made)
    paths = os.pathsep.join([str(folder), str(ROOT)])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "COLUMNS": "120",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    done = forked.finished(_page, blocks, cwd=folder, environment=environment, seconds=600)
    if done.returncode == 0:
        return ""
    return done.stdout or f"the page ended with code {done.returncode}:\n{done.stderr}"


@functools.cache
def _warm():
    """Import once what most commands need; the copies of this process then have it."""
    for module, names in _WARM.items():
        for name in names.split():
            getattr(importlib.import_module(module), name)


def _page(blocks):
    """Run ``blocks`` in the current folder; ends with exit code 1 after the first that fails, and says why."""
    notebook = types.ModuleType("__main__")
    sys.modules["__main__"] = notebook
    sys.path.insert(0, os.getcwd())
    for block in blocks:
        if "saved as" in block.marks:
            file = Path(block.marks["saved as"])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, "utf-8")
        elif not is_run(block):
            continue
        elif block.language == "bash":
            for line, words in commands(block.text, variables=True):
                _command(f"{block.page}:{block.line + line}", words, block.marks.get("runs") == "smoke")
        else:
            _python(block, notebook)


def _fail(place, shown, printed):
    last = "\n".join(f"    {line}" for line in printed.rstrip().split("\n")[-SHOWN:])
    sys.stdout.write(
        f"{place}: {shown}\n  failed when the page was run, and printed:\n{last}\n"
        "  Mend it, or write above the block, on a line of its own, <!-- needs: weights --> (or gpu, network, files,\n"
        "  hours): then it is checked and not run. docs/contributing.md, Documentation, has all comments.\n"
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _command(place, words, smoke):
    command = words[next(i for i, word in enumerate(words) if not re.match(r"\w+=", word)) :]
    variables = dict(word.split("=", 1) for word in words[: -len(command)])
    program = command[0].rsplit("/", 1)[-1]
    try:
        if program == "posttrain":
            forked.posttrain(*(_smoke(command[1:]) if smoke else command[1:]), cwd=os.getcwd(), **variables)
        elif program.startswith("python") and not command[1].startswith("-"):
            environment = {**os.environ, **variables}
            done = forked.finished(_script, command[1:], cwd=os.getcwd(), environment=environment)
            assert done.returncode == 0, done.stdout + done.stderr
        elif program in RUN:
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            raise AssertionError(f"{program!r} is never run by the test: such a block needs a comment")
    except AssertionError as error:
        _fail(place, " ".join(words), str(error))


def _smoke(words):
    """The command shrunk. It writes the folder that it would write unshrunk, for the commands after it."""
    if words[0] != "run" or "--smoke" in words:
        return words
    from posttrain.errors import PosttrainError
    from posttrain.recipe.file import load_recipe

    try:
        name = load_recipe(words[1], checks=False).name
    except PosttrainError:
        return words  # the command says what is wrong
    return [*words, "--smoke", *([] if "--output" in words else ["--output", f"runs/{name}"])]


def _script(words):
    file = words[0] if Path(words[0]).exists() else str(ROOT / words[0])
    sys.argv = [file, *words[1:]]
    runpy.run_path(file, run_name="__main__")


def _python(block, notebook):
    name = f"<{block.page}, line {block.line}>"
    text = "\n" * (block.line - 1) + block.text
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    try:
        if block.marks.get("runs") == "smoke":
            _shrink()
        exec(compile(text, name, "exec"), notebook.__dict__)
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == name]
        line = frames[-1].lineno if frames else block.line
        shown = text.split("\n")[(line or block.line) - 1].strip()
        _fail(f"{block.page}:{line}", shown, f"{type(error).__name__}: {error}")


def _shrink():
    """Let ``posttrain.run`` of Python run the recipe shrunk."""
    import posttrain
    from posttrain.recipe.file import load_recipe
    from posttrain.recipe.smoke import smoke
    from posttrain.support.files import write

    @functools.wraps(whole := posttrain.run)
    def run(recipe, output=None, *arguments, **more):
        loaded = recipe if isinstance(recipe, posttrain.Recipe) else load_recipe(recipe, checks=False)
        folder = Path(output or f"runs/{loaded.name}")
        small = smoke(loaded, folder)
        for file, text in small.files.items():
            write(file, text)
        return whole(small.recipe, folder, *arguments, **more)

    posttrain.run = run
