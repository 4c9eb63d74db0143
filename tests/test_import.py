"What an import costs, and that torchvision can be imported; each case in a fresh interpreter."
import os
import subprocess
import sys

import pytest

HEAVY = "{'torch', 'torchvision', 'diffusers', 'transformers', 'open_clip', 'gradio', 'matplotlib'}"


def python(code, **env):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ|env)
    assert done.returncode==0, done.stderr
    return done.stdout


def test_package_is_light():
    assert python(f"import sys, draft_nb; print(sorted({HEAVY} & set(sys.modules)))").strip()=="[]"


def test_help_is_light():
    "`draft-nb --help` answers before anything heavy is imported."
    code = f"""
import sys
from draft_nb.cli import main
try: main(["--help"])
except SystemExit as e: assert not e.code, e.code
print(sorted({HEAVY} & set(sys.modules)))"""
    out = python(code)
    assert "train" in out and out.rstrip().endswith("[]")


@pytest.mark.parametrize("module", ["torchvision", "open_clip", "timm", "diffusers"])
def test_torchvision_imports(module):
    "Also where torchvision's operators do not fit torch."
    python(f"import draft_nb, {module}, torchvision; torchvision.transforms.functional")


def test_finder_asks_nothing():
    "Looking for torchvision imports neither it nor torch."
    python("import draft_nb, sys, importlib.util as u; assert u.find_spec('torchvision'); assert 'torch' not in sys.modules")


FAKE = {"__init__.py": "import torch\nfrom . import extension, _meta_registrations\n",
        "extension.py": "{extension}",
        "_meta_registrations.py": "import torch\ntorch.library.register_fake('torchvision::nms')(lambda d,s,t: d)\n"
                                  "torch.library.register_fake('torchvision::qnms')(lambda d,s,t: d)\n"}
LOADS = ("import torch\nlib = torch.library.Library('torchvision', 'DEF')\n"
         "lib.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
         "lib.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n")


@pytest.fixture
def torchvision(tmp_path):
    "A stand-in whose operators load or do not, first on the path: both cases on every machine."
    def make(extension):
        (tmp_path/"torchvision").mkdir()
        for name,text in FAKE.items(): (tmp_path/"torchvision"/name).write_text(text.format(extension=extension))
        return {"PYTHONPATH": str(tmp_path)}
    return make


def test_operators_that_load_are_left_alone(torchvision):
    python("import draft_nb, torchvision; from draft_nb import _torchvision as t; assert not t._declared", **torchvision(LOADS))


def test_missing_operators_are_declared(torchvision):
    python("""
import draft_nb, importlib, torchvision, torch
from draft_nb import _torchvision as t
assert len(t._declared)==1 and torch.ops.torchvision.nms and torch.ops.torchvision.qnms
importlib.reload(torchvision.extension)
assert len(t._declared)==1""", **torchvision("")) # once, also after a reload


def test_without_the_finder_it_fails(torchvision):
    "The stand-in has the real package's fault: without this the tests above could not fail."
    with pytest.raises(AssertionError, match="torchvision::nms does not exist"): python("import torchvision", **torchvision(""))


def test_after_torchvision_nothing_happens(torchvision):
    python("import sys, torchvision; before = list(sys.meta_path); import draft_nb; assert sys.meta_path==before", **torchvision(LOADS))


def test_one_finder():
    python("""
import sys, importlib, draft_nb
from draft_nb import _torchvision as t
importlib.reload(draft_nb); t.install()
assert sys.meta_path.count(t._Finder)==1""")


def test_without_torchvision():
    "An absent torchvision is absent as before."
    code = """
import sys, draft_nb
from draft_nb import _torchvision as t
sys.path = [p for p in sys.path if "site-packages" not in p]
assert t._Finder.find_spec("torchvision.extension", []) is None
try: import torchvision
except ModuleNotFoundError: sys.exit(0)
sys.exit("imported")"""
    python(code)


def test_threads(torchvision):
    "Many threads that import at once register once."
    python("""
import draft_nb
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
with ThreadPoolExecutor(8) as pool: list(pool.map(import_module, ["torchvision", "torchvision.extension"]*8))
from draft_nb import _torchvision as t
assert len(t._declared)==1""", **torchvision(""))
