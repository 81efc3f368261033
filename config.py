"""Every hyperparameter of the project: one flat dataclass per job, the presets, the command line.

    python train.py PRESET --field value      any field below can be overridden
    python train.py PRESET --help             lists them with their present values

A field's comment is its only documentation; README and docstrings name the field and never repeat its value.
"""

import contextlib
import dataclasses
import difflib
import importlib
import json
import os
import sys
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

PICK = Literal["auto", "on", "off"]
POOLING = Literal["mean", "last", "both"]  # of a step's tokens


@dataclass
class RunConfig:
    """The fields of every training job: where it writes, what it reads, how it optimises, on which machine."""

    # run
    out_dir: str = ""  # run folder; empty: out/PRESET, of a guide or Speaker beside its R-JEPA
    seed: int = 1  # weights, batches, dropout, synthetic problems and tokenizer order follow from it
    overwrite: bool = False  # start again in a finished or foreign run folder (replaces this project's files only)
    init_from: str = ""  # run folder to start from: its weights, its network fields, its tokenizer

    # data
    dataset: Literal["gsm8k", "synthetic"] = "gsm8k"  # where problems come from
    data_dir: str = ""  # folder with SPLIT.jsonl / SPLIT.parquet (or DATASET/SPLIT.*); empty: Hugging Face hub
    limit: int = 0  # use only the first N training problems; 0: all (synthetic: n_synthetic)
    n_synthetic: int = 20_000  # synthetic training problems to make (dataset = synthetic)
    max_problem_steps: int = 8  # synthetic problems have 1 to this many steps
    val_problems: int = 256  # held-out problems looked at in every evaluation

    # optimisation
    epochs: float = 25.0  # passes over the training problems, unless max_steps is given
    max_steps: int = 0  # optimizer steps; 0: follows from epochs
    batch_size: int = 32  # problems per micro-batch and process
    grad_accum: int = 1  # micro-batches per optimizer step
    lr: float = 1e-3  # peak learning rate (AdamW)
    min_lr_ratio: float = 0.1  # the cosine ends at lr times this
    warmup_ratio: float = 0.02  # share of the steps with a rising learning rate
    weight_decay: float = 0.1  # on matrices only
    beta2: float = 0.99  # AdamW's second moment; the first is 0.9
    grad_clip: float = 1.0  # global gradient norm
    ema_start: float = 0.996  # momentum of the EMA target encoder at the first step ...
    ema_end: float = 0.9999  # ... rising linearly to this at the last

    # machine
    device: str = "auto"  # auto: cuda, mps, cpu in this order
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # autocast dtype; auto: bf16 where the hardware computes in it
    compile: PICK = "auto"  # torch.compile; auto: on CUDA alone
    threads: int = 0  # CPU threads; 0: PyTorch's own choice
    shard: bool = False  # under torchrun: FSDP2, weights and optimizer in parts on the processes; off: DDP, all on each

    # cadence
    log_every: int = 10  # steps between log lines
    eval_every: int = 500  # steps between evaluations
    save_every: int = 250  # steps between checkpoints to resume from

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), get_args(field.type)  # choices: of a Literal
            if choices:
                check(self, field.name, value in choices, f"must be one of {', '.join(choices)}")
            else:
                right = isinstance(value, (int, float) if field.type is float else field.type)
                check(self, field.name, right and (field.type is bool or not isinstance(value, bool)),
                      f"must be of type {field.type.__name__}")
        names = [field.name for field in dataclasses.fields(self)]
        positive(self, "epochs batch_size grad_accum lr grad_clip log_every eval_every save_every max_problem_steps")
        not_negative(self, "seed limit n_synthetic max_steps threads weight_decay")
        not_negative(self, " ".join(name for name in names if name.startswith("lambda_")))
        check(self, "seed", self.seed < 10**9, "must be below 1,000,000,000")
        shares(self, "min_lr_ratio warmup_ratio beta2 ema_start ema_end")
        check(self, "val_problems", self.val_problems >= 2, "must be at least 2 (a pair is needed to mismatch)")
        check(self, "max_problem_steps", self.max_problem_steps <= 8, "must be at most 8")
        positive(self, " ".join(name for name in names if name.endswith(("n_layer", "n_head", "n_embd"))))
        for name in (name for name in names if name.endswith("n_embd")):
            heads = next(h for h in (name.replace("embd", "head"), "n_head") if h in names)
            check(self, heads, getattr(self, name) % (2 * getattr(self, heads)) == 0,
                  f"must divide {name}={getattr(self, name)} into even parts")
        check(self, "dropout", "dropout" not in names or 0 <= self.dropout < 1, "must lie in [0, 1)")
        if "vocab_size" in names:  # a Transformer over tokens
            check(self, "vocab_size", self.vocab_size >= 258, "must be at least 258 (256 bytes and two special tokens)")
            check(self, "block_size", self.block_size >= 16, "must be at least 16")


