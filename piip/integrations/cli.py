"""The command lines of `tools/train.py` and `tools/test.py`, for every task that runs on mmengine's Runner.

Options are those of mmdetection 3. The spellings of mmdetection 2, which the original used, are translated where
nothing is lost, and otherwise refused with the new spelling.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS

from piip.errors import RunError
from piip.integrations.command import Parser, Refused, main  # noqa: F401  (tools and tests call cli.main)
from piip.integrations.config import read_config
from piip.integrations.preflight import check_classes, check_data, claim_work_dir
from piip.integrations.runtime import start_distributed
from piip.integrations.zero import deepspeed_config

DEFAULT_SEED = 0

# Evaluators by type: the field that names their metrics, and the metrics.
_METRICS = {
    "CocoMetric": ("metric", ("bbox", "segm", "proposal", "proposal_fast")),
    "IoUMetric": ("iou_metrics", ("mIoU", "mDice", "mFscore")),
}

_REFUSED_IN_TRAINING = {
    "--gpus": "start as many processes as GPUs instead: sh tools/dist_train.sh CONFIG GPUS",
    "--gpu-ids": "choose GPUs with CUDA_VISIBLE_DEVICES instead",
    "--gpu-id": "choose the GPU with CUDA_VISIBLE_DEVICES instead",
}
_REFUSED_IN_TEST = {
    "--gpu-id": "choose the GPU with CUDA_VISIBLE_DEVICES instead",
    "--show": "there may be no screen: write the pictures with --show-dir DIR",
    "--format-only": "use --cfg-options test_evaluator.format_only=True test_evaluator.outfile_prefix=PREFIX",
    "--eval-options": "use --cfg-options test_evaluator.NAME=VALUE",
    "--show-score-thr": "use --cfg-options default_hooks.visualization.score_thr=VALUE",
    "--tmpdir": "it is no longer needed: results are collected without it",
    "--fuse-conv-bn": "it is not supported: the backbones here have no batch norm to fuse",
}


class Overrides(DictAction):
    """mmengine's KEY=VALUE pairs, with an error that names what is not a pair."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Store the pairs."""
        if wrong := [value for value in values if "=" not in value]:
            parser.error(f"{option} takes KEY=VALUE pairs, not {wrong[0]!r}")
        # mmengine would cut a dict at its commas, and recurse without end over a call.
        if wrong := [value for value in values if "{" in value or "dict(" in value]:
            parser.error(f"{option} takes no dict: set its entries one by one, as in a.b=1 a.c=2, not {wrong[0]!r}")
        super().__call__(parser, namespace, values, option)


def _parser(prog: str, description: str, refused: Mapping[str, str]) -> Parser:
    """Return a parser of what training and evaluation have in common."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("config", help="config file")
    parser.add_argument("--work-dir", help="folder of logs and checkpoints (default: work_dirs/CONFIG)")
    parser.add_argument(
        "--cfg-options", "--options", nargs="+", action=Overrides, default={}, metavar="KEY=VALUE",
        help="change settings of the config; lists as key=a,b or key='[a,b]', nested ones as key='[(a,b),(c,d)]'",
    )  # fmt: skip
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    parser.add_argument("--local_rank", "--local-rank", default="0", help=argparse.SUPPRESS)
    parser.add_argument("--disable_deepspeed", "--disable-deepspeed", action="store_true", help=argparse.SUPPRESS)
    for option, instead in refused.items():
        parser.add_argument(option, action=Refused, instead=instead)
    return parser


def parse_train(argv: Sequence[str] | None = None, prog: str = "train.py") -> argparse.Namespace:
    """Return the options of `tools/train.py`; exits with one line if they are wrong."""
    parser = _parser(prog, "Train a model.", _REFUSED_IN_TRAINING)
    parser.add_argument(
        "--resume", "--auto-resume", "--resume-from", nargs="?", const="auto", metavar="CHECKPOINT",
        help="continue the run in the work dir from its last checkpoint, or from the given one",
    )  # fmt: skip
    parser.add_argument("--load-from", metavar="CHECKPOINT", help="start a new run from these weights")
    parser.add_argument("--amp", action="store_true", help="train in bfloat16 where that is safe")
    parser.add_argument(
        "--deepspeed", metavar="zero1|zero2|zero3|FILE.json", help="train with DeepSpeed: a ZeRO stage, or its settings"
    )
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    parser.add_argument("--seed", type=int, help=f"of every random number (default: the config's, or {DEFAULT_SEED})")
    parser.add_argument("--diff-seed", action="store_true", help="other random numbers in each process")
    parser.add_argument("--deterministic", action="store_true", help="deterministic algorithms only, some of them slow")
    parser.add_argument("--no-validate", action="store_true", help="do not evaluate while training")
    return parser.parse_args(argv)


def parse_test(argv: Sequence[str] | None = None, prog: str = "test.py") -> argparse.Namespace:
    """Return the options of `tools/test.py`; exits with one line if they are wrong."""
    parser = _parser(prog, "Evaluate a model.", _REFUSED_IN_TEST)
    parser.add_argument("checkpoint", help="checkpoint file; also a DeepSpeed directory or the model file in it")
    parser.add_argument("--out", metavar="FILE.pkl", help="write the predictions to a pickle file")
    parser.add_argument("--show-dir", metavar="DIR", help="write pictures of the predictions")
    parser.add_argument("--eval", nargs="+", metavar="METRIC", help="metrics (default: those of the config)")
    return parser.parse_args(argv)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the options that training and evaluation have in common.

    Raises:
        RunError: There is no such file, or it asks for what is not supported.
    """
    options = dict(args.cfg_options)
    settings = {name: options.pop(name) for name in list(options) if name.partition(".")[0] == "deepspeed"}
    cfg = read_config(args.config, options)
    chosen = getattr(args, "deepspeed", None) or settings.pop("deepspeed", None) or cfg.get("deepspeed")
    cfg.deepspeed = deepspeed_config(chosen) if chosen and not args.disable_deepspeed else None
    if cfg.deepspeed:
        cfg.merge_from_dict(settings)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(args.config).stem))
    cfg.setdefault("runner_type", "PIIPRunner")
    cfg.setdefault("env_cfg", {})
    if cfg.get("strategy") or "FullyShardedDataParallel" in (cfg.get("model_wrapper_cfg") or {}).get("type", ""):
        raise RunError(
            "FSDP and mmengine's other strategies are not supported (their checkpoints cannot be resumed on current "
            "torch): shard the model with --deepspeed zero3"
        )
    return cfg


