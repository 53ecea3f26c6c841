"""The laws of a trainable model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from posttrain.errors import ModelError
from posttrain.model import DtypeName, FlowModel, Model
from posttrain.policy.tuning import Lora
from posttrain.testing.law import BlockLaws, law, require
from posttrain.weights.writing import entries_of

CPU = torch.device("cpu")


class Gathered(nn.Module):
    """Stands for a strategy's wrapper that computes in another precision: notes what floats it is given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.dtypes: set[torch.dtype] = set()

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.network(*tree_map(self._taken, given), **tree_map(self._taken, named))

    def _taken(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        self.dtypes.add(value.dtype)
        return value.float()


class ModelLaws(BlockLaws):
    """What every trainable model keeps: ``model = Mine()``. It is loaded on the CPU, so name a small one."""

    about = "model"
    family = Model
    model: Model
    sizes: Sequence[tuple[int, int]] = ((64, 64), (64, 32))
    """(height, width) in pixels of images that it can draw."""
    prompts: Sequence[str] = ("a photo of a red circle", "a blue square")
    lora: Lora | None = Lora(rank=2)
    """A LoRA that it can train; None if a model has no layers for one."""
    terminal: float | None = None
    """The last sigma but 0 of the sampling grid, where the grid was stretched to end there."""

    def load(self, dtype: DtypeName = "fp32") -> FlowModel:
        """The model on the CPU."""
        return self.model.load(CPU, dtype)

    def moved(self, model: FlowModel) -> FlowModel:
        """``model`` with a little noise on its weights, so that layers which begin at 0 count too."""
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.transformer.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=noise).to(parameter.dtype)
        return model

    def inputs(self, model: FlowModel, size: tuple[int, int]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Noise, a sigma and a condition for each prompt."""
        count = len(self.prompts)
        latents = torch.randn(count, *model.latent_shape(*size), generator=torch.Generator().manual_seed(1))
        return latents, torch.linspace(0.3, 0.8, count), model.encode_prompts(list(self.prompts))

    @law(
        "a prompt's condition is the same whatever is encoded with it",
        "pad every prompt to one length, and give the text encoder always as many rows",
    )
    def test_a_prompts_condition_is_the_same_in_any_batch(self) -> None:
        model = self.load()
        together = model.encode_prompts([*self.prompts, "green " * 12])
        alone = model.encode_prompts(list(self.prompts[-1:]))
        require(together.keys() == alone.keys(), f"tensors {sorted(together)} and {sorted(alone)}")
        row = len(self.prompts) - 1
        other = [name for name in alone if not torch.equal(together[name][row], alone[name][0])]
        require(not other, f"another {', '.join(other)} of {self.prompts[-1]!r}")

    @law(
        "an image's latents have the shape that latent_shape says, and decode to images in [0, 1]",
        "let posterior, latents, latent_shape and decode agree, and clamp what decode returns",
    )
    def test_latents_and_images_have_their_shapes(self) -> None:
        model = self.load()
        for height, width in self.sizes:
            pixels = torch.rand(2, 3, height, width) * 2 - 1
            mean, logvar = model.posterior(pixels)
            latents = model.latents(mean, logvar, torch.zeros_like(mean))
            expected, found = (2, *model.latent_shape(height, width)), tuple(latents.shape)
            require(found == expected, f"latents {found} of {height} x {width} pixels, not {expected}")
            require(latents.dtype == torch.float32, f"latents are {latents.dtype}")
            images = model.decode(latents)
            require(tuple(images.shape) == tuple(pixels.shape), f"images {tuple(images.shape)}")
            low, high = float(images.min()), float(images.max())
            require(low >= 0 and high <= 1, f"images from {low:.3g} to {high:.3g}")

    @law(
        "an image's encoding is the same whatever is encoded with it",
        "encode a number of images at once that depends on their size alone, such as 1",
    )
    def test_an_images_encoding_is_the_same_in_any_batch(self) -> None:
        model = self.load()
        pixels = torch.rand(3, 3, *self.sizes[0]) * 2 - 1
        together, alone = model.posterior(pixels), model.posterior(pixels[2:])
        off = max(float((a[2] - b[0]).abs().max()) for a, b in zip(together, alone, strict=True))
        require(off == 0, f"mean or log-variance differ by up to {off:.2g}")

    @law(
        "the velocity is float32, of the latents' shape, and finite from sigma 0 to 1, with bf16 weights too",
        "call self.module, cast latents and condition to forward_dtype or the transformer's dtype, and the "
        "result to float32",
    )
    def test_the_velocity_has_its_shape_in_either_precision(self) -> None:
        for dtype in ("fp32", "bf16"):
            model = self.load(dtype)
            latents, sigma, condition = self.inputs(model, self.sizes[-1])
            for s in (torch.zeros_like(sigma), sigma, torch.ones_like(sigma)):
                with torch.no_grad():
                    found = model.velocity(latents, s, condition)
                require(found.shape == latents.shape, f"{dtype}: the shape {tuple(found.shape)}")
                require(found.dtype == torch.float32, f"{dtype}: the result is {found.dtype}")
                require(found.isfinite().all(), f"{dtype}: it is not finite at sigma {float(s[0]):.2g}")
        model = self.load()
        model.forward_dtype, model.module = torch.bfloat16, (network := Gathered(model.transformer))
        latents, sigma, condition = self.inputs(model, self.sizes[-1])
        with torch.no_grad():
            model.velocity(latents, sigma, condition)
        require(network.dtypes, "it does not call self.module, which a parallel strategy replaces")
        require(torch.bfloat16 in network.dtypes, f"forward_dtype is bfloat16, the inputs {network.dtypes}")

    @law(
        "a row's velocity depends on its own latents, sigma and prompt, and on nothing else",
        "pass each of them to the network row by row, and put no batch norm or dropout in it",
    )
    def test_the_velocity_depends_on_its_row(self) -> None:
        model = self.moved(self.load())
        latents, sigma, condition = self.inputs(model, self.sizes[0])
        with torch.no_grad():
            whole = model.velocity(latents, sigma, condition).detach()
            first = model.velocity(latents[:1], sigma[:1], {k: v[:1] for k, v in condition.items()}).detach()
            changed = {
                "latents": model.velocity(latents.flip(0), sigma, condition),
                "sigma": model.velocity(latents, sigma.flip(0), condition),
                "prompts": model.velocity(latents, sigma, {k: v.flip(0) for k, v in condition.items()}),
            }
        off = float((whole[:1] - first).abs().max())
        require(off < 1e-4 * (1 + float(whole.abs().max())), f"a row alone is off by {off:.2g}")
        without = [name for name, other in changed.items() if not (other - whole).abs().max() > 1e-6]
        require(not without, f"it does not change with the {', '.join(without)}")

    @law(
        "training draws its sigmas by the function that makes the sampling grid",
        "override sigma(t, size) and leave sigmas as it is; 'terminal' names the end of a stretched grid",
    )
    def test_training_and_sampling_share_their_sigmas(self) -> None:
        model = self.load()
        for shape in self.sizes:
            sigmas = torch.tensor(model.sigmas(8, *shape), dtype=torch.float64)
            require(abs(float(sigmas[0]) - 1) < 1e-6 and sigmas[-1] == 0, f"the grid {sigmas.tolist()}")
            require((sigmas.diff() < 0).all(), f"the grid does not fall: {sigmas.tolist()}")
            size, sigmas = model.latent_shape(*shape)[1:], sigmas[:-1]
            if (end := self.terminal) is not None:
                require(abs(float(sigmas[-1]) - end) < 1e-6, f"it ends at {float(sigmas[-1])}")
                # the stretch multiplied 1 - sigma by one number; before, the last time was 1 / 8
                last = model.sigma(torch.tensor(1 / 8, dtype=torch.float64), size)
                sigmas = 1 - (1 - sigmas) * (1 - last) / (1 - end)
            gaps = _times(model, sigmas, size).diff()
            off = float((gaps - gaps.mean()).abs().max())
            require(off < 2e-5, f"at {shape} the grid is sigma of times that are uneven by {off:.2g}")

    @law(
        "the weights that velocity uses are those of self.transformer, and what is saved loads again",
        "call self.module in velocity, and leave save and load_weights as they are or override both",
    )
    def test_weights_get_gradients_and_load_again(self) -> None:
        model = self.moved(self.load())
        inputs = self.inputs(model, self.sizes[0])
        model.transformer.requires_grad_(True)
        model.velocity(*inputs).square().mean().backward()
        weights = dict(model.transformer.named_parameters())
        without = [name for name, weight in weights.items() if weight.grad is None]
        require(len(without) <= len(weights) / 2, f"no gradient for {', '.join(without[:5])}")
        with tempfile.TemporaryDirectory() as folder:
            model.save_exact(Path(folder), entries_of(weights))
            again = self.load()
            again.load_weights(Path(folder))
        other = [n for n, w in again.transformer.named_parameters() if not torch.equal(w, weights[n])]
        require(not other, f"other values of {', '.join(other[:5])}")

    @law(
        "a LoRA changes the velocity and loads again",
        "derive the transformer from diffusers' ModelMixin, ConfigMixin and PeftAdapterMixin, and name its "
        "linear layers in 'lora', or set 'lora = None'",
    )
    def test_a_lora_loads_again(self) -> None:
        if self.lora is None:
            return
        model = self.load()
        inputs = self.inputs(model, self.sizes[0])
        with torch.no_grad():
            plain = self.moved(self.load()).velocity(*inputs)
            self.lora.apply(self.moved(model).transformer, 0)
            for parameter in model.transformer.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(2)
                    )
            found = model.velocity(*inputs).detach()
            require((found - plain).abs().max() > 1e-6, "the velocity is the same with the LoRA")
            with tempfile.TemporaryDirectory() as folder:
                weights = entries_of(dict(model.transformer.named_parameters()))
                model.save_lora(Path(folder), weights)
                again = self.moved(self.load())
                again.load_weights(Path(folder))
            off = float((again.velocity(*inputs) - found).abs().max())
        require(off < 1e-4 * (1 + float(found.abs().max())), f"merged again it is off by {off:.2g}")

    @law(
        "what its encodings depend on is plain, and its outline has the shapes of the loaded weights",
        "return JSON values from identity, and from outline the architecture that load makes",
    )
    def test_identity_and_outline_are_those_of_the_loaded_model(self) -> None:
        model = self.load()
        for encoder in ("prompts", "images"):
            with suppress(ModelError):  # which says that its encodings cannot be cached
                json.dumps(model.identity(encoder))
        shapes = {name: tuple(weight.shape) for name, weight in model.transformer.named_parameters()}
        if (found := self.model.transformer_shapes()) is not None:
            require(found == shapes, f"other shapes of {sorted(found.items() ^ shapes.items())[:3]}")
        if (outline := self.model.outline("fp32", torch.device("meta"))) is not None:
            found = {name: tuple(weight.shape) for name, weight in outline.transformer.named_parameters()}
            require(found == shapes, f"other shapes of {sorted(found.items() ^ shapes.items())[:3]}")
            with torch.device("meta"):
                latents = torch.empty(2, *outline.latent_shape(*self.sizes[0]))
                velocity = outline.velocity(latents, torch.empty(2), outline.encode_prompts(["a", "b"]))
            require(velocity.shape == latents.shape, f"a velocity of the shape {tuple(velocity.shape)}")


def _times(model: FlowModel, sigmas: Tensor, size: Sequence[int]) -> Tensor:
    """The times t whose sigma the model gives as ``sigmas``, by bisection."""
    low, high = torch.zeros_like(sigmas), torch.ones_like(sigmas)
    for _ in range(60):
        middle = (low + high) / 2
        below = model.sigma(middle, size) < sigmas
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
