#!/usr/bin/env python3
"""Segment in the browser: `python tools/gradio_demo.py CONFIG CHECKPOINT [--port 7860]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's piip, installed or not

from piip.integrations import cli
from piip.integrations.gradio_demo import gradio_demo, parse_gradio_demo

if __name__ == "__main__":
    sys.exit(cli.main(gradio_demo, parse_gradio_demo(task="segmentation")))
