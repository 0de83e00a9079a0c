"""`tools/image_demo.py` and `tools/gradio_demo.py`, and the Python calls behind them, on an untrained detector."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
MMDETECTION = ROOT / "mmdetection"
CONFIG = MMDETECTION / "configs" / "piip" / "mini" / "mask_rcnn_mini_vit-tsb_192_144_96.py"
SAMPLE = MMDETECTION / "demo" / "sample.jpg"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A detector without training: it finds something everywhere, with a low score."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    from piip.integrations import mmcv_ops

    mmcv_ops.install()
    cfg = Config.fromfile(CONFIG)
    init_default_scope("mmdet")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("detector") / "random.pth"
    torch.save(
        {"state_dict": MODELS.build(cfg.model).state_dict(), "meta": {"dataset_meta": {"classes": DIGITS}}}, path
    )
    return path


@pytest.fixture
def demo(capsys):
    """A function that runs the command in this process: exit status, output, lines of errors."""
    from piip.integrations import cli
    from piip.integrations.image_demo import image_demo, parse_image_demo

    def run(*arguments):
        capsys.readouterr()
        try:
            status = cli.main(image_demo, parse_image_demo([str(argument) for argument in arguments]))
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err.splitlines()

    return run


def test_folder(checkpoint, tmp_path):
    """The script as it is typed: a folder with two images and one that is none."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    sample = Image.open(SAMPLE)
    sample.save(photos / "a.png")
    sample.resize((150, 100)).save(photos / "a.JPG")
    (photos / "broken.jpg").write_bytes(SAMPLE.read_bytes()[:100])
    (photos / "notes.txt").write_text("no picture")
    command = ["tools/image_demo.py", photos, CONFIG, checkpoint, "--out", out, "--confidence-threshold", "0.05"]
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=MMDETECTION, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"skipped: {photos / 'broken.jpg'} cannot be decoded as an image" in done.stderr.splitlines()
    assert "images that could not be read: 1 of 3" in done.stderr.splitlines()
    assert sorted(path.name for path in out.iterdir()) == ["a.JPG.png", "a.png.png", "detections.json"]
    records = json.loads((out / "detections.json").read_text())
    assert [(Path(r["file"]).name, r["width"], r["height"]) for r in records] == [
        ("a.JPG", 150, 100), ("a.png", 192, 192)
    ]  # fmt: skip
    from pycocotools import mask as rle

    for record in records:
        assert record["detections"]
        scores = [found["score"] for found in record["detections"]]
        assert scores == sorted(scores, reverse=True) and min(scores) >= 0.05
        for found in record["detections"]:
            x0, y0, x1, y1 = found["box"]
            assert 0 <= x0 < x1 <= record["width"] and 0 <= y0 < y1 <= record["height"]
            assert found["label"] in DIGITS
            assert rle.decode(found["mask"]).shape == (record["height"], record["width"])
    assert Image.open(out / "a.JPG.png").size == (750, 500)  # enlarged to be legible


def test_detections_are_those_of_mmdet(checkpoint, tmp_path):
    """On an image that is scaled, and turned by its EXIF data: boxes are in the pixels of the image as it is shown."""
    from piip.integrations.inference import detect, load_detector

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.open(SAMPLE).resize((300, 200)).save(tmp_path / "turned.jpg", exif=exif)
    (found,) = detect(load_detector(CONFIG, checkpoint, "cpu"), [tmp_path / "turned.jpg"], threshold=0.0)
    assert found.image.shape == (300, 200, 3)

    from mmdet.apis import inference_detector, init_detector

    model = init_detector(str(CONFIG), str(checkpoint), device="cpu")
    expected = inference_detector(model, str(tmp_path / "turned.jpg")).pred_instances
    assert len(found) == len(expected) > 0
    np.testing.assert_allclose(found.boxes, expected.bboxes.numpy(), atol=1e-3)
    np.testing.assert_array_equal(found.classes, expected.labels.numpy())
    np.testing.assert_array_equal(found.masks, expected.masks.numpy())


