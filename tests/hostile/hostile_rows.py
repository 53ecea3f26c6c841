"""Lines of image lists and prompt files that cannot be used, each with the words that say why."""

import json

BIG = "9" * 400
DEEP = '{"a":' * 2000 + "1" + "}" * 2000


def row(**fields):
    return json.dumps({"image": "a.png", "caption": "a cat"} | fields)


# lines of a list of images, beside a good one; (the line, words of its problem)
IMAGE_ROWS = [
    ("{", "broken JSON"),
    ("null", "not a JSON object but NoneType"),
    ("5", "not a JSON object but int"),
    ('"a"', "not a JSON object but str"),
    ("[]", "not a JSON object but list"),
    ("{}", "no 'image' (found: nothing)"),
    ("{'image': 'a.png'}", "broken JSON"),
    (DEEP, "nested too deeply"),
    ("\x1b[2J", "broken JSON"),
    ('{"image": "a.png", "caption": "a", "image": "b.png"}', "the key 'image' is given twice"),
    ('{"image": "a.png", "caption": "a", "n": NaN}', "the number NaN is not finite"),
    ('{"image": "a.png", "caption": "a", "n": -Infinity}', "the number -Infinity is not finite"),
    ('{"image": "a.png", "caption": "a", "n": 1e999}', "the number 1e999 is not finite"),
    (f'{{"image": "a.png", "caption": "a", "n": {BIG}}}', "has more than 18 digits"),
    (f'{{"image": "a.png", "caption": "a", "n": -{BIG}}}', "has more than 18 digits"),
    (f'{{"image": "a.png", "caption": "a", "n": {"9" * 5000}}}', "has more than 18 digits"),
    (row(image=None), "'image' must be text, not null"),
    (row(image=5), "'image' must be text, not 5"),
    (row(image=["a.png"]), "'image' must be text"),
    (row(image=""), "'image' is empty"),
    (row(image=" \t "), "'image' is empty"),
    (row(image="missing.png"), "no such file"),
    (row(image="../a.png"), "must not leave the folder"),
    (row(image="x/../../a.png"), "must not leave the folder"),
    (row(image="a.png\0.jpg"), "must not leave the folder"),
    (row(image="."), "not a file"),
    (row(image="/dev/null"), "not a file"),
    (row(image="/dev/zero"), "not a file"),
    (row(image="a.png/b.png"), "not a directory"),
    (row(image="x" * 300), "name too long"),
    (row(image="x" * 30_000), "30,000 characters"),
    (row(image="\ud800"), "half a surrogate pair"),
    (row(image="empty.png"), "zero bytes"),
    (row(image="[red]\x1b[2J.png"), "no such file"),
    (row(md5="abc"), "'md5' in a file whose rows name their images by 'image'"),
    (row(caption=None), "'caption' must be text, not null"),
    (row(caption=True), "'caption' must be text, not true"),
    (row(caption=["a"]), "'caption' must be text"),
    (row(caption=""), "'caption' is empty"),
    (row(caption="\u3000\n"), "'caption' is empty"),
    (row(caption={}), "an object without text"),
    (row(caption={"long": 5}), "an object without text"),
    (row(caption={"other": "a"}), "an object without text"),
    (row(caption='{"long": "a"'), "starts like a JSON object but is none"),
    (row(caption="{'long': 'a'}"), "starts like a JSON object but is none"),
    (row(caption="x" * 20_001), "'caption' has 20,001 characters; at most 20,000"),
    (row(caption="x" * 2_000_000), "the line has more than 1,000,000 bytes"),
    (row(caption={"long": "y" * 30_000}), "'long' has 30,000 characters"),
    (row(caption="\udfff"), "half a surrogate pair"),
    (row(bw=0, bh=16), "'bw' must be a positive whole number, not 0"),
    (row(bw=-8, bh=16), "'bw' must be a positive"),
    (row(bw=16), "'bh' must be a positive whole number, not null"),
    (row(bw=16.0, bh=16), "'bw' must be a positive whole number, not 16.0"),
    (row(bw="16", bh=16), "'bw' must be a positive"),
    (row(bw=True, bh=16), "'bw' must be a positive whole number, not true"),
    (row(bw=[16], bh=16), "'bw' must be a positive"),
]
# lines of a list of images that is read with a divisor of 8, when their sizes are looked at
BUCKET_ROWS = [
    (row(bw=17, bh=16), "bw 17 is not a multiple of 8"),
    (row(bw=16, bh=12), "bh 12 is not a multiple of 8"),
    (row(bw=8 * 10**15, bh=8), "is more than max_pixels"),
    (row(bw=80_000, bh=80_000), "is more than max_pixels"),
    (row(), "no 'bw' and 'bh'"),
]


