"""Fixtures: real models of a few thousand weights and a real byte-level BPE tokenizer, built in memory."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub fails at once instead of retrying
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are faster on one thread, on a busy machine twenty times so

import pytest
import torch

CHAT_TOKENS = ("<|bos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

CORPUS = [
    "def add(left, right):\n    return left + right\n",
    "The word is apple. The other word is pear. What is the word?",
    "for index in range(10):\n    print(index, add(index, 1))\n",
    "Repeat the passage and change every apple to pear.",
]

VOCABULARY = 300


def build_tokenizer(vocab_size: int = VOCABULARY):
    """A byte-level BPE `PreTrainedTokenizerFast` with the chat tokens of the reference target and its template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CHAT_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
    )


def with_other_logits(model):
    """The model, its forward now scaling its logits as no setting says."""
    plain = model.forward

    def forward(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = out.logits * 1.1
        return out

    model.forward = forward
    return model


def build_llama(vocab_size: int = VOCABULARY, layers: int = 2, hidden: int = 32, seed: int = 0, **config):
    """A Llama with random weights, grouped queries and float32, in eval mode.

    Weights are drawn wider than usual, so that next-token distributions are far from uniform and from each other.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 5,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings | config)).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Real byte-level BPE tokenizer with chat tokens and template. Shared: do not change it."""
    return build_tokenizer()


@pytest.fixture
def tiny_target(tiny_tokenizer):
    """Two layers, hidden 32, random weights, the tokenizer's vocabulary."""
    return build_llama(len(tiny_tokenizer), layers=2, seed=0)


@pytest.fixture
def tiny_drafter(tiny_tokenizer):
    """One layer, hidden 16, random weights, the same vocabulary as `tiny_target`."""
    return build_llama(len(tiny_tokenizer), layers=1, hidden=16, seed=1)
