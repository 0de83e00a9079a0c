"""The original's outputs and gradients on small inputs, through the path a user takes.

Seeded tensors under the released names go through `piip.checkpoint` into our model; outputs and gradients are
compared, the gradients under the released names. Every case file beside this one is run, and those in each directory
of `$PIIP_REFERENCE_DIR` (separated by colons).
"""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from seeded import seeded_array, seeded_input
from translate import DINO, Unsupported, dino, pretrained_branch, translate

from piip import Classifier
from piip.branches.pretrained import convert_vit, read_pretrained
from piip.checkpoint import released_shapes, to_released

# Relative L2; the floor of gradient norms is relative to the largest norm.
OUTPUT, INPUT_GRADIENT, GRADIENT_NORM, FLOOR = 1e-5, 1e-4, 1e-3, 1e-6
# What the project supports so far: a case with one of these prefixes may not be reported as unsupported.
SUPPORTED = (
    "det_2branch",
    "det_3branch_deit",
    "det_3branch_noproj",
    "det_3branch_dino",
    "det_3branch_augreg",
    "det_3branch_mae",
    "det_3branch_dinov2",
    "det_3branch_beit",
    "det_3branch_uniperceiver",
    "det_4branch",
    "det_single_vit",
    "det_single_internvit6b",
    "det_single_beit",
    "seg_2branch",
    "seg_single",
    "det_convnext",
    "det_dino_head",
    "det_single_convnext",
    "ckpt_beit",
    "ckpt_deit",
    "ckpt_internvit",
    "cls_",
    "llava_",
)


def find_cases() -> list[Path]:
    extra = [Path(p) for p in os.environ.get("PIIP_REFERENCE_DIR", "").split(":") if p]
    files = [f for d in (Path(__file__).parent / "cases", *extra) for f in sorted(d.glob("*.json"))]
    return list({f.stem: f for f in files if f.with_suffix(".npz").is_file()}.values())


def relative_error(actual: np.ndarray, case: dict, stored: dict, key: str) -> float:
    """Compare with a stored entry (every stride-th element, and the full norm)."""
    about = case["arrays"][key]
    assert list(actual.shape) == about["shape"], f"{key}: shape {actual.shape}, expected {about['shape']}"
    expected = stored[key].astype(np.float64).ravel()
    actual = actual.astype(np.float64).ravel()
    error = np.linalg.norm(actual[:: about["stride"]] - expected) / max(np.linalg.norm(expected), 1e-30)
    if "norm" in about:
        error = max(error, abs(np.linalg.norm(actual) - about["norm"]) / max(about["norm"], 1e-30))
    return float(error)


@pytest.mark.parametrize("path", find_cases(), ids=lambda path: path.stem)
def test_case(path: Path, record_property) -> None:
    case = json.loads(path.read_text())
    stored = dict(np.load(path.with_suffix(".npz")))
    if "checkpoint_tensors" in case:
        check = check_pretrained
    elif "checkpoint" in case:
        check = check_pretrained_classifier
    elif path.stem.startswith("cls_augreg_npz"):
        check = check_augreg_npz
    elif path.stem.startswith("llava_"):
        pytest.importorskip("transformers", reason="needs the llava extra")
        from cases_llava import check_llava as check
    else:
        check = check_dino if case.get("class") == DINO else check_model
    try:
        errors = check(case, stored)
    except Unsupported as reason:
        record_property("reference_unsupported", str(reason))
        assert not path.stem.startswith(SUPPORTED), f"supported so far, and now not: {reason}"
        pytest.skip(f"unsupported: {reason}")
    for name, error in errors.items():
        record_property(f"reference_{name}", float(error))
    record_property("reference_case", path.stem)


def check_pretrained(case: dict, stored: dict) -> dict[str, float]:
    branch = pretrained_branch(case)
    state = {
        name: torch.from_numpy(seeded_array(f"{case['case']}:{name}", shape))
        for name, shape in case["checkpoint_tensors"].items()
    }
    converted = convert_vit(state, branch)
    branch.load_state_dict({**branch.state_dict(), **converted})
    result = {name: branch.state_dict()[name].numpy() for name in case["checked_keys"]}
    assert {name: list(value.shape) for name, value in result.items()} == case["result_shapes"]
    for name in set(converted) - set(case["checked_keys"]):
        assert torch.equal(converted[name], state[name]), name
    error = max(relative_error(value, case, stored, name) for name, value in result.items())
    assert error < OUTPUT
    return {"output": error}


