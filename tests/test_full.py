"""Training all weights, or a base from scratch: the same engine and laws, an ordinary folder at the end."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefix_ds.config import parse_config
from prefix_ds.dist import joined_world
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.errors import RunError
from prefix_ds.loading import new_base
from prefix_ds.optim import adamw, learning_rate
from prefix_ds.train import _trained
from tests.ranks import on_ranks
from tests.test_laws import changed, metrics, reference_inputs, stop_after, strip_times, train_here
from tests.workshop import run_config, tokenizer


def full_config(folder, *overrides):
    return run_config(folder, "train.method=full", "train.lr=2e-3", *overrides)


def result_of(config):
    return AutoModelForCausalLM.from_pretrained(f"{config.run.folder}/model", dtype=torch.float32)


def reference_model(config):
    """Full fine-tuning written plainly: one process, one document at a time."""
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    optimizer = adamw(model.parameters(), config.train)
    batches, _ = reference_inputs(config)
    losses = []
    for step, batch in enumerate(batches):
        num_targets = sum(len(target) for _, target in batch)
        loss = sum(summed_nll(model, *example) for example in batch) / num_targets
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), config.train)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def summed_nll(model, prompt, target):
    logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    return -logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum()


@pytest.mark.parametrize("size", [1, 2])
def test_full_fine_tuning_in_shards_equals_plain_pytorch(tmp_path, size):
    config = full_config(tmp_path)
    on_ranks(size, train_here, config)
    expected, losses = reference_model(config)
    assert losses[-1] < losses[0] - 0.1
    assert [r["train/loss"] for r in metrics(config) if "train/loss" in r] == pytest.approx(losses, abs=1e-5)
    found = dict(result_of(config).named_parameters())
    for name, parameter in expected.named_parameters():
        difference = (found[name] - parameter).norm() / parameter.norm()
        assert difference < 1e-5, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_goes_on_as_if_never_stopped(tmp_path, dtype):
    config = full_config(tmp_path, f"model.dtype={dtype}")
    stopped = changed(config, f"run.folder={tmp_path}/stopped")
    on_ranks(2, train_here, config)
    on_ranks(2, stop_after, stopped, 3)
    with pytest.raises(RunError, match="was written by 2 ranks, here are 1"):
        on_ranks(1, train_here, stopped)
    on_ranks(2, train_here, stopped)
    assert strip_times(metrics(stopped)) == strip_times(metrics(config))
    for (name, one), (_, two) in zip(
        result_of(stopped).named_parameters(), result_of(config).named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name


def test_a_checkpoint_that_a_rank_cannot_write_leaves_nothing_behind(tmp_path):
    config = full_config(tmp_path)
    with pytest.raises(RunError, match="no room"):
        on_ranks(2, train_on_a_full_disk, config)
    assert not list((Path(config.run.folder) / "checkpoints").iterdir())


def train_on_a_full_disk(config):
    """Of the second rank."""
    from prefix_ds import memory

    write = memory.write_tensors

    def full(path, tensors):
        if path.name.startswith("rank-0001"):
            raise RunError(f"{path}: no room")
        return write(path, tensors)

    memory.write_tensors = full
    train_here(config)


def test_a_checkpoint_in_other_groups_of_weights_is_refused(tmp_path):
    config = full_config(tmp_path)
    on_ranks(1, stop_after, config, 3)
    settings = {"zero_optimization": {"stage": 3, "sub_group_size": 1000}}
    (tmp_path / "other.json").write_text(json.dumps(settings))
    with pytest.raises(
        RunError, match=r"engine\.deepspeed: the checkpoint has the weights in other groups than"
    ):
        on_ranks(1, train_here, changed(config, f"engine.deepspeed={tmp_path}/other.json"))


def go_on_with_small_parameters_whole(config):
    """A second pass of the trial, as some bases have on GPUs, leaves small parameters whole on every rank."""
    from prefix_ds.model import PrefixLM

    tried = PrefixLM._tried

    def tried_twice(self):
        tried(self)
        return tried(self)

    PrefixLM._tried = tried_twice
    train_here(config)


def test_whatever_ran_before_a_checkpoint_is_restored_leaves_no_trace(tmp_path):
    config = full_config(tmp_path)
    stopped = changed(config, f"run.folder={tmp_path}/stopped")
    on_ranks(2, train_here, config)
    on_ranks(2, stop_after, stopped, 3)
    on_ranks(2, go_on_with_small_parameters_whole, stopped)
    assert strip_times(metrics(stopped)) == strip_times(metrics(config))


def type_of_summed_gradients(config):
    with joined_world() as world:
        made = _trained(config, deepspeed_settings(config, world.size), tokenizer(), world)
        return made.base.engine.optimizer.grad_partitions_flat_buffer.dtype


def test_gradients_of_micro_batches_are_summed_in_float32(tmp_path):
    config = full_config(tmp_path, "model.dtype=bfloat16")
    assert on_ranks(1, type_of_summed_gradients, config) == [torch.float32]


def test_a_new_base_is_that_of_its_seed():
    config = parse_config(
        """
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1,
    num_attention_heads: 4}
data: {train: x.txt}
train: {method: pretrain}
run: {folder: r}
"""
    )
    one, again, other = (new_base(config.model, tokenizer(), seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_a_base_is_made_from_text_and_takes_a_prefix(tmp_path):
    prefix = run_config(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sleeps under the tree in the garden\n" * 200)
    pretrain = parse_config(
        f"""
model: {{dtype: float32, config: {{model_type: llama, vocab_size: 300, hidden_size: 32, intermediate_size: 64,
  num_hidden_layers: 2, num_attention_heads: 4, tie_word_embeddings: true}}}}
data: {{train: {tmp_path}/text.txt, max_length: 32, too_long: split}}
train: {{method: pretrain, max_steps: 60, global_batch_size: 16, micro_batch_tokens: 256, lr: 1.0e-2}}
run: {{folder: {tmp_path}/base_run}}
mlflow: {{uri: null}}
"""
    )
    on_ranks(2, train_here, pretrain)
    losses = [row["train/loss"] for row in metrics(pretrain) if "train/loss" in row]
    assert losses[-1] < 1.0, "200 times the same line is easily learned"
    words = AutoTokenizer.from_pretrained(f"{pretrain.run.folder}/model")
    model = result_of(pretrain)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = safe_open(f"{pretrain.run.folder}/model/model.safetensors", "pt").keys()
    assert "lm_head.weight" not in stored, "a tied weight is written once"
    ids = torch.tensor([words("the cat sleeps").input_ids])
    answer = model.generate(ids, max_new_tokens=4, do_sample=False)[0]
    written = words.decode(answer, skip_special_tokens=True)
    assert written.startswith("the cat sleeps under the tree")
    on_ranks(1, train_here, changed(prefix, f"model.name={pretrain.run.folder}/model"))
    assert len(metrics(prefix)) == 9


def test_a_new_tokenizer_leaves_no_text_unknown():
    words = tokenizer()
    for text in ("the cat", "Zwölf Boxkämpfer", "日本 \n\t", "🙂"):
        assert words.decode(words(text).input_ids, skip_special_tokens=True) == text
