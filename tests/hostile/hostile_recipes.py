"""Recipes with one fault each: numbers, names, texts, paths and shapes that no run can have."""

from pipelines import pipeline_folder

GOOD = f"""\
name: good
seed: 3
device: cpu
model: {{type: sd3, path: {pipeline_folder()}, max_sequence_length: 16}}
stages:
  - name: sft
    algorithm: {{type: sft, cond_dropout: 0.1}}
    data: {{type: shapes, images: 20, seed: 1, workers: 0}}
    tune: {{type: lora, rank: 4, alpha: 8}}
    train: {{steps: 10, batch_size: 8, learning_rate: 1e-4, ema: 0.9, betas: [0.9, 0.99]}}
  - name: grpo
    algorithm: {{type: flow_grpo, group_size: 4, num_steps: 6, clip_range: 1e-4}}
    data: {{prompts: {{type: shapes, count: 12, seed: 2}}, resolution: 64}}
    rewards: {{shapes: 1.0, jpeg_compressibility: 0.5}}
    train: {{steps: 6, batch_size: 16, log_every: 2, stop_after_refused: 2}}
    monitor: {{every: 2, prompts: 4}}
evaluation:
  prompts: {{type: shapes, count: 6}}
  rewards: [shapes]
  resolution: 64
  steps: 5
  guidance: 2.0
  grid: 3
"""
BIG = "9" * 400
WHOLE, FINITE, AT_MOST, AT_LEAST = "a whole number", "finite number", "less than or equal to", "greater than"

