"""Spaces: unit coordinates, conditions, and what is refused."""

import dataclasses
import inspect
import math
import pickle
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad.space import Categorical, Float, Int, Space

FLOATS = {
    "linear": Float(-2.0, 5.0),
    "linear, narrow": Float(0.1, 0.3),
    "linear, far from zero": Float(1000.0, 1001.0),
    "log": Float(1e-4, 1.0, scale="log"),
    "log, wide": Float(1e-20, 1e20, scale="log"),
    "log, above one": Float(3.0, 70.0, scale="log"),
    "reverse_log": Float(0.5, 0.999, scale="reverse_log"),
    "reverse_log, close to one": Float(0.9, 0.99999, scale="reverse_log"),
    "reverse_log, from zero": Float(0.0, 0.99, scale="reverse_log"),
    "reverse_log, negative": Float(-30.0, 0.5, scale="reverse_log"),
}
# Compiled once per dimension and dtype: a Float is hashable, so it may be a static argument.
from_unit = jax.jit(Float.from_unit, static_argnums=0)
to_unit = jax.jit(Float.to_unit, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def slope_of(function, points: jax.Array) -> jax.Array:
    return jax.vmap(jax.grad(function))(points)


each_float = pytest.mark.parametrize("dimension", FLOATS.values(), ids=FLOATS.keys())


def exact_from_unit(dimension: Float, unit: np.ndarray | jax.Array) -> np.ndarray:
    """The scales' definitions, in NumPy's long double."""
    low, high, u = (
        np.longdouble(dimension.low),
        np.longdouble(dimension.high),
        np.asarray(unit, np.longdouble),
    )
    if dimension.scale == "linear":
        return low + u * (high - low)
    if dimension.scale == "log":
        return low * (high / low) ** u
    return 1 - (1 - low) * ((1 - high) / (1 - low)) ** u


def random_units(seed: int, count: int = 300) -> np.ndarray:
    """Units in [0, 1], with both bounds and points close to them."""
    special = [0.0, 1.0, 0.5, 1e-6, 1 - 1e-6, np.nextafter(0.5, 0), np.nextafter(0.5, 1)]
    return np.concatenate([special, np.random.default_rng(seed).uniform(size=count)])


def resolution(dimension: Float, units: jax.Array) -> np.ndarray:
    """How well a value can be known: its own rounding, and that of its unit times the slope."""
    values = np.asarray(from_unit(dimension, units))
    slope = np.asarray(slope_of(dimension.from_unit, units))
    return np.spacing(np.abs(values)) + slope * np.finfo(values.dtype).eps


@each_float
def test_from_unit_is_the_scale_s_definition(dimension, dtype):
    units = jnp.asarray(random_units(0), dtype)
    error = np.abs(np.asarray(from_unit(dimension, units)) - exact_from_unit(dimension, units))
    # A reverse_log measures from the bound as rounded to the dtype.
    reverse = dimension.scale == "reverse_log"
    bound = np.spacing(np.asarray(max(abs(dimension.low), abs(dimension.high)), dtype))
    assert np.all(error <= resolution(dimension, units) + reverse * bound)


@each_float
def test_round_trips(dimension, dtype):
    units = jnp.asarray(random_units(1), dtype)
    values = from_unit(dimension, units)
    back = to_unit(dimension, values)
    # XLA's float64 log1p is good to a dozen roundings, measured on a CPU; all else to one.
    factor = 16 if dimension.scale == "reverse_log" else 1
    allowed = factor * resolution(dimension, units)
    assert np.all(np.abs(np.asarray(from_unit(dimension, back) - values)) <= allowed)
    slope = np.asarray(slope_of(dimension.from_unit, units))
    assert np.all(np.abs(np.asarray(back - units)) <= allowed / slope)


@each_float
def test_bounds_are_zero_and_one(dimension, dtype):
    bounds = jnp.asarray([dimension.low, dimension.high], dtype)
    np.testing.assert_allclose(to_unit(dimension, bounds), [0, 1], rtol=0, atol=np.finfo(dtype).eps)
    # Exactly, so that a value projected onto its bound is never outside it.
    np.testing.assert_array_equal(from_unit(dimension, jnp.asarray([0, 1], dtype)), bounds)


@each_float
def test_values_increase_with_units_and_stay_within_the_bounds(dimension, dtype):
    units = jnp.asarray(np.sort(random_units(3)), dtype)
    values = np.asarray(from_unit(dimension, units))
    low, high = (np.asarray(bound, dtype) for bound in (dimension.low, dimension.high))
    assert values.min() == low and values.max() == high
    # Where the two anchors meet, neighbours may swap by rounding.
    assert np.all(np.diff(values) >= -4 * np.spacing(np.abs(values[1:])))
    assert len(np.unique(values)) > 100


@each_float
def test_derivative_agrees_with_finite_differences(dimension, x64):
    step = 1e-5
    units = jnp.asarray([0.0, 1e-3, 0.2, 0.499, 0.5, 0.7, 0.999, 1.0])
    slope = slope_of(dimension.from_unit, units)
    exact = (
        exact_from_unit(dimension, units + step) - exact_from_unit(dimension, units - step)
    ) / (2 * step)
    np.testing.assert_allclose(slope, np.asarray(exact, float), rtol=1e-6)
    inverse = slope_of(dimension.to_unit, from_unit(dimension, units))
    np.testing.assert_allclose(slope * inverse, 1.0, rtol=1e-9)


@each_float
def test_derivative_is_finite_and_positive_at_the_bounds(dimension, dtype):
    bounds = jnp.asarray([0.0, 1.0], dtype)
    for slope in (
        slope_of(dimension.from_unit, bounds),
        slope_of(dimension.to_unit, from_unit(dimension, bounds)),
        jax.jvp(dimension.from_unit, (bounds,), (jnp.ones_like(bounds),))[1],
    ):
        assert np.all(np.isfinite(slope)) and np.all(np.asarray(slope) > 0)


def test_nothing_saturates_in_float32_near_one():
    momentum = Float(0.9, 0.99999, scale="reverse_log")
    units = jnp.linspace(0.9, 1.0, 20, dtype=jnp.float32)
    exact = exact_from_unit(momentum, np.asarray(units))
    found = np.asarray(momentum.from_unit(units))
    # One minus the value to within the rounding of the value itself.
    assert np.all(np.abs(found - exact) <= np.spacing(np.float32(1)))
    assert np.all(np.diff(found) > 0)


def test_dropout_may_start_at_zero():
    space = Space({"dropout": Float(0.0, 0.8)})
    unit = space.to_unit(space.validate({"dropout": 0.0}))
    assert unit["dropout"] == 0
    assert jax.grad(lambda u: space.from_unit(u)["dropout"])(unit)["dropout"] == np.float32(0.8)


def test_an_unbounded_float_is_its_own_unit():
    space = Space({"weights": Float()})
    weights = jnp.asarray([-3.0, 0.0, 1e6])
    for function in (space.to_unit, space.from_unit, space.project, space.cast, space.validate):
        np.testing.assert_array_equal(function({"weights": weights})["weights"], weights)


def test_a_float_covers_a_subtree():
    space = Space({"rate": Float(1e-4, 1.0, scale="log"), "l2": Float(0.0, 2.0)})
    hyper = {"rate": [1e-4, {"head": np.full((2, 3), 1e-2)}], "l2": (0.5, 2.0)}
    unit = space.to_unit(hyper)
    assert jax.tree.structure(unit) == jax.tree.structure(hyper)
    np.testing.assert_allclose(unit["rate"][1]["head"], np.full((2, 3), 0.5), rtol=1e-6)
    np.testing.assert_allclose(unit["l2"], (0.25, 1.0))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), space.from_unit(unit), hyper
    )


