"""Reads SimpleTuner's config.json and config.env, and finds the one that a command names.

Names of variables were read on 2026-11-27 in helpers/configuration/env_file.py at 04265fc, the commands in
simpletuner/cli at 0609d8f and 3ff1fb2.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError
from posttrain.importing.command_line import ASSIGNMENT, CommandLine, parsed, refuse_unset
from posttrain.importing.flags import BARE
from posttrain.importing.shell_script import read_script
from posttrain.importing.trainer import Opened

SCRIPTS = re.compile(r"(\S*/)?(train\.(py|sh)|simpletuner[ .]train|simpletuner-train)(\s|$)")

ENVIRONMENT = {
    "MODEL_TYPE": "model_type", "MODEL_NAME": "pretrained_model_name_or_path",
    "MODEL_FAMILY": "model_family", "OUTPUT_DIR": "output_dir", "TRAINING_SEED": "seed",
    "MAX_NUM_STEPS": "max_train_steps", "NUM_EPOCHS": "num_train_epochs",
    "TRAIN_BATCH_SIZE": "train_batch_size", "LEARNING_RATE": "learning_rate", "LR_SCHEDULE": "lr_scheduler",
    "LR_WARMUP_STEPS": "lr_warmup_steps", "OPTIMIZER": "optimizer", "MIXED_PRECISION": "mixed_precision",
    "USE_GRADIENT_CHECKPOINTING": "gradient_checkpointing",
    "CAPTION_DROPOUT_PROBABILITY": "caption_dropout_probability", "RESOLUTION": "resolution",
    "RESOLUTION_TYPE": "resolution_type", "DATALOADER_CONFIG": "data_backend_config",
    "CHECKPOINTING_STEPS": "checkpoint_step_interval",
    "CHECKPOINT_STEP_INTERVAL": "checkpoint_step_interval",
    "CHECKPOINTING_LIMIT": "checkpoints_total_limit", "USE_EMA": "use_ema", "EMA_DECAY": "ema_decay",
    "BASE_MODEL_PRECISION": "base_model_precision", "LORA_TYPE": "lora_type", "ALLOW_TF32": "allow_tf32",
    "GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps", "TRAINING_NUM_PROCESSES": "num_processes",
    "TRAINING_NUM_MACHINES": "num_machines", "TRAINING_DYNAMO_BACKEND": "dynamo_backend",
    "VALIDATION_PROMPT": "validation_prompt", "VALIDATION_GUIDANCE": "validation_guidance",
    "VALIDATION_STEPS": "validation_step_interval", "VALIDATION_SEED": "validation_seed",
    "VALIDATION_RESOLUTION": "validation_resolution", "USE_DORA": "use_dora",
    "FLUX_LORA_TARGET": "flux_lora_target",
    "VALIDATION_NUM_INFERENCE_STEPS": "validation_num_inference_steps", "PUSH_TO_HUB": "push_to_hub",
    "VALIDATION_NEGATIVE_PROMPT": "validation_negative_prompt",
    "RESUME_CHECKPOINT": "resume_from_checkpoint", "TRACKER_PROJECT_NAME": "tracker_project_name",
    "TRACKER_RUN_NAME": "tracker_run_name", "HUB_MODEL_NAME": "hub_model_id",
    "PUSH_CHECKPOINTS": "push_checkpoints_to_hub", "MINIMUM_RESOLUTION": "minimum_image_size",
    "METADATA_UPDATE_INTERVAL": "metadata_update_interval",
    "VALIDATION_GUIDANCE_RESCALE": "validation_guidance_rescale", "READ_BATCH_SIZE": "read_batch_size",
    "WRITE_BATCH_SIZE": "write_batch_size", "MAX_WORKERS": "max_workers",
    "VAE_BATCH_SIZE": "vae_batch_size", "IMAGE_PROCESSING_BATCH_SIZE": "image_processing_batch_size",
    "TORCH_NUM_THREADS": "torch_num_threads", "AWS_MAX_POOL_CONNECTIONS": "aws_max_pool_connections",
    "MIN_SNR_GAMMA": "snr_gamma",
    "TRAINING_SCHEDULER_TIMESTEP_SPACING": "training_scheduler_timestep_spacing",
    "INFERENCE_SCHEDULER_TIMESTEP_SPACING": "inference_scheduler_timestep_spacing",
    "ASPECT_BUCKET_ROUNDING": "aspect_bucket_rounding",
    "VALIDATION_GUIDANCE_REAL": "validation_guidance_real",
    "VALIDATION_NO_CFG_UNTIL_TIMESTEP": "validation_no_cfg_until_timestep",
    "LYCORIS_CONFIG": "lycoris_config", "FLUX_GUIDANCE_VALUE": "flux_guidance_value", "LR_END": "lr_end",
    "DISABLE_BENCHMARK": "disable_benchmark", "INSTANCE_PROMPT": "instance_prompt",
}  # fmt: skip
"""Variable of config.env -> option."""
SWITCHES = {"STABLE_DIFFUSION_3": "sd3", "FLUX": "flux", "PIXART_SIGMA": "pixart_sigma", "KOLORS": "kolors"}
"""Variables of older files that say the family by being true."""
EXTRA = ("TRAINER_EXTRA_ARGS", "DEBUG_EXTRA_ARGS")
SHELL = re.compile(
    r"(CUDA|HF|NCCL|OMP|PYTORCH|TOKENIZERS|WANDB|ACCELERATE|SIMPLETUNER|CONFIG)_\w+|ENV|USE_XFORMERS|PURE_BF16|"
    r"USE_BITFIT|CONTROLNET|STABLE_DIFFUSION_LEGACY|HUNYUAN_DIT|DELETE_ERRORED_IMAGES|DELETE_SMALL_IMAGES"
)
"""Variables that no option of the training comes from."""
CONFIGS = ("config.json", "config.toml", "config.env")


def from_json(text: str, file: str) -> Iterator[tuple[str, Any]]:
    """The options of a config.json, with or without dashes."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PosttrainError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise PosttrainError(f"{file} is no mapping of options to values")
    for key, value in data.items():
        yield key.lstrip("-"), value


