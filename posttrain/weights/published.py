"""Where do a reward's published weights come from, and are they on this machine?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import RewardError
from posttrain.support.paths import is_path


@dataclass(frozen=True)
class Weights:
    """Files of a model hub's repository; a reward's field names the repository, or a local copy."""

    files: tuple[str, ...]
    """Names or patterns, relative to the repository; each must be there."""
    size: int
    """Bytes to download, about."""
    licence: str

    def local(self, source: str) -> Path | None:
        """The folder, or the one file, that ``source`` names on this machine; None if it is not there.

        ``source`` is a folder, a file where there is but one, or a repository that was fetched before.
        """
        given = Path(source).expanduser()
        if given.is_file() and len(self.files) == 1:
            return given
        folder = given if given.is_dir() else _cached(source, self.files)
        if folder is None or any(next(folder.glob(pattern), None) is None for pattern in self.files):
            return None
        return folder / self.files[0] if len(self.files) == 1 else folder

    def located(self, source: str) -> Path:
        """As :meth:`local`, fetched from the hub where it is not there. Raises RewardError."""
        if (found := self.local(source)) is not None:
            return found
        if is_path(source, hub=True):
            raise RewardError(f"{source!r} is no folder with {', '.join(self.files)}")
        return self.fetch(source)

    def fetch(self, repo: str) -> Path:
        """As :meth:`located` of a repository, its files downloaded where need be and checked by their hash.
        Raises RewardError."""
        from posttrain.weights.hub import fetch

        folder = fetch(repo, self.files)
        return folder / self.files[0] if len(self.files) == 1 else folder

    def hashes(self, found: Path) -> dict[str, str]:
        """File -> SHA-256, of what :meth:`located` found."""
        from posttrain.weights.hub import sha256

        if found.is_file():
            return {self.files[0]: sha256(found)}
        files = (file for pattern in self.files for file in sorted(found.glob(pattern)))
        return {file.relative_to(found).as_posix(): sha256(file) for file in files}


def _cached(repo: str, files: tuple[str, ...]) -> Path | None:
    from huggingface_hub import snapshot_download

    if is_path(repo, hub=True):
        return None
    try:
        return Path(snapshot_download(repo, allow_patterns=list(files), local_files_only=True))
    except (OSError, ValueError):
        return None
