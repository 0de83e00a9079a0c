"""The branch contract, over every registered branch type."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from piip import DensePyramid
from piip.branches import Branch, base, create_branch, list_branches, register_branch
from piip.errors import SpecError
from piip.tokens import Tokens, map_to_tokens

# Options that make a type small, by the first word of its name: a new family adds its own here.
SMALL = {
    "vit": {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "pos_grid": (4, 4)},
    "convnext": {"depths": (1, 2, 1, 1), "widths": (8, 16, 24, 32), "layer_scale": 0.5},
}
SMALL["deit"] = SMALL["internvit"] = SMALL["clip"] = SMALL["vit"]
# Layer scales near zero would hide the gradients behind them.
SMALL["uniperceiver"] = {**SMALL["vit"], "layer_scale": 0.5}
SMALL["beit"] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "window": 3, "layer_scale": 0.5}
# Options of a type that its name does not show.
VARIANTS = [
    ("vit", {"window": 3, "layer_scale": 0.5}),
    ("vit", {"window": 3, "window_pad": "after_qkv"}),
    ("vit", {"class_token": True, "pos_prefix": 1}),
    ("vit", {"class_token": True, "act": "quick_gelu", "qk_norm": True}),
    ("convnext", {"stem": "overlap_act"}),
    ("deit_tiny", {"window": 2, "global_every": 2, "act": "gelu_tanh"}),
]
TYPES = [pytest.param(name, {}, id=name) for name in list_branches()]
TYPES += [pytest.param(name, options, id=f"{name}-{i}") for i, (name, options) in enumerate(VARIANTS)]
every_type = pytest.mark.parametrize(("name", "options"), TYPES)


def build(name: str, options: dict) -> Branch:
    return create_branch(name, **{**SMALL[name.partition("_")[0]], **options})


def flat(tokens: Tokens) -> Tensor:
    """All that a state holds, as one vector."""
    return torch.cat([t.flatten() for t in (tokens.x, tokens.prefix) if t is not None])


def step(branch: Branch, images: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Outputs, and the gradient of every parameter and of the images, for a loss that weights all outputs alike."""
    images = images.clone().requires_grad_()
    branch.zero_grad()
    out = flat(branch.run(branch.embed(images), 0, branch.depth))
    (out * torch.linspace(-1, 1, out.numel())).sum().backward()
    return out.detach(), {"images": images.grad, **{name: p.grad for name, p in branch.named_parameters()}}


@every_type
def test_splits_of_run_compose(name, options):
    branch = build(name, options).eval()
    start = branch.embed(torch.randn(2, 3, 40, 56))
    whole = branch.run(start, 0, branch.depth)
    for cut in range(1, branch.depth):
        parts = branch.run(branch.run(start, 0, cut), cut, branch.depth)
        assert parts.grid == whole.grid
        assert torch.equal(flat(parts), flat(whole))
    unchanged = branch.run(start, 1, 1)
    assert torch.equal(flat(unchanged), flat(start))


