"""What brings up rewards and clusters: `deployments/` and `cluster_configs/`, in the wheel too."""

from __future__ import annotations

import shutil
from pathlib import Path

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.files import check_place
from flowgrpo_ray.common.paths import PACKAGE

FOLDERS = ("deployments", "cluster_configs")
IN_WHEEL = PACKAGE / "configs"  # where pyproject.toml puts them


def sources() -> dict[Path, Path]:
    """Each file by its path below a folder that they are written to, as `deployments/ocr.yaml`."""
    root = IN_WHEEL if IN_WHEEL.is_dir() else PACKAGE.parent  # else it runs from a checkout
    found = (path for folder in FOLDERS for path in sorted((root / folder).rglob("*")))
    files = (path for path in found if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(root): path for path in files}


def write_configs(folder: Path, *, overwrite: bool) -> list[Path]:
    """Write all of them below `folder`; nothing, and ``SpecError``, if one is there already."""
    files = {folder / place: source for place, source in sources().items()}
    there = [path for path in files if path.exists()]
    if wrong := [path for path in there if not (overwrite and path.is_file())]:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise SpecError(f"{wrong[0]}{more} exist; give another folder, or --overwrite for files")
    for path in files:
        check_place(path, str(path))
    for path, source in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
    return list(files)
