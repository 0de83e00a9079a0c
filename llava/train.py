#!/usr/bin/env python3
"""Train a stage of PIIP-LLaVA: `python train.py --help` lists the options; see shell_scripts/ for whole commands."""

import sys
from pathlib import Path

# This checkout's packages, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from piip_llava.training import main

if __name__ == "__main__":
    sys.exit(main())
