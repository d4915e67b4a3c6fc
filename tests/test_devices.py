import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf
import typer

from trainer import cli, devices, environment
from trainer.devices import Devices
from trainer.errors import CheckError, InputError, MissingError

ROOT = Path(__file__).parent.parent
CPUS = ["CPU:0", "CPU:1"]
GPUS = ["GPU:0", "GPU:1"]


@pytest.fixture
def _no_gpu() -> None:
    if tf.config.list_physical_devices("GPU"):
        pytest.skip("TensorFlow sees a GPU here (CUDA_VISIBLE_DEVICES lets it in)")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[bool], str]:
    """Sets whether a GPU driver seems to be loaded; returns the file that shows it."""

    def set_driver(loaded: bool) -> str:
        file = tmp_path / "nvidiactl"
        if loaded:
            file.touch()
        monkeypatch.setattr(devices, "_DRIVER_FILES", (str(file),))
        monkeypatch.setattr("platform.system", lambda: "Linux")
        return str(file)

    return set_driver


def message(error: type[Exception], function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(error) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def outputs(chosen: Devices) -> list[Any]:
    """Returns the result of each replica of a strategy."""
    with chosen.scope():
        results = chosen.strategy.run(lambda: tf.constant(1.0) + 1.0)
    return list(chosen.strategy.experimental_local_results(results))


@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize(
    ("device", "names", "strategy"),
    [
        ("cpu", ("CPU:0",), type(tf.distribute.get_strategy())),
        ("auto", ("CPU:0",), type(tf.distribute.get_strategy())),
        ("all", ("CPU:0", "CPU:1"), tf.distribute.MirroredStrategy),
    ],
)
def test_operations_run_on_the_selected_devices(
    device: str, names: tuple[str, ...], strategy: type
) -> None:
    chosen = devices.select(device)
    assert chosen.names == names
    assert type(chosen.strategy) is strategy
    assert chosen.strategy.num_replicas_in_sync == len(names)
    assert devices.check_placement(outputs(chosen), chosen) == list(names)


@pytest.mark.parametrize("device", ["gpu", "gpu:0", "gpu:7"])
def test_without_a_driver_a_gpu_is_missing(driver: Callable[[bool], str], device: str) -> None:
    file = driver(False)
    assert devices.gpu_driver_files() == []
    for function in (devices.require_driver, devices.select):
        said = message(MissingError, function, device)
        assert said.startswith(f"--device {device}: expected a GPU, found none: no GPU driver")
        assert file in said
        assert "pip install -e '.[gpu]'" in said
        assert "--device cpu" in said
    assert MissingError.exit_code == 3


@pytest.mark.parametrize("device", ["auto", "cpu", "all"])
def test_other_devices_need_no_driver(driver: Callable[[bool], str], device: str) -> None:
    driver(False)
    devices.require_driver(device)
    assert devices.select(device).names


@pytest.mark.usefixtures("_no_gpu")
def test_a_driver_without_a_gpu_is_not_enough(driver: Callable[[bool], str]) -> None:
    file = driver(True)
    devices.require_driver("gpu")
    assert devices.gpu_driver_files() == [file]
    said = message(MissingError, devices.select, "gpu")
    assert "a driver is loaded, but TensorFlow lists no GPU" in said


def test_a_process_has_one_strategy_for_several_devices(two_devices: Any) -> None:
    assert devices.select("all").strategy is two_devices.strategy


def test_the_driver_is_checked_before_tensorflow_is_imported() -> None:
    if sys.platform != "linux" or devices.gpu_driver_files():
        pytest.skip("a GPU driver is loaded, or this is no Linux, which alone shows its drivers")
    code = (
        "import sys\nfrom trainer import devices, errors\n"
        "try:\n    devices.require_driver('gpu')\n"
        "except errors.MissingError as error:\n    print(error.exit_code, *sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    exit_code, *modules = run.stdout.split()
    assert exit_code == "3"
    assert "trainer.devices" in modules
    assert not {"tensorflow", "keras", "numpy"} & set(modules)


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("cpu", GPUS, ("CPU:0",)),
        ("auto", GPUS, ("GPU:0",)),
        ("auto", [], ("CPU:0",)),
        ("all", GPUS, ("GPU:0", "GPU:1")),
        ("all", ["GPU:0"], ("GPU:0",)),
        ("all", [], ("CPU:0", "CPU:1")),
        ("gpu", GPUS, ("GPU:0",)),
        ("gpu:0", GPUS, ("GPU:0",)),
        ("gpu:1", GPUS, ("GPU:1",)),
    ],
)
def test_the_requested_devices_are_chosen(
    device: str, gpus: list[str], expected: tuple[str, ...]
) -> None:
    assert devices.choose(device, gpus, CPUS) == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "CUDA_VISIBLE_DEVICES is not set"), ("7", "CUDA_VISIBLE_DEVICES is '7'"), ("", "''")],
)
def test_a_missing_gpu_names_cuda_visible_devices(
    value: str | None,
    words: str,
    driver: Callable[[bool], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    driver(False)
    for function in (devices.require_driver, devices.select):
        assert words in message(MissingError, function, "gpu:0")
    driver(True)
    assert words in message(MissingError, devices.choose, "gpu", [], CPUS)
    assert words in message(InputError, devices.choose, "gpu:2", GPUS, CPUS)


def test_a_gpu_number_that_is_too_large_is_refused() -> None:
    said = message(InputError, devices.choose, "gpu:2", GPUS, CPUS)
    assert said.startswith("--device gpu:2: available: gpu:0, gpu:1; CUDA_VISIBLE_DEVICES is ")
    for device in ("gpu", "gpu:0", "gpu:2"):
        assert f"--device {device}: " in message(MissingError, devices.choose, device, [], CPUS)


def test_outputs_on_other_devices_are_refused() -> None:
    def on(*names: str) -> list[Any]:
        tensors = []
        for name in names:
            with tf.device(name):
                tensors.append(tf.constant(1.0) + 1.0)
        return tensors

    one, both = (Devices(names, tf.distribute.get_strategy()) for names in (("CPU:1",), (*CPUS,)))
    assert devices.check_placement(on("CPU:1"), one) == ["CPU:1"]
    assert devices.check_placement(on("CPU:1", "CPU:0"), both) == ["CPU:1", "CPU:0"]
    for tensors, asked in [
        (on("CPU:0"), one),
        (on("CPU:0", "CPU:0"), both),
        (on("CPU:0"), both),
        (on("CPU:0", "CPU:1"), one),
        (on("CPU:1", "CPU:1"), one),
        ([], one),
    ]:
        said = message(CheckError, devices.check_placement, tensors, asked)
        assert said.startswith(f"expected outputs on {', '.join(asked.names)}, found them on")
    assert CheckError.exit_code == 4


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("avx512_bf16", "avx512f"), "mixed_bfloat16"),
        (("amx_bf16", "avx2"), "mixed_bfloat16"),
        (("avx2", "avx512f", "fma"), "float32"),
        ((), "float32"),
    ],
)
def test_precision_follows_the_cpu(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], expected: str
) -> None:
    monkeypatch.setattr(devices, "cpu_flags", lambda: flags)
    for names in (("CPU:0",), tuple(CPUS)):
        chosen = Devices(names, tf.distribute.get_strategy())
        assert devices.choose_precision("auto", chosen) == expected
        for asked in ("float32", "mixed_bfloat16", "mixed_float16"):
            assert devices.choose_precision(asked, chosen) == asked


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("GPU:0",), "mixed_bfloat16"),
        (("GPU:1",), "mixed_float16"),
        (("GPU:2",), "float32"),
        (("GPU:3",), "float32"),  # unknown
        (("GPU:0", "GPU:1"), "mixed_float16"),  # the oldest decides
        (("GPU:0", "GPU:1", "GPU:2"), "float32"),
    ],
)
def test_precision_follows_the_oldest_gpu(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], expected: str
) -> None:
    cards: list[dict[str, Any]] = [{"compute_capability": c} for c in ((8, 0), (7, 5), (6, 1))]
    cards.append({})
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: cards)
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda card: card)
    chosen = Devices(names, tf.distribute.get_strategy())
    assert devices.choose_precision("auto", chosen) == expected


