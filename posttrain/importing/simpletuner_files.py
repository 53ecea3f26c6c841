"""SimpleTuner's config.json and config.env, and the names that options have in the latter.

Read on 2026-11-27 in helpers/configuration/env_file.py at 04265fc.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.errors import PosttrainError
from posttrain.importing.command_line import parsed, refuse_unset

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
SHELL = (
    "USE_XFORMERS", "PURE_BF16", "TOKENIZERS_PARALLELISM", "ACCELERATE_EXTRA_ARGS", "USE_BITFIT",
    "CONTROLNET",
    "STABLE_DIFFUSION_LEGACY", "HUNYUAN_DIT",
    "DELETE_ERRORED_IMAGES", "DELETE_SMALL_IMAGES",
)  # fmt: skip
"""Variables that no option of the training comes from."""


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


def from_environment(variables: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """The options of a config.env."""
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
            yield from parsed(words, "SimpleTuner").flags
        elif name not in SHELL:
            yield name, value
