"""What a stage publishes from weights in parts: the files of one process, and no process holds the whole."""

import pytest
import torch
from pipelines import load
from ranks import on_ranks
from stored import Made

from posttrain.distributed.world import ALONE
from posttrain.errors import ModelError
from posttrain.optim.settings import Train
from posttrain.parallel.ddp import DDP
from posttrain.parallel.fsdp2 import FSDP2
from posttrain.parallel.single import Single
from posttrain.policy import Policy
from posttrain.policy.tuning import Full, Lora
from posttrain.policy.whole_weights import whole_weights
from posttrain.weights import writing
from posttrain.weights.files import weight_files
from posttrain.weights.writing import entries_in

TUNES = {"full": Full(), "lora": Lora(rank=8, alpha=24.0)}
LAYOUTS = {"single": Single, "ddp": DDP, "fsdp2": FSDP2}


def changed(model, tune):
    """A policy of which no weight is that of the base; and an EMA of its weights with others."""
    TUNES[tune].apply(model.transformer, 0)
    policy, draws = Policy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trained.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return policy, {n: p.detach() + 1 for n, p in policy.trained.items()}


def spread(policy, ema, layout, world):
    strategy = LAYOUTS[layout]().prepare(policy, Train(steps=1), world)
    policy.layout = strategy.layout
    policy.add_role("ema", ema)


def written(policy, tune, role, folder, world, dtype="fp32"):
    """Write what ``final/`` has of the transformer; what this process made for it."""
    with Made() as made, whole_weights(policy, role, world) as weights:
        if world.is_main and tune == "lora":
            policy.model.save_lora(folder, weights)
        elif world.is_main:
            policy.model.save(folder, dtype, weights)
    return made


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def publish_in(tmp_path, tune, role, layout, size, **options):
    """One process's folder, that of ``size`` processes, and what these made."""
    models = [load() for _ in range(size + 1)]  # the ranks are threads, and share torch's generator
    alone, *several = [changed(model, tune) for model in models]
    spread(*alone, "single", ALONE)
    written(alone[0], tune, role, tmp_path / "one", ALONE, **options)

    def work(world):
        policy, ema = several[world.rank]
        spread(policy, ema, layout, world)
        return written(policy, tune, role, tmp_path / "several", world, **options)

    made = on_ranks(size, work, 60)
    return contents(tmp_path / "one"), contents(tmp_path / "several"), made, alone[0]


@pytest.mark.parametrize(
    ("tune", "role", "layout", "size"),
    [
        ("full", None, "fsdp2", 2),
        ("full", "ema", "fsdp2", 2),
        ("lora", None, "fsdp2", 2),
        ("lora", "ema", "fsdp2", 2),
        ("full", "ema", "fsdp2", 3),
        ("lora", "ema", "ddp", 2),
    ],
)
def test_the_files_are_those_of_one_process_and_no_process_holds_more_than_a_weight(
    tmp_path, tune, role, layout, size
):
    one, several, made, policy = publish_in(tmp_path, tune, role, layout, size)
    assert one == several
    sizes = [p.nbytes for p in policy.trained.values()]
    assert sum(sizes) > 6 * max(sizes), "the whole would be noticed"
    for each in made:
        # the one before, the one that is written and, of a LoRA, its product with the scale
        assert each.most <= 3.5 * max(sizes)
    if layout == "fsdp2":
        assert min(each.bytes for each in made) >= sum(sizes), "what is gathered is counted"


def test_who_keeps_what_is_read_holds_the_whole(tmp_path):
    """So the bytes above tell it."""
    policies = [changed(load(), "full") for _ in range(2)]

    def work(world):
        spread(*policies[world.rank], "fsdp2", world)
        with Made() as made, whole_weights(policies[world.rank][0], None, world) as weights:
            kept = [entry.read() for entry in weights.values()]
        return made.most, sum(tensor.nbytes for tensor in kept)

    (main, whole), (other, nothing) = on_ranks(2, work, 60)
    assert main >= whole > 6 * other > nothing == 0


def test_diffusers_draws_with_what_is_published_from_weights_in_parts(tmp_path):
    from diffusers import AutoModel, StableDiffusion3Pipeline

    _, _, _, policy = publish_in(tmp_path, "full", None, "fsdp2", 2, dtype="bf16")
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path / "several").transformer
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, policy.trained[name].bfloat16().float()), name
    # which goes by the class that the configuration names
    assert type(AutoModel.from_pretrained(str(tmp_path / "several" / "transformer"))) is type(loaded)


def test_an_error_while_it_is_written_is_the_main_processs_and_the_others_go_on(tmp_path):
    policies = [changed(load(), "full") for _ in range(2)]

    def work(world):
        policy, ema = policies[world.rank]
        ema["proj_out.bias"][0] = 70_000.0
        spread(policy, ema, "fsdp2", world)
        try:
            written(policy, "full", "ema", tmp_path / "final", world, dtype="fp16")
        except ModelError as error:
            return str(error)
        return "went on"

    refused, other = on_ranks(2, work, 60)
    assert "too large for the precision (proj_out.bias)" in refused
    assert other == "went on"


def test_a_large_model_is_written_to_several_files_that_diffusers_loads(tmp_path, monkeypatch):
    from diffusers import StableDiffusion3Pipeline

    model = load()
    model.save(tmp_path / "one", "bf16", {})
    monkeypatch.setattr(writing, "SHARD", "8KB")
    for name in ("several", "again"):
        model.save(tmp_path / name, "bf16", {})
    assert contents(tmp_path / "several") == contents(tmp_path / "again")
    for component in ("transformer", "text_encoder"):
        whole = entries_in(weight_files(tmp_path / "one" / component))
        files = weight_files(tmp_path / "several" / component)
        assert len(weight_files(tmp_path / "one" / component)) == 1 < len(files)
        for file in files:
            sizes = [entry.bytes_in(None) for entry in entries_in([file]).values()]
            assert sum(sizes) <= 8000 or len(sizes) == 1
        parts = entries_in(files)
        assert parts.keys() == whole.keys()
        assert all(torch.equal(entry.read(), whole[name].read()) for name, entry in parts.items())
    loaded, single = (
        StableDiffusion3Pipeline.from_pretrained(tmp_path / name) for name in ("several", "one")
    )
    for part in ("transformer", "text_encoder"):
        found, wanted = (getattr(pipeline, part).state_dict() for pipeline in (loaded, single))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    model.load_weights(tmp_path / "several")
