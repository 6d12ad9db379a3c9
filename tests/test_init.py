"""The starter file and the table of keys say all there is, and nothing else."""

import re
import shlex
import stat

import pytest
import yaml

from prefix_ds.cli import app
from prefix_ds.config import RunConfig, parse_config
from prefix_ds.config.listing import key_table, print_keys
from prefix_ds.errors import RunError
from prefix_ds.init import starter_yaml, write_starter


def all_keys():
    return [
        f"{name}.{key}"
        for name, field in RunConfig.model_fields.items()
        for key in field.annotation.model_fields
    ]


def uncommented():
    """The starter with every key switched on."""
    return re.sub(r"^( *)#(?=\S)", r"\1", starter_yaml(), flags=re.MULTILINE)


def test_the_starter_is_a_run_as_it_stands():
    config = parse_config(starter_yaml())
    assert config.model.name
    assert config.data.prompt == "{dialogue}\nTL;DR:"


def test_the_starter_has_every_key_with_its_line():
    tree = yaml.safe_load(uncommented())
    assert sorted(f"{s}.{k}" for s, keys in tree.items() for k in keys) == sorted(all_keys())
    text = starter_yaml()
    comments = " ".join(line.strip(" #") for line in text.splitlines() if line.startswith("  # "))
    for row in key_table():
        assert row.doc in comments
    assert "prefix; all weights; or a new base from scratch: prefix, full, pretrain" in comments
    assert all(len(line) <= 110 for line in text.splitlines())


def test_switching_a_default_on_changes_nothing():
    assert parse_config(uncommented()) == parse_config(starter_yaml())


def test_a_starter_is_never_written_over_another(tmp_path):
    path = write_starter(tmp_path / "new" / "folder")
    assert path.read_text() == starter_yaml()
    path.write_text("mine")
    with pytest.raises(RunError, match=r"run\.yaml: is there already"):
        write_starter(path.parent)
    assert path.read_text() == "mine"
    assert [file.name for file in path.parent.iterdir()] == ["run.yaml"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_starter(tmp_path / "file")
    assert stat.S_ISREG((tmp_path / "file").stat().st_mode)


@pytest.mark.parametrize("name", ["run.yaml", "Task.YML"])
def test_a_file_is_no_folder_to_start_in(tmp_path, name):
    with pytest.raises(RunError, match=rf"/{name}: expected a folder, in which run\.yaml is written"):
        write_starter(tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_the_command_that_is_printed_can_be_called(tmp_path, capsys):
    app(["init", str(tmp_path / "my task")], standalone_mode=False)
    command = capsys.readouterr().out.partition("then: ")[2]
    assert shlex.split(command) == ["prefix-ds", "check", f"{tmp_path}/my task/run.yaml"]


def test_the_table_has_every_key_once_and_its_defaults_are_yaml():
    rows = key_table()
    assert [row.key for row in rows] == all_keys()
    for row in rows:
        field = RunConfig.model_fields[row.section].annotation.model_fields[row.name]
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        assert yaml.safe_load(row.default) == default
        assert row.type
        assert row.doc


@pytest.mark.parametrize(
    ("key", "type_"),
    [
        ("model.name", "text or null"),
        ("model.recompute", "true or false or whole number or auto"),
        ("prefix.length", "whole number >= 1 <= 1048576 or null"),
        ("prefix.layers", "all or list of whole numbers"),
        ("data.train", "text or list of texts or null"),
        ("train.betas", "2 numbers"),
        ("train.schedule", "cosine, linear, constant"),
        ("generate.top_p", "number > 0 <= 1"),
        ("mlflow.tags", "mapping"),
    ],
)
def test_types_are_told_in_words(key, type_):
    assert {row.key: row.type for row in key_table()}[key] == type_


def test_the_printed_page_shows_every_key(capsys):
    print_keys()
    page = capsys.readouterr().out
    assert all(key in page for key in all_keys())
