"""Processes that start at the price of a fork, and can be killed at any moment."""

import signal
import time
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from wiseft import cli


class Forks:
    """Forks of one process that has imported what takes time, with one thread."""

    def __init__(self) -> None:
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(
            ["wiseft.selection", "wiseft.headline", "wiseft.ops.lerp.numba", "transformers.trainer"]
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            forkserver.ensure_running()

    def start(self, function: Callable[..., Any], *arguments: Any) -> BaseProcess:
        """Call a function of an installed package in a process of its own."""
        process = self._context.Process(target=function, args=arguments)
        process.start()
        return process

    def kill_when(self, moment: Callable[[], bool], *command: str | Path, wait: float = 0.0) -> None:
        """Run a command of wiseft until `wait` seconds after `moment` has first returned true, then kill it (SIGKILL)."""
        process = self.start(cli.main, [str(part) for part in command])
        while process.is_alive() and not moment():
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the command ended before it was killed"


@pytest.fixture(scope="session")
def forks() -> Forks:
    return Forks()
