"""Texts that are no valid recipe because of how they are written, and overrides that cannot be applied."""

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join(['*' + before] * 10)}]\n" for before, c in zip("abcdef", "bcdefg", strict=True)
)

# (what is wrong, the text, line, words that the message must have)
WRITTEN = [
    ("deep nesting", "name: a\nb: " + "[" * 3000 + "]" * 3000, 2, ["deep in each other"]),
    ("deep blocks", "".join("  " * i + "a:\n" for i in range(400)), 51, ["deep in each other"]),
    ("an alias bomb", BOMB, 5, ["aliases expand to more than 100,000"]),
    ("old YAML rules", "%YAML 1.1\n---\nname: yes\n", 2, ["% directive", "YAML 1.2"]),
    ("a tag prefix", "%TAG ! tag:example.org,2000:\n---\nname: !foo a\n", 2, ["% directive"]),
    ("a custom tag", "name: a\nseed: !mine 3\n", 2, ["'!mine'", "not allowed"]),
    ("a tag on a block", "name: a\nmodel: !!python/object:os.x {a: 1}\n", 2, ["'!!python/object:os.x'"]),
    ("a binary tag", "name: !!binary aGk=\n", 1, ["'!!binary'", "not allowed"]),
    ("a set", "name: a\nmodel: !!set {sd3}\n", 2, ["'!!set'"]),
    ("a tab after a colon", "name: a\nseed:\t3\n", 2, ["a tab stands where"]),
    ("a tab in a list", "stages:\n  - name: a\n  \t- name: b\n", 3, ["a tab indents"]),
    ("a number as a key", "name: a\n1: b\n", 2, ["'1' is not a text"]),
    ("null as a key", "name: a\nnull: b\n", 2, ["'null' is not a text"]),
    ("a list as a key", "name: a\n[b]: c\n", 2, ["a list or mapping stands where"]),
    ("a merge key", "model: &m {type: sd3}\nevaluation: {<<: *m}\n", 2, ["'<<' is not supported"]),
    (
        "a key twice, once in quotes",
        "model:\n  path: a\n  'path': b\n",
        3,
        ["'path' is given twice", "line 2"],
    ),
    ("an unknown alias", "name: a\nseed: *b\n", 2, ["undefined alias 'b'"]),
    ("a NUL", "name: a\nseed: \0\n", 2, ["character '\\x00'"]),
    ("half a surrogate pair", 'name: a\nseed: "\\ud800"\n', 2, ["surrogate"]),
    ("half a surrogate pair in a key", 'name: a\n"\\ud800": 1\n', 2, ["surrogate"]),
    ("a number of 5000 digits", "name: a\nseed: " + "9" * 5000 + "\n", 2, ["is no int that can be read"]),
    ("only null", "null\n", None, ["empty"]),
    ("one word", "hello\n", 1, ["a mapping of fields", "'hello'"]),
]

# (overrides, how the message must begin, words that it must have)
OVERRIDES = [
    (["seed=1\nname: b"], "--set seed=1", ["one field and its value at a time"]),
    (["a..b=3"], "--set a..b=3: ", ["give a field and its value"]),
    (["=3"], "--set =3: ", ["give a field and its value"]),
    (["model.path=x: y"], "--set model.path=x: y: not valid YAML", ["quote a text that has ': '"]),
    (["seed=!!python/name:os.getpid"], "--set seed=!!python/name:os.getpid: the tag", ["not allowed"]),
    (["stages.9.name=x"], "--set stages.9.name=x: ", ["there are sft, soar"]),
    (
        ["stages.soar.train.steps='3'"],
        "--set stages.soar.train.steps='3': ",
        ["in quotes: remove the quotes"],
    ),
    (["stages.soar.tune.type=Lora"], "--set stages.soar.tune.type=Lora: ", ["did you mean 'lora'"]),
    (["stages.soar.tune={type: lora, rank: 0}"], "--set stages.soar.tune={", ["stages.1.tune.rank"]),
    (["evaluation.guidance=.nan"], "--set evaluation.guidance=.nan: ", ["finite number"]),
    (["evaluation.prompts=nowhere.txt"], "--set evaluation.prompts=nowhere.txt: ", ["no file 'nowhere.txt'"]),
    # the block that is wrong exists only because the override made it
    (["evaluatoin.steps=3"], "--set evaluatoin.steps=3: evaluatoin: ", ["did you mean 'evaluation'"]),
    (["name=my lora"], "--set name=my lora: ", ["letters A to Z, digits, '.', '-' and '_'", "no '.' last"]),
    # of two overrides the later one answers for what both hold, the earlier one for the rest
    (["seed=a", "seed=b"], "--set seed=b: ", ["'b'"]),
    (["stages.0.train={steps: 5, x: 1}", "stages.0.train.steps=9"], "--set stages.0.train={", ["train.x"]),
    (["stages.0.train={steps: 5}", "stages.0.train.steps=no"], "--set stages.0.train.steps=no: ", ["'no'"]),
]
