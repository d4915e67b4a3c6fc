"""Writes the list of the TensorFlow operations that an untrusted SavedModel may hold.

    python scripts/allowed_operations.py > trainer/saving/allowed_operations.txt

TensorFlow registers about 1,900 operations. It does not record which of them reach files, the
network, Python or other models: `ReadFile` and `ImmutableConst` count as stateless. So the list is
made from what is needed, and each operation on it must then be harmless.

Needed are the operations in the graphs of

- every layer of `keras.layers` with small options: the defaults, each boolean option flipped, each
  value of `VALUES`, other precisions, quantized weights; for inference and for training, because a
  network may use dropout when it predicts;
- every function of `keras.ops`, `keras.activations` and `keras.random`, because users write layers
  with them;
- this project's own exports;
- recurrent layers on a GPU: `CudnnRNNV3`, the only operation that is not traced.

Harmless is an operation that the registry describes as a function of numbers: it has no state and
no references, it reads no text, it calls no functions, and each of its text attributes is a choice
among listed values. Every other operation is in `REVIEWED` with a reason, and every other text
attribute in `TEXT_ATTRIBUTES`. If a needed operation is neither, the script prints its name and
ends with exit code 4: read what the operation does, then add it there, or to `LEFT_OUT`.

Run the script for each new version of TensorFlow or Keras. It takes a few minutes.
"""

import contextlib
import inspect
import itertools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import tensorflow as tf
from keras import layers
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import saved_model_pb2

from operation_internals import operation_definition
from trainer import data, models
from trainer.config import DataConfig, ModelConfig
from trainer.saving.formats import FORMATS
from trainer.saving.safety import SAVER_OPERATIONS

# ---------------------------------------------------------------- what is harmless, by review

_VARIABLE = "uses a variable that it gets as an input"
_TABLE = "uses a table in memory that it gets as an input"
_CALL = "calls functions, which are checked like the rest of the graph"
_TEXT = "computes with the text that it gets"
REVIEWED = {
    "Assert": "raises an error with the values that it gets",
    "AssignVariableOp": _VARIABLE,
    "Case": _CALL,
    "CheckNumerics": "raises an error if a value is not finite",
    "CudnnRNNV3": "its state is the random generator of its dropout",
    "DecodeImage": "decodes the content of a file that it gets, not a path",
    "DecodeJpeg": "decodes the content of a file that it gets, not a path",
    "DecodeRaw": _TEXT,
    "DisableCopyOnRead": _VARIABLE,
    "HashTableV2": "makes a table in memory; its name is checked for each model",
    "If": _CALL,
    "LookupTableExportV2": _TABLE,
    "LookupTableFindV2": _TABLE,
    "LookupTableImportV2": _TABLE,
    "MutableHashTableV2": "makes a table in memory; its name is checked for each model",
    "PartitionedCall": _CALL,
    "ReadVariableOp": _VARIABLE,
    "StatefulPartitionedCall": _CALL,
    "StatelessCase": _CALL,
    "StatelessIf": _CALL,
    "StatelessWhile": _CALL,
    "StaticRegexFullMatch": _TEXT,
    "StaticRegexReplace": _TEXT,
    "StringJoin": _TEXT,
    "StringLower": _TEXT,
    "StringNGrams": _TEXT,
    "StringSplitV2": _TEXT,
    "StringToHashBucketFast": _TEXT,
    "StringToHashBucketStrong": _TEXT,
    "Substr": _TEXT,
    "UnicodeDecode": _TEXT,
    "VarHandleOp": "makes a variable; its name is checked for each model",
    "VarIsInitializedOp": _VARIABLE,
    "While": _CALL,
}

