"""A mapping says how any pipeline calls its transformer, and one that does not fit is refused by name."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import CPU, FAMILIES
from pipelines import assert_equal_but_for_rounding
from ruamel.yaml import YAML
from runs import recipe, run_quietly, stage
from safetensors.torch import load_file

from posttrain.errors import ModelError, PosttrainError, RecipeError
from posttrain.flow.guidance import CLASSIFIER_FREE, UNGUIDED
from posttrain.models import _mapping
from posttrain.models._diffusers_flow import PROMPT_BATCH
from posttrain.models._mapping import KNOWN, Mapping
from posttrain.models.any_pipeline import AnyFlowModel, AnyPipeline, NormKept
from posttrain.planning.counts import Counts

AURA, LUMINA = FAMILIES["aura_flow"], FAMILIES["lumina2"]
FULL = "{steps: 2, batch_size: 2, learning_rate: 1e-2, checkpoint_every: 2, log_every: 1, sample_every: null}"


def head(folder, **fields):
    block = {"type": "diffusers", "path": str(folder), **fields}
    return f"name: small\ntracker: none\ndevice: cpu\nmodel: {json.dumps(block)}\n"


@pytest.mark.parametrize(
    ("time", "given"),
    [("sigma", 0.25), ("1000 sigma", 250.0), ("1 - sigma", 0.75), ("1000 - 1000 sigma", 750.0)],
)
@pytest.mark.parametrize(("velocity", "sign"), [("noise - image", 1), ("image - noise", -1)])
def test_the_transformer_is_given_what_the_mapping_says(time, given, velocity, sign):
    mapping = Mapping(
        prompt={"text": 0, "mask": 1}, latents="x", timestep="t", time=time, velocity=velocity, arguments={"extra": 7}
    )  # fmt: skip
    seen = {}

    def module(**arguments):
        seen.update(arguments)
        return (2 * arguments["x"],)

    model = SimpleNamespace(mapping=mapping, module=module, forward_dtype=torch.bfloat16)
    latents = torch.ones(1, 4, 2, 2)
    condition = {"text": torch.ones(1, 3, 5), "mask": torch.ones(1, 3, dtype=torch.int64)}
    found = AnyFlowModel.velocity(model, latents, torch.tensor([0.25]), condition)  # type: ignore[arg-type]
    assert torch.equal(found, sign * 2 * latents)
    assert seen.pop("t").tolist() == [given]
    assert (seen.pop("extra"), seen.pop("return_dict")) == (7, False)
    kinds = {name: tensor.dtype for name, tensor in seen.items()}
    assert kinds == {"x": torch.bfloat16, "text": torch.bfloat16, "mask": torch.int64}


def test_the_empty_prompt_is_the_pipelines_negative_prompt():
    model = LUMINA.load()
    found = model.encode_prompts(["", "a red circle"])
    embeds, mask, negative, its_mask = model.pipeline.encode_prompt(
        ["a red circle"], negative_prompt=[""], max_sequence_length=LUMINA.settings["max_sequence_length"]
    )
    lengths = found["encoder_attention_mask"].sum(1).tolist()
    assert lengths == [int(its_mask.sum()), int(mask.sum())]
    assert lengths[0] < lengths[1] - 20, "a prompt begins with an instruction, the empty one does not"
    for row, expected in enumerate((negative, embeds)):
        assert_equal_but_for_rounding(found["encoder_hidden_states"][row], expected[0])


@pytest.mark.parametrize("family", [AURA, LUMINA], ids=["aura_flow", "lumina2"])
def test_a_row_of_each_call_has_padding_so_that_the_same_kernels_run(family):
    model, long, masks = family.load(), "green " * 80, []
    model.pipeline.text_encoder.register_forward_pre_hook(
        lambda _, args, given: masks.append(given["attention_mask"]), with_kwargs=True
    )
    together, alone = model.encode_prompts([long] * PROMPT_BATCH), model.encode_prompts([long])
    assert all(torch.equal(together[name][:1], alone[name]) for name in alone)
    assert len(masks) == 4, "prompts and negative prompts"
    assert all(len(mask) == PROMPT_BATCH + 1 and not mask.all() for mask in masks)


def test_the_longest_side_follows_from_the_positions():
    assert AURA.block().sides() == (4, 64), "256 positions are those of 16 x 16 tokens"
    mapping = KNOWN["AuraFlowPipeline"].model_copy(update={"positions": "side"})
    assert AURA.block(mapping=mapping).sides() == (4, 1024)
    with pytest.raises(ModelError, match="68 x 16 px is too large: this model's sides have at most 64 px"):
        AURA.load().latent_shape(16, 68)


def test_a_row_keeps_its_norm_under_guidance():
    v_cond, v_uncond = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    found = NormKept().combined(v_cond, v_uncond, 4.0)
    torch.testing.assert_close(found.norm(dim=-1), v_cond.norm(dim=-1))
    plain = CLASSIFIER_FREE.combined(v_cond, v_uncond, 4.0)
    torch.testing.assert_close(
        found / found.norm(dim=-1, keepdim=True), plain / plain.norm(dim=-1, keepdim=True)
    )
    assert not NormKept().combined(v_cond, 2 * v_cond, 2.0).any(), "not a number"
    assert (
        AnyPipeline(path="x", mapping=Mapping(prompt={"a": 0}, guidance="none")).guidance_rule() is UNGUIDED
    )


def test_a_mapping_in_the_recipe_trains_a_pipeline_of_which_nothing_is_known(monkeypatch, tmp_path):
    known = _mapping.KNOWN["AuraFlowPipeline"].model_dump(exclude_defaults=True)
    run_quietly(
        recipe(stage("s", train=FULL), head=head(AURA.path, max_sequence_length=16)), tmp_path / "known"
    )
    monkeypatch.delitem(KNOWN, "AuraFlowPipeline")
    with pytest.raises(
        RecipeError, match=r"model\.path.*no mapping is known for AuraFlowPipeline.*give model\.mapping"
    ):
        recipe(stage("s"), head=head(AURA.path))
    given = recipe(stage("s", train=FULL), head=head(AURA.path, max_sequence_length=16, mapping=known))
    run_quietly(given, tmp_path / "given")
    one, other = (
        load_file(tmp_path / name / "s/final/transformer/diffusion_pytorch_model.safetensors")
        for name in ("known", "given")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"latents": "x"}, "model.mapping: AuraFlowTransformer2DModel takes no x; it takes hidden_states, encoder_hidden_states, timestep"),
        ({"prompt": {"states": 0}}, "model.mapping: AuraFlowTransformer2DModel takes no states"),
        ({"arguments": {"size": 3}}, "model.mapping: AuraFlowTransformer2DModel takes no size"),
        ({"arguments": {"return_dict": True}}, "model.mapping.arguments: posttrain itself gives return_dict"),
        ({"arguments": {"timestep": 3, "hidden_states": 0}}, "model.mapping.arguments: posttrain itself gives hidden_states, timestep"),
        ({"timestep": "hidden_states"}, "model.mapping: hidden_states is named more than once"),
    ],
)  # fmt: skip
def test_a_mapping_that_does_not_fit_the_transformer_is_refused(fields, error):
    mapping = Mapping(**{**KNOWN["AuraFlowPipeline"].model_dump(), **fields})
    with pytest.raises(ModelError, match=re.escape(error)):
        AURA.load(mapping=mapping)


def test_a_value_of_several_words_is_named_whole():
    block = "{type: diffusers, mapping: {prompt: {a: 0}, time: 2 sigma}}"
    words = re.escape("one of sigma, 1000 sigma, 1 - sigma, 1000 - 1000 sigma")
    with pytest.raises(RecipeError, match=rf"mapping\.time: '2 sigma' is not allowed .*; {words}$"):
        recipe(stage("s"), head=f"name: small\ndevice: cpu\nmodel: {block}\n")


def test_an_argument_that_the_transformer_needs_must_be_mapped():
    mapping = Mapping(prompt={"encoder_hidden_states": 0}, time="1 - sigma")
    with pytest.raises(
        ModelError, match="gives no encoder_attention_mask, which Lumina2Transformer2DModel needs"
    ):
        LUMINA.load(mapping=mapping)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"prompt": {"encoder_hidden_states": 4}}, r"encoder_hidden_states is 4, but encode_prompt of AuraFlowPipeline returns \['Tensor'"),
        ({"empty": {}, "prompt": {"encoder_hidden_states": 2}}, r"encoder_hidden_states is 2, but .* returns \['Tensor', 'Tensor', 'NoneType'"),
        ({"encode": {"system": "x"}}, "encode_prompt of AuraFlowPipeline takes no system; it takes prompt"),
    ],
)  # fmt: skip
def test_a_mapping_that_does_not_fit_the_encoding_is_refused(fields, error):
    mapping = Mapping(**{**KNOWN["AuraFlowPipeline"].model_dump(), **fields})
    with pytest.raises(ModelError, match=error):
        AURA.load(mapping=mapping).encode_prompts(["a red circle"])


def test_prompts_whose_length_differs_between_calls_are_refused(monkeypatch):
    model = AURA.load()

    def encode_prompt(prompt, device):
        return torch.zeros(len(prompt), max(len(p) for p in prompt), 16)

    monkeypatch.setattr(model.pipeline, "encode_prompt", encode_prompt)
    model.spec = AnyPipeline(path=str(AURA.path))
    model.mapping = Mapping(prompt={"encoder_hidden_states": 0})
    model.encode_prompts(["blue"])
    with pytest.raises(ModelError, match=r"other lengths in other calls: .*\(6, 16\)\}, before .*\(4, 16\)"):
        model.encode_prompts(["circle"])


def test_a_pipeline_of_another_class_or_of_a_newer_library_or_with_a_shift_by_size_is_refused(tmp_path):
    with pytest.raises(ModelError, match="is a AuraFlowPipeline, not a Lumina2Pipeline"):
        AURA.load(pipeline="Lumina2Pipeline")
    folder = shutil.copytree(AURA.path, tmp_path / "copy")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dynamic_shifting": True}))
    with pytest.raises(ModelError, match=r"scheduler/scheduler_config\.json: use_dynamic_shifting is true"):
        AnyPipeline(path=str(folder)).load(CPU, "fp32")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "TomorrowPipeline"}))
    with pytest.raises(ModelError, match=r"diffusers \S+ has no TomorrowPipeline: install a newer one"):
        AnyPipeline(path=str(folder), mapping=KNOWN["AuraFlowPipeline"]).load(CPU, "fp32")


def test_a_plan_says_that_it_cannot_count_what_is_not_here_or_looks_into_tensors(monkeypatch):
    with pytest.raises(PosttrainError, match=r"cannot count this model: it is not on this machine"):
        Counts(AnyPipeline(path="someone/tomorrow", pipeline="AuraFlowPipeline"), cuda=True).text(1)
    velocity = AnyFlowModel.velocity

    def looking(self, latents, sigma, condition):
        return velocity(self, latents, sigma, condition) * sigma.tolist()[0]

    monkeypatch.setattr(AnyFlowModel, "velocity", looking)
    with pytest.raises(PosttrainError, match=r"or it looks into tensors while it works"):
        Counts(AURA.block(), cuda=True).text(1)


def test_check_tells_a_mapping_that_does_not_fit_before_weights_are_loaded():
    mapping = KNOWN["AuraFlowPipeline"].model_copy(update={"latents": "x"})
    assert AURA.block().unfit() is None
    assert "AuraFlowTransformer2DModel takes no x" in (AURA.block(mapping=mapping).unfit() or "")
    mapping = KNOWN["AuraFlowPipeline"].model_copy(update={"encode": {"system": "x"}})
    assert "encode_prompt of AuraFlowPipeline takes no system" in (AURA.block(mapping=mapping).unfit() or "")


def test_the_mapping_in_the_docs_is_that_of_lumina2_in_ten_lines():
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")
    (block,) = re.findall(r"```yaml\n(model:\n  type: diffusers\n.*?)```", page, re.DOTALL)
    assert len(block.partition("mapping:")[2].splitlines()) <= 10
    assert Mapping(**YAML(typ="safe").load(block)["model"]["mapping"]) == KNOWN["Lumina2Pipeline"]


def test_the_comparison_in_the_docs_tells_a_mapping_that_fits_from_one_that_does_not(capsys):
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = code.replace("models/tomorrow", str(AURA.path)).replace(
        'path="', 'max_sequence_length=256, path="'
    )
    fits = "time='sigma', empty={'encoder_hidden_states': 2}, prompt="
    for settings, least, most in (
        (fits, 0, 1e-4),
        ("velocity='image - noise', " + fits, 0.1, 1e9),
        ("prompt=", 0.1, 1e9),
    ):
        with torch.random.fork_rng():
            exec(code.replace("prompt=", settings, 1), {})
        assert least <= float(capsys.readouterr().out.split()[-1]) <= most
