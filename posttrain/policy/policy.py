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
        self._cast_with_gradients = False
        self.find_parameters()

    def find_parameters(self) -> None:
        """Find the model's parameters. To be called again after they were replaced, e.g. by sharded ones."""
        self.parameters = dict(self.model.transformer.named_parameters())
        self.trained = {n: p for n, p in self.parameters.items() if p.requires_grad}

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The (n, c, h, w) float32 velocity at float32 ``latents`` (n, c, h, w) and ``sigma`` (n,) in [0, 1].

        It is that of the trained weights, or inside :meth:`using` that of a role.
        """
        self.forward_equivalents += len(latents) * (3 if torch.is_grad_enabled() else 1)
        self.largest_forward = max(self.largest_forward, len(latents))
        if self._cast_with_gradients is not torch.is_grad_enabled():
            # low-precision copies made without gradients would cut this forward off from its weights
            torch.clear_autocast_cache()
            self._cast_with_gradients = torch.is_grad_enabled()
        enabled = self.autocast is not None
        with torch.autocast(latents.device.type, dtype=self.autocast, enabled=enabled):
            return self.model.velocity(latents, sigma, condition)

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
        self, latents: Tensor, sigma: Tensor, prompt: Tensor, conditions: Conditions, scale: float
    ) -> Tensor:
        """The (n, c, h, w) velocity under classifier-free guidance of ``scale``.

        ``prompt`` (n,) has each sample's row in ``conditions``. A ``scale`` of 1 gives the conditional
        velocity and costs one forward per row; any other costs two. Without gradients the forwards have at
        most ``micro_batch`` rows per branch. Both branches share a forward, so the loss, in micro-batches of
        the same size, recomputes the rollout's velocity with the same rounding.
        """
        size = len(latents) if torch.is_grad_enabled() else self.micro_batch
        velocities = []
        for i in range(0, len(latents), size):
            x, s, rows = (a[i : i + size] for a in (latents, sigma, prompt))
            condition = conditions.rows(rows)
            if scale == 1:
                velocities.append(self.velocity(x, s, condition))
                continue
            both = concatenated(conditions.empty(len(x)), condition)
            v_uncond, v_cond = self.velocity(torch.cat([x, x]), torch.cat([s, s]), both).chunk(2)
            velocities.append(guided(v_cond, v_uncond, scale))
        return torch.cat(velocities)

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

    def gathered_weights(self, name: str | None) -> Iterator[tuple[str, Tensor]]:
        """The name and whole value of each weight of a role, or with None of each trained weight.

        Every process must go through it at the same time.
        """
        role = self.roles[name] if name is not None else None
        for key in self.trained if role is None else role:
            parameter = self.parameters[key]
            held = self.layout.local(parameter) if role is None else role[key]
            yield key, self.layout.gathered(parameter, held)

    @torch.no_grad()
    def load(self, name: str | None, weights: Mapping[str, Tensor]) -> None:
        """Set a role, or with None the trained weights, from whole tensors by the weight's name."""
        self.layout.synchronize()
        for key, tensor in weights.items():
            parameter = self.parameters[key]
            held = self.layout.local(parameter) if name is None else self.roles[name][key]
            held.copy_(self.layout.shard(parameter, tensor))

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Inside this block the policy has the role's weights, and no gradients; None means the trained
        weights."""
        with torch.no_grad():
            if name is None or not self.roles[name]:
                yield
                return
            local = [self.layout.local(self.parameters[key]) for key in self.roles[name]]
            # allocated before the swap and kept for the swap back, so that neither fails half-way
            size, device = max(tensor.nbytes for tensor in local), local[0].device
            room = torch.empty(size, dtype=torch.uint8, device=device)
            self._swap(name, room)
            try:
                yield
            finally:
                self._swap(name, room)

    def _swap(self, name: str, room: Tensor) -> None:
        """Exchange the values of a role and of the weights, one weight at a time through ``room``."""
        self.layout.synchronize()
        # values are exchanged, not tensors, because sharded and compiled forwards keep their addresses
        for key, role in self.roles[name].items():
            held = self.layout.local(self.parameters[key])
            buffer = room[: held.nbytes].view(held.dtype).view(held.shape).copy_(held)
            held.copy_(role)
            role.copy_(buffer)
        self.layout.mark_written()
        torch.clear_autocast_cache()
