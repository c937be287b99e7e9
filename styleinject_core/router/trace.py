"""RouterTrace: what the style routers of one adapter did in one sampling run, as plain tensors on the CPU."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files.atomic import save_tensors
from ..files.header import is_known_version
from ..layers import LayerShape
from ..selector import select

FORMAT_VERSION = 1
_TENSORS = ("probabilities", "sizes", "steps", "sigmas")
_TEXTS = ("adapter", "label", "note", "finished", "total_steps", "layers", "convolutions", "styles", "roles")
_LISTS = ("layers", "convolutions", "styles", "roles")
_KINDS: dict[str, type] = {**dict.fromkeys(_LISTS, list), "finished": bool, "total_steps": int}
_FLOATS, _WHOLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64), (torch.int64, torch.int32)
_DTYPES = {"probabilities": _FLOATS, "sizes": _FLOATS, "steps": _WHOLE, "sigmas": _FLOATS}


class TraceError(ValueError):
    """A trace that is empty, cannot be read, or does not fit what is asked of it; the message says what to do."""


@dataclass(frozen=True)
class RouterTrace:
    """The style probabilities of one adapter in one run.

    A row is one pass of one conditioning (positive, negative, ...) through the model. Samplers such as heun call the
    model several times a step, so a step can have several rows of a role, or none where the adapter was not active.

    Args:
        adapter: the adapter's name.
        layers: the layers that have a router, in the adapter's order.
        convolutions: those of them that are convolutions.
        styles: a name per style.
        roles: what conditioning each row is: "positive", "negative", a guider's own name, "cond 0" where unknown.
        probabilities: s, (rows, layers, images, n); NaN where a layer was not called or has fewer styles.
        sizes: (rows, layers, images, 2): root mean squares of Δh and of the AdaIN increment, relative to that of the
            frozen layer's h; NaN where not measured (`styleinject_core.router.sizes`).
        steps, sigmas: the sampling step, from 0, and the noise level of each row, (rows,).
        total_steps: how many steps the run was to have.
        finished: False for a run that was interrupted or failed.
        label: a name for pictures. note: what a reader should know, as that recording stopped at a memory limit.
    """

    adapter: str
    layers: tuple[str, ...]
    convolutions: tuple[str, ...]
    styles: tuple[str, ...]
    roles: tuple[str, ...]
    probabilities: Tensor
    sizes: Tensor
    steps: Tensor
    sigmas: Tensor
    total_steps: int
    finished: bool = True
    label: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.probabilities.ndim != 4:
            raise TraceError(f"trace of {self.adapter}: probabilities of {self.probabilities.ndim} dimensions, expected 4")
        rows, layers, images, styles = self.probabilities.shape
        expected = {
            "layers": (len(self.layers), layers),
            "styles": (len(self.styles), styles),
            "roles": (len(self.roles), rows),
            "sizes": (tuple(self.sizes.shape), (rows, layers, images, 2)),
            "steps": (tuple(self.steps.shape), (rows,)),
            "sigmas": (tuple(self.sigmas.shape), (rows,)),
        }
        for name, (found, wanted) in expected.items():
            if found != wanted:
                raise TraceError(f"trace of {self.adapter}: {name}: found {found}, expected {wanted} beside the probabilities")

    @property
    def role_names(self) -> tuple[str, ...]:
        """The roles there are, positive before negative before others."""
        order = {"positive": 0, "negative": 1}
        return tuple(sorted(dict.fromkeys(self.roles), key=lambda role: (order.get(role, 2), role)))

    @property
    def title(self) -> str:
        """The adapter and the label; what a reader must know about the run follows in `remarks`."""
        return f"{self.adapter}: {self.label}" if self.label else self.adapter

    @property
    def remarks(self) -> str:
        """Whether the run is whole, and the note; empty where there is nothing to say."""
        parts = [self.note] if self.note else []
        if not self.finished:
            done = int(self.steps.max()) + 1 if len(self.steps) else 0
            parts.insert(0, f"interrupted at step {done} of {self.total_steps}")
        return "; ".join(parts)

    def only(self, selector: str) -> RouterTrace:
        """The trace of the layers that a layer selector leaves. Raises SelectorError: it matches none."""
        shapes = {name: LayerShape(1, 1, (1, 1) if name in self.convolutions else None) for name in self.layers}
        chosen = select(shapes, selector)
        places = [k for k, name in enumerate(self.layers) if name in chosen]
        return replace(
            self,
            layers=tuple(self.layers[k] for k in places),
            convolutions=tuple(name for name in self.convolutions if name in chosen),
            probabilities=self.probabilities[:, places],
            sizes=self.sizes[:, places],
        )

    def rows(self, role: str | None = None) -> Tensor:
        """Indices of the rows of a role, of all for None. Raises TraceError: there is no such role."""
        found = [k for k, name in enumerate(self.roles) if role in (None, name)]
        if not found:
            raise TraceError(f"trace of {self.adapter} has no role {role!r}; it has {', '.join(self.role_names) or 'no rows'}")
        return torch.tensor(found)

    def by_step(self, role: str | None = None, values: Tensor | None = None) -> Tensor:
        """Values per step, averaged over the rows of each: (total_steps, layers, images, n), NaN at steps without any.

        Args:
            role: of this role only.
            values: the probabilities, or another tensor with a first dimension of rows.

        Raises:
            TraceError: there is no such role.
        """
        rows = self.rows(role)
        source = (self.probabilities if values is None else values)[rows]
        steps = self.steps[rows]
        out = source.new_full((self.total_steps, *source.shape[1:]), math.nan)
        for step in steps.unique().tolist():
            out[step] = source[steps == step].nanmean(0)
        return out

    def renamed(self, label: str) -> RouterTrace:
        """The same trace under another label."""
        return replace(self, label=label)


def save_trace(trace: RouterTrace, path: str | Path) -> None:
    """Write a trace; the file appears whole or not at all.

    Args:
        path: ends in .safetensors; the folder must exist.

    Raises:
        TraceError: a wrong suffix. WriteError: a disk that refuses.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise TraceError(f"{path.name}: expected a name that ends in .safetensors")
    texts = {name: json.dumps(getattr(trace, name), ensure_ascii=False) for name in _TEXTS}
    header = {"format": "pt", "styleinject_trace_version": str(FORMAT_VERSION)}
    header |= {f"styleinject_trace.{name}": text for name, text in texts.items()}
    save_tensors({name: getattr(trace, name).contiguous() for name in _TENSORS}, path, header)


