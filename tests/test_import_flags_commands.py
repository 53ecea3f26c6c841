"""Commands and shell scripts are taken apart: launcher, script, flags, variables, files."""

import pytest
from imported import SHORT, SOAR, recipe_of, stage_of

from posttrain.errors import PosttrainError
from posttrain.importing.trainers import translate


def test_a_script_with_variables(tmp_path):
    (tmp_path / "run.sh").write_text(
        "#!/bin/bash\nexport LR=3e-6\nGPUS=4\n# torchrun -m sora.train_soar_sd3_5m --seed 1\n"
        f"torchrun --nproc_per_node=$GPUS -m sora.train_soar_sd3_5m \\\n  --learning_rate ${{LR}} {' '.join(SHORT)}\n"
    )
    train = recipe_of("hy-soar", [str(tmp_path / "run.sh"), "--train_batch_size", "2"]).stages[0].train
    assert (train.learning_rate, train.batch_size) == (3e-6, 8)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo hello\n", "has no command of HY-SOAR"),
        ("python train_soar_sd3_5m.py --seed 1\npython train_soar_sd3_5m.py --seed 2\n", "has 2 commands"),
        (None, "no file"),
    ],
)
def test_a_script_has_one_command(tmp_path, script, words):
    if script is not None:
        (tmp_path / "run.sh").write_text(script)
    with pytest.raises(PosttrainError, match=words):
        translate("hy-soar", [str(tmp_path / "run.sh")])


def test_a_trainer_that_is_misspelt_is_named():
    with pytest.raises(PosttrainError, match="did you mean 'hy-soar'"):
        translate("hy-sore", SHORT)


COMMAND = f"torchrun --nproc_per_node=1 -m sora.train_soar_sd3_5m --learning_rate $LR {' '.join(SHORT)}\n"


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("if true; then LR=1e-5; else LR=2e-5; fi", "command 1: 'LR=1e-5' is set under a condition"),
        ("for LR in 1 2; do\nLR=3e-5\ndone", "command 2: 'LR=3e-5' is set under a condition or in a loop"),
        ("LR=1e-5; LR+=0", r"'LR\+=0;?' adds to a variable"),
        ("echo if", r"'\$LR' has a variable that the script does not set"),
        ("LR=${RATE}", r"'\$\{RATE\}' has a variable that the script does not set"),
        ("LR=$(cat rate | head -1)", r"'\$\(...\)' has the output of a command"),
        ("LR=`cat rate`", r"'\$\(...\)' has the output of a command"),
        ("LR=1e-5\ncase $1 in\n fast) LR=9e-5 ;;\nesac", "command 3: 'LR=9e-5' is set under a condition"),
        ('LR=1e-5\n[ "$1" = fast ] && echo && LR=9e-5', "command 2: 'LR=9e-5' is set under a condition"),
        ("LR=1e-5\ntest $1 || LR=9e-5", "command 2: 'LR=9e-5' is set under a condition"),
        ("LR=1e-5\nfor LR in 2e-5 3e-5; do", r"'\$LR' has a variable that the script does not set"),
    ],
)
def test_what_a_script_may_not_leave_open(tmp_path, before, words):
    (tmp_path / "run.sh").write_text(f"{before}\n{COMMAND}")
    with pytest.raises(PosttrainError, match=words):
        translate("hy-soar", [str(tmp_path / "run.sh")])


@pytest.mark.parametrize(
    "before",
    [
        "LR=${RATE:-3e-6}",
        "if true; then\necho\nfi\nLR=3e-6",
        "echo if\nexport LR=3e-6",
        "RATE=3e-6; LR=${1:-${RATE}}",
        "RATE=\nLR=${RATE:-3e-6}",
        "LR=3e-6\ncat <<-'EOF' > notes | cat\nLR=9\n\tEOF\nN=$((1<<LR))",
        "# LR=9 \\\nLR=3e-6",
        "cd soar && readonly LR=3e-6",
        "f() { local LR=3e-6",
    ],
)
def test_variables_of_a_script_have_defaults_and_follow_conditions(tmp_path, before):
    (tmp_path / "run.sh").write_text(f"{before}\n{COMMAND}")
    assert recipe_of("hy-soar", [str(tmp_path / "run.sh")]).stages[0].train.learning_rate == 3e-6


def test_a_bare_variable_may_hold_several_words_or_none(tmp_path):
    before = 'MORE="--seed 3 --output_dir=a"\nNONE=""\nOUT="b c"\n'
    (tmp_path / "run.sh").write_text(
        f'{before}if python train_soar_a.py {" ".join(SHORT)} $MORE $NONE "$@" --logging_dir "$OUT"; then echo; fi\n'
    )
    found = translate("hy-soar", [str(tmp_path / "run.sh")], 1)
    assert "name: a " in found.text
    assert "seed: 3 " in found.text
    assert dict(found.idle)['--logging_dir "b c"']


