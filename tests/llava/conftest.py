"""LLaVA's tests need the llava extra."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the llava extra")
sys.path.insert(0, str(Path(__file__).parent))
