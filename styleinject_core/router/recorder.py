"""Recording what style routers do while a model samples; what the layers compute is not changed.

Nothing here waits for the device: tensors are kept where they are until `Recorder.trace` brings them together.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapter import Adapter, no_router
from ..attach import Attachment
from ..call import EVERYWHERE, Listener
from ..functional.host import HostLayer
from ..methods.styleinject import StyleInjectWeights
from ..site import Site
from . import sizes
from .trace import RouterTrace, TraceError

LIMIT = 256 * 2**20  # bytes of probabilities that a recording may hold
_PENDING = 64 * 2**20  # bytes of samples that may wait for being measured


@dataclass
class Call(Listener):
    """One call of the host, as it is recorded.

    Args:
        number: of the call in the run.
        roles: the conditioning of each equal part of the batch, in order.
        sigma: its noise level, a number or a tensor of one.
        measured: the layers whose increments are looked at.
        rows: of the batch; layers that see another number of images are left out. 0: as many as the first layer sees.
    """

    number: int
    roles: tuple[str, ...]
    sigma: float | Tensor
    measured: frozenset[str]
    rows: int = 0
    probabilities: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, sizes.Sample] = field(default_factory=dict)

    def record(self, layer: str, s: Tensor) -> None:
        self.rows = self.rows or s.shape[0]
        if s.shape[0] == self.rows:  # another node may widen the batch inside of a layer: regions, as Attention Couple has them
            self.probabilities[layer] = s if s.ndim == 2 else s.mean(1)  # by token: what the image has on average

    def measures(self, layer: str) -> bool:
        return layer in self.measured

    def measure(self, layer: str, s: Tensor, x: Tensor, h: Tensor | None, host: HostLayer, weights: StyleInjectWeights) -> None:
        taken = sizes.sample(x, h, s, host, weights) if layer in self.probabilities else None
        if taken is not None:
            self.samples[layer] = taken


@dataclass(frozen=True)
class _Rows:
    """A finished call: probabilities (layers, parts, images, n) of the layers at `layers`, still on the device."""

    call: Call
    layers: list[int]
    probabilities: Tensor


class Recorder:
    """Records one adapter in one sampling run.

    Args:
        adapter: whose routers are recorded; a LoRA has none.
        styles: a name per style, for the trace.
        layers: which layers to record; None for all that have a router.
        every: the increments of a layer are measured in one call of this many, its neighbors' in others; 0 for never.
        limit: bytes of probabilities after which recording stops, and the trace says so.

    Raises:
        TraceError: the adapter has no router.
    """

    def __init__(
        self,
        adapter: Adapter,
        styles: Sequence[str],
        layers: Collection[str] | None = None,
        *,
        every: int = 1,
        limit: int = LIMIT,
    ):
        self.adapter, self.styles, self.limit = adapter.name, tuple(styles), limit
        routed = list(adapter.routed)
        self.layers = tuple(name for name in routed if layers is None or name in layers)
        self.convolutions = tuple(name for name in self.layers if adapter.layers[name].shape.is_conv)
        if not routed:
            raise TraceError(no_router(adapter, "record"))
        self.note = ""
        self._every, self._index = every, {name: k for k, name in enumerate(self.layers)}
        self._calls = self._bytes = self._pending_bytes = 0
        self._turns: dict[tuple[str, ...], int] = {}  # calls of these roles
        self._rows: list[_Rows] = []
        self._pending: dict[tuple[str, tuple[int, ...]], list[tuple[int, sizes.Sample]]] = {}
        self._sizes: list[tuple[str, list[int], Tensor]] = []
        self._lock = threading.Lock()  # several GPUs call from several threads

    @property
    def recorded(self) -> int:
        """How many calls have been recorded so far."""
        return len(self._rows)

    @property
    def sigma(self) -> float | Tensor:
        """The noise level of the last call that was recorded, as it was given."""
        return self._rows[-1].call.sigma if self._rows else math.nan

    @contextmanager
    def call(
        self, sites: Sequence[Site], roles: Sequence[str] = (EVERYWHERE,), sigma: float | Tensor = math.nan
    ) -> Iterator[None]:
        """Record one call of the host, for the length of a with block; a call that fails is left out.

        Args:
            sites: the adapter's sites on the host.
            roles, sigma: see `Call`.
        """
        call = self.begin(roles, sigma)
        with sites[0].current.listened(*([] if call is None else [call])):
            yield
        self.end(call)

    def begin(self, roles: Sequence[str], sigma: float | Tensor, rows: int = 0) -> Call | None:
        """A listener for the next call of the host; None when the limit is reached. See `Call`."""
        if self.note:
            return None
        with self._lock:
            number, self._calls = self._calls, self._calls + 1
            turn = self._turns.get(tuple(roles), 0)  # of its own: prompts that take turns are both measured in every layer
            self._turns[tuple(roles)] = turn + 1
        measured = {name for k, name in enumerate(self.layers) if self._every and (k + turn) % self._every == 0}
        return Call(number, tuple(roles), sigma, frozenset(measured), rows)

    def end(self, call: Call | None) -> None:
        """Keep what a call has heard."""
        if call is None or not call.probabilities:
            return
        styles = len(self.styles)
        heard = [s if s.shape[-1] == styles else _padded(s.float(), styles) for s in call.probabilities.values()]
        stacked = torch.stack(heard)  # (layers, B, n)
        roles = call.roles if stacked.shape[1] % len(call.roles) == 0 else (EVERYWHERE,)
        call.roles = roles
        rows = _Rows(call, [self._index[name] for name in call.probabilities], stacked.unflatten(1, (len(roles), -1)))
        call.probabilities = {}
        with self._lock:
            self._bytes += stacked.numel() * stacked.element_size()
            if self._bytes > self.limit:
                self.note = f"recording stopped after {len(self._rows)} calls, at the limit of {self.limit / 2**20:g} MiB"
                return
            self._rows.append(rows)
            for layer, taken in call.samples.items():
                self._pending.setdefault((layer, tuple(taken.h.shape)), []).append((call.number, taken))
                self._pending_bytes += taken.nbytes
            call.samples = {}
            if self._pending_bytes > _PENDING:
                self._measure()

    def since(self, call: int) -> tuple[tuple[str, ...], Tensor] | None:
        """What has been recorded from the `call`-th call on, averaged by role and still on the device.

        Returns:
            The roles, and (roles, layers, images, n) with NaN where a layer was not called; None for nothing.
        """
        recent = self._rows[call:]
        by_role: dict[str, list[Tensor]] = {}
        device = recent[0].probabilities.device if recent else None
        for rows in recent:
            for role, values in zip(rows.call.roles, self._whole(rows).to(device), strict=True):
                by_role.setdefault(role, []).append(values)
        if not by_role:
            return None
        images = min(values.shape[1] for parts in by_role.values() for values in parts)
        means = [torch.stack([values[:, :images] for values in parts]).nanmean(0) for parts in by_role.values()]
        return tuple(by_role), torch.stack(means)

    def trace(self, schedule: Tensor | Sequence[float] = (), *, finished: bool = True, label: str = "") -> RouterTrace:
        """Everything recorded, on the CPU.

        Args:
            schedule: the sigma at which each step begins; a row belongs to the step whose sigma is nearest. Empty: every
                call is a step of its own.
            finished: whether the run came to its end.
        """
        with self._lock:
            self._measure()
        rows = sorted(self._rows, key=lambda r: r.call.number)
        levels = torch.as_tensor(schedule, dtype=torch.float32).cpu()
        images = max((r.probabilities.shape[2] for r in rows), default=0)
        probabilities: list[Tensor] = []
        roles: list[str] = []
        steps: list[int] = []
        sigmas: list[float] = []
        places: dict[int, tuple[int, int]] = {}  # call -> its first row, and how many
        for k, r in enumerate(rows):
            whole = self._whole(r).cpu()
            sigma = float(r.call.sigma)
            step = int((levels - sigma).abs().argmin()) if len(levels) else k
            places[r.call.number] = (len(roles), len(r.call.roles))
            for role, values in zip(r.call.roles, whole, strict=True):
                probabilities.append(_padded(values.mT, images).mT)  # (layers, images, n)
                roles.append(role)
                steps.append(step)
                sigmas.append(sigma)
        shape = (len(roles), len(self.layers), images)
        return RouterTrace(
            self.adapter,
            self.layers,
            self.convolutions,
            self.styles,
            tuple(roles),
            torch.stack(probabilities) if probabilities else torch.empty(*shape, len(self.styles)),
            self._placed_sizes(shape, places),
            torch.tensor(steps, dtype=torch.int64),
            torch.tensor(sigmas, dtype=torch.float32),
            total_steps=len(levels) or len(rows),
            finished=finished,
            label=label,
            note=self.note,
        )

    def _whole(self, rows: _Rows) -> Tensor:
        """(parts, layers, images, n) in float32 with every layer, NaN where one was not called."""
        values = rows.probabilities.movedim(1, 0).float()
        if rows.layers == list(range(len(self.layers))):
            return values
        parts, _, images, styles = values.shape
        whole = values.new_full((parts, len(self.layers), images, styles), math.nan)
        whole[:, rows.layers] = values
        return whole

    def _measure(self) -> None:
        """Turn the samples that wait into sizes, layer by layer: a few operations, whatever the number of calls."""
        with torch.no_grad():
            for (layer, _), waiting in self._pending.items():
                self._sizes.append((layer, [number for number, _ in waiting], sizes.measure([taken for _, taken in waiting])))
        self._pending, self._pending_bytes = {}, 0

    def _placed_sizes(self, shape: tuple[int, int, int], places: dict[int, tuple[int, int]]) -> Tensor:
        out = torch.full((*shape, 2), math.nan)
        for layer, numbers, values in self._sizes:
            for number, own in zip(numbers, values.cpu(), strict=True):  # own: (B, 2)
                if number in places:
                    first, parts = places[number]
                    images = own.unflatten(0, (parts, -1))
                    out[first : first + parts, self._index[layer], : images.shape[1]] = images
        return out


class Recording:
    """What `record` yields: the recorder, and the trace of what it has recorded so far."""

    def __init__(self, recorder: Recorder, schedule: Sequence[float]):
        self.recorder, self._schedule = recorder, schedule

    def trace(self, label: str = "") -> RouterTrace:
        """The trace of everything recorded until now."""
        return self.recorder.trace(self._schedule, label=label)


@contextmanager
def record(
    attachment: Attachment, adapter: int = 0, *, roles: Sequence[str] = (EVERYWHERE,), sigmas: Sequence[float] = ()
) -> Iterator[Recording]:
    """Record one attached adapter for the length of a with block, on any host.

        with attach(unet, adapter) as attachment, record(attachment, roles=("negative", "positive")) as recording:
            pipeline(prompt)
        save_trace(recording.trace(), "run.safetensors")

    Args:
        attachment: the attachment, installed or not.
        adapter: which of its adapters.
        roles: what the equal parts of the host's batch are, in order.
        sigmas: the noise level of each call of the host, where it is known.

    Raises:
        TraceError: the adapter has no router.
    """
    source = attachment.applied[adapter].adapter
    recorder = Recorder(source, source.style_names)
    current = attachment.sites[adapter][0].current
    listening = ExitStack()
    calls: list[Call | None] = []

    def before(*_: object) -> None:
        listening.close()  # of a call that has failed: nothing of it is kept
        calls[:] = [recorder.begin(roles, sigmas[recorder.recorded] if recorder.recorded < len(sigmas) else math.nan)]
        listening.enter_context(current.listened(*(call for call in calls if call is not None)))

    def after(*_: object) -> None:
        listening.close()
        recorder.end(calls.pop())

    handles = [attachment.host.register_forward_pre_hook(before), attachment.host.register_forward_hook(after)]
    try:
        yield Recording(recorder, sigmas)
    finally:
        listening.close()
        for handle in handles:
            handle.remove()


def _padded(values: Tensor, size: int) -> Tensor:
    """The last dimension made `size` long with NaN."""
    missing = size - values.shape[-1]
    return values if missing == 0 else torch.nn.functional.pad(values, (0, missing), value=math.nan)
