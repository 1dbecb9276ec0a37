"""What a stage may meet and its user must hear in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from maehpc.devices import is_out_of_memory
from maehpc.errors import RunError


@contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Turns running out of memory into a sentence that names the settings.

    Raises:
        RunError: memory ran out in the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            "out of memory: raise pretrain.accumulate or finetune.accumulate (the numbers stay the same), or lower "
            "explain.batch_size or data.resident_bytes"
        ) from error
