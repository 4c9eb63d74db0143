"""Lets torchvision be imported where its compiled operators do not load.

torchvision from PyPI is built for CUDA. Beside a CPU build of torch its library `_C` cannot be loaded; torchvision
tolerates that, and three lines later attaches metadata to `torchvision::nms`, which now does not exist: the import
fails, and open_clip, timm and diffusers fail with it, although none of them calls that operator here.

The finder below waits for `torchvision.extension`, the module in which torchvision itself tries to load `_C`. If the
operators are missing after that, their signatures are declared and nothing else: a call of `torchvision.ops.nms`
still raises torchvision's own explanation. Where `_C` loads, nothing is declared. torch is imported by torchvision,
never by this module, and without torchvision the finder is never asked.
"""
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader

_signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared = [] # torch drops the declarations of a Library that nobody holds


def _declare_missing():
    "Declare those operators that torchvision annotates at import and that are not registered yet."
    import torch

    missing = [o for o in ("nms", "qnms") if not hasattr(torch.ops.torchvision, o)]
    if not missing: return
    library = torch.library.Library("torchvision", "FRAGMENT")
    _declared.append(library)
    for o in missing: library.define(o + _signature)


class _Loader(SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        _declare_missing() # still under the import lock of `module`, hence once


class _Finder:
    @staticmethod
    def find_spec(name:str, path=None, target=None) -> ModuleSpec | None:
        "The usual spec of `torchvision.extension`, with a loader that looks after the operators; None for all else."
        if name!="torchvision.extension": return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and type(spec.loader) is SourceFileLoader: spec.loader = _Loader(name, spec.origin)
        return spec


def install():
    "Put the finder in front, once; too late and not needed if torchvision has been imported."
    if "torchvision" not in sys.modules and _Finder not in sys.meta_path: sys.meta_path.insert(0, _Finder)
