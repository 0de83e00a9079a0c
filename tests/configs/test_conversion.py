"""Released names to ours and back, for every list of names and shapes that the original's models gave."""

import gzip
import importlib.util
import json
import resource
from pathlib import Path

import pytest
import torch

from piip.checkpoint import read_state_dict
from piip.errors import CheckpointError
from piip.zoo.convert import convert, convert_file, unread_file, write_state
from piip.zoo.released import row_of

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "reference"


def lists(folder: str) -> list[Path]:
    return sorted((REFERENCE / folder).glob("*.json.gz"))


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = tool("convert_checkpoint")
LH6B = "internvit-lh6b-1536-1024-512"


def row_for(stem: str):
    name, _, form = stem.partition("__")
    if "lh6b" in name:
        options = {"scales": (2, 1, 0.5)} if name.startswith("dino") else {}
        row = row_of(LH6B)
        return type(row)(**{**row.__dict__, "options": options, "head": "DINO" if options else "Mask R-CNN"})
    row = row_of(name)
    return type(row)(**{**row.__dict__, "spec": f"{row.spec}-as-built"}) if form == "as_built" else row


def stand_ins(shapes: dict) -> dict[str, torch.Tensor]:
    """A tensor per name that takes no memory, and that cannot be taken for another one."""
    return {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(shapes.items())}


def round_trip(model, state, rules=()) -> None:
    ours, unread = convert(model, state, "ours", rules=rules)
    assert not {*ours} & {*unread}
    again, _ = convert(model, ours, "released", unread=unread, rules=rules)
    assert {name: (tuple(t.shape), t.flatten()[0].item() if t.numel() else None) for name, t in again.items()} == {
        name: (tuple(t.shape), t.flatten()[0].item() if t.numel() else None) for name, t in state.items()
    }


# One list of every kind is compared each time; the others are slow.
KINDS = {
    "mask_rcnn_deit_tsb_1120_896_448_fpn_1x_coco_bs16",
    "mask_rcnn_deit_tsbl_1344_896_672_448_fpn_1x_coco_bs16__as_built",
    "mask_rcnn_beit_sbl_1568_1120_672_fpn_1x_coco_bs16",
    "mask_rcnn_convnext-tsb_1024_672_448_regular-fpn",
    "piip_3branch_tsb_368-192-128_cls_token_deit1",
    "piip-llava_clip-bl_512-256_7B",
}


def each(paths: list[Path]):
    names = [(path, path.name.removesuffix(".json.gz")) for path in paths]
    return [pytest.param(path, id=name, marks=() if name in KINDS else pytest.mark.slow) for path, name in names]


BACKBONES = [p for p in lists("manifests") if not p.name.startswith("piip-llava")]


@pytest.mark.parametrize("path", each(BACKBONES))
def test_backbones_and_classifiers_there_and_back(path):
    row = row_for(path.name.removesuffix(".json.gz"))
    held = json.loads(gzip.decompress(path.read_bytes()))
    shapes = {**held["parameters"], **{name: shape for name, (shape, *_) in held["buffers"].items()}}
    round_trip(TOOL.build(row), stand_ins(shapes))


@pytest.mark.parametrize("path", each(lists("full_manifests")))
def test_whole_detectors_and_segmentors_there_and_back(path):
    row = row_for(path.name.removesuffix(".json.gz"))
    if row.head == "DINO":
        pytest.importorskip("mmdet", reason="needs the detection extra")
    shapes = json.loads(gzip.decompress(path.read_bytes()))["state_dict"]
    round_trip(TOOL.build(row), stand_ins(shapes), TOOL.rules_of(row))


LLAVA = [path for path in lists("manifests") if path.name.startswith("piip-llava")]


@pytest.mark.parametrize("path", each(LLAVA))
def test_llava_towers_and_projectors_there_and_back(path):
    pytest.importorskip("transformers", reason="needs the llava extra")
    from piip_llava.projector import build_projector
    from piip_llava.released import NameMap
    from piip_llava.rows import ROWS
    from piip_llava.tower import build_tower

    held = json.loads(gzip.decompress(path.read_bytes()))
    row = ROWS[path.name.removesuffix(".json.gz")]
    with torch.device("meta"):
        tower = build_tower(row.tower)
        parts = {
            "vision_tower": tower,
            "projector": build_projector(row.projector, tower.dims, held["llm_hidden_size"]),
        }
    shapes = {f"{part}.{n}": tuple(t.shape) for part, module in parts.items() for n, t in module.state_dict().items()}
    names = NameMap(tower, row.projector, shapes)
    state = stand_ins(held["parameters"])
    unread = names.unread_shapes(state)
    again = names.to_released(names.from_released(state.items()))
    assert {**again, **{name: state[name] for name in unread}}.keys() == state.keys()
    assert all(tuple(again[name].shape) == tuple(state[name].shape) for name in again)
    assert all(again[name].flatten()[0] == state[name].flatten()[0] for name in again)


