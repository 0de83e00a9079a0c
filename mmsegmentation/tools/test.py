#!/usr/bin/env python3
"""Evaluate a segmentor: `python tools/test.py CONFIG CHECKPOINT [--eval mIoU] [--show-dir DIR]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's piip, installed or not

from piip.integrations import cli

if __name__ == "__main__":
    sys.exit(cli.main(cli.test, cli.parse_test()))
