"""The check of the pages finds what is wrong with a command, a field, a block of Python, a figure or a link."""

import sys

import page_runs
import pytest
import torch
from page_checks import problems
from pages import inline_code, read, sections


def block(language, text, *marks):
    return "".join(f"<!-- {mark} -->\n" for mark in marks) + f"```{language}\n{text}\n```\n"


RIGHT = [
    block("bash", "posttrain run quickstart --set stages.soar.train.steps=100  # fewer", "needs: hours"),
    block("bash", "posttrain recipes copy sd35m-soar mine.yaml\nposttrain plan mine.yaml --gpu 'H100 80GB' \\\n  --set stages.soar.train.steps=5"),
    block("bash", "torchrun --nproc-per-node 8 -m posttrain run recipe.yaml", "needs: gpu"),
    block("bash", "for s in 0 1; do\n  X=1 posttrain run shapes-nft --set seed=$s --output runs/a-$s > log.txt &\ndone", "needs: hours"),
    block("bash", "pip install -e '.[data,rewards]' && pip install 'posttrain[8bit]'", "needs: network"),
    block("bash", "python benchmarks/torture.py --kills 3\npython -m pytest -m 'not cuda' tests/test_cli.py\nmake test", "needs: hours"),
    block("bash", "posttrain eval MODEL --suite SUITE --processes N --set steps=3", "needs: weights"),
    block("bash", "posttrain score a --reward ocr --reward remote --set remote.name=x --set remote.url=http://a", "needs: files"),
    block("yaml", "algorithm: {type: sft}\ntrain: {steps: 3}", "part of: stages[]"),
    block("yaml", "tune: {type: full}\ntune: {type: lora, rank: 2}  # or", "part of: stages[]"),
    block("yaml", "- {name: a, algorithm: {type: sft}}\n- {name: b}", "part of: stages"),
    block("yaml", "trajectory_length: 3\ntype: soar", "part of: stages[].algorithm"),
    block("python", "import posttrain\nresult = posttrain.open_run('x')\nposttrain.Train(steps=3)", "needs: files"),
    block("python", "from posttrain.testing import AlgorithmLaws"),
    block("python", "A = 1", "saved as: mine.py") + block("yaml", "algorithm: {type: 'mine:A'}", "part of: stages[]"),
    block("yaml", "algorithm: {type: 'mine:A'}", "part of: stages[]", "needs: files"),
    block("bash", "X=1 posttrain recipes\nmkdir a\nls a"),
    block("bash", "posttrain run RECIPE", "needs: weights, gpu"),
    block("json", '{"a": 1}\n{"a": 2}') + block("toml", "a = 1") + block("text", "$ anything"),
    block("python", 'class Pixels(Model):', "copy of: examples/plugin/posttrain_example/model.py"),
    "- a list\n\n  that goes on\n\n    - and on\n",
    "`posttrain plan` and `posttrain plan sd35m-soar --gpu h100`, `posttrain run RECIPE --set A=B`",
]  # fmt: skip
WRONG = [
    (block("bash", "posttrain rum quickstart", "needs: gpu"), "no command 'rum' (did you mean 'run'?)"),
    (block("bash", "posttrain recipes kopy quickstart"), "no command 'kopy'"),
    (block("bash", "posttrain run quickstart --smok", "needs: gpu"), "--smok"),
    (block("bash", "posttrain run", "needs: gpu"), "Missing argument"),
    (block("bash", "posttrain run quickstart twice", "needs: gpu"), "too many arguments: twice"),
    (block("bash", "posttrain run quickstart --nproc many", "needs: gpu"), "Invalid value for '--nproc'"),
    (block("bash", "posttrain run quickstarts", "needs: gpu"), "did you mean 'quickstart'"),
    (block("bash", "torchrun -m posttrain run quickstart --nope", "needs: gpu"), "--nope"),
    (block("bash", "srun posttrain run quickstart --nope", "needs: gpu"), "--nope"),
    (block("bash", "posttrain run quickstart --set stages.sft.train.step=3", "needs: gpu"), "did you mean 'steps'"),
    (block("bash", "posttrain run quickstart --set stages.stf.train.steps=3", "needs: gpu"), "did you mean 'sft'"),
    (block("bash", "posttrain run mine.yaml --set train.steps=3", "needs: gpu"), "no shipped recipe takes --set train.steps=3"),
    (block("bash", "posttrain recipes copy sd35m-soar mine.yaml\nposttrain run mine.yaml --set stages.x.train.steps=3", "needs: gpu"), "no item 'x'"),
    (block("bash", "posttrain plan sd35m-soar --gpu 'H1000'"), "H1000"),
    (block("bash", "posttrain export runs/a --to b --format safetensors", "needs: gpu"), "--format: 'safetensors' is none of"),
    (block("bash", "posttrain eval runs/a --suite genevil", "needs: gpu"), "--suite: 'genevil'"),
    (block("bash", "posttrain eval runs/a --set step=1", "needs: gpu"), "did you mean 'steps'"),
    (block("bash", "posttrain score a --reward shape", "needs: gpu"), "did you mean 'shapes'"),
    (block("bash", "posttrain score a --reward shapes --set scores=strict", "needs: gpu"), "did you mean 'score'"),
    (block("bash", "posttrain rewards fetch pikscore", "needs: network"), "did you mean 'pickscore'"),
    (block("bash", "posttrain recipes show nothing"), "no recipe 'nothing'"),
    (block("bash", "$ posttrain recipes"), "'$'"),
    (block("bash", "posttrain recipes > recipes.txt"), "pipes, files and loops of a shell are not run"),
    (block("yaml", "algorithm: {type: 'mine:A'}", "part of: stages[]"), "cannot load the algorithm 'mine:A'"),
    (block("bash", "wrote 3 images"), "output goes into ```text"),
    (block("bash", "for s in 1; do posttrain recipes", "needs: gpu"), "bash cannot read it"),
    (block("bash", "posttrain sample a --prompt 'b\nc'", "needs: gpu"), "a quote must end in its line"),
    (block("bash", "python -c 'print(1)'"), "python is checked and not run"),
    (block("bash", "pip install 'posttrain[dta]'", "needs: network"), "no extra 'dta'"),
    (block("bash", "pip install posttrain"), "pip is checked and not run"),
    (block("bash", "posttrain run RECIPE"), "'RECIPE' stands for something else"),
    (block("bash", "posttrain run quickstart", "given: runs/nothing"), "nothing is known of 'runs/nothing'"),
    (block("bash", "python benchmarks/tortur.py", "needs: hours"), "no file 'benchmarks/tortur.py'"),
    (block("bash", "python benchmarks/torture.py --killings 3", "needs: hours"), "no option '--killings'"),
    (block("bash", "python -m pytest -m kuda tests/test_cuda.py", "needs: gpu"), "no mark 'kuda'"),
    (block("bash", "python -m pytest tests/test_kuda.py", "needs: gpu"), "no file 'tests/test_kuda.py'"),
    (block("bash", "make tests", "needs: network"), "no target 'tests'"),
    (block("bash", "make test PYTEST_ARGS=tests/test_kuda.py", "needs: network"), "no file 'tests/test_kuda.py'"),
    (block("bash", "torchrun --nproc-per-nod 8 -m posttrain run r.yaml", "needs: gpu"), "did you mean '--nproc-per-node'"),
    (block("bash", "accelerate launch --multi_gpus -m posttrain run r.yaml", "needs: gpu"), "did you mean '--multi_gpu'"),
    (block("python", "import posttrian", "needs: gpu"), "did you mean 'posttrain'"),
    (block("bash", "posttrain run quickstart", "needs: time"), "needs: time is not known"),
    (block("bash", "posttrain run quickstart", "needs: hours", "neds: hours"), "no comment 'neds'"),
    (block("yaml", "trian: {steps: 3}", "part of: stages[]"), "did you mean 'train'"),
    (block("yaml", "train: {step: 3}", "part of: stages[]"), "did you mean 'steps'"),
    (block("yaml", "steps: three", "part of: stages[].train"), "expected a whole number"),
    (block("yaml", "steps: 3", "part of: stages[].trian"), "did you mean 'train'"),
    (block("yaml", "type: sof", "part of: stages[].algorithm"), "no type 'sof'"),
    (block("yaml", "train: {steps: 3}"), "a fragment of a recipe needs a comment"),
    (block("yaml", "name: a\nmodel: {type: sd3, path: a}\nstages: []"), "there is neither a stage nor an evaluation"),
    (block("python", "import posttrain\nposttrain.rum('a')", "needs: files"), "posttrain has no 'rum'"),
    (block("python", "from posttrain.flow import nothing"), "nothing"),
    (block("python", "from posttrain import Train\nTrain(step=3)", "needs: files"), "Train takes no 'step'"),
    (block("python", "import posttrain\nposttrain.run('a', fold='b')", "needs: files"), "posttrain.run takes no 'fold'"),
    (block("python", "import posttrain", "needs: files") + block("python", "posttrain.rum", "needs: files"), "page.md:7: "),
    (block("python", "def"), "no Python"),
    (block("python", "SIDE = 17", "copy of: examples/plugin/posttrain_example/model.py"), "not as in"),
    (block("python", "SIDE = 17", "copy of: examples/none.py"), "no file"),
    (block("json", "{"), "no json"),
    (block("toml", "a ="), "no toml"),
    (block("", "a"), "the fence has the language ''"),
    (block("sh", "a"), "the fence has the language 'sh'"),
    ("words\n\n    code\n", "page.md:3: an indented block"),
    ("- words\n\n      code\n", "page.md:3: an indented block"),
    ("- words\n\n  ```text\n  a\n  ```\n", "the fence is indented"),
    ("<!-- needs: gpu -->\n\nwords\n", "has no block below it"),
    ("the command `posttrain plan --gpus\ntwo` is wrong", "page.md:1: `posttrain plan --gpus two`"),
    ("`posttrain nothing`", "no command 'nothing'"),
    ("`posttrain run sd35-soar`", "no recipe 'sd35-soar'"),
]  # fmt: skip


