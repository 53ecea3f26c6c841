"""What does not fit a model family is one error that names file and field, before a weight is moved."""

import json
import os
import re
import shutil

import pytest
import torch
from families import FAMILIES
from runs import EVALUATION, recipe, run_quietly, stage
from test_families_training import head, lora, made

from posttrain.errors import ModelError, RecipeError
from posttrain.models import _diffusers
from posttrain.policy.tuning import Lora
from posttrain.stages.artifact import open_artifact
from posttrain.weights.transformer import LORA
from posttrain.weights.writing import entries_of

UNKNOWN = {
    "aura_flow": ("out_channels", 8), "flux": ("patch_size", 2), "flux2_klein": ("guidance_embeds", True),
    "lumina2": ("out_channels", 8), "qwen_image": ("zero_cond_t", True), "qwen_image_21": ("patch_size", 2),
    "sana": ("guidance_embeds", True), "sd3": ("out_channels", 8), "z_image": ("siglip_feat_dim", 8),
}  # fmt: skip
"""Family -> a setting of its transformer, and a value of which the class here knows nothing."""
WIDTHS = "block_out_channels", "encoder_block_out_channels", "dim_mult"
"""Settings of autoencoders that have the width of each level."""


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def family(name):
    return FAMILIES[name]


@pytest.fixture
def other(name):
    """A family whose networks have other layers."""
    return FAMILIES["flux" if name == "z_image" else "z_image"]


@pytest.fixture
def folder(family, tmp_path):
    """The family's pipeline; its files are links, each to be replaced whole."""
    return shutil.copytree(family.path, tmp_path / "copy", copy_function=os.link)


@pytest.fixture
def no_weights(monkeypatch):
    """Lets no weight be read."""
    monkeypatch.setattr(_diffusers, "load_pipeline", lambda *given: pytest.fail("weights were read"))


def rewritten(file, **fields):
    content = json.loads(file.read_text("utf-8")) | fields
    file.unlink()
    file.write_text(json.dumps(content), "utf-8")


def block(family, folder):
    return type(family.block())(path=str(folder), **family.settings)


def refusal(family, folder):
    """What is said of ``folder`` by ``posttrain check``, and where it is loaded."""
    with pytest.raises(ModelError) as found:
        block(family, folder).load(torch.device("cpu"), "fp32")
    said = block(family, folder).unfit() or "nothing"
    assert said.startswith(str(found.value))
    return said


def test_a_pipeline_of_another_class(family, other):
    kind = json.loads((other.path / "model_index.json").read_text("utf-8"))["_class_name"]
    with pytest.raises(RecipeError, match=rf"small\.yaml:\d+: model\.path: .*\b{kind}\b"):
        recipe(stage("s"), head=head(family).replace(str(family.path), str(other.path)))


def test_a_revision_of_what_is_no_hub_repository(family):
    with pytest.raises(RecipeError, match=r"model\.revision.*v2.*: has no effect: only a hub repository"):
        recipe(stage("s"), head=head(family), overrides=["model.revision=v2"])


def test_a_missing_component(family, folder, no_weights):
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    for part in (name for name in index if (folder / name).is_dir()):
        (folder / part).rename(folder / "away")
        with pytest.raises(RecipeError, match=rf"model\.path: .* lacks the folder {part}\b"):
            recipe(stage("s"), head=head(family).replace(str(family.path), str(folder)))
        (folder / "away").rename(folder / part)
        if part != "text_encoder_3":  # SD3 may lack it
            rewritten(folder / "model_index.json", **{**index, part: [None, None]})
            said = refusal(family, folder)
            assert said.startswith(f"'{folder / 'model_index.json'}' names no {part}, which a")
            rewritten(folder / "model_index.json", **index)


def test_a_transformer_of_another_class(family, other, folder, no_weights):
    config, index = folder / "transformer" / "config.json", folder / "model_index.json"
    kind, own = (
        json.loads((path / "model_index.json").read_text("utf-8"))["transformer"][1]
        for path in (other.path, folder)
    )
    rewritten(config, _class_name=kind)
    assert refusal(family, folder).startswith(f"'{config}': _class_name is {kind}; a ")
    rewritten(index, transformer=["diffusers", kind])
    said = refusal(family, folder)
    assert said.startswith(f"'{index}': the transformer's class is {kind}; a ")
    assert said.endswith(f" has a {own}")


def test_a_scheduler_that_is_for_other_models_or_lacks_a_number(name, family, folder, no_weights):
    index, config = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
    own = json.loads(index.read_text("utf-8"))["scheduler"]
    rewritten(index, scheduler=["diffusers", "DDIMScheduler"])
    said = refusal(family, folder)
    assert said.startswith(
        f"'{index}': the scheduler's class is DDIMScheduler; rectified flow needs one with "
    )
    rewritten(index, scheduler=own)
    original = json.loads(config.read_text("utf-8"))
    config.unlink()
    config.write_text("{}", "utf-8")
    assert (block(family, folder).unfit() or "").startswith(f"'{config}' has no ")
    config.write_text(json.dumps(original), "utf-8")
    dynamic = {"use_dynamic_shifting": True, "base_shift": None}
    for changed, words in (
        *([] if name in ("aura_flow", "lumina2") else [(dynamic, "base_shift is None; a number is needed")]),
        ({"shift": "three"}, ""),  # some schedulers compute with it when they are made
    ):
        rewritten(config, **changed)
        said = block(family, folder).unfit() or "nothing"
        assert said.startswith("scheduler/scheduler_config.json")
        assert words in said
        config.write_text(json.dumps(original), "utf-8")
    assert block(family, folder).unfit() is None