def test_project_clips_into_the_box():
    space = Space({"a": Float(1.0, 2.0), "b": Float(1e-3, 1.0, scale="log"), "free": Float()})
    unit = {"a": np.asarray([-0.5, 0.25, 1.5, np.nan]), "b": 7.0, "free": -7.0}
    projected = space.project(unit)
    np.testing.assert_array_equal(projected["a"], np.asarray([0, 0.25, 1, np.nan], np.float32))
    assert projected["b"] == 1 and projected["free"] == -7


@pytest.mark.parametrize(
    "value",
    [
        *(0.5, 1, np.float64(0.5), np.float16(0.5), np.int64(1), np.ones(3)),
        *(jnp.ones(3, jnp.bfloat16), jnp.ones((), jnp.float32), jnp.ones(2, jnp.int32)),
    ],
    ids=str,
)
def test_dtypes_are_strong_and_at_least_float32(value, dtype):
    # 64 bits stay 64 where JAX has them; Python numbers and integers take JAX's default.
    given = getattr(value, "dtype", None)
    narrow = given in (jnp.dtype("bfloat16"), np.dtype("float16"), np.dtype("float32"))
    expected = jnp.dtype("float32") if narrow else dtype
    for dimension in (Float(0.1, 2.0, scale="log"), Float()):
        space = Space({"x": dimension})
        results = [f({"x": value})["x"] for f in (space.to_unit, space.from_unit, space.project)]
        results += [space.cast({"x": value})["x"], space.validate({"x": value})["x"]]
        for result in results:
            assert result.dtype == expected
            assert not result.weak_type
            assert result.shape == np.shape(value)


