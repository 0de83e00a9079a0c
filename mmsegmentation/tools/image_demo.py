#!/usr/bin/env python3
"""Segment and draw: `python tools/image_demo.py IMAGE|FOLDER|'PATTERN' CONFIG CHECKPOINT --out DIR`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's piip, installed or not

from piip.integrations import cli
from piip.integrations.image_demo import image_demo, parse_image_demo

if __name__ == "__main__":
    sys.exit(cli.main(image_demo, parse_image_demo(task="segmentation")))
