"""An algorithm, a reward, data and a model, in each of which one thing at a time can be wrong: its ``fault``."""

import itertools
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from test_model_contract import Net, ToyFlow

from posttrain.algorithm import Algorithm, Batch, Items, Losses
from posttrain.data.family import Data, Facts
from posttrain.data.source import BatchSource
from posttrain.flow import interpolate
from posttrain.model import Model, torch_dtype
from posttrain.reward import Reward, Scores
from posttrain.sampling.prompts import encode
from posttrain.support.randomness import Draws


class Mine(Algorithm):
    """Flow matching, in which one thing at a time can be wrong."""

    type: Literal["mine"] = "mine"
    needs: ClassVar = "images"
    fault: str = Field(default="", description="What is wrong.")

    def collect(self, batch, tools):
        draws, n = tools.draws, len(batch)
        noise = draws.normal("noise", batch.latents.shape[1:])
        sigma = torch.sigmoid(draws.normal("t", ()))
        if self.fault == "global noise":
            noise = torch.randn(batch.latents.shape)
        if self.fault == "batch noise":
            noise = noise - noise.mean(0)
        if self.fault == "same noise":
            sigma, noise = torch.full((n,), 0.5), torch.ones_like(batch.latents)
        if self.fault == "moves":
            next(iter(tools.policy.trained.values())).mul_(2)
        if self.fault == "rows":
            batch = batch.take(slice(0, n - 1))
            noise, sigma = noise[:-1], sigma[:-1]
        fields = {
            "latents": interpolate(batch.latents, noise, sigma),
            "sigma": sigma,
            "target": noise - batch.latents,
        }
        fields |= {"prompt_index": batch.prompt_index, "sample_index": batch.sample_index}
        if self.fault == "same noise":
            fields |= {"latents": torch.zeros_like(noise), "target": noise}
        if self.fault == "chunks":
            fields["target"] = fields["target"] * tools.policy.micro_batch
        weight = torch.ones_like(sigma)
        if self.fault == "random weight":
            weight = torch.tensor(np.random.default_rng().random(len(sigma)))
        if self.fault == "weight of chunks":
            weight = weight * tools.policy.micro_batch
        return Items(weight, fields, batch.conditions)

    def loss(self, items, policy):
        latents = items.latents
        if self.fault == "dropout":
            latents = torch.nn.functional.dropout(latents, 0.5)
        error = (
            (policy.velocity(latents, items.sigma, items.condition) - items.target)
            .square()
            .flatten(1)
            .mean(1)
        )
        if self.fault == "batch mean":
            error = error / error.mean().detach()
        if self.fault == "no gradient":
            error = (items.target * next(iter(policy.trained.values())).sum() * 0).flatten(1).mean(1)
        return Losses(error)


class Taste(Reward):
    """The mean red of an image, in which one thing at a time can be wrong."""

    type: Literal["taste"] = "taste"
    range: ClassVar = (0.0, 1.0)
    fault: str = Field(default="", description="What is wrong.")

    def about(self):
        return "" if self.fault == "wordless" else super().about()

    def load(self, device):
        def score(images, prompts, metadata):
            red = images[:, 0].flatten(1).mean(1)
            wrong = {
                "constant": lambda: torch.zeros(len(red)),
                "range": lambda: red * 10,
                "batch": lambda: red - red.mean() + 0.5,
                "random": lambda: torch.rand(len(red)),
                "division": lambda: red * (images.flatten(1).std(1) / images.flatten(1).std(1)),
            }
            details = {
                "random detail": {"red": torch.tensor(np.random.default_rng().random(len(red)))},
                "detail of a batch": {"red": red - red.mean()},
            }
            return Scores(wrong.get(self.fault, lambda: red)(), details.get(self.fault, {}))

        return score


