"""Turn a workflow saved by the graph editor into the prompt that the editor would queue.

A saved workflow has nodes with positional ``widgets_values`` and numbered links; the server wants
inputs by name. The order of the widgets comes from the server's ``/object_info``. What the editor does on
queueing is done here too: muted nodes are left out, bypassed ones and Reroutes passed through.

Not supported, and said so: subgraphs and group nodes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MUTED, BYPASSED = 2, 4
EDITOR_ONLY = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
CONTROL_VALUES = {"fixed", "increment", "decrement", "randomize"}

Node = dict[str, Any]
Link = tuple[Any, int]  # origin node id, origin slot


class WorkflowError(ValueError):
    """The workflow cannot be turned into a prompt."""


def to_prompt(workflow: dict[str, Any] | str | Path, object_info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The prompt, in API format, of a workflow (or of the file it is saved in).

    Args:
        workflow: the saved workflow, or its path.
        object_info: the server's ``/object_info``.

    Raises:
        WorkflowError: an unknown node, or widget values that do not fit the node's schema.
    """
    if not isinstance(workflow, dict):
        workflow = json.loads(Path(workflow).read_text(encoding="utf-8"))
    graph = Graph(workflow)
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in EDITOR_ONLY or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if node["type"] not in object_info:
            raise WorkflowError(f"node {node['id']}: the server has no {node['type']!r} (subgraphs are not supported)")
        inputs = widget_inputs(node, object_info[node["type"]])
        for slot in node.get("inputs") or ():
            if slot.get("link") is None:
                continue
            origin = graph.origin(slot["link"])
            if origin is not None:
                inputs[slot["name"]] = [str(origin[0]), origin[1]]
            elif not slot.get("widget"):
                inputs.pop(slot["name"], None)
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


class Graph:
    """The nodes and links of a workflow."""

    def __init__(self, workflow: dict[str, Any]) -> None:
        self.nodes: dict[Any, Node] = {node["id"]: node for node in workflow["nodes"]}
        self.links: dict[Any, Link] = {}
        for link in workflow.get("links") or ():
            if isinstance(link, dict):
                self.links[link["id"]] = (link["origin_id"], link["origin_slot"])
            else:  # [id, origin id, origin slot, target id, target slot, type]
                self.links[link[0]] = (link[1], link[2])

    def origin(self, link_id: Any) -> Link | None:
        """The output that a link comes from in the end, through Reroutes and bypassed nodes; None if from none.

        A PrimitiveNode is none: the editor has written its value into the widget it is linked to.
        """
        for _ in range(len(self.nodes) + 1):
            if link_id not in self.links:
                raise WorkflowError(f"there is no link {link_id}")
            node_id, slot = self.links[link_id]
            node = self.nodes[node_id]
            if node["type"] == "PrimitiveNode" or node.get("mode", 0) == MUTED:
                return None
            if node["type"] == "Reroute":
                through = node["inputs"][0]
            elif node.get("mode", 0) == BYPASSED:
                through = self.bypass_input(node, slot)
            else:
                return node_id, slot
            if through is None or through.get("link") is None:
                return None
            link_id = through["link"]
        raise WorkflowError("the links go round in a circle")

    @staticmethod
    def bypass_input(node: Node, slot: int) -> dict[str, Any] | None:
        """The input that a bypassed node passes to output ``slot``: of its type, the one of its number first."""
        wanted = node["outputs"][slot]["type"]
        inputs = node.get("inputs") or []
        ordered = inputs[slot : slot + 1] + inputs
        return next((entry for entry in ordered if entry["type"] == wanted), None)


def is_widget(spec: list) -> bool:
    """Whether an input of ``/object_info`` is a widget in the editor."""
    options = spec[1] if len(spec) > 1 else {}
    if options.get("forceInput"):
        return False
    return isinstance(spec[0], list) or spec[0] in WIDGET_TYPES or "widgetType" in options


def ordered_inputs(schema: dict[str, Any]) -> list[tuple[str, list]]:
    """The inputs of a node with their specifications, in the editor's order."""
    groups = schema["input"]
    order = schema.get("input_order") or {}
    return [
        (name, groups[group][name])
        for group in ("required", "optional")
        if group in groups
        for name in order.get(group, groups[group])
    ]


def widget_inputs(node: Node, schema: dict[str, Any]) -> dict[str, Any]:
    """The values of a node's widgets by name."""
    widgets = [(name, spec) for name, spec in ordered_inputs(schema) if is_widget(spec)]
    saved = node.get("widgets_values") or []
    if isinstance(saved, dict):
        return {name: saved[name] for name, _ in widgets if name in saved}
    values = list(saved)
    inputs: dict[str, Any] = {}
    for name, spec in widgets:
        if not values:
            options = spec[1] if len(spec) > 1 else {}
            if "default" in options:  # an input that the node got after the workflow was saved
                inputs[name] = options["default"]
            continue
        inputs[name] = values.pop(0)
        check(node, name, spec, inputs[name])
        if has_control(name, spec) and values and values[0] in CONTROL_VALUES:
            values.pop(0)
    uploads = sum(bool(len(spec) > 1 and any(k.endswith("_upload") for k in spec[1])) for _, spec in widgets)
    if len(values) > uploads:  # each upload button saves a value of its own, at the end
        raise WorkflowError(f"node {node['id']} ({node['type']}): {len(values)} widget values too many: {values}")
    return inputs


def has_control(name: str, spec: list) -> bool:
    """Whether the editor puts a "control after generate" widget, which saves a value, behind this one."""
    options = spec[1] if len(spec) > 1 else {}
    return bool(options.get("control_after_generate", spec[0] == "INT" and name in ("seed", "noise_seed")))


def check(node: Node, name: str, spec: list, value: Any) -> None:
    """Raise WorkflowError if a saved value cannot be one of this widget: the values are out of step."""
    numbers = isinstance(value, (int, float)) and not isinstance(value, bool)
    wrong = {
        "INT": not numbers,
        "FLOAT": not numbers,
        "BOOLEAN": not isinstance(value, bool),
        "STRING": not isinstance(value, str),
    }.get(spec[0] if isinstance(spec[0], str) else "", False)
    if wrong:
        raise WorkflowError(f"node {node['id']} ({node['type']}): {name} is {spec[0]}, the saved value is {value!r}")
