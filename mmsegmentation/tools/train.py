#!/usr/bin/env python3
"""Train a segmentor: `python tools/train.py CONFIG [--resume] [--amp] [--cfg-options KEY=VALUE ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's piip, installed or not

from piip.integrations import cli

if __name__ == "__main__":
    sys.exit(cli.main(cli.train, cli.parse_train()))