def test_python_call_of_the_readme(checkpoint, tmp_path, monkeypatch):
    readme = (MMDETECTION / "README.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "load_detector" in block)
    assert len([line for line in code.splitlines() if line]) == 5
    monkeypatch.chdir(MMDETECTION)
    for name, path in {"CONFIG": CONFIG, "CHECKPOINT": checkpoint, "picture.png": tmp_path / "picture.png"}.items():
        code = code.replace(name, str(path))
    exec(code, {})
    assert Image.open(tmp_path / "picture.png").size == (768, 768)


def test_pattern_into_a_tree(demo, checkpoint, tmp_path):
    for folder in ("one", "two/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jpg").write_bytes(SAMPLE.read_bytes())
    status, out, _ = demo(f"{tmp_path}/**/a.jpg", CONFIG, checkpoint, "--out", tmp_path / "out", "--device", "cpu")
    assert status == 0 and "images: 2, detections: 0;" in out  # random weights are not confident
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert written == ["detections.json", "one/a.png", "two/deep/a.png"]


def test_nothing_readable(demo, checkpoint, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    status, _, errors = demo(tmp_path / "a.jpg", CONFIG, checkpoint, "--out", tmp_path / "out")
    assert status == 1
    assert errors[-2:] == [
        f"skipped: {tmp_path / 'a.jpg'} cannot be decoded as an image",
        "images that could not be read: 1 of 1",
    ]
    assert not [*(tmp_path / "out").iterdir()]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "CONFIG", "CHECKPOINT"], "error: there is no picture, folder of pictures or match for 'nowhere'"),
        (["EMPTY", "CONFIG", "CHECKPOINT"], "error: there are no pictures in "),
        (["SAMPLE", "nowhere.py", "CHECKPOINT"], "error: there is no config nowhere.py"),
        (["SAMPLE", "CONFIG", "no.pth"], "error: there is no checkpoint at no.pth"),
        (["SAMPLE", "CONFIG", "CHECKPOINT", "--device", "abacus"], "error: there is no device 'abacus': choose cpu"),
        (["SAMPLE", "CONFIG", "CHECKPOINT", "--device", "cuda:99"], "error: device 'cuda:99' is not there: torch sees"),
        (["SAMPLE", "CONFIG", "CHECKPOINT", "--confidence-threshold", "2"], "image_demo.py: error: argument --conf"),
        (
            ["SAMPLE", "CONFIG", "CHECKPOINT", "--cfg-options", "model.roi_head.mask_head.num_convs=1"],
            "error: CHECKPOINT does not fit the model: ",
        ),
        (
            ["SAMPLE", "CONFIG", "NAMELESS", "--cfg-options", "test_dataloader.dataset.metainfo.classes=[a,b]"],
            "error: the model's heads and the data do not match: model.roi_head.bbox_head.num_classes=10, ",
        ),
    ],
)
def test_errors_are_one_line(demo, checkpoint, tmp_path, arguments, said):
    (tmp_path / "empty").mkdir()
    torch.save(torch.load(checkpoint)["state_dict"], tmp_path / "nameless.pth")
    names = {"CONFIG": CONFIG, "CHECKPOINT": checkpoint, "SAMPLE": SAMPLE, "EMPTY": tmp_path / "empty"}
    names["NAMELESS"] = tmp_path / "nameless.pth"
    status, _, errors = demo(*(names.get(word, word) for word in arguments), "--out", tmp_path / "out")
    assert status == 2
    (line,) = [line for line in errors if "error: " in line]
    assert line.startswith(said.replace("CHECKPOINT", str(checkpoint)))
    assert not (tmp_path / "out").exists()


def test_images_are_never_replaced(demo, checkpoint, tmp_path):
    Image.open(SAMPLE).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    status, _, errors = demo(tmp_path / "a.png", CONFIG, checkpoint, "--out", tmp_path)
    assert status == 2 and "would replace the image" in errors[-1]
    assert (tmp_path / "a.png").read_bytes() == before


