"DRaFT+ in plain diffusers: align a text-to-image model with a differentiable reward, and choose how far."
from draft_nb import _torchvision

__version__ = "0.1.0"

_torchvision.install()