def test_weakly_typed_values_do_not_recompile():
    space = Space({"rate": Float(1e-4, 1.0, scale="log"), "dropout": Float(0.0, 0.8)})
    traces = []

    @jax.jit
    def step(unit):
        traces.append(1)
        return space.project(jax.tree.map(lambda u: u + 0.01, space.to_unit(space.from_unit(unit))))

    unit = space.to_unit({"rate": jnp.array(0.1), "dropout": 0.2})
    for _ in range(3):
        unit = step(unit)
    step(space.to_unit({"rate": np.float32(0.3), "dropout": np.float64(0.4)}))
    assert len(traces) == 1


def test_transforms_run_under_vmap():
    space = Space({"rate": Float(1e-4, 1.0, scale="log")})
    rates = {"rate": jnp.asarray([1e-4, 1e-2, 1.0])}
    batched = jax.vmap(lambda hyper: space.to_unit(space.validate(hyper)))(rates)
    np.testing.assert_allclose(batched["rate"], [0, 0.5, 1], rtol=1e-6)


def test_bounds_that_float32_cannot_hold_are_refused_there_only(x64):
    for dimension in (
        Float(0.9, 1 - 1e-9, scale="reverse_log"),
        Float(1.0, 1.0 + 1e-9),
        Float(1e-42, 1.0, scale="log"),
        Float(-3e38, 3e38),
    ):
        assert dimension.to_unit(dimension.from_unit(np.float64(0.25))) == pytest.approx(0.25)
        with pytest.raises(ValueError, match=r"cannot be resolved in float32.*64-bit"):
            dimension.from_unit(np.float32(0.25))


# --- Conditions ---


NESTED = Space(
    {
        "momentum": Float(0.5, 0.999, scale="reverse_log", when={"optimizer": "sgd"}),
        "nesterov": Categorical([True, False], when={"optimizer": ("sgd", "nadam")}),
        "optimizer": Categorical(["sgd", "adamw", "nadam"]),
        "depth": Int(1, 6),
        "skip": Float(0.0, 1.0, when={"nesterov": True, "depth": (4, 5, 6)}),
        "rate": Float(1e-4, 1.0, scale="log"),
    }
)


def test_the_split_into_continuous_and_discrete():
    assert NESTED.continuous == ("momentum", "skip", "rate")
    # Parents first, so that a sampler may go through them once.
    assert NESTED.discrete == ("optimizer", "nesterov", "depth")


@pytest.mark.parametrize(
    ("choices", "active"),
    [
        (
            {"optimizer": "sgd", "nesterov": True, "depth": 4},
            ("momentum", "nesterov", "optimizer", "depth", "skip", "rate"),
        ),
        (
            {"optimizer": "sgd", "nesterov": True, "depth": 3},
            ("momentum", "nesterov", "optimizer", "depth", "rate"),
        ),
        (
            {"optimizer": "nadam", "nesterov": False, "depth": 6},
            ("nesterov", "optimizer", "depth", "rate"),
        ),
        # An inactive parent deactivates its children, whatever its own value.
        ({"optimizer": "adamw", "nesterov": True, "depth": 6}, ("optimizer", "depth", "rate")),
        ({"optimizer": "adamw", "rate": 0.1}, ("optimizer", "depth", "rate")),
    ],
)
def test_active_follows_nested_conditions(choices, active):
    assert NESTED.active(choices) == active


