"""What each tensor of a file is, by the end of its key: one table of every spelling, and one function that reads it.

    <module>.lora_down.weight           kohya               <module>.lora_A[.<adapter>].weight   PEFT, diffusers
    <module>_lora.down.weight           diffusers, oldest   <module>.lora.down.weight            diffusers, older
    <module>.lora_linear_layer.down...  transformers        <module>.lora_A                      Mochi
    <module>.hada_w1_a, .lokr_w1, ...   LyCORIS             <module>.diff, .diff_b, .w_norm      differences
    ....processor.qkv_lora1.down.weight XLabs, USO (Flux)   <module>.styleinject_<part>          ours

The table also knows the parts of methods that are not read (OFT, BOFT, GLoRA, IA3, VeRA, ...), so that they can be called by
their names. Keys are split at their dots and looked up: the time is linear in a key's length, whatever it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..methods import METHODS

STYLEINJECT = "StyleInject"
LORA, LOHA, LOKR, DIFFERENCE = "LoRA", "LoHa", "LoKr", "difference"
_READ = (STYLEINJECT, LORA, LOHA, LOKR, DIFFERENCE)  # the kinds whose parts are read; beside them, every registered method
ANY = "any"  # alpha and the like: parts of whatever method the module has

_STYLEINJECT_END = "styleinject_"
_SIDES = {"down": "down", "up": "up", "A": "down", "B": "up", "mid": "mid"}

# The last components of a key -> (method, part). PEFT's adapter names are taken out before the look-up.
_ENDS: dict[str, tuple[str, str]] = {
    "alpha": (ANY, "alpha"),
    "dora_scale": (ANY, "dora_scale"),
    "lora_magnitude_vector": (ANY, "magnitude"),
    "lora_magnitude_vector.weight": (ANY, "magnitude"),
    "lora_A": (LORA, "down"),
    "lora_B": (LORA, "up"),
    "lora_embedding_A": ("LoRA of an embedding", "down"),
    "lora_embedding_B": ("LoRA of an embedding", "up"),
    "reshape_weight": ("a Control LoRA that widens layers", "reshape_weight"),
    "diff": (DIFFERENCE, "weight"),
    "w_norm": (DIFFERENCE, "weight"),
    "diff_b": (DIFFERENCE, "bias"),
    "b_norm": (DIFFERENCE, "bias"),
    "set_weight": ("weights that are replaced (set_weight)", "set_weight"),
    "oft_blocks": ("OFT or BOFT", "blocks"),
    "oft_diag": ("OFT", "blocks"),
    "oft_R": ("OFT", "blocks"),
    "oft_R.weight": ("OFT", "blocks"),
    "oft_r": ("OFT", "blocks"),
    "boft_R": ("BOFT", "blocks"),
    "boft_s": ("BOFT", "scale"),
    "rescale": ("OFT or BOFT", "rescale"),
    "ia3_l": ("IA3", "scale"),
    "on_input": ("IA3", "on_input"),
    "vera_lambda_b": ("VeRA", "b"),
    "vera_lambda_d": ("VeRA", "d"),
    "vera_A": ("VeRA", "A"),
    "vera_B": ("VeRA", "B"),
    "lora_E": ("AdaLoRA", "E"),
    "ranknum": ("AdaLoRA", "ranks"),
    "fourierft_spectrum": ("FourierFT", "spectrum"),
    "hra_u": ("HRA", "u"),
    "delora_lambda": ("DeLoRA", "lambda"),
    "randlora_lambda": ("RandLoRA", "lambda"),
    "randlora_gamma": ("RandLoRA", "gamma"),
    "shira_weight": ("SHiRA", "weight"),
}
for _side, _part in _SIDES.items():
    for _spelling in (f"lora_{_side}", f"lora.{_side}", f"lora_linear_layer.{_side}"):
        _ENDS[f"{_spelling}.weight"] = (LORA, _part)
        _ENDS[f"{_spelling}.bias"] = (LORA, f"{_part}_bias")
for _part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"):
    _ENDS[f"hada_{_part}"] = (LOHA, _part)
for _part in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2"):
    _ENDS[f"lokr_{_part}"] = (LOKR, _part)
for _part in ("a1", "a2", "b1", "b2", "bm1", "bm2"):
    _ENDS[f"{_part}.weight"] = ("GLoRA", _part)
_LONGEST = max(end.count(".") for end in _ENDS) + 1
_OF_PEFT = ("lora_", "hada_", "lokr_", "oft_R", "boft_", "ia3_l", "vera_")
_BEFORE_ADAPTER = {end.removesuffix(".weight").removesuffix(".bias") for end in _ENDS if end.startswith(_OF_PEFT)}

# XLabs' and USO's attention processors of Flux -> the layer, as ComfyUI's loader has it for USO's files.
_FLUX_PROCESSORS = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
    "qkv_lora": "linear1_qkv",
    "proj_lora": "linear2",
}


@dataclass(frozen=True)
class Key:
    """One tensor's place in an adapter.

    Args:
        module: the module's name as it stands in the file (XLabs' processors as the layers they are).
        method: a kind that is read (`is_read`), ANY, or the title of one that is not.
        part: which tensor of that method.
        adapter: PEFT's name of the adapter, "" where the key has none.
    """

    module: str
    method: str
    part: str
    adapter: str = ""


def parse(key: str) -> Key | None:
    """What a file's tensor is; None where its key is of no known kind.

    Args:
        key: of a tensor in a safetensors file.
    """
    parts = key.rsplit(".", _LONGEST + 1)
    for start, word in enumerate(parts[1:], 1):  # ours first: a part may contain a dot
        if word.startswith(_STYLEINJECT_END):
            part = ".".join([word.removeprefix(_STYLEINJECT_END), *parts[start + 1 :]])
            return Key(".".join(parts[:start]), STYLEINJECT, part)
    if found := _old_processor(parts):
        return found
    for length in range(min(_LONGEST, len(parts) - 1), 0, -1):
        if known := _ENDS.get(".".join(parts[-length:])):
            return Key(".".join(parts[:-length]), *known)
    return _with_adapter_name(parts) or _of_a_method(key)


def is_read(kind: str) -> bool:
    """Whether the parts of a kind can be made into layers."""
    return kind in _READ or kind in METHODS


def _of_a_method(key: str) -> Key | None:
    """A part of a registered method whose suffixes are nobody else's."""
    for method in METHODS.values():
        for part, suffix in method.suffixes.items():
            if key.endswith(suffix) and len(key) > len(suffix):
                return Key(key.removesuffix(suffix), method.name, part)
    return None


