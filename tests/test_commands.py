"""A test that waits for ever would only be known by its name: its processes say where they stand."""

import sys
import textwrap

import psutil
import pytest
from commands import run_command


def test_output_and_status():
    done = run_command([sys.executable, "-c", "import sys; print(1); sys.stderr.write('2'); sys.exit(3)"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "1\n", "2")


def test_each_process_of_a_command_that_does_not_end_shows_its_stack(tmp_path):
    (tmp_path / "child.py").write_text("import time\ndef stuck():\n    time.sleep(100)\nstuck()\n")
    parent = tmp_path / "parent.py"
    parent.write_text(
        textwrap.dedent(
            """
            import subprocess, sys
            def wait(child):
                open("pid", "w").write(str(child.pid))
                sys.exit(child.wait())
            wait(subprocess.Popen([sys.executable, "child.py"], start_new_session=True))
            """
        )
    )
    with pytest.raises(AssertionError, match=r"(?s)did not end in 3 s.*in stuck.*in wait"):
        run_command([sys.executable, parent], cwd=tmp_path, timeout=3)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
