"""Alphas that stand in no tensor: what PEFT and diffusers write into the header, or into a file beside the weights.

    lora_adapter_metadata   in the header: a JSON table of PEFT's LoraConfig, its fields after "unet.", "transformer.", ...
    adapter_config.json     beside the file, where PEFT has saved a folder

The increment is scaled by alpha / r, with `use_rslora` by alpha / sqrt(r); `rank_pattern` and `alpha_pattern` hold other
values for modules by name. diffusers, which reads the first, and PEFT, which reads the second, are the models of what
is computed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..config import is_finite
from .errors import AdapterFileError
from .header import parse_json, shortened

HEADER_KEY = "lora_adapter_metadata"
CONFIG_NAME = "adapter_config.json"
_PEFT_FILES = ("adapter_model",)  # stems that PEFT gives its own files
_LARGEST_CONFIG = 1 << 20  # bytes
_PREFIXES = ("base_model.model.", "unet.", "transformer.", "diffusion_model.")
_PATTERN_LIMIT = 200  # characters of a pattern that is a regular expression


@dataclass(frozen=True)
class StatedScales:
    """One LoraConfig, as far as it says how strong a module's increment is.

    Args:
        source: where it stands, for messages.
        rank, alpha: of modules that no pattern names.
        rank_pattern, alpha_pattern: values for others, by PEFT's patterns: the end of a name, or a regular expression.
        rank_stabilized: divide by the root of the rank.
        targets: names of the modules that were adapted, by their ends; empty where the config does not list them.
    """

    source: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool = False
    targets: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """The rank the config states for a module."""
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.rank)

    def scale(self, module: str) -> float:
        """What the product of a module's two matrices is multiplied by."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


class Scales:
    """Every LoraConfig that a file comes with.

    Args:
        configs: by the prefix of the modules they are for ("unet", "transformer"; "" for all).
    """

    def __init__(self, configs: Mapping[str, StatedScales]):
        self.configs = configs

    def __bool__(self) -> bool:
        return bool(self.configs)

    def of(self, module: str) -> tuple[StatedScales, str] | None:
        """The config for a module by its name in the file, and the module's name as the config's patterns see it."""
        for prefix, config in self.configs.items():
            if prefix and module.startswith(f"{prefix}."):
                return config, module.removeprefix(f"{prefix}.")
        plain = self.configs.get("") or (next(iter(self.configs.values())) if len(self.configs) == 1 else None)
        if plain is None:
            return None
        for prefix in _PREFIXES:
            module = module.removeprefix(prefix)
        return plain, module


def stated_scales(path: Path, metadata: Mapping[str, str]) -> Scales:
    """The LoraConfigs in a file's header; none where there is none.

    Raises:
        AdapterFileError: one that cannot be read, or values that cannot be.
    """
    text = metadata.get(HEADER_KEY)
    if not text:
        return Scales({})
    table = parse_json(path, text, HEADER_KEY)
    if not isinstance(table, dict):
        raise AdapterFileError(f"{path.name}: {HEADER_KEY}: expected a table, found {type(table).__name__}")
    parts: dict[str, dict[str, Any]] = {}
    for name, value in table.items():
        prefix, _, field = name.rpartition(".")
        parts.setdefault(prefix, {})[field] = value
    return Scales({prefix: read for prefix, fields in parts.items() if (read := _config(path, HEADER_KEY, fields))})


