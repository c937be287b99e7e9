"""ComfyUI's editor in a browser window, as a user has it: load a workflow, queue it, look into a monitor's panel."""

from __future__ import annotations

import base64
import json
from typing import Any

from client import Client

EVENT = "styleinject.router"
EXTENSIONS = ("ComfyUI-StyleInject", "extensions/styleinject")  # a clone, and what ComfyUI-Manager installs
TIMEOUT = 180_000  # milliseconds; the editor alone takes a minute to start on a busy machine
# The last thing the editor does at its start is to open the workflow of the last time, or the default one.
READY = """() => {
  const graph = window.app?.canvas && (window.app.rootGraph ?? window.app.graph);
  return graph?.nodes.length > 0 && !document.querySelector('#splash-loader');
}"""

# Every text that the line below the heat map has had, by panel.
WATCH = """() => {
  window.said = [...document.querySelectorAll('.styleinject-router .status')].map((status) => {
    const texts = [status.textContent];
    new MutationObserver(() => texts.push(status.textContent)).observe(status, {childList: true});
    return texts;
  });
}"""
# How many colors there are in the heat map.
COLORS = """(canvas) => {
  const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  const found = new Set();
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) found.add(`${data[i]},${data[i + 1]},${data[i + 2]}`);
  return found.size;
}"""


class Editor:
    """One browser window.

    Args:
        page: Playwright's, new.
        url: of the server.
        vue_nodes: how nodes are drawn: by Vue ("Nodes 2.0"), or on the canvas.
    """

    def __init__(self, page: Any, url: str, vue_nodes: bool) -> None:
        self.page = page
        self.client = Client(url)
        self.vue_nodes = vue_nodes
        self.problems: list[str] = []  # what was raised in the pack's own code
        self.messages: list[dict[str, Any]] = []  # the monitors', as they came
        page.on("pageerror", lambda error: self._note(f"{error}\n{error.stack}"))
        page.on("console", lambda message: self._note(message.text) if message.type == "error" else None)
        page.on("dialog", self._answer)
        page.on("websocket", lambda socket: socket.on("framereceived", self._received))
        self.reload()

    def reload(self) -> None:
        """As with F5."""
        drawn = {"Comfy.VueNodes.Enabled": self.vue_nodes, "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
        self.client.post("/settings", drawn)
        self.page.goto(self.client.url, wait_until="domcontentloaded", timeout=TIMEOUT)
        self.page.wait_for_function(READY, timeout=TIMEOUT)
        self.page.wait_for_timeout(500)

    def _note(self, text: str) -> None:
        if any(mark in text for mark in (*EXTENSIONS, EVENT)):
            self.problems.append(text)

    def _answer(self, dialog: Any) -> None:
        if dialog.type != "beforeunload":  # "unsaved changes"
            self.problems.append(f"dialog: {dialog.message}")
        dialog.accept()

    def _received(self, payload: str | bytes) -> None:
        if isinstance(payload, str) and f'"{EVENT}"' in payload:
            self.messages.append(json.loads(payload)["data"])

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a workflow, and bring all of it into view."""
        self.page.evaluate("(workflow) => window.app.loadGraphData(workflow)", workflow)
        self.fit()

    def fit(self) -> None:
        """Bring all nodes into view."""
        self.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_timeout(700)  # the editor glides there

    def saved(self) -> dict[str, Any]:
        """The workflow, as saving it would write it."""
        return self.page.evaluate("() => (window.app.rootGraph ?? window.app.graph).serialize()")

    def queue(self) -> None:
        """Press Run, and note from now on what the panels say."""
        self.page.evaluate(WATCH)
        self.page.evaluate("() => window.app.queuePrompt(0)")

    def panel(self, index: int = 0) -> Any:
        """A monitor's panel, of those that can be seen."""
        return self.page.locator(".styleinject-router").nth(index)

    def status(self, index: int = 0) -> str:
        """The line below a panel's heat map."""
        return self.panel(index).locator(".status").inner_text()

    def said(self, index: int = 0) -> list[str]:
        """What that line has said since the workflow was queued."""
        return self.page.evaluate("(index) => window.said[index]", index)

    def wait_for_status(self, text: str, index: int = 0) -> None:
        """Wait until a panel's line has a text in it."""
        self.panel(index).locator(".status", has_text=text).wait_for(timeout=TIMEOUT)

    def colors(self, index: int = 0) -> int:
        """How many colors there are in a panel's picture."""
        return self.panel(index).locator("canvas").evaluate(COLORS)

    def choose(self, title: str, label: str, index: int = 0) -> None:
        """Choose from one of a panel's lists, by its tooltip."""
        self.panel(index).get_by_title(title).select_option(label=label)
        self.page.wait_for_timeout(100)  # it is drawn at the next frame

    def values(self, node: str) -> dict[int, dict[str, list[list[float]]]]:
        """Step -> role -> (layers, styles), as the server has sent them for a monitor, 255 for none."""
        found: dict[int, dict[str, list[list[float]]]] = {}
        for message in (m for m in self.messages if m["node"] == node):
            data = list(base64.b64decode(message["values"]))
            for column in message["columns"]:
                for role in column["roles"]:
                    layers = [data[i * message["styles"] : (i + 1) * message["styles"]] for i in range(message["layers"])]
                    found.setdefault(column["step"], {})[role] = layers
                    del data[: message["layers"] * message["styles"]]
        return found


class Windows:
    """``windows(vue_nodes)``: a window with the editor in it, one for each way of drawing nodes; starting one takes long.

    Args:
        browser: Playwright's.
        url: of the server.
    """

    def __init__(self, browser: Any, url: str) -> None:
        self.browser, self.url = browser, url
        self.open: dict[bool, Editor] = {}

    def __call__(self, vue_nodes: bool) -> Editor:
        if vue_nodes not in self.open:
            context = self.browser.new_context(viewport={"width": 1400, "height": 900}, accept_downloads=True)
            self.open[vue_nodes] = Editor(context.new_page(), self.url, vue_nodes)
        return self.open[vue_nodes]

    def close(self) -> None:
        """Close them all."""
        for editor in self.open.values():
            editor.page.context.close()
        self.open.clear()
