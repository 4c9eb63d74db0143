"Settings for all tests: no network, few threads, the same random examples on every run."
import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1") # everything here runs from the repository alone
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

settings.register_profile("draft_nb", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("draft_nb")


@pytest.fixture(scope="session")
def root():
    "The top of the repository."
    return Path(__file__).resolve().parent.parent
