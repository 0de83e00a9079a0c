#!/usr/bin/env python3
"""Train or evaluate an image classifier: `python main.py --model CONFIG --data-path IMAGENET [options]`."""

import sys
from pathlib import Path

# This checkout's packages, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from piip_cls.run import main

if __name__ == "__main__":
    sys.exit(main())
