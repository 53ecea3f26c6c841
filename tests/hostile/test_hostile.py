"""Hostile inputs: each is refused with words that name it, never by a traceback."""

import sys
from itertools import chain

import pytest
from hostile_commands import COMMANDS
from hostile_images import IMAGES
from hostile_layouts import REFUSED, SKIPPED, UNDECODABLE
from hostile_recipes import GOOD, RECIPES
from hostile_rows import BUCKET_ROWS, IMAGE_ROWS, PROMPT_LINES, PROMPT_ROWS, row
from PIL import Image

from posttrain.cli import app
from posttrain.data import Images
from posttrain.data.decode import open_image
from posttrain.data.loader import ImageSource
from posttrain.data.prompts import read_prompts
from posttrain.data.rows import read_records
from posttrain.errors import DataError, RecipeError
from posttrain.recipe.file import parse_recipe
from posttrain.rewards.shapes import Shapes


def short(value):
    return ascii(value)[:40]


each_recipe = pytest.mark.parametrize(
    ("old", "new", "words"), RECIPES, ids=[f"{i}-{short(new)}" for i, (_, new, _) in enumerate(RECIPES)]
)


@each_recipe
def test_a_hostile_recipe_is_refused_by_line_and_field(old, new, words):
    assert GOOD.count(old) == 1
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD.replace(old, new), "r.yaml")
    message = str(caught.value)
    assert message.startswith("r.yaml:"), message
    assert len(message) < 1000, len(message)
    for word in words:
        assert word in message, message


def test_the_recipe_without_a_fault_is_valid():
    parse_recipe(GOOD, "r.yaml")


def of_lines(*tables):
    return pytest.mark.parametrize(
        ("line", "words"),
        chain(*tables),
        ids=[f"{i}-{short(words)}" for i, (_, words) in enumerate(chain(*tables))],
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with an image, and an empty file that is called one."""
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "empty.png").touch()
    return folder


def spec_of(images, line):
    """An image list of a good row and ``line``, all of whose rows may be faulty."""
    file = images / "rows.jsonl"
    file.write_text(f"{row(bw=32, bh=32)}\n{line}\n", "utf-8")
    return Images(images=file, tolerance=1.0)


@of_lines(IMAGE_ROWS)
def test_a_hostile_row_is_skipped_and_named_by_its_line(images, line, words):
    table = read_records(spec_of(images, line))
    ((problem),) = table.problems
    assert problem.line == 2
    assert words in problem.reason
    assert len(problem.reason) < 400
    assert [record.line for record in table.records] == [1]


@of_lines(BUCKET_ROWS)
def test_a_row_of_a_hostile_size_is_skipped_and_named_by_its_line(images, line, words):
    ((problem),) = ImageSource(spec_of(images, line), divisor=8).skipped
    assert problem.line == 2
    assert words in problem.reason


@of_lines([(line.encode(), words) for line, words in PROMPT_ROWS], PROMPT_LINES)
def test_a_hostile_prompt_is_named_by_its_line(tmp_path, line, words):
    structured = any(line == prompt.encode() for prompt, _ in PROMPT_ROWS)
    file = tmp_path / ("p.jsonl" if structured else "p.txt")
    file.write_bytes(line + b"\n")
    with pytest.raises(DataError) as caught:
        read_prompts(file, [Shapes()] if structured else [])
    message = str(caught.value)
    assert f"{file}:1: " in message
    assert words in message
    assert len(message) < 1000


@pytest.mark.parametrize(("content", "words"), [i[1:] for i in IMAGES], ids=[i[0] for i in IMAGES])
def test_a_hostile_image_is_refused_by_its_name(tmp_path, content, words):
    (tmp_path / "i.png").write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_image(tmp_path / "i.png", 10_000_000)
    assert str(caught.value).startswith(f"{tmp_path / 'i.png'}: ")
    assert words in str(caught.value)


def of_layouts(table):
    return pytest.mark.parametrize(
        ("make", "words"), [case[1:] for case in table], ids=[case[0] for case in table]
    )


@pytest.fixture
def data(tmp_path, own_caches):
    """An empty folder for a data set."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@of_layouts(SKIPPED)
def test_a_hostile_row_of_any_layout_is_skipped_and_named(data, make, words):
    table = read_records(Images(**make(data), tolerance=1.0))
    ((problem),) = table.problems
    assert words in problem.reason
    assert str(data) in problem.located(table.file)
    assert len(problem.reason) < 400
    assert len(table.records) == 1


@of_layouts(UNDECODABLE)
def test_a_hostile_image_of_any_layout_is_skipped_and_named(data, make, words):
    source = ImageSource(Images(**make(data), tolerance=1.0, resolution=32), divisor=8)
    ((problem),) = source.scan()
    assert words in problem.reason
    assert str(data) in problem.located(source.spec.images)


@of_layouts(REFUSED)
def test_a_hostile_data_set_is_refused_with_its_name(data, make, words):
    settings = make(data)
    with pytest.raises(DataError) as caught:
        read_records(Images(**settings, tolerance=1.0))
    message = str(caught.value)
    assert message.startswith(str(settings["images"]).split("/a.tar")[0])
    assert words in message
    assert len(message) < 1000


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The folder in which commands are given."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "[red]").mkdir()
    (folder / "r.yaml").write_text(GOOD, "utf-8")
    start = '    start_from: "[red]\\e[2J/x"\n    tune:'
    (folder / "bad.yaml").write_text(GOOD.replace("    tune:", start), "utf-8")
    (folder / "p.jsonl").write_text(
        '{"prompt": "p", "include": [{"class": "circle", "count": 1}]}\n', "utf-8"
    )
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    COMMANDS,
    ids=[f"{i}-{short(' '.join(arguments))}" for i, (arguments, *_) in enumerate(COMMANDS)],
)
def test_a_hostile_command_ends_in_one_clear_error(workplace, arguments, code, words, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", ["posttrain", *arguments])
    monkeypatch.setenv("COLUMNS", "20000")
    with pytest.raises(SystemExit) as ended:
        app.main()
    out, err = capsys.readouterr()
    assert ended.value.code == code, err
    assert words in err, err
    assert "\x1b[2J" not in out + err
    assert "Traceback" not in err
