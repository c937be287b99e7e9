"""The router live: what a monitor sees, sent to the browser while the sampler runs.

One message of the type EVENT, JSON:

    node, adapter      the monitor's execution id ("1:2:3" in subgraphs) and which adapter this is
    run                a name for this sampling run, the same in all of its messages
    prompt, workflow   the id of the queued prompt, and of the workflow it was made from; "" where unknown
    layers, styles     how many
    names              {"layers": [...], "labels": [...], "blocks": [...], "groups": {...}, "styles": [...]}; in the first
                       message, in the last, and about every two seconds. Of each layer its name, what to call it for people,
                       and its block likewise; of each word of the layer selector, "cross" or "down.1", the indices of the
                       layers it chooses
    steps              how many steps the run will have
    columns            the steps in this message: [{"step": 0, "sigma": 14.6, "roles": ["positive", "negative"]}, ...]
    values             base64 of a byte per column, role, layer and style: 254 times the probability, 255 where there is none
    end                "finished" or "interrupted", in the last message only

The names come again and again because a browser that joins late, or reloads, must not need to ask. Several images of a
batch are shown as their mean.
"""

from __future__ import annotations

import base64
import sys
import time
import uuid
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from threading import Lock, Timer
from typing import Any

import torch
from torch import Tensor

from ..styleinject_core.layer_names import groups, parse

EVENT = "styleinject.router"
INTERVAL = 0.1  # seconds between two messages of one feed
NAMES_INTERVAL = 2.0  # seconds between two messages with names
MOST_WAITING = 256  # steps that a slow device or network may keep waiting; of more, the oldest are lost
LEVELS = 254
MISSING = 255


@dataclass(frozen=True)
class Column:
    """One step on its way: `values` (roles, layers, styles) uint8, and perhaps sigma, still on the device of the model."""

    step: int
    sigma: float | Tensor
    roles: tuple[str, ...]
    values: Tensor
    levels: Tensor | None

    def told(self) -> dict[str, Any]:
        """It for the browser, at the step whose level is nearest."""
        sigma = float(self.sigma)
        step = self.step if self.levels is None else int((self.levels - sigma).abs().argmin())
        return {"step": step, "sigma": sigma, "roles": self.roles}


