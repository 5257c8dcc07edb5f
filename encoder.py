"""A retriever's encoder: a model folder or hub id, used as its maker uses it, and its vectors on disk (01, 03, 04, 05, 06).

Letters used for shapes: N queries, M passages, D width of an embedding, L tokens.
"""
import ctypes
import functools
import hashlib
import json
import math
import re
import resource
import sys
from pathlib import Path

from common import DataError, atomic, digest_folder, read_json, short_name


class Stored:
    """An array of the cache, open only while it is read: a mapping that stays would keep the whole corpus in memory."""

    def __init__(self, path, n_rows):
        self.path, self.n_rows = Path(path), n_rows

    def __len__(self):
        return self.n_rows

    def load(self):
        """The memory-mapped array; DataError where the file is damaged or not what its name says."""
        import numpy as np
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{self.path}: cannot be read ({error}); delete this file, it will be made again") from None
        if len(array) != self.n_rows:
            raise DataError(f"{self.path}: {len(array)} rows, want {self.n_rows}; delete this file, it will be made again")
        return array

    def save(self, array):
        import numpy as np
        with atomic(self.path) as temporary, open(temporary, "wb") as file:
            np.save(file, array)


# --------------------------------------------------------------------------- encoder

# What a model's maker does, where the model's folder does not say: (in its name, pooling, query and passage prefix, unit
# vectors, between title and text). Sources: the model cards; microsoft/unilm e5/mteb_beir_eval.py; castorini/pyserini
# encode/_auto.py, which joins by a space and takes inner products for mDPR and mContriever.
KNOWN_MODELS = [("multilingual-e5-(small|base|large)(?!-instruct)", "mean", "query: ", "passage: ", True, " "),
                ("bge-m3", "cls", "", "", True, "\n"),
                ("bert-base-multilingual", "cls", "", "", True, "\n"),  # mBERT is no retriever before it is trained
                ("mdpr", "cls", "", "", False, " "),
                ("mcontriever", "mean", "", "", False, " "),
                ("gte-multilingual", "cls", "", "", True, "\n")]
OTHER_MODELS = ("", "mean", "", "", True, "\n")
MIN_TOKENS = 64  # of a batch on a CPU
SETTINGS_HELP = ("override what a dense retriever's folder or the table in common.py says: KEY=VALUE, or MODEL:KEY=VALUE for one of "
                 "them; keys: pooling (mean, cls), query_prefix, passage_prefix, normalise (yes, no), title_join (\\n is a line break), "
                 "query_max_len, passage_max_len")


def read_settings(texts, model):
    """{key: value} for one model from --settings KEY=VALUE or MODEL:KEY=VALUE; DataError for what is not understood."""
    kinds = {"pooling": ("mean", "cls"), "normalise": ("yes", "no"), "query_prefix": str, "passage_prefix": str, "title_join": str,
             "query_max_len": int, "passage_max_len": int}
    settings = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        of, _, key = key.rpartition(":")
        kind = kinds.get(key)
        if not equals or kind is None or (isinstance(kind, tuple) and value not in kind) or (
                kind is int and not (value.isdecimal() and int(value))):
            raise DataError(f"--settings: got {text!r}; want KEY=VALUE, and {', '.join(kinds)} for KEY (see --help)")
        if of in ("", model):
            settings[key] = (value == "yes" if key == "normalise" else int(value) if kind is int
                             else value.replace("\\n", "\n") if key == "title_join" else value)
    return settings


