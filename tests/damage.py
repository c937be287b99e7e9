"""Ways to damage files, seeded: bytes, and what a file says where it is still well formed."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

from styleinject_core.files.alphas import HEADER_KEY
from styleinject_core.files.keys import _ENDS

NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1e308, -0.5, True, None, "1", "\u00b2", [], {}, [[]], float("nan")]
TEXTS = ["", "\u00b2", "9" * 5000, "[" * 3000, "{", "null", "NaN", "1e999", '{"r":1e999}', "\x00", "\ud83d\ude00" * 50,
         '{"a":1,"a":2}', "[1]", "-1", "true", '"a"', "[[[]]]"]  # fmt: skip
# Names and values as long as a file: what is done with them must not take longer than their length allows.
LONG = [
    "a." * 100_000,
    json.dumps([0] * 100_000),
    "[" + "[]," * 60_000 + "[]]",
    json.dumps({f"s{k}": k for k in range(30_000)}),
]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "I64", "U8", "BOOL", "C64", "X", ""]


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def packed(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def adapter_file(data: bytes, rng: random.Random) -> bytes:
    """An adapter's: bytes, or a key, entry or setting that is another one, gone or there twice."""
    if rng.random() < 0.25:
        return any_file(data, rng)
    try:
        header, body = header_of(data)
        keys = [key for key in header if key != "__metadata__"]
        return rng.choice((_rename, _entry, _metadata, _drop, _double))(header, body, keys, rng)
    except (ValueError, struct.error, IndexError, TypeError, KeyError, AttributeError, UnicodeError, RecursionError):
        return any_file(data, rng)


def any_file(data: bytes, rng: random.Random) -> bytes:
    """Cut off, or with other bytes."""
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
    if rng.random() < 0.01:
        module = LONG[0]
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
    if rng.random() < 0.01:
        value = rng.choice(LONG)
    elif rng.random() < 0.6:
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


def changed(value: Any, rng: random.Random) -> Any:
    """A nested value with one thing in it changed, left out or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.15:
            return {name: item for name, item in value.items() if name != key}
        if kind < 0.25:
            return {(rng.choice(TEXTS) if name == key else name): item for name, item in value.items()}
        return {**value, key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:place] + value[place + 1 :]
        return [changed(item, rng) if n == place else item for n, item in enumerate(value)]
    return rng.choice([*NUMBERS, "x" * 3000])


def safetensors_file(data: bytes, rng: random.Random) -> bytes:
    """Bytes, the header, a text in it, or what a nested text says."""
    try:
        header, body = header_of(data)
        metadata = header.get("__metadata__") or {}
        kind = rng.random()
        if kind < 0.2 or not metadata:
            return any_file(data, rng)
        if kind < 0.4:
            header = changed(header, rng)
        elif kind < 0.5:
            metadata[rng.choice(list(metadata))] = rng.choice(TEXTS)
        elif kind < 0.505:
            metadata[rng.choice(list(metadata))] = rng.choice(LONG)
        else:
            name = rng.choice([key for key, text in metadata.items() if len(text) > 2] or list(metadata))
            metadata[name] = json.dumps(changed(json.loads(metadata[name]), rng))
        return packed(header, body)
    except (ValueError, struct.error, AttributeError, TypeError, UnicodeError, RecursionError):
        return any_file(data, rng)


def toml_file(data: bytes, rng: random.Random) -> bytes:
    """A value, a name or bytes."""
    if rng.random() < 0.2:
        return any_file(data, rng)
    lines = data.decode(errors="replace").splitlines() or [""]
    place = rng.randrange(len(lines))
    name = lines[place].partition("=")[0]
    value = rng.choice(
        ["0", "-1", "1.5", "1e400", "inf", "nan", "9" * 400, "9" * 5000, "true", '""', '"\u00b2"', "[]", "{}", "[[1]]", "[" * 3000,
         "[" * 3000 + "]" * 3000, '["to_q", 1]', "1979-05-27", '"\\u0000"', '"a\\tb"', "0x" + "f" * 3000, '"x"' , "\x00", "a.b.c"]
    )  # fmt: skip
    if rng.random() < 0.002:
        value = rng.choice(('"' + LONG[0] + '"', LONG[1], LONG[2]))
    lines[place] = rng.choice((f"{name} = {value}", f"{name}x = {value}", f"[{name}]", "", f"{lines[place]}\n{lines[place]}"))
    return "\n".join(lines).encode()


def json_lines(data: bytes, rng: random.Random) -> bytes:
    """A file with a JSON object in each line: bytes, a line, or what one says."""
    if rng.random() < 0.3:
        return any_file(data, rng)
    lines = data.decode(errors="replace").splitlines() or [""]
    place = rng.randrange(len(lines))
    try:
        said = changed(json.loads(lines[place]), rng)
        lines[place] = rng.choice((json.dumps(said), json.dumps(said), rng.choice(TEXTS), f"{lines[place]}\n{lines[place]}"))
    except (ValueError, RecursionError, UnicodeError):
        return any_file(data, rng)
    return "\n".join(lines).encode(errors="surrogatepass")


def tar_file(data: bytes, rng: random.Random) -> bytes:
    """Bytes, a field of a member's header with its checksum made right again, or a member's content."""
    kind = rng.random()
    headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if kind < 0.3 or not headers:
        return any_file(data, rng)
    at = rng.choice(headers)
    block = bytearray(data[at : at + 512])
    if kind < 0.8:
        start, size = rng.choice(((0, 100), (124, 12), (124, 12), (124, 12), (156, 1), (157, 100), (345, 155), (100, 8)))
        value = rng.choice(
            (b"0", b"7" * size, b"\x80" + b"\xff" * (size - 1), b"\xff" * size, b"-1", b"\x00", b"1", b"5", b"x", b"L", b"g",
             b"S", b"../a.png", b"a.json", b"a" * size, b"\xc2\xb2", b"77777777777", b"a.txt")
        )  # fmt: skip
        block[start : start + size] = value[:size].ljust(size, b"\0")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return data[:at] + bytes(block) + data[at + 512 :]
    if kind < 0.9:  # a content that is no caption, or no picture
        text = rng.choice(TEXTS).encode(errors="surrogatepass")[:512].ljust(512, b" ")
        return data[: at + 512] + text + data[at + 1024 :]
    other = rng.choice(headers)
    return data[:at] + data[other : other + 1024] + data[at:]
