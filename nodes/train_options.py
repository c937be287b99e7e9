"""What most users leave alone in training: one node, whose defaults are also what trains without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from comfy_api.latest import io

from ..styleinject_core.train.settings import OPTIMIZERS, SCHEDULES, TrainSettings
from .schema import schema
from .train_data import Prompt, flat_prompts

GO_ON, MUST_GO_ON, NEW = "go on or new", "go on", "new"
DTYPES = ("float16", "bfloat16", "float32")

OptionsType = io.Custom("STYLEINJECT_TRAIN_OPTIONS")  # a TrainOptions


@dataclass(frozen=True)
class TrainOptions:
    """See the tooltips of StyleInjectTrainOptions.

    Args:
        vae: what decodes the pictures drawn while it trains; None for no pictures.
        pictured: the prompts they are drawn from; empty for the first one of the training data.
    """

    seed: int = 0
    existing_run: str = GO_ON
    accumulation: int = 1
    optimizer: str = "adamw"
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0
    min_snr_gamma: float = 0.0
    caption_dropout: float = 0.1
    gradient_checkpointing: bool = False
    checkpoint_every: int = 500
    picture_every: int = 0
    validation_images: int = 0
    validate_every: int = 50
    patience: int = 0
    alpha: float = 0.0
    router_pool: str = "mean"
    sta: str = "multiplicative"
    sampling_steps: int = 20
    guidance: float = 5.0
    dtype: str = "float16"
    vae: Any = None
    pictured: Sequence[Prompt] = ()

    def settings(self, *, steps: int, batch_size: int, learning_rate: float) -> TrainSettings:
        """The core's settings. Raises ValueError: a value out of its range."""
        names = {f.name for f in fields(TrainSettings)} & {f.name for f in fields(self)}
        own = {name: getattr(self, name) for name in names}
        if not self.validation_images:
            own |= {"validate_every": 0, "patience": 0}
        sample_every = self.picture_every if self.vae is not None else 0
        return TrainSettings(steps, batch_size, learning_rate=learning_rate, sample_every=sample_every, **own)


class StyleInjectTrainOptions(io.ComfyNode):
    """-> STYLEINJECT_TRAIN_OPTIONS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = TrainOptions()

        def number(name: str, tooltip: str, most: int, least: int = 0) -> io.Int.Input:
            return io.Int.Input(name, default=getattr(default, name), min=least, max=most, tooltip=tooltip)

        def real(name: str, tooltip: str, most: float, step: float) -> io.Float.Input:
            return io.Float.Input(
                name, default=getattr(default, name), min=0.0, max=most, step=step, round=step / 100, tooltip=tooltip
            )

        def choice(name: str, options: Sequence[str], tooltip: str) -> io.Combo.Input:
            return io.Combo.Input(name, options=list(options), default=getattr(default, name), tooltip=tooltip)

        return schema(
            "StyleInjectTrainOptions",
            display_name="StyleInject Train Options",
            description="Settings that most trainings leave as they are, for the three StyleInject training nodes.",
            search_aliases=["train settings", "optimizer", "learning rate schedule"],
            inputs=[
                io.Int.Input(
                    "seed",
                    default=default.seed,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Of the new adapter, the noise, and the order of the images. Another seed is another run.",
                ),
                choice(
                    "existing_run",
                    (GO_ON, MUST_GO_ON, NEW),
                    'When there is a run of this name. "go on or new": continue one that had the same settings and data '
                    '(one that is finished is taken as it is), else start a numbered one beside it. "go on": continue the '
                    'latest, or say what differs. "new": always start a numbered one. No run is ever overwritten.',
                ),
                number(
                    "accumulation",
                    "Batches per step; their gradients are averaged. 4 batches of 2 learn like one of 8.",
                    1024,
                    1,
                ),
                choice(
                    "optimizer",
                    OPTIMIZERS,
                    "adamw is built in. adamw8bit, schedulefree and prodigy need the Python packages bitsandbytes, "
                    "schedulefree and prodigyopt; prodigy wants a learning rate of 1.",
                ),
                choice("schedule", SCHEDULES, "How the learning rate runs: level, or falling to 0 at the last step."),
                number("warmup", "Steps over which the learning rate rises from 0.", 100_000),
                real("weight_decay", "Pulls the adapter's weights towards 0, the more the larger.", 1.0, 0.001),
                real("clip", "Largest norm of the gradient, which tames single bad batches. 0 switches it off.", 1000.0, 0.1),
                real(
                    "min_snr_gamma",
                    "Weights steps by min(SNR, this): 5 often learns faster. 0 leaves all alike. Not for flow models, and not "
                    "for distillation.",
                    100.0,
                    0.1,
                ),
                real(
                    "caption_dropout",
                    "Share of prompts replaced by the empty one, so that guidance keeps working. Needs the empty prompt to be "
                    "connected to the training node.",
                    1.0,
                    0.01,
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=default.gradient_checkpointing,
                    tooltip="Needs much less memory, and about a third more time.",
                ),
                number(
                    "checkpoint_every",
                    "Steps between two checkpoints. 0 writes only the last; an interrupt writes one too.",
                    10**6,
                ),
                number(
                    "picture_every",
                    "Steps between two pictures drawn with the adapter as it is. 0 for none; needs a VAE.",
                    10**6,
                ),
                number("validation_images", "So many images are never trained on, only measured. 0 for none.", 10_000),
                number("validate_every", "Steps between two measurements on the validation images.", 10**6, 1),
                number(
                    "patience",
                    "Stop after so many measurements without a better one. 0 never does. With validation images, the best "
                    "adapter is the result.",
                    10_000,
                ),
                real("alpha", "The learned change is scaled by alpha / rank. 0 means alpha = rank.", 4096.0, 1.0),
                choice("router_pool", ("mean", "sum", "token"), "How the style router sums up an image. The paper's is mean."),
                choice("sta", ("multiplicative", "additive"), "How statistics are changed. The paper's is multiplicative."),
                number("sampling_steps", "For pictures, and for images that a model draws before training.", 1000, 1),
                real("guidance", "Guidance (CFG) for the same; without an empty prompt there is none.", 30.0, 0.5),
                choice("dtype", DTYPES, "What adapter files are stored in. Training itself is in float32."),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the pictures. Without it there are none."),
                io.Conditioning.Input(
                    "picture_prompt",
                    optional=True,
                    tooltip="What the pictures show; several prompts may be combined into one. By default the first prompt of "
                    "the training data.",
                ),
            ],
            outputs=[OptionsType.Output("options", display_name="options", tooltip="For the StyleInject training nodes.")],
        )

    @classmethod
    def execute(cls, vae: Any = None, picture_prompt: Any = None, **values: Any) -> io.NodeOutput:
        pictured = flat_prompts([picture_prompt], "picture_prompt") if picture_prompt is not None else ()
        return io.NodeOutput(TrainOptions(**values, vae=vae, pictured=pictured))
