"""Uploads an export to a model hub."""

from __future__ import annotations

from pathlib import Path

from posttrain.errors import PosttrainError
from posttrain.stages.lineage import DESCRIPTION

SHARDS = ["*-of-?????.safetensors", "*.safetensors.index.json"]
"""What is removed of an earlier upload, unless it is written again: diffusers loads old shards in preference
to a new file beside them."""


def push(folder: Path, repo: str, *, private: bool, overwrite: bool) -> str:
    """Upload the export in ``folder`` to the hub repository ``repo``, and return its address.

    It is made anew; with ``overwrite`` it may be there, and gets another commit, without the shards of an
    earlier export. posttrain's own description, which names folders of this machine, stays here. Raises
    PosttrainError where the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=overwrite, repo_type="model")
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message="posttrain export",
            ignore_patterns=[DESCRIPTION],
            delete_patterns=SHARDS if overwrite else None,
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = {
            401: "log in with `hf auth login`",
            403: "your token may not write there: log in with `hf auth login`",
            409: "it exists: give another name, or --overwrite",
        }.get(status or 0, str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        raise PosttrainError(
            f"--push-to-hub {repo}: {advice}; the export is complete in {str(folder)!r}"
        ) from error
    return str(made)
