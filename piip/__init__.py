"""Parameter-Inverted Image Pyramid Networks (NeurIPS 2024, arXiv 2406.04330; TPAMI 2025, arXiv 2501.07783)."""

from piip.checkpoint import load_checkpoint
from piip.models import Classifier, DensePyramid, create_model
from piip.pyramid import PIIP
from piip.tokens import Tokens
from piip.zoo.specs import BranchSpec, PyramidSpec, list_models

__version__ = "0.1.0"

__all__ = [
    "PIIP",
    "BranchSpec",
    "Classifier",
    "DensePyramid",
    "PyramidSpec",
    "Tokens",
    "create_model",
    "list_models",
    "load_checkpoint",
]
