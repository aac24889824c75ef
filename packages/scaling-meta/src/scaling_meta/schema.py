"""The schema of the database: every design field and every benchmark, as data.

A field is what is stored about a model (one fact each, see `database`). A feature is a column of the design matrix (see `table`): the same
names, but for the two of scale, which enter as natural logarithms: `log_params` of `params`, and `log_tokens` of the number of tokens.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["number", "category"]


@dataclass(frozen=True, kw_only=True)
class Field:
    """One fact that can be known of a model: a number between `low` and `high`, inclusive, or one of `categories`."""

    name: str
    kind: Kind = "number"
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf
    categories: tuple[str, ...] = ()
    help: str

    def parse(self, text: str) -> float | str:
        """The value that a cell holds. Raises: `ValueError` that says what is wrong with it."""
        if self.kind == "category":
            if text not in self.categories:
                raise ValueError(f"{text!r} is none of {', '.join(self.categories)}")
            return text
        return number(text, self.low, self.high)


def number(text: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number between `low` and `high`. Raises: `ValueError` that says what is wrong with it."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and low <= value <= high):
        bounds = (
            f"between {low:g} and {high:g}" if math.isfinite(high) else f"at least {low:g}" if math.isfinite(low) else "finite"
        )
        raise ValueError(f"{text} is not {bounds}")
    return value


def is_missing(text: str) -> bool:
    """Whether a cell of somebody's table says that the value is not known: empty, "unknown", "nan", or -1 for what cannot be negative."""
    return text.strip().lower() in {"", "unknown", "nan", "null", "n/a", "-1", "-1.0"}


def _count(name: str, unit: str, help: str) -> Field:
    return Field(name=name, unit=unit, low=1, help=help)


def _category(name: str, categories: str, help: str) -> Field:
    return Field(name=name, kind="category", categories=tuple(categories.split()), help=help)


def _share(name: str, help: str) -> Field:
    return Field(name=f"share_{name}", unit="%", low=0, high=100, help=help)


_SCALE = (
    _count("params", "weights", "Size: trained weights, embeddings included, tied ones counted once."),
    Field(name="tokens_billions", unit="10^9 tokens", low=1e-6, help="Data: tokens seen in pretraining, repetitions included."),
)
_PARTS = (
    Field(
        name="embedding_params",
        unit="weights",
        low=0,
        help="Those of `params` in token and position embeddings and an untied head.",
    ),
    _count("non_embedding_params", "weights", "The rest of `params`."),
)
_ARCHITECTURE = (
    _count("dimension", "", "Width of the residual stream."),
    _count("num_heads", "heads", "Query heads of attention in a layer."),
    Field(name="mlp_ratio", low=1e-3, help="Hidden width of the MLP as a multiple of `dimension`."),
    _count("sequence_length", "tokens", "Longest context the model was trained on."),
    _category("activation", "geglu gelu gelu_fast gelu_new relu silu swiglu", "Nonlinearity of the MLP (geglu, swiglu: gelu, silu with a "
              "gate; gelu_new, gelu_fast: gelu approximated by a tanh)."),
    _category("attention_variant", "full gqa local,full mqa", "Key and value heads: one per query head, shared by groups, local in "
              "every other layer, or one for all."),
    _category("biases", "attn_only ln_only none some", "Where the layers have biases (some: in the MLP too)."),
    _category("block_type", "parallel sequential", "Whether MLP and attention read the same input."),
    _category("layer_norm_type", "non-parametric parametric rmsnorm", "Normalisation: without weights, with them, or RMSNorm."),
    _category("positional_embeddings", "alibi learned rope", "How positions enter."),
)  # fmt: skip
_DATA = (
    _share("web", "Pretraining data from the web."),
    _share("code", "Pretraining data that is code."),
    _share("books", "Pretraining data from books."),
    _share("reference", "Pretraining data from reference works, such as encyclopedias."),
    _share("academic", "Pretraining data from academic texts."),
    _share("english", "Of the pretraining data, what is in English; it cuts across the other shares."),
)
_STATISTICS = {
    "char_len": "characters of a text",
    "const_parse_const_tree_depth_max": "depth of the deepest constituency tree",
    "const_parse_const_tree_depth_mean": "depth of the constituency trees",
    "const_parse_const_word_depth_mean": "depth of words in the constituency trees",
    "const_parse_const_word_depth_std": "spread of the depth of words in the constituency trees",
    "const_parse_num_sentences": "sentences",
    "const_parse_num_words": "words",
    "const_parse_words_per_sent_mean": "words of a sentence",
    "const_parse_words_per_sent_std": "spread of the words of a sentence",
    "content_function_ratio": "content words per function word",
    "dep_parse_dep_head_dist_90p": "90th percentile of the distance of a word to its head",
    "dep_parse_dep_head_dist_max": "largest distance of a word to its head",
    "dep_parse_dep_head_dist_median": "median distance of a word to its head",
    "dep_parse_dep_root_dist_max": "largest distance of a word to the root",
    "dep_parse_dep_root_dist_mean": "mean distance of a word to the root",
    "dep_parse_dep_root_dist_median": "median distance of a word to the root",
    "domain_academic_pct": "percent of the texts classified as academic",
    "domain_books_pct": "percent of the texts classified as books",
    "domain_code_pct": "percent of the texts classified as code",
    "domain_reference_pct": "percent of the texts classified as reference works",
    "domain_specific_datasets_pct": "percent of the texts classified as from a specific data set",
    "domain_web_pct": "percent of the texts classified as from the web",
    "edu_classifier": "educational value as a classifier sees it",
    "entropy": "entropy of the bigrams",
    "num_tokens": "tokens",
    "pct_english": "percent in English",
    "ttr": "type-token ratio: distinct tokens per token",
    "unique_tokens": "distinct tokens",
}
_KEYWORDS = {
    "question_words": "question words",
    "imperative_verbs": "imperative verbs",
    "conjunctions": "conjunctions",
    "instructions_words": "words of instructions",
    "numbers": "numbers",
}
_MOMENTS = {"mean": "mean", "std": "standard deviation"}
_GENERATION = (
    *(
        Field(name=f"gen_{name}_{moment}", low=0, help=f"Over texts that the model generates freely, {said} of: {what}.")
        for moment, said in _MOMENTS.items()
        for name, what in _STATISTICS.items()
    ),
    *(Field(name=f"gen_{name}_ratio", low=0, help=f"In texts that the model generates freely, frequency of {what}.")
      for name, what in _KEYWORDS.items()),
)  # fmt: skip

