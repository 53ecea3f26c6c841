"""Which weights a stage trains: the layers that get an adapter, how it is drawn, and what is frozen."""

import math

import pytest
import torch
from diffusers import SD3Transformer2DModel
from pydantic import ValidationError

from posttrain.errors import ModelError
from posttrain.policy.tuning import ADAPTER, Full, Lora

QUERY = "transformer_blocks.0.attn.to_q"


def transformer(dtype=torch.float32):
    """A random transformer of one block, whose linear layers are 16 wide."""
    torch.manual_seed(0)
    made = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=4,
    )
    return made if dtype is torch.float32 else torch.nn.Module.to(made, dtype)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def drawn(seed=0, **fields):
    model = transformer()
    Lora(**{"rank": 4, **fields}).apply(model, seed)
    return model


def test_all_weights_are_trained_in_float32():
    model = transformer(torch.bfloat16).requires_grad_(False)
    Full().apply(model, 0)
    assert trained(model).keys() == dict(model.named_parameters()).keys()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_sizes_are_counted_from_shapes():
    shapes = {
        "x.q.weight": (3, 5),
        "x.q.bias": (3,),
        "x.qq.weight": (7, 11),
        "q.weight": (2, 4),
        "k.weight": (1, 1),
    }
    assert Full().trainable_parameters({}) == 0
    assert Full().trainable_parameters(shapes) == 15 + 3 + 77 + 8 + 1
    assert Lora(rank=2, targets=["q"]).trainable_parameters(shapes) == 2 * (3 + 5) + 2 * (2 + 4)
    assert Lora(rank=3, targets=["x.q", "k"]).trainable_parameters(shapes) == 3 * (3 + 5) + 3 * (1 + 1)
    # a convolution has no adapter
    assert Lora(rank=3, targets=["q"]).trainable_parameters({"q.weight": (2, 2, 3, 3)}) == 0


def test_an_adapter_is_drawn_from_its_seed_and_nothing_else():
    def first(seed, before):
        model = transformer()
        torch.manual_seed(before)
        Lora(rank=4).apply(model, seed)
        after = torch.rand(()).item()
        torch.manual_seed(before)
        assert after == torch.rand(()).item(), "what is drawn after it is what would have been"
        return trained(model)

    one, again, other = first(1, 10), first(1, 20), first(2, 10)
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, other[name]) is (".lora_B." in name)
        assert tensor.any() == (".lora_A." in name)


def test_the_draw_is_as_init_says():
    for rank in (4, 8):
        names = {
            n: p
            for n, p in trained(drawn(rank=rank, targets=["to_q", "to_k", "to_v", "linear_1"])).items()
            if "lora_A" in n
        }
        values = torch.cat([p.detach().flatten() for p in names.values()])
        assert values.std().item() == pytest.approx(1 / rank, rel=0.1)
        assert values.abs().max() > 2 / rank
    default = trained(drawn(init="default"))
    assert not any(p.any() for n, p in default.items() if ".lora_B." in n)
    uniform = default[f"{QUERY}.lora_A.default.weight"].detach()
    bound = 1 / math.sqrt(16)  # Kaiming's, of 16 inputs and a = sqrt(5)
    assert 0.9 * bound < uniform.abs().max() <= bound


def test_only_the_layers_that_end_in_a_target_get_an_adapter():
    names = set(trained(drawn(targets=["0.attn.to_q", "proj_out"])))
    assert names == {f"{n}.lora_{ab}.default.weight" for n in (QUERY, "proj_out") for ab in "AB"}
    with pytest.raises(
        ModelError, match=r"no linear layer of the transformer ends in 'o_q', 'x'; the endings there are "
    ):
        drawn(targets=["to_q", "o_q", "x"])
    with pytest.raises(ModelError, match="ends in 'attn'"):
        drawn(targets=["attn"])  # which is there, but is no linear layer