def test_a_number_of_processes_that_a_command_prints_is_refused(tmp_path):
    (tmp_path / "run.sh").write_text(
        "accelerate launch --num_processes=$(nvidia-smi -L | wc -l) train.py --model_family=sd3\n"
    )
    with pytest.raises(
        PosttrainError, match=r"num_processes=.* has the output of a command: write its value"
    ):
        translate("simpletuner", [str(tmp_path / "run.sh")])


def test_options_of_the_launcher_are_told():
    words = ["accelerate", "launch", "--num_processes=2", "--mixed_precision", "bf16", "--main_process_port=1",
             "--fsdp_version", "2", "--config_file", "a.yaml", "-m", "sora.train_soar_sd3_5m", *SHORT]  # fmt: skip
    found = translate("hy-soar", words)
    lost = dict(found.lost)
    assert lost["the launcher's --mixed_precision bf16"].startswith("train.precision: bf16")
    assert lost["the launcher's --fsdp_version 2"] == "parallel: {strategy: fsdp2}"
    assert "the file is not read" in lost["the launcher's --config_file a.yaml"]
    assert dict(found.idle)["the launcher's --main_process_port 1"].startswith("how processes start")
    assert not any("num_processes" in name for name in (*lost, *dict(found.idle)))


def test_a_range_of_machines_is_refused():
    with pytest.raises(PosttrainError, match="--nnodes 1:4 is a range"):
        translate(
            "hy-soar",
            ["torchrun", "--nnodes=1:4", "--nproc_per_node=8", "-m", "sora.train_soar_sd3_5m", *SHORT],
        )


def test_conflicting_numbers_of_processes_are_refused():
    with pytest.raises(PosttrainError, match="--processes 4, but its launcher starts 8"):
        translate("hy-soar", SOAR, 4)
    assert translate("hy-soar", SOAR, 8).text


@pytest.mark.parametrize(
    ("trainer", "name"),
    [("hy-soar", "x.py"), ("simpletuner", "c.yaml"), ("flow-factory", "c.json"), ("hy-soar", "x.toml")],
)
def test_a_file_of_another_trainer_is_refused(tmp_path, trainer, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(PosttrainError, match="file that import-flags reads"):
        translate(trainer, [str(tmp_path / name)])


def test_two_configurations_are_refused():
    with pytest.raises(PosttrainError, match="not both"):
        translate("flow-grpo", ["config/grpo.py:geneval_sd3", "--config", "config/grpo.py:pickscore_sd3"])


@pytest.mark.parametrize(
    "command",
    [
        "torchrun --nproc_per_node=8 --module sora.train_soar_sd3_5m",
        "torchrun -m --nproc_per_node 8 sora.train_soar_sd3_5m",
        "accelerate launch --multi_gpu --num_processes 8 train_soar_sd3_5m.py",
        "CUDA_VISIBLE_DEVICES=0 python -m torch.distributed.run --nproc-per-node=8 -m sora.train_soar_sd3_5m",
    ],
)
def test_a_module_or_a_script_ends_the_launchers_words(command):
    found = translate("hy-soar", [*command.split(), *SHORT])
    assert stage_of(found).train.batch_size == 32
    assert not [
        name for name, _ in (*found.idle, *found.lost) if name.split()[-1].strip("-") in ("m", "module")
    ]


@pytest.mark.parametrize(
    "end",
    [" > log 2>&1", " 2>&1 | tee log", "  >> a.log 2>/dev/null &", " 2>&1|tee log", " &> log; echo done", " < /dev/null"],
)  # fmt: skip
def test_where_a_command_of_a_script_writes_to_is_left_out(tmp_path, end):
    command = f"torchrun --nproc_per_node=2 -m sora.train_soar_sd3_5m {' '.join(SHORT)} --seed 2{end}\n"
    (tmp_path / "run.sh").write_text(command)
    recipe = recipe_of("hy-soar", [str(tmp_path / "run.sh")])
    assert (recipe.seed, recipe.stages[0].train.batch_size) == (2, 8)


def test_quotes_keep_what_a_shell_would_read(tmp_path):
    words = f"python train_soar_a.py --output_dir 'a;b > c' {' '.join(SHORT)}"
    (tmp_path / "run.sh").write_text(f"echo 'a > b; c' # don't\npip install soar; {words}\n")
    assert recipe_of("hy-soar", [str(tmp_path / "run.sh")], 1).name == "a-b-c"


def test_a_word_that_belongs_to_nothing_is_refused():
    with pytest.raises(PosttrainError, match="'stray' is neither a flag nor the value of one"):
        translate("hy-soar", [*SHORT, "stray"], 1)
