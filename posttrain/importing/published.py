"""The published configurations of Flow-GRPO and DiffusionNFT, as facts: values, and the number of GPUs.

Sources: github.com/yifan123/flow_grpo, config/grpo.py at 31c71b9; config/nft.py of DiffusionNFT, in copies
(see :mod:`posttrain.importing.diffusion_nft`). Read on 2026-11-27. Editing, video and Bagel are left out.
"""

from __future__ import annotations

from typing import Any

SD3 = "stabilityai/stable-diffusion-3.5-medium"
FLUX = "black-forest-labs/FLUX.1-dev"
QWEN = "Qwen/Qwen-Image"
Published = tuple[int, dict[str, Any]]
"""Number of GPUs, and the values that differ from the trainer's defaults."""


def _grpo(gpus: int, each: int, group: int, groups: int, task: str, reward: str, **more: Any) -> Published:
    """``groups`` groups of ``group`` images, sampled by ``gpus`` GPUs, ``each`` at a time; two updates."""
    batches = groups * group // (gpus * each)
    values = {
        "pretrained.model": SD3,
        "dataset": f"dataset/{task}",
        "resolution": 512,
        "sample.num_steps": 10,
        "sample.train_batch_size": each,
        "sample.num_image_per_prompt": group,
        "sample.num_batches_per_epoch": batches,
        "sample.test_batch_size": 14 if task == "geneval" else 16,
        "train.batch_size": each,
        "train.gradient_accumulation_steps": batches // 2,
        "train.timestep_fraction": 0.99,
        "train.ema": True,
        "save_freq": 60,
        "eval_freq": 60,
        "prompt_fn": "geneval" if task == "geneval" else "general_ocr",
        "reward_fn": {reward: 1.0},
    }
    return gpus, {**values, **{name.replace("__", "."): value for name, value in more.items()}}


_FAST: dict[str, Any] = {
    "train__timestep_fraction": 1.0,
    "train__clip_range": 1e-5,
    "train__beta": 0.0,
    "sample__noise_level": 0.8,
    "sample__sde_window_size": 3,
    "sample__sde_type": "cps",
}
_NO_GUIDANCE: dict[str, Any] = {
    "sample__guidance_scale": 1.0,
    "sample__eval_guidance_scale": 1.0,
    "train__cfg": False,
    "sample__sde_window_range": [0, 5],
}
_FLUX: dict[str, Any] = {
    "pretrained__model": FLUX,
    "sample__num_steps": 6,
    "sample__eval_num_steps": 28,
    "sample__guidance_scale": 3.5,
    "sample__noise_level": 0.9,
    "mixed_precision": "bf16",
    "train__beta": 0.0,
    "save_freq": 30,
    "eval_freq": 30,
}
_FLUX_FAST = {**_FLUX, **_FAST, "sample__eval_guidance_scale": 3.5, "sample__sde_window_range": [0, 3]}
_QWEN: dict[str, Any] = {
    "pretrained__model": QWEN,
    "sample__eval_num_steps": 50,
    "sample__guidance_scale": 4.0,
    "sample__noise_level": 1.2,
    "sample__sde_window_size": 2,
    "sample__sde_window_range": [0, 5],
    "sample__test_batch_size": 4,
    "train__timestep_fraction": 1.0,
    "train__beta": 0.0,
    "train__ema": False,
    "mixed_precision": "bf16",
    "activation_checkpointing": True,
    "fsdp_optimizer_offload": True,
    "save_freq": 30,
    "eval_freq": 30,
}

