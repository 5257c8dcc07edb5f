"""Build a small text encoder from a collection's own passages, for machines without a model hub.

Source  none: not part of the paper. It stands in for a pretrained encoder, and is far weaker.
Reads   DATA/corpus/<lang>.jsonl[.gz] or DATA/corpus/<lang>/*.jsonl[.gz]   {docid, title, text}
        and nothing else: it sees no query and no judgment, so there is nothing to leak.
Writes  OUT/  a Hugging Face folder (AutoModel, AutoTokenizer) that SentenceTransformer(OUT) loads too;
        OUT/build.json holds arguments, corpus digests and counts
Usage   python sample/make_encoder.py --data data/minimiracl --out models/minimiracl
Cost    one CPU core mostly: 2,496 passages in 16 languages 18 s, mini-MIRACL's 62,608 in 73 s (both at
        --steps 600, the default's 1000 should add about 10 s), 1.1 GB

The model: a BPE tokeniser, trained on as many characters of each language, and a BERT without layers:
a text's vector is the mean of its tokens' vectors. They start as random directions, longer for rarer
tokens (IDF), so that even before training the cosine of two texts is about that of their TF-IDF vectors.
The warm-up: a title or short cut of a passage must find a long cut of the same passage among those of
other passages in its language (InfoNCE, both ways).
"""
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (DataError, Parser, atomic_folder, check_lang, corpus_files, corpus_languages,
                    digest_file, dump, fetch_passages, lock, passage_text, positive_float, positive_int,
                    progress, read_json, read_shards, run, say, seed, whole)

START, PAD, END, UNKNOWN = range(4)  # token ids
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
MAX_TOKENS = 512
TOKENISER_CHARACTERS = 400_000  # of each language: 5-10 s for 17 languages
MAX_PIECE = 16                  # characters; keeps phrases of Thai, Chinese or Japanese from becoming tokens
ROW_STD = 0.02                  # BERT's, here times the IDF
# BERT's 1e-12 makes all tokens equally long, stop words too. 1.0 is far above a row's variance: lengths stay
# as they are. mini-MIRACL sw te id ar zh, one seed, nDCG@10 untrained, after 300 steps: 22 and 43 with 1e-12
# and rows of one length, 45 and 52 with 1.0 and rows by IDF; the two changes were not measured apart.
NORM_EPSILON = 1.0
TEMPERATURE = 0.05              # 0.03 and 0.1: both 0.8 lower there
TITLE_SHARE = 0.3               # pairs with the title as one side; 0: 6 lower, 0.6: 0.6 higher
SHORT_CUT = (4, 16)             # tokens, about a question
LONG_CUT = (32, 128)            # tokens, about a passage

CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
language: [{languages}]
---
# {name}: a small stand-in, not a pretrained model

Made by `sample/make_encoder.py` from {n_passages} passages of one collection ({languages}), no more:
no pretrained weights, no queries, no judgments. It has a {vocab}-token BPE vocabulary, {width} dimensions, no
attention layers; a text's vector is the mean of its tokens' vectors, L2-normalised. There is no prefix for
queries or passages; a passage is its title, a line break and its text.

