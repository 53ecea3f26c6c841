"""The comparison of SFT and SOAR: equal points and costs, what its intervals cover, the error along a rollout."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import load

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.evidence import __main__ as command  # noqa: E402
from benchmarks.evidence import arms, bias, identity, measure, page, records, statistics, tables  # noqa: E402
from benchmarks.evidence.points import SamePoints  # noqa: E402
from posttrain.algorithm import Algorithm  # noqa: E402
from posttrain.algorithms.sft import SFT  # noqa: E402
from posttrain.algorithms.soar import SOAR  # noqa: E402
from posttrain.engine.trainer import update  # noqa: E402
from posttrain.errors import PosttrainError  # noqa: E402
from posttrain.evaluation import intervals  # noqa: E402
from posttrain.optim.settings import Train  # noqa: E402
from posttrain.testing.toys import alone, collected, toy_policy  # noqa: E402

Algorithm.variants.pop("same_points", None)  # or other tests would find it


@pytest.fixture
def same_points(monkeypatch):
    monkeypatch.setitem(Algorithm.variants, "same_points", SamePoints)


@pytest.mark.usefixtures("same_points")
@pytest.mark.parametrize("name", arms.ARMS)
def test_every_arm_is_a_recipe_and_is_compared_with_others(name):
    recipe = arms.recipe(name, seed=3)
    (stage,) = recipe.stages
    assert recipe.seed == 3
    assert {*arms.ARMS[name].against} <= {"base", *arms.ARMS} - {name}
    assert stage.train.steps == arms.ARMS[name].steps
    assert arms.recipe(name, 0, steps=2).stages[0].train.steps == 2


@pytest.mark.parametrize(
    "change", [{}, {"cfg_scale_sampling": 1.0}, {"num_rollout_paths": 2}, {"type": "sft"}]
)
def test_an_arms_cost_is_what_the_policy_counts(change):
    settings = {**arms.SOAR, **change}
    settings = {"type": "sft"} if settings["type"] == "sft" else settings
    algorithm = {"sft": SFT, "soar": SOAR}[settings["type"]].model_validate(settings)
    policy = toy_policy()
    items = collected(algorithm, policy)
    update(algorithm, policy, items, alone(policy), Train(steps=1))
    assert policy.forward_equivalents == 6 * arms.forwards(settings)


def test_sft_of_equal_cost_has_as_many_forwards_as_soar():
    assert arms.EQUAL_COST * arms.forwards(arms.SFT) == arms.STEPS * arms.forwards(arms.SOAR)
    assert arms.SOAR["trajectory_length"] == SOAR.model_fields["trajectory_length"].default


def test_the_same_points_have_soars_sigmas_and_weights_but_lie_on_the_data_line():
    settings = {"trajectory_length": 4, "num_sampling_steps": 10, "lambda_aux": 0.5, "sigma_floor": 0.1}
    soar, same = (collected(kind(**settings), toy_policy()) for kind in (SOAR, SamePoints))
    n = len(soar) // 5
    assert len(same) == len(soar) == 5 * n
    for name in ("sigma", "prompt_index", "sample_index"):
        assert torch.equal(same.fields[name], soar.fields[name])
    assert torch.equal(same.weight, soar.weight)
    for name in ("latents", "target"):
        assert torch.equal(same.fields[name][:n], soar.fields[name][:n])
    velocity = same.target[:n].repeat(5, 1, 1, 1)  # noise - image, of each sample
    above = same.sigma > 0.1 + 1e-6  # the floor lifts sigma off the end of the step, not the latents
    torch.testing.assert_close(same.target[above], velocity[above], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(soar.target[n:], velocity[n:], atol=1e-2)


def test_the_t_distribution_has_its_known_quantiles():
    for df, quantile in ((1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042), (479, 1.965)):
        assert statistics.Student(df).quantile(0.95) == pytest.approx(quantile, abs=1e-3)
        assert statistics.Student(df).p(-quantile) == pytest.approx(0.05, abs=1e-4)


def test_a_difference_where_only_seeds_differ_is_the_t_interval_of_their_means():
    seeds = np.array([[0.1], [0.3], [0.2], [0.6], [-0.1]])
    found = statistics.difference(np.zeros((5, 40)), seeds + np.zeros(40), [str(i) for i in range(40)])
    error = seeds.std(ddof=1) / 5**0.5
    assert (found.mean, found.error) == (pytest.approx(0.22), pytest.approx(error))
    assert found.high - found.mean == pytest.approx(2.776 * error, rel=1e-3)
    assert found.agree == "4 of 5"
    assert found.of_seeds == pytest.approx(2.776 * error, rel=1e-3)
    assert found.p == pytest.approx(statistics.Student(4).p(0.22 / error))


def test_a_difference_where_only_prompts_differ_counts_a_prompt_once():
    of_prompts = np.random.default_rng(0).normal(size=50)
    change = np.repeat(of_prompts, 4)[None].repeat(5, 0)
    found = statistics.difference(change * 0, change, [f"prompt {i // 4}" for i in range(200)])
    assert found.error == pytest.approx(of_prompts.std(ddof=1) / 50**0.5)
    assert found.of_seeds == pytest.approx(0), "for the same prompts nothing is left to chance"
    assert str(statistics.difference(change, change + 0.25, [str(i) for i in range(200)])) == (
        "+0.250 [+0.250, +0.250]"
    )


def test_prompts_of_several_samples_weigh_by_their_number():
    change = np.array([[1.0, 1.0, 1.0, 5.0]] * 2)
    found = statistics.difference(change * 0, change, ["a", "a", "a", "b"])
    assert found.mean == 2
    # linearised: (3 - 3 x 2) / 2 and (5 - 2) / 2, so the squared error is ((-1.5)^2 + 1.5^2) / (2 - 1) / 2
    assert found.error == pytest.approx(1.5)


@pytest.mark.parametrize("of_seeds", [0.0, 0.1])
def test_intervals_of_three_seeds_cover_the_truth(of_seeds):
    rng, covered, trials = np.random.default_rng(5), 0, 300
    for _ in range(trials):
        change = (
            of_seeds * rng.normal(size=(3, 1)) + 0.05 * rng.normal(size=30) + 0.2 * rng.normal(size=(3, 30))
        )
        found = statistics.difference(change * 0, change, [str(i) for i in range(30)])
        covered += found.low <= 0 <= found.high
    assert covered / trials > 0.92, "a bootstrap of the seeds covers 0.81 where seeds differ"


@pytest.mark.parametrize(("seeds", "labels"), [(1, 4), (2, 1), (2, 3)])
def test_a_difference_needs_two_seeds_and_two_prompts(seeds, labels):
    values = np.zeros((seeds, 4))
    with pytest.raises(ValueError, match=r"samples|seeds"):
        statistics.difference(values, values, [str(i % labels) for i in range(4 if labels != 3 else 3)])


def test_holm_multiplies_the_smallest_p_by_all_and_never_falls():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def exact_velocity(x, sigma, *rest, **more):
    """That of data with the normal distribution of standard deviation 1/2: (x - E[x0 | x]) / sigma."""
    s = sigma.view(-1, 1, 1, 1)
    return (x - (1 - s) * 0.25 / ((1 - s) ** 2 * 0.25 + s**2) * x) / s


def bias_of(velocity, monkeypatch, rollouts, seed=0):
    policy = toy_policy()
    latents = torch.randn(3000, 1, 2, 2, generator=torch.Generator().manual_seed(0)) / 2
    monkeypatch.setattr(policy, "velocity", velocity)
    monkeypatch.setattr(policy, "guided_velocity", velocity)
    sigmas = torch.linspace(1, 0, 21).tolist()
    return bias.errors(policy, latents, ["a"] * 3000, sigmas=sigmas, rollouts=rollouts, seed=seed)


def test_the_exact_velocity_has_no_exposure_bias_though_it_errs_more_off_the_line(monkeypatch):
    found = bias_of(exact_velocity, monkeypatch, [(1, 1.0)])
    assert found["sigmas"][0] == 1
    assert len(found["sigmas"]) == len(found["data"]) == 20
    assert found["1-1"]["ends"] == list(range(1, 20, 2))
    record = {"exposure_bias": found}
    excess, model, data = (
        np.mean(tables._bias(what, excess, (0.2, 0.5))(record))
        for what, excess in (("1-1", True), ("1-1", False), ("data", False))
    )
    assert model - data > 0.02, "a state on the line at this sigma holds more of the image"
    assert abs(excess) < 0.0015, "given what the start held, the step lost nothing"


def test_a_model_that_drifts_has_exposure_bias(monkeypatch):
    policy = toy_policy()
    latents = torch.randn(3000, 1, 2, 2, generator=torch.Generator().manual_seed(0)) / 2
    monkeypatch.setattr(policy, "velocity", exact_velocity)
    # what leads it is pushed aside, as by guidance: its own states are others than the data's
    monkeypatch.setattr(policy, "guided_velocity", lambda *a: exact_velocity(a[0], a[1]) + 2.0)
    found = bias.errors(
        policy, latents, ["a"] * 3000, sigmas=torch.linspace(1, 0, 21).tolist(), rollouts=[(5, 2.0)]
    )
    excess = np.mean(tables._bias("5-2", True, (0.2, 0.5))({"exposure_bias": found}))
    assert excess > 0.05


def test_a_velocity_that_knows_the_image_errs_nowhere_and_noise_is_the_seeds(monkeypatch):
    policy, latents = toy_policy(), torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    off = 0.0

    def knowing(x, sigma, *rest, **more):
        return (x - latents) / sigma.view(-1, 1, 1, 1) + off

    monkeypatch.setattr(policy, "velocity", knowing)
    monkeypatch.setattr(policy, "guided_velocity", knowing)
    settings = {"sigmas": [1.0, 0.75, 0.5, 0.25, 0.0], "rollouts": [(1, 1.0), (3, 2.0)]}
    found = bias.errors(policy, latents, ["a"] * 4, **settings)
    assert found["3-2"]["ends"] == [3]
    assert np.allclose([*found["data"], *found["1-1"]["model"], *found["3-2"]["model"]], 0, atol=1e-10)
    off = 0.5
    found = bias.errors(policy, latents, ["a"] * 4, **settings)
    assert np.allclose(found["data"], [[(s * 0.5) ** 2] * 4 for s in (1, 0.75, 0.5, 0.25)], rtol=1e-3)
    assert np.allclose(found["1-1"]["model"], [[(s * 0.5) ** 2] * 4 for s in (0.75, 0.25)], rtol=1e-3), (
        "exact again, from wherever the step ended"
    )


def test_noise_of_the_exposure_bias_is_that_of_its_seed(monkeypatch):
    one, same, other = (bias_of(exact_velocity, monkeypatch, [], seed)["data"] for seed in (0, 0, 1))
    assert one == same != other


def test_held_out_images_are_those_of_a_data_set(tmp_path):
    from posttrain.shapes.dataset import build

    latents, captions = bias.held_out(load(), 3, seed=9)
    build(tmp_path / "set", 3, 9)
    rows = [json.loads(line) for line in (tmp_path / "set" / "train.jsonl").read_text().splitlines()]
    assert captions == [row["caption_en"] for row in rows]
    image = np.asarray(Image.open(tmp_path / "set" / "images" / f"{rows[2]['md5']}.jpg"))
    model, pixels = load(), torch.from_numpy(image.copy()).permute(2, 0, 1).float()[None] / 127.5 - 1
    with torch.no_grad():
        mean, logvar = model.posterior(pixels)
        torch.testing.assert_close(latents[2:], model.latents(mean, logvar, torch.zeros_like(mean)))


@pytest.fixture
def stubs(monkeypatch):
    """A measuring that trains and draws nothing, and says with what it would have."""
    seen = []
    scores = {"shapes": [0.0, 1.0], "shapes/lenient": [0.0, 1.0], "shapes/strict": [0.0, 1.0]}

    def scored(weights, settings, samples, folder, device):
        seen.append(("scored", settings["steps"], settings["seed"], weights, settings["prompts"]["count"]))
        return {"prompts": ["a", "b"], "tags": ["x", "x"], "scores": dict(scores)}

    def errors(policy, latents, captions, *, seed, **rest):
        seen.append(("errors", seed))
        return {"sigmas": [1.0]}

    def run(recipe, output):
        seen.append(("run", recipe.seed, Path(output).name))
        output.mkdir(parents=True)
        cost = {"steps": 3, "samples": 96, "forward_equivalents": 288, "seconds": 1.0}
        return SimpleNamespace(cost=lambda stage: cost, final=lambda stage: output / "final")

    monkeypatch.setattr(measure, "scored", scored)
    monkeypatch.setattr(measure, "errors", errors)
    monkeypatch.setattr(measure.posttrain, "run", run)
    model = SimpleNamespace(sigmas=lambda *a: [1.0, 0.0])
    monkeypatch.setattr(measure, "open_artifact", lambda *a: (model, "ema"))
    monkeypatch.setattr(measure, "Policy", lambda model: None)
    monkeypatch.setattr(measure, "held_out", lambda *a: (torch.zeros(1), ["a"]))
    return seen


def test_base_and_arm_of_a_seed_are_measured_from_the_same_noise(stubs, tmp_path):
    for name in ("base", "sft"):
        file = measure.measured(name, 3, tmp_path / "runs", tmp_path / "records")
        record = json.loads(file.read_text())
        assert (record["arm"], record["seed"]) == (name, 3)
        assert {*record["evaluations"]} == {"5", "10", "20", "40"}
    base, sft = ([s[:3] for s in stubs[a:b] if s[0] != "run"] for a, b in ((0, 5), (5, 11)))
    assert base == sft == [*(("scored", n, 3) for n in (5, 10, 20, 40)), ("errors", 3)]
    assert [s[4] for s in stubs if s[0] == "scored"] == [240, 240, 480, 240] * 2
    assert ("run", 3, "sft-3-150-steps") in stubs, "a shorter run's folder would be gone on with"
    assert not [*(tmp_path / "runs").iterdir()]


def test_a_record_is_kept_but_not_one_by_other_settings(stubs, tmp_path, monkeypatch):
    at = (tmp_path / "runs", tmp_path / "records")
    measure.measured("sft", 0, *at)
    count = len(stubs)
    measure.measured("sft", 0, *at)
    assert len(stubs) == count
    with pytest.raises(PosttrainError, match=r"sft-0\.json: made by other recipes"):
        measure.measured("sft", 0, *at, steps=3)
    with pytest.raises(PosttrainError, match="other measures"):
        measure.measured("sft", 0, *at, samples=2)
    monkeypatch.setattr(identity, "_base", lambda: {"transformer": "another"})
    with pytest.raises(PosttrainError, match="other base"):
        measure.measured("sft", 0, *at)


def test_the_judges_source_is_in_the_identity_without_its_comments(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "ROOT", tmp_path)
    monkeypatch.setattr(identity, "JUDGE", ("judge.py",))
    judge, found = tmp_path / "judge.py", []
    for source in ("x = 1\n", "x  =  1  # one\n", "x = 2\n"):
        judge.write_text(source)
        found.append(identity.identity([], {})["judge"])
    assert found[0] == found[1] != found[2]


def test_an_images_distance_is_from_the_others_of_its_prompt(tmp_path):
    rows = []
    for i, (prompt, value) in enumerate([("a", 0), ("b", 0), ("a", 255), ("a", 51)]):
        Image.new("RGB", (4, 4), (value,) * 3).save(tmp_path / f"{i}.png")
        rows.append({"prompt": prompt, "image": f"{i}.png"})
    rows.append({**rows[1], "image": "2.png"})
    assert measure._distances(rows, tmp_path) == pytest.approx([0.6, 1, 0.9, 0.5, 1])


BY = {"recipes": {"steps": 150}, "measures": "m", "base": "b", "judge": "j"}


def record(arm, seed, values, forwards=14_400.0, **by):
    scores = {"shapes": values, "shapes/lenient": values, "shapes/strict": values}
    data = [[0.5, 0.5], [0.25, 0.65]]
    model = [[0.5 + v / 10 for v in values[:2]]]
    return {
        "arm": arm, "seed": seed, "identity": {**BY, **by}, "date": f"2026-12-0{seed + 1}", "device": "CPU",
        "cost": {"forward_equivalents": forwards} if arm != "base" else {},
        "prompts": ["a", "b", "c"], "tags": ["colors", "colors", "position"],
        "evaluations": dict.fromkeys(("5", "10", "20", "40"), scores),
        "exposure_bias": {
            "captions": ["one", "two"], "sigmas": [1.0, 0.9], "data": data,
            **{name: {"steps": 1, "ends": [1], "model": model} for name in ("1-2", "5-2", "5-1")},
        },
    }  # fmt: skip


def written(folder, made):
    folder.mkdir(exist_ok=True)
    for i, one in enumerate(made):
        (folder / f"{i}.json").write_text(json.dumps(one))
    return records.read(folder)


def series():
    made = [record("base", s, [0.0, 0.0, 0.5]) for s in (0, 1)]
    made += [record("sft", s, [0.2, 0.2, 0.5]) for s in (0, 1)]
    return made + [record("soar", s, [0.3, 0.3, 0.6]) for s in (0, 1, 2)]


def test_tables_compare_each_arm_with_its_rivals_on_the_seeds_of_both(tmp_path):
    found = written(tmp_path, series())
    rows = list(tables.scores_table(found, tables.present(found), "20", tables.VERDICTS))
    assert rows == [
        "| arm | seeds | graded | lenient | strict | forward-equivalents |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `base` | 2 | 0.167 | 0.167 | 0.167 |  |",
        "| `sft` | 2 | 0.300 | 0.300 | 0.300 | 14.4k |",
        "| `soar` | 3 | 0.400 | 0.400 | 0.400 | 14.4k |",
    ]
    pairs = [("sft", "base"), ("soar", "sft"), ("soar", "soar-lora"), ("soar", "base")]
    rows = list(tables.differences_table(found, pairs, "20"))
    assert rows[2].startswith("| `sft` | `base` | +0.133 [")
    assert rows[3] == "| `soar` | `sft` | +0.100 [+0.100, +0.100] | 0.0000 | +- 0.000 | 2 of 2 | <0.001 |"
    assert len(rows) == 5, "an arm without records is compared with nothing"
    alone = statistics.difference([[0, 0, 0.5]] * 2, [[0.3, 0.3, 0.6]] * 2, ["a", "b", "c"])
    assert rows[4].endswith(f" | 2 of 2 | {2 * alone.p:.3f} |"), "the second smallest p of three"
    assert list(tables.kinds_table(found, ["sft", "soar"], "20"))[2:] == [
        "| `sft` | 0.200 / 0.200 / 0.200 | 0.500 / 0.500 / 0.500 |",
        "| `soar` | 0.300 / 0.300 / 0.300 | 0.600 / 0.600 / 0.600 |",
    ]


def test_the_table_of_the_exposure_bias_has_the_base_and_changes_from_it(tmp_path):
    found = written(tmp_path, series())
    assert list(tables.bias_table(found, "1-2"))[2:] == [
        "| `base` | 0.5000 |  |  |  |",
        "| `sft` | +0.0200 [+0.0200, +0.0200] |  |  |  |",
        "| `soar` | +0.0300 [+0.0300, +0.0300] |  |  |  |",
    ]
    assert list(tables.bias_table(found, "1-2", excess=True))[2] == "| `base` | 0.0000 |  |  |  |"
    assert list(tables.bias_table(found, "data"))[2] == "| `base` | 0.4750 |  |  |  |"


@pytest.mark.parametrize("entry", ["base", "judge", "measures"])
def test_records_that_do_not_compare_are_refused(tmp_path, entry):
    with pytest.raises(PosttrainError, match=f"base-0 and sft-5 were made by other {entry}"):
        written(tmp_path, [record("base", 0, [0, 0, 0]), record("sft", 5, [0, 0, 0], **{entry: "other"})])


def test_chains_beside_arms_have_measures_of_their_own(tmp_path):
    made = [record("base", 0, [0, 0, 0]), *(record(c, 0, [0, 0, 0], measures="c") for c in ("awm", "nft"))]
    assert {*written(tmp_path, made)} == {"awm", "base", "nft"}
    made[2] = record("nft", 0, [0, 0, 0], measures="other")
    with pytest.raises(PosttrainError, match="awm-0 and nft-0 were made by other measures"):
        written(tmp_path, made)


def test_seeds_of_an_arm_with_another_recipe_are_refused(tmp_path):
    with pytest.raises(PosttrainError, match="sft-0 and sft-1 were made by other recipes"):
        written(tmp_path, [record("sft", 0, [0, 0, 0]), record("sft", 1, [0, 0, 0], recipes={"steps": 9})])


def test_a_pair_of_one_seed_has_the_interval_of_other_prompts_and_no_p(tmp_path):
    found = written(tmp_path, [*series(), record("sft-lora", 0, [0.2, 0.2, 0.9])])
    pairs = [("sft-lora", "base"), ("sft", "base"), ("soar", "base")]
    alone, *others = list(tables.differences_table(found, pairs, "20"))[2:]
    low, high = intervals.bootstrap_interval([0.2, 0.2, 0.4], groups=["a", "b", "c"])
    assert alone == f"| `sft-lora` | `base` | +0.267 [{low:+.3f}, {high:+.3f}] |  |  | 1 of 1 |  |"
    assert others == list(tables.differences_table(found, pairs[1:], "20"))[2:], "p is of those that have one"


def test_a_field_that_recipes_did_not_have_yet_refuses_no_record():
    fields = [
        {**BY, "recipes": recipe} for recipe in ({"steps": 150}, {"steps": 150, "new": 1}, {"steps": 9})
    ]
    assert not identity.differing(fields[0], fields[1])
    assert identity.differing(fields[1], fields[2]) == ["recipes"]
    made = identity.identity([arms.recipe("soar", 3)], {})["recipes"]
    assert made["0.stages.0.algorithm.trajectory_length"] == 6
    assert made == identity.identity([arms.recipe("soar", 4)], {})["recipes"], "a seed is in no identity"
    assert made == json.loads(json.dumps(made))


def test_an_evaluation_of_fewer_samples_is_compared_by_its_prompts(tmp_path):
    made = series()
    for one in made:
        one["evaluations"] = {
            **one["evaluations"],
            "40": {key: of[:2] for key, of in one["evaluations"]["40"].items()},
        }
    found = written(tmp_path, made)
    change = list(tables.differences_table(found, [("sft", "base")], "40"))[2]
    assert change.startswith("| `sft` | `base` | +0.200 [+0.200, +0.200]")
    assert next(tables.kinds_table(found, ["sft"], "40")) == "| arm | colors |"


def test_arms_of_equal_cost_are_refused_if_their_runs_counted_otherwise(tmp_path):
    made = [record("soar", 0, [0, 0, 0], 100.0), record("sft-equal-forwards", 0, [0, 0, 0], 101.0)]
    written(tmp_path, made)
    made[1] = record("sft-equal-forwards", 0, [0, 0, 0], 103.0)
    with pytest.raises(PosttrainError, match="sft-equal-forwards cost 103 forward-equivalents, soar 100"):
        written(tmp_path, made)


def test_commands_beside_tables_run_just_what_is_in_them():
    def said(**seeds):
        made = {name: [record(name, seed, [0]) for seed in of] for name, of in seeds.items()}
        return page._made(made, [*made]).partition(", CPU, ")[2]

    chains = dict.fromkeys(command.GROUPS["chains"], range(3))
    assert said(**chains) == "`python -m benchmarks.evidence run --only chains --seeds 0,1,2`."
    assert said(nft=[0, 1], awm=[2], soar=[1, 0]) == (
        "`python -m benchmarks.evidence run --only nft,soar --seeds 0,1` and "
        "`python -m benchmarks.evidence run --only awm --seeds 2`."
    )


def test_other_prompts_are_not_compared(tmp_path):
    made = series()
    made[2] = {**made[2], "prompts": ["a", "b", "d"]}
    found = written(tmp_path, made)
    with pytest.raises(PosttrainError, match="other prompts"):
        list(tables.differences_table(found, [("sft", "base")], "20"))


def test_a_page_has_the_tables_between_its_marks_and_the_rest_as_it_was(tmp_path):
    found = written(tmp_path / "records", series())
    file = tmp_path / "page.md"
    file.write_text(f"# Title\nWords.\n{page.BEGIN}\nold\n{page.END}\nMore words.\n")
    page.rewrite(file, found)
    text = file.read_text()
    assert text.startswith(
        f"# Title\nWords.\n{page.BEGIN}\n\n### Scores of the arms\n\n- `sft`: SFT at equal steps\n"
    )
    assert text.endswith(f"\n\n{page.END}\nMore words.\n")
    assert "old" not in text
    only = "python -m benchmarks.evidence run --only"
    ran = f"2026-12-01 to 2026-12-03, CPU, `{only} base,sft --seeds 0,1` and `{only} soar --seeds 0,1,2`."
    title = "### Differences of the arms, 20 sampling steps"
    head = f"| arm | against | {tables.COMPARED} |"
    assert f"{title}\n\n{ran} {page.MANY}\n\n{head}\n|{' --- |' * 7}\n| `sft` | `base` |" in text
    sections = text.split("\n### ")[1:]
    assert all(ran in section for section in sections)
    page.rewrite(file, found)
    assert file.read_text() == text
    with pytest.raises(PosttrainError, match="needs two lines"):
        page.with_tables("# Title\n", found)


def test_the_evidence_page_is_what_its_records_make():
    file = ROOT / "docs" / "evidence.md"
    if not file.exists():
        pytest.skip("the page comes with the records")
    text = file.read_text("utf-8")
    assert page.with_tables(text, records.read(command.RECORDS)) == text, page.BEGIN


def test_jobs_are_one_seed_of_everything_before_the_next():
    every = command.jobs(None, None)
    assert every[: len(arms.ARMS) + 1] == [("base", 0), *((name, 0) for name in arms.ARMS)]
    assert {seed for name, seed in every if name == "soar"} == {0, 1, 2, 3, 4}
    assert {seed for name, seed in every if name == "soar-nft"} == {0, 1, 2}
    assert command.jobs("soar,nft", command.seeds("4-5")) == [
        ("soar", 4),
        ("nft", 4),
        ("soar", 5),
        ("nft", 5),
    ]
    assert [name for name, _ in command.jobs("chains", [0])] == [*command.CHAINS]
    with pytest.raises(SystemExit, match="no soart: one of arms, chains, base"):
        command.jobs("soart", None)
