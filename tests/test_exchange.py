"""Exchange: a prefix means the same to PEFT and to us, whichever of the two wrote it.

The bases differ in what PEFT's format must get right: shared key/value heads, heads whose size is not hidden
size / heads, positions that are learnt, caps and windows, scaled keys.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefix_ds.checkpoint import read_prefix
from prefix_ds.config import ModelKeys
from prefix_ds.dist import joined_world
from prefix_ds.errors import ModelError
from prefix_ds.export import export_peft
from prefix_ds.model import PrefixLM
from prefix_ds.progress import Progress
from prefix_ds.result import prefix_writer
from prefix_ds.run_folder import open_run
from tests.laws import batch_of, distance
from tests.ranks import command, on_ranks
from tests.tiny_models import VOCABULARY, tiny_config
from tests.workshop import base_folder, tokenizer

torch.set_num_threads(1)

TOLERANCE, WRONG = 1e-5, 1e-2  # relative to the largest logit
LENGTH = 5
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {},
    "qwen3": {"head_dim": 24},
    "gemma2": {"head_dim": 24},
    "gemma3_text": {},
    "opt": {},
    "phi": {},
    "gpt_neox": {},
    "granite": {},
    "gpt_oss": {},
}
PROMPTS = [torch.arange(n) * 7 % (VOCABULARY - 4) + 3 for n in (1, 4, 11)]


def base_of(family):
    """A tiny base in float32, always the same one."""
    config = tiny_config(family)
    for name, value in FAMILIES.get(family, {}).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


def random_table(lm):
    """A table whose numbers differ from slot to slot in size, as trained ones do."""
    noise = torch.Generator().manual_seed(1)
    columns = [torch.randn(LENGTH, s.width, generator=noise) * (1 + n) / 2 for n, s in enumerate(lm.slots)]
    return torch.cat(columns, dim=1)


def our_logits(lm, table, slots):
    """The logits of each prompt, alone."""
    with torch.no_grad():
        return [lm.logits(batch_of([prompt]), table, slots) for prompt in PROMPTS]


def pefts_logits(model):
    with torch.no_grad():
        return [model(input_ids=p[None], attention_mask=torch.ones_like(p)[None]).logits[0] for p in PROMPTS]


def farthest(ours, theirs):
    return max(distance(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_our_export_and_computes_our_logits(tmp_path, family):
    from peft import PeftModel

    lm = PrefixLM(base_of(family))
    table = random_table(lm)
    write = prefix_writer(ModelKeys(name="any"), lm, lm.slots)
    write(tmp_path / "run" / "prefix", table, Progress(step=3))
    export_peft(tmp_path / "run", tmp_path / "peft")
    theirs = pefts_logits(PeftModel.from_pretrained(base_of(family), tmp_path / "peft").eval())
    assert farthest(our_logits(lm, table, lm.slots), theirs) < TOLERANCE
    assert farthest(our_logits(lm, None, ()), theirs) > WRONG, "without a prefix all would be equal"


def import_and_run(adapter, out, base):
    """Makes a run folder of an adapter, opens it, and runs it with its prefix and without."""
    from prefix_ds.importing import import_run
    from prefix_ds.opening import open_trained
    from prefix_ds.run_folder import open_run

    import_run(adapter, out, [f"model.name={base}", "model.dtype=float32"])
    with joined_world() as world:
        opened = open_trained(*open_run(out), world)
        fronts = (opened.table_PD, opened.slots), (None, ())
        return [[part.numpy() for part in our_logits(opened.lm, *front)] for front in fronts]


@pytest.mark.parametrize(
    ("family", "projection"),
    [
        ("llama", True),
        *((family, False) for family in ("llama", "gpt2", "qwen3", "gemma2", "opt", "gpt_oss")),
    ],
)
def test_we_import_pefts_prefix_and_compute_its_logits(tmp_path, family, projection):
    from peft import PrefixTuningConfig, get_peft_model

    base = base_of(family)
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(2)
    adapter = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_projection=projection, encoder_hidden_size=8
    )
    model = get_peft_model(base, adapter).eval()
    model.save_pretrained(tmp_path / "peft")
    theirs = pefts_logits(model)
    (found,) = on_ranks(1, import_and_run, tmp_path / "peft", tmp_path / "run", tmp_path / "base")
    with_prefix, without = ([torch.from_numpy(part) for part in parts] for parts in found)
    assert farthest(with_prefix, theirs) < TOLERANCE
    assert farthest(without, theirs) > WRONG


def test_there_and_back_changes_no_number(tmp_path):
    base = base_of("llama")
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    lm = PrefixLM(base)
    write = prefix_writer(ModelKeys(name=str(tmp_path / "base")), lm, lm.slots)
    write(tmp_path / "run" / "prefix", random_table(lm), Progress())
    export_peft(tmp_path / "run", tmp_path / "peft")
    on_ranks(1, import_and_run, tmp_path / "peft", tmp_path / "back", tmp_path / "base")
    there, back = (read_prefix(tmp_path / name / "prefix") for name in ("run", "back"))
    assert list(there.slots) == list(back.slots)
    for name, pair in there.slots.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, back.slots[name], strict=True))


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_keys_and_values_of_different_sizes_are_refused(tmp_path, family):
    lm = PrefixLM(base_of(family))
    write = prefix_writer(ModelKeys(name="any"), lm, lm.slots)
    write(tmp_path / "run" / "prefix", random_table(lm), Progress())
    with pytest.raises(
        ModelError, match=r"PEFT's format cannot hold this prefix: .* has keys of \d+ and val"
    ):
        export_peft(tmp_path / "run", tmp_path / "peft")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def pefts_adapter(folder, base, **keys):
    import peft

    model = AutoModelForCausalLM.from_pretrained(base)
    keys = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **keys)
    peft.get_peft_model(model, keys).save_pretrained(folder)
    return folder


def test_an_imported_run_keeps_the_revision_of_its_base(tmp_path):
    base = base_folder(tmp_path / "base")
    adapter = pefts_adapter(tmp_path / "adapter", base, revision="v2.1")
    (ended,) = command("import", adapter, tmp_path / "out", "model.dtype=float32")
    assert ended.code == 0, ended.err
    _, config = open_run(tmp_path / "out")
    assert (config.model.name, config.model.revision) == (str(base), "v2.1")
    assert read_prefix(tmp_path / "out" / "prefix").facts.revision == "v2.1"
    words = ["model.dtype=float32", f"model.name={base}"]
    (ended,) = command("import", adapter, tmp_path / "other", *words)
    assert ended.code == 0, ended.err
    assert open_run(tmp_path / "other")[1].model.revision is None, "it is that of the base that PEFT names"


def writing_nothing(rank):
    """Files of rank 1 cannot be written."""
    if rank:
        import prefix_ds.importing as room

        def refused(*_):
            raise AssertionError("only the first rank writes")

        room.write_config = room.import_peft = refused


def test_two_ranks_import_what_one_does(tmp_path):
    adapter = pefts_adapter(tmp_path / "adapter", base_folder(tmp_path / "base"))
    for size in (1, 2):
        for ended in command(
            "import",
            adapter,
            tmp_path / f"out{size}",
            "model.dtype=float32",
            size=size,
            before=writing_nothing,
        ):
            assert ended.code == 0, ended.err
    alone, together = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("out1", "out2")
    )
    assert alone == together


def test_an_imported_run_keeps_no_password(tmp_path):
    base = base_folder(tmp_path / "base")
    adapter = pefts_adapter(tmp_path / "adapter", base)
    uri = "mlflow.uri=http://bob:hunter2@host:5000"
    (ended,) = command("import", adapter, tmp_path / "out", f"model.name={base}", "model.dtype=float32", uri)
    assert ended.code == 0, ended.err
    assert "hunter2" not in (tmp_path / "out" / "run.yaml").read_text()
    assert "host:5000" in (tmp_path / "out" / "run.yaml").read_text()
