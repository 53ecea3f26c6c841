"""One process of several ends with its work, whatever its threads do."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys, threading
from posttrain.cli.ending import run_to_the_end

def command():
    atexit.register(print, "tracker closed")
    threading.Thread(target=threading.Event().wait).start()  # as one of torch's, which Python would wait for
    print("done")
    sys.exit(%s)

run_to_the_end(command)
"""


def ended(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM % code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "environment", [{"WORLD_SIZE": "2", "RANK": "1"}, {"POSTTRAIN_CHILD": str(os.getpid())}]
)
@pytest.mark.parametrize("code", ["0", "None"])
def test_a_process_that_did_its_work_ends_at_once_and_closes_what_is_open(environment, code):
    done = ended(code, **environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\ntracker closed\n", "")
