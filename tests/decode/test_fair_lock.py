"""The lock of the engine: mutual exclusion, by turns."""

import threading

from exitlm.decode.fair_lock import FairLock


def test_who_waits_is_served_before_the_thread_that_asks_again() -> None:
    for _ in range(30):
        lock, order = FairLock(), list[str]()

        def visit(lock: FairLock = lock, order: list[str] = order) -> None:
            with lock:
                order.append("visitor")

        visitor = threading.Thread(target=visit)
        with lock:
            visitor.start()
            while lock._next.acquire(blocking=False):  # until the visitor waits
                lock._next.release()
        with lock:
            order.append("again")
        visitor.join(60)
        assert order == ["visitor", "again"]


def test_one_thread_at_a_time_and_any_depth() -> None:
    lock, inside, most = FairLock(), [0], [0]

    def work() -> None:
        for _ in range(200):
            with lock, lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                with lock:
                    sum(range(100))
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert (inside, most) == ([0], [1])


def test_an_error_inside_lets_go() -> None:
    lock, entered = FairLock(), threading.Event()
    try:
        with lock:
            raise ValueError
    except ValueError:
        pass

    def enter() -> None:
        with lock:
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(60)
    assert entered.is_set()
