"""Checks what a page shows without running it."""

import json
import tomllib

from page_code import copy_problems, python_problems, yaml_problems
from page_commands import Checker
from page_files import GIVEN
from page_scripts import NOT_RUN, commands, has_syntax, is_placeholder, shell_problems
from pages import inline_code, read

COMMENT = (
    "write above the block, on a line of its own, <!-- needs: weights --> (or gpu, network, files, hours)"
)


def problems(text, page):
    """A line or more for each thing in the page ``text`` that is wrong without running it."""
    blocks, found = read(text, page)
    checker, known = Checker(), {}
    modules = [block.marks["saved as"].removesuffix(".py") for block in blocks if "saved as" in block.marks]
    for block in blocks:
        place = f"{page}:{block.line}"
        found += [
            f"{place}: nothing is known of {name!r}: {', '.join(GIVEN)}"
            for name in block.given
            if name not in GIVEN
        ]
        if "copy of" in block.marks:
            found += [f"{place}: {problem}" for problem in copy_problems(block)]
        elif block.language == "bash":
            found += [f"{place}: {problem}" for problem in shell_problems(block.text)] or [
                *_of_script(block, checker)
            ]
        elif block.language == "yaml":
            found += yaml_problems(block, modules)
            checker.recipes.update({block.marks["saved as"]: block.text} if "saved as" in block.marks else {})
        elif block.language == "python":
            found += python_problems(block, known)
        elif block.language in ("json", "toml"):
            found += [f"{place}: {problem}" for problem in _unread(block)]
    return [*found, *inline_problems(text, page, checker)]


def _of_script(block, checker):
    if not block.needs and has_syntax(block.text):
        fault = f"pipes, files and loops of a shell are not run: write plain commands, or {COMMENT}"
        yield f"{block.page}:{block.line}: {fault}"
    for line, words in commands(block.text):
        for problem in checker.problems(words) + ([] if block.needs else [*_unrunnable(words)]):
            yield f"{block.page}:{block.line + line}: {' '.join(words)}\n  {problem}"


def inline_problems(text, page, checker):
    """The same of the commands of posttrain in inline code."""
    for line, code in inline_code(text):
        for words in _inline_command(code):
            for problem in checker.problems(words, inline=True):
                yield f"{page}:{line}: `{code}`\n  {problem}"


def _unrunnable(words):
    program = words[0].rsplit("/", 1)[-1]
    if program in NOT_RUN or (program.startswith("python") and words[1:2] and words[1].startswith("-")):
        yield f"{program} is checked and not run: {COMMENT}"
    elif placeholders := [word for word in words if is_placeholder(word)]:
        yield f"{placeholders[0]!r} stands for something else, so this cannot be run: {COMMENT}"


def _inline_command(code):
    """The words of the command that inline ``code`` is, if it is one of ``posttrain``."""
    try:
        found = [words for _, words in commands(code)]
    except ValueError:  # a quote that is not closed
        return []
    return [
        words
        for words in found
        if words[0] == "posttrain" and len(words) > 1 and not words[1].startswith(".")
    ]


def _unread(block):
    try:
        if block.language == "toml":
            tomllib.loads(block.text)
        else:
            _json(block.text)
    except ValueError as error:
        yield f"no {block.language}: {error}"


def _json(text):
    try:
        json.loads(text)
    except ValueError:  # JSONL
        for line in text.splitlines():
            json.loads(line)
