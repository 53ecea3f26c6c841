"""Stable Diffusion 3 in the table of families."""

from families import Family
from pipelines import pipeline_folder


def pipeline():
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(pipeline_folder())


FAMILY = Family(
    type="sd3",
    pipeline=pipeline,
    settings={"max_sequence_length": 16},
    call=lambda guidance: {"guidance_scale": guidance, "max_sequence_length": 16},
)
