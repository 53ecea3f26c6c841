"""Writes what a stage trained in the format of another tool."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain.engine.checkpoint_folder import saved
from posttrain.errors import ModelError, PosttrainError, RecipeError
from posttrain.model import DtypeName, torch_dtype
from posttrain.stages.artifact import open_exact, spec_of
from posttrain.stages.checkpoint_model import is_checkpoint
from posttrain.stages.lineage import DESCRIPTION, FINAL, described, exact, with_parents
from posttrain.stages.model_card import GRID, README, card_text
from posttrain.stages.stage_state import RECIPE
from posttrain.support.files import copy, published
from posttrain.support.paths import expanded, in_the_way
from posttrain.support.records import read_object
from posttrain.support.wording import counted
from posttrain.weights.files import component_weights, file_header
from posttrain.weights.lora_file import write_joined, write_kohya
from posttrain.weights.needed_files import listed
from posttrain.weights.pipeline_folder import INDEX, index_in
from posttrain.weights.run_folders import RUN, is_run, weights_folder
from posttrain.weights.single_file import SingleFile, placed
from posttrain.weights.transformer import LORA
from posttrain.weights.writing import Entry, entries_in, write_tensors

if TYPE_CHECKING:
    import torch

Format = Literal["diffusers", "merged", "lora", "comfyui", "kohya"]
FITTING: dict[str, tuple[Format, ...]] = {
    "full fine-tuning": ("diffusers", "comfyui"),
    "a LoRA": ("lora", "merged", "comfyui", "kohya"),
}
"""What a stage trained -> the formats that it has, the default first."""
AUTOENCODERS = ("AutoencoderKL", "AutoencoderKLFlux2")
"""The classes of autoencoders that have a layout in a single file."""
FINISHED_ONLY = "only finished stages are exported; 'posttrain run' with its recipe goes on with it"


@dataclass(frozen=True)
class Trained:
    """What a finished stage wrote."""

    final: Path
    description: dict[str, Any]

    @property
    def kind(self) -> str:
        """A key of :data:`FITTING`."""
        return "a LoRA" if (self.final / LORA).is_file() else "full fine-tuning"

    @property
    def name(self) -> str:
        """``RUN-STAGE``, the name of a single file."""
        folders = [part for part in self.final.parts if part not in ("/", FINAL)]
        return "-".join(folders[-2:])

    def loras(self) -> tuple[list[Path], Path | None]:
        """The LoRA files, which add up, and the artifact below them; None if that is the base model."""
        folders = with_parents(self.final)
        whole = [i for i, folder in enumerate(folders) if not (folder / LORA).is_file()]
        below = folders[whole[-1]] if whole else None
        return [folder / LORA for folder in folders[whole[-1] + 1 if whole else 0 :]], below


def trained_at(source: str) -> Trained:
    """What the stage at ``source`` wrote: a run's folder, whose last stage it is, a stage's, or a ``final``.

    Raises ModelError where there is none, or it is not finished.
    """
    folder = Path(os.path.realpath(expanded(source)))
    if is_run(folder):
        stages = [row["name"] for row in read_object(folder / RUN, "stages")["stages"]][1:]
        done = [name for name in stages if (folder / name / FINAL).is_dir()]
        if not done or done[-1] != stages[-1]:
            hint = f"give one that is, such as {source}/{done[-1]}" if done else FINISHED_ONLY
            raise ModelError(f"the last stage of the run {source!r} is not finished: {hint}")
        folder /= stages[-1]
    if not folder.is_dir():
        raise ModelError(f"{source!r} does not exist: give the folder of a run or of a stage")
    if is_checkpoint(str(folder)):
        raise ModelError(f"{source!r} is a checkpoint: {FINISHED_ONLY}")
    final = weights_folder(folder)
    if saved(final / "checkpoints"):
        raise ModelError(f"the stage {source!r} is not finished: {FINISHED_ONLY}")
    if not (final / DESCRIPTION).is_file():
        raise ModelError(f"{source!r} is neither a run nor a finished stage: it holds no {DESCRIPTION}")
    description = described(final)
    if (kind := description.get("format")) in ("comfyui", "kohya"):
        raise ModelError(
            f"{source!r} is an export as {kind}, which is read by other tools: give the stage's folder"
        )
    return Trained(final, description)


def export(
    trained: Trained,
    target: Path,
    kind: Format | None = None,
    dtype: DtypeName | None = None,
    *,
    overwrite: bool = False,
) -> Format:
    """Write what was ``trained`` to the folder ``target``, and return the format.

    ``kind``: by default a diffusers folder, or a LoRA. ``dtype``: by default that of the stage's ``final``,
    or for a merged LoRA that of an export of its base. With ``overwrite`` an earlier export is replaced.
    Raises ModelError for a format that does not fit, PosttrainError where ``target`` holds something.
    """
    fitting = FITTING[trained.kind]
    kind = kind or fitting[0]
    if kind not in fitting:
        raise ModelError(
            f"format {kind!r} does not fit: {str(trained.final)!r} is {trained.kind}, which has the formats "
            f"{', '.join(fitting)}"
        )
    _refuse_to_lose(target, overwrite)
    target = Path(os.path.realpath(target))  # a link stays, and leads to the export
    write = {"diffusers": _pipeline, "merged": _pipeline, "lora": _lora, "comfyui": _comfyui, "kohya": _kohya}
    writer: Callable[[Trained, Path, DtypeName | None], DtypeName] = write[kind]
    with published(target) as folder:
        used = writer(trained, folder, dtype)
        adapter = trained.kind == "a LoRA" and kind != "merged"
        below = trained.loras()[1] if adapter else None
        parents = [] if below is None else [str(below.resolve())]
        described_anew = {**trained.description, "parents": parents, "dtype": used, "format": kind}
        (folder / DESCRIPTION).write_text(json.dumps(described_anew, indent=2), "utf-8")
        _add_card(trained, folder, kind, dtype)
    return kind


def _add_card(trained: Trained, folder: Path, kind: Format, dtype: DtypeName | None) -> None:
    """Write the model card of the export in ``folder``. Where its run is gone, or the stage's folder has
    another name than its recipe says, it is that of ``final``."""
    stage = trained.final.parent
    if (stage / RECIPE).is_file():
        files = [path.name for path in folder.glob("*.safetensors")]
        file = files[0] if len(files) == 1 else ""
        with contextlib.suppress(RecipeError):
            card = card_text(stage.parent, stage.name, kind, file, dtype or "")
            (folder / README).write_text(card, "utf-8")
    for name in (README, GRID):
        if (trained.final / name).is_file() and not (folder / name).exists():
            copy(trained.final / name, folder / name)


def _refuse_to_lose(target: Path, overwrite: bool) -> None:
    """Raise PosttrainError if ``target`` holds something that an export would replace without being asked."""
    if (problem := in_the_way(target)) is not None:
        raise PosttrainError(f"--to: {problem}")
    if target.is_dir() and target.samefile("."):
        raise PosttrainError(
            f"--to: {str(target)!r} is the current folder, and would be replaced: give another one"
        )
    if target.is_dir() and (there := [path.name for path in target.iterdir()]):
        if DESCRIPTION not in there or "format" not in described(target):  # a stage's own has none
            holds = f"{str(target)!r} holds {counted(len(there), 'file')}, and no export"
            raise PosttrainError(f"{holds}, so it is not overwritten: give another folder")
        if not overwrite:
            raise PosttrainError(f"{str(target)!r} holds an export: give another folder, or --overwrite")


def _pipeline(trained: Trained, folder: Path, dtype: DtypeName | None) -> DtypeName:
    """A folder that diffusers loads: that of the stage, or the whole model in another precision."""
    import torch

    own: DtypeName = trained.description["dtype"]
    if trained.kind == "full fine-tuning" and dtype in (None, own):
        for file in (f for f in sorted(trained.final.rglob("*")) if f.is_file()):
            (place := folder / file.relative_to(trained.final)).parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                file_header(file)  # or ModelError, for one that was cut off
            copy(file, place)
        return own
    used = dtype or spec_of(trained.final).export_dtype()
    open_exact(trained.final, torch.device("cpu")).save(folder, used, {})
    return used


def _lora(trained: Trained, folder: Path, dtype: DtypeName | None) -> DtypeName:
    write_joined(trained.loras()[0], folder / LORA, _torch(dtype))
    return dtype or "fp32"


def _kohya(trained: Trained, folder: Path, dtype: DtypeName | None) -> DtypeName:
    layout = _layout(trained, "kohya")
    file = folder / f"{trained.name}-kohya.safetensors"
    write_kohya(trained.loras()[0], file, layout, _torch(dtype))
    return dtype or "fp32"


def _comfyui(trained: Trained, folder: Path, dtype: DtypeName | None) -> DtypeName:
    """A LoRA as it is, or the transformer and the autoencoder in one file, in the layout of their authors."""
    if not (spec := spec_of(trained.final)).in_comfyui:
        raise ModelError(
            f"format 'comfyui' does not fit: ComfyUI itself cannot draw with a {spec.type} model"
        )
    file = folder / f"{trained.name}.safetensors"
    if trained.kind == "a LoRA":
        write_joined(trained.loras()[0], file, _torch(dtype))
        return dtype or "fp32"
    layout, used = _layout(trained, "comfyui"), dtype or trained.description["dtype"]
    if (vae := listed(index_in(trained.final))["vae"][1]) not in AUTOENCODERS:
        raise ModelError(f"format 'comfyui' does not fit: no layout of a single file is known for a {vae}")
    entries = _placed(exact(trained.final) / "transformer", layout.transformer, layout.transformer_prefix)
    entries |= _placed(trained.final / "vae", layout.autoencoder, layout.autoencoder_prefix)
    write_tensors(file, entries, _torch(used))
    return used


def _placed(folder: Path, places: Callable[..., Any], prefix: str) -> dict[str, Entry]:
    entries = entries_in(component_weights(folder))
    return placed(entries, places(entries), prefix)


def _layout(trained: Trained, kind: Format) -> SingleFile:
    """The single-file layout of the trained model. Raises ModelError if it is unknown."""
    spec = spec_of(trained.final)
    if (trained.final / INDEX).is_file():
        spec = spec.model_copy(update={"path": str(trained.final)})
    if (layout := spec.single_file()) is None:
        model = spec.model_dump().get("path", spec.type)
        raise ModelError(f"format {kind!r} does not fit: no layout of a single file is known for {model!r}")
    return layout


def _torch(dtype: DtypeName | None) -> torch.dtype | None:
    return None if dtype is None else torch_dtype(dtype)
