"""Downloads files of a model hub's repository, resumes what was cut off, and checks every file by its hash.

When a download fails, huggingface_hub deletes the part that has arrived. This module keeps it, under the name
of the file's hash, and a later call downloads the remainder. Files lie in huggingface_hub's own cache, so
other programs that use that cache find them too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import RewardError
from posttrain.support.files import locked, publish
from posttrain.weights.files import sha256

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

BLOCK_BYTES = 1 << 20


def fetch(repo: str, patterns: Sequence[str], endpoint: str | None = None) -> Path:
    """Download the files of ``repo`` that match ``patterns``; return the folder that holds them.

    Every file is checked against the hub's hash, also those downloaded before. Raises RewardError if the hub
    cannot be reached, if a pattern matches no file, or if a file has another hash; that file is deleted.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi(endpoint=endpoint).model_info(repo, revision="main", files_metadata=True)
        files = _matching(repo, info.siblings or [], patterns)
        for file in files:
            _download(repo, file, str(info.sha), endpoint)
        names = [file.rfilename for file in files]
        folder = Path(snapshot_download(repo, allow_patterns=names, endpoint=endpoint))
    except RewardError:
        raise
    except Exception as error:  # which HTTP library raises here depends on the version of huggingface_hub
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise RewardError(f"cannot fetch {', '.join(patterns)} of {repo!r} from the hub: {reason}") from error
    if folder.name != info.sha:
        raise RewardError(f"{repo!r} changed on the hub while it was fetched; fetch it again")
    for file in files:
        _check(repo, file, folder / file.rfilename)
    return folder


def _matching(repo: str, siblings: Sequence[RepoSibling], patterns: Sequence[str]) -> list[RepoSibling]:
    """The files among ``siblings`` that match a pattern. Raises RewardError for a pattern without a file."""
    from huggingface_hub.utils import filter_repo_objects

    by_name: dict[str, RepoSibling] = {}
    for pattern in patterns:
        files = list(filter_repo_objects(siblings, allow_patterns=[pattern], key=lambda s: s.rfilename))
        if not files:
            raise RewardError(f"the hub's {repo!r} has no {pattern}")
        by_name |= {file.rfilename: file for file in files}
    return list(by_name.values())


def _download(repo: str, file: RepoSibling, commit: str, endpoint: str | None) -> None:
    """Download ``file`` into the cache's blobs, where snapshot_download looks it up by its hash."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import build_hf_headers

    cache, name = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=repo, repo_type="model")
    blob = cache / name / "blobs" / _hub_hash(file)
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{blob.name}.part")
    # huggingface_hub takes the same lock, so its downloads and ours do not mix
    with locked(cache / ".locks" / name / f"{blob.name}.lock"):
        if blob.exists():
            return
        with partial.open("ab") as stream:
            if file.size is not None and stream.tell() > file.size:
                stream.truncate(0)
            stream.seek(0, os.SEEK_END)
            http_get(
                hf_hub_url(repo, file.rfilename, revision=commit, endpoint=endpoint),
                stream,
                resume_size=stream.tell(),
                headers=build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.rfilename,
            )
        _check(repo, file, partial)
        publish(partial, blob)


def _hub_hash(file: RepoSibling) -> str:
    """The hash that the hub gives for ``file``: SHA-256 if it is kept in git-lfs, else git's SHA-1."""
    expected = file.lfs.sha256 if file.lfs is not None else file.blob_id
    if expected is None:
        raise RewardError(f"the hub gives no hash for {file.rfilename!r}, so it cannot be checked")
    return expected


def _check(repo: str, file: RepoSibling, path: Path) -> None:
    """Delete the file at ``path`` and raise RewardError if its hash is not the hub's."""
    expected = _hub_hash(file)
    actual = sha256(path) if file.lfs is not None else _git_sha1(path)
    if actual != expected:
        size = path.stat().st_size
        path.resolve().unlink()
        path.unlink(missing_ok=True)  # in the snapshot folder, path is a link to the file
        raise RewardError(
            f"{file.rfilename} of {repo!r} is damaged and was deleted: its hash is {actual}, the hub's is "
            f"{expected} ({size} bytes, the hub has {file.size}). Fetch it again"
        )


def _git_sha1(path: Path) -> str:
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