def check_pretrained_classifier(case: dict, stored: dict) -> dict[str, float]:
    """A single classifier starts from a pretrained file, its head included."""
    model = translate(case).model.eval()
    state = {name: torch.from_numpy(seeded_array(name, shape)) for name, shape in case["checkpoint"]["keys"].items()}
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": state} if "'model'" in case["checkpoint"]["layout"] else state, f"{folder}/weights.pth")
        model.spec = replace(model.spec, branches=(replace(model.spec.branches[0], weights="weights.pth"),))
        model.load_pretrained(folder)
    released = to_released(model)
    results = {f"state:{name}": tensor.numpy() for name, tensor in released.items()}
    changed = {key.removeprefix("state:") for key in case["outputs"]}
    for name in state.keys() & released.keys() - changed:
        assert torch.equal(released[name], state[name]), name
    if "out0" in case["outputs"]:
        images = torch.from_numpy(seeded_input(case["input"]["x"]["seed_name"], case["input"]["x"]["shape"]))
        with torch.no_grad():
            results["out0"] = model(images).numpy()
    error = max(relative_error(results[key], case, stored, key) for key in case["outputs"])
    assert error < OUTPUT
    return {"output": error}


def check_augreg_npz(case: dict, stored: dict) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/L_16.npz", **{name: seeded_array(name, shape) for name, shape in case["source"].items()})
        converted = read_pretrained(f"{folder}/L_16.npz")
    assert {name: list(tensor.shape) for name, tensor in converted.items()} == case["outputs"]
    error = max(relative_error(tensor.numpy(), case, stored, name) for name, tensor in converted.items())
    assert error < OUTPUT
    return {"output": error}


def check_model(case: dict, stored: dict) -> dict[str, float]:
    model = translate(case).model.eval()
    shapes = {name: tuple(shape) for name, shape in case["parameters"].items()}
    buffers = {name: tuple(shape) for name, (shape, *_) in case.get("buffers", {}).items()}
    assert released_shapes(model) == shapes | buffers
    built = to_released(model)
    state = {name: torch.from_numpy(seeded_array(name, shape)) for name, shape in shapes.items()}
    model.load_state_dict(state | {name: built[name] for name in buffers})

    (given,) = case["input"].values()
    images = torch.from_numpy(seeded_input(given["seed_name"], given["shape"])).requires_grad_()
    if isinstance(model, Classifier):
        states = model.forward_features(images)
        outputs = [model.forward_head(states)]
    else:
        states, outputs = [], model(images)
    assert len(outputs) == sum(key.startswith("out") for key in stored)
    results = {f"out{i}": out for i, out in enumerate(outputs)}
    for i, tokens in enumerate(states):
        for part, tensor in ((f"branch{i + 1}", tokens.x), (f"cls{i + 1}", tokens.prefix)):
            key = f"interaction{model.pyramid.depth - 1}_{part}"
            if key in case.get("intermediate", {}):
                results[key] = tensor
    errors = {"output": max(relative_error(r.detach().numpy(), case, stored, key) for key, r in results.items())}
    assert errors["output"] < OUTPUT
    if "grad_norms" not in stored:
        return errors
    weights = [torch.from_numpy(seeded_input(f"loss:{case['case']}{i}", out.shape)) for i, out in enumerate(outputs)]
    sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True)).backward()
    if "input_grad" in stored:
        errors["input_gradient"] = relative_error(images.grad.numpy(), case, stored, "input_grad")

    gradients = to_released(model, {name: p.grad for name, p in model.named_parameters()})
    expected = dict(zip(case["grad_names"], stored["grad_norms"], strict=True))
    without = set(case["params_without_grad"])
    assert {name for name, g in gradients.items() if g is None} <= without
    floor = FLOOR * np.nanmax(stored["grad_norms"])
    errors["gradient_norm"] = max(
        abs(float(gradients[name].double().norm()) - norm) / max(norm, floor)
        for name, norm in expected.items()
        if name not in without
    )
    assert set(gradients) == set(expected) - without
    assert errors.get("input_gradient", 0.0) < INPUT_GRADIENT
    assert errors["gradient_norm"] < GRADIENT_NORM
    return errors


