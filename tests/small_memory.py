"""A memory that is too small for a run, and what the run remembers of it."""

import json

import torch

from posttrain.models.sd3 import SD3FlowModel


def no_room_for(rows, monkeypatch):
    """Let the SD3 model have memory for less than so many rows with gradients."""
    velocity = SD3FlowModel.velocity

    def limited(self, latents, sigma, condition):
        if torch.is_grad_enabled() and len(latents) >= rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return velocity(self, latents, sigma, condition)

    monkeypatch.setattr(SD3FlowModel, "velocity", limited)


def remembered(folder):
    return json.loads((folder / "sft" / "micro_batch.json").read_text())["micro_batch"]
