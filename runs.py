"""Run folders: what a run writes, how it is loaded, on which device; used by every script.

    python runs.py --run out/rjepa-small --folder pretrained/rjepa-smollm2      # what is needed to use it, in bf16
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import config as cfg
import data
import latents
from model import RJEPA, TJEPA, DistilledEncoder, Guidance, NanoJEPA, Speaker, SpeakingTJEPA, TextEncoder

# ----------------------------------------------------------------------------- devices


def pick_device(name: str = "auto") -> str:
    """cuda, mps or cpu, in this order, unless a name is given. Raises ValueError for one this machine lacks."""
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(name: str, device: str) -> torch.dtype:
    """bf16 where the hardware computes in it, otherwise fp32."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def autocast(device: str, dtype: torch.dtype):
    """The context in which matrix products are made in dtype."""
    return torch.autocast(device.split(":")[0], dtype) if dtype != torch.float32 else contextlib.nullcontext()


def pick_compile(choice: str, device: str) -> bool:
    """Whether to torch.compile; says why."""
    use = choice == "on" or (choice == "auto" and device.startswith("cuda"))
    why = "asked for" if choice != "auto" else "pays on CUDA" if use else f"on {device} eager is as fast"
    say(f"compile {'on, the first steps take a minute or more' if use else 'off'}: {why}")
    return use


def say(*text):
    """Prose of rank 0, on stderr."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def processes(device: str):
    """(rank, number of processes) under torchrun, (0, 1) without; joins their group, and leaves it if all went well.

    With several GPUs `cuda` is from then on the one of this process. A process waits two hours at most for the others:
    torchrun notices one that has died, but not one that hangs.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    joins = world > 1 and not dist.is_initialized()
    if joins:
        if device.startswith("cuda:"):
            raise ValueError(f"--device {device} under torchrun: give cuda, each process has a GPU of its own")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun keeps its store: no addresses of those who died
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=2),
                                store=store, rank=rank, world_size=world)
    yield rank, world
    if joins:
        dist.destroy_process_group()


def leave():
    """Ends a process of torchrun whose work is done, at once; every `main` that uses `processes` ends with it.

    Without it, a gloo thread that still frees a tensor while Python shuts down would abort the process.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


def is_restart() -> bool:
    """Whether torchrun (--max-restarts) or Slurm (--requeue) has started this job before."""
    return any(int(os.environ.get(name, 0)) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def add_up(value: float = 0) -> float:
    """The sum over all processes, once each has come here. Raises SystemExit if one of them has ended before that."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    try:
        dist.all_reduce(total)
    except RuntimeError:
        raise SystemExit("another process has stopped (see its message); the same command goes on from here") from None
    return float(total)


# ----------------------------------------------------------------------------- run folders

PLOTS = {  # file: the field of log.jsonl that it shows, the label of the axis, the controls beside it
    "token_loss_curve.png": ("lm_loss", "token loss (nats)", {}),
    "jepa_loss_curve.png": ("jepa_loss", "1 - cos(pred, answer)", {"predict_mean_loss": "best constant"}),
    "l1_curve.png": ("l1", "L1 of hidden steps", {"l1_predict_mean": "constant", "l1_copy": "copy a neighbour"}),
    "mse_curve.png": ("mse", "squared error of hidden tokens",
                      {"mse_predict_mean": "constant", "mse_copy": "copy a neighbour",
                       "mse_document_mean": "mean of the visible tokens"}),
    "ce_curve.png": ("ce", "cross-entropy under NUDGE (nats)", {"ce_llm": "the LLM alone", "ce_shuffled": "of others"}),
    "rank_curve.png": ("effective_rank", "effective rank", {"target_effective_rank": "targets"}),
}  # fmt: skip
RUN_FILES = ["model.safetensors", "config.json", "state.pt", "log.jsonl", "tokenizer.tiktoken", *PLOTS]


