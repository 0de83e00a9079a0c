"""Both stages: what is trained, adapters, LoRA, resuming, and DeepSpeed on two processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import run_command
from safetensors.torch import load_file
from tiny import TOWER, picture, tiny_model, write_data, write_start
from transformers import set_seed

from piip.errors import CheckpointError
from piip_llava import InputError, PiipLlavaForConditionalGeneration, PiipLlavaProcessor, training
from piip_llava.adapter import load_adapter, save_adapter
from piip_llava.rows import ROWS
from piip_llava.tower import complete_tower
from piip_llava.training import (
    DataArguments,
    LlavaTrainingArguments,
    ModelArguments,
    build,
    freeze,
    last_checkpoint,
    main,
    read_row,
    run,
)

LLAVA = Path(__file__).parents[2] / "llava"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    return write_start(folder), write_data(folder / "data")


def options(start, out: Path, **given) -> list[str]:
    config, data = start
    values = {
        "vision_tower": config,
        "data_path": data,
        "image_folder": data.parent,
        "output_dir": out,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "model_max_length": 128,
        "save_strategy": "no",
        **given,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def losses(out: Path) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def trained(out: Path) -> set[str]:
    return set((out / "unfreeze_params.txt").read_text().split())


def test_both_stages_and_what_they_train(start, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(options(start, first, tune_mm_mlp_adapter=True, version="plain")) == 0
    assert {name.split(".")[0] for name in trained(first)} == {"projector", "vision_tower"}
    assert all(name.startswith(("projector.", "vision_tower.pyramid.stages.")) for name in trained(first))
    assert not (first / "model.safetensors").exists()

    adapter = first / "mm_projector.bin"
    state = torch.load(adapter, weights_only=True)
    assert {name.split(".")[1] for name in state} == {"mm_projector", "vision_tower"}
    given = {"image_aspect_ratio": "pad", "group_by_modality_length": True, "gradient_checkpointing": True}
    assert main(options(start, second, pretrain_mm_mlp_adapter=adapter, **given)) == 0
    assert losses(second)[-1] < losses(second)[0]
    loaded = PiipLlavaForConditionalGeneration.from_pretrained(second)
    assert trained(second) == {name for name, _ in loaded.named_parameters()}
    assert loaded.config.image_aspect_ratio == "pad"
    gates = [p for n, p in loaded.named_parameters() if n.endswith("gamma") and ".units." in n]
    assert all(p.any() for p in gates)


@pytest.mark.parametrize("attention", [None, "sdpa", "eager"])
def test_what_is_trained_reads_no_answer_before_it_gives_it(start, attention):
    config, data = start
    args = ModelArguments(vision_tower=str(config), attention=attention)
    model, _ = build(args, DataArguments(data_path=str(data)), 128, torch.float32)
    assert model.language_model.config._attn_implementation == (attention or "sdpa")
    ids = torch.arange(10, 22)[None]
    changed = ids.clone()
    changed[0, 8] = 50
    model.train()
    with torch.no_grad():
        one, other = (model(input_ids=x, attention_mask=torch.ones_like(x)).logits for x in (ids, changed))
    assert torch.equal(one[:, :8], other[:, :8]) and not torch.equal(one[:, 8:], other[:, 8:])


def test_the_original_s_first_stage(start, tmp_path):
    assert main(options(start, tmp_path, tune_mm_mlp_adapter=True, version="plain", legacy=True)) == 0
    assert all(name.startswith("projector.") for name in trained(tmp_path))
    assert all(".mm_projector." in name for name in torch.load(tmp_path / "mm_projector.bin", weights_only=True))


class Stopped(Exception):
    """Stands for the rest of a run."""


@pytest.fixture
def deepspeed(monkeypatch):
    """Arguments may name a config of DeepSpeed's; a run ends before it starts any process."""
    pytest.importorskip("deepspeed", reason="needs the train extra")

    def stop(*_):
        raise Stopped

    monkeypatch.setattr(training, "start_processes", stop)
    # TrainingArguments may set it, for the tests that follow too.
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")


@pytest.mark.parametrize(("legacy", "norm"), [(False, 1.0), (True, 0.0)])
def test_the_original_clips_no_gradient_under_deepspeed_either(start, tmp_path, deepspeed, legacy, norm):
    config = str(LLAVA / "scripts" / "zero2.json")
    args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", deepspeed=config)
    with pytest.raises(Stopped):
        run(ModelArguments(legacy=legacy), DataArguments(data_path=str(start[1])), args)
    assert args.max_grad_norm == norm
    assert args.deepspeed_plugin.deepspeed_config["gradient_clipping"] == norm


