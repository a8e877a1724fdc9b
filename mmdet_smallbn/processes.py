"""Worker processes that end with their parent process."""
import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this worker process when its parent process ends.

    Use it as the initializer of a process pool. A killed parent cannot end
    its workers: they would finish their work and then wait for more forever.
    """

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
