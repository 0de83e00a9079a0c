"""Training in LLaVA's two stages, with Hugging Face's Trainer."""

import logging
import runpy
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate.utils import gather_object
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from piip.errors import CheckpointError, SpecError, unknown
from piip.integrations.process import settle_before_forks
from piip_llava import released
from piip_llava.adapter import load_adapter, save_adapter
from piip_llava.config import PiipLlavaConfig
from piip_llava.data import Collator, ConversationDataset, ModalityLengthSampler, Skipped, images_of
from piip_llava.errors import InputError
from piip_llava.modeling import PiipLlavaForConditionalGeneration
from piip_llava.processing import PiipLlavaProcessor
from piip_llava.rows import ROWS, Row
from piip_llava.tower import PlainTower

log = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "language model to start from, or a whole model (ours, or a released one) to go on with; "
            "the config's language model by default"
        },
    )
    vision_tower: str | None = field(
        default=None, metadata={"help": "config file, or name of a row, that says tower, projector and language model"}
    )
    vision_weights: str | None = field(
        default=None, metadata={"help": "folder of the pretrained weights that the tower starts from"}
    )
    pretrain_mm_mlp_adapter: str | None = field(
        default=None, metadata={"help": "mm_projector.bin of the first stage: projector, and interactions if trained"}
    )
    tune_mm_mlp_adapter: bool = field(
        default=False, metadata={"help": "first stage: language model and pretrained networks stay as they are"}
    )
    freeze_interactions: bool = field(
        default=False, metadata={"help": "first stage: train the projector alone, interactions stay identities"}
    )
    freeze_tower: bool = field(default=False, metadata={"help": "second stage: the whole tower stays as it is"})
    lora_enable: bool = field(default=False, metadata={"help": "second stage: low-rank updates of the language model"})
    lora_r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    attention: str | None = field(
        default=None, metadata={"help": "attention of the language model: eager, sdpa or flash_attention_2"}
    )
    legacy: bool = field(
        default=False,
        metadata={
            "help": "the original's accidents: --freeze_interactions in the first stage, --max_grad_norm 0, and "
            "--freeze_tower for a plain tower"
        },
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str = field(default="", metadata={"help": "JSON list of conversations"})
    image_folder: str = field(default="", metadata={"help": "where the paths of images begin"})
    version: str = field(default="v1", metadata={"help": "template: plain (captions) or v1 (conversations)"})
    image_aspect_ratio: Literal["square", "pad"] = field(
        default="square", metadata={"help": "square (crop; first stage) or pad (second stage)"}
    )
    bad_images: Literal["mask", "error"] = field(
        default="mask", metadata={"help": "an unreadable image: learn nothing of its sample, or stop"}
    )


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """How it is trained: Hugging Face's options, and these."""

    model_max_length: int = field(default=2048, metadata={"help": "longest sequence, image tokens included"})
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "batches of one kind, with images or without, and of similar length"}
    )
    mm_projector_lr: float | None = field(default=None, metadata={"help": "learning rate of the projector"})
    warmup_ratio: float = field(default=0.0, metadata={"help": "share of the steps in which the learning rate rises"})
    resume: bool = field(default=True, metadata={"help": "go on from the last whole checkpoint in output_dir, if any"})


class LlavaTrainer(Trainer):
    """Trainer with batches of one modality, a learning rate for the projector, and a count of what is not learned.

    Attributes:
        skipped: Samples of this process of which nothing was learned, by their ids.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skipped: dict[str, Skipped] = {}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Note the samples of which nothing is learned, which are no input of the model's; then train."""
        for one in inputs.pop("skipped", ()):
            self._note(one)
        return super().training_step(model, inputs, *args, **kwargs)

    def _note(self, one: Skipped) -> None:
        if one.sample in self.skipped:
            return
        if one.kind == "unreadable":
            log.warning("sample %s: %s; nothing of it is learned", one.sample, one.reason)
        elif all(other.kind != one.kind for other in self.skipped.values()):  # may be so for many
            log.warning(
                "sample %s: %s; nothing of it and of others like it is learned, raise --model_max_length",
                one.sample,
                one.reason,
            )
        self.skipped[one.sample] = one

    def report_skipped(self) -> None:
        """Say of how many samples nothing was learned; every process of the run calls this, the first one speaks."""
        skipped = {one.sample: one for one in gather_object([*self.skipped.values()])}
        if not self.is_world_process_zero():
            return
        kinds = Counter(one.kind for one in skipped.values())
        if count := kinds["unreadable"]:
            log.warning("images of %d sample(s) could not be read", count)
        if count := kinds["cut"]:
            limit = self.args.model_max_length
            log.warning("%d sample(s) had no answer within --model_max_length %d", count, limit)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(dataset)
        batch = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ModalityLengthSampler(dataset.modality_lengths(), batch, seed)

    def create_optimizer(self, *args: Any) -> Any:
        """Build the optimizer; the projector may have a learning rate of its own."""
        lr = self.args.mm_projector_lr
        if self.optimizer is not None or lr is None:
            return super().create_optimizer(*args)
        decays = set(self.get_decay_parameter_names(self.model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name in decays, name.startswith("projector.")), []).append(parameter)
        cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        parameters = [
            {
                "params": params,
                "weight_decay": self.args.weight_decay if decay else 0.0,
                **({"lr": lr} if projector else {}),
            }
            for (decay, projector), params in groups.items()
        ]
        self.optimizer = cls(parameters, **options)
        return self.optimizer


