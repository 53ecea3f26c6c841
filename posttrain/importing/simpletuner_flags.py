"""The table of SimpleTuner's options.

Read on 2026-11-27 in github.com/bghira/SimpleTuner: the sections of
simpletuner_sdk/server/services/field_registry (optimizer at 0e24e46, training at 03b3fcb, lora and loss as
stored), documentation/OPTIONS.md at 0077465.
"""

from __future__ import annotations

from posttrain.importing.diffusers_flags import COMMON
from posttrain.importing.flags import Flag

IDLE = {
    "a run writes to runs/NAME, and the same command goes on with it": (
        "resume_from_checkpoint logging_dir tracker_project_name tracker_run_name tracker_image_layout"
    ),
    "posttrain export RUN --to DIR --push-to-hub REPO uploads what a stage wrote": (
        "push_to_hub push_to_hub_background push_checkpoints_to_hub hub_model_id model_card_private "
        "model_card_safe_for_work model_card_note publishing_config"
    ),
    "cache: {prompts: true, latents: mean_logvar} keeps encodings": (
        "cache_dir cache_dir_text cache_dir_vae compress_disk_cache vae_cache_scan_behaviour "
        "vae_cache_ondemand vae_cache_disable vae_batch_size preserve_data_backend_cache"
    ),
    "buckets are made from the images' sizes: data.resolution is their area": (
        "aspect_bucket_rounding aspect_bucket_alignment disable_bucket_pruning minimum_image_size "
        "maximum_image_size target_downsample_size aspect_bucket_worker_count aspect_bucket_disable_rebuild "
        "allow_dataset_oversubscription"
    ),
    "it changes speed or memory, not results": (
        "max_workers read_batch_size write_batch_size image_processing_batch_size set_grads_to_none "
        "quantize_via ema_device ema_cpu_only ema_foreach_disable fuse_qkv_projections attention_mechanism "
        "vae_enable_tiling vae_enable_slicing offload_during_startup offload_during_save keep_vae_loaded "
        "gradient_checkpointing_interval gradient_checkpointing_backend"
    ),
    "it is a setting of the storage, the cache or the interface": (
        "torch_num_threads aws_max_pool_connections metadata_update_interval enable_multiprocessing "
        "dataloader_prefetch dataloader_prefetch_qlen skip_file_discovery webhook_config "
        "webhook_reporting_interval print_filenames print_sampler_statistics override_dataset_config "
        "accelerate_config accelerate_extra_args disable_benchmark"
    ),
    "model.dtype is that of mixed_precision": "base_model_default_dtype",
    "evaluation draws by Euler or DPM-Solver++ with an empty negative prompt": (
        "validation_torch_compile validation_disable validation_randomize num_validation_images "
        "validation_seed_source validation_on_startup validation_noise_scheduler validation_negative_prompt "
        "validation_disable_unconditional validation_guidance_rescale validation_guidance_real "
        "validation_no_cfg_until_timestep validation_guidance_skip_layers "
        "validation_guidance_skip_layers_start validation_guidance_skip_layers_stop "
        "validation_guidance_skip_scale"
    ),
    "it is for models that are no flows": (
        "inference_scheduler_timestep_spacing training_scheduler_timestep_spacing snr_gamma use_soft_min_snr "
        "rescale_betas_zero_snr"
    ),
    "the model is a flow": "prediction_type",
    "posttrain finds the weights, and the VAE is in float32": "variant vae_dtype",
    "times are drawn singly for each sample": "disable_segmented_timestep_sampling",
    "train.steps says how long it trains": "ignore_final_epochs",
    "posttrain deletes no image; data.tolerance": "delete_problematic_images delete_unwanted_images",
    "there is nothing to switch": "i_know_what_i_am_doing framerate enable_watermark",
    "the empty prompt is encoded as any other": (
        "t5_padding sd3_clip_uncond_behaviour sd3_t5_uncond_behaviour"
    ),
}
"""Why a recipe needs nothing of them -> options."""
NEAREST = {
    "model.offload, and what posttrain plan proposes": "enable_group_offload ramtorch musubi_blocks_to_swap",
    "monitor": "num_eval_images eval_steps_interval eval_epoch_interval eval_dataset_id",
    "posttrain eval MODEL --suite NAME": "validation_prompt_library",
    "it has no counterpart": (
        "controlnet control masked_loss_probability train_text_encoder text_encoder_lr refiner_training "
        "layer_freeze_strategy tread_config crepa_enabled distillation_method"
    ),
    "the noise is Gaussian, the same in training and sampling": (
        "noise_offset input_perturbation offset_noise"
    ),
    "the algorithms soar and reflexflow": "scheduled_sampling_max_step_offset scheduled_sampling_probability",
    "algorithm.weighting_scheme": "flow_use_beta_schedule flux_fast_schedule timestep_bias_strategy",
    "model.train_guidance of type flux": "flux_guidance_mode flux_guidance_value",
    "schedule: cosine or linear, which end at 0": "lr_end lr_power lr_num_cycles",
    "checkpoint_every and sample_every count steps": "checkpoint_epoch_interval validation_epoch_interval",
    "captions beside the images": "instance_prompt only_instance_prompt prepend_instance_prompt",
    "a column weight in the list of images": "data_backend_sampling",
}
"""What comes nearest to options that have no counterpart -> the options."""
_OFF = (None, "no_change")
_LORA = (None, False, "standard")
_ADAPTERS = "lycoris_config init_lokr_norm use_dora peft_lora_mode singlora_ramp_up_steps"

