"""Small tokenizers, chat templates and model folders that hold no more than these."""

import functools
import json

import gguf
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# A model whose turns end with another token than its sequences, and whose template writes the first token.
TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "<turn>{{ m['role'] }}\n{{ m['content'] }}<end_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<turn>", "<end_turn>", "<pad>"]


def byte_level(special, size):
    """A small byte-level tokenizer in which these are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant system the lock is safe"] * 4, trainer)
    return tokenizer


@functools.cache
def backend(bos=False):
    tokenizer = byte_level(SPECIAL, 320)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return tokenizer


def chatml(**kwargs):
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": CHATML} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=backend(), **names)


def turns():
    return PreTrainedTokenizerFast(
        tokenizer_object=backend(bos=True), bos_token="<s>", eos_token="</s>", chat_template=TURNS
    )


def special_ids(tokenizer):
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


SIZE = 320  # tokens of the network


def folder_of(path, config=None, generation=None, **names):
    """A model folder, but for its weights."""
    names = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": TURNS} | names
    PreTrainedTokenizerFast(tokenizer_object=backend(), **names).save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"vocab_size": SIZE} | (config or {})))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def tiny_tokenizer():
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|turn|>": 3, "a": 4, "b": 5}
    words = Tokenizer(models.WordLevel(ids, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|turn|>"],
        chat_template="{{ messages[0]['content'] }}",
    )


def tiny_gguf(path, model="gpt2", pre="smollm"):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<|end|>", "a", "b", "ab", "1", "<|user|>", "11"])
    writer.add_token_types([3, 1, 1, 1, 1, 3, 1])
    writer.add_token_merges(["a b", "1 1"])
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
