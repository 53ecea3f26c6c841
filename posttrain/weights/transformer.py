"""Writes and loads a transformer's weights and adapters, in diffusers' layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ModelError
from posttrain.weights.fitting import misfit
from posttrain.weights.hugging_face import explained, quiet

if TYPE_CHECKING:
    import torch

ADAPTER = "default"
"""peft's name for the adapter that a stage trains."""
LORA = "pytorch_lora_weights.safetensors"
"""The file name under which diffusers looks for an adapter in a folder."""


def save_component(
    module: Any, folder: Path, dtype: torch.dtype, weights: Mapping[str, torch.Tensor]
) -> None:
    """Write ``module`` to ``folder`` in diffusers' layout, its weights in ``dtype``.

    ``weights`` holds values, by parameter name, that replace the module's own.
    """
    from huggingface_hub import save_torch_state_dict

    state = {
        name: weights.get(name, tensor).detach().to("cpu", dtype).contiguous()
        for name, tensor in module.state_dict().items()
    }
    with quiet():
        module.save_config(folder)
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(state, folder, filename_pattern=pattern, max_shard_size="10GB")


def load_component(module: torch.nn.Module, source: Path) -> None:
    """Load every weight of ``module`` from ``source``, a pipeline's folder or a component's.

    Raises ModelError if a weight is missing, unexpected or of another shape.
    """
    from safetensors.torch import load_file

    folder = source / "transformer" if (source / "transformer").is_dir() else source
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"no weights to start from: {str(source)!r} holds no safetensors file")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        with explained(str(file)):
            state |= load_file(file)
    if problems := misfit(module.state_dict(), state):
        raise ModelError(f"the weights in {str(folder)!r} do not fit: {problems}")
    module.load_state_dict(state)


def adapter_state(transformer: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the trained adapter under diffusers' names, on the CPU.

    ``weights`` holds their values by parameter name.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(transformer, dict(weights), adapter_name=ADAPTER)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save_adapter(transformer: Any, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the trained adapter of ``transformer`` to ``folder``, for diffusers' ``load_lora_weights``.

    The transformer has diffusers' PeftAdapterMixin. ``weights`` holds the adapter's values by parameter name.
    """
    from safetensors.torch import save_file

    config = {f"transformer.{k}": v for k, v in transformer.peft_config[ADAPTER].to_dict().items()}
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"transformer.{name}": t for name, t in adapter_state(transformer, weights).items()}
    save_file(state, folder / LORA, metadata={"format": "pt", "lora_adapter_metadata": text})


def load_adapter(transformer: Any, file: Path, *, merge: bool) -> None:
    """Add the adapter in ``file`` to ``transformer``, which has diffusers' PeftAdapterMixin.

    It is merged into the weights, or stays an active adapter beside them. Raises ModelError if it does not
    fit.
    """
    with quiet(), explained(str(file)):
        name = next_adapter(transformer)
        transformer.load_lora_adapter(str(file.parent), adapter_name=name, weight_name=file.name)
        if merge:
            transformer.fuse_lora(adapter_names=[name])
            transformer.unload_lora()


def next_adapter(transformer: Any) -> str:
    """A name that no adapter of ``transformer`` has yet: ``before_0``, ``before_1``, and so on."""
    return f"before_{len(getattr(transformer, 'peft_config', None) or {})}"
