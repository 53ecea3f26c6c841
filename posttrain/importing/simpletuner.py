"""SimpleTuner's options (github.com/bghira/SimpleTuner), as flags, config.json or config.env.

The table and its sources are in :mod:`posttrain.importing.simpletuner_flags`.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from posttrain.errors import PosttrainError
from posttrain.importing.diffusers_flags import put_head
from posttrain.importing.draft import Draft
from posttrain.importing.flags import Settings
from posttrain.importing.models import as_path, put_model, put_precision
from posttrain.importing.simpletuner_data import put_data
from posttrain.importing.simpletuner_files import SCRIPTS, from_env_file, from_json, opened
from posttrain.importing.simpletuner_flags import TABLE
from posttrain.importing.simpletuner_training import put_train
from posttrain.importing.trainer import Start, Trainer

MODELS = {
    "sd3": "sd3", "flux": "flux", "flux2": "flux2_klein", "sana": "sana", "qwen_image": "qwen_image",
    "z_image": "z_image", "auraflow": "diffusers", "lumina2": "diffusers",
}  # fmt: skip
"""Family -> our type."""
FLAVOURS = {
    "sd3": {
        "medium": "stabilityai/stable-diffusion-3.5-medium",
        "large": "stabilityai/stable-diffusion-3.5-large",
    },
    "flux": {"dev": "black-forest-labs/FLUX.1-dev", "schnell": "black-forest-labs/FLUX.1-schnell"},
}
"""Family -> the weights of each flavour, the default first."""
LORA = ("lora_type", "lora_rank", "lora_alpha", "lora_init_type", "init_lora", "base_model_precision")
"""Options that only a LoRA has."""
DIFFERS = (
    "latents are drawn anew in each step; there encoded latents are cached and read in each epoch",
    "a step's times are drawn for each sample; there from a segment of the schedule for each of the batch",
    "an image comes once in an epoch; repeats and probabilities of data sets are a column weight in the list",
    "trained weights and AdamW's moments are float32; adamw_bf16 trains weights in bf16",
)


def build(s: Settings, d: Draft, start: Start) -> None:
    """Write the recipe of the options ``s``. Raises PosttrainError."""
    put_head(d, "simpletuner")
    if s["seed"] is not None and s["seed"] >= 0:
        d.put("seed", s["seed"], "seed")
    else:
        d.idle["seed"] = "it is no seed; the recipe has one of its own"
    if s["disable_tf32"]:
        d.put("tf32", False, "disable_tf32")
        d.idle["allow_tf32"] = "disable_tf32 says it"
    else:
        d.put("tf32", s["allow_tf32"], "allow_tf32")
        d.idle["disable_tf32"] = "off, as here"
    _model(s, d)
    d.put("stage.name", "sft")
    _tuning(s, d)
    _algorithm(s, d)
    put_data(s, d, start.file)
    put_train(s, d, start.processes or 1)
    d.differs += DIFFERS


def _model(s: Settings, d: Draft) -> None:
    family = s.needed("model_family")
    if family not in MODELS:
        raise s.refused("model_family", f"posttrain trains {', '.join(MODELS)} of SimpleTuner's families")
    if s["pretrained_model_name_or_path"] is None:
        flavours = FLAVOURS.get(family, {})
        flavour = s["model_flavour"] or next(iter(flavours), None)
        if flavour not in flavours:
            words = f"name the model: --pretrained_model_name_or_path (of {family})"
            raise PosttrainError(f"SimpleTuner: {words}")
        flag = "model_flavour" if s["model_flavour"] else "model_family"
        d.put("model.path", flavours[flavour], flag)
        if s["revision"]:
            d.put("model.revision", s["revision"], "revision")
    else:
        put_model(d, "pretrained_model_name_or_path", "revision", MODELS[family])
        d.idle["model_flavour"] = "the path names the model"
    d.put("model.type", MODELS[family], "model_family")
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
        d.idle |= dict.fromkeys(LORA, "all weights are trained")
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
        words = "posttrain draws the matrix A as default or gaussian"
        d.near("stage.tune.init", "default", "lora_init_type", words)
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
        words = f"{near} is what comes nearest to {precision}"
        d.near("stage.tune.base", near, "base_model_precision", words)


def _folder(path: str) -> str:
    """What ``start_from`` has for a LoRA: the folder of a file, or a folder or hub name as it is."""
    if PurePosixPath(path).suffix not in (".safetensors", ".bin", ".pt", ".pth"):
        return as_path(path)
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


TRAINER = Trainer(
    "SimpleTuner",
    "--",
    SCRIPTS,
    TABLE,
    build,
    files={".json": from_json, ".env": from_env_file},
    opened=opened,
)
