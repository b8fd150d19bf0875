"""One of the processes of ``memory.py``: trains a small Llama with both optimizers, and says whether processes agree.

torchrun --nproc_per_node 2 -m gpu_parts.one_of_many gloo cuda 8
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback

from hf_elra import ElraTrainer, ElraTrainingArguments
from hf_elra.trainer.leaving import leave, part
from lib.many_processes import flat_weights, same_everywhere


class Watch(TrainerCallback):
    """Counts the updates after which processes differ."""

    differing = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if dist.is_initialized():
            self.differing += not same_everywhere(flat_weights(kwargs["model"]))


def main(backend: str, device: str, batch: str) -> None:
    """Train 20 updates with each optimizer."""
    if device == "cuda":
        os.environ["LOCAL_RANK"] = "0"  # all on the one device
        torch.cuda.set_device(0)
    watch, norms = Watch(), []
    for optim in ("elra", "elra_spectral"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=32, tie_word_embeddings=True,
            )
        )  # fmt: skip
        starts = torch.randint(0, 64, (320, 1), generator=torch.Generator().manual_seed(0))
        data = [{"input_ids": row, "labels": row} for row in (starts + torch.arange(32)) % 64]
        with tempfile.TemporaryDirectory() as folder:
            arguments = ElraTrainingArguments(
                folder, optim=optim, per_device_train_batch_size=int(batch), max_steps=20, logging_steps=5,
                elra_batch_control="off", save_strategy="no", report_to="none", disable_tqdm=True, ddp_backend=backend,
                use_cpu=device == "cpu", dataloader_pin_memory=False,
            )  # fmt: skip
            trainer = ElraTrainer(model, arguments, train_dataset=data, callbacks=[watch])
            trainer.pop_callback(PrinterCallback)
            trainer.train()
        norms.append(flat_weights(model).double().norm().item())
    if int(os.environ["RANK"]) == 0:
        print("weights", *(f"{norm:.9e}" for norm in norms), "differing", watch.differing, flush=True)
    part()
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
