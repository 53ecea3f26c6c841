"""Writes what Flow-GRPO's and DiffusionNFT's configurations share: groups, rewards, prompts, LoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping

from posttrain.errors import PosttrainError
from posttrain.importing.draft import Draft
from posttrain.importing.flags import Flag
from posttrain.importing.models import as_path, named, put_model, put_precision
from posttrain.importing.trainer import Start

STEPS = 10_000
"""Optimizer steps where the other trainer runs until it is stopped."""
ENDLESS = 100_000
SEEDED = "noise, groups and prompts depend on seed and step alone, so any number of GPUs trains the same"
REWARDS = {
    **{name: name for name in (
        "geneval", "ocr", "pickscore", "clipscore", "hpsv2", "aesthetic", "imagereward", "unifiedreward",
        "jpeg_compressibility", "jpeg_incompressibility",
    )},
    "clip": "clipscore",
}  # fmt: skip
"""Their name of a reward -> ours."""
SAME = {
    "seed": "seed",
    "tf32": "allow_tf32",
    "stage.data.resolution": "resolution",
    "stage.algorithm.group_size": "sample.num_image_per_prompt",
    "stage.algorithm.num_steps": "sample.num_steps",
    "stage.algorithm.guidance_scale": "sample.guidance_scale",
    "stage.algorithm.global_std": "sample.global_std",
    "stage.algorithm.adv_clip_max": "train.adv_clip_max",
    "stage.train.learning_rate": "train.learning_rate",
    "stage.train.eps": "train.adam_epsilon",
    "stage.train.weight_decay": "train.adam_weight_decay",
    "stage.train.max_grad_norm": "train.max_grad_norm",
    "stage.train.betas": ("train.adam_beta1", "train.adam_beta2"),
    "evaluation.resolution": "resolution",
    "evaluation.steps": "sample.eval_num_steps",
    "evaluation.batch_size": "sample.test_batch_size",
}

COMMON: dict[str, Flag] = {
    "run_name": Flag(default=""),
    "debug": Flag("bool", idle="posttrain has --debug for tracebacks"),
    "num_epochs": Flag("int", ENDLESS),
    "resume_from": Flag(idle="the same command goes on with an unfinished run"),
    "seed": Flag("int", 42),
    "logdir": Flag(idle="a run writes to runs/NAME"),
    "save_dir": Flag(default=""),
    "mixed_precision": Flag(default="fp16", choices=("fp16", "bf16", "no")),
    "allow_tf32": Flag("bool", True),
    "use_lora": Flag("bool", True),
    "dataset": Flag(default=""),
    "resolution": Flag("int", 768, least=1),
    "pretrained.model": Flag(),
    "pretrained.revision": Flag(),
    "sample.num_steps": Flag("int", 40, least=1),
    "sample.eval_num_steps": Flag("int", 40, least=1),
    "sample.guidance_scale": Flag("float", 4.5),
    "sample.train_batch_size": Flag("int", 1, least=1),
    "sample.num_image_per_prompt": Flag("int", 1, least=1),
    "sample.test_batch_size": Flag("int", 1),
    "sample.num_batches_per_epoch": Flag("int", 2, least=1),
    "sample.global_std": Flag("bool", True),
    "train.batch_size": Flag(
        "int", 1, least=1, idle="it is a micro-batch, which changes rounding only: micro_batch: auto"
    ),
    "train.learning_rate": Flag("float", 3e-4),
    "train.adam_beta1": Flag("float", 0.9),
    "train.adam_beta2": Flag("float", 0.999),
    "train.adam_weight_decay": Flag("float", 1e-4),
    "train.adam_epsilon": Flag("float", 1e-8),
    "train.gradient_accumulation_steps": Flag("int", 1, least=1),
    "train.max_grad_norm": Flag("float", 1.0),
    "train.num_inner_epochs": Flag(
        "int", 1, nearest="a batch is trained once; more steps_per_batch use it in parts", off=(1,)
    ),
    "train.adv_clip_max": Flag("float", 5.0),
    "train.lora_path": Flag(),
    "prompt_fn": Flag(default="general_ocr"),
    "prompt_fn_kwargs": Flag("map", idle="prompts are read from a file"),
    "reward_fn": Flag("map"),
    "per_prompt_stat_tracking": Flag(
        "bool", True, nearest="advantages are always those of a prompt's group", off=(True,)
    ),
}


def put_common(
    draft: Draft, start: Start, stage: str, evaluation_guidance: str, *, parts: bool = False
) -> None:
    """Write all but the algorithm's own settings. ``evaluation_guidance`` is a flag. With ``parts`` a batch
    is divided anew for training, into parts of ``train.batch_size``. Raises PosttrainError."""
    s = draft.settings
    _name(draft, stage)
    kind = put_model(draft, "pretrained.model", "pretrained.revision")
    if kind == "sd3":
        draft.put("model.max_sequence_length", 128, note="as its training script has")
    put_precision(draft, "mixed_precision")
    draft.put("stage.name", stage)
    _tuning(draft)
    _prompts_and_rewards(draft)
    _steps(draft, _geometry(draft, start.processes, parts=parts))
    draft.same({**SAME, "evaluation.guidance": evaluation_guidance})
    draft.put("stage.train.micro_batch", "auto", note="ours: changes rounding only")
    if s["train.ema"]:
        draft.put("stage.train.ema", 0.9, "train.ema", note="its greatest decay")
    else:
        draft.idle["train.ema"] = "off, as here"
    precision = "fp32" if s["mixed_precision"] == "no" else "bf16"
    draft.put("evaluation.precision", precision, "mixed_precision")


def _name(draft: Draft, otherwise: str) -> None:
    """Write the recipe's name: ``run_name``, else the last two parts of ``save_dir``, else ``otherwise``."""
    s = draft.settings
    parts = [part for part in str(s["save_dir"] or "").split("/") if part][-2:]
    name = named(str(s["run_name"] or "") or "-".join(parts), otherwise)
    draft.put("name", name, "run_name" if s["run_name"] else "save_dir")
    if s["run_name"]:
        draft.idle["save_dir"] = "a run writes to runs/NAME"


