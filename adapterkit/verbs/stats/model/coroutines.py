"""Functions that pause and resume, each on a thread of its own; exactly one runs at a time."""

import threading
from collections.abc import Callable
from typing import Any

_local = threading.local()


class PassCancelled(BaseException):
    """Ends the thread of a coroutine that will not resume."""


class Coroutine:
    """A function that runs until it pauses with a request, and resumes with the answer.

    (A generator would need every function in between to be one; here they are a model's own code
    and autograd's.)"""

    def __init__(self, run: Callable[[], object]):
        self._run, self._turn, self._stopped = run, threading.Semaphore(0), threading.Semaphore(0)
        self._answer: Any = None
        self._error: BaseException | None = None
        self._is_abandoned = False
        self.request: Any = None  # its open request; None if it has ended
        self.is_done = False
        self._thread: threading.Thread | None = None

    @staticmethod
    def current() -> "Coroutine | None":
        """The coroutine of the current thread."""
        return getattr(_local, "coroutine", None)

    def resume(self, answer: object = None) -> None:
        """Resume with the answer to its request, until it pauses again or ends; raises its
        exceptions."""
        self._answer, self.request = answer, None
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, daemon=True)
            self._thread.start()
        else:
            self._turn.release()
        self._stopped.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def stop(self, request: object) -> Any:
        """Wait for the answer to a request; call it in the coroutine's own thread."""
        self.request = request
        self._stopped.release()
        self._turn.acquire()
        if self._is_abandoned:
            raise PassCancelled
        answer, self._answer = self._answer, None
        return answer

    def close(self) -> None:
        """End it at any point."""
        self._is_abandoned = True
        if self._thread is not None:
            self._turn.release()
            self._thread.join()
        self.request, self.is_done = None, True

    def _main(self) -> None:
        _local.coroutine = self
        try:
            self._run()
        except PassCancelled:
            pass
        except BaseException as error:  # raised in the thread that resumed it
            self._error = error
        self.is_done = True
        del self._run
        self._stopped.release()
