"""timm models by name as branches: equal to timm's own outputs, block by block."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from piip.branches import ConvNeXtBranch, ViTBranch, create_branch
from piip.branches.pretrained import convert_vit, load_pretrained
from piip.branches.timm import TimmBranch
from piip.errors import CheckpointError, SpecError
from piip.models import DensePyramid
from piip.optim import layer_decay

slow = pytest.mark.slow
# What they are and, where they are plain, that they become the one ViTBranch.
PLAIN = ["test_vit", "test_vit2", pytest.param("vit_tiny_patch16_224.augreg_in21k", marks=slow)] + [
    pytest.param(name, marks=slow)
    for name in (
        "deit_tiny_distilled_patch16_224",
        "deit3_small_patch16_224.fb_in22k_ft_in1k",
        "vit_small_patch14_dinov2.lvd142m",
        "vit_small_patch14_reg4_dinov2.lvd142m",
        "vit_base_patch16_224.mae",
        "vit_base_patch32_clip_224.openai",
        "vit_base_patch16_siglip_224.webli",
    )
]
# Rotary positions and register tokens (DINOv3), gated MLPs (EVA-02), norms per head.
OWN_BLOCKS = [
    "eva02_tiny_patch14_224.mim_in22k",
    pytest.param("vit_small_patch16_dinov3.lvd1689m", marks=slow),
    pytest.param("vit_small_patch16_rope_mixed_224.naver_in1k", marks=slow),
]
CONVNEXTS = ["test_convnext", "test_convnext2", "test_convnext3", pytest.param("convnextv2_atto", marks=slow)]


def same_weights(name: str, **options):
    """A branch and a timm model of the same random weights, with position tables and gates that matter."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0)
    torch.manual_seed(0)
    return create_branch(name, **options).eval(), network.eval()


def size_of(network) -> int:
    return network.pretrained_cfg["input_size"][-1]


