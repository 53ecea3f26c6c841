"""SimpleTuner's options (github.com/bghira/SimpleTuner), as flags, config.json or config.env.

The table and its sources are in :mod:`posttrain.importing.simpletuner_flags`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from posttrain.errors import PosttrainError
from posttrain.importing.draft import Draft, value_of
from posttrain.importing.flags import Settings
from posttrain.importing.models import named, put_model, put_precision, put_tracker
from posttrain.importing.simpletuner_files import from_environment, from_json
from posttrain.importing.simpletuner_flags import TABLE
from posttrain.importing.simpletuner_training import put_training

__all__ = ["NAME", "PREFIX", "SCRIPTS", "TABLE", "build", "from_environment", "from_json"]

NAME, PREFIX = "simpletuner", "--"
SCRIPTS = re.compile(r"(^|/)train(\.py|\.sh)?$|simpletuner$")
MODELS = {
    "sd3": (
        "sd3",
        {
            "medium": "stabilityai/stable-diffusion-3.5-medium",
            "large": "stabilityai/stable-diffusion-3.5-large",
        },
    ),
    "flux": ("flux", {"dev": "black-forest-labs/FLUX.1-dev", "schnell": "black-forest-labs/FLUX.1-schnell"}),
    "flux2": ("flux2_klein", {}),
    "sana": ("sana", {}),
    "qwen_image": ("qwen_image", {}),
    "z_image": ("z_image", {}),
    "auraflow": ("diffusers", {}),
    "lumina2": ("diffusers", {}),
}
"""Family -> our type, and the weights of each flavour, the default first."""
READ = {
    "id", "type", "dataset_type", "disabled", "instance_data_dir", "dataset_name", "split",
    "caption_strategy", "resolution", "resolution_type",
}  # fmt: skip
"""Keys of a data set that are read."""
CACHES = ("cache_", "preserve_data_backend_cache", "text_embeds", "image_embeds", "write_batch_size")
DIFFERS = (
    "latents are drawn anew in each step; there encoded latents are cached and read in each epoch",
    "a step's times are drawn for each sample; there from a segment of the schedule for each of the batch",
    "an image comes once in an epoch; repeats and probabilities of data sets are a column weight in the list",
    "trained weights and AdamW's moments are float32; adamw_bf16 trains weights in bf16",
)


def build(s: Settings, d: Draft, script: str, processes: int | None, near: Path | None = None) -> None:
    """Write the recipe of the options ``s``, which are from the file ``near``. Raises PosttrainError."""
    del script
    d.put("name", named(PurePosixPath(s["output_dir"] or "").name, "simpletuner"), "output_dir")
    if s["seed"] is not None and s["seed"] >= 0:
        d.put("seed", s["seed"], "seed")
    d.put(
        "tf32",
        s["allow_tf32"] and not s["disable_tf32"],
        "disable_tf32" if s["disable_tf32"] else "allow_tf32",
    )
    if not s["disable_tf32"]:
        d.idle["disable_tf32"] = "off, as here"
    put_tracker(d, "report_to")
    _model(s, d)
    d.put("stage.name", "sft")
    _tuning(s, d)
    _algorithm(s, d)
    _data(s, d, near)
    put_training(s, d, processes or s["num_processes"] * s["num_machines"])
    d.differs += DIFFERS


def _model(s: Settings, d: Draft) -> None:
    family = s.needed("model_family")
    if family not in MODELS:
        raise s.refused("model_family", f"posttrain trains {', '.join(MODELS)} of SimpleTuner's families")
    kind, flavours = MODELS[family]
    if s["pretrained_model_name_or_path"] is None:
        flavour = s["model_flavour"] or next(iter(flavours), None)
        if flavour not in flavours:
            raise PosttrainError(
                f"SimpleTuner: name the model: --pretrained_model_name_or_path (of {family})"
            )
        d.put("model.type", kind, "model_family")
        d.put(
            "model.path", flavours[flavour], *(["model_flavour"] if s["model_flavour"] else ["model_family"])
        )
        if s["revision"]:
            d.put("model.revision", s["revision"], "revision")
    else:
        put_model(d, "pretrained_model_name_or_path", "revision", kind)
        d.put("model.type", kind, "model_family")
        d.idle["model_flavour"] = "the path names the model"
    if s["mixed_precision"] == "fp8":
        d.near("stage.train.precision", "bf16", "mixed_precision", "posttrain computes in bf16 or fp32")
        d.put("model.dtype", "bf16")
    else:
        put_precision(d, "mixed_precision")
    if s["tokenizer_max_length"] is not None:
        d.put("model.max_sequence_length", s["tokenizer_max_length"], "tokenizer_max_length")


def _tuning(s: Settings, d: Draft) -> None:
    if s["model_type"] == "full":
        d.put("stage.tune.type", "full", "model_type")
        for name in (
            "lora_type",
            "lora_rank",
            "lora_alpha",
            "lora_init_type",
            "init_lora",
            "base_model_precision",
        ):
            d.idle[name] = "all weights are trained"
        return
    d.put("stage.tune.type", "lora", "model_type")
    if s["lora_type"] == "lycoris":
        d.lost["lora_type"] = "posttrain trains LoRAs, not LoKr or LoHa: rank and alpha are those of a LoRA"
    else:
        d.idle["lora_type"] = "a LoRA, as here"
    d.put("stage.tune.rank", s["lora_rank"], "lora_rank")
    alpha = s["lora_rank"] if s["lora_alpha"] is None else s["lora_alpha"]
    d.put("stage.tune.alpha", alpha, "lora_alpha")
    if s["lora_init_type"] in ("default", "gaussian"):
        d.put("stage.tune.init", s["lora_init_type"], "lora_init_type")
    else:
        d.near("stage.tune.init", "default", "lora_init_type", "A is drawn gaussian or default")
    if s["init_lora"]:
        d.put("stage.start_from", _folder(str(s["init_lora"])), "init_lora")
        d.differs.append(
            "init_lora: the LoRA is merged and a new one begins; tune.before: stack keeps it beside"
        )
    precision = str(s["base_model_precision"])
    if precision == "no_change":
        d.idle["base_model_precision"] = "the frozen weights have model.dtype"
    elif precision.startswith("int8") or "nf4" in precision:
        d.put("stage.tune.base", "nf4" if "nf4" in precision else "int8", "base_model_precision")
        d.differs.append(f"{precision}: int8 and nf4 are bitsandbytes' formats here, so the rounding differs")
    else:
        near = "nf4" if "4" in precision or "2" in precision else "int8"
        d.near(
            "stage.tune.base", near, "base_model_precision", f"{near} is what comes nearest to {precision}"
        )


def _folder(path: str) -> str:
    """What ``start_from`` has for a LoRA: the folder of a file, or a folder or hub name as it is."""
    if PurePosixPath(path).suffix not in (".safetensors", ".bin", ".pt", ".pth"):
        return path if "/" in path else f"./{path}"
    folder = str(PurePosixPath(path).parent)
    return "./" if folder == "." else folder if folder.startswith(("/", "~", "..")) else f"./{folder}"


def _algorithm(s: Settings, d: Draft) -> None:
    d.put("stage.algorithm.type", "sft")
    if s["flow_use_uniform_schedule"]:
        d.put("stage.algorithm.weighting_scheme", "none", "flow_use_uniform_schedule")
        d.idle["flow_sigmoid_scale"] = "times are uniform"
    else:
        d.put("stage.algorithm.weighting_scheme", "logit_normal", note="its sigmoid of a normal number")
        d.put("stage.algorithm.logit_std", s["flow_sigmoid_scale"], "flow_sigmoid_scale")
        d.idle["flow_use_uniform_schedule"] = "off, as here"
    d.put("stage.algorithm.cond_dropout", s["caption_dropout_probability"], "caption_dropout_probability")
    words = (
        "sigma is shifted as the model's own scheduler does (3 for Stable Diffusion 3.5, by size for FLUX.1)"
    )
    if s["model_family"] == "sd3" and s["flow_schedule_shift"] == 3 and not s["flow_schedule_auto_shift"]:
        d.idle["flow_schedule_shift"] = "3 is the model's own shift"
        d.idle["flow_schedule_auto_shift"] = "off, as here"
        return
    d.lost["flow_schedule_shift"] = words
    if s["flow_schedule_auto_shift"]:
        d.lost["flow_schedule_auto_shift"] = words
    else:
        d.idle["flow_schedule_auto_shift"] = "the shift is the model's own"
    if "flow_schedule_shift" not in s:
        d.differs.append(f"flow_schedule_shift is {s['flow_schedule_shift']:g} there by default: {words}")


def _data(s: Settings, d: Draft, near: Path | None) -> None:
    block = _backend(s, d, near)
    flag = "data_backend_config"
    folder = block.get("instance_data_dir") or block.get("dataset_name")
    if folder is None:
        d.put(
            "stage.data.images", "my-images", note="yours: a folder of images with .txt captions, or a list"
        )
        d.lost[flag] = "the file was not found, or names no folder of images: set data.images"
    else:
        d.put("stage.data.images", str(folder), flag)
        if block.get("type") == "huggingface":
            d.put("stage.data.split", str(block.get("split", "train")), flag)
    strategy = block.get("caption_strategy", s["caption_strategy"])
    if strategy in ("textfile", "parquet"):
        d.idle["caption_strategy"] = "captions are found beside the images or in the table"
    else:
        name = "caption_strategy" if "caption_strategy" in s else flag
        d.lost[name] = f"caption_strategy {strategy}: give captions in .txt files or a column (docs: Data)"
    kind = block.get("resolution_type", s["resolution_type"])
    side = s.number(flag, block.get("resolution", s["resolution"]))
    if side <= 0:
        raise s.refused(flag if "resolution" in block else "resolution", "a number above 0")
    pixels = round((side * 1e6) ** 0.5 / 64) * 64 if kind == "area" else round(side)
    names = [flag] if "resolution" in block else ["resolution"]
    d.put("stage.data.resolution", pixels, *names, note="megapixels" if kind == "area" else "")
    if kind == "pixel":
        d.lost["resolution_type"] = (
            "resolution is the area of a bucket, not the length of an image's shorter side"
        )
    else:
        d.idle["resolution_type"] = "the area of a bucket, as here"
    if block.get("crop", False) and block.get("crop_style") in ("center", "centre"):
        d.put("stage.data.crop", "center", flag)
        used = {*READ, "crop", "crop_style"}
    else:
        used = {*READ, "crop"} if not block.get("crop", False) else READ
    name = block.get("id", "the first data set")
    for key in [key for key in block if key not in used]:
        cache = str(key).startswith(CACHES)
        told = d.more_idle if cache else d.more_lost
        words = "encodings are cached by the recipe's cache" if cache else "import-flags does not read it"
        told.append((f"--{flag}: {name}: {key}{value_of(block[key])}", words))


def _backend(s: Settings, d: Draft, near: Path | None) -> dict[str, Any]:
    """The first image data set of the file ``data_backend_config``; empty if there is no such file."""
    if not (path := s["data_backend_config"]):
        return {}
    roots = [Path(), *(near.absolute().parents if near is not None else ())]
    file = next((root / path for root in roots if (root / path).is_file()), None)
    if file is None:
        return {}
    try:
        blocks = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise PosttrainError(f"{file} is not valid JSON: {error}") from None
    found: dict[str, Any] = {}
    for number, block in enumerate(blocks if isinstance(blocks, list) else [], 1):
        kind = block.get("dataset_type", "image") if isinstance(block, dict) else "no block"
        off = isinstance(block, dict) and block.get("disabled")
        if kind == "image" and not off and not found:
            found = block
            continue
        name = block.get("id", number) if isinstance(block, dict) else number
        shown = f"--data_backend_config: {name}"
        if off or kind in ("text_embeds", "image_embeds"):
            d.more_idle.append((shown, "it is disabled" if off else "the recipe's cache keeps encodings"))
        else:
            d.more_lost.append((shown, "a stage has one list of images: join the data sets in it"))
    return found
