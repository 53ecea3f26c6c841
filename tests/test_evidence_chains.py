"""The chains of RL after SFT and SOAR: equal costs and draws, and what is measured on the way."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import learning  # noqa: E402
from benchmarks.evidence import arms, chains, page, records, tables  # noqa: E402
from posttrain import load_recipe  # noqa: E402
from posttrain.algorithm import Algorithm  # noqa: E402
from posttrain.algorithms.awm import AWM  # noqa: E402
from posttrain.algorithms.diffusion_nft import DiffusionNFT  # noqa: E402
from posttrain.algorithms.flow_grpo import FlowGRPO  # noqa: E402
from posttrain.engine.trainer import update  # noqa: E402
from posttrain.errors import PosttrainError  # noqa: E402
from posttrain.optim.settings import Train  # noqa: E402
from posttrain.testing.toys import alone, collected, toy_policy  # noqa: E402

Algorithm.variants.pop("same_points", None)  # or other tests would find it


def test_chains_have_equal_totals_and_equal_rl_after_sft_and_soar():
    for before, rl in chains.CHAINS.values():
        name = "-".join(filter(None, (before, rl)))
        spent = chains.BEFORE[before] * 32 * arms.forwards(arms.ARMS[before].algorithm) if before else 0
        total = spent + chains.length(name) * chains.STAGES[rl].dear
        # 51 of its steps, the next whole readings, are 2 % less
        assert total == pytest.approx(chains.TOTAL, rel=0.025 if rl == "awm-kl" else 0.001)
    assert chains.length("sft-nft") == chains.length("soar-nft") == 42
    assert chains.length("sft-grpo") == chains.length("soar-grpo") == 105


@pytest.mark.parametrize(
    ("name", "kind"), [("awm", AWM), ("awm-kl", AWM), ("grpo", FlowGRPO), ("nft", DiffusionNFT)]
)
def test_a_steps_cost_is_what_the_policy_counts(name, kind):
    (stage,) = chains.rl_recipe(name, 0, "base").stages
    algorithm, policy = stage.algorithm, toy_policy()
    assert isinstance(algorithm, kind)
    items = collected(algorithm, policy, prompts=2)
    images = 2 * algorithm.group_size
    update(algorithm, policy, items, alone(policy), Train(steps=1))
    assert policy.forward_equivalents / images * stage.train.batch_size == chains.STAGES[name].dear


@pytest.mark.parametrize("name", chains.CHAINS)
def test_a_chain_is_the_shipped_recipe_with_another_start_and_length(name, tmp_path):
    rl = chains.STAGES[chains.CHAINS[name][1]]
    recipe = chains.rl_recipe(name, 2, str(tmp_path))
    shipped = load_recipe(rl.recipe, [f"stages.{rl.stage}.{change}" for change in rl.changes], checks=False)
    (stage,), (known,) = recipe.stages, shipped.stages
    assert (recipe.seed, stage.start_from, stage.train.steps) == (2, str(tmp_path), chains.length(name))
    assert recipe.depth(stage) == 0, "its draws are those of RL from the base"
    for field in ("algorithm", "data", "rewards", "tune"):
        assert getattr(stage, field) == getattr(known, field)
    free = {"steps", "checkpoint_every", "keep_every", "sample_every"}
    assert stage.train.model_dump(exclude=free) == known.train.model_dump(exclude=free)
    assert stage.train.steps % stage.train.keep_every == 0
    assert stage.train.steps // stage.train.keep_every == chains.READINGS
    assert chains.rl_recipe(name, 0, "base", steps=4).stages[0].train.steps == 6


def test_awm_is_trained_with_the_kl_term_that_ships_and_without():
    recipes = (chains.rl_recipe(name, 0, "base") for name in ("awm-kl", "awm"))
    assert [r.stages[0].algorithm.beta for r in recipes] == [0.003, 0]


@pytest.fixture
def stubs(monkeypatch):
    """Chains that train and draw nothing, and say what they would have."""
    seen = []

    def scored(weights, settings, samples, folder, device):
        seen.append(("scored", weights, settings["seed"]))
        scores = {
            key: [0.1 * len(seen)] * 2 for key in ("shapes", "shapes/lenient", "shapes/strict", "distance")
        }
        return {"prompts": ["a", "b"], "tags": ["x", "x"], "scores": scores}

    def run(recipe, output):
        (stage,) = recipe.stages
        seen.append(("run", stage.algorithm.type, stage.start_from, stage.train.steps))
        Path(output).mkdir(parents=True, exist_ok=True)
        steps = stage.train.steps
        rows = [{"step": s, "reward": s / 10, "forward_equivalents": 10 * s} for s in range(1, steps + 1)]
        cost = {"steps": steps, "samples": steps, "forward_equivalents": 10 * steps, "seconds": 2.0}
        return SimpleNamespace(
            cost=lambda name: cost, final=lambda name: output / name / "final", metrics=lambda name: rows
        )

    monkeypatch.setattr(chains, "scored", scored)
    monkeypatch.setattr(chains.posttrain, "run", run)
    return seen


def test_a_chain_is_measured_before_rl_and_after_each_third(stubs, tmp_path):
    at = (tmp_path / "runs", tmp_path / "records")
    made = json.loads(chains.measured_chain("soar-nft", 1, *at, steps=6).read_text())
    before = str(at[0] / "before-soar-1-6-steps" / "run" / "trained")
    assert stubs[0] == ("run", "soar", "base", 6)
    assert stubs[1] == ("scored", before + "/final", 1)
    assert stubs[2] == ("run", "diffusion_nft", before, 6)
    assert [Path(s[1]).name for s in stubs[3:]] == ["step-00000002", "step-00000004", "step-00000006"]
    assert made["readings"] == [
        {"step": 0, "forward_equivalents": 60},
        {"step": 2, "forward_equivalents": 80, "reward": pytest.approx(0.15)},
        {"step": 4, "forward_equivalents": 100, "reward": pytest.approx(0.35)},
        {"step": 6, "forward_equivalents": 120, "reward": pytest.approx(0.55)},
    ]
    assert made["rewards"] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert made["cost"]["forward_equivalents"] == 120
    assert {*made["evaluations"]} == {"0", "1", "2", "3"}
    count = len(stubs)
    chains.measured_chain("soar-nft", 1, *at, steps=6)
    assert len(stubs) == count
    with pytest.raises(PosttrainError, match="made by other recipes"):
        chains.measured_chain("soar-nft", 1, *at)


def test_the_table_of_learning_runs_has_a_chain_from_its_start_to_its_end(stubs, tmp_path):
    file = chains.measured_chain("nft", 0, tmp_path / "runs", tmp_path / "records", steps=3)
    row = learning.of_record(file)
    assert (row.name, row.before, row.after) == ("nft-0", pytest.approx(0.1), pytest.approx(0.5))
    assert row.gain == pytest.approx((0.4, 0.4, 0.4))
    assert row.rewards == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert row.cost["forward_equivalents"] == 30


def test_what_chains_gained_on_the_way_is_told_by_seed_and_together(tmp_path):
    def kept(arm, seed, *means, step=20):
        samples = ([mean + spread for spread in (-0.1, 0.1)] for mean in means)
        made = {
            "arm": arm,
            "seed": seed,
            "prompts": ["a", "b"],
            "evaluations": {str(i): {"shapes": shapes} for i, shapes in enumerate(samples)},
            "readings": [{"step": step * i} for i in range(len(means))],
        }
        (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps(made))

    kept("nft", 0, 0.2, 0.3, 0.5)
    kept("nft", 1, 0.2, 0.3, 0.7)
    kept("awm", 0, 0.2, 0.1, step=30)
    head, _, *rows = learning.on_the_way(sorted(tmp_path.glob("*.json")))
    assert head == "| run | after 1/2 | at the end |"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["awm-0", "nft-0", "nft-1", "nft, all"]
    assert [cell.split(" ")[0] for cell in cells[0]] == ["awm-0", "", "-0.100"]
    assert [row[1].split(" ")[0] for row in cells[1:]] == ["+0.100"] * 3
    assert [row[2].split(" ")[0] for row in cells[1:]] == ["+0.300", "+0.500", "+0.400"]
    low, high = map(float, cells[3][2].split("[")[1].strip("]").split(", "))
    assert low < 0.3 < 0.5 < high, "two seeds say little of others"


def test_from_the_base_rl_is_all_of_the_cost(stubs, tmp_path):
    made = json.loads(chains.measured_chain("grpo", 0, tmp_path, tmp_path / "records", steps=3).read_text())
    assert stubs[0][:2] == ("scored", arms.MODEL["path"])
    assert stubs[1] == ("run", "flow_grpo", "base", 3)
    assert made["readings"][0]["forward_equivalents"] == 0
    assert made["cost"] == {"steps": 3, "samples": 3, "forward_equivalents": 30, "seconds": 2.0}


@pytest.mark.usefixtures("stubs")
def test_the_tables_of_chains_have_rivals_gains_and_what_was_on_the_way(tmp_path):
    for seed in (0, 1):
        for name in ("nft", "sft-nft"):
            chains.measured_chain(name, seed, tmp_path / "runs", tmp_path / "records", steps=3)
    lines = [*page.tables(records.read(tmp_path / "records"))]
    compared = [line.split(" | ")[:2] for line in lines if " of 2 |" in line]
    pairs = [
        ["| `nft`", "`nft before RL`"],
        ["| `sft-nft`", "`sft-nft before RL`"],
        ["| `sft-nft`", "`nft`"],
    ]
    assert compared == pairs * 2, "of the graded score, and of the distance"
    assert "| arm | against | " + tables.COMPARED.replace("graded", "distance") + " |" in lines
    way = lines[lines.index("### Chains on the way") :]
    assert [line.split(" | ")[1:4] for line in way if line.startswith("| `sft-nft`")] == [
        ["0", "0k", ""],
        ["1", "0k", "0.100"],
        ["2", "0k", "0.200"],
        ["3", "0k", "0.300"],
    ]
