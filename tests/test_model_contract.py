"""A model of the required members alone trains, samples and saves, and the required members stay few."""

import inspect
from typing import Literal

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from runs import EVALUATION, recipe, run_quietly, stage
from safetensors.torch import load_file
from torch import nn

from posttrain.algorithm import Items, Losses
from posttrain.condition import Conditions
from posttrain.errors import ModelError
from posttrain.flow.sampling_settings import Sampling
from posttrain.items import RECORDED
from posttrain.model import FlowModel, Model, loaded
from posttrain.policy import Policy
from posttrain.policy.tuning import Lora
from posttrain.sampling.prompts import encode
from posttrain.stages.artifact import open_artifact, open_sampler
from posttrain.weights.writing import entries_of

CPU = torch.device("cpu")


class Net(ModelMixin, ConfigMixin, PeftAdapterMixin):
    @register_to_config
    def __init__(self, width=16):
        super().__init__()
        self.first = nn.Linear(3 + 1 + 2, width)
        self.last = nn.Linear(width, 3)

    def forward(self, latents, sigma, condition):
        n, _, h, w = latents.shape
        extra = torch.cat([sigma[:, None], condition], 1)[:, :, None, None].expand(n, 3, h, w)
        features = torch.cat([latents, extra], 1).movedim(1, -1)
        return self.last(torch.tanh(self.first(features))).movedim(-1, 1)


class ToyFlow(FlowModel):
    """Images of a quarter of the size stand for latents."""

    def encode_prompts(self, prompts):
        return {"c": torch.tensor([[len(p) / 10, p.count("red")] for p in prompts], device=self.device)}

    def posterior(self, pixels):
        mean = nn.functional.avg_pool2d(pixels, 4)
        return mean, torch.full_like(mean, -30.0)

    def latent_shape(self, height, width):
        return (3, height // 4, width // 4)

    def decode(self, latents):
        return (nn.functional.interpolate(latents, scale_factor=4) / 2 + 0.5).clamp(0, 1)

    def velocity(self, latents, sigma, condition):
        return self.module(latents, sigma, condition["c"])


class Toy(Model):
    type: Literal["toy"] = "toy"

    def load(self, device, transformer_dtype):
        torch.manual_seed(0)
        return ToyFlow(Net().to(device), device)


WRITTEN = [
    {name for name in vars(cls) if not name.startswith("_") and name != "model_config"}
    for cls in (Toy, ToyFlow)
]
del Model.variants["toy"]  # or other tests would find it


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(Model.variants, "toy", Toy)
    return Toy()


def test_a_model_has_at_most_ten_members_to_write():
    arguments = set(inspect.signature(FlowModel.__init__).parameters) - {"self"}
    required = {"type", *Model.__abstractmethods__, *FlowModel.__abstractmethods__, *arguments}
    assert len(required) <= 10
    assert Model.__abstractmethods__ == {"load"}
    assert {name for cls in WRITTEN for name in cls} <= required


def test_those_members_suffice_to_train_sample_and_save(toy, tmp_path):
    plan = recipe(
        stage("sft"),
        stage("more"),
        evaluation=EVALUATION.replace("rewards: shapes", "rewards: jpeg_compressibility"),
    )
    run_quietly(plan.model_copy(update={"model": toy}), tmp_path / "run")
    before = dict(toy.load(CPU, "fp32").transformer.state_dict())
    final = tmp_path / "run" / "more" / "final"
    first, second = (
        load_file(tmp_path / "run" / name / "final" / "diffusion_pytorch_model.safetensors")
        for name in ("sft", "more")
    )
    assert first.keys() == second.keys() == before.keys()
    assert all(not torch.equal(first[k], before[k]) and not torch.equal(first[k], second[k]) for k in before)
    for name in ("base", "sft", "more"):
        assert (tmp_path / "run" / name / "evaluation" / "eval.json").is_file()

    model, weights = open_artifact(str(final), CPU)
    assert weights == "ema"
    assert all(torch.equal(value, second[name]) for name, value in model.transformer.state_dict().items())
    settings = Sampling(resolution=16, steps=3, guidance=2.0)
    images = open_sampler(str(final), CPU, settings)[0].images(["a red circle"], [0], settings)
    assert images.shape == (1, 3, 16, 16)
    other = open_sampler(str(tmp_path / "run" / "sft"), CPU, settings)[0]
    assert not torch.equal(other.images(["a red circle"], [0], settings), images)


@pytest.mark.parametrize("merge", [True, False])
def test_a_lora_of_such_a_model_is_saved_and_loaded(merge, tmp_path):
    model = Toy().load(CPU, "fp32")
    Lora(rank=2, alpha=6.0, targets=["first", "last"]).apply(model.transformer, 0)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_lora(tmp_path, entries_of(dict(model.transformer.named_parameters())))
    inputs = torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.7]), model.encode_prompts(["a", "a red one"])
    loaded = Toy().load(CPU, "fp32")
    plain = loaded.velocity(*inputs)
    loaded.load_weights(tmp_path, merge)
    assert any("lora" in name for name, _ in loaded.transformer.named_parameters()) is not merge
    torch.testing.assert_close(loaded.velocity(*inputs), model.velocity(*inputs), rtol=1e-5, atol=1e-6)
    assert (loaded.velocity(*inputs) - plain).abs().max() > 1e-2


