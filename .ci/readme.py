#!/usr/bin/env python3
"""Make README.md from nbs/index.ipynb, or with --check say whether the two agree. Needs nothing but Python."""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made by .ci/readme.py from nbs/index.ipynb: edit the notebook. -->\n"
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp|include:\s*false)\b", re.M)
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
RELATIVE = re.compile(r'(\]\(|\b(?:src|href)=")(?![a-z]+:|#|/)([^)"\s]+)')


def from_top(text):
    "The links of `text`, relative to nbs/, made relative to the top of the project."
    def fix(m): return m[1] + (m[2][3:] if m[2].startswith("../") else f"nbs/{m[2]}")
    parts = re.split(r"(^```.*?^```$|`[^`\n]*`)", text, flags=re.M | re.S)  # code, at odd places, stays as it is
    return "".join(p if i % 2 else RELATIVE.sub(fix, p) for i, p in enumerate(parts))


def output(out):
    "One output of a cell as markdown: text/markdown as it is, text as an indented block."
    data = out.get("data", {"text/plain": out.get("text", "")})
    if out["output_type"] == "error" or any(k.startswith("image/") for k in data):
        raise SystemExit(
            "index.ipynb: a cell ended in an error or shows a picture; README.md takes pictures from nbs/images only"
        )
    if "text/markdown" in data: return "".join(data["text/markdown"])
    return "".join("    " + line for line in "".join(data["text/plain"]).splitlines(keepends=True))


def readme(notebook):
    blocks = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if HIDDEN.search(source) or cell["cell_type"] == "raw": continue
        if cell["cell_type"] == "markdown": blocks.append(from_top(source))
        else: blocks += [f"```python\n{DIRECTIVE.sub('', source).strip()}\n```", *map(output, cell["outputs"])]
    return NOTE + "\n" + "\n\n".join(b.strip("\n") for b in blocks if b.strip()) + "\n"


if __name__ == "__main__":
    text = readme(json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8")))
    file = ROOT / "README.md"
    if sys.argv[1:] == ["--check"]:
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            sys.exit("README.md is not what nbs/index.ipynb says: run `python3 .ci/readme.py`")
        print("README.md agrees with nbs/index.ipynb")
    elif sys.argv[1:]: sys.exit("usage: .ci/readme.py [--check]")
    else: file.write_text(text, encoding="utf-8")
