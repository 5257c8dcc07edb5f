"""Model folders made on the spot: one whose cosines can be worked out by hand, and small random ones."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

LIMIT = 100  # max_seq_length of sentence-transformers' files; tokenizer and positions allow 128


def save_tokenizer(folder, words, special=True, **more):
    """A tokenizer that takes words apart at spaces; special adds [CLS] and [SEP]."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
        **more,
    ).save_pretrained(folder)
    return len(vocabulary)


def word_model(folder, words):
    """An encoder whose cosine is that of word counts: words in common / sqrt(product of lengths).

    Word i has +1 in dimension 2i and -1 in 2i + 1: all words are orthogonal, equally long, and of mean 0
    for the LayerNorm.
    """
    size = save_tokenizer(folder, words, special=False)
    model = BertModel(
        BertConfig(
            vocab_size=size,
            hidden_size=2 * size,
            num_hidden_layers=0,
            num_attention_heads=1,
            intermediate_size=8,
            max_position_embeddings=128,
            type_vocab_size=1,
        )
    )
    rows = torch.zeros(size, 2 * size)
    rows[torch.arange(size), 2 * torch.arange(size)] = 1.0
    rows[torch.arange(size), 2 * torch.arange(size) + 1] = -1.0
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.copy_(rows)
        model.embeddings.position_embeddings.weight.zero_()
        model.embeddings.token_type_embeddings.weight.zero_()
    model.save_pretrained(folder)
    return str(folder)


def random_bert(folder, words, seed=0, layers=2, width=32, heads=2, intermediate=64, **tokenizer):
    """A BERT with random weights, without any sentence-transformers file."""
    size = save_tokenizer(folder, words, **tokenizer)
    torch.manual_seed(seed)
    BertModel(
        BertConfig(
            vocab_size=size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            max_position_embeddings=128,
            type_vocab_size=1,
            initializer_range=0.5,
        )
    ).save_pretrained(folder)
    return str(folder)


def sentence_transformers_files(folder, pooling, normalise, prompts=None, legacy=False):
    """Add what sentence-transformers of version 2 (legacy) or 6 keeps beside a model."""
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
    kinds = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    modes = {"pooling_mode": pooling}
    if legacy:
        modes = {f"pooling_mode_{key}": kind == pooling for kind, key in kinds.items()}
    files = {
        "modules.json": [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, kind in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": LIMIT, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": 32} | modes,
        "config_sentence_transformers.json": {"prompts": prompts or {}, "default_prompt_name": None},
    }
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), "utf-8")
    return str(folder)


def sentence_transformer(
    folder,
    words,
    pooling="mean",
    normalise=True,
    dense=0,
    include_prompt=True,
    side="right",
    prompts=None,
    similarity=None,
):
    """The folder of a random BERT as sentence-transformers saves it, with a Dense layer if asked for."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    random_bert(folder, words, padding_side=side)
    modules = [
        Transformer(str(folder), max_seq_length=LIMIT),
        Pooling(32, pooling, include_prompt=include_prompt),
    ]
    if dense:
        modules.append(Dense(32, dense))
    if normalise:
        modules.append(Normalize())
    SentenceTransformer(modules=modules, prompts=prompts, similarity_fn_name=similarity, device="cpu").save(
        str(folder)
    )
    return str(folder)


def random_llama(folder, words):
    """A decoder with random weights that pads on the left and pools its last token."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    size = save_tokenizer(folder, words, padding_side="left")
    torch.manual_seed(0)
    LlamaModel(
        LlamaConfig(
            vocab_size=size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    modules = [Transformer(str(folder), max_seq_length=LIMIT), Pooling(32, "lasttoken"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return str(folder)
