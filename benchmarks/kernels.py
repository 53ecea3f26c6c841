"""Counts the kernels of one forward and backward, by kind, on the CPU.

    python benchmarks/kernels.py                     full tuning in bf16
    python benchmarks/kernels.py --tune lora
    python benchmarks/kernels.py --precision fp32

The transformer has the depth of Stable Diffusion 3.5 Medium, 24 layers, 13 of them with a second attention,
and a small width: the number of kernels depends on the depth alone. Each operation that computes or copies
counts as a kernel, which is what eager execution launches at least; compiled blocks launch fewer. Counted are
a micro-batch's loss, its backward, and what one process does with the gradients, without the optimizer.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.algorithm import Items
from posttrain.algorithms.sft import SFT
from posttrain.distributed.world import ALONE
from posttrain.models._outline import configs_at
from posttrain.models.sd3 import SD3
from posttrain.optim.settings import Train
from posttrain.parallel.single import Single
from posttrain.policy import Policy
from posttrain.policy.tuning import Full, Lora
from posttrain.sampling.prompts import encode

NO_KERNELS = ("empty", "detach", "alias", "_unsafe_view", "lift_fresh", "set_", "new_empty")
TINY = "posttrain/tiny-sd3"


class Kernels(TorchDispatchMode):
    """Counts operations by name, and those that change the precision of what they copy."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.casts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(NO_KERNELS):
            self.counts[name] += 1
            if (kind := _cast(name, args, out)) is not None:
                self.casts[kind] += 1
        return out


def _cast(name: str, args: Any, out: Any) -> str | None:
    """What a copy that changes the precision copies; None for all else."""
    if name == "_to_copy":
        given, made = args[0], out
    elif name == "copy_":
        given, made = args[1], args[0]
    elif name == "_foreach_copy_":
        given, made = args[1][0], args[0][0]
    else:
        return None
    if not isinstance(given, Tensor) or given.dtype == made.dtype:
        return None
    if name == "_foreach_copy_":
        return "gradients, all at once" if made.dtype == torch.float32 else "weights, all at once"
    return "weights" if isinstance(given, torch.nn.Parameter) else "activations"


def counted(tune: str, precision: str) -> Kernels:
    """The kernels of one forward and backward of 2 samples."""
    torch.manual_seed(0)
    configs = configs_at(TINY)
    assert configs is not None, "it comes with the package"
    blocks = {"num_layers": 24, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}
    transformer = {**configs["transformer"], **blocks}
    spec = SD3(path=TINY, max_sequence_length=16, dtype="bf16")
    frozen = "fp32" if tune == "full" else "bf16"
    model = spec.outline_of({**configs, "transformer": transformer}, frozen, torch.device("cpu"))
    assert model is not None, "every component has a configuration"
    (Full() if tune == "full" else Lora(rank=4, alpha=4.0)).apply(model.transformer, 0)
    policy = Policy(model, autocast=torch.bfloat16 if precision == "bf16" else None)
    strategy = Single().prepare(policy, Train(steps=1), ALONE)
    latents, (conditions, rows) = torch.randn(2, *model.latent_shape(64, 64)), encode(model, ["a", "b"])
    fields = {"latents": latents, "target": latents, "sigma": torch.tensor([0.3, 0.6])}
    items = Items(
        torch.ones(2), {**fields, "prompt_index": rows, "sample_index": torch.arange(2)}, conditions
    )
    with Kernels() as kernels:
        strategy.backward(SFT().loss(items, policy).per_item.mean())
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tune", choices=("full", "lora"), default="full")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    options = parser.parse_args()
    kernels = counted(options.tune, options.precision)
    print(f"casts {kernels.casts.total()}")
    for name, count in kernels.casts.most_common():
        print(f"    {count:6} {name}")
    print(f"kernels {kernels.counts.total()}")
    for name, count in kernels.counts.most_common(15):
        print(f"    {count:6} {name}")


if __name__ == "__main__":
    main()
