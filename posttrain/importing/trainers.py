"""Lists the trainers that can be translated, and translates a user's words into a recipe and an account."""

from __future__ import annotations

import re
from collections.abc import Sequence

from posttrain.errors import PosttrainError
from posttrain.importing import diffusion_nft, flow_factory, flow_grpo, hy_soar, launcher, simpletuner
from posttrain.importing.account import Translation, checked
from posttrain.importing.draft import Draft
from posttrain.importing.flags import Settings
from posttrain.importing.reading import read
from posttrain.importing.trainer import Trainer
from posttrain.support.spelling import meant

TRAINERS = {
    "hy-soar": hy_soar.TRAINER,
    "flow-grpo": flow_grpo.TRAINER,
    "diffusion-nft": diffusion_nft.TRAINER,
    "flow-factory": flow_factory.TRAINER,
    "simpletuner": simpletuner.TRAINER,
}


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
    start, launched = read(trainer, settings, words, processes)
    _refuse_unknown(settings, lenient)
    draft = Draft(settings)
    trainer.build(settings, draft, start)
    _refuse_unknown(settings, lenient)  # parts of a value, which only the trainer knows
    launcher.tell(launched, draft)
    heading = (
        f"Translated from {trainer.title} ({start.file or 'its command line'}) by posttrain import-flags.\n"
        "A comment names the flag that a field comes from. What has no counterpart was listed when it was\n"
        "translated: run it again to see it."
    )
    return checked(draft, draft.yaml(heading))


def _refuse_unknown(settings: Settings, lenient: bool) -> None:
    """Raise PosttrainError that names the unknown flags, unless ``lenient``."""
    if settings.unknown and not lenient:
        lines = "\n".join(f"  {line}" for line in settings.hints())
        raise PosttrainError(
            f"{settings.trainer} has no such flag that posttrain knows:\n{lines}\n"
            "Correct it, or leave what it does out with --ignore-unknown"
        )
