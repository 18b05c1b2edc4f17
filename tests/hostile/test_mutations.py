"""A few hundred changed folders, and a few whole commands; `make stress` tries ten thousand and two hundred."""

import os

import pytest

from hostile.mutations import Folders, Report, commands, in_process


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("hostile"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands run in forked processes")
def test_a_changed_folder_is_read_or_refused_in_one_line(folders):
    report = Report()
    in_process(folders, 280, report)
    assert report.faults == []
    assert report.counts["in process refused"] > 110


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands run in forked processes")
def test_a_command_that_is_given_a_changed_folder_ends_well_or_with_one_line(folders):
    report = Report()
    commands(folders, 22, report)
    assert report.faults == []
    assert report.counts["commands refused"] > 5
