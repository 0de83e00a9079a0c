"""What `create_model` makes of every row of the zoo."""

import pytest
import torch

import piip
from piip import Classifier, DensePyramid, create_model
from piip.errors import SpecError
from piip.zoo.released import PUBLISHED, TABLES
from piip.zoo.specs import SPECS

TOWERS = {name for name in SPECS if name in PUBLISHED and TABLES[PUBLISHED[name].table].model == "tower"}
# Rows of every kind are built each time; the others, which differ in their branches, are slow.
KINDS = TOWERS | {
    "deit3-b-1024",
    "deit3-384-sbl-1792-1120-672",
    "internvit-6b-1024",
    "convnext-b-1024",
    "ct-vs-vb-1024-672-448",
    "cls-deit1-tsb-368-192-128",
    "deit3-tsbl-1344-896-672-448-as-built",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in piip.list_models()]
)
def test_every_row_becomes_what_it_is_meant_for(name):
    if name in TOWERS:
        with pytest.raises(SpecError, match=rf"^{name} is a vision tower of LLaVA: piip_llava\.tower\.build_tower\("):
            create_model(name)
        return
    with torch.device("meta"):
        model = create_model(name)
    assert type(model) is (DensePyramid if SPECS[name].head == "dense" else Classifier)
    assert model.spec == SPECS[name]
    row = PUBLISHED.get(name)
    given = row.options if row else {}
    if isinstance(model, DensePyramid):
        assert model.taps == list(given.get("taps", ()))
        assert model.scales == (() if "taps" in given else given.get("scales", (4, 2, 1, 0.5)))


@pytest.mark.parametrize(("options", "kind"), [({"num_classes": 5}, Classifier), ({"scales": (2, 1)}, DensePyramid)])
def test_a_tower_s_row_becomes_what_is_asked_for(options, kind):
    with torch.device("meta"):
        assert type(create_model("clip-l-336", **options)) is kind


def test_the_error_of_a_tower_gives_what_builds_it():
    pytest.importorskip("transformers", reason="needs the llava extra")
    from piip_llava.tower import build_tower

    for name in ("clip-l-336", "clip-bl-512-256"):
        with pytest.raises(SpecError) as error:
            create_model(name)
        options = str(error.value).partition("build_tower(")[2].partition(")")[0]
        with torch.device("meta"):
            assert build_tower(eval(options)).spec == SPECS[name]