class DotSource(BatchSource):
    """Constant latents, and a prompt for each."""

    def __init__(self, opening, fault):
        self.opening, self.fault, self.model = opening, fault, opening.model
        self.prompts = [f"a photo of {n} dots" for n in range(8)]
        self.size = self.largest = (16, 16)

    def batches(self, key, start):
        world, count = self.opening.world, self.opening.batch_size // self.opening.world.size
        for number in itertools.count(0 if self.fault == "restarts" else start):
            first = number * self.opening.batch_size + (0 if self.fault == "all" else world.rank * count)
            ids = [(first + i) % 8 for i in range(count)]
            more = (
                " or more" * int(np.random.default_rng().integers(1000)) if self.fault == "captions" else ""
            )
            conditions, rows = encode(self.model, [self.prompts[i] + more for i in ids])
            latents = torch.stack([torch.full(self.model.latent_shape(*self.size), i / 8) for i in ids])
            if self.fault == "random":
                latents = torch.randn(latents.shape)
            if self.fault == "infinite":
                latents[0] = float("nan")
            drawn = ids[1:] if self.fault == "short" else ids
            index = torch.arange(count) + world.rank * count
            batch = Batch(latents, rows, conditions, sample_index=index, total=self.opening.batch_size)
            yield number, batch, Draws((*key, number), drawn)


class Dots(Data):
    """Dots, in which one thing at a time can be wrong."""

    type: Literal["dotted"] = "dotted"
    gives: ClassVar = "images"
    fault: str = Field(default="", description="What is wrong.")

    def open(self, opening):
        return DotSource(opening, self.fault)

    def facts(self, path):
        return Facts((64, 64) if self.fault == "size" else (16, 16), 3 if self.fault == "prompts" else 8)

    def problems(self):
        if self.fault == "problem":
            yield "fault", "nothing is there"


class WrongFlow(ToyFlow):
    """The toy of test_model_contract.py, in which one thing at a time can be wrong."""

    fault = ""

    def encode_prompts(self, prompts):
        condition = super().encode_prompts(prompts)
        return {"c": condition["c"] - condition["c"].mean(0)} if self.fault == "centred" else condition

    def posterior(self, pixels):
        mean, logvar = super().posterior(pixels)
        return (mean - mean.mean(0) if self.fault == "encoding" else mean), logvar

    def latent_shape(self, height, width):
        return super().latent_shape(height, width)[:: -1 if self.fault == "shape" else 1]

    def decode(self, latents):
        return super().decode(latents) + (1 if self.fault == "range" else 0)

    def velocity(self, latents, sigma, condition):
        if self.fault == "sigma":
            sigma = torch.zeros_like(sigma)
        if self.fault == "neighbours":
            latents = latents + latents.mean(0)
        own = (
            self.transformer.dtype
            if self.fault == "own dtype"
            else self.forward_dtype or self.transformer.dtype
        )
        dtype = torch.float32 if self.fault == "dtype" else own
        inputs = latents.to(dtype), sigma.to(dtype), {k: v.to(dtype) for k, v in condition.items()}
        if self.fault == "transformer":
            self.module = self.transformer
        found = super().velocity(*inputs).float()
        return found.detach().requires_grad_() if self.fault == "detached" else found

    def sigmas(self, steps, height, width):
        grid = super().sigmas(steps, height, width)
        if self.fault == "static":
            grid = [3 * s / (1 + 2 * s) for s in grid]
        if self.fault in ("stretched", "static"):
            last = grid[-2]
            return [*(1 - 0.98 * (1 - s) / (1 - last) for s in grid[:-1]), 0.0]
        return [s**2 for s in grid] if self.fault == "grid" else grid

    def identity(self, encoder):
        return {1, 2} if self.fault == "identity" else super().identity(encoder)

    def load_weights(self, source, merge=True):
        if self.fault != "forgets":
            super().load_weights(source, merge)


class Small(Model):
    """A toy model."""

    type: Literal["small"] = "small"
    fault: str = Field(default="", description="What is wrong.")

    def load(self, device, transformer_dtype):
        torch.manual_seed(0)
        model = WrongFlow(Net().to(device, torch_dtype(transformer_dtype)), device)
        model.fault = self.fault
        return model


OWN = {"mine": Algorithm, "taste": Reward, "dotted": Data, "small": Model}
for name, kind in OWN.items():
    OWN[name] = kind, kind.variants.pop(name)  # or other tests would find it
