"""The original's outputs and gradients on small inputs, through the path a user takes.

Seeded tensors under the released names go through `piip.checkpoint` into our model; outputs and gradients are
compared, the gradients under the released names. Every case file beside this one is run, and those in each directory
of `$PIIP_REFERENCE_DIR` (separated by colons).
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from seeded import seeded_array, seeded_input
from translate import Unsupported, pretrained_branch, translate

from piip.branches.pretrained import convert_vit
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
    "det_4branch",
    "det_single_vit",
    "det_single_internvit6b",
    "seg_2branch",
    "seg_single",
    "det_convnext",
    "det_single_convnext",
    "ckpt_deit",
    "ckpt_internvit",
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
    check = check_pretrained if "checkpoint_tensors" in case else check_model
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
    assert set(converted) == set(case["checked_keys"])
    error = max(relative_error(value, case, stored, name) for name, value in result.items())
    assert error < OUTPUT
    return {"output": error}


def check_model(case: dict, stored: dict) -> dict[str, float]:
    model = translate(case).model.eval()
    shapes = {name: tuple(shape) for name, shape in case["parameters"].items()}
    assert released_shapes(model) == shapes
    model.load_state_dict({name: torch.from_numpy(seeded_array(name, shape)) for name, shape in shapes.items()})

    (given,) = case["input"].values()
    images = torch.from_numpy(seeded_input(given["seed_name"], given["shape"])).requires_grad_()
    outputs = model(images)
    assert len(outputs) == sum(key.startswith("out") for key in stored)
    errors = {"output": 0.0}
    for i, out in enumerate(outputs):
        errors["output"] = max(errors["output"], relative_error(out.detach().numpy(), case, stored, f"out{i}"))
    weights = [torch.from_numpy(seeded_input(f"loss:{case['case']}{i}", out.shape)) for i, out in enumerate(outputs)]
    sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True)).backward()
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
    assert errors["output"] < OUTPUT
    assert errors["input_gradient"] < INPUT_GRADIENT
    assert errors["gradient_norm"] < GRADIENT_NORM
    return errors
