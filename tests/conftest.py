"""Settings that all tests share."""

from __future__ import annotations

import os

# Two test processes on two cores: more threads than one each only get in each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
