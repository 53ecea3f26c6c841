"""Prompts are read from text and JSONL, or refused by line."""

import pytest
from data_files import write_rows

from posttrain.data.prompts import read_prompts
from posttrain.errors import DataError


def test_prompts_are_lines_or_objects_and_repetitions_stay(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa cat \r\n\r\n{a} dog\r\na cat".encode())
    assert read_prompts(tmp_path / "a.txt") == [{"prompt": p} for p in ("a cat", "{a} dog", "a cat")]
    rows = [{"prompt": "a cat", "tag": "counting", "include": [{"class": "cat", "count": 1}]}] * 2
    assert read_prompts(write_rows(tmp_path, rows)) == rows


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("a.jsonl", '{"prompt": "x"}\n\n{"text": "y"}', r"a.jsonl:3: no 'prompt' \(found: 'text'\)"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ""}', "a.jsonl:2: 'prompt' is empty"),
        ("a.jsonl", "a cat", "a.jsonl:1: broken JSON"),
        ("a.txt", 'x\n{"prompt": "x"}', "a.txt:2: a JSON object in a text file"),
        ("a.txt", "x\n\xff", "a.txt:2: not UTF-8"),
        ("a.txt", " \n", "no prompt"),
        ("a.txt", "a cat\ra dog\r", "a.txt:1: a carriage return within the line"),
        ("a.json", '[\n"a cat",\n"a dog"\n]', "a.json: prompts are not read from '.json' files"),
        ("a.TSV", "Prompt\tCategory\na cat\tAnimals\n", "not read from '.tsv' files: give a text file"),
    ],
)
def test_a_bad_prompt_is_named_by_line(tmp_path, name, body, reason):
    (tmp_path / name).write_bytes(body.encode("latin-1"))
    with pytest.raises(DataError, match=reason):
        read_prompts(tmp_path / name)


def test_a_prompt_file_that_is_none_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(DataError, match=r"directory|no such file"):
            read_prompts(path)
