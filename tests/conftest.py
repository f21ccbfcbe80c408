"""What all tests share."""

import os

from onnxcomp.runtime import sessions

# Several workers fill the cores; two threads a session would wait for each other, spinning.
if "PYTEST_XDIST_WORKER" in os.environ:
    sessions.THREADS = 1
