"""Settings for all tests: no network, few threads, the same random examples on every run.

What equal means in tests and notebooks (`nbs/11_adapters.ipynb` says why):

- `torch.equal` where one process computes twice from the same tensors, in batches of one shape, with the same number of threads,
  and where nothing is computed: weights written and read again, frozen weights, tokens, random numbers of a seed.
- `assert_close(a, b, atol=1e-5, rtol=0)` for everything else: a network and its copy (deep, merged, loaded a second time, read from
  disk, moved to another layout and back), other batch sizes or rows, fused against two passes, with and without gradient, a compiled
  network, other threads, processes or CPUs. The tolerance is for pictures and weights; 1e-4 after many steps or strong guidance.
- Pictures of 8 bits from two of these differ by one level at most; files are compared by what they hold.
- What must differ must differ by more than rounding: `not torch.allclose(a, b, atol=1e-4)`.

`pytest -m numeric` runs the tests that would notice another CPU; `.ci/run` repeats them with other instruction sets.
"""
import os

from hypothesis import settings

import draft_nb  # noqa: F401  before diffusers: it mends the import of torchvision where that needs mending

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything here runs from the repository alone
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes with a thread each (.pytest.ini) beat one with two

settings.register_profile("draft_nb", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("draft_nb")
