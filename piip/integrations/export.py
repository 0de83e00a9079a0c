"""Models as programs for other runtimes: `torch.export` and ONNX, checked against the model itself."""

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from piip.errors import ExportError
from piip.integrations.files import whole

OPSET = 20
EXTERNAL = 2e9  # bytes of weights: what one ONNX file can hold
Runner = Callable[[Tensor], list[Tensor]]


def _as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _shapes(dynamic: bool) -> tuple[dict[int, Any]] | None:
    return ({0: torch.export.Dim("batch", min=1, max=4096)},) if dynamic else None


def export_program(model: nn.Module, images: Tensor, *, dynamic: bool = False) -> torch.export.ExportedProgram:
    """Export a backbone or classifier by `torch.export`.

    Args:
        model: The model; it is exported in evaluation mode.
        images: `(B, 3, H, W)`: the size the program is for, and, unless `dynamic`, the batch.
        dynamic: Leave the batch open; `images` then holds two or more.

    Raises:
        ExportError: The model cannot be exported for such images.
    """
    if dynamic and len(images) < 2:
        raise ExportError("an open batch is exported with two or more images: one is treated as a constant")
    try:
        with torch.no_grad():
            return torch.export.export(model.eval(), (images,), dynamic_shapes=_shapes(dynamic))
    except ValueError as error:  # an input size that leaves a branch without a token
        raise ExportError(f"images of {images.shape[-2]} x {images.shape[-1]} pixels do not fit: {error}") from error


class _Postponing(io.RawIOBase):
    """A file that keeps its first error for later: torch's writer ends the whole process when a write fails."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0  # torch goes back to the start when it is done, for readers

    def write(self, data: Any) -> int:
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)


def save_program(program: torch.export.ExportedProgram, path: str | Path) -> Path:
    """Write an exported program as a `.pt2` file, whole or not at all.

    Returns:
        The file.

    Raises:
        ExportError: The file cannot be written.
    """
    path = Path(path)
    with whole(path, ExportError) as part, part.open("wb") as file:
        postponing = _Postponing(file)
        torch.export.save(program, cast(IO[bytes], postponing))
        if postponing.error is not None:
            raise postponing.error
    return path


def export_onnx(model: nn.Module, images: Tensor, path: str | Path, *, dynamic: bool = False) -> Path:
    """Write a backbone or classifier as an ONNX file, whole or not at all.

    The input is called `images`, the outputs `output0`, `output1`, ... Weights above 2 GB go into `NAME.data`
    beside it.

    Args:
        model: See `export_program`.
        images: See `export_program`.
        path: The file.
        dynamic: See `export_program`.

    Returns:
        The file.

    Raises:
        ExportError: onnx is not installed, the file cannot be written, or see `export_program`.
    """
    try:
        import onnxscript  # noqa: F401  (what torch's exporter is built on)
    except ImportError:
        raise ExportError("ONNX needs onnx, onnxscript and onnxruntime: pip install 'piip[export]'") from None
    path = Path(path)
    program = export_program(model, images, dynamic=dynamic)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own making
        count = len(program.graph_signature.user_outputs)
        names = [f"output{i}" for i in range(count)]
        onnx = torch.onnx.export(program, (images,), opset_version=OPSET, input_names=["images"], output_names=names)
    assert onnx is not None
    with whole(path, ExportError) as part:
        part.mkdir()  # the file names the one that holds its weights, so both are written under their own names
        onnx.save(str(part / path.name), external_data=sum(p.nbytes for p in model.parameters()) > EXTERNAL)
    return path


def run_onnx(path: str | Path) -> Runner:
    """Return what runs an ONNX file on the CPU by onnxruntime.

    Raises:
        ExportError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ExportError("running ONNX files needs onnxruntime: pip install 'piip[export]'") from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]

    return run


def run_program(program: torch.export.ExportedProgram) -> Runner:
    """Return what runs an exported program."""
    module = program.module()

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return _as_list(module(images))

    return run


def largest_difference(model: nn.Module, run: Runner, images: Tensor) -> float:
    """Return the largest absolute difference of any output, relative to the largest value of that output.

    Raises:
        ExportError: The outputs have other shapes.
    """
    with torch.no_grad():
        expected = _as_list(model.eval()(images))
    found = run(images)
    if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in expected]:
        raise ExportError(
            f"outputs are {[tuple(t.shape) for t in found]}, the model's {[tuple(t.shape) for t in expected]}"
        )
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in zip(found, expected, strict=True)
    )
