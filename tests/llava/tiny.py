"""A tiny model with a tokenizer trained on the spot, and data for it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from piip_llava import PiipLlavaConfig, PiipLlavaForConditionalGeneration, PiipLlavaProcessor

WORDS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What is it? ASSISTANT: It is red. How many digits? two"
)
CLIP = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "pos_grid": (3, 3)}
TOWER = {
    "type": "pyramid",
    "spec": {
        "branches": [
            {"arch": "clip_base", "resolution": 16, "drop_path": 0.2, "options": CLIP},
            {"arch": "convnext", "resolution": 64, "options": {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16)}},
        ],
        "interactions": 2,
        "heads": 2,
    },
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def tiny_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer in the style of Llama's: sentencepiece's spaces, bytes for what it has not seen."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator([WORDS] * 4, trainers.BpeTrainer(vocab_size=420, special_tokens=tokens[:3]))
    vocabulary = json.loads(tokenizer.to_str())["model"]
    known = {token: i for i, token in enumerate(tokens)}
    for token in vocabulary["vocab"]:
        known.setdefault(token, len(known))
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in vocabulary["merges"]]
    tokenizer.model = models.BPE(known, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tiny_config(tokenizer: PreTrainedTokenizerFast, **options: Any) -> PiipLlavaConfig:
    size = len(tokenizer)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return PiipLlavaConfig(
        **{
            "text_config": {**TEXT, "vocab_size": size, **ids},
            "tower": TOWER,
            "image_token_id": size,
            "sequence_length": 128,
            **ids,
            **options,
        }
    )


def tiny_model(**options: Any) -> tuple[PiipLlavaForConditionalGeneration, PiipLlavaProcessor]:
    tokenizer = tiny_tokenizer()
    model = PiipLlavaForConditionalGeneration(tiny_config(tokenizer, **options)).eval()
    return model, PiipLlavaProcessor.from_model(model.config, tokenizer)


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def write_data(folder: Path, samples: int = 12) -> Path:
    """Write LLaVA json with pictures; every fourth sample is text alone."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(samples):
        question = f"What is it? {'digits ' * (i % 5)}"
        row: dict[str, Any] = {"id": f"sample{i}"}
        if i % 4 != 3:
            picture(i).save(folder / f"{i}.png")
            row["image"] = f"{i}.png"
            question = f"{question}\n<image>" if i % 2 else f"<image>\n{question}"
        row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is red {i}."}]
        rows.append(row)
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def write_start(folder: Path) -> Path:
    """Write a tiny language model and a config file that names it; returns the config's path."""
    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = {key: value for key, value in TEXT.items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(**text, vocab_size=len(tokenizer), **ids)).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    config = folder / "config.py"
    config.write_text(f"from piip_llava.rows import Row\nmodel = Row({str(folder / 'lm')!r}, {TOWER!r})\n")
    return config
