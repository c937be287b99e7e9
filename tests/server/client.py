"""A client of a ComfyUI server: queue a prompt, follow its events over the websocket, fetch its images."""

from __future__ import annotations

import asyncio
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Prompt = dict[str, dict[str, Any]]


class PromptRejected(RuntimeError):
    """The server refused the prompt at validation. ``details`` is its answer, with ``node_errors``."""

    def __init__(self, details: Any) -> None:
        super().__init__(json.dumps(details, indent=1)[:4000] if not isinstance(details, str) else details[:4000])
        self.details = details
        self.node_errors: dict[str, Any] = details.get("node_errors", {}) if isinstance(details, dict) else {}


class ExecutionError(RuntimeError):
    """A node raised. ``details`` is the event: ``node_id``, ``node_type``, ``exception_message``, ``traceback``."""

    def __init__(self, details: dict[str, Any]) -> None:
        traceback = "".join(details.get("traceback") or ())
        super().__init__(
            f"{details.get('node_type')} (node {details.get('node_id')}): {details.get('exception_type')}: "
            f"{details.get('exception_message')}\n{traceback}"
        )
        self.details = details
        self.message: str = details.get("exception_message", "")


@dataclass(frozen=True)
class Event:
    """One message of the websocket: its type ("progress", "executed", a pack's own, ...) and data."""

    type: str
    data: dict[str, Any]


@dataclass
class Run:
    """What became of one queued prompt."""

    prompt_id: str
    events: list[Event] = field(default_factory=list)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # node id -> what it showed: images, text, ...
    status: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    interrupted: bool = False
    binary_messages: int = 0  # previews
    seconds: float = 0.0

    def of_type(self, event_type: str) -> list[dict[str, Any]]:
        """The data of all events of one type, in order."""
        return [event.data for event in self.events if event.type == event_type]

    @property
    def executed(self) -> list[str]:
        """Ids of the nodes that ran, in order; a node whose output was cached is not among them."""
        nodes = [data.get("node") for data in self.of_type("executing")]
        return [node for node in nodes if node is not None]

    def shown(self, key: str, node_id: str | None = None) -> list[Any]:
        """What the nodes (or one node) showed under ``key``, e.g. "images" or "text"."""
        outputs = self.outputs.values() if node_id is None else [self.outputs.get(node_id, {})]
        return [item for output in outputs for item in output.get(key, [])]

    @property
    def images(self) -> list[dict[str, str]]:
        """The saved and previewed images: filename, subfolder, type; for ``Client.fetch_image``."""
        return self.shown("images")


class Client:
    """Talks to one server. Every method blocks.

    Args:
        url: of the server, e.g. ``http://127.0.0.1:8188``.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.client_id = uuid.uuid4().hex

    def get(self, path: str, **query: str) -> bytes:
        """GET ``path``."""
        address = f"{self.url}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.read()

    def get_json(self, path: str, **query: str) -> Any:
        """GET ``path`` and decode the answer."""
        return json.loads(self.get(path, **query))

    def post(self, path: str, body: Any = None) -> Any:
        """POST ``body`` as JSON and decode the answer; None where it is empty.

        Raises:
            PromptRejected: the server answered 400, which it does to an invalid prompt.
        """
        data = json.dumps({} if body is None else body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            if error.code != 400:
                raise RuntimeError(f"POST {path}: {error.code} {error.reason}: {text[:2000]}") from None
            try:
                raise PromptRejected(json.loads(text)) from None
            except json.JSONDecodeError:
                raise PromptRejected(text) from None
        return json.loads(text) if text.strip() else None

    def system_stats(self) -> dict[str, Any]:
        """Versions, devices and memory."""
        return self.get_json("/system_stats")

    def object_info(self, node_id: str | None = None) -> dict[str, Any]:
        """The schemas of all nodes by id, or of one (an empty dict if there is no such node)."""
        return self.get_json("/object_info") if node_id is None else self.get_json(f"/object_info/{node_id}")

    def interrupt(self) -> None:
        """Interrupt what runs."""
        self.post("/interrupt")

    def free(self, unload_models: bool = True, free_memory: bool = True) -> None:
        """Unload the models and drop the cached outputs, so that the next prompt runs from the start.

        The server answers before it has done so, and tells nobody when it has; the pause is ample.
        """
        self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})
        time.sleep(0.5)

    def fetch_image(self, image: dict[str, str]) -> np.ndarray:
        """An image of ``Run.images`` as an array (height, width, 3) of uint8."""
        from PIL import Image

        wanted = {key: image[key] for key in ("filename", "subfolder", "type")}
        with Image.open(io.BytesIO(self.get("/view", **wanted))) as opened:
            return np.asarray(opened.convert("RGB"))

    def queue(
        self,
        prompt: Prompt,
        *,
        on_event: Callable[[Event], None] | None = None,
        timeout: float = 300,
        check: bool = True,
        extra_data: dict[str, Any] | None = None,
    ) -> Run:
        """Run a prompt (in API format) to its end.

        Args:
            on_event: called with each event as it comes; it may call ``interrupt``.
            timeout: in seconds, for the whole run.
            check: raise ExecutionError if a node raises; else it is ``Run.error``.
            extra_data: sent along, e.g. ``{"extra_pnginfo": {"workflow": {...}}}``.

        Raises:
            PromptRejected: the prompt is invalid.
            ExecutionError: a node raised.
            TimeoutError: no end within ``timeout``.
        """
        run = asyncio.run(asyncio.wait_for(self.follow(prompt, on_event, extra_data or {}), timeout))
        entry = self.get_json(f"/history/{run.prompt_id}").get(run.prompt_id, {})
        run.outputs = entry.get("outputs", {})
        run.status = entry.get("status", {})
        if check and run.error is not None:
            raise ExecutionError(run.error)
        return run

    async def follow(self, prompt: Prompt, on_event: Callable[[Event], None] | None, extra_data: dict[str, Any]) -> Run:
        """Queue the prompt and collect its events until the server says that it is done."""
        import aiohttp

        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            start = time.monotonic()
            body = {"prompt": prompt, "client_id": self.client_id, "extra_data": extra_data}
            run = Run((await asyncio.to_thread(self.post, "/prompt", body))["prompt_id"])
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    run.binary_messages += 1
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                content = json.loads(message.data)
                event = Event(content["type"], content.get("data") or {})
                if event.data.get("prompt_id", run.prompt_id) != run.prompt_id:
                    continue
                run.events.append(event)
                if event.type == "execution_error":
                    run.error = event.data
                elif event.type == "execution_interrupted":
                    run.interrupted = True
                if on_event is not None:
                    await asyncio.to_thread(on_event, event)
                if event.type == "executing" and event.data.get("node") is None and "prompt_id" in event.data:
                    run.seconds = time.monotonic() - start
                    return run
        raise ConnectionError("the server closed the connection in mid-run")
