"""Checkpoints: released names both ways, strict loading that explains itself, and files that run no code."""

import argparse
import copy
import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from piip import DensePyramid, create_model, load_checkpoint
from piip.branches import create_branch
from piip.branches.pretrained import load_pretrained
from piip.checkpoint import (
    from_released,
    read_file,
    read_state_dict,
    released_names,
    released_shapes,
    rename,
    to_released,
    unread_shapes,
)
from piip.errors import CheckpointError

DIMS = (32, 16, 16, 8)
VIT = {"depth": 2, "num_heads": 2, "patch_size": 8, "pos_grid": (4, 4), "layer_scale": 1.0}
BEIT = {"family": "beit", "pos_grid": None, "rel_pos": "window", "qkv_bias": "q_and_v", "window": 3}
CONVNEXT = {"depths": (1, 1, 1, 1), "widths": (32, 32, 32, 64)}


def spec(count=3, arch="vit", dims=DIMS, interactions=2, **options) -> dict:
    """A tiny pyramid of `count` branches."""
    shape = {**VIT, **options} if arch == "vit" else {**CONVNEXT, **options}
    widths = [{"embed_dim": dim} if arch == "vit" else {} for dim in dims]
    branches = [{"arch": arch, "resolution": 64 * (i + 1), "options": {**shape, **widths[i]}} for i in range(count)]
    return {"branches": branches, "interactions": interactions, "heads": 2}


def build(*args, scales=(4, 2, 1, 0.5), taps=None, **options) -> DensePyramid:
    return DensePyramid(spec(*args, **options), scales=scales, taps=taps)