def maker_settings(folder, name):
    """(settings, longest input) of a model: its sentence-transformers files (2.x to 6.x), else KNOWN_MODELS, else OTHER_MODELS."""
    row = next((k for k in KNOWN_MODELS if re.search(k[0], name.lower())), OTHER_MODELS)
    settings = dict(zip(("pooling", "query_prefix", "passage_prefix", "normalise", "title_join"), row[1:]))
    modules = [(m["type"].split(".")[-1], m["path"]) for m in read_json(folder / "modules.json") or []]
    if unknown := [kind for kind, _ in modules if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise DataError(f"{folder}/modules.json: {unknown[0]} is not supported; want Transformer, Pooling and Normalize")
    pooling = read_json(folder / dict(modules).get("Pooling", "1_Pooling") / "config.json")
    if modules:
        settings["normalise"] = "Normalize" in dict(modules)
    if pooling:
        old = [key.split("_")[2] for key, on in pooling.items() if key.startswith("pooling_mode_") and on]
        settings["pooling"] = pooling.get("pooling_mode") or "+".join(old) or "mean"
        if settings["pooling"] not in ("mean", "cls"):
            raise DataError(f"{folder}: pooling {settings['pooling']!r} is not supported; want mean or cls, or override it with "
                            "--settings pooling=...")
        if pooling.get("include_prompt") is False:
            raise DataError(f"{folder}: pooling without the prompt is not supported; want include_prompt true")
    files = read_json(folder / "config_sentence_transformers.json")
    prompts = files.get("prompts") or {}
    for key, names in (("query_prefix", ["query"]), ("passage_prefix", ["document", "passage", "corpus"])):
        names = [*names, files.get("default_prompt_name")]
        settings[key] = next((prompts[n] for n in names if prompts.get(n)), settings[key])
    return settings, read_json(folder / "sentence_bert_config.json").get("max_seq_length")


def pick_device(name):
    import torch
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def model_folder(name):
    """A local folder for a folder or a hub id (downloaded once by huggingface_hub, with HF_TOKEN if set)."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        files = [f for f in ("*.json", "*.txt", "*.model", "*.safetensors", "1_Pooling/*")]
        folder = Path(snapshot_download(name, allow_patterns=files))
        if not list(folder.glob("*.safetensors")):  # older repositories; transformers reads it with weights_only
            folder = Path(snapshot_download(name, allow_patterns=files + ["pytorch_model.bin"]))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(f"{name}: neither a folder nor a model that can be fetched from the hub "
                        f"({type(error).__name__}); check the name, HF_TOKEN and the network") from None


class Encoder:
    """A bi-encoder in Hugging Face layout, used as its maker uses it (maker_settings) unless --settings says otherwise.

    Tokenizer and weights are loaded when something must be encoded: a run that finds all vectors in the cache needs neither.
    """

    def __init__(self, name, device="auto", query_max_len=64, passage_max_len=256, settings=()):
        self.name, self.device = short_name(name), pick_device(device)
        self.folder = folder = model_folder(name)
        given = read_settings(settings, self.name)
        maker, limit = maker_settings(folder, self.name)
        used = maker | given
        self.pooling, self.normalise, self.title_join = used["pooling"], used["normalise"], used["title_join"]
        self.prefix = {"query": used["query_prefix"], "passage": used["passage_prefix"]}
        find_tokenizer(folder)
        limits = [n for n in (limit, read_json(folder / "tokenizer_config.json").get("model_max_length"), max_positions(folder)) if n]
        self.max_len = {"query": given.get("query_max_len", min([query_max_len, *limits])),
                        "passage": given.get("passage_max_len", min([passage_max_len, *limits]))}

    @functools.cached_property
    def tokenizer(self):
        return load_tokenizer(self.folder)

    @functools.cached_property
    def model(self):
        import torch
        from transformers import AutoModel
        from transformers.utils import logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        keep_blocks(64)
        try:
            model = AutoModel.from_pretrained(self.folder, dtype=torch.float32).to(self.device).eval()
        except Exception as error:  # safetensors and the model classes raise their own kinds
            raise DataError(f"{self.folder}: no encoder in Hugging Face layout ({str(error)[:120]}); "
                            "check --retrievers or --encoder") from None
        if len(self.tokenizer) > model.get_input_embeddings().num_embeddings:
            raise DataError(f"{self.folder}: the tokenizer has more tokens than the model; the folder's files do not belong together")
        return model

    def settings(self):
        """What decides a vector besides weights and tokenizer."""
        return {"pooling": self.pooling, "normalise": self.normalise, "prefix": self.prefix, "title_join": self.title_join,
                "max_len": self.max_len}

    @functools.cached_property
    def digest(self):
        """Of weights and tokenizer: two models never share cached vectors, renamed ones do."""
        return digest_folder(self.folder)

    def fingerprint(self, kind):
        """Digest of all that decides a vector of this kind: another length or prefix of queries leaves the passages' alone."""
        used = [self.digest, self.pooling, self.normalise, self.title_join, self.prefix[kind], self.max_len[kind]]
        return hashlib.blake2b(json.dumps(used).encode()).hexdigest()[:24]

    def passage_text(self, passage):
        """What this encoder reads of a passage."""
        return f"{passage['title']}{self.title_join}{passage['text']}" if passage.get("title") else passage["text"]

    def tokenize(self, texts, kind):
        """Token ids of each text with its prefix, cut at the kind's maximum length (kind: query or passage)."""
        return self.tokenizer([self.prefix[kind] + text for text in texts], truncation=True, max_length=self.max_len[kind],
                              return_attention_mask=False, return_token_type_ids=False)["input_ids"]

    def forward(self, token_ids, normalise=True):
        """(N, D) vectors for N lists of token ids, as a float32 tensor on the device."""
        import torch
        width = max(map(len, token_ids))
        ids = torch.full((len(token_ids), width), self.tokenizer.pad_token_id or 0)                         # (N, L)
        mask = torch.zeros_like(ids)                                                                        # (N, L)
        for row, tokens in enumerate(token_ids):
            ids[row, :len(tokens)], mask[row, :len(tokens)] = torch.as_tensor(tokens), 1
        ids, mask = ids.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.startswith("cuda")):
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()               # (N, L, D)
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)             # (N, D)
        return torch.nn.functional.normalize(pooled, dim=-1) if normalise else pooled

    def save(self, folder):
        """Write the Hugging Face folder that sentence-transformers (2.x to 6.x) loads with the same pooling and prefixes."""
        folder = Path(folder)
        self.model.save_pretrained(folder)  # safetensors
        self.tokenizer.save_pretrained(folder)
        files = {"modules.json": [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
                                  for i, (path, name) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling"),
                                                                    ("2_Normalize", "Normalize")))],
                 "sentence_bert_config.json": {"max_seq_length": self.max_len["passage"], "do_lower_case": False},
                 "config_sentence_transformers.json": {
                     "prompts": {"query": self.prefix["query"], "document": self.prefix["passage"]},
                     "default_prompt_name": None, "similarity_fn_name": "cosine"},
                 "1_Pooling/config.json": {"word_embedding_dimension": self.model.config.hidden_size,
                                           "pooling_mode_cls_token": self.pooling == "cls",
                                           "pooling_mode_mean_tokens": self.pooling == "mean"},
                 "2_Normalize/config.json": {}}
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=1) + "\n", "utf-8")

    def encode(self, texts, kind):
        """(N, D) float32 vectors, of unit length where the settings say so.

        A batch on a CPU holds texts of one length in tokens, MIN_TOKENS at least: nothing is padding, and a text's vector
        does not depend on what it shares a batch with, to the last bit, so neither on shards nor processes (measured with
        oneDNN, 1 and 2 threads, 32 to 384 wide; no library promises it). A GPU wants larger batches: there they hold texts of like length, and vectors differ by about 1e-3.
        """
        import numpy as np
        import torch
        cuda = self.device.startswith("cuda")
        budget = 65_536 if cuda else 8_192  # padded tokens a batch
        token_ids = [np.array(ids, np.int32) for at in range(0, len(texts), 1024)
                     for ids in self.tokenize(texts[at:at + 1024], kind)]
        order = sorted(range(len(texts)), key=lambda i: len(token_ids[i]))
        vectors, start = np.zeros((len(texts), self.model.config.hidden_size), np.float32), 0
        enough = resident_mb() + 512
        with torch.inference_mode():
            while start < len(order):
                end, shortest = start + 1, len(token_ids[order[start]])
                while end < len(order) and len(token_ids[order[end]]) * (end + 1 - start) <= budget and (
                        cuda or len(token_ids[order[end]]) == shortest):
                    end += 1
                batch = order[start:end]
                rows = [token_ids[i] for i in batch]
                if not cuda:  # products of a few rows take another path, with other rounding
                    rows += rows[-1:] * max(0, math.ceil(MIN_TOKENS / shortest) - len(rows))
                vectors[batch] = self.forward(rows, self.normalise)[:len(batch)].cpu().numpy()
                start = end
                if resident_mb() > enough:  # each length leaves blocks of another size behind
                    hand_back()
        hand_back()
        return vectors

    def stored(self, kind, key, n_rows, cache):
        """Where the cache has the vectors with this key, or will have them."""
        return Stored(Path(cache) / "embeddings" / self.fingerprint(kind) / f"{kind}-{key}.npy", n_rows)

    def encode_cached(self, texts, kind, cache):
        """(N, D) fp16 vectors, memory-mapped from the cache."""
        import numpy as np
        stored = self.stored(kind, hashlib.blake2b("\0".join(texts).encode()).hexdigest()[:32], len(texts), cache)
        if not stored.path.is_file():
            stored.save(self.encode(texts, kind).astype(np.float16))
        return stored.load()


