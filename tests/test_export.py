"""Every format that a stage is exported in draws what the stage draws."""

import json
import re
import shutil

import pytest
import torch
from pipelines import load, pipeline_folder
from runs import TRAIN, recipe, run_quietly, stage
from safetensors import safe_open
from safetensors.torch import load_file
from test_lora_strength import velocities
from test_single_file import read_back, transformer_in_one_file

from posttrain.errors import ModelError, PosttrainError
from posttrain.stages.artifact import open_artifact
from posttrain.stages.export import export, trained_at
from posttrain.weights.files import headers
from posttrain.weights.transformer import LORA

CPU = torch.device("cpu")
SHORT = TRAIN.replace("steps: 6", "steps: 2").replace("1e-3", "3e-2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a LoRA, another one on top of it, and full fine-tuning from the base."""
    folder = tmp_path_factory.mktemp("export") / "small"
    stages = (
        stage("one", train=SHORT, tune="{type: lora, rank: 2, alpha: 5}"),
        stage("two", train=SHORT, tune="{type: lora, rank: 3, targets: [attn.to_k, attn.to_out.0, attn.add_q_proj, norm_out.linear]}"),
        stage("full", train=SHORT, start_from="base", export_dtype="bf16"),
    )  # fmt: skip
    run_quietly(recipe(*stages), folder)
    return folder


def of_stage(folder):
    """The velocities of what a stage trained, adapters merged."""
    return velocities(open_artifact(str(folder), CPU)[0].transformer)


def base_in_one_file():
    """The single-file tensors of the transformer of the base, without the prefix."""
    return {
        n.removeprefix("model.diffusion_model."): t
        for n, t in transformer_in_one_file(load().transformer).items()
    }


def of_one_file(original):
    """The velocities of the transformer whose single-file tensors are ``original``, read by diffusers."""
    transformer = load().transformer
    transformer.load_state_dict(read_back(original))
    return velocities(transformer)


def place(layer):
    """ComfyUI's map of diffusers' names (``mmdit_to_diffusers``): a layer, and its third where it has q, k, v."""
    if layer == "norm_out.linear":
        return "final_layer.adaLN_modulation.1", None
    block, inner = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer).groups()
    side = "context_block" if "add_" in inner else "x_block"
    third = {"q": 0, "k": 1, "v": 2}.get(re.sub(r"attn\.(to|add)_(\w)(_proj)?$", r"\2", inner))
    return f"joint_blocks.{block}.{side}.attn." + ("proj" if third is None else "qkv"), third


def as_comfyui_reads(file, original):
    """Adds the LoRA in ``file`` to the single-file tensors ``original``: scale 1 where there is no ``.alpha``."""
    tensors = load_file(file)
    for name in [n for n in tensors if n.endswith((".lora_A.weight", ".lora_down.weight"))]:
        layer, kohya = re.sub(r"\.lora_(A|down)\.weight$", "", name), ".lora_down." in name
        up = tensors[name.replace("lora_down", "lora_up").replace("lora_A", "lora_B")]
        scale = tensors[f"{layer}.alpha"] / len(tensors[name]) if f"{layer}.alpha" in tensors else 1
        change, third = scale * up @ tensors[name], None
        if kohya:
            names = {
                "lora_unet_" + n.removesuffix(".weight").replace(".", "_"): n.removesuffix(".weight")
                for n in original
            }
            layer = names[layer]
        else:
            layer, third = place(layer.removeprefix("transformer."))
            if layer.startswith("final_layer"):
                change = change.roll(len(change) // 2, 0)
        weight = original[f"{layer}.weight"]
        weight = weight if third is None else weight.chunk(3)[third]
        assert weight.shape == change.shape
        weight += change
    return original


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_lora_draws_the_same_in_every_format(run, tmp_path, name):
    """Also one that was trained on top of another: they are joined into one file."""
    from diffusers import StableDiffusion3Pipeline

    own, trained = of_stage(run / name), trained_at(str(run / name))
    assert (own - velocities(load().transformer)).abs().max() > 1e-2
    close = {"rtol": 1e-4, "atol": 1e-4}
    for kind in ("lora", "comfyui", "kohya", "merged"):
        assert export(trained, tmp_path / kind, kind) == kind
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder())
    pipeline.load_lora_weights(str(tmp_path / "lora"))
    torch.testing.assert_close(velocities(pipeline.transformer), own, **close)
    for file in (
        tmp_path / "lora" / LORA,
        tmp_path / "comfyui" / f"small-{name}.safetensors",
        tmp_path / "kohya" / f"small-{name}-kohya.safetensors",
    ):
        torch.testing.assert_close(of_one_file(as_comfyui_reads(file, base_in_one_file())), own, **close)
    assert not any("alpha" in n for n in load_file(tmp_path / "lora" / LORA)), "diffusers refuses it"
    merged = StableDiffusion3Pipeline.from_pretrained(tmp_path / "merged").transformer
    torch.testing.assert_close(velocities(merged), own, **close)
    for kind in ("lora", "merged"):
        torch.testing.assert_close(of_stage(tmp_path / kind), own, **close)


