"""Train the demo's base model on one drawing style, and write it to the package.

    python scripts/demo/train_autoencoder.py WORK
    python scripts/demo/train_base.py WORK --style twemoji --name warm-up --steps 1200
    python scripts/demo/train_base.py WORK --start-from warm-up --steps 700      # resumes where it was stopped
    python scripts/demo/train_base.py WORK --export          # WORK/base.pt -> assets/base.safetensors, fp16

The shipped model was made so: words, shapes and colors learned on Twemoji, then OpenMoji alone. Training on OpenMoji from
the start (without --start-from, 1500 steps) works as well.

The learning rate warms up, stays, and falls linearly over the last quarter of --steps, so that a run can be resumed
with another --steps as long as the fall has not begun. About 1 s a step on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))
from train_common import load_state, save_state

from styleinject_core.demo import data
from styleinject_core.demo.autoencoder import Autoencoder
from styleinject_core.demo.model import BASE_FILE, NOISE_SCHEDULE, build_unet, sample
from styleinject_core.demo.text import TextEncoder, words
from styleinject_core.files.atomic import replacing, save_tensors

SAVE_EVERY = 100
PICTURE_EVERY = 400


def prompts_of(names: list[str]) -> list[list[str]]:
    """For each concept its name and, where nothing else is called so, the name without "face"."""
    short = [" ".join(w for w in words(name) if w != "face") for name in names]
    return [[n, n, s] if s and short.count(s) == 1 and s not in names else [n] for n, s in zip(names, short, strict=True)]


def learning_rate(step: int, steps: int) -> float:
    """The factor of the peak rate: 200 steps of warm-up, constant, linear fall over the last quarter."""
    return min(1.0, (step + 1) / 200, max(0.0, (steps - step) / (0.25 * steps)))


class Ema(nn.Module):
    """An exponential moving average of a module's parameters, with a warm-up of its own."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.average = torch.optim.swa_utils.AveragedModel(
            module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
        )

    def update(self, module: nn.Module, step: int) -> None:
        if step < 200:
            self.average.module.load_state_dict(module.state_dict())
        else:
            self.average.update_parameters(module)


def pictures(path: Path, unet: nn.Module, text: TextEncoder, autoencoder: Autoencoder, names: list[str]) -> None:
    """A grid of samples with guidance for a look at the progress."""
    with torch.no_grad():
        latents = sample(unet, text(names), text([""]), seed=0)
        tiles = autoencoder.decode(latents)
    rows = tiles.unflatten(0, (-1, 10)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (rows*64, 640, 3)
    with replacing(path) as temporary:
        Image.fromarray(((rows + 1) * 127.5).byte().numpy()).save(temporary, format="png")


def export(work: Path, name: str, target: Path) -> None:
    """The averaged weights, the text encoder and the autoencoder as one fp16 file with the vocabulary in its header."""
    model, autoencoder, _ = build(work)
    ema = Ema(model)
    load_state(work / f"{name}.pt", ema=ema)
    tensors = {f"{part}.{k}": v for part, m in ema.average.module.items() for k, v in m.state_dict().items()}
    tensors |= {f"autoencoder.{k}": v for k, v in autoencoder.state_dict().items()}
    tensors = {k: v.half().contiguous() for k, v in tensors.items()}
    metadata = {
        "format": "pt",
        "vocabulary": json.dumps(model["text_encoder"].vocabulary),
        "description": "Text to 64x64 emoji, trained on OpenMoji drawings (CC-BY-SA 4.0)",
    }
    save_tensors(tensors, target, metadata)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


def build(work: Path) -> tuple[nn.ModuleDict, Autoencoder, list[list[str]]]:
    autoencoder = Autoencoder().eval()
    if not load_state(work / "autoencoder.pt", model=autoencoder):
        raise SystemExit(f"{work / 'autoencoder.pt'} is missing: run train_autoencoder.py first")
    prompts = prompts_of([concept.name for concept in data.concepts()])
    vocabulary = sorted({word for variants in prompts for name in variants for word in words(name)})
    model = nn.ModuleDict({"unet": build_unet(), "text_encoder": TextEncoder(vocabulary)})
    return model, autoencoder, prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--style", choices=data.styles(), default=data.BASE_STYLE)
    parser.add_argument("--name", default="base", help="WORK/NAME.pt is what this run writes and resumes (default base)")
    parser.add_argument("--start-from", metavar="NAME", help="begin with the weights of WORK/NAME.pt")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--export", action="store_true")
    args = parser.parse_args()
    if args.export:
        export(args.work, args.name, BASE_FILE)
        return

    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    model, autoencoder, prompts = build(args.work)
    with torch.no_grad():
        latents = autoencoder.encode(data.images(args.style))
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-3, betas=(0.9, 0.99))
    ema = Ema(model)
    path = args.work / f"{args.name}.pt"
    if args.start_from and not path.exists():
        load_state(args.work / f"{args.start_from}.pt", model=model)
    start = load_state(path, model=model, optimizer=optimizer, ema=ema)
    log = (args.work / "loss.jsonl").open("a")
    recent = []
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(step, args.steps)
        rows = torch.randint(len(latents), (args.batch,))
        x0 = latents[rows]
        names = [prompts[k][int(torch.randint(len(prompts[k]), ()))] for k in rows.tolist()]
        names = [name if keep else "" for name, keep in zip(names, (torch.rand(args.batch) > 0.1).tolist(), strict=True)]
        t = torch.randint(1000, (args.batch,))
        noise = torch.randn_like(x0)
        prediction = model["unet"](scheduler.add_noise(x0, noise, t), t, model["text_encoder"](names)).sample
        loss = (prediction - scheduler.get_velocity(x0, noise, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step)
        recent = [*recent[-99:], loss.item()]
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            save_state(path, step + 1, model=model, optimizer=optimizer, ema=ema)
            log.write(json.dumps({"step": step + 1, "loss": sum(recent) / len(recent)}) + "\n")
            log.flush()
        if (step + 1) % PICTURE_EVERY == 0:
            average = ema.average.module.eval()
            names = [p[0] for p in prompts[:: len(prompts) // 40]][:40]
            pictures(args.work / f"{step + 1:06d}.png", average["unet"], average["text_encoder"], autoencoder, names)


if __name__ == "__main__":
    main()
