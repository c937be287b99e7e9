"""From what a training node is given to a run: what the three of them share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...styleinject_core import Adapter
from ...styleinject_core.selector import select
from ...styleinject_core.train.data.source import LatentSource
from ...styleinject_core.train.memory import Choice, Workload, choose, prompt_features
from ...styleinject_core.train.objectives.tasks import FineTune
from ...styleinject_core.train.request import TrainingRequest
from ...styleinject_core.train.run.metadata import made_by
from .comfy_model import Loaded, free_memory
from .drawing import draw
from .graph_inputs import Images, Prompt
from .graph_model import GraphModel
from .named_runs import Outcome, chosen_before, train_in_folder
from .train_options import TrainOptions


@dataclass(frozen=True)
class Job:
    """What is asked for, checked, and the models.

    Args:
        student: the MODEL the adapter is for.
        teacher: the one it learns from, in distillation.
        node_id: execution id of the node, for what it shows.
        trigger: the words that call what is learned, for the adapter's metadata.
        memory: what was chosen to make it fit, see `fitted`.

    Raises:
        ValueError: layers that the model has not, or settings that do not fit it.
    """

    request: TrainingRequest
    options: TrainOptions
    student: GraphModel
    teacher: GraphModel | None = None
    node_id: str | None = None
    trigger: str = ""
    memory: Choice | None = None

    def __post_init__(self) -> None:
        steered = self.student.steered_adapter()
        if steered is not None and self.request.settings.gradient_checkpointing:
            raise ValueError(
                f'gradient_checkpointing: adapter "{steered}" on this model has a router control, which blocks that run '
                "again do not see; train without one of the two"
            )
        select(self.student.network.layer_shapes(), ",".join(self.request.adapter.targets))

    def labeled(self, images: Images) -> Job:
        """The same job, with an adapter for the styles that images have. Raises ValueError: it has no place for them."""
        if not images.style_names:
            return self
        adapter = self.request.adapter.labeled(images.style_names, "image_styles")
        return replace(self, request=replace(self.request, adapter=adapter))

    def fitted(
        self, shapes: Sequence[Sequence[int]], prompts: Sequence[Prompt], images: int, passes: int = 1, features: bool = False
    ) -> Job:
        """The same job, with what its memory choice chooses.

        Args:
            shapes: of latents, (C, ..., H, W).
            passes, features: see `Workload`.

        Raises:
            MemoryChoiceError: it cannot be kept; says what would fit.
        """
        student = self.student.network
        models = [student] if self.teacher is None else [student, self.teacher.network]
        largest = self.student.encoder.framed(torch.zeros(*max(shapes, key=math.prod)))
        longest = max(prompts, key=_length)
        (row,), _ = self.student.conditionings([longest], [largest], False)
        work = Workload(
            student,
            self.request,
            largest.shape,
            row,
            images,
            None if self.teacher is None else self.teacher.network,
            passes,
            features,
            may_checkpoint=bool(student.blocks()) and self.student.steered_adapter() is None,
            may_lend=student.device.type not in ("cpu", "mps"),
        )
        choice = choose(work, free_memory(models), chosen_before(self.request.name, self.options.existing_run))
        return replace(self, request=choice.request, memory=choice)

    def check_count(self, images: int) -> None:
        """Refuse a number of images of which none are left to train on (ValueError)."""
        self.request.split(images, "validation_images")

    @contextmanager
    def loaded(self, shape: Sequence[int]) -> Iterator[Loaded]:
        """The models loaded for latents of this shape (C, ..., H, W), and outside of inference mode."""
        models = [self.student.network] if self.teacher is None else [self.student.network, self.teacher.network]
        chosen = self.memory or Choice(self.request)
        shape = [self.request.settings.batch_size, *shape]
        loaded = Loaded(models, shape, chosen.beside_weights, lends=chosen.lent > 0)
        with torch.inference_mode(False), torch.no_grad(), loaded.running():
            yield loaded

    def source(self, images: Images) -> LatentSource:
        """Batches of all images."""
        return self._source(self._encoded(images), range(len(images.latents)), self.request.settings.batch_size)

    def sources(self, images: Images) -> tuple[LatentSource, dict[str, Any]]:
        """Batches of the images that are trained on, and the task's arguments for those that are held out."""
        trained_on, held_out = self.request.split(len(images.latents), "validation_images")
        encoded = self._encoded(images)
        source = self._source(encoded, trained_on, self.request.settings.batch_size)
        if not held_out:
            return source, {}
        validation = self._source(encoded, held_out, 1)  # one by one: each of them once
        return source, {"validation": validation, "validation_batches": len(held_out)}

    def _encoded(self, images: Images) -> dict[str, Sequence[Any] | None]:
        """LatentSource's arguments, one of each per image."""
        latents = self.student.encoder.latents(images.latents)
        if broken := [k + 1 for k, latent in enumerate(latents) if not torch.isfinite(latent).all()]:
            raise ValueError(
                f"latents: {len(broken)} of {len(latents)} hold NaN or infinite numbers (the first is number {broken[0]}): the "
                "VAE made them so, as some do in float16; start ComfyUI with --fp32-vae or --bf16-vae, or take another VAE"
            )
        with_empty = self.request.settings.caption_dropout > 0
        encoded: dict[str, Sequence[Any] | None] = {"latents": latents}
        encoded["conditioning"], encoded["empty"] = self.student.conditionings(images.prompts, latents, with_empty)
        encoded["styles"] = images.style_numbers()
        if self.teacher is not None and images.teacher_prompts is not None:
            taught = self.teacher.conditionings(images.teacher_prompts, latents, with_empty)
            encoded["teacher"], encoded["teacher_empty"] = taught
        return encoded

    def _source(self, encoded: dict[str, Sequence[Any] | None], places: Sequence[int], batch_size: int) -> LatentSource:
        parts: dict[str, Any] = {
            name: None if values is None else [values[k] for k in places] for name, values in encoded.items()
        }
        return LatentSource(**parts, batch_size=batch_size, seed=self.request.settings.seed)

    def run(self, loaded: Loaded, task: FineTune, images: Images) -> Outcome:
        """Train."""
        request, network = self.request, self.student.network
        metadata = made_by(
            task,
            request.settings,
            architecture=network.architecture(),
            method=request.adapter.method,
            base=network.title,
            teacher="" if self.teacher is None else self.teacher.network.title,
        )
        height, width = (side * self.student.encoder.pixels_per_latent for side in images.shape[-2:])
        metadata["modelspec.resolution"] = f"{width}x{height}"
        if self.trigger:
            metadata["modelspec.trigger_phrase"] = self.trigger
        return train_in_folder(
            self._new_adapter(images),
            task,
            request.settings,
            existing=self.options.existing_run,
            metadata=metadata,
            dtype=request.torch_dtype,
            node_id=self.node_id,
            note="" if self.memory is None else self.memory.report,
            heading=self._heading(task, images),
            pictures=(lambda: self._pictures(loaded, images)) if self.options.vae is not None else None,
        )

    def _new_adapter(self, images: Images) -> Adapter:
        """An untrained one, whose styles have the images' names."""
        network = self.student.network
        one = self.student.encoder.framed(torch.zeros(*images.shape))
        (row,), _ = self.student.conditionings(images.prompts[:1], [one], False)
        adapter = self.request.new_adapter(network.layer_shapes(), prompt_features(network, row)).to(network.device)
        return adapter.with_style_names(images.style_names) if images.style_names else adapter

    def _heading(self, task: FineTune, images: Images) -> str:
        """What is trained on what, as the command line says it first."""
        network, sampling = self.student.network, self.student.network.schedule.sampling
        shapes = Counter(tuple(side * self.student.encoder.pixels_per_latent for side in x.shape[-2:]) for x in images.latents)
        sizes = ", ".join(f"{count} of {width}x{height}" for (height, width), count in shapes.most_common(6))
        kinds = [base.__name__ for base in type(sampling).__mro__[1:-1] if base is not torch.nn.Module]
        counted = Counter(name or "none" for name in images.styles)
        styles = f"; styles {', '.join(f'{name} ({count})' for name, count in counted.items())}" if counted else ""
        vae: Any = self.options.vae
        shown = "VAE not connected, so no pictures are drawn"
        if vae is not None:
            kind = type(getattr(vae, "first_stage_model", vae)).__name__
            shown = f"pictures by the VAE {kind}{_loaded_from(getattr(vae, 'patcher', None))}"
        return (
            f"{task.objective} on {network.title}{_loaded_from(self.student.patcher)}, predicting "
            f"{network.schedule.prediction_type} ({', '.join(kinds)}); layers {', '.join(self.request.adapter.targets)}; "
            f"{len(images.latents)} latents: {sizes}{', ...' if len(shapes) > 6 else ''}, of {self.student.encoder.channels} "
            f"channels{styles}; {shown}"
        )

    def _pictures(self, loaded: Loaded, images: Images) -> Iterator[Tensor]:
        """What the model draws with the adapter as it is, (H, W, 3) each, in [0, 1]; of a clip its frames."""
        options, seed = self.options, self.request.settings.seed
        try:
            for k, prompt in enumerate(options.pictured or images.prompts[:1]):  # one by one: memory is short
                with self.student.network.sampled() as patcher:
                    latent = draw(
                        patcher,
                        [prompt],
                        self.student.empty,
                        images.shape,
                        seed=seed + k,
                        steps=options.sampling_steps,
                        guidance=options.guidance,
                    )
                with torch.inference_mode():
                    image = options.vae.decode(latent)
                yield from image.reshape(-1, *image.shape[-3:])[..., :3].float().cpu()
        finally:  # it may have failed for want of memory, and training goes on
            loaded.prepare()


def _loaded_from(patcher: Any) -> str:
    """The files that a MODEL or VAE was loaded from, " (name)", where this version of ComfyUI remembers them."""
    remembered = getattr(patcher, "cached_patcher_init", None)
    given = remembered[1][0] if isinstance(remembered, tuple) and len(remembered) > 1 and remembered[1] else ()
    paths = given if isinstance(given, (list, tuple)) else [given]
    names = [Path(path).name for path in paths if isinstance(path, (str, Path))]
    return f" ({', '.join(names)})" if names else ""


def _length(prompt: Prompt) -> tuple[int, int]:
    """By which prompts are compared: their reference images, which make a sequence far longer than words do, and then words."""
    tensor, extras = prompt
    return sum(latent.numel() for latent in extras.get("reference_latents") or ()), tensor.shape[1]
