"""Every published classification row, held against the original's parameter lists."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from piip import Classifier, create_model
from piip.checkpoint import released_shapes

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
ROWS = {
    "piip_3branch_tsb_368-192-128_cls_token_deit1": "cls-deit1-tsb-368-192-128",
    "piip_3branch_sbl_320-160-96_cls_token_augreg": "cls-augreg-sbl-320-160-96",
    "piip_3branch_sbl_384-192-128_cls_token_augreg": "cls-augreg-sbl-384-192-128",
}


@pytest.mark.parametrize(("config", "row"), ROWS.items())
def test_released_names_map_one_to_one(config, row):
    manifest = json.loads(gzip.decompress((REFERENCE / "manifests" / f"{config}.json.gz").read_bytes()))
    with torch.device("meta"):
        model = create_model(row)
    assert isinstance(model, Classifier)
    assert model.readout == "cls_token"
    assert model.pretrained_cfg["input_size"] == (3, manifest["input_size"], manifest["input_size"])
    model.use_released_form()
    assert released_shapes(model) == {name: tuple(shape) for name, shape in manifest["parameters"].items()}
    assert sum(p.numel() for p in model.parameters()) == manifest["num_params"]