def seeded(model: nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    """A released state of a model, every tensor of its own."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in released_shapes(model).items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


MODELS = {
    "one branch": lambda: build(1),
    "two branches, DeiT names": lambda: build(2, family="deit"),
    "two branches, BEiT names": lambda: build(2, **BEIT),
    "two branches, Uni-Perceiver names": lambda: build(2, family="uniperceiver", time_steps=3, embed_norm=True),
    "three branches": lambda: build(3, pos_prefix=1),
    "three branches for DINO": lambda: build(3, scales=(2, 1, 0.5)),
    "two branches for DINO": lambda: build(2, scales=(2, 1, 0.5)),
    "four branches": lambda: build(4),
    "taps": lambda: build(3, taps=(0,)),
    "ConvNeXt": lambda: build(3, "convnext", taps=(0, 1, 2), interactions=4),
    "one ConvNeXt": lambda: DensePyramid(
        {"branches": [{"arch": "convnext", "resolution": 64, "blocks": (1, 2, 2, 2), "options": CONVNEXT}]},
        taps=(0, 1, 2),
    ),
}


# --- Names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_released_names_round_trip(name):
    model = MODELS[name]()
    released = seeded(model)
    names = released_names(model)
    assert len(set(names.values())) == len(names)
    ours = from_released(model, released)
    assert list(ours) == list(model.state_dict())
    assert to_released(model, ours).keys() == released.keys() - unread_shapes(model).keys()
    model.load_state_dict(released)
    assert same(dict(model.state_dict()), ours)
    assert same(to_released(model), released), "the way back is exact, tensors that nothing reads included"


def test_released_names_by_hand():
    names = released_names(build(3, family="deit", taps=(0,)))
    for ours, released in {
        "pyramid.branches.2.blocks.1.ls2.gamma": "branch3.blocks.1.gamma_2",
        "pyramid.branches.0.pos_embed": "branch1.pos_embed",
        "pyramid.stages.1.units.0.to_low.proj.weight": "interactions.1.interaction_units_12.branch2to1_proj.weight",
        "pyramid.stages.0.units.1.to_high.ca_gamma": "interactions.0.interaction_units_23.branch1to2_injector.ca_gamma",
        "pyramid.stages.0.units.1.to_high.ffn.dwconv.bias": (
            "interactions.0.interaction_units_23.branch1to2_injector.ffn.dwconv.dwconv.bias"
        ),
        "merge.weights.0": "w1",
        "merge.projections.2.0.weight": "merge_branch3.0.weight",
        "tap_merges.0.weights.1": "intermediate_merging_0_w2",
        "tap_merges.0.projections.1.0.weight": "intermediate_merging_0_branch2.0.weight",
    }.items():
        assert names[ours] == released
    assert released_names(build(1))["fpn.levels.up4.0.weight"] == "up1.0.weight"
    assert released_names(build(2))["fpn.levels.up2.0.weight"] == "fpn2.0.weight"


def test_rename():
    rules = (("a.{i}.*", "b{i+1}.*"), ("a.*", "c.*"), ("x.{i}.{k}", "x{k}_{i+2}"))
    assert rename("a.0.weight", rules) == "b1.weight"
    assert rename("a.10.b.c", rules) == "b11.b.c"
    assert rename("a.weight", rules) == "c.weight"
    assert rename("x.3.4", rules) == "x4_5"
    assert rename("other", rules) is None


def test_tensors_that_nothing_reads():
    dino = build(3, scales=(2, 1, 0.5))
    assert set(unread_shapes(dino)) == {f"fpn1.{layer}.{leaf}" for layer in "013" for leaf in ("weight", "bias")}
    assert not [name for name, _ in dino.named_parameters() if "up4" in name]
    convnext = build(2, "convnext", taps=(0, 1, 2), interactions=4)
    assert unread_shapes(convnext) == {
        f"branch{i}.convnext_model.layernorm.{leaf}": (64,) for i in (1, 2) for leaf in ("weight", "bias")
    }
    assert same(
        {name: to_released(convnext)[name] for name in unread_shapes(convnext)},
        {name: torch.zeros(shape) for name, shape in unread_shapes(convnext).items()},
    )
    # Their presence and shape is part of being complete.
    released = seeded(dino)
    del released["fpn1.0.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing tensors .fpn1.0.weight"):
        dino.load_state_dict(released)


def test_gradients_under_released_names():
    model = build(2)
    sum(level.sum() for level in model(torch.randn(1, 3, 128, 128))).backward()
    gradients = to_released(model, {name: p.grad for name, p in model.named_parameters()})
    assert torch.equal(gradients["w2"], model.merge.weights[1].grad)
    part = to_released(model, {"merge.weights.0": torch.ones(())})
    assert part == {"w1": torch.ones(())}


# --- Loading -------------------------------------------------------------------------------------------------------


class Detector(nn.Module):
    """What a framework puts around a backbone."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.backbone = build(**options)
        self.head = nn.Linear(32, 2)


def detector_state(model: Detector) -> dict[str, torch.Tensor]:
    state = {f"backbone.{name}": tensor for name, tensor in seeded(model.backbone).items()}
    return {**state, "head.weight": torch.ones(2, 32), "head.bias": torch.ones(2)}


def test_inside_a_detector():
    model = Detector()
    state = detector_state(model)
    before = dict(state)
    model.load_state_dict(state)
    assert same(state, before), "the caller's state is left as it is"
    assert same(to_released(model.backbone), seeded(model.backbone))
    assert (model.head.weight == 1).all()
    own = copy.deepcopy(model.state_dict())
    other = Detector()
    other.load_state_dict(own)
    assert same(dict(other.state_dict()), dict(own))


def test_a_deep_copy_loads_into_itself():
    model = Detector()
    twin = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    twin.load_state_dict(detector_state(twin))
    assert same(to_released(twin.backbone), seeded(twin.backbone))
    assert same(dict(model.state_dict()), dict(before))
    assert not hasattr(model.backbone, "unread")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "nothing there"])
def test_a_mismatch_raises_for_every_caller(strict, change):
    model = Detector()
    state = detector_state(model)
    if change == "missing":
        del state["backbone.w1"]
    elif change == "unexpected":
        state["backbone.norm.weight"] = torch.ones(3)
    elif change == "shape":
        state["backbone.w1"] = torch.ones(2)
    else:
        state = {name: tensor for name, tensor in state.items() if name.startswith("head")}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as error:
        model.load_state_dict(state, strict=strict)
    assert "\n" not in str(error.value)
    assert same(dict(model.state_dict()), dict(before))


def test_our_own_names_are_strict_too():
    model = build(2)
    state = dict(model.state_dict())
    del state["merge.weights.1"]
    with pytest.raises(CheckpointError, match=r"1 missing tensors .merge.weights.1"):
        model.load_state_dict(state, strict=False)


