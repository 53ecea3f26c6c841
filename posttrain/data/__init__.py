"""What a stage learns from: images with captions, rendered shapes, or prompts.

Only the specs are imported here, so that a recipe is read without torch.
"""

from posttrain.data.settings import AnyData, Data, Images, PromptData, ShapesData, with_type

__all__ = ["AnyData", "Data", "Images", "PromptData", "ShapesData", "with_type"]
