"""Pictures hold the data they were given, on the right scales, with marks, labels and legends."""

import io
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optuna
import pytest

matplotlib = pytest.importorskip("matplotlib")

from matplotlib.image import imread  # noqa: E402

import hypergrad as hg  # noqa: E402
from hypergrad.plotting import plot_attribution  # noqa: E402
from hypergrad.plotting import sweeps as pictures  # noqa: E402
from hypergrad.plotting.panels import ReverseLogLocator, new_panels  # noqa: E402
from hypergrad.plotting.runs import (  # noqa: E402
    REFUSALS,
    plot_losses,
    plot_norms,
    plot_run,
    plot_schedule,
    plot_trajectories,
)
from hypergrad.space.description import fingerprint  # noqa: E402
from hypergrad.study.signature import stored_space  # noqa: E402
from hypergrad.study.storage import dashboard_command, open_storage  # noqa: E402
from hypergrad.study.study import OpenStudy, open_study  # noqa: E402
from hypergrad.tuners.trust import NORM_SPIKE, NOT_FINITE, REASONS  # noqa: E402

SPACE = hg.Space(
    {
        "rate": hg.Float(1e-4, 1.0, scale="log"),
        "momentum": hg.Float(0.0, 0.99, scale="reverse_log"),
        "dropout": hg.Float(0.0, 0.8),
        "weights": hg.Float(),
    }
)
UPDATES = 6


def info(i: int, refused: int = 0, loss: float | None = None, norm: float | None = None) -> Any:
    hyper = {
        "dropout": np.array([0.1, 0.2]) + 0.01 * i,
        "momentum": np.float32(0.5 + 0.05 * i),
        "rate": np.float32(1e-3 * 2**i),
        "weights": {"all": np.linspace(0, 1, 12) * i},
    }
    loss = 2.0 * 0.5**i if loss is None else loss
    norm = 0.1 * (i + 1) if norm is None else norm
    return SimpleNamespace(hyper=hyper, loss=loss, norm=norm, refused=refused)


HISTORY = [info(i) for i in range(UPDATES)]


def legend(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


@pytest.fixture(autouse=True)
def nothing_global() -> Any:
    """No picture may change matplotlib's settings or leave a figure with pyplot."""
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


def drawn(figure: Any) -> None:
    """Draw for real, so that layout, ticks and scales are worked out."""
    figure.savefig(io.BytesIO(), format="png")


def test_trajectories_are_the_history_on_the_scales_of_the_space():
    axes = plot_trajectories(HISTORY, SPACE, steps_per_update=10)
    assert [axis.get_ylabel() for axis in axes] == list(SPACE)
    assert [axis.get_yscale() for axis in axes] == ["log", "function", "linear", "linear"]
    rate, momentum, dropout, weights = axes
    x, y = rate.lines[0].get_data()
    np.testing.assert_array_equal(x, 10 * np.arange(1, UPDATES + 1))
    np.testing.assert_allclose(y, [1e-3 * 2**i for i in range(UPDATES)], rtol=1e-6)
    low, high = rate.get_ylim()
    assert 0.5e-4 < low < 1e-4 and 1 < high < 2
    assert len(dropout.lines) == 2
    assert legend(dropout) == ["[0]", "[1]"]
    np.testing.assert_allclose(dropout.lines[1].get_ydata(), 0.2 + 0.01 * np.arange(UPDATES))
    # 12 numbers: their median, and two bands
    np.testing.assert_allclose(weights.lines[0].get_ydata(), 0.5 * np.arange(UPDATES))
    assert len(weights.lines) == 1 and len(weights.collections) == 2
    assert legend(weights) == ["5-95%", "25-75%", "median"]
    drawn(rate.figure)
    ticks = [t.get_text() for t in momentum.get_yticklabels()]
    assert ticks == ["0", "0.5", "0.8", "0.9", "0.95", "0.98", "0.99"]
    # equal steps in the logarithm of one minus the value
    heights = momentum.transData.transform([(0, v) for v in (0.0, 0.9, 0.99)])[:, 1]
    np.testing.assert_allclose(heights[1] - heights[0], heights[2] - heights[1], rtol=1e-6)


def test_reverse_log_ticks_thin_out():
    assert ReverseLogLocator().tick_values(0.0, 0.99999) == [0, 0.9, 0.99, 0.999, 0.9999, 0.99999]
    assert ReverseLogLocator().tick_values(-1.5, 0.55) == [-1.0, 0.0, 0.5]


def test_names_choose_and_order_the_panels_and_runs_share_axes():
    axes = plot_trajectories(HISTORY, SPACE, names=["dropout", "rate"], label="a", color="#0072B2")
    again = plot_trajectories(
        HISTORY[:3], SPACE, names=["dropout", "rate"], axes=axes, label="b", color="#D55E00"
    )
    assert list(again) == list(axes)
    assert legend(axes[0]) == ["a [0]", "a [1]", "b [0]", "b [1]"]
    assert legend(axes[1]) == ["a", "b"]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes[0].lines}) == 4
    assert axes[0].get_xlabel() == "outer update"
    assert axes[0].lines[-1].get_xdata().tolist() == [1, 2, 3]


