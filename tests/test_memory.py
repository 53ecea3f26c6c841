"""A run goes on when memory does not suffice, and settings that save memory do not change the training."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from pipelines import load, pipeline_folder
from runs import EVALUATION, HEAD, TRAIN, recipe, run_quietly, stage
from test_run import assert_equal_weights, weights
from toys import ToyModel, alone, toy_batch, toy_policy

from posttrain.algorithm import Algorithm, Tools
from posttrain.algorithms.sft import SFT
from posttrain.engine import checkpoint, micro_batch, trial
from posttrain.engine.trainer import train, update
from posttrain.errors import RecipeError, RewardError, TrainingError
from posttrain.models._resting import Resting
from posttrain.models.sd3 import SD3, SD3FlowModel
from posttrain.optim import optimizers
from posttrain.optim.optimizers import optimizer_of
from posttrain.optim.settings import Train
from posttrain.parallel.single import Alone
from posttrain.policy import Policy
from posttrain.policy.activations import checkpoint_blocks
from posttrain.policy.out_of_memory import OutOfMemory, halve_until_it_fits, is_out_of_memory
from posttrain.policy.tuning import Full, Lora
from posttrain.recipe.file import parse_recipe
from posttrain.sampling.prompts import encode
from posttrain.stages.micro_batch import remember, settled

META = torch.device("meta")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A finished run of the plain recipe."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run_quietly(recipe(stage("sft")), folder)
    return folder


class Small(ToyModel):
    """Has memory for so many rows with gradients."""

    room = 2

    def velocity(self, latents, sigma, condition):
        if torch.is_grad_enabled() and len(latents) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().velocity(latents, sigma, condition)


class Late(ToyModel):
    """Has no memory for the second forward of four rows, when there are gradients already."""

    calls = 0

    def velocity(self, latents, sigma, condition):
        self.calls += torch.is_grad_enabled()
        if self.calls == 2 and len(latents) == 4:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")
        return super().velocity(latents, sigma, condition)


def gradient(model, chunk, world=None):
    policy = Policy(model, micro_batch=chunk)
    batch, draws = toy_batch(policy.model, n=10)
    with torch.no_grad():
        items = SFT().collect(batch, Tools(policy, draws))
    strategy, settings = alone(policy), Train(steps=1, max_grad_norm=1e9)

    def undone():
        strategy.zero_grad()
        return True

    halve_until_it_fits(lambda: update(SFT(), policy, items, strategy, settings, 1), policy, undone)
    return torch.cat([gradient.flatten() for gradient in strategy.optimizer.seen]), policy


@pytest.mark.parametrize("model", [Small, Late])
def test_what_does_not_fit_is_done_again_in_halves_and_counts_once(model, caplog):
    whole, _ = gradient(ToyModel(), 2)
    with caplog.at_level(logging.WARNING):
        found, policy = gradient(model(), 4)
    assert torch.equal(found, whole)
    assert policy.micro_batch == 2
    assert "out of memory with 4 rows at a time; continuing with 2" in caplog.text


def test_a_row_that_does_not_fit_alone_stops_the_run():
    small = Small()
    small.room = 0
    with pytest.raises(TrainingError, match=r"one row at a time .*gradient_checkpointing.*posttrain plan"):
        gradient(small, 4)


def test_other_errors_are_not_tried_again():
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    # what a reward's server says of its own memory is not this machine's
    caused = RewardError("HTTP 500: CUDA out of memory")
    assert not is_out_of_memory(caused)
    caused.__cause__ = torch.OutOfMemoryError("out of memory")
    assert is_out_of_memory(caused)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    calls = []

    def wrong():
        calls.append(1)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        halve_until_it_fits(wrong, toy_policy(), lambda: True)
    assert len(calls) == 1


class Checked(Algorithm):
    """Notes what it is asked to check."""

    type: str = "checked-in-test"
    needs = "images"

    def collect(self, batch, tools):
        return SFT().collect(batch, tools)

    def loss(self, items, policy):
        return SFT().loss(items, policy)

    def check_on_policy(self, losses):
        CHECKED.append(len(losses.per_item))


CHECKED = []


class Nothing:
    def before_batch(self, step):
        return True

    def after_step(self, *_):
        pass


@pytest.mark.parametrize(
    ("model", "chunk", "seen"),
    [
        (ToyModel, 4, [4]),
        (Small, 4, [2]),  # whose first step runs in smaller chunks than its items were collected in
        (ToyModel, 64, [8]),  # a batch that does not fill the chunk is checked as it was collected
    ],
)
def test_the_first_batch_that_is_trained_as_it_was_collected_is_checked_once(model, chunk, seen):
    CHECKED.clear()
    policy = Policy(model(), micro_batch=chunk)
    drawn = []

    def batches():
        for step in range(3):
            batch, draws = toy_batch(policy.model, n=8, step=step)
            drawn.append(step)
            yield batch, Tools(policy, draws)

    strategy = alone(policy, torch.optim.SGD, lr=0.1)
    train(Checked(), policy, strategy, batches(), Train(steps=3), Nothing())
    assert seen == CHECKED
    assert len(drawn) == 3


def test_processes_that_would_wait_for_each_other_stop_with_the_number_to_go_on_with():
    policy = Policy(Small(), micro_batch=4)
    strategy = alone(policy)
    strategy.world = replace(strategy.world, size=2)

    def no_room(*_):
        raise torch.OutOfMemoryError("out of memory")

    batch, draws = toy_batch(policy.model)
    failing = Checked()
    object.__setattr__(failing, "collect", no_room)
    with pytest.raises(OutOfMemory, match="with 4 rows at a time") as found:
        train(failing, policy, strategy, iter([(batch, Tools(policy, draws))]), Train(steps=1), Nothing())
    assert found.value.micro_batch == 2


def test_an_optimizer_step_is_never_taken_twice():
    class Halfway(torch.optim.SGD):
        """Moves the first weights, and has no memory for the rest."""

        def step(self):
            first = self.param_groups[0]["params"][0]
            first.data += 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    policy = Policy(ToyModel(), micro_batch=4)
    batch, draws = toy_batch(policy.model)
    strategy = alone(policy, Halfway, lr=0.1)
    first = next(iter(policy.trained.values()))
    before = first.detach().clone()
    with pytest.raises(TrainingError, match=r"in the optimizer's step .*adamw8bit"):
        train(SFT(), policy, strategy, iter([(batch, Tools(policy, draws))]), Train(steps=1), Nothing())
    assert policy.micro_batch == 4
    torch.testing.assert_close(first.detach(), before + 1)


def test_what_is_halved_is_what_was_tried(caplog):
    """A chunk is often larger than what there was to put into it."""
    policy = Policy(Small(), micro_batch=64)
    batch, draws = toy_batch(policy.model, n=8)
    with caplog.at_level(logging.WARNING):
        train(SFT(), policy, alone(policy), iter([(batch, Tools(policy, draws))]), Train(steps=1), Nothing())
    assert [record.args for record in caplog.records] == [(8, 4), (4, 2)]


@pytest.mark.parametrize("block", ["{strategy: ddp}", "{strategy: fsdp2}"])
def test_a_backward_that_failed_under_a_strategy_with_hooks_ends_the_run(tmp_path, plain, monkeypatch, block):
    """DDP and FSDP keep a failed backward's state: what they were to train after it would not be trained."""

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            if len(gradient) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return gradient

    made = recipe(stage("sft"), overrides=[f"parallel={block}"])
    embed = SD3Transformer2DModel.forward

    def forward(self, hidden_states, encoder_hidden_states, *rest, **named):
        return embed(
            self, hidden_states, Failing.apply(encoder_hidden_states.requires_grad_()), *rest, **named
        )

    monkeypatch.setattr(SD3Transformer2DModel, "forward", forward)
    with pytest.raises(TrainingError, match=r"sft: out of memory with 4 .* last checkpoint with 2"):
        run_quietly(made, tmp_path / "run")
    assert remembered(tmp_path / "run") == 2
    run_quietly(made, tmp_path / "run")
    one, other = (weights(folder / "sft") for folder in (tmp_path / "run", plain))
    assert all((one[n] - other[n]).norm() <= 1e-5 * other[n].norm() for n in other)


