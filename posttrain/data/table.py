"""The rows of a data set of images: usable ones, those that are not, and what tells whether they changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.data.lines import Problem, listing
from posttrain.data.place import Place
from posttrain.data.settings import Images
from posttrain.errors import DataError
from posttrain.support.wording import counted

Bucket = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True, slots=True)
class Record:
    """A usable row."""

    id: int
    """Number of the row among all rows, usable or not, from 0."""
    image: Place
    caption: str
    bucket: Bucket | None
    """The row's own size, if it names one."""
    line: int
    """Line or row of ``file``, from 1; 0 if ``file`` alone names the row."""
    file: Path
    """The file that the row is in, for messages."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, as JSON values."""

    @property
    def path(self) -> Path:
        """The file that holds the image."""
        return self.image.path

    @property
    def metadata(self) -> dict[str, Any]:
        """What algorithms and rewards see of the row: its other columns, and the caption as ``prompt``."""
        return {**self.extra, "prompt": self.caption}

    def problem(self, reason: str) -> Problem:
        """Why the row cannot be used after all."""
        return Problem(self.line, self.image.path if self.line else None, reason, self.file)


@dataclass(frozen=True)
class Table:
    """The rows of a data set."""

    file: Path
    """The file or folder that the recipe names."""
    layout: str
    """What it is, in words."""
    rows: int
    """Number of rows: len(records) + len(problems)."""
    records: list[Record]
    """The usable rows."""
    problems: list[Problem]
    """One for each row that cannot be used."""
    files: dict[str, Any]
    """What tells whether the images are still the same, without reading them: their ``count`` and ``bytes``,
    and hashes of their names and sizes and of their times of change."""
    listed: Path | None = None
    """The file that lists the rows, if there is one and no more."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the user that are no problems."""


def table_of(
    spec: Images,
    layout: str,
    rows: Iterable[Record | Problem],
    notes: Sequence[str] = (),
    listed: Path | None = None,
) -> Table:
    """The table of ``rows``. Raises DataError if none is usable, or if the fraction of unusable rows exceeds
    ``spec.tolerance``. ``notes`` may grow while the rows are read; ``listed`` is the file that lists them."""
    records: list[Record] = []
    problems: list[Problem] = []
    for row in rows:
        if isinstance(row, Record):
            records.append(row)
        else:
            problems.append(row)
    total = len(records) + len(problems)
    stop_beyond_tolerance(spec, problems, total)
    places = {(record.image.path, record.image.start) for record in records}
    repeated = len(records) - len(places)
    told = f"images that are repeated: {counted(repeated, 'row')}; all are kept"
    said = [*notes, *([told] if repeated else [])]
    return Table(spec.images, layout, total, records, problems, digest_of_files(records), listed, said)


def digest_of_files(records: Iterable[Record]) -> dict[str, Any]:
    """What is known of the images without reading them, as JSON values: their ``count``, their ``bytes``, and
    hashes of their names and ``sizes`` and of the ``times`` at which their files were changed."""
    count, total = 0, 0
    sizes, times = hashlib.sha256(), hashlib.sha256()
    for record in records:
        image = record.image
        count, total = count + 1, total + image.size
        sizes.update(f"{image.name} {image.size}\n".encode(errors="surrogateescape"))
        times.update(f"{image.mtime_ns}\n".encode())
    return {"count": count, "bytes": total, "sizes": sizes.hexdigest(), "times": times.hexdigest()}


def digest_of_rows(records: Iterable[Record]) -> str:
    """A hash of what the rows say: names, captions, sizes and other columns."""
    made = hashlib.sha256()
    for record in records:
        made.update(json.dumps([record.image.name, record.metadata, record.bucket]).encode())
    return made.hexdigest()


def stop_beyond_tolerance(spec: Images, problems: Sequence[Problem], rows: int) -> None:
    """Raise DataError if all ``rows``, or a larger fraction than ``spec.tolerance``, have problems."""
    allowed = int(spec.tolerance * rows + 1e-9)  # 0.29 * 100 is below 29 in binary
    if len(problems) < rows and len(problems) <= allowed:
        return
    summary = f"{len(problems)} of {rows} rows cannot be used" if rows else "it has no rows"
    limit = f" (allowed: {allowed}, by tolerance {spec.tolerance:g})" if len(problems) > allowed else ""
    raise DataError(
        f"{spec.images}: {summary}{limit}{listing(spec.images, problems)}\n"
        "Repair or remove these rows"
        + (", or raise 'tolerance' to skip them." if len(problems) < rows else "; none is left to train on.")
    )