def test_losses_of_both_splits():
    axis = plot_losses(HISTORY, steps_per_update=5, train_losses=[1.0] * UPDATES)
    assert legend(axis) == ["validation", "training"]
    assert axis.get_xlabel() == "training step" and axis.get_ylabel() == "loss"
    assert axis.get_yscale() == "log"
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [2.0 * 0.5**i for i in range(UPDATES)])
    assert plot_losses([info(0), info(0)]).get_yscale() == "linear"


def test_refused_updates_are_marked_by_their_reason():
    history = [
        info(0),
        info(1, NORM_SPIKE, norm=1e6),
        info(2, NOT_FINITE, loss=np.nan, norm=np.inf),
        info(3),
        info(4, NORM_SPIKE, norm=1e7),
    ]
    axis = plot_norms(history, steps_per_update=10)
    assert axis.get_yscale() == "log"
    assert "loss per range" in axis.get_ylabel()
    marks = {line.get_label(): line.get_data() for line in axis.lines}
    assert list(marks) == legend(axis)
    spikes = marks[f"refused: {REFUSALS[NORM_SPIKE][0]}"]
    assert [list(v) for v in spikes] == [[20, 50], [1e6, 1e7]]
    # without a height, at the upper edge
    x, y = marks[f"refused: {REFUSALS[NOT_FINITE][0]}"]
    assert list(x) == [30] and 0.9 < y[0] < 1
    losses = plot_losses(history, steps_per_update=10)
    assert len(losses.lines) == 3
    drawn(axis.figure)


def test_every_reason_has_its_own_mark():
    assert len(REFUSALS) == len(REASONS)
    _, markers, colors = zip(*REFUSALS[1:], strict=True)
    assert len(set(markers)) == len(set(colors)) == len(REASONS) - 1
    axis = plot_norms([info(i, refused=i) for i in range(len(REASONS))])
    assert len(legend(axis)) == len(REASONS)


def test_schedules_stand_for_the_steps_they_are_used_in():
    schedule = hg.learned_schedule([i.hyper for i in HISTORY], 10)
    axes = plot_schedule(schedule, SPACE, names=["rate"])
    x, y = axes[0].lines[0].get_data()
    np.testing.assert_array_equal(x, 10 * np.arange(UPDATES + 1))
    np.testing.assert_allclose(y[:-1], [1e-3 * 2**i for i in range(UPDATES)], rtol=1e-6)
    assert y[-1] == y[-2]
    assert axes[0].lines[0].get_drawstyle() == "steps-post"


def test_a_run_on_one_figure():
    figure = plot_run(HISTORY, SPACE, steps_per_update=10, title="a run")
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels[:4] == list(SPACE)
    assert "validation loss" in labels[4] and "norm" in labels[5]
    assert all(axis.get_xlabel() == "training step" for axis in figure.axes)
    drawn(figure)
    # what is written stays apart, and the panels as well
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    for i, box in enumerate(boxes):
        for other in boxes[i + 1 :]:
            width = min(box.x1, other.x1) - max(box.x0, other.x0)
            height = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(width, height) < 1, (box, other)


