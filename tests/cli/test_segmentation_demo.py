"""mmsegmentation's `tools/image_demo.py` and the Python calls behind it, with a mini segmentor of random weights."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg", reason="needs the segmentation extra")

ROOT = Path(__file__).resolve().parents[2]
MMSEGMENTATION = ROOT / "mmsegmentation"
CONFIG = MMSEGMENTATION / "configs" / "piip" / "mini" / "upernet_mini_vit-tsb_192_144_96.py"
SAMPLE = ROOT / "mmdetection" / "demo" / "sample.jpg"
NAMES = ("paper", "nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PALETTE = [(i, 20 * i, 255 - i) for i in range(11)]


@pytest.fixture(scope="module")
def state():
    from mmengine.registry import MODELS, init_default_scope

    from piip.integrations.config import read_config

    cfg = read_config(CONFIG)
    init_default_scope("mmseg")
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)  # else one class is everywhere
    return model.state_dict()


@pytest.fixture(scope="module")
def checkpoint(state, tmp_path_factory):
    """A segmentor without training, of data with names and colours of their own."""
    path = tmp_path_factory.mktemp("segmentor") / "random.pth"
    torch.save({"state_dict": state, "meta": {"dataset_meta": {"classes": NAMES, "palette": PALETTE}}}, path)
    return path


@pytest.fixture
def demo(capsys):
    """A function that runs the command in this process: exit status, output, lines of errors."""
    from piip.integrations import cli
    from piip.integrations.image_demo import image_demo, parse_image_demo

    def run(*arguments):
        capsys.readouterr()
        try:
            args = parse_image_demo([str(argument) for argument in arguments], task="segmentation")
            status = cli.main(image_demo, args)
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err.splitlines()

    return run


def test_folder(demo, checkpoint, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    Image.open(SAMPLE).save(photos / "a.png")
    Image.open(SAMPLE).resize((150, 100)).save(photos / "b.jpg")
    (photos / "broken.jpg").write_bytes(b"no image")
    status, printed, errors = demo(photos, CONFIG, checkpoint, "--out", out, "--device", "cpu")
    assert status == 0 and "images: 2, classes found: " in printed
    assert f"skipped: {photos / 'broken.jpg'} cannot be decoded as an image" in errors
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == [
        "a.png", "b.png", "class_maps/a.png", "class_maps/b.png", "segmentations.json"
    ]  # fmt: skip
    records = json.loads((out / "segmentations.json").read_text())
    assert [(Path(r["file"]).name, r["width"], r["height"]) for r in records] == [
        ("a.png", 192, 192), ("b.jpg", 150, 100)
    ]  # fmt: skip
    for record in records:
        classes = Image.open(out / "class_maps" / f"{Path(record['file']).stem}.png")
        assert classes.size == (record["width"], record["height"]) and classes.mode == "P"
        values, colours = np.asarray(classes), np.asarray(classes.convert("RGB"))
        assert (colours == np.asarray(PALETTE, dtype=np.uint8)[values]).all()
        shares = {found["class"]: found["share"] for found in record["classes"]}
        assert len(shares) > 1 and sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        for number, share in shares.items():
            assert share == pytest.approx((values == number).mean(), abs=1e-6)
        assert [found["label"] for found in record["classes"]] == [NAMES[number] for number in shares]
    overlay = Image.open(out / "b.png")
    assert overlay.height == 500 and overlay.width > 750  # enlarged, with a legend beside it


def test_segmentations_are_those_of_mmseg(checkpoint, tmp_path):
    """On an image that is scaled, and turned by its EXIF data: the map has the pixels of the image as it is shown."""
    from piip.integrations.inference import load_segmentor, segment

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.open(SAMPLE).resize((300, 200)).save(tmp_path / "turned.jpg", exif=exif)
    segmentor = load_segmentor(CONFIG, checkpoint, "cpu")
    assert segmentor.classes == NAMES and [tuple(colour) for colour in segmentor.palette] == PALETTE
    (found,) = segment(segmentor, [tmp_path / "turned.jpg"])
    assert found.image.shape == (300, 200, 3) and found.labels.shape == (300, 200)

    from mmseg.apis import inference_model, init_model

    from piip.integrations.config import read_config

    cfg = read_config(CONFIG)
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    model = init_model(cfg, str(checkpoint), device="cpu")
    expected = inference_model(model, str(tmp_path / "turned.jpg")).pred_sem_seg.data[0].numpy()
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(found.labels, expected)


def test_names_and_colours_of_the_data_where_the_checkpoint_has_none(state, tmp_path):
    from piip.integrations.config import read_config
    from piip.integrations.inference import load_segmentor

    torch.save(state, tmp_path / "nameless.pth")
    segmentor = load_segmentor(CONFIG, tmp_path / "nameless.pth", "cpu")
    meta = read_config(CONFIG).test_dataloader.dataset.metainfo
    assert segmentor.classes == tuple(meta.classes)
    assert segmentor.palette == meta.palette
    plain = {"test_dataloader.dataset.metainfo": {"classes": NAMES}}
    palette = load_segmentor(CONFIG, tmp_path / "nameless.pth", "cpu", plain).palette
    assert len(set(palette)) == 11 and all(0 <= value <= 255 for colour in palette for value in colour)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["CONFIG", "CHECKPOINT", "--confidence-threshold", "0.5"], "error: unrecognized arguments: --confidence-thre"),
        (["DETECTOR", "CHECKPOINT"], "is no segmentor's config: it needs mmseg as its default_scope, "),
        (["CONFIG", "WRONG"], "its palette has 10 colours for 11 classes"),
        (["CONFIG", "OTHER"], "the model's heads and the data do not match: model.decode_head.num_classes=11, "),
    ],
)
def test_errors_are_one_line(demo, state, checkpoint, tmp_path, arguments, said):
    metas = {
        "WRONG": {"classes": NAMES, "palette": PALETTE[:10]},
        "OTHER": {"classes": NAMES[:5], "palette": PALETTE[:5]},
    }
    for name, meta in metas.items():
        torch.save({"state_dict": state, "meta": {"dataset_meta": meta}}, tmp_path / name)
    detector = ROOT / "mmdetection/configs/piip/mini/mask_rcnn_mini_vit-tsb_192_144_96.py"
    names = {"CONFIG": CONFIG, "CHECKPOINT": checkpoint, "DETECTOR": detector}
    names |= {name: tmp_path / name for name in metas}
    status, _, errors = demo(SAMPLE, *(names.get(word, word) for word in arguments), "--out", tmp_path / "out")
    assert status == 2
    (line,) = [line for line in errors if "error: " in line]
    assert said in line


def test_an_image_smaller_than_the_window_is_named_in_one_line(demo, checkpoint, tmp_path):
    Image.open(SAMPLE).resize((400, 100)).save(tmp_path / "wide.png")
    options = ["model.test_cfg.mode=slide", "model.test_cfg.crop_size=[192,192]", "model.test_cfg.stride=[128,128]"]
    status, _, errors = demo(
        tmp_path / "wide.png", CONFIG, checkpoint, "--out", tmp_path / "out", "--cfg-options", *options
    )
    assert status == 2
    assert "has 48 x 192 pixels (height x width) when it reaches the model, less than the slide window" in errors[-1]


def test_python_call_of_the_readme(checkpoint, tmp_path, monkeypatch):
    readme = (MMSEGMENTATION / "README.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "load_segmentor" in block)
    monkeypatch.chdir(MMSEGMENTATION)
    for name, path in {"CONFIG": CONFIG, "CHECKPOINT": checkpoint, "picture.png": tmp_path / "picture.png"}.items():
        code = code.replace(name, str(path))
    exec(code, {})
    assert Image.open(tmp_path / "picture.png").height == 768


def test_page_in_the_browser(checkpoint):
    pytest.importorskip("gradio", reason="needs the demo extra")
    from piip.integrations.gradio_demo import parse_gradio_demo, segmentation_page

    args = parse_gradio_demo([str(CONFIG), str(checkpoint), "--device", "cpu"], task="segmentation")
    (endpoint,) = [fn for fn in segmentation_page(args).fns.values() if fn.api_name == "predict"]
    assert len(endpoint.inputs) == 1  # no threshold
    picture, record = endpoint.fn(np.asarray(Image.open(SAMPLE)))
    assert picture.shape[0] == 768 and picture.shape[1] > 768  # enlarged, with a legend beside it
    assert (record["width"], record["height"]) == (192, 192)
    assert sum(found["share"] for found in record["classes"]) == pytest.approx(1, abs=1e-4)
    assert {found["label"] for found in record["classes"]} <= set(NAMES)


def test_drawing():
    from piip.integrations.visualize import Segmentation, draw_segmentation

    labels = np.zeros((60, 80), dtype=int)
    labels[:, 40:] = 2
    palette = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    found = Segmentation(np.zeros((60, 80, 3), dtype=np.uint8), labels, ("left", "nowhere", "right"), palette)
    picture = draw_segmentation(found, zoom=2)
    assert picture.shape[0] == 120 and picture.shape[1] > 160
    left, right = picture[60, 20], picture[60, 140]
    assert left[0] > 100 and not left[1:].any() and right[2] > 100 and not right[:2].any()
    legend = {tuple(pixel) for pixel in picture[:, 160:].reshape(-1, 3).tolist()}
    assert {(255, 0, 0), (0, 0, 255)} <= legend and (0, 255, 0) not in legend  # the classes that are there
    assert found.record()["classes"] == [
        {"label": "left", "class": 0, "share": 0.5}, {"label": "right", "class": 2, "share": 0.5}
    ]  # fmt: skip