def test_is_active_reads_only_what_it_needs():
    assert NESTED.is_active("rate", {})
    assert NESTED.is_active("nesterov", {"optimizer": "nadam"})
    assert not NESTED.is_active("skip", {"optimizer": "adamw"})
    with pytest.raises(ValueError, match=r"choices has no 'nesterov', on which 'skip' depends"):
        NESTED.is_active("skip", {"optimizer": "sgd"})


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"optimizer": "lion"}, r"choices\['optimizer'\] is 'lion': give one of"),
        ({"optimizer": "adamw", "depth": 7}, r"choices\['depth'\] is 7: give one of .*Int\(1, 6\)"),
        ({"optimizer": "adamw", "depth": True}, r"choices\['depth'\] is True"),
        ({"optimiser": "sgd"}, r"choices holds 'optimiser': this space holds only"),
        ({}, r"choices has no 'optimizer', on which 'momentum' depends: add"),
    ],
)
def test_wrong_choices_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        NESTED.active(choices)


# --- Starting values ---


TWO = Space({"rate": Float(1e-4, 1.0, scale="log"), "drop": Float(0.0, 0.8)})


@pytest.mark.parametrize(
    ("hyper", "error", "message"),
    [
        ({"rate": 0.1}, ValueError, r"hyper has no 'drop': give a starting value for Float\(0.0"),
        ({"rate": 0.1, "drop": 0, "width": 3}, ValueError, r"hyper holds 'width', which is not in"),
        (
            {"rate": 2.0, "drop": 0},
            ValueError,
            r"hyper\['rate'\] starts at 2.0, outside its bounds \[0.0001, 1.0\]: start inside them",
        ),
        ({"rate": 0, "drop": 0}, ValueError, r"hyper\['rate'\] starts at 0, outside its bounds"),
        (
            {"rate": 0.1, "drop": {"a": [0.1, np.asarray([[0.1, 0.2], [0.9, 0.1]])]}},
            ValueError,
            r"hyper\['drop'\]\['a'\]\[1\]\[1, 0\] starts at 0.9, outside its bounds \[0.0, 0.8\]",
        ),
        ({"rate": 0.1, "drop": np.nan}, ValueError, r"hyper\['drop'\] starts at nan.*not finite"),
        ({"rate": np.inf, "drop": 0}, ValueError, r"hyper\['rate'\] starts at inf.*not finite"),
        ({"rate": True, "drop": 0}, TypeError, r"hyper\['rate'\] is True \(bool\), no real number"),
        ({"rate": "0.1", "drop": 0}, TypeError, r"hyper\['rate'\] is '0.1' .*no real number"),
        ({"rate": 0.1, "drop": np.zeros(2, bool)}, TypeError, r"hyper\['drop'\] is .*bool"),
        ({"rate": 0.1 + 0j, "drop": 0}, TypeError, r"hyper\['rate'\] is .*complex"),
        ({"rate": 0.1, "drop": object()}, TypeError, r"hyper\['drop'\] is .*object"),
        ({"rate": 0.1, "drop": ()}, ValueError, r"hyper\['drop'\] is \(\) and holds no number"),
        ({"rate": 0.1, "drop": None}, ValueError, r"hyper\['drop'\] is None and holds no number"),
        (0.1, TypeError, r"hyper is 0.1: give a dict"),
    ],
)
def test_wrong_starting_values_are_refused(hyper, error, message):
    with pytest.raises(error, match=message):
        TWO.validate(hyper)


def test_a_key_is_no_hyperparameter():
    with pytest.raises(TypeError, match=r"hyper\['drop'\] is .*key.*no real number"):
        TWO.cast({"rate": 0.1, "drop": jax.random.key(0)})


def test_infinite_values_are_refused_without_bounds_too():
    with pytest.raises(ValueError, match=r"hyper\['w'\]\[1\] starts at inf, which is not finite"):
        Space({"w": Float()}).validate({"w": jnp.asarray([0.0, jnp.inf])})


def test_validate_casts_integers_and_keeps_values():
    hyper = TWO.validate({"rate": 1, "drop": np.asarray([0.1, 0.8])})
    assert hyper["rate"] == 1 and hyper["rate"].dtype == jnp.float32
    np.testing.assert_array_equal(hyper["drop"], np.asarray([0.1, 0.8], np.float32))


