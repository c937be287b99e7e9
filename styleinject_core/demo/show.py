"""`styleinject demo`: learn a drawing style from real images, save the adapter, sample with it, and measure it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ..adapter import Adapter
from ..attach import Applied, attach
from ..call import ModelCall
from ..files import load_adapter, save_adapter
from ..layer_names import parse
from ..router.control import Rule, Steered, Steering
from ..router.recorder import record
from ..router.trace import RouterTrace
from ..train.run.watch import ProgressBar, loss_plot
from . import data, pictures
from .classifier import load_classifier, recognized
from .model import sample
from .styles import ALL, DemoModel, adapter_path, learned, license_of, new_adapter, prompts, train_style

STEPS, STEPS_OF_ALL = 140, 400
STRENGTHS = (0.0, 0.5, 1.0, 1.5)
SHOWN = 6  # concepts of each kind in the picture
PARTS = ("down", "mid", "up")


def run(out: Path, style: str, *, steps: int | None = None, train: bool = True, seed: int = 0) -> None:
    """Run the demo and write its pictures into `out`.

    Args:
        style: the drawing style to learn; any but the base model's, or "all" of them in one adapter.
        steps: training steps, None for the default.
        train: False takes the adapter that ships with the demo.

    Raises:
        ValueError: an unknown style, or steps without training.
    """
    choices = [*data.STYLE_WORDS, ALL]
    if style not in choices:
        raise ValueError(f"--style {style!r}: expected one of {', '.join(choices)}")
    if steps is not None and not train:
        raise ValueError("--steps has no meaning with --no-train")
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    model = DemoModel()
    shipped, lora = load_adapter(adapter_path(style)), load_adapter(adapter_path(style, "lora"))
    rows: list[tuple[str, Adapter | None, bool]] = [
        ("base model, no adapter", None, False),
        (f"LoRA, {_steps(lora)} steps", lora, False),
        (f"StyleInject, {_steps(shipped)} steps", shipped, False),
    ]
    if style != ALL:
        rows.append(("the same, its router held at its mean", shipped, True))
    adapter = shipped
    if train:
        steps = steps or (STEPS_OF_ALL if style == ALL else STEPS)
        adapter = _train(model, out, style, steps, seed)
        rows.append((f"StyleInject, {steps} steps, just trained", adapter, False))
    if style == ALL:
        _draw_all(model, out, [("StyleInject", adapter)] if train else [("LoRA", lora), ("StyleInject", shipped)], seed)
    else:
        _draw(model, out, adapter, style, seed)
    _measure(model, rows, style, seed, samples=2 if train and style != ALL else 1)
    print(f"\nPictures and adapter are in {out}{'/' if not str(out).endswith('/') else ''} ({time.monotonic() - began:.0f} s)")


def _steps(adapter: Adapter) -> str:
    return adapter.metadata.get("styleinject.steps", "?")


def _train(model: DemoModel, out: Path, style: str, steps: int, seed: int) -> Adapter:
    """Train, with a progress bar; write the adapter and the loss curve."""
    adapter = new_adapter(style, seed=seed)
    shown = sum(not concept.held_out for concept in data.concepts())
    shown *= len(learned(style))
    what = "four styles" if style == ALL else style
    print(f"Learning {what} from {shown} drawings: {adapter.parameter_count():,} parameters on {len(adapter.names)} layers")
    with ProgressBar(steps) as bar:
        losses = train_style(model, adapter, style, steps=steps, seed=seed, observer=bar)
    path = out / f"{style}.safetensors"
    save_adapter(adapter, path, {"styleinject.steps": str(steps), "modelspec.license": license_of(style)})
    loss_plot(out / "loss.png", f"Fine-tuning StyleInject on {what}", losses)
    print(f"  {path.name}, loss.png")
    return load_adapter(path)  # what a user would load


def _draw_all(model: DemoModel, out: Path, adapters: Sequence[tuple[str, Adapter]], seed: int) -> None:
    """The same prompts and noise, each with the word of every style before it."""
    names, chosen, new = _shown()
    rows = []
    for style in learned(ALL):
        word, asked = data.STYLE_WORDS[style], prompts(style, names, called=True)
        rows += [(f'{label}, "{word}"', _images(model, adapter, asked, seed)) for label, adapter in adapters]
        rows.append((f"the artists' own\n{style}", data.images(style)[chosen]))
    title = "Four styles in one adapter, each called by its word in the prompt"
    pictures.grid(out / "styles.png", title, rows, names, new, "Orange: concepts that no adapter saw in these styles.")
    print("  styles.png")


def _shown() -> tuple[list[str], list[int], list[bool]]:
    """The concepts in the pictures, half of them held out: names, numbers, and which are."""
    concepts = data.concepts()
    known, new = ([k for k, c in enumerate(concepts) if c.held_out == held_out] for held_out in (False, True))
    chosen = [*_spread(known, SHOWN), *_spread(new, SHOWN)]
    return [concepts[k].name for k in chosen], chosen, [concepts[k].held_out for k in chosen]


def _draw(model: DemoModel, out: Path, adapter: Adapter, style: str, seed: int) -> None:
    """The same prompts and seeds at several strengths, and the router over the sampling steps."""
    names, chosen, new = _shown()
    rows = [("base model", _images(model, None, names, seed))]
    for strength in STRENGTHS:
        rows.append((f"strength {strength:g}", _images(model, adapter, names, seed, strength)))
    rows.append(("the artists' own\n" + style, data.images(style)[chosen]))
    title = f"StyleInject: the same prompts and noise, the style {style} by strength"
    pictures.grid(out / "strengths.png", title, rows, names, new)

    with attach(model.unet, adapter) as attachment, record(attachment, roles=("positive", "negative")) as recording:
        _sample(model, names, seed)
    trace = recording.trace()
    by_step = trace.by_step().mean(2)  # (steps, layers, n), averaged over the images and both prompts
    layers = [_liveliest(trace, by_step, part) for part in PARTS]
    panels = torch.stack([by_step[:, trace.layers.index(name)] for name in layers])  # (panels, steps, n)
    title = f"The style router of {style} while it samples: the liveliest layer of each part"
    pictures.router_over_steps(out / "router.png", title, panels, [parse(name).label for name in layers], adapter.style_names)
    print("  strengths.png, router.png")


def _liveliest(trace: RouterTrace, by_step: Tensor, part: str) -> str:
    """The layer of one part of the U-Net whose probabilities (steps, layers, n) change most over the steps."""
    change = dict(zip(trace.layers, by_step.std(0).mean(1).tolist(), strict=True))
    return max((name for name in trace.layers if parse(name).side == part), key=change.__getitem__)


def _measure(model: DemoModel, rows: Sequence[tuple[str, Adapter | None, bool]], style: str, seed: int, samples: int) -> None:
    """Print how often a classifier recognizes concept and style in `samples` of each held-out concept in each style."""
    from tqdm import tqdm

    held_out = [k for k, concept in enumerate(data.concepts()) if concept.held_out]
    names = [data.concepts()[k].name for k in held_out]
    classifier, of = load_classifier(), learned(style)
    results = []
    for label, adapter, held in tqdm(rows, desc="Measuring", leave=False):
        drawn = [
            (one, _images(model, adapter, prompts(one, names, called=style == ALL), seed + k + 1, held=held))
            for one in of
            for k in range(samples)
        ]
        shares = [recognized(classifier, images, held_out, one) for one, images in drawn]
        results.append((label, 0 if adapter is None else adapter.parameter_count(), *_means(shares)))
    truth = _means([recognized(classifier, data.images(one)[held_out], held_out, one) for one in of])
    where = f"{len(of)} styles" if style == ALL else style
    print(f"\n{len(names)} concepts never shown in {where}, {samples * len(of)} each; what a classifier of all styles sees:\n")
    print(f"  {'':44} {'parameters':>10}  {'concept':>8}  {'style':>8}  {'both':>8}")
    for label, parameters, *found in results:
        print(f"  {label:44} {parameters:>10,}" + "".join(f"  {share:>8.0%}" for share in found))
    print(f"  {'the drawings themselves':44} {'':>10}" + "".join(f"  {share:>8.0%}" for share in truth))


def _means(shares: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(shares) for column in zip(*shares, strict=True)]


def _images(
    model: DemoModel, adapter: Adapter | None, names: Sequence[str], seed: int, strength: float = 1.0, *, held: bool = False
) -> Tensor:
    """One image per prompt, (N, 3, 64, 64) in [-1, 1]; with `held`, the router is held at its mean."""
    if adapter is None:
        return model.autoencoder.decode(_sample(model, names, seed))
    with attach(model.unet, Applied(adapter, strength)) as attachment, ExitStack() as stack:
        if held:
            steering = Steering([Rule(hold_mean=True)], adapter)
            steers = steering.steers([True], ("all",), ("all",), sigma=math.nan, memory={})
            stack.enter_context(attachment.in_call(ModelCall(listeners=(Steered(steers),))))
        return model.autoencoder.decode(_sample(model, names, seed))


def _sample(model: DemoModel, names: Sequence[str], seed: int) -> Tensor:
    return sample(model.unet, model.text_encoder(list(names)), model.text_encoder([""]), seed=seed)


def _spread(items: Sequence[int], count: int) -> list[int]:
    """`count` items, evenly over the sequence."""
    return [items[round((k + 0.5) * len(items) / count - 0.5)] for k in range(count)]
