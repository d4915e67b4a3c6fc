"""The derivative of an expression by three methods that share no code, side by side.

runs/<UTC time>-gradient/
    gradient.json    everything that was found
    function.png     the function and its tangent, where there is one scalar variable
    tensorboard/     the recorded graph, the picture and the table
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trainer.errors import InputError, did_you_mean
from trainer.files import write_text
from trainer.gradient.differences import element_names, number_text
from trainer.gradient.expression import Expression, evaluate, largest_part, parse, parse_values
from trainer.run import make_directory

DEFAULT_EXPRESSION, DEFAULT_AT, DEFAULT_WRT = "a*w**2 + b*w + c", "a=1,b=2,c=3,w=4", "w"
MOST_ORDER = 4
MOST_HESSIAN = 16  # elements: 136 second derivatives, each by three methods
WATCH = (
    "tape.watch: a tape records what happens to each tf.Variable by itself, and to a tensor, as "
    "these values are, only after tape.watch(tensor)"
)
_MOST_DRAWN = 1e100
# What is lost from order to order: an order divides the rounding of the differences once more by h.
_TOLERANCES = {1: 1e-6, 2: 1e-5, 3: 1e-4, 4: 1e-3}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Method:
    """What one method says.

    Attributes:
        name: Of the method.
        value: Of the expression, float64.
        derivative: float64 [outputs, inputs], one more axis of inputs for each further order.
    """

    name: str
    value: Array
    derivative: Array


@dataclass(frozen=True)
class Result:
    """A derivative by three methods.

    Attributes:
        expression: And the point.
        wrt: Names of the variables.
        order: Of the derivative.
        methods: Tape, symbols and differences.
        formulas: Closed forms by what they are of, such as "d/dw"; scalars only.
        notes: What a person should know besides, a line each.
        disagreement: The largest relative one between any two methods; nan where one is not finite.
        estimated_error: Of the differences, by themselves, absolute.
        graph: The recorded one.
    """

    expression: Expression
    wrt: tuple[str, ...]
    order: int
    methods: tuple[Method, ...]
    formulas: dict[str, str]
    notes: tuple[str, ...]
    disagreement: float
    estimated_error: float
    graph: Any = field(repr=False)

    @property
    def tolerance(self) -> float:
        """The largest relative disagreement that counts as rounding."""
        return _TOLERANCES[self.order]

    @property
    def passed(self) -> bool:
        """Whether all three say the same."""
        return self.disagreement <= self.tolerance  # nan is not

    @property
    def verdict(self) -> str:
        """A line that says whether they agree, and how well."""
        return (
            f"the three {'agree' if self.passed else 'DISAGREE'}: largest relative disagreement "
            f"{self.disagreement:.1e}, tolerance {self.tolerance:.0e}"
        )

    @property
    def title(self) -> str:
        """The expression and the point."""
        return _shortened(f"{self.expression.text} at {_point(self.expression)}")

    @property
    def lines(self) -> tuple[str, ...]:
        """What is said besides the table."""
        formulas = (f"{name} = {_shortened(formula)}" for name, formula in self.formulas.items())
        return (*formulas, self.verdict, *self.notes)

    def table(self) -> list[dict[str, str]]:
        """Returns a dictionary of title and text for each method."""
        derivative = self._derivative()
        return [
            {
                "method": method.name,
                "value": _shown(method.value),
                derivative: _shown(self._squeezed(method.derivative)),
            }
            for method in self.methods
        ]

    def document(self) -> dict[str, Any]:
        """Returns everything but the pictures, in plain values; null stands for what is not finite.

        The derivative's axes are those of `Method`.
        """
        return {
            "expression": self.expression.text,
            "at": {name: array.tolist() for name, array in self.expression.at.items()},
            "wrt": list(self.wrt),
            "order": self.order,
            "inputs": self._inputs(),
            "methods": {
                method.name: {
                    "value": _plain(method.value),
                    "derivative": _plain(self._squeezed(method.derivative)),
                }
                for method in self.methods
            },
            "formulas": self.formulas,
            "agree": self.passed,
            "largest_relative_disagreement": _plain(np.asarray(self.disagreement)),
            "tolerance": self.tolerance,
            "estimated_error_of_differences": _plain(np.asarray(self.estimated_error)),
            "notes": list(self.notes),
        }

    def write(self, runs: str) -> Path:
        """Keeps it in a new directory of its own.

        Args:
            runs: Folder that holds the run directories.

        Raises:
            InputError: It cannot be written.
        """
        path = make_directory(runs, "gradient")
        text = json.dumps(self.document(), indent=2, ensure_ascii=False, allow_nan=False)
        figure = self._figure()
        try:
            write_text(path / "gradient.json", text + "\n")
            if figure is not None:
                figure.savefig(path / "function.png", dpi=150)
            self._write_tensorboard(path / "tensorboard", figure)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from None
        return path

    def _write_tensorboard(self, path: Path, figure: Figure | None) -> None:
        import tensorflow as tf

        from trainer.figures import as_png
        from trainer.report import write_image

        titles = list(self.table()[0])
        rows = [titles, ["---"] * len(titles), *([*row.values()] for row in self.table())]
        lines = ["| " + " | ".join(cells) + " |" for cells in rows]
        words = [f"`{self.title}`", "\n".join(lines), *(f"`{line}`" for line in self.lines)]
        with tf.summary.create_file_writer(str(path)).as_default(step=0):
            tf.summary.graph(self.graph)
            tf.summary.text("gradient", "\n\n".join(words))
            if figure is not None:
                write_image("function", as_png(figure))

    def _figure(self) -> Figure | None:
        """Draws function and tangent over the neighbourhood of the point; one scalar variable."""
        scalar = self.expression.root.shape == () and self.expression.at[self.wrt[0]].shape == ()
        if len(self.wrt) != 1 or self.order != 1 or not scalar:
            return None
        name, tape = self.wrt[0], self.methods[0]
        x, y, slope = (
            float(self.expression.at[name]),
            float(tape.value),
            float(tape.derivative[0, 0]),
        )
        if max(abs(x), abs(y), abs(slope)) > _MOST_DRAWN:
            return None  # beyond what axes can be drawn for
        return tangent_figure(self.expression, name, x, y, slope)

    def _inputs(self) -> list[str]:
        return [
            label
            for name in self.wrt
            for label in element_names(name, self.expression.at[name].shape)
        ]

    def _squeezed(self, derivative: Array) -> Array:
        """Leaves out the axis of outputs of a scalar, and every axis of a single scalar input."""
        if self.expression.root.shape == ():
            derivative = derivative[0]
        if len(self.wrt) == 1 and self.expression.at[self.wrt[0]].shape == ():
            derivative = derivative.reshape(derivative.shape[: derivative.ndim - self.order])
        return derivative

    def _derivative(self) -> str:
        """Returns the name of what was computed, such as "d/dw" or "Hessian by a, w"."""
        d = "d" if self.order == 1 else f"d{self.order}"
        power = "" if self.order == 1 else str(self.order)
        if len(self.wrt) == 1 and self.expression.at[self.wrt[0]].shape == ():
            return f"{d}/d{self.wrt[0]}{power}"
        kind = "Hessian" if self.order == 2 else "gradient"
        if self.expression.root.shape != ():
            kind = "Jacobian" if self.order == 1 else "second derivatives"
        return f"{kind} by {', '.join(self.wrt)}"


def derive(
    text: str | None = None, *, at: str | None = None, wrt: str | None = None, order: int = 1
) -> Result:
    """Differentiates an expression by tape, by symbols and by differences, all in float64.

    Args:
        text: Such as "a*w**2 + b*w + c", which it is where none is given.
        at: The value of each name: "a=1,x=[1,2,3],A=[[1,2],[3,4]]".
        wrt: The variables, separated by commas; not needed where there is one.
        order: Of the derivative: 1 or 2; up to 4 for one scalar variable of a scalar expression.

    Raises:
        InputError: Something of this cannot be read, or the expression is not finite or not
            differentiable at the point.
    """
    at = DEFAULT_AT if text is None and at is None else at
    wrt = DEFAULT_WRT if text is None and wrt is None else wrt
    expression = parse(DEFAULT_EXPRESSION if text is None else text, parse_values(at) if at else {})
    names = _variables(expression, wrt)
    _require_order(expression, names, order)
    largest = largest_part(expression)
    # TensorFlow and sympy take seconds to import: what is refused above is refused at once.
    from trainer.gradient import differences, symbols, tape

    numeric = differences.derive(expression, names, order)
    symbolic = symbols.derive(expression, names, order)
    taped = tape.derive(expression, names, order)
    methods = (
        Method("tf.GradientTape", taped.value, taped.derivative),
        Method("symbolic (sympy)", symbolic.value, symbolic.derivative),
        Method("central differences", numeric.value, numeric.derivative),
    )
    return Result(
        expression,
        names,
        order,
        methods,
        _closed_forms(expression, names, symbolic.formulas),
        (*_independence(names, order, taped.unconnected), WATCH),
        _disagreement(methods, numeric.error, largest, _TOLERANCES[order]),
        float(numeric.error.max()),
        taped.graph,
    )


def tangent_figure(expression: Expression, name: str, x: float, y: float, slope: float) -> Figure:
    """Draws an expression as a function of one scalar, with its tangent.

    Args:
        expression: Its other names keep their values.
        name: Of the variable.
        x: Where the tangent touches.
        y: The value there.
        slope: The derivative there.
    """
    reach = max(1.0, abs(x))
    points = np.linspace(x - reach, x + reach, 401)
    values = np.array([evaluate(expression, expression.at | {name: np.array(p)}) for p in points])
    values[~(abs(values) < _MOST_DRAWN)] = np.nan  # matplotlib leaves a gap
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(points, values, color="tab:blue", label=_shortened(expression.text))
    # A pole beside the point would flatten everything else.
    low, high = np.nanpercentile(values, [2, 98])
    room = 0.1 * (max(high, y) - min(low, y)) or 1.0
    axes.set_ylim(min(low, y) - room, max(high, y) + room)
    axes.axline((x, y), slope=slope, color="tab:orange", label=f"tangent, slope {slope:.6g}")
    axes.plot([x], [y], "o", color="black")
    axes.annotate(
        f"({number_text(x)}, {y:.6g})", (x, y), xytext=(8, -14), textcoords="offset points"
    )
    axes.set_xlabel(name, parse_math=False)
    axes.set_title(_shortened(_point(expression, without=name)), fontsize=9, parse_math=False)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)
    return figure


def _variables(expression: Expression, wrt: str | None) -> tuple[str, ...]:
    used = expression.root.names()
    if wrt is None:
        if len(used) != 1:
            known = f"of {', '.join(sorted(used))}" if used else "and the expression has none"
            raise InputError(f"--wrt: expected the variables to differentiate by, {known}")
        wrt = next(iter(used))
    names = tuple(name.strip() for name in wrt.split(","))
    for name in names:
        if name not in expression.at:
            known = did_you_mean(name, expression.at) if expression.at else "there is none"
            raise InputError(f"--wrt: {name!r} has no value: {known}")
    if len(set(names)) < len(names):
        raise InputError(f"--wrt: expected each name once, received {wrt}")
    idle = sorted(expression.at.keys() - used - set(names))
    if idle:
        raise InputError(
            f"--at gives a value to {', '.join(idle)}: expected names of the expression or of "
            f"--wrt, which has {', '.join(sorted(used))}"
        )
    return names


def _require_order(expression: Expression, names: Sequence[str], order: int) -> None:
    inputs = sum(expression.at[name].size for name in names)
    most = 2 if inputs > 1 or expression.root.shape else MOST_ORDER
    if order > 1 and inputs > MOST_HESSIAN:
        raise InputError(
            f"--order {order}: expected at most {MOST_HESSIAN} elements to differentiate by, "
            f"received {inputs}"
        )
    if not 1 <= order <= most:
        why = "" if most == MOST_ORDER else " (more for one scalar variable of a scalar expression)"
        raise InputError(f"--order: expected 1 to {most}{why}, received {order}")


def _independence(names: Sequence[str], order: int, unconnected: dict[str, int]) -> list[str]:
    """Says of which variables there is no way to the result, where GradientTape returns None."""
    notes = []
    for name in names:
        lowest = unconnected.get(name)
        if lowest == 1:
            notes.append(
                f"the expression does not depend on {name}: the derivative is 0; GradientTape says "
                "None for that"
            )
        elif lowest is not None:
            notes.append(
                f"the derivative of order {lowest - 1} does not depend on {name} any more: "
                f"{'that of' if lowest == order else 'all from'} order {lowest} is 0; GradientTape "
                "says None for that"
            )
    return notes


def _closed_forms(
    expression: Expression, names: Sequence[str], formulas: NDArray[Any]
) -> dict[str, str]:
    """Returns the formulas where everything is a scalar, each second derivative once."""
    import sympy

    if expression.root.shape or any(array.shape for array in expression.at.values()):
        return {}
    found = {}
    for index in np.ndindex(*formulas.shape[1:]):
        if list(index) == sorted(index):
            by = [names[i] for i in index]
            many = "" if len(by) == 1 else str(len(by))
            below = f"{by[0]}{many}" if len(set(by)) == 1 else " d".join(by)
            found[f"d{many}/d{below}"] = sympy.sstr(formulas[(0, *index)], full_prec=False)
    return found


def _disagreement(
    methods: Sequence[Method], error: Array, largest: float, tolerance: float
) -> float:
    """Returns the largest relative disagreement of value or derivative between two methods.

    Relative to the largest of the three, but at the least to what rounding and the differences'
    own error allow: where a derivative is 0, all that is left of it is their error.

    Args:
        methods: The three.
        error: Of the differences, as they estimate it, of the derivative's shape; it counts up to a
            fixed part of `largest`, or of 1, so that no estimate excuses everything.
        largest: Magnitude of a part of the expression.
        tolerance: Within which they agree.
    """
    values = np.stack([method.value for method in methods])
    derivatives = np.stack([method.derivative for method in methods])
    floor = np.minimum(4 * error / tolerance, max(largest, 1.0))
    floor = np.maximum(floor, 1e-6 * abs(derivatives).max())
    return float(np.max([_spread(values, 1e-6 * largest), _spread(derivatives, floor)]))


def _spread(found: Array, floor: Array | float) -> float:
    apart = found.max(axis=0) - found.min(axis=0)
    scale = np.maximum(abs(found).max(axis=0), floor)
    # Zero three times is agreement; what is not finite in a method is none, and stays nan.
    return float(np.divide(apart, scale, out=np.copy(apart), where=scale != 0).max())


def _point(expression: Expression, without: str = "") -> str:
    """Writes the value of each name but one."""
    others = [(name, array) for name, array in expression.at.items() if name != without]
    return ", ".join(f"{name} = {_exact(array)}" for name, array in others)


def _exact(array: Array) -> str:
    """Writes numbers with all their digits: 0.9999999 is not 1."""
    if array.shape == ():
        return number_text(float(array))
    return np.array2string(array, floatmode="unique", separator=", ", threshold=36, edgeitems=2)


def _shown(array: Array) -> str:
    if array.shape == ():
        return f"{float(array):.12g}"
    return np.array2string(array, precision=6, separator=", ", threshold=36, edgeitems=2)


def _plain(array: Array) -> Any:
    """Returns lists of numbers; None for what is not finite, which JSON has no word for."""
    if array.shape == ():
        return float(array) if np.isfinite(array) else None
    return [_plain(np.asarray(part)) for part in array]


def _shortened(text: str) -> str:
    return text if len(text) <= 150 else f"{text[:147]}..."
