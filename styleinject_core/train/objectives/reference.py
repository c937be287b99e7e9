"""Training a DEADiff (arXiv 2403.06951): pairs of images, one task a batch, everything frozen but the DEADiff itself.

                    reference -> target                     stream     prompt of the U-Net
    style           same style, another subject             style      what the target shows
    content         same subject, another style             content    the target's style
    reconstruction  the same image                          both       empty

The authors published neither code nor data of theirs; tasks and prompts are what their config and figure show. Their style
pairs share the prompt too; another subject is what keeps the reference's subject out of the style.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...call import CurrentCall, ModelCall
from ...deadiff.config import STREAMS
from ...deadiff.inject import PARTS, matched_layers
from ...deadiff.model import Deadiff
from ...deadiff.rows import repeats
from ...override import Override, Tail
from ..data.batches import Conditioning, conditioning_hash, tensors_hash
from ..models.noise import add_noise
from ..models.training_model import TrainingModel
from ..random_numbers import VALIDATION, RandomNumbers
from ..settings import TrainSettings
from .losses import fine_tune_loss

TASKS = ("style", "content", "reconstruction")
_STREAMS_OF = {"style": ("style",), "content": ("content",), "reconstruction": STREAMS}


@dataclass(frozen=True)
class Shares:
    """How often each task is trained; the authors' config has 1:1:1.

    Raises:
        ValueError: a negative share, or none above 0.
    """

    style: float = 1.0
    content: float = 1.0
    reconstruction: float = 1.0

    def __post_init__(self) -> None:
        values = [getattr(self, task) for task in TASKS]
        if min(values) < 0 or sum(values) <= 0:
            raise ValueError(f"shares of the tasks are {values}, expected numbers of at least 0 with a sum above it")

    def pick(self, uniform: float) -> str:
        """The task of a number in [0, 1)."""
        total = sum(getattr(self, task) for task in TASKS)
        for task in TASKS:
            uniform -= getattr(self, task) / total
            if uniform < 0:
                return task
        return next(task for task in reversed(TASKS) if getattr(self, task) > 0)


@dataclass(frozen=True)
class PairedImages:
    """What is trained on: images of which it is known what they show and in which style.

    Args:
        latents: (n, C, H, W).
        features: the vision encoder's output (n, vision_tokens, vision_width).
        styles, subjects: n labels each.
        subject_prompts, style_prompts: conditioning, n rows each: what each image shows, and how.
        empty: the empty prompt, one row.

    Raises:
        ValueError: counts that differ.
    """

    latents: Tensor
    features: Tensor
    styles: Sequence[str]
    subjects: Sequence[str]
    subject_prompts: Conditioning
    style_prompts: Conditioning
    empty: Conditioning

    def __post_init__(self) -> None:
        count = len(self.latents)
        for label in ("features", "styles", "subjects"):
            if len(getattr(self, label)) != count:
                raise ValueError(f"{count} latents and {len(getattr(self, label))} {label}")

    def summary(self) -> dict[str, Any]:
        """What they are, to recognize them by."""
        return {
            "images": tensors_hash([self.latents, self.features]),
            "labels": tensors_hash([torch.tensor(list("\n".join([*self.styles, *self.subjects]).encode()))]),
            "prompts": conditioning_hash(self.subject_prompts) + conditioning_hash(self.style_prompts),
        }

    def partners(self, task: str) -> list[list[int]]:
        """For each image those that may be its reference.

        Raises:
            ValueError: no image has one.
        """
        if task == "reconstruction":
            return [[k] for k in range(len(self.latents))]
        same, other = (self.styles, self.subjects) if task == "style" else (self.subjects, self.styles)
        groups: dict[str, list[int]] = {}
        for k, label in enumerate(same):
            groups.setdefault(label, []).append(k)
        found = [[j for j in groups[label] if other[j] != other[k]] for k, label in enumerate(same)]
        if not any(found):
            what = "style that shows something else" if task == "style" else "subject in another style"
            raise ValueError(f"{task} pairs: no image has a partner of the same {what}")
        return found


class ReferenceTask:
    """E‖target - prediction‖² of targets, given their references' tokens; a Task of `train`, with the Deadiff in the adapter's
    place.

    Args:
        model: the frozen model.
        images: what to train on.
        shares: how often each task comes.
        validation: images that are never trained on.
        begins: what the Deadiff is before training, as a hash; for recognizing the run.
        dropout: share of targets that get empty tokens instead. Nothing is learned from them, since everything but the
            tokens' path is frozen: the authors' .15 only makes batches smaller.
    """

    objective = "reference"
    advice = ""

    def __init__(
        self,
        model: TrainingModel,
        images: PairedImages,
        settings: TrainSettings,
        shares: Shares = Shares(),
        *,
        validation: PairedImages | None = None,
        validation_batches: int = 4,
        dropout: float = 0.0,
        begins: str = "",
    ):
        if settings.validate_every and validation is None:
            raise ValueError("validate_every is set, but there are no validation images")
        self.model, self.images, self.settings, self.shares = model, images, settings, shares
        self.validation, self.validation_batches, self.dropout = validation, validation_batches, dropout
        self.begins = begins
        used = [task for task in TASKS if getattr(shares, task) > 0]
        self._partners = {id(own): {task: own.partners(task) for task in used} for own in (images, validation) if own}
        self._tokens: dict[str, Tensor] = {}  # of the batch in work, by stream

    @property
    def is_float16(self) -> bool:
        return self.model.is_float16

    @contextmanager
    def installed(self, adapter: Any) -> Iterator[None]:
        """The rows of the batch's tokens on the model, with gradients; `adapter` is the Deadiff."""
        deadiff: Deadiff = adapter
        self._deadiff, current, host = deadiff, CurrentCall(), self.model.denoiser
        with ExitStack() as stack:
            for place, (site, part, module, shape) in enumerate(matched_layers(host, deadiff)):
                weight = deadiff.weight(place // len(PARTS), part)
                tail = Tail(self._rows_of(site.stream, weight), current)
                Override(module, shape).install(tail)
                stack.callback(Override.remove, module, tail)
            yield

    def _rows_of(self, stream: str, weight: nn.Parameter) -> Any:
        def rows(x: Tensor, out: Tensor, _call: ModelCall) -> Tensor:
            tokens = self._tokens[stream]
            own = tokens.to(out.dtype) @ weight.to(out.dtype).T  # (B, queries, C)
            return own.repeat(1, repeats(x.shape[1], self._deadiff.config.text_tokens), 1)

        return rows

    def loss(self, rng: RandomNumbers) -> Tensor:
        return self._batch_loss(self.images, rng)

    def validation_loss(self) -> float:
        assert self.validation is not None
        count = self.validation_batches
        losses = [self._batch_loss(self.validation, RandomNumbers(self.settings.seed, VALIDATION - k)) for k in range(count)]
        return sum(float(loss) for loss in losses) / count

    def _batch_loss(self, images: PairedImages, rng: RandomNumbers) -> Tensor:
        count, device = self.settings.batch_size, self.model.device
        # one number for the batch, the same in all processes
        task = self.shares.pick(torch.rand((), generator=rng.generator).item())
        partners = self._partners[id(images)][task]
        usable = [k for k, own in enumerate(partners) if own]
        targets = [usable[int(u * len(usable))] for u in rng.uniform(count).tolist()]
        references = [partners[k][int(u * len(partners[k]))] for k, u in zip(targets, rng.uniform(count).tolist(), strict=True)]
        kept = (rng.uniform(count) >= self.dropout).to(device)
        features = images.features[references].to(device)
        self._tokens = {}
        for stream in STREAMS:
            if stream in _STREAMS_OF[task]:
                tokens = self._deadiff.streams[stream](features)
                self._tokens[stream] = tokens * kept.view(-1, 1, 1)  # empty tokens: K = V = 0
            else:
                config = self._deadiff.config
                self._tokens[stream] = torch.zeros(count, config.queries, config.width, device=device)
        latents = images.latents[targets].to(device)
        schedule = self.model.schedule
        times = schedule.times(rng.uniform(count)).to(device)
        noise = rng.normal(latents)
        noisy = add_noise(schedule, latents, noise, times)
        prediction = self.model.predict(noisy, times, self._prompts(images, task, targets))
        return fine_tune_loss(prediction, schedule, latents, noise, times, self.settings.min_snr_gamma)

    def _prompts(self, images: PairedImages, task: str, targets: Sequence[int]) -> Conditioning:
        if task == "reconstruction":
            return {name: value.expand(len(targets), *value.shape[1:]) for name, value in images.empty.items()}
        source = images.subject_prompts if task == "style" else images.style_prompts
        return {name: value[list(targets)] for name, value in source.items()}

    def plan(self) -> dict[str, Any]:
        data = self.images.summary()
        shares = {task: getattr(self.shares, task) for task in TASKS}
        model = {"model": self.model.fingerprint, "sampling": self.model.sampling}
        plan = {"objective": self.objective, **model, "data": data, "shares": shares, "begins": self.begins}
        if self.validation is not None:
            plan["validation"] = self.validation.summary()
        return {**plan, "dropout": self.dropout}

    def state_dict(self) -> dict[str, Any]:
        return {}  # every draw is a function of the seed and the step

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


@torch.no_grad()
def start_from_host(deadiff: Deadiff, host: nn.Module) -> None:
    """i_to_k and i_to_v start as the host's to_k and to_v, where the tokens are as wide as its text; else at random.

    Raises:
        ReferenceMismatchError: the host has other cross-attentions.
    """
    for place, (_, part, module, shape) in enumerate(matched_layers(host, deadiff)):
        weight = deadiff.weight(place // len(PARTS), part)
        if weight.shape[1] == shape.in_features:
            weight.copy_(module.get_parameter("weight"))
        else:
            weight.normal_(0, weight.shape[1] ** -0.5)


def align(
    deadiff: Deadiff, features: Tensor, texts: Tensor, *, steps: int, batch: int = 64, rate: float = 2e-3, seed: int = 0
) -> float:
    """Teach the content stream to say what the text encoder says: its tokens are regressed onto the prompts' first rows.

    A stand-in for a pretrained Q-Former, without which the content stream does not start: i_to_k and i_to_v begin as to_k
    and to_v, so that tokens that look like text act like text from the first step on.

    Args:
        features: (n, vision_tokens, vision_width) of the images.
        texts: (n, L, width), the conditioning of what each shows.

    Returns:
        The mean loss of the last tenth of the steps.

    Raises:
        ValueError: tokens that are not as wide as the text.
    """
    queries, width = deadiff.config.queries, deadiff.config.width
    if texts.shape[-1] != width:
        raise ValueError(f"tokens are {width} wide, the text encoder's output {texts.shape[-1]}: they cannot be aligned")
    stream = deadiff.streams["content"]
    optimizer = torch.optim.AdamW(stream.parameters(), lr=rate)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50, (steps - step) / (0.3 * steps))
        rows = (RandomNumbers(seed, step).uniform(batch) * len(features)).long()
        loss = (stream(features[rows]) - texts[rows, :queries]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)
