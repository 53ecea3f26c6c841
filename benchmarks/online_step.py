"""Counts forwards and bytes of an iteration of Flow-GRPO or DiffusionNFT, on the shipped model.

python benchmarks/online_step.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from posttrain.algorithm import Tools
from posttrain.algorithms.diffusion_nft import DiffusionNFT
from posttrain.algorithms.flow_grpo import FlowGRPO
from posttrain.data.batches import PromptBatchSource
from posttrain.data.family import Opening
from posttrain.data.settings import ShapesPrompts
from posttrain.distributed.world import ALONE
from posttrain.engine.rehearsal import rehearse
from posttrain.engine.trainer import OnPolicy, update
from posttrain.models.sd3 import SD3
from posttrain.optim.settings import Train
from posttrain.parallel.single import Single
from posttrain.policy import Policy
from posttrain.rewards.shapes import Shapes
from posttrain.scoring.judge import Judge

GROUPS, SIZE = 2, 4
CASES = {
    "flow_grpo, 10 steps, 9 trained, guidance, KL": (FlowGRPO(group_size=SIZE), 20 + 9 * (2 * 3 + 2)),
    "flow_grpo, window of 2, no guidance, no KL": (
        FlowGRPO(group_size=SIZE, sde_window_size=2, guidance_scale=1.0, beta=0.0),
        10 + 2 * 3,
    ),
    "diffusion_nft, 10 steps, no guidance": (DiffusionNFT(group_size=SIZE), 10 + 9 * (3 + 2)),
}


def main() -> None:
    torch.set_num_threads(2)
    model = SD3(path="posttrain/tiny-sd3", max_sequence_length=16).load(torch.device("cpu"), "fp32")
    encoded: list[str] = []
    encode = model.encode_prompts
    model.encode_prompts = lambda prompts: encoded.extend(prompts) or encode(prompts)  # type: ignore[method-assign]
    latent = 4 * torch.tensor(model.latent_shape(64, 64)).prod().item()
    settings = Train(steps=1, batch_size=GROUPS * SIZE)
    print(f"{'per image':48} forward-eq.  at most  latents stored  bytes stored")
    for name, (algorithm, allowed) in CASES.items():
        model.transformer.requires_grad_(True)
        policy = Policy(model, micro_batch=8)
        for role in algorithm.roles:
            policy.add_role(role, moves=role != "reference")
        opening = Opening(model, Path("unused"), GROUPS * SIZE, SIZE)
        source = PromptBatchSource(ShapesPrompts(count=24), 64, opening)
        encoded.clear()
        _, batch, draws = next(source.batches((0, 0), 0))
        assert len(encoded) == 1 + GROUPS, "a prompt is encoded once, and the empty one"
        with torch.no_grad(), Judge(model, [Shapes(type="shapes")], failures=None) as judge:  # type: ignore[arg-type]
            items = algorithm.collect(batch, Tools(policy, draws, lambda n: model.sigmas(n, 64, 64), judge))
        update(
            algorithm,
            policy,
            items,
            Single().prepare(policy, settings, ALONE),
            settings,
            1,
            OnPolicy(policy.micro_batch),
        )
        samples = int((items.weight > 0).sum()) / rehearse(algorithm).items
        rollout = len(batch) * (algorithm.num_steps * (1 if algorithm.guidance_scale == 1 else 2))
        each = rollout / len(batch) + (policy.forward_equivalents - rollout) / samples
        stored = items.nbytes / len(batch)
        print(f"{name:48} {each:11.0f} {allowed:8.0f} {stored / latent:15.1f} {stored:13,.0f}")
        assert each <= allowed, name
    print("Latents stored: float32, of trained steps only, each with what it became (flow_grpo) or its x0.")


if __name__ == "__main__":
    main()
