"""Reads a folder of images, each with a ``.txt`` file of the same stem that is its caption."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from posttrain.data.columns import caption_of
from posttrain.data.lines import MAX_LINE, Problem, text
from posttrain.data.place import Place
from posttrain.data.settings import Images
from posttrain.data.table import Record
from posttrain.errors import DataError
from posttrain.support.wording import counted

ENDINGS = (
    ".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2",
)  # fmt: skip
"""Endings of the names of images, in small letters."""
CAPTION = ".txt"


def read(spec: Images, files: list[Path], notes: list[str]) -> Iterator[Record | Problem]:
    """A row for each image among ``files``, in the order of their paths below the folder. None is opened.

    The whole text of a caption's file is one caption; line breaks become spaces. Adds to ``notes`` what is
    left out. Raises DataError for settings that would have no effect.
    """
    for name in ("image_dir", "image_column", "caption_column"):
        if getattr(spec, name) is not None:
            raise DataError(f"{spec.images}: {name} has no effect on a folder of images with .txt files")
    images = sorted((f for f in files if f.suffix.lower() in ENDINGS), key=lambda f: f.as_posix())
    if not images:
        kinds = _kinds(f.suffix.lower() for f in files)
        raise DataError(
            f"{spec.images}: no image in the folder and its subfolders, none of {', '.join(ENDINGS)} "
            f"(found: {kinds or 'no file'})"
        )
    captions = {f.with_suffix(""): f for f in files if f.suffix.lower() == CAPTION}
    used, several = set(), 0
    for number, path in enumerate(images):
        used.add(stem := path.with_suffix(""))
        try:
            image = Place.of_file(path)
            if stem not in captions:
                raise ValueError(f"no caption: no file {stem.name + CAPTION!r} beside it")
            lines = _lines(captions[stem])
            several += len(lines) > 1
            row = Record(number, image, caption_of({CAPTION: " ".join(lines)}, CAPTION), None, 0, path)
        except ValueError as error:
            yield Problem(0, None, str(error), path)
        else:
            yield row
    note_several(several, notes)
    if alone := len(captions.keys() - used):
        notes.append(f"{counted(alone, '.txt file')} without an image")
    if others := _kinds(f.suffix.lower() for f in files if f.suffix.lower() not in (*ENDINGS, CAPTION)):
        notes.append(f"other files are left out: {others}")


def _kinds(endings: Iterable[str]) -> str:
    """How many files have each ending, in words."""
    return ", ".join(f"{n} {ending or 'without ending'}" for ending, n in Counter(endings).most_common(10))


def files_in(folder: Path, notes: list[str]) -> list[Path]:
    """All files in ``folder`` and its subfolders, but for hidden ones; links to folders are not followed.

    Adds to ``notes`` how many were left out. Raises DataError if a folder cannot be read.
    """
    found: list[Path] = []
    linked = 0

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {(error.strerror or str(error)).lower()}") from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        linked += sum(os.path.islink(os.path.join(place, name)) for name in folders)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    if linked:
        notes.append(f"{counted(linked, 'linked subfolder')} not entered")
    return found


def _lines(file: Path) -> list[str]:
    """The lines of a caption that are not blank. Raises ValueError if it cannot be read."""
    try:
        with file.open("rb") as handle:
            raw = handle.read(MAX_LINE + 1)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ValueError(f"caption not read: {file.name}: {why}") from error
    try:
        content = text(raw.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise ValueError(f"caption not read: {file.name}: {error}".replace("the line", "the file")) from None
    return lines_in(content)


def lines_in(caption: str) -> list[str]:
    """The lines of a caption that are not blank, stripped."""
    return [stripped for line in caption.splitlines() if (stripped := line.strip())]


def note_several(count: int, notes: list[str]) -> None:
    """Add to ``notes`` that ``count`` captions have several lines, if there are any."""
    if count:
        notes.append(f"{counted(count, 'caption')} of several lines; the lines are joined to one caption")
