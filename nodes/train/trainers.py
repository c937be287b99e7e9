"""Training in ComfyUI: fine-tuning, DreamBooth, and distilling one checkpoint into another."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ...integration.training.graph_inputs import (
    empty_prompt,
    flat_latents,
    flat_prompts,
    images_and_prompts,
)
from ...integration.training.graph_model import GraphModel
from ...integration.training.job import Job
from ...integration.training.named_runs import Outcome, times_gone
from ...integration.training.train_options import TrainOptions
from ...integration.training.trainings import (
    ClassImages,
    Lesson,
    check_loaded_apart,
    distill,
    dreambooth,
    fine_tune,
)
from ...styleinject_core.methods import choices
from ...styleinject_core.train.request import AdapterRequest
from ...styleinject_core.train.settings import MEMORY, TrainSettings
from ..schema import AdapterType, LossType, OptionsType, schema

_ADVANCED = ("method", "rank", "styles", "layers")
_SEVERAL = "One LATENT or several, batches or lists; pictures of different sizes may be mixed."


class StyleInjectTrain(io.ComfyNode):
    """MODEL, images, prompts -> adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectTrain",
            section="train",
            display_name="Train StyleInject",
            description="Trains an adapter on images and their prompts. It is saved in output/styleinject, and ready to use in "
            "the same graph.",
            search_aliases=["train lora", "fine-tune", "train style"],
            advanced=_ADVANCED,
            inputs=[
                io.Model.Input("model", tooltip="The model the adapter is for. It is not changed."),
                io.Latent.Input("latents", tooltip=f"The images, encoded by the model's VAE. {_SEVERAL}"),
                io.Conditioning.Input("conditioning", tooltip="A prompt for each image, in the same order, or one for all."),
                *_settings("my_style", "default", steps=1000),
                _empty_input(),
                _options_input(),
                _trigger_input(),
                _memory_input(),
                io.String.Input(
                    "image_styles",
                    optional=True,
                    force_input=True,
                    tooltip="The style of each image, from Pictures from a Folder, for several styles in one adapter: each has "
                    "a place of its own, and the words that name it in a prompt choose it. Style Mixer has a slider for each.",
                ),
            ],
            outputs=_outputs(),
            **_TRAINS,
        )

    @classmethod
    def fingerprint_inputs(cls, name: Any = "", **_others: Any) -> int:
        return _fingerprint(name)

    @classmethod
    def execute(
        cls,
        model: Any,
        latents: Any,
        conditioning: Any,
        empty: Any = None,
        options: Any = None,
        image_styles: Any = None,
        **widgets: Any,
    ):
        student = GraphModel(model[0], empty_prompt(empty, "empty"))
        images = images_and_prompts(latents, conditioning, image_styles)
        return _output(fine_tune(_job(cls, widgets, options, student), images))