def test_its_encodings_are_not_cached_and_its_grid_is_shifted():
    model = Toy().load(CPU, "fp32")
    with pytest.raises(ModelError, match="ToyFlow does not say what its encodings of prompts depend on"):
        model.identity("prompts")
    assert model.sigmas(4, 16, 16) == [1, 0.75, 0.5, 0.25, 0]
    model.shift = 3.0
    assert model.sigmas(4, 16, 16) == pytest.approx([1, 0.9, 0.75, 0.5, 0])  # 3 t / (1 + 2 t)


def items(**fields):
    n = torch.arange(3)
    return Items(
        torch.ones(3), {"prompt_index": n, "sample_index": n, **fields}, Conditions({"c": torch.zeros(1, 2)})
    )


def test_items_name_the_field_that_is_missing_or_of_another_length():
    assert len(items(latents=torch.zeros(3, 1))) == 3
    for name in ("prompt_index", "sample_index"):
        fields = {key: value for key, value in items().fields.items() if key != name}
        with pytest.raises(ValueError, match=f"items lack '{name}'; they have"):
            Items(torch.ones(3), fields, items().conditions)
    with pytest.raises(ValueError, match=r"must have the same length.*weight 3.*latents 2"):
        items(latents=torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"must have the same length.*scale none"):
        items(scale=torch.tensor(1.0))
    with pytest.raises(ValueError, match="'latents' is of type list, not a tensor"):
        items(latents=[1, 2, 3])


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"kl": 0.5}, "items: 'kl' is of type float, not a tensor"),
        ({"kl": torch.zeros(3, 3)}, r"the metric 'kl' has the shape \(3, 3\), not \(\) or \(n,\)"),
        *(
            ({name: torch.zeros(3)}, f"a metric cannot be called '{name}', which the engine")
            for name in sorted(RECORDED)
        ),
    ],
)
def test_metrics_that_cannot_be_recorded_are_refused_by_name(metrics, words):
    made = items()
    with pytest.raises(ValueError, match=words):
        Items(made.weight, made.fields, made.conditions, metrics)
    with pytest.raises(ValueError, match="a metric cannot be called 'loss'"):
        Losses(made.weight, {"loss": made.weight})


@pytest.mark.parametrize(
    ("method", "returned", "words"),
    [
        ("encode_prompts", None, "encode_prompts returned NoneType, where a dict of tensors is expected"),
        (
            "encode_prompts",
            {"c": torch.zeros(1, 2)},
            r"returned c as \(1, 2\), where a row for each of 2 prompts",
        ),
        ("encode_prompts", {"c": [0, 0]}, "returned c as list, where a row"),
        (
            "posterior",
            torch.zeros(2, 3, 4, 4),
            r"posterior returned \(2, 3, 4, 4\), where mean and log-variance",
        ),
        (
            "posterior",
            (torch.zeros(1, 3, 4, 4),) * 2,
            r"the mean as \(1, 3, 4, 4\), where the shape \(2, 3, 4, 4\)",
        ),
        ("velocity", (torch.zeros(2, 3, 4, 4),), r"velocity returned tuple, where the shape \(2, 3, 4, 4\)"),
        ("velocity", torch.zeros(2, 3, 1, 1), r"velocity returned \(2, 3, 1, 1\), where the shape"),
    ],
)
def test_what_a_model_returns_of_another_shape_is_told_with_its_class(
    method, returned, words, toy, monkeypatch
):
    model = toy.load(torch.device("cpu"), "fp32")
    monkeypatch.setattr(model, method, lambda *given: returned)
    latents, condition = torch.zeros(2, 3, 4, 4), {"c": torch.zeros(2, 2)}
    call = {
        "encode_prompts": lambda: encode(model, ["a"]),
        "posterior": lambda: model.encode_images(torch.zeros(2, 3, 16, 16), latents),
        "velocity": lambda: Policy(model).velocity(latents, torch.ones(2), condition),
    }[method]
    with pytest.raises(ModelError, match=r"test_model_contract:ToyFlow\..*" + words):
        call()


def test_a_model_that_loads_nothing_is_told_with_its_class(toy, monkeypatch):
    monkeypatch.setattr(Toy, "load", lambda *given: None)
    with pytest.raises(
        ModelError, match=r"test_model_contract:Toy\.load returned NoneType, which is no FlowModel"
    ):
        loaded(toy, torch.device("cpu"), "fp32")
