"""Exports equal the trained model in every format. Damaged and hostile files are refused."""

import hashlib
import importlib.util
import io
import json
import pickle
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf
import typer
from PIL import Image

import trainer
from trainer.errors import CheckError, InputError, MissingError
from trainer.run import Run
from trainer.saving import cli, runtimes, safety
from trainer.saving.formats import FORMATS, find_format
from trainer.saving.loading import load, save
from trainer.saving.versions import verify


def refused(result: tuple[int, str, str], code: int = 2) -> str:
    """Returns the line on stderr of a command that failed with an exit code."""
    assert (result[0], result[1]) == (code, ""), result
    lines = [line for line in result[2].splitlines() if line.startswith("trainer: ")]
    assert len(lines) == 1, result[2]
    assert "Traceback" not in result[2]
    return lines[0]


def pictures(count: int, seed: int = 0) -> Any:
    return np.random.RandomState(seed).randint(0, 256, (count, 8, 8, 1), np.uint8)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_options_are_frozen() -> None:
    """A change here breaks scripts of users: describe it in CHANGELOG.md."""
    verbs = typer.main.get_command(cli.app).commands
    assert {name: option_names(verb) for name, verb in verbs.items()} == {
        "save": "run path --overwrite --runs --json",
        "load": "path --evaluate --trust --json",
        "export": "run --format --name --directory --runs --json",
        "verify": "path --trust --json",
    }


def option_names(verb: Any) -> str:
    return " ".join(p.opts[0] if p.opts[0].startswith("-") else p.name for p in verb.params)


# ---------------------------------------------------------------- every format


