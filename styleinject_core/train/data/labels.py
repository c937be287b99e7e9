"""Which style an example is in, where its folder or its caption says so: what s is while that example is trained on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from .images import DataError


class StyleLabels:
    """Names of styles, looked for in folders and captions.

    An example's style is the one that a folder on its path is named after; else the one that its caption has as whole words. A
    caption with several of them says nothing. Case does not matter.

    Args:
        names: of the styles, in the order of the adapter's.

    Raises:
        ValueError: an empty name, or one that is there twice.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(" ".join(name.split()) for name in names)
        folded = [name.casefold() for name in self.names]
        if "" in folded or len(set(folded)) < len(folded):
            twice = next((name for name in folded if folded.count(name) > 1), "")
            raise ValueError(f"styles: {twice!r} is there twice" if twice else "styles: a name is empty")
        self._number = {name: k for k, name in enumerate(folded)}
        self._words = [re.compile(rf"(?<!\w){re.escape(name)}(?!\w)") for name in folded]

    def of(self, name: str, caption: str) -> int:
        """The number of an example's style, from 0; -1 for none.

        Args:
            name: of its file, relative to the data's folder, or in its shard.
        """
        for folder in reversed(PurePosixPath(name.replace("\\", "/")).parts[:-1]):
            if (number := self._number.get(" ".join(folder.split()).casefold())) is not None:
                return number
        found = [k for k, word in enumerate(self._words) if word.search(" ".join(caption.split()).casefold())]
        return found[0] if len(found) == 1 else -1

    def counted(self, labels: Sequence[int]) -> str:
        """What a user should know of the labels of a whole folder; empty where there is nothing.

        Raises:
            DataError: a style that no example has.
        """
        if missing := [name for k, name in enumerate(self.names) if k not in labels]:
            raise DataError(f"styles: no image is in a folder {missing[0]!r}, or has it as the only style in its caption")
        without = sum(label < 0 for label in labels)
        return f"{without} of {len(labels)} images name no style, or several: the router chooses theirs" if without else ""
