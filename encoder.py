"""A retriever's encoder: a SentenceTransformer, fed with batches of like token length (01, 03, 04, 05, 06).

sentence-transformers loads, pools, normalises and saves, so vectors are those that everybody gets. Here stand
the batches, the join of title and text, vectors on disk, and what a folder without its files is taken for.
Letters used for shapes: N texts, D width of a vector, L tokens.
"""
import contextlib
import ctypes
import hashlib
import json
import logging
import math
import os
import re
import sys
from functools import cached_property
from pathlib import Path

import numpy as np

from common import (DataError, atomic, batched, digest_folder, lock, passage_text, positive_int, progress,
                    read_json, say, short_name)

# What makers do and their folders do not always say. Sources: the model cards; microsoft/unilm
# e5/mteb_beir_eval.py; castorini/pyserini encode/_auto.py for mDPR and mContriever.
E5 = {"query_prefix": "query: ", "passage_prefix": "passage: ", "title_join": " "}
MAKERS = {"multilingual-e5-(small|base|large)(?!-instruct)": E5,
          "bge-m3|bert-base-multilingual": {"pooling": "cls"},  # mBERT is no retriever before it is trained
          "mdpr": {"pooling": "cls", "similarity": "dot", "title_join": " "},
          "mcontriever": {"similarity": "dot", "title_join": " "}}
OTHERS = {"pooling": "mean", "similarity": "cosine", "query_prefix": "", "passage_prefix": "",
          "title_join": "\n"}
SETTINGS = {"pooling": "mean|cls|lasttoken", "normalise": "yes|no", "title_join": ".*", "query_prefix": ".*",
            "passage_prefix": ".*", "query_max_len": "[1-9][0-9]{,5}", "passage_max_len": "[1-9][0-9]{,5}"}
# Tokens of a batch, padding included. On two cores 4,096 took 8% (6 layers x 384) and 18% (12 layers) more
# CPU time than 2,048, and up to 500 MB more
CPU_TOKENS, GPU_TOKENS = 2_048, 65_536
PASSAGE_PROMPTS = ("document", "passage", "corpus")  # their names, as sentence-transformers knows them
TASKS = {"query": "query", "passage": "document"}  # what sentence-transformers calls them


def encoder_flags(parser):
    """The flags of every stage that encodes."""
    parser.add_argument("--query-max-len", type=positive_int, default=64, help="tokens read (Sec. 4.1)")
    parser.add_argument("--passage-max-len", type=positive_int, default=256, help="tokens read (Sec. 4.1)")
    parser.add_argument("--settings", nargs="+", action="extend", default=[], metavar="[MODEL:]KEY=VALUE",
                        help="other than a model's maker: pooling (mean, cls, lasttoken), query_prefix, "
                             "passage_prefix, title_join (\\n is a line break), normalise (yes, no), "
                             "query_max_len, passage_max_len")
    parser.add_argument("--dtype", choices=["fp32", "bf16"],
                        help="of products, over fp32 weights; default: fp32 on a CPU, bf16 on CUDA")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def flags_given(args, models):
    """The arguments of Encoder that are flags; DataError where --settings are none, or of no model here."""
    models = [model for model in models if model != "bm25"]
    names = list(map(short_name, models))
    for of, _, _ in read_settings(args.settings):
        if of not in ["", *models, *names]:
            raise DataError(f"--settings: {of!r} is not a model here; want one of {' '.join(names)}")
    flags = ("device", "query_max_len", "passage_max_len", "settings", "dtype")
    return {flag: getattr(args, flag) for flag in flags}


def from_flags(name, args):
    return Encoder(name, **flags_given(args, [name]))


def keep_blocks(size):
    """Let glibc keep freed blocks up to size: page faults took a third of the time, of training half."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, size)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, size)  # M_TRIM_THRESHOLD


def pick_device(name):
    """cpu, or this process's CUDA device."""
    if name == "auto":
        import torch
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


def has_bf16(device):
    """Whether a device computes bf16 itself: a T4, or a CPU with neither AMX nor avx512_bf16, does not."""
    import torch
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


