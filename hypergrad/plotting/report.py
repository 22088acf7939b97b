"""A study as one self-contained HTML page: tables, pictures, and what failed."""

import base64
import html
import math
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from hypergrad.checks import in_one_sentence
from hypergrad.plotting.sweeps import save_pictures
from hypergrad.space.dimensions import Categorical
from hypergrad.space.space import Space
from hypergrad.study.ranking import (
    FOOTNOTE,
    MARK,
    confirmed,
    failed_trials,
    in_line,
    is_tested,
    objective_names,
    ranked,
    reason_of,
    short,
    states,
)
from hypergrad.study.remarks import AT_BOUND, BOUND_NOTE, at_bounds, audits
from hypergrad.study.signature import stored_space
from hypergrad.study.slots import ERROR

_CAPTIONS = {
    "scores": "Every trial's score, and the best so far.",
    "parallel": "Every trial as a line through its hyperparameters; dark is good.",
    "front": "The objectives of every trial, and the front: what no other trial beats in both.",
    "importance": "What sets the best tenth of the trials apart, by hyperparameter (PED-ANOVA).",
    "refinement": "Where hypergradients led each trial while it trained, from its start (hollow).",
}
_MOST_TRIALS = 20
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th { background: var(--soft); white-space: nowrap; }
tr.best { font-weight: 600; } figure { margin: 1rem 0 2rem; }
img { max-width: 100%; height: auto; background: white; } figcaption { font-size: .9rem; }
pre { overflow-x: auto; background: var(--soft); padding: .6rem; font-size: .8rem; }
"""


def page(study: optuna.Study) -> str:
    """The HTML for a study that a sweep has opened, pictures included: half a megabyte or so."""
    name = html.escape(study.study_name)
    ways = zip(objective_names(study), study.directions, strict=True)
    goals = ", ".join(f"{html.escape(n)} is {d.name.lower()}d" for n, d in ways)
    goals = goals.replace("score is", "the validation score is", 1)
    sections = [
        f"<h1>{name}</h1><p>{states(study)}; {goals}.</p>",
        _best(study),
        _audited(study),
        *_pictures(study),
        _space(study),
        _failures(study),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _best(study: optuna.Study) -> str:
    best = ranked(study)[:_MOST_TRIALS]
    if not best:
        return "<h2>Best trials</h2><p>No trial has trained in full yet.</p>"
    space = stored_space(study)
    names = [name for name in space if any(name in b.hyper for b in best)]
    rows = [["trial", "score", "test", *names]]
    for b in best:
        test = "" if math.isnan(b.held_out) else f"{b.held_out:.4f}"
        score = f"{b.score:.4f}{MARK if b.moved else ''}"
        rows.append([f"#{b.number}", score, test, *_values(names, b.hyper, space)])
    notes = [FOOTNOTE] if any(b.moved for b in best) else []
    notes += [BOUND_NOTE] if any(at_bounds(space, b.hyper) for b in best) else []
    return (
        f"<h2>Best trials</h2>{_table(rows, best=True)}<p>Scores are what trials were selected by, "
        "and flatter; <code>test</code> is the same run's score on the held-out split. "
        f"{''.join(f'<br>{html.escape(note)}.' for note in notes)}</p>"
    )


def _values(names: list[str], hyper: Mapping[str, Any], space: Space) -> list[str]:
    edge = at_bounds(space, hyper)
    shown = {n: f"{short(v)}{AT_BOUND if n in edge else ''}" for n, v in hyper.items()}
    return [shown.get(name, "") for name in names]


def _audited(study: optuna.Study) -> str:
    """What was confirmed, and audits: frozen values under fresh seeds."""
    space, kept, rows = stored_space(study), confirmed(study), []
    found = audits(study)
    names = [n for n in space if any(n in h for h in [a["hyper"] for a in found])]
    metrics = list(dict.fromkeys(name for a in found for name in a["metrics"]))
    for one in found:
        pairs = [(one["mean"], one["std_error"])]
        pairs += [one["metrics"].get(name, (math.nan, math.nan)) for name in metrics]
        numbers = [f"{mean:.4f} ± {error:.2g}" for mean, error in pairs]
        rows.append([*numbers, str(one["seeds"]), *_values(names, one["hyper"], space)])
    text = ""
    if kept:
        best, since = kept
        values = html.escape(in_line(best.hyper, space))
        stale = f", before {since} more trials had trained" if since else ""
        tested = f", test {best.held_out:.4f}" if is_tested(study) else ""
        text = (
            f"<p>Confirmed{stale}: trial #{best.number}, its values frozen and trained again, "
            f"score {best.score:.4f}{tested}: {values}</p>"
        )
    if rows:
        text += _table([["test loss", *(f"test {m}" for m in metrics), "seeds", *names], *rows])
    elif not kept:
        text = "<p>None yet: <code>hypergrad confirm</code>, <code>result.audit()</code>.</p>"
    return f"<h2>Confirmation and audit</h2>{text}"


def _pictures(study: optuna.Study) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            paths = save_pictures(study, folder)
        except ValueError:  # nothing to draw yet
            return []
        figures = [(path.stem, base64.b64encode(path.read_bytes()).decode()) for path in paths]
    return [
        f'<figure><img alt="{_CAPTIONS[stem]}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_CAPTIONS[stem]}</figcaption></figure>"
        for stem, data in figures
    ]


def _space(study: optuna.Study) -> str:
    rows = [["hyperparameter", "kind", "range", "scale", "only when"]]
    for name, dimension in stored_space(study).items():
        when = ", ".join(f"{n} in {list(v)}" for n, v in (dimension.when or {}).items())
        if isinstance(dimension, Categorical):
            middle = [", ".join(map(str, dimension.choices)), ""]
        else:
            middle = [f"{dimension.low:g} to {dimension.high:g}", dimension.scale]
        rows.append([name, type(dimension).__name__, *middle, when])
    return f"<h2>Space</h2>{_table(rows)}"


def _failures(study: optuna.Study) -> str:
    failed = failed_trials(study)
    if not failed:
        return ""
    texts = [
        f"<p>#{t.number}: {html.escape(str(t.params))}<br>{html.escape(reason_of(t))}</p>"
        f"<pre>{html.escape(str(t.user_attrs.get(ERROR, 'no traceback was recorded')))}</pre>"
        for t in failed[:10]
    ]
    shown = f", the first {len(texts)} of {len(failed)}" if len(failed) > len(texts) else ""
    return f"<h2>Failed trials{shown}</h2>{''.join(texts)}"


def _table(rows: list[list[str]], best: bool = False) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>"]
    for i, row in enumerate(body):
        mark = ' class="best"' if best and i == 0 else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def write_report(study: optuna.Study, path: str | Path) -> Path:
    """Writes the page of a study to `path`, in one piece; returns the path.

    Raises:
      ValueError: no sweep has opened the study.
    """
    path, text = Path(path), page(study)
    # A name that nobody can have put a link at, and rights as the umask gives them.
    part = path.with_name(f"{secrets.token_hex(8)}.part")
    try:
        with open(part, "x", encoding="utf-8") as file:
            file.write(text)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise in_one_sentence(
            error, f"the report {path} cannot be written", "nothing was changed there"
        ) from None
    return path
