"""The package as it is installed: what `import piip` costs, and what the extras and the constraints promise."""

import ast
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"
PYTHONS = ("3.10", "3.11", "3.12")
FRAMEWORKS = ("mmengine", "mmcv", "mmdet", "mmseg", "transformers", "deepspeed", "cv2", "pycocotools", "fvcore")


def imported_by(statement: str) -> dict[str, float]:
    """Run a statement in a fresh interpreter: top-level modules it loads, and under `seconds` its time beyond torch."""
    script = (
        "import sys, time, torch, timm; start = time.perf_counter()\n"
        f"{statement}\n"
        "print({**{name.partition('.')[0]: 0.0 for name in sys.modules}, 'seconds': time.perf_counter() - start})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout)


def pins(python: str) -> dict[str, str]:
    """Pinned versions for one Python on Linux, by canonical name."""
    environment = {"python_version": python, "sys_platform": "linux", "platform_system": "Linux"}
    found: dict[str, str] = {}
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            found[name] = pin.version
    return found


@pytest.fixture
def installed() -> None:
    """Skip what asks the installed distribution where the tests run from a bare source tree."""
    try:
        metadata("piip")
    except PackageNotFoundError:
        pytest.skip("piip is not installed in this Python: run `make setup` and use .venv")


def test_import_is_light() -> None:
    loaded = imported_by("import piip")
    assert not set(FRAMEWORKS) & set(loaded)
    assert loaded["seconds"] < 3.0, f"import piip took {loaded['seconds']:.1f} s on top of torch and timm"


@pytest.mark.usefixtures("installed")
def test_version_has_one_source() -> None:
    import piip

    assert version("piip") == piip.__version__


@pytest.mark.usefixtures("installed")
def test_core_needs_torch_and_timm_only() -> None:
    core = [Requirement(line) for line in requires("piip") or [] if "extra" not in line]
    assert {requirement.name for requirement in core} == {"torch", "timm"}


@pytest.mark.usefixtures("installed")
def test_extras_of_the_readme_exist() -> None:
    extras = set(metadata("piip").get_all("Provides-Extra") or [])
    assert {"det", "seg", "cls", "llava", "train", "dev", "all"} <= extras


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_bound(python: str) -> None:
    pinned = pins(python)
    for requirement in map(Requirement, requires("piip") or []):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is in setup.py and not in {CONSTRAINTS.name} for Python {python}"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} excludes the tested {pinned[name]}"


def test_constraints_name_no_path_or_host() -> None:
    assert not re.search(r"//|@|^-|^\.?/", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.skipif(not (Path(sys.prefix) / ".piip-setup").is_file(), reason="not an environment of `make setup`")
def test_one_opencv() -> None:
    assert version("opencv-python").endswith("+headless"), "the full OpenCV is installed: run `make setup` again"


def test_task_folders_do_not_shadow_frameworks() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert not folders & {"mmdet", "mmseg", "mmcv", "mmengine", "timm", "transformers"}
    for task in ("mmdetection", "mmsegmentation", "classification", "llava"):
        assert not (ROOT / task / "__init__.py").exists()
