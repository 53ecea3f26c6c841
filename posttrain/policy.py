"""The trained velocity and its roles: which weights answer, at what precision, and at what cost?

Roles are copies of the *trained* tensors by name ("ema", "reference", "old"), so with LoRA they are copies
of the adapter only, and a reference with an untouched adapter is exactly the model the stage started from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from posttrain.condition import Condition, Conditions, concatenated
from posttrain.flow import guided
from posttrain.model import FlowModel


class Policy:
    """A model, its trained parameters, and named frozen copies of them."""

    def __init__(self, model: FlowModel, *, autocast: torch.dtype | None = None, chunk: int = 64) -> None:
        self.model = model
        self.trained = {n: p for n, p in model.transformer.named_parameters() if p.requires_grad}
        self.autocast = autocast
        self.chunk = chunk
        """Most rows in one forward without gradients."""
        self.parameters = dict(model.transformer.named_parameters())
        self.roles: dict[str, dict[str, Tensor]] = {}
        self.static: set[str] = set()
        """Roles that never move."""
        self.forward_equivalents = 0
        """Transformer forwards so far, of one sample each; one with its backward counts 3."""

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """(n, c, h, w) float32 velocity of the role in use, at float32 ``latents`` and ``sigma`` (n,)."""
        self.forward_equivalents += len(latents) * (3 if torch.is_grad_enabled() else 1)
        enabled = self.autocast is not None
        with torch.autocast(latents.device.type, dtype=self.autocast, enabled=enabled):
            return self.model.velocity(latents, sigma, condition)

    def guided_velocity(
        self, latents: Tensor, sigma: Tensor, prompt: Tensor, conditions: Conditions, scale: float
    ) -> Tensor:
        """The velocity under classifier-free guidance, in chunks where there are no gradients.

        ``scale`` 1 is the conditional velocity and costs one forward a row; any other costs two. Both
        branches go through the transformer together, so that what is recomputed with gradients, in
        micro-batches of the same size, is what was computed without.
        """
        size = len(latents) if torch.is_grad_enabled() else self.chunk
        parts = []
        for i in range(0, len(latents), size):
            x, s, rows = (a[i : i + size] for a in (latents, sigma, prompt))
            condition = conditions.rows(rows)
            if scale == 1:
                parts.append(self.velocity(x, s, condition))
                continue
            both = concatenated(conditions.empty(len(x)), condition)
            v_uncond, v_cond = self.velocity(torch.cat([x, x]), torch.cat([s, s]), both).chunk(2)
            parts.append(guided(v_cond, v_uncond, scale))
        return torch.cat(parts)

    def add_role(self, name: str, weights: dict[str, Tensor] | None = None, *, moves: bool = True) -> None:
        """Keep a frozen copy of the trained weights as they are now, under ``name``.

        ``weights``, by parameter name, are held instead where given (they are not copied), and may be of
        untrained parameters too. A role that never ``moves`` is not part of a checkpoint: the stage makes
        it again.
        """
        if weights is None:
            weights = {n: p.detach().clone() for n, p in self.trained.items()}
        self.roles[name] = dict(weights)
        if not moves:
            self.static.add(name)

    def named(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """``weights`` of a transformer without adapters, under the names they have beside adapters, and
        adapters that add nothing to them."""
        plain = {name.replace(".base_layer.", "."): name for name in self.parameters}
        silent = {name: torch.zeros_like(p) for name, p in self.parameters.items() if ".lora_B." in name}
        return {plain[name]: tensor for name, tensor in weights.items()} | silent

    @torch.no_grad()
    def move_role(self, name: str, decay: float) -> None:
        """role <- decay role + (1 - decay) trained."""
        kept, now = self.roles[name], self.trained
        torch._foreach_lerp_([kept[n] for n in now], [p.detach() for p in now.values()], 1 - decay)

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Within the block the role's weights answer, without gradients; None means the trained ones."""
        with torch.no_grad():
            if name is None:
                yield
                return
            self._swap(name)
            try:
                yield
            finally:
                self._swap(name)

    def _swap(self, name: str) -> None:
        role = self.roles[name]
        for key in role:
            parameter = self.parameters[key]
            parameter.data, role[key] = role[key], parameter.data