# Text attributes that name no file, function or resource of another model.
TEXT_ATTRIBUTES = {
    "allowed_devices": "devices to place a variable on",
    "bad_indices_policy": "what to do with indices out of range",
    "config": "settings of a call, no longer used",
    "dct_method": "method to decode JPEG",
    "config_proto": "settings of a call: devices and optimizations",
    "container": "checked for each model",
    "debug_name": "shown in error messages",
    "encoding": "of text",
    "equation": "which axes are multiplied",
    "executor_type": "how the operations of a call are scheduled",
    "fill": "text",
    "fill_mode": "how pixels beyond the border are filled",
    "input_encoding": "of text",
    "interpolation": "how pixels are interpolated",
    "kernel_type": "how pixels are interpolated",
    "left_pad": "text",
    "message": "text",
    "placeholder": "text",
    "pattern": "a regular expression",
    "rewrite": "text",
    "right_pad": "text",
    "row_partition_types": "how ragged rows are described",
    "separator": "text",
    "set_operation": "union, intersection or difference",
    "shared_name": "checked for each model",
    "template": "text",
}

# Needed by something above, but not harmless.
LEFT_OUT = {
    "Empty": "returns memory as it was left; only ctc_loss, which no network needs, uses it",
}

# ---------------------------------------------------------------- what is needed: layers

# A shape without the batch, a type, and a kind: "dense", "sparse" or "ragged".
Sample = tuple[tuple[int | None, ...], str, str]
Options = dict[str, Any]

# Classes that are no layer of an exported network by themselves.
NO_LAYERS = {
    "Layer": "abstract",
    "Wrapper": "abstract",
    "InputLayer": "part of every network",
    "GRUCell": "part of RNN",
    "LSTMCell": "part of RNN",
    "SimpleRNNCell": "part of RNN",
    "StackedRNNCells": "part of RNN",
    "Equalization": "Keras 3.15 cannot put it in a network; it is called in `_special_calls`",
    "TFSMLayer": "holds another SavedModel",
    "FlaxLayer": "needs JAX; its SavedModel holds a compiled program",
    "JaxLayer": "needs JAX; its SavedModel holds a compiled program",
    "TorchModuleWrapper": "needs PyTorch; cannot be exported by TensorFlow",
}

# Values of required options, by the name of the option.
_REQUIRED: Options = {
    "activation": "relu",
    "axes": -1,
    "factor": 0.3,
    "filters": 2,
    "function": keras.ops.abs,
    "head_dim": 4,
    "height": 4,
    "height_factor": 0.3,
    "input_dim": 10,
    "kernel_size": 2,
    "key_dim": 4,
    "max_number": 3,
    "n": 3,
    "num_bins": 5,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "num_query_heads": 4,
    "output_dim": 4,
    "output_size": 2,
    "pool_size": 2,
    "rate": 0.3,
    "scale": 0.5,
    "stddev": 0.3,
    "units": 4,
    "width": 4,
    "width_factor": 0.3,
}


def _cells() -> layers.Layer:
    return layers.StackedRNNCells([layers.LSTMCell(4), layers.GRUCell(4), layers.SimpleRNNCell(4)])


