"""One way to make a command line: frozen dataclasses are the options, the help and the saved config."""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from lmcore.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand. A subclass adds its options as fields, with docstrings as their help, and says what to do in `run`.

    The class docstring is the help of the subcommand, its first line the summary. Anything slow is imported inside `run`.
    """

    seed: int = 0
    """Seed of everything random."""
    json: bool = False
    """Print the result as one JSON object on stdout."""

    def run(self) -> dict[str, Any]:
        """Do the work and return what `--json` prints."""
        raise TypeError(f"{type(self).__name__} does not say what to run")

    def show(self, result: dict[str, Any]) -> None:
        """Print `result` for people; without an override, one `name: value` per line."""
        for name, value in result.items():
            print(f"{name}: {value}")


def main(program: str, description: str, commands: Sequence[type[Command]], args: Sequence[str] | None = None) -> int:
    """Parse `args` (default `sys.argv[1:]`), run the chosen command and return the exit status.

    0: done. 2: the arguments or the input cannot be used (`UserError`, one line on stderr). 130: interrupted; the same
    command resumes or starts again. Any other exception is a bug and shows its traceback.
    """
    subcommands: dict[str, Callable[..., Command]] = {_verb(command): command for command in commands}
    chosen: Command = tyro.extras.subcommand_cli_from_dict(
        subcommands,
        prog=program,
        description=description,
        args=sys.argv[1:] if args is None else args,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands),
    )

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"{program}: warning: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings(), _stdout_on_stderr() if chosen.json else contextlib.nullcontext():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = warn
            result = chosen.run()
        if chosen.json:
            print(json.dumps(result, allow_nan=False))
        else:
            chosen.show(result)
        sys.stdout.flush()
    except UserError as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadlineCommand(Command):
    """Run the paper's claims on data and models that come with the installed packages.

    A subclass sets `package` and `describe`, and calls the package's `headline` in `claims`.
    """

    out: Path | None = None
    """Folder for claims.json, the tables and the figures; without it, only the claims are printed."""
    scale: str = "default"
    """smoke (under 20 s), default (at most 3 minutes on 2 cores), long (up to an hour, all seeds) or full (a GPU)."""
    overwrite: bool = False
    """Replace the folder if it exists."""

    def claims(self, out: Path) -> tuple[str, list[Any]]:
        """Run the claims, writing below `out`; return the name of the package and the claims."""
        raise TypeError(f"{type(self).__name__} has no claims")

    def run(self) -> dict[str, Any]:
        """Run the claims and return their table as `claims.to_json` gives it."""
        from lmcore import claims, record

        if self.scale not in claims.SCALES:
            raise UserError(f"--scale {self.scale}: choose one of {', '.join(claims.SCALES)}")
        with contextlib.ExitStack() as stack:
            if self.out is None:
                out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headline-")))
            else:
                out = stack.enter_context(record.published(self.out, overwrite=self.overwrite))
            package, found = self.claims(out)
            result = claims.to_json(package, self.scale, found)
            record.write_json(out / "claims.json", result)
        return result

    def show(self, result: dict[str, Any]) -> None:
        """Print the claims as a table."""
        from lmcore import claims

        print(claims.as_text(result))


def _verb(command: type[Command]) -> str:
    return command.__name__.lower()


def _stdout_on_stderr() -> contextlib.redirect_stdout[Any]:
    """With --json, stdout holds the result alone: whatever a library prints goes to stderr."""
    return contextlib.redirect_stdout(sys.stderr)