def keep_blocks(mebibytes):
    """Let glibc keep freed blocks up to this size, not hand them back: 10-60% of the time goes to page faults otherwise."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, mebibytes << 20)              # M_MMAP_THRESHOLD
        libc.mallopt(-1, max(64, mebibytes) << 20)     # M_TRIM_THRESHOLD


def hand_back():
    """Give the system all freed memory now."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def resident_mb():
    """Memory of this process now, 0 where Linux's /proc is not there."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() >> 20 if statm.exists() else 0


def find_tokenizer(folder):
    files = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
    if not any((folder / name).is_file() for name in files):
        raise DataError(f"{folder}: no tokenizer (none of {', '.join(files)}); fetch the model again, or copy the tokenizer of the "
                        "model it was made from into the folder")


def load_tokenizer(folder):
    """The tokenizer of a model folder; DataError where there is none."""
    from transformers import AutoTokenizer
    find_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exceptions for a damaged file
        raise DataError(f"{folder}: the tokenizer cannot be loaded ({str(error)[:120]}); fetch the model again") from None


def max_positions(folder):
    """The longest input that the position embeddings of a model allow, or None."""
    config = read_json(folder / "config.json")
    n = config.get("max_position_embeddings")
    if n and any(kind in config.get("model_type", "") for kind in ("roberta", "camembert")):
        n -= 1 + config.get("pad_token_id", 1)  # these count positions from the padding id on
    return n