@pytest.mark.parametrize(("name", "stage", "refused"), [("zero3_of_mine", 2, False), ("mine", 3, True)])
def test_the_config_says_its_stage_and_not_its_name(start, tmp_path, deepspeed, name, stage, refused):
    config = json.loads((LLAVA / "scripts" / f"zero{stage}.json").read_text())
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    config = str(tmp_path / f"{name}.json")
    args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", deepspeed=config)
    with pytest.raises(InputError if refused else Stopped):
        run(ModelArguments(lora_enable=True), DataArguments(data_path=str(start[1])), args)


def test_what_is_trained_beside_lora_is_held_in_float32(start, tmp_path, monkeypatch):
    seen = {}

    def note(trainer, *_):
        seen.update({n: (p.requires_grad, p.dtype) for n, p in trainer.model.named_parameters()})

    with monkeypatch.context() as patch:
        patch.setattr(training, "save", note)
        assert main(options(start, tmp_path, lora_enable=True, lora_r=4, bf16=True, max_steps=1)) == 0
    learned = {name: dtype for name, (trained, dtype) in seen.items() if trained}
    assert {name.split(".")[0] for name in learned} == {"language_model", "projector", "vision_tower"}
    assert {*learned.values()} == {torch.float32}
    assert {dtype for trained, dtype in seen.values() if not trained} == {torch.bfloat16}
    assert main(options(start, tmp_path / "saved", lora_enable=True, lora_r=4, bf16=True, max_steps=1)) == 0
    assert {t.dtype for t in load_file(tmp_path / "saved" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_of_which_nothing_is_learned_are_counted(start, tmp_path, caplog, workers):
    data = write_data(tmp_path / "data")
    (data.parent / "0.png").write_bytes(b"no image")
    (data.parent / "5.png").unlink()
    given = {"dataloader_num_workers": workers, "num_train_epochs": 2, "data_path": data, "image_folder": data.parent}
    with caplog.at_level("WARNING"):
        assert main(options(start, tmp_path / "out", **given)) == 0
    said = [record.message for record in caplog.records if record.name == training.__name__]
    assert sorted(line.partition(":")[0] for line in said if "sample sample" in line) == [
        "sample sample0",
        "sample sample5",
    ]
    assert said[-1] == "images of 2 sample(s) could not be read"


def test_a_limit_that_cuts_every_answer_off_is_reported(start, tmp_path, caplog):
    given = {"model_max_length": 20, "dataloader_num_workers": 2}
    with caplog.at_level("WARNING"):
        assert main(options(start, tmp_path, **given)) == 0
    said = [record.message for record in caplog.records if record.name == training.__name__]
    assert sum("no answer begins within 20 tokens" in line for line in said) == 1
    assert said[-1] == "12 sample(s) had no answer within --model_max_length 20"
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "model.safetensors").values())


def test_lora_is_merged_into_what_is_saved(start, tmp_path):
    given = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0, "freeze_tower": True}
    assert main(options(start, tmp_path, **given)) == 0
    saved = load_file(tmp_path / "model.safetensors")
    before = load_file(start[0].parent / "lm" / "model.safetensors")
    assert not any("lora" in name for name in saved)
    name = "model.layers.0.mlp.up_proj.weight"
    change = saved[f"language_model.{name}"] - before[name]
    assert torch.linalg.matrix_rank(change, atol=1e-5) in range(1, 5)
    assert torch.equal(saved["language_model.model.norm.weight"], before["model.norm.weight"])
    assert not any(n.startswith("vision_tower.") for n in trained(tmp_path))


def test_a_plain_tower_trains_no_block_that_never_runs(start):
    branch = {"arch": "clip_base", "resolution": 32, "options": TOWER["spec"]["branches"][0]["options"]}
    model, _ = tiny_model(tower={"type": "plain", "spec": {"branches": [branch]}}, projector={"type": "mlp"})
    freeze(model, ModelArguments())
    assert not any(p.requires_grad for p in model.vision_tower.branch.blocks[1].parameters())
    assert all(p.requires_grad for p in model.vision_tower.branch.blocks[0].parameters())
    freeze(model, ModelArguments(legacy=True))
    assert not any(p.requires_grad for p in model.vision_tower.parameters())