def check_dino(case: dict, stored: dict) -> dict[str, float]:
    """Neck, transformer and head: their outputs, detections and losses; gradients of the feature maps."""
    pytest.importorskip("mmdet", reason="needs the detection extra")
    import piip.integrations.mmdet_dino as integration

    # isort: split
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    model = dino(case)
    shapes = {name: tuple(shape) for name, shape in case["parameters"].items()}
    assert integration.released_shapes(model) == shapes
    model.load_state_dict({name: torch.from_numpy(seeded_array(name, shape)) for name, shape in shapes.items()})
    assert set(integration.to_released(model)) == set(shapes)

    maps = [
        torch.from_numpy(seeded_input(f"{case['case']}:feat{i}d", shape)).requires_grad_()
        for i, shape in enumerate(case["input_shapes"])
    ]
    metas = [
        {**meta, "img_shape": meta["img_shape"][:2], "scale_factor": meta["scale_factor"][:2]}
        for meta in case["img_metas"]
    ]
    objects = [
        InstanceData(bboxes=torch.tensor(boxes), labels=torch.tensor(labels))
        for boxes, labels in zip(case["gt_bboxes_xyxy_pixels"], case["gt_labels"], strict=True)
    ]
    # Trained on images without objects, DINO adds no denoising queries, and hands out the encoder's proposals.
    empty = [
        DetDataSample(metainfo=meta, gt_instances=instances[:0]) for meta, instances in zip(metas, objects, strict=True)
    ]
    model.train()
    levels = model.neck(maps)
    inner = model.forward_transformer(levels, empty)
    scores, boxes = model.bbox_head(inner["hidden_states"], inner["references"])
    outputs = {f"neck{i}": level for i, level in enumerate(levels)}
    outputs |= {"topk_score": inner["enc_outputs_class"], "topk_anchor": inner["enc_outputs_coord"]}
    outputs |= {"all_cls_scores": scores, "all_bbox_preds": boxes}
    errors = {name: relative_error(out.detach().numpy(), case, stored, name) for name, out in outputs.items()}

    order = [outputs[name] for name in ("all_cls_scores", "all_bbox_preds", "topk_score", "topk_anchor")]
    weights = [torch.from_numpy(seeded_input(f"loss:{case['case']}{i}", out.shape)) for i, out in enumerate(order)]
    loss = sum((out * weight).sum() for out, weight in zip(order, weights, strict=True))
    assert loss.item() == pytest.approx(case["loss"], rel=1e-4)
    loss.backward()
    gradient = max(relative_error(m.grad.numpy(), case, stored, f"feat{i}_grad") for i, m in enumerate(maps))
    assert {name for name, p in model.named_parameters() if p.grad is None} <= {
        "dn_query_generator.label_embedding.weight"
    }

    predictions = {"enc": order[2:], "dec0": (scores[0], boxes[0]), "dec1": (scores[1], boxes[1])}
    for stage, prediction in predictions.items():
        losses = model.bbox_head.loss_by_feat_single(*prediction, batch_gt_instances=objects, batch_img_metas=metas)
        wanted = [case["matching_losses"][stage][name] for name in ("loss_cls", "loss_bbox", "loss_iou")]
        assert [value.item() for value in losses] == pytest.approx(wanted, rel=1e-5), stage
    for rescale in (0, 1):
        found = model.bbox_head.predict_by_feat(scores, boxes, batch_img_metas=metas, rescale=bool(rescale))
        for i, instances in enumerate(found):
            detections = torch.cat([instances.bboxes, instances.scores[:, None]], 1).detach().numpy()
            name = f"det{i}_boxes_rescale{rescale}"
            errors[name] = relative_error(detections, case, stored, name)
            assert instances.labels.tolist() == stored[f"det{i}_labels_rescale{rescale}"].tolist()
    assert max(errors.values()) < OUTPUT
    assert gradient < INPUT_GRADIENT
    return {"output": max(errors.values()), "input_gradient": gradient}
