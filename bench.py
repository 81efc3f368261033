"""Ratios against the plain way, measured in one run on one machine.

    python bench.py --data_dir DATA/gsm8k               # all but scaling
    python bench.py rjepa_step                          # one
    python bench.py --profile rjepa_step                # where its time goes: traces for chrome://tracing
    python bench.py scaling                             # how cost grows: a table and a plot
    python bench.py nanojepa_step --preset nanojepa --tokens 65536             # a GPU: MFU and peak memory beside
    python bench.py rjepa_step --preset rjepa --batch_size 3072 --memory_gb 24 # does it fit a card of 24 GB?

nanojepa_step        isolated views as causal rows, against one dense-masked row in padded batches of random order
nanojepa_mask        the same, both sides on length-bucketed batches and without padding: the mask alone
nanojepa_gpt         the same step, against a plain GPT of its shape: question and answer in one causal row, no latent
                     loss; both sides on length-bucketed batches of as many problems
nanojepa_llm_jepa    the same step, against three forward passes (text, question, answer) as LLM-JEPA first did
nanojepa_overhead    answer_context = question with the latent loss, against a plain language model (1 / ratio = cost)
rjepa_step           length-bucketed batches that leave out padding, hidden steps and what no loss asks for of
                     counterfactuals, short chains packed, against batches in random order, padded to their longest
                     chain as a DataLoader does, where attention masks all that. A chain has as many steps as a
                     problem's solution, and a counterfactual; the latents are random numbers
tjepa_packed         T-JEPA's first phase (shape of tjepa-small) on packed documents without padding, against a padded
                     document in each row; both encode visible tokens alone
attention            model.attend against SDPA at the shape of nanojepa-small, forward and backward
generate             decoding with the KV cache, against recomputing the whole row for every token; always in fp32
speaker_cache        the Speaker writing 256 tokens, against recomputing all of them for every token (tjepa-speak);
                     always in fp32
extract              LLM.read_coded, against AutoModelForCausalLM with output_hidden_states on right-padded batches
                     of 16 in file order: --llm, layer -2, same dtype, same tokens pooled. Ours are two of the batches
                     that a shard of 512 chains makes, at the quartiles of length. max_difference: between the two in
                     fp32, divided by the std of the plain latents
shared_prefill       4 candidates of 32 tokens from one reading of a 200-token prompt, against 4 generations one after
                     the other; `batched`: a batch of 4 copies of the prompt instead
rerank_overhead      seconds to write 4 candidates and score them, against writing alone (ratio = cost); the latents
                     that RERANK reads are taken while writing, on both sides
nudge_overhead       ms a token under NUDGE's bias, against without (ratio = cost), in four answers one after the
                     other; `hidden`: a pull on the hidden state instead. The head has random weights, and alpha is
                     so small that all write the same tokens

A step is all that one of train.py does: collating, forward, backward, clipping, optimizer, EMA. Tokens are real ones,
never padding; the answer rows that only the latent needs count as cost, not as tokens. The next batch is made while a
GPU is still busy. On a GPU `mfu` (of real tokens, for R-JEPA with the target encoder's pass over the counterfactuals)
and `peak_memory_gb` are given, too, of our side alone. Where SmolLM2 cannot be loaded, RERANK and NUDGE are measured
with pretrained/student. With `all`, each comparison has a process of its own.
"""

import dataclasses
import gc
import itertools
import json
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
import tyro

import config as cfg
import data
import infer
import latents
import model as m
from jobs import n_rows
from llm import batches_by_length, generate, load_llm, sample
from runs import autocast, build_model, pick_device, pick_dtype, say

NAMES = Literal["all", "nanojepa_step", "nanojepa_mask", "nanojepa_gpt", "nanojepa_llm_jepa", "nanojepa_overhead",
                "rjepa_step", "tjepa_packed", "attention", "generate", "speaker_cache", "extract", "shared_prefill",
                "rerank_overhead", "nudge_overhead", "scaling"]
AIMS = {"nanojepa_step": 2, "nanojepa_gpt": 1, "rjepa_step": 2, "tjepa_packed": 1.5, "speaker_cache": 5,
        "extract": 2, "shared_prefill": 1.5,
        "rerank_overhead": 1.02, "nudge_overhead": 1.05}  # a ratio should be at least this; an overhead at most
PRETRAINED = Path(__file__).with_name("pretrained")


