"""Rewards at a server's address, and images for them to score."""

import sys
import types

import numpy as np
import torch

from posttrain.rewards.callable import Callable
from posttrain.rewards.remote import Remote
from posttrain.shapes.dataset import scene_at
from posttrain.shapes.render import render

CPU = torch.device("cpu")
THREE = (torch.zeros(3, 3, 8, 8), ["a", "b", "c"], [{}] * 3)


def own(monkeypatch, function):
    """A reward that calls ``function(images, prompts, metadata)``, called ``judge``."""
    module = types.ModuleType("served")
    module.judge = function
    monkeypatch.setitem(sys.modules, "served", module)
    return Callable(function="served:judge")


def remote(url, name="shapes", **settings):
    quick = {"timeout_seconds": 60.0, "retries": 2, "backoff_seconds": 0.01}
    return Remote(url=url, name=name, **{**quick, **settings})


def scenes(count):
    found = [scene_at(3, i) for i in range(count)]
    images = torch.from_numpy(np.stack([np.asarray(render(s)) for s in found])).permute(0, 3, 1, 2) / 255
    # no image that a VAE decodes has 8 bits; the last bits must arrive too
    images = (images + 1e-3 * torch.randn(images.shape, generator=torch.manual_seed(0))).clamp(0, 1)
    rows = [s.metadata for s in found]
    return images, [row["prompt"] for row in rows], rows[1:] + rows[:1]  # so that some score badly


def same(a, b):
    assert torch.equal(a.value, b.value)
    assert a.value.dtype == b.value.dtype
    assert a.details.keys() == b.details.keys()
    assert all(torch.equal(a.details[name], b.details[name]) for name in a.details)
