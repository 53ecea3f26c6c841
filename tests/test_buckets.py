"""Images are trained at the size of nearest shape, and cropped to it exactly."""

import numpy as np
import pytest
import torch
from data_files import LIMIT, folder_of, noise
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from posttrain.data import Images
from posttrain.data.buckets import bucket_problem, bucket_sizes, cover_and_crop, nearest_bucket, to_pixels
from posttrain.data.loader import ImageSource
from posttrain.errors import DataError


def cropped(image, bucket, offsets, flip):
    """A crop as training sees it: (3, height, width) in [-1, 1]."""
    return to_pixels(cover_and_crop(image, bucket, offsets, flip)[None])[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(1, 32))
@example(64, 16)
def test_buckets_are_legal_near_in_area_and_symmetric(factor, divisor):
    resolution = factor * divisor
    sizes = bucket_sizes(resolution, divisor)
    assert (resolution, resolution) in sizes
    for width, height in sizes:
        assert width % divisor == height % divisor == 0
        assert 0.5 <= width / height <= 2
        assert (height, width) in sizes
        assert abs(width * height - resolution**2) <= divisor * max(width, height) / 2
        # each size is its own nearest bucket, so an image of that size is not resampled
        assert nearest_bucket(width, height, sizes) == (width, height)


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
@example(1, 1000)
def test_no_bucket_has_a_nearer_aspect_ratio(width, height):
    sizes = bucket_sizes(512, 16)
    chosen = nearest_bucket(width, height, sizes)
    distances = {size: abs(np.log(width / height * size[1] / size[0])) for size in sizes}
    assert distances[chosen] <= min(distances.values()) + 1e-9


def test_buckets_that_cannot_be_are_refused_with_the_nearest_that_can(tmp_path):
    assert bucket_problem((512, 768), 16, LIMIT) is None
    assert (
        bucket_problem((500, 512), 16, LIMIT) == "bw 500 is not a multiple of 16; the nearest are 496 or 512"
    )
    assert "nearest is 16" in str(bucket_problem((512, 9), 16, LIMIT))
    assert "max_pixels" in str(bucket_problem((512, 512), 16, 10_000))
    with pytest.raises(DataError, match="resolution 8 is below 16"):
        bucket_sizes(8, 16)
    with pytest.raises(DataError, match="bw 20 is not a multiple of 16; the nearest are 16 or 32"):
        ImageSource(Images(images=folder_of(tmp_path, bw=20)), 16)
    with pytest.raises(DataError, match="'resolution'"):
        ImageSource(Images(images=folder_of(tmp_path, bw=None, bh=None)), 16)


def test_a_crop_without_resizing_is_exact_and_reaches_every_position():
    values = noise(20, 16)
    image = Image.fromarray(values)
    seen = set()
    for k in range(50):
        crop = cropped(image, (16, 16), (k / 50, 0.99), False)
        back = ((crop + 1) * 127.5).round().permute(1, 2, 0).numpy()
        start = next(s for s in range(5) if np.array_equal(back, values[:, s : s + 16]))
        seen.add(start)
    assert seen == set(range(5))
    centre = cropped(image, (16, 16), (0.5, 0.5), True)
    expected = torch.tensor(values[:, 2:18][:, ::-1].copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(centre, expected)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from([(16, 16), (32, 16), (16, 48)]),
    st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
)
@example((1, 1000), (512, 512), (0.999999, 0.999999))
@example((7919, 3), (16, 48), (0.999999, 0.5))
def test_any_image_covers_any_bucket(size, bucket, offsets):
    crop = cropped(Image.new("RGB", size, (255, 0, 51)), bucket, offsets, False)
    assert crop.shape == (3, bucket[1], bucket[0])
    assert crop.dtype == torch.float32
    assert torch.allclose(crop, torch.tensor([1.0, -1.0, -0.6])[:, None, None].expand_as(crop))


def test_the_last_position_is_reached_where_rounding_falls_short_of_a_whole_pixel():
    assert 98 * (16 / 49) < 32
    image = Image.new("RGB", (98, 49))
    image.paste((255, 255, 255), (95, 0, 98, 49))
    assert cropped(image, (16, 16), (0.999, 0.0), False)[:, :, -1].min() > 0.8


def test_resizing_and_cropping_at_once_is_covering_then_cropping():
    image = Image.fromarray(noise(90, 60))
    whole = np.asarray(image.resize((48, 32), Image.Resampling.LANCZOS))
    for k, offset in ((0, 0.0), (8, 0.5), (16, 0.99)):
        crop = (cropped(image, (32, 32), (offset, 0.0), False) + 1) * 127.5
        assert np.abs(crop.permute(1, 2, 0).numpy() - whole[:, k : k + 32]).max() <= 1.01
