"""A retriever's encoder: a SentenceTransformer, fed with batches of like token length (01, 03, 04, 05, 06).

sentence-transformers loads, pools, normalises and saves, so vectors are those that everybody gets. Here stand
the batches, the join of title and text, vectors on disk, and what a folder without its files is taken for.
Letters used for shapes: N texts, D width of a vector, L tokens.
"""
import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import os
import re
import sys
import time
from pathlib import Path

import numpy as np

from common import DataError, atomic, digest_folder, positive_int, progress, read_json, say, short_name

# What makers do and their folders do not always say. Sources: the model cards; microsoft/unilm
# e5/mteb_beir_eval.py; castorini/pyserini encode/_auto.py for mDPR and mContriever.
E5 = {"query_prefix": "query: ", "passage_prefix": "passage: ", "title_join": " "}
MAKERS = {"multilingual-e5-(small|base|large)(?!-instruct)": E5,
          "bge-m3|bert-base-multilingual": {"pooling": "cls"},  # mBERT is no retriever before it is trained
          "mdpr": {"pooling": "cls", "similarity": "dot", "title_join": " "},
          "mcontriever": {"similarity": "dot", "title_join": " "}}
OTHERS = {"query_prefix": "", "passage_prefix": "", "similarity": "cosine", "title_join": "\n"}
SETTINGS = {"pooling": "mean|cls|lasttoken", "normalise": "yes|no", "query_prefix": ".*",
            "passage_prefix": ".*", "title_join": ".*", "query_max_len": "[1-9][0-9]*",
            "passage_max_len": "[1-9][0-9]*"}
# Tokens of a batch, padding included. On two cores 8,192 took 14% more CPU time than 4,096 (12 layers x 384).
CPU_TOKENS, GPU_TOKENS = 4_096, 65_536
SAVE_S = 60  # seconds of encoding that a kill may cost


def encoder_flags(parser):
    """The flags of every stage that encodes."""
    parser.add_argument("--query-max-len", type=positive_int, default=64,
                        help="tokens of a query that are read (Sec. 4.1)")
    parser.add_argument("--passage-max-len", type=positive_int, default=256,
                        help="tokens of a passage that are read (Sec. 4.1)")
    parser.add_argument("--settings", nargs="+", default=[], metavar="[MODEL:]KEY=VALUE",
                        help="override what a model's folder or the table in encoder.py says: pooling (mean, "
                             "cls, lasttoken), normalise (yes, no), query_prefix, passage_prefix, title_join "
                             "(\\n is a line break), query_max_len, passage_max_len")
    parser.add_argument("--dtype", choices=["fp32", "bf16"],
                        help="of products, over fp32 weights; default: fp32 on a CPU, bf16 on CUDA")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def from_flags(name, args):
    return Encoder(name, args.device, args.query_max_len, args.passage_max_len, args.settings, args.dtype)


def keep_blocks():
    """Let glibc keep freed blocks up to 64 MB: a third of a small encoder's CPU time went to page faults."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 64 << 20)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD


# --------------------------------------------------------------------------- finding and loading a model

def pick_device(name):
    """cpu, or this process's CUDA device."""
    import torch
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