@contextlib.contextmanager
def faster(on_cpu):
    """A context in which a CPU computes fp32 linear layers, and dropout, faster; elsewhere nothing changes.

    torch gives fp32 products to MKL, which is half as fast as oneDNN on AMD (on Intel it is the faster one),
    and draws dropout's numbers one after the other. Values are equal to rounding; dropout takes 16 random
    bits an element.
    """
    import torch
    from torch.nn import functional
    before = functional.linear, functional.dropout

    def product(a, b, bias=None):
        """(N, M) = (N, K) @ (M, K).T + (M,)"""
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(x, weight)
            return product(x, weight, bias)

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            x_t, grad_t = x.t(), grad.t()                                                # (K, N), (M, N)
            wide = len(x_t) >= len(grad_t)
            of_weight = product(grad_t, x_t) if wide else product(x_t, grad_t).t()       # (M, K)
            return product(grad, weight.t()), of_weight, grad_t.sum(1) if ctx.needs_input_grad[2] else None

    def linear(x, weight, bias=None):
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return before[0](x, weight, bias)
        flat = Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
        return flat.view(*x.shape[:-1], len(weight))  # a view that some models change in place

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training or not 0 < p < 1:
            return before[1](x, p, training, inplace)
        seed = int(torch.randint(2**63 - 1, ()))
        bits = np.random.SFC64(seed).random_raw(x.numel() // 4 + 1).view(np.int16)[:x.numel()]
        kept = torch.from_numpy(bits) >= int(p * 2**16) - 2**15
        kept = kept.view(torch.uint8).to(x.dtype)  # from bool it would take 8 times as long
        return x * kept.div_(1 - p).view(x.shape)

    try:
        if on_cpu:
            functional.dropout = dropout
        on_intel = "Intel" in torch.cpu.get_capabilities().get("cpu_name", "")
        if on_cpu and torch.backends.mkldnn.is_available() and not on_intel:
            functional.linear = linear
        yield
    finally:
        functional.linear, functional.dropout = before


def model_folder(name):
    """A local folder for a folder or a hub id (downloaded once by huggingface_hub, with HF_TOKEN if set)."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    files = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "[0-9]*_*/*.bin"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=files, ignore_patterns=["onnx/*", "openvino/*"]))
        if not list(folder.glob("*.safetensors")):  # older repositories; others have both, which is gigabytes
            snapshot_download(name, allow_patterns="pytorch_model*.bin")
        return folder
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        raise DataError(f"{name}: neither a folder nor a model that can be fetched from the hub "
                        f"({type(error).__name__}); check the name, HF_TOKEN and the network") from None


def model_digests(models):
    """{name: digest of its files} of models, for Output: one that was changed in place is another one."""
    models = [model for model in models if model not in (None, "bm25")]
    return {f"{number} {short_name(model)}": digest_folder(model_folder(model))
            for number, model in enumerate(models)}


def read_settings(texts):
    """[(model or "", key, value)] of --settings KEY=VALUE or MODEL:KEY=VALUE; or DataError."""
    settings = []
    for text in texts:
        name, equals, value = text.partition("=")
        of, _, key = name.rpartition(":")
        if not equals or key not in SETTINGS or not re.fullmatch(SETTINGS[key], value, re.DOTALL):
            raise DataError(f"--settings: got {text!r}; want KEY=VALUE as --help explains, with KEY one of "
                            + ", ".join(SETTINGS))
        settings.append((of, key, value.replace("\\n", "\n")))
    return settings


def maker_settings(folder, name):
    """(what a folder's files say, what its name lets assume), keys as in OTHERS, and prompts of no use."""
    files = read_json(folder / "config_sentence_transformers.json")
    architectures = str(read_json(folder / "config.json").get("architectures"))
    has_modules = (folder / "modules.json").is_file()
    kind = files.get("model_type", "SentenceTransformer")
    if "ForSequenceClassification" in architectures and not has_modules:
        kind = "reranker"
    if kind != "SentenceTransformer":  # sparse and late-interaction models, too: they would load in vain
        raise ValueError(f"a {kind} gives no vector a text, a SentenceTransformer does")
    prompts = files.get("prompts") or {}
    kinds = PASSAGE_PROMPTS[:1] if "title_join" in files else PASSAGE_PROMPTS  # that save() writes, or others
    said = {"similarity": files.get("similarity_fn_name"), "title_join": files.get("title_join"),
            "query_prefix": prompts.get("query"),
            "passage_prefix": next(filter(None, map(prompts.get, kinds)), "")}
    if not all(isinstance(text, str | None) for text in said.values()):
        raise ValueError(f"{said} are not all texts")
    if "title_join" not in files:  # not from save(): an empty prompt may be one that nobody thought of
        said = {key: value for key, value in said.items() if value}
    assumed = next((row for pattern, row in MAKERS.items() if re.search(pattern, name.lower())), {})
    if has_modules:
        said["pooling"] = None  # as the modules are
    else:  # as sentence-transformers
        pooling = "lasttoken" if "ForCausalLM" in architectures else "mean"
        assumed = OTHERS | {"pooling": pooling} | assumed
    others = sorted({key for key, text in prompts.items() if text} - {"query", *PASSAGE_PROMPTS})
    return said, assumed, others


@contextlib.contextmanager
def usable(path, trouble, remedy="fetch or save the model again, or name another"):
    """Errors of a block that loads something become DataErrors."""
    try:
        yield
    except Exception as error:  # safetensors, tokenizers and the model classes raise their own kinds
        raise DataError(f"{path}: {trouble} ({str(error)[:200]}); {remedy}") from None


def check_tokenizer(tokenizer):
    """The tokenizer; ValueError where transformers made one without words, its files being missing."""
    if len(tokenizer) - len(set(tokenizer.all_special_ids)) < 3:
        raise ValueError("no tokenizer: it has special tokens only, its files are missing")
    return tokenizer


def load_tokenizer(name):
    from transformers import AutoTokenizer
    folder = model_folder(name)
    with usable(folder, "no tokenizer to be used", "name another one's model with --bm25-tokenizer"):
        tokenizer = check_tokenizer(AutoTokenizer.from_pretrained(folder))
        if not tokenizer.is_fast:
            raise ValueError("it is written in Python and tells no offsets")
        return tokenizer


def load_model(folder, device):
    """The SentenceTransformer of a folder in fp32; DataError where what it needs is missing or damaged."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers.utils.logging import disable_progress_bar
    torch.set_float32_matmul_precision("highest")  # "medium" is bf16 on some CPUs, whoever asked for it
    disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)

    def refuse(record):  # that weights are missing is only logged
        missing = re.findall(r"^(\S.*?) *\| \S*MISSING", record.getMessage(), re.MULTILINE)
        missing = [name for name in missing if "pooler." not in name]  # nothing reads it
        if missing:
            raise ValueError(f"{len(missing)} weights are missing, {min(missing)} first; renamed?")

    logger = logging.getLogger("transformers.modeling_utils")
    logger.setLevel(logging.INFO)  # whatever TRANSFORMERS_VERBOSITY says; from WARNING on it tells of shards
    logger.filters = [refuse]  # falsy: nothing is printed
    with usable(f"--device {device}", "no device to be used", "take auto or cpu"):
        torch.empty(0, device=device)
    with usable(folder, "no encoder to be used"):
        for name in ("config.json", "tokenizer_config.json"):
            if "auto_map" in read_json(folder / name):
                raise ValueError(f"{name} names a custom class (auto_map), code of a model folder is not run")
        model = SentenceTransformer(str(folder), device=device, local_files_only=True,
                                    model_kwargs={"dtype": torch.float32})
        if not (isinstance(model[0], Transformer) and any(isinstance(module, Pooling) for module in model)):
            names = ", ".join(type(module).__name__ for module in model)
            raise ValueError(f"it is no transformer with a pooling but {names}")
        tokenizer = check_tokenizer(model.tokenizer)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # whatever it is, it is masked
        if tokenizer.pad_token is None:
            raise ValueError("its tokenizer has neither a padding nor an end token")
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        special -= {*tokenizer("")["input_ids"], tokenizer.pad_token_id}  # those are in every text
        n_tokens = 1 + max(set(tokenizer.get_vocab().values()) - special)  # some have no row, as of images
        n_rows = model[0].model.get_input_embeddings().num_embeddings
        if n_tokens > n_rows:
            raise ValueError(f"its tokenizer has {n_tokens} tokens, its model {n_rows}: files of two models")
    return model.eval()


def load_rows(path, n_rows, mode="r"):
    """A memory-mapped array; DataError where the file is damaged or has another number of rows."""
    with usable(path, "cannot be read", "delete it to have it made again"):
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
        if len(array) != n_rows:
            raise ValueError(f"{len(array)} rows, want {n_rows}")
        return array


def read_cut(path):
    """How many texts encode_file has cut of those whose vectors are at path."""
    path = path.with_suffix(".cut")
    with usable(path, "cannot be read", "delete the .npy beside it, too"):
        return int(path.read_text())


def save_rows(path, array):
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


class Encoder:
    """A bi-encoder as its maker uses it (maker_settings), unless --settings says otherwise.

    The model is loaded when it must encode. dtype bf16 is autocast over fp32 weights, for encoding and for
    training. Where similarity, which may be set, is "cosine" and not "dot", vectors are of unit length: their
    inner products are the model's similarity.
    """

    def __init__(self, name, device="auto", query_max_len=64, passage_max_len=256, settings=(), dtype=None):
        self.name = short_name(name)
        self.folder = model_folder(name)
        self.device = pick_device(device)
        self.dtype = dtype or ("fp32" if self.device == "cpu" else "bf16")
        self.asked = {"query": query_max_len, "passage": passage_max_len}
        self.n_read = {"query": 0, "passage": 0}
        self.n_cut = {"query": 0, "passage": 0}
        self.n_prompt = {"query": 0, "passage": 0}  # tokens, which some models do not pool
        own = ("", self.name, str(name))
        self.given = {key: value for of, key, value in read_settings(settings) if of in own}
        if "normalise" in self.given:
            self.given["similarity"] = "cosine" if self.given["normalise"] == "yes" else "dot"
        with usable(self.folder, "no settings of an encoder"):
            said, assumed, others = maker_settings(self.folder, self.name)
        used = OTHERS | assumed | said | self.given
        self.assumed = {key: value for key, value in assumed.items() if key not in said | self.given}
        self.is_first = os.environ.get("RANK", "0") == "0"
        if self.assumed and self.is_first:
            say(f"{self.name}: not in sentence-transformers' files in its folder, so assumed by name: "
                + json.dumps(self.assumed)[1:-1])
        if others and self.is_first and not (used["query_prefix"] or used["passage_prefix"]):
            say(f"{self.name}: none of its prompts ({', '.join(others)}) is named query or document, so none "
                "is used; name one with --settings query_prefix=... passage_prefix=...")
        self.pooling = used["pooling"]
        self.similarity = used["similarity"]
        self.title_join = used["title_join"]
        self.prefix = {"query": used["query_prefix"], "passage": used["passage_prefix"]}
        keep_blocks(64 << 20)
        if self.similarity not in ("cosine", "dot"):
            raise DataError(f"{self.folder}: similarity {self.similarity!r}, want cosine or dot; choose "
                            "with --settings normalise=yes or normalise=no")

    @cached_property
    def model(self):
        """The SentenceTransformer, with what --settings and MAKERS change of its modules."""
        from sentence_transformers.base.modules import Normalize
        from sentence_transformers.sentence_transformer.modules import Pooling
        model = load_model(self.folder, self.device)
        if self.is_first and self.dtype == "bf16" and not has_bf16(self.device):
            say(f"{self.name}: {self.device} has no bf16 of its own; --dtype fp32 is several times faster")
        if self.given.get("normalise") == "no" and isinstance(model[-1], Normalize):
            del model[-1]
        for module in model:
            if isinstance(module, Pooling) and self.pooling:
                if module.pooling_output_dimension != module.embedding_dimension:
                    raise DataError(f"{self.folder}: --settings pooling=... is of one kind, it joins "
                                    f"{module.pooling_mode}; leave that out")
                module.pooling_mode = self.pooling
        return model

    def trainable(self, checkpointing=False):
        """The model's parameters, ready to be trained; DataError where they cannot be."""
        transformer = self.model[0].model
        if not any(parameter.requires_grad for parameter in transformer.parameters()):
            raise DataError(f"{self.folder}: an adapter, whose weights are frozen; merge it into its base")
        if checkpointing:
            with usable(self.folder, "gradient checkpointing fails", "leave --gradient-checkpointing out"):
                transformer.activation_checkpointing_enable()
        if self.device == "cpu":
            transformer.set_attn_implementation("eager")  # torch's is of fp32 where there is dropout
            transformer.get_input_embeddings().sparse = True  # else each chunk adds up a whole table
        return list(self.model.parameters())

    @cached_property
    def max_len(self):
        """Tokens that are read of a query and of a passage: as asked, and at most the maker's limit."""
        transformer = self.model[0]
        own = {"query": transformer.query_length, "passage": transformer.document_length}
        n_positions = getattr(transformer.model.config, "max_position_embeddings", None) or 0
        n_positions -= transformer._infer_flatten_position_offset()  # XLM-R's begin after its padding token
        n_positions = n_positions if n_positions > 0 else math.inf
        limit = {kind: min(n, own[kind] or n, self.model.max_seq_length, n_positions)
                 for kind, n in self.asked.items()}
        used = {kind: int(self.given.get(f"{kind}_max_len", n)) for kind, n in limit.items()}
        if max(used.values()) > n_positions:
            raise DataError(f"{self.name}: {max(used.values())} tokens asked for, the model has "
                            f"{n_positions} positions; ask for less")
        for kind, prompt in self.prefix.items():
            n = len(self.model.tokenizer(prompt)["input_ids"]) if prompt else 0
            if n >= used[kind]:
                raise DataError(f"{self.name}: the prompt alone has {n} of {used[kind]} tokens ({kind}); "
                                f"raise --{kind}-max-len, or name a shorter one with --settings")
        return used

    @cached_property
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

    def cached_settings(self, cache):
        """settings() from the cache, and max_len by it: who finds all vectors there loads no model."""
        path = self.vectors_folder("passage", cache) / f"{self.fingerprint('query')}.json"
        if not path.is_file():
            with atomic(path) as temporary:
                temporary.write_text(json.dumps(self.settings()), "utf-8")
        with usable(path, "no settings to be used", "delete it to have it made again"):
            settings = read_json(path) | {"assumed": self.assumed, "given": self.given}
            self.max_len = {kind: int(settings["max_len"][kind]) for kind in self.asked}
        return settings

    @property
    def default_temperature(self):
        """Of the contrastive loss: E5's makers' where their prompt is used, else BGE-M3's."""
        return 0.01 if self.prefix["query"] == E5["query_prefix"] else 0.02

    def passage_text(self, passage):
        """What this encoder reads of a passage."""
        return passage_text(passage, self.title_join)

    def tokenize(self, texts, kind):
        """Token ids of each text, made by the model's own preprocessing: with its prompt, cut and counted."""
        fed = self.model.preprocess(texts, prompt=self.prefix[kind], task=TASKS[kind],
                                    max_length=self.max_len[kind])
        mask = fed["attention_mask"].bool()                                                    # (N, L)
        beyond = fed["input_ids"] >= self.model[0].model.get_input_embeddings().num_embeddings  # (N, L)
        for row in beyond.any(1).nonzero():
            raise DataError(f"{self.name}: a token of {texts[row][:60]!r} has no vector in the model; take "
                            "that text out")
        if "token_type_ids" in fed and fed["token_type_ids"][mask].any():
            raise DataError(f"{self.folder}: its tokenizer gives token types, which are not read here; take "
                            "another model")
        token_ids = [ids[read].tolist() for ids, read in zip(fed["input_ids"], mask)]
        cut = [len(ids) >= self.max_len[kind] for ids in token_ids]  # where nothing tells what was cut off
        if getattr(fed, "encodings", None):
            cut = [bool(encoding.overflowing) for encoding in fed.encodings]
        self.n_read[kind] += len(texts)
        self.n_cut[kind] += sum(cut)
        self.n_prompt[kind] = fed.get("prompt_length", 0)
        return token_ids

    def report_cut(self):
        """Say how many texts were longer than their limit."""
        for kind, n in self.n_cut.items():
            if n:
                say(f"{self.name}: {n} of {self.n_read[kind]} texts ({kind}) were cut at "
                    f"{self.max_len[kind]} tokens, by --{kind}-max-len or the model's own limit")

    def autocast(self):
        """The context in which products are of --dtype."""
        import torch
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.dtype == "bf16")

    def forward(self, token_ids, kind):
        """(N, D) float32 vectors of N lists of token ids, through the model's own modules, on the device."""
        import torch
        features = self.model.tokenizer.pad({"input_ids": token_ids}, return_attention_mask=True,
                                            padding_side="right", return_tensors="pt")
        features = {name: tensor.to(self.device) for name, tensor in features.items()}         # (N, L)
        features["prompt_length"] = self.n_prompt[kind]
        with self.autocast():
            vectors = self.model(features, task=TASKS[kind])["sentence_embedding"].float()     # (N, D)
        vectors = vectors[:, :self.model.truncate_dim]
        return torch.nn.functional.normalize(vectors, dim=1) if self.similarity == "cosine" else vectors

    def fill(self, vectors, texts, kind, bar=None):
        """Encode the rows of vectors (N, D) that are NaN, longest texts first.

        The batches depend on nothing but the texts, so that an array that was half done ends the same.
        """
        import torch
        token_ids = []
        for some in batched(texts, 1024):
            token_ids += [np.array(ids, np.int32) for ids in self.tokenize(some, kind)]
        order = np.argsort([-len(ids) for ids in token_ids], kind="stable")
        budget = CPU_TOKENS if self.device == "cpu" else GPU_TOKENS
        if bar is None:
            bar = progress(total=len(texts), desc=f"encode with {self.name}", delay=5, leave=False)
        with torch.no_grad(), faster(self.device == "cpu"), self.autocast():  # around all: casts weights once
            while len(order):
                size = max(1, budget // max(1, len(token_ids[order[0]])))
                rows = order[:size]
                order = order[size:]
                if np.isnan(vectors[rows]).any():
                    vectors[rows] = self.forward([token_ids[row] for row in rows], kind).cpu().numpy()
                for row in rows[~np.isfinite(vectors[rows]).all(1)]:
                    raise DataError(f"{self.name}: the vector of {texts[row][:60]!r} is not finite (NaN or "
                                    f"infinite as {vectors.dtype}); the model is damaged, take another")
                bar.update(len(rows))
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what follows has no use for freed blocks (200 MB of a peak)

    def encode(self, texts, kind):
        """(N, D) float32 vectors."""
        vectors = np.full((len(texts), self.model.get_embedding_dimension()), np.nan, np.float32)
        self.fill(vectors, texts, kind)
        return vectors

    def encode_file(self, path, texts, kind, bar=None):
        """Make the (N, D) fp16 .npy at path, and beside it how many texts were cut, unless it is there.

        Vectors are written as they come, to a file that becomes path when it is full: a kill loses none.
        """
        path = Path(path)
        partial = Path(f"{path}.partial")
        if path.is_file():
            return
        with lock(path):
            if path.is_file():  # by now
                return
            if not partial.is_file():
                width = self.model.get_embedding_dimension()
                save_rows(partial, np.full((len(texts), width), np.nan, np.float16))
            before = self.n_cut[kind]
            vectors = load_rows(partial, len(texts), "r+")
            self.fill(vectors, texts, kind, bar)
            vectors.flush()  # else a power cut may leave the name without the content
            path.with_suffix(".cut").write_text(str(self.n_cut[kind] - before))
            partial.replace(path)

    def vectors_folder(self, kind, cache):
        return Path(cache) / "embeddings" / self.fingerprint(kind)

    def vectors_file(self, texts, kind, cache):
        key = hashlib.blake2b("\0".join(texts).encode()).hexdigest()[:32]
        return self.vectors_folder(kind, cache) / f"{kind}-{key}.npy"

    def encode_cached(self, texts, kind, cache):
        """(N, D) fp16 vectors, memory-mapped from the cache."""
        path = self.vectors_file(texts, kind, cache)
        self.encode_file(path, texts, kind)
        return load_rows(path, len(texts))

    def save(self, folder):
        """Write a folder that SentenceTransformer loads to the same unit vectors, with the maker's limit."""
        from sentence_transformers.base.modules import Normalize
        if not isinstance(self.model[-1], Normalize):
            self.model.append(Normalize())
        self.model.similarity_fn_name = "cosine"
        self.model.prompts |= {"query": self.prefix["query"], "document": self.prefix["passage"]}
        if self.model.tokenizer.is_fast:  # else its file keeps the length of the last call
            self.model.tokenizer.backend_tokenizer.no_truncation()
            self.model.tokenizer.backend_tokenizer.no_padding()
        self.model.save(str(folder), create_model_card=False)
        path = Path(folder) / "config_sentence_transformers.json"
        files = read_json(path) | {"title_join": self.title_join}
        path.write_text(json.dumps(files, ensure_ascii=False, indent=2) + "\n", "utf-8")
