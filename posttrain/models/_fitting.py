"""Checks by their configurations that a pipeline's components fit together."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Signature, signature
from pathlib import Path
from typing import Any

from posttrain.errors import ModelError
from posttrain.weights.files import json_object
from posttrain.weights.needed_files import NETWORK_CONFIG, class_of, listed
from posttrain.weights.pipeline_folder import INDEX, index_in
from posttrain.weights.tokenizer import encoder_of


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

    index, held = folder / INDEX, listed(index_in(folder))
    needed = {*kind._get_signature_keys(kind)[0]} - {*kind._optional_components, *spec.left_out()}
    # an optional encoder that is there needs its tokenizer
    absent = {n for n in needed - held.keys() if n not in spec.optional or encoder_of(n) in held}
    if absent:
        raise ModelError(
            f"{str(index)!r} names no {', '.join(sorted(absent))}, which a {kind.__name__} needs"
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


def check_scheduler(config: Any) -> None:
    """Raise ModelError if the scheduler's sigmas are no shift of a uniform grid: training draws from a shift,
    and would learn other noise levels than those at which images are sampled."""
    for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
        if config.get(name):
            raise ModelError(
                f"scheduler/scheduler_config.json: {name} is true; sigmas must be a uniform grid that is "
                "shifted, as without it"
            )
