"Settings for all tests: no network, few threads, the same random examples on every run."
import os

from hypothesis import settings

import draft_nb  # noqa: F401  before diffusers: it mends the import of torchvision where that needs mending

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything here runs from the repository alone
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes with a thread each (.pytest.ini) beat one with two

settings.register_profile("draft_nb", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("draft_nb")
