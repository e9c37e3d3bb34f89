"""
A tiny Mixtral: a real checkpoint of a model that has learned nothing.

What it is: `MixtralForCausalLM` in the layout in which Mixtral is published (file and tensor names, bfloat16,
two safetensors files with an index), with Mixtral's own 32,000 pieces and chat template, 8 layers and 8
experts of which 2 are chosen, in 12 MB. It loads through the same code as the real model, NF4 included.

Promises: the same bytes on any machine, made in seconds without torch; a folder that exists is whole.

What it is not: trained. Its weights are random, so what its experts choose depends on the token (at layer 0
a token's most frequent first choice takes 86 % of its occurrences, at layer 7 56 %) and on its context, but
means nothing; only plumbing, speed and layout can be learned from it.
"""

import importlib.util
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from workers.tokenizer import sentencepiece_tokenizer

SEED = 8_7
LAYERS, EXPERTS, EXPERTS_PER_TOKEN = 8, 8, 2
HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, VOCABULARY = 64, 128, 4, 2, 32_000
ROUTER_STD = 1.25  # of a router's logits: the larger of the two weights is 0.65 on average (measured)

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": HEADS,
    "num_experts_per_tok": EXPERTS_PER_TOKEN,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "num_local_experts": EXPERTS,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# As Mixtral-8x7B-Instruct-v0.1's: turns alternate, and there is no system message.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
_FILES = (
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def tiny_checkpoint(folder: Path | None = None) -> Path:
    """
    Return the folder of the tiny Mixtral, making it first where it does not exist.

    Parameters
    ----------
    folder
        Default: `expert-atlas/tiny-mixtral-v1` in `$XDG_CACHE_HOME`, else in `~/.cache`.

    Raises
    ------
    ValueError
        The folder exists and holds something else, or less; it is left as it is.
    ModuleNotFoundError
        The package that ships Mixtral's tokenizer is not installed.
    """
    if folder is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache) / "expert-atlas" / "tiny-mixtral-v1"
    if folder.is_dir() and any(folder.iterdir()):
        return _whole(folder)
    # A killed process leaves its partial folder under a name that nobody reads.
    partial = folder.with_name(f".{folder.name}.partial-{uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        _write_tokenizer(partial)
        _write_weights(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process was first, and made the same bytes
            return _whole(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def model_path(model: str | Path) -> str | Path:
    """The folder of the tiny Mixtral for the name "tiny", anything else as it is."""
    return tiny_checkpoint() if str(model) == "tiny" else model


def _whole(folder: Path) -> Path:
    """Return the folder if it has every file; an empty file is what a crash of the machine leaves."""
    missing = [name for name in _FILES if not (folder / name).is_file() or not (folder / name).stat().st_size]
    if missing:
        raise ValueError(
            f"{folder} is no whole tiny Mixtral: {', '.join(missing)} missing or empty. "
            "Delete the folder, and it is made anew, or name another."
        )
    return folder


def _write_tokenizer(folder: Path) -> None:
    package = importlib.util.find_spec("mistral_common")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "the tiny model's tokenizer comes from the package mistral-common, which is not installed: "
            "pip install 'expert-atlas[demo]'"
        )
    model_file = Path(package.origin).parent / "data" / "tokenizer.model.v1"
    sentencepiece_tokenizer(model_file).save(str(folder / "tokenizer.json"))
    _write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)
    _write_json(
        folder / "tokenizer_config.json",
        {
            **SPECIAL_TOKENS,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 32768,
            "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
        },
    )


def _write_weights(folder: Path) -> None:
    _write_json(folder / "config.json", CONFIG)
    files: dict[str, dict[str, tuple[tuple[int, ...], float]]] = {name: {} for name in _FILES[1:3]}
    for name, shape, std in _tensors():
        late = name.startswith(("lm_head.", "model.norm.")) or (
            name.startswith("model.layers.") and int(name.split(".")[2]) >= LAYERS // 2
        )
        files[_FILES[2] if late else _FILES[1]][name] = (shape, std)
    total_bytes = sum(_write_safetensors(folder / file, tensors) for file, tensors in files.items())
    places = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_safetensors(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], float]]) -> int:
    """
    Write tensors in the safetensors format and return their size in bytes.

    By hand, for the format is a length, a JSON header and the data, while the package has changed both its
    interface and its order of tensors.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, (shape, std) in tensors.items():
        start = len(data)
        data += _bfloat16(name, shape, std).tobytes()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, len(data)]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begin aligned
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return len(data)


def _tensors() -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, shape and standard deviation of each tensor; a deviation of 0 stands for a norm, all ones."""
    key_value = HIDDEN // HEADS * KEY_VALUE_HEADS
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN), 1.0
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,), 0.0
        for name, rows in (("q", HIDDEN), ("k", key_value), ("v", key_value), ("o", HIDDEN)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, HIDDEN), HIDDEN**-0.5
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,), 0.0
        moe = f"{prefix}.block_sparse_moe"
        yield f"{moe}.gate.weight", (EXPERTS, HIDDEN), ROUTER_STD * HIDDEN**-0.5
        for expert in range(EXPERTS):
            yield f"{moe}.experts.{expert}.w1.weight", (INTERMEDIATE, HIDDEN), HIDDEN**-0.5
            yield f"{moe}.experts.{expert}.w2.weight", (HIDDEN, INTERMEDIATE), INTERMEDIATE**-0.5
            yield f"{moe}.experts.{expert}.w3.weight", (INTERMEDIATE, HIDDEN), HIDDEN**-0.5
    yield "model.norm.weight", (HIDDEN,), 0.0
    yield "lm_head.weight", (VOCABULARY, HIDDEN), HIDDEN**-0.5


def _bfloat16(name: str, shape: tuple[int, ...], std: float) -> NDArray[np.uint16]:
    """
    Draw one tensor from its own stream, as the bits of bfloat16 numbers.

    Each number is the sum of four 16-bit integers of the generator's raw output, which is bell-shaped. Raw
    output and integer sums are the same everywhere and in every numpy; normal variates, which go through the
    platform's logarithm, are not promised to be.
    """
    if std == 0.0:
        return np.full(shape, 0x3F80, dtype="<u2")  # 1.0
    raw = np.random.PCG64([SEED, zlib.crc32(name.encode())]).random_raw(math.prod(shape))
    sums = raw.astype("<u8").view("<u2").reshape(-1, 4).sum(axis=1, dtype=np.int64)
    centred = (sums - 2 * 0xFFFF).astype(np.float32)  # exact: fewer than 24 bits
    bits = (centred * np.float32(std / math.sqrt((2**32 - 1) / 3))).view(np.uint32).astype(np.uint64)
    # to nearest, ties to even
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").reshape(shape)
    return rounded


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