@dataclass
class Args:
    """Measures our way and the plain one in turn; the median of --repeats rounds."""

    name: Annotated[NAMES, tyro.conf.Positional] = "all"
    data_dir: str = ""  # GSM8K folder; empty: synthetic problems
    preset: str = ""  # whose network, for comparisons of its kind; empty: nanojepa-small, rjepa-small
    tokens: int = 0  # tokens in a batch of nanoJEPA; 0: as many as the preset's number of problems has
    batch_size: int = 0  # chains in a batch of R-JEPA; 0: the preset's
    llm: str = "smollm2"  # what `extract` and `shared_prefill` are measured with: as in extract.py
    repeats: int = 3  # rounds
    seconds: float = 2.0  # per side and round, at least
    profile: bool = False  # write a trace of one call of each side instead
    plot: str = "assets/scaling.png"  # where `scaling` draws
    memory_gb: float = 0.0  # cap on the GPU memory of our side of a training step; 0: all of it
    device: str = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    compile: cfg.PICK = "auto"  # of training steps, as in train.py

    def __post_init__(self):
        cfg.positive(self, "repeats seconds")
        cfg.not_negative(self, "tokens batch_size memory_gb")
        for field, kinds in (("tokens", "nanojepa"), ("batch_size", "rjepa"), ("memory_gb", ("nanojepa", "rjepa"))):
            known = self.name == "all" or self.name.startswith(kinds)
            cfg.check(self, field, known or not getattr(self, field), f"means nothing to {self.name}")
        cfg.check(self, "profile", not (self.profile and self.name == "scaling"), "scaling has no trace")