def test_a_role_that_has_no_room_to_come_in_changes_nothing(monkeypatch):
    policy = toy_policy()
    policy.add_role("old", {n: p.detach() + 1 for n, p in policy.trained.items()})
    before = {n: p.detach().clone() for n, p in policy.trained.items()}
    clone, empty = torch.Tensor.clone, torch.empty

    def none(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", none)
        with pytest.raises(torch.OutOfMemoryError), policy.using("old"):
            pass
    assert all(torch.equal(p, before[n]) for n, p in policy.trained.items())
    with policy.using("old"):
        # nor has it to ask for room on its way out
        monkeypatch.setattr(torch, "empty", none)
        monkeypatch.setattr(torch.Tensor, "clone", none)
        assert all(torch.equal(p, before[n] + 1) for n, p in policy.trained.items())
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "clone", clone)
    assert all(torch.equal(p, before[n]) for n, p in policy.trained.items())


def no_room_for(rows, monkeypatch):
    """Let the SD3 model have memory for less than so many rows with gradients."""
    velocity = SD3FlowModel.velocity

    def limited(self, latents, sigma, condition):
        if torch.is_grad_enabled() and len(latents) >= rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return velocity(self, latents, sigma, condition)

    monkeypatch.setattr(SD3FlowModel, "velocity", limited)


