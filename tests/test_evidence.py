"""The comparison of SFT and SOAR: equal points, an interval over seeds and prompts, the error along a rollout."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines import load

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.evidence import arms, bias, statistics, tables  # noqa: E402
from benchmarks.evidence.points import SamePoints  # noqa: E402
from posttrain.algorithm import Algorithm  # noqa: E402
from posttrain.algorithms.soar import SOAR  # noqa: E402
from posttrain.errors import PosttrainError  # noqa: E402
from posttrain.testing.toys import collected, toy_policy  # noqa: E402

Algorithm.variants.pop("same_points")  # or other tests would find it


@pytest.mark.parametrize("name", arms.ARMS)
def test_every_arm_is_a_recipe_and_is_compared_with_another(name, monkeypatch):
    monkeypatch.setitem(Algorithm.variants, "same_points", SamePoints)
    recipe = arms.recipe(name, seed=3)
    (stage,) = recipe.stages
    assert recipe.seed == 3
    assert arms.ARMS[name].against in {"base", *arms.ARMS} - {name}
    assert stage.train.steps == arms.ARMS[name].steps
    assert arms.recipe(name, 0, steps=2).stages[0].train.steps == 2


def test_sft_of_equal_cost_has_as_many_forwards_as_soar():
    assert arms.EQUAL_COST * arms.forwards(arms.SFT) == arms.STEPS * arms.forwards(arms.SOAR)
    assert arms.forwards({**arms.SOAR, "cfg_scale_sampling": 1.0}) == 13


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


def test_a_difference_is_the_mean_and_counts_the_chance_of_seeds_and_of_prompts():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5, 200))
    prompts = [f"prompt {i // 4}" for i in range(200)]
    same = statistics.difference(a, a + 0.25, prompts)
    assert (same.mean, same.low, same.high) == pytest.approx((0.25, 0.25, 0.25))
    assert same.significant
    assert str(same) == "+0.250 [+0.250, +0.250]"
    seeds = statistics.difference(a, a + np.array([[-1], [1], [1], [1], [1]]), prompts)
    assert seeds.mean == pytest.approx(0.6)
    assert not seeds.significant, "one seed of five says the opposite"
    of_prompts = np.repeat(rng.normal(size=50), 4)[None].repeat(5, 0)
    wide = statistics.difference(a, a + of_prompts, prompts)
    assert wide.error == pytest.approx(of_prompts[0].reshape(50, 4)[:, 0].std() / 50**0.5, rel=0.1)
    with pytest.raises(ValueError, match="samples"):
        statistics.difference(a, a, prompts[1:])


def test_a_model_whose_velocity_leads_to_the_image_has_no_exposure_bias(monkeypatch):
    policy, latents = toy_policy(), torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    off = 0.0

    def exact(x, sigma, *rest, **more):
        return (x - latents) / sigma.view(-1, 1, 1, 1) + off

    monkeypatch.setattr(policy, "velocity", exact)
    monkeypatch.setattr(policy, "guided_velocity", exact)
    settings = {"sigmas": [1.0, 0.75, 0.5, 0.25, 0.0], "guidance": 1.0}
    rows = bias.errors(policy, latents, ["a"] * 4, steps=2, **settings)
    assert [row["sigma"] for row in rows] == [0.5, 0.25]
    assert all(row[key] == pytest.approx(0, abs=1e-10) for row in rows for key in ("data", "model"))
    off = 0.5
    for row in bias.errors(policy, latents, ["a"] * 4, steps=1, **settings):
        expected = (row["sigma"] * 0.5) ** 2
        assert row["data"] == pytest.approx(expected, rel=1e-4)
        assert row["model"] == pytest.approx(expected, rel=1e-4), "exact again, from wherever the step ended"


def test_held_out_images_are_clean_scenes_with_their_captions():
    latents, captions = bias.held_out(load(), 3, seed=9)
    assert latents.shape[0] == len(captions) == 3
    assert latents.isfinite().all()


def record(arm, seed, values, base="x"):
    evaluation = {
        "prompts": ["a", "b", "c"],
        "tags": ["colors", "colors", "position"],
        "scores": {"shapes": values, "shapes/lenient": values, "shapes/strict": values},
    }
    return {
        "arm": arm, "seed": seed, "base": base, "cost": {"forward_equivalents": 14_400.0},
        "evaluations": {"20": evaluation},
        "exposure_bias": {"1": [{"sigma": 0.9, "data": 0.5, "model": 0.75}]},
    }  # fmt: skip


def test_tables_compare_each_arm_with_its_rival_on_the_seeds_of_both(tmp_path):
    made = [record("base", 0, [0.0, 0.0, 0.5])]
    made += [record("sft", s, [0.2, 0.2, 0.5]) for s in (0, 1)]
    made += [record("soar", s, [0.3, 0.3, 0.6]) for s in (0, 1, 2)]
    for i, one in enumerate(made):
        (tmp_path / f"{i}.json").write_text(json.dumps(one))
    records = tables.read(tmp_path)
    rows = list(tables.arms_table(records, 20))
    assert rows[2] == "| `base` | 1 | 0.167 | 0.167 | 0.167 |  |  |  |"
    assert rows[3].startswith("| `sft` | 2 | 0.300 | 0.300 | 0.300 | `base` | +0.133 [")
    assert rows[4] == ("| `soar` | 3 | 0.400 | 0.400 | 0.400 | `sft` | +0.100 [+0.100, +0.100] | 14.4k |"), (
        "seed 2 of soar has no partner"
    )
    assert list(tables.kinds_table(records, 20))[3:] == [
        "| `sft` | 0.200 | 0.500 |",
        "| `soar` | 0.300 | 0.600 |",
    ]
    assert list(tables.bias_table(records, 1))[2] == "| `base` | 0.5000 to 0.7500 |  |  |  |"
    (tmp_path / "other.json").write_text(json.dumps(record("sft", 5, [0, 0, 0], base="y")))
    with pytest.raises(PosttrainError, match="2 base models"):
        tables.read(tmp_path)