class Step:
    """One step of training at each call, as train.py does it, on batch_of(0), batch_of(1), … -> its real tokens."""

    def __init__(self, bench, config, batch_of, loss=lambda model, batch: model(batch)["loss"], all_slots=False):
        torch.set_float32_matmul_precision("high")
        self.bench, self.batch_of, self.loss, self.tokens, self.rows = bench, batch_of, loss, 0, 0
        held = torch.cuda.memory_allocated() if bench.on_gpu else 0
        self.index, self.batch = 0, batch_of(0)
        gc.collect()
        gc.freeze()
        torch.manual_seed(0)
        self.model = build_model(config).to(bench.device)
        self.optimizer = m.configure_optimizers(self.model, config)
        for part in self.model.modules() if all_slots else ():  # compute padding and hidden positions, too
            if isinstance(part, m.Transformer):
                part.register_forward_pre_hook(
                    lambda _, args, more: (args, more | {"is_real": None}), with_kwargs=True)
        if bench.compile:
            m.compile_model(self.model)
        if bench.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(20 if bench.on_gpu else 1):  # as many batches as it takes to see a long one
            self()
        self.peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if bench.on_gpu else None
        if bench.on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)  # the other side may take what it needs

    def __call__(self) -> int:
        batch, self.index = self.batch, self.index + 1
        self.tokens += batch["n_tokens"]
        self.rows += n_rows(batch)
        with autocast(self.bench.device, self.bench.dtype):
            loss = self.loss(self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_target(0.996)
        self.batch = self.batch_of(self.index)  # made while a GPU is still busy
        return batch["n_tokens"]

    def figures(self, rate: float) -> dict:
        mfu = m.estimate_mfu(rate * self.model.flops_per_token(self.tokens / self.rows), self.bench.device_name)
        return {"mfu": mfu and round(mfu, 4), "peak_memory_gb": self.peak and round(self.peak, 2)}


class Bench:
    """The problems, network shapes, LLM and clock that all comparisons share; each comparison is a method."""

    def __init__(self, args, name: str = ""):
        self.args, self.name, self.device = args, name or args.name, pick_device(args.device)
        self.dtype, self.on_gpu = pick_dtype(args.dtype, self.device), self.device.startswith("cuda")
        self.device_name = torch.cuda.get_device_name(self.device) if self.on_gpu else self.device
        self.compile = {"auto": self.on_gpu, "on": True, "off": False}[args.compile]
        if args.memory_gb:
            if not self.on_gpu:
                raise ValueError(f"--memory_gb {args.memory_gb}: caps the memory of a CUDA GPU, this is {self.device}")
            there = torch.cuda.get_device_properties(self.device).total_memory / 2**30
            cfg.check(args, "memory_gb", args.memory_gb <= there, f"this GPU has {there:.0f}")
            torch.cuda.set_per_process_memory_fraction(args.memory_gb / there)

    def pick(self, default: str):
        """The config of --preset; with `all`, the default where --preset is of another kind."""
        config = cfg.pick_preset(default)
        asked = cfg.pick_preset(self.args.preset) if self.args.preset else config
        if isinstance(asked, type(config)):
            return asked
        cfg.check(self.args, "preset", self.args.name == "all", f"{self.name} needs one of the kind of {default}")
        return config

    @cached_property
    def problems(self) -> list[dict]:
        folder = self.args.data_dir
        return data.load_problems("gsm8k" if folder else "synthetic", "train", folder, 0 if folder else 8000)

    @cached_property
    def tokenizer(self):
        config = self.pick("nanojepa-small")
        texts = [t for p in self.problems for t in (p["question"], data.answer_text(p, "solution"))]
        return data.gpt2_tokenizer() if config.tokenizer == "gpt2" else data.train_bpe(texts, config.vocab_size)

    @cached_property
    def examples(self) -> list[dict]:
        return data.encode_problems(self.problems, self.tokenizer, self.pick("nanojepa-small"))

    @cached_property
    def config(self):
        """nanoJEPA's, with as many problems a batch as make --tokens."""
        config = dataclasses.replace(self.pick("nanojepa-small"), vocab_size=self.tokenizer.vocab_size)
        if self.args.tokens:
            config.batch_size = round(self.args.tokens / np.mean([size(e) for e in self.examples]))
            cfg.check(self.args, "tokens", 8 <= config.batch_size <= len(self.examples) // 2,
                      f"makes {config.batch_size} problems a batch; 8 to {len(self.examples) // 2} can be had")
        return config

    @cached_property
    def llm(self):
        return load_llm(self.args.llm, self.device, self.args.dtype)

    @cached_property
    def world(self):
        """(R-JEPA, its LLM): SmolLM2's or, where that cannot be loaded, the student's."""
        try:
            run, llm = "rjepa-smollm2", load_llm("smollm2", self.device, self.args.dtype)
        except (ValueError, OSError) as error:
            say(f"pretrained/student instead of SmolLM2: {str(error).splitlines()[0]}")
            run, llm = "rjepa-student", load_llm(str(PRETRAINED / "student"), self.device)
        model, config = infer.load_world_model(str(PRETRAINED / run), self.device)
        return model, llm.choose(config.layer, config.pooling)

    def compare(self, unit: str = "tokens/s", **works) -> dict:
        """Functions that do a piece of work and return its size, `ours` and `plain` among them -> medians and ratio.

        The one that has had the least time in a round is next, until all have had --seconds: so other load on the
        machine hits all alike. A GPU is waited for only after half a second of pieces, since no training step waits for
        it. In a unit of ms the figures are the time of a piece.
        """
        for work in works.values():
            work()
        if self.on_gpu:
            torch.cuda.synchronize()
        if self.args.profile:
            return self.trace(works)
        rates = {name: [] for name in works}
        for _ in range(self.args.repeats):
            spent, done = dict.fromkeys(works, 0.0), dict.fromkeys(works, 0)
            while min(spent.values()) < self.args.seconds:
                name = min(spent, key=spent.get)
                start = time.perf_counter()
                done[name] += works[name]()
                if self.on_gpu:
                    while time.perf_counter() < start + 0.5:
                        done[name] += works[name]()
                    torch.cuda.synchronize()
                spent[name] += time.perf_counter() - start
            for name in works:
                rates[name].append(done[name] / spent[name])
        found = {name: float(np.median(r)) for name, r in rates.items()}
        more = works["ours"].figures(found["ours"]) if isinstance(works["ours"], Step) else {}
        return self.result(unit, {k: 1000 / v if unit[:2] == "ms" else v for k, v in found.items()}) | more

    def result(self, unit: str, found: dict) -> dict:
        return {**{k: round(v, 3 if v < 10 else 1) for k, v in found.items()}, "unit": unit,
                "ratio": round(found["ours"] / found["plain"], 3), "aim": AIMS.get(self.name)}

    def trace(self, works: dict) -> dict:
        """One call of each: a Chrome trace in out/profile, and on stderr the operators that take the most time."""
        from torch.profiler import ProfilerActivity, profile

        found, kind = {}, "cuda" if self.on_gpu else "cpu"
        for side, work in works.items():
            path = Path("out/profile") / f"{self.name}-{side}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu) as profiler:
                work()
            profiler.export_chrome_trace(str(path))
            found[side] = str(path)
            say(f"{path}\n{profiler.key_averages().table(sort_by=f'self_{kind}_time_total', row_limit=12)}")
        return {"trace": found}

    # ------------------------------------------------------------------------- training steps

    def nanojepa(self, context="isolated", lambda_jepa=1.0, packed=False, padded=False, bucketed=True,
                 more=lambda part: {}, **loss):
        """A Step of NanoJEPA; more(part): what else a batch needs."""
        config = dataclasses.replace(self.config, answer_context=context, lambda_jepa=lambda_jepa)
        batches, n = data.Batches(self.examples, config), config.batch_size
        random = [self.examples[i : i + n] for i in range(0, len(self.examples) - n + 1, n)]

        def batch_of(index):
            part = batches(index) if bucketed else random[index % len(random)]
            batch = data.collate(part, config, self.device, packed=packed, padded=padded)
            return batch | more(part) | {"n_tokens": sum(map(size, part))}  # the same whatever the layout

        return Step(self, config, batch_of, **loss)

    def nanojepa_step(self):
        return self.compare(ours=self.nanojepa(), plain=self.nanojepa(packed=True, padded=True, bucketed=False))

    def nanojepa_mask(self):
        return self.compare(ours=self.nanojepa(), plain=self.nanojepa(packed=True))

    def nanojepa_gpt(self):
        return self.compare(ours=self.nanojepa(), plain=self.nanojepa("question", 0.0))

    def nanojepa_llm_jepa(self):
        def questions(part):
            rows = [[*e["question"], self.config.vocab_size - 1] for e in part]
            lengths = np.array([len(row) for row in rows])
            batch, first = data.lay_out(rows, 0, 0 * lengths, lengths)
            return data.move({"question": batch["idx"], "question_rows": batch["rows"],
                              "question_at": torch.from_numpy(first + lengths - 1)}, self.device)

        def loss(model, batch):
            """One causal row for the token loss, then question and answer once more for the latents."""
            h = model.states(model.embed(batch["idx"]), batch["rows"])
            lm_loss = model.token_loss(h, batch["loss_at"], batch["targets"]) / len(batch["targets"])
            h = model.states(model.embed(batch["question"]), batch["question_rows"])
            pred = h[batch["question_at"]].float()
            target = model.target_latent(batch["target_idx"], batch["target_pool"])
            return lm_loss + 1 - F.cosine_similarity(pred, target, dim=-1).mean()

        return self.compare(ours=self.nanojepa(), plain=self.nanojepa("question", more=questions, loss=loss))

    def nanojepa_overhead(self):
        return self.compare(ours=self.nanojepa("question", 1.0), plain=self.nanojepa("question", 0.0))

    def rjepa_step(self):
        config, rng = self.pick("rjepa-small"), np.random.default_rng(0)
        config.dim, config.batch_size = config.dim or 576, self.args.batch_size or config.batch_size
        pool, chains, n = torch.randn(8192, config.dim).bfloat16(), [], config.batch_size
        for p in self.problems:
            rows = 1 + len(data.split_steps(p["answer"]))
            h, wrong_h = (pool[at : at + rows] for at in rng.integers(len(pool) - rows, size=2))
            chains.append({"h": h, "wrong_h": wrong_h, "wrong_step": int(rng.integers(1, rows))})
        batches, order = latents.Batches(chains, config), rng.permutation(len(chains))

        def random(index):
            part = [chains[i] for i in order[index % (len(chains) // n) * n :][:n]]
            return latents.collate(part, config, np.random.default_rng(index), self.device)

        return self.compare("latents/s", ours=Step(self, config, lambda i: batches(i, self.device)),
                            plain=Step(self, config, random, all_slots=True))

    def tjepa_packed(self):
        config = dataclasses.replace(cfg.pick_preset("tjepa-small"), vocab_size=self.tokenizer.vocab_size)
        documents = [d for p in self.problems[:2000]
                     for d in data.encode_document(data.document_text(p), self.tokenizer, config.block_size)]
        packed, rng = data.Documents(documents, config), np.random.default_rng(0)
        n = round(config.batch_size * config.block_size / np.mean([len(d["tokens"]) for d in documents]))
        padded = [[[d] for d in documents[i : i + n]] for i in range(0, len(documents) - n, n)]  # in random order
        return self.compare(ours=Step(self, config, lambda i: packed(i, self.device)), plain=Step(
            self, config, lambda i: data.collate_documents(padded[i % len(padded)], config, rng, self.device),
            all_slots=True))

    # ------------------------------------------------------------------------- parts

    def attention(self):
        c = self.pick("nanojepa-small")
        shape = (c.batch_size, 170, c.n_head, c.n_embd // c.n_head)
        q, k, v = (torch.randn(shape, device=self.device, dtype=self.dtype).transpose(1, 2).requires_grad_()
                   for _ in range(3))

        def run(function):
            function(q, k, v, is_causal=True).sum().backward()
            return shape[0] * shape[1]

        return self.compare(ours=lambda: run(m.attend), plain=lambda: run(F.scaled_dot_product_attention))

    @torch.no_grad()
    def generate(self):
        torch.manual_seed(0)
        model = m.NanoJEPA(dataclasses.replace(self.config, answer_context="question")).to(self.device).eval()
        rows = [[*self.tokenizer.encode(p["question"]), model.pred_id] for p in self.problems[:16]]
        length, new = min(map(len, rows)), 100
        idx = torch.tensor([r[:length] for r in rows], device=self.device)

        def cached():
            model.generate([r[: length - 1] for r in rows], new)
            return new * len(rows)

        def states(idx):
            return model.transformer(model.embed(idx), is_causal=True)

        return self.compare(ours=cached, plain=lambda: recompute(idx, new, model.embed.weight[: model.pred_id], states))

    @torch.no_grad()
    def speaker_cache(self):
        config = dataclasses.replace(cfg.pick_preset("tjepa-speak"), vocab_size=self.tokenizer.vocab_size,
                                     context_dim=256)
        torch.manual_seed(0)
        speaker, n = m.Speaker(config).to(self.device).eval(), 256
        speaker.embed.weight[speaker.eos_id] = 0.0  # never the likeliest: all 256 tokens are written
        context = torch.randn(2, 100, config.context_dim, device=self.device)
        allowed = torch.ones(context.shape[:2], dtype=torch.bool, device=self.device)

        def states(idx):
            return speaker.transformer(speaker.embed(idx), is_causal=True, context=speaker.prepare(context),
                                       context_allowed=allowed)

        def cached():
            written = speaker.generate(context, allowed, max_new_tokens=n)
            assert all(len(row) == n for row in written), "the Speaker stopped early: nothing to compare"
            return n * len(context)

        idx = torch.full((len(context), 1), speaker.eos_id, device=self.device)
        return self.compare(ours=cached,
                            plain=lambda: recompute(idx, n, speaker.embed.weight[: speaker.eos_id], states))

    # ------------------------------------------------------------------------- LLMs

    def extract(self):
        from transformers import AutoModelForCausalLM

        llm, folder, wanted = self.llm, self.llm.model.name_or_path, (self.llm.layer_index(-2), "last")
        coded = [llm.encode(p["question"], data.split_steps(p["answer"])) for p in self.problems[:512]]
        batches = list(batches_by_length([len(ids) for ids, _ in coded], llm.token_budget))
        quartiles = [coded[i] for at in (len(batches) // 4, 3 * len(batches) // 4) for i in batches[at]]

        def ours(llm, coded, token_budget=llm.token_budget):
            return llm.read_coded(coded, [wanted], False, token_budget)[0][wanted]

        @torch.no_grad()
        def plain(model, coded):
            found = []
            for start in range(0, len(coded), 16):
                rows, spans = zip(*coded[start : start + 16], strict=True)
                h = model(m.pad_rows(rows, 0, self.device), attention_mask=m.real_tokens(rows, self.device).long(),
                          output_hidden_states=True).hidden_states[-2]
                found += [z[[end - 1 for _, end in units]].float().cpu() for z, units in zip(h, spans, strict=True)]
            return found

        def load(dtype):
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(self.device).eval()

        def timed(function, network, coded):
            return lambda: (function(network, coded), sum(len(ids) for ids, _ in coded))[1]

        a = torch.cat(ours(load_llm(folder, self.device, "fp32"), coded[:8], 512))
        b = torch.cat(plain(load(torch.float32), coded[:8]))
        return self.compare(ours=timed(ours, llm, quartiles), plain=timed(plain, load(llm.model.dtype), coded[:32])
                            ) | {"max_difference": float(f"{(a - b).abs().max() / b.std():.2g}")}

    def shared_prefill(self):
        llm, k, new = self.llm, 4, 32
        row = llm.text_ids("\n".join(p["question"] for p in self.problems[:8]))[:200]

        @torch.no_grad()
        def write(rows, k, seeds):
            final, _, memory = llm.begin(rows, k, new)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            for _ in range(new):
                final, _ = llm.advance(sample(llm.logits(final).float(), 0.8, 0.95, generators), memory)
            return new * len(generators)

        return self.compare(ours=lambda: write([row], k, range(k)), batched=lambda: write([row] * k, 1, range(k)),
                            plain=lambda: sum(write([row], 1, [seed]) for seed in range(k)))

    def rerank_overhead(self):
        (model, llm), seconds, problems = self.world, [], itertools.cycle(self.problems)

        def work():
            question, start = next(problems)["question"], time.perf_counter()
            chains = generate(llm, [question], 4, max_new_tokens=128)[0]
            written = time.perf_counter()
            infer.rerank(model, chains, 1.0, 1.0)
            seconds.append((time.perf_counter() - start, written - start))

        work()
        if self.args.profile:
            return self.trace({"ours": work})
        for _ in range(self.args.repeats):
            work()
        # both of a pair are from the same run: two runs would differ by more than the per cent in question
        ours, plain = sorted(seconds[1:], key=lambda pair: pair[0] / pair[1])[self.args.repeats // 2]
        return self.result("s/question", {"ours": ours, "plain": plain})

    def nudge_overhead(self):
        (model, llm), questions = self.world, [p["question"] for p in self.problems[:4]]
        guide = m.Guidance(cfg.GuideConfig(z_dim=model.config.n_embd, h_dim=llm.dim))
        torch.nn.init.normal_(guide.out.weight, 0.0, 0.02)
        guide.to(self.device).eval()

        def write(nudge=None):
            return sum(sum(generate(llm, [q], 1, 0.0, max_new_tokens=64, nudge=nudge)[0][0]["n_tokens"])
                       for q in questions)

        return self.compare("ms/token", ours=lambda: write(infer.Nudge(model, llm, 1e-6, guide)), plain=write,
                            hidden=lambda: write(infer.Nudge(model, llm, 1e-6)))

    # ------------------------------------------------------------------------- how cost grows

    def scaling(self):
        """Training steps on random data, each in a process of its own; draws --plot.

        All are measured in order and then in reverse; the faster of the two counts, since other load only slows.
        """
        points = dict.fromkeys(at for sweep in SWEEPS.values() for at in sweep.values())
        for at in [*points, *reversed(points)]:
            found = in_process(measure, self.args, *at)
            points[at] = max(points[at] or found, found, key=lambda p: p["tokens_per_s"])
            say("{} of length {}, batch {}, width {}:".format(*at), f"{found['tokens_per_s']:,.0f} a second")
        sweeps = {}
        for name, sweep in SWEEPS.items():
            kind, field = name.split()
            sweeps[name] = [{field: value, **points[at]} for value, at in sweep.items()]
            for p in sweeps[name]:
                print(f"{kind:8} {field:6} {p[field]:5} {p['tokens_per_s']:>9,.0f} tokens (latents) a second  "
                      f"{p['peak_memory_mb']:>7,.0f} MB", flush=True)
        draw(sweeps, Path(self.args.plot))
        return {"sweeps": sweeps, "plot": self.args.plot}


def size(example: dict) -> int:
    """Tokens of a problem, with [PRED] and [EOS]."""
    return len(example["question"]) + len(example["answer"]) + 2


def recompute(idx, n: int, vocabulary, states) -> int:
    """Writes n tokens after idx [B, T], greedily; states(idx) runs the whole row for each of them."""
    for _ in range(n):
        idx = torch.cat((idx, F.linear(states(idx)[:, -1], vocabulary).argmax(-1, keepdim=True)), dim=1)
    return n * len(idx)


SWEEPS = {  # name: {what varies: (kind, length, batch, width)}
    "nanoJEPA tokens": {n: ("nanoJEPA", n, 8192 // n, 256) for n in (64, 128, 256, 512, 1024)},
    "nanoJEPA batch": {n: ("nanoJEPA", 256, n, 256) for n in (8, 16, 32, 64, 128)},
    "nanoJEPA width": {n: ("nanoJEPA", 256, 32, n) for n in (128, 256, 512)},
    "R-JEPA steps": {n: ("R-JEPA", n, 128, 256) for n in (2, 4, 8, 16, 32)},
    "R-JEPA batch": {n: ("R-JEPA", 8, n, 256) for n in (32, 64, 128, 256, 512)},
}


def measure(args, kind: str, length: int, batch: int, width: int) -> dict:
    """Speed of a small preset's training step (the fastest of three or more: other load only slows), and the process's
    peak memory (on a GPU, that of the step alone)."""
    bench, rng = Bench(args), np.random.default_rng(0)
    preset = cfg.pick_preset("nanojepa-small" if kind == "nanoJEPA" else "rjepa-small")
    config = dataclasses.replace(preset, n_embd=width, batch_size=batch)
    if kind == "nanoJEPA":  # half the tokens are the question's, half the answer's
        texts = rng.integers(0, config.vocab_size - 2, (batch, 2, length // 2)).tolist()
        examples = [{"question": q[1:], "answer": a[1:], "target": a[1:]} for q, a in texts]
        step = Step(bench, config, lambda i: data.collate(examples, config, bench.device))
    else:
        config.dim = 576
        chains = [{"h": a, "wrong_h": b, "wrong_step": 1} for a, b in torch.randn(batch, 2, 1 + length, 576).bfloat16()]
        step = Step(bench, config, lambda i: latents.collate(chains, config, np.random.default_rng(i), bench.device))
    times = []
    while len(times) < 3 or sum(times) < args.seconds / 2:
        start = time.perf_counter()
        n = step()
        if bench.on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = 2**10 * step.peak if bench.on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"tokens_per_s": round(n / min(times), 1), "peak_memory_mb": round(peak)}


def draw(sweeps: dict, path: Path):
    """A column for each sweep: speed above, peak memory below."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(13, 5))
    axes = fig.subplots(2, len(sweeps), sharex="col")
    for (name, points), column in zip(sweeps.items(), axes.T, strict=True):
        kind, field = name.split()
        for ax, key in zip(column, ("tokens_per_s", "peak_memory_mb"), strict=True):
            ax.plot([p[field] for p in points], [p[key] for p in points], marker="o")
            ax.set_xscale("log", base=2)
            ax.set_xticks([p[field] for p in points], [str(p[field]) for p in points])
            ax.set_ylim(0, 1.1 * max(p[key] for p in points))
            ax.grid(alpha=0.3)
        column[0].set_title(kind)
        item = "problem" if kind == "nanoJEPA" else "chain"
        column[1].set_xlabel({"batch": f"{item}s a batch", "width": "width"}.get(field, f"{field} a {item}"))
    axes[0, 0].set_ylabel("tokens (latents) a second")
    axes[1, 0].set_ylabel("peak memory, MB")
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)


def run(args, name: str) -> dict:
    """One comparison."""
    try:
        return getattr(Bench(args, name), name)()
    finally:
        gc.unfreeze()


def in_process(function, *args):
    """function(*args) in a process of its own: in one that has freed memory before, memory would come faster."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@cfg.plain_errors()
def main(argv=None):
    args, results, skipped = tyro.cli(Args, args=argv), {}, {}
    bench, every = Bench(args), args.name == "all"
    for name in get_args(NAMES)[1:-1] if every else [args.name]:
        try:
            r = results[name] = in_process(run, args, name) if every else run(args, name)
        except (ValueError, OSError, torch.OutOfMemoryError, BrokenProcessPool) as error:
            if not every:
                raise ValueError(error) from None
            skipped[name] = str(error).splitlines()[0]
            print(f"{name:18} skipped: {skipped[name]}", flush=True)
            continue
        if "ratio" in r:
            more = "".join(f"  {k} {v:,}" for k, v in r.items() if v and k not in "ours plain unit ratio".split())
            print(f"{name:18} ours {r['ours']:>10,} plain {r['plain']:>10,} {r['unit']:10}  "
                  f"ratio {r['ratio']:<6}{more}", flush=True)
    print(json.dumps({"bench": results, "skipped": skipped, "device": bench.device_name, "dtype": str(bench.dtype)[6:],
                      "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    sys.exit(main())
