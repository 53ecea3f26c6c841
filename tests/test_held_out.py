"""Tests which held-out readings are compared, and what a checkpoint of a reading keeps."""

from types import SimpleNamespace

from runs import DATA, EVALUATION, TRAIN, recipe, stage

from posttrain.stages.account import Account
from posttrain.stages.hooks.held_out import HeldOut

SCORE = "jpeg_incompressibility"


def hook_of(account, prompts, checkpoints=None):
    """The hook of a stage that may be rolled back, with held-out scores of the file ``prompts``."""
    train = TRAIN.replace("batch_size: 4", f"batch_size: 6, keep_best: {SCORE}")
    monitor = "{every: 1, prompts: 2, reward_hacking: rollback}"
    block = stage(
        "nft", "{type: diffusion_nft, group_size: 3, num_steps: 2}", train, rewards=SCORE, monitor=monitor
    )
    evaluation = EVALUATION.replace("{type: shapes, count: 6}", str(prompts)).replace(
        "rewards: shapes", f"rewards: {SCORE}"
    )
    made = recipe(
        block.replace(DATA, "{prompts: {type: shapes, count: 4}, resolution: 16}"), evaluation=evaluation
    )
    notes = []
    training = SimpleNamespace(
        run=SimpleNamespace(stage=made.stages[0], note=notes.append), policy=None, account=account
    )
    hook = HeldOut(training, made.stages[0].monitor, made.evaluation, None, checkpoints, None)  # type: ignore[arg-type]
    return hook, notes


def test_the_checkpoint_of_a_reading_knows_that_it_is_good_and_that_it_is_the_best(tmp_path):
    """A stage that is killed after it goes on from this checkpoint, and does not take the reading again."""
    (tmp_path / "held.txt").write_text("a\nb\n")
    account, kept = Account(), {}

    def save(step):  # the first of a step is written, as by CheckpointFolder
        kept.setdefault(step, (account.good, account.best, account.best_score))

    hook, _ = hook_of(account, tmp_path / "held.txt", SimpleNamespace(save=save))
    for step, score in ((3, 0.5), (4, 0.4), (5, 0.6)):
        hook._scored = lambda score=score: [{"scores": {SCORE: score}}] * 2
        assert hook.between_batches(step, last=False)
    assert kept == {3: (3, 3, 0.5), 4: (4, 3, 0.5), 5: (5, 5, 0.6)}


def test_a_score_whose_lower_values_are_better_is_recorded_as_it_is_and_compared_with_its_sign_changed(
    tmp_path,
):
    (tmp_path / "held.txt").write_text("a\nb\n")
    hook, _ = hook_of(account := Account(), tmp_path / "held.txt", SimpleNamespace(save=lambda step: None))
    recorded = []
    hook.tracker = SimpleNamespace(log=lambda step, metrics: recorded.append((step, metrics)))  # type: ignore[assignment]
    hook.evaluation = hook.evaluation.model_copy(
        update={"rewards": [SimpleNamespace(label=SCORE, higher_is_better=False)]}
    )
    for step, scores in ((1, (3.0, 5.0)), (2, (2.0, 4.0))):
        hook._scored = lambda scores=scores: [{"scores": {SCORE: score}} for score in scores]
        assert hook.between_batches(step, last=False)
    assert recorded == [(1, {f"heldout/{SCORE}": 4.0}), (2, {f"heldout/{SCORE}": 3.0})]
    assert account.readings == [{SCORE: [-3.0, -5.0]}, {SCORE: [-2.0, -4.0]}]
    assert (account.best, account.best_score) == (2, -3.0)


def test_readings_of_a_file_of_prompts_that_was_edited_are_not_compared(tmp_path):
    file, account = tmp_path / "held.txt", Account()
    file.write_text("a\nb\nc\n")
    hook, _ = hook_of(account, file)
    account.readings, account.best, account.read_at = [{SCORE: [1.0, 0.0]}], 4, 4
    file.write_text("a\n")
    assert [row["prompt"] for row in hook.rows] == ["a", "b"], "those that the stage began with"
    file.write_text("a\nb\nd\n")  # beyond the first two
    assert hook_of(account, file)[1] == []
    assert (len(account.readings), account.best) == (1, 4)
    file.write_text("a\nother\n")
    assert hook_of(account, file)[1] == [
        "nft: held-out scores begin anew: the evaluation, its prompts or monitor.prompts changed"
    ]
    assert (account.readings, account.best, account.read_at) == ([], None, None)


def test_readings_of_a_checkpoint_that_does_not_say_their_rows_are_compared(tmp_path):
    (tmp_path / "held.txt").write_text("a\nb\n")
    hook_of(account := Account(), tmp_path / "held.txt")
    assert account.read_with is not None
    del account.read_with["rows"]
    account.readings = [{SCORE: [1.0, 0.0]}]
    assert hook_of(account, tmp_path / "held.txt")[1] == []
    assert len(account.readings) == 1
