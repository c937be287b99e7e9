"""The three ways of making an adapter (method, section 4), on any model: fine-tuning, DreamBooth, distillation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...adapter import Adapter
from ...attach import Attachment
from ...call import ModelCall
from ...router.control import GivenStyles
from ..data.batches import Batch, Conditioning, conditioning_hash, where
from ..data.source import Source
from ..models.noise import add_noise, logit_normal, matching_times, predicted_sample, prediction_of
from ..models.training_model import TrainingModel
from ..random_numbers import VALIDATION, RandomNumbers
from ..settings import FLOW_TIMES, TrainSettings
from .losses import block_features, checkpointed, distil_loss, fine_tune_loss

# The weight of what routers learn where styles are given (`GivenStyles.unlike`). It is nearly all that they learn from then,
# and steps of AdamW do not depend on its scale; the layers before one that reads its own input are to mind it little.
FOLLOWING = 0.01


class FineTune:
    """E‖target - prediction‖² on images and captions; with class images beside each batch, DreamBooth.

    Args:
        model: the frozen model that the adapter is for.
        source: training batches.
        empty: the empty prompt, one row, for caption dropout, unless batches bring their own; None leaves every caption.
        prior: class images, one batch beside each of `source`'s (DreamBooth); their loss is weighted by `prior_weight`.
        validation: batches that are never trained on; all of the first `validation_batches` are measured.
        style_dropout: the share of examples with a style of their own (`Batch.styles`) whose s is the router's all the same.
            Of the others the router learns that style (`FOLLOWING`), so that it chooses it by itself where none is given.
    """

    objective = "fine-tune"

    def __init__(
        self,
        model: TrainingModel,
        source: Source,
        settings: TrainSettings,
        empty: Conditioning | None = None,
        *,
        prior: Source | None = None,
        prior_weight: float = 1.0,
        validation: Source | None = None,
        validation_batches: int = 4,
        style_dropout: float = 0.1,
    ):
        if settings.validate_every and validation is None:
            raise ValueError("validate_every is set, but there are no validation images")
        self.check(model, settings)
        self.style_dropout = style_dropout
        self._attachment: Attachment | None = None
        self.model, self.source, self.settings = model, source, settings
        self.empty = empty if settings.caption_dropout else None
        self.prior, self.prior_weight = prior, prior_weight
        self.validation, self.validation_batches = validation, validation_batches

    @staticmethod
    def check(model: TrainingModel, settings: TrainSettings) -> None:
        """Refuse what cannot be trained so (ValueError): before anything that takes long, as drawing class images does."""
        if settings.gradient_checkpointing and not model.blocks():
            raise ValueError("gradient_checkpointing: this model has no blocks by a name that is known here, set it to false")

    @property
    def is_float16(self) -> bool:
        return self.model.is_float16

    @property
    def advice(self) -> str:
        return self.source.advice

    @contextmanager
    def installed(self, adapter: Adapter) -> Iterator[Attachment]:
        with ExitStack() as stack:
            attachment = stack.enter_context(self.model.attachment(adapter))
            if self.settings.gradient_checkpointing:
                blocks, in_place = self.model.blocks(), self.model.in_place_blocks()
                calls = dict.fromkeys([*self.model.current_calls(), *(sites[0].current for sites in attachment.sites)])
                stack.enter_context(checkpointed(blocks, in_place, list(calls)))
            self._attachment = attachment
            yield attachment

    def loss(self, rng: RandomNumbers) -> Tensor:
        loss = self._batch_loss(self.source.batch(rng.index), rng)
        if self.prior is not None:
            loss = loss + self.prior_weight * self._batch_loss(self.prior.batch(rng.index), rng)
        return loss

    def validation_loss(self) -> float:
        assert self.validation is not None
        losses = []
        for k in range(self.validation_batches):
            rng = RandomNumbers(self.settings.seed, VALIDATION - k)
            losses.append(float(self._batch_loss(self.validation.batch(k), rng, dropout=0.0)))
        return sum(losses) / len(losses)

    def _batch_loss(self, batch: Batch, rng: RandomNumbers, dropout: float | None = None) -> Tensor:
        latents = batch.latents.to(self.model.device)
        times, noise, noisy = self._noisy(latents, rng)
        conditioning = _captions(batch.conditioning, batch.empty or self.empty, self._dropped(batch, rng, dropout))
        with self._given_styles(batch, rng, dropout) as given:
            prediction = self.model.predict(noisy, times, conditioning)
        loss = fine_tune_loss(prediction, self.model.schedule, latents, noise, times, self.settings.min_snr_gamma)
        return _following(loss, given)

    def _noisy(self, latents: Tensor, rng: RandomNumbers) -> tuple[Tensor, Tensor, Tensor]:
        schedule = self.model.schedule
        uniform = rng.uniform(len(latents))
        if schedule.prediction_type == "flow" and self.settings.flow_times == FLOW_TIMES[0]:
            uniform = logit_normal(uniform)
        times = schedule.times(uniform).to(latents.device)
        noise = rng.normal(latents)
        return times, noise, add_noise(schedule, latents, noise, times)

    def _dropped(self, batch: Batch, rng: RandomNumbers, dropout: float | None) -> Tensor:
        """Which captions of a batch are replaced by the empty one, (B,)."""
        return rng.uniform(len(batch.latents)) < (self.settings.caption_dropout if dropout is None else dropout)

    @contextmanager
    def _given_styles(self, batch: Batch, rng: RandomNumbers, dropout: float | None) -> Iterator[GivenStyles | None]:
        """The examples' own styles in the place of the router's s, but for a share of them."""
        if batch.styles is None or self._attachment is None:
            yield None
            return
        dropped = rng.uniform(len(batch.styles)) < (self.style_dropout if dropout is None else dropout)
        given = GivenStyles(torch.where(dropped, -1, batch.styles).to(self.model.device))
        with self._attachment.in_call(ModelCall(listeners=(given,))):
            yield given

    def plan(self) -> dict[str, Any]:
        model = {"model": self.model.fingerprint, "sampling": self.model.sampling}
        plan: dict[str, Any] = {"objective": self.objective, **model, "data": self.source.summary()}
        if "styles" in plan["data"]:
            plan |= {"style_dropout": self.style_dropout, "style_following": FOLLOWING}
        if self.empty is not None:
            plan["empty"] = conditioning_hash(self.empty)
        if self.prior is not None:
            plan["prior"] = {"weight": self.prior_weight, **self.prior.summary()}
        if self.validation is not None:
            plan["validation"] = {"batches": self.validation_batches, **self.validation.summary()}
        return plan

    def state_dict(self) -> dict[str, Any]:
        return {"source": self.source.state_dict(), "prior": self.prior.state_dict() if self.prior else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state["source"])
        if self.prior is not None:
            self.prior.load_state_dict(state["prior"])


class DreamBooth(FineTune):
    """A few images of one subject, and its class as the base model draws it (Ruiz et al., arXiv 2208.12242)."""

    objective = "dreambooth"


class Distil(FineTune):
    """The student learns what the teacher predicts: λ_out ‖ε_T - ε_S‖² + λ_feat Σ_l ‖f_T^l - f_S^l‖², no task loss.

    With text encoders of their own (`Batch.teacher`), set `feature_weight` to 0: only the outputs are compared.

    Args:
        model: the student's.
        teacher: another model over the same latents; it may predict something else (ε, v, x0).
        teacher_reads: how it comes to its captions, in words or as a hash; for recognizing the run.

    Raises:
        ValueError: teacher and student are one model, or one of them alone is a flow model.
    """

    objective = "distil"

    def __init__(
        self,
        model: TrainingModel,
        teacher: TrainingModel,
        source: Source,
        settings: TrainSettings,
        empty: Conditioning | None = None,
        teacher_empty: Conditioning | None = None,
        *,
        output_weight: float = 1.0,
        feature_weight: float = 1.0,
        teacher_reads: str = "",
        validation: Source | None = None,
        validation_batches: int = 4,
        style_dropout: float = 0.1,
    ):
        self.check_pair(model, teacher, settings, feature_weight)
        if (empty is None) != (teacher_empty is None) and teacher_empty is not None:
            raise ValueError("the teacher has an empty prompt, the student has none: give both, or none")
        super().__init__(
            model,
            source,
            settings,
            empty,
            validation=validation,
            validation_batches=validation_batches,
            style_dropout=style_dropout,
        )
        self.teacher, self.teacher_empty = teacher, teacher_empty if settings.caption_dropout else None
        self.output_weight, self.feature_weight, self.teacher_reads = output_weight, feature_weight, teacher_reads
        self._blocks, self._teacher_blocks = (m.blocks() if feature_weight else {} for m in (model, teacher))

    @staticmethod
    def check_pair(model: TrainingModel, teacher: TrainingModel, settings: TrainSettings, feature_weight: float) -> None:
        """Refuse what cannot be distilled (ValueError); see `check`."""
        FineTune.check(model, settings)
        check_teacher(model, teacher)
        if settings.min_snr_gamma:
            raise ValueError("min_snr_gamma weights the error of fine-tuning; a distillation has no such term: leave it at 0")
        if feature_weight and not (model.blocks() and teacher.blocks()):
            raise ValueError("feature_weight: no blocks by a name that is known here to compare, set it to 0")

    def _batch_loss(self, batch: Batch, rng: RandomNumbers, dropout: float | None = None) -> Tensor:
        times, _, noisy = self._noisy(batch.latents.to(self.model.device), rng)
        dropped = self._dropped(batch, rng, dropout)
        conditioning = for_teacher = _captions(batch.conditioning, batch.empty or self.empty, dropped)
        if batch.teacher is not None:
            for_teacher = _captions(batch.teacher, batch.teacher_empty or self.teacher_empty, dropped)
        with torch.no_grad(), block_features(self._teacher_blocks) as wanted:
            at = matching_times(self.model.schedule, times, self.teacher.schedule)
            teacher = self.teacher.predict(noisy, at, for_teacher)
        with self._given_styles(batch, rng, dropout) as given, block_features(self._blocks) as features:
            student = self.model.predict(noisy, times, conditioning)
        if self.teacher.schedule.prediction_type != self.model.schedule.prediction_type:
            sample = predicted_sample(self.teacher.schedule, teacher, noisy, at)
            teacher = prediction_of(self.model.schedule, sample, noisy, times)
        loss = distil_loss(student, teacher, features, wanted, self.output_weight, self.feature_weight)
        return _following(loss, given)

    def plan(self) -> dict[str, Any]:
        weights = {"output_weight": self.output_weight, "feature_weight": self.feature_weight}
        teacher = {"teacher": self.teacher.fingerprint, "teacher_sampling": self.teacher.sampling}
        teacher["teacher_reads"] = self.teacher_reads
        plan = {**super().plan(), **teacher, **weights}
        return plan if self.teacher_empty is None else {**plan, "teacher_empty": conditioning_hash(self.teacher_empty)}


def _following(loss: Tensor, given: GivenStyles | None) -> Tensor:
    """The loss with what routers learn of the styles that were given, if there were any."""
    return loss if given is None else loss + FOLLOWING * given.unlike()


def check_teacher(model: TrainingModel, teacher: TrainingModel) -> None:
    """Refuse a teacher that no adapter of this model can learn from (ValueError)."""
    if teacher.denoiser is model.denoiser:
        raise ValueError("teacher and student are the same model: there is nothing to learn")
    if teacher.latent_space != model.latent_space:
        spaces = [" ".join(map(str, m.latent_space)) for m in (teacher, model)]
        raise ValueError(f"the teacher's latents are {spaces[0]}, the student's {spaces[1]}: both must use the same VAE")
    kinds = [m.schedule.prediction_type for m in (teacher, model)]
    if kinds[0] != kinds[1] and "flow" in kinds:
        raise ValueError(
            f"the teacher predicts {kinds[0]}, the student {kinds[1]}: a flow model's noisy images are not another one's"
        )


def check_weights_differ(model: TrainingModel, teacher: TrainingModel) -> None:
    """Refuse a teacher that reads the same prompts with the same weights (ValueError). Weights must be as they will train."""
    if model.fingerprint == teacher.fingerprint:
        raise ValueError("teacher and student are the same model, there is nothing to learn")


def _captions(conditioning: Conditioning, empty: Conditioning | None, dropped: Tensor) -> Conditioning:
    """Conditioning with the dropped rows replaced by the empty prompt, where there is one."""
    return conditioning if empty is None or not dropped.any() else where(dropped, conditioning, empty)
