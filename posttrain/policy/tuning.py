"""The ``tune`` block of a stage: it trains all of the transformer's weights, or a LoRA."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from posttrain.errors import ModelError
from posttrain.registry import Named
from posttrain.weights.hugging_face import quiet
from posttrain.weights.transformer import ADAPTER

if TYPE_CHECKING:
    from torch import nn


class Tune(Named, ABC):
    """A stage's ``tune`` block: chooses which weights are trained."""

    @property
    def merges(self) -> bool:
        """Whether adapters of earlier stages are merged into the weights."""
        return True

    @abstractmethod
    def apply(self, transformer: nn.Module, seed: int) -> None:
        """Give the trained weights float32 and ``requires_grad``, and freeze the others.

        Raises ModelError if the block does not fit the transformer.
        """

    @abstractmethod
    def trainable_parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The number of trained parameters, given the names and shapes of the transformer's weights."""


class Full(Tune):
    """Every weight of the transformer is trained, in float32."""

    type: Literal["full"] = "full"

    def apply(self, transformer: nn.Module, seed: int) -> None:
        del seed
        transformer.float().requires_grad_(True)

    def trainable_parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return sum(math.prod(shape) for shape in shapes.values())


class Lora(Tune):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), by default as in Flow-GRPO and DiffusionNFT."""

    type: Literal["lora"] = "lora"
    rank: int = Field(32, ge=1)
    """Rank of an adapter's two matrices, A (rank, in) and B (out, rank). Memory grows in proportion."""
    alpha: float = Field(64.0, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    init: Literal["gaussian", "default"] = "gaussian"
    """How A is drawn: ``gaussian`` with std 1 / rank, or ``default``, Kaiming-uniform. B starts at 0."""
    targets: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
        ],
        min_length=1,
    )
    """Endings of the names of linear layers that get an adapter, in whole dotted parts."""
    before: Literal["merge", "stack"] = "merge"
    """Adapters of earlier stages are merged into the weights (``merge``), or with ``stack`` they stay
    frozen beside them, so that weights of half precision are not rounded again."""

    def apply(self, transformer: nn.Module, seed: int) -> None:
        import torch
        from peft import LoraConfig

        linear = [n for n, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        # a layer that has adapters of earlier stages is called <name>.base_layer
        names = [n.removesuffix(".base_layer") for n in linear if ".lora_" not in n]
        if unmatched := [t for t in self.targets if not any(self._matches(n, t) for n in names)]:
            raise ModelError(
                f"tune.targets: no linear layer of the transformer ends in "
                f"{', '.join(map(repr, unmatched))}; "
                f"the endings there are {', '.join(sorted({_ending(n) for n in names}))}"
            )
        transformer.requires_grad_(False)
        config = LoraConfig(
            r=self.rank,
            # peft and diffusers write whole alphas as integers, and other tools expect these
            lora_alpha=int(self.alpha) if self.alpha.is_integer() else self.alpha,  # type: ignore[arg-type]
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
            target_modules=[n for n in names if any(self._matches(n, t) for t in self.targets)],
        )
        # A depends on the recipe's seed alone, not on what ran before in this process
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            transformer.add_adapter(config, adapter_name=ADAPTER)  # type: ignore[operator]
        if len(adapters := list(transformer.peft_config)) > 1:  # type: ignore[arg-type]
            transformer.set_adapters(adapters)  # type: ignore[operator]
            for name, parameter in transformer.named_parameters():
                parameter.requires_grad_(f".{ADAPTER}." in name)
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    @property
    def merges(self) -> bool:
        return self.before == "merge"

    def trainable_parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        matched = [
            shape
            for name, shape in shapes.items()
            if name.endswith(".weight") and any(self._matches(name[:-7], t) for t in self.targets)
        ]
        return sum(self.rank * (shape[0] + shape[1]) for shape in matched if len(shape) == 2)

    @staticmethod
    def _matches(name: str, target: str) -> bool:
        return name == target or name.endswith("." + target)


def _ending(name: str) -> str:
    """The last two parts of a dotted name, where a part may end in a number: ``attn.to_out.0``."""
    parts = re.split(r"\.(?=[a-z])", name)
    return ".".join(parts[-2:])
