"""Compiled blocks compute the same, and a run goes on where blocks cannot be compiled.

The backend aot_eager traces and splits forward and backward as the default one does, and generates no code.
"""

import gc
import weakref

import pytest
import torch
from pipelines import load
from runs import HEAD, TRAIN, recipe, run_quietly, stage
from test_run import assert_equal_weights, weights

from posttrain.distributed.world import ALONE
from posttrain.engine import compiling, modes
from posttrain.engine.modes import Mode
from posttrain.engine.tracker import read_metrics
from posttrain.errors import RecipeError, TrainingError
from posttrain.optim.settings import Train
from posttrain.parallel.single import Single
from posttrain.policy import Policy
from posttrain.policy.blocks import blocks
from posttrain.policy.out_of_memory import OutOfMemory
from posttrain.policy.tuning import Full
from posttrain.sampling.prompts import encode
from posttrain.stages import stage as stages

COMPILED = TRAIN.replace("{", "{compile: true, ")
PROMPTS = "{prompts: {type: shapes, count: 12}, resolution: 16}"
CASES = {
    "sft, recomputed": ("{type: sft}", "gradient_checkpointing: full, "),
    "grpo": ("{type: flow_grpo, group_size: 2, num_steps: 4, guidance_scale: 2.0}", ""),
}


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


def run_both(tmp_path, algorithm="{type: sft}", settings="", **fields):
    """What the run with compiled blocks printed; beside it one without."""
    both = [
        stage(name, algorithm, train=train.replace("{", "{" + settings), start_from="base", **fields)
        for name, train in [("compiled", COMPILED), ("plain", TRAIN)]
    ]
    if "flow_grpo" in algorithm:
        both = [text.replace("{type: shapes, images: 10, seed: 1}", PROMPTS) for text in both]
    return run_quietly(recipe(*both), tmp_path / "run")


@pytest.mark.parametrize("case", CASES)
def test_compiled_blocks_train_alike(tmp_path, monkeypatch, case):
    monkeypatch.setattr(compiling, "OPTIONS", {**compiling.OPTIONS, "backend": "aot_eager"})
    seen = []
    prepared = compiling.blocks
    monkeypatch.setattr(compiling, "blocks", lambda module: seen.append(module) or prepared(module))
    algorithm, settings = CASES[case]
    fields = {"rewards": "['brightness:score']"} if "grpo" in case else {"tune": "{type: full}"}
    printed = run_both(tmp_path, algorithm, settings, **fields)
    assert "compile" not in printed.replace("compiled", "")
    assert all(block._compiled_call_impl is not None for block in blocks(seen[0]))
    one, other = (losses(tmp_path / "run" / name) for name in ("compiled", "plain"))
    assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    a, b = (weights(tmp_path / "run" / name) for name in ("compiled", "plain"))
    assert all((a[n] - b[n]).norm() <= 1e-4 * b[n].norm() for n in b)


