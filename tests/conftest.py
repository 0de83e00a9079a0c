"""What every test gets: fixed seeds, and a stated reason where a device is missing."""

import random
from collections import Counter
from collections.abc import Iterable

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests where there is no GPU; torch is imported only where such a test is about to run."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start each test from the same random state, so that its result depends on no other test."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Sum up the reference cases in one line, from what `tests/reference/test_reference.py` records of each.

    Properties travel with the reports, so the line is the same when workers of pytest-xdist ran the cases.
    """
    reports = [r for group in terminalreporter.stats.values() for r in group if isinstance(r, pytest.TestReport)]
    line = reference_line(dict(report.user_properties) for report in reports if report.when == "call")
    if line is not None:
        terminalreporter.section("reference data")
        terminalreporter.line(line)


def reference_line(properties: Iterable[dict[str, object]]) -> str | None:
    """Return the summary line for the recorded properties of all tests, None where no reference case ran."""
    recorded = list(properties)
    passed = [values for values in recorded if "reference_case" in values]
    unsupported = Counter(values["reference_unsupported"] for values in recorded if "reference_unsupported" in values)
    if not passed and not unsupported:
        return None
    parts = [f"{len(passed)} cases passed"]
    for key, text in (
        ("reference_output", "output error"),
        ("reference_input_gradient", "input gradient"),
        ("reference_gradient_norm", "gradient norm"),
    ):
        if errors := [(values[key], values["reference_case"]) for values in passed if key in values]:
            worst, case = max(errors)
            parts.append(f"worst {text} {worst:.1e} ({case})")
    line = f"reference: {', '.join(parts)}"
    if unsupported:
        line += f"; unsupported: {', '.join(f'{name} ({count})' for name, count in sorted(unsupported.items()))}"
    return line