def test_a_transformer_that_has_none_of_the_default_targets_gets_adapters_at_its_plain_projections():
    class Attention(torch.nn.Module):
        def __init__(self, *names):
            super().__init__()
            for name in names:
                self.add_module(name, torch.nn.Linear(2, 3))

    def adapted(**layers):
        from diffusers.loaders import PeftAdapterMixin

        class Small(torch.nn.Module, PeftAdapterMixin):
            pass

        model = Small()
        for name, attention in layers.items():
            model.add_module(name, attention)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        Lora(rank=1).apply(model, 0)
        sizes = [p.numel() for p in trained(model).values()]
        assert sum(sizes) == Lora(rank=1).trainable_parameters(shapes)
        return {name.partition(".lora_")[0] for name in trained(model)}

    projections = ("to_q", "to_k", "to_v", "to_out")
    found = adapted(attn1=Attention(*projections), attn2=Attention(*projections))
    assert found == {f"attn{i}.{name}" for i in (1, 2) for name in projections[:3]}
    ends = [t.removeprefix("attn.") for t in Lora().targets if "out.0" not in t]
    both = Attention(*ends)
    both.add_module("to_out", torch.nn.ModuleList([torch.nn.Linear(2, 3)]))
    assert adapted(attn=both, attn2=Attention(*projections)) == set(Lora().targets)


def test_the_endings_that_there_are_are_told_in_order_and_once():
    with pytest.raises(ModelError) as found:
        drawn(targets=["x"])
    endings = str(found.value).split("the endings there are ")[1].split(", ")
    assert endings == sorted(set(endings))
    assert {"attn.to_q", "attn.to_out.0", "norm1.linear", "ff.net.2", "context_embedder", "proj_out"} <= set(
        endings
    )


def test_by_default_an_adapter_is_that_of_flow_grpo():
    lora = Lora()
    assert (lora.rank, lora.alpha, lora.init, lora.before) == (32, 64.0, "gaussian", "merge")
    ends = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    assert lora.targets == [f"attn.{end}" for end in ends]
    assert ADAPTER == "default"
    assert (Lora(rank=1, alpha=0.5).rank, Lora(alpha=0.5).alpha) == (1, 0.5)
    assert (Lora(rank=8).alpha, Lora(rank=8, alpha=64).alpha, Lora(alpha=3).rank) == (8, 64, 32)
    assert (Full().merges, lora.merges, Lora(before="stack").merges) == (True, True, False)
    for bad in (
        {"rank": 0},
        {"alpha": 0.0},
        {"init": "x"},
        {"targets": []},
        {"targets": [""]},
        {"before": "x"},
    ):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            Lora.model_validate(bad)


@pytest.mark.parametrize(("alpha", "kept"), [(12.0, int), (2.5, float)])
def test_rank_and_alpha_scale_the_adapter(alpha, kept):
    model = drawn(alpha=alpha)
    config = model.peft_config[ADAPTER]
    assert (config.r, config.lora_alpha, type(config.lora_alpha)) == (4, alpha, kept)
    layer = model.get_submodule(QUERY)
    x = torch.arange(16.0)[None]
    with torch.no_grad():
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        assert torch.equal(layer(x), layer.base_layer(x))
        up.weight.fill_(0.5)
        torch.testing.assert_close(
            layer(x) - layer.base_layer(x), alpha / 4 * up(down(x)), rtol=1e-4, atol=1e-4
        )


def test_the_rest_is_frozen_as_it_was_and_the_adapter_is_float32():
    model = transformer(torch.bfloat16)
    Lora(rank=2).apply(model, 0)
    own = trained(model)
    assert own
    assert all(".lora_" in n for n in own)
    assert {p.dtype for p in own.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_stacked_adapter_is_trained_beside_a_frozen_one_that_still_counts(recwarn):
    from peft import LoraConfig

    model = transformer()
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=[QUERY]), adapter_name="before")
    layer = model.get_submodule(QUERY)
    layer.lora_B["before"].weight.data.fill_(0.5)
    x = torch.arange(16.0)[None]
    with torch.no_grad():
        before = layer(x)
    with pytest.raises(ModelError, match="ends in 'before'"):
        Lora(rank=4, before="stack", targets=["before"]).apply(model, 0)  # no adapter of an adapter
    Lora(rank=4, before="stack", targets=["attn.to_q"]).apply(model, 0)
    with torch.no_grad():
        assert torch.equal(layer(x), before)
        assert not torch.equal(layer(x), layer.base_layer(x))
        layer.lora_B["default"].weight.fill_(0.5)
        assert not torch.equal(layer(x), before)
    own = trained(model)
    assert set(own) == {
        f"transformer_blocks.{i}.attn.to_q.lora_{ab}.default.weight" for i in (0, 1) for ab in "AB"
    }
    assert not any("peft_config" in str(w.message) for w in recwarn)
