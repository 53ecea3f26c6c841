"""The trainers that can be translated: from the words of a command to a recipe and an account."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError, RecipeError
from posttrain.importing import diffusion_nft, flow_factory, flow_grpo, hy_soar, launcher, simpletuner
from posttrain.importing.command_line import CommandLine, from_script, parsed
from posttrain.importing.config_file import ConfigFile
from posttrain.importing.draft import Draft, value_of
from posttrain.importing.flags import BARE, Flag, Settings
from posttrain.importing.published import DIFFUSION_NFT, FLOW_GRPO, Published
from posttrain.recipe.checks import machine_problems
from posttrain.recipe.file import parse_recipe
from posttrain.recipe.positions import parse, read_file
from posttrain.support.spelling import meant

ENDINGS = (".sh", ".bash", ".yaml", ".yml", ".json", ".env", ".txt")
Build = Callable[[Settings, Draft, str, "int | None"], None]


@dataclass(frozen=True)
class Trainer:
    """Another trainer: its flags, and what makes a recipe of them."""

    title: str
    prefix: str
    scripts: re.Pattern[str]
    table: Mapping[str, Flag]
    build: Build
    published: Mapping[str, Published] = field(default_factory=dict)


TRAINERS = {
    "hy-soar": Trainer("HY-SOAR", hy_soar.PREFIX, hy_soar.SCRIPTS, hy_soar.TABLE, hy_soar.build),
    "flow-grpo": Trainer(
        "flow_grpo", flow_grpo.PREFIX, flow_grpo.SCRIPTS, flow_grpo.TABLE, flow_grpo.build, FLOW_GRPO
    ),
    "diffusion-nft": Trainer(
        "DiffusionNFT", diffusion_nft.PREFIX, diffusion_nft.SCRIPTS, diffusion_nft.TABLE, diffusion_nft.build,
        DIFFUSION_NFT,
    ),
    "flow-factory": Trainer(
        "Flow-Factory", flow_factory.PREFIX, flow_factory.SCRIPTS, flow_factory.TABLE, flow_factory.build
    ),
    "simpletuner": Trainer(
        "SimpleTuner", simpletuner.PREFIX, simpletuner.SCRIPTS, simpletuner.TABLE, simpletuner.build
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Translation:
    """A recipe, and what became of each flag: (flag with its value, what became of it)."""

    text: str
    translated: list[tuple[str, str]]
    idle: list[tuple[str, str]]
    lost: list[tuple[str, str]]
    differs: list[str]
    unknown: list[str]
    yours: list[str]
    """What ``posttrain check`` still misses on this machine, such as files of data."""


def trainer_named(name: str) -> Trainer:
    """The trainer ``name``; case and separators do not matter. Raises PosttrainError."""
    plain = {re.sub(r"\W|_", "", known): known for known in TRAINERS}
    if (known := plain.get(re.sub(r"\W|_", "", name.lower()))) is None:
        raise PosttrainError(f"no trainer {name!r}{meant(name, TRAINERS)}; there are {', '.join(TRAINERS)}")
    return TRAINERS[known]


def translate(
    name: str, words: Sequence[str], processes: int | None = None, *, lenient: bool = False
) -> Translation:
    """The recipe of a command or configuration of the trainer ``name``.

    ``words`` are a file, flags, a whole command, or a file and flags that override it. ``processes`` is their
    number, if the words do not say it. Unknown flags are an error, unless ``lenient``. Raises PosttrainError.
    """
    trainer = trainer_named(name)
    settings = Settings(trainer.title, trainer.prefix, trainer.table)
    file, rest = _file_and_flags(words)
    command, count = _read(trainer, settings, file, rest)
    if trainer.title == "Flow-Factory":
        flow_factory.note_unknown(settings)
    if settings.unknown and not lenient:
        lines = "\n".join(f"  {line}" for line in settings.hints())
        raise PosttrainError(
            f"{trainer.title} has no such flag that posttrain knows:\n{lines}\n"
            "Correct it, or leave what it does out with --ignore-unknown"
        )
    if processes and command.processes and processes != command.processes:
        words = f"but its launcher starts {command.processes}: leave one out"
        raise PosttrainError(f"--processes {processes}, {words}")
    draft = Draft(settings)
    build = trainer.build
    if trainer.title == "SimpleTuner":
        build = partial(simpletuner.build, near=file)
    build(settings, draft, command.script, processes or command.processes or count)
    launcher.tell(command.launcher, draft)
    source = " ".join([str(file)] if file else []) or "its command line"
    heading = (
        f"Translated from {trainer.title} ({source}) by posttrain import-flags. A comment names "
        f"the flag that a\n"
        "field comes from. What has no counterpart was listed when it was translated: run it again to see it."
    )
    return _checked(draft, draft.yaml(heading))


def _read(
    trainer: Trainer, settings: Settings, file: Path | None, rest: Sequence[str]
) -> tuple[CommandLine, int | None]:
    """Give the settings their values; returns the command, and a configuration's number of GPUs."""
    if file is not None and not _reads(trainer, file):
        raise PosttrainError(
            f"{trainer.title} has no {file.suffix} file that import-flags reads: {str(file)!r}"
        )
    count: int | None = None
    command = parsed(rest, trainer.title)
    if file is not None and file.suffix in (".yaml", ".yml"):
        data = parse(read_file(file), str(file)).data
        _give(settings, flow_factory.flattened(data).items())
    elif file is not None and file.suffix == ".json":
        _give(settings, simpletuner.from_json(read_file(file), str(file)))
    elif file is not None and ".py" not in file.name:
        script = from_script(read_file(file), str(file), trainer.title, trainer.scripts)
        if trainer.title == "SimpleTuner":
            _give(settings, simpletuner.from_environment(script.variables))
        elif not script.flags:
            raise PosttrainError(f"{file} has no command of {trainer.title}")
        command = CommandLine(
            [*script.flags, *command.flags],
            command.script or script.script,
            command.processes or script.processes,
            launcher={**script.launcher, **command.launcher},
        )
    pairs = list(command.flags)
    if trainer.published:
        pairs, count = _configured(trainer, settings, file, pairs)
    _give(settings, pairs)
    return command, count


