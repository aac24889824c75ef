"""The command `scaling-meta`. Options are the fields of the commands; what takes time to import is imported inside `run`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcore import cli
from scaling_meta.cv_command import Cv
from scaling_meta.explain_command import Explain
from scaling_meta.features_command import Features
from scaling_meta.fit_command import Fit
from scaling_meta.import_command import Export, Import
from scaling_meta.predict_command import Predict
from scaling_meta.select_command import Select
from scaling_meta.validate_command import Validate
from scaling_meta.whatif_command import WhatIf


@dataclass(frozen=True, kw_only=True)
class Headline(cli.HeadlineCommand):
    """Test the paper's claims on the shipped database: what design adds to scale, as published and honestly, and which choices matter."""

    def claims(self, out: Path) -> tuple[str, list[Any]]:
        """Run `scaling_meta.headline.headline`."""
        from scaling_meta.headline import headline

        return "scaling-meta", headline(out, scale=self.scale, seed=self.seed)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; the console script of the package."""
    commands = [Import, Export, Validate, Fit, Cv, Select, Explain, Predict, WhatIf, Features, Headline]
    description = "Predict downstream scores of language models from size, data and architecture, and say which choices matter."
    sys.exit(cli.main("scaling-meta", description, commands, args))
