#!/usr/bin/env python3
"""PIIP-LLaVA from nothing, on a CPU: data, pretrained parts, both stages, then questions about held-out images.

    python tools/demo_llava.py              # about 7 minutes on 2 cores; results in work_dirs/demo-llava

A tokenizer is trained on the spot, and a tiny language model on text alone: it learns to answer from a picture in
words, as a large one has learned to read before it sees. The branches of the tower learn to classify digits. The two
stages then run as the README's commands do. A run that was interrupted goes on where it was.
"""

import argparse
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from make_mini_data import CLASSES, make_mini_data
from PIL import Image
from pretrain_branches import pretrain_all
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from piip.zoo.specs import resolve_spec
from piip_llava import PiipLlavaForConditionalGeneration, PiipLlavaProcessor
from piip_llava.conversation import TEMPLATES, read_turns, render
from piip_llava.training import read_row

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "llava/configs/mini.py"
DATA = {"image_size": 128, "train": 3000, "val": 200, "digits_per_image": (1, 3), "min_size": 28, "max_size": 56}
CROPS = {"crop_size": 64, "crops_per_image": 3}  # digits of the same sizes


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a small tokenizer in the style of Llama's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def read_texts(data: Path) -> list[str]:
    """Return the conversations and captions as text, each image as a picture in words."""
    pictures = json.loads((data / "in_words.json").read_text())
    texts = []
    for name, template in (("train", "v1"), ("pretrain", "plain")):
        for sample in json.loads((data / f"{name}.json").read_text()):
            text = render(read_turns(sample["conversations"], 1), TEMPLATES[template], "</s>")[0]
            # What follows an image is tokenized by itself, as if a space stood before it.
            texts.append(text.replace("<image>", pictures[sample["id"]] + " "))
    return texts


def rename(text: str, generator: random.Random) -> str:
    """Return a text with other digits in place of its own: the picture changes, and the answers with it."""
    other = dict(zip(CLASSES, generator.sample(CLASSES, len(CLASSES)), strict=True))
    return re.sub(rf"\b({'|'.join(CLASSES)})", lambda found: other[found[0]], text)