@pytest.mark.parametrize("text", RIGHT)
def test_what_is_right_passes(text):
    assert problems(text, "page.md") == []


@pytest.mark.parametrize(("text", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_is_wrong_is_told_with_its_page_and_line(text, words):
    found = problems(text, "page.md")
    assert words in "\n".join(found)
    assert all(problem.startswith("page.md:") for problem in found)


def test_a_block_knows_its_lines_and_comments():
    text = "# A\n\n<!-- needs: gpu -->\n<!-- given: runs/demo, photos -->\n```bash\na \\\n  b\n```\n```text\n# no heading\n```\n## B\nx\n"
    (first, second), found = read(text, "page.md")
    assert (first.line, first.needs, first.given, first.text) == (
        6,
        "gpu",
        ["runs/demo", "photos"],
        "a \\\n  b\n",
    )
    assert (second.line, second.marks, found) == (10, {}, [])
    assert [(line, heading) for line, heading, _ in sections(text)] == [(1, "A"), (12, "B")]


def test_inline_code_may_go_on_in_the_next_line_but_not_in_a_block():
    text = "a `b\nc` d ``e`f``\n\n```text\n`g`\n```\n`h` | `i`"
    assert inline_code(text) == [(1, "b c"), (2, "e`f"), (7, "h"), (7, "i")]


@pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="runs in copies of this process"
)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (block("bash", "posttrain recipes show quickstart\nposttrain status runs/none  # is not there"), ["page.md:3: posttrain status runs/none\n", "runs/none"]),
        (block("bash", "python examples/none.py"), ["page.md:2: python examples/none.py\n", "No such file"]),
        (block("bash", "tree"), ["'tree' is never run"]),
        (block("python", "a = 1") + block("python", "\nassert a == 1\nassert a == 2, 'two'"), ["page.md:7: assert a == 2", "AssertionError: two"]),
        (block("text", "no recipe", "saved as: folder/r.yaml") + block("bash", "posttrain check folder/r.yaml"), ["page.md:6: ", "folder/r.yaml"]),
        (block("python", "import mine", "given: prompts.txt") + block("python", "x = 3", "saved as: mine.py"), ["No module named 'mine'"]),
    ],
)  # fmt: skip
def test_what_fails_when_it_runs_is_told(text, words, tmp_path):
    blocks, found = read(text, "page.md")
    assert not found
    failed = page_runs.failure(blocks, tmp_path, tmp_path / "made")
    assert [word for word in [*words, "<!-- needs: weights -->"] if word not in failed] == []


@pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="runs in copies of this process"
)
def test_blocks_of_a_page_share_folder_files_and_names_and_those_that_need_something_are_left_out(tmp_path):
    text = (
        block("python", "x = 3", "saved as: mine.py")
        + block("bash", "posttrain run quickstart", "needs: hours")
        + block("bash", "mkdir a b\nX=1 posttrain recipes copy quickstart own.yaml")
        + block("python", "import mine\nfrom pathlib import Path\ntext = Path('own.yaml').read_text()")
        + block(
            "python",
            "assert mine.x == 3\nassert Path('b').is_dir()\nassert 'quickstart' in text\nassert Path('prompts.txt').is_file()",
            "given: prompts.txt",
        )
    )
    assert page_runs.failure(read(text, "page.md")[0], tmp_path, tmp_path / "made") == ""
    assert not (tmp_path / "runs").exists()
