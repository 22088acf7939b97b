"""The notebook of examples/ runs in a kernel, with its progress bars, and is shown in the docs."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"


@pytest.mark.filterwarnings("ignore")  # of the kernel's own
def test_the_notebook_runs() -> None:
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(ROOT))
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    bars = [
        out for out in outputs if "application/vnd.jupyter.widget-view+json" in out.get("data", ())
    ]
    assert len(bars) == 2  # of fit and of sweep
    printed = "".join(out.text for out in outputs if out.get("name") == "stdout")
    first, last = (float(printed.split()[i]) for i in (2, 5))
    assert last < 0.8 * first
    drawn = json.dumps(client.widget_state)
    assert "60/60" in drawn and "4/4 trials" in drawn and "best 0." in drawn


def test_the_docs_show_it() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "notebook.py"))
    page = written["page_of"](json.loads(NOTEBOOK.read_text()))
    assert written["PAGE"].read_text() == page, "run: python docs/notebook.py"
    assert "```text\nvalidation loss" in page