@torch.no_grad()
def assert_blocks_equal(branch, network, images, expected) -> None:
    tokens = branch.embed(images)
    assert len(expected) == branch.depth
    for i, maps in enumerate(expected):
        tokens = branch.run(tokens, i, i + 1)
        torch.testing.assert_close(tokens.to_map(), maps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_plain_vits_equal_timm_without_class_tokens(name):
    branch, network = same_weights(name)
    assert type(branch) is ViTBranch
    images = torch.randn(1, 3, size_of(network), size_of(network))
    x = network.patch_embed(images)
    x = x.flatten(1, 2) if x.ndim == 4 else x
    prefix = 0 if network.no_embed_class or network.pos_embed is None else network.num_prefix_tokens
    x = network.norm_pre(x + network.pos_embed[:, prefix:])
    maps = []
    for block in network.blocks:
        x = block(x)
        maps.append(x.transpose(1, 2).unflatten(2, network.patch_embed.grid_size))
    assert_blocks_equal(branch, network, images, maps)


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_vit4", *OWN_BLOCKS])
@torch.no_grad()
def test_vits_with_their_tokens_equal_forward_intermediates(name):
    branch, network = same_weights(name, class_token=True)
    assert type(branch) is TimmBranch and branch.dims == (network.embed_dim,) * len(network.blocks)
    images = torch.randn(1, 3, size_of(network), size_of(network))
    maps = network.forward_intermediates(images, intermediates_only=True)
    assert_blocks_equal(branch, network, images, maps)
    # Another size than that of the pretraining, with a remainder that fills no patch.
    patch = branch.patch_size
    tokens = branch.run(branch.embed(torch.randn(1, 3, 3 * patch + 5, 2 * patch)), 0, branch.depth)
    assert tokens.grid == (3, 2) and tokens.prefix.shape[1] == network.num_prefix_tokens
    assert tokens.x.shape == (1, 6, branch.dims[-1])


@torch.no_grad()
def test_beit_equals_timm_without_its_class_token():
    branch, network = same_weights("beitv2_base_patch16_224")
    assert type(branch) is ViTBranch and branch.blocks[0].attn.window == 14
    for block in network.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    branch.load_state_dict({**branch.state_dict(), **convert_vit(network.state_dict(), branch)})
    images = torch.randn(1, 3, 224, 224)
    x, maps = network.patch_embed(images), []
    for block in network.blocks[:2]:
        whole = block.attn._get_rel_pos_bias()
        block.attn._get_rel_pos_bias = lambda bias=whole[..., 1:, 1:]: bias
        x = block(x)
        maps.append(x.transpose(1, 2).unflatten(2, (14, 14)))
    tokens = branch.embed(images)
    for i in range(2):
        tokens = branch.run(tokens, i, i + 1)
        torch.testing.assert_close(tokens.to_map(), maps[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONVNEXTS)
@torch.no_grad()
def test_convnexts_equal_forward_intermediates(name):
    branch, network = same_weights(name)
    assert type(branch) is ConvNeXtBranch
    images = torch.randn(1, 3, 96, 64)
    maps = network.forward_intermediates(images, intermediates_only=True)
    tokens, start = branch.embed(images), 0
    for i, expected in enumerate(maps):
        stop = start + len(network.stages[i].blocks) + (i > 0)
        tokens, start = branch.run(tokens, start, stop), stop
        torch.testing.assert_close(tokens.to_map(), expected, rtol=1e-4, atol=1e-5)
        assert branch.strides[stop - 1] == 96 // expected.shape[-2]
    assert start == branch.depth


def test_a_spec_names_timm_models_and_trains():
    """A plain ViT in windows, one in timm's blocks, and a ConvNeXt, in one pyramid."""
    branches = [
        dict(arch="test_vit4", resolution=64, drop_path=0.1),
        dict(arch="test_convnext", resolution=96),
        dict(arch="test_vit", resolution=128, window=3),
    ]
    model = DensePyramid(dict(branches=branches, interactions=2, heads=4))
    assert [type(b) for b in model.pyramid.branches] == [TimmBranch, ConvNeXtBranch, ViTBranch]
    sum(maps.square().mean() for maps in model(torch.randn(1, 3, 128, 128))).backward()
    unread = {n for n, p in model.named_parameters() if p.grad is None}
    assert not unread
    groups = layer_decay(model, 0.5, prefix="")
    depth = model.pyramid.branches[0].depth
    for name, layer in (("patch_embed.proj.weight", 0), ("blocks.0.mlp.fc1.weight", 1)):
        assert groups[f"pyramid.branches.0.network.{name}"].lr_scale == 0.5 ** (depth + 1 - layer)


def test_files_of_timm_load_by_name(tmp_path):
    for name in ("test_vit", "test_vit4"):
        network = timm.create_model(name)
        save_file(network.state_dict(), tmp_path / "model.safetensors")
        branch = create_branch(name)
        load_pretrained(branch, tmp_path / "model.safetensors")
        own = {n.removeprefix("network."): t for n, t in branch.state_dict().items()}
        assert all(torch.equal(own[n], t) for n, t in network.state_dict().items() if n.startswith("blocks."))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_pretrained(create_branch("test_vit"), tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("swin_tiny_patch4_window7_224", {}, r"SwinTransformer.*plain ViTs.*ConvNeXts.*register_branch"),
        ("resnet18", {}, r"resnet18 \(ResNet\) cannot be a branch"),
        ("vit_tiny_r_s16_p8_224", {}, r"cannot be a branch"),
        ("vit_small_patch16_dinov3", {"window": 14}, r"parts that ViTBranch does not have.*without window"),
        ("test_vit", {"window": 4, "class_token": True}, r"class tokens.*without window"),
        ("test_convnext", {"window": 4}, r"is a ConvNeXt, which has no window"),
        ("vit_base_patch16_2240", {}, r"unknown branch type.*timm's name"),
    ],
)
def test_what_cannot_be_a_branch_says_so(name, options, text):
    with pytest.raises(SpecError, match=text):
        create_branch(name, **options)


def test_weights_that_cannot_be_had(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(CheckpointError, match=r"weights of test_vit.r160_in1k cannot be had: no network"):
        create_branch("test_vit.r160_in1k", pretrained=True)
