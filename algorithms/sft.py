"""Supervised fine-tuning (SFT): flow matching on given images (Lipman et al. 2022, arXiv:2210.02747)."""

from __future__ import annotations

from typing import Literal

from posttrain.algorithm import Batch, Items, Tools
from posttrain.algorithms._flow_matching import FlowMatching


class SFT(FlowMatching):
    """Regress the velocity at noisy latents of the data set's images."""

    type: Literal["sft"] = "sft"

    def collect(self, batch: Batch, tools: Tools) -> Items:
        return self.base_items(batch, tools)[0]
