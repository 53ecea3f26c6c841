"""The command line and other programs in copies of this process, which need not import torch and diffusers again.

A copy has what was imported and cached before it. What it changes stays in it.
"""

import contextlib
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def start(work, *arguments, out=None, err=None, cwd=None, environment=None):
    """A copy of this process that does ``work(*arguments)``, as a program of its own would.

    Returns the running multiprocessing.Process. ``out`` and ``err`` are open files in place of its output,
    ``environment`` is all of its environment.
    """
    process = multiprocessing.get_context("fork").Process(
        target=_program, args=(work, arguments, out, err, cwd, environment)
    )
    process.start()
    return process


def _program(work, arguments, out, err, cwd, environment):
    for number, file in ((1, out), (2, err)):
        if file is not None:
            os.dup2(file.fileno(), number)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 until it ends
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    logging.root.handlers.clear()  # those of pytest
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or a line says that the process was copied
    if cwd is not None:
        os.chdir(cwd)
    work(*arguments)


def _main(*arguments):
    from posttrain.cli.app import main

    sys.argv = ["posttrain", *arguments]
    sys.path.insert(0, os.getcwd())
    main()


def finished(work, *arguments, seconds=300, **how):
    """Do ``work(*arguments)`` in a copy; returns a CompletedProcess with what it printed."""
    with contextlib.ExitStack() as stack:
        out, err = (stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(2))
        process = start(work, *arguments, out=out, err=err, **how)
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read(), err.read())


def posttrain(*arguments, cwd, code=0, **environment):
    """Run the command line in the folder ``cwd``; it must end with ``code``. Returns a CompletedProcess.

    Where a process cannot be copied (no Linux, or CUDA) it is a new one.
    """
    words = list(map(str, arguments))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environment}
    if sys.platform == "linux" and not torch.cuda.is_available():
        done = finished(_main, *words, cwd=cwd, environment=environment)
    else:
        command = [sys.executable, "-m", "posttrain", *words]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done