def test_there_are_as_many_lists_as_the_reference_has():
    assert (len(BACKBONES), len(lists("full_manifests")), len(LLAVA)) == (44, 8, 9)


SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def small_model():
    from piip import DensePyramid

    options = [{**SMALL, "family": "beit", "rel_pos": "window", "pos_grid": None}, {**SMALL, "family": "deit"}]
    branches = [
        {"arch": "vit", "resolution": side, "options": option, "window": 2}
        for side, option in zip((32, 64), options, strict=True)
    ]
    return DensePyramid({"branches": branches, "interactions": 2, "heads": 4})


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_there_and_back(tmp_path, suffix):
    from piip.checkpoint import to_released

    model = small_model()
    released = {f"backbone.{name}": tensor.clone() for name, tensor in to_released(model).items()}
    released["neck.weight"] = torch.randn(3)
    source, ours, again = tmp_path / "a.pth", tmp_path / f"b.{suffix}", tmp_path / f"c.{suffix}"
    torch.save({"state_dict": released, "meta": {}}, source)
    count, unread = convert_file(model, source, ours, "ours")
    assert (count, unread) == (len(model.state_dict()) + 1, 2)  # two tables of indices
    assert set(read_state_dict(ours)) == {f"backbone.{name}" for name in model.state_dict()} | {"neck.weight"}
    assert unread_file(ours).is_file()
    convert_file(model, ours, again, "released")
    result = read_state_dict(again)
    assert all(torch.equal(result[name], tensor) for name, tensor in released.items())
    assert set(result) == set(released)
    unread_file(ours).unlink()  # index tables follow from the windows
    convert_file(model, ours, tmp_path / f"d.{suffix}", "released")
    assert set(read_state_dict(tmp_path / f"d.{suffix}")) == set(released)
    assert not list(tmp_path.glob("*.part"))


def test_half_a_file_and_another_model(tmp_path):
    from piip.checkpoint import to_released

    model = small_model()
    whole = to_released(model)
    torch.save({name: tensor for name, tensor in whole.items() if "interactions.1" not in name}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"part\.pth: .*the file holds 1 interactions, the spec 2"):
        convert_file(model, tmp_path / "part.pth", tmp_path / "out.pth", "ours")
    torch.save(whole, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.pth is truncated or not a checkpoint"):
        convert_file(model, tmp_path / "cut.pth", tmp_path / "out.pth", "ours")
    with pytest.raises(CheckpointError, match="missing"):
        convert_file(model, tmp_path / "whole.pth", tmp_path / "out.pth", "released")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("suffix", "says"), [("pth", "is the disk full"), ("safetensors", r"I/O error: File too large")]
)
def test_a_full_disk_leaves_nothing_behind(tmp_path, suffix, says):
    """A limit on the size of files in place of a full disk: what the writers say of it is their own."""
    state, (soft, hard) = {"a": torch.zeros(1 << 20)}, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(CheckpointError, match=rf"^cannot write .*out\.{suffix}: .*{says}.*$"):
            write_state(state, tmp_path / f"out.{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_and_what_a_kill_left(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"^cannot write .*a\.pth: "):
        write_state({"a": torch.zeros(3)}, tmp_path / "file" / "a.pth")
    (tmp_path / "a.pth.part").mkdir()
    write_state({"a": torch.zeros(3)}, tmp_path / "a.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "file"]


@pytest.mark.parametrize("model", ["deit3-b-1024", "clip-bl-512-256"])
def test_the_tool_writes_no_directory_over_a_file(tmp_path, model, capsys):
    (tmp_path / "there").touch()
    with pytest.raises(SystemExit):
        TOOL.main(["x.pth", str(tmp_path / "there"), "--model", model, "--to", "hub"])
    assert "there is a file, and --to hub writes a directory: choose another name" in capsys.readouterr().err


def test_the_tool_asks_before_it_calls_a_classifier_released(tmp_path, capsys):
    with pytest.raises(SystemExit):
        TOOL.main(["x.pth", str(tmp_path / "y.pth"), "--model", "cls-deit1-tsb-368-192-128", "--to", "released"])
    assert "--first-patch" in capsys.readouterr().err
