"""Find the ComfyUI that the tests in ``tests/nodes``, ``tests/server`` and ``tests/browser`` run against.

Looked for, in this order:

1. the folder named by the environment variable ``COMFYUI_PATH`` (an error if it is not a ComfyUI);
2. the ComfyUI this pack is installed in (``<ComfyUI>/custom_nodes/<this repository>``);
3. ``~/ComfyUI``;
4. comfy-cli's default workspace;
5. a shallow clone of the oldest supported version, kept in the user's cache folder.

``tests/nodes`` imports ComfyUI into the Python that runs pytest. ``tests/server`` and ``tests/browser`` start a
server with the Python named by ``COMFYUI_PYTHON``, or with the one that runs pytest.
"""

from __future__ import annotations

import configparser
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import chromium

REPO = Path(__file__).resolve().parent.parent
CLONE_URL = "https://github.com/Comfy-Org/ComfyUI"
CLONE_TAG = "v0.3.64"
CLONE_TIMEOUT = 120  # seconds
IMPORT_TIMEOUT = 600  # seconds; importing torch takes minutes on a busy machine with a cold disk

# Packages named in ComfyUI's requirements, by import name. torchvision and torchaudio are imported for
# real: built for another torch they are there and still cannot be loaded.
IMPORTED = ("torch", "torchvision", "torchaudio")
PRESENT = (
    "aiohttp",
    "alembic",
    "av",
    "einops",
    "numpy",
    "PIL",
    "psutil",
    "pydantic",
    "pydantic_settings",
    "safetensors",
    "scipy",
    "sentencepiece",
    "sqlalchemy",
    "tokenizers",
    "torchsde",
    "tqdm",
    "transformers",
    "yaml",
)
PRESENT_FOR_SERVER = ("comfyui_frontend_package",)
PRESENT_FOR_CLIENT = ("aiohttp", "numpy", "PIL", "safetensors", "torch")  # where COMFYUI_PYTHON runs the server

Tier = Literal["nodes", "server", "browser"]
TIERS: tuple[Tier, ...] = ("nodes", "server", "browser")


class NotAComfyUI(RuntimeError):
    """``COMFYUI_PATH`` names a folder that holds no ComfyUI."""


@dataclass(frozen=True)
class Search:
    """What the search came to: ``root`` or, where that is None, the ``reason``."""

    root: Path | None
    reason: str
    looked_at: tuple[str, ...]


def is_comfyui(folder: Path) -> bool:
    """Whether ``folder`` is the root of a ComfyUI checkout."""
    return (folder / "main.py").is_file() and (folder / "comfy" / "model_patcher.py").is_file()


def path_from_environment() -> Path | None:
    """The folder named by ``COMFYUI_PATH``.

    Raises:
        NotAComfyUI: the variable is set and there is no ComfyUI in that folder.
    """
    value = os.environ.get("COMFYUI_PATH")
    if not value:
        return None
    folder = Path(value).expanduser().resolve()
    if not is_comfyui(folder):
        raise NotAComfyUI(f"COMFYUI_PATH={value}: there is no ComfyUI in that folder (no main.py beside comfy/)")
    return folder


def server_python() -> str:
    """The Python that runs the ComfyUI server: ``COMFYUI_PYTHON`` or the one that runs the tests."""
    return os.environ.get("COMFYUI_PYTHON") or sys.executable


def on_cpu() -> bool:
    """Whether ComfyUI runs on the CPU: always, unless ``COMFYUI_TEST_DEVICE`` is set to ``gpu``."""
    return os.environ.get("COMFYUI_TEST_DEVICE", "cpu") != "gpu"


def cache_folder() -> Path:
    """The folder for what the tests keep between runs: the clone and the test checkpoints."""
    if sys.platform == "win32":
        parent = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return parent / "styleinject"