@contextlib.contextmanager
def lock(folder: Path, option: str):
    """Makes the folder and holds its .lock, so that no two runs write there (under torchrun rank 0 holds it).

    It is a lock of the operating system: a process that is killed holds nothing. If what is done under it fails, a
    folder or file .lock that is new goes again: a refused folder stays as it was. Raises SystemExit naming the option
    to change.
    """
    from filelock import FileLock, Timeout

    if int(os.environ.get("RANK", 0)):
        add_up()  # rank 0 holds it, or has been refused
        yield
        return
    was_there, was_locked = folder.exists(), (folder / ".lock").exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / ".lock")
        held.acquire(timeout=60 if is_restart() else 0)  # a file server may take a while to miss who died
    except Timeout:
        raise SystemExit(f"{folder}: another process is writing there. Wait for it, or choose another {option}"
                         ) from None
    except OSError as error:
        raise SystemExit(f"{option} {folder} cannot be written to ({error.strerror}), or not be locked: choose another"
                         ) from None
    try:
        add_up()
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if not was_locked:
                (folder / ".lock").unlink()
            if not was_there:
                folder.rmdir()  # unless it holds something
        raise
    finally:
        held.release()


def write_atomic(path: Path, write):
    """write(temporary path), then fsync and rename: `path` holds the old content or the new, never a part.

    Raises OSError that names the path where the disk is full or cannot be written to; nothing is left of the attempt.
    """
    from safetensors import SafetensorError

    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = (path if path.exists() else temporary).stat().st_mode  # safetensors' files are for the user alone
        write(temporary)
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # the folder too, where possible: a power cut must not undo the renaming
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder), os.close(folder)
    except Exception as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):  # the last two: of torch.save and safetensors
            raise not_written(path, error) from error
        raise


def write_text(path: Path, text: str):
    write_atomic(path, lambda temporary: temporary.write_text(text))


def write_jsonl(path: Path, rows: list):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def not_written(path: Path, error: Exception) -> OSError:
    why = getattr(error, "strerror", None) or str(error)[:200]
    return OSError(f"{path} could not be written ({why}); nothing of what was there is lost. Make room, or check its "
                   "rights, and run the same command again")


def append_line(path: Path, row: dict):
    """Adds a line to a jsonl file: whole or, on a full disk, not at all. A kill may leave half a line, which readers of
    such files drop."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as f:
            f.write(json.dumps(row) + "\n")
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise not_written(path, error) from error


def build_model(config) -> torch.nn.Module:
    """The model that a config describes, with fresh weights."""
    return {cfg.NanoJEPAConfig: NanoJEPA, cfg.RJEPAConfig: RJEPA, cfg.GuideConfig: Guidance,
            cfg.SpeakConfig: Speaker, cfg.TJEPAConfig: TJEPA, cfg.DistillConfig: DistilledEncoder,
            cfg.AnswerConfig: SpeakingTJEPA}[type(config)](config)


def is_run(folder) -> bool:
    """Whether a folder is a run of this project, not a Hugging Face model's or none at all."""
    path = Path(folder) / "config.json"
    return path.is_file() and '"job"' in path.read_text()


def prompt_text(prompt: str) -> str:
    """--prompt itself, or what the file of that name holds."""
    is_file = "{question}" not in prompt and os.path.isfile(prompt)  # unlike Path, of any length
    return Path(prompt).read_text() if is_file else prompt


def llm_label(config, folder: str = "") -> str:
    """The part of a cache's name that says which LLM made it: its name and a hash of prompt and weights.

    folder: where the LLM lies, if not under its name; the weights count only if they are on this machine.
    """
    name, folder = "".join(c if c.isalnum() or c in "-." else "-" for c in config.llm), folder or config.llm
    files = [Path(folder)] if Path(folder).is_file() else sorted(Path(folder).glob("*.safetensors"))
    of_files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]  # a fine-tune may have its base's name
    weights = weights_digest(folder) if is_run(folder) else digest(str(of_files)) if files else ""
    more = [x for x in (prompt_text(config.prompt), weights) if x]
    return f"{name}-{digest(json.dumps(more))[:6]}" if more else name


