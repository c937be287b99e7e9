"""Training objectives (method, section 4): fine-tuning, and distilling one model into another."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...call import CurrentCall
from ..models.noise import NoiseSchedule, min_snr_weight, target


def fine_tune_loss(
    prediction: Tensor,
    schedule: NoiseSchedule,
    latents: Tensor,
    noise: Tensor,
    times: Tensor,
    min_snr_gamma: float = 0.0,
) -> Tensor:
    """E‖target - prediction‖²: fine-tuning, and both halves of DreamBooth.

    Args:
        prediction: the model's, for z_t, like latents.
        latents: clean latents x0, (B, C, H, W).
        noise: ε ~ N(0, 1), like latents.
        times: (B,).
        min_snr_gamma: weights samples by min(SNR, γ); 0 leaves all alike.

    Returns:
        A scalar in float32.
    """
    weight = min_snr_weight(schedule, times, min_snr_gamma) if min_snr_gamma > 0 else None
    return weighted_error(prediction, target(schedule, latents, noise, times), weight)


def weighted_error(prediction: Tensor, wanted: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean squared error of (B, ...), samples weighted by (B,); a scalar in float32."""
    error = (prediction.float() - wanted.float()).square().flatten(1).mean(1)  # (B,)
    return error.mean() if weight is None else (error * weight.to(error)).mean()


def distil_loss(
    student: Tensor,
    teacher: Tensor,
    student_features: Mapping[str, Tensor],
    teacher_features: Mapping[str, Tensor],
    output_weight: float = 1.0,
    feature_weight: float = 1.0,
) -> Tensor:
    """λ_out ‖ε_T - ε_S‖² + λ_feat Σ_l ‖f_T^l - f_S^l‖², each a mean over its elements.

    Args:
        student, teacher: predictions of the same type at the same z_t.
        student_features, teacher_features: outputs of the U-Nets' blocks by name; empty without the feature loss.

    Raises:
        ValueError: the two have other blocks, or blocks of other sizes; names the first.
    """
    loss = output_weight * weighted_error(student, teacher)
    if different := sorted(student_features.keys() ^ teacher_features.keys()):
        raise ValueError(f"block {different[0]} is in only one of teacher and student: set feature_weight to 0")
    for name, feature in student_features.items():
        if feature.shape != teacher_features[name].shape:
            raise ValueError(
                f"block {name}: the teacher's features are {tuple(teacher_features[name].shape)}, "
                f"the student's {tuple(feature.shape)}: set feature_weight to 0"
            )
        loss = loss + feature_weight * weighted_error(feature, teacher_features[name])
    return loss


@contextmanager
def block_features(blocks: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect what blocks put out, with gradients where they are on; the dict holds the last call of each.

    Of a block with several streams (text and image), each is a feature: "name.0", "name.1".

    with block_features(model.blocks()) as features:
        prediction = model.predict(noisy, times, conditioning)
    """
    features: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, named: dict[str, Any], output: Any) -> None:
            several = isinstance(output, (tuple, list))
            in_place = _versions(args, named) != before.pop(module, None)  # and so will the next block
            for k, stream in enumerate(output if several else [output]):
                if isinstance(stream, Tensor):
                    features[f"{name}.{k}" if several else name] = stream.clone() if in_place else stream

        return hook

    before: dict[nn.Module, list[int]] = {}

    def note(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        before[module] = _versions(args, named)

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks.values()]
    handles += [block.register_forward_hook(keep(name), with_kwargs=True) for name, block in blocks.items()]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def checkpointed(
    blocks: Mapping[str, nn.Module], in_place: Collection[str] = (), currents: Sequence[CurrentCall] = ()
) -> Iterator[None]:
    """Gradient checkpointing: blocks keep their inputs only and run again in the backward pass.

    Hold it open until after the backward pass, and enter it inside of the attachment, so that the second run has the
    adapter too. What blocks are given is copied for them: their callers change dicts of options that they pass on.

    Args:
        in_place: names of blocks that may write into what they are given: nothing in them keeps that for the backward pass.
        currents: the calls that adapters' layers are in; in the second run they are what they were in the first.

    Raises:
        ValueError: in the forward pass, where another block does so: its gradients would be wrong.
    """
    from torch.utils.checkpoint import checkpoint

    former: dict[nn.Module, Any] = {}

    def again(name: str, run: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return run(*args, **kwargs)
            named = {key: _noted(value) for key, value in kwargs.items()}
            called = partial(_on_copies, _in_calls(run, currents), None if name in in_place else name, **named)
            return checkpoint(called, *map(_noted, args), use_reentrant=False)

        return forward

    try:
        for name, block in blocks.items():
            former[block] = block.__dict__.get("forward")
            block.forward = again(name, block.forward)
        yield
    finally:
        for block, forward in former.items():
            if forward is None:
                del block.__dict__["forward"]
            else:
                block.forward = forward


def _in_calls(run: Any, currents: Sequence[CurrentCall]) -> Any:
    """Something to call, in the calls that adapters' layers are in now."""
    calls = [(current, current.call) for current in currents]

    def called(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for current, call in calls:
                stack.enter_context(current.exactly(call))
            return run(*args, **kwargs)

    return called if calls else run


def _noted(value: Any) -> Any:
    """Options as they are now."""
    return dict(value) if isinstance(value, dict) else value


def _on_copies(run: Any, checked: str | None, /, *args: Any, **kwargs: Any) -> Any:
    """Call a block on copies; one that is checked (by its name) must not write into them."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else _noted(value)

    args, kwargs = tuple(map(copied, args)), {key: copied(value) for key, value in kwargs.items()}
    before = _versions(args, kwargs)
    output = run(*args, **kwargs)
    if checked is not None and _versions(args, kwargs) != before:
        raise ValueError(f"gradient_checkpointing: block {checked} writes into its inputs, set it to false for this model")
    return output


def _versions(args: Any, kwargs: Mapping[str, Any]) -> list[int]:
    """How often tensors have been written to."""
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