@dataclass
class NanoJEPAConfig(RunConfig):
    """nanoJEPA, and with lambda_jepa = 0 the plain chain-of-thought LM (`student`)."""

    # text
    tokenizer: Literal["gpt2", "bpe"] = "gpt2"  # GPT-2's vocabulary, or a BPE trained on the training problems
    vocab_size: int = 4096  # size of the trained BPE with [EOS] and [PRED]; the run stores the true size
    block_size: int = 768  # longest row in tokens; a longer problem is an error that names it
    answer_text: Literal["solution", "final"] = "solution"  # what is written: the worked solution, or its last line

    # network
    n_layer: int = 6  # Transformer blocks
    n_head: int = 8  # attention heads
    n_embd: int = 512  # width
    dropout: float = 0.1  # on embeddings and residual branches

    # objective: loss = lm_loss + lambda_jepa * (1 - cos(pred_latent, answer_latent))
    lambda_jepa: float = 1.0  # 0: a plain language model, no answer row is run
    answer_context: Literal["isolated", "latent", "question"] = "isolated"  # what the answer's token loss may see
    target_text: Literal["solution", "final"] = "solution"  # the text whose latent [PRED] predicts
    pooling: Literal["mean", "last"] = "mean"  # answer latent: mean over the answer's states, or its closing [EOS]
    standardize_target: bool = True  # per dimension, of the answer latent, over the batch; off: as published
    target_encoder: Literal["shared", "ema"] = "shared"  # network that encodes the target: this one, or its EMA copy
    token_loss_on: Literal["all", "answer"] = "all"  # tokens in lm_loss: question and answer, or the answer alone

    def __post_init__(self):
        super().__post_init__()
        if self.lambda_jepa > 0 and self.standardize_target:
            check(self, "batch_size", self.batch_size >= 8, "must be at least 8: the batch standardises the latents")