def load_config(folder, kind=cfg.RunConfig, fault: str = "") -> tuple:
    """(preset, config) of a finished run folder, without its weights. Raises as load_run does."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist: {folder} is no finished run of train.py "
                                    "(the command that started a run also finishes it)")
    path = folder / "config.json"
    preset, config = cfg.from_json(path.read_text("utf-8", "replace"), str(path))  # damage is found there
    if not isinstance(config, kind):
        raise ValueError(f"{folder} is a run of preset '{preset}', {fault}")
    return preset, config


def load_run(folder, device: str = "auto", kind=cfg.RunConfig, fault: str = ""):
    """(model in eval mode, config) of any run folder, strictly: every weight present, none left over.

    The run's preset becomes model.preset. Raises FileNotFoundError or ValueError that names the file at fault, or ends
    with `fault` where the config is not of the given kind.
    """
    from safetensors import SafetensorError

    folder = Path(folder)
    preset, config = load_config(folder, kind, fault)
    model = build_model(config)
    try:
        model.load_state_dict(read_weights(folder / "model.safetensors"), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / 'model.safetensors'} does not hold this run's weights: {error}") from None
    model.preset = preset
    return model.to(pick_device(device)).eval(), config


def write_weights(path: Path, weights: dict[str, torch.Tensor]):
    from safetensors.torch import save_file

    write_atomic(path, lambda temporary: save_file(weights, temporary, {"sha256": latents.digest(weights, {})}))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of model.safetensors. Raises ValueError where they do not have the checksum of its header."""
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        weights, header = {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}
    if header.get("sha256", "") not in ("", latents.digest(weights, {})):
        raise ValueError(f"{path} is damaged: its tensors do not have the checksum of its header")
    return weights


ADAPTERS = ("w_in.", "w_in_target.", "w_out.", "h_mean", "h_std", "quantiles")  # what of an RJEPA belongs to one LLM
NO_TEXT = "not of T-JEPA (train.py tjepa-small)"


def inherit(config):
    """Sets the fields (network, tokenizer) that follow from the run which config.init_from or config.teacher names.

    Raises ValueError for a run of another job.
    """
    source = getattr(config, "teacher", config.init_from)
    if isinstance(config, (cfg.DistillConfig, cfg.AnswerConfig)) and source != "random":
        _, theirs = load_config(source, cfg.TextConfig, NO_TEXT)
        config.tokenizer, config.vocab_size = theirs.tokenizer, theirs.vocab_size
        if isinstance(config, cfg.AnswerConfig):
            config.encoder_n_layer, config.encoder_n_head, config.encoder_n_embd = encoder_shape(theirs)
            config.encoder_block_size = encoder_block_size(theirs)
        elif not config.text and getattr(theirs, "text", ""):
            config.text, config.text_field = theirs.text, theirs.text_field
            say(f"the teacher's documents: --text {config.text}")
    elif type(config) in cfg.NETWORK and config.init_from:
        _, theirs = load_config(config.init_from, type(config), "another kind of model than --init_from needs here")
        for name in cfg.NETWORK[type(config)]:
            if (ours := getattr(config, name)) != getattr(theirs, name):
                say(f"--init_from {config.init_from} decides: {name} = {getattr(theirs, name)}, not {ours}")
                setattr(config, name, getattr(theirs, name))


def start_from(model, config):
    """Loads the weights of the run that config.init_from names; without its adapters if config.adapters_only."""
    source, theirs = load_run(config.init_from, "cpu")
    weights, adapters_only = source.state_dict(), getattr(config, "adapters_only", False)
    if adapters_only:
        weights = {k: v for k, v in weights.items() if not k.startswith(ADAPTERS)}
    elif isinstance(config, cfg.RJEPAConfig):
        ours = {k: getattr(config, k) for k in latents.SAME_LLM} | {"weights": config.llm_weights}
        latents.check_same_llm(theirs, ours, f"--init_from {config.init_from} (rjepa-calibrate: another LLM)")
    left = model.load_state_dict(weights, strict=not adapters_only)
    assert all(k.startswith(ADAPTERS) for k in left.missing_keys) and not left.unexpected_keys