# Options of single classes. Layers within layers are made anew for each network.
_SPECIAL: dict[str, Callable[[], Options]] = {
    "Bidirectional": lambda: {"layer": layers.LSTM(4)},
    "CategoryEncoding": lambda: {"num_tokens": 11},
    "Discretization": lambda: {"bin_boundaries": [0.0, 1.0]},
    "EinsumDense": lambda: {"equation": "abc,cd->abd", "output_shape": (None, 4)},
    "GroupNormalization": lambda: {"groups": 2},
    "IntegerLookup": lambda: {"vocabulary": [1, 2]},
    "Normalization": lambda: {"mean": 0.5, "variance": 2.0},
    "Permute": lambda: {"dims": (2, 1)},
    "Pipeline": lambda: {"layers": [layers.Rescaling(0.5)]},
    "RNN": lambda: {"cell": _cells()},
    "RandomPosterization": lambda: {"factor": 3},
    "Reshape": lambda: {"target_shape": (-1, 2)},
    "STFTSpectrogram": lambda: {"frame_length": 4, "frame_step": 2, "fft_length": 4},
    "SpectralNormalization": lambda: {"layer": layers.Dense(4)},
    "StringLookup": lambda: {"vocabulary": ["a", "b"]},
    "TextVectorization": lambda: {"vocabulary": ["a", "b"]},
    "TimeDistributed": lambda: {"layer": layers.Dense(4)},
}
_TF_IDF: Options = {"output_mode": "tf_idf", "idf_weights": [0.5, 0.5]}
# Values to try beside the defaults, by the name of the option. Booleans are flipped without a list.
VALUES: dict[str, list[Any]] = {
    "activity_regularizer": ["l2"],
    "data_format": ["channels_first"],
    "dilation_rate": [2],
    "fill_mode": ["constant", "nearest", "reflect", "wrap"],
    "groups": [1, 2],
    "implementation": [1, 2],
    "interpolation": ["nearest", "bilinear", "bicubic", "lanczos3", "lanczos5", "area"],
    "lora_rank": [2],
    "mask_value": [1],
    "mask_token": ["a", 1],
    "max_tokens": [10],
    "max_value": [6.0],
    "merge_mode": ["sum", "mul", "ave", None],
    "mode": ["log", "magnitude", "phase", "real", "imag", "angle", "psd", "stft"],
    "negative_slope": [0.1],
    "ngrams": [2],
    "noise_shape": [(1, 1)],
    "num_oov_indices": [0, 2],
    "output_mode": ["int", "one_hot", "multi_hot", "count"],
    "output_sequence_length": [3],
    "padding": ["valid", "same", "causal"],
    "pad_to_max_tokens": [True],
    "salt": [7, [7, 8]],
    "score_mode": ["concat"],
    "seed": [1],
    "split": [None, "character"],
    "standardize": [None, "lower", "strip_punctuation"],
    "strides": [2],
    "threshold": [0.1],
    "value_range": [(0, 1)],
    "window": ["hamming"],
}
SAMPLES: list[list[Sample]] = [
    [((8, 8, 3), "float32", "dense")],
    [((6, 4), "float32", "dense")],
    [((6, 8, 8, 3), "float32", "dense")],
    [((6, 4, 4, 4, 3), "float32", "dense")],
    [((4,), "float32", "dense")],
    [((64,), "float32", "dense")],
    [((32, 1), "float32", "dense")],
    [((8, 8, 3), "uint8", "dense")],
    [((8, 8, 1), "uint8", "dense")],
    [((), "int32", "dense")],
    [((6,), "int32", "dense")],
    [((6,), "int64", "dense")],
    [((1,), "string", "dense")],
    [((6,), "string", "dense")],
    [((), "string", "dense")],
    [((4,), "float32", "sparse")],
    [((6,), "int64", "sparse")],
    [((6,), "string", "sparse")],
    [((None,), "int64", "ragged")],
    [((None,), "string", "ragged")],
    [((6, 4), "float32", "dense")] * 2,
    [((4,), "float32", "sparse")] * 2,
    [((6,), "string", "dense")] * 2,
    [((), "string", "dense")] * 2,
    [((6,), "int64", "dense")] * 2,
    [((6, 4), "float32", "dense")] * 3,
]


def layer_classes() -> dict[str, type[layers.Layer]]:
    """Returns the classes of `keras.layers` that a network can be made of, each once."""
    found = {each.__name__: each for each in vars(layers).values() if inspect.isclass(each)}
    return {
        name: each
        for name, each in found.items()
        if issubclass(each, layers.Layer) and name not in NO_LAYERS
    }


def default_options(layer: type[layers.Layer]) -> Options:
    """Returns a value for each option that a layer requires."""
    parameters = inspect.signature(layer.__init__).parameters
    required = [name for name, each in parameters.items() if each.default is each.empty]
    known = {name: _REQUIRED[name] for name in required if name in _REQUIRED}
    return known | _SPECIAL.get(layer.__name__, dict)()


