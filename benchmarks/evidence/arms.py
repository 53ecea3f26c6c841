"""The arms of the comparison: each is one training recipe, run with several seeds.

All start from the shipped tiny model and train on the same clean images with the same settings of the
optimizer. Equal seeds have equal images, noise and times in every arm of one depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from posttrain import Recipe

STEPS, BATCH = 150, 32
SFT: dict[str, Any] = {"type": "sft"}
SOAR: dict[str, Any] = {
    "type": "soar",
    "trajectory_length": 3,
    "num_sampling_steps": 20,
    "cfg_scale_sampling": 2.0,
}
POINTS = {key: value for key, value in SOAR.items() if key != "cfg_scale_sampling"}
POINTS["type"] = "benchmarks.evidence.points:SamePoints"
LORA = {"type": "lora", "rank": 8, "alpha": 16}


@dataclass(frozen=True)
class Arm:
    """One recipe: the algorithm of its stage, its length, what is tuned, and what it shows."""

    shows: str
    algorithm: dict[str, Any]
    steps: int = STEPS
    tune: dict[str, Any] | None = None
    rate: float = 5e-4
    against: str = "sft"
    """The arm that it is compared with."""


def forwards(algorithm: dict[str, Any]) -> int:
    """Forward-equivalents of a sample in a step: a forward with backward is 3, a guided velocity 2."""
    points = algorithm["trajectory_length"] if algorithm["type"] == "soar" else 0
    return 3 * (1 + points) + (2 if algorithm.get("cfg_scale_sampling", 1) != 1 else 1) * bool(points)


EQUAL_COST = round(STEPS * forwards(SOAR) / forwards(SFT))
"""Steps of SFT that cost as many forwards as SOAR's."""
ARMS: dict[str, Arm] = {
    "sft": Arm("SFT at equal steps", SFT, against="base"),
    "sft-equal-forwards": Arm("SFT at SOAR's forward-equivalents", SFT, EQUAL_COST),
    "sft-same-points": Arm("SOAR's noise levels and weights without the correction", POINTS),
    "soar": Arm("SOAR: the ODE's step, shared noise", SOAR),
    "soar-unguided": Arm("SOAR without guidance in the rollout", {**SOAR, "cfg_scale_sampling": 1.0}),
    "soar-stochastic": Arm("SOAR with a stochastic path beside the ODE's", {**SOAR, "num_rollout_paths": 2}),
    "soar-lambda-0.3": Arm("lambda_aux 0.3", {**SOAR, "lambda_aux": 0.3}, against="soar"),
    "soar-lambda-3": Arm("lambda_aux 3", {**SOAR, "lambda_aux": 3.0}, against="soar"),
    "soar-length-1": Arm("trajectory_length 1", {**SOAR, "trajectory_length": 1}, against="soar"),
    "soar-length-12": Arm("trajectory_length 12", {**SOAR, "trajectory_length": 12}, against="soar"),
    "reflexflow": Arm("ReflexFlow, as re-implementations report it", {"type": "reflexflow"}),
    "sft-lora": Arm("SFT of a LoRA", SFT, tune=LORA, rate=2e-3, against="base"),
    "soar-lora": Arm("SOAR of a LoRA", SOAR, tune=LORA, rate=2e-3, against="sft-lora"),
}


def recipe(name: str, seed: int, steps: int | None = None) -> Recipe:
    """The recipe of an arm with a seed; ``steps`` replaces its length, for a trial."""
    arm = ARMS[name]
    length = steps or arm.steps
    stage = {
        "name": "trained",
        "start_from": "base",
        "algorithm": arm.algorithm,
        "data": {"type": "shapes", "images": 3000, "seed": 1, "style": "clean"},
        "train": {
            "steps": length,
            "batch_size": BATCH,
            "micro_batch": 64,
            "learning_rate": arm.rate,
            "schedule": "cosine",
            "warmup_steps": 10 if length > 10 else 0,
            "ema": 0.95,
            "sample_every": None,
        },
    }
    if arm.tune is not None:
        stage["tune"] = arm.tune
    return Recipe.model_validate(
        {
            "name": f"evidence-{name}",
            "seed": seed,
            "tracker": "none",
            "model": {"type": "sd3", "path": "posttrain/tiny-sd3", "max_sequence_length": 16},
            "stages": [stage],
        }
    )
