"""A MODEL from the graph with what training needs of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...styleinject_core.train.data.batches import Conditioning
from ..patcher import ModelPatcher, injections_of
from .comfy_model import ComfyTrainingModel, with_lasting_weights
from .graph_inputs import Encoder, Prompt


class GraphModel:
    """A MODEL, the student or the teacher, and the empty prompt of its text encoder.

    Args:
        patcher: the MODEL; it is not changed.
        empty: None where the graph has none.

    Raises:
        ValueError: a model that cannot be trained.
    """

    def __init__(self, patcher: ModelPatcher, empty: Prompt | None = None):
        self.patcher = with_lasting_weights(patcher)
        self.network = ComfyTrainingModel(self.patcher)
        self.encoder = Encoder(self.patcher)
        self.empty = empty

    def steered_adapter(self) -> str | None:
        """The name of an adapter on the MODEL that has a router control."""
        return next((injection.applied.adapter.name for injection in injections_of(self.patcher) if injection.control), None)

    def conditionings(
        self, prompts: Sequence[Prompt], latents: Sequence[Tensor], with_empty: bool
    ) -> tuple[list[Conditioning], list[Conditioning] | None]:
        """What the model is given for the prompts of these latents, one row each, and for the empty prompt beside each.

        Args:
            latents: (C, ..., H, W) each, in the model's own scale.
            with_empty: whether the empty prompt is needed; None for it where it is not, or where there is none.
        """
        shapes = [tuple(latent.shape) for latent in latents]
        conditioning = self.encoder.prompts(prompts, shapes)
        if self.empty is None or not with_empty:
            return conditioning, None
        return conditioning, self.encoder.prompts([self.empty] * len(shapes), shapes)
