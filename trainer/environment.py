"""The hardware and software that a result depends on: versions, CPU, GPU, git revision."""

import contextlib
import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("tensorflow", "keras", "numpy", "tensorboard", "tensorflow-datasets", "trainer")


def describe_environment(device_names: tuple[str, ...], fingerprint: str) -> dict[str, Any]:
    """Returns what the results of a run depend on, besides the configuration.

    Args:
        device_names: The devices of the run.
        fingerprint: The fingerprint of the data.
    """
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "cpu": cpu_model(),
        "cpus": usable_cpus(),
        "cpu_flags": [f for f in cpu_flags() if f.startswith(("avx", "amx", "fma", "neon"))],
        "gpus": gpu_models(),
        "devices": list(device_names),
        "variables": {
            k: v
            for k, v in os.environ.items()
            if k.startswith(("TF_", "CUDA_", "XLA_", "OMP_")) and not k.startswith("TF_CLI_")
        },
        "git": _git_state(),
        "data_fingerprint": fingerprint,
    }


@functools.cache
def cpu_flags() -> tuple[str, ...]:
    """Returns the names of the CPU's instruction sets, sorted; empty if they are not known."""
    return tuple(sorted(_cpu_fact("flags", "Features").split()))


@functools.cache
def cpu_model() -> str:
    """Returns the name of the CPU."""
    return _cpu_fact("model name") or platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Returns the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpu_models() -> list[str]:
    """Returns the name and compute capability of each GPU that TensorFlow can use."""
    import tensorflow as tf

    lines = []
    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        capability = ".".join(map(str, details.get("compute_capability", ("unknown",))))
        lines.append(f"{details.get('device_name', gpu.name)} (compute capability {capability})")
    return lines


def _cpu_fact(*keys: str) -> str:
    values = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith(keys)]
    return values[0] if values else ""


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")  # of Linux
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _git_state() -> dict[str, Any] | None:
    """Returns the git revision and whether its files are changed; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 5}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        revision, _, dirty = subprocess.run(command, cwd=folder, **options).stdout.partition("-")
        return {"revision": revision.strip(), "dirty": bool(dirty)}
    return None
