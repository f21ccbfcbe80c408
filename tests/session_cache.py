"""Sessions of the same bytes are made once: half of those that the tests ask for were made before, for other data."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import pytest

from onnxcomp.runtime import sessions

KEPT, LARGEST = 48, 4 << 20  # sessions, and bytes of a model: those of the tests are small, and others are let go
made = threading.local()  # the constants that the session being made reads in place
kept: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
lock = threading.Lock()
create, source_of = sessions._create, sessions.Session._source


def _source(self: sessions.Session, ort: Any, model: Any, taps: Sequence[str], options: Any) -> bytes | str:
    source = source_of(self, ort, model, taps, options)
    made.buffers = (*self._buffers,)
    return source


def _create(ort: Any, source: bytes | str, options: Any, target: Any, name: str) -> Any:
    """A session that only runs, of constants that are in memory, is shared; it has no state between runs."""
    buffers = made.buffers
    arrays = {k: a for k, (a, _) in buffers[1].items()} if buffers else {}
    writes = options.enable_profiling or options.optimized_model_filepath
    if isinstance(source, str) or writes or len(source) + sum(a.nbytes for a in arrays.values()) > LARGEST:
        return create(ort, source, options, target, name)
    try:
        options.get_session_config_entry(sessions.FOLDER_KEY)  # its files may be others by now
        return create(ort, source, options, target, name)
    except RuntimeError:
        pass
    prepacking = options.get_session_config_entry("session.disable_prepacking")
    setting = (options.graph_optimization_level, options.intra_op_num_threads, prepacking, options.log_severity_level)
    key = (source, *((k, a.tobytes()) for k, a in arrays.items()), *setting, repr(target))
    with lock:
        if key in kept:
            kept.move_to_end(key)
            return kept[key]
    session = create(ort, source, options, target, name)
    session.buffers = buffers  # lives as long as what reads it
    with lock:
        kept[key] = session
        if len(kept) > KEPT:
            kept.popitem(last=False)
    return session


@pytest.fixture(autouse=True, scope="session")
def sessions_made_once() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "_create", _create)
        patch.setattr(sessions.Session, "_source", _source)
        yield
