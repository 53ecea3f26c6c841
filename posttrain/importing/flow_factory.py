"""Flow-Factory's YAML files (github.com/X-GenGroup/Flow-Factory): the algorithms and what they share.

Names, defaults and meanings were read on 2026-11-27 in src/flow_factory/hparams (training_args at c5b89b1 to
b30dc00, the others as stored), src/flow_factory/trainers/rl/grpo.py at b30dc00, and examples at 5f6cda1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from posttrain.errors import PosttrainError
from posttrain.importing.command_line import CommandLine
from posttrain.importing.draft import Draft
from posttrain.importing.flags import Settings
from posttrain.importing.flow_factory_algorithms import ALGORITHMS
from posttrain.importing.flow_factory_flags import BLOCKS, TABLE
from posttrain.importing.flow_factory_steps import blocks_of, put_offline_steps, put_optimizer, put_steps
from posttrain.importing.group_rl import SEEDED, rewards_of
from posttrain.importing.models import as_path, named, put_model, put_precision, put_tracker
from posttrain.importing.trainer import Opened, Start, Trainer
from posttrain.recipe.positions import parse
from posttrain.support.paths import is_file
from posttrain.support.spelling import meant

MODELS = {
    "sd3": "sd3", "sd3-5": "sd3", "flux1": "flux", "flux2-klein": "flux2_klein", "qwenimage": "qwen_image",
    "qwen-image": "qwen_image", "z-image": "z_image",
}  # fmt: skip
DIFFERS = (
    "a field that is misspelt is refused; there unknown keys are kept aside (hparams/abc.py)",
    SEEDED,
    "an evaluation has fixed noise for each prompt, and intervals; eval_freq is monitor.every",
    "the same command goes on with an unfinished run; there save_model_only must be false",
)


def from_yaml(text: str, file: str) -> Iterator[tuple[str, Any]]:
    """Dotted name -> value of a YAML file. Lists, and blocks that hold a value each, stay whole."""
    for key, value in parse(text, file).data.items():
        if key in BLOCKS and isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", v) for inner, v in value.items())
        else:
            yield key, value


def opened(command: CommandLine, given: Path | None) -> Opened:
    """The command without the file of ``ff-train FILE``, and the file. Raises PosttrainError for two."""
    if not (command.script and command.words):
        return command, given
    if given is not None:
        raise PosttrainError(f"Flow-Factory: give {str(given)!r} or {command.words[0]!r}, not both")
    return replace(command, words=command.words[1:]), Path(command.words[0])


def build(s: Settings, d: Draft, start: Start) -> None:
    """Write the recipe of the file ``s``. Raises PosttrainError."""
    trainer, model = s["train.trainer_type"], str(s["model.model_type"]).lower()
    if (algorithm := ALGORITHMS.get(trainer)) is None:
        words = f"posttrain has no counterpart{meant(trainer, ALGORITHMS)}; of Flow-Factory's it has "
        raise s.refused("train.trainer_type", words + ", ".join(ALGORITHMS))
    if model not in MODELS:
        raise s.refused("model.model_type", f"posttrain trains {', '.join(MODELS)} of Flow-Factory's models")
    if start.processes is None:
        raise PosttrainError(
            "num_processes is not given, and Flow-Factory then starts one for each GPU: say how many with "
            "--processes N"
        )
    if s["log.run_name"]:
        d.put("name", named(s["log.run_name"], trainer), "log.run_name")
    else:
        d.put("name", named(f"{s['model.model_type']}-{trainer}", trainer), note="ours")
    put_tracker(d, "log.logging_backend")
    put_model(d, "model.model_name_or_path", kind=MODELS[model])
    d.put("model.type", MODELS[model], "model.model_type")
    put_precision(d, "mixed_precision")
    d.put("stage.name", trainer.replace("-", "_"))
    _tuning(s, d)
    d.put("stage.algorithm.type", algorithm.ours, "train.trainer_type")
    algorithm.put(s, d)
    d.put("seed", s["train.seed"], "train.seed")
    d.put("stage.data.resolution", _side(s, "train.resolution"), "train.resolution")
    _data(s, d, images=algorithm.ours == "sft")
    if algorithm.ours == "sft":
        put_offline_steps(s, d, start.processes)
    else:
        _rewards(s, d)
        put_steps(s, d, start.processes, pairs=algorithm.ours == "dpo_online")
    put_optimizer(s, d)
    d.differs += DIFFERS


def _tuning(s: Settings, d: Draft) -> None:
    if s["model.finetune_type"] == "full":
        d.put("stage.tune.type", "full", "model.finetune_type")
        names = ("model.lora_rank", "model.lora_alpha", "model.target_modules")
        d.idle |= dict.fromkeys(names, "all weights are trained")
        return
    d.put("stage.tune.type", "lora", "model.finetune_type")
    d.put("stage.tune.rank", s["model.lora_rank"], "model.lora_rank")
    alpha = 2 * s["model.lora_rank"] if s["model.lora_alpha"] is None else s["model.lora_alpha"]
    d.put("stage.tune.alpha", alpha, "model.lora_alpha")
    targets = s["model.target_modules"]
    if targets == "all":
        d.lost["model.target_modules"] = "tune.targets, a list of endings of names; by default attention's"
    elif targets == "default":
        d.idle["model.target_modules"] = "the model's own default"
    else:
        names = targets if isinstance(targets, list) else [targets]
        d.put("stage.tune.targets", [str(name) for name in names], "model.target_modules")
    if s["model.resume_path"]:
        d.put("stage.start_from", as_path(s["model.resume_path"]), "model.resume_path")


def _data(s: Settings, d: Draft, *, images: bool) -> None:
    flag, folder = "data.dataset_dir", s["data.dataset_dir"]
    if sources := s["data.datasets"]:
        flag, first = "data.datasets", sources[0]
        if not isinstance(first, Mapping) or "dataset_dir" not in first:
            raise s.refused("data.datasets", "the first one has no dataset_dir")
        folder = first["dataset_dir"]
        if len(sources) > 1:
            d.lost[flag] = "a stage has one file of prompts: join the files, or make a stage of each"
        elif isinstance(first.get("train"), Mapping) and first["train"].get("max_dataset_size"):
            d.lost[flag] = "max_dataset_size: cut the file of prompts"
    root = PurePosixPath(str(folder))
    if images:
        d.put("stage.data.images", f"{root}/train.jsonl", flag)
        words = "records of input and output are not read: write rows of image and caption"
        d.lost[flag] = "; ".join(filter(None, (d.lost.get(flag), words)))
        return
    rows = "geneval" in _weights(s, "rewards") or is_file(f"{root}/train.jsonl")
    ending = "jsonl" if rows else "txt"
    d.put("stage.data.prompts", f"{root}/train.{ending}", flag)
    d.put("evaluation.prompts", f"{root}/test.{ending}", flag)


def _side(s: Settings, flag: str) -> int:
    value = s[flag]
    sides = value if isinstance(value, list) else [value]
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if not whole or len({*sides[:2]}) != 1:
        raise s.refused(flag, "sampled images are square here: give one whole number")
    return sides[0]


def _weights(s: Settings, flag: str) -> dict[str, float]:
    """Name of a reward -> the sum of its weights in the blocks of ``flag``. Raises PosttrainError."""
    weights: dict[str, float] = {}
    for block in blocks_of(s[flag]):
        if not isinstance(block, Mapping) or not block.get("reward_model"):
            raise s.refused(flag, "a reward has no reward_model")
        name = str(block["reward_model"]).lower().rsplit(".", 1)[-1]
        weights[name] = weights.get(name, 0.0) + s.number(flag, block.get("weight", 1.0))
    return weights


def _rewards(s: Settings, d: Draft) -> None:
    if not (weights := _weights(s, "rewards")):
        raise PosttrainError("Flow-Factory needs rewards, and there are none")
    flag = "rewards" if s["eval_rewards"] is None else "eval_rewards"
    d.put("evaluation.rewards", list(rewards_of(d, _weights(s, flag), flag)), flag)
    d.put("stage.rewards", rewards_of(d, weights, "rewards"), "rewards")
    d.put("evaluation.resolution", _side(s, "eval.resolution"), "eval.resolution")
    d.same(
        {
            "evaluation.steps": "eval.num_inference_steps",
            "evaluation.guidance": "eval.guidance_scale",
            "evaluation.batch_size": "eval.per_device_batch_size",
        }
    )
    d.put("evaluation.seed", s["train.seed"] if s["eval.seed"] is None else s["eval.seed"], "eval.seed")
    d.put("evaluation.precision", "fp32" if s["mixed_precision"] == "no" else "bf16", "mixed_precision")


TRAINER = Trainer(
    "Flow-Factory",
    "",
    re.compile(r"(\S*/)?ff-train(\s|$)|(\S*flow_factory[./])(cli|train)(\.py)?(\s|$)"),
    TABLE,
    build,
    files={".yaml": from_yaml, ".yml": from_yaml},
    opened=opened,
)