def model_folder(name):
    """A local folder for a folder or a hub id (downloaded once by huggingface_hub, with HF_TOKEN if set)."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    files = ["*.json", "*.txt", "*.model", "*.safetensors", "*_Dense/*.bin"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=files, ignore_patterns=["onnx/*", "openvino/*"]))
        if not list(folder.glob("*.safetensors")):  # older repositories
            folder = Path(snapshot_download(name, allow_patterns="pytorch_model*.bin"))
        return folder
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        raise DataError(f"{name}: neither a folder nor a model that can be fetched from the hub "
                        f"({type(error).__name__}); check the name, HF_TOKEN and the network") from None


def read_settings(texts, model):
    """{key: value} for one model, of --settings KEY=VALUE or MODEL:KEY=VALUE; DataError for anything else."""
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        of, _, key = key.rpartition(":")
        if not equals or key not in SETTINGS or not re.fullmatch(SETTINGS[key], value, re.DOTALL):
            raise DataError(f"--settings: got {text!r}; want KEY=VALUE as --help explains, with KEY one of "
                            + ", ".join(SETTINGS))
        if of in ("", model):
            settings[key] = value
    if "normalise" in settings:
        settings["similarity"] = "cosine" if settings["normalise"] == "yes" else "dot"
    if "title_join" in settings:
        settings["title_join"] = settings["title_join"].replace("\\n", "\n")
    return settings


def maker_settings(folder, name):
    """(what a folder's own files say, what is assumed where they do not); keys as in MAKERS."""
    files = read_json(folder / "config_sentence_transformers.json")
    prompts = files.get("prompts") or {}
    passage = prompts.get("document") or prompts.get("passage") or prompts.get("corpus", "")
    said = {"query_prefix": prompts.get("query"), "passage_prefix": passage,
            "similarity": files.get("similarity_fn_name"), "title_join": files.get("title_join")}
    if "title_join" not in files:  # not from save(): an empty prompt may be one that nobody thought of
        said = {key: value for key, value in said.items() if value}
    assumed = next((row for pattern, row in MAKERS.items() if re.search(pattern, name.lower())), {})
    if (folder / "modules.json").is_file():
        said["pooling"] = "as in the folder"
    else:
        assumed = {"pooling": "mean"} | OTHERS | assumed
    return said, {key: value for key, value in assumed.items() if key not in said}


def load_tokenizer(folder):
    """The tokenizer of a model folder, without the model; DataError where there is none."""
    from transformers import AutoTokenizer
    try:
        return check_tokenizer(AutoTokenizer.from_pretrained(folder))
    except Exception as error:  # the tokenizers library raises bare Exceptions for a damaged file
        raise DataError(f"{folder}: no tokenizer to be loaded ({str(error)[:120]}); fetch it again") from None


def check_tokenizer(tokenizer):
    """The tokenizer; ValueError where it has no words, as transformers makes it if files are missing."""
    if len(tokenizer) - len(set(tokenizer.all_special_ids)) < 3:
        raise ValueError("no tokenizer: it has special tokens only, its files are missing")
    return tokenizer


def load_model(folder, device):
    """The SentenceTransformer of a folder in fp32; DataError where what it needs is missing or damaged."""
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging
    torch.set_float32_matmul_precision("highest")  # "medium" is bf16 on some CPUs, whoever asked for it
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    report, loader = [], logging.getLogger("transformers.modeling_utils")
    loader.setLevel(logging.WARNING)

    def keep(record):  # which weights are missing is only logged; False: not printed
        report.append(record.getMessage())
        return False

    loader.addFilter(keep)
    try:
        for name in ("config.json", "tokenizer_config.json"):
            if "auto_map" in read_json(folder / name):
                raise ValueError(f"{name} names a custom class (auto_map), code of a model folder is not run")
        model = SentenceTransformer(str(folder), device=device, local_files_only=True,
                                    model_kwargs={"dtype": torch.float32})
        n_tokens = len(check_tokenizer(model.tokenizer))
        n_rows = model[0].model.get_input_embeddings().num_embeddings
        if n_tokens > n_rows:
            raise ValueError(f"its tokenizer has {n_tokens} tokens, its model {n_rows}: files of two models")
        missing = set(re.findall(r"^(\S.*?) *\| \S*MISSING", "\n".join(report), re.MULTILINE))
        if "pooler" not in str(model[0].modality_config):
            missing = {name for name in missing if "pooler." not in name}  # nothing reads it
        if missing:
            raise ValueError(f"{len(missing)} weights are missing, {min(missing)} first; renamed?")
        return model.eval()
    except Exception as error:  # safetensors, tokenizers and the model classes raise their own kinds
        raise DataError(f"{folder}: no encoder to be used ({str(error)[:200]}); fetch or save the model "
                        "again, or name another") from None
    finally:
        loader.removeFilter(keep)


def load_rows(path, n_rows):
    """A memory-mapped array; DataError where the file is damaged or has another number of rows."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if len(array) != n_rows:
            raise ValueError(f"{len(array)} rows, want {n_rows}")
        return array
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it to have it made again") from None


def save_rows(path, array):
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


# --------------------------------------------------------------------------- the encoder

class Encoder:
    """A bi-encoder as its maker uses it (maker_settings), unless --settings says otherwise.

    The model is loaded when it must encode. dtype bf16 is autocast over fp32 weights, for encoding and for
    training. Where similarity, which may be set, is "cosine" and not "dot", vectors are of unit length: their
    inner products are the model's similarity.
    """

    def __init__(self, name, device="auto", query_max_len=64, passage_max_len=256, settings=(), dtype=None):
        self.name, self.folder, self.device = short_name(name), model_folder(name), pick_device(device)
        self.dtype = dtype or ("fp32" if self.device == "cpu" else "bf16")
        self.given = read_settings(settings, self.name)
        said, assumed = maker_settings(self.folder, self.name)
        self.assumed = {key: value for key, value in assumed.items() if key not in self.given}
        if self.assumed and os.environ.get("RANK", "0") == "0":
            say(f"{self.name}: not in sentence-transformers' files in its folder, so assumed by name: "
                + json.dumps(self.assumed)[1:-1])
        used = OTHERS | said | self.assumed | self.given
        self.pooling, self.similarity = used["pooling"], used["similarity"]
        self.title_join = used["title_join"]
        self.prefix = {"query": used["query_prefix"], "passage": used["passage_prefix"]}
        self.asked = {"query": query_max_len, "passage": passage_max_len}
        self.n_read, self.n_cut = {"query": 0, "passage": 0}, {"query": 0, "passage": 0}
        keep_blocks()
        if self.similarity not in ("cosine", "dot"):
            raise DataError(f"{self.folder}: similarity {self.similarity!r}, want cosine or dot; choose "
                            "with --settings normalise=yes or normalise=no")

    @functools.cached_property
    def model(self):
        """The SentenceTransformer, with what --settings and MAKERS change."""
        from sentence_transformers.base.modules import Normalize
        from sentence_transformers.sentence_transformer.modules import Pooling
        model = load_model(self.folder, self.device)
        if self.given.get("normalise") == "no" and isinstance(model[-1], Normalize):
            del model[-1]
        for module in model:
            if isinstance(module, Pooling) and "pooling" in self.assumed | self.given:
                module.pooling_mode = self.pooling
        model.prompts |= {"query": self.prefix["query"], "document": self.prefix["passage"]}
        model.similarity_fn_name = self.similarity
        positions = getattr(model.config, "max_position_embeddings", -1)
        if re.search("roberta|camembert|mpnet", model.config.model_type):
            positions -= 1 + model.config.pad_token_id  # these count positions from the padding id on
        if positions > 0:
            model.max_seq_length = min(positions, model.max_seq_length)
        return model

    @functools.cached_property
    def tokenizer(self):
        return self.model.tokenizer

    @functools.cached_property
    def max_len(self):
        """Tokens that are read of a query and of a passage: as asked, and at most the maker's limit."""
        limits = {kind: min(n, self.model.max_seq_length) for kind, n in self.asked.items()}
        return {kind: int(self.given.get(f"{kind}_max_len", limit)) for kind, limit in limits.items()}

    @functools.cached_property
    def prompt_length(self):
        """Of each kind in tokens, for a pooling that leaves the prompt out."""
        return {kind: self.model.preprocess(["."], prompt=prefix).get("prompt_length", 0)
                for kind, prefix in self.prefix.items()}

    @functools.cached_property
    def digest(self):
        """Of all files: two models never share cached vectors, renamed ones do."""
        return digest_folder(self.folder)

    def fingerprint(self, kind):
        """Digest of all that decides a vector: the queries' length or prefix leaves passages alone."""
        used = [self.digest, self.pooling, self.similarity, self.given.get("normalise"), self.title_join,
                self.prefix[kind], self.asked[kind], self.given.get(f"{kind}_max_len"), self.dtype]
        return hashlib.blake2b(json.dumps(used).encode()).hexdigest()[:24]

    def settings(self):
        """All that decides a vector besides the folder's files, and what of it was assumed or given."""
        return {"digest": self.digest, "modules": [repr(module) for module in self.model][1:],
                "similarity": self.similarity, "prefix": self.prefix, "title_join": self.title_join,
                "max_len": self.max_len, "dtype": self.dtype, "assumed": self.assumed, "given": self.given}

    @property
    def default_temperature(self):
        """Of the contrastive loss: E5's makers' where their prompt is used, else BGE-M3's."""
        return 0.01 if self.prefix["query"] == E5["query_prefix"] else 0.02

    def passage_text(self, passage):
        """What this encoder reads of a passage."""
        title = passage.get("title")
        return f"{title}{self.title_join}{passage['text']}" if title else passage["text"]

    def tokenize(self, texts, kind):
        """Token ids of each text with its prompt, cut at the limit of its kind and counted."""
        encoded = self.tokenizer([self.prefix[kind] + text for text in texts], truncation=True,
                                 max_length=self.max_len[kind], return_attention_mask=False,
                                 return_token_type_ids=False)
        self.n_read[kind] += len(texts)
        self.n_cut[kind] += sum(bool(encoding.overflowing) for encoding in encoded.encodings or [])
        return encoded["input_ids"]

    def report_cut(self):
        """Say how many texts were longer than their limit."""
        for kind, n in self.n_cut.items():
            if n:
                say(f"{self.name}: {n} of {self.n_read[kind]} texts ({kind}) were cut at "
                    f"{self.max_len[kind]} tokens, by --{kind}-max-len or the model's own limit")

    def forward(self, token_ids, kind):
        """(N, D) float32 vectors of N lists of token ids, through the model's own modules, on the device."""
        import torch
        features = self.tokenizer.pad({"input_ids": token_ids}, return_attention_mask=True,
                                      return_tensors="pt")
        features = {name: tensor.to(self.device) for name, tensor in features.items()}         # (N, L)
        features["prompt_length"] = self.prompt_length[kind]
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.dtype == "bf16"):
            task = "query" if kind == "query" else "document"
            vectors = self.model(features, task=task)["sentence_embedding"].float()            # (N, D)
        return torch.nn.functional.normalize(vectors, dim=1) if self.similarity == "cosine" else vectors

    def fill(self, vectors, texts, kind, bar=None):
        """Encode the rows of vectors (N, D) that are NaN, longest texts first; yields after each batch.

        The batches depend on nothing but the texts, so that an array that was half done ends the same.
        """
        import torch
        token_ids = []
        for at in range(0, len(texts), 1024):
            token_ids += [np.array(ids, np.int32) for ids in self.tokenize(texts[at:at + 1024], kind)]
        order = np.argsort([-len(ids) for ids in token_ids], kind="stable")
        budget = CPU_TOKENS if self.device == "cpu" else GPU_TOKENS
        own = progress(total=len(texts), desc=f"encode with {self.name}", unit="text", delay=5, leave=False)
        with contextlib.closing(own):
            while len(order):
                size = max(1, budget // max(1, len(token_ids[order[0]])))
                batch, order = order[:size], order[size:]
                if np.isnan(vectors[batch]).any():
                    with torch.inference_mode():
                        vectors[batch] = self.forward([token_ids[i] for i in batch], kind).cpu().numpy()
                for row in batch[~np.isfinite(vectors[batch]).all(1)]:
                    raise DataError(f"{self.name}: the vector of {texts[row][:60]!r} is not finite (NaN or "
                                    f"infinite as {vectors.dtype}); the model is damaged, take another")
                (bar or own).update(len(batch))
                yield

    def encode(self, texts, kind):
        """(N, D) float32 vectors."""
        vectors = np.full((len(texts), self.model.get_embedding_dimension()), np.nan, np.float32)
        for _ in self.fill(vectors, texts, kind):
            pass
        return vectors

    def encode_file(self, path, texts, kind, bar=None):
        """Make the (N, D) fp16 .npy at path if it is not there; after a kill from where it was saved last."""
        partial = Path(f"{path}.partial")
        if Path(path).is_file():
            return
        vectors = np.full((len(texts), self.model.get_embedding_dimension()), np.nan, np.float16)
        if partial.is_file():
            vectors[:] = load_rows(partial, len(texts))
        saved = time.monotonic()
        for _ in self.fill(vectors, texts, kind, bar):
            if time.monotonic() - saved > SAVE_S:
                save_rows(partial, vectors)
                saved = time.monotonic()
        save_rows(path, vectors)
        partial.unlink(missing_ok=True)

    def encode_cached(self, texts, kind, cache):
        """(N, D) fp16 vectors, memory-mapped from the cache."""
        key = hashlib.blake2b("\0".join(texts).encode()).hexdigest()[:32]
        path = Path(cache) / "embeddings" / self.fingerprint(kind) / f"{kind}-{key}.npy"
        self.encode_file(path, texts, kind)
        return load_rows(path, len(texts))

    def save(self, folder):
        """Write a folder that SentenceTransformer loads to the same unit vectors, with the maker's limit."""
        from sentence_transformers.base.modules import Normalize
        if not isinstance(self.model[-1], Normalize):
            self.model.append(Normalize())
        self.model.similarity_fn_name = "cosine"
        if self.tokenizer.is_fast:  # else its file keeps the length of the last call
            self.tokenizer.backend_tokenizer.no_truncation()
            self.tokenizer.backend_tokenizer.no_padding()
        self.model.save(str(folder), create_model_card=False)
        path = Path(folder) / "config_sentence_transformers.json"
        files = read_json(path) | {"title_join": self.title_join}
        path.write_text(json.dumps(files, ensure_ascii=False, indent=2) + "\n", "utf-8")