def option_variants(layer: type[layers.Layer]) -> Iterator[Options]:
    """Yields changes of the options of a layer, one option at a time."""
    yield {}
    for name, each in inspect.signature(layer.__init__).parameters.items():
        if isinstance(each.default, bool):
            yield {name: not each.default}
        for value in VALUES.get(name, []):
            yield {name: value}
    for precision in ("float64", "mixed_float16", "mixed_bfloat16"):
        yield {"dtype": precision}
    if "idf_weights" in inspect.signature(layer.__init__).parameters:
        yield _TF_IDF


def build(layer: type[layers.Layer], options: Options, samples: list[Sample]) -> keras.Model:
    """Builds a network of one layer.

    Raises:
        Exception: Of any kind: the layer does not accept these options or inputs.
    """
    inputs = [
        keras.Input(shape, dtype=dtype, sparse=kind == "sparse", ragged=kind == "ragged")
        for shape, dtype, kind in samples
    ]
    made = layer(**default_options(layer) | options)
    if "value" in inspect.signature(made.call).parameters:  # attention
        return keras.Model(inputs, made(*inputs))
    return keras.Model(inputs, made(inputs if len(inputs) > 1 else inputs[0]))


def first_model(layer: type[layers.Layer]) -> tuple[list[Sample], keras.Model, set[str]]:
    """Returns the first inputs that a layer accepts, and a network of it with its operations.

    Raises:
        ValueError: It accepts none.
    """
    reasons = []
    for samples in SAMPLES:
        try:
            model = build(layer, {}, samples)
            operations = traced_operations(model)
        except Exception as error:  # a layer raises errors of any kind for inputs it does not take
            reasons.append(str(error))
        else:
            return samples, model, operations
    raise ValueError(f"{layer.__name__} accepts no sample: {reasons[0]}")


def vocabulary_models() -> dict[str, keras.Model]:
    """Returns networks of the layers with a vocabulary, given to them or learned from data."""
    lookup, adapted = layers.StringLookup(vocabulary=["a", "b"]), layers.StringLookup()
    numbers, text = layers.IntegerLookup(), layers.TextVectorization()
    adapted.adapt(["a", "b"])
    numbers.adapt([1, 2])
    text.adapt(["a b", "b c"])
    return {
        "given": keras.Sequential([keras.Input((1,), dtype="string"), lookup]),
        "adapted": keras.Sequential([keras.Input((1,), dtype="string"), adapted]),
        "numbers": keras.Sequential([keras.Input((1,), dtype="int64"), numbers]),
        "text": keras.Sequential([keras.Input((), dtype="string"), text]),
    }


def traced_operations(model: keras.Model, *, training: bool = False) -> set[str]:
    """Returns the operations in the graph of a network."""

    def call(*inputs: Any) -> Any:
        return model(list(inputs) if len(inputs) > 1 else inputs[0], training=training)

    return _of_function(call, [_specification(tensor) for tensor in model.inputs])


def _saved_operations(folder: Path) -> set[str]:
    """Returns the operations in a SavedModel, but for those that touch its files."""
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    return _operations(saved.meta_graphs[0].graph_def) - SAVER_OPERATIONS


def _specification(tensor: Any) -> Any:
    if tensor.sparse:
        return tf.SparseTensorSpec(tensor.shape, tensor.dtype)
    if tensor.ragged:
        return tf.RaggedTensorSpec(tensor.shape, tensor.dtype)
    return tf.TensorSpec(tensor.shape, tensor.dtype)


def _of_function(function: Callable[..., Any], specifications: list[Any]) -> set[str]:
    traced = tf.function(function, autograph=False).get_concrete_function(*specifications)
    return _operations(traced.graph.as_graph_def())


def _operations(graph: Any) -> set[str]:
    """Returns the operations of a graph and of its functions."""
    functions = {function.signature.name for function in graph.library.function}
    inner = {node.op for function in graph.library.function for node in function.node_def}
    return ({node.op for node in graph.node} | inner) - functions


