"""The lock of the engine: mutual exclusion, by turns."""

import threading

from exitlm.decode.fair_lock import FairLock


def test_a_thread_in_a_tight_loop_keeps_nobody_waiting() -> None:
    """Between two turns of one thread the loop has at most a few."""
    lock, stop, turns, gaps = FairLock(), threading.Event(), [0], list[int]()

    def loop() -> None:
        while not stop.is_set():
            with lock:
                turns[0] += 1
                sum(range(2000))

    def visit() -> None:
        for _ in range(50):
            before = turns[0]
            with lock:
                gaps.append(turns[0] - before)
        stop.set()

    threads = [threading.Thread(target=loop), threading.Thread(target=visit)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(gaps) == 50
    assert sorted(gaps)[25] <= 3


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
