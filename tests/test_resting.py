"""Encoders that wait in the CPU's memory give the same results, and a run goes on wherever they wait."""

import pytest
import torch
from pipelines import load, pipeline_folder
from runs import HEAD, recipe, run_quietly, stage
from torch import nn

from posttrain.models._resting import Resting
from posttrain.models.sd3 import SD3, SD3FlowModel

META, HERE = torch.device("meta"), torch.device("cpu")


def test_encoders_at_rest_come_to_work_and_give_the_same():
    model = load()
    prompts = ["a red circle"]
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1

    def results():
        mean, _ = model.posterior(pixels)
        return [*model.encode_prompts(prompts).values(), mean, model.decode(mean)]

    before = results()
    resting = [p for e in (*model.text_encoders(), model.vae) for p in e.parameters()]
    kept = [p.data_ptr() for p in resting]
    at_work = []
    first = resting[0].data_ptr()
    model.text_encoders()[0].register_forward_hook(lambda *_: at_work.append(resting[0].data_ptr() != first))
    for encoder in model.encoders.values():
        encoder.rest()
    after = results()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert at_work == [True]
    assert [p.data_ptr() for p in resting] == kept


def test_offloaded_encoders_never_settle_on_the_device():
    path = {"path": str(pipeline_folder()), "max_sequence_length": 16}
    for offload, where in [(True, "cpu"), (False, "meta")]:
        model = SD3(**path, offload=offload).load(META, "fp32")
        encoders = (*model.text_encoders(), model.vae)
        assert {p.device.type for e in encoders for p in e.parameters()} == {where}
        assert {p.device.type for p in model.transformer.parameters()} == {"meta"}


def test_what_the_cache_does_instead_rests(tmp_path, monkeypatch):
    rested = []
    monkeypatch.setattr(Resting, "rest", lambda self: rested.append(type(self.modules[0]).__name__))
    monkeypatch.setattr(SD3FlowModel, "rest", lambda self, name: self.encoders[name].rest())
    head = f"{HEAD}cache: {{prompts: true, latents: mean_logvar, path: {tmp_path / 'cache'}}}\n"
    run_quietly(recipe(stage("sft"), head=head), tmp_path / "run")
    assert rested == ["CLIPTextModelWithProjection", "AutoencoderKL"]


def test_where_encoders_lie_may_change_when_a_run_goes_on(tmp_path):
    run_quietly(recipe(stage("sft")), tmp_path / "run")
    printed = run_quietly(recipe(stage("sft"), overrides=["model.offload=true"]), tmp_path / "run")
    assert "sft: finished before, skipped" in printed


class Encoder(nn.Module):
    """Three blocks, a weight before them, and one that they share."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(4, 4, bias=False)
        self.inner = nn.Module()
        self.inner.layers = nn.ModuleList(nn.Linear(4, n, bias=False) for n in (4, 4, 6))
        self.seen = []

    def forward(self, fails=None):
        for number, layer in enumerate(self.inner.layers):
            layer.forward = lambda x, number=number: self.look(number == fails)
            layer(None)

    def look(self, fails):
        where = [p.device.type for p in self.parameters()]
        self.seen.append(where)
        if fails:
            raise ValueError("it fails")


def test_blocks_are_on_the_device_only_while_they_are_called():
    encoder = Encoder()
    resting = Resting([encoder], HERE, by_block=True)
    assert resting.bytes_at_work() == 4 * (16 + 24)
    assert Resting([encoder], HERE).bytes_at_work() == 4 * (16 + 16 + 16 + 24)
    come = []
    resting._come = lambda tensors, original=resting._come: come.append(len(tensors)) or original(tensors)
    resting.rest()
    kept = {name: p.data_ptr() for name, p in encoder.named_parameters()}
    here = []
    encoder.look = lambda fails: here.append(
        [n for n, p in encoder.named_parameters() if p.data_ptr() != kept[n]]
    )
    with resting.working():
        encoder()
    assert here == [["before.weight", f"inner.layers.{k}.weight"] for k in range(3)]
    assert come == [1, 1, 1, 1]


def test_a_block_that_fails_leaves_the_device():
    encoder = Encoder()
    resting = Resting([encoder], HERE, by_block=True)
    resting.rest()
    kept = {name: p.data_ptr() for name, p in encoder.named_parameters()}
    with resting.working():
        with pytest.raises(ValueError, match="it fails"):
            encoder(fails=1)
        layers = {n: p for n, p in encoder.named_parameters() if "layers" in n}
        assert all(p.data_ptr() == kept[n] for n, p in layers.items())
    assert {n: p.data_ptr() for n, p in encoder.named_parameters()} == kept
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())


def test_no_text_encoder_reads_a_block_outside_its_call(monkeypatch):
    model = load()
    before = model.encode_prompts(["a red circle"])
    resting = model.encoders["prompts"]

    def spoil(tensors):
        for tensor in tensors:
            tensor.data = torch.full_like(tensor.data, 97)

    monkeypatch.setattr(resting, "_leave", spoil)
    resting.rest()
    after = model.encode_prompts(["a red circle"])
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_text_encoders_of_a_pipeline_come_block_by_block():
    encoders = load().encoders["prompts"]
    assert len(encoders.blocks) == 2 + 2 + 1
    whole = sum(p.nbytes for m in encoders.modules for p in m.parameters())
    assert encoders.bytes_at_work() < whole