def _of_layers() -> set[str]:
    """Returns the operations of all layers."""
    found: set[str] = set()
    for layer in layer_classes().values():
        samples, _, _ = first_model(layer)
        cases: list[tuple[Options, list[Sample]]] = [({}, each) for each in SAMPLES]
        cases += [(options, samples) for options in option_variants(layer)]
        modes = (
            (False, True) if "training" in inspect.signature(layer.call).parameters else (False,)
        )
        for options, inputs in cases:
            with contextlib.suppress(Exception):  # not every layer takes every input and option
                model = build(layer, options, inputs)
                for training in modes:
                    found |= traced_operations(model, training=training)
        for precision in ("int8", "int4", "float8"):
            with contextlib.suppress(Exception):
                model = build(layer, {}, samples)
                model.quantize(precision)
                found |= traced_operations(model)
    return found


# ---------------------------------------------------------------- what is needed: functions

_NAMESPACES = (keras.ops, keras.ops.image, keras.ops.linalg, keras.ops.nn, keras.ops.numpy)
_PLAIN = (int, float, str)
_M = tf.linalg.diag([2.0, 3.0, 2.0, 4.0]) + 0.1  # has an inverse, logarithms and roots
_I = tf.constant([[1, 2], [3, 4]])
_V = tf.constant([1.0, 2.0, 3.0])
_INDICES = tf.constant([0, 1, 1])
_IMAGE = tf.ones((1, 8, 8, 3))
_SEQUENCE = tf.ones((1, 16, 4))
_SPARSE = tf.sparse.from_dense(_M)
_TENSORS = [
    *(tf.cast(_M, dtype) for dtype in ("float32", "float64", "bfloat16", "int8", "complex64")),
    *(_M > 1, _I, _V, _INDICES, _IMAGE, tf.cast(_IMAGE, tf.uint8), _SEQUENCE, _SPARSE),
    tf.ones((1, 6, 6, 6, 2)),
]
# Arguments to try with every function: the registry of Keras does not say what each one takes.
_ARGUMENTS: list[tuple[Any, ...]] = [
    *((tensor,) for tensor in _TENSORS),
    *((tensor, tensor) for tensor in _TENSORS),
    *((tensor, number) for tensor in (_M, _I, _V, _IMAGE) for number in (1, 2, 0.5)),
    *((_SPARSE, _M), (_M, _SPARSE), (_M, 2, 2), (_M, (2, 8)), (_M, "float16"), (_V, "int32")),
    *((_M, _M, _M), (_M > 1, _M, _M), (_M, _INDICES), (_V, _INDICES), (_M, _INDICES, 3)),
    *(([_M, _M],), ([_V, _V],), ([_SPARSE, _SPARSE],), (_IMAGE, (4, 4)), (_M, _I, 1.0)),
    *((4,), ((2, 2),), ((2, 2), 1.0), ((2, 2), 0, 9), ((2, 2), 3.0, 0.5), (0.0, 1.0, 5)),
]


def _random(tensor: tf.Tensor) -> tf.Tensor:
    return keras.random.dropout(tensor, 0.5, seed=_SEED)