def test_the_infos_of_a_tuner_are_a_history():
    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return ((w - batch) ** 2).mean()

    import optax

    problem = hg.bilevel(
        lambda key: jax.numpy.zeros(()), loss, loss, lambda h: optax.sgd(h["rate"])
    )
    space = hg.Space({"rate": hg.Float(1e-4, 1.0, scale="log")})
    tuner = hg.alternating(problem, space)
    state, history = tuner.init({"rate": 1e-2}, jax.random.key(0)), []
    update = jax.jit(tuner.update)
    for _ in range(4):
        state, one = update(state, np.ones((5, 3)), np.ones(3))
        history.append(one)
    figure = plot_run(history, space, steps_per_update=5)
    np.testing.assert_allclose(
        figure.axes[0].lines[0].get_ydata(), [float(i.hyper["rate"]) for i in history]
    )
    np.testing.assert_allclose(
        figure.axes[2].lines[0].get_ydata(), [float(i.norm) for i in history]
    )


def test_what_fit_records_has_its_place_and_its_training_loss():
    history = [SimpleNamespace(**vars(info(i)), update=i + 4, train_loss=0.5) for i in range(3)]
    losses = plot_losses(history, steps_per_update=10)
    assert legend(losses) == ["validation", "training"]
    assert losses.lines[1].get_xdata().tolist() == [50, 60, 70]
    assert losses.lines[1].get_ydata().tolist() == [0.5] * 3


def test_the_overview_explains_refusals_once_and_large_steps_shortly():
    figure = plot_run([*HISTORY, info(6, NORM_SPIKE)], SPACE, steps_per_update=100_000)
    drawn(figure)
    *_, losses, norms = figure.axes
    assert len(losses.lines) == 2 and losses.get_legend() is None
    assert legend(norms) == ["trusted", f"refused: {REFUSALS[NORM_SPIKE][0]}"]
    assert "400k" in [t.get_text() for t in norms.get_xticklabels()]


def test_a_tuner_of_ones_own_may_report_less():
    history = [SimpleNamespace(hyper=one.hyper, loss=one.loss) for one in HISTORY]
    assert len(plot_run(history, SPACE).axes) == 5
    with pytest.raises(ValueError, match="without a norm"):
        plot_norms(history)


@pytest.mark.parametrize("draw", [plot_losses, plot_norms])
def test_an_empty_history_is_refused(draw: Any):
    with pytest.raises(ValueError, match=r"history=\[\] holds no update"):
        draw([])


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="holds no update"):
        plot_run([], SPACE)
    with pytest.raises(ValueError, match="names holds 'ratte'"):
        plot_trajectories(HISTORY, SPACE, names=["ratte"])
    other = hg.Space({"rate": hg.Float(1e-4, 1.0), "dropout": hg.Int(0, 3)})
    with pytest.raises(ValueError, match="'dropout' is no Float of this space"):
        plot_trajectories(HISTORY, other, names=["dropout"])
    with pytest.raises(ValueError, match="'momentum' is no Float of this space"):
        plot_trajectories(HISTORY, other, names=["rate", "momentum"])
    with pytest.raises(ValueError, match="axes holds 1, but 4 are drawn"):
        plot_trajectories(HISTORY, SPACE, axes=new_panels(1))
    with pytest.raises(ValueError, match="train_losses has 2 entries and history 6"):
        plot_losses(HISTORY, train_losses=[1.0, 2.0])


MIXED = hg.Space(
    {
        "optimizer": hg.Categorical(["sgd", "adam"]),
        "depth": hg.Int(1, 8),
        "momentum": hg.Float(0.5, 0.99, scale="reverse_log", when={"optimizer": "sgd"}),
        "rate": hg.Float(1e-4, 1.0, scale="log"),
        "dropout": hg.Float(0.0, 0.8),
    }
)