def test_the_dtype_policy_is_restored_after_the_block() -> None:
    former = keras.config.dtype_policy()
    assert former.name == "float32"
    with devices.dtype_policy("mixed_bfloat16"):
        assert keras.layers.Dense(1).compute_dtype == "bfloat16"
        with devices.dtype_policy("mixed_float16"):
            assert keras.layers.Dense(1).compute_dtype == "float16"
        assert keras.layers.Dense(1).compute_dtype == "bfloat16"
    assert keras.config.dtype_policy() is former
    with pytest.raises(KeyError), devices.dtype_policy("mixed_bfloat16"):
        raise KeyError
    assert keras.config.dtype_policy() is former


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 avx", ("avx", "avx2", "fpu")),
        ("Features\t: fp bf16 asimd", ("asimd", "bf16", "fp")),
    ],
)
def test_cpu_flags_are_read_from_the_kernel(
    monkeypatch: pytest.MonkeyPatch, line: str, expected: tuple[str, ...]
) -> None:
    cpuinfo = ["processor\t: 0", "model name\t: Some CPU: fast", line, "", "flags\t\t: other"]
    monkeypatch.setattr(environment, "_cpuinfo", lambda: cpuinfo)
    assert environment.cpu_flags.__wrapped__() == expected
    assert environment.cpu_model.__wrapped__() == "Some CPU: fast"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_only_usable_cpus_are_counted() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert environment.usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert environment.usable_cpus() == len(allowed)


