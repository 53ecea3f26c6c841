"""Runs Hugging Face's loaders without their output, and turns what they raise into one ModelError."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from posttrain.errors import ModelError
from posttrain.weights.pipeline_folder import local_folder


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn any exception raised while ``path`` is loaded into a ModelError that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{path!r} is gated: accept its licence on its hub page and log in with `hf auth login`, "
            "or give the path of a local folder"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{path!r} is no folder here, and the hub knows no model of that name that you may read: check "
            "the spelling, log in with `hf auth login` if it is private or gated, or give a folder's path"
        ) from error
    except ModelError:
        raise
    except Exception as error:
        from_hub = local_folder(path) is None and not Path(path).exists()
        advice = (
            f". {path!r} is no folder here, so it was looked for on the hub. If the hub cannot be reached, "
            "or the model is gated (accept its licence, then `hf auth login`), give a local folder's path"
        )
        lines = (str(error).strip() or type(error).__name__).splitlines()
        # torch and json put what is wrong below a heading
        reason = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
        if from_hub:
            # the library points to a traceback, which a person does not see
            reason = reason.partition(" Please check out the root cause")[0].rstrip(".")
        raise ModelError(f"cannot load {path!r}: {reason}{advice if from_hub else ''}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and messages of diffusers and transformers; errors still raise."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = [diffusers_logging, transformers_logging]
    levels = [module.get_verbosity() for module in loggers]
    for module in loggers:
        module.set_verbosity(logging.CRITICAL)  # what is an error is raised as well
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # newer versions of diffusers prefer dtype, but only torch_dtype works in every version
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            # adapters are stacked on purpose
            warnings.filterwarnings("ignore", message="Already found a `peft_config`", category=UserWarning)
            # posttrain.weights.adapter accounts for all weights of an adapter
            warnings.filterwarnings("ignore", message="While injecting the PEFT", category=RuntimeWarning)
            yield
    finally:
        for module, level in zip(loggers, levels, strict=True):
            module.set_verbosity(level)
