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
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            return tuple(sorted(line.partition(":")[2].split()))
    return ()


@functools.cache
def cpu_model() -> str:
    """Returns the name of the CPU."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


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


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _git_state() -> dict[str, Any] | None:
    """Returns the git revision and whether files are changed; None without git."""
    checkout = str(Path(__file__).resolve().parent.parent)

    def git(*arguments: str) -> str:
        command = ["git", "-C", checkout, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return {
            "revision": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain").strip()),
        }
    return None
