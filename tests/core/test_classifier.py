"""Classifiers: what the heads read, released files, pretrained branches, and timm's methods."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from piip import Classifier, DensePyramid, create_model, list_models, load_checkpoint
from piip.checkpoint import released_shapes, to_released
from piip.errors import CheckpointError, SpecError

SIZES = ((32, 32), (32, 48), (32, 64))  # (channels, resolution)


def spec(sizes=SIZES, class_token=True, prefix=1, family="deit", **options: Any) -> dict[str, Any]:
    branches = [
        {
            "arch": "vit",
            "resolution": resolution,
            "options": {
                "embed_dim": dim,
                "depth": 2,
                "num_heads": 2,
                "pos_grid": (resolution // 16, resolution // 16),
                "class_token": class_token,
                "pos_prefix": prefix,
                "family": family,
                "layer_scale": 1.0 if family == "deit" else None,
            },
        }
        for dim, resolution in sizes
    ]
    return {"branches": branches, "interactions": 2, "heads": 2, "head": "branches", **options}


def classifier(build=None, **options: Any) -> Classifier:
    return Classifier(spec(**options), **{"num_classes": 10, **(build or {})}).eval()


def open_gates(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(("ca_gamma", "cffn_gamma")):
            nn.init.normal_(parameter)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("readout", ["cls_token", "first_patch", "mean"])
def test_logits_are_the_mean_over_the_branches_heads(readout, images):
    model = classifier({"readout": readout})
    open_gates(model)
    states = model.forward_features(images)
    read = {
        "cls_token": lambda t: t.prefix[:, 0],
        "first_patch": lambda t: t.x[:, 0],
        "mean": lambda t: F.layer_norm(t.x, (32,), eps=1e-6).mean(1),
    }[readout]
    pooled = [read(t) if readout == "mean" else F.layer_norm(read(t), (32,), eps=1e-6) for t in states]
    expected = sum(F.linear(x, h.weight, h.bias) for x, h in zip(pooled, model.head, strict=True)) / 3
    torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(model.forward_head(states, pre_logits=True), torch.cat(pooled, 1))


def test_new_models_read_class_tokens_and_give_them_a_position(images):
    model = classifier()
    assert model.readout == "cls_token"
    branch = model.pyramid.branches[0]
    small = F.interpolate(images, 32, mode="bilinear")
    torch.testing.assert_close(
        branch.embed(small).prefix[0, 0], (branch.cls_token + branch.pos_embed[:, :1])[0, 0], rtol=0, atol=0
    )
    assert classifier(class_token=False, prefix=0).readout == "mean"


@pytest.mark.parametrize("readout", ["cls_token", "first_patch", "mean"])
def test_every_parameter_that_is_trained_gets_a_gradient(readout, images):
    model = classifier({"readout": readout}).train()
    open_gates(model)
    model(images).sum().backward()
    idle = {n for n, p in model.named_parameters() if not p.requires_grad}
    last = {f"pyramid.stages.1.{name}" for name, _ in model.pyramid.stages[-1].named_parameters()}
    assert idle == (last if readout == "cls_token" else set())
    assert {n for n, p in model.named_parameters() if p.grad is None} == idle


@pytest.mark.parametrize(("head", "shape"), [("merged", (2, 10)), ("map", (2, 32, 4, 4))])
def test_merged_head(head, shape, images):
    model = classifier({"head": head})
    assert tuple(model(images).shape) == shape
    assert model.pyramid.stages[-1].units[0].to_low.ca_gamma.requires_grad
    if head == "merged":
        tokens = model.merge(model.forward_features(images)).flatten(2).transpose(1, 2)
        pooled = F.layer_norm(tokens, (32,), eps=1e-6).mean(1)
        torch.testing.assert_close(model(images), F.linear(pooled, model.head.weight, model.head.bias))


@pytest.mark.parametrize(("count", "family"), [(1, "deit"), (2, "vit"), (4, "deit"), (5, "vit")])
def test_any_number_of_branches_and_classes(count, family):
    sizes = [(32, 32 + 16 * i) for i in range(count)]
    model = classifier({"num_classes": 7}, sizes=sizes, family=family)
    assert model(torch.randn(2, 3, sizes[-1][1], sizes[-1][1])).shape == (2, 7)


@pytest.mark.parametrize("family", ["deit", "vit"])
@pytest.mark.parametrize("head", ["branches", "merged"])
def test_a_released_file_switches_to_its_form(family, head, images, tmp_path, caplog):
    released = classifier({"head": head}, family=family)
    released.use_released_form()
    open_gates(released)
    torch.save({"model": to_released(released)}, tmp_path / "released.pth")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model = create_model(spec(family=family), num_classes=10, head=head, checkpoint=tmp_path / "released.pth")
    assert "released classifier" in caplog.text
    assert ("first patch token" in caplog.text) == (head == "branches")
    torch.testing.assert_close(model.eval()(images), released(images), rtol=0, atol=0)
    assert model.pyramid.branches[0].pos_embed.shape[1] == (4 if family == "deit" else 5)
    assert all(p.requires_grad for p in model.parameters())
    # The class token's own row is not read any more.
    if family == "vit":
        with torch.no_grad():
            model.pyramid.branches[0].pos_embed[:, 0] += 1
        torch.testing.assert_close(model(images), released(images), rtol=0, atol=0)


def test_our_own_file_keeps_the_class_tokens(images, tmp_path, caplog):
    model = classifier()
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    again = create_model(spec(), num_classes=10, checkpoint=tmp_path / "ours.pth").eval()
    assert again.readout == "cls_token"
    assert not caplog.text
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="first patch token"):
        to_released(model)


def test_another_number_of_classes_needs_the_head_to_be_dropped(images, tmp_path):
    released = classifier()
    released.use_released_form()
    for name, state in (("released", to_released(released)), ("ours", classifier().state_dict())):
        torch.save(state, tmp_path / f"{name}.pth")
        with pytest.raises(CheckpointError, match=r"head has 10 classes, the model's 3: .*--drop-head"):
            create_model(spec(), num_classes=3, checkpoint=tmp_path / f"{name}.pth")
        model = create_model(spec(), num_classes=3, checkpoint=tmp_path / f"{name}.pth", drop_head=True)
        assert model(images).shape == (2, 3)
        assert torch.isfinite(model.head[0].weight).all()
        assert 0 < model.head[0].weight.std() < 0.03
    load_checkpoint(released, tmp_path / "released.pth", drop_head=True)


def test_pretrained_branches_bring_their_heads(tmp_path, caplog):
    deit = classifier(sizes=((32, 64),))
    state = {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t
             for n, t in deit.pyramid.branches[0].state_dict().items()}  # fmt: skip
    state |= {"norm.weight": torch.full((32,), 2.0), "norm.bias": torch.ones(32)}
    state |= {"head.weight": torch.randn(10, 32), "head.bias": torch.randn(10)}
    torch.save({"model": state}, tmp_path / "deit.pth")
    description = spec(sizes=((32, 32), (32, 64)))
    for branch in description["branches"]:
        branch["weights"] = "deit.pth"
    model = Classifier(description, num_classes=10)
    model.load_pretrained(tmp_path)
    assert torch.equal(model.head[1].weight, state["head.weight"])
    assert torch.equal(model.norm[0].weight, state["norm.weight"])
    # The class token's row is kept, the others are resized from 4 x 4 to 2 x 2.
    small = model.pyramid.branches[0].pos_embed
    assert torch.equal(small[:, 0], state["pos_embed"][:, 0])
    grid = state["pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(small[:, 1:].transpose(1, 2), F.interpolate(grid, (2, 2), mode="bicubic").flatten(2))
    assert not caplog.text
    other = Classifier(description, num_classes=4)
    other.load_pretrained(tmp_path)
    assert "branch 1 starts with a new head" in caplog.text
    assert torch.equal(other.norm[1].weight, state["norm.weight"])
    with pytest.raises(CheckpointError, match=r"pretrained weights not found: .*deit.pth"):
        other.load_pretrained(tmp_path / "elsewhere")


def test_augreg_files_need_all_three_projections(tmp_path):
    np.savez(
        tmp_path / "S_16.npz",
        **{"embedding/kernel": np.zeros((16, 16, 3, 32), np.float32),
           "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/bias": np.zeros((2, 16), np.float32)},
    )  # fmt: skip
    description = spec(sizes=((32, 64),), family="vit")
    description["branches"][0]["weights"] = "S_16.npz"
    with pytest.raises(CheckpointError, match="made of query, key and value; the file has query"):
        Classifier(description).load_pretrained(tmp_path)


def test_rows_and_dispatch():
    rows = [name for name in list_models() if name.startswith("cls-")]
    assert len(rows) == 4
    with torch.device("meta"):
        model = create_model("cls-augreg-sbl-384-192-128", num_classes=10)
        assert isinstance(model, Classifier)
        assert [h.out_features for h in model.head] == [10] * 3
        assert isinstance(create_model("deit3-tsb-1120-896-448"), DensePyramid)
        dense = create_model("deit3-tsb-1120-896-448", num_classes=5)
        assert isinstance(dense, Classifier)
        assert dense.head_style == "merged"


def test_intermediates(images):
    model = classifier()
    open_gates(model)
    final, maps = model.forward_intermediates(images)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 4)] * 2
    torch.testing.assert_close(maps[-1], final[-1].to_map())
    (first,) = model.forward_intermediates(images, [0], branch=0, intermediates_only=True, stop_early=True)
    assert first.shape == (2, 32, 2, 2)
    torch.testing.assert_close(model.forward_intermediates(images, 1, intermediates_only=True)[0], maps[1])
    normed = model.forward_intermediates(images, [1], norm=True, output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(normed, model.norm[2](final[2].x))
    with pytest.raises(IndexError):
        model.forward_intermediates(images, [2])
    with pytest.raises(ValueError, match="norm=True needs a norm per branch"):
        classifier({"head": "merged"}).forward_intermediates(images, norm=True)


def test_stopping_early_runs_no_further_stage(images):
    model = classifier()
    model.pyramid.branches[0].blocks[1].register_forward_hook(lambda *_: pytest.fail("a block behind the last stage"))
    model.forward_intermediates(images, [0], intermediates_only=True, stop_early=True)


def test_resetting_the_head(images):
    model = classifier()
    model.reset_classifier(4, "mean")
    assert model(images).shape == (2, 4)
    assert model.pyramid.stages[-1].units[0].to_low.ca_gamma.requires_grad
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features) == (2, 96)
    assert model.readout == "mean"
    merged = classifier({"head": "merged"})
    merged.reset_classifier(0)
    assert merged(images).shape == (2, 32)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        ({"readout": "last"}, {}, r"unknown readout 'last'.*cls_token, first_patch, mean"),
        ({"head": "averaged"}, {}, r"unknown head 'averaged'.*branches, merged, map"),
        ({"readout": "cls_token"}, {"class_token": False}, "branch 1 has no class token to read: give it one"),
        ({"head": "merged"}, {"sizes": ((32, 64),)}, "one branch has nothing to merge"),
        ({"head": "merged", "readout": "mean"}, {}, "head='merged' has none"),
        ({"num_classes": -1}, {}, "num_classes is -1"),
    ],
)
def test_classifiers_that_cannot_be_built(build, options, message):
    with pytest.raises(SpecError, match=message):
        classifier(build, **options)


def test_a_file_of_another_model_is_refused():
    model = classifier()
    with pytest.raises(CheckpointError, match="holds 2 branch"):
        other = classifier(sizes=SIZES[:2])
        other.use_released_form()
        model.load_state_dict(to_released(other))
    assert "branch3.head.weight" in released_shapes(model)
