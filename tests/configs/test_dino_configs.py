"""DINO: released detector files fit the configs by name and shape, load, and say clearly when they do not.

What DINO's configs have in common with the others is tested with them, in `test_detection_configs.py`.
"""

import gzip
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="needs the detection extra")

from piip.integrations.mmdet_dino import PIIPDINO, PIIPDINOHead, released_names, released_shapes, to_released
from piip.integrations.precision import bfloat16_backbone

# isort: split
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict

from piip import load_checkpoint
from piip.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {path.stem: path for path in (ROOT / "mmdetection/configs/piip").glob("*/dino_*.py")}
MINI = "dino_mini_vit-tsb_192_144_96"
FULL = {path.name.removesuffix(".json.gz"): path for path in (ROOT / "tests/reference/full_manifests").glob("dino_*")}
CASE = json.loads((ROOT / "tests/reference/cases/det_dino_head.json").read_text())


def build(name: str, device: str = "meta", **options) -> PIIPDINO:
    config = Config.fromfile(CONFIGS[name])
    config.merge_from_dict(options)
    init_default_scope("mmdet")
    with torch.device(device):
        return MODELS.build(config.model)


@pytest.mark.parametrize("name", FULL)
def test_a_released_file_maps_one_to_one(name):
    expected = json.loads(gzip.decompress(FULL[name].read_bytes()))["state_dict"]
    expected = {name: tuple(shape) for name, shape in expected.items()}
    model = build(name)
    assert released_shapes(model) == expected
    names = released_names(model)
    assert set(names) == set(model.state_dict())
    assert len(set(names.values())) == len(names)
    assert {name: tuple(tensor.shape) for name, tensor in to_released(model).items()} == expected
    # Loading is strict, and costs nothing on the meta device.
    model.load_state_dict({name: torch.empty(shape, device="meta") for name, shape in expected.items()}, assign=True)


def test_two_full_lists_are_compared():
    assert len(FULL) == 2


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != MINI])
def test_head_is_that_of_the_original(name):
    """The reference case holds the original's head settings, at other sizes."""
    model, head = Config.fromfile(CONFIGS[name]).model, CASE["kwargs"]["bbox_head"]
    assert {"type": "SinePositionalEncoding", **model.positional_encoding, "num_feats": 16} == head[
        "positional_encoding"
    ]
    for loss in ("loss_cls", "loss_bbox", "loss_iou"):
        assert model.bbox_head[loss] == head[loss]
    assert model.bbox_head.sync_cls_avg_factor is head["sync_cls_avg_factor"]
    noise, group = head["dn_cfg"]["noise_scale"], model.dn_cfg.group_cfg
    assert (model.dn_cfg.label_noise_scale, model.dn_cfg.box_noise_scale) == (noise["label"], noise["box"])
    assert group.dynamic is head["dn_cfg"]["group_cfg"]["dynamic"]
    assigner = CASE["kwargs"]["train_cfg"]["assigner"]
    costs = [assigner[cost] for cost in ("cls_cost", "reg_cost", "iou_cost")]
    assert model.train_cfg.assigner == {"type": assigner["type"], "match_costs": costs}


def test_clipping_is_off_and_its_option_turns_it_on():
    (name,) = [name for name in CONFIGS if "deit_384" in name]
    config = Config.fromfile(CONFIGS[name])
    assert "clip_grad" not in config.optim_wrapper
    config.merge_from_dict({"optim_wrapper.clip_grad.max_norm": 0.1})
    assert config.optim_wrapper.clip_grad == {"max_norm": 0.1}


