"""Writes docs/notebook.md, the page that shows examples/first_steps.ipynb.

  python docs/notebook.py

A test compares the two; the notebook itself is run by tests/test_notebook.py.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"
PAGE = ROOT / "docs" / "notebook.md"


def page_of(notebook: dict[str, Any]) -> str:
    """The notebook as Markdown: text as it is, code and printed results in blocks."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        # `py`, as these blocks run in the notebook and not with the pages.
        parts.append(f"```py\n{source}\n```")
        printed = "".join("".join(out.get("text", ())) for out in cell["outputs"]).rstrip()
        if printed:
            parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page_of(json.loads(NOTEBOOK.read_text())))


if __name__ == "__main__":
    main()