def swept(trials: int = 24, refined: bool = True, **options: Any) -> OpenStudy:
    """A study as a sweep leaves it: every fourth trial stopped, the fifth failed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    opened = open_study(MIXED, sampler="random", seed=0, num_trials=trials, **options)
    for i in range(trials):
        proposal = opened.ask(record=not refined)
        assert proposal is not None
        score = 0.2 + abs(np.log10(proposal.start["rate"]) + 2)
        end = {**proposal.start, "rate": 1e-2} if refined else None
        # A black-box trial has a trajectory as well: it stands still.
        moved = end or proposal.start
        attrs = {"trajectory": {"steps": [10, 20], **{n: [v, v] for n, v in moved.items()}}}
        if i == 5:
            opened.fail(proposal, "RuntimeError: out of memory")
        elif i % 4 == 3:
            opened.prune(proposal, score, 20, end, attrs)
        else:
            opened.finish(proposal, score, end, attrs)
    return opened


@pytest.fixture(scope="module")
def study() -> Any:
    with swept() as opened:
        yield opened.study


def test_a_study_remembers_its_space(study: Any):
    assert stored_space(study) == MIXED
    assert fingerprint(stored_space(study)) == fingerprint(MIXED)
    with pytest.raises(ValueError, match="says nothing of its space"):
        stored_space(optuna.create_study())


def test_scores(study: Any):
    axis = pictures.plot_scores(study)
    lines = {line.get_label(): line.get_ydata() for line in axis.lines}
    assert legend(axis) == ["best so far", "trained in full", "stopped early", "failed"]
    complete = [t.value for t in study.trials if t.state.name == "COMPLETE"]
    np.testing.assert_allclose(lines["trained in full"], complete)
    assert len(complete) == 17 and len(lines["stopped early"]) == 6 and len(lines["failed"]) == 1
    assert np.all(np.diff(lines["best so far"]) <= 0)
    assert lines["best so far"][-1] == study.best_value
    drawn(axis.figure)


def test_parallel_coordinates_in_the_users_units(study: Any):
    axis = pictures.plot_parallel(study)
    names = [t.get_text() for t in axis.get_xticklabels()]
    assert names == list(MIXED)
    # a line per scored trial, and one per axis
    assert len([line for line in axis.lines if len(line.get_xdata()) == 5]) == 23
    texts = [t.get_text() for t in axis.texts]
    assert {"sgd", "adam", "inactive", "0.5", "0.99", "0.0001", "1"} <= set(texts)
    best = next(line for line in axis.lines if line.get_color() == "#D55E00")
    values = study.best_trial.params
    assert best.get_ydata()[3] == pytest.approx(
        float(MIXED["rate"].to_unit(values["rate"])), abs=1e-6
    )
    lines = [line.get_ydata()[2] for line in axis.lines if len(line.get_xdata()) == 5]
    told = [
        float(MIXED["momentum"].to_unit(1 - t.params["1 - momentum"]))
        for t in study.trials
        if "1 - momentum" in t.params and t.state.name != "FAIL"
    ]
    assert 0 < len(told) < 23
    np.testing.assert_allclose(sorted(y for y in lines if y >= 0), sorted(told), atol=1e-5)
    drawn(axis.figure)


def test_importance_is_optunas_under_our_names(study: Any):
    axis = pictures.plot_importance(study)
    names = [t.get_text() for t in axis.get_yticklabels()]
    found = optuna.importance.get_param_importances(pictures._by_starts(study))
    assert set(names) == set(MIXED)
    widths = [bar.get_width() for bar in axis.patches]
    np.testing.assert_allclose(widths, sorted(found.values()))
    # Of refined trials the starts count: their ends are alike.
    assert "where they started" in axis.get_xlabel()
    ends = optuna.importance.get_param_importances(study)
    assert abs(ends["rate"] - found["rate"]) > 0.01
    assert widths[names.index("momentum")] == found["1 - momentum"]


def test_refinement_paths_run_from_start_to_end(study: Any):
    axes = pictures.plot_refinement(study)
    assert [axis.get_ylabel() for axis in axes] == ["momentum", "rate", "dropout"]
    momentum, rate, _ = axes
    # a path, a ring and an end for each of the 23 scored trials
    assert len(rate.lines) == 3 * 23
    assert len(momentum.lines) == 3 * sum(
        "momentum" in t.user_attrs.get("trajectory", {}) for t in study.trials
    )
    paths = [line for line in rate.lines if len(line.get_xdata()) == 3]
    starts = {round(line.get_ydata()[0], 12) for line in paths}
    expected = {
        round(t.user_attrs["start"]["rate"], 12) for t in study.trials if t.state.name != "FAIL"
    }
    assert starts == expected
    assert all(line.get_ydata()[-1] == 1e-2 and line.get_xdata()[0] == 0 for line in paths)
    crosses = [line for line in rate.lines if line.get_marker() == "x"]
    assert len(crosses) == 6
    best = [line for line in paths if line.get_color() == "#D55E00"]
    assert [line.get_ydata()[0] for line in best] == [study.best_trial.user_attrs["start"]["rate"]]
    only = pictures.plot_refinement(study, names=["dropout"], axes=new_panels(1))
    assert len(only) == 1
    with pytest.raises(ValueError, match="names holds 'depth'"):
        pictures.plot_refinement(study, names=["depth"])
    drawn(rate.figure)


def test_pictures_are_saved_for_what_the_study_holds(study: Any, tmp_path: Any):
    written = pictures.save_pictures(study, tmp_path / "new" / "folder")
    assert [p.stem for p in written] == ["scores", "parallel", "importance", "refinement"]
    for path in written:
        image = imread(path)
        assert 900 <= image.shape[1] <= 1350
        assert path.stat().st_size < 150_000
        # something is drawn on the white
        assert 0.5 < (image[..., :3].min(axis=-1) > 0.99).mean() < 0.98
    with swept(3, refined=False) as opened:
        few = pictures.save_pictures(opened.study, tmp_path)
        assert [p.stem for p in few] == ["scores", "parallel"]
        with pytest.raises(ValueError, match="has no refined trial"):
            pictures.plot_refinement(opened.study)
        with pytest.raises(ValueError, match=r"3 trials that trained in full.*at least 10"):
            pictures.plot_importance(opened.study)
    with open_study(MIXED) as empty, pytest.raises(ValueError, match="no trial with a score"):
        pictures.plot_scores(empty.study)


def test_a_maximised_study_has_its_best_on_top():
    with swept(6, direction="maximize") as opened:
        line = pictures.plot_scores(opened.study).lines[0]
        assert line.get_ydata()[-1] == opened.study.best_value
        assert np.all(np.diff(line.get_ydata()) >= 0)


# A hyperparameter that takes one value has an axis without length there.
@pytest.mark.filterwarnings("ignore:Attempting to set identical low and high ylims")
def test_optunas_own_plots_work_on_the_study(study: Any):
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as theirs

    with plt.rc_context():
        for draw in (theirs.plot_optimization_history, theirs.plot_param_importances):
            plt.close(draw(study).figure)
        axis = theirs.plot_parallel_coordinate(study)
        assert "1 - momentum" in [t.get_text() for t in axis.get_xticklabels()]
        plt.close(axis.figure)


def test_the_dashboards_command(tmp_path: Any):
    path = tmp_path / "a sweep.journal"
    assert dashboard_command(open_storage(path)) == f"optuna-dashboard '{path}'"
    url = f"sqlite:///{tmp_path}/sweep.db"
    assert dashboard_command(open_storage(url)) == f"optuna-dashboard {url}"
    for memory in (None, "sqlite://"):
        with pytest.raises(ValueError, match=re.escape("storage='sweep.journal'")):
            dashboard_command(open_storage(memory))
    with pytest.raises(ValueError, match="the database that the proxy serves"):
        dashboard_command(object.__new__(optuna.storages.GrpcStorageProxy))


def test_the_dashboard_finds_the_study_at_what_the_command_names(tmp_path: Any):
    dashboard = pytest.importorskip("optuna_dashboard._storage_url")
    with swept(3, storage=tmp_path / "a sweep.journal") as opened:
        _, named = shlex.split(dashboard_command(opened.study._storage))
        found = dashboard.get_storage(named).get_all_studies()
        assert [s.study_name for s in found] == [opened.study.study_name]


def test_without_matplotlib_the_remedy_is_named():
    program = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.axes'] = None\n"
        "import hypergrad\n"
        "try:\n    import hypergrad.plotting\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'hypergrad-jax[plots]'" in done.stdout, done.stderr


def test_attribution_shows_helpful_before_harmful_images() -> None:
    """Each row: the test image, the most helpful examples, the most harmful."""
    scores = np.array([[0.3, -0.4, 0.1, -0.2]])
    images = np.arange(4.0)[:, None, None] * np.ones((4, 8, 8))
    figure = plot_attribution(scores, images, images[:1], 2, names="abcd", test_names=["t$"])
    assert [axis.get_title() for axis in figure.axes] == [
        r"t\$", "b: +0.4", "d: +0.2", "a: -0.3", "c: -0.1",
    ]  # fmt: skip
    shown = [float(axis.images[0].get_array()[0, 0]) for axis in figure.axes]
    assert shown == [0, 1, 3, 0, 2]
    with pytest.raises(ValueError, match=r"scores has the shape \(1, 4\), but there are 2 tests"):
        plot_attribution(scores, images, images[:2])
    with pytest.raises(TypeError, match=r"examples has the shape \(4, 64\): give images"):
        plot_attribution(scores, images.reshape(4, 64), images[:1])
