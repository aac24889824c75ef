"""What the benchmarks share: a command's wall time and peak memory, medians with their range, and where results go."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
BIN = Path(sys.executable).parent

MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(done.returncode)
"""


def run(command: list[Any]) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of one command, without a network.

    A process starts with the peak of the one that forked it, so a small interpreter stands in between.
    """
    start = time.perf_counter()
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-S", "-c", MEASURE, *(str(part) for part in command)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=quiet)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - start, int(done.stdout)


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "repeats": len(values)}


def show(name: str, value: Any) -> Any:
    print(name, json.dumps(value, indent=2), flush=True)
    return value