OUT_OF_MEMORY = {
    "no room for a tensor": tf.errors.ResourceExhaustedError(
        None,
        None,
        "OOM when allocating tensor with shape[9] on /job:a/task:0/device:GPU:1 by GPU_1",
    ),
    "no room for CUDA": tf.errors.InternalError(
        None, None, "cudaSetDevice() on GPU:1 failed. Status: out of memory"
    ),
    "no room for a library": tf.errors.InternalError(
        None, None, "Failed to create cublas handle: CUBLAS_STATUS_ALLOC_FAILED on GPU:1"
    ),
}


@pytest.mark.parametrize("case", OUT_OF_MEMORY)
def test_an_exhausted_gpu_is_one_line(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., tuple[int, str, str]],
) -> None:
    from trainer import workflow

    def fail(*_: object, **__: object) -> None:
        raise OUT_OF_MEMORY[case]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workflow, "build_experiment", fail)
    (tmp_path / "own.toml").write_text('[data]\nname = "synthetic"')
    code, _, err = command("fit", "own.toml")
    assert code == 3
    assert err.splitlines()[-1] == (
        "trainer: GPU:1 has no memory left: end other processes that use it (`nvidia-smi` lists "
        "them), or lower training.batch_size"
    )


def test_other_errors_of_tensorflow_are_not_about_memory() -> None:
    for error in (
        tf.errors.InternalError(None, None, "libdevice not found"),
        tf.errors.InvalidArgumentError(None, None, "shapes"),
        tf.errors.InvalidArgumentError(None, None, "random_zoom: out of memory"),
        tf.errors.InternalError(None, None, "node random_zoom/bloom failed"),
        ValueError("out of memory"),
    ):
        assert devices.memory_error(error) is None


def test_images_that_are_too_large_for_a_device_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from trainer.config import DataConfig
    from trainer.data import Split
    from trainer.training import batches

    chosen = devices.select("cpu")
    # A sparse file: ten terabytes that use no space on the disk.
    count = 10_000
    with (tmp_path / "images").open("wb") as file:
        file.truncate(10**9 * count)
    images = np.memmap(tmp_path / "images", np.uint8, "r", shape=(count, 10**5, 10**4, 1))
    split = Split(images, np.zeros(count, np.int32), np.arange(count))
    config = DataConfig(placement="device")
    for placement in (config, DataConfig(device_limit_mb=10**9)):
        said = message(
            InputError, lambda p: batches.make_batches(split, p, chosen, batch_size=1), placement
        )
        assert said == (
            "the 10,000 images of a split take 10,000,000 MB, more than fits in memory: "
            "set data.placement = 'stream'"
        )
    assert batches.make_batches(split, DataConfig(), chosen, batch_size=1)

    def exhausted(*_: object, **__: object) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(tf, "Variable", exhausted)
    small = Split(np.zeros((3, 2, 2, 1), np.uint8), np.zeros(3, np.int32), np.arange(3))
    said = message(
        InputError, lambda s: batches.make_batches(s, config, chosen, batch_size=1), small
    )
    assert "the 3 images of a split take 0 MB, more than fits in memory: " in said


