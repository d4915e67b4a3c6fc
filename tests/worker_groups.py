"""A pytest plugin for pytest-xdist: groups of tests share a process; dead processes are reported.

xdist's own `loadgroup` has no effect under pytest 9 (xdist 3.8 sets a name that pytest ignores). It
also inherits from `LoadScopeScheduling`, which waits forever after the death of a process: it sends
the finished tests of that process again. `LoadScheduling` forgets a test once it is done.
"""

import faulthandler
import os
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "one_process",
        "groups of test files, a group a line: the tests of a group run in one process",
        type="linelist",
        default=[],
    )


def group_of(nodeid: str, config: pytest.Config) -> int | None:
    """Returns the index of the group of a test; None: it is in no group."""
    path = nodeid.partition("::")[0]
    groups: list[str] = config.getini("one_process")
    return next((i for i, files in enumerate(groups) if path in files.split()), None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts groups first, each in one piece: they take longest, and single tests fill the end."""

    def place(item: pytest.Item) -> float:
        group = group_of(item.nodeid, config)
        return float("inf") if group is None else group

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Makes a scheduler that never divides a group, except to replace a dead process."""
    from xdist.scheduler import LoadScheduling

    class GroupScheduling(LoadScheduling):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(config, log)
            self.maxschedchunk = 1  # the shortest queues: tests differ a lot in duration

        def _send_tests(self, node: Any, num: int) -> None:
            groups = [group_of(self.collection[index], config) for index in self.pending]
            while (
                0 < num < len(groups) and groups[num] is not None and groups[num] == groups[num - 1]
            ):
                num += 1
            super()._send_tests(node, num)

    return GroupScheduling()


@pytest.hookimpl(trylast=True)  # after pytest's own plugin, which sends traces to a captured stderr
def pytest_configure(config: pytest.Config) -> None:
    if trace := getattr(config, "workerinput", {}).get("trace"):
        faulthandler.enable(os.open(trace, os.O_WRONLY | os.O_CREAT))  # until the process ends
    else:
        config.pluginmanager.register(DeadWorkers(config))


class DeadWorkers:
    """Reports every worker process that died, with its stack trace, as a failure.

    Attributes:
        unreported: Dead processes, each by its id and its trace, that no report names yet.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.unreported: dict[str, str] = {}
        self._folder = tempfile.TemporaryDirectory()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["trace"] = str(Path(self._folder.name) / node.gateway.id)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object | None) -> None:
        if error:
            path = Path(node.workerinput["trace"])
            trace = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            self.unreported[node.gateway.id] = trace or "It left no stack trace."

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, report: Any) -> None:
        """Adds the trace to the failure of the test that the process died in."""
        trace = self.unreported.pop(report.node.gateway.id, "It left no stack trace.")
        report.longrepr = f"{report.longrepr}\n{trace}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        """Fails the session if a process died outside of a test, for example in its teardown."""
        result = yield
        for worker, trace in self.unreported.items():
            message = f"worker {worker!r} died outside of a test\n{trace}"
            report = pytest.CollectReport(worker, "failed", message, result=[])
            self.config.hook.pytest_collectreport(report=report)
        return result

    def pytest_unconfigure(self) -> None:
        self._folder.cleanup()
