"""The policy: the trained velocity, its precision, its cost, and its roles.

Roles are copies of the *trained* tensors by name ("ema", "reference", "old"), so under LoRA they are copies
of the adapter only, and a reference whose adapter adds nothing is exactly the model the stage started from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from posttrain.condition import Condition, Conditions, concatenated
from posttrain.flow_model import FlowModel, velocity_of
from posttrain.policy.layout import Layout
from posttrain.policy.masters import Masters
from posttrain.policy.piece import Piece, Stored


class Policy:
    """A model, its trained parameters, and named frozen copies of them."""

    def __init__(
        self, model: FlowModel, *, autocast: torch.dtype | None = None, micro_batch: int = 64
    ) -> None:
        self.model = model
        self.autocast = autocast
        self.micro_batch = micro_batch
        """The largest number of rows in one forward without gradients, and of items in one with gradients."""
        self.layout = Layout()
        """How the weights are spread over the processes."""
        self.roles: dict[str, dict[str, Tensor]] = {}
        """Role -> name of the weight -> the part of its value that this process holds."""
        self.static: set[str] = set()
        """Roles that never move."""
        self.forward_equivalents = 0
        """Cost of this process so far, in forwards of one sample; a forward-backward counts 3."""
        self.largest_forward = 0
        """Rows in the largest forward since this was last set to 0."""
        self.masters: Masters | None = None
        """The float32 weights, if the transformer computes with copies in lower precision."""
        self.compiled = False
        """Whether blocks are compiled. Then a forward that records gradients and one that does not are two
        programs, which round differently."""
        self._cast_with_gradients = False
        self.find_parameters()

    def find_parameters(self) -> None:
        """Find the model's parameters. To be called again after they were replaced, e.g. by sharded ones."""
        self.parameters = dict(self.model.transformer.named_parameters())
        self.trained = {n: p for n, p in self.parameters.items() if p.requires_grad}

    def lower(self) -> None:
        """Let the transformer compute with weights in low precision instead of autocast, if that is on.

        Then ``trained`` has float32 masters. To be called before the policy has roles and an optimizer."""
        if (dtype := self.autocast) is None:
            return
        self.masters = Masters(self.trained, dtype)
        for parameter in self.model.transformer.parameters():
            if parameter.is_floating_point() and not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        self.trained = self.masters.weights
        self.parameters |= self.trained
        self.autocast = None

    def weights_changed(self) -> None:
        """To be called after trained weights were written to."""
        if self.masters is not None:
            self.masters.lower()

    def velocity(
        self, latents: Tensor, sigma: Tensor, condition: Condition, *, repeated: bool = False
    ) -> Tensor:
        """The (n, c, h, w) float32 velocity at float32 ``latents`` (n, c, h, w) and ``sigma`` (n,) in [0, 1].

        It is that of the trained weights, or inside :meth:`using` that of a role. If it is computed without
        gradients and ``repeated`` with gradients, as in the loss, on as many rows, both are equal to the bit.
        """
        gradients = torch.is_grad_enabled()
        self.forward_equivalents += len(latents) * (3 if gradients else 1)
        self.largest_forward = max(self.largest_forward, len(latents))
        recorded = gradients or (repeated and self.compiled)
        if self._cast_with_gradients is not recorded:
            # low-precision copies made without gradients would cut this forward off from its weights
            torch.clear_autocast_cache()
            self._cast_with_gradients = recorded
        enabled = self.autocast is not None
        with (
            torch.set_grad_enabled(recorded),
            torch.autocast(latents.device.type, dtype=self.autocast, enabled=enabled),
        ):
            velocity = velocity_of(self.model, latents, sigma, condition)
        return velocity if gradients else velocity.detach()

    @contextlib.contextmanager
    def casts_kept(self) -> Iterator[None]:
        """Inside this block only :meth:`using` changes weights, so autocast may keep its low-precision copies
        between forwards.

        The copies take memory until the block ends. Sharded weights are not kept, because then all blocks
        would be whole at once.
        """
        if self.autocast is None or self.layout.sharded:
            yield
            return
        torch.autocast_increment_nesting()  # autocast drops its copies when its outermost block ends
        try:
            yield
        finally:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()

    def guided_velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        prompt: Tensor,
        conditions: Conditions,
        scale: float | None,
        *,
        repeated: bool = False,
    ) -> Tensor:
        """The (n, c, h, w) velocity under guidance of ``scale``, by the model's rule; with None the velocity
        that losses without a scale train.

        ``prompt`` (n,) has each sample's row in ``conditions``. Classifier-free guidance of 1 gives the
        conditional velocity and costs one forward per row; any other costs two. Without gradients the
        forwards have at most ``micro_batch`` rows per branch. Both branches share a forward, so the loss, in
        micro-batches of the same size, computes a ``repeated`` velocity of the rollout with the same rounding
        (see :meth:`velocity`).
        """
        size = len(latents) if torch.is_grad_enabled() else self.micro_batch
        rule, velocities = self.model.guidance_rule, []
        needs_empty_prompt = scale is not None and rule.needs_empty_prompt(scale)
        for i in range(0, len(latents), size):
            x, s, rows = (a[i : i + size] for a in (latents, sigma, prompt))
            condition = self.condition(conditions, rows, scale)
            if scale is None or not needs_empty_prompt:
                velocities.append(self.velocity(x, s, condition, repeated=repeated))
                continue
            both = concatenated(conditions.empty(len(x)), condition)
            x, s = torch.cat([x, x]), torch.cat([s, s])
            v_uncond, v_cond = self.velocity(x, s, both, repeated=repeated).chunk(2)
            velocities.append(rule.combined(v_cond, v_uncond, scale))
        return torch.cat(velocities)

    def condition(self, conditions: Conditions, prompt: Tensor, scale: float | None) -> Condition:
        """The condition of each row of ``prompt`` (n,), with ``scale`` where the network takes it."""
        condition = conditions.rows(prompt)
        if scale is not None and self.model.guidance_rule.embedded:
            condition["guidance"] = torch.full(prompt.shape, scale, device=prompt.device)
        return condition

    def add_role(self, name: str, weights: dict[str, Tensor] | None = None, *, moves: bool = True) -> None:
        """Add a frozen copy of the current trained weights as role ``name``.

        If ``weights`` are given (whole, by parameter name), the role holds these instead; they may include
        untrained parameters. A role that never ``moves`` is not in checkpoints: the stage makes it again.
        """
        if weights is None:
            self.roles[name] = {n: self.layout.local(p).clone() for n, p in self.trained.items()}
        else:
            self.roles[name] = {n: self.layout.shard(self.parameters[n], w) for n, w in weights.items()}
        if not moves:
            self.static.add(name)

    def beside_adapters(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """``weights`` of a transformer without adapters under the names they have in this one, together with
        zeros for its adapters, which then add nothing."""
        plain = {name.replace(".base_layer.", "."): name for name in self.parameters}
        silent = {
            n: torch.zeros(p.shape, dtype=p.dtype) for n, p in self.parameters.items() if ".lora_B." in n
        }
        return {plain[name]: tensor for name, tensor in weights.items()} | silent

    @torch.no_grad()
    def move_role(self, name: str, decay: float) -> None:
        """role <- decay * role + (1 - decay) * trained."""
        role = [self.roles[name][n] for n in self.trained]
        torch._foreach_lerp_(role, [self.layout.local(p) for p in self.trained.values()], 1 - decay)

    def whole_weight(self, name: str | None, key: str) -> Tensor:
        """The whole value of the weight ``key`` of a role, or with None of the trained weight.

        Every process must call it at the same time. For all weights, see
        :func:`posttrain.policy.whole_weights.whole_weights`.
        """
        parameter = self.parameters[key]
        held = self.layout.local(parameter) if name is None else self.roles[name][key]
        return self.layout.gathered(parameter, held)

    def pieces(self, name: str | None) -> dict[str, Piece]:
        """What this process holds of each weight of a role, or with None of each trained weight.

        The values are not copied. No other process takes part.
        """
        held = self.roles[name] if name is not None else None
        return {
            key: self.layout.piece(p, self.layout.local(p) if held is None else held[key])
            for key, p in ((key, self.parameters[key]) for key in (self.trained if held is None else held))
        }

    def load(self, name: str | None, weights: Mapping[str, Stored]) -> None:
        """Set a role, or with None the trained weights, from stored tensors by the weight's name."""
        self.layout.synchronize()
        pieces = self.pieces(name)
        for key, stored in weights.items():
            stored.read(pieces[key])
        if name is None:
            self.weights_changed()

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Inside this block the policy has the role's weights, and no gradients; None means the trained
        weights."""
        with torch.no_grad():
            if name is None or not self.roles[name]:
                yield
                return
            if self.masters is None:
                copied, swapped = {}, self.roles[name]
            else:
                copied = {key: value for key, value in self.roles[name].items() if key in self.trained}
                swapped = {key: value for key, value in self.roles[name].items() if key not in self.trained}
            # allocated before the swap and kept for the swap back, so that neither fails half-way
            size = max((self.layout.local(self.parameters[key]).nbytes for key in swapped), default=0)
            room = torch.empty(size, dtype=torch.uint8, device=self.model.device)
            self._swap(swapped, room)
            if self.masters is not None:
                self.masters.put_in(copied)
            try:
                yield
            finally:
                self._swap(swapped, room)
                if self.masters is not None:
                    self.masters.lower(copied)

    def _swap(self, role: dict[str, Tensor], room: Tensor) -> None:
        """Exchange values of a ``role`` and of the weights, one weight at a time through ``room``."""
        self.layout.synchronize()
        # values are exchanged, not tensors, because sharded and compiled forwards keep their addresses
        for key, value in role.items():
            held = self.layout.local(self.parameters[key])
            buffer = room[: held.nbytes].view(held.dtype).view(held.shape).copy_(held)
            held.copy_(value)
            value.copy_(buffer)
        self.layout.mark_written()
        torch.clear_autocast_cache()
