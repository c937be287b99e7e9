"""Workflows with monitors for the tests, on the embedded demo model, as the editor saves them."""

from __future__ import annotations

from typing import Any

LINE_ART = "demo/emoji-openmoji-line.safetensors"


class Workflow:
    """Builds one: ``node`` returns a node's id, ``link`` connects by the names of the outputs and inputs."""

    def __init__(self, name: str) -> None:
        self.content: dict[str, Any] = {"id": name, "revision": 0, "last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [],
                                        "groups": [], "config": {}, "extra": {}, "version": 0.4}  # fmt: skip

    def node(self, node_type: str, position: tuple[int, int], size: tuple[int, int], *widgets: Any) -> int:
        number = self.content["last_node_id"] = self.content["last_node_id"] + 1
        self.content["nodes"].append(
            {"id": number, "type": node_type, "pos": list(position), "size": list(size), "flags": {}, "order": number, "mode": 0,
             "inputs": [], "outputs": [], "properties": {}, "widgets_values": list(widgets)}
        )  # fmt: skip
        return number

    def link(self, origin: int, output: tuple[int, str], target: int, name: str) -> None:
        slot, kind = output
        number = self.content["last_link_id"] = self.content["last_link_id"] + 1
        outputs, inputs = self.content["nodes"][origin - 1]["outputs"], self.content["nodes"][target - 1]["inputs"]
        while len(outputs) <= slot:
            outputs.append({"name": kind, "type": kind, "links": []})
        outputs[slot] = {"name": kind, "type": kind, "links": [*outputs[slot]["links"], number]}
        inputs.append({"name": name, "type": kind, "link": number})
        self.content["links"].append([number, origin, slot, target, len(inputs) - 1, kind])


def monitored(name: str, seed: int, monitors: int = 1, steps: int = 12, adapter: str = LINE_ART) -> dict[str, Any]:
    """Demo model -> adapter -> monitors, one after another -> KSampler -> image.

    Args:
        name: the workflow's id.
        seed: of the noise; ComfyUI samples again only if it is another one.
    """
    workflow = Workflow(name)
    model = workflow.node("StyleInjectDemoModel", (0, 0), (250, 60))
    applied = workflow.node("StyleInjectLoadAndApply", (0, 120), (300, 110), adapter, 1.0)
    positive = workflow.node("StyleInjectDemoPrompt", (0, 300), (300, 110), "turtle")
    negative = workflow.node("StyleInjectDemoPrompt", (0, 470), (300, 110), "")
    latent = workflow.node("EmptyLatentImage", (0, 640), (300, 110), 64, 64, 1)
    workflow.link(model, (0, "MODEL"), applied, "model")
    last = applied
    for index in range(monitors):
        monitor = workflow.node("StyleInjectRouterMonitor", (350 + 470 * index, 0), (440, 500), "all")
        workflow.link(last, (0, "MODEL"), monitor, "model")
        last = monitor
    sampler = workflow.node("KSampler", (350, 560), (300, 270), seed, "fixed", steps, 3.0, "euler", "normal", 1.0)
    for origin, kind, target in ((last, "MODEL", "model"), (positive, "CONDITIONING", "positive"),
                                 (negative, "CONDITIONING", "negative"), (latent, "LATENT", "latent_image")):  # fmt: skip
        workflow.link(origin, (0, kind), sampler, target)
    decoded = workflow.node("StyleInjectDemoDecode", (700, 560), (250, 90), 4)
    shown = workflow.node("PreviewImage", (1000, 560), (250, 270))
    workflow.link(sampler, (0, "LATENT"), decoded, "samples")
    workflow.link(decoded, (0, "IMAGE"), shown, "images")
    return workflow.content


def monitor_ids(workflow: dict[str, Any]) -> list[str]:
    """Execution ids of the monitors outside of subgraphs."""
    return [str(node["id"]) for node in workflow["nodes"] if node["type"] == "StyleInjectRouterMonitor"]
