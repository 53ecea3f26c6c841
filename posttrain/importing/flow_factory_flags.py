"""The table of Flow-Factory's settings; see :mod:`posttrain.importing.flow_factory` for the sources."""

from __future__ import annotations

from posttrain.importing.flags import Flag

BLOCKS = ("data", "model", "log", "train", "scheduler", "eval")
_LAUNCH = "posttrain run --nproc N, torchrun, accelerate launch or srun start the processes"
_RUN = "a run writes to runs/NAME, and the same command goes on with it"
_CACHE = "cache: {prompts: true} keeps encodings"
_FREE = "it changes speed or memory, not results"
_TIMES = ("uniform", "logit_normal", "discrete", "discrete_with_init", "discrete_wo_init")

TABLE: dict[str, Flag] = {
    "launcher": Flag(idle=_LAUNCH),
    "config_file": Flag(idle="parallel: auto, ddp, fsdp2 or deepspeed train the same"),
    "num_processes": Flag("int", 1, least=1),
    "main_process_port": Flag("any", idle=_LAUNCH),
    "mixed_precision": Flag(default="bf16", choices=("no", "fp16", "bf16")),
    "rewards": Flag("any"),
    "eval_rewards": Flag("any"),
    "optimizers": Flag("any"),
    "acceleration": Flag("any", nearest="train.compile; the attention kernel is torch's"),
    "data.dataset_dir": Flag(default="data"),
    "data.datasets": Flag("list"),
    "data.image_dir": Flag(nearest="only text-to-image is trained"),
    "data.video_dir": Flag(nearest="only text-to-image is trained"),
    "data.preprocessing_batch_size": Flag("any", idle=_CACHE),
    "data.dataloader_num_workers": Flag("any", idle=_FREE),
    "data.enable_preprocess": Flag("any", idle=_CACHE),
    "data.preprocess_parallelism": Flag("any", idle=_CACHE),
    "data.force_reprocess": Flag("any", idle="posttrain cache clear empties the cache"),
    "data.cache_dir": Flag(idle=_CACHE),
    "data.max_dataset_size": Flag("int", nearest="cut the file of prompts"),
    "data.sampler_type": Flag(idle="groups are the same for any number of processes"),
    "data.sampler_subgroup_size": Flag("any", idle="groups are the same for any number of processes"),
    "model.model_name_or_path": Flag(default="black-forest-labs/FLUX.1-dev"),
    "model.model_type": Flag(default="flux1"),
    "model.finetune_type": Flag(default="full", choices=("full", "lora")),
    "model.lora_rank": Flag("int", 8, least=1),
    "model.lora_alpha": Flag("float"),
    "model.target_modules": Flag("any", "all"),
    "model.target_components": Flag(
        "any", "transformer", nearest="the transformer is trained", off=("transformer", ["transformer"])
    ),
    "model.master_weight_dtype": Flag(
        default="float32", nearest="trained weights are float32", off=("float32", "fp32")
    ),
    "model.resume_path": Flag(),
    "model.resume_type": Flag(idle="start_from takes a stage's folder or a LoRA"),
    "model.attn_backend": Flag(nearest="torch's attention kernel", off=(None, "native")),
    "log.run_name": Flag(),
    "log.project": Flag(idle="the tracker's project is the recipe's name"),
    "log.logging_backend": Flag(),
    "log.save_dir": Flag(idle=_RUN),
    "log.save_freq": Flag("int", 10),
    "log.save_model_only": Flag("any", idle="a checkpoint always holds the whole state"),
    "train.trainer_type": Flag(default="grpo"),
    "train.resolution": Flag("any", 512),
    "train.height": Flag("int", nearest="data.resolution: sampled images are square"),
    "train.width": Flag("int", nearest="data.resolution: sampled images are square"),
    "train.num_frames": Flag("int", nearest="only images are trained"),
    "train.frame_rate": Flag("float", nearest="only images are trained"),
    "train.max_epochs": Flag("int"),
    "train.per_device_batch_size": Flag(
        "int", 1, least=1, idle="a micro-batch, which changes rounding only: micro_batch: auto"
    ),
    "train.gradient_step_per_epoch": Flag("int", 2, least=1),
    "train.gradient_accumulation_steps": Flag("any", "auto"),
    "train.num_inner_epochs": Flag("int", 1, nearest="a batch is trained once", off=(1,)),
    "train.max_grad_norm": Flag("float", 1.0),
    "train.group_size": Flag("int", 1, least=1),
    "train.unique_sample_num_per_epoch": Flag("int", 8, least=1),
    "train.num_inference_steps": Flag("int", 10, least=1),
    "train.guidance_scale": Flag("float", 3.5),
    "train.ref_param_device": Flag(idle=_FREE),
    "train.seed": Flag("int", 42),
    "train.learning_rate": Flag("float", 1e-5),
    "train.adam_weight_decay": Flag("float", 1e-4),
    "train.adam_betas": Flag("list", [0.9, 0.999]),
    "train.adam_epsilon": Flag("float", 1e-8),
    "train.enable_gradient_checkpointing": Flag("any", False),
    "train.offload_samples_to_cpu": Flag("any", idle="posttrain plan says whether a batch's samples fit"),
    "train.ema_decay": Flag("float", 0.995),
    "train.ema_update_interval": Flag("int", 10),
    "train.ema_device": Flag(idle=_FREE),
    "train.ema_decay_schedule": Flag(default="power"),
    "train.flat_steps": Flag("int", 0),
    "train.ramp_rate": Flag("float"),
    "train.warmup_steps": Flag("int"),
    "train.latent_storage_dtype": Flag(idle="latents are kept in float32"),
    "train.shuffle_samples": Flag("any", idle="items are shuffled"),
    "train.reward_optimization_overlap": Flag("any", idle="rewards score while the next images are drawn"),
    "train.reward_optimization_overlap_mode": Flag(
        "any", idle="rewards score while the next images are drawn"
    ),
    "train.reward_optimization_overlap_poll_interval": Flag(
        "any", idle="rewards score while the next images are drawn"
    ),
    "train.global_std": Flag("bool", True),
    "train.advantage_aggregation": Flag(default="gdpo", choices=("sum", "gdpo")),
    "train.clip_range": Flag("any", 1e-4),
    "train.adv_clip_range": Flag("any", 5.0),
    "train.kl_type": Flag(default=None, choices=("v-based", "x-based")),
    "train.kl_beta": Flag("float", 0.0),
    "train.kl_weight": Flag(default="Uniform"),
    "train.nft_beta": Flag("float", 1.0),
    "train.off_policy": Flag("bool", False),
    "train.num_train_timesteps": Flag("int", 0),
    "train.time_sampling_strategy": Flag(default="discrete", choices=_TIMES),
    "train.time_shift": Flag("float", 3.0, idle="times are shifted as the model's sampler shifts them"),
    "train.timestep_range": Flag("any", 0.9),
    "train.awm_weighting": Flag(default="Uniform"),
    "train.ghuber_power": Flag("float", 0.25),
    "train.ema_kl_beta": Flag("float", 0.0),
    "train.beta": Flag("float", 2000.0),
    "train.weighting_scheme": Flag(default="logit_normal", choices=("logit_normal", "uniform")),
    "train.logit_mean": Flag("float", 0.0),
    "train.logit_std": Flag("float", 1.0),
    "scheduler.dynamics_type": Flag(default="Flow-SDE", choices=("Flow-SDE", "Dance-SDE", "CPS", "ODE")),
    "scheduler.noise_level": Flag("float", 0.7),
    "scheduler.num_sde_steps": Flag("int", 1, least=1),
    "scheduler.sde_steps": Flag("list"),
    "scheduler.seed": Flag("int", idle="all draws are functions of the recipe's seed"),
    "eval.resolution": Flag("any", 1024),
    "eval.height": Flag("int", nearest="evaluation.resolution: sampled images are square"),
    "eval.width": Flag("int", nearest="evaluation.resolution: sampled images are square"),
    "eval.num_frames": Flag("int", nearest="only images are trained"),
    "eval.frame_rate": Flag("float", nearest="only images are trained"),
    "eval.per_device_batch_size": Flag("int", 1),
    "eval.seed": Flag("int"),
    "eval.guidance_scale": Flag("float", 3.5),
    "eval.num_inference_steps": Flag("int", 30, least=1),
    "eval.eval_freq": Flag("int", 10),
}
OTHERS: dict[str, tuple[str, ...]] = {
    "grpo": ("train.clip_range", "scheduler.noise_level", "scheduler.num_sde_steps", "scheduler.sde_steps"),
    "times": (
        "train.num_train_timesteps", "train.time_sampling_strategy", "train.timestep_range",
    ),
    "pairs": ("train.beta", "train.weighting_scheme", "train.logit_mean", "train.logit_std"),
    "awm": ("train.awm_weighting", "train.ghuber_power", "train.ema_kl_beta", "train.kl_weight"),
    "nft": ("train.nft_beta",),
    "old": (
        "train.off_policy", "train.ema_decay_schedule", "train.flat_steps", "train.ramp_rate",
        "train.warmup_steps",
    ),
    "kl": ("train.kl_type", "train.kl_beta"),
    "ema": ("train.ema_decay", "train.ema_update_interval"),
    "online": (
        "train.group_size", "train.num_inference_steps", "train.guidance_scale", "train.global_std",
        "train.adv_clip_range", "train.advantage_aggregation", "train.gradient_step_per_epoch",
        "train.unique_sample_num_per_epoch", "scheduler.dynamics_type", "rewards", "eval_rewards",
        "log.save_freq", "eval.resolution", "eval.per_device_batch_size", "eval.seed", "eval.guidance_scale",
        "eval.num_inference_steps", "eval.eval_freq",
    ),
}  # fmt: skip
"""Settings that only some algorithms read."""
