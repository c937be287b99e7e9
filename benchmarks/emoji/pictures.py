"""Pictures of benchmarks/emoji/run.py's results: which styles are drawn where each is asked for, and what long trainings do.

python benchmarks/emoji/pictures.py results.jsonl FOLDER    # FOLDER/styles.png, FOLDER/long-TASK.png
python benchmarks/emoji/pictures.py results.jsonl FOLDER --kept KEPT    # and drawings.png, with adapters of run.py --keep KEPT
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from problems import Size, Styles
from run import METHODS, read
from table import COLUMNS, TITLES

from styleinject_core import load_adapter
from styleinject_core.colors import INK, PAPER, STYLE_COLORS
from styleinject_core.demo import data
from styleinject_core.demo.pictures import grid
from styleinject_core.files.atomic import replacing
from styleinject_core.router.canvas import color_map

_NAMES = {"lora_equal": "LoRA", "n4_prompt_taught": "StyleInject"}
_SHOWN = ("concept", "style", "both", "val")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kept", type=Path)
    parser.add_argument("--steps", type=int, default=Styles.steps, help="of the adapters that draw")
    arguments = parser.parse_args()
    lines = [line for line in read(arguments.results) if not line["tuning"]]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    several(lines, arguments.folder / "styles.png")
    for task in TITLES:
        long(task, lines, arguments.folder / f"long-{task}.png")
    if arguments.kept is not None:
        drawings(arguments.kept, arguments.steps, arguments.folder / "drawings.png")


def drawings(kept: Path, steps: int, path: Path) -> None:
    """Things that were held out, in each style, by the artist and by two adapters that learned all of them from the others."""
    problem = Styles(Size())
    concepts = problem.new[:: len(problem.new) // 8][:8]
    rows = []
    for k, style in enumerate(problem.styles):
        rows.append((f"{style}: the artist", data.images(style)[concepts]))
        for row in ("lora_equal", "n4_prompt_taught"):
            adapter = load_adapter(kept / f"styles-{row}-{steps}-0.safetensors")
            with torch.no_grad(), problem.base.attachment(adapter):
                rows.append((_NAMES[row], problem.draw(problem.base, problem.prompts(k, concepts), seed=1000)))
    title = f"Four styles in one adapter, {steps} steps: the style is a word of the prompt"
    grid(path, title, rows, [data.concepts()[k].name for k in concepts], [False] * len(concepts))


def several(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Confusions between styles by row, mean over the seeds, and beside each how much the layers' choices say of the style."""
    usual = [line for line in lines if "confusion" in line["metrics"] and "curve" not in line]
    by_row = {row: [line["metrics"] for line in usual if line["row"] == row] for row in METHODS}
    rows = {row: found for row, found in by_row.items() if found and METHODS[row].adapts}
    if not rows:
        return
    asked = [style for style in data.styles() if style != data.BASE_STYLE]
    figure = Figure(figsize=(7.4, 2.3 * len(rows)), dpi=110, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(1, 1.3))
    for axes, (row, found) in zip(panels, rows.items(), strict=True):
        confusion = torch.tensor([metrics["confusion"] for metrics in found]).mean(0)
        axes[0].imshow(confusion.numpy(), cmap=color_map(), vmin=0, vmax=1)
        for y, shares in enumerate(confusion.tolist()):
            for x, share in enumerate(shares):
                color = "white" if share < 0.6 else INK
                axes[0].text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
        axes[0].set_yticks(range(len(asked)), asked, fontsize=7)
        axes[0].set_xticks(range(len(data.styles())), data.styles(), fontsize=6, rotation=20)
        axes[0].set_title(METHODS[row].label, fontsize=8)
        layers = [metrics["layers"] for metrics in found if "layers" in metrics]
        axes[1].set_ylim(0, torch.log(torch.tensor(float(len(asked)))).item())
        axes[1].set_title("I(asked style; chosen style) by layer, nats", fontsize=8)
        axes[1].tick_params(labelsize=7)
        if layers:
            mean = [sum(each[name] for each in layers) / len(layers) for name in layers[0]]
            axes[1].bar(range(len(mean)), mean, color=STYLE_COLORS[0])
        else:
            axes[1].text(0.5, 0.5, "no router that chooses", transform=axes[1].transAxes, ha="center", fontsize=8)
    figure.supylabel("asked for; per cent recognized as", fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def long(task: str, lines: Sequence[dict[str, Any]], path: Path) -> None:
    """What was measured on the way in a task's long trainings, by row."""
    curves = [line for line in lines if line["task"] == task and "curve" in line]
    if not curves:
        return
    figure = Figure(figsize=(9, 5), dpi=110, facecolor=PAPER, layout="constrained")
    rows = list(dict.fromkeys(line["row"] for line in curves))
    for axis, name in zip(figure.subplots(2, 2).flat, _SHOWN, strict=True):
        for line in curves:
            steps, values = zip(*((point["step"], point[name]) for point in line["curve"] if name in point), strict=True)
            k = rows.index(line["row"])
            label = METHODS[line["row"]].label if line is next(x for x in curves if x["row"] == line["row"]) else None
            axis.plot(steps, values, color=STYLE_COLORS[k % len(STYLE_COLORS)], label=label, marker=".")
        axis.set_title(COLUMNS[name], fontsize=9)
        axis.tick_params(labelsize=7)
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(f"{TITLES[task]}: 10 times the steps, constant rate", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


if __name__ == "__main__":
    main()
