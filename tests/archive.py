"""The archive that the Comfy registry gets: what Git tracks, without what .comfyignore names (comfy-cli's ``zip_files``)."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def archived(repo: Path = REPO) -> list[str]:
    """The files of the archive, by their path from the repository's root.

    comfy-cli reads the patterns as Git does those of .gitignore ("gitwildmatch", pathspec's old name for it), strips them and
    skips empty lines and comments.
    """
    from pathspec import GitIgnoreSpec

    lines = (repo / ".comfyignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    ignored = GitIgnoreSpec.from_lines(patterns)
    tracked = subprocess.check_output(["git", "-C", str(repo), "ls-files", "-z"], text=True, encoding="utf-8").split("\0")
    return [name for name in tracked if name and (repo / name).is_file() and not ignored.match_file(name)]


def pack(target: Path, repo: Path = REPO) -> Path:
    """Write the archive to ``target``."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in archived(repo):
            archive.write(repo / name, name)
    return target


def unpack(archive: Path, folder: Path) -> Path:
    """Extract an archive into a new folder, as ComfyUI-Manager does."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    return folder
