"""What most users leave alone in training: one node, whose defaults are also what trains without it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ...integration.training.graph_inputs import flat_prompts
from ...integration.training.named_runs import GO_ON, MUST_GO_ON, NEW
from ...integration.training.train_options import TrainOptions
from ...styleinject_core.config import ROUTER_INPUTS, ROUTER_POOLS, TOKENS
from ...styleinject_core.methods.kronecker import parse_factors
from ...styleinject_core.train.request import AUTO, DTYPES
from ...styleinject_core.train.settings import FLOW_TIMES, OPTIMIZERS, SCHEDULES
from ..schema import OptionsType, schema

_ADVANCED = (
    *("seed", "accumulation", "schedule", "warmup", "weight_decay", "clip", "min_snr_gamma", "caption_dropout"),
    *("checkpoint_every", "validation_images", "validate_every", "patience", "alpha", "router_pool", "sta", "router_input"),
    *("sampling_steps", "guidance", "dtype", "tokens", "flow_times"),
)


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

        def choice(name: str, options: Sequence[str], tooltip: str, optional: bool = False) -> io.Combo.Input:
            return io.Combo.Input(
                name, options=list(options), default=getattr(default, name), tooltip=tooltip, optional=optional
            )

        return schema(
            "StyleInjectTrainOptions",
            section="train",
            display_name="StyleInject Train Options",
            description="Settings that most trainings leave as they are, for the three StyleInject training nodes.",
            search_aliases=["train settings", "optimizer", "learning rate schedule"],
            advanced=_ADVANCED,
            inputs=[
                io.Int.Input(
                    "seed",
                    default=default.seed,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Seeds the new adapter, the noise and the order of the images. Another seed makes another run.",
                ),
                choice(
                    "existing_run",
                    (GO_ON, MUST_GO_ON, NEW),
                    'What to do if a run of this name exists. "go on or new": continue it if it had the same settings and data '
                    '(a finished one is used as it is), else start a numbered one beside it. "go on": continue the '
                    'latest, or say what differs. "new": always start a numbered one. Runs are never overwritten.',
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
                choice("schedule", SCHEDULES, "How the learning rate changes: constant, or falling to 0 at the last step."),
                number("warmup", "Steps over which the learning rate rises from 0.", 100_000),
                real("weight_decay", "Pulls the adapter's weights towards 0; larger values pull harder.", 1.0, 0.001),
                real(
                    "clip",
                    "Gradients are scaled down to this norm, which tames single bad batches. 0 turns it off.",
                    1000.0,
                    0.1,
                ),
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
                number("validation_images", "How many images are held out of training and only measured. 0 for none.", 10_000),
                number("validate_every", "Steps between two measurements on the validation images.", 10**6, 1),
                number(
                    "patience",
                    "Stop after this many measurements without a better one. 0 never stops. With validation images, the best "
                    "adapter is the result.",
                    10_000,
                ),
                real("alpha", "The learned change is scaled by alpha / rank. 0 means alpha = rank.", 4096.0, 1.0),
                choice(
                    "router_pool",
                    ROUTER_POOLS,
                    "How the style router sees an image: as the mean of its positions or, as the paper has it, token by token "
                    "in attention and summed in convolutions, which learns a style better and takes more time (paper).",
                ),
                choice("sta", ("multiplicative", "additive"), "How the statistics are changed. The paper's is multiplicative."),
                number(
                    "sampling_steps",
                    "Sampling steps of these pictures, and of images that a model draws before training.",
                    1000,
                    1,
                ),
                real("guidance", "Guidance (CFG) of the same; there is none without an empty prompt.", 30.0, 0.5),
                choice("dtype", DTYPES[::-1], "Number format of the adapter files. Training itself runs in float32."),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the pictures. Without it there are none."),
                io.Conditioning.Input(
                    "picture_prompt",
                    optional=True,
                    tooltip="What the pictures show; several prompts may be combined into one. By default the first prompt of "
                    "the training data.",
                ),
                io.String.Input(
                    "factors",
                    default=", ".join(map(str, default.factors)),
                    optional=True,
                    tooltip="Of the method kronecker (DiffuseKronA), in place of a rank: the sizes of its first factor. The "
                    "larger their product, the fewer numbers are trained, until it is about a layer's width.",
                ),
                choice(
                    "tokens",
                    TOKENS,
                    "What router and statistics look at in a transformer, where prompt and image are one sequence. "
                    "image: the image's tokens, of a clip those of all its frames. frame: each frame of a clip by itself. all: "
                    "the prompt's tokens too.",
                    optional=True,
                ),
                choice(
                    "flow_times",
                    FLOW_TIMES,
                    "Of flow models (Flux, SD 3, Z-Image, Wan): which noise is trained. logit-normal: mostly the "
                    "middle; uniform: all alike; either with the model's own shift.",
                    optional=True,
                ),
                choice(
                    "router_input",
                    (AUTO, *ROUTER_INPUTS),
                    "What the style router reads. layer: the layer's own input, as in the paper. prompt: the prompt, "
                    'so that words like "in the style of X" choose the style. both: the two together. auto: the prompt where '
                    "images have styles of their own (image_styles), else the layer's input.",
                    optional=True,
                ),
            ],
            outputs=[OptionsType.Output("options", display_name="options", tooltip="For the StyleInject training nodes.")],
        )

    @classmethod
    def fingerprint_inputs(cls, existing_run: Any = GO_ON, **_others: Any) -> str:
        """A new run is a new one each time the workflow is queued, though nothing in it has changed."""
        return secrets.token_hex(8) if existing_run == NEW else ""

    @classmethod
    def execute(cls, vae: Any = None, picture_prompt: Any = None, factors: str = "", **values: Any) -> io.NodeOutput:
        pictured = flat_prompts([picture_prompt], "picture_prompt") if picture_prompt is not None else ()
        if factors.strip():
            values["factors"] = parse_factors(factors)
        return io.NodeOutput(TrainOptions(**values, vae=vae, pictured=pictured))
