"""Rebuild the demo's emoji sprite sheets from the npm packages they come from.

    npm install --prefix emoji emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0 \
        openmoji@17.0.0 @lobehub/fluent-emoji-3d@1.1.0 emojibase-data \
        @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/fluent-emoji-high-contrast@1.2.6
    pip install cairosvg pillow
    python scripts/demo/build_data.py emoji/node_modules                       # the sheets shipped with the demo
    python scripts/demo/build_data.py emoji/node_modules --new-styles          # only those of styles nothing is trained on
    python scripts/demo/build_data.py emoji/node_modules --all --size 128 --out big   # every common concept, larger

Each style becomes one sprite sheet; tile k of every sheet draws concept k of concepts.json. Drawings are cropped to
their outline and fitted to the same box on white, so that two styles of a concept differ by style and not by scale.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

COLUMNS = 20
NEW_STYLES = ("fluent-flat", "fluent-high-contrast")  # of the held-out concepts alone; nothing is trained on them
STYLES = ("twemoji", "noto", "openmoji", "openmoji-line", "fluent3d")
DEFAULT_OUT = Path(__file__).parents[2] / "styleinject_core" / "demo" / "assets" / "emoji"
HELD_OUT_EVERY = 6  # every sixth concept is never shown to a style adapter


def source(root: Path, style: str, code: str) -> Path | None:
    """The drawing of code point sequence `code` (lower case, without -fe0f) in one style, or None."""
    with_fe0f = [code, f"{code}-fe0f"]
    if style in ("twemoji", "noto"):
        vendor = {"twemoji": "twitter", "noto": "google"}[style]
        paths = [root / f"emoji-datasource-{vendor}/img/{vendor}/64/{c}.png" for c in with_fe0f]
    elif style == "fluent3d":
        paths = [root / f"@lobehub/fluent-emoji-3d/assets/{c}.webp" for c in with_fe0f]
    else:
        folder = "black" if style == "openmoji-line" else "color"
        paths = [root / f"openmoji/{folder}/svg/{c.upper()}.svg" for c in with_fe0f]
    return next((p for p in paths if p.exists()), None)


def draw(path: Path, size: int) -> Image.Image:
    """The drawing in a file, `fitted`."""
    return fitted(rasterized(path.read_bytes(), size) if path.suffix == ".svg" else Image.open(path), size)


def fitted(image: Image.Image, size: int) -> Image.Image:
    """One drawing on white, its outline fitted to the same box in every style. Returns an RGB image (size, size)."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox()
    image = image.crop(box)
    fit = (size - size // 16) / max(image.size)
    image = image.resize([max(1, round(s * fit)) for s in image.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas.convert("RGB")


def new_style_sheets(root: Path, out: Path) -> None:
    """A sheet of each style that nothing is trained on: the held-out concepts, in the order of OUT's concepts.json."""
    index = json.loads((out / "concepts.json").read_text(encoding="utf-8"))
    held = [concept for concept in index["concepts"] if concept["held_out"]]
    tile, columns = index["tile"], index["columns"]
    for style in NEW_STYLES:
        icons = _icons(root / "@iconify-json" / style.replace("fluent-", "fluent-emoji-"))
        sheet = Image.new("RGB", (columns * tile, -(-len(held) // columns) * tile), "white")
        for k, concept in enumerate(held):
            sheet.paste(fitted(rasterized(icons(concept["code"]), tile), tile), (k % columns * tile, k // columns * tile))
        sheet.save(out / f"{style}.webp", lossless=True, quality=100, method=6)
        print(f"{style}: {len(held)} drawings, {(out / f'{style}.webp').stat().st_size / 2**10:.0f} KiB")


def _icons(package: Path) -> Callable[[str], bytes]:
    """From a code point sequence to its drawing as SVG, in one of Iconify's packages."""
    icons, names = (json.loads((package / f"{name}.json").read_text(encoding="utf-8")) for name in ("icons", "chars"))

    def svg(code: str) -> bytes:
        side, body = icons["width"], icons["icons"][names[code]]["body"]
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" color="black">{body}</svg>'.encode()

    return svg


def rasterized(svg: bytes, size: int) -> Image.Image:
    """An SVG, four times as large as it is needed."""
    import cairosvg

    return Image.open(io.BytesIO(cairosvg.svg2png(bytestring=svg, output_width=4 * size, output_height=4 * size)))


def read_selection(path: Path) -> dict[str, dict[str, set[str]]]:
    """concepts.txt as {category: {"keep": labels or {"*"}, "drop": labels}}."""
    selection: dict[str, dict[str, set[str]]] = {}
    category = ""
    for line in (raw.strip() for raw in path.read_text().splitlines()):
        if line.startswith("["):
            category = line.strip("[]")
            selection[category] = {"keep": set(), "drop": set()}
        elif line and not line.startswith("#"):
            selection[category]["drop" if line[0] == "!" else "keep"].add(line.lstrip("!"))
    return selection


def concepts(root: Path, selection: dict | None) -> list[dict]:
    """Every concept drawn in all styles, in Unicode order; with a selection, only what it keeps."""
    groups = json.loads((root / "emojibase-data/meta/groups.json").read_text())["groups"]
    found = []
    for entry in json.loads((root / "emojibase-data/en/data.json").read_text()):
        code = entry["hexcode"].lower().replace("-fe0f", "")
        category = groups.get(str(entry.get("group")))
        if category is None or (selection is not None and ("-" in code or category not in selection)):
            continue
        if selection is not None:
            keep, drop = selection[category]["keep"], selection[category]["drop"]
            if entry["label"] in drop or not ({"*", entry["label"]} & keep):
                continue
        if all(source(root, style, code) for style in STYLES):
            found.append({"code": code, "name": entry["label"].lower(), "category": category})
    for k, concept in enumerate(found):
        concept["held_out"] = k % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("node_modules", type=Path)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--all", action="store_true", help="every concept common to all styles, not the demo's choice")
    parser.add_argument("--new-styles", action="store_true", help="only the sheets of styles that nothing is trained on")
    args = parser.parse_args()
    if args.new_styles:
        new_style_sheets(args.node_modules, args.out)
        return
    selection = None if args.all else read_selection(Path(__file__).with_name("concepts.txt"))
    found = concepts(args.node_modules, selection)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = -(-len(found) // COLUMNS)
    for style in STYLES:
        sheet = Image.new("RGB", (COLUMNS * args.size, rows * args.size), "white")
        for k, concept in enumerate(found):
            path = source(args.node_modules, style, concept["code"])
            sheet.paste(draw(path, args.size), (k % COLUMNS * args.size, k // COLUMNS * args.size))
        sheet.save(args.out / f"{style}.webp", lossless=True, quality=100, method=6)
        print(f"{style}: {len(found)} drawings, {(args.out / f'{style}.webp').stat().st_size / 2**20:.2f} MiB")
    index = {"tile": args.size, "columns": COLUMNS, "styles": list(STYLES), "concepts": found}
    (args.out / "concepts.json").write_text(json.dumps(index, indent=0, ensure_ascii=False) + "\n")
    if not args.all:
        new_style_sheets(args.node_modules, args.out)


if __name__ == "__main__":
    main()
