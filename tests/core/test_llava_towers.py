"""LLaVA's rows: released names one to one, budgets; the tower interface."""

import gzip
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from piip.budget import as_run, published
from piip.checkpoint import difference
from piip.errors import SpecError
from piip.zoo.released import ROWS as PUBLISHED

pytest.importorskip("transformers", reason="needs the llava extra")

from piip_llava.projector import build_projector
from piip_llava.released import NameMap
from piip_llava.rows import ROWS
from piip_llava.tower import build_tower, complete_tower, measure, num_tokens

MANIFESTS = Path(__file__).parents[1] / "reference" / "manifests"
PIIP_ROWS = [name for name in ROWS if name.startswith("piip")]
CLIP = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 8, "pos_grid": (3, 3)}
PLAIN = {"type": "plain", "spec": {"branches": [{"arch": "clip_base", "resolution": 32, "options": CLIP}]}}
# The counter that the published figures come from; 13B rows with ConvNeXt repeat the 7B figure in the table.
COMPUTED = {
    "piip-llava_convnext-b_clip-l_1024-336_13B": 731.9892,
    "piip-llava_convnext-l_clip-l_1024-336_13B": 1213.7182,
}


def with_projector(name: str, width: int) -> NameMap:
    row = ROWS[name]
    with torch.device("meta"):
        tower = build_tower(row.tower)
        parts = {"vision_tower": tower, "projector": build_projector(row.projector, tower.dims, width)}
    shapes = {f"{part}.{n}": tuple(t.shape) for part, module in parts.items() for n, t in module.state_dict().items()}
    return NameMap(tower, row.projector, shapes)


@pytest.mark.parametrize("name", PIIP_ROWS)
def test_the_released_key_list_maps_one_to_one(name):
    manifest = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    expected = {key: tuple(shape) for key, shape in manifest["parameters"].items()}
    names = with_projector(name, manifest["llm_hidden_size"])
    read, unread = names.released_shapes(), names.unread_shapes(expected)
    assert not read.keys() & unread.keys()
    assert not difference({key: torch.empty(shape, device="meta") for key, shape in expected.items()}, read | unread)
    assert {ours for ours, _ in names.ours.values()} == names.shapes.keys()


@pytest.mark.parametrize("name", PIIP_ROWS)
def test_budgets_are_those_of_the_table(name):
    row = ROWS[name]
    (figure,) = {r.flops for r in PUBLISHED if r.config and Path(r.config).stem == name}
    computed = published(row.tower["spec"], "llava", model="tower")["total"].macs / 1e9
    if name in COMPUTED:
        assert computed == pytest.approx(COMPUTED[name], rel=3e-3)
        assert figure in (598, 1037)
    else:
        assert computed == pytest.approx(figure, rel=5e-3)


@pytest.mark.parametrize(("name", "tokens"), [("llava-1.5_7B", 576), ("piip-llava_clip-bl_512-256_7B", 1024)])
def test_a_tower_reports_tokens_and_cost(name, tokens):
    cost = measure(ROWS[name].tower)
    assert cost.tokens == tokens
    assert 180e9 < cost.macs < 195e9
    if ROWS[name].tower["type"] == "pyramid":
        assert cost.macs == as_run(ROWS[name].tower["spec"], model="tower")["total"].macs


def test_tokens_and_cost_of_s2_at_equal_tokens():
    plain, s2 = measure(PLAIN), measure({**PLAIN, "type": "s2", "scales": [1, 2]})
    assert plain.tokens == s2.tokens == 16
    assert s2.macs == 5 * plain.macs, "one tile, and four"


@pytest.mark.parametrize("tower", [PLAIN, {**PLAIN, "select_feature": "cls_patch"}, {**PLAIN, "type": "s2"}])
def test_what_a_tower_says_of_itself_is_true(tower):
    built = build_tower(complete_tower(tower)).eval()
    side = built.image_size
    states = built(torch.randn(2, 3, side, side))
    assert [t.grid for t in states] == built.grids()
    assert tuple(t.x.shape[-1] for t in states) == built.dims
    out = build_projector({"type": "mlp"}, built.dims, 8)(states)
    assert out.shape == (2, num_tokens(built), 8)


def test_s2_sees_every_tile_in_its_place():
    tower = build_tower({**PLAIN, "type": "s2"}).eval()
    images = torch.randn(1, 3, 64, 64)
    (joined,) = tower(images)
    small = F.interpolate(images, size=(32, 32), mode="bicubic")
    torch.testing.assert_close(joined.to_map()[:, :16], tower._encode(small).to_map())
    corner = tower._encode(images[..., 32:, :32]).to_map()
    torch.testing.assert_close(joined.to_map()[:, 16:, 2:, :2], F.avg_pool2d(corner, 2))


@pytest.mark.parametrize(
    ("tower", "says"),
    [
        ({**PLAIN, "type": "pyramids"}, "unknown tower type 'pyramids' .did you mean pyramid"),
        ({**PLAIN, "layer": 3}, "tower of type 'plain'.*layer"),
        ({**PLAIN, "select_layer": -5}, "select_layer -5 is no state of a branch with 3 blocks"),
        ({**PLAIN, "select_feature": "all"}, "unknown select_feature 'all'"),
        ({**PLAIN, "type": "s2", "scales": [2]}, "scales are whole numbers, the first is 1"),
        ({"type": "plain", "spec": "clip-bl-512-256"}, "a plain tower has one branch, the spec has 2"),
    ],
)
def test_towers_that_cannot_be_built(tower, says):
    with pytest.raises(SpecError, match=says), torch.device("meta"):
        build_tower(tower)
