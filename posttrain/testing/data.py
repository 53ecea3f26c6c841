"""The laws of a data source."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from posttrain.algorithm import Batch
from posttrain.data.family import Data, Opening
from posttrain.data.source import BatchSource
from posttrain.distributed.world import ALONE, World
from posttrain.support.randomness import Draws
from posttrain.testing.law import BlockLaws, Found, law, require
from posttrain.testing.toys import Thumbnails

KEY = (0, 0)
Numbered = tuple[int, Batch, Draws]


class OneOfTwo(World):
    """A process of two that has no other: it takes what it sends for what the other one sent."""

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, value]


class DataLaws(BlockLaws):
    """What every data source keeps: ``data = Mine()``. Name files that a test has, and a small resolution.

    Images are encoded by a toy whose latents are the mean colours of squares of 8 pixels.
    """

    about = "data"
    family = Data
    data: Data
    batch_size: int = 4
    samples_per_prompt: int = 1

    @contextmanager
    def opened(self, world: World = ALONE) -> Iterator[BatchSource]:
        """The source, with a folder of its own, which does not exist, as in a run."""
        with tempfile.TemporaryDirectory() as folder:
            yield self.open(Path(folder) / "data", world)

    def open(self, folder: Path, world: World = ALONE) -> BatchSource:
        """The source that the data open."""
        parts = {"batch_size": self.batch_size, "samples_per_prompt": self.samples_per_prompt, "world": world}
        return self.data.open(Opening(Thumbnails(), folder, **parts))

    @law(
        "data that can be opened have no problem, and say what they are in words",
        "let problems() yield only what prevents open(), and return a few words from in_words()",
    )
    def test_it_says_what_it_is(self) -> None:
        problems = [f"{field}: {message}" for field, message in self.data.problems()]
        require(not problems, f"problems() says {'; '.join(problems)}")
        require(self.data.in_words(), "in_words() is empty")
        require(isinstance(getattr(self.data, "gives", None), str), "'gives' is no word")

    @law(
        "prompts and sizes are what the plan was told",
        "let facts() and the source agree: largest images, and at most so many prompts and images",
    )
    def test_the_facts_are_those_of_the_source(self) -> None:
        facts = self.data.facts("stages.mine.data")
        with self.opened() as source:
            require(source.prompts, "no prompts")
            require(len(set(source.prompts)) == len(source.prompts), "a prompt is listed twice")
            if facts.prompts is not None:
                found = f"{len(source.prompts)} prompts, at most {facts.prompts} by facts()"
                require(len(source.prompts) <= facts.prompts, found)
            known, largest = (size[0] * size[1] for size in (facts.size, source.largest))
            # sides are rounded to what the model allows, so areas agree roughly
            found = f"the largest image is {source.largest}, {facts.size} by facts()"
            require(0.7 <= known / largest <= 1.4, found)
            images = len(source.images)
            require(images in (0, self.data.images_per_sample), f"{images} images, not images_per_sample")

    @law(
        "a batch is whole: latents, prompts, rows and draws of as many samples, all finite",
        "build Batch as its docstring says; encode prompts with posttrain.sampling.prompts.encode",
    )
    def test_a_batch_is_whole(self) -> None:
        with self.opened() as source:
            for _, batch, draws in islice(source.batches(KEY, 0), 3):
                n, gives = len(batch), self.data.gives
                require(0 < n <= self.batch_size, f"{n} samples, with a batch_size of {self.batch_size}")
                lengths = {"latents": len(batch.latents), "draws": len(draws.ids)}
                lengths |= {name: len(values) for name, values in batch.fields.items()}
                lengths |= {"metadata": len(batch.metadata)} if batch.metadata else {}
                require(set(lengths.values()) == {n}, f"{n} samples, but {lengths}")
                table = {len(rows) for rows in batch.conditions.table.values()}
                require(int(batch.prompt_index.max()) < min(table), f"prompts {batch.prompt_index.tolist()}")
                require(all("prompt" in row for row in batch.metadata), "a row of metadata lacks 'prompt'")
                if gives == "prompts":
                    require(batch.latents.is_meta and batch.group is not None, "latents or no 'group'")
                    continue
                require(batch.latents.dtype == torch.float32, f"latents are {batch.latents.dtype}")
                require(batch.latents.isfinite().all(), "latents are not finite")
                if gives == "pairs":
                    require("rejected" in batch.fields, f"a pair has {sorted(batch.fields)}, not 'rejected'")

    @law(
        "a batch is a function of its key and its number, so a run goes on where it was cut off",
        "begin batches(key, start) with number start of one order, and draw by Draws((*key, number), ids)",
    )
    def test_batches_go_on_anywhere(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            state = torch.get_rng_state()
            whole = list(islice(self.open(Path(folder)).batches(KEY, 0), 6))
            for start in (0, whole[2][0]):
                later = next(iter(self.open(Path(folder)).batches(KEY, start)))
                first = next(batch for batch in whole if batch[0] >= start)
                require(_same(first, later), f"opened again, batch {start} has other samples")
            require(torch.equal(state, torch.get_rng_state()), "torch's global generator was used")

    @law(
        "two processes share each batch, in equal parts",
        "give rank r of opening.world its part of each batch, with sample_index counted in the whole batch, "
        "and fillers of -1 where parts differ",
    )
    def test_processes_share_each_batch(self) -> None:
        with self.opened() as source, self.opened(OneOfTwo(0, 2)) as one, self.opened(OneOfTwo(1, 2)) as two:
            number, whole, draws = _full_batch(source, self.batch_size)
            parts = [next(iter(part.batches(KEY, number))) for part in (one, two)]
            ids = [i for _, _, drawn in parts for i in drawn.ids]
            require(ids == list(draws.ids), f"samples {list(draws.ids)} alone, {ids} in two processes")
            index = torch.cat([part.sample_index for _, part, _ in parts])
            require(torch.equal(index, whole.sample_index), f"sample_index {index.tolist()}")


def _full_batch(source: BatchSource, size: int) -> Numbered:
    """The first batch of ``size`` samples."""
    for numbered in islice(source.batches(KEY, 0), 50):
        if len(numbered[1]) == size:
            return numbered
    raise Found(f"no batch of {size} samples: set a smaller 'batch_size' in the class of tests")


def _same(one: Numbered, other: Numbered) -> bool:
    """Whether two batches have the same number, samples, prompts, rows and latents."""
    (number, batch, draws), (again, second, others) = one, other
    if (number, list(draws.ids), draws.key) != (again, list(others.ids), others.key):
        return False
    if list(batch.metadata) != list(second.metadata):
        return False
    tensors, theirs = (
        {**one.conditions.rows(one.prompt_index), **one.fields, "latents": one.latents}
        for one in (batch, second)
    )
    if batch.latents.is_meta:  # of prompts, which have no images yet
        del tensors["latents"], theirs["latents"]
    same = (torch.equal(tensor, theirs[name]) for name, tensor in tensors.items() if name in theirs)
    return tensors.keys() == theirs.keys() and all(same)
