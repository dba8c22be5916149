"""Properties: labels move as NumPy moves arrays, and random small graphs obey the law."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from laws import Analysis, prune
from nets import Net

from secateur.errors import Code, Refused
from secateur.graphops.coupling.labels import (
    Block,
    Blocks,
    factor,
    insert_axes,
    remove_axes,
    simplify,
    transpose,
)
from secateur.graphops.verify.law import check_law

quick = settings(max_examples=60, deadline=None, derandomize=True)

# -- movement ----------------------------------------------------------------------------------


@st.composite
def labelled(draw: st.DrawFn) -> tuple[tuple[int, ...], Blocks]:
    """A shape, and blocks over some of its axes with labels of their own."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    left = list(range(len(shape)))
    blocks: list[Block] = []
    start = 1
    while left and draw(st.booleans()):
        count = draw(st.integers(1, min(2, len(left))))
        axes = tuple(sorted(draw(st.permutations(left))[:count]))
        left = [axis for axis in left if axis not in axes]
        sizes = [shape[axis] for axis in axes]
        labels = np.arange(start, start + math.prod(sizes), dtype=np.int32).reshape(sizes)
        start += labels.size
        blocks.append(Block(axes, labels))
    return shape, tuple(blocks)


def spread(shape: tuple[int, ...], blocks: Blocks) -> list[np.ndarray]:
    """Each block as a whole array of the tensor's shape: what NumPy can move."""
    arrays = []
    for block in blocks:
        sizes = [size if axis in block.axes else 1 for axis, size in enumerate(shape)]
        arrays.append(np.broadcast_to(block.labels.reshape(sizes), shape))
    return arrays


def same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    key = [sorted((array.shape, array.tobytes()) for array in arrays) for arrays in (found, wanted)]
    assert key[0] == key[1]


@quick
@given(labelled(), st.data())
def test_transpose(value: tuple[tuple[int, ...], Blocks], data: st.DataObject) -> None:
    shape, blocks = value
    perm = data.draw(st.permutations(range(len(shape))))
    moved = tuple(shape[axis] for axis in perm)
    wanted = [np.transpose(array, perm) for array in spread(shape, blocks)]
    same(spread(moved, transpose(blocks, perm)), wanted)


@quick
@given(labelled(), st.data())
def test_insert_and_remove_axes(value: tuple[tuple[int, ...], Blocks], data: st.DataObject) -> None:
    shape, blocks = value
    rank = len(shape) + data.draw(st.integers(1, 2))
    axes = data.draw(st.permutations(range(rank)))[: rank - len(shape)]
    axes = [axis - rank if data.draw(st.booleans()) else axis for axis in axes]
    wanted = [np.expand_dims(array, tuple(axes)) for array in spread(shape, blocks)]
    wider = np.expand_dims(np.zeros(shape), tuple(axes)).shape
    inserted = insert_axes(blocks, axes, rank)
    same(spread(wider, inserted), wanted)
    back = remove_axes(inserted, axes, rank)
    same(spread(shape, back), spread(shape, blocks))