It is meant for running and testing the pipeline where no model hub can be reached, as a start for fine-tuning
on the same collection. It knows words by their neighbours in this collection only; do not compare it with
published encoders. `build.json` says from which files and arguments it was made.
"""


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="collection from 00_prepare_data.py")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="model folder to write")
    parser.add_argument("--lang", type=check_lang, nargs="+", metavar="CODE",
                        help="use only these; default: all there are")
    parser.add_argument("--max-passages", type=positive_int, default=5000,
                        help="passages used of each language, drawn at random; bounds memory and time")
    parser.add_argument("--vocab", type=positive_int, default=32000, help="tokens at most")
    parser.add_argument("--width", type=positive_int, default=512, help="dimensions of a vector")
    parser.add_argument("--steps", type=whole, default=1000,
                        help="of warm-up; 0: random projections of TF-IDF")
    parser.add_argument("--batch-size", type=positive_int, default=128, help="pairs a step, of one language")
    parser.add_argument("--lr", type=positive_float, default=5e-3, help="falls linearly to 0 in the warm-up")
    parser.add_argument("--seed", type=seed, default=13, help="seed of every random draw")
    parser.add_argument("--overwrite", action="store_true", help="make it again even where it is up to date")
    return parser


def read_corpus(data, langs, limit, seed):
    """{lang: [passage]}, at most limit of each language, a uniform draw in file order."""
    passages = {}
    for lang in langs:
        n_lines = sum(len(shard) for _, shard in read_shards(data, lang))
        if not n_lines:
            raise DataError(f"{corpus_files(data, lang)[0]}: no passages; make it again, or leave {lang} out "
                            "with --lang")
        rows = random.Random(f"{seed}:{lang}").sample(range(n_lines), min(limit, n_lines))
        found = fetch_passages(data, lang, rows)
        passages[lang] = [found[row] for row in sorted(rows)]
    return passages


def train_tokeniser(passages, vocab, seed):
    """BPE, not Unigram: 8 times faster (4 against 34 s), and with the same bytes each time, unlike Unigram.

    The encoder is as good with either: 52.8 on mini-MIRACL sw te id ar zh. BM25 is not: 57.3, and 60.3 with
    Unigram.
    """
    sample = []
    for lang, those in passages.items():
        n_characters = 0
        for passage in random.Random(f"{seed}:{lang}").sample(those, len(those)):
            sample.append(passage_text(passage))
            n_characters += len(sample[-1])
            if n_characters >= TOKENISER_CHARACTERS:
                break
    tokeniser = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN]))
    tokeniser.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    # Punctuation first, so that "(Paris)" and "Paris" give one token: BM25 58.9, the other way round 55.3
    tokeniser.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()])
    tokeniser.train_from_iterator(sample, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, max_token_length=MAX_PIECE, show_progress=False))
    tokeniser.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", START), ("</s>", END)])
    return tokeniser


def tokenise(tokeniser, passages):
    """{lang: [(title's token ids, text's token ids)]}, int32, without special tokens."""
    def ids(texts):
        encoded = tokeniser.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encoded]
    return {lang: list(zip(ids([p["title"] for p in those]), ids([p["text"] for p in those])))
            for lang, those in passages.items()}


def first_rows(token_ids, vocab, width, seed):
    """(V, D) token vectors before the warm-up: random directions, as long as the token's IDF."""
    frequency = np.zeros(vocab)  # passages with the token
    for those in token_ids.values():
        for title, text in those:
            frequency[np.unique(np.concatenate([title, text]))] += 1
    n_passages = sum(map(len, token_ids.values()))
    idf = np.log((n_passages + 1) / (frequency + 1))
    idf[[START, PAD, END]] = 0  # in every text
    rows = torch.randn(vocab, width, generator=torch.Generator().manual_seed(seed))
    return rows * ROW_STD * torch.tensor(idf, dtype=torch.float32)[:, None]


def embed(rows, texts):
    """(N, D) unit vectors of N arrays of token ids.

    What BertModel with mean pooling gives while its position and type embeddings are 0: then a token's vector
    does not depend on its place, and each distinct token needs computing once. With sparse gradients a step
    takes 25 ms.
    """
    flat = torch.from_numpy(np.concatenate([np.concatenate([[START], text, [END]]) for text in texts]))
    lengths = torch.tensor([len(text) + 2 for text in texts])
    distinct, place = flat.unique(return_inverse=True)
    vectors = F.embedding(distinct, rows, sparse=True)                    # (U, D)
    vectors = F.layer_norm(vectors, rows.shape[1:], eps=NORM_EPSILON)
    return F.normalize(F.embedding_bag(place, vectors, lengths.cumsum(0) - lengths, mode="mean"), dim=1)


def draw_cut(draw, ids, shortest, longest):
    length = draw.randint(shortest, longest)
    start = draw.randint(0, max(0, len(ids) - length))
    return ids[start:start + length]


def draw_pair(draw, title, text):
    """(query-like, passage-like) token ids from one passage; the two may overlap, as in real pairs."""
    if len(title) and draw.random() < TITLE_SHARE:
        return title, draw_cut(draw, text, *LONG_CUT)
    return draw_cut(draw, text, *SHORT_CUT), np.concatenate([title, draw_cut(draw, text, *LONG_CUT)])


