"""Training by many processes: DDP or FSDP2 around a model, the state that a run is resumed from.

state.pt holds {"step", "n_steps", "identity"} and all tensors; of a sharded run it names a folder beside it instead, in
which every process has written its part as safetensors (torch.distributed.checkpoint). Either is read by any number of
processes, sharded or not.
"""

import contextlib
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from model import Block
from runs import add_up, digest_file, not_written, write_atomic


def wrap(model, world: int, shard: bool, device: str):
    """What is called in the model's place to train it: the model itself, in DDP, or with its blocks in FSDP2.

    A model to be sharded stays on the CPU until then: it may be more than a device holds.
    """
    if world == 1 or not shard:
        model.to(device)
        return model if world == 1 else torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device, (world,))
    for block in [part for part in model.modules() if isinstance(part, Block)]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def gathered(model):
    """In here methods of a sharded model other than `forward` work, too (its blocks still come and go one by one)."""
    is_sharded = hasattr(model, "unshard")
    if is_sharded:
        model.unshard()
    yield
    if is_sharded:
        model.reshard()


def sync_gradients(run_model, last: bool):
    """Context of a micro-batch's backward: the processes add up their gradients after the last one only."""
    if hasattr(run_model, "set_requires_gradient_sync"):
        run_model.set_requires_gradient_sync(last)
    elif not last and hasattr(run_model, "no_sync"):
        return run_model.no_sync()
    return contextlib.nullcontext()


def full(tensor) -> torch.Tensor:
    """A tensor that may be sharded, whole; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_tensors(into: dict, source: dict):
    """Copies whole tensors by name into tensors that may be sharded. Raises ValueError where names or shapes differ."""
    if wrong := into.keys() ^ source.keys():
        raise ValueError(f"{min(wrong)} is missing or left over")
    for name, tensor in into.items():
        value = source[name]
        if value.shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, not {tuple(tensor.shape)}")
        if isinstance(tensor, DTensor):
            value = value.to(tensor.device)
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(value)


# ----------------------------------------------------------------------------- the state


def state_tensors(model, optimizer, step: int) -> dict[str, torch.Tensor]:
    """Weights, buffers and AdamW's moments by name (DTensors where sharded); gives a new optimizer zero moments
    at `step`."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            moments = optimizer.state[p]
            if not moments:
                moments |= {"step": torch.tensor(float(step), device=p.device), "exp_avg": torch.zeros_like(p),
                            "exp_avg_sq": torch.zeros_like(p)}  # fmt: skip
            tensors |= {f"{key}.{name}": moments[key].detach() for key in ("exp_avg", "exp_avg_sq")}
    return tensors


def save_state(out: Path, model, optimizer, facts: dict):
    """Writes out/state.pt; called by every process, returns when it is there. facts: "step" and what else is kept."""
    rank, tensors = dist.get_rank() if dist.is_initialized() else 0, state_tensors(model, optimizer, facts["step"])
    if any(isinstance(t, DTensor) for t in tensors.values()):
        facts = facts | {"shards": save_shards(shard_folder(out, facts["step"]), tensors)}
    elif rank == 0:
        facts = facts | {"tensors": {name: t.cpu() for name, t in tensors.items()}}
    if rank == 0:
        write_atomic(out / "state.pt", lambda path: torch.save(facts, path))
        for folder in out.glob(STATE_FOLDERS):
            if "shards" not in facts or folder != shard_folder(out, facts["step"]):
                shutil.rmtree(folder, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()


STATE_FOLDERS = "state-" + 8 * "[0-9]"  # what shard_folder makes; all else is the user's


def shard_folder(out: Path, step: int) -> Path:
    return out / f"state-{step:08d}"


def save_shards(folder: Path, tensors: dict) -> dict:
    """Every process writes its part of the tensors into the folder -> {file in it: sha256}, on each of them."""
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save

    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0 and folder.exists():
        shutil.rmtree(folder)  # of a process that was killed while it wrote
    dist.barrier()
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise not_written(folder, list(error.failures.values())[0][0]) from None
    hashes = [None] * world
    dist.all_gather_object(hashes, {path.name: digest_file(path) for path in folder.glob(f"shard-{rank + 1:05d}-*")})
    return {name: value for part in hashes for name, value in part.items()}


def load_state(out: Path, model, optimizer, state: dict):
    """Copies what save_state wrote (`state` is its state.pt) into model and optimizer. ValueError names a bad file."""
    tensors = state_tensors(model, optimizer, state["step"])
    if "tensors" in state:
        try:
            copy_tensors(tensors, state["tensors"])
        except ValueError as error:
            raise ValueError(f"{out / 'state.pt'} does not fit this run: {error}") from None
        return
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

    folder = shard_folder(out, state["step"])
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    bad = [name for name, value in sorted(state["shards"].items())[rank::world]
           if not (folder / name).is_file() or digest_file(folder / name) != value]
    if add_up(len(bad)):
        raise ValueError(f"{folder / bad[0] if bad else folder} is missing or damaged, and state.pt needs it. Nothing "
                         "was changed; --overwrite starts again")
    reader = HuggingFaceStorageReader(str(folder))
    try:
        if left := reader.read_metadata().state_dict_metadata.keys() - tensors.keys():
            raise ValueError(f"{min(left)} is left over")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process alone
            load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder} does not fit this run: {str(error)[:300]}") from None
