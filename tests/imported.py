"""Translations of other trainers' commands, as tests ask for them."""

from posttrain.importing.trainers import translate
from posttrain.recipe.file import parse_recipe

SOAR = [
    "torchrun", "--nnodes=1", "--node_rank=0", "--nproc_per_node=8", "--master_addr=localhost",
    "--master_port=29522", "-m", "sora.train_soar_sd3_5m", "--pretrained_model_name_or_path",
    "/path/to/stable-diffusion-3.5-medium", "--jsonl_path", "/path/to/high_aesthetic.jsonl", "--image_dir",
    "/path/to/images", "--output_dir", "./output/sd3.5m_soar", "--resolution", "512", "--train_batch_size",
    "4", "--gradient_accumulation_steps", "1", "--max_train_steps", "5000", "--checkpointing_steps",
    "1000", "--seed", "42", "--learning_rate", "2e-5", "--lr_scheduler", "constant", "--lr_warmup_steps",
    "0", "--adam_weight_decay", "1e-2", "--max_grad_norm", "1.0", "--weighting_scheme", "logit_normal",
    "--mixed_precision", "bf16", "--dataloader_num_workers", "16", "--gradient_checkpointing",
    "--allow_tf32", "--report_to", "tensorboard", "--num_rollout_paths", "1", "--trajectory_length", "6",
    "--num_sampling_steps", "40", "--sde_rollout_type", "flow_sde", "--sde_noise_scale", "0.5",
    "--lambda_aux", "1.0", "--cfg_scale_sampling", "4.5",
]  # fmt: skip
"""The command of HY-SOAR's README at 0aec693, of which flags and values are facts."""
SHORT = ["--pretrained_model_name_or_path", "x/stable-diffusion-3.5", "--jsonl_path", "a.jsonl", "--image_dir", "i",
         "--max_train_steps", "10"]  # fmt: skip


def recipe_of(trainer, words, processes=None, **how):
    return parse_recipe(translate(trainer, words, processes, **how).text, "recipe", checks=False)


def stage_of(found):
    """The one stage of a translation."""
    (stage,) = parse_recipe(found.text, "recipe", checks=False).stages
    return stage


def told(pairs, flag):
    return [words for name, words in pairs if name.split()[0] == flag]