FLOW_GRPO: dict[str, Published] = {
    "general_ocr_sd3": _grpo(32, 9, 24, 48, "ocr", "ocr", train__beta=0.04, save_dir="logs/ocr/sd3.5-M"),
    "geneval_sd3": _grpo(
        32, 9, 24, 48, "geneval", "geneval", train__beta=0.04, save_dir="logs/geneval/sd3.5-M"
    ),
    "pickscore_sd3": _grpo(
        32, 9, 24, 48, "pickscore", "pickscore", train__beta=0.01, save_dir="logs/pickscore/sd3.5-M"
    ),
    "clipscore_sd3": _grpo(
        32, 9, 24, 48, "pickscore", "clipscore", train__beta=0.02, sample__same_latent=True,
        save_dir="logs/clipscore/sd3.5-M",
    ),
    "general_ocr_sd3_4gpu": _grpo(4, 8, 16, 16, "ocr", "ocr", train__beta=0.04, save_dir="logs/ocr/sd3.5-M"),
    "pickscore_sd3_4gpu": _grpo(
        4, 8, 16, 16, "pickscore", "pickscore", train__beta=0.01, save_dir="logs/pickscore/sd3.5-M"
    ),
    "general_ocr_sd3_1gpu": _grpo(1, 8, 8, 8, "ocr", "ocr", train__beta=0.04, save_dir="logs/ocr/sd3.5-M"),
    "geneval_sd3_fast_nocfg": _grpo(
        32, 9, 24, 48, "geneval", "geneval", **_FAST, **_NO_GUIDANCE,
        save_dir="logs/geneval/sd3.5-M-fast-nocfg",
    ),
    "pickscore_sd3_fast_nocfg": _grpo(
        32, 9, 18, 64, "pickscore", "pickscore", **_FAST, **_NO_GUIDANCE,
        save_dir="logs/geneval/sd3.5-M-fast-nocfg",
    ),
    "pickscore_flux": _grpo(
        32, 3, 24, 48, "pickscore", "pickscore", **_FLUX, save_dir="logs/pickscore/flux-group24"
    ),
    "pickscore_flux_8gpu": _grpo(
        8, 3, 24, 48, "pickscore", "pickscore", **_FLUX, save_dir="logs/pickscore/flux-group24-8gpu"
    ),
    "geneval_flux_fast": _grpo(
        32, 3, 24, 48, "geneval", "geneval", **_FLUX_FAST, save_dir="logs/geneval/flux_fast"
    ),
    "pickscore_flux_fast": _grpo(
        32, 3, 24, 48, "pickscore", "pickscore", **_FLUX_FAST, sample__global_std=False,
        save_dir="logs/pickscore/flux-fast",
    ),
    "pickscore_qwenimage": _grpo(
        32, 4, 16, 32, "pickscore", "pickscore", **_QWEN, save_dir="logs/pickscore/qwenimage"
    ),
    "pickscore_qwenimage_8gpu": _grpo(
        8, 4, 16, 32, "pickscore", "pickscore", **_QWEN, save_dir="logs/pickscore/qwenimage"
    ),
}  # fmt: skip


def _nft(name: str, task: str, rewards: tuple[str, ...], updates: int = 1, **more: Any) -> Published:
    values = {
        "pretrained.model": SD3,
        "dataset": f"dataset/{task}",
        "resolution": 512,
        "run_name": f"nft_sd3_{name}",
        "save_dir": f"logs/nft/sd3/{name}",
        "sample.num_steps": 10,
        "sample.guidance_scale": 1.0,
        "sample.noise_level": 0.7,
        "sample.solver": "dpm2",
        "sample.deterministic": True,
        "sample.train_batch_size": 9,
        "sample.num_image_per_prompt": 24,
        "sample.num_batches_per_epoch": 16,
        "sample.test_batch_size": 14 if task == "geneval" else 16,
        "train.batch_size": 9,
        "train.gradient_accumulation_steps": 16 // updates,
        "prompt_fn": "geneval" if task == "geneval" else "general_ocr",
        "reward_fn": dict.fromkeys(rewards, 1.0),
    }
    return 8, {**values, **{name.replace("__", "."): value for name, value in more.items()}}


DIFFUSION_NFT: dict[str, Published] = {
    "sd3_ocr": _nft("ocr", "ocr", ("ocr",), 2, beta=0.1, decay_type=2),
    "sd3_geneval": _nft("geneval", "geneval", ("geneval",)),
    "sd3_pickscore": _nft("pickscore", "pickscore", ("pickscore",)),
    "sd3_hpsv2": _nft("hpsv2", "pickscore", ("hpsv2",)),
    "sd3_multi_reward": _nft(
        "multi_reward", "pickscore", ("pickscore", "hpsv2", "clipscore"), sample__num_steps=25, beta=0.1
    ),
}
