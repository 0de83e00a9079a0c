"""Options, schedule, parameter groups, losses: what a run is made of."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from piip import Classifier
from piip.errors import RunError
from piip.optim import classifier_groups
from piip_cls.config import CONFIGS, load_config
from piip_cls.options import REFUSED, SCHEDULES, build_parser, parse
from piip_cls.recipe import Schedule, build_loss, build_mixup, build_model, build_optimizer, cosub_loss, soft_targets

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
README = [
    "--model x --data-path d --batch-size 128 --lr 3e-5 --epochs 20 --weight-decay 0.1 --reprob 0.0 --seed 0",
    "--unscale-lr --no-repeated-aug --from_scratch_lr_ratio 10 --output_dir exp",
]
COMMAND = " ".join(README).split()
# Of the original's options: those without a name here that are refused, or that say how processes find each other.
GONE = {re.sub("-", "_", name[2:]) for name in REFUSED}
OURS = {"device"}  # decided by the machine


def tiny(**options) -> Classifier:
    branches = [
        {"arch": "vit", "resolution": side, "options": {
            "embed_dim": 32, "depth": 2, "num_heads": 2, "pos_grid": (side // 16, side // 16), "pos_prefix": 1,
            "class_token": True}}
        for side in (32, 48)
    ]  # fmt: skip
    return Classifier(
        {"branches": branches, "interactions": 2, "heads": 2, "head": "branches"}, num_classes=3, **options
    )


@pytest.mark.parametrize(("words", "column"), [(COMMAND, "readme_command"), (COMMAND[:4], "defaults")])
def test_options_and_defaults_are_the_originals(words, column):
    expected = json.loads((REFERENCE / "cls_main_args.json").read_text())[column]
    args = vars(parse(words))
    missing = set(expected) - set(args) - GONE
    assert not missing - {"lr_noise"}
    told = {"model", "data_path", "output_dir"} if column == "defaults" else set()
    for name in set(expected) & set(args) - GONE - OURS - told:
        assert args[name] == expected[name], name


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_options_that_did_nothing_are_refused(option, capsys):
    with pytest.raises(SystemExit) as exit:
        parse([*COMMAND, option.replace("-", "_").replace("__", "--", 1), "1"])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{option} is an old option; {REFUSED[option]}" in message


def test_a_configs_recipe_changes_defaults_and_the_command_line_wins():
    recipe = load_config("piip_3branch_scratch-b_512-256-128_merged").recipe
    args = parse(["--model", "x", "--data-path", "d", "--epochs", "7"], recipe)
    assert (args.opt, args.epochs, args.bce_loss, args.model_ema) == ("lamb", 7, True, False)
    with pytest.raises(SystemExit):
        parse(["--model", "x", "--data-path", "d"], {"epoch": 3})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_builds_and_explains_itself(path):
    config = load_config(path.stem)
    with torch.device("meta"):
        model = Classifier(**config.model)
    assert parse(["--model", "x", "--data-path", "d"], config.recipe)
    source = path.read_text()
    assert f"sh dist_train.sh {path.stem} " in source
    sides = [int(side) for side in re.findall(r"\d{2,3}(?=[-_]|$)", path.stem)]
    assert sorted(sides) == sorted(model.pyramid.resolutions)


def test_table_13(capsys):
    """Paper, appendix A.3: parameters of the parts of the pyramid that is trained from scratch, in millions."""
    with torch.device("meta"):
        model = Classifier(**load_config("piip_3branch_scratch-b_512-256-128_merged").model)
    parts = [*model.pyramid.branches, model.pyramid.stages, model.merge]
    assert [round(sum(p.numel() for p in part.parameters()) / 1e6, 1) for part in parts] == [59.6, 15.1, 4.0, 21.2, 0.3]


def learning_rates(*options: str) -> list[tuple[float, float]]:
    args = parse([*COMMAND, *options])
    optimizer = build_optimizer(tiny(readout="mean"), args, processes=8)
    schedule = Schedule(optimizer, args)
    rates = []
    for epoch in range(args.epochs):
        schedule.start(epoch)
        rates.append(tuple(sorted({group["lr"] for group in optimizer.param_groups})))
    return [(r[0], r[-1]) for r in rates]


def test_the_legacy_schedule_is_the_originals():
    with (REFERENCE / "cls_lr_schedule.csv").open() as file:
        _, *rows = csv.reader(file)
    expected = [(float(one), float(ten)) for _, one, ten in rows]
    assert learning_rates("--legacy-recipe") == [pytest.approx(pair, rel=1e-12) for pair in expected]
    # Ours is the same without the lag of one epoch.
    assert learning_rates()[:-1] == [pytest.approx(pair, rel=1e-12) for pair in expected[1:]]


def test_the_learning_rate_scales_with_the_batch():
    args = parse(["--model", "x", "--data-path", "d", "--batch-size", "64", "--lr", "0.1"])
    assert build_optimizer(tiny(), args, processes=4).param_groups[0]["lr"] == pytest.approx(0.1 * 64 * 4 / 512)


@pytest.mark.parametrize("head", ["branches", "merged"])
def test_parameter_groups(head):
    model = tiny(head=head)
    groups = classifier_groups(model, 10)
    assert set(groups) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, group in groups.items():
        own = name.startswith(("pyramid.branches.", "norm.", "head.") if head == "branches" else "pyramid.branches.")
        assert group.lr_scale == (1 if own else 10), name
        assert group.decay == (name.endswith("weight") and "norm" not in name and model.get_parameter(name).ndim > 1)
    assert all(group.decay for group in classifier_groups(model, 10, legacy=True).values())
    by_timm = classifier_groups(model, 1, legacy=True)
    assert {name for name, group in by_timm.items() if not group.decay} == {
        name for name in by_timm if model.get_parameter(name).ndim <= 1
    }


def test_soft_targets_are_those_of_mixup():
    args = parse([*COMMAND, "--mixup", "1e-9", "--cutmix", "0"])
    _, expected = build_mixup(args, 4)(torch.rand(2, 3, 8, 8), torch.tensor([1, 3]))
    torch.testing.assert_close(soft_targets(torch.tensor([1, 3]), 4, 0.1), expected, rtol=0, atol=1e-6)
    assert build_mixup(parse([*COMMAND, "--mixup", "0", "--cutmix", "0"]), 4) is None
    with pytest.raises(RunError, match="--batch-size 7: mixup pairs images"):
        build_mixup(parse([*COMMAND, "--batch-size", "7"]), 4)


def test_losses():
    logits, targets = torch.randn(4, 5), torch.rand(4, 5).softmax(1)
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(build_loss(parse(COMMAND))(logits, targets), expected)
    hot = F.one_hot(torch.tensor([0, 1, 2, 3]), 5) * 0.9
    binary = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(
        build_loss(parse([*COMMAND, "--bce-loss", "--smoothing", "0"]))(logits, hot), binary(logits, (hot > 0).float())
    )
    half = F.one_hot(torch.tensor([0, 1]), 5).float()
    a, b = logits[:2], logits[2:]
    cross = binary(a, b.sigmoid()) + binary(b, a.sigmoid())
    torch.testing.assert_close(cosub_loss(logits, half), 0.25 * (binary(a, half) + binary(b, half) + cross))


def refused(capsys, *options: str, recipe: dict | None = None) -> str:
    """The line that says why options are refused."""
    with pytest.raises(SystemExit) as exit:
        parse([*COMMAND, *options], recipe)
    message = capsys.readouterr().err
    assert exit.value.code == 2
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize("option", ["--bce-loss", "--cosub"])
def test_binary_losses_take_no_smoothing(option, capsys):
    """Every class would be a right one: the loss counts all targets above 0."""
    message = refused(capsys, option)
    assert f"{option} takes every class with a target above 0" in message
    assert "--smoothing 0.1 lifts all of them above 0: give --smoothing 0 (" in message
    assert (soft_targets(torch.tensor([1]), 3, parse([*COMMAND, option, "--smoothing", "0"]).smoothing) > 0).sum() == 1
    assert parse([*COMMAND, option], {"smoothing": 0.0})
    assert parse([*COMMAND, option], check=False)


def test_unknown_names_are_refused(capsys):
    assert "--opt: unknown optimizer 'adamv' (did you mean adam" in refused(capsys, "--opt", "adamv")
    assert "unknown optimizer 'foo_adamw'" in refused(capsys, "--opt", "foo_adamw")
    assert "argument --sched: invalid choice: 'cosin'" in refused(capsys, "--sched", "cosin")
    assert "argument --sched: invalid choice: 'none'" in refused(capsys, "--sched", "none")
    assert "argument --remode: invalid choice: 'pixels'" in refused(capsys, "--remode", "pixels")
    # A recipe's values are no better checked by argparse.
    assert "unknown --sched 'cosin' (did you mean cosine?)" in refused(capsys, recipe={"sched": "cosin"})
    assert "--opt: unknown optimizer 'lamp' (did you mean lamb" in refused(capsys, recipe={"opt": "lamp"})


@pytest.mark.parametrize("name", ["adamw", "AdamW", "lookahead_adamw", "lamb", "sgd"])
def test_optimizers_of_timm(name):
    assert build_optimizer(tiny(), parse([*COMMAND, "--opt", name]), processes=1).param_groups


def test_an_optimizer_that_does_not_take_the_options():
    with pytest.raises(RunError, match=r"--opt adamw does not work here .*\(Invalid beta parameter at index 1: 2.0\)"):
        build_optimizer(tiny(), parse([*COMMAND, "--opt-betas", "0.9", "2"]), processes=1)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_timm(name):
    """Each one starts, and says so in one line where it does not take the options."""
    args = parse([*COMMAND, "--sched", name, "--decay-epochs", "5"])
    optimizer = build_optimizer(tiny(), args, processes=1)
    Schedule(optimizer, args).start(args.warmup_epochs + 1, 0.0)
    assert max(group["lr"] for group in optimizer.param_groups) > 0


def test_a_schedule_that_does_not_take_the_options(monkeypatch):
    args = parse([*COMMAND, "--sched", "wsd", "--decay-epochs", "30"])
    optimizer = build_optimizer(tiny(), args, processes=1)
    with pytest.raises(
        RunError, match="--sched wsd does not work with the options given for it: wsd schedule requires"
    ):
        Schedule(optimizer, args)
    monkeypatch.setattr("piip_cls.recipe.create_scheduler_v2", lambda *_, **__: (None, 20))
    with pytest.raises(RunError, match="this version of timm has no --sched wsd: pip install -U timm"):
        Schedule(optimizer, args)


def test_a_config_that_does_not_fit(tmp_path):
    with pytest.raises(RunError, match=r"unknown config 'piip_3branch_tsb'.*did you mean piip_3branch_tsb_368"):
        load_config("piip_3branch_tsb")
    wrong = tmp_path / "wrong.py"
    wrong.write_text("model = dict(spec='cls-deit1-tsb-368-192-128')\npretraned = 'x'")
    with pytest.raises(RunError, match=r"unknown setting 'pretraned' .did you mean pretrained"):
        load_config(str(wrong))
    wrong.write_text("model = 1")
    with pytest.raises(RunError, match=r"needs model = dict\(spec=...\)"):
        load_config(str(wrong))
    wrong.write_text("model = dict(")
    with pytest.raises(RunError, match=r"wrong.py cannot be read: SyntaxError"):
        load_config(str(wrong))
    wrong.write_text("model = dict(spec='cls-deit1-tsb-368-192-128', num_classes=1000)")
    with pytest.raises(RunError, match="num_classes=1000, the data have 3 classes"):
        build_model(load_config(str(wrong)), parse(COMMAND), 3)


def test_help_names_every_option():
    assert "--legacy-recipe" in build_parser().format_help()