@every_type
@pytest.mark.parametrize("size", [(40, 56), (43, 61), (33, 39)])
def test_declared_dims_and_strides_are_true(name, options, size):
    branch = build(name, options).eval()
    assert len(branch.dims) == len(branch.strides) == branch.depth
    tokens = branch.embed(torch.randn(1, 3, *size))
    for i in range(branch.depth):
        tokens = branch.run(tokens, i, i + 1)
        grid = tuple(side // branch.strides[i] for side in size)
        assert tokens.grid == grid
        assert tokens.x.shape == (1, grid[0] * grid[1], branch.dims[i])
        assert tokens.prefix is None or tokens.prefix.shape[::2] == (1, branch.dims[i])


@every_type
@pytest.mark.parametrize("batch", [1, 2])
def test_maps_have_their_channels_last_in_memory(name, options, batch):
    """Tokens are contiguous, and a map of them is one that convolutions take without a copy."""
    branch = build(name, options).eval()
    tokens = branch.embed(torch.randn(batch, 3, 40, 56))
    for state in (tokens, branch.run(tokens, 0, branch.depth)):
        if state.prefix is None:
            assert state.x.is_contiguous()
        maps = state.to_map()
        assert maps.data_ptr() == state.x.data_ptr()
        assert maps.stride(1) == 1
        if state.prefix is None:
            assert maps.is_contiguous(memory_format=torch.channels_last)
            assert map_to_tokens(maps).data_ptr() == state.x.data_ptr()


@every_type
def test_every_parameter_gets_a_gradient(name, options):
    branch = build(name, options)
    _, gradients = step(branch, torch.randn(2, 3, 40, 56))
    for parameter, gradient in gradients.items():
        assert gradient is not None, f"no gradient for {parameter}"
        assert gradient.isfinite().all(), parameter
        if parameter == "pos_embed" and branch.cls_token is None:
            # The table's row of a class token that does not exist is kept for the released files, and never read.
            assert not gradient[:, : branch.pos_prefix].any()
            gradient = gradient[:, branch.pos_prefix :]
        # A bias of keys shifts all logits of a query alike: its gradient is zero in exact arithmetic.
        assert gradient.any() or parameter.endswith("qkv.bias"), f"gradient of {parameter} is zero"


@every_type
def test_checkpointing_recomputes_and_changes_nothing(name, options):
    branch = build(name, options)
    images = torch.randn(1, 3, 40, 56)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    for module in branch.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
            break
    out, gradients = step(branch, images)
    assert calls == 1
    branch.grad_checkpointing = True
    again, recomputed = step(branch, images)
    assert calls == 3, "checkpointing does not recompute"
    assert torch.equal(out, again)
    for key, gradient in gradients.items():
        torch.testing.assert_close(recomputed[key], gradient, rtol=0, atol=0, msg=key)
    with torch.no_grad():
        branch.run(branch.embed(images), 0, branch.depth)
    assert calls == 4, "nothing is recomputed where no gradients are wanted"


def test_checkpointing_repeats_drop_path():
    branch = build("vit", {"drop_path": 0.5, "drop_path_rule": "constant"})
    images = torch.randn(8, 3, 24, 24)
    results = []
    for branch.grad_checkpointing in (False, True):
        torch.manual_seed(1)
        results.append(step(branch, images))
    for key, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][key]), key


def test_drop_path_rates():
    def rates(**options):
        branch = create_branch("vit", **{**SMALL["vit"], "depth": 5}, **options)
        return [getattr(block.drop_path2, "drop_prob", 0.0) for block in branch.blocks]

    assert rates() == [0] * 5
    assert rates(drop_path=0.4) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert rates(drop_path=0.4, drop_path_rule="constant") == [0.4] * 5


def test_class_token_takes_part_in_attention_and_has_its_own_position():
    branch = build("vit", {"class_token": True, "pos_prefix": 1}).eval()
    nn.init.normal_(branch.cls_token)
    images = torch.randn(1, 3, 32, 32)
    state = branch.embed(images)
    assert torch.allclose(state.prefix, branch.cls_token + branch.pos_embed[:, :1])
    moved = state._replace(prefix=torch.randn_like(state.prefix))
    assert not torch.allclose(branch.run(moved, 0, 1).x, branch.run(state, 0, 1).x)


def test_position_table_is_resized_to_the_image():
    branch = build("vit", {})
    nn.init.zeros_(branch.patch_embed.proj.weight)
    nn.init.zeros_(branch.patch_embed.proj.bias)
    same = branch.embed(torch.randn(1, 3, 32, 32))
    assert torch.equal(same.x, branch.pos_embed)
    wide = branch.embed(torch.randn(1, 3, 24, 48))
    table = branch.pos_embed.view(1, 4, 4, -1).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(table, size=(3, 6), mode="bicubic", align_corners=False)
    assert torch.allclose(wide.to_map(), expected)


def test_a_block_is_timm_s():
    from timm.models.vision_transformer import Block

    branch = build("vit", {"layer_scale": 0.3})
    block = Block(32, 2, qkv_bias=True, init_values=0.3, norm_layer=partial(nn.LayerNorm, eps=1e-6)).eval()
    block.load_state_dict(branch.blocks[0].state_dict())
    x = torch.randn(2, 12, 32)
    torch.testing.assert_close(branch.eval().run(Tokens(x, (3, 4)), 0, 1).x, block(x))


def test_relative_position_bias_is_added_to_the_logits():
    branch = build("beit_base", {"window": 2, "depth": 1}).eval()
    attention = branch.blocks[0].attn
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 4, 32)
    q, k, v = (attention.qkv.weight @ x[0].T).T.chunk(3, dim=-1)
    heads = []
    for h in range(2):
        part = slice(16 * h, 16 * h + 16)
        logits = (q + attention.q_bias)[:, part] @ k[:, part].T / 4
        for i in range(4):
            for j in range(4):
                down, right = i // 2 - j // 2, i % 2 - j % 2
                logits[i, j] += attention.relative_position_bias_table[3 * (down + 1) + right + 1, h]
        heads.append(logits.softmax(-1) @ (v + attention.v_bias)[:, part])
    torch.testing.assert_close(attention(x, (2, 2))[0], attention.proj(torch.cat(heads, dim=1)))


