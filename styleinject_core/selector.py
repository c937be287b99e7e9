"""The layer selector: one small language for "which layers", shared by nodes, files and the command line.

    all                       every layer
    attention, feed-forward   by kind
    conv, linear              convolutions, and the others
    self, cross               self- and cross-attention; where prompt and image attend to each other as one sequence (Flux,
                              SD 3, Z-Image), cross is the prompt's own projections and self the rest
    image, text               layers that are applied to the image's tokens, to the prompt's (those of both are in either)
    queries, keys, values,    what attention computes with, by whatever name the model has them; several of them, where one
    outputs                   layer computes several
    default                   what the paper adapts: queries and values of attention, by whatever name the model has them
    down, mid, up             by part of a U-Net
    first, middle, last       by thirds of a transformer's blocks, in the order they run in; the same three parts of a U-Net
    single, refiner           a transformer's blocks of one stream that follow those of two (Flux), and its refiners
    down.1, up.0              one level of a U-Net
    block.3, single.0-9       one block of a transformer, or several; "blocks.3" is the same
    to_q, attn2.to_k, ...     by the end of the module's name
    *transformer_blocks.3.*   by a pattern with * over the whole name
    cross & up                both                  down, mid   either            !to_v   not

"," and newlines separate alternatives, "&" binds tighter, "!" negates one term; alternatives that begin with "!" take
away from what the others selected (from all, if there are none): "up, !to_v". Weights are written `selector = number`,
one per line or ";", later ones override earlier ones: "down = 0.5; up & cross = 1.2". A number after "*" multiplies the
weight the lines before it gave ("up = *0.5"), and a line that begins with "?" may match nothing ("?cross = 0").

What each word means for a name is `styleinject_core.layer_names`. Thirds are of the layers that are chosen from.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .layer_names import groups, parse
from .layers import LayerShape

_BLOCKS = re.compile(r"(down|up|single|refiner|blocks?)\.(\d+)(?:-(\d+))?")


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
    return _Selection(layers).choose(selector)


def parse_weights(layers: dict[str, LayerShape], text: str) -> dict[str, float]:
    """A weight per layer from lines `selector = number`; layers no line names have weight 1.

    Raises:
        SelectorError: a line without "=", a weight that is no finite number, or a selector that matches nothing.
    """
    weights = dict.fromkeys(layers, 1.0)
    selection = _Selection(layers)
    for line in _weight_lines(text):
        chosen = selection.of(line)
        weights.update({name: weights[name] * line.weight if line.multiplies else line.weight for name in chosen})
    return weights


def unmatched_weights(layers: dict[str, LayerShape], text: str) -> list[str]:
    """The selectors of layer weights that may match nothing, and match none of these layers."""
    selection = _Selection(layers)
    return _unique(line.selector for line in _weight_lines(text) if not selection.of(line))


@dataclass(frozen=True)
class _WeightLine:
    selector: str
    weight: float
    multiplies: bool
    optional: bool


def _weight_lines(text: str) -> Iterator[_WeightLine]:
    for line in filter(None, map(str.strip, re.split(r"[;\n]", text))):
        selector, equals, number = line.rpartition("=")
        multiplies = number.lstrip().startswith("*")
        try:
            weight = float(number.replace("*", "", 1) if multiplies else number)
        except ValueError:
            weight = math.nan
        if not equals or not math.isfinite(weight):
            raise SelectorError(f'layer weight {line!r}: expected "selector = number", as in "up & cross = 0.5"')
        yield _WeightLine(selector.removeprefix("?").strip(), weight, multiplies, line.startswith("?"))


class _Selection:
    """Layers to choose from, with the groups that their names and shapes put them in."""

    def __init__(self, layers: dict[str, LayerShape]):
        self.layers = layers
        self.groups = groups(layers, {name for name, shape in layers.items() if shape.is_conv})

    def choose(self, selector: str) -> set[str]:
        """See `select`."""
        alternatives = [a.strip() for a in re.split(r"[,\n]", selector) if a.strip()]
        if not alternatives:
            raise SelectorError('empty layer selector: write "all" for every layer')
        chosen: set[str] = set()
        removed: set[str] = set()
        removing = [a for a in alternatives if a.startswith("!") and "&" not in a]  # in "!up & cross" the ! is of "up" alone
        only_removes = len(removing) == len(alternatives)
        for alternative in alternatives:
            if alternative in removing:
                removed |= self._conjunction(alternative[1:])
            else:
                chosen |= self._conjunction(alternative)
        selected = (set(self.layers) if only_removes else chosen) - removed
        if not selected:
            raise NothingMatchedError(f"layer selector {selector!r} leaves none of the {len(self.layers)} layers")
        return selected

    def of(self, line: _WeightLine) -> set[str]:
        """The layers a weight is for; none only for a line that may match none."""
        try:
            return self.choose(line.selector)
        except NothingMatchedError:
            if line.optional:
                return set()
            raise

    def _conjunction(self, text: str) -> set[str]:
        """The layers that satisfy every &-joined term of one alternative."""
        matched = set(self.layers)
        for raw in text.split("&"):
            term = raw.strip()
            negated = term.startswith("!")
            term = term.lstrip("!").strip()
            hits = self._term(term) if term else set()
            if not hits:
                raise NothingMatchedError(self._nothing_matched(term))
            matched = matched - hits if negated else matched & hits
        if not matched:
            raise NothingMatchedError(f"layer selector {text.strip()!r}: no layer satisfies all of its terms at once")
        return matched

    def _term(self, term: str) -> set[str]:
        if term in self.groups:
            return set(self.groups[term])
        if block := _BLOCKS.fullmatch(term):
            return self._blocks(block[1].removesuffix("s"), int(block[2]), int(block[3] or block[2]))
        if "*" in term:
            return {name for name in self.layers if fnmatch.fnmatchcase(name, term)}
        return {name for name in self.layers if parse(name).ends_with(term)}

    def _blocks(self, stack: str, first: int, last: int) -> set[str]:
        chosen: set[str] = set()
        for word, names in self.groups.items():
            place, dot, number = word.partition(".")
            if dot and place == stack and first <= int(number) <= last:
                chosen.update(names)
        return chosen

    def _nothing_matched(self, term: str) -> str:
        words = _listed(word for word, names in self.groups.items() if names)
        projections = set().union(*(self.groups.get(word, ()) for word in ("queries", "keys", "values")))
        ends = sorted({parse(name).end for name in projections or self.layers})  # words reach the rest
        return f"layer selector term {term!r} matches none of the {len(self.layers)} layers; these have: " + ", ".join(
            _unique([*words, *ends[:12]])
        )


def _listed(words: Iterable[str]) -> Iterator[str]:
    """Words as they are; of blocks a U-Net's few levels, but a transformer's many as one range: "block.0-29"."""
    blocks: dict[str, list[int]] = {}
    for word in words:
        stack, dot, number = word.partition(".")
        if dot and stack not in ("down", "up"):
            blocks.setdefault(stack, []).append(int(number))
        else:
            yield word
    for stack, numbers in blocks.items():
        yield f"{stack}.{min(numbers)}" + (f"-{max(numbers)}" if len(numbers) > 1 else "")


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
