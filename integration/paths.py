"""Where the pack's files are, by the names that workflows keep.

adapters        models/styleinject; what was trained here (output/styleinject) under "output/"; models/loras under "loras/";
                last, under "demo/", those that come with the pack for the embedded demo model
DEADiff         models/deadiff, and the demo's under "demo/"
style cards     models/style_cards, and those saved here (output/style_cards) under "output/"
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
_TRAINED_FOLDER, _DEMO_FOLDER = "styleinject_trained", "styleinject_demo"  # ComfyUI's names for them
_DEMO_DEADIFFS, _SAVED_CARDS = "styleinject_demo_deadiffs", "styleinject_saved_cards"
_DEMO = "demo/"
NONE_CHOSEN = "choose an adapter"  # first in the list as long as there are none but the demo's, which fit no other model


@dataclass(frozen=True)
class FileChoices:
    """The files of one kind that a node offers.

    Args:
        noun: what one is called in messages.
        folder: ComfyUI's name of their folder.
        prefixes: more such names, each with what stands before its files' names in workflows, in the order of the list.
        none_chosen: what stands first in the list as long as there are none but the demo's.
        advice: where to get one, for the error of a node in which none is chosen; {folder} is the folder's path.
    """

    noun: str
    folder: str
    prefixes: tuple[tuple[str, str], ...]
    none_chosen: str
    advice: str

    def names(self) -> list[str]:
        """Every file by the name workflows keep: "/" between folders, and a prefix for all that is not in `folder`.

        The first is what a new node has: a file of the user's own, else `none_chosen`.
        """
        names = list(self._files())
        only_demo = all(name.startswith(_DEMO) for name in names)
        return [self.none_chosen, *names] if only_demo else names

    def path(self, name: str) -> Path:
        """The file of a name from `names`, only ever one that is listed there.

        Workflows of the first versions name the demo's adapters without "demo/".

        Raises:
            ValueError: a name that leaves its folder, or none chosen.
            FileNotFoundError: no such file; names the folders looked in and what is there.
        """
        if name == self.none_chosen:
            raise ValueError(self.advice.format(folder=folder_paths.get_folder_paths(self.folder)[0]))
        files = self._files()
        wanted = str(name)
        if wanted not in files:  # what is listed is inside, whatever its name; else it may be a workflow from Windows
            wanted = wanted.replace("\\", "/")
            if ".." in wanted.split("/") or os.path.isabs(wanted) or ":" in wanted:
                raise ValueError(
                    f"{self.noun} name {name!r}: expected a file inside {self._folders()}, not a path that leads out of it"
                )
        if wanted not in files:
            wanted = _DEMO + wanted
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
        return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"

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
        others = {
            prefix + native.replace(os.sep, "/"): (folder, native)
            for folder, prefix in self.prefixes
            for native in _listed(folder)
        }
        return own | {name: file for name, file in others.items() if name not in own}

    def _folders(self) -> str:
        names = (self.folder, *(folder for folder, _ in self.prefixes))
        return " or ".join(path for name in names for path in folder_paths.get_folder_paths(name))

    def _present(self, names: list[str]) -> str:
        if not names:
            return f"there are no {self.noun}s yet"
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        return "there are: " + ", ".join(names[:10]) + more


_ADAPTERS = FileChoices(
    "adapter",
    FOLDER,
    ((_TRAINED_FOLDER, "output/"), (_LORAS, "loras/"), (_DEMO_FOLDER, _DEMO)),
    NONE_CHOSEN,
    "no adapter chosen: put one for your model, or a LoRA, into {folder} or models/loras and press R, or train one. Those "
    "under demo/ are for StyleInject Demo Model alone",
)
adapter_names, adapter_path, fingerprint, problem = _ADAPTERS.names, _ADAPTERS.path, _ADAPTERS.fingerprint, _ADAPTERS.problem
DEADIFF_FILES = FileChoices(
    "DEADiff file",
    DEADIFF,
    ((_DEMO_DEADIFFS, _DEMO),),
    "choose a DEADiff file",
    "no DEADiff file chosen: convert the authors' checkpoint into {folder}, with the command styleinject deadiff convert, and "
    "press R. The one under demo/ is for StyleInject Demo Model alone",
)
CARD_FILES = FileChoices(
    "style card",
    CARDS,
    ((_SAVED_CARDS, "output/"),),
    "choose a style card",
    "no style card chosen: make one with Save Style Card, or put one into {folder}, and press R",
)


def register_folder() -> None:
    """Make the pack's folders known to ComfyUI, beside those that extra_model_paths.yaml may have named already: what users
    put into models, what was made here, and what comes with the pack for the embedded demo model."""
    own = {name: os.path.join(folder_paths.models_dir, name) for name in (FOLDER, DEADIFF, CARDS)}
    others = {
        _DEMO_FOLDER: DEMO_ADAPTERS,
        _DEMO_DEADIFFS: DEMO_DEADIFFS,
        _TRAINED_FOLDER: trained_folder(),
        _SAVED_CARDS: cards_folder(),
    }
    for name, path in {**own, **others}.items():
        folder_paths.add_model_folder_path(name, str(path))
        folders, _ = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (folders, {SUFFIX})  # without it every kind of file would be listed
    for path in own.values():
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