FOUR = {"count": 4}
AS_BUILT = {"count": 4, "dims": (32, 16, 16, 16)}


@pytest.mark.parametrize(
    ("model", "file", "says"),
    [
        ({"count": 3}, FOUR, r"the file holds 4 branch\(es\), the spec 3"),
        (FOUR, {"count": 3}, r"the file holds 3 branch\(es\), the spec 4"),
        ({"count": 2}, {"count": 1}, r"the file holds 1 branch\(es\), the spec 2"),
        (FOUR, AS_BUILT, "its third, as the original builds it: use the '-as-built' spec"),
        (AS_BUILT, FOUR, "its own network: use the spec without '-as-built'"),
        (
            {},
            {"dims": (64, 16, 16)},
            r"the file's branches are \[64, 16, 16\] channels wide, the spec's \[32, 16, 16\]",
        ),
        ({}, {"depth": 3}, r"the file's branches have \[3, 3, 3\] blocks, the spec's \[2, 2, 2\]"),
        (BEIT, {**BEIT, "window": 2}, "relative position tables for windows of 2 tokens, the spec's window is 3"),
        ({}, {"interactions": 1}, "the file holds 1 interactions, the spec 2"),
        ({}, {"mlp_ratio": 2}, r"branch1.blocks.0.mlp.fc1.weight is \(64, 32\), expected \(128, 32\)"),
        ({}, {"scales": (2, 1)}, "^(?!.*the spec).*missing"),
    ],
)
def test_a_mismatch_says_what_differs(model, file, says):
    model, file = build(**model), build(**file)
    if model.scales == file.scales:
        state = to_released(file)
    else:
        state = {name: tensor for name, tensor in to_released(file).items() if not name.startswith("fpn1")}
    with pytest.raises(CheckpointError, match=says):
        model.load_state_dict(state)