TABLE: dict[str, Flag] = {
    **COMMON,
    "model_type": Flag(default="lora", choices=("lora", "full")),
    "model_family": Flag(),
    "model_flavour": Flag(),
    "output_dir": Flag(default="output/models"),
    "resolution": Flag("float", 1024.0),
    "resolution_type": Flag(default="pixel_area", choices=("pixel", "area", "pixel_area")),
    "data_backend_config": Flag(),
    "caption_strategy": Flag(default="textfile"),
    "caption_dropout_probability": Flag("float", 0.0),
    "tokenizer_max_length": Flag("int"),
    "max_train_steps": Flag("int", 0),
    "num_processes": Flag("int", 1, least=1),
    "num_machines": Flag("int", 1, idle="num_processes counts those of all machines, as for accelerate"),
    "learning_rate": Flag("float", 4e-7),
    "lr_scheduler": Flag(default="constant_with_warmup"),
    "lr_scale": Flag("bool", False),
    "lr_scale_sqrt": Flag("bool", False),
    "optimizer": Flag(default="adamw_bf16"),
    "optimizer_config": Flag(),
    "optimizer_beta1": Flag("float"),
    "optimizer_beta2": Flag("float"),
    "adam_weight_decay": Flag("float", 1e-2),
    "max_grad_norm": Flag("float", 2.0),
    "grad_clip_method": Flag(default="value", choices=("value", "norm")),
    "gradient_checkpointing": Flag("bool", True),
    "mixed_precision": Flag(default="bf16", choices=("no", "fp16", "bf16", "fp8")),
    "base_model_precision": Flag(default="no_change"),
    "allow_tf32": Flag("bool", True),
    "disable_tf32": Flag("bool", False),
    "use_ema": Flag("bool", False),
    "ema_decay": Flag("float", 0.995),
    "ema_update_interval": Flag("int", nearest="the EMA moves with each step", off=(None, 1)),
    "lora_type": Flag(default="standard", choices=("standard", "lycoris")),
    "lora_rank": Flag("int", 16, least=1),
    "lora_alpha": Flag("float"),
    "lora_init_type": Flag(default="default"),
    "lora_dropout": Flag("float", nearest="cond_dropout drops captions; a LoRA has no dropout"),
    "init_lora": Flag(),
    "flow_schedule_shift": Flag("float", 3.0),
    "flow_schedule_auto_shift": Flag("bool", False),
    "flow_sigmoid_scale": Flag("float", 1.0),
    "flow_use_uniform_schedule": Flag("bool", False),
    "checkpointing_steps": Flag("int"),
    "checkpoint_step_interval": Flag("int", 500),
    "checkpoints_total_limit": Flag("int", 5),
    "report_to": Flag(default="wandb"),
    "dynamo_backend": Flag(default="no"),
    "validation_step_interval": Flag("int"),
    "validation_steps": Flag("int"),
    "validation_prompt": Flag(nearest="a file with the prompt: evaluation.prompts, which also needs rewards"),
    "user_prompt_library": Flag(nearest="a file of prompts: evaluation.prompts, which also needs rewards"),
    "validation_guidance": Flag("float", nearest="evaluation.guidance"),
    "validation_num_inference_steps": Flag("int", nearest="evaluation.steps"),
    "validation_resolution": Flag(nearest="evaluation.resolution"),
    "validation_seed": Flag("int", nearest="evaluation.seed"),
    "evaluation_type": Flag(nearest="evaluation.rewards: [clipscore]"),
    "flux_lora_target": Flag(
        "any",
        nearest="tune.targets, endings of names; by default attention's projections, as all",
        off=(None, "all"),
    ),
    "loss_type": Flag("any", nearest="the squared error", off=(None, "l2")),
    **{
        f"text_encoder_{n}_precision": Flag("any", nearest="model.dtype or model.offload", off=_OFF)
        for n in range(1, 5)
    },
    **{name: Flag("any", nearest="a LoRA", off=_LORA) for name in _ADAPTERS.split()},
    **{name: Flag("any", idle=why) for why, names in IDLE.items() for name in names.split()},
    **{name: Flag("any", nearest=what) for what, names in NEAREST.items() for name in names.split()},
}
