"""What is loaded is what was meant: every file, name, shape, kind of number and value is accounted for."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from pipelines import load, pipeline_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posttrain.errors import ModelError
from posttrain.flow.sampling_settings import Sampling
from posttrain.model import FlowModel
from posttrain.models._tiny_tokenizers import t5_tokenizer
from posttrain.policy.tuning import Lora
from posttrain.stages.artifact import open_artifact, open_sampler
from posttrain.support import files
from posttrain.weights import pipeline_folder as pipeline_folder_module
from posttrain.weights.files import bytes_beside
from posttrain.weights.fitting import HARMLESS, is_finite, kind_of, misfit, not_finite
from posttrain.weights.network import load_network
from posttrain.weights.transformer import LORA
from posttrain.weights.writing import entries_of

CPU = torch.device("cpu")
NETWORKS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "text_encoder_3": "model.safetensors",
}
NEEDED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{name}/config.json" for name in NETWORKS),
    *(f"{name}/{file}" for name, file in NETWORKS.items()),
    *(
        f"tokenizer{n}/{file}"
        for n in ("", "_2", "_3")
        for file in ("tokenizer.json", "tokenizer_config.json")
    ),
]

FEW = ["model_index.json", "vae/config.json", "text_encoder/model.safetensors", "tokenizer_3/tokenizer.json"]


@pytest.fixture(scope="module")
def model():
    """A model for tests that leave it as it is."""
    return load()


@pytest.fixture
def folder(tmp_path):
    """A pipeline whose files are links, each to be replaced whole."""
    copied = shutil.copytree(pipeline_folder(), tmp_path / "pipeline", copy_function=os.link)
    warnings.simplefilter("ignore")
    return copied


def replace(file, content):
    file.unlink()
    file.write_bytes(content)


def rewrite(file, change):
    """Changes the tensors of a file."""
    state = load_file(file)
    change(state)
    with safe_open(file, "pt") as old:
        metadata = old.metadata()
    file.unlink()
    save_file(state, file, metadata)


def matrix(state):
    """The name of the first matrix."""
    return min(name for name, tensor in state.items() if tensor.dim() == 2)


def put(value, index=1):
    def change(state):
        name = matrix(state)
        state[name] = state[name].clone().float()
        state[name][index, index] = value

    return change


def renamed(state):
    state["stray.weight"] = state.pop(matrix(state))


CHANGES = [
    (lambda s: s.pop(matrix(s)), r"1 missing \("),
    (renamed, r"1 missing \(.*; 1 left over \(stray\.weight\)"),
    (lambda s: [s.pop(n) for n in sorted(s)[2:]], r"\d+ missing \(.*, \.\.\.\)"),
    (lambda s: s.update(stray=torch.zeros(2)), r"1 left over \(stray\)"),
    (lambda s: s.update({matrix(s): torch.zeros(3, 5)}), r"1 of another shape \(.*: \(3, 5\), not \("),
    (lambda s: s.update({matrix(s): s[matrix(s)].int()}), r"1 of another kind \(.*: integers, not floats"),
    (put(float("nan")), r"1 not finite \("),
    (put(-float("inf")), r"1 not finite \("),
]
NAMES = ["drop", "rename", "few", "stray", "shape", "int", "nan", "inf"]


@pytest.mark.parametrize("lost", NEEDED)
def test_a_folder_that_lacks_a_file_is_refused_by_its_name(folder, lost):
    (folder / lost).unlink()
    name = lost if not lost.endswith(".safetensors") else f"{lost.split('/')[0]}/*.safetensors"
    with pytest.raises(ModelError) as found:
        load(folder)
    assert name in str(found.value)
    assert len(str(found.value)) < 400


@pytest.mark.parametrize(
    ("file", "content"),
    [*((file, b"{") for file in NEEDED), *((file, c) for file in FEW for c in (b"", b"[]"))],
)
def test_a_damaged_file_is_one_error_that_names_its_folder(folder, file, content):
    replace(folder / file, content)
    with pytest.raises(ModelError) as found:
        load(folder)
    assert file.split("/")[0].removesuffix(".json") in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("component", [name for name in NETWORKS if name != "text_encoder_2"])
@pytest.mark.parametrize(("change", "words"), CHANGES, ids=NAMES)
def test_weights_of_a_component_that_do_not_fit_are_told(folder, component, change, words):
    rewrite(folder / component / NETWORKS[component], change)
    with pytest.raises(ModelError, match=rf"{component}' do not fit: {words}") as found:
        load(folder)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_3", "transformer"])
def test_a_weight_that_overflows_in_fp16_is_refused_there_alone(folder, component):
    rewrite(folder / component / NETWORKS[component], put(70000.0))
    load(folder)
    from posttrain.models.sd3 import SD3

    with pytest.raises(ModelError, match=r"1 too large for the precision \(.*65504: use bf16 or fp32"):
        SD3(path=str(folder), dtype="fp16").load(CPU, "fp16")


def test_a_truncated_file_and_a_shard_that_is_missing_are_named(folder):
    file = folder / "transformer" / NETWORKS["transformer"]
    replace(file, file.read_bytes()[:-8])
    with pytest.raises(ModelError, match=r"has \d+ bytes, but its header describes \d+"):
        load(folder)
    file.unlink()
    index = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "transformer" / f"{file.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks diffusion_pytorch_model-00001-of-00002\.safetensors, which"):
        load(folder)


def test_a_weight_that_an_index_lists_and_no_shard_holds_is_named(folder):
    file = folder / "transformer" / NETWORKS["transformer"]
    state, shard = load_file(file), "diffusion_pytorch_model-00001-of-00001.safetensors"
    file.unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, shard)}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    del state["proj_out.bias"]
    save_file(state, file.with_name(shard), {"format": "pt"})
    with pytest.raises(ModelError, match=r"transformer' do not fit: 1 missing \(proj_out\.bias\)"):
        load(folder)


def test_a_weight_that_two_shards_hold_is_named(folder):
    file = folder / "transformer" / NETWORKS["transformer"]
    state = load_file(file)
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    file.unlink()
    index = {"metadata": {}, "weight_map": {**dict.fromkeys(state, shards[0]), "proj_out.bias": shards[1]}}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    save_file(state, file.with_name(shards[0]), {"format": "pt"})
    save_file({"proj_out.bias": state["proj_out.bias"]}, file.with_name(shards[1]), {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{shards[1]}' holds proj_out.bias, which another file"):
        load(folder)


def test_a_tokenizer_must_fit_its_text_encoder(folder):
    config = folder / "tokenizer" / "tokenizer_config.json"
    original = json.loads(config.read_text())
    replace(config, json.dumps({**original, "model_max_length": 77}).encode())
    with pytest.raises(ModelError, match=r"tokenizer' gives up to 77 tokens .*, its text encoder takes 16"):
        load(folder)
    replace(config, json.dumps(original).encode())
    shutil.rmtree(folder / "tokenizer_3")
    t5_tokenizer([f"word{'x' * i}" for i in range(40)], 16).save_pretrained(folder / "tokenizer_3")
    with pytest.raises(ModelError, match=r"tokenizer_3' has \d+ tokens, its text encoder knows \d+"):
        load(folder)


def test_an_index_that_names_what_is_not_there_is_refused(folder):
    index = json.loads((folder / "model_index.json").read_text())
    for change, words in (
        ({"vae": ["diffusers", "NoSuchModel"]}, "vae is a NoSuchModel of diffusers"),
        ({"transformer": [None, None]}, "names no transformer"),
        ({"tokenizer": [None, None]}, "tokenizer"),
    ):
        replace(folder / "model_index.json", json.dumps({**index, **change}).encode())
        with pytest.raises(ModelError, match=words):
            load(folder)


def test_other_precisions_beside_the_weights_are_not_read(folder):
    plain = folder / "transformer" / NETWORKS["transformer"]
    save_file({"other": torch.zeros(1)}, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    model = load(folder)
    model.load_weights(folder)
    assert torch.equal(model.transformer.proj_out.weight, load_file(plain)["proj_out.weight"])


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=NAMES)
def test_weights_that_a_stage_starts_from_are_accounted_for(folder, model, change, words):
    rewrite(folder / "transformer" / NETWORKS["transformer"], change)
    with pytest.raises(ModelError, match=rf"do not fit: {words}"):
        model.load_weights(folder)


def test_weights_that_overflow_when_written_are_refused_and_leave_no_file(tmp_path):
    model = load()
    with torch.no_grad():
        model.transformer.proj_out.bias[0] = 70000.0
    with pytest.raises(
        ModelError, match=r"written as .*: 1 too large for the precision \(proj_out\.bias\).*bf16"
    ):
        model.save(tmp_path / "final", "fp16", {})
    assert not any((tmp_path / "final" / "transformer").iterdir())
    model.save(tmp_path / "bf16", "bf16", {})


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """The file of a LoRA that changes the model."""
    model = load()
    Lora(rank=4, alpha=8.0).apply(model.transformer, 0)
    weights = {n: p + 0.05 for n, p in model.transformer.named_parameters() if ".lora_" in n}
    folder = tmp_path_factory.mktemp("lora")
    model.save_lora(folder, entries_of(weights))
    return folder / LORA


def all_names(change):
    def applied(state):
        for name in [*state]:
            state[change(name)] = state.pop(name)

    return applied


def a_and_b(state):
    return sorted(state)[:2]


LORAS = {
    "other names": (all_names(lambda n: n.replace("attn", "atn")), r"30 left over \(transformer_blocks\.0\.atn"),
    "other prefix": (all_names(lambda n: n.replace("transformer.", "unet.", 1)), r"such as 'unet\.\S*', do not begin with 'transformer\.'"),
    "no prefix": (all_names(lambda n: n.removeprefix("transformer.")), r"do not begin with 'transformer\.'"),
    "of the text encoder": (lambda s: s.update({"text_encoder.q.lora_A.weight": torch.ones(4, 16), "text_encoder.q.lora_B.weight": torch.ones(16, 4)}), r"2 left over \(text_encoder\.q"),
    "half a pair": (lambda s: s.pop(a_and_b(s)[1]), r"1 missing \(.*lora_B\.weight\)"),
    "other half": (lambda s: s.pop(a_and_b(s)[0]), r"1 missing \(.*lora_A\.weight\)"),
    "one stray layer": (lambda s: s.update({"transformer.no.lora_A.weight": torch.ones(4, 16)}), r"1 left over \(no\.lora_A\.weight\)"),
    "shape": (lambda s: s.update({a_and_b(s)[0]: torch.ones(4, 9)}), r"1 of another shape \(.*: \(4, 9\), not \(4, 16\)"),
    "ranks differ": (lambda s: s.update({a_and_b(s)[1]: torch.ones(16, 3)}), r"1 of another shape \(.*: \(16, 3\), not \(16, 4\)"),
    "int": (lambda s: s.update({a_and_b(s)[0]: s[a_and_b(s)[0]].int()}), "1 of another kind"),
    "nan": (lambda s: s.update({a_and_b(s)[0]: s[a_and_b(s)[0]] * float("nan")}), r"1 not finite \("),
    "inf": (lambda s: s.update({a_and_b(s)[1]: s[a_and_b(s)[1]] / 0}), r"1 not finite \("),
    "dora": (lambda s: s.update({"transformer.x.dora_scale": torch.ones(3)}), "dora_scale"),
    "empty": (lambda s: s.clear(), "holds no weights"),
}  # fmt: skip


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "stacked"])
@pytest.mark.parametrize(("change", "words"), LORAS.values(), ids=LORAS)
def test_a_lora_that_does_not_fit_is_refused_and_leaves_nothing_behind(
    tmp_path, model, lora, change, words, merge
):
    shutil.copy(lora, tmp_path / LORA)
    rewrite(tmp_path / LORA, change)
    for way in (model.load_weights, lambda *given: FlowModel.load_weights(model, *given)):
        with pytest.raises(ModelError, match=words) as found:
            way(tmp_path, merge)
        assert "\n" not in str(found.value)
    assert not getattr(model.transformer, "peft_config", None)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ("{", "is damaged: "),
        ("[]", "no JSON object"),
        ('{"transformer.r": 4}', "states None as lora_alpha"),
        ('{"transformer.r": "x", "transformer.lora_alpha": 1}', "states 'x' as r"),
        ('{"transformer.r": 4, "transformer.lora_alpha": NaN}', "states nan as lora_alpha"),
        ('{"transformer.r": 9, "transformer.lora_alpha": 1, "transformer.target_modules": ["attn.to_q"]}', "size mismatch"),
    ],
)  # fmt: skip
def test_a_lora_whose_stated_rank_or_scale_cannot_be_is_refused(tmp_path, model, lora, stated, words, capfd):
    save_file(load_file(lora), tmp_path / LORA, {"lora_adapter_metadata": stated})
    with pytest.raises(ModelError, match=words) as found:
        model.load_weights(tmp_path)
    assert LORA in str(found.value)
    assert capfd.readouterr().err == ""


def test_a_lora_that_was_cut_off_is_named(tmp_path, model, lora):
    (tmp_path / LORA).write_bytes(lora.read_bytes()[:-5])
    with pytest.raises(ModelError, match=LORA):
        model.load_weights(tmp_path)


@pytest.mark.parametrize("way", [None, FlowModel.load_weights], ids=["pipeline", "transformer"])
def test_a_lora_that_fits_changes_the_weights(lora, way):
    model = load()
    before = model.transformer.transformer_blocks[0].attn.to_q.weight.clone()
    model.load_weights(lora.parent) if way is None else way(model, lora.parent)
    assert not torch.equal(model.transformer.transformer_blocks[0].attn.to_q.weight, before)


def test_a_lora_that_spoils_the_weights_it_is_merged_into_is_refused(tmp_path, lora):
    shutil.copy(lora, tmp_path / LORA)
    rewrite(tmp_path / LORA, lambda s: s.update({n: t * 1e30 for n, t in s.items()}))
    with pytest.raises(ModelError, match=r"spoils the weights it is merged into: \d+ not finite"):
        load().load_weights(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"[]", "no JSON object"),
        (b"{}", "'parents' is no list"),
        (b'{"parents": [3], "model": {}, "weights": "raw"}', "'parents' is no list"),
        (b'{"parents": [], "weights": "raw"}', "no 'model'"),
        (b'{"parents": [], "model": {}}', "no 'weights'"),
        (b'{"parents": [], "model": {"type": "sd9"}, "weights": "raw"}', "posttrain.json: model"),
    ],
)
def test_a_damaged_description_of_an_artifact_is_told(tmp_path, lora, content, words):
    shutil.copy(lora, tmp_path / LORA)
    (tmp_path / "posttrain.json").write_bytes(content)
    with pytest.raises(ModelError, match=words):
        open_artifact(str(tmp_path), CPU)


def test_the_accounting_of_single_tensors():
    numbers = {"a": torch.ones(2), "b": torch.tensor([1, 2]), "c": torch.zeros(0), "d": torch.tensor(True)}
    assert misfit(numbers, dict(numbers)) is None
    assert not_finite(
        {**numbers, "n": torch.tensor([1, float("nan")]), "i": torch.tensor(-float("inf"))}
    ) == ["n", "i"]
    assert is_finite(torch.full((3,), 60000.0, dtype=torch.float16)), "whose sum is not"
    assert not is_finite(torch.tensor([float("nan")]).to(torch.float8_e4m3fn))
    assert is_finite(torch.ones(3).to(torch.float8_e4m3fn))
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.int64, "I64"), (torch.uint8, "U8"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.complex64, "C64")):  # fmt: skip
        assert kind_of(torch.zeros(1).to(dtype)) == kind_of(name)
    left_over = {"x.position_ids": numbers["b"], "criterion.empty_weight": numbers["a"]}
    assert misfit(numbers, {**numbers, **left_over}) is None
    assert all(why for why in HARMLESS.values())


def test_weights_under_names_that_the_loader_changes_are_accounted_for(tmp_path):
    """T5 keeps its embedding once and has it twice; older files of CLIP keep position_ids."""
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    load_network(T5EncoderModel, pipeline_folder() / "text_encoder_3", torch.float16)
    shutil.copytree(pipeline_folder() / "text_encoder", tmp_path / "clip")
    ids = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    rewrite(tmp_path / "clip" / "model.safetensors", lambda s: s.update(ids))
    load_network(CLIPTextModelWithProjection, tmp_path / "clip", torch.float32)


def test_an_export_shares_nothing_with_its_base(tmp_path):
    base = shutil.copytree(pipeline_folder(), tmp_path / "base")
    before = {p.relative_to(base): p.read_bytes() for p in base.rglob("*") if p.is_file()}
    model = load(base)
    for unread in (".DS_Store", "flax_model.msgpack", "model.fp16.safetensors"):
        (base / "text_encoder" / unread).write_bytes(b"")
        before[(base / "text_encoder" / unread).relative_to(base)] = b""
    model.save(tmp_path / "final", "fp32", {})
    assert sorted(os.listdir(tmp_path / "final" / "text_encoder")) == ["config.json", "model.safetensors"]
    files = [p for p in (tmp_path / "final").rglob("*") if p.is_file()]
    assert {p.stat().st_nlink for p in files} == {1}
    beside = [p for p in files if p.parent.name not in ("transformer", "final")]
    assert bytes_beside("transformer", model.spec.weight_files(), 4) == sum(p.stat().st_size for p in beside)
    for file in files:
        with file.open("r+b") as stream:  # in place, as other tools write
            stream.write(b"\xff\xff")
    assert {p.relative_to(base): p.read_bytes() for p in base.rglob("*") if p.is_file()} == before


def test_a_file_system_that_shares_blocks_is_asked_to(tmp_path, monkeypatch):
    import fcntl

    asked = []
    monkeypatch.setattr(fcntl, "ioctl", lambda *given: asked.append(given[1]))
    (tmp_path / "a").write_bytes(b"content")
    assert files.copy(tmp_path / "a", tmp_path / "b") == 0
    assert asked == [0x40049409]
    monkeypatch.undo()
    assert files.copy(tmp_path / "a", tmp_path / "c") in (0, 7)
    assert (tmp_path / "c").read_bytes() == b"content"


def test_a_file_is_taken_for_no_hub_name(tmp_path, monkeypatch):
    """``exports/lora.safetensors`` looks like ``owner/name``; the hub would be asked for it, for half a minute."""
    monkeypatch.chdir(tmp_path)
    name = "exports/lora.safetensors"
    assert pipeline_folder_module.from_hub(name)
    Path("exports").mkdir()
    Path(name).touch()
    assert not pipeline_folder_module.from_hub(name)
    said = pipeline_folder_module.missing(name, "transformer", ["StableDiffusion3Pipeline"])
    assert said == f"{name!r} is a file; a folder in diffusers' format is expected"


def test_a_hub_name_of_which_files_are_missing_here_is_downloaded(folder, monkeypatch):
    """The index alone is in the cache as soon as a model's family was looked up."""
    monkeypatch.setattr(pipeline_folder_module, "local_folder", lambda path, revision: folder)
    assert pipeline_folder_module.complete_folder("some/model") == folder
    for lost in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / lost)
    assert pipeline_folder_module.complete_folder("some/model") is None
    assert pipeline_folder_module.files_of("some/model") == {}
    assert pipeline_folder_module.complete_folder("some/model", {"text_encoder_3", "tokenizer_3"}) == folder
    assert pipeline_folder_module.missing("some/model", "transformer", ["StableDiffusion3Pipeline"]) is None
    assert pipeline_folder_module.complete_folder(str(folder)) == folder, "a folder is what it is"