@pytest.mark.parametrize("dtype_name", ["float16", "bfloat16", "float32"])
def test_a_bound_rounded_to_its_dtype_is_inside(dtype_name):
    """bfloat16(0.3) is 0.30078: the bound itself must be a legal start."""
    space = Space({"x": Float(0.1, 0.3)})
    for bound in (0.1, 0.3):
        space.validate({"x": jnp.asarray(bound, dtype_name)})
    for outside in (0.09, 0.31):
        with pytest.raises(ValueError, match="outside its bounds"):
            space.validate({"x": jnp.asarray(outside, dtype_name)})


def test_traced_values_are_cast_and_not_checked():
    traced = jax.jit(TWO.validate)({"rate": jnp.array(5.0), "drop": jnp.int32(0)})
    assert traced["rate"] == 5
    assert not traced["drop"].weak_type and traced["drop"].dtype == jnp.float32
    with pytest.raises(ValueError, match="hyper has no 'drop'"):
        jax.jit(TWO.validate)({"rate": 5.0})


def test_validate_asks_for_exactly_the_active_floats():
    sgd = {"optimizer": "sgd", "nesterov": False, "depth": 4}
    adamw = {"optimizer": "adamw", "depth": 4}
    assert set(NESTED.validate({"rate": 0.1, "momentum": 0.9}, sgd)) == {"rate", "momentum"}
    assert set(NESTED.validate({"rate": 0.1}, adamw)) == {"rate"}
    with pytest.raises(ValueError, match="hyper has no 'momentum'"):
        NESTED.validate({"rate": 0.1}, sgd)
    with pytest.raises(ValueError, match=r"hyper\['momentum'\] is inactive under .*leave it out"):
        NESTED.validate({"rate": 0.1, "momentum": 0.9}, adamw)
    # Without choices, conditional ones are optional.
    assert set(NESTED.validate({"rate": 0.1, "skip": 0.5})) == {"rate", "skip"}


@pytest.mark.parametrize("method", ["to_unit", "from_unit", "project", "cast"])
def test_discrete_and_unknown_names_have_no_coordinate(method):
    with pytest.raises(ValueError, match=r"holds 'depth', which is discrete \(Int\(1, 6\)\)"):
        getattr(NESTED, method)({"depth": 3})
    with pytest.raises(ValueError, match="holds 'width', which is not in the space"):
        getattr(NESTED, method)({"width": 3})
    # A conditional Float may be absent.
    assert set(getattr(NESTED, method)({"rate": 0.1})) == {"rate"}


