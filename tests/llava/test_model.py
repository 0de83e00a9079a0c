"""The model on transformers: save and load, generation, released directories, and what goes wrong."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import TEXT, TOWER, picture, tiny_config, tiny_model, tiny_tokenizer, write_start
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from piip.errors import CheckpointError
from piip_llava import InputError, PiipLlavaForConditionalGeneration, PiipLlavaProcessor, released
from piip_llava.chat import answer, load
from piip_llava.released import NameMap
from piip_llava.rows import CLIP, ROWS, Row
from piip_llava.training import DataArguments, ModelArguments, build

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return tiny_model()


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model, processor = pair
    model.save_pretrained(folder, max_shard_size="50KB")
    processor.save_pretrained(folder)
    return folder


def inputs(processor, **options):
    prompt = processor.apply_chat_template(QUESTION, **options)
    return processor(images=picture(), text=prompt)


def everything(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def test_saved_and_loaded_it_gives_the_same_logits(pair, saved):
    model, processor = pair
    assert len(list(saved.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForImageTextToText.from_pretrained(saved).eval()
    again = AutoProcessor.from_pretrained(saved)
    assert isinstance(loaded, PiipLlavaForConditionalGeneration)
    assert isinstance(again, PiipLlavaProcessor)
    assert torch.equal(model(**inputs(processor)).logits, loaded(**inputs(again)).logits)
    tensors = everything(loaded)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in everything(model).items())


def test_the_saved_config_holds_the_towers_whole_structure(saved):
    fields = json.loads((saved / "config.json").read_text())
    assert fields["tower"]["spec"]["branches"][0]["options"]["embed_dim"] == 16
    assert fields["image_tokens"] == 4
    row = ROWS["piip-llava_clip-bl_512-256_7B"]
    written = tiny_config(tiny_tokenizer(), tower=row.tower).to_dict()["tower"]["spec"]
    assert [b["resolution"] for b in written["branches"]] == [256, 512]


@pytest.mark.parametrize("part", ["vision_tower.", "projector."])
def test_what_a_checkpoint_lacks_is_as_a_constructor_makes_it(saved, tmp_path, part):
    # On the meta device it would otherwise be whatever the memory held.
    folder = tmp_path / "lacking"
    shutil.copytree(saved, folder)
    for file in folder.glob("*.safetensors"):
        save_file({k: v for k, v in load_file(file).items() if not k.startswith(part)}, file, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if not k.startswith(part)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.manual_seed(1)
    loaded, info = PiipLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert len(info["missing_keys"]) > 10
    built = everything(PiipLlavaForConditionalGeneration(loaded.config))
    # Constants are equal; random tensors have the constructor's scale.
    for name, tensor in everything(loaded).items():
        if not name.startswith(part):
            continue
        expected = built[name]
        if name.endswith("sampling_offsets.bias") or expected.unique().numel() == 1:
            assert torch.equal(tensor, expected), name
        else:
            assert 0.5 < tensor.std() / expected.std() < 2, name


def test_buffers_survive_loading(saved, pair):
    loaded = PiipLlavaForConditionalGeneration.from_pretrained(saved)
    buffers = dict(loaded.named_buffers())
    assert buffers.keys() == dict(pair[0].named_buffers()).keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in pair[0].named_buffers())


def test_generation_with_and_without_a_cache_agrees(pair):
    model, processor = pair
    given = inputs(processor)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**given, **options), model.generate(**given, **options, use_cache=False))


def test_prompts_of_a_batch_do_not_see_each_other(pair):
    model, processor = pair
    prompts = [processor.apply_chat_template(QUESTION)]
    prompts.append(prompts[0].replace("What is it?", "What is it? How many digits are there, and which?"))
    pictures = [picture(0), picture(1)]
    batch = processor(images=pictures, text=prompts)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    together = model.generate(**batch, **options)[:, -5:]
    for i, (image, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        alone = model.generate(**processor(images=image, text=prompt), **options)[0, -5:]
        assert torch.equal(together[i], alone)


def test_beams_keep_the_images_of_a_prompt_in_order(pair, monkeypatch):
    model, processor = pair
    one = processor.apply_chat_template(QUESTION)
    given = processor(images=[picture(i) for i in range(3)], text=[one.replace("<image>", "<image><image>"), one])
    seen = []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda pixels: seen.append(pixels) or encode(pixels))
    model.generate(**given, max_new_tokens=2, do_sample=False, num_beams=2)
    assert torch.equal(seen[0], given["pixel_values"][[0, 1, 0, 1, 2, 2]])


def test_the_image_changes_the_answer(pair):
    model, processor = pair
    prompt = processor.apply_chat_template(QUESTION)
    a, b = (model(**processor(images=picture(i), text=prompt)).logits[0, -1] for i in (0, 1))
    assert not torch.allclose(a, b)


def test_messages_can_bring_their_images(pair, tmp_path):
    _, processor = pair
    picture().save(tmp_path / "a.png")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": str(tmp_path / "a.png")}, *QUESTION[0]["content"][1:]]}
    ]
    given = processor.apply_chat_template(messages, tokenize=True)
    assert all(torch.equal(value, inputs(processor)[name]) for name, value in given.items())


def test_tied_language_models_stay_tied(tmp_path):
    model, _ = tiny_model(text_config={**TEXT, "vocab_size": 64, "tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    loaded = PiipLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_another_language_model(tmp_path):
    text = {"model_type": "qwen2", **{k: v for k, v in TEXT.items() if k != "model_type"}, "vocab_size": 64}
    model, _ = tiny_model(text_config=text)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.language_model).__name__ == "Qwen2ForCausalLM"
    assert all(torch.equal(t, loaded.get_parameter(n)) for n, t in model.named_parameters())


def test_checkpointing_covers_tower_and_language_model_and_changes_no_gradient(pair):
    model, processor = pair
    given = inputs(processor)
    grads = []
    for on in (False, True):
        model.zero_grad()
        (model.gradient_checkpointing_enable if on else model.gradient_checkpointing_disable)()
        assert all(b.grad_checkpointing is on for b, _ in model.vision_tower.branches())
        model.train()
        torch.manual_seed(3)  # drop path
        model(**given, labels=given["input_ids"].masked_fill(given["input_ids"] >= 400, -100)).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.gradient_checkpointing_disable()
    model.eval()
    model.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


# ------------------------------------------------------------------------------------------- released directories


def released_directory(folder: Path, model, name: str, shards: int = 3) -> Path:
    """Write a directory as the authors' code does: released names, shards, their config."""
    folder.mkdir()
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    names = NameMap(model.vision_tower, model.config.projector, shapes)
    state = {n: t.clone() for n, t in names.to_released(model.state_dict()).items()}
    state |= {n: torch.ones(shape) for n, shape in names.unread_shapes().items()}
    order = sorted(state, key=lambda n: (sum(map(ord, n)) % 7, n))  # q, k and v of a layer end up in different shards
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {n: files[i % shards] for i, n in enumerate(order)}
    for file in files:
        save_file({n: state[n] for n in order if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    text = model.config.text_config.to_dict()
    fields = {key: text[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    fields |= {key: text[key] for key in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")}
    fields |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "rms_norm_eps": 1e-6}
    fields |= {"mm_vision_tower": f"configs/{name}.py", "image_aspect_ratio": "pad", "torch_dtype": "float32"}
    fields |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tokenizer_model_max_length": 2048}
    (folder / "config.json").write_text(json.dumps(fields))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_released_directory_loads_by_name(pair, tmp_path, monkeypatch):
    model, processor = pair
    monkeypatch.setitem(ROWS, "tiny_row", ROWS["piip-llava_clip-bl_512-256_7B"].__class__("", TOWER))
    folder = released_directory(tmp_path / "released", model, "tiny_row")
    loaded = PiipLlavaForConditionalGeneration.from_pretrained(folder).eval()
    again = PiipLlavaProcessor.from_pretrained(folder)
    assert torch.equal(model(**inputs(processor)).logits, loaded(**inputs(again)).logits)
    loaded.save_pretrained(tmp_path / "ours")
    again.save_pretrained(tmp_path / "ours")
    second = PiipLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(second(**inputs(again)).logits, loaded(**inputs(again)).logits)


def test_a_released_directory_with_the_tower_given(pair, tmp_path):
    model, processor = pair
    folder = released_directory(tmp_path / "released", model, "unknown")
    with pytest.raises(CheckpointError, match=r"unknown tower 'unknown'.*piip-llava_clip-bl_512-256_7B.*tower="):
        PiipLlavaForConditionalGeneration.from_pretrained(folder)
    loaded = PiipLlavaForConditionalGeneration.from_pretrained(folder, tower=TOWER, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded(**inputs(processor)).logits.isfinite().all()


def test_released_directories_that_are_damaged(pair, tmp_path):
    model, _ = pair
    folder = released_directory(tmp_path / "released", model, "x")
    shard = folder / "model-00002-of-00003.safetensors"
    state = load_file(shard)
    gone = next(n for n in state if n.endswith("ca_weight"))

    def load():
        PiipLlavaForConditionalGeneration.from_pretrained(folder, tower=TOWER)

    save_file({n: t for n, t in state.items() if n != gone}, shard)
    with pytest.raises(CheckpointError, match=rf"1 missing tensors .{gone}"):
        load()
    save_file({**state, "model.extra": torch.ones(1)}, shard)
    with pytest.raises(CheckpointError, match=r"1 unexpected tensors .model.extra"):
        load()
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors is truncated"):
        load()
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of its 3 shards, the first is model-00002-of-00003"):
        load()


def test_the_grid_of_a_position_table_is_read_from_the_file(pair, tmp_path):
    model, _ = pair
    folder = released_directory(tmp_path / "released", model, "x")
    spec = json.loads(json.dumps(TOWER))
    spec["spec"]["branches"][0]["options"]["pos_grid"] = (9, 9)
    loaded = PiipLlavaForConditionalGeneration.from_pretrained(folder, tower=spec)
    assert loaded.vision_tower.pyramid.branches[0].pos_grid == (3, 3)


def test_our_own_directory_with_a_missing_shard(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    next((tmp_path / "copy").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of its"):
        PiipLlavaForConditionalGeneration.from_pretrained(tmp_path / "copy")


@pytest.fixture
def hub(monkeypatch):
    """A hub of directories here, by the names of repositories; it has what was asked for in `files`."""
    folders: dict[str, Path] = {}

    def cached_file(name, file, **options):
        if name not in folders:
            raise OSError(f"there is no repository\n{name}")
        return str(folders[name] / file)

    def snapshot_download(name, allow_patterns=None, **options):
        asked.append((name, allow_patterns, options))
        return str(folders[name])

    asked: list[tuple] = []
    monkeypatch.setattr(released, "cached_file", cached_file)
    monkeypatch.setattr(released, "snapshot_download", snapshot_download)
    return folders, asked


def test_a_released_repository_of_the_hub(pair, tmp_path, monkeypatch, hub):
    model, processor = pair
    monkeypatch.setitem(ROWS, "tiny_row", Row("", TOWER))
    folders, asked = hub
    folders["them/released"] = released_directory(tmp_path / "released", model, "tiny_row")
    loaded = PiipLlavaForConditionalGeneration.from_pretrained("them/released", revision="v1").eval()
    again = PiipLlavaProcessor.from_pretrained("them/released")
    assert torch.equal(model(**inputs(processor)).logits, loaded(**inputs(again)).logits)
    assert asked[0] == ("them/released", None, {"revision": "v1"})
    assert not any("safetensors" in pattern for pattern in asked[1][1])  # the processor needs no weights
    built, _ = build(ModelArguments(model_name_or_path="them/released"), DataArguments(), 128, torch.float32)
    assert torch.equal(built.projector.branches[0].fc1.weight, model.projector.branches[0].fc1.weight)


def test_another_kind_of_model(pair, saved, tmp_path, hub):
    write_start(tmp_path)
    folders, _ = hub
    folders |= {"them/lm": tmp_path / "lm", "me/ours": saved}
    for path in (tmp_path / "lm", "them/lm"):
        for cls in (PiipLlavaForConditionalGeneration, PiipLlavaProcessor):
            with pytest.raises(CheckpointError, match=rf"{path} is a llama, no PIIP-LLaVA: give"):
                cls.from_pretrained(path)
    with pytest.raises(CheckpointError, match=r"holds no model, as there is no .*config.json"):
        load(str(tmp_path), "cpu")
    assert released.recognise("me/ours") is False
    for given in ({"model_name_or_path": "them/none"}, {"vision_tower": "llava-1.5_7B"}):  # its language model
        with pytest.raises(InputError, match=r"there is no repository \S+; name .*--model_name_or_path$"):
            build(ModelArguments(**given), DataArguments(), 128, torch.float32)


def convert(*arguments: object) -> None:
    path = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("has_clip", [True, False])
def test_a_released_llava_with_a_plain_tower_is_converted(tmp_path, monkeypatch, has_clip):
    branch = {"arch": "clip_base", "resolution": 32, "options": {**TOWER["spec"]["branches"][0]["options"]}}
    row = Row("", {"type": "plain", "spec": {"branches": [branch]}}, {"type": "mlp", "depth": 2}, CLIP)
    monkeypatch.setitem(ROWS, "llava-1.5_7B", row)
    model, processor = tiny_model(tower=row.tower, projector=row.projector, **CLIP)
    folder = released_directory(tmp_path / "released", model, "of_mine", shards=1)
    shard = next(folder.glob("*.safetensors"))
    state = load_file(shard)
    clip = {name: tensor for name, tensor in state.items() if name.startswith(released.TOWER)}
    save_file({name.removeprefix(released.TOWER): t for name, t in clip.items()}, tmp_path / "clip.safetensors")
    command = [folder, tmp_path / "ours", "--model", "llava-1.5_7B", "--to", "ours"]
    if not has_clip:
        save_file({name: tensor for name, tensor in state.items() if name not in clip}, shard)
        with pytest.raises(CheckpointError, match=r"may leave CLIP out: give .*--vision_weights"):
            convert(*command)
        command += ["--vision_weights", tmp_path / "clip.safetensors"]
    convert(*command)
    loaded, again = load(str(tmp_path / "ours"), "cpu")
    assert torch.equal(model(**inputs(processor)).logits, loaded(**inputs(again)).logits)
    assert isinstance(answer(loaded, again, "What is it?", picture()), str)
    if not has_clip:  # as the programs read it, by the name of CLIP
        fields = json.loads((folder / "config.json").read_text())
        fields["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
        (folder / "config.json").write_text(json.dumps(fields))
        direct, _ = load(str(folder), "cpu", vision_weights=str(tmp_path / "clip.safetensors"))
        assert all(torch.equal(t, loaded.get_parameter(n)) for n, t in direct.named_parameters())


# ----------------------------------------------------------------------------------------------------- bad input


def test_images_and_placeholders_that_do_not_agree(pair):
    model, processor = pair
    prompt = processor.apply_chat_template(QUESTION)
    with pytest.raises(InputError, match=r"1 <image> placeholder.s. and 0 image"):
        processor(text=prompt)
    with pytest.raises(InputError, match=r"2 <image> placeholder.s. and 1 image"):
        processor(text=prompt + "<image>", images=picture())
    with pytest.raises(InputError, match=r"0 <image> placeholder.s. and 1 image"):
        processor(text="What is it?", images=picture())
    given = inputs(processor)
    with pytest.raises(ValueError, match=r"hold 4 image token.s. and there are no images"):
        model(input_ids=given["input_ids"])
    with pytest.raises(ValueError, match=r"hold 4 image token.s., 2 image.s. need 8"):
        model(input_ids=given["input_ids"], pixel_values=given["pixel_values"].repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match=r"the tower takes .N, 3, 64, 64."):
        model(input_ids=given["input_ids"], pixel_values=given["pixel_values"][..., :32])


def test_a_prompt_longer_than_the_context(pair):
    _, processor = pair
    with pytest.raises(InputError, match=r"tokens long .4 per image., the model's context is 256"):
        processor(text="<image>\n" + "digits " * 300, images=picture())


@pytest.mark.parametrize(
    ("special", "says"),
    [({"eos_token": None}, "no end-of-sequence token"), ({"unk_token": None}, "neither a padding nor an unknown")],
)
def test_a_tokenizer_without_the_needed_tokens(special, says):
    tokenizer = tiny_tokenizer(**special)
    with pytest.raises(InputError, match=says):
        PiipLlavaProcessor.from_model(tiny_config(tiny_tokenizer()), tokenizer)


def test_a_camera_s_rotation_is_left_out(pair, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    picture().save(tmp_path / "turned.png", exif=exif)
    picture().save(tmp_path / "plain.png")
    one = pair[1].image_processor.one
    with Image.open(tmp_path / "turned.png") as opened:
        assert opened.getexif()[0x0112] == 6
        assert (one(opened) == one(tmp_path / "plain.png")).all()
    assert (one(tmp_path / "turned.png") == one(tmp_path / "plain.png")).all()


def test_an_image_that_cannot_be_read(pair, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"bad.png cannot be read"):
        pair[1](text="<image>", images=str(tmp_path / "bad.png"))