def scales_beside(path: Path, ranks: Mapping[str, int]) -> Scales:
    """The LoraConfig in adapter_config.json in the file's folder, where it is this file's.

    It is where the file has the name that PEFT gives, or where every rank, and the list of targets, agree with it: a
    folder of many LoRAs may hold somebody else's.

    Args:
        ranks: of the file's LoRA layers, by module name in the file.

    Raises:
        AdapterFileError: it is, and cannot be read.
    """
    beside = path.with_name(CONFIG_NAME)
    try:
        if not beside.is_file():
            return Scales({})
        with beside.open("rb") as file:
            text = file.read(_LARGEST_CONFIG + 1)
    except OSError:
        return Scales({})
    by_name = path.stem in _PEFT_FILES
    try:
        if len(text) > _LARGEST_CONFIG:
            raise AdapterFileError(f"{path.name}: {CONFIG_NAME}: larger than {_LARGEST_CONFIG} bytes")
        table = parse_json(path, text, CONFIG_NAME)
        if not isinstance(table, dict):
            raise AdapterFileError(f"{path.name}: {CONFIG_NAME}: expected a table, found {type(table).__name__}")
        config = _config(path, CONFIG_NAME, table)
    except AdapterFileError:
        if by_name:
            raise
        return Scales({})
    scales = Scales({"": config} if config else {})
    return scales if by_name or _agrees(scales, ranks) else Scales({})


def _agrees(scales: Scales, ranks: Mapping[str, int]) -> bool:
    for module, rank in ranks.items():
        found = scales.of(module)
        if found is None:
            return False
        config, name = found
        if config.rank_of(name) != rank:
            return False
        if config.targets and not any(name == target or name.endswith(f".{target}") for target in config.targets):
            return False
    return bool(ranks)


def _config(path: Path, source: str, fields: Mapping[str, Any]) -> StatedScales | None:
    """A LoraConfig's (LoHaConfig's, LoKrConfig's) fields; None where they state no alpha."""

    def fail(field: str, value: Any) -> AdapterFileError:
        return AdapterFileError(f"{path.name}: {source}: {field} is {shortened(repr(value))}")

    alpha, rank = fields.get("lora_alpha", fields.get("alpha")), fields.get("r")
    if alpha is None or rank is None:
        return None
    if type(rank) is not int or not 0 < rank < 2**31:
        raise fail("r", rank)
    patterns: dict[str, dict[str, Any]] = {}
    for name in ("rank_pattern", "alpha_pattern"):
        value = fields.get(name) or {}
        if not isinstance(value, dict) or not all(map(is_finite, value.values())):
            raise fail(name, value)
        if name == "rank_pattern" and not all(type(n) is int and 0 < n < 2**31 for n in value.values()):
            raise fail(name, value)
        patterns[name] = value
    if not is_finite(alpha):
        raise fail("lora_alpha", alpha)
    targets = fields.get("target_modules")
    listed = tuple(t for t in targets if isinstance(t, str)) if isinstance(targets, list) else ()
    return StatedScales(
        source, rank, float(alpha), **patterns, rank_stabilized=fields.get("use_rslora") is True, targets=listed
    )


def _matching(patterns: Iterable[str], module: str) -> str:
    """The first of PEFT's patterns that a module's name fits: (.*\\.)?pattern$; the name itself where none does."""
    for pattern in patterns:
        if _literal(pattern):
            plain = pattern.removeprefix("^")
            if module == plain or (not pattern.startswith("^") and module.endswith(f".{plain}")):
                return pattern
        elif _compiled(pattern).match(module):
            return pattern
    return module


def _literal(pattern: str) -> bool:
    """Whether a pattern is a plain name, perhaps after "^"; its dots are taken for dots."""
    return pattern.removeprefix("^").replace(".", "").replace("_", "").replace("-", "").isalnum()


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern as PEFT reads it; one that could take for ever fits nothing but a name it could not be told from."""
    repeats = sum(pattern.count(mark) for mark in "*+{")
    if len(pattern) > _PATTERN_LIMIT or repeats > 3 or re.search(r"\)[*+{?]|\\\d|\(\?", pattern):
        raise AdapterFileError(f"{shortened(pattern)}: a pattern of alphas or ranks that is too complicated to be tried")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError):
        raise AdapterFileError(f"{shortened(pattern)}: a pattern of alphas or ranks that is not a regular expression") from None
