"""Commands of several processes: one that does not end says where each of its processes stands."""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil


def run_command(
    command: Sequence[object], cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 500
) -> subprocess.CompletedProcess[str]:
    """Run a command as `subprocess.run` does, and take its output.

    Raises:
        AssertionError: It took more than `timeout` seconds. The message has its output, which ends with the stacks of
            the Python processes that it started; none of them stays behind.
    """
    given: dict[str, Any] = {**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"}
    words = [str(word) for word in command]
    with subprocess.Popen(
        words, cwd=cwd, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # The children first: their launcher would end them at the first failure, before they can speak.
            family = [*psutil.Process(process.pid).children(recursive=True)[::-1], psutil.Process(process.pid)]
            for action in (psutil.Process.suspend, lambda p: p.send_signal(signal.SIGABRT), psutil.Process.resume):
                for member in family:
                    if member.is_running():
                        action(member)
            psutil.wait_procs(family, timeout=10)
            for member in family:
                if member.is_running():
                    member.kill()
            out, err = process.communicate()
            raise AssertionError(f"{words} did not end in {timeout:g} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(words, process.returncode, out, err)
