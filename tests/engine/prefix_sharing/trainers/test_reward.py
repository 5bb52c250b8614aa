"""Reward models, whose head pools one position of each row, under `share_prefixes`."""

from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

from longshadow import share_prefixes
from tests.engine.prefix_sharing.trainers.runs import CONFIGS, STEPS, assert_same, trl


@pytest.mark.slow
def test_reward_training_is_unchanged(tokenizer: Any, preferences: Any, tmp_path: Any) -> None:
    def train(share: bool) -> Any:
        torch.manual_seed(1)
        config = CONFIGS["llama"]()
        config.num_labels = 1
        model = LlamaForSequenceClassification._from_config(config, attn_implementation="sdpa", dtype=torch.float64)
        arguments = trl.RewardConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=STEPS,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = trl.RewardTrainer(model=model, args=arguments, train_dataset=preferences, processing_class=tokenizer)
        if share:
            with share_prefixes(trainer.model) as report:
                trainer.train()
            assert report.shared_batches >= STEPS and not report.ordinary_batches, report.reasons
        else:
            trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        return logged, {name: p.detach() for name, p in trainer.model.named_parameters()}

    assert_same(train(True), train(False))
