"""Which passes of a sampling run belong to a guidance: extra looks at the model, through other attention or another latent.

Nodes as PAG, SAG and SLG ask for a conditioning that has just been worked out once more, from inside a function that combines
predictions, or as a guider of their own. Their passes are not the prompt's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

_FUNCTION = "sampler_cfg_function"
_LISTS = ("sampler_pre_cfg_function", "sampler_post_cfg_function")
_MARK = "_styleinject_passes"


class Passes:
    """The passes of one run. One step after the other: what runs on several GPUs at once is inside of a pass."""

    def __init__(self) -> None:
        self._inside = 0  # of functions that combine predictions
        self._seen: list[tuple[Any, Tensor]] = []  # the conditionings of this prediction, and the latents they were for

    def begin(self, options: dict[str, Any]) -> None:
        """A prediction begins; mark the functions in its model_options, a run's own, as those of a guidance."""
        self._seen = []
        if _FUNCTION in options:
            options[_FUNCTION] = self._marked(options[_FUNCTION])
        for name in _LISTS:
            if name in options:
                options[name] = [self._marked(function) for function in options[name]]

    def guided(self, conds: Sequence[Any], x: Tensor) -> bool:
        """Whether this pass is a guidance's: inside of such a function, or the second for the same conditioning and latent."""
        again = any(entries is own and x is latent for entries in conds if entries is not None for own, latent in self._seen)
        self._seen.extend((entries, x) for entries in conds if entries is not None)
        return again or self._inside > 0

    def _marked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if getattr(function, _MARK, None) is self:
            return function

        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self._inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._inside -= 1

        setattr(marked, _MARK, self)
        return marked
