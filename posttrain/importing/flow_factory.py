"""Flow-Factory's YAML files (github.com/X-GenGroup/Flow-Factory): the algorithms and what they share.

Names, defaults and meanings were read on 2026-11-27 in src/flow_factory/hparams (training_args at c5b89b1 to
b30dc00, the others as stored), src/flow_factory/trainers/rl/grpo.py at b30dc00, and examples at 5f6cda1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from posttrain.errors import PosttrainError
from posttrain.importing.draft import Draft
from posttrain.importing.flags import Settings
from posttrain.importing.flow_factory_algorithms import ALGORITHMS
from posttrain.importing.flow_factory_flags import BLOCKS, TABLE
from posttrain.importing.flow_factory_steps import blocks_of, put_offline_steps, put_optimizer, put_steps
from posttrain.importing.group_rl import put_rewards
from posttrain.importing.models import named, put_model, put_precision, put_tracker
from posttrain.support.paths import is_file
from posttrain.support.spelling import meant

__all__ = ["NAME", "PREFIX", "SCRIPTS", "TABLE", "build", "flattened"]

NAME, PREFIX = "flow-factory", ""
SCRIPTS = re.compile(r"ff-train$|flow_factory")
MODELS = {
    "sd3": "sd3", "sd3-5": "sd3", "flux1": "flux", "flux2-klein": "flux2_klein", "qwenimage": "qwen_image",
    "qwen-image": "qwen_image", "z-image": "z_image",
}  # fmt: skip
DIFFERS = (
    "a field that is misspelt is refused; there unknown keys are kept aside (hparams/abc.py)",
    "noise, groups and prompts are functions of the seed and the step, so another number of "
    "GPUs trains the same",
    "evaluation has fixed noise for each prompt, and intervals; eval_freq is the monitor's",
    "the same command goes on with an unfinished run; there save_model_only must be false",
)


def flattened(data: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of a YAML file. Lists, and blocks that hold a value each, stay whole."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if key in BLOCKS and isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            flat[str(key)] = value
    return flat


def note_unknown(s: Settings) -> None:
    """Count the keys of ``optimizers`` that no field comes from as unknown flags."""
    for block in blocks_of(s["optimizers"]):
        for key, value in block.items() if isinstance(block, Mapping) else ():
            if key not in ("name", "learning_rate", "weight_decay", "betas", "eps", "max_grad_norm"):
                s.unknown[f"optimizers.{key}"] = value


def build(s: Settings, d: Draft, script: str, processes: int | None) -> None:
    """Write the recipe of the file ``s``. Raises PosttrainError."""
    del script
    algorithm = ALGORITHMS.get(s["train.trainer_type"])
    if algorithm is None:
        known = ", ".join(ALGORITHMS)
        hint = meant(s["train.trainer_type"], ALGORITHMS)
        raise s.refused(
            "train.trainer_type", f"posttrain has no counterpart{hint}; of Flow-Factory's it has {known}"
        )
    count: int = processes or s["num_processes"]
    trainer = s["train.trainer_type"]
    if s["log.run_name"]:
        d.put("name", named(s["log.run_name"], trainer), "log.run_name")
    else:
        d.put("name", named(f"{s['model.model_type']}-{trainer}", trainer), note="ours")
    d.put("seed", s["train.seed"], "train.seed")
    put_tracker(d, "log.logging_backend")
    model = str(s["model.model_type"]).lower()
    if model not in MODELS:
        raise s.refused("model.model_type", f"posttrain trains {', '.join(MODELS)} of Flow-Factory's models")
    put_model(d, "model.model_name_or_path", kind=MODELS[model])
    d.put("model.type", MODELS[model], "model.model_type")
    put_precision(d, "mixed_precision")
    d.put("stage.name", trainer.replace("-", "_"))
    _tuning(s, d)
    d.put("stage.algorithm.type", algorithm.ours, "train.trainer_type")
    algorithm.put(s, d)
    _data(s, d, images=algorithm.ours == "sft")
    if algorithm.ours == "sft":
        put_offline_steps(s, d, count)
    else:
        _rewards(s, d)
        put_steps(s, d, count, pairs=algorithm.ours == "dpo_online")
    put_optimizer(s, d)
    d.differs += DIFFERS


def _tuning(s: Settings, d: Draft) -> None:
    if s["model.finetune_type"] == "full":
        d.put("stage.tune.type", "full", "model.finetune_type")
        for name in ("model.lora_rank", "model.lora_alpha", "model.target_modules"):
            d.idle[name] = "all weights are trained"
        return
    d.put("stage.tune.type", "lora", "model.finetune_type")
    d.put("stage.tune.rank", s["model.lora_rank"], "model.lora_rank")
    alpha = 2 * s["model.lora_rank"] if s["model.lora_alpha"] is None else s["model.lora_alpha"]
    d.put("stage.tune.alpha", alpha, "model.lora_alpha")
    targets = s["model.target_modules"]
    if isinstance(targets, list):
        d.put("stage.tune.targets", [str(t) for t in targets], "model.target_modules")
    elif targets == "all":
        d.lost["model.target_modules"] = (
            "targets is a list of endings of names; by default attention's projections"
        )
    else:
        d.idle["model.target_modules"] = "the model's own default"
    if s["model.resume_path"]:
        path = str(s["model.resume_path"])
        d.put("stage.start_from", path if "/" in path else f"./{path}", "model.resume_path")


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
    rows = any(_name(r) == "geneval" for r in blocks_of(s["rewards"])) or is_file(f"{root}/train.jsonl")
    ending = "jsonl" if rows or images else "txt"
    if images:
        d.put("stage.data.images", f"{root}/train.jsonl", flag)
        words = "records of input and output are not read: write rows of image and caption"
        d.lost[flag] = "; ".join(filter(None, (d.lost.get(flag), words)))
        d.put("stage.data.resolution", _side(s, "train.resolution"), "train.resolution")
        return
    d.put("stage.data.prompts", f"{root}/train.{ending}", flag)
    d.put("stage.data.resolution", _side(s, "train.resolution"), "train.resolution")
    d.put("evaluation.prompts", f"{root}/test.{ending}", flag)


def _side(s: Settings, flag: str) -> int:
    value = s[flag]
    sides = value if isinstance(value, list) else [value]
    if (
        not all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
        or len({*sides[:2]}) != 1
    ):
        raise s.refused(flag, "sampled images are square here: give one whole number")
    return sides[0]


def _name(block: Any) -> str:
    return str(block.get("reward_model", "")).lower() if isinstance(block, Mapping) else ""


def _rewards(s: Settings, d: Draft) -> None:
    weights: dict[str, float] = {}
    for block in blocks_of(s["rewards"]):
        if not (name := _name(block)):
            raise s.refused("rewards", "a reward has no reward_model")
        short, weight = name.rsplit(".", 1)[-1], s.number("rewards", block.get("weight", 1.0))
        weights[short] = weights.get(short, 0.0) + weight
    if not weights:
        raise PosttrainError("Flow-Factory needs rewards, and there are none")
    put_rewards(d, {**weights}, "rewards")
    ours = list(d.stage["rewards"].value)
    if s["eval_rewards"] is None:
        d.put("evaluation.rewards", ours, "rewards")
    else:
        put_rewards(
            d,
            {_name(block).rsplit(".", 1)[-1]: 1.0 for block in blocks_of(s["eval_rewards"])},
            "eval_rewards",
        )
        d.fields.pop("eval_rewards", None)
        d.put("evaluation.rewards", list(d.stage["rewards"].value), "eval_rewards")
        put_rewards(d, {**weights}, "rewards")
    d.put("evaluation.resolution", _side(s, "eval.resolution"), "eval.resolution")
    d.put("evaluation.steps", s["eval.num_inference_steps"], "eval.num_inference_steps")
    d.put("evaluation.guidance", s["eval.guidance_scale"], "eval.guidance_scale")
    d.put("evaluation.batch_size", s["eval.per_device_batch_size"], "eval.per_device_batch_size")
    d.put("evaluation.seed", s["train.seed"] if s["eval.seed"] is None else s["eval.seed"], "eval.seed")
    d.put("evaluation.precision", "fp32" if s["mixed_precision"] == "no" else "bf16", "mixed_precision")