def read_row(config: str | None) -> Row:
    """Return the row that a config file or a name stands for.

    Args:
        config: Path of a Python file that sets `model` to a `Row`, or the name of a published row.

    Raises:
        InputError: There is no such file or row.
    """
    if config is None:
        raise InputError("--vision_tower says which tower to build: give a config file or the name of a row")
    if config in ROWS:
        return ROWS[config]
    if not config.endswith(".py") or not Path(config).is_file():
        raise InputError(f"{unknown('row', config, ROWS)}; and there is no such config file")
    model = runpy.run_path(config).get("model")
    if not isinstance(model, Row):
        raise InputError(f"{config} does not set `model` to a piip_llava.rows.Row")
    return model


def build(
    args: ModelArguments, data: DataArguments, limit: int, dtype: torch.dtype
) -> tuple[PiipLlavaForConditionalGeneration, PiipLlavaProcessor]:
    """Build the model to train, and its processor.

    Raises:
        InputError: The arguments name no model, or one that cannot be loaded.
        CheckpointError: Weights are missing, or are another model's.
    """
    options: dict[str, Any] = {"dtype": dtype}
    if args.attention:
        options["attn_implementation"] = args.attention
    start = args.model_name_or_path or read_row(args.vision_tower).language_model
    if not start:
        raise InputError(f"{args.vision_tower} names no language model: say where to start with --model_name_or_path")
    with _naming_the_option(start):
        fields = released.read_fields(start)
    if released.has_released_fields(fields) or fields.get("model_type") == PiipLlavaConfig.model_type:
        with _naming_the_option(start):
            model = PiipLlavaForConditionalGeneration.from_pretrained(start, **options)
            processor = PiipLlavaProcessor.from_pretrained(start)
        model.config.image_aspect_ratio = data.image_aspect_ratio
        processor.image_processor.image_aspect_ratio = data.image_aspect_ratio
    else:
        row = read_row(args.vision_tower)
        with _naming_the_option(start):
            tokenizer = AutoTokenizer.from_pretrained(start)
            language_model = AutoModelForCausalLM.from_pretrained(start, **options)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        config = PiipLlavaConfig(
            text_config=language_model.config,
            tower=row.tower,
            projector=row.projector,
            image_token_id=max(language_model.config.vocab_size, len(tokenizer)),
            image_aspect_ratio=data.image_aspect_ratio,
            sequence_length=limit,
            dtype=dtype,
            attn_implementation=language_model.config._attn_implementation,
            **{name: getattr(language_model.config, name, None) for name in ids},
            **row.statistics,
        )
        model = PiipLlavaForConditionalGeneration(config, language_model)
        if args.vision_weights:
            for path in model.load_pretrained_branches(args.vision_weights):
                log.info("loaded %s", path)
        else:
            log.warning("no --vision_weights: the tower starts from random weights")
        model.vision_tower.to(dtype)
        model.projector.to(dtype)
        processor = PiipLlavaProcessor.from_model(config, tokenizer)
    if args.pretrain_mm_mlp_adapter:
        load_adapter(model, args.pretrain_mm_mlp_adapter)
    return model, processor


@contextmanager
def _naming_the_option(start: str) -> Iterator[None]:
    """Turn what transformers raises where it cannot load a model into one line that names the option."""
    try:
        yield
    except (InputError, SpecError):
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"{start} cannot be loaded to start from: {reason}; name another directory or hub repository with "
            "--model_name_or_path"
        ) from None


def freeze(model: PiipLlavaForConditionalGeneration, args: ModelArguments) -> None:
    """Set which parameters are trained, in place; see `ModelArguments`."""
    tower = model.vision_tower
    plain = isinstance(tower, PlainTower)
    model.requires_grad_(not args.tune_mm_mlp_adapter)
    if args.tune_mm_mlp_adapter:
        model.projector.requires_grad_(True)
        if not plain and not (args.freeze_interactions or args.legacy):
            tower.pyramid.stages.requires_grad_(True)
    elif args.freeze_tower or (plain and args.legacy):
        tower.requires_grad_(False)
    if plain:
        for block in tower.unread_blocks():
            block.requires_grad_(False)
    if args.lora_enable:
        from peft import LoraConfig, get_peft_model

        options = LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model.language_model = get_peft_model(model.language_model, options)