def train(args: argparse.Namespace) -> None:
    """Train as the options of :func:`parse_train` say.

    Raises:
        RunError: The data, the work dir or an option does not allow it.
    """
    cfg = load_config(args)
    cfg.load_from = checkpoint_path(args.load_from or cfg.get("load_from"))
    randomness = dict(cfg.get("randomness") or {})
    if args.seed is not None or randomness.get("seed") is None:
        randomness["seed"] = DEFAULT_SEED if args.seed is None else args.seed
    if args.diff_seed:
        randomness["diff_rank_seed"] = True
    if args.deterministic:
        randomness["deterministic"] = True
    cfg.randomness = randomness
    if args.amp:
        cfg.optim_wrapper.type = "BFloat16OptimWrapper"
    if cfg.deepspeed:
        if importlib.util.find_spec("deepspeed") is None:
            raise RunError("DeepSpeed is not installed: pip install 'piip[train]', or train without it")
        cfg.runner_type = "ZeRORunner"
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise RunError(f"--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size")
        cfg.auto_scale_lr.enable = True
    if args.no_validate:
        cfg.update(val_cfg=None, val_dataloader=None, val_evaluator=None)
    check_data(cfg, ("train_dataloader", "val_dataloader"))
    check_classes(cfg, ("train_dataloader", "val_dataloader"))
    start_distributed(args.launcher, cfg.env_cfg)
    claim_work_dir(cfg, checkpoint_path(args.resume))
    RUNNERS.build(cfg).train()


def test(args: argparse.Namespace) -> dict[str, float]:
    """Evaluate as the options of :func:`parse_test` say, and return the metrics.

    Raises:
        RunError: The data or an option does not allow it.
    """
    cfg = load_config(args)
    cfg.load_from, cfg.resume = checkpoint_path(args.checkpoint), False
    # What evaluation does not need is not built, and its data need not be there.
    for key in ("train_dataloader", "train_cfg", "optim_wrapper", "val_dataloader", "val_cfg", "val_evaluator"):
        cfg[key] = None
    cfg.param_scheduler = None
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if args.eval:
        _choose_metrics(evaluators, args.eval)
    if args.out:
        if not args.out.endswith((".pkl", ".pickle")):
            raise RunError(f"--out writes a pickle file: its name must end in .pkl, not {args.out!r}")
        dump = "DumpDetResults" if cfg.get("default_scope") == "mmdet" else "DumpResults"
        cfg.test_evaluator = [*evaluators, {"type": dump, "out_file_path": args.out}]
    if args.show_dir:
        _draw(cfg, args.show_dir)
    check_data(cfg, ("test_dataloader",))
    check_classes(cfg, ("test_dataloader",))
    start_distributed(args.launcher, cfg.env_cfg)
    return RUNNERS.build(cfg).test()


def checkpoint_path(path: str | None) -> str | None:
    """Return the directory with the model states inside a DeepSpeed checkpoint, any other path as it is."""
    tag = Path(path, "latest") if path else None
    if tag is None or not tag.is_file():
        return path
    return str(tag.with_name(tag.read_text(encoding="utf-8").strip()))


def _choose_metrics(evaluators: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    for evaluator in evaluators:
        field, known = _METRICS.get(evaluator["type"], (None, ()))
        if field is None:
            continue
        if unknown := [name for name in names if name not in known]:
            raise RunError(f"--eval: {evaluator['type']} has no metric {unknown[0]!r}; it has {', '.join(known)}")
        evaluator[field] = list(names)
        return
    raise RunError(f"--eval chooses among the metrics of {' or '.join(_METRICS)}, and the config uses neither")


def _draw(cfg: Config, folder: str) -> None:
    hook = cfg.get("default_hooks", {}).get("visualization")
    if hook is None:
        raise RunError("--show-dir needs the config's default_hooks.visualization, which is not set")
    hook.draw = True
    if hook.type == "DetVisualizationHook":
        hook.test_out_dir = str(Path(folder).resolve())  # else below the work dir
    else:
        cfg.visualizer.save_dir = folder