@dataclass
class RJEPAConfig(RunConfig):
    """R-JEPA: predicts the latents of hidden reasoning steps from those of the visible ones."""

    # latents: from a folder of extract.py, which is run first where the folder is missing
    latents: str = ""  # the folder; empty: one in out/latents named after all that follows from
    held_out: str = ""  # folder whose val chains are looked at instead; unless it wins there, init_from's weights stay
    where: str = ""  # only chains for which this SQL condition holds ("n_steps >= 4"; needs DuckDB)
    llm: str = "smollm2"  # as in extract.py; the run stores what the latents say
    layer: int = -2  # index into hidden_states; the run stores it without a sign
    pooling: POOLING = "mean"  # a step's latent: mean over its tokens, its last one, or both
    prompt: str = ""  # around every question, as in extract.py; the run stores the text
    dim: int = 0  # width of the latents; the run stores it
    llm_weights: str = ""  # hash of the LLM's weights, where it is a run of this project; the run stores it

    # network
    n_layer: int = 3  # blocks of the context encoder (and of its EMA copy)
    n_head: int = 4  # attention heads of encoder and predictor
    n_embd: int = 256  # width of the encoder
    predictor_n_layer: int = 2  # blocks of the predictor
    predictor_n_embd: int = 128  # width of the predictor
    dropout: float = 0.0  # on embeddings and residual branches of the encoder; the predictor has none

    # masks: which steps are hidden; the question never is
    mask: Literal["contiguous", "random"] = "contiguous"  # one block of steps, or any of them
    mask_min: float = 0.3  # share of the steps that are hidden, at least one step: from this ...
    mask_max: float = 0.7  # ... to this
    suffix_share: float = 0.3  # share of the chains that hide everything from some step on
    single_share: float = 0.2  # share of the chains that hide one step alone, as the leave-one-out energy does
    gap_share: float = 0.0  # for PLAN: share that hide a step which the LLM has not read either (read once, kept)

    # objective: L1(z_pred, z_target) + lambda_* times each of the following
    lambda_variance: float = 0.01  # hinge on the std of every dimension of z_pred
    lambda_infonce: float = 0.1  # InfoNCE over the target steps of the batch
    lambda_own: float = 0.1  # InfoNCE over the steps of the chain itself
    lambda_reconstruction: float = 0.1  # L1 of W_out(z_pred) to the LLM's standardised latent
    lambda_margin: float = 0.0  # softplus(-gap / margin): a counterfactual chain's error should be the higher one
    margin: float = 0.1  # in units of the L1 error: a gap of a few times this is enough
    tau: float = 0.07  # temperature of both InfoNCE terms
    hard_negatives: bool = True  # counterfactual versions of the step among InfoNCE's negatives, where there are any
    target_encoder: Literal["ema", "copy", "online"] = "ema"  # EMA copy; plain copy; the encoder itself with gradient
    target_positions: bool = True  # off: targets are encoded without positions
    shuffle_steps: bool = False  # control: trains on chains whose steps are in random order
    adapters_only: bool = False  # train W_in and W_out alone, from scratch: calibrates init_from to another LLM

    def __post_init__(self):
        super().__post_init__()
        positive(self, "tau margin")
        not_negative(self, "dim")
        check(self, "mask_min", 0 <= self.mask_min <= self.mask_max <= 1, "needs 0 <= mask_min <= mask_max <= 1")
        shares(self, "suffix_share single_share gap_share")
        check(self, "gap_share", not (self.gap_share and self.shuffle_steps),
              "does not go with shuffle_steps: a chain with a gap keeps its order")
        check(self, "suffix_share", self.suffix_share + self.single_share <= 1, "and single_share make more than 1")
        for name in ("adapters_only", "held_out"):
            check(self, name, not getattr(self, name) or bool(self.init_from), "needs --init_from RUN")
        check(self, "held_out", not (self.held_out and self.adapters_only),
              "does not go with adapters_only: new adapters have no old ones to beat")


@dataclass
class GuideConfig(RunConfig):
    """NUDGE's guidance head over a frozen LLM and a frozen R-JEPA (init_from), on that run's verified chains."""

    n_hidden: int = 128  # width of the head
    lambda_bias: float = 1e-3  # weight of the bias's mean square
    use_z: bool = True  # off: the control that never sees a prediction, a plain bias from the token's own state
    world: str = ""  # hash of the R-JEPA's weights; the run stores it
    z_dim: int = 0  # width of the R-JEPA's predictions; the run stores it
    h_dim: int = 0  # width of the LLM's states; the run stores it

    def __post_init__(self):
        super().__post_init__()
        positive(self, "n_hidden")


