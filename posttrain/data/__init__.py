"""What a stage trains on: images with captions, rendered shapes, or prompts.

Only the settings are imported here, so that reading a recipe does not import torch.
"""

from posttrain.data.settings import AnyData, Data, Images, PromptData, ShapesData, with_type

__all__ = ["AnyData", "Data", "Images", "PromptData", "ShapesData", "with_type"]
