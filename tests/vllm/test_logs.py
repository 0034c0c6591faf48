"""What kvkeep says in a server looks like what vLLM says."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest
from vllm.logging_utils import NewLineFormatter

from kvkeep.engines.vllm import logs
from kvkeep.errors import ConfigError


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """vLLM's log."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(NewLineFormatter("%(levelname)s %(asctime)s [%(fileinfo)s:%(lineno)d] %(message)s"))
    ours = logging.getLogger("kvkeep")
    before = ours.handlers[:], ours.filters[:], ours.level
    monkeypatch.setattr(logging.getLogger("vllm"), "handlers", [handler])
    yield stream
    ours.handlers[:], ours.filters[:] = before[:2]
    ours.setLevel(before[2])


def test_a_tier_speaks_as_vllm_does(lines: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's
    logs.join()
    logs.join()  # by the scheduler's half and the worker's, in one process
    logging.getLogger("kvkeep").warning("tier %s: is back", "remote")
    assert re.fullmatch(r"WARNING 20\S+ \S+ \[test_logs.py:\d+\] kvkeep: tier remote: is back\n", lines.getvalue())


def test_a_log_that_somebody_set_up_is_left_alone(lines: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = io.StringIO()
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler(theirs)])
    logs.join()
    logging.getLogger("kvkeep").warning("tier %s: is back", "remote")
    assert (lines.getvalue(), theirs.getvalue()) == ("", "tier remote: is back\n")


def test_a_wrong_option_has_a_line_of_its_own(lines: io.StringIO) -> None:
    with pytest.raises(ConfigError), logs.refusing():
        raise ConfigError("no option 'disc'; did you mean 'disk'?")
    assert lines.getvalue().endswith("kvkeep: no option 'disc'; did you mean 'disk'?\n")
