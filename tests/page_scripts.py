"""Reads the scripts that a page shows, and checks commands of other programs than posttrain without running them."""

import difflib
import itertools
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator

from pages import ROOT

LAUNCHERS = ("torchrun", "accelerate", "srun", "mpirun")
NOT_RUN = (
    "pip", "make", "git", "hf", "pytest", *LAUNCHERS, "sbatch", "docker", "curl", "wget", "ssh", "rsync", "nvidia-smi",
    "tensorboard", "uv", "conda",
)  # fmt: skip
"""Programs whose commands are checked, and need a comment since they are not run."""
RUN = ("mkdir", "ls", "cat", "cp", "mv", "head", "tail")
"""Programs of the system that are run as they are."""
_BEFORE = ("do", "then", "else", "if", "while", "!", "time")
"""Words of a shell before a command."""
_SHELL = {
    "fi",
    "until",
    "done",
    "for",
    "trap",
    "wait",
    "kill",
    "exit",
    "scontrol",
    "export",
    "cd",
    "source",
    "[",
}
_VARIABLE = re.compile(r"\w+=")
_PLACEHOLDER = re.compile(r"(?<![\w-])[A-Z][A-Z_-]*(?![\w-])|\.\.\.|<\w+>|…")


def is_placeholder(word):
    """Whether ``word`` stands for something that a reader puts in its place."""
    return "$" in word or (" " not in word and bool(_PLACEHOLDER.search(word)))


def commands(text, variables=False) -> Iterator[tuple[int, list[str]]]:
    """(line from 0, words) of each command in the script ``text``, without words of a shell alone.

    ``variables`` keeps those that are set for the command, ``X=1``, before its words.
    """
    number = 0  # of lines
    for line in re.sub(r"\\\n", lambda _: "\0", text).split("\n"):
        lexer = shlex.shlex(line.replace("\0", " "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        into_file = False
        for word in [*lexer, ";"]:
            if into_file:
                into_file = False
            elif word in (">", ">>", "<"):
                into_file = True
            elif word and set(word) <= set("();<>|&"):
                yield from [(number, words)] if words else []
                words = []
            elif words or not (word in _BEFORE or (_VARIABLE.match(word) and not variables)):
                words.append(word)
        number += 1 + line.count("\0")


def has_syntax(text):
    """Whether a script has more than commands one after the other: pipes, files, loops."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return any(set(word) <= set("();<>|&") for word in lexer if word)


def shell_problems(text):
    """What bash says of the script ``text``, and whether a quote goes over several lines."""
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    if done.returncode != 0:
        return [f"bash cannot read it: {done.stderr.strip()}"]
    try:
        list(commands(text))
    except ValueError as error:
        return [f"a quote must end in its line: {error}"]
    return []


def program_problems(words) -> list[str]:
    """What is wrong with a command of another program than posttrain."""
    program = words[0].rsplit("/", 1)[-1]
    for begin, check in (
        ("python", _of_python),
        ("pytest", _of_pytest),
        ("pip", _of_pip),
        ("make", _of_make),
    ):
        if program.startswith(begin):
            return check(words[1:])
    if (ROOT / words[0]).is_file():
        return _options_of(words[0], words[1:])
    if program in _SHELL or program in (*NOT_RUN, *RUN) or is_placeholder(words[0]):
        return []
    known = ", ".join(("posttrain", "python", *RUN, *NOT_RUN))
    return [f"{words[0]!r} is no command that the test knows ({known}) and no file: output goes into ```text"]


def launcher_problems(words) -> list[str]:
    """Options of ``torchrun`` or ``accelerate launch`` that it does not have."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser as parser
    elif words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser as parser
    else:
        return []
    known = parser()._option_string_actions
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [f"{words[0]} has no option {o!r}{near(o, known)}" for o in options if o not in known]


def _of_python(words):
    if words[:2] == ["-m", "pytest"]:
        return _of_pytest(words[2:])
    file = next((word for word in words if not word.startswith("-")), None)
    if file is None or is_placeholder(file) or words[0] in ("-m", "-c"):
        return []
    if not (ROOT / file).exists():
        return [f"no file {file!r} in the repository"]
    return _options_of(file, words[words.index(file) + 1 :])


def _options_of(file, words):
    """Options of a script that stand nowhere in it, in a file of its folder, or as a name in Python."""
    place = ROOT / file
    texts = [
        p.read_text()
        for p in (place if place.is_dir() else place.parent).iterdir()
        if p.suffix in (".py", ".sh")
    ]
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    known = "\n".join(texts)
    return [
        f"{file} has no option {option!r}"
        for option in options
        if option not in known and not re.search(rf"\b{option[2:].replace('-', '_')}\b\s*[=:]", known)
    ]


def _of_pytest(words):
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    marks = [line.partition(":")[0] for line in options["markers"]]
    found = [
        f"no file {w!r}"
        for w in words
        if w.endswith(".py") and not (ROOT / w).exists() and not is_placeholder(w)
    ]
    for before, word in itertools.pairwise(words):
        if before == "-m":
            found += [
                f"no mark {m!r} of tests: {', '.join(marks)}"
                for m in set(re.findall(r"\w+", word)) - {*marks, "or", "and", "not"}
            ]
    return found


def _of_pip(words):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = []
    for word in words:
        for named in re.findall(r"^(?:posttrain|\.)\[([\w,-]+)\]", word):
            found += [
                f"posttrain has no extra {e!r}: {', '.join(extras)}"
                for e in named.split(",")
                if e not in extras
            ]
        if "/" in word and "-e" in words and "[" not in word and not (ROOT / word).exists():
            found.append(f"no folder {word!r} in the repository")
    return found


def _of_make(words):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = [word for word in words if "=" not in word and not word.startswith("-")]
    words = [word.partition("=")[2] for word in words if word.startswith("PYTEST_ARGS=")]
    found = [f"the Makefile has no target {w!r}: {', '.join(targets)}" for w in named if w not in targets]
    return found + _of_pytest(words)


def near(word, known):
    near = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {near[0]!r}?)" if near else f": one of {', '.join(known)}"
