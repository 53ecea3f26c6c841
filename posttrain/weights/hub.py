"""How do files of a model hub's repository come here: resumed where they were cut off, and checked by hash?

huggingface_hub drops the part of a file that it has when a download fails; here it stays, under the name of
its hash, until a later call has the rest. Files lie in huggingface_hub's own cache, so its other users find
them too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import RewardError
from posttrain.support.files import locked, publish

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

BLOCK = 1 << 20


def fetch(repo: str, patterns: Sequence[str], endpoint: str | None = None) -> Path:
    """The folder with the files of ``repo`` that match ``patterns``, every one as the hub's hash says.

    Files that are here already are checked too. Raises RewardError where the hub cannot be reached or has
    not every file, and, after deleting it, for a file with another hash.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi(endpoint=endpoint).model_info(repo, revision="main", files_metadata=True)
        files = _wanted(repo, info.siblings or [], patterns)
        for file in files:
            _download(repo, file, str(info.sha), endpoint)
        names = [file.rfilename for file in files]
        folder = Path(snapshot_download(repo, allow_patterns=names, endpoint=endpoint))
    except RewardError:
        raise
    except Exception as error:  # of the hub's client, and of the HTTP library that its version happens to use
        words = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise RewardError(f"cannot fetch {', '.join(patterns)} of {repo!r} from the hub: {words}") from error
    if folder.name != info.sha:
        raise RewardError(f"{repo!r} changed on the hub while it was fetched; fetch it again")
    for file in files:
        _check(repo, file, folder / file.rfilename)
    return folder


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _wanted(repo: str, siblings: Sequence[RepoSibling], patterns: Sequence[str]) -> list[RepoSibling]:
    from huggingface_hub.utils import filter_repo_objects

    found: dict[str, RepoSibling] = {}
    for pattern in patterns:
        matching = list(filter_repo_objects(siblings, allow_patterns=[pattern], key=lambda s: s.rfilename))
        if not matching:
            raise RewardError(f"the hub's {repo!r} has no {pattern}")
        found |= {file.rfilename: file for file in matching}
    return list(found.values())


def _download(repo: str, file: RepoSibling, commit: str, endpoint: str | None) -> None:
    """Put ``file`` into the cache's blobs, where snapshot_download finds it under its hash."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import build_hf_headers

    cache, name = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=repo, repo_type="model")
    blob = cache / name / "blobs" / _hash(file)
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(f"{blob.name}.part")
    # the lock that huggingface_hub takes: other processes may want the same file at once
    with locked(cache / ".locks" / name / f"{blob.name}.lock"):
        if blob.exists():
            return
        with part.open("ab") as handle:
            if file.size is not None and handle.tell() > file.size:
                handle.truncate(0)
            handle.seek(0, os.SEEK_END)
            http_get(
                hf_hub_url(repo, file.rfilename, revision=commit, endpoint=endpoint),
                handle,
                resume_size=handle.tell(),
                headers=build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.rfilename,
            )
        _check(repo, file, part)
        publish(part, blob)


def _hash(file: RepoSibling) -> str:
    """What the hub calls the content: the SHA-256 of a large file, git's SHA-1 of a small one."""
    name = file.lfs.sha256 if file.lfs is not None else file.blob_id
    if name is None:
        raise RewardError(f"the hub gives no hash for {file.rfilename!r}, so it cannot be checked")
    return name


def _check(repo: str, file: RepoSibling, path: Path) -> None:
    expected = _hash(file)
    found = sha256(path) if file.lfs is not None else _git_sha1(path)
    if found != expected:
        size = path.stat().st_size
        path.resolve().unlink()
        path.unlink(missing_ok=True)  # the link to it
        raise RewardError(
            f"{file.rfilename} of {repo!r} is damaged and was deleted: its hash is {found}, the hub's is "
            f"{expected} ({size} bytes, the hub has {file.size}). Fetch it again"
        )


def _git_sha1(path: Path) -> str:
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as handle:
        while block := handle.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
