"""Imports are not searched for garbage, which is found all the same; a process that ends leaves its memory as it is."""

import gc
import subprocess
import sys
import weakref

import pytest
from conftest import ROOT

from lora_alpaca.config.importing import gc_disabled, importing


class Node:
    """An object that can hold itself."""

    def __init__(self):
        self.other = self


def test_what_is_imported_is_old_and_nothing_is_frozen():
    gc.collect()
    with importing():
        assert not gc.isenabled()
        node = Node()
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert any(found is node for found in gc.get_objects(generation=2))


def test_garbage_among_imports_is_collected():
    with importing():
        seen = weakref.ref(Node())
    assert seen() is not None  # until it is looked for
    gc.collect()
    assert seen() is None


def test_what_a_program_has_frozen_stays_so():
    try:
        gc.freeze()
        frozen = gc.get_freeze_count()
        with importing():
            pass
        assert gc.get_freeze_count() == frozen
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(enabled):
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ImportError), importing(), gc_disabled():
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_a_command_leaves_its_garbage_at_its_end():
    """Whatever is there when the process ends, was not searched again, and what is due at exit is done before."""
    program = (
        "import atexit, gc, sys\n"
        "atexit.register(lambda: print('frozen', gc.get_freeze_count() > 0))\n"  # the first is called last
        "from lora_alpaca.cli.verbs import main\n"
        "main(['--version'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.split()[1:]) == (0, ["frozen", "True"]), done.stderr
