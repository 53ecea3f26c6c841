"""Sends a stage's metrics to a tracking service, such as Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import DamagedError, TrainingError
from posttrain.support.files import write
from posttrain.support.records import read_object
from posttrain.support.wording import without_logins

if TYPE_CHECKING:
    from PIL.Image import Image

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""The services, by the names that accelerate gives them -> the package that each needs."""
FILE = "tracker.json"
"""In a stage's folder: the service's own name of its curves, so that a resumed stage goes on with them."""


@dataclass(frozen=True)
class Labels:
    """How a service names what it shows."""

    project: str
    """The name of the recipe."""
    run: str
    """The run's folder and the stage."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The stage's settings, by path."""


def service_problem(name: str) -> str | None:
    """Why the tracker ``name`` of a recipe cannot be used here; None if it can."""
    package = PACKAGES.get(name)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"{name} needs the package {package!r}, which this install lacks: pip install {package}"


class Service:
    """The curves of one stage in a tracking service.

    A service that fails while the stage trains is left out from then on, and the user is told:
    ``metrics.jsonl`` has all rows.
    """

    def __init__(self, name: str, folder: Path, labels: Labels, tell: Callable[[str], None]) -> None:
        """Start or go on with the curves of the stage in ``folder``. Raises TrainingError if the service does
        not start."""
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's log messages need it
        self.name, self.tell = name, tell
        before = _identity(folder)
        try:
            self.tracker: Any = LOGGER_TYPE_TO_CLASS[name](**_arguments(name, folder, labels, before))
            self.tracker.main_process_only = False  # only the main process makes one
            self.tracker.start()
            if before is None:
                self.tracker.store_init_configuration(dict(labels.config))
        except Exception as error:  # whatever the service's package raises
            hint = "; WANDB_MODE=offline in the environment needs no network" if name == "wandb" else ""
            raise TrainingError(f"tracker: {name} does not start: {error}{hint}") from error
        if (identity := self._own_identity()) != before and identity is not None:
            write(folder / FILE, json.dumps({"id": identity}))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the ``metrics`` of ``step``."""
        self._send("log", {name: float(value) for name, value in metrics.items()}, step=step)

    def image(self, name: str, step: int, image: Image) -> None:
        """Send a picture, if the service takes pictures."""
        if hasattr(self.tracker, "log_images"):
            self._send("log_images", {name: [image]}, step=step)

    def close(self) -> None:
        """Send what is left, and end the service's own processes."""
        self._send("finish")

    def _send(self, method: str, *values: Any, **options: Any) -> None:
        if self.tracker is None:
            return
        try:
            getattr(self.tracker, method)(*values, **options)
        except Exception as error:
            self.tracker = None
            line = f"tracker: {self.name} failed and is left out from now on: {error}"
            self.tell(f"{line}. metrics.jsonl has all rows")

    def _own_identity(self) -> str | None:
        """What the service calls these curves."""
        run = getattr(self.tracker, "tracker", None)
        info = getattr(run, "info", None)  # mlflow
        return getattr(info, "run_id", None) or getattr(run, "id", None)


def _arguments(name: str, folder: Path, labels: Labels, before: str | None) -> dict[str, Any]:
    """What accelerate's class for the service is called with; ``before`` is what the service called the
    curves."""
    if name == "mlflow":
        return {"experiment_name": labels.project, "run_name": labels.run, "run_id": before}
    arguments: dict[str, Any] = {"run_name": labels.project, "name": labels.run}
    if name == "wandb":
        identity = before or secrets.token_hex(4)
        arguments |= {"id": identity, "resume": "allow", "dir": str(folder)}
    elif before is not None:
        arguments["resume"] = "allow"  # trackio knows a run by its name
    return arguments


def _identity(folder: Path) -> str | None:
    """What the service called the curves when the stage was begun; None if it is not known."""
    try:
        identity = read_object(folder / FILE, "id")["id"]
    except DamagedError:
        return None
    return identity if isinstance(identity, str) else None


def flat(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested blocks by path, such as ``train.steps``; lists become text, and no text has a
    password in an address."""
    values: dict[str, Any] = {}
    for name, value in block.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.")
        else:
            is_text = not isinstance(value, int | float | None)
            values[f"{prefix}{name}"] = without_logins(str(value)) if is_text else value
    return values
