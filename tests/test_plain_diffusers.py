"""What a stage wrote runs in plain diffusers without further arguments, and later stages start from it exactly."""

import json
import shutil

import pytest
import torch
from pipelines import load, pipeline_folder
from runs import HEAD, TRAIN, recipe, run_quietly, stage
from safetensors.torch import load_file, save_file

from posttrain.errors import ModelError
from posttrain.weights.files import headers
from posttrain.weights.pipeline_folder import ASSETS

NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def cast(folder, dtypes):
    """Writes the networks of the pipeline in ``folder`` again, in ``dtypes`` by name."""
    for name, dtype in dtypes.items():
        (file,) = (folder / name).glob("*.safetensors")
        save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
        if name.startswith("text_encoder"):
            config = folder / name / "config.json"
            content = {**json.loads(config.read_text()), "dtype": str(dtype).removeprefix("torch.")}
            config.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A pipeline as they are published: the transformer in bf16, encoders in fp16 and bf16, the VAE in fp32."""
    folder = tmp_path_factory.mktemp("base") / "mixed"
    shutil.copytree(pipeline_folder(), folder)
    half, brain = torch.float16, torch.bfloat16
    cast(
        folder, {"transformer": brain, "text_encoder": half, "text_encoder_2": brain, "text_encoder_3": half}
    )
    return folder


def drawn(folder, side=16, steps=2, **arguments):
    """A small image that plain diffusers draws with the pipeline in ``folder``."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": side, "width": side, "num_inference_steps": steps, "max_sequence_length": 16}
    draws = torch.Generator().manual_seed(0)
    return pipeline("a red circle", generator=draws, output_type="np", **size).images[0]


def dtypes_in(folder):
    """The kinds of floats in the files of each network of the pipeline in ``folder``."""
    return {kind for name in NETWORKS for kind, _ in headers(folder / name).values() if "F" in kind}


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", "F32"), ("bf16", "BF16"), ("fp16", "F16")])
def test_an_export_has_one_precision_and_draws_without_arguments(mixed, tmp_path, dtype, kind):
    with pytest.raises(RuntimeError, match="should be the same"):
        drawn(mixed)
    load(mixed).save(tmp_path / "final", dtype, {})
    assert dtypes_in(tmp_path / "final") == {kind}
    image = drawn(tmp_path / "final")
    assert image.std() > 0.01
    lowered = drawn(tmp_path / "final", torch_dtype=torch.bfloat16)
    assert abs(image - lowered).mean() < 0.1
    exact = drawn(mixed, torch_dtype=torch.float32)
    assert abs(image - exact).max() < (1e-5 if dtype == "fp32" else 0.1)


def test_the_shipped_model_draws_in_plain_diffusers_without_arguments():
    image = drawn(ASSETS / "tiny-sd3", 64, 10)
    red = image[..., 0] - image[..., 1:].max(-1)
    assert 0.02 < (red > 0.4).mean() < 0.5, "a circle, and not the background, is red"
    assert dtypes_in(ASSETS / "tiny-sd3") == {"F16"}


