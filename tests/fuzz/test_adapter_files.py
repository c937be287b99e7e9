"""Damaged adapter files, seeded: every one is an adapter or an AdapterFileError that names it, and none takes long.

FUZZ_CASES=100000 FUZZ_SEED=7 python -m pytest tests/fuzz        # by hand, for hours
"""

from __future__ import annotations

import json
import os
import random
import struct
import time
from pathlib import Path
from typing import Any

import adapter_files as files
import pytest
import torch
from safetensors.torch import save

from styleinject_core import Adapter, AdapterConfig, AdapterFileError, LayerShape, load_adapter, save_adapter
from styleinject_core.files.alphas import HEADER_KEY
from styleinject_core.files.keys import _ENDS
from styleinject_core.summary import as_text, summarize

CASES = int(os.environ.get("FUZZ_CASES", "2400"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS_PER_MB, AT_LEAST = 1.0, 5.0

LAYERS = {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", (6, 4)),
          "conv_in": ("input_blocks.0.0", (6, 4, 3, 3))}  # fmt: skip
NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1e308, -0.5, True, None, "1", "\u00b2", [], {}, [[]], float("nan")]
TEXTS = ["", "\u00b2", "9" * 5000, "[" * 3000, "{", "null", "NaN", '{"r":1e999}', "\x00", "\ud83d\ude00" * 50, '{"a":1,"a":2}']
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "I64", "U8", "BOOL", "C64", "X", ""]


def originals(folder: Path) -> list[bytes]:
    """One good file of every kind and spelling, small."""
    found = []
    for kind in files.KINDS:
        spelling = ("kohya", "ComfyUI", "diffusers", "LyCORIS")[len(found) % 4]
        found.append(save(files.file_of(LAYERS, kind, spelling), {"ss_network_dim": "3"}))
    metadata = {HEADER_KEY: json.dumps({"unet.r": files.RANK, "unet.lora_alpha": 8, "unet.alpha_pattern": {"conv_in": 2}})}
    found.append(save(files.file_of(LAYERS, "LoRA", "diffusers", "PEFT, adapter name"), metadata))
    shapes = {name: LayerShape(shape[1], shape[0], shape[2:] or None) for name, (_, shape) in LAYERS.items()}
    for n, config in enumerate(
        (AdapterConfig(2, 3), AdapterConfig(2, 1, sta="none"), AdapterConfig(2, 2, 4.0, "token", "additive"))
    ):
        kept = {name: s for name, s in shapes.items() if config.router_pool != "token" or not s.is_conv}
        path = folder / f"own{n}.safetensors"
        save_adapter(Adapter.create(kept, AdapterConfig(**{**config.to_dict(), "target_modules": ("all",)})), path)
        found.append(path.read_bytes())
    return found


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def packed(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file that is damaged, or says something else than it did, in one to three places."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.25:
            data = _bytes(data, rng)
            continue
        try:
            header, body = header_of(data)
            keys = [key for key in header if key != "__metadata__"]
            data = rng.choice((_rename, _entry, _metadata, _drop, _double))(header, body, keys, rng)
        except (ValueError, struct.error, IndexError, TypeError, KeyError, AttributeError, UnicodeError, RecursionError):
            data = _bytes(data, rng)
    return data


def _bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(20)))
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 30))):
        changed[rng.randrange(len(changed) if rng.random() < 0.3 else min(len(changed), 3000))] = rng.randrange(256)
    return bytes(changed)


def _rename(header: dict, body: bytes, keys: list[str], rng: random.Random) -> bytes:
    old = rng.choice(keys)
    module = (
        old.split(".")[0]
        if rng.random() < 0.5
        else rng.choice(("a", "", "lora_te_x", "lora_unet_" * 500, ".", "x" * 3000, "\u00e9"))
    )
    end = rng.choice(
        [*_ENDS, "lora_A.other.weight", "styleinject_A", "styleinject_router.weight", "styleinject_", "weight", "\x00"]
    )
    new = rng.choice((f"{module}.{end}", end, old + "." + end, old.replace("lora", "hada"), old[: rng.randrange(len(old))]))
    return packed({(new if key == old else key): value for key, value in header.items()}, body)


def _entry(header: dict, body: bytes, keys: list[str], rng: random.Random) -> bytes:
    entry = header[rng.choice(keys)]
    part = rng.choice(("dtype", "shape", "shape", "shape", "data_offsets", "all"))
    if part == "all":
        header[rng.choice(keys)] = rng.choice(NUMBERS)
    elif part == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif part == "shape":
        shape = list(entry["shape"])
        change = rng.randrange(5)
        if change == 0 and shape:
            shape[rng.randrange(len(shape))] = rng.choice(NUMBERS)
        elif change == 1:
            shape = [*shape, *[1] * rng.choice((1, 2, 100))]
        elif change == 2:
            shape = shape[::-1]
        elif change == 3:  # as many numbers in another shape
            count = 1
            for n in shape:
                count *= n
            shape = rng.choice(([count], [1, count], [count, 1], [count, 1, 1, 1], []))
        else:  # none: every size but one
            shape = [0 if n == 0 else size for n, size in enumerate(shape)]
            entry["data_offsets"] = [entry["data_offsets"][0]] * 2
        entry["shape"] = shape
    else:
        entry["data_offsets"] = [rng.choice((0, 1, 4, len(body), 2**63, -1)), rng.choice((0, 2, 8, len(body), 2**64))]
    return packed(header, body)