def comfy_cli_workspace() -> Path | None:
    """comfy-cli's default workspace, where comfy-cli is configured and names one."""
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "comfy-cli"
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Application Support" / "comfy-cli"
    else:
        folder = Path.home() / ".config" / "comfy-cli"
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read(folder / "config.ini", encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return None
    workspace = config.defaults().get("default_workspace", "").strip()
    return Path(workspace).expanduser() if workspace else None


def comfyui_version(root: Path) -> str:
    """The version written in ``comfyui_version.py``, "unknown" where there is none."""
    try:
        text = (root / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"""^__version__\s*=\s*["']([^"']+)""", text, re.MULTILINE)
    return found.group(1) if found else "unknown"


@functools.cache
def missing_packages(python: str, for_server: bool) -> str:
    """What ``python`` lacks of what ComfyUI imports, as one line; empty where nothing is missing."""
    present = PRESENT + (PRESENT_FOR_SERVER if for_server else ())
    script = (
        "import sys; sys.path = [p for p in sys.path if p]\n"  # not what lies in the current folder
        "import importlib, importlib.util\n"
        f"bad = [n for n in {present!r} if importlib.util.find_spec(n) is None]\n"
        f"for n in {IMPORTED!r}:\n"
        "    try: importlib.import_module(n)\n"
        "    except Exception as e: bad.append(f'{n} ({type(e).__name__})')\n"
        "print('MISSING:' + ', '.join(bad))\n"
    )
    try:
        done = subprocess.run(
            [python, "-c", script], capture_output=True, text=True, timeout=IMPORT_TIMEOUT, cwd=tempfile.gettempdir()
        )
    except subprocess.TimeoutExpired:
        return f"did not import {', '.join(IMPORTED)} within {IMPORT_TIMEOUT} s"
    except OSError as error:
        return f"cannot be run: {error}"
    for line in done.stdout.splitlines():
        if line.startswith("MISSING:"):
            missing = line.removeprefix("MISSING:")
            return f"lacks {missing}" if missing else ""
    return "fails at importing ComfyUI's packages: " + (done.stderr.strip().splitlines() or ["no output"])[-1]


def clone(target: Path) -> str:
    """Clone ComfyUI's oldest supported version to ``target``; returns why not, or the empty string.

    The clone is made under a temporary name and renamed, so an interrupted one is never taken for whole.
    """
    if shutil.which("git") is None:
        return "git is not installed"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="clone-", dir=target.parent))
    command = ["git", "clone", "--quiet", "--depth", "1", "--branch", CLONE_TAG, CLONE_URL, str(temporary / "ComfyUI")]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CLONE_TIMEOUT, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"}
        )
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"git exited with {done.returncode}"])[-1]
        (temporary / "ComfyUI").rename(target)
        return ""
    except subprocess.TimeoutExpired:
        return f"no answer within {CLONE_TIMEOUT} s"
    except OSError as error:
        return str(error) if not is_comfyui(target) else ""  # another run may have been faster
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@functools.cache
def search() -> Search:
    """Look for ComfyUI, once per process. See the module's docstring for the order."""
    named = path_from_environment()
    if named is not None:
        return Search(named, "", (f"COMFYUI_PATH={named}",))
    candidates: list[Path] = []
    if REPO.parent.name == "custom_nodes":
        candidates.append(REPO.parent.parent)
    candidates.append(Path.home() / "ComfyUI")
    workspace = comfy_cli_workspace()
    if workspace is not None:
        candidates.append(workspace)
    cloned = cache_folder() / f"ComfyUI-{CLONE_TAG}"
    candidates.append(cloned)
    for folder in candidates:
        if is_comfyui(folder):
            return Search(folder.resolve(), "", (str(folder),))
    looked_at = ("$COMFYUI_PATH", *map(str, dict.fromkeys(candidates)))
    lacking = missing_packages(server_python(), for_server=False)
    if lacking:  # a clone would be of no use
        return Search(None, f"no ComfyUI found, and {server_python()} {lacking}", looked_at)
    failure = clone(cloned)
    if failure:
        return Search(None, f"no ComfyUI found, and git clone {CLONE_URL} failed: {failure}", looked_at)
    return Search(cloned.resolve(), "", looked_at)


def find_comfyui() -> Path | None:
    """The root of the ComfyUI to test against, or None; ``search().reason`` says why."""
    return search().root


def problem(tier: Tier) -> str:
    """Why the tests of ``tests/<tier>`` cannot run here; empty where they can."""
    found = search()
    if found.root is None:
        return found.reason
    python = sys.executable if tier == "nodes" else server_python()
    lacking = missing_packages(python, for_server=tier != "nodes")
    if lacking:
        return f"{python} {lacking}"
    if tier != "nodes":
        absent = [name for name in PRESENT_FOR_CLIENT if importlib.util.find_spec(name) is None]
        if absent:
            return f"{sys.executable}, which runs the tests, lacks {', '.join(absent)}"
    return chromium.problem() if tier == "browser" else ""


def summary_lines(tiers: tuple[Tier, ...]) -> list[str]:
    """One line for pytest's summary: which ComfyUI was tested, or what did not run and why."""
    skipped: dict[str, list[str]] = {}
    for tier in tiers:
        reason = problem(tier)
        if reason:
            skipped.setdefault(reason, []).append(f"tests/{tier}")
    lines = []
    for reason, folders in skipped.items():
        looked_at = ", ".join(search().looked_at)
        lines.append(f"SKIPPED: {' and '.join(folders)} did not run: {reason} (looked at: {looked_at})")
    root = search().root
    ran = [f"tests/{tier}" for tier in tiers if not problem(tier)]
    if root is not None and ran:
        lines.append(f"ComfyUI {comfyui_version(root)} at {root}: {' and '.join(ran)}")
    return lines