# Replaces TensorFlow in a process: records the variable that TensorFlow reads when it first lists
# GPUs, which is not possible before its import.
BOUNDARY = """
import os, sys
with open(os.environ["NOTED"], "a") as file:
    print(os.environ.get("TF_FORCE_GPU_ALLOW_GROWTH"), file=file)
sys.exit(0)
"""
VERBS = {
    "benchmark formats": "latest",
    "benchmark matmul": "--quick",
    "benchmark operations": "--quick",
    "benchmark step": "own.toml --quick",
    "doctor": "own.toml",
    "evaluate": "latest",
    "export": "latest",
    "fit": "own.toml",
    "gradient": "w**2 --at w=3",
    "load": "runs",
    "predict": "latest image.png",
    "save": "latest model.keras",
    "serve": "model",
    "tune": "own.toml",
    "verify": "model",
}
WITHOUT_TENSORFLOW = {
    *("config list", "config schema", "config show", "data info", "data prepare", "new"),
    "tensorboard",
    *("runs compare", "runs prune", "runs remove", "runs show"),
}


def verbs(command: Any, path: str = "") -> set[str]:
    """Returns the verbs of a command and its groups."""
    below = getattr(command, "commands", None)
    if below is None:
        return {path.strip()}
    return set().union(*(verbs(each, f"{path} {name}") for name, each in below.items()))


INSTALLED = verbs(typer.main.get_command(cli.app))  # the folder of a tool can be deleted


# Runs each verb in a child process, because starting Python for each would take long.
VERBS_IN_CHILDREN = """
import os, shlex, sys
from trainer import cli
from trainer.__main__ import main
for line in sys.stdin.read().splitlines():
    if (child := os.fork()) == 0:
        sys.argv = ["trainer", *shlex.split(line)]
        os.environ["NOTED"] = "-".join(sys.argv[1:3]).replace("/", "-")
        main()
    os.waitpid(child, 0)
"""


def test_every_verb_sets_memory_growth_before_it_can_use_a_gpu(run: Any, tmp_path: Path) -> None:
    package = tmp_path / "boundary" / "tensorflow"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(BOUNDARY)
    (tmp_path / "runs").symlink_to(run.path.parent)
    (tmp_path / "image.png").touch()
    text = '[data]\nname = "synthetic"\n'
    if "tune" in INSTALLED:
        text += '[tuning.space]\n"training.batch_size" = { choices = [8, 9] }\n'
    (tmp_path / "own.toml").write_text(text)
    environment = {k: v for k, v in os.environ.items() if k != "TF_FORCE_GPU_ALLOW_GROWTH"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT)])}
    commands = {verb: f"{verb} {VERBS[verb]}" for verb in VERBS.keys() & INSTALLED}
    done = subprocess.run(
        [sys.executable, "-c", VERBS_IN_CHILDREN],
        input="\n".join(commands.values()),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    for verb, line in commands.items():
        noted = tmp_path / "-".join(line.split()[:2])
        assert noted.exists(), (verb, done.stderr)  # TensorFlow was imported
        assert set(noted.read_text().splitlines()) == {"true"}


def test_every_verb_is_listed() -> None:
    assert VERBS.keys() | WITHOUT_TENSORFLOW >= INSTALLED


def test_the_python_interface_sets_memory_growth_unless_the_user_did() -> None:
    code = "import os, trainer; print(os.environ['TF_FORCE_GPU_ALLOW_GROWTH'])"
    for given, expected in (({}, "true"), ({"TF_FORCE_GPU_ALLOW_GROWTH": "false"}, "false")):
        environment = {k: v for k, v in os.environ.items() if k != "TF_FORCE_GPU_ALLOW_GROWTH"}
        command = [sys.executable, "-c", code]
        found = subprocess.check_output(command, env=environment | given, text=True)
        assert found.strip() == expected