class StyleInjectDreamBooth(io.ComfyNode):
    """MODEL, a few images of one subject, its class -> adapter (Ruiz et al., arXiv 2208.12242)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectDreamBooth",
            section="train",
            display_name="DreamBooth StyleInject",
            description="Trains an adapter on three to five images of one subject, while images of its class keep the model "
            "from forgetting what else there is.",
            search_aliases=["train subject", "train character", "dreambooth"],
            advanced=(*_ADVANCED, "prior_weight"),
            inputs=[
                io.Model.Input("model", tooltip="The model the adapter is for. It is not changed."),
                io.Latent.Input("latents", tooltip=f"Images of the subject, encoded by the model's VAE. {_SEVERAL}"),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip='The subject with a word of its own, such as "a sks dog"; one for all, or one for each image.',
                ),
                io.Conditioning.Input(
                    "class_conditioning", tooltip='Its class, such as "a dog"; one for all class images, or one for each.'
                ),
                *_settings("my_subject", "default", steps=400),
                io.Int.Input(
                    "class_images",
                    default=100,
                    min=1,
                    max=10_000,
                    tooltip="How many images of the class the model draws before "
                    "training, if none are connected. They are kept for the next run.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.001,
                    tooltip="Weight of the class images. 0 trains on the subject alone.",
                ),
                io.Latent.Input("class_latents", optional=True, tooltip=f"Images of the class. {_SEVERAL}"),
                _empty_input(),
                _options_input(),
                _trigger_input(),
                _memory_input(),
            ],
            outputs=_outputs(),
            **_TRAINS,
        )

    @classmethod
    def fingerprint_inputs(cls, name: Any = "", **_others: Any) -> int:
        return _fingerprint(name)

    @classmethod
    def execute(
        cls,
        model: Any,
        latents: Any,
        conditioning: Any,
        class_conditioning: Any,
        class_images: Any,
        prior_weight: Any,
        class_latents: Any = None,
        empty: Any = None,
        options: Any = None,
        **widgets: Any,
    ):
        job = _job(cls, widgets, options, GraphModel(model[0], empty_prompt(empty, "empty")))
        class_prompts = flat_prompts(class_conditioning, "class_conditioning")
        drawings = None if class_latents is None else flat_latents(class_latents, "class_latents")
        prior = ClassImages(prompts=class_prompts, latents=drawings, count=class_images[0], weight=prior_weight[0])
        return _output(dreambooth(job, images_and_prompts(latents, conditioning), prior))


class StyleInjectDistill(io.ComfyNode):
    """A teacher MODEL and a student MODEL -> an adapter that makes the student draw like the teacher."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleInjectDistill",
            section="train",
            display_name="Distill StyleInject",
            description="Trains an adapter that makes one model draw like another: a tuned checkpoint becomes a small "
            "file for the model it was tuned from.",
            search_aliases=["distill", "extract lora", "checkpoint to adapter", "teacher student"],
            advanced=(*_ADVANCED, "output_weight", "feature_weight"),
            inputs=[
                io.Model.Input("model", tooltip="The student, which the adapter is for. It is not changed."),
                io.Model.Input(
                    "teacher", tooltip="The model to learn from; another checkpoint with the same latents. It is not changed."
                ),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="Prompts, as the student's text encoder encodes them: one for each image, or any "
                    "where the teacher draws the images.",
                ),
                *_settings("my_distilled_style", "default, conv", steps=1000),
                io.Float.Input(
                    "output_weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.001,
                    tooltip="Weight of the difference between what the two predict.",
                ),
                io.Float.Input(
                    "feature_weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.001,
                    tooltip="Weight of the differences between their blocks. 0 for models of different architecture; it "
                    "is 0 where teacher_conditioning is connected.",
                ),
                io.Int.Input(
                    "images_per_prompt",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="How many images of each prompt the teacher draws "
                    "before training, if none are connected. They are kept for the next run.",
                ),
                io.Int.Input("size", default=512, min=16, max=8192, step=8, tooltip="Side of these images in pixels."),
                io.Latent.Input(
                    "latents",
                    optional=True,
                    tooltip=f"Images to compare the two on. Without them, the teacher draws its own. {_SEVERAL}",
                ),
                io.Conditioning.Input(
                    "teacher_conditioning",
                    optional=True,
                    tooltip="The same prompts by the teacher's text encoder, where it is "
                    "another one: other weights, another language.",
                ),
                _empty_input(),
                io.Conditioning.Input(
                    "teacher_empty",
                    optional=True,
                    tooltip="The empty prompt by the teacher's text encoder, where it is another one.",
                ),
                _options_input(),
                _trigger_input(),
                _memory_input(),
            ],
            outputs=_outputs(),
            **_TRAINS,
        )

    @classmethod
    def fingerprint_inputs(cls, name: Any = "", **_others: Any) -> int:
        return _fingerprint(name)

    @classmethod
    def execute(
        cls,
        model: Any,
        teacher: Any,
        conditioning: Any,
        output_weight: Any,
        feature_weight: Any,
        images_per_prompt: Any,
        size: Any,
        latents: Any = None,
        teacher_conditioning: Any = None,
        empty: Any = None,
        teacher_empty: Any = None,
        options: Any = None,
        **widgets: Any,
    ):
        check_loaded_apart(model[0], teacher[0])
        student = GraphModel(model[0], empty_prompt(empty, "empty"))
        shared = teacher_conditioning is None  # the teacher reads the student's prompts
        its_empty = student.empty if shared else empty_prompt(teacher_empty, "teacher_empty")
        job = _job(cls, widgets, options, student, GraphModel(teacher[0], its_empty))
        weights = {"output_weight": output_weight[0], "feature_weight": feature_weight[0]}
        drawing = {"images_per_prompt": images_per_prompt[0], "size": size[0]}
        return _output(distill(job, Lesson.of(conditioning, teacher_conditioning, latents, **weights, **drawing)))


_TRAINS = {"is_input_list": True, "is_output_node": True, "hidden": [io.Hidden.unique_id]}


def _fingerprint(name: Any) -> int:
    """Another one after what was saved under this name was deleted."""
    return times_gone(str(name[0] if isinstance(name, list) and name else name))


