"""The command lines of mmdetection/tools, as they are typed: options, old spellings, errors, shell scripts."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "mmdetection" / "tools"
TOY = ROOT / "tests" / "integrations" / "toy"


@pytest.fixture
def run(tmp_path):
    """A function that runs a command with the toy task importable, in `tmp_path` unless told otherwise."""

    def start(*command, cwd=tmp_path, **variables):
        path = os.pathsep.join(filter(None, (str(TOY), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **variables}
        command = [str(part) for part in command]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)

    return start


def error_of(parse, arguments, capsys) -> str:
    """The one line that a parser prints before it exits."""
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--resume-from", "a.pth"], ["--resume", "a.pth"]),
        (["--auto-resume"], ["--resume"]),
        (["--options", "a.b=1", "c=[1,2]"], ["--cfg-options", "a.b=1", "c=[1,2]"]),
    ],
)
def test_old_training_options_mean_the_new_ones(old, new):
    from piip.integrations.cli import parse_train

    assert parse_train(["c.py", *old]) == parse_train(["c.py", *new])
    assert parse_train(["c.py", *old]) != parse_train(["c.py"])


def test_values_of_cfg_options():
    from piip.integrations.cli import parse_train

    args = parse_train(["c.py", "--cfg-options", "a.b=1", "c=[1,2]", "d=x,y", "e='[(1,2),(3,4)]'", "f=None", "g=a=b"])
    assert args.cfg_options["a.b"] == 1
    assert args.cfg_options["c"] == [1, 2]
    assert args.cfg_options["d"] == ["x", "y"]
    assert args.cfg_options["e"] == [(1, 2), (3, 4)]
    assert args.cfg_options["f"] is None
    assert args.cfg_options["g"] == "a=b"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: config"),
        (["c.py", "--nonsense", "3"], "unrecognized arguments: --nonsense"),
        (["c.py", "--gpus", "8"], "--gpus is an old option; start as many processes as GPUs instead: sh tools/dist_tr"),
        (["c.py", "--gpu-ids", "0", "1"], "CUDA_VISIBLE_DEVICES"),
        (["c.py", "--cfg-options", "lr"], "takes KEY=VALUE pairs, not 'lr'"),
        (["c.py", "--cfg-options", "a={'b': 1, 'c': 2}"], "takes no dict: set its entries one by one"),
        (["c.py", "--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_wrong_training_options_are_one_line(arguments, said, capsys):
    from piip.integrations.cli import parse_train

    assert said in error_of(parse_train, arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["c.py"], "required: checkpoint"),
        (["c.py", "a.pth", "--format-only"], "test_evaluator.format_only=True"),
        (["c.py", "a.pth", "--show"], "--show-dir DIR"),
        (["c.py", "a.pth", "--tta"], "unrecognized arguments: --tta"),
    ],
)
def test_wrong_evaluation_options_are_one_line(arguments, said, capsys):
    from piip.integrations.cli import parse_test

    assert said in error_of(parse_test, arguments, capsys)


@pytest.fixture
def evaluated(monkeypatch, tmp_path):
    """A function that returns the config with which `tools/test.py` would build its runner."""
    from mmengine.registry import RUNNERS

    from piip.integrations import cli

    class Built(Exception):
        pass

    def keep(cfg):
        raise Built(cfg)

    monkeypatch.setattr(RUNNERS, "build", keep)
    (tmp_path / "c.py").write_text(
        "train_dataloader = dict(dataset=dict(data_root='nowhere', ann_file='a.json'))\n"
        "test_dataloader = dict(dataset=dict(type='CocoDataset'))\n"
        "test_evaluator = dict(type='CocoMetric', metric='bbox')\n"
        "default_scope = 'mmdet'\n"
        "default_hooks = dict(visualization=dict(type='DetVisualizationHook'))\n"
        "optim_wrapper = dict(type='OptimWrapper')\n"
    )

    def evaluate(*options, checkpoint="a.pth"):
        with pytest.raises(Built) as built:
            cli.test(cli.parse_test([str(tmp_path / "c.py"), str(checkpoint), *options]))
        return built.value.args[0]

    return evaluate


def test_original_evaluation_command(evaluated, tmp_path):
    step = tmp_path / "epoch_12.pth" / "global_step5"
    step.mkdir(parents=True)
    (step.parent / "latest").write_text("global_step5")
    cfg = evaluated("--eval", "bbox", "segm", "--disable_deepspeed", checkpoint=step.parent)
    assert cfg.test_evaluator.metric == ["bbox", "segm"]
    assert cfg.load_from == str(step)
    assert cfg.train_dataloader is None and cfg.optim_wrapper is None  # its data need not be there


def test_predictions_and_pictures(evaluated, tmp_path):
    cfg = evaluated("--out", "p.pkl", "--show-dir", str(tmp_path / "pictures"))
    assert [evaluator["type"] for evaluator in cfg.test_evaluator] == ["CocoMetric", "DumpDetResults"]
    assert cfg.default_hooks.visualization.test_out_dir == str(tmp_path / "pictures")
    assert cfg.default_hooks.visualization.draw


@pytest.mark.parametrize(
    ("options", "said"), [(["--eval", "mIoU"], "no metric 'mIoU'; it has bbox, segm"), (["--out", "p.json"], ".pkl")]
)
def test_evaluation_options_that_do_not_fit(evaluated, tmp_path, options, said):
    from piip.integrations import cli
    from piip.integrations.preflight import RunError

    with pytest.raises(RunError, match=said.replace(".", r"\.")):
        cli.test(cli.parse_test([str(tmp_path / "c.py"), "a.pth", *options]))


@pytest.fixture
def status(tmp_path, monkeypatch, capsys):
    """A function that runs a command line in this process and returns its exit status and last line of stderr."""
    from piip.integrations import cli

    monkeypatch.syspath_prepend(str(TOY))
    monkeypatch.chdir(tmp_path)

    def call(name, *arguments):
        run, parse = {"train": (cli.train, cli.parse_train), "test": (cli.test, cli.parse_test)}[name]
        code = cli.main(run, parse([str(argument) for argument in arguments]))
        return code, capsys.readouterr().err.splitlines()[-1]

    return call


def test_train_stop_and_test(run, status, tmp_path):
    """One run through its life: train, refuse to start over, continue, evaluate."""
    train = (sys.executable, TOOLS / "train.py", TOY / "toy.py")
    first = run(*train, "--cfg-options", "train_cfg.max_epochs=1")
    assert first.returncode == 0, first.stderr
    code, line = status("train", TOY / "toy.py")
    assert code == 2 and line.startswith("error: work_dirs/toy already holds a run: add --resume")
    code, line = status("train", TOY / "toy.py", "--resume", "--amp")
    assert code == 2 and "optim_wrapper.type is 'OptimWrapper' there and 'BFloat16OptimWrapper' here" in line
    resumed = run(*train, "--resume", "--no-validate", "--cfg-options", "train_cfg.max_epochs=2")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed epoch: 1" in resumed.stdout and "Epoch(val)" not in resumed.stdout
    tested = run(sys.executable, TOOLS / "test.py", TOY / "toy.py", "work_dirs/toy/epoch_2.pth", "--out", "p.pkl")
    assert tested.returncode == 0, tested.stderr
    assert "count: 4" in tested.stdout and (tmp_path / "p.pkl").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "nowhere.py"], "error: there is no config nowhere.py"),
        (["test", TOY / "toy.py", "no.pth"], "error: there is no checkpoint at no.pth"),
        (
            ["train", TOY / "toy.py", "--cfg-options", "train_dataloader.dataset.ann_file=no.json"],
            "error: train_dataloader.dataset.ann_file: no.json does not exist",
        ),
        (["train", TOY / "toy.py", "--auto-scale-lr"], "error: --auto-scale-lr: "),
        (
            ["test", TOY / "toy.py", "no.pth", "--show-dir", "d"],
            "error: --show-dir needs the config's default_hooks.vis",
        ),
        (["test", TOY / "toy.py", "no.pth", "--eval", "bbox"], "error: --eval chooses among the metrics of CocoMetric"),
    ],
)
def test_errors_are_one_line_and_a_status(status, command, said):
    code, line = status(*command)
    assert code == 2
    assert line.startswith(said)


def test_an_error_reaches_the_shell(run):
    done = run(sys.executable, TOOLS / "train.py", TOY / "toy.py", "--load-from", "no.pth")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: there is no checkpoint at no.pth"


@pytest.fixture
def fake_srun(tmp_path):
    """A folder with an `srun` that prints its arguments, one per line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@" "port=$MASTER_PORT"\nexit 7\n')
    (folder / "srun").chmod(stat.S_IRWXU)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["c.py", "--launcher", "slurm"]),
        (["work dir"], ["c.py", "--work-dir", "work dir", "--launcher", "slurm"]),
        (["--amp", "--seed", "1"], ["c.py", "--amp", "--seed", "1", "--launcher", "slurm"]),
        (["w", "--resume"], ["c.py", "--work-dir", "w", "--resume", "--launcher", "slurm"]),
    ],
)
def test_slurm_train(run, fake_srun, arguments, expected):
    done = run(
        "sh", TOOLS / "slurm_train.sh", "part", "job", "c.py", *arguments, PATH=fake_srun, GPUS="16", PORT="1234"
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 7
    assert lines[lines.index(sys.executable) + 3 : -1] == expected
    assert Path(lines[lines.index(sys.executable) + 2]).samefile(TOOLS / "train.py")
    assert {"--partition=part", "--job-name=job", "--ntasks=16", "--gres=gpu:8", "--ntasks-per-node=8"} <= set(lines)
    assert lines[-1] == "port=1234"


def test_slurm_test(run, fake_srun):
    variables = {"PATH": fake_srun, "GPUS": "4", "SRUN_ARGS": "--time=10 --exclusive", "CPUS_PER_TASK": "3"}
    done = run("sh", TOOLS / "slurm_test.sh", "part", "job", "c.py", "a.pth", "--eval", "bbox", **variables)
    lines = done.stdout.splitlines()
    assert {"--ntasks=4", "--gres=gpu:4", "--time=10", "--exclusive", "--cpus-per-task=3"} <= set(lines)
    assert lines[lines.index(sys.executable) + 3 : -1] == ["c.py", "a.pth", "--eval", "bbox", "--launcher", "slurm"]


@pytest.fixture
def fake_python(tmp_path):
    """A Python that prints its arguments, one per line."""
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 5\n')
    (tmp_path / "python").chmod(stat.S_IRWXU)
    return tmp_path / "python"


def test_dist_train_on_several_machines(run, fake_python, tmp_path):
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host", "PORT": "1234", "PYTHON": str(fake_python)}
    done = run("sh", TOOLS / "dist_train.sh", "my config.py", "8", "--amp", **variables)
    lines = done.stdout.splitlines()
    assert done.returncode == 5
    script = next(i for i, line in enumerate(lines) if line.endswith("train.py"))
    assert lines[:script] == [
        "-m", "torch.distributed.run", "--nnodes=2", "--node_rank=1", "--master_addr=host", "--master_port=1234",
        "--nproc_per_node=8",
    ]  # fmt: skip
    assert lines[script + 1 :] == ["my config.py", "--amp", "--launcher", "pytorch"]


def test_dist_test_from_the_task_folder(run, fake_python):
    done = run("sh", "tools/dist_test.sh", "c.py", "a.pth", "2", cwd=TOOLS.parent, PYTHON=str(fake_python))
    lines = done.stdout.splitlines()
    assert lines[2:4] == ["--standalone", "--nproc_per_node=2"]
    assert lines[5:] == ["c.py", "a.pth", "--launcher", "pytorch"]


@pytest.mark.parametrize(
    ("command", "variables", "said"),
    [
        (["dist_train.sh", "c.py"], {}, "usage: dist_train.sh CONFIG GPUS"),
        (["dist_train.sh", "c.py", "--amp"], {}, "must be 1 or more, not '--amp'"),
        (["dist_test.sh", "c.py", "2"], {}, "usage: dist_test.sh CONFIG CHECKPOINT GPUS"),
        (["dist_train.sh", "c.py", "2"], {"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
        (["slurm_train.sh", "part", "job"], {}, "usage: slurm_train.sh PARTITION JOB_NAME CONFIG"),
        (["slurm_test.sh", "part", "job", "c.py"], {}, "usage: slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT"),
    ],
)
def test_wrong_use_of_the_scripts_is_one_line(run, command, variables, said):
    done = run("sh", TOOLS / command[0], *command[1:], **variables)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert said in line


def test_slurm_launcher_without_cuda(run, tmp_path):
    """What srun would start, in one task; the real thing needs a cluster."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("with CUDA this is mmengine's own launcher")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\n")
    (tmp_path / "bin" / "scontrol").chmod(stat.S_IRWXU)
    variables = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_NODELIST": "localhost"}
    done = run(
        sys.executable, TOOLS / "train.py", TOY / "toy.py", "--launcher", "slurm",
        "--cfg-options", "train_cfg.max_epochs=1",
        PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", MASTER_PORT="29571", **variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
