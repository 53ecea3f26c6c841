"""A plan counts FLOPs and bytes exactly, though it runs only three of equal blocks, without weights."""

from contextlib import nullcontext

import pytest
import torch
from diffusers import SD3Transformer2DModel
from plans import planned
from torch import nn

from posttrain.models._outline import configs_at
from posttrain.models._published import PUBLISHED
from posttrain.planning import footprint
from posttrain.planning.counts import Counts
from posttrain.planning.folding import folded
from posttrain.planning.held import Held
from posttrain.policy.tuning import Full, Lora

META = torch.device("meta")
SIZE = (64, 64)


def deep(dtype="fp32"):
    """A model on the meta device with five blocks of two kinds of attention, and four of one."""
    spec = planned("sft").model
    configs = configs_at(spec.path)
    blocks = {"num_layers": 9, "dual_attention_layers": tuple(range(5))}
    return spec.outline_of({**configs, "transformer": {**configs["transformer"], **blocks}}, dtype, META)


class Deep(Counts):
    def outline(self, tune=None, lowered=None):
        def built():
            made = deep()
            if tune is not None:
                tune.apply(made.transformer, 0)
            return made.transformer.to(lowered) and made

        return self.once(("outline", tune and tune.type, lowered), built)


def whole(monkeypatch):
    monkeypatch.setattr(footprint, "folded", lambda *_: nullcontext())


LOW = torch.bfloat16
MODES = {
    **{f"{mode}-bf16": (mode, None, LOW) for mode in ("off", "selective", "full")},
    **{f"{mode}-autocast": (mode, LOW, None) for mode in ("off", "full")},
    "off-fp32": ("off", None, None),
}
"""Checkpointing, autocast and the precision of the weights."""


@pytest.mark.parametrize(("checkpointing", "autocast", "lowered"), MODES.values(), ids=MODES)
@pytest.mark.parametrize("tune", [Full(), Lora(rank=2)], ids=["full", "lora"])
def test_three_of_equal_blocks_take_as_many_bytes_as_all(monkeypatch, tune, autocast, lowered, checkpointing):
    def found():
        counts = Deep(planned("sft").model, cuda=True)
        held = counts.memory("training", SIZE, tune, autocast, checkpointing, lowered)
        return [held.peak(rows) for rows in (1, 2, 50)]

    few = found()
    whole(monkeypatch)
    assert few == found()


@pytest.mark.parametrize("tune", [None, Full()], ids=["alone", "full"])
def test_a_forward_of_three_of_equal_blocks_counts_as_one_of_all(monkeypatch, tune):
    def found():
        counts = Deep(planned("sft").model, cuda=True)
        held = counts.memory("forward", SIZE, tune, torch.bfloat16)
        return held.peak(1), held.peak(50), counts.flops("forward", SIZE)

    few = found()
    whole(monkeypatch)
    assert few == found()


def test_any_number_of_rows_is_counted_from_one_run():
    counts = Deep(planned("sft").model, cuda=True)
    counted = counts.memory("training", SIZE, Full(), torch.bfloat16)
    outline = counts.outline(Full())
    for rows in (2, 3, 17):
        call = counts._call(outline, "training", SIZE, rows)
        held = footprint.held_by(call, outline.transformer, backward=True, autocast=torch.bfloat16, wide=True)
        assert held.peak() == counted.peak(rows)


def test_the_transformer_is_whole_again_and_unequal_blocks_stay():
    transformer = deep().transformer
    before = list(transformer.transformer_blocks)
    marks = []
    with folded(transformer, marks.append):
        kept = list(transformer.transformer_blocks)
    assert list(transformer.transformer_blocks) == before
    # five equal blocks become three, three others stay, and the last is one of its own
    assert kept == [*before[:3], *before[5:8], before[8]]
    assert not any(block._forward_hooks for block in before)


class Chain(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(layers))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("layers", [1, 3, 4, 10])
def test_bytes_and_flops_of_a_chain_are_those_worked_out_by_hand(layers):
    with META:
        chain, rows = Chain(layers), torch.empty(7, 4)
    held = footprint.held_by(lambda: chain(rows), chain, rows=7)
    assert held.peak(5) == 5 * 16 * min(layers, 2)  # a layer's input and output, without gradients
    assert footprint.flops(lambda: chain(rows), chain) == layers * 2 * 7 * 4 * 4


def test_storages_of_rows_and_others_are_told_apart():
    with META, Held(1009) as held:
        kept = [torch.empty(10), torch.empty(1009, 3)]
        kept.append(torch.empty(1009, 2))
        del kept[1]
        kept.append(torch.empty(4))
    assert [held.peak(rows) for rows in (0, 1, 10)] == [56, 64, 240]


def test_prompts_are_kept_and_joined():
    recipe = planned("sft")
    counts = Counts(recipe.model, cuda=True)
    outline = counts.outline()
    for prompts in (1, 24, 200):
        call = counts._call(outline, "text", SIZE, prompts)
        counted = footprint.held_by(call, outline.transformer).peak()
        assert counted <= counts.text(prompts) <= 1.2 * counted


def test_the_published_model_is_counted_from_three_blocks_of_each_kind():
    config = PUBLISHED["stabilityai/stable-diffusion-3.5-medium"]["transformer"]
    with META:
        transformer = SD3Transformer2DModel.from_config(config)
    with folded(transformer, lambda _: None):
        assert len(transformer.transformer_blocks) == 7
    assert len(transformer.transformer_blocks) == 24
