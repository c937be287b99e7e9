"""Train the classifier that measures the demo's samples, on every concept in every style.

    python scripts/demo/train_classifier.py            # about 5 minutes on two CPU cores
    python scripts/demo/train_classifier.py --check    # leaves one style of each concept out, and tests on those

Pictures are shifted, scaled, recolored and blurred in training, and some are passed through the autoencoder, so that
what a diffusion model draws is nothing strange to it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))
from styleinject_core.demo import data
from styleinject_core.demo.classifier import CLASSIFIER_FILE, Classifier
from styleinject_core.demo.model import load_autoencoder
from styleinject_core.files.atomic import save_tensors


def augment(images: Tensor) -> Tensor:
    """Random shift, scale, rotation, contrast, tint and noise, one draw per image."""
    count = len(images)
    scale = 1 + 0.25 * (torch.rand(count) - 0.5)
    angle = 0.3 * (torch.rand(count) - 0.5)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale * angle.cos()
    theta[:, 0, 1], theta[:, 1, 0] = -scale * angle.sin(), scale * angle.sin()
    theta[:, :, 2] = 0.2 * (torch.rand(count, 2) - 0.5)
    moved = F.grid_sample(1 - images, F.affine_grid(theta, images.shape, False), align_corners=False)  # outside is white
    contrast = 1 + 0.3 * (torch.rand(count, 1, 1, 1) - 0.5)
    tint = 0.15 * torch.randn(count, 3, 1, 1) * (moved > 0.05)
    noise = 0.15 * torch.rand(count, 1, 1, 1) * torch.randn_like(moved)
    return (1 - moved * contrast + tint + noise).clamp(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--check", action="store_true", help="train without one style per concept and test on it; save nothing")
    args = parser.parse_args()
    torch.manual_seed(0)
    images = torch.stack([data.images(style) for style in data.styles()])  # (S, C, 3, 64, 64)
    styles, concepts = images.shape[:2]
    with torch.no_grad():
        autoencoder = load_autoencoder()
        decoded = torch.stack([autoencoder.decode(autoencoder.encode(x) + 0.1 * torch.randn(len(x), 16, 8, 8)) for x in images])
    pairs = torch.cartesian_prod(torch.arange(styles), torch.arange(concepts))
    left_out = pairs[:, 1] % styles == pairs[:, 0]
    shown = pairs[~left_out] if args.check else pairs
    model = Classifier(concepts, styles)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=args.steps)
    bar = tqdm(range(args.steps), mininterval=5)
    for step in bar:
        style, concept = shown[torch.randint(len(shown), (args.batch,))].unbind(1)
        source = torch.where((torch.rand(args.batch) < 0.5).view(-1, 1, 1, 1), images[style, concept], decoded[style, concept])
        concept_logits, style_logits = model(augment(source))
        loss = F.cross_entropy(concept_logits, concept, label_smoothing=0.05) + F.cross_entropy(style_logits, style)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        for label, chosen in (("shown in training", shown), ("left out", pairs[left_out])):
            style, concept = chosen.unbind(1)
            logits = [torch.cat(part) for part in zip(*(model(x) for x in decoded[style, concept].split(128)), strict=True)]
            right = [(logit.argmax(1) == truth).float().mean() for logit, truth in zip(logits, (concept, style), strict=True)]
            if args.check or label != "left out":
                print(f"{label}: concept {right[0]:.1%}, style {right[1]:.1%} of {len(chosen)}")
    if not args.check:
        state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        save_tensors(state, CLASSIFIER_FILE, {"format": "pt"})


if __name__ == "__main__":
    main()