def test_weights_that_are_not_what_the_configuration_says(name, family, folder, no_weights):
    for part, field in (("transformer", "n_layers" if name == "z_image" else "num_layers"), ("vae", None)):
        config = folder / part / "config.json"
        original = config.read_text("utf-8")
        if field is None:
            field = next(key for key in WIDTHS if key in json.loads(original))
            changed = [2 * width for width in json.loads(original)[field]]
        else:
            field = field if field in json.loads(original) else "num_mmdit_layers"
            changed = json.loads(original)[field] + 1
        rewritten(config, **{field: changed})
        said = block(family, folder).unfit() or "nothing"
        assert said.startswith(f"the weights in '{folder / part}' do not fit its config.json: ")
        assert re.search(r"\d+ missing \(\w+\.|\d+ of another shape \(\w+\.", said)
        with pytest.raises(ModelError):
            open_artifact(str(folder), torch.device("cpu"))
        config.write_text(original, "utf-8")
    assert block(family, folder).unfit() is None


def test_an_index_that_does_not_say_what_a_component_is(family, folder, no_weights):
    index = folder / "model_index.json"
    for value in ("AutoencoderKL", ["AutoencoderKL"], None):
        rewritten(index, vae=value)
        said = block(family, folder).unfit() or "nothing"
        assert said.startswith(f"'{index}': vae is {value!r}; its library and its class are needed")
    for value, words in ((None, "it has no _class_name"), (["a"], r"its _class_name is \['a'\]")):
        rewritten(index, _class_name=value)
        with pytest.raises(RecipeError, match=rf"model_index.json' names no class of pipelines: {words}$"):
            recipe(stage("s"), head=head(family).replace(str(family.path), str(folder)))


def test_an_autoencoder_that_does_not_say_its_scale(name, family, folder):
    config = folder / "vae" / "config.json"
    if "scaling_factor" not in json.loads(config.read_text("utf-8")):
        pytest.skip("its latents have a mean and a deviation for each channel")
    for value in (None, 0, True):
        rewritten(config, scaling_factor=value)
        said = block(family, folder).unfit()
        assert said == f"vae/config.json: scaling_factor is {value}; a number above 0 is needed"


def test_rotary_positions_that_are_not_as_wide_as_a_head(name, family, folder):
    config = folder / "transformer" / "config.json"
    if "axes_dims_rope" not in json.loads(config.read_text("utf-8")) or name == "qwen_image_21":
        pytest.skip("diffusers checks them itself, or it has none")
    rewritten(config, axes_dims_rope=[4, 4, 4, 2])
    said = block(family, folder).unfit() or "nothing"
    assert said.startswith("transformer/config.json: axes_dims_rope is [4, 4, 4, 2], together 14, but ")


def test_a_run_says_before_it_reads_weights_what_check_says(family, folder, no_weights, tmp_path):
    rewritten(folder / "scheduler" / "scheduler_config.json", use_karras_sigmas=True)
    unfit = recipe(stage("s"), head=head(family).replace(str(family.path), str(folder)))
    with pytest.raises(
        ModelError, match=r"^model\.path: scheduler/scheduler_config\.json: use_karras_sigmas is"
    ):
        run_quietly(unfit, tmp_path / "run")


def test_a_configuration_of_the_transformer_that_is_not_known(name, family, folder):
    field, value = UNKNOWN[name]
    config = folder / "transformer" / "config.json"
    channels = json.loads(config.read_text("utf-8"))["in_channels"]
    for changed, words in (
        ({field: value}, rf"transformer/config\.json: {field} is {value}"),
        (
            {"tomorrow": 8},
            r"transformer/config\.json': tomorrow is 8, and \w+ of diffusers \S+ has no such setting",
        ),
        ({"in_channels": 2 * channels}, rf"vae does not fit: .*\bin_channels is .*\b{2 * channels}\b"),
    ):
        original = config.read_text("utf-8")
        rewritten(config, **changed)
        assert re.search(words, block(family, folder).unfit() or "nothing")
        config.write_text(original, "utf-8")


def test_a_resolution_that_does_not_fit(family):
    side = family.bad_size[0]
    told = rf"( .*)?: {side} is no multiple of the \d+ pixels"
    text = EVALUATION.replace("resolution: 16", f"resolution: {side}")
    with pytest.raises(RecipeError, match=r"evaluation\.resolution" + told):
        recipe(stage("s"), head=head(family), evaluation=text)
    with pytest.raises(RecipeError, match=r"stages\.0\.data\.resolution" + told):
        made(family, "diffusion_nft", lora(family), [f"stages.0.data.resolution={side}"])


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Family -> the folder of a LoRA of its transformer."""
    folders = {}
    for name in ("flux", "z_image"):
        model, folders[name] = FAMILIES[name].load(), tmp_path_factory.mktemp(name)
        Lora(rank=2, **FAMILIES[name].lora).apply(model.transformer, 0)
        model.save_lora(folders[name], entries_of(dict(model.transformer.named_parameters())))
    return folders


def test_a_lora_of_another_model(name, family, loras):
    model = family.load()
    before = {n: weight.clone() for n, weight in model.transformer.state_dict().items()}
    with pytest.raises(ModelError, match=rf"{LORA}' does not fit: \d+ left over \([\w.]+") as found:
        model.load_weights(loras["flux" if name == "z_image" else "z_image"])
    assert "\n" not in str(found.value)
    after = model.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