def test_kohya_states_its_ranks(run, tmp_path):
    export(trained_at(str(run / "one")), tmp_path / "k", "kohya", "fp16")
    file = tmp_path / "k" / "small-one-kohya.safetensors"
    tensors = load_file(file)
    layer = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert tensors[f"{layer}.lora_down.weight"].shape == (6, 16)
    assert tensors[f"{layer}.lora_up.weight"].shape == (48, 6)
    assert tensors[f"{layer}.alpha"] == 6
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_network_module"] == "networks.lora_sd3"
        assert opened.metadata()["ss_network_dim"] == opened.metadata()["ss_network_alpha"] == "2"


def test_full_tuning_is_exported_exactly_or_as_it_was_published(run, tmp_path):
    trained = trained_at(str(run))  # its last stage
    assert trained.final == run / "full" / "final"
    assert export(trained, tmp_path / "same") == "diffusers"
    files = {p.relative_to(trained.final) for p in trained.final.rglob("*.safetensors")}
    for file in files:
        assert (tmp_path / "same" / file).read_bytes() == (trained.final / file).read_bytes()
    export(trained, tmp_path / "fp32", "diffusers", "fp32")
    exact = load_file(run / "full" / "exact" / "transformer" / "diffusion_pytorch_model.safetensors")
    written = load_file(tmp_path / "fp32" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(written[n], exact[n]) for n in exact)
    assert headers(tmp_path / "fp32" / "vae") == headers(pipeline_folder() / "vae")


@pytest.mark.parametrize(("dtype", "folder"), [(None, "final"), ("fp32", "exact")])
def test_a_full_model_for_comfyui_is_one_file_with_the_autoencoder(run, tmp_path, dtype, folder):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    trained = trained_at(str(run / "full"))
    export(trained, tmp_path / "c", "comfyui", dtype)
    tensors = load_file(tmp_path / "c" / "small-full.safetensors")
    own = load_file(run / "full" / folder / "transformer" / "diffusion_pytorch_model.safetensors")
    found = read_back({n: t for n, t in tensors.items() if n.startswith("model.diffusion_model.")})
    assert all(torch.equal(found[n], own[n]) for n in own)
    vae = load_file(trained.final / "vae" / "diffusion_pytorch_model.safetensors")
    config = json.loads((trained.final / "vae" / "config.json").read_text())
    first = {n: t for n, t in tensors.items() if n.startswith("first_stage_model.")}
    found = convert_ldm_vae_checkpoint(first, config)
    assert all(torch.equal(found[n], vae[n].to(found[n].dtype)) for n in vae)
    assert len(tensors) == len(first) + len([n for n in tensors if n.startswith("model.diffusion_model.")])


FAULTS = [
    (
        "full",
        "kohya",
        r"'kohya' does not fit: .* is full fine-tuning, which has the formats diffusers, comfyui",
    ),
    ("full", "merged", "'merged' does not fit"),
    ("full", "lora", "'lora' does not fit"),
    ("one", "diffusers", "is a LoRA, which has the formats lora, merged, comfyui, kohya"),
]