def to_dtype(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Convert parameters, in place; buffers keep the precision that they need."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def merge_lora(model: PiipLlavaForConditionalGeneration) -> None:
    """Add low-rank updates to the weights they belong to, in place; a model without any stays as it is."""
    if hasattr(model.language_model, "merge_and_unload"):
        model.language_model = model.language_model.merge_and_unload()


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the last checkpoint below a folder that was written to its end, None where there is none."""
    found = [p for p in Path(folder).glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    numbered = [(int(p.name.split("-")[1]), p) for p in found if p.name.split("-")[1].isdigit()]
    return str(max(numbered)[1]) if numbered else None


def save(trainer: LlavaTrainer, processor: PiipLlavaProcessor, args: ModelArguments, config: str | None) -> None:
    """Write the result of a stage: the adapter, or the whole model with its processor."""
    folder = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if args.tune_mm_mlp_adapter:
        save_adapter(model, folder / "mm_projector.bin", write=trainer.is_world_process_zero())
    else:
        if args.lora_enable:
            merge_lora(model)
            to_dtype(model.parameters(), model.language_model.dtype)  # what was trained beside it is in float32
        generation = getattr(model, "generation_config", None)
        if generation is not None and (generation.temperature is not None or generation.top_p is not None):
            generation.do_sample = True  # or transformers refuses to save it
        trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        trainer.save_state()
        names = {True: [], False: []}
        for name, parameter in model.named_parameters():
            names[parameter.requires_grad].append(name)
        (folder / "unfreeze_params.txt").write_text("\n".join(names[True]) + "\n")
        (folder / "freeze_params.txt").write_text("\n".join(names[False]) + "\n")
        if config and Path(config).is_file():
            shutil.copy(config, folder)


def start_processes(args: LlavaTrainingArguments) -> None:
    """Start the process group: ZeRO-3 splits weights as they are loaded, before the trainer exists."""
    log.info("training on %s", args.device)  # asking for the device starts it
    if not torch.distributed.is_initialized():
        return
    settle_before_forks()
    if args.deepspeed:
        import deepspeed

        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())


def run(model_args: ModelArguments, data_args: DataArguments, args: LlavaTrainingArguments) -> LlavaTrainer:
    """Train a stage and write its result to `args.output_dir`.

    Raises:
        InputError: Arguments or data that cannot be used.
        CheckpointError: Weights are missing, or are another model's.
        SpecError: The tower or projector cannot be built.
    """
    if not data_args.data_path:
        raise InputError("--data_path says what to train on: give a JSON list of conversations")
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if model_args.legacy:
        args.max_grad_norm = 0.0
        if deepspeed is not None:  # has taken the norm from the arguments already
            deepspeed.config["gradient_clipping"] = 0.0
    if args.warmup_ratio and not args.warmup_steps and not hasattr(TrainingArguments, "warmup_ratio"):
        args.warmup_steps = args.warmup_ratio  # since transformers 5, steps below one are a share of all
    if model_args.lora_enable and deepspeed is not None and deepspeed.is_zero3():
        raise InputError("LoRA is merged at the end, which needs whole weights: use ZeRO-2 with --lora_enable")
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    start_processes(args)
    transformers.set_seed(args.seed)
    # Mixed precision by autocast keeps weights in float32; DeepSpeed keeps its own float32 copy.
    weights = dtype if args.deepspeed or model_args.lora_enable else torch.float32
    model, processor = build(model_args, data_args, args.model_max_length, weights)
    dataset = ConversationDataset(
        data_args.data_path,
        data_args.image_folder,
        processor,
        template=data_args.version,
        limit=args.model_max_length,
        bad_images=data_args.bad_images,
    )
    needed = processor.image_tokens + 2  # a first token, and one to learn
    if args.model_max_length < needed and any(map(images_of, dataset.samples)):
        raise InputError(
            f"--model_max_length {args.model_max_length} leaves no room for text beside an image, which takes "
            f"{processor.image_tokens} tokens: give at least {needed}, and more for questions"
        )
    freeze(model, model_args)
    if not args.deepspeed:  # a step on 16-bit weights would be rounded away
        to_dtype((p for p in model.parameters() if p.requires_grad), torch.float32)
    model.config.use_cache = model.language_model.config.use_cache = False
    args.remove_unused_columns = False
    if args.gradient_checkpointing:
        args.gradient_checkpointing_kwargs = args.gradient_checkpointing_kwargs or {"use_reentrant": False}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("%d samples; %.1f M parameters are trained", len(dataset), trained / 1e6)
    trainer = LlavaTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=Collator(processor.tokenizer.pad_token_id),
    )
    checkpoint = last_checkpoint(args.output_dir) if args.resume else None
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
    trainer.report_skipped()
    model.config.use_cache = model.language_model.config.use_cache = True
    save(trainer, processor, model_args, model_args.vision_tower)
    return trainer


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for something that a user can put right."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = HfArgumentParser((ModelArguments, DataArguments, LlavaTrainingArguments))
    parsed = parser.parse_args_into_dataclasses(arguments)
    try:
        run(*parsed)
    except (InputError, CheckpointError, SpecError) as error:
        sys.stderr.write(f"train.py: error: {error}\n")
        return 2
    return 0
