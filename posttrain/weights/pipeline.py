"""Loads a diffusers pipeline from its folder, and accounts for every file and weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ModelError
from posttrain.weights.hugging_face import explained, quiet
from posttrain.weights.needed_files import NETWORK_CONFIG, class_of, config_of, lacking, listed
from posttrain.weights.network import load_network
from posttrain.weights.pipeline_folder import index_in
from posttrain.weights.tokenizer import check_tokenizer, encoder_of

if TYPE_CHECKING:
    import torch


def load_pipeline(
    kind: Any,
    source: Path,
    dtypes: Mapping[str, torch.dtype],
    left_out: Collection[str] = (),
    loaders: Mapping[str, Callable[[Path], Any]] | None = None,
) -> Any:
    """The pipeline of class ``kind`` in the folder ``source``, without the components in ``left_out``.

    ``dtypes`` gives the precision of a network, with ``default`` for the others. ``loaders`` load components
    from their folders in place of the classes that the pipeline's index names. Raises ModelError if a file
    is missing, a weight does not fit (see :func:`posttrain.weights.network.load_network`), or a tokenizer
    does not fit its text encoder.
    """
    index = index_in(source)
    if (lost := lacking(source, index, left_out)) is not None:
        raise ModelError(lost)
    made: dict[str, Any] = dict.fromkeys(left_out)
    for name, (library, cls) in listed(index).items():
        if name in left_out:
            continue
        if loaders and name in loaders:
            with quiet(), explained(str(source / name)):
                made[name] = loaders[name](source / name)
        else:
            dtype = dtypes.get(name, dtypes["default"])
            made[name] = _component(class_of(library, cls, name), source / name, dtype)
    for name, component in made.items():
        if (encoder := encoder_of(name)) is not None and component is not None:
            check_tokenizer(getattr(component, "tokenizer", component), source / name, made.get(encoder))
    with quiet(), explained(str(source)):
        return kind.from_pretrained(source, torch_dtype=dict(dtypes), **made)


def _component(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The component of class ``kind`` in ``folder``; a network has its weights in ``dtype``."""
    if config_of(kind.__name__) == NETWORK_CONFIG:
        return load_network(kind, folder, dtype)
    with quiet(), explained(str(folder)):
        return kind.from_pretrained(folder)
