"""Counts what plans of the shipped recipes need of their models, into the file that comes with the package.

    python benchmarks/count_shipped.py

Run it after a change of what is counted: ``tests/test_plan_store.py`` says when the file is stale. It plans
every shipped recipe on large and small GPUs, so that settings which a plan proposes are counted too.
Those for a laptop are also planned without a GPU.
"""

from __future__ import annotations

import json
from typing import Any

from posttrain.planning.budget import Budget
from posttrain.planning.gpus import custom, gpu
from posttrain.planning.rates import Rates
from posttrain.planning.store import LIBRARIES, SHIPPED, Store, description_of, identity
from posttrain.planning.tables import resources
from posttrain.recipe.file import load_recipe, shipped_recipes
from posttrain.recipe.schema import Recipe
from posttrain.support.versions import versions

GPUS = (("H100 80GB", 1), ("H100 80GB", 8), ("RTX 4090 24GB", 1))
"""GPUs and their number."""


def counts_of(recipe: Recipe, store: Store) -> None:
    """Plan ``recipe`` with what is in the ``store``, and keep what is not."""
    for card, devices in GPUS:
        resources(recipe, Budget(gpu(card), devices), cuda=True, store=store)
    if "tiny" in recipe.model.model_dump_json():
        resources(recipe, Budget(custom("16GB", 1), 1, rates=Rates()), cuda=False, store=store)


def counted() -> dict[str, dict[str, Any]]:
    """The counts of each model of a shipped recipe, by the model's identity."""
    found: dict[str, dict[str, Any]] = {}
    stores: dict[str, Store] = {}
    for name in shipped_recipes():
        recipe = load_recipe(name, checks=False)
        about = description_of(recipe.model)
        assert about is not None, "posttrain knows the models of its recipes"
        store = stores.setdefault(identity(about), Store({}))
        counts_of(recipe, store)
        recipes = found.get(identity(about), {}).get("recipes", [])
        found[identity(about)] = {
            "model": about["settings"],
            "recipes": [*recipes, name],
            "versions": versions(LIBRARIES),
            "counts": dict(sorted(store.kept.items())),
        }
    return found


def main() -> None:
    lines = []
    for name, entry in counted().items():
        counts = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in entry.pop("counts").items())
        lines.append(f'{json.dumps(name)}: {json.dumps(entry)[:-1]}, "counts": {{\n{counts}\n}}}}')
    SHIPPED.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    print(f"{SHIPPED}: {SHIPPED.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
