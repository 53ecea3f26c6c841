"""The arms of the comparison: each is one training recipe, run with several seeds.

All start from the shipped tiny model and train on the same clean images with the same settings of the
optimizer, which were not tuned for each arm. Equal seeds have equal images, noise and times in every arm, so
arms are paired by their seed. What differs between seeds is the order of the images and every draw; the base
model and the data set are the same, and no interval tells of others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from posttrain import Recipe

STEPS, BATCH = 150, 32
MODEL: dict[str, Any] = {"type": "sd3", "path": "posttrain/tiny-sd3", "max_sequence_length": 16}
SFT: dict[str, Any] = {"type": "sft"}
SOAR: dict[str, Any] = {
    "type": "soar",
    "trajectory_length": 6,
    "num_sampling_steps": 20,
    "cfg_scale_sampling": 2.0,
}
"""The published lambda_aux, trajectory_length and single ODE path; steps and guidance of the evaluation."""
POINTS = {key: value for key, value in SOAR.items() if key != "cfg_scale_sampling"}
POINTS["type"] = "benchmarks.evidence.points:SamePoints"
LORA = {"type": "lora", "rank": 8, "alpha": 16}


@dataclass(frozen=True)
class Arm:
    """One recipe: the algorithm of its stage, its length, what is tuned, and what it shows."""

    shows: str
    algorithm: dict[str, Any]
    against: tuple[str, ...]
    """The arms that it is compared with, chosen before any was run."""
    steps: int = STEPS
    tune: dict[str, Any] | None = None
    rate: float = 5e-4
    as_dear_as: str | None = None
    """The arm whose forward-equivalents it is made to have."""


def forwards(algorithm: dict[str, Any]) -> int:
    """Forward-equivalents of a sample in a step of SFT or of SOAR: a forward with backward is 3."""
    if algorithm["type"] == "sft":
        return 3
    paths = algorithm.get("num_rollout_paths", 1)
    rollout = 1 if algorithm["cfg_scale_sampling"] == 1 else 2
    return 3 * (1 + paths * algorithm["trajectory_length"]) + rollout


EQUAL_COST = round(STEPS * forwards(SOAR) / forwards(SFT))
"""Steps of SFT that cost as many forwards as SOAR's."""
ARMS: dict[str, Arm] = {
    "sft": Arm("SFT at equal steps", SFT, ("base",)),
    "sft-equal-forwards": Arm(
        "SFT at SOAR's forward-equivalents", SFT, ("base", "sft"), EQUAL_COST, as_dear_as="soar"
    ),
    "sft-same-points": Arm("SOAR's noise levels and weights without the correction", POINTS, ("sft",)),
    "soar": Arm(
        "SOAR: the ODE's step, shared noise", SOAR, ("base", "sft", "sft-equal-forwards", "sft-same-points")
    ),
    "soar-unguided": Arm(
        "SOAR without guidance in the rollout", {**SOAR, "cfg_scale_sampling": 1.0}, ("sft", "soar")
    ),
    "soar-stochastic": Arm(
        "SOAR with a stochastic path beside the ODE's", {**SOAR, "num_rollout_paths": 2}, ("soar",)
    ),
    "soar-lambda-0.3": Arm("lambda_aux 0.3", {**SOAR, "lambda_aux": 0.3}, ("soar",)),
    "soar-lambda-3": Arm("lambda_aux 3", {**SOAR, "lambda_aux": 3.0}, ("soar",)),
    "soar-length-1": Arm("trajectory_length 1", {**SOAR, "trajectory_length": 1}, ("soar",)),
    "soar-length-3": Arm("trajectory_length 3", {**SOAR, "trajectory_length": 3}, ("soar",)),
    "soar-length-12": Arm("trajectory_length 12", {**SOAR, "trajectory_length": 12}, ("soar",)),
    "reflexflow": Arm("ReflexFlow, as re-implementations report it", {"type": "reflexflow"}, ("sft", "soar")),
    "sft-lora": Arm("SFT of a LoRA", SFT, ("base",), tune=LORA, rate=2e-3),
    "soar-lora": Arm("SOAR of a LoRA", SOAR, ("sft-lora",), tune=LORA, rate=2e-3),
}


def recipe(name: str, seed: int, steps: int | None = None) -> Recipe:
    """The recipe of an arm with a seed; ``steps`` replaces its length."""
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
    blocks = {"name": f"evidence-{name}", "seed": seed, "tracker": "none", "model": MODEL, "stages": [stage]}
    return Recipe.model_validate(blocks)