def remembered(folder):
    return json.loads((folder / "sft" / "micro_batch.json").read_text())["micro_batch"]


def test_a_run_out_of_memory_goes_on_in_halves_and_remembers_it(tmp_path, monkeypatch):
    two = TRAIN.replace("micro_batch: 4", "micro_batch: 2")
    run_quietly(recipe(stage("sft", train=two)), tmp_path / "two")
    with monkeypatch.context() as patch:
        no_room_for(4, patch)
        run_quietly(recipe(stage("sft")), tmp_path / "run")
    assert_equal_weights(weights(tmp_path / "run" / "sft"), weights(tmp_path / "two" / "sft"))
    assert remembered(tmp_path / "run") == 2
    # a run that goes on begins with what was found
    seen = []
    velocity = SD3FlowModel.velocity
    monkeypatch.setattr(
        SD3FlowModel, "velocity", lambda self, x, *rest: seen.append(len(x)) or velocity(self, x, *rest)
    )
    (tmp_path / "run" / "sft" / "stage.json").unlink()
    shutil.rmtree(checkpoint.saved(tmp_path / "run" / "sft" / "checkpoints")[-1])
    run_quietly(recipe(stage("sft")), tmp_path / "run")
    assert set(seen) == {2}


def test_a_run_that_cannot_repeat_a_step_stops_and_goes_on_with_half(tmp_path, monkeypatch):
    made = recipe(stage("sft"))
    with monkeypatch.context() as patch:
        no_room_for(4, patch)
        patch.setattr(Alone, "repeatable", False)
        with pytest.raises(TrainingError, match=r"sft: out of memory with 4 .* last checkpoint with 2"):
            run_quietly(made, tmp_path / "run")
        run_quietly(made, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "sft" / "stage.json").read_text())["steps"] == 6


AUTO = TRAIN.replace("micro_batch: 4", "micro_batch: auto").replace("batch_size: 4", "batch_size: 8")


def test_auto_finds_a_number_once_and_the_trials_leave_nothing_behind(tmp_path, monkeypatch):
    printed = run_quietly(recipe(stage("sft", train=AUTO)), tmp_path / "auto")
    number = remembered(tmp_path / "auto")
    assert f"micro_batch auto is {number}" in printed
    same = AUTO.replace("micro_batch: auto", f"micro_batch: {number}")
    run_quietly(recipe(stage("sft", train=same)), tmp_path / "given")
    assert_equal_weights(weights(tmp_path / "auto" / "sft"), weights(tmp_path / "given" / "sft"))
    bills = [json.loads((tmp_path / n / "sft" / "stage.json").read_text()) for n in ("auto", "given")]
    assert bills[0]["forward_equivalents"] == bills[1]["forward_equivalents"]
    monkeypatch.setattr(trial, "timed", lambda *_: pytest.fail("it was found before"))
    (tmp_path / "auto" / "sft" / "stage.json").unlink()
    run_quietly(recipe(stage("sft", train=AUTO)), tmp_path / "auto")


