"""Texts that are kept in the folder of Inductor's cache, and that ``torch.compiler.save_cache_artifacts`` takes along.

To load what it took, gradprune has to have been imported: torch asks what kinds of artifacts there are.
"""

from __future__ import annotations

from pathlib import Path

from torch._inductor.codecache import write_atomic
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.compiler._cache import CacheArtifact, CacheArtifactFactory, CacheArtifactManager

KIND = "gradprune"


@CacheArtifactFactory.register
class _StoredStep(CacheArtifact):
    def populate_cache(self) -> None:
        _write(self.key, self.content.decode())

    @staticmethod
    def type() -> str:
        return KIND


def path_of(key: str) -> Path:
    """Where the text called ``key`` is."""
    return Path(cache_dir()) / KIND / "steps" / f"{key}.json"


def store(key: str, text: str) -> None:
    """Keep a text for later processes."""
    _write(key, text)
    CacheArtifactManager.record_artifact(KIND, key, text.encode())


def find(key: str) -> str | None:
    """The text that was kept, ``None`` if none was."""
    try:
        text = path_of(key).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    CacheArtifactManager.record_artifact(KIND, key, text.encode())
    return text


def forget(key: str) -> None:
    """Keep it no longer."""
    path_of(key).unlink(missing_ok=True)


def _write(key: str, text: str) -> None:
    write_atomic(str(path_of(key)), text, make_dirs=True)
