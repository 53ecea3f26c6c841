"""Opens as a model what a stage wrote: for a later stage, ``posttrain eval`` or ``posttrain sample``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from posttrain.engine.checkpoint_folder import saved
from posttrain.errors import ModelError, RecipeError
from posttrain.model import FlowModel, Model, loaded, loaded_if_fit
from posttrain.recipe.schema import BASE
from posttrain.sampler import Sampler
from posttrain.stages.checkpoint_model import is_checkpoint, open_checkpoint
from posttrain.stages.lineage import DESCRIPTION, described, exact, model_path, with_parents
from posttrain.stages.model_choice import model_of
from posttrain.stages.stage_state import recorded
from posttrain.support.device import resolve
from posttrain.support.paths import expanded
from posttrain.support.plugins import missing_type
from posttrain.weights.fingerprints import Prints, by_component, changed, prints_of
from posttrain.weights.pipeline_folder import INDEX, local_folder
from posttrain.weights.run_folders import is_run
from posttrain.weights.transformer import LORA

if TYPE_CHECKING:
    import torch

    from posttrain.flow.sampling_settings import Sampling


@dataclass(frozen=True)
class Artifact:
    """A model and the weights to load onto it."""

    spec: Model
    """The recipe's ``model`` block; its path is the artifact's own where that is a whole pipeline."""
    adapters: list[Path]
    """Folders whose weights are loaded in order."""
    weights: str
    """Which weights they are: "ema", "raw", or "base" for a pipeline that no stage wrote."""
    base: Mapping[str, str] | None
    """A hash of each component of the base that a whole pipeline was trained from, where it says so."""

    def base_hashes(self) -> Mapping[str, str]:
        """:attr:`base`, or else the hashes of the files that are loaded."""
        return by_component(prints_of(self.spec.weight_files())) if self.base is None else self.base


def open_artifact(
    path: str, device: torch.device, base: str | None = None, weights: str | None = None
) -> tuple[FlowModel, str]:
    """Load the model at ``path``: a stage's folder, its ``final`` folder, one of its checkpoints, a run's
    folder (its last finished stage), a run's ``base`` folder, a diffusers folder, or a hub name.

    ``base`` replaces the model that a LoRA was trained on. ``weights`` chooses "raw" or "ema" of a
    checkpoint. Returns the model and which weights it has ("base" for a pipeline that no stage wrote).
    Raises ModelError.
    """
    model, artifact = _open(path, device, base, weights)
    return model, artifact.weights


def open_sampler(
    path: str,
    device: torch.device,
    settings: Sampling,
    base: str | None = None,
    weights: str | None = None,
) -> tuple[Sampler, str]:
    """As :func:`open_artifact`, ready to draw images; also opens models that cannot be trained."""
    from posttrain.sampling.sampler import flow_sampler, loaded_to_draw, sampler_of

    if weights is None and not is_checkpoint(path):
        artifact = _describe(path, base)
        artifact.spec.guidance_rule().needs_empty_prompt(settings.guidance)  # or ModelError, before it loads
        if not artifact.spec.trainable:
            if artifact.adapters:
                kind = artifact.spec.type
                raise ModelError(f"{path!r} is a LoRA, and those of {kind} models cannot be loaded")
            sampler = sampler_of(artifact.spec, device, settings)
            sampler.base = artifact.base_hashes
            return sampler, artifact.weights
        model = loaded_to_draw(artifact.spec, device, settings, artifact.adapters)
    else:
        model, artifact = _open(path, device, base, weights)
    sampler = flow_sampler(model, artifact.spec, settings, path)
    sampler.base = artifact.base_hashes
    return sampler, artifact.weights


def usual_settings(path: str, base: str | None = None) -> dict[str, Any]:
    """The settings of sampling for which the model at ``path`` is made, as far as they are known: resolution
    and guidance. For ``base`` see :func:`open_artifact`."""
    if is_checkpoint(path):
        folder = expanded(path).absolute()
        try:
            spec = recorded(folder.parents[2], folder.parents[1].name).model
        except RecipeError:
            return {}
    else:
        spec = _describe(path, base, check=False).spec
    found = {"resolution": spec.native_side(), "guidance": spec.guidance_rule().usual}
    return {name: value for name, value in found.items() if value is not None}


def open_exact(final: Path, device: torch.device) -> FlowModel:
    """The model as the stage that wrote ``final`` trained it: exact weights on the components of the base.

    Adapters are merged. Raises ModelError, also where the base is not there or not the one it was trained on.
    """
    if (final / LORA).is_file():
        return open_artifact(str(final), device)[0]
    model = loaded(spec_of(final), device, "fp32")
    model.load_weights(exact(final))
    return model


def spec_of(final: Path) -> Model:
    """The recipe's ``model`` block by which the stage that wrote ``final`` was trained. Raises ModelError."""
    return _spec(str(final), final, described(final), None, False)