# Calls of functions that accept none of these.
_KERNEL = tf.ones((2, 2, 3, 3))
_LENGTHS = tf.constant([2])
_SEED = keras.random.SeedGenerator(1)
_CORNERS = tf.constant([[[0.0, 0.0], [0.0, 7.0], [7.0, 0.0], [7.0, 7.0]]])
_SIZES = ((4, 4), (16, 16))
_CALLS: list[Callable[[], Any]] = [
    lambda: keras.ops.associative_scan(keras.ops.add, _V),
    lambda: keras.ops.cond(_V[0] > 0, lambda: _V, lambda: -_V),
    lambda: keras.ops.fori_loop(0, tf.cast(_V[0], tf.int32), lambda _, x: x + 1, _V),
    lambda: keras.ops.map(keras.ops.abs, _V),
    lambda: keras.ops.scan(lambda a, x: (a + x, a), _V[0], _V),
    lambda: keras.ops.scatter(_I, _V[:2], (9, 9)),
    lambda: keras.ops.slice(_M, (0, 0), (2, 2)),
    lambda: keras.ops.switch(_INDICES[0], [keras.ops.abs, keras.ops.negative], _V),
    lambda: keras.ops.switch(_INDICES[0], [keras.ops.abs, _random], _V),
    lambda: keras.ops.vectorized_map(keras.ops.abs, _M),
    lambda: keras.ops.while_loop(lambda x: x[0] < 9, lambda x: (x + 1,), (_V,)),
    lambda: keras.ops.rearrange(_M, "a b -> b a"),
    lambda: keras.ops.jvp(keras.ops.abs, (_V,), (_V,)),
    lambda: keras.ops.in_top_k(_INDICES, _M[:3], 2),
    lambda: keras.ops.istft(keras.ops.stft(_V, 2, 1, 2), 2, 1, 2),
    lambda: keras.ops.nn.batch_normalization(_M, _M[0], _M[0], -1, _M[0], _M[0]),
    lambda: keras.ops.nn.conv(_IMAGE, _KERNEL),
    lambda: keras.ops.nn.conv_transpose(_IMAGE, _KERNEL, padding="same"),
    lambda: keras.ops.nn.depthwise_conv(_IMAGE, _KERNEL),
    lambda: keras.ops.nn.separable_conv(_IMAGE, _KERNEL, tf.ones((1, 1, 9, 2))),
    lambda: keras.ops.nn.ctc_decode(_SEQUENCE, _LENGTHS),
    lambda: keras.ops.nn.ctc_decode(_SEQUENCE, _LENGTHS, strategy="beam_search"),
    lambda: keras.ops.nn.ctc_loss(_I[:1], _SEQUENCE, _LENGTHS, _LENGTHS),
    lambda: keras.ops.nn.depth_to_space(tf.ones((1, 4, 4, 4)), 2),
    lambda: keras.ops.nn.dot_product_attention(*[tf.ones((1, 4, 2, 4))] * 3),
    lambda: keras.ops.nn.fold(tf.ones((1, 12, 4)), 4, 2, stride=2),
    lambda: keras.ops.nn.sparse_categorical_crossentropy(_INDICES, _M[:3]),
    lambda: keras.ops.einsum("ij,jk->ik", _M, _M),
    lambda: keras.ops.kaiser(4, 2.0),
    lambda: keras.ops.moveaxis(_M, 0, 1),
    lambda: keras.ops.swapaxes(_M, 0, 1),
    lambda: keras.ops.select([_M > 1, _M > 2], [_M, -_M]),
    lambda: keras.ops.image.crop_images(_IMAGE, 1, 1, target_height=2, target_width=2),
    lambda: keras.ops.image.pad_images(_IMAGE, 1, 1, 1, 1),
    lambda: keras.ops.image.extract_patches_3d(tf.ones((1, 6, 6, 6, 2)), 2),
    lambda: keras.ops.image.map_coordinates(_M, tf.ones((2, 4)), 1, fill_mode="reflect"),
    lambda: keras.ops.image.ssim(tf.ones((1, 16, 16, 3)), tf.ones((1, 16, 16, 3))),
    lambda: layers.Equalization()(_IMAGE, training=True),
    lambda: keras.random.beta((2,), 1.0, 2.0),
    lambda: keras.random.binomial((2,), 3.0, 0.5),
    *(
        partial(keras.ops.image.resize, _IMAGE, size, how, antialias=size == (4, 4))
        for how in ("nearest", "bilinear", "bicubic", "lanczos3", "lanczos5", "area")
        for size in _SIZES
    ),
    *(
        partial(keras.ops.image.affine_transform, _IMAGE, tf.ones((1, 8)), how)
        for how in ("nearest", "bilinear")
    ),
    *(
        partial(keras.ops.image.perspective_transform, _IMAGE, _CORNERS, _CORNERS, how)
        for how in ("nearest", "bilinear")
    ),
    *(
        partial(
            keras.ops.image.scale_and_translate,
            *(_IMAGE, (1, 4, 4, 3), _V[:2], _V[:2], (1, 2), how),
        )
        for how in ("linear", "cubic", "lanczos3")
    ),
]