def load_encoder(folder, device: str = "auto"):
    """(TextEncoder in eval mode, config, tokenizer) of any T-JEPA run: pre-trained, distilled or with a Speaker."""
    model, config = load_run(folder, device, cfg.TextConfig, NO_TEXT)
    encoder = TextEncoder(config.vocab_size, *encoder_shape(config)).eval().requires_grad_(False)
    encoder.load_state_dict(model.encoder_weights())
    return encoder.to(pick_device(device)), config, load_tokenizer(folder, config)


def encoder_shape(config) -> tuple[int, int, int]:
    """(n_layer, n_head, n_embd) of the text encoder that a run of T-JEPA holds."""
    prefix = "encoder_" if isinstance(config, cfg.AnswerConfig) else ""
    return tuple(getattr(config, prefix + name) for name in ("n_layer", "n_head", "n_embd"))


def encoder_block_size(config) -> int:
    """Tokens in the longest row that a run's text encoder was trained on."""
    return getattr(config, "encoder_block_size", 0) or config.block_size


def digest_file(path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def weights_digest(folder) -> str:
    """Hash of a run's weights: what was made for them keeps it, to recognise them."""
    return digest_file(Path(folder) / "model.safetensors")[:16]


def load_tokenizer(folder, config) -> data.Tokenizer:
    """The tokenizer of a run: its own BPE, or GPT-2's."""
    path = Path(folder) / "tokenizer.tiktoken"
    tokenizer = data.gpt2_tokenizer() if config.tokenizer == "gpt2" else data.load_bpe(path)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"{path} holds {tokenizer.vocab_size} ids, config.json says {config.vocab_size}: damaged")
    return tokenizer


# fields that may differ when a run is continued; those from `latents` on follow from what the job's identity covers
FREE_ON_RESUME = set("""out_dir overwrite device threads log_every save_every data_dir vocab_size shard grad_accum
                        latents llm layer pooling prompt dim llm_weights
                        z_dim h_dim context_dim teacher_dim world""".split())


def is_foreign(name: str) -> bool:
    """False for files that any folder may hold: its lock, and what a kill left half-written (NAME.tmp by
    write_atomic, .tmpNAME by safetensors)."""
    return name != ".lock" and not name.endswith(".tmp") and not name.startswith(".tmp")


def refuse_foreign(folder: Path, overwrite: bool):
    """SystemExit for a folder that is not a run's but holds files, or for a file."""
    if folder.exists() and not folder.is_dir():
        raise SystemExit(f"--out_dir {folder} is a file: choose a folder")
    here = {p.name.removesuffix(".tmp") for p in folder.iterdir()} if folder.is_dir() else set()
    if not overwrite and "config.json" not in here and any(map(is_foreign, here - {*RUN_FILES})):
        raise SystemExit(f"{folder} holds files but no config.json: not a run of train.py. "
                         f"Choose another --out_dir, or --overwrite to write into it")


def open_run(folder: Path, config) -> dict | None:
    """Looks at a run folder: None to start in it, or the training state to continue from. Changes nothing.

    Raises SystemExit for a finished run, another run's folder or a damaged state. --overwrite starts again: it replaces
    this project's files, once all else is ready, and leaves all others.
    """
    if config.overwrite:
        return None
    if (folder / "config.json").exists():
        try:
            old_preset, old = cfg.from_json((folder / "config.json").read_text(), str(folder / "config.json"))
        except ValueError as error:
            raise SystemExit(f"{error}. Choose another --out_dir, or --overwrite") from None
        if type(old) is not type(config):
            raise SystemExit(f"{folder} is a run of preset '{old_preset}'. Choose another --out_dir, or --overwrite")
        free = FREE_ON_RESUME | {"dataset" if isinstance(config, cfg.RJEPAConfig) else ""}  # follows from the latents
        refuse_changes(folder, {k: v for k, v in cfg.diff(old, config).items() if k not in free})
    if not (folder / "state.pt").exists():
        return None  # killed before the first checkpoint
    try:
        with zipfile.ZipFile(folder / "state.pt") as archive:
            if bad := archive.testzip():  # torch.load does not look at checksums
                raise ValueError(f"the checksum of {bad} is wrong")
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        missing = {"step", "n_steps", "identity", "shards" if "shards" in state else "tensors"} - set(state)
    except Exception as error:  # zip, unpickling and end-of-file errors, by the kind of damage
        raise SystemExit(f"{folder / 'state.pt'} is damaged ({type(error).__name__}: {str(error)[:200]}). "
                         f"Nothing was changed; --overwrite starts again") from None
    if missing:
        raise SystemExit(f"{folder / 'state.pt'} is not a training state (without {', '.join(sorted(missing))})")
    if state["step"] >= state["n_steps"]:
        raise SystemExit(f"{folder} is finished ({state['step']} steps). Choose another --out_dir, or --overwrite")
    return state


