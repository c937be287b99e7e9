"""Train the demo's autoencoder on the sprite sheets of all styles: `python scripts/demo/train_autoencoder.py WORK`.

Resumable: WORK/autoencoder.pt is written every 200 steps and picked up again. About 15 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))
from train_common import load_state, save_state

from styleinject_core.demo import data
from styleinject_core.demo.autoencoder import Autoencoder


def gradient(x: torch.Tensor) -> torch.Tensor:
    """Horizontal and vertical pixel differences (B, 6, H-1, W-1): what makes outlines sharp."""
    return torch.cat([x[..., 1:, 1:] - x[..., 1:, :-1], x[..., 1:, 1:] - x[..., :-1, 1:]], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "autoencoder.pt"

    torch.manual_seed(0)
    images = torch.cat([data.images(style) for style in data.styles()])
    model = Autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    start = load_state(path, model=model, optimizer=optimizer, schedule=schedule)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, mininterval=5)
    for step in bar:
        rows = torch.randint(len(images), (args.batch,))
        shift = torch.randint(-3, 4, (2,)).tolist()
        x = images[rows].roll(shift, (2, 3))
        z = model.encoder(x)
        noisy = z + 0.1 * torch.randn_like(z)  # the decoder must forgive what a diffusion model gets slightly wrong
        y = model.decoder(noisy)
        loss = F.l1_loss(y, x) + F.l1_loss(gradient(y), gradient(x)) + 1e-2 * z.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", z=f"{z.std().item():.2f}")
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            save_state(path, step + 1, model=model, optimizer=optimizer, schedule=schedule)
    with torch.no_grad():
        z = model.encoder(images)
        model.mean.copy_(z.mean((0, 2, 3)))
        model.std.copy_(z.std((0, 2, 3)))
    save_state(path, args.steps, model=model, optimizer=optimizer, schedule=schedule)
    error = (model.decode(model.encode(images)) - images).square().mean()
    print(f"reconstruction PSNR {10 * torch.log10(4 / error):.1f} dB over {len(images)} images")


if __name__ == "__main__":
    main()