# (what is replaced in GOOD, by what, words that the error must have beside file and line)
NUMBERS = [
    ("seed: 3", f"seed: {BIG}", [BIG[:40], "the largest number of a recipe"]),
    ("seed: 3", f"seed: -{BIG}", ["the largest number of a recipe"]),
    ("seed: 3", "seed: 9223372036854775808", ["9223372036854775807"]),
    ("seed: 3", f"seed: 0x{'f' * 400}", ["the largest number of a recipe"]),
    ("seed: 3", f"seed: 0o{'7' * 400}", ["the largest number of a recipe"]),
    ("seed: 3", "seed: 3.0", ["seed", WHOLE, "3.0"]),
    ("seed: 3", "seed: 1e3", ["seed", WHOLE]),
    ("seed: 3", "seed: [3]", ["seed", WHOLE, "a list of 1"]),
    ("seed: 3", "seed: {a: 3}", ["seed", WHOLE, "a block of fields"]),
    ("seed: 3", "seed: 3 4", ["seed", WHOLE, "3 4"]),
    ("seed: 3", "seed: three", ["seed", WHOLE, "three"]),
    ("seed: 3", "seed: '3'", ["seed", "remove the quotes"]),
    ("seed: 3", "seed: ", ["seed", "is empty"]),
    ("images: 20", "images: 100000000000", ["data.images", AT_MOST]),
    ("images: 20", "images: -1", ["data.images", AT_LEAST]),
    ("images: 20", "images: 20.5", ["data.images", WHOLE]),
    ("seed: 1", "seed: -1", ["data.seed", AT_LEAST]),
    ("workers: 0", "workers: 10000", ["data.workers", AT_MOST, "256"]),
    ("workers: 0", "workers: -1", ["data.workers", AT_LEAST]),
    ("workers: 0", f"workers: {BIG}", ["the largest number"]),
    ("rank: 4", "rank: 100000000", ["tune.rank", AT_MOST]),
    ("alpha: 8", "alpha: 1e400", ["tune.alpha", FINITE]),
    ("alpha: 8", "alpha: -.inf", ["tune.alpha", FINITE]),
    ("steps: 10", "steps: 1000000000000", ["train.steps", AT_MOST]),
    ("steps: 10", "steps: true", ["train.steps", WHOLE, "truth value"]),
    ("batch_size: 8", "batch_size: 100000000", ["train.batch_size", AT_MOST]),
    ("batch_size: 8", "batch_size: -8", ["train.batch_size", AT_LEAST]),
    ("learning_rate: 1e-4", "learning_rate: 0", ["learning_rate", AT_LEAST]),
    ("learning_rate: 1e-4", "learning_rate: .nan", ["learning_rate", FINITE]),
    ("learning_rate: 1e-4", "learning_rate: 1e999", ["learning_rate", FINITE]),
    ("learning_rate: 1e-4", "learning_rate: 1,5", ["the key '5' is not a text"]),
    ("ema: 0.9", "ema: 1", ["ema", "less than 1"]),
    ("ema: 0.9", "ema: -0.1", ["ema", AT_LEAST]),
    ("betas: [0.9, 0.99]", "betas: [0.9]", ["betas", "at least 2"]),
    ("betas: [0.9, 0.99]", "betas: [0.9, 0.9, 0.9]", ["betas", "at most 2"]),
    ("betas: [0.9, 0.99]", "betas: [0.9, 1.0]", ["betas", "less than 1"]),
    ("betas: [0.9, 0.99]", "betas: 0.9", ["betas", "a list"]),
    ("cond_dropout: 0.1", "cond_dropout: 1.01", ["cond_dropout", AT_MOST]),
    ("group_size: 4", f"group_size: {10**15}", ["train.batch_size", "groups of"]),
    ("num_steps: 6", "num_steps: 1000000000", ["num_steps", AT_MOST]),
    ("num_steps: 6", "num_steps: 1", ["num_steps", AT_LEAST]),
    ("clip_range: 1e-4", "clip_range: 0", ["clip_range", AT_LEAST]),
    ("count: 12", "count: 10000000000", ["prompts", "count", AT_MOST]),
    ("count: 12", "count: 0", ["count", AT_LEAST]),
    ("seed: 2", "seed: -2", ["seed", AT_LEAST]),
    ("jpeg_compressibility: 0.5", "jpeg_compressibility: 1e39", ["weight", AT_MOST]),
    ("jpeg_compressibility: 0.5", "jpeg_compressibility: -1", ["weight", AT_LEAST]),
    ("jpeg_compressibility: 0.5", "jpeg_compressibility: much", ["weight", "a number"]),
    ("stop_after_refused: 2", "stop_after_refused: 0", ["stop_after_refused", AT_LEAST]),
    ("log_every: 2", "log_every: 0", ["log_every", AT_LEAST]),
    ("every: 2, prompts", "every: 0, prompts", ["monitor.every", AT_LEAST]),
    ("prompts: 4", "prompts: 1", ["monitor.prompts", AT_LEAST]),
    ("  steps: 5", "  steps: 100000000", ["evaluation.steps", AT_MOST]),
    ("guidance: 2.0", "guidance: -1", ["guidance", AT_LEAST]),
    ("guidance: 2.0", "guidance: .inf", ["guidance", FINITE]),
    ("grid: 3", "grid: 100000000", ["grid", AT_MOST]),
    ("grid: 3", "grid: -1", ["grid", AT_LEAST]),
]
SIZES = [
    ("  resolution: 64", "  resolution: 100000000", ["evaluation.resolution", AT_MOST, "16384"]),
    ("  resolution: 64", "  resolution: 4096", ["evaluation.resolution", "4096 is too large", "at most"]),
    ("  resolution: 64", "  resolution: 7", ["evaluation.resolution", AT_LEAST]),
    ("  resolution: 64", "  resolution: 65", ["evaluation.resolution", "65 is no multiple"]),
    ("resolution: 64}", "resolution: 100000000}", ["data.resolution", AT_MOST]),
    ("resolution: 64}", "resolution: 4096}", ["data.resolution", "4096 is too large"]),
    ("resolution: 64}", f"resolution: {BIG}}}", ["the largest number"]),
    ("{type: shapes, images: 20, seed: 1, workers: 0}", "{images: x.jsonl, resolution: 8192}", ["8192 is too large"]),
    ("device: cpu", "device: cuda:99999999999999999999", ["device"]),
    ("device: cpu", "device: cuda:-1", ["device", "no device"]),
    ("seed: 3", "cache: {prompts: true, max_size: 10XB}", ["cache.max_size", "is no size"]),
    ("seed: 3", f"cache: {{prompts: true, max_size: {BIG}TB}}", ["cache.max_size", "more than any disk has"]),
    ("seed: 3", "cache: {prompts: true, max_size: -1GB}", ["cache.max_size", "is no size"]),
    ("seed: 3", "cache: {prompts: true, max_size: 3}", ["cache.max_size", AT_LEAST]),
    ("seed: 3", "cache: {max_size: 3GB}", ["cache.max_size", "no effect"]),
    ("max_sequence_length: 16", "max_sequence_length: 100000", ["max_sequence_length", AT_MOST, "512"]),
]  # fmt: skip
NAME = ["name", "is no name: letters A to Z"]
NAMES = [
    ("name: good", "name: ..", NAME),
    ("name: good", "name: ../../etc", NAME),
    ("name: good", "name: /tmp/x", NAME),
    ("name: good", "name: .hidden", NAME),
    ("name: good", "name: -rf", NAME),
    ("name: good", "name: a b", NAME),
    ("name: good", "name: ends.", NAME),
    ("name: good", 'name: "a\\nb"', NAME),
    ("name: good", 'name: "\\e[2J"', NAME),
    ("name: good", 'name: "a\\u202eb"', NAME),
    ("name: good", "name: '[red]'", NAME),
    ("name: good", "name: <b>x</b>", NAME),
    ("name: good", "name: ünïcode", NAME),
    ("name: good", "name: ''", NAME),
    ("name: good", "name: 5", ["name", "string"]),
    ("name: good", f"name: {'x' * 81}", ["name", "at most 80"]),
    ("name: sft", "name: data", ["stages.0.name", "has another use"]),
    ("name: sft", "name: Model", ["stages.0.name", "has another use"]),
    ("name: sft", "name: BASE", ["stages.0.name", "has another use"]),
    ("name: sft", "name: recipe.yaml", ["stages.0.name", "files of a run end in .json"]),
    ("name: sft", "name: run.json", ["stages.0.name", "files of a run end in"]),
    ("name: sft", "name: Report.HTML", ["stages.0.name", "files of a run end in"]),
    ("name: sft", "name: environment.json", ["stages.0.name", "files of a run end in"]),
    ("name: grpo", "name: sft", ["two stages are called 'sft'"]),
    ("name: grpo", "name: SFT", ["ignore case"]),
    ("{shapes: 1.0, jpeg", "{shapes: 1.0, shaped: 1, jpeg", ["no type 'shaped'", "did you mean 'shapes'"]),
    ("{shapes: 1.0, jpeg", "{shapes: 1.0, 'os.path:getsize': 1, 'pathlib:getsize': 1, jpeg", ["getsize is given twice"]),
    ("{shapes: 1.0, jpeg", "{'os:system(1)': 1.0, jpeg", ["function", "has not the form of"]),
    ("{shapes: 1.0, jpeg", "{'../x:y': 1.0, jpeg", ["function", "has not the form of"]),
    ("{shapes: 1.0, jpeg", "{remote: {url: 'file:///etc/passwd', name: a}, jpeg", ["url", "has not the form of"]),
    ("{shapes: 1.0, jpeg", "{remote: {url: 'http://h', name: 'a/b'}, jpeg", ["name", "has not the form of"]),
    ("{shapes: 1.0, jpeg", "{remote: {url: 'http://h', name: a, timeout_seconds: 1e308}, jpeg", ["timeout_seconds", AT_MOST]),
    ("{shapes: 1.0, jpeg", "{remote: {url: 'http://h', name: a, retries: 1000000}, jpeg", ["retries", AT_MOST]),
    ("[shapes]", "[]", ["rewards", "at least 1"]),
    ("[shapes]", "[[shapes]]", ["rewards"]),
    ("[shapes]", "[7]", ["rewards"]),
    ("[shapes]", "7", ["rewards", "a list"]),
    ("[shapes]", "{? {a: 1} : 2}", ["a list or mapping stands where"]),
]  # fmt: skip
SHAPES_OF_DATA = [
    ("type: sft,", "type: [sft],", ["algorithm"]),
    ("type: sft,", "type: {sft: 1},", ["algorithm"]),
    ("type: sft,", "type: null,", ["algorithm"]),
    ("type: sft,", "type: 5,", ["algorithm"]),
    ("type: lora,", "type: dora,", ["tune", "'dora'"]),
    ("{type: shapes, count: 6}", "[a.txt]", ["evaluation.prompts"]),
    ("{type: shapes, count: 6}", "5", ["evaluation.prompts"]),
    ("{type: shapes, count: 6}", "''", ["evaluation.prompts"]),
    ("{type: shapes, count: 6}", "/dev/zero", ["evaluation.prompts"]),
    ("{type: shapes, count: 6}", "'/'", ["evaluation.prompts", "is a folder"]),
    ("{type: shapes, count: 6}", f"{'x' * 300}.txt", ["evaluation.prompts"]),
    ("{type: shapes, count: 6}", '"a\\0b.txt"', ["evaluation.prompts"]),
    ("{type: shapes, count: 6}", "{type: shapes, count: 6, tasks: []}", ["tasks", "at least 1"]),
    ("{type: shapes, count: 6}", "{type: shapes, count: 6, tasks: [flying]}", ["tasks", "'flying'"]),
    ("{type: shapes, count: 6}", "{type: shapes, count: 6, tasks: [colors, colors]}", ["given twice"]),
    (f"path: {pipeline_folder()}", "path: ''", ["model.path"]),
    (f"path: {pipeline_folder()}", '"path": "a\\0b/"', ["model.path"]),
    (f"path: {pipeline_folder()}", "path: /dev/null", ["model.path"]),
    (f"path: {pipeline_folder()}", f"path: ./{'y' * 300}", ["model.path"]),
    (f"path: {pipeline_folder()}", "path: [a]", ["model.path", "string"]),
    ("    tune:", "    start_from: ../../../etc\n    tune:", ["start_from"]),
    ("    tune:", "    start_from: '/dev/null'\n    tune:", ["start_from", "no folder"]),
    ("    tune:", '    start_from: "./a\\0b"\n    tune:', ["start_from"]),
    ("    tune:", "    start_from: ~nosuchuser/x\n    tune:", ["start_from", "no folder"]),
    ("    tune:", f"    start_from: ./{'z' * 300}\n    tune:", ["start_from", "no folder"]),
    (f"path: {pipeline_folder()}", "path: ~nosuchuser/x", ["model.path", "does not exist"]),
    ("    tune:", "    start_from: good\n    tune:", ["start_from", "does not exist"]),
    ("    tune:", "    export_dtype: fp8\n    tune:", ["export_dtype", "'fp8'"]),
    ("    tune:", "    __class__: x\n    tune:", ["__class__", "no such field"]),
    ("    tune:", "    '[red]': x\n    tune:", ["[red]", "no such field"]),
    ("monitor: {every: 2, prompts: 4}", "monitor: always", ["monitor", "a block of fields"]),
    ("stages:\n", "stages: none\nolder:\n", ["stages", "a list", "none"]),
    ("evaluation:\n", "evaluation: yes\nother:\n", ["evaluation", "a block of fields"]),
    ("seed: 3", "parallel: {strategy: ddpp}", ["parallel", "'ddpp'", "did you mean 'ddp'"]),
    ("seed: 3", "parallel: {strategy: deepspeed, config: /dev/null}", ["parallel.config"]),
    ("seed: 3", "parallel: {strategy: deepspeed, config: nowhere.json}", ["parallel.config", "cannot read"]),
    ("seed: 3", "tf32: 1", ["tf32", "true or false"]),
    ("seed: 3", "!!int seed: 3", ["the tag"]),
    ("seed: 3", "seed: !!float 3", ["the tag"]),
    ("seed: 3", "seed: \x1b[2J", ["not valid YAML", "'\\x1b'"]),
    ("seed: 3", "seed: *none", ["undefined alias"]),
    ("seed: 3", "<<: {seed: 3}", ["'<<' is not supported"]),
    ("seed: 3", "? seed\n: 3\n? seed\n: 4", ["'seed' is given twice"]),
]  # fmt: skip

RECIPES = [*NUMBERS, *SIZES, *NAMES, *SHAPES_OF_DATA]
