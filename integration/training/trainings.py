"""The three trainings, each from what its node is given to its outcome. What cannot be is said before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...styleinject_core.train.objectives.tasks import Distil, DreamBooth, FineTune, check_weights_differ
from ..patcher import ModelPatcher
from .drawing import drawn_for_training
from .graph_inputs import Images, Prompt, a_prompt_each, flat_latents, flat_prompts
from .job import Job
from .named_runs import Outcome


def fine_tune(job: Job, images: Images) -> Outcome:
    """Train on images and their prompts, and styles, where they have some."""
    job = job.labeled(images).fitted([latent.shape for latent in images.latents], images.prompts, len(images.latents))
    with job.loaded(images.shape) as loaded:
        source, validation = job.sources(images)
        return job.run(loaded, FineTune(job.student.network, source, job.request.settings, **validation), images)


@dataclass(frozen=True)
class ClassImages:
    """The images of the subject's class, for DreamBooth.

    Args:
        prompts: of the class: one each, or one for all; of images to be drawn, in turn.
        latents: in the scale of the VAE; None lets the model draw `count`.
        weight: of their loss; 0 does without them.
    """

    prompts: Sequence[Prompt]
    latents: Sequence[Tensor] | None
    count: int
    weight: float


def dreambooth(job: Job, images: Images, class_images: ClassImages) -> Outcome:
    """Train on a few images of one subject, beside images of its class."""
    network, prior = job.student.network, None
    DreamBooth.check(network, job.request.settings)
    job.check_count(len(images.latents))
    shapes = [latent.shape for latent in (*images.latents, *(class_images.latents or []))]
    job = job.fitted(shapes, images.prompts, len(shapes), passes=2 if class_images.weight > 0 else 1)
    settings = job.request.settings
    with job.loaded(images.shape) as loaded:
        if class_images.weight > 0:
            latents, prompts = class_images.latents, class_images.prompts
            if latents is None:
                prompts = [prompts[k % len(prompts)] for k in range(class_images.count)]
                latents = drawn_for_training(job.student, prompts, images.shape, settings.seed, job.options.drawing)
                loaded.prepare()
            prior = job.source(Images(latents, a_prompt_each(prompts, len(latents), "class_conditioning")))
        source, validation = job.sources(images)
        task = DreamBooth(network, source, settings, prior=prior, prior_weight=class_images.weight, **validation)
        return job.run(loaded, task, images)


@dataclass(frozen=True)
class Lesson:
    """What student and teacher are compared on.

    Args:
        prompts: for each of the images, or one for all; where the teacher draws them, any number.
        teacher_prompts: the same by the teacher's text encoder; None where it reads the student's.
        latents: in the scale of the VAE; None lets the teacher draw `images_per_prompt` of each prompt, of `size` pixels.
        output_weight, feature_weight: of what they predict, and of their blocks, which count where the prompts are shared.

    Raises:
        ValueError: another number of prompts for the teacher.
    """

    prompts: Sequence[Prompt]
    teacher_prompts: Sequence[Prompt] | None
    latents: Sequence[Tensor] | None
    images_per_prompt: int
    size: int
    output_weight: float
    feature_weight: float

    @classmethod
    def of(cls, conditioning: Any, teacher_conditioning: Any, latents: Any, **numbers: Any) -> Lesson:
        """From a node's inputs. Raises ValueError: see `flat_prompts` and `flat_latents`."""
        return cls(
            prompts=flat_prompts(conditioning),
            teacher_prompts=None
            if teacher_conditioning is None
            else flat_prompts(teacher_conditioning, "teacher_conditioning"),
            latents=None if latents is None else flat_latents(latents),
            **numbers,
        )

    def __post_init__(self) -> None:
        if self.teacher_prompts is not None:
            each = a_prompt_each(self.teacher_prompts, len(self.prompts), "teacher_conditioning")
            object.__setattr__(self, "teacher_prompts", each)

    def repeated(self) -> Lesson:
        """Every prompt as often as it is drawn."""
        prompts = [prompt for prompt in self.prompts for _ in range(self.images_per_prompt)]
        taught = self.teacher_prompts and [prompt for prompt in self.teacher_prompts for _ in range(self.images_per_prompt)]
        return replace(self, prompts=prompts, teacher_prompts=taught)

    def images(self, latents: Sequence[Tensor]) -> Images:
        """Latents with the prompts of both. Raises ValueError: another number of prompts."""
        taught = self.teacher_prompts and a_prompt_each(self.teacher_prompts, len(latents), "teacher_conditioning")
        return Images(latents, a_prompt_each(self.prompts, len(latents)), taught)


def distill(job: Job, lesson: Lesson) -> Outcome:
    """Train the student to draw as the teacher does."""
    assert job.teacher is not None
    taught_by = job.teacher
    student, teacher = job.student.network, taught_by.network
    shared = lesson.teacher_prompts is None
    weights: dict[str, Any] = {
        "output_weight": lesson.output_weight,
        "feature_weight": lesson.feature_weight if shared else 0.0,
    }
    if not shared and (job.student.empty is None) != (job.teacher.empty is None):
        raise ValueError("with teacher_conditioning, connect both empty and teacher_empty, or none of them")
    Distil.check_pair(student, teacher, job.request.settings, weights["feature_weight"])
    side = lesson.size // job.student.encoder.pixels_per_latent
    latents = lesson.latents
    shape = (job.student.encoder.channels, side, side) if latents is None else latents[0].shape
    count = len(lesson.prompts) * lesson.images_per_prompt if latents is None else len(latents)
    job.check_count(count)
    shapes = [shape] if latents is None else [latent.shape for latent in latents]
    job = job.fitted(shapes, lesson.prompts, count, features=weights["feature_weight"] > 0)
    settings = job.request.settings
    with job.loaded(shape) as loaded:
        if shared:
            check_weights_differ(student, teacher)
        if latents is None:
            lesson = lesson.repeated()
            read = lesson.teacher_prompts or lesson.prompts
            latents = drawn_for_training(taught_by, read, shape, settings.seed, job.options.drawing)
            loaded.prepare()
        images = lesson.images(latents)
        source, validation = job.sources(images)
        return job.run(loaded, Distil(student, teacher, source, settings, **weights, **validation), images)


def check_loaded_apart(student: ModelPatcher, teacher: ModelPatcher) -> None:
    """Refuse two MODELs of one loaded checkpoint (ValueError)."""
    if teacher.model is student.model:
        raise ValueError(
            "teacher and student are the same loaded checkpoint, and a LoRA or adapter on one would be on both: load another "
            "checkpoint as the teacher (a model with a LoRA on it can be saved as one by Save Checkpoint)"
        )
