"""One way to make a command line: frozen dataclasses are the options, the help and the saved config."""

import contextlib
import errno
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from lmcore.claims import Scale, as_text, to_json
from lmcore.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand: fields are its options, docstrings the help. What takes time to import is imported inside `run`."""

    seed: int = 0
    """Seed of everything random."""
    json: bool = False
    """Print the result as one JSON object on stdout."""

    def run(self) -> dict[str, Any]:
        """Do the work and return what `--json` prints."""
        raise NotImplementedError

    def show(self, result: dict[str, Any]) -> None:
        """Print `result` for people; without an override, one `name: value` per line."""
        for name, value in result.items():
            print(f"{name}: {value}")


def main(program: str, description: str, commands: Sequence[type[Command]], args: Sequence[str] | None = None) -> int:
    """Parse `args` (default `sys.argv[1:]`), run the chosen command and return the exit status.

    0: done. 2: arguments or input that cannot be used, a full disk (one line on stderr). 130: interrupted. Any other exception is a bug.
    """
    named: dict[str, Callable[..., Command]] = {command.__name__.lower(): command for command in commands}
    flags = (tyro.conf.FlagCreatePairsOff,)
    chosen = tyro.extras.subcommand_cli_from_dict(named, prog=program, description=description, args=args, config=flags)
    if not sys.stderr.isatty():  # a log has no use for the bars of transformers
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:  # with --json, stdout holds the result alone: whatever a library prints goes to stderr
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr) if chosen.json else contextlib.nullcontext():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = lambda message, *_, **__: print(f"{program}: warning: {message}", file=sys.stderr)
            result = chosen.run()
        if chosen.json:
            print(json.dumps(result, allow_nan=False))
        else:
            chosen.show(result)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        if getattr(error, "errno", None) not in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Print one row per mapping, columns from the first, those of numbers to the right; what is piped is neither wrapped nor cut."""
    from rich.console import Console
    from rich.table import Column, Table

    if rows:
        words = [any(row[name][:1].isalpha() for row in rows) for name in rows[0]]
        columns = (Column(name, justify="left" if word else "right") for name, word in zip(rows[0], words, strict=True))
        table = Table(*columns, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(row[name] for name in rows[0]))
        width = None if sys.stdout.isatty() else 2**16
        Console(markup=False, emoji=False, highlight=False, width=width).print(table)


@dataclass(frozen=True, kw_only=True)
class HeadlineCommand(Command):
    """Run the paper's claims on data and models that come with the installed packages; a subclass says how in `claims`."""

    out: Path
    """Folder for claims.json, the tables and the figures."""
    scale: Scale = "default"
    """smoke (under 20 s), default (at most 3 minutes on 2 cores), long (up to an hour, all seeds) or full (a GPU)."""
    overwrite: bool = False
    """Run again where the folder holds a finished run; one that was interrupted is continued."""

    def claims(self, out: Path) -> tuple[str, list[Any]]:
        """Run the claims, writing below `out`; return the name of the package and the claims."""
        raise NotImplementedError

    def run(self) -> dict[str, Any]:
        """Run the claims and return them as `claims.to_json` does; claims.json, written last, marks a finished folder."""
        from lmcore import record

        if (self.out / "claims.json").exists():
            if not self.overwrite or not (self.out / "environment.json").exists():  # without it, it is somebody else's
                raise UserError(f"{self.out} holds a finished headline: choose another --out or pass --overwrite")
            shutil.rmtree(self.out)
        record.Run(self.out, {"scale": self.scale, "seed": self.seed})
        result = to_json(*self.claims(self.out), scale=self.scale)
        record.write_json(self.out / "claims.json", result)
        return result

    def show(self, result: dict[str, Any]) -> None:
        """Print the claims as a table."""
        print(as_text(result))
