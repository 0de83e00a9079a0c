"""A page in the browser for a model on pictures, with Gradio: what `tools/gradio_demo.py` of every task shows.

A task gives a function from an image to a picture and a record; :func:`image_page` makes the page, and :func:`serve`
shows it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from piip.errors import RunError
from piip.integrations.cli import Overrides
from piip.integrations.command import Parser
from piip.integrations.image_demo import TASKS, score
from piip.integrations.inference import detect, load_detector, load_segmentor, segment
from piip.integrations.visualize import draw, draw_segmentation

if TYPE_CHECKING:
    import gradio

Predict = Callable[[np.ndarray, float], tuple[np.ndarray, Mapping[str, Any]]]


def import_gradio() -> Any:
    """Return the gradio module, which reports nothing to anybody here.

    Raises:
        RunError: It is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise RunError("Gradio is not installed: pip install 'piip[demo]'") from error
    return gradio


def image_page(
    title: str,
    predict: Predict,
    *,
    threshold: float | None = 0.5,
    examples: Sequence[str | Path] = (),
) -> gradio.Blocks:
    """Return a page: an image goes in, a picture and a JSON record come out.

    Args:
        title: Its heading.
        predict: From an image (H, W, 3) uint8, RGB, and the slider's value, to a picture of the same kind and what the
            JSON shows. Called once at a time; its endpoint is `/predict`.
        threshold: Where the slider of the confidence threshold starts; None for no slider (`predict` then gets 0).
        examples: Image files to choose from.

    Raises:
        RunError: Gradio is not installed.
    """
    gr = import_gradio()

    def run(image: np.ndarray | None, value: float = 0.0) -> tuple[np.ndarray, Mapping[str, Any]]:
        if image is None:
            raise gr.Error("Choose an image first.")
        try:
            return predict(image, value)
        except (RuntimeError, ValueError) as error:  # too large for the memory, too small for the model
            raise gr.Error(str(error)) from error

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}")
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="numpy", image_mode="RGB", label="Image", sources=["upload", "clipboard"])
                inputs = [image]
                if threshold is not None:
                    inputs.append(gr.Slider(0, 1, value=threshold, step=0.05, label="Confidence threshold"))
                button = gr.Button("Run", variant="primary")
            with gr.Column():
                outputs = [
                    gr.Image(format="png", label="Result", buttons=["download", "fullscreen"]),
                    gr.JSON(label="Record"),
                ]
        if examples:
            gr.Examples([str(path) for path in examples], inputs=image)
        button.click(run, inputs, outputs, api_name="predict", concurrency_limit=1)
    return page


def parse_gradio_demo(
    argv: Sequence[str] | None = None, prog: str = "gradio_demo.py", task: str = "detection"
) -> argparse.Namespace:
    """Return the options of a task's `tools/gradio_demo.py`; exits with one line if they are wrong.

    Args:
        argv: The command line; default: this process's.
        prog: Name of the command.
        task: A key of `PAGES`.
    """
    parser = Parser(prog=prog, description=f"{TASKS[task].purpose[:-1]}, in the browser.", allow_abbrev=False)
    parser.set_defaults(task=task)
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint file; also a DeepSpeed folder")
    if task == "detection":
        parser.add_argument("--confidence-threshold", type=score, default=0.5, metavar="SCORE", help="default: 0.5")
    parser.add_argument("--device", help="cpu, cuda or cuda:NUMBER (default: a GPU if there is one)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be seen by other machines (default: this one)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--cfg-options", nargs="+", action=Overrides, default={}, metavar="KEY=VALUE")
    return parser.parse_args(argv)


def serve(page: gradio.Blocks, args: argparse.Namespace, *, block: bool = True) -> None:
    """Show a page until it is interrupted.

    Args:
        page: From :func:`image_page`.
        args: From :func:`parse_gradio_demo`.
        block: Whether to wait; otherwise `page.close()` ends it.

    Raises:
        RunError: The port is taken.
    """
    try:
        page.launch(
            server_name=args.host, server_port=args.port, share=False, prevent_thread_lock=not block, show_error=True
        )
    except OSError as error:
        raise RunError(f"--port {args.port} of {args.host} cannot be used: {error}; choose another --port") from error


def detection_page(args: argparse.Namespace) -> gradio.Blocks:
    """Return the page of a detector.

    Raises:
        RunError: The config or the device is not usable, or Gradio is not installed.
        CheckpointError: The checkpoint cannot be read, or does not fit the config's model.
    """
    import_gradio()
    detector = load_detector(args.config, args.checkpoint, args.device, args.cfg_options)

    def predict(image: np.ndarray, threshold: float) -> tuple[np.ndarray, Mapping[str, Any]]:
        (found,) = detect(detector, [image], threshold)
        record = found.record()
        for entry in record["detections"]:
            entry.pop("mask", None)  # the picture shows it
        return draw(found), record

    return image_page(_title(args), predict, threshold=args.confidence_threshold, examples=_examples())


def segmentation_page(args: argparse.Namespace) -> gradio.Blocks:
    """Return the page of a segmentor: the classes' colours over the image with a legend, and their shares.

    Raises:
        RunError: The config or the device is not usable, or Gradio is not installed.
        CheckpointError: The checkpoint cannot be read, or does not fit the config's model.
    """
    import_gradio()
    segmentor = load_segmentor(args.config, args.checkpoint, args.device, args.cfg_options)

    def predict(image: np.ndarray, _: float) -> tuple[np.ndarray, Mapping[str, Any]]:
        (found,) = segment(segmentor, [image])
        return draw_segmentation(found), found.record()

    return image_page(_title(args), predict, threshold=None, examples=_examples())


def _title(args: argparse.Namespace) -> str:
    return f"PIIP: {Path(args.config).stem}"


def _examples() -> list[Path]:
    sample = Path(__file__).resolve().parents[2] / "mmdetection" / "demo" / "sample.jpg"
    return [sample] if sample.is_file() else []


PAGES: dict[str, Callable[[argparse.Namespace], gradio.Blocks]] = {
    "detection": detection_page,
    "segmentation": segmentation_page,
}


def gradio_demo(args: argparse.Namespace) -> None:
    """Show a model as the options of :func:`parse_gradio_demo` say.

    Raises:
        RunError: See `PAGES` and :func:`serve`.
        CheckpointError: See `PAGES`.
    """
    serve(PAGES[args.task](args), args)