def test_another_model_altogether():
    resnet = {"layer1.0.conv1.weight": torch.ones(3), "fc.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"it holds no branches .its names begin like 'layer1.0.conv1.weight'"):
        build(2).load_state_dict(resnet)
    with pytest.raises(CheckpointError, match="it holds nothing for the backbone; is it a checkpoint of another model"):
        Detector().load_state_dict({f"module.{name}": tensor for name, tensor in resnet.items()})


# --- Files ---------------------------------------------------------------------------------------------------------


def test_wrappers_and_prefixes(tmp_path):
    state = {"backbone.w1": torch.ones(()), "head.weight": torch.zeros(2)}
    wrapped = [
        state,
        {"state_dict": state, "meta": {"epoch": 3}},
        {"model": state, "args": argparse.Namespace(lr=1e-4)},
        {"module": state, "optimizer": None, "lr_scheduler": None},
        {"state_dict": OrderedDict((f"module.{name}", tensor) for name, tensor in state.items())},
    ]
    for i, content in enumerate(wrapped):
        torch.save(content, tmp_path / f"{i}.pth")
        assert same(read_state_dict(tmp_path / f"{i}.pth"), state), i
    save_file(state, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    assert same(read_state_dict(tmp_path / "a.safetensors"), state)
    assert same(read_state_dict(str(tmp_path / "a.npz")), state)


def test_the_backbone_s_part_of_a_detector_s_file(tmp_path):
    model = Detector()
    torch.save({"state_dict": detector_state(model)}, tmp_path / "detector.pth")
    backbone = build()
    load_checkpoint(backbone, tmp_path / "detector.pth")
    assert same(to_released(backbone), seeded(backbone))
    load_checkpoint(model, tmp_path / "detector.pth")
    assert (model.head.weight == 1).all()
    created = create_model(spec(), checkpoint=tmp_path / "detector.pth")
    assert same(dict(created.state_dict()), dict(backbone.state_dict()))
    assert all(not tensor.is_meta for tensor in created.state_dict().values())


def test_deepspeed_directories(tmp_path):
    model = build()
    torch.save(
        {"module": {f"backbone.{n}": t for n, t in seeded(model).items()}}, tmp_path / "mp_rank_00_model_states.pt"
    )
    load_checkpoint(model, tmp_path)
    assert same(to_released(model), seeded(model))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty is a directory without mp_rank_00_model_states.pt"):
        read_file(tmp_path / "empty")


def write_zero3(folder: Path, state: dict[str, torch.Tensor], processes: int, groups: int = 2) -> None:
    """Write a state as ZeRO-3 does: every process has an equal share of each tensor, the last one padded."""
    names = list(state)
    shapes = [OrderedDict((n, state[n].shape) for n in names[i::groups]) for i in range(groups)]
    module = OrderedDict((n, torch.empty(0)) for n in names)
    for rank in range(processes):
        flat = []
        for group in shapes:
            shares = []
            for name in group:
                share = -(-state[name].numel() // processes)
                padded = torch.nn.functional.pad(
                    state[name].float().flatten(), (0, share * processes - state[name].numel()), value=1e9
                )
                shares.append(padded[rank * share :][:share])
            flat.append(torch.cat(shares))
        prefix = f"zero_pp_rank_{rank}_mp_rank_00"
        model = {"module": module, "buffer_names": [], "param_shapes": shapes, "dp_world_size": processes}
        torch.save(model, folder / f"{prefix}_model_states.pt")
        torch.save({"optimizer_state_dict": {"fp32_flat_groups": flat}}, folder / f"bf16_{prefix}_optim_states.pt")


def test_zero3_shards_are_put_together(tmp_path):
    model = build()
    state = {f"backbone.{name}": tensor for name, tensor in seeded(model).items()}
    write_zero3(tmp_path, state, processes=3)
    load_checkpoint(model, tmp_path)
    assert same(to_released(model), seeded(model))
    shard = tmp_path / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    with pytest.raises(CheckpointError, match=r"one process's shards.*give the folder it is in"):
        load_checkpoint(model, shard)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"shards of 3 processes, and a file of process 1 is missing"):
        read_file(tmp_path)


def test_a_file_of_another_model_is_named(tmp_path):
    torch.save(to_released(build(2)), tmp_path / "two.pth")
    with pytest.raises(
        CheckpointError, match=r"two.pth: the checkpoint does not fit this model: the file holds 2 branch"
    ):
        load_checkpoint(build(3), tmp_path / "two.pth")
    state = detector_state(Detector())
    state["head.bias"] = torch.ones(5)
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match=r"head.pth does not fit the model: .*head.bias"):
        load_checkpoint(Detector(), tmp_path / "head.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "npz"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_files(tmp_path, kind, share):
    state = {"weight": torch.randn(64, 64), "bias": torch.randn(64)}
    buffer = io.BytesIO()
    if kind == "safetensors":
        save_file(state, tmp_path / "whole")
        data = (tmp_path / "whole").read_bytes()
    elif kind == "npz":
        np.savez(buffer, **{name: tensor.numpy() for name, tensor in state.items()})
        data = buffer.getvalue()
    else:
        torch.save(state, buffer, _use_new_zipfile_serialization=kind == "zip")
        data = buffer.getvalue()
    file = tmp_path / f"cut.{kind if kind in ('safetensors', 'npz') else 'pth'}"
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=f"{file.name} is truncated or not a checkpoint") as error:
        read_state_dict(file)
    assert "\n" not in str(error.value)


def test_other_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*missing.pth"):
        read_file(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("<html>404 Not Found</html>\n")
    with pytest.raises(CheckpointError, match=r"text.pth is truncated or not a checkpoint"):
        read_file(tmp_path / "text.pth")
    for i, content in enumerate(([1, 2], {"epoch": 3}, {"state_dict": {}})):
        torch.save(content, tmp_path / f"{i}.pth")
        with pytest.raises(CheckpointError, match=f"{i}.pth holds no tensors by name"):
            read_state_dict(tmp_path / f"{i}.pth")


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_a_pickle_that_executes_code_does_not_run(tmp_path, kind):
    touched = tmp_path / "touched"
    content = {"state_dict": {"weight": torch.ones(2)}, "meta": Attack(touched)}
    if kind == "bare pickle":
        (tmp_path / "bad.pth").write_bytes(pickle.dumps(Attack(touched), protocol=2))
    else:
        torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"object of type \w+\.system, which is not loaded") as error:
        read_state_dict(tmp_path / "bad.pth")
    assert "\n" not in str(error.value)
    assert not touched.exists()


def test_an_npz_with_pickles_does_not_run(tmp_path):
    touched = tmp_path / "touched"
    np.savez(tmp_path / "bad.npz", a=np.array([Attack(touched)], dtype=object))
    with pytest.raises(CheckpointError, match=r"bad.npz"):
        read_state_dict(tmp_path / "bad.npz")
    assert not touched.exists()


def test_harmless_types_are_read_and_others_named(tmp_path):
    content = {
        "model": {"weight": torch.ones(2)},
        "args": argparse.Namespace(lr=0.1, size=torch.Size([2, 3])),
        "best": np.float64(81.5),
        "epoch": np.int64(3),
        "done": np.bool_(True),
        "order": OrderedDict(a=1),
    }
    torch.save(content, tmp_path / "a.pth")
    read = read_file(tmp_path / "a.pth")
    assert read["args"].size == torch.Size([2, 3])
    assert (float(read["best"]), int(read["epoch"]), bool(read["done"])) == (81.5, 3, True)
    torch.save({"path": Path("x")}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"type pathlib\.\S*Path, which is not loaded because"):
        read_file(tmp_path / "b.pth")
    torch.save({"layer": nn.Linear(1, 1)}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"type torch.nn.modules.linear.Linear"):
        read_file(tmp_path / "c.pth")
    assert isinstance(read_file(tmp_path / "c.pth", extra_types=[nn.Linear, set])["layer"], nn.Linear)


def test_scalars_of_either_numpy_are_read(tmp_path):
    buffer = io.BytesIO()
    torch.save({"best": np.float32(81.5)}, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue().replace(b"numpy._core.", b"numpy.core.")
    assert b"numpy.core.multiarray" in data
    for i, content in enumerate((data, data.replace(b"numpy.core.", b"numpy._core."))):
        (tmp_path / f"{i}.pth").write_bytes(content)
        assert read_file(tmp_path / f"{i}.pth") == {"best": 81.5}


# --- Pretrained branches -------------------------------------------------------------------------------------------


def branch(**options):
    return create_branch("vit", **{**VIT, "embed_dim": 32, "family": "deit", **options})


def test_pretrained_branch_files(tmp_path):
    donor = branch(class_token=True, pos_prefix=1, patch_size=4, pos_grid=(2, 2))
    for parameter in donor.parameters():
        nn.init.normal_(parameter)
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t
        for name, t in donor.state_dict().items()
    }
    assert "blocks.0.gamma_1" in state
    torch.save({"model": {**state, "head.weight": torch.ones(2, 32)}}, tmp_path / "deit.pth")
    loaded = branch()
    load_pretrained(loaded, tmp_path / "deit.pth")
    assert torch.equal(loaded.blocks[1].ls2.gamma, donor.blocks[1].ls2.gamma)
    assert torch.equal(loaded.blocks[1].mlp.fc1.weight, donor.blocks[1].mlp.fc1.weight)
    assert loaded.pos_embed.shape == (1, 16, 32)
    # A constant table and a constant kernel stay what they are when they are resized.
    state["pos_embed"] = torch.full((1, 5, 32), 3.0)
    state["patch_embed.proj.weight"] = torch.full((32, 3, 4, 4), 2.0)
    torch.save(state, tmp_path / "constant.pth")
    load_pretrained(loaded, tmp_path / "constant.pth")
    torch.testing.assert_close(loaded.pos_embed, torch.full((1, 16, 32), 3.0))
    torch.testing.assert_close(loaded.patch_embed.proj.weight, torch.full((32, 3, 8, 8), 2.0))
    without = {name: tensor for name, tensor in state.items() if "gamma" not in name}
    torch.save(without, tmp_path / "plain.pth")
    load_pretrained(fresh := branch(layer_scale=0.5), tmp_path / "plain.pth")
    assert (fresh.blocks[0].ls1.gamma == 0.5).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pos_embed": torch.ones(1, 7, 32)}, "a position table of 7 rows is no square grid"),
        ({"norm1": None}, "1 tensors are missing, the first is blocks.0.norm1.weight"),
        ({"blocks.2.norm1.weight": torch.ones(32)}, "the file holds 3 blocks, the branch has 2"),
        ({"blocks.0.norm1.weight": torch.ones(16)}, r"blocks.0.norm1.weight is \(16,\), the branch's \(32,\)"),
    ],
)
def test_pretrained_files_that_do_not_fit(tmp_path, change, says):
    state = dict(branch().state_dict())
    for name, tensor in change.items():
        if tensor is None:
            del state[f"blocks.0.{name}.weight"]
        else:
            state[name] = tensor
    torch.save(state, tmp_path / "a.pth")
    model = branch()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=f"a.pth does not fit the branch: .*{says}"):
        load_pretrained(model, tmp_path / "a.pth")
    assert same(dict(model.state_dict()), dict(before))


