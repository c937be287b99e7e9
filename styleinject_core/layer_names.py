"""The grammar of layer names: what a layer's name says about it, in one place for everything that asks.

A name is the path of a module in a diffusion model, in diffusers' spelling or in ComfyUI's own, where that differs:

    U-Nets            down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q
    Flux, Chroma      transformer_blocks.3.attn.add_q_proj, single_transformer_blocks.9.proj_mlp; double_blocks, single_blocks
    SD 3, Qwen-Image  transformer_blocks.3.attn.to_q, .ff_context.net.2, .txt_mlp.net.2; joint_blocks.3.x_block.attn.qkv
    Z-Image, Lumina2  layers.3.attention.to_q, noise_refiner.0.feed_forward.w1, context_refiner.1.attention.qkv
    Wan               blocks.3.attn1.to_q, blocks.3.attn2.add_k_proj; blocks.3.self_attn.q, blocks.3.cross_attn.k_img

and other transformers that are built of the same words (`layer_vocabulary`). kohya's spelling, which has "_" for ".", is read
where a name begins with one of its prefixes. What a name does not say is left empty: nothing here guesses by sizes. From the
parts follow the layer selector's words (`LayerName.words`, `groups`) and labels for people.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from . import layer_vocabulary as vocabulary

THIRDS = ("first", "middle", "last")
# The selector's words for groups, in the order in which messages list them.
WORDS = (
    *("all", "attention", "conv", "linear", "self", "cross", "feed-forward", "text", "image", "down", "mid", "up"),
    *("single", "refiner", *THIRDS, "queries", "keys", "values", "outputs", "default"),
)
_PROJECTIONS = {"queries": ("q", "qkv"), "keys": ("k", "qkv", "kv"), "values": ("v", "qkv", "kv"), "outputs": ("out",)}


@dataclass(frozen=True)
class LayerName:
    """What a layer's name says; empty, or None, where it says nothing.

    Args:
        text: the name itself.
        side: of a U-Net: "down", "mid" or "up".
        stack: of a transformer, which of its lists of blocks: "block" (the main one; blocks of two streams where there
            are such), "single" (blocks of one stream that follow them) or "refiner" (what prepares the tokens of one kind).
        block: the number of the block in its side (a U-Net's level) or stack.
        index: of a U-Net: the attention or residual block in its level, and the transformer block in that attention.
        kind: "attention", "feed-forward", "fused" (an attention's and a feed-forward's projections in one layer), "conv",
            "modulation", "time" (embeds the time step, guidance or a pooled prompt), "embedding" (of the input tokens),
            "output", "norm" or "other".
        attention: "self", "cross", or "joint": prompt and image attend to each other as one sequence.
        projection: of attention: "q", "k", "v", "out", or those that one layer computes together: "qkv", "kv".
        stream: whose tokens the layer is applied to: "image", "text" (the prompt's), "both", or "reference" (those of a
            picture beside the prompt).
        third: where its block is in the model, "first", "middle" or "last"; a U-Net's sides are its thirds. A transformer's
            are known from all of its layers' names only: `parse_all`.
    """

    text: str
    side: str = ""
    stack: str = ""
    block: int | None = None
    index: tuple[int, ...] = ()
    kind: str = "other"
    attention: str = ""
    projection: str = ""
    stream: str = ""
    third: str = ""

    @property
    def target(self) -> str:
        """The end that says what the layer is, as configs name targets: "to_q", "conv1", "to_out.0"."""
        parent, _, last = self.text.rpartition(".")
        return f"{parent.rpartition('.')[2]}.{last}" if last.isdigit() else last

    @property
    def end(self) -> str:
        """The last part that is no number: "to_q", "conv1", "to_out"."""
        return _end(_parts(self.text))

    def ends_with(self, term: str) -> bool:
        """Whether the name is, or ends with, these modules: "to_q", "attn2.to_k"; a number at its end may be left out."""
        path = "." + ".".join(_parts(self.text))
        return self.text == term or path.endswith(f".{term}") or re.sub(r"\.\d+$", "", path).endswith(f".{term}")

    @property
    def has_tokens(self) -> bool:
        """Whether it is applied to tokens or pixels; time, guidance and modulation layers have one row per image."""
        return self.kind not in ("modulation", "time")

    @property
    def is_default(self) -> bool:
        """Whether it computes queries or values of attention, which the paper adapts.

        In joint attention those of the image's tokens, or of both; not those of the prompt's or of a reference picture's.
        """
        return (
            self.projection in ("q", "v", "qkv", "kv")
            and self.stream != "reference"
            and (self.stream != "text" or self.attention == "cross")
        )

    @property
    def numbered(self) -> str:
        """The block in the selector's words, as in "down.1", "block.3", "single.0"; empty without a number."""
        place = self.side or self.stack
        return f"{place}.{self.block}" if place and self.block is not None else ""

    @property
    def block_label(self) -> str:
        """The part of the model it is in, for people: "down 1", "mid", "up 0"; else the beginning of its name."""
        if self.side == "mid":
            return self.side
        return f"{self.side} {self.block}" if self._has_level else ".".join(self.text.split(".")[:2])

    @property
    def _has_level(self) -> bool:
        return self.side == "mid" or (self.side != "" and self.block is not None)

    @property
    def role_label(self) -> tuple[str, ...]:
        """What it does in its block, in up to two words: ("self", "to_q"), ("res", "conv1"), ("grow", "conv")."""
        if not self.side and not self.stack:
            return ()
        parts = self.text.split(".")
        word = self.attention or ("ff" if self.kind == "feed-forward" else "")
        if self.side:
            word = next((word for part, word in vocabulary.ROLES.items() if part in parts), "")
        return tuple(part for part in (word, self.end) if part)

    @property
    def label(self) -> str:
        """The layer for people: "down 1.0 self to_q"; a transformer's names are short enough as they are."""
        if not self._has_level:
            return self.text
        numbers = self.index if len(self.index) < 2 or self.index[1] else self.index[:1]
        return " ".join(["".join([self.block_label, *(f".{n}" for n in numbers)]), *self.role_label])

    def words(self, is_conv: bool) -> tuple[str, ...]:
        """The selector's words that choose it.

        Args:
            is_conv: whether the layer is a convolution, which its shape says and not its name.
        """
        has = {
            "all": True,
            "attention": self.kind in ("attention", "fused"),
            "conv": is_conv,
            "linear": not is_conv,
            # Joint attention is the image's attention to itself; the prompt enters by its own projections.
            "self": self.attention == "self" or (self.attention == "joint" and self.stream != "text"),
            "cross": self.attention == "cross" or (self.attention == "joint" and self.stream == "text"),
            "feed-forward": self.kind in ("feed-forward", "fused"),
            "text": self.stream in ("text", "both"),
            "image": self.stream in ("image", "both"),
            "default": self.is_default,
            **{word: self.projection in which for word, which in _PROJECTIONS.items()},
        }
        also = {self.side, self.stack, self.third}
        return tuple(word for word in WORDS if has.get(word, word in also))


def is_block(module: str) -> bool:
    """Whether a module of this name is one of the blocks that a model runs one after the other."""
    if vocabulary.UNET_BLOCK.fullmatch(module):
        return True
    parts = module.split(".")
    return len(parts) == 2 and parts[0] in vocabulary.STACKS and _number(parts[1]) is not None


def dotted(text: str) -> str:
    """Kohya's spelling without its prefix, "down_blocks_0_attentions_0_proj_in", with dots between the names of modules."""
    return ".".join(m[1] for m in vocabulary.KOHYA_WORD.finditer(text))


@lru_cache(maxsize=16384)
def parse(name: str) -> LayerName:
    """What one name says by itself; see `parse_all` for what only all names of a model say."""
    parts = _parts(name)
    if side := vocabulary.SIDES.get(parts[0], ""):
        return _in_a_unet(name, parts, side)
    for place, part in enumerate(parts[:-2]):
        if part in vocabulary.STACKS and (number := _number(parts[place + 1])) is not None:
            refined = bool(vocabulary.TEXT_REFINERS & set(parts[:place]))
            if place and not refined and parts[:place] != [part for part in parts[:place] if part in vocabulary.HOLDERS]:
                break  # blocks of something else: a text encoder, an adapter inside of the model
            stack = vocabulary.Stack("refiner", "text", "self") if refined else vocabulary.STACKS[part]
            if parts[place + 1].startswith("block"):
                stack = replace(stack, attn="")  # Cosmos: what its attention is depends on its order in the block
            return _in_a_block(name, parts[place + 2 :], stack, number)
    return _outside(name, parts)


def parse_all(names: Iterable[str]) -> dict[str, LayerName]:
    """Every name with what it says among the others: name -> LayerName.

    Blocks of transformers get their thirds, of as many blocks as the names have, counted as they run: those of two streams
    before those of one. An "attn2" beside an "attn" in the same list of blocks is SD 3.5's second self-attention.
    """
    parsed = {name: parse(name) for name in names}
    counts: dict[str, int] = defaultdict(int)
    joint = set()
    for layer in parsed.values():
        if layer.stack and layer.block is not None:
            counts[layer.stack] = max(counts[layer.stack], layer.block + 1)
        if layer.stack == "block" and layer.attention == "joint":
            joint.add(_parts(layer.text)[0])
    return {name: _among(layer, counts["block"], counts["single"], joint) for name, layer in parsed.items()}


def groups(names: Iterable[str], convolutions: Collection[str] = ()) -> dict[str, list[str]]:
    """Which layers each word of the selector chooses: those of `WORDS`, of which some choose none, then blocks ("down.1").

    Args:
        convolutions: those of the names that are convolutions.
    """
    found: dict[str, list[str]] = {word: [] for word in WORDS}
    blocks: dict[str, list[str]] = {}
    for name, layer in parse_all(names).items():
        for word in layer.words(name in convolutions):
            found[word].append(name)
        if layer.numbered:
            blocks.setdefault(layer.numbered, []).append(name)
    order = sorted(blocks, key=lambda block: (block.split(".")[0], int(block.split(".")[1])))
    return found | {block: blocks[block] for block in order}


def _among(layer: LayerName, blocks: int, singles: int, joint: set[str]) -> LayerName:
    if layer.stack not in ("block", "single") or layer.block is None:
        return layer
    place = layer.block + (blocks if layer.stack == "single" else 0)
    third = THIRDS[(2 * place + 1) * 3 // (2 * (blocks + singles))]
    if layer.attention == "cross" and "attn2" in (parts := _parts(layer.text)) and parts[0] in joint:
        return replace(layer, third=third, attention="self", stream="image")
    return replace(layer, third=third)


def _parts(name: str) -> list[str]:
    for prefix in vocabulary.KOHYA_PREFIXES:
        if name.startswith(prefix):
            return dotted(name.removeprefix(prefix).lstrip("_")).split(".")
    for prefix in vocabulary.PREFIXES:
        name = name.removeprefix(prefix)
    return re.sub(r"\b(img|txt)_attn_(qkv|proj)\b", r"\1_attn.\2", name).split(".")  # HunyuanVideo's LoRA files


def _number(part: str) -> int | None:
    number = part.removeprefix("block")  # Cosmos counts "blocks.block0"
    return int(number) if number.isdigit() else None


def _end(parts: list[str]) -> str:
    return next((part for part in reversed(parts) if not part.isdigit()), "")


def _projection(end: str) -> str:
    if match := vocabulary.PROJECTION.fullmatch(end):
        return {"query": "q", "key": "k", "value": "v"}.get(match[1], match[1])
    return "out" if end in vocabulary.OUTPUTS else ""


def _in_a_unet(name: str, parts: list[str], side: str) -> LayerName:
    end = _end(parts)
    block = _number(parts[1]) if parts[0] in ("down_blocks", "up_blocks") else None
    inner = parts[1:-1]
    attends = any(re.fullmatch(r"attn\d*", part) for part in inner)
    attention = "self" if "attn1" in inner else "cross" if "attn2" in inner else ""
    kind = "attention" if attends else "feed-forward" if "ff" in inner else "other"
    if kind == "other" and end.startswith("conv"):
        kind = "conv"
    elif kind == "other":
        kind = "modulation" if end == "time_emb_proj" else "norm" if vocabulary.NORM.fullmatch(end) else kind
    index = [int(after) for part, after in zip(inner, parts[2:], strict=True) if part in vocabulary.LISTS and after.isdigit()]
    projection = _projection(end) if attends or end.startswith("to_") else ""
    stream = "text" if attention == "cross" and projection in ("k", "v") else "image"
    third = dict(zip(("down", "mid", "up"), THIRDS, strict=True))[side]
    return LayerName(name, side, "", block, tuple(index), kind, attention, projection, stream, third)


def _in_a_block(name: str, body: list[str], stack: vocabulary.Stack, number: int) -> LayerName:
    end, words = _end([part for part in body if part not in vocabulary.STREAMS]), set(body)
    attention = next((part for part in body if part in vocabulary.ATTENTIONS), "")
    kind, projection = "other", ""
    if vocabulary.MODULATION.search(".".join(body)):
        kind, attention = "modulation", ""
    elif any(vocabulary.NORM.fullmatch(part) for part in body[-2:]):
        kind, attention = "norm", ""
    elif stack.name == "single" and (end in vocabulary.FUSED or body == ["attn", "to_out"]):  # the latter is Flux 2's
        kind, projection, attention = "fused", vocabulary.FUSED.get(end, "out"), "attn"
    elif attention:
        kind, projection = "attention", _projection(end)
    elif words & vocabulary.FEED_FORWARDS:
        kind = "feed-forward"
    elif any("attn" in part or "attention" in part for part in body):
        kind, projection = "attention", _projection(end)  # of a kind that is not in the table
    how = "" if not attention else vocabulary.ATTENTIONS[attention] or stack.attn
    stream = stack.stream
    if how == "cross":
        stream = "reference" if end in vocabulary.REFERENCE else "text" if projection in ("k", "v", "kv") else stream
    elif stream == "image" and stack.name == "block":
        stream = "text" if words & vocabulary.TEXT else stream
        if how == "self" and stream == "text":
            how = "joint"  # of two streams, the prompt's side
    if stack == vocabulary.STACKS["blocks"] and end in vocabulary.KREA:
        stream, how = "both", "joint" if how else ""
    if stack == vocabulary.STACKS["blocks"] and body[0] in vocabulary.COGVIDEO:
        kind, stream = vocabulary.COGVIDEO[body[0]], "both"
        how, projection = ("joint", _projection(end)) if kind == "attention" else ("", "")
    if body[-1] in vocabulary.STREAMS and how:
        stream, how = vocabulary.STREAMS[body[-1]], "joint"
    return LayerName(name, "", stack.name, number, (), kind, how, projection, stream)


def _outside(name: str, parts: list[str]) -> LayerName:
    if vocabulary.MODULATION.search(name):
        return LayerName(name, kind="modulation")
    if "time_text_embed" in parts:
        return LayerName(name, kind="time")  # its text is a pooled prompt
    for part in reversed(parts):
        if vocabulary.TIME.fullmatch(part):
            return LayerName(name, kind="time")
        if part in vocabulary.EMBEDDINGS:
            return LayerName(name, kind="embedding", stream=vocabulary.EMBEDDINGS[part])
        if part in vocabulary.OUTPUT:
            return LayerName(name, kind="output", stream="image")
    end = _end(parts)
    return LayerName(name, projection=_projection(end) if end.startswith("to_") else "")  # of whatever attends there
