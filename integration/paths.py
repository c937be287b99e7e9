"""Where adapter files are: models/styleinject, what was trained here (output/styleinject) under "output/", models/loras under
"loras/", and last, under "demo/", those that come with the pack for the embedded demo model."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import folder_paths

from ..styleinject_core.demo.data import ADAPTERS as DEMO_ADAPTERS

FOLDER = "styleinject"
TRAINED = "styleinject"  # in the output folder
SUFFIX = ".safetensors"
_LORAS = "loras"
_TRAINED_FOLDER, _DEMO_FOLDER = "styleinject_trained", "styleinject_demo"  # ComfyUI's names for them
_PREFIXES = {_TRAINED_FOLDER: "output/", _LORAS: "loras/", _DEMO_FOLDER: "demo/"}  # in the order of the list
NONE_CHOSEN = "choose an adapter"  # first in the list as long as there are none but the demo's, which fit no other model


def register_folder() -> None:
    """Make models/styleinject known to ComfyUI, beside the folders that extra_model_paths.yaml may have named already, and
    output/styleinject, and the pack's own folder with the adapters of the embedded demo model."""
    default = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, default)
    folder_paths.add_model_folder_path(_DEMO_FOLDER, str(DEMO_ADAPTERS))
    folder_paths.add_model_folder_path(_TRAINED_FOLDER, str(trained_folder()))
    for name in (FOLDER, _TRAINED_FOLDER, _DEMO_FOLDER):
        folders, _ = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (folders, {SUFFIX})  # without it every kind of file would be listed
    with contextlib.suppress(OSError):  # a read-only installation keeps its adapters elsewhere
        os.makedirs(default, exist_ok=True)


def trained_folder() -> Path:
    """Where training runs and saved adapters go; not created."""
    return Path(folder_paths.get_output_directory()) / TRAINED


def adapter_names() -> list[str]:
    """Every adapter file by the name workflows keep: "/" between folders, and a prefix for all but models/styleinject.

    The first is what a new node has: an adapter of the user's own, else `NONE_CHOSEN`.
    """
    names = list(_files())
    only_demo = all(name.startswith(_PREFIXES[_DEMO_FOLDER]) for name in names)
    return [NONE_CHOSEN, *names] if only_demo else names


def adapter_path(name: str) -> Path:
    """The file of a name from `adapter_names`, only ever one that is listed there.

    Workflows of the first versions name the demo's adapters without "demo/".

    Raises:
        ValueError: a name that leaves its folder, or none chosen.
        FileNotFoundError: no such file; names the folders looked in and what is there.
    """
    if name == NONE_CHOSEN:
        raise ValueError(
            f"no adapter chosen: put one for your model, or a LoRA, into {_own_folder()} or models/loras and press R, or train "
            "one. Those under demo/ are for StyleInject Demo Model alone"
        )
    files = _files()
    wanted = str(name)
    if wanted not in files:  # what is listed is inside, whatever its name; else it may be a workflow from Windows
        wanted = wanted.replace("\\", "/")
        if ".." in wanted.split("/") or os.path.isabs(wanted) or ":" in wanted:
            raise ValueError(f"adapter name {name!r}: expected a file inside {_folders()}, not a path that leads out of it")
    if wanted not in files:
        wanted = _PREFIXES[_DEMO_FOLDER] + wanted
    if wanted not in files:
        raise FileNotFoundError(f"adapter {name!r} not found in {_folders()}; {_choices(list(files))}")
    folder, native = files[wanted]
    return Path(folder_paths.get_full_path_or_raise(folder, native))


def fingerprint(name: str) -> str:
    """Changes when the file does: size and time of modification; empty where there is none."""
    try:
        status = adapter_path(name).stat()
    except (OSError, ValueError):
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}"


def problem(name: str | None) -> str | None:
    """Why a name cannot be loaded, for the message when a workflow is queued; None where it can, or is not known yet."""
    if name is None:  # it comes from another node
        return None
    try:
        adapter_path(name)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _files() -> dict[str, tuple[str, str]]:
    """Name in workflows -> (ComfyUI's folder name, its own spelling of the file there)."""
    own = {native.replace(os.sep, "/"): (FOLDER, native) for native in _listed(FOLDER)}
    others = {
        prefix + native.replace(os.sep, "/"): (folder, native)
        for folder, prefix in _PREFIXES.items()
        for native in _listed(folder)
    }
    return own | {name: file for name, file in others.items() if name not in own}


def _listed(folder: str) -> list[str]:
    return [name for name in folder_paths.get_filename_list(folder) if name.lower().endswith(SUFFIX)]


def _own_folder() -> str:
    return folder_paths.get_folder_paths(FOLDER)[0]


def _folders() -> str:
    return " or ".join(path for folder in (FOLDER, *_PREFIXES) for path in folder_paths.get_folder_paths(folder))


def _choices(names: list[str]) -> str:
    if not names:
        return "there are no adapters yet"
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return "there are: " + ", ".join(names[:10]) + more