def _reads(trainer: Trainer, file: Path) -> bool:
    """Whether a file of this ending can be the trainer's."""
    if ".py" in file.name:
        return bool(trainer.published)
    owners = {".yaml": "Flow-Factory", ".yml": "Flow-Factory", ".json": "SimpleTuner", ".env": "SimpleTuner"}
    return owners.get(file.suffix, trainer.title) == trainer.title and file.suffix not in (".toml", ".ini")


def _give(settings: Settings, pairs: Any) -> None:
    for name, value in pairs:
        settings.give(str(name), value)


def _configured(
    trainer: Trainer, settings: Settings, file: Path | None, pairs: list[tuple[str, object]]
) -> tuple[list[tuple[str, object]], int | None]:
    """Read the configuration ``FILE.py:NAME``; returns the flags that override it, and its number of GPUs."""
    if any(name == "config" and value is BARE for name, value in pairs):
        raise PosttrainError(f"{trainer.title}: --config needs a value, such as config/grpo.py:NAME")
    if file is not None and ".py" in file.name and any(name == "config" for name, _ in pairs):
        raise PosttrainError(f"{trainer.title}: give {str(file)!r} or --config, not both")
    named = [str(value) for name, value in pairs if name == "config"]
    place = named[-1] if named else str(file) if file is not None and ".py" in file.name else ""
    overrides = [(name.removeprefix("config."), value) for name, value in pairs if name != "config"]
    if not place:
        if not overrides:
            raise PosttrainError(f"{trainer.title}: give its configuration, such as config/grpo.py:NAME")
        return overrides, None
    path, _, name = place.rpartition(":") if ":" in place else (place, "", "")
    if Path(path).is_file():
        config = ConfigFile(Path(path))
        for key, value in config.values(name).items():
            settings.give(key, value) if key in config.set or not config.base else settings.default(
                key, value
            )
        return overrides, config.gpus
    if name not in trainer.published:
        known = ", ".join(trainer.published)
        raise PosttrainError(
            f"no file {path!r}, and {name!r} is no configuration that {trainer.title} has published"
            f"{meant(name, trainer.published)}: {known}"
        )
    gpus, values = trainer.published[name]
    _give(settings, values.items())
    return overrides, gpus


def _file_and_flags(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    if not words or words[0].startswith("-"):
        return None, list(words)
    first = Path(words[0])
    looks = first.suffix in ENDINGS or re.search(r"\.py(:\w+)?$", words[0]) is not None
    if len(words) == 1 or words[1].startswith("-"):
        if looks:
            if ".py" not in first.name and not first.is_file():
                raise PosttrainError(f"no file {words[0]!r}")
            return first, list(words[1:])
        if first.is_file():
            return first, list(words[1:])
    return None, list(words)


def _checked(draft: Draft, text: str) -> Translation:
    """The translation, whose recipe the reader has accepted. Raises RecipeError if it does not."""
    settings = draft.settings
    try:
        recipe = parse_recipe(text, "recipe", checks=False)
    except RecipeError as error:
        raise RecipeError(
            f"{settings.trainer}'s values give a recipe that posttrain "
            f"refuses:\n{_with_flags(str(error), text)}"
        ) from None
    yours = [f"{'.'.join(map(str, path))}: {words}" for path, words in machine_problems(recipe)]
    became = list(_became(draft))
    return Translation(
        text,
        [(flag, words) for kind, flag, words in became if kind == "translated"],
        [(flag, words) for kind, flag, words in became if kind == "idle"] + draft.more_idle,
        [(flag, words) for kind, flag, words in became if kind == "lost"] + draft.more_lost,
        draft.differs,
        list(settings.hints()),
        yours,
    )


def _with_flags(message: str, text: str) -> str:
    """``message``, with the flag beside each line of the recipe that it names."""
    lines = text.splitlines()

    def comment(match: re.Match[str]) -> str:
        _, _, flags = lines[int(match[1]) - 1].partition("  # ")
        return f"recipe:{match[1]} ({flags}): " if flags else match[0]

    return re.sub(r"^recipe:(\d+): ", comment, message, flags=re.M)


def _became(draft: Draft) -> Iterator[tuple[str, str, str]]:
    settings = draft.settings
    for name, value in settings.given.items():
        flag, shown = settings.table[name], f"{settings.spelled(name)}{value_of(value)}"
        if name in draft.fields:
            yield "translated", shown, ", ".join(draft.fields[name])
            if name in draft.lost:
                yield "lost", shown, draft.lost[name]
        elif name in draft.lost:
            yield "lost", shown, draft.lost[name]
        elif name in draft.idle or flag.idle:
            yield "idle", shown, draft.idle.get(name) or flag.idle
        elif value in flag.off:
            yield "idle", shown, "off, as here"
        else:
            yield "lost", shown, flag.nearest or "no field of the recipe comes from it"