class LiveFeed:
    """Sends the routers of one adapter in one sampling run to the browser that queued it.

    The sampling thread only starts the work on the device; waiting for it, and sending, is done by short-lived daemon threads,
    at most one at a time and ten a second. Steps that come faster travel together. Without a server, or while no browser
    is connected, a step costs one look into a dictionary.

    Args:
        node_id: execution id of the monitor, its hidden input unique_id.
        adapter: its name, as shown.
        layers, styles: names of the rows and of the probabilities in each.
        convolutions: the layers that are some.
    """

    def __init__(
        self, node_id: str, adapter: str, layers: Sequence[str], styles: Sequence[str], convolutions: Collection[str] = ()
    ) -> None:
        self._server = running_server()
        self._client: str | None = getattr(self._server, "client_id", None)
        self._names = {**_described(layers, convolutions), "styles": list(styles)}
        self._constant = {
            "node": node_id,
            "adapter": adapter,
            "run": uuid.uuid4().hex[:12],
            **_running_prompt(self._server),
            "layers": len(layers),
            "styles": len(styles),
        }
        self._steps = 0
        self._lock = Lock()  # guards the fields below
        self._waiting: deque[Column] = deque(maxlen=MOST_WAITING)
        self._end = ""
        self._sender: Timer | None = None
        self._next = 0.0  # not before these, by time.monotonic
        self._next_names = 0.0

    def step(
        self,
        step: int,
        steps: int,
        sigma: float | Tensor,
        roles: Sequence[str],
        probabilities: Tensor,
        levels: Tensor | None = None,
    ) -> None:
        """Show one step.

        Args:
            step: from 0. A step that comes twice is shown as it came last.
            steps: of the whole run.
            sigma: noise level of the step, a number or a tensor of one on any device.
            levels: the noise level at which each step begins, on the CPU. With them, the step is the nearest instead of `step`:
                some samplers count otherwise.
            roles: "positive", "negative" or another name, for each first index of `probabilities`.
            probabilities: (roles, layers, images, styles), float32, on any device; NaN where a layer was not called.

        Raises:
            ValueError: the shape is not the one the names call for.
        """
        shape = tuple(probabilities.shape)
        expected = (len(roles), self._constant["layers"], self._constant["styles"])
        if len(shape) != 4 or (shape[0], shape[1], shape[3]) != expected:
            raise ValueError(
                f"probabilities have shape {shape}, expected (roles, layers, images, styles), without images {expected}"
            )
        if not self._someone_listens():
            return
        present = ~probabilities.isnan()
        mean = probabilities.nan_to_num(0.0).sum(2) / present.sum(2)  # (roles, layers, styles); 0/0 is NaN again
        values = torch.nan_to_num(mean * LEVELS, nan=MISSING).round().to(torch.uint8)
        with self._lock:
            self._steps = steps
            self._waiting.append(Column(step, sigma, tuple(roles), values, levels))
            self._plan()

    def close(self, finished: bool) -> None:
        """End the run: what is waiting is still sent, by a thread that ends with it.

        Args:
            finished: False after an error or an interrupt.
        """
        if self._someone_listens():
            with self._lock:
                self._end = "finished" if finished else "interrupted"
                self._plan()

    def _someone_listens(self) -> bool:
        # A run that no browser queued is not shown in one: its node ids are those of another workflow.
        return bool(self._client is not None and self._server.sockets)

    def _plan(self) -> None:
        """Have what is waiting sent as soon as that is allowed. Called with the lock held."""
        if self._sender is None:
            self._sender = Timer(max(0.0, self._next - time.monotonic()), self._send)
            self._sender.daemon = True
            self._sender.start()

    def _send(self) -> None:
        """Send everything that is waiting as one message. In a thread of its own: `.cpu()` waits for the device."""
        with self._lock:
            columns, end = list(self._waiting), self._end
            self._waiting.clear()
            self._end = ""
        try:
            message = self._message(columns, end)
            # To whoever queued it; when that browser is gone, to those that are there.
            client = self._client if self._client in self._server.sockets else None
            self._server.send_sync(EVENT, message, client)
        finally:
            with self._lock:
                self._next = time.monotonic() + INTERVAL
                self._sender = None
                if self._waiting or self._end:
                    self._plan()

    def _message(self, columns: Sequence[Column], end: str) -> dict[str, Any]:
        values = b"".join(column.values.cpu().numpy().tobytes() for column in columns)
        message = {
            **self._constant,
            "steps": self._steps,
            "columns": [column.told() for column in columns],
            "values": base64.b64encode(values).decode("ascii"),
        }
        now = time.monotonic()
        if end or now >= self._next_names:
            message["names"] = self._names
            self._next_names = now + NAMES_INTERVAL
        if end:
            message["end"] = end
        return message


def _described(layers: Sequence[str], convolutions: Collection[str]) -> dict[str, Any]:
    """What the browser needs to know of the layers' names, which it does not read itself."""
    index = {name: number for number, name in enumerate(layers)}
    return {
        "layers": list(layers),
        "labels": [parse(name).label for name in layers],
        "blocks": [parse(name).block_label for name in layers],
        "groups": {word: [index[name] for name in names] for word, names in groups(layers, convolutions).items()},
    }


def running_server() -> Any:
    """ComfyUI's running server, None where ComfyUI is used without one.

    A server that runs has been imported; importing it here would bring it into programs that have none.
    """
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _running_prompt(server: Any) -> dict[str, str]:
    """The ids of the prompt that runs and of the workflow the browser made it from: a node id alone is not unique."""
    running = server.prompt_queue.get_current_queue_volatile()[0] if server is not None else []
    if len(running) != 1:
        return {"prompt": "", "workflow": ""}
    _, prompt_id, _, extra_data = running[0][:4]
    workflow = (extra_data.get("extra_pnginfo") or {}).get("workflow") or {}
    return {"prompt": str(prompt_id), "workflow": str(workflow.get("id") or "")}
