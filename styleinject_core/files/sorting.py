"""A file's tensors sorted by the module they belong to, before any of them is read: what is used, and why the rest is not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .errors import AdapterFileError
from .header import shortened
from .keys import ANY, STYLEINJECT, is_read, parse
from .names import other_model_part

_CONTROL_LORA = {"img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"}  # as ComfyUI's loader tells BFL's for Flux
_CHECKPOINT = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")


@dataclass
class Module:
    """One module's tensors in a file.

    Args:
        key: its name as it stands in the file.
        methods: method -> part -> the tensor's key.
        shared: parts of whatever method it is: alpha, magnitudes.
    """

    key: str
    methods: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)

    @property
    def refusal(self) -> str:
        """Why this module cannot be used; empty where it can."""
        if unknown := [method for method in self.methods if not is_read(method)]:
            return f"{unknown[0]} is not supported"
        if not self.methods:
            return f"{' and '.join(self.shared)} without the matrices it belongs to"
        return ""


@dataclass(frozen=True)
class Sorted:
    """What is in a file.

    Args:
        modules: those that can be read, by their names in the file.
        skipped: keys of other models' parts: text encoders, VAEs, embeddings.
        unused: module, or key, that is for the model and cannot be used -> why.
    """

    modules: dict[str, Module]
    skipped: tuple[str, ...]
    unused: dict[str, str]


def sort(name: str, keys: Iterable[str]) -> Sorted:
    """Sort the keys of a file.

    Args:
        name: the file's, for messages.

    Raises:
        AdapterFileError: nothing in it is an adapter's, or less than half of what is can be used; two adapters in one file.
    """
    keys = list(keys)
    if set(keys) >= _CONTROL_LORA:
        raise AdapterFileError(
            f"{name}: this is a Control LoRA for Flux, which widens the model's input and replaces its norms: such files are "
            "not supported, ComfyUI's Load LoRA applies them"
        )
    modules: dict[str, Module] = {}
    skipped: list[str] = []
    unused: dict[str, str] = {}
    names: dict[str, str] = {}  # PEFT's name of an adapter, "" for none -> the first key with it
    for key in keys:
        if other_model_part(key):
            skipped.append(key)
        elif found := parse(key):
            names.setdefault(found.adapter, key)
            module = modules.setdefault(found.module, Module(found.module))
            parts = module.shared if found.method == ANY else module.methods.setdefault(found.method, {})
            if found.part in parts:
                first = shortened(parts[found.part])
                raise AdapterFileError(f"{name}: {first} and {shortened(key)} are the same part of one layer, twice")
            parts[found.part] = key
        else:
            unused[key] = "a tensor of a kind that is not known"
    _check_adapters(name, names)
    refused = {key: reason for key, module in modules.items() if (reason := module.refusal)}
    read = {key: module for key, module in modules.items() if key not in refused}
    unused = {**refused, **unused}
    if not read:
        raise AdapterFileError(f"{name}: {_nothing(skipped, refused, unused)}")
    if len(read) < len(refused):
        raise AdapterFileError(f"{name}: only {len(read)} of its {len(modules)} layers can be used: {reasons(refused)}")
    return Sorted(read, tuple(skipped), unused)


def _check_adapters(name: str, names: dict[str, str]) -> None:
    """PEFT keeps several adapters on one model, and saves them together where nobody chooses."""
    plain = names.pop("", None)
    if len(names) > 1:
        listed = ", ".join(shortened(adapter) for adapter in sorted(names)[:5])
        raise AdapterFileError(f"{name}: {len(names)} adapters in one file ({listed}): save one of them alone")
    if names and plain is not None and not _names_no_adapter(plain):
        adapter = next(iter(names))
        raise AdapterFileError(
            f"{name}: two adapters in one file, {shortened(adapter)!r} and one without a name ({shortened(plain)}): "
            "save one of them alone"
        )


def _names_no_adapter(key: str) -> bool:
    """Whether a key is of a kind that PEFT never names an adapter in."""
    found = parse(key)
    return found is not None and (found.method in (ANY, STYLEINJECT) or found.part in ("weight", "bias"))


def _nothing(skipped: list[str], refused: dict[str, str], unused: dict[str, str]) -> str:
    """What a file is that has nothing to use."""
    total = len(skipped) + len(unused)
    if refused:
        return f"none of its {len(refused)} layers can be used: {reasons(refused)}"
    if any(key.startswith(_CHECKPOINT) for key in (*unused, *skipped[:100])) and not any("lora" in k for k in skipped[:100]):
        return f"this is a whole model checkpoint ({total} tensors), not an adapter"
    if skipped and not unused:
        parts = ", ".join(dict.fromkeys(part for key in skipped if (part := other_model_part(key))))
        return f"{len(skipped)} tensors, none for a U-Net layer or a transformer's: all are of {parts}"
    examples = ", ".join(shortened(key) for key in list(unused)[:3]) or "none"
    return f"no adapter inside: none of its {total} tensors is a StyleInject or LoRA layer (first: {examples})"


def reasons(unused: dict[str, str]) -> str:
    """Why modules are not used, with counts and the first few names."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in unused.items():
        by_reason.setdefault(reason, []).append(key)
    texts = []
    for reason, keys in list(by_reason.items())[:5]:
        more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
        texts.append(f"{reason} ({', '.join(map(shortened, keys[:2]))}{more})")
    return "; ".join(texts)
