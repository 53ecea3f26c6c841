"""Valid recipes and rows with random changes: accepted with a meaning, or refused with a place."""

import io
import json
import tarfile

from hostile_recipes import GOOD
from hostile_rows import including, row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_layouts import add
from PIL import Image

from posttrain.data import Images
from posttrain.data.prompts import read_prompts
from posttrain.data.rows import read_records
from posttrain.errors import DataError, RecipeError
from posttrain.recipe.file import dump_recipe, parse_recipe
from posttrain.rewards.shapes import Shapes


def tar_of(*members):
    """The bytes of a tar of ``members``, (name, content)."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members:
            add(tar, name, content)
    return data.getvalue()


BOUNDED = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SNIPPETS = st.one_of(
    st.sampled_from([
        "", " ", "\n", "\t", ": ", "- ", "{", "}", "[", "]", ",", "'", '"', "#", "&a", "*a", "!!int ", "|", ">", "---\n", "?",
        "null", "true", ".nan", "-.inf", "1e999", "0x1F", "-1", "0", "1_0", "9" * 400, "\0", "\x1b[2J", "\u202e", "\ufeff", "[red]", "~",
    ]),
    st.text(max_size=5),
)  # fmt: skip


@st.composite
def changed(draw, text):
    """``text`` with one to three pieces of it left out, doubled, or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        middle = draw(st.one_of(SNIPPETS, st.just(text[start:end] * 2)))
        text = text[:start] + middle + text[end:]
    return text


@given(changed(GOOD))
@BOUNDED
def test_a_changed_recipe_is_refused_by_its_place_or_loads_again_to_an_equal_one(text):
    try:
        recipe = parse_recipe(text, "r.yaml", checks=False)
    except RecipeError as error:
        assert str(error).startswith("r.yaml")  # noqa: PT017 some are valid
        return
    assert parse_recipe(dump_recipe(recipe), "again.yaml", checks=False) == recipe


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def changed_row(draw, good):
    """The row ``good`` with one or two values replaced, at any depth, as text; sometimes with changed text."""
    whole = json.loads(good)
    for _ in range(draw(st.integers(1, 2))):
        block, key = whole, draw(st.sampled_from(sorted(whole)))
        while isinstance(block[key], dict | list) and block[key] and draw(st.booleans()):
            block = block[key]
            key = draw(st.sampled_from(sorted(block) if isinstance(block, dict) else range(len(block))))
        block[key] = draw(VALUES)
    text = json.dumps(whole)
    return draw(changed(text)) if draw(st.booleans()) else text


@given(changed_row(row(bw=32, bh=32)))
@BOUNDED
def test_a_changed_row_of_images_is_a_record_or_a_problem_of_its_line(tmp_path, line):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    file = tmp_path / "rows.jsonl"
    file.write_bytes(row().encode() + b"\n" + line.encode("utf-8", "surrogatepass"))
    try:
        table = read_records(Images(images=file, tolerance=1.0))
    except DataError as error:
        assert "not a text file" in str(error)  # noqa: PT017 only if there is a NUL
        return
    assert len(table.records) + len(table.problems) == table.rows
    assert table.records[0].line == 1
    for record in table.records:
        assert 0 < len(record.caption) <= 20_000
        assert record.path.is_file()


def rows_or_one_error(folder, **settings):
    """Reads images; returns the table, or None if they are refused by the name of their place."""
    try:
        table = read_records(Images(images=folder, tolerance=1.0, **settings))
    except DataError as error:
        assert str(error).startswith(str(folder))  # noqa: PT017 some are valid
        assert len(str(error)) < 2000  # noqa: PT017
        return None
    assert len(table.records) + len(table.problems) == table.rows
    assert all(0 < len(record.caption) <= 20_000 for record in table.records)
    assert all(str(folder) in problem.located(folder) for problem in table.problems)
    return table


@given(changed('file_name,text,weight,bw,bh\na.png,a cat,1,8,8\na.png,"a, dog",2,16,8\n'))
@BOUNDED
def test_a_changed_csv_is_rows_and_problems_or_refused(tmp_path, text):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes(text.encode("utf-8", "surrogatepass"))
    if (table := rows_or_one_error(tmp_path)) is not None:
        assert all(record.path.is_file() for record in table.records)


GOOD_TAR = tar_of(
    ("x/a.png", b"image"), ("x/a.txt", b"a cat"), ("x/b.png", b"image"), ("x/b.json", b'{"text": "b"}')
)


@given(st.data())
@BOUNDED
def test_a_changed_tar_is_rows_and_problems_or_refused(tmp_path, data):
    content = bytearray(GOOD_TAR)
    for _ in range(data.draw(st.integers(1, 4))):
        # most bytes of a tar are padding; those of names, sizes and sums begin each block
        at = 512 * data.draw(st.integers(0, 9)) + data.draw(st.integers(0, 160))
        content[at] = data.draw(st.integers(0, 255))
    (tmp_path / "a.tar").write_bytes(content[: data.draw(st.sampled_from([None, 700, 2048, 4608]))])
    if (table := rows_or_one_error(tmp_path / "a.tar")) is not None:
        assert all(len(record.image.read()) == record.image.size for record in table.records)


@given(changed_row(including(position=["above", 0], color="red")))
@BOUNDED
def test_a_changed_prompt_can_be_judged_or_is_refused_by_its_line(tmp_path, line):
    import torch

    file, reward = tmp_path / "p.jsonl", Shapes()
    file.write_bytes(line.encode("utf-8", "surrogatepass"))
    try:
        rows = read_prompts(file, [reward])
    except DataError as error:
        assert str(error).startswith(f"{file}: ")  # noqa: PT017 some are valid
        return
    score = reward.load(torch.device("cpu"))
    images = torch.full((len(rows), 3, 64, 64), 0.9)
    assert score(images, [r["prompt"] for r in rows], rows).value.isfinite().all()
