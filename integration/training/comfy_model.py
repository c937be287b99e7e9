"""A MODEL as training wants it: called as sampling calls it, with everything on it, and left as it was."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import chain
from typing import Any
from weakref import WeakSet

import comfy.ldm.modules.attention as attention
import comfy.model_management
import comfy.model_sampling
import torch
from comfy.patcher_extension import WrappersMP, merge_nested_dicts
from torch import Tensor, nn

from ...styleinject_core import Adapter, Applied, Attachment
from ...styleinject_core.call import CurrentCall, ModelCall
from ...styleinject_core.hosts.architectures import ARCHITECTURES
from ...styleinject_core.layers import LayerShape
from ...styleinject_core.router.control import Rule
from ...styleinject_core.train.data.batches import Conditioning, tensors_hash
from ...styleinject_core.train.models.noise import prediction_of
from ...styleinject_core.train.models.training_model import TrainingModel
from ..injection import ComfyProgram, model_title
from ..patcher import ModelPatcher, compute_dtype, injections_of, references_of
from ..places import find_places, forget_prompts, layer_shapes
from ..sampling import given_of
from ..tokens import prompt_of, tokens_of
from .graph_inputs import CONDS, called_together

_TOLD = "styleinject_training"
_SCALED, _PLAIN = comfy.model_sampling.EPS.calculate_input, comfy.model_sampling.CONST.calculate_input
_PREDICTIONS = {  # how a model's input is scaled, and how its output is read -> what it predicts
    (_SCALED, comfy.model_sampling.EPS.calculate_denoised): "epsilon",
    (_SCALED, comfy.model_sampling.V_PREDICTION.calculate_denoised): "v_prediction",
    (_SCALED, comfy.model_sampling.X0.calculate_denoised): "sample",
    (_PLAIN, comfy.model_sampling.CONST.calculate_denoised): "flow",
}
# Whose networks write over what a backward pass needs (x += ...), which PyTorch does not notice everywhere: LTX Video, in each
# version by a class of another name.
_OVERWRITE = ("comfy.ldm.lightricks.",)
# What a step needs beyond the weights where nobody has counted, in units of what ComfyUI estimates for sampling: a backward
# pass keeps activations.
_TRAINING_MEMORY = 4
# ComfyUI's attention functions with a gradient; SageAttention and others leave the layers before them untrained.
_WITH_GRADIENTS = {f"attention_{name}" for name in ("basic", "sub_quad", "split", "pytorch", "xformers")}
_OVERRIDE = "optimized_attention_override"
_IN_PLACE = re.compile(r"(double|single)_blocks\.")  # Flux's blocks and their kin add to what their norms have been given
_UNPACKED = "_full_precision_mm"  # of comfy.ops.mixed_precision_ops' layers


class ComfySchedule:
    """The noise of a model's own sampling: times are sigmas, z = x0 + σ ε, or (1 - σ) x0 + σ ε for flow models.

    Args:
        sampling: the MODEL's model_sampling.

    Raises:
        ValueError: a model that predicts something training has no loss for.
    """

    def __init__(self, sampling: Any):
        kind = type(sampling)
        prediction = _PREDICTIONS.get((kind.calculate_input, kind.calculate_denoised))
        scale = getattr(sampling, "noise_scale" if prediction == "flow" else "sigma_data", 1.0)
        if prediction is None or scale != 1:
            names = ", ".join(base.__name__ for base in kind.__mro__[1:-1] if base is not nn.Module)
            raise ValueError(
                f"this model samples by {names} (scale {scale}), which cannot be trained here: expected a model that predicts "
                "noise (eps), v, x0, or the flow, at scale 1"
            )
        self.sampling, self.prediction_type = sampling, prediction

    def coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        sigma = times.float()
        return (1 - sigma if self.prediction_type == "flow" else torch.ones_like(sigma)), sigma

    def times(self, uniform: Tensor) -> Tensor:
        """Flow models: with the model's own shift; others: its own table, evenly."""
        if self.prediction_type == "flow":
            return torch.tensor([float(self.sampling.percent_to_sigma(1 - t)) for t in uniform.tolist()])
        table = self.sampling.sigmas.detach().float().cpu()
        return table[(uniform * len(table)).long()]


