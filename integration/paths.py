"""Where the pack's files are, by the names that workflows keep.

adapters        models/styleinject with the demo's own, models/loras under "loras/", output/styleinject under "output/"
DEADiff         models/deadiff, with the demo's own
style cards     models/style_cards, and those saved here, output/style_cards, under "output/"
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ..styleinject_core.demo.data import ADAPTERS as DEMO_ADAPTERS
from ..styleinject_core.demo.data import DEADIFFS as DEMO_DEADIFFS

FOLDER = "styleinject"
TRAINED = "styleinject"  # in the output folder
SUFFIX = ".safetensors"
DEADIFF = "deadiff"
CARDS = "style_cards"  # in the models and in the output folder
_LORAS = "loras"
_TRAINED_FOLDER = "styleinject_trained"  # ComfyUI's name for it
_SAVED_CARDS = "styleinject_saved_cards"


@dataclass(frozen=True)
class FileChoices:
    """The files of one kind that a node offers.

    Args:
        noun: what they are called in messages.
        folder: ComfyUI's name of their folder.
        others: more such names, each with what stands before its files' names in workflows.
    """

    noun: str
    folder: str
    others: tuple[tuple[str, str], ...] = ()

    def names(self) -> list[str]:
        """Every file by the name workflows keep, "/" between folders."""
        return list(self._files())

    def path(self, name: str) -> Path:
        """The file of a name from `names`, only ever one that is listed there.

        Raises:
            ValueError: a name that leaves its folder.
            FileNotFoundError: no such file; names the folders looked in and what is there.
        """
        wanted = str(name).replace("\\", "/")
        if ".." in wanted.split("/") or os.path.isabs(wanted) or ":" in wanted:
            raise ValueError(
                f"{self.noun} name {name!r}: expected a file inside {self._folders()}, not a path that leads out of it"
            )
        files = self._files()
        if wanted not in files:
            raise FileNotFoundError(f"{self.noun} {name!r} not found in {self._folders()}; {self._present(list(files))}")
        folder, native = files[wanted]
        return Path(folder_paths.get_full_path_or_raise(folder, native))

    def fingerprint(self, name: str) -> str:
        """Changes when the file does: size and time of modification; empty where there is none."""
        try:
            status = self.path(name).stat()
        except (OSError, ValueError):
            return ""
        return f"{status.st_size}:{status.st_mtime_ns}"

    def problem(self, name: str | None) -> str | None:
        """Why a name cannot be loaded, for the message when a workflow is queued; None where it can, or is not known yet."""
        if name is None:  # it comes from another node
            return None
        try:
            self.path(name)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def _files(self) -> dict[str, tuple[str, str]]:
        """Name in workflows -> (ComfyUI's folder name, its own spelling of the file there)."""
        own = {native.replace(os.sep, "/"): (self.folder, native) for native in _listed(self.folder)}
        more = {
            prefix + native.replace(os.sep, "/"): (folder, native)
            for folder, prefix in self.others
            for native in _listed(folder)
        }
        return own | {name: file for name, file in more.items() if name not in own}

    def _folders(self) -> str:
        names = (self.folder, *(folder for folder, _ in self.others))
        return " or ".join(path for name in names for path in folder_paths.get_folder_paths(name))

    def _present(self, names: list[str]) -> str:
        if not names:
            return f"there are no {self.noun}s yet"
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        return "there are: " + ", ".join(names[:10]) + more


_ADAPTERS = FileChoices("adapter", FOLDER, ((_LORAS, "loras/"), (_TRAINED_FOLDER, "output/")))
adapter_names, adapter_path, fingerprint, problem = _ADAPTERS.names, _ADAPTERS.path, _ADAPTERS.fingerprint, _ADAPTERS.problem
DEADIFF_FILES = FileChoices("DEADiff file", DEADIFF)
CARD_FILES = FileChoices("style card", CARDS, ((_SAVED_CARDS, "output/"),))


def register_folder() -> None:
    """Make the pack's folders known to ComfyUI, beside those that extra_model_paths.yaml may have named already.

    The last folder looked in for adapters and for DEADiff is the pack's own, with those of the embedded demo model.
    """
    models = {name: os.path.join(folder_paths.models_dir, name) for name in (FOLDER, DEADIFF, CARDS)}
    extra = ((FOLDER, str(DEMO_ADAPTERS)), (DEADIFF, str(DEMO_DEADIFFS)), (_TRAINED_FOLDER, str(trained_folder())),
             (_SAVED_CARDS, str(cards_folder())))  # fmt: skip
    for name, path in (*models.items(), *extra):
        folder_paths.add_model_folder_path(name, path)
    for name in {*models, _TRAINED_FOLDER, _SAVED_CARDS}:
        folders, _ = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (folders, {SUFFIX})  # without it every kind of file would be listed
    for path in models.values():
        with contextlib.suppress(OSError):  # a read-only installation keeps its files elsewhere
            os.makedirs(path, exist_ok=True)


def trained_folder() -> Path:
    """Where training runs and saved adapters go; not created."""
    return Path(folder_paths.get_output_directory()) / TRAINED


def cards_folder() -> Path:
    """Where saved style cards go; not created."""
    return Path(folder_paths.get_output_directory()) / CARDS


def _listed(folder: str) -> list[str]:
    return [name for name in folder_paths.get_filename_list(folder) if name.lower().endswith(SUFFIX)]
