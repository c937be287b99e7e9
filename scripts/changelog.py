"""Print what CHANGELOG.md says about a version, for the registry: ``python3 scripts/changelog.py [version]``.

The version is pyproject.toml's unless it is given.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def current_version() -> str:
    """The version in pyproject.toml, read without a TOML parser: Python 3.10 has none."""
    found = re.search(r'^version = "([^"]+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit("pyproject.toml: no line 'version = \"...\"'")
    return found[1]


def section(version: str) -> str:
    """The text below the heading of a version.

    Raises:
        SystemExit: there is no such heading, or nothing below it.
    """
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    parts = re.split(r"^## +(\S+).*$", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    found = sections.get(version, "").strip()
    if not found:
        raise SystemExit(f"CHANGELOG.md: nothing about {version}; there are {', '.join(sections) or 'no versions'}")
    return found


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    print(section(sys.argv[1] if len(sys.argv) > 1 else current_version()))
