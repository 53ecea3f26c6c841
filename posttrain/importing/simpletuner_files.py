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

_SAME = (
    "MODEL_TYPE MODEL_FAMILY OUTPUT_DIR TRAIN_BATCH_SIZE LEARNING_RATE LR_WARMUP_STEPS OPTIMIZER "
    "MIXED_PRECISION CAPTION_DROPOUT_PROBABILITY RESOLUTION RESOLUTION_TYPE CHECKPOINT_STEP_INTERVAL "
    "USE_EMA EMA_DECAY BASE_MODEL_PRECISION LORA_TYPE ALLOW_TF32 GRADIENT_ACCUMULATION_STEPS "
    "VALIDATION_PROMPT VALIDATION_GUIDANCE VALIDATION_SEED VALIDATION_RESOLUTION USE_DORA "
    "FLUX_LORA_TARGET VALIDATION_NUM_INFERENCE_STEPS PUSH_TO_HUB VALIDATION_NEGATIVE_PROMPT "
    "TRACKER_PROJECT_NAME TRACKER_RUN_NAME METADATA_UPDATE_INTERVAL VALIDATION_GUIDANCE_RESCALE "
    "READ_BATCH_SIZE WRITE_BATCH_SIZE MAX_WORKERS VAE_BATCH_SIZE IMAGE_PROCESSING_BATCH_SIZE "
    "TORCH_NUM_THREADS AWS_MAX_POOL_CONNECTIONS TRAINING_SCHEDULER_TIMESTEP_SPACING "
    "INFERENCE_SCHEDULER_TIMESTEP_SPACING ASPECT_BUCKET_ROUNDING VALIDATION_GUIDANCE_REAL "
    "VALIDATION_NO_CFG_UNTIL_TIMESTEP LYCORIS_CONFIG FLUX_GUIDANCE_VALUE LR_END DISABLE_BENCHMARK "
    "INSTANCE_PROMPT"
)
ENVIRONMENT = {
    **{name: name.lower() for name in _SAME.split()},
    "MODEL_NAME": "pretrained_model_name_or_path", "TRAINING_SEED": "seed",
    "MAX_NUM_STEPS": "max_train_steps", "NUM_EPOCHS": "num_train_epochs", "LR_SCHEDULE": "lr_scheduler",
    "USE_GRADIENT_CHECKPOINTING": "gradient_checkpointing", "DATALOADER_CONFIG": "data_backend_config",
    "CHECKPOINTING_STEPS": "checkpoint_step_interval", "CHECKPOINTING_LIMIT": "checkpoints_total_limit",
    "TRAINING_NUM_PROCESSES": "num_processes", "TRAINING_NUM_MACHINES": "num_machines",
    "TRAINING_DYNAMO_BACKEND": "dynamo_backend", "VALIDATION_STEPS": "validation_step_interval",
    "RESUME_CHECKPOINT": "resume_from_checkpoint", "HUB_MODEL_NAME": "hub_model_id",
    "PUSH_CHECKPOINTS": "push_checkpoints_to_hub", "MINIMUM_RESOLUTION": "minimum_image_size",
    "MIN_SNR_GAMMA": "snr_gamma",
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
    flags = [*_from_variables(command.variables, known=True), *command.flags, *pairs]
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