def test_drawing():
    from piip.integrations.visualize import Detections, draw

    image = np.zeros((60, 80, 3), dtype=np.uint8)
    masks = np.zeros((3, 60, 80), dtype=bool)
    masks[:, 20:40, 30:50] = True
    found = Detections(
        image=image,
        boxes=np.array([[30, 20, 50, 40], [31, 20, 50, 40], [70, 50, 80, 60]], dtype=np.float32),
        scores=np.array([0.6, 0.9, 0.7]),
        classes=np.array([0, 1, 2]),
        names=("cat", "dog", "a name that is wide"),
        masks=masks,
    )
    best = found.one_per_place()
    assert best.scores.tolist() == [0.7, 0.9]  # the best one last, on top; the cat is the dog's place
    picture = draw(found, zoom=2)
    assert picture.shape == (120, 160, 3)
    assert draw(found).shape == (480, 640, 3)
    assert picture[60, 80].any() and not picture[5, 5].any()  # the mask is there, and nothing beside it
    assert (draw(found, zoom=2) == draw(best, zoom=2)).all()
    none = Detections(image, np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=int), ())
    assert not draw(none).any()
    assert none.record() == {"width": 80, "height": 60, "detections": []}


def test_sample_is_small_and_of_the_mini_data(tmp_path):
    assert SAMPLE.stat().st_size < 60_000
    command = [ROOT / "tools" / "make_mini_data.py", "--out", tmp_path, "--train", "1", "--val", "10", "--seed", "5"]
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, timeout=300)
    made, sample = (np.asarray(Image.open(path), dtype=float) for path in (tmp_path / "coco/val/000009.jpg", SAMPLE))
    assert np.abs(made - sample).mean() < 2  # versions of Pillow differ a little


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_gradio_demo_answers_its_client(checkpoint):
    """The script as it is typed, asked over the network as the page in the browser asks it."""
    pytest.importorskip("gradio", reason="needs the demo extra")
    from gradio_client import Client, handle_file

    port = free_port()
    command = ["tools/gradio_demo.py", CONFIG, checkpoint, "--device", "cpu", "--port", port]
    start = [sys.executable, *map(str, command)]
    server = subprocess.Popen(start, cwd=MMDETECTION, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in server.stdout:
            if "Running on" in line:
                break
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        picture, record = client.predict(handle_file(str(SAMPLE)), 0.05, api_name="/predict")
        with Image.open(picture) as shown:
            assert shown.size[0] >= 640 and shown.size[0] == shown.size[1]
        assert (record["width"], record["height"]) == (192, 192)
        assert len(record["detections"]) > 0
        assert all(found["label"] in DIGITS and found["score"] >= 0.05 for found in record["detections"])
        _, record = client.predict(handle_file(str(SAMPLE)), 1.0, api_name="/predict")
        assert record["detections"] == []
        with pytest.raises(Exception, match="Choose an image"):
            client.predict(None, 0.5, api_name="/predict")
        taken = subprocess.run(start, cwd=MMDETECTION, capture_output=True, text=True, timeout=120)
        assert taken.returncode == 2
        assert f"error: --port {port} of 127.0.0.1 cannot be used" in taken.stderr
    finally:
        server.kill()
        server.wait()


def test_page_without_a_threshold_is_any_task_s():
    """What another task gives: a function from an image to a picture and a record."""
    pytest.importorskip("gradio", reason="needs the demo extra")
    from piip.integrations.gradio_demo import image_page

    page = image_page("Negative", lambda image, _: (255 - image, {"mean": float(image.mean())}), threshold=None)
    (endpoint,) = [fn for fn in page.fns.values() if fn.api_name == "predict"]
    assert len(endpoint.inputs) == 1
    picture, record = endpoint.fn(np.full((4, 5, 3), 55, dtype=np.uint8))
    assert (picture == 200).all() and record == {"mean": 55.0}
