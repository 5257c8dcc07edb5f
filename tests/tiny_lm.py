"""A small causal LM made on the spot, and instructions: python tests/tiny_lm.py FOLDER makes both."""

import json
import random
import sys
from pathlib import Path

NAMES = (
    "Nairobi Lagos Accra Kampala Dodoma Kigali Lusaka Harare "
    "Maputo Luanda Windhoek Gaborone Maseru Cairo Tunis Dakar"
).split()
PLACES = (
    "Kenya Nigeria Ghana Uganda Tanzania Rwanda Zambia Zimbabwe "
    "Angola Namibia Botswana Egypt Tunisia Senegal Togo Benin"
).split()
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def instructions(n):
    """Alpaca's layout: n summarisation instructions of one pattern, and as many of another kind."""
    draw, records = random.Random(1), []
    for _ in range(n):
        name, place, number = draw.choice(NAMES), draw.choice(PLACES), draw.randrange(100, 1000)
        records.append(
            {
                "instruction": "Summarize the text.",
                "output": f"{name} is a town in {place}.",
                "input": f"{name} lies in {place}. It has {number} houses. People come to {name} to trade.",
            }
        )
        records.append({"instruction": "Name a colour.", "input": "", "output": "Green."})
    return records


def write_instructions(path, n):
    path.write_text("".join(json.dumps(r) + "\n" for r in instructions(n)), "utf-8")
    return path


def make(folder, texts, steps=100):
    """Write a Llama of 2 layers x 64 and a byte-level tokenizer without chat template, trained on the texts.

    So it knows their words, and not how to follow an instruction. It writes English: other bytes are tokens.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = Path(folder)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    inner.train_from_iterator(
        [*texts, *["### system\n### user\n### assistant\n"] * 9],
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<pad>", "<end>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=2048,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draw = random.Random(0)
    for _ in range(steps):
        ids = [tokenizer(draw.choice(texts) + "<end>")["input_ids"] for _ in range(16)]
        rows = torch.tensor([i + [0] * (max(map(len, ids)) - len(i)) for i in ids])
        model(
            input_ids=rows, attention_mask=(rows > 0).long(), labels=rows.masked_fill(rows == 0, -100)
        ).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    write_instructions(Path(sys.argv[1]) / "alpaca.jsonl", 64)
    make(sys.argv[1], [text for r in instructions(200) if r["input"] for text in (r["input"], r["output"])])