def _old_processor(parts: list[str]) -> Key | None:
    """`<module>_lora.down.weight`, where the module's last component itself ends in "_lora"."""
    if len(parts) < 3 or parts[-1] not in ("weight", "bias") or parts[-2] not in ("down", "up", "mid"):
        return None
    before, part = parts[:-3], _SIDES[parts[-2]] + ("_bias" if parts[-1] == "bias" else "")
    if parts[-3] in _FLUX_PROCESSORS and before and (before[-1] == "processor" or before[-1].endswith(".processor")):
        block = ".".join(before).removesuffix(".processor")
        return Key(f"{block}.{_FLUX_PROCESSORS[parts[-3]]}", LORA, part)
    if not parts[-3].endswith("_lora"):
        return None
    return Key(".".join([*before, parts[-3].removesuffix("_lora")]), LORA, part)


def _with_adapter_name(parts: list[str]) -> Key | None:
    """`<module>.lora_A.<adapter>.weight`, `<module>.lora_magnitude_vector.<adapter>`: what PEFT keeps of a running model."""
    tail = parts[-1] if parts[-1] in ("weight", "bias") else ""
    before = parts[:-1] if tail else parts
    if len(before) < 3 or before[-2] not in _BEFORE_ADAPTER:
        return None
    end = before[-2] + (f".{tail}" if tail else "")
    known = _ENDS.get(end)
    return Key(".".join(before[:-2]), *known, before[-1]) if known else None
