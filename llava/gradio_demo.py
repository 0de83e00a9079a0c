#!/usr/bin/env python3
"""A page to talk about an image: `python gradio_demo.py --model_path DIR`, then open the address that it prints."""

import sys
from pathlib import Path

# This checkout's packages, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from piip_llava.chat import load
from piip_llava.cli import Parser, add_model_options, run
from piip_llava.web import build


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = Parser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be reached from other machines")
    parser.add_argument("--port", type=int, default=10013)
    parser.add_argument("--share", action="store_true", help="make a public link")
    args = parser.parse_args()

    def work() -> None:
        page = build(*load(args.model_path, args.device, args.dtype, args.vision_weights))
        page.queue().launch(server_name=args.host, server_port=args.port, share=args.share)

    return run(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
