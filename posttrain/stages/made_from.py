"""Keeps in each stage's folder what the stage was made from, and notices what was replaced since.

``made_from.json`` has a print (:mod:`posttrain.weights.fingerprints`) of every file of the base model, of the
artifacts the stage starts from, of its rewards' networks and source, and of its data. Weights that were
replaced stop the run: the stage would go on from others than it began with, and be compared with a base that
is gone. Data, prompts and source may be replaced; the user is told, and the record keeps it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.source import BatchSource
from posttrain.engine.checkpoint_folder import saved
from posttrain.errors import DamagedError, PosttrainError
from posttrain.recipe.schema import BASE, Stage
from posttrain.stages.lineage import exact
from posttrain.stages.run import Run
from posttrain.stages.stage_run import StageRun
from posttrain.stages.stage_state import Note
from posttrain.support.files import write
from posttrain.support.records import read_object
from posttrain.weights.fingerprints import Prints, changed, named, prints_of

if TYPE_CHECKING:
    from posttrain.distributed.world import World

FILE, SET_ASIDE = "made_from.json", "made_from.damaged.json"
MADE = ("final/*", "stage.json", "evaluation/*.json")
"""What a stage's folder holds, beside checkpoints that can be used, once something was made from its weights.
Before, they may be replaced."""
REPLACED = {
    "base": "the base model was replaced",
    "parents": "the weights that it starts from were replaced",
    "rewards": "the weights of a reward were replaced",
}
WORDS = {"captions": "captions or other columns"}
"""What of the data has a print, in words, where it is not a file."""
Record = dict[str, Any]


def confirm_weights(
    run: Run, stage: Stage | None, parents: Sequence[Path] = (), *, evaluating: bool = False
) -> Prints:
    """Record the weights that ``stage``, or for None the base's evaluation, is made from.

    ``parents`` are the artifacts that it starts from. Where a stage is only evaluated, its rewards do not
    count. Every process calls it; the main one reads and writes. Returns the prints of the base's files.
    Raises PosttrainError where weights were replaced since the stage began, or are not the base of the run's
    others.
    """

    def confirmed() -> Prints:
        own = run.folder / (stage.name if stage else BASE)
        names = (BASE, *(s.name for s in run.recipe.stages))
        records = {name: read(run.folder / name, run.note) for name in names}
        before = records[own.name]
        known = next((r["base"] for r in (before, *records.values()) if r.get("base")), {})
        now: Record = {"base": prints_of(run.spec.weight_files(), known)}
        now["parents"] = _prints(
            {_relative(p, run.folder): _files_in(p) for p in parents}, before.get("parents")
        )
        if not evaluating:
            rewards = {reward.label: reward.weight_files() for reward in (stage.rewards if stage else ())}
            now["rewards"] = _prints(rewards, before.get("rewards"))
        for name, record in records.items():
            if was_begun(run.folder / name):
                kinds = now if name == own.name else ("base",)
                _refuse_other_weights(own.name, run.folder / name, {k: record.get(k) for k in kinds}, now)
        write_record(own, {**(before if was_begun(own) else {}), **now})
        return now["base"]

    return _by_main(confirmed, run.world)


def confirm_data(run: StageRun, source: BatchSource, start: int) -> None:
    """Record the data of the stage, which has taken ``start`` steps, and the source of its rewards, and tell
    the user of what was replaced.

    Every process calls it. Raises PosttrainError where a file cannot be read, or a reward cannot be loaded.
    """

    def confirmed() -> str | None:
        before = read(run.folder)
        now: Record = {**prints_of(source.files, before.get("data") or {})}
        now |= {name: {"sha256": digest} for name, digest in source.digests().items()}
        if source.contents is not None:
            now["images"] = source.contents
        code = _prints({r.label: r.source_files() for r in run.stage.rewards}, before.get("source"))
        parts = [*_replaced(before.get("data") or {}, now), *_other_source(before.get("source"), code)]
        line = None
        if start and parts:
            line = f"after step {start}: {' and '.join(parts)} changed since the stage began; it goes on"
            before.setdefault("changes", []).append(line)
        write_record(run.folder, {**before, "data": now, "source": code})
        return line

    if (line := _by_main(confirmed, run.world)) is not None:
        run.warn(f"{run.stage.name}: {line}")


def read(folder: Path, note: Note | None = None) -> Record:
    """The record in a stage's ``folder``, as far as it is whole. With ``note``, which is told, a damaged one
    is set aside."""
    if not (file := folder / FILE).exists():
        return {}
    kinds = {"base": dict, "parents": dict, "rewards": dict, "source": dict, "data": dict, "changes": list}
    try:
        found, damage = read_object(file), None
    except DamagedError as error:
        found, damage = {}, str(error)
    record = {name: value for name, value in found.items() if isinstance(value, kinds.get(name, ()))}
    if wrong := found.keys() - record.keys():
        damage = f"{str(file)!r} is damaged: {', '.join(sorted(map(repr, wrong)))} is not what was written"
    if damage is not None and note is not None:
        file.replace(file.with_name(SET_ASIDE))
        note(f"{damage}; it is now {SET_ASIDE!r}, and what was replaced before is not noticed")
    return record


def write_record(folder: Path, record: Record) -> None:
    """Write the record of the stage's ``folder``."""
    write(folder / FILE, json.dumps(record, indent=1))