def _open(
    path: str, device: torch.device, base: str | None, weights: str | None
) -> tuple[FlowModel, Artifact]:
    """The model, and what was loaded for it."""
    if is_checkpoint(path):
        if base is not None:
            raise ModelError(f"--base is for a LoRA that was written; {path!r} is a checkpoint of a run")
        model, spec, opened = open_checkpoint(path, device, weights)
        return model, Artifact(spec, [], opened, None)
    if weights is not None:
        raise ModelError(f"--weights is for a checkpoint; {path!r} has one set of weights")
    artifact = _describe(path, base)
    model = loaded_if_fit(artifact.spec, device, "fp32")
    for source in artifact.adapters:
        model.load_weights(source)
    return model, artifact


def _weights_in(folder: Path) -> str:
    """The names of the first files of weights in ``folder``, or that there are none."""
    names = sorted(file.name for file in folder.glob("*.safetensors"))[:3]
    return ", ".join(map(repr, names)) or "no weights"


def _describe(path: str, base: str | None, *, check: bool = True) -> Artifact:
    """What :func:`open_artifact` has to load for ``path``, unless that is a checkpoint. Raises ModelError.

    ``check`` says whether a LoRA's base is compared with the one that it was trained on.
    """
    folder = local_folder(path)
    if folder is not None and (spec := _base_of_run(folder)) is not None:
        return Artifact(spec, [], "base", None)
    refuse_unfinished(folder)
    description = described(folder) if folder is not None and (folder / DESCRIPTION).is_file() else None
    is_lora = folder is not None and (folder / LORA).is_file()
    if not is_lora and base is not None:
        found = "is a whole pipeline"
        if folder is not None and not (folder / INDEX).is_file():
            found = f"holds {_weights_in(folder)}"
        raise ModelError(f"--base is for a LoRA, a folder with {LORA}; {path!r} {found}")
    spec = _spec(path, folder, description, base, is_lora)
    loaded = with_parents(folder) if folder is not None else []
    adapters = [*map(exact, loaded[:-1]), *loaded[-1:]]
    if "path" in type(spec).model_fields:
        if (source := base if is_lora else folder and str(folder)) is not None:
            replaced: dict[str, str | None] = {"path": source}
            if source != spec.model_dump()["path"] and "revision" in type(spec).model_fields:
                replaced["revision"] = None  # it was one of the repository that was trained
            spec = spec.model_copy(update=replaced)
        if not is_lora:
            adapters = []  # the path holds all weights
    opened = description["weights"] if description else "raw" if is_lora else "base"
    if check and is_lora and base is None and description is not None and description["transformer"]:
        _refuse_another_base(path, spec, description["transformer"])
    trained_from = description["base"] if description is not None and not is_lora else None
    return Artifact(spec, adapters, opened, trained_from or None)


def _refuse_another_base(path: str, spec: Model, trained_from: Prints) -> None:
    """Raise ModelError if the LoRA at ``path`` was not trained from the transformer of ``spec``."""
    files = {name: file for name, file in spec.weight_files().items() if name.startswith("transformer/")}
    if files and changed(trained_from, prints_of(files, trained_from)):
        source = spec.model_dump().get("path")
        raise ModelError(
            f"{path!r} is a LoRA of another transformer than {source!r} now has: give the base that it was "
            f"trained on with --base; --base {source} takes this one all the same"
        )


def _base_of_run(folder: Path) -> Model | None:
    """The base model of a run, if ``folder`` is the run's ``base``. Raises ModelError."""
    if folder.name != BASE or not is_run(folder.parent):
        return None
    try:
        spec = recorded(folder.parent, BASE).model
    except RecipeError as error:
        raise ModelError(str(error)) from error
    # one that a run builds first is there once the run has begun
    return spec if model_path(spec) is not None else spec.build(folder.parent / "model", resolve("cpu"))


def refuse_unfinished(folder: Path | None) -> None:
    """Raise ModelError for a stage that is not finished, and for a run without a finished one."""
    if folder is None:
        return
    if checkpoints := saved(folder / "checkpoints"):
        raise ModelError(
            f"the stage {str(folder)!r} is not finished; "
            f"give a checkpoint of it, such as {str(checkpoints[-1])!r}"
        )
    if is_run(folder):
        written = sorted(path for stage in folder.iterdir() for path in saved(stage / "checkpoints"))
        hint = f"; give a checkpoint, such as {str(written[-1])!r}" if written else ""
        raise ModelError(f"no stage of the run {str(folder)!r} is finished{hint}")


def _spec(
    path: str, folder: Path | None, description: dict[str, Any] | None, base: str | None, is_lora: bool
) -> Model:
    """The ``model`` block that the artifact names, or else that fits its pipeline."""
    from posttrain.recipe.variants import AnyModel

    if description is not None:
        try:
            return TypeAdapter(AnyModel).validate_python(description["model"])
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in ("model", *first["loc"]))
            kind = str(description["model"].get("type"))
            unknown = missing_type("posttrain.models", kind) if kind not in Model.variants else ""
            message = f"{first['msg'][:1].lower()}{first['msg'][1:]}{unknown}"
            raise ModelError(f"{str(folder)!r}: {DESCRIPTION}: {field}: {message}") from error
    if not is_lora:
        return model_of(path)
    if base is None:
        raise ModelError(
            f"{str(folder)!r} is a LoRA without {DESCRIPTION}: say with --base which model it is for"
        )
    return model_of(base)
