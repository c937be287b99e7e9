"""Find the Chromium that the tests in ``tests/browser`` drive with Playwright.

The executable named by the environment variable ``CHROMIUM``, else one that is installed on the system, else the one
that ``playwright install chromium`` has fetched.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from pathlib import Path

INSTALLED = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@functools.cache
def find_chromium() -> str | None:
    """The path of the executable, None where there is none."""
    named = os.environ.get("CHROMIUM")
    if named:
        return shutil.which(named)
    found = next(filter(None, map(shutil.which, INSTALLED)), None)
    return found or playwrights_own()


def playwrights_own() -> str | None:
    """The browser that Playwright has fetched, None if it has not."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


@functools.cache
def problem() -> str:
    """Why no browser can be driven here; empty where one can."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    if find_chromium() is None:
        named = os.environ.get("CHROMIUM")
        return (
            f"CHROMIUM={named} is no executable" if named else "there is no Chromium (playwright install chromium fetches one)"
        )
    return ""
