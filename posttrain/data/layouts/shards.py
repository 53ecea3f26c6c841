"""Reads ``.tar`` files of images and captions, in the layout of the library webdataset.

Neighbouring members of one stem are a sample: ``a/0001.jpg``, ``a/0001.txt``, ``a/0001.json``. The order of
training is a permutation of all images, which a stream of a tar cannot give. A tar that is not compressed
has each member's bytes in one piece, so its headers are read once and images are then read where they lie.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from posttrain.data.columns import CAPTIONS, bucket_of, caption_of, extra_of, listed
from posttrain.data.index import file_of, keep, kept
from posttrain.data.layouts.captions import ENDINGS, lines_in, note_several
from posttrain.data.layouts.lists import is_absolute, leaves
from posttrain.data.lines import MAX_LINE, Problem, json_object, text
from posttrain.data.place import Place
from posttrain.data.settings import Images
from posttrain.data.table import Record
from posttrain.errors import DataError
from posttrain.support.heartbeat import beat

FORMAT = 1
"""Version of the kept index."""
IMAGES = tuple(ending[1:] for ending in ENDINGS)
CAPTION, COLUMNS = "txt", "json"
Sample = dict[str, Any]
"""``key``: the members' stem. ``members``: ending -> [start, size]. ``txt``, ``json``: their bytes as text.
``problem``: why it cannot be read, if so."""


def read(spec: Images, files: Sequence[Path], notes: list[str]) -> Iterator[Record | Problem]:
    """The samples of the tars ``files``. No image is opened. Adds to ``notes`` which members are left out.

    Raises DataError if a file cannot be read, is compressed, or ends too soon.
    """
    if spec.image_dir is not None:
        raise DataError(f"{spec.images}: image_dir has no effect on .tar files")
    numbers, others, several = count(), set[str](), 0
    for file in sorted(files, key=lambda f: f.as_posix()):
        beat()
        try:
            status = file.stat()
            about = file.absolute(), status.st_size, status.st_mtime_ns, FORMAT
            place = file_of("tar", *about)
            if not _whole(samples := kept(place, list)):
                keep(place, samples := _samples(file, status.st_size))
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{file}: {_reason(error)}") from error
        for sample in samples:
            number, at = next(numbers), file / sample["key"].lstrip("/")
            others |= sample["members"].keys() - {*IMAGES, CAPTION, COLUMNS}
            several += len(lines_in(sample.get(CAPTION, ""))) > 1
            try:
                yield _record(spec, number, file, at, status.st_mtime_ns, sample)
            except ValueError as error:
                yield Problem(0, None, str(error), at)
    note_several(several, notes)
    if others:
        notes.append(
            f"members that are neither image nor caption are left out: {listed(sorted(others)[:10])}"
        )


def _record(spec: Images, number: int, file: Path, at: Path, mtime_ns: int, sample: Sample) -> Record:
    """The record of the sample ``at`` a place in ``file``. Raises ValueError if it cannot be used."""
    if "problem" in sample:
        raise ValueError(sample["problem"])
    members = sample["members"]
    endings = [spec.image_column] if spec.image_column is not None else [e for e in IMAGES if e in members]
    if not endings or endings[0] not in members:
        raise ValueError(f"no image among its members ({listed(members)})")
    if len(endings) > 1:
        raise ValueError(f"several images ({listed(endings)}): name one ending by image_column")
    columns = json_object(sample[COLUMNS].encode("utf-8", "surrogateescape")) if COLUMNS in sample else {}
    caption = spec.caption_column
    if CAPTION in sample and caption in (None, CAPTION):
        content = text(sample[CAPTION].encode("utf-8", "surrogateescape"))
        columns = {**columns, CAPTION: " ".join(lines_in(content.removeprefix("\ufeff")))}
        caption = CAPTION
    elif caption is None:
        caption = next((name for name in CAPTIONS if name in columns), None)
    if caption is None:
        raise ValueError(f"no caption: neither .txt nor one of {listed(CAPTIONS)} in .json")
    start, size = members[endings[0]]
    image = Place.of_part(file, mtime_ns, f"{sample['key']}.{endings[0]}", start, size)
    extra = extra_of(columns, (caption,))
    return Record(number, image, caption_of(columns, caption), bucket_of(columns), 0, at, extra)


def _whole(samples: list[Any]) -> bool:
    """Whether kept samples are there, and are what was kept."""
    return bool(samples) and all(
        isinstance(sample, dict)
        and isinstance(sample.get("key"), str)
        and isinstance(members := sample.get("members"), dict)
        and all(isinstance(at, list) and [type(n) for n in at] == [int, int] for at in members.values())
        and all(isinstance(sample.get(name, ""), str) for name in (CAPTION, COLUMNS, "problem"))
        for sample in samples
    )


def _samples(file: Path, size: int) -> list[Sample]:
    """The samples of a tar, from its headers and its small members."""
    samples: list[Sample] = []
    times: Counter[str] = Counter()
    with tarfile.open(file, "r:", encoding="utf-8", errorlevel=0) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  it would keep every header
            key, ending = _split(member.name)
            if member.isdir() or key.rpartition("/")[2] == "":
                continue
            if member.isfile() and member.offset_data + member.size > size:
                raise tarfile.ReadError("unexpected end of data")
            if (problem := _problem(member)) is not None:
                times[key] += 1
                samples.append({"key": _named(key, times), "members": {}, "problem": problem})
                continue
            if not samples or samples[-1]["key"] != _named(key, times) or ending in samples[-1]["members"]:
                times[key] += 1
                samples.append({"key": _named(key, times), "members": {}})
                if times[key] > 1:
                    samples[-1]["problem"] = "a second sample of this name; members must be neighbours"
            samples[-1]["members"][ending] = [member.offset_data, member.size]
            if ending in (CAPTION, COLUMNS) and (handle := tar.extractfile(member)) is not None:
                samples[-1][ending] = handle.read(MAX_LINE + 1).decode("utf-8", "surrogateescape")
        if tar.offset + tarfile.BLOCKSIZE > size:
            raise tarfile.ReadError("unexpected end of data")  # zeros mark the end of an archive
    return samples


def _split(name: str) -> tuple[str, str]:
    """The stem of a member's name, with its folder, and its ending; the file's first point parts them."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


def _named(key: str, times: Mapping[str, int]) -> str:
    """The name of the latest sample of the stem ``key``; each of a shard has its own."""
    return key if times[key] < 2 else f"{key} ({times[key]})"


def _problem(member: tarfile.TarInfo) -> str | None:
    """Why a member cannot be used; None if it can."""
    if leaves(member.name) or is_absolute(member.name):
        return f"the member's name must not leave the archive: {member.name[:80]!r}"
    if not member.isfile() or member.issparse():
        return f"{member.name[-80:]!r} is no plain file but a link"
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if "end of data" in str(error):
        return "the archive ends too soon: it was not written or copied whole"
    return f"no .tar archive, or a compressed one ({error}); images are read where they lie: unpack it first"
