"""Settings for every test: where the helper modules are, and what happens without ComfyUI.

The tests of ``tests/nodes``, ``tests/server`` and ``tests/browser`` run against a real ComfyUI or not at all;
what did not run is said in one line at the end of the run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

TESTS = Path(__file__).resolve().parent
# The helper modules (comfyui, checkpoints, tiny_model, client, ...) are imported by name. Appended, so that
# they can never hide a module of ComfyUI; the test folders are not packages, because then the repository
# itself, whose __init__.py is ComfyUI's entry, would be taken for the outermost package.
for folder in (TESTS, TESTS / "server", TESTS / "browser"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import comfyui  # noqa: E402


class WithoutComfyUI(pytest.Module):
    """A test module that is not imported, because what it imports is not here."""

    reason = ""

    def collect(self):
        pytest.skip(self.reason, allow_module_level=True)


def tier_of(path: Path) -> comfyui.Tier | None:
    """The tier ("nodes", "server" or "browser") a test file belongs to; None for tests/core."""
    return next((tier for tier in comfyui.TIERS if (TESTS / tier) in path.parents), None)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TIERS_MET] = set()
    config.stash[SKIPPED] = []
    try:
        comfyui.path_from_environment()
    except comfyui.NotAComfyUI as error:
        raise pytest.UsageError(str(error)) from None


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip a module of a tier that cannot run here, before it is imported."""
    tier = tier_of(module_path)
    if tier is None:
        return None
    parent.config.stash[TIERS_MET].add(tier)
    reason = comfyui.problem(tier)
    if not reason:
        return None
    module: WithoutComfyUI = WithoutComfyUI.from_parent(parent, path=module_path)
    module.reason = reason
    return module


@pytest.fixture(scope="session")
def skip_loudly(request: pytest.FixtureRequest) -> Callable[[str], NoReturn]:
    """Skip what cannot run here, and say so in a line at the end of the run."""

    def skip(reason: str) -> NoReturn:
        if reason not in request.config.stash[SKIPPED]:
            request.config.stash[SKIPPED].append(reason)
        pytest.skip(reason)

    return skip


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    met = config.stash[TIERS_MET]
    lines = comfyui.summary_lines(tuple(tier for tier in comfyui.TIERS if tier in met))
    for line in [*lines, *(f"SKIPPED: {reason}" for reason in config.stash[SKIPPED])]:
        loud = line.startswith("SKIPPED")
        terminalreporter.write_line(line, bold=True, yellow=loud, green=not loud)


TIERS_MET: pytest.StashKey[set] = pytest.StashKey()
SKIPPED: pytest.StashKey[list[str]] = pytest.StashKey()  # reasons of skip_loudly
