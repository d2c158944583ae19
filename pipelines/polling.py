"""Looking again and again at what may have changed, beside the work."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def polling(look: Callable[[], object], seconds: float) -> Iterator[None]:
    """Within this context, a thread calls `look` every so many `seconds`, until that returns
    something true; none runs after it."""
    over = threading.Event()

    def watch() -> None:
        while not (over.wait(seconds) or look()):
            pass

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def end_with_parent(seconds: float) -> None:
    """From now on, end this process when its parent is gone, which cannot end it any more; looks
    every so many `seconds`."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
