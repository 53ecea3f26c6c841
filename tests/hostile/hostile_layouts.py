"""Folders, lists, archives and tables of images that cannot be used, each with the words that say why.

A maker writes a data set into an empty folder, with a good image beside the hostile one where it can, and
returns the settings of the data.
"""

import csv
import gzip
import io
import tarfile

from hostile_images import JPEG, PNG, png_of

GOOD = [("good.png", PNG), ("good.txt", b"a cat")]
LONG = b"x" * 2_000_000


def folder(*files):
    def make(place):
        for name, content in [*GOOD, *files]:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        return {"images": place}

    return make


def listed(content, name="metadata.csv", **settings):
    def make(place):
        (place / "good.png").write_bytes(PNG)
        (place / "empty.png").touch()
        (place / name).write_bytes(content)
        return {"images": place, **settings}

    return make


HEADER = b"file_name,text\ngood.png,a cat\n"


def metadata(cells):
    text = io.StringIO(newline="")
    csv.writer(text).writerow(cells)
    return listed(HEADER + text.getvalue().encode("utf-8", "surrogateescape"))


def packed(*members, cut=None, squeeze=False, **settings):
    """A tar of the good image and ``members``: (name, content or a tarfile type)."""

    def make(place):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for name, content in [*GOOD, *members]:
                about = tarfile.TarInfo(name)
                if isinstance(content, bytes):
                    if content is not tarfile.SYMTYPE and content is not tarfile.LNKTYPE:
                        about.size = len(content)
                        tar.addfile(about, io.BytesIO(content))
                        continue
                    about.type, about.linkname = content, "/etc/passwd"
                tar.addfile(about)
        content = data.getvalue()[:cut]
        (place / "a.tar").write_bytes(gzip.compress(content) if squeeze else content)
        return {"images": place / "a.tar", **settings}

    return make


def table(columns, **settings):
    def make(place):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), place / "a.parquet")
        (place.parent / "secret.png").write_bytes(PNG)
        return {"images": place / "a.parquet", **settings}

    return make


def image(content, path=None):
    return {"bytes": content, "path": path}


def beside(row, caption="x"):
    return table({"image": [image(PNG), row], "text": ["a cat", caption]})


