"""Measures the cost of a SOAR step, beside the straightforward one.

    python benchmarks/soar_step.py
    python benchmarks/soar_step.py --device cuda --model sd35m --checkpoint-straightforward 1

The straightforward step is as published: guidance in two forwards, the rollout under autograd, one forward
for each auxiliary point, and one backward for all. At SD3.5 Medium's size its graphs fit no GPU without
gradient checkpointing; the engine's micro-batches need none.
"""

from __future__ import annotations

from _bench import arguments, bench, watched
from _compare import compare, peak
from _soar import SoarStep

from posttrain.algorithms.soar import SOAR
from posttrain.engine.rehearsal import rehearse
from posttrain.policy.activations import checkpoint_blocks


def main() -> None:
    options = arguments(__doc__ or "", 4, points=6, micro_batch=4, checkpoint_straightforward=0)
    it = bench(options)
    step = SoarStep(it, options.points, options.micro_batch)
    watched(it)

    def straightforward() -> None:
        if options.checkpoint_straightforward:
            it.model.transformer.enable_gradient_checkpointing()
        step.straightforward()
        if options.checkpoint_straightforward:
            checkpoint_blocks(it.model.transformer, "off")

    compare(it, step.engine, straightforward, step.count, rehearse(step.soar).forward_equivalents)
    many = SOAR(trajectory_length=4 * options.points)
    growth = peak(it, lambda: step.engine(many)) / peak(it, step.engine)
    print(f"with {4 * options.points} points the engine's peak is {growth:.2f} times as high")


if __name__ == "__main__":
    main()
