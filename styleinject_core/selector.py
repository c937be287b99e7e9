"""The layer selector: one small language for "which layers", shared by nodes, files and the command line.

    all                       every layer
    attention, conv, linear   by kind               (attention: inside attn1/attn2; conv: convolutions)
    self, cross               self- and cross-attention (attn1, attn2)
    down, mid, up             by part of the U-Net
    down.1, up.0              one block of it
    to_q, attn2.to_k, ...     by the end of the module's name
    *transformer_blocks.3*    by a pattern with * over the whole name
    cross & up                both                  down, mid   either            !to_v   not

"," and newlines separate alternatives, "&" binds tighter, "!" negates one term; alternatives that begin with "!" take
away from what the others selected (from all, if there are none): "up, !to_v". Weights are written `selector = number`,
one per line or ";", later ones override earlier ones: "down = 0.5; up & cross = 1.2". A number after "*" multiplies the
weight the lines before it gave ("up = *0.5"), and a line that begins with "?" may match nothing ("?cross = 0").
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable

from .layers import LayerShape

_GROUPS = ("all", "attention", "conv", "linear", "self", "cross", "down", "mid", "up")


class SelectorError(ValueError):
    """A selector that cannot be read or that matches nothing; the message names the term."""


class NothingMatchedError(SelectorError):
    """A selector that can be read and matches nothing."""


def select(layers: dict[str, LayerShape], selector: str) -> set[str]:
    """The names of the layers a selector chooses.

    Args:
        layers: module name (diffusers spelling) -> shape.
        selector: see the module's docstring.

    Raises:
        SelectorError: an empty or malformed selector, or a term that matches none of the layers.
    """
    alternatives = [a.strip() for a in re.split(r"[,\n]", selector) if a.strip()]
    if not alternatives:
        raise SelectorError('empty layer selector: write "all" for every layer')
    chosen: set[str] = set()
    removed: set[str] = set()
    removing = [a for a in alternatives if a.startswith("!") and "&" not in a]  # in "!up & cross" the ! is of "up" alone
    only_removes = len(removing) == len(alternatives)
    for alternative in alternatives:
        if alternative in removing:
            removed |= _conjunction(layers, alternative[1:])
        else:
            chosen |= _conjunction(layers, alternative)
    selected = (set(layers) if only_removes else chosen) - removed
    if not selected:
        raise NothingMatchedError(f"layer selector {selector!r} leaves none of the {len(layers)} layers")
    return selected


def parse_weights(layers: dict[str, LayerShape], text: str) -> dict[str, float]:
    """A weight per layer from lines `selector = number`; layers no line names have weight 1.

    Raises:
        SelectorError: a line without "=", a weight that is no finite number, or a selector that matches nothing.
    """
    weights = dict.fromkeys(layers, 1.0)
    for line in re.split(r"[;\n]", text):
        if not line.strip():
            continue
        selector, equals, number = line.rpartition("=")
        optional, multiplies = selector.lstrip().startswith("?"), number.lstrip().startswith("*")
        try:
            weight = float(number.replace("*", "", 1) if multiplies else number)
        except ValueError:
            weight = math.nan
        if not equals or not math.isfinite(weight):
            raise SelectorError(f'layer weight {line.strip()!r}: expected "selector = number", as in "up & cross = 0.5"')
        try:
            chosen = select(layers, selector.lstrip().removeprefix("?"))
        except NothingMatchedError:
            if not optional:
                raise
            continue
        weights.update({name: weights[name] * weight if multiplies else weight for name in chosen})
    return weights


def _conjunction(layers: dict[str, LayerShape], text: str) -> set[str]:
    """The layers that satisfy every &-joined term of one alternative."""
    matched = set(layers)
    for raw in text.split("&"):
        term = raw.strip()
        negated = term.startswith("!")
        term = term.lstrip("!").strip()
        hits = {name for name, shape in layers.items() if _matches(name, shape, term)} if term else set()
        if not hits:
            raise NothingMatchedError(_nothing_matched(layers, term))
        matched = matched - hits if negated else matched & hits
    if not matched:
        raise NothingMatchedError(f"layer selector {text.strip()!r}: no layer satisfies all of its terms at once")
    return matched


def _matches(name: str, shape: LayerShape, term: str) -> bool:
    match term:
        case "all":
            return True
        case "attention":
            return bool(re.search(r"(^|\.)attn\d*\.", name))
        case "conv":
            return shape.is_conv
        case "linear":
            return not shape.is_conv and not shape.other
        case "self":
            return ".attn1." in name
        case "cross":
            return ".attn2." in name
        case "down" | "mid" | "up":
            return name.startswith(f"{term}_block")
    if block := re.fullmatch(r"(down|up)\.(\d+)", term):
        return name.startswith(f"{block[1]}_blocks.{block[2]}.")
    if "*" in term:
        return fnmatch.fnmatchcase(name, term)
    return name == term or name.endswith("." + term) or re.sub(r"\.\d+$", "", name).endswith("." + term)  # to_out: "to_out.0"


def _nothing_matched(layers: dict[str, LayerShape], term: str) -> str:
    present = [g for g in _GROUPS if any(_matches(n, s, g) for n, s in layers.items())]
    blocks = sorted({f"{m[1]}.{m[2]}" for n in layers if (m := re.match(r"(down|up)_blocks\.(\d+)\.", n))})
    ends = sorted({re.sub(r"\.\d+$", "", n).rsplit(".", 1)[-1] for n in layers})
    return f"layer selector term {term!r} matches none of the {len(layers)} layers; these have: " + ", ".join(
        _unique([*present, *blocks, *ends[:12]])
    )


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