def test_the_revision_says_which_snapshot_is_read(tmp_path, monkeypatch, lora):
    from posttrain.models.sd3 import SD3

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--some--model"
    commits = {"main": "a" * 40, "v2": "b" * 40}
    (kept / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        shutil.copytree(pipeline_folder(), kept / "snapshots" / commit, copy_function=os.link)
        (kept / "refs" / name).write_text(commit)
    asked = {None: "main", "main": "main", "v2": "v2", "b" * 40: "v2"}
    for revision, name in asked.items():
        spec = SD3(path="some/model", revision=revision)
        place = kept / "snapshots" / commits[name]
        assert {file.parent.parent for file in spec.weight_files().values()} == {place}
        assert spec.load(CPU, "fp32").source == place
    index = kept / "snapshots" / commits["main"] / "model_index.json"
    of_another = index.read_text().replace("SD3Transformer2DModel", "FluxTransformer2DModel")
    index.unlink()  # v2 has the same file
    index.write_text(of_another)
    assert SD3(path="some/model", revision="v2").unfit() is None
    assert "the transformer's class is FluxTransformer2DModel" in (SD3(path="some/model").unfit() or "")
    absent = SD3(path="some/model", revision="v3")
    assert (absent.weight_files(), absent.sides()) == ({}, None)
    other = shutil.copytree(kept, tmp_path / "models--other--model", copy_function=os.link)
    shutil.rmtree(other / "snapshots" / commits["main"])
    (other / "refs" / "main").write_text(commits["v2"])
    (tmp_path / "lora").mkdir()
    shutil.copy(lora, tmp_path / "lora" / LORA)
    made_of = {"type": "sd3", "path": "some/model", "revision": "v2"}
    description = {"parents": [], "model": made_of, "weights": "raw"}
    (tmp_path / "lora" / "posttrain.json").write_text(json.dumps(description))
    for base, place in (
        (None, kept / "snapshots" / commits["v2"]),
        ("other/model", other / "snapshots" / commits["v2"]),
    ):
        assert open_artifact(str(tmp_path / "lora"), CPU, base)[0].source == place
    whole = shutil.copytree(pipeline_folder(), tmp_path / "whole")
    (whole / "posttrain.json").write_text(json.dumps({**description, "base": {}, "transformer": {}}))
    settings = open_sampler(str(whole), CPU, Sampling(resolution=16))[0].settings
    assert settings["revision"] is None, "a folder has none"