def was_begun(folder: Path) -> bool:
    """Whether something was made in a stage's ``folder``, so that it may not be mixed with something else."""
    return bool(saved(folder / "checkpoints")) or any(any(folder.glob(pattern)) for pattern in MADE)


def _refuse_other_weights(stage: str, folder: Path, before: Record, now: Record) -> None:
    """Raise PosttrainError if weights that ``folder`` was made from, in ``before``, are others ``now``."""
    for kind, old in before.items():
        if old is not None and (names := changed(_flat(old), _flat(now[kind]))):
            raise PosttrainError(
                f"{stage}: {REPLACED[kind]} since {folder.name!r} was begun in {str(folder.parent)!r}: "
                f"{named(names)}. Put the old files back, give another --output or name, or begin it anew: "
                f"posttrain run RECIPE --fresh {folder.name}"
            )


def _flat(prints: Mapping[str, Any]) -> dict[str, Any]:
    """The prints of files by name, also where they are listed for each artifact or reward."""
    flat: dict[str, Any] = {}
    for name, value in prints.items():
        nested = isinstance(value, dict) and "sha256" not in value
        flat |= {f"{name}/{file}": kept for file, kept in value.items()} if nested else {name: value}
    return flat


def _prints(files: Mapping[str, Mapping[str, Path]], before: Record | None) -> Record:
    """Name -> the prints of the files of each thing that has files."""
    made = {name: prints_of(listed, (before or {}).get(name)) for name, listed in files.items()}
    return {name: prints for name, prints in made.items() if prints}


def _files_in(artifact: Path) -> dict[str, Path]:
    """The files from which a stage loads the weights of an artifact, by name."""
    kept = exact(artifact)
    folder = kept / "transformer" if (kept / "transformer").is_dir() else kept
    return {file.relative_to(kept).as_posix(): file for file in sorted(folder.glob("*.safetensors"))}


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _replaced(before: Record, now: Record) -> list[str]:
    """What of the data changed, in words."""
    parts = [
        WORDS.get(name, f"the file of {name}")
        for name in sorted({*before, *now} - {"images"})
        if changed(_only(before, name), _only(now, name))
    ]
    old, new = before.get("images"), now.get("images")
    if isinstance(old, dict) and isinstance(new, dict) and old != new:
        if old.get("sizes") != new["sizes"]:
            parts.append(
                f"images ({old.get('count')}, {old.get('bytes')} bytes; now {new['count']}, {new['bytes']})"
            )
        else:
            parts.append("times of images, though no size,")
    return parts


def _other_source(before: Record | None, now: Record) -> list[str]:
    """Which rewards are computed by other source, in words. A record of an earlier version does not say."""
    if before is None:
        return []
    return [
        f"the source of the reward {name!r}"
        for name in now.keys() & before.keys()
        if changed(before[name] if isinstance(before[name], dict) else {}, now[name])
    ]


def _only(record: Record, name: str) -> Record:
    return {name: record[name]} if name in record else {}


def _by_main(do: Callable[[], Any], world: World) -> Any:
    """What ``do`` returns in the main process, in all of them; what it raises there is raised in all."""
    outcome: tuple[Any, str | None] = (None, None)
    if world.is_main:
        try:
            outcome = do(), None
        except (PosttrainError, OSError) as error:
            outcome = None, str(error)
    result, problem = world.broadcast(outcome)
    if problem is not None:
        raise PosttrainError(problem)
    return result
