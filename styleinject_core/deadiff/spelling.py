"""How checkpoints spell a Q-Former: the authors' files, LAVIS' and diffusers' differ in prefixes alone."""

from __future__ import annotations

from dataclasses import dataclass

# bert-base-uncased: [CLS] style [SEP] and [CLS] content [SEP]
WORD_IDS = {"style": (101, 2806, 102), "content": (101, 4180, 102)}
ATTENTION = {
    **{part: f"self.{part}" for part in ("query", "key", "value")},
    "out": "output.dense",
    "norm": "output.LayerNorm",
}
FEED_FORWARD = {
    "query_ffn": {"rise": "intermediate_query.dense", "fall": "output_query.dense", "norm": "output_query.LayerNorm"},
    "text_ffn": {"rise": "intermediate.dense", "fall": "output.dense", "norm": "output.LayerNorm"},
}
PROJECTION = {"norm": "LayerNorm", "rise": "dense1", "fall": "dense2"}


@dataclass(frozen=True)
class Spelling:
    """How a file names a Q-Former's parts: prefixes, and what self-attention's own projections are below."""

    bert: str
    queries: str
    vision_norm: str
    projection: str
    inner: str = "self"


def stream_keys(spelling: Spelling, depth: int) -> dict[str, str]:
    """Name in one stream's state dict -> key of the file, for every tensor that is taken as it is."""
    pairs = {"vision_norm": spelling.vision_norm, "qformer.norm": f"{spelling.bert}embeddings.LayerNorm"}
    pairs |= {f"projection.{own}": f"{spelling.projection}.{theirs}" for own, theirs in PROJECTION.items()}
    for n in range(depth):
        own, theirs = f"qformer.layers.{n}", f"{spelling.bert}encoder.layer.{n}"
        for kind, name in (("attention", "attention"), ("cross", "crossattention")):
            for part, key in ATTENTION.items():
                pairs[f"{own}.{kind}.{part}"] = f"{theirs}.{name}.{key.replace('self.', spelling.inner + '.')}"
        for kind, parts in FEED_FORWARD.items():
            pairs |= {f"{own}.{kind}.{part}": f"{theirs}.{key}" for part, key in parts.items()}
    keys = {f"{own}.{p}": f"{theirs}.{p}" for own, theirs in pairs.items() for p in ("weight", "bias")}
    return {"qformer.queries": spelling.queries, **keys}