@dataclass
class SpeakConfig(RunConfig):
    """A Speaker that puts the latents of a frozen R-JEPA (init_from) into words, on that run's verified chains."""

    offsets: ClassVar[bool] = True  # what the Speaker attends to are steps: it is told how far away they are

    tokenizer: Literal["gpt2", "bpe"] = "bpe"  # a BPE is trained on the chains
    vocab_size: int = 2048  # size of the trained BPE with its special ids; the run stores the true size
    n_layer: int = 4  # decoder blocks
    n_head: int = 4  # attention heads
    n_embd: int = 256  # width
    dropout: float = 0.1  # on embeddings and residual branches
    block_size: int = 128  # longest step in tokens; longer ones are cut
    reads: Literal["nothing", "before", "all"] = "all"  # beside the latents, as text: question and which other steps
    read_size: int = 512  # tokens of that text at most, its last ones
    read_weight: float = 0.2  # of these tokens in the loss; those that are said count 1
    use_z: bool = True  # off: the control that goes by what it reads alone
    use_prediction: bool = True  # off: the control without it, that sees the steps around the gap, latents and text
    context_dim: int = 0  # width of the latents; the run stores it
    predicted_share: float = 1.0  # share of the examples that speak from the predicted latent, the rest from the true
    alone_share: float = 0.0  # share of the batches that see the latent alone, without question and other steps
    world: str = ""  # hash of the R-JEPA's weights; the run stores it

    def __post_init__(self):
        super().__post_init__()
        positive(self, "read_size")
        shares(self, "predicted_share alone_share read_weight")
        check(self, "use_z", self.use_z or self.reads != "nothing", "off: it must read, --reads all or before")
        check(self, "alone_share", (self.use_z and self.use_prediction) or self.alone_share == 0,
              "must be 0 without --use_z and --use_prediction: there is no prediction to speak from")


@dataclass
class TextConfig(RunConfig):
    """What the jobs of T-JEPA share: the tokenizer, and the Transformer that is trained."""

    tokenizer: Literal["gpt2", "bpe"] = "gpt2"  # a BPE is trained on the texts; a run started from brings its own
    vocab_size: int = 4096  # size of the trained BPE with its special ids; the run stores the true size
    block_size: int = 512  # tokens a row: packed documents (longer ones are cut); a question or a response

    # network
    n_layer: int = 8  # Transformer blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width
    dropout: float = 0.0  # on embeddings and residual branches; a predictor has none


@dataclass
class DocumentConfig(TextConfig):
    """The documents that an encoder is trained on: a problem with its solution is one, unless --text names others."""

    text: str = ""  # a folder of .txt files, or NAME[:CONFIGURATION] of a hub data set; empty: problems of --dataset
    text_field: str = "text"  # the column of the data set that holds the text


@dataclass
class TJEPAConfig(DocumentConfig):
    """T-JEPA, phase 1: predicts the latents of masked spans of text from the text around them."""

    predictor_n_layer: int = 4  # blocks of the predictor
    predictor_n_embd: int = 384  # its width

    # masks: spans of whole sentences
    mask_min: float = 0.3  # share of a document's tokens that are hidden: from about this ...
    mask_max: float = 0.6  # ... to this
    span_max: int = 4  # sentences in the longest span that is drawn as such
    paragraph_share: float = 0.3  # share of the spans that are one to three whole paragraphs

    # objective: MSE(z_pred, z_target) + lambda_* times what prevents collapse
    standardize_target: bool = True  # per dimension, over the batch; off: as published, which collapses (LOG.md)
    lambda_variance: float = 0.1  # hinge on the std of every dimension of the context encoder's output, or its head's
    lambda_covariance: float = 0.01  # sum of a dimension's squared covariances with the others
    head: bool = False  # predictions and targets go through a projection head, left behind when the encoder is used
    document_share: float = 0.0  # of a dimension's variance, that is to lie between documents; 0: left alone
    lambda_document: float = 5.0  # squared distance from that share
    lambda_decorrelation: float = 0.01  # squared correlations between documents and within them

    def __post_init__(self):
        super().__post_init__()
        positive(self, "span_max")
        check(self, "mask_min", 0 < self.mask_min <= self.mask_max < 1, "needs 0 < mask_min <= mask_max < 1")
        shares(self, "paragraph_share document_share")


