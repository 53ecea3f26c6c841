"""Rewards that processes of their own import: they do what the first prompt or the first row says."""

import os
import signal
import sys
import time
from pathlib import Path


def judge(images, prompts, metadata):
    """A reward that does what the first prompt says."""
    actions = {
        "hang": lambda: time.sleep(1e6),
        "vanish": lambda: os._exit(9),
        "exit": lambda: sys.exit(3),
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "interrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt),
        "raise": lambda: (_ for _ in ()).throw(ValueError("not so")),
    }
    actions.get(prompts[0], lambda: None)()
    return [float(image.mean()) + row.get("more", 0) for image, row in zip(images, metadata, strict=True)]


def dies_once(images, prompts, metadata):
    """A reward that ends its process unless the file ``once`` of the first row is there."""
    once = Path(metadata[0]["once"])
    if not once.exists():
        once.touch()
        os._exit(1)
    return [1.0] * len(prompts)