def test_a_class_token_row_that_the_file_lacks(tmp_path):
    torch.save(dict(branch().state_dict()), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="16 rows has no class-token row, which this branch type keeps"):
        load_pretrained(branch(pos_prefix=1), tmp_path / "a.pth")


def test_a_pretrained_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        load_pretrained(branch(), tmp_path / "a.pth")


def test_relative_position_tables_are_resized_to_the_branch_s_window(tmp_path):
    options = {**VIT, **BEIT, "embed_dim": 32}
    donor = create_branch("vit", **{**options, "window": 4})
    state = dict(donor.state_dict())
    name = "attn.relative_position_bias_table"
    # What a smooth function of the offset says in the middle, the resized table says too; the last rows are dropped.
    offset = torch.arange(-3.0, 4.0)
    table = (offset[:, None] + 10 * offset).flatten().unsqueeze(1).repeat(1, 2)
    del state[f"blocks.0.{name}"], state[f"blocks.1.{name}"]
    state["rel_pos_bias.relative_position_bias_table"] = torch.cat([table, torch.full((3, 2), 99.0)])
    torch.save(state, tmp_path / "beit.pth")
    load_pretrained(same_window := create_branch("vit", **{**options, "window": 4}), tmp_path / "beit.pth")
    assert torch.equal(same_window.blocks[1].attn.relative_position_bias_table, table)
    load_pretrained(larger := create_branch("vit", **{**options, "window": 7}), tmp_path / "beit.pth")
    resized = larger.blocks[0].attn.relative_position_bias_table.detach()[:, 0].view(13, 13)
    assert torch.allclose(resized, -resized.flip(0, 1), atol=1e-4), "odd in both directions, as its source is"
    assert resized[6, 6].abs() < 1e-5
    torch.testing.assert_close(resized[6, 7], torch.tensor(10.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(resized[12, 12], table[-1, 0], atol=1e-2, rtol=0)
    state["rel_pos_bias.relative_position_bias_table"] = table[:40]
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="a relative position table of 40 rows is of no square window"):
        load_pretrained(larger, tmp_path / "bad.pth")


def test_hugging_face_s_convnext(tmp_path):
    donor, other = create_branch("convnext", **CONVNEXT), create_branch("convnext", **CONVNEXT)
    released = released_names(DensePyramid({"branches": [{"arch": "convnext", "resolution": 64, "options": CONVNEXT}]}))
    state = {
        released[f"pyramid.branches.0.{name}"].replace("convnext_model.", "convnext."): tensor
        for name, tensor in donor.state_dict().items()
    }
    assert "convnext.encoder.stages.1.downsampling_layer.1.weight" in state
    torch.save({**state, "convnext.layernorm.weight": torch.ones(64)}, tmp_path / "hf.bin")
    load_pretrained(other, tmp_path / "hf.bin")
    assert same(dict(other.state_dict()), dict(donor.state_dict()))


def test_other_branch_types_load_files_of_their_own_names(tmp_path):
    donor, other = create_branch("convnext", **CONVNEXT), create_branch("convnext", **CONVNEXT)
    save_file(dict(donor.state_dict()), tmp_path / "a.safetensors")
    load_pretrained(other, tmp_path / "a.safetensors")
    assert same(dict(other.state_dict()), dict(donor.state_dict()))
    save_file({"stem.0.bias": donor.stem[0].bias.detach()}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"b.safetensors does not fit the branch: .*[Mm]issing") as error:
        load_pretrained(other, tmp_path / "b.safetensors")
    assert "\n" not in str(error.value)
