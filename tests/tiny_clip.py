"""A tiny random CLIP in the published layout, and its tokenizer alone, for rewards that load real ones."""

import json
import string
from pathlib import Path

import torch

LETTERS = [*string.ascii_lowercase, *(c + "</w>" for c in string.ascii_lowercase)]
VOCABULARY = [*LETTERS, "<|startoftext|>", "<|endoftext|>"]
END = len(VOCABULARY) - 1


def tiny_tokenizer(folder: Path) -> Path:
    """``folder`` with a CLIP tokenizer that spells every word."""
    from transformers import CLIPTokenizer

    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(VOCABULARY)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def tiny_clip(folder: Path, image_size: int = 32) -> Path:
    """``folder`` with weights, tokenizer and image preprocessing, as a hub repository has them."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tiny_tokenizer(folder)
    side = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=side).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": END + 1, "bos_token_id": END - 1, "eos_token_id": END}
    vision = {**sizes, "image_size": image_size, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    return folder
