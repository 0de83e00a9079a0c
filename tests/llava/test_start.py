"""Where training starts: pretrained branches, interactions, released configurations."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models.convnext import ConvNeXt
from transformers import CLIPModel, CLIPTextConfig, CLIPVisionConfig

from piip.branches import create_branch
from piip.branches.pretrained import load_pretrained
from piip.errors import CheckpointError
from piip_llava.released import released_config, released_name
from piip_llava.rows import ROWS
from piip_llava.tower import build_tower, complete_tower

REFERENCE = Path(__file__).parents[1] / "reference"
SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "pos_grid": (4, 4)}


def clip() -> CLIPModel:
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPModel.config_class(
        vision_config=CLIPVisionConfig(**vision, image_size=32, patch_size=8).to_dict(),
        text_config=CLIPTextConfig(**{**vision, "vocab_size": 16}).to_dict(),
    )
    return CLIPModel(config).eval()


def test_clip_s_own_file_gives_clip_s_own_states(tmp_path):
    model = clip()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    branch = create_branch("clip_base", **SIZES).eval()
    load_pretrained(branch, tmp_path / "pytorch_model.bin")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.vision_model(images, output_hidden_states=True).hidden_states
        for blocks in range(3):
            tokens = branch.run(branch.embed(images), 0, blocks)
            torch.testing.assert_close(torch.cat([tokens.prefix, tokens.x], 1), expected[blocks])


def test_clip_s_file_of_another_size(tmp_path):
    save_file({k: v.contiguous() for k, v in clip().state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the file holds 2 blocks, the branch has 3|is missing|missing"):
        load_pretrained(create_branch("clip_base", **{**SIZES, "depth": 3}), tmp_path / "model.safetensors")
    # Another grid or patch size is resized, as the original does.
    branch = create_branch("clip_base", **{**SIZES, "patch_size": 16, "pos_grid": (2, 2)})
    load_pretrained(branch, tmp_path / "model.safetensors")


@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
def test_timm_s_convnext_keeps_its_layer_scale(tmp_path, prefix):
    sizes = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)}
    model = ConvNeXt(**sizes, ls_init_value=0.5, num_classes=3).eval()
    save_file({prefix + name: tensor for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    branch = create_branch("convnext", depths=sizes["depths"], widths=sizes["dims"]).eval()
    load_pretrained(branch, tmp_path / "model.safetensors")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.stages(model.stem(images))
        torch.testing.assert_close(branch.run(branch.embed(images), 0, branch.depth).to_map(), expected)


def test_interactions_start_like_the_original_s():
    expected = json.loads((REFERENCE / "llava_interaction_init.json").read_text())
    branches = [
        {"arch": "clip_base", "resolution": size, "options": {**SIZES, "embed_dim": width, "patch_size": 16}}
        for size, width in ((32, 64), (64, 48))
    ]
    tower = build_tower({"type": "pyramid", "spec": {"branches": branches, "interactions": 2, "heads": 4}})
    found = {}
    for name, parameter in tower.named_parameters():
        if ".stages.0." in name:
            released = released_name(f"vision_tower.{name}", tower, {})
            found[released.partition("interactions.0.")[2]] = parameter
    assert found.keys() == expected.keys()
    for name, about in expected.items():
        tensor = found[name]
        assert list(tensor.shape) == about["shape"], name
        assert (not tensor.any()) == about["zero"], name
        if about["std"] == 0 or name.endswith("sampling_offsets.bias"):
            assert tensor.mean().item() == pytest.approx(about["mean"], abs=1e-4), name
        assert tensor.std(correction=0).item() == pytest.approx(about["std"], rel=0.35, abs=1e-4), name


def test_a_fresh_tower_equals_its_branches_and_only_gates_learn_at_first():
    branches = [{"arch": "clip_base", "resolution": size, "options": {**SIZES, "patch_size": 16}} for size in (32, 64)]
    tower = build_tower({"type": "pyramid", "spec": {"branches": branches, "interactions": 2, "heads": 4}}).eval()
    images = torch.randn(2, 3, 64, 64)
    states = tower(images)
    alone = tower.pyramid.branches[1]
    torch.testing.assert_close(states[1].x, alone.run(alone.embed(images), 0, 2).x)
    sum((t.x * torch.randn_like(t.x)).sum() for t in states).backward()
    moved = {
        n.split(".")[-1] for n, p in tower.pyramid.stages.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert moved == {"ca_gamma", "cffn_gamma"}


@pytest.mark.parametrize("size", ["7B", "13B"])
def test_a_released_config_is_understood(size):
    fields = json.loads((REFERENCE / f"hf_config_reconstructed_{size}.json").read_text())
    config = released_config(fields)
    name = Path(fields["mm_vision_tower"]).stem
    assert config.tower == complete_tower(ROWS[name].tower)
    text = config.get_text_config()
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
        assert getattr(text, key) == fields[key]
    assert (config.image_aspect_ratio, config.sequence_length, config.image_token_id) == ("pad", 2048, 32000)
    assert config.image_mean == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(("width", "name"), [(4096, "llava-1.5_7B"), (5120, "llava-1.5_13B")])
def test_a_llava_config_is_understood(width, name):
    fields = json.loads((REFERENCE / "hf_config_reconstructed_7B.json").read_text())
    config = released_config({**fields, "hidden_size": width, "mm_vision_tower": "openai/clip-vit-large-patch14-336"})
    assert config.tower == complete_tower(ROWS[name].tower)
    assert config.image_mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])
