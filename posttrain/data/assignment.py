"""Assigns each image to the bucket, the size at which it is trained."""

from __future__ import annotations

from posttrain.data.buckets import bucket_problem, bucket_sizes, nearest_bucket
from posttrain.data.settings import Images
from posttrain.data.sizes import sizes_of
from posttrain.data.table import Bucket, Record, Table
from posttrain.errors import DataError


def assigned(table: Table, spec: Images, divisor: int) -> list[Bucket | str]:
    """The bucket of each record, or why it has none: the nearest to the resolution, or the row's own one.

    Raises DataError if neither the recipe nor any row names a size.
    """
    records = table.records
    if spec.resolution is None:
        if all(record.bucket is None for record in records):
            raise DataError(
                f"{spec.images}: no size to train at. Give the data a 'resolution', such as 512: each image "
                "is then trained at about that area, in its own aspect ratio. Or name a size in each row of "
                "a list or table, 'bw' and 'bh' in pixels"
            )
        return [_own(record, spec, divisor) for record in records]
    sizes = bucket_sizes(spec.resolution, divisor)
    unknown = [record for record in records if record.bucket is None]
    measured = dict(zip((record.id for record in unknown), sizes_of(spec, unknown), strict=True))
    found = [record.bucket or measured[record.id] for record in records]
    return [size if isinstance(size, str) else nearest_bucket(*size, sizes) for size in found]


def _own(record: Record, spec: Images, divisor: int) -> Bucket | str:
    """The bucket that the row names, or why it cannot be used."""
    if record.bucket is None:
        return "no 'bw' and 'bh'; add them, or give the recipe's data a 'resolution'"
    return bucket_problem(record.bucket, divisor, spec.max_pixels) or record.bucket
