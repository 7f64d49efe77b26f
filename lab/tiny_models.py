#!/usr/bin/env python3
"""Make the lab's tiny models: the four real architectures with random weights from a fixed seed.

Standard library only, so that the controller needs no torch. Every model has its own folder with ``config.json``,
``model.safetensors`` (bfloat16), a byte-level tokenizer of 259 tokens and a chat template, about a megabyte each.
They talk nonsense, through the same code as the full-size models.

    tiny_models.py OUTDIR [--seed N]
"""

import argparse
import hashlib
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, CONTEXT = 128, 2, 4, 2, 256, 4096
HEAD_DIM = HIDDEN // HEADS
SPECIAL = ["<s>", "</s>", "<pad>"]
VOCAB = len(SPECIAL) + 256
EXPERTS = 4
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": FFN,
    "max_position_embeddings": CONTEXT,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "sliding_window": None,
}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
    },
    "hermes-2": MISTRAL,
    "openchat-3.5": MISTRAL,
    "phi-3-mini": {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "num_key_value_heads": HEADS,
        "original_max_position_embeddings": CONTEXT,
        "rope_scaling": None,
    },
}


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor, as the checkpoints of this architecture have them (linear weights: out x in)."""
    kind = config["model_type"]
    kv = config["num_key_value_heads"] * HEAD_DIM
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for n in range(LAYERS):
        layer = f"model.layers.{n}."
        yield layer + "input_layernorm.weight", (HIDDEN,)
        yield layer + "post_attention_layernorm.weight", (HIDDEN,)
        if kind == "phi3":
            yield layer + "self_attn.qkv_proj.weight", (HIDDEN + 2 * kv, HIDDEN)
        else:
            yield layer + "self_attn.q_proj.weight", (HIDDEN, HIDDEN)
            yield layer + "self_attn.k_proj.weight", (kv, HIDDEN)
            yield layer + "self_attn.v_proj.weight", (kv, HIDDEN)
        yield layer + "self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        if kind == "mixtral":
            yield layer + "block_sparse_moe.gate.weight", (EXPERTS, HIDDEN)
            for e in range(EXPERTS):
                expert = f"{layer}block_sparse_moe.experts.{e}."
                yield expert + "w1.weight", (FFN, HIDDEN)
                yield expert + "w2.weight", (HIDDEN, FFN)
                yield expert + "w3.weight", (FFN, HIDDEN)
        elif kind == "phi3":
            yield layer + "mlp.gate_up_proj.weight", (2 * FFN, HIDDEN)
            yield layer + "mlp.down_proj.weight", (HIDDEN, FFN)
        else:
            yield layer + "mlp.gate_proj.weight", (FFN, HIDDEN)
            yield layer + "mlp.up_proj.weight", (FFN, HIDDEN)
            yield layer + "mlp.down_proj.weight", (HIDDEN, FFN)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def bfloat16(values: list[float]) -> bytes:
    """The upper half of each float32, which is what bfloat16 is (rounded towards zero)."""
    wide = struct.pack(f"<{len(values)}f", *values)
    return b"".join(wide[i + 2 : i + 4] for i in range(0, len(wide), 4))


def safetensors(config: dict[str, Any], rng: random.Random) -> bytes:
    """A safetensors file: length of the header (8 bytes), header as JSON, the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    at = 0
    for name, shape in tensors(config):
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        data = bfloat16([1.0] * count if len(shape) == 1 else [rng.gauss(0.0, 0.05) for _ in range(count)])
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in plain}
    for spare, b in enumerate(b for b in range(256) if b not in table):
        table[b] = chr(256 + spare)
    return [table[b] for b in range(256)]


def tokenizer() -> dict[str, Any]:
    """A byte-level BPE without merges: one token a byte, after the special ones."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *byte_alphabet()])}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": t,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, t in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [],
        },
    }


def write(folder: Path, name: str, seed: int) -> None:
    """Write one model; the same name and seed give the same bytes."""
    config = COMMON | MODELS[name]
    rng = random.Random(f"{seed}/{name}")  # noqa: S311  weights of a toy, not a secret
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytes] = {
        "model.safetensors": safetensors(config, rng),
        "config.json": json.dumps(config, indent=2).encode(),
        "generation_config.json": json.dumps({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}).encode(),
        "tokenizer.json": json.dumps(tokenizer()).encode(),
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL[0],
                "eos_token": SPECIAL[1],
                "pad_token": SPECIAL[2],
                "model_max_length": CONTEXT,
                "clean_up_tokenization_spaces": False,
                "chat_template": TEMPLATE,
            },
            indent=2,
        ).encode(),
    }
    for file, data in files.items():
        (folder / file).write_bytes(data)
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    print(f"{name}: {len(files['model.safetensors'])} bytes of weights, sha256 {digest[:16]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--only", choices=sorted(MODELS), action="append", help="make this model only (may be given again)"
    )
    args = parser.parse_args()
    for name in args.only or MODELS:
        write(args.outdir / name, name, args.seed)


if __name__ == "__main__":
    main()
