"""Run the headline of every package, or of those named, and gather their claims: `headlines.py [PACKAGE...] [--scale default]`."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

from lmcore import claims
from lmcore.record import environment, write_json
from lmcore.report import Page

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parents[2].name for path in ROOT.glob("packages/*/src/*/headline.py"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(PACKAGES)}; all by default")
    parser.add_argument("--scale", choices=get_args(claims.Scale), default="default")
    options = parser.parse_args()
    unknown = set(options.packages) - set(PACKAGES)
    if unknown:
        parser.error(f"no package {min(unknown)}: there are {', '.join(PACKAGES)}")
    runs = ROOT / "runs"
    results = []
    for package in options.packages or PACKAGES:
        out = runs / package
        start = time.perf_counter()
        command = [package, "headline", "--scale", options.scale, "--out", str(out), "--overwrite", "--json"]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results.append(json.loads(printed) | {"seconds": round(time.perf_counter() - start, 1)})
        print(claims.as_text(results[-1]), f"  ({results[-1]['seconds']} s)", sep="\n")
    write_json(runs / "claims.json", {"environment": environment(), "results": results})
    page = Page(
        "Tenfold: do the papers' claims hold?", f"Scale {options.scale}. Each verdict is computed from the numbers beside it."
    )
    for result in results:
        page.section(result["package"])
        page.table(
            claims.rows(result),
            f"{result['seconds']} s; seeds {result['seeds']}; figures and tables: {result['package']}/index.html",
        )
    page.write(runs / "index.html")
    print(f"wrote {(runs / 'index.html').relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
