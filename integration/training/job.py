"""From what a training node is given to a run: what the three of them share."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import comfy.utils
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...styleinject_core.commands.config import AdapterTable
from ...styleinject_core.files import AdapterFileError
from ...styleinject_core.files.format import atomic_save
from ...styleinject_core.selector import select
from ...styleinject_core.train.data.batches import tensors_hash
from ...styleinject_core.train.data.source import LatentSource
from ...styleinject_core.train.objectives.tasks import FineTune
from ...styleinject_core.train.run.metadata import made_by
from ...styleinject_core.train.settings import TrainSettings
from .. import paths
from ..patcher import ModelPatcher, injections_of
from .comfy_model import ComfyTrainingModel, Loaded, with_lasting_weights
from .graph_inputs import Encoder, Prompt, draw, flat_prompts
from .named_runs import Outcome, check_name, new_adapter, train_in_folder
from .options import TrainOptions

DRAWN = "drawn"  # in output/styleinject: latents that models drew for training, kept for the next run


@dataclass(frozen=True)
class Images:
    """What is trained on: latents in the scale of the VAE, (C, H, W) each, with a prompt each."""

    latents: Sequence[Tensor]
    prompts: Sequence[Prompt]
    teacher_prompts: Sequence[Prompt] | None = None


@dataclass
class Job:
    """The widgets that all training nodes have, checked, and the models.

    Args:
        model: the MODEL the adapter is for.
        teacher: the one it learns from, in distillation.
        empty, teacher_empty: the empty prompts.
        node_id: execution id of the node, for what it shows.

    Raises:
        ValueError: a value out of range, or a model that cannot be trained.
    """

    model: ModelPatcher
    name: str
    method: str
    steps: int
    learning_rate: float
    batch_size: int
    rank: int
    styles: int
    layers: str
    options: TrainOptions
    empty: Prompt | None = None
    teacher: ModelPatcher | None = None
    teacher_empty: Prompt | None = None
    node_id: str | None = None
    settings: TrainSettings = field(init=False)
    student: ComfyTrainingModel = field(init=False)
    master: ComfyTrainingModel | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.name = check_name(self.name)
        self.settings = self.options.settings(steps=self.steps, batch_size=self.batch_size, learning_rate=self.learning_rate)
        targets = tuple(term.strip() for term in self.layers.split(",") if term.strip())
        options = self.options
        table = AdapterTable(
            method=self.method,
            rank=self.rank,
            styles=self.styles,
            alpha=options.alpha,
            targets=targets,
            router_pool=options.router_pool,
            sta=options.sta,
        )
        self.config = table.config()
        self.model = with_lasting_weights(self.model)
        self.student = ComfyTrainingModel(self.model)
        steered = [injection.applied.adapter.name for injection in injections_of(self.model) if injection.control]
        if steered and options.gradient_checkpointing:
            raise ValueError(
                f'gradient_checkpointing: adapter "{steered[0]}" on this model has a router control, which blocks that run '
                "again do not see; train without one of the two"
            )
        if self.teacher is not None:
            self.teacher = with_lasting_weights(self.teacher)
            self.master = ComfyTrainingModel(self.teacher)
        select(self.student.layer_shapes(), ",".join(targets))
        self.encoder = Encoder(self.model)
        self.teacher_encoder = None if self.teacher is None else Encoder(self.teacher)

    def check_count(self, images: int) -> None:
        """Refuse a number of images of which none are left to train on (ValueError)."""
        held_out = self.options.validation_images
        if held_out >= images:
            raise ValueError(f"validation_images: {held_out} of {images} images leave none to train on")

    @contextmanager
    def loaded(self, shape: Sequence[int]) -> Iterator[Loaded]:
        """The models loaded for latents of this shape (C, ..., H, W), and outside of inference mode."""
        models = [self.student] if self.master is None else [self.student, self.master]
        loaded = Loaded(models, [self.batch_size, *shape])
        with torch.inference_mode(False), torch.no_grad(), loaded.running():
            yield loaded

    def source(self, images: Images) -> LatentSource:
        """Batches of all images."""
        return self._source(self._encoded(images), range(len(images.latents)), self.batch_size)

    def sources(self, images: Images) -> tuple[LatentSource, dict[str, Any]]:
        """Batches of the images that are trained on, and the task's arguments for those that are held out."""
        held_out = self.options.validation_images
        if not held_out:
            return self.source(images), {}
        self.check_count(count := len(images.latents))
        encoded = self._encoded(images)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.settings.seed)).tolist()
        return self._source(encoded, sorted(order[held_out:]), self.batch_size), {
            "validation": self._source(encoded, sorted(order[:held_out]), 1),  # one by one: each of them once
            "validation_batches": held_out,
        }

    def _encoded(self, images: Images) -> tuple[Sequence[Any] | None, ...]:
        """Latents, prompts, the teacher's prompts, and the empty ones of both, one of each per image; LatentSource's arguments.

        Raises:
            ValueError: prompts of different lengths, for a batch of a model that cannot mix them.
        """
        latents = self.encoder.latents(images.latents)
        shapes = [tuple(latent.shape) for latent in latents]

        def rows(encoder: Encoder | None, prompts: Sequence[Prompt] | None, empty: Prompt | None):
            if encoder is None or prompts is None:
                return None, None
            drops = empty is not None and self.settings.caption_dropout > 0
            return encoder.prompts(prompts, shapes), encoder.prompts([empty] * len(shapes), shapes) if drops else None

        own, own_empty = rows(self.encoder, images.prompts, self.empty)
        theirs, their_empty = rows(self.teacher_encoder, images.teacher_prompts, self.teacher_empty)
        for encoder in (self.encoder, self.teacher_encoder):
            if self.batch_size > 1 and encoder is not None and len(encoder.lengths) > 1:
                few = ", ".join(map(str, sorted(encoder.lengths)[:5]))
                raise ValueError(
                    f"batch_size {self.batch_size}: this model takes prompts of different lengths ({few} tokens) one by one; "
                    "set batch_size to 1, and accumulation in the options to what it was"
                )
        return latents, own, theirs, own_empty, their_empty

    def _source(self, encoded: Sequence[Sequence[Any] | None], chosen: Sequence[int], batch_size: int) -> LatentSource:
        parts = [None if each is None else [each[k] for k in chosen] for each in encoded]
        return LatentSource(*parts, batch_size=batch_size, seed=self.settings.seed)  # type: ignore[arg-type]

    def drawn(
        self, loaded: Loaded, model: ComfyTrainingModel, prompts: Sequence[Prompt], empty: Prompt | None, shape: Sequence[int]
    ) -> list[Tensor]:
        """Latents that a model draws, one per prompt; drawn once, and kept for other runs with the same ones."""
        options = self.options
        settings = [list(shape), self.settings.seed, options.sampling_steps, options.guidance]
        asked = f"{model.fingerprint}/{prompts_hash(prompts)}/{prompts_hash([empty] if empty else [])}/{settings}"
        folder = paths.trained_folder() / DRAWN
        path = folder / f"{hashlib.blake2b(asked.encode(), digest_size=12).hexdigest()}.latents"
        latents: list[Tensor] = []
        with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
            latents.extend(file.get_tensor("latents").clone())  # not mapped to the file, which may be replaced
        kept, bar = len(latents), comfy.utils.ProgressBar(len(prompts))
        if kept == len(prompts):
            return latents
        how = {"steps": options.sampling_steps, "guidance": options.guidance}
        try:
            for k in range(kept, len(prompts)):
                latents.extend(draw(model.patcher, prompts[k : k + 1], empty, shape, seed=self.settings.seed + k, **how))
                bar.update_absolute(k + 1)
        finally:
            if len(latents) > kept:  # also what was drawn before an interrupt
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    atomic_save({"latents": torch.stack(latents)}, path, {"format": "pt"})
                except (OSError, AdapterFileError) as error:
                    logging.warning("StyleInject training: images drawn for training are not kept: %s", error)
        loaded.prepare()
        return latents

    def run(self, loaded: Loaded, task: FineTune, images: Images) -> Outcome:
        """Train."""
        options, student = self.options, self.student
        adapter = new_adapter(student.layer_shapes(), self.config, self.name, self.settings.seed).to(student.device)
        metadata = made_by(
            task,
            self.settings,
            student.architecture(),
            self.method,
            student.title,
            "" if self.master is None else self.master.title,
        )
        height, width = (side * self.encoder.pixels_per_latent for side in images.latents[0].shape[-2:])
        metadata["modelspec.resolution"] = f"{width}x{height}"

        def pictures() -> Tensor:  # (N, H, W, 3)
            latents = draw(
                self.model,
                options.pictured or images.prompts[:1],
                self.empty,
                images.latents[0].shape,
                seed=self.settings.seed,
                steps=options.sampling_steps,
                guidance=options.guidance,
            )
            with torch.inference_mode():
                decoded = [options.vae.decode(latent.unsqueeze(0)) for latent in latents]
            loaded.prepare()
            return torch.cat([image.reshape(-1, *image.shape[-3:])[..., :3].float().cpu() for image in decoded])

        return train_in_folder(
            adapter,
            task,
            self.settings,
            existing=options.existing_run,
            metadata=metadata,
            dtype=getattr(torch, options.dtype),
            node_id=self.node_id,
            pictures=pictures if options.vae is not None else None,
        )


def empty_prompt(values: Sequence[Any] | None, what: str) -> Prompt | None:
    """The one prompt of an optional CONDITIONING input."""
    return None if values is None else flat_prompts(values, what)[0]


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """A fingerprint of prompts and of all that belongs to them: pooled outputs, sizes, guidance."""
    tensors, others = [], []
    for tensor, extras in prompts:
        tensors.append(tensor)
        for key, value in sorted(extras.items()):
            if isinstance(value, Tensor):
                tensors.append(value)
            else:
                others.append(f"{key}: {value!r}")
    return hashlib.blake2b(f"{tensors_hash(tensors)} {others}".encode(), digest_size=8).hexdigest()