def task(**fields):
    return json.dumps({"prompt": "p", "tag": "colors", "include": [{"class": "circle", "count": 1}]} | fields)


def including(**fields):
    return task(include=[{"class": "circle", "count": 1}, {"class": "square", "count": 1} | fields])


NO_LIST = "is no list of objects with a 'class' and a 'count' from 1"
NO_PLACE = "is no relation and the number of an object before it"
# lines of a prompt file that the reward ``shapes`` is to judge
PROMPT_ROWS = [
    ("{}", "no 'prompt'"),
    ("[1]", "not a JSON object but list"),
    ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is given twice"),
    ('{"prompt": "a", "include": [{"class": "circle", "count": 1, "count": 2}]}', "the key 'count' is given"),
    (task(prompt=""), "'prompt' is empty"),
    (task(prompt=None), "'prompt' must be text, not null"),
    (task(prompt={"a": 1}), "'prompt' must be text"),
    (task(prompt="x" * 20_001), "'prompt' has 20,001 characters"),
    (task(prompt="x" * 2_000_000), "the line has more than 1,000,000 bytes"),
    (task(prompt="\ud83d"), "half a surrogate pair"),
    (task(tag=5), "'tag' must be text, not 5"),
    (task(tag=None), "'tag' must be text, not null"),
    (task(tag=["a"]), "'tag' must be text"),
    (task(tag={"a": 1}), "'tag' must be text"),
    ('{"prompt": "p"}', "no GenEval metadata"),
    (task(include=None), NO_LIST),
    (task(include=[]), NO_LIST),
    (task(include={}), NO_LIST),
    (task(include="circle"), NO_LIST),
    (task(include=["circle"]), NO_LIST),
    (task(include=[[]]), NO_LIST),
    (task(exclude=5), NO_LIST),
    (task(exclude=[{"class": "circle"}]), NO_LIST),
    (including(count=0), NO_LIST),
    (including(count=-1), NO_LIST),
    (including(count=1.5), NO_LIST),
    (including(count="1"), NO_LIST),
    (including(count=True), NO_LIST),
    (including(count=None), NO_LIST),
    (task().replace('"count": 1', f'"count": {BIG}'), "has more than 18 digits"),
    (task().replace('"count": 1', '"count": NaN'), "not finite"),
    (including(**{"class": 5}), NO_LIST),
    (including(**{"class": "dragon"}), "the detector knows no 'dragon'"),
    (including(**{"class": "circles"}), "did you mean 'circle'"),
    (including(color="mauve"), "'mauve' is none of the colours"),
    (including(color=None), "None is none of the colours"),
    (including(position=None), NO_PLACE),
    (including(position="above"), NO_PLACE),
    (including(position=["above"]), NO_PLACE),
    (including(position=["above", 1]), NO_PLACE),
    (including(position=["above", -1]), NO_PLACE),
    (including(position=["above", False]), NO_PLACE),
    (including(position=["above", 0.0]), NO_PLACE),
    (including(position=["on", 0]), NO_PLACE),
]
# lines of a text file of prompts
PROMPT_LINES = [
    (b'{"prompt": "a"}', "name the file '.jsonl'"),
    (b"\xff\xfe", "not UTF-8 at byte 1"),
    (b"caf\xe9", "not UTF-8 at byte 4"),
    (b"x" * 20_001, "20,001 characters"),
    (b"x" * 1_000_001, "the line has more than 1,000,000 bytes"),
    (b"{" * 1_000_001, "the line has more than 1,000,000 bytes"),
    (b"\xed\xa0\x80", "not UTF-8"),
]