def _geometry(draft: Draft, processes: int | None, *, parts: bool) -> int:
    """Write the batch; returns the optimizer steps on one. Raises PosttrainError."""
    s = draft.settings
    if processes is None:
        raise PosttrainError(
            f"{s.trainer} counts a batch for each process: say how many there are with --processes N"
        )
    per_process, batches = s["sample.train_batch_size"], s["sample.num_batches_per_epoch"]
    accumulated, group = s["train.gradient_accumulation_steps"], s["sample.num_image_per_prompt"]
    total = per_process * batches * processes
    note = f"{per_process} x {batches} x {processes} processes = {total // group} groups of {group}"
    flags = ("sample.train_batch_size", "sample.num_batches_per_epoch")
    draft.put("stage.train.batch_size", total, *flags, note=note)
    names, what = ["train.gradient_accumulation_steps"], "sample.num_batches_per_epoch"
    if parts:
        names, what = [*names, "train.batch_size"], "the micro-batches of train.batch_size"
        samples = per_process * batches
        if samples % s["train.batch_size"]:
            raise s.refused("train.batch_size", f"must divide a process's {samples} samples")
        batches = samples // s["train.batch_size"]
    if batches % accumulated:
        words = f"must divide {what}, {batches}, into whole optimizer steps"
        raise s.refused("train.gradient_accumulation_steps", words)
    note = f"{batches} batches / {accumulated} accumulated"
    draft.put("stage.train.steps_per_batch", batches // accumulated, *names, note=note)
    return batches // accumulated


def _steps(draft: Draft, per_batch: int) -> None:
    """Write the number of optimizer steps, and what is counted in them."""
    s = draft.settings
    epochs, saved, read = s["num_epochs"], s["save_freq"], s["eval_freq"]
    if epochs >= ENDLESS:
        steps = STEPS // per_batch * per_batch
        note = f"ours: {s.trainer} runs until it is stopped. It may grow later"
        draft.put("stage.train.steps", steps, note=note)
        draft.idle["num_epochs"] = "so many that the run is stopped by hand; 'steps' is ours"
    else:
        draft.put("stage.train.steps", epochs * per_batch, "num_epochs", note=f"{epochs} x {per_batch}")
    draft.put("stage.train.checkpoint_every", saved * per_batch, "save_freq", note=f"{saved} x {per_batch}")
    draft.put("stage.train.sample_every", saved * per_batch, "save_freq")
    draft.put("stage.monitor.every", read * per_batch, "eval_freq", note=f"{read} x {per_batch}")
    draft.put("stage.monitor.prompts", 64, note="ours")


def _tuning(draft: Draft) -> None:
    """Write ``tune``: a LoRA of the sizes that the published training scripts have, or full tuning."""
    s = draft.settings
    if not s["use_lora"]:
        draft.put("stage.tune.type", "full", "use_lora")
        return
    draft.put("stage.tune.type", "lora", "use_lora")
    for field, value in (("rank", 32), ("alpha", 64), ("init", "gaussian")):
        draft.put(f"stage.tune.{field}", value, note="as its training script has")
    if s["train.lora_path"]:
        draft.put("stage.start_from", as_path(s["train.lora_path"]), "train.lora_path")
        draft.differs.append(
            "train.lora_path: the LoRA there is trained on; here it is merged and a new one begins, or kept "
            "beside with tune.before: stack. It must be a stage's folder, or hold an adapter for diffusers"
        )


def _prompts_and_rewards(draft: Draft) -> None:
    """Write the stage's data and rewards, and the evaluation's prompts and rewards."""
    s = draft.settings
    if not s["dataset"]:
        raise PosttrainError(f"{s.trainer} needs {s.spelled('dataset')}, the folder of the prompts")
    folder = str(s["dataset"]).rstrip("/")
    metadata = s["prompt_fn"] == "geneval"
    train, test = ("train_metadata.jsonl", "test_metadata.jsonl") if metadata else ("train.txt", "test.txt")
    draft.put("stage.data.prompts", f"{folder}/{train}", "dataset", "prompt_fn")
    if s["prompt_fn"] not in ("geneval", "general_ocr"):
        draft.lost["prompt_fn"] = "prompts are read from a text file or from JSONL with GenEval's metadata"
    if not (rewards := s["reward_fn"]):
        raise PosttrainError(f"{s.trainer} needs {s.spelled('reward_fn')}, such as {{'pickscore': 1.0}}")
    ours = rewards_of(draft, {str(name): weight for name, weight in rewards.items()}, "reward_fn")
    draft.put("stage.rewards", ours, "reward_fn")
    draft.put("evaluation.prompts", f"{folder}/{test}", "dataset", "prompt_fn")
    draft.put("evaluation.rewards", list(ours), "reward_fn")


def rewards_of(draft: Draft, rewards: Mapping[str, object], flag: str) -> dict[str, float]:
    """Our name -> weight for the ``rewards`` of ``flag``. One that posttrain lacks becomes a function, which
    its user is to write. Raises PosttrainError."""
    s = draft.settings
    weights: dict[str, float] = {}
    for name, weight in rewards.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise PosttrainError(f"{s.spelled(flag)}: the weight of {name} is no number: {weight!r}")
        if (ours := _ours(name)) in weights and ours.startswith("my_rewards:"):
            raise PosttrainError(f"{s.spelled(flag)}: two of the rewards are {ours} here")
        weights[ours] = weights.get(ours, 0.0) + float(weight)
    if missing := [name for name in rewards if name.lower() not in REWARDS]:
        draft.lost[flag] = (
            f"no reward {', '.join(missing)}: write my_rewards.py with a function of that name "
            "(images, prompts, metadata) -> numbers, or serve one (posttrain serve-reward)"
        )
    return weights


def _ours(name: str) -> str:
    function = re.sub(r"[-.]", "_", named(name, "reward"))
    return REWARDS.get(name.lower()) or f"my_rewards:{function}"
