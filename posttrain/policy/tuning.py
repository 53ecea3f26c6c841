"""The ``tune`` block of a stage: it trains all of the transformer's weights, or a LoRA."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.errors import ModelError
from posttrain.policy.packed import Packing, frozen_bytes, pack
from posttrain.registry import Named
from posttrain.weights.hugging_face import quiet
from posttrain.weights.transformer import ADAPTER

if TYPE_CHECKING:
    from torch import nn

PLAIN = ("to_q", "to_k", "to_v")
"""The targets where a transformer has none of the default ones: those of diffusers'
``train_dreambooth_lora_sana.py``."""


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
    def trained_sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
        """The sizes of the trained tensors, given the names and shapes of the transformer's weights. The two
        matrices of an adapter count as one tensor."""

    def trainable_parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The number of trained parameters, given the names and shapes of the transformer's weights."""
        return sum(self.trained_sizes(shapes))

    @abstractmethod
    def frozen_bytes(self, shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> int:
        """Bytes of the weights that are not trained, loaded with ``itemsize`` bytes a number."""

    def unmatched(self, layers: Collection[str]) -> list[str]:
        """The ``targets`` that match none of the names of ``layers``."""
        del layers
        return []

    @property
    def packing(self) -> Packing | None:
        """The format in which frozen weights of linear layers are kept; None: as they were loaded."""
        return None

    def counted_as(self) -> str:
        """A text that is equal for blocks of equal sizes and work, so that a plan counts them once."""
        return self.type


class Full(Tune):
    """Every weight of the transformer is trained, in float32."""

    type: Literal["full"] = "full"

    def apply(self, transformer: nn.Module, seed: int) -> None:
        del seed
        transformer.float().requires_grad_(True)

    def trained_sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
        return [math.prod(shape) for shape in shapes.values()]

    def frozen_bytes(self, shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> int:
        return 0


class Lora(Tune):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), by default as in Flow-GRPO and DiffusionNFT."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=32, ge=1, le=16_384)
    """Rank of an adapter's two matrices, A (rank, in) and B (out, rank). Memory grows in proportion."""
    alpha: float = Field(default=64.0, gt=0)
    """The adapter's output is scaled by alpha / rank. Where a recipe gives the rank alone, it is the rank."""
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
    """Endings of the names of linear layers that get an adapter, in whole dotted parts. Of the default, those
    that the transformer has; where it has none, as SANA's: every ``to_q``, ``to_k`` and ``to_v``, as in
    diffusers' example."""
    before: Literal["merge", "stack"] = "merge"
    """Adapters of earlier stages are merged into the weights (``merge``), or with ``stack`` they stay
    frozen beside them, so that weights of half precision are not rounded again."""
    base: Packing | None = None
    """Format of the frozen weights of linear layers in the transformer's blocks while the stage trains:
    ``int8`` or ``nf4`` (4 bits). Default: the model's ``dtype``. The artifact is a LoRA as ever."""

    @model_validator(mode="before")
    @classmethod
    def _alpha_follows_the_rank(cls, given: Any) -> Any:
        rank = given.get("rank") if isinstance(given, dict) else None
        if isinstance(rank, int) and rank > 0 and "alpha" not in given:  # else the rank is refused
            return {**given, "alpha": rank}
        return given

    def apply(self, transformer: nn.Module, seed: int) -> None:
        import torch
        from peft import LoraConfig

        linear = [n for n, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        # a layer that has adapters of earlier stages is called <name>.base_layer
        names = [n.removesuffix(".base_layer") for n in linear if ".lora_" not in n]
        targets = self._targets_among(names)
        if unmatched := self.unmatched(names):
            raise ModelError(
                f"tune.targets: no linear layer of the transformer ends in "
                f"{', '.join(map(repr, unmatched))}; "
                f"the endings there are {', '.join(sorted({_ending(n) for n in names}))}"
            )
        transformer.requires_grad_(False)
        if self.base is not None:
            pack(transformer, self.base)
        config = LoraConfig(
            r=self.rank,
            # peft and diffusers write whole alphas as integers, and other tools expect these
            lora_alpha=int(self.alpha) if self.alpha.is_integer() else self.alpha,  # type: ignore[arg-type]
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
            target_modules=[n for n in names if any(self._matches(n, t) for t in targets)],
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

    def trained_sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
        layers = {
            name.removesuffix(".weight"): shape
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) == 2
        }
        targets = self._targets_among(layers)
        matched = [shape for name, shape in layers.items() if any(self._matches(name, t) for t in targets)]
        return [self.rank * (shape[0] + shape[1]) for shape in matched]

    def unmatched(self, layers: Collection[str]) -> list[str]:
        return [t for t in self._targets_among(layers) if not any(self._matches(name, t) for name in layers)]

    def frozen_bytes(self, shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> int:
        return frozen_bytes(shapes, itemsize, self.base)

    @property
    def packing(self) -> Packing | None:
        return self.base

    def counted_as(self) -> str:
        # what an adapter starts from, and how its output is scaled, changes no size
        return json.dumps([self.type, self.rank, sorted(self.targets), self.base])

    def _targets_among(self, names: Collection[str]) -> Sequence[str]:
        """The targets in a transformer whose linear layers have these ``names``."""
        if self.targets != type(self).model_fields["targets"].default:
            return self.targets
        return [t for t in self.targets if any(self._matches(name, t) for name in names)] or PLAIN

    @staticmethod
    def _matches(name: str, target: str) -> bool:
        return name == target or name.endswith("." + target)


def _ending(name: str) -> str:
    """The last two parts of a dotted name, where a part may end in a number: ``attn.to_out.0``."""
    parts = re.split(r"\.(?=[a-z])", name)
    return ".".join(parts[-2:])
