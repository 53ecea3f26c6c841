"""How are published weights read, checked, and put into a network that then only scores?"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import RewardError
from posttrain.weights.fitting import misfit

_COLLECTED: ContextVar[list[nn.Module] | None] = ContextVar("collected", default=None)
LAYERS = (0, 2, 4, 6, 7)
"""Places of the linear layers in the published heads; dropout, which scoring leaves out, lies between."""


def read(file: Path, key: str | None = None) -> dict[str, Tensor]:
    """Name -> tensor of ``file``, or of its entry ``key``. Raises RewardError where it holds no such thing.

    Nothing but tensors is unpickled: these files come from strangers.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RewardError(f"{str(file)!r} cannot be read as a torch file of weights: {first}") from error
    state = content if key is None else content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        where = "" if key is None else f" under {key!r}"
        raise RewardError(f"{str(file)!r} holds no weights{where}")
    return dict(state)


def loaded(kind: Any, folder: Path, device: torch.device) -> Any:
    """transformers' model of class ``kind`` in ``folder``, frozen, in float32. Raises RewardError where
    weights are missing: transformers makes up random ones."""
    from posttrain.weights.hugging_face import quiet

    try:
        with quiet():
            model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RewardError(f"the weights in {str(folder)!r} cannot be loaded: {first}") from error
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise RewardError(f"the weights in {str(folder)!r} do not fit: no {missing[0]}{more}")
    return frozen(model, device)


def frozen(model: Any, device: torch.device) -> Any:
    """``model`` on ``device``, for scoring only."""
    if (networks := _COLLECTED.get()) is not None:
        networks.append(model)
    return model.to(device).eval().requires_grad_(False)


@contextlib.contextmanager
def collected() -> Iterator[list[nn.Module]]:
    """The networks that :func:`frozen` is given within the block."""
    networks: list[nn.Module] = []
    token = _COLLECTED.set(networks)
    try:
        yield networks
    finally:
        _COLLECTED.reset(token)


def fill(module: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Put ``state``, read from ``file``, into ``module``. Raises RewardError unless it fits in all names
    and shapes: a layer left random would still give scores."""
    if problems := misfit(module.state_dict(), state):
        raise RewardError(f"the weights in {str(file)!r} do not fit: {problems}")
    module.load_state_dict(state)


def layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks, numbered from 0 after ``prefix``, the names of ``state`` tell of."""
    return 1 + max(int(k.removeprefix(prefix).split(".")[0]) for k in state if k.startswith(prefix))


def linear_head(state: Mapping[str, Tensor], width: int, file: Path) -> nn.Sequential:
    """The five linear layers, without activations, that the aesthetic predictor and ImageReward end in.

    ``state`` names them ``layers.0.weight`` and so on; ``width`` is that of the features they read.
    """
    biases = [state.get(f"layers.{i}.bias") for i in LAYERS]
    sizes = [width, *(len(bias) for bias in biases if bias is not None)]
    head = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
    places = {f"layers.{place}.": f"{i}." for i, place in enumerate(LAYERS)}
    renamed = {
        next((new + name.removeprefix(old) for old, new in places.items() if name.startswith(old)), name): t
        for name, t in state.items()
    }
    fill(head, renamed, file)
    return head