def test_shards_and_files_of_torch_become_one_file(mixed, tmp_path):
    base = shutil.copytree(mixed, tmp_path / "base")
    state = load_file(base / "text_encoder" / "model.safetensors")
    names = sorted(state)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    (base / "text_encoder" / "model.safetensors").unlink()
    for file, own in parts.items():
        save_file({n: state[n] for n in own}, base / "text_encoder" / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, own in parts.items() for n in own}}
    (base / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    load(base).save(tmp_path / "final", "fp32", {})
    assert sorted(p.name for p in (tmp_path / "final" / "text_encoder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    written = load_file(tmp_path / "final" / "text_encoder" / "model.safetensors")
    assert all(torch.equal(written[n], state[n].float()) for n in names)
    assert written.keys() == state.keys()


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("way", ["safetensors", "torch"])
def test_what_is_written_of_a_component_is_what_was_loaded(mixed, tmp_path, way, dtype):
    """Folders that were saved again keep an old index, and have other precisions and files of training."""
    base = shutil.copytree(mixed, tmp_path / "base")
    encoder = base / "text_encoder"
    state = load_file(encoder / "model.safetensors")
    others = {n: t + 1 for n, t in state.items()}
    if way == "safetensors":
        save_file(others, encoder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
        (encoder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (encoder / "model.safetensors").unlink()
        save_file(others, encoder / "model.fp16.safetensors", metadata={"format": "pt"})
        torch.save(state, encoder / "pytorch_model.bin")
        torch.save(others, encoder / "pytorch_model.fp16.bin")
        torch.save({"arguments": object}, encoder / "training_args.bin")
    load(base).save(tmp_path / "final", dtype, {})
    for folder in (base, tmp_path / "final"):
        loaded = load(folder).pipeline.text_encoder.state_dict()
        assert all(torch.equal(loaded[n], t.float()) for n, t in state.items())


def test_a_component_that_overflows_is_named(mixed, tmp_path):
    base = shutil.copytree(mixed, tmp_path / "base")
    state = load_file(base / "vae" / "diffusion_pytorch_model.safetensors")
    state["decoder.conv_out.bias"][0] = 1e6
    save_file(state, base / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"as torch\.float16: 1 too large for the precision \(decoder\.conv_out"
    ):
        load(base).save(tmp_path / "final", "fp16", {})


def chain(base, *overrides):
    head = HEAD.replace(str(pipeline_folder()), str(base))
    short = TRAIN.replace("steps: 6", "steps: 2")
    lora = "{type: lora, rank: 2, before: stack}"
    stages = (stage("full", train=short), stage("lora", train=short, tune=lora))
    return recipe(*stages, head=head, overrides=overrides)


def test_later_stages_start_from_the_exact_weights_whatever_is_exported(mixed, tmp_path):
    """The default exports bf16 here, since the base has it."""
    folders = {"auto": tmp_path / "auto", "fp32": tmp_path / "fp32"}
    for dtype, folder in folders.items():
        run_quietly(chain(mixed, f"stages.full.export_dtype={dtype}"), folder)
    exact = load_file(folders["fp32"] / "full" / "final" / WEIGHTS)
    kept = load_file(folders["auto"] / "full" / "exact" / WEIGHTS)
    rounded = load_file(folders["auto"] / "full" / "final" / WEIGHTS)
    assert dtypes_in(folders["auto"] / "full" / "final") == {"BF16"}
    for name, tensor in exact.items():
        assert torch.equal(kept[name], tensor)
        assert torch.equal(rounded[name], tensor.bfloat16())
    assert not (folders["fp32"] / "full" / "exact").exists()
    lora = "lora/final/pytorch_lora_weights.safetensors"
    assert (folders["auto"] / lora).read_bytes() == (folders["fp32"] / lora).read_bytes()

    from posttrain.stages.artifact import open_artifact

    opened = [open_artifact(str(f / "lora"), torch.device("cpu"))[0].transformer for f in folders.values()]
    one, other = (dict(transformer.named_parameters()) for transformer in opened)
    assert all(torch.equal(one[name], other[name]) for name in one)
    shutil.rmtree(folders["auto"] / "full" / "exact")
    text = run_quietly(chain(mixed), folders["auto"])
    assert "exact' holds no weights; what the stage wrote is made again from its checkpoint of step 2" in text
    assert all(
        torch.equal(t, exact[n]) for n, t in load_file(folders["auto"] / "full" / "exact" / WEIGHTS).items()
    )
    run_quietly(chain(mixed, "stages.full.export_dtype=fp32"), folders["auto"])
    assert not (folders["auto"] / "full" / "exact").exists()
    assert all(
        torch.equal(t, exact[n]) for n, t in load_file(folders["auto"] / "full" / "final" / WEIGHTS).items()
    )
