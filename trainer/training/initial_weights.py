"""Initial weights of a training from another run or file: `training.init_from`.

Layers are matched by path and shape in Keras's weights files, so the code of the source is not
needed. The path is the name of a layer after those of the layers around it. Keras numbers layers
without a name per process. Here they are numbered by class in their order, as in these files.
"""

import logging
import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import keras

from trainer.errors import InputError, expect
from trainer.files import sha256
from trainer.keras_objects import KERAS_ERRORS
from trainer.run import Run, open_run
from trainer.training.call import Logs
from trainer.training.callbacks import format_metrics, to_json

_log = logging.getLogger(__name__)

_SHOWN = 4  # layers in a line of the log


@dataclass(frozen=True)
class InitialWeights:
    """What was loaded into a model.

    Attributes:
        source: Path of the run or file.
        sha256: Checksum of the file.
        loaded: Paths of the layers that received weights.
        not_loaded: The other layers with weights, and why.
    """

    source: str
    sha256: str
    loaded: list[str]
    not_loaded: dict[str, str]

    def record(self, run: Run, scores: Logs) -> None:
        """Logs what was loaded and its scores on the validation images; writes the JSON file."""
        named = {f"val_{name}": value for name, value in scores.items()}
        _log.info("weights  %s", self)
        _log.info("start    %s  before training", format_metrics(named))
        run.write_json("initial_weights.json", asdict(self) | {"validation": to_json(scores)})

    def __str__(self) -> str:
        """Returns one line for the log."""
        why = [f"{path}: {reason}" for path, reason in self.not_loaded.items()]
        loaded = f"{len(self.loaded)} layers loaded from {self.source}{_first(self.loaded)}"
        return f"{loaded}, {len(why)} not loaded{_first(why)}"


def load_initial_weights(
    model: keras.Model, reference: str, runs_directory: str = "runs"
) -> InitialWeights:
    """Loads weights into the layers of a model that have the same path and shape in a source.

    Args:
        model: Its optimizer is not built yet, because some optimizers copy the weights.
        reference: A finished run (directory, name or "latest"), or a .weights.h5 or .keras file.
        runs_directory: Folder that holds the run directories.

    Raises:
        InputError: There is no such run or file, the run is not finished, the file is damaged, or
            no layer matches.
    """
    if reference.endswith((".weights.h5", ".keras")):
        source = file = Path(reference)
    else:
        run = open_run(reference, runs_directory=runs_directory)
        source, file = run.path, run.final_weights()
    with tempfile.TemporaryDirectory() as folder:
        try:
            loaded, not_loaded = _copy_weights(file, model, Path(folder))
        except (*KERAS_ERRORS, RuntimeError, zipfile.BadZipFile) as error:
            raise InputError(f"training.init_from: {file} cannot be read: {error}") from None
    initial = InitialWeights(str(source), sha256(file), loaded, not_loaded)
    expect(loaded, "training.init_from", "layers with the same path and shape", initial)
    return initial


def _copy_weights(file: Path, model: keras.Model, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Saves the model, replaces the weights that match the file, and loads the result."""
    if file.suffix == ".keras":
        with zipfile.ZipFile(file) as archive:
            file = Path(archive.extract("model.weights.h5", folder))
    merged = folder / "merged.weights.h5"
    model.save_weights(merged)
    loaded, not_loaded = list[str](), dict[str, str]()
    with h5py.File(file, "r") as source, h5py.File(merged, "r+") as target:
        found = _weights_by_path(source)
        for path, own in _weights_by_path(target).items():
            expected, received = _shapes(own), _shapes(found.get(path, {}))
            if path not in found:
                not_loaded[path] = "not in the source"
            elif expected != received:
                why = f"expected shapes {[*expected.values()]}, received {[*received.values()]}"
                not_loaded[path] = why
            else:
                loaded.append(path)
                for name in own:
                    own[name][...] = found[path][name][...]
    model.load_weights(merged)
    return loaded, not_loaded


def _weights_by_path(file: h5py.File) -> dict[str, h5py.Group]:
    """Returns the weights of each layer of a Keras weights file by the path of the layer."""
    locations: list[str] = []
    file.visit(locations.append)  # does not follow links to other files
    groups = [each for each in locations if each.endswith("/vars") and len(file[each])]
    return {
        _layer_path(file, each): file[each] for each in groups if not each.startswith("optimizer/")
    }


def _layer_path(file: h5py.File, location: str) -> str:
    """Returns the path of the layer whose weights are at a location in a Keras weights file.

    Layers in a list are in groups named by class and order, for example "layers/dense_1". Others
    are in groups named by their attribute. A group "vars" in these groups has the layer's name.
    """
    keys, names, in_list = location.split("/")[:-1], list[str](), False
    for i, key in enumerate(keys, start=1):
        layer = file.get("/".join([*keys[:i], "vars"]))
        name = layer.attrs.get("name", key) if in_list and layer is not None else key
        by_keras = re.sub(r"_\d+$", "", name) == re.sub(r"_\d+$", "", key)
        in_list = layer is None
        if key != "layers":
            names.append(key if by_keras else name)
    return "/".join(names)


def _shapes(weights: Mapping[str, h5py.Dataset]) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in weights.items()}


def _first(names: list[str]) -> str:
    more = ["…"] if len(names) > _SHOWN else []
    return f" ({', '.join([*names[:_SHOWN], *more])})" if names else ""