def _settings(name: str, layers: str, steps: int) -> list[io.Input]:
    """The widgets that all three have."""
    return [
        io.String.Input(
            "name",
            default=name,
            tooltip="What the adapter is called, and its folder in output/styleinject. A run of this name is continued if its "
            "settings and data were the same; else a number is added.",
        ),
        io.Combo.Input(
            "method",
            options=list(choices()),
            default=AdapterRequest.method,
            tooltip="styleinject is the whole method. lora is plain LoRA. kronecker is DiffuseKronA, a small adapter for one "
            "subject or style, which takes factors (in the options) instead of a rank. dma-only leaves out the statistics, "
            "sta-only the several styles.",
        ),
        io.Int.Input("steps", default=steps, min=1, max=10**6, tooltip="How many steps to train."),
        io.Float.Input(
            "learning_rate",
            default=TrainSettings.learning_rate,
            min=1e-7,
            max=10.0,
            step=1e-5,
            round=1e-8,
            tooltip="How far each step goes. 0.0001 for Stable Diffusion, 0.0005 with kronecker; too high shows as a loss that "
            "jumps or becomes NaN.",
        ),
        io.Int.Input(
            "batch_size",
            default=TrainSettings.batch_size,
            min=1,
            max=1024,
            tooltip="Images per step. If they do not fit into memory together, they go through the model one after the other.",
        ),
        io.Int.Input(
            "rank",
            default=AdapterRequest.rank,
            min=0,
            max=1024,
            tooltip="Size of the learned change per layer. 4 to 32 is common. 0: 32, or what fits into memory. Unused by "
            "kronecker.",
        ),
        io.Int.Input(
            "styles",
            default=AdapterRequest.styles,
            min=0,
            max=256,
            tooltip="Parallel changes that the style router mixes for each image. 0: 16, or what fits into memory. Unused by "
            "lora, kronecker and sta-only.",
        ),
        io.String.Input(
            "layers",
            default=layers,
            tooltip="Which layers learn, separated by commas: default (queries and values of attention), attention, conv, or "
            "single ones such as to_k. More layers learn more, and make a larger file. Empty: those of the method's paper.",
        ),
    ]


def _empty_input() -> Any:
    return io.Conditioning.Input(
        "empty",
        optional=True,
        tooltip="The empty prompt: replaces some prompts while training (caption_dropout in the options), and is "
        "the negative prompt of images that are drawn.",
    )


def _options_input() -> Any:
    return OptionsType.Input("options", optional=True, tooltip="From StyleInject Train Options. Not needed.")


def _trigger_input() -> Any:
    return io.String.Input(
        "trigger",
        optional=True,
        force_input=True,
        tooltip="The words that call what is learned, to be saved with the adapter. They do not change the training: they "
        "are in the prompts already.",
    )


def _memory_input() -> Any:
    return io.Combo.Input(
        "memory",
        options=list(MEMORY),
        default=TrainSettings.memory,
        optional=True,
        tooltip="The graphics card's memory, or auto: what is free. Where a training needs more, its batches are divided, "
        "gradient checkpointing is turned on, rank and styles that are 0 get smaller, an 8-bit optimizer is used where "
        "bitsandbytes is installed, and finally part of the model stays in RAM. The node says what was "
        "chosen. off: the settings are used as they are. The need is counted from the model's shapes; no card "
        "has been measured.",
    )


def _outputs() -> list[Any]:
    return [
        AdapterType.Output(
            "adapter", display_name="adapter", tooltip="The trained adapter, for Apply StyleInject or StyleInject Save."
        ),
        LossType.Output("losses", display_name="losses", tooltip="The loss of every step, for StyleInject Loss Plot."),
        io.Int.Output(
            "step", display_name="step", tooltip="The step the adapter is from: the last, or the one that validated best."
        ),
    ]


def _job(
    node: type[io.ComfyNode],
    widgets: dict[str, list],
    options: list[TrainOptions] | None,
    student: GraphModel,
    teacher: GraphModel | None = None,
) -> Job:
    """A job from a node's inputs, which come as lists."""
    given = options[0] if options else TrainOptions()
    trigger = str((widgets.pop("trigger", None) or [""])[0] or "").strip()
    request = given.request(**{name: value[0] for name, value in widgets.items()})
    node_id = None if node.hidden is None else node.hidden.unique_id
    return Job(request=request, options=given, student=student, teacher=teacher, node_id=node_id, trigger=trigger)


def _output(outcome: Outcome) -> io.NodeOutput:
    result = outcome.result
    return io.NodeOutput(outcome.adapter, outcome.losses, result.best_step or result.step, ui=ui.PreviewText(outcome.message))