def refuse_changes(folder: Path, changed: dict):
    """SystemExit that lists {name: (there, here)} unless it is empty."""
    if changed:
        what = ", ".join(f"{k}: {a} there, {b} here" for k, (a, b) in changed.items())
        raise SystemExit(f"{folder} is a run with other settings ({what}). Choose another --out_dir, or --overwrite")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of_list(rows) -> str:
    """`digest` of a list's JSON, made row by row: that of all token ids of a data set would take gigabytes."""
    total = hashlib.sha256(b"[")
    for i, row in enumerate(rows):
        total.update((", " * (i > 0) + json.dumps(row)).encode())
    total.update(b"]")
    return total.hexdigest()[:16]


def tokenizer_digest(tokenizer) -> str:
    return digest(repr(sorted(tokenizer.ranks.items())))


def save_plots(folder: Path):
    """A picture of each loss that log.jsonl has, over the steps."""
    from matplotlib.figure import Figure

    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for name, (key, title, controls) in PLOTS.items():
        if not any(key in row for row in log):
            continue
        fig = Figure(figsize=(7, 4))
        ax = fig.subplots()
        for split, k, label in [("train", key, "train"), ("val", key, "val"),
                                *(("val", k, f"val, {label}") for k, label in controls.items())]:
            if points := [(r["step"], r[k]) for r in log if r["split"] == split and k in r]:
                ax.plot(*zip(*points, strict=True), label=label, linestyle=":" if k != key else None,
                        marker="." if split == "val" and k == key else None)
        ax.set(xlabel="step", ylabel=title)
        ax.grid(alpha=0.3)
        ax.legend()
        fig.tight_layout()
        fig.savefig(folder / name, dpi=110)


def publish(run: str, folder: str, llm: str = "", overwrite: bool = False) -> dict:
    """Copies what is needed to use a finished run, its matrices in bf16 -> {"folder", "bytes"}; `python runs.py`.

    llm: the name of an R-JEPA's LLM from now on. A guide or Speaker is tied to the R-JEPA beside `folder`.
    """
    run, folder = Path(run), Path(folder)
    preset, config = load_config(run)
    here = {p.name for p in folder.iterdir()} if folder.exists() else set()
    if here - {*RUN_FILES, "rerank.json"} or (here and not overwrite):
        raise ValueError(f"{folder} is not empty: choose another folder, or --overwrite (the files of a run alone)")
    config.out_dir, config.data_dir = str(folder), ""
    if isinstance(config, cfg.RJEPAConfig):
        config.latents = config.held_out = ""
        if llm:
            config.llm, config.llm_weights = str(Path(llm)), weights_digest(llm) if is_run(llm) else ""
    if isinstance(config, (cfg.GuideConfig, cfg.SpeakConfig)):
        config.init_from = str(folder).rpartition("-")[0]
        config.world = weights_digest(config.init_from)
    matrices = {name for name, p in build_model(config).named_parameters() if p.dim() > 1}
    weights = {k: v.bfloat16() if k in matrices else v for k, v in read_weights(run / "model.safetensors").items()}
    write_weights(folder / "model.safetensors", weights)
    write_text(folder / "config.json", cfg.to_json(config, preset) + "\n")
    if (run / "tokenizer.tiktoken").is_file():
        shutil.copyfile(run / "tokenizer.tiktoken", folder / "tokenizer.tiktoken")
    load_run(folder, "cpu")
    return {"folder": str(folder), "bytes": sum(p.stat().st_size for p in folder.iterdir())}


if __name__ == "__main__":
    import tyro

    with cfg.plain_errors():
        print(json.dumps(tyro.cli(publish)))
