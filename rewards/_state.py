"""Reads published weights, checks that they fit, and freezes the network for scoring."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import ModelError, RewardError
from posttrain.weights.fitting import described, misfit

_COLLECTED: ContextVar[list[nn.Module] | None] = ContextVar("collected", default=None)
LAYERS = (0, 2, 4, 6, 7)
"""Numbers of the linear layers in the published heads. The others are dropout, which scoring does not use."""


def read(file: Path, key: str | None = None) -> dict[str, Tensor]:
    """Read name -> tensor from ``file``, a torch file, or from its entry ``key``.

    Unpickles nothing but tensors, since the file may come from anybody. Raises RewardError if the file cannot
    be read or holds something else.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes lead torch to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RewardError(f"{str(file)!r} cannot be read as a torch file of weights: {reason}") from error
    state = content if key is None else content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        entry = "" if key is None else f" under {key!r}"
        raise RewardError(f"{str(file)!r} holds no weights{entry}")
    return dict(state)


def loaded(kind: Any, folder: Path, device: torch.device) -> Any:
    """Load transformers' model of class ``kind`` from ``folder``, frozen and in float32.

    Raises RewardError if a weight is missing, for which transformers would use random ones, or does not fit.
    """
    from posttrain.weights.network import load_network

    with reading(folder):
        return frozen(load_network(kind, folder, torch.float32), device)


def load_tokenizer(kind: Any, folder: Path) -> Any:
    """Load transformers' tokenizer of class ``kind`` from ``folder``. Raises RewardError if it cannot be read
    or knows no word."""
    from posttrain.weights.tokenizer import check_tokenizer

    with reading(folder):
        tokenizer = kind.from_pretrained(folder)
        check_tokenizer(tokenizer, folder)
    return tokenizer


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn whatever is raised while ``folder`` is read into a RewardError that names it."""
    from posttrain.weights.hugging_face import explained, quiet

    try:
        with quiet(), explained(str(folder)):
            yield
    except ModelError as error:
        raise RewardError(str(error)) from error


def frozen(model: Any, device: torch.device) -> Any:
    """Move ``model`` to ``device`` for scoring: in evaluation mode, without gradients."""
    if (networks := _COLLECTED.get()) is not None:
        networks.append(model)
    return model.to(device).eval().requires_grad_(False)


@contextlib.contextmanager
def collected() -> Iterator[list[nn.Module]]:
    """Yield a list to which :func:`frozen` adds its networks within the block."""
    networks: list[nn.Module] = []
    token = _COLLECTED.set(networks)
    try:
        yield networks
    finally:
        _COLLECTED.reset(token)


def fill(module: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Load ``state``, which was read from ``file``, into ``module``.

    Raises RewardError unless all names, shapes and kinds of number fit, and all numbers are finite. A layer
    that stays random would still give scores.
    """
    own = module.state_dict()
    if problems := misfit(own, state):
        raise RewardError(f"the weights in {str(file)!r} do not fit: {problems}")
    module.load_state_dict({name: state[name] for name in own})


def all_used(state: Mapping[str, Tensor], used: Iterable[str], file: Path) -> None:
    """Raise RewardError for names of ``state``, read from ``file``, that are not among the ``used`` ones."""
    known = set(used)
    if problems := described(left_over=[name for name in state if name not in known]):
        raise RewardError(f"the weights in {str(file)!r} do not fit: {problems}")


def layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """The number of blocks in ``state``, whose names have a number from 0 after ``prefix``."""
    return 1 + max(int(k.removeprefix(prefix).split(".")[0]) for k in state if k.startswith(prefix))


def linear_head(state: Mapping[str, Tensor], width: int, file: Path) -> nn.Sequential:
    """The head of the aesthetic predictor and of ImageReward: five linear layers without activations.

    ``state``, read from ``file``, names them ``layers.0.weight`` and so on. ``width`` is the number of input
    features. Raises RewardError if the weights do not fit.
    """
    wanted = [f"layers.{i}.{kind}" for i in LAYERS for kind in ("weight", "bias")]
    missing, left_over = ([n for n in a if n not in b] for a, b in ((wanted, state), (state, wanted)))
    if problems := described(missing=missing, left_over=left_over):
        raise RewardError(f"the weights in {str(file)!r} do not fit: {problems}")
    sizes = [width, *(state[f"layers.{i}.bias"].numel() for i in LAYERS)]
    head = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
    prefixes = {f"layers.{number}.": f"{i}." for i, number in enumerate(LAYERS)}
    renamed = {
        next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name): t
        for name, t in state.items()
    }
    fill(head, renamed, file)
    return head
