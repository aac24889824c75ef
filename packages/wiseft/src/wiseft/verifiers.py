"""Is a completion correct? A verifier finds its final answer and compares it with the reference."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any

from lmcore.errors import UserError
from wiseft.problems import Problem


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one completion."""

    correct: bool
    answer: str | None
    """The final answer in canonical form, which majority vote counts; None if the completion has none."""
    gave_up: bool = False
    """The checker raised or ran out of time: the completion counts as incorrect."""


def gsm8k(completion: str, reference: str) -> Verdict:
    r"""Compare the number after the first `####`, or, where no number follows one, the last number of the completion.

    The first `####` is GSM8K's own rule: a model that goes on to invent further questions is judged by the one it was
    asked. Commas between thousands, a dollar sign and trailing zeros do not matter. The reference is read the same way.

    >>> gsm8k("He sells 9 * 2 = 18 eggs.\n#### 18", "16 - 7 = 9, 9 * 2 = 18\n#### 18")
    Verdict(correct=True, answer='18', gave_up=False)
    >>> gsm8k("That makes $1,250.50 in all.", "1250.5").answer
    '1250.5'

    Raises: `UserError` if the reference has no number.
    Source: Cobbe et al. 2021.
    """
    expected = _number(reference)
    if expected is None:
        raise UserError(f"the reference answer {reference!r} has no number: is another --verifier meant?")
    answer = _number(completion)
    return Verdict(answer == expected, answer)


def boxed(completion: str, reference: str) -> Verdict:
    r"""Compare the content of the last `\boxed{...}` (braces balanced) as normalised text.

    The reference is its own last `\boxed{...}`, else what follows its `####`, else all of it. Normalising removes spaces,
    `$`, sizes (`\left`, `\big`), `\text` and a final full stop, and writes `\dfrac` and `\tfrac` as `\frac`: `1/2` and
    `\frac{1}{2}` stay different (the verifier `math` compares values).

    >>> boxed(r"So $x = \boxed{\dfrac{1}{2}}$.", r"\frac{1}{2}")
    Verdict(correct=True, answer='\\frac{1}{2}', gave_up=False)
    """
    expected = _normalised(_final(reference))
    content = _last_boxed(completion)
    answer = None if content is None else _normalised(content)
    return Verdict(answer == expected, answer)


def exact(completion: str, reference: str) -> Verdict:
    r"""Compare all of the completion with the reference, white space at both ends aside.

    >>> exact(" 085;119\n", "085;119").correct
    True
    """
    answer = completion.strip()
    return Verdict(answer == reference.strip(), answer)


def math(completion: str, reference: str) -> Verdict:
    r"""Compare values with math-verify: `\boxed{1/2}`, `0.5` and `$\frac{2}{4}$` agree.

    The reference is read as for `boxed`, as LaTeX. A comparison that raises or takes over 5 s gives up (the clock is a
    Unix signal: call this from the main thread; and a verdict that close to the limit may differ from run to run).

    Raises: `UserError` if math-verify is not installed or the reference cannot be parsed.
    Source: math-verify (Hugging Face).
    """
    math_verify, timed_out = _math_verify()
    expected = _parsed_reference(reference)
    try:
        found = math_verify.parse(completion, raise_on_error=True)
        answer = _canonical(found[0]) if found else None
        return Verdict(bool(found) and math_verify.verify(expected, found, raise_on_error=True), answer)
    except (Exception, timed_out):  # its TimeoutException is no Exception
        return Verdict(False, None, gave_up=True)


VERIFIERS: dict[str, Callable[[str, str], Verdict]] = {"gsm8k": gsm8k, "boxed": boxed, "exact": exact, "math": math}
"""`verify(completion, reference)` by the name that `--verifier` takes."""

# A minus is a sign unless it stands behind a digit, a letter or a bracket: "16-3" ends in 3.
_NUMBER = re.compile(r"(?:(?<![\w)\]])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def require_readable(problems: Sequence[Problem], verifier: Callable[[str, str], Verdict]) -> None:
    """Raise a `UserError` that names the first problem whose reference no verdict can be based on: before hours of sampling."""
    for problem in problems:
        try:
            verifier("", problem.answer)
        except UserError as error:
            raise UserError(f"problem {problem.id!r}: {error}") from None


def _number(text: str) -> str | None:
    marked = re.search(rf"####\s*({_NUMBER.pattern})", text)
    numbers = [marked[1]] if marked else _NUMBER.findall(text)
    if not numbers:
        return None
    value = f"{Decimal(numbers[-1].replace(',', '').replace('$', '')):f}"
    value = value.rstrip("0").rstrip(".") if "." in value else value
    return "0" if value == "-0" else value


def _final(reference: str) -> str:
    content = _last_boxed(reference)
    return reference.rpartition("####")[2] if content is None else content


def _last_boxed(text: str) -> str | None:
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[start:end]
    return None


def _normalised(answer: str) -> str:
    answer = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\\(?:left|right|bigg?|Bigg?)(?![a-zA-Z])|\\[ ,;:!]|[\s$~]", "", answer)
    return re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", answer).removesuffix(".")


def _math_verify() -> tuple[Any, type[BaseException]]:
    try:
        import math_verify
        from math_verify.errors import TimeoutException
    except ImportError:
        raise UserError("the verifier math needs math-verify: pip install 'wiseft[math]'") from None
    return math_verify, TimeoutException


def _canonical(value: Any) -> str:
    """A sympy object, or text it could not read, as text in which 0.50, 0.5 and 1/2 are one answer."""
    if isinstance(value, str):
        return value
    from sympy import Float, Rational

    return str(value.xreplace({number: Rational(str(number)) for number in value.atoms(Float)}))


@cache
def _parsed_reference(reference: str) -> Any:
    parsed = _math_verify()[0].parse(rf"\boxed{{{_final(reference)}}}")
    if not parsed:
        raise UserError(f"math-verify cannot parse the reference answer {reference!r}")
    return parsed