@pytest.fixture(scope="module")
def validated(run: Run) -> dict[str, Any]:
    """The scores of the run on its validation images."""
    return trainer.evaluate(str(run.path), split="validation")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_returns_the_probabilities_of_the_model(
    kind: str,
    exported: dict[str, Path],
    run: Run,
    validated: dict[str, Any],
    command: Callable[..., Any],
) -> None:
    folder = exported[kind]
    name = "synthetic-layers" if kind == "saved_model" else f"synthetic-layers-{kind}"
    assert (folder.parent.name, folder.name) == (name, "1")
    model, artifact = load(run.path), load(folder)
    tolerance = FORMATS[kind].max_difference if kind != "litert_int8" else 0.2
    for count in (1, 7, 300):
        images = pictures(count, seed=count)
        answers = artifact(images)
        assert answers.shape == (count, 4)
        assert answers.dtype == np.float32
        # The run computes in bfloat16, which has 8 significant bits.
        assert abs(answers - model(images)).max() < tolerance + 0.05
        assert answers.sum(axis=1) == pytest.approx(np.ones(count), abs=0.02)
    scores = artifact.evaluate()
    assert scores["images"] == 120
    assert scores["accuracy"] == pytest.approx(
        run.read_json("summary.json")["test"]["accuracy"], abs=2 / 120
    )
    assert artifact.kind == kind
    code, out, _ = command("verify", folder.parent, "--json")
    assert code == 0
    verified = json.loads(out)
    assert verified["largest_difference"] <= FORMATS[kind].max_difference
    assert verified["path"] == str(folder)
    code, out, _ = command("evaluate", folder, "--split", "validation", "--json")
    assert code == 0
    validation = json.loads(out)
    assert (validation["split"], validation["images"]) == ("validation", 48)
    assert validation["accuracy"] == pytest.approx(validated["accuracy"], abs=2 / 48)
    assert validation["crossentropy"] == pytest.approx(validated["loss"], rel=0.1)
    code, out, _ = command("load", folder / FORMATS[kind].file, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["kind"] == kind
    assert (facts["run"], facts["data"], facts["parameters"]) == (
        *(run.name, "synthetic"),
        model.parameters,
    )
    assert facts["input"] == "images uint8 [None, 8, 8, 1]"


def test_a_format_compares_with_the_float32_network(exported: dict[str, Path], run: Run) -> None:
    """The difference is much smaller than to bfloat16."""
    facts = json.loads((exported["saved_model"] / "export.json").read_text())
    assert facts["config"]["training"]["precision"] == "mixed_bfloat16"
    assert facts["verified"]["largest_difference"] < 1e-6
    images = pictures(50)
    difference = abs(load(exported["saved_model"])(images) - load(run.path)(images)).max()
    assert 1e-6 < difference < 0.05
    card = (exported["saved_model"] / "README.md").read_text()
    assert "Trained in mixed_bfloat16, exported and verified in float32" in card
    assert "tensorflow/serving" in card
    assert run.name in card


def test_evaluate_refuses_unsupported_options_for_a_saved_model(
    exported: dict[str, Path], command: Callable[..., Any]
) -> None:
    result = command("evaluate", exported["onnx"], "--split", "all")
    assert "expected a split: train, validation or test; received 'all'" in refused(result)
    result = command("evaluate", exported["onnx"], "--device", "cpu")
    assert "is not a run; a saved model has its own runtime" in refused(result)


def test_saved_model_cli_runs_the_saved_model(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(3)
    np.savez(tmp_path / "in.npz", images=images)
    program = str(Path(sys.executable).with_name("saved_model_cli"))
    arguments = [
        *("run", "--dir", str(exported["saved_model"]), "--tag_set", "serve"),
        *("--signature_def", "serving_default", "--outdir", str(tmp_path)),
        *("--inputs", f"images={tmp_path / 'in.npz'}[images]"),
    ]
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as end:  # in this process, which has imported TensorFlow
        runpy.run_path(program, run_name="__main__")
    assert not end.value.code
    answers = np.load(tmp_path / "probabilities.npy")
    np.testing.assert_allclose(answers, load(exported["saved_model"])(images), atol=1e-6)
    names = np.load(tmp_path / "class_name.npy", allow_pickle=True)
    assert list(names) == [f"pattern {label}".encode() for label in answers.argmax(axis=1)]


def test_the_signature_for_image_files(exported: dict[str, Path], run: Run, tmp_path: Path) -> None:
    signature = tf.saved_model.load(str(exported["saved_model"])).signatures["serving_files"]
    images = pictures(2)
    files = []
    for i, kind in enumerate(("PNG", "JPEG")):
        buffer = io.BytesIO()
        Image.fromarray(images[i, :, :, 0]).resize((8 + 4 * i, 8)).save(buffer, kind, quality=100)
        files.append(buffer.getvalue())
        (tmp_path / f"{i}.{kind.lower()}").write_bytes(files[-1])
    answers = signature(image_bytes=tf.constant(files))["probabilities"].numpy()
    np.testing.assert_allclose(answers[:1], load(exported["saved_model"])(images[:1]), atol=1e-6)
    paths = sorted(tmp_path.iterdir())
    predicted = trainer.predict(str(run.path), paths)
    for row, other in zip(answers, predicted, strict=True):
        assert row == pytest.approx(list(other["probabilities"].values()), abs=0.06)


def test_the_verification_blocks_the_import_of_this_package() -> None:
    program = (
        f"import runpy, sys; sys.argv = ['x', 'onnx', 'nowhere', 'none.npy', 'out']\n"
        f"try: runpy.run_path({runtimes.__file__!r}, run_name='__main__')\n"
        "except Exception: pass\n"
        "try: import trainer\n"
        "except ImportError: sys.exit(7)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], check=False, capture_output=True)
    assert done.returncode == 7


# Replaces ONNX Runtime and checks the process that imports it.
RUNTIME = """
import importlib.util, pathlib, sys
import numpy

class InferenceSession:
    def __init__(self, path, providers):
        with numpy.load(pathlib.Path(path).with_name("check.npz")) as kept:
            rows = zip(kept["images"], kept["probabilities"], strict=True)
            self.answers = {image.tobytes(): row for image, row in rows}
        try:
            import trainer
        except ImportError:
            assert importlib.util.find_spec("formats") is None  # of trainer/saving
            assert not sys.flags.no_user_site
        else:
            raise RuntimeError("trainer was imported")

    def run(self, names, inputs):
        return [numpy.array([self.answers[image.tobytes()] for image in inputs["images"]])]
"""


@pytest.mark.parametrize("python_path", ["packages", "{here}/packages:{project}"])
def test_the_verification_finds_packages_in_pythonpath(
    python_path: str, exported: dict[str, Path], in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds neither this package nor modules in the current folder."""
    package = in_tmp_path / "packages" / "onnxruntime.py"
    package.parent.mkdir()
    package.write_text(RUNTIME)
    (in_tmp_path / "numpy.py").write_text("raise RuntimeError('taken from the current folder')")
    project = Path(trainer.__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", python_path.format(here=in_tmp_path, project=project))
    verified = verify(exported["onnx"])[1]
    assert (verified.largest_difference, verified.images) == (0.0, 120)
    package.write_text("raise ImportError('the package in PYTHONPATH')")
    with pytest.raises(CheckError, match="its runtime fails: ImportError: the package"):
        verify(exported["onnx"])


def test_a_new_version_gets_the_next_number(
    home: Path, run: Run, exported: dict[str, Path], command: Callable[..., Any]
) -> None:
    before = content(exported["onnx"])
    (exported["onnx"].parent / "7").mkdir()
    (exported["onnx"].parent / "v8").mkdir()  # not a version
    code, out, _ = command(
        *("export", run.path, "--format", "onnx", "--directory", home / "saved_models", "--json")
    )
    assert code == 0
    assert json.loads(out)["path"] == str(exported["onnx"].parent / "8")
    assert content(exported["onnx"]) == before
    for name in ("7", "8", "v8"):
        shutil.rmtree(exported["onnx"].parent / name)


def test_an_export_that_differs_is_not_published(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    original = FORMATS["litert"]

    def wrong(model: Any, *others: Any) -> None:
        for weight in model.trainable_variables:
            weight.assign(weight * 1.01)
        original.write(model, *others)

    arguments = ("export", run.path, "--directory", tmp_path / "out", "--format", "litert")
    monkeypatch.setitem(FORMATS, "litert", replace(original, write=wrong))
    result = command(*arguments)
    assert "differs from the model: largest difference of a probability 0." in refused(result, 4)
    assert list((tmp_path / "out").iterdir()) == []

    def broken(model: Any, spec: Any, images: Any, path: Path) -> None:  # noqa: ARG001
        path.write_bytes(b"nothing")

    monkeypatch.setitem(FORMATS, "litert", replace(original, write=broken))
    result = command(*arguments)
    assert "its runtime fails" in refused(result, 4)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("how", ["changed", "missing", "added", "answers", "check"])
def test_verify_finds_changes(
    how: str, exported: dict[str, Path], tmp_path: Path, command: Callable[..., Any]
) -> None:
    folder = tmp_path / "name" / "1"
    # Only the comparison of predictions needs a runtime. LiteRT starts fastest.
    shutil.copytree(exported["litert" if how == "answers" else "saved_model"], folder)
    variables = folder / "variables" / "variables.data-00000-of-00001"
    if how == "changed":
        variables.write_bytes(b"\0" + variables.read_bytes()[1:])
    elif how == "missing":
        variables.unlink()
    elif how == "added":
        (folder / "assets" / "more.txt").write_text("more")
    elif how == "check":
        (folder / "check.npz").write_bytes(b"zz")
    else:
        with np.load(folder / "check.npz") as kept:
            arrays = dict(kept)
        arrays["probabilities"] = arrays["probabilities"][:, ::-1]
        np.savez(folder / "check.npz", **arrays)
    said = refused(command("verify", folder), 4)
    expected = {"added": "more.txt", "answers": "differs from the model", "check": "check.npz"}
    assert expected.get(how, variables.name) in said


def test_a_missing_package_is_named_with_its_extra(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tf2onnx" else find(name)
    )
    result = command("export", run.path, "--format", "onnx", "--directory", tmp_path / "out")
    assert "onnx needs tf2onnx: pip install -e '.[onnx]'" in refused(result, 3)
    assert not (tmp_path / "out").exists()
    with pytest.raises(MissingError):
        find_format("onnx")


def test_an_export_that_fails_at_the_start_changes_nothing(
    run: Run, tmp_path: Path, command: Callable[..., Any]
) -> None:
    (tmp_path / "file").write_text("kept")
    for arguments, said in [
        (("--format", "onxx"), "unknown format 'onxx': did you mean 'onnx'?"),
        (("--name", "../x"), "--name: expected letters"),
        (("--directory", tmp_path / "file"), "file is a file, not a folder"),
        (("--runs", tmp_path), None),
    ]:
        target = () if "--directory" in arguments else ("--directory", tmp_path / "out")
        reference = run.path if said else "nope"
        line = refused(command("export", reference, *target, *arguments))
        assert (said or "there is no run") in line
        assert content(tmp_path) == {"file": b"kept"}


# ---------------------------------------------------------------- Keras files


def test_save_and_load_a_whole_model(run: Run, tmp_path: Path, command: Callable[..., Any]) -> None:
    path = tmp_path / "model.keras"
    assert command("save", run.path, path)[0] == 0
    model = keras.saving.load_model(path)  # by Keras alone
    assert int(model.optimizer.iterations) == run.read_json("summary.json")["steps"]
    images = pictures(5)
    expected = load(run.path)(images)
    np.testing.assert_array_equal(model(images).numpy(), expected)
    loaded = load(path)
    np.testing.assert_array_equal(loaded(images), expected)
    assert loaded.describe()["run"] == run.name
    assert loaded.evaluate()["accuracy"] == load(run.path).evaluate()["accuracy"]


def test_keras_reads_the_weights_of_a_run(files: dict[str, Path], run: Run) -> None:
    """docs/saving.md describes this."""
    model = keras.saving.load_model(files[".keras"], compile=False)
    expected = model(pictures(5)).numpy()
    for weight in model.weights:
        weight.assign(keras.ops.zeros_like(weight))
    model.load_weights(run.weights)
    np.testing.assert_array_equal(model(pictures(5)).numpy(), expected)
    model.load_weights(run.checkpoints / "best.weights.h5")
    with pytest.raises(InputError, match="weights alone have no network"):
        load(run.checkpoints / "best.weights.h5")


def test_save_overwrites_only_on_request(
    run: Run, tmp_path: Path, command: Callable[..., Any]
) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(b"precious")
    assert "exists already" in refused(command("save", run.path, path))
    assert path.read_bytes() == b"precious"
    for other, said in [
        ("model.h5", "expected a name that ends in .keras"),
        ("model.weights.h5", "expected a name that ends in .keras"),
        ("no/folder.keras", "expected an existing folder"),
        (".keras", "expected a name that ends in"),
    ]:
        assert said in refused(command("save", run.path, tmp_path / other))
    assert content(tmp_path) == {"model.keras": b"precious"}
    assert command("save", run.path, path, "--overwrite")[0] == 0
    assert load(path).kind == "keras"


# ---------------------------------------------------------------- damaged and hostile files


@pytest.fixture(scope="module")
def files(home: Path, run: Run, exported: dict[str, Path]) -> dict[str, Path]:
    """One valid file of every kind, by suffix."""
    save(str(run.path), home / "good.keras")
    return {
        ".keras": home / "good.keras",
        ".tflite": exported["litert"] / "model.tflite",
        ".onnx": exported["onnx"] / "model.onnx",
    }


@pytest.mark.parametrize("ending", [".keras", ".tflite", ".onnx"])
@pytest.mark.parametrize("how", ["empty", "first", "half", "last", "text", "renamed", "missing"])
def test_damaged_files_are_refused_in_one_line(
    ending: str, how: str, files: dict[str, Path], tmp_path: Path, command: Callable[..., Any]
) -> None:
    path, whole = tmp_path / f"bad{ending}", files[ending].read_bytes()
    others = {".keras": ".onnx", ".tflite": ".keras", ".onnx": ".tflite"}
    damaged = {
        "empty": b"",
        "first": whole[:20],
        "half": whole[: len(whole) // 2],
        "last": whole[:-40],
        "text": b"<html>not found</html>",
        "renamed": files[others[ending]].read_bytes(),
    }
    if how != "missing":
        path.write_bytes(damaged[how])
    assert str(path) in refused(command("load", path))
    assert content(tmp_path) == ({} if how == "missing" else {path.name: damaged[how]})


@pytest.mark.parametrize("how", ["empty", "half", "text", "no variables"])
def test_a_damaged_saved_model_is_refused_in_one_line(
    how: str, exported: dict[str, Path], tmp_path: Path, command: Callable[..., Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported["saved_model"], folder)
    graph = folder / "saved_model.pb"
    whole = graph.read_bytes()
    if how == "no variables":
        shutil.rmtree(folder / "variables")
    else:
        graph.write_bytes({"empty": b"", "half": whole[:999], "text": b"<html></html>"}[how])
    assert str(folder) in refused(command("load", folder))


def repacked(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Copies a .keras archive and changes its members."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target


def test_a_keras_file_with_a_lambda_is_refused(tmp_path: Path, command: Callable[..., Any]) -> None:
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Lambda(lambda x: x + 1)])
    path = tmp_path / "lambda.keras"
    model.save(path)
    said = refused(command("load", path))
    assert "contains code: keras.layers:Lambda" in said
    assert "--trust" in said
    code, _, _ = command("load", path, "--trust")
    assert code == 0


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("keras.utils", "get_file"),
        ("mine", "Layer"),
        ("keras.src.utils.file_utils", "File"),
        ("keras.layers", "TFSMLayer"),
        ("keras.layers", "FlaxLayer"),
        ("keras.activations", "function"),
        (None, "__lambda__"),
        ("keras", "utils.get_file"),
    ],
)
def test_a_keras_file_that_names_code_is_refused(
    module: str | None,
    name: str,
    files: dict[str, Path],
    tmp_path: Path,
    command: Callable[..., Any],
) -> None:
    def change(members: dict[str, bytes]) -> None:
        config = json.loads(members["config.json"])
        layer = config["config"]["layers"][2]
        layer["config"]["activation"] = {"module": module, "class_name": name, "config": {}}
        members["config.json"] = json.dumps(config).encode()

    path = repacked(files[".keras"], tmp_path / "code.keras", change)
    assert f"contains code: {module or 'keras'}:{name}" in refused(command("load", path))


def test_keras_alone_accepts_a_function_that_writes_a_file(
    in_tmp_path: Path, command: Callable[..., Any]
) -> None:
    """In its safe mode, which only refuses functions of a list."""
    shape = (8, 8, 3)
    layer = keras.layers.Lambda(keras.ops.abs, shape, arguments={"path": "ran.png", "show": False})
    keras.Sequential([keras.Input(shape), layer]).save("abs.keras")

    def change(members: dict[str, bytes]) -> None:
        config = json.loads(members["config.json"])
        function = {"module": "keras.visualization", "config": "plot_image_gallery"}
        config["config"]["layers"][1]["config"]["function"] |= function
        members["config.json"] = json.dumps(config).encode()

    path = repacked(in_tmp_path / "abs.keras", in_tmp_path / "plot.keras", change)
    assert "contains code: keras.layers:Lambda" in refused(command("load", path))
    assert not Path("ran.png").exists()
    keras.saving.load_model(path, compile=False, safe_mode=True)(np.ones((1, *shape), np.float32))
    assert Path("ran.png").exists()


@pytest.mark.filterwarnings("ignore:Skipping invalid path during archive extraction")
def test_keras_writes_no_file_outside_its_temporary_folder(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("../../outside", "/outside", "assets/../../../outside", "extra.py")

    def change(members: dict[str, bytes]) -> None:
        members.update(dict.fromkeys(names, b"x"))

    path = repacked(files[".keras"], tmp_path / "path.keras", change)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert load(path).parameters > 0
    assert "path.keras" in content(tmp_path)
    assert not [file for file in content(tmp_path) if "outside" in file]
    assert not Path("/outside").exists()


def weights_with(change: Callable[[h5py.File], None], whole: bytes) -> bytes:
    buffer = io.BytesIO(whole)
    with h5py.File(buffer, "r+") as file:
        change(file)
    return buffer.getvalue()


def replace_kernel(file: h5py.File, make: Callable[[str, tuple[int, ...]], None]) -> None:
    """Replaces the first weights that Keras reads."""
    name = "layers/conv2d/vars/0"
    shape = file[name].shape
    del file[name]
    make(name, shape)


def declare_much(file: h5py.File) -> None:
    shape = (10**7, 10**5)
    replace_kernel(
        file, lambda name, _: file.create_dataset(name, shape=shape, dtype="f4", chunks=(1, 10**5))
    )


def link_outside(file: h5py.File) -> None:
    def link(name: str, _: Any) -> None:
        file[name] = h5py.ExternalLink("/etc/passwd", "/")

    replace_kernel(file, link)


def store_outside(file: h5py.File) -> None:
    outside = [("/etc/passwd", 0, 144)]
    replace_kernel(
        file, lambda name, shape: file.create_dataset(name, shape, "f4", external=outside)
    )


def map_outside(file: h5py.File) -> None:
    def map_from(name: str, shape: tuple[int, ...]) -> None:
        layout = h5py.VirtualLayout(shape, "f4")
        layout[...] = h5py.VirtualSource("/etc/passwd", "x", shape)
        file.create_virtual_dataset(name, layout)

    replace_kernel(file, map_from)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (declare_much, "Not allowed: H5 dataset '0' declares"),
        (link_outside, "Not allowed: H5 file with ExternalLink"),
        (store_outside, "Not allowed: H5 file with external Dataset"),
        (map_outside, "Not allowed: H5 file with virtual Dataset"),
    ],
)
# Keras prints a warning about the layer before it refuses the file.
@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
def test_keras_refuses_weights_in_other_files_and_weights_larger_than_the_file(
    change: Callable[[h5py.File], None],
    said: str,
    files: dict[str, Path],
    tmp_path: Path,
    command: Callable[..., Any],
) -> None:
    def changed(members: dict[str, bytes]) -> None:
        members["model.weights.h5"] = weights_with(change, members["model.weights.h5"])

    path = repacked(files[".keras"], tmp_path / "hostile.keras", changed)
    assert said in refused(command("load", path))


def test_a_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., Any],
) -> None:
    monkeypatch.setattr(safety, "_MAX_CONFIG_BYTES", 10**6)
    path = tmp_path / "bomb.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", b" " * 10**7)
    assert "bomb.keras is not a .keras archive, or is damaged" in refused(command("load", path))


def test_legacy_files_and_pickles_are_refused(tmp_path: Path, command: Callable[..., Any]) -> None:
    with h5py.File(tmp_path / "legacy.h5", "w") as file:
        file.attrs["model_config"] = "{}"
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"weights": [1]}))
    for name in ("legacy.h5", "model.pkl"):
        line = refused(command("load", tmp_path / name))
        assert ".h5 models and pickles can contain code" in line


class Evil:
    """Its pickle writes a file when it is loaded."""

    def __reduce__(self) -> Any:
        return Path.write_text, (Path("ran"), "")


@pytest.mark.parametrize("suffix", [".keras", ".tflite", ".onnx"])
def test_a_pickle_with_another_suffix_is_not_run(
    suffix: str, in_tmp_path: Path, command: Callable[..., Any]
) -> None:
    (in_tmp_path / f"model{suffix}").write_bytes(pickle.dumps(Evil()))
    assert f"model{suffix}" in refused(command("load", f"model{suffix}"))
    assert content(in_tmp_path).keys() == {f"model{suffix}"}


def test_verify_checks_the_operations_before_it_runs_them(
    exported: dict[str, Path], tmp_path: Path, command: Callable[..., Any]
) -> None:
    """The graph writes a file, and its checksums are valid."""
    target, written = tmp_path / "m", tmp_path / "written"
    shutil.copytree(exported["saved_model"], target)
    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 1), tf.uint8, name="images")])
    def answer(images: tf.Tensor) -> dict[str, tf.Tensor]:
        with tf.control_dependencies([tf.io.write_file(str(written), "x")]):
            return {"probabilities": tf.zeros((tf.shape(images)[0], 4)) + 0.25}

    module.answer = answer
    tf.saved_model.save(module, str(target), signatures={"serving_default": answer})
    facts = json.loads((target / "export.json").read_text())
    files = [path for path in target.rglob("*") if path.is_file()]
    facts["sha256"] = {
        str(path.relative_to(target)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name not in ("export.json", "check.npz", "README.md")
    }
    (target / "export.json").write_text(json.dumps(facts))
    assert "WriteFile" in refused(command("verify", target))
    assert not written.exists()


def test_onnx_runtime_refuses_weights_outside_the_folder_of_the_model(
    files: dict[str, Path], tmp_path: Path, command: Callable[..., Any]
) -> None:
    model = onnx.load(str(files[".onnx"]))
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    (tmp_path / "secret").write_bytes(bytes(10**6))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "link").symlink_to(tmp_path / "secret")
    values = weights.raw_data
    for location in ("../secret", str(tmp_path / "secret"), "link"):
        weights.raw_data = values
        onnx.external_data_helper.set_external_data(weights, location)
        weights.ClearField("raw_data")
        path = tmp_path / "m" / "m.onnx"
        path.write_bytes(model.SerializeToString())
        line = refused(command("load", path))
        assert "xternal data path" in line, line


def test_a_trusted_file_imports_a_class_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    (tmp_path / "own_layers.py").write_text(
        "import keras\nclass Twice(keras.layers.Layer):\n    def call(self, x): return x * 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import own_layers

    path = tmp_path / "own.keras"
    keras.Sequential([keras.Input((8, 8, 1)), own_layers.Twice()]).save(path)
    assert "contains code: own_layers:Twice" in refused(command("load", path))
    assert command("load", path, "--trust")[0] == 0


def test_loading_does_not_run_nodes_outside_functions(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    """So they may call the saver, and only functions need all checks."""
    from tensorflow.core.protobuf import saved_model_pb2

    folder = shutil.copytree(exported["saved_model"], tmp_path / "m")
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    graph = saved.meta_graphs[0]
    outputs = graph.signature_def["serving_default"].outputs
    outputs["probabilities"].name = graph.saver_def.save_tensor_name
    (folder / "saved_model.pb").write_bytes(saved.SerializeToString())
    images = pictures(3)
    expected = load(exported["saved_model"])(images)
    np.testing.assert_array_equal(load(folder)(images), expected)


def test_verify_and_load_explain_what_they_expect(
    tmp_path: Path, exported: dict[str, Path], command: Callable[..., Any]
) -> None:
    assert "expected an exported model" in refused(command("verify", tmp_path))
    assert "expected an exported model" in refused(command("load", tmp_path))
    assert "no such file or folder" in refused(command("load", tmp_path / "nothing"))
    shutil.copytree(exported["onnx"], tmp_path / "m" / "1")
    (tmp_path / "m" / "1" / "export.json").write_text("{}")
    assert "export.json cannot be read" in refused(command("verify", tmp_path / "m"))
    with pytest.raises(CheckError, match=r"2/model\.onnx: expected sha256"):
        shutil.copytree(exported["onnx"], tmp_path / "m" / "2")
        (tmp_path / "m" / "2" / "model.onnx").write_bytes(b"")
        verify(tmp_path / "m")  # the newest version


def scalar_loss(labels: Any, outputs: Any) -> Any:
    return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(labels, outputs))


def test_a_file_whose_loss_is_a_users_function_is_loaded_without_trust(tmp_path: Path) -> None:
    """Keras writes the function as builtins:function, which cannot be loaded."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", scalar_loss)
    model.save(tmp_path / "own.keras")
    for trust in (False, True):
        loaded = trainer.load(tmp_path / "own.keras", trust=trust)
        points = np.ones((4, 2), np.float32)
        np.testing.assert_array_equal(loaded(points), model(points).numpy())


# ---------------------------------------------------------------- files of earlier versions


def with_old_keys(text: str | bytes) -> str:
    """Renames a key of a stored configuration to its name in earlier versions, and adds others."""
    origin = json.loads(text) | {"precision": "mixed_bfloat16", "precision_difference": 0.001}
    training = origin["config"]["training"]
    training["steps_per_call"] = training.pop("steps_per_execution")
    return json.dumps(origin)


def test_files_of_earlier_versions_are_loaded(
    files: dict[str, Path], exported: dict[str, Path], tmp_path: Path
) -> None:
    """Their configuration has old keys, and their optimizer may be the former FusedAdam."""

    def use_fused_adam(members: dict[str, bytes]) -> None:
        config = json.loads(members["config.json"])
        optimizer = config["compile_config"]["optimizer"]
        former = {"module": "trainer.training.fused_adam", "class_name": "FusedAdam"}
        optimizer |= former | {"registered_name": "trainer>FusedAdam"}
        members["config.json"] = json.dumps(config).encode()

    old = {".keras": tmp_path / "old.keras"}
    repacked(files[".keras"], old[".keras"], use_fused_adam)
    with zipfile.ZipFile(files[".keras"]) as whole, zipfile.ZipFile(old[".keras"], "a") as archive:
        archive.comment = with_old_keys(whole.comment).encode()
    old["onnx"] = shutil.copytree(exported["onnx"], tmp_path / "old" / "1")
    record = old["onnx"] / "export.json"
    record.write_text(with_old_keys(record.read_text()))
    for path in old.values():
        assert load(path).evaluate()["accuracy"] > 0.5
    assert verify(old["onnx"])[0] == old["onnx"]


def test_truncated_weights_in_a_keras_file_are_refused(run: Run, in_tmp_path: Path) -> None:
    """In another process: opened in memory, such weights crash it at its end."""
    save(str(run.path), "whole.keras")
    with zipfile.ZipFile("whole.keras") as whole, zipfile.ZipFile("cut.keras", "w") as cut:
        for name in whole.namelist():
            content = whole.read(name)
            cut.writestr(name, content[:4000] if name.endswith(".h5") else content)
    command = [sys.executable, "-m", "trainer", "load", str(in_tmp_path / "cut.keras")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cut.keras cannot be loaded by Keras: " in done.stderr.splitlines()[-1]
