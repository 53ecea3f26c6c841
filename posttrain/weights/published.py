"""Describes published weights, finds them on this machine, and fetches them from a model hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import RewardError
from posttrain.support.paths import expanded, is_file, is_folder, is_path
from posttrain.weights.fingerprints import prints_of


@dataclass(frozen=True)
class Weights:
    """Weight files in a repository of a model hub.

    A field of a reward names the repository or a local copy; its value is called ``source`` below.
    """

    files: tuple[str, ...]
    """File names or patterns, relative to the repository; each must match a file."""
    size: int
    """Approximate download size in bytes."""
    licence: str

    def local(self, source: str) -> Path | None:
        """The folder that ``source`` names on this machine, or the file if :attr:`files` has only one.

        ``source`` is a folder, a file (if one is needed), or a repository that was fetched before. None if
        a file is missing.
        """
        given = expanded(source)
        if is_file(given) and len(self.files) == 1:
            return given
        folder = given if is_folder(given) else _cached(source, self.files)
        if folder is None or any(next(folder.glob(pattern), None) is None for pattern in self.files):
            return None
        return folder / self.files[0] if len(self.files) == 1 else folder

    def located(self, source: str) -> Path:
        """As :meth:`local`, but fetch from the hub what is not on this machine. Raises RewardError."""
        if (path := self.local(source)) is not None:
            return path
        if is_path(source, hub=True):
            raise RewardError(f"{source!r} is no folder with {', '.join(self.files)}")
        return self.fetch(source)

    def fetch(self, repo: str) -> Path:
        """Download the files of ``repo`` that are not on this machine, and check the hash of every file.

        Returns the folder, or the file if :attr:`files` has only one. Raises RewardError.
        """
        from posttrain.weights.hub import fetch

        folder = fetch(repo, self.files)
        return folder / self.files[0] if len(self.files) == 1 else folder

    def hashes(self, path: Path) -> dict[str, str]:
        """File name -> SHA-256 of each file at ``path``, which :meth:`located` returned."""
        return {name: kept["sha256"] for name, kept in prints_of(self.paths(path)).items()}

    def paths(self, path: Path) -> dict[str, Path]:
        """File name -> file of each file at ``path``, which :meth:`located` returned."""
        if path.is_file():
            return {self.files[0]: path}
        files = (file for pattern in self.files for file in sorted(path.glob(pattern)))
        return {file.relative_to(path).as_posix(): file for file in files}


def _cached(repo: str, files: tuple[str, ...]) -> Path | None:
    from huggingface_hub import snapshot_download

    if is_path(repo, hub=True):
        return None
    try:
        return Path(snapshot_download(repo, allow_patterns=list(files), local_files_only=True))
    except (OSError, ValueError):
        return None
