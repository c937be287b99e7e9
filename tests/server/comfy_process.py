"""A ComfyUI server in a process of its own, on a free port, in a base directory of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

START_TIMEOUT = 180  # seconds; importing everything takes half a minute on a busy machine
FOLDERS = ("custom_nodes", "input", "models/checkpoints", "output", "temp", "user")


class ServerFailed(RuntimeError):
    """The server did not start, or the pack did not load in it."""


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def place(source: Path, target: Path) -> None:
    """Make ``source`` available as ``target``: a symbolic link, or a copy where links are not allowed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:  # Windows without the privilege
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*cache"))
        else:
            shutil.copyfile(source, target)


class ComfyProcess:
    """``main.py`` running: ``with ComfyProcess(...) as server: Client(server.url)``.

    Args:
        root: the ComfyUI to run.
        python: the Python to run it with.
        base: an empty folder for models, custom nodes, output and all else the server reads and writes.
        packs: node packs to link into ``custom_nodes``: folder name there -> folder. Each must load.
        checkpoints: checkpoint files to link into ``models/checkpoints``.
        cpu: run on the CPU.
        args: further arguments of main.py, e.g. ``("--cache-none",)``.
    """

    def __init__(
        self,
        root: Path,
        python: str,
        base: Path,
        packs: dict[str, Path] | None = None,
        checkpoints: Sequence[Path] = (),
        cpu: bool = True,
        args: Sequence[str] = (),
    ) -> None:
        self.root = root
        self.base = base
        self.packs = packs or {}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = base / "server.log"
        self.process: subprocess.Popen | None = None
        for folder in FOLDERS:
            (base / folder).mkdir(parents=True, exist_ok=True)
        for name, folder in self.packs.items():
            place(folder, base / "custom_nodes" / name)
        for checkpoint in checkpoints:
            place(checkpoint, base / "models" / "checkpoints" / checkpoint.name)
        self.command = [
            python,
            str(root / "main.py"),
            *(("--cpu",) if cpu else ()),
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(base),
            "--database-url",
            f"sqlite:///{(base / 'user' / 'comfyui.db').as_posix()}",
            "--disable-auto-launch",
            "--disable-api-nodes",
            *args,
        ]

    def __enter__(self) -> ComfyProcess:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=sys.platform != "win32",
            )
        try:
            self.wait_until_ready()
            self.check_packs()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def wait_until_ready(self) -> None:
        """Wait until ``/system_stats`` answers.

        Raises:
            ServerFailed: with the end of the log, if the server ends or does not answer in time.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerFailed(f"{self.describe()} ended with {self.process.returncode}:\n{self.log(40)}")
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise ServerFailed(f"{self.describe()} did not answer within {START_TIMEOUT} s:\n{self.log(40)}")

    def check_packs(self) -> None:
        """Raise ServerFailed if the server started without one of the packs, with what it logged about it."""
        lines = self.log().splitlines()
        for name in self.packs:
            folder = str(self.base / "custom_nodes" / name)
            mentions = [n for n, line in enumerate(lines) if folder in line or line.startswith("Traceback")]
            failed = [n for n in mentions if "IMPORT FAILED" in lines[n] and folder in lines[n]]
            if failed:
                about = "\n".join(lines[mentions[0] : failed[0] + 1])
                raise ServerFailed(f"{self.describe()} could not load {name}:\n{about}")

    def log(self, lines: int | None = None) -> str:
        """What the server has printed so far, or the last ``lines`` of it."""
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        return text if lines is None else "\n".join(text.splitlines()[-lines:])

    def describe(self) -> str:
        """The command, for messages."""
        return " ".join(self.command)

    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """End the server and what it started."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
        if sys.platform != "win32":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        elif self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=10)