def two_programs(graph, inputs):
    """A backend whose programs without gradients give other numbers than those with gradients."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def other(graph, _):
        def run(*args):
            return [1.01 * x if x.is_floating_point() else x for x in graph(*args)]

        return make_boxed_func(run)

    def same(graph, _):
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=same, bw_compiler=same, inference_compiler=other)
    return backend(graph, inputs)


@pytest.mark.parametrize(("precision", "strategy"), [("fp32", "ddp"), ("bf16", "single")])
def test_the_ratio_is_1_though_a_forward_without_gradients_is_another_program(
    tmp_path, monkeypatch, precision, strategy
):
    monkeypatch.setattr(compiling, "OPTIONS", {**compiling.OPTIONS, "backend": two_programs})
    algorithm = "{type: flow_grpo, group_size: 2, num_steps: 4, guidance_scale: 2.0}"
    one = stage(
        "grpo",
        algorithm,
        train=COMPILED.replace("{", f"{{precision: {precision}, "),
        start_from="base",
        rewards="['brightness:score']",
    ).replace("{type: shapes, images: 10, seed: 1}", PROMPTS)
    head = HEAD.replace("device: cpu", f"device: cpu\nparallel: {{strategy: {strategy}}}")
    run_quietly(recipe(one, head=head), tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "grpo" / "metrics.jsonl")
    # one optimizer step for each batch, so the ratio is that of the weights that collected it
    assert len(rows) > 1
    assert max(row["ratio_deviation"] for row in rows) <= 1e-6
    assert rows[0]["kl"] == 0, "the reference has the same weights"


def test_where_blocks_cannot_be_compiled_they_run_as_they_are_and_a_line_says_so(tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise NotImplementedError("no kernel for this [machine]")

    monkeypatch.setattr(compiling, "OPTIONS", {**compiling.OPTIONS, "backend": broken})
    printed = run_both(tmp_path)
    (line,) = [line for line in printed.splitlines() if "compile:" in line]
    assert line.startswith("compiled: compile: the blocks run as they are (")
    assert "no kernel for this [machine]" in line
    assert_equal_weights(*(weights(tmp_path / "run" / name) for name in ("compiled", "plain")))


def whole_policy():
    model = load()
    Full().apply(model.transformer, 0)
    policy = Policy(model)
    return policy, Single().prepare(policy, Train(steps=1), ALONE)


def test_a_failure_is_told_after_a_stage_whose_blocks_could_be_compiled(monkeypatch):
    def broken(graph, inputs):
        raise NotImplementedError("no kernel")

    policy, strategy = whole_policy()
    conditions, _ = encode(policy.model, ["a red circle"])
    sample = torch.zeros(policy.model.latent_shape(16, 16)), conditions
    monkeypatch.setattr(compiling, "OPTIONS", {**compiling.OPTIONS, "backend": "eager"})
    assert compiling.compile_blocks(policy, strategy, sample) is None
    assert policy.compiled
    torch.compiler.reset()
    monkeypatch.setattr(compiling, "OPTIONS", {**compiling.OPTIONS, "backend": broken})
    assert "no kernel" in compiling.compile_blocks(policy, strategy, sample)
    assert not policy.compiled
    assert not any(block._compiled_call_impl for block in blocks(policy.model.transformer))


@pytest.mark.parametrize(("rows", "alone"), [(1, True), (4, True), (1, False), (4, False)])
def test_blocks_whose_rows_do_not_fit_are_compiled_all_the_same(monkeypatch, rows, alone):
    policy, strategy = whole_policy()
    monkeypatch.setattr(type(strategy), "tries_alone", alone)
    asked = []

    def try_out(p, s, sample, count):
        asked.append(count)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compiling, "try_out", try_out)
    if alone:
        assert compiling.compile_blocks(policy, strategy, "sample", rows=rows) is None
        assert policy.compiled
    else:
        with pytest.raises(TrainingError if rows == 1 else OutOfMemory) as error:
            compiling.compile_blocks(policy, strategy, "sample", rows=rows)
        assert getattr(error.value, "micro_batch", 2) == 2
        assert not policy.compiled
        assert not any(block._compiled_call_impl for block in blocks(policy.model.transformer))
    assert asked == [rows]


def kept_bytes(checkpointing, monkeypatch):
    """The bytes that the blocks keep for the backward, and the gradients."""
    monkeypatch.setattr(compiling, "OPTIONS", {**compiling.OPTIONS, "backend": "aot_eager"})
    torch.compiler.reset()
    policy, strategy = whole_policy()
    model = policy.model
    conditions, rows = encode(model, ["a red circle"] * 2)
    latents, sigma = torch.ones(2, *model.latent_shape(16, 16)), torch.tensor([0.2, 0.9])
    assert modes.enter(Mode(True, checkpointing), policy, strategy, (latents[0], conditions)) is None
    assert policy.compiled
    sizes = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = policy.velocity(latents, sigma, conditions.rows(rows)).square().mean()
    strategy.backward(loss)
    return sum(sizes.values()), [p.grad for p in policy.trained.values() if p.grad is not None]


def test_compiled_blocks_keep_the_share_that_they_are_given(monkeypatch):
    whole, gradients = kept_bytes("off", monkeypatch)
    kept, same = kept_bytes(0.2, monkeypatch)
    for a, b in zip(gradients, same, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm().clamp(min=1e-8)
    assert kept < 0.6 * whole


def test_the_weights_of_a_compiled_stage_are_gone_when_it_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "OPTIONS", {**compiling.OPTIONS, "backend": "eager"})
    kept, prepared = [], compiling.blocks

    def noted(transformer):
        made = prepared(transformer)
        kept.extend(weakref.ref(parameter) for parameter in made[0].parameters())
        return made

    monkeypatch.setattr(compiling, "blocks", noted)
    gc.disable()  # when it comes by itself depends on all else
    try:
        run_quietly(recipe(stage("sft", train=COMPILED.replace("steps: 6", "steps: 2"))), tmp_path / "run")
        assert kept
        assert all(parameter() is None for parameter in kept)
    finally:
        gc.enable()


def test_zero_3_is_not_compiled():
    block = "parallel={strategy: deepspeed, zero_stage: 3}"
    with pytest.raises(RecipeError, match=r"train\.compile.*ZeRO-3.*fsdp2"):
        recipe(stage("sft", train=COMPILED), overrides=[block])


@pytest.fixture(autouse=True)
def _as_before():
    from torch._dynamo import config

    before = config.suppress_errors, config.cache_size_limit
    yield
    config.suppress_errors, config.cache_size_limit = before
    torch.compiler.reset()


@pytest.mark.parametrize(("micro_batch", "rows"), [(3, 3), (8, 4)])  # a step has 4 items
def test_what_is_compiled_first_is_the_size_that_comes(tmp_path, monkeypatch, micro_batch, rows):
    entered = []
    monkeypatch.setattr(stages, "enter", lambda mode, policy, strategy, sample, rows: entered.append(rows))
    train = COMPILED.replace("micro_batch: 4", f"micro_batch: {micro_batch}").replace("steps: 6", "steps: 1")
    run_quietly(recipe(stage("sft", train=train)), tmp_path / "run")
    assert entered == [rows]
