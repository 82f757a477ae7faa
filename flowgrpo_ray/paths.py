"""What a path in a spec names: a file of this package, a local file or folder, or a hub id."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent
BUILTIN = "builtin:"


def builtin_path(path: str) -> Path | None:
    """``builtin:x`` names the file or folder ``x`` of the package's assets; else ``None``."""
    if not path.startswith(BUILTIN):
        return None
    return PACKAGE / "assets" / path.removeprefix(BUILTIN)


def local_path(path: str) -> Path | None:
    """The file or folder that ``path`` names, there or not; ``None`` for a hub id, owner/name."""
    builtin = builtin_path(path)
    if builtin is not None:
        return builtin
    local = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    return local if local.exists() or looks_local else None