@dataclass
class DistillConfig(DocumentConfig):
    """A text encoder (n_layer, n_head, n_embd) that learns the outputs of a larger one on the same documents, by whose
    tokenizer it reads them."""

    teacher: str = ""  # run folder of the teacher: T-JEPA, or itself distilled
    teacher_dim: int = 0  # its width; the run stores it
    world: str = ""  # hash of its weights; the run stores it

    def __post_init__(self):
        super().__post_init__()
        check(self, "teacher", bool(self.teacher), "give the teacher's run folder")
        check(self, "init_from", self.init_from in ("", "random"),
              "a student starts from fresh weights, leave it out")


@dataclass
class AnswerConfig(TextConfig):
    """T-JEPA, phase 2: a Speaker (n_layer, n_head, n_embd) on an encoder learns to answer questions."""

    read_weight: ClassVar[float] = 0.0  # nothing is read but what the encoder thinks
    offsets: ClassVar[bool] = False
    use_z: ClassVar[bool] = True
    use_prediction: ClassVar[bool] = True

    # init_from: a run whose encoder reads the questions, or `random`: one of the shape below
    train_encoder: bool = False  # the encoder learns too; with `random`: end to end
    encoder_n_layer: int = 4  # of the encoder; a run started from brings its own
    encoder_n_head: int = 4  # likewise
    encoder_n_embd: int = 256  # likewise
    encoder_block_size: int = 0  # longest row that the encoder was trained on; the run stores it
    context_dim: int = 0  # the encoder's width; the run stores it
    answer_text: Literal["solution", "final"] = "solution"  # what is written: the worked solution, or its last line
    world: str = ""  # hash of the weights that the encoder came from; the run stores it

    def __post_init__(self):
        super().__post_init__()
        check(self, "init_from", bool(self.init_from), "give the run folder of an encoder, or random")


# fields that a run takes over from the one it starts from: they say which weights there are and what they mean
NETWORK = {
    NanoJEPAConfig: """tokenizer vocab_size block_size n_layer n_head n_embd answer_context pooling standardize_target
                       target_encoder""".split(),
    RJEPAConfig: """n_layer n_head n_embd predictor_n_layer predictor_n_embd target_positions""".split(),
    TJEPAConfig: """tokenizer vocab_size n_layer n_head n_embd predictor_n_layer predictor_n_embd head""".split(),
}


def check(config, name: str, ok: bool, rule: str):
    """Raises ValueError naming the field, its value and the rule it breaks."""
    if not ok:
        raise ValueError(f"--{name} {getattr(config, name)}: {rule}")