def faster_and_larger(monkeypatch, each=1000, fastest=64):
    """Let a trial of n rows take each * n bytes, and rows be the faster, the more of them, up to ``fastest``."""

    def timed(policy, strategy, sample, rows):
        trial.try_out(policy, strategy, sample, rows)
        return rows / min(rows, fastest), each * rows

    monkeypatch.setattr(trial, "timed", timed)


@pytest.mark.parametrize(
    ("room", "fastest", "batch", "number"),
    [
        (None, 64, 32, 32),  # no more than a step has
        (None, 64, 24, 16),
        (None, 4, 32, 4),  # more would only cost memory
        (9_000, 64, 32, 8),  # 16 rows would need 16 kB, where the optimizer has taken its part
        (17_800, 64, 32, 16),
    ],
)
def test_auto_takes_no_more_than_fits_and_pays(tmp_path, monkeypatch, room, fastest, batch, number):
    faster_and_larger(monkeypatch, fastest=fastest)
    moments = 8 * sum(p.numel() for p in load().transformer.parameters())
    available = None if room is None else (room + moments) / micro_batch.FILLED
    monkeypatch.setattr(micro_batch, "available_memory", lambda device: available)
    train = AUTO.replace("batch_size: 8", f"batch_size: {batch}").replace("steps: 6", "steps: 2")
    run_quietly(recipe(stage("sft", train=train)), tmp_path / "run")
    assert remembered(tmp_path / "run") == number


def test_auto_stays_below_what_ran_out_of_memory(tmp_path, monkeypatch):
    faster_and_larger(monkeypatch)
    no_room_for(4, monkeypatch)
    run_quietly(recipe(stage("sft", train=AUTO)), tmp_path / "run")
    assert remembered(tmp_path / "run") == 2


@pytest.mark.parametrize("block", ["{strategy: auto}", "{strategy: fsdp2}"])
def test_auto_says_what_is_missing_where_one_does_not_fit(tmp_path, monkeypatch, block):
    no_room_for(1, monkeypatch)
    with pytest.raises(TrainingError, match=r"out of memory with one item at a time .*posttrain plan"):
        run_quietly(recipe(stage("sft", train=AUTO), overrides=[f"parallel={block}"]), tmp_path / "run")


def test_auto_where_the_strategy_cannot_go_on_ends_and_remembers_what_fitted(tmp_path, monkeypatch):
    made = recipe(stage("sft", train=AUTO), overrides=["parallel={strategy: fsdp2}"])
    faster_and_larger(monkeypatch)
    no_room_for(4, monkeypatch)
    with pytest.raises(TrainingError, match=r"sft: out of memory with 4 .* last checkpoint with 2"):
        run_quietly(made, tmp_path / "run")
    run_quietly(made, tmp_path / "run")
    assert remembered(tmp_path / "run") == 2


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "3", *(f'{{"micro_batch": {v}}}' for v in ("0", "-3", '"x"', "1.5", "true"))],
)
def test_a_damaged_memory_of_the_micro_batch_is_ignored(tmp_path, content):
    made = recipe(stage("sft"))
    folder = tmp_path / "s"
    folder.mkdir()
    remember(made, folder, 1, 2)
    assert settled(made, made.stages[0], folder, 1) == 2
    assert settled(made, made.stages[0], folder, 2) == 4
    whole = json.loads((folder / "micro_batch.json").read_text())
    if content.startswith('{"'):
        content = json.dumps({**whole, **json.loads(content)})
    (folder / "micro_batch.json").write_text(content)
    assert settled(made, made.stages[0], folder, 1) == 4


@pytest.mark.parametrize("value", ["0", "-1", "Auto", "1.5", "'8'", "true"])
def test_a_micro_batch_that_is_no_number_has_one_error(value):
    with pytest.raises(RecipeError) as found:
        recipe(stage("sft", train=TRAIN.replace("micro_batch: 4", f"micro_batch: {value}")))
    assert str(found.value).count("micro_batch") == 1
    assert "a whole number of 1 or more, or auto" in str(found.value)