FIELDS: dict[str, Field] = {field.name: field for field in (*_SCALE, *_PARTS, *_ARCHITECTURE, *_DATA, *_GENERATION)}
"""Every field of the database, by name."""

SCALING = ("log_params", "log_tokens")
"""Features of scale: natural logarithms of the number of weights and of the number of pretraining tokens."""
ARCHITECTURE = tuple(field.name for field in _ARCHITECTURE)
"""Features of architecture: four numbers and six categories."""
DATA = tuple(field.name for field in _DATA)
"""Features of the data's composition, in percent."""
GENERATION = tuple(field.name for field in _GENERATION)
"""The 61 features of texts that the model generates freely, named as in the paper's table with `gen_` before."""
DESIGN = (*SCALING, *ARCHITECTURE, *DATA)
"""The features known of a model before it is run."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One of the paper's 13 targets: the mean of `metric` over `tasks`, each evaluated with `shots` examples in the prompt.

    `tasks` are names of lm-evaluation-harness 0.4, `optional` those that count where they are there. Where tasks are the same `items`
    asked in other ways, their errors add up; otherwise they are independent. `questions` is how many there are, where it is needed.
    """

    name: str
    title: str
    shots: int
    metric: Literal["accuracy", "brier"] = "accuracy"
    better: Literal["higher", "lower"] = "higher"
    low: float = 0.0
    high: float = 1.0
    tasks: tuple[str, ...]
    optional: tuple[str, ...] = ()
    items: Literal["distinct", "shared"] = "distinct"
    questions: int | None = None


def _accuracy(name: str, title: str, shots: int, *tasks: str, shared: bool = False) -> Benchmark:
    return Benchmark(name=name, title=title, shots=shots, tasks=tasks or (name,), items="shared" if shared else "distinct")


def _brier(name: str, title: str, *tasks: str, optional: tuple[str, ...] = (), shared: bool = False) -> Benchmark:
    """A multi-class Brier score: squared error of the probabilities summed over the classes, so between 0 and 2."""
    return Benchmark(
        name=name, title=title, shots=0, metric="brier", better="lower", high=2.0, tasks=tasks or (name,), optional=optional,
        items="shared" if shared else "distinct",
    )  # fmt: skip


_SUBJECTS = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry college_computer_science
    college_mathematics college_medicine college_physics computer_security conceptual_physics econometrics electrical_engineering
    elementary_mathematics formal_logic global_facts high_school_biology high_school_chemistry high_school_computer_science
    high_school_european_history high_school_geography high_school_government_and_politics high_school_macroeconomics
    high_school_mathematics high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
    high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence logical_fallacies
    machine_learning management marketing medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology public_relations security_studies sociology
    us_foreign_policy virology world_religions
"""
_LANGUAGES = "ar bg de el en es fr hi ru sw th tr ur vi zh"
_MMLU = tuple(f"mmlu_{subject}" for subject in _SUBJECTS.split())
_XNLI = tuple(f"xnli_{language}" for language in _LANGUAGES.split())

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        _accuracy("arc_challenge", "ARC challenge", 25),
        _accuracy("hellaswag", "HellaSwag", 10),
        _accuracy("mmlu_0shot", "MMLU, 0 shots", 0, *_MMLU),
        _accuracy("mmlu_5shot", "MMLU, 5 shots", 5, *_MMLU),
        _accuracy("truthfulqa", "TruthfulQA", 0, "truthfulqa_mc1", "truthfulqa_mc2", shared=True),
        _accuracy("winogrande", "Winogrande", 5),
        _accuracy("lambada", "LAMBADA", 0, "lambada_openai", "lambada_standard", shared=True),
        _accuracy("gsm8k", "GSM8K", 5),
        replace(_accuracy("humaneval", "HumanEval", 0), questions=164),
        _brier("xnli", "XNLI", *_XNLI, optional=("xnli_eu",), shared=True),
        _brier("anli", "ANLI", "anli_r1", "anli_r2", "anli_r3"),
        _brier("mathqa", "MathQA"),
        _brier("logiqa2", "LogiQA 2"),
    )
}
"""The paper's benchmarks, by name: accuracy of the first nine, Brier score of the last four."""