def test_a_plain_convnext_trains_no_block_that_never_runs():
    branch = {"arch": "convnext", "resolution": 64, "options": TOWER["spec"]["branches"][1]["options"]}
    for layer in (-1, -2, -3):  # behind the last block, before it, and before the down-sampling layer in front of it
        tower = {"type": "plain", "spec": {"branches": [branch]}, "select_layer": layer}
        model, processor = tiny_model(tower=tower, projector={"type": "mlp"})
        freeze(model, ModelArguments())
        model.train()
        given = processor(images=picture(), text="<image>What is it?")
        model(**given, labels=given["input_ids"].masked_fill(given["input_ids"] >= 400, -100)).loss.backward()
        unread = {n for n, p in model.vision_tower.named_parameters() if p.grad is None}
        assert unread == {n for n, p in model.vision_tower.named_parameters() if not p.requires_grad}
        assert bool(unread) == (layer < -1)


def test_a_batch_of_text_alone_reaches_every_trained_parameter():
    model, processor = tiny_model()
    model.train()
    given = processor(text="What is it?")
    model(**given, labels=given["input_ids"]).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without, "processes would wait for each other's gradients"


def test_resumed_training_equals_uninterrupted_training(start, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    given = {"save_strategy": "steps", "save_steps": 3, "group_by_modality_length": True, "num_train_epochs": 2}
    assert main(options(start, whole, **given)) == 0
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    (resumed / "checkpoint-9").mkdir()  # cut off while it was written
    assert last_checkpoint(resumed) == str(resumed / "checkpoint-3")
    assert main(options(start, resumed, **given)) == 0
    assert losses(resumed) == losses(whole)
    expected = load_file(whole / "model.safetensors")
    assert all(torch.equal(t, expected[n]) for n, t in load_file(resumed / "model.safetensors").items())


def test_an_adapter_of_another_tower(tmp_path):
    model, _ = tiny_model()
    save_adapter(model, tmp_path / "mm_projector.bin")
    spec = json.loads(json.dumps(complete_tower(TOWER)))
    spec["spec"]["branches"][1]["options"]["widths"] = [8, 8, 16, 24]
    other, _ = tiny_model(tower=spec)
    with pytest.raises(CheckpointError, match=r"is of another tower.*branch2.1.weight is .32, 16., expected .32, 24"):
        load_adapter(other, tmp_path / "mm_projector.bin")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"data_path": "nowhere.json"}, "the data nowhere.json cannot be read"),
        ({"vision_tower": "7f.py"}, "unknown row '7f.py'"),
        (
            {"vision_weights": "nowhere", "vision_tower": "piip-llava_clip-bl_512-256_7B"},
            "no pretrained weights at nowhere",
        ),
        ({"pretrain_mm_mlp_adapter": "nowhere.bin"}, "there is no checkpoint at nowhere.bin"),
        ({"lora_enable": True, "deepspeed": "zero3.json"}, "use ZeRO-2 with --lora_enable"),
        ({"model_name_or_path": "no/where/near"}, "no/where/near cannot be loaded to start from: "),
        ({"model_name_or_path": "."}, ". holds no model, as there is no config.json"),
        ({"vision_tower": LLAVA / "configs" / "mini.py"}, "say where to start with --model_name_or_path"),
        ({"model_max_length": 5}, "leaves no room for text beside an image, which takes 4 tokens: give at least 6"),
    ],
)
def test_arguments_that_cannot_be_used(start, tmp_path, capsys, monkeypatch, given, says):
    if "vision_weights" in given:  # without gigabytes of random weights
        row = ROWS["piip-llava_clip-bl_512-256_7B"].__class__(str(start[0].parent / "lm"), with_weights())
        monkeypatch.setitem(ROWS, "piip-llava_clip-bl_512-256_7B", row)
    if "deepspeed" in given:
        given = {**given, "deepspeed": LLAVA / "scripts" / "zero3.json"}
    assert main(options(start, tmp_path / "out", **given)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in message


def with_weights() -> dict:
    spec = json.loads(json.dumps(complete_tower(TOWER)))
    spec["spec"]["branches"][0]["weights"] = "clip/pytorch_model.bin"
    return spec


@pytest.mark.parametrize("path", sorted((LLAVA / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_a_row(path):
    row = read_row(str(path))
    assert path.stem == "mini" or row is ROWS[path.stem]
    assert {p.stem for p in (LLAVA / "configs").glob("*.py")} == {*ROWS, "mini"}


@pytest.mark.parametrize("path", sorted((LLAVA / "shell_scripts").glob("*_*.sh")), ids=lambda p: p.stem)
def test_shell_scripts_give_options_that_exist(path, start, tmp_path, monkeypatch):
    """Run a script with a stand-in for Python (or srun) that prints its arguments, and parse those."""
    tool = tmp_path / "show"
    tool.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    tool.chmod(0o755)
    shutil.copy(tool, tmp_path / "srun")
    environment = {**os.environ, "PYTHON": str(tool), "PATH": f"{tmp_path}:{os.environ['PATH']}", "PARTITION": "p"}
    command = ["sh", str(path), "configs/llava-1.5_7B.py", "--seed", "7"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    words = run.stdout.splitlines()
    train = next(i for i, word in enumerate(words) if word.endswith("train.py"))
    from transformers import HfArgumentParser

    from piip_llava.training import DataArguments, LlavaTrainingArguments

    rest = words[train + 1 :]
    for name in ("--deepspeed", "--tf32", "--bf16"):  # need a device or a process group
        i = rest.index(name)
        if name == "--deepspeed":
            assert Path(rest[i + 1]).is_file()
        del rest[i : i + 2]
    rest += ["--use_cpu", "True"]
    model, data, args = HfArgumentParser(
        (ModelArguments, DataArguments, LlavaTrainingArguments)
    ).parse_args_into_dataclasses(rest)
    assert (model.vision_tower, args.seed, args.model_max_length) == ("configs/llava-1.5_7B.py", 7, 2048)
    assert data.version == ("plain" if "pretrain" in path.stem else "v1")
    assert args.learning_rate == (1e-3 if "pretrain" in path.stem else 2e-5)
    assert ("-p" in words) == path.stem.endswith("slurm")


PROGRAM = """
import sys

sys.path[:0] = [{root!r}, {llava!r}]
import torch
from piip_llava import training

save = training.save


def note(trainer, processor, *rest):
    given = processor(images={image!r}, text={prompt!r})
    trainer.model_wrapped.eval()
    with torch.no_grad():  # of every process: ZeRO-3 brings the weights together in the forward pass
        logits = trainer.model_wrapped(**given).logits
    if trainer.is_world_process_zero():
        torch.save(logits, trainer.args.output_dir + "/logits.pt")
    save(trainer, processor, *rest)


training.save = note
sys.exit(training.main())
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_with_deepspeed_save_what_one_trains(start, tmp_path):
    pytest.importorskip("deepspeed", reason="needs the train extra")
    config = tmp_path / "config.py"  # without drop path, whose random numbers each process draws for itself
    spec = {**TOWER["spec"], "drop_path": 0.0}
    spec["branches"] = [{**branch, "drop_path": 0.0} for branch in spec["branches"]]
    config.write_text(start[0].read_text().replace(repr(TOWER), repr({**TOWER, "spec": spec})))
    start = config, start[1]
    adapter = tmp_path / "adapter"
    assert main(options(start, adapter, tune_mm_mlp_adapter=True, version="plain", num_train_epochs=2)) == 0
    # AdamW moves the tower, whose gradients are small here, as far as the rest; its epsilon is above their rounding.
    given = {"pretrain_mm_mlp_adapter": adapter / "mm_projector.bin", "learning_rate": 1e-3, "adam_epsilon": 1e-7}
    given |= {"max_steps": 3, "lr_scheduler_type": "constant"}
    words = {"image": str(start[1].parent / "0.png"), "prompt": "<image>\nWhat is it?"}
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(LLAVA.parent), llava=str(LLAVA), **words))

    assert main(options(start, tmp_path / "one", per_device_train_batch_size=2, **given)) == 0
    one = dict(PiipLlavaForConditionalGeneration.from_pretrained(tmp_path / "one").named_parameters())
    set_seed(42)
    args = ModelArguments(vision_tower=str(config), pretrain_mm_mlp_adapter=str(given["pretrain_mm_mlp_adapter"]))
    before = dict(build(args, DataArguments(), 128, torch.float32)[0].named_parameters())
    moves = {name: (one[name] - tensor).norm().item() for name, tensor in before.items()}
    for part in ("language_model.", "projector.", "vision_tower.pyramid.branches.0.", "vision_tower.pyramid.stages."):
        assert max(move for name, move in moves.items() if name.startswith(part)) > 1e-2, part

    for stage in ("zero2", "zero3"):
        out = tmp_path / stage
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [str(program), *options(start, out, per_device_train_batch_size=1, **given)]
        command += ["--deepspeed", str(LLAVA / "scripts" / f"{stage}.json"), "--ddp_backend", "gloo"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = run_command(command, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        model = PiipLlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            apart = (parameter - one[name]).norm().item()  # a bias in front of a GroupNorm moves by rounding alone
            assert apart <= 0.01 * moves[name] + 1e-4, f"{stage}: {name} is {apart} apart, and moved {moves[name]}"
        inputs = PiipLlavaProcessor.from_pretrained(out)(images=words["image"], text=words["prompt"])
        with torch.no_grad():
            logits = model(**inputs).logits
        torch.testing.assert_close(logits, torch.load(out / "logits.pt"), rtol=1e-4, atol=1e-5, msg=stage)