def test_evaluation_goes_on_in_halves_too(tmp_path, monkeypatch):
    made = parse_recipe(f"{HEAD}stages: []\n{EVALUATION}", "small.yaml")
    velocity = SD3FlowModel.velocity

    def limited(self, latents, sigma, condition):
        if len(latents) > 4:  # two branches of guidance
            raise torch.OutOfMemoryError("out of memory")
        return velocity(self, latents, sigma, condition)

    monkeypatch.setattr(SD3FlowModel, "velocity", limited)
    run_quietly(made, tmp_path / "run")
    assert (tmp_path / "run" / "base" / "evaluation" / "eval.json").is_file()


@pytest.mark.parametrize("tune", [Full(), Lora(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_checkpointing_changes_no_gradient(tune, autocast):
    model = load()
    tune.apply(model.transformer, 0)
    policy = Policy(model, autocast=autocast)
    conditions, rows = encode(model, ["a red circle", "a blue square"] * 2)
    latents = torch.randn(4, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(0.1, 0.9, 4)
    gradients = {}
    for mode in ("off", "selective", "full"):
        checkpoint_blocks(model.transformer, mode)
        for parameter in policy.trained.values():
            parameter.grad = None
        policy.velocity(latents, sigma, conditions.rows(rows)).square().mean().backward()
        gradients[mode] = torch.cat([p.grad.flatten() for p in policy.trained.values()])
    assert gradients["off"].abs().max() > 0
    assert torch.equal(gradients["off"], gradients["selective"])
    assert torch.equal(gradients["off"], gradients["full"])


def test_an_optimizer_of_8_bits_trains_alike_and_goes_on_exactly(tmp_path, plain):
    eight = TRAIN.replace("{", "{optimizer: adamw8bit, ").replace(
        "checkpoint_every: 2", "checkpoint_every: 3"
    )
    made = recipe(stage("sft", train=eight))
    run_quietly(made, tmp_path / "eight")
    trained, full = (weights(folder / "sft") for folder in (tmp_path / "eight", plain))
    start = dict(load().transformer.named_parameters())
    for name, tensor in full.items():
        moved = (tensor - start.get(name, tensor)).norm()
        assert (trained[name] - tensor).norm() <= 0.2 * moved, name
    folder = tmp_path / "eight" / "sft"
    states = checkpoint.saved(folder / "checkpoints")
    state = torch.load(states[-1] / "state.pt", weights_only=True)["optimizer"]
    assert any(moments["state1"].dtype == torch.uint8 for moments in state.values())
    (folder / "stage.json").unlink()
    shutil.rmtree(states[-1])
    run_quietly(made, tmp_path / "eight")
    assert_equal_weights(weights(folder), trained)


def test_an_optimizer_of_8_bits_takes_a_quarter():
    weight = torch.nn.Parameter(torch.randn(256, 256))
    weight.grad = torch.randn(256, 256)
    optimizer = optimizer_of(Train(steps=1, optimizer="adamw8bit"), [weight])
    optimizer.step()
    held = sum(t.nbytes for t in optimizer.state[weight].values() if isinstance(t, torch.Tensor))
    assert held < 0.3 * 8 * weight.numel()


@pytest.mark.parametrize("block", ["{strategy: fsdp2}", "{strategy: deepspeed, zero_stage: 2}"])
def test_an_optimizer_of_8_bits_is_refused_where_weights_are_in_parts(block):
    eight = TRAIN.replace("{", "{optimizer: adamw8bit, ")
    with pytest.raises(RecipeError, match=r"train\.optimizer.*adamw8bit needs whole weights.*ddp"):
        recipe(stage("sft", train=eight), overrides=[f"parallel={block}"])


def test_an_optimizer_that_is_not_installed_is_refused_by_line(monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"stages\.0\.train\.optimizer.*pip install 'posttrain\[8bit\]'"):
        recipe(stage("sft", train=TRAIN.replace("{", "{optimizer: adamw8bit, ")))


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


def test_where_encoders_lie_may_change_when_a_run_goes_on(tmp_path, plain):
    shutil.copytree(plain, tmp_path / "run")
    printed = run_quietly(recipe(stage("sft"), overrides=["model.offload=true"]), tmp_path / "run")
    assert "sft: finished before, skipped" in printed
