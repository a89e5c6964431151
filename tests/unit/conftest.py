"""A tiny trained run that the tests of damage and of bad input share; each works on a copy."""

import shutil

import pytest
from bad_input_helpers import command_line, make_trained


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of `make_trained`, only to be read."""
    return make_trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def puna(trained, tmp_path, monkeypatch, capsys):
    """puna(*words) in a copy of `trained`."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return command_line(capsys, monkeypatch)
