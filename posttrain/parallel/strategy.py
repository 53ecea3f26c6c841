"""What does the update ask of a way to train in parallel?

A :class:`Parallel` is the recipe's ``parallel`` block. It makes a :class:`Strategy`, which owns the
optimizer and says how each weight lies over the processes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from posttrain.distributed.world import World
from posttrain.parallel.shares import Shares
from posttrain.policy.layout import Layout
from posttrain.registry import Spec

if TYPE_CHECKING:
    from posttrain.optim.settings import Train
    from posttrain.policy.policy import Policy


class Parallel(Spec, ABC):
    """A recipe's ``parallel`` block. Each variant has a literal ``strategy``."""

    strategy: str

    @property
    def needs_group(self) -> bool:
        """Whether it needs torch's process group even for one process."""
        return False

    def problem(self, processes: int) -> str | None:
        """Why it cannot run with that many processes on this machine; None if it can."""
        del processes
        return None

    def described(self, processes: int) -> str:
        """What is then active, in a word or two."""
        del processes
        return self.strategy

    def shares(self, processes: int) -> Shares:
        """What each of that many processes holds."""
        del processes
        return Shares()

    @abstractmethod
    def prepare(self, policy: Policy, settings: Train, world: World) -> Strategy:
        """Spread the policy's weights over the processes and make the optimizer.

        Called before the policy has roles. Raises PosttrainError where what is then active is not what the
        block says.
        """


class Strategy(ABC):
    """Gradients, optimizer and layout of one stage's training."""

    repeatable: ClassVar[bool] = False
    """Whether a step can be begun anew after a forward or backward that failed in the middle: nothing but
    gradients, which :meth:`zero_grad` removes, is then left of it."""
    layout: Layout
    optimizer: torch.optim.Optimizer
    """Its ``param_groups`` hold the learning rate."""

    def __init__(self, policy: Policy, world: World) -> None:
        self.policy, self.world = policy, world

    def begin_micro_batch(self, *, last: bool) -> None:
        """To be called before a micro-batch's forward; ``last``: a step follows its backward."""
        del last

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, which is this process's part of a sum over all processes."""
        loss.backward()

    @abstractmethod
    def zero_grad(self) -> None:
        """Forget the gradients added since the last step: if the strategy is not ``repeatable``, at least
        those of 0."""

    @abstractmethod
    def step(self, max_norm: float) -> float:
        """Clip, take the optimizer step and forget the gradients. Returns the norm of the gradients before
        clipping; where it is not finite the weights are as they were."""

    @abstractmethod
    def moments(self, name: str) -> dict[str, Tensor]:
        """The optimizer's state of a trained weight, whole; every process asks at once."""

    @abstractmethod
    def load_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        """Set the optimizer's state, from whole tensors by the weight's name."""

    def loaded(self) -> None:
        """To be called after the trained weights were written to, for a resumed run."""
        self.layout.mark_written()

    def close(self) -> None:
        """Let go of what was made for this stage."""
        self.policy.model.module = self.policy.model.transformer


class Direct(Strategy):
    """A torch optimizer on the trained parameters themselves."""

    def __init__(
        self, policy: Policy, world: World, layout: Layout, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(policy, world)
        self.layout, self.optimizer = layout, optimizer

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, max_norm: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.policy.trained.values(), max_norm)
        # the one host synchronisation of a step: a poisoned update must never reach the weights
        value = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()  # type: ignore[operator]
        if math.isfinite(value):
            self.optimizer.step()
        self.zero_grad()
        return value

    def moments(self, name: str) -> dict[str, Tensor]:
        state: dict[str, Any] = self.optimizer.state[self.policy.trained[name]]
        whole = {key: v.full_tensor() if hasattr(v, "full_tensor") else v for key, v in state.items()}
        return {key: torch.as_tensor(value) for key, value in whole.items()}

    def load_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for i, (name, parameter) in enumerate(self.policy.trained.items()):
            if name in moments:
                state[i] = {
                    # of its own: the file may hold one tensor for all, such as the number of steps
                    key: self.placed(parameter, value) if value.shape == parameter.shape else value.clone()
                    for key, value in moments[name].items()
                }
                if not isinstance(self.optimizer, torch.optim.AdamW):
                    # bitsandbytes counts in plain numbers
                    state[i]["step"] = state[i]["step"].item()  # type: ignore[assignment]
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def placed(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """``whole`` as the optimizer keeps it for that parameter."""
        del parameter
        return whole.clone()
