"""Puts together docs/results.md: what the benchmarks printed, word for word, with the pictures that they drew.

    python -m benchmarks.results.page

Each section is NAME.md as its program wrote it; NAME_reading.md in front of it, where there is one, is
what a person says of it. The claims of the method come first: claims.py judges them by the raw figures.
"""

from __future__ import annotations

import argparse
import os

from benchmarks.harness import RESULTS, ROOT

from . import claims

DOCS = ROOT / "docs"
SECTIONS = {
    "network": "Slow networks",
    "network_auto": "Dense or compressed, as the run decides",
    "time_to_accuracy": "Time to a given accuracy",
    "time_to_accuracy_gpt": "Time to a given perplexity of a larger GPT",
    "network_door": "Without DDP",
    "network_local": "Local steps on slow links",
    "network_nodes": "Nodes that share a slow link",
    "convergence": "Accuracy",
    "adamw": "AdamW",
    "adam_candidates": "Rules for AdamW that were tried",
    "ablation": "What each technique does",
    "clipping": "Clipping a recurrent network with momentum",
    "fine_tuning": "Fine-tuning",
    "local_steps": "Local steps: accuracy",
    "examples": "Models that change",
    "staleness": "How long entries wait",
    "wire_ratio": "Bytes on the wire",
    "plan_check": "What plan predicts",
    "scaling": "On paper: many workers",
    "step_cpu": "A DDP step where the network costs nothing",
    "horovod_step_cpu": "A Horovod step where the network costs nothing",
    "ops_cpu": "The compression step",
    "memory_cpu": "Memory",
    "checkpoint": "Checkpoints",
    "soak": "Ten thousand steps in which everything goes wrong",
    "soak_nodes": "The same with nodes as workers",
}
"""Title of each NAME.md in this folder."""
CLAIMS = "The claims of the method, one by one"
"""Title of what claims.py makes."""
START = """# Results

Made by `python -m benchmarks.results.page` from what the benchmarks printed; every section ends with the machine, the
versions, the commit and the command that gives it again, as it is called today (before the benchmarks were a package,
`python benchmarks/NAME.py`). All were run on a shared virtual machine with two cores: read ratios, not times.
"""


def text() -> str:
    """Returns the page.

    Raises:
        FileNotFoundError: a benchmark has not been run.
    """
    parts = [START, "\n".join(f"- [{title}](#{_anchor(title)})" for title in (CLAIMS, *SECTIONS.values()))]
    parts += [f"## {CLAIMS}", claims.section(claims.load(RESULTS))]
    for name, title in SECTIONS.items():
        parts.append(f"## {title}")
        reading, picture = RESULTS / f"{name}_reading.md", RESULTS / f"{name}.png"
        if reading.exists():
            parts.append(reading.read_text().strip())
        if picture.exists():
            parts.append(f"![{title}]({os.path.relpath(picture, DOCS)})")
        parts.append((RESULTS / f"{name}.md").read_text().strip())
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _anchor(title: str) -> str:
    """Returns how GitHub names a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c == "-")


def main() -> None:
    """Writes the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    (DOCS / "results.md").write_text(text())
    print(f"wrote {DOCS / 'results.md'}")


if __name__ == "__main__":
    main()
