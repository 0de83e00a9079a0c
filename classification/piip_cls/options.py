"""The command line of `main.py`: the original's options, each of which does what it says or is refused."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from timm.optim import list_optimizers

from piip.errors import unknown
from piip.integrations.command import Parser, Refused

# Options of the original that its code never read, or that could not work, and what to do instead.
REFUSED = {
    "--drop": "it had no effect: the models have no dropout",
    "--drop-path": "it had no effect: set drop_path of each branch in the config's spec",
    "--input-size": "it had no effect: the size is that of the config's largest branch",
    "--finetune": "it had no effect: start from a classifier's weights with --load-from FILE",
    "--attn-only": "it had no effect: there is no such mode",
    "--convert-21k-head": "it had no effect: heads of other classes are replaced by new ones",
    "--teacher-model": "no teacher was ever built: distillation is not supported",
    "--teacher-path": "no teacher was ever built: distillation is not supported",
    "--distillation-type": "no teacher was ever built: distillation is not supported",
    "--distillation-alpha": "no teacher was ever built: distillation is not supported",
    "--distillation-tau": "no teacher was ever built: distillation is not supported",
    "--start-epoch": "--resume continues where the run was",
    "--distributed": "start several processes with torchrun or sh dist_train.sh instead",
    "--world-size": "start several processes with torchrun or sh dist_train.sh instead",
    "--dist-url": "torchrun and Slurm say where the other processes are",
}

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "plateau", "wsd", "rsqrt", "constant")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


def _switch(group: Any, name: str, default: bool, what: str) -> None:
    group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=what)


def build_parser(prog: str = "main.py") -> Parser:
    """Return the parser; defaults are the original's."""
    parser = Parser(prog=prog, description="Train or evaluate an image classifier.", allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="name of a file in configs/, or the path of one")
    add("--output-dir", default="exp", help="folder of checkpoints and logs")
    add("--resume", default="", metavar="FILE", help="continue the run of this checkpoint; with --eval: evaluate it")
    add("--load-from", default="", metavar="FILE", help="start a new run from these weights")
    add("--drop-head", action="store_true", help="leave the file's head out, for another number of classes")
    add("--pretrained", metavar="FOLDER", help="folder of the branches' pretrained files, or 'none' (see the config)")
    add("--eval", action="store_true", help="evaluate only; writes evaluation.json")
    add("--seed", type=int, default=0)
    add("--device", choices=("cuda", "cpu"), help="by default cuda where there is a GPU")
    add("--launcher", choices=("none", "pytorch", "slurm"), default="none", help="how several processes were started")
    add("--num-workers", type=int, default=10, help="data-loading processes")
    _switch(parser, "pin-mem", True, "pinned memory for the way to the GPU")
    add("--dist-eval", action="store_true", help=argparse.SUPPRESS)  # always shared, and always exact
    add("--local-rank", default="0", help=argparse.SUPPRESS)
    for option, instead in REFUSED.items():
        add(option, action=Refused, instead=instead)

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data-path", required=True, help="ImageNet: folder with train/CLASS/* and val/CLASS/*")
    add("--data-set", choices=("CIFAR", "IMNET", "INAT", "INAT19"), default="IMNET")
    add("--inat-category", choices=INAT_CATEGORIES, default="name", help="what the classes of iNaturalist are")
    add("--eval-crop-ratio", type=float, default=1.0, help="share of the resized image that the centre crop keeps")
    add("--eval-batch-size", type=int, default=-1, help="per process; -1 for 1.5 times --batch-size")

    group = parser.add_argument_group("schedule")
    add = group.add_argument
    add("--batch-size", type=int, default=64, help="per process")
    add("--epochs", type=int, default=300)
    add("--accum-iter", type=int, default=1, help="batches per step of the optimizer")
    add("--eval-interval", type=int, default=1, help="epochs between evaluations; the last one is always evaluated")
    add("--lr", type=float, default=5e-4, help="for a total batch of 512, unless --unscale-lr")
    add("--unscale-lr", action="store_true", help="take --lr as it is, whatever the batch")
    add("--from-scratch-lr-ratio", type=float, default=1.0, help="learning rate of what is not pretrained, as a factor")
    add("--legacy-recipe", action="store_true", help="one epoch late, and weight decay on everything (the original)")
    add("--sched", choices=SCHEDULES, default="cosine", help="a scheduler of timm's")
    add("--warmup-lr", type=float, default=1e-6)
    add("--warmup-epochs", type=int, default=5)
    _switch(group, "warmup-prefix", False, "start the schedule after the warm-up instead of beneath it")
    add("--min-lr", type=float, default=1e-5)
    add("--decay-epochs", type=float, default=30)
    add("--decay-rate", "--dr", type=float, default=0.1)
    add("--cooldown-epochs", type=int, default=10)
    add("--patience-epochs", type=int, default=10)
    add("--lr-noise", type=float, nargs="+")
    add("--lr-noise-pct", type=float, default=0.67)
    add("--lr-noise-std", type=float, default=1.0)

    group = parser.add_argument_group("optimizer and loss")
    add = group.add_argument
    add("--opt", default="adamw", help="an optimizer of timm's")
    add("--opt-eps", type=float, default=1e-8)
    add("--opt-betas", type=float, nargs="+")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=0.05)
    add("--clip-grad", type=float, help="largest norm of the gradient")
    add("--smoothing", type=float, default=0.1, help="label smoothing, spread over all classes")
    add("--bce-loss", action="store_true", help="binary cross-entropy (DeiT III); with --smoothing 0")
    add("--cosub", action="store_true", help="co-training of two sub-models (arXiv 2212.04884); with --smoothing 0")
    _switch(group, "train-mode", True, "--no-train-mode trains without drop path")
    add("--disable-autocast", action="store_true", help="float32 on GPUs too")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="of autocast on GPUs")
    _switch(group, "model-ema", True, "keep a moving average of the weights, and evaluate it too")
    add("--model-ema-decay", type=float, default=0.99996)
    add("--model-ema-force-cpu", action="store_true")

    group = parser.add_argument_group("augmentation")
    add = group.add_argument
    add("--color-jitter", type=float, default=0.3, help="unused with --aa; used with --ThreeAugment")
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's auto-augment policy, or 'none'")
    add("--ThreeAugment", action="store_true", help="grey, solarise or blur, and colour jitter (DeiT III)")
    add("--src", action="store_true", help="simple random crop (DeiT III)")
    add("--train-interpolation", default="bicubic", choices=("random", "bilinear", "bicubic"))
    add("--scale", type=float, nargs=2, default=(0.08, 1.0), help="share of the image that random crops take")
    add("--ratio", type=float, nargs=2, default=(3 / 4, 4 / 3), help="aspect ratio of random crops")
    add("--hflip", type=float, default=0.5, help="probability of a mirrored image")
    add("--no-aug", action="store_true", help="no augmentation: resize and centre crop")
    _switch(group, "repeated-aug", True, "several augmentations of an image per epoch")
    add("--reprob", type=float, default=0.25, help="probability of random erasing")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel", help="what random erasing fills in")
    add("--recount", type=int, default=1)
    add("--resplit", action="store_true", help="no random erasing in the first augmentation split")
    add("--mixup", type=float, default=0.8)
    add("--cutmix", type=float, default=1.0)
    add("--cutmix-minmax", type=float, nargs="+")
    add("--mixup-prob", type=float, default=1.0)
    add("--mixup-switch-prob", type=float, default=0.5)
    add("--mixup-mode", choices=("batch", "pair", "elem"), default="batch")

    group = parser.add_argument_group("logs, beside log.txt")
    _switch(group, "tensorboard", True, "TensorBoard's event files")
    group.add_argument("--wandb", metavar="PROJECT", help="report to this project of Weights & Biases")
    return parser


def parse(argv: Sequence[str], recipe: Mapping[str, Any] | None = None, check: bool = True) -> argparse.Namespace:
    """Return the options.

    Args:
        argv: The command line; `_` and `-` are the same in a name.
        recipe: Defaults of a config, by the options' names with `_`.
        check: Whether to refuse what does not fit together; not before the config's recipe is known.
    """
    parser = build_parser()
    known = {action.dest for action in parser._actions}
    for name in recipe or {}:
        if name not in known:
            parser.error(f"the config's recipe has {name!r}, which is no option")
    parser.set_defaults(**(recipe or {}))
    args = parser.parse_args([_dashes(word) for word in argv])
    if check:
        _check(parser, args)
    return args


def _check(parser: Parser, args: argparse.Namespace) -> None:
    for action in parser._actions:  # argparse leaves the choices of defaults unchecked, so those of a recipe
        value = getattr(args, action.dest, None)
        if action.choices is not None and value is not None and value not in action.choices:
            parser.error(unknown(action.option_strings[0], value, action.choices))
    for name in ("batch_size", "epochs", "accum_iter", "eval_interval"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be 1 or more")
    if not 0 < args.eval_crop_ratio <= 1:
        parser.error(f"--eval-crop-ratio is {args.eval_crop_ratio}: it must be above 0, and 1 at most")
    if args.eval and not (args.resume or args.load_from):
        parser.error("--eval needs weights: --resume FILE")
    if args.resume and args.load_from:
        parser.error("--resume continues a run, --load-from starts one: give one of them")
    if args.drop_head and args.resume and not args.eval:
        parser.error("--drop-head goes with --load-from: a run that is continued has its head already")
    optimizers = list_optimizers(exclude_filters=["adahessian"])  # which needs the gradients' own gradients
    prefix, _, name = args.opt.lower().rpartition("_")
    if name not in optimizers or prefix not in ("", "lookahead"):
        parser.error(f"--opt: {unknown('optimizer', args.opt, optimizers)}")
    for loss in ("bce_loss", "cosub"):
        if getattr(args, loss) and args.smoothing:
            parser.error(
                f"--{loss.replace('_', '-')} takes every class with a target above 0 for a right one, and --smoothing "
                f"{args.smoothing} lifts all of them above 0: give --smoothing 0"
            )


def _dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, sign, value = word.partition("=")
    return name.replace("_", "-") + sign + value