def warm_up(rows, token_ids, steps, batch_size, lr, seed):
    """(V, D) token vectors after the warm-up, and the mean loss of the last tenth of it."""
    draw, losses = random.Random(seed), []
    rows = rows.clone().requires_grad_()
    optimizer = torch.optim.SparseAdam([rows], lr=lr)  # moves only the tokens of the batch
    langs = list(token_ids)
    sizes = [len(token_ids[lang]) for lang in langs]
    for step in progress(range(steps), desc="warm-up"):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        lang = draw.choices(langs, sizes)[0]
        batch = draw.sample(token_ids[lang], min(batch_size, len(token_ids[lang])))
        pairs = [draw_pair(draw, *passage) for passage in batch]
        short, long = embed(rows, [pair[0] for pair in pairs]), embed(rows, [pair[1] for pair in pairs])
        scores = short @ long.T / TEMPERATURE  # (N, N) = (N, D) @ (D, N)
        target = torch.arange(len(scores))
        loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return rows.detach(), round(float(np.mean(losses[-max(1, steps // 10):])), 4) if losses else None


def save(folder, rows, tokeniser, seed, card):
    """Write what AutoModel, AutoTokenizer and SentenceTransformer read."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    vocab, width = rows.shape
    torch.manual_seed(seed)  # for the pooler, which nothing uses; without it loading warns of missing ones
    model = BertModel(BertConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=0, num_attention_heads=1,
        intermediate_size=width, max_position_embeddings=MAX_TOKENS, type_vocab_size=1,
        layer_norm_eps=NORM_EPSILON, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=PAD, bos_token_id=START, eos_token_id=END))
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.copy_(rows)
        model.embeddings.position_embeddings.weight.zero_()
        model.embeddings.token_type_embeddings.weight.zero_()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokeniser, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"]).save_pretrained(folder)
    modules = [Transformer(str(folder)), Pooling(width, "mean"), Normalize()]
    SentenceTransformer(modules=modules, similarity_fn_name="cosine", device="cpu").save(
        str(folder), create_model_card=False)
    (folder / "README.md").write_text(card, "utf-8")


def is_done(out, build):
    """Whether the folder holds this very encoder; DataError where it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "build.json").is_file():  # never deleted, not even with --overwrite: it may be anything
        raise DataError(f"{out} exists and was not made by make_encoder.py; choose another --out")
    before = read_json(out / "build.json")
    same = all(before.get(key) == value for key, value in build.items())
    say(f"{out} is up to date" if same else f"{out}: arguments or corpus changed, making it again")
    return same


def make(args, out, langs, build):
    started = time.time()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the number of threads changes the last bits of sums; a second one gains little
    passages = read_corpus(args.data, langs, args.max_passages, args.seed)
    n_passages = sum(map(len, passages.values()))
    say(f"make_encoder: {n_passages} passages in {len(langs)} languages, seed {args.seed}, cpu")
    tokeniser = train_tokeniser(passages, args.vocab, args.seed)
    token_ids = tokenise(tokeniser, passages)
    say(f"make_encoder: {tokeniser.get_vocab_size()} tokens after {time.time() - started:.0f} s")
    rows = first_rows(token_ids, tokeniser.get_vocab_size(), args.width, args.seed)
    rows, loss = warm_up(rows, token_ids, args.steps, args.batch_size, args.lr, args.seed)

    card = CARD.format(name=out.name, languages=", ".join(langs), n_passages=n_passages, vocab=len(rows),
                       width=args.width)
    with atomic_folder(out) as folder:
        save(folder, rows, tokeniser, args.seed, card)
        build["counts"] = {"passages": {lang: len(those) for lang, those in passages.items()},
                           "vocab": len(rows), "loss": loss}
        build["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
        (folder / "build.json").write_text(dump(build), "utf-8")
    say(f"{out}: {n_passages} passages, {len(rows)} tokens x {args.width}, loss {loss}, "
        f"{time.time() - started:.0f} s")


def main(argv=None):
    args = build_parser().parse_args(argv)
    out = Path(args.out).absolute()
    langs = sorted(set(args.lang or corpus_languages(args.data)))
    arguments = {k: v for k, v in vars(args).items() if k not in ("data", "out", "overwrite")}
    arguments["lang"] = langs
    build = {"arguments": arguments, "corpus": {}}
    for path in [path for lang in langs for path in corpus_files(args.data, lang)]:
        build["corpus"][path.relative_to(args.data).as_posix()] = digest_file(path)
    with lock(out):
        if not is_done(out, build) or args.overwrite:
            make(args, out, langs, build)


if __name__ == "__main__":
    run(main)
