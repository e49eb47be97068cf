"""TRL's DPOTrainer at the settings that suit a CPU: precomputed reference, no recompute, one pair a pass (padding costs more)."""

import tempfile
import time

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from torch_peer import DTYPES
from workload import BATCH


class Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


def train(folder, dtype, rows):
    """Seconds of all steps but the first. rows: prompt, chosen and rejected texts."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    say = lambda role, text: [{"role": role, "content": text}]
    data = Dataset.from_list(
        [{"prompt": say("user", r["prompt"]), "chosen": say("assistant", r["chosen"]), "rejected": say("assistant", r["rejected"])}
         for r in rows]
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output, use_cpu=True, bf16=False, per_device_train_batch_size=1, gradient_accumulation_steps=BATCH,
            num_train_epochs=1, learning_rate=5e-7, beta=0.1, precompute_ref_log_probs=True, gradient_checkpointing=False,
            max_length=None, save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]), args=config, train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[clock],
        )
        trainer.train()
    return clock.times[-1] - clock.times[0]
