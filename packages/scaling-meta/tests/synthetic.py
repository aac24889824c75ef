"""Tables with known effects."""

import numpy as np

from scaling_meta.table import Table


def table(families: int = 12, siblings: int = 5, noise: int = 0, seed: int = 0, by_family: bool = False) -> Table:
    """Sizes from 100M to 70B, tokens from 100B to 10T, a code share, a block type and columns of noise, alike in a family on demand."""
    generator, rows = np.random.default_rng(seed), families * siblings
    of_row = np.repeat(np.arange(families), siblings)
    columns = generator.normal(size=(families, noise))[of_row] if by_family else generator.normal(size=(rows, noise))
    values = np.column_stack([
        generator.uniform(np.log(1e8), np.log(7e10), rows), generator.uniform(np.log(1e11), np.log(1e13), rows),
        generator.uniform(0, 50, rows), generator.integers(0, 2, rows), columns,
    ])  # fmt: skip
    return Table(
        models=tuple(f"m{row}" for row in range(rows)),
        features=("log_params", "log_tokens", "share_code", "block_type", *(f"noise {k}" for k in range(noise))),
        values=values,
        categories={"block_type": ("parallel", "sequential")},
        families=tuple(f"f{family:02}" for family in of_row),
        released=tuple(f"20{20 + row % 5}-{1 + row % 12:02}" for row in range(rows)),
    )


def scale_score(table: Table) -> np.ndarray:
    """A monotone score of size and tokens, from 0.25 to 0.9."""
    return 0.25 + 0.65 / (1 + np.exp(-0.6 * (table.flops - np.log(1e23))))


def code_score(table: Table) -> np.ndarray:
    """`scale_score` less what a code share away from 20 % costs."""
    return scale_score(table) - 0.15 * np.minimum(1, ((table.column("share_code") - 20) / 20) ** 2)
