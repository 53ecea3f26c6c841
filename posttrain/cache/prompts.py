"""Reads the conditions of prompts from the cache, and encodes prompts that it lacks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console

from posttrain.cache.keys import digest
from posttrain.cache.room import Demand
from posttrain.cache.store import Entry, Store, size_of
from posttrain.condition import Condition
from posttrain.flow_model import FlowModel, conditions_of
from posttrain.support.progress import stage_progress

PROMPT_ENCODE_BATCH = 64
"""Prompts encoded between two updates of the progress bar. The encodings do not depend on it."""


class PromptCache:
    """The conditions that ``model`` gives to prompts. Each prompt is encoded once and kept in ``store``."""

    def __init__(self, store: Store, model: FlowModel) -> None:
        self.store, self.model = store, model

    def fill(
        self, prompts: Sequence[str], name: str, console: Console, rank: int = 0, world_size: int = 1
    ) -> None:
        """Encode those of ``prompts``, and the empty prompt, that the store lacks.

        ``name`` is the stage or evaluation that needs them. The size is printed first. On several processes
        each encodes a share. Raises PosttrainError if there is no room or the cache cannot be written.
        """
        distinct = {digest(prompt): prompt for prompt in ("", *prompts)}
        self.store.use(distinct)
        missing = [key for key in distinct if key not in self.store]
        size = size_of(self._entries([""], flush=False)[0], self.store.dtype)  # equal for all prompts
        demand = Demand(
            f"{name}: prompts", len(distinct), len(missing), len(distinct) * size, len(missing) * size
        )
        self.store.room.reserve(self.store.folder, demand, console)
        # Shares are of all prompts, because processes may disagree on which are missing.
        if not (share := [key for key in list(distinct)[rank::world_size] if key not in self.store]):
            self.store.flush()
            return
        with stage_progress(f"{name}: encoding prompts", len(share), 0, console) as bar:
            for i in range(0, len(share), PROMPT_ENCODE_BATCH):
                # another process may have written some of them meanwhile
                batch = [key for key in share[i : i + PROMPT_ENCODE_BATCH] if key not in self.store]
                self._encode([distinct[key] for key in batch])
                bar.update(min(i + PROMPT_ENCODE_BATCH, len(share)))
            self.store.flush()

    def conditions(self, prompts: Sequence[str]) -> Condition:
        """As :meth:`FlowModel.encode_prompts`. Missing and damaged entries are encoded and kept."""
        entries = self._entries(prompts)
        names = entries[0] if entries else ()
        return {name: torch.stack([e[name] for e in entries]).to(self.model.device) for name in names}

    def _entries(self, prompts: Sequence[str], flush: bool = True) -> list[Entry]:
        entries = {prompt: self.store.read(digest(prompt)) for prompt in dict.fromkeys(prompts)}
        if missing := [prompt for prompt, entry in entries.items() if entry is None]:
            self._encode(missing)
            # Read them back, so that rounding does not depend on when a prompt was encoded.
            entries |= {prompt: self.store.read(digest(prompt)) for prompt in missing}
            if flush:
                self.store.flush()
        return [entry for prompt in prompts if (entry := entries[prompt]) is not None]

    def _encode(self, prompts: Sequence[str]) -> None:
        if not prompts:
            return
        encoded = conditions_of(self.model, prompts)
        for i, prompt in enumerate(prompts):
            entry = {name: tensor[i] for name, tensor in encoded.items()}
            self.store.add(digest(prompt), entry, f"the prompt {prompt[:60]!r}")
