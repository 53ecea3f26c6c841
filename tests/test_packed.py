"""Frozen weights in 8 and 4 bits: how large they are, how close, and that training a LoRA on them is exact."""

import json
import math

import pytest
import torch
from pipelines import load
from runs import HEAD, cut_off_after, recipe, run_quietly, stage
from safetensors.torch import load_file
from torch import nn

from posttrain.errors import InstallError, RecipeError
from posttrain.policy import Policy, packed
from posttrain.policy.packed import PackedLinear, frozen_bytes, pack, packed_bytes, scale_bytes
from posttrain.policy.tuning import Lora
from posttrain.recipe.checks import machine_problems
from posttrain.recipe.file import load_recipe
from posttrain.weights.transformer import LORA
from posttrain.weights.writing import entries_of

LORA_TUNE = "{type: lora, rank: 2, base: %s}"
BOTH = pytest.mark.parametrize("packing", ["int8", "nf4"])


def layer(packing, size=(48, 80), dtype=torch.float32):
    torch.manual_seed(0)
    plain = nn.Linear(size[1], size[0]).to(dtype).requires_grad_(False)
    return plain, PackedLinear(plain, packing)


def held(module):
    """Bytes of all storages that a module holds."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@BOTH
@pytest.mark.parametrize("size", [(48, 80), (3, 5), (64, 64)])
def test_weights_take_the_bytes_that_are_promised(packing, size):
    _, one = layer(packing, size)
    numbers = size[0] * size[1]
    promised = numbers + 4 * size[0] if packing == "int8" else -(-numbers // 2) + 4 * -(-numbers // 64)
    assert packed_bytes(size, packing) == promised
    assert held(one) == promised + 4 * size[0]  # and the bias


@BOTH
def test_weights_are_as_close_as_their_bits_allow(packing):
    plain, one = layer(packing)
    weight, unpacked = plain.weight, one.unpacked(torch.float32)
    if packing == "int8":
        # half a step of the row's scale, and fp16's rounding of weight and scale
        assert ((weight - unpacked).abs() <= weight.abs().amax(1, keepdim=True) * (0.57 / 127)).all()
    else:
        # the widest gap of NormalFloat's 16 values is 0.304 of the block's largest number
        blocks, off = weight.flatten().view(-1, 64), (weight - unpacked).flatten().view(-1, 64)
        assert (off.abs() <= blocks.abs().amax(1, keepdim=True) * 0.153).all()
        assert len(unpacked.flatten()[:64].unique()) <= 16


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_its_unpacked_weight_and_keeps_none(packing, dtype):
    _, one = layer(packing, dtype=dtype)
    same = nn.Linear(80, 48, dtype=dtype)
    same.weight.data, same.bias = one.unpacked(dtype), one.bias
    x, y = (torch.randn(2, 7, 80, dtype=dtype).requires_grad_() for _ in range(2))
    y.data = x.data.clone()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = one(x)
    assert torch.equal(output, same(y))
    with torch.no_grad():
        assert torch.equal(output, one(x))
    assert not any(t.is_floating_point() and t.numel() >= 48 * 80 for t in kept)
    slope = torch.randn_like(output)
    output.backward(slope)
    same(y).backward(slope)
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize(("packing", "least", "most"), [("int8", 1e-4, 0.012), ("nf4", 0.02, 0.13)])
def test_the_velocity_is_close_to_that_of_the_model(packing, least, most):
    model = load("posttrain/tiny-sd3")
    shapes = {name: tuple(p.shape) for name, p in model.transformer.named_parameters()}
    torch.manual_seed(0)
    x, sigma = torch.randn(4, *model.latent_shape(64, 64)), torch.tensor([0.1, 0.4, 0.7, 0.99])
    condition = model.encode_prompts(["a red circle above a blue square", "two green triangles"] * 2)
    with torch.no_grad():
        before = model.velocity(x, sigma, condition)
        pack(model.transformer, packing)
        after = model.velocity(x, sigma, condition)
    assert least < (after - before).norm() / before.norm() < most
    inside = [m for m in model.transformer.transformer_blocks.modules() if isinstance(m, nn.Linear)]
    assert {type(m) for m in inside} == {PackedLinear}
    assert type(model.transformer.proj_out) is nn.Linear
    parameters = sum(p.nbytes for p in model.transformer.parameters())
    assert frozen_bytes(shapes, 4, packing) == parameters + scale_bytes(model.transformer)


def test_a_role_without_the_adapter_is_the_packed_model():
    model = load()
    pack(model.transformer, "nf4")
    x, sigma, condition = torch.randn(2, 4, 8, 8), torch.rand(2), model.encode_prompts(["a", "b"])
    with torch.no_grad():
        before = model.velocity(x, sigma, condition)
    again = load()
    Lora(rank=2, base="nf4").apply(again.transformer, 0)
    policy = Policy(again)
    policy.add_role("reference", moves=False)
    for parameter in policy.trained.values():
        parameter.data.normal_()
    moved = policy.velocity(x, sigma, condition)
    with policy.using("reference"):
        assert torch.equal(policy.velocity(x, sigma, condition), before)
    assert not torch.equal(moved, before)


def small(packing, name="only", **fields):
    return stage(name, tune=LORA_TUNE % packing, **fields)


@BOTH
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path, monkeypatch, packing):
    run_quietly(recipe(small(packing)), tmp_path / "whole")
    cut_off_after(3, recipe(small(packing)), tmp_path / "cut", monkeypatch)
    with pytest.raises(RecipeError, match=r"tune\.base"):
        run_quietly(recipe(small("int8" if packing == "nf4" else "nf4")), tmp_path / "cut")
    run_quietly(recipe(small(packing)), tmp_path / "cut")
    one, other = (load_file(tmp_path / name / "only" / "final" / LORA) for name in ("whole", "cut"))
    assert one.keys() == other.keys()
    load().load_weights(tmp_path / "whole" / "only" / "final")  # it is a LoRA as any other
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert any(tensor.any() for name, tensor in one.items() if "lora_B" in name)
    (manifest,) = (tmp_path / "whole").glob("only/checkpoints/step-*6/manifest.json")
    names = [name for name in json.loads(manifest.read_text())["keys"] if "blocks" in name]
    assert names
    assert all(".lora_" in name for name in names)


@pytest.mark.parametrize("before", ["merge", "stack"])
def test_adapters_of_earlier_stages_are_merged_before_the_weights_are_packed_or_stay_whole(tmp_path, before):
    earlier = load()
    Lora(rank=2).apply(earlier.transformer, 0)
    weights = {n: torch.randn_like(p) for n, p in earlier.transformer.named_parameters() if p.requires_grad}
    earlier.save_lora(tmp_path, entries_of(weights))
    model, merged = load(), load()
    model.load_weights(tmp_path, merge=before == "merge")
    merged.load_weights(tmp_path)
    weight = merged.transformer.transformer_blocks[0].attn.to_q.weight
    Lora(rank=2, before=before, base="int8").apply(model.transformer, 0)
    query = model.transformer.transformer_blocks[0].attn.to_q
    (one,) = [m for m in query.modules() if isinstance(m, PackedLinear)]
    if before == "merge":
        expected = nn.Linear(*reversed(weight.shape))
        expected.weight.data = weight.detach().clone()
        assert torch.equal(one.weight, PackedLinear(expected, "int8").weight)
        assert len(query.lora_A) == 1
    else:
        assert len(query.lora_A) == 2
        assert {m.weight.dtype for m in query.lora_A.values()} == {torch.float32}
    with torch.no_grad():
        x, sigma, condition = torch.randn(1, 4, 8, 8), torch.rand(1), model.encode_prompts(["a"])
        off = model.velocity(x, sigma, condition) - merged.velocity(x, sigma, condition)
        assert off.norm() < 0.02 * merged.velocity(x, sigma, condition).norm()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD + "parallel: {strategy: fsdp2}\n", "base.*nf4 packs weights whole, and fsdp2 shards"),
        (HEAD + "parallel: {strategy: deepspeed}\n", "base.*nf4 packs weights whole, and deepspeed shards"),
    ],
)
def test_strategies_that_shard_are_refused(text, said):
    with pytest.raises(RecipeError, match=said):
        recipe(small("nf4"), head=text)


def test_full_tuning_and_another_reference_are_refused():
    with pytest.raises(RecipeError, match=r"tune\.base .*no such field; full has type \(lora has it\)"):
        recipe(stage("only", tune="{type: full, base: nf4}"))
    online = "    data: {prompts: {type: shapes, count: 4}, resolution: 16}\n    rewards: shapes\n"
    second = (
        "  - name: second\n    algorithm: {type: diffusion_nft, group_size: 2}\n    reference: base\n"
        f"    tune: {LORA_TUNE % 'nf4'}\n    train: {{steps: 2}}\n{online}"
    )
    with pytest.raises(RecipeError, match=r"reference.*packed weights cannot be exchanged"):
        recipe(stage("first"), second)


def test_without_the_package_the_extra_is_named(monkeypatch):
    made = recipe(small("nf4"))
    monkeypatch.setattr(packed, "find_spec", lambda name: None)
    (found,) = [text for path, text in machine_problems(made) if path[-1] == "base"]
    assert "posttrain[8bit]" in found
    with pytest.raises(InstallError, match=r"posttrain\[8bit\]"):
        layer("nf4")


def test_stable_diffusion_takes_a_half_and_a_little_more_than_a_quarter():
    shapes = load_recipe("sd35m-soar-lora", checks=False).model.transformer_shapes()
    whole, half, quarter = (frozen_bytes(shapes, 2, packing) for packing in (None, "int8", "nf4"))
    assert whole == 2 * sum(math.prod(shape) for shape in shapes.values())
    assert 0.5 < half / whole < 0.53
    assert 0.28 < quarter / whole < 0.31


@BOTH
def test_a_compiled_layer_computes_alike(packing):
    torch._dynamo.reset()
    _, one = layer(packing)
    x = torch.randn(2, 80, requires_grad=True)
    found = []
    for call in (one, torch.compile(one, backend="aot_eager", fullgraph=True)):
        x.grad = None
        output = call(x)
        output.square().sum().backward()
        found.append((output.detach(), x.grad))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
