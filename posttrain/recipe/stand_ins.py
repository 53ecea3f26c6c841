"""Puts small stand-ins in place of what a recipe needs and this machine lacks, for a smoke run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from posttrain.data.prompts import prompt_rows
from posttrain.data.settings import ShapesPrompts
from posttrain.errors import RecipeError
from posttrain.support.paths import is_path
from posttrain.support.wording import short

if TYPE_CHECKING:
    from posttrain.model import Model
    from posttrain.recipe.messages import FieldProblem
    from posttrain.recipe.schema import Recipe
    from posttrain.reward import Reward

Block = dict[str, Any]
TINY_MODEL: Block = {"type": "sd3", "path": "posttrain/tiny-sd3", "max_sequence_length": 16}
PROMPTS: Block = {"type": "shapes", "count": 4}
RENDERED: dict[str, Block] = {
    "images": {"type": "shapes", "images": 16},
    "pairs": {"type": "shapes_pairs", "pairs": 16},
}
"""What a sample is -> data that are made here."""
REWARD = "jpeg_incompressibility"
"""A reward that can score any image, without weights, and seldom gives two images one score."""
LARGE = 3e9
"""Bytes of weights that a CPU does not run within a minute."""


class StandIns:
    """The recipe as YAML values, in which blocks are replaced, and why each was."""

    def __init__(self, recipe: Recipe, problems: Sequence[FieldProblem]) -> None:
        """``problems``: what :func:`posttrain.recipe.checks.machine_problems` found."""
        self.recipe, self.problems = recipe, problems
        self.plain: Block = recipe.model_dump(mode="json")
        self.reasons: dict[str, str] = {}
        """The field of a replaced block -> why it was replaced."""
        self._device()
        self._model()
        for i in range(len(recipe.stages)):
            self._stage(i)
        self._evaluation()

    def _lacks(self, *path: str | int) -> str | None:
        """What is wrong with the field, or with one inside it, sizes aside."""
        inside = (m for p, m in self.problems if p[: len(path)] == path and p[-1] != "resolution")
        return next(inside, None)

    def _replace(self, owner: Block, field: str, value: Any, path: str, reason: str) -> None:
        owner[field] = value
        self.reasons[path] = reason.partition(" (")[0]  # the rest says how to mend it

    def _device(self) -> None:
        if (reason := self._lacks("device")) is not None:
            self._replace(self.plain, "device", "auto", "device", reason)

    def _model(self) -> None:
        given = self.plain["model"]
        if (reason := _too_far(self.recipe.model, self.plain["device"])) is not None:
            kept = {name: given[name] for name in ("dtype", "offload") if given.get(name) is not None}
            self._replace(self.plain, "model", {**TINY_MODEL, **kept}, "model", reason)

    def _stage(self, i: int) -> None:
        spec, stage, at = self.recipe.stages[i], self.plain["stages"][i], f"stages.{i}"
        prompts: Any = None
        if (reason := self._lacks("stages", i, "data")) is not None:
            if spec.data.gives == "prompts":
                prompts = ShapesPrompts(**PROMPTS)
                self._replace(stage["data"], "prompts", dict(PROMPTS), f"{at}.data.prompts", reason)
            elif (made := RENDERED.get(spec.data.gives)) is not None:
                self._replace(stage, "data", dict(made), f"{at}.data", reason)
        stage["rewards"] = self._rewards(spec.rewards, stage["rewards"], f"{at}.rewards", prompts)
        for field, instead in (("start_from", "base"), ("reference", None)):
            given = stage[field]
            if (
                given is not None
                and is_path(given)
                and ("model" in self.reasons or self._lacks("stages", i, field))
            ):
                self._replace(stage, field, instead, f"{at}.{field}", "these weights are not used here")
        for block, field, instead in (("train", "optimizer", "adamw"), ("tune", "base", None)):
            if (reason := self._lacks("stages", i, block, field)) is not None:
                self._replace(stage[block], field, instead, f"{at}.{block}.{field}", reason)
        if "model" in self.reasons and (lost := spec.tune.unmatched(_tiny_layers())):
            default = type(spec.tune).model_fields["targets"].default
            why = f"the tiny model has no {lost[0]}"
            self._replace(stage["tune"], "targets", list(default), f"{at}.tune.targets", why)

    def _evaluation(self) -> None:
        spec, block = self.recipe.evaluation, self.plain["evaluation"]
        if spec is None:
            return
        prompts: Any = None
        if (reason := self._lacks("evaluation", "prompts")) is not None:
            prompts = ShapesPrompts(**PROMPTS)
            self._replace(block, "prompts", dict(PROMPTS), "evaluation.prompts", reason)
        before = [reward["type"] for reward in block["rewards"]]
        block["rewards"] = self._rewards(spec.rewards, block["rewards"], "evaluation.rewards", prompts)
        if before != [reward["type"] for reward in block["rewards"]]:
            for i, stage in enumerate(self.plain["stages"]):
                if stage["train"]["keep_best"] is not None:
                    why = "its score may be gone"
                    self._replace(stage["train"], "keep_best", None, f"stages.{i}.train.keep_best", why)

    def _rewards(
        self, rewards: Sequence[Reward], plain: list[Block], path: str, prompts: ShapesPrompts | None
    ) -> list[Block]:
        """The blocks of the rewards that can score here; if none can, that of a reward that always can."""
        rows = prompt_rows(prompts) if prompts is not None else []
        kept = []
        for i, (reward, block) in enumerate(zip(rewards, plain, strict=True)):
            unfit = (p for row in rows if (p := reward.prompt_problem(row)) is not None)
            if (reason := _cannot_score(reward) or next(unfit, None)) is None:
                kept.append(block)
            else:
                self.reasons[f"{path}.{i}"] = f"{reward.label} is left out: {reason}"
        if rewards and not kept:
            self.reasons[path] = f"{REWARD} stands in"
            kept = [{"type": REWARD}]
        return kept


def _tiny_layers() -> list[str]:
    """The names of the layers of the tiny model's transformer."""
    from posttrain.weights.files import header_shapes
    from posttrain.weights.pipeline_folder import local_folder

    folder = local_folder(TINY_MODEL["path"])
    assert folder is not None, "it comes with the package"
    return [name.removesuffix(".weight") for name in header_shapes(folder / "transformer") or ()]


def _too_far(model: Model, device: str) -> str | None:
    """Why a smoke run cannot take the model; None if it can."""
    from posttrain.support.device import resolve

    if model.missing() is not None:
        return "its weights are not on this machine"
    if "path" not in type(model).model_fields:
        return None  # it is made, not loaded
    if not (files := model.weight_files()):
        return "its weights are not on this machine"
    size = sum(file.stat().st_size for file in files.values())
    try:
        slow = resolve(device).type == "cpu"
    except RecipeError:
        slow = True
    return f"a CPU needs minutes for its {short(size, 'B')}" if slow and size > LARGE else None


def _cannot_score(reward: Reward) -> str | None:
    """Why the reward cannot score here and now; None if it can."""
    if (reason := reward.problem()) is not None:
        return reason
    if "url" in type(reward).model_fields:
        return "it needs a server"
    if any(weights.local(getattr(reward, name)) is None for name, weights in reward.weights.items()):
        return "its weights are not on this machine"
    return None