def load_trace(path: str | Path) -> RouterTrace:
    """Read a trace that `save_trace` wrote.

    Raises:
        TraceError: no such file, no trace, a newer version, or tensors and texts that contradict each other.
    """
    path = Path(path)
    if not path.is_file():
        raise TraceError(f"{path.name}: no such file in {path.parent}")
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            version = header.get("styleinject_trace_version", "")
            if not version:
                raise TraceError("this is not a router trace (an adapter, or something else in safetensors)")
            if not is_known_version(version, FORMAT_VERSION):
                raise TraceError(
                    f"trace version {version[:20]}, this version of the pack reads up to {FORMAT_VERSION}: update it"
                )
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        texts: dict[str, Any] = {name: json.loads(header[f"styleinject_trace.{name}"]) for name in _TEXTS}
        for name, text in texts.items():
            if type(text) is not _KINDS.get(name, str):
                raise TraceError(f"{name}: expected {_KINDS.get(name, str).__name__}, found {type(text).__name__}")
        texts |= {name: tuple(map(str, texts[name])) for name in _LISTS}
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES[name]:
                raise TraceError(f"{name}: its numbers are {tensor.dtype}")
        return RouterTrace(**texts, **tensors)
    except TraceError as error:
        raise TraceError(f"{path.name}: {str(error)[:500]}") from None
    except (SafetensorError, OSError, RuntimeError) as error:  # RecursionError is a RuntimeError
        raise TraceError(f"{path.name}: damaged, or not a whole safetensors file ({str(error)[:300]})") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TraceError(f"{path.name}: the trace is incomplete: {str(error)[:300]}") from None