@pytest.fixture(scope="module")
def source() -> PIIPDINO:
    """A small detector whose tensors all differ."""
    model = build(MINI, "cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    other_state = other.state_dict()
    return all(torch.equal(tensor, other_state[name]) for name, tensor in one.state_dict().items())


def test_either_form_of_a_file_loads(source, tmp_path):
    for form, state in (("released", to_released(source)), ("ours", source.state_dict())):
        torch.save({"state_dict": state}, tmp_path / f"{form}.pth")
        model = build(MINI, "cpu")
        assert not equal(source, model)
        load_checkpoint(model, tmp_path / f"{form}.pth")
        assert equal(source, model), form
    released = to_released(source)
    assert "bbox_head.transformer.decoder.ref_point_head.2.weight" in released
    assert "backbone.interactions.0.interaction_units_12.branch2to1_injector.ca_gamma" in released


def without_one(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.endswith("transformer.enc_output.bias")}


def of_mask_rcnn(state: dict) -> dict:
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("bbox_head.")}
    return {**kept, "roi_head.mask_head.convs.0.conv.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_one, "DINO detector: 1 missing tensors (memory_trans_fc.bias)"),
        (of_mask_rcnn, "DINO detector: it holds roi_head, so it is of another detector; "),
        (lambda s: {**s, "neck.convs.9.weight": torch.zeros(1)}, "1 unexpected tensors (neck.convs.9.weight)"),
        (
            lambda s: {**s, "bbox_head.transformer.query_embed.weight": torch.zeros(900, 64)},
            "query_embedding.weight is (900, 64), expected (50, 64)",
        ),
        (lambda s: {n: t for n, t in s.items() if "branch3" not in n}, "the file holds 2 branch(es), the spec 3"),
    ],
    ids=["without_one", "mask_rcnn", "one_more", "queries", "branches"],
)
def test_a_file_that_does_not_fit_is_refused_by_every_loader(source, change, message):
    state = change(to_released(source))
    model = build(MINI, "cpu")
    for load in (model.load_state_dict, lambda s: load_state_dict(model, s, strict=False)):
        with pytest.raises(CheckpointError) as error:
            load(dict(state))
        assert message in str(error.value)


def test_a_file_for_other_classes_starts_training_on_new_ones(source, tmp_path):
    """The rows of the classes stay as they are, all else is loaded; a strict caller is told."""
    model = build(MINI, "cpu", **{"model.bbox_head.num_classes": 3})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_state_dict(model, to_released(source), strict=False)
    loaded = source.state_dict()
    own = {name for name in before if name.startswith(("bbox_head.cls_branches.", "dn_query_generator."))}
    assert len(own) == 2 * 3 + 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in own else loaded[name]), name
    torch.save(to_released(source), tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"cls_branches\.0\.weight.*shape torch\.Size\(\[10, 64\]\)"):
        load_checkpoint(model, tmp_path / "file.pth")


def test_boxes_keep_the_originals_distance_from_the_borders():
    head = PIIPDINOHead(num_classes=1, embed_dims=4, num_pred_layer=1, loss_cls=CASE["kwargs"]["bbox_head"]["loss_cls"])
    torch.nn.init.zeros_(head.reg_branches[0][-1].weight)
    torch.nn.init.zeros_(head.reg_branches[0][-1].bias)
    _, boxes = head(torch.zeros(1, 1, 1, 4), [torch.tensor([[[0.0, 1.0, 0.5, 1e-4]]])])
    assert boxes.flatten().tolist() == pytest.approx([1e-3, 1 - 1e-3, 0.5, 1e-3], rel=2e-3)


def test_neck_and_head_stay_in_float32_beside_a_backbone_in_bfloat16(source):
    source.eval()
    samples = [
        DetDataSample(metainfo={"batch_input_shape": (64, 96), "img_shape": shape}) for shape in ((64, 80), (50, 96))
    ]

    def detect(maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        return source.bbox_head(**source.forward_transformer(maps, samples))

    seen = []
    hook = source.backbone.merge.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    with torch.no_grad(), bfloat16_backbone(source):
        maps = source.extract_feat(torch.rand(2, 3, 64, 96))
        found = detect(maps)
    hook.remove()
    assert seen == [torch.bfloat16]
    assert {level.dtype for level in (*maps, *found)} == {torch.float32}
    with torch.no_grad():
        for one, other in zip(found, detect(maps), strict=True):
            assert torch.equal(one, other)
