"""The pages under docs name code and tests that exist, and the README's code runs as it is printed."""

import ast
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NAMED = re.compile(r"`([\w/.-]+\.py):([\w.]+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)")


def names_in(path: Path) -> set[str]:
    """Every class, function, method, field and constant of a file, dotted."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found.add(prefix + node.name)
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                found.add(prefix + node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.With):
                visit(node.body, prefix)

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_and_tests_that_are_named_exist(page):
    named = NAMED.findall(page.read_text(encoding="utf-8"))
    for file, name in named:
        assert (ROOT / file).is_file(), file
        assert name in names_in(ROOT / file), f"{file} has no {name}"
    assert named or page.stem == "faq" or page.stem == "performance"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert not target or (page.parent / target).exists(), target


def test_every_quirk_has_a_test_and_every_equation_code():
    ledger = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = [line for line in ledger.splitlines() if line.startswith("| ") and not line.startswith(("| what", "|---"))]
    assert len(rows) >= 25
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py:test_\w+`", row), row
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    assert all(f"equation {number}" in method for number in (1, 2, 3, 4))


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_code_of_the_readme_is_code():
    found = blocks()
    assert len(found) >= 4
    for block in found:
        compile(block, "README.md", "exec")


@pytest.mark.slow
def test_the_script_of_the_readme_runs_as_printed(tmp_path, monkeypatch, capsys):
    """With weights of the released form in place of the download."""
    from piip.checkpoint import to_released
    from piip.models import create_model
    from piip.zoo import download

    (script,) = [block for block in blocks() if "pretrained=True" in block]
    assert len([line for line in script.splitlines() if line]) <= 5
    (name,) = re.findall(r'create_model\("([\w-]+)", pretrained=True', script)
    torch.save({"state_dict": to_released(create_model(name))}, tmp_path / "released.pth")
    monkeypatch.setattr(download, "download_released", lambda row, folder: tmp_path / "released.pth")
    exec(script, {})
    assert capsys.readouterr().out == "[(1, 768, 168, 392), (1, 768, 84, 196), (1, 768, 42, 98), (1, 768, 21, 49)]\n"
