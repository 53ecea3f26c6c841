"""The table of trainable model families, each with a small random pipeline; tests/test_families_*.py are their laws.

A family is a module ``family_NAME.py`` beside this one that has a ``FAMILY``.
"""

import atexit
import functools
import importlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from posttrain.model import Model
from posttrain.registry import discover
from posttrain.weights.hugging_face import quiet

CPU = torch.device("cpu")


def _as_they_are(model, latents):
    return latents


@dataclass(frozen=True)
class Family:
    """What the laws must know of a family."""

    type: str
    """The recipe's ``type``."""
    pipeline: Callable
    """Builds a small random diffusers pipeline of about 50 k parameters, from ``torch.manual_seed(0)``."""
    settings: dict
    """The fields of the recipe's block beside type and path."""
    sizes: tuple = ((16, 16), (32, 16))
    """(height, width) of images in pixels, all of which it can draw."""
    bad_size: tuple = (15, 16)
    """A size that it cannot draw."""
    guidance: tuple = (1.0, 4.5)
    """Scales of guidance to compare with the pipeline's own."""
    call: Callable = lambda guidance: {"guidance_scale": guidance}
    """A guidance scale -> arguments of the pipeline's call beside prompts, size, steps and latents."""
    euler: Callable = lambda pipeline, steps: {}
    """(pipeline, steps) -> arguments of its call. Puts a scheduler of Euler steps into a pipeline that has another."""
    packed: Callable = _as_they_are
    """(model, latents (n, c, h, w)) -> what the pipeline's call takes as ``latents``."""
    lora: dict = field(default_factory=dict)
    """The fields of ``tune`` beside type and rank, where the defaults do not fit the small transformer."""
    alone: bool = False
    """Whether its call draws a prompt otherwise if a longer one is drawn with it."""
    parts: Callable = lambda folder: {}
    """The folder of a pipeline -> components with which plain diffusers needs help to load it."""
    terminal: float | None = None
    """The last sigma to which the scheduler stretches its grid (``shift_terminal``)."""

    @property
    def path(self):
        return folder(self.pipeline)

    def block(self, **settings):
        kind = discover(Model, "posttrain.models")[self.type]
        return kind(path=str(self.path), **{**self.settings, **settings})

    def load(self, **settings):
        return self.block(**settings).load(CPU, "fp32")

    def draw(self, pipeline, prompts, noise, steps, guidance, size, output="pt", model=None):
        """The images (n, 3, H, W) that diffusers' own call makes of ``noise`` (n, c, h, w)."""
        if self.alone and len(prompts) > 1:
            rows = zip(prompts, noise, strict=True)
            drawn = [self.draw(pipeline, [p], n[None], steps, guidance, size, output, model) for p, n in rows]
            return torch.cat(drawn)
        pipeline.set_progress_bar_config(disable=True)
        with quiet(), torch.no_grad():
            images = pipeline(
                prompt=list(prompts),  # some pipelines change it
                num_inference_steps=steps,
                height=size[0],
                width=size[1],
                latents=self.packed(model, noise.clone()),
                output_type=output,
                **self.euler(pipeline, steps),
                **self.call(guidance),
            ).images
        if output == "pt" and images.shape[1] == 4:  # colours and alpha, on white
            images = 1 - images[:, 3:] * (1 - images[:, :3])
        return images


FAMILIES = {
    path.stem.removeprefix("family_"): importlib.import_module(path.stem).FAMILY
    for path in sorted(Path(__file__).parent.glob("family_*.py"))
}


@functools.cache
def folder(pipeline):
    """The folder of a family's small pipeline, which the function ``pipeline`` builds."""
    made = Path(tempfile.mkdtemp(prefix="posttrain-test-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    torch.manual_seed(0)
    with quiet():
        pipeline().save_pretrained(made)
    return made