def from_env_file(text: str, file: str) -> Iterator[tuple[str, Any]]:
    """The options of a config.env. A variable that is no option's is given as one, so that it is named."""
    return _from_variables(read_script(text, file, "SimpleTuner", SCRIPTS).variables)


def _from_variables(variables: Mapping[str, str], *, known: bool = False) -> Iterator[tuple[str, Any]]:
    """The options of shell variables; with ``known`` only of those that are options'."""
    for name, value in variables.items():
        if name in ENVIRONMENT or name in EXTRA:
            refuse_unset(value, f"{name}={value}")
        if name in ENVIRONMENT:
            yield ENVIRONMENT[name], value
        elif name in SWITCHES:
            if value.lower() in ("true", "1"):
                yield "model_family", SWITCHES[name]
        elif name in EXTRA:
            try:
                words = shlex.split(value)
            except ValueError as error:
                raise PosttrainError(f"{name} of config.env cannot be read: {error}") from None
            yield from parsed(words, SCRIPTS).flags
        elif not (known or SHELL.fullmatch(name)):
            yield name, value


def opened(command: CommandLine, given: Path | None) -> Opened:
    """The command without what names its configuration, and the configuration: the file ``given``, that of
    ``--config``, of the environment ``env``, or the one in the current folder. Raises PosttrainError."""
    if not command.script:
        return command, given
    words = [word for word in command.words if word != "train"]
    pairs = [(found[1], found[2]) for word in words if (found := ASSIGNMENT.fullmatch(word))]
    flags: list[tuple[str, object]] = [
        *_from_variables(command.variables, known=True),
        *command.flags,
        *pairs,
    ]
    named = {n: "" if v is BARE else str(v) for n, v in flags if n in ("config", "env", "example", "e")}
    if "ENV" in command.variables:
        named.setdefault("env", command.variables["ENV"])
    rest = replace(
        command,
        words=[word for word in words if not ASSIGNMENT.fullmatch(word)],
        flags=[(name, value) for name, value in flags if name not in named],
    )
    return rest, _configuration(command.script, named, given)


def _configuration(script: str, named: Mapping[str, str], given: Path | None) -> Path | None:
    if given is not None and named:
        raise PosttrainError(
            f"SimpleTuner: give {str(given)!r} or {' '.join(named)} of the command, not both"
        )
    if given is not None or (not named and script.endswith(("train.py", "simpletuner.train"))):
        return given
    if example := named.get("example") or named.get("e"):
        raise PosttrainError(
            f"the example {example} is inside SimpleTuner's package: 'simpletuner examples copy {example}' "
            "copies it; give its config.json in place of the command"
        )
    if "config" in named:
        places = [Path(named["config"])]
    elif "env" in named:
        places = [Path(root, named["env"], name) for root in ("config", "") for name in CONFIGS]
    else:
        places = [Path(root, name) for root in ("", "config") for name in CONFIGS]
    if (found := next((place for place in places if place.is_file()), None)) is None:
        raise PosttrainError(
            f"SimpleTuner's command reads {' or '.join(map(str, places))}: no such file here"
        )
    return found
