"""From what a training node is given to a run: what the three of them share."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.utils
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..styleinject_core.commands.config import AdapterTable
from ..styleinject_core.files import AdapterFileError
from ..styleinject_core.files.format import atomic_save
from ..styleinject_core.train.metadata import made_by
from ..styleinject_core.train.model import Conditioning, rows, tensors_hash
from ..styleinject_core.train.settings import TrainSettings
from ..styleinject_core.train.source import LatentSource
from ..styleinject_core.train.tasks import FineTune
from . import paths
from .patcher import ModelPatcher
from .train_data import PIXELS_PER_LATENT, Encoder, Prompt, draw, flat_prompts
from .train_model import ComfyTrainingModel, Loaded, with_lasting_weights
from .train_options import DTYPES, TrainOptions
from .train_run import Outcome, check_name, new_adapter, train_in_folder

DRAWN = "drawn"  # in output/styleinject: latents that models drew for training, kept for the next run
_DTYPES = {name: getattr(torch, name) for name in DTYPES}


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
        table = AdapterTable(self.method, self.rank, self.styles, options.alpha, targets, options.router_pool, options.sta)
        self.config = table.config()
        self.model = with_lasting_weights(self.model)
        self.student = ComfyTrainingModel(self.model)
        if self.teacher is not None:
            self.teacher = with_lasting_weights(self.teacher)
            self.master = ComfyTrainingModel(self.teacher)
        self.encoder = Encoder(self.model)

    @contextmanager
    def loaded(self, shape: Sequence[int]) -> Iterator[Loaded]:
        """The models loaded for latents of this shape (C, ..., H, W), and outside of inference mode."""
        models = [self.student] if self.master is None else [self.student, self.master]
        loaded = Loaded(models, [self.batch_size, *shape])
        with torch.inference_mode(False), torch.no_grad(), loaded.running():
            yield loaded

    def source(self, images: Images) -> LatentSource:
        """Batches of all images."""
        latents, own, theirs = self._encoded(images)
        return LatentSource(latents, own, theirs, batch_size=self.batch_size, seed=self.settings.seed)

    def sources(self, images: Images) -> tuple[LatentSource, dict[str, Any]]:
        """Batches of the images that are trained on, and the task's arguments for those that are held out."""
        held_out = self.options.validation_images
        if not held_out:
            return self.source(images), {}
        latents, own, theirs = self._encoded(images)
        if held_out >= len(latents):
            raise ValueError(f"validation_images: {held_out} of {len(latents)} images leave none to train on")
        order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(self.settings.seed)).tolist()

        def part(chosen: list[int], batch_size: int) -> LatentSource:
            teacher = None if theirs is None else rows(theirs, chosen)
            few = [latents[k] for k in chosen]
            return LatentSource(few, rows(own, chosen), teacher, batch_size=batch_size, seed=self.settings.seed)

        size = min(self.batch_size, held_out)
        validation = part(sorted(order[:held_out]), size)
        return part(sorted(order[held_out:]), self.batch_size), {
            "validation": validation,
            "validation_batches": -(-held_out // size),
        }

    def _encoded(self, images: Images) -> tuple[list[Tensor], Conditioning, Conditioning | None]:
        latents = self.encoder.latents(images.latents)
        shapes = [tuple(latent.shape) for latent in latents]
        own = self.encoder.prompts(images.prompts, shapes)
        if images.teacher_prompts is None or self.teacher is None:
            return latents, own, None
        return latents, own, Encoder(self.teacher).prompts(images.teacher_prompts, shapes)

    def empty_row(self, latent: Tensor, of_teacher: bool = False) -> Conditioning | None:
        """The empty prompt as the model is given it, for images like `latent`."""
        prompt, patcher = (self.teacher_empty, self.teacher) if of_teacher else (self.empty, self.model)
        if prompt is None or patcher is None:
            return None
        shape = tuple(self.encoder.latents([latent])[0].shape)
        return Encoder(patcher).prompts([prompt], [shape])

    def drawn(
        self, loaded: Loaded, model: ComfyTrainingModel, prompts: Sequence[Prompt], empty: Prompt | None, shape: Sequence[int]
    ) -> list[Tensor]:
        """Latents that a model draws, one per prompt; drawn once, and kept for other runs with the same ones."""
        options = self.options
        settings = [list(shape), self.settings.seed, options.sampling_steps, options.guidance]
        parts = [tensor for prompt in (*prompts, *([empty] if empty else [])) for tensor in _tensors(prompt)]
        asked = f"{model.fingerprint}/{tensors_hash(parts)}/{settings}"
        folder = paths.trained_folder() / DRAWN
        path = folder / f"{hashlib.blake2b(asked.encode(), digest_size=12).hexdigest()}.latents"
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.get_tensor("latents"))
        except (OSError, SafetensorError):
            pass
        bar = comfy.utils.ProgressBar(len(prompts))
        latents = draw(
            model.patcher,
            prompts,
            empty,
            shape,
            seed=self.settings.seed,
            steps=options.sampling_steps,
            guidance=options.guidance,
            drawn=bar.update_absolute,
        )
        loaded.prepare()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_save({"latents": latents}, path, {"format": "pt"})
        except (OSError, AdapterFileError) as error:
            logging.warning("StyleInject training: images drawn for training are not kept: %s", error)
        return list(latents)

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
        height, width = (side * PIXELS_PER_LATENT for side in images.latents[0].shape[-2:])
        metadata["modelspec.resolution"] = f"{width}x{height}"

        def pictures() -> Tensor:
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
            dtype=_DTYPES[options.dtype],
            node_id=self.node_id,
            pictures=pictures if options.vae is not None else None,
        )


def empty_prompt(values: Sequence[Any] | None, what: str) -> Prompt | None:
    """The one prompt of an optional CONDITIONING input."""
    return None if values is None else flat_prompts(values, what)[0]


def _tensors(prompt: Prompt) -> list[Tensor]:
    return [prompt[0], *(value for _, value in sorted(prompt[1].items()) if isinstance(value, Tensor))]
