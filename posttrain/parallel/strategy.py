"""The interface of a parallel strategy.

A :class:`Parallel` is the recipe's ``parallel`` block. It makes a :class:`Strategy`, which owns the
optimizer and knows how each weight is spread over the processes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from posttrain.distributed.world import World
from posttrain.parallel.shares import Shares
from posttrain.policy.layout import Layout
from posttrain.policy.piece import Piece, Stored
from posttrain.registry import Spec

if TYPE_CHECKING:
    from posttrain.optim.settings import Train
    from posttrain.policy.policy import Policy


class Parallel(Spec, ABC):
    """A recipe's ``parallel`` block. Each subclass has a literal ``strategy``."""

    lowers: ClassVar[bool] = True
    """Whether ``precision: bf16`` computes with bf16 copies of float32 weights; else by autocast."""

    strategy: str
    """The name by which recipes choose it."""

    @property
    def needs_group(self) -> bool:
        """Whether one process alone also needs torch's process group."""
        return False

    def problem(self, processes: int) -> str | None:
        """Why that many processes cannot run it on this machine; None if they can."""
        del processes
        return None

    def label(self, processes: int) -> str:
        """The strategy that is active on that many processes, in a few words, for people."""
        del processes
        return self.strategy

    def shares(self, processes: int) -> Shares:
        """What each of that many processes holds."""
        del processes
        return Shares()

    @abstractmethod
    def prepare(self, policy: Policy, settings: Train, world: World) -> Strategy:
        """Spread the policy's weights over the processes and make the optimizer.

        Before, every process holds the whole model, as it was loaded.
        Must be called before the policy has roles. Raises PosttrainError if the strategy that is then active
        is not what the block says.
        """


class Strategy(ABC):
    """Gradients, optimizer and layout while a stage trains."""

    repeatable: ClassVar[bool] = False
    """Whether a step can be repeated after its forward or backward failed: the failure leaves nothing behind
    but gradients, which :meth:`zero_grad` removes."""
    tries_alone: ClassVar[bool] = False
    """Whether a forward and backward before a step's last micro-batch needs no other process, and leaves
    nothing behind but gradients where it fails. Then the processes can agree on what fits by trying."""
    compiles: bool = True
    """Whether blocks can be compiled once for all layers."""
    layout: Layout
    optimizer: torch.optim.Optimizer
    """Its ``param_groups`` hold the learning rate."""

    def __init__(self, policy: Policy, world: World) -> None:
        self.policy, self.world = policy, world

    def begin_micro_batch(self, *, last: bool) -> None:
        """To be called before each micro-batch's forward; a step follows the ``last`` one's backward."""
        del last

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, a scalar whose sum over all processes is minimised."""
        loss.backward()

    @abstractmethod
    def zero_grad(self) -> None:
        """Drop the gradients added since the last step. A strategy that is not ``repeatable`` need drop only
        gradients of 0."""

    @abstractmethod
    def step(self, max_norm: float) -> float:
        """Clip the gradients to ``max_norm``, take the optimizer step and drop the gradients.

        Returns the norm of all gradients before clipping. If it is not finite, the weights do not change.
        """

    @abstractmethod
    def moments(self, name: str) -> dict[str, Piece]:
        """What this process holds of the optimizer's state of a trained weight; {} before the first step.

        It has the same keys in every process. No other process takes part.
        """

    @abstractmethod
    def load_moments(self, moments: Mapping[str, Mapping[str, Stored]]) -> None:
        """Set the optimizer's state from stored tensors, by the weight's name. No other process takes
        part."""

    def mark_loaded(self) -> None:
        """To be called after the trained weights were loaded from a checkpoint."""
        self.layout.mark_written()

    def close(self) -> None:
        """Free what was made for this stage."""
        self.policy.model.module = self.policy.model.transformer


class TorchStrategy(Strategy):
    """A strategy whose optimizer is a torch optimizer on the trained parameters themselves."""

    def __init__(
        self, policy: Policy, world: World, layout: Layout, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(policy, world)
        self.layout, self.optimizer = layout, optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        if self.policy.masters is not None:
            self.policy.masters.add_gradients()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.policy.masters is not None:
            self.policy.masters.drop_gradients()

    def step(self, max_norm: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.policy.trained.values(), max_norm)
        # the only wait for the device in a step: gradients that are not finite must not reach the weights
        value = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()  # type: ignore[operator]
        if math.isfinite(value):
            self.optimizer.step()
            self.policy.weights_changed()
        self.zero_grad()
        return value

    def moments(self, name: str) -> dict[str, Piece]:
        parameter = self.policy.trained[name]
        state: dict[str, Any] = self.optimizer.state[parameter]
        return {key: self._piece(parameter, value) for key, value in state.items()}

    def _piece(self, parameter: nn.Parameter, value: Any) -> Piece:
        if hasattr(value, "to_local"):
            return self.layout.piece(parameter, value.to_local())
        tensor = torch.as_tensor(value)
        return Piece(tensor, tensor.shape, everywhere=True)

    def load_moments(self, moments: Mapping[str, Mapping[str, Stored]]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for i, (name, parameter) in enumerate(self.policy.trained.items()):
            if name in moments:
                state[i] = {key: self.as_moment(parameter, stored) for key, stored in moments[name].items()}
                if not isinstance(self.optimizer, torch.optim.AdamW):
                    # bitsandbytes counts its steps in an int
                    state[i]["step"] = state[i]["step"].item()  # type: ignore[assignment]
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def as_moment(self, parameter: nn.Parameter, stored: Stored) -> Tensor:
        """A copy of ``stored`` in the layout in which the optimizer keeps moments of the parameter."""
        whole = stored.whole()
        # straight to the device: the CPU's memory may not hold the moments of all weights once per process
        return whole.to(parameter.device, copy=True) if whole.shape == parameter.shape else whole.clone()
