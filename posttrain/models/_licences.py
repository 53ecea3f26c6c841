"""Names the licences of published base models, for model cards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.models._published import LICENCES
from posttrain.weights.pipeline_folder import SHIPPED, from_hub, local_folder

KNOWN: Mapping[str, Mapping[str, str]] = {"posttrain/tiny-sd3": {"license": "apache-2.0"}, **LICENCES}
"""Model -> the entries of its model card's front matter that name its licence."""
ENTRIES = ("license", "license_name", "license_link")


def origin_of(path: str) -> dict[str, Any]:
    """The front matter that a card of a model made from the one at ``path`` takes over: ``base_model``, where
    it is on a hub, and the licence, where it is known or a model card in its folder tells."""
    stated = _front_matter(path)
    licence = KNOWN.get(path) or {name: stated[name] for name in ENTRIES if name in stated}
    base = path if from_hub(path) else stated.get("base_model")
    return {**({"base_model": base} if base else {}), **licence}


def _front_matter(path: str) -> dict[str, Any]:
    """What the model card in the folder of the model at ``path`` states; empty without a readable one."""
    from huggingface_hub import ModelCard

    folder = local_folder(path)
    if folder is None or path.startswith(SHIPPED) or not (file := Path(folder) / "README.md").is_file():
        return {}
    try:
        return ModelCard(file.read_text("utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # its front matter may be anything; then the licence is not known
        return {}
