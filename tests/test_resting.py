"""Encoders that wait in the CPU's memory give the same results, and a run goes on wherever they wait."""

import torch
from pipelines import load, pipeline_folder
from runs import HEAD, recipe, run_quietly, stage

from posttrain.models._resting import Resting
from posttrain.models.sd3 import SD3, SD3FlowModel

META = torch.device("meta")


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
