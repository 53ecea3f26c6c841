"""Writes what every trainer has in some form: the model, the precision, the tracker, the name."""

from __future__ import annotations

import re

from posttrain.errors import PosttrainError
from posttrain.importing.draft import Draft

KINDS = (
    (r"kontext|edit|wan|bagel|video|layered", ""),
    (r"stable-?diffusion-?3|sd-?3", "sd3"),
    (r"flux\W?2.*klein|flux2.klein", "flux2_klein"),
    (r"flux\W?2", ""),
    (r"flux", "flux"),
    (r"qwen\W?image\W?2\W1\W?turbo", ""),
    (r"qwen\W?image\W?2\W?1(?!\d)", "qwen_image_21"),
    (r"qwen\W?image", "qwen_image"),
    (r"sana", "sana"),
    (r"z\W?image", "z_image"),
    (r"aura\W?flow|lumina", "diffusers"),
)
"""What a name or path has -> our ``model.type``; an empty one is a model that posttrain cannot train."""
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "none")


def kind_of(path: str) -> str | None:
    """``model.type`` for a hub name or folder; None if the name does not say."""
    for pattern, kind in KINDS:
        if re.search(pattern, path, re.I):
            return kind
    return None


def put_model(draft: Draft, path_flag: str, revision_flag: str = "", kind: str | None = None) -> str:
    """Write ``model.type``, ``path`` and ``revision``; returns the type. Raises PosttrainError if posttrain
    has no such model."""
    settings = draft.settings
    path = settings.needed(path_flag)
    kind = kind or kind_of(path)
    if not kind:
        words = "is no model that posttrain trains" if kind == "" else "does not say which family it is of"
        raise PosttrainError(
            f"{settings.spelled(path_flag)} {path}: {words}; 'posttrain models' lists those that it trains"
        )
    draft.put("model.type", kind)
    draft.put("model.path", path, path_flag)
    if revision_flag and settings[revision_flag] not in (None, "", "main"):
        draft.put("model.revision", settings[revision_flag], revision_flag)
    elif revision_flag:
        draft.idle[revision_flag] = "it is the hub's default"
    return kind


def put_precision(draft: Draft, flag: str) -> None:
    """Write ``stage.train.precision`` and ``model.dtype`` for ``no``, ``fp16``, ``bf16`` or None."""
    value = draft.settings[flag] or "no"
    if value == "fp16":
        words = "posttrain computes in bf16 or fp32; bf16 rounds more, and its range needs no loss scaling"
        draft.near("stage.train.precision", "bf16", flag, words)
        draft.put("model.dtype", "bf16", flag)
        return
    precision = "bf16" if value == "bf16" else "fp32"
    draft.put("stage.train.precision", precision, flag)
    draft.put("model.dtype", precision, flag)


def put_tracker(draft: Draft, flag: str) -> None:
    """Write ``tracker`` if posttrain knows the service."""
    value = str(draft.settings[flag] or "none").lower()
    if value in TRACKERS:
        draft.put("tracker", value, flag)
    else:
        words = f"{value} is no tracker of posttrain: {', '.join(TRACKERS)}"
        draft.near("tracker", "tensorboard", flag, words)


def as_path(path: str) -> str:
    """``path`` as ``start_from`` takes it: a name without a slash would be that of a stage."""
    return path if "/" in path else f"./{path}"


def named(text: str, otherwise: str) -> str:
    """``text`` as the name of a recipe: letters, digits, dots, dashes and underscores."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:80].rstrip(".")
    return name or otherwise
