"""Packaging of PIIP: the core needs torch and timm, everything else is an extra.

The bounds below are the oldest releases that the code is written for; the exact versions that the tests run on are in
``requirements/constraints.txt``, which ``make setup`` installs from.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Task code lives beside the configs and scripts of its task, under a package name that nobody else owns.
TASK_PACKAGES = {"piip_cls": "classification", "piip_llava": "llava"}

MM_CORE = ["onedl-mmengine>=0.10.12", "onedl-mmcv>=2.3.6", "torchvision"]

EXTRAS = {
    "det": [*MM_CORE, "onedl-mmdetection>=3.5.1", "pycocotools>=2.0.8"],
    # mmdetection: Mask2Former's parts, which mmsegmentation takes from there
    "seg": [*MM_CORE, "onedl-mmsegmentation>=1.4.2", "onedl-mmdetection>=3.5.1", "pycocotools>=2.0.8"],
    "cls": ["torchvision", "matplotlib>=3.8", "tensorboard>=2.19"],
    "llava": [
        "transformers>=4.57",
        "accelerate>=1.0",
        "peft>=0.17",
        "sentencepiece>=0.2",
        "tensorboard>=2.19",
        "pillow",
    ],
    "train": ["deepspeed>=0.19"],
    "demo": ["gradio>=6"],
    # lmms-eval pins much: better in an environment of its own.
    "eval": ["lmms-eval>=0.7.3", "openpyxl>=3.1"],
    "export": ["onnx>=1.19", "onnxruntime>=1.23", "onnxscript>=0.5"],
    "dev": [
        # tests
        "psutil>=5.9",
        "pytest>=9",
        "pytest-xdist>=3.8",
        "fvcore>=0.1.5.post20221221",
        "safetensors>=0.4",
        # real digits and photographs for the mini data
        "scikit-image>=0.25",
        "scikit-learn>=1.7",
        # lint
        "mypy>=2",
        "pre-commit>=4",
        "pylint>=4",
        "ruff>=0.17",
    ],
}
# Everything that the tests run on; `eval` pins too much to be part of it.
EXTRAS["all"] = sorted({requirement for name, extra in EXTRAS.items() if name != "eval" for requirement in extra})


def read_version() -> str:
    """Return ``__version__`` of the package without importing it (torch need not be there yet)."""
    text = (ROOT / "piip" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('piip/__init__.py has no line of the form __version__ = "X.Y.Z"')
    return match.group(1)


def find_all() -> tuple[list[str], dict[str, str]]:
    """Return the packages to install and the folders of those that do not lie at the root."""
    packages, folders = find_packages(include=["piip", "piip.*"]), {}
    for name, parent in TASK_PACKAGES.items():
        if (ROOT / parent / name).is_dir():
            packages += find_packages(parent, include=[name, f"{name}.*"])
            folders[name] = f"{parent}/{name}"
    return packages, folders


packages, package_dir = find_all()

setup(
    name="piip",
    version=read_version(),
    description="Parameter-Inverted Image Pyramid Networks: large models see small images, small models the full one",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=packages,
    package_dir=package_dir,
    package_data={"piip": ["py.typed", "zoo/*.csv"]},
    install_requires=["torch>=2.6", "timm>=1.0.20"],
    extras_require=EXTRAS,
    entry_points={"lmms_eval.models": ["piip_llava = piip_llava.evaluation.lmms:manifest"]},
)