class TrainingProgram(ComfyProgram):
    """ComfyUI's ways of reading frozen weights; the adapter's own parameters by operations that have gradients.

    A row of a batch is an image: its `images` stays 0. A count would be that of the last call, and a backward pass may run
    blocks of an earlier one again.
    """

    def cast(self, parameter: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        return parameter.to(x.device, dtype)


class ComfyTrainingModel(TrainingModel):
    """A MODEL, frozen, with the LoRAs, adapters and patches that are on it.

    Raises:
        ValueError: a model that cannot be trained, or with an adapter on it that is active in a part of sampling only.
    """

    schedule: ComfySchedule

    def __init__(self, patcher: ModelPatcher):
        base = patcher.model
        host = getattr(base.diffusion_model, "_orig_mod", base.diffusion_model)  # beneath torch.compile
        super().__init__(host, ComfySchedule(patcher.get_model_object("model_sampling")))
        if any(kind.__module__.startswith(_OVERWRITE) for kind in type(host).__mro__):
            raise ValueError(
                f"this model, {model_title(base)}, cannot be trained here: its blocks overwrite what the backward pass needs, "
                "and its gradients would be wrong"
            )
        self.patcher = patcher
        self._program = TrainingProgram()
        self._attached: WeakSet[Attachment] = WeakSet()  # of the adapters that are trained
        for injection in injections_of(patcher):
            if (injection.start_percent, injection.end_percent) != (0, 1):
                raise ValueError(
                    f'adapter "{injection.applied.adapter.name}" is on this model for {injection.start_percent:.0%} to '
                    f"{injection.end_percent:.0%} of sampling; to train on a model, its adapters must be active all the time"
                )
            if any(_depends_on_sampling(rule) for rule in injection.control):
                raise ValueError(
                    f'adapter "{injection.applied.adapter.name}" on this model has a router control for one prompt only, for a '
                    "part of sampling, or one that holds: in training there is no such thing. Train without that control"
                )

        for reference in references_of(patcher):
            if (reference.start_percent, reference.end_percent) != (0, 1):
                raise ValueError(
                    f"a reference image is on this model for {reference.start_percent:.0%} to {reference.end_percent:.0%} of "
                    "sampling; to train on a model, its references must be active all the time"
                )

    @cached_property
    def fingerprint(self) -> str:
        """The weights, how it samples, and the adapters and reference images that are on it."""
        sampling = self.schedule.sampling
        numbers = sorted((name, value) for name, value in vars(sampling).items() if type(value) in (int, float))
        parts = [super().fingerprint, self.schedule.prediction_type, tensors_hash(sampling.buffers()), repr(numbers)]
        for injection in injections_of(self.patcher):
            applied = injection.applied
            how = (applied.strength, applied.dma, applied.sta, applied.layers, applied.layer_weights, injection.control)
            parts += [tensors_hash(applied.adapter.state_dict().values()), repr(how)]
        for reference in references_of(self.patcher):
            rows = reference.attachment(self.patcher.model).rows.values()
            constants = [part for own in rows for part in (own.keys.positive, own.values.positive)]
            parts.append(tensors_hash([*constants, *([] if reference.mask is None else [reference.mask])]))
        return hashlib.blake2b("/".join(parts).encode(), digest_size=8).hexdigest()

    @property
    def is_float16(self) -> bool:
        return compute_dtype(self.patcher) == torch.float16

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @property
    def whole(self) -> nn.Module:
        return self.patcher.model

    @property
    def latent_space(self) -> tuple[Any, ...]:
        return (type(self.patcher.model.latent_format).__name__,)

    @property
    def title(self) -> str:
        """What the model is, in words."""
        return model_title(self.patcher.model)

    def attachment(self, adapter: Adapter) -> Attachment:
        names = {name: found.place for name, found in find_places(self.patcher.model, adapter).items()}
        attachment = Attachment(self.denoiser, [Applied(adapter)], names, self._program)
        self._attached.add(attachment)
        return attachment

    def text(self, conditioning: Conditioning) -> Tensor | None:
        rows: Any = conditioning[CONDS]
        given = rows[0].get("c_crossattn")
        return None if given is None else given.value

    def current_calls(self) -> list[CurrentCall]:
        held = [i.attachment(self.patcher.model) for i in injections_of(self.patcher) if not i.patched]
        return [sites[0].current for attachment in (*self._attached, *held) for sites in attachment.sites]

    def in_place_blocks(self) -> set[str]:
        return {name for name in self.blocks() if _IN_PLACE.search(f"{name}.")}  # see lasting_norms

    def held(self) -> ExitStack:
        """The adapters and references that are on the MODEL, installed until the stack is closed: a backward pass may run
        blocks again, outside of the call that they are there for otherwise."""
        stack = ExitStack()
        for injection in injections_of(self.patcher):
            if injection.patched:
                continue
            stack.enter_context(injection.attachment(self.patcher.model))
        for reference in references_of(self.patcher):
            if reference.reference.active:
                stack.enter_context(reference.attachment(self.patcher.model))
        return stack

    def predict(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        calls = called_together(conditioning, self.device)
        try:
            x0 = self._denoised(noisy, times, calls)
        except comfy.model_management.InterruptProcessingException:
            if torch.is_grad_enabled():
                raise
            # In a validation: an optimizer's step without what belongs to it could not be saved. Stop after it instead.
            x0 = self._denoised(noisy, times, calls)
            comfy.model_management.interrupt_current_processing(True)
        return prediction_of(self.schedule, x0, noisy, times)

    def _denoised(self, noisy: Tensor, times: Tensor, calls: Sequence[tuple[list[int], dict[str, Any]]]) -> Tensor:
        """x0 of every row, by one call of the model for those rows that can share one."""
        if len(calls) == 1:
            return self._call(noisy, times, calls[0][1])
        parts = [self._call(noisy[numbers], times[numbers], named, numbers) for numbers, named in calls]
        order = torch.tensor([number for numbers, _ in calls for number in numbers], device=noisy.device)
        return torch.cat(parts)[order.argsort()]

    def _call(self, noisy: Tensor, times: Tensor, named: dict[str, Any], rows: Sequence[int] | None = None) -> Tensor:
        with _in_training(), self._told(noisy, named, rows):  # also where one pass is counted, before anything is loaded
            return self.patcher.model.apply_model(noisy, times, transformer_options=self._options(times), **named)

    @contextmanager
    def _told(self, x: Tensor, given: dict[str, Any], rows: Sequence[int] | None = None) -> Iterator[None]:
        """The layers of what is trained are told of one call of the model, for the length of it.

        Args:
            given: what else the call is given, by name.
            rows: which of a batch's images the call is of.
        """
        model = self.patcher.model
        call = ModelCall(tokens=tokens_of(model, x, given), prompt=prompt_of(given))
        with ExitStack() as stack:
            for attachment in self._attached:
                stack.enter_context(attachment.in_call(call, rows))
            forget_prompts(model)
            stack.callback(forget_prompts, model)
            yield

    @contextmanager
    def sampled(self) -> Iterator[ModelPatcher]:
        """The MODEL to sample with while adapters are trained: their layers are told of each call what training tells them."""

        def told(executor: Any, *args: Any, **named: Any) -> Any:
            with self._told(args[0], given_of(args, named)):
                return executor(*args, **named)

        self.patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _TOLD, told)
        try:
            yield self.patcher
        finally:
            self.patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, _TOLD)

    def _options(self, sigmas: Tensor) -> dict[str, Any]:
        """What comfy.samplers passes along: the MODEL's attention patches and wrappers."""
        patcher = self.patcher
        called = {"wrappers": patcher.wrappers, "callbacks": patcher.callbacks}
        options = merge_nested_dicts(patcher.model_options["transformer_options"], called)  # a copy
        if attention.optimized_attention.__name__ not in _WITH_GRADIENTS:
            options.setdefault(_OVERRIDE, lambda _chosen, *args, **named: attention.attention_pytorch(*args, **named))
        return {**options, "sigmas": sigmas, "cond_or_uncond": [0]}

    def layer_shapes(self) -> dict[str, LayerShape]:
        """Every layer that can be adapted, by its diffusers name where ComfyUI knows one, else by its own."""
        return layer_shapes(self.patcher.model)

    def architecture(self) -> str:
        """The ModelSpec id of a known architecture, else ComfyUI's name of the model."""
        shapes = self.layer_shapes()
        for known in ARCHITECTURES.values():
            if known.shapes() == shapes:
                return known.modelspec
        return type(self.patcher.model.model_config).__name__


