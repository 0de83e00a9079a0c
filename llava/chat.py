#!/usr/bin/env python3
"""Talk about images in the terminal: `python chat.py --model_path DIR --img_path cat.jpg`.

Type a question. `/image PATH` begins anew with another image, `/clear` begins anew with the same, `/quit` ends.
"""

import sys
from pathlib import Path

# This checkout's packages, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from piip_llava.chat import Chat, load
from piip_llava.cli import Parser, add_model_options, run
from piip_llava.errors import InputError


def talk(chat: Chat, image: str | None) -> None:
    """Read questions until the end of input."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/clear":
            chat.messages = []
        elif command == "/image":
            image = rest.strip()
        elif line:
            try:
                for piece in chat.ask(line, image):
                    print(piece, end="", flush=True)
                print()
                image = None
            except InputError as error:
                print(f"{error}")


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = Parser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--img_path", help="image to begin with")
    args = parser.parse_args()

    def work() -> None:
        talk(Chat(*load(args.model_path, args.device, args.dtype, args.vision_weights)), args.img_path)

    return run(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
