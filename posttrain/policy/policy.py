"""The trained velocity and its roles: which weights answer, at what precision, and at what cost?

Roles are copies of the *trained* tensors by name ("ema", "reference", "old"), so with LoRA they are copies
of the adapter only, and a reference with an untouched adapter is exactly the model the stage started from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from posttrain.condition import Condition, Conditions, concatenated
from posttrain.flow.rectified import guided
from posttrain.model import FlowModel
from posttrain.policy.layout import Layout


class Policy:
    """A model, its trained parameters, and named frozen copies of them."""

    def __init__(
        self, model: FlowModel, *, autocast: torch.dtype | None = None, micro_batch: int = 64
    ) -> None:
        self.model = model
        self.autocast = autocast
        self.micro_batch = micro_batch
        """Most rows in one forward without gradients."""
        self.layout = Layout()
        """How the weights lie over the processes of a run."""
        self.roles: dict[str, dict[str, Tensor]] = {}
        """Name of the role -> name of the weight -> what this process holds of it."""
        self.static: set[str] = set()
        """Roles that never move."""
        self.forward_equivalents = 0
        """Transformer forwards of this process so far, of one sample each; one with its backward counts 3."""
        self.largest_forward = 0
        """Rows in the largest forward since somebody set this to 0."""
        self._lowered_with_gradients = False
        self.find_parameters()

    def find_parameters(self) -> None:
        """Look the model's parameters up, anew where they were replaced by others."""
        self.parameters = dict(self.model.transformer.named_parameters())
        self.trained = {n: p for n, p in self.parameters.items() if p.requires_grad}

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """(n, c, h, w) float32 velocity of the role in use, at float32 ``latents`` and ``sigma`` (n,)."""
        self.forward_equivalents += len(latents) * (3 if torch.is_grad_enabled() else 1)
        self.largest_forward = max(self.largest_forward, len(latents))
        if self._lowered_with_gradients is not torch.is_grad_enabled():
            # or weights that were lowered without gradients would cut a later forward off from its own
            torch.clear_autocast_cache()
            self._lowered_with_gradients = torch.is_grad_enabled()
        enabled = self.autocast is not None
        with torch.autocast(latents.device.type, dtype=self.autocast, enabled=enabled):
            return self.model.velocity(latents, sigma, condition)

    @contextlib.contextmanager
    def casts_kept(self) -> Iterator[None]:
        """Within the block weights do not change, but by :meth:`using`: what autocast makes of them in low
        precision is kept from forward to forward, instead of being made anew, and takes their memory.

        Of weights in parts nothing is kept: all blocks would be whole at once.
        """
        if self.autocast is None or self.layout.sharded:
            yield
            return
        torch.autocast_increment_nesting()  # autocast forgets what it kept at the end of its outermost block
        try:
            yield
        finally:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()

    def guided_velocity(
        self, latents: Tensor, sigma: Tensor, prompt: Tensor, conditions: Conditions, scale: float
    ) -> Tensor:
        """The velocity under classifier-free guidance, in chunks where there are no gradients.

        ``scale`` 1 is the conditional velocity and costs one forward a row; any other costs two. Both
        branches go through the transformer together, so that what is recomputed with gradients, in
        micro-batches of the same size, is what was computed without.
        """
        size = len(latents) if torch.is_grad_enabled() else self.micro_batch
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

        ``weights``, whole and by parameter name, are held instead where given, and may be of untrained
        parameters too. A role that never ``moves`` is not part of a checkpoint: the stage makes it again.
        """
        if weights is None:
            self.roles[name] = {n: self.layout.local(p).clone() for n, p in self.trained.items()}
        else:
            self.roles[name] = {n: self.layout.shard(self.parameters[n], w) for n, w in weights.items()}
        if not moves:
            self.static.add(name)

    def named(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """``weights`` of a transformer without adapters, under the names they have beside adapters, and
        adapters that add nothing to them."""
        plain = {name.replace(".base_layer.", "."): name for name in self.parameters}
        silent = {
            n: torch.zeros(p.shape, dtype=p.dtype) for n, p in self.parameters.items() if ".lora_B." in n
        }
        return {plain[name]: tensor for name, tensor in weights.items()} | silent

    @torch.no_grad()
    def move_role(self, name: str, decay: float) -> None:
        """role <- decay role + (1 - decay) trained."""
        kept, now = self.roles[name], self.trained
        torch._foreach_lerp_([kept[n] for n in now], [self.layout.local(p) for p in now.values()], 1 - decay)

    def whole(self, name: str | None) -> Iterator[tuple[str, Tensor]]:
        """Each weight of a role, or of the trained ones, whole; every process asks at once."""
        role = self.roles[name] if name is not None else None
        for key in self.trained if role is None else role:
            parameter = self.parameters[key]
            held = self.layout.local(parameter) if role is None else role[key]
            yield key, self.layout.gathered(parameter, held)

    @torch.no_grad()
    def load(self, name: str | None, weights: Mapping[str, Tensor]) -> None:
        """Set a role, or the trained weights, from whole tensors."""
        self.layout.synchronize()
        for key, tensor in weights.items():
            parameter = self.parameters[key]
            held = self.layout.local(parameter) if name is None else self.roles[name][key]
            held.copy_(self.layout.shard(parameter, tensor))

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Within the block the role's weights answer, without gradients; None means the trained ones."""
        with torch.no_grad():
            if name is None:
                yield
                return
            if not (held := [self.layout.local(self.parameters[key]) for key in self.roles[name]]):
                yield
                return
            # taken before anything is moved, and kept for the way back: it must not fail in the middle
            size, device = max(t.nbytes for t in held), held[0].device
            room = torch.empty(size, dtype=torch.uint8, device=device)
            self._swap(name, room)
            try:
                yield
            finally:
                self._swap(name, room)

    def _swap(self, name: str, room: Tensor) -> None:
        self.layout.synchronize()
        # the values change places, not the tensors: sharded and compiled forwards know these by address
        for key, kept in self.roles[name].items():
            held = self.layout.local(self.parameters[key])
            now = room[: held.nbytes].view(held.dtype).view(held.shape).copy_(held)
            held.copy_(kept)
            kept.copy_(now)
        self.layout.mark_written()
        torch.clear_autocast_cache()
