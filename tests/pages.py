"""Reads the pages of the documentation: their blocks of code, inline code and sections."""

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *{*(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "changelog.md"}])
"""The pages but for the changelog, which names what is no more."""
LANGUAGES = ("bash", "python", "yaml", "text", "json", "toml")
NEEDS = ("weights", "gpu", "network", "files", "hours")
MARKS = {
    "needs": f"one of {', '.join(NEEDS)}: the block is checked and not run",
    "runs": "smoke: a run is shrunk as --smoke does, in the folder that it would have; "
    "matrix: the block is run by pytest -m matrix alone, and checked otherwise",
    "part of": "where a fragment of a recipe goes, such as stages[].train, or recipe for its top level",
    "saved as": "the file of the page's folder that the block is written to, for the blocks after it; Python is then not run",
    "given": "files and folders that the reader has by then, with commas",
    "copy of": "a file of the repository that has these lines and is tested elsewhere",
}
"""What an HTML comment above a block may say."""
_COMMENT = re.compile(r"^\s*<!-- ([a-z ]+): (.+?) -->$")
_FENCE = re.compile(r"^( *)(```+|~~~+) *(.*)$")


@dataclass
class Block:
    """Code in fences."""

    page: str
    line: int
    """The number of its first line of code."""
    language: str
    text: str
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def needs(self):
        return self.marks.get("needs")

    @property
    def given(self):
        return [name.strip() for name in self.marks["given"].split(",")] if "given" in self.marks else []


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def read(text, page):
    """The blocks of ``text``, and a line for each one that is not written as the convention says."""
    lines, blocks, problems, marks, item, i = text.split("\n"), [], [], {}, 0, 0
    while i < len(lines):
        line, i = lines[i], i + 1
        if fence := _FENCE.match(line):
            start, (indent, ticks, language) = i, fence.groups()
            while i < len(lines) and lines[i].strip() != ticks:
                i += 1
            body = [code[len(indent) :] for code in lines[start:i]]
            blocks.append(Block(page, start + 1, language, "\n".join(body) + "\n", marks))
            problems += [f"{page}:{start}: {problem}" for problem in _of_fence(indent, language, marks)]
            i, marks = i + 1, {}
        elif comment := _COMMENT.match(line):
            marks = {**marks, comment[1]: comment[2]}
        elif line.strip():
            before = lines[i - 2] if i > 1 else ""
            if not line.startswith(" "):
                listed = re.match(r"([-*+]|\d+\.) +", line)
                item = len(listed[0]) if listed else item if before.strip() and item else 0
            elif not before.strip() and len(line) - len(line.lstrip()) >= item + 4:
                problems.append(
                    f"{page}:{i}: an indented block: write it in fences with a language ({', '.join(LANGUAGES)})"
                )
            problems += [f"{page}:{i - 1}: the comment {key!r} has no block below it" for key in marks]
            marks = {}
    return blocks, problems


def _of_fence(indent, language, marks):
    if language not in LANGUAGES:
        yield f"the fence has the language {language!r}: one of {', '.join(LANGUAGES)}"
    if indent:
        yield "the fence is indented: begin it at the left margin, which every reader of Markdown understands"
    for key, value in marks.items():
        if key not in MARKS:
            yield f"no comment {key!r}: a block may have " + "; ".join(f"{k}: {v}" for k, v in MARKS.items())
        elif (key == "needs" and set(value.split(", ")) - {*NEEDS}) or (
            key == "runs" and value not in ("smoke", "matrix")
        ):
            yield f"{key}: {value} is not known: {MARKS[key]}"


def prose(text):
    """``text`` with empty lines in the place of its blocks and comments."""
    without = re.sub(r"^ *(```+).*?^ *\1$", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S)
    return re.sub(r"<!--.*?-->", "", without)


def inline_code(text):
    """(line, code) of each inline code of the page ``text``, which may go on in the next line."""
    found = re.finditer(
        r"(?<!`)(`+)(?!`)((?:[^\n]|\n(?!\s*\n|\||- ))+?)(?<!`)\1(?!`)", (plain := prose(text))
    )
    return [(plain.count("\n", 0, m.start()) + 1, " ".join(m[2].split())) for m in found]


def sections(text):
    """(line, heading, text) of each section: from a heading to the next one of any depth."""
    hidden = re.sub(r"^ *(```+).*?^ *\1$", lambda m: m[0].replace("\n#", "\n "), text, flags=re.M | re.S)
    starts = [m.start() for m in re.finditer(r"^#+ .+$", hidden, re.M)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        heading = text[start : text.index("\n", start)].lstrip("# ")
        yield text.count("\n", 0, start) + 1, heading, text[start:end]