def test_a_global_block_needs_a_grid_of_its_relative_position_table():
    branch = build("beit_base", {"window": None, "rel_pos": 3})
    branch.run(branch.embed(torch.randn(1, 3, 24, 24)), 0, 1)
    with pytest.raises(ValueError, match="table for 3 x 3 tokens does not fit a global block on 3 x 4 tokens"):
        branch.run(branch.embed(torch.randn(1, 3, 24, 32)), 0, 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"norm": "batchnorm"}, r"unknown norm 'batchnorm'.*layernorm, rmsnorm"),
        ({"act": "relu"}, "unknown activation 'relu'.*gelu, gelu_tanh, quick_gelu"),
        ({"window_pad": "qkv"}, "unknown window_pad 'qkv'.*before_qkv, after_qkv"),
        ({"drop_path_rule": "cosine"}, "unknown drop_path_rule 'cosine'.*linear, constant"),
        ({"window": (7, None)}, "window lists 2 blocks, the branch has 3"),
        ({"window": 0}, "a window is at least one token"),
        ({"window": (7, 7, 7), "global_every": 2}, "global_every goes with one window side"),
        ({"window": 7, "class_token": True}, "leave out window or class_token"),
        ({"window": 7, "rel_pos": 14}, "window 7 does not fit a relative position table for windows of 14 tokens"),
        ({"window": (7, 7, None), "rel_pos": "window"}, "block 3 attends globally and has no window"),
        ({"rel_pos": "table"}, "rel_pos is 'window' or a number of tokens, got 'table'"),
        ({"rel_pos": 4, "class_token": True}, "leave out rel_pos or class_token"),
        ({"pos_grid": None, "pos_prefix": 1}, "pos_prefix counts rows of a position table"),
        ({"qkv_bias": "k"}, "unknown qkv_bias 'k'.*q_and_v"),
        ({"num_heads": 5}, "embed_dim 32 is not a multiple of num_heads 5"),
        ({"windows": 7}, r"unknown option of branch type 'vit' 'windows' \(did you mean window"),
    ],
)
def test_options_that_cannot_be_built(options, says):
    with pytest.raises(ValueError, match=says):
        build("vit", options)


def test_unknown_type_and_missing_option():
    with pytest.raises(SpecError, match=r"unknown branch type 'deit_smal' \(did you mean deit_small") as error:
        create_branch("deit_smal")
    assert all(name in str(error.value) for name in list_branches())
    with pytest.raises(SpecError, match=r"'convnext' needs the option.s. depths, widths"):
        create_branch("convnext")
    with pytest.raises(SpecError, match=r"unknown stem 'conv'.*patch, overlap, overlap_act"):
        create_branch("convnext", **SMALL["convnext"], stem="conv")
    with pytest.raises(ValueError, match="called 'vit' exists already"):
        register_branch("vit")


def test_an_image_smaller_than_a_patch():
    with pytest.raises(ValueError, match="an image of 40 x 7 pixels holds no patch of 8 pixels"):
        build("vit", {}).embed(torch.zeros(1, 3, 40, 7))


class Pooling(Branch):
    """The least that a branch can be: nothing but the contract."""

    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()
        self.dims = (width,) * depth
        self.strides = (4,) * depth
        self.stem = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def embed(self, images: Tensor) -> Tokens:
        maps = self.stem(images)
        return Tokens(maps.flatten(2).transpose(1, 2), tuple(maps.shape[-2:]))

    def run(self, tokens: Tokens, start: int, stop: int) -> Tokens:
        x = tokens.x
        for layer in self.layers[start:stop]:
            x = self.call_block(layer, x).relu()
        return tokens._replace(x=x)


def test_a_branch_type_of_one_s_own(monkeypatch):
    monkeypatch.setattr(base, "_FACTORIES", dict(base._FACTORIES))
    register_branch("pooling", width=24)(Pooling)
    assert "pooling" in list_branches()
    spec = {
        "branches": [
            {"arch": "vit", "resolution": 32, "options": SMALL["vit"]},
            {"arch": "pooling", "resolution": 64},
        ],
        "interactions": 2,
        "heads": 4,
    }
    model = DensePyramid(spec, grad_checkpointing=True)
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(sum(level.pow(2).mean() for level in model(images)))
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0]
    assert model.strides == [1, 2, 4, 8]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"pyramid.branches.1.stem.weight", "pyramid.stages.0.units.0.to_low.ca_gamma"} <= changed
    model.load_state_dict(before)
    assert torch.equal(model.state_dict()["pyramid.branches.1.stem.weight"], before["pyramid.branches.1.stem.weight"])
