"""Diffusion-DPO on flow matching: learning from pairs of images (Wallace et al. 2023, arXiv:2311.12908).

The margin of a pair is -beta / 2 times what the policy's loss gained on the chosen image, less what it gained
on the rejected one, as compared with the reference; the loss is -log sigmoid(margin) (eq. 14). The paper's
factors T and omega are in beta, and losses are means over the latents' dimensions, as in its published code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from posttrain.algorithm import Batch, Items, Tools
from posttrain.algorithms._preference import Preference


class DPO(Preference):
    """Learn from given pairs of a chosen and a rejected image of one prompt."""

    type: Literal["dpo"] = "dpo"
    needs: ClassVar = "pairs"

    def as_given(self, batch: Batch) -> Batch:
        return replace(batch, fields={"rejected": -batch.latents})

    def collect(self, batch: Batch, tools: Tools) -> Items:
        return self.pair_items(batch, tools)
