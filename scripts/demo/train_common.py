"""What both training scripts of the demo share: resumable state on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from styleinject_core.files.atomic import replacing


def save_state(path: Path, step: int, **parts: Any) -> None:
    """Write step, RNG and the state_dict of every part; atomic, so a killed run always leaves a good file."""
    state = {name: part.state_dict() for name, part in parts.items()}
    with replacing(path) as temporary:
        torch.save({"step": step, "rng": torch.get_rng_state(), **state}, temporary)


def load_state(path: Path, **parts: Any) -> int:
    """Restore what save_state wrote, RNG included; returns the step to go on from (0 without a file)."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"])
    return state["step"]