def train_language_model(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int, steps: int = 400
) -> None:
    """Train a tiny Llama on text, and save it with its tokenizer."""
    torch.manual_seed(seed)
    generator = random.Random(seed)
    size = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **size, **ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        chosen = [rename(text, generator) for text in generator.sample(texts, 16)]
        batch = tokenizer(chosen, return_tensors="pt", padding=True, return_token_type_ids=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"    step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_stage(title: str, options: dict[str, Any], log: Path) -> None:
    """Run llava/train.py, its losses shown; ends the demo if it fails."""
    words = ["llava/train.py"]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    print(f"\n==> {title}\n    {shlex.join(['python', *words])}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        command = [sys.executable, *words]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **pipe) as process:
            for line in process.stdout:
                file.write(line)
                if re.match(r"\{'|\d+ samples|train.py: error", line):
                    print(f"    {line.strip()[:110]}", flush=True)
    if process.returncode:
        sys.exit(f"demo: '{title}' failed, see {log}; run the same command again to go on from here")


@torch.inference_mode()
def answer(model: Any, processor: PiipLlavaProcessor, images: Path, questions: list[dict[str, Any]]) -> list[str]:
    """Return the model's answers to questions about images, greedy."""
    answers = []
    for start in range(0, len(questions), 32):
        part = questions[start : start + 32]
        prompts = [
            processor.apply_chat_template([{"role": "user", "content": f"<image>\n{question['text']}"}])
            for question in part
        ]
        pictures = [Image.open(images / question["image"]) for question in part]
        given = processor(images=pictures, text=prompts)
        out = model.generate(**given, max_new_tokens=6, do_sample=False)
        answers += processor.batch_decode(out[:, given["input_ids"].shape[1] :])
    return [text.strip() for text in answers]


def majority(file: Path) -> dict[str, str]:
    """Return the most frequent answer of the training data to every question."""
    found: dict[str, Counter] = defaultdict(Counter)
    for sample in json.loads(file.read_text()):
        turns = sample["conversations"]
        for question, reply in zip(turns[::2], turns[1::2], strict=True):
            found[question["value"].replace("<image>\n", "")][reply["value"]] += 1
    return {question: counter.most_common(1)[0][0] for question, counter in found.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "work_dirs/demo-llava")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=DATA["train"], help="training images")
    parser.add_argument("--epochs", type=int, default=4, help="passes of the second stage")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run in the folder")
    args = parser.parse_args()
    out = args.out.resolve()
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    start = time.monotonic()
    minutes: dict[str, float] = {}

    def lap(name: str) -> None:
        minutes[name] = round((time.monotonic() - start) / 60 - sum(minutes.values()), 2)

    print("==> mini data: handwritten digits on photographs, with questions", flush=True)
    data = make_mini_data(
        out / "data", ("llava", "imagefolder"), seed=args.seed, **{**DATA, **CROPS, "train": args.images}
    )
    lap("data")
    if not (out / "pretrained/small.safetensors").is_file():
        print("==> pretrain the tower's branches by classification", flush=True)
        pretrain_all(
            resolve_spec(read_row(str(CONFIG)).tower["spec"]),
            data / "imagefolder",
            out / "pretrained",
            epochs=5,
            seed=args.seed,
            scaled=True,
        )
    lap("branches")
    if not (out / "lm/config.json").is_file():
        print("==> train a tokenizer and a tiny language model on text alone", flush=True)
        texts = read_texts(data / "llava")
        train_language_model(texts, train_tokenizer(texts), out / "lm", args.seed)
    lap("language model")
    common = {
        "model_name_or_path": out / "lm",
        "vision_tower": CONFIG,
        "vision_weights": out / "pretrained",
        "image_folder": data / "llava/images",
        "model_max_length": 512,
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.03,
        "weight_decay": 0,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "tensorboard",
        "seed": args.seed,
        "dataloader_num_workers": 0,
        "save_total_limit": 1,
    }
    if not (out / "pretrain/mm_projector.bin").is_file():
        options = {
            **common,
            "output_dir": out / "pretrain",
            "data_path": data / "llava/pretrain.json",
            "version": "plain",
            "tune_mm_mlp_adapter": True,
            "learning_rate": 2e-3,
            "num_train_epochs": 1,
            "logging_steps": 50,
        }
        train_stage("stage 1: captions; projector and interactions are trained", options, out / "pretrain.log")
    lap("stage 1")
    if not (out / "finetune/model.safetensors").is_file():
        options = {
            **common,
            "output_dir": out / "finetune",
            "data_path": data / "llava/train.json",
            "version": "v1",
            "image_aspect_ratio": "pad",
            "group_by_modality_length": True,
            "pretrain_mm_mlp_adapter": out / "pretrain/mm_projector.bin",
            "learning_rate": 1e-3,
            "num_train_epochs": args.epochs,
            "logging_steps": 100,
        }
        train_stage("stage 2: questions; everything is trained", options, out / "finetune.log")
    lap("stage 2")

    print("\n==> questions about held-out images", flush=True)
    model = PiipLlavaForConditionalGeneration.from_pretrained(out / "finetune").eval()
    processor = PiipLlavaProcessor.from_pretrained(out / "finetune")
    questions = [json.loads(line) for line in (data / "llava/val.jsonl").read_text().splitlines()]
    answers = answer(model, processor, data / "llava/images", questions)
    lap("questions")
    frequent = majority(data / "llava/train.json")
    right: dict[str, list[bool]] = defaultdict(list)
    guessed: dict[str, list[bool]] = defaultdict(list)
    for question, given in zip(questions, answers, strict=True):
        for kind in (question["category"], "all"):
            right[kind].append(given == question["answer"])
            guessed[kind].append(frequent.get(question["text"]) == question["answer"])
    for question, given in list(zip(questions, answers, strict=True))[:8]:
        print(f"    {question['image']}: {question['text']}  {given}  (right: {question['answer']})")
    print(f"\n    {'exact match':<12} {'questions':>9} {'model':>7} {'always the most frequent answer':>33}")
    result: dict[str, Any] = {}
    for kind, values in right.items():
        scores = {"questions": len(values), "model": sum(values) / len(values)}
        scores["majority"] = sum(guessed[kind]) / len(values)
        result[kind] = scores
        print(f"    {kind:<12} {len(values):>9} {scores['model']:>7.3f} {scores['majority']:>33.3f}")
    result.update(minutes=minutes, seed=args.seed, torch=torch.__version__)
    (out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n    minutes: {'  '.join(f'{k} {v}' for k, v in minutes.items())}; in all {sum(minutes.values()):.1f}")
    print(f"    model: {out / 'finetune'}; figures: {out / 'metrics.json'}")


if __name__ == "__main__":
    main()