# One row cannot be used; the good one stays. (name, maker, words of its problem)
SKIPPED = [
    ("no caption", folder(("b.png", PNG)), "no caption: no file 'b.txt' beside it"),
    ("a blank caption", folder(("b.png", PNG), ("b.txt", b" \n\t\n")), "'.txt' is empty"),
    ("a caption of Latin-1", folder(("b.png", PNG), ("b.txt", b"caf\xe9")), "b.txt: not UTF-8 at byte 4 of the file"),
    ("a caption of UTF-16", folder(("b.png", PNG), ("b.txt", "a".encode("utf-16"))), "b.txt: not UTF-8"),
    ("a caption of 2 MB", folder(("b.png", PNG), ("b.txt", LONG)), "the file has more than 1,000,000 bytes"),
    ("a long caption", folder(("b.png", PNG), ("b.txt", b"x" * 20_001)), "20,001 characters"),
    ("a caption that is cut JSON", folder(("b.png", PNG), ("b.txt", b'{"long": "a')), "starts like a JSON object"),
    ("an empty image", folder(("b.png", b""), ("b.txt", b"x")), "zero bytes"),
    ("a path upwards", metadata(["../good.png", "x"]), "must not leave the folder"),
    ("a path upwards inside", metadata(["x/../../good.png", "x"]), "must not leave the folder"),
    ("a Windows path upwards", metadata([r"..\good.png", "x"]), "must not leave the folder"),
    ("an absolute path", metadata(["/etc/passwd", "x"]), "must not leave the folder"),
    ("an absolute Windows path", metadata([r"C:\good.png", "x"]), "must not leave the folder"),
    ("a device", metadata(["/dev/zero", "x"]), "must not leave the folder"),
    ("escapes", metadata(["\x1b[2J[red].png", "x"]), "no such file"),
    ("a missing image", metadata(["none.png", "x"]), "no such file"),
    ("an empty file", metadata(["empty.png", "x"]), "zero bytes"),
    ("a cell too few", metadata(["good.png"]), "1 cells, but the first line names 2 columns"),
    ("a cell too many", metadata(["good.png", "a", "cat"]), "3 cells, but the first line names 2 columns"),
    ("no text", metadata(["good.png", ""]), "no 'text' (found: 'file_name')"),
    ("a cell of Latin-1", metadata(["good.png", "caf\udce9"]), "'text' is not UTF-8"),
    ("a cell of 2 MB", metadata(["good.png", "x" * 2_000_000]), "field larger than field limit"),
    ("a long cell", metadata(["good.png", "x" * 20_001]), "20,001 characters"),
    (
        "a size in words",
        listed(b"file_name,text,bw,bh\ngood.png,a,8,8\ngood.png,a,eight,8\n"),
        "'bw' must be a positive whole number",
    ),
    ("a weight in words", listed(b"file_name,text,weight\ngood.png,a,1\ngood.png,a,heavy\n"), "'weight' must be"),
    ("an infinite weight", listed(b"file_name,text,weight\ngood.png,a,1\ngood.png,a,inf\n"), "'weight' must be"),
    (
        "a row of JSON with an absolute path",
        listed(b'{"file_name": "good.png", "text": "a"}\n{"file_name": "/etc/passwd", "text": "a"}\n', "metadata.jsonl"),
        "must not leave the folder",
    ),
    ("a member upwards", packed(("../../b.png", PNG)), "must not leave the archive: '../../b.png'"),
    ("an absolute member", packed(("/etc/b.png", PNG)), "must not leave the archive"),
    ("a symbolic link", packed(("b.png", tarfile.SYMTYPE)), "'b.png' is no plain file but a link"),
    ("a hard link", packed(("b.png", tarfile.LNKTYPE)), "'b.png' is no plain file but a link"),
    ("a member of no bytes", packed(("b.png", b""), ("b.txt", b"x")), "zero bytes"),
    ("a sample without caption", packed(("b.png", PNG)), "no caption: neither .txt nor one of 'caption', 'text'"),
    ("a sample without image", packed(("b.txt", b"x")), "no image among its members ('txt')"),
    ("a sample of two images", packed(("b.png", PNG), ("b.jpg", JPEG), ("b.txt", b"x")), "several images ('jpg', 'png')"),
    ("a sample of broken JSON", packed(("b.png", PNG), ("b.json", b'{"caption": ')), "broken JSON"),
    ("a sample of other JSON", packed(("b.png", PNG), ("b.json", b"[]")), "not a JSON object but list"),
    ("a sample of Latin-1", packed(("b.png", PNG), ("b.txt", b"caf\xe9")), "not UTF-8"),
    ("a sample of 2 MB of caption", packed(("b.png", PNG), ("b.txt", LONG)), "more than 1,000,000 bytes"),
    ("a null image", beside(None), "no image: neither bytes nor a path"),
    ("an image of no bytes", beside(image(b"")), "zero bytes"),
    ("a table's path upwards", beside(image(None, "../secret.png")), "must not leave the folder of the images"),
    ("a table's absolute path", beside(image(None, "/etc/passwd")), "must not leave the folder of the images"),
    ("a table's missing file", beside(image(None, "none.png")), "no such file"),
    ("a null caption", beside(image(PNG), None), "'text' must be text, not null"),
    ("a blank caption in a table", beside(image(PNG), " "), "'text' is empty"),
    ("a long caption in a table", beside(image(PNG), "x" * 20_001), "20,001 characters"),
    (
        "a weight that is no number",
        table({"image": [image(PNG)] * 2, "text": ["a", "b"], "weight": [1.0, float("inf")]}),
        "the number inf is not finite",
    ),
]  # fmt: skip
# The image itself is refused when it is decoded.
UNDECODABLE = [
    ("a cut member", packed(("b.png", PNG[:60]), ("b.txt", b"x")), "truncated or damaged"),
    ("a bomb in a tar", packed(("b.png", png_of(100_000, 100_000)), ("b.txt", b"x")), "more than max_pixels"),
    ("a bomb in a table", beside(image(png_of(100_000, 100_000))), "more than max_pixels"),
    ("text in a table", beside(image(b"hello")), "not an image"),
    ("a padded JPEG in a table", beside(image(JPEG[:-90] + bytes(90))), "truncated"),
    (
        "a bomb in a folder",
        folder(("b.png", png_of(100_000, 100_000)), ("b.txt", b"x")),
        "more than max_pixels",
    ),
    (
        "a page that is called an image",
        folder(("b.jpg", b"<!doctype html>"), ("b.txt", b"x")),
        "not an image",
    ),
]
# The data set is refused as a whole. (name, maker, words of the error)
REFUSED = [
    ("no header", listed(b"good.png,a cat\n"), "the first line must name the columns, each once, one of them 'md5' or 'image' or 'file_name'"),
    ("a header twice", listed(b"file_name,text,text\ngood.png,a,b\n"), "each once"),
    ("a CSV with a NUL", metadata(["good.png\0.jpg", "x"]), "not a text file"),
    ("a CSV of UTF-16", listed("file_name,text\ngood.png,a\n".encode("utf-16")), "not a text file"),
    ("a CSV that is a table", listed(b"PAR1\0\0"), "not a text file"),
    ("an empty CSV", listed(b""), "the first line must name the columns"),
    ("two lists", lambda p: (listed(HEADER)(p), listed(b"{}\n", "metadata.jsonl")(p))[1], "1 metadata.jsonl and 1 metadata.csv: name the"),
    ("a list and a table", lambda p: (table({"a": [1]})(p), listed(HEADER)(p))[1], "1 metadata.csv and 1 .parquet"),
    ("text as a folder", lambda p: ((p / "notes.md").write_text("x"), {"images": p})[1], "no image in the folder and its subfolders"),
    ("captions with a column", lambda p: {**folder()(p), "caption_column": "text"}, "caption_column has no effect"),
    ("captions with a folder", lambda p: {**folder()(p), "image_dir": p}, "image_dir has no effect"),
    ("half a tar", packed(("b.png", JPEG * 9), cut=4096), "the archive ends too soon"),
    ("a tar without its end", packed(cut=4 * 512), "the archive ends too soon"),
    ("a compressed tar", packed(squeeze=True), "no .tar archive, or a compressed one"),
    ("an empty tar", lambda p: ((p / "a.tar").touch(), {"images": p / "a.tar"})[1], "a.tar: "),
    ("a tar of zeros", lambda p: ((p / "a.tar").write_bytes(bytes(10240)), {"images": p / "a.tar"})[1], "it has no rows"),
    ("a tgz", lambda p: ((p / "a.tar.gz").write_bytes(gzip.compress(b"x")), {"images": p / "a.tar.gz"})[1], "in a compressed archive cannot be read"),
    ("half a table", lambda p: ((p / "a.parquet").write_bytes(b"PAR1" + bytes(40)), {"images": p / "a.parquet"})[1], "the library datasets cannot read it ("),
    ("a table without images", table({"text": ["a"]}), "no column of images"),
    ("a table without captions", table({"image": [image(PNG)]}), "no column of captions: none of 'caption', 'text'"),
    ("a table of numbers", table({"image": [1], "text": ["a"]}), "holds int64, neither bytes of images nor paths"),
    ("a column that is not there", table({"image": [image(PNG)], "text": ["a"]}, caption_column="txt"), "no column 'txt', which caption_column names (found: 'text')"),
    ("an image column that is not there", table({"image": [image(PNG)], "text": ["a"]}, image_column="img"), "no column of images, 'img'"),
    ("a split that is not there", lambda p: {**folder()(p), "split": "train-2"}, "the library datasets cannot read it ("),
    ("a hub name without a network", lambda p: {"images": "nobody/nothing-at-all", "split": "train"}, "the library datasets cannot read it ("),
]  # fmt: skip
