"""A disk on which no more can be written."""

import contextlib
import resource


@contextlib.contextmanager
def most_bytes(count):
    """The system refuses to write more than ``count`` bytes to any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
