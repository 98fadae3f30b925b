# SPDX-License-Identifier: Apache-2.0
"""What training has to know of a family of base models, and the part that all rectified-flow models share.

A family is one file beside this one: how it encodes text and images, which noise levels training draws, what the
denoiser predicts, and which modules are adapted by default and why. Nothing here knows of adapters.
"""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from ..errors import TrainingError
from .memory import MODULAR, require_supported
from .parts import Parts, is_hull
from .streaming import BlockStream

Text = dict[str, Tensor]
_COMPUTES = torch.float32, torch.bfloat16, torch.float16  # what weights compute in; others are only stored


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`, in its turn: a GPU queues the copy, and the host goes on.

    An ordinary copy waits until the GPU has done all that is queued, so that it then has nothing to do.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Base(ABC):
    """A pipeline seen as something that can be trained.

    Args:
        pipeline: a stock diffusers pipeline of this family; it is not changed.
        weighting_scheme: density of the noise levels, as diffusers' training scripts name it: 'logit_normal' (arXiv
            2403.03206, section 3.1), 'mode' (the same) or 'none' (uniform); None: the family's own.
        shift: of the noise levels, as diffusers' flow schedulers name it: t' = s t / (1 + (s - 1) t), above 1 to more
            noise; None: the family's own.
        max_sequence_length: tokens of a prompt; by default what the tokenizer allows, 512 at the most.
        parts: loads the models of a pipeline of hulls; None: they are all there.

    Class attributes:
        pipeline_class: name of the diffusers pipeline.
        target_modules: regular expression of the modules that are adapted by default.
        denoiser_name: attribute of the pipeline that holds the denoiser.
        default_weighting: density of the noise levels when none is asked for.
        encoder_names: attributes that hold what is not needed once latents and text embeddings are cached.
        large_encoders: those of them that have billions of numbers, and are quantised and streamed as the denoiser is.
    """

    pipeline_class: ClassVar[str]
    target_modules: ClassVar[str]
    denoiser_name: ClassVar[str] = "transformer"
    default_weighting: ClassVar[str] = "logit_normal"
    encoder_names: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    large_encoders: ClassVar[tuple[str, ...]] = ()
    # Layers that see prompts of different lengths one behind the other, where no row of a batch is found again.
    ragged_layers: ClassVar[str] = ""
    # What the denoiser has the host look at in its inputs, if anything: it can be neither recorded nor stacked then.
    host_looks: ClassVar[str] = ""

    def __init__(
        self,
        pipeline: Any,
        *,
        weighting_scheme: str | None = None,
        shift: float | None = None,
        max_sequence_length: int | None = None,
        parts: Parts | None = None,
    ) -> None:
        self.pipeline, self.parts = pipeline, parts
        self.weighting_scheme, self.shift = weighting_scheme or self.default_weighting, shift
        self.stream: BlockStream | None = None
        self._visits: torch.device | None = None
        self._here: tuple[str, ...] = ()
        self._made: dict[tuple[Hashable, ...], Tensor] = {}
        self._given_length = max_sequence_length

    @property
    def denoiser(self) -> Any:
        """The model that is adapted, an nn.Module of diffusers."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is, or computes."""
        return next(self.denoiser.parameters()).device if self.stream is None else self.stream.device

    @property
    def _text_encoders(self) -> tuple[str, ...]:
        return tuple(name for name in self.encoder_names if name != "vae")

    @property
    def encoders_device(self) -> torch.device:
        """Where the text encoders compute."""
        names = [name for name in self._text_encoders if getattr(self.pipeline, name, None) is not None]
        return self._visits or next(getattr(self.pipeline, names[0]).parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the denoiser computes."""
        denoiser = self.denoiser
        # diffusers looks at every module for hooks that cast: at batch 1, a seventh of a step.
        for parameter in denoiser.parameters():
            if parameter.is_floating_point():
                if parameter.dtype in _COMPUTES and not getattr(denoiser, "_keep_in_fp32_modules", None):
                    return parameter.dtype
                break
        return denoiser.dtype

    def place(self, device: torch.device | str, *, encoders: bool, denoiser: bool = True, vae: bool = False) -> None:
        """Put the denoiser on `device`, and the VAE and text encoders there (True) or out of the way (False).

        A base that loads its parts loads what is needed and lets go of the rest, before; of any other the rest moves to
        the CPU. If its memory settings say so, VAE and text encoders take turns on the device, and the denoiser's
        blocks are streamed.

        Args:
            denoiser: False leaves it where it is, for example divided over processes.
            vae: True keeps the VAE there without the text encoders.
        """
        there = [name for name in self.encoder_names if getattr(self.pipeline, name, None) is not None]
        needed = [name for name in there if encoders or (vae and name == "vae")]
        offload = "none" if self.parts is None else self.parts.memory.offload
        self._visits = torch.device(device) if encoders and offload != "none" else None
        self._here = ()
        if self.parts is not None:
            self.parts.release(self.pipeline, [name for name in there if name not in needed])
            self.parts.bring(self.pipeline, needed, device)
        for name in there:
            part = getattr(self.pipeline, name)
            if is_hull(part):
                continue
            if self._visits is not None and offload == "group" and self._is_streamed(name):
                apply_group_offloading(part, onload_device=self._visits, offload_type="leaf_level")
            else:
                part.to(device if name in needed and self._visits is None else "cpu")
        if denoiser:
            self.load_denoiser(device)
            if offload != "group":
                self.denoiser.to(device)
            elif self.stream is None:
                self.stream = BlockStream(self.denoiser, torch.device(device))

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load all that is a hull to the CPU, for good.

        Args:
            device: where it will compute, as `Parts.bring` takes it.

        Raises:
            ConfigError: weights are to wait, and this kind of pipeline has no hooks that bring them to draw.
        """
        if self.parts is None:
            return
        if not hasattr(self.pipeline, "enable_model_cpu_offload"):
            require_supported(self.parts.memory, "draw", MODULAR)
        if self.parts.memory.offload == "none":
            self.parts.bring(self.pipeline, list(self.pipeline.components), device)
        else:  # one after another, so that a device never holds them all
            for name in self.pipeline.components:
                if is_hull(getattr(self.pipeline, name)):
                    self.parts.bring(self.pipeline, [name], device)
                    getattr(self.pipeline, name).to("cpu")
        self.parts = None

    def load_denoiser(self, device: torch.device | str = "cpu") -> None:
        """Load the denoiser, if it is a hull; `device` as `Parts.bring` takes it."""
        if self.parts is not None:
            self.parts.bring(self.pipeline, [self.denoiser_name], device)

    def _is_streamed(self, name: str) -> bool:
        """Whether an encoder comes layer by layer; what is quantised is small enough to come whole."""
        return self.parts is not None and self.parts.memory.quantize == "none" and name in self.large_encoders

    def _have_here(self, *names: str) -> None:
        """Let these encoders take their turn on the device, where they take turns."""
        if self._visits is None or self._here == names:
            return
        for turn, device in ((self._here, torch.device("cpu")), (names, self._visits)):
            for name in turn:
                part = getattr(self.pipeline, name, None)
                if part is not None and not self._is_streamed(name):
                    part.to(device)
        self._here = names

    @property
    def call_parameters(self) -> Mapping[str, inspect.Parameter]:
        """What a call of the pipeline takes."""
        # The stock class: one that derives from it (as Meta-LoRA's own does, under its name) may hide the parameters.
        stock = [cls for cls in type(self.pipeline).__mro__ if cls.__name__ == self.pipeline_class][-1]
        return inspect.signature(stock.__call__).parameters

    @property
    def call_arguments(self) -> frozenset[str]:
        """Names of what a call of the pipeline takes."""
        return frozenset(self.call_parameters)

    def draw(self, **options: Any) -> Any:
        """Images of a call of the pipeline, of whatever kind `output_type` asks for.

        Args:
            options: as the pipeline's call takes them, whatever the family: one prompt or several, `generator` one for
                each image.
        """
        return self.pipeline(**options).images

    @property
    def frames_per_second(self) -> int:
        """Of the clips that it draws; 0: it draws pictures."""
        return 0

    def latent_frames(self, num_frames: int | None) -> int:
        """Frames that the denoiser sees of a clip of so many frames, or of as many as the pipeline draws unasked."""
        return 1

    def clips(self, **options: Any) -> Any:
        """Clips of a call of the pipeline, a list of frames each, of whatever kind `output_type` asks for.

        Args:
            options: as `draw` takes them, and `num_frames`. A base that draws pictures draws clips of one frame.
        """
        return [[image] for image in self.draw(**options)]

    @property
    def takes_sequence_length(self) -> bool:
        """Whether the pipeline's call has `max_sequence_length`."""
        return "max_sequence_length" in self.call_arguments

    @functools.cached_property
    def max_sequence_length(self) -> int:
        """Tokens of a prompt."""
        # Asked for when it is needed: a pipeline without text encoders can still read photos.
        return self._given_length or self._default_sequence_length()

    def _default_sequence_length(self) -> int:
        return min(512, self.pipeline.tokenizer.model_max_length)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Text:
        """Embeddings of n prompts: a dict of tensors with n rows each, on the CPU.

        Raises:
            TrainingError: a text encoder gives NaN or infinity.
        """
        self._have_here(*self._text_encoders)
        return {name: _finite(tensor.cpu(), "a text encoder") for name, tensor in self.text_of(prompts).items()}

    @abstractmethod
    def text_of(self, prompts: Sequence[str]) -> Text:
        """As `encode_text`, on the encoders' device and with gradients, for whoever trains what the encoders see."""

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, batch_size: int | None = None) -> Tensor:
        """Latents of images, scaled as the denoiser knows them, on the CPU.

        The mean of the VAE's posterior is taken: its spread is far below what a crop or a noise level changes.

        Args:
            pixels: (n, 3, h, w) in [-1, 1]; h and w divisible by `pixel_multiple`.
            batch_size: images at a time; by default as many as a megapixel holds, at most 16.

        Returns:
            (n, c, h / f, w / f), f the VAE's factor.

        Raises:
            TrainingError: the VAE gives NaN or infinity.
        """
        self._have_here("vae")
        vae = self.pipeline.vae
        device = _device_of_hooks(vae) or next(vae.parameters()).device
        dtype = next(vae.parameters()).dtype
        size = batch_size or min(16, max(1, 2**20 // (pixels.shape[-2] * pixels.shape[-1])))
        overflows = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)  # as SDXL's does
        if overflows and not is_hull(vae):  # weights that come layer by layer stay what they are
            dtype = vae.float().dtype
        try:
            parts = [_finite(self.latents_of(part.to(device, dtype)).cpu(), "the VAE") for part in pixels.split(size)]
        finally:
            if overflows and not is_hull(vae):
                vae.half()
        return torch.cat(parts).float()

    def latents_of(self, pixels: Tensor) -> Tensor:
        """One batch of `encode_images`."""
        config = self.pipeline.vae.config
        latents = self.pipeline.vae.encode(pixels).latent_dist.mode()
        return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of an image's side for one of its latents."""
        return self.pipeline.vae_scale_factor

    @property
    def pixel_multiple(self) -> int:
        """Height and width of images must be divisible by this."""
        return self.vae_scale_factor

    @property
    def token_side(self) -> int:
        """Pixels of an image's side for one of the tokens that a transformer sees."""
        return self.pixel_multiple

    @property
    def default_side(self) -> int:
        """Height and width of a square image where nobody says, in pixels: as many as the pipeline's own has."""
        size = getattr(self.pipeline, "default_sample_size", None) or self.denoiser.config.get("sample_size")
        if size is None:  # pipelines that have it as a number in their call
            return 1024
        return int((size if isinstance(size, int) else min(size)) * self.vae_scale_factor)

    def density(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw n numbers t in (0, 1) by the weighting scheme, and shift them."""
        t = compute_density_for_timestep_sampling(
            self.weighting_scheme,
            latents.shape[0],
            logit_mean=0.0,
            logit_std=1.0,
            mode_scale=1.29,
            device=generator.device if generator is not None else latents.device,
            generator=generator,
        ).to(latents.device)
        shift = self.time_shift(latents) if self.shift is None else self.shift
        return shift * t / (1 + (shift - 1) * t)

    def time_shift(self, latents: Tensor) -> float:
        """s in t' = s t / (1 + (s - 1) t) where nobody asks for another: 1, none."""
        return 1.0

    @abstractmethod
    def sample_times(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a noise level for each of n latents: (n,)."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t: `latents` (n, c, h, w) with `noise` of the levels `times` (n,)."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What `predict` should give for x_t: (n, c, h, w)."""

    def once(self, key: tuple[Hashable, ...], make: Callable[[], Tensor]) -> Tensor:
        """A tensor that depends on `key` alone, which names a device too: made once, and there from then on.

        To bring it there in every step would take the host's time, and could not be recorded as a CUDA graph.
        """
        if key not in self._made:
            device = next(part for part in key if isinstance(part, torch.device))
            with torch.inference_mode(False):
                tensor = make().to(device)
            while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # made inside of vmap or grad, kept for all
                tensor = torch._C._functorch.get_unwrapped(tensor)
            self._made[key] = tensor
        return self._made[key]

    @abstractmethod
    def predict(self, noisy: Tensor, text: Text, times: Tensor) -> Tensor:
        """The denoiser's output for x_t: as `noisy`, (n, c, h, w)."""

    def loss(self, latents: Tensor, text: Text, noise: Tensor, times: Tensor, mask: Tensor | None = None) -> Tensor:
        """Training loss of each sample: (n,) float32, the mean square of what the denoiser gets wrong.

        Args:
            latents: (n, c, h, w) clean latents. text: as `encode_text` returns, n rows. noise: as `latents`.
            times: (n,) as `sample_times` returns.
            mask: (n, 1, h, w) in [0, 1], the weight of each place in the mean. Where it is 0 nothing is learned; a
                sample without any weight has loss 0.

        Raises:
            TrainingError: `predict` gives another shape.
        """
        predicted = self.predict(self.add_noise(latents, noise, times), text, times)
        if predicted.shape != latents.shape:  # torch would make a number of both all the same
            raise TrainingError(
                f"expected {type(self).__name__}.predict to give {tuple(latents.shape)}, the shape of its latents, "
                f"found {tuple(predicted.shape)}: correct the class"
            )
        errors = F.mse_loss(predicted.float(), self.target(latents, noise, times), reduction="none")
        if mask is None:
            return errors.flatten(1).mean(1)
        total = mask.flatten(1).sum(1) * errors.shape[1]
        return (errors * mask).flatten(1).sum(1) / total.clamp(min=1e-6)


class FlowBase(Base):
    """Rectified flow (arXiv 2403.03206, equations 1, 12 and 13): x_t = (1 - t) x_0 + t noise, v = noise - x_0."""

    def sample_times(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw t in (0, 1), shifted by `shift`, or as the pipeline's own scheduler shifts it for images of this size.

        The scheduler's shift (a constant, or one that grows with the number of tokens) says at which noise levels
        generation spends its steps; training draws them likewise.
        """
        return self.density(latents, generator)

    def time_shift(self, latents: Tensor) -> float:
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting", False):
            return float(config.get("shift", 1.0))
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = base + (top - base) * (self.tokens(latents) - low) / (high - low)
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu

    def tokens(self, latents: Tensor) -> int:
        """Image tokens of one latent."""
        return latents.shape[-2] * latents.shape[-1] // 4

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        t = times.view(-1, 1, 1, 1)
        return (1 - t) * latents + t * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - latents


def _device_of_hooks(model: torch.nn.Module) -> torch.device | None:
    """Where hooks of accelerate bring a model, or its layers; what it is to compute with they do not bring."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in devices if device is not None), None)
    return None if found is None else torch.device(found)


def _finite(tensor: Tensor, source: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise TrainingError(
            f"expected numbers from {source}, found NaN or infinity in {tensor.dtype}: it overflows there, as some do "
            "in float16, or its weights are damaged. Give mixed_precision 'bf16' or 'no', or another base."
        )
    return tensor