def _metadata(header: dict, body: bytes, _keys: list[str], rng: random.Random) -> bytes:
    metadata = dict(header.get("__metadata__") or {})
    name = rng.choice(
        ("styleinject_config", "styleinject_version", "styleinject.style_names", HEADER_KEY, "modelspec.architecture")
    )
    value: Any = rng.choice(TEXTS)
    if rng.random() < 0.6:
        try:
            table = json.loads(metadata.get(name, "{}"))
        except ValueError:
            table = {}
        if not isinstance(table, dict):
            table = {}
        field = rng.choice(
            [
                *table,
                "r",
                "n_styles",
                "alpha",
                "layers",
                "eps",
                "sta",
                "method",
                "unet.r",
                "lora_alpha",
                "rank_pattern",
                "alpha_pattern",
                "factors",
            ]
        )
        table[field] = rng.choice([*NUMBERS, {"conv_in": rng.choice(NUMBERS)}, {"(a+)+$": 1}, {"[": 2}, "lokr", ["all"]])
        value = json.dumps(table)
    metadata[name] = value if rng.random() < 0.95 else rng.choice(NUMBERS)
    return packed({**header, "__metadata__": metadata}, body)


def _drop(header: dict, body: bytes, keys: list[str], rng: random.Random) -> bytes:
    gone = rng.choice(keys)
    return packed({key: value for key, value in header.items() if key != gone}, body)


def _double(header: dict, body: bytes, keys: list[str], rng: random.Random) -> bytes:
    """One tensor under a second name, or twice under its own."""
    key = rng.choice(keys)
    if rng.random() < 0.5:
        text = json.dumps(header)
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}" + "}"
        return struct.pack("<Q", len(text.encode())) + text.encode() + body
    size = header[key]["data_offsets"][1] - header[key]["data_offsets"][0]
    if not 0 <= size <= len(body):
        return _drop(header, body, keys, rng)
    entry = {**header[key], "data_offsets": [len(body), len(body) + size]}
    name = rng.choice((key.replace("lora_unet_", "lycoris_"), key.replace("down", "A"), "b." + key, key.replace(".", "_")))
    return packed({**header, name: entry}, body + body[:size])


@pytest.mark.parametrize("part", range(3))
def test_damaged_files_are_adapters_or_one_kind_of_error(tmp_path: Path, part: int) -> None:
    rng = random.Random(SEED * 1000 + part)
    good, path = originals(tmp_path), tmp_path / "style.safetensors"
    loaded = refused = 0
    for case in range(CASES // 3):
        data = mutated(rng.choice(good), rng)
        path.write_bytes(data)
        start = time.process_time()
        problem = _problem(path)
        if isinstance(problem, AdapterFileError):
            assert str(problem).startswith("style.safetensors: ") and len(str(problem)) < 2500, (
                f"case {case}: {str(problem)[:3000]}"
            )
            refused += 1
        elif problem is not None:
            kept = Path(os.environ.get("FUZZ_KEEP", str(tmp_path))) / f"case-{SEED}-{part}-{case}.safetensors"
            kept.write_bytes(data)
            raise AssertionError(
                f"case {case} of seed {SEED}, part {part}: {type(problem).__name__}: {str(problem)[:300]}"
            ) from problem
        else:
            loaded += 1
        took = time.process_time() - start
        assert took < max(AT_LEAST, SECONDS_PER_MB * len(data) / 2**20), f"case {case} took {took:.1f} s"
    assert loaded > CASES // 60 and refused > CASES // 10, "the mutations are too gentle, or too rough, to show anything"


def _problem(path: Path) -> Exception | None:
    """What reading a file, and saying what is in it, raises; None for nothing."""
    try:
        adapter = load_adapter(path)
        assert adapter.style_names and as_text(summarize(adapter))
    except Exception as error:
        return error
    return None


def test_what_is_loaded_fits_in_memory_of_the_files_size(tmp_path: Path) -> None:
    """Tensors of a loaded adapter have no more numbers than the file."""
    rng, good, path = random.Random(SEED), originals(tmp_path), tmp_path / "style.safetensors"
    for _ in range(CASES // 10):
        data = mutated(rng.choice(good), rng)
        path.write_bytes(data)
        try:
            adapter = load_adapter(path)
        except AdapterFileError:
            continue
        assert sum(p.numel() * p.element_size() for p in adapter.parameters()) <= 4 * len(data)
        assert all(torch.isfinite(p.float()).all() for p in adapter.parameters())