def need(module: str, package: str):
    """A module that not everybody has. Raises ValueError saying what to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"this needs {package}: pip install {package}") from None


def every(ok, rule: str):
    """A function that checks several fields of a config, their names in one text."""
    return lambda config, names: [check(config, name, ok(getattr(config, name)), rule) for name in names.split()]


positive = every(lambda value: 0 < value < float("inf"), "must be positive and finite")
not_negative = every(lambda value: 0 <= value < float("inf"), "must not be negative, but finite")
shares = every(lambda value: 0 <= value <= 1, "must lie in [0, 1]")


RJEPA_SMALL = RJEPAConfig(
    layer=22, pooling="mean", dropout=0.2, lambda_margin=1.0, lambda_variance=0.1, ema_start=0.98, ema_end=0.999,
    batch_size=128, epochs=4.0, weight_decay=0.05, eval_every=200, save_every=200,
)  # fmt: skip
TJEPA_SMALL = TJEPAConfig(
    tokenizer="bpe", vocab_size=2048, block_size=256, n_layer=4, n_head=4, n_embd=256, predictor_n_layer=2,
    predictor_n_embd=128, batch_size=16, epochs=2.0, weight_decay=0.05, eval_every=250, save_every=500,
)  # fmt: skip
PRESETS = {
    # any machine, no download, minutes: what `python train.py` runs
    "quickstart": NanoJEPAConfig(
        dataset="synthetic", n_synthetic=6000, max_problem_steps=4, tokenizer="bpe", vocab_size=768,
        n_layer=3, n_head=4, n_embd=128, dropout=0.0, answer_context="question", epochs=2.5, lr=2e-3,
        eval_every=100, save_every=50,
    ),
    # the published shape on GSM8K: about 45 M parameters, for a GPU
    "nanojepa": NanoJEPAConfig(lr=6e-4),
    # the same experiment for a CPU: about 3 M parameters
    "nanojepa-small": NanoJEPAConfig(
        tokenizer="bpe", vocab_size=2048, n_layer=3, n_head=4, n_embd=256, dropout=0.0, eval_every=500, save_every=500,
    ),
    # the world in which everything can be checked: synthetic problems, retrieval and gap on held-out graphs
    "nanojepa-synthetic": NanoJEPAConfig(
        dataset="synthetic", n_synthetic=30_000, tokenizer="bpe", vocab_size=1024, n_layer=3, n_head=4, n_embd=256,
        dropout=0.0, answer_context="question", epochs=2.0, eval_every=250,
    ),
    # a plain chain-of-thought LM on synthetic problems: the LLM where no other is at hand
    "student": NanoJEPAConfig(
        dataset="synthetic", n_synthetic=400_000, tokenizer="bpe", vocab_size=2048, n_layer=6, n_head=8, n_embd=512,
        dropout=0.0, lambda_jepa=0.0, answer_context="question", epochs=2.0, batch_size=128,
    ),
    "student-small": NanoJEPAConfig(
        dataset="synthetic", n_synthetic=200_000, max_problem_steps=4, tokenizer="bpe", vocab_size=1024, n_layer=4,
        n_head=6, n_embd=192, dropout=0.0, lambda_jepa=0.0, answer_context="question", epochs=1.0, batch_size=48,
        lr=2e-3,
    ),
    # the world model over an LLM's hidden states: 4096-d latents, about 684 M parameters with the EMA copy, one GPU.
    # Layer, pooling and EMA as they worked on SmolLM2 (22 of 30 layers); not trained to an end yet.
    # Without the energy margin, which makes a step dearer: --lambda_margin 1 --lambda_variance 0.1 --dropout 0.2
    "rjepa": RJEPAConfig(
        llm="Qwen/Qwen3-8B", layer=26, pooling="mean", dim=4096, n_layer=6, n_head=16, n_embd=2048,
        predictor_n_layer=4, predictor_n_embd=1024, batch_size=256, lr=3e-4, weight_decay=0.05, ema_start=0.98,
        ema_end=0.999,
    ),
    # the same for SmolLM2-135M on a CPU, with the energy margin: what finds right solutions best (LOG.md)
    "rjepa-small": RJEPA_SMALL,
    # a world model over this project's own LLM, that of `python train.py student-small`
    "rjepa-student": RJEPAConfig(
        dataset="synthetic", n_synthetic=9000, max_problem_steps=4, llm="out/student-small", batch_size=128,
        epochs=15.0, weight_decay=0.05, eval_every=200, save_every=200,
    ),
    # rjepa-small for the latents of another LLM: new adapters, all else as it was
    "rjepa-calibrate": dataclasses.replace(
        RJEPA_SMALL, layer=-2, init_from="out/rjepa-small", adapters_only=True, epochs=12.0,
    ),
    # NUDGE's head and PLAN's Speaker, for the R-JEPA run that --init_from names
    "rjepa-guide": GuideConfig(
        init_from="out/rjepa-small", batch_size=8, epochs=1.0, weight_decay=0.01, eval_every=100, val_problems=64,
    ),
    "rjepa-speak": SpeakConfig(init_from="out/rjepa-small", batch_size=64, epochs=10.0, eval_every=200),
    # T-JEPA: about 100 M parameters that are trained, GPT-2 BPE; meant for one GPU with 12 GB
    "tjepa": TJEPAConfig(batch_size=16, grad_accum=2, lr=6e-4, epochs=40.0, weight_decay=0.05),
    # the same for a CPU
    "tjepa-small": TJEPA_SMALL,
    # the same behind a head, where 60 % of the variance is which document a token is of: more to predict (RESULTS.md)
    "tjepa-document": dataclasses.replace(
        TJEPA_SMALL, head=True, document_share=0.6, lambda_variance=1.0, lambda_covariance=0.0, ema_start=0.98,
        ema_end=0.998,
    ),
    # a student of half the width learns its outputs; then a Speaker learns to answer questions through either
    "tjepa-distill": DistillConfig(
        teacher="out/tjepa-small", block_size=256, n_layer=4, n_head=4, n_embd=128, batch_size=16, epochs=2.0,
        weight_decay=0.05, eval_every=250, save_every=500,
    ),
    "tjepa-speak": AnswerConfig(
        init_from="out/tjepa-small", tokenizer="bpe", vocab_size=2048, block_size=512, n_layer=3, n_head=4, n_embd=256,
        dropout=0.1, batch_size=32, epochs=4.0, eval_every=250, save_every=500,
    ),
}


def pick_preset(name: str):
    """A fresh copy of a preset. Raises SystemExit naming the nearest one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise SystemExit(f"unknown preset '{name}'.{hint} Presets: {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name])


@contextlib.contextmanager
def plain_errors():
    """What is wrong with what a script was given ends it in one line, without a traceback. Stands before a `main`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output has enough of it (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def parse_cli(argv: list[str]):
    """[PRESET] --field value ... -> (preset name, config). Prints what differs from the preset."""
    import tyro

    if argv in (["-h"], ["--help"]):
        print(f"train.py PRESET --field value; presets: {', '.join(PRESETS)}\n")
    name, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("quickstart", argv)
    base = pick_preset(name)
    config = tyro.cli(type(base), default=base, args=rest, prog=f"train.py {name}")
    changed = diff(base, config)
    print(f"preset {name}" + (", with " + ", ".join(f"{k}={v}" for k, (_, v) in changed.items()) if changed else ""),
          file=sys.stderr)
    return name, config


def diff(a, b) -> dict:
    """{field: (value in a, value in b)} where two configs of one class differ."""
    a, b = dataclasses.asdict(a), dataclasses.asdict(b)
    return {k: (a[k], b[k]) for k in a if a[k] != b[k]}


def to_json(config, preset: str) -> str:
    """The text of config.json: the preset, the class and every field."""
    return json.dumps({"preset": preset, "job": type(config).__name__, **dataclasses.asdict(config)}, indent=2)


def from_json(text: str, where: str):
    """(preset, config) from the text of config.json. Raises ValueError naming `where` and the key at fault."""
    try:
        fields = json.loads(text)
        preset, job = fields.pop("preset"), fields.pop("job")
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{where} is not a run's config.json ({error!r})") from None
    jobs = {type(config).__name__: type(config) for config in PRESETS.values()}
    if not isinstance(job, str) or job not in jobs:
        raise ValueError(f"{where}: unknown job '{job}'; this version knows {', '.join(jobs)}")
    names = {f.name for f in dataclasses.fields(jobs[job])}
    if unknown := sorted(set(fields) - names):
        raise ValueError(f"{where}: unknown fields {', '.join(unknown)} (written by another version?)")
    try:
        config = jobs[job](**fields)
        if new := sorted(names - set(fields)):  # fields that are newer than the run
            print(f"{where} lacks " + ", ".join(f"{name}, taken as {getattr(config, name)!r}" for name in new),
                  file=sys.stderr)
        return preset, config
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
