"""The bytes that this process of several holds between two steps, and what the plan says: run by torchrun.

Prints both for the ``parallel`` block that is its argument.
"""

import gc
import sys
import warnings

import torch

from posttrain.distributed.world import joined
from posttrain.planning.memory import Phase, memory
from posttrain.planning.sizes import Sizes
from posttrain.policy import Policy
from posttrain.recipe.file import load_recipe


def held():
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in local if t.device.type == "cpu"}
    return sum(storage.nbytes() for storage in storages.values())


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with joined(torch.device("cpu"), group=True) as world:
        recipe = load_recipe("quickstart", [f"parallel={sys.argv[1]}"], checks=False)
        model, stage = recipe.model.load(torch.device("cpu"), "fp32"), recipe.stages[0]
        stage.tune.apply(model.transformer, 0)
        policy = Policy(model)
        trained = sum(p.numel() for p in policy.trained.values())
        strategy = recipe.parallel.prepare(policy, stage.train, world)
        condition = model.encode_prompts(["a red circle"] * 2)
        for _ in range(2):
            strategy.begin_micro_batch(last=True)
            latents = torch.randn(2, *model.latent_shape(64, 64))
            strategy.backward(policy.velocity(latents, torch.rand(2), condition).square().mean())
            strategy.step(1.0)
        modules = [*model.encoder_modules("prompts"), *model.encoder_modules("images")]
        encoders = sum(p.nbytes for module in modules for p in module.parameters())
        sizes = Sizes(trained, 0, 8.0 * trained, 0, encoders={"prompts": encoders})
        idle = {"idle": Phase(0.0, encoders=frozenset({"prompts"}))}
        planned = memory(sizes, idle, recipe.parallel.shares(world.size), separate=False)
        if world.is_main:
            print("held", held(), planned.total)
        world.barrier()
        strategy.close()
