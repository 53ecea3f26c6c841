"""Where do the conditions of prompts come from: the cache, and the text encoders for what it lacks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console

from posttrain.cache.keys import digest
from posttrain.cache.store import Entry, Store, size_of
from posttrain.condition import Condition
from posttrain.model import FlowModel
from posttrain.support.progress import stage_progress

AT_ONCE = 64
"""Prompts in one call of the encoders while the cache is filled: the time between two looks at the bar."""


class PromptCache:
    """The conditions that ``model`` gives to prompts, each encoded once and kept in ``store``."""

    def __init__(self, store: Store, model: FlowModel) -> None:
        self.store, self.model = store, model

    def fill(
        self, prompts: Sequence[str], name: str, console: Console, rank: int = 0, world_size: int = 1
    ) -> None:
        """Encode what is missing of ``prompts``, of which the stage or evaluation ``name`` has need.

        The size is told first. On several processes each encodes a share. Raises PosttrainError where
        there is no room or the cache cannot be written.
        """
        distinct = {digest(prompt): prompt for prompt in ("", *prompts)}
        self.store.use(distinct)
        missing = [key for key in distinct if key not in self.store]
        size = size_of(self._entries([""], flush=False)[0], self.store.dtype)  # that of every prompt
        sizes = len(distinct) * size, len(missing) * size
        self.store.room.reserve(
            self.store.folder, f"{name}: prompts", len(distinct), len(missing), *sizes, console
        )
        # a share of all, since another process may not see the same ones missing
        if not (mine := [key for key in list(distinct)[rank::world_size] if key not in self.store]):
            self.store.flush()
            return
        with stage_progress(f"{name}: encoding prompts", len(mine), 0, console) as bar:
            for i in range(0, len(mine), AT_ONCE):
                # another process may have written some of them meanwhile
                self._encode([distinct[key] for key in mine[i : i + AT_ONCE] if key not in self.store])
                bar.update(min(i + AT_ONCE, len(mine)))
            self.store.flush()

    def conditions(self, prompts: Sequence[str]) -> Condition:
        """As :meth:`FlowModel.encode_prompts`; what is missing or damaged is encoded, and kept."""
        entries = self._entries(prompts)
        names = entries[0] if entries else ()
        return {name: torch.stack([e[name] for e in entries]).to(self.model.device) for name in names}

    def _entries(self, prompts: Sequence[str], flush: bool = True) -> list[Entry]:
        found = {prompt: self.store.read(digest(prompt)) for prompt in dict.fromkeys(prompts)}
        if lost := [prompt for prompt, entry in found.items() if entry is None]:
            self._encode(lost)
            # as it is kept, so that rounding does not depend on when a prompt was encoded
            found |= {prompt: self.store.read(digest(prompt)) for prompt in lost}
            if flush:
                self.store.flush()
        return [entry for prompt in prompts if (entry := found[prompt]) is not None]

    def _encode(self, prompts: Sequence[str]) -> None:
        if not prompts:
            return
        encoded = self.model.encode_prompts(prompts)
        for i, prompt in enumerate(prompts):
            self.store.add(digest(prompt), {name: tensor[i] for name, tensor in encoded.items()})