@pytest.mark.parametrize(("name", "kind", "words"), FAULTS)
def test_a_format_that_does_not_fit_is_one_clear_error(run, tmp_path, name, kind, words):
    with pytest.raises(ModelError, match=words):
        export(trained_at(str(run / name)), tmp_path / "x", kind)
    assert not any(tmp_path.iterdir())


def test_what_is_there_is_kept_unless_it_is_an_export_and_told_to_go(run, tmp_path):
    trained = trained_at(str(run / "one"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(
        PosttrainError, match="holds 1 file, and no export, so it is not overwritten: give another"
    ):
        export(trained, tmp_path / "mine")
    with pytest.raises(PosttrainError, match="and no export, so it is not overwritten"):
        export(trained, tmp_path / "mine", overwrite=True)
    with pytest.raises(PosttrainError, match="is a file"):
        export(trained, tmp_path / "mine" / "thesis.tex", overwrite=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "thesis.tex"]
    own = shutil.copytree(run / "one", tmp_path / "one")
    with pytest.raises(PosttrainError, match="and no export, so it is not overwritten"):
        export(trained_at(str(own)), own / "final", "kohya", overwrite=True)
    assert (own / "final" / LORA).read_bytes() == (run / "one" / "final" / LORA).read_bytes()
    export(trained, tmp_path / "made")
    with pytest.raises(PosttrainError, match="--overwrite"):
        export(trained, tmp_path / "made", "kohya")
    export(trained, tmp_path / "made", "kohya", overwrite=True)
    assert (tmp_path / "made" / "small-one-kohya.safetensors").is_file()
    assert not (tmp_path / "made" / LORA).exists()


def test_a_stages_folder_may_have_another_name_and_several_files(run, tmp_path):
    """As that of a class of the user's has, of more than 10 GB."""
    final = shutil.copytree(run / "full", tmp_path / "mine") / "final"
    for shard in ("one.safetensors", "two.safetensors"):
        shutil.copy(run / "one" / "final" / LORA, final / shard)
    export(trained_at(str(tmp_path / "mine")), tmp_path / "x")
    assert len(list((tmp_path / "x").glob("*.safetensors"))) == 2
    assert (tmp_path / "x" / "README.md").read_bytes() == (final / "README.md").read_bytes()


@pytest.mark.parametrize("kind", ["diffusers", "comfyui"])
def test_a_file_that_was_cut_off_is_named_and_not_exported(run, tmp_path, kind):
    file = shutil.copytree(run, tmp_path / "cut") / "full/final/vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ModelError, match=r"full/final/vae/diffusion_pytorch_model\.safetensors'"):
        export(trained_at(str(tmp_path / "cut" / "full")), tmp_path / "x", kind)
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_exported_is_named(run, tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        trained_at(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="neither a run nor a finished stage"):
        trained_at(str(pipeline_folder()))
    cut = shutil.copytree(run, tmp_path / "cut")
    shutil.rmtree(cut / "full" / "final")
    with pytest.raises(ModelError, match=r"last stage of the run .* is not finished: give .*cut/two"):
        trained_at(str(cut))
    with pytest.raises(ModelError, match=r"^the stage .* is not finished: only finished stages are exported"):
        trained_at(str(cut / "full"))
    checkpoint = next((cut / "full" / "checkpoints").iterdir())
    with pytest.raises(ModelError, match=r"is a checkpoint: only finished stages are exported"):
        trained_at(str(checkpoint))
    stage_, broken = json.loads((cut / "one" / "final" / "posttrain.json").read_text()), cut / "one" / "final"
    (broken / "posttrain.json").write_text(json.dumps({**stage_, "model": {"type": "tiny_sd3"}}))
    with pytest.raises(
        ModelError, match="'kohya' does not fit: no layout of a single file is known for 'tiny_sd3'"
    ):
        export(trained_at(str(cut / "one")), tmp_path / "x", "kohya")
