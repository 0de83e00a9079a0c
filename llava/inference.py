#!/usr/bin/env python3
"""Ask one question: `python inference.py --model_path DIR --img_path cat.jpg --prompt "What is this?"`."""

import sys
from pathlib import Path

# This checkout's packages, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from piip_llava.chat import answer, load
from piip_llava.cli import Parser, add_model_options, run


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = Parser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--img_path", help="the image; leave it out for a question about nothing")
    parser.add_argument("--prompt", required=True, help="the question")
    args = parser.parse_args()

    def work() -> None:
        model, processor = load(args.model_path, args.device, args.dtype, args.vision_weights)
        print(answer(model, processor, args.prompt, args.img_path))

    return run(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
