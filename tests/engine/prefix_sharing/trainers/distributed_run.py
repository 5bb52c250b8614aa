"""One process of a distributed run: `torchrun -m ... FOLDER ddp|packed|fsdp2 PROCESSES`.

The first process writes the final weights and what was logged to FOLDER/result.pt.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast
from trl.trainer.dpo_config import DPOConfig

from longshadow import PrefixSharingDPOTrainer, share_prefixes
from tests.engine.prefix_sharing.batches import pad, pairs
from tests.engine.prefix_sharing.trainers.runs import STEPS, model_of

NUM_PAIRS = 16
RESULT = "result.pt"


def train_pairs(folder: Path, packed: bool, processes: int) -> None:
    """Three steps over eight pairs each, however many processes have them."""
    torch.manual_seed(1)
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    trainer = PrefixSharingDPOTrainer(
        model=model_of("llama", torch.float32),
        ref_model=model_of("llama", torch.float32),
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=8 // processes,
            max_steps=STEPS,
            learning_rate=0.1,
            optim="sgd",
            logging_steps=1,
            report_to=[],
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            dataset_num_proc=None,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        packing_tokens=150 if packed else None,
    )
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    assert trainer.policy_sharing.shared_batches >= STEPS and not trainer.policy_sharing.ordinary_batches
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        weights = {name.removeprefix("module."): tensor.cpu() for name, tensor in state.items()}
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"weights": weights, "logged": logged}, folder / RESULT)


def train_fully_sharded(folder: Path, processes: int) -> None:
    """Three steps of plain PyTorch on the rows of a batch, each process its share, weights sharded by FSDP2."""
    torch.manual_seed(1)
    model = model_of("llama", torch.float32)
    ids, mask = pad(pairs(vocabulary=190))
    rank = 0
    if processes > 1:
        # Accelerate, and with it TRL's trainers, has FSDP on GPUs only.
        torch.distributed.init_process_group("gloo")
        rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (processes,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
    mine = torch.arange(len(ids)).view(2, 3)[:, rank::processes].flatten()  # whole pairs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    logged = []
    with share_prefixes(model) as report:
        for step in range(STEPS):
            if step == 1:
                # Of another kind for one process, and not shared by another: the comparison needs both.
                others = torch.arange(4 if rank else 1)[:, None] * (ids[:1] * 0 + 1) + 5
                others[:, :45] = 5
                model(input_ids=others).logits.sum().backward()
                optimizer.zero_grad()
            logits = model(input_ids=ids[mine], attention_mask=mask[mine]).logits
            logps = logits.log_softmax(-1)[:, :-1].gather(2, ids[mine, 1:, None]).squeeze(2) * mask[mine, 1:]
            # FSDP averages over processes, which have different numbers of pairs.
            loss = -logps.sum() / 100 * processes
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            logged.append({"loss": float(loss)})
    assert report.shared_batches == STEPS + (rank > 0) and report.verified_kinds == 1 + (rank > 0), report.reasons
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    if rank == 0:
        torch.save({"weights": {name: p.detach() for name, p in weights.items()}, "logged": logged}, folder / RESULT)


def write_rows(folder: Path, tokenizer: Any) -> None:
    """What all processes read."""
    chance = random.Random(0)

    def text(shortest: int, longest: int) -> str:
        return " ".join(f"w{chance.randrange(190)}" for _ in range(chance.randint(shortest, longest)))

    rows = [
        {"prompt": text(20, 60) + " ", "chosen": text(3, 30) + " <eos>", "rejected": text(3, 30) + " <eos>"}
        for _ in range(NUM_PAIRS)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    tokenizer.save_pretrained(folder / "tokenizer")


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, kind, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if kind == "fsdp2":
        train_fully_sharded(place, number)
    else:
        train_pairs(place, kind == "packed", number)
    if number > 1:
        torch.distributed.barrier()
        # Ending gloo's threads in order aborts now and then in torch 2.13; nothing is left to be done.
        os._exit(0)
