"""Checks by their configurations that a pipeline's components fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Signature, signature
from pathlib import Path
from typing import Any

from posttrain.errors import ModelError
from posttrain.weights.files import json_object
from posttrain.weights.needed_files import NETWORK_CONFIG, class_of, config_of, listed
from posttrain.weights.pipeline_folder import INDEX, index_in
from posttrain.weights.tokenizer import encoder_of

SHIFT_BY_SIZE = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
"""What a scheduler with ``use_dynamic_shifting`` computes its shift from."""


def check_widths(transformer: Any, *parts: tuple[str, str, int, str]) -> None:
    """Raise ModelError if a component is not as wide as the ``transformer``, a configuration, takes it.

    Each of ``parts`` is a component, words for its width such as ``its width is``, the width, and the setting
    of the transformer that must be equal to it.
    """
    for part, words, width, name in parts:
        if width != transformer[name]:
            raise ModelError(
                f"{part} does not fit: {words} {width}, the transformer's {name} is {transformer[name]}"
            )


def check_settings(component: str, config: Any, known: Mapping[str, Any], words: str) -> None:
    """Raise ModelError if a setting of a component's ``config`` is not as ``known``; ``words``, such as
    ``FLUX.2 klein has``, come before the known value."""
    for name, value in known.items():
        found = config[name]
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise ModelError(f"{component}/config.json: {name} is {found}; {words} {value}")


def check_output(transformer: Any) -> None:
    """Raise ModelError if the ``transformer``, a configuration, gives other channels than it takes."""
    taken, given = transformer["in_channels"], transformer.get("out_channels")
    if given not in (None, taken):
        raise ModelError(
            f"transformer/config.json: out_channels is {given}, in_channels is {taken}; a velocity has the "
            "channels of the latents"
        )


def check_components(spec: Any, kind: Any, folder: Path) -> None:
    """Raise ModelError if the pipeline's ``folder`` lacks a component that the pipeline class ``kind`` needs,
    or has a transformer that ``kind`` does not take, or one with settings that its class does not know.
    ``spec`` is the recipe's block, a DiffusersModel.

    diffusers passes over such settings, and would draw with another network than the one that was trained:
    so an older one lost ``zero_cond_t`` of Qwen-Image-Edit-2511 (huggingface/diffusers#12889).
    """
    import diffusers

    index, content = folder / INDEX, index_in(folder)
    held = listed(content)
    needed = {*kind._get_signature_keys(kind)[0]} - {*kind._optional_components, *spec.left_out()}
    # an optional encoder that is there needs its tokenizer
    absent = {n for n in needed - held.keys() if n not in spec.optional or encoder_of(n) in held}
    for name in sorted(absent & content.keys()):
        if content[name] != [None, None]:
            raise ModelError(
                f"{str(index)!r}: {name} is {content[name]!r}; its library and its class are needed, as in "
                '["diffusers", "AutoencoderKL"]'
            )
    if absent:
        raise ModelError(
            f"{str(index)!r} names no {', '.join(sorted(absent))}, which a {kind.__name__} needs"
        )
    library, name = held["scheduler"]
    if not {*spec.flow.shifts} & {*signature(class_of(library, name, "scheduler").__init__).parameters}:
        raise ModelError(f"{str(index)!r}: the scheduler's class is {name}; {_no_shift(spec.flow.shifts)}")
    file = folder / "scheduler" / config_of(name)
    settings = json_object(file.read_bytes(), file)
    if not {*spec.flow.shifts} & settings.keys():  # diffusers would take its default, and tell nobody
        raise ModelError(
            f"{str(file)!r} has no {' and no '.join(spec.flow.shifts)}, which says how far sigmas are shifted"
        )
    file = folder / "transformer" / NETWORK_CONFIG
    config, (library, name) = json_object(file.read_bytes(), file), held["transformer"]
    own, taken = class_of(library, name, "transformer"), kind._get_signature_types()["transformer"]
    for place, named in (
        (f"{str(index)!r}: the transformer's class", name),
        (f"{str(file)!r}: _class_name", config.get("_class_name", name)),
    ):
        found = getattr(diffusers, str(named), own)
        if Signature.empty not in taken and not issubclass(found, taken):
            raise ModelError(f"{place} is {named}; a {kind.__name__} has a {taken[0].__name__}")
    known = {*signature(own.__init__).parameters, *spec.unread}
    for setting, value in config.items():
        if not setting.startswith("_") and setting not in known and value not in (None, False):
            raise ModelError(
                f"{str(file)!r}: {setting} is {value!r}, and {name} of diffusers {diffusers.__version__} "
                "has no such setting: install a newer one, or remove it if it changes nothing"
            )


def check_rope(transformer: Any, axes: str) -> None:
    """Raise ModelError if the widths ``axes`` of a ``transformer``'s rotary positions, a setting of its
    configuration, do not add up to the width of a head."""
    width, parts = transformer["attention_head_dim"], [*transformer[axes]]
    if sum(parts) != width:
        raise ModelError(
            f"transformer/config.json: {axes} is {parts}, together {sum(parts)}, but attention_head_dim is "
            f"{width}"
        )


def check_scale(vae: Any) -> None:
    """Raise ModelError if an autoencoder's configuration does not say by what its latents are multiplied."""
    scale = vae.get("scaling_factor")
    if not _is_number(scale) or scale <= 0:
        raise ModelError(f"vae/config.json: scaling_factor is {scale!r}; a number above 0 is needed")


def _no_shift(shifts: Sequence[str]) -> str:
    names = " or ".join(shifts)
    return f"rectified flow needs one with {names}, such as FlowMatchEulerDiscreteScheduler"


def check_scheduler(scheduler: Any, shifts: Sequence[str]) -> None:
    """Raise ModelError if the sigmas of a ``scheduler`` are no shift of a uniform grid: training draws from a
    shift, and would learn other noise levels than those at which images are sampled. ``shifts`` are the
    settings of which it must have one."""
    config, file = scheduler.config, "scheduler/scheduler_config.json"
    if not {*shifts} & {*config}:
        raise ModelError(f"{file}: it is for a {type(scheduler).__name__}; {_no_shift(shifts)}")
    for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
        if config.get(name):
            raise ModelError(
                f"{file}: {name} is true; sigmas must be a uniform grid that is shifted, as without it"
            )
    dynamic = SHIFT_BY_SIZE if config.get("use_dynamic_shifting") else ()
    for name in (*shifts, *dynamic):
        if name in config and not _is_number(config[name]):
            raise ModelError(f"{file}: {name} is {config[name]!r}; a number is needed")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
