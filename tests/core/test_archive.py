"""What the Comfy registry's archive holds, and what its metadata says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pathspec")

from archive import REPO, archived

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


@pytest.fixture(scope="module")
def files() -> set[str]:
    try:
        return set(archived())
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this is no Git checkout: {error}")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))


def tracked(folder: str) -> set[str]:
    return {
        path.relative_to(REPO).as_posix()
        for path in (REPO / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_everything_that_runs_is_in_it(files: set[str]) -> None:
    for folder in ("web", "nodes", "integration", "styleinject_core", "example_workflows"):
        missing = tracked(folder) - files
        assert not missing, f"not in the archive: {sorted(missing)[:5]}"
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"} <= files


def test_what_only_developers_need_is_not(files: set[str]) -> None:
    roots = {name.split("/")[0] for name in files}
    assert not roots & {"tests", "benchmarks", "scripts", "docs", ".ci", ".github", "package.json", "eslint.config.js"}


def test_requirements_and_pyproject_name_the_same_packages(project: dict) -> None:
    lines = (REPO / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    assert required == project["project"]["dependencies"]


def test_the_name_follows_the_registrys_rules(project: dict) -> None:
    """https://docs.comfy.org/registry/specifications: the name can never be changed, and should not hold "comfyui"."""
    name = project["project"]["name"]
    assert re.fullmatch(r"[a-z](?:[a-z0-9]|[-_.](?=[a-z0-9])){0,99}", name)
    assert "comfyui" not in name


def test_the_registrys_pictures_are_in_the_repository(project: dict) -> None:
    from PIL import Image

    prefix = project["project"]["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    limits = {"Icon": (1, 800, 400), "Banner": (21 / 9, 2100, 900)}  # width / height, largest width and height
    for field, (ratio, width, height) in limits.items():
        url = project["tool"]["comfy"][field]
        assert url.startswith(prefix)
        with Image.open(REPO / Path(url.removeprefix(prefix))) as picture:
            assert picture.width <= width and picture.height <= height
            assert abs(picture.width / picture.height - ratio) < 0.01


def test_the_changelog_for_the_registry_is_that_of_this_version(project: dict) -> None:
    version = project["project"]["version"]
    done = subprocess.run([sys.executable, REPO / "scripts" / "changelog.py"], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    whole = (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
    assert done.stdout.strip() in whole and f"## {version}" in whole
    assert done.stdout.startswith("- ") and "\n## " not in done.stdout
    absent = subprocess.run([sys.executable, REPO / "scripts" / "changelog.py", "9.9.9"], capture_output=True, text=True)
    assert absent.returncode != 0 and "9.9.9" in absent.stderr
