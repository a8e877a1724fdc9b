"""Worker processes that do not outlive who started them."""
import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """To be called first in a worker of a pool.

    A parent that is killed cannot end its workers: they would finish their
    work, and wait for more forever.
    """

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