@quick
@given(labelled())
def test_simplify_changes_nothing_but_the_axes(value: tuple[tuple[int, ...], Blocks]) -> None:
    shape, blocks = value
    for block in blocks:
        simple = simplify(block)
        same(spread(shape, simple), spread(shape, (block,)))
        assert len(simple[0].axes) <= len(block.axes)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes with the same number of elements."""
    primes = draw(st.lists(st.sampled_from([1, 2, 2, 3, 5]), max_size=6))
    shapes = []
    for _ in range(2):
        shape = [1] * draw(st.integers(1, 4))
        for prime in primes:
            shape[draw(st.integers(0, len(shape) - 1))] *= prime
        shapes.append(shape)
    return shapes[0], shapes[1]


@quick
@given(reshapes())
def test_factors_of_a_reshape_are_independent_and_cover_it(
    shapes: tuple[list[int], list[int]],
) -> None:
    before, after = shapes
    factors = factor(before, after)
    assert [axis for sources, _ in factors for axis in sources] == list(range(len(before)))
    assert [axis for _, targets in factors for axis in targets] == list(range(len(after)))
    for sources, targets in factors:
        assert math.prod(before[a] for a in sources) == math.prod(after[a] for a in targets)


@pytest.mark.parametrize(("before", "after"), [([2, 3], [4]), ([0, 3], [0]), ([6], [4, 2])])
def test_shapes_that_do_not_fit_have_no_factors(before: list[int], after: list[int]) -> None:
    with pytest.raises(ValueError, match=r"empty|cannot"):
        factor(before, after)


@st.composite
def moves(draw: st.DrawFn) -> list[tuple[str, list[int]]]:
    """Reshapes and transposes of a (2, 12) tensor, one after another."""
    shape, found = [2, 12], []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()) and len(shape) > 1:
            perm = list(draw(st.permutations(range(len(shape)))))
            shape = [shape[axis] for axis in perm]
            found.append(("Transpose", perm))
        else:
            new = [1] * draw(st.integers(1, 4))
            for prime in (2, 2, 2, 3):
                new[draw(st.integers(0, len(new) - 1))] *= prime
            shape = new
            found.append(("Reshape", shape))
    return found


@quick
@given(moves())
def test_labels_run_through_nodes_as_numbers_do(steps: list[tuple[str, list[int]]]) -> None:
    """Through any chain of reshapes and transposes, or they are frozen: never elsewhere."""
    net = Net()
    y = net.dense(net.input("x", [2, 4]), 4, 12, bias=False)
    # Position (n, c) holds channel c.
    numbers = np.broadcast_to(np.arange(12), (2, 12))
    for op, argument in steps:
        if op == "Transpose":
            y = net.op(op, y, perm=argument)
            numbers = np.transpose(numbers, argument)
        else:
            y = net.op(op, y, net.ints(*argument))
            numbers = numbers.reshape(argument)
    net.output(net.op("Relu", net.op("Mul", y, y)))
    analysis = Analysis.of(net.bytes())
    (weight,) = analysis.coupling.constants.keys() & {t.name for t in net.initializers[:1]}
    blocks = analysis.coupling._blocks
    labels = next(b.labels for b in blocks[weight] if b.axes == (1,))
    for block in blocks[y]:
        sizes = [n if a in block.axes else 1 for a, n in enumerate(numbers.shape)]
        whole = np.broadcast_to(block.labels.reshape(sizes), numbers.shape)
        assert np.array_equal(whole, labels[numbers])


# -- random graphs -----------------------------------------------------------------------------


class Growing:
    """A random graph of feature maps; every map is (N, channels, 6, 6)."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.net = Net(seed=draw(st.integers(0, 9)))
        x = self.net.input("x", ["N", 3, 6, 6])
        first = draw(st.sampled_from([4, 6, 8]))
        self.maps = [(self.net.conv(x, 3, first, draw(st.sampled_from([1, 3]))), first)]
        for _ in range(draw(st.integers(2, 7))):
            getattr(self, draw(st.sampled_from(self.STEPS)))()

    STEPS = (
        "conv",
        "conv",
        "depthwise",
        "grouped",
        "activate",
        "normalise",
        "add",
        "scale",
        "concat",
        "pool",
        "split",
        "shuffle",
        "gate",
    )

    def pick(self) -> tuple[str, int]:
        return self.draw(st.sampled_from(self.maps))

    def conv(self) -> None:
        x, inner = self.pick()
        outer = self.draw(st.sampled_from([2, 4, 6, 8]))
        self.maps.append(
            (self.net.conv(x, inner, outer, self.draw(st.sampled_from([1, 3]))), outer)
        )

    def depthwise(self) -> None:
        x, n = self.pick()
        self.maps.append((self.net.conv(x, n, n, 3, group=n), n))

    def grouped(self) -> None:
        x, n = self.pick()
        if n % 2 == 0:
            self.maps.append((self.net.conv(x, n, 2 * n, 1, group=2), 2 * n))

    def activate(self) -> None:
        x, n = self.pick()
        op = self.draw(st.sampled_from(["Relu", "Sigmoid", "HardSwish", "Softplus"]))
        self.maps.append((self.net.op(op, x), n))

    def normalise(self) -> None:
        x, n = self.pick()
        parameters = [self.net.floats(n, low=0.5) for _ in range(4)]
        self.maps.append((self.net.op("BatchNormalization", x, *parameters), n))

    def add(self) -> None:
        x, n = self.pick()
        others = [name for name, width in self.maps if width == n]
        other = self.draw(st.sampled_from(others))
        op = self.draw(st.sampled_from(["Add", "Mul", "Max"]))
        self.maps.append((self.net.op(op, x, other), n))

    def scale(self) -> None:
        x, n = self.pick()
        self.maps.append((self.net.op("Mul", x, self.net.floats(n, 1, 1)), n))

    def concat(self) -> None:
        (x, n), (y, m) = self.pick(), self.pick()
        if n + m <= 24:
            self.maps.append((self.net.op("Concat", x, y, axis=1), n + m))

    def pool(self) -> None:
        x, n = self.pick()
        window = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
        self.maps.append((self.net.op("MaxPool", x, **window), n))

    def split(self) -> None:
        x, n = self.pick()
        size = self.draw(st.integers(1, n - 1))
        first, second = self.net.ops("Split", x, self.net.ints(size, n - size), outputs=2, axis=1)
        self.maps += [(first, size), (second, n - size)]

    def shuffle(self) -> None:
        x, n = self.pick()
        if n % 2 == 0:
            y = self.net.op("Reshape", x, self.net.ints(-1, 2, n // 2, 6, 6))
            y = self.net.op("Transpose", y, perm=[0, 2, 1, 3, 4])
            self.maps.append((self.net.op("Reshape", y, self.net.ints(-1, n, 6, 6)), n))

    def gate(self) -> None:
        x, n = self.pick()
        y = self.net.conv(self.net.op("GlobalAveragePool", x), n, n)
        self.maps.append((self.net.op("Mul", x, self.net.op("Sigmoid", y)), n))

    def finished(self) -> bytes:
        """Reads one or two maps, the last among them, and a dense end."""
        chosen = [self.maps[-1]]
        if self.draw(st.booleans()):
            chosen.append(self.pick())
        ends = []
        for x, n in chosen:
            flat = self.draw(st.booleans())
            y = self.net.op("Flatten", x if flat else self.net.op("GlobalAveragePool", x))
            ends.append(self.net.dense(y, 36 * n if flat else n, 3))
        self.net.output(ends[0] if len(ends) == 1 else self.net.op("Add", *ends))
        return self.net.bytes()


@st.composite
def graphs(draw: st.DrawFn) -> bytes:
    return Growing(draw).finished()


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(graphs(), st.integers(0, 3), st.sampled_from(["local", "global"]))
def test_random_graphs_obey_the_law(source: bytes, seed: int, scope: str) -> None:
    try:
        result = prune(source, criterion="random", seed=seed, scope=scope, target={"channels": 0.6})
    except Refused as refused:
        assume(refused.refusal.code not in (Code.NOTHING_TO_PRUNE, Code.UNREACHABLE_TARGET))
        raise
    assert check_law(source, result).difference < 1e-4
    plan = Analysis.of(source).random_plan(seed)
    assert check_law(source, prune(source, plan=plan)).difference < 1e-4