def free_memory(models: Sequence[ComfyTrainingModel]) -> int:
    """Bytes that a training of these models may use on their device: what is free, and what ComfyUI can free there."""
    management, device = comfy.model_management, models[0].device
    if device.type == "cpu":  # its models are in there already
        held = sum(model.patcher.model_size() for model in models)
    else:
        held = sum(loaded.model_loaded_memory() for loaded in management.current_loaded_models if loaded.device == device)
    return int(management.get_free_memory(device)) + held


class Loaded:
    """Models on their device, ready for forward and backward passes.

    Args:
        models: the student, and the teacher where there is one.
        shape: of a batch of latents.
        memory: bytes that a step needs beside the weights; 0 for a guess.
        lends: whether weights may stay in RAM, and come to the card for the length of one operation. Blocks must run again in
            the backward pass then: without that, all of these copies would be kept for it.
    """

    def __init__(self, models: Sequence[ComfyTrainingModel], shape: Sequence[int], memory: int = 0, lends: bool = False):
        self.models, self.shape, self.memory, self.lends = models, list(shape), memory, lends

    def prepare(self) -> None:
        """Load what is not loaded. After sampling in between, which may have made room for itself, call it again."""
        patchers = [model.patcher for model in self.models]
        memory = self.memory or _TRAINING_MEMORY * max(patcher.memory_required(self.shape) for patcher in patchers)
        beside = [other for patcher in patchers for other in patcher.get_nested_additional_models()]
        with torch.inference_mode():  # as ComfyUI loads
            comfy.model_management.load_models_gpu([*patchers, *beside], memory, force_full_load=not self.lends)
        for patcher in patchers:
            patcher.pre_run()
        for patcher in (*patchers, *beside):
            leave_inference_mode(patcher.model)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Loaded and told that they run, and told when it is over."""
        management = comfy.model_management
        # Quantized layers multiply in 8 bits or less, which has no gradient in every version; told so, they unpack first.
        layers = [part for model in self.models for part in model.denoiser.modules() if hasattr(part, _UNPACKED)]
        former = [getattr(layer, _UNPACKED) for layer in layers]
        # Weights that come from RAM by a stream of their own share a buffer: the backward pass would find it overwritten.
        streams = management.NUM_STREAMS
        try:
            management.NUM_STREAMS = 0
            for layer in layers:
                setattr(layer, _UNPACKED, True)
            self.prepare()
            with ExitStack() as stack:
                stack.enter_context(_in_training())
                for model in self.models:
                    stack.enter_context(model.held())
                    stack.enter_context(lasting_norms(model.denoiser))
                yield
        finally:
            management.NUM_STREAMS = streams
            for layer, value in zip(layers, former, strict=True):
                setattr(layer, _UNPACKED, value)
            for model in self.models:
                model.patcher.cleanup()


@contextmanager
def _in_training() -> Iterator[None]:
    """Newer versions of ComfyUI avoid operations without gradients where this is said."""
    management = comfy.model_management
    former = getattr(management, "in_training", None)
    if former is None:
        yield
        return
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = former


@contextmanager
def lasting_norms(network: nn.Module) -> Iterator[None]:
    """Norms keep copies of their inputs for the backward pass, where blocks change these in place afterwards."""

    def copied(_norm: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (given[0].clone(), *given[1:]) if torch.is_grad_enabled() else None

    norms = [part for name, part in network.named_modules() if isinstance(part, nn.LayerNorm) and _IN_PLACE.search(name)]
    hooks = [norm.register_forward_pre_hook(copied) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _depends_on_sampling(rule: Rule) -> bool:
    return rule.role != "all" or rule.hold_first or rule.hold is not None or (rule.start_percent, rule.end_percent) != (0, 1)


def with_lasting_weights(patcher: ModelPatcher) -> ModelPatcher:
    """A MODEL whose weights stay where they are while it runs.

    The dynamic patchers of newer versions lend a layer its weights for the length of one operation; the backward pass
    needs them later. Of such a one this is a clone without that, its own copy of the weights included.
    """
    is_dynamic = getattr(patcher, "is_dynamic", None)
    return patcher.clone(disable_dynamic=True) if is_dynamic is not None and is_dynamic() else patcher


def leave_inference_mode(module: nn.Module) -> None:
    """Let autograd keep a module's frozen tensors for the backward pass.

    ComfyUI makes them in inference mode, which forbids that. The same memory under an ordinary tensor does not: nothing
    is copied, and nothing changes.
    """
    with torch.inference_mode(False):
        for part in module.modules():
            for name, tensor in chain(part._parameters.items(), part._buffers.items()):
                if tensor is None or not tensor.is_inference() or type(tensor) not in (nn.Parameter, Tensor):
                    continue
                plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
                if name in part._parameters:
                    part._parameters[name] = nn.Parameter(plain, requires_grad=False)
                else:
                    part._buffers[name] = plain
