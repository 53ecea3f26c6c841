"""The data that give prompts, for algorithms that sample their own images."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.data.batches import PromptBatchSource
from posttrain.data.family import Data, Facts, Opening
from posttrain.data.prompts import distinct_prompts
from posttrain.data.settings import AnyPrompts
from posttrain.data.source import BatchSource
from posttrain.flow.sampling_settings import MAX_SIDE


class PromptData(Data):
    """Prompts, for algorithms that train on their own samples."""

    type: Literal["prompts"] = "prompts"
    gives: ClassVar = "prompts"
    prompts: AnyPrompts
    """Prompts to sample images for: a file's path, or ``{type: shapes, count: N}``."""
    resolution: Annotated[int, Field(ge=8, le=MAX_SIDE)] = 512
    """Side of the sampled images in pixels; they are square."""

    def open(self, opening: Opening) -> BatchSource:
        return PromptBatchSource(self.prompts, self.resolution, opening)

    def facts(self, path: str) -> Facts:
        return Facts((self.resolution, self.resolution), distinct_prompts(self.prompts))

    def in_words(self) -> str:
        return f"{self.prompts.in_words()} at {self.resolution} px"
