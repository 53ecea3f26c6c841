"""A LoRA has the same strength in every tool, and equal adapters are equal files."""

import os
import stat

import pytest
import torch
from pipelines import load, pipeline_folder
from safetensors import safe_open
from safetensors.torch import load_file

from posttrain.errors import ModelError
from posttrain.policy.tuning import Lora
from posttrain.support.files import published
from posttrain.weights.transformer import LORA
from posttrain.weights.writing import entries_in, entries_of, write_tensors

SIGMAS = torch.tensor([0.3, 0.8])


def velocities(transformer):
    """The velocities (2, 4, 4, 4) of a diffusers transformer at fixed latents and conditions."""
    draws = torch.Generator().manual_seed(3)
    latents, embeds, pooled = (torch.randn(s, generator=draws) for s in ((2, 4, 4, 4), (2, 5, 32), (2, 32)))
    with torch.no_grad():
        return transformer(latents, embeds, pooled, 1000 * SIGMAS, return_dict=False)[0]


def trained_lora(folder, rank=4, **fields):
    """Writes a LoRA whose B is not 0 to ``folder``; returns the velocities of the policy that it is of."""
    model = load()
    Lora(rank=rank, **fields).apply(model.transformer, 0)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    model.save_lora(folder, entries_of(dict(model.transformer.named_parameters())))
    return velocities(model.transformer)


def as_comfyui_reads(file, transformer):
    """Adds the LoRA to the weights: B times A, times alpha / rank where there is an ``.alpha``, else times 1."""
    tensors = load_file(file)
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        down, up = tensors[name], tensors[f"{layer}.lora_B.weight"]
        scale = tensors[f"{layer}.alpha"] / len(down) if f"{layer}.alpha" in tensors else 1
        weight = transformer.get_submodule(layer.removeprefix("transformer.")).weight
        with torch.no_grad():
            weight += scale * up @ down


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (4, 2.5), (8, None), (2, 64.0)])
def test_one_file_has_one_strength_in_diffusers_and_in_comfyui(tmp_path, rank, alpha):
    from diffusers import StableDiffusion3Pipeline

    fields = {} if alpha is None else {"alpha": alpha}
    own, plain = trained_lora(tmp_path, rank, **fields), velocities(load().transformer)
    assert (own - plain).abs().max() > 1e-2
    model = load().transformer
    as_comfyui_reads(tmp_path / LORA, model)
    torch.testing.assert_close(velocities(model), own, rtol=1e-4, atol=1e-4)
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder())
    pipeline.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(velocities(pipeline.transformer), own, rtol=1e-4, atol=1e-4)
    config = pipeline.transformer.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (rank, rank)


def test_equal_adapters_are_equal_files(tmp_path):
    for name in ("one", "other"):
        trained_lora(tmp_path / name)
    one, other = ((tmp_path / name / LORA).read_bytes() for name in ("one", "other"))
    assert one == other


def test_a_file_does_not_depend_on_the_order_in_which_it_is_described(tmp_path):
    tensors = {"b": torch.ones(3, dtype=torch.bfloat16), "a": torch.zeros(2, 2), "c": torch.tensor(True)}
    metadata = {"z": "{}", "é": '"\n', "x": "1"}
    for name, turn in (("one", list), ("other", lambda items: list(reversed(list(items))))):
        write_tensors(
            tmp_path / name, entries_of(dict(turn(tensors.items()))), metadata=dict(turn(metadata.items()))
        )
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    with safe_open(tmp_path / "one", "pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype


def test_floats_alone_are_written_in_another_precision(tmp_path):
    tensors = {
        "w": torch.full((2, 3), 1 / 3),
        "n": torch.arange(4),
        "s": torch.tensor(0.1),
        "e": torch.empty(0, 2),
    }
    write_tensors(tmp_path / "x.safetensors", entries_of(tensors), torch.float16)
    read = load_file(tmp_path / "x.safetensors")
    assert {n: t.dtype for n, t in read.items()} == {
        "w": torch.float16, "n": torch.int64, "s": torch.float16, "e": torch.float16
    }  # fmt: skip
    assert torch.equal(read["w"], tensors["w"].half())
    assert {n: e.shape for n, e in entries_in([tmp_path / "x.safetensors"]).items()} == {
        n: t.shape for n, t in tensors.items()
    }
    torch.save(tensors, tmp_path / "x.bin")
    assert torch.equal(entries_in([tmp_path / "x.bin"])["w"].read(), tensors["w"])


def test_a_weight_that_does_not_fit_the_precision_leaves_no_file(tmp_path):
    with pytest.raises(
        ModelError, match=r"as torch\.float16: 1 not finite \(a\); 1 too large.*\(b\)\. The largest"
    ):
        write_tensors(
            tmp_path / "x",
            entries_of({"a": torch.tensor([float("nan")]), "b": torch.tensor([1e9]), "c": torch.ones(1)}),
            torch.float16,
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_published_files_are_readable_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        with published(tmp_path / "made") as folder:
            (folder / "parts").mkdir()
            (folder / "parts" / "weights").write_bytes(b"")
            (folder / "parts" / "weights").chmod(0o600)  # as files are that a library made and renamed
    finally:
        os.umask(before)
    mode = (tmp_path / "made" / "parts" / "weights").stat().st_mode
    assert stat.S_IMODE(mode) == 0o666 & ~umask