# --- Construction ---


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Float(1.0, 0.5), ValueError, r"Float\(low=1.0, high=0.5\) is empty: give low <"),
        (lambda: Float(1.0, 1.0), ValueError, r"Float\(low=1.0, high=1.0\) is empty"),
        (lambda: Float(1.0), ValueError, r"Float\(low=1.0, high=None\) has only one bound: give"),
        (lambda: Float(high=1.0), ValueError, r"Float\(low=None, high=1.0\) has only one bound"),
        (lambda: Float(0, 1, scale="log"), ValueError, r"low=0.0, scale='log'.*give low > 0"),
        (lambda: Float(0, 1, scale="reverse_log"), ValueError, r"high=1.0, .*give high < 1"),
        (
            lambda: Float(0, 1, scale="ln"),
            ValueError,
            r"scale='ln'\) is unknown: choose 'linear'",
        ),
        (lambda: Float(scale="log"), ValueError, r"scale='log'\) has no bounds.*give low and high"),
        (lambda: Float(0.0, math.inf), ValueError, r"Float\(high=inf\) is not finite: give"),
        (lambda: Float(math.nan, 1.0), ValueError, r"Float\(low=nan\) is not finite"),
        (lambda: Float("0", 1.0), TypeError, r"Float\(low='0'\) is no number: give a float"),
        (lambda: Float(False, True), TypeError, r"Float\(low=False\) is no number"),
        (lambda: Float(0, 1, when={}), ValueError, r"Float\(when=\{\}\) names nothing"),
        (lambda: Float(0, 1, when={"a": ()}), ValueError, r"can never be met: give 'a' a value"),
        (lambda: Int(1.0, 3), TypeError, r"Int\(low=1.0\) is no integer: give an int, or use Fl"),
        (lambda: Int(0, True), TypeError, r"Int\(high=True\) is no integer"),
        (lambda: Int(3, 3), ValueError, r"Int\(low=3, high=3\) is empty"),
        (lambda: Int(0, 3, scale="log"), ValueError, r"Int\(low=0, scale='log'\).*give low >= 1"),
        (lambda: Int(1, 3, scale="reverse_log"), ValueError, r"'reverse_log'\) is unknown"),
        (lambda: Categorical([]), ValueError, r"Categorical\(choices=\[\]\) is empty: give at l"),
        (lambda: Categorical(["a", "b", "a"]), ValueError, r"holds 'a' twice .*remove one"),
        (lambda: Categorical([1, True]), ValueError, r"holds True twice"),
        (lambda: Categorical("sgd"), TypeError, r"choices='sgd'\) has no order: give a list"),
        (lambda: Categorical({"a", "b"}), TypeError, r"has no order: give a list"),
        (lambda: Categorical([print]), TypeError, r"Name the object by a string"),
        (lambda: Categorical([math.nan]), TypeError, r"holds nan"),
        (lambda: Space([Float()]), TypeError, r"is no mapping: give a dict"),
        (lambda: Space({"a": 0.1}), TypeError, r"Space\['a'\] is 0.1: give a Float, an Int or"),
        (lambda: Space({1: Float()}), TypeError, r"holds the name 1: names are strings"),
        (
            lambda: Space({"a": Float(when={"b": 1})}),
            ValueError,
            r"Space\['a'\] has a condition on 'b', which is not in the space: add it",
        ),
        (
            lambda: Space({"a": Float(when={"b": 1}), "b": Float(0, 1)}),
            ValueError,
            r"Space\['a'\] has a condition on 'b', which is continuous",
        ),
        (
            lambda: Space({"a": Float(when={"b": (1, 9)}), "b": Int(0, 3)}),
            ValueError,
            r"Space\['a'\]: when\['b'\] is 9: give one of the values of Int\(0, 3\)",
        ),
        (
            lambda: Space(
                {
                    "free": Float(),
                    "a": Int(0, 1, when={"c": 1}),
                    "b": Int(0, 1, when={"a": 1}),
                    "c": Int(0, 1, when={"b": 1}),
                }
            ),
            ValueError,
            r"circle of conditions, a -> c -> b -> a: remove one",
        ),
        (
            lambda: Space({"a": Int(0, 1, when={"a": 1})}),
            ValueError,
            r"circle of conditions, a -> a",
        ),
    ],
)
def test_bad_spaces_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_space_is_a_readable_mapping():
    assert list(NESTED) == list(NESTED.keys())
    assert len(NESTED) == 6 and "rate" in NESTED and "width" not in NESTED and 3 not in NESTED
    assert NESTED["depth"] == Int(1, 6)
    with pytest.raises(KeyError, match=r"'width' is not in this space: it holds \['momentum'"):
        NESTED["width"]
    with pytest.raises(TypeError):
        NESTED["width"] = Float()
    with pytest.raises(dataclasses.FrozenInstanceError):
        NESTED.dimensions = {}


def test_what_is_printed_can_be_read_back():
    assert eval(repr(NESTED)) == NESTED
    assert repr(Space({})) == "Space({})"
    assert repr(Float()) == "Float()"
    assert (
        "'momentum': Float(0.5, 0.999, scale='reverse_log', when={'optimizer': 'sgd'}),\n"
        in repr(NESTED)
    )


def test_spaces_are_values():
    copy = pickle.loads(pickle.dumps(NESTED))
    assert copy == NESTED and hash(copy) == hash(NESTED)
    assert Space({"rate": Float(1e-4, 1.0, scale="log")}) != NESTED
    choices = Categorical(np.asarray([32, 64]), when={"depth": [1, 2]})
    assert choices == dataclasses.replace(choices) and hash(choices) == hash(
        dataclasses.replace(choices)
    )
    assert choices.choices == (32, 64) and type(choices.choices[0]) is int
    # The caller's dict stays the caller's.
    given = {"rate": Float()}
    space = Space(given)
    given["other"] = Float()
    assert list(space) == ["rate"]
    assert re.fullmatch(r"Space\(\{\s+'rate': Float\(\),\s+\}\)", repr(space))


def test_what_help_shows_are_the_arguments() -> None:
    assert str(inspect.signature(Float)).startswith("(low: 'float | None' = None, high:")
    assert [*inspect.signature(Int).parameters][:2] == ["low", "high"]
