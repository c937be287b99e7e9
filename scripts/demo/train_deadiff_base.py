"""Tune the demo's base model until it draws all five styles, as Stable Diffusion knows every style DEADiff copies.

    python scripts/demo/train_deadiff_base.py WORK --steps 4000     # resumes where it was stopped, bit for bit
    python scripts/demo/train_deadiff_base.py WORK --export         # WORK/deadiff-base.pt -> the package, fp16

It starts from the shipped base (OpenMoji alone) and sees every drawing of every style. The captions are the name / the
style's word and the name / the style's word / nothing, .40 / .35 / .15 / .10. In half of the steps every
cross-attention gets as many zero keys and values as a DEADiff has tokens: they stand for "no reference", and a base
that never met them loses concepts to them (4 rows beside 8 of text are a third of the softmax's terms; Stable
Diffusion's are 16 beside 77).

The learning rate warms up, stays, and falls linearly over the last quarter of --steps, so that a run can be resumed with
another --steps as long as the fall has not begun. About .7 CPU s a step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from train_base import Ema, learning_rate, pictures
from train_common import load_state, save_state

from styleinject_core.demo import data
from styleinject_core.demo.model import (
    NOISE_SCHEDULE,
    build_unet,
    load_autoencoder,
    read_base,
    read_unet,
)
from styleinject_core.demo.text import TextEncoder
from styleinject_core.files.atomic import save_tensors

STYLE_WORDS = {style: "outlined" if style == data.BASE_STYLE else data.STYLE_WORDS[style] for style in data.styles()}
TARGET = data.ASSETS / "deadiff-base.safetensors"
NULL_ROWS = 4
SAVE_EVERY = 100
PICTURE_EVERY = 500


def text_encoder() -> TextEncoder:
    """The base's text encoder with a word more for each style; the words it had keep their rows."""
    state, vocabulary = read_base("text_encoder")
    wider = TextEncoder([*vocabulary, *STYLE_WORDS.values()])
    rows = state.pop("embedding.weight")
    state["embedding.weight"] = torch.cat([rows, torch.randn(len(STYLE_WORDS), rows.shape[1]) * rows.std()])
    wider.load_state_dict(state)
    return wider


def captions(styles: list[str], names: list[str]) -> list[str]:
    """One caption per drawing: name / style and name / style / nothing."""
    kinds = torch.multinomial(torch.tensor([0.40, 0.35, 0.15, 0.10]), len(names), replacement=True).tolist()
    words = [STYLE_WORDS[style] for style in styles]
    return [(name, f"{word} {name}", word, "")[kind] for kind, word, name in zip(kinds, words, names, strict=True)]


@contextmanager
def null_rows(unet: nn.Module, count: int) -> Iterator[None]:
    """`count` zero keys and values in every cross-attention."""

    def longer(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        return torch.cat([output, output.new_zeros(output.shape[0], count, output.shape[2])], 1)

    layers = [m for name, m in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))] if count else []
    hooks = [layer.register_forward_hook(longer) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def export(work: Path, name: str) -> None:
    """The averaged U-Net and text encoder as one fp16 file; the autoencoder is the base's."""
    model = build()
    ema = Ema(model)
    if not load_state(work / f"{name}.pt", ema=ema):
        raise SystemExit(f"{work / f'{name}.pt'} is missing: train it first")
    tensors = {f"{part}.{k}": v for part, m in ema.average.module.items() for k, v in m.state_dict().items()}
    metadata = {
        "format": "pt",
        "vocabulary": json.dumps(model["text_encoder"].vocabulary),
        "style_words": json.dumps(STYLE_WORDS),
        "description": "Text to 64x64 emoji in five styles, trained on the drawings that ATTRIBUTION.md names",
    }
    save_tensors({k: v.half().contiguous() for k, v in tensors.items()}, TARGET, metadata)
    print(f"{TARGET}: {TARGET.stat().st_size / 1e6:.1f} MB")


def build() -> nn.ModuleDict:
    unet = build_unet()
    unet.load_state_dict(read_unet())
    return nn.ModuleDict({"unet": unet, "text_encoder": text_encoder()}).requires_grad_(True).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--name", default="deadiff-base", help="WORK/NAME.pt is what this run writes and resumes")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--export", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.export:
        export(args.work, args.name)
        return

    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    model, autoencoder = build(), load_autoencoder()
    styles, names = data.styles(), [concept.name for concept in data.concepts()]
    with torch.no_grad():
        latents = torch.stack([autoencoder.encode(data.images(style)) for style in styles])  # (S, N, 16, 8, 8)
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-3, betas=(0.9, 0.99))
    ema = Ema(model)
    path = args.work / f"{args.name}.pt"
    start, began = load_state(path, model=model, optimizer=optimizer, ema=ema), time.monotonic()
    recent: list[float] = []
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(step, args.steps)
        style, concept = torch.randint(len(styles), (args.batch,)), torch.randint(len(names), (args.batch,))
        x0 = latents[style, concept]
        texts = captions([styles[k] for k in style.tolist()], [names[k] for k in concept.tolist()])
        rows = NULL_ROWS if torch.rand(()) < 0.5 else 0
        t, noise = torch.randint(1000, (args.batch,)), torch.randn_like(x0)
        noisy = scheduler.add_noise(x0, noise, t)
        with null_rows(model["unet"], rows):
            prediction = model["unet"](noisy, t, model["text_encoder"](texts)).sample
        loss = (prediction - scheduler.get_velocity(x0, noise, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step)
        recent = [*recent[-99:], loss.item()]
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            save_state(path, step + 1, model=model, optimizer=optimizer, ema=ema)
            pace = (time.monotonic() - began) / (step + 1 - start)
            print(f"step {step + 1}: loss {sum(recent) / len(recent):.4f}, {pace:.2f} s a step", flush=True)
        if (step + 1) % PICTURE_EVERY == 0:
            average = ema.average.module.eval()
            chosen = [f"{word} {name}" for word in STYLE_WORDS.values() for name in names[:: len(names) // 10][:10]]
            pictures(
                args.work / f"{args.name}-{step + 1:06d}.png", average["unet"], average["text_encoder"], autoencoder, chosen
            )


if __name__ == "__main__":
    main()