def _functions() -> Iterator[Callable[..., Any]]:
    for module in (*_NAMESPACES, keras.activations, keras.random):
        for name, function in vars(module).items():
            if name[0] not in "_" and name[0].islower() and callable(function):
                yield function


def _of_functions() -> set[str]:
    """Returns the operations of all functions."""
    found: set[str] = set()
    for function, arguments in itertools.product(set(_functions()), _ARGUMENTS):
        with contextlib.suppress(Exception):  # most functions refuse most arguments
            found |= _of_call(function, arguments)
    for call in _CALLS:
        found |= _of_function(call, [])
    return found


def _of_call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> set[str]:
    """Returns the operations of a function whose tensors are inputs of the graph."""

    def call(*tensors: Any) -> Any:
        given = iter(tensors)
        return function(
            *tf.nest.map_structure(lambda x: x if isinstance(x, _PLAIN) else next(given), arguments)
        )

    tensors = [each for each in tf.nest.flatten(arguments) if not isinstance(each, _PLAIN)]
    return _of_function(call, [tf.type_spec_from_value(each) for each in tensors])


def _of_exports(folder: Path) -> set[str]:
    """Returns the operations of this project's exports, and of vocabularies, which are tables."""
    found: set[str] = set()
    for name, model in vocabulary_models().items():
        model.export(folder / name, verbose=False)
        found |= _saved_operations(folder / name)
    for channels, name in itertools.product((1, 3), ("cnn", "mlp")):
        spec = data.load(
            DataConfig(name="synthetic", options={"examples": 40, "channels": channels})
        ).spec
        model = models.build(ModelConfig(name=name), spec)
        target = folder / f"{name}-{channels}"
        FORMATS["saved_model"].write(model, spec, tf.zeros(0), target)
        found |= _saved_operations(target)
    return found


# ---------------------------------------------------------------- the list


def unreviewed(name: str) -> str | None:
    """Returns why an operation is not harmless by the registry or by review, None if it is."""
    definition = operation_definition(name)
    if definition is None:
        return "it is not registered by TensorFlow itself"
    arguments = [*definition.input_arg, *definition.output_arg]
    reasons = [
        f"text attribute {attribute.name!r}"
        for attribute in definition.attr
        if attribute.type in ("string", "list(string)")
        and not attribute.allowed_values.list.s
        and attribute.name not in TEXT_ATTRIBUTES
    ]
    if name not in REVIEWED:
        reasons += ["it has state"] * definition.is_stateful
        reasons += ["it has references"] * any(argument.is_ref for argument in arguments)
        reasons += ["it reads text"] * any(
            argument.type == types_pb2.DT_STRING for argument in definition.input_arg
        )
        reasons += ["it calls functions"] * any("func" in a.type for a in definition.attr)
    return ", ".join(reasons) or None


def main() -> int:
    """Prints the list; returns 4 if a needed operation was not reviewed."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        needed = _of_exports(Path(folder))
    needed |= _of_layers() | _of_functions() | {"CudnnRNNV3"}
    allowed = sorted(needed - LEFT_OUT.keys())
    faults = {name: reason for name in allowed if (reason := unreviewed(name))}
    for name, reason in faults.items():
        print(f"allowed_operations: {name}: {reason}; review it", file=sys.stderr)
    print("# Written by scripts/allowed_operations.py. Do not edit.")
    print(f"# TensorFlow {tf.__version__}, Keras {keras.__version__}")
    print("\n".join(allowed))
    return 4 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
