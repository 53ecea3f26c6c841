"""Reads the pairs of images that a list or parquet files name, and finds the rows that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from posttrain.data.columns import bucket_of, extra_of
from posttrain.data.layouts import pick_a_pic
from posttrain.data.layouts.lists import json_rows, leaves
from posttrain.data.lines import Problem, string
from posttrain.data.loader import ImageSource
from posttrain.data.place import Place
from posttrain.data.settings import Images, PairList, Reading
from posttrain.data.table import Record, Table, digest_of_files, stop_beyond_tolerance
from posttrain.support.wording import counted

SIDES = ("chosen", "rejected")
"""The columns of a row of a list that name its images."""

Pair = tuple[Record, Record]
"""The chosen image, and the rejected one."""


def read_pairs(spec: PairList) -> tuple[Table, Table]:
    """The chosen images of the rows of ``spec.pairs``, and the rejected ones. No image is decoded.

    Both tables have the same ids, lines, captions, problems and digest of the files of both. Raises DataError
    as :func:`posttrain.data.rows.read_records`.
    """
    notes: list[str] = []
    if files := pick_a_pic.parquet_files(spec.pairs):
        layout = counted(len(files), f"{pick_a_pic.SUFFIX} file")
        listed, rows = None, pick_a_pic.read(list_of(spec), files, notes)
    else:
        layout = counted(1, f"{spec.pairs.suffix.lower() or 'list'} file")
        listed, rows = spec.pairs, _of_list(spec)
    pairs: list[Pair] = []
    problems: list[Problem] = []
    for row in rows:
        if isinstance(row, Problem):
            problems.append(row)
        elif _equal(*(record.image for record in row)):
            problems.append(row[0].problem("'chosen' and 'rejected' are the same image"))
        else:
            pairs.append(row)
    total = len(pairs) + len(problems)
    stop_beyond_tolerance(list_of(spec), problems, total)
    digest = digest_of_files(record for pair in pairs for record in pair)
    chosen, rejected = (
        Table(spec.pairs, layout, total, [pair[side] for pair in pairs], problems, digest, listed, notes)
        for side in range(2)
    )
    return chosen, rejected


def _of_list(spec: PairList) -> Iterator[Pair | Problem]:
    folder = spec.image_dir if spec.image_dir is not None else spec.pairs.parent
    for number, (line, row) in enumerate(json_rows(spec.pairs)):
        path = None
        try:
            if isinstance(row, ValueError):
                raise row
            caption, bucket, extra = string(row, "prompt"), bucket_of(row), extra_of(row, ("prompt", *SIDES))
            found = []
            for side in SIDES:
                if leaves(name := string(row, side)):
                    raise ValueError(f"{side!r} must not leave the folder of the images: {name!r}")
                path = folder / name  # an absolute path ignores the folder
                found.append(Record(number, Place.of_file(path), caption, bucket, line, spec.pairs, extra))
            yield found[0], found[1]
        except ValueError as error:
            yield Problem(line, path, str(error), spec.pairs)


def _equal(one: Place, other: Place) -> bool:
    """Whether two images have the same bytes. They are read only if they are equally many."""
    try:
        return one == other or (one.size == other.size and one.sha256() == other.sha256())
    except OSError:
        return False  # decoding reports the reason


def pair_sources(spec: PairList, divisor: int) -> dict[str, ImageSource]:
    """The chosen and the rejected images, each pair in one bucket: the one of the chosen image.

    A pair whose chosen image has no bucket is in neither. Raises DataError as
    :class:`posttrain.data.loader.ImageSource`.
    """
    table, others = read_pairs(spec)
    chosen = ImageSource(list_of(spec), divisor, table)
    records = [
        replace(record, bucket=chosen.bucket_of[record.id])
        for record in others.records
        if record.id in chosen.records
    ]
    others = replace(others, records=records, problems=list(chosen.skipped))
    return {"chosen": chosen, "rejected": ImageSource(list_of(spec), divisor, others)}


def list_of(spec: PairList) -> Images:
    """How the images of ``spec`` are read; messages name its file."""
    return Images(images=spec.pairs, **{name: getattr(spec, name) for name in Reading.model_fields})
