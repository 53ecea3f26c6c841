"""What a stage trains on: images with captions, pairs of images, or prompts."""

from posttrain.data.settings import Images

__all__ = ["Images"]
