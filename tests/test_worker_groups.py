"""The test suite itself: groups of tests share a process, and a dead process fails one test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import worker_groups

SUITE = {
    "pytest.ini": """
        [pytest]
        one_process =
            test_b.py test_d.py
            test_c.py
        """,
    "conftest.py": """
        import os, pytest

        @pytest.fixture(autouse=True)
        def record(request):
            with open("ran.txt", "a") as file:
                print(request.node.nodeid, os.getpid(), file=file)
        """,
    "test_a.py": """
        import os, signal

        def test_1(): pass
        def test_segmentation_fault(): os.kill(os.getpid(), signal.SIGSEGV)
        def test_2(): pass
        """,
    "test_b.py": """
        import os, pytest

        @pytest.mark.parametrize("i", range(6))
        def test_before(i): pass
        def test_abort(): os.abort()
        @pytest.mark.parametrize("i", range(6))
        def test_after(i): pass
        """,
    "test_c.py": """
        import pytest

        @pytest.mark.parametrize("i", range(9))
        def test_one(i): pass
        """,
    "test_d.py": """
        import pytest

        @pytest.mark.parametrize("i", range(6))
        def test_one(i): pass
        """,
    "test_e.py": """
        import os

        def test_last(): os._exit(0)
        """,
}
DEADLY = {
    "test_a.py::test_segmentation_fault",
    "test_b.py::test_abort",
    "test_e.py::test_last",
}


def run_suite(folder: Path, files: dict[str, str]) -> tuple[int, str, dict[str, list[str]]]:
    """Runs generated tests in two processes; returns exit status, output, and who ran each test."""
    for name, text in files.items():
        lines = text.splitlines()[1:]
        (folder / name).write_text("\n".join(line[8:] for line in lines))
    end = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "worker_groups", "-n2", "-v"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(worker_groups.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    ran: dict[str, list[str]] = {}
    for line in (folder / "ran.txt").read_text().splitlines():
        test, process = line.split()
        ran.setdefault(test, []).append(process)
    return end.returncode, end.stdout, ran


@pytest.mark.slow
def test_a_dead_process_fails_its_test_and_the_others_run_once(tmp_path: Path) -> None:
    for attempt in ("first", "second"):
        (folder := tmp_path / attempt).mkdir()
        status, output, ran = run_suite(folder, SUITE)
        # Seen once in about thirty runs, not explained: xdist itself ends with an internal error.
        if status != pytest.ExitCode.INTERNAL_ERROR:
            break
    assert status == 1, output
    assert "3 failed, 29 passed" in output
    assert len(ran) == 32
    assert {len(processes) for processes in ran.values()} == {1}
    for test in DEADLY:
        assert f"crashed while running '{test}'" in output
    assert "Fatal Python error: Segmentation fault" in output
    assert "Fatal Python error: Aborted" in output
    assert "in test_abort" in output  # the stack trace
    assert "It left no stack trace." in output  # os._exit

    def processes(*starts: str) -> set[str]:
        return {process for test, (process,) in ran.items() if test.startswith(starts)}

    assert len(processes("test_c.py")) == 1
    assert len(processes("test_b.py::test_before", "test_b.py::test_abort")) == 1
    assert len(processes("test_b.py::test_after", "test_d.py")) == 1


@pytest.mark.slow
def test_a_process_that_dies_outside_of_a_test_fails_the_session(tmp_path: Path) -> None:
    conftest = """
        import os, pathlib

        def pytest_sessionfinish(session):
            died = pathlib.Path("ran.txt")
            if hasattr(session.config, "workerinput") and not died.exists():
                died.touch()
                os.abort()
        """
    test = """
        def test_one(): pass
        """
    status, output, _ = run_suite(tmp_path, {"conftest.py": conftest, "test_a.py": test})
    assert status == 1
    assert "1 passed" in output
    assert "died outside of a test" in output
    assert "Fatal Python error: Aborted" in output
